/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The copy-on-write B+tree that every table is.
 *
 * A node is one block, and is in memory what it is on disk. Its pointer, held
 * by the parent and at the top by the superblock, names its block and a stamp
 * drawn for this node alone; the node repeats both under a checksum of its
 * own. So a lost, stale or misdirected write is found as surely as by a
 * checksum in the parent, yet nodes need not be written bottom-up: a frozen
 * node never changes, and its copy in the next generation points to the same
 * children with the same stamps.
 *
 * Invariants
 *  1. A node on disk is never written again. A change makes a copy at a new
 *     block with a new stamp, once per generation; further changes of that
 *     generation happen in the copy.
 *  2. A dirty node of an older generation than its tree's is frozen: a
 *     checkpoint is writing it, and nobody changes it.
 *  3. The path from the root to a changed leaf is dirty in the tree's
 *     generation.
 *  4. All but the root have at least one item, but while a change of several
 *     items is in the midst: what is prepared for one of them are the leaves as
 *     they were, so none goes before all items are in. Leaves lose the rest of
 *     their balance when neighbours are not in memory; nothing depends on it.
 *  5. Under the commit lock nothing is read from the image. A call that lacks
 *     a node says which (-EAGAIN); the lock is dropped, the node loaded, the
 *     call made again.
 *
 * In a read-only volume, which only replay changes, nodes change in place and
 * new ones get addresses that are none: nothing will be written.
 *
 * Deliberately not: latches per node (a change costs about a microsecond, a
 * request through FUSE tens), prefix compression, nodes larger than a block
 * (they would need runs, and space must never fail for being in pieces).
 */
#include "meta/meta_priv.h"
#include "meta/repair.h"

#include <assert.h>
#include <stdlib.h>

#define SHORT_ITEM 64u

struct path {
	struct node *n[TREE_LEVELS];	/* by level, leaf 0 */
	int slot[TREE_LEVELS];
};

/* ---- inside one node ---------------------------------------------------------- */

static le16 *node_slots(struct disk_node *d) { return (le16 *)(d + 1); }

static unsigned node_count(const struct node *n) { return get16(n->d->count); }

static unsigned node_heap(const struct disk_node *d)
{
	unsigned heap = get16(d->heap);

	return heap ? heap : 65536;
}

struct item {
	const uint8_t *key, *val;
	unsigned klen, vlen;
};

static struct item node_item(const struct node *n, unsigned i)
{
	const uint8_t *at = (const uint8_t *)n->d +
			    get16(node_slots(n->d)[i]);
	struct disk_item h;

	memcpy(&h, at, sizeof(h));
	at += sizeof(h);
	return (struct item){at, at + get16(h.klen), get16(h.klen),
			     get16(h.vlen)};
}

/* The last item whose key is not above `key`, or -1. */
static int node_search(const struct node *n, const void *key, size_t klen,
		       bool *exact)
{
	int lo = -1, hi = (int)node_count(n);

	*exact = false;
	while (hi - lo > 1) {
		int mid = lo + (hi - lo) / 2, c;
		struct item it = node_item(n, (unsigned)mid);

		c = key_cmp(it.key, it.klen, key, klen);
		if (c <= 0) {
			lo = mid;
			if (c == 0) {
				*exact = true;
				break;
			}
		} else {
			hi = mid;
		}
	}
	return lo;
}

static size_t item_bytes(unsigned klen, unsigned vlen)
{
	return sizeof(struct disk_item) + klen + vlen;
}

/* Bytes between the array of slots and the heap. */
static size_t node_gap(const struct node *n)
{
	return node_heap(n->d) - sizeof(struct disk_node) -
	       node_count(n) * sizeof(le16);
}

/* Bytes that a node could still take, after compaction. */
static size_t node_room(const struct node *n)
{
	return node_gap(n) + get16(n->d->garbage);
}

static size_t node_used(const struct volume *v, const struct node *n)
{
	return v->block_bytes - sizeof(struct disk_node) - node_room(n);
}

static void node_compact(struct volume *v, struct node *n)
{
	uint8_t *copy = v->scratch;
	unsigned heap = v->block_bytes, count = node_count(n);
	le16 *slots = node_slots(n->d);

	memcpy(copy, n->d, v->block_bytes);
	for (unsigned i = 0; i < count; i++) {
		const uint8_t *at = copy + get16(slots[i]);
		struct disk_item h;
		unsigned len;

		memcpy(&h, at, sizeof(h));
		len = (unsigned)item_bytes(get16(h.klen), get16(h.vlen));
		heap -= len;
		memcpy((uint8_t *)n->d + heap, at, len);
		slots[i] = put16((uint16_t)heap);
	}
	n->d->heap = put16((uint16_t)heap);
	n->d->garbage = put16(0);
}

static void node_insert(struct volume *v, struct node *n, unsigned pos,
			const void *key, size_t klen, const void *val, size_t vlen)
{
	size_t len = item_bytes((unsigned)klen, (unsigned)vlen);
	unsigned count = node_count(n), heap;
	le16 *slots = node_slots(n->d);
	struct disk_item h = {put16((uint16_t)klen), put16((uint16_t)vlen)};
	uint8_t *at;

	assert(node_room(n) >= len + sizeof(le16));
	if (node_gap(n) < len + sizeof(le16))
		node_compact(v, n);
	heap = node_heap(n->d) - (unsigned)len;
	at = (uint8_t *)n->d + heap;
	memcpy(at, &h, sizeof(h));
	memcpy(at + sizeof(h), key, klen);
	memcpy(at + sizeof(h) + klen, val, vlen);
	memmove(slots + pos + 1, slots + pos, (count - pos) * sizeof(le16));
	slots[pos] = put16((uint16_t)heap);
	n->d->count = put16((uint16_t)(count + 1));
	n->d->heap = put16((uint16_t)heap);
}

static void node_remove(struct volume *v, struct node *n, unsigned pos)
{
	unsigned count = node_count(n);
	le16 *slots = node_slots(n->d);
	struct item it = node_item(n, pos);
	size_t len = item_bytes(it.klen, it.vlen);

	memmove(slots + pos, slots + pos + 1, (count - pos - 1) * sizeof(le16));
	n->d->count = put16((uint16_t)(count - 1));
	if (count == 1) {
		n->d->heap = put16((uint16_t)v->block_bytes);
		n->d->garbage = put16(0);
		return;
	}
	n->d->garbage = put16((uint16_t)(get16(n->d->garbage) + len));
}

static struct ptr node_child(const struct node *n, unsigned i)
{
	struct disk_ptr p;

	memcpy(&p, node_item(n, i).val, sizeof(p));
	return ptr_get(&p);
}

static void node_set_child(struct node *n, unsigned i, const struct ptr *p)
{
	struct disk_ptr d = ptr_put(p);

	memcpy((uint8_t *)node_item(n, i).val, &d, sizeof(d));
}

/* ---- nodes in memory --------------------------------------------------------------- */

static struct node **hash_slot(struct volume *v, uint64_t block)
{
	struct node **p = &v->hash[(block * 0x9e3779b97f4a7c15ull >> 20) &
				   v->hash_mask];

	while (*p && (*p)->self.block != block)
		p = &(*p)->hash_next;
	return p;
}

/* A damaged pointer may lead to a node that is there for another: level and table. */
static struct node *cache_find(struct volume *v, enum table t, unsigned level,
			       const struct ptr *p)
{
	struct node *n = *hash_slot(v, p->block);

	if (!n || n->self.stamp != p->stamp || n->level != level || n->table != t)
		return NULL;
	if (!atomic_load_explicit(&n->used, memory_order_relaxed))
		atomic_store_explicit(&n->used, true, memory_order_relaxed);
	return n;
}

