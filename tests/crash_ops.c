/* SPDX-License-Identifier: BSD-2-Clause */

/*
 * Every pair of operations, and a sample of triples, with each way to make
 * them durable between and after them; the power cut everywhere.
 *
 *   SEED=n       of the random subsets (default 1)
 *   STATES=n     stop after about so many crash states; 0: all pairs
 *   WORKLOAD=n STATE=m   this one alone
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

/* What an operation worked on, for the fsyncs that follow. */
struct at {
	uint64_t file, dir;
};

/* -ENOENT when what it needs is not there: then nothing was done. */
typedef int (*op_fn)(struct world *w, struct at *at);

#define PATH(ino, path)                                   \
	uint64_t ino = world_path(w, path);               \
	if (!ino || S_ISCHR(world_mode(w, ino)))          \
		return -ENOENT	/* gone, or a whiteout */

static int op_create(struct world *w, struct at *at)
{
	PATH(dir, "/A");
	at->dir = dir;
	return world_create_file(w, dir, "new", 0644, 0, &at->file);
}

static int op_create_write(struct world *w, struct at *at)
{
	PATH(dir, "/B");
	at->dir = dir;
	int err = world_create_file(w, dir, "written", 0600, 0, &at->file);

	return err ? err : world_write(w, at->file, 0, 5000, 11);
}

static int op_mkdir(struct world *w, struct at *at)
{
	PATH(dir, "/A");
	at->dir = dir;
	return world_mkdir(w, dir, "D", 0755, &at->file);
}

static int op_create_below(struct world *w, struct at *at)
{
	PATH(dir, "/A/sub");
	at->dir = dir;
	return world_create_file(w, dir, "deep", 0640, 0, &at->file);
}

static int op_mknod(struct world *w, struct at *at)
{
	PATH(dir, "/B");
	at->dir = dir;
	return world_create_file(w, dir, "dev", S_IFBLK | 0600, 0x0803, &at->file);
}

static int op_symlink(struct world *w, struct at *at)
{
	PATH(dir, "/A");
	at->dir = dir;
	return world_symlink(w, dir, "soft", "../B/baz", &at->file);
}

static int op_symlink_long(struct world *w, struct at *at)
{
	char target[1500];

	PATH(dir, "/A");
	memset(target, 'x', sizeof(target) - 1);
	target[sizeof(target) - 1] = 0;
	at->dir = dir;
	return world_symlink(w, dir, "softer", target, &at->file);
}

static int op_overwrite(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(dir, "/A");
	at->file = ino;
	at->dir = dir;
	return world_write(w, ino, 4096, 4096, 12);
}

static int op_overwrite_part(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(dir, "/A");
	at->file = ino;
	at->dir = dir;
	return world_write(w, ino, 1000, 7000, 13);
}

static int op_append(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(dir, "/A");
	at->file = ino;
	at->dir = dir;
	return world_write(w, ino, world_size(w, ino), 3000, 14);
}

static int op_write_big(struct world *w, struct at *at)
{
	PATH(ino, "/B/baz");
	PATH(dir, "/B");
	at->file = ino;
	at->dir = dir;
	return world_write(w, ino, 0, 100000, 15);
}

static int op_write_beyond(struct world *w, struct at *at)
{
	PATH(ino, "/A/bar");
	PATH(dir, "/A");
	at->file = ino;
	at->dir = dir;
	return world_write(w, ino, 50000, 10, 16);
}

static int op_truncate_down(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(dir, "/A");
	at->file = ino;
	at->dir = dir;
	return world_truncate(w, ino, 5001);
}

static int op_truncate_zero(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(dir, "/A");
	at->file = ino;
	at->dir = dir;
	return world_truncate(w, ino, 0);
}

static int op_truncate_up(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(dir, "/A");
	at->file = ino;
	at->dir = dir;
	return world_truncate(w, ino, 40000);
}

static int op_unlink(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(dir, "/A");
	(void)ino;
	at->file = at->dir = dir;
	return world_unlink(w, dir, "foo");
}

