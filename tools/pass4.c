/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Pass 4: the files. Their tree is walked once; all items of an inode pass by
 * together, the inode itself first. What concerns one inode alone is settled
 * when its last item has passed (inode_end); what concerns several goes into
 * the table of inodes, for passes 5 and 6.
 *
 *   inode        fields in their bounds                          here
 *   xattrs       every piece there, count right                  here
 *   symlink      every piece there, length right                 here
 *   map          order, place, checksums, count of blocks        pass4_map.c
 *   directory    entries and indexes agree, counts right         pass4_dir.c
 */
#include "tools/fsck.h"

#include <dirent.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define KNOWN_FLAGS                                                            \
	(INODE_IMMUTABLE | INODE_APPEND | INODE_NODUMP | INODE_NOATIME |       \
	 INODE_SYNC | INODE_DIRSYNC | INODE_SHARED | INODE_LOST)

static struct cur cur;

static uint8_t mode_type(uint32_t mode)
{
	return (uint8_t)((mode & S_IFMT) >> 12);	/* DT_ is just that */
}

static bool mode_known(uint32_t mode)
{
	switch (mode & S_IFMT) {
	case S_IFREG:
	case S_IFDIR:
	case S_IFLNK:
	case S_IFCHR:
	case S_IFBLK:
	case S_IFIFO:
	case S_IFSOCK:
		return (mode & ~(uint32_t)(S_IFMT | 07777)) == 0;
	default:
		return false;
	}
}

/* A field is `is` and should be `want`: report, and note the repair. */
static int field_wrong(struct fsck *f, enum problem_id id, const char *what,
		       enum repair_field field, uint64_t is, uint64_t want)
{
	struct repair r = {.kind = REPAIR_ATTR,
			   .id = id,
			   .ino = cur.ino,
			   .a = field,
			   .b = want};

	if (!PROBLEM(id, .ino = cur.ino, .what = what, .is = is, .want = want))
		return 0;
	return repair_later(f, &r);
}

/* ---- the inode ------------------------------------------------------------------ */

static int check_time(struct fsck *f, const char *what, enum repair_field field,
		      const struct disk_time *t)
{
	if (get32(t->nsec) < 1000000000u)
		return 0;
	return field_wrong(f, P_INODE_TIME, what, field, get32(t->nsec), 0);
}

static int check_fields(struct fsck *f, const struct disk_inode *d)
{
	const struct attr *a = &cur.a;
	bool dir = S_ISDIR(a->mode), special;
	int ret = 0;

	special = S_ISCHR(a->mode) || S_ISBLK(a->mode);
	if (a->flags & ~KNOWN_FLAGS)
		ret = field_wrong(f, P_INODE_FIELD, "flags", FIELD_FLAGS,
				  a->flags, a->flags & KNOWN_FLAGS);
	if (!ret && a->rdev && !special)
		ret = field_wrong(f, P_INODE_FIELD, "device number", FIELD_RDEV,
				  a->rdev, 0);
	if (!ret && !dir && a->parent)
		ret = field_wrong(f, P_INODE_FIELD, "parent", FIELD_PARENT,
				  a->parent, 0);
	if (!ret && !dir && a->next_index)
		ret = field_wrong(f, P_INODE_FIELD, "next index",
				  FIELD_NEXT_INDEX, a->next_index, 0);
	if (!ret && a->size > INT64_MAX)
		ret = field_wrong(f, P_INODE_FIELD, "size", FIELD_SIZE, a->size,
				  INT64_MAX);
	if (!ret && !dir && !S_ISREG(a->mode) && !S_ISLNK(a->mode) && a->size)
		ret = field_wrong(f, P_INODE_FIELD, "size", FIELD_SIZE, a->size, 0);
	if (!ret)
		ret = check_time(f, "atime", FIELD_ATIME, &d->atime);
	if (!ret)
		ret = check_time(f, "mtime", FIELD_MTIME, &d->mtime);
	if (!ret)
		ret = check_time(f, "ctime", FIELD_CTIME, &d->ctime);
	if (!ret)
		ret = check_time(f, "btime", FIELD_BTIME, &d->btime);
	return ret;
}

