/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_BITMAP_H
#define SPACEWEAVE_BITMAP_H

/*
 * The truth: whether a unit is in use, in chunks of ALLOC_CHUNK units, and a
 * second map of the frees that are pending.
 *
 * A chunk of few runs, free or full ones among them, is a short list of the
 * edges between them, inside its struct; one of more runs a longer list; one
 * of many a bitmap. A chunk that nobody looked at has not even a struct: a
 * fresh space costs nothing.
 *
 * A chunk may have a window: a run of free units at [win_lo, win_hi) that is
 * in no index, because it is being given away from its front. Searches for
 * free units next to a given one stop at a window as if it were in use.
 *
 * Positions are in units from the start of the chunk. The caller holds the
 * chunk's latch, or has stopped the world (see alloc_priv.h).
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "alloc/alloc.h"
#include "alloc/lock.h"
#include "alloc/pool.h"

#pragma GCC visibility push(hidden)

enum chunk_state {
	CHUNK_UNKNOWN,		/* taken for full until it is loaded */
	CHUNK_LOADING,
	CHUNK_READY,
};

enum chunk_form { FORM_FEW, FORM_MANY, FORM_BITS };

#define CHUNK_FEW 64		/* edges that there is room for */
#define CHUNK_MANY 256
#define EDGE_BLOCK 32		/* that are searched together */

struct chunk_image;

struct chunk {
	struct latch latch;	/* RANK_CHUNK, ascending by number */
	/* Under latch: */
	uint32_t units;		/* that exist: ALLOC_CHUNK but for the last */
	uint32_t free;		/* units not in use, those of the window too */
	uint32_t pending_units;
	uint32_t win_lo, win_hi;
	uint32_t no_fit;	/* no run of so many units is in here */
	uint16_t win_owner;	/* who opened it, see window_open() */
	uint8_t state;
	uint8_t lost;		/* width of the longest short run that no hint
				   may point to, see lost_push(); 0: none */
	union {
		uint64_t *bits;	/* FORM_BITS: one for each unit, set when in use */
		int16_t *many;	/* FORM_MANY: edges */
	};
	uint64_t *pending;	/* NULL: nothing pending */
	struct chunk_image *image; /* as it was at the last save point */
	uint32_t epoch;		/* the save point that has it, or need not */
	uint8_t form;		/* enum chunk_form */
	uint8_t near;		/* edges not above what was asked for last */
	/*
	 * Where units in use begin and end: a unit is in use when an odd
	 * number of edges is not above it. Units that do not exist are in
	 * use. Ascending, in `few` or `many`; EDGE_NONE after the last. Kept
	 * while there is no bitmap; the count always.
	 */
	uint16_t edges;
	int16_t few[CHUNK_FEW] __attribute__((aligned(64)));
} __attribute__((aligned(64)));

/* What a chunk was. */
struct chunk_image {
	uint64_t *bits;			/* NULL: edges */
	uint32_t edges;
	int16_t edge[CHUNK_MANY];
};

struct chunks;

/* Wholly free, or full; and ready. */
void chunk_become(struct chunks *t, struct chunk *c, bool free);

/*
 * Before units are marked: memory for it, which comes from and returns to the
 * table's pools; and an image, if a save is to see the chunk as it is now. Good
 * for one mark. -ENOMEM.
 */
int chunk_prepare_more(struct chunks *t, struct chunk *c);
int chunk_prepare_pending(struct chunks *t, struct chunk *c);

/* Mark units that are all free, or all in use, as the other. */
void chunk_mark_used(struct chunks *t, struct chunk *c, uint32_t off,
		     uint32_t len);
void chunk_mark_free(struct chunks *t, struct chunk *c, uint32_t off,
		     uint32_t len);

/* In use, and no free of them pending. */
bool chunk_all_used(struct chunk *c, uint32_t off, uint32_t len);
bool chunk_all_free(struct chunk *c, uint32_t off, uint32_t len);

/* Of some of them a free is pending. */
bool chunk_any_pending(const struct chunk *c, uint32_t off, uint32_t len);

/*
 * What chunk_free_before() and chunk_free_after() say of both ends of units that
 * are all in use, or all free and in no window: looked up once for all three. A
 * bitmap is searched for no more than `max`. False when they are not alike.
 */
struct around {
	uint32_t before, after;
};

bool chunk_around(struct chunk *c, uint32_t off, uint32_t len, bool used,
		  uint32_t max, struct around *out);

