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

int repair_space(struct volume *v)
{
	const struct volume_repair *rep = v->opt.repair;
	int r = 0;

	for (size_t i = 0; rep && i < rep->claims && r == 0; i++) {
		r = alloc_exact(v->alloc, rep->claim[i].start, rep->claim[i].len);
		if (r == 0)
			r = delta_add(&v->deltas, rep->claim[i].start,
				      rep->claim[i].len, false);
	}
	for (size_t i = 0; rep && i < rep->releases && r == 0; i++) {
		r = alloc_defer(v->alloc, rep->release[i].start,
				rep->release[i].len);
		if (r == 0)
			r = delta_add(&v->deltas, rep->release[i].start,
				      rep->release[i].len, true);
		if (r == 0)
			atomic_fetch_add(&v->pending_blks, rep->release[i].len);
	}
	return r;
}
