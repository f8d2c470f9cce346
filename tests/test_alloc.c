/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The allocator by its door: random walks against a shadow map, threads, and
 * a source whose bitmap is known. SEED=n repeats a walk.
 */
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "alloc/alloc_priv.h"
#include "tests/fault.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SLOW 10				/* sanitizers: fewer steps */
#else
#define SLOW 1
#endif

struct random {
	uint64_t s;
};

static uint64_t rnd(struct random *r)
{
	uint64_t z = (r->s += 0x9e3779b97f4a7c15ull);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static uint64_t below(struct random *r, uint64_t n) { return rnd(r) % n; }

static uint64_t seed(uint64_t fallback)
{
	const char *text = getenv("SEED");
	uint64_t s = text ? strtoull(text, NULL, 0) : fallback;

	print_message("seed %llu\n", (unsigned long long)s);
	return s;
}

static void check(struct alloc *a)
{
	char msg[200] = "";

	if (alloc_check(a, msg, sizeof(msg)))
		fail_msg("%s", msg);
}

/* -- The shadow: a byte for each unit -- */

enum { FREE, USED, PENDING };

struct walk {
	struct alloc *a;
	struct random r;
	uint64_t units, free, reserved, max_units;
	unsigned char *map;
	struct extent *held;
	size_t count, max;
	bool starved;			/* memory may be short */
};

static bool starved(const struct walk *w, int err)
{
	return w->starved && err == -ENOMEM;
}

/* Among what is held, whose units are marked. */
static void walk_keep(struct walk *w, struct extent e)
{
	if (w->count == w->max) {
		w->max = w->max ? w->max * 2 : 1024;
		w->held = sim_realloc(w->held, w->max * sizeof(*w->held));
		assert_non_null(w->held);
	}
	w->held[w->count++] = e;
}

static void walk_hold(struct walk *w, uint64_t start, uint64_t len)
{
	assert_true(len > 0);
	assert_true(start + len <= w->units);
	for (uint64_t i = start; i < start + len; i++)
		assert_int_equal(w->map[i], FREE);
	memset(w->map + start, USED, len);
	w->free -= len;
	walk_keep(w, (struct extent){ start, len });
}

static uint64_t walk_longest(const struct walk *w)
{
	uint64_t longest = 0, run = 0;

	for (uint64_t i = 0; i < w->units; i++) {
		run = w->map[i] == FREE ? run + 1 : 0;
		longest = run > longest ? run : longest;
	}
	return longest;
}

static uint64_t some_len(struct walk *w)
{
	switch (below(&w->r, 8)) {
	case 0:
		return 1;
	case 1:
		return 1 + below(&w->r, 1000);
	case 2:
		return below(&w->r, 40) ? 60 + below(&w->r, 10)
					: 1 + below(&w->r, w->units / 2 + 1);
	default:
		return 1 + below(&w->r, 64);
	}
}

static uint64_t some_goal(struct walk *w)
{
	struct extent e;

	if (!w->count || below(&w->r, 3) == 0)
		return below(&w->r, 3) ? ALLOC_NO_GOAL : below(&w->r, w->units);
	e = w->held[below(&w->r, w->count)];
	return e.start + e.len;
}

static void step_one(struct walk *w)
{
	uint64_t len = some_len(w);
	struct extent e = { 7, 7 };
	int err = below(&w->r, 2) ? alloc_any(w->a, len, &e)
				  : alloc_near(w->a, some_goal(w), len, &e);

	if (err) {
		assert_int_equal(e.start, 7);
		if (starved(w, err))
			return;
		assert_int_equal(err, -ENOSPC);
		if (len <= w->free - w->reserved)
			assert_true(walk_longest(w) < len);
		return;
	}
	assert_int_equal(e.len, len);
	walk_hold(w, e.start, e.len);
}

static void step_vec(struct walk *w, bool reserved)
{
	uint64_t len = some_len(w), got;
	struct extent out[8];
	unsigned count;
	int err;

	if (reserved) {
		if (len > w->reserved)
			return;
		err = alloc_vec_reserved(w->a, some_goal(w), len, out, 8,
					 &count, &got);
		if (starved(w, err))
			return;
		assert_int_equal(err, 0);
		w->reserved -= got;
	} else {
		err = alloc_vec(w->a, some_goal(w), len, out, 8, &count, &got);
		if (starved(w, err))
			return;
		if (len > w->free - w->reserved) {
			assert_int_equal(err, -ENOSPC);
			return;
		}
		assert_int_equal(err, 0);
	}
	assert_true(count >= 1 && count <= 8);
	assert_true(got == len || (got < len && count == 8));
	for (unsigned i = 0; i < count; i++) {
		walk_hold(w, out[i].start, out[i].len);
		got -= out[i].len;
	}
	assert_int_equal(got, 0);
}

static void step_reserve(struct walk *w)
{
	uint64_t n = 1 + below(&w->r, w->units / 16 + 1);

	if (below(&w->r, 2) && n <= w->reserved) {
		alloc_unreserve(w->a, n);
		w->reserved -= n;
	} else if (w->reserved + n < w->units / 4) {
		int err = alloc_reserve(w->a, n);

		if (starved(w, err))
			return;
		assert_int_equal(err, n <= w->free - w->reserved ? 0 : -ENOSPC);
		if (!err)
			w->reserved += n;
	}
}

static void step_exact(struct walk *w)
{
	uint64_t start = below(&w->r, w->units);
	uint64_t len = 1 + below(&w->r, 100), i;
	int err = alloc_exact(w->a, start, len);

	if (starved(w, err))
		return;
	if (start + len > w->units) {
		assert_int_equal(err, -ERANGE);
		return;
	}
	for (i = start; i < start + len && w->map[i] == FREE; i++)
		;
	if (i < start + len || len > w->free - w->reserved) {
		assert_int_equal(err, -EBUSY);
	} else {
		assert_int_equal(err, 0);
		walk_hold(w, start, len);
	}
}

/* In one step, or in two. Not 0: there was no memory for it; it is still held. */
static int give_back(struct walk *w, struct extent e)
{
	int err;

	if (below(&w->r, 3)) {
		err = alloc_free(w->a, e.start, e.len);
		assert_true(!err || starved(w, err));
		return err;
	}
	err = alloc_defer(w->a, e.start, e.len);
	assert_true(!err || starved(w, err));
	if (err)
		return err;
	err = alloc_defer(w->a, e.start, 1);
	assert_true(err == -EINVAL || starved(w, err));
	err = alloc_free(w->a, e.start + e.len - 1, 1);
	assert_true(err == -EINVAL || starved(w, err));
	err = -ENOMEM;
	if (below(&w->r, 2)) {
		bool keep = below(&w->r, 2);

		err = keep ? alloc_release_reserved(w->a, e.start, e.len)
			   : alloc_release(w->a, e.start, e.len);
		if (!err && keep)
			w->reserved += e.len;
	}
	if (!err) {
		err = alloc_release(w->a, e.start, e.len);
		assert_true(err == -EINVAL || starved(w, err));
		return 0;
	}
	assert_int_equal(err, -ENOMEM);
	err = alloc_undefer(w->a, e.start, e.len);
	assert_true(!err || starved(w, err));
	while (err)		/* it is ours, one way or the other */
		err = alloc_undefer(w->a, e.start, e.len);
	err = alloc_undefer(w->a, e.start, e.len);
	assert_true(err == -EINVAL || starved(w, err));
	err = alloc_free(w->a, e.start, e.len);
	assert_true(!err || starved(w, err));
	return err;
}

static void step_free(struct walk *w)
{
	size_t i;
	struct extent e;

	if (!w->count)
		return;
	i = below(&w->r, w->count);
	e = w->held[i];
	if (e.len > 1 && below(&w->r, 4) == 0) {
		/* A part of it. */
		uint64_t cut = 1 + below(&w->r, e.len - 1);

		w->held[i].start += cut;
		w->held[i].len -= cut;
		e.len = cut;
	} else {
		w->held[i] = w->held[--w->count];
	}
	if (give_back(w, e)) {
		walk_keep(w, e);
		return;
	}
	memset(w->map + e.start, FREE, e.len);
	w->free += e.len;
}

static void step_misuse(struct walk *w)
{
	uint64_t start = below(&w->r, w->units), len = 1 + below(&w->r, 90);
	struct extent e;

	if (start + len > w->units) {
		assert_int_equal(alloc_free(w->a, start, len), -ERANGE);
		return;
	}
	for (uint64_t i = start; i < start + len && !w->starved; i++)
		if (w->map[i] == FREE) {
			assert_int_equal(alloc_free(w->a, start, len), -EINVAL);
			assert_int_equal(alloc_defer(w->a, start, len), -EINVAL);
			break;
		}
	assert_int_equal(alloc_free(w->a, start, 0), -ERANGE);
	assert_int_equal(alloc_free(w->a, start, UINT64_MAX), -ERANGE);
	assert_int_equal(alloc_free(w->a, UINT64_MAX, 1), -ERANGE);
	assert_int_equal(alloc_any(w->a, 0, &e), -EINVAL);
	assert_int_equal(alloc_any(w->a, UINT64_MAX, &e), -ENOSPC);
}

static void step_resize(struct walk *w)
{
	uint64_t units = below(&w->r, 3) ? w->units + 1 + below(&w->r, 70)
					 : w->units - below(&w->r, w->units);
	uint64_t end = w->units;
	struct extent busy = { 0, 0 };
	int err;

	if (below(&w->r, 8) == 0)
		units += below(&w->r, 3 * ALLOC_CHUNK);
	if (units > w->max_units)
		return;
	while (end > units && w->map[end - 1] == FREE)
		end--;
	err = alloc_resize(w->a, units, &busy);
	if (starved(w, err))
		return;
	if (end > units) {
		uint64_t first = units;

		assert_int_equal(err, -EBUSY);
		while (w->map[first] == FREE)
			first++;
		assert_int_equal(busy.start, first);
		while (first < w->units && w->map[first] != FREE)
			first++;
		assert_int_equal(busy.start + busy.len, first);
		return;
	}
	if (units < w->units && w->free - w->reserved < w->units - units) {
		assert_int_equal(err, -ENOSPC);
		return;
	}
	assert_int_equal(err, 0);
	if (units > w->units)
		memset(w->map + w->units, FREE, units - w->units);
	w->free = w->free + units - w->units;
	w->units = units;
}

static void walk_compare(struct walk *w)
{
	uint64_t at = 0, i = 0;
	struct extent e;

	while (!alloc_next_free(w->a, at, &e)) {
		while (i < w->units && w->map[i] != FREE)
			i++;
		assert_int_equal(e.start, i);
		while (i < w->units && w->map[i] == FREE)
			i++;
		assert_int_equal(e.start + e.len, i);
		at = i;
	}
	while (i < w->units)
		assert_int_not_equal(w->map[i++], FREE);
}

static void walk_finish(struct walk *w)
{
	struct extent e;

	alloc_unreserve(w->a, w->reserved);
	w->reserved = 0;
	while (w->count) {
		size_t i = below(&w->r, w->count);

		e = w->held[i];
		w->held[i] = w->held[--w->count];
		assert_int_equal(alloc_free(w->a, e.start, e.len), 0);
	}
	check(w->a);
	assert_int_equal(alloc_free_units(w->a), w->units);
	assert_int_equal(alloc_any(w->a, w->units, &e), 0);
	assert_int_equal(e.start, 0);
	assert_int_equal(alloc_free_units(w->a), 0);
	assert_int_equal(alloc_any(w->a, 1, &e), -ENOSPC);
	assert_int_equal(alloc_free(w->a, 0, w->units), 0);
	assert_int_equal(alloc_close(w->a), 0);
	free(w->map);
	free(w->held);
}

static void walk_step(struct walk *w, unsigned i)
{
	/* The tide: fill for a while, then empty for a while. */
	unsigned tide = i / 4096 % 2 ? 35 : 55;
	unsigned what = (unsigned)below(&w->r, 100);

	if (what < tide / 2)
		step_one(w);
	else if (what < tide)
		step_vec(w, below(&w->r, 2));
	else if (what < tide + 3)
		step_reserve(w);
	else if (what < tide + 6)
		step_exact(w);
	else if (what < tide + 9)
		step_misuse(w);
	else if (what == tide + 9 && i % 8 == 0)
		step_resize(w);
	else
		step_free(w);
}

static void walk(uint64_t units, enum alloc_policy policy, unsigned steps,
		 unsigned check_every, uint64_t s)
{
	struct alloc_config cfg = { .units = units, .policy = policy,
				    .shards = 1 + (uint32_t)(s % 3) };
	struct walk w = { .r = { seed(s) }, .units = units, .free = units };

	w.max_units = units * 2;
	w.map = calloc(1, w.max_units);
	assert_non_null(w.map);
	assert_int_equal(alloc_open(&cfg, NULL, 0, &w.a), 0);
	for (unsigned i = 0; i < steps; i++) {
		walk_step(&w, i);
		assert_int_equal(alloc_free_units(w.a), w.free - w.reserved);
		if (i % check_every == 0)
			check(w.a);
		if (i % (check_every * 16) == 0)
			walk_compare(&w);
	}
	walk_finish(&w);
}

static void a_tiny_space_walks(void **state)
{
	(void)state;
	for (uint64_t units = 1; units < 70; units += 7)
		walk(units, ALLOC_BEST_FIT, 3000 / SLOW, 1, units);
}

static void a_chunk_walks(void **state)
{
	(void)state;
	walk(2000, ALLOC_BEST_FIT, 100000 / SLOW, 1, 1);
	walk(ALLOC_CHUNK, ALLOC_BEST_FIT, 200000 / SLOW, 16, 1);
}

static void several_chunks_walk(void **state)
{
	(void)state;
	walk(3 * ALLOC_CHUNK + 17, ALLOC_BEST_FIT, 300000 / SLOW, 64, 2);
	walk(3 * ALLOC_CHUNK + 17, ALLOC_FIRST_FIT, 100000 / SLOW, 64, 3);
	walk(7 * ALLOC_CHUNK - 1, ALLOC_BEST_FIT, 400000 / SLOW, 128, 4);
}

/*
 * Memory fails at every place, once and from then on, in a walk over a fresh
 * space: what was asked for is refused, nothing else changes, and all goes on
 * when there is memory again.
 */
static void mend(struct walk *w)
{
	/* What could not be given back half way stays in use, owned by nobody. */
	for (uint64_t i = 0; alloc_free_units(w->a) != w->free - w->reserved &&
			     i < w->units; i++)
		if (w->map[i] == FREE)
			(void)alloc_free(w->a, i, 1);
}

static uint64_t starve(uint64_t units, enum alloc_policy policy, uint64_t n,
		       bool for_ever)
{
	struct alloc_config cfg = { .units = units, .policy = policy, .shards = 3 };
	struct walk w = { .r = { 11 }, .units = units, .free = units };
	uint64_t calls;
	int err;

	fault_memory(n, for_ever);
	err = alloc_open(&cfg, NULL, 0, &w.a);
	if (err) {
		assert_int_equal(err, -ENOMEM);
		return fault_memory(UINT64_MAX, false);
	}
	w.starved = true;
	w.max_units = units * 2;
	w.map = sim_calloc(1, w.max_units);
	for (unsigned i = 0; i < 3000; i++)
		walk_step(&w, i);
	calls = fault_memory(UINT64_MAX, false);
	w.starved = false;
	mend(&w);
	check(w.a);
	assert_int_equal(alloc_free_units(w.a), w.free - w.reserved);
	walk_compare(&w);
	for (unsigned i = 0; i < 500; i++)
		walk_step(&w, i);
	walk_finish(&w);
	return calls;
}

static void a_lack_of_memory_refuses_and_changes_nothing(void **state)
{
	(void)state;
	for (enum alloc_policy p = ALLOC_FIRST_FIT; p <= ALLOC_BEST_FIT; p++)
		for (uint64_t units = 2000; units < 200000; units *= 60) {
			uint64_t n = starve(units, p, UINT64_MAX, false);

			print_message("%llu allocations\n", (unsigned long long)n);
			for (uint64_t i = 0; i < n; i++)
				for (unsigned for_ever = 0; for_ever < 2; for_ever++)
					starve(units, p, i, for_ever);
		}
}

static void a_bad_configuration_is_named(void **state)
{
	static const struct {
		struct alloc_config cfg;
		const char *msg;
	} bad[] = {
		{ { .units = 0 }, "units is 0, must be 1 to 4503599627370496" },
		{ { .units = 9, .unit_bytes = 100 },
		  "unit_bytes is 100, must be 512 to 1048576" },
		{ { .units = 9, .unit_bytes = 1000 },
		  "unit_bytes is 1000, must be a power of two" },
		{ { .units = 9, .small_limit_bytes = 1 },
		  "small_limit_bytes is 1, must be 4096 to 33554432" },
		{ { .units = 9, .shards = 1025 },
		  "shards is 1025, must be 1 to 1024" },
		{ { .units = 9, .policy = 3 }, "policy is 3, must be 0 to 2" },
	};
	struct alloc_config cfg = { .units = 9 };
	struct alloc_config large = { .units = 9, .unit_bytes = 1 << 20 };
	char msg[200];

	(void)state;
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		struct alloc_config c = bad[i].cfg;
		struct alloc *a;

		assert_int_equal(alloc_config_check(&c, msg, sizeof(msg)), -EINVAL);
		assert_string_equal(msg, bad[i].msg);
		assert_int_equal(alloc_open(&bad[i].cfg, NULL, 0, &a), -EINVAL);
	}
	/* who wants no sentence gets the same answer */
	assert_int_equal(alloc_config_check(&(struct alloc_config){ 0 }, NULL, 0),
			 -EINVAL);
	assert_int_equal(alloc_config_check(&(struct alloc_config){ 0 }, msg, 0),
			 -EINVAL);
	assert_int_equal(alloc_config_check(&large, msg, sizeof(msg)), 0);
	assert_int_equal(large.small_limit_bytes, 1 << 20);
	large.small_limit_bytes = UINT32_MAX;
	assert_int_equal(alloc_config_check(&large, msg, sizeof(msg)), 0);
	assert_int_equal(alloc_config_check(&cfg, msg, sizeof(msg)), 0);
	assert_int_equal(cfg.unit_bytes, 4096);
	assert_int_equal(cfg.small_limit_bytes, 262144);
	assert_int_equal(cfg.shards, 16);
	assert_int_equal(cfg.policy, ALLOC_BEST_FIT);
	assert_int_equal(cfg.backup_interval_s, 300);
	assert_int_equal(cfg.operation_threshold, 1000);
}

