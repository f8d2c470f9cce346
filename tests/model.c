/* SPDX-License-Identifier: BSD-2-Clause */
#include "tests/model.h"
#include "tests/check.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/xattr.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

/* What the model needs is not what is to fail. */
#define malloc sim_malloc
#define calloc sim_calloc
#define realloc sim_realloc

char repro[512];

/* ---- values ------------------------------------------------------------------- */

struct blob {
	unsigned refs;
	size_t len;
	uint8_t b[];
};

struct entry {
	uint64_t ino;
	struct blob *name;	/* with its NUL */
};

struct xattr {
	struct blob *name, *value;
};

struct mnode {
	unsigned refs;
	uint64_t ino;
	uint64_t t;		/* operation that changed it last */
	uint64_t hash;		/* 0: not known */
	bool gone;		/* no name left: an orphan while it is held */
	uint32_t mode, nlink, uid, gid, flags, projid;
	uint64_t rdev, size;
	struct timespec atime, mtime, ctime, btime;
	struct blob *data;	/* contents or target; as long as size, or NULL */
	struct entry *entry;
	unsigned entries;
	struct xattr *xattr;
	unsigned xattrs;
};

struct state {
	unsigned refs;
	unsigned n;
	uint64_t hash;
	struct mnode *node[];
};

static void *must(void *p)
{
	if (!p)
		abort();
	return p;
}

static struct blob *blob_new(const void *from, size_t len)
{
	struct blob *b = must(malloc(sizeof(*b) + len + 1));

	b->refs = 1;
	b->len = len;
	if (from)
		memcpy(b->b, from, len);
	else
		memset(b->b, 0, len);
	b->b[len] = 0;
	return b;
}

static struct blob *blob_get(struct blob *b)
{
	if (b)
		b->refs++;
	return b;
}

static void blob_put(struct blob *b)
{
	if (b && --b->refs == 0)
		free(b);
}

static struct mnode *mnode_new(uint64_t ino)
{
	struct mnode *m = must(calloc(1, sizeof(*m)));

	m->refs = 1;
	m->ino = ino;
	return m;
}

static void mnode_put(struct mnode *m)
{
	if (--m->refs)
		return;
	blob_put(m->data);
	for (unsigned i = 0; i < m->entries; i++)
		blob_put(m->entry[i].name);
	for (unsigned i = 0; i < m->xattrs; i++) {
		blob_put(m->xattr[i].name);
		blob_put(m->xattr[i].value);
	}
	free(m->entry);
	free(m->xattr);
	free(m);
}

static struct mnode *mnode_dup(const struct mnode *m)
{
	struct mnode *d = must(malloc(sizeof(*d)));

	*d = *m;
	d->refs = 1;
	d->hash = 0;
	blob_get(d->data);
	d->entry = must(malloc((m->entries + 1) * sizeof(*d->entry)));
	for (unsigned i = 0; i < m->entries; i++) {
		d->entry[i] = m->entry[i];
		blob_get(d->entry[i].name);
	}
	d->xattr = must(malloc((m->xattrs + 1) * sizeof(*d->xattr)));
	for (unsigned i = 0; i < m->xattrs; i++) {
		d->xattr[i] = m->xattr[i];
		blob_get(d->xattr[i].name);
		blob_get(d->xattr[i].value);
	}
	return d;
}

static uint64_t mnode_hash(struct mnode *m)
{
	if (!m->hash) {
		uint64_t f[20] = {
			m->ino, m->mode, m->nlink, m->uid, m->gid, m->flags,
			m->projid, m->rdev, m->size,
			(uint64_t)m->atime.tv_sec, (uint64_t)m->atime.tv_nsec,
			(uint64_t)m->mtime.tv_sec, (uint64_t)m->mtime.tv_nsec,
			(uint64_t)m->ctime.tv_sec, (uint64_t)m->ctime.tv_nsec,
			(uint64_t)m->btime.tv_sec, (uint64_t)m->btime.tv_nsec,
		};

		/* Entries and xattrs have no order. */
		for (unsigned i = 0; i < m->entries; i++)
			f[17] += XXH3_64bits_withSeed(m->entry[i].name->b,
						      m->entry[i].name->len,
						      m->entry[i].ino);
		for (unsigned i = 0; i < m->xattrs; i++)
			f[18] += XXH3_64bits_withSeed(
				m->xattr[i].value->b, m->xattr[i].value->len,
				XXH3_64bits(m->xattr[i].name->b, m->xattr[i].name->len));
		if (m->data)
			f[19] = XXH3_64bits(m->data->b, m->data->len);
		m->hash = XXH3_64bits(f, sizeof(f)) | 1;
	}
	return m->hash;
}

static struct state *state_new(unsigned room)
{
	struct state *s = must(calloc(1, sizeof(*s) + room * sizeof(s->node[0])));

	s->refs = 1;
	return s;
}

static void state_put(struct state *s)
{
	if (--s->refs)
		return;
	for (unsigned i = 0; i < s->n; i++)
		mnode_put(s->node[i]);
	free(s);
}

/* With room for two more. */
static struct state *state_dup(const struct state *s)
{
	struct state *d = state_new(s->n + 2);

	d->n = s->n;
	for (unsigned i = 0; i < s->n; i++) {
		d->node[i] = s->node[i];
		d->node[i]->refs++;
	}
	return d;
}

static void state_hash(struct state *s)
{
	s->hash = 0;
	for (unsigned i = 0; i < s->n; i++)
		if (!s->node[i]->gone)
			s->hash += mnode_hash(s->node[i]);
}

static struct mnode *find(const struct state *s, uint64_t ino)
{
	for (unsigned i = 0; i < s->n; i++)
		if (s->node[i]->ino == ino)
			return s->node[i];
	return NULL;
}

/* A node of a state that is being made, to be changed. */
static struct mnode *edit(struct state *s, uint64_t ino)
{
	for (unsigned i = 0; i < s->n; i++) {
		struct mnode *m = s->node[i];

		if (m->ino != ino)
			continue;
		if (m->refs > 1) {
			m->refs--;
			m = s->node[i] = mnode_dup(m);
		}
		m->hash = 0;
		return m;
	}
	return NULL;
}

static void state_remove(struct state *s, uint64_t ino)
{
	for (unsigned i = 0; i < s->n; i++)
		if (s->node[i]->ino == ino) {
			mnode_put(s->node[i]);
			s->node[i] = s->node[--s->n];
			return;
		}
}

static struct entry *entry_find(const struct mnode *dir, const char *name)
{
	for (unsigned i = 0; i < dir->entries; i++)
		if (!strcmp((char *)dir->entry[i].name->b, name))
			return &dir->entry[i];
	return NULL;
}

static void entry_add(struct mnode *dir, const char *name, uint64_t ino)
{
	dir->entry = must(realloc(dir->entry, (dir->entries + 1) * sizeof(*dir->entry)));
	dir->entry[dir->entries].ino = ino;
	dir->entry[dir->entries++].name = blob_new(name, strlen(name));
}

static void entry_remove(struct mnode *dir, const char *name)
{
	struct entry *e = entry_find(dir, name);

	blob_put(e->name);
	*e = dir->entry[--dir->entries];
}

static struct state *now(const struct world *w) { return w->state[w->t - w->first]; }

/* ---- failing ------------------------------------------------------------------ */

static void story(struct world *w, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));

static void story(struct world *w, const char *fmt, ...)
{
	va_list ap;
	int n;

	if (w->story_len > 60000) {	/* the latest matters */
		memmove(w->story, w->story + 30000, w->story_len - 30000 + 1);
		w->story_len -= 30000;
	}
	if (w->story_room < w->story_len + 512) {
		w->story_room = 2 * w->story_room + 1024;
		w->story = must(realloc(w->story, w->story_room));
	}
	va_start(ap, fmt);
	n = vsnprintf(w->story + w->story_len, 500, fmt, ap);
	va_end(ap);
	w->story_len += n < 500 ? (size_t)n : 499;
}

