/* SPDX-License-Identifier: BSD-2-Clause */

/*
 * Several threads share one volume with its own timer and checkpoints, each in
 * a directory of its own, and cut at any moment: what a thread was told is
 * durable is there, and what it did is there up to some point of it, in its
 * order. The schedule is the machine's, so a failure comes back by trying.
 *
 *   SEED=n     (default 1)
 *   STATES=n   stop after about so many crash states; 0: 100 rounds
 */

#include "fs/fs.h"
#include "tests/check.h"
#include "tests/fault.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define THREADS 4
#define CYCLE 6		/* operations for one file */

/*
 * What a thread does, by number. A cycle c of operations is about one file:
 *   0  create "n<c>"               1  write it (length by c)
 *   2  rename it to "f<c>"         3  append to it
 *   4  truncate it to half         5  unlink "f<c-2>"
 * so the directory after any number of operations is known.
 */
struct worker {
	pthread_t thread;
	struct fs *fs;
	struct fault *f;
	unsigned who;
	unsigned ops;
	uint64_t seed;
	uint64_t dir;
	int err;
	unsigned failed_at;
};

static size_t length(unsigned who, unsigned c)
{
	struct rng r = {who * 1000 + c};

	return 1 + (size_t)rng_below(&r, rng_below(&r, 4) ? 3000 : 12000);
}

static void contents(uint8_t *to, size_t len, unsigned who, unsigned c, unsigned part)
{
	struct rng r = {who * 100000 + c * 10 + part};

	for (size_t i = 0; i < len; i++)
		to[i] = (uint8_t)rng_next(&r);
}

static int lookup(struct fs *fs, uint64_t dir, const char *name, uint64_t *ino)
{
	struct fs_entry e;
	int err = fs_lookup(fs, dir, name, &e);

	if (err)
		return err;
	*ino = e.ino;
	fs_forget(fs, e.ino, 1);
	return 0;
}

static int operate(struct worker *k, unsigned n, uint64_t *ino)
{
	static const struct fs_cred cred = {.umask = 0};
	unsigned c = n / CYCLE;
	size_t len = length(k->who, c);
	uint8_t buf[16000];
	char name[32], to[32];
	struct fs_entry e;
	struct stat st;
	ssize_t done;
	int err;

	snprintf(name, sizeof(name), "n%u", c);
	snprintf(to, sizeof(to), "f%u", c);
	switch (n % CYCLE) {
	case 0:
		err = fs_mknod(k->fs, &cred, k->dir, name, S_IFREG | 0600, 0, &e);
		if (!err)
			fs_forget(k->fs, e.ino, 1);
		*ino = e.ino;
		return err;
	case 1:
		err = lookup(k->fs, k->dir, name, ino);
		contents(buf, len, k->who, c, 0);
		done = err ? err : fs_write(k->fs, *ino, buf, len, 0, false);
		return done < 0 ? (int)done : 0;
	case 2:
		err = lookup(k->fs, k->dir, name, ino);
		return err ? err : fs_rename(k->fs, &cred, k->dir, name, k->dir, to, 0);
	case 3:
		err = lookup(k->fs, k->dir, to, ino);
		contents(buf, 500, k->who, c, 1);
		done = err ? err : fs_write(k->fs, *ino, buf, 500, (off_t)len, false);
		return done < 0 ? (int)done : 0;
	case 4:
		err = lookup(k->fs, k->dir, to, ino);
		st.st_size = (off_t)(len / 2);
		return err ? err : fs_setattr(k->fs, *ino, FS_SET_SIZE, &st);
	default:
		*ino = c < 2 ? 0 : k->dir;
		if (c < 2)
			return 0;
		snprintf(to, sizeof(to), "f%u", c - 2);
		return fs_unlink(k->fs, k->dir, to);
	}
}

