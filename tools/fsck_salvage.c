/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * What lost nodes held, from elsewhere.
 *
 *   1. An inner node holds nothing but pointers. The nodes they led to still
 *      stand in the image, and the bitmaps know them as in use; nobody owns
 *      them, now that the way to them is lost. So what is in use, has no owner,
 *      is a whole node of a lower level and begins with a key that a lost one
 *      may have led to, was below it: what it replaced is free in the bitmaps.
 *      Where nodes in between are lost as well, they are made anew. Nobody has
 *      to know which of several lost neighbours led to it: its key leads to
 *      where it belongs.
 *   2. The other superblock leads to the tree of the checkpoint before, and its
 *      journal from there on. If both are still whole, their state is the state
 *      now; so what the lost node would hold is there, unless it was the same
 *      node already, or has been written over since.
 *
 * Nothing is put back that is merely old. A leaf that stands in the wrong place
 * of its tree is treated as a lost one, of which all is found.
 */
#include "tools/fsck.h"

#include <stdlib.h>
#include <string.h>

#define PIECE_BLOCKS 256u

struct search {
	struct fsck *f;
	struct lost_node *lost;
	const struct gap **gap_of;	/* each; NULL: it is not lost, but misplaced */
	size_t losts;
	size_t size;			/* of a block */
	uint8_t *piece;			/* blocks that stand behind each other */
	size_t known;			/* found in earlier rounds */
	struct found_node *stray;	/* nodes that nobody owns */
	size_t strays, stray_room;
	struct disk_ptr *led;		/* where they lead to */
	size_t leds, led_room;
	/* while the items of one are collected */
	const struct gap *gap;
	struct items found;
};

static int key_cmp(const void *a, size_t alen, const void *b, size_t blen)
{
	int c = memcmp(a, b, alen < blen ? alen : blen);

	return c ? c : (alen > blen) - (alen < blen);
}

static bool before(const struct gap *g, const uint8_t *key, size_t klen)
{
	return g->lo_len && key_cmp(key, klen, g->lo, g->lo_len) <= 0;
}

static bool behind(const struct gap *g, const uint8_t *key, size_t klen)
{
	return g->hi_len && key_cmp(key, klen, g->hi, g->hi_len) >= 0;
}

/* ---- children of inner nodes ----------------------------------------------------- */

static const uint8_t *item_at(const struct disk_node *d, unsigned i,
			      struct disk_item *it)
{
	const uint8_t *at = (const uint8_t *)d + get16(((const le16 *)(d + 1))[i]);

	memcpy(it, at, sizeof(*it));
	return at + sizeof(*it);
}

static struct disk_ptr child_at(const struct disk_node *d, unsigned i)
{
	struct disk_item it;
	const uint8_t *key = item_at(d, i, &it);
	struct disk_ptr p;

	memcpy(&p, key + get16(it.klen), sizeof(p));
	return p;
}

/* Read the node that another points to; false: it is lost. */
static bool read_child(struct search *s, const struct disk_ptr *p, enum table t,
		       unsigned level, struct disk_node *d)
{
	uint64_t block = get64(p->block);

	if (!fsck_in_volume(s->f, block, 1))
		return false;
	fsck_read_all(s->f, d, s->size, 1, block << s->f->shift);
	return !repair_node_verify(d, s->size, block) && get16(d->count) &&
	       !memcmp(&d->self, p, sizeof(*p)) && d->level == level &&
	       d->table == t;
}

/*
 * The lowest key below a node. Above the leaves a first key may be lower, or
 * higher, than all there is, so the way goes down to the first leaf there is.
 */
static bool lowest_key(struct search *s, const struct disk_node *d,
		       struct found_node *c)
{
	struct disk_node *below;
	struct disk_item it;
	bool found = false;