static void report(struct world *w)
{
	fprintf(stderr, "---- what was done:\n%s", w->story ? w->story : "");
	if (w->message[0])
		fprintf(stderr, "---- the volume said: %s\n", w->message);
	fprintf(stderr, "---- again: %s\n", repro);
}

void world_fail(struct world *w, const char *fmt, ...)
{
	char text[1024];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	report(w);
	fprintf(stderr, "---- FAILED: %s\n", text);
	fail();
	abort();
}

static void on_message(void *ctx, const char *text)
{
	struct world *w = ctx;

	snprintf(w->message, sizeof(w->message), "%s", text);
}

/* ---- reading a volume ------------------------------------------------------------ */

struct reader {
	struct fs *fs;
	struct state *s;
	unsigned room;
	struct mnode *dir;
	char *why;
	size_t why_len;
	int err;
};

static struct mnode *reader_add(struct reader *r, uint64_t ino)
{
	struct mnode *m = find(r->s, ino);

	if (m)
		return m;
	if (r->s->n == r->room) {
		r->room *= 2;
		r->s = must(realloc(r->s, sizeof(*r->s) + r->room * sizeof(r->s->node[0])));
	}
	m = r->s->node[r->s->n++] = mnode_new(ino);
	return m;
}

static int reader_entry(void *ctx, const char *name, const struct fs_entry *e,
			uint64_t next)
{
	struct reader *r = ctx;

	(void)next;
	if (!strcmp(name, ".") || !strcmp(name, ".."))
		return 0;
	if (entry_find(r->dir, name)) {
		snprintf(r->why, r->why_len, "directory %" PRIu64 " names '%s' twice",
			 r->dir->ino, name);
		r->err = -EUCLEAN;
		return 1;
	}
	entry_add(r->dir, name, e->st.st_ino ? e->st.st_ino : e->ino);
	return 0;
}

static int read_attrs(struct fs *fs, struct mnode *m)
{
	struct stat st;
	int err = fs_getattr(fs, m->ino, &st);

	if (err)
		return err;
	m->mode = st.st_mode;
	m->nlink = (uint32_t)st.st_nlink;
	m->uid = st.st_uid;
	m->gid = st.st_gid;
	m->rdev = st.st_rdev;
	m->size = (uint64_t)st.st_size;
	m->atime = st.st_atim;
	m->mtime = st.st_mtim;
	m->ctime = st.st_ctim;
	m->hash = 0;
	err = fs_btime(fs, m->ino, &m->btime);
	if (err)
		return err;
	if (fs_getflags(fs, m->ino, &m->flags, &m->projid))
		m->flags = m->projid = 0;	/* not for every kind */
	return 0;
}

static int read_data(struct fs *fs, uint64_t ino, uint64_t size, uint8_t *to)
{
	size_t step = 1u << 20;
	char *room = must(malloc(fs_read_room(fs, size < step ? size : step)));
	int err = 0;

	for (uint64_t at = 0; at < size && !err;) {
		char *data = NULL;
		size_t want = size - at < step ? size - at : step;
		ssize_t n = fs_read(fs, ino, room, want, (off_t)at, &data);

		if (n < 0)
			err = (int)n;
		else if ((size_t)n != want)
			err = -EIO;	/* short before the end */
		else
			memcpy(to + at, data, (size_t)n);
		at += want;
	}
	free(room);
	return err;
}

static int read_xattrs(struct fs *fs, struct mnode *m)
{
	static __thread char list[65536], value[65536];
	ssize_t n = fs_listxattr(fs, NULL, m->ino, list, sizeof(list));

	if (n == -ENOTSUP || n == 0)
		return 0;
	if (n < 0)
		return (int)n;
	for (char *name = list; name < list + n; name += strlen(name) + 1) {
		ssize_t len = fs_getxattr(fs, m->ino, name, value, sizeof(value));

		if (len < 0)
			return (int)len;
		m->xattr = must(realloc(m->xattr, (m->xattrs + 1) * sizeof(*m->xattr)));
		m->xattr[m->xattrs].name = blob_new(name, strlen(name));
		m->xattr[m->xattrs++].value = blob_new(value, (size_t)len);
	}
	return 0;
}

/* Everything that can be reached from the root. */
static int read_state(struct fs *fs, struct state **out, char *why, size_t why_len)
{
	struct reader r = {
		.fs = fs, .s = state_new(16), .room = 16, .why = why, .why_len = why_len,
	};
	const char *what = "root";
	int err = 0;

	reader_add(&r, ROOT_INO);
	for (unsigned i = 0; i < r.s->n && !err; i++) {
		struct mnode *m = r.s->node[i];

		what = "getattr";
		err = read_attrs(fs, m);
		if (!err) {
			what = "xattrs";
			err = read_xattrs(fs, m);
		}
		if (err)
			goto broken;
		if (S_ISREG(m->mode)) {
			what = "read";
			m->data = blob_new(NULL, m->size);
			err = read_data(fs, m->ino, m->size, m->data->b);
		} else if (S_ISLNK(m->mode)) {
			char buf[4200];

			what = "readlink";
			err = fs_readlink(fs, m->ino, buf, sizeof(buf));
			if (!err) {
				size_t len = strlen(buf);

				m->data = blob_new(buf, len);
				err = len == m->size ? 0 : -EUCLEAN;
			}
		} else if (S_ISDIR(m->mode)) {
			what = "readdir";
			r.dir = m;
			err = fs_readdir(fs, m->ino, 0, false, reader_entry, &r);
			if (r.err) {
				err = r.err;
				goto out;
			}
			for (unsigned k = 0; k < m->entries && !err; k++)
				reader_add(&r, m->entry[k].ino);
		}
broken:
		if (err) {
			/* By which name? */
			snprintf(why, why_len, "%s of inode %" PRIu64 ": %s", what, m->ino,
				 strerror(-err));
			break;
		}
	}
out:
	if (err) {
		state_put(r.s);
		return err;
	}
	state_hash(r.s);
	*out = r.s;
	return 0;
}

/* ---- how two states differ -------------------------------------------------------- */

static void time_text(char *to, size_t len, const struct timespec *t)
{
	snprintf(to, len, "%lld.%09ld", (long long)t->tv_sec, t->tv_nsec);
}

