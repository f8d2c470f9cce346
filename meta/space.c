/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Free space on disk: one bitmap block for each 8 * block size blocks, and a
 * table of where the bitmaps stand.
 *
 * The bitmaps of a checkpoint are those of the checkpoint before, with what
 * transactions of this generation took and freed and with the nodes that it
 * wrote and replaced: never a picture of what the allocator holds at the
 * moment, where blocks are claimed that no transaction has named yet.
 *
 * The allocator asks for chunks when it first needs them. By then their bitmap
 * as last written is the truth for them: whatever is taken from or freed in a
 * chunk makes the allocator load it first. Only replay knows more than the
 * bitmaps while a volume is opened; its takes are merged in, its frees are
 * frees only after the checkpoint that ends it.
 */
#include "meta/meta_priv.h"

#include <stdio.h>
#include <stdlib.h>

uint64_t space_per_bitmap(const struct volume *v)
{
	return 8ull * v->block_bytes;
}

uint64_t space_bitmaps(const struct volume *v)
{
	uint64_t per = space_per_bitmap(v);

	return (v->blocks + per - 1) / per;
}

uint64_t space_absent_locked(const struct volume *v)
{
	uint64_t have = v->trees[TABLE_SPACE].items, all = space_bitmaps(v);

	return have < all ? all - have : 0;
}

/* ---- reading -------------------------------------------------------------------- */

static int space_lookup(struct volume *v, uint64_t index, struct disk_space *d)
{
	struct key k;
	size_t len;
	int r;

	key_space(&k, index);
	r = tree_lookup(v, TABLE_SPACE, k.b, k.len, d, sizeof(*d), &len);
	if (r == 0 && (len != sizeof(*d) || get64(d->block) >= v->blocks))
		return -EFSCORRUPTED;
	return r;
}

int space_read(struct volume *v, uint64_t index, void *bits, bool *exists)
{
	struct disk_space d, again;
	int r;

	for (;;) {
		r = space_lookup(v, index, &d);
		*exists = r == 0;
		if (r == -ENOENT) {
			memset(bits, 0, v->block_bytes);
			return 0;
		}
		if (r)
			return r;
		r = image_pread(v->im, bits, v->block_bytes,
				blk_off(v, get64(d.block)));
		if (r)
			return r;
		if (checksum(bits, v->block_bytes) == get64(d.csum))
			return 0;
		/* Damage, or a checkpoint has moved it meanwhile. */
		r = space_lookup(v, index, &again);
		if (r == 0 && get64(again.block) == get64(d.block) &&
		    get64(again.csum) == get64(d.csum)) {
			volume_message(v, "bitmap %llu at block %llu: checksum "
				       "does not match",
				       (unsigned long long)index,
				       (unsigned long long)get64(d.block));
			return -EFSBADCRC;
		}
	}
}

static void bits_set(uint8_t *bits, uint64_t from, uint64_t to)
{
	for (; from < to && (from & 7); from++)
		bits[from / 8] |= (uint8_t)(1u << (from & 7));
	if (from < to)
		memset(bits + from / 8, 0xff, (to - from) / 8);
	for (from += (to - from) / 8 * 8; from < to; from++)
		bits[from / 8] |= (uint8_t)(1u << (from & 7));
}

static void bits_clear(uint8_t *bits, uint64_t from, uint64_t to)
{
	for (; from < to; from++)
		bits[from / 8] &= (uint8_t)~(1u << (from & 7));
}

static uint64_t bits_count(const uint8_t *bits, uint64_t from, uint64_t to)
{
	uint64_t n = 0;

	for (; from < to && (from & 63); from++)
		n += bits[from / 8] >> (from & 7) & 1;
	for (; from + 64 <= to; from += 64) {
		uint64_t w;

		memcpy(&w, bits + from / 8, 8);
		n += (uint64_t)__builtin_popcountll(w);
	}
	for (; from < to; from++)
		n += bits[from / 8] >> (from & 7) & 1;
	return n;
}

/* The part of a run that lies in [from, to), relative to from. */
static bool run_clip(const struct delta *d, uint64_t from, uint64_t to,
		     uint64_t *a, uint64_t *b)
{
	uint64_t start = d->start > from ? d->start : from;
	uint64_t end = d->start + d->len < to ? d->start + d->len : to;

	*a = start - from;
	*b = end - from;
	return start < end;
}

