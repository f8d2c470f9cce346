/* SPDX-License-Identifier: BSD-2-Clause */

/*
 * One thread is in the midst of a checkpoint, a commit, an fsync, and another
 * comes in between. Each write, flush and discard that the first thread makes
 * is held up, before it, during it or after it, while the second one does what
 * would do most harm: takes every block that is free, so that one given back
 * too early is written to at once; goes round the ring, so that what is given
 * back of it too early is written over; commits, syncs, checkpoints itself.
 * Then the power is cut, at every point from there on.
 *
 * Nothing is held over a flush but the checkpoint's own lock, so the second
 * thread comes to its end meanwhile, or to where it has to wait for the first
 * one: for journal room, for blocks, for the flush itself. It tells, since the
 * calls that can put a thread to sleep are wrapped here, and then the first one
 * goes on. No clock is asked, so two runs are the same, but for what both do
 * at once after such a wait.
 *
 *   SEED=n       of the crash states that are drawn (default 1)
 *   STATES=n     stop after about so many crash states; 0: all, and more of each
 *                (unset: seconds, and of most workloads a part)
 *   WORKLOAD=n, CALL=k, STATE=m   this one alone
 */

#include "tests/script.h"

#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <cmocka.h>

#define BLOCK 4096u

/* ---- the second thread ---------------------------------------------------------- */

struct second {
	struct script *script;
	pthread_t thread;
	bool runs;		/* and has to be joined */
	uint64_t from;		/* length of the log when it began */
	/* Under m: */
	pthread_mutex_t m;
	pthread_cond_t c;
	bool waits;		/* it has come to its end, or to a wait */
};

static _Thread_local struct second *me;

int __real_pthread_mutex_lock(pthread_mutex_t *m);
int __real_pthread_rwlock_rdlock(pthread_rwlock_t *l);
int __real_pthread_rwlock_wrlock(pthread_rwlock_t *l);
int __real_pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *m);
int __real_sched_yield(void);
int __real_nanosleep(const struct timespec *want, struct timespec *left);
int __wrap_pthread_mutex_lock(pthread_mutex_t *m);
int __wrap_pthread_rwlock_rdlock(pthread_rwlock_t *l);
int __wrap_pthread_rwlock_wrlock(pthread_rwlock_t *l);
int __wrap_pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *m);
int __wrap_sched_yield(void);
int __wrap_nanosleep(const struct timespec *want, struct timespec *left);

static void waiting(struct second *s)
{
	__real_pthread_mutex_lock(&s->m);
	s->waits = true;
	pthread_cond_signal(&s->c);
	pthread_mutex_unlock(&s->m);
}

int __wrap_pthread_mutex_lock(pthread_mutex_t *m)
{
	if (me) {
		if (pthread_mutex_trylock(m) == 0)
			return 0;
		waiting(me);
	}
	return __real_pthread_mutex_lock(m);
}

int __wrap_pthread_rwlock_rdlock(pthread_rwlock_t *l)
{
	if (me) {
		if (pthread_rwlock_tryrdlock(l) == 0)
			return 0;
		waiting(me);
	}
	return __real_pthread_rwlock_rdlock(l);
}

int __wrap_pthread_rwlock_wrlock(pthread_rwlock_t *l)
{
	if (me) {
		if (pthread_rwlock_trywrlock(l) == 0)
			return 0;
		waiting(me);
	}
	return __real_pthread_rwlock_wrlock(l);
}

int __wrap_pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *m)
{
	if (me)
		waiting(me);
	return __real_pthread_cond_wait(c, m);
}

int __wrap_sched_yield(void)
{
	if (me)
		waiting(me);
	return __real_sched_yield();
}

int __wrap_nanosleep(const struct timespec *want, struct timespec *left)
{
	if (me)
		waiting(me);
	return __real_nanosleep(want, left);
}

static void *second_main(void *arg)
{
	struct second *s = arg;

	me = s;
	script_run(s->script, s->script->steps);
	me = NULL;
	waiting(s);
	return NULL;
}

/* In the first thread, in the midst of a call. */
static void come_between(void *ctx)
{
	struct second *s = ctx;

	s->runs = true;
	s->from = fault_log_length(s->script->all->f);
	assert_int_equal(pthread_create(&s->thread, NULL, second_main, s), 0);
	__real_pthread_mutex_lock(&s->m);
	while (!s->waits)
		__real_pthread_cond_wait(&s->c, &s->m);
	pthread_mutex_unlock(&s->m);
	/* Not much more, where both go on at once. */
	atomic_store(&s->script->stop, true);
}

