/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Where units are taken from.
 *
 * A request first takes its units off the free count, and fails there or not
 * at all, unless it must be one extent. Then it looks, in this order:
 *
 *  1. With a goal: in the goal's chunk, the first run from the goal on that
 *     is long enough, else the first before it. Taking from the front of a
 *     long run opens a window there, so that the next one follows cheaply.
 *  2. The shortest short run that is long enough: of this shard's bins for a
 *     small request, of all shards' for a large one, or when little is free. A
 *     large request that must be one extent and would leave a sliver of it
 *     tries 3 and 4 first.
 *  3. This shard's window for small, or for large requests.
 *  4. The tree of sizes: the shortest long run that is long enough, lowest
 *     address first (first fit: the tree of starts). For a small request, or
 *     when it is a very long one, it becomes the new window.
 *  5. This shard's windows, closed: their rest may join its neighbours.
 *  6. What the source has not described yet.
 *  7. The short runs of other shards, for a small request too; then their
 *     windows, closed, where there is room for it.
 *  8. If several extents will do: the longest run there is, and again.
 *  9. With the world stopped: all windows closed, all shards' runs.
 *
 * After step 9, and with nothing left to describe, what is not found is not
 * there.
 */
#include "alloc/alloc_priv.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* A window is worth it from so many requests on. */
#define WINDOW_REQUESTS 4
/* A run shorter than this is not worth a window at a goal. */
#define GOAL_WINDOW_MIN 1024
/* So many units are a sliver. */
#define SLIVER 16
/* Chunks to look at before a request is cut into pieces for want of a run. */
#define EAGER_LOADS 4
/* A small request spares long runs once less than 1 / SCARCE is free. */
#define SCARCE 32

/* -- Promises -- */

static void credit_set(struct shard *sh, uint64_t credit)
{
	atomic_set(&sh->credit, credit);
}

/*
 * Take `least` units from the pool, and up to `more`; or nothing. Less the less
 * is left, so that what is left is not all in the wrong shards.
 */
static uint64_t pool_take(struct alloc *a, uint64_t least, uint64_t more)
{
	uint64_t had = __atomic_load_n(&a->pool, __ATOMIC_RELAXED), got;

	do {
		if (had < least)
			return 0;
		got = least + min_u64(more, (had - least) / 4 / a->cfg.shards);
	} while (!__atomic_compare_exchange_n(&a->pool, &had, had - got, true,
					      __ATOMIC_RELAXED,
					      __ATOMIC_RELAXED));
	return got;
}

static bool promise_from_shard(struct op *op, uint64_t units)
{
	struct shard *sh = op->sh;
	uint64_t got;

	if (__builtin_expect(sh->credit < units, 0)) {
		uint64_t least = units - sh->credit;

		got = pool_take(op->a, least, op->a->batch);
		if (!got)
			return false;
		credit_set(sh, sh->credit + got);
	}
	credit_set(sh, sh->credit - units);
	return true;
}

static void promise_return(struct op *op, uint64_t units)
{
	struct shard *sh = op->sh;
	uint64_t credit = sh->credit + units, batch = op->a->batch;

	if (credit > 2 * batch) {
		__atomic_add_fetch(&op->a->pool, credit - batch,
				   __ATOMIC_RELAXED);
		credit = batch;
	}
	credit_set(sh, credit);
}

/* With all shards' credit back in the pool, the pool alone decides. */
int promise_from_all(struct op *op, uint64_t units)
{
	struct alloc *a = op->a;

	for (unsigned i = 0; i < a->cfg.shards; i++) {
		__atomic_add_fetch(&a->pool, a->shards[i].credit,
				   __ATOMIC_RELAXED);
		credit_set(&a->shards[i], 0);
	}
	return pool_take(a, units, 0) ? 0 : -ENOSPC;
}

/* Enter and hold a promise of `units`. */
static int enter_with_promise(struct alloc *a, struct op *op, uint64_t units)
{
	int err = op_enter(a, op);

	if (err || promise_from_shard(op, units))
		return err;
	op_leave(op);
	err = op_enter_world(a, op);
	if (err)
		return err;
	err = promise_from_all(op, units);
	if (err)
		op->sh->n.failures++;
	op_leave(op);
	if (err)
		return err;
	err = op_enter(a, op);
	if (err)
		__atomic_add_fetch(&a->pool, units, __ATOMIC_RELAXED);
	return err;
}

int alloc_reserve(struct alloc *a, uint64_t units)
{
	struct op op;
	int err = enter_with_promise(a, &op, units);

	if (err)
		return err;
	op.sh->n.reserved += (int64_t)units;
	op_leave(&op);
	return 0;
}

