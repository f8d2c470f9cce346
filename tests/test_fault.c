/* SPDX-License-Identifier: BSD-2-Clause */

/*
 * Each read, write, flush, discard, promise of space and allocation of memory
 * of a fixed scenario fails, once or from then on. Nothing that was promised
 * is lost, no call that failed has half an effect, fsync says so, and after a
 * failure of the journal the volume is read-only and stays so.
 *
 *   STATES=n   at most so many runs of a kind, spread evenly; 0: all
 *   KIND=k INDEX=n MODE=m   this run alone, with its story
 */

#include "tests/check.h"
#include "tests/model.h"

#include <errno.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const struct world_options options = {
	.bytes = 1u << 20,
	.volume = {.no_threads = true, .discard = true, .shards = 2,
		   .cache_bytes = 1u << 20},
	.fs = {.noatime = true},
};

/* fsync() and friends: after the volume has failed they must say so. */
static void must_report(struct world *w, int err)
{
	struct volume_stat st;

	volume_stat(w->v, &st);
	if (st.failed && !err)
		world_fail(w, "the volume has failed, and a sync was answered");
	if (st.failed && !st.readonly)
		world_fail(w, "the volume has failed, and is not read-only");
}

/* Some of everything, with promises between. Errors are not its concern. */
static void scenario(struct world *w)
{
	uint64_t a = 0, b = 0, ino = 0, other = 0;
	struct rng r = {1};

	world_mkdir(w, ROOT_INO, "a", 0755, &a);
	world_mkdir(w, ROOT_INO, "b", 0755, &b);
	if (!a)
		a = ROOT_INO;
	if (!b)
		b = ROOT_INO;
	for (unsigned round = 0; round < 3; round++) {
		for (unsigned i = 0; i < 4; i++) {
			char name[16];

			snprintf(name, sizeof(name), "f%u", i);
			ino = 0;
			world_create_file(w, a, name, 0644, 0, &ino);
			if (!ino)
				ino = world_pick_file(w, &r);
			if (!ino)
				continue;
			world_write(w, ino, rng_below(&r, 3) * 1000, 1 + rng_below(&r, 9000),
				    round * 10 + i);
			if (i == 1)
				must_report(w, world_fsync(w, ino));
			if (i == 2)
				must_report(w, world_tick(w));
		}
		if (ino) {
			world_setxattr(w, ino, "user.x", 900, round);
			world_create_file(w, b, "copy", 0600, 0, &other);
			if (other)
				world_copy(w, ino, 0, other, 0, world_size(w, ino));
			world_truncate(w, ino, 777);
			world_fallocate(w, ino, FALLOC_FL_KEEP_SIZE, 0, 30000);
		}
		must_report(w, world_fsync(w, a));
		world_rename(w, a, "f0", b, "f0", 0);
		world_unlink(w, a, "f1");
		world_hold(w, a, "f2");
		world_unlink(w, a, "f2");
		must_report(w, world_checkpoint(w));
		while (w->n_held)
			world_let_go(w, w->held[0]);
		world_unlink(w, b, "copy");
		other = 0;
		if (round == 1) {
			must_report(w, world_sync(w));
		}
		world_unlink(w, a, "f3");
		world_unlink(w, b, "f0");
	}
	must_report(w, world_fsync(w, ROOT_INO));
}

static void silent(void *ctx, const char *text)
{
	(void)ctx;
	(void)text;
}

static struct world *base;
static uint64_t runs, reported, failed_opens, failed_volumes, states;

