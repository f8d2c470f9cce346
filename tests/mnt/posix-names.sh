#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# Names, links, special files, listings, rename.

. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/posix.inc"
[ -x "$damage" ] || skip "no $damage: make tests"
both_users
format 256M
start
py <<'EOF'
import ctypes, errno, os, socket, stat

def fails(want, f, *a, **k):
    try:
        f(*a, **k)
    except OSError as e:
        assert e.errno == want, (f, a, e, errno.errorcode[want])
        return
    assert False, (f, a, "did not fail")

def touch(p):
    os.close(os.open(p, os.O_CREAT | os.O_WRONLY, 0o644))

# any byte but / and NUL, 255 of them
os.mkdir(b"names"); os.chdir(b"names")
every = bytes(b for b in range(1, 256) if b != ord("/"))
for name in (every, b"x" * 255, b"\xff" * 255, b" ", b"...", b"-", b"\n"):
    touch(name)
    assert os.stat(name).st_size == 0
assert sorted(os.listdir(b".")) == sorted(
    (every, b"x" * 255, b"\xff" * 255, b" ", b"...", b"-", b"\n"))
for f in (touch, os.mkdir, os.mkfifo, os.stat, os.unlink, os.rmdir,
          lambda p: os.symlink(b"t", p), lambda p: os.link(b" ", p),
          lambda p: os.rename(b" ", p), lambda p: os.rename(p, b"y")):
    fails(errno.ENAMETOOLONG, f, b"x" * 256)
assert len(os.listdir(b".")) == 7
os.chdir(b"..")

# symlinks
os.symlink("s" * 4095, "long")
assert os.readlink("long") == "s" * 4095 and os.lstat("long").st_size == 4095
fails(errno.ENAMETOOLONG, os.symlink, "s" * 4096, "longer")
fails(errno.ENOENT, os.symlink, "", "empty")
os.symlink("loop", "loop")
fails(errno.ELOOP, os.stat, "loop")

# what has no contents
os.mkfifo("fifo", 0o640)
s = socket.socket(socket.AF_UNIX); s.bind("sock")
assert stat.S_ISFIFO(os.lstat("fifo").st_mode)
assert stat.S_ISSOCK(os.lstat("sock").st_mode)
if os.geteuid() == 0:
    for n, (ma, mi) in enumerate(((1, 3), (4095, 0xfffff), (0, 0))):
        if (ma, mi) == (0, 0):
            continue
        os.mknod("dev%d" % n, stat.S_IFCHR | 0o600, os.makedev(ma, mi))
        r = os.lstat("dev%d" % n).st_rdev
        assert (os.major(r), os.minor(r)) == (ma, mi), (ma, mi, r)
    assert open("dev0", "rb").read(1) == b""        # /dev/null
else:
    fails(errno.EPERM, os.mknod, "dev", stat.S_IFCHR | 0o600, os.makedev(1, 3))

# hard links
touch("one")
for i in range(1000):
    os.link("one", "link%d" % i)
assert os.stat("one").st_nlink == 1001
fails(errno.EEXIST, os.link, "one", "link5")
fails(errno.EPERM, os.link, "names", "dirlink")
os.rename("one", "link7")                   # two names of one file: nothing
assert os.stat("one").st_nlink == 1001
for i in range(1000):
    os.unlink("link%d" % i)
assert os.stat("one").st_nlink == 1
os.link("fifo", "fifo2"); os.link("long", "long2", follow_symlinks=False)
assert os.lstat("long2").st_nlink == 2

# listing while names come and go: none twice, none missed, types right
os.mkdir("list")
for i in range(3000):
    p = "list/%04d" % i
    if i % 3 == 0: touch(p)
    elif i % 3 == 1: os.mkdir(p)
    else: os.symlink("x", p)
seen = {}
with os.scandir("list") as d:
    for k, e in enumerate(d):
        assert e.name not in seen, e.name
        kind = "f" if e.is_file(follow_symlinks=False) else \
            "d" if e.is_dir(follow_symlinks=False) else "l"
        seen[e.name] = kind
        if k % 2 == 0 and e.name.isdigit():
            os.rmdir("list/" + e.name) if kind == "d" else os.unlink("list/" + e.name)
            touch("list/new%d" % k)
