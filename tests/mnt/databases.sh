#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# SQLite in all its journal modes under four writers that contend; PostgreSQL
# whose server is killed, and then the daemon under it, in the midst of work.
# timeout: 1800
#
# ROWS=n (50): by each writer. SECS=n (5): of each of the runs of pgbench.

. "$(dirname "$0")/lib.sh"
need python3
rows=${ROWS:-50} secs=${SECS:-5}
format 4G
start

# ---- SQLite. Each transaction reads what there is and writes it back changed, so
# that one let in beside another loses something. A writer first asks without
# waiting, and counts how often the answer was "busy": no contention, no test.
cat >"$work/writer.py" <<'END'
import os, random, sqlite3, sys, time
path, mode, w, rows, go = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
db = sqlite3.connect(path, timeout=0, isolation_level=None)
db.execute("PRAGMA busy_timeout=60000")
assert db.execute("PRAGMA journal_mode=" + mode).fetchone()[0] == mode
db.execute("PRAGMA synchronous=NORMAL")
rnd = random.Random(w)
while not os.path.exists(go): time.sleep(0.001)
busy = 0
for n in range(rows):
    db.execute("PRAGMA busy_timeout=0")
    try:
        db.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as e:
        assert "locked" in str(e), e
        busy += 1
        began = False
    else:
        began = True
    db.execute("PRAGMA busy_timeout=60000")
    began or db.execute("BEGIN IMMEDIATE")
    (total,) = db.execute("SELECT total FROM counter").fetchone()
    db.execute("INSERT INTO t VALUES (?, ?, ?)", (w, n, rnd.randbytes(rnd.randrange(6000))))
    if n % 7 == 3 and mode != "off":                # off cannot roll back
        db.execute("ROLLBACK"); db.execute("BEGIN IMMEDIATE")
        (total,) = db.execute("SELECT total FROM counter").fetchone()
        db.execute("INSERT INTO t VALUES (?, ?, ?)", (w, n, b"again"))
    time.sleep(0.004)                               # let another come
    db.execute("UPDATE counter SET total = ?", (total + 1,))
    db.execute("COMMIT")
    assert db.execute("SELECT count(*) FROM t WHERE w = ?", (w,)).fetchone()[0] == n + 1
print(busy)
END
cat >"$work/verify.py" <<'END'
import sqlite3, sys
path, rows = sys.argv[1], int(sys.argv[2])
db = sqlite3.connect(path)
assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)], path
assert db.execute("SELECT total FROM counter").fetchone() == (4 * rows,), "an update was lost"
for w in range(4):
    assert [n for (n,) in db.execute("SELECT n FROM t WHERE w = ? ORDER BY n", (w,))] == list(range(rows)), w
END
mkdir "$mnt/sql"
for mode in delete truncate persist memory wal off; do
	db=$mnt/sql/$mode.db
	python3 -c "import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute('PRAGMA journal_mode=$mode')
db.executescript('CREATE TABLE t (w, n, v); CREATE INDEX i ON t (w, n); CREATE TABLE counter (total); INSERT INTO counter VALUES (0)')" "$db"
	rm -f "$work/go"
	pids=()
	for w in 0 1 2 3; do
		python3 "$work/writer.py" "$db" $mode $w "$rows" "$work/go" >"$work/sql.$w" 2>&1 &
		pids+=($!)
	done
	t0=$(date +%s%N)
	touch "$work/go"
	for p in "${pids[@]}"; do wait "$p" || { cat "$work"/sql.?; fail "a writer in mode $mode"; }; done
	busy=$(($(cat "$work"/sql.? | paste -sd+)))
	echo "SQLite, $mode: $((4 * rows)) transactions, $busy found the database busy, $((($(date +%s%N) - t0) / 1000000)) ms"
	[ $busy -gt 0 ] || fail "nobody contended in mode $mode"
	python3 "$work/verify.py" "$db" "$rows"
