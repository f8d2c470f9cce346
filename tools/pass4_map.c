/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Pass 4, extent maps: runs in order and within the volume, a checksum for each
 * written block, the count of blocks; with -c the data themselves.
 *
 * What a map no longer tells must not read as a hole. Where a run makes no
 * sense, and where a node was lost that may have held runs of this file, the
 * blocks are marked as lost: reading them fails. The latter only in a file
 * that lacks blocks, by its own count, or had lost runs there before.
 */
#include "tools/fsck.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static int verify_data(struct fsck *f, struct cur *c, uint64_t blk,
		       uint64_t start, uint32_t len, const uint8_t *sums)
{
	static uint8_t *buf;
	size_t size = (size_t)1 << f->shift;

	if (!buf) {
		buf = malloc((size_t)MAP_MAX << BLOCK_SHIFT_MAX);
		if (!buf)
			return -ENOMEM;
	}
	/* one read for the run; where it fails, block by block */
	if (volume_blocks(f->v, start, len, buf)) {
		for (uint32_t i = 0; i < len; i++) {
			int ret = volume_blocks(f->v, start + i, 1,
						buf + size * i);

			if (ret)
				PROBLEM(P_DATA_READ, .ino = c->ino,
					.is = blk + i, .blk = start + i,
					.what = strerror(-ret));
		}
	}
	for (uint32_t i = 0; i < len; i++) {
		le64 sum;

		memcpy(&sum, sums + i * sizeof(sum), sizeof(sum));
		if (checksum(buf + size * i, size) != get64(sum))
			PROBLEM(P_DATA_BAD, .ino = c->ino, .is = blk + i,
				.blk = start + i);
	}
	f->data_blks += len;
	return 0;
}

/* Where a file ends, in blocks. */
static uint64_t file_end(const struct fsck *f, const struct cur *c)
{
	return (c->a.size >> f->shift) +
	       ((c->a.size & ((1ull << f->shift) - 1)) != 0);
}

/* Nothing beyond its end is written, but what an intent is about to unmap. */
static int check_beyond(struct fsck *f, struct cur *c, uint64_t blk, uint64_t len)
{
	uint64_t end = file_end(f, c);
	struct repair r = {.kind = REPAIR_CUT,
			   .id = P_MAP_BEYOND,
			   .ino = c->ino,
			   .a = end};

	if (blk + len <= end || c->beyond || !c->seen)
		return 0;
	if (c->intent && c->intent->from <= (blk > end ? blk : end) &&
	    c->intent->to >= blk + len)
		return 0;
	c->beyond = true;
	if (PROBLEM(P_MAP_BEYOND, .ino = c->ino, .is = blk > end ? blk : end))
		return repair_later(f, &r);
	return 0;
}

const char *run_wrong(const struct disk_map *m, size_t vlen)
{
	uint32_t flags = get32(m->flags);
	uint64_t len = map_len(m);

	if (flags & ~(MAP_UNWRITTEN | MAP_LOST) ||
	    flags == (MAP_UNWRITTEN | MAP_LOST))
		return "unknown flags";
	if (!len)
		return "it is empty";
	if (len > (!flags ? MAP_MAX : flags & MAP_LOST ? UINT64_MAX : MAP_BARE_MAX))
		return "it is too long";
	if (vlen != sizeof(*m) + (flags ? 0 : len * sizeof(le64)))
		return "its checksums are not as many as its blocks";
	if (flags & MAP_LOST && get64(m->start) > UINT32_MAX)
		return "it is longer than any file";
	return NULL;
}

/* ---- what is lost ------------------------------------------------------------- */

