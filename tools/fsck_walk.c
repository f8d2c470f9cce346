/* SPDX-License-Identifier: BSD-2-Clause */
/* Walking a table, and noting who owns which blocks. */
#include "tools/fsck.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LEVEL_DROPPED 255u	/* a node that replay has replaced */

const char *fsck_text(struct fsck *f, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(f->text, sizeof(f->text), fmt, ap);
	va_end(ap);
	return f->text;
}

const char *table_name(enum table t)
{
	static const char *const names[TABLES] = {"files", "references", "space"};

	return names[t];
}

bool fsck_in_volume(const struct fsck *f, uint64_t start, uint64_t len)
{
	if (!len || len > f->blocks || start > f->blocks - len)
		return false;
	for (unsigned i = 0; i < f->fixeds; i++)
		if (start < f->fixed[i].start + f->fixed[i].len &&
		    f->fixed[i].start < start + len)
			return false;
	return true;
}

void fsck_read_all(struct fsck *f, void *buf, size_t size, size_t n, uint64_t off)
{
	uint8_t *at = buf;

	if (!image_pread(f->im, buf, n * size, off))
		return;
	for (size_t i = 0; i < n; i++, at += size, off += size)
		if (image_pread(f->im, at, size, off) &&
		    image_pread(f->im, at, size, off))
			memset(at, 0, size);
}

bool fsck_next_data(struct fsck *f, unsigned shift, uint64_t blocks, uint64_t *off,
		    uint64_t *end)
{
	int fd = image_fd(f->file);
	off_t data, hole;

	*end = blocks << shift;
	if (*end > f->im->bytes)	/* it was cut short */
		*end = f->im->bytes >> shift << shift;
	if (*off >= *end)
		return false;
	if (fd < 0 || f->file->blockdev)
		return true;
	data = lseek(fd, (off_t)*off, SEEK_DATA);
	if (data < 0)
		return errno == EINVAL;
	hole = lseek(fd, data, SEEK_HOLE);
	*off = (uint64_t)data >> shift << shift;
	if (hole >= 0 && (uint64_t)hole < *end)
		*end = (((uint64_t)hole - 1) >> shift << shift) + (1ull << shift);
	return *off < *end;
}

/* ---- owners ------------------------------------------------------------------- */

/* The reference count that holds block `blk`, or the first behind it. */
static const struct ref_run *ref_at(const struct fsck *f, uint64_t blk)
{
	size_t lo = 0, hi = f->ref_count;

	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (f->refs[mid].start + f->refs[mid].len <= blk)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo < f->ref_count ? &f->refs[lo] : NULL;
}

/* Blocks that no reference count holds: one owner each. */
static int own_alone(struct fsck *f, uint64_t start, uint64_t len)
{
	while (len) {
		bool twice;
		int64_t n = blocks_put(&f->owned, start, len, &twice);

		if (n < 0)
			return (int)n;
		if (twice) {
			f->look_again = true;
			if (runs_add(&f->twice, start, (uint64_t)n))
				return -ENOMEM;
		}
		start += (uint64_t)n;
		len -= (uint64_t)n;
	}
	return 0;
}

static int own_shared(struct fsck *f, uint64_t ino, uint64_t start, uint64_t len)
{
	struct ino_rec *r = ino_find(&f->inodes, ino);

	if (r)
		r->flags |= INO_SHARES;
	if (runs_add(&f->shared, start, len))
		return -ENOMEM;
	while (len) {
		bool twice;
		int64_t n = blocks_put(&f->owned, start, len, &twice);

		if (n < 0)
			return (int)n;
		start += (uint64_t)n;
		len -= (uint64_t)n;
	}
	return 0;
}

/* What is the volume's own, files do not share. */
static int own_counted(struct fsck *f, uint64_t start, uint64_t len)
{
	const struct ref_run *r = ref_at(f, start);

	if (!r || r->start >= start + len)
		return 0;
	f->look_again = true;
	return runs_add(&f->twice, start, len);
}

static int node_counted(void *ctx, enum table t, unsigned level, uint64_t block)
{
	(void)t, (void)level;
	return block >= 1ull << 62 ? 0 : own_counted(ctx, block, 1);
}

int fsck_own_counted(struct fsck *f)
{
	struct walk w = {.ctx = f, .node = node_counted};

	return f->ref_count ? volume_walk(f->v, TABLE_REFS, &w) : 0;
}

