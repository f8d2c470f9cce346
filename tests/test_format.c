/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Nothing is believed before its bounds hold: each field of a superblock, a
 * node and a journal group that makes no sense, under a checksum that matches,
 * is refused, and by name where somebody is told.
 */
#include "meta/meta_priv.h"
#include "tests/fault.h"
#include "tests/group.h"

#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <cmocka.h>

#define BYTES (2u << 20)
#define BLOCK 4096u

static struct fault *formatted(uint64_t bytes)
{
	struct volume_geometry g = {.bytes = bytes};
	struct fault *f = fault_create(bytes);

	assert_int_equal(volume_format(fault_image(f), &g), 0);
	return f;
}

/* ---- superblocks --------------------------------------------------------------- */

static void a_superblock_out_of_bounds_is_refused_by_name(void **state)
{
	static const struct {
		size_t at;
		unsigned bytes;
		uint64_t value;
		int err;
		const char *why;
	} bad[] = {
#define AT(field) offsetof(struct disk_super, field)
		{AT(magic), 8, 7, EINVAL, "not a Spaceweave volume"},
		{AT(version), 4, 99, EPROTONOSUPPORT, "unknown version"},
		{AT(incompat), 8, 1, EPROTONOSUPPORT, "unknown incompatible feature"},
		{AT(slot), 4, 1, EFSCORRUPTED, "belongs to another place"},
		{AT(block_shift), 4, 11, EFSCORRUPTED, "block size out of range"},
		{AT(block_shift), 4, 17, EFSCORRUPTED, "block size out of range"},
		{AT(blocks), 8, 10, EFSCORRUPTED, "volume size out of range"},
		{AT(blocks), 8, 1ull << 39, EFSCORRUPTED, "volume size out of range"},
		{AT(journal_units), 8, 47, EFSCORRUPTED, "journal out of range"},
		{AT(journal_units), 8, BYTES, EFSCORRUPTED, "journal out of range"},
		{AT(journal_block), 8, 31, EFSCORRUPTED, "journal out of range"},
		{AT(journal_block), 8, BYTES / BLOCK - 20, EFSCORRUPTED,
		 "journal out of range"},
		{AT(next_ino), 8, FIRST_INO - 1, EFSCORRUPTED,
		 "next inode number out of range"},
		{AT(next_ino), 8, INO_MAX + 2, EFSCORRUPTED,
		 "next inode number out of range"},
		{AT(free_blks), 8, BYTES / BLOCK + 1, EFSCORRUPTED,
		 "free count exceeds the volume"},
		{AT(root[1].ptr.block), 8, BYTES / BLOCK, EFSCORRUPTED,
		 "root out of range"},
		{AT(root[2].level), 4, TREE_LEVELS, EFSCORRUPTED, "root out of range"},
#undef AT
	};
	struct fault *f = formatted(BYTES);
	struct image *im = fault_image(f);
	struct volume_options opt = {.no_threads = true};
	struct disk_super good, s, zero = {0};
	struct volume *v;
	char msg[200], want[100];

	(void)state;
	assert_int_equal(image_pread(im, &good, sizeof(good), 0), 0);
	fault_poke(f, &zero, sizeof(zero), SUPER_SLOT_OFFSET(1));
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		le64 value = put64(bad[i].value);

		s = good;
		memcpy((char *)&s + bad[i].at, &value, bad[i].bytes);
		s.csum = put64(checksum(&s, offsetof(struct disk_super, csum)));
		fault_poke(f, &s, sizeof(s), 0);
		assert_int_equal(volume_open(im, &opt, &v, msg, sizeof(msg)),
				 -bad[i].err);
		snprintf(want, sizeof(want), "superblock: %s", bad[i].why);
		assert_string_equal(msg, i ? want : bad[i].why);
	}
	s = good;
	s.label[3] ^= 1;
	fault_poke(f, &s, sizeof(s), 0);
	assert_int_equal(volume_open(im, &opt, &v, msg, sizeof(msg)), -EFSBADCRC);
	assert_string_equal(msg, "superblock: checksum does not match");
	/* A ring that ends within a block of 8 KiB. */
	s = good;
	s.block_shift = put32(13);
	s.blocks = put64(BYTES >> 13);
	s.free_blks = put64(0);
	s.journal_units = put64(get64(s.journal_units) | 1);
	super_seal(&s, 0);
	fault_poke(f, &s, sizeof(s), 0);
	assert_int_equal(volume_open(im, &opt, &v, msg, sizeof(msg)), -EFSCORRUPTED);
	assert_string_equal(msg, "superblock: journal out of range");
	fault_destroy(f);
}

