/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Pass 2: the journal as it stands in the ring. The chain of groups is followed
 * from the tail; what the chain, or any group of this salt, says to be durable
 * has to be there and whole. What follows is what a crash was writing.
 */
#include "tools/fsck.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* What is wrong with an item, or NULL. */
static const char *item_wrong(const struct fsck *f, const struct disk_group *g,
			      const struct disk_jitem *ji, const uint8_t *end)
{
	size_t klen, vlen;
	le64 run[2];

	if ((size_t)(end - (const uint8_t *)ji) < sizeof(*ji))
		return "it is cut off";
	klen = get16(ji->klen);
	vlen = get16(ji->vlen);
	if ((size_t)(end - ji->bytes) < klen + vlen)
		return "it is cut off";
	if (get64(g->of_gen) && ji->type != JITEM_TAKE && ji->type != JITEM_FREE)
		return "a checkpoint takes and frees, no more";
	switch (ji->type) {
	case JITEM_PUT:
	case JITEM_DEL:
		if (klen > KEY_MAX || vlen > VALUE_MAX)
			return "it is too long";
		if (ji->table >= TABLE_SPACE)
			return "it is for a table that has no journal";
		if (ji->type == JITEM_DEL && vlen)
			return "a deletion has no value";
		if (ji->type == JITEM_PUT && ji->table == TABLE_FILES && klen >= 8 &&
		    be64_get(ji->bytes) > INO_MAX)
			return "its inode number is too high";
		return NULL;
	case JITEM_TAKE:
	case JITEM_FREE:
		if (klen != sizeof(run) || vlen)
			return "it is no extent";
		memcpy(run, ji->bytes, sizeof(run));
		if (!get64(run[1]) || get64(run[0]) >= f->blocks ||
		    get64(run[1]) > f->blocks - get64(run[0]))
			return "its extent is outside the volume";
		return NULL;
	case JITEM_DATA:
		if (klen != sizeof(run[0]) || vlen != 1ul << f->shift)
			return "it is no block's contents";
		memcpy(run, ji->bytes, sizeof(run[0]));
		return get64(run[0]) < f->blocks ? NULL :
						   "its block is outside the volume";
	default:
		return "it is of no known type";
	}
}

/* Blocks that it takes may be in a bitmap that is not there yet. */
static void note_take(struct fsck *f, const struct disk_jitem *ji)
{
	le64 run[2];
	uint64_t i, last;

	memcpy(run, ji->bytes, sizeof(run));
	i = get64(run[0]) / f->per_bitmap;
	last = (get64(run[0]) + get64(run[1]) - 1) / f->per_bitmap;
	for (; i <= last; i++)
		f->there[i / 8] |= (uint8_t)(1u << (i % 8));
}

static int note_ride(struct fsck *f, const struct disk_jitem *ji)
{
	le64 block;

	memcpy(&block, ji->bytes, sizeof(block));
	return runs_add(&f->ridden, get64(block), 1);
}

static int note_blocks(struct fsck *f, const struct disk_group *g)
{
	const struct disk_jitem *ji = NULL;
	int ret = 0;

	while (!ret && (ji = group_item(g, ji))) {
		if (ji->type == JITEM_TAKE)
			note_take(f, ji);
		else if (ji->type == JITEM_DATA)
			ret = note_ride(f, ji);
	}
	return ret;
}

static const char *items_wrong(const struct fsck *f, const struct disk_group *g)
{
	const uint8_t *p = (const uint8_t *)(g + 1);
	const uint8_t *end = (const uint8_t *)g + get32(g->bytes);

	for (uint32_t i = 0; i < get32(g->items); i++) {
		const struct disk_jitem *ji = (const void *)p;
		const char *why = item_wrong(f, g, ji, end);

		if (why)
			return why;
		p = ji->bytes + get16(ji->klen) + get16(ji->vlen);
	}
	return p == end ? NULL : "bytes are left over";
}

/* The newest statements in the ring: durable until here, and as of when. */
static void attested(struct ring *r, const struct disk_super *s, uint64_t *must,
		     uint64_t *gen)
{
	uint64_t salt = get64(s->salt);
	const char *why;

	*must = get64(s->durable_seq);
	*gen = 0;
	for (uint64_t u = 0; u < r->units; u++) {
		const struct disk_group *g = ring_group(r, u, NULL, &why);

		if (!g)
			continue;
		if (get64(g->salt) == salt && get64(g->durable_seq) > *must)
			*must = get64(g->durable_seq);
		if (get64(g->checkpoint_gen) > *gen)
			*gen = get64(g->checkpoint_gen);
		u += group_units(g) - 1;
	}
}

