#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# A read-only mount changes no byte of the image, clean or not, shows the state
# after replay, and needs no permission to write.

. "$(dirname "$0")/lib.sh"

sum() {
	sha256sum <"$image"
}
look() { # at what is mounted read-only
	(cd "$mnt" && find . -print0 | sort -z | xargs -0 stat -c '%n %s %i %h %a %y %z')
	(cd "$mnt" && find . -type f -print0 | sort -z | xargs -0 sha256sum)
	for try in 'touch new' 'rm kept' 'mkdir d2' 'mv kept other' 'ln kept hard' \
		'chmod 600 kept' 'truncate -s 0 kept' 'setfattr -n user.a -v b kept' \
		'sh -c "echo x >>kept"' 'touch kept'; do
		if (cd "$mnt" && eval "$try") 2>/dev/null; then fail "done on a read-only mount: $try"; fi
	done
	sync -f "$mnt/kept"
	stat -f "$mnt" >/dev/null
}
read_only() { # WHAT
	local before
	before=$(sum)
	for option in ro ro,noatime ro,strictatime; do
		start -o $option
		look >"$work/look.$option"
		stop
		same "$(sum)" "$before" "$1, -o $option: the image"
		cmp "$work/look.ro" "$work/look.$option" || fail "$1: two looks differ"
	done
	# nor when it is killed
	start -o ro
	cat "$mnt/kept" >/dev/null
	pid=$(pgrep -nf "mount.spaceweave $image $mnt -o ro")
	kill -KILL "$pid"
	umount -l "$mnt" 2>/dev/null || fusermount3 -uz "$mnt"
	while kill -0 "$pid" 2>/dev/null; do sleep 0.01; done
	same "$(sum)" "$before" "$1, killed: the image"
}

format 256M
start
echo kept >"$mnt/kept"
mkdir "$mnt/d"
for i in $(seq 300); do echo "$i" >"$mnt/d/$i"; done
dd if=/dev/urandom of="$mnt/big" bs=1M count=20 status=none
stop
read_only clean

# Unclean: what was synced is in the journal alone.
start
echo "in the journal" >"$mnt/synced"
rm "$mnt/d/7"
mv "$mnt/d/8" "$mnt/d/eight"
dd if=/dev/urandom of="$mnt/big" bs=64k seek=3 count=5 conv=notrunc status=none
exec 9<"$mnt/d/9"		# an orphan
rm "$mnt/d/9"
sync "$mnt/synced" "$mnt/big" "$mnt/d"
want=$(sha256sum <"$mnt/big")
kill -KILL "$(daemon_pid)"
exec 9<&-
umount -l "$mnt" 2>/dev/null || fusermount3 -uz "$mnt"
read_only unclean
start -o ro
same "$(cat "$mnt/synced")" "in the journal"
same "$(sha256sum <"$mnt/big")" "$want" "big, replayed"
[ ! -e "$mnt/d/7" ] && [ ! -e "$mnt/d/8" ] && [ -e "$mnt/d/eight" ] && [ ! -e "$mnt/d/9" ] ||
	fail "not the replayed state"
stop
check

# without permission to write, and on a host that is read-only
chmod 444 "$image"
if [ "$(id -u)" = 0 ] && command -v setpriv >/dev/null && [ "$(stat -c %a /dev/fuse)" = 666 ]; then
	chmod 755 "$work"
	mkdir "$work/bin" "$work/theirs"
	cp "$bin"/* "$work/bin"
	chown nobody "$work/theirs"
	setpriv --reuid=nobody --regid="$(id -g nobody)" --clear-groups \
		"$work/bin/mount.spaceweave" "$image" "$work/theirs" -o ro
	same "$(setpriv --reuid=nobody --regid="$(id -g nobody)" --clear-groups cat "$work/theirs/synced")" \
		"in the journal" "as nobody"
	umount "$work/theirs"
fi
chmod 644 "$image"
# and then it is still good for writing
start
same "$(cat "$mnt/synced")" "in the journal"
stop
check
