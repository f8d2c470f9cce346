/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Learning what the source knows. Chunks are described in address order as
 * somebody wants more free space (load_more), and loaded out of order when
 * somebody frees, or wants a place, in one that is not known yet (load_chunk).
 *
 * The callbacks run with no lock held. What they said enters the index with
 * the world stopped: that is rare, and then nothing can be half done.
 */
#include "alloc/alloc_priv.h"

#include <errno.h>
#include <stdlib.h>

/*
 * State changes hands under the chunk's lock, or with the world stopped; so
 * looking takes a shard too. A state that is `from` becomes `to`, in the same
 * moment: what is described meanwhile must not be loaded over. Returns what it
 * was.
 */
static int chunk_change(struct alloc *a, uint64_t chunk, int from, int to)
{
	struct chunk *c = chunks_peek(&a->chunks, chunk);
	struct shard *sh = &a->shards[op_shard_of_thread(a)];
	int state;

	if (!c)
		return CHUNK_UNKNOWN;
	latch_lock(&sh->latch);
	latch_lock(&c->latch);
	state = c->state;
	if (state == from)
		c->state = (uint8_t)to;
	latch_unlock(&c->latch);
	latch_unlock(&sh->latch);
	return state;
}

static int chunk_state(struct alloc *a, uint64_t chunk)
{
	return chunk_change(a, chunk, -1, -1);
}

/*
 * Nodes for all long runs that a chunk can have. By start they follow each
 * other; by size those of one size do, and there cannot be many sizes.
 */
static int prepare_nodes(struct alloc *a, const struct chunk *c)
{
	size_t runs = min_u64(c->edges / 2 + 1, ALLOC_CHUNK / (a->border + 2));
	size_t nodes = 32 + runs / 8 + 2 * min_u64(runs, 256);
	int err = btree_prepare(&a->by_size, nodes);

	return err ? err : btree_prepare(&a->by_start, nodes);
}

/* Make `bits` the chunk's, which is not ready yet. Consumes them. */
int load_adopt(struct alloc *a, uint64_t chunk, uint64_t *bits, uint32_t expect)
{
	uint64_t s = chunk * ALLOC_CHUNK;
	struct chunk *c;
	struct hood h;
	struct op op;
	int err = op_enter_world(a, &op);

	if (err) {
		pool_put(&a->chunks.maps, bits);
		return err;
	}
	c = chunks_get(&a->chunks, chunk);
	err = c ? hood_lock(&op, s, s + c->units, &h) : -ENOMEM;
	if (err) {
		pool_put(&a->chunks.maps, bits);
		goto out;
	}
	chunk_adopt(&a->chunks, c, bits);
	err = expect == UINT32_MAX || c->free == expect ? prepare_nodes(a, c)
							: -EUCLEAN;
	if (err) {
		chunk_become(&a->chunks, c, false);
		c->state = CHUNK_LOADING;
	} else {
		op.sh->n.chunk_loads++;
		err = space_index_chunk(&op, chunk, true);
	}
	hood_unlock(&op, &h);
out:
	op_leave(&op);
	return err;
}

static int load_and_adopt(struct alloc *a, uint64_t chunk, uint32_t expect)
{
	uint64_t *bits = pool_get(&a->chunks.maps);
	int err;

	if (!bits)
		return -ENOMEM;
	err = a->source.load(a->source.ctx, chunk, bits);
	if (err) {
		pool_put(&a->chunks.maps, bits);
		return err;
	}
	return load_adopt(a, chunk, bits, expect);
}

int load_chunk(struct alloc *a, uint64_t chunk, uint32_t expect)
{
	int state, err;

	if (!chunks_get(&a->chunks, chunk))
		return -ENOMEM;
	lock_lock(&a->load_lock);
	while ((state = chunk_change(a, chunk, CHUNK_UNKNOWN, CHUNK_LOADING)) ==
	       CHUNK_LOADING)
		lock_wait(&a->load_lock, &a->load_done);
	lock_unlock(&a->load_lock);
	if (state == CHUNK_READY)
		return 0;

	err = load_and_adopt(a, chunk, expect);

	lock_lock(&a->load_lock);
	if (err)
		chunk_change(a, chunk, CHUNK_LOADING, CHUNK_UNKNOWN);
	pthread_cond_broadcast(&a->load_done);
	lock_unlock(&a->load_lock);
	return err;
}

