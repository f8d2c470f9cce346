/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Pass 1: superblocks and backups, as they stand in the image. A slot that is
 * not good is an error when the volume was unmounted cleanly; after a crash it
 * is what the crash was writing. What never changes has to be the same in all
 * copies.
 */
#include "tools/fsck.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define COPIES 4u		/* slots 0 and 1, backups 2 and 3 */

struct copy {
	struct disk_super s;
	const char *why;	/* NULL: good */
};

static uint64_t copy_offset(const struct disk_super *s, unsigned i)
{
	if (i < SUPER_SLOTS)
		return SUPER_SLOT_OFFSET(i);
	if (i == 2)
		return BACKUP_OFFSET;
	return (get64(s->blocks) - 1) << get32(s->block_shift);
}

static void copy_load(struct fsck *f, unsigned i, uint64_t off, struct copy *c)
{
	int ret;

	c->why = NULL;
	if (off + SUPER_BYTES > f->im->bytes) {
		c->why = "the image ends before it";
		return;
	}
	/* it may be the newest: not written over for one failure */
	ret = image_pread(f->im, &c->s, sizeof(c->s), off);
	if (ret)
		ret = image_pread(f->im, &c->s, sizeof(c->s), off);
	if (ret) {
		c->why = strerror(-ret);
		return;
	}
	ret = super_verify(&c->s, i, &c->why);
	if (ret && !c->why)
		c->why = "it cannot be used";
}

bool super_last(struct image *im, struct disk_super *s)
{
	for (unsigned shift = BLOCK_SHIFT_MIN; shift <= BLOCK_SHIFT_MAX; shift++) {
		uint64_t blocks = im->bytes >> shift;

		if (blocks &&
		    !image_pread(im, s, sizeof(*s), (blocks - 1) << shift) &&
		    !super_verify(s, 3, NULL) &&
		    get32(s->block_shift) == shift && get64(s->blocks) == blocks)
			return true;
	}
	return false;
}

/* What never changes: which field differs, or NULL. */
static const char *differs(const struct disk_super *a, const struct disk_super *b)
{
	if (memcmp(a->uuid, b->uuid, sizeof(a->uuid)))
		return "UUID";
	if (memcmp(a->label, b->label, sizeof(a->label)))
		return "label";
	if (get64(a->compat) != get64(b->compat) ||
	    get64(a->ro_compat) != get64(b->ro_compat) ||
	    get64(a->incompat) != get64(b->incompat))
		return "features";
	if (get32(a->block_shift) != get32(b->block_shift))
		return "block size";
	if (get64(a->blocks) != get64(b->blocks))
		return "size";
	if (get64(a->journal_block) != get64(b->journal_block) ||
	    get64(a->journal_units) != get64(b->journal_units))
		return "journal";
	if (get64(a->created_ns) != get64(b->created_ns))
		return "time of creation";
	return NULL;
}

static int copy_write(struct fsck *f, unsigned i, const struct disk_super *from)
{
	struct disk_super s = *from;
	int ret;

	super_seal(&s, i);
	ret = heart_look(f->heart);
	if (!ret)
		ret = image_pwrite(f->im, &s, sizeof(s), copy_offset(from, i));
	if (!ret)
		ret = image_flush(f->im);
	if (ret)
		cli_warn("cannot write superblock %u of '%s': %s", i, f->path,
			 strerror(-ret));
	return ret;
}

/* A backup holds what mkfs wrote: keep its state, take the rest from `s`. */
static void backup_from(struct disk_super *out, const struct disk_super *s,
			const struct copy *old)
{
	*out = *s;
	if (!old->why)
		memcpy((char *)out + offsetof(struct disk_super, gen),
		       (const char *)&old->s + offsetof(struct disk_super, gen),
		       offsetof(struct disk_super, csum) -
			       offsetof(struct disk_super, gen));
}

/* Later: what cannot be used here may be the newer one, as pass 2 can tell. */
static int repair_copy(struct fsck *f, enum problem_id id, bool yes, unsigned i)
{
	struct repair r = {.kind = REPAIR_COPY, .id = id, .a = i};

	return yes ? repair_later(f, &r) : 0;
}

static int check_slots(struct fsck *f, const struct copy *c, unsigned good)
{
	const struct disk_super *s = &c[good].s;
	bool clean = get32(s->flags) & SUPER_CLEAN;
	enum problem_id id = clean ? P_SUPER_SLOT : P_SUPER_TORN;
	const struct copy *other = &c[1 - good];
	const char *what;

	if (other->why)
		return repair_copy(f, id,
				   PROBLEM(id, .is = 1 - good,
					   .what = other->why),
				   1 - good);
	what = differs(&other->s, s);
	if (what)
		return repair_copy(f, P_SUPER_DIFFER,
				   PROBLEM(P_SUPER_DIFFER, .is = 1 - good,
					   .what = what),
				   1 - good);
	return 0;
}

static int check_backup(struct fsck *f, const struct copy *c,
			const struct disk_super *s, unsigned i)
{
	const char *what = c->why ? c->why : differs(&c->s, s);
	enum problem_id id = c->why ? P_BACKUP_BAD : P_BACKUP_DIFFERS;

	if (!what)
		return 0;
	return repair_copy(f, id, PROBLEM(id, .is = i, .what = what), i);
}

/* The superblock that counts: the newer good one. */
static int newest(const struct copy *c)
{
	if (c[0].why && c[1].why)
		return -1;
	if (c[0].why)
		return 1;
	if (c[1].why)
		return 0;
	return get64(c[1].s.gen) > get64(c[0].s.gen);
}

/* Both slots by the same state, the older one first: a crash leaves one. */
static int slots_write(struct fsck *f, const struct disk_super *s)
{
	int ret = copy_write(f, 1 - f->slot, s);

	if (!ret)
		ret = copy_write(f, f->slot, s);
	if (!ret)
		f->super = *s;
	return ret;
}

