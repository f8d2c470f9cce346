/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The state file. state.c is compiled in here with its system calls replaced
 * by a disk in memory that can lose power: what was not synced is then lost,
 * torn or whole, and directory changes are lost from some point on.
 */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

#include "tests/fault.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SLOW 8				/* sanitizers: fewer cases */
#else
#define SLOW 1
#endif

/* -- The disk -- */

#define FILES 32
#define NAMES 4
#define LOG 64

struct sim_file {
	unsigned char *data;
	size_t len, synced;		/* bytes before `synced` survive */
	bool dirty;			/* overwritten since */
};

static struct sim_disk {
	struct sim_file files[FILES];
	int used;
	struct { char name[64]; int file; } dir[NAMES], dir_synced[NAMES];
	struct { char name[64]; int file; } log[LOG]; /* since the dir's sync */
	int logged;
	long ops, cut;			/* the power goes at this operation */
	bool dead;
	long calls, fail;		/* this call fails, and changes nothing */
	int fail_err;
	size_t pos;
} disk;

static pthread_mutex_t disk_lock = PTHREAD_MUTEX_INITIALIZER;

/* True when the power is gone. */
static bool disk_op(void)
{
	if (disk.cut && ++disk.ops >= disk.cut)
		disk.dead = true;
	return disk.dead;
}

static bool call_fails(void)
{
	bool now = ++disk.calls == disk.fail;

	errno = now ? disk.fail_err : errno;
	return now;
}

static int *dir_find(const char *name, bool make)
{
	for (int i = 0; i < NAMES; i++)
		if (!strcmp(disk.dir[i].name, name))
			return &disk.dir[i].file;
	for (int i = 0; make && i < NAMES; i++)
		if (!disk.dir[i].name[0]) {
			snprintf(disk.dir[i].name, 64, "%s", name);
			disk.dir[i].file = -1;
			return &disk.dir[i].file;
		}
	return NULL;
}

static void dir_set(const char *name, int file)
{
	*dir_find(name, true) = file;
	assert_true(disk.logged < LOG);
	snprintf(disk.log[disk.logged].name, 64, "%s", name);
	disk.log[disk.logged++].file = file;
}

static int dir_get(const char *name)
{
	int *file = dir_find(name, false);

	return file ? *file : -1;
}

#define DIR_FD 1000

static int sim_open(const char *name, int flags, ...)
{
	int file = -1;

	if (call_fails())
		return -1;
	pthread_mutex_lock(&disk_lock);
	if (flags & O_DIRECTORY) {
		pthread_mutex_unlock(&disk_lock);
		return DIR_FD;
	}
	if (flags & O_CREAT) {
		if (!disk_op()) {
			assert_true(disk.used < FILES);
			file = disk.used++;
			disk.files[file] = (struct sim_file){ 0 };
			disk.pos = 0;
			dir_set(name, file);
		} else {
			file = FILES - 1;
		}
	} else {
		file = dir_get(name);
		disk.pos = 0;
	}
	pthread_mutex_unlock(&disk_lock);
	errno = ENOENT;
	return file;
}

static int sim_close(int fd)
{
	(void)fd;
	return call_fails() ? -1 : 0;
}

static void put(struct sim_file *f, const void *buf, size_t n, size_t at)
{
	if (at < f->synced)
		f->dirty = true;
	if (at + n > f->len) {
		f->data = sim_realloc(f->data, at + n);
		memset(f->data + f->len, 0, at + n - f->len);
		f->len = at + n;
	}
	memcpy(f->data + at, buf, n);
}

static ssize_t sim_write(int fd, const void *buf, size_t n)
{
	if (call_fails())
		return -1;
	if (!disk_op()) {
		put(&disk.files[fd], buf, n, disk.pos);
		disk.pos += n;
	}
	return (ssize_t)n;
}

static ssize_t sim_pwrite(int fd, const void *buf, size_t n, off_t at)
{
	if (call_fails())
		return -1;
	if (!disk_op())
		put(&disk.files[fd], buf, n, (size_t)at);
	return (ssize_t)n;
}

static ssize_t sim_read(int fd, void *buf, size_t n)
{
	struct sim_file *f = &disk.files[fd];

	if (call_fails())
		return -1;
	n = n < f->len - disk.pos ? n : f->len - disk.pos;
	memcpy(buf, f->data + disk.pos, n);
	disk.pos += n;
	return (ssize_t)n;
}

