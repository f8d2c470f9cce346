/* SPDX-License-Identifier: BSD-2-Clause */

/*
 * Recovery itself: cut a second and a third time while it runs, done twice,
 * done on top of what an older lap, mount or mkfs left in the ring.
 *
 *   SEED=n     (default 1)
 *   STATES=n   about so many crash states in each test; 0: many
 */

#include "tests/model.h"
#include "tests/script.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static uint64_t seed;

/* Each test has a share. */
static struct effort share(uint64_t states, unsigned seconds)
{
	struct effort e = effort_begin(states, seconds);

	if (e.states && !e.until_ns)
		e.states = 1 + e.states * states / 12000;
	return e;
}

static const struct world_options options = {
	.bytes = 1u << 20,
	.volume = {.no_threads = true, .discard = true, .shards = 2,
		   .cache_bytes = 1u << 20},
	.fs = {.noatime = true},
};

/* A few operations on a handful of files. */
static void work(struct world *w, struct rng *r, unsigned steps)
{
	char name[16];

	for (unsigned i = 0; i < steps; i++) {
		uint64_t dir, ino = world_pick_file(w, r);
		int err = 0;

		switch (rng_below(r, 12)) {
		case 0:
		case 1:
			snprintf(name, sizeof(name), "f%u", (unsigned)rng_below(r, 12));
			world_create_file(w, world_pick_dir(w, r), name, 0644, 0, NULL);
			break;
		case 2:
			snprintf(name, sizeof(name), "d%u", (unsigned)rng_below(r, 4));
			world_mkdir(w, world_pick_dir(w, r), name, 0755, NULL);
			break;
		case 3: {
			char entry[256];

			if (!world_pick_entry(w, r, &dir, entry, &ino))
				break;
			if (S_ISDIR(world_mode(w, ino)))
				world_rmdir(w, dir, entry);
			else
				world_unlink(w, dir, entry);
			break;
		}
		case 4: {
			char entry[256];

			if (!world_pick_entry(w, r, &dir, entry, &ino))
				break;
			snprintf(name, sizeof(name), "f%u", (unsigned)rng_below(r, 12));
			world_rename(w, dir, entry, world_pick_dir(w, r), name, 0);
			break;
		}
		case 5:
			if (ino)
				world_truncate(w, ino, rng_below(r, 20000));
			break;
		case 6:
			if (ino)
				err = world_fsync(w, ino);
			break;
		case 7:
			if (rng_below(r, 3) == 0)
				err = world_checkpoint(w);
			break;
		default:
			if (ino)
				world_write(w, ino, rng_below(r, 12000),
					    1 + rng_below(r, 9000), rng_next(r));
		}
		if (err)
			world_fail(w, "sync failed: %s", strerror(-err));
	}
}

static void open_or_fail(struct world *w)
{
	int err = world_open(w);

	if (err)
		world_fail(w, "open: %s %s", strerror(-err), w->message);
}

static void close_or_fail(struct world *w)
{
	int err = world_close(w);

	if (err)
		world_fail(w, "close: %s", strerror(-err));
}

/* ---- cut again ------------------------------------------------------------------ */

struct again {
	struct world *w;
	unsigned depth;		/* how many more cuts */
	unsigned every;		/* go deeper in one of so many */
	uint64_t t;		/* what the first recovery found */
	uint64_t n[4];
};

static int cut_again(void *ctx, struct fault *crashed, const struct fault_cut *cut);

/* Recover `crashed`, cutting the power all along. */
static void deeper(struct again *a, struct fault *crashed, const struct fault_cut *cut)
{
	struct world *w = world_recover(a->w, crashed, cut);
	struct fault_plan plan = {
		.seed = seed + cut->number, .all_below = 4, .random = 2, .torn = 2,
	};
	struct again b = *a;
	uint64_t started = w->t, promised = w->t;

	/*
	 * Nothing was answered between the two cuts, so what the first one
	 * left is what the second one must leave.
	 */
	b.t = w->t;
	b.depth--;
	world_close(w);
	fault_explore(w->f, &plan, &started, &promised, true, cut_again, &b);
	memcpy(a->n, b.n, sizeof(a->n));
	world_destroy(w);
}