static void list_add(struct node_list *l, struct node *n)
{
	if (!l->head) {
		n->prev = n->next = n;
		l->head = n;
	} else {
		n->next = l->head;
		n->prev = l->head->prev;
		n->prev->next = n->next->prev = n;
	}
	l->count++;
}

static void list_del(struct node_list *l, struct node *n)
{
	if (n->next == n) {
		l->head = NULL;
	} else {
		n->prev->next = n->next;
		n->next->prev = n->prev;
		if (l->head == n)
			l->head = n->next;
	}
	l->count--;
}

/*
 * Memory for nodes comes in slabs, blocks first, and goes back when the volume
 * is closed: a cache of a constant size whose pieces lay between those of
 * malloc's other users would keep twice its size.
 */
#define SLAB_BYTES (256u << 10)
#define AHEAD_BLKS 64u		/* read ahead so far */

struct slab {
	struct slab *next;
	void *blocks;
	struct node node[];
};

/* Memory that is not needed becomes the next node's. */
static void node_spare(struct volume *v, struct node *n)
{
	n->hash_next = v->spare;
	v->spare = n;
	v->spares++;
}

static int slab_add_locked(struct volume *v)
{
	size_t count = SLAB_BYTES / v->block_bytes;
	struct slab *s;
	void *blocks;

	if (posix_memalign(&blocks, 4096, SLAB_BYTES))
		return -ENOMEM;
	s = calloc(1, sizeof(*s) + count * sizeof(s->node[0]));
	if (!s) {
		free(blocks);
		return -ENOMEM;
	}
	s->blocks = blocks;
	s->next = v->slabs;
	v->slabs = s;
	for (size_t i = 0; i < count; i++) {
		s->node[i].d = (void *)((char *)blocks + i * v->block_bytes);
		node_spare(v, &s->node[i]);
	}
	return 0;
}

/* Have memory for `want` new nodes, so that none can be lacking later. */
int tree_spares_locked(struct volume *v, size_t want)
{
	int r = 0;

	while (v->spares < want && r == 0)
		r = slab_add_locked(v);
	return r;
}

static struct node *node_take_locked(struct volume *v)
{
	struct node *n = v->spare;

	assert(n);
	v->spare = n->hash_next;
	v->spares--;
	*n = (struct node){.d = n->d};
	return n;
}

static void hash_insert(struct volume *v, struct node *n)
{
	struct node **p = hash_slot(v, n->self.block), *stale = *p;

	if (stale) {
		/* A clean node whose block has been used again. */
		assert(!stale->dirty);
		*p = stale->hash_next;
		list_del(&v->clock, stale);
		node_spare(v, stale);
		v->cached--;
		p = hash_slot(v, n->self.block);
	}
	n->hash_next = NULL;
	*p = n;
	v->cached++;
}

static void hash_remove(struct volume *v, struct node *n)
{
	struct node **p = hash_slot(v, n->self.block);

	assert(*p == n);
	*p = n->hash_next;
	v->cached--;
}

void tree_shrink_locked(struct volume *v)
{
	size_t limit = v->cache_nodes, tries = 2 * v->clock.count;

	while (v->cached >= limit && v->clock.count && tries--) {
		struct node *n = v->clock.head;

		v->clock.head = n->next;
		if (atomic_exchange_explicit(&n->used, false,
					     memory_order_relaxed))
			continue;
		list_del(&v->clock, n);
		hash_remove(v, n);
		node_spare(v, n);
	}
}

void tree_forget_locked(struct volume *v, uint64_t start, uint64_t len)
{
	for (uint64_t b = start; b < start + len; b++) {
		struct node *n = *hash_slot(v, b);

		if (!n || n->dirty)
			continue;
		list_del(&v->clock, n);
		hash_remove(v, n);
		node_spare(v, n);
	}
}

/* A block for a new node: from the pool, which was filled beforehand. */
uint64_t block_pop_locked(struct volume *v)
{
	struct extent *e;

	if (v->readonly)
		return FAKE_BLOCK + v->fake_next++;
	assert(v->pool_count);
	e = &v->pool[v->pool_count - 1];
	v->pool_blks--;
	atomic_fetch_sub_explicit(&v->free_blks, 1, memory_order_relaxed);
	if (--e->len == 0) {
		v->pool_count--;
		return e->start;
	}
	return e->start++;
}

void block_push_locked(struct volume *v, uint64_t block)
{
	struct extent *e = v->pool_count ? &v->pool[v->pool_count - 1] : NULL;

	v->pool_blks++;
	if (e && block + 1 == e->start) {
		e->start--;
		e->len++;
		return;
	}
	if (e && e->start + e->len == block) {
		e->len++;
		return;
	}
	assert(v->pool_count < v->pool_cap);
	v->pool[v->pool_count++] = (struct extent){block, 1};
}

static struct node *node_make(struct volume *v, struct tree *tr, unsigned level)
{
	struct node *n = node_take_locked(v);

	n->self = (struct ptr){block_pop_locked(v), v->next_stamp++, tr->gen};
	pool_changed_locked(v, n->self.block, 1, false);
	n->table = (uint8_t)tr->table;
	n->level = (uint8_t)level;
	n->dirty = true;
	atomic_store_explicit(&n->used, true, memory_order_relaxed);
	hash_insert(v, n);
	list_add(&tr->dirty, n);
	atomic_fetch_add_explicit(&v->dirty_nodes, 1, memory_order_relaxed);
	return n;
}

static void node_label(struct node *n)
{
	n->d->self = ptr_put(&n->self);
}

static struct node *node_new(struct volume *v, struct tree *tr, unsigned level)
{
	struct node *n = node_make(v, tr, level);

	memset(n->d, 0, v->block_bytes);
	n->d->magic = put32(NODE_MAGIC);
	n->d->level = (uint8_t)level;
	n->d->table = (uint8_t)tr->table;
	n->d->heap = put16((uint16_t)v->block_bytes);
	node_label(n);
	tr->nodes++;
	return n;
}

static bool node_is_open(const struct volume *v, const struct tree *tr,
			 const struct node *n)
{
	return n->dirty && (n->self.birth == tr->gen || v->readonly);
}

/* The tree has no use for this node any more. */
static void node_drop(struct volume *v, struct tree *tr, struct node *n)
{
	hash_remove(v, n);
	if (v->readonly) {
		if (n->self.block < FAKE_BLOCK)
			delta_add(&v->dropped, n->self.block, 1, true);
		list_del(n->dirty ? &tr->dirty : &v->clock, n);
		node_spare(v, n);
	} else if (node_is_open(v, tr, n)) {
		atomic_fetch_add_explicit(&v->free_blks, 1, memory_order_relaxed);
		block_push_locked(v, n->self.block);
		list_del(&tr->dirty, n);
		atomic_fetch_sub_explicit(&v->dirty_nodes, 1,
					  memory_order_relaxed);
		node_spare(v, n);
	} else {
		delta_add(tr->frees, n->self.block, 1, true);
		pool_changed_locked(v, n->self.block, 1, true);
		blocks_pend(v, 1);
		if (n->dirty) {
			n->superseded = true;
		} else {
			list_del(&v->clock, n);
			node_spare(v, n);
		}
	}
}

/* Make the node at `level` of the path one that may be changed. */
static struct node *path_open(struct volume *v, struct tree *tr, struct path *p,
			      unsigned level)
{
	struct node *old = p->n[level], *n;

	if (node_is_open(v, tr, old))
		return old;
	if (v->readonly) {
		list_del(&v->clock, old);
		old->dirty = true;
		list_add(&tr->dirty, old);
		return old;
	}
	n = node_make(v, tr, level);
	memcpy(n->d, old->d, v->block_bytes);
	node_label(n);
	if (level == tr->level)
		tr->root = n->self;
	else
		node_set_child(p->n[level + 1], (unsigned)p->slot[level + 1],
			       &n->self);
	node_drop(v, tr, old);
	p->n[level] = n;
	return n;
}

