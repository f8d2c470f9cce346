/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Units change between free and used here, and the index with them: trees,
 * bins, windows. alloc_priv.h says which of them holds what, and who locks.
 *
 * A hint is only that: the start of a short run, in the bin of its length. It
 * is looked at again in its hood before it is believed, so nobody has to find
 * and remove it when the run grows or goes; a run that is there always has at
 * least one hint in some shard, or its chunk is on a list of lost chunks.
 */
#include "alloc/alloc_priv.h"

#include <assert.h>
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

/* -- Coming in -- */

static unsigned thread_count;
_Thread_local unsigned op_thread;

unsigned op_new_thread(void)
{
	return op_thread = atomic_add(&thread_count, 1);
}

int op_enter_world(struct alloc *a, struct op *op)
{
	int err = op_prepare(a);

	if (err)
		return err;
	*op = (struct op){ .a = a, .world = true };
	op->sh = &a->shards[op_shard_of_thread(a)];
	for (unsigned i = 0; i < a->cfg.shards; i++)
		latch_lock_nested(&a->shards[i].latch, i > 0);
	return 0;
}

void op_leave_world(struct op *op)
{
	for (unsigned i = op->a->cfg.shards; i-- > 0;)
		latch_unlock(&op->a->shards[i].latch);
}

/* All misses of a chunk at once: none is waited for but under a latch. */
static inline void chunk_fetch(struct chunk *c)
{
	for (unsigned i = 0; i < sizeof(*c); i += 64)
		__builtin_prefetch((char *)c + i, 1);
}

static inline void chunk_lock(struct chunk *c, bool nested)
{
	latch_lock_nested(&c->latch, nested);
	if (c->form == FORM_MANY)
		for (unsigned n = 0; n < c->edges; n += EDGE_BLOCK)
			__builtin_prefetch(&c->many[n], 1);
}

int hood_lock(struct op *op, uint64_t s, uint64_t e, struct hood *h)
{
	struct alloc *a = op->a;

	h->last = chunk_of(min_u64(e + HOOD, a->units - 1));
	h->first = min_u64(chunk_of(s > HOOD ? s - HOOD : 0), h->last);
	for (uint64_t i = h->first; i <= h->last; i++) {
		struct chunk *c = chunks_get(&a->chunks, i);

		if (!c)
			return -ENOMEM;
		chunk_fetch(c);
	}
	for (uint64_t i = h->first; !op->world && i <= h->last; i++)
		chunk_lock(chunks_peek(&a->chunks, i), i > h->first);
	return 0;
}

void hood_unlock(struct op *op, const struct hood *h)
{
	if (op->world)
		return;
	for (uint64_t i = h->first; i <= h->last; i++)
		latch_unlock(&chunks_peek(&op->a->chunks, i)->latch);
}

/* -- Runs of units, across chunks -- */

struct piece {
	struct chunk *c;
	uint32_t off, len;
};

/* The next part of [*at, e) that lies in one chunk. */
static bool piece_next(const struct op *op, uint64_t *at, uint64_t e,
		       struct piece *p)
{
	if (*at >= e)
		return false;
	p->c = chunks_peek(&op->a->chunks, chunk_of(*at));
	p->off = off_of(*at);
	p->len = (uint32_t)min_u64(e - *at, ALLOC_CHUNK - p->off);
	*at += p->len;
	return true;
}

int space_ready(struct op *op, uint64_t s, uint64_t e)
{
	struct piece p;

	for (uint64_t at = s; piece_next(op, &at, e, &p);)
		if (p.c->state != CHUNK_READY) {
			op->need = chunk_of(at - 1);
			return -ENODATA;
		}
	return 0;
}

bool space_all_used(struct op *op, uint64_t s, uint64_t e)
{
	struct piece p;

	for (uint64_t at = s; piece_next(op, &at, e, &p);)
		if (!chunk_all_used(p.c, p.off, p.len))
			return false;
	return true;
}

bool space_all_free(struct op *op, uint64_t s, uint64_t e)
{
	struct piece p;

	for (uint64_t at = s; piece_next(op, &at, e, &p);)
		if (!chunk_all_free(p.c, p.off, p.len))
			return false;
	return true;
}

/* Free units directly before `at`, at most HOOD, none of a window's. */
static uint32_t free_before(const struct op *op, uint64_t at)
{
	uint32_t n = 0;

	while (n < HOOD && at > n) {
		uint64_t last = at - n - 1;
		uint32_t off = off_of(last) + 1, max = HOOD - n, got;

		got = chunk_free_before(
			chunks_peek(&op->a->chunks, chunk_of(last)), off, max);
		n += got;
		if (got < off)
			break;
	}
	return n;
}

