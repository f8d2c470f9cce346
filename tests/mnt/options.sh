#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# Each option of mount.spaceweave is taken, does what it says where that can be
# seen, and what is no option is refused by name.

. "$(dirname "$0")/lib.sh"
shown() { # the options that /proc/mounts shows
	awk -v d="$mnt" '$2 == d { print "," $4 "," }' /proc/mounts
}
format 128M
for o in ro rw dev nodev suid nosuid exec noexec atime noatime relatime nodiratime \
	strictatime lazytime sync dirsync allow_other default_permissions fsname=me \
	commit=1 commit=300 discard nodiscard cache=16M cache=1G threads=1 threads=16 \
	poll=0 poll=50 poll=1000 io_uring noio_uring io_uring,threads=1 \
	defaults,noatime,nofail,_netdev,x-systemd.automount \
	rw,nodev,nosuid,noatime,commit=7,threads=2; do
	if [ "$(id -u)" != 0 ]; then
		case $o in dev | suid | allow_other) continue ;; esac
	fi
	start -o "$o" || fail "-o $o"
	case $o in
	ro)	shown | grep -q ,ro, || fail "$o: $(shown)"
		if touch "$mnt/x" 2>/dev/null; then fail "ro, but not"; fi ;;
	noexec | nodev | nosuid | sync | dirsync | noatime)
		shown | grep -q ",$o," || fail "$o: $(shown)" ;;
	fsname=*) awk -v d="$mnt" '$2 == d { print $1 }' /proc/mounts | grep -qx "${o#*=}" || fail "$o" ;;
	*)	awk -v d="$mnt" '$2 == d { print $1 }' /proc/mounts | grep -qx "$image" || fail "$o: source" ;;
	esac
	if [ "$o" != ro ]; then
		echo "$o" >"$mnt/file"
		same "$(cat "$mnt/file")" "$o"
	fi
	if [ "$o" = noexec ]; then
		cp /bin/true "$mnt/true"
		if "$mnt/true" 2>/dev/null; then fail "noexec, but it ran"; fi
	fi
	case $o in fsname=*) umount "$mnt" || fusermount3 -u "$mnt" ;; *) stop ;; esac
done
sleep 0.2

# times
atime() { stat -c %X "$mnt/$1"; }
for o in noatime relatime strictatime; do
	start -o $o
	echo x >"$mnt/t"
	touch -a -d '2001-01-01' "$mnt/t"
	touch -m -d '2000-01-01' "$mnt/t"
	stop
	start -o $o
	cat "$mnt/t" >/dev/null
	case $o in
	noatime) same "$(atime t)" "$(date -d 2001-01-01 +%s)" "$o" ;;
	*) [ "$(atime t)" -gt "$(date -d 2001-01-02 +%s)" ] || fail "$o: atime stays" ;;
	esac
	stop
done

# what is none
for o in nonsense nonsense=1 commit=x commit=-1 commit=301 threads=0 threads=1000 \
	cache=1k cache=many commit= data=journal poll=1001 poll=-1 poll= poll=5us io_uring=1 \
	noatime,bogus; do
	status=0
	mount.spaceweave "$image" "$mnt" -o "$o" 2>"$work/err" || status=$?
	[ $status != 0 ] || fail "accepted: $o"
	word=${o##*,}
	grep -q "${word%%=*}" "$work/err" || fail "$o is not named: $(cat "$work/err")"
	same "$(wc -l <"$work/err")" 1 "lines of: $(cat "$work/err")"
	if is_mounted "$mnt"; then fail "mounted with $o"; fi
done
for bad in "" "$image" "$image $mnt more"; do
	status=0
	# shellcheck disable=SC2086 # words are meant
	mount.spaceweave $bad >/dev/null 2>"$work/err" || status=$?
	[ $status != 0 ] && grep -q usage "$work/err" || fail "no usage for: $bad"
done
mount.spaceweave -h >/dev/null && mount.spaceweave -V >/dev/null

# in the foreground, with one thread, talking
mount.spaceweave -f -s "$image" "$mnt" &
pid=$!
for ((i = 0; i < 1000; i++)); do ! is_mounted "$mnt" || break; sleep 0.05; done
is_mounted "$mnt" || fail "-f -s does not mount"
kill -TERM $pid
wait $pid || fail "-f: status $? after SIGTERM"
mount.spaceweave -d "$image" "$mnt" >"$work/talk" 2>&1 &
pid=$!
for ((i = 0; i < 1000; i++)); do ! is_mounted "$mnt" || break; sleep 0.05; done
ls "$mnt" >/dev/null
stop
wait $pid || fail "-d: status $?"
grep -q LOOKUP\\\|READDIR "$work/talk" || fail "-d says nothing"

# the daemon lets go of the caller's streams: this ends
same "$(spaceweave mount "$image" "$mnt" && echo live)" live "spaceweave mount"
stop

# names that need care
odd="$work/a, b\\c d"
cp --sparse=always "$image" "$odd"
mount.spaceweave "$odd" "$mnt"
is_mounted "$mnt" || fail "an odd name"
spaceweave umount "$mnt"

# Through mount(8), which finds its helper in /sbin alone.
if [ "$(id -u)" = 0 ] && [ ! -e /sbin/mount.spaceweave ] && [ ! -e /sbin/mount.fuse.spaceweave ] &&
	[ "$bin" = "$top/build/bin" ]; then
	make -s -C "$top" install DESTDIR="$work/root" PREFIX=/usr >/dev/null
	[ -x "$work/root/usr/sbin/mount.spaceweave" ] || fail "make install"
	remove() { rm -f /sbin/mount.spaceweave /sbin/mount.fuse.spaceweave; }
	leave() { remove; }
	for t in spaceweave fuse.spaceweave; do
		ln -s "$work/root/usr/sbin/mount.spaceweave" "/sbin/mount.$t"
		mount -t $t "$image" "$mnt" -o noatime || fail "mount -t $t"
		grep -q "^$image $mnt fuse.spaceweave .*noatime" /proc/mounts || fail "mount -t $t: $(grep "$mnt" /proc/mounts)"
		if [ $t = fuse.spaceweave ]; then	# as the kernel calls it
			mount -o remount,ro "$mnt" || fail "mount -o remount,ro"
			if touch "$mnt/x" 2>/dev/null; then fail "remounted ro, but not"; fi
			mount -o remount,rw "$mnt" || fail "mount -o remount,rw"
			touch "$mnt/x"
		fi
		umount "$mnt"
		echo "$image $mnt $t rw,noatime,commit=3,nofail,x-y=z 0 2" >"$work/fstab"
		mount -T "$work/fstab" "$mnt" || fail "fstab, $t"
		umount "$mnt"
		remove
	done
else
	echo "not tried: mount -t, for it needs root and no installed mount.spaceweave"
fi
for ((i = 0; i < 1000; i++)); do fsck.spaceweave -p "$image" >/dev/null 2>&1 && break; sleep 0.05; done
check
