/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Coverage-guided fuzzing (libFuzzer; main.c in its stead runs known inputs):
 * one program for each FUZZ_TARGET, all from this file. A volume with something of everything is made in memory at
 * the start; an input says what to change in a copy of it, and checksums are
 * put right again, so that the fuzzer gets past them:
 *
 *   super    bytes over a superblock slot
 *   journal  groups behind the last one: their items
 *   node     bytes in nodes of the trees, or in bitmaps
 *   raw      bytes anywhere, and no checksum is put right
 *   fsck     as super, journal or node, for fsck.spaceweave
 *
 * What is changed is opened read-only, and all of it read: names, attributes,
 * xattrs, contents; then opened for writing and used. Nothing may crash, hang,
 * or go out of bounds. After `raw` what could be read has to be what was
 * written. fsck has to keep its word: -n changes nothing, what -n calls clean
 * can be read without an error, and after -y has exited with 0 or 1 another run exits
 * with 0; then what can be read is what was written, if the damage was `raw`.
 *
 * FUZZ_SEEDS=DIR: write first inputs there, and end.
 */
#include "fs/fs.h"
#include "meta/repair.h"
#include "tests/fsck/call.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { FUZZ_super, FUZZ_journal, FUZZ_node, FUZZ_raw, FUZZ_fsck };

#define BYTES (2u << 20)
#define BLOCK 4096u
#define NODES_MAX 256u

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(const char *what, bool good)
{
	if (good)
		return;
	fprintf(stderr, "fuzz: %s\n", what);
	abort();
}

/* Nothing is random but the input. */
uint64_t __wrap_random64(void);
static uint64_t drawn;
uint64_t __wrap_random64(void)
{
	return ++drawn * 0x9e3779b97f4a7c15ull;
}

/* ---- an image in memory ------------------------------------------------------ */

static uint8_t disk[BYTES];
static bool touched[BYTES / BLOCK];
static struct image mem;

static int mem_pread(struct image *im, void *buf, size_t len, uint64_t off)
{
	if (off > im->bytes || len > im->bytes - off)
		return -ENXIO;
	memcpy(buf, disk + off, len);
	return 0;
}

static int mem_pwrite(struct image *im, const void *buf, size_t len, uint64_t off)
{
	if (off > im->bytes || len > im->bytes - off)
		return -EIO;
	memcpy(disk + off, buf, len);
	for (uint64_t b = off / BLOCK; b <= (off + len - 1) / BLOCK; b++)
		touched[b] = true;
	return 0;
}

static int mem_pwritev(struct image *im, const struct iovec *iov, int n, uint64_t off)
{
	int ret = 0;

	for (int i = 0; !ret && i < n; i++) {
		ret = mem_pwrite(im, iov[i].iov_base, iov[i].iov_len, off);
		off += iov[i].iov_len;
	}
	return ret;
}

static int mem_flush(struct image *im) { (void)im; return 0; }

static int mem_range(struct image *im, uint64_t off, uint64_t len)
{
	(void)im, (void)off, (void)len;
	return 0;
}

static int mem_resize(struct image *im, uint64_t bytes)
{
	(void)im, (void)bytes;
	return -EOPNOTSUPP;
}

static void mem_close(struct image *im) { (void)im; }

static const struct image_ops mem_ops = {
	.pread = mem_pread,
	.pwrite = mem_pwrite,
	.pwritev = mem_pwritev,
	.flush = mem_flush,
	.discard = mem_range,
	.ensure = mem_range,
	.resize = mem_resize,
	.close = mem_close,
};

/* ---- the volume --------------------------------------------------------------- */

static void quiet(void *ctx, const char *text) { (void)ctx, (void)text; }

static int open_volume(struct volume **v, bool readonly,
		       const struct volume_repair *rep)
{
	struct volume_options opt = {.readonly = readonly,
				     .no_threads = true,
				     .repair = rep,
				     .cache_bytes = 2u << 20,
				     .shards = 2,
				     .message = quiet};
	char msg[240];

	return volume_open(&mem, &opt, v, msg, sizeof(msg));
}

struct base {
	uint8_t disk[BYTES];
	uint64_t node[NODES_MAX];
	unsigned nodes;
	unsigned used[BYTES / BLOCK];	/* blocks that are not empty */
	unsigned useds;
};
static struct base bases[2];		/* clean; with a journal to be replayed */
static char content[3 * BLOCK];

