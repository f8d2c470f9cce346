/* SPDX-License-Identifier: BSD-2-Clause */
#include "tests/fault.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <malloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* ---- memory that fails -------------------------------------------------------
 *
 * The tests are linked with --wrap for these, so that only the calls of our
 * own objects come here; what this file allocates goes straight on.
 */

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__real_aligned_alloc(size_t align, size_t n);
int __real_posix_memalign(void **out, size_t align, size_t n);
void *__real_mmap64(void *at, size_t n, int prot, int flags, int fd, off_t off);
int __real_pthread_create(pthread_t *t, const pthread_attr_t *attr,
			  void *(*run)(void *), void *arg);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);
void *__wrap_aligned_alloc(size_t align, size_t n);
int __wrap_posix_memalign(void **out, size_t align, size_t n);
void *__wrap_mmap64(void *at, size_t n, int prot, int flags, int fd, off_t off);
int __wrap_pthread_create(pthread_t *t, const pthread_attr_t *attr,
			  void *(*run)(void *), void *arg);

static __thread uint64_t memory_calls;
static __thread uint64_t memory_fail = UINT64_MAX;
static __thread bool memory_for_ever;

static __thread bool memory_paused;

static __thread void (*growing)(void *ctx);
static __thread void *growing_ctx;

static bool memory_fails(void)
{
	uint64_t n;

	if (memory_paused)
		return false;
	n = memory_calls++;
	return n == memory_fail || (memory_for_ever && n > memory_fail);
}

void *__wrap_malloc(size_t n)
{
	return memory_fails() ? NULL : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t size)
{
	return memory_fails() ? NULL : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t n)
{
	void (*fn)(void *ctx) = p ? growing : NULL;

	if (fn) {
		growing = NULL;
		fn(growing_ctx);
	}
	return memory_fails() ? NULL : __real_realloc(p, n);
}

void *__wrap_aligned_alloc(size_t align, size_t n)
{
	return memory_fails() ? NULL : __real_aligned_alloc(align, n);
}

int __wrap_posix_memalign(void **out, size_t align, size_t n)
{
	return memory_fails() ? ENOMEM : __real_posix_memalign(out, align, n);
}

void *__wrap_mmap64(void *at, size_t n, int prot, int flags, int fd, off_t off)
{
	if (!memory_fails())
		return __real_mmap64(at, n, prot, flags, fd, off);
	errno = ENOMEM;
	return MAP_FAILED;
}

int __wrap_pthread_create(pthread_t *t, const pthread_attr_t *attr,
			  void *(*run)(void *), void *arg)
{
	return memory_fails() ? EAGAIN : __real_pthread_create(t, attr, run, arg);
}

uint64_t fault_memory(uint64_t n, bool for_ever)
{
	uint64_t calls = memory_calls;

	memory_calls = 0;
	memory_fail = n;
	memory_for_ever = for_ever;
	return calls;
}

void fault_growing(void (*fn)(void *ctx), void *ctx)
{
	growing = fn;
	growing_ctx = ctx;
}

void *sim_malloc(size_t n) { return __real_malloc(n); }
void *sim_calloc(size_t n, size_t size) { return __real_calloc(n, size); }
void *sim_realloc(void *p, size_t n) { return __real_realloc(p, n); }

/* A volume's big blocks come and go with each crash state: keep them. */
__attribute__((constructor)) static void memory_keep(void)
{
	mallopt(M_MMAP_THRESHOLD, 1 << 30);
	mallopt(M_TRIM_THRESHOLD, 1 << 30);
	mallopt(M_TOP_PAD, 16 << 20);
}

static void *must(void *p)
{
	if (!p) {
		fputs("fault: out of memory\n", stderr);
		abort();
	}
	return p;
}

/* ---- pages over pages --------------------------------------------------------- */

struct page {
	struct page *next;	/* free list */
	uint8_t data[FAULT_PAGE];
};

/* Pages of its own, and for the others those of `under`, or zeroes. */
struct disk {
	const struct disk *under;
	uint64_t pages;
	struct page **page;
	uint32_t *own;		/* numbers of its own pages */
	uint32_t owned, own_room;
	struct page *free;
};

static const uint8_t zeroes[FAULT_PAGE];