for i in range(3000):
    assert seen["%04d" % i] == "fdl"[i % 3], i

# a listing ends, whoever renames what it lists
for k, e in enumerate(os.scandir("list")):
    os.rename("list/" + e.name, "list/again%d" % k)
    assert k < 5000
# telldir and seekdir
libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = ctypes.c_void_p
libc.readdir64.restype = ctypes.c_void_p
libc.telldir.restype = ctypes.c_long
d = ctypes.c_void_p(libc.opendir(b"list"))
def nextname():
    p = libc.readdir64(d)
    return ctypes.string_at(p + 19) if p else None
at, names = [], []
while True:
    t = libc.telldir(d); n = nextname()
    if n is None: break
    at.append(t); names.append(n)
assert len(set(names)) == len(names) == len(os.listdir("list")) + 2
for i in range(len(names) - 1, 0, -97):
    libc.seekdir(d, ctypes.c_long(at[i]))
    assert nextname() == names[i], i
# a place told stays one while others come and go, and when its own name goes
keep = set(names[1000:2000:2])
for i, n in enumerate(names):
    if n not in keep and n not in (b".", b".."):
        p = b"list/" + n
        os.rmdir(p) if os.path.isdir(p) and not os.path.islink(p) else os.unlink(p)
    if i % 3 == 0: touch(b"list/later%d" % i)
for i in (1000, 1001, 1500, 1999, 2):
    libc.seekdir(d, ctypes.c_long(at[i]))
    rest = []
    while (n := nextname()) is not None: rest.append(n)
    assert len(set(rest)) == len(rest), i
    assert [n for n in rest if n in keep] == [n for n in names[i:] if n in keep], i
    # one that went may still be told: the kernel keeps what it has listed
    assert set(rest) <= set(names) | {b"later%d" % k for k in range(len(names))}, i
libc.closedir(d)
assert set(os.listdir(b"list")) == keep | {b"later%d" % i for i in range(0, len(names), 3)}

# every type, told by the listing
kinds = {"dir": 4, "reg": 8, "lnk": 10, "fifo": 1, "sock": 12}
os.mkdir("types"); os.mkdir("types/dir"); touch("types/reg"); os.symlink("x", "types/lnk")
os.mkfifo("types/fifo"); socket.socket(socket.AF_UNIX).bind("types/sock")
if os.geteuid() == 0:
    os.mknod("types/chr", stat.S_IFCHR | 0o600, os.makedev(1, 3)); kinds["chr"] = 2
    os.mknod("types/blk", stat.S_IFBLK | 0o600, os.makedev(7, 0)); kinds["blk"] = 6
d = ctypes.c_void_p(libc.opendir(b"types"))
told = {}
while (p := libc.readdir64(d)):
    told[ctypes.string_at(p + 19).decode()] = ctypes.string_at(p + 18, 1)[0]
libc.closedir(d)
assert told == dict(kinds, **{".": 4, "..": 4}), told

# removed while another lists it and a third makes more
os.mkdir("busy")
for i in range(3000): touch("busy/%d" % i)
def child(f):
    pid = os.fork()
    if pid: return pid
    try: f(); os._exit(0)
    except BaseException as e: print(repr(e), flush=True); os._exit(1)
def more():
    for i in range(1000): touch("busy/more%d" % i)
def look():
    for i in range(20):
        n = os.listdir("busy")
        assert len(set(n)) == len(n)
def remove():
    for n in os.listdir("busy"):
        if not n.startswith("more"): os.unlink("busy/" + n)
for pid in [child(more), child(look), child(remove)]:
    assert os.waitpid(pid, 0)[1] == 0
remove()
assert set(os.listdir("busy")) == {"more%d" % i for i in range(1000)}

# rename
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
def rename2(a, b, flags):
    if libc.renameat2(-100, a.encode(), -100, b.encode(), flags):
        raise OSError(ctypes.get_errno(), "renameat2")
