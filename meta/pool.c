/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Blocks for the volume itself: the reserve and the pool.
 *
 * The reserve is a promise of the allocator's, for what must not fail:
 * checkpoints, and transactions that free. Whoever may take of it stops where it
 * is kept for those below:
 *
 *      SPEND_REWRITE     three eighths of the part for transactions
 *      SPEND_ASIDE       an eighth of it, and a block for 32 that are set aside:
 *                        more than items take that name them one by one, in
 *                        leaves that are half full
 *      SPEND_FREEING     the rest
 *      SPEND_CHECKPOINT  the bitmaps that do not exist yet, and twice what one
 *                        checkpoint takes: what it replaces comes back with the
 *                        next one
 *
 * A checkpoint gives back what transactions took for copies of nodes, and that
 * goes to the reserve before anybody else can have it. So each of them finds
 * its part again, less what the trees have grown by; overwriting, and changes
 * of what is shared, can let them grow for good, and so have a part of their
 * own.
 *
 * The pool. Nodes and bitmaps are written to blocks of the pool, and those the
 * host has set aside (image_ensure): a full host refuses a transaction in good
 * time and no checkpoint. The last `pool_floor` of them are not for ordinary
 * transactions, so that files can be removed on a full host, and each
 * checkpoint puts the blocks of the nodes it replaced back into a low pool, and
 * lowers a high one, where nodes went as soon as they had come: no file can have
 * what is there.
 * After a crash the blocks that the pool had are free like others; where the
 * host has no more to give, they are found by asking it which ones it has.
 *
 * A checkpoint needs a block for each bitmap that its generation has changed, and
 * of a large volume that may be more than the pool has. So they are counted, the
 * pool is filled for them by and by (pool_back()), and where the host has no blocks
 * the generation ends in good time. Half of the floor is for bitmaps in any case.
 */
#include "meta/meta_priv.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define POOL_BATCH 128u		/* blocks taken at a time */
#define CUT_ITEMS_MAX 150u

/* ---- the reserve -------------------------------------------------------------------- */

static uint64_t clamp(uint64_t n, uint64_t min, uint64_t max)
{
	return n < min ? min : n > max ? max : n;
}

int reserve_init(struct volume *v)
{
	uint64_t bitmaps = space_bitmaps(v);
	uint64_t own = clamp(v->blocks / 128, clamp(v->blocks / 4, 64, 96), 4096);

	v->pool_floor = clamp(own / 3, 0, 256);
	v->reserve_txns = own - v->pool_floor;
	/* All bitmaps, and a leaf of their table for 32 of them, and its path. */
	v->checkpoint_blks = bitmaps + bitmaps / 32 + 4;
	/* Each item may lead to a leaf of its own, which may have to be split. */
	v->cut_items = (unsigned)clamp(v->reserve_txns / 2 / 3, 8, CUT_ITEMS_MAX);
	v->backed = v->pool_floor / 2;
	atomic_store(&v->back_at, v->pool_floor / 4);
	v->changed = calloc((bitmaps + 63) / 64, sizeof(*v->changed));
	return v->changed ? 0 : -ENOMEM;
}

/* Its parts: for checkpoints, and for what is set aside. */
static void reserve_parts(struct volume *v, uint64_t *checkpoints, uint64_t *extra)
{
	rwlock_read(&v->commit);
	*checkpoints = space_absent_locked(v) + 2 * v->checkpoint_blks;
	*extra = aside_extra(v->aside);
	rwlock_unlock(&v->commit);
}

static uint64_t reserve_want(struct volume *v)
{
	uint64_t checkpoints, extra;

	reserve_parts(v, &checkpoints, &extra);
	return checkpoints + extra + v->reserve_txns;
}

/* What a spender has to leave in it. */
static uint64_t reserve_keep(struct volume *v, enum spend spend)
{
	uint64_t keep, extra, own = atomic_load(&v->pending_own);

	if (spend == SPEND_CHECKPOINT)
		return 0;
	reserve_parts(v, &keep, &extra);
	/* The last checkpoint has had its share, and the next gives it back. */
	keep -= own < v->checkpoint_blks ? own : v->checkpoint_blks;
	if (spend <= SPEND_ASIDE)
		keep += v->reserve_txns / 2;
	if (spend <= SPEND_REWRITE)
		keep += v->reserve_txns / 8 + extra;
	return keep;
}

static bool reserve_spend(struct volume *v, uint64_t n, uint64_t keep)
{
	uint64_t held = atomic_load(&v->reserve_held);

	do {
		if (held < n || held - n < keep)
			return false;
	} while (!atomic_compare_exchange_weak(&v->reserve_held, &held, held - n));
	return true;
}