int volume_bitmap(struct volume *v, uint64_t index, void *bits)
{
	uint64_t from = index * space_per_bitmap(v);
	uint64_t to = from + space_per_bitmap(v), a, b;
	bool exists;
	int r = space_read(v, index, bits, &exists);

	for (int frees = 0; frees < 2 && r == 0; frees++)
		for (size_t i = 0; i < v->deltas.count; i++) {
			const struct delta *d = &v->deltas.v[i];

			if (d->free != frees || !run_clip(d, from, to, &a, &b))
				continue;
			if (frees)
				bits_clear(bits, a, b);
			else
				bits_set(bits, a, b);
		}
	return r;
}

/* Give blocks that are ours, and free for all others, to the host. */
int space_discard(struct volume *v, uint64_t start, uint64_t len)
{
	int r = image_discard(v->im, blk_off(v, start), blk_off(v, len));

	held_forget_ensured(v);
	return r;
}

/* ---- for the allocator ------------------------------------------------------------ */

static int source_load(void *ctx, uint64_t chunk, void *bits)
{
	struct volume *v = ctx;
	uint64_t per = space_per_bitmap(v), from = chunk * ALLOC_CHUNK, a, b;
	uint8_t *block = malloc(v->block_bytes);
	bool exists;
	int r;

	if (!block)
		return -ENOMEM;
	r = space_read(v, from / per, block, &exists);
	if (r == 0) {
		memcpy(bits, block + from % per / 8, ALLOC_CHUNK_BYTES);
		for (size_t i = 0; i < v->merging.count; i++)
			if (!v->merging.v[i].free &&
			    run_clip(&v->merging.v[i], from, from + ALLOC_CHUNK,
				     &a, &b))
				bits_set(bits, a, b);
	}
	free(block);
	return r;
}

static int first_index(void *ctx, const uint8_t *key, size_t klen,
		       const uint8_t *val, size_t vlen)
{
	(void)val;
	(void)vlen;
	if (klen != 8)
		return -EFSCORRUPTED;
	*(uint64_t *)ctx = be64_get(key);
	return 1;
}

static int source_describe(void *ctx, uint64_t chunk, uint64_t *count,
			   uint32_t *free_units)
{
	struct volume *v = ctx;
	uint64_t per = space_per_bitmap(v), from = chunk * ALLOC_CHUNK;
	uint64_t index = from / per, next = UINT64_MAX, end, units;
	struct key lo, hi = {.len = 9};
	uint8_t *bits;
	int r;

	memset(hi.b, 0xff, 9);
	key_space(&lo, index);
	r = tree_range(v, TABLE_SPACE, &lo, &hi, first_index, &next);
	if (r < 0)
		return r;
	/* Wholly free to the next bitmap, the next take, the last whole chunk. */
	end = next == UINT64_MAX ? v->blocks : next * per;
	for (size_t i = 0; i < v->merging.count; i++) {
		struct delta *d = &v->merging.v[i];

		if (!d->free && d->start + d->len > from && d->start < end)
			end = d->start > from ? d->start : from;
	}
	if (end > v->blocks)
		end = v->blocks;
	if (end >= from + ALLOC_CHUNK) {
		*count = (end - from) / ALLOC_CHUNK;
		*free_units = ALLOC_CHUNK;
		return 0;
	}
	bits = malloc(ALLOC_CHUNK_BYTES);
	if (!bits)
		return -ENOMEM;
	r = source_load(v, chunk, bits);
	units = v->blocks - from < ALLOC_CHUNK ? v->blocks - from : ALLOC_CHUNK;
	*count = 1;
	*free_units = (uint32_t)(units - bits_count(bits, 0, units));
	free(bits);
	return r;
}

int space_open(struct volume *v)
{
	struct alloc_config cfg = {.units = v->blocks,
				   .unit_bytes = v->block_bytes,
				   .policy = v->opt.policy,
				   .shards = v->opt.shards};
	struct alloc_source source = {v, source_load, source_describe};
	uint64_t taken = 0;
	int r = 0;

	v->merging = v->deltas;
	v->merging.v = malloc((v->deltas.count + 1) * sizeof(*v->deltas.v));
	if (!v->merging.v)
		return -ENOMEM;
	if (v->deltas.count)
		memcpy(v->merging.v, v->deltas.v,
		       v->deltas.count * sizeof(*v->deltas.v));
	for (size_t i = 0; i < v->merging.count; i++)
		if (!v->merging.v[i].free)
			taken += v->merging.v[i].len;
	v->bitmap_free = get64(v->super.free_blks);
	if (taken > v->bitmap_free)
		return -EFSCORRUPTED;
	r = alloc_open(&cfg, &source, v->bitmap_free - taken, &v->alloc);
	atomic_store(&v->free_blks, v->bitmap_free - taken);
	for (size_t i = 0; i < v->merging.count && r == 0; i++) {
		struct delta *d = &v->merging.v[i];

		if (!d->free)
			continue;
		r = alloc_defer(v->alloc, d->start, d->len);
		blocks_pend(v, d->len);
		if (r == -EINVAL) {
			volume_message(v, "journal: blocks %llu+%llu are freed "
				       "but not in use",
				       (unsigned long long)d->start,
				       (unsigned long long)d->len);
			r = -EFSCORRUPTED;
		}
	}
	return r;
}