static int cut_again(void *ctx, struct fault *crashed, const struct fault_cut *cut)
{
	struct again *a = ctx;
	char what[128];
	struct fault *copy;

	a->n[a->depth]++;
	snprintf(what, sizeof(what), "cut again, %u to go: %.60s", a->depth, cut->text);
	copy = fault_create_over(crashed);
	world_crash_exactly(a->w, copy, a->t, what);
	fault_destroy(copy);
	if (a->depth && cut->number % a->every == 0)
		deeper(a, crashed, &(struct fault_cut){
			.number = cut->number, .promised = a->t, .started = a->t});
	return 0;
}

static int first_cut(void *ctx, struct fault *crashed, const struct fault_cut *cut)
{
	struct again *a = ctx;

	a->n[a->depth]++;
	if (rng_below(&(struct rng){seed ^ cut->number}, a->every) == 0)
		deeper(a, crashed, cut);
	return 0;
}

static void recovery_survives_a_second_and_a_third_cut(void **state)
{
	struct again a = {.depth = 2, .every = 12};
	struct effort e = share(12000, 15);

	(void)state;
	for (uint64_t i = 0; i < 1000; i++) {
		struct rng r = {seed + i};
		struct fault_plan plan = {
			.seed = seed + i, .all_below = 3, .random = 3, .torn = 3,
			.sparse = true,
		};
		struct world *w = world_create(&options, NULL);

		snprintf(repro, sizeof(repro), "crash_recovery: SEED=%" PRIu64, seed + i);
		fault_record(w->f, true);
		work(w, &r, 60 + (unsigned)rng_below(&r, 100));
		world_check(w);
		if (i & 1)
			close_or_fail(w);
		a.w = w;
		fault_explore(w->f, &plan, &w->log_started, &w->log_promised, true,
			      first_cut, &a);
		world_destroy(w);
		if (i >= 100 || effort_spent(&e, a.n[0] + a.n[1]))
			break;
	}
	print_message("first cuts %" PRIu64 ", second %" PRIu64 ", third %" PRIu64 "\n",
		      a.n[2], a.n[1], a.n[0]);
}

/* ---- whole chains ----------------------------------------------------------------- */

struct chain {
	struct world *w, *next;
	struct fault *copy;
	uint64_t at;
};

static int chain_cut(void *ctx, struct fault *crashed, const struct fault_cut *cut)
{
	struct chain *c = ctx;

	if (cut->number == c->at) {
		uint64_t bytes = fault_image(crashed)->bytes;
		uint8_t *buf = malloc(bytes);

		c->copy = fault_create(bytes);
		fault_peek(crashed, buf, bytes, 0);
		fault_poke(c->copy, buf, bytes, 0);
		free(buf);
		c->next = world_recover(c->w, c->copy, cut);
	}
	return world_crash(c->w, crashed, cut);
}

static void crash_after_crash_and_the_volume_goes_on(void **state)
{
	uint64_t n = 0, generations = 0;
	struct effort e = share(4000, 8);

	(void)state;
	for (uint64_t i = 0; i < 1000; i++) {
		struct rng r = {seed + 77 * i};
		struct world *w = world_create(&options, NULL);
		struct fault *under = NULL;

		snprintf(repro, sizeof(repro), "crash_recovery: SEED=%" PRIu64
			 " (chain %" PRIu64 ")", seed, i);
		fault_record(w->f, true);
		for (unsigned g = 0; g < 12; g++) {
			struct fault_plan plan = {
				.seed = rng_next(&r), .all_below = 2, .random = 1,
				.torn = 1, .sparse = true,
			};
			struct chain c = {.w = w, .at = 1 + rng_below(&r, 60)};

			work(w, &r, 20 + (unsigned)rng_below(&r, 60));
			world_check(w);
			fault_explore(w->f, &plan, &w->log_started, &w->log_promised,
				      true, chain_cut, &c);
			n += w->crashes;
			generations++;
			if (!c.next)
				break;
			world_destroy(w);
			fault_destroy(under);
			under = c.copy;
			w = c.next;
		}
		world_destroy(w);
		fault_destroy(under);
		if (i >= 60 || effort_spent(&e, n))
			break;
	}
	print_message("%" PRIu64 " generations, %" PRIu64 " crash states\n", generations, n);
}

