/* SPDX-License-Identifier: BSD-2-Clause */
#include "tests/check.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "tests/fault.h"
#define malloc sim_malloc
#define calloc sim_calloc
#define realloc sim_realloc

enum owner { NOBODY, FIXED, NODE, BITMAP, DATA };
static const char *const owner_name[] = {
	"nobody", "the head, the ring or the backup", "a node", "a bitmap", "data",
};

struct link {
	uint64_t ino;
	uint64_t parent;	/* the directory, or 0 for the inode itself */
	uint32_t nlink;
	uint32_t mode;
	uint8_t type;
	uint64_t dir_parent;
};

struct check {
	struct volume *v;
	bool settled;
	char *msg;
	size_t msg_len;
	int err;
	uint64_t blocks;
	uint32_t block_bytes;
	uint8_t *owner;
	uint32_t *refs;		/* how many maps name a block */
	uint32_t *want;		/* how many the table of references says */
	uint64_t inodes, aside;
	struct link *link;
	size_t links, link_room;
	uint64_t *orphan;
	size_t orphans, orphan_room;
	/* The inode whose items are passing. */
	uint64_t ino;
	bool have;
	struct attr a;
	uint64_t dirents, indexes, name_sum, index_sum, xattrs, map_blks, map_next;
	uint64_t xattr_left;
};

static int bad(struct check *c, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));

static int bad(struct check *c, const char *fmt, ...)
{
	va_list ap;

	if (!c->err) {
		va_start(ap, fmt);
		vsnprintf(c->msg, c->msg_len, fmt, ap);
		va_end(ap);
		c->err = -EUCLEAN;
	}
	return c->err;
}

static int own(struct check *c, uint64_t start, uint64_t len, enum owner who,
	       uint64_t whose)
{
	if (start >= c->blocks || len > c->blocks - start)
		return bad(c, "%s (%" PRIu64 ") owns blocks %" PRIu64 "+%" PRIu64
			      " beyond the volume", owner_name[who], whose, start, len);
	for (uint64_t b = start; b < start + len; b++) {
		if (c->owner[b] != NOBODY && (who != DATA || c->owner[b] != DATA))
			return bad(c, "block %" PRIu64 " belongs to %s and to %s (%"
				   PRIu64 ")", b, owner_name[c->owner[b]],
				   owner_name[who], whose);
		c->owner[b] = (uint8_t)who;
		c->refs[b]++;
	}
	return 0;
}

static int on_node(void *ctx, enum table table, unsigned level, uint64_t block)
{
	(void)level;
	if (block >= CHECK_NEW_NODE)
		return 0;
	return own(ctx, block, 1, NODE, table);
}

static int on_bad(void *ctx, enum table table, unsigned level, uint64_t block,
		  const char *what)
{
	return bad(ctx, "table %d level %u block %" PRIu64 ": %s", table, level,
		   block, what);
}

static int on_space(void *ctx, enum table table, const uint8_t *key, size_t klen,
		    const uint8_t *val, size_t vlen)
{
	struct check *c = ctx;
	struct disk_space d;

	(void)table;
	if (klen != 8 || vlen != sizeof(d))
		return bad(c, "item of the space table has key %zu value %zu", klen, vlen);
	memcpy(&d, val, sizeof(d));
	return own(c, get64(d.block), 1, BITMAP, be64_get(key));
}

static int link_add(struct check *c, const struct link *l)
{
	if (c->links == c->link_room) {
		c->link_room = c->link_room ? 2 * c->link_room : 64;
		c->link = realloc(c->link, c->link_room * sizeof(*c->link));
		if (!c->link)
			abort();
	}
	c->link[c->links++] = *l;
	return 0;
}

static uint64_t name_hash(const uint8_t *name, size_t len, uint64_t ino,
			  uint64_t index, uint8_t type)
{
	return checksum(name, len) ^ (ino * 0x9e3779b97f4a7c15ull) ^
	       (index * 0xc2b2ae3d27d4eb4full) ^ type;
}

