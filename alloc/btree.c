/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A concurrent B-tree of pairs.
 *
 * Each node has a version word, which is its latch: odd while a thread
 * changes the node, and two higher afterwards. Whoever reads a node remembers
 * the version before and compares it after; if it moved, the descent starts
 * again from the root. So reading writes nothing, and threads that change
 * different nodes do not meet, whatever their paths share. (Leis et al.,
 * "The ART of practical synchronization", 2016.)
 *
 * Invariants:
 * 1. keys[0 .. count) of a node ascend. Below child[i] of an inner node all
 *    pairs are less than keys[i], below child[i + 1] none is.
 * 2. A version is odd only while a thread is inside one of the functions that
 *    change nodes; no thread waits for a latch while it holds one (a second
 *    latch is tried, and when that fails everything is let go), so there is
 *    no order to keep and no deadlock.
 * 3. Memory of a node is only ever a node's, until btree_fini(). A descent
 *    that still holds a node which has left the tree sees its version moved.
 *
 * A node that is full is split on the way down, so a split never climbs. A
 * leaf that becomes empty leaves the tree; an inner node left with one child
 * is replaced by it, so leaves may be at different depths. Half-empty nodes
 * are not merged: under a mix of inserts and removes that costs more than it
 * saves (Johnson and Shasha, "B-trees with inserts and deletes: why
 * free-at-empty is better than merge-at-half", 1993).
 *
 * Fields are read with acquire and written with release: a reader that saw any
 * part of a change also sees that the version moved.
 */
#include "alloc/btree.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>

#define LEAF_MAX 31
#define INNER_MAX 20

struct btree_node {
	uint64_t version;
	uint32_t count;			/* pairs, or keys of an inner node */
	uint32_t inner;
	union {
		struct pair pairs[LEAF_MAX];
		struct {
			struct pair keys[INNER_MAX];
			struct btree_node *child[INNER_MAX + 1];
		};
	};
};

_Static_assert(sizeof(struct btree_node) == 512, "a piece of the pool");

#define GET(field) __atomic_load_n(&(field), __ATOMIC_ACQUIRE)
#define SET(field, value) __atomic_store_n(&(field), (value), __ATOMIC_RELEASE)

static inline bool pair_less(struct pair a, struct pair b)
{
	/* As one number of 128 bits: two instructions and no branch. */
	return ((unsigned __int128)a.k << 64 | a.v) <
	       ((unsigned __int128)b.k << 64 | b.v);
}

static inline struct pair pair_get(const struct pair *p)
{
	return (struct pair){ GET(p->k), GET(p->v) };
}

static inline void pair_set(struct pair *p, struct pair q)
{
	SET(p->k, q.k);
	SET(p->v, q.v);
}

/* -- Latches -- */

static uint64_t version_read(const uint64_t *version)
{
	for (unsigned spin = 0;; spin++) {
		uint64_t v = GET(*version);

		if (!(v & 1))
			return v;
		if (spin > 100)
			sched_yield();
	}
}

static inline bool version_moved(const uint64_t *version, uint64_t seen)
{
	return GET(*version) != seen;
}

static inline bool version_try(uint64_t *version, uint64_t seen)
{
	return __atomic_compare_exchange_n(version, &seen, seen + 1, false,
					   __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

static inline void version_drop(uint64_t *version)
{
	SET(*version, GET(*version) + 1);
}

/* -- Nodes -- */

/* A node that nobody else reaches yet. btree_prepare() made sure of it. */
static struct btree_node *node_get(struct btree *t, bool inner)
{
	struct btree_node *n = pool_get(&t->pool);

	if (!n)
		abort();
	SET(n->count, 0);
	SET(n->inner, inner);
	return n;
}

/* A latched node that has left the tree. Its version ends up moved. */
static void node_put(struct btree *t, struct btree_node *n)
{
	version_drop(&n->version);
	pool_put(&t->pool, n);
}

static unsigned node_count(const struct btree_node *n)
{
	unsigned count = GET(n->count);
	unsigned max = GET(n->inner) ? INNER_MAX : LEAF_MAX;

	return count < max ? count : max;
}

/* How many of the first `count` keys are less than `p` (or equal to it). */
static inline unsigned rank_of(const struct pair *keys, unsigned count,
			       struct pair p, bool or_equal)
{
	const struct pair *base = keys;

	while (count > 1) {
		unsigned half = count / 2;
		struct pair q = pair_get(&base[half - 1]);
		bool right = or_equal ? !pair_less(p, q) : pair_less(q, p);

		base += right ? half : 0;
		count -= half;
	}
	if (count) {
		struct pair q = pair_get(base);

		base += or_equal ? !pair_less(p, q) : pair_less(q, p);
	}
	return (unsigned)(base - keys);
}

static void pairs_open(struct pair *p, unsigned at, unsigned count)
{
	for (unsigned i = count; i > at; i--)
		pair_set(&p[i], p[i - 1]);
}

static void pairs_close(struct pair *p, unsigned at, unsigned count)
{
	for (unsigned i = at; i + 1 < count; i++)
		pair_set(&p[i], p[i + 1]);
}

/* -- Descent -- */

/*
 * Where a descent stands: a node, its parent's link to it, and the versions
 * of both. The parent of the root is the tree itself.
 */
struct place {
	struct btree_node *node, *parent;
	uint64_t node_seen, parent_seen;
	unsigned at;			/* parent->child[at] is node */
};

static inline uint64_t *parent_latch(struct btree *t, struct place *w)
{
	return w->parent ? &w->parent->version : &t->version;
}

static bool place_top(struct btree *t, struct place *w)
{
	w->parent = NULL;
	w->at = 0;
	w->parent_seen = version_read(&t->version);
	w->node = GET(t->root);
	w->node_seen = version_read(&w->node->version);
	return !version_moved(&t->version, w->parent_seen);
}

/* Step to the child for `p`; `at` is its index. False: start again. */
static bool place_down(struct place *w, unsigned at)
{
	struct btree_node *child = GET(w->node->child[at]);

	/* A search would miss its lines one after the other. */
	for (unsigned i = 0; i < sizeof(*child); i += 64)
		__builtin_prefetch((const char *)child + i);
	if (version_moved(&w->node->version, w->node_seen))
		return false;
	w->parent = w->node;
	w->parent_seen = w->node_seen;
	w->at = at;
	w->node = child;
	w->node_seen = version_read(&child->version);
	return !version_moved(&w->parent->version, w->parent_seen);
}

static bool place_latch_both(struct btree *t, struct place *w)
{
	if (!version_try(parent_latch(t, w), w->parent_seen))
		return false;
	if (version_try(&w->node->version, w->node_seen))
		return true;
	/* Nothing changed, but the version may as well say so. */
	version_drop(parent_latch(t, w));
	return false;
}

/* Split the full node at `w`; its parent is not full. */
static void split(struct btree *t, struct place *w)
{
	struct btree_node *left = w->node, *right, *parent = w->parent;
	struct pair middle;
	unsigned half;

	if (!place_latch_both(t, w))
		return;
	half = left->count / 2;
	right = node_get(t, left->inner);
	if (left->inner) {
		middle = left->keys[half];
		for (unsigned i = half + 1; i < left->count; i++)
			pair_set(&right->keys[i - half - 1], left->keys[i]);
		for (unsigned i = half + 1; i <= left->count; i++)
			SET(right->child[i - half - 1], left->child[i]);
		SET(right->count, left->count - half - 1);
	} else {
		middle = left->pairs[half];
		if (t->unique)
			middle.v = 0;
		for (unsigned i = half; i < left->count; i++)
			pair_set(&right->pairs[i - half], left->pairs[i]);
		SET(right->count, left->count - half);
	}
	SET(left->count, half);
	if (!parent) {
		parent = node_get(t, true);
		pair_set(&parent->keys[0], middle);
		SET(parent->child[0], left);
		SET(parent->child[1], right);
		SET(parent->count, 1);
		SET(t->root, parent);
	} else {
		pairs_open(parent->keys, w->at, parent->count);
		for (unsigned i = parent->count + 1; i > w->at + 1; i--)
			SET(parent->child[i], parent->child[i - 1]);
		pair_set(&parent->keys[w->at], middle);
		SET(parent->child[w->at + 1], right);
		SET(parent->count, parent->count + 1);
	}
	version_drop(&left->version);
	version_drop(parent_latch(t, w));
}

/* Replace the inner node at `w`, which has a single child, by that child. */
static void collapse(struct btree *t, struct place *w)
{
	if (!place_latch_both(t, w))
		return;
	if (w->parent)
		SET(w->parent->child[w->at], w->node->child[0]);
	else
		SET(t->root, w->node->child[0]);
	version_drop(parent_latch(t, w));
	node_put(t, w->node);
}

void btree_insert(struct btree *t, struct pair p)
{
	struct place w;
	struct btree_node *n;
	unsigned at;

again:
	if (!place_top(t, &w))
		goto again;
	for (;;) {
		unsigned count = node_count(w.node);
		bool inner = GET(w.node->inner);

		if (version_moved(&w.node->version, w.node_seen))
			goto again;
		if (count == (inner ? INNER_MAX : LEAF_MAX)) {
			split(t, &w);
			goto again;
		}
		if (!inner)
			break;
		at = rank_of(w.node->keys, count, p, true);
		if (!place_down(&w, at))
			goto again;
	}
	n = w.node;
	if (!version_try(&n->version, w.node_seen))
		goto again;
	at = rank_of(n->pairs, n->count, p, false);
	pairs_open(n->pairs, at, n->count);
	pair_set(&n->pairs[at], p);
	SET(n->count, n->count + 1);
	version_drop(&n->version);
}

/* To the leaf where `p` belongs, tidying up on the way. */
static void descend(struct btree *t, struct pair p, bool tidy, struct place *w)
{
again:
	if (!place_top(t, w))
		goto again;
	for (;;) {
		unsigned count = node_count(w->node);
		bool inner = GET(w->node->inner);

		if (version_moved(&w->node->version, w->node_seen))
			goto again;
		if (!inner)
			return;
		if (tidy && !count) {
			collapse(t, w);
			goto again;
		}
		if (!place_down(w, rank_of(w->node->keys, count, p, true)))
			goto again;
	}
}

/* Take the empty leaf at `w` out of its parent. Both are latched. */
static void unlink_leaf(struct btree *t, struct place *w)
{
	struct btree_node *parent = w->parent;

	pairs_close(parent->keys, w->at ? w->at - 1 : 0, parent->count);
	for (unsigned i = w->at; i < parent->count; i++)
		SET(parent->child[i], parent->child[i + 1]);
	SET(parent->count, parent->count - 1);
	version_drop(&parent->version);
	node_put(t, w->node);
}

/* Where `p` is in a latched leaf, or -1. */
static int find_in(const struct btree_node *n, struct pair p)
{
	unsigned at = rank_of(n->pairs, n->count, p, false);

	return at < n->count && n->pairs[at].k == p.k && n->pairs[at].v == p.v
		       ? (int)at
		       : -1;
}

/*
 * The leaf where `p` belongs, latched, and p's index there or -1. By `spot` if
 * that is still right, else from the root.
 */
static struct btree_node *latch_leaf(struct btree *t, struct pair p,
				     const struct btree_spot *spot, int *at)
{
	struct place w;

	if (spot && spot->leaf && version_try(&spot->leaf->version, spot->seen)) {
		*at = find_in(spot->leaf, p);
		if (*at >= 0)
			return spot->leaf;
		version_drop(&spot->leaf->version);
	}
	do
		descend(t, p, false, &w);
	while (!version_try(&w.node->version, w.node_seen));
	*at = find_in(w.node, p);
	return w.node;
}

/* Take out the only pair of a leaf, and the leaf, if the parent has another. */
static bool remove_last(struct btree *t, struct pair p)
{
	struct place w;
	struct btree_node *n;
	int at;

	for (;;) {
		descend(t, p, true, &w);
		n = w.node;
		if (GET(n->count) == 1 && w.parent && GET(w.parent->count)) {
			if (!place_latch_both(t, &w))
				continue;
			at = find_in(n, p);
			if (at >= 0) {
				unlink_leaf(t, &w);
				return true;
			}
			version_drop(&w.parent->version);
		} else if (!version_try(&n->version, w.node_seen)) {
			continue;
		} else {
			at = find_in(n, p);
			if (at >= 0) {
				pairs_close(n->pairs, (unsigned)at, n->count);
				SET(n->count, n->count - 1);
			}
		}
		version_drop(&n->version);
		return at >= 0;
	}
}

bool btree_remove(struct btree *t, struct pair p, const struct btree_spot *spot)
{
	int at;
	struct btree_node *n = latch_leaf(t, p, spot, &at);

	if (at >= 0 && n->count == 1) {
		version_drop(&n->version);
		return remove_last(t, p);
	}
	if (at >= 0) {
		pairs_close(n->pairs, (unsigned)at, n->count);
		SET(n->count, n->count - 1);
	}
	version_drop(&n->version);
	return at >= 0;
}

bool btree_update(struct btree *t, struct pair p, uint64_t v,
		  const struct btree_spot *spot)
{
	int at;
	struct btree_node *n = latch_leaf(t, p, spot, &at);

	/* The first number is unique, and a border between nodes has nothing
	   but it: so the pair stays where it belongs. */
	if (at >= 0)
		SET(n->pairs[at].v, v);
	version_drop(&n->version);
	return at >= 0;
}

bool btree_replace(struct btree *t, struct pair p, struct pair q,
		   const struct btree_spot *spot)
{
	int at;
	struct btree_node *n = latch_leaf(t, p, spot, &at);
	bool here;

	if (at < 0) {
		version_drop(&n->version);
		return false;
	}
	/* Between two pairs of a leaf there is no border of it. */
	here = pair_less(p, q) ? (unsigned)at + 1 < n->count : at > 0;
	if (here)
		pair_set(&n->pairs[at], q);
	version_drop(&n->version);
	if (here)
		return true;
	if (!btree_remove(t, p, NULL))
		return false;
	btree_insert(t, q);
	return true;
}

/*
 * A leaf may hold nothing on the wanted side of `from`. Then the search goes
 * on at the nearest key that the descent passed on that side.
 */
bool btree_ceil(struct btree *t, struct pair from, struct pair *out,
		struct btree_spot *spot)
{
	struct place w;
	struct pair fence = { 0, 0 }, q = { 0, 0 };
	bool fenced, found;

again:
	fenced = false;
	if (!place_top(t, &w))
		goto again;
	for (;;) {
		unsigned count = node_count(w.node), at;

		if (!GET(w.node->inner)) {
			at = rank_of(w.node->pairs, count, from, false);
			found = at < count;
			if (found)
				q = pair_get(&w.node->pairs[at]);
			break;
		}
		at = rank_of(w.node->keys, count, from, true);
		if (at < count) {
			fence = pair_get(&w.node->keys[at]);
			fenced = true;
		}
		if (!place_down(&w, at))
			goto again;
	}
	if (version_moved(&w.node->version, w.node_seen))
		goto again;
	if (found) {
		*out = q;
		if (spot)
			*spot = (struct btree_spot){ w.node, w.node_seen };
		return true;
	}
	if (!fenced)
		return false;
	from = fence;
	goto again;
}

bool btree_floor(struct btree *t, struct pair from, struct pair *out,
		 struct btree_spot *spot)
{
	struct place w;
	struct pair fence = { 0, 0 }, q = { 0, 0 };
	bool fenced, found;

again:
	fenced = false;
	if (!place_top(t, &w))
		goto again;
	for (;;) {
		unsigned count = node_count(w.node), at;

		if (!GET(w.node->inner)) {
			at = rank_of(w.node->pairs, count, from, true);
			found = at > 0;
			if (found)
				q = pair_get(&w.node->pairs[at - 1]);
			break;
		}
		at = rank_of(w.node->keys, count, from, true);
		if (at > 0) {
			fence = pair_get(&w.node->keys[at - 1]);
			fenced = true;
		}
		if (!place_down(&w, at))
			goto again;
	}
	if (version_moved(&w.node->version, w.node_seen))
		goto again;
	if (found) {
		*out = q;
		if (spot)
			*spot = (struct btree_spot){ w.node, w.node_seen };
		return true;
	}
	if (!fenced || (!fence.k && !fence.v))
		return false;
	from = fence.v ? (struct pair){ fence.k, fence.v - 1 }
		       : (struct pair){ fence.k - 1, UINT64_MAX };
	goto again;
}

/* -- The whole -- */

int btree_init(struct btree *t, bool unique, const char *name)
{
	*t = (struct btree){ .unique = unique };
	/* A version must outlive its node: the chain goes elsewhere. */
	pool_init(&t->pool, sizeof(struct btree_node),
		  offsetof(struct btree_node, pairs), name);
	if (btree_prepare(t, 1))
		return -ENOMEM;
	t->root = node_get(t, false);
	return 0;
}

void btree_fini(struct btree *t) { pool_fini(&t->pool); }

size_t btree_bytes(const struct btree *t) { return pool_bytes(&t->pool); }

/* Pairs below `n`, all in [lo, hi), where those are given. */
static int64_t check_node(const struct btree_node *n, const struct pair *lo,
			  const struct pair *hi)
{
	const struct pair *keys = n->inner ? n->keys : n->pairs;
	int64_t total = 0;

	if ((n->version & 1) || n->count > (n->inner ? INNER_MAX : LEAF_MAX))
		return -EUCLEAN;
	for (unsigned i = 0; i < n->count; i++)
		if ((lo && pair_less(keys[i], *lo)) ||
		    (hi && !pair_less(keys[i], *hi)) ||
		    (i && !pair_less(keys[i - 1], keys[i])))
			return -EUCLEAN;
	if (!n->inner)
		return n->count;
	for (unsigned i = 0; i <= n->count; i++) {
		int64_t below = check_node(n->child[i], i ? &keys[i - 1] : lo,
					   i < n->count ? &keys[i] : hi);

		if (below < 0)
			return below;
		total += below;
	}
	return total;
}

int64_t btree_check(struct btree *t)
{
	return check_node(t->root, NULL, NULL);
}
