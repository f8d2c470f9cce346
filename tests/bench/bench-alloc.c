/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * bench-alloc [-q] [-j file] [-w workload] [-b backend] [-t threads]: the allocator and two
 * stand-ins under the same seeded workloads. Each pair runs in a process of
 * its own. "net" is CPU time less that of the same driver with a backend that
 * does nothing; so is memory. Latency is of every 16th call.
 */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "alloc/alloc.h"

#define KiB 1024ull
#define MiB (1024 * KiB)
#define GiB (1024 * MiB)
#define TiB (1024 * GiB)
#define UNIT ((uint64_t)4096)
#define PIECES 64
#define AHEAD 16

struct rng {
	uint64_t s;
};

static inline uint64_t rnd(struct rng *r)
{
	uint64_t z = (r->s += 0x9e3779b97f4a7c15ull);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	return z ^ (z >> 31);
}

static inline uint64_t below(struct rng *r, uint64_t n)
{
	return (uint64_t)(((unsigned __int128)rnd(r) * n) >> 64);
}

/* -- Backends -- */

struct backend {
	const char *name;
	void *(*open)(uint64_t units);
	/* `len` units: one extent (max 1), or several. The count, or 0. */
	unsigned (*take)(void *ctx, uint64_t len, struct extent *out,
			 unsigned max);
	void (*give)(void *ctx, uint64_t start, uint64_t len);
	void (*look)(void *ctx, uint64_t *extents, uint64_t *largest);
};

/* The allocator. */

static void *sw_open(uint64_t units)
{
	struct alloc_config cfg = { .units = units };
	struct alloc *a = NULL;

	if (alloc_open(&cfg, NULL, 0, &a))
		abort();
	return a;
}

static unsigned sw_take(void *ctx, uint64_t len, struct extent *out, unsigned max)
{
	uint64_t got;
	unsigned count;

	if (max == 1)
		return alloc_any(ctx, len, out) ? 0 : 1;
	return alloc_vec(ctx, ALLOC_NO_GOAL, len, out, max, &count, &got) ? 0
									  : count;
}

static void sw_give(void *ctx, uint64_t start, uint64_t len)
{
	if (alloc_free(ctx, start, len))
		abort();
}

static void sw_look(void *ctx, uint64_t *extents, uint64_t *largest)
{
	struct alloc_stats st;

	if (alloc_stats(ctx, true, &st))
		abort();
	*extents = st.free_extents;
	*largest = st.largest_free;
}

/* Nothing: what the driver itself costs. */

struct null {
	uint64_t units, used, at;
};

static void *null_open(uint64_t units)
{
	struct null *n = calloc(1, sizeof(*n));

	n->units = units;
	return n;
}

static unsigned null_take(void *ctx, uint64_t len, struct extent *out,
			  unsigned max)
{
	struct null *n = ctx;

	(void)max;
	if (__atomic_load_n(&n->used, __ATOMIC_RELAXED) + len > n->units)
		return 0;
	__atomic_add_fetch(&n->used, len, __ATOMIC_RELAXED);
	out->start = 1;
	out->len = len;
	return 1;
}

static void null_give(void *ctx, uint64_t start, uint64_t len)
{
	struct null *n = ctx;

	(void)start;
	__atomic_sub_fetch(&n->used, len, __ATOMIC_RELAXED);
}

static void null_look(void *ctx, uint64_t *extents, uint64_t *largest)
{
	(void)ctx;
	*extents = *largest = 0;
}

/* Stand-in: a mutex and two ordered maps (treaps), best fit. */

struct knot {
	uint64_t start, len;
	struct knot *kid[2][2];		/* [map][side]; 0: by length, 1: by start */
	uint32_t prio;
};

struct maps {
	pthread_mutex_t m;
	struct knot *root[2], *spare;
	uint64_t free, runs;
	struct rng r;
};

static inline bool knot_less(int map, const struct knot *a, uint64_t start,
			     uint64_t len)
{
	if (!map && a->len != len)
		return a->len < len;
	return a->start < start;
}

static struct knot *treap_join(int map, struct knot *a, struct knot *b)
{
	if (!a || !b)
		return a ? a : b;
	if (a->prio > b->prio) {
		a->kid[map][1] = treap_join(map, a->kid[map][1], b);
		return a;
	}
	b->kid[map][0] = treap_join(map, a, b->kid[map][0]);
	return b;
}

static void treap_split(int map, struct knot *t, const struct knot *at,
			struct knot **l, struct knot **r)
{
	if (!t) {
		*l = *r = NULL;
	} else if (knot_less(map, t, at->start, at->len)) {
		treap_split(map, t->kid[map][1], at, &t->kid[map][1], r);
		*l = t;
	} else {
		treap_split(map, t->kid[map][0], at, l, &t->kid[map][0]);
		*r = t;
	}
}

