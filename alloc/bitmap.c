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

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "see chunk_adopt()");

/* -- Ranges of bits -- */

/* Bits [off, off + len) of one word, len 1 .. 64 - off. */
static inline uint64_t mask_of(uint32_t off, uint32_t len)
{
	return (~0ull >> (64 - len)) << off;
}

static void bits_fill(uint64_t *bits, uint32_t off, uint32_t len, bool set)
{
	uint32_t w = off / 64, bit = off % 64;

	if (bit || len < 64) {
		uint32_t n = 64 - bit < len ? 64 - bit : len;
		uint64_t m = mask_of(bit, n);

		bits[w] = set ? bits[w] | m : bits[w] & ~m;
		w++;
		len -= n;
	}
	if (len >= 64)
		memset(&bits[w], set ? 0xff : 0, len / 64 * 8);
	if (len % 64) {
		uint64_t m = mask_of(0, len % 64);

		w += len / 64;
		bits[w] = set ? bits[w] | m : bits[w] & ~m;
	}
}

static bool bit_get(const uint64_t *bits, uint32_t at)
{
	return bits[at / 64] >> at % 64 & 1;
}

/*
 * The first bit at or after `off` that is set (`flip` 0), or is not (~0),
 * below `end`; or `end`.
 */
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

/* -- Edges: a chunk of few runs, or not so many -- */

#define EDGE_NONE INT16_MAX		/* may be an edge, too: edges counts */

static inline int16_t *edges_of(struct chunk *c)
{
	return c->form == FORM_FEW ? c->few : c->many;
}

static inline const int16_t *edges_in(const struct chunk *c)
{
	return c->form == FORM_FEW ? c->few : c->many;
}

/* Edges, eight at a time; lists of them are aligned to a cache line. */
typedef int16_t edges8 __attribute__((vector_size(16), may_alias));

/* How many edges are not above `at`, by searching. */
static uint32_t edge_search(const int16_t *edge, uint32_t edges, int16_t at)
{
	uint32_t rank = 0, blocks = (edges + EDGE_BLOCK - 1) / EDGE_BLOCK;
	edges8 count = { 0 };
	uint64_t sums[2];

	while (blocks > 1) {
		uint32_t half = blocks / 2;
		bool right = edge[rank + half * EDGE_BLOCK - 1] <= at;

		rank += right ? half * EDGE_BLOCK : 0;
		blocks = right ? blocks - half : half;
	}
	for (unsigned i = 0; i < EDGE_BLOCK; i += 8)
		count -= *(const edges8 *)&edge[rank + i] <= at;
	memcpy(sums, &count, sizeof(sums));
	/* The four sums of each half, added up in the highest. */
	rank += (uint32_t)((sums[0] + sums[1]) * 0x0001000100010001ull >> 48);
	return rank < edges ? rank : edges;
}

static inline uint32_t edge_rank(struct chunk *c, uint32_t off)
{
	const int16_t *edge = edges_in(c);
	uint32_t i = c->near, edges = c->edges;
	int16_t at = (int16_t)off;

	/* Most questions are about where the last one was. */
	if (i < edges && edge[i] <= at)
		i++;
	else if (i && i <= edges && edge[i - 1] > at)
		i--;
	if (i > edges || (i < edges && edge[i] <= at) ||
	    (i && edge[i - 1] > at))
		i = edge_search(edge, edges, at);
	c->near = (uint8_t)i;
	return i;
}

static void edges_end(int16_t *edge, uint32_t count, uint32_t max)
{
	while (count < max)
		edge[count++] = EDGE_NONE;
}

static void edge_insert(struct chunk *c, uint32_t i, uint32_t off)
{
	int16_t *edge = edges_of(c);

	memmove(&edge[i + 1], &edge[i], (c->edges - i) * sizeof(*edge));
	edge[i] = (int16_t)off;
	c->edges++;
}

static void edges_remove(struct chunk *c, uint32_t i, uint32_t n)
{
	int16_t *edge = edges_of(c);

	memmove(&edge[i], &edge[i + n], (c->edges - i - n) * sizeof(*edge));
	for (uint32_t k = 0; k < n; k++)
		edge[--c->edges] = EDGE_NONE;
}

/*
 * Units [off, end), all alike, become the opposite: an edge at either end goes
 * if it is there and comes if it is not. The end of the chunk needs none.
 */