static uint64_t put_file(struct fs *fs, uint64_t dir, const char *name, size_t len)
{
	const struct fs_cred c = {.uid = 1000, .gid = 1000};
	struct fs_entry e;

	must(name, !fs_mknod(fs, &c, dir, name, S_IFREG | 0644, 0, &e));
	if (len)
		must(name, fs_write(fs, e.ino, content, len, 0, 0) == (ssize_t)len);
	fs_forget(fs, e.ino, 1);
	return e.ino;
}

static void fill(struct fs *fs, const char *prefix)
{
	const struct fs_cred c = {.uid = 1000, .gid = 1000};
	struct fs_entry d, e;
	char name[40], target[800];
	uint64_t ino;

	snprintf(name, sizeof(name), "%s-dir", prefix);
	must(name, !fs_mkdir(fs, &c, ROOT_INO, name, 0755, &d));
	for (unsigned i = 0; i < 24; i++) {
		snprintf(name, sizeof(name), "%s-file-%02u", prefix, i);
		put_file(fs, d.ino, name, i % 4 * 100u);
	}
	snprintf(name, sizeof(name), "%s-big", prefix);
	ino = put_file(fs, ROOT_INO, name, sizeof(content));
	must("xattr", !fs_setxattr(fs, &c, ino, "user.long", content, 1500, 0));
	must("xattr", !fs_setxattr(fs, &c, ino, "user.short", "s", 1, 0));
	snprintf(name, sizeof(name), "%s-second", prefix);
	must("link", !fs_link(fs, ino, d.ino, name, &e));
	fs_forget(fs, ino, 1);
	snprintf(name, sizeof(name), "%s-sparse", prefix);
	e.ino = put_file(fs, ROOT_INO, name, 10);
	must("sparse", fs_write(fs, e.ino, content, 10, 40 * BLOCK, 0) == 10);
	must("prealloc", !fs_fallocate(fs, e.ino, FALLOC_FL_KEEP_SIZE,
				       60 * BLOCK, 4 * BLOCK));
	snprintf(name, sizeof(name), "%s-clone", prefix);
	e.ino = put_file(fs, ROOT_INO, name, 0);
	must("clone", fs_copy_file_range(fs, ino, 0, e.ino, 0, sizeof(content)) ==
			      (ssize_t)sizeof(content));
	memset(target, 't', sizeof(target) - 1);
	target[sizeof(target) - 1] = 0;
	snprintf(name, sizeof(name), "%s-symlink", prefix);
	must("symlink", !fs_symlink(fs, &c, d.ino, name, target, &e));
	fs_forget(fs, e.ino, 1);
	fs_forget(fs, d.ino, 1);
}

static int note_node(void *ctx, enum table t, unsigned level, uint64_t block)
{
	struct base *b = ctx;

	(void)t, (void)level;
	if (b->nodes < NODES_MAX && block < BYTES / BLOCK)
		b->node[b->nodes++] = block;
	return 0;
}

static int note_bitmap(void *ctx, enum table t, const uint8_t *key, size_t klen,
		       const uint8_t *val, size_t vlen)
{
	struct disk_space d;

	(void)key, (void)klen;
	if (t == TABLE_SPACE && vlen == sizeof(d)) {
		memcpy(&d, val, sizeof(d));
		note_node(ctx, t, 0, get64(d.block));
	}
	return 0;
}

static void keep(struct base *b)
{
	static const struct volume_repair raw = {.no_replay = true};
	static const uint8_t none[BLOCK];
	struct walk w = {.ctx = b, .node = note_node, .item = note_bitmap};
	struct volume *v;

	memcpy(b->disk, disk, BYTES);
	for (unsigned i = 0; i < BYTES / BLOCK; i++)
		if (memcmp(disk + i * BLOCK, none, BLOCK))
			b->used[b->useds++] = i;
	must("open", !open_volume(&v, true, &raw));
	for (unsigned t = 0; t < TABLES; t++)
		must("walk", !volume_walk(v, t, &w));
	volume_close(v);
}