/* Give the parts of [first, end) that nobody loaded before to the index. */
static int enter_free(struct op *op, uint64_t first, uint64_t end)
{
	struct alloc *a = op->a;
	uint64_t stop;

	for (uint64_t i = first; i < end; i = stop + 1) {
		struct chunk *c;
		struct hood h;
		uint64_t s = i * ALLOC_CHUNK, e;
		int err;

		for (stop = i; stop < end; stop++) {
			stop = chunks_next(&a->chunks, stop, end);
			if (stop == end)
				break;
			c = chunks_peek(&a->chunks, stop);
			if (c->state != CHUNK_UNKNOWN)
				break;
		}
		if (stop == i)
			continue;
		e = min_u64(stop * ALLOC_CHUNK, a->units);
		/* The neighbours at both ends must have a struct. */
		err = hood_lock(op, s, s + 1, &h);
		if (!err)
			err = hood_lock(op, e - 1, e, &h);
		if (!err)
			err = chunks_describe(&a->chunks, i, stop - i, true);
		if (!err)
			err = space_publish(op, s, e);
		if (err)
			return err;
	}
	return 0;
}

/* The first chunk of [first, end) that is being loaded, or `end`. */
static uint64_t next_loading(const struct chunks *t, uint64_t first, uint64_t end)
{
	uint64_t i = first;

	while ((i = chunks_next(t, i, end)) < end &&
	       chunks_peek(t, i)->state != CHUNK_LOADING)
		i++;
	return i;
}

/*
 * Chunks [first, first + *count) are wholly free, or full. Ends where one is
 * being loaded: should that fail, it is to be described again. *count: how far
 * it came.
 */
static int enter_alike(struct alloc *a, uint64_t first, uint64_t *count, bool free)
{
	struct op op;
	uint64_t end;
	int err = op_enter_world(a, &op);

	if (err)
		return err;
	end = next_loading(&a->chunks, first, first + *count);
	*count = end - first;
	if (*count && free)
		err = enter_free(&op, first, end);
	else if (*count)
		err = chunks_describe(&a->chunks, first, *count, false);
	op_leave(&op);
	return err;
}

int load_alike(struct alloc *a, uint64_t first, uint64_t count, bool free)
{
	return enter_alike(a, first, &count, free);
}

/* Learn of chunks from `at` on; *count of them are then known. */
static int describe(struct alloc *a, uint64_t at, uint64_t *count)
{
	uint64_t left = a->source_chunks - at;
	uint32_t units, free = 0;
	int err;

	*count = 1;
	if (chunk_state(a, at) != CHUNK_UNKNOWN)
		return load_chunk(a, at, UINT32_MAX);
	err = a->source.describe(a->source.ctx, at, count, &free);
	if (err)
		return err;
	if (!*count || free > ALLOC_CHUNK)
		return -EUCLEAN;
	*count = min_u64(*count, left);
	units = (uint32_t)min_u64(ALLOC_CHUNK, a->units - at * ALLOC_CHUNK);
	if (!free || free >= units)
		return enter_alike(a, at, count, free);
	if (*count != 1)
		return -EUCLEAN;
	return load_chunk(a, at, free);
}

bool load_complete(struct alloc *a)
{
	return __atomic_load_n(&a->cursor, __ATOMIC_ACQUIRE) >= a->source_chunks;
}

int load_more(struct alloc *a)
{
	uint64_t at, count = 0;
	int err;

	lock_lock(&a->load_lock);
	if (a->describing) {
		/* Somebody else is at it: see first what that brought. */
		while (a->describing)
			lock_wait(&a->load_lock, &a->load_done);
		lock_unlock(&a->load_lock);
		return 0;
	}
	at = a->cursor;
	if (at >= a->source_chunks) {
		lock_unlock(&a->load_lock);
		return -ENOENT;
	}
	a->describing = true;
	lock_unlock(&a->load_lock);

	err = describe(a, at, &count);

	lock_lock(&a->load_lock);
	if (!err)
		__atomic_store_n(&a->cursor, at + count, __ATOMIC_RELEASE);
	a->describing = false;
	pthread_cond_broadcast(&a->load_done);
	lock_unlock(&a->load_lock);
	return err;
}