	if (!d->level) {
		const uint8_t *key = item_at(d, 0, &it);

		c->klen = get16(it.klen);
		memcpy(c->key, key, c->klen);
		return true;
	}
	below = malloc(s->size);
	for (unsigned i = 0; below && !found && i < get16(d->count); i++) {
		struct disk_ptr p = child_at(d, i);

		found = read_child(s, &p, d->table, d->level - 1u, below) &&
			lowest_key(s, below, c);
	}
	free(below);
	return found;
}

/* A block that is in use and has no owner: a node that lost its way? */
static int look_at(struct search *s, uint64_t block, const struct disk_node *d)
{
	struct found_node n = {.table = (enum table)d->table,
			       .level = d->level,
			       .ptr = d->self}, *v;

	if (get32(d->magic) != NODE_MAGIC || !get16(d->count) ||
	    get64(d->self.birth) > get64(s->f->super.gen) ||
	    repair_node_verify(d, s->size, block) || !lowest_key(s, d, &n))
		return 0;
	for (unsigned i = 0; d->level && i < get16(d->count); i++) {
		struct disk_ptr *p = grow(s->led, sizeof(*p), s->leds, &s->led_room);

		if (!p)
			return -ENOMEM;
		s->led = p;
		p[s->leds++] = child_at(d, i);
	}
	v = grow(s->stray, sizeof(*v), s->strays, &s->stray_room);
	if (!v)
		return -ENOMEM;
	s->stray = v;
	v[s->strays++] = n;
	return 0;
}

/* Blocks start .. start + n. */
static int look_at_run(struct search *s, uint64_t start, uint64_t n)
{
	int ret = 0;

	while (!ret && n) {
		uint64_t now = n < PIECE_BLOCKS ? n : PIECE_BLOCKS;

		fsck_read_all(s->f, s->piece, s->size, now, start << s->f->shift);
		for (uint64_t i = 0; !ret && i < now; i++)
			ret = look_at(s, start + i, (void *)(s->piece + i * s->size));
		start += now;
		n -= now;
	}
	return ret;
}

/* All that is in use in a page of the bitmaps, and has no owner. */
static int look_at_page(struct search *s, uint64_t page, const uint8_t *bits)
{
	const uint8_t *owned = blocks_page(&s->f->owned, page);
	uint64_t len = 0, at = page * BLOCKS_PAGE;
	int ret = 0;

	for (unsigned i = 0; !ret && i < BLOCKS_PAGE; i++, at++) {
		bool ours = bits[i / 8] >> (i % 8) & 1 &&
			    !(owned && owned[i / 8] >> (i % 8) & 1);

		if (ours) {
			len++;
		} else if (len) {
			ret = look_at_run(s, at - len, len);
			len = 0;
		}
	}
	return ret || !len ? ret : look_at_run(s, at - len, len);
}

static int ptr_cmp(const void *a, const void *b)
{
	return memcmp(a, b, sizeof(struct disk_ptr));
}

/* Was it in the way in an earlier round, or is it known what it held? */
static bool saved_before(const struct fsck *f, const struct lost_node *n, bool items)
{
	for (size_t i = 0; i < f->saved_count; i++)
		if (f->saved[i].block == n->block && f->saved[i].level == n->level &&
		    f->saved[i].table == n->table && (!items || f->saved[i].items))
			return true;
	return false;
}

/* In an earlier round? Then something was in its way. */
static bool found_before(const struct search *s, const struct disk_ptr *ptr)
{
	for (size_t i = 0; i < s->known; i++)
		if (!ptr_cmp(&s->f->found[i].ptr, ptr))
			return true;
	return false;
}

/*
 * A stray, if it may have been below a lost node: that may be replaced on the
 * way to it, and so may its lost neighbours.
 */