/* The same from `at` on, at most `most`. */
static uint32_t free_after(const struct op *op, uint64_t at, uint32_t most)
{
	uint32_t n = 0;

	while (n < most && at + n < op->a->units) {
		uint32_t off = off_of(at + n), max = most - n, got;

		got = chunk_free_after(
			chunks_peek(&op->a->chunks, chunk_of(at + n)), off, max);
		n += got;
		if (off + got < ALLOC_CHUNK)
			break;
	}
	return n;
}

/*
 * Whether units are all in use, or all free; and what is free before and after
 * them, up to HOOD at least.
 */
static bool look_around(const struct op *op, uint64_t s, uint64_t e, bool used,
			struct around *r)
{
	uint32_t off = off_of(s);

	if (off + (e - s) > ALLOC_CHUNK) {
		struct piece p;

		for (uint64_t at = s; piece_next(op, &at, e, &p);)
			if (!chunk_around(p.c, p.off, p.len, used, 0, r))
				return false;
		r->before = free_before(op, s);
		r->after = free_after(op, e, HOOD);
		return true;
	}
	if (!chunk_around(chunks_peek(&op->a->chunks, chunk_of(s)), off,
			  (uint32_t)(e - s), used, HOOD, r))
		return false;
	/* It may go on in the chunk before, or after. */
	if (r->before == off)
		r->before = free_before(op, s);
	if (off + (e - s) + r->after == ALLOC_CHUNK)
		r->after = free_after(op, e, HOOD);
	return true;
}

bool space_long_run(struct alloc *a, uint64_t unit, struct run *run)
{
	struct pair p = { unit, UINT64_MAX };

	run->by_size.leaf = NULL;
	if (!btree_floor(&a->by_start, p, &p, &run->by_start))
		return false;
	run->start = p.k;
	run->len = p.v;
	return run->start + run->len > unit;
}

int space_prepare(struct op *op, uint64_t s, uint64_t e)
{
	struct piece p;
	int err = 0;

	for (uint64_t at = s; !err && piece_next(op, &at, e, &p);)
		err = chunk_prepare(&op->a->chunks, p.c);
	return err;
}

int space_mark_used(struct op *op, uint64_t s, uint64_t e)
{
	struct piece p;
	int err = space_prepare(op, s, e);

	if (err)
		return err;
	for (uint64_t at = s; piece_next(op, &at, e, &p);)
		chunk_mark_used(&op->a->chunks, p.c, p.off, p.len);
	return 0;
}

/* -- The index -- */

static void size_insert(struct op *op, uint64_t start, uint64_t len)
{
	btree_insert(&op->a->by_size, (struct pair){ len, start });
}

static void size_remove(struct op *op, uint64_t start, uint64_t len,
			const struct btree_spot *spot)
{
	if (!btree_remove(&op->a->by_size, (struct pair){ len, start }, spot))
		abort();		/* by_size lacks a run of by_start */
}

static struct pair start_pair(const struct run *run)
{
	return (struct pair){ run->start, run->len };
}

int space_cut(struct op *op, struct run run, uint64_t s, uint64_t e)
{
	struct alloc *a = op->a;
	uint64_t left = s - run.start, right = run.start + run.len - e;
	bool left_long = left > a->border, right_long = right > a->border;
	struct pair was = start_pair(&run), rest = { e, right };
	bool had;

	if (left_long)
		size_insert(op, run.start, left);
	if (right_long)
		size_insert(op, e, right);
	if (left_long)
		had = btree_update(&a->by_start, was, left, &run.by_start);
	else if (right_long)
		had = btree_replace(&a->by_start, was, rest, &run.by_start);
	else
		had = btree_remove(&a->by_start, was, &run.by_start);
	if (!had) {
		if (left_long)
			size_remove(op, run.start, left, NULL);
		if (right_long)
			size_remove(op, e, right, NULL);
		return -EAGAIN;
	}
	if (left_long && right_long)
		btree_insert(&a->by_start, rest);
	size_remove(op, run.start, run.len, &run.by_size);
	if (left && !left_long)
		hint_push(op, run.start, (uint32_t)left);
	if (right && !right_long)
		hint_push(op, e, (uint32_t)right);
	op->sh->n.splits += left || right;
	return 0;
}

