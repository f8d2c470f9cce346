/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Growing and shrinking, with the world stopped. A unit that does not exist is
 * one in use that nobody owns: growing frees such units, shrinking takes free
 * ones for good.
 */
#include "alloc/alloc_priv.h"

#include <errno.h>

/* Units [from, to) are new. From the top down, so that what lies behind a
   part is in the index already when the part enters it. */
static int enter_new(struct op *op, uint64_t from, uint64_t to)
{
	struct alloc *a = op->a;
	int err = 0;

	while (!err && from < to) {
		uint64_t last = chunk_of(to - 1), first = last, s;
		bool exists = chunks_peek(&a->chunks, last) != NULL;
		struct hood h;

		/* Chunks without a struct are free already, all at once. */
		while (!exists && first > chunk_of(from) &&
		       !chunks_peek(&a->chunks, first - 1))
			first--;
		s = first * ALLOC_CHUNK > from ? first * ALLOC_CHUNK : from;
		err = hood_lock(op, s, s + 1, &h);
		if (!err)
			err = hood_lock(op, to - 1, to, &h);
		if (!err)
			err = exists ? space_give(op, s, to)
				     : space_publish(op, s, to);
		if (!err)
			atomic_add(&a->pool, to - s);
		to = s;
	}
	return err;
}

/* At hand: a struct for each border that enter_new() comes to. */
static int prepare_structs(struct alloc *a, uint64_t from, uint64_t to)
{
	uint64_t i = chunk_of(from), end = chunk_of(to - 1) + 1;
	size_t pages = 2;

	while ((i = chunks_next(&a->chunks, i, end)) < end) {
		i = (i / PAGE_CHUNKS + 1) * PAGE_CHUNKS;
		pages++;
	}
	return pool_prepare(&a->chunks.structs, 2 * pages);
}

static int grow(struct op *op, uint64_t units)
{
	struct alloc *a = op->a;
	uint64_t was = a->units;
	int err = 0;

	if (was % ALLOC_CHUNK)
		err = chunks_get(&a->chunks, chunk_of(was))
			      ? space_ready(op, was - 1, was)
			      : -ENOMEM;
	if (!err)
		err = prepare_structs(a, was, units);
	if (!err)
		err = chunks_resize(&a->chunks, units);
	if (err)
		return err;
	atomic_set(&a->units, units);
	return enter_new(op, was, units);
}

/* The first run in use from `from` on: -EBUSY and *blocking; 0: there is none. */
static int find_used(struct op *op, uint64_t from, struct extent *blocking)
{
	struct alloc *a = op->a;
	uint64_t at = from, start = 0, end = 0;

	while (at < a->units) {
		uint64_t base = chunk_of(at) * ALLOC_CHUNK;
		struct chunk *c = chunks_peek(&a->chunks, chunk_of(at));
		uint32_t off, n;
		struct run run;

		if (start == end && space_long_run(a, at, &run)) {
			at = run.start + run.len;
			continue;
		}
		c = c ? c : chunks_get(&a->chunks, chunk_of(at));
		if (!c)
			return -ENOMEM;
		if (c->state != CHUNK_READY) {
			op->need = chunk_of(at);
			return -ENODATA;
		}
		n = chunk_next_run(c, off_of(at), &off);
		if (!n)
			off = c->units;
		if (base + off > at) {
			start = start == end ? at : start;
			end = base + off;
		}
		if (start < end && off < c->units)
			break;
		at = base + off + n;
	}
	if (start == end)
		return 0;
	*blocking = (struct extent){ start, end - start };
	return -EBUSY;
}

static int shrink(struct op *op, uint64_t units, struct extent *blocking)
{
	struct alloc *a = op->a;
	uint64_t gone = a->units - units;
	struct hood h;
	int err = find_used(op, units, blocking);

	if (err)
		return err;
	for (uint64_t i = chunk_of(units); i < a->chunks.count; i++) {
		i = chunks_next(&a->chunks, i, a->chunks.count);
		if (i < a->chunks.count && chunks_peek(&a->chunks, i)->win_owner)
			err = window_close_chunk(op, i);
		if (err)
			return err;
	}
	err = promise_from_all(op, gone);
	if (err)
		return err;
	/* What can fail comes before the first change. */
	err = hood_lock(op, units, units, &h);
	if (!err)
		err = chunks_resize(&a->chunks, units);
	if (err) {
		atomic_add(&a->pool, gone);
		return err;
	}
	space_end_at(op, units);
	atomic_set(&a->units, units);
	return 0;
}

int alloc_resize(struct alloc *a, uint64_t units, struct extent *blocking)
{
	uint64_t need = 0;
	int err;

	if (!units || units > 1ull << 52)
		return -EINVAL;
	lock_lock(&a->state_lock);
	do {
		struct extent first = { 0, 0 };
		struct op op;

		err = op_enter_world(a, &op);
		if (err)
			break;
		if (units > a->units)
			err = grow(&op, units);
		else if (units < a->units)
			err = shrink(&op, units, &first);
		op_leave(&op);
		need = op.need;
		if (err == -EBUSY && blocking)
			*blocking = first;
	} while (err == -ENODATA && !(err = load_chunk(a, need, UINT32_MAX)));
	lock_unlock(&a->state_lock);
	return err;
}