/* ---- what they do ------------------------------------------------------------------- */

static void create(struct script *s, uint8_t file)
{
	script_add(s, (struct step){.deed = CREATE, .file = file});
}

static void put(struct script *s, uint8_t file, uint32_t blk, uint32_t bytes, bool sync)
{
	script_add(s, (struct step){.deed = WRITE, .file = file, .sync = sync, .off = blk * BLOCK,
				    .len = bytes});
}

static void cut(struct script *s, uint8_t file, uint32_t bytes, bool sync)
{
	script_add(s, (struct step){.deed = TRUNCATE, .file = file, .sync = sync, .off = bytes});
}

static void drop(struct script *s, uint8_t file, bool sync)
{
	script_add(s, (struct step){.deed = UNLINK, .file = file, .sync = sync});
}

static void move(struct script *s, uint8_t file, uint8_t to, bool sync)
{
	script_add(s, (struct step){.deed = RENAME, .file = file, .to = to, .sync = sync});
}

static void copy(struct script *s, uint8_t file, uint8_t to, uint32_t blks, bool sync)
{
	script_add(s, (struct step){.deed = CLONE, .file = file, .to = to, .sync = sync,
				    .len = blks * BLOCK});
}

static void whole(struct script *s, enum deed deed)
{
	script_add(s, (struct step){.deed = deed});
}

/* What stands there before: f0 and f1 with data, f2 to be removed. */
static void begin(struct script *s)
{
	for (uint8_t i = 0; i < 3; i++)
		create(s, i);
	put(s, 0, 0, 4 * BLOCK, false);
	put(s, 1, 0, 2 * BLOCK + 700, false);
	put(s, 2, 0, 6 * BLOCK, false);
}

/* After a checkpoint: most of what a checkpoint can give back is freed. */
static void free_much(struct script *s)
{
	drop(s, 2, false);
	put(s, 0, 1, BLOCK, false);
	cut(s, 1, 1000, true);
}

/* So much in one piece that it is given to the host too. */
static void free_long(struct script *s)
{
	cut(s, 2, 0, false);
	put(s, 2, 0, 34 * BLOCK, true);
	drop(s, 2, true);
}

/* Or most of the ring is used. */
static void fill_ring(struct script *s)
{
	for (unsigned i = 0; i < 5; i++)
		put(s, 1, 0, 300 + i, true);
}

/* The first thread's part: each call of it is held up. */

static void first_checkpoint(struct script *s)
{
	put(s, 1, 0, 200, false);
	whole(s, CHECKPOINT);
}

static void first_fsync_small(struct script *s)
{
	create(s, 3);
	put(s, 3, 0, 100, true);
}

static void first_fsync_big(struct script *s)
{
	put(s, 0, 0, 5 * BLOCK, false);
	put(s, 1, 0, 3000, true);
}

/* Unflushed at first, so that the checkpoint finds held and riding data. */
static void first_mixed(struct script *s)
{
	put(s, 1, 0, 200, true);
	put(s, 0, 2, BLOCK, false);
	create(s, 3);
	put(s, 3, 0, 10, false);
	whole(s, CHECKPOINT);
	put(s, 3, 0, 20, true);
}

/* There is no space, or no room in the ring, before a checkpoint. */
static void first_fill(struct script *s)
{
	create(s, 3);
	for (unsigned i = 0; i < 12; i++)
		put(s, 3, 4 * i, 4 * BLOCK, i % 4 == 3);
}

static void first_ring(struct script *s)
{
	whole(s, CHECKPOINT);
	for (unsigned i = 0; i < 20; i++)
		put(s, 1, 0, 400 + i, true);
}

static void first_names(struct script *s)
{
	create(s, 3);
	copy(s, 0, 3, 4, false);
	move(s, 3, 1, true);
	cut(s, 1, BLOCK + 5, false);
	drop(s, 0, true);
	whole(s, TICK);
}

static void first_tick(struct script *s)
{
	drop(s, 0, false);
	whole(s, TICK);
	whole(s, TICK);
	whole(s, TICK);
}

static void first_trim(struct script *s)
{
	whole(s, CHECKPOINT);
	whole(s, TRIM);
	whole(s, SYNC);
}

/* The second thread's: all that it gets to before it ends or waits. */

static void second_ring(struct script *s)
{
	for (unsigned i = 0; i < 60; i++)
		put(s, 1, 0, 500 + i, true);
}

/* By turns what rides in its group and what is more than is held in memory; more
 * in all than there is. */
