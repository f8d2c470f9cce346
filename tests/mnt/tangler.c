/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * tangler: several processes do all that can be done to names, on the same few
 * names, and keep files open that others remove.
 *
 *   tangler work DIR LOG SEED SECONDS PROCESSES
 *   tangler verify DIR LOG
 *
 * work: in DIR/tree, going on with what is there. Who finds what cannot be
 * foreseen, but not everything may happen: an error that says damage, or that
 * there is no such call, is noted in LOG/tangle.wrong. Each process has a file
 * in DIR whose name counts (at.PROCESS.COUNT), renamed every few operations. When
 * an fsync has returned, what all of them had reached before it began is noted
 * in LOG: none may be further back afterwards, whoever it belongs to.
 *
 * verify: of each process one such file is there, not further back than was
 * promised. The tree can be read to its last byte: each is 0 or what belongs to
 * that offset of any file; attributes and targets are what belongs to their
 * names and lengths; links and subfolders are counted right.
 */
#include "tests/mnt/pattern.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#define BYTES_MAX 300000
#define PROCESSES_MAX 16
#define HELD 6			/* files that a process has open */
#define DATA_KEY 1
#define XATTRS 12

static int dirfd_top, treefd;
static volatile uint32_t *reached;	/* of each process, shared */
static uint64_t state;
static unsigned me;
static const char *logdir;

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static uint32_t rnd(uint64_t below)
{
	state = pattern_mix(state);
	return (uint32_t)(state % below);
}

/* One of the few paths that all share. */
static const char *path(char *buf)
{
	unsigned n = 1 + rnd(3), len = 0;

	while (n--) {
		buf[len++] = (char)('a' + rnd(8));
		buf[len++] = n ? '/' : 0;
	}
	return buf;
}

static size_t xattr_bytes(unsigned nr)
{
	static const size_t bytes[] = {0, 9, 60, 300, 3000, 20000};

	return bytes[nr % 6];
}

/* ---- work ---------------------------------------------------------------------- */

static bool is_gone(void)
{
	char name[32];

	for (int i = 0; i < 20; i++) {
		snprintf(name, sizeof(name), "no.%x", rnd(1u << 31));
		if (faccessat(dirfd_top, name, F_OK, 0) && errno != ENOENT)
			return true;
		nanosleep(&(struct timespec){0, 50000000}, NULL);
	}
	return false;
}

static void wrong(const char *what, int err)
{
	char line[200], name[4096];
	int n = snprintf(line, sizeof(line), "WRONG: tangler %u: %s: %s\n", me, what, strerror(err));
	int fd;

	snprintf(name, sizeof(name), "%s/tangle.wrong", logdir);
	fd = open(name, O_WRONLY | O_CREAT | O_APPEND, 0644);
	if (fd < 0 || write(fd, line, (size_t)n) != n)
		exit(2);
	close(fd);
}

/* May a call fail so? False if the work ends. */
static bool may(const char *what, long ret)
{
	int err = errno;

	if (ret >= 0)
		return true;
	switch (err) {
	case ENOTCONN:
	case ECONNABORTED:
	case EIO:
	case EUCLEAN:
	case EBADMSG:
	case EROFS:
	case ENOSYS:
	case EPROTO:
	case ENOMEM:
	case EFAULT:
	case EBADF:
	case ESTALE:
		if (!is_gone())
			wrong(what, err);
		return false;
	default:
		return true;
	}
}

static bool change_file(int fd)
{
	static uint8_t buf[BYTES_MAX];
	uint32_t at = rnd(rnd(2) ? 5000 : BYTES_MAX), n = 1 + rnd(BYTES_MAX / 4);

	if (n > BYTES_MAX - at)
		n = BYTES_MAX - at;
	switch (rnd(8)) {
	case 0:
		return may("truncate", ftruncate(fd, at));
	case 1:
		return may("punch", fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, n));
	case 2:
		return may("zero", fallocate(fd, FALLOC_FL_ZERO_RANGE | (rnd(2) ? FALLOC_FL_KEEP_SIZE : 0), at, n));
	case 3:
		return may("fallocate", fallocate(fd, rnd(2) ? FALLOC_FL_KEEP_SIZE : 0, at, n));
	case 4:
		return may("fsync", rnd(2) ? fsync(fd) : fdatasync(fd));
	default:
		pattern_fill(DATA_KEY, at, buf, n);
		return may("write", pwrite(fd, buf, n, at));
	}
}

