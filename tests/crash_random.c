/* SPDX-License-Identifier: BSD-2-Clause */

/*
 * Long random workloads on small volumes of many shapes: the ring wraps all
 * the time, checkpoints meet commits, the volume runs full and empty again,
 * files are cloned, held open without a name, punched and truncated. The power
 * is cut all along the way; from some of the crashes the workload goes on.
 *
 *   SEED=n     the first workload (default 1); each next one has SEED + 1
 *   STATES=n   stop after about so many crash states; 0: 200 workloads
 *   STATE=m    only this crash state of the workload SEED
 */

#include "tests/model.h"

#include <errno.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static uint64_t states, recoveries, operations, full;

static void name_of(char *to, struct rng *r)
{
	static const char letters[] = "abcdefgh";
	unsigned n = 1 + (unsigned)rng_below(r, 2);

	if (rng_below(r, 20) == 0)
		n = 200 + (unsigned)rng_below(r, 56);
	for (unsigned i = 0; i < n; i++)
		to[i] = letters[rng_below(r, i < 2 ? 8 : 1)];
	to[n] = 0;
}

/* One random operation; errors that the model expects too are fine. */
static int step(struct world *w, struct rng *r, uint64_t max_file, bool greedy)
{
	uint64_t dir = world_pick_dir(w, r), file = world_pick_file(w, r), ino;
	uint64_t from_dir;
	char name[256], from[256];
	uint64_t size = file ? world_size(w, file) : 0;
	unsigned what = (unsigned)rng_below(r, 100);

	name_of(name, r);
	if (what < 10)
		return world_create_file(w, dir, name, 0600 + (mode_t)rng_below(r, 64), 0,
					 NULL);
	if (what < 13)
		return world_mkdir(w, dir, name, 0755, NULL);
	if (what < 15) {
		char target[600];
		size_t n = rng_below(r, 3) ? rng_below(r, 30) : rng_below(r, 599);

		memset(target, 't', n + 1);
		target[n + 1 > 599 ? 599 : n + 1] = 0;
		return world_symlink(w, dir, name, target, NULL);
	}
	if (what < 22 || (greedy && what < 24)) {
		if (!world_pick_entry(w, r, &from_dir, from, &ino))
			return 0;
		if (S_ISDIR(world_mode(w, ino)))
			return world_rmdir(w, from_dir, from);
		if (rng_below(r, 5) == 0 && w->n_held < 5)
			world_hold(w, from_dir, from);
		return world_unlink(w, from_dir, from);
	}
	if (what < 28) {
		static const unsigned flags[] = {
			0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE,
		};

		if (!world_pick_entry(w, r, &from_dir, from, &ino))
			return 0;
		if (rng_below(r, 4) == 0) {	/* over something, mostly */
			uint64_t other;

			if (!world_pick_entry(w, r, &dir, name, &other))
				return 0;
		}
		return world_rename(w, from_dir, from, dir, name, flags[rng_below(r, 5)]);
	}
	if (what < 30) {
		if (!file || (!world_is_held(w, file) && rng_below(r, 10) == 0))
			return 0;
		return world_link(w, file, dir, name);
	}
	if (what < 31 && w->n_held < 5)
		return world_tmpfile(w, dir, 0600, &ino);
	if (what < 33)
		return w->n_held ? world_let_go(w, w->held[rng_below(r, w->n_held)]) : 0;
	if (!file)
		return 0;
	if (what < 60) {
		uint64_t off = rng_below(r, 3) ? rng_below(r, size + 1) :
			       rng_below(r, max_file);
		uint64_t len = rng_below(r, 4) ? 1 + rng_below(r, 9000) :
			       1 + rng_below(r, max_file / 2);

		if (rng_below(r, 3) == 0)
			off &= ~4095ull;
		if (rng_below(r, 3) == 0)
			len = (len + 4095) & ~4095ull;
		if (off + len > max_file)
			off = rng_below(r, max_file - (len < max_file ? len : max_file - 1));
		if (off + len > max_file)
			len = max_file - off;
		return world_write(w, file, off, len, rng_next(r));
	}
	if (what < 65)
		return world_truncate(w, file, rng_below(r, 3) ? rng_below(r, size + 1) :
				      rng_below(r, max_file));
	if (what < 72) {
		static const int modes[] = {
			0, FALLOC_FL_KEEP_SIZE,
			FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
			FALLOC_FL_KEEP_SIZE | FALLOC_FL_ZERO_RANGE,
			FALLOC_FL_ZERO_RANGE,
		};
		uint64_t off = rng_below(r, max_file);
		uint64_t len = 1 + rng_below(r, max_file - off);

		return world_fallocate(w, file, modes[rng_below(r, 5)], off, len);
	}
	if (what < 80) {
		uint64_t dst = world_pick_file(w, r);
		uint64_t off = rng_below(r, size + 1), len = rng_below(r, size + 1);
		uint64_t to = rng_below(r, max_file);

		if (rng_below(r, 4)) {
			off &= ~4095ull;
			to &= ~4095ull;
		}
		if (to + len > max_file)
			len = max_file - to;
		if (dst == file && off < to + len && to < off + len)
			return 0;
		return world_copy(w, file, off, dst, to, len);
	}
	ino = world_pick_any(w, r);
	if (what < 83)
		return world_chmod(w, ino, 0400 + (mode_t)rng_below(r, 256));
	if (what < 85)
		return world_chown(w, ino, (uid_t)rng_below(r, 9), (gid_t)rng_below(r, 9));
	if (what < 88)
		return world_utimes(w, ino, (int64_t)rng_below(r, 1u << 31));
	if (what < 94) {
		char xname[32];

		snprintf(xname, sizeof(xname), "user.%c", 'a' + (int)rng_below(r, 4));
		if (S_ISLNK(world_mode(w, ino)))
			ino = file;
		if (rng_below(r, 3) == 0)
			return world_removexattr(w, ino, xname);
		return world_setxattr(w, ino, xname, rng_below(r, 4) ? rng_below(r, 50) :
				      rng_below(r, 3000), rng_next(r));
	}
	switch (what) {
	case 94:
		return world_tick(w);
	case 95:
		return world_sync(w);
	case 96:
		return world_checkpoint(w);
	default:
		return world_fsync(w, ino);
	}
}

