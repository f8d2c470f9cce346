#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# Root may change the mount's flags while it is in use; the image is mounted
# with devices and setuid, as root mounts every file system.

. "$(dirname "$0")/lib.sh"
[ "$(id -u)" = 0 ] || skip "not root"
format 64M
start
options() { awk -v d="$mnt" '$5 == d { print $6 }' /proc/self/mountinfo; }
case ,$(options), in
*,nosuid,* | *,nodev,*) fail "mounted with $(options)" ;;
esac
echo a >"$mnt/a"
mount.spaceweave "$image" "$mnt" -o remount,ro
if touch "$mnt/b" 2>/dev/null; then fail "wrote to a read-only mount"; fi
same "$(cat "$mnt/a")" a
mount.spaceweave "$image" "$mnt" -o remount,rw,noexec
touch "$mnt/b"
case ,$(options), in
*,noexec,*) ;;
*) fail "remounted with $(options)" ;;
esac
stop
check
