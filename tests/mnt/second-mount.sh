#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# One writer at a time: who is refused, who waits, and how a mount ends.

. "$(dirname "$0")/lib.sh"
second=$work/second
mkdir "$second"
refused() { # WHAT COMMAND...: fails, and names host and process on one line
	local what=$1 status=0
	shift
	"$@" >/dev/null 2>"$work/err" || status=$?
	[ $status != 0 ] || fail "not refused: $what"
	same "$(wc -l <"$work/err")" 1 "lines of: $(cat "$work/err")"
	grep -q "$(hostname)" "$work/err" && grep -q "process $pid" "$work/err" ||
		fail "$what: host or process is missing: $(cat "$work/err")"
}
gone() { # the daemon $pid ends within a minute
	for ((i = 0; i < 3000; i++)); do
		kill -0 "$pid" 2>/dev/null || return 0
		sleep 0.02
	done
	fail "process $pid is still there"
}
free_now() { # a writer could have it
	expect 0 fsck.spaceweave -p "$image" >/dev/null
}

format 256M
start
pid=$(daemon_pid)
[ -n "$pid" ] && kill -0 "$pid" || fail "spaceweave info names no daemon"
refused "a second mount" mount.spaceweave "$image" "$second"
refused "a second mount, read-only" mount.spaceweave "$image" "$second" -o ro
refused "mkfs" mkfs.spaceweave -f "$image" 256M
refused "fsck -p" fsck.spaceweave -p "$image"
ln "$image" "$work/other-name"
ln -s image "$work/soft"
refused "under another name" mount.spaceweave "$work/other-name" "$second"
refused "through a link" mount.spaceweave "$work/soft" "$second"
echo still >"$mnt/works"
same "$(cat "$mnt/works")" still
stop

# two readers, no writer
start -o ro
mount.spaceweave "$image" "$second" -o ro
same "$(cat "$mnt/works" "$second/works")" "still
still"
status=0
mkdir "$work/third"
mount.spaceweave "$image" "$work/third" 2>"$work/err" || status=$?
[ $status != 0 ] && grep -q 'in use' "$work/err" || fail "a writer beside readers: $(cat "$work/err")"
spaceweave umount "$second"
spaceweave umount "$mnt"

# right after umount(8), which does not wait
for i in 1 2 3; do
	start
	dd if=/dev/urandom of="$mnt/much" bs=1M count=40 status=none
	umount "$mnt" 2>/dev/null || fusermount3 -u "$mnt"
	mount.spaceweave "$image" "$second" || fail "a mount right after umount"
	same "$(stat -c %s "$second/much")" $((40 << 20))
	spaceweave umount "$second"
	free_now
done

# spaceweave umount returns when all is durable and released
start
dd if=/dev/urandom of="$mnt/much" bs=1M count=40 status=none
sum=$(sha256sum <"$mnt/much")
stop
free_now
check

# busy: it says so and changes nothing
start
exec 9>"$mnt/open"
status=0
spaceweave umount "$mnt" 2>"$work/err" || status=$?
[ $status != 0 ] && [ -s "$work/err" ] || fail "umount of a busy mount: status $status"
echo "still writable" >&9
same "$(cat "$mnt/open")" "still writable"

# lazily: the name goes at once, the file stays until it is closed
spaceweave umount -l "$mnt"
if is_mounted "$mnt"; then fail "umount -l left the mount"; fi
echo "written later" >&9
exec 9>&-
start		# waits for the daemon
same "$(tail -n 1 "$mnt/open")" "written later" "after a lazy umount"
same "$(sha256sum <"$mnt/much")" "$sum"

# signals end it cleanly, with all that lies in the kernel
for signal in TERM INT; do
	pid=$(daemon_pid)
	dd if=/dev/urandom of="$mnt/$signal" bs=1M count=20 status=none
	sum=$(sha256sum <"$mnt/$signal")
	kill -$signal "$pid"
	gone
	if is_mounted "$mnt"; then fail "SIG$signal left the mount"; fi
	spaceweave info "$image" | grep -q '^state *clean' || fail "not clean after SIG$signal"
	start
	same "$(sha256sum <"$mnt/$signal")" "$sum" "after SIG$signal"
done
# even while it is busy
pid=$(daemon_pid)
exec 9>"$mnt/busy"
echo before >&9
kill -TERM "$pid"
gone
exec 9>&- || true
umount -l "$mnt" 2>/dev/null || true
start
same "$(cat "$mnt/busy")" before "SIGTERM while busy"

# even without a place: what is mounted there since stays
pid=$(daemon_pid)
exec 9>"$mnt/busy"
spaceweave umount -l "$mnt"
mkfs.spaceweave -q "$work/other" 16M
mount.spaceweave "$work/other" "$mnt"
exec 8>"$mnt/other"
echo later >&9
kill -TERM "$pid"
gone
is_mounted "$mnt" || fail "SIGTERM after umount -l has unmounted another"
exec 9>&- || true
exec 8>&-
stop
start
same "$(cat "$mnt/busy")" later "SIGTERM after umount -l"