/*
 * The volume's history ends before group `seq`, which is damaged, though it was
 * durable. What follows goes out of the ring first; what the superblock says
 * of the bitmaps can be believed no more if it had counted on that group.
 */
static int cut_journal(struct fsck *f, struct ring *r, uint64_t seq)
{
	static const uint8_t none[JOURNAL_UNIT];
	uint64_t salt = get64(f->super.salt);
	struct disk_super s = f->super;
	const char *why;
	int ret = heart_look(f->heart);

	for (uint64_t u = 0; !ret && u < r->units; u++) {
		const struct disk_group *g = ring_group(r, u, &salt, &why);

		if (g && get64(g->seq) >= seq)
			ret = image_pwrite(f->im, none, sizeof(none),
					   r->offset + u * JOURNAL_UNIT);
	}
	if (!ret)
		ret = image_flush(f->im);
	if (get64(s.durable_seq) >= seq) {
		s.durable_seq = put64(seq - 1);
		super_distrust_space(&s);
	}
	return ret ? ret : super_replace(f, &s);
}

static int group_bad(struct fsck *f, struct ring *r, enum problem_id id,
		     uint64_t seq, const char *why)
{
	int ret = 0;

	f->incomplete = true;
	if (!PROBLEM(id, .is = seq, .what = why))
		return 0;
	ret = cut_journal(f, r, seq);
	if (ret)
		return ret;
	problem_fixed(id);
	f->super_good = false;		/* look again before all else */
	return 0;
}

static int follow(struct fsck *f, struct ring *r, uint64_t must)
{
	const struct disk_super *s = &f->super;
	uint64_t unit = get64(s->tail_unit), seq = get64(s->tail_seq);
	uint64_t prev = get64(s->tail_prev), start = unit, salt = get64(s->salt);
	const char *why = NULL;

	for (;;) {
		const struct disk_group *g = ring_group(r, unit, &salt, &why);

		if (!g)
			break;
		if (get64(g->seq) != seq || get64(g->prev) != prev) {
			why = "it is not the one that follows";
			break;
		}
		if (unit + group_units(g) - start > r->units) {
			why = "it is longer than the ring";
			break;
		}
		why = items_wrong(f, g);
		if (why)
			return group_bad(f, r, P_JOURNAL_ITEM, seq, why);
		if (note_blocks(f, g))
			return -ENOMEM;
		prev = get64(g->csum);
		unit += group_units(g);
		seq++;
		f->groups++;
		/* those of a checkpoint itself are no operations */
		f->changes += get32(g->items) && !get64(g->of_gen);
	}
	return seq <= must ? group_bad(f, r, P_JOURNAL_GROUP, seq, why) : 0;
}

/* The superblock is older than the journal. */
static int stale(struct fsck *f, uint64_t gen)
{
	f->incomplete = true;
	if (!PROBLEM(P_SUPER_STALE, .is = get64(f->super.gen), .want = gen))
		return 0;
	return rescue(f, P_SUPER_STALE, &f->super);
}

int pass2(struct fsck *f)
{
	const struct disk_super *s = &f->super;
	struct repair replay = {.kind = REPAIR_REPLAY, .id = P_JOURNAL_REPLAY};
	uint64_t must = 0, gen = 0;
	struct ring r;
	int ret = ring_load(f, s, &r);

	f->groups = f->changes = 0;
	f->ridden.count = 0;
	free(f->there);
	f->there = calloc(f->blocks / f->per_bitmap / 8 + 1, 1);
	if (!f->there)
		ret = -ENOMEM;
	if (!ret) {
		attested(&r, s, &must, &gen);
		ret = gen > get64(s->gen) ? stale(f, gen) : follow(f, &r, must);
	}
	ring_fini(&r);
	if (ret || !f->changes || !f->super_good)
		return ret;
	replay.id = get32(s->flags) & SUPER_CLEAN ? P_JOURNAL_CLEAN :
						    P_JOURNAL_REPLAY;
	if (PROBLEM(replay.id, .is = f->changes))
		ret = repair_later(f, &replay);
	return ret;
}