static void disk_init(struct disk *d, const struct disk *under, uint64_t pages)
{
	memset(d, 0, sizeof(*d));
	d->under = under;
	d->pages = pages;
	d->page = must(__real_calloc(pages ? pages : 1, sizeof(*d->page)));
}

static void disk_reset(struct disk *d, const struct disk *under)
{
	for (uint32_t i = 0; i < d->owned; i++) {
		struct page *p = d->page[d->own[i]];

		d->page[d->own[i]] = NULL;
		p->next = d->free;
		d->free = p;
	}
	d->owned = 0;
	d->under = under;
}

static void disk_resize(struct disk *d, uint64_t pages)
{
	if (pages > d->pages) {
		d->page = must(__real_realloc(d->page, pages * sizeof(*d->page)));
		memset(d->page + d->pages, 0,
		       (pages - d->pages) * sizeof(*d->page));
		d->pages = pages;
	}
}

static void disk_fini(struct disk *d)
{
	disk_reset(d, NULL);
	while (d->free) {
		struct page *p = d->free;

		d->free = p->next;
		free(p);
	}
	free(d->page);
	free(d->own);
}

static const uint8_t *disk_look(const struct disk *d, uint64_t n)
{
	for (; d; d = d->under)
		if (n < d->pages && d->page[n])
			return d->page[n]->data;
	return zeroes;
}

static uint8_t *disk_own(struct disk *d, uint64_t n, bool whole)
{
	struct page *p;

	if (d->page[n])
		return d->page[n]->data;
	p = d->free;
	if (p)
		d->free = p->next;
	else
		p = must(__real_malloc(sizeof(*p)));
	if (!whole)
		memcpy(p->data, disk_look(d->under, n), FAULT_PAGE);
	if (d->owned == d->own_room) {
		d->own_room = d->own_room ? 2 * d->own_room : 64;
		d->own = must(__real_realloc(d->own,
					     d->own_room * sizeof(*d->own)));
	}
	d->own[d->owned++] = (uint32_t)n;
	d->page[n] = p;
	return p->data;
}

static void disk_read(const struct disk *d, void *buf, size_t len, uint64_t off)
{
	uint8_t *to = buf;

	while (len) {
		size_t in = off % FAULT_PAGE;
		size_t n = FAULT_PAGE - in < len ? FAULT_PAGE - in : len;

		memcpy(to, disk_look(d, off / FAULT_PAGE) + in, n);
		to += n, off += n, len -= n;
	}
}

/* buf NULL: zeroes. */
static void disk_write(struct disk *d, const void *buf, size_t len, uint64_t off)
{
	const uint8_t *from = buf;

	while (len) {
		size_t in = off % FAULT_PAGE;
		size_t n = FAULT_PAGE - in < len ? FAULT_PAGE - in : len;
		uint8_t *to = disk_own(d, off / FAULT_PAGE, n == FAULT_PAGE);

		if (from) {
			memcpy(to + in, from, n);
			from += n;
		} else {
			memset(to + in, 0, n);
		}
		off += n, len -= n;
	}
}

/* ---- the image ------------------------------------------------------------------ */

enum event_type {
	EVENT_WRITE,		/* data at off */
	EVENT_DISCARD,
	EVENT_FLUSH,		/* covers the events before `value` */
	EVENT_STARTED,
	EVENT_PROMISED,
};

struct event {
	enum event_type type;
	bool lost;		/* a failed flush gave it up */
	uint32_t len;
	uint32_t who;
	uint64_t off;
	uint64_t value;
	uint8_t *data;
};

struct fault {
	struct image im;
	pthread_mutex_t m;
	struct disk base;	/* what is durable, where the log begins */
	struct disk now;	/* over it */
	struct event *log;
	uint64_t events, room;
	bool record, lie, keep_discarded, frozen, paused;
	unsigned slow_us;
	uint64_t count[FAULT_CALLS + 1];
	uint64_t failures;
	enum fault_call fail_kind;
	uint64_t fail_at;
	int fail_err;
	bool fail_for_ever, fail_torn;
	struct {
		pthread_t thread;
		uint64_t calls, at;
		enum fault_when when;
		void (*fn)(void *ctx);
		void *ctx;
	} between;
	/* For fault_explore(): what has passed, kept from one call to the next. */
	uint64_t number, flushes;
	struct rng rng;
	bool exploring;
};