# killed: the next mount has it at once
pid=$(daemon_pid)
echo synced >"$mnt/synced"
sync "$mnt/synced"
kill -KILL "$pid"
gone
umount -l "$mnt" 2>/dev/null || fusermount3 -uz "$mnt"
start
same "$(cat "$mnt/synced")" synced
# ... also with the dead mount in place
kill -KILL "$(daemon_pid)"
sleep 0.1
mount.spaceweave "$image" "$second"
same "$(cat "$second/synced")" synced
spaceweave umount "$second"
spaceweave umount "$mnt"
if is_mounted "$mnt"; then fail "a dead mount cannot be unmounted"; fi
check

# killed while its heart beat: another host would wait two minutes, umount does not
mkfs.spaceweave -q "$work/beats" 16M
mount.spaceweave "$work/beats" "$mnt" -o heartbeat=60
kill -KILL "$(daemon_pid "$work/beats")"
expect 0 timeout 60 spaceweave umount -t 5 "$mnt"

# relative names work from wherever umount is called
cd "$work"
mount.spaceweave image mnt
grep -q "^image $mnt " /proc/mounts || fail "the source is not the image as given"
cd /
spaceweave umount "$mnt" || fail "umount of a mount whose image was given relatively"
free_now

# ---- a daemon that stands still holds up nobody but who wants its own volume
stopped=
leave() { [ -z "$stopped" ] || kill -CONT "$stopped"; }
bounded() { # STATUS COMMAND...: and not for ever
	local want=$1 status=0
	shift
	timeout 300 "$@" >"$work/out" 2>"$work/err" || status=$?
	same "$status" "$want" "status of $*: $(cat "$work/err")"
}
cd "$work"
mount.spaceweave image mnt		# what its image is only its daemon knows
cd /
cp --sparse=always "$image" "$work/moving"
mount.spaceweave "$work/moving" "$second"
pid=$(daemon_pid)
mkdir "$mnt/new"			# the kernel has to ask for the root's attributes again
stopped=$pid
kill -STOP "$pid"
bounded 0 spaceweave info "$second"
grep -q "^mounted  *$second\$" "$work/out" || fail "info of another volume: $(cat "$work/out")"
bounded 0 spaceweave info "$work/moving"
grep -q "^mounted  *$second\$" "$work/out" || fail "info of another image: $(cat "$work/out")"
bounded 0 spaceweave map "$second"
bounded 0 spaceweave scrub "$second"
bounded 0 spaceweave umount "$second"
bounded 0 fsck.spaceweave -fn "$work/moving"
bounded 1 spaceweave umount -t 1 "$mnt"
grep -q "does not answer" "$work/err" || fail "umount of what stands still: $(cat "$work/err")"
bounded 0 spaceweave umount -l "$mnt"
if is_mounted "$mnt"; then fail "umount -l left the mount"; fi
kill -CONT "$pid"
stopped=
gone
# ... nor for ever who has something dirty that it is to write
start
pid=$(daemon_pid)
echo dirty >"$mnt/dirty"
stopped=$pid
kill -STOP "$pid"
bounded 1 spaceweave umount -t 1 "$mnt"
same "$(wc -l <"$work/err")" 1 "lines of: $(cat "$work/err")"
kill -CONT "$pid"
stopped=
for ((i = 0; i < 100; i++)); do		# the umount(8) that was left may be first
	is_mounted "$mnt" || break
	spaceweave umount -q "$mnt" 2>/dev/null || sleep 0.1
done
gone
start
same "$(cat "$mnt/dirty")" dirty
stop
check

# A dead daemon cannot say what a relative name meant: it is not what has that name
# wherever somebody happens to be.
mkdir "$work/elsewhere"
cd "$work"
mkfs.spaceweave -q elsewhere/image 16M
mount.spaceweave image mnt
pid=$(daemon_pid)
cd "$work/elsewhere"
kill -KILL "$pid"
gone
bounded 1 spaceweave info "$mnt"
grep -q "does not answer" "$work/err" || fail "info of a dead mount: $(cat "$work/out" "$work/err")"
bounded 1 spaceweave umount "$mnt"
grep -q "is unmounted, but 'image' cannot be opened" "$work/err" ||
	fail "umount of a dead mount: $(cat "$work/err")"
if is_mounted "$mnt"; then fail "a dead mount stays"; fi
cd /

# ---- an image that is a loop device as well: nobody has it under one name who
# could not have it under the other
[ "$(id -u)" = 0 ] && command -v losetup >/dev/null && [ -e /dev/loop-control ] ||
	{ echo "no loop devices: left out"; exit 0; }
