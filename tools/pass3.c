/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Pass 3: the table of references: how often shared blocks are referred to,
 * which inodes are orphans, what intents there are. They are loaded here, and
 * held against the files in passes 6 and 7.
 */
#include "tools/fsck.h"

#include <stdlib.h>
#include <string.h>

static int load_ref(struct fsck *f, uint64_t start, const uint8_t *val, size_t vlen)
{
	struct disk_ref d;
	const struct ref_run *last =
		f->ref_count ? &f->refs[f->ref_count - 1] : NULL;
	const char *why = NULL;
	struct ref_run *p;

	if (vlen != sizeof(d)) {
		return ITEM_AWAY(f, P_VALUE_FORM, .name = table_name(TABLE_REFS),
				 .ino = start, .what = "a reference count");
	}
	memcpy(&d, val, sizeof(d));
	if (!fsck_in_volume(f, start, get64(d.len)))
		why = "they are not within the volume";
	else if (last && last->start + last->len > start)
		why = "they overlap those before";
	else if (get32(d.count) < 2)
		why = "one reference needs no count";
	else if (get32(d.reserved))
		why = "reserved bytes are not zero";
	if (why && ITEM_AWAY(f, P_REF_FORM, .blk = start, .len = get64(d.len),
			     .what = why))
		return -ENOMEM;
	if (!fsck_in_volume(f, start, get64(d.len)) ||
	    (last && last->start + last->len > start))
		return 0;
	p = grow(f->refs, sizeof(*p), f->ref_count, &f->ref_room);
	if (!p)
		return -ENOMEM;
	f->refs = p;
	p[f->ref_count++] = (struct ref_run){start, get64(d.len), get32(d.count)};
	return 0;
}

static int load_orphan(struct fsck *f, uint64_t ino, size_t vlen)
{
	struct ino_rec *r;

	if (vlen)
		return ITEM_AWAY(f, P_VALUE_FORM, .name = table_name(TABLE_REFS),
				 .ino = ino, .what = "an orphan");
	r = ino_need(&f->inodes, ino);
	if (!r)
		return -ENOMEM;
	r->flags |= INO_ORPHAN;
	return 0;
}

static int load_intent(struct fsck *f, uint64_t ino, const uint8_t *val,
		       size_t vlen)
{
	struct disk_intent d;
	struct intent_run *p;
	struct ino_rec *r;

	if (vlen != sizeof(d)) {
		return ITEM_AWAY(f, P_VALUE_FORM, .name = table_name(TABLE_REFS),
				 .ino = ino, .what = "an intent");
	}
	memcpy(&d, val, sizeof(d));
	if (get64(d.from) >= get64(d.to) &&
	    ITEM_AWAY(f, P_INTENT_RANGE, .ino = ino, .is = get64(d.from),
		      .want = get64(d.to)))
		return -ENOMEM;
	r = ino_need(&f->inodes, ino);
	if (!r)
		return -ENOMEM;
	r->flags |= INO_INTENT;
	p = grow(f->intents, sizeof(*p), f->intent_count, &f->intent_room);
	if (!p)
		return -ENOMEM;
	f->intents = p;
	p[f->intent_count++] = (struct intent_run){ino, get64(d.from), get64(d.to)};
	return 0;
}

static int refs_item(struct fsck *f, const uint8_t *key, size_t klen,
		     const uint8_t *val, size_t vlen)
{
	uint64_t n = klen == 9 ? be64_get(key + 1) : 0;

	if (klen != 9) {
		return ITEM_AWAY(f, P_KEY_FORM, .name = table_name(TABLE_REFS),
				 .what = "its length");
	}
	switch (key[0]) {
	case KEY_REF:
		return load_ref(f, n, val, vlen);
	case KEY_ORPHAN:
		return load_orphan(f, n, vlen);
	case KEY_INTENT:
		return load_intent(f, n, val, vlen);
	default:
		return ITEM_AWAY(f, P_KEY_FORM, .name = table_name(TABLE_REFS),
				 .ino = n, .what = "its type");
	}
}

int pass3(struct fsck *f)
{
	int ret = fsck_walk(f, TABLE_REFS, refs_item);

	return ret ? ret : fsck_own_counted(f);
}