/* A ring is read whole, so one that is too long for that is refused first. */
static void a_journal_too_long_is_refused(void **state)
{
	struct fault *f = formatted(BYTES);
	struct volume_options opt = {.no_threads = true, .readonly = true};
	struct disk_super s;
	struct volume *v;
	const char *why;
	char msg[200];

	(void)state;
	fault_peek(f, &s, sizeof(s), 0);
	s.blocks = put64(1ull << 30);
	s.journal_units = put64(JOURNAL_MAX_UNITS);
	super_seal(&s, 0);
	assert_int_equal(super_verify(&s, 0, &why), 0);
	for (unsigned n = 0; n < 2; n++) {
		s.journal_units = put64(n ? 64 * JOURNAL_MAX_UNITS : JOURNAL_MAX_UNITS + 1);
		for (unsigned i = 0; i < SUPER_SLOTS; i++) {
			super_seal(&s, i);
			fault_poke(f, &s, sizeof(s), SUPER_SLOT_OFFSET(i));
		}
		assert_int_equal(super_verify(&s, 1, &why), -EFSCORRUPTED);
		assert_int_equal(volume_open(fault_image(f), &opt, &v, msg, sizeof(msg)),
				 -EFSCORRUPTED);
		assert_string_equal(msg, "superblock: journal out of range");
	}
	fault_destroy(f);
}

/* A reader that knows less than the writer may look, and no more. */
static void an_unknown_feature_allows_looking_alone(void **state)
{
	struct fault *f = formatted(BYTES);
	struct image *im = fault_image(f);
	struct volume_options opt = {.no_threads = true};
	struct disk_super s;
	struct volume *v;
	char msg[200];

	(void)state;
	for (unsigned i = 0; i < SUPER_SLOTS; i++) {
		fault_peek(f, &s, sizeof(s), SUPER_SLOT_OFFSET(i));
		s.ro_compat = put64(4);
		super_seal(&s, i);
		fault_poke(f, &s, sizeof(s), SUPER_SLOT_OFFSET(i));
	}
	assert_int_equal(volume_open(im, &opt, &v, msg, sizeof(msg)), -EPROTONOSUPPORT);
	assert_string_equal(msg, "an unknown feature allows read-only mounts alone");
	opt.readonly = true;
	fault_freeze(f, true);
	assert_int_equal(volume_open(im, &opt, &v, msg, sizeof(msg)), 0);
	assert_int_equal(volume_close(v), 0);
	fault_destroy(f);
}

static void an_image_that_ends_too_soon_is_refused(void **state)
{
	struct volume_options opt = {.no_threads = true};
	struct fault *f = formatted(BYTES);
	struct image *im = fault_image(f);
	struct volume *v;
	char msg[200];

	(void)state;
	im->bytes = BYTES - 1;
	assert_int_equal(volume_open(im, &opt, &v, msg, sizeof(msg)), -EFSCORRUPTED);
	assert_string_equal(msg, "the image was cut short: 2097151 bytes of 2097152");
	im->bytes = 4000;
	assert_int_equal(volume_open(im, &opt, &v, msg, sizeof(msg)), -EINVAL);
	assert_string_equal(msg, "not a Spaceweave volume");
	im->bytes = BYTES;
	fault_destroy(f);
}

static void a_geometry_out_of_bounds_is_refused_by_name(void **state)
{
	static const struct {
		struct volume_geometry g;
		const char *why;
	} bad[] = {
		{{.bytes = BYTES, .block_shift = 11},
		 "block size 2^11 is not one of 4 KiB .. 64 KiB"},
		{{.bytes = BYTES, .block_shift = 17},
		 "block size 2^17 is not one of 4 KiB .. 64 KiB"},
		{{.bytes = (1u << 20) - 1},
		 "size 1044480 is not between 1048576 (1 MiB) and 1125899906842624 "
		 "(1 PiB) bytes"},
		{{.bytes = (1ull << 50) + BLOCK},
		 "size 1125899906846720 is not between 1048576 (1 MiB) and "
		 "1125899906842624 (1 PiB) bytes"},
		{{.bytes = BYTES, .journal_bytes = 1},
		 "journal size 4096 is not between 196608 and 1048576 bytes"},
		{{.bytes = 1ull << 40, .journal_bytes = (1ull << 30) + 1},
		 "journal size 1073745920 is not between 1417216 and 1073741824 bytes"},
		{{.bytes = 1ull << 40, .journal_bytes = 1u << 20},
		 "journal size 1048576 is not between 1417216 and 1073741824 bytes"},
		{{.bytes = 1ull << 50, .journal_bytes = 1u << 20},
		 "journal size 1048576 is not between 33554432 and 1073741824 bytes"},
	};
	struct volume_geometry g;
	char msg[200];

	(void)state;
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		struct fault *f = fault_create(BYTES);

		g = bad[i].g;
		assert_int_equal(volume_geometry_check(&g, msg, sizeof(msg)), -EINVAL);
		assert_string_equal(msg, bad[i].why);
		fault_freeze(f, true);
		assert_int_equal(volume_format(fault_image(f), &bad[i].g), -EINVAL);
		assert_int_equal(fault_count(f, FAULT_WRITE), 0);
		fault_destroy(f);
	}
}

