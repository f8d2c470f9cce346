/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_ALLOC_PRIV_H
#define SPACEWEAVE_ALLOC_PRIV_H

/*
 * What the files of alloc/ share. From the top: alloc.c decides where to take
 * from, load.c brings in what was not known yet, space.c moves units between
 * free and used and keeps the index right; below are bitmap.h and btree.h.
 *
 * Every free unit is in exactly one of these:
 *
 * - a long run: more than BORDER units in a row, found in both trees;
 * - a short run: found through a hint in a bin of some shard, or, when memory
 *   for hints is out, in a chunk on some shard's list of lost chunks;
 * - a window: given away from its front, found through the shard that opened
 *   it, and by whoever wants units right there.
 *
 * Locks, in the order in which they are taken:
 *
 *   load lock	chunks that are being described or loaded
 *   shard	the calling thread's: its bins, windows and counters.
 *		Every call holds one. All of them, ascending, stop the world:
 *		nothing else moves; then chunk locks are not needed.
 *     chunks	the table, while a struct is made
 *     chunk	bits, window, counts. Ascending. Who changes [s, e) holds the
 *		hood: the chunks of every unit from s - HOOD to e + HOOD. So
 *		two changes that can see each other exclude each other.
 *	 latches of tree nodes, see btree.c
 *
 * A long run can be longer than any hood. While one thread cuts it at one
 * end, another at its far end may for a moment not find it in the tree of
 * starts: that is -EAGAIN, and it lets go of its hood and tries again.
 * The tree of starts decides: who takes a run out of there has it. The tree
 * of sizes always holds at least the same runs (inserted first, removed last).
 */

#include "alloc/alloc.h"
#include "alloc/bitmap.h"
#include "alloc/btree.h"
#include "alloc/lock.h"

#pragma GCC visibility push(hidden)

#define BORDER 1024u			/* longest short run, units */
#define HOOD (BORDER + 1)

/* A stack of hints, in blocks. One that became empty keeps its last block. */
#define HINTS 15

struct hints {
	struct hints *below;
	uint64_t starts[HINTS];
};

struct bin {
	struct hints *top;		/* holds what count % HINTS says */
	uint32_t count;
	uint32_t tidy;			/* count when it was last tidied */
};

enum window_slot {
	WINDOW_SMALL,			/* small requests without a goal */
	WINDOW_LARGE,			/* large ones */
	WINDOW_GOAL,			/* and up: those that came with a goal */
	WINDOWS = WINDOW_GOAL + 4,
};

struct counters {
	uint64_t allocs, alloc_units, frees, freed_units;
	uint64_t failures, splits, merges, steals, chunk_loads, saves;
	int64_t reserved, deferred;
};

struct shard {
	struct latch latch;		/* RANK_SHARD */
	/* Under latch: */
	uint32_t crowded;		/* length of runs whose bin to tidy */
	uint64_t credit;		/* free units promised to this shard;
					   others read it */
	uint32_t goal_turn;
	uint64_t windows[WINDOWS];	/* chunk + 1; 0: none; others read */
	struct counters n;
	uint64_t *lost;			/* chunks with runs that have no hint */
	uint32_t lost_count, lost_max;
	/* What others read for each large request: in lines that change seldom. */
	uint32_t lost_width __attribute__((aligned(128)));
					/* no lost run on the list is wider */
	uint64_t words;			/* bit i: filled[i] is not 0 */
	uint64_t filled[BORDER / 64];	/* bit i: bins[i] is not empty */
	struct bin bins[BORDER] __attribute__((aligned(128)));
					/* bins[i]: runs of i + 1 units */
} __attribute__((aligned(128)));

struct alloc {
	struct alloc_config cfg;
	struct alloc_source source;
	uint64_t units;
	uint32_t border;		/* longest short run: BORDER, but for
					   first fit */
	uint32_t small_units;		/* longest small request */
	uint64_t batch;			/* units of credit taken at a time */
	uint64_t hints_max;		/* in all shards */
	struct shard *shards;
	struct chunks chunks;
	struct btree by_size, by_start;	/* (length, start); (start, length) */

	struct lock state_lock;		/* RANK_ALLOC_STATE: one save or resize
					   at a time */
	struct saver *saver;		/* of the state file, or NULL */

	struct lock load_lock;		/* RANK_ALLOC_LOAD */
	pthread_cond_t load_done;
	/* Under load_lock: */
	uint64_t cursor;		/* first chunk not described; others read */
	uint64_t source_chunks;		/* that the source has */
	bool describing;