/* [from, to) is a hole: or was there something that went with a node? */
static int hole(struct fsck *f, struct cur *c, uint64_t from, uint64_t to)
{
	bool bad = c->bad;
	int ret = 0;

	c->bad = false;
	if (bad)
		return c->bad_blk < to ? runs_add(&c->bad_runs, c->bad_blk,
						  to - c->bad_blk) : 0;
	if (from >= to)
		return 0;
	for (size_t i = 0; !ret && i < f->gap_count; i++) {
		uint64_t lo, hi;

		if (!gap_blocks(&f->gaps[i], c->ino, &lo, &hi))
			continue;
		lo = lo > from ? lo : from;
		hi = hi < to ? hi : to;
		/* what stands in one leaf has lost nothing in between */
		if (lo < hi)
			ret = runs_add(f->new_leaf ? &c->gap_runs : &c->unlikely_runs,
				       lo, hi - lo);
	}
	return ret;
}

bool map_end_lost(struct fsck *f, struct cur *c)
{
	size_t before = c->gap_runs.count;

	return c->map_end < UINT64_MAX >> f->shift >> 1 &&
	       !hole(f, c, c->map_end, c->map_end + 1) &&
	       c->gap_runs.count > before;
}

static int mark_lost(struct fsck *f, struct cur *c, enum problem_id id,
		     const struct extent *e)
{
	struct repair r = {.kind = REPAIR_LOST_RUN,
			   .id = id,
			   .ino = c->ino,
			   .a = e->start,
			   .b = e->start + e->len};

	return repair_later(f, &r);
}

/* With the runs, the inode is told that it has some. */
static int mark_inode(struct fsck *f, struct cur *c)
{
	struct {
		uint8_t key[9];
		struct disk_inode d;
	} __attribute__((packed)) item;
	struct repair r = {.kind = REPAIR_ITEM_PUT,
			   .id = P_MAP_LOST,
			   .a = TABLE_FILES,
			   .b = sizeof(item.key),
			   .name = (char *)&item,
			   .name_len = sizeof(item)};

	memset(&item, 0, sizeof(item));
	c->a.flags |= INODE_LOST;
	c->a.blks = c->blks;
	be64_put(item.key, c->ino);
	item.key[8] = KEY_INODE;
	attr_encode(&c->a, &item.d);
	return repair_later(f, &r);
}

int map_lost(struct fsck *f, struct cur *c)
{
	bool lacks = !c->seen || c->a.blks != c->blks || c->a.flags & INODE_LOST;
	int ret = c->seen ? hole(f, c, c->map_end, file_end(f, c)) : 0;
	struct runs *gaps = &c->gap_runs;
	bool marked = c->bad_runs.count;

	/* Blocks are missing; what was lost was put back in part, so that
	 * neighbours now were none. */
	if (!gaps->count && c->seen && c->a.blks > c->blks)
		gaps = &c->unlikely_runs;
	runs_sort(gaps);
	for (size_t i = 0; !ret && i < c->bad_runs.count; i++)
		ret = mark_lost(f, c, P_MAP_RUN, &c->bad_runs.v[i]);
	for (size_t i = 0; !ret && lacks && i < gaps->count; i++) {
		const struct extent *e = &gaps->v[i];

		if (!PROBLEM(P_MAP_LOST, .ino = c->ino, .is = e->start,
			     .want = e->start + e->len - 1))
			continue;
		marked = true;
		ret = mark_lost(f, c, P_MAP_LOST, e);
	}
	if (!ret && marked && c->seen)
		ret = mark_inode(f, c);
	return ret;
}

#define NOT_KNOWN UINT64_MAX

/*
 * A run that makes no sense goes, and what it alone held, from `from` on, is
 * lost: to where it ended or, if that is not known, all up to the next one.
 */
static int run_away(struct fsck *f, struct cur *c, enum problem_id id,
		    uint64_t from, uint64_t to, const struct finding *what)
{
	struct repair r = {.kind = REPAIR_ITEM_REMOVE,
			   .id = id,
			   .a = TABLE_FILES,
			   .name = (char *)f->key,
			   .name_len = (uint16_t)f->klen};

	if (!problem(id, what))
		return 0;
	if (to == NOT_KNOWN) {
		c->bad = true;
		c->bad_blk = from;
	} else if (to > from && runs_add(&c->bad_runs, from, to - from)) {
		return -ENOMEM;
	}
	return repair_later(f, &r);
}

