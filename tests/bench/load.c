/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * load: puts one kind of work on a directory and says how fast it went, as one
 * line of JSON: operations per second, median and tail of their latencies.
 *
 *	load [-n COUNT] [-s SECONDS] [-t THREADS] [-b BYTES] [-S SEED] [-w] WORKLOAD DIR
 *
 * A run ends after COUNT operations of each thread or after SECONDS, whichever
 * is first; one of the two may be 0, for no bound. The same seed makes the
 * same operations. `-w` goes over the files again and again until the time is
 * over, for hot runs; `load list` names the workloads.
 *
 * Workloads on "the set" use the files that `create4k` made; those on "the big
 * file" the file that `seqwrite` made. Dropping caches between them is the
 * caller's. What is read is compared with what was written: the first bytes
 * of each block are its file's number and its own.
 */
#include <errno.h>
#include <fcntl.h>
#include <dirent.h>
#include <linux/aio_abi.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096u
#define DIR_FILES 1000		/* files in one directory of the set */
#define DEPTH 16
#define BIG "big"

static struct {
	uint64_t count;
	double seconds;
	unsigned threads;
	uint64_t bytes;
	uint64_t seed;
	bool wrap;
	const char *workload, *dir;
} opt = { .seconds = 1, .threads = 1, .bytes = 64u << 20, .seed = 1 };

/* One thread (or process) of the load, with its random numbers and latencies. */
struct worker {
	unsigned id;
	uint64_t rng;
	uint64_t ops, bytes;
	uint32_t *lat;			/* ns, one an operation */
	size_t lat_nr, lat_max;
	uint64_t begin, end;		/* of its measured part; end 0: when it returns */
	double head, tail;		/* rates at the two ends of the run, if it has them */
	const struct workload *w;
	char *buf;			/* 1 MiB, aligned */
};

static atomic_bool stop;
static uint64_t deadline;
static pthread_barrier_t start_line;