static void edges_flip(struct chunk *c, uint32_t off, uint32_t end)
{
	int16_t *edge = edges_of(c);
	uint32_t i = edge_rank(c, off);
	bool at_off = i && (uint32_t)edge[i - 1] == off;
	bool at_end = i < c->edges && (uint32_t)edge[i] == end;

	if (end == ALLOC_CHUNK) {
		if (at_off)
			edges_remove(c, i - 1, 1);
		else
			edge_insert(c, i, off);
	} else if (at_off && at_end) {
		edges_remove(c, i - 1, 2);
	} else if (at_off) {
		edge[i - 1] = (int16_t)end;
	} else if (at_end) {
		edge[i] = (int16_t)off;
	} else {
		edge_insert(c, i, end);
		edge_insert(c, i, off);
	}
}

/* The same where only the count is kept. Before the bits change. */
static void edges_count_flip(struct chunk *c, uint32_t off, uint32_t end)
{
	bool was = bit_get(c->bits, off);

	if (was == (off && bit_get(c->bits, off - 1)))
		c->edges++;
	else
		c->edges--;
	if (end == ALLOC_CHUNK)
		return;
	if (was == bit_get(c->bits, end))
		c->edges++;
	else
		c->edges--;
}

static int few_to_many(struct chunks *t, struct chunk *c)
{
	int16_t *many = pool_get(&t->many);

	if (!many)
		return -ENOMEM;
	memcpy(many, c->few, sizeof(c->few));
	edges_end(many, c->edges, CHUNK_MANY);
	c->many = many;
	c->form = FORM_MANY;
	return 0;
}

static void many_to_few(struct chunks *t, struct chunk *c)
{
	memcpy(c->few, c->many, sizeof(c->few));
	pool_put(&t->many, c->many);
	c->form = FORM_FEW;
}

static int many_to_bits(struct chunks *t, struct chunk *c)
{
	uint64_t *bits = pool_get(&t->maps);

	if (!bits)
		return -ENOMEM;
	memset(bits, 0, ALLOC_CHUNK_BYTES);
	for (uint32_t i = 0; i < c->edges; i += 2) {
		uint32_t off = (uint32_t)c->many[i];
		uint32_t end = i + 1 < c->edges ? (uint32_t)c->many[i + 1]
						: ALLOC_CHUNK;

		bits_fill(bits, off, end - off, true);
	}
	pool_put(&t->many, c->many);
	c->bits = bits;
	c->form = FORM_BITS;
	return 0;
}

/* Without memory it stays as it is. */
static void bits_to_edges(struct chunks *t, struct chunk *c)
{
	bool few = c->edges <= CHUNK_FEW / 2;
	int16_t *edge = few ? c->few : pool_get(&t->many);
	uint32_t at = 0;

	if (!edge)
		return;
	for (uint32_t n = 0; n < c->edges; n++) {
		at = bits_next(c->bits, at, ALLOC_CHUNK, n % 2 ? ~0ull : 0);
		edge[n] = (int16_t)at;
	}
	edges_end(edge, c->edges, few ? CHUNK_FEW : CHUNK_MANY);
	pool_put(&t->maps, c->bits);
	if (!few)
		c->many = edge;
	c->form = few ? FORM_FEW : FORM_MANY;
}

/* The smaller form, but not at once: so as not to be back here soon. */
static inline void settle(struct chunks *t, struct chunk *c)
{
	if (c->form == FORM_MANY && c->edges <= CHUNK_FEW / 2)
		many_to_few(t, c);
	else if (c->form == FORM_BITS && c->edges <= CHUNK_MANY / 2)
		bits_to_edges(t, c);
}

/* -- One chunk, in any form -- */

static uint32_t next_used(struct chunk *c, uint32_t off, uint32_t end)
{
	uint32_t i, at;

	if (c->form == FORM_BITS)
		return bits_next(c->bits, off, end, 0);
	if (off >= end)
		return end;
	i = edge_rank(c, off);
	if (i % 2)
		return off;
	at = i < c->edges ? (uint32_t)edges_in(c)[i] : end;
	return at < end ? at : end;
}

static uint32_t next_free(struct chunk *c, uint32_t off, uint32_t end)
{
	uint32_t i, at;

	if (c->form == FORM_BITS)
		return bits_next(c->bits, off, end, ~0ull);
	if (off >= end)
		return end;
	i = edge_rank(c, off);
	if (i % 2 == 0)
		return off;
	at = i < c->edges ? (uint32_t)edges_in(c)[i] : end;
	return at < end ? at : end;
}

