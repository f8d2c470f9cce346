#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# The ways in which requests come: polling. It does the same work as any other,
# and leaves an idle daemon asleep.

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
holes() {
	python3 - "$mnt" <<'EOF'
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
        assert got == want, (i, n, want, got)
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

try() { # OPTIONS
	local them=() p
	format 512M
	start -o "$1" 2>"$work/said"
	pid=$(daemon_pid)
	for p in one two three; do
		work $p &
		them+=($!)
	done
	for p in "${them[@]}"; do wait "$p" || fail "work with $1"; done
	timeout 120 bash -c "$(declare -f holes); mnt=$mnt; holes" || fail "$1: holes: status $?"
	idle "$1"
	stop
	check
}

for o in poll=50 poll=1000,threads=1; do
	try $o
	same "$(cat "$work/said")" "" "$o said"
done