/* ---- nodes ------------------------------------------------------------------------ */

static uint8_t block[BLOCK];
static struct disk_node *const node = (void *)block;
static const struct ptr self = {40, 1234, 5};

static uint8_t *item_at(unsigned i)
{
	return block + get16(((le16 *)(node + 1))[i]);
}

/* A leaf of three items with keys a, b, c and values of 24 bytes. */
static void node_make(unsigned level)
{
	unsigned heap = BLOCK;

	memset(block, 0, BLOCK);
	*node = (struct disk_node){.magic = put32(NODE_MAGIC),
				   .level = (uint8_t)level,
				   .table = TABLE_FILES,
				   .count = put16(3),
				   .self = ptr_put(&self)};
	for (unsigned i = 0; i < 3; i++) {
		struct disk_item it = {put16(1), put16(sizeof(struct disk_ptr))};

		heap -= (unsigned)sizeof(it) + 1 + (unsigned)sizeof(struct disk_ptr);
		memcpy(block + heap, &it, sizeof(it));
		block[heap + sizeof(it)] = (uint8_t)('a' + i);
		((le16 *)(node + 1))[i] = put16((uint16_t)heap);
	}
	node->heap = put16((uint16_t)heap);
	node_seal(node, BLOCK);
}

static void refused(unsigned level, int err, const char *want)
{
	const char *why = "nothing";

	node_seal(node, BLOCK);
	assert_int_equal(node_verify(node, BLOCK, TABLE_FILES, level, &self, &why),
			 -err);
	assert_string_equal(why, want);
	/* who asks for no reason gets the same answer */
	assert_int_equal(node_verify(node, BLOCK, TABLE_FILES, level, &self, NULL),
			 -err);
}

static void a_node_out_of_bounds_is_refused_by_name(void **state)
{
	const char *why = "nothing";
	le16 *slots = (le16 *)(node + 1);
	struct disk_item it;

	(void)state;
	for (unsigned level = 0; level < 2; level++) {
		node_make(level);
		assert_int_equal(node_verify(node, BLOCK, TABLE_FILES, level, &self,
					     NULL), 0);
	}
	block[3000] ^= 1;
	assert_int_equal(node_verify(node, BLOCK, TABLE_FILES, 1, &self, &why),
			 -EFSBADCRC);
	assert_string_equal(why, "checksum does not match");
	node_make(0), node->magic = put32(7);
	refused(0, EFSBADCRC, "no node");
	node_make(0), node->self.block = put64(41);
	refused(0, EFSCORRUPTED, "another node, or an older one");
	node_make(0), node->self.stamp = put64(1235);
	refused(0, EFSCORRUPTED, "another node, or an older one");
	node_make(0), node->self.birth = put64(4);
	refused(0, EFSCORRUPTED, "another node, or an older one");
	node_make(0), node->table = TABLE_REFS;
	refused(0, EFSCORRUPTED, "wrong table or level");
	node_make(1);
	refused(0, EFSCORRUPTED, "wrong table or level");
	node_make(0), node->heap = put16(BLOCK + 1);
	refused(0, EFSCORRUPTED, "header out of bounds");
	node_make(0), node->heap = put16(0);		/* 65536 */
	refused(0, EFSCORRUPTED, "header out of bounds");
	node_make(0), node->count = put16(BLOCK);
	refused(0, EFSCORRUPTED, "header out of bounds");
	node_make(1), node->count = put16(0);
	refused(1, EFSCORRUPTED, "empty");
	node_make(0), slots[1] = put16(200);
	refused(0, EFSCORRUPTED, "item out of bounds");
	node_make(0), slots[1] = put16(BLOCK - 2);
	refused(0, EFSCORRUPTED, "item out of bounds");
	for (unsigned i = 0; i < 3; i++) {
		node_make(0);
		memcpy(&it, item_at(0), sizeof(it));
		if (i == 0)
			it.klen = put16(KEY_MAX + 1);
		else if (i == 1)
			it.vlen = put16(VALUE_MAX + 1);
		else
			it.vlen = put16(sizeof(struct disk_ptr) + 1);
		memcpy(item_at(0), &it, sizeof(it));
		refused(0, EFSCORRUPTED, "item too long");
	}
	node_make(1);
	memcpy(&it, item_at(2), sizeof(it));
	it.vlen = put16(8);
	memcpy(item_at(2), &it, sizeof(it));
	refused(1, EFSCORRUPTED, "bad pointer");
	node_make(0), item_at(1)[sizeof(it)] = 'z';
	refused(0, EFSCORRUPTED, "keys out of order");
	node_make(0), item_at(1)[sizeof(it)] = 'a';
	refused(0, EFSCORRUPTED, "keys out of order");
	node_make(0), node->garbage = put16(1);
	refused(0, EFSCORRUPTED, "items overlap");
}

