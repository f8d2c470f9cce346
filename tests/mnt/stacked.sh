#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# What stands on a mount: an overlay (its upper and its lower folders), a loop
# device, which outlives the daemon's death. As root alone.
# timeout: 1800
#
# DEBOOTSTRAP=1: also a Debian in the mount, from the network, that installs a
# package and is run as a container.

. "$(dirname "$0")/lib.sh"
[ "$(id -u)" = 0 ] || skip "not root"
need setfattr getfattr losetup mkfs.ext4 e2fsck findmnt
format 6G
start -o allow_other,dev,suid
merged=$work/merged
mkdir "$merged"

# ---- overlayfs
over() { mount -t overlay overlay -o "$1" "$merged"; }
lower() { # something to look at below
	mkdir -p "$1/dir/sub" "$1/gone"
	for i in 1 2 3; do echo "low $i" >"$1/f$i"; echo "$i" >"$1/dir/$i"; done
	ln "$1/f3" "$1/f3b"
	setfattr -n user.a -v b "$1/f2"
	cp /bin/true "$1/true"
	chmod 4755 "$1/true"
}
lower "$work/lower"
grep -qw overlay /proc/filesystems || echo "no overlayfs in this kernel: left out"
# $1: lower folder; $2: options
try_over() {
	local up=$mnt/over$((++overs)) n
	mkdir -p "$up/u" "$up/w"
	over "lowerdir=$1,upperdir=$up/u,workdir=$up/w$2" || fail "overlay, ${2:-plain}"
	(
		cd "$merged"
		echo more >>f1
		same "$(paste -sd' ' f1)" "low 1 more"
		# what the kernel remembers no more is found again
		{ echo 2 >/proc/sys/vm/drop_caches; } 2>/dev/null || true
		rm f2 dir/1
		same "$(stat -c %F "$up/u/f2")" "character special file" "a whiteout"
		rm -r gone
		mkdir gone			# nothing shows through
		same "$(ls -A gone)" ""
		# a folder of the lower layer moves by copy, or by a redirect
		mv dir dir2
		same "$(echo dir2/*)" "dir2/2 dir2/3 dir2/sub"
		mv f3 f4
		same "$(cat f4)" "low 3"
		chmod 600 f1
		chown 3:4 f1
		setfattr -n user.b -v c f1
		ln f4 f5
		touch x && rm x
		# d_type is told right, or overlayfs would list whiteouts
		n=$(find . -mindepth 1 -type c | wc -l)
		same "$n" 0 "whiteouts seen"
	)
	umount "$merged"
	same "$(getfattr --absolute-names --only-values -n trusted.overlay.opaque "$up/u/gone" 2>/dev/null ||
		getfattr --absolute-names --only-values -n user.overlay.opaque "$up/u/gone")" y "opaque"
	rm -rf "$up/w/work/incompat"	# what "volatile" leaves against a second mount
	over "lowerdir=$1,upperdir=$up/u,workdir=$up/w$2" || fail "overlay again, ${2:-plain}"
	same "$(cd "$merged" && echo *)" "dir2 f1 f3b f4 f5 gone true"
	same "$(stat -c '%a %u %g' "$merged/f1") $(getfattr --absolute-names --only-values -n user.b "$merged/f1")" "600 3 4 c"
	same "$(stat -c %a "$merged/true")" 4755
	umount "$merged"
	echo "overlay with ${2:-no option}"
}
overs=0
if grep -qw overlay /proc/filesystems; then
	lower "$mnt/lower"
	for o in "" ,redirect_dir=on ,redirect_dir=on,metacopy=on ,xino=on ,volatile ,userxattr; do
		try_over "$work/lower" "$o"
		try_over "$mnt/lower" "$o"
	done
	stop
	start -o allow_other,export
	for o in "" ,index=on ,index=on,nfs_export=on; do
		try_over "$work/lower" "$o"
	done
	stop
	start -o allow_other,dev,suid
fi

