/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * scribbler: every way to change a file, at random, against a copy in memory;
 * and knows after a crash what the file may be.
 *
 *   scribbler work DIR LOG SEED SECONDS THREADS
 *   scribbler verify DIR LOG
 *
 * work: each thread has two files in DIR, which it goes on with if they are
 * there, and a log in LOG, which is on another file system: what the files were
 * when it began, each operation before it is done, each fsync (fdatasync, msync)
 * after it has returned. It compares all that it reads. It ends when the file
 * system goes away, or after SECONDS. What should not be it notes in LOG/scribble.wrong.
 *
 * verify: does to the copy what the log says. Each byte of a file must be the
 * one that the last fsync promised, or one that a later operation made it; its
 * size must lie between the smallest and the largest since.
 *
 * Where there is no space the kernel loses what it had taken: a file is
 * nobody's business from such an error ("lost") until it is empty and synced.
 */
#include "tests/mnt/pattern.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define BYTES_MAX (2u << 20)
#define FILES 2

enum kind { WRITE = 1, DIRECT, MAPPED, PUNCH, ZERO, ZERO_KEEP, RESIZE, PREALLOCATE,
	    COPY, SYNCED, LOST, KINDS };

/* A line of the log. */
struct op {
	uint32_t nr;		/* key of what it writes */
	uint8_t kind, file, from_file, pad;
	uint32_t at, len, from;
};

struct model {
	uint32_t bytes;
	uint8_t *data;		/* BYTES_MAX, zeroes behind the end */
};

struct thread {
	pthread_t id;
	unsigned nr;
	const char *dir, *log;
	uint64_t rnd;
	double until;
	uint32_t most;		/* size of its files */
	int dirfd, logfd, fd[FILES], direct[FILES];
	struct model model[FILES];
	uint32_t ops;
	unsigned long synced, lost;
	uint8_t *buf;		/* aligned */
};

static __thread sigjmp_buf on_bus;
static __thread volatile sig_atomic_t may_bus;

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static uint32_t rnd(struct thread *t, uint64_t below)
{
	t->rnd = pattern_mix(t->rnd);
	return (uint32_t)(t->rnd % below);
}

static uint64_t key(unsigned thread, uint32_t nr)
{
	return pattern_mix((uint64_t)thread << 32 ^ nr);
}

static void nap(void)
{
	nanosleep(&(struct timespec){0, 50000000}, NULL);
}

/* Is the file system gone? A name that nobody has looked up yet tells. */
static bool is_gone(struct thread *t)
{
	char name[32];

	for (int i = 0; i < 20; i++) {
		snprintf(name, sizeof(name), "no.%x", rnd(t, 1u << 31));
		if (faccessat(t->dirfd, name, F_OK, 0) && errno != ENOENT)
			return true;
		nap();
	}
	return false;
}

__attribute__((format(printf, 2, 3)))
static void wrong(struct thread *t, const char *format, ...)
{
	char line[400], path[4096];
	int n = snprintf(line, sizeof(line), "WRONG: scribbler %u: ", t->nr), fd;
	va_list ap;

	va_start(ap, format);
	n += vsnprintf(line + n, sizeof(line) - (size_t)n - 1, format, ap);
	va_end(ap);
	line[n++] = '\n';
	snprintf(path, sizeof(path), "%s/scribble.wrong", t->log);
	fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
	if (fd < 0 || write(fd, line, (size_t)n) != n)
		exit(2);
	close(fd);
}

static void note(struct thread *t, const struct op *op)
{
	if (write(t->logfd, op, sizeof(*op)) != sizeof(*op)) {
		perror("scribbler: log");
		exit(2);
	}
}

/* ---- what an operation makes of a file ----------------------------------------- */

static void set_size(struct model *m, uint32_t bytes)
{
	if (bytes < m->bytes)
		memset(m->data + bytes, 0, m->bytes - bytes);
	m->bytes = bytes;
}