/* mode: 0 once, 1 for ever, 2 once and torn, 3 for ever and torn. */
static void run(unsigned kind, uint64_t index, unsigned mode, bool memory)
{
	static const char *const names[] = {
		"read", "write", "flush", "discard", "ensure", "any",
	};
	struct world *w = world_fork(base);
	struct volume_stat st = {0};
	struct fault_plan plan = {
		.seed = index, .all_below = 1, .random = 2, .torn = 1, .sparse = true,
	};
	int err;

	snprintf(repro, sizeof(repro), "test_fault: KIND=%u INDEX=%" PRIu64
		 " MODE=%u (%s fails)", memory ? 9 : kind, index, mode,
		 memory ? "memory" : names[kind]);
	runs++;
	fault_record(w->f, true);
	if (memory)
		fault_memory(index, mode & 1);
	else
		fault_fail(w->f, kind, index, EIO, mode & 1, mode & 2);
	err = world_open(w);
	if (err) {
		failed_opens++;
	} else {
		scenario(w);
		volume_stat(w->v, &st);
		failed_volumes += st.failed;
	}
	if (memory)
		fault_memory(UINT64_MAX, false);
	else if (!(mode & 1))
		fault_fail(w->f, kind, 0, 0, false, false);
	if (w->v) {
		/* What it shows is still right, where it can be read at all. */
		if (memory || kind != FAULT_READ || !(mode & 1))
			world_check(w);
		if (st.failed)
			must_report(w, world_sync(w));
		err = world_close(w);
		reported += err != 0;
		if (st.failed && !err)
			world_fail(w, "the volume has failed, and close says nothing");
		if (!st.failed && err && (memory || !(mode & 1)))
			world_fail(w, "close: %s", strerror(-err));
	}
	fault_fail(w->f, FAULT_READ, 0, 0, false, false);
	/* The image as it stands, and as a power cut now could leave it. */
	world_explore(w, &plan, true);
	states += w->crashes;
	world_destroy(w);
}

static uint64_t calls[FAULT_CALLS + 1], memory_calls;

static void count(void)
{
	struct world *w = world_fork(base);

	fault_memory(UINT64_MAX, false);
	if (world_open(w))
		world_fail(w, "open: %s", w->message);
	scenario(w);
	memory_calls = fault_memory(UINT64_MAX, false);
	world_close(w);
	for (unsigned i = 0; i < FAULT_CALLS; i++)
		calls[i] = fault_count(w->f, i);
	world_destroy(w);
}

static void sweep(unsigned kind, unsigned modes, bool memory)
{
	uint64_t n = memory ? memory_calls : calls[kind];
	struct effort e = effort_begin(150, 20);	/* runs */
	uint64_t step = 1;

	if (getenv("INDEX")) {
		if (env_u64("KIND", 0) == (memory ? 9 : kind))
			run(kind, env_u64("INDEX", 0), (unsigned)env_u64("MODE", 0), memory);
		return;
	}
	runs = reported = failed_opens = failed_volumes = states = 0;
	if (e.states && n * modes > e.states)
		step = (n * modes + e.states - 1) / e.states;
	for (unsigned mode = 0; mode < modes; mode++)
		for (uint64_t i = mode % step; i < n && !effort_spent(&(struct effort){
			     .until_ns = e.until_ns}, 0); i += step)
			run(kind, i, mode, memory);
	print_message("%" PRIu64 " indices, %" PRIu64 " runs, %" PRIu64 " crash states; open "
		      "failed in %" PRIu64 ", the volume in %" PRIu64 ", close in %" PRIu64
		      "\n", n, runs, states, failed_opens, failed_volumes, reported);
}

static void a_failing_write_loses_nothing_that_was_promised(void **state)
{
	(void)state;
	sweep(FAULT_WRITE, 4, false);
}

static void a_failing_flush_loses_nothing_that_was_promised(void **state)
{
	(void)state;
	sweep(FAULT_FLUSH, 4, false);
}

static void a_failing_read_is_an_error_and_no_more(void **state)
{
	(void)state;
	sweep(FAULT_READ, 2, false);
}

static void a_failing_discard_does_not_matter(void **state)
{
	(void)state;
	sweep(FAULT_DISCARD, 2, false);
}

