#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# Permissions, ACLs, xattrs, chattr, FITRIM, handles, locks.

. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/posix.inc"
need setfacl getfacl setfattr getfattr lsattr chattr
both_users
format 256M -L label
start -o export

refused() { # COMMAND...
	if "$@" 2>/dev/null; then fail "did not fail: $*"; fi
}
cd "$mnt" || exit 1

# ACLs and the mode
mkdir acl
touch acl/f
chmod 640 acl/f
setfacl -m u:12:rwx acl/f
same "$(stat -c %a acl/f)" 670 "the mask is the group's bits"
chmod 600 acl/f
getfacl -cn acl/f | grep -q '^mask::---' || fail "chmod does not move the mask"
setfacl -b acl/f
same "$(getfattr -d -m - acl/f)" "" "an ACL that says no more is not kept"
setfacl -d -m u::rwx,g::rx,o::-,u:12:rwx acl
(umask 077; touch acl/g; mkdir acl/h)
same "$(stat -c %a acl/g)" 660 "a default ACL stands in the umask's place"
getfacl -cn acl/h | grep -q '^default:user:12:rwx' || fail "a directory inherits"
(umask 077; touch acl/h/i; mkdir acl/h/j; mkfifo acl/h/p; ln -s x acl/h/l)
same "$(stat -c %a acl/h/i acl/h/j acl/h/p | paste -sd' ')" "660 770 660" "inherited further down"
getfacl -cn acl/h/j | grep -q '^default:user:12:rwx' || fail "a directory in it inherits, too"
getfacl -cn acl/h/i | grep -q '^user:12:rwx.*#effective:rw-' || fail "a file takes the entries, masked"
chmod 606 acl/h/i
getfacl -cn acl/h/i | grep -q '^user:12:rwx.*#effective:---' || fail "chmod masks, and keeps the entries"
setfacl -m m::rx acl/h/i
same "$(stat -c %a acl/h/i)" 656 "the mode follows the mask"
setfacl -k acl/h
(umask 077; touch acl/h/k)
same "$(stat -c %a acl/h/k)" 600 "the umask counts again"
if is_root; then
	mkdir -m 711 private
	echo secret >private/f
	chmod 600 private/f
	setfacl -m u:65534:r private/f
	chmod 755 .
	# ACLs are enforced, both ways
	nobody() { setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; }
	other() { setpriv --reuid=12 --regid=12 "$@"; }
	same "$(nobody cat private/f)" secret
	refused nobody sh -c 'echo x >>private/f'
	refused other --clear-groups cat private/f
	setfacl -m g:34:r private/f
	same "$(other --groups 34 cat private/f)" secret "a supplementary group"
	refused nobody setfacl -b private/f
	refused nobody ls private
	setfacl -m m::- private/f
	refused nobody cat private/f
fi
(umask 027; touch u; mkdir v)
same "$(stat -c %a u) $(stat -c %a v)" "640 750" umask
refused setfacl -d -m u:12:rwx acl/f

# setgid and sticky directories, setuid lost by a write
mkdir sg
chmod 2770 sg
mkdir sg/sub
same "$(stat -c %a sg/sub | cut -c1)" 2 "setgid is inherited"
for how in 'echo x >>s' 'echo x 1<>s' 'truncate -s 5 s' ': >s' \
	'fallocate -l 9000 s' 'fallocate -p -l 10 s'; do
	rm -f s
	echo data >s
	chmod 6755 s
	if [ "$(id -u)" = 0 ]; then
		chmod 777 .
		chmod 6777 s
		setpriv --reuid=nobody --clear-groups bash -c "$how"
		same "$(stat -c %a s)" 777 "setuid after: $how"
	else
		bash -c "$how"
		same "$(stat -c %a s)" 755 "setuid after: $how"
	fi
done
if [ "$(id -u)" = 0 ]; then
	chmod 6755 s
	chown 1:1 s
	same "$(stat -c %a s)" 755 "setuid after chown"
	mkdir -m 1777 sticky
	touch sticky/f
	refused setpriv --reuid=nobody --clear-groups rm -f sticky/f
	cp /bin/true cap
	need setcap getcap
	for how in 'echo x >>cap' 'truncate -s 5 cap' 'chown 1 cap' 'fallocate -l 99999 cap'; do
		setcap cap_net_raw+ep cap
		same "$(getcap cap)" "cap cap_net_raw=ep"
		bash -c "$how"
		same "$(getcap cap)" "" "capabilities go with: $how"
	done
	setcap cap_net_raw+ep cap
	chmod 700 cap
	setfattr -n trusted.t -v v s
	same "$(getfattr --only-values -n trusted.t s)" v
	same "$(getfattr -m - s | grep -c trusted.t)" 1 "root sees trusted.t"
	same "$(setpriv --reuid=65534 --regid=65534 --clear-groups getfattr -m - s)" "" "a plain user sees trusted.t"
	chmod 755 .
