/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The second look: the first found that something does not add up, this one
 * says what, by name: entries whose inodes are missing or of another type,
 * entries and indexes that do not match, owners of blocks that have several.
 */
#include "tools/fsck.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct ent {
	uint64_t ino, index;
	uint8_t type, len;
	char name[255];
};

struct ents {
	struct ent *v;
	size_t count, room;
};

struct look {
	struct fsck *f;
	uint64_t dir;			/* whose entries are being collected */
	struct ents entries, indexes;
	struct runs shares;		/* owned by files, by several of them */
	struct runs own;		/* of what has several owners: the volume's */
	uint64_t ino;			/* the inode passing by, if its item has */
	struct attr a;
};

static int ents_add(struct ents *s, uint64_t ino, uint64_t index, uint8_t type,
		    const void *name, size_t len)
{
	struct ent *e = grow(s->v, sizeof(*e), s->count, &s->room);

	if (!e)
		return -ENOMEM;
	s->v = e;
	e += s->count++;
	e->ino = ino;
	e->index = index;
	e->type = type;
	e->len = (uint8_t)len;
	memcpy(e->name, name, len);
	return 0;
}

static int ent_cmp(const void *a, const void *b)
{
	const struct ent *x = a, *y = b;

	return (x->index > y->index) - (x->index < y->index);
}

static int later(struct fsck *f, enum repair_kind kind, enum problem_id id,
		 uint64_t dir, const struct ent *e, uint64_t b)
{
	struct repair r = {.kind = kind,
			   .id = id,
			   .ino = e->ino,
			   .a = dir,
			   .b = b,
			   .name = (char *)e->name,
			   .name_len = e->len};

	return repair_later(f, &r);
}

/* ---- entries against indexes ----------------------------------------------------- */

static const char *pair_differs(const struct ent *e, const struct ent *x)
{
	if (e->len != x->len || memcmp(e->name, x->name, e->len))
		return "the name";
	if (e->ino != x->ino)
		return "the inode";
	if (e->type != x->type)
		return "the type";
	return NULL;
}

static int entry_alone(struct look *l, const struct ent *e)
{
	if (PROBLEM(P_ENTRY_NO_INDEX, .dir = l->dir, .name = e->name,
		    .name_len = e->len, .is = e->index))
		return later(l->f, REPAIR_ENTRY_INDEX, P_ENTRY_NO_INDEX, l->dir,
			     e, e->index);
	return 0;
}

static int index_alone(struct look *l, const struct ent *x)
{
	if (PROBLEM(P_INDEX_NO_ENTRY, .dir = l->dir, .name = x->name,
		    .name_len = x->len, .is = x->index))
		return later(l->f, REPAIR_INDEX_ENTRY, P_INDEX_NO_ENTRY, l->dir,
			     x, x->index);
	return 0;
}

static int pair(struct look *l, const struct ent *e, const struct ent *x)
{
	const char *what = pair_differs(e, x);

	if (what && PROBLEM(P_ENTRY_INDEX_DIFFER, .dir = l->dir, .name = e->name,
			    .name_len = e->len, .is = e->index, .what = what))
		return later(l->f, REPAIR_INDEX_SET, P_ENTRY_INDEX_DIFFER,
			     l->dir, e, e->index);
	return 0;
}

static struct ent *ents_end(const struct ents *s)
{
	return s->v ? s->v + s->count : NULL;
}

static int dir_done(struct look *l)
{
	struct ent *e = l->entries.v, *e_end = ents_end(&l->entries);
	struct ent *x = l->indexes.v, *x_end = ents_end(&l->indexes);
	int ret = 0;

	if (l->entries.count)
		qsort(e, l->entries.count, sizeof(*e), ent_cmp);
	while (!ret && (e < e_end || x < x_end)) {
		if (x == x_end || (e < e_end && e->index < x->index)) {
			ret = entry_alone(l, e++);
		} else if (e == e_end || x->index < e->index) {
			ret = index_alone(l, x++);
		} else {
			ret = pair(l, e++, x);
			/* two entries may claim one index */
			while (!ret && e < e_end && e->index == x->index)
				ret = entry_alone(l, e++);
			x++;
		}
	}
	l->dir = 0;
	l->entries.count = l->indexes.count = 0;
	return ret;
}