static void apply(struct model *files, unsigned thread, const struct op *op)
{
	struct model *m = &files[op->file];
	uint32_t end = op->at + op->len;

	switch (op->kind) {
	case WRITE:
	case DIRECT:
	case MAPPED:
		pattern_fill(key(thread, op->nr), op->at, m->data + op->at, op->len);
		break;
	case COPY:
		memcpy(m->data + op->at, files[op->from_file].data + op->from, op->len);
		break;
	case ZERO:
		memset(m->data + op->at, 0, op->len);
		break;
	case PUNCH:
	case ZERO_KEEP:
		memset(m->data + op->at, 0, op->len);
		return;
	case RESIZE:
		set_size(m, op->at);
		return;
	case PREALLOCATE:
		break;
	case LOST:
		set_size(&files[0], 0);
		set_size(&files[1], 0);
		return;
	default:
		return;
	}
	if (m->bytes < end)
		m->bytes = end;
}

/* ---- work ---------------------------------------------------------------------- */

static int write_all(int fd, const uint8_t *buf, uint32_t len, uint32_t at)
{
	while (len) {
		ssize_t n = pwrite(fd, buf, len, at);

		if (n <= 0)
			return -1;
		buf += n;
		at += (uint32_t)n;
		len -= (uint32_t)n;
	}
	return 0;
}

static int copy_all(int in, uint32_t from, int out, uint32_t at, uint32_t len)
{
	off_t a = from, b = at;

	while (len) {
		ssize_t n = copy_file_range(in, &a, out, &b, len, 0);

		if (!n)
			errno = EDOM;
		if (n <= 0)
			return -1;
		len -= (uint32_t)n;
	}
	return 0;
}

/* Through a mapping: to it, or from it. A daemon that is gone raises SIGBUS. */
static int through_map(int fd, uint8_t *buf, uint32_t len, uint32_t at, bool write)
{
	uint32_t skip = at % 4096;
	uint8_t *map = mmap(NULL, len + skip, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
			    at - skip);
	int ret = 0;

	if (map == MAP_FAILED)
		return -1;
	if (sigsetjmp(on_bus, 1)) {
		errno = EIO;
		ret = -1;
	} else {
		may_bus = 1;
		if (write)
			memcpy(map + skip, buf, len);
		else
			memcpy(buf, map + skip, len);
	}
	may_bus = 0;
	munmap(map, len + skip);
	return ret;
}

static int do_op(struct thread *t, const struct op *op)
{
	int fd = t->fd[op->file];

	switch (op->kind) {
	case WRITE:
	case DIRECT:
		pattern_fill(key(t->nr, op->nr), op->at, t->buf, op->len);
		return write_all(op->kind == WRITE ? fd : t->direct[op->file], t->buf,
				 op->len, op->at);
	case MAPPED:
		pattern_fill(key(t->nr, op->nr), op->at, t->buf, op->len);
		return through_map(fd, t->buf, op->len, op->at, true);
	case PUNCH:
		return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, op->at, op->len);
	case ZERO:
		return fallocate(fd, FALLOC_FL_ZERO_RANGE, op->at, op->len);
	case ZERO_KEEP:
		return fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, op->at, op->len);
	case PREALLOCATE:
		return fallocate(fd, 0, op->at, op->len);
	case RESIZE:
		return ftruncate(fd, op->at);
	case COPY:
		return copy_all(t->fd[op->from_file], op->from, fd, op->at, op->len);
	}
	return 0;
}

/* After ENOSPC: the files are emptied, which a full volume must allow. */
static bool lost(struct thread *t)
{
	struct op op = {.kind = LOST};

	note(t, &op);
	apply(t->model, t->nr, &op);
	t->lost++;
	for (unsigned f = 0; f < FILES; f++) {
		int tries = 0;

		while (ftruncate(t->fd[f], 0) || fsync(t->fd[f])) {
			int err = errno;

			if (err != ENOSPC || ++tries == 100) {
				if (!is_gone(t))
					wrong(t, "file %u cannot be emptied: %s", f, strerror(err));
				return false;
			}
			nap();
		}
	}
	for (unsigned f = 0; f < FILES; f++) {
		op = (struct op){.kind = SYNCED, .file = (uint8_t)f};
		note(t, &op);
	}
	nap();
	return true;
}

/* A call failed: false if that ends the work. */
static bool failed(struct thread *t, const char *what)
{
	int err = errno;

	/* What was lost for want of space may not have been told yet. */
	if (err == EDOM && (fsync(t->fd[0]) || fsync(t->fd[1])))
		err = errno;
	if (err == ENOSPC)
		return lost(t);
	if (!is_gone(t))
		wrong(t, "%s: %s", what, strerror(err));
	return false;
}

