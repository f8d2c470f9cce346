#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-2-Clause
"""Compare Spaceweave with a null FUSE server, fuse2fs, ntfs-3g, ext4 and xfs.

Every file system lives in an image on the same disk. Each group of workloads
runs on a fresh image of each file system in turn, the order rotating from
round to round; the medians of the rounds are shown, and ratios between file
systems of the same run. What cannot be set up is left out, with the reason.
`cold` means: unmounted, host caches dropped, mounted again (the null server
forgets everything at unmount, so there only the caches are dropped).

Writes table.txt, results.json and chart.svg to --out. Nothing here fails
because something was slow.
"""
import argparse
import atexit
import json
import math
import os
import platform
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import chart  # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")
MIB = 1 << 20
GIB = 1 << 30


class Trouble(Exception):
    """Something that is shown in the table instead of a figure."""


def say(text):
    print("# %7.1f s  %s" % (time.monotonic() - BEGUN, text), file=sys.stderr, flush=True)


def run(argv, timeout=120, **kw):
    """Run a command; its output as text. Trouble if it fails."""
    kw.setdefault("stdout", subprocess.PIPE)
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, **kw) as p:
        try:
            out, err = p.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            p.kill()
            raise Trouble("%s: over %g s" % (os.path.basename(argv[0]), timeout))
        except BaseException:
            p.kill()
            raise
    if p.returncode:
        lines = err.decode(errors="replace").strip().splitlines() or ["exit %d" % p.returncode]
        raise Trouble("%s: %s" % (os.path.basename(argv[0]), lines[-1][:200]))
    return out.decode(errors="replace") if out else ""


def read(path):
    with open(path) as f:
        return f.read()


def drop_caches():
    try:
        with open("/proc/sys/vm/drop_caches", "w") as f:
            f.write("3\n")
        return True
    except OSError:
        return False


