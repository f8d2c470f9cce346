#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# spaceweave scrub: finds nothing where nothing is wrong, mounted and busy or
# not; names files and offsets that are damaged; goes on where it was cut off.

. "$(dirname "$0")/lib.sh"

scrub() { # scrub STATUS ARGUMENTS; what it says is in $work/out
	local want=$1 status=0
	shift
	timeout 120 spaceweave scrub "$@" >"$work/out" 2>&1 || status=$?
	[ "$status" = "$want" ] || {
		cat "$work/out"
		fail "scrub $*: status $status, not $want"
	}
}

format 512M
start
mkdir -p "$mnt/a/b c"
yes 'the line in the middle of nowhere' | head -c 300000 >"$mnt/a/b c/victim"
head -c 60000000 /dev/urandom >"$mnt/bulk"
ln "$mnt/a/b c/victim" "$mnt/other name"
sync "$mnt/bulk" "$mnt/a/b c/victim"

# Beside a daemon that writes as fast as it can, and checkpoints often.
(
	trap 'exit 0' TERM
	while :; do
		for i in 1 2 3 4 5 6 7 8; do
			head -c 3000000 /dev/urandom >"$mnt/busy$i"
		done
		sync -f "$mnt"
		rm -f "$mnt"/busy*
	done
) &
writer=$!
for _ in 1 2 3 4; do
	scrub 0 -q "$mnt"
done
scrub 0 -q "$image"
kill "$writer"
wait "$writer" || true
rm -f "$mnt"/busy*
stop
scrub 0 "$image"
grep -q 'all is well' "$work/out" || fail "scrub does not say that all is well"

# A block of the file, behind everybody's back.
at=$(grep -obUa -m1 'the line in the middle of nowhere' "$image" | head -n 1 | cut -d: -f1)
block=$((at / 4096 * 4096 + 5 * 4096))
printf 'x' | dd of="$image" bs=1 seek=$((block + 77)) conv=notrunc status=none
scrub 4 "$image"
grep -q "^/a/b c/victim: 4096 bytes from offset [0-9]* are not what was written" "$work/out" ||
	grep -q "^/other name: 4096 bytes from offset" "$work/out" || {
	cat "$work/out"
	fail "the damaged file is not named"
}
offset=$(sed -n 's/.* from offset \([0-9]*\) are not.*/\1/p' "$work/out")
start -o ro
scrub 4 "$mnt"
grep -q "^$mnt/.*: 4096 bytes from offset $offset are not" "$work/out" || {
	cat "$work/out"
	fail "mounted, the damaged file is not named"
}
# The same block is what a reader is refused, and no other.
dd if="$mnt/other name" of=/dev/null bs=4096 skip=$((offset / 4096)) count=1 status=none 2>/dev/null &&
	fail "the damaged block could be read"
stop

# Cut off, and on again: found things are not forgotten.
spaceweave scrub -r 20M -s "$work/state" "$image" >"$work/out" 2>&1 &
pid=$!
sleep 1.5
kill "$pid"
status=0
wait "$pid" || status=$?
[ $((status & 32)) = 32 ] || fail "cut off, scrub exits with $status"
[ -s "$work/state" ] || fail "there is no state file"
grep '^done' "$work/state"
scrub 4 -s "$work/state" "$image"
grep -q "from offset $offset are not" "$work/out" || fail "gone on, it does not name the file"
grep -q 'goes on' "$work/out" || fail "it has begun anew"
[ ! -e "$work/state" ] || fail "the state file is left"

# Not another volume's.
mkfs.spaceweave -q "$work/second" 16M
printf 'scrub 00112233445566778899aabbccddeeff\nphase 0\n' >"$work/state"
scrub 8 -s "$work/state" "$work/second"
mkfifo "$work/fifo"
scrub 8 -s "$work/fifo" "$image"
scrub 16
scrub 8 "$work"