void alloc_unreserve(struct alloc *a, uint64_t units)
{
	struct op op;

	op_enter_to_count(a, &op);
	op.sh->n.reserved -= (int64_t)units;
	promise_return(&op, units);
	op_leave(&op);
}

uint64_t alloc_free_units(const struct alloc *a)
{
	uint64_t free = __atomic_load_n(&a->pool, __ATOMIC_RELAXED);

	for (unsigned i = 0; i < a->cfg.shards; i++)
		free += __atomic_load_n(&a->shards[i].credit, __ATOMIC_RELAXED);
	return free;
}

double alloc_utilization(const struct alloc *a)
{
	return 1.0 - (double)alloc_free_units(a) / (double)atomic_get(&a->units);
}

/* -- Looking, step by step; -ENOSPC: not here -- */

/*
 * Where a window from `from` on would end: with its chunk and its run, and so
 * that all shards' windows are but a part of what is free.
 */
static uint64_t window_end(const struct alloc *a, const struct run *run,
			   uint64_t from)
{
	uint64_t end = min_u64(run->start + run->len,
			       (chunk_of(from) + 1) * ALLOC_CHUNK);

	return min_u64(end, from + atomic_get(&a->pool) / 4 / a->cfg.shards);
}

/* Units [s, s + len) in the long run that holds them, by a window if long. */
static int take_at(struct op *op, uint64_t s, uint32_t len, struct extent *out)
{
	struct alloc *a = op->a;
	struct run run;
	struct hood h;
	unsigned slot;
	int err;

	if (space_long_run(a, s, &run)) {
		uint64_t end = window_end(a, &run, s);

		/* At its front: what came before was taken, more may follow. */
		if (run.start == s && end - s >= GOAL_WINDOW_MIN &&
		    end - s >= WINDOW_REQUESTS * (uint64_t)len) {
			slot = WINDOW_GOAL + op->sh->goal_turn++ %
						     (WINDOWS - WINDOW_GOAL);
			err = window_open(op, slot, run, s, end);
			if (!err)
				return window_take(op, slot, len, ANY_WINDOW, out);
			if (err != -EBUSY)
				return err;
		}
	}
	err = hood_lock(op, s, s + len, &h);
	if (err)
		return err;
	err = -EAGAIN;
	if (!space_ready(op, s, s + len) && space_all_free(op, s, s + len)) {
		struct chunk *c = chunks_peek(&a->chunks, chunk_of(s));

		if (chunk_free_after(c, off_of(s), len) == len)
			err = space_take(op, s, s + len);
		*out = (struct extent){ s, len };
	}
	hood_unlock(op, &h);
	return err;
}

/* Step 1. -ENODATA: load op->need first. */
static int from_goal(struct op *op, uint64_t goal, uint64_t len,
		     struct extent *out)
{
	uint64_t chunk = chunk_of(goal), base = chunk * ALLOC_CHUNK;
	struct chunk *c = chunks_get(&op->a->chunks, chunk);
	uint32_t at, n = (uint32_t)len;
	bool clash;
	int err = -ENOSPC;

	if (!c)
		return -ENOMEM;
	if (len > ALLOC_CHUNK)
		return -ENOSPC;
	if (!op->world)
		latch_lock(&c->latch);
	if (c->state != CHUNK_READY) {
		op->need = chunk;
		err = -ENODATA;
		goto out;
	}
	if (!chunk_find(c, off_of(goal), n, &at))
		goto out;
	clash = c->win_lo < c->win_hi && at < c->win_hi && at + n > c->win_lo;
	if (clash && at == c->win_lo && at + n <= c->win_hi) {
		err = window_bump(op, c, n);
		*out = (struct extent){ base + at, len };
		goto out;
	}
	if (!op->world)
		latch_unlock(&c->latch);
	if (clash) {
		err = window_close_chunk(op, chunk);
		return err ? err : -EAGAIN;
	}
	return take_at(op, base + at, n, out);
out:
	if (!op->world)
		latch_unlock(&c->latch);
	return err;
}

/*
 * The shard whose bins fit better than this one's, and best of all, gives up
 * that bin, if it can be had without waiting.
 */
static void steal_fit(struct op *op, uint32_t len)
{
	struct alloc *a = op->a;
	uint32_t own = hints_ceil(op->sh, len), best = own ? own : UINT32_MAX;
	struct shard *from = NULL;

	for (unsigned i = 0; i < a->cfg.shards && best > len; i++) {
		uint32_t run = hints_ceil(&a->shards[i], len);

		if (run && run < best && &a->shards[i] != op->sh) {
			best = run;
			from = &a->shards[i];
		}
	}
	if (!from || !latch_try(&from->latch))
		return;
	op->sh->n.steals += hints_steal(op->sh, from, len);
	latch_unlock(&from->latch);
}