static unsigned mnode_diff(const struct mnode *a, const struct mnode *b, bool print)
{
	unsigned n = 0;
	char x[40], y[40];

#define DIFF(field, fmt)                                                          \
	if (a->field != b->field) {                                               \
		n++;                                                              \
		if (print)                                                        \
			fprintf(stderr, "  inode %" PRIu64 " " #field ": " fmt    \
				", expected " fmt "\n", a->ino, b->field, a->field); \
	}
#define DIFF_TIME(field)                                                          \
	if (memcmp(&a->field, &b->field, sizeof(a->field))) {                     \
		n++;                                                              \
		if (print) {                                                      \
			time_text(x, sizeof(x), &a->field);                       \
			time_text(y, sizeof(y), &b->field);                       \
			fprintf(stderr, "  inode %" PRIu64 " " #field             \
				": %s, expected %s\n", a->ino, y, x);             \
		}                                                                 \
	}
	DIFF(mode, "%o")
	DIFF(nlink, "%u")
	DIFF(uid, "%u")
	DIFF(gid, "%u")
	DIFF(flags, "%x")
	DIFF(projid, "%u")
	DIFF(rdev, "%" PRIu64)
	DIFF(size, "%" PRIu64)
	DIFF_TIME(atime)
	DIFF_TIME(mtime)
	DIFF_TIME(ctime)
	DIFF_TIME(btime)
	if (a->data && b->data) {
		size_t len = a->data->len < b->data->len ? a->data->len : b->data->len;
		size_t i = 0, count = 0, last = 0, first = len;

		for (i = 0; i < len; i++)
			if (a->data->b[i] != b->data->b[i]) {
				if (!count++)
					first = i;
				last = i;
			}
		if (count) {
			n++;
			if (print)
				fprintf(stderr, "  inode %" PRIu64 ": %zu bytes differ, in %zu"
					" .. %zu: first %02x, expected %02x\n", a->ino, count,
					first, last, b->data->b[first], a->data->b[first]);
		}
	}
	for (unsigned k = 0; k < 2; k++) {
		const struct mnode *p = k ? b : a, *q = k ? a : b;

		for (unsigned i = 0; i < p->entries; i++) {
			const struct entry *e = entry_find(q, (char *)p->entry[i].name->b);

			if (e && (k || e->ino == p->entry[i].ino))
				continue;
			n++;
			if (print)
				fprintf(stderr, "  directory %" PRIu64 ": '%.40s' -> %" PRIu64
					" is %s\n", a->ino, p->entry[i].name->b,
					p->entry[i].ino, k ? "too much" : e ? "another" :
					"missing");
		}
		for (unsigned i = 0; i < p->xattrs; i++) {
			const struct xattr *x1 = &p->xattr[i], *x2 = NULL;

			for (unsigned j = 0; j < q->xattrs; j++)
				if (!strcmp((char *)q->xattr[j].name->b, (char *)x1->name->b))
					x2 = &q->xattr[j];
			if (x2 && (k || (x1->value->len == x2->value->len &&
					 !memcmp(x1->value->b, x2->value->b,
						 x1->value->len))))
				continue;
			n++;
			if (print)
				fprintf(stderr, "  inode %" PRIu64 ": xattr %s (%zu) is %s\n",
					a->ino, x1->name->b, x1->value->len,
					k ? "too much" : x2 ? "another" : "missing");
		}
	}
	return n;
}

/* How `got` differs from `want`. */
static unsigned state_diff(const struct state *want, const struct state *got, bool print)
{
	unsigned n = 0;

	for (unsigned i = 0; i < want->n; i++) {
		const struct mnode *a = want->node[i], *b = find(got, a->ino);

		if (a->gone)
			continue;
		if (b) {
			n += mnode_diff(a, b, print);
			continue;
		}
		n += 4;
		if (print)
			fprintf(stderr, "  inode %" PRIu64 " is missing\n", a->ino);
	}
	for (unsigned i = 0; i < got->n; i++) {
		const struct mnode *a = find(want, got->node[i]->ino);

		if (a && !a->gone)
			continue;
		n += 4;
		if (print)
			fprintf(stderr, "  inode %" PRIu64 " is too much\n",
				got->node[i]->ino);
	}
	return n;
}

/* ---- worlds --------------------------------------------------------------------------- */

static void push(struct world *w, struct state *s)
{
	uint64_t n = w->t - w->first;

	if (n >= w->room) {
		w->room = 2 * n + 16;
		w->state = must(realloc(w->state, w->room * sizeof(*w->state)));
		w->loose = must(realloc(w->loose, w->room * sizeof(*w->loose)));
	}
	w->state[n] = s;
	w->loose[n] = NO_INO;
}

void world_forget(struct world *w)
{
	uint64_t keep = w->log_promised, drop;

	if (keep > w->t)
		keep = w->t;
	if (keep <= w->first)
		return;
	drop = keep - w->first;
	for (uint64_t i = 0; i < drop; i++)
		state_put(w->state[i]);
	memmove(w->state, w->state + drop,
		(w->t - keep + 1) * sizeof(*w->state));
	memmove(w->loose, w->loose + drop,
		(w->t - keep + 1) * sizeof(*w->loose));
	w->first = keep;
}

static void world_volume_options(struct world *w)
{
	w->opt.volume.message = on_message;
	w->opt.volume.message_ctx = w;
	if (!w->opt.volume.cache_bytes)
		w->opt.volume.cache_bytes = 4u << 20;
	if (!w->opt.volume.program)
		w->opt.volume.program = "test";
}

int world_open(struct world *w)
{
	char msg[256] = "";
	int err = volume_open(fault_image(w->f), &w->opt.volume, &w->v, msg, sizeof(msg));

	if (err) {
		w->v = NULL;
		snprintf(w->message, sizeof(w->message), "%s", msg);
		return err;
	}
	err = fs_open(w->v, &w->opt.fs, &w->fs);
	if (err) {
		volume_abandon(w->v);
		w->v = NULL;
		w->fs = NULL;
	}
	w->n_held = 0;
	return err;
}

static void promise(struct world *w, uint64_t t)
{
	if (t > w->promised)
		w->promised = t;
	fault_promised(w->f, t);
}

/* What was held is gone now. */
static void drop_held(struct world *w)
{
	struct state *s = now(w);

	for (unsigned i = 0; i < s->n;)
		if (s->node[i]->gone)
			state_remove(s, s->node[i]->ino);
		else
			i++;
	w->n_held = 0;
}

int world_close(struct world *w)
{
	int err = 0, e;

	if (!w->v)
		return 0;
	story(w, "close\n");
	while (w->n_held)
		world_let_go(w, w->held[w->n_held - 1]);
	err = fs_close(w->fs);
	e = volume_close(w->v);
	if (!err)
		err = e;
	w->v = NULL;
	w->fs = NULL;
	if (!err)
		promise(w, w->t);
	drop_held(w);
	return err;
}

void world_abandon(struct world *w)
{
	if (!w->v)
		return;
	/*
	 * fs_close() would write; there is no other way to free what it holds,
	 * so let it talk to a dead volume.
	 */
	fault_fail(w->f, FAULT_CALLS, 0, EIO, true, false);
	fs_close(w->fs);
	volume_abandon(w->v);
	fault_fail(w->f, FAULT_CALLS, 0, 0, false, false);
	w->v = NULL;
	w->fs = NULL;
	drop_held(w);
}

struct world *world_create(const struct world_options *opt, struct fault *f)
{
	struct world *w = must(calloc(1, sizeof(*w)));
	struct volume_geometry g = {0};
	char msg[256] = "", why[256] = "";
	int err;

	w->opt = *opt;
	if (!w->opt.bytes)
		w->opt.bytes = 2u << 20;
	world_volume_options(w);
	w->f = f;
	if (!f) {
		w->f = fault_create(w->opt.bytes);
		w->own_f = true;
	}
	g.bytes = w->opt.bytes;
	g.block_shift = opt->block_shift;
	g.journal_bytes = opt->journal_bytes ? opt->journal_bytes :
			  JOURNAL_MIN_UNITS * JOURNAL_UNIT;
	memcpy(g.uuid, "a crash test uid", 16);
	err = volume_geometry_check(&g, msg, sizeof(msg));
	if (err)
		world_fail(w, "geometry: %s", msg);
	err = volume_format(fault_image(w->f), &g);
	if (err)
		world_fail(w, "mkfs: %s", strerror(-err));
	err = world_open(w);
	if (err)
		world_fail(w, "open after mkfs: %s %s", strerror(-err), w->message);
	w->first = w->t = 0;
	push(w, NULL);
	err = read_state(w->fs, &w->state[0], why, sizeof(why));
	if (err)
		world_fail(w, "reading after mkfs: %s", why);
	if (w->state[0]->n != 1)
		world_fail(w, "%u inodes after mkfs", w->state[0]->n);
	return w;
}

struct world *world_fork(const struct world *from)
{
	struct world *w = must(calloc(1, sizeof(*w)));

	assert(!from->v);
	w->opt = from->opt;
	world_volume_options(w);
	w->f = fault_create_over(from->f);
	w->own_f = true;
	w->first = w->t = from->t;
	w->promised = w->log_started = w->log_promised = from->t;
	push(w, now(from));
	w->state[0]->refs++;
	return w;
}

