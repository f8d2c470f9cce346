/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Chunks: every question asked of a chunk, in each of its forms, against an
 * array of bytes; and the table of chunks.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "alloc/bitmap.h"

static uint64_t seed = 1;

static uint32_t below(uint32_t n)
{
	uint64_t z = (seed += 0x9e3779b97f4a7c15ull);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	return (uint32_t)((z ^ (z >> 31)) % n);
}

static unsigned char used[ALLOC_CHUNK], pending[ALLOC_CHUNK];

static bool all(const unsigned char *map, uint32_t off, uint32_t len,
		unsigned char what)
{
	for (uint32_t i = off; i < off + len; i++)
		if (map[i] != what)
			return false;
	return true;
}

static void ask(struct chunk *c)
{
	uint32_t off = below(c->units), len = 1 + below(c->units - off);
	uint32_t max = 1 + below(200), n, at, got;

	len = below(2) ? len : 1 + below(len < 70 ? len : 70);
	assert_int_equal(chunk_all_free(c, off, len), all(used, off, len, 0));
	assert_int_equal(chunk_all_used(c, off, len),
			 all(used, off, len, 1) && all(pending, off, len, 0));
	assert_int_equal(chunk_all_pending(c, off, len),
			 all(pending, off, len, 1));
	assert_int_equal(chunk_any_pending(c, off, len),
			 !all(pending, off, len, 0));
	for (unsigned what = 0; what < 2; what++) {
		struct around r;
		bool alike = chunk_around(c, off, len, what, c->units, &r);

		assert_int_equal(alike, all(used, off, len, (unsigned char)what));
		if (!alike)
			continue;
		assert_int_equal(r.before, chunk_free_before(c, off, off));
		assert_int_equal(r.after,
				 chunk_free_after(c, off + len, c->units));
	}
	for (n = 0; n < max && off + n < c->units && !used[off + n]; n++)
		;
	assert_int_equal(chunk_free_after(c, off, max), n);
	for (n = 0; n < max && n < off && !used[off - n - 1]; n++)
		;
	assert_int_equal(chunk_free_before(c, off, max), n);
	for (n = off; n < c->units && used[n]; n++)
		;
	got = chunk_next_run(c, off, &at);
	if (n == c->units) {
		assert_int_equal(got, 0);
	} else {
		assert_int_equal(at, n);
		while (n < c->units && !used[n])
			n++;
		assert_int_equal(at + got, n);
	}
	/* The first fit from `off` on, or the first before. */
	len = 1 + below(below(2) ? 10 : 500);
	for (n = off; n + len <= c->units && !all(used, n, len, 0); n++)
		;
	if (n + len > c->units)
		for (n = 0; n < off && !(n + len <= c->units &&
					 all(used, n, len, 0)); n++)
			;
	if (chunk_find(c, off, len, &at))
		assert_int_equal(at, n);
	else
		assert_true(n == off || n + len > c->units ||
			    !all(used, n, len, 0));
}

static void change(struct chunks *t, struct chunk *c, uint32_t longest)
{
	uint32_t off = below(c->units), n = 1;
	uint32_t len = longest > ALLOC_CHUNK ? longest : 1 + below(longest);

	/* A whole run, so that there are fewer of them. */
	while (longest > ALLOC_CHUNK && off && used[off - 1] == used[off] &&
	       pending[off - 1] == pending[off])
		off--;
	len = len < c->units - off ? len : c->units - off;
	while (n < len && used[off + n] == used[off] &&
	       pending[off + n] == pending[off])
		n++;
	assert_int_equal(chunk_prepare(t, c), 0);
	if (!used[off]) {
		chunk_mark_used(t, c, off, n);
		memset(used + off, 1, n);
	} else if (pending[off]) {
		chunk_clear_pending(t, c, off, n);
		memset(pending + off, 0, n);
	} else if (below(4) == 0) {
		assert_int_equal(chunk_prepare_pending(t, c), 0);
		chunk_mark_pending(c, off, n);
		memset(pending + off, 1, n);
	} else {
		chunk_mark_free(t, c, off, n);
		memset(used + off, 0, n);
	}
}

static void check_counts(const struct chunk *c)
{
	uint32_t free = 0, waiting = 0, edges = 0;
	unsigned char last = 0;

	for (uint32_t i = 0; i < ALLOC_CHUNK; i++) {
		unsigned char now = i < c->units ? used[i] : 1;

		free += !now;
		waiting += pending[i];
		edges += now != last;
		last = now;
	}
	assert_int_equal(c->free, free);
	assert_int_equal(c->pending_units, waiting);
	assert_int_equal(c->edges, edges);
}

