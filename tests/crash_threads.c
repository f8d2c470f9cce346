/* SPDX-License-Identifier: BSD-2-Clause */

/*
 * Several threads share one volume with its own timer and checkpoints, each in
 * a directory of its own, and cut at any moment: what a thread was told is
 * durable is there, and what all of them did is there up to some point of it,
 * in its order. The schedule is the machine's, so a failure comes back by
 * trying.
 *
 *   SEED=n     (default 1)
 *   STATES=n   stop after about so many crash states; 0: 100 rounds
 */

#include "tests/script.h"

#include <inttypes.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

#include <cmocka.h>

#define THREADS 4
#define CYCLE 6		/* operations for one file */

/* Operation n of a thread. A cycle of them is about one file. */
static struct step step_of(unsigned who, unsigned n)
{
	unsigned c = n / CYCLE;
	struct rng r = {who * 1000 + c};
	uint32_t len = 1 + (uint32_t)rng_below(&r, rng_below(&r, 4) ? 3000 : 12000);
	uint8_t made = 3, kept = (uint8_t)(c % 3), old = (uint8_t)((c + 1) % 3);

	switch (n % CYCLE) {
	case 0:
		return (struct step){CREATE, .file = made};
	case 1:
		return (struct step){WRITE, .file = made, .len = len};
	case 2:
		return (struct step){RENAME, .file = made, .to = kept};
	case 3:
		return (struct step){WRITE, .file = kept, .off = len, .len = 500};
	case 4:
		return (struct step){TRUNCATE, .file = kept, .off = len / 2};
	default:
		return (struct step){c < 2 ? TICK : UNLINK, .file = old};
	}
}

static void *work(void *arg)
{
	struct script *s = arg;

	script_run(s, s->steps);
	return NULL;
}

static void round_of(uint64_t seed, struct scripts *all)
{
	struct rng r = {seed};
	struct volume_geometry g = {
		.bytes = 4u << 20,
		.journal_bytes = JOURNAL_MIN_UNITS * JOURNAL_UNIT,
	};
	struct volume_options o = {
		.commit_ms = 20,
		.cache_bytes = 4u << 20,
		.discard = true,
	};
	struct fault_plan plan = {
		.seed = seed, .all_below = 2, .random = 3, .torn = 2, .sparse = true,
	};
	struct fault *f = fault_create(g.bytes);
	pthread_t thread[THREADS];
	struct volume *v;
	char msg[256] = "", again[64];
	struct fs *fs;
	uint64_t started = 0, promised = 0;

	snprintf(again, sizeof(again), "again: SEED=%" PRIu64, seed);
	all->again = again;
	assert_int_equal(volume_geometry_check(&g, msg, sizeof(msg)), 0);
	assert_int_equal(volume_format(fault_image(f), &g), 0);
	assert_int_equal(volume_open(fault_image(f), &o, &v, msg, sizeof(msg)), 0);
	assert_int_equal(fs_open(v, &(struct fs_options){.noatime = true}, &fs), 0);
	scripts_init(all, THREADS, fs, f);
	for (unsigned i = 0; i < THREADS; i++) {
		unsigned ops = 40 + (unsigned)rng_below(&r, 40);

		for (unsigned n = 0; n < ops; n++) {
			struct step step = step_of(i, n);

			step.sync = rng_below(&r, 3) == 0;
			script_add(&all->script[i], step);
		}
	}
	assert_int_equal(volume_checkpoint(v), 0);
	fault_record(f, true);
	fault_slow_flush(f, (unsigned)rng_below(&r, 3) * 50);
	for (unsigned i = 0; i < THREADS; i++)
		pthread_create(&thread[i], NULL, work, &all->script[i]);
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(volume_checkpoint(v), 0);
	for (unsigned i = 0; i < THREADS; i++)
		pthread_join(thread[i], NULL);
	scripts_end(all);
	assert_int_equal(fs_close(fs), 0);
	assert_int_equal(volume_close(v), 0);
	fault_explore(f, &plan, &started, &promised, true, scripts_crash, all);
	scripts_fini(all);
	fault_destroy(f);
}

static void what_fsync_promised_to_any_thread_is_there(void **state)
{
	uint64_t seed = env_u64("SEED", 1);
	struct scripts all = {.effort = effort_begin(12000, 20)};
	uint64_t rounds = 0;

	(void)state;
	do {
		round_of(seed + rounds, &all);
		rounds++;
	} while (rounds < 100 && !effort_spent(&all.effort, all.states));
	print_message("%" PRIu64 " rounds, %" PRIu64 " crash states\n", rounds, all.states);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(what_fsync_promised_to_any_thread_is_there),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