void world_destroy(struct world *w)
{
	if (!w)
		return;
	if (w->v)
		world_abandon(w);
	for (uint64_t i = 0; i <= w->t - w->first; i++)
		state_put(w->state[i]);
	free(w->state);
	free(w->loose);
	free(w->story);
	fault_destroy(w->scratch);
	if (w->own_f)
		fault_destroy(w->f);
	free(w);
}

/* ---- operations: the volume and the model in step ------------------------------------ */

static const struct fs_cred cred = {.uid = 0, .gid = 0, .umask = 0, .pid = 1};

static struct state *op_begin(struct world *w)
{
	fault_started(w->f, w->t + 1);
	return state_dup(now(w));
}

/* Errors that a volume may answer though the request was right. */
static bool excusable(int err)
{
	return err == -ENOSPC || err == -EIO || err == -EROFS || err == -ENOMEM ||
	       err == -EDQUOT;
}

/*
 * The volume's answer was `err`, ours `want`. If both are 0, `s` becomes the
 * newest state, after taking the times of ino[] from the volume.
 */
static int op_end(struct world *w, struct state *s, int err, int want,
		  const uint64_t *ino, unsigned n)
{
	if (err || want) {
		state_put(s);
		story(w, "   = %s\n", strerror(-err));
		if (err && (want || excusable(err)))
			return err;
		world_fail(w, "answered '%s', expected '%s'", strerror(-err),
			   strerror(-want));
	}
	fault_pause(w->f, true);
	for (unsigned i = 0; i < n; i++) {
		struct mnode *m = ino[i] ? find(s, ino[i]) : NULL;
		struct mnode was, *old = find(now(w), ino[i]);
		bool dir;

		if (!m)
			continue;
		m = edit(s, ino[i]);
		m->t = w->t + 1;
		was = *m;
		err = read_attrs(w->fs, m);
		if (err)
			world_fail(w, "getattr of %" PRIu64 ": %s", ino[i], strerror(-err));
		/* fsync() promises nothing newer than what changed. */
		if (old && mnode_hash(old) == mnode_hash(m))
			m->t = old->t;
		dir = S_ISDIR(m->mode);
		if (m->mode != was.mode || m->uid != was.uid || m->gid != was.gid ||
		    (!dir && (m->nlink != was.nlink || m->size != was.size)))
			world_fail(w, "inode %" PRIu64 ": mode %o nlink %u uid %u gid %u "
				   "size %" PRIu64 ", expected %o %u %u %u %" PRIu64,
				   ino[i], m->mode, m->nlink, m->uid, m->gid, m->size,
				   was.mode, was.nlink, was.uid, was.gid, was.size);
	}
	fault_pause(w->f, false);
	w->t++;
	state_hash(s);
	push(w, s);
	return 0;
}

/* The same for an operation that changes ino[0] in several steps, maybe. */
static int op_end_loose(struct world *w, struct state *s, const uint64_t *ino,
			unsigned n)
{
	op_end(w, s, 0, 0, ino, n);
	w->loose[w->t - w->first] = ino[0];
	return 0;
}

/*
 * It failed for want of space, in the middle perhaps: then what it did of `s`
 * stays, and is the newest state.
 */
static int op_end_halfway(struct world *w, struct state *s, int err, uint64_t ino);

#define INOS(...) (const uint64_t[]){__VA_ARGS__}, \
	sizeof((const uint64_t[]){__VA_ARGS__}) / sizeof(uint64_t)

static uint8_t byte_at(const struct mnode *m, uint64_t i)
{
	return m->data && i < m->data->len ? m->data->b[i] : 0;
}

/* Is it what a cut inside an operation can leave: `a` before, `b` after? */
static bool between(const struct state *a, const struct state *b,
		    const struct state *got, uint64_t ino)
{
	struct mnode *old = find(a, ino), *new = find(b, ino), *is = find(got, ino);
	struct mnode *same;
	bool fits;

	if (!old || !new || !is || old->gone ||
	    got->hash - mnode_hash(is) != a->hash - mnode_hash(old))
		return false;
	same = mnode_dup(old);
	same->atime = is->atime;
	same->mtime = is->mtime;
	same->ctime = is->ctime;
	same->size = is->size;
	blob_put(same->data);
	same->data = blob_get(is->data);
	fits = mnode_hash(same) == mnode_hash(is);
	mnode_put(same);
	if (is->size != old->size && is->size != new->size &&
	    (is->size < old->size) == (is->size < new->size))
		return false;
	for (uint64_t i = 0; i < is->size && fits; i++)
		fits = byte_at(is, i) == byte_at(old, i) ||
		       byte_at(is, i) == byte_at(new, i);
	return fits;
}

static int op_end_halfway(struct world *w, struct state *s, int err, uint64_t ino)
{
	struct state *is = state_dup(now(w));
	struct mnode *m = edit(is, ino);

	story(w, "   = %s\n", strerror(-err));
	if (!excusable(err))
		world_fail(w, "answered '%s'", strerror(-err));
	fault_pause(w->f, true);
	if (read_attrs(w->fs, m))
		world_fail(w, "getattr of %" PRIu64, ino);
	blob_put(m->data);
	m->data = blob_new(NULL, m->size);
	if (read_data(w->fs, ino, m->size, m->data->b))
		world_fail(w, "reading %" PRIu64, ino);
	fault_pause(w->f, false);
	state_hash(is);
	state_hash(s);
	if (mnode_hash(m) == mnode_hash(find(now(w), ino))) {
		state_put(is);
		state_put(s);
		return err;
	}
	if (!find(now(w), ino)->gone && !between(now(w), s, is, ino))
		world_fail(w, "it failed, and left neither the old nor the new");
	state_put(s);
	m->t = ++w->t;
	push(w, is);
	w->loose[w->t - w->first] = ino;
	return err;
}

uint64_t world_path(const struct world *w, const char *path)
{
	uint64_t ino = ROOT_INO;
	char name[256];

	while (*path) {
		const struct mnode *m = find(now(w), ino);
		const struct entry *e;
		size_t n;

		if (*path == '/') {
			path++;
			continue;
		}
		n = strcspn(path, "/");
		memcpy(name, path, n);
		name[n] = 0;
		path += n;
		e = S_ISDIR(m->mode) ? entry_find(m, name) : NULL;
		if (!e)
			return NO_INO;
		ino = e->ino;
	}
	return ino;
}

static bool is_dir(const struct world *w, uint64_t ino)
{
	const struct mnode *m = find(now(w), ino);

	return m && S_ISDIR(m->mode);
}

/* What a new name in `dir` meets. */
static int may_add(struct world *w, uint64_t dir, const char *name)
{
	const struct mnode *m = find(now(w), dir);

	if (!m || !S_ISDIR(m->mode))
		return -ENOTDIR;
	if (m->gone)
		return -ENOENT;
	return entry_find(m, name) ? -EEXIST : 0;
}

static int make(struct world *w, uint64_t dir, const char *name, mode_t mode,
		dev_t rdev, const char *target, uint64_t *ino)
{
	int want = may_add(w, dir, name), err;
	struct state *s = op_begin(w);
	struct fs_entry e;
	struct mnode *m;

	if (S_ISDIR(mode))
		err = fs_mkdir(w->fs, &cred, dir, name, mode, &e);
	else if (S_ISLNK(mode))
		err = fs_symlink(w->fs, &cred, dir, name, target, &e);
	else
		err = fs_mknod(w->fs, &cred, dir, name, mode, rdev, &e);
	if (err || want)
		return op_end(w, s, err, want, NULL, 0);
	story(w, "   = inode %" PRIu64 "\n", e.ino);
	if (find(s, e.ino))
		world_fail(w, "new inode %" PRIu64 " exists already", e.ino);
	m = s->node[s->n++] = mnode_new(e.ino);
	m->mode = S_ISLNK(mode) ? S_IFLNK | 0777 : mode;
	m->nlink = 1;
	m->rdev = S_ISCHR(mode) || S_ISBLK(mode) ? rdev : 0;
	if (S_ISREG(mode))
		m->data = blob_new(NULL, 0);
	if (S_ISLNK(mode)) {
		m->data = blob_new(target, strlen(target));
		m->size = m->data->len;
	}
	entry_add(edit(s, dir), name, e.ino);
	if (ino)
		*ino = e.ino;
	err = op_end(w, s, 0, 0, INOS(dir, e.ino));
	fs_forget(w->fs, e.ino, 1);
	return err;
}

