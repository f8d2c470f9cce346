#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# Two hosts that share a disk, where no lock of one reaches the other: here two
# loop devices over one file, each with its own lock and its own page cache. The
# heartbeat keeps the second out, and the first from writing when it has lost.

. "$(dirname "$0")/lib.sh"
[ "$(id -u)" = 0 ] || skip "loop devices need root"
need losetup unshare script
disk=$work/disk
truncate -s 300M "$disk"
one=$(losetup -f --show "$disk") && two=$(losetup -f --show "$disk") || skip "no loop devices"
leave() { losetup -d "$one" "$two"; }
# A file without a name is one that nobody can lock.
rm "$disk"
other=$work/other
mkdir "$other"
daemon_of() {
	spaceweave info "$1" | sed -n 's/^state .*process \([0-9]*\)$/\1/p'
}
refused() { # WORDS COMMAND...
	local words=$1 status=0
	shift
	"$@" >/dev/null 2>"$work/err" || status=$?
	[ $status != 0 ] && grep -q "$words" "$work/err" ||
		fail "status $status, without '$words': $*: $(cat "$work/err")"
	same "$(wc -l <"$work/err")" 1 "lines of: $(cat "$work/err")"
	echo "  $(cat "$work/err")"
}
beats() { # number of the last one
	dd if="$one" bs=4096 skip=8 count=1 iflag=direct status=none | od -An -tu8 -j8 -N8
}

mkfs.spaceweave -q "$one"
unshare -u sh -c 'hostname first; exec "$@"' sh mount.spaceweave "$one" "$mnt" -o heartbeat=1
pid=$(daemon_of "$one")
echo kept >"$mnt/a"
sync "$mnt/a"
first_beat=$(beats)
refused "on first, process $pid" mount.spaceweave "$two" "$other"
(($(beats) - first_beat < 30)) || fail "refused after $(($(beats) - first_beat)) beats"
refused "on first, process $pid" mount.spaceweave "$two" "$other" -o ro
refused "on first, process $pid" mkfs.spaceweave -f "$two"
refused "on first, process $pid" fsck.spaceweave -y "$two"
echo more >"$mnt/b"
sync "$mnt/b"

# The first host stands still for longer than its heart may.
kill -STOP "$pid"
unshare -u sh -c 'hostname second; exec "$@"' sh mount.spaceweave "$two" "$other" -o heartbeat=1
same "$(cat "$other/a" "$other/b")" "kept
more" "what the first had synced"
echo second >"$other/c"
sync "$other/c"
kill -CONT "$pid"
if echo late >"$mnt/late" && sync "$mnt/late"; then
	fail "the first host writes on"
fi 2>/dev/null
echo third >"$other/d"
sync "$other/d"
umount -l "$mnt"
for ((i = 0; i < 500; i++)); do
	kill -0 "$pid" 2>/dev/null || break
	sleep 0.02
done
same "$(cat "$other/a" "$other/c" "$other/d")" "kept
second
third" "on the second host"
spaceweave umount "$other"
check "$two"

# Who repairs holds the image, too, also while no volume is open: here until its
# question is answered.
damage() { dd if=/dev/zero of="$one" bs=4096 seek=24 count=1 oflag=direct status=none; }
damage
mkfifo "$work/answer"
unshare -u sh -c 'hostname first; exec "$@"' sh \
	script -qec "fsck.spaceweave -f $one" /dev/null <"$work/answer" >"$work/out" 2>&1 &
repair=$!
exec 3>"$work/answer"
for ((i = 0; i < 3000; i++)); do
	grep -q 'backup 2.*? ' "$work/out" && break
	sleep 0.02
done
refused "fsck.spaceweave on first" mount.spaceweave "$two" "$other"
refused "fsck.spaceweave on first" fsck.spaceweave -y "$two"
echo y >&3
exec 3>&-
status=0
wait "$repair" || status=$?
same "$status" 1 "fsck: $(cat "$work/out")"
check "$two"

# So does who takes a repair back: the block was written when it was taken and
# when it was given back.
damage
unshare -u sh -c 'hostname first; exec "$@"' sh \
	fsck.spaceweave -fy -u "$work/undo" "$one" >"$work/out" && fail "no damage was found"
first_beat=$(beats)
unshare -u sh -c 'hostname second; exec "$@"' sh spaceweave undo "$work/undo" "$two"
(($(beats) >= first_beat + 2)) || fail "undo held nothing"
dd if="$one" bs=4096 skip=8 count=1 iflag=direct status=none | grep -q second ||
	fail "the block names another than who held it last"
fsck.spaceweave -fn "$one" >"$work/out" && fail "undo put nothing back"
fsck.spaceweave -fy "$one" >"$work/out" && fail "no damage was found after undo"
check "$two"

# A holder that died is waited for, not for ever.
mount.spaceweave "$one" "$mnt" -o heartbeat=1
kill -9 "$(daemon_of "$one")"
umount -l "$mnt"
mount.spaceweave "$two" "$other"
same "$(cat "$other/d")" third "after the first host died"
spaceweave umount "$other"
check "$two"
