/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The concurrent B-tree: a seeded walk against a sorted array, and threads
 * that each keep a set of their own in one tree.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "alloc/btree.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SLOW 10
#else
#define SLOW 1
#endif

static uint64_t rnd(uint64_t *s)
{
	uint64_t z = (*s += 0x9e3779b97f4a7c15ull);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

#define KEYS 4096

/* Present keys k have v = value[k]; others have none. */
static uint64_t value[KEYS];
static bool present[KEYS];

static void compare(struct btree *t, uint64_t k, bool unique)
{
	struct pair p = { k, 0 }, got;
	uint64_t i = k;
	bool found = btree_ceil(t, p, &got, NULL);

	(void)unique;
	while (i < KEYS && !present[i])
		i++;
	assert_int_equal(found, i < KEYS);
	if (found) {
		assert_int_equal(got.k, i);
		assert_int_equal(got.v, value[i]);
	}
	p.v = UINT64_MAX;
	found = btree_floor(t, p, &got, NULL);
	for (i = k + 1; i > 0 && !present[i - 1];)
		i--;
	assert_int_equal(found, i > 0);
	if (found) {
		assert_int_equal(got.k, i - 1);
		assert_int_equal(got.v, value[i - 1]);
	}
}

static void walk(uint64_t seed, bool dense)
{
	struct btree t;
	int64_t count = 0;

	memset(present, 0, sizeof(present));
	assert_int_equal(btree_init(&t, true, "test"), 0);
	for (unsigned step = 0; step < 400000 / SLOW; step++) {
		uint64_t k = rnd(&seed) % KEYS, what = rnd(&seed) % 100;
		uint64_t tide = (step / 20000) % 2 ? 20 : dense ? 70 : 45;
		struct btree_spot spot = { NULL, 0 };
		struct pair got;

		assert_int_equal(btree_prepare(&t, 64), 0);
		if (what < 40)
			btree_floor(&t, (struct pair){ k, UINT64_MAX }, &got,
				    &spot);
		if (what < 10 && present[k]) {
			uint64_t v = 1 + rnd(&seed) % 1000;

			assert_true(btree_update(&t, (struct pair){ k, value[k] },
						 v, &spot));
			value[k] = v;
		} else if (what < 20 && present[k]) {
			/* As far as the next one, either way. */
			uint64_t to = k;

			if (rnd(&seed) % 2)
				while (to + 1 < KEYS && !present[to + 1] &&
				       rnd(&seed) % 4)
					to++;
			else
				while (to > 0 && !present[to - 1] &&
				       rnd(&seed) % 4)
					to--;
			assert_true(btree_replace(&t,
						  (struct pair){ k, value[k] },
						  (struct pair){ to, 5 },
						  &spot));
			present[k] = false;
			present[to] = true;
			value[to] = 5;
		} else if (what < 20 + tide && !present[k]) {
			value[k] = 1 + rnd(&seed) % 1000;
			present[k] = true;
			btree_insert(&t, (struct pair){ k, value[k] });
			count++;
		} else {
			assert_int_equal(btree_remove(&t,
						      (struct pair){ k, value[k] },
						      &spot),
					 present[k]);
			count -= present[k];
			present[k] = false;
			assert_false(btree_update(&t,
						  (struct pair){ k, value[k] },
						  1, NULL));
		}
		compare(&t, rnd(&seed) % KEYS, true);
		if (step % 512 == 0)
			assert_int_equal(btree_check(&t), count);
	}
	for (uint64_t k = 0; k < KEYS; k++)
		if (present[k])
			assert_true(btree_remove(&t, (struct pair){ k, value[k] },
						 NULL));
	assert_int_equal(btree_check(&t), 0);
	btree_fini(&t);
}

static void the_tree_is_what_a_sorted_array_would_be(void **state)
{
	(void)state;
	walk(1, true);
	walk(2, false);
}

static void equal_first_numbers_are_told_apart(void **state)
{
	struct btree t;
	struct pair got;

	(void)state;
	assert_int_equal(btree_init(&t, false, "test"), 0);
	for (uint64_t v = 0; v < 1000; v++) {
		assert_int_equal(btree_prepare(&t, 64), 0);
		btree_insert(&t, (struct pair){ 7, v * 2 });
	}
	for (uint64_t v = 0; v < 1000; v++) {
		assert_true(btree_ceil(&t, (struct pair){ 7, v * 2 }, &got, NULL));
		assert_int_equal(got.v, v * 2);
		assert_false(btree_remove(&t, (struct pair){ 7, v * 2 + 1 }, NULL));
	}
	assert_true(btree_ceil(&t, (struct pair){ 3, 99 }, &got, NULL));
	assert_int_equal(got.v, 0);
	assert_false(btree_ceil(&t, (struct pair){ 7, 1999 }, &got, NULL));
	assert_int_equal(btree_check(&t), 1000);
	btree_fini(&t);
}

/* -- Threads -- */

#define THREADS 8
#define SPREAD 3000

struct worker {
	struct btree *t;
	uint64_t number;
};

static void must(bool ok, const char *what)
{
	if (ok)
		return;
	fprintf(stderr, "%s\n", what);
	abort();
}

/* Keys that are `number` modulo THREADS are this thread's. */
static void *worker_run(void *arg)
{
	struct worker *w = arg;
	uint64_t seed = w->number, v[SPREAD] = { 0 };

	for (unsigned step = 0; step < 200000 / SLOW; step++) {
		uint64_t i = rnd(&seed) % SPREAD, k = i * THREADS + w->number;
		struct btree_spot spot;
		struct pair got;

		must(!btree_prepare(w->t, 64 * THREADS), "no memory");
		if (!v[i]) {
			v[i] = 1 + rnd(&seed) % 100;
			btree_insert(w->t, (struct pair){ k, v[i] });
			continue;
		}
		must(btree_floor(w->t, (struct pair){ k, UINT64_MAX }, &got, &spot) &&
			     got.k == k && got.v == v[i], "lost a pair");
		must(btree_ceil(w->t, (struct pair){ k, 0 }, &got, NULL) &&
			     got.k == k, "lost a pair upwards");
		if (rnd(&seed) % 3) {
			must(btree_remove(w->t, (struct pair){ k, v[i] }, &spot),
			     "cannot remove");
			v[i] = 0;
		} else {
			must(btree_update(w->t, (struct pair){ k, v[i] }, 200,
					  &spot), "cannot update");
			v[i] = 200;
		}
	}
	for (uint64_t i = 0; i < SPREAD; i++)
		if (v[i])
			must(btree_remove(w->t,
					  (struct pair){ i * THREADS + w->number,
							 v[i] }, NULL),
			     "cannot remove at the end");
	return NULL;
}

static void threads_keep_their_own_pairs(void **state)
{
	struct worker workers[THREADS];
	pthread_t threads[THREADS];
	struct btree t;

	(void)state;
	assert_int_equal(btree_init(&t, true, "test"), 0);
	for (uint64_t i = 0; i < THREADS; i++) {
		workers[i] = (struct worker){ &t, i };
		pthread_create(&threads[i], NULL, worker_run, &workers[i]);
	}
	for (unsigned i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	assert_int_equal(btree_check(&t), 0);
	btree_fini(&t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_tree_is_what_a_sorted_array_would_be),
		cmocka_unit_test(equal_first_numbers_are_told_apart),
		cmocka_unit_test(threads_keep_their_own_pairs),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
