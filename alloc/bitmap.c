/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Bits, chunks, and the table of chunks. Nothing here knows what is indexed
 * where: that is space.c. Words are 64 units; bit i of word i / 64, so on a
 * little-endian machine the words are the bytes that alloc_source.load()
 * gives.
 */
#include "alloc/bitmap.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define WORDS (ALLOC_CHUNK / 64)
#define PAGE_CHUNKS 64

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "see chunk_adopt()");

/* -- Ranges of bits -- */

/* Bits [off, off + len) of one word, len 1 .. 64 - off. */
static inline uint64_t mask_of(uint32_t off, uint32_t len)
{
	return (~0ull >> (64 - len)) << off;
}

/*
 * Do `once` with (w, m) for each word w that [off, off + len) touches and the
 * mask m of its bits there; whole words but for the first and the last.
 */
#define FOR_WORDS(off, len, w, m, once)                                        \
	do {                                                                   \
		uint32_t w = (off) / 64, bit_ = (off) % 64, left_ = (len);     \
		while (left_) {                                                \
			uint32_t n_ = 64 - bit_ < left_ ? 64 - bit_ : left_;   \
			uint64_t m = mask_of(bit_, n_);                        \
			once;                                                  \
			left_ -= n_;                                           \
			bit_ = 0;                                              \
			w++;                                                   \
		}                                                              \
	} while (0)

static void bits_set(uint64_t *bits, uint32_t off, uint32_t len)
{
	FOR_WORDS(off, len, w, m, bits[w] |= m);
}

static void bits_clear(uint64_t *bits, uint32_t off, uint32_t len)
{
	FOR_WORDS(off, len, w, m, bits[w] &= ~m);
}

static bool bits_all_set(const uint64_t *bits, uint32_t off, uint32_t len)
{
	uint64_t missing = 0;

	FOR_WORDS(off, len, w, m, missing |= ~bits[w] & m);
	return !missing;
}

static bool bits_none_set(const uint64_t *bits, uint32_t off, uint32_t len)
{
	uint64_t found = 0;

	FOR_WORDS(off, len, w, m, found |= bits[w] & m);
	return !found;
}

/* The first bit at or after `off` that is set (or not), below `end`, or `end`. */
static uint32_t bits_next(const uint64_t *bits, uint32_t off, uint32_t end,
			  uint64_t flip)
{
	uint32_t w = off / 64;
	uint64_t word;

	if (off >= end)
		return end;
	word = (bits[w] ^ flip) & (~0ull << (off % 64));
	while (!word) {
		if (++w * 64 >= end)
			return end;
		word = bits[w] ^ flip;
	}
	off = w * 64 + (uint32_t)__builtin_ctzll(word);
	return off < end ? off : end;
}

#define NEXT_USED(bits, off, end) bits_next(bits, off, end, 0)
#define NEXT_FREE(bits, off, end) bits_next(bits, off, end, ~0ull)

/* How many bits directly below `off` are not set, at most `max` <= off. */
static uint32_t bits_clear_below(const uint64_t *bits, uint32_t off, uint32_t max)
{
	uint32_t low = off - max, at = off;

	while (at > low) {
		uint32_t w = (at - 1) / 64, top = (at - 1) % 64;
		uint64_t word = bits[w] << (63 - top);

		if (word) {
			uint32_t n = (uint32_t)__builtin_clzll(word);

			at = at - low < n ? low : at - n;
			break;
		}
		at = w * 64 > low ? w * 64 : low;
	}
	return off - at;
}

/* -- One chunk -- */

static uint64_t *map_new(struct pool *maps, int byte)
{
	uint64_t *map = pool_get(maps);

	if (map)
		memset(map, byte, ALLOC_CHUNK_BYTES);
	return map;
}

int chunk_prepare(struct pool *maps, struct chunk *c, uint32_t off, uint32_t len)
{
	if (c->bits || (!off && len == c->units))
		return 0;
	c->bits = map_new(maps, c->free ? 0 : 0xff);
	if (!c->bits)
		return -ENOMEM;
	if (c->units < ALLOC_CHUNK)
		bits_set(c->bits, c->units, ALLOC_CHUNK - c->units);
	return 0;
}

int chunk_prepare_pending(struct pool *maps, struct chunk *c)
{
	if (!c->pending)
		c->pending = map_new(maps, 0);
	return c->pending ? 0 : -ENOMEM;
}

/* A chunk that is all the same needs no bitmap. */
static void map_drop(struct pool *maps, uint64_t **map)
{
	if (*map)
		pool_put(maps, *map);
	*map = NULL;
}

void chunk_mark_used(struct pool *maps, struct chunk *c, uint32_t off,
		     uint32_t len)
{
	assert(len <= c->free);
	c->free -= len;
	if (!c->free)
		map_drop(maps, &c->bits);
	else
		bits_set(c->bits, off, len);
}