int world_create_file(struct world *w, uint64_t dir, const char *name, mode_t mode,
		      dev_t rdev, uint64_t *ino)
{
	if (!(mode & S_IFMT))
		mode |= S_IFREG;
	story(w, "create %" PRIu64 "/%.60s mode %o\n", dir, name, mode);
	return make(w, dir, name, mode, rdev, NULL, ino);
}

int world_mkdir(struct world *w, uint64_t dir, const char *name, mode_t mode,
		uint64_t *ino)
{
	story(w, "mkdir %" PRIu64 "/%.60s\n", dir, name);
	return make(w, dir, name, S_IFDIR | mode, 0, NULL, ino);
}

int world_symlink(struct world *w, uint64_t dir, const char *name,
		  const char *target, uint64_t *ino)
{
	story(w, "symlink %" PRIu64 "/%.60s -> %zu bytes\n", dir, name, strlen(target));
	return make(w, dir, name, S_IFLNK | 0777, 0, target, ino);
}

int world_tmpfile(struct world *w, uint64_t dir, mode_t mode, uint64_t *ino)
{
	struct state *s;
	struct fs_entry e;
	struct mnode *m;
	int err;

	story(w, "tmpfile in %" PRIu64 "\n", dir);
	assert(w->n_held < 64);
	s = op_begin(w);
	err = fs_tmpfile(w->fs, &cred, dir, S_IFREG | mode, &e);
	if (err)
		return op_end(w, s, err, 0, NULL, 0);
	story(w, "   = inode %" PRIu64 "\n", e.ino);
	m = s->node[s->n++] = mnode_new(e.ino);
	m->mode = S_IFREG | mode;
	m->data = blob_new(NULL, 0);
	m->gone = true;
	w->held[w->n_held++] = e.ino;
	*ino = e.ino;
	return op_end(w, s, 0, 0, INOS(e.ino));
}

bool world_is_held(const struct world *w, uint64_t ino)
{
	for (unsigned i = 0; i < w->n_held; i++)
		if (w->held[i] == ino)
			return true;
	return false;
}

int world_hold(struct world *w, uint64_t dir, const char *name)
{
	struct fs_entry e;
	int err = fs_lookup(w->fs, dir, name, &e);

	story(w, "hold %" PRIu64 "/%.60s\n", dir, name);
	if (err)
		return err;
	if (w->n_held == 64 || world_is_held(w, e.ino)) {
		fs_forget(w->fs, e.ino, 1);
		return 0;
	}
	w->held[w->n_held++] = e.ino;
	return 0;
}

int world_let_go(struct world *w, uint64_t ino)
{
	struct mnode *m = find(now(w), ino);

	for (unsigned i = 0; i < w->n_held; i++) {
		if (w->held[i] != ino)
			continue;
		story(w, "let go %" PRIu64 "\n", ino);
		w->held[i] = w->held[--w->n_held];
		fs_forget(w->fs, ino, 1);
		if (m && m->gone)
			state_remove(now(w), ino);
		return 0;
	}
	return -ENOENT;
}

/* A name of `ino` is gone from the state `s`. */
static void lose_name(struct world *w, struct state *s, uint64_t ino)
{
	struct mnode *m = edit(s, ino);

	if (!S_ISDIR(m->mode) && --m->nlink)
		return;
	m->nlink = 0;
	m->gone = true;
	if (!world_is_held(w, ino))
		state_remove(s, ino);
}

int world_link(struct world *w, uint64_t ino, uint64_t dir, const char *name)
{
	int want = may_add(w, dir, name), err;
	struct state *s;
	struct fs_entry e;
	struct mnode *m;

	story(w, "link %" PRIu64 " as %" PRIu64 "/%.60s\n", ino, dir, name);
	if (is_dir(w, ino))
		want = -EPERM;
	s = op_begin(w);
	err = fs_link(w->fs, ino, dir, name, &e);
	if (!err)
		fs_forget(w->fs, e.ino, 1);
	if (err || want)
		return op_end(w, s, err, want, NULL, 0);
	m = edit(s, ino);
	m->nlink++;
	m->gone = false;
	entry_add(edit(s, dir), name, ino);
	return op_end(w, s, 0, 0, INOS(dir, ino));
}

int world_unlink(struct world *w, uint64_t dir, const char *name)
{
	const struct entry *e = entry_find(find(now(w), dir), name);
	uint64_t ino = e ? e->ino : NO_INO;
	int want = !e ? -ENOENT : is_dir(w, ino) ? -EISDIR : 0, err;
	struct state *s;

	story(w, "unlink %" PRIu64 "/%.60s\n", dir, name);
	s = op_begin(w);
	err = fs_unlink(w->fs, dir, name);
	if (err || want)
		return op_end(w, s, err, want, NULL, 0);
	entry_remove(edit(s, dir), name);
	lose_name(w, s, ino);
	return op_end(w, s, 0, 0, INOS(dir, ino));
}

int world_rmdir(struct world *w, uint64_t dir, const char *name)
{
	const struct entry *e = entry_find(find(now(w), dir), name);
	uint64_t ino = e ? e->ino : NO_INO;
	int want = !e ? -ENOENT : !is_dir(w, ino) ? -ENOTDIR :
		   find(now(w), ino)->entries ? -ENOTEMPTY : 0, err;
	struct state *s;

	story(w, "rmdir %" PRIu64 "/%.60s\n", dir, name);
	s = op_begin(w);
	err = fs_rmdir(w->fs, dir, name);
	if (err || want)
		return op_end(w, s, err, want, NULL, 0);
	entry_remove(edit(s, dir), name);
	lose_name(w, s, ino);
	return op_end(w, s, 0, 0, INOS(dir));
}

/* Is `dir` below `top`, or `top` itself? */
static bool below(const struct state *s, uint64_t dir, uint64_t top)
{
	const struct mnode *m = find(s, top);

	if (dir == top)
		return true;
	if (!m || !S_ISDIR(m->mode))
		return false;
	for (unsigned i = 0; i < m->entries; i++)
		if (below(s, dir, m->entry[i].ino))
			return true;
	return false;
}