static __attribute__((noreturn, format(printf, 1, 2))) void die(const char *fmt, ...)
{
	int err = errno;
	va_list ap;

	va_start(ap, fmt);
	fprintf(stderr, "load: ");
	vfprintf(stderr, fmt, ap);
	fprintf(stderr, ": %s\n", strerror(err));
	va_end(ap);
	_exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* splitmix64 */
static uint64_t rnd(struct worker *k)
{
	uint64_t z = (k->rng += 0x9e3779b97f4a7c15ull);
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static bool more(struct worker *k, uint64_t now)
{
	if (opt.count && k->ops >= opt.count && !opt.wrap)
		return false;
	return !atomic_load_explicit(&stop, memory_order_relaxed) && now < deadline;
}

/* Counts an operation that began at `t`; returns the time now. */
static uint64_t done(struct worker *k, uint64_t t)
{
	uint64_t now = now_ns();

	if (k->lat_nr == k->lat_max) {
		k->lat_max = k->lat_max ? k->lat_max * 2 : 65536;
		k->lat = realloc(k->lat, k->lat_max * sizeof(*k->lat));
		if (!k->lat)
			die("latencies");
	}
	k->lat[k->lat_nr++] = now - t < UINT32_MAX ? (uint32_t)(now - t) : UINT32_MAX;
	k->ops++;
	return now;
}

static void make_dir(const char *path)
{
	if (mkdir(path, 0755) && errno != EEXIST)
		die("mkdir %s", path);
}

static int open_or_die(const char *path, int flags)
{
	int fd = open(path, flags, 0644);
	if (fd < 0)
		die("open %s", path);
	return fd;
}

static void close_or_die(int fd)
{
	if (close(fd))
		die("close");
}

static void write_at(int fd, const void *buf, size_t len, uint64_t off)
{
	if (pwrite(fd, buf, len, (off_t)off) != (ssize_t)len)
		die("write");
}

static void block_stamp(char *buf, uint64_t file, uint64_t block)
{
	memcpy(buf, &file, 8);
	memcpy(buf + 8, &block, 8);
}

static void block_verify(const char *buf, uint64_t file, uint64_t block)
{
	uint64_t v[2];

	memcpy(v, buf, 16);
	if (v[0] != file || v[1] != block) {
		errno = EILSEQ;
		die("file %ju block %ju holds file %ju block %ju", (uintmax_t)file,
		    (uintmax_t)block, (uintmax_t)v[0], (uintmax_t)v[1]);
	}
}

/* ---- creating ---------------------------------------------------------------- */

/* The path of file `i` of a thread's part of a set; its directory on demand. */
static void set_path(char path[256], const char *set, unsigned id, uint64_t i, bool make)
{
	if (make && i % DIR_FILES == 0) {
		if (i == 0)
			make_dir(set);
		snprintf(path, 256, "%s/%u-%04ju", set, id, (uintmax_t)(i / DIR_FILES));
		make_dir(path);
	}
	snprintf(path, 256, "%s/%u-%04ju/f%07ju", set, id, (uintmax_t)(i / DIR_FILES),
		 (uintmax_t)i);
}

static void create_files(struct worker *k, const char *set, size_t size, bool sync)
{
	char path[256];

	memset(k->buf, 'x', size);
	for (uint64_t t = now_ns(); more(k, t);) {
		set_path(path, set, k->id, k->ops, true);
		int fd = open_or_die(path, O_CREAT | O_EXCL | O_WRONLY);
		if (size) {
			block_stamp(k->buf, k->ops, 0);
			write_at(fd, k->buf, size, 0);
		}
		if (sync && fsync(fd))
			die("fsync");
		close_or_die(fd);
		k->bytes += size;
		t = done(k, t);
	}
}

static void run_create(struct worker *k) { create_files(k, "empty", 0, false); }
static void run_create4k(struct worker *k) { create_files(k, "set", BLOCK, false); }
static void run_create4k_more(struct worker *k) { create_files(k, "more", BLOCK, false); }
static void run_create64k(struct worker *k) { create_files(k, "set64k", 65536, false); }
static void run_create_fsync(struct worker *k)
{
	char set[32];
	snprintf(set, sizeof(set), "synced%u", opt.threads);
	create_files(k, set, BLOCK, true);
}

static void run_mkdir(struct worker *k)
{
	char path[256];

	make_dir("dirs");
	for (uint64_t t = now_ns(); more(k, t); t = done(k, t)) {
		snprintf(path, sizeof(path), "dirs/%u-%07ju", k->id, (uintmax_t)k->ops);
		if (mkdir(path, 0755))
			die("mkdir %s", path);
	}
}

/* One directory; its rate at the end against that at the start. */
static void run_bigdir(struct worker *k)
{
	char path[256];
	uint64_t begin = now_ns();

	make_dir("bigdir");
	for (uint64_t t = begin; more(k, t); t = done(k, t)) {
		snprintf(path, sizeof(path), "bigdir/f%09ju-%u", (uintmax_t)k->ops, k->id);
		close_or_die(open_or_die(path, O_CREAT | O_EXCL | O_WRONLY));
	}
	size_t part = k->lat_nr / 10;
	double head = 0, tail = 0;
	for (size_t i = 0; i < part; i++) {
		head += k->lat[i];
		tail += k->lat[k->lat_nr - 1 - i];
	}
	if (part) {
		k->head = (double)part / head * 1e9;
		k->tail = (double)part / tail * 1e9;
	}
}

/* ---- using the set ------------------------------------------------------------- */

/* The next file of the set, from the start again with -w; false at its end. */
static bool next_file(struct worker *k, uint64_t *i, char path[256], const char *set)
{
	if (opt.count && *i >= opt.count) {
		if (!opt.wrap)
			return false;
		*i = 0;
	}
	set_path(path, set, k->id, (*i)++, false);
	return true;
}

static void run_stat(struct worker *k)
{
	char path[256];
	struct stat st;

	for (uint64_t t = now_ns(), i = 0; more(k, t) && next_file(k, &i, path, "set");
	     t = done(k, t))
		if (stat(path, &st))
			die("stat %s", path);
}

static void run_read4k(struct worker *k)
{
	char path[256];
	uint64_t i = 0;

	for (uint64_t t = now_ns(); more(k, t) && next_file(k, &i, path, "set");
	     t = done(k, t)) {
		int fd = open_or_die(path, O_RDONLY);
		if (pread(fd, k->buf, BLOCK, 0) != BLOCK)
			die("read %s", path);
		block_verify(k->buf, i - 1, 0);
		close_or_die(fd);
		k->bytes += BLOCK;
	}
}

/* readdir, and stat of each entry in the order of readdir. */
static void run_list(struct worker *k)
{
	char path[256];
	uint64_t t = now_ns(), dirs = (opt.count + DIR_FILES - 1) / DIR_FILES;

	for (uint64_t d = 0; d < dirs && more(k, t); d++) {
		snprintf(path, sizeof(path), "set/%u-%04ju", k->id, (uintmax_t)d);
		DIR *dir = opendir(path);
		if (!dir)
			die("opendir %s", path);
		struct dirent *e;
		while ((e = readdir(dir))) {
			struct stat st;
			if (e->d_name[0] == '.')
				continue;
			if (fstatat(dirfd(dir), e->d_name, &st, AT_SYMLINK_NOFOLLOW))
				die("stat %s/%s", path, e->d_name);
			t = done(k, t);
		}
		closedir(dir);
	}
}

static void run_rename(struct worker *k)
{
	char path[256], to[300];
	uint64_t i = 0;

	for (uint64_t t = now_ns(); more(k, t) && next_file(k, &i, path, "set");
	     t = done(k, t)) {
		snprintf(to, sizeof(to), "%s-renamed", path);
		if (rename(path, to))
			die("rename %s", path);
	}
	for (uint64_t j = 0; j < i; j++) {	/* back, not measured */
		if (j == 0)
			k->end = now_ns();
		set_path(path, "set", k->id, j, false);
		snprintf(to, sizeof(to), "%s-renamed", path);
		if (rename(to, path))
			die("rename %s", to);
	}
}

static void run_unlink(struct worker *k)
{
	char path[256];

	for (uint64_t t = now_ns(), i = 0; more(k, t) && next_file(k, &i, path, "set");
	     t = done(k, t))
		if (unlink(path))
			die("unlink %s", path);
}

/* ---- durable small writes ------------------------------------------------------- */

static void small_writes(struct worker *k, const char *name, bool append)
{
	const uint64_t blocks = 256;
	char path[64];

	snprintf(path, sizeof(path), "%s-%u", name, k->id);
	int fd = open_or_die(path, O_CREAT | O_TRUNC | O_RDWR);
	memset(k->buf, 'y', BLOCK * blocks);
	if (!append)
		write_at(fd, k->buf, BLOCK * blocks, 0);
	if (fsync(fd))
		die("fsync");
	k->begin = now_ns();
	for (uint64_t t = k->begin; more(k, t); t = done(k, t)) {
		block_stamp(k->buf, k->id, k->ops);
		write_at(fd, k->buf, BLOCK,
			 BLOCK * (append ? k->ops : rnd(k) % blocks));
		if (append ? fsync(fd) : fdatasync(fd))
			die("fsync");
		k->bytes += BLOCK;
	}
	close_or_die(fd);
}

static void run_overwrite(struct worker *k) { small_writes(k, "overwritten", false); }
static void run_append(struct worker *k) { small_writes(k, "appended", true); }

/*
 * Thread 0 streams into a file of at most -b bytes, over and over; thread 1
 * appends 4 KiB to its own file and waits for them, 10 ms apart, so that it
 * does not hold the other up. Only thread 1 is counted.
 */
static void run_fsync_stream(struct worker *k)
{
	if (k->id == 1) {
		struct timespec gap = { .tv_nsec = 10 * 1000000 };
		int fd = open_or_die("beside-stream", O_CREAT | O_TRUNC | O_RDWR);
		for (uint64_t t = now_ns(); more(k, t); t = now_ns()) {
			write_at(fd, k->buf, BLOCK, k->ops * BLOCK);
			if (fsync(fd))
				die("fsync");
			done(k, t);
			nanosleep(&gap, NULL);
		}
		close_or_die(fd);
		atomic_store(&stop, true);
		return;
	}
	int fd = open_or_die("stream", O_CREAT | O_TRUNC | O_RDWR);
	uint64_t off = 0;
	while (!atomic_load(&stop) && now_ns() < deadline) {
		write_at(fd, k->buf, 1 << 20, off);
		k->bytes += 1 << 20;
		off = (off + (1 << 20)) % opt.bytes;
	}
	close_or_die(fd);
}

/* ---- streams and random access --------------------------------------------------- */

static void run_seqwrite(struct worker *k)
{
	int fd = open_or_die(BIG, O_CREAT | O_TRUNC | O_RDWR);
	uint64_t t = now_ns();

	memset(k->buf, 'z', 1 << 20);
	for (uint64_t off = 0; off < opt.bytes; off += 1 << 20) {
		for (unsigned b = 0; b < (1 << 20) / BLOCK; b++)
			block_stamp(k->buf + b * BLOCK, 0, off / BLOCK + b);
		write_at(fd, k->buf, 1 << 20, off);
		k->bytes += 1 << 20;
		t = done(k, t);
	}
	if (fsync(fd))
		die("fsync");
	close_or_die(fd);
}

static void run_seqread(struct worker *k)
{
	int fd = open_or_die(BIG, O_RDONLY);
	uint64_t t = now_ns(), off = 0;

	for (;;) {
		ssize_t n = pread(fd, k->buf, 1 << 20, (off_t)off);
		if (n < 0)
			die("read");
		if (n == 0 && (!opt.wrap || off == 0 || t >= deadline))
			break;
		if (n)
			block_verify(k->buf, 0, off / BLOCK);
		off = n ? off + (uint64_t)n : 0;
		k->bytes += (uint64_t)n;
		t = done(k, t);
	}
	close_or_die(fd);
}

static uint64_t big_blocks(int fd)
{
	struct stat st;
	if (fstat(fd, &st) || st.st_size < BLOCK)
		die("%s", BIG);
	return (uint64_t)st.st_size / BLOCK;
}

static void run_randread(struct worker *k)
{
	int fd = open_or_die(BIG, O_RDONLY);
	uint64_t blocks = big_blocks(fd);

	for (uint64_t t = now_ns(); more(k, t); t = done(k, t)) {
		uint64_t b = rnd(k) % blocks;
		if (pread(fd, k->buf, BLOCK, (off_t)(b * BLOCK)) != BLOCK)
			die("read");
		block_verify(k->buf, 0, b);
		k->bytes += BLOCK;
	}
	close_or_die(fd);
}

static void run_randwrite(struct worker *k)
{
	int fd = open_or_die(BIG, O_RDWR);
	uint64_t blocks = big_blocks(fd);

	for (uint64_t t = now_ns(); more(k, t); t = done(k, t)) {
		uint64_t b = rnd(k) % blocks;
		block_stamp(k->buf, 0, b);
		write_at(fd, k->buf, BLOCK, b * BLOCK);
		k->bytes += BLOCK;
	}
	if (fsync(fd))
		die("fsync");
	close_or_die(fd);
}

/* DEPTH requests in flight past the page cache, by the kernel's own AIO. */
static void direct(struct worker *k, bool writing)
{
	int fd = open_or_die(BIG, O_RDWR | O_DIRECT);
	uint64_t blocks = big_blocks(fd), begun[DEPTH], block[DEPTH], flying = 0;
	struct iocb cb[DEPTH], *p;
	struct io_event ev[DEPTH];
	aio_context_t ctx = 0;

	if (syscall(SYS_io_setup, DEPTH, &ctx))
		die("io_setup");
	memset(cb, 0, sizeof(cb));
	uint64_t t = now_ns();
	for (unsigned i = 0; i < DEPTH; i++)
		ev[i].data = i;
	for (long ready = DEPTH;;) {
		for (long e = 0; e < ready && more(k, t); e++) {
			unsigned i = (unsigned)ev[e].data;
			block[i] = rnd(k) % blocks;
			cb[i].aio_data = i;
			cb[i].aio_fildes = (uint32_t)fd;
			cb[i].aio_lio_opcode = writing ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
			cb[i].aio_buf = (uint64_t)(uintptr_t)(k->buf + i * BLOCK);
			cb[i].aio_nbytes = BLOCK;
			cb[i].aio_offset = (int64_t)(block[i] * BLOCK);
			if (writing)
				block_stamp(k->buf + i * BLOCK, 0, block[i]);
			begun[i] = now_ns();
			p = &cb[i];
			if (syscall(SYS_io_submit, ctx, 1L, &p) != 1)
				die("io_submit");
			flying++;
		}
		if (!flying)
			break;
		ready = syscall(SYS_io_getevents, ctx, 1L, (long)DEPTH, ev, NULL);
		if (ready < 1)
			die("io_getevents");
		for (long e = 0; e < ready; e++) {
			unsigned i = (unsigned)ev[e].data;
			if (ev[e].res != BLOCK) {
				errno = ev[e].res < 0 ? (int)-ev[e].res : EIO;
				die("direct I/O");
			}
			if (!writing)
				block_verify(k->buf + i * BLOCK, 0, block[i]);
			t = done(k, begun[i]);
			k->bytes += BLOCK;
			flying--;
		}
	}
	syscall(SYS_io_destroy, ctx);
	close_or_die(fd);
}

static void run_randread_direct(struct worker *k) { direct(k, false); }
static void run_randwrite_direct(struct worker *k) { direct(k, true); }

/* Stores of one word in random pages; msync after each 4,096 of them. */
static void run_mmap(struct worker *k)
{
	const uint64_t pages = 4096;
	int fd = open_or_die("mapped", O_CREAT | O_TRUNC | O_RDWR);

	for (uint64_t off = 0; off < pages * BLOCK; off += 1 << 20)
		write_at(fd, k->buf, 1 << 20, off);
	if (fsync(fd))
		die("fsync");
	char *m = mmap(NULL, pages * BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (m == MAP_FAILED)
		die("mmap");
	k->begin = now_ns();
	for (uint64_t t = k->begin; more(k, t); t = done(k, t)) {
		uint64_t v = rnd(k);
		memcpy(m + v % pages * BLOCK, &v, 8);
		k->bytes += 8;
		if ((k->ops + 1) % 4096 == 0 && msync(m, pages * BLOCK, MS_SYNC))
			die("msync");
	}
	if (msync(m, pages * BLOCK, MS_SYNC))
		die("msync");
	munmap(m, pages * BLOCK);
	close_or_die(fd);
}

/* ---- many clients ---------------------------------------------------------------- */

/* What programs do, mixed: one of each kind in turn, in a directory of its own. */
static void run_mixed(struct worker *k)
{
	char path[256], to[256];
	struct stat st;

	make_dir("clients");
	snprintf(path, sizeof(path), "clients/%u", k->id);
	make_dir(path);
	for (uint64_t t = now_ns(), i = 0; more(k, t); i++) {
		snprintf(path, sizeof(path), "clients/%u/f%ju", k->id, (uintmax_t)i);
		snprintf(to, sizeof(to), "clients/%u/g%ju", k->id, (uintmax_t)i);
		int fd = open_or_die(path, O_CREAT | O_EXCL | O_RDWR);
		block_stamp(k->buf, k->id, i);
		write_at(fd, k->buf, BLOCK, 0);
		close_or_die(fd);
		t = done(k, t);
		if (stat(path, &st))
			die("stat");
		t = done(k, t);
		if (rename(path, to))
			die("rename");
		t = done(k, t);
		fd = open_or_die(to, O_RDONLY);
		if (pread(fd, k->buf, BLOCK, 0) != BLOCK)
			die("read");
		block_verify(k->buf, k->id, i);
		close_or_die(fd);
		t = done(k, t);
		if (i % 2) {
			if (unlink(to))
				die("unlink");
			t = done(k, t);
		}
		k->bytes += 2 * BLOCK;
	}
}

/* ---- the table, and the run ------------------------------------------------------- */

static const struct workload {
	const char *name;
	void (*run)(struct worker *k);
	const char *about;
} workloads[] = {
	{ "create", run_create, "create empty files" },
	{ "create4k", run_create4k, "create, write 4 KiB, close: makes the set" },
	{ "create4k-more", run_create4k_more, "the same, elsewhere" },
	{ "create64k", run_create64k, "create, write 64 KiB, close" },
	{ "stat", run_stat, "stat the set" },
	{ "list", run_list, "readdir and stat the set" },
	{ "read4k", run_read4k, "open, read, close each of the set" },
	{ "rename", run_rename, "rename the set (and back, not measured)" },
	{ "unlink", run_unlink, "unlink the set" },
	{ "mkdir", run_mkdir, "make directories" },
	{ "create4k-fsync", run_create_fsync, "create, write 4 KiB, fsync, close" },
	{ "overwrite-fdatasync", run_overwrite, "overwrite 4 KiB of 1 MiB, fdatasync" },
	{ "append-fsync", run_append, "append 4 KiB, fsync" },
	{ "fsync-stream", run_fsync_stream, "fsync of 4 KiB beside a stream (2 threads)" },
	{ "seqwrite", run_seqwrite, "write -b bytes in order, fsync: makes the big file" },
	{ "seqread", run_seqread, "read the big file in order" },
	{ "randread", run_randread, "read 4 KiB anywhere in the big file" },
	{ "randread-direct", run_randread_direct, "the same, O_DIRECT, 16 at a time" },
	{ "randwrite", run_randwrite, "write 4 KiB anywhere in the big file, one fsync" },
	{ "randwrite-direct", run_randwrite_direct, "O_DIRECT, 16 at a time, no fsync" },
	{ "mmap", run_mmap, "stores into 16 MiB mapped, msync each 4,096" },
	{ "bigdir", run_bigdir, "create empty files in one directory" },
	{ "mixed", run_mixed, "create, stat, rename, read, unlink" },
	{ NULL, NULL, NULL },
};

static void *worker_main(void *arg)
{
	struct worker *k = arg;

	pthread_barrier_wait(&start_line);
	k->begin = now_ns();
	k->w->run(k);
	if (!k->end)
		k->end = now_ns();
	return NULL;
}

static int by_value(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return (x > y) - (x < y);
}

static void report(struct worker *k, unsigned nr)
{
	uint64_t begin = UINT64_MAX, end = 0, ops = 0, bytes = 0;
	size_t n = 0;

	for (unsigned i = 0; i < nr; i++) {
		begin = k[i].begin < begin ? k[i].begin : begin;
		end = k[i].end > end ? k[i].end : end;
		ops += k[i].ops;
		bytes += k[i].bytes;
		n += k[i].lat_nr;
	}
	uint32_t *lat = malloc((n + 1) * sizeof(*lat));
	if (!lat)
		die("latencies");
	n = 0;
	for (unsigned i = 0; i < nr; i++) {
		if (k[i].lat_nr)
			memcpy(lat + n, k[i].lat, k[i].lat_nr * sizeof(*lat));
		n += k[i].lat_nr;
	}
	qsort(lat, n, sizeof(*lat), by_value);
	double s = (double)(end - begin) / 1e9;
	printf("{\"workload\": \"%s\", \"threads\": %u, \"seed\": %ju, \"ops\": %ju, "
	       "\"bytes\": %ju, \"seconds\": %.6f, \"ops_s\": %.1f, \"mib_s\": %.2f",
	       opt.workload, nr, (uintmax_t)opt.seed, (uintmax_t)ops, (uintmax_t)bytes, s,
	       (double)ops / s, (double)bytes / s / 1048576);
	if (n)
		printf(", \"p50_us\": %.1f, \"p99_us\": %.1f, \"p999_us\": %.1f, "
		       "\"max_us\": %.1f",
		       lat[n / 2] / 1e3, lat[n - 1 - n / 100] / 1e3,
		       lat[n - 1 - n / 1000] / 1e3, lat[n - 1] / 1e3);
	if (k[0].head > 0)
		printf(", \"head_ops_s\": %.1f, \"tail_ops_s\": %.1f", k[0].head, k[0].tail);
	printf("}\n");
	free(lat);
}

static void usage(FILE *f)
{
	fprintf(f, "usage: load [-n count] [-s seconds] [-t threads] [-b bytes] [-S seed] [-w] "
		   "WORKLOAD DIR\nworkloads:\n");
	for (const struct workload *w = workloads; w->name; w++)
		fprintf(f, "  %-20s %s\n", w->name, w->about);
}

int main(int argc, char *argv[])
{
	const struct workload *w = workloads;
	int c;

	while ((c = getopt(argc, argv, "n:s:t:b:S:wh")) != -1) {
		switch (c) {
		case 'n': opt.count = strtoull(optarg, NULL, 0); break;
		case 's': opt.seconds = strtod(optarg, NULL); break;
		case 't': opt.threads = (unsigned)strtoul(optarg, NULL, 0); break;
		case 'b': opt.bytes = strtoull(optarg, NULL, 0) & ~0xfffffull; break;
		case 'S': opt.seed = strtoull(optarg, NULL, 0); break;
		case 'w': opt.wrap = true; break;
		case 'h': usage(stdout); return 0;
		default: usage(stderr); return 2;
		}
	}
	if (argc - optind == 1 && !strcmp(argv[optind], "list")) {
		usage(stdout);
		return 0;
	}
	if (argc - optind != 2 || opt.threads < 1 || opt.threads > 1024 || !opt.bytes) {
		usage(stderr);
		return 2;
	}
	opt.workload = argv[optind];
	opt.dir = argv[optind + 1];
	while (w->name && strcmp(w->name, opt.workload))
		w++;
	if (!w->name) {
		fprintf(stderr, "load: no workload '%s'\n", opt.workload);
		return 2;
	}
	if (chdir(opt.dir))
		die("chdir %s", opt.dir);
	if (w->run == run_fsync_stream)
		opt.threads = 2;

	struct worker *k = calloc(opt.threads, sizeof(*k));
	pthread_t *th = calloc(opt.threads, sizeof(*th));
	if (!k || !th)
		die("workers");
	pthread_barrier_init(&start_line, NULL, opt.threads + 1);
	for (unsigned i = 0; i < opt.threads; i++) {
		k[i].id = i;
		k[i].rng = opt.seed * 1000003u + i;
		k[i].w = w;
		if (posix_memalign((void **)&k[i].buf, BLOCK, 1 << 20))
			die("buffers");
		memset(k[i].buf, 0, 1 << 20);
		if (pthread_create(&th[i], NULL, worker_main, &k[i]))
			die("threads");
	}
	deadline = opt.seconds > 0 ? now_ns() + (uint64_t)(opt.seconds * 1e9) : UINT64_MAX;
	pthread_barrier_wait(&start_line);
	for (unsigned i = 0; i < opt.threads; i++)
		pthread_join(th[i], NULL);
	report(k, opt.threads);
	return 0;
}
