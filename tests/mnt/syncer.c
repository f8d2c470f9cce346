/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * syncer: does what an application does that cares for its data, and knows
 * afterwards what it was promised.
 *
 *   syncer work DIR LOG SEED SECONDS THREADS
 *   syncer verify DIR LOG
 *
 * work: each thread has a folder of its own in DIR and a log in LOG, which is
 * on another file system. Before an operation it notes what it will do
 * ("begin"), after the last call that makes it durable has returned, that it
 * is done ("done"). The threads end when the file system goes away under them,
 * or after SECONDS.
 *
 * verify: every file is what the last "done" made it; where a "begin" without
 * "done" follows, the file may be on its way, but has no byte that neither the
 * old nor the new content has at that place, except zeroes past the old end.
 * A file for which there was no space is removed; until that is durable it may
 * be anything.
 *
 * One thread more makes folders and never waits for the disk: of those, the
 * ones of the last ten seconds (the commit interval twice) may be missing, and
 * only from the end.
 */
#include "tests/mnt/pattern.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define FILES 64			/* names of a thread */
#define SIZE_MAX_BYTES (768 << 10)
#define FORGIVEN_MS 10000

enum op { CREATE = 'c', REPLACE = 'r', APPEND = 'a', OVERWRITE = 'o', UNLINK = 'u',
	  TRUNCATE = 't', LINK = 'l' };

/* What a file is: `bytes` bytes of key (thread, file, version). */
struct state {
	bool exists;
	unsigned version;
	unsigned bytes;
};

struct thread {
	pthread_t id;
	unsigned nr;
	const char *dir, *log;
	uint64_t rnd;
	double until;
	struct state files[FILES];
	int dirfd, logfd;
	unsigned long done;
};

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static uint64_t rnd(struct thread *t, uint64_t below)
{
	t->rnd = pattern_mix(t->rnd);
	return t->rnd % below;
}

static uint64_t key(unsigned thread, unsigned file, unsigned version)
{
	return pattern_mix((uint64_t)thread << 48 ^ (uint64_t)file << 32 ^ version);
}

static __thread int gone_errno;

/* The file system under test is gone: no more to do for this thread. */
static bool gone(const char *what)
{
	gone_errno = errno;
	if (errno != ENOSPC && errno != ENOTCONN && errno != ECONNABORTED && errno != EIO &&
	    errno != ENOENT && errno != EBADF)
		fprintf(stderr, "syncer: %s: %s\n", what, strerror(errno));
	return false;
}

static void note(struct thread *t, const char *word, enum op op, unsigned file,
		 const struct state *s)
{
	char line[96];
	int n = snprintf(line, sizeof(line), "%s %c %u %u %u %u\n", word, op, file,
			 s->exists, s->version, s->bytes);

	if (write(t->logfd, line, (size_t)n) != n) {
		perror("syncer: log");
		exit(2);
	}
}

static bool put(struct thread *t, int fd, uint64_t k, unsigned at, unsigned n)
{
	static __thread uint8_t buf[64 << 10];

	while (n) {
		unsigned want = 1 + (unsigned)rnd(t, sizeof(buf));

		if (want > n)
			want = n;
		pattern_fill(k, at, buf, want);
		if (pwrite(fd, buf, want, at) != (ssize_t)want)
			return gone("write");
		at += want;
		n -= want;
	}
	return true;
}

static unsigned size(struct thread *t)
{
	static const unsigned most[] = {100, 4000, 5000, 70000, SIZE_MAX_BYTES};

	return (unsigned)rnd(t, most[rnd(t, 5)]);
}

/* Open `name`, make it the bytes from `at` on of `s`, fsync. */
static bool write_synced(struct thread *t, const char *name, int flags,
			 unsigned file, const struct state *s, unsigned at)
{
	int fd = openat(t->dirfd, name, O_WRONLY | flags, 0644);
	bool ok;

	if (fd < 0)
		return gone(name);
	ok = put(t, fd, key(t->nr, file, s->version), at, s->bytes - at);
	if (ok && fsync(fd))
		ok = gone("fsync");
	if (close(fd) && ok)
		ok = gone("close");
	return ok;
}

static bool sync_name(struct thread *t, const char *name)
{
	int fd;
	bool ok;

	/* The promise holds for both: the folder, and the file with its names. */
	if (rnd(t, 2))
		return fsync(t->dirfd) ? gone("fsync of the folder") : true;
	fd = openat(t->dirfd, name, O_RDONLY);
	if (fd < 0)
		return gone(name);
	ok = fsync(fd) ? gone("fsync") : true;
	close(fd);
	return ok;
}

