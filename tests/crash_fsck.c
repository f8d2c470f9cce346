/* SPDX-License-Identifier: BSD-2-Clause */

/*
 * The power is cut while fsck.spaceweave repairs a damaged volume: another
 * repair has to come to the same. Where nothing need be lost nothing is, to
 * the last item; where something is, what can be read is what was written.
 * Likewise when the image's calls or allocations fail under a repair.
 *
 *   SEED=n     (default 1)
 *   STATES=n   about so many crash states for each damage; 0: many
 */

#include "fs/fs.h"
#include "meta/repair.h"
#include "tests/fault.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define BYTES (2u << 20)
#define BLOCK 4096u

/* ---- fsck.spaceweave on an image in memory ---------------------------------------- */

int fsck_main(int argc, char **argv);
int __wrap_image_open(const char *path, enum image_mode mode, struct image **out);
void __wrap_exit(int status) __attribute__((noreturn));
void __real_exit(int status) __attribute__((noreturn));

static struct image *image;		/* what it opens */
static const char *doing = "";	/* for what fails */
static jmp_buf out_of_fsck;
static bool in_fsck;

int __wrap_image_open(const char *path, enum image_mode mode, struct image **out)
{
	(void)path, (void)mode;
	*out = image;
	return 0;
}

void __wrap_exit(int status)
{
	if (in_fsck)
		longjmp(out_of_fsck, status + 1);
	__real_exit(status);
}

/* Its exit status; what it says is seen with VERBOSE=1. */
static int fsck(struct fault *f, const char *options)
{
	char *argv[] = {(char *)"fsck", (char *)options, (char *)"image", NULL};
	int out = dup(STDOUT_FILENO), err = dup(STDERR_FILENO), ret;
	int null = open(getenv("VERBOSE") ? "/dev/stderr" : "/dev/null", O_WRONLY);

	image = fault_image(f);
	fflush(NULL);
	dup2(null, STDOUT_FILENO);
	dup2(null, STDERR_FILENO);
	optind = 0;
	in_fsck = true;
	ret = setjmp(out_of_fsck);
	ret = ret ? ret - 1 : fsck_main(3, argv);
	in_fsck = false;
	fflush(NULL);
	dup2(out, STDOUT_FILENO);
	dup2(err, STDERR_FILENO);
	close(null);
	close(out);
	close(err);
	return ret;
}

/* ---- a volume ------------------------------------------------------------------------ */

static struct volume *open_volume(struct fault *f, const struct volume_repair *rep)
{
	struct volume_options o = {.no_threads = true,
				   .readonly = true,
				   .repair = rep,
				   .cache_bytes = 1u << 20};
	struct volume *v = NULL;
	char msg[256] = "";

	if (volume_open(fault_image(f), &o, &v, msg, sizeof(msg)))
		fail_msg("the volume does not open: %s", msg);
	return v;
}

static void contents(uint8_t *to, uint64_t blk)
{
	for (unsigned i = 0; i < BLOCK; i++)
		to[i] = (uint8_t)(1 + (blk * 7 + i) % 250);
}

/* A file of the blocks 0, step, 2 * step ... */
static uint64_t put_file(struct fs *fs, uint64_t dir, const char *name,
			 unsigned blocks, unsigned step)
{
	static const struct fs_cred cred = {.umask = 0};
	uint8_t buf[BLOCK];
	struct fs_entry e;

	assert_int_equal(fs_mknod(fs, &cred, dir, name, S_IFREG | 0644, 0, &e), 0);
	for (unsigned i = 0; i < blocks; i++) {
		contents(buf, (uint64_t)i * step);
		assert_int_equal(fs_write(fs, e.ino, buf, BLOCK,
					  (off_t)i * step * BLOCK, 0), BLOCK);
	}
	fs_forget(fs, e.ino, 1);
	return e.ino;
}