static void make_bases(void)
{
	struct volume_geometry g = {.bytes = BYTES, .uuid = {1, 2, 3}};
	struct fs_options none = {0};
	struct volume *v;
	struct fs *fs;

	for (size_t i = 0; i < sizeof(content); i++)
		content[i] = (char)('a' + i % 26 + i / 4096);
	mem = (struct image){.ops = &mem_ops, .bytes = BYTES, .name = "image"};
	must("format", !volume_format(&mem, &g));
	/* twice, so that the older slot leads to the same files */
	for (unsigned i = 0; i < 2; i++) {
		must("open", !open_volume(&v, false, NULL));
		must("fs", !fs_open(v, &none, &fs));
		if (!i)
			fill(fs, "first");
		must("close", !fs_close(fs) && !volume_close(v));
	}
	keep(&bases[0]);
	must("open", !open_volume(&v, false, NULL));
	must("fs", !fs_open(v, &none, &fs));
	fill(fs, "later");
	must("sync", !fs_sync(fs));
	put_file(fs, ROOT_INO, "last", 100);
	must("sync", !volume_sync(v));
	fs_close(fs);
	volume_abandon(v);
	keep(&bases[1]);
}

static void take(const struct base *b)
{
	static const struct base *last;

	for (unsigned i = 0; i < BYTES / BLOCK; i++)
		if (last != b || touched[i])
			memcpy(disk + i * BLOCK, b->disk + i * BLOCK, BLOCK);
	memset(touched, 0, sizeof(touched));
	last = b;
	drawn = 1000;
}

/* ---- what an input changes ------------------------------------------------------- */

struct input {
	const uint8_t *p;
	size_t left;
};

static unsigned byte(struct input *in)
{
	if (!in->left)
		return 0;
	in->left--;
	return *in->p++;
}

static unsigned word(struct input *in)
{
	unsigned low = byte(in);

	return low | byte(in) << 8;
}

static void bytes(struct input *in, void *to, size_t len)
{
	size_t n = len < in->left ? len : in->left;

	memcpy(to, in->p, n);
	in->p += n;
	in->left -= n;
}

static void change_super(struct input *in)
{
	static const uint8_t none[SUPER_BYTES];
	unsigned flags = byte(in), slot = flags & 1;
	struct disk_super *s = (void *)(disk + SUPER_SLOT_OFFSET(slot));

	bytes(in, s, sizeof(*s));
	super_seal(s, slot);
	touched[SUPER_SLOT_OFFSET(slot) / BLOCK] = true;
	if (flags & 2)
		mem_pwrite(&mem, none, sizeof(none), SUPER_SLOT_OFFSET(1 - slot));
}

/* Behind the last group of the chain: count of items, length, flags, items. */
static void change_journal(struct input *in)
{
	struct disk_super s;
	struct disk_group *g;
	unsigned slot;
	char msg[200];
	uint64_t unit, units, prev, seq, base;

	must("super", !super_load(&mem, &s, &slot, msg, sizeof(msg)));
	unit = get64(s.tail_unit);
	units = get64(s.journal_units);
	base = get64(s.journal_block) * BLOCK;
	prev = get64(s.tail_prev);
	seq = get64(s.tail_seq);
	for (;; seq++) {
		g = (void *)(disk + base + unit % units * JOURNAL_UNIT);
		if (get32(g->magic) != GROUP_MAGIC || get64(g->seq) != seq ||
		    get64(g->salt) != get64(s.salt))
			break;
		prev = get64(g->csum);
		unit += (get32(g->bytes) + JOURNAL_UNIT - 1) / JOURNAL_UNIT;
	}
	while (in->left > 5) {
		unsigned items = word(in), len = word(in) % 8192, flags = byte(in);
		size_t all = sizeof(*g) + len;

		/* a group of this harness does not go over the ring's end */
		if (unit % units + (all + JOURNAL_UNIT - 1) / JOURNAL_UNIT > units)
			return;
		g = (void *)(disk + base + unit % units * JOURNAL_UNIT);
		memset(g, 0, all);
		*g = (struct disk_group){
			.magic = put32(GROUP_MAGIC),
			.bytes = put32((uint32_t)all),
			.salt = s.salt,
			.seq = put64(seq),
			.prev = put64(prev),
			.durable_seq = put64(flags & 1 ? seq - 1 : 0),
			.checkpoint_gen = s.gen,
			.of_gen = flags & 2 ? s.gen : put64(0),
			.items = put32(items)};
		bytes(in, g + 1, len);
		g->csum = put64(checksum(g, all));
		prev = get64(g->csum);
		for (uint64_t b = 0; b <= all / BLOCK; b++)
			touched[base / BLOCK + unit % units + b] = true;
		unit += (all + JOURNAL_UNIT - 1) / JOURNAL_UNIT;
		seq++;
	}
}