/* All items of the inode have passed. */
static int inode_done(struct check *c)
{
	struct attr *a = &c->a;

	if (!c->ino)
		return 0;
	if (!c->have)
		return bad(c, "items of inode %" PRIu64 ", which is not there", c->ino);
	if (c->xattr_left)
		return bad(c, "inode %" PRIu64 ": an xattr is not whole", c->ino);
	if (a->xattrs != c->xattrs)
		return bad(c, "inode %" PRIu64 " says %u xattrs, has %" PRIu64,
			   c->ino, a->xattrs, c->xattrs);
	if (a->blks != c->map_blks)
		return bad(c, "inode %" PRIu64 " says %" PRIu64 " blocks, maps %" PRIu64,
			   c->ino, a->blks, c->map_blks);
	if (S_ISDIR(a->mode)) {
		if (a->size != c->dirents || c->dirents != c->indexes ||
		    c->name_sum != c->index_sum)
			return bad(c, "directory %" PRIu64 " says %" PRIu64
				   " entries, has %" PRIu64 " names, %" PRIu64 " indexes",
				   c->ino, a->size, c->dirents, c->indexes);
	} else if (c->dirents || c->indexes) {
		return bad(c, "inode %" PRIu64 " has entries, is no directory", c->ino);
	}
	return 0;
}

static int on_file(void *ctx, enum table table, const uint8_t *key, size_t klen,
		   const uint8_t *val, size_t vlen)
{
	struct check *c = ctx;
	uint64_t ino;

	(void)table;
	if (klen < 9)
		return bad(c, "key of %zu bytes in the table of files", klen);
	c->aside += map_aside(key, klen, val, vlen);
	ino = be64_get(key);
	if (ino != c->ino) {
		if (inode_done(c))
			return c->err;
		c->ino = ino;
		c->have = false;
		c->dirents = c->indexes = c->name_sum = c->index_sum = 0;
		c->xattrs = c->map_blks = c->map_next = c->xattr_left = 0;
	}
	switch (key[8]) {
	case KEY_INODE: {
		struct disk_inode d;
		struct link l = {.ino = ino};

		if (klen != 9 || vlen != sizeof(d))
			return bad(c, "inode %" PRIu64 " has %zu bytes", ino, vlen);
		memcpy(&d, val, sizeof(d));
		attr_decode(&d, &c->a);
		c->have = true;
		c->inodes++;
		l.nlink = c->a.nlink;
		l.mode = c->a.mode;
		l.dir_parent = c->a.parent;
		return link_add(c, &l);
	}
	case KEY_DIRENT: {
		struct disk_dirent d;
		struct link l = {.parent = ino};

		if (vlen != sizeof(d) || klen == 9)
			return bad(c, "entry of directory %" PRIu64 " has %zu bytes",
				   ino, vlen);
		memcpy(&d, val, sizeof(d));
		l.ino = get64(d.ino);
		l.type = d.type;
		c->dirents++;
		c->name_sum += name_hash(key + 9, klen - 9, l.ino, get64(d.index), d.type);
		return link_add(c, &l);
	}
	case KEY_INDEX: {
		struct disk_index d;

		if (klen != 17 || vlen <= offsetof(struct disk_index, name))
			return bad(c, "index of directory %" PRIu64 " has %zu bytes",
				   ino, vlen);
		memcpy(&d.ino, val, 8);
		c->indexes++;
		c->index_sum += name_hash(val + 9, vlen - 9, get64(d.ino), be64_get(key + 9),
					  val[8]);
		if (be64_get(key + 9) >= c->a.next_index)
			return bad(c, "directory %" PRIu64 " has an index beyond its next",
				   ino);
		return 0;
	}
	case KEY_XATTR: {
		unsigned piece = (unsigned)key[klen - 2] << 8 | key[klen - 1];

		if (piece == 0) {
			le32 bytes;

			if (c->xattr_left || vlen < 4)
				return bad(c, "inode %" PRIu64 ": an xattr is not whole",
					   ino);
			memcpy(&bytes, val, 4);
			c->xattr_left = get32(bytes);
			c->xattrs++;
			vlen -= 4;
		}
		if (vlen > c->xattr_left)
			return bad(c, "inode %" PRIu64 ": an xattr is too long", ino);
		c->xattr_left -= vlen;
		return 0;
	}
	case KEY_MAP: {
		struct disk_map d;
		uint64_t blk = be64_get(key + 9), len;

		if (klen != 17 || vlen < sizeof(d))
			return bad(c, "map of inode %" PRIu64 " has %zu bytes", ino, vlen);
		memcpy(&d, val, sizeof(d));
		len = map_len(&d);
		if (!len || blk < c->map_next)
			return bad(c, "map of inode %" PRIu64 " overlaps at %" PRIu64,
				   ino, blk);
		if (vlen != sizeof(d) + (get32(d.flags) ? 0 : 8 * len))
			return bad(c, "map of inode %" PRIu64 " at %" PRIu64
				   ": %zu bytes for %" PRIu64 " blocks", ino, blk, vlen, len);
		c->map_next = blk + len;
		if (get32(d.flags) & MAP_LOST)
			return 0;
		c->map_blks += len;
		return own(c, get64(d.start), len, DATA, ino);
	}
	}
	return 0;
}