/* Bring the reserve to what it should be, as far as there is space. */
void reserve_top_up(struct volume *v)
{
	uint64_t held = atomic_load(&v->reserve_held), lack, want;

	want = reserve_want(v);
	if (held > want && reserve_spend(v, held - want, 0))
		alloc_unreserve(v->alloc, held - want);
	if (held >= want)
		return;
	for (lack = want - held; lack; lack /= 2)
		if (alloc_reserve(v->alloc, lack) == 0) {
			atomic_fetch_add(&v->reserve_held, lack);
			return;
		}
}

int reserve_release(struct volume *v, uint64_t start, uint64_t len)
{
	uint64_t held = atomic_load(&v->reserve_held), want = reserve_want(v);
	uint64_t n = held < want ? want - held : 0;
	int r = 0;

	if (n > len)
		n = len;
	if (n)
		r = alloc_release_reserved(v->alloc, start, n);
	if (n && r == 0)
		atomic_fetch_add(&v->reserve_held, n);
	if (r == 0 && n < len)
		r = alloc_release(v->alloc, start + n, len - n);
	return r;
}

/* Blocks that are being punched count as taken: without any, wait for them. */
static int take_free(struct volume *v, uint64_t goal, uint64_t n, struct extent *out,
		     unsigned max, unsigned *count, uint64_t *got)
{
	int r = alloc_vec(v->alloc, goal, n, out, max, count, got);

	if (r != -ENOSPC)
		return r;
	lock_lock(&v->punch);
	r = alloc_vec(v->alloc, goal, n, out, max, count, got);
	lock_unlock(&v->punch);
	return r;
}

int reserve_more(struct volume *v, uint64_t n)
{
	int r = alloc_reserve(v->alloc, n);

	if (r != -ENOSPC)
		return r;
	lock_lock(&v->punch);
	r = alloc_reserve(v->alloc, n);
	lock_unlock(&v->punch);
	return r;
}

int volume_take(struct volume *v, uint64_t goal, uint64_t n, struct extent *out,
		unsigned max, unsigned *count, uint64_t *got, enum spend spend)
{
	int r = take_free(v, goal, n, out, max, count, got);

	if (r != -ENOSPC || spend == SPEND_NONE ||
	    !reserve_spend(v, n, reserve_keep(v, spend)))
		return r;
	r = alloc_vec_reserved(v->alloc, goal, n, out, max, count, got);
	if (r)
		atomic_fetch_add(&v->reserve_held, n);
	else if (*got < n)
		atomic_fetch_add(&v->reserve_held, n - *got);
	return r;
}

int volume_take_waiting(struct volume *v, uint64_t goal, uint64_t n,
			      struct extent *out, unsigned max, unsigned *count,
			      uint64_t *got, enum spend spend)
{
	int r = volume_take(v, goal, n, out, max, count, got,
			    spend == SPEND_CHECKPOINT ? spend : SPEND_NONE);

	if (r != -ENOSPC || spend == SPEND_CHECKPOINT)
		return r;
	if (atomic_load(&v->pending_blks) > atomic_load(&v->pending_own)) {
		r = checkpoint_run(v, false);
		if (r)
			return r;
	}
	r = volume_take(v, goal, n, out, max, count, got, spend);
	if (r == -ENOSPC && spend != SPEND_NONE) {
		/* The reserve itself waits for a checkpoint of its spender. */
		r = checkpoint_run(v, false);
		if (!r)
			r = volume_take(v, goal, n, out, max, count, got, spend);
	}
	return r;
}

/* ---- the pool ----------------------------------------------------------------------- */

int pool_room_locked(struct volume *v, size_t more)
{
	size_t cap = v->pool_cap * 2 + more + 64;
	void *p;

	if (v->pool_count + more <= v->pool_cap)
		return 0;
	p = realloc(v->pool, cap * sizeof(*v->pool));
	if (!p)
		return -ENOMEM;
	v->pool = p;
	v->pool_cap = cap;
	return 0;
}

bool pool_has_locked(const struct volume *v, uint64_t block)
{
	for (size_t i = 0; i < v->pool_count; i++)
		if (block - v->pool[i].start < v->pool[i].len)
			return true;
	return false;
}

static int host_ensure(struct volume *v, const struct extent *e)
{
	int r = image_ensure(v->im, blk_off(v, e->start), blk_off(v, e->len));

	if (r == -EOPNOTSUPP)
		r = 0;
	atomic_store(&v->host_full, r == -ENOSPC || r == -EDQUOT);
	return r;
}

/* Of these runs, put what the host has blocks for into the pool; the rest is
 * free again. */
