#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# The ways in which requests come: polling, io_uring. Each does the same work as
# any other, leaves an idle daemon asleep, and ends as it should.

. "$(dirname "$0")/lib.sh"
need rsync python3

ticks() { # of CPU that the daemon has used
	awk '{ print $14 + $15 }' "/proc/$pid/stat"
}

idle() { # nothing to do, and nothing done
	local before
	sync -f "$mnt"
	sleep 0.3
	before=$(ticks)
	sleep 1
	[ $(($(ticks) - before)) -le 5 ] ||
		fail "$1: $(($(ticks) - before)) ticks in an idle second"
}

# Files with holes, dirty in the kernel, and many who look for data at once: each
# makes the kernel write while it waits.
holes() { # 1: each is to be seen; 0: data may be claimed where there are none
	python3 - "$mnt" "$1" <<'EOF'
import errno, multiprocessing, os, random, sys

def run(i):
    rnd = random.Random(i)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for n in range(10):
        want = sorted(rnd.sample(range(0, 4096, 4), 12))
        fd = os.open(f"{sys.argv[1]}/sparse{i}", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.ftruncate(fd, 16 << 20)
        for at in want:
            os.pwrite(fd, b"x" * 4096, at * 4096)
        got, at = [], 0
        while True:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as e:
                assert e.errno == errno.ENXIO, e
                break
            end = os.lseek(fd, at, os.SEEK_HOLE)
            got += range(at // 4096, end // 4096)
            at = end
        assert got == want if sys.argv[2] == "1" else set(got) >= set(want), (i, n, want, got)
        os.close(fd)

them = [multiprocessing.Process(target=run, args=(i,)) for i in range(12)]
for p in them:
    p.start()
for p in them:
    p.join()
sys.exit(any(p.exitcode for p in them))
EOF
}

work() { # WHO: in a directory of its own
	local d=$mnt/$1 i
	mkdir "$d"
	rsync -a /usr/include/linux "$d/"
	for ((i = 0; i < 50; i++)); do
		echo "$i" >"$d/a"
		mv "$d/a" "$d/b"
		dd if="$d/b" of="$d/c" conv=fsync status=none
		sleep 0.00$((i % 10))
	done
	same "$(cat "$d/c")" 49
	rsync -nac -i /usr/include/linux "$d/" >"$work/differs.$1"
	[ ! -s "$work/differs.$1" ] || fail "differs: $(head -n 5 "$work/differs.$1")"
}

try() { # OPTIONS [1 or 0, for holes]
	local them=() p
	format 512M
	start -o "$1" 2>"$work/said"
	pid=$(daemon_pid)
	for p in one two three; do
		work $p &
		them+=($!)
	done
	for p in "${them[@]}"; do wait "$p" || fail "work with $1"; done
	timeout 120 bash -c "$(declare -f holes); mnt=$mnt; holes ${2:-1}" || fail "$1: holes: status $?"
	idle "$1"
	case $1 in io_uring*) ringed 1000 ;; esac
	stop
	check
}

for o in poll=50 poll=1000,threads=1; do
	try $o
	same "$(cat "$work/said")" "" "$o said"
done

# ---- io_uring ----

switch=/sys/module/fuse/parameters/enable_uring

came() { # completions in the daemon's rings
	cat "/proc/$pid/fdinfo/"* 2>/dev/null | awk '/^CqTail:/ { n += $2 } END { print n + 0 }'
}

ringed() { # N: so many requests came over the ring at least
	[ "$(came)" -ge "$1" ] || fail "$(came) requests came over io_uring, not $1"
}

# What is not small files.
wide() {
	python3 - "$mnt" <<'EOF'
import hashlib, mmap, os, random, signal, sys, threading

os.chdir(sys.argv[1])
rnd = random.Random(7)

# large, with checksums; the second time past the cache
data = rnd.randbytes(24 << 20)
with open("big", "wb") as f:
    for at in range(0, len(data), 3 << 20):
        f.write(data[at:at + (3 << 20)])
    os.fsync(f.fileno())
    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
want = hashlib.sha256(data).digest()
with open("big", "rb") as f:
    assert hashlib.sha256(f.read()).digest() == want
fd = os.open("big", os.O_RDONLY | os.O_DIRECT)
m = mmap.mmap(-1, 4 << 20)
got = hashlib.sha256()
while n := os.readv(fd, [m]):
    got.update(m[:n])
assert got.digest() == want
os.close(fd)

# attributes as long as they may be
open("attr", "w").close()
for n in (0, 1, 4000, 65535, 65536):
    value = rnd.randbytes(n)
    os.setxattr("attr", "user.long", value)
    assert os.getxattr("attr", "user.long") == value, n
names = {"user.%0200d" % i for i in range(50)}
for n in names:
    os.setxattr("attr", n, b"")
assert set(os.listxattr("attr")) == names | {"user.long"}
os.symlink("x" * 4000, "link")
assert os.readlink("link") == "x" * 4000

# many names
os.mkdir("many")
names = {"%0100d" % i for i in range(5000)}
for n in names:
    os.close(os.open("many/" + n, os.O_CREAT | os.O_WRONLY))
assert set(os.listdir("many")) == names
assert sum(e.stat().st_size for e in os.scandir("many")) == 0

# mapped
with open("map", "w+b") as f:
    f.truncate(8 << 20)
    m = mmap.mmap(f.fileno(), 8 << 20)
    for at in range(0, 8 << 20, 4096):
        m[at] = at >> 12 & 255
    m.flush()
    assert open("map", "rb").read()[::4096] == bytes(i & 255 for i in range(2048))

# fsync of several, under a rain of signals
signal.signal(signal.SIGALRM, lambda *a: None)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
def syncs(i):
    for k in range(30):
        with open(f"sync{i}", "ab") as f:
            f.write(bytes([k]) * 100)
            f.flush()
            os.fsync(f.fileno())
them = [threading.Thread(target=syncs, args=(i,)) for i in range(8)]
for t in them:
    t.start()
for k in range(200):
    os.listdir("many")
    os.setxattr("attr", "user.long", bytes([k]) * 30000)
for t in them:
    t.join()
signal.setitimer(signal.ITIMER_REAL, 0)
for i in range(8):
    assert open(f"sync{i}", "rb").read() == b"".join(bytes([k]) * 100 for k in range(30))

# killed in the midst of a request
for k in range(20):
    pid = os.fork()
    if not pid:
        while True:
            fd = os.open("killed", os.O_CREAT | os.O_RDWR)
            os.pwrite(fd, data[:1 << 20], 0)
            os.fsync(fd)
            os.close(fd)
    threading.Event().wait(0.01 * rnd.random())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
EOF
}

busy() { # until the mount goes away
	local d=$mnt/busy$1
	mkdir -p "$d"
	cd "$d" || return
	while rm -rf ./* && cp -r /usr/include/linux . &&
		dd if=/dev/zero of=zeroes bs=1M count=16 conv=fsync status=none; do :; done
}

# How a busy mount ends, when the daemon gets this signal.
end() {
	local them=() p status=0
	format 512M
	start -o io_uring
	pid=$(daemon_pid)
	for p in 1 2 3; do
		busy $p >/dev/null 2>&1 &
		them+=($!)
	done
	sleep 0.7
	if umount "$mnt" 2>/dev/null; then fail "unmounted while busy"; fi
	ringed 1000
	kill -"$1" "$pid"
	for p in "${them[@]}"; do
		timeout 30 tail --pid="$p" -f /dev/null || fail "SIG$1: a program hangs"
		wait "$p" || true
	done
	timeout 30 tail --pid="$pid" -f /dev/null || fail "SIG$1: the daemon hangs"
	if [ "$1" = KILL ]; then
		timeout 10 stat "$mnt" >"$work/stat" 2>&1 || status=$?
		same $status 1 "stat of a dead mount"
		grep -q 'not connected' "$work/stat" || fail "a dead mount: $(cat "$work/stat")"
		timeout 10 umount "$mnt" || fail "SIG$1: umount: status $?"
	fi
	if is_mounted "$mnt"; then fail "SIG$1: still mounted"; fi
	check
	start
	stop
	check
}

refused() { # the mount goes on without, and says so
	format 128M
	start -o io_uring 2>"$work/said"
	same "$(wc -l <"$work/said")" 1 "lines of: $(cat "$work/said")"
	grep -q 'no io_uring (.*): requests come over /dev/fuse' "$work/said" ||
		fail "said: $(cat "$work/said")"
	echo x >"$mnt/x"
	same "$(cat "$mnt/x")" x
	stop
	check
}

set_switch() { { echo "$1" >$switch; } 2>/dev/null; }

before=$(cat $switch 2>/dev/null || echo N)
if [ "$(id -u)" = 0 ] && set_switch "$before"; then
	leave() { set_switch "$before"; }
	set_switch N
	refused
	set_switch Y
elif [ "$before" = N ]; then
	refused
	skip "not tried: io_uring, for it needs root to allow it"
fi
for o in io_uring,threads=16 io_uring; do
	try $o $((${#o} > 8))
	same "$(cat "$work/said")" "" "$o said"
done
format 1G
start -o io_uring
pid=$(daemon_pid)
timeout 300 bash -c "$(declare -f wide); mnt=$mnt; wide" || fail "io_uring: status $?"
ringed 5000
stop
check
for how in TERM KILL; do
	end $how
done
for s in attributes data names; do
	status=0
	SEED=$seed SPACEWEAVE_OPTIONS=io_uring \
		bash "$top/tests/mnt/posix-$s.sh" >"$work/posix" 2>&1 || status=$?
	[ $status = 0 ] || [ $status = 77 ] || fail "posix-$s.sh: $(cat "$work/posix")"
done