/* Step 2; after steal_fit(), if from `all` shards. */
static int from_bins(struct op *op, uint32_t len, bool all, struct extent *out)
{
	struct shard *sh = op->sh;

	do {
		uint32_t run;

		while ((run = hints_ceil(sh, len))) {
			uint64_t start = hint_pop(op, run);
			int err = hint_take(op, start, run, len);

			if (err == -ENOENT) {
				if (all)
					steal_fit(op, len);
				continue;
			}
			if (err)
				hint_push(op, start, run);
			else
				*out = (struct extent){ start, len };
			return err;
		}
	} while (hints_find_lost(op, len));
	return -ENOSPC;
}

/* The long run that the policy prefers for `len`. */
static bool choose_run(struct alloc *a, uint64_t len, struct run *run)
{
	struct pair p = { len, 0 };

	if (!btree_ceil(&a->by_size, p, &p, &run->by_size))
		return false;
	*run = (struct run){ p.v, p.k, run->by_size, { NULL, 0 } };
	if (a->cfg.policy != ALLOC_FIRST_FIT)
		return true;
	/* One will do; which is the first? */
	for (p = (struct pair){ 0, 0 };
	     btree_ceil(&a->by_start, p, &p, &run->by_start); p.k++, p.v = 0) {
		if (p.v < len)
			continue;
		*run = (struct run){ p.k, p.v, { NULL, 0 }, run->by_start };
		return true;
	}
	return false;
}

/* Take the first `len` units of `run`. */
static int take_front(struct op *op, struct run run, uint64_t len)
{
	uint64_t e = run.start + len;
	struct hood h;
	int err = hood_lock(op, run.start, e, &h);

	if (err)
		return err;
	err = space_prepare(op, run.start, e);
	if (!err)
		err = space_cut(op, run, run.start, e);
	if (!err)
		err = space_mark_used(op, run.start, e);
	hood_unlock(op, &h);
	return err;
}

/* Steps 3 and 4. */
static int from_runs(struct op *op, uint64_t len, struct extent *out)
{
	struct alloc *a = op->a;
	bool small = len <= a->small_units, have;
	unsigned slot = small ? WINDOW_SMALL : WINDOW_LARGE;
	struct run run;
	uint64_t end;
	int err;

	if (small && !window_take(op, slot, (uint32_t)len, ANY_WINDOW, out))
		return 0;
	have = choose_run(a, len > a->border ? len : a->border + 1, &run);
	if (!small && len < ALLOC_CHUNK &&
	    !window_take(op, slot, (uint32_t)len, have ? run.len : ANY_WINDOW, out))
		return 0;
	if (!have)
		return -ENOSPC;
	end = window_end(a, &run, run.start);
	if ((small || run.len >= 2 * ALLOC_CHUNK) &&
	    end - run.start >= WINDOW_REQUESTS * len) {
		err = window_open(op, slot, run, run.start, end);
		if (!err)
			return window_take(op, slot, (uint32_t)len, ANY_WINDOW, out);
		if (err != -EBUSY)
			return err;
	}
	if (chunk_of(run.start + len - 1) - chunk_of(run.start) > 1 && !op->world)
		return -EXDEV;		/* longer than a hood: with the world */
	err = take_front(op, run, len);
	if (!err)
		*out = (struct extent){ run.start, len };
	return err;
}

/* Step 5. Returns 0 when there was something to close. */
static int close_windows(struct op *op)
{
	int err = -ENOSPC;

	for (unsigned slot = 0; slot < WINDOWS; slot++) {
		if (!op->sh->windows[slot])
			continue;
		err = window_close(op, slot);
		if (err)
			return err;
	}
	return err;
}

/* Step 8: the longest run, which is shorter than `len`. */
static int from_longest(struct op *op, uint64_t len, struct extent *out)
{
	struct pair p = { UINT64_MAX, UINT64_MAX };
	struct btree_spot spot;
	struct shard *sh = op->sh;
	int err;

	if (btree_floor(&op->a->by_size, p, &p, &spot)) {
		struct run run = { p.v, p.k, spot, { NULL, 0 } };
		uint64_t n = min_u64(p.k, len);

		if (chunk_of(p.v + n - 1) - chunk_of(p.v) > 1 && !op->world)
			return -EXDEV;
		err = take_front(op, run, n);
		if (!err)
			*out = (struct extent){ p.v, n };
		return err;
	}
	do {
		uint32_t run;

		while ((run = hints_longest(sh))) {
			err = from_bins(op, (uint32_t)min_u64(run, len), false,
					out);
			if (err != -ENOSPC)
				return err;
		}
	} while (hints_find_lost(op, 1));
	return -ENOSPC;
}

