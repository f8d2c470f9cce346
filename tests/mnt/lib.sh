# SPDX-License-Identifier: BSD-2-Clause
# For the scripts in tests/mnt: source it first. It makes a place to work in,
# $work, which goes when the script ends, with all that is mounted in it.
#
#   . "$(dirname "$0")/lib.sh"
#   format 1G                    # $image
#   start -o noatime             # mounts $image on $mnt
#   ...
#   stop                         # unmounts, waits until all is durable
#   check                        # fsck -fn says clean
#
# A script ends with 0, or 77 through skip, or anything else through fail.
# $seed is new each time and printed; SEED=n sets it.

set -eu
umask 022

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bin=${SPACEWEAVE_BIN:-$top/build/bin}
# Where programs from tests/mnt/*.c are.
helpers=${SPACEWEAVE_HELPERS:-$top/build/tests/mnt}
PATH=$bin:$PATH:/usr/sbin:/sbin
seed=${SEED:-$((RANDOM * 32768 + RANDOM))}
RANDOM=$seed
work=$(mktemp -d "${TMPDIR:-/var/tmp}/spaceweave.XXXXXX")
image=$work/image
mnt=$work/mnt
mkdir "$mnt"
echo "seed $seed"

skip() {
	echo "$*"
	exit 77
}

fail() {
	echo "FAILED: $*" >&2
	exit 1
}

# need COMMAND...: skip where one is missing.
need() {
	for c; do
		command -v "$c" >/dev/null || skip "no $c here"
	done
}

is_mounted() {
	# not mountpoint(1): it asks the daemon, which may be dead
	awk -v d="$1" '$5 == d && / - fuse.spaceweave / { n = 1 } END { exit !n }' \
		/proc/self/mountinfo
}

# The daemon's process, from the image's block that names the holder.
daemon_pid() {
	spaceweave info "${1:-$image}" | sed -n 's/^state .*process \([0-9]*\)$/\1/p'
}

# A script that leaves more behind has a function of its own for it.
leave() { :; }

tidy() {
	local status=$?
	trap - EXIT INT TERM
	set +e
	leave
	cd /
	awk -v w="$work/" 'index($5, w) == 1 { print $5 }' /proc/self/mountinfo |
		sort -r | while read -r m; do
			spaceweave umount -q -t 30 "$m" 2>/dev/null ||
				umount -l "$m" 2>/dev/null || fusermount3 -uz "$m"
		done
	if [ -n "${KEEP:-}" ]; then
		echo "kept: $work"
	else
		rm -rf --one-file-system "$work"
	fi
	exit $status
}
trap tidy EXIT
# What set -e ends a script for is said, too.
set -E
trap 'echo "line $LINENO of $(basename "$0"): status $?: $BASH_COMMAND" >&2' ERR
trap 'exit 130' INT
trap 'exit 143' TERM

# format SIZE [OPTIONS]: a new volume in $image.
format() {
	local size=$1
	shift
	rm -f "$image"
	mkfs.spaceweave -q "$@" "$image" "$size"
}

# start [OPTIONS]: mount $image on $mnt; SPACEWEAVE_OPTIONS are added to the -o.
start() {
	[ -c /dev/fuse ] || skip "no /dev/fuse here"
	mount.spaceweave "$image" "$mnt" ${SPACEWEAVE_OPTIONS:+-o "$SPACEWEAVE_OPTIONS"} "$@"
}

# Somebody else on the machine may be looking at the mount just now: a few tries,
# each told.
stop() {
	local i
	for i in 1 2 3 4 5; do
		spaceweave umount -q "$mnt" && return 0
		echo "umount, try $i, failed"
		sleep 1
	done
	return 1
}

# check [IMAGE]: fsck finds nothing.
check() {
	local status=0
	fsck.spaceweave -fn "${1:-$image}" >"$work/fsck.out" 2>&1 || status=$?
	if [ $status != 0 ]; then
		cat "$work/fsck.out"
		fail "fsck.spaceweave -fn exits $status"
	fi
}

# expect STATUS COMMAND...: it must end with that status.
expect() {
	local want=$1 status=0
	shift
	"$@" || status=$?
	[ "$status" = "$want" ] || fail "status $status, not $want: $*"
}

same() {
	[ "$1" = "$2" ] || fail "${3:-differs}: '$1' is not '$2'"
}