static bool compare(struct thread *t, unsigned f, uint32_t at, uint32_t len)
{
	const struct model *m = &t->model[f];
	unsigned how = rnd(t, 4);
	ssize_t n = len;

	if (how == 0) {
		/* from the daemon, not from the kernel's cache */
		posix_fadvise(t->fd[f], 0, 0, POSIX_FADV_DONTNEED);
	} else if (how == 1) {
		at &= ~4095u;
		len = (len + 4095) & ~4095u;
	}
	if (how == 2 && at < m->bytes) {
		n = len = len < m->bytes - at ? len : m->bytes - at;
		if (through_map(t->fd[f], t->buf, len, at, false))
			return failed(t, "reading a mapping");
	} else {
		n = pread(how == 1 ? t->direct[f] : t->fd[f], t->buf, len, at);
		if (n < 0)
			return failed(t, "read");
	}
	uint32_t want = at >= m->bytes ? 0 : len < m->bytes - at ? len : m->bytes - at;
	uint32_t i = 0;

	while (i < want && i < (uint32_t)n && t->buf[i] == m->data[at + i])
		i++;
	if (n == want && i == want)
		return true;
	/* Lost for want of space, and not told yet? */
	if (fsync(t->fd[0]) || fsync(t->fd[1]))
		return failed(t, "fsync");
	wrong(t, "file %u, read (%u) of %u at %u after %u operations: %zd bytes, not %u; "
	      "differs at %u of %u", f, how, len, at, t->ops, n, want, at + i, m->bytes);
	return false;
}

static bool synced(struct thread *t, unsigned f)
{
	struct op op = {.kind = SYNCED, .file = (uint8_t)f};
	unsigned how = rnd(t, 4);
	uint32_t bytes = t->model[f].bytes;
	int ret;

	if (how == 0 && bytes) {
		void *map = mmap(NULL, bytes, PROT_READ, MAP_SHARED, t->fd[f], 0);

		ret = map == MAP_FAILED ? -1 : msync(map, bytes, MS_SYNC);
		if (map != MAP_FAILED)
			munmap(map, bytes);
	} else {
		ret = how == 1 ? fdatasync(t->fd[f]) : fsync(t->fd[f]);
	}
	if (ret)
		return failed(t, "fsync");
	note(t, &op);
	t->synced++;
	return true;
}

static bool open_files(struct thread *t)
{
	char name[32];

	for (unsigned f = 0; f < FILES; f++) {
		snprintf(name, sizeof(name), "scribble.%u.%u", t->nr, f);
		t->fd[f] = openat(t->dirfd, name, O_RDWR | O_CREAT, 0644);
		t->direct[f] = t->fd[f] < 0 ? -1 : openat(t->dirfd, name, O_RDWR | O_DIRECT);
		if (t->direct[f] < 0)
			return false;
	}
	return true;
}

static bool step(struct thread *t)
{
	static const uint32_t lens[] = {100, 5000, 20000, 70000, 300000};
	/* out of 20: */
	static const uint8_t kinds[] = {WRITE, WRITE, WRITE, WRITE, DIRECT, MAPPED, MAPPED,
					MAPPED, PUNCH, PUNCH, ZERO, ZERO_KEEP, RESIZE, RESIZE,
					PREALLOCATE, COPY, COPY, COPY, COPY, WRITE};
	unsigned f = rnd(t, FILES), what = rnd(t, 100);
	struct model *m = &t->model[f];
	struct op op = {.nr = t->ops, .file = (uint8_t)f,
			.kind = kinds[rnd(t, sizeof(kinds))]};
	/* mostly within the file, or just behind it */
	uint32_t behind = m->bytes + 10000 < t->most ? m->bytes + 10000 : t->most;

	op.len = 1 + rnd(t, lens[rnd(t, 5)]);
	op.at = rnd(t, behind);
	if (rnd(t, 2)) {
		op.at &= ~4095u;
		op.len = (op.len + 4095) & ~4095u;
	}
	if (op.len > t->most - op.at)
		op.len = t->most - op.at;
	if (what < 35)
		return compare(t, f, op.at, op.len);
	if (what < 40)
		return synced(t, f);
	if (what < 41) {
		int err = 0;

		/* Who closes first is told of what was lost. */
		for (unsigned i = 0; i < FILES; i++)
			if (close(t->direct[i]) | close(t->fd[i]))
				err = errno;
		if (!open_files(t))
			return failed(t, "open");
		errno = err;
		return !err || failed(t, "close");
	}
	switch (op.kind) {
	case DIRECT:
		op.at &= ~4095u;
		op.len = (op.len + 4095) & ~4095u;
		break;
	case MAPPED:
	case PUNCH:
	case ZERO_KEEP:
		if (op.at >= m->bytes)
			return true;
		if (op.len > m->bytes - op.at)
			op.len = m->bytes - op.at;
		break;
	case RESIZE:
		if (rnd(t, 2))
			op.at = rnd(t, t->most);
		break;
	case COPY:
		op.from_file = (uint8_t)rnd(t, FILES);
		if (!t->model[op.from_file].bytes)
			return true;
		op.from = rnd(t, t->model[op.from_file].bytes);
		if (op.at % 4096 == 0)
			op.from &= ~4095u;
		if (op.len > t->model[op.from_file].bytes - op.from)
			op.len = t->model[op.from_file].bytes - op.from;
		if (op.from_file == f && op.at < op.from + op.len && op.from < op.at + op.len)
			return true;
		break;
	}
	t->ops++;
	note(t, &op);
	apply(t->model, t->nr, &op);
	if (do_op(t, &op)) {
		char text[80];

		snprintf(text, sizeof(text), "operation %u on file %u at %u, %u bytes",
			 op.kind, f, op.at, op.len);
		return failed(t, text);
	}
	return true;
}