int fsck_own(struct fsck *f, uint64_t ino, uint64_t start, uint64_t len)
{
	int ret = ino ? 0 : own_counted(f, start, len);

	if (!ino)
		return ret ? ret : own_alone(f, start, len);
	while (!ret && len) {
		const struct ref_run *r = ref_at(f, start);
		uint64_t n = len;

		if (!r || r->start >= start + len) {
			ret = own_alone(f, start, len);
		} else if (r->start > start) {
			n = r->start - start;
			ret = own_alone(f, start, n);
		} else {
			if (n > r->start + r->len - start)
				n = r->start + r->len - start;
			ret = own_shared(f, ino, start, n);
		}
		start += n;
		len -= n;
	}
	return ret;
}

/* ---- items that make no sense ------------------------------------------------- */

int item_away(struct fsck *f, enum problem_id id, const struct finding *what)
{
	struct repair r = {.kind = REPAIR_ITEM_REMOVE,
			   .id = id,
			   .a = f->table,
			   .name = (char *)f->key,
			   .name_len = (uint16_t)f->klen};

	return problem(id, what) ? repair_later(f, &r) : 0;
}

/* ---- walking ------------------------------------------------------------------- */

struct walker {
	struct fsck *f;
	int (*item)(struct fsck *f, const uint8_t *key, size_t klen,
		    const uint8_t *val, size_t vlen);
	uint8_t last[KEY_MAX];
	size_t last_len;
	bool any;
	uint64_t of;		/* items that the table should have */
};

static int walk_node(void *ctx, enum table t, unsigned level, uint64_t block)
{
	struct walker *w = ctx;
	struct fsck *f = w->f;

	if (level != LEVEL_DROPPED)
		f->nodes[t]++;
	if (level == 0)
		f->new_leaf = true;
	if (block >= 1ull << 62)
		return 0;
	return fsck_own(f, 0, block, 1);
}

/* ---- what a lost node may have held --------------------------------------------- */

struct gap *gap_find(struct fsck *f, const struct lost_node *n)
{
	size_t at = 0, place;

	while (index_next(&f->gap_at, n->block, &at, &place)) {
		struct gap *g = &f->gaps[place];

		if (g->table == n->table && g->level == n->level)
			return g;
	}
	return NULL;
}

static struct gap *gap_add(struct fsck *f, const struct lost_node *n)
{
	struct gap *g = grow(f->gaps, sizeof(*g), f->gap_count, &f->gap_room);

	if (!g)
		return NULL;
	f->gaps = g;
	if (index_add(&f->gap_at, n->block, f->gap_count))
		return NULL;
	g += f->gap_count++;
	*g = (struct gap){.table = n->table, .level = n->level, .block = n->block};
	return g;
}

int gap_anywhere(struct fsck *f)
{
	const struct lost_node none = {.table = TABLE_FILES, .level = UINT8_MAX};

	return gap_add(f, &none) ? 0 : -ENOMEM;
}

static int gap_open(struct fsck *f, struct gap *g)
{
	size_t *p = f->gap_open;

	if (g->open)
		return 0;
	p = grow(p, sizeof(*p), f->gaps_open, &f->gap_open_room);
	if (!p)
		return -ENOMEM;
	f->gap_open = p;
	p[f->gaps_open++] = (size_t)(g - f->gaps);
	g->open = true;
	return 0;
}

static int gap_begin(struct fsck *f, const struct walker *w,
		     const struct lost_node *n)
{
	struct gap *g = gap_find(f, n);

	if (!g)
		g = gap_add(f, n);
	if (!g || gap_open(f, g))
		return -ENOMEM;
	g->lo_len = w->any ? w->last_len : 0;
	g->hi_len = 0;
	memcpy(g->lo, w->last, g->lo_len);
	return 0;
}

/* The next item of the table; "" at its end. */
static void gaps_end(struct fsck *f, const uint8_t *key, size_t klen)
{
	while (f->gaps_open) {
		struct gap *g = &f->gaps[f->gap_open[--f->gaps_open]];

		g->open = false;
		g->hi_len = klen <= KEY_MAX ? klen : 0;
		memcpy(g->hi, key, g->hi_len);
	}
}

/* Is the key one of this inode's map (0), or before (-1) or behind those? */
static int map_side(const uint8_t *key, size_t klen, uint64_t ino)
{
	uint64_t of = klen >= 9 ? be64_get(key) : 0;

	if (of != ino)
		return of < ino ? -1 : 1;
	if (klen == 17 && key[8] == KEY_MAP)
		return 0;
	return key[8] < KEY_MAP ? -1 : 1;
}