static int pool_add(struct volume *v, const struct extent *e, unsigned count,
		    uint64_t *got)
{
	int r = 0;

	*got = 0;
	for (unsigned i = 0; i < count; i++) {
		bool in = false;

		if (r == 0)
			r = host_ensure(v, &e[i]);
		if (r == 0) {
			rwlock_write(&v->commit);
			r = pool_room_locked(v, 1);
			if (r == 0) {
				tree_forget_locked(v, e[i].start, e[i].len);
				v->pool[v->pool_count++] = e[i];
				v->pool_blks += e[i].len;
				in = true;
			}
			rwlock_unlock(&v->commit);
		}
		if (in)
			*got += e[i].len;
		else
			alloc_free(v->alloc, e[i].start, e[i].len);
	}
	return r;
}

/* Of the run [from, to), which the host has, what is free and needed. */
static uint64_t gather_run(struct volume *v, uint64_t from, uint64_t to, uint64_t n)
{
	struct extent e;
	uint64_t all = 0, got;

	while (all < n && alloc_next_free(v->alloc, from, &e) == 0 && e.start < to) {
		/* A run is told from its start, which may lie before. */
		if (e.start < from) {
			e.len -= from - e.start;
			e.start = from;
		}
		if (e.start + e.len > to)
			e.len = to - e.start;
		if (e.len > n - all)
			e.len = n - all;
		from = e.start + e.len;
		if (alloc_exact(v->alloc, e.start, e.len))
			continue;
		if (pool_add(v, &e, 1, &got))
			break;
		all += got;
	}
	return all;
}

/*
 * The host has no more blocks to give: find free blocks that it has given
 * already, those that the last mount's pool held among them. True if all.
 */
static bool pool_gather(struct volume *v, uint64_t n)
{
	uint64_t off = 0, len, got = 0;

	while (got < n && image_mapped(v->im, &off, &len) == 0) {
		got += gather_run(v, (off + v->block_bytes - 1) >> v->shift,
				  (off + len) >> v->shift, n - got);
		off += len;
	}
	atomic_store(&v->host_full, true);
	return got >= n;
}

int pool_fill(struct volume *v, uint64_t n, enum spend spend)
{
	struct extent ext[32];
	unsigned count;
	uint64_t got, want = n < POOL_BATCH ? POOL_BATCH : n;
	int r = 0;

	while (n && r == 0) {
		if (want > v->blocks / 64 && want > n)
			want = n;
		r = volume_take(v, ALLOC_NO_GOAL, want, ext, 32, &count, &got,
				SPEND_NONE);
		if (r == -ENOSPC)
			r = volume_take_waiting(v, ALLOC_NO_GOAL, n, ext, 32,
					       &count, &got, spend);
		if (r)
			break;
		r = pool_add(v, ext, count, &got);
		if (r && atomic_load(&v->host_full) && want > n)
			r = 0;		/* no more than is needed, then */
		n = got < n ? n - got : 0;
		want = n;
		if (r && atomic_load(&v->host_full) && spend != SPEND_NONE &&
		    pool_gather(v, n))
			return 0;
	}
	return r;
}

int pool_open(struct volume *v)
{
	int r = pool_fill(v, v->pool_floor, SPEND_CHECKPOINT);

	/* A full volume gives what it has; a full host shall say so now. */
	return r == -ENOSPC && !atomic_load(&v->host_full) ? 0 : r;
}

int pool_take(struct volume *v, uint64_t *block)
{
	for (;;) {
		bool some;
		int r;

		rwlock_write(&v->commit);
		some = v->pool_blks > 0;
		if (some)
			*block = block_pop_locked(v);
		rwlock_unlock(&v->commit);
		if (some)
			return 0;
		r = pool_fill(v, 1, SPEND_CHECKPOINT);
		if (r)
			return r;
	}
}

/* More than that it does not keep: no file could have it. */
static uint64_t pool_most(const struct volume *v)
{
	uint64_t most = v->pool_floor + (v->blocks / 64 < POOL_BATCH ? v->blocks / 64
								     : POOL_BATCH);
	uint64_t back = pool_leave_locked(v, SPEND_FREEING) + v->pool_floor / 2;

	return most > back ? most : back;
}

/* The last block of a freed run into the pool, if the pool is low. */
static bool keep_last_locked(struct volume *v, struct delta *d)
{
	uint64_t block = d->start + d->len - 1;

	if (v->pool_blks >= pool_most(v) || pool_room_locked(v, 1) ||
	    alloc_undefer(v->alloc, block, 1))
		return false;
	tree_forget_locked(v, block, 1);
	block_push_locked(v, block);
	atomic_fetch_sub(&v->pending_blks, 1);
	d->len--;
	return true;
}