void tree_written_locked(struct volume *v, struct node **nodes, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		struct node *n = nodes[i];

		n->dirty = false;
		if (n->superseded)
			node_spare(v, n);
		else
			list_add(&v->clock, n);
	}
	atomic_fetch_sub_explicit(&v->dirty_nodes, count, memory_order_relaxed);
	tree_shrink_locked(v);
}

void tree_unwritten_locked(struct volume *v, enum table t, struct node_list *l)
{
	while (l->head) {
		struct node *n = l->head;

		list_del(l, n);
		list_add(&v->trees[t].dirty, n);
	}
}

/* ---- finding one's way ---------------------------------------------------------------- */

static struct node *fetch(struct volume *v, const struct tree *tr, unsigned level,
			  const struct ptr *ptr, struct tree_miss *miss)
{
	struct node *n = cache_find(v, tr->table, level, ptr);

	if (n)
		return n;
	*miss = (struct tree_miss){
		.table = tr->table, .level = level, .ptr = *ptr};
	return NULL;
}

/*
 * The leaf before this one is in memory: somebody goes through them in order.
 * Leaves that follow on the volume as well shall come along.
 */
static void look_ahead(struct volume *v, const struct tree *tr,
		       const struct node *parent, unsigned slot,
		       struct tree_miss *miss)
{
	unsigned count = node_count(parent);
	struct ptr ptr = slot ? node_child(parent, slot - 1) : (struct ptr){0};
	uint64_t at = miss->ptr.block, last = at;

	if (!slot || !cache_find(v, tr->table, 0, &ptr) ||
	    at - atomic_load_explicit(&v->ahead_from, memory_order_relaxed) <
		    AHEAD_BLKS)
		return;
	for (unsigned i = slot + 1; i < count && i <= slot + AHEAD_BLKS; i++) {
		ptr = node_child(parent, i);
		if (ptr.block - at < AHEAD_BLKS && ptr.block > last)
			last = ptr.block;
	}
	if (last == at)
		return;
	miss->ahead = last + 1 - at;
	atomic_store_explicit(&v->ahead_from, at, memory_order_relaxed);
}

/* -ENOENT: the tree is empty. -EAGAIN: a node is not in memory. */
static int descend(struct volume *v, const struct tree *tr, const void *key,
		   size_t klen, struct path *p, bool *exact,
		   struct tree_miss *miss)
{
	struct ptr ptr = tr->root;

	if (!ptr.block)
		return -ENOENT;
	for (unsigned level = tr->level;; level--) {
		struct node *n = fetch(v, tr, level, &ptr, miss);
		int slot;

		if (!n && level == 0 && tr->level)
			look_ahead(v, tr, p->n[1], (unsigned)p->slot[1], miss);
		if (!n)
			return -EAGAIN;
		slot = node_search(n, key, klen, exact);
		p->n[level] = n;
		if (level == 0) {
			p->slot[0] = slot;
			return 0;
		}
		p->slot[level] = slot < 0 ? 0 : slot;
		ptr = node_child(n, (unsigned)p->slot[level]);
	}
}

/* To the next leaf (dir 1) or the one before (-1). -ENOENT at the end. */
static int path_step(struct volume *v, const struct tree *tr, struct path *p,
		     int dir, struct tree_miss *miss)
{
	unsigned level = 1;
	struct ptr ptr;

	while (level <= tr->level && (p->slot[level] + dir < 0 ||
	       p->slot[level] + dir >= (int)node_count(p->n[level])))
		level++;
	if (level > tr->level)
		return -ENOENT;
	p->slot[level] += dir;
	for (;;) {
		ptr = node_child(p->n[level], (unsigned)p->slot[level]);
		level--;
		p->n[level] = fetch(v, tr, level, &ptr, miss);
		if (!p->n[level] && level == 0)
			look_ahead(v, tr, p->n[1], (unsigned)p->slot[1], miss);
		if (!p->n[level])
			return -EAGAIN;
		p->slot[level] = dir > 0 ? 0 : (int)node_count(p->n[level]) - 1;
		if (level == 0)
			return 0;
	}
}

int tree_load(struct volume *v, const struct tree_miss *miss, struct tree_miss *bad,
	      int *bad_err)
{
	struct node *n, *other, *found;
	const char *why = NODE_UNREAD;
	int r;

	if (bad->why && bad->ptr.block == miss->ptr.block &&
	    bad->ptr.stamp == miss->ptr.stamp) {
		/* It failed, and the tree still wants it: damage. */
		volume_message(v, "table %u: node at block %llu: %s", miss->table,
			       (unsigned long long)miss->ptr.block, bad->why);
		return *bad_err;
	}
	rwlock_write(&v->commit);
	n = tree_spares_locked(v, 1) ? NULL : node_take_locked(v);
	rwlock_unlock(&v->commit);
	if (!n)
		return -ENOMEM;
	if (miss->ptr.block >= v->blocks) {
		r = -EFSCORRUPTED;
		why = "lies outside the volume";
	} else {
		r = image_fetch(v->im, n->d, v->block_bytes,
				blk_off(v, miss->ptr.block),
				blk_off(v, miss->ahead));
		if (!r)
			r = node_verify(n->d, v->block_bytes, miss->table,
					miss->level, &miss->ptr, &why);
	}
	if (r) {
		rwlock_write(&v->commit);
		node_spare(v, n);
		rwlock_unlock(&v->commit);
		*bad = *miss;
		bad->why = why;
		*bad_err = r;
		return 0;
	}
	n->self = miss->ptr;
	n->table = (uint8_t)miss->table;
	n->level = (uint8_t)miss->level;
	atomic_store(&n->used, true);
	rwlock_write(&v->commit);
	other = *hash_slot(v, n->self.block);
	found = cache_find(v, miss->table, miss->level, &n->self);
	if (found || (other && other->dirty) || pool_has_locked(v, n->self.block)) {
		/* Somebody was faster, or the block has another use by now: who
		 * comes back for it then has no other way. */
		if (!found) {
			*bad = *miss;
			bad->why = "its block has another use";
			*bad_err = -EFSCORRUPTED;
		}
		node_spare(v, n);
		rwlock_unlock(&v->commit);
		return 0;
	}
	tree_shrink_locked(v);
	hash_insert(v, n);
	list_add(&v->clock, n);
	rwlock_unlock(&v->commit);
	return 0;
}

int tree_lookup(struct volume *v, enum table t, const void *key, size_t klen,
		void *val, size_t cap, size_t *vlen)
{
	struct tree_miss miss, bad = {0};
	struct path p;
	bool exact;
	int r, bad_err = 0;

	for (;;) {
		rwlock_read(&v->commit);
		r = descend(v, &v->trees[t], key, klen, &p, &exact, &miss);
		if (r == 0 && exact) {
			struct item it = node_item(p.n[0], (unsigned)p.slot[0]);

			*vlen = it.vlen;
			memcpy(val, it.val, it.vlen < cap ? it.vlen : cap);
		} else if (r == 0) {
			r = -ENOENT;
		}
		rwlock_unlock(&v->commit);
		if (r != -EAGAIN)
			return r;
		r = tree_load(v, &miss, &bad, &bad_err);
		if (r)
			return r;
	}
}

static int item_deliver(const struct path *p, const struct key *hi, tree_fn fn,
			void *ctx)
{
	struct item it = node_item(p->n[0], (unsigned)p->slot[0]);

	if (key_cmp(it.key, it.klen, hi->b, hi->len) >= 0)
		return -ENOENT;
	return fn(ctx, it.key, it.klen, it.val, it.vlen);
}