static void the_environment_configures(void **state)
{
	struct alloc_config cfg = { .units = 9 };
	char msg[200];

	(void)state;
	setenv("SPACEWEAVE_ALLOC_UNITS", "2M", 1);
	setenv("SPACEWEAVE_ALLOC_UNIT_BYTES", "8k", 1);
	setenv("SPACEWEAVE_ALLOC_POLICY", "first-fit", 1);
	setenv("SPACEWEAVE_ALLOC_SHARDS", "4", 1);
	assert_int_equal(alloc_config_env(&cfg, msg, sizeof(msg)), 0);
	assert_int_equal(cfg.units, 2 << 20);
	assert_int_equal(cfg.unit_bytes, 8192);
	assert_int_equal(cfg.policy, ALLOC_FIRST_FIT);
	assert_int_equal(cfg.shards, 4);
	setenv("SPACEWEAVE_ALLOC_SMALL_LIMIT", "64K", 1);
	setenv("SPACEWEAVE_ALLOC_STATE_PATH", "/some/state", 1);
	setenv("SPACEWEAVE_ALLOC_BACKUP_INTERVAL", "60", 1);
	setenv("SPACEWEAVE_ALLOC_OPERATION_THRESHOLD", "4294967295", 1);
	assert_int_equal(alloc_config_env(&cfg, msg, sizeof(msg)), 0);
	assert_int_equal(cfg.small_limit_bytes, 65536);
	assert_string_equal(cfg.state_path, "/some/state");
	assert_int_equal(cfg.backup_interval_s, 60);
	assert_int_equal(cfg.operation_threshold, UINT32_MAX);
	setenv("SPACEWEAVE_ALLOC_BACKUP_INTERVAL", "1P", 1);
	assert_int_equal(alloc_config_env(&cfg, msg, sizeof(msg)), -EINVAL);
	assert_string_equal(msg, "SPACEWEAVE_ALLOC_BACKUP_INTERVAL is '1P', must be "
				 "at most 4294967295");
	unsetenv("SPACEWEAVE_ALLOC_BACKUP_INTERVAL");
	setenv("SPACEWEAVE_ALLOC_OPERATION_THRESHOLD", "99999999999999999999", 1);
	assert_int_equal(alloc_config_env(&cfg, msg, sizeof(msg)), -EINVAL);
	assert_non_null(strstr(msg, "SPACEWEAVE_ALLOC_OPERATION_THRESHOLD is '9"));
	unsetenv("SPACEWEAVE_ALLOC_OPERATION_THRESHOLD");
	unsetenv("SPACEWEAVE_ALLOC_STATE_PATH");
	setenv("SPACEWEAVE_ALLOC_SMALL_LIMIT", "1K", 1);
	assert_int_equal(alloc_config_env(&cfg, msg, sizeof(msg)), -EINVAL);
	assert_string_equal(msg, "small_limit_bytes is 1024, must be 8192 to 67108864");
	unsetenv("SPACEWEAVE_ALLOC_SMALL_LIMIT");
	/* What was refused changed nothing. */
	assert_int_equal(cfg.small_limit_bytes, 65536);
	setenv("SPACEWEAVE_ALLOC_SHARDS", "4x", 1);
	assert_int_equal(alloc_config_env(&cfg, msg, sizeof(msg)), -EINVAL);
	assert_non_null(strstr(msg, "SPACEWEAVE_ALLOC_SHARDS is '4x'"));
	setenv("SPACEWEAVE_ALLOC_SHARDS", "5G", 1);
	assert_int_equal(alloc_config_env(&cfg, msg, sizeof(msg)), -EINVAL);
	assert_non_null(strstr(msg, "at most"));
	unsetenv("SPACEWEAVE_ALLOC_SHARDS");
	setenv("SPACEWEAVE_ALLOC_POLICY", "best-fit", 1);
	assert_int_equal(alloc_config_env(&cfg, msg, sizeof(msg)), 0);
	assert_int_equal(cfg.policy, ALLOC_BEST_FIT);
	/* An empty one is none; a number has nothing before or behind it. */
	setenv("SPACEWEAVE_ALLOC_POLICY", "", 1);
	setenv("SPACEWEAVE_ALLOC_SHARDS", "", 1);
	setenv("SPACEWEAVE_ALLOC_STATE_PATH", "", 1);
	assert_int_equal(alloc_config_env(&cfg, msg, sizeof(msg)), 0);
	assert_int_equal(cfg.shards, 4);
	for (unsigned i = 0; i < 5; i++) {
		static const char *const odd[] = {"-4", "K", "4KB", "4Z",
						  "99999P"};

		setenv("SPACEWEAVE_ALLOC_UNITS", odd[i], 1);
		assert_int_equal(alloc_config_env(&cfg, msg, sizeof(msg)), -EINVAL);
		assert_non_null(strstr(msg, odd[i]));
	}
	setenv("SPACEWEAVE_ALLOC_UNITS", "8388608T", 1);
	assert_int_equal(alloc_config_env(&cfg, msg, sizeof(msg)), -EINVAL);
	assert_non_null(strstr(msg, "must be at most 4503599627370496"));
	setenv("SPACEWEAVE_ALLOC_UNITS", "2M", 1);
	setenv("SPACEWEAVE_ALLOC_POLICY", "worst-fit", 1);
	assert_int_equal(alloc_config_env(&cfg, msg, sizeof(msg)), -EINVAL);
	assert_non_null(strstr(msg, "worst-fit"));
	unsetenv("SPACEWEAVE_ALLOC_POLICY");
	unsetenv("SPACEWEAVE_ALLOC_UNITS");
	unsetenv("SPACEWEAVE_ALLOC_UNIT_BYTES");
}

