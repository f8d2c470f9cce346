/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Pass 4, extent maps: runs in order and within the volume, a checksum for each
 * written block, the count of blocks; with -c the data themselves.
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

/* Where a file ends, in blocks: nothing beyond is written, but what an intent
 * is about to unmap. */
static int check_beyond(struct fsck *f, struct cur *c, uint64_t blk, uint32_t len)
{
	uint64_t end = (c->a.size >> f->shift) +
		       ((c->a.size & ((1ull << f->shift) - 1)) != 0);
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

static const char *run_wrong(const struct disk_map *m, size_t vlen)
{
	uint32_t len = get32(m->len), flags = get32(m->flags);
	bool unwritten = flags & MAP_UNWRITTEN;

	if (flags & ~MAP_UNWRITTEN)
		return "unknown flags";
	if (!len)
		return "it is empty";
	if (len > (unwritten ? MAP_UNWRITTEN_MAX : MAP_MAX))
		return "it is too long";
	if (vlen != sizeof(*m) + (unwritten ? 0 : len * sizeof(le64)))
		return "its checksums are not as many as its blocks";
	return NULL;
}

int map_item(struct fsck *f, struct cur *c, uint64_t blk, const uint8_t *val,
	     size_t vlen)
{
	struct disk_map m;
	const char *why;
	uint64_t start;
	uint32_t len;
	int ret;

	if (vlen < sizeof(m)) {
		return ITEM_AWAY(f, P_VALUE_FORM, .name = table_name(TABLE_FILES),
				 .ino = c->ino, .what = "a run of a map");
	}
	memcpy(&m, val, sizeof(m));
	start = get64(m.start);
	len = get32(m.len);
	why = run_wrong(&m, vlen);
	if (!why && blk > UINT64_MAX - len)
		why = "it ends beyond all files";
	if (why) {
		PROBLEM(P_MAP_RUN, .ino = c->ino, .is = blk, .what = why);
		return 0;
	}
	if (blk < c->map_end) {
		PROBLEM(P_MAP_ORDER, .ino = c->ino, .is = blk);
		f->keep_blocks = true;	/* cutting such a map is a guess */
	}
	if (blk + len > c->map_end)
		c->map_end = blk + len;
	if (!(get32(m.flags) & MAP_UNWRITTEN))
		c->written_end = c->map_end;
	c->blks += len;
	if (!fsck_in_volume(f, start, len)) {
		PROBLEM(P_MAP_PLACE, .ino = c->ino, .is = blk, .blk = start,
			.len = len);
		return 0;
	}
	/* what replay made is of the generation that the next checkpoint ends */
	if (get64(m.birth) > get64(f->super.gen) + 1)
		PROBLEM(P_MAP_BIRTH, .ino = c->ino, .is = blk,
			.want = get64(m.birth));
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

	if (c->a.blks == c->blks)
		return 0;
	if (PROBLEM(P_INODE_BLKS, .ino = c->ino, .is = c->a.blks,
		    .want = c->blks))
		return repair_later(f, &r);
	return 0;
}
