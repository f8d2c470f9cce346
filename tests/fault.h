/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_TESTS_FAULT_H
#define SPACEWEAVE_TESTS_FAULT_H

/*
 * An image that loses power. It stands in memory behind the image table,
 * copy-on-write over the one it was made from, and keeps a log of the writes,
 * flushes and discards it was given. From the log fault_explore() builds the
 * images that a power cut could have left:
 *
 *   Between two flushes any subset of the writes may have reached the disk, in
 *   any order, and each of them whole or torn. A cut at position p of the log
 *   leaves everything written before the last flush that had returned by then,
 *   and a subset of what was written since. So the images of all the cuts
 *   between two flushes are the subsets of the writes between them, and each
 *   subset need be tried only once: against the latest promise that was made
 *   before the second flush returned, and the earliest operation that can
 *   explain the last write in it.
 *
 * Discards are writes of zeroes that may or may not happen.
 *
 * Threads: the image's calls may come from any thread. The others are for one
 * thread, while no other uses the image.
 */

#include "meta/image.h"

#include <stdbool.h>
#include <stdint.h>

struct fault;

#define FAULT_PAGE 4096u
#define FAULT_SECTOR 512u

enum fault_call {
	FAULT_READ,
	FAULT_WRITE,
	FAULT_FLUSH,
	FAULT_DISCARD,
	FAULT_ENSURE,
	FAULT_CALLS,
};

/* An image of zeroes. */
struct fault *fault_create(uint64_t bytes);
/*
 * An image that begins as `under` is now, not to be changed while this lives.
 * fault_fork(f, under) makes f one again without giving its memory up.
 */
struct fault *fault_create_over(const struct fault *under);
void fault_fork(struct fault *f, const struct fault *under);
void fault_destroy(struct fault *f);

struct image *fault_image(struct fault *f);
/* The image's bytes as they are now, without counting as a read. */
void fault_peek(const struct fault *f, void *buf, size_t len, uint64_t off);
/* Damage: change bytes behind everybody's back; not in the log. */
void fault_poke(struct fault *f, const void *buf, size_t len, uint64_t off);

/* Keep a log from now on (or drop it): what stands in the image is durable. */
void fault_record(struct fault *f, bool on);
/* Flushes are answered but do nothing. */
void fault_lie(struct fault *f, bool on);
/* Discards are forgotten rather than done. */
void fault_keep_discarded(struct fault *f, bool on);
/* A write to the image is a mistake: refused, and counted as a failure. */
void fault_freeze(struct fault *f, bool on);
/* Flushes take this long at least: so that threads meet. */
void fault_slow_flush(struct fault *f, unsigned us);

/*
 * The n-th call (from 0) of its kind from now on fails with -err, and then
 * every one if `for_ever`. A failing write does nothing, or with `torn`
 * reaches the disk in part; a failing flush makes nothing durable and, with
 * `torn`, what was written since the last one is as good as lost: later
 * flushes do not cover it (as Linux does it), though it can be read until the
 * image is told to forget. FAULT_CALLS: calls of all kinds
 * but reads. err 0 ends it. A promise of space that fails with ENOSPC does so
 * for what was never written alone.
 */
void fault_fail(struct fault *f, enum fault_call kind, uint64_t n, int err,
		bool for_ever, bool torn);
/* How many calls there were, and whether a failure has happened. */
uint64_t fault_count(const struct fault *f, enum fault_call kind);
uint64_t fault_failures(const struct fault *f);

/*
 * In between: fn runs in the midst of the n-th call (from 0; of writes, flushes
 * and discards) that this thread makes from now on, while no lock of the image
 * is held, so that other threads may use it: before the call, or after it, or
 * during it, which is of flushes alone (what is written then, they do not
 * cover). n UINT64_MAX: never. Returns how many such calls there were since
 * the last time.
 */
enum fault_when {
	FAULT_BEFORE,
	FAULT_DURING,
	FAULT_AFTER,
};
uint64_t fault_between(struct fault *f, uint64_t n, enum fault_when when,
		       void (*fn)(void *ctx), void *ctx);

