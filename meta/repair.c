/* SPDX-License-Identifier: BSD-2-Clause */
/* For fsck: items as they are, and bitmaps put right while a volume opens. */
#include "meta/meta_priv.h"
#include "meta/repair.h"

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

void repair_bitmaps(struct volume *v)
{
	struct tree *tr = &v->trees[TABLE_SPACE];

	if (!v->opt.repair || !v->opt.repair->bitmaps_anew)
		return;
	tr->root = (struct ptr){0};
	tr->level = 0;
	tr->nodes = tr->items = 0;
	/* What the journal took is owned, or else not in use. */
	v->deltas.count = 0;
	v->super.free_blks = put64(v->blocks);
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

int repair_space(struct volume *v)
{
	const struct volume_repair *rep = v->opt.repair;
	int r = 0;

	for (size_t i = 0; rep && i < rep->claims && r == 0; i++) {
		r = alloc_exact(v->alloc, rep->claim[i].start, rep->claim[i].len);
		if (r == 0)
			r = delta_add(&v->deltas, rep->claim[i].start,
				      rep->claim[i].len, false);
		if (r == 0)
			atomic_fetch_sub(&v->free_blks, rep->claim[i].len);
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