	uint64_t pool __attribute__((aligned(128)));	/* atomic: free, and
					   promised to no shard */
	uint64_t hints;			/* atomic: room for them, in all bins */
	struct pool hint_blocks;
	bool lost_all;			/* atomic: trust no list of lost chunks */
};

/* One call's stay inside: its shard, or with all of them the world. */
struct op {
	struct alloc *a;
	struct shard *sh;
	bool world;
	uint32_t refill;		/* hints of one lost chunk come in, of
					   runs from this length on; 0: no */
	uint64_t need;			/* chunk to load, with -ENODATA */
};

/* A long run as it was found in a tree, and where. */
struct run {
	uint64_t start, len;
	struct btree_spot by_size, by_start;
};

struct hood {
	uint64_t first, last;		/* chunks */
};

static inline uint64_t chunk_of(uint64_t unit) { return unit / ALLOC_CHUNK; }
static inline uint32_t off_of(uint64_t unit) { return unit % ALLOC_CHUNK; }

/* For what one thread at a time writes and others look at. */
#define atomic_get(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define atomic_add(p, v) __atomic_add_fetch((p), (v), __ATOMIC_RELAXED)
#define atomic_set(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)

static inline uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* -- space.c -- */

/* The calling thread's number; 0: it has none yet. */
extern _Thread_local unsigned op_thread;
unsigned op_new_thread(void);

static inline unsigned op_shard_of_thread(const struct alloc *a)
{
	return (op_thread ? op_thread : op_new_thread()) % a->cfg.shards;
}

/* Nodes at hand for whatever all shards may insert at the same time. */
static inline int op_prepare(struct alloc *a)
{
	size_t nodes = 32 + 8 * (size_t)a->cfg.shards;
	int err = btree_prepare(&a->by_size, nodes);

	return err ? err : btree_prepare(&a->by_start, nodes);
}

/* Enter by shard `i`, by the calling thread's; or stop the world. */
static inline int op_enter_shard(struct alloc *a, struct op *op, unsigned i)
{
	int err = op_prepare(a);

	if (err)
		return err;
	*op = (struct op){ .a = a, .sh = &a->shards[i] };
	latch_lock(&op->sh->latch);
	return 0;
}

static inline int op_enter(struct alloc *a, struct op *op)
{
	return op_enter_shard(a, op, op_shard_of_thread(a));
}

/* Enter to count alone: nothing is inserted, so nothing can be lacking. */
static inline void op_enter_to_count(struct alloc *a, struct op *op)
{
	*op = (struct op){ .a = a, .sh = &a->shards[op_shard_of_thread(a)] };
	latch_lock(&op->sh->latch);
}

int op_enter_world(struct alloc *a, struct op *op);
void op_leave_world(struct op *op);

static inline void op_leave(struct op *op)
{
	if (__builtin_expect(op->world, 0))
		op_leave_world(op);
	else
		latch_unlock(&op->sh->latch);
}

/* Lock what [s, e) can touch; at most two chunks long but in the world. */
int hood_lock(struct op *op, uint64_t s, uint64_t e, struct hood *h);
void hood_unlock(struct op *op, const struct hood *h);

/* -ENODATA and op->need when a chunk of [s, e) is not ready. */
int space_ready(struct op *op, uint64_t s, uint64_t e);
bool space_all_used(struct op *op, uint64_t s, uint64_t e);
bool space_all_free(struct op *op, uint64_t s, uint64_t e);

/*
 * In a hood: take free units that no window covers; or give back used ones,
 * -EINVAL when they are not all in use. The index follows. Or -ENOMEM or
 * -EAGAIN; then nothing changed.
 */
int space_take(struct op *op, uint64_t s, uint64_t e);
int space_give(struct op *op, uint64_t s, uint64_t e);

/* The index alone: units that are free, but not in it, enter it. */
int space_publish(struct op *op, uint64_t s, uint64_t e);

/*
 * In a hood of [s, e): take that part out of a long run. -EAGAIN when the run
 * is not there any more.
 */
int space_cut(struct op *op, struct run run, uint64_t s, uint64_t e);

/*
 * In the same hood: units that are in no index become used. Or -ENOMEM, but not
 * after space_prepare().
 */
int space_prepare(struct op *op, uint64_t s, uint64_t e);
int space_mark_used(struct op *op, uint64_t s, uint64_t e);

/*
 * With the world stopped: what is free from `end` on, to where the space ended
 * until now, leaves the index.
 */
void space_end_at(struct op *op, uint64_t end);