/*
 * Put the path on the first item wanted. From `floor_min` on: the last item
 * below lo, unless lo itself is there.
 */
static int range_start(struct volume *v, const struct tree *tr,
		       const struct key *floor_min, const struct key *lo,
		       bool after, struct path *p, struct tree_miss *miss)
{
	bool exact;
	int r = descend(v, tr, lo->b, lo->len, p, &exact, miss);

	if (r)
		return r;
	if (exact) {
		p->slot[0] += after;
		return 0;
	}
	if (floor_min) {
		struct path f = *p;

		if (f.slot[0] < 0)
			r = path_step(v, tr, &f, -1, miss);
		if (r == -EAGAIN)
			return r;
		if (r == 0) {
			struct item it = node_item(f.n[0], (unsigned)f.slot[0]);

			if (key_cmp(it.key, it.klen, floor_min->b,
				    floor_min->len) >= 0) {
				*p = f;
				return 0;
			}
		}
	}
	p->slot[0]++;
	return 0;
}

int tree_range_floor(struct volume *v, enum table t, const struct key *floor_min,
		     const struct key *lo, const struct key *hi, tree_fn fn,
		     void *ctx)
{
	const struct tree *tr = &v->trees[t];
	struct tree_miss miss, bad = {0};
	struct key cur = *lo;
	bool after = false;
	struct path p;
	int r, bad_err = 0;

	for (;;) {
		rwlock_read(&v->commit);
		r = range_start(v, tr, floor_min, &cur, after, &p, &miss);
		while (r == 0) {
			if (p.slot[0] == (int)node_count(p.n[0])) {
				r = path_step(v, tr, &p, 1, &miss);
				continue;
			}
			r = item_deliver(&p, hi, fn, ctx);
			if (r == 0 &&
			    p.slot[0] + 1 == (int)node_count(p.n[0])) {
				/* In case the next leaf is not in memory. */
				struct item it = node_item(
					p.n[0], (unsigned)p.slot[0]);

				memcpy(cur.b, it.key, it.klen);
				cur.len = (uint16_t)it.klen;
				after = true;
				floor_min = NULL;
			}
			p.slot[0]++;
		}
		rwlock_unlock(&v->commit);
		if (r == -ENOENT)
			return 0;
		if (r != -EAGAIN)
			return r;
		r = tree_load(v, &miss, &bad, &bad_err);
		if (r)
			return r;
	}
}

int tree_range(struct volume *v, enum table t, const struct key *lo,
	       const struct key *hi, tree_fn fn, void *ctx)
{
	return tree_range_floor(v, t, NULL, lo, hi, fn, ctx);
}

/* ---- changing --------------------------------------------------------------------------- */

void tree_need_init_locked(struct volume *v, struct tree_need *need)
{
	*need = (struct tree_need){0};
	v->changes++;
}

/* The nodes of a path, each once: those that are not open will be copied. */
static void path_meet(struct volume *v, const struct tree *tr, struct path *p,
		      struct tree_need *need)
{
	for (unsigned level = 0; level <= tr->level; level++) {
		struct node *n = p->n[level];

		if (n->met == v->changes)
			continue;
		n->met = v->changes;
		n->coming = 0;
		need->nodes += !node_is_open(v, tr, n);
	}
}

/*
 * One item more. As long as all that comes fits a node it is not split; from
 * there on each item may split it, and puts one into the node above.
 */
static void path_expect(const struct tree *tr, struct path *p, size_t bytes,
			struct tree_need *need)
{
	for (unsigned level = 0; level <= tr->level; level++) {
		struct node *n = p->n[level];

		n->coming += (uint32_t)bytes;
		if (n->coming <= node_room(n))
			return;
		need->nodes++;
		bytes = item_bytes(KEY_MAX, sizeof(struct disk_ptr)) +
			sizeof(le16);
	}
	need->nodes++;		/* a root above the halves */
}

int tree_prepare_locked(struct volume *v, const struct disk_jitem *ji,
			struct tree_need *need, struct tree_miss *miss)
{
	const struct tree *tr = &v->trees[ji->table];
	unsigned klen = get16(ji->klen), vlen = get16(ji->vlen);
	bool put = ji->type == JITEM_PUT, exact = false;
	struct path p;
	int r = descend(v, tr, ji->bytes, klen, &p, &exact, miss);

	/* The first leaf, or more than one, and a root. */
	if (r == -ENOENT)
		need->nodes += put ? 3 : 0;
	if (r)
		return r == -ENOENT ? 0 : r;
	path_meet(v, tr, &p, need);
	if (!put)
		need->gone += tr->level + 1;
	else if (!exact || node_item(p.n[0], (unsigned)p.slot[0]).vlen != vlen)
		path_expect(tr, &p, item_bytes(klen, vlen) + sizeof(le16), need);
	return 0;
}

static void insert_at(struct volume *v, struct tree *tr, struct path *p,
		      unsigned level, unsigned pos, const void *key, size_t klen,
		      const void *val, size_t vlen);

/*
 * Where to cut: in half by bytes; at the end if that is where `pos` is, so that
 * ascending keys fill their nodes. Then a short last item goes along: else, of
 * keys that come in descending order right behind it, each would come to this
 * node again and get one of its own.
 */
static unsigned split_point(const struct volume *v, const struct node *n,
			    unsigned pos)
{
	unsigned count = node_count(n), i;
	size_t half = node_used(v, n) / 2, sum = 0;

	if (pos == count) {
		struct item last = node_item(n, count - 1);

		return count > 1 && item_bytes(last.klen, last.vlen) <= SHORT_ITEM
			       ? count - 1 : count;
	}
	for (i = 0; i + 1 < count && sum < half; i++) {
		struct item it = node_item(n, i);

		sum += item_bytes(it.klen, it.vlen) + sizeof(le16);
	}
	return i ? i : 1;
}

/* The shortest key that is above the left node's last and not above the right
 * node's first. */
static size_t separator(const struct node *left, const struct item *first)
{
	struct item last = node_item(left, node_count(left) - 1);
	size_t i = 0;

	while (i < last.klen && i < first->klen && last.key[i] == first->key[i])
		i++;
	return i + 1 < first->klen ? i + 1 : first->klen;
}

static void grow_root(struct volume *v, struct tree *tr, struct path *p)
{
	struct node *root = node_new(v, tr, tr->level + 1);
	struct disk_ptr d = ptr_put(&tr->root);

	node_insert(v, root, 0, "", 0, &d, sizeof(d));
	tr->level++;
	tr->root = root->self;
	p->n[tr->level] = root;
	p->slot[tr->level] = 0;
}

static void split_insert(struct volume *v, struct tree *tr, struct path *p,
			 unsigned level, unsigned pos, const void *key, size_t klen,
			 const void *val, size_t vlen)
{
	struct node *left = p->n[level], *right = node_new(v, tr, level), *into;
	unsigned at = split_point(v, left, pos), count = node_count(left);
	struct item first;
	struct disk_ptr d;
	size_t sep;

	for (unsigned i = at; i < count; i++) {
		struct item it = node_item(left, i);

		node_insert(v, right, i - at, it.key, it.klen, it.val, it.vlen);
	}
	while (node_count(left) > at)
		node_remove(v, left, node_count(left) - 1);
	into = pos > at || at == count ? right : left;
	if (into == left && node_room(left) < item_bytes((unsigned)klen,
							 (unsigned)vlen) + 2) {
		assert(pos == at);
		into = right;
	}
	node_insert(v, into, into == right ? pos - at : pos, key, klen, val, vlen);
	if (level == tr->level)
		grow_root(v, tr, p);
	first = node_item(right, 0);
	sep = level ? first.klen : separator(left, &first);
	d = ptr_put(&right->self);
	insert_at(v, tr, p, level + 1, (unsigned)p->slot[level + 1] + 1, first.key,
		  sep, &d, sizeof(d));
}