int world_rename(struct world *w, uint64_t dir, const char *name,
		 uint64_t new_dir, const char *new_name, unsigned flags)
{
	const struct entry *from = entry_find(find(now(w), dir), name);
	const struct entry *to = entry_find(find(now(w), new_dir), new_name);
	uint64_t a = from ? from->ino : NO_INO, b = to ? to->ino : NO_INO;
	int want = 0, err;
	struct state *s;

	if (!from)
		want = -ENOENT;
	else if (flags & RENAME_NOREPLACE && to)
		want = -EEXIST;
	else if (flags & RENAME_EXCHANGE && !to)
		want = -ENOENT;
	else if (is_dir(w, a) && below(now(w), new_dir, a))
		want = -EINVAL;
	else if (flags & RENAME_EXCHANGE)
		want = is_dir(w, b) && below(now(w), dir, b) ? -EINVAL : 0;
	else if (to && a != b && is_dir(w, a) && !is_dir(w, b))
		want = -ENOTDIR;
	else if (to && a != b && is_dir(w, b) &&
		 (!is_dir(w, a) || find(now(w), b)->entries))
		want = -ENOTEMPTY;
	story(w, "rename %" PRIu64 "/%.60s to %" PRIu64 "/%.60s flags %u\n", dir, name,
	      new_dir, new_name, flags);
	s = op_begin(w);
	err = fs_rename(w->fs, &cred, dir, name, new_dir, new_name, flags);
	if (err || want)
		return op_end(w, s, err, want, NULL, 0);
	if (flags & RENAME_EXCHANGE) {
		entry_find(edit(s, dir), name)->ino = b;
		entry_find(edit(s, new_dir), new_name)->ino = a;
		return op_end(w, s, 0, 0, INOS(dir, new_dir, a, b));
	}
	if (a == b)		/* two names of one inode, or one: nothing happens */
		return op_end(w, s, 0, 0, NULL, 0);
	if (to) {
		entry_find(edit(s, new_dir), new_name)->ino = a;
		lose_name(w, s, b);
	} else {
		entry_add(edit(s, new_dir), new_name, a);
	}
	entry_remove(edit(s, dir), name);
	if (flags & RENAME_WHITEOUT) {
		struct fs_entry e;

		err = fs_lookup(w->fs, dir, name, &e);
		if (err)
			world_fail(w, "no whiteout: %s", strerror(-err));
		fs_forget(w->fs, e.ino, 1);
		s->node[s->n] = mnode_new(e.ino);
		s->node[s->n]->nlink = 1;
		s->node[s->n++]->mode = S_IFCHR;
		/* Its mode is the volume's choice. */
		s->node[s->n - 1]->mode = e.st.st_mode;
		entry_add(edit(s, dir), name, e.ino);
		return op_end(w, s, 0, 0, INOS(dir, new_dir, a, e.ino));
	}
	return op_end(w, s, 0, 0, INOS(dir, new_dir, a, b));
}

/* Contents to be changed, `size` long. */
static struct blob *edit_data(struct mnode *m, uint64_t size)
{
	struct blob *b = blob_new(NULL, size);

	memcpy(b->b, m->data->b, m->data->len < size ? m->data->len : size);
	blob_put(m->data);
	m->data = b;
	m->size = size;
	return b;
}

static void fill(uint8_t *to, size_t len, uint64_t seed)
{
	struct rng r = {seed};

	for (size_t i = 0; i < len; i += 8) {
		uint64_t x = rng_next(&r);

		memcpy(to + i, &x, len - i < 8 ? len - i : 8);
	}
}

int world_write(struct world *w, uint64_t ino, uint64_t off, size_t len, uint64_t seed)
{
	struct state *s;
	struct mnode *m;
	uint8_t *buf = must(malloc(len + 1));
	ssize_t n;

	story(w, "write %" PRIu64 " at %" PRIu64 " +%zu\n", ino, off, len);
	fill(buf, len, seed);
	s = op_begin(w);
	n = fs_write(w->fs, ino, buf, len, (off_t)off, false);
	if (n < 0) {
		free(buf);
		return op_end(w, s, (int)n, 0, NULL, 0);
	}
	if ((size_t)n != len)
		world_fail(w, "wrote %zd of %zu", n, len);
	m = edit(s, ino);
	memcpy(edit_data(m, off + len > m->size ? off + len : m->size)->b + off, buf, len);
	free(buf);
	return op_end(w, s, 0, 0, INOS(ino));
}

int world_truncate(struct world *w, uint64_t ino, uint64_t size)
{
	struct state *s;
	struct stat st = {.st_size = (off_t)size};
	int err;

	story(w, "truncate %" PRIu64 " to %" PRIu64 "\n", ino, size);
	s = op_begin(w);
	err = fs_setattr(w->fs, ino, FS_SET_SIZE, &st);
	if (!err)
		edit_data(edit(s, ino), size);
	return op_end(w, s, err, 0, INOS(ino));
}

int world_fallocate(struct world *w, uint64_t ino, int mode, uint64_t off,
		    uint64_t len)
{
	struct state *s;
	struct mnode *m;
	int err;

	story(w, "fallocate %" PRIu64 " mode %x at %" PRIu64 " +%" PRIu64 "\n", ino,
	      (unsigned)mode, off, len);
	s = op_begin(w);
	err = fs_fallocate(w->fs, ino, mode, (off_t)off, (off_t)len);
	m = edit(s, ino);
	if (!(mode & FALLOC_FL_KEEP_SIZE) && off + len > m->size)
		edit_data(m, off + len);
	if (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE) && off < m->size) {
		uint64_t end = off + len < m->size ? off + len : m->size;

		memset(edit_data(m, m->size)->b + off, 0, end - off);
	}
	return err ? op_end_halfway(w, s, err, ino) : op_end_loose(w, s, INOS(ino));
}

int world_copy(struct world *w, uint64_t src, uint64_t src_off, uint64_t dst,
	       uint64_t dst_off, size_t len)
{
	struct state *s;
	struct mnode *from, *to;
	uint8_t *copy;
	uint64_t size;
	ssize_t n;

	story(w, "copy %" PRIu64 " at %" PRIu64 " to %" PRIu64 " at %" PRIu64 " +%zu\n",
	      src, src_off, dst, dst_off, len);
	s = op_begin(w);
	n = fs_copy_file_range(w->fs, src, (off_t)src_off, dst, (off_t)dst_off, len);
	if (n < 0)
		return op_end_halfway(w, s, (int)n, dst);
	story(w, "   = %zd\n", n);
	from = find(s, src);
	if (src_off + (uint64_t)n > from->size)
		world_fail(w, "copied %zd bytes beyond the end", n);
	copy = must(malloc((size_t)n + 1));
	memcpy(copy, from->data->b + src_off, (size_t)n);
	to = edit(s, dst);
	size = dst_off + (uint64_t)n > to->size && n ? dst_off + (uint64_t)n : to->size;
	if (n)
		memcpy(edit_data(to, size)->b + dst_off, copy, (size_t)n);
	free(copy);
	return op_end_loose(w, s, INOS(dst, src));
}

int world_chmod(struct world *w, uint64_t ino, mode_t mode)
{
	struct stat st = {.st_mode = mode};
	struct state *s;
	int err;

	story(w, "chmod %" PRIu64 " %o\n", ino, mode);
	s = op_begin(w);
	err = fs_setattr(w->fs, ino, FS_SET_MODE, &st);
	if (!err) {
		struct mnode *m = edit(s, ino);

		m->mode = (m->mode & S_IFMT) | (mode & 07777);
	}
	return op_end(w, s, err, 0, INOS(ino));
}

int world_chown(struct world *w, uint64_t ino, uid_t uid, gid_t gid)
{
	struct stat st = {.st_uid = uid, .st_gid = gid};
	struct state *s;
	int err;

	story(w, "chown %" PRIu64 " %u:%u\n", ino, uid, gid);
	s = op_begin(w);
	err = fs_setattr(w->fs, ino, FS_SET_UID | FS_SET_GID, &st);
	if (!err) {
		struct mnode *m = edit(s, ino);

		m->uid = uid;
		m->gid = gid;
	}
	return op_end(w, s, err, 0, INOS(ino));
}

int world_utimes(struct world *w, uint64_t ino, int64_t sec)
{
	struct stat st = {.st_atim = {sec, 123456789}, .st_mtim = {sec + 1, 987654321}};
	struct state *s;
	int err;

	story(w, "utimes %" PRIu64 " %lld\n", ino, (long long)sec);
	s = op_begin(w);
	err = fs_setattr(w->fs, ino, FS_SET_ATIME | FS_SET_MTIME, &st);
	err = op_end(w, s, err, 0, INOS(ino));
	if (!err) {
		const struct mnode *m = find(now(w), ino);

		if (m->atime.tv_sec != sec || m->atime.tv_nsec != 123456789 ||
		    m->mtime.tv_sec != sec + 1 || m->mtime.tv_nsec != 987654321)
			world_fail(w, "utimes of %" PRIu64 " did not stay", ino);
	}
	return err;
}