static void *work(void *arg)
{
	struct worker *k = arg;
	struct rng r = {k->seed + k->who};

	for (unsigned n = 0; n < k->ops; n++) {
		uint64_t ino = k->dir;
		int err;

		fault_started_by(k->f, k->who, n + 1);
		err = operate(k, n, &ino);
		/* Where nothing was done the sync would promise nothing. */
		if (!err && rng_below(&r, 3) == 0 && ino) {
			err = fs_fsync(k->fs, ino, false);
			if (!err)
				fault_promised_by(k->f, k->who, n + 1);
		}
		if (err) {
			k->err = err;
			k->failed_at = n;
			break;
		}
	}
	return NULL;
}

/* ---- afterwards ------------------------------------------------------------------- */

struct listing {
	unsigned n;
	char name[8][32];
};

static int list(void *ctx, const char *name, const struct fs_entry *e, uint64_t next)
{
	struct listing *l = ctx;

	(void)e;
	(void)next;
	if (name[0] == '.')
		return 0;
	if (l->n == 8)
		return 1;
	snprintf(l->name[l->n++], 32, "%.31s", name);
	return 0;
}

/* Is the directory what it is after `n` operations? */
static bool matches(struct fs *fs, unsigned who, uint64_t dir, const struct listing *l,
		    unsigned n, char *why, size_t why_len)
{
	unsigned files = 0;
	uint8_t want[16000];
	char room[24000], *data;

	for (unsigned c = 0; c * CYCLE < n; c++) {
		unsigned k = n - c * CYCLE;	/* operations of its cycle done */
		size_t len = length(who, c), size;
		char name[32];
		uint64_t ino;
		ssize_t got;

		if (n >= (c + 2) * CYCLE + 6)
			continue;		/* unlinked */
		files++;
		snprintf(name, sizeof(name), k >= 3 ? "f%u" : "n%u", c);
		size = k < 2 ? 0 : k < 4 ? len : k < 5 ? len + 500 : len / 2;
		contents(want, len, who, c, 0);
		contents(want + len, 500, who, c, 1);
		if (lookup(fs, dir, name, &ino)) {
			snprintf(why, why_len, "no '%s' after %u", name, n);
			return false;
		}
		assert_true(fs_read_room(fs, 13000) <= sizeof(room));
		got = fs_read(fs, ino, room, 13000, 0, &data);
		if (got != (ssize_t)size || memcmp(data, want, size)) {
			snprintf(why, why_len, "'%s' has %zd bytes, after %u they are %zu",
				 name, got, n, size);
			return false;
		}
	}
	if (files != l->n) {
		snprintf(why, why_len, "%u names, after %u they are %u", l->n, n, files);
		return false;
	}
	return true;
}

struct verify {
	uint64_t dir[THREADS];
	uint64_t n;
	uint64_t spread;	/* sum of started - promised */
	uint64_t seed;
	struct effort e;
};

static int verify(void *ctx, struct fault *crashed, const struct fault_cut *cut)
{
	struct verify *v = ctx;
	struct volume_options o = {.no_threads = true, .cache_bytes = 4u << 20};
	struct volume *vol;
	char msg[512] = "", why[256] = "";
	struct fs *fs;
	int err;

	v->n++;
	for (unsigned pass = 0; pass < 3; pass++) {
		o.readonly = pass != 1;
		fault_image(crashed)->readonly = o.readonly;
		err = volume_open(fault_image(crashed), &o, &vol, msg, sizeof(msg));
		if (err)
			fail_msg("SEED=%" PRIu64 " state %" PRIu64 " (%s): open: %s: %s",
				 v->seed, cut->number, cut->text, strerror(-err), msg);
		assert_int_equal(fs_open(vol, &(struct fs_options){.noatime = true}, &fs), 0);
		for (unsigned i = 0; i < THREADS; i++) {
			struct listing l = {0};
			uint64_t n = cut->started_by[i];

			v->spread += n - cut->promised_by[i];
			err = fs_readdir(fs, v->dir[i], 0, false, list, &l);
			if (err)
				fail_msg("readdir: %s", strerror(-err));
			while (!matches(fs, i, v->dir[i], &l, (unsigned)n, why,
					sizeof(why))) {
				if (n == cut->promised_by[i])
					fail_msg("SEED=%" PRIu64 " state %" PRIu64 " (%s), pass"
						 " %u: thread %u, promised %" PRIu64 ", started %"
						 PRIu64 ": %s", v->seed, cut->number, cut->text,
						 pass, i, cut->promised_by[i],
						 cut->started_by[i], why);
				n--;
			}
		}
		err = 0;
		if (o.readonly)
			err = check_volume(vol, pass == 2, msg, sizeof(msg));
		else
			err = alloc_check(volume_alloc(vol), msg, sizeof(msg));
		if (err)
			fail_msg("SEED=%" PRIu64 " state %" PRIu64 " pass %u: %s", v->seed,
				 cut->number, pass, msg);
		fs_close(fs);
		err = volume_close(vol);
		if (err)
			fail_msg("close: %s", strerror(-err));
	}
	return effort_spent(&v->e, v->n);
}

