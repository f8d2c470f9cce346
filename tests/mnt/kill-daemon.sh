#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# The daemon is killed at random moments of much work, and each time fsck is
# content, the volume mounts, what an fsync had promised is there, and nothing is
# there that nobody wrote. The work goes on with what a crash has left.
# timeout: 3600
#
# In every round programs that know what they were promised: syncer (whole files),
# scribbler (every way to change one), tangler (every way to change names). Every
# third round rsync, git, make and SQLite besides; every fourth on a small volume
# that they fill. Each round mounts with other options.
#
# ROUNDS=n (5): how often. THREADS=n (3): of each of the three. MOST_MS=n: a
# round's longest (2000 in the first five, then 5000). KEEP=1 keeps the image as the
# last crash left it.

. "$(dirname "$0")/lib.sh"
need sqlite3 rsync
rounds=${ROUNDS:-5}
threads=${THREADS:-3}
for h in syncer scribbler tangler; do
	[ -x "$helpers/$h" ] || skip "no $helpers/$h: make tests"
done

log=$work/log
mkdir "$log"
slowest=0 promises=0 files=0
options=(relatime io_uring writethrough 'commit=1,nodiscard' dirsync 'cache=4M,threads=1' noatime)
switch=/sys/module/fuse/parameters/enable_uring

# start, with the options of round $1
start_for() {
	local o=${options[$(($1 % ${#options[@]}))]} was=
	if [ "$o" = io_uring ]; then
		was=$(cat $switch 2>/dev/null || true)
		[ "$was" = Y ] || { echo Y >$switch; } 2>/dev/null || o=relatime
	fi
	start -o "$o" || return
	[ "$was" != N ] || { echo N >$switch; } 2>/dev/null || true
	mounted=$image with=$o
}

bytes() { # of the image, and when they were written
	cksum <"$image"
	stat -c '%y %s' "$image"
}

image_for() { # of round $1
	[ $(($1 % 4)) = 3 ] && echo "$work/small" || echo "$work/large"
}

# Work of all kinds, until the file system goes away. $1: round.
load() {
	local to=$mnt/load.$(($1 % 2))
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
# does not sync the removal of its journal, which is the commit. Where it cannot open
# the folder to sync it, it takes it for synced: killed just there, the daemon does
# not owe the last row. $1: round
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
	[ -e "$log/db.$1" ] || return 0
	acked=$(grep -c '^[0-9]*$' "$log/db.$1" || true)
	[ $(($1 % 2)) = 0 ] || acked=$((acked - 1))
	[ "$acked" -gt 0 ] || return 0
	same "$(sqlite3 "$db" 'PRAGMA integrity_check' 2>&1)" ok "database of round $1"
	[ "$(sqlite3 "$db" 'SELECT count(*) FROM t')" -ge "$acked" ] ||
		fail "round $1: $acked rows were committed, there are $(sqlite3 "$db" 'SELECT count(*) FROM t')"
}

# verify ROUND: what each of the three says
verify() {
	local r=$1 h dir
	: >"$work/verify"
	for h in syncer scribbler tangler; do
		dir=$mnt/$h
		[ $h != syncer ] || dir=$mnt/r$r
		[ -d "$dir" ] || [ -n "$(ls "$log/$r/$h")" ] || continue
		timeout 300 "$helpers/$h" verify "$dir" "$log/$r/$h" >>"$work/verify" || {
			cat "$work/verify"
			fail "round $r: $h: a promise was broken"
		}
	done
	check_database "$r"
}

# All that belongs to a round is in one process group, which ends with it.
round() {
	local r=$1 pid daemon ms most t0 t1 state before
	mkdir -p "$log/$r/syncer" "$log/$r/scribbler" "$log/$r/tangler"
	set -m
	(
		if [ $((r % 3)) = 0 ] && [ "$image" = "$work/large" ]; then
			(load "$r") &
			(database "$r") &
		fi
		"$helpers/syncer" work "$mnt/r$r" "$log/$r/syncer" $((seed + r)) 3600 "$threads" &
		"$helpers/scribbler" work "$mnt/scribbler" "$log/$r/scribbler" $((seed + r)) 3600 "$threads" &
		"$helpers/tangler" work "$mnt/tangler" "$log/$r/tangler" $((seed + r)) 3600 "$threads" &
		wait
	) >"$work/load.out" 2>&1 &
	pid=$!
	set +m
	daemon=$(daemon_pid)
	most=${MOST_MS:-$((r > 5 ? 5000 : 2000))}
	case $((RANDOM % 4)) in
	0) ms=$((RANDOM % 300)) ;;
	*) ms=$((300 + RANDOM % most)) ;;
	esac
	sleep "$(printf '%d.%03d' $((ms / 1000)) $((ms % 1000)))"
	kill -0 "$daemon" || fail "round $r: the daemon has died by itself"
	kill -KILL "$daemon"
	while kill -0 "$daemon" 2>/dev/null; do sleep 0.01; done
	# what they saw before they saw that all is gone is in their logs
	sleep 0.1
	kill -KILL -- "-$pid" 2>/dev/null || true
	wait "$pid" 2>/dev/null || true
	umount -l "$mnt" 2>/dev/null || fusermount3 -uz "$mnt"
	state=$(spaceweave info "$image" | sed -n 's/^state *//p')
	[ $((r % 5)) != 0 ] || before=$(bytes)
	check
	[ $((r % 5)) != 0 ] || same "$(bytes)" "$before" "fsck -fn wrote"
	[ -z "${KEEP:-}" ] || cp --sparse=always "$image" "$work/crashed"
	t0=$(date +%s%N)
	how=$with
	start_for $((r + 1))
	t1=$(date +%s%N)
	t1=$(((t1 - t0) / 1000000))
	[ "$t1" -le "$slowest" ] || slowest=$t1
	verify "$r"
	promises=$((promises + $(sed -n 's/.* \([0-9]*\) promises.*/\1/p' "$work/verify" | paste -sd+ | sed 's/^$/0/')))
	files=$((files + $(sed -n 's/.* \([0-9]*\) \(files\|names\),.*/\1/p' "$work/verify" | paste -sd+ | sed 's/^$/0/')))
	echo "round $r: $(basename "$image"), $how, killed after $ms ms, mounted in $t1 ms ($state): $(paste -sd' ' "$work/verify")"
}

# A small one that is nearly full, and a large one.
image=$work/small
format 96M
start
head -c "$(($(stat -f -c '%a * %S' "$mnt") - (10 << 20)))" /dev/urandom >"$mnt/ballast"
stop
check
image=$work/large
format 3G
image=$(image_for 1)
start_for 1
for ((r = 1; r <= rounds; r++)); do
	if [ "$(image_for "$r")" != "$mounted" ]; then
		stop
		check
		image=$(image_for "$r")
		start_for "$r"
	fi
	# old rounds make room
	rm -rf "$mnt"/r[0-9]* "$mnt"/[0-9]*.db*
	mkdir -p "$mnt/r$r" "$mnt/scribbler" "$mnt/tangler"
	sync -f "$mnt"
	round "$r"
	[ "$r" = 1 ] || rm -rf "${log:?}/$((r - 1))"
done
verify "$rounds"
stop
check
echo "$rounds rounds, $files files and names read, $promises fsyncs held to their promise, none broken, slowest mount $slowest ms"
