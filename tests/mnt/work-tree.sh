#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# A day's work: a large tree copied in, a repository cloned and built, a
# database written; and all of it there after fsck and a new mount.
# timeout: 900
#
# FILES=n: how many files of /usr (32000; 0: all of those folders).

. "$(dirname "$0")/lib.sh"
need rsync git sqlite3 make gcc find
files=${FILES:-32000}

# The tree: no more than 1 MiB each, so that the number counts, not the bytes.
cd /usr
find include share lib/python3* lib src libexec local/lib -xdev \
	\( -type f -size -1024k -o -type l \) 2>/dev/null |
	if [ "$files" = 0 ]; then cat; else awk -v n="$files" 'NR <= n'; fi >"$work/list"
cd "$work"
n=$(wc -l <list)
[ "$n" -ge 30000 ] || [ "$files" != 32000 ] || skip "only $n files in /usr"
echo "$n files"

pull() {
	rsync -aHAX "$@" --files-from="$work/list" /usr/ "$mnt/usr/"
}

laps=$SECONDS
lap() {
	echo "$((SECONDS - laps)) s: $*"
	laps=$SECONDS
}

format 8G -L work
start
mkdir "$mnt/usr"
pull
lap rsync

repo=$top
git -C "$repo" rev-parse --git-dir >/dev/null 2>&1 || repo=
if [ -n "$repo" ]; then
	git -c safe.directory='*' clone -q --no-local "$repo" "$mnt/clone"
else
	# a source archive without history: make one
	mkdir "$mnt/clone"
	(cd "$top" && tar cf - --exclude='./build*' --exclude=./.git .) | tar xf - -C "$mnt/clone"
	git -C "$mnt/clone" init -q
	git -C "$mnt/clone" add -A
	git -C "$mnt/clone" -c user.name=t -c user.email=t@t commit -qm all
fi
git -C "$mnt/clone" fsck --full --strict 2>&1 | grep -v '^dangling\|^notice' && fail "git fsck"
lap "git clone, git fsck"

make -s -C "$mnt/clone" -j"${JOBS:-1}" BUILD="$mnt/build" OPT=-O0 all >/dev/null
same "$("$mnt/build/bin/mkfs.spaceweave" -V)" "$(mkfs.spaceweave -V)" "the program built on the mount"
lap make

# 2,000 transactions, half in each of the two usual ways to keep a journal
for mode in delete wal; do
	{
		echo "PRAGMA journal_mode=$mode; PRAGMA synchronous=FULL;"
		echo "CREATE TABLE t (n INTEGER PRIMARY KEY, v BLOB);"
		for ((i = 1; i <= 1000; i++)); do
			echo "BEGIN; INSERT INTO t VALUES ($i, randomblob($((RANDOM % 3000))));" \
			     "UPDATE t SET v = randomblob(100) WHERE n = $((RANDOM % i));" \
			     "DELETE FROM t WHERE n = $((RANDOM % (4 * i))); COMMIT;"
		done
	} | sqlite3 "$mnt/$mode.db" >/dev/null
	same "$(sqlite3 "$mnt/$mode.db" 'PRAGMA integrity_check')" ok "$mode.db"
done
lap "2,000 SQLite transactions"

(cd "$mnt" && find . -path ./usr -prune -o -type f -print0 | sort -z | xargs -0 sha256sum) >sums
stop
lap unmount
check
lap fsck
start
pull -n -c -i >differs
[ ! -s differs ] || { head -n 20 differs; fail "rsync -naHAXc finds $(wc -l <differs) differences"; }
lap "rsync -naHAXc"
(cd "$mnt" && sha256sum --quiet -c "$work/sums") || fail "checksums differ"
lap sha256sum
git -C "$mnt/clone" status --porcelain | grep . && fail "git status is not clean"
for mode in delete wal; do
	same "$(sqlite3 "$mnt/$mode.db" 'PRAGMA integrity_check')" ok "$mode.db"
done
stop
check