int space_take(struct op *op, uint64_t s, uint64_t e)
{
	struct around r;
	struct run run;
	int err = space_prepare(op, s, e);

	if (err)
		return err;
	if (!look_around(op, s, e, false, &r))
		return -EAGAIN;
	if (r.before + (e - s) + r.after > op->a->border) {
		if (!space_long_run(op->a, s, &run) || run.start + run.len < e)
			return -EAGAIN;
		err = space_cut(op, run, s, e);
		if (err)
			return err;
	} else {
		if (r.before)
			hint_push(op, s - r.before, r.before);
		if (r.after)
			hint_push(op, e, r.after);
		op->sh->n.splits += r.before || r.after;
	}
	return space_mark_used(op, s, e);
}

/* Enter [start, end) in both trees, in the place of `left` and `right`. */
static int long_insert(struct op *op, uint64_t start, uint64_t end,
		       const struct run *left, const struct run *right)
{
	struct btree *by_start = &op->a->by_start;
	struct pair whole = { start, end - start };
	bool had = true;

	size_insert(op, start, end - start);
	if (left) {
		if (right)
			had = btree_remove(by_start, start_pair(right),
					   &right->by_start);
		if (had && !btree_update(by_start, start_pair(left), whole.v,
					 right ? NULL : &left->by_start)) {
			had = false;
			if (right)
				btree_insert(by_start, start_pair(right));
		}
	} else if (right) {
		had = btree_replace(by_start, start_pair(right), whole,
				    &right->by_start);
	} else {
		btree_insert(by_start, whole);
	}
	if (!had) {
		size_remove(op, start, end - start, NULL);
		return -EAGAIN;
	}
	if (left)
		size_remove(op, left->start, left->len, NULL);
	if (right)
		size_remove(op, right->start, right->len, NULL);
	return 0;
}

/* Units enter the index, with `left` and `right` of them free already. */
static int publish(struct op *op, uint64_t s, uint64_t e, uint32_t left,
		   uint32_t right)
{
	struct alloc *a = op->a;
	bool left_long = left > a->border, right_long = right > a->border;
	uint64_t start = s - left, end = e + right;
	struct run lrun, rrun;
	int err = 0;

	if (left_long) {
		if (!space_long_run(a, s - 1, &lrun) ||
		    lrun.start + lrun.len != s)
			return -EAGAIN;
		start = lrun.start;
	}
	if (right_long) {
		if (!space_long_run(a, e, &rrun) || rrun.start != e)
			return -EAGAIN;
		end = e + rrun.len;
	}
	if (end - start > a->border)
		err = long_insert(op, start, end, left_long ? &lrun : NULL,
				  right_long ? &rrun : NULL);
	else
		hint_push(op, start, (uint32_t)(end - start));
	if (!err)
		op->sh->n.merges += (left > 0u) + (right > 0u);
	return err;
}

int space_publish(struct op *op, uint64_t s, uint64_t e)
{
	return publish(op, s, e, free_before(op, s), free_after(op, e, HOOD));
}

int space_give(struct op *op, uint64_t s, uint64_t e)
{
	struct around r;
	struct piece p;
	int err = look_around(op, s, e, true, &r) ? space_prepare(op, s, e) : -EINVAL;

	if (!err)
		err = publish(op, s, e, r.before, r.after);
	if (err)
		return err;
	for (uint64_t at = s; piece_next(op, &at, e, &p);)
		chunk_mark_free(&op->a->chunks, p.c, p.off, p.len);
	return 0;
}

void space_end_at(struct op *op, uint64_t end)
{
	struct run run;
	uint32_t before;

	if (space_long_run(op->a, end, &run)) {
		space_cut(op, run, end, run.start + run.len);
		return;
	}
	before = free_before(op, end);
	if (before)
		hint_push(op, end - before, before);
}

int space_index_chunk(struct op *op, uint64_t chunk, bool long_too)
{
	struct chunk *c = chunks_peek(&op->a->chunks, chunk);
	uint64_t base = chunk * ALLOC_CHUNK;
	uint32_t off = 0;

	while (off < c->units) {
		uint32_t n = chunk_free_after(c, off, c->units);
		int err;

		if (!n) {
			if (c->win_hi > c->win_lo && off == c->win_lo) {
				off = c->win_hi;
			} else if (!chunk_next_run(c, off, &off)) {
				break;
			}
			continue;
		}
		if (long_too) {
			err = space_publish(op, base + off, base + off + n);
			if (err)
				return err;
		} else if (n <= op->a->border) {
			uint64_t s = base + off - (off ? 0 : free_before(op, base));
			uint32_t len = free_after(op, s, HOOD);

			if (len <= op->a->border && len >= op->refill)
				hint_push(op, s, len);
		}
		off += n;
	}
	return 0;
}