static int inode_item(struct fsck *f, const uint8_t *val, size_t vlen)
{
	struct disk_inode d;
	struct ino_rec *r;
	struct dir_rec *dir;
	int ret;

	if (vlen != sizeof(d)) {
		return ITEM_AWAY(f, P_VALUE_FORM, .name = table_name(TABLE_FILES),
				 .ino = cur.ino, .what = "an inode");
	}
	memcpy(&d, val, sizeof(d));
	attr_decode(&d, &cur.a);
	cur.seen = true;
	f->inode_count++;
	r = ino_need(&f->inodes, cur.ino);
	if (!r)
		return -ENOMEM;
	r->flags |= INO_SEEN;
	if (cur.a.flags & INODE_SHARED)
		r->flags |= INO_SHARED;
	r->nlink = cur.a.nlink;
	r->type = mode_type(cur.a.mode);
	if (cur.ino < FIRST_INO && cur.ino != ROOT_INO)
		PROBLEM(P_INODE_NUMBER, .ino = cur.ino);
	if (!f->changes && cur.ino >= get64(f->super.next_ino) &&
	    cur.ino + 1 > f->next_ino_want)
		f->next_ino_want = cur.ino + 1;
	if (cur.ino == ROOT_INO && !S_ISDIR(cur.a.mode)) {
		ret = field_wrong(f, P_ROOT_MISSING, "inode 1 is no directory",
				  FIELD_MODE, cur.a.mode,
				  S_IFDIR | (cur.a.mode & 07777));
		if (ret)
			return ret;
		/* what follows is looked at as if it were one */
		cur.a.mode = S_IFDIR | (cur.a.mode & 07777);
		r->type = DT_DIR;
	}
	/* also one whose mode has bits that make no sense */
	if (S_ISDIR(cur.a.mode)) {
		dir = dir_need(&f->inodes, r);
		if (!dir)
			return -ENOMEM;
		dir->parent = cur.a.parent;
		if (dir->last == dir->parent)	/* the true one of two */
			dir->from = dir->last;
	}
	cur.odd = !mode_known(cur.a.mode);
	if (cur.odd) {
		/* its entries may know better: pass 6 reports it */
		r->flags |= INO_ODD_MODE;
		return 0;
	}
	return check_fields(f, &d);
}

/* ---- xattrs ------------------------------------------------------------------------ */

static int xattr_lost(struct fsck *f, const char *name, const char *why)
{
	struct repair r = {.kind = REPAIR_XATTR_REMOVE,
			   .id = P_XATTR_PIECES,
			   .ino = cur.ino,
			   .name = (char *)name,
			   .name_len = (uint16_t)strlen(name)};

	if (!PROBLEM(P_XATTR_PIECES, .ino = cur.ino, .name = name, .what = why))
		return 0;
	return repair_later(f, &r);
}

static int xattr_end(struct fsck *f)
{
	bool open = cur.xopen;

	cur.xopen = false;
	if (open && cur.xgot != cur.xbytes)
		return xattr_lost(f, cur.xname,
				  fsck_text(f, "it has %u bytes of %u", cur.xgot,
					    cur.xbytes));
	return 0;
}