static off_t sim_lseek(int fd, off_t at, int how)
{
	(void)fd;
	(void)how;
	if (call_fails())
		return -1;
	disk.pos = (size_t)at;
	return at;
}

static int sim_fstat(int fd, struct stat *st)
{
	st->st_size = 0;
	if (call_fails())
		return -1;
	st->st_size = (off_t)disk.files[fd].len;
	return 0;
}

static int sim_fsync(int fd)
{
	if (call_fails())
		return -1;
	if (disk_op()) {
		errno = EIO;
		return -1;
	}
	if (fd == DIR_FD) {
		memcpy(disk.dir_synced, disk.dir, sizeof(disk.dir));
		disk.logged = 0;
	} else {
		disk.files[fd].synced = disk.files[fd].len;
		disk.files[fd].dirty = false;
	}
	return 0;
}

static int sim_unlink(const char *name)
{
	if (call_fails())
		return -1;
	if (dir_get(name) < 0) {
		errno = ENOENT;
		return -1;
	}
	if (!disk_op())
		dir_set(name, -1);
	return 0;
}

static int sim_link(const char *from, const char *to)
{
	if (call_fails())
		return -1;
	if (dir_get(from) < 0) {
		errno = ENOENT;
		return -1;
	}
	if (!disk_op())
		dir_set(to, dir_get(from));
	return 0;
}

static int sim_rename(const char *from, const char *to)
{
	int file = dir_get(from);

	if (call_fails())
		return -1;
	if (!disk_op()) {
		dir_set(to, file);
		dir_set(from, -1);
	}
	return 0;
}

#define open sim_open
#define close sim_close
#define write sim_write
#define pwrite sim_pwrite
#define read sim_read
#define lseek sim_lseek
#define fstat(fd, st) sim_fstat(fd, st)
#define fsync sim_fsync
#define unlink sim_unlink
#define link sim_link
#define rename sim_rename
#include "alloc/state.c"
#undef open
#undef close
#undef write
#undef read
#undef link

/*
 * After the power came back: directory changes up to `kept` of those not
 * synced happened; of what was not synced in a file `tear` says how much.
 */
enum { TEAR_NONE, TEAR_HALF, TEAR_ALL, TEARS };

static void disk_reboot(int kept, int tear)
{
	memcpy(disk.dir, disk.dir_synced, sizeof(disk.dir));
	for (int i = 0; i < kept; i++)
		*dir_find(disk.log[i].name, true) = disk.log[i].file;
	for (int i = 0; i < disk.used; i++) {
		struct sim_file *f = &disk.files[i];

		if (f->synced == f->len && !f->dirty)
			continue;
		if (tear == TEAR_HALF && f->len)
			memset(f->data + f->len / 2, 0, f->len - f->len / 2);
		if (tear == TEAR_ALL)
			f->len = f->synced;
	}
	memcpy(disk.dir_synced, disk.dir, sizeof(disk.dir));
	disk.logged = 0;
	disk.cut = disk.ops = disk.fail = 0;
	disk.dead = false;
}

static void disk_copy(struct sim_disk *to, const struct sim_disk *from)
{
	for (int i = 0; i < to->used; i++)
		free(to->files[i].data);
	*to = *from;
	for (int i = 0; i < from->used; i++) {
		to->files[i].data = malloc(from->files[i].len + 1);
		if (from->files[i].len)
			memcpy(to->files[i].data, from->files[i].data,
			       from->files[i].len);
	}
}

static void disk_clear(void)
{
	struct sim_disk none = { 0 };

	disk_copy(&disk, &none);
}

/* -- Spaces -- */

static uint64_t random_state = 1;