static void a_host_without_room_loses_nothing(void **state)
{
	(void)state;
	sweep(FAULT_ENSURE, 2, false);
}

/* Who looks is shown the other one, who would write is refused. */
static void a_superblock_that_cannot_be_read_forbids_writing(void **state)
{
	(void)state;
	for (unsigned i = 0; i < SUPER_SLOTS; i++) {
		struct fault *f = fault_create_over(base->f);
		struct image *im = fault_image(f);
		struct disk_super s, all;
		char msg[200];
		unsigned slot, newest;

		assert_int_equal(super_load(im, &all, &newest, msg, sizeof(msg)), 0);
		fault_fail(f, FAULT_READ, i, EIO, false, false);
		assert_int_equal(super_load(im, &s, &slot, msg, sizeof(msg)), 0);
		assert_int_equal(slot, 1 - i);
		fault_fail(f, FAULT_READ, i, EIO, false, false);
		assert_int_equal(super_load_to_write(im, &s, &slot, msg, sizeof(msg)),
				 -EIO);
		assert_int_equal(slot, 1 - i);
		fault_fail(f, FAULT_READ, 0, 0, false, false);
		assert_int_equal(super_load_to_write(im, &s, &slot, msg, sizeof(msg)),
				 0);
		assert_int_equal(slot, newest);
		assert_memory_equal(&s, &all, sizeof(s));
		fault_destroy(f);
	}
}

static void memory_that_runs_out_loses_nothing(void **state)
{
	(void)state;
	sweep(0, 2, true);
}

/* ---- after a crash ---------------------------------------------------------- */

/* Promised, and in the journal's tail alone: data that rides, and data beside it. */
static struct world *crashed_world(void)
{
	struct world_options opt = options;
	struct world *w;
	uint64_t ino = 0;

	opt.bytes = 4u << 20;
	w = world_create(&opt, NULL);
	scenario(w);
	world_create_file(w, ROOT_INO, "small", 0644, 0, &ino);
	world_write(w, ino, 0, 3000, 2);
	must_report(w, world_fsync(w, ino));
	world_create_file(w, ROOT_INO, "large", 0644, 0, &ino);
	world_write(w, ino, 0, 200000, 1);
	must_report(w, world_fsync(w, ino));
	world_abandon(w);
	return w;
}

/*
 * Whatever fails while a volume is opened after a crash: it opens with all that
 * was promised, or not at all, and the next time it does.
 */
static uint64_t reopen(struct world *from, unsigned kind, uint64_t n, bool for_ever)
{
	struct world *w = world_fork(from);
	uint64_t count_now;
	int err;

	snprintf(repro, sizeof(repro), "test_fault: open after a crash, KIND=%u "
		 "INDEX=%" PRIu64 " MODE=%d", kind, n, for_ever);
	fault_memory(UINT64_MAX, false);
	if (kind == FAULT_CALLS)
		fault_memory(n, for_ever);
	else
		fault_fail(w->f, kind, n, EIO, for_ever, false);
	err = world_open(w);
	count_now = fault_memory(UINT64_MAX, false);
	if (kind != FAULT_CALLS)
		count_now = fault_count(w->f, kind);
	fault_fail(w->f, FAULT_READ, 0, 0, false, false);
	failed_opens += err != 0;
	if (err)
		err = world_open(w);
	if (err)
		world_fail(w, "open: %s: %s", strerror(-err), w->message);
	world_check(w);
	err = world_close(w);
	if (err)
		world_fail(w, "close: %s", strerror(-err));
	world_destroy(w);
	return count_now;
}