/* Node, offset, length, bytes; a bitmap's checksum stays wrong. */
static void change_nodes(struct input *in, const struct base *b)
{
	while (in->left > 4) {
		uint64_t block = b->node[byte(in) % b->nodes];
		struct disk_node *d = (void *)(disk + block * BLOCK);
		unsigned off = word(in) % BLOCK, len = byte(in);

		if (len > BLOCK - off)
			len = BLOCK - off;
		bytes(in, (uint8_t *)d + off, len);
		touched[block] = true;
		if (get32(d->magic) != NODE_MAGIC)
			continue;
		d->csum = put64(0);
		d->csum = put64(checksum(d, BLOCK));
	}
}

/* Which of the blocks that are not empty, offset, length, bytes. */
static void change_raw(struct input *in, const struct base *b)
{
	while (in->left > 4) {
		unsigned block = b->used[byte(in) % b->useds];
		unsigned off = word(in) % BLOCK, len = byte(in) + 1;

		if (len > BLOCK - off)
			len = BLOCK - off;
		bytes(in, disk + block * BLOCK + off, len);
		touched[block] = true;
	}
}

/* ---- using it ----------------------------------------------------------------------- */

struct look {
	struct fs *fs;
	unsigned left;			/* entries still to be looked at */
	unsigned depth;
	unsigned errors;		/* that something is damaged */
	unsigned seen;			/* entries */
	bool compare;			/* contents have to be what was written */
	bool rounded;			/* sizes may be made up of whole blocks */
};

static int note(struct look *l, ssize_t ret)
{
	l->errors += ret == -EUCLEAN || ret == -EBADMSG;
	return ret < 0 ? (int)ret : 0;
}

static void look_xattrs(struct look *l, uint64_t ino)
{
	static char names[XATTR_LIST_MAX], val[XATTR_VALUE_MAX];
	ssize_t n = fs_listxattr(l->fs, NULL, ino, names, sizeof(names)), len;

	if (note(l, n))
		return;
	for (char *p = names; p < names + n; p += strlen(p) + 1) {
		len = fs_getxattr(l->fs, ino, p, val, sizeof(val));
		if (!note(l, len) && l->compare)
			must("xattr", !memcmp(val, len == 1 ? "s" : content,
					      (size_t)len));
	}
}

/* All contents are the same, once more after a hole in the larger files. */
static bool is_right(const struct look *l, const struct stat *st, off_t at, char c)
{
	const off_t all = sizeof(content), second = 40 * (off_t)BLOCK;

	if (!c && st->st_size > all)
		return true;
	/* a file whose inode was lost ends with its last block */
	if (!c && l->rounded && at >= st->st_size - BLOCK)
		return true;
	return (at < all && c == content[at]) ||
	       (at >= second && at - second < all && c == content[at - second]);
}

static void look_data(struct look *l, uint64_t ino, const struct stat *st)
{
	static char buf[64 * 1024];
	off_t at = 0;

	for (unsigned i = 0; i < 64 && at < st->st_size; i++) {
		char *data;
		ssize_t n = fs_read(l->fs, ino, buf, 3 * BLOCK, at, &data);

		if (note(l, n) || n <= 0)
			break;
		for (ssize_t j = 0; l->compare && j < n; j++)
			must("wrong data", is_right(l, st, at + j, data[j]));
		at += n;
		at = fs_lseek(l->fs, ino, at, SEEK_DATA);
		if (at < 0)
			break;
	}
}

static int look_entry(void *ctx, const char *name, const struct fs_entry *e,
		      uint64_t next);

static void look_ino(struct look *l, uint64_t ino)
{
	char target[4096];
	struct stat st;

	if (!l->left)
		return;
	l->left--;
	if (note(l, fs_getattr(l->fs, ino, &st)))
		return;
	look_xattrs(l, ino);
	if (S_ISLNK(st.st_mode)) {
		note(l, fs_readlink(l->fs, ino, target, sizeof(target)));
	} else if (S_ISREG(st.st_mode)) {
		look_data(l, ino, &st);
	} else if (S_ISDIR(st.st_mode) && l->depth < 12) {
		l->depth++;
		note(l, fs_readdir(l->fs, ino, 0, false, look_entry, l));
		l->depth--;
	}
}