static int xattr_first(struct fsck *f, const char *name, const uint8_t *val,
		       size_t vlen)
{
	struct disk_xattr d;
	uint32_t here;

	cur.xattrs++;
	if (vlen < sizeof(d))
		return xattr_lost(f, name, "its first piece is too short");
	memcpy(&d, val, sizeof(d));
	strcpy(cur.xname, name);
	cur.xbytes = get32(d.bytes);
	cur.xgot = (uint32_t)(vlen - sizeof(d));
	cur.xpiece = 0;
	if (cur.xbytes > XATTR_VALUE_MAX)
		return xattr_lost(f, name, "its length makes no sense");
	here = cur.xbytes < PIECE_BYTES ? cur.xbytes : PIECE_BYTES;
	if (cur.xgot != here)
		return xattr_lost(f, name, "its first piece has a wrong length");
	cur.xopen = true;
	return 0;
}

static int xattr_item(struct fsck *f, const uint8_t *key, size_t klen,
		      const uint8_t *val, size_t vlen)
{
	const uint8_t *nul = klen > 3 ? memchr(key, 0, klen - 2) : NULL;
	const char *name = (const char *)key;
	unsigned piece;
	int ret;

	if (!nul || nul == key || (size_t)(nul - key) + 3 != klen ||
	    nul - key > 255) {
		return ITEM_AWAY(f, P_KEY_FORM, .name = table_name(TABLE_FILES),
				 .ino = cur.ino, .what = "an xattr");
	}
	piece = (unsigned)nul[1] << 8 | nul[2];
	if (piece && cur.xopen && !strcmp(cur.xname, name)) {
		uint32_t left = cur.xbytes - cur.xgot;

		if (piece == cur.xpiece + 1 &&
		    vlen == (left < PIECE_BYTES ? left : PIECE_BYTES) && vlen) {
			cur.xpiece = piece;
			cur.xgot += (uint32_t)vlen;
			return 0;
		}
		cur.xopen = false;
		return xattr_lost(f, name,
				  fsck_text(f, "piece %u is missing or of a wrong length",
					    cur.xpiece + 1));
	}
	ret = xattr_end(f);
	if (ret)
		return ret;
	if (piece) {
		if (strcmp(cur.xname, name)) {
			/* said once for all its pieces */
			strcpy(cur.xname, name);
			return xattr_lost(f, name, "its first piece is missing");
		}
		return 0;
	}
	return xattr_first(f, name, val, vlen);
}

/* ---- symlinks ---------------------------------------------------------------------- */

static void symlink_item(const uint8_t *key, size_t vlen)
{
	if (((unsigned)key[0] << 8 | key[1]) != cur.target_pieces ||
	    (cur.target_pieces && cur.target_bytes % PIECE_BYTES))
		cur.target_gap = true;
	cur.target_pieces++;
	cur.target_bytes += vlen;
}

/* What is left of its target may lead elsewhere: the link goes, entries and all. */
static int symlink_end(struct fsck *f)
{
	struct repair r = {.kind = REPAIR_ATTR,
			   .id = P_SYMLINK,
			   .ino = cur.ino,
			   .a = FIELD_NLINK};
	struct ino_rec *rec = ino_find(&f->inodes, cur.ino);
	int ret;

	/* an orphan is about to go */
	if (!S_ISLNK(cur.a.mode) || rec->flags & INO_ORPHAN ||
	    (!cur.target_gap && cur.target_bytes == cur.a.size && cur.a.size))
		return 0;
	if (!PROBLEM(P_SYMLINK, .ino = cur.ino, .is = cur.target_bytes,
		     .want = cur.a.size))
		return 0;
	rec->flags &= (uint8_t)~INO_SEEN;
	ret = repair_later(f, &r);
	r.kind = REPAIR_ORPHAN_ADD;
	return ret ? ret : repair_later(f, &r);
}

/* ---- all items of an inode ----------------------------------------------------------- */

/* By the items there are, or 0. */
static uint8_t type_by_items(void)
{
	if (cur.entries || cur.indexes)
		return DT_DIR;
	if (cur.map_end)
		return DT_REG;
	return cur.target_pieces ? DT_LNK : 0;
}

