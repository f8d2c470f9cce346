/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Looking at the whole: free extents one after the other, statistics, and
 * holding the structures against each other.
 */
#include "alloc/alloc_priv.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

/*
 * The free part of `unit`'s chunk from `unit` on: *s and *e. -ENOENT when
 * there is none. A long run is jumped over by the tree; most chunks of a big
 * space are inside one and have no struct.
 */
static int free_part(struct alloc *a, uint64_t unit, uint64_t *s, uint64_t *e)
{
	uint64_t chunk = chunk_of(unit), base = chunk * ALLOC_CHUNK;
	struct run run;
	struct chunk *c;
	struct op op;
	uint32_t off = 0, len;
	int err;

	for (;;) {
		err = op_enter(a, &op);
		if (err)
			return err;
		if (space_long_run(a, unit, &run)) {
			*s = unit;
			*e = run.start + run.len;
			op_leave(&op);
			return 0;
		}
		c = chunks_get(&a->chunks, chunk);
		if (!c) {
			op_leave(&op);
			return -ENOMEM;
		}
		latch_lock(&c->latch);
		err = c->state == CHUNK_READY ? 0 : -ENODATA;
		len = err ? 0 : chunk_next_run(c, off_of(unit), &off);
		latch_unlock(&c->latch);
		op_leave(&op);
		if (!err)
			break;
		err = load_chunk(a, chunk, UINT32_MAX);
		if (err)
			return err;
	}
	*s = base + off;
	*e = base + off + len;
	return len ? 0 : -ENOENT;
}

/* Move *start, which is free, to the first of the free units around it. */
static int reach_back(struct alloc *a, uint64_t *start)
{
	uint64_t at = *start;
	bool more = true;

	while (more && at > 0) {
		uint32_t off = off_of(at - 1) + 1, n = 0;
		struct run run;
		struct chunk *c;
		struct op op;
		int err = op_enter(a, &op);

		if (err)
			return err;
		c = chunks_get(&a->chunks, chunk_of(at - 1));
		if (!c) {
			op_leave(&op);
			return -ENOMEM;
		}
		if (space_long_run(a, at - 1, &run)) {
			at = run.start;
		} else {
			latch_lock(&c->latch);
			if (c->state == CHUNK_READY)
				while (n < off &&
				       chunk_all_free(c, off - n - 1, 1))
					n++;
			latch_unlock(&c->latch);
			at -= n;
			more = n == off;
		}
		op_leave(&op);
	}
	*start = at;
	return 0;
}

/* Describe all there is, so that no chunk needs a load only to be counted. */
static int learn_all(struct alloc *a)
{
	int err;

	do
		err = load_more(a);
	while (!err);
	return err == -ENOENT ? 0 : err;
}

int alloc_next_free(struct alloc *a, uint64_t from, struct extent *out)
{
	uint64_t units = __atomic_load_n(&a->units, __ATOMIC_RELAXED);
	uint64_t s, e, start = 0, end = 0;
	int err = load_complete(a) ? 0 : learn_all(a);

	if (err)
		return err;
	for (uint64_t at = from; at < units; at = e) {
		err = free_part(a, at, &s, &e);
		if (err == -ENOENT) {
			if (start < end)
				break;
			e = (chunk_of(at) + 1) * ALLOC_CHUNK;
			continue;
		}
		if (err)
			return err;
		if (start < end && s != end)
			break;
		if (start == end)
			start = s;
		end = e;
	}
	if (start == end)
		return -ENOENT;
	if (start == from) {
		err = reach_back(a, &start);
		if (err)
			return err;
	}
	*out = (struct extent){ start, end - start };
	return 0;
}

static void sum_counters(struct alloc *a, struct alloc_stats *out)
{
	int64_t reserved = 0, deferred = 0;

	for (unsigned i = 0; i < a->cfg.shards; i++) {
		struct counters *n = &a->shards[i].n;

		latch_lock(&a->shards[i].latch);
		out->allocs += n->allocs;
		out->alloc_units += n->alloc_units;
		out->frees += n->frees;
		out->freed_units += n->freed_units;
		out->failures += n->failures;
		out->splits += n->splits;
		out->merges += n->merges;
		out->steals += n->steals;
		out->chunk_loads += n->chunk_loads;
		out->saves += n->saves;
		reserved += n->reserved;
		deferred += n->deferred;
		latch_unlock(&a->shards[i].latch);
	}
	out->reserved_units = reserved > 0 ? (uint64_t)reserved : 0;
	out->deferred_units = deferred > 0 ? (uint64_t)deferred : 0;
}

int alloc_stats(struct alloc *a, bool deep, struct alloc_stats *out)
{
	struct alloc_stats st = { .units = a->units };
	struct op op;
	int err;

	st.free_units = alloc_free_units(a);
	sum_counters(a, &st);
	err = op_enter_world(a, &op);
	if (err)
		return err;
	st.memory_bytes = sizeof(*a) + a->cfg.shards * sizeof(struct shard) +
			  pool_bytes(&a->hint_blocks) +
			  btree_bytes(&a->by_size) + btree_bytes(&a->by_start) +
			  chunks_bytes(&a->chunks);
	for (unsigned i = 0; i < a->cfg.shards; i++)
		st.memory_bytes += a->shards[i].lost_max * sizeof(uint64_t);
	op_leave(&op);
	for (uint64_t at = 0; deep;) {
		struct extent e;

		err = alloc_next_free(a, at, &e);
		if (err == -ENOENT)
			break;
		if (err)
			return err;
		st.free_extents++;
		if (e.len > st.largest_free)
			st.largest_free = e.len;
		st.histogram[63 - __builtin_clzll(e.len)]++;
		at = e.start + e.len;
	}
	*out = st;
	return 0;
}