static void an_open_that_fails_loses_nothing(void **state)
{
	static const unsigned kinds[] = {FAULT_READ, FAULT_WRITE, FAULT_FLUSH,
					 FAULT_ENSURE, FAULT_CALLS};
	struct world *w = crashed_world();

	(void)state;
	for (unsigned k = 0; k < 5; k++) {
		struct effort e = effort_begin(0, 2);
		uint64_t n = reopen(w, kinds[k], UINT64_MAX, false);

		failed_opens = 0;
		for (uint64_t i = 0; i < n && !effort_spent(&e, 0); i++)
			for (unsigned for_ever = 0; for_ever < 2; for_ever++)
				reopen(w, kinds[k], i, for_ever);
		print_message("kind %u: %" PRIu64 " indices, open failed in %" PRIu64
			      "\n", kinds[k], n, failed_opens);
		assert_true(!n || failed_opens > 0);
	}
	world_destroy(w);
}

/* ---- two flushes at a time ------------------------------------------------------ */

/*
 * An image over another one: a host that tells of a write that failed once, to the
 * first of two flushes. It brings them together where they can be: once a write to
 * a superblock has come, that waits for the journal to be written by another thread;
 * then each flush waits for the other for some time.
 */
struct once {
	struct image im;
	struct image *under;
	pthread_mutex_t m;
	pthread_cond_t change;
	pthread_t writer;	/* of the superblock */
	bool armed, super, other, both;
	unsigned flushes, failures;
};

static struct once *once_of(struct image *im) { return (struct once *)im; }

/* Until it is so, but not for ever. */
static void once_wait_locked(struct once *o, const bool *what, unsigned ms)
{
	struct timespec due;

	clock_gettime(CLOCK_REALTIME, &due);
	due.tv_sec += ms / 1000;
	due.tv_nsec += (long)(ms % 1000) * 1000000;
	if (due.tv_nsec >= 1000000000) {
		due.tv_nsec -= 1000000000;
		due.tv_sec++;
	}
	while (!*what && !pthread_cond_timedwait(&o->change, &o->m, &due))
		;
}

static int once_pread(struct image *im, void *buf, size_t len, uint64_t off)
{
	return image_pread(once_of(im)->under, buf, len, off);
}

static int once_pwrite(struct image *im, const void *buf, size_t len, uint64_t off)
{
	struct once *o = once_of(im);
	int err = image_pwrite(o->under, buf, len, off);

	pthread_mutex_lock(&o->m);
	if (o->armed && !o->super && off < HEAD_BYTES) {
		o->writer = pthread_self();
		o->super = true;
		pthread_cond_broadcast(&o->change);
		once_wait_locked(o, &o->other, 60000);
	} else if (o->super && !pthread_equal(o->writer, pthread_self())) {
		o->other = true;
		pthread_cond_broadcast(&o->change);
	}
	pthread_mutex_unlock(&o->m);
	return err;
}

static int once_pwritev(struct image *im, const struct iovec *iov, int n, uint64_t off)
{
	return image_pwritev(once_of(im)->under, iov, n, off);
}

static int once_flush(struct image *im)
{
	struct once *o = once_of(im);
	int err = 0;

	pthread_mutex_lock(&o->m);
	if (o->super) {
		o->both = ++o->flushes > 1;
		pthread_cond_broadcast(&o->change);
		once_wait_locked(o, &o->both, 500);
		err = o->failures++ ? 0 : -EIO;
	}
	pthread_mutex_unlock(&o->m);
	return err ? err : image_flush(o->under);
}

static int once_discard(struct image *im, uint64_t off, uint64_t len)
{
	return image_discard(once_of(im)->under, off, len);
}

static int once_ensure(struct image *im, uint64_t off, uint64_t len)
{
	return image_ensure(once_of(im)->under, off, len);
}

static const struct image_ops once_ops = {
	.pread = once_pread,
	.pwrite = once_pwrite,
	.pwritev = once_pwritev,
	.flush = once_flush,
	.discard = once_discard,
	.ensure = once_ensure,
};