int super_replace(struct fsck *f, const struct disk_super *s)
{
	/* copies of what this is in place of */
	repairs_fini(&f->repairs);
	return slots_write(f, s);
}

int rescue(struct fsck *f, enum problem_id id, const struct disk_super *from)
{
	struct disk_super s;
	struct disk_super found;
	int ret = 0;

	if (!from) {
		ret = guess_super(f, &found);
		from = &found;
	}
	if (!ret)
		ret = rescue_super(f, from, &s);
	if (ret == -ENOENT) {
		PROBLEM(P_SUPER_NO_TREE, .is = 0);
		f->super_good = false;
		return 0;
	}
	if (!ret)
		ret = super_replace(f, &s);
	/* Between the tree that was found and the journal something may lack. */
	if (!ret)
		ret = gap_anywhere(f);
	if (ret)
		return ret;
	problem_fixed(id);
	f->super_good = false;		/* look again before all else */
	return 0;
}

static int both_lost(struct fsck *f, struct copy *c)
{
	const struct copy *from = &c[2];

	if (from->why) {
		from = &c[3];
		c[3].why = super_last(f->im, &c[3].s) ?
				   NULL :
				   "there is none at the end of the image";
	}
	if (!from->why) {
		if (PROBLEM(P_SUPER_LOST, .is = from == &c[2] ? 2 : 3,
			    .what = c[0].why))
			return rescue(f, P_SUPER_LOST, &from->s);
		return 0;
	}
	if (PROBLEM(P_SUPER_NONE, .what = c[0].why))
		return rescue(f, P_SUPER_NONE, NULL);
	return 0;
}

/* Nothing says what stood behind the end: zeroes, which are no node and no data. */
static int lengthen(struct fsck *f, uint64_t bytes)
{
	int ret;

	if (!PROBLEM(P_SUPER_SHORT, .is = f->im->bytes, .want = bytes))
		return 0;
	ret = heart_look(f->heart);
	if (!ret)
		ret = f->im->ops->resize(f->im, bytes);
	if (ret)
		cli_warn("cannot make '%s' as long again: %s", f->path,
			 strerror(-ret));
	else
		problem_fixed(P_SUPER_SHORT);
	return 0;
}

int pass1(struct fsck *f)
{
	struct copy c[COPIES];
	const struct disk_super *s;
	uint64_t bytes;
	int good, ret = 0;

	for (unsigned i = 0; i < 3; i++)
		copy_load(f, i, copy_offset(NULL, i), &c[i]);
	good = newest(c);
	f->super_good = good >= 0;
	if (good < 0)
		return both_lost(f, c);
	s = &c[good].s;
	f->super = *s;
	f->slot = (unsigned)good;
	f->shift = get32(s->block_shift);
	f->blocks = get64(s->blocks);
	f->per_bitmap = 8ull << f->shift;
	bytes = f->blocks << f->shift;
	if (bytes > f->im->bytes)
		ret = lengthen(f, bytes);
	copy_load(f, 3, copy_offset(s, 3), &c[3]);
	if (!ret)
		ret = check_slots(f, c, (unsigned)good);
	for (unsigned i = SUPER_SLOTS; !ret && i < COPIES; i++)
		ret = check_backup(f, &c[i], s, i);
	return ret;
}

/* ---- counts in the superblock ----------------------------------------------------- */

static void super_set(struct disk_super *s, uint64_t field, uint64_t value)
{
	if (field == SUPER_FREE)
		s->free_blks = put64(value);
	else if (field == SUPER_INODES)
		s->inodes = put64(value);
	else if (field == SUPER_ASIDE)
		s->aside = put64(value);
	else if (field == SUPER_NEXT_INO)
		s->next_ino = put64(value);
	else if (field >= SUPER_NODES && field < SUPER_NODES + TABLES)
		s->root[field - SUPER_NODES].nodes = put64(value);
	else if (field >= SUPER_ITEMS && field < SUPER_ITEMS + TABLES)
		s->root[field - SUPER_ITEMS].items = put64(value);
}

/* What pass 1 noted, now that the superblock it is to be written from has held. */
static int repair_copies(struct fsck *f)
{
	int ret = 0;

	for (size_t i = 0; !ret && i < f->repairs.count; i++) {
		const struct repair *r = &f->repairs.v[i];
		struct disk_super fresh = f->super;
		struct copy old;

		if (r->kind != REPAIR_COPY)
			continue;
		if (r->a >= SUPER_SLOTS) {
			copy_load(f, (unsigned)r->a,
				  copy_offset(&f->super, (unsigned)r->a), &old);
			backup_from(&fresh, &f->super, &old);
		}
		ret = copy_write(f, (unsigned)r->a, &fresh);
		if (!ret)
			problem_fixed(r->id);
	}
	return ret;
}

/*
 * Correct counts. The number of the checkpoint stays, for groups in the journal
 * refer to it; so the other slot gets the same superblock first, and a crash
 * in between leaves one that is whole.
 */
int repair_super(struct fsck *f)
{
	struct disk_super s = f->super;
	bool any = false;
	int ret = repair_copies(f);

	for (size_t i = 0; !ret && i < f->repairs.count; i++) {
		const struct repair *r = &f->repairs.v[i];

		if (r->kind != REPAIR_SUPER)
			continue;
		super_set(&s, r->a, r->b);
		any = true;
	}
	if (ret || !any)
		return ret;
	ret = slots_write(f, &s);
	for (size_t i = 0; !ret && i < f->repairs.count; i++)
		if (f->repairs.v[i].kind == REPAIR_SUPER)
			problem_fixed(f->repairs.v[i].id);
	return ret;
}