static void nap(unsigned ms)
{
	nanosleep(&(struct timespec){0, ms * 1000000L}, NULL);
}

/* What did not fit goes: a full volume must allow it. */
static bool no_space(struct thread *t, unsigned file, const char *name, const char *temp)
{
	struct state *s = &t->files[file];
	int tries = 0;

	s->exists = false;
	s->bytes = 0;
	note(t, "begin", UNLINK, file, s);
	unlinkat(t->dirfd, temp, 0);
	if (unlinkat(t->dirfd, name, 0) && errno != ENOENT)
		return gone("unlink");
	while (fsync(t->dirfd)) {
		if (errno != ENOSPC || ++tries == 100)
			return gone("fsync of the folder");
		nap(50);
	}
	note(t, "done", UNLINK, file, s);
	nap(50);
	return true;
}

static bool step(struct thread *t)
{
	unsigned file = (unsigned)rnd(t, FILES), n = (unsigned)rnd(t, 10);
	struct state *old = &t->files[file], s = *old;
	char name[16], temp[16];
	enum op op;
	bool ok = true;
	int fd;

	snprintf(name, sizeof(name), "f%u", file);
	snprintf(temp, sizeof(temp), "f%u.new", file);
	op = !old->exists ? (n < 7 ? CREATE : LINK) : n < 3 ? REPLACE :
	     n < 5 ? APPEND : n < 7 ? OVERWRITE : n < 8 ? TRUNCATE : UNLINK;
	s.exists = op != UNLINK;
	s.version = old->version + (op != APPEND && op != TRUNCATE && op != UNLINK);
	s.bytes = op == UNLINK ? 0 : op == APPEND ? old->bytes + size(t) :
		  op == TRUNCATE ? (unsigned)rnd(t, old->bytes + 1) :
		  op == OVERWRITE ? old->bytes : size(t);
	if (s.bytes > 2 * SIZE_MAX_BYTES)
		return true;
	note(t, "begin", op, file, &s);
	switch (op) {
	case CREATE:
		ok = write_synced(t, name, O_CREAT | O_EXCL, file, &s, 0);
		break;
	case REPLACE:
		/* What LINK left is the file's other name: not to be cut to 0. */
		unlinkat(t->dirfd, temp, 0);
		ok = write_synced(t, temp, O_CREAT | O_TRUNC, file, &s, 0);
		if (ok && renameat(t->dirfd, temp, t->dirfd, name))
			ok = gone("rename");
		ok = ok && sync_name(t, name);
		break;
	case LINK:
		unlinkat(t->dirfd, temp, 0);
		ok = write_synced(t, temp, O_CREAT | O_TRUNC, file, &s, 0);
		if (ok && linkat(t->dirfd, temp, t->dirfd, name, 0))
			ok = gone("link");
		ok = ok && sync_name(t, name);
		break;
	case APPEND:
		ok = write_synced(t, name, 0, file, &s, old->bytes);
		break;
	case OVERWRITE:
		ok = write_synced(t, name, 0, file, &s, 0);
		break;
	case TRUNCATE:
		fd = openat(t->dirfd, name, O_WRONLY);
		if (fd < 0)
			return gone(name);
		if (ftruncate(fd, s.bytes))
			ok = gone("truncate");
		if (ok && (rnd(t, 2) ? fdatasync(fd) : fsync(fd)))
			ok = gone("fsync");
		close(fd);
		break;
	case UNLINK:
		if (unlinkat(t->dirfd, name, 0) || fsync(t->dirfd))
			ok = gone("unlink");
		break;
	}
	if (!ok && gone_errno == ENOSPC) {
		old->version = s.version;
		return no_space(t, file, name, temp);
	}
	if (!ok)
		return false;
	note(t, "done", op, file, &s);
	*old = s;
	t->done++;
	return true;
}

static bool thread_open(struct thread *t)
{
	char path[4096];

	snprintf(path, sizeof(path), "%s/%u", t->log, t->nr);
	t->logfd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0644);
	if (t->logfd < 0) {
		perror(path);
		exit(2);
	}
	snprintf(path, sizeof(path), "%s/%u", t->dir, t->nr);
	if (mkdir(path, 0755))
		return gone(path);
	t->dirfd = open(path, O_RDONLY | O_DIRECTORY);
	return t->dirfd < 0 ? gone(path) : true;
}

