#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# Programs that ask much of a file system find here what they find elsewhere.
# timeout: 3600
#
# GIT="FILES COMMITS" ("1000 10"): of a repository. FIO=SIZE (16M): of each file.

. "$(dirname "$0")/lib.sh"
read -r git_files git_commits <<<"${GIT:-1000 10}"
need tar python3 rsync
laps=$SECONDS
lap() {
	echo "$((SECONDS - laps)) s: $*"
	laps=$SECONDS
}
# at what a tree is, to the last attribute
same_tree() {
	rsync -naHAXci --delete "$1/" "$2/" >"$work/diff"
	[ ! -s "$work/diff" ] || { head "$work/diff"; fail "$3"; }
}
format 2G
start

# ---- tar, there and back: attributes, lists, holes, links, devices, odd names
src=$work/src
mkdir -p "$src/d/e" "$src/empty"
for i in $(seq 200); do head -c $((RANDOM % 9000)) /dev/urandom >"$src/d/$i"; done
ln "$src/d/1" "$src/d/e/one"
ln -s ../d/1 "$src/soft"
ln -s "$(printf 'x%.0s' $(seq 3000))" "$src/long"
mkfifo "$src/fifo"
: >"$src/$(printf 'n%.0s' $(seq 255))"
: >"$src/"$'line\nbreak \\ "quotes" \xc3\xa9'
truncate -s 300M "$src/sparse"
printf end | dd of="$src/sparse" bs=1M seek=200 conv=notrunc status=none
[ "$(id -u)" != 0 ] || { mknod "$src/dev" c 1 3; chown 12:34 "$src/d/2"; chmod 6755 "$src/d/3"; }
touch -d '1960-02-03 04:05:06.789' "$src/d/4"
touch -d '2100-02-03 04:05:06.123456789' "$src/d/5"
if command -v setfattr >/dev/null; then
	setfattr -n user.small -v value "$src/d/6"
	setfattr -n user.large -v "$(head -c 1500 /dev/zero | tr '\0' v)" "$src/d/6"
	for i in $(seq 20); do setfattr -n "user.many$i" -v "$i" "$src/d/7"; done
fi
if command -v setfacl >/dev/null; then
	setfacl -m u:12:rw,g:34:r "$src/d/8"
	setfacl -d -m u:12:rwx "$src/d/e"
fi
t="tar --xattrs --acls --sparse --numeric-owner"
mkdir "$mnt/tar" "$work/back"
$t -C "$src" -cf - . | $t -C "$mnt/tar" -xpf -
same_tree "$src" "$mnt/tar" "tar, there"
$t -C "$mnt/tar" -cf "$mnt/a.tar" .
$t -C "$work/back" -xpf "$mnt/a.tar"
same_tree "$src" "$work/back" "tar, and back"
[ "$(du -k "$mnt/tar/sparse" | cut -f1)" -lt 4096 ] || fail "a sparse file is not sparse"
rsync -aHAX --sparse "$src/" "$mnt/rsync/"
cp -a "$src" "$mnt/cp"
stop
start
for c in tar rsync cp; do same_tree "$src" "$mnt/$c" "$c, after a new mount"; done
rm -rf "$work/back"
lap "tar, rsync, cp -a"

# ---- git
if command -v git >/dev/null; then
	repo=$mnt/git
	g() { git -c user.name=t -c user.email=t@t -C "$repo" "$@"; }
	git init -q "$repo"
	g config gc.auto 0
	python3 - "$repo" "$git_files" <<'END'
