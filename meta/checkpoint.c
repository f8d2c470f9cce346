/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A checkpoint writes the trees as of one moment, so that the journal before
 * that moment is needed no more and what was freed before it is free.
 *
 * Operations go on meanwhile, in the next generation: freezing one is moving
 * the heads of its lists of nodes and deltas, and a frozen node is copied by
 * whoever wants to change it.
 *
 * Two rules of order carry everything: nothing is part of a checkpoint before
 * it is durable (one flush covers nodes, bitmaps, groups and data), and the
 * tail moves, and freed blocks become free, only after the superblock is.
 *
 * The blocks that a checkpoint takes and frees for itself (bitmaps, nodes of
 * TABLE_SPACE) can't be in the bitmaps it writes. They go into the journal, as
 * a group of their own that belongs to the next generation and says which
 * checkpoint it is of: replay that starts from an earlier one ignores it, for
 * there these blocks are free and their predecessors in use.
 */
#include "meta/meta_priv.h"

#include <stdio.h>
#include <stdlib.h>

#define STAGE_BYTES (256u << 10)

struct checkpoint {
	struct volume *v;
	bool clean;
	uint64_t gen;
	uint64_t inodes, aside;
	struct tree frozen[TABLES];
	struct node_list nodes[TABLES];
	struct deltas deltas;		/* of transactions */
	struct deltas node_frees;	/* nodes replaced */
	struct deltas changes;		/* all, sorted: what bitmaps become */
	struct deltas own;
	struct held_list riding;
	struct cut cut;
	uint64_t own_seq, own_units;
};

/* Under the commit lock: this generation ends, the next begins. */
static void freeze(void *ctx)
{
	struct checkpoint *ck = ctx;
	struct volume *v = ck->v;

	ck->gen = v->gen++;
	ck->inodes = v->inodes;
	ck->aside = v->aside;
	for (unsigned t = 0; t < TABLE_SPACE; t++) {
		ck->frozen[t] = v->trees[t];
		ck->nodes[t] = v->trees[t].dirty;
		v->trees[t].dirty = (struct node_list){0};
		v->trees[t].gen = v->gen;
	}
	v->trees[TABLE_SPACE].gen = ck->gen;
	ck->deltas = v->deltas;
	v->deltas = (struct deltas){0};
	atomic_store(&v->touched, 0);
	ck->riding = v->riding;
	v->riding = (struct held_list){0};
	ck->node_frees = v->node_frees;
	v->node_frees = (struct deltas){0};
	pool_freeze_locked(v);
}

/* ---- nodes ------------------------------------------------------------------------ */

static int node_ptr_cmp(const void *a, const void *b)
{
	const struct node *x = *(struct node *const *)a;
	const struct node *y = *(struct node *const *)b;

	return (x->self.block > y->self.block) - (x->self.block < y->self.block);
}

/* Write nodes in order of place, neighbours in one go, from sealed copies. */
static int write_sorted(struct volume *v, struct node **nodes, size_t count)
{
	size_t max = STAGE_BYTES / v->block_bytes, n;
	uint8_t *stage = malloc(STAGE_BYTES);
	int r = stage ? 0 : -ENOMEM;

	for (size_t i = 0; i < count && r == 0; i += n) {
		for (n = 0; n < max && i + n < count &&
			    nodes[i + n]->self.block == nodes[i]->self.block + n;
		     n++) {
			uint8_t *copy = stage + n * v->block_bytes;

			memcpy(copy, nodes[i + n]->d, v->block_bytes);
			node_seal((struct disk_node *)copy, v->block_bytes);
		}
		r = image_pwrite(v->im, stage, n * v->block_bytes,
				 blk_off(v, nodes[i]->self.block));
	}
	free(stage);
	return r;
}

/* What could not be written stays on the list, and so in memory. */
static int write_nodes(struct checkpoint *ck, enum table t)
{
	struct volume *v = ck->v;
	size_t count = ck->nodes[t].count;
	struct node **nodes, *n = ck->nodes[t].head;
	int r;

	if (!count)
		return 0;
	nodes = malloc(count * sizeof(*nodes));
	if (!nodes)
		return -ENOMEM;
	for (size_t i = 0; i < count; i++, n = n->next)
		nodes[i] = n;
	qsort(nodes, count, sizeof(*nodes), node_ptr_cmp);
	r = write_sorted(v, nodes, count);
	for (size_t i = 0; i < count && r == 0; i++)
		r = delta_add(t == TABLE_SPACE ? &ck->own : &ck->changes,
			      nodes[i]->self.block, 1, false);
	if (r)
		goto out;
	ck->nodes[t] = (struct node_list){0};
	/* A few at a time: nobody shall wait long for the lock. */
	for (size_t i = 0, some; i < count; i += some) {
		some = count - i < 128 ? count - i : 128;
		rwlock_write(&v->commit);
		tree_written_locked(v, nodes + i, some);
		rwlock_unlock(&v->commit);
	}
out:
	free(nodes);
	return r;
}

