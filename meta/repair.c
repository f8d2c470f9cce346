/* SPDX-License-Identifier: BSD-2-Clause */
/* For fsck: items as they are, and bitmaps put right while a volume opens. */
#include "meta/meta_priv.h"
#include "meta/repair.h"

#include <string.h>

static int key_copy(struct key *k, const void *key, size_t klen)
{
	if (klen > KEY_MAX)
		return -EINVAL;
	memcpy(k->b, key, klen);
	k->len = (uint16_t)klen;
	return 0;
}

int repair_put(struct txn *t, enum table table, const void *key, size_t klen,
	       const void *val, size_t vlen)
{
	struct key k;
	int r = vlen > VALUE_MAX ? -EINVAL : key_copy(&k, key, klen);

	return r ? r : txn_put(t, table, &k, val, vlen);
}

int repair_del(struct txn *t, enum table table, const void *key, size_t klen)
{
	struct key k;
	int r = key_copy(&k, key, klen);

	return r ? r : txn_del(t, table, &k);
}

int repair_get(struct volume *v, enum table table, const void *key, size_t klen,
	       void *val, size_t cap, size_t *vlen)
{
	return tree_lookup(v, table, key, klen, val, cap, vlen);
}

/* What the journal frees of a run that has an owner is not freed. */
static int keep_used(struct deltas *d, const struct extent *e)
{
	uint64_t end = e->start + e->len;
	int r = 0;

	for (size_t i = 0; i < d->count && r == 0; i++) {
		struct delta f = d->v[i];

		if (!f.free || f.start >= end || f.start + f.len <= e->start)
			continue;
		memmove(&d->v[i], &d->v[i + 1], (--d->count - i) * sizeof(f));
		i--;
		if (f.start < e->start)
			r = delta_add(d, f.start, e->start - f.start, true);
		if (r == 0 && f.start + f.len > end)
			r = delta_add(d, end, f.start + f.len - end, true);
	}
	return r;
}

int repair_bitmaps(struct volume *v)
{
	const struct volume_repair *rep = v->opt.repair;
	struct tree *tr = &v->trees[TABLE_SPACE];
	int r = 0;

	if (!rep || !rep->bitmaps_anew) {
		for (size_t i = 0; rep && i < rep->claims && r == 0; i++)
			r = keep_used(&v->deltas, &rep->claim[i]);
		return r;
	}
	tr->root = (struct ptr){0};
	tr->level = 0;
	tr->nodes = tr->items = 0;
	/* What the journal took is owned, or else not in use. */
	v->deltas.count = 0;
	v->super.free_blks = put64(v->blocks);
	return 0;
}

/* Where a lost neighbour that is kept is in the way, not yet. */
static int put_known(struct volume *v, const struct lost_node *lost)
{
	const struct disk_jitem *ji = lost->items;
	int r = 0;

	for (unsigned i = 0; i < lost->item_count && r == 0; i++, ji = item_next(ji)) {
		r = items_apply(v, ji, 1);
		if (r == -EFSBADCRC || r == -EFSCORRUPTED)
			r = 0;
	}
	return r;
}

int repair_nodes(struct volume *v)
{
	const struct volume_repair *rep = v->opt.repair;
	int r = 0;

	for (unsigned t = 0; rep && t < TABLES && r == 0; t++)
		r = tree_mend(v, t);
	for (size_t i = 0; rep && i < rep->losts && r == 0; i++)
		r = put_known(v, &rep->lost[i]);
	return r;
}

int repair_node_verify(const struct disk_node *d, size_t block_bytes,
		       uint64_t block)
{
	struct ptr self = ptr_get(&d->self);

	self.block = block;
	return node_verify(d, block_bytes, d->table, d->level, &self, NULL);
}

static int claim(struct volume *v, uint64_t start, uint64_t len)
{
	int r = alloc_exact(v->alloc, start, len);

	if (r == 0)
		r = delta_add(&v->deltas, start, len, false);
	if (r == 0)
		atomic_fetch_sub(&v->free_blks, len);
	return r;
}

/* Some of it is in use: that is what has just not been freed. */
static int claim_rest(struct volume *v, const struct extent *e)
{
	int r = 0;

	for (uint64_t b = e->start; b < e->start + e->len && r == 0; b++) {
		r = claim(v, b, 1);
		if (r == -EBUSY)
			r = 0;
	}
	return r;
}

int repair_space(struct volume *v)
{
	const struct volume_repair *rep = v->opt.repair;
	int r = 0;

	for (size_t i = 0; rep && i < rep->claims && r == 0; i++) {
		r = claim(v, rep->claim[i].start, rep->claim[i].len);
		if (r == -EBUSY)
			r = claim_rest(v, &rep->claim[i]);
	}
	for (size_t i = 0; rep && i < rep->releases && r == 0; i++) {
		r = alloc_defer(v->alloc, rep->release[i].start,
				rep->release[i].len);
		if (r == 0)
			r = delta_add(&v->deltas, rep->release[i].start,
				      rep->release[i].len, true);
		if (r == 0)
			blocks_pend(v, rep->release[i].len);
	}
	return r;
}