static uint32_t clear_below(struct chunk *c, uint32_t off, uint32_t max)
{
	uint32_t i, low;

	if (c->form == FORM_BITS)
		return bits_clear_below(c->bits, off, max);
	if (!off)
		return 0;
	i = edge_rank(c, off - 1);
	if (i % 2)
		return 0;
	low = i ? (uint32_t)edges_in(c)[i - 1] : 0;
	return off - low < max ? off - low : max;
}

void chunk_become(struct chunks *t, struct chunk *c, bool free)
{
	if (c->form != FORM_FEW)
		pool_put(c->form == FORM_BITS ? &t->maps : &t->many, c->bits);
	c->form = FORM_FEW;
	c->free = free ? c->units : 0;
	c->few[0] = (int16_t)c->free;
	c->edges = c->free < ALLOC_CHUNK;
	edges_end(c->few, c->edges, CHUNK_FEW);
	c->no_fit = UINT32_MAX;
	c->state = CHUNK_READY;
}

/* What `c` is now, for a save that has not come to it yet. */
static int preserve(struct chunks *t, struct chunk *c)
{
	struct chunk_image *image = malloc(sizeof(*image));

	if (!image)
		return -ENOMEM;
	image->bits = NULL;
	image->edges = c->edges;
	if (c->form == FORM_BITS) {
		image->bits = pool_get(&t->maps);
		if (!image->bits) {
			free(image);
			return -ENOMEM;
		}
		memcpy(image->bits, c->bits, ALLOC_CHUNK_BYTES);
	} else {
		memcpy(image->edge, edges_in(c), c->edges * sizeof(*c->few));
	}
	c->image = image;
	c->epoch = t->epoch;
	return 0;
}

int chunk_prepare_more(struct chunks *t, struct chunk *c)
{
	int err = c->epoch == t->epoch ? 0 : preserve(t, c);

	if (err || c->edges + 2 <= CHUNK_FEW)
		return err;
	if (c->form == FORM_FEW)
		return few_to_many(t, c);
	if (c->form == FORM_MANY && c->edges + 2 > CHUNK_MANY)
		return many_to_bits(t, c);
	return 0;
}

int chunk_prepare_pending(struct chunks *t, struct chunk *c)
{
	if (c->pending)
		return 0;
	c->pending = pool_get(&t->maps);
	if (!c->pending)
		return -ENOMEM;
	memset(c->pending, 0, ALLOC_CHUNK_BYTES);
	return 0;
}

static void mark(struct chunks *t, struct chunk *c, uint32_t off, uint32_t len,
		 bool used)
{
	if (c->form == FORM_BITS) {
		edges_count_flip(c, off, off + len);
		bits_fill(c->bits, off, len, used);
	} else {
		edges_flip(c, off, off + len);
	}
	settle(t, c);
}

void chunk_mark_used(struct chunks *t, struct chunk *c, uint32_t off,
		     uint32_t len)
{
	assert(len <= c->free);
	c->free -= len;
	mark(t, c, off, len, true);
}

void chunk_mark_free(struct chunks *t, struct chunk *c, uint32_t off,
		     uint32_t len)
{
	c->free += len;
	c->no_fit = UINT32_MAX;
	assert(c->free <= c->units);
	mark(t, c, off, len, false);
}

bool chunk_any_pending(const struct chunk *c, uint32_t off, uint32_t len)
{
	return c->pending &&
	       bits_next(c->pending, off, off + len, 0) < off + len;
}

bool chunk_all_used(struct chunk *c, uint32_t off, uint32_t len)
{
	uint32_t end = off + len;

	return !chunk_any_pending(c, off, len) && next_free(c, off, end) == end;
}

bool chunk_all_free(struct chunk *c, uint32_t off, uint32_t len)
{
	return next_used(c, off, off + len) == off + len;
}

bool chunk_all_pending(const struct chunk *c, uint32_t off, uint32_t len)
{
	return c->pending &&
	       bits_next(c->pending, off, off + len, ~0ull) == off + len;
}

void chunk_mark_pending(struct chunk *c, uint32_t off, uint32_t len)
{
	bits_fill(c->pending, off, len, true);
	c->pending_units += len;
}

void chunk_clear_pending(struct chunks *t, struct chunk *c, uint32_t off,
			 uint32_t len)
{
	c->pending_units -= len;
	if (c->pending_units) {
		bits_fill(c->pending, off, len, false);
	} else {
		pool_put(&t->maps, c->pending);
		c->pending = NULL;
	}
}