static int op_unlink_link(struct world *w, struct at *at)
{
	PATH(ino, "/A/bar");
	PATH(dir, "/A");
	at->dir = dir;
	at->file = world_path(w, "/B/barlink") == ino ? ino : dir;
	return world_unlink(w, dir, "bar");
}

static int op_unlink_open(struct world *w, struct at *at)
{
	PATH(ino, "/A/clone");
	PATH(dir, "/A");
	int err = world_hold(w, dir, "clone");

	at->file = ino;
	at->dir = dir;
	if (!err)
		err = world_unlink(w, dir, "clone");
	return err ? err : world_write(w, ino, 0, 100, 17);
}

static int op_let_go(struct world *w, struct at *at)
{
	PATH(dir, "/A");
	at->file = at->dir = dir;
	if (!w->n_held)
		return -ENOENT;
	return world_let_go(w, w->held[0]);
}

static int op_tmpfile(struct world *w, struct at *at)
{
	PATH(dir, "/B");
	int err = world_tmpfile(w, dir, 0600, &at->file);

	at->dir = dir;
	if (!err)
		err = world_write(w, at->file, 0, 9000, 18);
	return err;
}

static int op_tmpfile_link(struct world *w, struct at *at)
{
	PATH(dir, "/B");
	int err = world_tmpfile(w, dir, 0600, &at->file);

	at->dir = dir;
	if (!err)
		err = world_write(w, at->file, 0, 6000, 19);
	return err ? err : world_link(w, at->file, dir, "named");
}

static int op_link(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(dir, "/B");
	at->file = ino;
	at->dir = dir;
	return world_link(w, ino, dir, "foolink");
}

static int op_rename(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(from, "/A");
	PATH(dir, "/B");
	at->file = ino;
	at->dir = dir;
	return world_rename(w, from, "foo", dir, "moved", 0);
}

static int op_rename_over(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(from, "/A");
	PATH(dir, "/B");
	at->file = ino;
	at->dir = dir;
	return world_rename(w, from, "foo", dir, "baz", 0);
}

static int op_replace(struct world *w, struct at *at)
{
	/* What editors do: write a new one, rename it over the old one. */
	PATH(dir, "/A");
	int err = world_create_file(w, dir, "foo.tmp", 0644, 0, &at->file);

	at->dir = dir;
	if (!err)
		err = world_write(w, at->file, 0, 9000, 20);
	return err ? err : world_rename(w, dir, "foo.tmp", dir, "foo", 0);
}

static int op_exchange(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(a, "/A");
	PATH(b, "/B");
	PATH(other, "/B/baz");
	(void)other;
	at->file = ino;
	at->dir = b;
	return world_rename(w, a, "foo", b, "baz", RENAME_EXCHANGE);
}

static int op_whiteout(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(a, "/A");
	PATH(b, "/B");
	at->file = ino;
	at->dir = a;
	return world_rename(w, a, "foo", b, "whited", RENAME_WHITEOUT);
}

static int op_rename_dir(struct world *w, struct at *at)
{
	PATH(a, "/A");
	at->file = a;
	at->dir = ROOT_INO;
	return world_rename(w, ROOT_INO, "A", ROOT_INO, "C", 0);
}

static int op_move_dir(struct world *w, struct at *at)
{
	PATH(ino, "/A/sub");
	PATH(a, "/A");
	PATH(b, "/B");
	at->file = ino;
	at->dir = b;
	return world_rename(w, a, "sub", b, "sub", 0);
}

static int op_rmdir(struct world *w, struct at *at)
{
	PATH(ino, "/A/sub");
	PATH(a, "/A");
	(void)ino;
	at->file = at->dir = a;
	return world_rmdir(w, a, "sub");
}

static int op_setxattr(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(a, "/A");
	at->file = ino;
	at->dir = a;
	return world_setxattr(w, ino, "user.small", 20, 21);
}

