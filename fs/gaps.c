/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Gaps: what a file of which nothing may change has still to get.
 *
 * The kernel takes what is appended into its cache and hands it over later, in
 * several requests that several threads serve: what was appended last may come
 * first. Then the file's end moves beyond bytes that are on their way. They are
 * a gap, and only they may be written below the end of an append-only file,
 * once: a hole that was there before is as unchangeable as data.
 *
 * Gaps are known in memory alone. After a mount nothing is on its way, and when
 * the kernel has forgotten an inode, nothing of it is.
 *
 * Most of the time no file has any, which costs a look at one number.
 */
#include "fs/fs_priv.h"

#include <stdlib.h>

struct gap_file {
	struct gap_file *next;
	uint64_t ino;
	unsigned watches;		/* calls that want its gaps noted */
	size_t count, cap;
	struct gap *gap;		/* in order, none touches another */
};

void gaps_init(struct gaps *g)
{
	*g = (struct gaps){0};
	lock_init(&g->lock, RANK_LEAF, "gaps");
}

static struct gap_file **slot_locked(struct gaps *g, uint64_t ino)
{
	struct gap_file **p = &g->first;

	while (*p && (*p)->ino != ino)
		p = &(*p)->next;
	return p;
}

static void remove_locked(struct gaps *g, struct gap_file **p)
{
	struct gap_file *f = *p;

	*p = f->next;
	free(f->gap);
	free(f);
	__atomic_sub_fetch(&g->files, 1, __ATOMIC_RELEASE);
}

void gaps_fini(struct gaps *g)
{
	while (g->first)
		remove_locked(g, &g->first);
	lock_fini(&g->lock);
}

static struct gap_file *file_make_locked(struct gaps *g, uint64_t ino)
{
	struct gap_file *f = *slot_locked(g, ino);

	if (f || !(f = calloc(1, sizeof(*f))))
		return f;
	f->ino = ino;
	f->next = g->first;
	g->first = f;
	__atomic_add_fetch(&g->files, 1, __ATOMIC_RELEASE);
	return f;
}

int gaps_watch(struct gaps *g, uint64_t ino)
{
	struct gap_file *f;

	lock_lock(&g->lock);
	f = file_make_locked(g, ino);
	if (f)
		f->watches++;
	lock_unlock(&g->lock);
	return f ? 0 : -ENOMEM;
}

/* A file that has no gaps, and that nobody watches, need not be known. */
static void tidy_locked(struct gaps *g, uint64_t ino)
{
	struct gap_file **p = slot_locked(g, ino);

	if (*p && !(*p)->count && !(*p)->watches)
		remove_locked(g, p);
}

void gaps_unwatch(struct gaps *g, uint64_t ino)
{
	struct gap_file *f;

	lock_lock(&g->lock);
	f = *slot_locked(g, ino);
	if (f && f->watches)
		f->watches--;
	tidy_locked(g, ino);
	lock_unlock(&g->lock);
}

static bool gap_room(struct gap_file *f)
{
	size_t cap = f->cap ? f->cap * 2 : 8;
	void *p;

	if (f->count < f->cap)
		return true;
	p = realloc(f->gap, cap * sizeof(*f->gap));
	if (!p)
		return false;
	f->gap = p;
	f->cap = cap;
	return true;
}

static void gap_remove(struct gap_file *f, size_t i)
{
	memmove(&f->gap[i], &f->gap[i + 1],
		(--f->count - i) * sizeof(*f->gap));
}

/* Take [from, to) out of what is missing. */
static void fill_locked(struct gap_file *f, uint64_t from, uint64_t to)
{
	for (size_t i = 0; i < f->count;) {
		struct gap *e = &f->gap[i];

		if (e->to <= from || e->from >= to) {
			i++;
		} else if (e->from >= from && e->to <= to) {
			gap_remove(f, i);
		} else if (e->from >= from) {
			e->from = to;
			i++;
		} else if (e->to <= to) {
			e->to = from;
			i++;
		} else if (gap_room(f)) {
			memmove(&f->gap[i + 1], &f->gap[i],
				(f->count++ - i) * sizeof(*f->gap));
			f->gap[i].to = from;
			f->gap[i + 1].from = to;
			i += 2;
		} else {
			/* No memory: the middle may come once more. */
			i++;
		}
	}
}

int gaps_add(struct gaps *g, uint64_t ino, bool append, uint64_t from, uint64_t to)
{
	struct gap_file *f;
	int err = 0;

	if (!append && !gaps_any(g))
		return 0;
	lock_lock(&g->lock);
	f = append ? file_make_locked(g, ino) : *slot_locked(g, ino);
	if (!f) {
		err = append ? -ENOMEM : 0;
	} else if (!gap_room(f)) {
		err = -ENOMEM;
	} else {
		/* What a write that failed has left here says nothing. */
		fill_locked(f, from, UINT64_MAX);
		f->gap[f->count++] = (struct gap){from, to};
	}
	lock_unlock(&g->lock);
	return err;
}

void gaps_fill(struct gaps *g, uint64_t ino, uint64_t from, uint64_t to)
{
	struct gap_file *f;

	if (!gaps_any(g))
		return;
	lock_lock(&g->lock);
	f = *slot_locked(g, ino);
	if (f)
		fill_locked(f, from, to);
	tidy_locked(g, ino);
	lock_unlock(&g->lock);
}

struct gap gaps_next(struct gaps *g, uint64_t ino, uint64_t at)
{
	struct gap found = {UINT64_MAX, UINT64_MAX};
	const struct gap_file *f;

	if (!gaps_any(g))
		return found;
	lock_lock(&g->lock);
	f = *slot_locked(g, ino);
	for (size_t i = 0; f && i < f->count; i++)
		if (f->gap[i].to > at) {
			found = f->gap[i];
			break;
		}
	lock_unlock(&g->lock);
	if (found.from < at)
		found.from = at;
	return found;
}

void gaps_drop(struct gaps *g, uint64_t ino)
{
	struct gap_file **p;

	if (!gaps_any(g))
		return;
	lock_lock(&g->lock);
	p = slot_locked(g, ino);
	if (*p)
		(*p)->count = 0;
	tidy_locked(g, ino);
	lock_unlock(&g->lock);
}