static void fill(struct fs *fs, const char *prefix)
{
	static const struct fs_cred cred = {.umask = 0};
	uint64_t ino, clone;
	struct fs_entry d;
	char name[48];

	assert_int_equal(fs_mkdir(fs, &cred, ROOT_INO, prefix, 0755, &d), 0);
	for (unsigned i = 0; i < 40; i++) {
		snprintf(name, sizeof(name), "%s-file-with-a-name-%02u", prefix, i);
		put_file(fs, d.ino, name, i % 4 == 0, 1);
	}
	snprintf(name, sizeof(name), "%s-scattered", prefix);
	ino = put_file(fs, ROOT_INO, name, 60, 2);
	snprintf(name, sizeof(name), "%s-scattered-clone", prefix);
	clone = put_file(fs, ROOT_INO, name, 0, 1);
	assert_int_equal(fs_copy_file_range(fs, ino, 0, clone, 0, 119 * BLOCK),
			 119 * BLOCK);
	fs_forget(fs, d.ino, 1);
}

/* Closed, or as a crash leaves it after two checkpoints and a sync. */
static struct fault *make(bool dirty)
{
	struct volume_geometry g = {.bytes = BYTES,
				    .journal_bytes = JOURNAL_MIN_UNITS * JOURNAL_UNIT};
	struct volume_options o = {.no_threads = true, .cache_bytes = 1u << 20};
	struct fault *f = fault_create(BYTES);
	struct volume *v;
	struct fs *fs;
	char msg[256] = "";

	assert_int_equal(volume_format(fault_image(f), &g), 0);
	assert_int_equal(volume_open(fault_image(f), &o, &v, msg, sizeof(msg)), 0);
	assert_int_equal(fs_open(v, &(struct fs_options){.noatime = true}, &fs), 0);
	fill(fs, "first");
	assert_int_equal(volume_checkpoint(v), 0);
	fill(fs, "second");
	assert_int_equal(volume_checkpoint(v), 0);
	if (dirty)
		put_file(fs, ROOT_INO, "last", 3, 1);
	assert_int_equal(fs_sync(fs), 0);
	assert_int_equal(fs_close(fs), 0);
	if (dirty)
		volume_abandon(v);
	else
		assert_int_equal(volume_close(v), 0);
	return f;
}

/* ---- looking ---------------------------------------------------------------------------- */

static int digest_item(void *ctx, enum table t, const uint8_t *key, size_t klen,
		       const uint8_t *val, size_t vlen)
{
	uint64_t *sum = ctx, all[3] = {*sum, checksum(key, klen), checksum(val, vlen)};

	(void)t;
	*sum = checksum(all, sizeof(all));
	return 0;
}

static int digest_bad(void *ctx, enum table t, unsigned level, uint64_t block,
		      const char *what)
{
	(void)ctx;
	fail_msg("table %u: node of level %u at %" PRIu64 ": %s", t, level, block, what);
	return 1;
}

/* Of all items of the files. */
static uint64_t digest(struct fault *f)
{
	uint64_t sum = 0;
	struct walk w = {.ctx = &sum, .item = digest_item, .bad = digest_bad};
	struct volume *v = open_volume(f, NULL);

	assert_int_equal(volume_walk(v, TABLE_FILES, &w), 0);
	volume_close(v);
	return sum;
}

struct reader {
	struct fs *fs;
	uint64_t files, refused;
};

static void read_file(struct reader *r, const char *name, const struct fs_entry *e)
{
	uint8_t room[2 * BLOCK], want[BLOCK];
	bool scattered = strstr(name, "scattered") || name[0] == '#';

	for (off_t at = 0; at < e->st.st_size; at += BLOCK) {
		char *data;
		ssize_t n = fs_read(r->fs, e->ino, room, BLOCK, at, &data);
		static const uint8_t none[BLOCK];

		if (n == -EBADMSG || n == -EUCLEAN) {
			r->refused++;
			continue;
		}
		assert_int_equal(n, BLOCK);
		contents(want, (uint64_t)at / BLOCK);
		if (memcmp(data, want, BLOCK) &&
		    !(scattered && at / BLOCK % 2 && !memcmp(data, none, BLOCK)))
			fail_msg("%s: '%s': block %jd is wrong", doing, name,
				 (intmax_t)at / BLOCK);
	}
	r->files++;
}