static bool clone(const char *from, const char *to)
{
	int in = openat(treefd, from, O_RDONLY | O_NONBLOCK);
	int out = openat(treefd, to, O_WRONLY | O_NONBLOCK | (rnd(2) ? O_CREAT | O_TRUNC : 0), 0644);
	bool on = in >= 0 || may("open", in);
	off_t at = rnd(2) ? 0 : rnd(40) * 4096, same = at;

	on = on && (out >= 0 || may("open", out));
	if (in >= 0 && out >= 0 && on)
		on = may("clone", copy_file_range(in, &at, out, &same, BYTES_MAX, 0));
	if (in >= 0)
		close(in);
	if (out >= 0)
		close(out);
	return on;
}

static bool xattr(int fd)
{
	static uint8_t value[20000];
	unsigned nr = rnd(XATTRS);
	char name[32];

	snprintf(name, sizeof(name), "user.%u", nr);
	if (!rnd(3))
		return may("removexattr", fremovexattr(fd, name));
	pattern_fill(nr, 0, value, xattr_bytes(nr));
	return may("setxattr", fsetxattr(fd, name, value, xattr_bytes(nr), 0));
}

/* A folder and all below it; others may be at work there. */
static bool remove_all(int at, const char *name)
{
	int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
	struct dirent *e;
	bool on = true;
	DIR *d;

	if (fd < 0)
		return may("open", fd) && may("unlink", unlinkat(at, name, 0));
	d = fdopendir(fd);
	if (!d) {
		close(fd);
		return true;
	}
	while (on && (errno = 0, e = readdir(d))) {
		if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
			continue;
		on = e->d_type == DT_DIR ? remove_all(fd, e->d_name) :
		     may("unlink", unlinkat(fd, e->d_name, 0));
	}
	if (on && errno)
		on = may("readdir", -1);
	closedir(d);
	return on && may("rmdir", unlinkat(at, name, AT_REMOVEDIR));
}

/* Durable is what all had reached when this began. */
static bool promise(FILE *log, int fd, unsigned processes)
{
	uint32_t was[PROCESSES_MAX];

	for (unsigned i = 0; i < processes; i++)
		was[i] = reached[i];
	if (fsync(fd))
		return may("fsync", -1);
	for (unsigned i = 0; i < processes; i++)
		fprintf(log, "%u%c", was[i], i + 1 < processes ? ' ' : '\n');
	fflush(log);
	return true;
}

static bool advance(void)
{
	char from[32], to[32];
	uint32_t n = reached[me];

	snprintf(from, sizeof(from), "at.%u.%u", me, n);
	snprintf(to, sizeof(to), "at.%u.%u", me, n + 1);
	if (renameat(dirfd_top, from, dirfd_top, to)) {
		if (errno == ENOSPC)
			return true;
		if (!is_gone())
			wrong(from, errno);
		return false;
	}
	reached[me] = n + 1;
	return true;
}