/* ---- blocks ------------------------------------------------------------------------- */

static int delta_cmp(const void *a, const void *b)
{
	const struct delta *x = a, *y = b;

	return (x->start > y->start) - (x->start < y->start);
}

static void deltas_sort(struct deltas *d)
{
	if (d->count)
		qsort(d->v, d->count, sizeof(*d->v), delta_cmp);
}

/* Mark frees that no transaction has marked. */
static int defer(struct volume *v, const struct deltas *d)
{
	int r = 0;

	for (size_t i = 0; i < d->count && r == 0; i++)
		if (d->v[i].free)
			r = alloc_defer(v->alloc, d->v[i].start, d->v[i].len);
	return r;
}

/* The blocks of nodes, bitmaps and items, into the bitmaps and their table. */
static int write_space(struct checkpoint *ck)
{
	struct volume *v = ck->v;
	struct tree *tr = &v->trees[TABLE_SPACE];
	struct deltas frees;
	int r = defer(v, &ck->node_frees);

	for (size_t i = 0; i < ck->node_frees.count && r == 0; i++)
		r = delta_add_own(&ck->deltas, ck->node_frees.v[i].start,
				  ck->node_frees.v[i].len, true);
	for (size_t i = 0; i < ck->deltas.count && r == 0; i++)
		r = delta_add(&ck->changes, ck->deltas.v[i].start,
			      ck->deltas.v[i].len, ck->deltas.v[i].free);
	if (r)
		return r;
	deltas_sort(&ck->changes);
	r = space_write(v, &ck->changes, &ck->own);
	if (r)
		return r;
	rwlock_write(&v->commit);
	ck->frozen[TABLE_SPACE] = *tr;
	ck->nodes[TABLE_SPACE] = tr->dirty;
	tr->dirty = (struct node_list){0};
	pool_written_locked(v);
	/* Any transaction may make room in that list. */
	frees = v->space_frees;
	v->space_frees = (struct deltas){0};
	rwlock_unlock(&v->commit);
	r = write_nodes(ck, TABLE_SPACE);
	for (size_t i = 0; i < frees.count && r == 0; i++)
		r = delta_add(&ck->own, frees.v[i].start, frees.v[i].len, true);
	free(frees.v);
	return r ? r : defer(v, &ck->own);
}

/* In pieces: nobody shall wait for all of it. */
static int release_run(struct volume *v, uint64_t start, uint64_t len)
{
	uint64_t most = DISCARD_PIECE_BYTES >> v->shift;
	bool discard = v->opt.discard && blk_off(v, len) >= DISCARD_BYTES;
	int r = 0;

	/* Small holes are left to volume_trim(). */
	if (!discard)
		atomic_fetch_add(&v->trim_due, len);
	for (uint64_t n; len && r == 0; start += n, len -= n) {
		n = discard && len > most ? most : len;
		/* A host that can't punch keeps the blocks, no harm. */
		if (discard)
			space_discard(v, start, n);
		r = reserve_release(v, start, n);
		atomic_fetch_sub(&v->pending_blks, n);
	}
	return r;
}

/* Give freed runs to the host and back to the allocator. */
static int release(struct volume *v, struct deltas *l)
{
	size_t n = 0;
	int r = 0;

	pool_keep(v, l);
	for (size_t i = 0; i < l->count; i++)
		if (l->v[i].free && l->v[i].len)
			l->v[n++] = l->v[i];
	l->count = n;
	deltas_sort(l);
	for (size_t i = 0; i < l->count && r == 0; i++) {
		struct delta d = l->v[i];

		while (i + 1 < l->count && l->v[i + 1].start == d.start + d.len)
			d.len += l->v[++i].len;
		r = release_run(v, d.start, d.len);
	}
	if (r == 0)
		r = pool_lower(v);
	reserve_top_up(v);
	return r;
}

/* ---- the superblock --------------------------------------------------------------------- */

