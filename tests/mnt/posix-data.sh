#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# Contents: holes, fallocate, truncation, append, direct I/O, mmap, copies.

. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/posix.inc"
both_users
format 512M
start
py <<'EOF'
import ctypes, errno, mmap, os, random

libc = ctypes.CDLL(None, use_errno=True)
KEEP, PUNCH, COLLAPSE, ZERO = 1, 2, 8, 16
def fallocate(fd, mode, off, length):
    if libc.fallocate(fd, mode, ctypes.c_long(off), ctypes.c_long(length)):
        raise OSError(ctypes.get_errno(), "fallocate")
def fails(want, f, *a):
    try:
        f(*a)
    except OSError as e:
        assert e.errno == want, (f, a, e, errno.errorcode[want])
        return
    assert False, (f, a, "did not fail")
def new(p):
    return os.open(p, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
def segments(fd):
    out, at, end = [], 0, os.fstat(fd).st_size
    while at < end:
        try:
            d = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            assert e.errno == errno.ENXIO
            break
        at = os.lseek(fd, d, os.SEEK_HOLE)
        out.append((d, at))
    return out
B = os.statvfs(".").f_bsize

# holes, exact, while pages are still dirty and after
fd = new("holes")
os.pwrite(fd, b"a" * B, 10 * B); os.pwrite(fd, b"b", 20 * B + 7)
os.ftruncate(fd, 40 * B)
want = [(10 * B, 11 * B), (20 * B, 21 * B)]
assert segments(fd) == want, segments(fd)
os.fsync(fd)
assert segments(fd) == want
assert os.fstat(fd).st_blocks == 2 * B // 512
fails(errno.ENXIO, os.lseek, fd, 40 * B, os.SEEK_DATA)
fails(errno.ENXIO, os.lseek, fd, 21 * B, os.SEEK_DATA)
assert os.lseek(fd, 12 * B + 1, os.SEEK_HOLE) == 12 * B + 1

# fallocate: unwritten space reads as zeroes and counts, is a hole to seek
fd = new("alloc")
fallocate(fd, 0, 0, 100 * B)
assert os.fstat(fd).st_size == 100 * B and os.fstat(fd).st_blocks >= 100 * B // 512
assert os.pread(fd, 100 * B, 0) == bytes(100 * B)
fallocate(fd, KEEP, 100 * B, 50 * B)
assert os.fstat(fd).st_size == 100 * B and os.fstat(fd).st_blocks >= 150 * B // 512
os.pwrite(fd, b"x" * 3 * B, 5 * B + 100)
fallocate(fd, PUNCH | KEEP, 6 * B + 50, B)
data = b"x" * (B - 50) + bytes(B) + b"x" * (B + 50)
assert os.pread(fd, 3 * B, 5 * B + 100) == data
fallocate(fd, ZERO, 99 * B, 10 * B)
assert os.fstat(fd).st_size == 109 * B
os.ftruncate(fd, 0)
os.fsync(fd)
assert os.fstat(fd).st_blocks == 0
fails(errno.EINVAL, fallocate, fd, 0, 0, 0)
fails(errno.EOPNOTSUPP, fallocate, fd, COLLAPSE, 0, B)

# tails are clean: shrink inside a block, grow again
for size in (1, 100, B - 1, B, B + 1, 3 * B + 17):
    fd = new("tail")
    os.pwrite(fd, b"t" * 5 * B, 0)
    if size % 2: os.fsync(fd)
    os.ftruncate(fd, size); os.ftruncate(fd, 6 * B)
    assert os.pread(fd, 7 * B, 0) == b"t" * size + bytes(6 * B - size), size
# also what a mapping left beyond the end
fd = new("maptail")
os.pwrite(fd, b"m" * 100, 0)
m = mmap.mmap(fd, 100)
a = ctypes.addressof(ctypes.c_char.from_buffer(m))
ctypes.memset(a + 200, 77, 1); m.flush()
os.fsync(fd); os.ftruncate(fd, B)
assert os.pread(fd, B, 0) == b"m" * 100 + bytes(B - 100)

# far out
fd = new("far")
os.pwrite(fd, b"end", 2**62)
assert os.fstat(fd).st_size == 2**62 + 3
assert os.pread(fd, 3, 2**62) == b"end" and os.pread(fd, 4, 2**61) == bytes(4)
os.ftruncate(fd, 2**63 - 1)
os.fsync(fd)
assert segments(fd) == [(2**62, 2**62 + B)], segments(fd)
os.unlink("far")

# O_APPEND by several processes
fd = new("append")
pids = []
for k in range(4):
    pid = os.fork()
    if not pid:
        a = os.open("append", os.O_WRONLY | os.O_APPEND)
        for i in range(200):
            os.write(a, b"%d %06d\n" % (k, i))
        os._exit(0)
    pids.append(pid)
for p in pids:
    assert os.waitpid(p, 0)[1] == 0
lines = open("append").read().splitlines()
assert len(lines) == 800
for k in range(4):
    assert [l for l in lines if l[0] == str(k)] == ["%d %06d" % (k, i) for i in range(200)]

# direct I/O beside the page cache
fd = new("direct")
os.pwrite(fd, b"c" * 16 * B, 0)
d = os.open("direct", os.O_RDWR | os.O_DIRECT)
buf = mmap.mmap(-1, 4 * B)
buf[:] = b"d" * 4 * B
assert os.pwritev(d, [buf], 4 * B) == 4 * B
assert os.pread(fd, 16 * B, 0) == b"c" * 4 * B + b"d" * 4 * B + b"c" * 8 * B
os.pwrite(fd, b"e" * B, 4 * B)
assert os.preadv(d, [buf], 4 * B) == 4 * B and buf[:] == b"e" * B + b"d" * 3 * B
assert os.preadv(d, [buf], 14 * B) == 2 * B

# the kernel's FUSE lets direct I/O of any alignment through
image, fd = bytearray(20 * B), new("ragged")
os.pwrite(fd, bytes(image), 0)
d = os.open("ragged", os.O_RDWR | os.O_DIRECT)
rnd = random.Random(2)
for k in range(200):
    off, n = rnd.randrange(18 * B), rnd.randrange(1, 2 * B)
    part = memoryview(buf)[rnd.randrange(B):][:n]
    if k % 3 == 0:                          # a cached page lies in its way
        os.pwrite(fd, b"%d" % k, off); image[off:off + len(b"%d" % k)] = b"%d" % k
    if k % 2:
        part[:] = rnd.randbytes(n)
        assert os.pwritev(d, [part], off) == n
        image[off:off + n] = part
    else:
        assert os.preadv(d, [part], off) == n and part == image[off:off + n], k
    if k % 5 == 0:
        assert os.pread(fd, 30 * B, 0) == bytes(image), k
assert os.pread(fd, 30 * B, 0) == bytes(image)
os.close(d)

# mappings and calls see each other
fd = new("map")
os.ftruncate(fd, 8 * B)
m = mmap.mmap(fd, 8 * B)
p = mmap.mmap(fd, 8 * B, mmap.MAP_PRIVATE)
os.pwrite(fd, b"w" * 10, B); assert m[B:B + 10] == b"w" * 10
m[2 * B:2 * B + 5] = b"store"; assert os.pread(fd, 5, 2 * B) == b"store"
p[0:4] = b"mine"; assert os.pread(fd, 4, 0) == bytes(4)
fallocate(fd, PUNCH | KEEP, B, B); assert m[B:B + 10] == bytes(10)
m.close(); p.close()

# copies: shared blocks and ragged ends
src, dst = new("src"), new("dst")
rnd = random.Random(1)
data = bytearray(rnd.randbytes(64 * B + 77))
os.pwrite(src, data, 0)
image = bytearray()
for k in range(60):
    a, b = rnd.randrange(len(data)), rnd.randrange(len(data))
    n = rnd.randrange(1, 20 * B)
    if k % 2:
        a, b, n = a // B * B, b // B * B, (n // B + 1) * B
    n = min(n, len(data) - a)
    done = 0
    while done < n:
        done += os.copy_file_range(src, dst, n - done, a + done, b + done)
    if len(image) < b + n: image.extend(bytes(b + n - len(image)))
    image[b:b + n] = data[a:a + n]
    if k == 30:                             # what is shared parts on a write
        os.pwrite(src, b"!" * 5000, 3 * B + 5)
        data[3 * B + 5:3 * B + 5005] = b"!" * 5000
assert os.pread(dst, 1 << 24, 0) == bytes(image)
assert os.pread(src, 1 << 24, 0) == bytes(data)
fails(errno.EINVAL, os.copy_file_range, src, src, 2 * B, 0, B)
# blocks are shared: no space is needed
os.fsync(dst)
big = new("big"); os.pwrite(big, rnd.randbytes(1 << 20) * 100, 0); os.fsync(big)
free = os.statvfs(".").f_bavail
clone = new("clone"); done = 0
while done < 100 << 20:
    done += os.copy_file_range(big, clone, (100 << 20) - done, done, done)
os.fsync(clone)
assert free - os.statvfs(".").f_bavail < 1000, (free, os.statvfs(".").f_bavail)
os.unlink("clone"); os.unlink("big")

# without a name, and then with one
t = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o640)
os.write(t, b"nameless")
assert os.fstat(t).st_nlink == 0
assert not libc.linkat(-100, b"/proc/self/fd/%d" % t, -100, b"named", 0x400)
assert open("named").read() == "nameless" and os.stat("named").st_nlink == 1

