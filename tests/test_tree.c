/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The trees against a shadow: a long seeded walk of puts and deletes through
 * transactions, with commits, checkpoints, closings and power cuts between,
 * a cache that is too small, and the whole table compared again and again.
 */
#include "meta/meta_priv.h"
#include "tests/fault.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <cmocka.h>

#define KEYS 6000

struct shadow {
	struct key key[KEYS];
	uint8_t val[KEYS][VALUE_MAX];
	int len[KEYS];			/* -1: absent */
};

static uint64_t rng;

static uint64_t rnd(void)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return rng;
}

static void keys_make(struct shadow *s)
{
	char name[256];

	for (unsigned i = 0; i < KEYS; i++) {
		unsigned len = i % 7 == 0 ? 200 + (unsigned)(rnd() % 50)
					  : 3 + (unsigned)(rnd() % 20);

		snprintf(name, sizeof(name), "%05u", i);
		for (unsigned j = 5; j < len; j++)
			name[j] = (char)('a' + j % 26);
		key_file_bytes(&s->key[i], 1000 + i / 50, KEY_XATTR, name,
			       len > 5 ? len : 5);
		s->len[i] = -1;
	}
}

static void fill(struct shadow *s, unsigned i, unsigned len)
{
	for (unsigned j = 0; j < len; j++)
		s->val[i][j] = (uint8_t)rnd();
	s->len[i] = (int)len;
}

struct compare {
	struct shadow *s;
	unsigned next;
};

static int compare_item(void *ctx, const uint8_t *key, size_t klen,
			const uint8_t *val, size_t vlen)
{
	struct compare *c = ctx;

	while (c->next < KEYS && c->s->len[c->next] < 0)
		c->next++;
	if (c->next == KEYS || klen != c->s->key[c->next].len ||
	    memcmp(key, c->s->key[c->next].b, klen) ||
	    (int)vlen != c->s->len[c->next] ||
	    memcmp(val, c->s->val[c->next], vlen))
		return 1;
	c->next++;
	return 0;
}

static void compare_all(struct volume *v, struct shadow *s)
{
	struct compare c = {s, 0};
	struct key lo, hi;

	key_file(&lo, 1000, 0);
	key_file(&hi, UINT64_MAX, 0);
	assert_int_equal(tree_range(v, TABLE_FILES, &lo, &hi, compare_item, &c), 0);
	while (c.next < KEYS && s->len[c.next] < 0)
		c.next++;
	assert_int_equal(c.next, KEYS);
}

static struct volume *open_again(struct fault *f)
{
	struct volume_options opt = {.no_threads = true, .cache_bytes = 1 << 20};
	struct volume *v;
	char msg[256];
	int r = volume_open(fault_image(f), &opt, &v, msg, sizeof(msg));

	if (r)
		print_error("volume_open: %d %s\n", r, msg);
	assert_int_equal(r, 0);
	return v;
}

static void step(struct volume *v, struct shadow *s, unsigned bias)
{
	unsigned n = 1 + (unsigned)(rnd() % 8);
	struct txn *t;

	assert_int_equal(txn_begin(v, TXN_NORMAL, &t), 0);
	for (unsigned j = 0; j < n; j++) {
		unsigned i = (unsigned)(rnd() % KEYS);

		if (rnd() % 100 < bias) {
			fill(s, i, (unsigned)(rnd() % (i % 11 ? 64 : VALUE_MAX)));
			assert_int_equal(txn_put(t, TABLE_FILES, &s->key[i],
						 s->val[i], (size_t)s->len[i]),
					 0);
		} else {
			s->len[i] = -1;
			assert_int_equal(txn_del(t, TABLE_FILES, &s->key[i]), 0);
		}
	}
	assert_int_equal(txn_commit(t), 0);
}

/* A stretch of keys goes at once, so that whole leaves do, first ones too. */
static void stretch_del(struct volume *v, struct shadow *s)
{
	unsigned from = (unsigned)(rnd() % KEYS), n = (unsigned)(rnd() % 200);
	struct txn *t;

	assert_int_equal(txn_begin(v, TXN_FREEING, &t), 0);
	for (unsigned i = from; i < KEYS && i < from + n; i++) {
		s->len[i] = -1;
		assert_int_equal(txn_del(t, TABLE_FILES, &s->key[i]), 0);
	}
	assert_int_equal(txn_commit(t), 0);
}