/*
 * The first child takes whatever is lower than the second, so also keys below
 * the one it is entered with; when it splits, that key has to make way for
 * the new one, or the keys would be out of order.
 */
static void lower_first_key(struct volume *v, struct node *n, const void *key,
			    size_t klen)
{
	struct item first = node_item(n, 0);
	struct disk_ptr child;

	if (key_cmp(first.key, first.klen, key, klen) < 0)
		return;
	memcpy(&child, first.val, sizeof(child));
	node_remove(v, n, 0);
	node_insert(v, n, 0, "", 0, &child, sizeof(child));
}

static void insert_at(struct volume *v, struct tree *tr, struct path *p,
		      unsigned level, unsigned pos, const void *key, size_t klen,
		      const void *val, size_t vlen)
{
	struct node *n = p->n[level];

	if (level && pos == 1)
		lower_first_key(v, n, key, klen);
	if (node_room(n) >= item_bytes((unsigned)klen, (unsigned)vlen) +
				    sizeof(le16))
		node_insert(v, n, pos, key, klen, val, vlen);
	else
		split_insert(v, tr, p, level, pos, key, klen, val, vlen);
}

bool tree_peek_locked(struct volume *v, enum table t, const void *key, size_t klen,
		      void *val, size_t cap, size_t *vlen)
{
	struct tree_miss miss;
	struct path p;
	struct item it;
	bool exact = false;

	if (descend(v, &v->trees[t], key, klen, &p, &exact, &miss) || !exact)
		return false;
	it = node_item(p.n[0], (unsigned)p.slot[0]);
	*vlen = it.vlen;
	memcpy(val, it.val, it.vlen < cap ? it.vlen : cap);
	return true;
}

static void path_open_all(struct volume *v, struct tree *tr, struct path *p)
{
	for (unsigned level = tr->level + 1; level-- > 0;)
		path_open(v, tr, p, level);
}

bool tree_put_locked(struct volume *v, enum table t, const void *key, size_t klen,
		     const void *val, size_t vlen)
{
	struct tree *tr = &v->trees[t];
	struct tree_miss miss;
	struct path p;
	bool exact = false;
	unsigned pos;
	int r = descend(v, tr, key, klen, &p, &exact, &miss);

	if (r == -ENOENT) {
		p.n[0] = node_new(v, tr, 0);
		p.slot[0] = -1;
		tr->root = p.n[0]->self;
		tr->level = 0;
	}
	assert(r != -EAGAIN);
	path_open_all(v, tr, &p);
	pos = (unsigned)(p.slot[0] + 1);
	if (exact) {
		struct item it = node_item(p.n[0], --pos);

		if (it.vlen == vlen) {
			memcpy((uint8_t *)it.val, val, vlen);
			return false;
		}
		node_remove(v, p.n[0], pos);
		tr->items--;
	}
	insert_at(v, tr, &p, 0, pos, key, klen, val, vlen);
	tr->items++;
	return !exact;
}

/* Take all items of `right`, the parent's child at `slot`, into `left`. */
static void merge(struct volume *v, struct tree *tr, struct node *parent,
		  unsigned slot, struct node *left, struct node *right)
{
	struct item sep = node_item(parent, slot);
	unsigned n = node_count(left), count = node_count(right);

	for (unsigned i = 0; i < count; i++) {
		struct item it = node_item(right, i);

		/* Above the leaves the first key may be lower than the truth. */
		if (i == 0 && left->level) {
			it.key = sep.key;
			it.klen = sep.klen;
		}
		node_insert(v, left, n + i, it.key, it.klen, it.val, it.vlen);
	}
	node_remove(v, parent, slot);
	tr->nodes--;
	node_drop(v, tr, right);
}

static bool is_small(const struct volume *v, const struct node *n)
{
	return node_used(v, n) < (v->block_bytes - sizeof(struct disk_node)) / 4;
}

/* Is there a block for the copy? A change can do without. */
static bool may_open(struct volume *v, const struct tree *tr, const struct node *n)
{
	return v->readonly || v->joins || node_is_open(v, tr, n);
}

/* Do both fit one node, with room for more? */
static bool fit_one(const struct volume *v, const struct node *a, const struct node *b)
{
	size_t cap = v->block_bytes - sizeof(struct disk_node);

	return node_used(v, a) + node_used(v, b) + KEY_MAX < cap * 3 / 4;
}

/* A node that holds little joins a neighbour that has room, if in memory. */
static bool try_merge(struct volume *v, struct tree *tr, struct path *p,
		      unsigned level)
{
	struct node *n = p->n[level], *parent = p->n[level + 1], *other;
	unsigned slot = (unsigned)p->slot[level + 1];
	struct ptr ptr;

	if (!is_small(v, n))
		return false;
	if (slot + 1 < node_count(parent)) {
		ptr = node_child(parent, slot + 1);
		other = cache_find(v, tr->table, level, &ptr);
		if (other && fit_one(v, n, other)) {
			merge(v, tr, parent, slot + 1, n, other);
			return true;
		}
	}
	if (slot > 0) {
		ptr = node_child(parent, slot - 1);
		other = cache_find(v, tr->table, level, &ptr);
		if (other && may_open(v, tr, other) && fit_one(v, n, other)) {
			p->n[level] = other;
			p->slot[level + 1]--;
			v->joins -= !v->readonly && !node_is_open(v, tr, other);
			merge(v, tr, parent, slot, path_open(v, tr, p, level), n);
			return true;
		}
	}
	return false;
}

/* After items went from the leaf: invariant 4, and balance. */
static void rebalance(struct volume *v, struct tree *tr, struct path *p)
{
	for (unsigned level = 0; level < tr->level; level++) {
		struct node *n = p->n[level];

		if (node_count(n) == 0) {
			node_remove(v, p->n[level + 1],
				    (unsigned)p->slot[level + 1]);
			tr->nodes--;
			node_drop(v, tr, n);
		} else if (!try_merge(v, tr, p, level)) {
			break;
		}
	}
	while (tr->level && node_count(p->n[tr->level]) == 1) {
		struct node *root = p->n[tr->level];

		tr->root = node_child(root, 0);
		tr->level--;
		tr->nodes--;
		node_drop(v, tr, root);
		p->n[tr->level] = cache_find(v, tr->table, tr->level,
						  &tr->root);
		if (!p->n[tr->level])
			break;
	}
	if (p->n[tr->level] && node_count(p->n[tr->level]) == 0) {
		node_drop(v, tr, p->n[tr->level]);
		tr->root = (struct ptr){0};
		tr->level = 0;
		tr->nodes = 0;
	}
}

bool tree_del_locked(struct volume *v, enum table t, const void *key, size_t klen)
{
	struct tree *tr = &v->trees[t];
	struct tree_miss miss;
	struct path p;
	bool exact = false;
	int r = descend(v, tr, key, klen, &p, &exact, &miss);

	assert(r != -EAGAIN);
	if (r || !exact)
		return false;
	path_open_all(v, tr, &p);
	node_remove(v, p.n[0], (unsigned)p.slot[0]);
	tr->items--;
	if (is_small(v, p.n[0]))
		tr->unsettled = true;
	return true;
}

void tree_settle_locked(struct volume *v, enum table t, const void *key, size_t klen)
{
	struct tree *tr = &v->trees[t];
	struct tree_miss miss;
	struct path p;
	bool exact;

	/* Not there, or nobody's who changed it: its leaf is gone already. */
	if (!descend(v, tr, key, klen, &p, &exact, &miss) &&
	    node_is_open(v, tr, p.n[0]))
		rebalance(v, tr, &p);
}

/* ---- life ------------------------------------------------------------------------------- */