static void change_something(struct volume *v)
{
	struct inode *ip;
	struct txn *t;

	assert_int_equal(inode_get(v, ROOT_INO, &ip), 0);
	rwlock_write(&ip->lock);
	assert_int_equal(txn_begin(v, TXN_NORMAL, &t), 0);
	inode_edit(t, ip)->uid++;
	assert_int_equal(txn_commit(t), 0);
	rwlock_unlock(&ip->lock);
	inode_put(v, ip);
}

static void *checkpoint_thread(void *v)
{
	return (void *)(intptr_t)volume_checkpoint(v);
}

/*
 * A checkpoint flushes its superblock while another thread flushes a group. What the
 * host tells to one of them alone, both have to answer.
 */
static void a_host_that_tells_of_a_failure_once_is_believed(void **state)
{
	struct once o = {.m = PTHREAD_MUTEX_INITIALIZER,
			 .change = PTHREAD_COND_INITIALIZER};
	struct fault *f = fault_create_over(base->f);
	struct volume_options opt = options.volume;
	struct volume *v;
	char msg[200];
	pthread_t t;
	void *err;

	(void)state;
	snprintf(repro, sizeof(repro), "test_fault: two flushes");
	o.under = fault_image(f);
	o.im = (struct image){.ops = &once_ops, .bytes = o.under->bytes,
			      .name = o.under->name};
	opt.message = silent;
	assert_int_equal(volume_open(&o.im, &opt, &v, msg, sizeof(msg)), 0);
	change_something(v);
	pthread_mutex_lock(&o.m);
	o.armed = true;
	assert_int_equal(pthread_create(&t, NULL, checkpoint_thread, v), 0);
	once_wait_locked(&o, &o.super, 60000);
	pthread_mutex_unlock(&o.m);
	assert_true(o.super);
	change_something(v);
	assert_int_not_equal(volume_sync(v), 0);
	assert_int_equal(pthread_join(t, &err), 0);
	assert_int_not_equal((intptr_t)err, 0);
	assert_true(o.other);
	assert_int_equal(o.failures, 1);
	assert_int_not_equal(volume_close(v), 0);
	fault_destroy(f);
}

/* ---- a full host -------------------------------------------------------------- */

/*
 * The host gives no more blocks, for ever: what it has given is found again when
 * the volume is opened, after a crash too, and files can be removed.
 */
static void a_full_host_lets_files_be_removed(void **state)
{
	(void)state;
	for (unsigned crash = 0; crash < 2; crash++) {
		struct world_options opt = options;
		struct world *w;
		uint64_t dir = 0, ino;
		char name[16];
		int err = 0;

		snprintf(repro, sizeof(repro), "test_fault: a full host, crash %u", crash);
		opt.bytes = 8u << 20;
		opt.volume.discard = false;
		w = world_create(&opt, NULL);
		world_mkdir(w, ROOT_INO, "d", 0755, &dir);
		for (unsigned i = 0; i < 120; i++) {
			snprintf(name, sizeof(name), "f%u", i);
			assert_int_equal(world_create_file(w, dir, name, 0644, 0, &ino), 0);
			assert_int_equal(world_write(w, ino, 0, 20000, i), 0);
		}
		assert_int_equal(world_sync(w), 0);
		for (unsigned i = 0; i < 60; i++) {
			snprintf(name, sizeof(name), "f%u", i);
			assert_int_equal(world_unlink(w, dir, name), 0);
		}
		assert_int_equal(world_checkpoint(w), 0);
		if (crash)
			world_abandon(w);
		else
			assert_int_equal(world_close(w), 0);
		fault_fail(w->f, FAULT_ENSURE, 0, ENOSPC, true, false);
		for (unsigned round = 0; round < 2; round++) {
			err = world_open(w);
			if (err)
				world_fail(w, "open on a full host: %s: %s",
					   strerror(-err), w->message);
			for (unsigned i = 60 + round * 30; i < 90 + round * 30; i++) {
				snprintf(name, sizeof(name), "f%u", i);
				err = world_unlink(w, dir, name);
				if (err)
					world_fail(w, "unlink on a full host: %s",
						   strerror(-err));
				if (i % 8 == 0)
					assert_int_equal(world_sync(w), 0);
				if (i % 11 == 0)
					assert_int_equal(world_tick(w), 0);
			}
			world_check(w);
			/* New files are refused, or not; nothing else. */
			for (unsigned i = 0; i < 200 && !err; i++) {
				snprintf(name, sizeof(name), "n%u.%u", round, i);
				err = world_create_file(w, dir, name, 0644, 0, &ino);
				if (!err)
					err = world_write(w, ino, 0, 50000, i);
			}
			assert_true(!err || err == -ENOSPC);
			world_check(w);
			err = world_close(w);
			if (err)
				world_fail(w, "close on a full host: %s", strerror(-err));
		}
		fault_fail(w->f, FAULT_ENSURE, 0, 0, false, false);
		assert_int_equal(world_open(w), 0);
		/* They may have filled the volume. */
		err = world_unlink(w, dir, "n0.0");
		assert_true(!err || err == -ENOENT);
		assert_int_equal(world_create_file(w, dir, "again", 0644, 0, &ino), 0);
		assert_int_equal(world_write(w, ino, 0, 20000, 1), 0);
		world_check(w);
		assert_int_equal(world_close(w), 0);
		world_destroy(w);
	}
}