void chunk_mark_free(struct pool *maps, struct chunk *c, uint32_t off,
		     uint32_t len)
{
	c->free += len;
	c->no_fit = UINT32_MAX;
	assert(c->free <= c->units);
	if (c->free == c->units)
		map_drop(maps, &c->bits);
	else
		bits_clear(c->bits, off, len);
}

bool chunk_all_used(const struct chunk *c, uint32_t off, uint32_t len)
{
	if (c->pending && !bits_none_set(c->pending, off, len))
		return false;
	return c->bits ? bits_all_set(c->bits, off, len) : !c->free;
}

bool chunk_all_free(const struct chunk *c, uint32_t off, uint32_t len)
{
	return c->bits ? bits_none_set(c->bits, off, len) : c->free > 0;
}

bool chunk_all_pending(const struct chunk *c, uint32_t off, uint32_t len)
{
	return c->pending && bits_all_set(c->pending, off, len);
}

void chunk_mark_pending(struct chunk *c, uint32_t off, uint32_t len)
{
	bits_set(c->pending, off, len);
	c->pending_units += len;
}

void chunk_clear_pending(struct pool *maps, struct chunk *c, uint32_t off,
			 uint32_t len)
{
	c->pending_units -= len;
	if (c->pending_units)
		bits_clear(c->pending, off, len);
	else
		map_drop(maps, &c->pending);
}

uint32_t chunk_free_before(const struct chunk *c, uint32_t off, uint32_t max)
{
	if (c->state != CHUNK_READY || !c->free)
		return 0;
	if (c->win_hi > c->win_lo && off > c->win_lo) {
		if (off <= c->win_hi)
			return 0;
		max = max < off - c->win_hi ? max : off - c->win_hi;
	}
	max = max < off ? max : off;
	return c->bits ? bits_clear_below(c->bits, off, max) : max;
}

uint32_t chunk_free_after(const struct chunk *c, uint32_t off, uint32_t max)
{
	uint32_t end = c->units;

	if (c->state != CHUNK_READY || !c->free)
		return 0;
	if (c->win_hi > c->win_lo && off < c->win_hi) {
		if (off >= c->win_lo)
			return 0;
		end = c->win_lo;
	}
	end = max < end - off ? off + max : end;
	return (c->bits ? NEXT_USED(c->bits, off, end) : end) - off;
}

uint32_t chunk_next_run(const struct chunk *c, uint32_t off, uint32_t *start)
{
	if (c->state != CHUNK_READY || !c->free || off >= c->units)
		return 0;
	if (!c->bits) {
		*start = off;
		return c->units - off;
	}
	*start = NEXT_FREE(c->bits, off, c->units);
	return NEXT_USED(c->bits, *start, c->units) - *start;
}

static bool find_between(const struct chunk *c, uint32_t off, uint32_t end,
			 uint32_t len, uint32_t *start)
{
	while (off < end) {
		uint32_t at = NEXT_FREE(c->bits, off, end);
		uint32_t stop;

		if (at == end)
			break;
		stop = at + len <= c->units ? at + len : c->units;
		off = NEXT_USED(c->bits, at, stop);
		if (off - at == len) {
			*start = at;
			return true;
		}
	}
	return false;
}

bool chunk_find(struct chunk *c, uint32_t off, uint32_t len, uint32_t *start)
{
	if (c->state != CHUNK_READY || c->free < len || len >= c->no_fit)
		return false;
	if (!c->bits) {
		*start = off + len <= c->units ? off : 0;
		return true;
	}
	if (find_between(c, off, c->units, len, start) ||
	    find_between(c, 0, off, len, start))
		return true;
	c->no_fit = len;
	return false;
}

void chunk_adopt(struct pool *maps, struct chunk *c, uint64_t *bits)
{
	uint32_t used = 0;

	if (c->units < ALLOC_CHUNK)
		bits_set(bits, c->units, ALLOC_CHUNK - c->units);
	for (unsigned w = 0; w < WORDS; w++)
		used += (uint32_t)__builtin_popcountll(bits[w]);
	c->free = ALLOC_CHUNK - used;
	c->bits = bits;
	if (!c->free || c->free == c->units)
		map_drop(maps, &c->bits);
	c->no_fit = UINT32_MAX;
	c->state = CHUNK_READY;
}

/* -- The table -- */

static struct chunk *page_load(const struct chunks *t, uint64_t page)
{
	return __atomic_load_n(&t->pages[page], __ATOMIC_ACQUIRE);
}