def forget_file(path):
    """Without root: at least the image leaves the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def disk_flushes(path):
    """Flushes completed by the disk that holds `path`, or None."""
    dev = os.stat(path).st_dev
    try:
        f = read("/sys/dev/block/%d:%d/stat" % (os.major(dev), os.minor(dev))).split()
        return int(f[15]) if len(f) > 15 else None
    except OSError:
        return None


# ---- file systems -------------------------------------------------------------------


class FS:
    """One file system in an image. Commands are lists; a server runs in front."""

    name = "?"
    needs = ()
    root = False
    volatile = False        # forgets everything when unmounted

    def __init__(self, build):
        self.build = build
        self.server = None
        self.traced = None
        self.mounted = False
        self.usage = None

    def why_not(self):
        for p in self.needs:
            if not shutil.which(p):
                return "no %s here" % os.path.basename(p)
        if self.root and os.geteuid():
            return "needs root"
        if not os.access("/dev/fuse", os.R_OK | os.W_OK) and self.serves:
            return "/dev/fuse cannot be opened"
        return None

    serves = True

    def mkfs(self, image):
        raise NotImplementedError

    def command(self, image, where):
        raise NotImplementedError

    def make(self, image, size, timeout=60):
        with open(image, "w") as f:
            f.truncate(size)
        argv = self.mkfs(image)
        begun = time.monotonic()
        if argv:
            run(argv, timeout=timeout)
        return time.monotonic() - begun

    def mount(self, image, where, trace=None, timeout=60):
        argv = self.command(image, where)
        self.where, self.image = where, image
        self.traced = trace
        if trace:
            argv = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", trace,
                    "-e", "trace=fsync,fdatasync,syncfs"] + argv
        begun = time.monotonic()
        self.log = tempfile.TemporaryFile()
        self.server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self.log,
                                       stderr=self.log, start_new_session=True)
        LIVE.add(self)
        while not os.path.ismount(where):
            if self.server.poll() is not None:
                LIVE.discard(self)
                self.server = None
                raise Trouble("%s did not mount: %s" % (self.name, self.last_words()))
            if time.monotonic() - begun > timeout:
                self.kill()
                raise Trouble("%s: no mount within %g s" % (self.name, timeout))
            time.sleep(0.0005)
        self.mounted = True
        return time.monotonic() - begun

    def last_words(self):
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "(said nothing)"

    def umount(self, timeout=120):
        """Returns the seconds until the server has ended; keeps its resource usage."""
        begun = time.monotonic()
        if self.mounted:
            for attempt in range(50):
                try:
                    if os.geteuid():
                        run(["fusermount3", "-u", self.where])
                    else:
                        run(["umount", self.where])
                    break
                except Trouble as t:
                    if "busy" not in str(t) or attempt == 49:
                        self.kill()
                        raise
                    time.sleep(0.1)
            self.mounted = False
        while self.server:
            pid, status, usage = os.wait4(self.server.pid, os.WNOHANG)
            if pid:
                self.server.returncode = status
                self.server, self.usage = None, usage
                LIVE.discard(self)
                if status:
                    raise Trouble("%s ended with status %d: %s" %
                                  (self.name, status, self.last_words()))
            elif time.monotonic() - begun > timeout:
                self.kill()
                raise Trouble("%s did not end within %g s" % (self.name, timeout))
            else:
                time.sleep(0.0005)
        return time.monotonic() - begun

    def kill(self):
        """Whatever state it is in: no server, no mount."""
        LIVE.discard(self)
        if self.server:
            try:
                os.killpg(self.server.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.server.wait()
            self.server = None
        if self.mounted:
            argv = ["fusermount3", "-uz"] if os.geteuid() else ["umount", "-l"]
            subprocess.run(argv + [self.where], stderr=subprocess.DEVNULL)
            self.mounted = False

    def remake(self):
        """As after a reboot. Returns the seconds that mounting took."""
        if self.volatile:
            os.sync()
            drop_caches()
            return 0.0
        self.umount()
        forget_file(self.image)
        drop_caches()
        return self.mount(self.image, self.where)

    def pid(self):
        return self.server.pid

    def cpu(self):
        """Seconds of CPU that the server has used."""
        if not self.server:
            return None
        f = read("/proc/%d/stat" % self.pid()).rsplit(")", 1)[1].split()
        return (int(f[11]) + int(f[12])) / TICK

    def peak_mib(self):
        if not self.server:
            return None
        for line in read("/proc/%d/status" % self.pid()).splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        return None

    def wakeups(self):
        """How often threads of the server have slept."""
        n = 0
        for task in os.listdir("/proc/%d/task" % self.pid()):
            for line in read("/proc/%d/task/%s/status" % (self.pid(), task)).splitlines():
                if line.startswith("voluntary_ctxt_switches:"):
                    n += int(line.split()[1])
        return n

    def written(self):
        """Bytes the server sent to storage while it was mounted last; after umount()."""
        return self.usage.ru_oublock * 512 if self.usage else None

    def flushes(self):
        """Flushes asked for since the mount with a trace."""
        n = 0
        with open(self.traced) as f:
            for line in f:
                n += "sync" in line and "resumed" not in line
        return n


class Spaceweave(FS):
    name = "spaceweave"

    def __init__(self, build):
        super().__init__(build)
        self.needs = (build + "/bin/mkfs.spaceweave", build + "/bin/mount.spaceweave")

    def mkfs(self, image):
        return [self.needs[0], "-q", image]

    def command(self, image, where):
        extra = os.environ.get("SPACEWEAVE_OPTIONS")
        return [self.needs[1], image, where, "-f"] + (["-o", extra] if extra else [])


class Null(FS):
    """Answers the same requests as Spaceweave, and one worker leads as there."""

    name = "null"
    options = "data,xattr,acl,killpriv,lead,workers=4,poll=20"
    volatile = True

    def __init__(self, build):
        super().__init__(build)
        self.needs = (build + "/tests/bench/nullfs",)

    def mkfs(self, image):
        return None

    def command(self, image, where):
        extra = os.environ.get("NULL_OPTIONS")
        return [self.needs[0], where, "-f", "-o",
                self.options + ("," + extra if extra else "")]


class NullBare(Null):
    """The fewest requests there can be."""

    name = "null-bare"
    options = "data,lead,workers=4,poll=20"


class Fuse2fs(FS):
    name = "fuse2fs"
    needs = ("fuse2fs", "mkfs.ext4")

    def mkfs(self, image):
        return ["mkfs.ext4", "-Fq", image]

    def command(self, image, where):
        return ["fuse2fs", image, where, "-f"]


class Ntfs3g(FS):
    name = "ntfs-3g"
    needs = ("ntfs-3g", "mkntfs")

    def mkfs(self, image):
        return ["mkntfs", "-FqQ", image]

    def command(self, image, where):
        return ["ntfs-3g", "-o", "no_detach,big_writes", image, where]


class Kernel(FS):
    """In the kernel, on a loop device. Its bytes and flushes are the loop device's."""

    serves = False
    root = True
    loop = None

    def why_not(self):
        why = super().why_not()
        if why:
            return why
        if self.name not in read("/proc/filesystems").split():
            subprocess.run(["modprobe", self.name], stderr=subprocess.DEVNULL)
        if self.name not in read("/proc/filesystems").split():
            return "this kernel has no %s" % self.name
        try:
            run(["losetup", "-f"])
        except Trouble as t:
            return str(t)
        return None

    def mount(self, image, where, trace=None, timeout=60):
        self.where, self.image, self.traced = where, image, trace
        begun = time.monotonic()
        self.loop = run(["losetup", "-f", "--show", image]).strip()
        LIVE.add(self)
        self.before = self.loop_stat()
        try:
            run(["mount", "-t", self.name, self.loop, where], timeout=timeout)
        except Trouble:
            self.kill()
            raise
        self.mounted = True
        return time.monotonic() - begun

    def loop_stat(self):
        f = read("/sys/block/%s/stat" % os.path.basename(self.loop)).split()
        return {"sectors": int(f[6]), "flushes": int(f[15]) if len(f) > 15 else 0}

    def umount(self, timeout=120):
        begun = time.monotonic()
        super().umount(timeout)
        if self.loop:
            self.bytes = (self.loop_stat()["sectors"] - self.before["sectors"]) * 512
            run(["losetup", "-d", self.loop])
            self.loop = None
        LIVE.discard(self)
        return time.monotonic() - begun

    def kill(self):
        super().kill()
        if self.loop:
            subprocess.run(["losetup", "-d", self.loop], stderr=subprocess.DEVNULL)
            self.loop = None

    def written(self):
        return self.bytes

    def flushes(self):
        return self.loop_stat()["flushes"] - self.before["flushes"]


class Ext4(Kernel):
    name = "ext4"
    needs = ("mkfs.ext4", "losetup")

    def mkfs(self, image):
        return ["mkfs.ext4", "-Fq", image]