static int look_entry(void *ctx, const char *name, const struct fs_entry *e,
		      uint64_t next)
{
	struct look *l = ctx;
	struct fs_entry found;

	(void)next;
	if (!strcmp(name, ".") || !strcmp(name, ".."))
		return 0;
	l->seen++;
	look_ino(l, e->ino);
	if (!note(l, fs_lookup(l->fs, ROOT_INO, name, &found)))
		fs_forget(l->fs, found.ino, 1);
	return l->left == 0;
}

static unsigned entries;		/* of the first volume */

/* What is read has to be what was written; and nothing may be missing. */
enum { ANY, DATA, ALL };

/* Read all. How often it was damaged; -1: it does not open. */
static int look_at_all(int compare)
{
	struct fs_options none = {0};
	struct look l = {.left = 400, .compare = compare != ANY,
			 .rounded = compare == DATA};
	struct volume *v;

	if (open_volume(&v, true, NULL))
		return -1;
	if (!fs_open(v, &none, &l.fs)) {
		look_ino(&l, ROOT_INO);
		fs_close(l.fs);
	}
	volume_close(v);
	if (!entries)
		entries = l.seen;
	must("an entry is gone without a word",
	     compare != ALL || l.errors || l.seen == entries);
	return (int)l.errors;
}

static void use_dir(struct fs *fs, uint64_t dir)
{
	static const char *const names[] = {
		"first-dir", "first-big", "first-clone", "later-big",
		"first-sparse"};
	const struct fs_cred c = {0};
	struct fs_entry e, n;
	struct stat st;

	for (unsigned i = 0; i < sizeof(names) / sizeof(*names); i++) {
		if (fs_lookup(fs, dir, names[i], &e))
			continue;
		fs_write(fs, e.ino, content, 5000, 3000, 0);
		st.st_size = 4097;
		fs_setattr(fs, e.ino, FS_SET_SIZE, &st);
		fs_setxattr(fs, &c, e.ino, "user.long", content, 700, 0);
		fs_removexattr(fs, &c, e.ino, "user.short");
		if (!fs_mknod(fs, &c, e.ino, "in it", S_IFREG | 0600, 0, &n))
			fs_forget(fs, n.ino, 1);
		fs_rename(fs, &c, dir, names[i], dir, "elsewhere", 0);
		if (i % 2)
			fs_unlink(fs, dir, "elsewhere");
		fs_forget(fs, e.ino, 1);
	}
}

static void use_it(void)
{
	const struct fs_cred c = {0};
	struct fs_options none = {0};
	struct fs_entry e;
	struct volume *v;
	struct fs *fs;

	if (open_volume(&v, false, NULL))
		return;
	if (!fs_open(v, &none, &fs)) {
		use_dir(fs, ROOT_INO);
		if (!fs_mkdir(fs, &c, ROOT_INO, "new", 0755, &e)) {
			fs_rename(fs, &c, ROOT_INO, "first-big", e.ino, "moved", 0);
			fs_forget(fs, e.ino, 1);
		}
		volume_checkpoint(v);
		fs_unlink(fs, ROOT_INO, "first-clone");
		fs_sync(fs);
		fs_close(fs);
	}
	volume_close(v);
}

/* ---- fsck ------------------------------------------------------------------------------ */

#ifdef FUZZ_fsck_ALONE
static void fsck_it(bool compare)
{
	uint64_t before = checksum(disk, BYTES);
	int n = fsck_call(&mem, "-fcn"), y, errors;

	must("-n changes the image", checksum(disk, BYTES) == before);
	must("-n's status", n == 0 || n == 4 || n == 8 || n == 12);
	if (n == 0) {
		errors = look_at_all(ANY);
		must("-n calls clean what cannot be read", errors == 0);
	}
	y = fsck_call(&mem, "-fy");
	must("-y's status", (y & ~(1 | 4 | 8)) == 0);
	must("-n finds nothing, -y does", n != 0 || y == 0);
	if (y <= 1) {
		must("clean after -y, and -n finds something", fsck_call(&mem, "-fn") == 0);
		must("clean after -y, and does not open",
		     look_at_all(compare ? DATA : ANY) >= 0);
	}
}
#else
static void fsck_it(bool compare) { (void)compare; }
#endif

/* ---- inputs -------------------------------------------------------------------------------- */