/* -- Hints -- */

/*
 * Put `chunk`, with a run of `len` units without a hint, on the list of those to
 * be searched again. It may be on other lists for shorter ones.
 */
static void lost_push(struct op *op, uint64_t chunk, uint32_t len)
{
	struct shard *sh = op->sh;
	struct chunk *c = chunks_peek(&op->a->chunks, chunk);
	uint32_t width = width_of(len);

	if (atomic_get(&c->lost) >= width)
		return;
	if (sh->lost_count == sh->lost_max) {
		uint32_t max = sh->lost_max ? sh->lost_max * 2 : 64;
		void *grown = realloc(sh->lost, max * sizeof(*sh->lost));

		if (!grown) {
			atomic_set(&op->a->lost_all, true);
			return;
		}
		sh->lost = grown;
		sh->lost_max = max;
	}
	atomic_set(&c->lost, (uint8_t)width);
	sh->lost[sh->lost_count++] = chunk;
	if (sh->lost_width < width)
		atomic_set(&sh->lost_width, width);
}

/*
 * Runs of a few units may be as many as units; they are found as well by
 * searching a chunk again, so they get less of the memory. `must`: none of
 * that counts, a chunk's worth is little.
 */
#define TINY_RUN 8
#define CROWD 256		/* hints in a bin that are worth a look */
#define LONGER_SHARE 8

static bool bin_push(struct alloc *a, struct bin *b, uint64_t start,
		     uint64_t most)
{
	uint32_t at = b->count % HINTS;

	if (!at && (b->count || !b->top)) {
		struct hints *h = NULL;

		if (atomic_add(&a->hints, HINTS) <= most)
			h = pool_get(&a->hint_blocks);
		if (!h) {
			atomic_add(&a->hints, -HINTS);
			return false;
		}
		h->below = b->top;
		b->top = h;
	}
	b->top->starts[at] = start;
	b->count++;
	return true;
}

static uint64_t bin_pop(struct alloc *a, struct bin *b)
{
	struct hints *h = b->top;
	uint32_t at = --b->count % HINTS;
	uint64_t start = h->starts[at];

	if (!at && b->count) {
		b->top = h->below;
		pool_put(&a->hint_blocks, h);
		atomic_add(&a->hints, -HINTS);
	}
	return start;
}

static void filled_set(struct shard *sh, uint32_t i, bool filled)
{
	uint64_t bit = 1ull << i % 64, was = sh->filled[i / 64];

	uint64_t now = filled ? was | bit : was & ~bit;

	atomic_set(&sh->filled[i / 64], now);
	bit = 1ull << i / 64;
	if (!was != !now)
		atomic_set(&sh->words, now ? sh->words | bit : sh->words & ~bit);
}

void hint_push(struct op *op, uint64_t start, uint32_t len)
{
	struct shard *sh = op->sh;
	struct bin *b = &sh->bins[len - 1];
	uint64_t most = op->a->hints_max * (len < TINY_RUN ? 1 : LONGER_SHARE);

	if (!bin_push(op->a, b, start, op->refill ? UINT64_MAX : most)) {
		lost_push(op, chunk_of(start), len);
		return;
	}
	if (b->count == 1)
		filled_set(sh, len - 1, true);
	/* Has it grown because nobody wants such runs? */
	if (b->count % CROWD == 0 && b->count >= 4 * b->tidy)
		sh->crowded = len;
}

uint64_t hint_pop(struct op *op, uint32_t run)
{
	struct bin *b = &op->sh->bins[run - 1];
	uint64_t start = bin_pop(op->a, b);

	if (!b->count)
		filled_set(op->sh, run - 1, false);
	return start;
}

uint32_t hints_longest(const struct shard *sh)
{
	uint64_t words = atomic_get(&sh->words), word;
	uint32_t w;

	if (!words)
		return 0;
	w = 63 - (uint32_t)__builtin_clzll(words);
	word = atomic_get(&sh->filled[w]);
	return word ? w * 64 + 64 - (uint32_t)__builtin_clzll(word) : 0;
}

/* In its hood: is there a short run of just `run` units at `start`? */
static bool hint_good(struct op *op, uint64_t start, uint32_t run)
{
	uint64_t end = start + run;
	struct around r;

	return end <= op->a->units && !space_ready(op, start, end) &&
	       look_around(op, start, end, false, &r) && !r.before && !r.after;
}

