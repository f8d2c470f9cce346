#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# Permissions, ACLs, xattrs, chattr, FITRIM, handles, locks.

. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/posix.inc"
need setfacl getfacl setfattr getfattr lsattr chattr
both_users
format 256M
start

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
	setcap cap_net_raw+ep cap 2>/dev/null && {
		echo x >>cap
		same "$(getcap cap)" "" "capabilities go with a write"
	}
	setfattr -n trusted.t -v v s
	same "$(getfattr --only-values -n trusted.t s)" v
	chmod 755 .
else
	refused setfattr -n trusted.t -v v s
fi

# xattrs
touch x
head -c 65536 /dev/zero | tr '\0' a >"$work/big"
py <<'EOF'
import errno, os
def fails(want, f, *a):
    try:
        f(*a)
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

# locks between processes
import fcntl
f = open("lock", "w")
for take, other in ((lambda g: fcntl.flock(g, fcntl.LOCK_EX | fcntl.LOCK_NB),) * 2,
                    (lambda g: fcntl.lockf(g, fcntl.LOCK_EX | fcntl.LOCK_NB),) * 2):
    take(f)
    pid = os.fork()
    if not pid:
        try:
            other(open("lock", "w"))
        except OSError as e:
            os._exit(0 if e.errno in (errno.EAGAIN, errno.EACCES) else 2)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0

# statfs
st = os.statvfs(".")
assert st.f_namemax == 255 and st.f_bavail <= st.f_bfree <= st.f_blocks
EOF

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

# handles, over a drop of caches
if [ "$(id -u)" = 0 ]; then
	py <<'EOF'
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def handle(p):
    h = (ctypes.c_ubyte * 136)()
    ctypes.cast(h, ctypes.POINTER(ctypes.c_uint))[0] = 128
    m = ctypes.c_int()
    assert not libc.name_to_handle_at(-100, p.encode(), h, ctypes.byref(m), 0), ctypes.get_errno()
    return h
os.mkdir("hd"); open("hd/f", "w").write("by handle")
h, d = handle("hd/f"), handle("hd")
m = os.open(".", os.O_RDONLY)
os.sync()
try:
    open("/proc/sys/vm/drop_caches", "w").write("2")
except OSError:
    pass
fd = libc.open_by_handle_at(m, h, os.O_RDONLY)
assert fd >= 0, ctypes.get_errno()
assert os.read(fd, 100) == b"by handle"
os.close(fd)
fd = libc.open_by_handle_at(m, d, os.O_RDONLY)
assert fd >= 0 and os.listdir(fd) == ["f"]
os.close(fd)
os.unlink("hd/f")
fd = libc.open_by_handle_at(m, h, os.O_RDONLY)
assert fd < 0 and ctypes.get_errno() == errno.ESTALE, (fd, ctypes.get_errno())
EOF
fi

cd /
stop
check
start
getfacl -cn "$mnt/acl" 2>/dev/null | grep -q '^default:user:12:rwx' || fail "ACL after a mount"
same "$(getfattr --absolute-names -d -m user "$mnt/x" 2>/dev/null | grep -c =)" 1002 "xattrs after a mount"
lsattr "$mnt/nodump" | grep -q '^[^ ]*d' || fail "nodump after a mount"
stop
check
