/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Pass 8: space. The bitmaps as they stand in the image are whole and counted
 * right; and as they are after replay they hold exactly the blocks that have an
 * owner: files, nodes, the bitmaps themselves, and what is fixed.
 */
#include "tools/fsck.h"

#include <stdlib.h>
#include <string.h>

static uint64_t units_of(const struct fsck *f, uint64_t index)
{
	uint64_t left = f->blocks - index * f->per_bitmap;

	return left < f->per_bitmap ? left : f->per_bitmap;
}

/* Bits set among the first n. */
static uint64_t bits_set(const uint8_t *bits, uint64_t n)
{
	uint64_t count = 0, i;

	for (i = 0; i + 64 <= n; i += 64) {
		uint64_t w;

		memcpy(&w, bits + i / 8, 8);
		count += (uint64_t)__builtin_popcountll(w);
	}
	for (; i < n; i++)
		count += bits[i / 8] >> (i % 8) & 1;
	return count;
}

/* ---- the bitmaps as they stand in the image ------------------------------------ */

static uint8_t *raw;			/* one block */
static uint64_t raw_used;		/* in all of them */

static int bitmaps_anew(struct fsck *f, enum problem_id id, bool yes)
{
	struct repair r = {.kind = REPAIR_BITMAPS, .id = id};

	return yes ? repair_later(f, &r) : 0;
}

static int check_raw(struct fsck *f, uint64_t index, const struct disk_space *d)
{
	uint64_t block = get64(d->block), units = units_of(f, index), used;
	size_t size = (size_t)1 << f->shift;
	int ret = image_pread(f->im, raw, size, block << f->shift);

	if (ret)	/* not all of them for one failure */
		ret = image_pread(f->im, raw, size, block << f->shift);
	if (ret || checksum(raw, size) != get64(d->csum)) {
		enum problem_id id = ret ? P_SPACE_READ : P_SPACE_CSUM;

		f->bitmaps_lost = true;
		return bitmaps_anew(f, id, PROBLEM(id, .is = index, .blk = block,
						   .what = strerror(-ret)));
	}
	used = bits_set(raw, units);
	raw_used += used;
	if (get32(d->free) == units - used)
		return 0;
	return bitmaps_anew(f, P_SPACE_FREE,
			    PROBLEM(P_SPACE_FREE, .blk = index,
				    .is = get32(d->free), .want = units - used));
}

static int space_item(struct fsck *f, const uint8_t *key, size_t klen,
		      const uint8_t *val, size_t vlen)
{
	uint64_t index = klen == 8 ? be64_get(key) : 0;
	struct disk_space d;
	int ret;

	if (klen != 8 || index > (f->blocks - 1) / f->per_bitmap) {
		return bitmaps_anew(f, P_KEY_FORM,
				    PROBLEM(P_KEY_FORM,
					    .name = table_name(TABLE_SPACE),
					    .ino = index,
					    .what = klen == 8 ?
							    "beyond the volume" :
							    "its length"));
	}
	if (vlen != sizeof(d)) {
		f->bitmaps_lost = true;
		return bitmaps_anew(f, P_VALUE_FORM,
				    PROBLEM(P_VALUE_FORM,
					    .name = table_name(TABLE_SPACE),
					    .ino = index,
					    .what = "a bitmap's place"));
	}
	memcpy(&d, val, sizeof(d));
	f->there[index / 8] |= (uint8_t)(1u << (index % 8));
	if (!fsck_in_volume(f, get64(d.block), 1)) {
		f->bitmaps_lost = true;
		return bitmaps_anew(f, P_SPACE_PLACE,
				    PROBLEM(P_SPACE_PLACE, .is = index,
					    .blk = get64(d.block)));
	}
	ret = fsck_own(f, 0, get64(d.block), 1);
	return ret ? ret : check_raw(f, index, &d);
}

static int own_fixed(struct fsck *f)
{
	int ret = 0;

	for (unsigned i = 0; !ret && i < f->fixeds; i++)
		ret = fsck_own(f, 0, f->fixed[i].start, f->fixed[i].len);
	return ret;
}

/* ---- bitmaps after replay against owners ------------------------------------------ */

/* A run of blocks that are wrong alike. */
struct wrong {
	struct fsck *f;
	enum problem_id id;
	uint64_t start, len;
};

static void wrong_end(struct wrong *w)
{
	struct repair r = {.kind = REPAIR_SPACE,
			   .id = w->id,
			   .a = w->start,
			   .b = w->len};

	if (w->len &&
	    PROBLEM(w->id, .blk = w->start, .len = w->len))
		(void)repair_later(w->f, &r);
	w->len = 0;
}

static void wrong_block(struct wrong *w, uint64_t blk, bool used)
{
	enum problem_id id = used ? P_USED_UNOWNED : P_OWNED_FREE;

	if (w->len && w->id == id && w->start + w->len == blk) {
		w->len++;
		return;
	}
	wrong_end(w);
	w->id = id;
	w->start = blk;
	w->len = 1;
}

static void compare_page(struct fsck *f, struct wrong *w, uint64_t page,
			 const uint8_t *bits, uint64_t units)
{
	static const uint8_t none[BLOCKS_PAGE / 8];
	const uint8_t *owned = blocks_page(&f->owned, page);

	if (!owned)
		owned = none;
	for (uint64_t i = 0; i < units; i += 8) {
		unsigned diff = bits[i / 8] ^ owned[i / 8];

		for (unsigned b = 0; diff && b < 8 && i + b < units; b++)
			if (diff >> b & 1)
				wrong_block(w, page * BLOCKS_PAGE + i + b,
					    bits[i / 8] >> b & 1);
	}
}