/* Would the best fit for a large request leave what hardly anybody wants? */
static bool leaves_sliver(const struct op *op, uint64_t len)
{
	uint32_t run = hints_ceil(op->sh, (uint32_t)len);

	return run > len && run - len < SLIVER;
}

static bool scarce(const struct alloc *a)
{
	return atomic_get(&a->pool) < atomic_get(&a->units) / SCARCE;
}

/* Steps 1 to 5. */
static int look_here(struct op *op, uint64_t goal, uint64_t len, bool whole,
		     struct extent *out)
{
	bool large = len > op->a->small_units;
	/* What is left is too little to cut a longer run for nothing. */
	bool all = !op->world && (large || scarce(op->a));
	int err = -ENOSPC;

	hints_tidy(op);
	if (goal < op->a->units)
		err = from_goal(op, goal, len, out);
	if (err == -ENOSPC && len <= op->a->border) {
		if (all)
			steal_fit(op, (uint32_t)len);
		if (large && whole && leaves_sliver(op, len))
			err = from_runs(op, len, out);
		if (err == -ENOSPC)
			err = from_bins(op, (uint32_t)len, all, out);
	}
	if (err == -ENOSPC)
		err = from_runs(op, len, out);
	if (err == -ENOSPC)
		err = close_windows(op) ? -ENOSPC : -EAGAIN;
	return err;
}

/* Close a window of any shard that has room for `len`. -EAGAIN: look again. */
static int close_fit(struct alloc *a, uint64_t len)
{
	struct op op;
	int err = op_enter(a, &op);

	if (err)
		return err;
	for (unsigned i = 0; err == 0 && i < a->cfg.shards * WINDOWS; i++) {
		uint64_t *at = &a->shards[i / WINDOWS].windows[i % WINDOWS];
		uint64_t chunk = atomic_get(at);

		if (chunk && window_room(&op, chunk - 1) >= len)
			err = window_close_chunk(&op, chunk - 1) ?: -EAGAIN;
	}
	op_leave(&op);
	return err ? err : -ENOSPC;
}

/*
 * Step 7: another shard's runs that would do become this one's, a bin at a
 * time, or else its list of lost chunks. -EAGAIN: look again.
 */
static int steal(struct alloc *a, uint64_t len)
{
	unsigned own = op_shard_of_thread(a);

	for (unsigned i = 1; len <= a->border && i < a->cfg.shards; i++) {
		unsigned from = (own + i) % a->cfg.shards;
		bool done;

		if (!hints_ceil(&a->shards[from], (uint32_t)len) &&
		    atomic_get(&a->shards[from].lost_width) <
			    width_of((uint32_t)len))
			continue;
		latch_lock(&a->shards[own < from ? own : from].latch);
		latch_lock_nested(&a->shards[own < from ? from : own].latch,
				  true);
		done = hints_steal(&a->shards[own], &a->shards[from],
				   (uint32_t)len);
		a->shards[own].n.steals += done;
		latch_unlock(&a->shards[own].latch);
		latch_unlock(&a->shards[from].latch);
		if (done)
			return -EAGAIN;
	}
	return close_fit(a, len);
}

static int find_all_lost(struct op *op)
{
	struct alloc *a = op->a;
	int err = 0;

	if (!__atomic_exchange_n(&a->lost_all, false, __ATOMIC_RELAXED))
		return 0;
	for (unsigned i = 0; i < a->cfg.shards; i++) {
		a->shards[i].lost_count = 0;
		atomic_set(&a->shards[i].lost_width, 0);
	}
	for (uint64_t i = 0; !err && i < a->chunks.count; i++) {
		struct chunk *c = chunks_peek(&a->chunks, i);

		if (!c || c->state != CHUNK_READY)
			continue;
		atomic_set(&c->lost, 0);
		err = space_index_chunk(op, i, false);
	}
	return err;
}

/* Step 9. */
static int look_everywhere(struct alloc *a, uint64_t len, bool whole,
			   struct extent *out)
{
	struct op op;
	struct shard *own;
	int err = op_enter_world(a, &op);