# ---- a loop device, with and without direct I/O
backing=$mnt/backing
# Goes with its mount.
loop() {
	mount -o loop "$backing" "$merged" &&
		losetup --direct-io="$1" "$(findmnt -no SOURCE "$merged")"
}
sound() {
	umount "$merged"
	e2fsck -fn "$backing" >"$work/e2fsck" 2>&1 || { cat "$work/e2fsck"; fail e2fsck; }
}
tree=/usr/include/linux
for direct in off on; do
	[ -e /dev/loop-control ] || { echo "no loop devices here: left out"; break; }
	truncate -s 512M "$backing"
	mkfs.ext4 -q "$backing"
	loop $direct
	cp -a $tree "$merged/a"
	sync -f "$merged"
	before=$(stat -c %b "$backing")
	rm -rf "$merged/a"
	sync -f "$merged"
	fstrim "$merged"		# becomes punched holes
	sync -f "$mnt"
	[ "$(stat -c %b "$backing")" -lt "$before" ] || fail "trimmed, and no smaller"
	cp -a $tree "$merged/b"
	sound
	loop $direct
	diff -r $tree "$merged/b" || fail "loop, direct-io=$direct"
	sound
	echo "loop device, direct-io=$direct"
	rm "$backing"
done
if [ -e /dev/loop-control ]; then
	# the daemon dies under it: what was synced is there
	truncate -s 512M "$backing"
	mkfs.ext4 -q "$backing"
	loop off
	cp -a $tree "$merged/a"
	sync -f "$merged"
	(i=0; while touch "$merged/more$i" 2>/dev/null; do i=$((i + 1)); done) &
	busy=$!
	sleep 0.5
	daemon=$(daemon_pid)
	kill -KILL "$daemon"
	while kill -0 "$daemon" 2>/dev/null; do sleep 0.1; done
	kill $busy 2>/dev/null || true
	wait $busy 2>/dev/null || true
	umount -l "$merged"
	umount -l "$mnt"
	check
	start -o allow_other,dev,suid
	loop off
	diff -r $tree "$merged/a" || fail "loop, after the daemon's death"
	sound
	echo "loop device, the daemon killed"
fi

# ---- a Debian
if [ -n "${DEBOOTSTRAP:-}" ]; then
	need debootstrap chroot
	root=$mnt/root
	debootstrap --variant=minbase stable "$root" >"$work/debootstrap" 2>&1 ||
		{ tail "$work/debootstrap"; fail debootstrap; }
	mount -t proc proc "$root/proc"
	chroot "$root" apt-get -o APT::Install-Recommends=0 install -y hello git \
		>"$work/apt" 2>&1 || { tail "$work/apt"; fail apt-get; }
	same "$(chroot "$root" hello)" "Hello, world!"
	chroot "$root" dpkg -V || fail "dpkg -V"
	same "$(chroot "$root" dpkg --audit)" ""
	same "$(stat -c %a "$root/bin/su")" 4755
	umount "$root/proc"
	echo "debootstrap"
	# shellcheck disable=SC2016 # the root of a container: in namespaces of its own, as some other user
	unshare -mpf --mount-proc="$root/proc" chroot "$root" setpriv --reuid=65534 --regid=65534 \
		--clear-groups sh -c 'test $$ = 1 && test "$(id -u)" = 65534 && ! touch /etc/x 2>/dev/null' ||
		fail "as a container"
	if command -v podman >/dev/null; then
		p="podman --root $mnt/podman --runroot $work/podman --cgroup-manager=cgroupfs"
		tar -C "$root" -cf - . | $p import - spaceweave-test >/dev/null 2>&1 || fail "podman import"
		if $p run --rm --network=none --cgroups=disabled spaceweave-test \
			sh -c 'rm /etc/motd && hello' >"$work/out" 2>"$work/err"; then
			same "$(cat "$work/out")" "Hello, world!" podman
			echo "podman, $($p info --format '{{.Store.GraphDriverName}}')"
		else
			echo "podman does not run here: left out: $(tail -n 1 "$work/err")"
		fi
		$p rmi -f spaceweave-test >/dev/null 2>&1 || true
		umount "$mnt/podman/overlay" 2>/dev/null || true
	fi
	rm -rf --one-file-system "$root"
fi
stop
check