static struct fault *of(struct image *im) { return (struct fault *)im; }

static struct event *log_add(struct fault *f, enum event_type type)
{
	if (f->events == f->room) {
		f->room = f->room ? 2 * f->room : 64;
		f->log = must(__real_realloc(f->log, f->room * sizeof(*f->log)));
	}
	struct event *e = &f->log[f->events++];

	memset(e, 0, sizeof(*e));
	e->type = type;
	return e;
}

static void log_write(struct fault *f, const void *buf, size_t len, uint64_t off)
{
	struct event *e;

	if (!f->record)
		return;
	e = log_add(f, EVENT_WRITE);
	e->len = (uint32_t)len;
	e->off = off;
	e->data = must(__real_malloc(len ? len : 1));
	memcpy(e->data, buf, len);
}

static void log_clear(struct fault *f, uint64_t upto)
{
	for (uint64_t i = 0; i < upto; i++)
		free(f->log[i].data);
	if (upto < f->events)
		memmove(f->log, f->log + upto, (f->events - upto) * sizeof(*f->log));
	f->events -= upto;
}

/* Count a call; is it to fail? */
static bool fails(struct fault *f, enum fault_call kind)
{
	uint64_t n;

	if (f->paused)
		return false;
	n = f->count[kind]++;
	if (kind != FAULT_READ) {
		uint64_t all = f->count[FAULT_CALLS]++;

		if (f->fail_kind == FAULT_CALLS)
			n = all;
	}
	if (!f->fail_err || (f->fail_kind != kind &&
			     (f->fail_kind != FAULT_CALLS || kind == FAULT_READ)))
		return false;
	if (n != f->fail_at && !(f->fail_for_ever && n > f->fail_at))
		return false;
	f->failures++;
	return true;
}

/* In the midst of call `n` of the thread that fault_between() is about. */
static void between(struct fault *f, uint64_t n, enum fault_when when)
{
	if (n != UINT64_MAX && n == f->between.at && when == f->between.when)
		f->between.fn(f->between.ctx);
}

/* A call begins: its number, or UINT64_MAX if it is another thread's. */
static uint64_t between_begin(struct fault *f)
{
	uint64_t n;

	if (!f->between.fn || !pthread_equal(f->between.thread, pthread_self()))
		return UINT64_MAX;
	n = f->between.calls++;
	between(f, n, FAULT_BEFORE);
	return n;
}

static int f_pread(struct image *im, void *buf, size_t len, uint64_t off)
{
	struct fault *f = of(im);
	int err = 0;

	pthread_mutex_lock(&f->m);
	if (off > im->bytes || len > im->bytes - off)
		err = -ENXIO;
	else if (fails(f, FAULT_READ))
		err = -f->fail_err;
	else
		disk_read(&f->now, buf, len, off);
	pthread_mutex_unlock(&f->m);
	return err;
}

static int f_pwritev(struct image *im, const struct iovec *iov, int n, uint64_t off)
{
	struct fault *f = of(im);
	uint64_t call = between_begin(f);
	size_t len = 0;
	int err = 0;

	for (int i = 0; i < n; i++)
		len += iov[i].iov_len;
	pthread_mutex_lock(&f->m);
	if (f->frozen || im->readonly) {
		f->failures++;
		err = -EROFS;
	} else if (off > im->bytes || len > im->bytes - off) {
		err = -ENXIO;
	} else {
		bool bad = fails(f, FAULT_WRITE);
		size_t left = len;

		if (bad) {
			err = -f->fail_err;
			left = f->fail_torn ? len / 2 / FAULT_SECTOR * FAULT_SECTOR : 0;
		}
		for (int i = 0; i < n && left; i++) {
			size_t take = iov[i].iov_len < left ? iov[i].iov_len : left;

			disk_write(&f->now, iov[i].iov_base, take, off);
			/* One event for each piece: they may part. */
			log_write(f, iov[i].iov_base, take, off);
			off += take;
			left -= take;
		}
	}
	pthread_mutex_unlock(&f->m);
	between(f, call, FAULT_AFTER);
	return err;
}

