/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * witness: knows what a tree was, and compares.
 *
 *   witness make DIR PART         part 1 or 2 of a tree with something of everything
 *   witness note DIR NOTES        write down all that can be read
 *   witness change DIR            what damaged.sh does to a damaged volume; prints
 *                                 the new files that an fsync promised
 *   witness compare DIR NOTES exact|changed [PROMISED]
 *   witness compare DIR NOTES repaired [OLDER...]
 *
 * compare: what can be read must be what was noted, or the call must fail with an
 * error that says damage. exact: nothing is missing or new without such an error
 * where it is listed and where it is looked up. changed: the same, but for what
 * change does. repaired: names may be missing or in lost+found, counts of links
 * differ; an inode may be "rebuilt" with other attributes and another end, which is
 * counted; but no byte differs. What is in OLDER, notes of earlier states, the latest
 * first, but not in NOTES, may be there again ("returned").
 * Goes on after whatever it finds. Exits with 0, 1 for a difference, 3 when the
 * file system has gone away. Its last line counts: reads of data that failed
 * ("unread") and other calls that did ("errors") apart.
 */
#include "tests/mnt/pattern.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>
#include <xxhash.h>

#define BLOCK 4096
#define NEW_BYTE 0x5a
#define PATH_BYTES 4096

/* ---- make ---------------------------------------------------------------------- */

static void die(const char *what)
{
	fprintf(stderr, "witness: %s: %s\n", what, strerror(errno));
	exit(2);
}

static void must(int ret, const char *what)
{
	if (ret < 0)
		die(what);
}

static void put(const char *name, uint64_t at, uint64_t bytes)
{
	static uint8_t buf[1 << 16];
	uint64_t key = XXH3_64bits(name, strlen(name));
	int fd = open(name, O_WRONLY | O_CREAT, 0600 | (mode_t)(key & 0177));

	must(fd, name);
	for (uint64_t end = at + bytes; at < end;) {
		size_t n = end - at < sizeof(buf) ? end - at : sizeof(buf);

		pattern_fill(key, at, buf, n);
		must((int)pwrite(fd, buf, n, (off_t)at), name);
		at += n;
	}
	close(fd);
}

static void attribute(const char *name, const char *attr, size_t bytes)
{
	static uint8_t buf[65536];

	pattern_fill(XXH3_64bits(attr, strlen(attr)), 0, buf, bytes);
	must(setxattr(name, attr, buf, bytes, 0), name);
}

static void clone(const char *from, const char *to, off_t at, size_t len)
{
	int in = open(from, O_RDONLY), out = open(to, O_WRONLY | O_CREAT, 0644);
	off_t same = at;

	must(in, from);
	must(out, to);
	must(fsync(in), from);
	must((int)copy_file_range(in, &at, out, &same, len, 0), to);
	close(in);
	close(out);
}