static int read_entry(void *ctx, const char *name, const struct fs_entry *e,
		      uint64_t next)
{
	struct reader *r = ctx;
	struct fs_entry own = *e;

	(void)next;
	if (name[0] == '.' && (!name[1] || name[1] == '.'))
		return 0;
	if (fs_getattr(r->fs, e->ino, &own.st))
		return 0;
	if (S_ISDIR(own.st.st_mode))
		(void)fs_readdir(r->fs, e->ino, 0, false, read_entry, r);
	else
		read_file(r, name, &own);
	return 0;
}

/* What can be read is what was written. */
static uint64_t read_all(struct fault *f)
{
	struct volume *v = open_volume(f, NULL);
	struct reader r = {0};

	assert_int_equal(fs_open(v, &(struct fs_options){.noatime = true}, &r.fs), 0);
	assert_int_equal(fs_readdir(r.fs, ROOT_INO, 0, false, read_entry, &r), 0);
	fs_close(r.fs);
	volume_close(v);
	return r.files;
}

/* ---- breaking --------------------------------------------------------------------------- */

static void spoil(struct fault *f, uint64_t off)
{
	uint8_t b[64];

	fault_peek(f, b, sizeof(b), off);
	for (unsigned i = 0; i < sizeof(b); i++)
		b[i] ^= 0x5a;
	fault_poke(f, b, sizeof(b), off);
}

struct search {
	unsigned level, n, of;
	uint64_t block;
};

static int note(void *ctx, enum table t, unsigned level, uint64_t block)
{
	struct search *s = ctx;

	(void)t;
	if (level != s->level)
		return 0;
	if (s->of++ == s->n)
		s->block = block;
	return 0;
}

/* The n-th node of a level; level and n count from the end if negative. */
static void spoil_node(struct fault *f, enum table t, int level, int n)
{
	static const struct volume_repair raw = {.no_replay = true};
	struct volume *v = open_volume(f, &raw);
	struct search s = {.n = UINT32_MAX};
	struct walk w = {.ctx = &s, .node = note};
	unsigned top = get32(volume_super(v)->root[t].level);

	s.level = level < 0 ? top : (unsigned)level;
	assert_int_equal(volume_walk(v, t, &w), 0);
	s.n = n < 0 ? s.of - 1 : (unsigned)n;
	s.of = 0;
	assert_int_equal(volume_walk(v, t, &w), 0);
	volume_close(v);
	assert_true(s.block != 0);
	spoil(f, s.block * BLOCK + 1000);
}

static unsigned newest(struct fault *f, struct disk_super *s)
{
	unsigned slot;
	char msg[200];

	assert_int_equal(super_load(fault_image(f), s, &slot, msg, sizeof(msg)), 0);
	return slot;
}

static void spoil_slots(struct fault *f, unsigned which)
{
	static const uint64_t at[] = {SUPER_SLOT_OFFSET(0), SUPER_SLOT_OFFSET(1),
				      BACKUP_OFFSET, BYTES - BLOCK};

	for (unsigned i = 0; i < 4; i++)
		if (which >> i & 1)
			spoil(f, at[i] + 200);
}

static void newest_slot(struct fault *f)
{
	struct disk_super s;

	spoil_slots(f, 1u << newest(f, &s));
}

static void older_slot(struct fault *f)
{
	struct disk_super s;

	spoil_slots(f, 2u >> newest(f, &s));
}