static int f_pwrite(struct image *im, const void *buf, size_t len, uint64_t off)
{
	struct iovec v = {.iov_base = (void *)buf, .iov_len = len};

	return f_pwritev(im, &v, 1, off);
}

static int f_flush(struct image *im)
{
	struct fault *f = of(im);
	uint64_t call = between_begin(f), begin;
	bool bad;
	int err = 0;

	pthread_mutex_lock(&f->m);
	begin = f->events;
	bad = fails(f, FAULT_FLUSH);
	if (bad)
		err = -f->fail_err;
	pthread_mutex_unlock(&f->m);
	if (f->slow_us)
		usleep(f->slow_us);
	between(f, call, FAULT_DURING);
	pthread_mutex_lock(&f->m);
	if (bad && f->fail_torn) {
		uint64_t durable = 0;

		for (uint64_t i = 0; i < f->events; i++)
			if (f->log[i].type == EVENT_FLUSH &&
			    f->log[i].value > durable)
				durable = f->log[i].value;
		for (uint64_t i = durable; i < begin; i++)
			f->log[i].lost = true;
	}
	if (!bad && f->record && !f->lie)
		log_add(f, EVENT_FLUSH)->value = begin;
	pthread_mutex_unlock(&f->m);
	between(f, call, FAULT_AFTER);
	return err;
}

static int f_discard(struct image *im, uint64_t off, uint64_t len)
{
	struct fault *f = of(im);
	uint64_t call = between_begin(f);
	int err = 0;

	pthread_mutex_lock(&f->m);
	if (f->frozen || im->readonly) {
		f->failures++;
		err = -EROFS;
	} else if (off > im->bytes || len > im->bytes - off) {
		err = -ENXIO;
	} else if (fails(f, FAULT_DISCARD)) {
		err = -f->fail_err;
	} else if (!f->keep_discarded) {
		disk_write(&f->now, NULL, len, off);
		if (f->record) {
			struct event *e = log_add(f, EVENT_DISCARD);

			e->off = off;
			e->len = (uint32_t)len;
		}
	}
	pthread_mutex_unlock(&f->m);
	between(f, call, FAULT_AFTER);
	return err;
}

/* Does the host have it? What was ever written, it has. */
static bool is_mapped(const struct fault *f, uint64_t off, uint64_t len)
{
	for (uint64_t n = off / FAULT_PAGE; n * FAULT_PAGE < off + len; n++)
		if (disk_look(&f->now, n) == zeroes)
			return false;
	return true;
}

static int f_ensure(struct image *im, uint64_t off, uint64_t len)
{
	struct fault *f = of(im);
	int err = 0;

	pthread_mutex_lock(&f->m);
	if (off > im->bytes || len > im->bytes - off)
		err = -ENXIO;
	else if (fails(f, FAULT_ENSURE) &&
		 !(f->fail_err == ENOSPC && is_mapped(f, off, len)))
		err = -f->fail_err;
	pthread_mutex_unlock(&f->m);
	return err;
}

static int f_mapped(struct image *im, uint64_t *off, uint64_t *len)
{
	struct fault *f = of(im);
	uint64_t page = (*off + FAULT_PAGE - 1) / FAULT_PAGE, from;

	pthread_mutex_lock(&f->m);
	while (page < f->now.pages && disk_look(&f->now, page) == zeroes)
		page++;
	from = page;
	while (page < f->now.pages && disk_look(&f->now, page) != zeroes)
		page++;
	pthread_mutex_unlock(&f->m);
	*off = from * FAULT_PAGE;
	*len = (page - from) * FAULT_PAGE;
	return page > from ? 0 : -ENOENT;
}

/* What a failed flush gave up is not shown any more, so it is not on the disk. */
static void f_forget(struct image *im, uint64_t off, uint64_t len)
{
	struct fault *f = of(im);
	bool any = false;

	(void)off, (void)len;
	pthread_mutex_lock(&f->m);
	for (uint64_t i = 0; i < f->events; i++) {
		struct event *e = &f->log[i];

		if (!e->lost || (e->type != EVENT_WRITE && e->type != EVENT_DISCARD))
			continue;
		*e = (struct event){.type = EVENT_WRITE, .data = e->data};
		any = true;
	}
	if (any)
		disk_reset(&f->now, &f->base);
	for (uint64_t i = 0; any && i < f->events; i++) {
		const struct event *e = &f->log[i];

		if (e->type == EVENT_WRITE || e->type == EVENT_DISCARD)
			disk_write(&f->now, e->data, e->len, e->off);
	}
	pthread_mutex_unlock(&f->m);
}