/* The last of the pool's runs as far as the pool is high, to be released. */
static bool pool_pop_surplus(struct volume *v, struct extent *out)
{
	bool popped = false;

	rwlock_write(&v->commit);
	if (v->pool_blks > pool_most(v)) {
		struct extent *e = &v->pool[v->pool_count - 1];
		uint64_t more = v->pool_blks - pool_most(v);

		*out = (struct extent){e->start, e->len < more ? e->len : more};
		popped = alloc_defer(v->alloc, out->start, out->len) == 0;
		if (popped) {
			e->start += out->len;
			e->len -= out->len;
			v->pool_count -= !e->len;
			v->pool_blks -= out->len;
		}
	}
	rwlock_unlock(&v->commit);
	return popped;
}

int pool_lower(struct volume *v)
{
	struct extent e;
	int r = 0;

	while (r == 0 && pool_pop_surplus(v, &e)) {
		r = reserve_release(v, e.start, e.len);
		atomic_fetch_add(&v->trim_due, e.len);
	}
	return r;
}

void pool_keep(struct volume *v, struct deltas *l)
{
	bool low = true;

	rwlock_write(&v->commit);
	for (size_t i = 0; i < l->count && low; i++)
		while (low && l->v[i].free && l->v[i].own && l->v[i].len)
			low = keep_last_locked(v, &l->v[i]);
	rwlock_unlock(&v->commit);
}

/* ---- blocks of the pool for bitmaps --------------------------------------------------- */

static bool change(struct volume *v, uint64_t bitmap)
{
	uint64_t bit = 1ull << bitmap % 64, *word = &v->changed[bitmap / 64];
	bool before = *word & bit;

	*word |= bit;
	return !before;
}

/* A bitmap of which all is freed needs no block: only the ends of a run count then. */
void pool_changed_locked(struct volume *v, uint64_t start, uint64_t len, bool free)
{
	uint64_t per = space_per_bitmap(v), end = start + len;

	if (!v->changed || !len || end > v->blocks)
		return;
	for (uint64_t b = start / per; b * per < end; b++)
		if ((!free || start > b * per || end < (b + 1) * per) && change(v, b))
			atomic_fetch_add(&v->changed_maps, 1);
}

/* A generation ends. Its bitmaps are still to be written. */
void pool_freeze_locked(struct volume *v)
{
	memset(v->changed, 0, (space_bitmaps(v) + 63) / 64 * sizeof(*v->changed));
	v->changed_before = atomic_exchange(&v->changed_maps, 0);
	atomic_store(&v->back_at, v->pool_floor / 4);
}

/* For the bitmaps that have changed, and so many more: with leaves of their table. */
static uint64_t back_want(const struct volume *v, uint64_t more)
{
	uint64_t n = atomic_load(&v->changed_maps) + v->changed_before + more;
	uint64_t leaves = v->checkpoint_blks / 33 + 1;

	return n + (n < leaves ? n : leaves) + 4;
}

/* They are. */
void pool_written_locked(struct volume *v)
{
	uint64_t want, least = v->pool_floor / 2;

	v->changed_before = 0;
	want = back_want(v, 0);
	if (v->backed > want)
		v->backed = want;
	if (v->backed < least)
		v->backed = least;
}

uint64_t pool_leave_locked(const struct volume *v, enum spend spend)
{
	uint64_t want = back_want(v, 0);

	if (spend == SPEND_CHECKPOINT)
		return 0;
	if (want > v->backed)
		want = v->backed;
	if (spend < SPEND_FREEING && want < v->pool_floor)
		want = v->pool_floor;
	return want;
}

int pool_back(struct volume *v)
{
	uint64_t want, have;
	int r = 0;

	if (atomic_load(&v->changed_maps) < atomic_load(&v->back_at))
		return 0;
	rwlock_read(&v->commit);
	want = back_want(v, 2 * TXN_BITMAPS);
	have = v->pool_blks;
	rwlock_unlock(&v->commit);
	if (have < want + v->pool_floor / 2)
		r = pool_fill(v, want + v->pool_floor / 2 - have, SPEND_NONE);
	if (r == -ENOSPC || r == -EDQUOT) {
		if (atomic_load(&v->host_full))
			return -EAGAIN;
		want = 0;	/* a full volume has its reserve for that */
	} else if (r) {
		return r;
	}
	rwlock_write(&v->commit);
	if (v->backed < want)
		v->backed = want;
	atomic_store(&v->back_at, atomic_load(&v->changed_maps) + TXN_BITMAPS);
	rwlock_unlock(&v->commit);
	return 0;
}