static void *files_thread(void *arg)
{
	struct thread *t = arg;

	if (thread_open(t) && !fsync(t->dirfd))
		while (now() < t->until && step(t))
			;
	return NULL;
}

static void *folders_thread(void *arg)
{
	struct thread *t = arg;
	char name[16], line[64];

	if (!thread_open(t) || fsync(t->dirfd))
		return NULL;
	for (unsigned n = 0; now() < t->until; n++) {
		snprintf(name, sizeof(name), "d%u", n);
		if (mkdirat(t->dirfd, name, 0755)) {
			if (errno != ENOSPC)
				break;
			n--;
			nap(50);
			continue;
		}
		int len = snprintf(line, sizeof(line), "%u %.3f\n", n, now());
		if (write(t->logfd, line, (size_t)len) != len)
			exit(2);
		t->done++;
		nap(1);
	}
	return NULL;
}

static int work(char **argv)
{
	unsigned threads = (unsigned)atoi(argv[4]);
	struct thread *t = calloc(threads + 1, sizeof(*t));
	unsigned long done = 0;

	for (unsigned i = 0; i <= threads; i++) {
		t[i].nr = i;
		t[i].dir = argv[0];
		t[i].log = argv[1];
		t[i].rnd = pattern_mix((uint64_t)atoll(argv[2]) + i);
		t[i].until = now() + atof(argv[3]);
		if (pthread_create(&t[i].id, NULL, i ? files_thread : folders_thread, &t[i]))
			exit(2);
	}
	for (unsigned i = 0; i <= threads; i++) {
		pthread_join(t[i].id, NULL);
		done += i ? t[i].done : 0;
	}
	printf("syncer: %lu operations, %lu folders\n", done, t[0].done);
	free(t);
	return 0;
}

/* ---- verify -------------------------------------------------------------------- */

static unsigned long wrong, seen;

#define WRONG(...) (wrong++ < 20 ? (void)printf("WRONG: " __VA_ARGS__) : (void)0)

/* What the log says of a file: what it is, and what it may have been made since. */
struct story {
	struct state is, may;
	enum op op;		/* 0: nothing was under way */
	bool unsure;		/* there was no space for it, and it may be there still */
};

static bool is_content(const uint8_t *buf, size_t n, uint64_t k)
{
	for (size_t i = 0; i < n; i++)
		if (buf[i] != pattern_byte(k, i))
			return false;
	return true;
}

static const char *judge(unsigned nr, unsigned file, const struct story *y,
			 const uint8_t *buf, size_t n)
{
	const uint64_t k_is = key(nr, file, y->is.version);
	const uint64_t k_may = key(nr, file, y->may.version);

	if (y->unsure)
		return NULL;
	if (y->is.exists && n == y->is.bytes && is_content(buf, n, k_is))
		return NULL;
	if (!y->op)
		return !y->is.exists ? "it was removed for good" :
		       n != y->is.bytes ? "its size" : "its bytes";
	if (y->may.exists && n == y->may.bytes && is_content(buf, n, k_may))
		return NULL;
	switch (y->op) {
	case CREATE:
	case APPEND:
		if (n > y->may.bytes || n < y->is.bytes)
			return "its size, on its way";
		for (size_t i = 0; i < n; i++)
			if (buf[i] != pattern_byte(k_may, i) &&
			    (i < y->is.bytes || buf[i]))
				return "its bytes, on its way";
		return NULL;
	case OVERWRITE:
		if (n != y->is.bytes)
			return "its size, while overwritten";
		for (size_t i = 0; i < n; i++)
			if (buf[i] != pattern_byte(k_may, i) &&
			    buf[i] != pattern_byte(k_is, i))
				return "its bytes, while overwritten";
		return NULL;
	default:
		return "neither the old nor the new";
	}
}