static void second_fill(struct script *s)
{
	for (uint8_t file = 4; file < 6; file++) {
		create(s, file);
		for (unsigned i = 0; i < 12; i++)
			put(s, file, 5 * i, (i % 2 ? 5 : 3) * BLOCK, true);
	}
}

static void second_fill_singly(struct script *s)
{
	create(s, 4);
	for (unsigned i = 0; i < 40; i++)
		put(s, 4, i, BLOCK, i % 8 == 7);
	cut(s, 4, 3 * BLOCK, true);
}

/* No sync before the end: where only a flush is waited for, all of it is done. */
static void second_unsynced(struct script *s)
{
	put(s, 0, 0, 3 * BLOCK, false);
	put(s, 1, 0, 600, false);
	create(s, 4);
	put(s, 4, 0, 6 * BLOCK, false);
	cut(s, 0, BLOCK + 9, false);
	drop(s, 1, false);
	put(s, 4, 1, 2 * BLOCK, false);
	move(s, 4, 5, true);
	put(s, 5, 0, BLOCK, true);
}

static void second_clones(struct script *s)
{
	create(s, 4);
	copy(s, 0, 4, 3, true);
	put(s, 0, 0, BLOCK, true);
	put(s, 4, 1, BLOCK, true);
	drop(s, 0, true);
	cut(s, 4, 10, true);
	create(s, 0);
	put(s, 0, 0, 4 * BLOCK, true);
}

/* Overwritten again and again: frees and takes. */
static void second_overwrites(struct script *s)
{
	for (unsigned i = 0; i < 20; i++)
		put(s, 0, 0, 4 * BLOCK, i % 2);
}

static void second_checkpoints(struct script *s)
{
	put(s, 1, 0, 50, false);
	whole(s, TICK);
	put(s, 0, 0, 2 * BLOCK, true);
	whole(s, CHECKPOINT);
	put(s, 0, 0, 2 * BLOCK, true);
	whole(s, SYNC);
}

typedef void (*part)(struct script *s);

static const struct {
	part part;
	unsigned room_blks;	/* left by a file that fills the volume */
} before[] = {
	{free_much, 40},
	{fill_ring, 80},
	{free_long, 96},
};
static const part first[] = {
	first_checkpoint, first_mixed, first_fsync_small, first_fsync_big, first_fill,
	first_ring, first_names, first_tick, first_trim,
};
static const part second[] = {
	second_fill, second_ring, second_unsynced, second_overwrites, second_clones,
	second_fill_singly, second_checkpoints,
};

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))
#define WHENS 3u

/* ---- one workload ------------------------------------------------------------------------ */

struct workload {
	unsigned first, second, before;
	enum fault_when when;
};

#define WORKLOADS (COUNT(first) * COUNT(second) * COUNT(before) * WHENS)
#define CORE (WORKLOADS / COUNT(first))

/* All that meets a plain checkpoint, and then of everything else some early. */
static struct workload workload(uint64_t number)
{
	uint64_t i = number;
	struct workload w;

	if (i >= CORE)
		i = CORE + (i - CORE) * 101 % (WORKLOADS - CORE);
	w.second = i % COUNT(second);
	i /= COUNT(second);
	w.before = i % COUNT(before);
	i /= COUNT(before);
	w.when = (enum fault_when)(i % WHENS);
	w.first = (unsigned)(i / WHENS);
	return w;
}

_Static_assert((WORKLOADS - CORE) % 101, "each workload once");

static const struct volume_options options = {
	.no_threads = true, .discard = true, .shards = 2, .cache_bytes = 4u << 20,
};

static uint64_t seed;
static uint64_t runs, met;	/* and those in which the second thread got its turn */

/* A volume of the least size, with room for so many blocks. */
static struct fault *base_make(unsigned room_blks)
{
	struct volume_geometry g = {
		.bytes = 1u << 20,
		.journal_bytes = JOURNAL_MIN_UNITS * JOURNAL_UNIT,
	};
	struct fault *f = fault_create(g.bytes);
	struct volume *v;
	char msg[256];
	struct fs *fs;

	assert_int_equal(volume_format(fault_image(f), &g), 0);
	assert_int_equal(volume_open(fault_image(f), &options, &v, msg, sizeof(msg)), 0);
	assert_int_equal(fs_open(v, &(struct fs_options){.noatime = true}, &fs), 0);
	scripts_leave(fs, room_blks);
	assert_int_equal(fs_close(fs), 0);
	assert_int_equal(volume_close(v), 0);
	return f;
}