/* -- Check -- */

static int __attribute__((format(printf, 3, 4)))
complain(char *msg, size_t msg_len, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	if (msg && msg_len)
		vsnprintf(msg, msg_len, fmt, ap);
	va_end(ap);
	return -EUCLEAN;
}

struct check {
	struct alloc *a;
	char *msg;
	size_t msg_len;
	int64_t runs;			/* long ones found in the bitmap */
	uint64_t free;
};

/* A free run as the bitmap has it, not in a window: is it where it belongs? */
static int check_run(struct check *k, uint64_t s, uint64_t e)
{
	struct pair p = { e - s, s }, q;
	struct run run;

	if (e - s <= k->a->border)
		return 0;
	k->runs++;
	if (!space_long_run(k->a, s, &run) || run.start != s || run.len != e - s)
		return complain(k->msg, k->msg_len, "free units %" PRIu64
				" to %" PRIu64 " are not a run in the tree of "
				"starts", s, e - 1);
	if (!btree_ceil(&k->a->by_size, p, &q, NULL) || q.k != p.k || q.v != p.v)
		return complain(k->msg, k->msg_len, "free units %" PRIu64
				" to %" PRIu64 " are not a run in the tree of "
				"sizes", s, e - 1);
	return 0;
}

static int check_chunk(struct check *k, uint64_t chunk, struct chunk *c)
{
	uint32_t free = 0, off = 0, at, n;

	while ((n = chunk_next_run(c, off, &at))) {
		free += n;
		off = at + n;
	}
	if (c->state == CHUNK_READY && free != c->free)
		return complain(k->msg, k->msg_len, "chunk %" PRIu64 " has %"
				PRIu32 " units free, counts %" PRIu32,
				chunk, free, c->free);
	if (c->win_lo < c->win_hi &&
	    !chunk_all_free(c, c->win_lo, c->win_hi - c->win_lo))
		return complain(k->msg, k->msg_len, "chunk %" PRIu64
				": units of its window are in use", chunk);
	return 0;
}

static int check_bitmap(struct check *k)
{
	struct alloc *a = k->a;
	uint64_t run_s = 0, run_e = 0;
	int err;

	for (uint64_t i = 0; i < a->chunks.count;) {
		struct chunk *c = chunks_peek(&a->chunks, i);
		uint64_t base = i * ALLOC_CHUNK;
		struct run run;
		uint32_t off = 0;

		if (!c && space_long_run(a, base, &run)) {
			/* Inside a long run: jump to where its end is. */
			uint64_t end = run.start + run.len;
			uint64_t next = end % ALLOC_CHUNK && end != a->units
						? chunk_of(end)
						: (end + ALLOC_CHUNK - 1) / ALLOC_CHUNK;

			if (next == i)
				c = chunks_get(&a->chunks, i);
			else {
				uint64_t stop = min_u64(next * ALLOC_CHUNK,
							a->units);

				if (run_e != base)
					run_s = base;
				run_e = stop;
				k->free += stop - base;
				i = next;
				continue;
			}
		}
		i++;
		if (!c || c->state != CHUNK_READY)
			continue;
		err = check_chunk(k, i - 1, c);
		if (err)
			return err;
		k->free += c->free;
		while (off < c->units) {
			uint32_t n = chunk_free_after(c, off, c->units);

			if (n) {
				if (run_e != base + off || run_s == run_e) {
					err = check_run(k, run_s, run_e);
					if (err)
						return err;
					run_s = base + off;
				}
				run_e = base + off + n;
				off += n;
			} else if (c->win_lo < c->win_hi && off >= c->win_lo &&
				   off < c->win_hi) {
				err = check_run(k, run_s, run_e);
				if (err)
					return err;
				run_s = run_e = 0;
				off = c->win_hi;
			} else if (!chunk_next_run(c, off, &off)) {
				break;
			}
		}
	}
	return check_run(k, run_s, run_e);
}

static int check_counts(struct check *k)
{
	struct alloc *a = k->a;
	int64_t sizes = btree_check(&a->by_size);
	int64_t starts = btree_check(&a->by_start);
	int64_t reserved = 0;
	uint64_t free = alloc_free_units(a);

	if (sizes < 0 || starts < 0)
		return complain(k->msg, k->msg_len, "the tree of %s is out of "
				"order", sizes < 0 ? "sizes" : "starts");
	if (sizes != starts || starts != k->runs)
		return complain(k->msg, k->msg_len, "%" PRId64 " long runs, %"
				PRId64 " in the tree of starts, %" PRId64
				" in the tree of sizes", k->runs, starts, sizes);
	for (unsigned i = 0; i < a->cfg.shards; i++)
		reserved += a->shards[i].n.reserved;
	if (load_complete(a) && free + (uint64_t)reserved != k->free)
		return complain(k->msg, k->msg_len, "%" PRIu64 " units free, "
				"counted %" PRIu64 " and %" PRId64
				" reserved", k->free, free, reserved);
	return 0;
}

int alloc_check(struct alloc *a, char *msg, size_t msg_len)
{
	struct check k = { .a = a, .msg = msg, .msg_len = msg_len };
	struct op op;
	int err = op_enter_world(a, &op);

	if (err)
		return err;
	err = check_bitmap(&k);
	if (!err)
		err = check_counts(&k);
	op_leave(&op);
	return err;
}