else
	refused setfattr -n trusted.t -v v s
fi

# xattrs
touch x
head -c 65536 /dev/zero | tr '\0' a >"$work/big"
py <<'EOF'
import errno, os, time
def fails(want, f, *a, **k):
    try:
        f(*a, **k)
    except OSError as e:
        assert e.errno == want, (f, a[:2], e)
        return
    assert False, a[:2]
os.setxattr("x", "user.big", b"b" * 65536)
assert os.getxattr("x", "user.big") == b"b" * 65536
fails(errno.E2BIG, os.setxattr, "x", "user.big", b"b" * 65537)
fails(errno.EEXIST, os.setxattr, "x", "user.big", b"", os.XATTR_CREATE)
fails(errno.ENODATA, os.setxattr, "x", "user.none", b"", os.XATTR_REPLACE)
fails(errno.ENODATA, os.getxattr, "x", "user.none")
fails(errno.ENODATA, os.removexattr, "x", "user.none")
fails(errno.ENOTSUP, os.setxattr, "x", "other.a", b"")
os.setxattr("x", "user." + "n" * 250, b"")
for i in range(2000):
    os.setxattr("x", "user.%d" % i, b"%d" % i)
assert len(os.listxattr("x")) == 2002
for i in range(0, 2000, 2):
    os.removexattr("x", "user.%d" % i)
assert len(os.listxattr("x")) == 1002
assert os.getxattr("x", "user.1999") == b"1999"

# of a symlink, none that a user sets
os.symlink("x", "xl")
fails(errno.EPERM, os.setxattr, "xl", "user.a", b"", follow_symlinks=False)
if os.geteuid() == 0:
    os.setxattr("xl", "trusted.a", b"of the link", follow_symlinks=False)
    assert os.getxattr("xl", "trusted.a", follow_symlinks=False) == b"of the link"

# locks between processes
import fcntl, struct
def ofd(g):
    fcntl.fcntl(g, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))   # F_OFD_SETLK
for take in (lambda g: fcntl.flock(g, fcntl.LOCK_EX | fcntl.LOCK_NB),
             lambda g: fcntl.lockf(g, fcntl.LOCK_EX | fcntl.LOCK_NB), ofd):
    f = open("lock", "w")
    take(f)
    pid = os.fork()
    if not pid:
        try:
            take(open("lock", "w"))
        except OSError as e:
            os._exit(0 if e.errno in (errno.EAGAIN, errno.EACCES) else 2)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    f.close()
# an OFD lock belongs to the open file: another of the same process is refused
g, h = open("lock", "w"), open("lock", "w")
ofd(g)
fails(errno.EAGAIN, ofd, h)
g.close()
ofd(h)
# who waits gets it
pid = os.fork()
if not pid:
    h.close()
    fcntl.lockf(open("lock", "r+"), fcntl.LOCK_EX, 10, 100)
    os._exit(0)
time.sleep(0.2)
h.close()
assert os.waitpid(pid, 0)[1] == 0

# statfs, at every moment
st = os.statvfs(".")
assert st.f_namemax == 255 and st.f_bavail <= st.f_bfree <= st.f_blocks
w = os.open("space", os.O_CREAT | os.O_RDWR)
os.write(w, os.urandom(16 << 20)); os.fsync(w)
def taken():
    now = os.statvfs(".")
    assert now.f_bavail <= now.f_bfree <= now.f_blocks == st.f_blocks
    return (st.f_bfree - now.f_bfree) * st.f_bsize
assert 16 << 20 <= taken() < 17 << 20, taken()
os.posix_fallocate(w, 16 << 20, 16 << 20)
assert 32 << 20 <= taken() < 33 << 20, taken()
os.close(w); os.unlink("space")
for i in range(100):
    if taken() < 1 << 20: break
    time.sleep(0.1)
else: assert False, ("a file that is gone still takes space", taken())