static int f_resize(struct image *im, uint64_t bytes)
{
	struct fault *f = of(im);
	uint64_t pages = (bytes + FAULT_PAGE - 1) / FAULT_PAGE;

	pthread_mutex_lock(&f->m);
	disk_resize(&f->base, pages);
	disk_resize(&f->now, pages);
	im->bytes = bytes;
	pthread_mutex_unlock(&f->m);
	return 0;
}

static void f_close(struct image *im)
{
	(void)im;		/* the test owns it */
}

static const struct image_ops fault_ops = {
	.pread = f_pread,
	.pwrite = f_pwrite,
	.pwritev = f_pwritev,
	.flush = f_flush,
	.discard = f_discard,
	.ensure = f_ensure,
	.mapped = f_mapped,
	.forget = f_forget,
	.resize = f_resize,
	.close = f_close,
};

struct fault *fault_create(uint64_t bytes)
{
	struct fault *f = must(__real_calloc(1, sizeof(*f)));
	uint64_t pages = (bytes + FAULT_PAGE - 1) / FAULT_PAGE;

	f->im.ops = &fault_ops;
	f->im.bytes = bytes;
	f->im.name = (char *)"simulated image";
	pthread_mutex_init(&f->m, NULL);
	disk_init(&f->base, NULL, pages);
	disk_init(&f->now, &f->base, pages);
	return f;
}

struct fault *fault_create_over(const struct fault *under)
{
	struct fault *f = fault_create(under->im.bytes);

	f->base.under = &under->now;
	return f;
}

/* Forget everything but the memory. */
static void fault_clear(struct fault *f, const struct disk *under, uint64_t bytes)
{
	log_clear(f, f->events);
	f_resize(&f->im, bytes);
	disk_reset(&f->base, under);
	disk_reset(&f->now, &f->base);
	f->im.readonly = false;
	f->record = f->lie = f->keep_discarded = f->frozen = f->paused = false;
	f->exploring = false;
	f->slow_us = 0;
	f->fail_err = 0;
	f->failures = 0;
	f->between.fn = NULL;
	memset(f->count, 0, sizeof(f->count));
}

void fault_fork(struct fault *f, const struct fault *under)
{
	fault_clear(f, &under->now, under->im.bytes);
}

void fault_destroy(struct fault *f)
{
	if (!f)
		return;
	log_clear(f, f->events);
	free(f->log);
	disk_fini(&f->now);
	disk_fini(&f->base);
	pthread_mutex_destroy(&f->m);
	free(f);
}

struct image *fault_image(struct fault *f) { return &f->im; }

void fault_peek(const struct fault *f, void *buf, size_t len, uint64_t off)
{
	assert(off <= f->im.bytes && len <= f->im.bytes - off);
	disk_read(&f->now, buf, len, off);
}

void fault_poke(struct fault *f, const void *buf, size_t len, uint64_t off)
{
	assert(off <= f->im.bytes && len <= f->im.bytes - off);
	disk_write(&f->now, buf, len, off);
}

void fault_record(struct fault *f, bool on)
{
	pthread_mutex_lock(&f->m);
	log_clear(f, f->events);
	for (uint32_t i = 0; i < f->now.owned; i++)
		disk_write(&f->base, f->now.page[f->now.own[i]]->data,
			   FAULT_PAGE, (uint64_t)f->now.own[i] * FAULT_PAGE);
	disk_reset(&f->now, &f->base);
	f->record = on;
	f->exploring = false;
	pthread_mutex_unlock(&f->m);
}

void fault_lie(struct fault *f, bool on) { f->lie = on; }
void fault_keep_discarded(struct fault *f, bool on) { f->keep_discarded = on; }
void fault_freeze(struct fault *f, bool on) { f->frozen = on; }
void fault_slow_flush(struct fault *f, unsigned us) { f->slow_us = us; }