	if (err)
		return err;
	own = op.sh;
	err = find_all_lost(&op);
	for (unsigned i = 0; !err && i < a->cfg.shards; i++) {
		op.sh = &a->shards[i];
		err = close_windows(&op);
		if (err == -ENOSPC)
			err = 0;
	}
	if (!err) {
		op.sh = own;
		do
			err = look_here(&op, ALLOC_NO_GOAL, len, whole, out);
		while (err == -EAGAIN);
	}
	for (unsigned i = 0; err == -ENOSPC && i < a->cfg.shards; i++) {
		op.sh = &a->shards[i];
		if (len <= a->border)
			err = from_bins(&op, (uint32_t)len, false, out);
		if (err == -ENOSPC && !whole)
			err = from_longest(&op, len, out);
	}
	op_leave(&op);
	return err;
}

/*
 * One extent of `len` units, or of as many as there are in a row if not
 * `whole`. The units are promised already. Entered by `op`; leaves it.
 */
static int look(struct op *op, uint64_t goal, uint64_t len, bool whole,
		struct extent *out)
{
	struct alloc *a = op->a;
	unsigned loads = 0, tries = 0;
	int err;

	for (;;) {
		/* The first time it may be of our own making. */
		while ((err = look_here(op, goal, len, whole, out)) == -EAGAIN)
			if (tries++)
				sched_yield();
		if (!err) {
			op->sh->n.allocs++;
			op->sh->n.alloc_units += out->len;
		}
		op_leave(op);
		if (err == -ENODATA) {
			err = load_chunk(a, op->need, UINT32_MAX);
			goto again;
		}
		if (err == -EXDEV)
			goto everywhere;
		if (err != -ENOSPC)
			return err;
		if (!load_complete(a) && (whole || loads++ < EAGER_LOADS)) {
			err = load_more(a);
			goto again;
		}
		err = steal(a, len);
		if (err == -EAGAIN) {
			err = 0;
			goto again;
		}
		if (!whole) {
			err = op_enter(a, op);
			if (err)
				return err;
			do
				err = from_longest(op, len, out);
			while (err == -EAGAIN);
			op_leave(op);
		}
		if (!err)
			break;
		if (err != -ENOSPC && err != -EXDEV)
			return err;
everywhere:
		err = look_everywhere(a, len, whole, out);
		if (err != -ENOSPC)
			break;
		err = load_more(a);
		/* Units that the index had no memory for may be there still. */
		if (err == -ENOENT && atomic_get(&a->lost_all))
			return -ENOMEM;
		if (err == -ENOENT)
			return whole ? -ENOSPC : -EUCLEAN;
again:
		if (err && err != -ENOENT)
			return err;
		err = op_enter(a, op);
		if (err)
			return err;
	}
	if (!err) {
		op_enter_to_count(a, op);
		op->sh->n.allocs++;
		op->sh->n.alloc_units += out->len;
		op_leave(op);
	}
	return err;
}

/* -- Work at a place -- */

static int check_range(const struct alloc *a, uint64_t start, uint64_t len)
{
	if (!len || start >= a->units || len > a->units - start)
		return -ERANGE;
	return 0;
}

/*
 * Do `once` to [start, start + len), in its hood, all chunks of it ready. Runs
 * again after -EAGAIN and -ENODATA.
 */
static inline __attribute__((always_inline)) int
in_hood(struct alloc *a, uint64_t start, uint64_t len,
	int (*once)(struct op *op, uint64_t s, uint64_t e))
{
	uint64_t e = start + len;

	for (;;) {
		struct hood h;
		struct op op;
		int err;

		err = chunk_of(e - 1) - chunk_of(start) > 1
			      ? op_enter_world(a, &op)
			      : op_enter(a, &op);
		if (err)
			return err;
		err = check_range(a, start, len);
		if (!err)
			err = hood_lock(&op, start, e, &h);
		if (!err) {
			err = space_ready(&op, start, e);
			if (!err)
				err = once(&op, start, e);
			hood_unlock(&op, &h);
		}
		op_leave(&op);
		if (err == -EAGAIN) {
			sched_yield();
		} else if (err == -ENODATA) {
			err = load_chunk(a, op.need, UINT32_MAX);
			if (err)
				return err;
		} else {
			state_count(a);
			return err;
		}
	}
}

/* Back to free, while the caller keeps the promise. */
static int put_back_once(struct op *op, uint64_t s, uint64_t e)
{
	return space_give(op, s, e);
}

/* -- The door: taking -- */

static int take_one(struct alloc *a, uint64_t goal, uint64_t len,
		    struct extent *out)
{
	struct extent got;
	struct op op;
	int err;

	if (!len)
		return -EINVAL;
	err = enter_with_promise(a, &op, len);
	if (err)
		return err;
	err = look(&op, goal, len, true, &got);
	if (!err) {
		*out = got;
		state_count(a);
		return 0;
	}
	op_enter_to_count(a, &op);
	op.sh->n.failures++;
	promise_return(&op, len);
	op_leave(&op);
	return err;
}

