#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# cache= bounds what the daemon remembers: many files made, walked and removed
# do not grow it beyond that and what it needs for itself.
#
# FILES=n (60000), CACHE=n MiB (32)

. "$(dirname "$0")/lib.sh"
files=${FILES:-60000}
cache=${CACHE:-32}
fill=$helpers/fill
[ -x "$fill" ] || skip "no $fill: make tests"
# Beside the cache: threads with a buffer each, the journal's groups, the
# allocator, a checkpoint under way, and what malloc keeps in pieces.
over=${OVER:-96}

format 16G
start -o "cache=${cache}M"
pid=$(daemon_pid)
rss() {
	sed -n "s/^$1:[[:space:]]*\([0-9]*\) kB/\1/p" "/proc/$pid/status"
}
say() {
	echo "$1: VmRSS $(($(rss VmRSS) / 1024)) MiB, VmHWM $(($(rss VmHWM) / 1024)) MiB"
}
say "just mounted"
for d in a b; do mkdir "$mnt/$d"; done
"$fill" fast "$mnt/a" "$files" >/dev/null
say "$files files made"
ls -lR "$mnt" >/dev/null
[ ! -w /proc/sys/vm/drop_caches ] || [ -n "${NODROP:-}" ] || stat "$mnt" >/dev/null
say "walked"
find "$mnt/a" -type f -print0 | xargs -0 -n 2000 touch -d 2001-01-01
say "touched"
rm -rf "$mnt/a"
say "removed"
"$fill" fast "$mnt/b" $((files / 4)) >/dev/null
"$fill" verify "$mnt/b" >"$work/verify" || { head -n 5 "$work/verify"; fail "not what was written"; }
say "a quarter made again and read"
peak=$(rss VmHWM)
stop
check
[ -n "${SPACEWEAVE_SANITIZED:-}" ] || [ "$peak" -le $(((cache + over) * 1024)) ] ||
	fail "the daemon grew to $((peak / 1024)) MiB, with cache=${cache}M and $over MiB beside"