/* Items that only another kind of file has: they are right, if they are alone. */
static int foreign_items(struct fsck *f)
{
	struct repair r = {.kind = REPAIR_ITEM_REMOVE,
			   .id = P_INODE_FOREIGN,
			   .a = TABLE_FILES};
	uint8_t type = type_by_items(), is = mode_type(cur.a.mode), key[11];
	int ret = 0;

	if (cur.odd || !type)
		return 0;
	if (type != is) {
		return field_wrong(f, P_INODE_FOREIGN,
				   type == DT_DIR ? "a directory's" :
				   type == DT_REG ? "data" : "a symbolic link's",
				   FIELD_MODE, is,
				   (uint32_t)type << 12 | (cur.a.mode & 07777));
	}
	if (type == DT_LNK || !cur.target_pieces ||
	    !PROBLEM(P_INODE_FOREIGN, .ino = cur.ino, .what = "a symbolic link's"))
		return 0;
	r.name = (char *)key;
	r.name_len = sizeof(key);
	be64_put(key, cur.ino);
	key[8] = KEY_SYMLINK;
	for (unsigned i = 0; !ret && i < PATH_MAX / PIECE_BYTES + 1; i++) {
		key[9] = 0;
		key[10] = (uint8_t)i;
		ret = repair_later(f, &r);
	}
	return ret;
}

/* Only a last piece that is not full shows that no more has followed. */
static bool target_cut(uint8_t type)
{
	return type == DT_LNK &&
	       (cur.target_gap || cur.target_bytes % PIECE_BYTES == 0);
}

/*
 * The items of an inode are there, its own is not. If it can have been a file,
 * make one of what is left, so that nothing else is lost: its links, counts
 * and name are put right in the next round. Else the items go.
 */
static int inode_lost(struct fsck *f)
{
	struct ino_rec *rec = ino_find(&f->inodes, cur.ino);
	struct repair r = {.kind = REPAIR_INODE,
			   .id = P_INODE_MISSING,
			   .ino = cur.ino};
	uint8_t type = rec && rec->links ? rec->entry_type : DT_REG;
	const char *what = "an xattr";
	int ret;

	f->look_again = true;
	if (cur.entries || cur.indexes) {
		type = DT_DIR;
		what = cur.entries ? "its entries" : "its indexes";
		r.b = cur.entries;
	} else if (cur.map_end) {
		type = DT_REG;
		what = "its data";
		r.b = cur.written_end > (uint64_t)INT64_MAX >> f->shift ?
			      INT64_MAX :
			      cur.written_end << f->shift;
	} else if (cur.target_pieces) {
		type = DT_LNK;
		what = "its target";
		r.b = cur.target_bytes;
	}
	if (type == DT_REG && map_end_lost(f, &cur))
		r.b += 1ull << f->shift;
	r.a = (uint64_t)type << 12 | (type == DT_DIR ? 0700 : 0600);
	if (!PROBLEM(P_INODE_MISSING, .ino = cur.ino, .what = what))
		return 0;
	rec = ino_need(&f->inodes, cur.ino);
	if (!rec)
		return -ENOMEM;
	if (cur.ino < FIRST_INO || !mode_known((uint32_t)r.a) || target_cut(type) ||
	    (cur.ino >= get64(f->super.next_ino) && !f->changes)) {
		rec->fate = FATE_DROPPED;
		return 0;
	}
	rec->fate = FATE_REMADE;
	ret = repair_later(f, &r);
	return ret ? ret : map_lost(f, &cur);
}

static int inode_end(struct fsck *f)
{
	int ret;

	if (!cur.ino)
		return 0;
	ret = xattr_end(f);
	if (ret)
		return ret;
	if (!cur.seen) {
		/* of the root pass 5 has a better repair */
		return cur.ino == ROOT_INO ? 0 : inode_lost(f);
	}
	ret = foreign_items(f);
	if (!ret && cur.a.xattrs != cur.xattrs)
		ret = field_wrong(f, P_XATTR_COUNT, NULL, FIELD_XATTRS,
				  cur.a.xattrs, cur.xattrs);
	if (!ret)
		ret = symlink_end(f);
	if (!ret)
		ret = map_end(f, &cur);
	if (!ret && S_ISDIR(cur.a.mode))
		ret = dir_end(f, &cur);
	return ret;
}