import os, random, sys
rnd = random.Random(0)
words = [str(rnd.random())[2:8] for _ in range(2000)]
for i in range(int(sys.argv[2])):
    d = "%s/%d/%d" % (sys.argv[1], i // 1000, i // 100 % 10)
    os.makedirs(d, exist_ok=True)
    with open("%s/%d" % (d, i), "w") as f:
        f.write("\n".join(rnd.choices(words, k=rnd.randrange(200))))
END
	g add -A
	g commit -qm first
	for ((i = 1; i < git_commits; i++)); do
		for ((k = 0; k < 20; k++)); do
			n=$((RANDOM * 7 % git_files))
			echo "$i $RANDOM" >>"$repo/$((n / 1000))/$((n / 100 % 10))/$n"
		done
		g commit -qam "$i"
		[ $((i % (git_commits / 3 + 1))) != 0 ] || g repack -qd
	done
	lap "git, $git_files files, $git_commits commits"
	g fsck --full --strict 2>"$work/err" || { cat "$work/err"; fail "git fsck, loose"; }
	g repack -adfq
	g gc -q --prune=now
	g fsck --full --strict 2>"$work/err" || { cat "$work/err"; fail "git fsck"; }
	same "$(g rev-list --count HEAD) $(g ls-files | wc -l)" "$git_commits $git_files" "git"
	g checkout -q HEAD~2
	g checkout -q -
	[ -z "$(g status --porcelain)" ] || fail "git status"
	git -c safe.directory='*' clone -q "$repo" "$mnt/clone"
	diff -r -x .git "$repo" "$mnt/clone" || fail "git clone"
	rm -rf "$mnt/clone"
	lap "git gc, fsck, clone"
fi

# ---- mmap, holes, truncation, locks, renames, inotify: in Python
python3 - "$mnt" "$seed" <<'END' || fail "see above"
import ctypes, errno, fcntl, mmap, os, random, subprocess, struct, sys, threading, time

top, seed = sys.argv[1], int(sys.argv[2])
rnd = random.Random(seed)
d = os.path.join(top, 'py')
os.mkdir(d)

def test_mmap():
    p = d + '/mmap'
    size = 1 << 20
    with open(p, 'w+b') as f:
        f.truncate(size)
        m = mmap.mmap(f.fileno(), size)
        want = bytearray(size)
        for _ in range(300):
            at = rnd.randrange(size - 5000)
            data = rnd.randbytes(rnd.randrange(1, 5000))
            if rnd.random() < 0.5:
                m[at:at + len(data)] = data
            else:
                os.pwrite(f.fileno(), data, at)
            want[at:at + len(data)] = data
            at = rnd.randrange(size - 5000)
            assert os.pread(f.fileno(), 5000, at) == want[at:at + 5000]
            assert m[at:at + 5000] == want[at:at + 5000]
        m.flush()
        os.fsync(f.fileno())
        m.close()
    assert open(p, 'rb').read() == want
    m = mmap.mmap(os.open(p, os.O_RDWR), size, flags=mmap.MAP_PRIVATE)
    m[0:5] = b'other'
    assert open(p, 'rb').read(5) == want[:5]

def test_holes():
    p = d + '/holes'
    fd = os.open(p, os.O_RDWR | os.O_CREAT)
    want = bytearray()
    libc = ctypes.CDLL(None, use_errno=True)
    KEEP, PUNCH, ZERO = 1, 2, 16
    def fallocate(mode, at, n):
        if libc.fallocate64(fd, mode, ctypes.c_int64(at), ctypes.c_int64(n)):
            raise OSError(ctypes.get_errno(), 'fallocate')
    def grow(n):
        if n > len(want):
            want.extend(bytes(n - len(want)))
    for i in range(600):
        at, n = rnd.randrange(1 << 21), rnd.randrange(1, 1 << rnd.randrange(1, 19))
        what = rnd.randrange(8)
        if what < 3:
            data = rnd.randbytes(n)
            grow(at + n)
            assert os.pwrite(fd, data, at) == n
            want[at:at + n] = data
        elif what == 3:
            os.ftruncate(fd, at)
            grow(at)
            del want[at:]
        elif what == 4:
            fallocate(KEEP | PUNCH, at, n)
            end = min(at + n, len(want))
            if end > at:
                want[at:end] = bytes(end - at)
        elif what == 5:
            fallocate(ZERO, at, n)
            grow(at + n)
            want[at:at + n] = bytes(n)
        elif what == 6:
            fallocate(rnd.choice([0, KEEP]), at, n)
            if os.fstat(fd).st_size > len(want):
                grow(at + n)
        else:
            fallocate(ZERO | KEEP, at, n)
            end = min(at + n, len(want))
            if end > at:
                want[at:end] = bytes(end - at)
        assert os.fstat(fd).st_size == len(want), (i, what, at, n)
        if i % 20 == 0:
            if i % 40 == 0:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            got = os.pread(fd, len(want) + 1, 0)
            assert got == want, (i, next(k for k in range(len(want)) if got[k:k+1] != want[k:k+1]))
            # a hole holds only zeroes; all data are found
            at = 0
            while at < len(want):
                try:
                    data = os.lseek(fd, at, os.SEEK_DATA)
                except OSError as e:
                    assert e.errno == errno.ENXIO
                    data = len(want)
                assert not any(want[at:data]), ('data in a hole', i, at, data)
                if data >= len(want):
                    break
                at = os.lseek(fd, data, os.SEEK_HOLE)
                assert at > data
    os.ftruncate(fd, 0)
    os.pwrite(fd, b'x', (1 << 60) + 5)
    assert os.fstat(fd).st_size == (1 << 60) + 6
    assert os.lseek(fd, 0, os.SEEK_DATA) > (1 << 59)
    os.close(fd)
    os.unlink(p)

def test_copy_range():
    a, b = d + '/copy.a', d + '/copy.b'
    data = rnd.randbytes(3 << 20)
    open(a, 'wb').write(data)
    want = bytearray(rnd.randbytes(3 << 20))
    open(b, 'wb').write(want)
    fa, fb = os.open(a, os.O_RDWR), os.open(b, os.O_RDWR)
    for i in range(60):
        unit = rnd.choice([1, 4096])
        s, t, n = (rnd.randrange((2 << 20) // unit) * unit for _ in range(3))
        n = min(n, 1 << 20)
        if not n:
            continue
        done = os.copy_file_range(fa, fb, n, s, t)
        assert 0 < done <= n
        want[t:t + done] = data[s:s + done]
    assert os.pread(fb, 4 << 20, 0) == want
    # what shares blocks parts again when written
    os.copy_file_range(fa, fb, 1 << 20, 0, 0)
    os.pwrite(fb, b'new', 4096)
    os.fsync(fb)
    os.posix_fadvise(fa, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fa, len(data) + 1, 0) == data
    os.close(fa); os.close(fb)

def test_renames():
    e = d + '/renames'
    os.mkdir(e)
    stop, bad = threading.Event(), []
    def write(k):
        r = random.Random(seed + k)
        for i in range(300):
            t = f'{e}/tmp.{k}'
            with open(t, 'w') as f:
                f.write(f'{k} {i}\n' * 50)
            os.rename(t, f'{e}/file.{r.randrange(4)}')
    def read():
        had = set()
        while not stop.is_set():
            for i in range(4):
                try:
                    with open(f'{e}/file.{i}') as f:
                        lines = f.read().splitlines()
                except FileNotFoundError:
                    if i in had:
                        bad.append(f'file.{i} was not there')
                    continue
                had.add(i)
                if len(lines) != 50 or len(set(lines)) != 1:
                    bad.append(f'file.{i}: {len(lines)} lines')
    readers = [threading.Thread(target=read)]
    writers = [threading.Thread(target=write, args=(k,)) for k in range(4)]
    for t in readers + writers: t.start()
    for t in writers: t.join()
    stop.set()
    for t in readers: t.join()
    assert not bad, bad[:3]
    # folders under each other: no loop, none lost
    for i in range(8): os.mkdir(f'{e}/dir{i}')
    def move(k):
        r = random.Random(seed - k)
        for _ in range(200):
            dirs = [x for x, _, _ in os.walk(e)]
            a, b = r.choice(dirs), r.choice(dirs)
            try:
                os.rename(a, b + '/' + os.path.basename(a))
            except OSError as x:
                assert x.errno in (errno.EINVAL, errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY, errno.EEXIST), x
    movers = [threading.Thread(target=move, args=(k,)) for k in range(4)]
    for t in movers: t.start()
    for t in movers: t.join()
    names = sorted(os.path.basename(x) for x, _, _ in os.walk(e) if x != e)
    assert names == [f'dir{i}' for i in range(8)], names

def test_inotify():
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(fd, d.encode(), 0x100 | 0x200 | 0x40 | 0x80 | 0x2 | 0x8) > 0
    open(d + '/seen', 'w').write('x')
    os.rename(d + '/seen', d + '/seen2')
    os.unlink(d + '/seen2')
    data, names = os.read(fd, 65536), []
    at = 0
    while at < len(data):
        wd, mask, cookie, n = struct.unpack_from('iIII', data, at)
        names.append((mask, data[at + 16:at + 16 + n].rstrip(b'\0').decode()))
        at += 16 + n
    for want in (0x100, 'seen'), (0x2, 'seen'), (0x8, 'seen'), (0x40, 'seen'), (0x80, 'seen2'), (0x200, 'seen2'):
        assert want in names, (want, names)

def test_locks():
    p = d + '/lock'
    a, b = os.open(p, os.O_RDWR | os.O_CREAT), os.open(p, os.O_RDWR)
    fcntl.flock(a, fcntl.LOCK_EX)
    try:
        fcntl.flock(b, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert False, 'flock given twice'
    except BlockingIOError:
        pass
    fcntl.flock(a, fcntl.LOCK_UN)
    fcntl.flock(b, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(a, fcntl.LOCK_EX, 10, 0)
    code = f'''import fcntl, os, sys
fd = os.open({p!r}, os.O_RDWR)
fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 20)
try:
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)
    sys.exit(1)
except OSError:
    pass'''
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0, 'POSIX locks'

def test_open_unlinked():
    p = d + '/gone'
    fd = os.open(p, os.O_RDWR | os.O_CREAT)
    os.unlink(p)
    os.write(fd, b'still' * 1000)
    os.fsync(fd)
    assert os.pread(fd, 5, 4995) == b'still'
    assert os.fstat(fd).st_nlink == 0
    fd2 = os.open(d, os.O_RDWR | os.O_TMPFILE)
    os.write(fd2, b'tmp')
    os.link(f'/proc/self/fd/{fd2}', d + '/named', src_dir_fd=os.open('/', os.O_RDONLY), follow_symlinks=True)
    assert open(d + '/named').read() == 'tmp'

def test_append():
    p = d + '/append'
    def add(k):
        fd = os.open(p, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for i in range(200): os.write(fd, b'%d %06d\n' % (k, i))
        os.close(fd)
    ts = [threading.Thread(target=add, args=(k,)) for k in range(4)]
    for t in ts: t.start()
    for t in ts: t.join()
    lines = open(p).read().splitlines()
    assert sorted(lines) == sorted(f'{k} {i:06d}' for k in range(4) for i in range(200))

def test_directory():
    e = d + '/many'
    os.mkdir(e)
    for i in range(5000): os.mknod(f'{e}/{i}')
    seen = set()
    with os.scandir(e) as it:
        for n, x in enumerate(it):
            assert x.name not in seen
            seen.add(x.name)
            if n % 2: os.unlink(x.path)
    assert seen == {str(i) for i in range(5000)}
    assert len(os.listdir(e)) == 2500
    subprocess.run(['rm', '-rf', e], check=True)
    assert os.stat(d).st_nlink == 2 + len([x for x in os.scandir(d) if x.is_dir(follow_symlinks=False)])

for name, f in list(globals().items()):
    if name.startswith('test_'):
        t = time.time()
        f()
        print(f'{time.time() - t:.1f} s: {name[5:]}', flush=True)
END
lap "Python"

# ---- fio, which verifies what it wrote
if command -v fio >/dev/null; then
	cd "$work"		# where it leaves its state
	for job in "sync 0" "psync 0" "psync 1" "mmap 0" "libaio 1"; do
		read -r engine direct <<<"$job"
		fio --name=v --directory="$mnt" --filename=fio --size="${FIO:-16M}" --rw=randrw \
			--bsrange=512-64k --bs_unaligned=$((1 - direct)) --blockalign=512 \
			--ioengine="$engine" --direct="$direct" --iodepth=8 --verify=crc32c \
			--verify_fatal=1 --randseed="$seed" --output="$work/fio" >/dev/null 2>&1 ||
			{ tail -n 20 "$work/fio"; fail "fio, $engine, direct=$direct"; }
		rm -f "$mnt/fio"
	done
	lap "fio, ${FIO:-16M}: sync, psync, mmap; direct: psync, libaio"
else
	echo "no fio here: left out"
fi

cp "$mnt/py/mmap" "$work/mmap"
stop
check
start
cmp "$mnt/py/mmap" "$work/mmap" || fail "mmap, after a new mount"
stop