static void treap_add(int map, struct knot **root, struct knot *n)
{
	while (*root && (*root)->prio >= n->prio)
		root = &(*root)->kid[map][knot_less(map, *root, n->start, n->len)];
	treap_split(map, *root, n, &n->kid[map][0], &n->kid[map][1]);
	*root = n;
}

static void treap_del(int map, struct knot **root, struct knot *n)
{
	while (*root != n)
		root = &(*root)->kid[map][knot_less(map, *root, n->start, n->len)];
	*root = treap_join(map, n->kid[map][0], n->kid[map][1]);
}

static void maps_add(struct maps *t, uint64_t start, uint64_t len)
{
	struct knot *n = t->spare;

	if (n)
		t->spare = n->kid[0][0];
	else
		n = malloc(sizeof(*n));
	*n = (struct knot){ .start = start, .len = len,
			    .prio = (uint32_t)rnd(&t->r) };
	treap_add(0, &t->root[0], n);
	treap_add(1, &t->root[1], n);
	t->runs++;
}

static void maps_del(struct maps *t, struct knot *n)
{
	treap_del(0, &t->root[0], n);
	treap_del(1, &t->root[1], n);
	n->kid[0][0] = t->spare;
	t->spare = n;
	t->runs--;
}

static void *maps_open(uint64_t units)
{
	struct maps *t = calloc(1, sizeof(*t));

	pthread_mutex_init(&t->m, NULL);
	t->free = units;
	maps_add(t, 0, units);
	return t;
}

static unsigned maps_take(void *ctx, uint64_t len, struct extent *out,
			  unsigned max)
{
	struct maps *t = ctx;
	unsigned count = 0;

	pthread_mutex_lock(&t->m);
	if (t->free < len)
		goto out;
	while (len && count < max) {
		struct knot *n = t->root[0], *fit = NULL, *last = NULL;
		uint64_t start, had, got;

		while (n) {
			last = n;
			if (n->len >= len) {
				fit = n;
				n = n->kid[0][0];
			} else {
				n = n->kid[0][1];
			}
		}
		if (!fit) {
			if (max == 1)
				break;
			for (n = t->root[0]; n; n = n->kid[0][1])
				last = n;
			fit = last;
		}
		start = fit->start;
		had = fit->len;
		got = had < len ? had : len;
		maps_del(t, fit);
		if (had > got)
			maps_add(t, start + got, had - got);
		out[count++] = (struct extent){ start, got };
		t->free -= got;
		len -= got;
	}
out:
	pthread_mutex_unlock(&t->m);
	return count;
}

static void maps_give(void *ctx, uint64_t start, uint64_t len)
{
	struct maps *t = ctx;
	struct knot *n, *before = NULL, *after = NULL;

	pthread_mutex_lock(&t->m);
	t->free += len;
	for (n = t->root[1]; n;) {
		if (n->start < start) {
			before = n;
			n = n->kid[1][1];
		} else {
			after = n;
			n = n->kid[1][0];
		}
	}
	if (after && after->start == start + len) {
		len += after->len;
		maps_del(t, after);
	}
	if (before && before->start + before->len == start) {
		start = before->start;
		len += before->len;
		maps_del(t, before);
	}
	maps_add(t, start, len);
	pthread_mutex_unlock(&t->m);
}

static void maps_look(void *ctx, uint64_t *extents, uint64_t *largest)
{
	struct maps *t = ctx;

	*extents = t->runs;
	*largest = 0;
	for (struct knot *n = t->root[0]; n; n = n->kid[0][1])
		*largest = n->len;
}

/* Stand-in: a mutex and a plain bitmap, first fit from a low-water mark. */

struct plain {
	pthread_mutex_t m;
	uint64_t *bits, units, free, low;
};

static void *plain_open(uint64_t units)
{
	struct plain *p = calloc(1, sizeof(*p));

	pthread_mutex_init(&p->m, NULL);
	p->bits = calloc(units / 64 + 2, 8);
	p->units = p->free = units;
	return p;
}

/* The first unit from `at` on that is used (or free), or the end. */
static uint64_t plain_next(const struct plain *p, uint64_t at, uint64_t end,
			   uint64_t flip)
{
	while (at < end) {
		uint64_t w = (p->bits[at / 64] ^ flip) >> at % 64;

		if (w) {
			at += (uint64_t)__builtin_ctzll(w);
			return at < end ? at : end;
		}
		at = (at / 64 + 1) * 64;
	}
	return end;
}

static void plain_set(struct plain *p, uint64_t at, uint64_t len, bool used)
{
	while (len) {
		uint64_t n = 64 - at % 64 < len ? 64 - at % 64 : len;
		uint64_t m = (~0ull >> (64 - n)) << at % 64;

		if (used)
			p->bits[at / 64] |= m;
		else
			p->bits[at / 64] &= ~m;
		at += n;
		len -= n;
	}
}