uint32_t chunk_free_before(struct chunk *c, uint32_t off, uint32_t max)
{
	if (c->state != CHUNK_READY || !c->free)
		return 0;
	if (c->win_hi > c->win_lo && off > c->win_lo) {
		if (off <= c->win_hi)
			return 0;
		max = max < off - c->win_hi ? max : off - c->win_hi;
	}
	max = max < off ? max : off;
	return clear_below(c, off, max);
}

uint32_t chunk_free_after(struct chunk *c, uint32_t off, uint32_t max)
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
	return next_used(c, off, end) - off;
}

static bool bits_around(struct chunk *c, uint32_t off, uint32_t end, bool used,
			uint32_t max, struct around *out)
{
	if (bits_next(c->bits, off, end, used ? ~0ull : 0) < end)
		return false;
	out->before = bits_clear_below(c->bits, off, off < max ? off : max);
	out->after = bits_next(c->bits, end,
			       c->units - end < max ? c->units : end + max, 0) -
		     end;
	return true;
}

static bool edges_around(struct chunk *c, uint32_t off, uint32_t end, bool used,
			 struct around *out)
{
	const int16_t *edge = edges_in(c);
	uint32_t i = edge_rank(c, off), edges = c->edges;
	/* [from, to) is alike, and so [before, from) and [to, after). */
	uint32_t from = i ? (uint32_t)edge[i - 1] : 0;
	uint32_t to = i < edges ? (uint32_t)edge[i] : ALLOC_CHUNK;

	if (i % 2 != used || to < end)
		return false;
	if (!used) {
		*out = (struct around){ off - from, to - end };
		return true;
	}
	*out = (struct around){ 0, 0 };
	if (from == off)
		out->before = off - (i > 1 ? (uint32_t)edge[i - 2] : 0);
	if (to == end && i < edges)
		out->after = (i + 1 < edges ? (uint32_t)edge[i + 1]
					    : ALLOC_CHUNK) - end;
	return true;
}

bool chunk_around(struct chunk *c, uint32_t off, uint32_t len, bool used,
		  uint32_t max, struct around *out)
{
	uint32_t end = off + len;
	bool alike = c->form == FORM_BITS
			     ? bits_around(c, off, end, used, max, out)
			     : edges_around(c, off, end, used, out);

	if (!alike || c->win_hi == c->win_lo)
		return alike;
	if (!used && off < c->win_hi && end > c->win_lo)
		return false;
	if (off > c->win_lo) {
		uint32_t most = off > c->win_hi ? off - c->win_hi : 0;

		out->before = out->before < most ? out->before : most;
	}
	if (end < c->win_hi) {
		uint32_t most = end < c->win_lo ? c->win_lo - end : 0;

		out->after = out->after < most ? out->after : most;
	}
	return true;
}

uint32_t chunk_next_run(struct chunk *c, uint32_t off, uint32_t *start)
{
	if (c->state != CHUNK_READY || !c->free || off >= c->units)
		return 0;
	*start = next_free(c, off, c->units);
	return next_used(c, *start, c->units) - *start;
}