/* ---- older things in the ring ------------------------------------------------------- */

static void nothing_of_an_older_mkfs_comes_back(void **state)
{
	uint64_t n = 0;
	struct effort e = share(3000, 8);

	(void)state;
	for (uint64_t i = 0; i < 1000; i++) {
		struct rng r = {seed + 31 * i};
		struct fault_plan plan = {
			.seed = seed + i, .all_below = 3, .random = 3, .torn = 3,
			.sparse = true,
		};
		struct world *old = world_create(&options, NULL), *w;
		struct fault *f;

		snprintf(repro, sizeof(repro), "crash_recovery: SEED=%" PRIu64
			 " (mkfs %" PRIu64 ")", seed, i);
		work(old, &r, 150);
		if (i & 1)
			close_or_fail(old);
		else
			world_abandon(old);
		/* The same again, over it: same blocks, same sequence numbers. */
		f = fault_create_over(old->f);
		w = world_create(&options, f);
		fault_record(w->f, true);
		work(w, &r, 100);
		world_check(w);
		world_explore(w, &plan, true);
		n += w->crashes;
		world_destroy(w);
		fault_destroy(f);
		world_destroy(old);
		if (i >= 60 || effort_spent(&e, n))
			break;
	}
	print_message("%" PRIu64 " crash states\n", n);
}

static void nothing_of_an_older_mount_comes_back(void **state)
{
	uint64_t n = 0;
	struct effort e = share(3000, 8);

	(void)state;
	for (uint64_t i = 0; i < 1000; i++) {
		struct rng r = {seed + 57 * i};
		struct fault_plan plan = {
			.seed = seed + i, .all_below = 3, .random = 2, .torn = 3,
			.sparse = true,
		};
		struct world *w = world_create(&options, NULL);

		snprintf(repro, sizeof(repro), "crash_recovery: SEED=%" PRIu64
			 " (mounts %" PRIu64 ")", seed, i);
		fault_record(w->f, true);
		/* Short mounts: the tail of the ring of one is under the next. */
		for (unsigned k = 0; k < 8; k++) {
			work(w, &r, (unsigned)rng_below(&r, 25));
			close_or_fail(w);
			open_or_fail(w);
		}
		world_check(w);
		world_explore(w, &plan, true);
		n += w->crashes;
		world_destroy(w);
		if (i >= 60 || effort_spent(&e, n))
			break;
	}
	print_message("%" PRIu64 " crash states\n", n);
}

/* mkfs over a volume, cut: the old one, the new one, or a refusal. */
struct mkfs {
	uint64_t old, fresh, refused, n;
	struct world *w;
};

static int mkfs_cut(void *ctx, struct fault *crashed, const struct fault_cut *cut)
{
	struct mkfs *m = ctx;
	struct volume_options o = options.volume;
	struct volume_stat st;
	struct volume *v;
	char msg[256] = "";
	int err = volume_open(fault_image(crashed), &o, &v, msg, sizeof(msg));

	(void)cut;
	m->n++;
	if (err) {
		m->refused++;
		if (!msg[0])
			world_fail(m->w, "refused without a sentence: %s", strerror(-err));
		return 0;
	}
	volume_stat(v, &st);
	volume_close(v);
	if (st.inodes == 1)
		m->fresh++;
	else if (st.inodes == world_inodes(m->w))
		m->old++;
	else
		world_fail(m->w, "neither the old volume nor the new: %" PRIu64 " inodes",
			   st.inodes);
	return 0;
}

