#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# Time stamps: range, what moves which, over a drop of caches and a mount.

. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/posix.inc"
both_users
format 256M
start
py <<'EOF'
import json, mmap, os, time

def touch(p, data=b""):
    with open(p, "wb") as f:
        f.write(data)
def times(p):
    st = os.lstat(p)
    return st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns
def step():
    time.sleep(0.02)            # the clock of time stamps is a coarse one

# nanoseconds, 64 bit
os.mkdir("range")
keep = {}
for n, sec in enumerate((-2**31, -1, 0, 2**31, 2**32 + 5, 2**34 - 1, 15032385535)):
    p = "range/%d" % n
    touch(p)
    at, mt = sec * 10**9 + 123456789, sec * 10**9 + 987654321
    os.utime(p, ns=(at, mt))
    assert times(p)[:2] == (at, mt), p
    keep[p] = (at, mt)
json.dump(keep, open("keep", "w"))

# what moves which: "m", "c", "mc" of a path, or "" for none
def moves(p, want, f):
    before = times(p)
    step()
    f()
    after = times(p)
    got = ("m" if after[1] != before[1] else "") + ("c" if after[2] != before[2] else "")
    assert got == want, (p, want, got, before, after)
    assert all(b <= a for a, b in zip(after[1:], before[1:])) or "utime" in repr(f)

os.mkdir("d"); touch("d/f", b"x" * 10000)
moves("d", "mc", lambda: touch("d/new"))
moves("d", "mc", lambda: os.unlink("d/new"))
moves("d", "mc", lambda: os.mkdir("d/sub"))
moves("d", "mc", lambda: os.rename("d/sub", "d/sub2"))
moves("d", "", lambda: touch("d/sub2/x"))
moves("d", "mc", lambda: os.symlink("a", "d/l"))
moves("d", "mc", lambda: os.link("d/f", "d/g"))
moves("d/f", "c", lambda: os.unlink("d/g"))
moves("d/f", "c", lambda: os.link("d/f", "d/g"))
moves("d/f", "c", lambda: os.rename("d/g", "d/h"))
moves("d/f", "c", lambda: os.chmod("d/f", 0o600))
moves("d/f", "c", lambda: os.chown("d/f", os.getuid(), os.getgid()))
moves("d/f", "c", lambda: os.setxattr("d/f", "user.a", b"b"))
moves("d/f", "c", lambda: os.removexattr("d/f", "user.a"))
moves("d/f", "mc", lambda: os.truncate("d/f", 5000))
moves("d/f", "mc", lambda: os.truncate("d/f", 9000))
moves("d/f", "", lambda: os.truncate("d/f", 9000))		# as ext4 does
moves("d/f", "mc", lambda: touch("d/f"))                # O_TRUNC of what has bytes
moves("d/f", "mc", lambda: touch("d/f"))                # and of what has none
moves("d/f", "mc", lambda: touch("d/f", b"abc"))
fd = os.open("d/f", os.O_RDWR)
moves("d/f", "mc", lambda: os.pwrite(fd, b"x", 1))
moves("d/f", "mc", lambda: os.posix_fallocate(fd, 0, 100000))
moves("d/f", "", lambda: os.pread(fd, 10, 0))
moves("d/f", "", lambda: os.fsync(fd))
m = mmap.mmap(fd, 8192)
def store():
    m[5000] = 65
    m.flush()
moves("d/f", "mc", store)
m.close()
os.close(fd)
moves("d/f", "", lambda: os.lstat("d/f"))
moves("d/l", "", lambda: os.readlink("d/l"))

# a time that was set survives pages that are written after it
fd = os.open("set", os.O_CREAT | os.O_RDWR)
os.write(fd, b"y" * 100000)
os.utime("set", ns=(1 * 10**9 + 1, 2 * 10**9 + 2))
os.close(fd)
os.sync()
assert times("set")[:2] == (10**9 + 1, 2 * 10**9 + 2), times("set")

# access times by relatime: a read after a change moves it
touch("read", b"z" * 5000); os.utime("read", ns=(10**9, 2 * 10**9))
EOF
stop
check
start
py <<'EOF'
import json, os, time
for p, (at, mt) in json.load(open("keep")).items():
    st = os.stat(p)
    assert (st.st_atime_ns, st.st_mtime_ns) == (at, mt), p
st = os.stat("set")
assert (st.st_atime_ns, st.st_mtime_ns) == (10**9 + 1, 2 * 10**9 + 2)
open("read", "rb").read()
assert os.stat("read").st_atime_ns > 2 * 10**9
# when it was made, for who cannot ask statx
born = float(os.getxattr("read", "system.spaceweave.btime"))
assert abs(time.time() - born) < 3600
assert "system.spaceweave.btime" not in os.listxattr("read")
EOF
# and from who can: with a libfuse that passes statx on
born=$(stat -c %W "$mnt/read")
[ "$born" = 0 ] || [ $(($(date +%s) - born)) -lt 3600 ] || fail "made at $born"
stop

# what moves the time of an access, of a file and of a directory: "fd", "f", ...
# after a time before mtime, after one long before, after one just after mtime
moved() {
	local what="" day=$1 p
	for p in file dir; do
		touch -a -d "$day" "$mnt/$p"
		touch -m -d '2001-01-01' "$mnt/$p"
	done
	stop
	start -o "$2"
	cat "$mnt/file" >"$work/out"
	ls "$mnt/dir" >"$work/out"
	for p in file dir; do
		[ "$(stat -c %X "$mnt/$p")" = "$(date -d "$day" +%s)" ] || what+=${p:0:1}
	done
	same "$what" "$3" "what moves with $2 after $day"
}
start
echo x >"$mnt/file"
mkdir "$mnt/dir"
touch "$mnt/dir/x"
for o in noatime: nodiratime:f relatime:fd strictatime:fd lazytime:fd; do
	moved 2000-01-01 "${o%:*}" "${o#*:}"
done
# soon after: the change that touch makes is older than the access
soon=$(date -d '+1 minute' '+%F %T')
for o in noatime: relatime: strictatime:fd; do
	moved "$soon" "${o%:*}" "${o#*:}"
done
# chattr +A, whatever the mount wants
chattr +A "$mnt/file"
moved 2000-01-01 strictatime d
stop
check