static bool step(FILE *log, unsigned processes)
{
	static int held[HELD] = {-1, -1, -1, -1, -1, -1};
	static char target[4096];
	char a[16], b[16], name[64];
	int *fd = &held[rnd(HELD)], dir;
	unsigned n;
	bool on;

	path(a);
	path(b);
	switch (rnd(24)) {
	case 0:
	case 1:
		if (*fd >= 0)
			close(*fd);
		*fd = openat(treefd, a, O_RDWR | O_CREAT | O_NONBLOCK | (rnd(3) ? 0 : O_TRUNC), 0644);
		return may("create", *fd);
	case 2:
	case 3:
		return may("mkdir", mkdirat(treefd, a, 0755));
	case 4:
	case 5:
		return may("rename", renameat(treefd, a, treefd, b));
	case 6:
		n = rnd(3) ? RENAME_EXCHANGE : RENAME_NOREPLACE;
		return may("renameat2", renameat2(treefd, a, treefd, b, n));
	case 7:
	case 8:
		return may("link", linkat(treefd, a, treefd, b, 0));
	case 9:
		n = 1 + rnd(rnd(4) ? 60 : 4090);
		memset(target, 'x', n);
		target[n] = 0;
		return may("symlink", symlinkat(rnd(2) ? b : target, treefd, a));
	case 10:
		switch (rnd(4)) {
		case 0:
			return may("mkfifo", mknodat(treefd, a, S_IFIFO | 0600, 0));
		case 1:
			return may("mknod", mknodat(treefd, a, S_IFSOCK | 0600, 0));
		case 2:
			return may("mknod", mknodat(treefd, a, S_IFCHR | 0600, makedev(0, 0)));
		default:
			return may("mknod", mknodat(treefd, a, S_IFCHR | 0600, makedev(1, 3)));
		}
	case 11:
	case 12:
		return may("unlink", unlinkat(treefd, a, 0));
	case 13:
		return may("rmdir", unlinkat(treefd, a, AT_REMOVEDIR));
	case 14:
	case 15:
		dir = openat(treefd, a, O_RDONLY | O_NONBLOCK);
		if (dir < 0)
			return may("open", dir);
		on = xattr(dir);
		close(dir);
		return on;
	case 16:
		return may("chown", fchownat(treefd, a, rnd(4), rnd(4), AT_SYMLINK_NOFOLLOW)) &&
		       may("chmod", fchmodat(treefd, b, 0400 | rnd(01000), 0)) &&
		       may("utimens", utimensat(treefd, a, NULL, AT_SYMLINK_NOFOLLOW));
	case 17:
		return clone(a, b);
	case 18:
		/* without a name, and perhaps with one later */
		if (*fd >= 0)
			close(*fd);
		dir = openat(treefd, a, O_RDONLY | O_DIRECTORY);
		*fd = openat(dir >= 0 ? dir : treefd, ".", O_TMPFILE | O_RDWR, 0600);
		if (dir >= 0)
			close(dir);
		if (*fd < 0 || !change_file(*fd))
			return may("tmpfile", *fd);
		snprintf(name, sizeof(name), "/proc/self/fd/%d", *fd);
		return rnd(2) || may("linkat", linkat(AT_FDCWD, name, treefd, b, AT_SYMLINK_FOLLOW));
	case 19:
		if (!rnd(100))
			return remove_all(treefd, a);
		if (rnd(10))
			return may("truncate", 0);
		if (!rnd(50))
			sync();
		return may("syncfs", syncfs(treefd));
	case 20:
		/* of any file or folder, or of the one with the counting names */
		if (rnd(2))
			return promise(log, dirfd_top, processes);
		dir = openat(treefd, a, O_RDONLY | O_NONBLOCK);
		if (dir < 0)
			return may("open", dir);
		on = may("fsync", fsync(dir));
		close(dir);
		return on;
	case 21:
		return advance();
	default:
		return *fd < 0 || change_file(*fd);
	}
}

static void process(double until, unsigned processes)
{
	char name[4096];
	FILE *log;

	snprintf(name, sizeof(name), "%s/tangle.%u", logdir, me);
	log = fopen(name, "w");
	if (!log)
		exit(2);
	while (now() < until && step(log, processes))
		;
	fclose(log);
}

static int work(char **argv)
{
	unsigned processes = (unsigned)atoi(argv[4]);
	double until = now() + atof(argv[3]);
	struct dirent *e;
	char name[64];
	DIR *d;

	logdir = argv[1];
	d = opendir(argv[0]);
	if (!d || processes > PROCESSES_MAX)
		return 0;
	dirfd_top = dirfd(d);
	while ((e = readdir(d)))
		if (!strncmp(e->d_name, "at.", 3) && unlinkat(dirfd_top, e->d_name, 0))
			return 0;
	mkdirat(dirfd_top, "tree", 0755);
	treefd = openat(dirfd_top, "tree", O_RDONLY | O_DIRECTORY);
	for (unsigned i = 0; i < processes; i++) {
		snprintf(name, sizeof(name), "at.%u.0", i);
		if (mknodat(dirfd_top, name, S_IFREG | 0600, 0))
			return 0;
	}
	if (treefd < 0 || fsync(dirfd_top))
		return 0;
	reached = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (me = 0; me < processes; me++) {
		if (fork())
			continue;
		state = pattern_mix((uint64_t)atoll(argv[2]) + me);
		process(until, processes);
		_exit(0);
	}
	while (wait(NULL) > 0)
		;
	for (unsigned i = 0; i < processes; i++)
		printf("tangler: process %u reached %u\n", i, reached[i]);
	return 0;
}