class Ext4Eager(Ext4):
    """Everything initialised by mkfs: nothing runs beside the workloads."""

    def mkfs(self, image):
        return ["mkfs.ext4", "-Fq", "-E", "lazy_itable_init=0,lazy_journal_init=0", image]


class Xfs(Kernel):
    name = "xfs"
    needs = ("mkfs.xfs", "losetup")

    def mkfs(self, image):
        return ["mkfs.xfs", "-fq", image]


KINDS = (Spaceweave, Null, NullBare, Fuse2fs, Ntfs3g, Ext4Eager, Xfs)

# ---- rows -----------------------------------------------------------------------------

# key: (title, field, unit, ((against, ratio that is the goal), ...)). For fields
# where less is better (seconds, microseconds) the goal is the most, else the least.
# The null server's figure is with the same requests to answer.
NULL = (("null", 0.9),)
ROWS = {
    "create": ("create empty", "ops_s", "/s", NULL),
    "create4k": ("create + 4 KiB + close", "ops_s", "/s", NULL),
    "create4k-t2": ("  2 threads", "ops_s", "/s", NULL),
    "create64k": ("create + 64 KiB + close", "ops_s", "/s", NULL),
    "stat-cold": ("stat, cold", "ops_s", "/s", NULL),
    "list-cold": ("readdir + stat, cold", "ops_s", "/s", NULL + (("ext4", 1.8),)),
    "read4k-cold": ("read 4 KiB files, cold", "ops_s", "/s", NULL + (("ext4", 1.0),)),
    "read4k-hot": ("read 4 KiB files, hot", "ops_s", "/s", NULL),
    "rename": ("rename", "ops_s", "/s", NULL),
    "mkdir": ("mkdir", "ops_s", "/s", NULL),
    "unlink": ("unlink", "ops_s", "/s", NULL),
    "mixed-t8": ("mixed, 8 clients", "ops_s", "/s", NULL),
    "fsync-t1": ("create + 4 KiB + fsync", "ops_s", "/s", (("ext4", 2.0),)),
    "fsync-t4": ("  4 threads", "ops_s", "/s", (("ext4", 3.0),)),
    "fsync-t8": ("  8 threads", "ops_s", "/s", ()),
    "overwrite": ("overwrite 4 KiB + fdatasync", "ops_s", "/s", (("ext4", 1.0),)),
    "append": ("append 4 KiB + fsync", "ops_s", "/s", (("ext4", 2.0),)),
    "fsync-stream-p50": ("fsync beside a stream, p50", "p50_us", "us", ()),
    "fsync-stream": ("fsync beside a stream, p99", "p99_us", "us", (("ext4", 0.2),)),
    "sqlite-full": ("SQLite, rollback, full", "ops_s", "/s", (("ext4", 1.5),)),
    "sqlite-wal": ("SQLite, WAL, normal", "ops_s", "/s", NULL),
    "seqwrite": ("sequential write + fsync", "mib_s", "MiB/s", (("ext4", 1.5),)),
    "seqread-cold": ("sequential read, cold", "mib_s", "MiB/s", (("ext4", 1.0),)),
    "seqread-hot": ("sequential read, hot", "mib_s", "MiB/s", (("ext4", 0.9),)),
    "randread-cold": ("random read 4 KiB, cold", "ops_s", "/s", (("ext4", 1.1),)),
    "randread-direct": ("random read, O_DIRECT x16", "ops_s", "/s", (("ext4", 0.8),)),
    "randwrite": ("random write 4 KiB, fsync", "ops_s", "/s", (("ext4", 0.7),)),
    "randwrite-direct": ("random write, O_DIRECT x16", "ops_s", "/s", (("ext4", 0.8),)),
    "mmap": ("mmap stores + msync", "ops_s", "/s", (("ext4", 0.7),)),
    "bigdir": ("one large directory", "ops_s", "/s", NULL),
    "bigdir-end": ("  end against start", "ratio", "", ((None, 0.9),)),
    "mount-many": ("mount with those files", "seconds", "s", ()),
    "memory-many": ("server's memory with them", "mib", "MiB", ()),
    "tree-cp": ("tree: cp -a", "seconds", "s", (("null", 1.15), ("fuse2fs", 0.4))),
    "tree-tar": ("tree: tar, cold", "seconds", "s", (("ext4", 1.0),)),
    "tree-du": ("tree: du, cold", "seconds", "s", ()),
    "tree-rm": ("tree: rm -rf, cold", "seconds", "s", (("null", 1.15), ("fuse2fs", 0.4))),
    "git-commit": ("git add + commit", "seconds", "s", (("null", 1.15), ("fuse2fs", 0.4))),
    "git-status": ("git status, cold", "seconds", "s", ()),
    "mkfs-1G": ("mkfs 1 GiB", "seconds", "s", ()),
    "mount-1G": ("mount 1 GiB", "seconds", "s", ()),
    "mkfs-1T": ("mkfs 1 TiB", "seconds", "s", ()),
    "mount-1T": ("mount 1 TiB", "seconds", "s", ()),
    "mkfs-1P": ("mkfs 1 PiB", "seconds", "s", ()),
    "mount-1P": ("mount 1 PiB", "seconds", "s", ()),
}
FLUSH_ROWS = {
    "fsync-t1": ("create + 4 KiB + fsync", 1.0),
    "fsync-t4": ("  4 threads", None),
    "fsync-t8": ("  8 threads", 0.3),
    "overwrite": ("overwrite 4 KiB + fdatasync", 1.0),
    "append": ("append 4 KiB + fsync", 1.0),
}
BYTE_ROWS = {
    "create4k": "create + 4 KiB",
    "fsync-t1": "create + 4 KiB + fsync",
    "overwrite": "overwrite 4 KiB + fdatasync",
    "seqwrite": "sequential write",
    "randwrite": "random write 4 KiB",
}
LESS = ("seconds", "p50_us", "p99_us", "mib")