/* ---- groups ------------------------------------------------------------------------ */

static int look(struct fault *f, uint64_t *groups, char *msg, size_t len)
{
	struct volume_options opt = {.readonly = true, .no_threads = true};
	struct volume_stat st;
	struct volume *v;
	int r;

	fault_freeze(f, true);
	r = volume_open(fault_image(f), &opt, &v, msg, len);
	if (r)
		return r;
	volume_stat(v, &st);
	*groups = st.replayed_groups;
	return volume_close(v);
}

/*
 * A group that makes no sense ends the volume's history, like a torn one, if
 * nobody was told that it is durable; else it is damage.
 */
static void a_group_that_makes_no_sense_is_not_replayed(void **state)
{
	struct fault *base = formatted(BYTES), *f = fault_create_over(base);
	uint64_t before, groups;
	char msg[200];

	(void)state;
	assert_int_equal(look(f, &before, msg, sizeof(msg)), 0);
	for (size_t i = 0; i < GROUP_ITEMS; i++)
		for (unsigned durable = 0; durable < 2; durable++) {
			int r;

			print_message("%s%s\n", group_items[i].name,
				      durable ? ", durable" : "");
			fault_fork(f, base);
			group_append(f, &group_items[i], durable, 0, 1);
			r = look(f, &groups, msg, sizeof(msg));
			if (group_items[i].wrong && durable) {
				assert_int_equal(r, -EFSCORRUPTED);
				assert_non_null(strstr(msg, "which was durable, is "
						       "damaged"));
				continue;
			}
			assert_int_equal(r, 0);
			assert_int_equal(groups, before + !group_items[i].wrong);
		}
	/* bytes left over, and an item too many */
	fault_fork(f, base);
	group_append(f, &group_items[0], true, 1, 1);
	assert_int_equal(look(f, &groups, msg, sizeof(msg)), -EFSCORRUPTED);
	fault_fork(f, base);
	group_append(f, &group_items[0], true, 0, 2);
	assert_int_equal(look(f, &groups, msg, sizeof(msg)), -EFSCORRUPTED);
	fault_fork(f, base);
	group_append(f, &group_items[0], false, 0, 0);
	assert_int_equal(look(f, &groups, msg, sizeof(msg)), 0);
	assert_int_equal(groups, before);
	/* one block's contents twice in a row */
	fault_fork(f, base);
	group_append(f, &group_items[3], true, 0, 1);
	group_append(f, &group_items[3], true, 0, 1);
	assert_int_equal(look(f, &groups, msg, sizeof(msg)), -EFSCORRUPTED);
	fault_destroy(f);
	fault_destroy(base);
}

static char told[1000];

static void note(void *ctx, const char *text)
{
	(void)ctx;
	snprintf(told + strlen(told), sizeof(told) - strlen(told), "%s\n", text);
}

/*
 * What the journal takes and frees has to fit the bitmaps. Where it does not, the
 * volume does not open for writing, says so, and its superblocks stay.
 */
