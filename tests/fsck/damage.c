/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * damage IMAGE COMMAND ARGUMENTS...: makes a volume with something of
 * everything in it, and breaks one thing in a volume, checksums and all, for
 * the cases in this folder.
 *
 *   make                             fill an empty volume
 *   inode PATH FIELD VALUE           nlink size blks parent next_index xattrs
 *                                    flags mode rdev nsec
 *   inode-del PATH                   the inode's item alone
 *   inode-put INO                    a file without an entry
 *   dirent DIR NAME FIELD VALUE      ino index type
 *   dirent-del DIR NAME              the entry by name alone
 *   dirent-put DIR NAME PATH TYPE    an entry by name and by index
 *   index DIR NAME FIELD VALUE       ino type name, of the entry by index
 *   index-del DIR NAME
 *   map PATH BLK FIELD VALUE         start len flags birth csum, move (to key)
 *   map-del PATH BLK
 *   xattr-del PATH NAME PIECE        xattr-len PATH NAME VALUE
 *   symlink-del PATH PIECE
 *   item-put TABLE KEY VALUE         both in hexadecimal
 *   orphan PATH|INO                  orphan-del PATH|INO
 *   intent PATH|INO FROM TO
 *   ref START LEN COUNT              ref-of PATH BLK COUNT; ref-del PATH BLK
 *   claim START LEN                  in use in the bitmap; claim-free LEN: some
 *                                    that is free
 *   release PATH BLK                 free in the bitmap
 *   node TABLE LEVEL N               spoil the Nth node of a level (or `last')
 *   root-onto TABLE PATH BLK N       the root of a tree stands on the Nth block of
 *                                    a file's run
 *   child TABLE N BLOCK              let the Nth pointer of the lowest inner node
 *                                    lead to another block
 *   child-swap TABLE N M             let two of them change places
 *   blind LEVELS                     whole nodes in the last blocks, to which nobody
 *                                    leads; each leads to the next one below it many
 *                                    times, the lowest to nothing
 *   bitmap N                         spoil a bitmap
 *   space N FIELD VALUE              block free csum, of a bitmap's item; in
 *                                    place, in the node
 *   fuzz SEED                        change bytes of items, anywhere, and seal
 *                                    the node again
 *   many N                           N files more in /many
 *   data PATH BLK                    spoil a block of data
 *   super SLOT FIELD VALUE           gen blocks free inodes aside next_ino flags
 *                                    uuid nodesT itemsT shift version
 *                                    compat ro_compat incompat; 'spoil'
 *   group N                          spoil the Nth group of the journal
 *   scatter PATH N                   a file of every second of 2 N blocks
 *   dirty N                          N small transactions, durable, and a crash
 *   twice N M                        twice N files and a checkpoint, M files, a crash
 *   rewrite NAME N K M               a file of N / K blocks, each written K times,
 *                                    each time durable in the journal, a checkpoint
 *                                    after each M, and a crash
 *   freed PATH BLK                   the journal frees the run's blocks, but it stays
 *                                    in the map; and a crash
 *   truncate BYTES                   of the image
 *
 * These break nothing, but fail if it is not so, or print:
 *
 *   has PATH                         it is there
 *   reads PATH BLK                   the block can be read
 *   lost PATH BLK                    reading it is refused
 *   digest                           of all items of the files
 *   busy FILE MS                     holds the volume open until there is FILE,
 *                                    with a checkpoint each MS milliseconds
 *                                    (-1: none); FILE.held says so
 *
 * Numbers take 0x. A field's VALUE may be +N or -N, or @PATH, an inode's number.
 */
#include "meta/repair.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *path;
static struct image *im;
static struct volume *v;

static void die(const char *what, int ret)
{
	fprintf(stderr, "damage: %s: %s\n", what, strerror(ret < 0 ? -ret : ret));
	exit(2);
}

static void must(const char *what, int ret)
{
	if (ret)
		die(what, ret);
}

static void open_with(const struct volume_repair *rep, bool readonly)
{
	struct volume_options opt = {.no_threads = true,
				     .readonly = readonly,
				     .repair = rep,
				     .program = "damage"};
	char msg[200];
	int ret;

	must(path, image_open(path, IMAGE_WRITE, &im));
	ret = volume_open(im, &opt, &v, msg, sizeof(msg));
	if (ret)
		die(msg, ret);
}

static void open_volume(void)
{
	static const struct volume_repair none;

	open_with(&none, false);
}

static void close_volume(void)
{
	must("close", volume_close(v));
	image_close(im);
}

/* ---- numbers and paths -------------------------------------------------------- */

static uint64_t number(const char *s)
{
	char *e;
	uint64_t n = strtoull(s, &e, 0);

	if (*e || e == s)
		die(s, EINVAL);
	return n;
}

static uint64_t ino_of(const char *p);

static uint64_t change(uint64_t old, const char *s)
{
	if (*s == '@')
		return ino_of(s + 1);
	if (*s == '+')
		return old + number(s + 1);
	if (*s == '-')
		return old - number(s + 1);
	return number(s);
}

/* A path from the root, or a number. */
static uint64_t ino_of(const char *p)
{
	uint64_t ino = ROOT_INO;

	if (*p != '/')
		return number(p);
	while (*p) {
		struct dirent_info e;
		struct inode *dir;
		size_t n;

		p += strspn(p, "/");
		n = strcspn(p, "/");
		if (!n)
			break;
		must(p, inode_get(v, ino, &dir));
		must(p, dir_lookup(v, dir, p, n, &e));
		inode_put(v, dir);
		ino = e.ino;
		p += n;
	}
	return ino;
}

/* ---- items ---------------------------------------------------------------------- */

struct key {
	size_t len;
	uint8_t b[KEY_MAX];
};

static struct key file_key(uint64_t ino, enum file_key type, const void *rest,
			   size_t len)
{
	struct key k = {.len = 9 + len};

	be64_put(k.b, ino);
	k.b[8] = (uint8_t)type;
	memcpy(k.b + 9, rest, len);
	return k;
}

static struct key num_key(uint64_t ino, enum file_key type, uint64_t n)
{
	uint8_t b[8];

	be64_put(b, n);
	return file_key(ino, type, b, 8);
}

static struct key refs_key(enum refs_key type, uint64_t n)
{
	struct key k = {.len = 9};

	k.b[0] = (uint8_t)type;
	be64_put(k.b + 1, n);
	return k;
}

static void item_get(enum table t, const struct key *k, void *val, size_t cap,
		     size_t *len)
{
	must("no such item", repair_get(v, t, k->b, k->len, val, cap, len));
}

static void item_put(enum table t, const struct key *k, const void *val,
		     size_t len)
{
	struct txn *x;

	must("begin", txn_begin(v, TXN_NORMAL, &x));
	must("put", repair_put(x, t, k->b, k->len, val, len));
	must("commit", txn_commit(x));
}

static void item_del(enum table t, const struct key *k)
{
	uint8_t val[VALUE_MAX];
	struct txn *x;
	size_t len;

	item_get(t, k, val, sizeof(val), &len);
	must("begin", txn_begin(v, TXN_NORMAL, &x));
	must("del", repair_del(x, t, k->b, k->len));
	must("commit", txn_commit(x));
}

#define FIELD64(p, f) p->f = put64(change(get64(p->f), value))
#define FIELD32(p, f) p->f = put32((uint32_t)change(get32(p->f), value))
#define IS(name) (!strcmp(field, name))

static void inode_field(uint64_t ino, const char *field, const char *value)
{
	struct key k = file_key(ino, KEY_INODE, "", 0);
	struct disk_inode d, *p = &d;
	size_t len;

	item_get(TABLE_FILES, &k, &d, sizeof(d), &len);
	if (IS("nlink"))
		FIELD32(p, nlink);
	else if (IS("mode"))
		FIELD32(p, mode);
	else if (IS("flags"))
		FIELD32(p, flags);
	else if (IS("rdev"))
		FIELD32(p, rdev);
	else if (IS("xattrs"))
		FIELD32(p, xattrs);
	else if (IS("size"))
		FIELD64(p, size);
	else if (IS("blks"))
		FIELD64(p, blks);
	else if (IS("parent"))
		FIELD64(p, parent);
	else if (IS("next_index"))
		FIELD64(p, next_index);
	else if (IS("nsec"))
		FIELD32(p, mtime.nsec);
	else if (IS("short"))
		len -= 8;
	else
		die(field, EINVAL);
	item_put(TABLE_FILES, &k, &d, len);
}

static void inode_new(uint64_t ino)
{
	struct key k = file_key(ino, KEY_INODE, "", 0);
	struct attr a = {.mode = S_IFREG | 0644, .nlink = 1};
	struct disk_inode d = {0};

	attr_encode(&a, &d);
	item_put(TABLE_FILES, &k, &d, sizeof(d));
}

static void dirent_get(uint64_t dir, const char *name, struct disk_dirent *d)
{
	struct key k = file_key(dir, KEY_DIRENT, name, strlen(name));
	size_t len;

	item_get(TABLE_FILES, &k, d, sizeof(*d), &len);
}

static void dirent_field(uint64_t dir, const char *name, const char *field,
			 const char *value)
{
	struct key k = file_key(dir, KEY_DIRENT, name, strlen(name));
	struct disk_dirent d, *p = &d;

	dirent_get(dir, name, &d);
	if (IS("ino"))
		FIELD64(p, ino);
	else if (IS("index"))
		FIELD64(p, index);
	else if (IS("type"))
		d.type = (uint8_t)change(d.type, value);
	else
		die(field, EINVAL);
	item_put(TABLE_FILES, &k, &d, sizeof(d));
}

static void index_field(uint64_t dir, const char *name, const char *field,
			const char *value)
{
	uint8_t val[VALUE_MAX];
	struct disk_index *p = (void *)val;
	struct disk_dirent e;
	struct key k;
	size_t len;

	dirent_get(dir, name, &e);
	k = num_key(dir, KEY_INDEX, get64(e.index));
	item_get(TABLE_FILES, &k, val, sizeof(val), &len);
	if (IS("ino"))
		p->ino = put64(change(get64(p->ino), value));
	else if (IS("type"))
		p->type = (uint8_t)change(p->type, value);
	else if (IS("name"))
		p->name[0] ^= 1;
	else
		die(field, EINVAL);
	item_put(TABLE_FILES, &k, val, len);
}

static void dirent_new(uint64_t dir, const char *name, uint64_t ino, uint8_t type)
{
	struct inode *ip;
	struct txn *x;

	must("dir", inode_get(v, dir, &ip));
	rwlock_write(&ip->lock);
	must("begin", txn_begin(v, TXN_NORMAL, &x));
	must("add", dir_add(x, ip, name, strlen(name), ino, type));
	must("commit", txn_commit(x));
	rwlock_unlock(&ip->lock);
	inode_put(v, ip);
}

static struct disk_map *map_get(uint64_t ino, uint64_t blk, uint8_t *val,
				size_t *len)
{
	struct key k = num_key(ino, KEY_MAP, blk);

	item_get(TABLE_FILES, &k, val, VALUE_MAX, len);
	return (void *)val;
}

static void map_field(uint64_t ino, uint64_t blk, const char *field,
		      const char *value)
{
	struct key k = num_key(ino, KEY_MAP, blk);
	uint8_t val[VALUE_MAX];
	size_t len;
	struct disk_map *p = map_get(ino, blk, val, &len);

	if (IS("start"))
		FIELD64(p, start);
	else if (IS("len"))
		FIELD32(p, len);
	else if (IS("flags"))
		FIELD32(p, flags);
	else if (IS("birth"))
		FIELD64(p, birth);
	else if (IS("csum"))
		p->csum[0] = put64(change(get64(p->csum[0]), value));
	else if (IS("move"))
		be64_put(k.b + 9, number(value));
	else
		die(field, EINVAL);
	item_put(TABLE_FILES, &k, val, len);
	if (IS("move")) {
		k = num_key(ino, KEY_MAP, blk);
		item_del(TABLE_FILES, &k);
	}
}

static struct key xattr_key(uint64_t ino, const char *name, unsigned piece)
{
	uint8_t rest[260];
	size_t n = strlen(name);

	memcpy(rest, name, n + 1);
	rest[n + 1] = (uint8_t)(piece >> 8);
	rest[n + 2] = (uint8_t)piece;
	return file_key(ino, KEY_XATTR, rest, n + 3);
}

static size_t hex(const char *s, uint8_t *out, size_t cap)
{
	size_t n = 0;

	for (; s[0] && s[1] && n < cap; s += 2)
		if (sscanf(s, "%2hhx", &out[n++]) != 1)
			die(s, EINVAL);
	return n;
}

/* ---- something of everything ------------------------------------------------------- */

static uint64_t add(uint64_t parent, const char *name, mode_t mode,
		    struct inode **keep)
{
	struct attr a = {.mode = mode,
			 .nlink = S_ISDIR(mode) ? 2 : 1,
			 .parent = S_ISDIR(mode) ? parent : 0,
			 .next_index = S_ISDIR(mode) ? 3 : 0,
			 .mtime = {1000000000, 5}};
	struct inode *dir, *ip;
	struct txn *x;
	uint64_t ino;

	must(name, inode_get(v, parent, &dir));
	rwlock_write(&dir->lock);
	must("begin", txn_begin(v, TXN_NORMAL, &x));
	must(name, inode_create(x, &a, &ip));
	must(name, dir_add(x, dir, name, strlen(name), ip->ino,
			   (uint8_t)((mode & S_IFMT) >> 12)));
	if (S_ISDIR(mode))
		inode_edit(x, dir)->nlink++;
	must(name, txn_commit(x));
	rwlock_unlock(&dir->lock);
	inode_put(v, dir);
	ino = ip->ino;
	if (keep) {
		*keep = ip;
		return ino;
	}
	rwlock_unlock(&ip->lock);
	inode_put(v, ip);
	return ino;
}

static void done(struct inode *ip)
{
	rwlock_unlock(&ip->lock);
	inode_put(v, ip);
}

static void fill(struct inode *ip, uint64_t blk, uint64_t n, unsigned seed)
{
	size_t bytes = (size_t)n << volume_block_shift(v);
	uint8_t *buf = malloc(bytes);
	struct txn *x;

	for (size_t i = 0; i < bytes; i++)
		buf[i] = (uint8_t)(seed += i * 7 + (seed >> 3) + 1);
	must("begin", txn_begin(v, TXN_NORMAL, &x));
	must("write", map_write(x, ip, blk, n, buf));
	if (inode_edit(x, ip)->size < (blk + n) << volume_block_shift(v))
		inode_edit(x, ip)->size = (blk + n) << volume_block_shift(v);
	must("commit", txn_commit(x));
	free(buf);
}

static void make_shared(void)
{
	struct inode *a, *b;
	struct txn *x;
	uint64_t next;

	must("get", inode_get(v, add(ROOT_INO, "shared1", S_IFREG | 0644, NULL), &a));
	must("get", inode_get(v, add(ROOT_INO, "shared2", S_IFREG | 0644, NULL), &b));
	rwlock_write(&a->lock);
	rwlock_write_nested(&b->lock, true);
	fill(a, 0, 12, 5);
	must("begin", txn_begin(v, TXN_NORMAL, &x));
	must("share", map_share(x, a, 2, b, 0, 6, &next));
	inode_edit(x, b)->size = 6ull << volume_block_shift(v);
	must("commit", txn_commit(x));
	done(a);
	done(b);
}

static void make_xattrs(void)
{
	struct inode *ip;
	struct txn *x;
	char big[2000];

	memset(big, 'v', sizeof(big));
	add(ROOT_INO, "xattrs", S_IFREG | 0600, &ip);
	must("begin", txn_begin(v, TXN_NORMAL, &x));
	must("xattr", xattr_set(x, ip, "user.big", big, sizeof(big), 0));
	must("xattr", xattr_set(x, ip, "user.small", "s", 1, 0));
	must("commit", txn_commit(x));
	done(ip);
}

static void make_links(void)
{
	struct inode *ip, *dir;
	struct txn *x;
	char target[1500];

	memset(target, 't', sizeof(target));
	add(ROOT_INO, "link", S_IFLNK | 0777, &ip);
	must("begin", txn_begin(v, TXN_NORMAL, &x));
	must("symlink", symlink_set(x, ip, target, sizeof(target)));
	must("commit", txn_commit(x));
	done(ip);
	add(ROOT_INO, "hard1", S_IFREG | 0644, &ip);
	done(ip);
	must("root", inode_get(v, ROOT_INO, &dir));
	rwlock_write(&dir->lock);
	rwlock_write_nested(&ip->lock, true);
	must("begin", txn_begin(v, TXN_NORMAL, &x));
	must("link", dir_add(x, dir, "hard2", 5, ip->ino, DT_REG));
	inode_edit(x, ip)->nlink = 2;
	must("commit", txn_commit(x));
	rwlock_unlock(&ip->lock);
	done(dir);
}

/* An orphan that holds blocks: a file unlinked while open. */
static void make_orphan(void)
{
	struct dirent_info e;
	struct inode *ip, *dir;
	struct txn *x;

	add(ROOT_INO, "gone", S_IFREG | 0644, &ip);
	fill(ip, 0, 3, 77);
	rwlock_unlock(&ip->lock);
	must("root", inode_get(v, ROOT_INO, &dir));
	rwlock_write(&dir->lock);
	rwlock_write_nested(&ip->lock, true);
	must("begin", txn_begin(v, TXN_NORMAL, &x));
	must("lookup", dir_lookup(v, dir, "gone", 4, &e));
	must("remove", dir_remove(x, dir, "gone", 4, &e));
	inode_edit(x, ip)->nlink = 0;
	must("orphan", orphan_add(x, ip));
	must("commit", txn_commit(x));
	rwlock_unlock(&dir->lock);
	inode_put(v, dir);
	done(ip);
}

static void make(void)
{
	struct inode *ip;
	struct txn *x;
	uint64_t dir, next;
	char name[40];

	add(ROOT_INO, "file", S_IFREG | 0644, &ip);
	fill(ip, 0, 3, 1);
	done(ip);
	add(ROOT_INO, "sparse", S_IFREG | 0644, &ip);
	for (unsigned i = 0; i < 20; i++)
		fill(ip, i * 3, 1, i + 9);
	done(ip);
	add(ROOT_INO, "prealloc", S_IFREG | 0644, &ip);
	must("begin", txn_begin(v, TXN_NORMAL, &x));
	must("prealloc", map_prealloc(x, ip, 0, 16, &next));
	must("commit", txn_commit(x));
	done(ip);
	dir = add(ROOT_INO, "dir", S_IFDIR | 0755, NULL);
	dir = add(dir, "sub", S_IFDIR | 0755, NULL);
	add(dir, "deep", S_IFREG | 0644, NULL);
	add(dir, "end", S_IFDIR | 0755, NULL);
	dir = add(ROOT_INO, "many", S_IFDIR | 0755, NULL);
	for (unsigned i = 0; i < 200; i++) {
		snprintf(name, sizeof(name), "a-name-of-some-length-%03u", i);
		add(dir, name, S_IFREG | 0644, NULL);
	}
	add(ROOT_INO, "fifo", S_IFIFO | 0644, NULL);
	make_shared();
	make_xattrs();
	make_links();
	make_orphan();
}

/* ---- below the items ------------------------------------------------------------------ */

static void spoil(uint64_t off)
{
	uint8_t b[64];

	must("read", image_pread(im, b, sizeof(b), off));
	for (unsigned i = 0; i < sizeof(b); i++)
		b[i] ^= 0x5a;
	must("write", image_pwrite(im, b, sizeof(b), off));
}

struct search {
	unsigned level, n;
	uint64_t block;
};

static int find_node(void *ctx, enum table t, unsigned level, uint64_t block)
{
	struct search *s = ctx;

	(void)t;
	if (level != s->level || s->n--)
		return 0;
	s->block = block;
	return 1;
}

/* How many more nodes than n there are at the level. */
static unsigned nodes_beyond(enum table t, unsigned level, unsigned n)
{
	struct search s = {.level = level, .n = UINT32_MAX};
	struct walk w = {.ctx = &s, .node = find_node};

	must("walk", volume_walk(v, t, &w));
	return UINT32_MAX - s.n - 1 - n;
}

static void spoil_node(enum table t, unsigned level, const char *n)
{
	struct search s = {.level = level};
	struct walk w = {.ctx = &s, .node = find_node};

	s.n = strcmp(n, "last") ? (unsigned)number(n) : nodes_beyond(t, level, 0);
	if (volume_walk(v, t, &w) != 1)
		die("no such node", ENOENT);
	spoil((s.block << volume_block_shift(v)) + 1000);
}

static uint64_t block_of(const char *p, const char *blk);

static void root_onto(enum table t, uint64_t block)
{
	size_t size = (size_t)1 << volume_block_shift(v);
	struct disk_node *d = malloc(size);
	struct disk_super s;
	unsigned slot;
	char msg[100];

	must("super", super_load(im, &s, &slot, msg, sizeof(msg)));
	must("read", image_pread(im, d, size, get64(s.root[t].ptr.block) * size));
	d->self.block = s.root[t].ptr.block = put64(block);
	d->csum = put64(0);
	d->csum = put64(checksum(d, size));
	super_seal(&s, slot);
	must("write", image_pwrite(im, d, size, block * size));
	must("write", image_pwrite(im, &s, sizeof(s), SUPER_SLOT_OFFSET(slot)));
	free(d);
}

/* The lowest inner node that comes first, sealed again by seal_node(). */
static struct disk_node *inner_node(enum table t, uint64_t *block)
{
	size_t size = (size_t)1 << volume_block_shift(v);
	struct search s = {.level = 1};
	struct walk w = {.ctx = &s, .node = find_node};
	struct disk_node *d = malloc(size);

	if (volume_walk(v, t, &w) != 1)
		die("no such node", ENOENT);
	must("read", image_pread(im, d, size, s.block * size));
	*block = s.block;
	return d;
}

static void seal_node(struct disk_node *d, uint64_t block)
{
	size_t size = (size_t)1 << volume_block_shift(v);

	d->csum = put64(0);
	d->csum = put64(checksum(d, size));
	must("write", image_pwrite(im, d, size, block * size));
	free(d);
}

static struct disk_ptr *child_of(struct disk_node *d, unsigned n)
{
	uint8_t *at = (uint8_t *)d + get16(((le16 *)(d + 1))[n]);

	return (void *)(at + sizeof(struct disk_item) +
			get16(((struct disk_item *)(void *)at)->klen));
}

static void set_child(enum table t, unsigned n, uint64_t block)
{
	uint64_t at;
	struct disk_node *d = inner_node(t, &at);

	child_of(d, n)->block = put64(block);
	seal_node(d, at);
}

static void swap_children(enum table t, unsigned n, unsigned m)
{
	uint64_t at;
	struct disk_node *d = inner_node(t, &at);
	struct disk_ptr p = *child_of(d, n);

	*child_of(d, n) = *child_of(d, m);
	*child_of(d, m) = p;
	seal_node(d, at);
}

static void spoil_bitmap(uint64_t n)
{
	struct key k = {.len = 8};
	struct disk_space d;
	size_t len;

	be64_put(k.b, n);
	item_get(TABLE_SPACE, &k, &d, sizeof(d), &len);
	spoil((get64(d.block) << volume_block_shift(v)) + 100);
}

/* An item of the table of space, which has no transactions: in its leaf. */
static int find_leaf(void *ctx, enum table t, unsigned level, uint64_t block)
{
	struct search *s = ctx;

	(void)t;
	if (level == 0)
		s->block = block;
	return 0;
}

static void space_field(uint64_t n, const char *field, const char *value)
{
	size_t size = (size_t)1 << volume_block_shift(v);
	struct search s = {0};
	struct walk w = {.ctx = &s, .node = find_leaf};
	uint8_t *buf = malloc(size), key[8];
	struct disk_node *d = (void *)buf;
	struct disk_space *p = NULL;

	be64_put(key, n);
	must("walk", volume_walk(v, TABLE_SPACE, &w));
	must("read", image_pread(im, buf, size, s.block * size));
	for (unsigned i = 0; i < get16(d->count); i++) {
		uint8_t *at = buf + get16(((le16 *)(d + 1))[i]);

		if (!memcmp(at + sizeof(struct disk_item), key, 8))
			p = (void *)(at + sizeof(struct disk_item) + 8);
	}
	if (!p)
		die("no such bitmap", ENOENT);
	if (IS("block"))
		FIELD64(p, block);
	else if (IS("csum"))
		FIELD64(p, csum);
	else if (IS("free"))
		FIELD32(p, free);
	else
		die(field, EINVAL);
	d->csum = put64(0);
	d->csum = put64(checksum(buf, size));
	must("write", image_pwrite(im, buf, size, s.block * size));
	free(buf);
}

/* All nodes of a volume. */
struct nodes {
	uint64_t block[4096];
	unsigned count;
};

static int note_node(void *ctx, enum table t, unsigned level, uint64_t block)
{
	struct nodes *n = ctx;

	(void)t;
	(void)level;
	if (n->count < 4096)
		n->block[n->count++] = block;
	return 0;
}

static void fuzz(uint64_t seed)
{
	size_t size = (size_t)1 << volume_block_shift(v);
	static struct nodes nodes;
	struct walk w = {.ctx = &nodes, .node = note_node};
	uint8_t *buf = malloc(size);
	struct disk_node *d = (void *)buf;
	uint64_t block;

	srand((unsigned)seed);
	for (unsigned t = 0; t < TABLES; t++)
		must("walk", volume_walk(v, t, &w));
	block = nodes.block[(unsigned)rand() % nodes.count];
	must("read", image_pread(im, buf, size, block * size));
	for (unsigned n = 1 + (unsigned)rand() % 3; n--;) {
		unsigned i = (unsigned)rand() % (get16(d->count) + 1u);
		size_t at = (unsigned)rand() % (unsigned)size;

		/* mostly inside an item, sometimes anywhere */
		if (i < get16(d->count) && rand() % 8)
			at = get16(((le16 *)(d + 1))[i]) + 4u +
			     (unsigned)rand() % 40;
		if (at < size)
			buf[at] = rand() % 2 ? (uint8_t)rand() :
					       buf[at] ^ (uint8_t)(1 << rand() % 8);
	}
	d->csum = put64(0);
	d->csum = put64(checksum(buf, size));
	must("write", image_pwrite(im, buf, size, block * size));
	free(buf);
}

static void super_field(unsigned slot, const char *field, const char *value)
{
	struct disk_super s, *p = &s;
	uint64_t off = slot < 2 ? SUPER_SLOT_OFFSET(slot) :
		       slot == 2 ? BACKUP_OFFSET :
				   im->bytes - 4096;

	if (IS("spoil")) {
		spoil(off + 200);
		return;
	}
	must("read", image_pread(im, &s, sizeof(s), off));
	if (IS("gen"))
		FIELD64(p, gen);
	else if (IS("blocks"))
		FIELD64(p, blocks);
	else if (IS("free"))
		FIELD64(p, free_blks);
	else if (IS("inodes"))
		FIELD64(p, inodes);
	else if (IS("aside"))
		FIELD64(p, aside);
	else if (IS("next_ino"))
		FIELD64(p, next_ino);
	else if (IS("flags"))
		FIELD32(p, flags);
	else if (IS("version"))
		FIELD32(p, version);
	else if (IS("incompat"))
		FIELD64(p, incompat);
	else if (IS("ro_compat"))
		FIELD64(p, ro_compat);
	else if (IS("compat"))
		FIELD64(p, compat);
	else if (IS("shift"))
		FIELD32(p, block_shift);
	else if (IS("uuid"))
		s.uuid[3] ^= 1;
	else if (IS("label"))
		s.label[0] ^= 1;
	else if (!strncmp(field, "nodes", 5))
		p->root[field[5] - '0'].nodes =
			put64(change(get64(p->root[field[5] - '0'].nodes), value));
	else if (!strncmp(field, "items", 5))
		p->root[field[5] - '0'].items =
			put64(change(get64(p->root[field[5] - '0'].items), value));
	else
		die(field, EINVAL);
	super_seal(&s, slot);
	must("write", image_pwrite(im, &s, sizeof(s), off));
}

/* Both slots: the newer one is what counts. */
static unsigned newest(void)
{
	struct disk_super s;
	unsigned slot;
	char msg[100];

	must("super", super_load(im, &s, &slot, msg, sizeof(msg)));
	return slot;
}

static void spoil_group(unsigned n)
{
	struct disk_super s;
	struct disk_group g;
	unsigned slot;
	char msg[100];
	uint64_t unit, off;

	must("super", super_load(im, &s, &slot, msg, sizeof(msg)));
	unit = get64(s.tail_unit);
	for (;; n--) {
		off = (get64(s.journal_block) << get32(s.block_shift)) +
		      unit % get64(s.journal_units) * JOURNAL_UNIT;
		must("read", image_pread(im, &g, sizeof(g), off));
		if (get32(g.magic) != GROUP_MAGIC || get64(g.salt) != get64(s.salt))
			die("no such group", ENOENT);
		if (!n)
			break;
		unit += (get32(g.bytes) + JOURNAL_UNIT - 1) / JOURNAL_UNIT;
	}
	spoil(off + sizeof(g));
}

static void make_blind(unsigned levels)
{
	enum { WIDTH = 60 };
	struct disk_ptr below = {0};
	struct disk_super s;
	unsigned slot;
	char msg[100];
	uint64_t block;
	size_t size;

	must("super", super_load(im, &s, &slot, msg, sizeof(msg)));
	size = (size_t)1 << get32(s.block_shift);
	block = get64(s.blocks) - 1;
	for (unsigned l = 1; l <= levels; l++) {
		struct disk_item it = {put16(17), put16(sizeof(below))};
		size_t bytes = sizeof(it) + 17 + sizeof(below), heap = size;
		struct disk_node *d = calloc(1, size);

		d->magic = put32(NODE_MAGIC);
		d->level = (uint8_t)l;
		d->count = put16(WIDTH);
		d->self = (struct disk_ptr){put64(--block), put64(l), s.gen};
		for (unsigned i = 0; i < WIDTH; i++) {
			uint8_t *at = (uint8_t *)d + (heap -= bytes);
			struct key k = num_key(ROOT_INO + i, KEY_MAP, 0);

			((le16 *)(d + 1))[i] = put16((uint16_t)heap);
			memcpy(at, &it, sizeof(it));
			memcpy(at + sizeof(it), k.b, k.len);
			memcpy(at + sizeof(it) + k.len, &below, sizeof(below));
		}
		d->heap = put16((uint16_t)heap);
		d->csum = put64(checksum(d, size));
		must("write", image_pwrite(im, d, size, block * size));
		below = d->self;
		free(d);
	}
}

static void make_dirty(unsigned n)
{
	static const struct volume_repair none;
	char name[32];

	open_with(&none, false);
	for (unsigned i = 0; i < n; i++) {
		snprintf(name, sizeof(name), "late%u", i);
		add(ROOT_INO, name, S_IFREG | 0644, NULL);
		must("sync", volume_sync(v));
	}
	volume_abandon(v);
	image_close(im);
}

static void make_twice(unsigned n, unsigned m)
{
	static const struct volume_repair none;
	char name[32];

	open_with(&none, false);
	for (unsigned i = 0; i < 2 * n + m; i++) {
		snprintf(name, sizeof(name), "busy%u", i);
		add(ROOT_INO, name, S_IFREG | 0644, NULL);
		if (i < 2 * n && (i + 1) % n == 0)
			must("checkpoint", volume_checkpoint(v));
	}
	must("sync", volume_sync(v));
	volume_abandon(v);
	image_close(im);
}

static void rewrite(const char *name, unsigned n, unsigned k, unsigned m)
{
	static const struct volume_repair none;
	struct inode *ip;

	open_with(&none, false);
	add(ROOT_INO, name, S_IFREG | 0644, &ip);
	for (unsigned i = 0; i < n; i++) {
		fill(ip, i / k, 1, i);
		must("sync", volume_sync(v));
		if ((i + 1) % m == 0)
			must("checkpoint", volume_checkpoint(v));
	}
	done(ip);
	volume_abandon(v);
	image_close(im);
}

static void freed(const char *file, uint64_t blk)
{
	static const struct volume_repair none;
	uint8_t val[VALUE_MAX];
	struct inode *ip;
	struct txn *x;
	struct key k;
	size_t len;

	open_with(&none, false);
	k = num_key(ino_of(file), KEY_MAP, blk);
	item_get(TABLE_FILES, &k, val, sizeof(val), &len);
	must(file, inode_get(v, ino_of(file), &ip));
	rwlock_write(&ip->lock);
	must("begin", txn_begin(v, TXN_NORMAL, &x));
	must("cut", map_cut(x, ip, blk, blk + map_len((void *)val)));
	must("commit", txn_commit(x));
	done(ip);
	item_put(TABLE_FILES, &k, val, len);
	must("sync", volume_sync(v));
	volume_abandon(v);
	image_close(im);
}

static void busy(const char *file, int ms)
{
	static const struct volume_repair none;
	struct inode *ip;
	struct txn *x;
	char held[300];

	open_with(&none, false);
	snprintf(held, sizeof(held), "%s.held", file);
	close(open(held, O_WRONLY | O_CREAT, 0644));
	while (access(file, F_OK)) {
		if (ms < 0) {
			usleep(1000);
			continue;
		}
		must("file", inode_get(v, ino_of("/dir/sub/deep"), &ip));
		rwlock_write(&ip->lock);
		must("begin", txn_begin(v, TXN_NORMAL, &x));
		inode_edit(x, ip)->mtime.sec++;
		must("commit", txn_commit(x));
		done(ip);
		must("checkpoint", volume_checkpoint(v));
		usleep((unsigned)ms * 1000);
	}
	close_volume();
}

static uint64_t free_run(uint64_t len)
{
	struct extent e;
	uint64_t at = 0;

	while (!alloc_next_free(volume_alloc(v), at, &e)) {
		at = e.start + e.len;
		if (e.len >= len + 64)
			return e.start + 32;
	}
	die("no free run", ENOSPC);
	return 0;
}

static uint64_t block_of(const char *p, const char *blk)
{
	uint8_t val[VALUE_MAX];
	size_t len;

	return get64(map_get(ino_of(p), number(blk), val, &len)->start);
}

static void claim(uint64_t start, uint64_t len)
{
	struct extent e = {start, len};
	struct volume_repair rep = {.claim = &e, .claims = 1};

	open_with(&rep, false);
	close_volume();
}

static void release(uint64_t start, uint64_t len)
{
	struct extent e = {start, len};
	struct volume_repair rep = {.release = &e, .releases = 1};

	open_with(&rep, false);
	close_volume();
}

/* ---- commands ------------------------------------------------------------------------- */

static void set_ref(uint64_t start, uint64_t len, uint32_t count)
{
	struct disk_ref d = {.len = put64(len), .count = put32(count)};
	struct key k = refs_key(KEY_REF, start);

	item_put(TABLE_REFS, &k, &d, sizeof(d));
}

static bool item_command(const char *c, int n, char **a)
{
	struct key k;

	if (!strcmp(c, "make") && n == 0) {
		make();
	} else if (!strcmp(c, "many") && n == 1) {
		uint64_t dir = ino_of("/many");
		char name[40];

		for (unsigned i = 0; i < number(a[0]); i++) {
			snprintf(name, sizeof(name), "one-more-of-the-many-%05u",
				 i);
			add(dir, name, S_IFREG | 0644, NULL);
		}
	} else if (!strcmp(c, "scatter") && n == 2) {
		struct inode *ip;

		add(ROOT_INO, a[0] + 1, S_IFREG | 0644, &ip);
		for (unsigned i = 0; i < number(a[1]); i++)
			fill(ip, 2 * i, 1, i);
		done(ip);
	} else if (!strcmp(c, "inode") && n == 3) {
		inode_field(ino_of(a[0]), a[1], a[2]);
	} else if (!strcmp(c, "inode-del") && n == 1) {
		k = file_key(ino_of(a[0]), KEY_INODE, "", 0);
		item_del(TABLE_FILES, &k);
	} else if (!strcmp(c, "inode-put") && n == 1) {
		inode_new(number(a[0]));
	} else if (!strcmp(c, "dirent") && n == 4) {
		dirent_field(ino_of(a[0]), a[1], a[2], a[3]);
	} else if (!strcmp(c, "dirent-del") && n == 2) {
		k = file_key(ino_of(a[0]), KEY_DIRENT, a[1], strlen(a[1]));
		item_del(TABLE_FILES, &k);
	} else if (!strcmp(c, "dirent-put") && n == 4) {
		dirent_new(ino_of(a[0]), a[1], ino_of(a[2]),
			   (uint8_t)number(a[3]));
	} else if (!strcmp(c, "index") && n == 4) {
		index_field(ino_of(a[0]), a[1], a[2], a[3]);
	} else if (!strcmp(c, "index-del") && n == 2) {
		struct disk_dirent d;
		uint64_t dir = ino_of(a[0]);

		dirent_get(dir, a[1], &d);
		k = num_key(dir, KEY_INDEX, get64(d.index));
		item_del(TABLE_FILES, &k);
	} else if (!strcmp(c, "map") && n == 4) {
		map_field(ino_of(a[0]), number(a[1]), a[2], a[3]);
	} else if (!strcmp(c, "map-copy") && n == 4) {
		uint8_t val[VALUE_MAX];
		size_t len;

		/* PATH BLK's run once more, as TO's block BLK */
		map_get(ino_of(a[0]), number(a[1]), val, &len);
		k = num_key(ino_of(a[2]), KEY_MAP, number(a[3]));
		item_put(TABLE_FILES, &k, val, len);
	} else if (!strcmp(c, "map-del") && n == 2) {
		k = num_key(ino_of(a[0]), KEY_MAP, number(a[1]));
		item_del(TABLE_FILES, &k);
	} else if (!strcmp(c, "xattr-del") && n == 3) {
		k = xattr_key(ino_of(a[0]), a[1], (unsigned)number(a[2]));
		item_del(TABLE_FILES, &k);
	} else if (!strcmp(c, "xattr-len") && n == 3) {
		uint8_t val[VALUE_MAX];
		struct disk_xattr *x = (void *)val;
		size_t len;

		k = xattr_key(ino_of(a[0]), a[1], 0);
		item_get(TABLE_FILES, &k, val, sizeof(val), &len);
		x->bytes = put32((uint32_t)change(get32(x->bytes), a[2]));
		item_put(TABLE_FILES, &k, val, len);
	} else if (!strcmp(c, "symlink-del") && n == 2) {
		uint8_t piece[2] = {0, (uint8_t)number(a[1])};

		k = file_key(ino_of(a[0]), KEY_SYMLINK, piece, 2);
		item_del(TABLE_FILES, &k);
	} else if (!strcmp(c, "item-put") && n == 3) {
		uint8_t val[VALUE_MAX];

		k.len = hex(a[1], k.b, sizeof(k.b));
		item_put((enum table)number(a[0]), &k, val,
			 hex(a[2], val, sizeof(val)));
	} else if (!strcmp(c, "orphan") && n == 1) {
		k = refs_key(KEY_ORPHAN, ino_of(a[0]));
		item_put(TABLE_REFS, &k, "", 0);
	} else if (!strcmp(c, "orphan-del") && n == 1) {
		k = refs_key(KEY_ORPHAN, ino_of(a[0]));
		item_del(TABLE_REFS, &k);
	} else if (!strcmp(c, "intent") && n == 3) {
		struct disk_intent d = {put64(number(a[1])), put64(number(a[2]))};

		k = refs_key(KEY_INTENT, ino_of(a[0]));
		item_put(TABLE_REFS, &k, &d, sizeof(d));
	} else if (!strcmp(c, "ref") && n == 3) {
		set_ref(number(a[0]), number(a[1]), (uint32_t)number(a[2]));
	} else if (!strcmp(c, "ref-of") && n == 4) {
		set_ref(block_of(a[0], a[1]), number(a[2]), (uint32_t)number(a[3]));
	} else if (!strcmp(c, "ref-del") && n == 2) {
		k = refs_key(KEY_REF, block_of(a[0], a[1]));
		item_del(TABLE_REFS, &k);
	} else {
		return false;
	}
	return true;
}

/* ---- looking ---------------------------------------------------------------------------- */

static int read_block(uint64_t ino, uint64_t blk)
{
	void *buf = malloc((size_t)1 << volume_block_shift(v));
	struct inode *ip;
	int ret;

	must("inode", inode_get(v, ino, &ip));
	rwlock_read(&ip->lock);
	ret = map_read(v, ip, blk, 1, buf);
	rwlock_unlock(&ip->lock);
	inode_put(v, ip);
	free(buf);
	return ret;
}

static int add_to_digest(void *ctx, enum table t, const uint8_t *key, size_t klen,
			 const uint8_t *val, size_t vlen)
{
	uint64_t *sum = ctx, all[3] = {*sum, checksum(key, klen), checksum(val, vlen)};

	(void)t;
	*sum = checksum(all, sizeof(all));
	return 0;
}

static int fail_digest(void *ctx, enum table t, unsigned level, uint64_t block,
		       const char *what)
{
	(void)ctx, (void)t, (void)level, (void)block;
	die(what, EUCLEAN);
	return 1;
}

static void print_digest(void)
{
	uint64_t sum = 0;
	struct walk w = {.ctx = &sum, .item = add_to_digest, .bad = fail_digest};

	must("walk", volume_walk(v, TABLE_FILES, &w));
	printf("%016" PRIx64 "\n", sum);
}

/* Those that find something in the volume, then change bytes of the image. */
static bool raw_command(const char *c, int n, char **a)
{
	if (!strcmp(c, "node") && n == 3)
		spoil_node((enum table)number(a[0]), (unsigned)number(a[1]), a[2]);
	else if (!strcmp(c, "child") && n == 3)
		set_child((enum table)number(a[0]), (unsigned)number(a[1]),
			  number(a[2]));
	else if (!strcmp(c, "child-swap") && n == 3)
		swap_children((enum table)number(a[0]), (unsigned)number(a[1]),
			      (unsigned)number(a[2]));
	else if (!strcmp(c, "root-onto") && n == 4)
		root_onto((enum table)number(a[0]),
			  block_of(a[1], a[2]) + number(a[3]));
	else if (!strcmp(c, "bitmap") && n == 1)
		spoil_bitmap(number(a[0]));
	else if (!strcmp(c, "space") && n == 3)
		space_field(number(a[0]), a[1], a[2]);
	else if (!strcmp(c, "has") && n == 1)
		ino_of(a[0]);
	else if (!strcmp(c, "reads") && n == 2)
		must("read", read_block(ino_of(a[0]), number(a[1])));
	else if (!strcmp(c, "lost") && n == 2)
		must("it can be read",
		     read_block(ino_of(a[0]), number(a[1])) != -EBADMSG);
	else if (!strcmp(c, "digest") && n == 0)
		print_digest();
	else if (!strcmp(c, "fuzz") && n == 1)
		fuzz(number(a[0]));
	else if (!strcmp(c, "data") && n == 2)
		spoil((block_of(a[0], a[1]) << volume_block_shift(v)) + 50);
	else
		return false;
	return true;
}

static bool image_command(const char *c, int n, char **a)
{
	if (!strcmp(c, "super") && n >= 2) {
		unsigned slot = *a[0] == 'n' ? newest() :
				*a[0] == 'o' ? 1 - newest() :
					       (unsigned)number(a[0]);

		super_field(slot, a[1], n > 2 ? a[2] : "0");
	} else if (!strcmp(c, "group") && n == 1) {
		spoil_group((unsigned)number(a[0]));
	} else if (!strcmp(c, "blind") && n == 1) {
		make_blind((unsigned)number(a[0]));
	} else if (!strcmp(c, "truncate") && n == 1) {
		must("truncate", im->ops->resize(im, number(a[0])));
	} else {
		return false;
	}
	return true;
}

int main(int argc, char **argv)
{
	static const struct volume_repair none;
	const char *c;
	uint64_t start, len;
	bool known;

	if (argc < 3)
		die("usage: damage IMAGE COMMAND ...", EINVAL);
	path = argv[1];
	c = argv[2];
	argv += 3;
	argc -= 3;
	if (!strcmp(c, "dirty") && argc == 1) {
		make_dirty((unsigned)number(argv[0]));
		return 0;
	}
	if (!strcmp(c, "twice") && argc == 2) {
		make_twice((unsigned)number(argv[0]), (unsigned)number(argv[1]));
		return 0;
	}
	if (!strcmp(c, "rewrite") && argc == 4) {
		rewrite(argv[0], (unsigned)number(argv[1]),
			(unsigned)number(argv[2]), (unsigned)number(argv[3]));
		return 0;
	}
	if (!strcmp(c, "freed") && argc == 2) {
		freed(argv[0], number(argv[1]));
		return 0;
	}
	if (!strcmp(c, "busy") && argc == 2) {
		busy(argv[0], atoi(argv[1]));
		return 0;
	}
	if (!strcmp(c, "claim-free") && argc == 1) {
		len = number(argv[0]);
		open_volume();
		start = free_run(len);
		close_volume();
		claim(start, len);
		return 0;
	}
	if (!strcmp(c, "release") && argc == 2) {
		open_with(&none, true);
		start = block_of(argv[0], argv[1]);
		volume_close(v);
		image_close(im);
		release(start, 1);
		return 0;
	}
	must(path, image_open(path, IMAGE_WRITE, &im));
	known = image_command(c, argc, argv);
	image_close(im);
	if (known)
		return 0;
	open_with(&none, true);
	known = raw_command(c, argc, argv);
	volume_close(v);
	image_close(im);
	if (known)
		return 0;
	open_volume();
	known = item_command(c, argc, argv);
	close_volume();
	if (!known)
		die(c, EINVAL);
	return 0;
}
