#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# The daemon is killed at random moments of much work, and each time fsck is
# content, the volume mounts, and what an fsync had promised is there.
# timeout: 3600
#
# ROUNDS=n (5): how often. THREADS=n (3): of the program that fsyncs.

. "$(dirname "$0")/lib.sh"
need sqlite3 rsync
rounds=${ROUNDS:-5}
threads=${THREADS:-3}
syncer=$helpers/syncer
[ -x "$syncer" ] || skip "no $syncer: make tests"

format 6G
log=$work/log
mkdir "$log"
slowest=0

# Work of all kinds, until the file system goes away. $1: round.
load() {
	local to=$mnt/load.$(($1 % 3))
	cd /
	rm -rf "$to" && mkdir "$to" || return
	# shellcheck disable=SC2012 # names in /usr/include are tame
	(while rsync -aHAX /usr/include/ "$to/include/" && rm -rf "$to/include"; do :; done) &
	(
		git -c safe.directory='*' clone -q --no-local "$top" "$to/clone" &&
			make -s -C "$to/clone" BUILD="$to/build" OPT=-O0 all
	) &
	wait
}

# Transactions, each counted in a log once it is committed. EXTRA: at FULL, SQLite
# does not sync the removal of its journal, which is the commit. $1: round
database() {
	local n=0 db=$mnt/$1.db
	{
		echo "PRAGMA journal_mode=$([ $(($1 % 2)) = 0 ] && echo wal || echo delete); PRAGMA synchronous=EXTRA;"
		echo "CREATE TABLE t (n INTEGER PRIMARY KEY, v BLOB);"
		while [ $n -lt 20000 ]; do
			n=$((n + 1))
			echo "INSERT INTO t VALUES ($n, randomblob($((RANDOM % 4000)))); SELECT $n;"
		done
	} | sqlite3 -bail "$db" >"$log/db.$1"
}

check_database() {
	local db=$mnt/$1.db acked
	acked=$(grep -c '^[0-9]*$' "$log/db.$1" || true)
	[ "$acked" != 0 ] || return 0
	same "$(sqlite3 "$db" 'PRAGMA integrity_check' 2>&1)" ok "database of round $1"
	[ "$(sqlite3 "$db" 'SELECT count(*) FROM t')" -ge "$acked" ] ||
		fail "round $1: $acked rows were committed, there are $(sqlite3 "$db" 'SELECT count(*) FROM t')"
}

# All that belongs to a round is in one process group, which ends with it.
round() {
	local r=$1 pid daemon ms t0 t1 state
	mkdir "$log/$r"
	set -m
	(
		(load "$r") &
		(database "$r") &
		"$syncer" work "$mnt/r$r" "$log/$r" $((seed + r)) 3600 "$threads" &
		wait
	) >"$work/load.out" 2>&1 &
	pid=$!
	set +m
	daemon=$(daemon_pid)
	case $((RANDOM % 4)) in
	0) ms=$((RANDOM % 300)) ;;
	*) ms=$((300 + RANDOM % ${MOST_MS:-5000})) ;;
	esac
	sleep "$(printf '%d.%03d' $((ms / 1000)) $((ms % 1000)))"
	kill -KILL "$daemon"
	kill -KILL -- "-$pid" 2>/dev/null || true
	wait "$pid" 2>/dev/null || true
	umount -l "$mnt" 2>/dev/null || fusermount3 -uz "$mnt"
	while kill -0 "$daemon" 2>/dev/null; do sleep 0.01; done
	state=$(spaceweave info "$image" | sed -n 's/^state *//p')
	[ $((r % 5)) != 0 ] || before=$(sha256sum <"$image")
	check
	[ $((r % 5)) != 0 ] || same "$(sha256sum <"$image")" "$before" "fsck -fn wrote"
	t0=$(date +%s%N)
	start
	t1=$(date +%s%N)
	t1=$(((t1 - t0) / 1000000))
	[ "$t1" -le "$slowest" ] || slowest=$t1
	if [ -d "$mnt/r$r" ] || [ -s "$log/$r/1" ]; then
		"$syncer" verify "$mnt/r$r" "$log/$r" >"$work/verify" || {
			cat "$work/verify"
			fail "round $r: a promise was broken"
		}
	fi
	check_database "$r"
	echo "round $r: killed after $ms ms, mounted in $t1 ms ($state): $(paste -sd' ' "$work/verify")"
	# old rounds make room, in the midst of the next one
	if [ "$r" -gt 2 ]; then
		rm -rf "$mnt/r$((r - 2))" "$mnt/$((r - 2)).db"*
	fi
}

start
for ((r = 1; r <= rounds; r++)); do
	: >"$work/verify"
	mkdir "$mnt/r$r"
	sync -f "$mnt"
	round "$r"
done
for ((r = rounds > 2 ? rounds - 1 : 1; r <= rounds; r++)); do
	[ ! -s "$log/$r/1" ] || "$syncer" verify "$mnt/r$r" "$log/$r"
	check_database "$r"
done
stop
check
echo "$rounds rounds, slowest mount $slowest ms"