void fault_fail(struct fault *f, enum fault_call kind, uint64_t n, int err,
		bool for_ever, bool torn)
{
	pthread_mutex_lock(&f->m);
	f->fail_kind = kind;
	f->fail_at = n + f->count[kind];
	f->fail_err = err;
	f->fail_for_ever = for_ever;
	f->fail_torn = torn;
	f->failures = 0;
	pthread_mutex_unlock(&f->m);
}

uint64_t fault_between(struct fault *f, uint64_t n, enum fault_when when,
		       void (*fn)(void *ctx), void *ctx)
{
	uint64_t calls = f->between.calls;

	f->between.thread = pthread_self();
	f->between.calls = 0;
	f->between.at = n;
	f->between.when = when;
	f->between.fn = fn;
	f->between.ctx = ctx;
	return calls;
}

void fault_pause(struct fault *f, bool on)
{
	f->paused = on;
	memory_paused = on;
}

uint64_t fault_count(const struct fault *f, enum fault_call kind)
{
	return f->count[kind];
}

uint64_t fault_failures(const struct fault *f) { return f->failures; }

static void note(struct fault *f, enum event_type type, unsigned who, uint64_t t)
{
	pthread_mutex_lock(&f->m);
	if (f->record) {
		struct event *e = log_add(f, type);

		e->who = who;
		e->value = t;
	}
	pthread_mutex_unlock(&f->m);
}

void fault_started(struct fault *f, uint64_t t) { note(f, EVENT_STARTED, 0, t); }
void fault_promised(struct fault *f, uint64_t t) { note(f, EVENT_PROMISED, 0, t); }

void fault_started_by(struct fault *f, unsigned who, uint64_t t)
{
	assert(who < FAULT_WHO);
	note(f, EVENT_STARTED, who, t);
}

void fault_promised_by(struct fault *f, unsigned who, uint64_t t)
{
	assert(who < FAULT_WHO);
	note(f, EVENT_PROMISED, who, t);
}

uint64_t fault_log_length(const struct fault *f) { return f->events; }

void fault_log_print(const struct fault *f)
{
	for (uint64_t i = 0; i < f->events; i++) {
		const struct event *e = &f->log[i];

		switch (e->type) {
		case EVENT_WRITE:
			fprintf(stderr, "%5" PRIu64 " write %8" PRIu64 " +%u%s\n", i,
				e->off, e->len, e->lost ? " (given up)" : "");
			break;
		case EVENT_DISCARD:
			fprintf(stderr, "%5" PRIu64 " discard %8" PRIu64 " +%u\n", i,
				e->off, e->len);
			break;
		case EVENT_FLUSH:
			fprintf(stderr, "%5" PRIu64 " flush, of what is before %" PRIu64 "\n",
				i, e->value);
			break;
		case EVENT_STARTED:
			fprintf(stderr, "%5" PRIu64 " operation %" PRIu64 "\n", i, e->value);
			break;
		case EVENT_PROMISED:
			fprintf(stderr, "%5" PRIu64 " promised %" PRIu64 "\n", i, e->value);
			break;
		}
	}
}

/* ---- cutting the power --------------------------------------------------------- */

/* What becomes of a write. */
enum fate { LOST, KEPT, TORN_SECTORS, TORN_PAGES, TORN_SHORT };

struct explorer {
	struct fault *f;
	const struct fault_plan *plan;
	struct disk durable;	/* what the last flush covered */
	struct fault *crashed;
	uint64_t *w;		/* events: writes and discards since */
	uint8_t *fate;
	unsigned n, room;
	uint64_t started, promised;
	uint64_t from, end;	/* events between which the stretch is */
	fault_fn fn;
	void *ctx;
};

static void apply(struct disk *d, const struct event *e, enum fate fate,
		  struct rng *r)
{
	size_t unit = fate == TORN_PAGES ? FAULT_PAGE : FAULT_SECTOR;
	size_t keep = 0;

