/* SPDX-License-Identifier: BSD-2-Clause */

/* The crash simulator itself: what it cuts, keeps, tears and fails. */

#include "tests/fault.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define PAGES 16

/* A write of `value` all over page `n`. */
static int put(struct fault *f, unsigned n, uint8_t value)
{
	uint8_t page[FAULT_PAGE];

	memset(page, value, sizeof(page));
	return image_pwrite(fault_image(f), page, sizeof(page), n * FAULT_PAGE);
}

static uint8_t get(const struct fault *f, unsigned n, unsigned sector)
{
	uint8_t b;

	fault_peek(f, &b, 1, n * FAULT_PAGE + sector * FAULT_SECTOR);
	return b;
}

struct seen {
	uint64_t n, first_ok, masks, torn;
	uint64_t promised, started;
};

static int see(void *ctx, struct fault *c, const struct fault_cut *cut)
{
	struct seen *s = ctx;
	unsigned mask = 0;

	s->n++;
	s->first_ok += get(c, 0, 0) == 1;
	for (unsigned i = 1; i < 4; i++) {
		mask |= (get(c, i, 0) == 2) << (i - 1);
		for (unsigned k = 1; k < 8; k++)
			if (get(c, i, k) != get(c, i, 0)) {
				s->torn++;
				break;
			}
	}
	if (cut->flush == 1 && !cut->torn)
		s->masks |= 1u << mask;
	if (cut->flush == 1) {
		s->promised |= 1u << cut->promised;
		s->started |= 1u << cut->started;
	}
	/* An image of its own: what is done to it is forgotten. */
	put(c, 0, 99);
	return 0;
}

static void every_subset_between_two_flushes_is_tried(void **state)
{
	struct fault *f = fault_create(PAGES * FAULT_PAGE);
	struct fault_plan plan = {.seed = 7, .all_below = 5, .torn = 20};
	struct seen s = {0};
	uint64_t zero = 0, nil = 0;

	(void)state;
	fault_record(f, true);
	fault_started(f, 1);
	put(f, 0, 1);
	image_flush(fault_image(f));
	fault_promised(f, 1);
	fault_started(f, 2);
	put(f, 1, 2);
	fault_started(f, 3);
	put(f, 2, 2);
	put(f, 3, 2);
	fault_explore(f, &plan, &zero, &nil, true, see, &s);
	/* 2 before the flush, 8 after, and the torn ones. */
	assert_int_equal(s.n, 2 + 8 + 40);
	assert_int_equal(s.masks, 0xff);
	assert_true(s.torn > 5);
	/* Once flushed the first write is always there. */
	assert_true(s.first_ok >= 8 + 20 + 1);
	assert_int_equal(s.promised, 1u << 1);
	/* Nothing kept: 1 explains it. Page 1 only: 2. */
	assert_int_equal(s.started, 1u << 1 | 1u << 2 | 1u << 3);
	/* The image itself saw nothing of it. */
	assert_int_equal(get(f, 0, 0), 1);
	fault_destroy(f);
}

static void a_log_is_explored_piece_by_piece(void **state)
{
	struct fault *f = fault_create(PAGES * FAULT_PAGE);
	struct fault_plan plan = {.seed = 7, .all_below = 5};
	struct seen s = {0};
	uint64_t started = 0, promised = 0;

	(void)state;
	fault_record(f, true);
	fault_started(f, 1);
	put(f, 0, 1);
	image_flush(fault_image(f));
	fault_promised(f, 1);
	put(f, 1, 2);
	fault_explore(f, &plan, &started, &promised, false, see, &s);
	assert_int_equal(s.n, 2);
	assert_int_equal(started, 1);
	fault_started(f, 2);
	put(f, 2, 2);
	fault_explore(f, &plan, &started, &promised, false, see, &s);
	assert_int_equal(s.n, 2);
	image_flush(fault_image(f));
	fault_explore(f, &plan, &started, &promised, false, see, &s);
	assert_int_equal(s.n, 6);
	assert_int_equal(promised, 1);
	fault_explore(f, &plan, &started, &promised, true, see, &s);
	assert_int_equal(s.n, 7);
	fault_destroy(f);
}

static void a_lying_flush_keeps_nothing(void **state)
{
	struct fault *f = fault_create(PAGES * FAULT_PAGE);
	struct fault_plan plan = {.seed = 7, .all_below = 5};
	struct seen s = {0};
	uint64_t started = 0, promised = 0;

	(void)state;
	fault_record(f, true);
	fault_lie(f, true);
	put(f, 0, 1);
	assert_int_equal(image_flush(fault_image(f)), 0);
	fault_explore(f, &plan, &started, &promised, true, see, &s);
	assert_int_equal(s.n, 2);
	assert_int_equal(s.first_ok, 1);
	fault_destroy(f);
}