/* ---- writing ------------------------------------------------------------------------ */

/* Change one bitmap. A block taken twice or freed twice is damage. */
static int bits_change(struct volume *v, uint8_t *bits, uint64_t index,
		       const struct delta *d, size_t count)
{
	uint64_t from = index * space_per_bitmap(v);
	uint64_t to = from + space_per_bitmap(v), a, b;

	for (int frees = 0; frees < 2; frees++)
		for (size_t i = 0; i < count; i++) {
			if (d[i].free != frees ||
			    !run_clip(&d[i], from, to, &a, &b))
				continue;
			if (bits_count(bits, a, b) != (frees ? b - a : 0)) {
				volume_message(
					v, "bitmap %llu: blocks %llu+%llu are %s",
					(unsigned long long)index,
					(unsigned long long)(from + a),
					(unsigned long long)(b - a),
					frees ? "freed but not in use"
					      : "taken but in use");
				return -EFSCORRUPTED;
			}
			if (frees)
				bits_clear(bits, a, b);
			else
				bits_set(bits, a, b);
			if (frees)
				v->bitmap_free += b - a;
			else
				v->bitmap_free -= b - a;
		}
	return 0;
}

/* Change an item of TABLE_SPACE, which has no journal. */
static int space_item(struct volume *v, uint64_t index, const struct disk_space *d)
{
	struct {
		struct disk_jitem h;
		uint8_t bytes[8 + sizeof(*d)];
	} ji = {.h = {.type = d ? JITEM_PUT : JITEM_DEL,
		      .table = TABLE_SPACE,
		      .klen = put16(8),
		      .vlen = put16(d ? sizeof(*d) : 0)}};
	int r;

	be64_put(ji.bytes, index);
	if (d)
		memcpy(ji.bytes + 8, d, sizeof(*d));
	r = commit_lock_prepared(v, &ji, 1, SPEND_CHECKPOINT);
	if (r)
		return r;
	items_apply_locked(v, &ji.h, 1);
	rwlock_unlock(&v->commit);
	return 0;
}

static int space_write_one(struct volume *v, uint64_t index, uint8_t *bits,
			   const struct delta *d, size_t count,
			   struct deltas *own)
{
	uint64_t from = index * space_per_bitmap(v), units, used, block;
	struct disk_space old, now = {0};
	bool exists;
	int r = space_read(v, index, bits, &exists);

	if (r == 0)
		r = bits_change(v, bits, index, d, count);
	if (r)
		return r;
	if (exists) {
		r = space_lookup(v, index, &old);
		if (r == 0)
			r = delta_add(own, get64(old.block), 1, true);
		if (r)
			return r;
		blocks_pend(v, 1);
	}
	units = v->blocks - from < space_per_bitmap(v) ? v->blocks - from
						       : space_per_bitmap(v);
	used = bits_count(bits, 0, units);
	if (used == 0)
		return exists ? space_item(v, index, NULL) : 0;
	r = pool_take(v, &block);
	if (r)
		return r;
	r = delta_add(own, block, 1, false);
	if (r == 0)
		r = image_pwrite(v->im, bits, v->block_bytes, blk_off(v, block));
	now.block = put64(block);
	now.csum = put64(checksum(bits, v->block_bytes));
	now.birth = put64(v->trees[TABLE_SPACE].gen);
	now.free = put32((uint32_t)(units - used));
	return r ? r : space_item(v, index, &now);
}

int space_write(struct volume *v, const struct deltas *changes, struct deltas *own)
{
	uint64_t per = space_per_bitmap(v);
	uint8_t *bits = malloc(v->block_bytes);
	size_t i = 0;
	int r = bits ? 0 : -ENOMEM;
	uint64_t index = 0;

	while (r == 0 && i < changes->count) {
		size_t n = i;
		const struct delta *d = &changes->v[i];

		if (d->start / per > index)
			index = d->start / per;
		while (n < changes->count &&
		       changes->v[n].start < (index + 1) * per)
			n++;
		r = space_write_one(v, index, bits, d, n - i, own);
		/* A run may reach into the bitmaps behind. */
		index++;
		while (i < n && changes->v[i].start + changes->v[i].len <= index * per)
			i++;
	}
	free(bits);
	return r;
}