int world_setflags(struct world *w, uint64_t ino, uint32_t flags, uint32_t projid)
{
	struct state *s;
	int err;

	story(w, "setflags %" PRIu64 " %x project %u\n", ino, flags, projid);
	s = op_begin(w);
	err = fs_setflags(w->fs, ino, &flags, &projid);
	err = op_end(w, s, err, 0, INOS(ino));
	if (!err) {
		const struct mnode *m = find(now(w), ino);

		if (m->flags != flags || m->projid != projid)
			world_fail(w, "flags %x project %u of %" PRIu64 " did not stay",
				   m->flags, m->projid, ino);
	}
	return err;
}

static struct xattr *xattr_find(const struct mnode *m, const char *name)
{
	for (unsigned i = 0; i < m->xattrs; i++)
		if (!strcmp((char *)m->xattr[i].name->b, name))
			return &m->xattr[i];
	return NULL;
}

int world_setxattr(struct world *w, uint64_t ino, const char *name, size_t len,
		   uint64_t seed)
{
	uint8_t *value = must(malloc(len + 1));
	struct state *s;
	struct xattr *x;
	struct mnode *m;
	int err;

	story(w, "setxattr %" PRIu64 " %s +%zu\n", ino, name, len);
	fill(value, len, seed);
	s = op_begin(w);
	err = fs_setxattr(w->fs, &cred, ino, name, value, len, 0);
	if (err) {
		free(value);
		return op_end(w, s, err, 0, NULL, 0);
	}
	m = edit(s, ino);
	x = xattr_find(m, name);
	if (!x) {
		m->xattr = must(realloc(m->xattr, (m->xattrs + 1) * sizeof(*x)));
		x = &m->xattr[m->xattrs++];
		x->name = blob_new(name, strlen(name));
	} else {
		blob_put(x->value);
	}
	x->value = blob_new(value, len);
	free(value);
	return op_end(w, s, 0, 0, INOS(ino));
}

int world_removexattr(struct world *w, uint64_t ino, const char *name)
{
	int want = xattr_find(find(now(w), ino), name) ? 0 : -ENODATA, err;
	struct state *s;
	struct xattr *x;
	struct mnode *m;

	story(w, "removexattr %" PRIu64 " %s\n", ino, name);
	s = op_begin(w);
	err = fs_removexattr(w->fs, &cred, ino, name);
	if (err || want)
		return op_end(w, s, err, want, NULL, 0);
	m = edit(s, ino);
	x = xattr_find(m, name);
	blob_put(x->name);
	blob_put(x->value);
	*x = m->xattr[--m->xattrs];
	return op_end(w, s, 0, 0, INOS(ino));
}

int world_fsync(struct world *w, uint64_t ino)
{
	const struct mnode *m = find(now(w), ino);
	uint64_t t = m->t;
	int err = fs_fsync(w->fs, ino, false);

	story(w, "fsync %" PRIu64 "\n", ino);
	if (!err)
		promise(w, t);
	else if (err)
		story(w, "   = %s\n", strerror(-err));
	return err;
}

static int sync_done(struct world *w, int err, const char *what)
{
	story(w, "%s\n", what);
	if (!err)
		promise(w, w->t);
	else
		story(w, "   = %s\n", strerror(-err));
	return err;
}

int world_sync(struct world *w) { return sync_done(w, fs_sync(w->fs), "sync"); }
int world_tick(struct world *w) { return sync_done(w, volume_tick(w->v), "tick"); }

int world_checkpoint(struct world *w)
{
	return sync_done(w, volume_checkpoint(w->v), "checkpoint");
}

/* ---- looking -------------------------------------------------------------------------- */

void world_check(struct world *w)
{
	struct state *got;
	char why[256] = "";
	int err = read_state(w->fs, &got, why, sizeof(why));

	if (err)
		world_fail(w, "%s", why);
	if (got->hash != now(w)->hash) {
		state_diff(now(w), got, true);
		state_put(got);
		world_fail(w, "the volume in use is not what it should be");
	}
	state_put(got);
	for (unsigned i = 0; i < w->n_held; i++) {
		const struct mnode *m = find(now(w), w->held[i]);
		uint8_t *buf;

		if (!m || !m->gone || !S_ISREG(m->mode))
			continue;
		buf = must(malloc(m->size + 1));
		err = read_data(w->fs, m->ino, m->size, buf);
		if (err || memcmp(buf, m->data->b, m->size))
			world_fail(w, "orphan %" PRIu64 " is not what it should be: %s",
				   m->ino, strerror(-err));
		free(buf);
	}
	if (volume_alloc(w->v)) {
		err = alloc_check(volume_alloc(w->v), why, sizeof(why));
		if (err)
			world_fail(w, "allocator: %s", why);
	}
}

static uint64_t pick(const struct world *w, struct rng *r, mode_t type)
{
	const struct state *s = now(w);
	unsigned from = (unsigned)rng_below(r, s->n);

	for (unsigned i = 0; i < s->n; i++) {
		const struct mnode *m = s->node[(from + i) % s->n];

		if (type && (m->mode & S_IFMT) != type)
			continue;
		if (m->gone && (type != S_IFREG))
			continue;
		return m->ino;
	}
	return NO_INO;
}

uint64_t world_pick_dir(const struct world *w, struct rng *r) { return pick(w, r, S_IFDIR); }
uint64_t world_pick_file(const struct world *w, struct rng *r) { return pick(w, r, S_IFREG); }
uint64_t world_pick_any(const struct world *w, struct rng *r) { return pick(w, r, 0); }

bool world_pick_entry(const struct world *w, struct rng *r, uint64_t *dir,
		      char name[256], uint64_t *ino)
{
	const struct state *s = now(w);
	unsigned from = (unsigned)rng_below(r, s->n);

	for (unsigned i = 0; i < s->n; i++) {
		const struct mnode *m = s->node[(from + i) % s->n];
		const struct entry *e;

		if (!S_ISDIR(m->mode) || m->gone || !m->entries)
			continue;
		e = &m->entry[rng_below(r, m->entries)];
		*dir = m->ino;
		*ino = e->ino;
		strcpy(name, (char *)e->name->b);
		return true;
	}
	return false;
}

uint64_t world_size(const struct world *w, uint64_t ino)
{
	const struct mnode *m = find(now(w), ino);

	return m ? m->size : 0;
}

mode_t world_mode(const struct world *w, uint64_t ino)
{
	const struct mnode *m = find(now(w), ino);

	return m ? m->mode : 0;
}

unsigned world_inodes(const struct world *w) { return now(w)->n; }

/* ---- crashes ------------------------------------------------------------------------------ */

static int violation(struct world *w, const struct fault_cut *cut, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));

static int violation(struct world *w, const struct fault_cut *cut, const char *fmt, ...)
{
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	if (!w->violations++)
		snprintf(w->violation, sizeof(w->violation), "%.500s", text);
	if (w->quiet)
		return 1;
	fault_log_print(w->f);
	snprintf(repro + strlen(repro), sizeof(repro) - strlen(repro),
		 " STATE=%" PRIu64, w->number_base + cut->number);
	world_fail(w, "crash state %" PRIu64 " after %" PRIu64 " flushes, %u writes, %s"
		   " (operations %" PRIu64 " promised, %" PRIu64 " started): %s",
		   cut->number, cut->flush, cut->writes, cut->text, cut->promised,
		   cut->started, text);
}

/*
 * Which of the allowed states is it? The newest that fits, or UINT64_MAX.
 * Inside an operation counts as before it.
 */