class Bench:
    def __init__(self, args, scratch):
        self.args = args
        self.scratch = scratch
        self.samples = {}       # row -> fs -> [sample, ...]
        self.trouble = {}       # row -> fs -> reason
        self.flush = {}         # row -> fs -> {"server": flushes an fsync, "disk": ...}
        self.bytes = {}         # row -> fs -> bytes written per byte
        self.peak = {}          # group -> fs -> MiB
        self.idle = {}          # fs -> the server's wake-ups a second on an idle mount
        self.seed = args.seed
        self.load_path = args.build + "/tests/bench/load"

    def note(self, row, fs, sample):
        self.samples.setdefault(row, {}).setdefault(fs.name, []).append(sample)

    def complain(self, row, fs, why):
        if str(why) != self.trouble.get(row, {}).get(fs.name):
            say("%s: %s: %s" % (fs.name, row, why))
        self.trouble.setdefault(row, {})[fs.name] = str(why)

    def load(self, fs, row, workload, n=0, t=1, s=None, b=None, wrap=False, seed=None):
        """One workload by the load program; its sample, kept under `row` unless None."""
        argv = [self.load_path, "-s", str(self.args.seconds if s is None else s), "-n", str(n),
                "-t", str(t), "-S", str(self.seed if seed is None else seed)]
        if b:
            argv += ["-b", str(b)]
        argv += (["-w"] if wrap else []) + [workload, fs.where]
        before = fs.cpu()
        try:
            sample = json.loads(run(argv, timeout=self.args.timeout))
        except Trouble as why:
            self.complain(row or workload, fs, why)
            if fs.server and fs.server.poll() is not None:
                raise Trouble("the server of %s has died: %s" % (fs.name, fs.last_words()))
            if "over" in str(why):
                raise
            return None
        if before is not None and sample["ops"]:
            sample["cpu_us"] = (fs.cpu() - before) * 1e6 / sample["ops"]
        if row:
            self.note(row, fs, sample)
        return sample

    def timed(self, fs, row, argv, cwd=None, env=None):
        before = fs.cpu()
        begun = time.monotonic()
        try:
            run(argv, timeout=self.args.timeout, cwd=cwd, env=env, stdout=subprocess.DEVNULL)
        except Trouble as why:
            self.complain(row, fs, why)
            if "over" in str(why):
                raise
            return False
        sample = {"seconds": time.monotonic() - begun}
        if before is not None:
            sample["cpu_us"] = (fs.cpu() - before) * 1e6
        self.note(row, fs, sample)
        return True

    # ---- groups: each on a fresh image, mounted at fs.where --------------------------

    def group_small(self, fs):
        n = self.args.files
        self.load(fs, "create", "create")
        done = self.load(fs, "create4k", "create4k", n=n, s=self.args.timeout / 4)
        self.load(fs, "create4k-t2", "create4k-more", t=2)
        self.load(fs, "create64k", "create64k")
        if not done:
            return
        n = done["ops"]
        for row, workload in (("stat-cold", "stat"), ("list-cold", "list"),
                              ("read4k-cold", "read4k")):
            fs.remake()
            self.load(fs, row, workload, n=n)
        self.load(fs, None, "read4k", n=n, s=20)
        self.load(fs, "read4k-hot", "read4k", n=n, wrap=True)
        self.load(fs, "rename", "rename", n=n)
        self.load(fs, "mkdir", "mkdir")
        self.load(fs, "mixed-t8", "mixed", t=8)
        self.load(fs, "unlink", "unlink", n=n)

    def group_sync(self, fs):
        self.load(fs, "fsync-t1", "create4k-fsync")
        self.load(fs, "fsync-t4", "create4k-fsync", t=4)
        self.load(fs, "fsync-t8", "create4k-fsync", t=8)
        self.load(fs, "overwrite", "overwrite-fdatasync")
        self.load(fs, "append", "append-fsync")
        s = self.load(fs, "fsync-stream", "fsync-stream", s=max(2, self.args.seconds),
                      b=self.args.stream)
        if s:
            self.note("fsync-stream-p50", fs, s)

    def group_sqlite(self, fs):
        for row, mode, level in (("sqlite-full", "DELETE", "FULL"),
                                 ("sqlite-wal", "WAL", "NORMAL")):
            try:
                self.sqlite(fs, row, mode, level)
            except sqlite3.Error as why:
                self.complain(row, fs, why)

    def sqlite(self, fs, row, mode, level):
        db = sqlite3.connect("%s/%s.db" % (fs.where, row), isolation_level=None)
        db.execute("PRAGMA journal_mode=%s" % mode)
        db.execute("PRAGMA synchronous=%s" % level)
        db.execute("CREATE TABLE t(k INTEGER PRIMARY KEY, v BLOB)")
        value = b"v" * 100
        cpu = fs.cpu()
        begun = time.monotonic()
        until = begun + self.args.seconds
        ops = 0
        while time.monotonic() < until:
            db.execute("INSERT INTO t(v) VALUES(?)", (value,))
            ops += 1
        seconds = time.monotonic() - begun
        sample = {"ops": ops, "seconds": seconds, "ops_s": ops / seconds}
        if cpu is not None:
            sample["cpu_us"] = (fs.cpu() - cpu) * 1e6 / ops
        db.close()
        self.note(row, fs, sample)

    def group_stream(self, fs):
        size = self.args.stream
        if not self.load(fs, "seqwrite", "seqwrite", b=size, s=0):
            return
        fs.remake()
        self.load(fs, "seqread-cold", "seqread", s=0)
        self.load(fs, "seqread-hot", "seqread", wrap=True)
        fs.remake()
        self.load(fs, "randread-cold", "randread")
        self.load(fs, "randread-direct", "randread-direct")
        self.load(fs, "randwrite", "randwrite")
        self.load(fs, "randwrite-direct", "randwrite-direct")
        self.load(fs, "mmap", "mmap")

    def group_bigdir(self, fs):
        s = self.load(fs, "bigdir", "bigdir", n=self.args.bigdir,
                      s=min(self.args.timeout * 0.8, 240))
        if not s:
            return
        if "head_ops_s" in s:
            self.note("bigdir-end", fs, {"ratio": s["tail_ops_s"] / s["head_ops_s"]})
        if fs.server:
            self.note("memory-many", fs, {"mib": fs.peak_mib(), "files": s["ops"]})
        if not fs.volatile:
            self.note("mount-many", fs, {"seconds": fs.remake(), "files": s["ops"]})

    def group_tree(self, fs):
        tree = fs.where + "/tree"
        if self.timed(fs, "tree-cp", ["cp", "-a", self.scratch + "/tree", tree]):
            fs.remake()
            self.timed(fs, "tree-tar", ["sh", "-c", "tar -cf - tree | cat >/dev/null"], fs.where)
            fs.remake()
            self.timed(fs, "tree-du", ["du", "-s", tree])
            fs.remake()
            self.timed(fs, "tree-rm", ["rm", "-rf", tree])
        env = dict(os.environ, HOME=self.scratch, GIT_CONFIG_NOSYSTEM="1")
        git = ["git", "-C", fs.where + "/repo", "-c", "user.name=b", "-c", "user.email=b@b",
               "-c", "gc.auto=0"]
        try:
            run(["cp", "-a", self.scratch + "/gittree", fs.where + "/repo"])
            run(git + ["init", "-q"], env=env)
        except Trouble as why:
            self.complain("git-commit", fs, why)
            return
        if self.timed(fs, "git-commit",
                      ["sh", "-c", '"$@" add -A && "$@" commit -qm 1', "sh"] + git, env=env):
            fs.remake()
            self.timed(fs, "git-status", git + ["status", "--short"], env=env)

    GROUPS = ("small", "sync", "sqlite", "stream", "bigdir", "tree")

    def do_group(self, fs, group):
        """On a fresh image, whatever happens cleaned up behind it."""
        image = "%s/%s.img" % (self.scratch, fs.name)
        where = "%s/mnt-%s" % (self.scratch, fs.name)
        os.makedirs(where, exist_ok=True)
        try:
            fs.make(image, self.args.image)
            fs.mount(image, where)
            getattr(self, "group_" + group)(fs)
            if fs.server:
                old = self.peak.setdefault(group, {}).get(fs.name, 0)
                self.peak[group][fs.name] = max(old, fs.peak_mib() or 0)
            fs.umount()
        except (Trouble, OSError) as why:
            self.complain(group, fs, why)
        finally:
            fs.kill()
            remove(image)

    def do_size(self, fs, label, size, host):
        image = "%s/%s.img" % (host, fs.name)
        where = "%s/mnt-%s" % (self.scratch, fs.name)
        os.makedirs(where, exist_ok=True)
        try:
            self.note("mkfs-" + label, fs,
                      {"seconds": fs.make(image, size, timeout=self.args.mkfs_timeout)})
            self.note("mount-" + label, fs,
                      {"seconds": fs.mount(image, where, timeout=self.args.mkfs_timeout)})
            fs.umount()
        except (Trouble, OSError) as why:
            self.complain("mkfs-" + label, fs, why)
        finally:
            fs.kill()
            remove(image)

    def do_flushes(self, fs):
        """Flushes per fsync: those the server (or the kernel) asked for, and those
        that reached the device under the image's file system."""
        if not fs.serves:
            trace = "loop"
        elif shutil.which("strace"):
            trace = self.scratch + "/strace.log"
        else:
            self.complain("flushes", fs, "no strace here")
            return
        disk = OwnDisk(self.scratch, self.args.build, fs)
        image = "%s/%s.img" % (disk.path, fs.name)
        where = "%s/mnt-%s" % (self.scratch, fs.name)
        try:
            fs.make(image, self.args.image)
            fs.mount(image, where, trace=trace)
            for row, workload, t in (("fsync-t1", "create4k-fsync", 1),
                                     ("fsync-t4", "create4k-fsync", 4),
                                     ("fsync-t8", "create4k-fsync", 8),
                                     ("overwrite", "overwrite-fdatasync", 1),
                                     ("append", "append-fsync", 1)):
                flushes, reached = fs.flushes(), disk.flushes()
                s = self.load(fs, None, workload, n=400 // t, t=t, s=20)
                if s:
                    each = {"server": (fs.flushes() - flushes) / s["ops"]}
                    if reached is not None:
                        each["disk"] = (disk.flushes() - reached) / s["ops"]
                    self.flush.setdefault(row, {})[fs.name] = each
            fs.umount()
        except (Trouble, OSError) as why:
            self.complain("flushes", fs, why)
        finally:
            fs.kill()
            remove(image)
            disk.close()

    def do_bytes(self, fs):
        """Bytes written to the image, from mount to unmount, per byte of the program's."""
        disk = OwnDisk(self.scratch, self.args.build, fs)
        image = "%s/%s.img" % (disk.path, fs.name)
        where = "%s/mnt-%s" % (self.scratch, fs.name)
        n = self.args.files
        try:
            fs.make(image, self.args.image)
            for row, workload, kw in (("", "", None), ("create4k", "create4k", {"n": n}),
                                      ("fsync-t1", "create4k-fsync", {"n": n // 4}),
                                      ("overwrite", "overwrite-fdatasync", {"n": n // 4}),
                                      ("seqwrite", "seqwrite", {"b": self.args.stream // 4}),
                                      ("randwrite", "randwrite", {"n": n * 4})):
                before = disk.written()
                fs.mount(image, where)
                s = self.load(fs, None, workload, s=30, **kw) if row else self.watch_idle(fs)
                fs.umount()
                written = fs.written() if before is None else disk.written() - before
                if not row:
                    idle = written      # what a mount costs by itself
                elif s:
                    self.bytes.setdefault(row, {})[fs.name] = \
                        max(0, written - idle) / s["bytes"]
        except (Trouble, OSError) as why:
            self.complain("bytes", fs, why)
        finally:
            fs.kill()
            remove(image)
            disk.close()

    def watch_idle(self, fs):
        if fs.server:
            time.sleep(1)
            before = fs.wakeups()
            time.sleep(self.args.idle)
            self.idle[fs.name] = (fs.wakeups() - before) / self.args.idle

    # ---- results --------------------------------------------------------------------

    def value(self, row, name):
        got = self.samples.get(row, {}).get(name)
        if not got:
            return None
        return statistics.median(s[ROWS[row][1]] for s in got)

    def judge(self, row, name="spaceweave"):
        """[(ratio, against, goal, met), ...] of a row."""
        out = []
        _, field, _, goals = ROWS[row]
        mine = self.value(row, name)
        for against, goal in goals:
            other = 1.0 if against is None else self.value(row, against)
            if mine is None or not other:
                continue
            ratio = mine / other
            out.append((ratio, against, goal, ratio <= goal if field in LESS else ratio >= goal))
        return out


def full_title(row):
    """The title of a row outside the table: with the row that it varies."""
    titles = [t for t, *_ in ROWS.values()]
    i = list(ROWS).index(row)
    if not titles[i].startswith(" "):
        return titles[i]
    return next(t for t in reversed(titles[:i]) if t[0] != " ") + ", " + titles[i].strip()


def remove(path):
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def make_tree(top, files, seed):
    """Files of median 4 KiB and mean 14 KiB (log-normal) in directories of 5 to 60;
    text that compresses as source does, about."""
    rng = random.Random(seed)
    sigma = math.sqrt(2 * math.log(14 / 4))
    words = [bytes(rng.choice(b"abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 9)))
             for _ in range(4000)]
    text = b" ".join(rng.choice(words) for _ in range(400000))
    dirs = [top]
    os.makedirs(top)
    left = 0
    made = 0
    while made < files:
        if not left:
            parent = rng.choice(dirs[-50:] if rng.random() < 0.7 else dirs)
            if parent.count("/") > top.count("/") + 8:
                parent = top
            where = "%s/d%05d" % (parent, len(dirs))
            os.mkdir(where)
            dirs.append(where)
            left = rng.randint(5, 60)
        size = min(int(4096 * math.exp(rng.gauss(0, sigma))), 2 * MIB)
        at = rng.randrange(len(text) - 1)
        data = text[at:at + size]
        while len(data) < size:
            data += text[:size - len(data)]
        with open("%s/f%06d.c" % (where, made), "wb") as f:
            f.write(data)
        made += 1
        left -= 1


def number(v):
    if v is None:
        return "-"
    for limit, digits in ((0.1, 4), (1, 3), (10, 2), (100, 1)):
        if abs(v) < limit:
            return "%.*f" % (digits, v)
    return "%.0f" % v if v < 10000 else "%.1fk" % (v / 1000) if v < 1e6 else "%.2fM" % (v / 1e6)


def layout(head, lines):
    widths = [max(len(str(r[i])) for r in [head] + lines) for i in range(len(head))]
    out = []
    for r in [head] + lines:
        cells = [str(r[0]).ljust(widths[0])] + [str(c).rjust(w) for c, w in zip(r[1:], widths[1:])]
        out.append("  ".join(cells).rstrip())
    out.insert(1, "-" * len(out[0]))
    return "\n".join(out)


def table(b, names, skipped):
    out = []
    main = "spaceweave" in names
    head = ["workload", "unit"] + names + (["goal"] if main else [])
    lines = []
    for row, (title, _, unit, _) in ROWS.items():
        if not any(b.value(row, n) is not None for n in names) and row not in b.trouble:
            continue
        cells = [title, unit] + [
            "failed" if b.value(row, n) is None and n in b.trouble.get(row, {}) else
            number(b.value(row, n)) for n in names]
        if main:
            cells.append(", ".join(
                "%.2f of %s, goal %.2f: %s" % (r, a or "start", g, "met" if ok else "BELOW")
                if ROWS[row][1] not in LESS else
                "%.2f of %s, goal at most %.2f: %s" % (r, a, g, "met" if ok else "ABOVE")
                for r, a, g, ok in b.judge(row)))
        lines.append(cells)
    out.append(layout(head, lines))

    lines = []
    for row, (title, _, _, _) in ROWS.items():
        cpu = {n: [s["cpu_us"] for s in b.samples.get(row, {}).get(n, []) if "cpu_us" in s]
               for n in names}
        if any(cpu.values()) and ROWS[row][1] == "ops_s":
            lines.append([title] + [number(statistics.median(c)) if c else "-"
                                    for c in cpu.values()])
    if lines:
        out.append("The server's CPU, microseconds per operation:\n" +
                   layout(["workload"] + names, lines))
    lines = []
    for row, (title, field, _, _) in ROWS.items():
        cells = []
        for n in names:
            got = [s for s in b.samples.get(row, {}).get(n, []) if "p99_us" in s]
            cells.append(" / ".join(number(statistics.median(s[q] for s in got))
                                    for q in ("p50_us", "p99_us", "p999_us")) if got else "-")
        if field == "ops_s" and any(c != "-" for c in cells):
            lines.append([title] + cells)
    if lines:
        out.append("Latency, microseconds, p50 / p99 / p99.9:\n" + layout(["workload"] + names, lines))
    lines = [[title] + ["%.2f [%s]" % (f["server"], "%.2f" % f["disk"] if "disk" in f else "?")
                        if f else "-"
                        for f in (b.flush[row].get(n) for n in names)]
             for row, (title, _) in FLUSH_ROWS.items() if row in b.flush]
    if lines:
        out.append("Flushes of the image per fsync [of the device that holds it]:\n" +
                   layout(["workload"] + names, lines))
    lines = [[title] + [number(b.bytes[row].get(n)) for n in names]
             for row, title in BYTE_ROWS.items() if row in b.bytes]
    if lines:
        out.append("Bytes written to the image per byte written:\n" +
                   layout(["workload"] + names, lines))
    lines = [[g] + [number(p.get(n)) for n in names] for g, p in b.peak.items()]
    if lines:
        out.append("Peak memory of the server, MiB:\n" + layout(["group"] + names, lines))
    if b.idle:
        out.append("Wake-ups of the server a second, idle: " +
                   ", ".join("%s %.1f" % kv for kv in b.idle.items()))
    if LOAD > 0.5:
        out.append("The machine was not idle before the run: load %.1f." % LOAD)
    notes = ["left out: %s: %s" % kv for kv in skipped.items()]
    notes += ["failed: %s: %s: %s" % (n, row, why)
              for row, per in b.trouble.items() for n, why in per.items()]
    if notes:
        out.append("\n".join(notes))
    return "\n\n".join(out) + "\n"


def busy():
    """The load that others put on the machine, to be shown beside the figures."""
    return round(os.getloadavg()[0], 1)


def machine():
    cpu = [l.split(":")[1].strip() for l in read("/proc/cpuinfo").splitlines()
           if l.startswith("model name")]
    return {"kernel": platform.release().split("-")[0], "cpus": os.cpu_count(), "cpu": cpu[0] if cpu else "?",
            "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB,
            "date": time.strftime("%Y-%m-%d"), "root": os.geteuid() == 0,
            "load_before": LOAD}


def size_of(text):
    unit = {"K": 1 << 10, "M": MIB, "G": GIB, "T": 1 << 40}
    return int(float(text[:-1]) * unit[text[-1]]) if text[-1] in unit else int(text)


def arguments():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--build", default="build", help="where the programs were built")
    p.add_argument("--out", help="where the results go (default: BUILD/bench)")
    p.add_argument("--quick", action="store_true", help="everything smaller: five minutes")
    p.add_argument("--fs", help="only these, by comma: " + ",".join(k.name for k in KINDS))
    p.add_argument("--groups", help="only these: %s,mkfs,flushes,bytes" % ",".join(Bench.GROUPS))
    p.add_argument("--rounds", type=int)
    p.add_argument("--seconds", type=float, help="of each workload")
    p.add_argument("--files", type=int, help="small files in the set")
    p.add_argument("--bigdir", type=int, help="files in the large directory")
    p.add_argument("--tree", type=int, help="files in the tree")
    p.add_argument("--stream", type=size_of, help="size of the streams")
    p.add_argument("--image", type=size_of, default=16 * GIB, help="size of the images")
    p.add_argument("--timeout", type=float, help="seconds after which a workload is given up")
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    for name, quick, full in (("rounds", 2, 3), ("seconds", 0.4, 3.0), ("files", 2000, 20000),
                              ("bigdir", 10000, 1000000), ("tree", 1500, 30000),
                              ("stream", 128 * MIB, GIB), ("timeout", 60.0, 600.0)):
        if getattr(a, name) is None:
            setattr(a, name, quick if a.quick else full)
    a.mkfs_timeout = 5 if a.quick else 60
    a.idle = 2 if a.quick else 20
    a.build = os.path.abspath(a.build)
    a.out = a.out or a.build + "/bench"
    return a


class OwnDisk:
    """ext4 on a loop device of its own, to hold a server's image: what reaches this
    device is this server's alone, metadata of the host's file system included.
    Without root: the disk that all share."""

    def __init__(self, scratch, build, fs):
        self.host = None
        self.path = scratch
        if fs.serves and not Ext4(build).why_not():
            self.host = Ext4Eager(build)
            where = scratch + "/owndisk"
            os.makedirs(where, exist_ok=True)
            self.host.make(scratch + "/owndisk.img", 24 * GIB)
            self.host.mount(scratch + "/owndisk.img", where)
            self.path = where

    def flushes(self):
        return self.host.flushes() if self.host else disk_flushes(self.path)

    def written(self):
        """Bytes that the device has taken, or None."""
        if not self.host:
            return None
        run(["sync", "-f", self.path])
        return self.host.loop_stat()["sectors"] * 512

    def close(self):
        if self.host:
            self.host.kill()
            remove(self.host.image)


class BigHost:
    """Somewhere that can hold a sparse file of 1 PiB: xfs on loop, if the disk cannot."""

    def __init__(self, scratch, build):
        self.fs = None
        self.path = scratch
        probe = scratch + "/probe"
        try:
            with open(probe, "w") as f:
                f.truncate(1 << 50)
        except OSError:
            xfs = Xfs(build)
            if not xfs.why_not():
                where = scratch + "/bighost"
                os.mkdir(where)
                xfs.make(scratch + "/bighost.img", 8 * GIB)
                xfs.mount(scratch + "/bighost.img", where)
                self.fs, self.path = xfs, where
        remove(probe)

    def close(self):
        if self.fs:
            self.fs.umount()
            remove(self.fs.image)


def measure(b, args, kinds, scratch):
    wanted = args.groups.split(",") if args.groups else \
        list(Bench.GROUPS) + ["mkfs", "flushes", "bytes"]
    if "tree" in wanted:
        say("making a tree of %d files" % args.tree)
        make_tree(scratch + "/tree", args.tree, args.seed)
        make_tree(scratch + "/gittree", max(1, args.tree * 4 // 30), args.seed + 1)
    for turn in range(args.rounds):
        for group in Bench.GROUPS:
            if group not in wanted or (group == "bigdir" and turn >= 1):
                continue
            for i in range(len(kinds)):
                fs = kinds[(i + turn) % len(kinds)](args.build)
                begun = time.monotonic()
                b.do_group(fs, group)
                say("round %d: %s: %s: %.1f s" % (turn + 1, group, fs.name,
                                                  time.monotonic() - begun))
    for kind in kinds:
        os.makedirs("%s/mnt-%s" % (scratch, kind.name), exist_ok=True)
        if "flushes" in wanted:
            b.do_flushes(kind(args.build))
        if "bytes" in wanted and not kind.volatile:
            b.do_bytes(kind(args.build))
    if "mkfs" in wanted:
        host = BigHost(scratch, args.build)
        say("mkfs and mount by size, sparse images on %s" % (host.fs.name if host.fs else "the disk"))
        for label, size in (("1G", GIB), ("1T", 1 << 40), ("1P", 1 << 50)):
            for kind in kinds:
                if kind.volatile or (kind is Fuse2fs and Ext4Eager in kinds):
                    continue
                kind = Ext4 if kind is Ext4Eager else kind
                b.do_size(kind(args.build), label, size, host.path)
        host.close()


LIVE = set()
LOAD = busy()
BEGUN = time.monotonic()


def clean_up(scratch, owner):
    if os.getpid() != owner:
        return
    for fs in sorted(LIVE, key=lambda f: f.name == "xfs"):
        fs.kill()
    shutil.rmtree(scratch, ignore_errors=True)


def main():
    args = arguments()
    kinds, skipped = [], {}
    only = args.fs.split(",") if args.fs else None
    for kind in KINDS:
        if only is None and args.quick and kind is NullBare:
            continue
        if only is None or kind.name in only:
            why = kind(args.build).why_not()
            if why:
                skipped[kind.name] = why
                say("left out: %s: %s" % (kind.name, why))
            else:
                kinds.append(kind)
    if not kinds:
        sys.exit("bench: no file system can be set up here")
    scratch = tempfile.mkdtemp(prefix="spaceweave-bench-")
    atexit.register(clean_up, scratch, os.getpid())
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, lambda *_: sys.exit(130))

    b = Bench(args, scratch)
    measure(b, args, kinds, scratch)

    names = [k.name for k in kinds]
    os.makedirs(args.out, exist_ok=True)
    text = table(b, names, skipped)
    with open(args.out + "/table.txt", "w") as f:
        f.write(text)
    result = {
        "machine": machine(), "file_systems": names, "left_out": skipped,
        "settings": {k: v for k, v in vars(args).items() if k not in ("build", "out")},
        "rows": {row: {"title": full_title(row), "field": ROWS[row][1],
                       "unit": ROWS[row][2],
                       "median": {n: b.value(row, n) for n in names
                                  if b.value(row, n) is not None},
                       "goals": [{"ratio": r, "against": a, "goal": g, "met": ok}
                                 for r, a, g, ok in b.judge(row)],
                       "samples": b.samples[row]}
                 for row in ROWS if row in b.samples},
        "flushes_per_fsync": b.flush, "bytes_per_byte": b.bytes, "peak_mib": b.peak,
        "idle_wakeups_s": b.idle,
        "trouble": b.trouble,
    }
    with open(args.out + "/results.json", "w") as f:
        json.dump(result, f, indent=1)
    with open(args.out + "/chart.svg", "w") as f:
        f.write(chart.draw(result))
    print(text)
    say("table.txt, results.json and chart.svg are in %s" % args.out)


if __name__ == "__main__":
    main()