static bool find_between(struct chunk *c, uint32_t off, uint32_t end,
			 uint32_t len, uint32_t *start)
{
	while (off < end) {
		uint32_t at = next_free(c, off, end);
		uint32_t stop;

		if (at == end)
			break;
		stop = at + len <= c->units ? at + len : c->units;
		off = next_used(c, at, stop);
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
	if (find_between(c, off, c->units, len, start) ||
	    find_between(c, 0, off, len, start))
		return true;
	c->no_fit = len;
	return false;
}

void chunk_adopt(struct chunks *t, struct chunk *c, uint64_t *bits)
{
	uint64_t before = 0;

	if (c->units < ALLOC_CHUNK)
		bits_fill(bits, c->units, ALLOC_CHUNK - c->units, true);
	c->bits = bits;
	c->form = FORM_BITS;
	c->free = ALLOC_CHUNK;
	c->edges = 0;
	for (unsigned w = 0; w < WORDS; w++) {
		uint64_t word = bits[w];

		c->free -= (uint32_t)__builtin_popcountll(word);
		c->edges += (uint16_t)__builtin_popcountll(
			word ^ (word << 1 | before >> 63));
		before = word;
	}
	settle(t, c);
	c->no_fit = UINT32_MAX;
	c->state = CHUNK_READY;
}

/* -- The table -- */

static struct chunk *page_load(const struct chunks *t, uint64_t page)
{
	return __atomic_load_n(&t->pages[page], __ATOMIC_ACQUIRE);
}

/* The directory has room to grow to this; nothing but addresses is taken. */
#define DIR_BYTES_MIN ((size_t)8 << 20)

int chunks_init(struct chunks *t, uint64_t units)
{
	*t = (struct chunks){ .units = units, .save_at = UINT64_MAX };
	t->count = (units + ALLOC_CHUNK - 1) / ALLOC_CHUNK;
	t->dir_bytes = (t->count / PAGE_CHUNKS + 1) * 2 * sizeof(*t->pages);
	if (t->dir_bytes < DIR_BYTES_MIN)
		t->dir_bytes = DIR_BYTES_MIN;
	t->pages = mmap(NULL, t->dir_bytes, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (t->pages == MAP_FAILED)
		return -ENOMEM;
	lock_init(&t->lock, RANK_CHUNKS, "chunks");
	pool_init(&t->structs, PAGE_CHUNKS * sizeof(struct chunk), 0, "chunks");
	pool_init(&t->many, CHUNK_MANY * sizeof(int16_t), 0, "edges");
	pool_init(&t->maps, ALLOC_CHUNK_BYTES, 0, "bitmaps");
	return 0;
}

void chunks_fini(struct chunks *t)
{
	for (uint64_t i = 0; i <= t->page_last; i++) {
		struct chunk *page = t->pages[i];

		for (unsigned j = 0; page && j < PAGE_CHUNKS; j++)
			free(page[j].image);
	}
	munmap(t->pages, t->dir_bytes);
	pool_fini(&t->structs);
	pool_fini(&t->many);
	pool_fini(&t->maps);
	free(t->known);
	lock_fini(&t->lock);
}

uint64_t chunks_next(const struct chunks *t, uint64_t index, uint64_t end)
{
	uint64_t last = __atomic_load_n(&t->page_last, __ATOMIC_RELAXED);

	/* Most of a fresh space lies behind the last page there is. */
	if (index / PAGE_CHUNKS > last)
		return end;
	while (index < end && !page_load(t, index / PAGE_CHUNKS))
		index = index / PAGE_CHUNKS == last
				? end
				: (index / PAGE_CHUNKS + 1) * PAGE_CHUNKS;
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

/* The size that chunk `index` has in a space of `units`. */
static uint32_t chunk_exist(uint64_t index, uint64_t units)
{
	uint64_t first = index * ALLOC_CHUNK;

	if (first >= units)
		return 0;
	return units - first < ALLOC_CHUNK ? (uint32_t)(units - first)
					   : ALLOC_CHUNK;
}

static struct chunk *page_new(struct chunks *t, uint64_t page)
{
	struct chunk *p = pool_get(&t->structs);

	if (!p)
		return NULL;
	for (unsigned i = 0; i < PAGE_CHUNKS; i++) {
		uint64_t index = page * PAGE_CHUNKS + i;
		const struct chunks_known *k = known_find(t, index);

		latch_init(&p[i].latch, RANK_CHUNK, "chunk");
		p[i].units = chunk_exist(index, t->units);
		chunk_become(t, &p[i], false);
		p[i].state = CHUNK_UNKNOWN;
		/* A save that is to come here must find what is now. */
		p[i].epoch = t->epoch - (index >= t->save_at);
		if (k)
			chunk_become(t, &p[i], k->free);
	}
	if (page > t->page_last)
		__atomic_store_n(&t->page_last, page, __ATOMIC_RELAXED);
	return p;
}

struct chunk *chunks_make(struct chunks *t, uint64_t index)
{
	uint64_t page = index / PAGE_CHUNKS;
	struct chunk *p;

	lock_lock(&t->lock);
	p = t->pages[page];
	if (!p) {
		p = page_new(t, page);
		__atomic_store_n(&t->pages[page], p, __ATOMIC_RELEASE);
	}
	lock_unlock(&t->lock);
	return p ? &p[index % PAGE_CHUNKS] : NULL;
}

static int known_add(struct chunks *t, uint64_t first, uint64_t count, bool free)
{
	size_t at = t->known_count;
	struct chunks_known *k;

	while (at && t->known[at - 1].first > first)
		at--;
	k = at ? &t->known[at - 1] : NULL;
	if (k && k->free == free && k->first + k->count == first) {
		k->count += count;
		return 0;
	}
	if (t->known_count == t->known_max) {
		size_t max = t->known_max ? t->known_max * 2 : 16;
		void *grown = realloc(t->known, max * sizeof(*t->known));

		if (!grown)
			return -ENOMEM;
		t->known = grown;
		t->known_max = max;
	}
	memmove(&t->known[at + 1], &t->known[at],
		(t->known_count++ - at) * sizeof(*t->known));
	t->known[at] = (struct chunks_known){ first, count, free };
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
			chunk_become(t, chunks_peek(t, i), free);
	}
	lock_unlock(&t->lock);
	return err;
}

/* -- Saving -- */

void chunks_save_begin(struct chunks *t)
{
	t->epoch++;
	t->save_at = 0;
}

/* How many chunks from `index` on are alike, none with a struct. */
static uint64_t alike(const struct chunks *t, uint64_t index, bool *free)
{
	const struct chunks_known *k = known_find(t, index);
	uint64_t end = chunks_next(t, index, t->count);

	/* What nobody described is none of ours to save: taken for full. */
	*free = k && k->free;
	if (!k)
		return 1;
	return (k->first + k->count < end ? k->first + k->count : end) - index;
}

enum chunks_saved chunks_save_next(struct chunks *t, uint64_t *index,
				   uint64_t *count, bool *free)
{
	enum chunks_saved what = SAVED_ALL;

	lock_lock(&t->lock);
	*index = t->save_at;
	*count = 1;
	if (*index >= t->count) {
		t->save_at = UINT64_MAX;
	} else if (chunks_peek(t, *index)) {
		what = SAVED_STRUCT;
		t->save_at++;
	} else {
		what = SAVED_ALIKE;
		*count = alike(t, *index, free);
		t->save_at += *count;
	}
	lock_unlock(&t->lock);
	return what;
}

void chunk_save(struct chunks *t, struct chunk *c, struct chunk_image *out,
		bool *borrowed)
{
	*borrowed = !c->image;
	if (c->image) {
		*out = *c->image;
		free(c->image);
		c->image = NULL;
		return;
	}
	out->bits = c->form == FORM_BITS ? c->bits : NULL;
	out->edges = c->edges;
	if (!out->bits)
		memcpy(out->edge, edges_in(c), c->edges * sizeof(*c->few));
	c->epoch = t->epoch;
}

/* -- Resizing -- */

static uint64_t min_count(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* Give a chunk that has a struct the size that it has in a space of `units`. */
static void chunk_resize(struct chunks *t, uint64_t index, uint64_t units)
{
	struct chunk *c = chunks_peek(t, index);
	uint32_t exist = chunk_exist(index, units);

	if (exist < c->units) {
		uint32_t gone = c->units - exist;

		/* They were free; what does not exist is in use. */
		if (chunk_all_free(c, exist, gone))
			chunk_mark_used(t, c, exist, gone);
	}
	c->units = exist;
	if (exist)
		c->state = CHUNK_READY;
}

int chunks_resize(struct chunks *t, uint64_t units)
{
	uint64_t count = (units + ALLOC_CHUNK - 1) / ALLOC_CHUNK;
	uint64_t most = count > t->count ? count : t->count;
	uint64_t from = (units < t->units ? units : t->units) / ALLOC_CHUNK;
	int err = 0;

	if ((count / PAGE_CHUNKS + 1) * sizeof(*t->pages) > t->dir_bytes)
		return -EFBIG;
	/* Before anything changes: memory, and what a save is to see. */
	for (uint64_t i = from; (i = chunks_next(t, i, most)) < most; i++) {
		err = chunk_prepare(t, chunks_peek(t, i));
		if (err)
			return err;
	}
	lock_lock(&t->lock);
	if (count > t->count)
		err = known_add(t, t->count, count - t->count, true);
	if (err)
		goto out;
	for (; t->known_count; t->known_count--) {
		struct chunks_known *k = &t->known[t->known_count - 1];

		if (k->first < count) {
			k->count = min_count(k->count, count - k->first);
			break;
		}
	}
	for (uint64_t i = from; (i = chunks_next(t, i, most)) < most; i++)
		chunk_resize(t, i, units);
	t->units = units;
	t->count = count;
out:
	lock_unlock(&t->lock);
	return err;
}

size_t chunks_bytes(const struct chunks *t)
{
	return t->known_max * sizeof(*t->known) + pool_bytes(&t->structs) +
	       pool_bytes(&t->many) + pool_bytes(&t->maps);
}