static void a_walk_equals_its_shadow(void **state)
{
	static struct shadow s;
	struct volume_geometry g = {.bytes = 32 << 20, .journal_bytes = 1 << 20};
	struct fault *f = fault_create(g.bytes);
	struct volume *v;
	char msg[256];

	(void)state;
	rng = getenv("SEED") ? strtoull(getenv("SEED"), NULL, 0) : 88172645463325252ull;
	keys_make(&s);
	assert_int_equal(volume_geometry_check(&g, msg, sizeof(msg)), 0);
	assert_int_equal(volume_format(fault_image(f), &g), 0);
	v = open_again(f);
	for (unsigned i = 0; i < 60000; i++) {
		step(v, &s, i / 10000 % 2 ? 30 : 75);
		if (rnd() % 50 == 0)
			stretch_del(v, &s);
		if (rnd() % 997 == 0)
			assert_int_equal(volume_checkpoint(v), 0);
		if (rnd() % 499 == 0)
			assert_int_equal(volume_sync(v), 0);
		if (rnd() % 503 == 0)
			compare_all(v, &s);
		if (rnd() % 2003 == 0) {
			compare_all(v, &s);
			assert_int_equal(volume_close(v), 0);
			v = open_again(f);
		}
		if (rnd() % 2003 == 0) {
			assert_int_equal(volume_sync(v), 0);
			volume_abandon(v);
			v = open_again(f);
			compare_all(v, &s);
		}
	}
	compare_all(v, &s);
	/* And when all is gone, so are the nodes. */
	for (unsigned i = 0; i < KEYS; i++) {
		struct txn *t;

		assert_int_equal(txn_begin(v, TXN_NORMAL, &t), 0);
		assert_int_equal(txn_del(t, TABLE_FILES, &s.key[i]), 0);
		assert_int_equal(txn_commit(t), 0);
		s.len[i] = -1;
	}
	compare_all(v, &s);
	assert_true(v->trees[TABLE_FILES].nodes <= 3);
	assert_int_equal(v->trees[TABLE_FILES].items, 1);
	assert_int_equal(volume_close(v), 0);
	fault_destroy(f);
}

/* The keys of the third leaf. */
struct third {
	unsigned leaf, count;
	struct key key[400];
};

static int third_node(void *ctx, enum table t, unsigned level, uint64_t block)
{
	struct third *c = ctx;

	(void)t, (void)block;
	c->leaf += level == 0;
	return c->leaf > 3;
}

static int third_item(void *ctx, enum table t, const uint8_t *key, size_t klen,
		      const uint8_t *val, size_t vlen)
{
	struct third *c = ctx;

	(void)t, (void)val, (void)vlen;
	if (c->leaf == 3) {
		assert_in_range(c->count, 0, 399);
		memcpy(c->key[c->count].b, key, klen);
		c->key[c->count++].len = (uint16_t)klen;
	}
	return 0;
}

static void change(struct volume *v, const struct key *del, const struct key *put)
{
	struct txn *t;

	assert_int_equal(txn_begin(v, TXN_NORMAL, &t), 0);
	assert_int_equal(txn_del(t, TABLE_FILES, del), 0);
	if (put)
		assert_int_equal(txn_put(t, TABLE_FILES, put, "again", 5), 0);
	assert_int_equal(txn_commit(t), 0);
}

/* The neighbours are not in memory, where the second item would go. */
static void a_leaf_that_empties_takes_the_next_item_of_the_same_change(void **state)
{
	static struct shadow s;
	static struct third c;
	struct walk w = {.ctx = &c, .node = third_node, .item = third_item};
	struct volume_geometry g = {.bytes = 32 << 20, .journal_bytes = 1 << 20};
	struct fault *f = fault_create(g.bytes);
	struct volume *v;
	struct txn *t;
	char msg[256];
	uint8_t val[8];
	size_t vlen;

	(void)state;
	rng = 88172645463325252ull;
	keys_make(&s);
	assert_int_equal(volume_geometry_check(&g, msg, sizeof(msg)), 0);
	assert_int_equal(volume_format(fault_image(f), &g), 0);
	v = open_again(f);
	for (unsigned i = 0; i < KEYS; i++) {
		assert_int_equal(txn_begin(v, TXN_NORMAL, &t), 0);
		assert_int_equal(txn_put(t, TABLE_FILES, &s.key[i], "first", 5), 0);
		assert_int_equal(txn_commit(t), 0);
	}
	assert_int_equal(volume_close(v), 0);
	v = open_again(f);
	assert_int_equal(volume_walk(v, TABLE_FILES, &w), 1);
	assert_int_equal(volume_close(v), 0);

	v = open_again(f);
	for (unsigned i = 0; i + 1 < c.count; i++)
		change(v, &c.key[i], NULL);
	change(v, &c.key[c.count - 1], &c.key[0]);
	assert_int_equal(tree_lookup(v, TABLE_FILES, c.key[0].b, c.key[0].len, val,
				     sizeof(val), &vlen), 0);
	assert_int_equal(vlen, 5);
	assert_memory_equal(val, "again", 5);
	/* Nothing takes its place: it goes. */
	change(v, &c.key[0], &s.key[0]);
	assert_int_equal(tree_lookup(v, TABLE_FILES, c.key[0].b, c.key[0].len, val,
				     sizeof(val), &vlen), -ENOENT);
	assert_int_equal(v->trees[TABLE_FILES].items, KEYS - c.count + 1);
	assert_int_equal(volume_close(v), 0);
	fault_destroy(f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_leaf_that_empties_takes_the_next_item_of_the_same_change),
		cmocka_unit_test(a_walk_equals_its_shadow),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