static void both_slots(struct fault *f) { spoil_slots(f, 3); }
static void all_but_last(struct fault *f) { spoil_slots(f, 7); }
static void all_slots(struct fault *f) { spoil_slots(f, 15); }
static void root(struct fault *f) { spoil_node(f, TABLE_FILES, -1, 0); }
static void root_of_refs(struct fault *f) { spoil_node(f, TABLE_REFS, -1, 0); }
static void root_of_space(struct fault *f) { spoil_node(f, TABLE_SPACE, -1, 0); }
static void first_leaf(struct fault *f) { spoil_node(f, TABLE_FILES, 0, 0); }
static void last_leaf(struct fault *f) { spoil_node(f, TABLE_FILES, 0, -1); }

static void root_and_leaf(struct fault *f)
{
	spoil_node(f, TABLE_FILES, 0, 3);
	spoil_node(f, TABLE_FILES, -1, 0);
}

static void slots_and_leaf(struct fault *f)
{
	spoil_node(f, TABLE_FILES, 0, 2);
	spoil_slots(f, 3);
}

/* The first group behind the tail: it was durable, and more follow. */
static void journal(struct fault *f)
{
	struct disk_super s;

	newest(f, &s);
	spoil(f, (get64(s.journal_block) << get32(s.block_shift)) +
			 get64(s.tail_unit) % get64(s.journal_units) * JOURNAL_UNIT +
			 sizeof(struct disk_group));
}

static const struct damage {
	const char *name;
	void (*fn)(struct fault *f);
	bool dirty;
	enum { LOSES, KEEPS, KEEPS_UNLESS_CUT } keeps;
} damages[] = {
	{"older slot", older_slot, true, KEEPS},
	{"newest slot", newest_slot, true, KEEPS},
	{"both slots", both_slots, false, KEEPS},
	{"both slots, dirty", both_slots, true, KEEPS},
	{"all but the last backup", all_but_last, true, KEEPS},
	{"all superblocks", all_slots, true, KEEPS},
	{"root", root, false, KEEPS},
	{"root, dirty", root, true, KEEPS},
	{"root of the references", root_of_refs, false, KEEPS},
	{"root of the bitmaps", root_of_space, false, KEEPS},
	{"root of the bitmaps, dirty", root_of_space, true, KEEPS},
	{"first leaf", first_leaf, false, LOSES},
	{"first leaf, dirty", first_leaf, true, LOSES},
	{"last leaf", last_leaf, false, LOSES},
	/* what it held is in the older tree, over which a repair may write */
	{"last leaf, dirty", last_leaf, true, KEEPS_UNLESS_CUT},
	{"root and a leaf", root_and_leaf, false, LOSES},
	{"slots and a leaf", slots_and_leaf, true, LOSES},
	{"journal", journal, true, LOSES},
};

/* ---- cutting ------------------------------------------------------------------------------ */

struct verify {
	const struct damage *d;
	uint64_t want, cuts, most;
	struct effort e;
};

static void must_be_repaired(struct fault *f, const struct verify *v,
			     const char *when, bool all)
{
	int ret = fsck(f, "-fy");
	char text[160];

	snprintf(text, sizeof(text), "%s, %s", v->d->name, when);
	doing = text;

	if (ret & ~1)
		fail_msg("%s, %s: fsck -fy exits with %d", v->d->name, when, ret);
	ret = fsck(f, "-fn");
	if (ret)
		fail_msg("%s, %s: after -fy, fsck -fn exits with %d", v->d->name, when,
			 ret);
	if (all && digest(f) != v->want)
		fail_msg("%s, %s: not all is there", v->d->name, when);
	assert_true(read_all(f) || !all);
}

static int after_cut(void *ctx, struct fault *crashed, const struct fault_cut *cut)
{
	struct verify *v = ctx;

	v->cuts++;
	must_be_repaired(crashed, v, cut->text, v->d->keeps == KEEPS);
	return v->most && v->cuts >= v->most;
}

