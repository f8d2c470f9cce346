/* SPDX-License-Identifier: BSD-2-Clause */
#include "tests/script.h"
#include "tests/check.h"

#include <errno.h>
#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const struct fs_cred cred = {.umask = 0};

#define FILE_BYTES (256u << 10)

static void name_of(char name[16], unsigned file)
{
	snprintf(name, 16, "f%u", file);
}

/* What step n of thread `who` writes. */
static void contents(uint8_t *to, size_t len, unsigned who, unsigned n)
{
	struct rng r = {who * 100000 + n};
	size_t i = 0;

	for (; i + 8 <= len; i += 8)
		memcpy(to + i, &(uint64_t){rng_next(&r)}, 8);
	for (; i < len; i++)
		to[i] = (uint8_t)rng_next(&r);
}

void scripts_init(struct scripts *all, unsigned n, struct fs *fs, struct fault *f)
{
	assert_true(n <= FAULT_WHO);
	all->script = calloc(n, sizeof(*all->script));
	assert_non_null(all->script);
	all->n = n;
	all->fs = fs;
	all->f = f;
	for (unsigned i = 0; i < n; i++) {
		struct fs_entry e;
		char name[16];

		snprintf(name, sizeof(name), "t%u", i);
		assert_int_equal(fs_mkdir(fs, &cred, ROOT_INO, name, 0755, &e), 0);
		fs_forget(fs, e.ino, 1);
		all->script[i].all = all;
		all->script[i].who = i;
		all->script[i].dir = e.ino;
	}
}

void scripts_fini(struct scripts *all)
{
	for (unsigned i = 0; i < all->n; i++)
		free(all->script[i].state);
	free(all->script);
	all->script = NULL;
	all->n = 0;
}

void scripts_leave(struct fs *fs, unsigned blks)
{
	struct volume *v = fs_volume(fs);
	struct volume_stat st;
	struct fs_entry e;

	assert_int_equal(fs_mknod(fs, &cred, ROOT_INO, "filler", S_IFREG | 0600, 0, &e), 0);
	assert_int_equal(volume_checkpoint(v), 0);
	volume_stat(v, &st);
	assert_true(st.avail_blks > blks);
	assert_int_equal(fs_fallocate(fs, e.ino, 0, 0, (off_t)(st.avail_blks - blks) *
						      st.block_bytes), 0);
	fs_forget(fs, e.ino, 1);
}

void script_add(struct script *s, struct step step)
{
	assert_true(s->steps < SCRIPT_STEPS);
	s->step[s->steps++] = step;
}

/* ---- doing it ----------------------------------------------------------------- */

static int lookup(struct fs *fs, uint64_t dir, unsigned file, uint64_t *ino)
{
	struct fs_entry e;
	char name[16];
	int err;

	name_of(name, file);
	err = fs_lookup(fs, dir, name, &e);
	if (err)
		return err;
	*ino = e.ino;
	fs_forget(fs, e.ino, 1);
	return 0;
}

static int create(struct script *s, const struct step *p, uint64_t *ino)
{
	struct fs_entry e;
	char name[16];
	int err;

	name_of(name, p->file);
	err = fs_mknod(s->all->fs, &cred, s->dir, name, S_IFREG | 0600, 0, &e);
	if (err)
		return err;
	*ino = e.ino;
	fs_forget(s->all->fs, e.ino, 1);
	return 0;
}

static int write_file(struct script *s, const struct step *p, unsigned n, uint64_t ino)
{
	uint8_t *buf = malloc(p->len);
	ssize_t done;

	contents(buf, p->len, s->who, n);
	done = fs_write(s->all->fs, ino, buf, p->len, p->off, false);
	free(buf);
	return done < 0 ? (int)done : done == (ssize_t)p->len ? 0 : -EIO;
}

static int clone_file(struct script *s, const struct step *p, uint64_t *ino)
{
	uint64_t from = *ino;
	int err = lookup(s->all->fs, s->dir, p->to, ino);
	ssize_t done;

	if (err)
		return err;
	done = fs_copy_file_range(s->all->fs, from, p->off, *ino, p->off, p->len);
	return done < 0 ? (int)done : done == (ssize_t)p->len ? 0 : -EIO;
}

static int rename_file(struct script *s, const struct step *p)
{
	char name[16], to[16];

	name_of(name, p->file);
	name_of(to, p->to);
	return fs_rename(s->all->fs, &cred, s->dir, name, s->dir, to, 0);
}