/* ---- verify -------------------------------------------------------------------- */

static unsigned long bad, names, promises;

#define WRONG(...) (bad++ < 20 ? (void)printf("WRONG: " __VA_ARGS__) : (void)0)

struct seen {
	uint64_t ino;
	uint32_t nlink;
};

static struct seen *seen;
static size_t seen_n, seen_room;

static int seen_cmp(const void *a, const void *b)
{
	const struct seen *x = a, *y = b;

	return x->ino < y->ino ? -1 : x->ino > y->ino;
}

static void verify_bytes(int fd, const char *name, off_t size)
{
	static uint8_t buf[BYTES_MAX + 1];
	ssize_t n = pread(fd, buf, sizeof(buf), 0);

	if (n != size) {
		WRONG("tree: %s: read %zd of %lld: %s\n", name, n, (long long)size,
		      n < 0 ? strerror(errno) : "short");
		return;
	}
	for (ssize_t i = 0; i < n; i++) {
		if (!buf[i] || buf[i] == pattern_byte(DATA_KEY, (uint64_t)i))
			continue;
		WRONG("tree: %s: byte %zd of %zd: 0x%02x was never written there\n",
		      name, i, n, buf[i]);
		return;
	}
}

static void verify_xattrs(int fd, const char *name)
{
	static char list[4096];
	static uint8_t value[20001];
	ssize_t n = flistxattr(fd, list, sizeof(list)), got;

	if (n < 0)
		WRONG("tree: %s: listxattr: %s\n", name, strerror(errno));
	for (char *x = list; n > 0 && x < list + n; x += strlen(x) + 1) {
		unsigned nr = (unsigned)atoi(x + 5);

		got = fgetxattr(fd, x, value, sizeof(value));
		if (strncmp(x, "user.", 5) || nr >= XATTRS || got != (ssize_t)xattr_bytes(nr)) {
			WRONG("tree: %s: attribute %s: %zd bytes\n", name, x, got);
			continue;
		}
		for (ssize_t i = 0; i < got; i++) {
			if (value[i] != pattern_byte(nr, (uint64_t)i)) {
				WRONG("tree: %s: attribute %s: its bytes\n", name, x);
				break;
			}
		}
	}
}

static void verify_dir(int fd, const char *what, nlink_t links);

static void verify_name(int dir, const char *name, unsigned char type)
{
	char target[4200];
	struct stat st;
	int fd = -1;

	names++;
	if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW)) {
		WRONG("tree: %s: %s\n", name, strerror(errno));
		return;
	}
	if (type != DT_UNKNOWN && type != IFTODT(st.st_mode))
		WRONG("tree: %s: of type %o, the folder says %u\n", name, st.st_mode, type);
	if (S_ISREG(st.st_mode) || S_ISDIR(st.st_mode)) {
		fd = openat(dir, name, O_RDONLY | O_NOFOLLOW);
		if (fd < 0) {
			WRONG("tree: %s: open: %s\n", name, strerror(errno));
			return;
		}
		verify_xattrs(fd, name);
	} else if (S_ISLNK(st.st_mode) &&
		   readlinkat(dir, name, target, sizeof(target)) != st.st_size) {
		WRONG("tree: %s: its target is not %lld bytes\n", name, (long long)st.st_size);
	}
	if (S_ISREG(st.st_mode))
		verify_bytes(fd, name, st.st_size);
	if (S_ISDIR(st.st_mode)) {
		verify_dir(fd, name, st.st_nlink);
		return;
	}
	if (fd >= 0)
		close(fd);
	if (seen_n == seen_room)
		seen = realloc(seen, (seen_room = seen_room * 2 + 1000) * sizeof(*seen));
	seen[seen_n++] = (struct seen){st.st_ino, (uint32_t)st.st_nlink};
}