static void repair_and_cut(const struct damage *d, uint64_t seed, uint64_t most,
			   uint64_t *cuts)
{
	struct fault_plan plan = {.seed = seed, .all_below = 3, .random = 3,
				  .torn = 2};
	uint64_t started = 0, promised = 0;
	struct fault *f = make(d->dirty), *again;
	struct verify v = {.d = d, .want = digest(f), .most = most};

	d->fn(f);
	again = fault_create_over(f);
	must_be_repaired(again, &v, "not cut", d->keeps != LOSES);
	fault_destroy(again);
	again = fault_create_over(f);
	fault_record(again, true);
	(void)fsck(again, "-fy");
	fault_explore(again, &plan, &started, &promised, true, after_cut, &v);
	fault_destroy(again);
	fault_destroy(f);
	*cuts += v.cuts;
}

static void a_repair_that_is_cut_off_can_be_made_again(void **state)
{
	unsigned n = sizeof(damages) / sizeof(damages[0]);
	uint64_t seed = env_u64("SEED", 1), states = env_u64("STATES", 900), cuts = 0;

	(void)state;
	for (unsigned i = 0; i < n; i++)
		if (!getenv("WORKLOAD") || env_u64("WORKLOAD", 0) == i)
			repair_and_cut(&damages[i], seed, states ? 1 + states / n : 0,
				       &cuts);
	print_message("%u damages, %" PRIu64 " crash states of repairs\n", n, cuts);
}

/* ---- failing ------------------------------------------------------------------------------ */

/* One repair whose n-th call of this kind fails, and a repair after that. */
static void fail_at(const struct fault *base, struct verify *v, int kind, uint64_t n,
		    bool for_ever)
{
	struct fault *f = fault_create_over(base);
	char when[80];
	int ret;

	if (kind < FAULT_CALLS)
		fault_fail(f, (enum fault_call)kind, n, EIO, for_ever, false);
	else
		fault_memory(n, for_ever);
	ret = fsck(f, "-fy");
	fault_fail(f, FAULT_CALLS, 0, 0, false, false);
	fault_memory(UINT64_MAX, false);
	snprintf(when, sizeof(when), "kind %d, call %" PRIu64 " fails%s", kind, n,
		 for_ever ? " and all after it" : "");
	if (ret & ~(1 | 4 | 8))
		fail_msg("%s, %s: fsck -fy exits with %d", v->d->name, when, ret);
	/* a node that could not be read was given up */
	must_be_repaired(f, v, when, v->d->keeps == KEEPS && kind != FAULT_READ);
	v->cuts++;
	fault_destroy(f);
}

static void what_fails_under_a_repair_loses_nothing(void **state)
{
	static const int kinds[] = {FAULT_READ, FAULT_WRITE, FAULT_FLUSH, FAULT_CALLS};
	unsigned n = sizeof(damages) / sizeof(damages[0]);
	uint64_t states = env_u64("STATES", 500), runs = 0;

	(void)state;
	for (unsigned i = 0; i < n; i++) {
		struct fault *base = make(damages[i].dirty), *f;
		struct verify v = {.d = &damages[i], .want = digest(base)};
		uint64_t most = states ? 1 + states / n / 8 : UINT64_MAX, allocations;

		damages[i].fn(base);
		f = fault_create_over(base);
		fault_memory(UINT64_MAX, false);
		(void)fsck(f, "-fy");
		allocations = fault_memory(UINT64_MAX, false);
		for (unsigned k = 0; k < 4; k++) {
			uint64_t calls = kinds[k] == FAULT_CALLS ?
						 allocations :
						 fault_count(f, (enum fault_call)kinds[k]);
			uint64_t step = calls / most + 1;

			for (uint64_t at = 0; at < calls; at += step) {
				fail_at(base, &v, kinds[k], at, false);
				fail_at(base, &v, kinds[k], at, true);
			}
		}
		fault_destroy(f);
		fault_destroy(base);
		runs += v.cuts;
	}
	print_message("%u damages, %" PRIu64 " repairs in which something failed\n", n,
		      runs);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_repair_that_is_cut_off_can_be_made_again),
		cmocka_unit_test(what_fails_under_a_repair_loses_nothing),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