/* Is this inode a directory whose entries are to be collected? */
static int dir_want(struct look *l, uint64_t ino, bool *want)
{
	const struct ino_rec *r;
	int ret = 0;

	if (l->dir && l->dir != ino)
		ret = dir_done(l);
	r = ino_find(&l->f->inodes, ino);
	*want = r && r->dir && l->f->inodes.dirs[r->dir - 1].suspect;
	if (*want)
		l->dir = ino;
	return ret;
}

/* ---- entries against inodes ---------------------------------------------------------- */

static const char *type_word(uint8_t type)
{
	switch (type) {
	case DT_REG:
		return "a file";
	case DT_DIR:
		return "a directory";
	case DT_LNK:
		return "a symbolic link";
	case DT_CHR:
	case DT_BLK:
		return "a device";
	case DT_FIFO:
		return "a pipe";
	case DT_SOCK:
		return "a socket";
	default:
		return "of no known type";
	}
}

/* A directory has one entry: the one in its parent, the first there. */
static bool is_second(struct fsck *f, struct ino_rec *r, uint64_t dir)
{
	if (r->ino == ROOT_INO)
		return true;
	if (r->links < 2 || !r->dir)
		return false;
	if (f->inodes.dirs[r->dir - 1].from == dir && !(r->flags & INO_NAMED)) {
		r->flags |= INO_NAMED;
		return false;
	}
	return true;
}

static int check_entry(struct look *l, uint64_t dir, const struct ent *e)
{
	struct fsck *f = l->f;
	struct ino_rec *r = ino_find(&f->inodes, e->ino);

	if (r && r->fate == FATE_REMADE)
		return 0;
	if (!r || !(r->flags & INO_SEEN)) {
		if (PROBLEM(P_ENTRY_NO_INODE, .dir = dir, .ino = e->ino,
			    .name = e->name, .name_len = e->len))
			return later(f, REPAIR_ENTRY_REMOVE, P_ENTRY_NO_INODE,
				     dir, e, 0);
		return 0;
	}
	if (r->type != e->type && !(r->flags & INO_ODD_MODE)) {
		if (PROBLEM(P_ENTRY_TYPE, .dir = dir, .ino = e->ino,
			    .name = e->name, .name_len = e->len,
			    .what = type_word(e->type)))
			return later(f, REPAIR_ENTRY_TYPE, P_ENTRY_TYPE, dir, e,
				     r->type);
		return 0;
	}
	if (r->type == DT_DIR && r->dir && f->inodes.dirs[r->dir - 1].cycle) {
		if (PROBLEM(P_DIR_CYCLE, .dir = dir, .ino = e->ino,
			    .name = e->name, .name_len = e->len))
			return later(f, REPAIR_ENTRY_REMOVE, P_DIR_CYCLE, dir, e,
				     0);
		return 0;
	}
	if (r->type == DT_DIR && is_second(f, r, dir)) {
		if (PROBLEM(P_DIR_TWICE, .dir = dir, .ino = e->ino,
			    .name = e->name, .name_len = e->len))
			return later(f, REPAIR_ENTRY_REMOVE, P_DIR_TWICE, dir, e,
				     0);
		return 0;
	}
	if (r->flags & INO_ORPHAN && !r->nlink &&
	    PROBLEM(P_ENTRY_ORPHAN, .dir = dir, .ino = e->ino, .name = e->name,
		    .name_len = e->len))
		return later(f, REPAIR_ORPHAN_REMOVE, P_ENTRY_ORPHAN, dir, e, 0);
	return 0;
}

