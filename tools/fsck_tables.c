/* SPDX-License-Identifier: BSD-2-Clause */
/* The tables of all inodes and all blocks, and lists of extents. */
#include "tools/fsck.h"

#include <stdlib.h>
#include <string.h>

void *grow(void *v, size_t size, size_t count, size_t *room)
{
	size_t want = *room ? *room * 2 : 64;
	void *p;

	if (count < *room)
		return v;
	p = realloc(v, want * size);
	if (p)
		*room = want;
	return p;
}

/* ---- inodes ------------------------------------------------------------------- */

static size_t ino_hash(uint64_t ino)
{
	return (size_t)((ino * 0x9e3779b97f4a7c15ull) >> 20);
}

struct ino_rec *ino_find(struct ino_table *t, uint64_t ino)
{
	if (!t->hash)
		return NULL;
	/* Mostly it is the one of last time, or that after it. */
	for (size_t i = t->last; i < t->count && i < t->last + 2; i++)
		if (t->rec[i].ino == ino)
			return &t->rec[t->last = i];
	for (size_t i = ino_hash(ino);; i++) {
		uint32_t at = t->hash[i & t->mask];

		if (!at)
			return NULL;
		if (t->rec[at - 1].ino == ino)
			return &t->rec[t->last = at - 1];
	}
}

static void ino_link(struct ino_table *t, size_t place)
{
	size_t i = ino_hash(t->rec[place].ino);

	while (t->hash[i & t->mask])
		i++;
	t->hash[i & t->mask] = (uint32_t)(place + 1);
}

static int ino_rehash(struct ino_table *t)
{
	size_t slots = t->hash ? (t->mask + 1) * 2 : 1024;
	uint32_t *hash;

	while (slots / 3 * 2 < t->room)
		slots *= 2;
	hash = big_alloc(slots * sizeof(*hash));
	if (!hash)
		return -ENOMEM;
	memset(hash, 0, slots * sizeof(*hash));
	free(t->hash);
	t->hash = hash;
	t->mask = slots - 1;
	for (size_t i = 0; i < t->count; i++)
		ino_link(t, i);
	return 0;
}

int ino_init(struct ino_table *t, uint64_t expected)
{
	size_t n = (size_t)(expected + expected / 64 + 64);

	t->rec = big_alloc(n * sizeof(*t->rec));
	if (!t->rec)
		return -ENOMEM;
	t->room = n;
	return 0;
}

struct ino_rec *ino_need(struct ino_table *t, uint64_t ino)
{
	struct ino_rec *r = ino_find(t, ino);

	if (r)
		return r;
	if (t->count == UINT32_MAX - 1)
		return NULL;
	r = grow(t->rec, sizeof(*t->rec), t->count, &t->room);
	if (!r)
		return NULL;
	t->rec = r;
	if (!t->hash || t->count >= (t->mask + 1) / 3 * 2)
		if (ino_rehash(t))
			return NULL;
	r = &t->rec[t->count];
	memset(r, 0, sizeof(*r));
	r->ino = ino;
	ino_link(t, t->last = t->count++);
	return r;
}

struct dir_rec *dir_need(struct ino_table *t, struct ino_rec *r)
{
	struct dir_rec *d;

	if (r->dir)
		return &t->dirs[r->dir - 1];
	d = grow(t->dirs, sizeof(*t->dirs), t->dir_count, &t->dir_room);
	if (!d)
		return NULL;
	t->dirs = d;
	d = &t->dirs[t->dir_count++];
	memset(d, 0, sizeof(*d));
	d->ino = r->ino;
	r->dir = (uint32_t)t->dir_count;
	return d;
}

void ino_fini(struct ino_table *t)
{
	free(t->rec);
	free(t->hash);
	free(t->dirs);
	memset(t, 0, sizeof(*t));
}

/* ---- blocks -------------------------------------------------------------------- */

int blocks_init(struct blocks *b, uint64_t blocks)
{
	b->pages = (blocks + BLOCKS_PAGE - 1) / BLOCKS_PAGE;
	b->page = calloc(b->pages, sizeof(*b->page));
	b->some = calloc(b->pages / BLOCKS_GROUP + 1, 1);
	return b->page && b->some ? 0 : -ENOMEM;
}

void blocks_fini(struct blocks *b)
{
	for (uint64_t i = 0; b->page && b->some && i < b->pages;
	     i = blocks_next(b, i + 1))
		free(b->page[i]);
	free(b->page);
	free(b->some);
	memset(b, 0, sizeof(*b));
}

static bool bit_get(const uint8_t *page, uint64_t i)
{
	return page[i / 8] >> (i % 8) & 1;
}

int64_t blocks_put(struct blocks *b, uint64_t start, uint64_t len, bool *twice)
{
	uint64_t at = start % BLOCKS_PAGE, n = 0;
	uint8_t **page = &b->page[start / BLOCKS_PAGE];

	if (!*page) {
		*page = calloc(1, BLOCKS_PAGE / 8);
		if (!*page)
			return -ENOMEM;
		b->some[start / BLOCKS_PAGE / BLOCKS_GROUP] = 1;
	}
	if (len > BLOCKS_PAGE - at)
		len = BLOCKS_PAGE - at;
	*twice = bit_get(*page, at);
	while (n < len && bit_get(*page, at + n) == *twice) {
		if (!*twice && (at + n) % 8 == 0 && len - n >= 8 &&
		    !(*page)[(at + n) / 8]) {
			(*page)[(at + n) / 8] = 0xff;
			n += 8;
			continue;
		}
		(*page)[(at + n) / 8] |= (uint8_t)(1u << ((at + n) % 8));
		n++;
	}
	return (int64_t)n;
}