static void bytes_round_up_and_misuse_changes_nothing(void **state)
{
	struct alloc_config cfg = { .units = 100 };
	struct alloc_stats st;
	struct extent e;
	struct alloc *a;
	uint64_t at, got;
	unsigned count;

	(void)state;
	assert_int_equal(alloc_open(&cfg, NULL, 0, &a), 0);
	assert_int_equal(alloc_bytes(a, 4097, &at), 0);
	assert_int_equal(alloc_free_units(a), 98);
	assert_int_equal(alloc_vec(a, 0, 0, &e, 1, &count, &got), -EINVAL);
	assert_int_equal(alloc_vec(a, 0, 1, &e, 0, &count, &got), -EINVAL);
	assert_int_equal(alloc_bytes(a, 0, &at), -EINVAL);
	assert_int_equal(alloc_bytes(a, UINT64_MAX, &at), -ENOSPC);
	assert_int_equal(alloc_free_bytes(a, at + 1, 4096), -EINVAL);
	assert_int_equal(alloc_free_bytes(a, at, 4096 * 3), -EINVAL);
	assert_int_equal(alloc_free_bytes(a, at, 0), -ERANGE);
	assert_int_equal(alloc_free_bytes(a, at, UINT64_MAX), -ERANGE);
	assert_int_equal(alloc_free_bytes(a, 4096 * 100, 4096), -ERANGE);
	assert_int_equal(alloc_exact(a, UINT64_MAX, 2), -ERANGE);
	assert_int_equal(alloc_exact(a, 99, 2), -ERANGE);
	assert_int_equal(alloc_exact(a, 5, 0), -ERANGE);
	assert_int_equal(alloc_save(a), -EINVAL);
	assert_int_equal(alloc_free_units(a), 98);
	assert_int_equal(alloc_free_bytes(a, at, 4097), 0);
	assert_int_equal(alloc_free_bytes(a, at, 4097), -EINVAL);
	assert_int_equal(alloc_free_units(a), 100);
	assert_int_equal(alloc_exact(a, 10, 10), 0);
	assert_int_equal(alloc_stats(a, true, &st), 0);
	assert_int_equal(st.free_extents, 2);
	assert_int_equal(st.largest_free, 80);
	assert_int_equal(st.histogram[3], 1);
	assert_int_equal(st.histogram[6], 1);
	assert_int_equal(st.allocs, 2);
	assert_int_equal(st.frees, 1);
	assert_true(alloc_utilization(a) > 0.09 && alloc_utilization(a) < 0.11);
	check(a);
	assert_int_equal(alloc_close(a), 0);
}