static int look_dirent(struct look *l, uint64_t dir, const uint8_t *name,
		       size_t len, const uint8_t *val, size_t vlen)
{
	struct disk_dirent d;
	struct ent e;
	bool want;
	int ret;

	if (vlen != sizeof(d) || len > 255)
		return 0;
	memcpy(&d, val, sizeof(d));
	e = (struct ent){.ino = get64(d.ino),
			 .index = get64(d.index),
			 .type = d.type,
			 .len = (uint8_t)len};
	memcpy(e.name, name, len);
	ret = dir_want(l, dir, &want);
	if (!ret && want)
		ret = ents_add(&l->entries, e.ino, e.index, e.type, name, len);
	return ret ? ret : check_entry(l, dir, &e);
}

static int look_index(struct look *l, uint64_t dir, uint64_t index,
		      const uint8_t *val, size_t vlen)
{
	const size_t head = offsetof(struct disk_index, name);
	bool want;
	le64 ino;
	int ret;

	if (vlen < head || vlen > head + 255)
		return 0;
	ret = dir_want(l, dir, &want);
	if (ret || !want)
		return ret;
	memcpy(&ino, val, sizeof(ino));
	return ents_add(&l->indexes, get64(ino), index,
			val[offsetof(struct disk_index, type)], val + head,
			vlen - head);
}

/* ---- what the volume owns itself ----------------------------------------------------------- */

/* Of [start, start + len), from `a` to `b` has several owners by twice.v[i]. */
static void overlap(const struct extent *e, uint64_t start, uint64_t len,
		    uint64_t *a, uint64_t *b)
{
	*a = e->start > start ? e->start : start;
	*b = e->start + e->len < start + len ? e->start + e->len : start + len;
}

static int own_add(struct look *l, uint64_t start, uint64_t len)
{
	const struct runs *t = &l->f->twice;
	uint64_t a, b;
	int ret = 0;

	for (size_t i = runs_first(t, start);
	     !ret && i < t->count && t->v[i].start < start + len; i++) {
		overlap(&t->v[i], start, len, &a, &b);
		ret = runs_add(&l->own, a, b - a);
	}
	return ret;
}

static int own_node(void *ctx, enum table t, unsigned level, uint64_t block)
{
	(void)t, (void)level;
	return block >= 1ull << 62 ? 0 : own_add(ctx, block, 1);
}

static int own_item(void *ctx, enum table t, const uint8_t *key, size_t klen,
		    const uint8_t *val, size_t vlen)
{
	struct disk_space d;

	(void)key;
	if (t != TABLE_SPACE || klen != 8 || vlen != sizeof(d))
		return 0;
	memcpy(&d, val, sizeof(d));
	return own_add(ctx, get64(d.block), 1);
}

/* Blocks of two things of the volume's: nothing can be done, nothing is freed. */
static int own_twice(struct fsck *f, uint64_t from, uint64_t to, uint64_t count)
{
	if (count < 2)
		return 0;
	PROBLEM(P_OWNED_TWICE, .blk = from, .len = to - from,
		.what = "nodes or bitmaps");
	f->keep_blocks = true;
	return 0;
}

/* Those of the bitmaps and their tree count only if they stay. */
static int own_find(struct look *l)
{
	struct walk w = {.ctx = l, .node = own_node, .item = own_item};
	struct fsck *f = l->f;
	unsigned tables = f->bitmaps_lost || repair_bitmaps_anew(f) ? TABLE_SPACE :
								      TABLES;
	int ret = 0;

	runs_sort(&f->twice);
	for (unsigned t = 0; !ret && f->twice.count && t < tables; t++)
		ret = volume_walk(f->v, t, &w);
	if (!ret)
		ret = refs_sweep(f, &l->own, own_twice);
	runs_sort(&l->own);
	return ret;
}

/* ---- a file's run where nodes stand ---------------------------------------------------------- */

struct file_run {
	uint64_t blk;
	struct disk_map m;
	const uint8_t *sums;
};

static int item_later(struct look *l, enum repair_kind kind, const void *key,
		      size_t klen, const void *val, size_t vlen)
{
	uint8_t item[KEY_MAX + VALUE_MAX];
	struct repair r = {.kind = kind,
			   .id = P_MAP_OWN,
			   .ino = l->ino,
			   .a = TABLE_FILES,
			   .b = klen,
			   .name = (char *)item,
			   .name_len = (uint16_t)(klen + vlen)};

	memcpy(item, key, klen);
	memcpy(item + klen, val, vlen);
	return repair_later(l->f, &r);
}

