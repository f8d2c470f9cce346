/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * What lost nodes held, from elsewhere.
 *
 *   1. An inner node holds nothing but pointers. The nodes they led to still
 *      stand in the image (fsck_stray.c). One of a lower level that begins with
 *      a key that a lost one may have led to was below it. Where nodes in between
 *      are lost as well, they are made anew. Nobody has to know which of several
 *      lost neighbours led to it: its key leads to where it belongs.
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

struct search {
	struct fsck *f;
	struct lost_node *lost;
	const struct gap **gap_of;	/* each; NULL: it is not lost, but misplaced */
	size_t losts;
	size_t *inner;			/* which of them are no leaves */
	size_t inners;
	size_t known;			/* found in earlier rounds */
	/* while the items of one are collected */
	const struct gap *gap;
	struct items found;
};

static bool before(const struct gap *g, const uint8_t *key, size_t klen)
{
	return g->lo_len && key_cmp(key, klen, g->lo, g->lo_len) <= 0;
}

static bool behind(const struct gap *g, const uint8_t *key, size_t klen)
{
	return g->hi_len && key_cmp(key, klen, g->hi, g->hi_len) >= 0;
}

/* ---- nodes below lost ones --------------------------------------------------------- */

/* Its entry of an earlier round: kept, or not to be given up any more. */
static const struct lost_node *saved_before(const struct fsck *f,
					    const struct lost_node *n, bool keep)
{
	size_t at = 0, place;

	while (index_next(&f->saved_at, n->block, &at, &place)) {
		const struct lost_node *s = &f->saved[place];

		if (s->level == n->level && s->table == n->table && s->keep == keep)
			return s;
	}
	return NULL;
}

/* In an earlier round? Then something was in its way. */
static bool found_before(const struct search *s, const struct disk_ptr *ptr)
{
	for (size_t i = 0; i < s->known; i++)
		if (!memcmp(&s->f->found[i].ptr, ptr, sizeof(*ptr)))
			return true;
	return false;
}

/* May it have been below this one? */
static bool may_lead(const struct search *s, size_t i, const struct found_node *n)
{
	const struct gap *g = s->gap_of[i];

	return g && s->lost[i].table == n->table && s->lost[i].level > n->level &&
	       !before(g, n->key, n->klen) && !behind(g, n->key, n->klen);
}

static bool is_wanted(void *ctx, const struct found_node *n)
{
	const struct search *s = ctx;

	for (size_t i = 0; i < s->inners; i++)
		if (may_lead(s, s->inner[i], n))
			return true;
	return false;
}

/* A stray: any lost node that it may have been below is replaced if it is in the
 * way there. */
static int take(struct search *s, const struct found_node *n)
{
	struct fsck *f = s->f;
	struct found_node *p;

	for (size_t i = 0; i < s->inners; i++) {
		struct lost_node *lost = &s->lost[s->inner[i]];

		if (may_lead(s, s->inner[i], n))
			lost->keep = !saved_before(f, lost, true);
	}
	if (found_before(s, &n->ptr))
		return 0;
	p = grow(f->found, sizeof(*p), f->found_count, &f->found_room);
	if (!p)
		return -ENOMEM;
	f->found = p;
	p[f->found_count++] = *n;
	f->seen_anew = true;
	return 0;
}

bool is_files_root(const struct fsck *f, const struct lost_node *n)
{
	return n->table == TABLE_FILES && n->level &&
	       n->block == get64(f->super.root[TABLE_FILES].ptr.block);
}

static bool root_lost(const struct search *s)
{
	for (size_t i = 0; i < s->losts; i++)
		if (is_files_root(s->f, &s->lost[i]))
			return true;
	return false;
}

static int find_children(struct search *s)
{
	struct found_node *stray;
	size_t strays;
	int ret = strays_find(s->f, is_wanted, s, &stray, &strays);

	/* An older tree then, whole or with more left of it. */
	if (!ret && s->f->bitmaps_lost && root_lost(s) &&
	    rescue_finds_more(s->f, stray, strays))
		strays = 0;
	for (size_t i = 0; !ret && i < strays; i++)
		ret = take(s, &stray[i]);
	free(stray);
	return ret;
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
	size_t size = (size_t)1 << s->f->shift;
	struct disk_node *d = malloc(size);
	int ret = d ? image_pread(s->f->im, d, size, n->block << s->f->shift) : -ENOMEM;

	if (!ret)
		ret = repair_node_verify(d, size, n->block);
	s->gap = &all;
	for (unsigned i = 0; !ret && i < get16(d->count); i++) {
		struct disk_item it;
		const uint8_t *key = item_at(d, i, &it);

		ret = collect(s, n->table, key, get16(it.klen),
			      key + get16(it.klen), get16(it.vlen));
	}
	free(d);
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

/* How the volume is to be seen from now on. */
static int save(struct fsck *f, const struct lost_node *n)
{
	struct lost_node *p;

	/* What can't be given up, is not in the next round either. */
	if (!n->keep && saved_before(f, n, false)) {
		free((void *)n->items);
		return 0;
	}
	p = grow(f->saved, sizeof(*p), f->saved_count, &f->saved_room);
	if (p)
		f->saved = p;
	if (!p || index_add(&f->saved_at, n->block, f->saved_count)) {
		free((void *)n->items);
		return -ENOMEM;
	}
	p[f->saved_count++] = *n;
	f->seen_anew = true;
	return 0;
}

int salvage(struct fsck *f, struct lost_node *lost, size_t losts)
{
	struct search s = {.f = f,
			   .lost = lost,
			   .losts = losts,
			   .known = f->found_count};
	int ret = 0, saved;

	if (!losts)
		return 0;
	s.gap_of = calloc(s.losts, sizeof(*s.gap_of));
	s.inner = calloc(s.losts, sizeof(*s.inner));
	if (!s.gap_of || !s.inner)
		ret = -ENOMEM;
	for (size_t i = 0; !ret && i < s.losts; i++) {
		if (lost[i].level)
			s.inner[s.inners++] = i;
		s.gap_of[i] = gap_find(f, &lost[i]);
		if (!s.gap_of[i])
			ret = own_items(&s, &lost[i]);
	}
	if (!ret && s.inners)
		ret = find_children(&s);
	if (!ret)
		ret = look_in_older(&s);
	for (size_t i = 0; i < losts; i++) {
		saved = save(f, &lost[i]);
		ret = ret ? ret : saved;
	}
	free(s.gap_of);
	free(s.inner);
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
	index_fini(&f->saved_at);
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