static unsigned plain_take(void *ctx, uint64_t len, struct extent *out,
			   unsigned max)
{
	struct plain *p = ctx;
	unsigned count = 0;
	uint64_t at;

	pthread_mutex_lock(&p->m);
	if (p->free < len)
		goto out;
	at = plain_next(p, p->low, p->units, ~0ull);
	p->low = at;
	while (len && count < max && at < p->units) {
		uint64_t end = at + len < p->units ? at + len : p->units, n;

		n = plain_next(p, at, end, 0) - at;
		if (n == len || max > 1) {
			plain_set(p, at, n, true);
			out[count++] = (struct extent){ at, n };
			p->free -= n;
			len -= n;
		}
		at = plain_next(p, at + n, p->units, ~0ull);
	}
out:
	pthread_mutex_unlock(&p->m);
	return count;
}

static void plain_give(void *ctx, uint64_t start, uint64_t len)
{
	struct plain *p = ctx;

	pthread_mutex_lock(&p->m);
	plain_set(p, start, len, false);
	p->free += len;
	if (start < p->low)
		p->low = start;
	pthread_mutex_unlock(&p->m);
}

static void plain_look(void *ctx, uint64_t *extents, uint64_t *largest)
{
	struct plain *p = ctx;
	uint64_t at = 0, end;

	*extents = *largest = 0;
	while ((at = plain_next(p, at, p->units, ~0ull)) < p->units) {
		end = plain_next(p, at, p->units, 0);
		++*extents;
		*largest = end - at > *largest ? end - at : *largest;
		at = end;
	}
}

static const struct backend backends[] = {
	{ "driver", null_open, null_take, null_give, null_look },
	{ "spaceweave", sw_open, sw_take, sw_give, sw_look },
	{ "maps", maps_open, maps_take, maps_give, maps_look },
	{ "bitmap", plain_open, plain_take, plain_give, plain_look },
};

/* -- Measuring -- */