static void map_key(uint8_t key[17], uint64_t ino, uint64_t blk)
{
	be64_put(key, ino);
	key[8] = KEY_MAP;
	be64_put(key + 9, blk);
}

/* Of a run, blocks from..to - 1 of the volume stay the file's. */
static int run_part(struct look *l, uint64_t ino, const struct file_run *run,
		    uint64_t from, uint64_t to)
{
	uint64_t skip = from - get64(run->m.start);
	struct disk_map m = run->m;
	uint8_t key[17], val[VALUE_MAX];
	size_t sums = get32(m.flags) ? 0 : (size_t)(to - from) * sizeof(le64);

	if (from >= to)
		return 0;
	m.start = put64(from);
	m.len = put32((uint32_t)(to - from));
	map_key(key, ino, run->blk + skip);
	memcpy(val, &m, sizeof(m));
	memcpy(val + sizeof(m), run->sums + skip * sizeof(le64), sums);
	return item_later(l, REPAIR_ITEM_PUT, key, sizeof(key), val, sizeof(m) + sums);
}

/* And these are lost, if anything was written there. */
static int run_lost(struct look *l, uint64_t ino, const struct file_run *run,
		    uint64_t from, uint64_t to)
{
	struct repair r = {.kind = REPAIR_LOST_RUN,
			   .id = P_MAP_OWN,
			   .ino = ino,
			   .a = run->blk + from - get64(run->m.start)};
	struct disk_inode d = {0};
	uint8_t key[9];
	int ret;

	r.b = r.a + to - from;
	ret = get32(run->m.flags) ? 0 : repair_later(l->f, &r);
	if (ret || l->ino != ino)
		return ret;
	if (!get32(run->m.flags))
		l->a.flags |= INODE_LOST;
	l->a.blks -= to - from;
	attr_encode(&l->a, &d);
	be64_put(key, ino);
	key[8] = KEY_INODE;
	return item_later(l, REPAIR_ITEM_PUT, key, sizeof(key), &d, sizeof(d));
}

/* The run without what of it is the volume's. */
static int run_split(struct look *l, uint64_t ino, const struct file_run *run)
{
	uint64_t start = get64(run->m.start), len = get32(run->m.len), at = start, a, b;
	const struct runs *own = &l->own;
	uint8_t key[17];
	int ret = 0;

	l->f->keep_blocks = true;	/* as long as they are in its map */
	for (size_t i = runs_first(own, start);
	     !ret && i < own->count && own->v[i].start < start + len; i++) {
		overlap(&own->v[i], start, len, &a, &b);
		if (!PROBLEM(P_MAP_OWN, .ino = ino, .is = run->blk + a - start,
			     .blk = a, .len = b - a))
			continue;
		if (at == start) {
			map_key(key, ino, run->blk);
			ret = item_later(l, REPAIR_ITEM_REMOVE, key, sizeof(key), "", 0);
		}
		if (!ret)
			ret = run_part(l, ino, run, at, a);
		if (!ret)
			ret = run_lost(l, ino, run, a, b);
		at = b;
	}
	return ret || at == start ? ret : run_part(l, ino, run, at, start + len);
}

/* ---- owners ----------------------------------------------------------------------------- */

/*
 * A file owns [start, start + len): report what of it other files own as well,
 * which they can share.
 */
static int owner(struct look *l, uint64_t ino, uint64_t start, uint64_t len,
		 const char *who)
{
	struct fsck *f = l->f;
	struct runs *t = &f->twice;
	struct repair r = {.kind = REPAIR_ATTR,
			   .id = P_OWNED_TWICE,
			   .ino = ino,
			   .a = FIELD_SHARED};
	uint64_t a, b;
	int ret = 0;

	for (size_t i = runs_first(t, start);
	     !ret && i < t->count && t->v[i].start < start + len; i++) {
		overlap(&t->v[i], start, len, &a, &b);
		if (!PROBLEM(P_OWNED_TWICE, .blk = a, .len = b - a, .what = who))
			continue;
		ret = runs_add(&l->shares, a, b - a);
		if (!ret)
			ret = repair_later(f, &r);
	}
	return ret;
}

