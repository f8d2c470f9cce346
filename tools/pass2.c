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

struct ring {
	struct fsck *f;
	uint8_t *bytes;
	size_t len;
	uint64_t units, salt;
	uint8_t *group;		/* a copy of the one looked at */
};

/* Copy the group at `unit` out of the ring: its header, or NULL with a reason. */
static struct disk_group *group_load(struct ring *r, uint64_t unit,
				     const char **why)
{
	size_t at = (size_t)(unit % r->units) * JOURNAL_UNIT, first;
	struct disk_group *g = (void *)r->group;
	uint64_t sum;
	size_t len;

	memcpy(g, r->bytes + at, sizeof(*g));
	len = get32(g->bytes);
	*why = NULL;
	if (get32(g->magic) != GROUP_MAGIC)
		*why = "there is no group";
	else if (get64(g->salt) != r->salt)
		*why = "it is from another time";
	else if (len < sizeof(*g) || len > r->len)
		*why = "its length makes no sense";
	if (*why)
		return NULL;
	first = len < r->len - at ? len : r->len - at;
	memcpy(r->group, r->bytes + at, first);
	memcpy(r->group + first, r->bytes, len - first);
	sum = get64(g->csum);
	g->csum = put64(0);
	if (checksum(g, len) != sum) {
		*why = "its checksum does not match";
		return NULL;
	}
	g->csum = put64(sum);
	return g;
}

static uint64_t group_units(const struct disk_group *g)
{
	return (get32(g->bytes) + JOURNAL_UNIT - 1) / JOURNAL_UNIT;
}

/* What is wrong with an item, or NULL. */
static const char *item_wrong(const struct fsck *f, const struct disk_jitem *ji,
			      const uint8_t *end)
{
	size_t klen, vlen;
	le64 run[2];

	if ((size_t)(end - (const uint8_t *)ji) < sizeof(*ji))
		return "it is cut off";
	klen = get16(ji->klen);
	vlen = get16(ji->vlen);
	if ((size_t)(end - ji->bytes) < klen + vlen)
		return "it is cut off";
	switch (ji->type) {
	case JITEM_PUT:
	case JITEM_DEL:
		if (klen > KEY_MAX || vlen > VALUE_MAX)
			return "it is too long";
		if (ji->table >= TABLE_SPACE)
			return "it is for a table that has no journal";
		if (ji->type == JITEM_DEL && vlen)
			return "a deletion has no value";
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
	default:
		return "it is of no known type";
	}
}

static const char *items_wrong(const struct fsck *f, const struct disk_group *g)
{
	const uint8_t *p = (const uint8_t *)(g + 1);
	const uint8_t *end = (const uint8_t *)g + get32(g->bytes);

	for (uint32_t i = 0; i < get32(g->items); i++) {
		const struct disk_jitem *ji = (const void *)p;
		const char *why = item_wrong(f, ji, end);

		if (why)
			return why;
		p = ji->bytes + get16(ji->klen) + get16(ji->vlen);
	}
	return p == end ? NULL : "bytes are left over";
}

/* The highest "durable until here" in the ring. */
static uint64_t attested(struct ring *r)
{
	uint64_t must = get64(r->f->super.durable_seq);
	const char *why;

	for (uint64_t u = 0; u < r->units; u++) {
		const struct disk_group *g = group_load(r, u, &why);

		if (!g)
			continue;
		if (get64(g->durable_seq) > must)
			must = get64(g->durable_seq);
		u += group_units(g) - 1;
	}
	return must;
}

static void follow(struct ring *r)
{
	struct fsck *f = r->f;
	const struct disk_super *s = &f->super;
	uint64_t unit = get64(s->tail_unit), seq = get64(s->tail_seq);
	uint64_t prev = get64(s->tail_prev), start = unit, must = attested(r);
	uint64_t changes = 0;
	const char *why = NULL;

	for (;;) {
		const struct disk_group *g = group_load(r, unit, &why);

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
		if (why) {
			PROBLEM(P_JOURNAL_ITEM, .is = seq, .what = why);
			break;
		}
		prev = get64(g->csum);
		unit += group_units(g);
		seq++;
		f->groups++;
		/* those of a checkpoint itself are no operations */
		changes += get32(g->items) && !get64(g->of_gen);
	}
	if (seq <= must) {
		PROBLEM(P_JOURNAL_GROUP, .is = seq, .what = why);
		f->incomplete = true;
	}
	f->changes = changes;
}

int pass2(struct fsck *f)
{
	const struct disk_super *s = &f->super;
	struct ring r = {.f = f,
			 .units = get64(s->journal_units),
			 .salt = get64(s->salt)};
	struct repair replay = {.kind = REPAIR_REPLAY, .id = P_JOURNAL_REPLAY};
	int ret;

	f->groups = f->changes = 0;
	r.len = (size_t)(r.units * JOURNAL_UNIT);
	r.bytes = big_alloc(r.len);
	r.group = big_alloc(r.len);
	ret = r.bytes && r.group ? 0 : -ENOMEM;
	if (!ret)
		ret = image_pread(f->im, r.bytes, r.len,
				  get64(s->journal_block) << f->shift);
	if (!ret)
		follow(&r);
	free(r.bytes);
	free(r.group);
	if (ret || !f->changes)
		return ret;
	replay.id = get32(s->flags) & SUPER_CLEAN ? P_JOURNAL_CLEAN :
						    P_JOURNAL_REPLAY;
	if (PROBLEM(replay.id, .is = f->changes))
		ret = repair_later(f, &replay);
	return ret;
}