static uint64_t rnd(void)
{
	uint64_t z = (random_state += 0x9e3779b97f4a7c15ull);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static struct alloc_config config(uint64_t units)
{
	return (struct alloc_config){ .units = units, .state_path = "/s/state",
				      .backup_interval_s = UINT32_MAX,
				      .operation_threshold = UINT32_MAX };
}

static struct alloc *space(uint64_t units)
{
	struct alloc_config cfg = config(units);
	struct alloc *a;

	assert_int_equal(alloc_open(&cfg, NULL, 0, &a), 0);
	return a;
}

static void check(struct alloc *a)
{
	char msg[200] = "";

	if (alloc_check(a, msg, sizeof(msg)))
		fail_msg("%s", msg);
}

/* A number that says what is free. */
static uint64_t picture(struct alloc *a)
{
	uint64_t sum = alloc_free_units(a), at = 0;
	struct extent e;

	while (!alloc_next_free(a, at, &e)) {
		sum = (sum ^ e.start) * 0x9e3779b97f4a7c15ull + e.len;
		at = e.start + e.len;
	}
	return sum;
}

/* Some of everything: full chunks, free ones, few runs, many. */
static void scatter(struct alloc *a, uint64_t units, unsigned steps)
{
	while (steps--) {
		uint64_t start = rnd() % units;
		uint64_t len = 1 + rnd() % (rnd() % 4 ? 20 : 50000);

		len = len < units - start ? len : units - start;
		if (rnd() % 3)
			alloc_exact(a, start, len);
		else
			alloc_free(a, start, len);
	}
}

static void what_was_saved_is_there_again(void **state)
{
	(void)state;
	for (unsigned round = 0; round < 12; round++) {
		uint64_t units = round % 3 ? 9 * ALLOC_CHUNK + round * 77
					   : 1 + round * 50, seen;
		struct alloc *a;

		disk_clear();
		a = space(units);
		scatter(a, units, 1 + round * round * 40);
		for (uint64_t i = 0; round % 2 && i < units && i < ALLOC_CHUNK; i += 2)
			alloc_exact(a, i, 1);
		seen = picture(a);
		assert_int_equal(alloc_close(a), 0);
		a = space(units);
		assert_string_equal(alloc_notice(a), "");
		check(a);
		assert_int_equal(picture(a), seen);
		scatter(a, units, 300);
		check(a);
		assert_int_equal(alloc_close(a), 0);
	}
}

static void the_file_grows_with_what_is_used(void **state)
{
	struct alloc *a;
	struct extent e;
	uint64_t full = 1ull << 38;	/* 1 PiB */

	(void)state;
	disk_clear();
	a = space(full);
	assert_int_equal(alloc_save(a), 0);
	assert_true(disk.files[dir_get("/s/state")].len < 100);
	for (unsigned i = 0; i < 1000; i++)
		assert_int_equal(alloc_any(a, 3, &e), 0);
	assert_int_equal(alloc_save(a), 0);
	assert_true(disk.files[dir_get("/s/state")].len < 200);
	assert_int_equal(alloc_any(a, full / 64, &e), 0);
	assert_int_equal(alloc_close(a), 0);
	assert_true(disk.files[dir_get("/s/state")].len < 200);
	a = space(full);
	assert_int_equal(alloc_free_units(a), full - full / 64 - 3000);
	check(a);
	assert_int_equal(alloc_close(a), 0);
}

static void another_size_is_refused(void **state)
{
	struct alloc_config cfg = config(1001);
	struct alloc *a;

	(void)state;
	disk_clear();
	assert_int_equal(alloc_close(space(1000)), 0);
	assert_int_equal(alloc_open(&cfg, NULL, 0, &a), -EINVAL);
}

static void damage_is_reported_and_the_one_before_used(void **state)
{
	uint64_t units = 5 * ALLOC_CHUNK, first, second;
	struct alloc_config cfg = config(units);
	struct sim_disk keep = { 0 };
	struct alloc *a;
	size_t len;

	(void)state;
	disk_clear();
	a = space(units);
	scatter(a, units, 2000);
	first = picture(a);
	assert_int_equal(alloc_save(a), 0);
	scatter(a, units, 100);
	second = picture(a);
	assert_int_equal(alloc_close(a), 0);
	len = disk.files[dir_get("/s/state")].len;
	disk_copy(&keep, &disk);
	for (size_t i = 0; i < len; i += i < 80 ? SLOW : 1 + rnd() % (97 * SLOW)) {
		struct sim_file *f = &disk.files[dir_get("/s/state")];

		if (rnd() % 2)
			f->data[i] ^= (unsigned char)(1 << rnd() % 8);
		else
			f->len = i;
		a = space(units);
		assert_non_null(strstr(alloc_notice(a), "damaged"));
		assert_int_equal(picture(a), first);
		check(a);
		/* Both damaged: say so, and do not start with an empty space. */
		f = &disk.files[dir_get("/s/state.old")];
		f->data[rnd() % f->len] ^= 4;
		assert_int_equal(alloc_open(&cfg, NULL, 0, &(struct alloc *){ 0 }),
				 -EUCLEAN);
		alloc_close(a);
		disk_copy(&disk, &keep);
	}
	a = space(units);
	assert_int_equal(picture(a), second);
	alloc_close(a);
	disk_copy(&keep, &(struct sim_disk){ 0 });
}

static size_t put_number(unsigned char *at, uint64_t n)
{
	size_t i = 0;

	for (; n > 0x7f; n >>= 7)
		at[i++] = (unsigned char)(n | 0x80);
	at[i++] = (unsigned char)n;
	return i;
}

/* A number that is right, but for one of so many: at the edge, or absurd. */
static unsigned mischief;

static uint64_t some_number(uint64_t about)
{
	switch (rnd() % mischief) {
	case 0:
		return rnd() >> rnd() % 64;
	case 1:
		return about;
	case 2:
		return 0;
	default:
		return about ? rnd() % about : 0;
	}
}

/* Records for about so many chunks, most of them sound. */
static size_t some_records(unsigned char *at, size_t room, uint64_t chunks)
{
	size_t n = 0;

	for (uint64_t c = 0; c < chunks && n + 8192 < room; c++) {
		uint64_t kind = rnd() % 20 ? rnd() % 3 : some_number(5);
		uint64_t edges = 1 + some_number(rnd() % 2 ? 8 : EDGES_MAX);

		n += put_number(at + n, some_number(2));
		n += put_number(at + n, kind);
		if (kind == RECORD_FULL)
			n += put_number(at + n, 1 + some_number(2));
		if (kind == RECORD_EDGES)
			n += put_number(at + n, edges);
		for (uint64_t i = 0; kind == RECORD_EDGES && i < edges &&
				     i < 2 * EDGES_MAX; i++)
			n += put_number(at + n, 1 + some_number(ALLOC_CHUNK / edges));
		for (unsigned i = 0; kind == RECORD_BITS && i < ALLOC_CHUNK_BYTES; i++)
			at[n++] = (unsigned char)(rnd() & rnd());
	}
	return n;
}

static void seal(struct alloc *a, struct sim_file *f, bool right)
{
	struct disk_state *head = (struct disk_state *)f->data;
	unsigned char *body = f->data + sizeof(*head);
	struct reader r = { body, f->data + f->len, a->chunks.count, 0 };

	head->payload_bytes = f->len - sizeof(*head);
	head->payload_xxh3 = XXH3_64bits(body, head->payload_bytes);
	if (right)
		read_records(a, r, false, &head->free_units);
	head->header_xxh3 = XXH3_64bits(head, offsetof(struct disk_state,
						       header_xxh3));
}

/* Whole files with a body that nobody wrote: refused, or a sound space. */
static void no_records_break_the_reader(void **state)
{
	uint64_t units = 5 * ALLOC_CHUNK + 100;
	struct alloc_config cfg = config(units), plain = { .units = units };
	struct sim_disk keep = { 0 };
	unsigned opened = 0, rounds = 4000 / SLOW;
	struct alloc *a, *b;

	(void)state;
	disk_clear();
	assert_int_equal(alloc_close(space(units)), 0);
	disk_copy(&keep, &disk);
	assert_int_equal(alloc_open(&plain, NULL, 0, &b), 0);
	for (unsigned round = 0; round < rounds; round++) {
		struct sim_file *f = &disk.files[dir_get("/s/state")];
		size_t room = 1 << 16;

		f->data = realloc(f->data, room);
		f->len = sizeof(struct disk_state);
		mischief = round % 3 ? 200 : 1000000;
		f->len += some_records(f->data + f->len, room - f->len, 1 + rnd() % 4);
		if (rnd() % 8 == 0)
			f->len -= rnd() % (f->len - sizeof(struct disk_state) + 1);
		seal(b, f, rnd() % 8);
		if (!alloc_open(&cfg, NULL, 0, &a)) {
			check(a);
			opened++;
			alloc_close(a);
		}
		disk_copy(&disk, &keep);
	}
	alloc_close(b);
	print_message("%u of %u opened\n", opened, rounds);
	assert_true(opened > rounds / 20 && opened < rounds);
	disk_copy(&keep, &(struct sim_disk){ 0 });
}

/* The reader, past its checksums. It must refuse or make a sound space. */
static void no_file_breaks_the_reader(void **state)
{
	uint64_t units = 3 * ALLOC_CHUNK + 100;
	struct alloc_config cfg = config(units);
	struct sim_disk keep = { 0 };
	unsigned opened = 0;
	struct alloc *a;

	(void)state;
	disk_clear();
	a = space(units);
	scatter(a, units, 600);
	assert_int_equal(alloc_close(a), 0);
	disk_copy(&keep, &disk);
	for (unsigned round = 0; round < 3000 / SLOW; round++) {
		struct sim_file *f = &disk.files[dir_get("/s/state")];
		struct disk_state *head = (struct disk_state *)f->data;
		size_t n = f->len - sizeof(*head);
		unsigned char *body = f->data + sizeof(*head);

		for (unsigned k = rnd() % 4 + 1; k--;) {
			size_t at = rnd() % n;

			if (rnd() % 8 == 0)
				at = rnd() % 12;
			if (rnd() % 2)
				body[at] = (unsigned char)rnd();
			else
				body[at] ^= (unsigned char)(1 << rnd() % 8);
		}
		if (rnd() % 4 == 0)
			f->len -= rnd() % n;
		n = f->len - sizeof(*head);
		head->payload_bytes = n;
		head->payload_xxh3 = XXH3_64bits(body, n);
		head->free_units += rnd() % 8 ? 0 : rnd() % 3 - 1;
		head->header_xxh3 = XXH3_64bits(
			head, offsetof(struct disk_state, header_xxh3));
		if (!alloc_open(&cfg, NULL, 0, &a)) {
			check(a);
			opened++;
			alloc_close(a);
		}
		disk_copy(&disk, &keep);
	}
	print_message("%u of %u opened\n", opened, 3000 / SLOW);
	disk_copy(&keep, &(struct sim_disk){ 0 });
}

static void a_crash_leaves_the_old_or_the_new(void **state)
{
	uint64_t units = 4 * ALLOC_CHUNK, old_picture, new_picture, got;
	struct sim_disk before = { 0 }, crashed = { 0 };
	unsigned cases = 0;

	(void)state;
	/* The third time round, after the last file was damaged. */
	for (unsigned earlier = SLOW > 1; earlier < 4; earlier += 1 + (SLOW > 1)) {
		bool finished = false;

		disk_clear();
		for (unsigned i = 0; i < earlier; i++) {
			struct alloc *a = space(units);

			scatter(a, units, 300);
			assert_int_equal(alloc_close(a), 0);
		}
		if (earlier == 3)
			disk.files[dir_get("/s/state")].data[9] ^= 1;
		disk_copy(&before, &disk);
		for (long cut = 1; !finished; cut++) {
			struct alloc *a;
			int err, logged;

			disk_copy(&disk, &before);
			a = space(units);
			old_picture = picture(a);
			random_state = 77;
			scatter(a, units, 4000 / SLOW);
			new_picture = picture(a);
			disk.ops = 0;
			disk.cut = cut;
			err = alloc_save(a);
			finished = !disk.dead;
			assert_int_equal(!err, finished);
			disk.dead = true;
			disk.cut = 1;
			alloc_close(a);
			disk_copy(&crashed, &disk);
			logged = disk.logged;
			for (int kept = 0; kept <= logged; kept++)
				for (int tear = 0; tear < TEARS; tear++) {
					disk_copy(&disk, &crashed);
					disk_reboot(kept, tear);
					a = space(units);
					got = picture(a);
					assert_true(got == new_picture ||
						    (!finished &&
						     got == old_picture));
					check(a);
					alloc_close(a);
					cases++;
				}
		}
	}
	print_message("%u crashes\n", cases);
	disk_copy(&before, &(struct sim_disk){ 0 });
	disk_copy(&crashed, &(struct sim_disk){ 0 });
}

/* One call fails, or one allocation of memory: the save says so, and is undone. */
static void fail_next(long call, int err, bool memory)
{
	disk.calls = 0;
	disk.fail = memory ? 0 : call;
	disk.fail_err = err;
	fault_memory(memory ? (uint64_t)call - 1 : UINT64_MAX, false);
}

/* Whether it came to that. */
static bool has_failed(long call, bool memory)
{
	uint64_t calls = fault_memory(UINT64_MAX, false);
	bool failed = memory ? calls >= (uint64_t)call : disk.calls >= call;

	disk.fail = 0;
	return failed;
}

static void a_save_that_fails_leaves_the_old_or_the_new(void **state)
{
	static const int errors[] = {EIO, ENOSPC, EINTR, EPERM, 0 /* memory */};
	uint64_t units = 12 * ALLOC_CHUNK, old_picture, new_picture, got;
	struct sim_disk before = { 0 };
	unsigned saves = 0, refused = 0;

	(void)state;
	disk_clear();
	for (unsigned i = 0; i < 2; i++) {
		struct alloc *a = space(units);

		scatter(a, units, 300);
		assert_int_equal(alloc_close(a), 0);
	}
	disk_copy(&before, &disk);
	for (unsigned e = 0; e < 5; e++) {
		bool failed = true;

		for (long call = 1; failed; call++) {
			struct alloc *a, *b;
			int err;

			disk_copy(&disk, &before);
			a = space(units);
			old_picture = picture(a);
			random_state = 78;
			scatter(a, units, 2000);
			new_picture = picture(a);
			fail_next(call, errors[e], !errors[e]);
			err = alloc_save(a);
			failed = has_failed(call, !errors[e]);
			assert_true(!err || (failed && (err == -errors[e] ||
							(!errors[e] && err == -ENOMEM))));
			assert_true(failed || !err);
			refused += err != 0;
			saves++;
			/* What others find now. */
			b = space(units);
			got = picture(b);
			assert_true(got == new_picture || (err && got == old_picture));
			assert_string_equal(err ? "" : alloc_notice(b), "");
			assert_int_equal(alloc_close(b), 0);
			/* And it is not used up by that. */
			assert_int_equal(picture(a), new_picture);
			assert_int_equal(alloc_save(a), 0);
			check(a);
			assert_int_equal(alloc_close(a), 0);
			a = space(units);
			assert_int_equal(picture(a), new_picture);
			assert_int_equal(alloc_close(a), 0);
		}
	}
	print_message("%u saves, %u refused\n", saves, refused);
	assert_true(refused > 20);
	disk_copy(&before, &(struct sim_disk){ 0 });
}

static void a_file_that_cannot_be_read_is_not_taken_for_none(void **state)
{
	static const int errors[] = {EIO, EINTR, 0 /* memory */};
	uint64_t units = 4 * ALLOC_CHUNK, want = 0;
	struct alloc *a;

	(void)state;
	disk_clear();
	/* There is one before it, which must not be taken for it. */
	for (unsigned i = 0; i < 2; i++) {
		a = space(units);
		scatter(a, units, 500);
		want = picture(a);
		assert_int_equal(alloc_close(a), 0);
	}
	for (unsigned e = 0; e < 3; e++) {
		bool failed = true;

		for (long call = 1; failed; call++) {
			struct alloc_config cfg = config(units);
			int err;

			fail_next(call, errors[e], !errors[e]);
			err = alloc_open(&cfg, NULL, 0, &a);
			failed = has_failed(call, !errors[e]);
			assert_true(failed || !err);
			if (!err) {
				assert_int_equal(picture(a), want);
				assert_string_equal(alloc_notice(a), "");
				assert_int_equal(alloc_close(a), 0);
				continue;
			}
			if (errors[e])
				assert_int_equal(err, -errors[e]);
			else
				assert_true(err == -ENOMEM || err == -EAGAIN);
		}
	}
	a = space(units);
	assert_int_equal(picture(a), want);
	assert_int_equal(alloc_close(a), 0);
}

static void a_path_too_long_is_refused(void **state)
{
	static char path[PATH_MAX];
	struct alloc_config cfg = config(1000);
	struct alloc *a;

	(void)state;
	memset(path, 'x', sizeof(path) - 1);
	cfg.state_path = path;
	assert_int_equal(alloc_open(&cfg, NULL, 0, &a), -ENAMETOOLONG);
}

/*
 * Threads move tokens: each takes a run of 7 units before it frees another of
 * 7, so at every moment of which a save may be, whole runs are in use, and of
 * each thread either so many or one more.
 */
#define MOVERS 8
#define TOKENS 200

struct mover {
	struct alloc *a;
	bool *stop;
};

static void *mover_run(void *arg)
{
	struct mover *m = arg;
	struct extent held[TOKENS];
	uint64_t r = (uintptr_t)m;

	for (unsigned i = 0; i < TOKENS; i++)
		if (alloc_any(m->a, 7, &held[i]))
			abort();
	while (!__atomic_load_n(m->stop, __ATOMIC_RELAXED)) {
		unsigned i = (unsigned)((r = r * 6364136223846793005ull + 1) >> 33) %
			     TOKENS;
		struct extent e;

		if (alloc_any(m->a, 7, &e) ||
		    alloc_free(m->a, held[i].start, held[i].len))
			abort();
		held[i] = e;
	}
	return NULL;
}

static void a_save_is_one_point_in_time(void **state)
{
	uint64_t units = 6 * ALLOC_CHUNK;
	bool stop = false;
	struct mover movers[MOVERS];
	pthread_t threads[MOVERS];
	struct sim_disk keep = { 0 };
	struct alloc *a, *b;

	(void)state;
	disk_clear();
	a = space(units);
	/* Holes all over, so that runs lie in every chunk. */
	assert_int_equal(alloc_exact(a, 0, units), 0);
	for (uint64_t i = 0; i + 7 < units; i += 50)
		assert_int_equal(alloc_free(a, i, 7), 0);
	for (unsigned i = 0; i < MOVERS; i++) {
		movers[i] = (struct mover){ a, &stop };
		pthread_create(&threads[i], NULL, mover_run, &movers[i]);
	}
	for (unsigned round = 0; round < 30 / SLOW + 7; round++) {
		uint64_t free_units, holes = (units - 8) / 50 + 1, used;

		disk_clear();
		assert_int_equal(alloc_save(a), 0);
		disk_copy(&keep, &disk);
		b = space(units);
		check(b);
		free_units = alloc_free_units(b);
		used = holes * 7 - free_units;
		assert_int_equal(used % 7, 0);
		assert_true(used / 7 <= MOVERS * (TOKENS + 1));
		if (round > 5)
			assert_true(used / 7 >= MOVERS * TOKENS / 2);
		assert_int_equal(alloc_close(b), 0);
	}
	__atomic_store_n(&stop, true, __ATOMIC_RELAXED);
	for (unsigned i = 0; i < MOVERS; i++)
		pthread_join(threads[i], NULL);
	check(a);
	disk_clear();
	assert_int_equal(alloc_close(a), 0);
	disk_copy(&keep, &(struct sim_disk){ 0 });
}

/* What a chunk was is written or dropped; it never waits for the next save. */
static void an_image_is_used_up_without_memory(void **state)
{
	uint64_t units = 2 * ALLOC_CHUNK, index, count;
	struct writer w = { .buf = malloc(BUFFER_BYTES) };
	struct alloc *a;
	struct op op;
	bool free_ones;

	(void)state;
	disk_clear();
	a = space(units);
	assert_int_equal(alloc_exact(a, ALLOC_CHUNK + 5, 10), 0);
	assert_int_equal(op_enter_world(a, &op), 0);
	chunks_save_begin(&a->chunks);
	op_leave(&op);
	assert_int_equal(alloc_free(a, ALLOC_CHUNK + 5, 10), 0);
	assert_non_null(chunks_peek(&a->chunks, 1)->image);
	fault_memory(0, true);
	while (pool_get(&a->by_size.pool))
		;
	while (chunks_save_next(&a->chunks, &index, &count, &free_ones))
		write_chunk(a, &w, index);
	fault_memory(UINT64_MAX, false);
	assert_null(chunks_peek(&a->chunks, 1)->image);
	assert_int_equal(alloc_close(a), 0);
	a = space(units);
	assert_int_equal(alloc_free_units(a), units);
	assert_int_equal(alloc_close(a), 0);
	free(w.buf);
}

static void calls_and_time_bring_a_save(void **state)
{
	struct alloc_config cfg = config(1000);
	struct alloc_stats st = { 0 };
	struct alloc *a;
	struct extent e;

	(void)state;
	disk_clear();
	cfg.operation_threshold = 10;
	assert_int_equal(alloc_open(&cfg, NULL, 0, &a), 0);
	for (unsigned i = 0; i < 10; i++)
		assert_int_equal(alloc_any(a, 1, &e), 0);
	for (unsigned i = 0; i < 2000 && !st.saves; i++) {
		usleep(1000);
		assert_int_equal(alloc_stats(a, false, &st), 0);
	}
	assert_int_equal(st.saves, 1);
	assert_int_equal(alloc_close(a), 0);

	cfg.operation_threshold = UINT32_MAX;
	cfg.backup_interval_s = 1;
	assert_int_equal(alloc_open(&cfg, NULL, 0, &a), 0);
	for (st.saves = 0; !st.saves;) {
		usleep(10000);
		assert_int_equal(alloc_stats(a, false, &st), 0);
	}
	assert_int_equal(alloc_close(a), 0);
	disk_clear();
}

/* -- The manual -- */

/* What stands between its two marks, as nroff prints it. */
static bool example_print(const char *page, const char *to)
{
	FILE *in = fopen(page, "r"), *out = fopen(to, "w");
	bool inside = false;
	char line[400];

	while (in && out && fgets(line, sizeof(line), in)) {
		if (line[0] == '.') {
			inside = !strncmp(line, ".\\\" example", 11) ||
				 (inside && strncmp(line, ".\\\" end", 7));
			continue;
		}
		for (const char *p = line; inside && *p; p++) {
			fputc(*p, out);
			p += p[0] == '\\' && p[1] == 'e';
		}
	}
	if (in)
		fclose(in);
	return out && !fclose(out) && in;
}

/* From the folder of the sources, where tests are run; with cc. */
static void the_example_compiles_as_printed(void **state)
{
	char dir[] = "/tmp/spaceweave-example-XXXXXX", cmd[2000], line[200] = "";
	const char *cc = getenv("CC");
	FILE *f;

	(void)state;
	if (access("alloc/spaceweave-alloc.3", R_OK) ||
	    system("command -v ${CC:-cc} >/dev/null"))
		skip();
	assert_non_null(mkdtemp(dir));
	snprintf(cmd, sizeof(cmd), "%s/example.c", dir);
	assert_true(example_print("alloc/spaceweave-alloc.3", cmd));
	/* One state file is left by the first run, and read by the second. */
	snprintf(cmd, sizeof(cmd),
		 "ln -s \"$PWD/alloc\" %s/spaceweave && "
		 "%s -Wall -Wextra -Werror -I%s -o %s/example %s/example.c "
		 "-I. -D_GNU_SOURCE -std=gnu11 alloc/*.c -pthread && cd %s && "
		 "./example && ./example && ls", dir, cc ? cc : "cc", dir, dir, dir, dir);
	f = popen(cmd, "r");
	assert_non_null(f);
	for (unsigned i = 0; i < 2; i++) {
		assert_non_null(fgets(line, sizeof(line), f));
		assert_string_equal(line, "100000 bytes at 0, 0.000024 in use\n");
	}
	while (fgets(line, sizeof(line), f))
		;
	assert_int_equal(pclose(f), 0);
	snprintf(cmd, sizeof(cmd), "rm -rf %s", dir);
	assert_int_equal(system(cmd), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(what_was_saved_is_there_again),
		cmocka_unit_test(the_file_grows_with_what_is_used),
		cmocka_unit_test(another_size_is_refused),
		cmocka_unit_test(damage_is_reported_and_the_one_before_used),
		cmocka_unit_test(no_file_breaks_the_reader),
		cmocka_unit_test(no_records_break_the_reader),
		cmocka_unit_test(a_crash_leaves_the_old_or_the_new),
		cmocka_unit_test(a_save_that_fails_leaves_the_old_or_the_new),
		cmocka_unit_test(a_file_that_cannot_be_read_is_not_taken_for_none),
		cmocka_unit_test(a_path_too_long_is_refused),
		cmocka_unit_test(a_save_is_one_point_in_time),
		cmocka_unit_test(an_image_is_used_up_without_memory),
		cmocka_unit_test(calls_and_time_bring_a_save),
		cmocka_unit_test(the_example_compiles_as_printed),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