/* What is there before the log begins; all of it durable. */
static void prepare(struct scripts *all, const struct workload *w)
{
	struct script *a = &all->script[0], *b = &all->script[1];

	begin(a);
	begin(b);
	script_run(b, b->steps);
	whole(a, CHECKPOINT);
	before[w->before].part(b);
	before[w->before].part(a);
	script_run(a, a->steps);
	script_run(b, b->steps);
	whole(a, SYNC);
	script_run(a, a->steps);
	for (unsigned i = 0; i < a->steps; i++)
		assert_false(a->refused[i] || b->refused[i]);
}

/* Hold up call n; returns how many calls there are. */
static uint64_t run(struct scripts *all, const struct fault *base, const struct workload *w,
		    uint64_t n, struct fault_plan *plan)
{
	struct fault *f = fault_create_over(base);
	struct second other = {0};
	struct script *a, *b;
	struct volume *v;
	char msg[256];
	struct fs *fs;
	uint64_t calls, zero = 0, nil = 0;

	pthread_mutex_init(&other.m, NULL);
	pthread_cond_init(&other.c, NULL);
	assert_int_equal(volume_open(fault_image(f), &options, &v, msg, sizeof(msg)), 0);
	assert_int_equal(fs_open(v, &(struct fs_options){.noatime = true}, &fs), 0);
	scripts_init(all, 2, fs, f);
	prepare(all, w);
	a = &all->script[0];
	b = &all->script[1];
	first[w->first](a);
	second[w->second](b);
	other.script = b;

	fault_record(f, true);
	scripts_note(all);
	fault_between(f, n, w->when, come_between, &other);
	script_run(a, a->steps);
	if (other.runs)
		pthread_join(other.thread, NULL);
	calls = fault_between(f, UINT64_MAX, FAULT_BEFORE, NULL, NULL);
	whole(a, SYNC);
	script_run(a, a->steps);
	scripts_end(all);
	runs++;
	assert_int_equal(fs_close(fs), 0);
	volume_abandon(v);
	if (other.runs) {
		met++;
		plan->from = other.from;
		fault_explore(f, plan, &zero, &nil, true, scripts_crash, all);
	}
	scripts_fini(all);
	fault_destroy(f);
	pthread_mutex_destroy(&other.m);
	pthread_cond_destroy(&other.c);
	return calls;
}

static void another_threads_work_in_the_midst_of_any_call_is_safe(void **state)
{
	struct scripts all = {.effort = effort_begin(1000000, 10)};
	bool thorough = getenv("STATES") && env_u64("STATES", 0) == 0;
	uint64_t from = 0, to = WORKLOADS, call = env_u64("CALL", 0);
	struct fault *base[COUNT(before)];
	char again[96];

	(void)state;
	for (unsigned i = 0; i < COUNT(before); i++)
		base[i] = base_make(before[i].room_blks);
	all.again = again;
	if (getenv("WORKLOAD")) {
		from = env_u64("WORKLOAD", 0);
		to = from + 1;
	}
	for (uint64_t number = from; number < to; number++) {
		struct workload w = workload(number);
		struct fault_plan plan = {
			.seed = seed + number, .all_below = 3,
			.random = thorough ? 6 : 1, .torn = thorough ? 4 : 1,
			.sparse = true, .only = env_u64("STATE", 0),
		};
		uint64_t calls = UINT64_MAX;

		/*
		 * In a hurry, a quarter of the calls of the many; and after a
		 * call is nearly before the next one.
		 */
		bool hurry = !from && !getenv("STATES");
		unsigned each = number < CORE || !hurry ? 1 : 4;

		if (hurry && w.when == FAULT_AFTER)
			continue;
		for (uint64_t n = call + number % each; n < calls; n += each) {
			snprintf(again, sizeof(again), "again: SEED=%" PRIu64 " WORKLOAD=%"
				 PRIu64 " CALL=%" PRIu64, seed, number, n);
			calls = run(&all, base[w.before], &w, n, &plan);
			if (effort_spent(&all.effort, all.states))
				goto out;
			if (getenv("CALL"))
				break;
		}
	}
out:
	print_message("%" PRIu64 " runs, in %" PRIu64 " of them a turn for the second thread;"
		      " %" PRIu64 " crash states\n", runs, met, all.states);
	for (unsigned i = 0; i < COUNT(before); i++)
		fault_destroy(base[i]);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(another_threads_work_in_the_midst_of_any_call_is_safe),
	};

	seed = env_u64("SEED", 1);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