static void a_petabyte_opens_at_once(void **state)
{
	struct alloc_config cfg = { .units = 1ull << 38 };
	struct alloc_stats st;
	struct alloc *a;
	struct extent e;

	(void)state;
	assert_int_equal(alloc_open(&cfg, NULL, 0, &a), 0);
	assert_int_equal(alloc_any(a, 1, &e), 0);
	assert_int_equal(alloc_exact(a, (1ull << 38) - 1, 1), 0);
	assert_int_equal(alloc_stats(a, true, &st), 0);
	assert_int_equal(st.free_units, (1ull << 38) - 2);
	assert_int_equal(st.free_extents, 1);
	assert_int_equal(st.largest_free, (1ull << 38) - 2);
	assert_true(st.memory_bytes < 4 << 20);
	check(a);
	assert_int_equal(alloc_close(a), 0);
}

static void what_follows_a_goal_lies_behind_it(void **state)
{
	struct alloc_config cfg = { .units = 1 << 20 };
	struct alloc *a;
	struct extent e[4];
	uint64_t got, next = 100;
	unsigned count;

	(void)state;
	assert_int_equal(alloc_open(&cfg, NULL, 0, &a), 0);
	for (unsigned i = 0; i < 500; i++) {
		assert_int_equal(alloc_vec(a, next, 1 + i % 40, e, 4, &count,
					   &got), 0);
		assert_int_equal(count, 1);
		assert_int_equal(e[0].start, next);
		next += got;
	}
	/* A hole is taken when it is next after the goal and long enough. */
	assert_int_equal(alloc_free(a, 150, 10), 0);
	assert_int_equal(alloc_vec(a, 140, 4, e, 4, &count, &got), 0);
	assert_int_equal(e[0].start, 150);
	assert_int_equal(alloc_vec(a, 140, 8, e, 4, &count, &got), 0);
	assert_int_equal(e[0].start, next);
	check(a);
	assert_int_equal(alloc_close(a), 0);
}

/* -- A source -- */

struct source {
	uint64_t units;
	unsigned char *map;
	unsigned loads, fail_load;
};

static int source_load(void *ctx, uint64_t chunk, void *bits)
{
	struct source *s = ctx;
	unsigned char *b = bits;

	if (__atomic_load_n(&s->fail_load, __ATOMIC_RELAXED))
		return -EIO;
	__atomic_add_fetch(&s->loads, 1, __ATOMIC_RELAXED);
	memset(b, 0, ALLOC_CHUNK_BYTES);
	for (uint32_t i = 0; i < ALLOC_CHUNK; i++) {
		uint64_t u = chunk * ALLOC_CHUNK + i;

		if (u < s->units && s->map[u])
			b[i / 8] |= (unsigned char)(1 << i % 8);
	}
	return 0;
}

static uint32_t source_free(const struct source *s, uint64_t chunk)
{
	uint32_t n = 0;

	for (uint64_t u = chunk * ALLOC_CHUNK;
	     u < (chunk + 1) * ALLOC_CHUNK && u < s->units; u++)
		n += !s->map[u];
	return n;
}

static int source_describe(void *ctx, uint64_t chunk, uint64_t *count,
			   uint32_t *free)
{
	const struct source *s = ctx;

	*count = 1;
	*free = source_free(s, chunk);
	while (*free == 0 || *free == ALLOC_CHUNK) {
		if ((chunk + *count) * ALLOC_CHUNK >= s->units ||
		    source_free(s, chunk + *count) != *free)
			break;
		++*count;
	}
	return 0;
}

/* Chunks of all kinds: free, full, mixed; runs that cross their borders. */
static void source_fill(struct source *s, struct random *r)
{
	for (uint64_t c = 0; c * ALLOC_CHUNK < s->units; c++) {
		uint64_t first = c * ALLOC_CHUNK, kind = below(r, 4);

		for (uint64_t u = first; u < first + ALLOC_CHUNK && u < s->units;) {
			uint64_t n = 1 + below(r, kind == 2 ? 20 : 2000);
			bool used = kind == 0 ? false : kind == 1 ? true : rnd(r) & 1;

			while (n-- && u < first + ALLOC_CHUNK && u < s->units)
				s->map[u++] = used;
		}
	}
}

static void a_source_is_asked_as_needed(void **state)
{
	struct random r = { seed(5) };
	(void)state;

	for (unsigned round = 0; round < 20; round++) {
		struct source s = { .units = 9 * ALLOC_CHUNK + 100 };
		struct alloc_config cfg = { .units = s.units };
		struct alloc_source src = { &s, source_load, source_describe };
		uint64_t free_units = 0, got, at = 0;
		struct extent out[64], e;
		struct alloc *a;
		unsigned count;

		s.map = calloc(1, s.units);
		source_fill(&s, &r);
		for (uint64_t u = 0; u < s.units; u++)
			free_units += !s.map[u];
		assert_int_equal(alloc_open(&cfg, &src, free_units, &a), 0);
		assert_int_equal(s.loads, 0);
		/* Somewhere far away first. */
		for (unsigned i = 0; i < 100; i++) {
			uint64_t u = below(&r, s.units);

			if (round % 3 == 0)
				break;
			if (s.map[u]) {
				assert_int_equal(alloc_free(a, u, 1), 0);
				s.map[u] = 0;
				free_units++;
			} else {
				assert_int_equal(alloc_free(a, u, 1), -EINVAL);
			}
		}
		check(a);
		if (round % 2) {
			s.fail_load = 1;
			while (!alloc_vec(a, ALLOC_NO_GOAL, 50, out, 64, &count,
					  &got))
				for (unsigned i = 0; i < count; i++) {
					memset(s.map + out[i].start, 2, out[i].len);
					free_units -= out[i].len;
				}
			s.fail_load = 0;
			check(a);
		}
		assert_int_equal(alloc_free_units(a), free_units);
		assert_int_equal(alloc_reserve(a, free_units), 0);
		while (free_units) {
			uint64_t n = 1 + below(&r, 300);

			n = n < free_units ? n : free_units;
			assert_int_equal(alloc_vec_reserved(a,
					below(&r, 2) ? below(&r, s.units)
						     : ALLOC_NO_GOAL,
					n, out, 64, &count, &got), 0);
			for (unsigned i = 0; i < count; i++) {
				for (uint64_t u = 0; u < out[i].len; u++) {
					assert_int_equal(s.map[out[i].start + u], 0);
					s.map[out[i].start + u] = 2;
				}
			}
			free_units -= got;
		}
		check(a);
		assert_int_equal(alloc_next_free(a, at, &e), -ENOENT);
		assert_int_equal(alloc_any(a, 1, &e), -ENOSPC);
		assert_int_equal(alloc_close(a), 0);
		free(s.map);
	}
}