static int highest_first(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x < y) - (x > y);
}

/* Keep one hint of each run that is there. */
static void hints_keep(struct op *op, struct bin *b, uint32_t run,
		       const uint64_t *starts, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		uint64_t start = starts[i];
		struct hood h;

		if (i && start == starts[i - 1])
			continue;
		if (hood_lock(op, start, start + run, &h)) {
			/* No memory to look: neither to keep it. */
			atomic_set(&op->a->lost_all, true);
			continue;
		}
		if (hint_good(op, start, run) &&
		    !bin_push(op->a, b, start, UINT64_MAX))
			lost_push(op, chunk_of(start), run);
		hood_unlock(op, &h);
	}
}

void hints_tidy_bin(struct op *op)
{
	struct shard *sh = op->sh;
	uint32_t run = sh->crowded;
	struct bin *b = &sh->bins[run - 1];
	uint32_t count = b->count;
	uint64_t *starts = malloc((count + 1) * sizeof(*starts));

	sh->crowded = 0;
	for (uint32_t i = 0; starts && i < count; i++)
		starts[i] = bin_pop(op->a, b);
	if (starts) {
		qsort(starts, count, sizeof(*starts), highest_first);
		hints_keep(op, b, run, starts, count);
	}
	free(starts);
	b->tidy = b->count;
	if (!b->count)
		filled_set(sh, run - 1, false);
}

int hint_take(struct op *op, uint64_t start, uint32_t run, uint32_t len)
{
	struct hood h;
	int err = hood_lock(op, start, start + run, &h);

	if (err)
		return err;
	if (!hint_good(op, start, run)) {
		err = -ENOENT;
		goto out;
	}
	err = space_mark_used(op, start, start + len);
	if (!err && run > len) {
		hint_push(op, start + len, run - len);
		op->sh->n.splits++;
	}
out:
	hood_unlock(op, &h);
	return err;
}

/* Take a chunk with a lost run of `width` off the list. False: there is none. */
static bool lost_pop(struct op *op, uint32_t width, uint64_t *chunk)
{
	struct shard *sh = op->sh;

	for (uint32_t i = sh->lost_count; i-- > 0;) {
		uint8_t lost;

		*chunk = sh->lost[i];
		lost = atomic_get(&chunks_peek(&op->a->chunks, *chunk)->lost);
		/* Searched by way of another entry, it needs none. */
		if (!lost || lost >= width)
			sh->lost[i] = sh->lost[--sh->lost_count];
		if (lost >= width)
			return true;
	}
	return false;
}

bool hints_search_lost(struct op *op, uint32_t len)
{
	uint32_t width = width_of(len);
	uint64_t chunk, s, e;
	struct chunk *c;
	struct hood h;
	bool found;

	if (!lost_pop(op, width, &chunk)) {
		atomic_set(&op->sh->lost_width, width - 1);
		return false;
	}
	s = chunk * ALLOC_CHUNK;
	e = min_u64(s + ALLOC_CHUNK, op->a->units);
	c = chunks_get(&op->a->chunks, chunk);
	if (!c || hood_lock(op, s, e, &h)) {
		atomic_set(&op->a->lost_all, true);
		return false;
	}
	atomic_set(&c->lost, 0);
	op->refill = 1u << (width - 1);
	space_index_chunk(op, chunk, false);
	op->refill = 0;
	/* Without memory it is lost again: there is no use in more of this. */
	found = !c->lost;
	if (!found)
		atomic_set(&op->a->lost_all, true);
	/* What is shorter stays lost. */
	if (width > 1)
		lost_push(op, chunk, (1u << (width - 1)) - 1);
	hood_unlock(op, &h);
	return found;
}

static void lost_swap(struct shard *a, struct shard *b)
{
	uint64_t *lost = a->lost;
	uint32_t count = a->lost_count, max = a->lost_max, width = a->lost_width;

	a->lost = b->lost;
	a->lost_count = b->lost_count;
	a->lost_max = b->lost_max;
	atomic_set(&a->lost_width, b->lost_width);
	b->lost = lost;
	b->lost_count = count;
	b->lost_max = max;
	atomic_set(&b->lost_width, width);
}