static void verify_file(int dirfd, unsigned nr, unsigned file, const struct story *y)
{
	char name[16];
	struct stat st;
	uint8_t *buf;
	const char *why;
	ssize_t n;
	int fd;

	snprintf(name, sizeof(name), "f%u", file);
	fd = openat(dirfd, name, O_RDONLY);
	if (fd < 0) {
		if (errno != ENOENT)
			WRONG("%u/%s: %s\n", nr, name, strerror(errno));
		else if (y->is.exists && !(y->op && !y->may.exists))
			WRONG("%u/%s is not there\n", nr, name);
		return;
	}
	seen++;
	if (fstat(fd, &st)) {
		WRONG("%u/%s: %s\n", nr, name, strerror(errno));
		close(fd);
		return;
	}
	buf = malloc((size_t)st.st_size + 1);
	n = pread(fd, buf, (size_t)st.st_size + 1, 0);
	if (n != st.st_size)
		WRONG("%u/%s: read %zd of %lld: %s\n", nr, name, n,
		      (long long)st.st_size, n < 0 ? strerror(errno) : "short");
	else if ((why = judge(nr, file, y, buf, (size_t)n)))
		WRONG("%u/%s: %s: %zd bytes; done: %d version %u, %u bytes; "
		      "begun: %c version %u, %u bytes\n", nr, name, why, n,
		      y->is.exists, y->is.version, y->is.bytes,
		      y->op ? y->op : '-', y->may.version, y->may.bytes);
	free(buf);
	close(fd);
}

static FILE *log_open(const char *log, unsigned nr)
{
	char path[4096];

	snprintf(path, sizeof(path), "%s/%u", log, nr);
	return fopen(path, "r");
}

static int folder_open(const char *dir, unsigned nr)
{
	char path[4096];

	snprintf(path, sizeof(path), "%s/%u", dir, nr);
	return open(path, O_RDONLY | O_DIRECTORY);
}

static void verify_thread(const char *dir, unsigned nr, FILE *f)
{
	struct story files[FILES] = {0};
	char word[8], op;
	unsigned file, exists, version, bytes, lines = 0;
	int dirfd;

	while (fscanf(f, "%7s %c %u %u %u %u", word, &op, &file, &exists, &version,
		      &bytes) == 6) {
		struct story *y = &files[file % FILES];
		struct state s = {exists, version, bytes};

		y->unsure |= y->op && !strcmp(word, "begin");
		y->may = s;
		y->op = op;
		if (!strcmp(word, "done")) {
			y->is = s;
			y->op = 0;
			y->unsure = false;
		}
		lines++;
	}
	dirfd = folder_open(dir, nr);
	if (dirfd < 0) {
		if (lines)
			WRONG("folder %u: %s\n", nr, strerror(errno));
		return;
	}
	for (unsigned i = 0; i < FILES; i++)
		verify_file(dirfd, nr, i, &files[i]);
	close(dirfd);
}

static void verify_folders(const char *dir, FILE *f)
{
	unsigned n, count = 0, first = ~0u;
	double when, missing = 0, last = 0;
	char name[16];
	struct stat st;
	int dirfd = folder_open(dir, 0);

	while (fscanf(f, "%u %lf", &n, &when) == 2) {
		snprintf(name, sizeof(name), "d%u", n);
		last = when;
		count++;
		if (dirfd >= 0 && !fstatat(dirfd, name, &st, 0)) {
			if (first != ~0u) {
				WRONG("folder d%u is there, d%u not\n", n, first);
				break;
			}
		} else if (first == ~0u) {
			first = n;
			missing = when;
		}
	}
	if (first != ~0u && (last - missing) * 1000 > FORGIVEN_MS)
		WRONG("folder d%u is gone, made %.1f s before the last\n", first,
		      last - missing);
	if (dirfd >= 0)
		close(dirfd);
	printf("syncer: %u folders, of the last %.1f s none\n", count,
	       first != ~0u ? last - missing : 0);
}

static int verify(char **argv)
{
	FILE *f = log_open(argv[1], 0);

	if (f) {
		verify_folders(argv[0], f);
		fclose(f);
	}
	for (unsigned nr = 1; (f = log_open(argv[1], nr)); nr++) {
		verify_thread(argv[0], nr, f);
		fclose(f);
	}
	printf("syncer: %lu files, %lu wrong\n", seen, wrong);
	return wrong ? 1 : 0;
}

int main(int argc, char **argv)
{
	if (argc == 7 && !strcmp(argv[1], "work"))
		return work(argv + 2);
	if (argc == 4 && !strcmp(argv[1], "verify"))
		return verify(argv + 2);
	fprintf(stderr, "usage: syncer work DIR LOG SEED SECONDS THREADS\n"
			"       syncer verify DIR LOG\n");
	return 2;
}