/*
 * Memory: the n-th malloc, calloc, realloc or aligned allocation of this thread
 * by the code under test gives NULL (and then all, if for_ever), and so does
 * mmap; a thread cannot be made. UINT64_MAX ends it. Returns how many there
 * were since the last call.
 */
uint64_t fault_memory(uint64_t n, bool for_ever);

/* The next time that this thread has memory made longer, fn runs before. */
void fault_growing(void (*fn)(void *ctx), void *ctx);

/*
 * Until the same with false: no call of this image and no allocation of this
 * thread fails or counts. For the tests' own questions.
 */
void fault_pause(struct fault *f, bool on);

/* Allocations that never fail, for the tests' own. */
void *sim_malloc(size_t n);
void *sim_calloc(size_t n, size_t size);
void *sim_realloc(void *p, size_t n);

/* Into the log: operation `t` begins now; everything up to `t` is promised. */
void fault_started(struct fault *f, uint64_t t);
void fault_promised(struct fault *f, uint64_t t);
/* The same for one of several threads, each with a count of its own. */
#define FAULT_WHO 8
void fault_started_by(struct fault *f, unsigned who, uint64_t t);
void fault_promised_by(struct fault *f, unsigned who, uint64_t t);

/* How many crash images to build from each stretch between two flushes. */
struct fault_plan {
	uint64_t seed;
	unsigned all_below;	/* all subsets if there are no more writes than this */
	unsigned random;	/* random subsets beyond those that are always tried */
	unsigned torn;		/* and as many with torn writes */
	bool sparse;		/* leave out "one lost" and "only one": long logs */
	uint64_t from;		/* leave out cuts that come before this event of the log */
	uint64_t only;		/* this image alone; 0: all */
};

/* One crash image. */
struct fault_cut {
	uint64_t number;	/* from 1 on: what fault_plan.only takes */
	uint64_t flush;		/* after so many flushes */
	uint64_t promised;	/* the state must be one of promised .. started */
	uint64_t started;
	uint64_t promised_by[FAULT_WHO], started_by[FAULT_WHO];	/* [0]: those */
	unsigned writes, kept, torn;	/* since the flush; of them */
	char text[96];		/* the same for a reader */
};

/*
 * Call fn with every crash image of the log, until it returns nonzero. `first`
 * and `promised` are what was started and promised before the log began. The
 * image given to fn is its to use; it is forgotten afterwards.
 *
 * With `final`, what was written after the last flush is tried too; without,
 * the log is shortened to that, and goes on: *first and *promised are moved.
 */
typedef int (*fault_fn)(void *ctx, struct fault *crashed,
			const struct fault_cut *cut);
int fault_explore(struct fault *f, const struct fault_plan *plan,
		  uint64_t *started, uint64_t *promised, bool final,
		  fault_fn fn, void *ctx);

/* Events in the log: to decide when to explore. */
uint64_t fault_log_length(const struct fault *f);
/* Print the log (stderr). */
void fault_log_print(const struct fault *f);

/* ---- random numbers, the same everywhere ------------------------------------ */

struct rng {
	uint64_t s;
};

static inline uint64_t rng_next(struct rng *r)
{
	uint64_t z = (r->s += 0x9e3779b97f4a7c15ull);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static inline uint64_t rng_below(struct rng *r, uint64_t n)
{
	return n ? rng_next(r) % n : 0;
}

/*
 * How long to go on: STATES from the environment (0: to the end), or else so
 * many crash states or so many seconds, whatever comes first.
 */
struct effort {
	uint64_t states;	/* 0: to the end */
	uint64_t until_ns;	/* 0: any time */
};
struct effort effort_begin(uint64_t states, unsigned seconds);
bool effort_spent(const struct effort *e, uint64_t states);

/* An environment variable as a number, or `otherwise`. */
uint64_t env_u64(const char *name, uint64_t otherwise);

#endif