# swap, clones, collapse: the kernel's FUSE refuses; hints are harmless
for advice in range(6):
    os.posix_fadvise(src, 0, 0, advice)
for flag in (os.O_SYNC, os.O_DSYNC):
    s = os.open("sync", os.O_CREAT | os.O_WRONLY | flag)
    os.write(s, b"s" * 10000); os.close(s)

import hashlib, json
sums = {}
for n in sorted(os.listdir(".")):
    sums[n] = hashlib.md5(open(n, "rb").read()).hexdigest()
json.dump(sums, open("sums", "w"))
EOF
stop
check
start
py <<'EOF'
import hashlib, json
for n, s in json.load(open("sums")).items():
    assert hashlib.md5(open(n, "rb").read()).hexdigest() == s, n
EOF
stop

# an unwritten extent does not fail on its first write when nothing else is free:
# whole blocks, parts of them and stores, before a mount and after
format 64M
start
cat >"$work/full.py" <<'EOF'
import errno, mmap, os, sys, time
M = 1 << 20
def fill():
    full = os.open("full", os.O_CREAT | os.O_WRONLY | os.O_SYNC | os.O_APPEND)
    for n in M, 4096:
        try:
            while True:
                os.write(full, b"f" * n)
        except OSError as e:
            assert e.errno == errno.ENOSPC
    os.close(full)