int chunks_init(struct chunks *t, uint64_t units)
{
	*t = (struct chunks){ .units = units };
	t->count = (units + ALLOC_CHUNK - 1) / ALLOC_CHUNK;
	t->dir_bytes = (t->count + PAGE_CHUNKS - 1) / PAGE_CHUNKS *
		       sizeof(*t->pages);
	t->pages = mmap(NULL, t->dir_bytes, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (t->pages == MAP_FAILED)
		return -ENOMEM;
	lock_init(&t->lock, RANK_CHUNKS, "chunks");
	pool_init(&t->maps, ALLOC_CHUNK_BYTES, 0, "bitmaps");
	return 0;
}

void chunks_fini(struct chunks *t)
{
	for (uint64_t i = 0; i < t->dir_bytes / sizeof(*t->pages); i++)
		free(t->pages[i]);
	munmap(t->pages, t->dir_bytes);
	pool_fini(&t->maps);
	free(t->known);
	lock_fini(&t->lock);
}

struct chunk *chunks_peek(const struct chunks *t, uint64_t index)
{
	struct chunk *page = page_load(t, index / PAGE_CHUNKS);

	return page ? &page[index % PAGE_CHUNKS] : NULL;
}

uint64_t chunks_next(const struct chunks *t, uint64_t index, uint64_t end)
{
	while (index < end && !page_load(t, index / PAGE_CHUNKS))
		index = (index / PAGE_CHUNKS + 1) * PAGE_CHUNKS;
	return index < end ? index : end;
}

/* What was said of chunk `index`, or NULL. */
static const struct chunks_known *known_find(const struct chunks *t,
					     uint64_t index)
{
	size_t lo = 0, hi = t->known_count;

	while (lo < hi) {
		size_t mid = (lo + hi) / 2;
		const struct chunks_known *k = &t->known[mid];

		if (index < k->first)
			hi = mid;
		else if (index >= k->first + k->count)
			lo = mid + 1;
		else
			return k;
	}
	return NULL;
}

static void chunk_become(struct chunk *c, bool free)
{
	c->free = free ? c->units : 0;
	c->state = CHUNK_READY;
}

static struct chunk *page_new(struct chunks *t, uint64_t page)
{
	struct chunk *p = calloc(PAGE_CHUNKS, sizeof(*p));

	if (!p)
		return NULL;
	for (unsigned i = 0; i < PAGE_CHUNKS; i++) {
		uint64_t index = page * PAGE_CHUNKS + i;
		uint64_t first = index * ALLOC_CHUNK;
		const struct chunks_known *k = known_find(t, index);

		latch_init(&p[i].latch, RANK_CHUNK, "chunk");
		p[i].no_fit = UINT32_MAX;
		if (first < t->units)
			p[i].units = t->units - first < ALLOC_CHUNK
					     ? (uint32_t)(t->units - first)
					     : ALLOC_CHUNK;
		if (k)
			chunk_become(&p[i], k->free);
	}
	return p;
}

struct chunk *chunks_get(struct chunks *t, uint64_t index)
{
	uint64_t page = index / PAGE_CHUNKS;
	struct chunk *p = page_load(t, page);

	if (__builtin_expect(!p, 0)) {
		lock_lock(&t->lock);
		p = t->pages[page];
		if (!p) {
			p = page_new(t, page);
			t->page_count += p != NULL;
			__atomic_store_n(&t->pages[page], p, __ATOMIC_RELEASE);
		}
		lock_unlock(&t->lock);
		if (!p)
			return NULL;
	}
	return &p[index % PAGE_CHUNKS];
}

static int known_add(struct chunks *t, uint64_t first, uint64_t count, bool free)
{
	if (t->known_count) {
		struct chunks_known *last = &t->known[t->known_count - 1];

		if (last->free == free && last->first + last->count == first) {
			last->count += count;
			return 0;
		}
	}
	if (t->known_count == t->known_max) {
		size_t max = t->known_max ? t->known_max * 2 : 16;
		void *grown = realloc(t->known, max * sizeof(*t->known));

		if (!grown)
			return -ENOMEM;
		t->known = grown;
		t->known_max = max;
	}
	t->known[t->known_count++] =
		(struct chunks_known){ first, count, free };
	return 0;
}

int chunks_describe(struct chunks *t, uint64_t first, uint64_t count, bool free)
{
	uint64_t end = first + count;
	int err;

	lock_lock(&t->lock);
	err = known_add(t, first, count, free);
	for (uint64_t i = first; !err; i++) {
		i = chunks_next(t, i, end);
		if (i == end)
			break;
		if (chunks_peek(t, i)->state == CHUNK_UNKNOWN)
			chunk_become(chunks_peek(t, i), free);
	}
	lock_unlock(&t->lock);
	return err;
}

size_t chunks_bytes(const struct chunks *t)
{
	return t->known_max * sizeof(*t->known) + pool_bytes(&t->maps) +
	       t->page_count * PAGE_CHUNKS * sizeof(struct chunk);
}