static int op_setxattr_big(struct world *w, struct at *at)
{
	PATH(ino, "/B/baz");
	PATH(b, "/B");
	at->file = ino;
	at->dir = b;
	return world_setxattr(w, ino, "user.old", 5000, 22);
}

static int op_removexattr(struct world *w, struct at *at)
{
	PATH(ino, "/B/baz");
	PATH(b, "/B");
	at->file = ino;
	at->dir = b;
	return world_removexattr(w, ino, "user.old");
}

static int op_chmod(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(a, "/A");
	int err = world_chmod(w, ino, 0400);

	at->file = ino;
	at->dir = a;
	return err ? err : world_chown(w, ino, 1000, 100);
}

static int op_utimes(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(a, "/A");
	at->file = ino;
	at->dir = a;
	return world_utimes(w, ino, 1000000000);
}

static int op_setflags(struct world *w, struct at *at)
{
	PATH(ino, "/A/bar");
	PATH(a, "/A");
	at->file = ino;
	at->dir = a;
	return world_setflags(w, ino, FS_NODUMP_FL, 42);
}

static int op_allocate(struct world *w, struct at *at)
{
	PATH(ino, "/A/bar");
	PATH(a, "/A");
	at->file = ino;
	at->dir = a;
	return world_fallocate(w, ino, 0, 2000, 30000);
}

static int op_allocate_keep(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(a, "/A");
	at->file = ino;
	at->dir = a;
	return world_fallocate(w, ino, FALLOC_FL_KEEP_SIZE, 8192, 65536);
}

static int op_punch(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(a, "/A");
	at->file = ino;
	at->dir = a;
	return world_fallocate(w, ino, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
			       3000, 6000);
}

static int op_zero(struct world *w, struct at *at)
{
	PATH(ino, "/A/foo");
	PATH(a, "/A");
	at->file = ino;
	at->dir = a;
	return world_fallocate(w, ino, FALLOC_FL_KEEP_SIZE | FALLOC_FL_ZERO_RANGE,
			       4096, 4096);
}

static int op_clone(struct world *w, struct at *at)
{
	PATH(src, "/A/foo");
	PATH(b, "/B");
	int err = world_create_file(w, b, "clone2", 0644, 0, &at->file);

	at->dir = b;
	return err ? err : world_copy(w, src, 0, at->file, 0, world_size(w, src));
}

static int op_clone_into(struct world *w, struct at *at)
{
	PATH(src, "/A/clone");
	PATH(ino, "/A/bar");
	PATH(a, "/A");
	at->file = ino;
	at->dir = a;
	return world_copy(w, src, 4096, ino, 8192, 4096);
}

static int op_write_clone(struct world *w, struct at *at)
{
	PATH(ino, "/A/clone");
	PATH(a, "/A");
	at->file = ino;
	at->dir = a;
	return world_write(w, ino, 4000, 300, 23);
}

static const struct {
	const char *name;
	op_fn fn;
} ops[] = {
#define OP(x) {#x, op_##x}
	OP(create), OP(create_write), OP(mkdir), OP(create_below), OP(mknod),
	OP(symlink), OP(symlink_long), OP(overwrite), OP(overwrite_part), OP(append),
	OP(write_big), OP(write_beyond), OP(truncate_down), OP(truncate_zero),
	OP(truncate_up), OP(unlink), OP(unlink_link), OP(unlink_open), OP(let_go),
	OP(tmpfile), OP(tmpfile_link), OP(link), OP(rename), OP(rename_over),
	OP(replace), OP(exchange), OP(whiteout), OP(rename_dir), OP(move_dir),
	OP(rmdir), OP(setxattr), OP(setxattr_big), OP(removexattr), OP(chmod),
	OP(utimes), OP(setflags), OP(allocate), OP(allocate_keep), OP(punch), OP(zero),
	OP(clone), OP(clone_into), OP(write_clone),
};
#define OPS (sizeof(ops) / sizeof(ops[0]))

static const char *const sync_name[] = {
	"-", "fsync", "fsync-dir", "sync", "tick", "checkpoint",
};
#define SYNCS 6u