# ioctls: flags, project, generation, label
GETFLAGS, SETFLAGS, GETVERSION = 0x80086601, 0x40086602, 0x80087601
FSGET, FSSET, GETLABEL = 0x801c581f, 0x401c5820, 0x81009431
def ioc(fd, cmd, arg):
    buf = bytearray(arg); fcntl.ioctl(fd, cmd, buf); return bytes(buf)
for kind in "fd":
    if kind == "d": os.mkdir("ioc.d")
    p = os.open("ioc." + kind, os.O_RDONLY if kind == "d" else os.O_CREAT | os.O_RDWR)
    # numbers are used once; and of the long that the call names only an int is meant
    assert ioc(p, GETVERSION, b"\xff" * 8) == bytes(4) + b"\xff" * 4
    assert ioc(p, GETLABEL, bytes(256)).rstrip(b"\0") == b"label"
    flags = 0x40 | 0x80 | 0x8 | (0x10000 if kind == "d" else 0)     # d A S D
    ioc(p, SETFLAGS, struct.pack("Q", flags))
    assert struct.unpack("Q", ioc(p, GETFLAGS, bytes(8)))[0] == flags
    x = struct.unpack("5I8x", ioc(p, FSGET, bytes(28)))
    assert x == (0x80 | 0x40 | 0x20, 0, 0, 0, 0), x                 # nodump noatime sync
    ioc(p, FSSET, struct.pack("5I8x", x[0], 0, 0, 4711, 0))
    assert struct.unpack("5I8x", ioc(p, FSGET, bytes(28)))[3] == 4711
    assert struct.unpack("Q", ioc(p, GETFLAGS, bytes(8)))[0] == flags
    fails(errno.EOPNOTSUPP, ioc, p, SETFLAGS, struct.pack("Q", 0x4))            # compress
    fails(errno.EOPNOTSUPP, ioc, p, FSSET, struct.pack("5I8x", x[0] | 0x8000, 0, 0, 0, 0)) # dax
    fails(errno.ENOTTY, ioc, p, 0x80086666, bytes(8))
    assert struct.unpack("5I8x", ioc(p, FSGET, bytes(28)))[3] == 4711
    os.close(p)
p = os.open("ioc.f", os.O_RDWR)
fails(errno.EOPNOTSUPP, ioc, p, SETFLAGS, struct.pack("Q", 0x10000))            # of directories