static void mkfs_cut_short_leaves_the_old_or_the_new(void **state)
{
	struct mkfs m = {0};
	struct rng r = {seed};
	struct world *old = world_create(&options, NULL), *w;
	struct fault_plan plan = {.seed = seed, .all_below = 5, .random = 60, .torn = 60};
	struct fault *f;
	uint64_t zero = 0, nil = 0;

	(void)state;
	snprintf(repro, sizeof(repro), "crash_recovery: SEED=%" PRIu64 " (mkfs cut)", seed);
	work(old, &r, 150);
	close_or_fail(old);
	m.w = old;
	f = fault_create_over(old->f);
	fault_record(f, true);
	w = world_create(&options, f);
	world_abandon(w);
	fault_explore(f, &plan, &zero, &nil, true, mkfs_cut, &m);
	print_message("%" PRIu64 " cuts: old %" PRIu64 ", new %" PRIu64 ", refused %" PRIu64
		      "\n", m.n, m.old, m.fresh, m.refused);
	world_destroy(w);
	fault_destroy(f);
	world_destroy(old);
}

/* ---- looking twice -------------------------------------------------------------------- */

static int twice(void *ctx, struct fault *crashed, const struct fault_cut *cut)
{
	struct world *w = ctx;
	struct fault *copy;
	struct world *a, *b;

	/* Recovered twice from the same image, once with a look before. */
	copy = fault_create_over(crashed);
	a = world_recover(w, copy, cut);
	close_or_fail(a);
	b = world_recover(w, crashed, cut);
	if (a->t != b->t)
		world_fail(w, "recovered to operation %" PRIu64 ", then to %" PRIu64, a->t,
			   b->t);
	close_or_fail(b);
	/* And what was recovered stays so. */
	open_or_fail(a);
	world_check(a);
	close_or_fail(a);
	open_or_fail(a);
	world_check(a);
	close_or_fail(a);
	world_destroy(a);
	world_destroy(b);
	fault_destroy(copy);
	w->crashes++;
	return 0;
}

static void recovery_done_twice_gives_the_same(void **state)
{
	uint64_t n = 0;
	struct effort e = share(1500, 8);

	(void)state;
	for (uint64_t i = 0; i < 1000; i++) {
		struct rng r = {seed + 11 * i};
		struct fault_plan plan = {
			.seed = seed + i, .all_below = 2, .random = 2, .torn = 3,
			.sparse = true,
		};
		struct world *w = world_create(&options, NULL);

		snprintf(repro, sizeof(repro), "crash_recovery: SEED=%" PRIu64
			 " (twice %" PRIu64 ")", seed, i);
		fault_record(w->f, true);
		work(w, &r, 80);
		fault_explore(w->f, &plan, &w->log_started, &w->log_promised, true,
			      twice, w);
		n += w->crashes;
		world_destroy(w);
		if (i >= 60 || effort_spent(&e, n))
			break;
	}
	print_message("%" PRIu64 " crash states\n", n);
}

/* ---- killed, and then cut --------------------------------------------------------- */

static const struct step before_kill[] = {
	{.deed = CREATE, .file = 1},
	{.deed = WRITE, .file = 1, .len = 500},
	{.deed = WRITE, .file = 0, .len = 20000, .sync = true},
	{.deed = UNLINK, .file = 2},
	{.deed = CHECKPOINT},
	{.deed = CREATE, .file = 2},
	{.deed = WRITE, .file = 2, .len = 9000},
	{.deed = WRITE, .file = 1, .len = 700, .sync = true},
	{.deed = CHECKPOINT},
	{.deed = WRITE, .file = 0, .off = 4096, .len = 8192},
	{.deed = RENAME, .file = 2, .to = 1, .sync = true},
	{.deed = WRITE, .file = 0, .len = 300},
	{.deed = CHECKPOINT},
};

static const struct step after_kill[] = {
	{.deed = CREATE, .file = 3},
	{.deed = WRITE, .file = 3, .len = 15000, .sync = true},
	{.deed = WRITE, .file = 0, .len = 400, .sync = true},
	{.deed = CHECKPOINT},
	{.deed = WRITE, .file = 3, .len = 100, .sync = true},
};

static void mount_for(struct scripts *all, struct volume **v)
{
	char msg[256];
	int err = volume_open(fault_image(all->f), &options.volume, v, msg, sizeof(msg));

	if (err)
		fail_msg("%s: open: %s: %s", all->again, strerror(-err), msg);
	assert_int_equal(fs_open(*v, &options.fs, &all->fs), 0);
}

/*
 * A daemon ends at call n; true if that came. It is killed before any call, or a
 * flush fails, and what that was to cover the disk never has, though this host's
 * memory shows it. The next daemon goes on. Then what of it all is left by a cut?
 */