static int do_sync(struct world *w, unsigned how, const struct at *at)
{
	switch (how) {
	case 1:
		return at->file ? world_fsync(w, at->file) : 0;
	case 2:
		return at->dir ? world_fsync(w, at->dir) : 0;
	case 3:
		return world_sync(w);
	case 4:
		return world_tick(w);
	case 5:
		return world_checkpoint(w);
	}
	return 0;
}

static struct world *base;

static void setup(const struct world_options *opt)
{
	struct world *w = base = world_create(opt, NULL);
	uint64_t a, b, ino, foo;

	world_mkdir(w, ROOT_INO, "A", 0755, &a);
	world_mkdir(w, ROOT_INO, "B", 0700, &b);
	world_mkdir(w, a, "sub", 0755, NULL);
	world_create_file(w, a, "foo", 0644, 0, &foo);
	world_write(w, foo, 0, 3 * 4096 + 100, 1);
	world_create_file(w, a, "bar", 0644, 0, &ino);
	world_write(w, ino, 0, 4096, 2);
	world_link(w, ino, b, "barlink");
	world_create_file(w, b, "baz", 0600, 0, &ino);
	world_write(w, ino, 0, 10, 3);
	world_setxattr(w, ino, "user.old", 100, 4);
	world_create_file(w, a, "clone", 0644, 0, &ino);
	world_copy(w, foo, 0, ino, 0, 3 * 4096 + 100);
	world_symlink(w, ROOT_INO, "lnk", "A/foo", NULL);
	world_check(w);
	if (world_close(w))
		world_fail(w, "close after the setup");
}

/* A workload is a number: which operations, what between them, how it ends. */
struct workload {
	unsigned n;
	unsigned op[3], sync[3];
	bool with_open;		/* cut in the mount, too */
	bool close;
	bool keep_discarded;
};

#define PAIRS ((uint64_t)OPS * OPS * SYNCS * SYNCS)

static struct workload decode(uint64_t number)
{
	struct workload l = {.n = 2};
	struct rng r = {number};

	rng_next(&r);
	l.with_open = rng_below(&r, 16) == 0;
	l.close = rng_below(&r, 4) == 0;
	l.keep_discarded = rng_below(&r, 2);
	if (number >= PAIRS) {
		l.n = 3;
		for (unsigned i = 0; i < 3; i++) {
			l.op[i] = (unsigned)rng_below(&r, OPS);
			l.sync[i] = (unsigned)rng_below(&r, SYNCS);
		}
		return l;
	}
	l.op[0] = number % OPS;
	number /= OPS;
	l.op[1] = number % OPS;
	number /= OPS;
	l.sync[0] = number % SYNCS;
	l.sync[1] = (unsigned)(number / SYNCS);
	return l;
}

static uint64_t seed, states, recoveries, workloads;

static void run(uint64_t number, uint64_t only)
{
	struct workload l = decode(number);
	struct fault_plan plan = {
		.seed = seed * 1000003 + number,
		.all_below = 3,
		.random = 4,
		.torn = 6,
		.only = only,
	};
	struct world *w = world_fork(base);
	struct at at;
	int err;

	snprintf(repro, sizeof(repro), "crash_ops: SEED=%" PRIu64 " WORKLOAD=%" PRIu64,
		 seed, number);
	if (l.with_open)
		fault_record(w->f, true);
	err = world_open(w);
	if (err)
		world_fail(w, "open: %s %s", strerror(-err), w->message);
	if (!l.with_open)
		fault_record(w->f, true);
	fault_keep_discarded(w->f, l.keep_discarded);
	for (unsigned i = 0; i < l.n; i++) {
		memset(&at, 0, sizeof(at));
		err = ops[l.op[i]].fn(w, &at);
		if (err == -ENOENT || err == -EEXIST || err == -ENOTEMPTY ||
		    err == -ENODATA)
			continue;	/* the one before took it away */
		if (err)
			world_fail(w, "%s: %s", ops[l.op[i]].name, strerror(-err));
		err = do_sync(w, l.sync[i], &at);
		if (err)
			world_fail(w, "%s: %s", sync_name[l.sync[i]], strerror(-err));
	}
	world_check(w);
	if (l.close) {
		err = world_close(w);
		if (err)
			world_fail(w, "close: %s", strerror(-err));
	}
	world_explore(w, &plan, true);
	states += w->crashes;
	recoveries += w->recoveries;
	workloads++;
	world_destroy(w);
}

