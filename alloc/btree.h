/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_BTREE_H
#define SPACEWEAVE_BTREE_H

/*
 * An ordered set of pairs of 64-bit numbers that many threads read and change
 * at the same time. The allocator keeps each long run of free units in two of
 * them: as (length, start) and as (start, length).
 *
 * Every call is atomic with respect to every other; none blocks but for the
 * few instructions in which another thread changes the very node it needs.
 * Takes no lock but the latch of the node pool (RANK_LEAF).
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "alloc/pool.h"

#pragma GCC visibility push(hidden)

struct pair {
	uint64_t k, v;
};

struct btree_node;

struct btree {
	uint64_t version;		/* latch of `root` */
	struct btree_node *root;
	bool unique;			/* no two pairs have the same k */
	struct pool pool;		/* of nodes */
};

/* Returns 0 or -ENOMEM. */
int btree_init(struct btree *t, bool unique, const char *name);
void btree_fini(struct btree *t);

/*
 * See to it that `nodes` nodes are at hand, so that inserts cannot fail.
 * An insert needs at most two for every level that it splits. -ENOMEM.
 */
static inline int btree_prepare(struct btree *t, size_t nodes)
{
	return pool_prepare(&t->pool, nodes);
}

/* Put `p` into the set, where it is not yet. */
void btree_insert(struct btree *t, struct pair p);

/*
 * Where a pair was found. Handed to a change of that pair it saves the way
 * from the root, if nothing changed there meanwhile. May be NULL, or {NULL}.
 */
struct btree_spot {
	struct btree_node *leaf;
	uint64_t seen;
};

/* Take `p` out. False when it is not there (any more). */
bool btree_remove(struct btree *t, struct pair p, const struct btree_spot *spot);

/*
 * Change (p.k, p.v) to (p.k, v) in one step, in a tree that is `unique`.
 * False when `p` is not there.
 */
bool btree_update(struct btree *t, struct pair p, uint64_t v,
		  const struct btree_spot *spot);

/*
 * Change `p` to `q`, with no pair between them; in two steps if need be, with
 * neither there in between. False when `p` is not there; nothing is changed.
 */
bool btree_replace(struct btree *t, struct pair p, struct pair q,
		   const struct btree_spot *spot);

/* The first pair not less than `from`; the last not greater. */
bool btree_ceil(struct btree *t, struct pair from, struct pair *out,
		struct btree_spot *spot);
bool btree_floor(struct btree *t, struct pair from, struct pair *out,
		 struct btree_spot *spot);

/* Bytes held. */
size_t btree_bytes(const struct btree *t);

/*
 * Hold the nodes against each other, with nobody else at work. Returns the
 * number of pairs, or -EUCLEAN.
 */
int64_t btree_check(struct btree *t);

#pragma GCC visibility pop

#endif