struct tail {
	struct world *w;
	uint64_t at;		/* go on from this crash state */
	struct world *next;
	struct fault *copy;
	uint64_t seen;		/* crash states of this world */
	uint64_t only;
	struct effort clock;	/* nothing is tried once it has run down */
};

/* world_crash(), and keep one of the images to go on from. */
static int crash_or_stay(void *ctx, struct fault *crashed, const struct fault_cut *cut)
{
	struct tail *t = ctx;

	t->seen = cut->number;
	if (cut->number >= t->at && !t->next) {
		/* A copy that outlives the exploring. */
		uint64_t bytes = fault_image(crashed)->bytes;
		uint8_t *buf = malloc(bytes);

		t->copy = fault_create(bytes);
		fault_peek(crashed, buf, bytes, 0);
		fault_poke(t->copy, buf, bytes, 0);
		free(buf);
		t->next = world_recover(t->w, t->copy, cut);
	}
	if (t->only && t->only != t->w->number_base + cut->number)
		return 0;
	return world_crash(t->w, crashed, cut) || effort_spent(&t->clock, 0);
}

static void run(uint64_t seed, uint64_t only, const struct effort *clock)
{
	struct rng r = {seed};
	static const uint64_t sizes[] = {1u << 20, 1u << 20, 2u << 20, 3u << 20};
	struct world_options opt = {
		.bytes = sizes[rng_below(&r, 4)],
		.block_shift = rng_below(&r, 4) ? 12 : 13,
		.volume = {
			.no_threads = true,
			.discard = rng_below(&r, 2),
			.shards = 1 + (unsigned)rng_below(&r, 4),
			.policy = rng_below(&r, 3) ? ALLOC_POLICY_DEFAULT : ALLOC_FIRST_FIT,
			.cache_bytes = rng_below(&r, 2) ? 4u << 20 : 1u << 20,
		},
		.fs = {.noatime = true},	/* we look a lot */
	};
	/* Some workloads live on a full volume. */
	bool greedy = rng_below(&r, 3) == 0;
	uint64_t max_file = greedy ? 200000 : 50000;
	unsigned steps = 300 + (unsigned)rng_below(&r, 900);
	struct fault_plan plan = {
		.seed = seed, .all_below = 3, .random = 3, .torn = 3, .sparse = true,
	};
	struct tail t = {.only = only, .clock = {.until_ns = clock->until_ns}};
	struct world *w;
	struct fault *under[8];
	struct world *past[8];
	unsigned n_past = 0;
	bool keep = rng_below(&r, 2);

	snprintf(repro, sizeof(repro), "crash_random: SEED=%" PRIu64 " STATES=1", seed);
	if (opt.block_shift > 12)
		opt.bytes *= 2;
	w = world_create(&opt, NULL);
	fault_record(w->f, true);
	fault_keep_discarded(w->f, keep);
	for (unsigned i = 0; i < steps && !effort_spent(&t.clock, 0); i++) {
		int err = step(w, &r, max_file, greedy);

		operations++;
		full += err == -ENOSPC;
		if (err == -EIO || err == -EROFS || err == -ENOMEM)
			world_fail(w, "failed: %s", strerror(-err));
		if (i % 64 == 0)
			world_check(w);
		if (rng_below(&r, 200) == 0) {		/* a clean one, now and then */
			world_check(w);
			err = world_close(w);
			if (err)
				world_fail(w, "close: %s", strerror(-err));
			err = world_open(w);
			if (err)
				world_fail(w, "open: %s %s", strerror(-err), w->message);
			world_check(w);
		}
		if (fault_log_length(w->f) > 100) {
			bool jump = n_past < 7 && rng_below(&r, 8) == 0;

			t.w = w;
			t.next = NULL;
			t.at = jump ? t.seen + 1 + rng_below(&r, 30) : UINT64_MAX;
			fault_explore(w->f, &plan, &w->log_started, &w->log_promised,
				      false, crash_or_stay, &t);
			world_forget(w);
			if (t.next) {
				past[n_past] = w;
				under[n_past++] = t.copy;
				w = t.next;
				w->number_base = n_past * 1000000ull;
				t.seen = 0;
				fault_keep_discarded(w->f, keep);
				world_check(w);
			}
		}
	}
	world_check(w);
	if (world_close(w))
		world_fail(w, "close failed");
	t.w = w;
	t.at = UINT64_MAX;
	fault_explore(w->f, &plan, &w->log_started, &w->log_promised, true,
		      crash_or_stay, &t);
	states += w->crashes;
	recoveries += w->recoveries;
	world_destroy(w);
	while (n_past) {
		n_past--;
		states += past[n_past]->crashes;
		recoveries += past[n_past]->recoveries;
		world_destroy(past[n_past]);
		fault_destroy(under[n_past]);
	}
}

static void long_random_workloads_survive_any_power_cut(void **state)
{
	uint64_t seed = env_u64("SEED", 1);
	struct effort e = effort_begin(30000, 30);
	uint64_t n = 0;
	struct timespec a, b;
	double s;

	(void)state;
	clock_gettime(CLOCK_MONOTONIC, &a);
	do {
		run(seed + n, env_u64("STATE", 0), &e);
		n++;
	} while (n < 200 && !effort_spent(&e, states));
	clock_gettime(CLOCK_MONOTONIC, &b);
	s = (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
	print_message("%" PRIu64 " workloads, %" PRIu64 " operations (%" PRIu64
		      " met a full volume), %" PRIu64 " crash states, %" PRIu64
		      " recoveries, %.1f s\n", n, operations, full, states, recoveries, s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(long_random_workloads_survive_any_power_cut),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