static void make(unsigned part)
{
	static const unsigned sizes[] = {0, 1, 100, 4095, 4096, 4097, 20000, 65536, 131073,
					 700000, 3000000};
	char name[PATH_BYTES], other[PATH_BYTES + 8];
	int len;

	for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		snprintf(name, sizeof(name), "size.%u.%u", part, sizes[i]);
		put(name, 0, sizes[i]);
	}
	snprintf(name, sizeof(name), "many.%u", part);
	must(mkdir(name, 0755), name);
	for (unsigned i = 0; i < 900; i++) {
		snprintf(name, sizeof(name), "many.%u/file number %u", part, i);
		put(name, 0, i % 9 * 300);
		if (i % 10 == 0)
			attribute(name, "user.few", i % 200);
		if (i % 30 == 0) {
			snprintf(other, sizeof(other), "many.%u/link to %u", part, i);
			must(link(name, other), other);
		}
	}
	len = snprintf(name, sizeof(name), "deep.%u", part);
	for (unsigned i = 0; i < 25; i++) {
		must(mkdir(name, 0711), name);
		snprintf(other, sizeof(other), "%s/file", name);
		put(other, 0, 5000);
		len += snprintf(name + len, sizeof(name) - (size_t)len, "/deep %u", i);
	}
	for (unsigned i = 0; i < 12; i++) {
		snprintf(name, sizeof(name), "sparse.%u.%u", part, i);
		for (unsigned k = 0; k < 40; k++)
			put(name, (uint64_t)k * (i + 1) * 16384, 4096);
		must(truncate(name, 10000000 + i), name);
		if (i % 3 == 0) {
			snprintf(other, sizeof(other), "clone.%u.%u", part, i);
			clone(name, other, 0, 400000);
			put(other, 40960, 9000);
		}
	}
	snprintf(name, sizeof(name), "size.%u.3000000", part);
	snprintf(other, sizeof(other), "clone.%u", part);
	clone(name, other, 0, 3000000);
	snprintf(name, sizeof(name), "attributes.%u", part);
	put(name, 0, 10);
	attribute(name, "user.long", 60000);
	for (unsigned i = 0; i < 40; i++) {
		snprintf(other, sizeof(other), "user.attribute number %u", i);
		attribute(name, other, i * 77);
	}
	for (unsigned i = 0; i < 20; i++) {
		snprintf(name, sizeof(name), "symlink.%u.%u", part, i);
		memset(other, 'a' + (int)i, i * 200 + 1);
		other[i * 200 + 1] = 0;
		must(symlink(other, name), name);
	}
	snprintf(name, sizeof(name), "fifo.%u", part);
	must(mkfifo(name, 0640), name);
	if (!geteuid()) {
		snprintf(name, sizeof(name), "device.%u", part);
		must(mknod(name, S_IFCHR | 0600, makedev(1, 3)), name);
		must(lchown(name, 5, 6), name);
	}
	/* for change() */
	mkdir("gone", 0755);
	mkdir("over", 0755);
	for (unsigned i = 0; i < 40; i++) {
		snprintf(name, sizeof(name), "gone/%u.%u", part, i);
		put(name, 0, i * 1000);
		snprintf(name, sizeof(name), "over/%u.%u", part, i);
		put(name, 0, 8192 * i);
	}
}

/* ---- notes --------------------------------------------------------------------- */

struct head {
	uint64_t ino, size, mtime_ns, rdev;
	uint32_t mode, uid, gid, nlink;
	uint32_t parent;	/* its place in the notes; the root's is its own */
	uint32_t path_len, blocks, xattrs_len;
};

struct record {
	struct head h;
	char *path;		/* "" for the root */
	uint64_t *hashes;	/* of its blocks; of a symlink's target */
	char *xattrs;		/* name, 0, and the value's length and hash */
	bool seen, listed;
};

static struct record *recs;
static uint32_t recs_n;

static uint64_t hash(const void *buf, size_t n)
{
	return XXH3_64bits(buf, n);
}

static struct record *add(void)
{
	if (recs_n % 1024 == 0)
		recs = realloc(recs, (recs_n + 1024) * sizeof(*recs));
	memset(&recs[recs_n], 0, sizeof(*recs));
	return &recs[recs_n++];
}

static void take_stat(struct head *h, const struct stat *st)
{
	h->ino = st->st_ino;
	h->size = S_ISDIR(st->st_mode) ? 0 : (uint64_t)st->st_size;
	h->mtime_ns = (uint64_t)st->st_mtim.tv_sec * 1000000000 + (uint64_t)st->st_mtim.tv_nsec;
	h->rdev = st->st_rdev;
	h->mode = st->st_mode;
	h->uid = st->st_uid;
	h->gid = st->st_gid;
	h->nlink = (uint32_t)st->st_nlink;
}

/* The attributes as bytes that can be compared; NULL with errno. */
static char *xattrs_of(const char *path, uint32_t *len)
{
	static char list[65536];
	static uint8_t value[65536];
	ssize_t n = llistxattr(path, list, sizeof(list)), got;
	char *out;

	if (n < 0)
		return NULL;
	out = malloc((size_t)n + 16 * 1024);
	*len = 0;
	for (char *x = list; x < list + n; x += strlen(x) + 1) {
		uint64_t both[2];

		got = lgetxattr(path, x, value, sizeof(value));
		if (got < 0) {
			free(out);
			return NULL;
		}
		memcpy(out + *len, x, strlen(x) + 1);
		*len += (uint32_t)strlen(x) + 1;
		both[0] = (uint64_t)got;
		both[1] = hash(value, (size_t)got);
		memcpy(out + *len, both, sizeof(both));
		*len += sizeof(both);
	}
	return out;
}