static void round_of(uint64_t seed, struct verify *v)
{
	static const struct fs_cred cred = {.umask = 0};
	struct rng r = {seed};
	struct volume_geometry g = {
		.bytes = 4u << 20,
		.journal_bytes = JOURNAL_MIN_UNITS * JOURNAL_UNIT,
	};
	struct volume_options o = {
		.commit_ms = 20,
		.cache_bytes = 4u << 20,
		.discard = true,
	};
	struct fault_plan plan = {
		.seed = seed, .all_below = 2, .random = 3, .torn = 2, .sparse = true,
	};
	struct fault *f = fault_create(g.bytes);
	struct worker k[THREADS] = {0};
	struct volume *vol;
	char msg[256] = "";
	struct fs *fs;
	uint64_t started = 0, promised = 0;

	v->seed = seed;
	assert_int_equal(volume_geometry_check(&g, msg, sizeof(msg)), 0);
	assert_int_equal(volume_format(fault_image(f), &g), 0);
	assert_int_equal(volume_open(fault_image(f), &o, &vol, msg, sizeof(msg)), 0);
	assert_int_equal(fs_open(vol, &(struct fs_options){.noatime = true}, &fs), 0);
	for (unsigned i = 0; i < THREADS; i++) {
		char name[16];
		struct fs_entry e;

		snprintf(name, sizeof(name), "t%u", i);
		assert_int_equal(fs_mkdir(fs, &cred, ROOT_INO, name, 0755, &e), 0);
		fs_forget(fs, e.ino, 1);
		v->dir[i] = e.ino;
	}
	assert_int_equal(volume_checkpoint(vol), 0);
	fault_record(f, true);
	fault_slow_flush(f, (unsigned)rng_below(&r, 3) * 50);
	for (unsigned i = 0; i < THREADS; i++) {
		k[i] = (struct worker){
			.fs = fs, .f = f, .who = i, .seed = seed, .dir = v->dir[i],
			.ops = 40 + (unsigned)rng_below(&r, 40),
		};
		pthread_create(&k[i].thread, NULL, work, &k[i]);
	}
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(volume_checkpoint(vol), 0);
	for (unsigned i = 0; i < THREADS; i++)
		pthread_join(k[i].thread, NULL);
	for (unsigned i = 0; i < THREADS; i++)
		if (k[i].err)
			fail_msg("SEED=%" PRIu64 ": thread %u, operation %u: %s", seed, i,
				 k[i].failed_at, strerror(-k[i].err));
	assert_int_equal(fs_close(fs), 0);
	assert_int_equal(volume_close(vol), 0);
	fault_explore(f, &plan, &started, &promised, true, verify, v);
	fault_destroy(f);
}

static void what_fsync_promised_to_any_thread_is_there(void **state)
{
	uint64_t seed = env_u64("SEED", 1);
	struct verify v = {.e = effort_begin(12000, 20)};
	uint64_t rounds = 0;

	(void)state;
	do {
		round_of(seed + rounds, &v);
		rounds++;
	} while (rounds < 100 && !effort_spent(&v.e, v.n));
	print_message("%" PRIu64 " rounds, %" PRIu64 " crash states\n", rounds, v.n);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(what_fsync_promised_to_any_thread_is_there),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