uint64_t fsck_bitmaps(const struct fsck *f)
{
	return (f->blocks + f->per_bitmap - 1) / f->per_bitmap;
}

/* The first bitmap from `index` on that there is. */
static uint64_t next_there(const struct fsck *f, uint64_t index, uint64_t count)
{
	while (index < count && !(f->there[index / 8] >> (index % 8) & 1))
		index = f->there[index / 8] >> (index % 8) ? index + 1 :
							     (index / 8 + 1) * 8;
	return index < count ? index : count;
}

uint64_t fsck_next_used(const struct fsck *f, uint64_t chunk)
{
	uint64_t per = f->per_bitmap / BLOCKS_PAGE, count = f->owned.pages;
	uint64_t owned = blocks_next(&f->owned, chunk);
	uint64_t there = next_there(f, chunk / per, fsck_bitmaps(f)) * per;

	if (there < chunk)
		there = chunk;
	return owned < there ? owned : there < count ? there : count;
}

uint64_t fsck_next_bitmap(const struct fsck *f, uint64_t index)
{
	uint64_t per = f->per_bitmap / BLOCKS_PAGE;
	uint64_t chunk = fsck_next_used(f, index * per);

	/* the last bitmap may cover fewer chunks than the others */
	return chunk < f->owned.pages ? chunk / per : fsck_bitmaps(f);
}

static int compare(struct fsck *f)
{
	uint64_t count = fsck_bitmaps(f);
	uint8_t *bits = malloc((size_t)1 << f->shift);
	uint64_t per = f->per_bitmap / BLOCKS_PAGE;
	struct wrong w = {.f = f};
	int ret = bits ? 0 : -ENOMEM;

	f->free_blks = f->blocks;
	for (uint64_t i = 0; !ret && i < count; i = fsck_next_bitmap(f, i + 1)) {
		uint64_t units = units_of(f, i), first = i * per;

		ret = volume_bitmap(f->v, i, bits);
		for (uint64_t u = 0; !ret && u < units; u += BLOCKS_PAGE) {
			uint64_t n = units - u < BLOCKS_PAGE ? units - u :
							       BLOCKS_PAGE;
			const uint8_t *part = bits + u / 8;
			uint64_t used = bits_set(part, n);

			f->chunk_used[first + u / BLOCKS_PAGE] = (uint32_t)used;
			f->free_blks -= used;
			if (!f->incomplete)
				compare_page(f, &w, first + u / BLOCKS_PAGE,
					     part, n);
		}
		if (i % 64 == 0)
			cli_progress("bitmaps", i, count);
	}
	wrong_end(&w);
	cli_progress_end();
	free(bits);
	if (ret == -EUCLEAN || ret == -EBADMSG) {
		PROBLEM(P_BITMAPS, .what = cli_error(ret));
		f->bitmaps_lost = true;
		ret = 0;
	}
	return ret;
}

/* ---- counts ------------------------------------------------------------------------ */

static int count_wrong(struct fsck *f, enum problem_id id, uint64_t field,
		       const char *name, uint64_t is, uint64_t want)
{
	struct repair r = {.kind = REPAIR_SUPER, .id = id, .a = field, .b = want};

	if (is == want)
		return 0;
	if (PROBLEM(id, .is = is, .want = want, .name = name))
		return repair_later(f, &r);
	return 0;
}

/* The superblock's counts are of its checkpoint: replay may have moved on. */
static int check_counts(struct fsck *f)
{
	const struct disk_super *s = &f->super;
	int ret = 0;

	if (f->lost[TABLE_SPACE])
		f->bitmaps_lost = true;
	if (!f->bitmaps_lost)
		ret = count_wrong(f, P_SUPER_FREE, SUPER_FREE, NULL,
				  get64(s->free_blks), f->blocks - raw_used);
	if (f->changes || f->incomplete)
		return ret;
	if (!ret)
		ret = count_wrong(f, P_SUPER_INODES, SUPER_INODES, NULL,
				  get64(s->inodes), f->inode_count);
	if (!ret)
		ret = count_wrong(f, P_SUPER_ASIDE, SUPER_ASIDE, NULL,
				  get64(s->aside), f->aside_blks);
	for (unsigned t = 0; !ret && t < TABLES; t++) {
		ret = count_wrong(f, P_ROOT_NODES, SUPER_NODES + t, table_name(t),
				  get64(s->root[t].nodes), f->nodes[t]);
		if (!ret)
			ret = count_wrong(f, P_ROOT_ITEMS, SUPER_ITEMS + t,
					  table_name(t), get64(s->root[t].items),
					  f->items[t]);
	}
	return ret;
}

int pass8(struct fsck *f)
{
	uint64_t chunks = (f->blocks + ALLOC_CHUNK - 1) / ALLOC_CHUNK;
	int ret;

	raw = malloc((size_t)1 << f->shift);
	f->chunk_used = calloc(chunks, sizeof(*f->chunk_used));
	ret = raw && f->chunk_used ? 0 : -ENOMEM;
	raw_used = 0;
	if (!ret)
		ret = own_fixed(f);
	if (!ret)
		ret = fsck_walk(f, TABLE_SPACE, space_item);
	free(raw);
	if (!ret)
		ret = check_counts(f);
	if (!ret && !f->bitmaps_lost)
		ret = compare(f);
	return ret;
}