static void super_fill(struct checkpoint *ck, struct disk_super *s)
{
	struct volume *v = ck->v;
	uint64_t next_ino = atomic_load(&v->next_ino);

	s->gen = put64(ck->gen);
	s->salt = put64(ck->cut.salt);
	s->tail_unit = put64(ck->cut.unit);
	s->tail_seq = put64(ck->cut.seq);
	s->tail_prev = put64(ck->cut.prev);
	s->durable_seq = put64(ck->own_seq);
	s->next_ino = put64(next_ino <= INO_MAX ? next_ino : INO_MAX + 1);
	s->free_blks = put64(v->bitmap_free);
	s->inodes = put64(ck->inodes);
	s->aside = put64(ck->aside);
	s->written_ns = put64(now_ns());
	s->flags = put32(ck->clean ? SUPER_CLEAN : 0);
	for (unsigned t = 0; t < TABLES; t++) {
		struct tree *tr = &ck->frozen[t];

		s->root[t] = (struct disk_root){.ptr = ptr_put(&tr->root),
						.nodes = put64(tr->nodes),
						.items = put64(tr->items),
						.level = put32(tr->level)};
	}
}

static int write_super(struct checkpoint *ck)
{
	struct volume *v = ck->v;
	unsigned slot = !v->slot;
	struct disk_super s = v->super;
	int r;

	super_fill(ck, &s);
	super_seal(&s, slot);
	r = mmp_still_ours(v);
	if (r == 0)
		r = image_pwrite(v->im, &s, sizeof(s),
				 SUPER_SLOT_OFFSET(slot));
	if (r == 0)
		r = journal_flush(v);
	if (r)
		return r;
	rwlock_write(&v->commit);
	v->super = s;
	v->slot = slot;
	rwlock_unlock(&v->commit);
	return 0;
}

/* ---- the whole --------------------------------------------------------------------------- */

static int run(struct checkpoint *ck)
{
	struct volume *v = ck->v;
	uint64_t units;
	int r;

	/* 1. End the generation. A crash from here to step 5: replay from the
	 *    old superblock gives all that is durable, as if nothing had been. */
	r = journal_cut(v, freeze, ck, &ck->cut);
	/* 2. Nodes to the places they were given when they changed. */
	for (unsigned t = 0; t < TABLE_SPACE && r == 0; t++)
		r = write_nodes(ck, t);
	/*    And data that rode in the journal to its own. */
	if (r == 0)
		r = held_write(v, &ck->riding);
	/* 3. Bitmaps, and the table of them, to new places. */
	if (r == 0)
		r = write_space(ck);
	/* 4. What step 3 took and freed goes into the journal; one flush makes
	 *    that, all groups before, their data and steps 2 and 3 durable. */
	if (r == 0)
		r = journal_own_group(v, ck->gen, &ck->own, &ck->own_seq,
				      &ck->own_units);
	if (r == 0)
		r = journal_write(v, ck->own_seq, true);
	/* 5. The superblock. Torn: its checksum says so, and the other slot is
	 *    as good. Whole: replay starts from here. */
	if (r == 0)
		r = write_super(ck);
	if (r)
		return r;
	/* 6. Only now the journal before the cut may be written over and what
	 *    this generation freed be used. */
	atomic_store(&v->durable_gen, ck->gen);
	units = ck->cut.unit - v->tail_unit - v->own_units;
	v->tail_unit = ck->cut.unit;
	v->own_units = ck->own_units;
	ring_give(v, units * JOURNAL_UNIT);
	r = release(v, &ck->deltas);
	atomic_store(&v->pending_own, 0);
	for (size_t i = 0; i < ck->own.count; i++)
		if (ck->own.v[i].free)
			atomic_fetch_add(&v->pending_own, ck->own.v[i].len);
	atomic_fetch_add(&v->n_checkpoints, 1);
	return r;
}

int checkpoint_run(struct volume *v, bool clean)
{
	struct checkpoint ck = {.v = v, .clean = clean};
	uint64_t gen;
	int r = 0;

	rwlock_read(&v->commit);
	gen = v->gen;
	rwlock_unlock(&v->commit);
	lock_lock(&v->checkpoint);
	/* Somebody else's, begun after this call, serves as well. */
	if (atomic_load(&v->failed)) {
		r = -EROFS;
	} else if (clean || atomic_load(&v->durable_gen) < gen) {
		r = run(&ck);
		if (r)
			volume_fail(v, r, "writing a checkpoint");
	}
	/* What a failure has left unwritten is the volume's again. */
	rwlock_write(&v->commit);
	for (unsigned t = 0; t < TABLES; t++)
		tree_unwritten_locked(v, t, &ck.nodes[t]);
	held_join(&v->riding, &ck.riding);
	rwlock_unlock(&v->commit);
	lock_unlock(&v->checkpoint);
	free(ck.deltas.v);
	free(ck.node_frees.v);
	free(ck.changes.v);
	free(ck.own.v);
	return r;
}