/* What several files own is to be counted as shared. */
static int share(struct fsck *f, uint64_t from, uint64_t to, uint64_t count)
{
	struct repair r = {.kind = REPAIR_REF,
			   .id = P_OWNED_TWICE,
			   .ino = count,
			   .a = from,
			   .b = to - from};

	return count < 2 ? 0 : repair_later(f, &r);
}

static void look_inode(struct look *l, uint64_t ino, const uint8_t *val, size_t vlen)
{
	struct disk_inode d;

	if (vlen != sizeof(d))
		return;
	memcpy(&d, val, sizeof(d));
	attr_decode(&d, &l->a);
	l->ino = ino;
}

static int look_map(struct look *l, uint64_t ino, uint64_t blk,
		    const uint8_t *val, size_t vlen)
{
	struct file_run run = {.blk = blk, .sums = val + sizeof(run.m)};
	uint64_t start, len;

	if (vlen < sizeof(run.m))
		return 0;
	memcpy(&run.m, val, sizeof(run.m));
	if (get32(run.m.flags) & MAP_LOST)
		return 0;	/* it has no place */
	start = get64(run.m.start);
	len = get32(run.m.len);
	if (runs_meet(&l->own, start, len))
		return run_wrong(&run.m, vlen) ? 0 : run_split(l, ino, &run);
	if (l->f->lost[TABLE_REFS])
		return 0;
	return owner(l, ino, start, len,
		     fsck_text(l->f, "inode %" PRIu64 " from its block %" PRIu64,
			       ino, blk));
}

/* ---- items without an inode ------------------------------------------------------------ */

/* Pass 4 has said it once for all items of the inode. */
static int item_lost(struct look *l, enum table t, const uint8_t *key, size_t klen)
{
	struct repair r = {.kind = REPAIR_ITEM_REMOVE,
			   .id = P_INODE_MISSING,
			   .a = t,
			   .name = (char *)key,
			   .name_len = (uint16_t)klen};

	return repair_later(l->f, &r);
}

/* ---- the walk ----------------------------------------------------------------------------- */

static int look_item(void *ctx, enum table t, const uint8_t *key, size_t klen,
		     const uint8_t *val, size_t vlen)
{
	struct look *l = ctx;
	uint64_t ino = klen >= 8 ? be64_get(key) : 0;
	const struct ino_rec *r;

	if (klen < 9)
		return 0;
	r = ino_find(&l->f->inodes, ino);
	if (r && r->fate == FATE_DROPPED)
		return item_lost(l, t, key, klen);
	if (key[8] == KEY_INODE)
		look_inode(l, ino, val, vlen);
	if (key[8] == KEY_DIRENT)
		return look_dirent(l, ino, key + 9, klen - 9, val, vlen);
	if (key[8] == KEY_INDEX && klen == 17)
		return look_index(l, ino, be64_get(key + 9), val, vlen);
	if (key[8] == KEY_MAP && klen == 17)
		return look_map(l, ino, be64_get(key + 9), val, vlen);
	return 0;
}

int second_look(struct fsck *f)
{
	struct look l = {.f = f};
	struct walk w = {.ctx = &l, .item = look_item};
	int ret;

	if (!f->look_again)
		return 0;
	ret = own_find(&l);
	if (!ret)
		ret = volume_walk(f->v, TABLE_FILES, &w);
	if (!ret && l.dir)
		ret = dir_done(&l);
	if (!ret && !f->keep_blocks && l.shares.count)
		ret = refs_sweep(f, &l.shares, share);
	free(l.shares.v);
	free(l.own.v);
	free(l.entries.v);
	free(l.indexes.v);
	return ret;
}