os.mkdir("r"); os.chdir("r")
open("a", "w").write("a"); open("b", "w").write("b")
fails(errno.EEXIST, rename2, "a", "b", NOREPLACE)
fails(errno.EINVAL, rename2, "a", "b", NOREPLACE | EXCHANGE)
fails(errno.ENOENT, rename2, "a", "none", EXCHANGE)
rename2("a", "c", NOREPLACE); rename2("b", "c", EXCHANGE)
assert open("c").read() == "b" and open("b").read() == "a"
os.makedirs("d/e/f"); os.mkdir("g")
fails(errno.EINVAL, os.rename, "d", "d/e/h")
fails(errno.EINVAL, rename2, "d", "d/e", EXCHANGE)
fails(errno.ENOTEMPTY, os.rename, "g", "d")
fails(errno.ENOTDIR, os.rename, "g", "b")
fails(errno.EISDIR, os.rename, "b", "g")
n = os.stat(".").st_nlink
rename2("b", "d/e", EXCHANGE)               # a file and a directory
assert os.path.isdir("b/f") and open("d/e").read() == "a"
assert os.stat(".").st_nlink == n + 1 and os.stat("d").st_nlink == 2
assert os.stat("b/..").st_ino == os.stat(".").st_ino
f = open("c")
os.rename("d/e", "c")                       # the replaced file is still open
assert f.read() == "b" and open("c").read() == "a"
assert os.fstat(f.fileno()).st_nlink == 0
if os.geteuid() == 0:
    rename2("c", "w", WHITEOUT)
    st = os.lstat("c")
    assert stat.S_ISCHR(st.st_mode) and st.st_rdev == 0
os.chdir("..")

# removal of what is open or the place one is in
os.mkdir("gone"); os.chdir("gone"); os.rmdir("../gone")
fails(errno.ENOENT, touch, "x")
assert os.listdir(".") == []
EOF
stop
check
start
[ "$(readlink "$mnt/long" | wc -c)" = 4096 ] || fail "symlink after a mount"
same "$(find "$mnt/names" -mindepth 1 -print0 | tr -dc '\0' | wc -c)" 7 "names after a mount"
touch "$mnt/links"
stop

# the most links there may be: nobody waits until they are made
"$damage" "$image" inode /links nlink 0x7ffffffe
"$damage" "$image" inode / nlink 0x7fffffff
start
ln "$mnt/links" "$mnt/last"
same "$(stat -c %h "$mnt/links")" 2147483647 "links"
if ln "$mnt/links" "$mnt/more" 2>"$work/err"; then fail "2^31 links"; fi
grep -q "Too many links" "$work/err" || fail "$(cat "$work/err")"
if mkdir "$mnt/dir" 2>"$work/err"; then fail "2^31 folders"; fi
grep -q "Too many links" "$work/err" || fail "$(cat "$work/err")"
same "$(find "$mnt" -maxdepth 1 -name more -o -maxdepth 1 -name dir)" ""
rm "$mnt/last"
same "$(stat -c %h "$mnt/links")" 2147483646 "links"
stop
fsck.spaceweave -fy "$image" >/dev/null || [ $? = 1 ] || fail "fsck -y"
check
start
rm -rf "${mnt:?}"/*
same "$(ls -A "$mnt")" ""
stop
check

# many in one folder (ENTRIES=n, 20000; the design's mark is 10^7): each found,
# each told once, all gone
entries=${ENTRIES:-20000}
format $((entries / 1024 + 256))M
start
SECONDS=0
py "$entries" <<'END'
import ctypes, os, random, sys, time
n, t = int(sys.argv[1]), time.time()
def lap(what):
    global t
    print("%7.1f s: %s" % (time.time() - t, what), flush=True); t = time.time()
os.mkdir("many"); os.chdir("many")
for i in range(n): os.mknod("entry%08d" % i)
lap("%d made" % n)
seen = bytearray(n)
with os.scandir(".") as d:
    for e in d:
        i = int(e.name[5:])
        assert not seen[i], e.name
        seen[i] = 1
assert sum(seen) == n
lap("listed")
for i in (random.randrange(n) for _ in range(10000)):
    assert os.stat("entry%08d" % i).st_nlink == 1
    assert not os.path.exists("entry%08dx" % i)
lap("10000 found, and 10000 not")
END
stop
[ "$entries" -gt 100000 ] || check
start
t=$SECONDS
rm -rf "$mnt/many"
echo "$((SECONDS - t)) s: removed"
same "$(ls -A "$mnt")" ""
stop
check