static int unlink_file(struct script *s, const struct step *p, uint64_t *ino)
{
	char name[16];

	name_of(name, p->file);
	*ino = s->dir;
	return fs_unlink(s->all->fs, s->dir, name);
}

static int of_file(struct script *s, const struct step *p, unsigned n, uint64_t *ino)
{
	struct stat st = {.st_size = p->off};
	int err = p->deed == CREATE ? 0 : lookup(s->all->fs, s->dir, p->file, ino);

	if (err)
		return err;
	switch (p->deed) {
	case CREATE:
		return create(s, p, ino);
	case WRITE:
		return write_file(s, p, n, *ino);
	case TRUNCATE:
		return fs_setattr(s->all->fs, *ino, FS_SET_SIZE, &st);
	case UNLINK:
		return unlink_file(s, p, ino);
	case RENAME:
		return rename_file(s, p);
	default:
		return clone_file(s, p, ino);
	}
}

static int of_volume(struct script *s, const struct step *p)
{
	struct volume *v = fs_volume(s->all->fs);
	uint64_t trimmed;

	switch (p->deed) {
	case SYNC:
		return fs_sync(s->all->fs);
	case CHECKPOINT:
		return volume_checkpoint(v);
	case TICK:
		return volume_tick(v);
	default:
		return fs_trim(s->all->fs, 0, UINT64_MAX / 2, 0, &trimmed);
	}
}

/* What frees has to succeed on a full volume too. */
static bool may_be_refused(const struct step *p)
{
	return p->deed != UNLINK && p->deed != TRUNCATE && p->deed < SYNC;
}

static int step_do(struct script *s, unsigned n)
{
	const struct step *p = &s->step[n];
	struct scripts *all = s->all;
	uint64_t ino = s->dir;
	bool durable = p->deed == SYNC || p->deed == CHECKPOINT;
	int err;

	for (unsigned i = 0; i < all->n; i++)
		s->seen[n][i] = atomic_load(&all->script[i].done);
	fault_started_by(all->f, s->who, n + 1);
	err = p->deed < SYNC ? of_file(s, p, n, &ino) : of_volume(s, p);
	if (err == -ENOSPC && may_be_refused(p)) {
		s->refused[n] = true;
		return 0;
	}
	if (!err && p->sync && p->deed < SYNC) {
		err = fs_fsync(all->fs, ino, false);
		if (!err)
			fault_promised_by(all->f, s->who, n + 1);
	}
	/* Everybody's, if it was done by then. */
	for (unsigned i = 0; i < all->n && durable && !err; i++)
		fault_promised_by(all->f, i, s->seen[n][i]);
	return err;
}

void script_run(struct script *s, unsigned upto)
{
	unsigned n = atomic_load(&s->done);

	while (n < upto && !s->err && !atomic_load(&s->stop)) {
		s->err = step_do(s, n);
		if (!s->err)
			atomic_store(&s->done, ++n);
	}
}

void scripts_note(struct scripts *all)
{
	for (unsigned i = 0; i < all->n; i++) {
		uint64_t done = atomic_load(&all->script[i].done);

		fault_started_by(all->f, i, done);
		fault_promised_by(all->f, i, done);
	}
}

/* ---- what it comes to ------------------------------------------------------------ */

/* The contents of a thread's files as they grow. */
struct room {
	uint8_t b[SCRIPT_FILES][FILE_BYTES];
};

static void resize(struct room *r, struct script_state *st, unsigned file, int64_t size)
{
	int64_t was = st->file[file].size;

	assert_true(size <= FILE_BYTES);
	if (size > was)
		memset(r->b[file] + was, 0, (size_t)(size - was));
	st->file[file].size = size;
}

static void step_predict(const struct script *s, unsigned n, struct room *r,
			 struct script_state *st)
{
	const struct step *p = &s->step[n];
	unsigned of = p->deed == RENAME || p->deed == CLONE ? p->to : p->file;
	int64_t end = (int64_t)p->off + p->len;

	if (p->deed == CREATE) {
		st->file[of].size = 0;
	} else if (p->deed == UNLINK) {
		st->file[of].size = -1;
	} else if (p->deed == TRUNCATE) {
		resize(r, st, of, p->off);
	} else if (p->deed == RENAME) {
		st->file[of].size = 0;
		resize(r, st, of, st->file[p->file].size);
		memcpy(r->b[of], r->b[p->file], (size_t)st->file[of].size);
		st->file[p->file].size = -1;
	} else if (p->deed == WRITE || p->deed == CLONE) {
		if (end > st->file[of].size)
			resize(r, st, of, end);
		if (p->deed == WRITE)
			contents(r->b[of] + p->off, p->len, s->who, n);
		else
			memcpy(r->b[of] + p->off, r->b[p->file] + p->off, p->len);
	} else {
		return;
	}
	if (st->file[of].size >= 0)
		st->file[of].sum = checksum(r->b[of], (size_t)st->file[of].size);
}