static int on_refs(void *ctx, enum table table, const uint8_t *key, size_t klen,
		   const uint8_t *val, size_t vlen)
{
	struct check *c = ctx;

	(void)table;
	if (klen != 9)
		return bad(c, "key of %zu bytes in the table of references", klen);
	if (key[0] == KEY_REF) {
		struct disk_ref d;
		uint64_t b = be64_get(key + 1);

		if (vlen != sizeof(d))
			return bad(c, "reference of %zu bytes", vlen);
		memcpy(&d, val, sizeof(d));
		if (get32(d.count) < 2 || b >= c->blocks ||
		    get64(d.len) > c->blocks - b || !get64(d.len))
			return bad(c, "references of %" PRIu64 "+%" PRIu64 ": %u", b,
				   get64(d.len), get32(d.count));
		for (uint64_t i = 0; i < get64(d.len); i++) {
			if (c->want[b + i])
				return bad(c, "block %" PRIu64 " counted twice", b + i);
			c->want[b + i] = get32(d.count);
		}
	} else if (key[0] == KEY_ORPHAN) {
		if (c->settled)
			return bad(c, "orphan %" PRIu64 " is left", be64_get(key + 1));
		if (c->orphans == c->orphan_room) {
			c->orphan_room = c->orphan_room ? 2 * c->orphan_room : 16;
			c->orphan = realloc(c->orphan, c->orphan_room * 8);
			if (!c->orphan)
				abort();
		}
		c->orphan[c->orphans++] = be64_get(key + 1);
	} else if (key[0] == KEY_INTENT) {
		if (c->settled)
			return bad(c, "intent of %" PRIu64 " is left", be64_get(key + 1));
	} else {
		return bad(c, "unknown item %u in the table of references", key[0]);
	}
	return 0;
}

static int link_order(const void *a, const void *b)
{
	const struct link *x = a, *y = b;

	if (x->ino != y->ino)
		return x->ino < y->ino ? -1 : 1;
	return x->parent < y->parent ? -1 : x->parent > y->parent;
}

static int check_links(struct check *c)
{
	static const uint8_t type_of[16] = {
		[S_IFREG >> 12] = DT_REG, [S_IFDIR >> 12] = DT_DIR,
		[S_IFLNK >> 12] = DT_LNK, [S_IFCHR >> 12] = DT_CHR,
		[S_IFBLK >> 12] = DT_BLK, [S_IFIFO >> 12] = DT_FIFO,
		[S_IFSOCK >> 12] = DT_SOCK,
	};

	qsort(c->link, c->links, sizeof(*c->link), link_order);
	for (size_t i = 0, end; i < c->links; i = end) {
		const struct link *n = &c->link[i];
		bool dir = S_ISDIR(n->mode), orphan = false;
		uint64_t names;

		for (end = i + 1; end < c->links && c->link[end].ino == n->ino; end++)
			;
		if (n->parent)
			return bad(c, "directory %" PRIu64 " names inode %" PRIu64
				   ", which is not there", n->parent, n->ino);
		names = end - i - 1;
		for (size_t k = 0; k < c->orphans; k++)
			orphan |= c->orphan[k] == n->ino;
		for (size_t k = i + 1; k < end; k++) {
			if (c->link[k].type != type_of[n->mode >> 12])
				return bad(c, "an entry of %" PRIu64 " has type %u, inode %"
					   PRIu64 " mode %o", c->link[k].parent,
					   c->link[k].type, n->ino, n->mode);
			if (dir && c->link[k].parent != n->dir_parent)
				return bad(c, "directory %" PRIu64 " is in %" PRIu64
					   ", says %" PRIu64, n->ino,
					   c->link[k].parent, n->dir_parent);
		}
		if (n->ino == ROOT_INO)
			names++;
		if (dir ? names > 1 : names != n->nlink)
			return bad(c, "inode %" PRIu64 " says %u links, has %" PRIu64
				   " names", n->ino, n->nlink, names);
		if (orphan != !names)
			return bad(c, "inode %" PRIu64 " has %" PRIu64 " names and is %s",
				   n->ino, names, orphan ? "an orphan" : "no orphan");
	}
	return 0;
}

