/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_ALLOC_H
#define SPACEWEAVE_ALLOC_H

/*
 * The disk-space allocator: which units of a space of addresses are free.
 *
 * One truth, a bitmap in chunks of ALLOC_CHUNK units; an index of its long
 * runs in two B-trees, by (length, start) and by start, and of its short ones
 * in bins by length. Small requests are served from the bins, or the front of
 * a run, that a shard holds at the time, larger ones from the trees. Nothing strands: success is decided by one exact
 * counter of free units, and whatever that counter promised is found, in
 * several extents if need be. ALLOC.md states the policy.
 *
 * All positions and lengths are in units, 64 bit, from the start of the space;
 * only alloc_bytes() and alloc_free_bytes() take bytes. Calls return 0 or a
 * negative errno; after an error the state and the result are untouched.
 *
 * Threads: every call but alloc_open() and alloc_close() may be made from any
 * thread at any time. No call blocks on I/O but alloc_save() (library use) and
 * those that need a chunk for the first time, which call alloc_source.load().
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ALLOC_CHUNK 32768u		/* units that one chunk covers */
#define ALLOC_CHUNK_BYTES (ALLOC_CHUNK / 8u)

struct alloc;

struct extent {
	uint64_t start;
	uint64_t len;
};

enum alloc_policy {
	ALLOC_POLICY_DEFAULT = 0,	/* what measures best: best fit */
	ALLOC_FIRST_FIT,		/* lowest address that fits */
	ALLOC_BEST_FIT,			/* smallest run that fits, lowest address */
};

/*
 * Zero means the default in every field but `units`. alloc_config_check()
 * gives the bound that a bad field broke.
 */
struct alloc_config {
	uint64_t units;			/* size of the space, 1 .. 2^52 */
	uint32_t unit_bytes;		/* 512 .. 1 MiB, a power of two; 4096 */
	uint32_t small_limit_bytes;	/* requests up to it are small; 262144;
					   at least a unit, at most a quarter
					   of a chunk */
	uint32_t shards;		/* 1 .. 1024; 16 */
	enum alloc_policy policy;
	const char *state_path;		/* NULL: no state file; none with a
					   source */
	uint32_t backup_interval_s;	/* save this often; 300; UINT32_MAX: never */
	uint32_t operation_threshold;	/* or after so many calls; 1000;
					   UINT32_MAX: never */
};

/*
 * Where the state comes from when somebody else keeps it (a volume). Called
 * with no lock of the allocator held that another call needs to finish.
 */
struct alloc_source {
	void *ctx;
	/*
	 * Fill `bits` with chunk `chunk`'s ALLOC_CHUNK_BYTES: little-endian
	 * bit order, bit i of byte i / 8 set when unit chunk * ALLOC_CHUNK + i
	 * is in use. Called at most once at a time for a chunk; once it
	 * succeeded the allocator's copy is the truth until alloc_close().
	 */
	int (*load)(void *ctx, uint64_t chunk, void *bits);
	/*
	 * Describe, from chunk `chunk` on, a run of chunks that are alike:
	 * *count chunks, each with *free units free (ALLOC_CHUNK: wholly free;
	 * 0: full; the last chunk of the space counts only units that exist).
	 * A run of chunks that are neither has *count 1.
	 * The allocator asks in address order, as it needs to know more.
	 */
	int (*describe)(void *ctx, uint64_t chunk, uint64_t *count,
			uint32_t *free);
};

/*
 * Check `cfg`, with the defaults filled in where a field is zero. Returns 0 or
 * -EINVAL with a sentence in msg that names field, value and bound.
 */
int alloc_config_check(struct alloc_config *cfg, char *msg, size_t msg_len);

/*
 * Take fields from the environment: SPACEWEAVE_ALLOC_UNIT_BYTES, _UNITS,
 * _SMALL_LIMIT, _SHARDS, _POLICY (first-fit, best-fit), _STATE_PATH,
 * _BACKUP_INTERVAL, _OPERATION_THRESHOLD. Sizes take K M G T. Returns as
 * alloc_config_check().
 */
int alloc_config_env(struct alloc_config *cfg, char *msg, size_t msg_len);

/*
 * Open a space. With `source` NULL and no state path all of it is free; with a
 * state path the saved state is read if there is one: -EUCLEAN when both it
 * and its predecessor are damaged, -EINVAL when it is of a space of another
 * size; see alloc_notice(). With a source, `free_units` is the exact
 * count of units free in it, and the source is asked lazily: opening takes
 * the same time for every size.
 */
int alloc_open(const struct alloc_config *cfg, const struct alloc_source *source,
	       uint64_t free_units, struct alloc **out);

/*
 * What alloc_open() had to say about the state file, or the last save that
 * nobody called for: "state file 'x' is damaged (its checksum does not
 * match); the one before it was used". Empty when there is nothing to say. Good
 * until the next save.
 */
const char *alloc_notice(const struct alloc *a);

/* Save (with a state path) and close. Returns the error of the save. */
int alloc_close(struct alloc *a);

/*
 * Promises. alloc_reserve() takes `units` off the free count or returns
 * -ENOSPC; a reserved unit is certain to be found by alloc_vec(). Calls named
 * *_reserved consume a promise that the caller holds instead of the free
 * count; alloc_unreserve() gives back what was not used.
 */