static void note_tree(const char *dir, const char *path, uint32_t parent)
{
	static uint8_t buf[BLOCK];
	char full[PATH_BYTES * 2], target[PATH_BYTES];
	uint32_t me = recs_n;
	struct record *r = add();
	struct stat st;
	ssize_t n;

	snprintf(full, sizeof(full), "%s/%s", dir, path);
	must(lstat(full, &st), full);
	take_stat(&r->h, &st);
	r->h.parent = parent;
	r->path = strdup(path);
	r->h.path_len = (uint32_t)strlen(path);
	r->xattrs = xattrs_of(full, &r->h.xattrs_len);
	if (!r->xattrs)
		die(full);
	if (S_ISLNK(st.st_mode)) {
		n = readlink(full, target, sizeof(target));
		must((int)n, full);
		r->h.blocks = 1;
		r->hashes = malloc(sizeof(uint64_t));
		r->hashes[0] = hash(target, (size_t)n);
	} else if (S_ISREG(st.st_mode)) {
		int fd = open(full, O_RDONLY);

		must(fd, full);
		r->hashes = malloc(((size_t)st.st_size / BLOCK + 1) * sizeof(uint64_t));
		while ((n = pread(fd, buf, BLOCK, (off_t)r->h.blocks * BLOCK)) > 0)
			r->hashes[r->h.blocks++] = hash(buf, (size_t)n);
		must((int)n, full);
		close(fd);
	} else if (S_ISDIR(st.st_mode)) {
		DIR *d = opendir(full);
		struct dirent *e;

		if (!d)
			die(full);
		while ((e = readdir(d))) {
			if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
				continue;
			snprintf(full, sizeof(full), "%s%s%s", path, *path ? "/" : "", e->d_name);
			note_tree(dir, full, me);
		}
		closedir(d);
	}
}

static void save(const char *file)
{
	FILE *f = fopen(file, "w");

	if (!f)
		die(file);
	for (uint32_t i = 0; i < recs_n; i++) {
		const struct record *r = &recs[i];

		fwrite(&r->h, sizeof(r->h), 1, f);
		fwrite(r->path, 1, r->h.path_len, f);
		fwrite(r->hashes, sizeof(uint64_t), r->h.blocks, f);
		fwrite(r->xattrs, 1, r->h.xattrs_len, f);
	}
	if (fclose(f))
		die(file);
	printf("noted %u\n", recs_n);
}

/* Is there a record of the same name or inode before this last one? */
static bool is_known(const struct record *last)
{
	for (const struct record *r = recs; r < last; r++)
		if (r->h.ino == last->h.ino || !strcmp(r->path, last->path))
			return true;
	return false;
}

static void load(const char *file, bool older)
{
	FILE *f = fopen(file, "r");
	struct head h;

	if (!f)
		die(file);
	while (fread(&h, sizeof(h), 1, f) == 1) {
		struct record *r = add();

		r->h = h;
		r->path = calloc(1, h.path_len + 1);
		r->hashes = calloc(h.blocks + 1, sizeof(uint64_t));
		r->xattrs = calloc(1, h.xattrs_len + 1);
		if (fread(r->path, 1, h.path_len, f) != h.path_len ||
		    fread(r->hashes, sizeof(uint64_t), h.blocks, f) != h.blocks ||
		    fread(r->xattrs, 1, h.xattrs_len, f) != h.xattrs_len)
			die(file);
		if (older && is_known(r))
			recs_n--;
	}
	fclose(f);
}

/* ---- compare ------------------------------------------------------------------- */

static enum { EXACT, CHANGED, REPAIRED } mode;
static const char *top;
static unsigned long wrong, unread, errors, missing, rebuilt, objects, blocks;

#define WRONG(...) (wrong++ < 10 ? (void)printf("WRONG: " __VA_ARGS__) : (void)0)

/* A call failed: with one of the errors that may be? */
static void failed(const char *what, const char *path)
{
	switch (errno) {
	case EIO:
	case EUCLEAN:
	case EBADMSG:
		if (!strcmp(what, "read"))
			unread++;
		else
			errors++;
		break;
	case ENOTCONN:
	case ECONNABORTED:
		printf("GONE: %s: %s: %s\n", path, what, strerror(errno));
		exit(3);
	default:
		WRONG("%s: %s: %s\n", path, what, strerror(errno));
	}
}

/* Mostly the one behind the last: folders list in the same order each time. */
static struct record *by_path(const char *path)
{
	static uint32_t next;

	for (uint32_t i = 0; i < recs_n; i++, next++) {
		if (next >= recs_n)
			next = 0;
		if (!strcmp(recs[next].path, path))
			return &recs[next++];
	}
	return NULL;
}