static void a_chunk_is_what_an_array_would_be(void **state)
{
	unsigned forms[3] = { 0, 0, 0 };

	(void)state;
	for (unsigned round = 0; round < 8; round++) {
		uint64_t units = round % 2 ? ALLOC_CHUNK : 100 + below(30000);
		struct chunks t;
		struct chunk *c;

		memset(used, 0, sizeof(used));
		memset(pending, 0, sizeof(pending));
		assert_int_equal(chunks_init(&t, units), 0);
		assert_int_equal(chunks_describe(&t, 0, 1, true), 0);
		c = chunks_get(&t, 0);
		assert_non_null(c);
		for (unsigned i = 0; i < 6000; i++) {
			change(&t, c, i % 1000 < 500 ? 60000 : 40);
			if (i % 4 == 0)
				ask(c);
			if (i % 64 == 0)
				check_counts(c);
			forms[c->form]++;
		}
		chunks_fini(&t);
	}
	for (unsigned i = 0; i < 3; i++)
		assert_true(forms[i] > 1000);
}

static void a_window_hides_its_units(void **state)
{
	struct chunks t;
	struct chunk *c;

	(void)state;
	assert_int_equal(chunks_init(&t, ALLOC_CHUNK), 0);
	assert_int_equal(chunks_describe(&t, 0, 1, true), 0);
	c = chunks_get(&t, 0);
	c->win_lo = 100;
	c->win_hi = 200;
	assert_int_equal(chunk_free_after(c, 90, 65), 10);
	assert_int_equal(chunk_free_after(c, 100, 65), 0);
	assert_int_equal(chunk_free_after(c, 150, 65), 0);
	assert_int_equal(chunk_free_after(c, 200, 65), 65);
	assert_int_equal(chunk_free_before(c, 100, 65), 65);
	assert_int_equal(chunk_free_before(c, 101, 65), 0);
	assert_int_equal(chunk_free_before(c, 200, 65), 0);
	assert_int_equal(chunk_free_before(c, 210, 65), 10);
	chunks_fini(&t);
}

static void what_is_adopted_is_what_was_given(void **state)
{
	(void)state;
	for (unsigned round = 0; round < 40; round++) {
		uint64_t units = round % 2 ? ALLOC_CHUNK : 1 + below(ALLOC_CHUNK);
		struct chunks t;
		struct chunk *c;
		uint64_t *bits;

		memset(pending, 0, sizeof(pending));
		assert_int_equal(chunks_init(&t, units), 0);
		c = chunks_get(&t, 0);
		bits = pool_get(&t.maps);
		memset(bits, 0, ALLOC_CHUNK_BYTES);
		for (uint32_t i = 0, n = 0; i < ALLOC_CHUNK; i++, n--) {
			if (!n)
				n = 1 + below(1 + 100 * round);
			used[i] = n % 7 < 3;
			bits[i / 64] |= (uint64_t)used[i] << i % 64;
		}
		chunk_adopt(&t, c, bits);
		check_counts(c);
		for (unsigned i = 0; i < 200; i++)
			ask(c);
		chunks_fini(&t);
	}
}

static void a_chunk_gets_what_was_said_of_it(void **state)
{
	struct chunks t;

	(void)state;
	assert_int_equal(chunks_init(&t, 1000 * (uint64_t)ALLOC_CHUNK + 9), 0);
	assert_int_equal(chunks_describe(&t, 0, 10, true), 0);
	assert_int_equal(chunks_describe(&t, 10, 90, false), 0);
	assert_int_equal(chunks_get(&t, 5)->free, ALLOC_CHUNK);
	assert_int_equal(chunks_get(&t, 50)->free, 0);
	assert_int_equal(chunks_get(&t, 110)->state, CHUNK_UNKNOWN);
	assert_int_equal(chunks_describe(&t, 100, 901, true), 0);
	assert_int_equal(chunks_get(&t, 110)->state, CHUNK_READY);
	assert_int_equal(chunks_get(&t, 1000)->free, 9);
	assert_null(chunks_peek(&t, 500));
	assert_int_equal(chunks_next(&t, 200, 1001), 960);
	chunks_fini(&t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_chunk_is_what_an_array_would_be),
		cmocka_unit_test(a_window_hides_its_units),
		cmocka_unit_test(what_is_adopted_is_what_was_given),
		cmocka_unit_test(a_chunk_gets_what_was_said_of_it),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