/* Index every run of a chunk; in its hood. Short runs only, or all. */
int space_index_chunk(struct op *op, uint64_t chunk, bool long_too);

/* The long run that `unit` is in, if it is. */
bool space_long_run(struct alloc *a, uint64_t unit, struct run *run);

/* A short run that begins at `start` is there to be found. */
void hint_push(struct op *op, uint64_t start, uint32_t len);
/* Take the first `len` of such a run. -ENOENT when it is out of date. */
int hint_take(struct op *op, uint64_t start, uint32_t run, uint32_t len);

/* Runs of one width are less than twice as long as each other: its bits. */
static inline uint32_t width_of(uint32_t len)
{
	return 32 - (uint32_t)__builtin_clz(len);
}

/*
 * Search a chunk of the shard's list again, for runs that may be `len` units
 * or longer. False when none of them can have one, or for want of memory.
 */
bool hints_search_lost(struct op *op, uint32_t len);

static inline bool hints_find_lost(struct op *op, uint32_t len)
{
	return op->sh->lost_width >= width_of(len) && hints_search_lost(op, len);
}

/* Throw out what is out of date, if a bin is crowded. In no hood. */
void hints_tidy_bin(struct op *op);

static inline void hints_tidy(struct op *op)
{
	if (__builtin_expect(op->sh->crowded, 0))
		hints_tidy_bin(op);
}

/* The shortest run of at least `len`, or the longest, by the bins. 0: none. */
static inline uint32_t hints_ceil(const struct shard *sh, uint32_t len)
{
	uint32_t w = (len - 1) / 64;
	uint64_t words = atomic_get(&sh->words) & ~0ull << w, word;

	if (words & 1ull << w) {
		word = atomic_get(&sh->filled[w]) & ~0ull << (len - 1) % 64;
		if (word)
			goto found;
		words ^= 1ull << w;
	}
	if (!words)
		return 0;
	w = (uint32_t)__builtin_ctzll(words);
	word = atomic_get(&sh->filled[w]);
	/* Another shard's may have gone meanwhile. */
	if (!word)
		return 0;
found:
	return w * 64 + (uint32_t)__builtin_ctzll(word) + 1;
}

uint32_t hints_longest(const struct shard *sh);
/* Take a hint from the bin of runs of `run` units, which has one. */
uint64_t hint_pop(struct op *op, uint32_t run);

/*
 * Swap the first bin of `from` that is not empty, of runs of `len` units or
 * more, with one's own, or the lists of lost chunks. False when there is
 * nothing. Both shards are locked.
 */
bool hints_steal(struct shard *own, struct shard *from, uint32_t len);

/* Windows; these lock what they need themselves. */
int window_open(struct op *op, unsigned slot, struct run run, uint64_t from,
		uint64_t to);
/* From its front, if it has at least `len` units and `most` at most. */
#define ANY_WINDOW UINT64_MAX
int window_take(struct op *op, unsigned slot, uint32_t len, uint64_t most,
		struct extent *out);
/* What is left in the window of a chunk, whoever opened it. */
uint32_t window_room(struct op *op, uint64_t chunk);
int window_close(struct op *op, unsigned slot);
int window_close_chunk(struct op *op, uint64_t chunk);
/* Take `len` from the front of the window of a locked chunk. */
int window_bump(struct op *op, struct chunk *c, uint32_t len);

/* -- load.c -- */

/* Bring in one chunk; `expect` free units in it, or UINT32_MAX. */
int load_chunk(struct alloc *a, uint64_t chunk, uint32_t expect);
/* Learn more of the space. -ENOENT when all of it is known. */
int load_more(struct alloc *a);
bool load_complete(struct alloc *a);
/* What a state file said: a chunk's bits, a piece of the maps; or chunks. */
int load_adopt(struct alloc *a, uint64_t chunk, uint64_t *bits, uint32_t expect);
int load_alike(struct alloc *a, uint64_t first, uint64_t count, bool free);

/* -- state.c -- */

/* Read the state file, or start with all free; and start the saver. */
int state_open(struct alloc *a);
/* Save, and stop the saver. */
int state_close(struct alloc *a);
int state_save(struct alloc *a);
/* Count a call; wakes the saver when it is time. */
void state_count_call(struct alloc *a);

static inline void state_count(struct alloc *a)
{
	if (__builtin_expect(a->saver != NULL, 0))
		state_count_call(a);
}

/* -- alloc.c -- */

/* With the world stopped: bring all credit back, take `units` off the pool. */
int promise_from_all(struct op *op, uint64_t units);

#pragma GCC visibility pop

#endif