/* ---- after a failure ------------------------------------------------------------ */

/*
 * A checkpoint cannot write its nodes: they are all there is of what they say, and
 * stay in memory, however much else is read.
 */
static void what_a_checkpoint_could_not_write_can_be_read(void **state)
{
	struct world_options opt = options;
	struct world *w;
	char name[16];
	uint64_t ino;

	(void)state;
	snprintf(repro, sizeof(repro), "test_fault: nodes that cannot be written");
	opt.bytes = 16u << 20;
	w = world_create(&opt, NULL);
	for (unsigned i = 0; i < 400; i++) {
		snprintf(name, sizeof(name), "f%u", i);
		assert_int_equal(world_create_file(w, ROOT_INO, name, 0644, 0, &ino), 0);
		assert_int_equal(world_setxattr(w, ino, "user.x", 3000, i), 0);
	}
	assert_int_equal(world_checkpoint(w), 0);
	for (unsigned i = 0; i < 100; i++) {
		snprintf(name, sizeof(name), "/f%u", i);
		assert_int_equal(world_chmod(w, world_path(w, name), 0600), 0);
	}
	assert_int_equal(world_sync(w), 0);
	fault_fail(w->f, FAULT_WRITE, 0, EIO, true, false);
	assert_int_not_equal(world_checkpoint(w), 0);
	fault_fail(w->f, FAULT_WRITE, 0, 0, false, false);
	for (unsigned i = 0; i < 2; i++)
		world_check(w);
	assert_int_not_equal(world_close(w), 0);
	world_destroy(w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_failing_write_loses_nothing_that_was_promised),
		cmocka_unit_test(a_failing_flush_loses_nothing_that_was_promised),
		cmocka_unit_test(a_failing_read_is_an_error_and_no_more),
		cmocka_unit_test(a_failing_discard_does_not_matter),
		cmocka_unit_test(a_host_without_room_loses_nothing),
		cmocka_unit_test(a_superblock_that_cannot_be_read_forbids_writing),
		cmocka_unit_test(memory_that_runs_out_loses_nothing),
		cmocka_unit_test(an_open_that_fails_loses_nothing),
		cmocka_unit_test(a_host_that_tells_of_a_failure_once_is_believed),
		cmocka_unit_test(a_full_host_lets_files_be_removed),
		cmocka_unit_test(what_a_checkpoint_could_not_write_can_be_read),
	};
	int failed;

	base = world_create(&options, NULL);
	if (world_close(base))
		return 1;
	count();
	failed = cmocka_run_group_tests(tests, NULL, NULL);
	world_destroy(base);
	return failed;
}