static FILE *log_open(const char *log, unsigned nr, int file, const char *mode)
{
	char path[4096];

	snprintf(path, sizeof(path), file < 0 ? "%s/scribble.%u" : "%s/scribble.%u.%d", log,
		 nr, file);
	return fopen(path, mode);
}

static void models_create(struct model *m)
{
	for (unsigned f = 0; f < FILES; f++) {
		m[f].data = calloc(1, BYTES_MAX);
		if (!m[f].data)
			exit(2);
	}
}

/* What the files are before anything is done to them. */
static bool take_base(struct thread *t)
{
	for (unsigned f = 0; f < FILES; f++) {
		struct model *m = &t->model[f];
		ssize_t n = pread(t->fd[f], m->data, BYTES_MAX, 0);
		FILE *to;

		if (n < 0 || fsync(t->fd[f]))
			return false;
		m->bytes = (uint32_t)n;
		to = log_open(t->log, t->nr, (int)f, "w");
		if (!to || fwrite(m->data, 1, m->bytes, to) != m->bytes || fclose(to))
			exit(2);
	}
	return true;
}

static void *thread_run(void *arg)
{
	struct thread *t = arg;
	FILE *log;

	t->dirfd = open(t->dir, O_RDONLY | O_DIRECTORY);
	t->buf = aligned_alloc(4096, 1 << 20);
	models_create(t->model);
	if (t->dirfd < 0 || !open_files(t) || !take_base(t) || fsync(t->dirfd))
		return NULL;
	/* With the log begins what verify believes. */
	log = log_open(t->log, t->nr, -1, "a");
	if (!log)
		exit(2);
	t->logfd = fileno(log);
	for (unsigned f = 0; f < FILES; f++)
		note(t, &(struct op){.kind = SYNCED, .file = (uint8_t)f});
	while (now() < t->until && step(t))
		;
	return NULL;
}

static void bus(int sig)
{
	if (may_bus)
		siglongjmp(on_bus, sig);
	_exit(2);
}

static int work(char **argv)
{
	unsigned threads = (unsigned)atoi(argv[4]);
	struct thread *t = calloc(threads + 1, sizeof(*t));
	unsigned long ops = 0, sync = 0, none = 0;

	signal(SIGBUS, bus);
	for (unsigned i = 1; i <= threads; i++) {
		t[i].nr = i;
		t[i].dir = argv[0];
		t[i].log = argv[1];
		t[i].rnd = pattern_mix((uint64_t)atoll(argv[2]) + i);
		t[i].until = now() + atof(argv[3]);
		t[i].most = i % 2 ? 200000 : BYTES_MAX;
		if (pthread_create(&t[i].id, NULL, thread_run, &t[i]))
			exit(2);
	}
	for (unsigned i = 1; i <= threads; i++) {
		pthread_join(t[i].id, NULL);
		ops += t[i].ops;
		sync += t[i].synced;
		none += t[i].lost;
	}
	printf("scribbler: %lu operations, %lu synced, %lu times no space\n", ops, sync, none);
	return 0;
}