static uint64_t clock_ns(clockid_t id)
{
	struct timespec t;

	clock_gettime(id, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t rss_bytes(void)
{
	unsigned long size = 0, resident = 0;
	FILE *f = fopen("/proc/self/statm", "r");

	if (f && fscanf(f, "%lu %lu", &size, &resident) != 2)
		resident = 0;
	if (f)
		fclose(f);
	return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Nanoseconds in buckets of an eighth of a power of two. */
struct latency {
	uint64_t count[64 * 8], calls;
};

static uint64_t clock_cost;

static void latency_add(struct latency *l, uint64_t ns)
{
	unsigned p;

	ns = ns > clock_cost ? ns - clock_cost : 1;
	p = 63 - (unsigned)__builtin_clzll(ns | 8);
	l->count[p * 8 + ((ns | 8) >> (p - 3)) % 8]++;
}

static double latency_at(const struct latency *l, double share)
{
	uint64_t total = 0, seen = 0;

	for (unsigned i = 0; i < 512; i++)
		total += l->count[i];
	for (unsigned i = 0; i < 512; i++) {
		seen += l->count[i];
		if (seen && (double)seen >= share * (double)total)
			return (double)((8 + i % 8) * (1ull << i / 8) / 8);
	}
	return 0;
}

struct result {
	char note[64];
	uint64_t calls;			/* allocations in the measured part */
	double cpu_s, wall_s, net_ns;	/* net per allocation (and free) */
	double take_p[3], give_p[3];	/* p50 p99 p999 */
	double extents_per_object;
	uint64_t free_extents, largest_free, rss;
	double utilization;		/* at the first failure */
	bool stopped;			/* took too long */
};

/* -- The driver: threads with objects, each of one or more extents -- */

/*
 * Room for more than will be used, in huge pages, and what will be used touched
 * already: so that the driver's own page faults do not drown what is measured.
 */
static void *room(size_t bytes, size_t touch)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		abort();
	madvise(p, bytes, MADV_HUGEPAGE);
	memset(p, 0, touch);
	return p;
}

struct object {
	uint64_t start;			/* packed: start << 24 | len */
	uint32_t next;			/* more of it, in `more`; 0: none */
};

struct driver {
	const struct backend *b;
	void *ctx;
	uint64_t units;
	bool vec;
	struct rng r;
	struct object *objs, *more;
	size_t count, victim, ahead[AHEAD];
	unsigned turn;
	uint32_t more_used, more_free;
	uint64_t used, extents;
	struct latency take, give;
	unsigned tick;
	uint64_t deadline;		/* CPU ns of the thread */
	bool stopped;
} __attribute__((aligned(128)));

static uint32_t more_get(struct driver *d)
{
	uint32_t i = d->more_free;

	if (i) {
		d->more_free = d->more[i].next;
		return i;
	}
	return ++d->more_used;
}

static bool driver_take(struct driver *d, uint64_t len)
{
	struct extent out[PIECES];
	uint64_t t0 = 0, left = len;
	bool timed = ++d->tick % 16 == 0, first = true;
	struct object *o;

	o = &d->objs[d->count];
	*o = (struct object){ 0 };
	while (left) {
		unsigned n;

		if (timed)
			t0 = clock_ns(CLOCK_MONOTONIC);
		n = d->b->take(d->ctx, left, out, d->vec ? PIECES : 1);
		if (timed)
			latency_add(&d->take, clock_ns(CLOCK_MONOTONIC) - t0);
		if (!n)
			return false;
		for (unsigned i = 0; i < n; i++) {
			uint64_t packed = out[i].start << 24 | out[i].len;

			if (first) {
				o->start = packed;
				first = false;
			} else {
				uint32_t m = more_get(d);

				d->more[m] = (struct object){ packed, o->next };
				o->next = m;
			}
			left -= out[i].len;
			d->extents++;
		}
	}
	d->used += len;
	d->count++;
	if (d->deadline && d->tick % 1024 == 0 &&
	    clock_ns(CLOCK_THREAD_CPUTIME_ID) > d->deadline)
		d->stopped = true;
	return true;
}

static void driver_give_extent(struct driver *d, uint64_t packed)
{
	uint64_t len = packed & 0xffffff, t0 = 0;
	bool timed = ++d->tick % 16 == 0;

	if (timed)
		t0 = clock_ns(CLOCK_MONOTONIC);
	d->b->give(d->ctx, packed >> 24, len);
	if (timed)
		latency_add(&d->give, clock_ns(CLOCK_MONOTONIC) - t0);
	d->used -= len;
	d->extents--;
}

static void driver_drop(struct driver *d, struct object o)
{
	driver_give_extent(d, o.start);
	while (o.next) {
		struct object m = d->more[o.next];

		driver_give_extent(d, m.start);
		d->more[o.next].next = d->more_free;
		d->more_free = o.next;
		o.next = m.next;
	}
}

/*
 * Any object. The one after it is chosen already and on its way to the cache:
 * that the driver knows nothing of its objects is no fault of the allocator's.
 */
static void driver_give(struct driver *d)
{
	size_t i = d->victim < d->count ? d->victim : below(&d->r, d->count);
	struct object o = d->objs[i];

	d->objs[i] = d->objs[--d->count];
	d->victim = below(&d->r, d->count + 1);
	__builtin_prefetch(&d->objs[d->victim]);
	driver_drop(d, o);
}

/* -- Workloads -- */

struct job {
	const struct backend *b;
	void *ctx;
	uint64_t units;			/* of the space */
	unsigned threads;
	double full;
	uint64_t min, max, calls;	/* sizes in bytes; steady calls */
	bool vec;
	double limit_s;			/* CPU seconds for each thread */
	struct driver *d;
	uint64_t used;			/* atomic */
	uint64_t failed_at;		/* used at the first failure */
};

struct seat {
	struct job *j;
	unsigned i;
};

static void run_threads(struct job *j, void *(*body)(void *))
{
	pthread_t t[64];
	struct seat seats[64];

	for (unsigned i = 0; i < j->threads; i++) {
		seats[i] = (struct seat){ j, i };
		if (pthread_create(&t[i], NULL, body, &seats[i]))
			abort();
	}
	for (unsigned i = 0; i < j->threads; i++)
		pthread_join(t[i], NULL);
}

static uint64_t size_units(struct job *j, struct driver *d)
{
	uint64_t bytes = j->min + below(&d->r, j->max - j->min + 1);

	return (bytes + UNIT - 1) / UNIT;
}

static void fill_until_failure(struct job *j, struct driver *d)
{
	while (!d->stopped && driver_take(d, size_units(j, d)))
		;
}

static void *headline_fill(void *arg)
{
	struct seat *s = arg;

	fill_until_failure(s->j, &s->j->d[s->i]);
	return NULL;
}

static void *headline_free(void *arg)
{
	struct seat *s = arg;
	struct driver *d = &s->j->d[s->i];
	uint64_t drop = d->count * (20 + below(&d->r, 31)) / 100;

	while (drop-- && !d->stopped)
		driver_give(d);
	return NULL;
}

static uint64_t used_now(struct job *j)
{
	uint64_t used = 0;

	for (unsigned i = 0; i < j->threads; i++)
		used += j->d[i].used;
	return used;
}

/* Each thread keeps its share of the space full, one object for another. */
static void steady_fill(struct job *j, struct driver *d)
{
	uint64_t share = (uint64_t)((double)j->units * j->full / j->threads);

	while (d->used + j->max / UNIT < share && !d->stopped)
		if (!driver_take(d, size_units(j, d)))
			abort();
}

static void *steady_warm(void *arg)
{
	struct seat *s = arg;
	struct driver *d = &s->j->d[s->i];

	steady_fill(s->j, d);
	/* Replace everything once, so that age shows. */
	for (size_t n = d->count; n-- && !d->stopped;) {
		driver_give(d);
		steady_fill(s->j, d);
	}
	memset(&d->take, 0, sizeof(d->take));
	memset(&d->give, 0, sizeof(d->give));
	d->stopped = false;
	return NULL;
}

static void *steady_run(void *arg)
{
	struct seat *s = arg;
	struct driver *d = &s->j->d[s->i];

	d->deadline = clock_ns(CLOCK_THREAD_CPUTIME_ID) +
		      (uint64_t)(s->j->limit_s * 1e9);
	d->tick = 0;
	for (uint64_t n = s->j->calls / s->j->threads; n-- && !d->stopped;) {
		driver_give(d);
		steady_fill(s->j, d);
		s->j->d[s->i].take.calls++;
	}
	return NULL;
}

static uint64_t lognormal_units(struct rng *r)
{
	double u = ((double)(rnd(r) >> 11) + 1) / 9007199254740993.0;
	double v = (double)(rnd(r) >> 11) / 9007199254740992.0;
	double z = sqrt(-2 * log(u)) * cos(2 * M_PI * v);
	/* Median 16 KiB; mean 118 KiB = median * exp(sigma^2 / 2). */
	double bytes = 16384 * exp(sqrt(2 * log(118.0 / 16)) * z);
	uint64_t units = (uint64_t)(bytes / UNIT) + 1;

	return units < 65536 ? units : 65536;
}

/*
 * Any object from the oldest on, dead ones too: chosen AHEAD choices ago and on
 * its way to the cache since, as in driver_give().
 */
static size_t any_object(struct driver *d, size_t oldest)
{
	size_t *next = &d->ahead[d->turn++ % AHEAD], i = *next;

	*next = oldest + below(&d->r, d->count - oldest);
	__builtin_prefetch(&d->objs[*next], 1);
	return i > oldest ? i : oldest;
}

/* A ring of objects in order of age, so that the oldest is at hand. */
static void *aging_run(void *arg)
{
	struct seat *s = arg;
	struct job *j = s->j;
	struct driver *d = &j->d[s->i];
	uint64_t full = (uint64_t)((double)j->units * j->full), born = 0;
	struct rng sizes = { 42 };
	size_t oldest = 0;

	d->deadline = clock_ns(CLOCK_THREAD_CPUTIME_ID) +
		      (uint64_t)(j->limit_s * 1e9);
	while (born < 5 * full && !d->stopped) {
		uint64_t len = lognormal_units(&sizes);

		while (d->used + len > full) {
			size_t i;

			do
				i = rnd(&d->r) & 1 ? oldest
						   : any_object(d, oldest);
			while (!d->objs[i].start && i != oldest);
			if (d->objs[i].start)
				driver_drop(d, d->objs[i]);
			d->objs[i].start = 0;
			while (oldest < d->count && !d->objs[oldest].start)
				oldest++;
		}
		if (!driver_take(d, len))
			abort();
		j->calls++;
		born += len;
	}
	/* Count what lives. */
	j->used = 0;
	for (size_t i = oldest; i < d->count; i++)
		j->used += d->objs[i].start != 0;
	return NULL;
}

static void report(struct job *j, struct result *r)
{
	static struct latency take, give;
	const double share[3] = { 0.5, 0.99, 0.999 };
	uint64_t extents = 0, objects = 0;

	for (unsigned i = 0; i < j->threads; i++) {
		for (unsigned k = 0; k < 512; k++) {
			take.count[k] += j->d[i].take.count[k];
			give.count[k] += j->d[i].give.count[k];
		}
		extents += j->d[i].extents;
		objects += j->d[i].count;
		r->stopped |= j->d[i].stopped;
	}
	for (unsigned k = 0; k < 3; k++) {
		r->take_p[k] = latency_at(&take, share[k]);
		r->give_p[k] = latency_at(&give, share[k]);
	}
	r->extents_per_object = objects ? (double)extents / (double)objects : 0;
	r->rss = rss_bytes();
	j->b->look(j->ctx, &r->free_extents, &r->largest_free);
}

/* For so many objects of each thread, more or less. */
static struct driver *drivers_new(struct job *j, uint64_t objects)
{
	struct driver *d = aligned_alloc(_Alignof(struct driver),
					 j->threads * sizeof(*d));

	memset(d, 0, j->threads * sizeof(*d));
	for (unsigned i = 0; i < j->threads; i++) {
		d[i].b = j->b;
		d[i].ctx = j->ctx;
		d[i].units = j->units;
		d[i].vec = j->vec;
		d[i].r.s = 1000 + i;
		d[i].objs = room((j->units / 4 + 4096) * sizeof(*d->objs),
				 objects * sizeof(*d->objs));
		d[i].more = room((j->units / 4 + 4096) * sizeof(*d->more), 0);
		d[i].deadline = (uint64_t)(j->limit_s * 1e9);
	}
	return d;
}

static void timed(struct result *r, struct job *j, void *(*body)(void *))
{
	uint64_t cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
	uint64_t wall = clock_ns(CLOCK_MONOTONIC);

	run_threads(j, body);
	r->cpu_s += (double)(clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu) / 1e9;
	r->wall_s += (double)(clock_ns(CLOCK_MONOTONIC) - wall) / 1e9;
}

static void headline(struct job *j, struct result *r)
{
	uint64_t filled = 0, kept = 0;

	j->min = 512;
	j->max = 4 * MiB;
	j->d = drivers_new(j, j->units / 400 / j->threads);
	timed(r, j, headline_fill);
	for (unsigned i = 0; i < j->threads; i++)
		filled += j->d[i].count;
	timed(r, j, headline_free);
	timed(r, j, headline_fill);
	for (unsigned i = 0; i < j->threads; i++)
		kept += j->d[i].count;
	r->calls = filled + kept / 3;
	r->utilization = (double)used_now(j) / (double)j->units;
	report(j, r);
}

static void steady(struct job *j, struct result *r)
{
	j->vec = true;
	j->d = drivers_new(j, 0);
	run_threads(j, steady_warm);
	timed(r, j, steady_run);
	for (unsigned i = 0; i < j->threads; i++)
		r->calls += j->d[i].take.calls;
	report(j, r);
}

static void aging(struct job *j, struct result *r)
{
	j->vec = true;
	j->full = 0.95;
	j->threads = 1;
	j->d = drivers_new(j, j->units / 5);
	timed(r, j, aging_run);
	r->calls = j->calls;
	report(j, r);
	r->extents_per_object = (double)j->d->extents / (double)j->used;
}

/* 4 KiB each; phase 0 fill, 1 every second freed, 2 refilled. */
static void *unit_run(void *arg)
{
	struct seat *s = arg;
	struct job *j = s->j;
	const struct backend *b = j->b;
	struct extent e;

	for (uint64_t i = 0; i < j->calls; i++) {
		switch (j->min) {
		case 0:
		case 2:
			if (!b->take(j->ctx, 1, &e, 1))
				abort();
			break;
		case 1:
			b->give(j->ctx, i * 2 + 1, 1);
		}
	}
	return NULL;
}

static void unit_phase(struct job *j, struct result *r)
{
	uint64_t phase = (uint64_t)j->full;
	struct result skip = { 0 };

	j->threads = 1;
	j->vec = false;
	for (j->min = 0; j->min <= phase; j->min++) {
		j->calls = j->units / (j->min ? 2 : 1);
		timed(j->min == phase ? r : &skip, j, unit_run);
	}
	r->calls = j->calls;
	r->rss = rss_bytes();
	j->b->look(j->ctx, &r->free_extents, &r->largest_free);
}

/* A producer allocates, a consumer frees, through a ring. */
#define RING 4096u
static struct {
	uint64_t slot[RING], head __attribute__((aligned(128))),
		tail __attribute__((aligned(128)));
} ring;

static void *relay_run(void *arg)
{
	struct seat *s = arg;
	struct job *j = s->j;
	struct rng r = { 7 };

	for (uint64_t i = 0; i < j->calls; i++) {
		if (s->i == 0) {
			struct extent e;

			while (i - __atomic_load_n(&ring.tail, __ATOMIC_ACQUIRE) >= RING)
				sched_yield();
			if (!j->b->take(j->ctx, 1 + below(&r, 64), &e, 1))
				abort();
			ring.slot[i % RING] = e.start << 24 | e.len;
			__atomic_store_n(&ring.head, i + 1, __ATOMIC_RELEASE);
		} else {
			uint64_t p;

			while (__atomic_load_n(&ring.head, __ATOMIC_ACQUIRE) <= i)
				sched_yield();
			p = ring.slot[i % RING];
			j->b->give(j->ctx, p >> 24, p & 0xffffff);
			__atomic_store_n(&ring.tail, i + 1, __ATOMIC_RELEASE);
		}
	}
	return NULL;
}

static void relay(struct job *j, struct result *r)
{
	j->threads = 2;
	j->d = drivers_new(j, 0);
	timed(r, j, relay_run);
	r->calls = j->calls;
	report(j, r);
}

static void opening(struct job *j, struct result *r)
{
	uint64_t t0 = clock_ns(CLOCK_MONOTONIC);

	/* run_one() opened one as well; this is the one timed. */
	void *ctx = j->b->open(j->units);
	struct extent e;

	if (!j->b->take(ctx, 1, &e, 1))
		abort();
	r->wall_s = (double)(clock_ns(CLOCK_MONOTONIC) - t0) / 1e9;
	r->calls = 1;
	r->rss = rss_bytes();
	j->b->look(ctx, &r->free_extents, &r->largest_free);
}

struct workload {
	const char *name;
	void (*run)(struct job *j, struct result *r);
	uint64_t bytes, quick_bytes;	/* 0: not in a quick run */
	unsigned threads;
	double full;
	uint64_t min, max, calls;
	unsigned not_for;		/* bits of backends that cannot */
};

#define NO_MAPS 4u
#define NO_BITMAP 8u

static const struct workload workloads[] = {
	{ "headline-10T", headline, 10 * TiB, 1 * TiB, 16, 0, 0, 0, 0, 0 },
	{ "headline-50T", headline, 50 * TiB, 0, 16, 0, 0, 0, 0, NO_BITMAP },
	{ "headline-100T", headline, 100 * TiB, 0, 16, 0, 0, 0, 0,
	  NO_BITMAP | NO_MAPS },
	{ "small-50", steady, 128 * GiB, 16 * GiB, 1, 0.50, 4 * KiB, 256 * KiB,
	  4000000, 0 },
	{ "small-90", steady, 128 * GiB, 16 * GiB, 1, 0.90, 4 * KiB, 256 * KiB,
	  4000000, 0 },
	{ "small-99", steady, 128 * GiB, 16 * GiB, 1, 0.99, 4 * KiB, 256 * KiB,
	  4000000, 0 },
	{ "large-90", steady, 2 * TiB, 2 * TiB, 1, 0.90, 256 * KiB, 64 * MiB,
	  1000000, 0 },
	{ "aging", aging, 64 * GiB, 16 * GiB, 1, 0.95, 0, 0, 0, 0 },
	{ "unit-fill", unit_phase, 1 * TiB, 64 * GiB, 1, 0, 0, 0, 0, NO_MAPS },
	{ "unit-holes", unit_phase, 1 * TiB, 64 * GiB, 1, 1, 0, 0, 0, NO_MAPS },
	{ "unit-refill", unit_phase, 1 * TiB, 64 * GiB, 1, 2, 0, 0, 0, NO_MAPS },
	{ "relay", relay, 128 * GiB, 128 * GiB, 2, 0, 0, 0, 4000000, 0 },
	{ "threads-1", steady, 128 * GiB, 16 * GiB, 1, 0.90, 4 * KiB, 256 * KiB,
	  4000000, 0 },
	{ "threads-2", steady, 128 * GiB, 16 * GiB, 2, 0.90, 4 * KiB, 256 * KiB,
	  4000000, 0 },
	{ "threads-4", steady, 128 * GiB, 16 * GiB, 4, 0.90, 4 * KiB, 256 * KiB,
	  4000000, 0 },
	{ "threads-8", steady, 128 * GiB, 16 * GiB, 8, 0.90, 4 * KiB, 256 * KiB,
	  4000000, 0 },
	{ "open-1P", opening, 1024 * TiB, 1024 * TiB, 1, 0, 0, 0, 0, NO_BITMAP },
};

static bool quick;
static unsigned threads;		/* 0: as the workload has it */

/* In a child, so that memory is its own. False: it died. */
static bool run_one(const struct workload *w, const struct backend *b,
		    struct result *r)
{
	int fd[2], status;
	pid_t pid;

	if (pipe(fd))
		return false;
	fflush(stdout);
	pid = fork();
	if (!pid) {
		struct job j = { .b = b, .threads = threads ? threads : w->threads, .full = w->full,
				 .min = w->min, .max = w->max,
				 .calls = quick ? w->calls / 8 : w->calls };
		uint64_t before;

		memset(r, 0, sizeof(*r));
		j.units = (quick ? w->quick_bytes : w->bytes) / UNIT;
		j.limit_s = (quick ? 0.8 : w->run == steady ? 30 : 120) / j.threads;
		before = rss_bytes();
		j.ctx = b->open(j.units);
		w->run(&j, r);
		r->rss -= r->rss > before ? before : r->rss;
		if (write(fd[1], r, sizeof(*r)) != sizeof(*r))
			_exit(1);
		_exit(0);
	}
	close(fd[1]);
	if (read(fd[0], r, sizeof(*r)) != sizeof(*r))
		memset(r, 0, sizeof(*r));
	close(fd[0]);
	return waitpid(pid, &status, 0) == pid && !status;
}

static void print_row(const struct workload *w, const struct backend *b,
		      const struct result *r, FILE *json, bool comma)
{
	printf("%-14s %-10s %9.3f %9.3f %9.1f %9.0f %6.0f %6.0f %6.0f %6.0f "
	       "%6.0f %7.0f %8.5f %9" PRIu64 " %10.2f %8.1f %8.5f%s\n",
	       w->name, b->name, r->cpu_s, r->wall_s, r->net_ns,
	       r->cpu_s > 0 ? (double)r->calls / r->cpu_s / 1e3 : 0,
	       r->take_p[0], r->take_p[1], r->take_p[2], r->give_p[0],
	       r->give_p[1], r->give_p[2], r->extents_per_object,
	       r->free_extents,
	       (double)r->largest_free * UNIT / (double)MiB,
	       (double)r->rss / (double)MiB, r->utilization,
	       r->stopped ? " (stopped)" : "");
	fflush(stdout);
	if (!json)
		return;
	fprintf(json,
		"%s\n  {\"workload\": \"%s\", \"backend\": \"%s\", \"calls\": %"
		PRIu64 ", \"cpu_s\": %.6f, \"wall_s\": %.6f, \"net_ns\": %.2f, "
		"\"calls_per_cpu_s\": %.0f, \"calls_per_wall_s\": %.0f, "
		"\"take_ns\": [%.0f, %.0f, %.0f], \"give_ns\": [%.0f, %.0f, "
		"%.0f], \"extents_per_object\": %.6f, \"free_extents\": %" PRIu64
		", \"largest_free\": %" PRIu64 ", \"rss_bytes\": %" PRIu64
		", \"utilization\": %.6f, \"stopped\": %s}",
		comma ? "," : "", w->name, b->name, r->calls, r->cpu_s,
		r->wall_s, r->net_ns,
		r->cpu_s > 0 ? (double)r->calls / r->cpu_s : 0,
		r->wall_s > 0 ? (double)r->calls / r->wall_s : 0, r->take_p[0],
		r->take_p[1], r->take_p[2], r->give_p[0], r->give_p[1],
		r->give_p[2], r->extents_per_object, r->free_extents,
		r->largest_free * UNIT, r->rss, r->utilization,
		r->stopped ? "true" : "false");
}

static void calibrate(void)
{
	clock_cost = UINT64_MAX;
	for (unsigned i = 0; i < 1000; i++) {
		uint64_t t = clock_ns(CLOCK_MONOTONIC);

		t = clock_ns(CLOCK_MONOTONIC) - t;
		clock_cost = t < clock_cost ? t : clock_cost;
	}
}

int main(int argc, char **argv)
{
	const char *only = NULL, *who = NULL, *path = NULL;
	FILE *json = NULL;
	bool comma = false;
	int opt;

	while ((opt = getopt(argc, argv, "qj:w:b:t:")) != -1) {
		switch (opt) {
		case 'q':
			quick = true;
			break;
		case 'j':
			path = optarg;
			break;
		case 'w':
			only = optarg;
			break;
		case 'b':
			who = optarg;
			break;
		case 't':
			threads = (unsigned)atoi(optarg);
			break;
		default:
			fprintf(stderr, "usage: bench-alloc [-q] [-j file] "
					"[-w workload] [-b backend] [-t threads]\n");
			return 2;
		}
	}
	if (path && !(json = fopen(path, "w"))) {
		perror(path);
		return 1;
	}
	calibrate();
	if (json)
		fprintf(json, "[");
	printf("%-14s %-10s %9s %9s %9s %9s %6s %6s %6s %6s %6s %7s %8s %9s "
	       "%10s %8s %8s\n",
	       "workload", "backend", "cpu s", "wall s", "net ns", "k/cpu s",
	       "t p50", "t p99", "t p999", "f p50", "f p99", "f p999", "ext/obj",
	       "free ext", "largest M", "mem MiB", "full");
	for (size_t i = 0; i < sizeof(workloads) / sizeof(*workloads); i++) {
		const struct workload *w = &workloads[i];
		struct result driver = { 0 };

		if ((only && strncmp(w->name, only, strlen(only))) ||
		    (quick && !w->quick_bytes))
			continue;
		for (unsigned k = 0; k < sizeof(backends) / sizeof(*backends); k++) {
			struct result r;

			if (k && who && strcmp(backends[k].name, who))
				continue;
			if (w->not_for & 1u << k)
				continue;
			if (!run_one(w, &backends[k], &r)) {
				printf("%-14s %-10s died\n", w->name,
				       backends[k].name);
				continue;
			}
			if (!k) {
				driver = r;
			} else if (r.calls) {
				double own = driver.calls
					? driver.cpu_s / (double)driver.calls : 0;

				r.net_ns = (r.cpu_s / (double)r.calls - own) * 1e9;
				r.rss -= r.rss > driver.rss ? driver.rss : r.rss;
			}
			print_row(w, &backends[k], &r, json, comma);
			comma = true;
		}
	}
	if (json) {
		fprintf(json, "\n]\n");
		fclose(json);
	}
	return 0;
}