static uint64_t match(const struct world *w, const struct state *got,
		      const struct fault_cut *cut)
{
	uint64_t last = cut->started < w->t ? cut->started : w->t;

	for (uint64_t t = last + 1; t-- > cut->promised;) {
		if (t < w->first)
			break;
		if (w->state[t - w->first]->hash == got->hash)
			return t;
	}
	for (uint64_t t = cut->promised; t < last; t++) {
		uint64_t i = t - w->first;

		if (t >= w->first && w->loose[i + 1] &&
		    between(w->state[i], w->state[i + 1], got, w->loose[i + 1]))
			return t;
	}
	return UINT64_MAX;
}

static int no_match(struct world *w, const struct state *got,
		    const struct fault_cut *cut, const char *when)
{
	uint64_t near = cut->promised, best = UINT64_MAX;

	for (uint64_t t = w->first; t <= w->t; t++) {
		uint64_t n;

		if (w->state[t - w->first]->hash == got->hash)
			return violation(w, cut, "%s it is operation %" PRIu64 ", which is %s",
					 when, t, t < cut->promised ? "LOST SYNC: too early" :
					 "too late");
		n = state_diff(w->state[t - w->first], got, false);
		if (n < best) {
			best = n;
			near = t;
		}
	}
	if (!w->quiet) {
		fprintf(stderr, "---- %s, compared with operation %" PRIu64 ":\n", when, near);
		state_diff(w->state[near - w->first], got, true);
	}
	return violation(w, cut, "%s it is none of the states, nearest is operation %" PRIu64,
			 when, near);
}

/*
 * Open, read, say which state, in *t. *hash is what it must be, if not 0, and
 * is set.
 */
static int look(struct world *w, struct fault *f, const struct fault_cut *cut,
		bool readonly, bool settled, bool use, const char *when, uint64_t *t,
		uint64_t *hash)
{
	struct volume_options o = w->opt.volume;
	struct fs_options fo = w->opt.fs;
	struct volume *v;
	struct state *got = NULL;
	struct fs *fs;
	char msg[512] = "";
	uint64_t is;
	int err, bad = 0;

	o.readonly = readonly;
	fault_image(f)->readonly = readonly;
	fault_freeze(f, readonly);
	err = volume_open(fault_image(f), &o, &v, msg, sizeof(msg));
	if (err)
		return violation(w, cut, "%s open failed: %s: %s", when, strerror(-err), msg);
	err = fs_open(v, &fo, &fs);
	if (err) {
		volume_abandon(v);
		return violation(w, cut, "%s fs_open failed: %s", when, strerror(-err));
	}
	err = read_state(fs, &got, msg, sizeof(msg));
	if (err) {
		bad = violation(w, cut, "%s %s", when, msg);
		goto out;
	}
	is = match(w, got, cut);
	if (is == UINT64_MAX)
		bad = no_match(w, got, cut, when);
	else if (*hash && *hash != got->hash)
		bad = violation(w, cut, "%s it is operation %" PRIu64 ", before it was %"
				PRIu64, when, is, *t);
	*t = is;
	*hash = got->hash;
	state_put(got);
	if (bad)
		goto out;
	if (readonly) {
		err = check_volume(v, settled, msg, sizeof(msg));
		if (err)
			bad = violation(w, cut, "%s %s", when, msg);
	} else {
		err = alloc_check(volume_alloc(v), msg, sizeof(msg));
		if (err)
			bad = violation(w, cut, "%s allocator: %s", when, msg);
	}
	if (use && !bad) {
		/* It must be good for more than looking. */
		struct fs_entry e;
		char buf[5000];

		memset(buf, 0x5a, sizeof(buf));
		err = fs_mknod(fs, &cred, ROOT_INO, "after the crash", S_IFREG | 0600, 0, &e);
		if (!err) {
			ssize_t n = fs_write(fs, e.ino, buf, sizeof(buf), 100, false);

			err = n < 0 ? (int)n : 0;
			if (!err)
				err = fs_fsync(fs, e.ino, false);
			if (!err || err == -ENOSPC)
				err = fs_unlink(fs, ROOT_INO, "after the crash");
			fs_forget(fs, e.ino, 1);
		}
		if (err && err != -ENOSPC)
			bad = violation(w, cut, "%s using it failed: %s", when, strerror(-err));
	}
out:
	err = fs_close(fs);
	if (!err)
		err = volume_close(v);
	else
		volume_close(v);
	if (err && !bad)
		bad = violation(w, cut, "%s close failed: %s", when, strerror(-err));
	if (readonly && !bad && fault_failures(f))
		bad = violation(w, cut, "%s the read-only volume wrote to the image", when);
	fault_image(f)->readonly = false;
	fault_freeze(f, false);
	return bad;
}

static int crash_steps(struct world *w, struct fault *crashed,
		       const struct fault_cut *cut, uint64_t t)
{
	bool use = !w->opt.no_crash_use && cut->number % 4 == 3;
	uint64_t hash = t == UINT64_MAX ? 0 : w->state[t - w->first]->hash;
	int bad = 0;

	w->crashes++;
	if (!w->opt.no_crash_readonly) {
		bad = look(w, crashed, cut, true, false, false, "read-only,", &t, &hash);
		w->recoveries++;
	}
	if (!bad) {
		bad = look(w, crashed, cut, false, false, use, "recovered,", &t, &hash);
		w->recoveries++;
	}
	if (!bad && !w->opt.no_crash_recheck) {
		if (!use) {
			bad = look(w, crashed, cut, true, true, false, "once more,", &t, &hash);
		} else {
			/* Names and times moved on; the structures must hold. */
			struct volume_options o = w->opt.volume;
			struct volume *v;
			char msg[512] = "";
			int err;

			o.readonly = true;
			err = volume_open(fault_image(crashed), &o, &v, msg, sizeof(msg));
			if (err)
				return violation(w, cut, "after use, open failed: %s: %s",
						 strerror(-err), msg);
			err = check_volume(v, true, msg, sizeof(msg));
			volume_close(v);
			if (err)
				bad = violation(w, cut, "after use, %s", msg);
		}
		w->recoveries++;
	}
	return bad && !w->quiet;
}

int world_crash(void *ctx, struct fault *crashed, const struct fault_cut *cut)
{
	return crash_steps(ctx, crashed, cut, UINT64_MAX);
}

int world_crash_exactly(struct world *w, struct fault *crashed, uint64_t t,
			const char *what)
{
	struct fault_cut cut = {.promised = t, .started = t, .number = 1};

	snprintf(cut.text, sizeof(cut.text), "%s", what);
	return crash_steps(w, crashed, &cut, t);
}

struct world *world_recover(const struct world *from, struct fault *crashed,
			    const struct fault_cut *cut)
{
	struct world *w = must(calloc(1, sizeof(*w)));
	struct state *got;
	char why[256] = "";
	uint64_t t;
	int err;

	w->opt = from->opt;
	world_volume_options(w);
	w->f = fault_create_over(crashed);
	w->own_f = true;
	story(w, "%s---- power cut: crash state %" PRIu64 ", %s\n",
	      from->story ? from->story : "", cut->number, cut->text);
	fault_record(w->f, true);
	err = world_open(w);
	if (err) {
		push(w, state_new(0));
		world_fail(w, "recovery failed: %s: %s", strerror(-err), w->message);
	}
	err = read_state(w->fs, &got, why, sizeof(why));
	if (err)
		world_fail(w, "after recovery: %s", why);
	t = match(from, got, cut);
	if (t == UINT64_MAX)
		no_match((struct world *)from, got, cut, "recovered,");
	w->first = w->t = w->log_started = w->log_promised = w->promised = t;
	push(w, got);
	for (unsigned i = 0; i < got->n; i++)
		got->node[i]->t = t;
	promise(w, t);
	return w;
}

int world_explore(struct world *w, const struct fault_plan *plan, bool final)
{
	return fault_explore(w->f, plan, &w->log_started, &w->log_promised, final,
			     world_crash, w);
}