static void a_fork_shares_and_does_not_touch(void **state)
{
	struct fault *f = fault_create(PAGES * FAULT_PAGE), *g, *h;

	(void)state;
	put(f, 0, 1);
	g = fault_create_over(f);
	put(g, 1, 2);
	h = fault_create_over(g);
	put(h, 0, 3);
	assert_int_equal(get(f, 0, 0), 1);
	assert_int_equal(get(g, 0, 0), 1);
	assert_int_equal(get(h, 0, 0), 3);
	assert_int_equal(get(h, 1, 0), 2);
	fault_fork(h, f);
	assert_int_equal(get(h, 0, 0), 1);
	assert_int_equal(get(h, 1, 0), 0);
	fault_destroy(h);
	fault_destroy(g);
	fault_destroy(f);
}

static void calls_fail_when_told(void **state)
{
	struct fault *f = fault_create(PAGES * FAULT_PAGE);
	uint8_t b[8];

	(void)state;
	fault_fail(f, FAULT_WRITE, 1, EIO, false, false);
	assert_int_equal(put(f, 0, 1), 0);
	assert_int_equal(put(f, 0, 2), -EIO);
	assert_int_equal(get(f, 0, 0), 1);
	assert_int_equal(put(f, 0, 3), 0);
	fault_fail(f, FAULT_FLUSH, 0, ENOSPC, true, false);
	assert_int_equal(image_flush(fault_image(f)), -ENOSPC);
	assert_int_equal(image_flush(fault_image(f)), -ENOSPC);
	assert_int_equal(fault_failures(f), 2);
	fault_fail(f, FAULT_CALLS, 1, EIO, false, false);
	assert_int_equal(image_pread(fault_image(f), b, 8, 0), 0);
	assert_int_equal(put(f, 0, 1), 0);
	assert_int_equal(image_flush(fault_image(f)), -EIO);
	fault_fail(f, FAULT_READ, 0, EIO, false, false);
	assert_int_equal(image_pread(fault_image(f), b, 8, 0), -EIO);
	assert_int_equal(image_pread(fault_image(f), b, 8, PAGES * FAULT_PAGE), -ENXIO);
	fault_freeze(f, true);
	assert_int_equal(put(f, 0, 1), -EROFS);
	fault_destroy(f);
}

static void a_failed_flush_gives_up_what_came_before(void **state)
{
	struct fault *f = fault_create(PAGES * FAULT_PAGE);
	struct fault_plan plan = {.seed = 7, .all_below = 5};
	struct seen s = {0};
	uint64_t started = 0, promised = 0;

	(void)state;
	fault_record(f, true);
	put(f, 0, 1);
	fault_fail(f, FAULT_FLUSH, 0, EIO, false, true);
	assert_int_equal(image_flush(fault_image(f)), -EIO);
	assert_int_equal(image_flush(fault_image(f)), 0);
	put(f, 1, 2);
	fault_explore(f, &plan, &started, &promised, true, see, &s);
	/* Lost or kept until the second flush, lost after it. */
	assert_int_equal(s.n, 4);
	assert_int_equal(s.first_ok, 1);
	fault_destroy(f);
}

static void memory_fails_when_told(void **state)
{
	/* Volatile, or the compiler knows better. */
	void *(*volatile get_some)(size_t) = malloc;
	void *(*volatile get_zeroes)(size_t, size_t) = calloc;
	void *p;

	(void)state;
	fault_memory(1, false);
	p = get_some(10);
	assert_non_null(p);
	free(p);
	assert_null(get_some(10));
	p = get_zeroes(1, 10);
	assert_non_null(p);
	free(p);
	assert_int_equal(fault_memory(UINT64_MAX, false), 3);
}

static void put_second(void *ctx)
{
	put(ctx, 1, 2);
}

/* Is a write lost by some cut, that came at this time of a flush? */
static bool can_be_lost(enum fault_when when)
{
	struct fault *f = fault_create(PAGES * FAULT_PAGE);
	struct fault_plan plan = {.seed = 1, .all_below = 5};
	struct seen s = {0};
	uint64_t started = 0, promised = 0;

	fault_record(f, true);
	fault_between(f, 1, when, put_second, f);
	put(f, 0, 1);
	assert_int_equal(image_flush(fault_image(f)), 0);
	/* Two calls, and the one in between. */
	assert_int_equal(fault_between(f, UINT64_MAX, when, NULL, NULL), 3);
	assert_int_equal(get(f, 1, 0), 2);
	fault_explore(f, &plan, &started, &promised, true, see, &s);
	fault_destroy(f);
	return s.masks & 1;
}

static void a_flush_covers_what_came_before_it_began(void **state)
{
	(void)state;
	assert_false(can_be_lost(FAULT_BEFORE));
	assert_true(can_be_lost(FAULT_DURING));
	assert_true(can_be_lost(FAULT_AFTER));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_subset_between_two_flushes_is_tried),
		cmocka_unit_test(a_log_is_explored_piece_by_piece),
		cmocka_unit_test(a_lying_flush_keeps_nothing),
		cmocka_unit_test(a_fork_shares_and_does_not_touch),
		cmocka_unit_test(calls_fail_when_told),
		cmocka_unit_test(a_failed_flush_gives_up_what_came_before),
		cmocka_unit_test(memory_fails_when_told),
		cmocka_unit_test(a_flush_covers_what_came_before_it_began),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