	if (fate == LOST)
		return;
	if (fate == KEPT) {
		disk_write(d, e->data, e->len, e->off);
		return;
	}
	if (fate == TORN_SHORT)		/* the beginning came through */
		keep = (size_t)rng_below(r, e->len / FAULT_SECTOR + 1) * FAULT_SECTOR;
	for (size_t at = 0; at < e->len;) {
		/* Units of the image, not of the write. */
		size_t n = unit - (e->off + at) % unit;

		if (n > e->len - at)
			n = e->len - at;
		if (fate == TORN_SHORT ? at < keep : rng_next(r) & 1)
			disk_write(d, e->data ? e->data + at : NULL, n, e->off + at);
		at += n;
	}
}

/* Build the image that x->fate describes and show it. */
static int try(struct explorer *x, const char *what)
{
	struct fault *f = x->f;
	struct fault_cut cut = {
		.number = ++f->number,
		.flush = f->flushes,
		.writes = x->n,
	};
	struct rng r = {x->plan->seed ^ (cut.number * 0x2545f4914f6cdd1dull)};
	uint64_t last = x->from;
	size_t used;

	if (x->plan->only && x->plan->only != cut.number)
		return 0;
	fault_clear(x->crashed, &x->durable, f->im.bytes);
	used = (size_t)snprintf(cut.text, sizeof(cut.text), "%s:", what);
	for (unsigned i = 0; i < x->n; i++) {
		const struct event *e = &f->log[x->w[i]];
		enum fate fate = x->fate[i];

		if (fate == LOST)
			continue;
		apply(&x->crashed->base, e, fate, &r);
		cut.kept += fate == KEPT;
		cut.torn += fate != KEPT;
		last = x->w[i] + 1;
		if (used + 8 < sizeof(cut.text))
			used += (size_t)snprintf(cut.text + used,
						 sizeof(cut.text) - used, " %u%s", i,
						 fate == KEPT ? "" : "~");
	}
	cut.started_by[0] = x->started;
	cut.promised_by[0] = x->promised;
	for (uint64_t i = 0; i < x->end; i++) {
		const struct event *e = &f->log[i];
		uint64_t *to = NULL;

		/* Started when the last of these writes was made; promised
		   before the stretch ended. */
		if (e->type == EVENT_STARTED && i < last)
			to = &cut.started_by[e->who];
		else if (e->type == EVENT_PROMISED)
			to = &cut.promised_by[e->who];
		if (to && e->value > *to)
			*to = e->value;
	}
	for (unsigned i = 0; i < FAULT_WHO; i++)
		if (cut.started_by[i] < cut.promised_by[i])
			cut.started_by[i] = cut.promised_by[i];
	cut.started = cut.started_by[0];
	cut.promised = cut.promised_by[0];
	return x->fn(x->ctx, x->crashed, &cut);
}

static int stretch(struct explorer *x)
{
	const struct fault_plan *plan = x->plan;
	struct rng *r = &x->f->rng;
	unsigned n = x->n;
	int err = 0;

	if (n <= plan->all_below && n < 20) {
		for (uint32_t mask = 0; mask < 1u << n && !err; mask++) {
			for (unsigned i = 0; i < n; i++)
				x->fate[i] = mask >> i & 1 ? KEPT : LOST;
			err = try(x, "some kept");
		}
	} else {
		memset(x->fate, LOST, n);
		err = try(x, "all lost");
		for (unsigned i = 0; i < n && !err; i++) {
			x->fate[i] = KEPT;
			err = try(x, "the first kept");
		}
		for (unsigned i = 0; i < n && !err && !plan->sparse; i++) {
			memset(x->fate, KEPT, n);
			x->fate[i] = LOST;
			err = try(x, "one lost");
			if (err)
				break;
			memset(x->fate, LOST, n);
			x->fate[i] = KEPT;
			err = try(x, "only one kept");
		}
		for (unsigned k = 0; k < plan->random && !err; k++) {
			/* Few lost as often as many. */
			uint64_t odds = 1 + rng_below(r, 15);

			for (unsigned i = 0; i < n; i++)
				x->fate[i] = rng_below(r, 16) < odds ? KEPT : LOST;
			err = try(x, "some kept");
		}
	}
	for (unsigned k = 0; k < plan->torn && n && !err; k++) {
		unsigned upto = (unsigned)rng_below(r, n);
		enum fate how = TORN_SECTORS + (unsigned)rng_below(r, 3);

		if (k & 1) {		/* all of them, more or less */
			for (unsigned i = 0; i < n; i++)
				x->fate[i] = rng_next(r) & 1 ? how : KEPT;
		} else {		/* the last one; those before may be lost */
			memset(x->fate, LOST, n);
			for (unsigned i = 0; i < upto; i++)
				x->fate[i] = rng_below(r, 8) ? KEPT : LOST;
			x->fate[upto] = how;
		}
		err = try(x, "torn");
	}
	return err;
}