static struct record *by_ino(uint64_t ino)
{
	for (uint32_t i = 0; i < recs_n; i++)
		if (recs[i].h.ino == ino)
			return &recs[i];
	return NULL;
}

static bool starts(const char *s, const char *with)
{
	return !strncmp(s, with, strlen(with));
}

static bool all(const uint8_t *buf, size_t n, uint8_t byte)
{
	for (size_t i = 0; i < n; i++)
		if (buf[i] != byte)
			return false;
	return true;
}

static void compare_block(const struct record *r, const char *full, const uint8_t *buf,
			  size_t n, uint32_t blk)
{
	size_t want = r->h.size - (uint64_t)blk * BLOCK < BLOCK ?
		      r->h.size - (uint64_t)blk * BLOCK : BLOCK;

	blocks++;
	if (n == want && hash(buf, n) == r->hashes[blk])
		return;
	if (mode != EXACT && starts(r->path, "over/") && n == want && all(buf, n, NEW_BYTE))
		return;
	if (mode == REPAIRED && n > want && all(buf + want, n - want, 0) &&
	    hash(buf, want) == r->hashes[blk])
		return;			/* its inode was rebuilt */
	WRONG("%s: block %u of %u: %zu bytes, not those that were written%s\n", full, blk,
	      r->h.blocks, n, all(buf, n, 0) ? ": zeroes" : "");
}

static void compare_data(const struct record *r, const char *full)
{
	static uint8_t buf[32 * BLOCK];
	int fd = open(full, O_RDONLY);
	uint32_t blk, step;
	uint64_t want;
	ssize_t n;

	if (fd < 0) {
		failed("open", full);
		return;
	}
	for (blk = 0; blk < r->h.blocks; blk += step) {
		step = r->h.blocks - blk < 32 ? r->h.blocks - blk : 32;
		n = pread(fd, buf, (size_t)step * BLOCK, (off_t)blk * BLOCK);
		want = r->h.size - (uint64_t)blk * BLOCK;
		if (n < (ssize_t)step * BLOCK && n < (ssize_t)want) {
			/* one by one, to see what can be read */
			step = 1;
			n = pread(fd, buf, BLOCK, (off_t)blk * BLOCK);
		}
		if (n < 0) {
			failed("read", full);
			continue;
		}
		if (!n && mode == REPAIRED)
			break;		/* its inode was rebuilt, and ends here */
		for (uint32_t i = 0; i < step; i++) {
			size_t at = (size_t)i * BLOCK;
			size_t have = at >= (size_t)n ? 0 : (size_t)n - at;

			compare_block(r, full, buf + at, have < BLOCK ? have : BLOCK, blk + i);
		}
	}
	if (mode != REPAIRED && pread(fd, buf, 1, (off_t)r->h.size) > 0)
		WRONG("%s: it goes on behind its end\n", full);
	close(fd);
}

static void compare_stat(const struct record *r, const struct stat *st, const char *full)
{
	struct head h;
	bool changes = starts(r->path, "over/") || !strcmp(r->path, "gone") || !*r->path;

	take_stat(&h, st);
	if (mode == REPAIRED || (mode == CHANGED && changes)) {
		h.nlink = r->h.nlink;
		if (S_ISDIR(h.mode) || changes)
			h.mtime_ns = r->h.mtime_ns;
	}
	if (mode == REPAIRED && h.ino == r->h.ino && (h.mode & S_IFMT) == (r->h.mode & S_IFMT) &&
	    (h.mode != r->h.mode || h.size != r->h.size || h.mtime_ns != r->h.mtime_ns)) {
		rebuilt++;
		return;
	}
	if (h.ino != r->h.ino || h.size != r->h.size || h.mtime_ns != r->h.mtime_ns ||
	    h.rdev != r->h.rdev || h.mode != r->h.mode || h.uid != r->h.uid ||
	    h.gid != r->h.gid || h.nlink != r->h.nlink)
		WRONG("%s: was: inode %llu mode %o links %u owner %u:%u size %llu time %llu; "
		      "is: inode %llu mode %o links %u owner %u:%u size %llu time %llu\n",
		      full, (unsigned long long)r->h.ino, r->h.mode, r->h.nlink, r->h.uid,
		      r->h.gid, (unsigned long long)r->h.size, (unsigned long long)r->h.mtime_ns,
		      (unsigned long long)h.ino, h.mode, h.nlink, h.uid, h.gid,
		      (unsigned long long)h.size, (unsigned long long)h.mtime_ns);
}

