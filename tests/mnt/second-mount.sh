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

# relative names work from wherever umount is called
cd "$work"
mount.spaceweave image mnt
grep -q "^image $mnt " /proc/mounts || fail "the source is not the image as given"
cd /
spaceweave umount "$mnt" || fail "umount of a mount whose image was given relatively"
free_now