int tree_init(struct volume *v)
{
	size_t buckets = 1024;

	v->cache_nodes = v->opt.cache_bytes / 8 * 7 / v->block_bytes;
	if (v->cache_nodes < 256)
		v->cache_nodes = 256;
	while (buckets < v->cache_nodes)
		buckets *= 2;
	v->hash_mask = buckets - 1;
	v->hash = calloc(buckets, sizeof(*v->hash));
	v->scratch = malloc(v->block_bytes);
	return v->hash && v->scratch ? 0 : -ENOMEM;
}

void tree_fini(struct volume *v)
{
	while (v->slabs) {
		struct slab *s = v->slabs;

		v->slabs = s->next;
		free(s->blocks);
		free(s);
	}
	free(v->hash);
	free(v->scratch);
}

/* ---- walking it all ----------------------------------------------------------------------- */

/* A copy of the node, for who takes his time. 1 when it is lost: *why. */
static int node_copy(struct volume *v, enum table t, unsigned level,
		     const struct ptr *ptr, struct disk_node *d, const char **why)
{
	struct tree_miss miss = {.table = t, .level = level, .ptr = *ptr};
	struct tree_miss bad = {0};
	int r = 0, bad_err = 0;

	for (;;) {
		struct node *n;

		rwlock_read(&v->commit);
		n = cache_find(v, t, level, ptr);
		if (n)
			memcpy(d, n->d, v->block_bytes);
		rwlock_unlock(&v->commit);
		if (n)
			return 0;
		if (bad.why) {
			*why = bad.why;
			return 1;
		}
		r = tree_load(v, &miss, &bad, &bad_err);
		if (r)
			return r;
	}
}

/*
 * Depth first. One side reads and verifies, leaves that are neighbours in one
 * go, and puts what it meets into batches in the order of the walk; the other
 * takes a batch and calls back. No lock is held then, so callbacks may take
 * their time. With walk.ahead the two are threads.
 */
#define BATCHES 4u
#define BATCH_NODES 64u
#define BATCH_BYTES (512u << 10)

struct met {
	uint64_t block;
	const char *why;		/* it is lost */
	unsigned level;			/* 0: the batch holds the leaf itself */
};

struct batch {
	struct met v[BATCH_NODES];
	unsigned count;
	uint8_t *nodes;			/* a block for each */
};

struct walker {
	struct volume *v;
	enum table t;
	const struct walk *w;
	bool ahead;			/* wanted, and worth a thread */
	unsigned root_level;
	struct ptr root;
	unsigned max;			/* nodes in a batch */
	uint64_t met;			/* in all */
	struct batch batch[BATCHES];
	struct lock lock;
	pthread_cond_t moved;
	unsigned filled, emptied;	/* batches so far, under the lock */
	bool all;			/* there will be no more */
	bool stop;			/* nobody takes any more */
	int result;
};

static struct batch *batch_open(struct walker *k)
{
	return &k->batch[k->filled % BATCHES];
}

static int batch_tell(const struct walker *k, const struct batch *b)
{
	const struct walk *w = k->w;
	int r = 0;

	for (unsigned i = 0; r == 0 && i < b->count; i++) {
		const struct met *m = &b->v[i];
		struct node n = {.d = (void *)(b->nodes +
					       (size_t)i * k->v->block_bytes)};

		if (m->why) {
			if (w->bad)
				r = w->bad(w->ctx, k->t, m->level, m->block,
					   m->why);
			continue;
		}
		if (w->node)
			r = w->node(w->ctx, k->t, m->level, m->block);
		if (m->level || !w->item)
			continue;
		for (unsigned j = 0; r == 0 && j < node_count(&n); j++) {
			struct item it = node_item(&n, j);

			r = w->item(w->ctx, k->t, it.key, it.klen, it.val,
				    it.vlen);
		}
	}
	return r;
}

/* The open batch is full, or the last: on to the next. 1: nobody wants it. */
static int batch_pass(struct walker *k)
{
	struct batch *b = batch_open(k);
	int r = 0;

	if (!k->ahead) {
		r = batch_tell(k, b);
		b->count = 0;
		return r;
	}
	lock_lock(&k->lock);
	k->filled++;
	pthread_cond_broadcast(&k->moved);
	while (!k->stop && k->filled - k->emptied == BATCHES)
		lock_wait(&k->lock, &k->moved);
	r = k->stop;
	batch_open(k)->count = 0;
	lock_unlock(&k->lock);
	return r;
}

/* Note a node; of a leaf, its block is in the batch already. */
static int batch_add(struct walker *k, unsigned level, uint64_t block,
		     const char *why)
{
	struct batch *b = batch_open(k);

	/* A pointer that stands there twice could keep us for ever. */
	if (k->met++ > k->v->blocks + k->v->fake_next)
		return -EFSCORRUPTED;
	b->v[b->count++] = (struct met){block, why, level};
	return b->count < k->max ? 0 : batch_pass(k);
}

static struct disk_node *batch_room(struct walker *k)
{
	struct batch *b = batch_open(k);

	return (void *)(b->nodes + (size_t)b->count * k->v->block_bytes);
}

/* The keys that lead to a node: from lo on, and below hi (NULL: any). */
struct bounds {
	struct item lo, hi;
};

/* Those of child i of a node. A first key counts as lower than any. */
static struct bounds child_bounds(const struct node *n, unsigned i,
				  const struct bounds *outer)
{
	struct bounds b = *outer;

	if (i)
		b.lo = node_item(n, i);
	if (i + 1 < node_count(n))
		b.hi = node_item(n, i + 1);
	return b;
}

/* What no key leads to is as good as lost. */
static bool within(const struct node *n, const struct bounds *b)
{
	unsigned count = node_count(n);
	struct item first, last;

	if (!count)
		return true;
	first = node_item(n, 0);
	last = node_item(n, count - 1);
	return (!b->lo.key ||
		key_cmp(first.key, first.klen, b->lo.key, b->lo.klen) >= 0) &&
	       (!b->hi.key ||
		key_cmp(last.key, last.klen, b->hi.key, b->hi.klen) < 0);
}

/* The leaf is in the batch, and whole. */
static int leaf_add(struct walker *k, const struct ptr *ptr, const struct bounds *b)
{
	struct node n = {.d = batch_room(k)};

	return batch_add(k, 0, ptr->block, within(&n, b) ? NULL : NODE_MISPLACED);
}

static int walk_leaf(struct walker *k, const struct ptr *ptr, const struct bounds *b)
{
	const char *why = NULL;
	int r = node_copy(k->v, k->t, 0, ptr, batch_room(k), &why);

	if (r == 0)
		return leaf_add(k, ptr, b);
	return r < 0 ? r : batch_add(k, 0, ptr->block, why);
}

static bool is_cached(struct volume *v, enum table t, const struct ptr *ptr)
{
	bool found;

	rwlock_read(&v->commit);
	found = cache_find(v, t, 0, ptr) != NULL;
	rwlock_unlock(&v->commit);
	return found;
}

/*
 * Leaves below `parent` from child *i on: those that stand behind each other
 * by one read, past the cache, which they would only flood.
 */
static int walk_leaves(struct walker *k, const struct node *parent, unsigned *i,
		       const struct bounds *outer)
{
	struct bounds b = child_bounds(parent, *i, outer);
	struct volume *v = k->v;
	struct ptr ptr = node_child(parent, *i), p = ptr;
	unsigned room = k->max - batch_open(k)->count, n = 0, at = *i;
	uint8_t *nodes = (uint8_t *)batch_room(k);
	int r = 0;

	while (n < room && at + n < node_count(parent)) {
		p = node_child(parent, at + n);
		if (p.block != ptr.block + n || p.block >= v->blocks ||
		    is_cached(v, k->t, &p))
			break;
		n++;
	}
	*i += n ? n : 1;
	if (!n)
		return walk_leaf(k, &ptr, &b);
	if (image_pread(v->im, nodes, (size_t)n * v->block_bytes,
			blk_off(v, ptr.block)))
		memset(nodes, 0, (size_t)n * v->block_bytes);
	for (unsigned j = 0; j < n && r == 0; j++) {
		p = node_child(parent, at + j);
		b = child_bounds(parent, at + j, outer);
		if (node_verify((void *)(nodes + (size_t)j * v->block_bytes),
				v->block_bytes, k->t, 0, &p, NULL))
			r = walk_leaf(k, &p, &b);
		else
			r = leaf_add(k, &p, &b);
	}
	return r;
}