if os.geteuid() == 0:
    # what was written before a file became immutable is not refused after
    p = os.open("late", os.O_CREAT | os.O_RDWR)
    os.write(p, b"early" * 2000)
    ioc(p, SETFLAGS, struct.pack("Q", 0x10))
    os.fsync(p)
    os.posix_fadvise(p, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(p, 20000, 0) == b"early" * 2000
    st = os.stat("late")
    for ns in ((5, 5), (5, st.st_mtime_ns), (st.st_atime_ns, 5)):
        fails(errno.EPERM, os.utime, "late", ns=ns)
    ioc(p, SETFLAGS, struct.pack("Q", 0))
EOF

# What comes through the page cache, after an open that is not asked of us.
cat >"$work/cached.py" <<'EOF'
import errno, fcntl, mmap, os, struct, sys, time
def fails(f, *a):
    try:
        f(*a)
    except OSError as e:
        assert e.errno == errno.EPERM, (f, a, e)
        return
    assert False, (f, a)
def flags(p, n):
    with open(p) as f:
        fcntl.ioctl(f, 0x40086602, struct.pack("Q", n))
old = b"0123456789" * 1000
def lines(i):
    return [b"%d %d %s\n" % (i, k, b"." * (k * 37 % 9000)) for k in range(100)]
tail = b"".join(b"%015d\n" % i for i in range(1 << 18))
if sys.argv[1] == "make":
    # append-only: what is there stays, whichever way it is written
    for p in "log", "whole":
        with open(p, "wb") as f:
            f.write(old)
        flags(p, 0x20)
    for at, data in ((0, b"x" * 4096), (5000, b"x"), (len(old) - 1, b"x")):
        w = os.open("whole", os.O_WRONLY)
        os.pwrite(w, data, at)
        fails(os.fsync, w)
        os.close(w)
    r = os.open("whole", os.O_RDWR)
    m = mmap.mmap(r, len(old))
    m[7] = 120
    fails(m.flush)
    m.close()
    os.posix_fadvise(r, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(r, len(old), 0) == old
    # each open file hears of it, once
    a, b = os.open("whole", os.O_WRONLY), os.open("whole", os.O_WRONLY)
    os.pwrite(a, b"x", 5000)
    for w in a, b, r:
        fails(os.fsync, w)
        os.fsync(w)
    # the same bytes are no change, and who writes them hears of no other's error
    os.pwrite(r, old[4000:9000], 4000)
    os.fsync(r)
    # appended by several programs
    pids = []
    for i in range(4):
        pids.append(os.fork())
        if not pids[-1]:
            with open("log", "ab", 0) as f:
                for k, line in enumerate(lines(i)):
                    f.write(line)
                    if k % 10 == i:
                        os.fsync(f.fileno())
            os._exit(0)
    assert all(os.waitpid(p, 0)[1] == 0 for p in pids)
    with open("log", "ab", 0) as f:
        f.write(tail)                   # many requests at once
        os.fsync(f.fileno())
    # and beside one who would change what is there
    w = os.open("log", os.O_WRONLY)
    with open("log", "ab", 0) as f:
        os.pwrite(w, b"x", len(old) - 20)
        f.write(b"the end")
        fails(os.fsync, w)
        os.close(w)
    # immutable: what is refused moves no time
    with open("im-times", "wb") as f:
        f.write(old)
    flags("im-times", 0x10)
    mtime, then = os.stat("im-times").st_mtime_ns, time.time_ns()
    time.sleep(0.05)                    # the clock of time stamps is a coarse one
    w = os.open("im-times", os.O_RDWR)
    os.pwrite(w, b"x" * 100, 5000)
    fails(os.fsync, w)
    fails(os.truncate, "im-times", 10)
    fails(os.ftruncate, w, 20000)
    fails(os.utime, "im-times")
    fails(os.utime, "im-times", (5, 5))
    os.close(w)
    with open(sys.argv[2], "w") as f:
        print(mtime, then, file=f)
else:
    assert open("whole", "rb").read() == old
    data = open("log", "rb").read()
    assert data.startswith(old) and data.endswith(tail + b"the end")
    got = data[len(old):-len(tail) - 7].splitlines(True)
    for i in range(4):
        assert [x for x in got if x.startswith(b"%d " % i)] == lines(i)
    assert len(got) == 400
    st = os.stat("im-times")
    mtime, then = map(int, open(sys.argv[2]).read().split())
    assert st.st_mtime_ns == mtime and st.st_ctime_ns <= then, "times of a refused write"
    assert open("im-times", "rb").read() == old
    for p in "log", "whole", "im-times":
        flags(p, 0)
EOF
if is_root; then
	python3 "$work/cached.py" make "$work/times"
fi

# chattr and what it forbids. An open is not asked of us, so it succeeds.
touch nodump
mkdir immutable append
chattr +d nodump
lsattr nodump | grep -q '^[^ ]*d' || fail "nodump"
if [ "$(id -u)" = 0 ]; then
	touch immutable/f append/f im ap
	before=$(stat -c %Z immutable)
	sleep 1
	chattr +i immutable im
	[ "$(stat -c %Z immutable)" -gt "$before" ] || fail "chattr does not move ctime"
	chattr +a append ap
	refused touch immutable/new
	refused rm -f immutable/f
	refused mv immutable/f y
	refused chmod 777 im
	refused touch -d @5 im
	refused ln im im2
	refused rm -f im
	touch append/new
	refused rm -f append/f
	refused touch -d @5 append ap
	touch ap
	echo more >>ap
	same "$(cat ap)" more
	chattr -ia immutable im append ap

	fstrim . || fail fstrim
	refused fstrim -o 0 -l 1 .
	refused fstrim -o 1T .
else
	refused chattr +i nodump
fi

# what must be there after a mount, too
lsattr -pv ioc.f >"$work/lsattr"
grep -Eq '^ *4711 +0 +-*S-*dA-* ioc.f$' "$work/lsattr" || fail "lsattr -pv: $(cat "$work/lsattr")"
chattr -p 4712 ioc.d
same "$(lsattr -pd ioc.d | awk '{ print $1 }')" 4712 "chattr -p"

# handles: over a drop of caches, a mount, and of what is gone
cat >"$work/handles.py" <<'EOF'
import ctypes, errno, os, pickle, sys
libc = ctypes.CDLL(None, use_errno=True)
def handle(p):
    h = (ctypes.c_ubyte * 136)()
    ctypes.cast(h, ctypes.POINTER(ctypes.c_uint))[0] = 128
    m = ctypes.c_int()
    assert not libc.name_to_handle_at(-100, p.encode(), h, ctypes.byref(m), 0), ctypes.get_errno()
    return bytes(h)
def by_handle(h, flags=os.O_RDONLY):
    fd = libc.open_by_handle_at(at, (ctypes.c_ubyte * 136)(*h), flags)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "open_by_handle_at")
    return fd
def stale(h):
    try:
        by_handle(h)
    except OSError as e:
        assert e.errno == errno.ESTALE, e
        return
    assert False, "not stale"
def look():
    fd = by_handle(h["f"], os.O_RDWR)
    assert os.read(fd, 100) == b"by handle" and os.fstat(fd).st_ino == ino["f"]
    d = by_handle(h["d"])
    assert os.listdir(d) == ["sub"]
    # its way up is found again: "..", and the path
    assert os.readlink("/proc/self/fd/%d" % d) == os.getcwd() + "/hd/d"
    assert os.stat("..", dir_fd=d).st_ino == ino["hd"]
    s = by_handle(h["s"])
    assert os.readlink("/proc/self/fd/%d" % s) == os.getcwd() + "/hd/d/sub"
    stale(h["gone"])
    stale(h["gonedir"])
at = os.open(".", os.O_RDONLY)
paths = {"f": "hd/f", "d": "hd/d", "s": "hd/d/sub", "hd": "hd", "gone": "hd/gone",
         "gonedir": "hd/gonedir"}
if sys.argv[2] == "make":
    os.makedirs("hd/d/sub"); os.mkdir("hd/gonedir")
    for n in "hd/f", "hd/gone":
        with open(n, "w") as f: f.write("by handle")
    h = {k: handle(p) for k, p in paths.items()}
    ino = {k: os.stat(p).st_ino for k, p in paths.items()}
    with open("hd/gone") as f:
        os.unlink("hd/gone"); os.rmdir("hd/gonedir")
        assert f.read() == "by handle"
    os.rename("hd/f", "hd/other")
    pickle.dump((h, ino), open(sys.argv[1], "wb"))
    look()
    os.sync()
    try:
        open("/proc/sys/vm/drop_caches", "w").write("2")
    except OSError as e:
        print("caches are not dropped:", e)
else:
    h, ino = pickle.load(open(sys.argv[1], "rb"))
look()
# no number is used again
for i in range(300):
    open("hd/new", "w").close()
    assert os.stat("hd/new").st_ino not in ino.values()
    os.unlink("hd/new")
stale(h["gone"])
EOF
if is_root; then
	python3 "$work/handles.py" "$work/handles" make
fi

cd /
stop
check
start
python3 - "$mnt" <<'EOF'
import ctypes, errno, sys
libc = ctypes.CDLL(None, use_errno=True)
h = (ctypes.c_ubyte * 136)()
ctypes.cast(h, ctypes.POINTER(ctypes.c_uint))[0] = 128
r = libc.name_to_handle_at(-100, sys.argv[1].encode(), h, ctypes.byref(ctypes.c_int()), 0)
assert r == -1 and ctypes.get_errno() == errno.EOPNOTSUPP, "handles without -o export"
EOF
stop
start -o export
if is_root; then
	(cd "$mnt" && python3 "$work/handles.py" "$work/handles" again)
	(cd "$mnt" && python3 "$work/cached.py" look "$work/times")
	same "$(cd "$mnt" && getcap cap)" "cap cap_net_raw=ep" "a capability after a mount"
	same "$(stat -c %a "$mnt/cap")" 700 "mode after a mount"
	same "$(getfattr -h --absolute-names --only-values -n trusted.a "$mnt/xl")" "of the link"
	same "$(head -c 10 "$mnt/late") $(stat -c %s "$mnt/late")" "earlyearly 10000" "what became immutable"
fi
same "$(lsattr -pd "$mnt/ioc.d" | awk '{ print $1 }') $(lsattr -p "$mnt/ioc.f" | awk '{ print $1 }')" \
	"4712 4711" "projects after a mount"
getfacl -cn "$mnt/acl" 2>/dev/null | grep -q '^default:user:12:rwx' || fail "ACL after a mount"
same "$(getfattr --absolute-names -d -m user "$mnt/x" 2>/dev/null | grep -c =)" 1002 "xattrs after a mount"
lsattr "$mnt/nodump" | grep -q '^[^ ]*d' || fail "nodump after a mount"
stop
check