static void a_journal_at_odds_with_the_bitmaps_is_damage(void **state)
{
	static const struct {
		struct group_item it;
		const char *what;
	} odd[] = {
		{{"frees what is free", JITEM_FREE, 0, 16, 0, {300, 2}, NULL, 0},
		 "journal: blocks 300+2 are freed but not in use"},
		{{"takes what is taken", JITEM_TAKE, 0, 16, 0, {5, 1}, NULL, 0},
		 "bitmap 0: blocks 5+1 are taken but in use"},
		{{"takes more than is free", JITEM_TAKE, 0, 16, 0, {1, 511}, NULL, 0}, ""},
	};
	struct fault *base = formatted(BYTES), *f = fault_create_over(base);
	struct volume_options opt = {.no_threads = true, .message = note};
	struct disk_super before[2], after[2];
	struct volume *v;
	char msg[200];

	(void)state;
	for (size_t i = 0; i < sizeof(odd) / sizeof(odd[0]); i++) {
		fault_fork(f, base);
		group_append(f, &odd[i].it, true, 0, 1);
		for (unsigned s = 0; s < 2; s++)
			fault_peek(f, &before[s], sizeof(before[s]), SUPER_SLOT_OFFSET(s));
		told[0] = 0;
		assert_int_equal(volume_open(fault_image(f), &opt, &v, msg, sizeof(msg)),
				 -EFSCORRUPTED);
		if (!strstr(told, odd[i].what) && !strstr(msg, odd[i].what))
			fail_msg("%s: '%s' '%s'", odd[i].it.name, told, msg);
		for (unsigned s = 0; s < 2; s++)
			fault_peek(f, &after[s], sizeof(after[s]), SUPER_SLOT_OFFSET(s));
		assert_memory_equal(before, after, sizeof(before));
	}
	fault_destroy(f);
	fault_destroy(base);
}

/* A ring's newest groups may know of a checkpoint whose superblock is lost. */
static void an_older_superblock_than_the_journal_is_refused(void **state)
{
	struct fault *f = formatted(BYTES);
	struct volume_options opt = {.no_threads = true};
	struct disk_super s, none = {0};
	struct volume *v;
	struct txn *t;
	struct key k;
	unsigned newest;
	char msg[200];

	(void)state;
	assert_int_equal(volume_open(fault_image(f), &opt, &v, msg, sizeof(msg)), 0);
	key_refs(&k, KEY_ORPHAN, 999);
	assert_int_equal(txn_begin(v, TXN_NORMAL, &t), 0);
	assert_int_equal(txn_put(t, TABLE_REFS, &k, "", 0), 0);
	assert_int_equal(txn_commit(t), 0);
	assert_int_equal(volume_sync(v), 0);
	volume_abandon(v);
	assert_int_equal(super_load(fault_image(f), &s, &newest, msg, sizeof(msg)), 0);
	fault_poke(f, &none, sizeof(none), SUPER_SLOT_OFFSET(newest));
	opt.readonly = true;
	for (unsigned i = 0; i < 2; i++) {
		assert_int_equal(volume_open(fault_image(f), &opt, &v, msg, sizeof(msg)),
				 -EFSCORRUPTED);
		assert_non_null(strstr(msg, "is lost, only that of"));
		opt.readonly = false;
	}
	fault_destroy(f);
}

/* ---- inode numbers ------------------------------------------------------------------ */

static struct volume *opened(struct fault *f)
{
	struct volume_options opt = {.no_threads = true};
	struct volume *v;
	char msg[200];

	if (volume_open(fault_image(f), &opt, &v, msg, sizeof(msg)))
		fail_msg("%s", msg);
	return v;
}

/* A file without a name, of this mode. */
static int make_file(struct volume *v, uint32_t mode, uint64_t *ino)
{
	struct attr a = {.mode = S_IFREG | mode};
	struct inode *ip;
	struct txn *t;
	int r;

	assert_int_equal(txn_begin(v, TXN_NORMAL, &t), 0);
	r = inode_create(t, &a, &ip);
	if (r) {
		txn_abort(t);
		return r;
	}
	assert_int_equal(txn_commit(t), 0);
	*ino = ip->ino;
	rwlock_unlock(&ip->lock);
	inode_put(v, ip);
	return 0;
}

static void set_next_ino(struct fault *f, uint64_t next)
{
	struct disk_super s;

	for (unsigned i = 0; i < SUPER_SLOTS; i++) {
		fault_peek(f, &s, sizeof(s), SUPER_SLOT_OFFSET(i));
		s.next_ino = put64(next);
		super_seal(&s, i);
		fault_poke(f, &s, sizeof(s), SUPER_SLOT_OFFSET(i));
	}
}

static void a_number_in_use_is_not_given_again(void **state)
{
	struct fault *f = formatted(BYTES);
	struct volume *v = opened(f);
	uint64_t ino[8], next;
	struct inode *ip;

	(void)state;
	for (unsigned i = 0; i < 8; i++)
		assert_int_equal(make_file(v, i, &ino[i]), 0);
	assert_int_equal(volume_close(v), 0);
	set_next_ino(f, FIRST_INO);
	v = opened(f);
	assert_int_equal(make_file(v, 0777, &next), 0);
	assert_int_equal(next, ino[7] + 1);
	assert_int_equal(volume_close(v), 0);
	v = opened(f);
	for (unsigned i = 0; i < 8; i++) {
		assert_int_equal(inode_get(v, ino[i], &ip), 0);
		assert_int_equal(ip->a.mode, S_IFREG | i);
		inode_put(v, ip);
	}
	assert_int_equal(volume_close(v), 0);
	fault_destroy(f);
}