bool hints_steal(struct shard *own, struct shard *from, uint32_t len)
{
	uint32_t run = hints_ceil(from, len);

	if (run) {
		struct bin b = own->bins[run - 1];

		own->bins[run - 1] = from->bins[run - 1];
		from->bins[run - 1] = b;
		filled_set(own, run - 1, true);
		filled_set(from, run - 1, b.count > 0);
		return true;
	}
	if (from->lost_width >= width_of(len)) {
		lost_swap(own, from);
		return true;
	}
	return false;
}

/* -- Windows -- */

static unsigned owner_id(const struct op *op, unsigned slot)
{
	return (unsigned)(op->sh - op->a->shards) * WINDOWS + slot + 1;
}

/* The chunk of the window in `slot`, locked, if the window still is there. */
static struct chunk *window_lock(struct op *op, unsigned slot, uint64_t *chunk)
{
	struct chunk *c;

	if (!op->sh->windows[slot])
		return NULL;
	*chunk = op->sh->windows[slot] - 1;
	c = chunks_peek(&op->a->chunks, *chunk);
	if (!op->world)
		latch_lock(&c->latch);
	if (c->win_owner == owner_id(op, slot))
		return c;
	if (!op->world)
		latch_unlock(&c->latch);
	atomic_set(&op->sh->windows[slot], 0);
	return NULL;
}

static void window_unlock(struct op *op, struct chunk *c)
{
	if (!op->world)
		latch_unlock(&c->latch);
}

int window_bump(struct op *op, struct chunk *c, uint32_t len)
{
	int err = chunk_prepare(&op->a->chunks, c);

	if (err)
		return err;
	chunk_mark_used(&op->a->chunks, c, c->win_lo, len);
	c->win_lo += len;
	if (c->win_lo == c->win_hi)
		c->win_owner = 0;
	return 0;
}

int window_take(struct op *op, unsigned slot, uint32_t len, uint64_t most,
		struct extent *out)
{
	uint64_t chunk;
	uint32_t left;
	struct chunk *c = window_lock(op, slot, &chunk);
	int err = -ENOSPC;

	if (!c)
		return err;
	left = c->win_hi - c->win_lo;
	if (left >= len && left <= most) {
		*out = (struct extent){ chunk * ALLOC_CHUNK + c->win_lo, len };
		err = window_bump(op, c, len);
	}
	window_unlock(op, c);
	return err;
}

uint32_t window_room(struct op *op, uint64_t chunk)
{
	struct chunk *c = chunks_peek(&op->a->chunks, chunk);
	uint32_t room;

	if (!op->world)
		latch_lock(&c->latch);
	room = c->win_hi - c->win_lo;
	window_unlock(op, c);
	return room;
}

int window_close_chunk(struct op *op, uint64_t chunk)
{
	uint64_t base = chunk * ALLOC_CHUNK;
	struct chunk *c = chunks_peek(&op->a->chunks, chunk);
	struct hood h;
	int err;

	for (;;) {
		err = hood_lock(op, base, base + c->units, &h);
		if (err)
			return err;
		if (c->win_lo < c->win_hi)
			err = space_publish(op, base + c->win_lo,
					    base + c->win_hi);
		if (!err) {
			c->win_lo = c->win_hi = 0;
			c->win_owner = 0;
		}
		hood_unlock(op, &h);
		if (err != -EAGAIN)
			return err;
		sched_yield();
	}
}

int window_close(struct op *op, unsigned slot)
{
	uint64_t chunk;
	struct chunk *c = window_lock(op, slot, &chunk);
	int err;

	if (!c)
		return 0;
	window_unlock(op, c);
	err = window_close_chunk(op, chunk);
	if (!err)
		atomic_set(&op->sh->windows[slot], 0);
	return err;
}

/*
 * Make [from, to) of `run`, in one chunk, the window of `slot`, in the place of
 * the one that is there. -EAGAIN when the run is gone, -EBUSY when the chunk
 * has a window already.
 */
int window_open(struct op *op, unsigned slot, struct run run, uint64_t from,
		uint64_t to)
{
	uint64_t chunk = chunk_of(from);
	struct chunk *c;
	struct hood h;
	int err = window_close(op, slot);

	if (!err)
		err = hood_lock(op, from, to, &h);
	if (err)
		return err;
	c = chunks_peek(&op->a->chunks, chunk);
	err = c->win_owner ? -EBUSY : space_cut(op, run, from, to);
	if (!err) {
		c->win_lo = off_of(from);
		c->win_hi = c->win_lo + (uint32_t)(to - from);
		c->win_owner = (uint16_t)owner_id(op, slot);
		atomic_set(&op->sh->windows[slot], chunk + 1);
	}
	hood_unlock(op, &h);
	return err;
}