/* What a source says of chunk 1 of three, whose units 32768 .. 40000 are in use. */
struct liar {
	uint64_t count;
	uint32_t free;
	int err;
	bool other_bits;
	unsigned loads;
};

static int liar_describe(void *ctx, uint64_t chunk, uint64_t *count, uint32_t *free)
{
	const struct liar *l = ctx;

	*count = chunk == 1 ? l->count : 1;
	*free = chunk == 1 ? l->free : ALLOC_CHUNK;
	return chunk == 1 ? l->err : 0;
}

static int liar_load(void *ctx, uint64_t chunk, void *bits)
{
	struct liar *l = ctx;

	memset(bits, 0, ALLOC_CHUNK_BYTES);
	if (chunk == 1)
		memset(bits, 0xff, l->other_bits ? 8 : 7232 / 8);
	l->loads++;
	return 0;
}

static void a_source_that_lies_is_found_out(void **state)
{
	static const struct {
		struct liar l;
		int err;
	} lies[] = {
		{{1, ALLOC_CHUNK - 7232, 0, false, 0}, 0},
		{{0, ALLOC_CHUNK, 0, false, 0}, -EUCLEAN},	/* no chunk */
		{{1, ALLOC_CHUNK + 1, 0, false, 0}, -EUCLEAN},	/* too many free */
		{{2, ALLOC_CHUNK - 7232, 0, false, 0}, -EUCLEAN},	/* two, of no kind */
		{{1, ALLOC_CHUNK - 7232, 0, true, 0}, -EUCLEAN},	/* bits differ */
		{{1, 0, -EIO, false, 0}, -EIO},
	};
	uint64_t units = 3 * ALLOC_CHUNK, got;
	struct extent out[8], e;
	unsigned count;

	(void)state;
	for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
		struct liar l = lies[i].l;
		struct alloc_config cfg = { .units = units };
		struct alloc_source src = { &l, liar_load, liar_describe };
		struct alloc *a;
		struct alloc_stats st;

		assert_int_equal(alloc_open(&cfg, &src, units - 7232, &a), 0);
		assert_int_equal(alloc_next_free(a, 0, &e), lies[i].err);
		assert_int_equal(alloc_stats(a, true, &st), lies[i].err);
		/* What it was right about can be had. */
		assert_int_equal(alloc_vec(a, ALLOC_NO_GOAL, ALLOC_CHUNK, out, 8,
					   &count, &got), 0);
		assert_int_equal(got, ALLOC_CHUNK);
		check(a);
		assert_int_equal(alloc_close(a), 0);
	}
	/* It promised more than there is: 100 units. */
	{
		struct liar l = lies[0].l;
		struct alloc_config cfg = { .units = units };
		struct alloc_source src = { &l, liar_load, liar_describe };
		struct alloc *a;

		assert_int_equal(alloc_open(&cfg, &src, units + 1, &a), -EINVAL);
		assert_int_equal(alloc_open(&cfg, &src, units - 7132, &a), 0);
		assert_int_equal(alloc_vec(a, ALLOC_NO_GOAL, units - 7232, out, 8,
					   &count, &got), 0);
		assert_int_equal(got, units - 7232);
		assert_int_equal(alloc_any(a, 1, &e), -ENOSPC);
		assert_int_equal(alloc_vec(a, ALLOC_NO_GOAL, 1, out, 8, &count, &got),
				 -EUCLEAN);
		assert_int_equal(alloc_free_units(a), 100);
		assert_int_equal(alloc_close(a), 0);
	}
}

/* A chunk that nobody has asked for yet decides whether the space can end there. */
static void a_resize_asks_the_source(void **state)
{
	struct liar l = {1, ALLOC_CHUNK - 7232, 0, false, 0};
	struct alloc_config cfg = { .units = 3 * ALLOC_CHUNK };
	struct alloc_source src = { &l, liar_load, liar_describe };
	struct extent busy = {0, 0}, e;
	struct alloc *a;

	(void)state;
	assert_int_equal(alloc_open(&cfg, &src, cfg.units - 7232, &a), 0);
	assert_int_equal(alloc_resize(a, 0, &busy), -EINVAL);
	assert_int_equal(alloc_resize(a, (1ull << 52) + 1, &busy), -EINVAL);
	assert_int_equal(alloc_resize(a, ALLOC_CHUNK, &busy), -EBUSY);
	assert_int_equal(busy.start, ALLOC_CHUNK);
	assert_int_equal(busy.len, 7232);
	assert_int_equal(alloc_resize(a, ALLOC_CHUNK, NULL), -EBUSY);
	assert_int_equal(l.loads, 1);
	check(a);
	assert_int_equal(alloc_resize(a, 2 * ALLOC_CHUNK + 5, &busy), 0);
	assert_int_equal(alloc_free_units(a), 2 * ALLOC_CHUNK + 5 - 7232);
	check(a);
	/* Far away, over chunks that nobody knows, and back in one run. */
	assert_int_equal(alloc_resize(a, 60 * ALLOC_CHUNK + 9, &busy), 0);
	check(a);
	assert_int_equal(alloc_exact(a, 50 * ALLOC_CHUNK + 7, 3), 0);
	assert_int_equal(alloc_resize(a, 40 * ALLOC_CHUNK, &busy), -EBUSY);
	assert_int_equal(busy.start, 50 * ALLOC_CHUNK + 7);
	assert_int_equal(busy.len, 3);
	assert_int_equal(alloc_free(a, busy.start, busy.len), 0);
	assert_int_equal(alloc_resize(a, 40 * ALLOC_CHUNK, &busy), 0);
	assert_int_equal(alloc_resize(a, 2 * ALLOC_CHUNK + 1, &busy), 0);
	check(a);
	/* More is promised than would be left. */
	assert_int_equal(alloc_reserve(a, 2 * ALLOC_CHUNK - 7240), 0);
	assert_int_equal(alloc_resize(a, ALLOC_CHUNK + 7232 + 5, &busy), -ENOSPC);
	assert_int_equal(alloc_resize(a, 2 * ALLOC_CHUNK, &busy), 0);
	alloc_unreserve(a, 2 * ALLOC_CHUNK - 7240);
	assert_int_equal(alloc_free_units(a), 2 * ALLOC_CHUNK - 7232);
	assert_int_equal(alloc_any(a, ALLOC_CHUNK, &e), 0);
	assert_int_equal(e.start, 0);
	check(a);
	assert_int_equal(alloc_close(a), 0);
	assert_int_equal(alloc_close(NULL), 0);
}

/* Runs that the bins had no room for, when there is no memory to search them. */
static void lost_runs_wait_for_memory(void **state)
{
	struct alloc_config cfg = { .units = 2 * ALLOC_CHUNK, .shards = 1 };
	uint64_t free_units = 0, got;
	struct extent e;
	struct alloc *a;
	unsigned count;

	(void)state;
	assert_int_equal(alloc_open(&cfg, NULL, 0, &a), 0);
	assert_int_equal(alloc_any(a, cfg.units, &e), 0);
	a->hints += 8 * a->hints_max;
	for (; free_units < 1000; free_units++)
		assert_int_equal(alloc_free(a, 3 * free_units, 1), 0);
	fault_memory(0, true);
	while (pool_get(&a->hint_blocks))
		;
	assert_int_equal(alloc_any(a, 1, &e), -ENOMEM);
	assert_int_equal(alloc_vec(a, ALLOC_NO_GOAL, 5, &e, 1, &count, &got), -ENOMEM);
	fault_memory(UINT64_MAX, false);
	check(a);
	for (; free_units; free_units--)
		assert_int_equal(alloc_any(a, 1, &e), 0);
	check(a);
	assert_int_equal(alloc_close(a), 0);
}