/* After the last number there is none, and the volume opens all the same. */
static void numbers_end_at_the_highest_one(void **state)
{
	struct fault *f = formatted(BYTES);
	struct volume *v;
	uint64_t ino;

	(void)state;
	set_next_ino(f, INO_MAX);
	v = opened(f);
	assert_int_equal(make_file(v, 0, &ino), 0);
	assert_int_equal(ino, INO_MAX);
	for (unsigned i = 0; i < 4; i++) {
		assert_int_equal(make_file(v, 0, &ino), -ENOSPC);
		assert_int_equal(volume_sync(v), 0);
		if (i & 1)
			assert_int_equal(volume_close(v), 0);
		else
			volume_abandon(v);
		v = opened(f);
	}
	assert_int_equal(volume_close(v), 0);
	fault_destroy(f);
}

/* ---- who holds the volume ------------------------------------------------------------ */

/* Another host, which does something while this one is in the midst of a call. */
struct other {
	struct fault *f;
	struct volume *v;
	unsigned heartbeat_s;
	uint64_t ino;
};

static void other_takes(void *ctx)
{
	struct other *o = ctx;
	struct volume_options opt = {.no_threads = true, .program = "other",
				     .heartbeat_s = o->heartbeat_s};
	char msg[200];

	if (volume_open(fault_image(o->f), &opt, &o->v, msg, sizeof(msg)))
		fail_msg("%s", msg);
	assert_int_equal(make_file(o->v, 0600, &o->ino), 0);
	assert_int_equal(volume_sync(o->v), 0);
}

/*
 * Between looking, and reading the volume, and taking it another host has taken it
 * and written: what was read is not true any more.
 */
static void a_volume_that_another_has_taken_is_not_taken(void **state)
{
	(void)state;
	for (unsigned heartbeat = 0; heartbeat < 2; heartbeat++) {
		struct fault *f = formatted(BYTES);
		struct volume_options opt = {.no_threads = true,
					     .heartbeat_s = heartbeat};
		struct other o = {.f = f, .heartbeat_s = 100 * heartbeat};
		struct volume *v;
		struct inode *ip;
		char msg[200];

		fault_between(f, 0, FAULT_BEFORE, other_takes, &o);
		assert_int_equal(volume_open(fault_image(f), &opt, &v, msg, sizeof(msg)),
				 -EBUSY);
		assert_non_null(strstr(msg, "which other on "));
		assert_non_null(o.v);
		assert_int_equal(volume_close(o.v), 0);
		fault_between(f, UINT64_MAX, FAULT_BEFORE, NULL, NULL);
		v = opened(f);
		assert_int_equal(inode_get(v, o.ino, &ip), 0);
		inode_put(v, ip);
		assert_int_equal(volume_close(v), 0);
		fault_destroy(f);
	}
}

/* It says that it is another's. */
static void other_writes(void *ctx)
{
	struct other *o = ctx;
	struct disk_mmp m = {.magic = put64(MMP_MAGIC),
			     .seq = put64(1000),
			     .nonce = put64(7),
			     .state = put32(MMP_HELD),
			     .host = "elsewhere",
			     .program = "other"};

	m.csum = put64(checksum(&m, offsetof(struct disk_mmp, csum)));
	fault_poke(o->f, &m, sizeof(m), MMP_OFFSET);
}

static void check_other_holds(struct fault *f)
{
	struct disk_mmp m;

	fault_peek(f, &m, sizeof(m), MMP_OFFSET);
	assert_int_equal(get64(m.nonce), 7);
	assert_int_equal(get64(m.seq), 1000);
	assert_int_equal(get32(m.state), MMP_HELD);
}