static const char *deed_name(const struct step *p)
{
	static const char *const names[] = {
		"create", "write", "truncate", "unlink", "rename", "clone", "sync",
		"checkpoint", "tick", "trim",
	};

	return names[p->deed];
}

static void script_predict(struct script *s)
{
	static struct room room;

	free(s->state);
	s->state = malloc((s->done + 1) * sizeof(*s->state));
	for (unsigned k = 0; k < SCRIPT_FILES; k++)
		s->state[0].file[k].size = -1;
	for (unsigned n = 0; n < s->done; n++) {
		s->state[n + 1] = s->state[n];
		if (!s->refused[n])
			step_predict(s, n, &room, &s->state[n + 1]);
	}
}

void scripts_end(struct scripts *all)
{
	for (unsigned i = 0; i < all->n; i++) {
		struct script *s = &all->script[i];

		if (s->err)
			fail_msg("%s: thread %u, step %u (%s): %s", all->again, i, s->done,
				 deed_name(&s->step[s->done]), strerror(-s->err));
		script_predict(s);
	}
}

/* ---- what is there ----------------------------------------------------------------- */

struct listing {
	struct fs *fs;
	struct script_state now;
	char why[128];
};

static int look(void *ctx, const char *name, const struct fs_entry *e, uint64_t next)
{
	static char room[FILE_BYTES + (2u << BLOCK_SHIFT_MAX)];
	struct listing *l = ctx;
	unsigned file = (unsigned)(name[1] - '0');
	ssize_t got;
	char *data;

	(void)next;
	if (name[0] == '.')
		return 0;
	if (name[0] != 'f' || file >= SCRIPT_FILES || name[2]) {
		snprintf(l->why, sizeof(l->why), "a name '%.20s'", name);
		return 1;
	}
	got = fs_read(l->fs, e->ino, room, FILE_BYTES, 0, &data);
	if (got < 0) {
		snprintf(l->why, sizeof(l->why), "'%s' is not read: %s", name,
			 strerror((int)-got));
		return 1;
	}
	l->now.file[file].size = got;
	l->now.file[file].sum = checksum(data, (size_t)got);
	return 0;
}

static bool same(const struct script_state *a, const struct script_state *b)
{
	for (unsigned i = 0; i < SCRIPT_FILES; i++)
		if (a->file[i].size != b->file[i].size ||
		    (a->file[i].size > 0 && a->file[i].sum != b->file[i].sum))
			return false;
	return true;
}

/* Where a directory stands: the least and the most steps that explain it. */
struct place {
	unsigned least, most;
};

static void differences(const struct script_state *is, const struct script_state *was,
			char *why, size_t len)
{
	size_t used = 0;

	*why = 0;
	for (unsigned i = 0; i < SCRIPT_FILES && used < len; i++)
		if (is->file[i].size != was->file[i].size ||
		    (is->file[i].size > 0 && is->file[i].sum != was->file[i].sum))
			used += (size_t)snprintf(why + used, len - used,
						 " f%u %" PRId64 " bytes, was %" PRId64, i,
						 is->file[i].size, was->file[i].size);
}

/* One directory; false with a sentence in `why`. */
static bool find_place(const struct script *s, struct fs *fs, unsigned least,
		       unsigned most, struct place *out, char *why, size_t len)
{
	struct listing l = {.fs = fs};
	unsigned n = most;
	int err;

	for (unsigned i = 0; i < SCRIPT_FILES; i++)
		l.now.file[i].size = -1;
	err = fs_readdir(fs, s->dir, 0, false, look, &l);
	if (err || l.why[0]) {
		snprintf(why, len, "%s", err ? strerror(-err) : l.why);
		return false;
	}
	while (n > least && !same(&l.now, &s->state[n]))
		n--;
	if (!same(&l.now, &s->state[n])) {
		char text[200];

		differences(&l.now, &s->state[most], text, sizeof(text));
		snprintf(why, len, "neither of what it was; after the last:%s", text);
		return false;
	}
	out->least = out->most = n;
	/* What is made and removed leaves no trace. */
	for (; n > least; n--)
		if (same(&l.now, &s->state[n - 1]))
			out->least = n - 1;
	while (out->least > 0 && same(&l.now, &s->state[out->least - 1]))
		out->least--;
	return true;
}