int alloc_any(struct alloc *a, uint64_t len, struct extent *out)
{
	return take_one(a, ALLOC_NO_GOAL, len, out);
}

int alloc_near(struct alloc *a, uint64_t goal, uint64_t len, struct extent *out)
{
	return take_one(a, goal, len, out);
}

/*
 * Extents of one request, `op` entered with the promise held. Sets *got as far
 * as it came, even when it fails.
 */
static int take_vec(struct op *op, uint64_t goal, uint64_t len,
		    struct extent *out, unsigned max, unsigned *count,
		    uint64_t *got)
{
	struct alloc *a = op->a;
	bool inside = true;

	*count = 0;
	*got = 0;
	while (*got < len && *count < max) {
		int err = inside ? 0 : op_enter(a, op);

		if (!err)
			err = look(op, goal, len - *got, false, &out[*count]);
		if (err)
			return err;
		inside = false;
		*got += out[*count].len;
		goal = out[*count].start + out[*count].len;
		++*count;
	}
	if (inside)
		op_leave(op);
	return 0;
}

static int vec(struct alloc *a, uint64_t goal, uint64_t len, struct extent *out,
	       unsigned max, unsigned *count, uint64_t *got, bool reserved)
{
	unsigned n;
	uint64_t units;
	struct op op;
	int err;

	if (!len || !max)
		return -EINVAL;
	err = reserved ? op_enter(a, &op) : enter_with_promise(a, &op, len);
	if (err)
		return err;
	if (reserved)
		op.sh->n.reserved -= (int64_t)len;
	err = take_vec(&op, goal, len, out, max, &n, &units);
	if (err)
		units = 0;
	/* What cannot be put back, for want of memory, stays in use. */
	for (unsigned i = 0; err && i < n; i++)
		if (in_hood(a, out[i].start, out[i].len, put_back_once))
			units += out[i].len;
	/* What was not used stays promised, or is free again. */
	if (units < len) {
		op_enter_to_count(a, &op);
		if (reserved)
			op.sh->n.reserved += (int64_t)(len - units);
		else
			promise_return(&op, len - units);
		op_leave(&op);
	}
	if (err)
		return err;
	*count = n;
	*got = units;
	state_count(a);
	return 0;
}

int alloc_vec(struct alloc *a, uint64_t goal, uint64_t len, struct extent *out,
	      unsigned max, unsigned *count, uint64_t *got)
{
	return vec(a, goal, len, out, max, count, got, false);
}

int alloc_vec_reserved(struct alloc *a, uint64_t goal, uint64_t len,
		       struct extent *out, unsigned max, unsigned *count,
		       uint64_t *got)
{
	return vec(a, goal, len, out, max, count, got, true);
}

/* -- The door: at a place -- */

/* Chunks of [s, e), one after the other, as (c, off, n). */
#define FOR_CHUNKS(op, s, e, c, off, n, once)                                  \
	do {                                                                   \
		for (uint64_t at_ = (s); at_ < (e);) {                         \
			struct chunk *c = chunks_peek(&(op)->a->chunks,        \
						      chunk_of(at_));          \
			uint32_t off = off_of(at_);                            \
			uint32_t n = (uint32_t)min_u64((e) - at_,              \
						       ALLOC_CHUNK - off);     \
			once;                                                  \
			at_ += n;                                              \
		}                                                              \
	} while (0)

static bool any_pending(struct op *op, uint64_t s, uint64_t e)
{
	bool any = false;

	FOR_CHUNKS(op, s, e, c, off, n, any |= chunk_any_pending(c, off, n));
	return any;
}

static int free_once(struct op *op, uint64_t s, uint64_t e)
{
	int err = any_pending(op, s, e) ? -EINVAL : space_give(op, s, e);

	if (!err) {
		promise_return(op, e - s);
		op->sh->n.frees++;
		op->sh->n.freed_units += e - s;
	}
	return err;
}

int alloc_free(struct alloc *a, uint64_t start, uint64_t len)
{
	return in_hood(a, start, len, free_once);
}

static int defer_once(struct op *op, uint64_t s, uint64_t e)
{
	int err = 0;

	if (!space_all_used(op, s, e))
		return -EINVAL;
	FOR_CHUNKS(op, s, e, c, off, n, {
		(void)off;
		if (!err)
			err = chunk_prepare_pending(&op->a->chunks, c);
	});
	if (err)
		return err;
	FOR_CHUNKS(op, s, e, c, off, n, chunk_mark_pending(c, off, n));
	op->sh->n.deferred += (int64_t)(e - s);
	return 0;
}