/* The same two runs come and go, and nobody takes them by their hints. */
static void hints_do_not_pile_up(void **state)
{
	struct alloc_config cfg = { .units = 4 * ALLOC_CHUNK, .shards = 1 };
	struct extent e;
	struct alloc *a;

	(void)state;
	assert_int_equal(alloc_open(&cfg, NULL, 0, &a), 0);
	assert_int_equal(alloc_exact(a, 0, ALLOC_CHUNK), 0);
	assert_int_equal(alloc_free(a, 1000, 100), 0);
	assert_int_equal(alloc_free(a, 3000, 100), 0);
	for (unsigned i = 0; i < 100000; i++) {
		uint64_t at = i % 2 ? 1000 : 3000;

		assert_int_equal(alloc_near(a, at, 10, &e), 0);
		assert_int_equal(e.start, at);
		assert_int_equal(alloc_free(a, at, 10), 0);
	}
	assert_true(a->hints < 2000);
	assert_int_equal(alloc_any(a, 100, &e), 0);
	assert_int_equal(e.start, 1000);
	assert_int_equal(alloc_any(a, 100, &e), 0);
	assert_int_equal(e.start, 3000);
	check(a);
	assert_int_equal(alloc_close(a), 0);
}

/* More short runs than there is room for in the bins, and requests for longer. */
static void lost_runs_are_searched_only_for_what_they_may_be(void **state)
{
	struct alloc_config cfg = { .units = 16 * ALLOC_CHUNK, .shards = 1 };
	uint64_t free_units, got, hints;
	struct extent e, out[64];
	struct alloc *a;
	unsigned count;

	(void)state;
	assert_int_equal(alloc_open(&cfg, NULL, 0, &a), 0);
	assert_int_equal(alloc_any(a, cfg.units, &e), 0);
	for (uint64_t i = 0; i < 10 * ALLOC_CHUNK; i += 2)
		assert_int_equal(alloc_free(a, i, 1), 0);
	assert_int_equal(alloc_free(a, 12 * ALLOC_CHUNK, 2 * ALLOC_CHUNK), 0);
	assert_true(a->shards[0].lost_count > 0);
	hints = a->hints;
	for (uint64_t i = 0; i < 50; i++) {
		assert_int_equal(alloc_any(a, 300, &e), 0);
		assert_int_equal(alloc_free(a, i * 200 * 32 + 1, 1), 0);
	}
	assert_true(a->hints < hints + 1000);
	/* Longer ones that are lost, too, over the border of two chunks. */
	a->hints += 8 * a->hints_max;
	assert_int_equal(alloc_free(a, 11 * ALLOC_CHUNK - 150, 800), 0);
	assert_int_equal(alloc_free(a, 15 * ALLOC_CHUNK, 90), 0);
	while ((free_units = alloc_free_units(a)) > 2 * ALLOC_CHUNK)
		assert_int_equal(alloc_any(a, 1, &e), 0);
	while (!alloc_any(a, 1000, &e))
		;
	assert_int_equal(alloc_any(a, 700, &e), 0);
	assert_int_equal(alloc_any(a, 80, &e), 0);
	a->hints -= 8 * a->hints_max;
	while ((free_units = alloc_free_units(a)))
		assert_int_equal(alloc_vec(a, ALLOC_NO_GOAL, free_units, out, 64,
					   &count, &got), 0);
	check(a);
	assert_int_equal(alloc_close(a), 0);
}

/* Where the space ends nobody has looked yet, or not for long. */
static void a_space_ends_in_a_chunk_that_nobody_knows(void **state)
{
	struct liar l = { 1, 0, 0, false, 0 };
	struct alloc_config cfg = { .units = 2 * ALLOC_CHUNK - 100 };
	struct alloc_source src = { &l, liar_load, liar_describe };
	struct extent e;
	struct alloc *a;

	(void)state;
	assert_int_equal(alloc_open(&cfg, &src, cfg.units - 7232, &a), 0);
	assert_int_equal(alloc_resize(a, 900 * ALLOC_CHUNK + 1, NULL), 0);
	check(a);
	/* The border is far from all that was ever looked at; forth, and back. */
	assert_int_equal(alloc_resize(a, 500 * ALLOC_CHUNK + 7, NULL), 0);
	check(a);
	assert_int_equal(alloc_resize(a, 800 * ALLOC_CHUNK + 3, NULL), 0);
	check(a);
	assert_int_equal(alloc_any(a, 798 * ALLOC_CHUNK, &e), 0);
	assert_int_equal(alloc_exact(a, 0, ALLOC_CHUNK), 0);
	check(a);
	assert_int_equal(alloc_close(a), 0);
}

/* Every allocation fails in turn; `holes` is about what a short list can hold. */
static void resize_starved(uint64_t units, uint64_t to, unsigned holes, bool tail)
{
	bool failed = true;

	for (uint64_t n = 0; failed; n++) {
		struct alloc_config cfg = { .units = units };
		struct alloc *a;
		struct extent e;
		uint64_t free_units;
		int err;

		assert_int_equal(alloc_open(&cfg, NULL, 0, &a), 0);
		for (unsigned i = 0; i < holes; i++)
			assert_int_equal(alloc_exact(a, units - 9000 + 2 * i, 1), 0);
		if (tail)
			assert_int_equal(alloc_exact(a, units - 500, 1), 0);
		free_units = alloc_free_units(a);
		fault_memory(n, true);
		err = alloc_resize(a, to, NULL);
		failed = fault_memory(UINT64_MAX, false) > n;
		assert_true(!err || (failed && err == -ENOMEM));
		check(a);
		free_units += err ? 0 : to - units;
		assert_int_equal(alloc_free_units(a), free_units);
		while (free_units) {
			uint64_t got;
			unsigned count;

			assert_int_equal(alloc_vec(a, ALLOC_NO_GOAL, free_units,
						   &e, 1, &count, &got), 0);
			free_units -= got;
		}
		check(a);
		assert_int_equal(alloc_close(a), 0);
	}
}

static void a_resize_without_memory_changes_nothing(void **state)
{
	(void)state;
	for (unsigned holes = 29; holes < 34; holes++)
		for (unsigned tail = 0; tail < 2; tail++) {
			resize_starved(2 * ALLOC_CHUNK, 2 * ALLOC_CHUNK - 10,
				       holes, tail);
			resize_starved(2 * ALLOC_CHUNK + 9000,
				       300 * ALLOC_CHUNK + 5, holes, tail);
		}
	resize_starved(300 * ALLOC_CHUNK + 9000, 200 * ALLOC_CHUNK + 7, 0, false);
}

/* Every third unit is in use. */
static int thirds_load(void *ctx, uint64_t chunk, void *bits)
{
	unsigned char *b = bits;

	(void)ctx;
	memset(bits, 0, ALLOC_CHUNK_BYTES);
	for (uint32_t i = 0; i < ALLOC_CHUNK; i++)
		if ((chunk * ALLOC_CHUNK + i) % 3 == 0)
			b[i / 8] |= (unsigned char)(1 << i % 8);
	return 0;
}

static int thirds_describe(void *ctx, uint64_t chunk, uint64_t *count, uint32_t *free)
{
	(void)ctx;
	*count = 1;
	*free = ALLOC_CHUNK - (ALLOC_CHUNK + (chunk * ALLOC_CHUNK + 2) % 3) / 3;
	return 0;
}

/* First fit has every run that is not small in its trees: thousands come in. */
static void many_long_runs_need_memory(void **state)
{
	struct alloc_config cfg = { .units = 2 * ALLOC_CHUNK,
				    .small_limit_bytes = 4096, .shards = 1,
				    .policy = ALLOC_FIRST_FIT };
	struct alloc_source src = { NULL, thirds_load, thirds_describe };
	bool failed = true;

	(void)state;
	for (uint64_t n = 0; failed; n++) {
		struct alloc *a;
		struct extent e;
		int err;

		assert_int_equal(alloc_open(&cfg, &src, cfg.units / 3 * 2, &a), 0);
		fault_memory(n, true);
		err = alloc_any(a, 2, &e);
		failed = fault_memory(UINT64_MAX, false) > n;
		assert_true(!err || (failed && err == -ENOMEM));
		for (uint64_t i = 0; i < cfg.units / 3 - !err; i++)
			assert_int_equal(alloc_any(a, 2, &e), 0);
		check(a);
		assert_int_equal(alloc_close(a), 0);
	}
}