/* Is all below child i lower than where the walk begins? */
static bool walk_skips(const struct walker *k, const struct node *n, unsigned i)
{
	struct item next;

	if (!k->w->from || i + 1 == node_count(n))
		return false;
	next = node_item(n, i + 1);
	return key_cmp(next.key, next.klen, k->w->from, k->w->from_len) <= 0;
}

static int walk_node(struct walker *k, unsigned level, const struct ptr *ptr,
		     const struct bounds *b)
{
	struct node copy = {0};
	const char *why = NULL;
	int r;

	if (level == 0)
		return walk_leaf(k, ptr, b);
	copy.d = malloc(k->v->block_bytes);
	if (!copy.d)
		return -ENOMEM;
	r = node_copy(k->v, k->t, level, ptr, copy.d, &why);
	if (r >= 0) {
		bool lost = r == 1;

		r = batch_add(k, level, ptr->block, lost ? why : NULL);
		for (unsigned i = 0; !lost && r == 0 && i < node_count(&copy);) {
			struct ptr child = node_child(&copy, i);
			struct bounds inner = child_bounds(&copy, i, b);

			if (walk_skips(k, &copy, i))
				i++;
			else if (level == 1)
				r = walk_leaves(k, &copy, &i, b);
			else
				i++, r = walk_node(k, level - 1, &child, &inner);
		}
	}
	free(copy.d);
	return r;
}

static void *walk_ahead(void *arg)
{
	struct walker *k = arg;
	int r = walk_node(k, k->root_level, &k->root, &(struct bounds){0});

	lock_lock(&k->lock);
	k->result = r < 0 ? r : 0;
	k->filled += batch_open(k)->count != 0 && !k->stop;
	k->all = true;
	pthread_cond_broadcast(&k->moved);
	lock_unlock(&k->lock);
	return NULL;
}

static int walk_follow(struct walker *k)
{
	pthread_t thread;
	int r = 0;

	if (pthread_create(&thread, NULL, walk_ahead, k))
		return -EAGAIN;
	lock_lock(&k->lock);
	while (r == 0 && (!k->all || k->filled != k->emptied)) {
		if (k->filled == k->emptied) {
			lock_wait(&k->lock, &k->moved);
			continue;
		}
		lock_unlock(&k->lock);
		r = batch_tell(k, &k->batch[k->emptied % BATCHES]);
		lock_lock(&k->lock);
		k->emptied++;
		pthread_cond_broadcast(&k->moved);
	}
	k->stop = true;
	pthread_cond_broadcast(&k->moved);
	lock_unlock(&k->lock);
	pthread_join(thread, NULL);
	return r ? r : k->result;
}

static int walk_tree(struct walker *k)
{
	size_t bytes = k->v->block_bytes;
	int r = 0;

	k->max = BATCH_BYTES / bytes < BATCH_NODES ? BATCH_BYTES / bytes
						  : BATCH_NODES;
	for (unsigned i = 0; i < (k->ahead ? BATCHES : 1); i++) {
		k->batch[i].nodes = malloc(k->max * bytes);
		if (!k->batch[i].nodes)
			r = -ENOMEM;
	}
	lock_init(&k->lock, RANK_LEAF, "walk");
	pthread_cond_init(&k->moved, NULL);
	if (r == 0 && k->ahead)
		r = walk_follow(k);
	else if (r == 0)
		r = walk_node(k, k->root_level, &k->root, &(struct bounds){0});
	if (r == 0 && !k->ahead)
		r = batch_pass(k);
	pthread_cond_destroy(&k->moved);
	lock_fini(&k->lock);
	for (unsigned i = 0; i < BATCHES; i++)
		free(k->batch[i].nodes);
	return r;
}

int volume_walk(struct volume *v, enum table t, const struct walk *w)
{
	struct walker *k = calloc(1, sizeof(*k));
	struct tree *tr = &v->trees[t];
	int r = 0;

	if (!k)
		return -ENOMEM;
	k->v = v;
	k->t = t;
	k->w = w;
	rwlock_read(&v->commit);
	k->root = tr->root;
	k->root_level = tr->level;
	rwlock_unlock(&v->commit);
	k->ahead = w->ahead && k->root_level;
	if (k->root.block)
		r = walk_tree(k);
	free(k);
	for (size_t i = 0; t == TABLE_FILES && w->node && i < v->dropped.count; i++)
		for (uint64_t j = 0; r == 0 && j < v->dropped.v[i].len; j++)
			r = w->node(w->ctx, t, 255, v->dropped.v[i].start + j);
	return r;
}

/* ---- what is lost, and what was found ------------------------------------------------------- */

/* Where in the tree a lost node is. */
struct spot {
	uint64_t block;
	unsigned level;
	unsigned slot[TREE_LEVELS];	/* of each node on the way, by level */
};

struct mend {
	struct volume *v;
	struct tree *tr;
	const struct lost_node **lost;		/* of this tree, by block */
	size_t losts;
	const struct found_node **found;	/* in the order they are placed in */
	size_t founds;
	struct spot *spot;			/* from left to right */
	size_t spots, spot_room;
};

static int lost_cmp(const void *a, const void *b)
{
	const struct lost_node *x = *(const struct lost_node *const *)a;
	const struct lost_node *y = *(const struct lost_node *const *)b;

	if (x->block != y->block)
		return x->block < y->block ? -1 : 1;
	return (x->level > y->level) - (x->level < y->level);
}

/* The highest first: those below have to find their parents. */
static int found_cmp(const void *a, const void *b)
{
	const struct found_node *x = *(const struct found_node *const *)a;
	const struct found_node *y = *(const struct found_node *const *)b;

	if (x->level != y->level)
		return x->level < y->level ? 1 : -1;
	return key_cmp(x->key, x->klen, y->key, y->klen);
}

static const struct lost_node *lost_at(const struct mend *m, unsigned level,
				       uint64_t block)
{
	const struct lost_node k = {.block = block, .level = level}, *key = &k;
	const struct lost_node **l = NULL;

	if (m->losts)
		l = bsearch(&key, m->lost, m->losts, sizeof(*m->lost), lost_cmp);
	return l ? *l : NULL;
}

/*
 * The way down to where a found node (by its key) or a lost one belongs: a path
 * as far as `level` + 1. A found one's ends above the first lost node.
 */
struct way {
	const struct found_node *found;
	const struct spot *spot;
	struct path p;
	unsigned level;
};

static int way_down(struct mend *m, struct way *w, struct tree_miss *miss)
{
	unsigned end = w->found ? w->found->level : w->spot->level;
	struct ptr ptr = m->tr->root;
	bool exact;

	for (w->level = m->tr->level; w->level > end; w->level--) {
		unsigned l = w->level;
		int slot;

		if (w->found && lost_at(m, l, ptr.block))
			return 0;
		w->p.n[l] = fetch(m->v, m->tr, l, &ptr, miss);
		if (!w->p.n[l])
			return -EAGAIN;
		slot = w->spot ? (int)w->spot->slot[l]
			       : node_search(w->p.n[l], w->found->key,
					     w->found->klen, &exact);
		if (slot >= (int)node_count(w->p.n[l]))
			return -EFSCORRUPTED;
		w->p.slot[l] = slot < 0 ? 0 : slot;
		ptr = node_child(w->p.n[l], (unsigned)w->p.slot[l]);
	}
	return 0;
}