static int take(struct search *s, const struct found_node *n)
{
	struct fsck *f = s->f;
	struct found_node *p;
	bool ours = false;

	for (size_t i = 0; i < s->losts; i++) {
		struct lost_node *l = &s->lost[i];
		const struct gap *g = s->gap_of[i];

		if (!g || l->table != n->table || l->level <= n->level ||
		    before(g, n->key, n->klen) || behind(g, n->key, n->klen))
			continue;
		ours = true;
		l->keep = !saved_before(f, l, false);
	}
	if (!ours || found_before(s, &n->ptr))
		return 0;
	p = grow(f->found, sizeof(*p), f->found_count, &f->found_room);
	if (!p)
		return -ENOMEM;
	f->found = p;
	p[f->found_count++] = *n;
	f->seen_anew = true;
	return 0;
}

/* Those that no other one leads to. */
static int take_strays(struct search *s)
{
	int ret = 0;

	if (s->leds)
		qsort(s->led, s->leds, sizeof(*s->led), ptr_cmp);
	for (size_t i = 0; !ret && i < s->strays; i++)
		if (!s->leds || !bsearch(&s->stray[i].ptr, s->led, s->leds,
					 sizeof(*s->led), ptr_cmp))
			ret = take(s, &s->stray[i]);
	return ret;
}

static int find_children(struct search *s)
{
	struct fsck *f = s->f;
	uint64_t per = f->per_bitmap / BLOCKS_PAGE;
	uint64_t count = (f->blocks + f->per_bitmap - 1) / f->per_bitmap;
	uint8_t *bits = malloc(s->size);
	int ret = bits ? 0 : -ENOMEM;

	for (uint64_t i = 0; !ret && i < count;
	     i = fsck_next_used(f, (i + 1) * per) / per) {
		ret = volume_bitmap(f->v, i, bits);
		for (uint64_t p = 0; !ret && p < per; p++)
			ret = look_at_page(s, i * per + p,
					   bits + p * (BLOCKS_PAGE / 8));
		cli_progress("what lost nodes held", i, count);
	}
	cli_progress_end();
	free(bits);
	return ret ? ret : take_strays(s);
}

/* ---- the checkpoint before ---------------------------------------------------------- */

#define PASSED 1
#define LOST_AS_WELL 2

/* Take an item, if it is one that the lost node may have held. */
static int collect(void *ctx, enum table t, const uint8_t *key, size_t klen,
		   const uint8_t *val, size_t vlen)
{
	struct search *s = ctx;

	if (before(s->gap, key, klen))
		return 0;
	if (behind(s->gap, key, klen))
		return PASSED;
	return items_add(&s->found, JITEM_PUT, t, key, klen, val, vlen);
}

/* What was found is the node's; or nobody's, where that is not all of it. */
static int found_of(struct search *s, struct lost_node *n, int ret)
{
	if (ret && ret != PASSED) {
		free(s->found.v);
	} else {
		n->items = s->found.v;
		n->item_count = s->found.count;
	}
	s->found = (struct items){0};
	return ret < 0 ? ret : 0;
}

static int older_bad(void *ctx, enum table t, unsigned level, uint64_t block,
		     const char *what)
{
	(void)ctx, (void)t, (void)level, (void)block, (void)what;
	return LOST_AS_WELL;
}

/* A leaf that is whole, but out of place: its own items. */
static int own_items(struct search *s, struct lost_node *n)
{
	static const struct gap all;
	struct disk_node *d = (void *)s->piece;
	int ret = image_pread(s->f->im, d, s->size, n->block << s->f->shift);

	if (!ret)
		ret = repair_node_verify(d, s->size, n->block);
	s->gap = &all;
	for (unsigned i = 0; !ret && i < get16(d->count); i++) {
		struct disk_item it;
		const uint8_t *key = item_at(d, i, &it);

		ret = collect(s, n->table, key, get16(it.klen),
			      key + get16(it.klen), get16(it.vlen));
	}
	return found_of(s, n, ret);
}

/* What the older tree, and the journal since, have in place of a lost node. */
static int older_items(struct search *s, struct volume *v, size_t i)
{
	struct walk w = {.ctx = s, .item = collect, .bad = older_bad};
	const struct gap *g = s->gap_of[i];
	struct lost_node *n = &s->lost[i];

	if (!g || n->keep || n->items)
		return 0;
	s->gap = g;
	w.from = g->lo;
	w.from_len = g->lo_len;
	return found_of(s, n, volume_walk(v, n->table, &w));
}