static void run(int target, struct input *in)
{
	const struct base *b = &bases[target == FUZZ_node ? byte(in) & 1 : 0];

	take(b);
	if (target == FUZZ_super)
		change_super(in);
	else if (target == FUZZ_journal)
		change_journal(in);
	else if (target == FUZZ_node)
		change_nodes(in, b);
	else
		change_raw(in, b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, size};
	int target = FUZZ_TARGET;

	if (target == FUZZ_fsck) {
		target = (int)(byte(&in) % 4);
		run(target, &in);
		fsck_it(target == FUZZ_raw);
		return 0;
	}
	run(target, &in);
	look_at_all(target == FUZZ_raw ? ALL : ANY);
	use_it();
	return 0;
}

/* ---- first inputs ----------------------------------------------------------------------------- */

static void seed(const char *dir, unsigned n, int target, const uint8_t *p,
		 size_t len)
{
	char path[512];
	FILE *f;

	snprintf(path, sizeof(path), "%s/seed-%d-%03u", dir, target, n);
	f = fopen(path, "w");
	must(path, f != NULL);
	if (FUZZ_TARGET == FUZZ_fsck)
		fputc(target, f);
	must(path, fwrite(p, 1, len, f) == len && !fclose(f));
}

static void seed_nodes(const char *dir)
{
	unsigned n = 0;

	for (unsigned k = 0; k < 2; k++)
		for (unsigned i = 0; i < bases[k].nodes && i < 255; i++) {
			const uint8_t *node = bases[k].disk + bases[k].node[i] * BLOCK;
			const struct disk_node *d = (const void *)node;
			unsigned count = get32(d->magic) == NODE_MAGIC ?
						 get16(d->count) : 0;

			for (unsigned j = 0; j < count; j += 7) {
				unsigned at = get16(((const le16 *)(d + 1))[j]);
				unsigned len = BLOCK - at < 200 ? BLOCK - at : 200;
				uint8_t b[256] = {(uint8_t)k, (uint8_t)i,
						  (uint8_t)at, (uint8_t)(at >> 8),
						  (uint8_t)len};

				memcpy(b + 5, node + at, len);
				seed(dir, n++, FUZZ_node, b, 5 + len);
			}
		}
}

/* The items of the groups that the second volume has. */
static void seed_journal(const char *dir)
{
	const uint8_t *d = bases[1].disk;
	unsigned n = 0;

	for (unsigned u = HEAD_BYTES; u < BYTES / 2; u += JOURNAL_UNIT) {
		const struct disk_group *g = (const void *)(d + u);
		unsigned len = get32(g->bytes) - (unsigned)sizeof(*g);
		uint8_t b[8192 + 5];

		if (get32(g->magic) != GROUP_MAGIC || len > 8192)
			continue;
		b[0] = (uint8_t)get32(g->items);
		b[1] = (uint8_t)(get32(g->items) >> 8);
		b[2] = (uint8_t)len;
		b[3] = (uint8_t)(len >> 8);
		b[4] = get64(g->of_gen) ? 2 : 1;
		memcpy(b + 5, g + 1, len);
		seed(dir, n++, FUZZ_journal, b, 5 + len);
	}
}

static void seeds(const char *dir)
{
	uint8_t b[SUPER_BYTES + 1] = {2};
	int t = FUZZ_TARGET;

	memcpy(b + 1, bases[0].disk, SUPER_BYTES);
	if (t == FUZZ_super || t == FUZZ_fsck)
		seed(dir, 0, FUZZ_super, b, 600);
	if (t == FUZZ_node || t == FUZZ_fsck)
		seed_nodes(dir);
	if (t == FUZZ_journal || t == FUZZ_fsck)
		seed_journal(dir);
	for (unsigned i = 0; i < bases[0].useds && i < 256; i += 3)
		if (t == FUZZ_raw || t == FUZZ_fsck) {
			uint8_t r[] = {(uint8_t)i, (uint8_t)(7 * i), 0, 3, 'w', 'r',
				       'o', 'n', 'g'};

			seed(dir, i, FUZZ_raw, r, sizeof(r));
		}
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc, (void)argv;
	make_bases();
	take(&bases[0]);
	must("look", look_at_all(ALL) == 0 && entries == 30);
	if (getenv("FUZZ_SEEDS")) {
		seeds(getenv("FUZZ_SEEDS"));
		_exit(0);
	}
	return 0;
}
