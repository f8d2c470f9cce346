#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# The whole way without root: mkfs, mount, use, umount, fsck. Started by root,
# the script does it as nobody.

. "$(dirname "$0")/lib.sh"
need fusermount3

if [ "$(id -u)" = 0 ] && [ -z "${PLAIN:-}" ]; then
	need setpriv
	[ -u "$(command -v fusermount3)" ] || skip "fusermount3 is not setuid"
	[ "$(stat -c %a /dev/fuse)" = 666 ] || skip "/dev/fuse is not for all"
	# the programs may lie where nobody may not look
	chmod 755 "$work"
	mkdir "$work/bin" "$work/home"
	cp "$bin"/* "$helpers/../fsck/damage" "$work/bin"
	cp "$0" "$top/tests/mnt/lib.sh" "$work/bin"
	chown nobody "$work/home"
	status=0
	PLAIN=1 SEED=$seed TMPDIR=$work/home SPACEWEAVE_BIN=$work/bin HOME=$work/home \
		SPACEWEAVE_DAMAGE=$work/bin/damage \
		setpriv --reuid=nobody --regid="$(id -g nobody)" --clear-groups \
		bash "$work/bin/$(basename "$0")" || status=$?
	exit $status
fi

me=$(id -u)
cd "$work"
format 256M -L mine
same "$(stat -c %u image)" "$me" "owner of the image"
start
same "$(stat -c '%u %a' "$mnt")" "$me 755" "owner and mode of the root"
grep -q " $mnt fuse.spaceweave .*user_id=$me" /proc/mounts || fail "not in /proc/mounts"

# use
mkdir -p "$mnt/a/b"
echo hello >"$mnt/a/b/c"
ln "$mnt/a/b/c" "$mnt/hard"
ln -s a/b/c "$mnt/soft"
mkfifo "$mnt/fifo"
same "$(stat -c '%u %h' "$mnt/hard")" "$me 2" "owner and links"
same "$(cat "$mnt/soft")" hello
chmod 000 "$mnt/a/b/c"
if cat "$mnt/soft" 2>/dev/null; then fail "read without permission"; fi
chmod 640 "$mnt/a/b/c"
if chown 0 "$mnt/a/b/c" 2>/dev/null; then fail "gave a file away to root"; fi
if mknod "$mnt/null" c 1 3 2>/dev/null; then fail "made a device"; fi
if command -v setfattr >/dev/null; then
	setfattr -n user.colour -v blue "$mnt/a"
	same "$(getfattr --absolute-names --only-values -n user.colour "$mnt/a")" blue
	if setfattr -n trusted.x -v y "$mnt/a" 2>/dev/null; then fail "set trusted.x"; fi
fi
if command -v setfacl >/dev/null; then
	setfacl -m u:1:r "$mnt/a/b/c"
	getfacl -pcn "$mnt/a/b/c" | grep -q '^user:1:r--' || fail "ACL"
fi
cp /bin/sh "$mnt/sh"
same "$("$mnt/sh" -c 'echo runs')" runs
chmod 4755 "$mnt/sh"
grep -q " $mnt .*nosuid" /proc/mounts || fail "suid is honoured"
(cd "$mnt" && tar cf - --exclude=./fifo . | tar tf - >/dev/null)
spaceweave info "$mnt" >/dev/null || fail "info"
df "$mnt" >/dev/null

# with the tool, and then with fusermount3 alone
stop
check
start
same "$(cat "$mnt/hard")" hello
fusermount3 -u "$mnt"
start			# waits for the daemon that is just finishing
same "$(cat "$mnt/hard")" hello
stop
check

# what a plain user may not do is said, not done by half
status=0
mount.spaceweave "$image" "$mnt" -o allow_other 2>err || status=$?
if ! grep -qs '^user_allow_other' /etc/fuse.conf; then
	[ "$status" != 0 ] && grep -q allow_other err || fail "allow_other: status $status, $(cat err)"
elif [ $status = 0 ]; then
	stop
fi
chmod 444 "$image"
status=0
mount.spaceweave "$image" "$mnt" 2>err || status=$?
[ "$status" != 0 ] && grep -qi 'permission denied' err || fail "image not writable: status $status, $(cat err)"
start -o ro
same "$(cat "$mnt/hard")" hello
if touch "$mnt/x" 2>/dev/null; then fail "wrote to a read-only mount"; fi
stop
fsck.spaceweave -fn "$image" >/dev/null || fail "fsck -n wants to write"
status=0
fsck.spaceweave -fy "$image" >/dev/null 2>err || status=$?
same "$status" 8 "fsck -y without permission"
chmod 644 "$image"
expect 0 fsck.spaceweave -fp "$image" >/dev/null

# what is rescued is for who rescued it
damage=${SPACEWEAVE_DAMAGE:-$helpers/../fsck/damage}
"$damage" "$image" inode-del /hard
"$damage" "$image" index-del / a
"$damage" "$image" dirent-del / a
expect 1 fsck.spaceweave -fy "$image" >/dev/null
start
same "$(stat -c '%u %a' "$mnt/hard")" "$me 600" "a file whose inode was lost"
same "$(cat "$mnt/hard" | tr -d '\0')" hello
same "$(stat -c %u "$mnt/lost+found")" "$me" "owner of lost+found"
ls "$mnt"/lost+found/*/b >/dev/null || fail "lost+found is not for its owner"
stop
check

# a device that is not ours, a directory that is not ours
status=0
mount.spaceweave "$image" / 2>err || status=$?
[ "$status" != 0 ] && [ -s err ] || fail "mounted on /"