bool chunk_all_pending(const struct chunk *c, uint32_t off, uint32_t len);
void chunk_mark_pending(struct chunk *c, uint32_t off, uint32_t len);
void chunk_clear_pending(struct chunks *t, struct chunk *c, uint32_t off,
			 uint32_t len);

/*
 * Free units directly below, or from, `off`: at most `max`, and not past a
 * window. 0 for a chunk that is not ready.
 */
uint32_t chunk_free_before(struct chunk *c, uint32_t off, uint32_t max);
uint32_t chunk_free_after(struct chunk *c, uint32_t off, uint32_t max);

/* The first free run at or after `off`, windows included. Its length, or 0. */
uint32_t chunk_next_run(struct chunk *c, uint32_t off, uint32_t *start);

/*
 * The first `len` free units in a row at or after `off`, windows included, or
 * else the first before. False when there are none in the whole chunk.
 */
bool chunk_find(struct chunk *c, uint32_t off, uint32_t len, uint32_t *start);

/* Take over what was loaded: a piece of t->maps, now the chunk's. */
void chunk_adopt(struct chunks *t, struct chunk *c, uint64_t *bits);

/*
 * All chunks of a space. A chunk gets its struct when it is first needed; what
 * it starts as is what was said of it by chunks_describe().
 */
#define PAGE_CHUNKS 64u

struct chunks {
	struct chunk **pages;		/* atomic; directory */
	uint64_t units, count;		/* of the space, in units and chunks */
	size_t dir_bytes;
	struct pool structs, many, maps; /* of 64 chunks; of edges; bitmaps */
	uint32_t epoch;			/* save points; changes with the world
					   stopped */
	struct lock lock;		/* RANK_CHUNKS */
	/* Under lock: */
	struct chunks_known {
		uint64_t first, count;
		bool free;
	} *known;			/* ascending */
	size_t known_count, known_max;
	uint64_t page_last;
	uint64_t save_at;		/* chunks below it have been saved */
};

int chunks_init(struct chunks *t, uint64_t units);
void chunks_fini(struct chunks *t);

/* The chunk, or NULL when it has no struct (yet). */
static inline struct chunk *chunks_peek(const struct chunks *t, uint64_t index)
{
	struct chunk *page = __atomic_load_n(&t->pages[index / PAGE_CHUNKS],
					     __ATOMIC_ACQUIRE);

	return page ? &page[index % PAGE_CHUNKS] : NULL;
}

static inline int chunk_prepare(struct chunks *t, struct chunk *c)
{
	uint32_t most = c->form == FORM_FEW ? CHUNK_FEW : CHUNK_MANY;

	if (__builtin_expect(c->epoch == t->epoch && c->edges + 2u <= most, 1))
		return 0;
	return chunk_prepare_more(t, c);
}

/* The first chunk from `index` on that has a struct; `end` at most. */
uint64_t chunks_next(const struct chunks *t, uint64_t index, uint64_t end);

/* The chunk, made when there is none. NULL: no memory. */
struct chunk *chunks_make(struct chunks *t, uint64_t index);

static inline struct chunk *chunks_get(struct chunks *t, uint64_t index)
{
	struct chunk *c = chunks_peek(t, index);

	return __builtin_expect(c != NULL, 1) ? c : chunks_make(t, index);
}

/*
 * Chunks [first, first + count) that are CHUNK_UNKNOWN are wholly free, or
 * full. With the world stopped. -ENOMEM.
 */
int chunks_describe(struct chunks *t, uint64_t first, uint64_t count, bool free);

/*
 * Saving what all chunks are at one moment, while they change. Begin with the
 * world stopped. Then each call gives what comes next: a chunk with a struct,
 * *index, to be had by chunk_save(); or *count chunks without, from *index on,
 * which are wholly free, or full.
 */
enum chunks_saved { SAVED_ALL, SAVED_ALIKE, SAVED_STRUCT };

void chunks_save_begin(struct chunks *t);
enum chunks_saved chunks_save_next(struct chunks *t, uint64_t *index,
				   uint64_t *count, bool *free);
/* Under its latch. out->bits are the caller's to put back, unless *borrowed. */
void chunk_save(struct chunks *t, struct chunk *c, struct chunk_image *out,
		bool *borrowed);

/*
 * Change the size, with the world stopped. Units that come into a chunk with a
 * struct are in use; chunks that come without one are wholly free. Units that
 * go are free or were marked used. -EFBIG beyond what the directory can hold.
 */
int chunks_resize(struct chunks *t, uint64_t units);

size_t chunks_bytes(const struct chunks *t);

#pragma GCC visibility pop

#endif
