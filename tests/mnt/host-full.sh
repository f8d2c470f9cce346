#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# The disk that the image stands on is full: writes say so, nothing synced is
# lost, rm works, and what it frees comes back to that disk while mounted.

. "$(dirname "$0")/lib.sh"
fill=$helpers/fill
[ -x "$fill" ] || skip "no $fill: make tests"
[ "$(id -u)" = 0 ] || skip "a disk of its own needs root"
cd "$work"
truncate -s 96M disk
mkdir host
mkfs.ext4 -qF -m 0 disk && mount -o loop disk host 2>/dev/null || skip "no loop devices"
avail() {
	df --output=avail -k host | tail -n 1
}

image=$work/host/image
format 1G
start
mkdir "$mnt/a" "$mnt/b"
"$fill" small "$mnt/a" 300 >/dev/null
status=0
"$fill" large "$mnt/b" >out 2>err || status=$?
echo "a full host: $(cat out err)"
grep -q . out err || fail "silence"
"$fill" verify "$mnt/a" || fail "small files lost"
"$fill" verify "$mnt/b" || fail "large files lost"
dd if=/dev/zero of=host/rest bs=4k status=none 2>/dev/null || true # not a block is left
for ((i = 0; i < 20000; i += 200)); do
	seq -f "$mnt/d%g" $i $((i + 199)) | xargs mkdir 2>err || break
done
[ $i -lt 20000 ] || fail "20000 directories"
grep -qv 'No space left' err && fail "mkdir: $(grep -v 'No space left' err | head -n 1)"
sync -f "$mnt" 2>err || grep -q 'No space' err || fail "sync: $(cat err)" # once, for what was cached
rm -r "$mnt/b" || fail "rm"
for ((i = 0; i < 300; i++)); do
	sync -f "$mnt" || fail "sync after rm"
	[ "$(avail)" -lt 20000 ] || break
	sleep 0.1
done
echo "back on the host after rm: $(avail) KiB"
mkdir "$mnt/b" "$mnt/c" || fail "no space comes back from rm"
"$fill" small "$mnt/b" 100 || fail "no space comes back from rm"
"$fill" verify "$mnt/b" || fail "what was written after rm"
# The daemon dies while the host has not a block left.
"$fill" large "$mnt/c" >out 2>err || true
dd if=/dev/zero of=host/more bs=4k status=none 2>/dev/null || true
kill -9 "$(daemon_pid)"
for ((i = 0; i < 100; i++)); do
	umount -l "$mnt" 2>/dev/null || break
done
start || fail "no mount after a kill on a full host"
"$fill" verify "$mnt/a" || fail "lost in a kill on a full host"
rm -r "$mnt/c" || fail "rm after a kill on a full host"
stop
check
# The host has room again.
image=$work/again
cp --sparse=always "$work/host/image" "$image"
start
"$fill" verify "$mnt/a" || fail "lost, after a new mount"
stop