static void verify_dir(int fd, const char *what, nlink_t links)
{
	struct dirent *e;
	nlink_t found = 2;
	DIR *d = fdopendir(fd);

	if (!d) {
		WRONG("tree: %s: %s\n", what, strerror(errno));
		close(fd);
		return;
	}
	while ((errno = 0, e = readdir(d))) {
		if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
			continue;
		found += e->d_type == DT_DIR;
		verify_name(fd, e->d_name, e->d_type);
	}
	if (errno)
		WRONG("tree: %s: readdir: %s\n", what, strerror(errno));
	if (found != links)
		WRONG("tree: %s: %lu links, not %lu\n", what, (unsigned long)links,
		      (unsigned long)found);
	closedir(d);
}

static void verify_counts(void)
{
	qsort(seen, seen_n, sizeof(*seen), seen_cmp);
	for (size_t i = 0, k; i < seen_n; i = k) {
		for (k = i; k < seen_n && seen[k].ino == seen[i].ino; k++)
			;
		if (seen[i].nlink != k - i)
			WRONG("tree: inode %llu has %zu names, not %u\n",
			      (unsigned long long)seen[i].ino, k - i, seen[i].nlink);
	}
}

static void verify_promises(DIR *d, const char *log)
{
	uint32_t want[PROCESSES_MAX] = {0}, is[PROCESSES_MAX] = {0};
	unsigned found[PROCESSES_MAX] = {0}, p, n, processes = 0;
	struct dirent *e;
	char name[4096];
	FILE *f;

	for (;; processes++) {
		snprintf(name, sizeof(name), "%s/tangle.%u", log, processes);
		f = fopen(name, "r");
		if (!f)
			break;
		for (n = 0; fscanf(f, "%u", &p) == 1; n++) {
			/* all of them on each line; how many, the first one shows */
			unsigned who = n % PROCESSES_MAX;
			int c = fgetc(f);

			if (p > want[who])
				want[who] = p;
			if (c == '\n') {
				promises++;
				n = ~0u;
			}
		}
		fclose(f);
	}
	if (!processes)
		return;
	while ((e = readdir(d))) {
		if (sscanf(e->d_name, "at.%u.%u", &p, &n) != 2 || p >= PROCESSES_MAX)
			continue;
		found[p]++;
		is[p] = n;
	}
	for (p = 0; p < processes; p++) {
		if (found[p] != 1)
			WRONG("at.%u: %u names\n", p, found[p]);
		else if (is[p] < want[p])
			WRONG("at.%u: %u, promised was %u\n", p, is[p], want[p]);
	}
}

static int verify(char **argv)
{
	char name[4096], line[512];
	DIR *d = opendir(argv[0]);
	struct stat st;
	FILE *f;
	int fd;

	if (!d) {
		WRONG("%s: %s\n", argv[0], strerror(errno));
	} else {
		verify_promises(d, argv[1]);
		fd = openat(dirfd(d), "tree", O_RDONLY | O_DIRECTORY);
		if (fd >= 0 && !fstat(fd, &st))
			verify_dir(fd, "tree", st.st_nlink);
		else if (errno != ENOENT || promises)
			WRONG("tree: %s\n", strerror(errno));
		verify_counts();
		closedir(d);
	}
	snprintf(name, sizeof(name), "%s/tangle.wrong", argv[1]);
	f = fopen(name, "r");
	while (f && fgets(line, sizeof(line), f)) {
		bad++;
		fputs(line, stdout);
	}
	printf("tangler: %lu names, %lu promises, %lu wrong\n", names, promises, bad);
	return bad ? 1 : 0;
}

int main(int argc, char **argv)
{
	signal(SIGPIPE, SIG_IGN);
	if (argc == 7 && !strcmp(argv[1], "work"))
		return work(argv + 2);
	if (argc == 4 && !strcmp(argv[1], "verify"))
		return verify(argv + 2);
	fprintf(stderr, "usage: tangler work DIR LOG SEED SECONDS PROCESSES\n"
			"       tangler verify DIR LOG\n");
	return 2;
}