static void quiet(void *ctx, const char *text)
{
	(void)ctx, (void)text;
}

static int look_in_older(struct search *s)
{
	struct fsck *f = s->f;
	struct disk_super older;
	struct volume_repair how = {.older = &older,
				    .must = get64(f->super.durable_seq)};
	struct volume_options opt = {.readonly = true,
				     .no_threads = true,
				     .repair = &how,
				     .program = cli_program,
				     .message = quiet};
	struct volume *v;
	char msg[240];
	int ret = 0;

	if (image_pread(f->im, &older, sizeof(older), SUPER_SLOT_OFFSET(1 - f->slot)) ||
	    super_verify(&older, 1 - f->slot, NULL) ||
	    get64(older.salt) != get64(f->super.salt) ||
	    get64(older.blocks) != f->blocks || get32(older.block_shift) != f->shift ||
	    volume_open(f->im, &opt, &v, msg, sizeof(msg)))
		return 0;
	for (size_t i = 0; !ret && i < s->losts; i++)
		ret = older_items(s, v, i);
	volume_close(v);
	return ret;
}

/* ---- both ------------------------------------------------------------------------------ */

/* From lost[] to what is saved, if anything is. */
static int save(struct fsck *f, struct lost_node *lost, size_t *losts)
{
	size_t left = 0;

	for (size_t i = 0; i < *losts; i++) {
		struct lost_node *p, *n = &lost[i];

		/* Once is enough. */
		if (n->items && saved_before(f, n, true)) {
			free((void *)n->items);
			n->items = NULL;
			n->item_count = 0;
		}
		if (!n->keep && !n->items) {
			lost[left++] = *n;
			continue;
		}
		p = grow(f->saved, sizeof(*p), f->saved_count, &f->saved_room);
		if (!p)
			return -ENOMEM;
		f->saved = p;
		p[f->saved_count++] = *n;
		f->seen_anew = true;
	}
	*losts = left;
	return 0;
}

int salvage(struct fsck *f, struct lost_node *lost, size_t *losts)
{
	struct search s = {.f = f,
			   .lost = lost,
			   .losts = *losts,
			   .known = f->found_count,
			   .size = (size_t)1 << f->shift};
	bool inner = false;
	int ret = 0;

	if (!*losts)
		return 0;
	s.piece = malloc(PIECE_BLOCKS * s.size);
	s.gap_of = calloc(s.losts, sizeof(*s.gap_of));
	if (!s.piece || !s.gap_of)
		ret = -ENOMEM;
	for (size_t i = 0; !ret && i < s.losts; i++) {
		inner = inner || lost[i].level;
		s.gap_of[i] = gap_find(f, &lost[i]);
		if (!s.gap_of[i])
			ret = own_items(&s, &lost[i]);
	}
	if (!ret && inner && !f->bitmaps_lost)
		ret = find_children(&s);
	if (!ret)
		ret = look_in_older(&s);
	if (!ret)
		ret = save(f, lost, losts);
	free(s.piece);
	free(s.gap_of);
	free(s.stray);
	free(s.led);
	return ret;
}

void saved_fini(struct fsck *f)
{
	for (size_t i = 0; i < f->saved_count; i++)
		free((void *)f->saved[i].items);
	free(f->saved);
	free(f->found);
	f->saved = NULL;
	f->found = NULL;
	f->saved_count = f->saved_room = f->found_count = f->found_room = 0;
}

struct lost_node *saved_and(const struct fsck *f, const struct lost_node *more,
			    size_t count)
{
	struct lost_node *all = calloc(f->saved_count + count + 1, sizeof(*all));

	if (all && f->saved_count)
		memcpy(all, f->saved, f->saved_count * sizeof(*all));
	if (all && count)
		memcpy(all + f->saved_count, more, count * sizeof(*all));
	return all;
}