/* Three chunks, all free; who loads the second waits, and may fail. */
struct slow {
	struct alloc *a;
	sem_t begun, go;
	int err, exact;
};

static int slow_load(void *ctx, uint64_t chunk, void *bits)
{
	struct slow *s = ctx;
	int err = 0;

	memset(bits, 0, ALLOC_CHUNK_BYTES);
	if (chunk == 1) {
		sem_post(&s->begun);
		sem_wait(&s->go);
		err = s->err;
		s->err = 0;
	}
	return err;
}

static int slow_describe(void *ctx, uint64_t chunk, uint64_t *count, uint32_t *free)
{
	(void)ctx;
	*count = 3 - chunk;
	*free = ALLOC_CHUNK;
	return 0;
}

static void *slow_exact(void *arg)
{
	struct slow *s = arg;

	s->exact = alloc_exact(s->a, ALLOC_CHUNK + 5, 1);
	return NULL;
}

/* The source tells of it meanwhile; it is found then, or when it came to be. */
static void a_chunk_that_is_being_loaded_is_not_passed_over(void **state)
{
	(void)state;
	for (unsigned failing = 0; failing < 2; failing++) {
		struct slow s = { .err = failing ? -ENOMEM : 0 };
		struct alloc_config cfg = { .units = 3 * ALLOC_CHUNK };
		struct alloc_source src = { &s, slow_load, slow_describe };
		pthread_t thread;
		struct extent out[4];
		unsigned count;
		uint64_t got;

		sem_init(&s.begun, 0, 0);
		sem_init(&s.go, 0, 0);
		assert_int_equal(alloc_open(&cfg, &src, cfg.units, &s.a), 0);
		assert_int_equal(pthread_create(&thread, NULL, slow_exact, &s), 0);
		sem_wait(&s.begun);
		assert_int_equal(alloc_vec(s.a, ALLOC_NO_GOAL, ALLOC_CHUNK, out, 4,
					   &count, &got), 0);
		/* Should somebody wait for it. */
		sem_post(&s.go);
		if (failing)
			pthread_join(thread, NULL);
		sem_post(&s.go);
		assert_int_equal(alloc_vec(s.a, ALLOC_NO_GOAL, 2 * ALLOC_CHUNK - 1,
					   out, 4, &count, &got), 0);
		assert_int_equal(got, 2 * ALLOC_CHUNK - 1);
		if (!failing)
			pthread_join(thread, NULL);
		assert_true(failing ? s.exact == -ENOMEM
				    : !s.exact || s.exact == -EBUSY);
		check(s.a);
		assert_int_equal(alloc_close(s.a), 0);
		sem_destroy(&s.begun);
		sem_destroy(&s.go);
	}
}

/* From the middle of a run, over chunks in and not in the tree, to its start. */
static void a_free_run_is_told_from_its_start(void **state)
{
	struct alloc_config cfg = { .units = 8 * ALLOC_CHUNK };
	struct extent e;
	struct alloc *a;

	(void)state;
	assert_int_equal(alloc_open(&cfg, NULL, 0, &a), 0);
	assert_int_equal(alloc_exact(a, 100, 1), 0);
	assert_int_equal(alloc_exact(a, 900, 1), 0);
	assert_int_equal(alloc_exact(a, ALLOC_CHUNK + 20, 1), 0);
	assert_int_equal(alloc_exact(a, 7 * ALLOC_CHUNK, 1), 0);
	assert_int_equal(alloc_next_free(a, 500, &e), 0);
	assert_int_equal(e.start, 101);
	assert_int_equal(e.len, 799);
	assert_int_equal(alloc_next_free(a, 5 * ALLOC_CHUNK, &e), 0);
	assert_int_equal(e.start, ALLOC_CHUNK + 21);
	assert_int_equal(e.start + e.len, 7 * ALLOC_CHUNK);
	/* a short one over the border of two chunks */
	assert_int_equal(alloc_exact(a, ALLOC_CHUNK - 30, 1), 0);
	assert_int_equal(alloc_next_free(a, ALLOC_CHUNK + 3, &e), 0);
	assert_int_equal(e.start, ALLOC_CHUNK - 29);
	assert_int_equal(e.len, 49);
	assert_int_equal(alloc_next_free(a, 3, &e), 0);
	assert_int_equal(e.start, 0);
	assert_int_equal(e.len, 100);
	assert_int_equal(alloc_next_free(a, 8 * ALLOC_CHUNK, &e), -ENOENT);
	assert_int_equal(alloc_close(a), 0);
}

/* alloc_check() is what other tests rely on: it sees what is at odds. */
static void found(struct alloc *a, const char *want)
{
	char msg[200] = "";

	assert_int_equal(alloc_check(a, msg, sizeof(msg)), -EUCLEAN);
	if (!strstr(msg, want))
		fail_msg("'%s', not '%s'", msg, want);
	assert_int_equal(alloc_check(a, NULL, 0), -EUCLEAN);
}

static void a_check_sees_what_is_at_odds(void **state)
{
	struct alloc_config cfg = { .units = 3 * ALLOC_CHUNK, .shards = 2 };
	struct pair p;
	struct extent e;
	struct chunk *c;
	struct alloc *a;

	(void)state;
	assert_int_equal(alloc_open(&cfg, NULL, 0, &a), 0);
	assert_int_equal(alloc_exact(a, 5000, 10), 0);
	assert_int_equal(alloc_exact(a, 9000, 10), 0);
	check(a);
	c = chunks_peek(&a->chunks, 0);
	c->free++;
	found(a, "chunk 0 has 32748 units free, counts 32749");
	c->free--;
	a->pool++;
	found(a, "units free, counted");
	a->pool--;
	/* the long run between the two */
	p = (struct pair){ 5010, 3990 };
	assert_true(btree_remove(&a->by_start, p, NULL));
	found(a, "free units 5010 to 8999 are not a run in the tree of starts");
	assert_int_equal(btree_prepare(&a->by_start, 64), 0);
	btree_insert(&a->by_start, (struct pair){ 5010, 3989 });
	found(a, "free units 5010 to 8999 are not a run in the tree of starts");
	assert_true(btree_update(&a->by_start, (struct pair){ 5010, 3989 }, 3990, NULL));
	check(a);
	p = (struct pair){ 3990, 5010 };
	assert_true(btree_remove(&a->by_size, p, NULL));
	found(a, "free units 5010 to 8999 are not a run in the tree of sizes");
	assert_int_equal(btree_prepare(&a->by_size, 64), 0);
	btree_insert(&a->by_size, p);
	check(a);
	btree_insert(&a->by_size, (struct pair){ 77, 77 });
	found(a, "3 long runs, 3 in the tree of starts, 4 in the tree of sizes");
	assert_true(btree_remove(&a->by_size, (struct pair){ 77, 77 }, NULL));
	/* a window over what is in use */
	c->win_lo = 4990;
	c->win_hi = 5010;
	found(a, "chunk 0: units of its window are in use");
	c->win_lo = c->win_hi = 0;
	check(a);
	assert_int_equal(alloc_any(a, 4, &e), 0);
	check(a);
	assert_int_equal(alloc_close(a), 0);
}

/* -- Threads -- */

#define THREADS 16
#define SLOTS 4096

struct crowd {
	struct alloc *a;
	uint64_t units;
	unsigned char *owner;		/* atomic: 0 free */
	struct extent slots[SLOTS];	/* atomic by slot_busy */
	unsigned char slot_busy[SLOTS];
	unsigned steps;
	uint64_t max_len;
};

static _Thread_local struct random thread_random;
static unsigned thread_seed;

static void own(struct crowd *c, struct extent e, unsigned char from,
		unsigned char to)
{
	for (uint64_t i = e.start; i < e.start + e.len; i++) {
		unsigned char was = __atomic_exchange_n(&c->owner[i], to,
							__ATOMIC_RELAXED);

		if (was != from) {
			fprintf(stderr, "unit %llu handed out twice\n",
				(unsigned long long)i);
			abort();
		}
	}
}

static void expect(int got, int want, const char *what)
{
	if (got == want)
		return;
	fprintf(stderr, "%s returned %d\n", what, got);
	abort();
}