/* Who closes does not say that a volume is free which another has. */
static void a_volume_that_another_has_taken_is_not_given_back(void **state)
{
	struct volume_options opt = {.no_threads = true, .message = note};
	struct fault *base = formatted(BYTES), *f = fault_create_over(base);
	struct disk_super before[2], after[2];
	struct other o = {.f = f};
	struct volume *v;
	uint64_t calls;
	char msg[200];

	(void)state;
	told[0] = 0;
	assert_int_equal(volume_open(fault_image(f), &opt, &v, msg, sizeof(msg)), 0);
	for (unsigned s = 0; s < 2; s++)
		fault_peek(f, &before[s], sizeof(before[s]), SUPER_SLOT_OFFSET(s));
	other_writes(&o);
	assert_int_equal(volume_close(v), -EBUSY);
	assert_non_null(strstr(told, "which other on elsewhere, process 0, has taken"));
	check_other_holds(f);
	for (unsigned s = 0; s < 2; s++)
		fault_peek(f, &after[s], sizeof(after[s]), SUPER_SLOT_OFFSET(s));
	assert_memory_equal(before, after, sizeof(before));
	/* The last but one of its writes and flushes is that of the superblock. */
	for (unsigned late = 0; late < 2; late++) {
		fault_fork(f, base);
		assert_int_equal(volume_open(fault_image(f), &opt, &v, msg, sizeof(msg)),
				 0);
		fault_between(f, late ? calls - 2 : UINT64_MAX, FAULT_AFTER, other_writes,
			      &o);
		assert_int_equal(volume_close(v), late ? -EBUSY : 0);
		calls = fault_between(f, UINT64_MAX, FAULT_AFTER, NULL, NULL);
	}
	check_other_holds(f);
	fault_destroy(f);
	fault_destroy(base);
}

/* ---- contents that look like groups ------------------------------------------------- */

#define CONTENTS (16u << 10)
#define FORGED sizeof(struct disk_group)

/* A file in the root with `data` as its contents, or in an xattr; durable. */
static void write_contents(struct volume *v, bool xattr, unsigned pad,
			   const uint8_t *data, size_t len, uint64_t *ino)
{
	struct attr a = {.mode = S_IFREG | 0644, .nlink = 1}, *e;
	struct inode *root, *ip;
	char name[256];
	struct txn *t;

	memset(name, 'n', pad);
	assert_int_equal(inode_get(v, ROOT_INO, &root), 0);
	rwlock_write(&root->lock);
	assert_int_equal(txn_begin(v, TXN_NORMAL, &t), 0);
	assert_int_equal(inode_create(t, &a, &ip), 0);
	assert_int_equal(dir_add(t, root, name, pad, ip->ino, DT_REG), 0);
	if (xattr) {
		assert_int_equal(xattr_set(t, ip, "user.x", data, len, 0), 0);
	} else {
		assert_int_equal(map_write(t, ip, 0, len >> volume_block_shift(v), data),
				 0);
		e = inode_edit(t, ip);
		e->size = len;
	}
	assert_int_equal(txn_commit(t), 0);
	assert_int_equal(volume_sync(v), 0);
	*ino = ip->ino;
	rwlock_unlock(&ip->lock);
	rwlock_unlock(&root->lock);
	inode_put(v, ip);
	inode_put(v, root);
}

static void contents_are(struct volume *v, bool xattr, uint64_t ino,
			 const uint8_t *data, size_t len)
{
	static uint8_t got[CONTENTS];
	struct inode *ip;
	size_t n = len;

	assert_int_equal(inode_get(v, ino, &ip), 0);
	rwlock_write(&ip->lock);
	if (xattr)
		assert_int_equal(xattr_get(v, ip, "user.x", got, &n), 0);
	else
		assert_int_equal(map_read(v, ip, 0, len >> volume_block_shift(v), got), 0);
	assert_int_equal(n, len);
	assert_memory_equal(got, data, len);
	rwlock_unlock(&ip->lock);
	inode_put(v, ip);
}

static uint64_t unit_offset(struct fault *f, uint64_t unit)
{
	struct disk_super s;

	fault_peek(f, &s, sizeof(s), 0);
	return (get64(s.journal_block) << get32(s.block_shift)) +
	       unit % get64(s.journal_units) * JOURNAL_UNIT;
}

/* Which byte of the contents stands where a unit of the ring begins; SIZE_MAX. */
static size_t byte_at_a_unit(struct fault *f, const uint8_t *data, size_t len,
			     uint64_t *unit)
{
	uint8_t bytes[64], *at;

	for (*unit = 0; *unit < JOURNAL_MIN_UNITS; ++*unit) {
		fault_peek(f, bytes, sizeof(bytes), unit_offset(f, *unit));
		at = memmem(data, len, bytes, sizeof(bytes));
		if (at)
			return (size_t)(at - data);
	}
	return SIZE_MAX;
}

/* Small groups, until one of the next lap stands at this unit. */
static void write_over(struct fault *f, struct volume *v, uint64_t unit)
{
	struct disk_group before, now;
	struct txn *t;
	struct key k;

	fault_peek(f, &before, sizeof(before), unit_offset(f, unit));
	do {
		key_refs(&k, 0, 1);
		assert_int_equal(txn_begin(v, TXN_NORMAL, &t), 0);
		assert_int_equal(txn_del(t, TABLE_REFS, &k), 0);
		assert_int_equal(txn_commit(t), 0);
		assert_int_equal(volume_sync(v), 0);
		fault_peek(f, &now, sizeof(now), unit_offset(f, unit));
	} while (!memcmp(&before, &now, sizeof(now)));
}

