#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# What is wrong is said in a sentence, with a proper exit status: never a
# crash, never silence; and what was synced is not lost.

. "$(dirname "$0")/lib.sh"
fill=$helpers/fill
[ -x "$fill" ] || skip "no $fill: make tests"

# says REGEX COMMAND...: it fails, without a signal, and says so on one line
says() {
	local what=$1 status=0
	shift
	"$@" >/dev/null 2>"$work/err" || status=$?
	[ $status != 0 ] || fail "no failure: $*"
	[ $status -lt 64 ] || fail "status $status: $*: $(cat "$work/err")"
	same "$(wc -l <"$work/err")" 1 "lines of: $*: $(cat "$work/err")"
	grep -Eqi "$what" "$work/err" || fail "'$what' is missing: $*: $(cat "$work/err")"
	echo "  $(sed "s|$work/||g" "$work/err")"
	if is_mounted "$mnt"; then fail "mounted all the same"; fi
}
both() { # REGEX IMAGE: what mount and fsck say
	says "$1" mount.spaceweave "$2" "$mnt"
	says "$1" mount.spaceweave "$2" "$mnt" -o ro
	local status=0
	fsck.spaceweave -fn "$2" >"$work/out" 2>&1 || status=$?
	[ $status -ge 4 ] && [ $status -lt 64 ] || fail "fsck $2: status $status"
	[ -s "$work/out" ] || fail "fsck $2 is silent"
}
dead() { # the mount whose daemon $1 was killed
	kill -KILL "$1"
	while kill -0 "$1" 2>/dev/null; do sleep 0.01; done
	umount -l "$mnt" 2>/dev/null || fusermount3 -uz "$mnt"
}

cd "$work"
format 64M
start
echo kept >"$mnt/kept"
stop

# ---- images
: >empty
both 'empty|not a|short|no Spaceweave' empty
head -c 1M /dev/zero >zeroes
both 'not a|no Spaceweave' zeroes
head -c 3M /dev/urandom >noise
both 'not a|no Spaceweave' noise
if command -v mkfs.ext4 >/dev/null; then
	truncate -s 16M ext4
	mkfs.ext4 -qF ext4
	both 'not a|no Spaceweave' ext4
	says 'ext4' mkfs.spaceweave ext4
fi
cp image short
truncate -s 63M short
both 'short|cut|size|smaller|beyond' short
says 'No such file' mount.spaceweave nowhere "$mnt"
says 'directory|regular' mount.spaceweave / "$mnt"
mkfifo fifo
says 'regular|block device' mount.spaceweave fifo "$mnt"
says 'small|least|1' mkfs.spaceweave new 4K
says 'No such file' mkfs.spaceweave no/such/dir 64M
rm -f new

# ---- directories
says 'No such file' mount.spaceweave image "$work/nodir"
says 'not a directory' mount.spaceweave image "$work/noise"
mkdir full
touch full/x
says 'not empty' mount.spaceweave image full
mount.spaceweave image full -o nonempty
same "$(cat full/kept)" kept
spaceweave umount full

# ---- without standard output and error: what is said goes nowhere, not into the image
cp image silent
timeout -k 5 30 mount.spaceweave silent "$mnt" <&- >&- 2>&- || fail "status $?"
head -c 8K /dev/zero | tr '\0' x >"$mnt/spoilt"
spaceweave umount "$mnt"
LC_ALL=C sed -i s/xxxxxxxx/yxxxxxxx/g silent
mount.spaceweave -f silent "$mnt" >&- 2>&- &
until is_mounted "$mnt"; do sleep 0.01; done
if cat "$mnt/spoilt" >out 2>err; then fail "a spoilt block was read"; fi
kill -KILL $! && wait $! || true
umount -l "$mnt" 2>/dev/null || fusermount3 -uz "$mnt"
same "$(head -c 8 silent)" PACEWAVE

# ---- versions and features that are not known
damage=$helpers/../fsck/damage
for what in version incompat ro_compat compat; do
	cp image "$what"
	for slot in 0 1 2 3; do
		"$damage" "$what" super $slot $what 0x80
	done
done
both version version
both feature incompat
says 'feature' mount.spaceweave ro_compat "$mnt"
for what in ro_compat,ro compat,rw; do
	mount.spaceweave "${what%,*}" "$mnt" -o "${what#*,}"
	same "$(cat "$mnt/kept")" kept "an unknown feature that need not be known"
	spaceweave umount "$mnt"
done

# ---- the host file shrinks under us
cp image shrinks
image=$work/shrinks
start
head -c 30M /dev/urandom >"$mnt/big"
sync "$mnt/big"
pid=$(daemon_pid)
truncate -s 16M shrinks
echo 3 >/proc/sys/vm/drop_caches 2>/dev/null || true
cat "$mnt/big" >out 2>err || true
cp "$mnt/kept" out 2>>err || true
(head -c 5M /dev/urandom >"$mnt/more" && sync "$mnt/more") 2>>err || true
kill -0 "$pid" || fail "the daemon died when its file shrank"
spaceweave umount -t 20 "$mnt" 2>>err || true
if is_mounted "$mnt"; then fail "cannot unmount when the file has shrunk"; fi
both '.' shrinks