/* The writes in [from, to) that can still be lost: x->w. */
static void gather(struct explorer *x, uint64_t from, uint64_t to)
{
	x->n = 0;
	x->from = from;
	for (uint64_t i = from; i < to; i++) {
		const struct event *e = &x->f->log[i];

		if (e->type != EVENT_WRITE && e->type != EVENT_DISCARD)
			continue;
		if (e->type == EVENT_WRITE && e->len == 0)
			continue;
		if (x->n == x->room) {
			x->room = x->room ? 2 * x->room : 64;
			x->w = must(__real_realloc(x->w, x->room * sizeof(*x->w)));
			x->fate = must(__real_realloc(x->fate, x->room));
		}
		x->w[x->n++] = i;
	}
}

int fault_explore(struct fault *f, const struct fault_plan *plan,
		  uint64_t *started, uint64_t *promised, bool final,
		  fault_fn fn, void *ctx)
{
	struct explorer x = {
		.f = f,
		.plan = plan,
		.crashed = fault_create(f->im.bytes),
		.started = *started,
		.promised = *promised,
		.fn = fn,
		.ctx = ctx,
	};
	uint64_t from = 0, i;
	int err = 0;

	if (!f->exploring) {
		f->exploring = true;
		f->number = f->flushes = 0;
		f->rng.s = plan->seed;
	}
	disk_init(&x.durable, &f->base, f->base.pages);
	for (i = 0; i < f->events && !err; i++) {
		struct event *e = &f->log[i];

		if (e->type != EVENT_FLUSH)
			continue;
		gather(&x, from, i);
		x.end = i;
		if (i >= plan->from)
			err = stretch(&x);
		if (e->value > from) {
			for (unsigned k = 0; k < x.n; k++) {
				const struct event *w = &f->log[x.w[k]];

				if (x.w[k] < e->value && !w->lost)
					apply(&x.durable, w, KEPT, NULL);
			}
			from = e->value;
		}
		f->flushes++;
	}
	if (final && !err) {
		gather(&x, from, f->events);
		x.end = f->events;
		err = stretch(&x);
	}
	if (!final && !err && from) {
		/*
		 * What is durable becomes the base. Promises and starts
		 * before `from` are behind us; later ones stay in the log.
		 */
		for (i = 0; i < from; i++) {
			const struct event *e = &f->log[i];

			if (e->type == EVENT_STARTED && e->value > *started)
				*started = e->value;
			if (e->type == EVENT_PROMISED && e->value > *promised)
				*promised = e->value;
			if ((e->type == EVENT_WRITE || e->type == EVENT_DISCARD) &&
			    !e->lost)
				apply(&f->base, e, KEPT, NULL);
		}
		for (; i < f->events; i++)
			if (f->log[i].type == EVENT_FLUSH) {
				f->log[i].type = EVENT_STARTED;	/* done with */
				f->log[i].value = 0;
			}
		log_clear(f, from);
	}
	disk_fini(&x.durable);
	fault_destroy(x.crashed);
	free(x.w);
	free(x.fate);
	return err;
}

uint64_t env_u64(const char *name, uint64_t otherwise)
{
	const char *s = getenv(name);

	return s && *s ? strtoull(s, NULL, 0) : otherwise;
}

static uint64_t clock_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

struct effort effort_begin(uint64_t states, unsigned seconds)
{
	if (getenv("STATES"))
		return (struct effort){.states = env_u64("STATES", 0)};
	return (struct effort){states, clock_ns() + seconds * 1000000000ull};
}

bool effort_spent(const struct effort *e, uint64_t states)
{
	return (e->states && states >= e->states) ||
	       (e->until_ns && clock_ns() >= e->until_ns);
}