/*
 * Directories that are each sound, also together? If a step is there, what had
 * ended before it began is. Where several numbers explain what is there, the
 * least and the most of them.
 */
static bool in_order(const struct scripts *all, const struct place *at, char *why,
		     size_t len)
{
	for (unsigned i = 0; i < all->n; i++)
		for (unsigned k = 0; k < all->n && at[i].least; k++) {
			unsigned seen = all->script[i].seen[at[i].least - 1][k];

			if (at[k].most >= seen)
				continue;
			snprintf(why, len, "step %u of thread %u is there, but of thread"
				 " %u, where %u had ended, %u", at[i].least, i, k, seen,
				 at[k].most);
			return false;
		}
	return true;
}

void scripts_resume(struct scripts *all)
{
	struct place at[FAULT_WHO];
	char why[256];

	for (unsigned i = 0; i < all->n; i++) {
		struct script *s = &all->script[i];

		/* The step in which it was killed may have come to its effect. */
		if (s->err)
			s->done++;
		s->err = 0;
		script_predict(s);
		if (!find_place(s, all->fs, 0, s->done, &at[i], why, sizeof(why)))
			fail_msg("%s: thread %u after it was killed: %s", all->again, i, why);
	}
	if (!in_order(all, at, why, sizeof(why)))
		fail_msg("%s: after it was killed: %s", all->again, why);
	for (unsigned i = 0; i < all->n; i++) {
		all->script[i].steps = at[i].most;
		all->script[i].done = at[i].most;
	}
}

static void judge(const struct scripts *all, struct fs *fs, const struct fault_cut *cut,
		  unsigned pass)
{
	struct place at[FAULT_WHO];
	char why[256] = "";

	for (unsigned i = 0; i < all->n; i++)
		if (!find_place(&all->script[i], fs, (unsigned)cut->promised_by[i],
				(unsigned)cut->started_by[i], &at[i], why, sizeof(why))) {
			fault_log_print(all->f);
			fail_msg("%s STATE=%" PRIu64 " (%s), pass %u: thread %u, promised %"
				 PRIu64 ", started %" PRIu64 ": %s", all->again, cut->number,
				 cut->text, pass, i, cut->promised_by[i],
				 cut->started_by[i], why);
		}
	if (!in_order(all, at, why, sizeof(why))) {
		fault_log_print(all->f);
		fail_msg("%s STATE=%" PRIu64 " (%s), pass %u: %s", all->again, cut->number,
			 cut->text, pass, why);
	}
}

int scripts_crash(void *ctx, struct fault *crashed, const struct fault_cut *cut)
{
	struct scripts *all = ctx;
	struct volume_options o = {.no_threads = true, .shards = 2, .cache_bytes = 1u << 20};
	struct volume *v;
	char msg[512] = "";
	struct fs *fs;
	int err;

	all->states++;
	/* Read-only; for writing; what that left, read-only. */
	for (unsigned pass = 0; pass < 3; pass++) {
		o.readonly = pass != 1;
		fault_image(crashed)->readonly = o.readonly;
		err = volume_open(fault_image(crashed), &o, &v, msg, sizeof(msg));
		if (err) {
			fault_log_print(all->f);
			fail_msg("%s STATE=%" PRIu64 " (%s), pass %u: open: %s: %s",
				 all->again, cut->number, cut->text, pass, strerror(-err),
				 msg);
		}
		assert_int_equal(fs_open(v, &(struct fs_options){.noatime = true}, &fs), 0);
		judge(all, fs, cut, pass);
		if (o.readonly)
			err = check_volume(v, pass == 2, msg, sizeof(msg));
		else
			err = alloc_check(volume_alloc(v), msg, sizeof(msg));
		if (err) {
			fault_log_print(all->f);
			fail_msg("%s STATE=%" PRIu64 " (%s), pass %u: %s", all->again,
				 cut->number, cut->text, pass, msg);
		}
		fs_close(fs);
		err = volume_close(v);
		if (err)
			fail_msg("%s STATE=%" PRIu64 " (%s), pass %u: close: %s", all->again,
				 cut->number, cut->text, pass, strerror(-err));
	}
	return effort_spent(&all->effort, all->states);
}