uint64_t blocks_next(const struct blocks *b, uint64_t page)
{
	while (page < b->pages && !b->page[page]) {
		page++;
		while (page < b->pages && page % BLOCKS_GROUP == 0 &&
		       !b->some[page / BLOCKS_GROUP])
			page += BLOCKS_GROUP;
	}
	return page < b->pages ? page : b->pages;
}

const uint8_t *blocks_page(const struct blocks *b, uint64_t page)
{
	return page < b->pages ? b->page[page] : NULL;
}

/* ---- places ---------------------------------------------------------------------- */

static size_t index_hash(uint64_t key)
{
	return (size_t)((key * 0x9e3779b97f4a7c15ull) >> 20);
}

static void index_put(struct index *x, uint64_t key, size_t place)
{
	size_t i = index_hash(key);

	while (x->slot[i & x->mask].place)
		i++;
	x->slot[i & x->mask] = (struct index_slot){key, place + 1};
}

static int index_grow(struct index *x)
{
	struct index more = {.mask = x->slot ? x->mask * 2 + 1 : 1023,
			     .count = x->count};

	more.slot = calloc(more.mask + 1, sizeof(*more.slot));
	if (!more.slot)
		return -ENOMEM;
	for (size_t i = 0; x->slot && i <= x->mask; i++)
		if (x->slot[i].place)
			index_put(&more, x->slot[i].key, x->slot[i].place - 1);
	free(x->slot);
	*x = more;
	return 0;
}

int index_add(struct index *x, uint64_t key, size_t place)
{
	if ((!x->slot || x->count >= x->mask / 2) && index_grow(x))
		return -ENOMEM;
	index_put(x, key, place);
	x->count++;
	return 0;
}

bool index_next(const struct index *x, uint64_t key, size_t *at, size_t *place)
{
	while (x->slot) {
		const struct index_slot *s =
			&x->slot[(index_hash(key) + (*at)++) & x->mask];

		if (!s->place)
			return false;
		*place = s->place - 1;
		if (s->key == key)
			return true;
	}
	return false;
}

void index_fini(struct index *x)
{
	free(x->slot);
	*x = (struct index){0};
}

/* ---- extents --------------------------------------------------------------------- */

int runs_add(struct runs *r, uint64_t start, uint64_t len)
{
	struct extent *last = r->count ? &r->v[r->count - 1] : NULL;

	if (last && last->start + last->len == start) {
		last->len += len;
		return 0;
	}
	last = grow(r->v, sizeof(*r->v), r->count, &r->room);
	if (!last)
		return -ENOMEM;
	r->v = last;
	r->v[r->count++] = (struct extent){start, len};
	return 0;
}

static int run_cmp(const void *a, const void *b)
{
	const struct extent *x = a, *y = b;

	return (x->start > y->start) - (x->start < y->start);
}

void runs_sort(struct runs *r)
{
	size_t kept = 0;

	if (r->count < 2)
		return;
	qsort(r->v, r->count, sizeof(*r->v), run_cmp);
	for (size_t i = 1; i < r->count; i++) {
		struct extent *last = &r->v[kept];
		uint64_t end = r->v[i].start + r->v[i].len;

		if (r->v[i].start > last->start + last->len)
			r->v[++kept] = r->v[i];
		else if (end > last->start + last->len)
			last->len = end - last->start;
	}
	r->count = kept + 1;
}

size_t runs_first(const struct runs *r, uint64_t start)
{
	size_t lo = 0, hi = r->count;

	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (r->v[mid].start + r->v[mid].len <= start)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

bool runs_meet(const struct runs *r, uint64_t start, uint64_t len)
{
	size_t i = runs_first(r, start);

	return i < r->count && r->v[i].start < start + len;
}

/* ---- items ------------------------------------------------------------------------ */

int items_add(struct items *l, enum journal_item type, enum table table,
	      const void *key, size_t klen, const void *val, size_t vlen)
{
	struct disk_jitem h = {.type = (uint8_t)type,
			       .table = (uint8_t)table,
			       .klen = put16((uint16_t)klen),
			       .vlen = put16((uint16_t)vlen)};
	size_t len = sizeof(h) + klen + vlen;

	if (l->bytes + len > l->room) {
		size_t room = 2 * l->room + len + 4096;
		void *p = realloc(l->v, room);

		if (!p)
			return -ENOMEM;
		l->v = p;
		l->room = room;
	}
	memcpy(l->v + l->bytes, &h, sizeof(h));
	if (klen)
		memcpy(l->v + l->bytes + sizeof(h), key, klen);
	if (vlen)
		memcpy(l->v + l->bytes + sizeof(h) + klen, val, vlen);
	l->bytes += len;
	l->count++;
	return 0;
}

/* ---- repairs ---------------------------------------------------------------------- */

int repair_later(struct fsck *f, const struct repair *r)
{
	struct repairs *rs = &f->repairs;
	struct repair *n;

	n = grow(rs->v, sizeof(*rs->v), rs->count, &rs->room);
	if (!n)
		return -ENOMEM;
	rs->v = n;
	n = &rs->v[rs->count];
	*n = *r;
	if (r->name_len) {
		n->name = malloc(r->name_len + 1u);
		if (!n->name)
			return -ENOMEM;
		memcpy(n->name, r->name, r->name_len);
		n->name[r->name_len] = 0;
	} else {
		n->name = NULL;
	}
	rs->count++;
	return 0;
}

void repairs_fini(struct repairs *r)
{
	for (size_t i = 0; i < r->count; i++)
		free(r->v[i].name);
	free(r->v);
	memset(r, 0, sizeof(*r));
}