static bool all_pending(struct op *op, uint64_t s, uint64_t e)
{
	bool all = true;

	FOR_CHUNKS(op, s, e, c, off, n, all &= chunk_all_pending(c, off, n));
	return all;
}

static int undefer_once(struct op *op, uint64_t s, uint64_t e)
{
	if (!all_pending(op, s, e))
		return -EINVAL;
	FOR_CHUNKS(op, s, e, c, off, n, chunk_clear_pending(&op->a->chunks, c, off, n));
	op->sh->n.deferred -= (int64_t)(e - s);
	return 0;
}

/* Their promise is the caller's to give away or to keep. */
static int give_pending(struct op *op, uint64_t s, uint64_t e)
{
	int err = all_pending(op, s, e) ? space_give(op, s, e) : -EINVAL;

	if (err)
		return err;
	undefer_once(op, s, e);
	op->sh->n.frees++;
	op->sh->n.freed_units += e - s;
	return 0;
}

static int release_once(struct op *op, uint64_t s, uint64_t e)
{
	int err = give_pending(op, s, e);

	if (!err)
		promise_return(op, e - s);
	return err;
}

static int release_reserved_once(struct op *op, uint64_t s, uint64_t e)
{
	int err = give_pending(op, s, e);

	if (!err)
		op->sh->n.reserved += (int64_t)(e - s);
	return err;
}

int alloc_defer(struct alloc *a, uint64_t start, uint64_t len)
{
	return in_hood(a, start, len, defer_once);
}

int alloc_undefer(struct alloc *a, uint64_t start, uint64_t len)
{
	return in_hood(a, start, len, undefer_once);
}

int alloc_release(struct alloc *a, uint64_t start, uint64_t len)
{
	return in_hood(a, start, len, release_once);
}

int alloc_release_reserved(struct alloc *a, uint64_t start, uint64_t len)
{
	return in_hood(a, start, len, release_reserved_once);
}

static int exact_once(struct op *op, uint64_t s, uint64_t e)
{
	bool clash = false;

	if (!space_all_free(op, s, e))
		return -EBUSY;
	FOR_CHUNKS(op, s, e, c, off, n, {
		clash |= c->win_lo < c->win_hi && off < c->win_hi &&
			 off + n > c->win_lo;
	});
	if (clash) {
		op->need = s;
		return -ELOOP;
	}
	return space_take(op, s, e);
}

/* Close all windows of chunks that [s, e) touches. */
static int close_windows_of(struct alloc *a, uint64_t s, uint64_t e)
{
	struct op op;
	int err = op_enter(a, &op);

	if (err)
		return err;
	for (uint64_t i = chunk_of(s); !err && i <= chunk_of(e - 1); i++)
		err = window_close_chunk(&op, i);
	op_leave(&op);
	return err;
}

int alloc_exact(struct alloc *a, uint64_t start, uint64_t len)
{
	int err = len && start + len > start ? alloc_reserve(a, len) : -ERANGE;

	/* More is wanted than is free: some unit of it is in use. */
	if (err == -ENOSPC)
		return start + len > atomic_get(&a->units) ? -ERANGE : -EBUSY;
	if (err)
		return err;
	while ((err = in_hood(a, start, len, exact_once)) == -ELOOP) {
		err = close_windows_of(a, start, start + len);
		if (err)
			break;
	}
	if (err) {
		alloc_unreserve(a, len);
	} else {
		struct op op;

		op_enter_to_count(a, &op);
		op.sh->n.reserved -= (int64_t)len;
		op.sh->n.allocs++;
		op.sh->n.alloc_units += len;
		op_leave(&op);
	}
	return err;
}

/* -- The door: bytes -- */

static uint64_t units_of(const struct alloc *a, uint64_t bytes)
{
	return bytes / a->cfg.unit_bytes + (bytes % a->cfg.unit_bytes != 0);
}

int alloc_bytes(struct alloc *a, uint64_t bytes, uint64_t *offset_bytes)
{
	struct extent got;
	int err = alloc_any(a, units_of(a, bytes), &got);

	if (!err)
		*offset_bytes = got.start * a->cfg.unit_bytes;
	return err;
}

int alloc_free_bytes(struct alloc *a, uint64_t offset_bytes, uint64_t bytes)
{
	if (offset_bytes % a->cfg.unit_bytes)
		return -EINVAL;
	return alloc_free(a, offset_bytes / a->cfg.unit_bytes,
			  units_of(a, bytes));
}

/* -- Opening and closing -- */

