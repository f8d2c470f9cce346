/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_POOL_H
#define SPACEWEAVE_POOL_H

/*
 * Memory in pieces of one size, taken from the system in ever larger slabs
 * (huge pages, where there are any) and given back to it by pool_fini() alone.
 * A piece that was put back stays readable, and its bytes as they were but for
 * the eight at `link`. Any thread may call; takes a latch of RANK_LEAF.
 */

#include <stddef.h>
#include <stdint.h>

#include "alloc/lock.h"

#pragma GCC visibility push(hidden)

struct pool {
	struct latch latch;		/* RANK_LEAF */
	size_t piece, link;		/* bytes */
	/* Under latch: */
	char *spare;			/* chained at `link` */
	size_t spares;			/* others read it */
	char *fresh;			/* never used yet: fresh .. fresh_end */
	char *fresh_end;
	void *slabs;
	size_t bytes;			/* used of all slabs; others read it */
	size_t next_slab;
};

/* `piece` is a multiple of 8, at most 32 KiB. A slab begins with one of them. */
void pool_init(struct pool *p, size_t piece, size_t link, const char *name);
void pool_fini(struct pool *p);

int pool_stock(struct pool *p, size_t count);

/* See to it that `count` pieces are at hand. -ENOMEM. */
static inline int pool_prepare(struct pool *p, size_t count)
{
	size_t have = __atomic_load_n(&p->spares, __ATOMIC_RELAXED);

	return __builtin_expect(have >= count, 1) ? 0 : pool_stock(p, count);
}

/* A piece, as it was put back or all zeroes; NULL: no memory. */
void *pool_get(struct pool *p);
void pool_put(struct pool *p, void *piece);

/* Bytes of memory in use, those of pieces put back too. */
size_t pool_bytes(const struct pool *p);

#pragma GCC visibility pop

#endif