static int check_space(struct check *c)
{
	uint64_t per = (uint64_t)c->block_bytes * 8;
	struct volume_stat st;
	uint8_t *bits = malloc(c->block_bytes);
	uint64_t free_blks = 0;
	int err = 0;

	if (!bits)
		abort();
	for (uint64_t i = 0; i * per < c->blocks && !err; i++) {
		err = volume_bitmap(c->v, i, bits);
		if (err) {
			bad(c, "bitmap %" PRIu64 ": %s", i, strerror(-err));
			break;
		}
		for (uint64_t b = i * per; b < c->blocks && b < (i + 1) * per; b++) {
			uint64_t k = b - i * per;
			bool used = bits[k / 8] >> (k % 8) & 1;

			free_blks += !used;
			if (used != (c->owner[b] != NOBODY)) {
				err = bad(c, "block %" PRIu64 " is %s in the bitmap, "
					  "belongs to %s", b, used ? "in use" : "free",
					  owner_name[c->owner[b]]);
				break;
			}
			if (c->owner[b] == DATA &&
			    c->refs[b] != (c->want[b] ? c->want[b] : 1)) {
				err = bad(c, "block %" PRIu64 " has %u references, the "
					  "table says %u", b, c->refs[b], c->want[b]);
				break;
			}
			if (c->want[b] && c->owner[b] != DATA) {
				err = bad(c, "block %" PRIu64 " is counted as shared, "
					  "belongs to %s", b, owner_name[c->owner[b]]);
				break;
			}
		}
	}
	free(bits);
	if (c->err)
		return c->err;
	volume_stat(c->v, &st);
	if (st.free_blks + st.absent_blks != free_blks)
		return bad(c, "the volume says %" PRIu64 " free blocks and %" PRIu64
			   " for bitmaps, the bitmaps %" PRIu64, st.free_blks,
			   st.absent_blks, free_blks);
	if (st.aside_blks != c->aside)
		return bad(c, "the volume says %" PRIu64 " blocks are set aside, %" PRIu64
			   " are", st.aside_blks, c->aside);
	if (st.inodes != c->inodes)
		return bad(c, "the volume says %" PRIu64 " inodes, has %" PRIu64,
			   st.inodes, c->inodes);
	return 0;
}

int check_volume(struct volume *v, bool settled, char *msg, size_t msg_len)
{
	struct check c = {
		.v = v,
		.settled = settled,
		.msg = msg,
		.msg_len = msg_len,
		.blocks = get64(volume_super(v)->blocks),
		.block_bytes = 1u << volume_block_shift(v),
	};
	struct walk w = {.ctx = &c, .node = on_node, .bad = on_bad};
	struct extent fixed[8];
	unsigned n = volume_fixed(v, fixed);
	int err = 0;

	c.owner = calloc(c.blocks, 1);
	c.refs = calloc(c.blocks, sizeof(*c.refs));
	c.want = calloc(c.blocks, sizeof(*c.want));
	if (!c.owner || !c.refs || !c.want)
		abort();
	for (unsigned i = 0; i < n && !err; i++)
		err = own(&c, fixed[i].start, fixed[i].len, FIXED, i);
	w.item = on_space;
	if (!err)
		err = volume_walk(v, TABLE_SPACE, &w);
	w.item = on_refs;
	if (!err)
		err = volume_walk(v, TABLE_REFS, &w);
	w.item = on_file;
	if (!err)
		err = volume_walk(v, TABLE_FILES, &w);
	if (!err)
		err = inode_done(&c);
	if (!err)
		err = check_links(&c);
	if (!err)
		err = check_space(&c);
	if (err && !c.err)
		bad(&c, "walking the tables: %s", strerror(-err));
	free(c.owner);
	free(c.refs);
	free(c.want);
	free(c.link);
	free(c.orphan);
	return err;
}