bool gap_blocks(const struct gap *g, uint64_t ino, uint64_t *from, uint64_t *to)
{
	int lo = g->lo_len ? map_side(g->lo, g->lo_len, ino) : -1;
	int hi = g->hi_len ? map_side(g->hi, g->hi_len, ino) : 1;

	if (g->table != TABLE_FILES || lo > 0 || hi < 0)
		return false;
	*from = lo ? 0 : be64_get(g->lo + 9);
	*to = hi ? UINT64_MAX : be64_get(g->hi + 9);
	return true;
}

/* Noted while the trees are looked at without the journal. */
static int note_gone(struct fsck *f, const struct lost_node *n)
{
	struct lost_node *p = realloc(f->gone, (f->gone_count + 1) * sizeof(*p));

	if (!p)
		return -ENOMEM;
	f->gone = p;
	p[f->gone_count++] = *n;
	return 0;
}

static int lost_later(struct fsck *f, const struct repair *r)
{
	if (r->kind != REPAIR_BITMAPS)
		problem_only_nodes();
	return repair_later(f, r);
}

/* Whole, but search does not come upon its items: they are to find their places. */
static int walk_misplaced(struct fsck *f, enum table t, uint64_t block)
{
	struct repair r = {.kind = t == TABLE_SPACE ? REPAIR_BITMAPS : REPAIR_SORT,
			   .id = P_LEAF_PLACE,
			   .ino = t,
			   .b = block};
	int ret = 0;

	f->nodes[t]++;
	f->incomplete = true;
	/* Only in memory: what was found was put there while the leaf that is in
	 * the wrong place could not be reached. */
	if (block >= 1ull << 62)
		return 0;
	if (PROBLEM(P_LEAF_PLACE, .name = table_name(t), .blk = block))
		ret = lost_later(f, &r);
	return ret ? ret : fsck_own(f, 0, block, 1);
}

static int walk_bad(void *ctx, enum table t, unsigned level, uint64_t block,
		    const char *what)
{
	struct walker *w = ctx;
	struct lost_node n = {.table = t, .level = level, .block = block};
	struct repair r = {.kind = t == TABLE_SPACE ? REPAIR_BITMAPS : REPAIR_NODE,
			   .id = P_NODE_BAD,
			   .ino = t,
			   .a = level,
			   .b = block,
			   .unread = !strcmp(what, NODE_UNREAD)};

	if (!strcmp(what, NODE_MISPLACED))
		return walk_misplaced(w->f, t, block);

	if (PROBLEM(P_NODE_BAD, .name = table_name(t), .is = level, .blk = block,
		    .what = what) &&
	    lost_later(w->f, &r))
		return -ENOMEM;
	w->f->incomplete = true;
	w->f->lost[t] = true;
	if (gap_begin(w->f, w, &n) || (!w->item && note_gone(w->f, &n)))
		return -ENOMEM;
	/* Whatever it holds, its block is taken; where all bitmaps are to be
	 * made anew it is not. */
	if (t != TABLE_SPACE && block < 1ull << 62 && fsck_in_volume(w->f, block, 1))
		return fsck_own(w->f, 0, block, 1);
	return 0;
}

static int walk_item(void *ctx, enum table t, const uint8_t *key, size_t klen,
		     const uint8_t *val, size_t vlen)
{
	struct walker *w = ctx;
	struct fsck *f = w->f;
	int ret = 0;

	if (klen <= sizeof(w->last)) {
		memcpy(w->last, key, klen);
		w->last_len = klen;
		w->any = true;
	}
	gaps_end(f, key, klen);
	f->table = t;
	f->key = key;
	f->klen = klen;
	if (++f->items[t] % 4096 == 0)
		cli_progress(table_name(t), f->items[t], w->of);
	if (w->item)
		ret = w->item(f, key, klen, val, vlen);
	f->new_leaf = false;
	return ret;
}

int fsck_walk(struct fsck *f, enum table t,
	      int (*item)(struct fsck *f, const uint8_t *key, size_t klen,
			  const uint8_t *val, size_t vlen))
{
	struct walker *w = calloc(1, sizeof(*w));
	struct walk walk = {.node = walk_node,
			    .item = walk_item,
			    .bad = walk_bad,
			    .ahead = true};
	int ret;

	if (!w)
		return -ENOMEM;
	w->f = f;
	w->item = item;
	w->of = get64(f->super.root[t].items);
	walk.ctx = w;
	ret = volume_walk(f->v, t, &walk);
	gaps_end(f, (const uint8_t *)"", 0);
	f->new_leaf = true;
	free(w);
	cli_progress_end();
	return ret;
}