static void compare_xattrs(const struct record *r, const char *full)
{
	uint32_t len;
	char *x = xattrs_of(full, &len);

	if (!x && errno == ENODATA && mode == REPAIRED)
		return;
	if (!x)
		failed("attributes", full);
	else if (len != r->h.xattrs_len || memcmp(x, r->xattrs, len))
		mode == REPAIRED && len < r->h.xattrs_len ? (void)missing++ :
			WRONG("%s: its attributes\n", full);
	free(x);
}

static void visit(const char *full, const char *noted);

static void visit_dir(struct record *r, const char *full, const char *noted)
{
	char next[PATH_BYTES * 2], next_noted[PATH_BYTES];
	struct dirent *e;
	DIR *d = opendir(full);
	uint32_t me = (uint32_t)(r - recs);
	bool whole = true;

	if (!d) {
		failed("opendir", full);
		return;
	}
	for (;;) {
		errno = 0;
		e = readdir(d);
		if (!e)
			break;
		if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
			continue;
		snprintf(next, sizeof(next), "%s/%s", full, e->d_name);
		snprintf(next_noted, sizeof(next_noted), "%s%s%s", noted, *noted ? "/" : "", e->d_name);
		visit(next, next_noted);
	}
	if (errno) {
		whole = false;
		failed("readdir", full);
	}
	closedir(d);
	for (uint32_t i = 0; i < recs_n && mode != REPAIRED; i++) {
		if (recs[i].h.parent != me || recs[i].listed || !i)
			continue;
		if (mode == CHANGED && starts(recs[i].path, "gone/"))
			continue;
		if (whole)
			WRONG("%s: it does not list %s, without an error\n", full, recs[i].path);
		snprintf(next, sizeof(next), "%s/%s", top, recs[i].path);
		visit(next, recs[i].path);
	}
}

/* Something new: of change(), or lost+found. */
static void visit_new(const char *full, const char *noted, const struct stat *st)
{
	static uint8_t buf[1 << 17];
	const char *name = strrchr(full, '/') + 1;
	ssize_t n;
	int fd;

	if (!strcmp(noted, "lost+found") && S_ISDIR(st->st_mode)) {
		char next[PATH_BYTES * 2];
		DIR *d = opendir(full);
		struct dirent *e;

		while (d && (e = readdir(d))) {
			if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
				continue;
			snprintf(next, sizeof(next), "%s/%s", full, e->d_name);
			visit(next, "?");
		}
		if (d)
			closedir(d);
		return;
	}
	if (!(starts(name, "new.") || starts(full + strlen(top), "/lost+found/")) ||
	    mode == EXACT) {
		WRONG("%s: nobody made it\n", full);
		return;
	}
	if (!S_ISREG(st->st_mode))
		return;
	fd = open(full, O_RDONLY);
	n = fd < 0 ? -1 : read(fd, buf, sizeof(buf));
	if (n < 0)
		failed("read", full);
	else if (!all(buf, (size_t)n, NEW_BYTE))
		WRONG("%s: not what was written\n", full);
	if (fd >= 0)
		close(fd);
}

static void visit(const char *full, const char *noted)
{
	struct record *r = by_path(noted);
	char target[PATH_BYTES];
	struct stat st;
	ssize_t n;

	objects++;
	if (r) {
		if (r->listed && mode != REPAIRED)
			WRONG("%s: listed twice\n", full);
		r->listed = true;
	}
	if (lstat(full, &st)) {
		failed("stat", full);
		return;
	}
	if (mode == REPAIRED && (!r || r->h.ino != st.st_ino)) {
		if (r && by_ino(st.st_ino))
			WRONG("%s: it is another file\n", full);
		r = by_ino(st.st_ino);
	}
	if (!r) {
		visit_new(full, noted, &st);
		return;
	}
	r->seen = true;
	compare_stat(r, &st, full);
	compare_xattrs(r, full);
	if (S_ISLNK(st.st_mode) && S_ISLNK(r->h.mode)) {
		n = readlink(full, target, sizeof(target));
		if (n < 0)
			failed("readlink", full);
		else if (hash(target, (size_t)n) != r->hashes[0])
			WRONG("%s: its target\n", full);
	} else if (S_ISREG(st.st_mode) && S_ISREG(r->h.mode)) {
		compare_data(r, full);
	} else if (S_ISDIR(st.st_mode) && S_ISDIR(r->h.mode)) {
		visit_dir(r, full, r->path);
	}
}