static int intent_cmp(const void *key, const void *run)
{
	const uint64_t *ino = key;
	const struct intent_run *i = run;

	return (*ino > i->ino) - (*ino < i->ino);
}

/* They are in the order of their table. */
static const struct intent_run *intent_of(const struct fsck *f, uint64_t ino)
{
	return f->intent_count ? bsearch(&ino, f->intents, f->intent_count,
					 sizeof(*f->intents), intent_cmp) : NULL;
}

static int inode_begin(struct fsck *f, uint64_t ino)
{
	int ret = inode_end(f);

	free(cur.bad_runs.v);
	free(cur.gap_runs.v);
	free(cur.unlikely_runs.v);
	memset(&cur, 0, sizeof(cur));
	cur.ino = ino;
	cur.intent = intent_of(f, ino);
	return ret;
}

static int files_item(struct fsck *f, const uint8_t *key, size_t klen,
		      const uint8_t *val, size_t vlen)
{
	uint64_t ino = klen >= 9 ? be64_get(key) : 0;
	const uint8_t *rest = key + 9;
	size_t n = klen - 9;
	int ret;

	if (klen < 9 || !ino) {
		return ITEM_AWAY(f, P_KEY_FORM, .name = table_name(TABLE_FILES),
				 .what = "its length");
	}
	if (ino > INO_MAX)
		return ITEM_AWAY(f, P_KEY_FORM, .name = table_name(TABLE_FILES),
				 .ino = ino, .what = "its inode number");
	f->aside_blks += map_aside(key, klen, val, vlen);
	if (ino != cur.ino) {
		ret = inode_begin(f, ino);
		if (ret)
			return ret;
	}
	switch (key[8]) {
	case KEY_INODE:
		if (n)
			break;
		return inode_item(f, val, vlen);
	case KEY_DIRENT:
		return dirent_item(f, &cur, (const char *)rest, n, val, vlen);
	case KEY_INDEX:
		if (n != 8)
			break;
		return index_item(f, &cur, be64_get(rest), val, vlen);
	case KEY_XATTR:
		return xattr_item(f, rest, n, val, vlen);
	case KEY_SYMLINK:
		if (n != 2)
			break;
		symlink_item(rest, vlen);
		return 0;
	case KEY_MAP:
		if (n != 8)
			break;
		if (cur.seen && S_ISDIR(cur.a.mode) && type_by_items() == DT_DIR)
			return ITEM_AWAY(f, P_INODE_FOREIGN, .ino = ino,
					 .what = "data");
		return map_item(f, &cur, be64_get(rest), val, vlen);
	default:
		break;
	}
	return ITEM_AWAY(f, P_KEY_FORM, .name = table_name(TABLE_FILES), .ino = ino,
			 .what = key[8] > KEY_MAP || !key[8] ? "its type" :
							       "its length");
}

int pass4(struct fsck *f)
{
	struct repair r = {.kind = REPAIR_SUPER,
			   .id = P_SUPER_NEXT_INO,
			   .a = SUPER_NEXT_INO};
	int ret;

	memset(&cur, 0, sizeof(cur));
	f->next_ino_want = 0;
	ret = fsck_walk(f, TABLE_FILES, files_item);
	if (!ret)
		ret = inode_begin(f, 0);
	if (ret || !f->next_ino_want)
		return ret;
	r.b = f->next_ino_want;
	if (PROBLEM(P_SUPER_NEXT_INO, .is = get64(f->super.next_ino),
		    .ino = r.b - 1, .want = r.b))
		ret = repair_later(f, &r);
	return ret;
}