done
stop
check
start
for db in "$mnt"/sql/*.db; do python3 "$work/verify.py" "$db" "$rows"; done

# ---- PostgreSQL
pg=$(find /usr/lib/postgresql -maxdepth 2 -name bin 2>/dev/null | sort -V | tail -n 1)
as=()
if [ "$(id -u)" = 0 ]; then
	id -u postgres >/dev/null 2>&1 || pg=
	as=(setpriv --reuid=postgres --regid=postgres --init-groups)
	chmod 755 "$work"
fi
if [ -z "$pg" ] || ! command -v "$pg/pgbench" >/dev/null; then
	stop
	check
	[ -n "$pg" ] || echo "PostgreSQL is not here: left out"
	exit 0
fi
data=$mnt/pg/data
export PGHOST=$work/pg PGDATABASE=bench
mkdir "$work/pg" "$mnt/pg"
[ "$(id -u)" != 0 ] || { chown postgres "$work/pg" "$mnt/pg"; export PGUSER=postgres; }
pg() { # a program of PostgreSQL's
	local program=$1
	shift
	(cd "$work/pg" && "${as[@]}" "$pg/$program" "$@")
}
server() {
	pg pg_ctl -D "$data" -l "$work/pg/log" -w -t 300 -o "-k $work/pg -c listen_addresses=" start >/dev/null ||
		{ tail -n 20 "$work/pg/log"; fail "the server does not start"; }
}
# The server and all that it has started.
family() {
	echo "$1"
	ps -o pid= --ppid "$1" || true
}
kill_all() {
	local p
	for p; do kill -KILL "$p" 2>/dev/null || true; done
	for p; do while kill -0 "$p" 2>/dev/null; do sleep 0.1; done; done
	rm -f "$work"/pg/.s.PGSQL*
}
sql() { pg psql -qAtc "$1"; }
# Every page and index, a dump, and that no transaction is there by half.
sound() {
	pg pg_amcheck --install-missing --heapallindexed --rootdescend --parent-check bench >"$work/pg/amcheck" 2>&1 ||
		{ cat "$work/pg/amcheck"; fail "pg_amcheck, $1"; }
	pg pg_dump bench >"$work/dump" || fail "pg_dump, $1"
	same "$(sql "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history) AND
		(SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(delta) FROM pgbench_history) AND
		(SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(delta) FROM pgbench_history)")" t "balances, $1"
	echo "$1: sound, $(sql 'SELECT count(*) FROM pgbench_history') transactions in all"
}
# bench SECONDS: notes each transaction that was answered.
bench() {
	rm -f "$work"/pg/tx.*
	pg pgbench -n -c 4 -j 2 -T "$1" --log --log-prefix="$work/pg/tx" bench >"$work/pg/bench" 2>&1
}
answered() { cat "$work"/pg/tx.* | wc -l; }
pg initdb -D "$data" --data-checksums -A trust >/dev/null
server
pg createdb bench
pg pgbench -q -i -s 5 bench >/dev/null 2>&1
bench "$secs" || { cat "$work/pg/bench"; fail pgbench; }
grep -h '^tps' "$work/pg/bench"
sound "after $secs s"

for whom in server daemon; do
	before=$(sql 'SELECT count(*) FROM pgbench_history')
	main=$(head -n 1 "$data/postmaster.pid")
	bench $((secs + 60)) &
	bench=$!
	sleep "$secs"
	# shellcheck disable=SC2207 # numbers
	pids=($(family "$main"))
	if [ $whom = server ]; then
		kill_all "${pids[@]}"
	else
		daemon=$(daemon_pid)
		kill -KILL "$daemon"
		sleep 1
		kill_all "${pids[@]}"
		umount -l "$mnt" 2>/dev/null || fusermount3 -uz "$mnt"
		while kill -0 "$daemon" 2>/dev/null; do sleep 0.1; done
		check
		start
	fi
	wait $bench || true
	rm -f "$data/postmaster.pid"
	server
	n=$(($(sql 'SELECT count(*) FROM pgbench_history') - before))
	echo "$whom killed: $(answered) transactions were answered, $n are there"
	[ "$(answered)" -gt 0 ] || fail "pgbench did nothing"
	[ $n -ge "$(answered)" ] || fail "transactions were lost"
	sound "$whom killed"
done
bench "$secs" || { cat "$work/pg/bench"; fail "pgbench after all"; }
sound "after all"
pg pg_ctl -D "$data" -m fast -w stop >/dev/null
pg pg_checksums -D "$data" --check >"$work/pg/checksums" || { cat "$work/pg/checksums"; fail "pg_checksums"; }
stop
check