static bool end_at(struct scripts *all, enum fault_call kind, uint64_t n,
		   unsigned room_blks, struct fault_plan *plan)
{
	struct volume_geometry g = {.bytes = 1u << 20};
	uint64_t zero = 0, nil = 0;
	struct script *s;
	struct volume *v;
	bool killed;

	all->f = fault_create(g.bytes);
	assert_int_equal(volume_format(fault_image(all->f), &g), 0);
	mount_for(all, &v);
	scripts_init(all, 1, all->fs, all->f);
	scripts_leave(all->fs, room_blks);
	s = all->script;
	for (uint8_t i = 0; i < 3; i += 2) {
		script_add(s, (struct step){.deed = CREATE, .file = i});
		script_add(s, (struct step){.deed = WRITE, .file = i, .len = 9000 + i});
	}
	script_add(s, (struct step){.deed = CHECKPOINT});
	script_run(s, s->steps);
	fault_record(all->f, true);
	scripts_note(all);
	for (unsigned i = 0; i < sizeof(before_kill) / sizeof(before_kill[0]); i++)
		script_add(s, before_kill[i]);
	fault_fail(all->f, kind, n, EIO,
		   kind == FAULT_CALLS, kind == FAULT_FLUSH);
	script_run(s, s->steps);
	killed = fault_failures(all->f) != 0;
	fs_close(all->fs);
	volume_abandon(v);
	fault_fail(all->f, FAULT_CALLS, 0, 0, false, false);

	/* The next daemon finds what was written, be it on the disk or not; but
	   not what the disk has given up. */
	plan->from = fault_log_length(all->f);
	mount_for(all, &v);
	scripts_resume(all);
	scripts_note(all);
	for (unsigned i = 0; i < sizeof(after_kill) / sizeof(after_kill[0]); i++)
		script_add(s, after_kill[i]);
	script_run(s, s->steps);
	scripts_end(all);
	fs_close(all->fs);
	volume_abandon(v);
	fault_explore(all->f, plan, &zero, &nil, true, scripts_crash, all);
	scripts_fini(all);
	fault_destroy(all->f);
	return killed;
}

static void ends_and_then_a_cut(enum fault_call kind, struct effort effort)
{
	struct scripts all = {.effort = effort};
	char again[64];
	bool killed = true;

	all.again = again;
	for (uint64_t i = 0; killed && !effort_spent(&all.effort, all.states); i++) {
		/* On a full volume the next daemon takes what has just come free. */
		unsigned room_blks = i % 2 ? 80 : 22;
		struct fault_plan plan = {
			.seed = seed + i, .all_below = 3, .random = 4, .torn = 2,
		};

		snprintf(again, sizeof(again), "crash_recovery: SEED=%" PRIu64 " (%s %"
			 PRIu64 ")", seed, kind == FAULT_FLUSH ? "flush" : "killed", i);
		killed = end_at(&all, kind, i / 2, room_blks, &plan);
	}
	print_message("%" PRIu64 " crash states\n", all.states);
}

static void a_daemon_is_killed_and_then_the_power_is_cut(void **state)
{
	(void)state;
	ends_and_then_a_cut(FAULT_CALLS, share(12000, 10));
}

static void a_flush_fails_and_the_next_daemon_is_cut(void **state)
{
	(void)state;
	ends_and_then_a_cut(FAULT_FLUSH, share(12000, 10));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(recovery_survives_a_second_and_a_third_cut),
		cmocka_unit_test(crash_after_crash_and_the_volume_goes_on),
		cmocka_unit_test(nothing_of_an_older_mkfs_comes_back),
		cmocka_unit_test(nothing_of_an_older_mount_comes_back),
		cmocka_unit_test(mkfs_cut_short_leaves_the_old_or_the_new),
		cmocka_unit_test(recovery_done_twice_gives_the_same),
		cmocka_unit_test(a_daemon_is_killed_and_then_the_power_is_cut),
		cmocka_unit_test(a_flush_fails_and_the_next_daemon_is_cut),
	};

	seed = env_u64("SEED", 1);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