/* ---- verify -------------------------------------------------------------------- */

static unsigned long bad, seen, promises, unknown;

#define WRONG(...) (bad++ < 20 ? (void)printf("WRONG: " __VA_ARGS__) : (void)0)

static void verify_file(const char *dir, const char *log, unsigned nr, unsigned f,
			const struct op *ops, size_t count)
{
	static struct model m[FILES];
	static uint8_t *is, *ok;
	char path[4096];
	size_t last = 0, lost_at = 0;
	uint32_t least, most;
	ssize_t n;
	int fd;

	if (!is) {
		models_create(m);
		is = malloc(BYTES_MAX + 1);
		ok = malloc(BYTES_MAX);
	}
	for (size_t i = 0; i < count; i++) {
		if (ops[i].kind == SYNCED && ops[i].file == f) {
			last = i;
			promises++;
		} else if (ops[i].kind == LOST) {
			lost_at = i;
		}
	}
	snprintf(path, sizeof(path), "%s/scribble.%u.%u", dir, nr, f);
	fd = open(path, O_RDONLY);
	n = fd < 0 ? -1 : pread(fd, is, BYTES_MAX + 1, 0);
	if (n < 0)
		WRONG("%s: %s\n", path, strerror(errno));
	if (fd >= 0)
		close(fd);
	if (n < 0)
		return;
	seen++;
	if (lost_at > last) {
		unknown++;
		return;
	}
	for (unsigned i = 0; i < FILES; i++) {
		FILE *base = log_open(log, nr, (int)i, "r");

		memset(m[i].data, 0, BYTES_MAX);
		m[i].bytes = base ? (uint32_t)fread(m[i].data, 1, BYTES_MAX, base) : 0;
		if (base)
			fclose(base);
	}
	for (size_t i = 0; i < last; i++)
		apply(m, nr, &ops[i]);
	least = most = m[f].bytes;
	for (ssize_t i = 0; i < n && i < BYTES_MAX; i++)
		ok[i] = is[i] == m[f].data[i];
	for (size_t i = last; i < count; i++) {
		apply(m, nr, &ops[i]);
		if (ops[i].file != f && ops[i].kind != LOST)
			continue;
		least = m[f].bytes < least ? m[f].bytes : least;
		most = m[f].bytes > most ? m[f].bytes : most;
		for (ssize_t k = 0; k < n && k < BYTES_MAX; k++)
			ok[k] |= is[k] == m[f].data[k];
	}
	if (n < (ssize_t)least || n > (ssize_t)most)
		WRONG("%s: %zd bytes, not between %u and %u\n", path, n, least, most);
	for (ssize_t i = 0; i < n && i < BYTES_MAX; i++) {
		if (ok[i])
			continue;
		WRONG("%s: byte %zd of %zd, 0x%02x, was neither promised nor written since "
		      "(%zu of %zu operations)\n", path, i, n, is[i], count - last, count);
		return;
	}
}

static int verify(char **argv)
{
	FILE *f;

	for (unsigned nr = 1; (f = log_open(argv[1], nr, -1, "r")); nr++) {
		size_t count = 0, room = 1 << 16;
		struct op *ops = malloc(room * sizeof(*ops));

		while (fread(&ops[count], sizeof(*ops), 1, f) == 1)
			if (++count == room)
				ops = realloc(ops, (room *= 2) * sizeof(*ops));
		fclose(f);
		for (unsigned i = 0; i < FILES; i++)
			verify_file(argv[0], argv[1], nr, i, ops, count);
		free(ops);
	}
	char path[4096], line[512];

	snprintf(path, sizeof(path), "%s/scribble.wrong", argv[1]);
	f = fopen(path, "r");
	while (f && fgets(line, sizeof(line), f)) {
		bad++;
		fputs(line, stdout);
	}
	printf("scribbler: %lu files, %lu promises, %lu without space, %lu wrong\n", seen,
	       promises, unknown, bad);
	return bad ? 1 : 0;
}

int main(int argc, char **argv)
{
	if (argc == 7 && !strcmp(argv[1], "work"))
		return work(argv + 2);
	if (argc == 4 && !strcmp(argv[1], "verify"))
		return verify(argv + 2);
	fprintf(stderr, "usage: scribbler work DIR LOG SEED SECONDS THREADS\n"
			"       scribbler verify DIR LOG\n");
	return 2;
}