/* A group that knows of a checkpoint that never was, complete in its header. Nine
 * bytes on, in its salt, stands the magic once more. */
static void forge(uint8_t *at)
{
	struct disk_group g = {.magic = put32(GROUP_MAGIC),
			       .bytes = put32(FORGED),
			       .salt = put64((uint64_t)GROUP_MAGIC << 8),
			       .checkpoint_gen = put64(1u << 30)};

	g.csum = put64(checksum(&g, sizeof(g)));
	memcpy(at, &g, sizeof(g));
}

/*
 * What users write may look like a group, and may come to stand in the ring where
 * a group could begin: whether as data that rides or as the value of an xattr. It
 * is not taken for one, and is there after a crash.
 */
static void contents_that_look_like_a_group_are_none(void **state)
{
	static const struct {
		unsigned shift;
		bool xattr;
		size_t len;
	} kind[] = {{12, false, 4096}, {12, false, 16384}, {14, false, 16384},
		    {12, true, 8000}};
	static uint8_t data[CONTENTS];
	struct rng r = {1};

	(void)state;
	for (size_t i = 0; i < sizeof(kind) / sizeof(kind[0]); i++) {
		struct volume_geometry g = {.bytes = 4 * BYTES,
					    .journal_bytes = JOURNAL_MIN_UNITS *
							     JOURNAL_UNIT,
					    .block_shift = kind[i].shift};
		struct fault *base = fault_create(g.bytes), *f;
		unsigned found = 0;

		assert_int_equal(volume_format(fault_image(base), &g), 0);
		f = fault_create_over(base);
		for (unsigned pad = 1; pad < 250; pad += 7) {
			struct volume *v;
			uint64_t ino, unit;
			size_t at;

			for (size_t b = 0; b < sizeof(data); b++)
				data[b] = (uint8_t)rng_next(&r);
			fault_fork(f, base);
			v = opened(f);
			write_contents(v, kind[i].xattr, pad, data, kind[i].len, &ino);
			at = byte_at_a_unit(f, data, kind[i].len, &unit);
			volume_abandon(v);
			if (at > kind[i].len - FORGED || at < 16)
				continue;
			found++;
			/* Moved by nine bytes it would still begin a unit. */
			for (unsigned back = 0; back < 2; back++) {
				forge(data + at - 9 * back);
				fault_fork(f, base);
				v = opened(f);
				write_contents(v, kind[i].xattr, pad, data,
					       kind[i].len, &ino);
				/* Where a group begins it is passed over whole. */
				write_over(f, v, unit - 1);
				volume_abandon(v);
				v = opened(f);
				contents_are(v, kind[i].xattr, ino, data, kind[i].len);
				assert_int_equal(volume_close(v), 0);
				v = opened(f);
				contents_are(v, kind[i].xattr, ino, data, kind[i].len);
				assert_int_equal(volume_close(v), 0);
			}
		}
		print_message("blocks of 2^%u, %s of %zu bytes: %u places\n",
			      kind[i].shift, kind[i].xattr ? "an xattr" : "a file",
			      kind[i].len, found);
		assert_true(found > 5);
		fault_destroy(f);
		fault_destroy(base);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_superblock_out_of_bounds_is_refused_by_name),
		cmocka_unit_test(a_journal_too_long_is_refused),
		cmocka_unit_test(an_unknown_feature_allows_looking_alone),
		cmocka_unit_test(an_image_that_ends_too_soon_is_refused),
		cmocka_unit_test(a_geometry_out_of_bounds_is_refused_by_name),
		cmocka_unit_test(a_node_out_of_bounds_is_refused_by_name),
		cmocka_unit_test(a_group_that_makes_no_sense_is_not_replayed),
		cmocka_unit_test(a_journal_at_odds_with_the_bitmaps_is_damage),
		cmocka_unit_test(an_older_superblock_than_the_journal_is_refused),
		cmocka_unit_test(a_number_in_use_is_not_given_again),
		cmocka_unit_test(numbers_end_at_the_highest_one),
		cmocka_unit_test(a_volume_that_another_has_taken_is_not_taken),
		cmocka_unit_test(a_volume_that_another_has_taken_is_not_given_back),
		cmocka_unit_test(contents_that_look_like_a_group_are_none),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