static int shards_init(struct alloc *a)
{
	size_t bytes = a->cfg.shards * sizeof(*a->shards);

	pool_init(&a->hint_blocks, sizeof(struct hints), 0, "hints");
	a->shards = aligned_alloc(_Alignof(struct shard), bytes);
	if (!a->shards)
		return -ENOMEM;
	memset(a->shards, 0, bytes);
	for (unsigned i = 0; i < a->cfg.shards; i++)
		latch_init(&a->shards[i].latch, RANK_SHARD, "shard");
	return 0;
}

static void shards_fini(struct alloc *a)
{
	for (unsigned i = 0; a->shards && i < a->cfg.shards; i++)
		free(a->shards[i].lost);
	free(a->shards);
	pool_fini(&a->hint_blocks);
}

static void destroy(struct alloc *a)
{
	btree_fini(&a->by_size);
	btree_fini(&a->by_start);
	shards_fini(a);
	chunks_fini(&a->chunks);
	pthread_cond_destroy(&a->load_done);
	lock_fini(&a->load_lock);
	lock_fini(&a->state_lock);
	free((char *)a->cfg.state_path);
	free(a);
}

/* A space without a source: all of it is free. */
static int describe_all_free(void *ctx, uint64_t chunk, uint64_t *count,
			     uint32_t *free)
{
	(void)ctx;
	(void)chunk;
	*count = UINT64_MAX;
	*free = ALLOC_CHUNK;
	return 0;
}

static int load_free(void *ctx, uint64_t chunk, void *bits)
{
	(void)ctx;
	(void)chunk;
	memset(bits, 0, ALLOC_CHUNK_BYTES);
	return 0;
}

static int own_path(struct alloc_config *cfg)
{
	size_t bytes = cfg->state_path ? strlen(cfg->state_path) + 1 : 0;
	char *own = bytes ? malloc(bytes) : NULL;

	if (bytes && !own)
		return -ENOMEM;
	cfg->state_path = own ? memcpy(own, cfg->state_path, bytes) : NULL;
	return 0;
}

int alloc_open(const struct alloc_config *cfg, const struct alloc_source *source,
	       uint64_t free_units, struct alloc **out)
{
	struct alloc *a = aligned_alloc(_Alignof(struct alloc), sizeof(*a));
	uint64_t units;
	char msg[1];
	int err;

	if (!a)
		return -ENOMEM;
	memset(a, 0, sizeof(*a));
	a->cfg = *cfg;
	err = alloc_config_check(&a->cfg, msg, sizeof(msg));
	if (err || (source && (free_units > cfg->units || cfg->state_path))) {
		free(a);
		return -EINVAL;
	}
	err = own_path(&a->cfg);
	if (err) {
		free(a);
		return err;
	}
	a->source = source ? *source
			   : (struct alloc_source){ NULL, load_free,
						    describe_all_free };
	a->units = units = a->cfg.units;
	a->small_units = a->cfg.small_limit_bytes / a->cfg.unit_bytes;
	a->border = BORDER;
	/* First fit wants long runs by address, which bins are not. */
	if (a->cfg.policy == ALLOC_FIRST_FIT && a->small_units < BORDER)
		a->border = a->small_units;
	a->batch = min_u64(65536, units / 64 / a->cfg.shards + 1);
	a->hints_max = units / 4096 > (1u << 16) ? units / 4096 : 1u << 16;
	a->pool = source ? free_units : units;
	lock_init(&a->state_lock, RANK_ALLOC_STATE, "state");
	lock_init(&a->load_lock, RANK_ALLOC_LOAD, "load");
	pthread_cond_init(&a->load_done, NULL);
	err = chunks_init(&a->chunks, units);
	if (err)
		goto no_chunks;
	err = btree_init(&a->by_size, false, "nodes by size");
	if (err)
		goto no_size;
	err = btree_init(&a->by_start, true, "nodes by start");
	if (err)
		goto no_start;
	err = shards_init(a);
	if (err)
		goto no_shards;
	a->source_chunks = a->chunks.count;
	if (!source)
		err = a->cfg.state_path ? state_open(a) : load_more(a);
	if (err) {
		destroy(a);
		return err;
	}
	*out = a;
	return 0;

no_shards:
	btree_fini(&a->by_start);
no_start:
	btree_fini(&a->by_size);
no_size:
	chunks_fini(&a->chunks);
no_chunks:
	pthread_cond_destroy(&a->load_done);
	lock_fini(&a->load_lock);
	lock_fini(&a->state_lock);
	free((char *)a->cfg.state_path);
	free(a);
	return err;
}

int alloc_close(struct alloc *a)
{
	int err = 0;

	if (!a)
		return 0;
	if (a->saver)
		err = state_close(a);
	destroy(a);
	return err;
}

int alloc_save(struct alloc *a)
{
	return a->saver ? state_save(a) : -EINVAL;
}