#define RUN_AWAY(id, to, ...)                                                  \
	run_away(f, c, id, from, to,                                           \
		 &(struct finding){.ino = c->ino, .is = blk, __VA_ARGS__})

/* It is from a generation that is still to come: the newest there is, then. */
static int run_birth(struct fsck *f, struct cur *c, uint64_t blk,
		     const struct disk_map *m, const uint8_t *val, size_t vlen)
{
	uint8_t item[KEY_MAX + VALUE_MAX];
	struct disk_map now = *m;
	struct repair r = {.kind = REPAIR_ITEM_PUT,
			   .id = P_MAP_BIRTH,
			   .a = TABLE_FILES,
			   .b = f->klen,
			   .name = (char *)item,
			   .name_len = (uint16_t)(f->klen + vlen)};

	/* what replay made is of the generation that the next checkpoint ends */
	if (get64(m->birth) <= get64(f->super.gen) + 1 ||
	    !PROBLEM(P_MAP_BIRTH, .ino = c->ino, .is = blk, .want = get64(m->birth)))
		return 0;
	now.birth = f->super.gen;
	memcpy(item, f->key, f->klen);
	memcpy(item + f->klen, val, vlen);
	memcpy(item + f->klen, &now, sizeof(now));
	return repair_later(f, &r);
}

int map_item(struct fsck *f, struct cur *c, uint64_t blk, const uint8_t *val,
	     size_t vlen)
{
	struct disk_map m;
	const char *why;
	uint64_t start, len, end, from = blk > c->map_end ? blk : c->map_end, lost;
	int ret = hole(f, c, c->map_end, blk);

	if (ret)
		return ret;
	if (vlen < sizeof(m)) {
		return RUN_AWAY(P_VALUE_FORM, NOT_KNOWN,
				.name = table_name(TABLE_FILES),
				.what = "a run of a map");
	}
	memcpy(&m, val, sizeof(m));
	start = get64(m.start);
	len = map_len(&m);
	why = run_wrong(&m, vlen);
	if (!why && blk > UINT64_MAX - len)
		why = "it ends beyond all files";
	if (why)
		return RUN_AWAY(P_MAP_RUN, NOT_KNOWN, .what = why);
	end = blk + len;
	/* what was never written is no loss */
	lost = get32(m.flags) & MAP_UNWRITTEN ? from : end;
	if (blk < c->map_end) {
		ret = RUN_AWAY(P_MAP_ORDER, lost);
		f->keep_blocks = true;	/* cutting such a map is a guess */
	}
	if (end > c->map_end)
		c->map_end = end;
	if (!(get32(m.flags) & MAP_UNWRITTEN))
		c->written_end = c->map_end;
	if (!ret && get32(m.flags) & MAP_LOST)
		return check_beyond(f, c, blk, len);
	c->blks += len;
	if (!ret && !fsck_in_volume(f, start, len))
		return RUN_AWAY(P_MAP_PLACE, lost, .blk = start, .len = len);
	if (!ret)
		ret = run_birth(f, c, blk, &m, val, vlen);
	if (!ret)
		ret = fsck_own(f, c->ino, start, len);
	if (ret || get32(m.flags) & MAP_UNWRITTEN)
		return ret;
	ret = check_beyond(f, c, blk, len);
	if (!ret && f->data)
		ret = verify_data(f, c, blk, start, len, val + sizeof(m));
	return ret;
}

int map_end(struct fsck *f, struct cur *c)
{
	struct repair r = {.kind = REPAIR_ATTR,
			   .id = P_INODE_BLKS,
			   .ino = c->ino,
			   .a = FIELD_BLKS,
			   .b = c->blks};
	int ret = map_lost(f, c);

	if (ret || c->a.blks == c->blks)
		return ret;
	if (PROBLEM(P_INODE_BLKS, .ino = c->ino, .is = c->a.blks,
		    .want = c->blks))
		return repair_later(f, &r);
	return 0;
}