leave() {
	local m l
	for m in "$mnt" "$second" "$work/third"; do
		if is_mounted "$m"; then umount -l "$m"; fi
	done
	# ours alone: the numbers of those that went may be somebody else's by now
	for l in /sys/block/loop*/loop/backing_file; do
		if grep -qF "$work/" "$l" 2>/dev/null; then
			l=${l%/loop/*}
			losetup -d "/dev/${l##*/}"
		fi
	done
}
attach() { # [OPTIONS] FILE: $loop
	loop=$(losetup -f --show "$@") || { echo "no loop devices: left out"; exit 0; }
}
# Somebody who looks at each new device may have it open still: then it goes later.
detach() { # LOOP...
	local l n
	losetup -d "$@"
	for l; do
		for ((n = 0; n < 600; n++)); do
			grep -qsF "$work/" "/sys/block/${l##*/}/loop/backing_file" || continue 2
			sleep 0.05
		done
		fail "$l is not to be detached"
	done
}
says() { # WORDS COMMAND...: fails, with these words on its last line
	local words=$1 status=0
	shift
	"$@" >"$work/out" 2>"$work/err" || status=$?
	[ $status != 0 ] && tail -n 1 "$work/err" | grep -qF -- "$words" ||
		fail "status $status, without '$words': $*: $(cat "$work/err")"
}
# writers COMMAND WORDS NAME: all who would write are refused
writers() {
	"$1" "$2" fsck.spaceweave -p "$3"
	"$1" "$2" mkfs.spaceweave -f "$3"
	"$1" "$2" mkfs.spaceweave -n -f "$3"
	"$1" "$2" mount.spaceweave "$3" "$second"
}

# A name with all that sysfs does not tell well, and another one to call it by.
hostile=$work/$'a \\040 "name"\n(deleted)'
cp --sparse=always "$image" "$hostile"
ln "$hostile" "$work/plain"
plain=$work/plain
attach "$hostile"
writers says "$loop" "$plain"
says "$loop" spaceweave undo "$work/none" "$plain"
# who only reads may, as long as nobody writes
expect 0 fsck.spaceweave -fn "$plain" >/dev/null
mount.spaceweave "$plain" "$second" -o ro
same "$(cat "$second/synced")" synced
says "(deleted)" mount.spaceweave "$loop" "$mnt"
spaceweave umount "$second"

# mounted by the device's name alone
mount.spaceweave "$loop" "$mnt"
pid=$(daemon_pid "$loop")
echo through >"$mnt/through"
sync "$mnt/through"
writers refused "the file below" "$plain"
refused "read-only" mount.spaceweave "$plain" "$second" -o ro
same "$(daemon_pid "$plain")" "$pid" "who holds the file"
fsck.spaceweave -fn "$plain" >/dev/null 2>"$work/err" || fail "fsck -n of the file below"
grep -q "in motion" "$work/err" || fail "fsck -n took what is mounted for idle"
kill -KILL "$pid"
gone
umount -l "$mnt"
writers says "$loop" "$plain"
mount.spaceweave "$loop" "$mnt"
same "$(cat "$mnt/through")" through
spaceweave umount "$mnt"
check "$loop"

# ... and by the file's name, with the device there later
detach "$loop"
mount.spaceweave "$plain" "$mnt"
pid=$(daemon_pid "$plain")
attach "$hostile"
writers refused "the loop device" "$loop"
refused "read-only" mount.spaceweave "$loop" "$second" -o ro
spaceweave umount "$mnt"

# The name the device was made with is gone, and then stands for another file.
rm "$hostile"
writers says "$loop" "$plain"
cp --sparse=always "$image" "$hostile"
writers says "$loop" "$plain"
expect 0 fsck.spaceweave -p "$hostile" >/dev/null
cp --sparse=always "$image" "$hostile (deleted)"
expect 0 fsck.spaceweave -p "$hostile (deleted)" >/dev/null
detach "$loop"
check "$plain"

# Two devices on one file are one image; on two parts of it, two.
attach "$plain"
one=$loop
attach "$plain"
mount.spaceweave "$one" "$mnt"
pid=$(daemon_pid "$one")
writers refused "another device on the same file" "$loop"
spaceweave umount "$mnt"
detach "$one" "$loop"
both=$work/both
truncate -s 32M "$both"
attach --sizelimit $((16 << 20)) "$both"
one=$loop
attach --offset $((16 << 20)) "$both"
mkfs.spaceweave -q "$one"
mkfs.spaceweave -q "$loop"
mount.spaceweave "$one" "$mnt"
mount.spaceweave "$loop" "$second"
says "in use by" fsck.spaceweave -p "$both"
spaceweave umount "$mnt"
spaceweave umount "$second"
check "$one"
check "$loop"
detach "$one" "$loop"
# Partitions, added without a table, which not each kernel reads.
attach -P "$both"		# they go with the device
whole=$loop
if addpart "$whole" 1 0 32768 && addpart "$whole" 2 32768 16384 &&
	[ -b "${whole}p1" ] && [ -b "${whole}p2" ]; then
	mkfs.spaceweave -qf "${whole}p1"
	mkfs.spaceweave -qf "${whole}p2"
	mount.spaceweave "${whole}p1" "$mnt"
	mount.spaceweave "${whole}p2" "$second"
	pid=$(daemon_pid "${whole}p2")
	attach --offset $((32768 * 512)) "$both"
	refused "a partition under another name" fsck.spaceweave -p "$loop"
	spaceweave umount "$mnt"
	spaceweave umount "$second"
	expect 0 fsck.spaceweave -p "$loop" >/dev/null
else
	echo "no partitions on loop devices: left out"
fi