static void report(const char *what, const struct timespec *since)
{
	struct timespec t;
	double s;

	clock_gettime(CLOCK_MONOTONIC, &t);
	s = (double)(t.tv_sec - since->tv_sec) + 1e-9 * (double)(t.tv_nsec - since->tv_nsec);
	print_message("%s: %" PRIu64 " workloads, %" PRIu64 " crash states, %" PRIu64
		      " recoveries, %.1f s, %.0f states/s\n", what, workloads, states,
		      recoveries, s, (double)states / s);
}

/* Through `total` numbers from `first` in an order that looks random. */
static void sweep(uint64_t first, uint64_t total, struct effort e)
{
	uint64_t step = 1000003 % total | 1, at = seed % total;

	for (uint64_t a = step, b = total; b;) {	/* step and total coprime? */
		uint64_t c = a % b;

		a = b;
		b = c;
		if (!b && a != 1) {
			step += 2;
			a = step;
			b = total;
		}
	}
	states = recoveries = workloads = 0;
	for (uint64_t i = 0; i < total && !effort_spent(&e, states); i++) {
		run(first + at, 0);
		at = (at + step) % total;
	}
}

static void pairs_of_operations_survive_any_power_cut(void **state)
{
	struct timespec t;

	(void)state;
	clock_gettime(CLOCK_MONOTONIC, &t);
	if (getenv("WORKLOAD")) {
		run(env_u64("WORKLOAD", 0), env_u64("STATE", 0));
		return;
	}
	sweep(0, PAIRS, effort_begin(30000, 30));
	report("pairs", &t);
}

static void triples_of_operations_survive_any_power_cut(void **state)
{
	struct timespec t;

	(void)state;
	clock_gettime(CLOCK_MONOTONIC, &t);
	if (getenv("WORKLOAD"))
		return;
	sweep(PAIRS, 40000, effort_begin(15000, 20));
	report("triples", &t);
}

/* The proof that this suite can fail. */
static void a_device_that_lies_about_flushes_is_caught(void **state)
{
	uint64_t caught = 0, tried = 0;

	(void)state;
	if (getenv("WORKLOAD"))
		return;
	for (unsigned i = 0; i < 40; i++) {
		struct fault_plan plan = {.seed = seed + i, .random = 4};
		struct world *w = world_fork(base);
		struct at at = {0};

		w->quiet = true;
		assert_int_equal(world_open(w), 0);
		fault_record(w->f, true);
		fault_lie(w->f, true);
		if (ops[i % OPS].fn(w, &at) == 0 && at.file &&
		    do_sync(w, 1 + i % 2, &at) == 0 &&
		    w->promised > base->t) {
			tried++;
			world_explore(w, &plan, true);
			caught += w->violations > 0;
		}
		world_destroy(w);
	}
	print_message("lying flushes: caught in %" PRIu64 " of %" PRIu64 " workloads\n",
		      caught, tried);
	assert_true(tried > 20);
	assert_int_equal(caught, tried);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(pairs_of_operations_survive_any_power_cut),
		cmocka_unit_test(triples_of_operations_survive_any_power_cut),
		cmocka_unit_test(a_device_that_lies_about_flushes_is_caught),
	};
	struct world_options opt = {
		.bytes = 2u << 20,
		.volume = {.no_threads = true, .discard = true, .shards = 2},
		.fs = {.noatime = true},
	};

	seed = env_u64("SEED", 1);
	setup(&opt);
	int failed = cmocka_run_group_tests(tests, NULL, NULL);

	world_destroy(base);
	return failed;
}
