/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Pass 7: shared blocks. All references to blocks that the table counts were
 * collected as extents; here they are swept in order of address, and each
 * stretch of one count is held against the table. Blocks that are referred to
 * twice and stand in no count were found when they were met (fsck_own), and
 * their owners are named by the second look.
 */
#include "tools/fsck.h"

#include <stdlib.h>

/* ---- the sweep -------------------------------------------------------------- */

struct edge {
	uint64_t at;
	int64_t by;
};

static int edge_cmp(const void *a, const void *b)
{
	const struct edge *x = a, *y = b;

	return (x->at > y->at) - (x->at < y->at);
}

int refs_sweep(struct fsck *f, const struct runs *refs,
	       int (*fn)(struct fsck *f, uint64_t from, uint64_t to,
			 uint64_t count))
{
	size_t n = 2 * refs->count;
	struct edge *e = malloc((n ? n : 1) * sizeof(*e));
	uint64_t at = 0, count = 0;
	int ret = 0;

	if (!e)
		return -ENOMEM;
	for (size_t i = 0; i < refs->count; i++) {
		const struct extent *x = &refs->v[i];

		e[2 * i] = (struct edge){x->start, 1};
		e[2 * i + 1] = (struct edge){x->start + x->len, -1};
	}
	qsort(e, n, sizeof(*e), edge_cmp);
	for (size_t i = 0; !ret && i < n; i++) {
		if (e[i].at > at)
			ret = fn(f, at, e[i].at, count);
		at = e[i].at;
		count = (uint64_t)((int64_t)count + e[i].by);
	}
	if (!ret)
		ret = fn(f, at, f->blocks, count);
	free(e);
	return ret;
}

/* ---- against the table --------------------------------------------------------- */

/* The counts as they should be, and the first item of the table not passed. */
static struct ref_run *stretch;
static size_t stretches, stretch_room, ref_next;

static int stretch_note(uint64_t start, uint64_t len, uint64_t count)
{
	struct ref_run *last = stretches ? &stretch[stretches - 1] : NULL, *p;

	if (last && last->start + last->len == start && last->count == count) {
		last->len += len;
		return 0;
	}
	p = grow(stretch, sizeof(*p), stretches, &stretch_room);
	if (!p)
		return -ENOMEM;
	stretch = p;
	p[stretches++] = (struct ref_run){start, len, (uint32_t)count};
	return 0;
}

/* Blocks [from, to) have `count` references: does the table say so? */
static int check_stretch(struct fsck *f, uint64_t from, uint64_t to,
			 uint64_t count)
{
	int ret = 0;

	while (!ret && from < to) {
		const struct ref_run *r;
		uint64_t end = to;

		while (ref_next < f->ref_count &&
		       f->refs[ref_next].start + f->refs[ref_next].len <= from)
			ref_next++;
		if (ref_next == f->ref_count)
			return 0;
		r = &f->refs[ref_next];
		if (r->start >= to)
			return 0;
		if (from < r->start)
			from = r->start;
		if (r->start + r->len < end)
			end = r->start + r->len;
		if (r->count != count &&
		    PROBLEM(P_REF_COUNT, .blk = from, .len = end - from,
			    .is = r->count, .want = count))
			f->refs_anew = true;
		if (count > 1)
			ret = stretch_note(from, end - from, count);
		from = end;
	}
	return ret;
}

/* Once one count is to be corrected, the table's counts are all set anew. */
static int refs_anew(struct fsck *f)
{
	struct repair r = {.kind = REPAIR_REF, .id = P_REF_COUNT};
	int ret = 0;

	for (size_t i = 0; !ret && i < f->ref_count; i++) {
		r.a = f->refs[i].start;
		r.b = f->refs[i].len;
		r.ino = 0;
		ret = repair_later(f, &r);
	}
	for (size_t i = 0; !ret && i < stretches; i++) {
		r.a = stretch[i].start;
		r.b = stretch[i].len;
		r.ino = stretch[i].count;
		ret = repair_later(f, &r);
	}
	return ret;
}

static int check_flags(struct fsck *f)
{
	int ret = 0;

	for (size_t i = 0; !ret && i < f->inodes.count; i++) {
		const struct ino_rec *r = &f->inodes.rec[i];
		struct repair p = {.kind = REPAIR_ATTR,
				   .id = P_REF_FLAG,
				   .ino = r->ino,
				   .a = FIELD_SHARED,
				   .b = 1};

		if ((r->flags & (INO_SHARES | INO_SHARED)) != INO_SHARES)
			continue;
		if (PROBLEM(P_REF_FLAG, .ino = r->ino))
			ret = repair_later(f, &p);
	}
	return ret;
}

int pass7(struct fsck *f)
{
	int ret = 0;

	if (!f->ref_count)
		return 0;
	stretches = ref_next = 0;
	f->refs_anew = false;
	if (!f->incomplete)
		ret = refs_sweep(f, &f->shared, check_stretch);
	if (!ret && f->refs_anew)
		ret = refs_anew(f);
	return ret ? ret : check_flags(f);
}
