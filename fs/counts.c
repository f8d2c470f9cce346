/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Lookup counts: how often the kernel has been told of each inode, less what
 * it has forgotten. 16 bytes an inode in open-addressed tables, sharded by
 * number, because the kernel may hold millions and an inode in memory for each
 * would cost twenty times that.
 *
 * An entry carries two marks beside its count:
 *
 *   ORPHAN  the last name is gone (set after the commit that removed it, under
 *           the inode's lock; taken off by a link)
 *   EVICT   somebody is freeing the inode; nobody may count it any more
 *
 * Whoever brings an entry to "count 0 and ORPHAN" sets EVICT under the same
 * lock and frees the inode: so exactly one does, and a lookup by number (an
 * NFS handle) comes either before, and is counted, or after, and is stale.
 * When unlink finds no entry at all, it makes one with EVICT. Numbers are
 * never used twice, so a late answer cannot meet a new inode.
 */
#include "fs/fs_priv.h"

#include <stdlib.h>

#define COUNT_ORPHAN (1ull << 63)
#define COUNT_EVICT (1ull << 62)
#define COUNT_MARKS (COUNT_ORPHAN | COUNT_EVICT)
#define CAP_MIN 64

struct count {
	uint64_t ino;		/* 0: the slot is free */
	uint64_t n;		/* with the marks */
};

static uint64_t hash(uint64_t ino)
{
	ino *= 0x9e3779b97f4a7c15ull;
	return ino ^ ino >> 32;
}

static struct count_shard *shard_lock(struct counts *c, uint64_t ino)
{
	struct count_shard *s = &c->shard[hash(ino) % COUNT_SHARDS];

	lock_lock(&s->lock);
	return s;
}

static size_t home(const struct count_shard *s, uint64_t ino)
{
	return (hash(ino) / COUNT_SHARDS) & (s->cap - 1);
}

static struct count *find(struct count_shard *s, uint64_t ino)
{
	if (!s->cap)
		return NULL;
	for (size_t i = home(s, ino); s->slots[i].ino; i = (i + 1) & (s->cap - 1))
		if (s->slots[i].ino == ino)
			return &s->slots[i];
	return NULL;
}

static struct count *place(struct count_shard *s, uint64_t ino)
{
	size_t i = home(s, ino);

	while (s->slots[i].ino)
		i = (i + 1) & (s->cap - 1);
	s->slots[i].ino = ino;
	s->used++;
	return &s->slots[i];
}

static int resize(struct count_shard *s, size_t cap)
{
	struct count *old = s->slots;
	size_t old_cap = s->cap;
	struct count *slots = calloc(cap, sizeof(*slots));

	if (!slots)
		return -ENOMEM;
	s->slots = slots;
	s->cap = cap;
	s->used = 0;
	for (size_t i = 0; i < old_cap; i++)
		if (old[i].ino)
			place(s, old[i].ino)->n = old[i].n;
	free(old);
	return 0;
}

static struct count *insert(struct count_shard *s, uint64_t ino)
{
	if ((s->used + 1) * 4 > s->cap * 3 &&
	    resize(s, s->cap ? s->cap * 2 : CAP_MIN) && s->used + 1 >= s->cap)
		return NULL;
	return place(s, ino);
}

/* Close the gap that `e` leaves, so that no search ends too early. */
static void erase(struct count_shard *s, struct count *e)
{
	size_t mask = s->cap - 1, gap = (size_t)(e - s->slots), i = gap;

	while (s->slots[i = (i + 1) & mask].ino) {
		size_t h = home(s, s->slots[i].ino);

		if (((i - h) & mask) < ((i - gap) & mask))
			continue;
		s->slots[gap] = s->slots[i];
		gap = i;
	}
	s->slots[gap] = (struct count){0};
	s->used--;
	if (s->cap > CAP_MIN && s->used * 8 < s->cap)
		resize(s, s->cap / 2);
}

void counts_init(struct counts *c)
{
	for (int i = 0; i < COUNT_SHARDS; i++) {
		c->shard[i] = (struct count_shard){0};
		lock_init(&c->shard[i].lock, RANK_FS_HANDLES, "lookup counts");
	}
}

void counts_fini(struct counts *c)
{
	for (int i = 0; i < COUNT_SHARDS; i++) {
		free(c->shard[i].slots);
		lock_fini(&c->shard[i].lock);
	}
}

int counts_add(struct counts *c, uint64_t ino)
{
	struct count_shard *s = shard_lock(c, ino);
	struct count *e = find(s, ino);
	int err = 0;

	if (!e)
		e = insert(s, ino);
	if (!e)
		err = -ENOMEM;
	else if (e->n & COUNT_EVICT)
		err = -ESTALE;
	else
		e->n++;
	lock_unlock(&s->lock);
	return err;
}

bool counts_sub(struct counts *c, uint64_t ino, uint64_t n)
{
	struct count_shard *s = shard_lock(c, ino);
	struct count *e = find(s, ino);
	bool evict = false;

	if (e && !(e->n & COUNT_EVICT)) {
		uint64_t have = e->n & ~COUNT_MARKS;

		e->n -= n < have ? n : have;
		if (e->n == COUNT_ORPHAN) {
			e->n = COUNT_EVICT;
			evict = true;
		} else if (!e->n) {
			erase(s, e);
		}
	}
	lock_unlock(&s->lock);
	return evict;
}

bool counts_orphan(struct counts *c, uint64_t ino)
{
	struct count_shard *s = shard_lock(c, ino);
	struct count *e = find(s, ino);
	bool evict = false;

	if (e) {
		e->n |= COUNT_ORPHAN;
	} else if ((e = insert(s, ino))) {
		e->n = COUNT_EVICT;
		evict = true;
	} /* else no memory: it stays an orphan until the next mount */
	lock_unlock(&s->lock);
	return evict;
}

void counts_adopt(struct counts *c, uint64_t ino)
{
	struct count_shard *s = shard_lock(c, ino);
	struct count *e = find(s, ino);

	if (e)
		e->n &= ~COUNT_ORPHAN;
	lock_unlock(&s->lock);
}

bool counts_known(struct counts *c, uint64_t ino)
{
	struct count_shard *s = shard_lock(c, ino);
	bool known = find(s, ino);

	lock_unlock(&s->lock);
	return known;
}

void counts_evicted(struct counts *c, uint64_t ino)
{
	struct count_shard *s = shard_lock(c, ino);
	struct count *e = find(s, ino);

	if (e)
		erase(s, e);
	lock_unlock(&s->lock);
}

static uint64_t take_orphan(struct count_shard *s)
{
	for (size_t i = 0; i < s->cap; i++) {
		struct count *e = &s->slots[i];

		if (!(e->n & COUNT_ORPHAN) || (e->n & COUNT_EVICT))
			continue;
		e->n = COUNT_EVICT;
		return e->ino;
	}
	return 0;
}

uint64_t counts_take_orphan(struct counts *c)
{
	uint64_t ino = 0;

	for (int i = 0; !ino && i < COUNT_SHARDS; i++) {
		lock_lock(&c->shard[i].lock);
		ino = take_orphan(&c->shard[i]);
		lock_unlock(&c->shard[i].lock);
	}
	return ino;
}