/* The way, with the commit lock and all that a change there can need; or neither. */
static int way_locked(struct mend *m, struct way *w)
{
	unsigned blocks = 3 * TREE_LEVELS;
	struct tree_miss miss, bad = {0};
	struct volume *v = m->v;
	int bad_err = 0, r = 0;

	if (!v->readonly && v->pool_blks < blocks)
		r = pool_fill(v, blocks, SPEND_CHECKPOINT);
	while (r == 0) {
		rwlock_write(&v->commit);
		r = tree_spares_locked(v, blocks);
		if (r == 0)
			r = way_down(m, w, &miss);
		if (r == 0)
			return 0;
		rwlock_unlock(&v->commit);
		if (r == -EAGAIN)
			r = tree_load(v, &miss, &bad, &bad_err);
	}
	return r;
}

static void way_open(struct mend *m, struct way *w)
{
	for (unsigned l = m->tr->level; l > w->level; l--)
		path_open(m->v, m->tr, &w->p, l);
}

/* New nodes in the lost one's place, down to the one found below it. */
static void replace_locked(struct mend *m, struct way *w)
{
	struct disk_ptr ptr = w->found->ptr;
	unsigned level = w->level;
	struct node *n = NULL;

	for (unsigned l = w->found->level + 1; l <= level; l++) {
		n = node_new(m->v, m->tr, l);
		node_insert(m->v, n, 0, "", 0, &ptr, sizeof(ptr));
		ptr = ptr_put(&n->self);
	}
	if (level == m->tr->level) {
		m->tr->root = n->self;
		return;
	}
	way_open(m, w);
	node_set_child(w->p.n[level + 1], (unsigned)w->p.slot[level + 1], &n->self);
}

/* To where its key belongs. One with the same key may be there, and lost. */
static void adopt_locked(struct mend *m, struct way *w)
{
	const struct found_node *f = w->found;
	unsigned level = f->level, slot = (unsigned)w->p.slot[level + 1];
	struct node *above = w->p.n[level + 1];
	struct item it = node_item(above, slot);
	struct ptr there = node_child(above, slot);
	bool same = !key_cmp(it.key, it.klen, f->key, f->klen);

	if (same && !lost_at(m, level, there.block))
		return;
	way_open(m, w);
	if (same) {
		struct ptr ptr = ptr_get(&f->ptr);

		node_set_child(w->p.n[level + 1], slot, &ptr);
		return;
	}
	insert_at(m->v, m->tr, &w->p, level + 1, slot + 1, f->key, f->klen, &f->ptr,
		  sizeof(f->ptr));
}

static int place_found(struct mend *m, const struct found_node *f)
{
	struct way w = {.found = f};
	int r;

	if (!m->tr->root.block || f->level >= m->tr->level)
		return 0;
	r = way_locked(m, &w);
	/* In the way is one that nobody has listed as lost: not yet. */
	if (r)
		return r == -EFSCORRUPTED || r == -EFSBADCRC ? 0 : r;
	if (w.level > f->level)
		replace_locked(m, &w);
	else
		adopt_locked(m, &w);
	rwlock_unlock(&m->v->commit);
	return 0;
}

static int spot_add(struct mend *m, const struct spot *at)
{
	if (m->spots == m->spot_room) {
		size_t room = m->spot_room ? 2 * m->spot_room : 64;
		struct spot *p = realloc(m->spot, room * sizeof(*p));

		if (!p)
			return -ENOMEM;
		m->spot = p;
		m->spot_room = room;
	}
	m->spot[m->spots++] = *at;
	return 0;
}

/* All lost nodes that are to be given up, at and below this one. */
static int find_spots(struct mend *m, unsigned level, const struct ptr *ptr,
		      struct spot *at)
{
	const struct lost_node *lost = lost_at(m, level, ptr->block);
	struct node copy = {0};
	const char *why;
	int r;

	if (lost) {
		at->block = ptr->block;
		at->level = level;
		return lost->keep ? 0 : spot_add(m, at);
	}
	if (level == 0)
		return 0;
	copy.d = malloc(m->v->block_bytes);
	if (!copy.d)
		return -ENOMEM;
	r = node_copy(m->v, m->tr->table, level, ptr, copy.d, &why);
	if (r == 1 && !strcmp(why, NODE_UNREAD))	/* just now? */
		r = node_copy(m->v, m->tr->table, level, ptr, copy.d, &why);
	for (unsigned i = 0; r == 0 && i < node_count(&copy); i++) {
		struct ptr child = node_child(&copy, i);

		at->slot[level] = i;
		r = find_spots(m, level - 1, &child, at);
	}
	free(copy.d);
	return r == 1 ? 0 : r;	/* 1: it is lost too, but nobody has listed it */
}

static void forget_root(struct tree *tr)
{
	tr->root = (struct ptr){0};
	tr->level = 0;
	tr->nodes = tr->items = 0;
}

/* Its block stays in use: a damaged pointer may have led to somebody else's. */
static void forget_locked(struct mend *m, struct way *w)
{
	struct tree *tr = m->tr;

	way_open(m, w);
	for (unsigned l = w->level + 1; l <= tr->level; l++) {
		struct node *n = w->p.n[l];

		node_remove(m->v, n, (unsigned)w->p.slot[l]);
		tr->nodes--;
		if (node_count(n))
			return;
		node_drop(m->v, tr, n);
	}
	forget_root(tr);
}

static int forget(struct mend *m, const struct spot *at)
{
	struct way w = {.spot = at};
	int r = way_locked(m, &w);

	if (r == 0) {
		forget_locked(m, &w);
		rwlock_unlock(&m->v->commit);
	}
	return r;
}

static int mend_init(struct mend *m)
{
	const struct volume_repair *rep = m->v->opt.repair;
	size_t n = 0;

	m->lost = calloc(rep->losts + 1, sizeof(*m->lost));
	m->found = calloc(rep->founds + 1, sizeof(*m->found));
	if (!m->lost || !m->found)
		return -ENOMEM;
	for (size_t i = 0; i < rep->losts; i++)
		if (rep->lost[i].table == m->tr->table)
			m->lost[m->losts++] = &rep->lost[i];
	for (size_t i = 0; i < rep->founds; i++)
		if (rep->found[i].table == m->tr->table)
			m->found[m->founds++] = &rep->found[i];
	qsort(m->lost, m->losts, sizeof(*m->lost), lost_cmp);
	/* What is there twice, once to be kept, is given up. */
	for (size_t i = 0; i < m->losts; i++) {
		if (!n || lost_cmp(&m->lost[n - 1], &m->lost[i]))
			m->lost[n++] = m->lost[i];
		else if (!m->lost[i]->keep)
			m->lost[n - 1] = m->lost[i];
	}
	m->losts = n;
	qsort(m->found, m->founds, sizeof(*m->found), found_cmp);
	return 0;
}

int tree_mend(struct volume *v, enum table t)
{
	struct mend m = {.v = v, .tr = &v->trees[t]};
	struct spot at = {0};
	int r = mend_init(&m);

	for (size_t i = 0; r == 0 && i < m.founds; i++)
		r = place_found(&m, m.found[i]);
	if (r == 0 && m.losts && m.tr->root.block)
		r = find_spots(&m, m.tr->level, &m.tr->root, &at);
	/* From right to left, so that the places of the others hold. */
	while (r == 0 && m.spots)
		r = forget(&m, &m.spot[--m.spots]);
	free(m.spot);
	free(m.found);
	free(m.lost);
	return r;
}