def use(path, byte):
    fd = os.open(path, os.O_RDWR)
    assert os.pread(fd, 8 * M, 0) == bytes(8 * M)
    for off in range(0, 4 * M, M):
        os.pwrite(fd, byte * M, off)
    os.fsync(fd)
    for off in range(4 * M, 6 * M, 4096):
        os.pwrite(fd, byte * 100, off + 50)
        if off % (M // 4) == 0: os.fsync(fd)
    os.fsync(fd)
    m = mmap.mmap(fd, 8 * M)
    for off in range(6 * M, 8 * M, 4096):
        m[off + 50:off + 150] = byte * 100
    m.flush()
    os.fsync(fd)
    m.close(); os.close(fd)
def verify(path, byte):
    some = bytes(50) + byte * 100 + bytes(4096 - 150)
    want = byte * (4 * M) + some * (M // 1024)
    assert open(path, "rb").read() == want, path
if sys.argv[1] == "first":
    for p in "early", "late":
        fd = os.open(p, os.O_CREAT | os.O_RDWR)
        os.posix_fallocate(fd, 0, 8 * M)
        os.close(fd)
    fill()
    use("early", b"e")
    verify("early", b"e")
else:
    verify("early", b"e")
    a, b = os.open("two", os.O_CREAT | os.O_WRONLY), os.open("two", os.O_WRONLY)
    fill()
    use("late", b"l")
    verify("late", b"l")
    # what one could not write is no error of another's when there is space again
    os.pwrite(a, b"a" * M, 0)
    for w in a, b:
        try:
            os.fsync(w)
            assert False, "1 MiB into no space"
        except OSError as e:
            assert e.errno == errno.ENOSPC
    os.unlink("full")
    while os.statvfs(".").f_bavail * 4096 < 4 * M:
        time.sleep(0.01)
    os.pwrite(b, b"b" * M, 0)
    os.fsync(b)
    again = os.open("again", os.O_CREAT | os.O_WRONLY | os.O_SYNC)
    os.write(again, b"a" * (8 * M))
    # without O_SYNC the writer hears of it, too, in time
    try:
        with open("endless", "wb", buffering=0) as f:
            for i in range(4096):
                f.write(b"e" * M)
        assert False, "4 GiB into 64 MiB"
    except OSError as e:
        assert e.errno == errno.ENOSPC
    os.unlink("endless")
EOF
(cd "$mnt" && python3 "$work/full.py" first)
stop
check
start
(cd "$mnt" && python3 "$work/full.py" second)
stop
check
start
python3 - "$mnt/late" <<'EOF'
import sys
d = open(sys.argv[1], "rb").read()
assert d[:4 << 20] == b"l" * (4 << 20) and d[-4096:] == bytes(50) + b"l" * 100 + bytes(4096 - 150)
EOF
stop
