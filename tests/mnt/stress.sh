#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# stress-ng's stressors of file systems, each alone: none fails, the daemon
# lives, and at the end its memory is what it was after as much work before.
# timeout: 3600
#
# SECS=n (1): each. STRESSORS="dentry hdd" or all (some): which.

. "$(dirname "$0")/lib.sh"
need stress-ng
secs=${SECS:-1}
rss() { awk '/^VmRSS/ { print $2 }' "/proc/$daemon/status"; }

# All but those that a file system has nothing to do with, or no FUSE has
# (binderfs, fiemap, verity), or that a machine may hang of (bind-mount).
list=${STRESSORS:-chattr dentry dirmany fallocate fpunch handle hdd link rename symlink utime xattr}
[ "$list" != all ] || list=$(stress-ng --class 'filesystem?' |
	sed 's/^class.*stressors: //' | tr ' ' '\n' |
	grep -vxE 'bind-mount|binderfs|dup|eventfd|fiemap|ioprio|procfs|verity')
format 4G
# caches that are soon as full as they get
start -o cache=16M
daemon=$(daemon_pid)
round() {
	local s status
	for s in $list; do
		status=0
		timeout -k 10 $((secs + 110)) stress-ng --temp-path "$mnt" "--$s" 2 --timeout "${secs}s" \
			--verify >"$work/out" 2>&1 || status=$?
		kill -0 "$daemon" 2>/dev/null || fail "$s: the daemon died"
		case $status in
		0) ;;
		3 | 4) echo "$s: does not run here: $(grep -m1 skipping "$work/out")" ;;
		*)
			cat "$work/out"
			fail "$s: status $status"
			;;
		esac
	done
}
round # the caches fill
# What leaks grows each time; how much is in use at one moment is nobody's to say.
for i in 1 2 3 4; do
	before=$(rss)
	round
	after=$(rss)
	echo "$(echo "$list" | wc -w) stressors, once more: VmRSS from $before to $after KiB"
	[ "$i" = 1 ] || [ "$after" -gt $((before + 8192)) ] || break
	[ "$i" != 4 ] || fail "the daemon's memory grows"
done
# what chattr's stressor left is nobody's business
chattr -R -ia "$mnt" 2>/dev/null || true
find "$mnt" -mindepth 1 -delete
stop
check