static void crowd_free(struct crowd *c, struct extent e)
{
	own(c, e, 1, 0);
	if (e.start % 3) {
		expect(alloc_free(c->a, e.start, e.len), 0, "alloc_free");
	} else {
		expect(alloc_defer(c->a, e.start, e.len), 0, "alloc_defer");
		expect(alloc_free(c->a, e.start, e.len), -EINVAL, "free twice");
		if (e.start % 2) {
			expect(alloc_release(c->a, e.start, e.len), 0,
			       "alloc_release");
		} else {
			expect(alloc_release_reserved(c->a, e.start, e.len), 0,
			       "alloc_release_reserved");
			alloc_unreserve(c->a, e.len);
		}
	}
}

static void *crowd_thread(void *arg)
{
	struct crowd *c = arg;
	struct random *r = &thread_random;

	r->s = __atomic_add_fetch(&thread_seed, 1, __ATOMIC_RELAXED);
	for (unsigned i = 0; i < c->steps; i++) {
		unsigned slot = (unsigned)below(r, SLOTS), count = 0;
		struct extent out[4], e;
		uint64_t got, len;

		if (__atomic_exchange_n(&c->slot_busy[slot], 1, __ATOMIC_ACQUIRE))
			continue;
		e = c->slots[slot];
		len = 1 + below(r, below(r, 8) ? 64 : c->max_len);
		if (e.len) {
			crowd_free(c, e);
			c->slots[slot].len = 0;
		} else if (below(r, 2)) {
			int err = alloc_any(c->a, len, &e);

			if (!err) {
				own(c, e, 0, 1);
				c->slots[slot] = e;
			} else {
				expect(err, -ENOSPC, "alloc_any");
			}
		} else if (!alloc_reserve(c->a, len)) {
			uint64_t goal = below(r, 2) ? below(r, c->units)
						    : ALLOC_NO_GOAL;

			expect(alloc_vec_reserved(c->a, goal, len, out, 4,
						  &count, &got),
			       0, "alloc_vec_reserved");
			alloc_unreserve(c->a, len - got);
			for (unsigned j = 0; j < count; j++)
				own(c, out[j], 0, 1);
			for (unsigned j = 1; j < count; j++)
				crowd_free(c, out[j]);
			c->slots[slot] = out[0];
		}
		__atomic_store_n(&c->slot_busy[slot], 0, __ATOMIC_RELEASE);
	}
	return NULL;
}

static void crowd(uint64_t units, uint64_t max_len, uint32_t shards,
		  const struct alloc_source *src, uint64_t free_units,
		  const unsigned char *used)
{
	struct alloc_config cfg = { .units = units, .shards = shards };
	struct crowd *c = calloc(1, sizeof(*c));
	pthread_t threads[THREADS];
	struct extent e;

	c->units = units;
	c->max_len = max_len;
	c->steps = 40000 / SLOW;
	c->owner = calloc(1, units);
	for (uint64_t i = 0; used && i < units; i++)
		c->owner[i] = used[i] ? 9 : 0;
	assert_int_equal(alloc_open(&cfg, src, free_units, &c->a), 0);
	for (unsigned i = 0; i < THREADS; i++)
		assert_int_equal(pthread_create(&threads[i], NULL, crowd_thread, c), 0);
	for (unsigned i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	check(c->a);
	for (unsigned i = 0; i < SLOTS; i++)
		if (c->slots[i].len)
			crowd_free(c, c->slots[i]);
	for (uint64_t i = 0; used && i < units; i++)
		if (used[i])
			assert_int_equal(alloc_free(c->a, i, 1), 0);
	check(c->a);
	assert_int_equal(alloc_free_units(c->a), units);
	assert_int_equal(alloc_any(c->a, units, &e), 0);
	assert_int_equal(alloc_close(c->a), 0);
	free(c->owner);
	free(c);
}

static void sixteen_threads_never_share_a_unit(void **state)
{
	(void)state;
	crowd(4 * ALLOC_CHUNK + 5, 2000, 16, NULL, 0, NULL);
	crowd(2 * ALLOC_CHUNK, 500, 3, NULL, 0, NULL);
	crowd(40 * ALLOC_CHUNK, 50000, 16, NULL, 0, NULL);
}

static void sixteen_threads_load_together(void **state)
{
	struct random r = { seed(6) };
	struct source s = { .units = 12 * ALLOC_CHUNK + 3 };
	struct alloc_source src = { &s, source_load, source_describe };
	uint64_t free_units = 0;

	(void)state;
	s.map = calloc(1, s.units);
	source_fill(&s, &r);
	for (uint64_t u = 0; u < s.units; u++)
		free_units += !s.map[u];
	crowd(s.units, 1000, 16, &src, free_units, s.map);
	free(s.map);
}

/* A space kept 99 % full with requests of up to 64 units. */
struct churn {
	struct alloc *a;
	struct random r;
	uint64_t used, full;
	struct extent *held;
	size_t count;
	uint64_t requests, extents;
};

static void churn_fill(struct churn *c)
{
	while (c->used + 64 < c->full) {
		uint64_t got;
		unsigned n;

		expect(alloc_vec(c->a, ALLOC_NO_GOAL, 1 + below(&c->r, 64),
				 &c->held[c->count], 64, &n, &got), 0, "alloc_vec");
		c->count += n;
		c->used += got;
		c->requests++;
		c->extents += n;
	}
}

static void *churn_thread(void *arg)
{
	struct churn *c = arg;

	churn_fill(c);
	c->requests = c->extents = 0;
	for (unsigned i = 0; i < 300000 / SLOW; i++) {
		size_t at = below(&c->r, c->count);

		expect(alloc_free(c->a, c->held[at].start, c->held[at].len), 0,
		       "alloc_free");
		c->used -= c->held[at].len;
		c->held[at] = c->held[--c->count];
		churn_fill(c);
	}
	return NULL;
}

/* What the shard of the one before it has: its bins, and its windows. */
static void a_full_space_serves_the_next_thread_as_well(void **state)
{
	struct alloc_config cfg = { .units = 1 << 22 };
	struct churn c = { .r = { seed(8) }, .full = cfg.units / 100 * 99 };

	(void)state;
	c.held = calloc(cfg.units, sizeof(*c.held));
	assert_non_null(c.held);
	assert_int_equal(alloc_open(&cfg, NULL, 0, &c.a), 0);
	for (unsigned i = 0; i < 3; i++) {
		pthread_t thread;

		assert_int_equal(pthread_create(&thread, NULL, churn_thread, &c), 0);
		pthread_join(thread, NULL);
		print_message("%llu extents for %llu requests\n",
			      (unsigned long long)c.extents,
			      (unsigned long long)c.requests);
		assert_true(c.extents <= c.requests + c.requests / 1000);
	}
	check(c.a);
	assert_int_equal(alloc_close(c.a), 0);
	free(c.held);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_bad_configuration_is_named),
		cmocka_unit_test(the_environment_configures),
		cmocka_unit_test(bytes_round_up_and_misuse_changes_nothing),
		cmocka_unit_test(a_tiny_space_walks),
		cmocka_unit_test(a_chunk_walks),
		cmocka_unit_test(several_chunks_walk),
		cmocka_unit_test(a_lack_of_memory_refuses_and_changes_nothing),
		cmocka_unit_test(a_petabyte_opens_at_once),
		cmocka_unit_test(what_follows_a_goal_lies_behind_it),
		cmocka_unit_test(a_source_is_asked_as_needed),
		cmocka_unit_test(a_source_that_lies_is_found_out),
		cmocka_unit_test(a_resize_asks_the_source),
		cmocka_unit_test(lost_runs_wait_for_memory),
		cmocka_unit_test(hints_do_not_pile_up),
		cmocka_unit_test(lost_runs_are_searched_only_for_what_they_may_be),
		cmocka_unit_test(a_space_ends_in_a_chunk_that_nobody_knows),
		cmocka_unit_test(a_resize_without_memory_changes_nothing),
		cmocka_unit_test(many_long_runs_need_memory),
		cmocka_unit_test(a_chunk_that_is_being_loaded_is_not_passed_over),
		cmocka_unit_test(a_free_run_is_told_from_its_start),
		cmocka_unit_test(a_check_sees_what_is_at_odds),
		cmocka_unit_test(sixteen_threads_never_share_a_unit),
		cmocka_unit_test(sixteen_threads_load_together),
		cmocka_unit_test(a_full_space_serves_the_next_thread_as_well),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