int alloc_reserve(struct alloc *a, uint64_t units);
void alloc_unreserve(struct alloc *a, uint64_t units);

/*
 * One extent of exactly `len` units. -ENOSPC when no run is that long, by the
 * policy, anywhere; close to `goal` where a run there serves as well; exactly
 * at `start` (-EBUSY when a unit of it is in use, or promised to others).
 */
int alloc_any(struct alloc *a, uint64_t len, struct extent *out);
int alloc_near(struct alloc *a, uint64_t goal, uint64_t len, struct extent *out);
int alloc_exact(struct alloc *a, uint64_t start, uint64_t len);

/*
 * `len` units in as few extents as there can be found near `goal`, at most
 * `max` of them: out[0 .. *count - 1], *got units in all. Fails with -ENOSPC
 * only when fewer than `len` units are free; *got is less than `len` only
 * when `max` extents did not suffice: call again for the rest.
 * `goal` ALLOC_NO_GOAL means anywhere. The _reserved form cannot fail for
 * want of space.
 */
#define ALLOC_NO_GOAL UINT64_MAX
int alloc_vec(struct alloc *a, uint64_t goal, uint64_t len, struct extent *out,
	      unsigned max, unsigned *count, uint64_t *got);
int alloc_vec_reserved(struct alloc *a, uint64_t goal, uint64_t len,
		       struct extent *out, unsigned max, unsigned *count,
		       uint64_t *got);

/*
 * Give units back, all of what was allocated or any part of it. Refused, and
 * nothing changed: -EINVAL when a unit of it is not allocated or a free of it
 * is pending already, -ERANGE outside the space, zero length or overflow.
 */
int alloc_free(struct alloc *a, uint64_t start, uint64_t len);

/*
 * The same in two steps, for a volume, where free means free after the next
 * checkpoint. alloc_defer() marks the units as pending (refused as above):
 * they stay in use, yet a second free of them is refused. alloc_release()
 * ends the wait: they are free now. alloc_undefer() takes the mark back.
 * A run given to alloc_release() must have been deferred, in any pieces.
 * alloc_release_reserved() makes the units a promise of the caller's instead,
 * and nobody else can have them in between.
 */
int alloc_defer(struct alloc *a, uint64_t start, uint64_t len);
int alloc_undefer(struct alloc *a, uint64_t start, uint64_t len);
int alloc_release(struct alloc *a, uint64_t start, uint64_t len);
int alloc_release_reserved(struct alloc *a, uint64_t start, uint64_t len);

/* The brief's plain calls: bytes, rounded up to units. */
int alloc_bytes(struct alloc *a, uint64_t bytes, uint64_t *offset_bytes);
int alloc_free_bytes(struct alloc *a, uint64_t offset_bytes, uint64_t bytes);

struct alloc_stats {
	uint64_t units;			/* size of the space */
	uint64_t free_units;		/* exact; without what is reserved */
	uint64_t reserved_units;
	uint64_t deferred_units;	/* pending frees: in use */
	/* The rest needs every chunk's summary; see alloc_stats(). */
	uint64_t free_extents;
	uint64_t largest_free;		/* units */
	uint64_t histogram[53];		/* free extents of 2^i .. 2^(i+1)-1 units */
	/* Calls since open. */
	uint64_t allocs, alloc_units, frees, freed_units;
	uint64_t failures, splits, merges, steals, chunk_loads, saves;
	uint64_t memory_bytes;		/* held by the allocator */
};

/* Free units: a load for each shard, exact when no call is in progress. */
uint64_t alloc_free_units(const struct alloc *a);
/* Used share of the space, 0 .. 1. */
double alloc_utilization(const struct alloc *a);
/*
 * Everything. With `deep` the free extents are counted too, which visits all
 * chunks (and loads those not loaded yet); without it those fields are zero.
 */
int alloc_stats(struct alloc *a, bool deep, struct alloc_stats *out);

/*
 * The first free extent that ends after `from`, as it is at this moment;
 * -ENOENT after the last. Neighbouring free chunks make one extent.
 */
int alloc_next_free(struct alloc *a, uint64_t from, struct extent *out);

/*
 * Change the size. Growing adds free units. Shrinking is refused with -EBUSY
 * while units beyond the new size are in use; *blocking then holds the first
 * such run (call again after moving it). With -ENOSPC when more is reserved
 * than would be left, -EFBIG beyond what this space was opened for (at least
 * 2^41 units).
 */
int alloc_resize(struct alloc *a, uint64_t units, struct extent *blocking);

/*
 * Save the state file now: one point in time, fsynced, atomically replaced.
 * Everything allocated or freed before the call is durable when it returns 0.
 * -EINVAL without a state path.
 */
int alloc_save(struct alloc *a);

/*
 * Hold the structures against each other: bitmap, shards, both trees, the
 * counters. Waits for no call in progress, so only exact when there is none.
 * Returns 0 or -EUCLEAN with a sentence in msg.
 */
int alloc_check(struct alloc *a, char *msg, size_t msg_len);

#ifdef __cplusplus
}
#endif
#endif