static void compare_promised(const char *file)
{
	char name[300], full[PATH_BYTES];
	FILE *f = fopen(file, "r");
	struct stat st;
	unsigned size;

	while (f && fscanf(f, "%299s %u", name, &size) == 2) {
		snprintf(full, sizeof(full), "%s/%s", top, name);
		if (lstat(full, &st))
			failed("stat of what was promised", full);
		else if (st.st_size != size)
			WRONG("%s: %lld bytes, promised were %u\n", full, (long long)st.st_size, size);
	}
	if (f)
		fclose(f);
}

static int compare(int argc, char **argv)
{
	unsigned long returned = 0;
	uint32_t noted;

	top = argv[0];
	load(argv[1], false);
	noted = recs_n;
	mode = !strcmp(argv[2], "exact") ? EXACT : !strcmp(argv[2], "changed") ? CHANGED : REPAIRED;
	for (int i = 3; i < argc && mode == REPAIRED; i++)
		load(argv[i], true);
	visit(top, "");
	if (argc > 3 && mode != REPAIRED)
		compare_promised(argv[3]);
	for (uint32_t i = 0; mode == REPAIRED && i < recs_n; i++) {
		missing += i < noted && !recs[i].seen;
		returned += i >= noted && recs[i].seen;
	}
	if (returned)
		printf("%lu returned\n", returned);
	printf("%s: %lu objects, %lu blocks, %lu unread, %lu errors, %lu missing, "
	       "%lu rebuilt, %lu wrong\n", argv[2], objects, blocks, unread, errors, missing,
	       rebuilt, wrong);
	return wrong ? 1 : 0;
}

/* ---- change -------------------------------------------------------------------- */

static bool may_fail(int ret, const char *what)
{
	if (ret >= 0)
		return true;
	if (errno != ENOSPC && errno != EROFS && errno != ENOENT)
		failed("change", what);
	return false;
}

static int change(void)
{
	static uint8_t buf[1 << 17];
	char name[64];
	int fd;

	top = ".";
	memset(buf, NEW_BYTE, sizeof(buf));
	for (unsigned part = 1; part < 3; part++) {
		for (unsigned i = 0; i < 40; i += 2) {
			snprintf(name, sizeof(name), "gone/%u.%u", part, i);
			may_fail(unlink(name), name);
			snprintf(name, sizeof(name), "over/%u.%u", part, i);
			fd = open(name, O_WRONLY);
			if (may_fail(fd, name)) {
				may_fail((int)pwrite(fd, buf, i / 2 * BLOCK, i / 4 * BLOCK), name);
				close(fd);
			}
		}
	}
	for (unsigned i = 0; i < 30; i++) {
		unsigned bytes = i * 3000;
		bool ok;

		snprintf(name, sizeof(name), "%snew.%u", i % 2 ? "gone/" : "", i);
		fd = open(name, O_WRONLY | O_CREAT | O_EXCL, 0644);
		if (!may_fail(fd, name))
			continue;
		ok = write(fd, buf, bytes) == (ssize_t)bytes;
		ok = may_fail(fsync(fd), name) && ok;
		close(fd);
		if (ok)
			printf("%s %u\n", name, bytes);
	}
	fd = open(".", O_RDONLY);
	may_fail(fsync(fd), ".");
	return wrong ? 1 : 0;
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "make")) {
		must(chdir(argv[2]), argv[2]);
		make((unsigned)atoi(argv[3]));
		return 0;
	}
	if (argc == 4 && !strcmp(argv[1], "note")) {
		note_tree(argv[2], "", 0);
		save(argv[3]);
		return 0;
	}
	if (argc == 3 && !strcmp(argv[1], "change")) {
		if (!may_fail(chdir(argv[2]), argv[2]))
			return wrong ? 1 : 0;
		return change();
	}
	if (argc >= 5 && !strcmp(argv[1], "compare"))
		return compare(argc - 2, argv + 2);
	fprintf(stderr, "usage: witness make DIR PART\n       witness note DIR NOTES\n"
			"       witness change DIR\n"
			"       witness compare DIR NOTES exact|changed [PROMISED]\n"
			"       witness compare DIR NOTES repaired [OLDER...]\n");
	return 2;
}
