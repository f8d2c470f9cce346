/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Repairs that wait until a round is over: the volume is opened for writing,
 * each repair is one transaction, and the next round looks at what came of
 * them. Bitmaps come first, at opening, before anything is allocated: blocks
 * that are owned but free in the bitmap are claimed, blocks in use that nobody
 * owns are freed. With the same checkpoint lost nodes go and single items are
 * set: so a hole that was data is never seen without the mark that it is lost. What cannot be repaired now (an entry that another repair
 * has removed meanwhile) is left to the next round.
 *
 * Lost nodes come before all else: where something of what they held is found
 * (fsck_salvage.c) nothing is written, for most of what that round found came
 * of the loss. The next one looks at the volume as it is with what was found,
 * and what that finds is repaired together with putting it back.
 */
#include "tools/fsck.h"

#include "meta/repair.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* ---- keys ---------------------------------------------------------------------- */

struct rawkey {
	size_t len;
	uint8_t b[KEY_MAX];
};

static void file_key(struct rawkey *k, uint64_t ino, enum file_key type,
		     const void *rest, size_t len)
{
	be64_put(k->b, ino);
	k->b[8] = (uint8_t)type;
	memcpy(k->b + 9, rest, len);
	k->len = 9 + len;
}

static void index_key(struct rawkey *k, uint64_t dir, uint64_t index)
{
	uint8_t b[8];

	be64_put(b, index);
	file_key(k, dir, KEY_INDEX, b, sizeof(b));
}

/* ---- one transaction for each ----------------------------------------------------- */

/* The inode, locked; end() puts it back. */
static int begin(struct fsck *f, uint64_t ino, struct inode **ip, struct txn **t)
{
	int ret = inode_get(f->v, ino, ip);

	if (ret)
		return ret;
	rwlock_write(&(*ip)->lock);
	ret = txn_begin(f->v, TXN_FREEING, t);
	if (ret) {
		rwlock_unlock(&(*ip)->lock);
		inode_put(f->v, *ip);
	}
	return ret;
}

static int end(struct fsck *f, struct inode *ip, struct txn *t, int ret)
{
	if (ret)
		txn_abort(t);
	else
		ret = txn_commit(t);
	rwlock_unlock(&ip->lock);
	inode_put(f->v, ip);
	return ret;
}

/* ---- attributes --------------------------------------------------------------------- */

static int attr_set(struct fsck *f, const struct repair *r)
{
	struct inode *ip;
	struct txn *t;
	struct attr *a;
	int ret = begin(f, r->ino, &ip, &t);

	if (ret)
		return ret;
	a = inode_edit(t, ip);
	switch ((enum repair_field)r->a) {
	case FIELD_NLINK:
		a->nlink = (uint32_t)r->b;
		break;
	case FIELD_SIZE:
		a->size = r->b;
		break;
	case FIELD_BLKS:
		a->blks = r->b;
		break;
	case FIELD_PARENT:
		a->parent = r->b;
		break;
	case FIELD_NEXT_INDEX:
		a->next_index = r->b;
		break;
	case FIELD_XATTRS:
		a->xattrs = (uint32_t)r->b;
		break;
	case FIELD_SHARED:
		a->flags |= INODE_SHARED;
		break;
	case FIELD_FLAGS:
		a->flags = (uint32_t)r->b;
		break;
	case FIELD_RDEV:
		a->rdev = (uint32_t)r->b;
		break;
	case FIELD_MODE:
		a->mode = (uint32_t)r->b;
		break;
	default:
		/* a time out of bounds was read as one within: write that */
		break;
	}
	return end(f, ip, t, 0);
}

/* ---- entries --------------------------------------------------------------------------- */

static int dirent_put(struct txn *t, uint64_t dir, const struct repair *r,
		      uint64_t ino, uint64_t index, uint8_t type)
{
	struct disk_dirent d = {
		.ino = put64(ino), .index = put64(index), .type = type};
	struct rawkey k;

	file_key(&k, dir, KEY_DIRENT, r->name, r->name_len);
	return repair_put(t, TABLE_FILES, k.b, k.len, &d, sizeof(d));
}

static int index_put(struct txn *t, uint64_t dir, const struct repair *r,
		     uint64_t ino, uint64_t index, uint8_t type)
{
	const size_t head = offsetof(struct disk_index, name);
	uint8_t val[sizeof(struct disk_index) + 256] = {0};
	le64 le = put64(ino);
	struct rawkey k;

	memcpy(val, &le, sizeof(le));
	val[offsetof(struct disk_index, type)] = type;
	memcpy(val + head, r->name, r->name_len);
	index_key(&k, dir, index);
	return repair_put(t, TABLE_FILES, k.b, k.len, val, head + r->name_len);
}

static int entry_change(struct fsck *f, const struct repair *r)
{
	struct dirent_info e = {0};
	struct rawkey k;
	struct inode *dir;
	struct txn *t;
	int ret = begin(f, r->a, &dir, &t);
	bool there;

	if (ret)
		return ret;
	ret = dir_lookup(f->v, dir, r->name, r->name_len, &e);
	there = !ret;
	if (ret == -ENOENT && (r->kind == REPAIR_INDEX_ENTRY))
		ret = 0;
	if (ret)
		return end(f, dir, t, ret);
	switch (r->kind) {
	case REPAIR_ENTRY_REMOVE:
		ret = dir_remove(t, dir, r->name, r->name_len, &e);
		break;
	case REPAIR_ENTRY_TYPE:
		ret = dir_replace(t, dir, r->name, r->name_len, &e, e.ino,
				  (uint8_t)r->b);
		break;
	case REPAIR_ENTRY_INDEX:
		e.index = inode_edit(t, dir)->next_index++;
		ret = dirent_put(t, r->a, r, e.ino, e.index, e.type);
		if (!ret)
			ret = index_put(t, r->a, r, e.ino, e.index, e.type);
		break;
	case REPAIR_INDEX_SET:
		ret = index_put(t, r->a, r, e.ino, e.index, e.type);
		break;
	default:		/* REPAIR_INDEX_ENTRY */
		/* The name may belong to another entry, or to none. */
		if (there || name_wrong(r->name, r->name_len)) {
			index_key(&k, r->a, r->b);
			ret = repair_del(t, TABLE_FILES, k.b, k.len);
		} else {
			const struct ino_rec *i = ino_find(&f->inodes, r->ino);
			uint8_t type = i ? i->type : DT_UNKNOWN;

			inode_edit(t, dir)->size++;
			ret = dirent_put(t, r->a, r, r->ino, r->b, type);
			if (!ret)
				ret = index_put(t, r->a, r, r->ino, r->b, type);
		}
	}
	return end(f, dir, t, ret);
}

/* ---- xattrs, maps, orphans ------------------------------------------------------------------- */

static int xattr_drop(struct fsck *f, const struct repair *r)
{
	unsigned pieces = XATTR_VALUE_MAX / PIECE_BYTES + 1;
	uint8_t rest[256 + 3];
	struct rawkey k;
	struct inode *ip;
	struct txn *t;
	int ret = begin(f, r->ino, &ip, &t);

	if (ret)
		return ret;
	memcpy(rest, r->name, r->name_len);
	rest[r->name_len] = 0;
	for (unsigned i = 0; !ret && i <= pieces; i++) {
		uint8_t val[VALUE_MAX];
		size_t len;

		rest[r->name_len + 1] = (uint8_t)(i >> 8);
		rest[r->name_len + 2] = (uint8_t)i;
		file_key(&k, r->ino, KEY_XATTR, rest, r->name_len + 3u);
		ret = repair_get(f->v, TABLE_FILES, k.b, k.len, val, sizeof(val),
				 &len);
		if (ret == -ENOENT) {
			ret = 0;
			continue;
		}
		if (!ret)
			ret = repair_del(t, TABLE_FILES, k.b, k.len);
		/* Now the first piece is gone, and its count with it. */
		if (!ret && i == 0 && ip->a.xattrs)
			inode_edit(t, ip)->xattrs--;
	}
	return end(f, ip, t, ret);
}

static int cut(struct fsck *f, const struct repair *r)
{
	struct inode *ip;
	struct txn *t;
	int ret = begin(f, r->ino, &ip, &t);

	if (ret)
		return ret;
	ret = map_cut(t, ip, r->a, UINT64_MAX);
	if (ret)
		txn_abort(t);
	else
		ret = txn_commit(t);
	if (!ret)
		ret = map_finish(f->v, ip);
	rwlock_unlock(&ip->lock);
	inode_put(f->v, ip);
	return ret;
}

static int orphan_change(struct fsck *f, const struct repair *r)
{
	struct inode *ip;
	struct txn *t;
	int ret = begin(f, r->ino, &ip, &t);

	if (ret)
		return ret;
	ret = r->kind == REPAIR_ORPHAN_ADD ? orphan_add(t, ip) :
					     orphan_remove(t, ip);
	return end(f, ip, t, ret);
}

/* ---- lost+found -------------------------------------------------------------------------------- */

static struct time_ns now_time(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return (struct time_ns){ts.tv_sec, (uint32_t)ts.tv_nsec};
}

/* Make it: the root is locked and in `t` already. */
static int lost_found_make(struct txn *t, struct inode *root, const char *name,
			   struct inode **out)
{
	struct time_ns now = now_time();
	struct attr a = {.mode = S_IFDIR | 0700,
			 .nlink = 2,
			 .uid = getuid(),
			 .gid = getgid(),
			 .parent = ROOT_INO,
			 .next_index = 3,
			 .atime = now,
			 .mtime = now,
			 .ctime = now,
			 .btime = now};
	int ret = inode_create(t, &a, out);

	if (ret)
		return ret;
	ret = dir_add(t, root, name, strlen(name), (*out)->ino, DT_DIR);
	inode_edit(t, root)->nlink++;
	return ret;
}

/*
 * An inode whose own item is lost; what else belongs to it is still there. Whose
 * it was is not known. Who repairs can read the whole image, so that it is his
 * now shows him nothing new; and without root he could not have it from root.
 */
static int make_inode(struct fsck *f, const struct repair *r)
{
	struct time_ns now = now_time();
	bool dir = S_ISDIR(r->a);
	struct attr a = {.mode = (uint32_t)r->a,
			 .size = r->b,
			 .nlink = dir ? 2 : 1,
			 .uid = getuid(),
			 .gid = getgid(),
			 .parent = dir ? ROOT_INO : 0,
			 .next_index = dir ? FIRST_INDEX : 0,
			 .atime = now,
			 .mtime = now,
			 .ctime = now,
			 .btime = now};
	struct disk_inode d = {0};
	struct rawkey k;
	struct txn *t;
	int ret = txn_begin(f->v, TXN_FREEING, &t);

	if (ret)
		return ret;
	attr_encode(&a, &d);
	file_key(&k, r->ino, KEY_INODE, "", 0);
	ret = repair_put(t, TABLE_FILES, k.b, k.len, &d, sizeof(d));
	if (ret) {
		txn_abort(t);
		return ret;
	}
	return txn_commit(t);
}

/* What a directory has under `name`; or, if that is no use, under "name.1" and so
 * on: the first that is free (-ENOENT), or whose entry will do (0). */
#define NAME_BYTES 40u
static int name_find(struct fsck *f, struct inode *dir, bool subdir_will_do,
		     char *name, struct dirent_info *e)
{
	size_t stem = strlen(name);

	for (unsigned n = 1;; n++) {
		int ret = dir_lookup(f->v, dir, name, strlen(name), e);

		if (ret || (subdir_will_do && e->type == DT_DIR))
			return ret;
		snprintf(name + stem, NAME_BYTES - stem, ".%u", n);
	}
}

/* The directory for what has no name, or a new one if that name is a file's. */
static int lost_found(struct fsck *f, uint64_t *ino)
{
	char name[NAME_BYTES] = "lost+found";
	struct dirent_info e;
	struct inode *root, *lf = NULL;
	struct txn *t;
	int ret = begin(f, ROOT_INO, &root, &t);

	if (ret)
		return ret;
	ret = name_find(f, root, true, name, &e);
	if (!ret)
		*ino = e.ino;
	if (ret == -ENOENT)
		ret = lost_found_make(t, root, name, &lf);
	ret = end(f, root, t, ret);
	if (lf) {
		*ino = lf->ino;
		rwlock_unlock(&lf->lock);
		inode_put(f->v, lf);
	}
	return ret;
}

/* An entry for `ip` in lost+found, under a name that no other has. */
static int adopt_into(struct fsck *f, struct inode *lf, struct inode *ip,
		      uint8_t type)
{
	char name[NAME_BYTES];
	struct dirent_info e;
	struct txn *t;
	struct attr *a;
	int ret;

	snprintf(name, sizeof(name), "#%" PRIu64, ip->ino);
	ret = name_find(f, lf, false, name, &e);
	if (ret != -ENOENT)
		return ret;
	ret = txn_begin(f->v, TXN_FREEING, &t);
	if (ret)
		return ret;
	ret = dir_add(t, lf, name, strlen(name), ip->ino, type);
	a = inode_edit(t, ip);
	if (type == DT_DIR) {
		a->parent = lf->ino;
		inode_edit(t, lf)->nlink++;
	} else {
		a->nlink = 1;
	}
	if (!ret)
		return txn_commit(t);
	txn_abort(t);
	return ret;
}

static int adopt(struct fsck *f, const struct repair *r)
{
	struct inode *ip, *lf;
	uint64_t ino = 0;
	int ret = lost_found(f, &ino);

	if (ret)
		return ret;
	ret = inode_get(f->v, r->ino, &ip);
	if (ret)
		return ret;
	rwlock_write(&ip->lock);
	ret = inode_get(f->v, ino, &lf);
	if (!ret) {
		rwlock_write_nested(&lf->lock, true);
		ret = adopt_into(f, lf, ip, (uint8_t)r->b);
		rwlock_unlock(&lf->lock);
		inode_put(f->v, lf);
	}
	rwlock_unlock(&ip->lock);
	inode_put(f->v, ip);
	return ret;
}

/* ---- references ------------------------------------------------------------------------------------ */

/* Blocks a .. a + b are referred to `ino` times: set just that. */
static int ref_set(struct fsck *f, const struct repair *r)
{
	struct disk_ref d = {.len = put64(r->b), .count = put32((uint32_t)r->ino)};
	uint8_t key[9] = {KEY_REF};
	struct txn *t;
	int ret = txn_begin(f->v, TXN_FREEING, &t);

	if (ret)
		return ret;
	be64_put(key + 1, r->a);
	if (r->ino < 2)
		ret = repair_del(t, TABLE_REFS, key, sizeof(key));
	else
		ret = repair_put(t, TABLE_REFS, key, sizeof(key), &d, sizeof(d));
	if (ret) {
		txn_abort(t);
		return ret;
	}
	return txn_commit(t);
}

/* ---- all of them ----------------------------------------------------------------------------------- */

static int repair_one(struct fsck *f, const struct repair *r)
{
	switch (r->kind) {
	case REPAIR_ATTR:
		return attr_set(f, r);
	case REPAIR_ENTRY_REMOVE:
	case REPAIR_ENTRY_TYPE:
	case REPAIR_ENTRY_INDEX:
	case REPAIR_INDEX_ENTRY:
	case REPAIR_INDEX_SET:
		return entry_change(f, r);
	case REPAIR_INODE:
		return make_inode(f, r);
	case REPAIR_LOST:
		return adopt(f, r);
	case REPAIR_ORPHAN_ADD:
	case REPAIR_ORPHAN_REMOVE:
		return orphan_change(f, r);
	case REPAIR_CUT:
		return f->keep_blocks ? -EBUSY : cut(f, r);
	case REPAIR_XATTR_REMOVE:
		return xattr_drop(f, r);
	case REPAIR_REF:
		return ref_set(f, r);
	default:
		return 0;	/* done by opening, or by repair_super() */
	}
}

static void say(void *ctx, const char *text)
{
	const struct fsck *f = ctx;

	if (f->verbose || f->debug)
		cli_warn("%s", text);
}

/* Where replay puts what rode in the journal, whether or not it was freed since:
 * it is not to be taken for a node meanwhile. The next round frees it. */
static int claim_ridden(struct fsck *f)
{
	for (size_t i = 0; i < f->ridden.count; i++) {
		const struct extent *e = &f->ridden.v[i];
		bool twice;

		for (uint64_t b = e->start; b < e->start + e->len; b++)
			if (blocks_put(&f->owned, b, 1, &twice) < 0)
				return -ENOMEM;
	}
	return 0;
}

/* All that is owned, for bitmaps that are to be written anew. */
static int claim_owned(struct fsck *f, struct runs *claim)
{
	int ret = claim_ridden(f);

	for (uint64_t page = 0; !ret && page < f->owned.pages; page++) {
		const uint8_t *bits = blocks_page(&f->owned, page);

		for (unsigned i = 0; bits && !ret && i < BLOCKS_PAGE; i++)
			if (bits[i / 8] >> (i % 8) & 1)
				ret = runs_add(claim, page * BLOCKS_PAGE + i, 1);
	}
	return ret;
}

bool repair_bitmaps_anew(const struct fsck *f)
{
	for (size_t i = 0; i < f->repairs.count; i++)
		if (f->repairs.v[i].kind == REPAIR_BITMAPS)
			return true;
	return false;
}

/* ---- items, as they shall be once the volume is open ------------------------------------------- */

/* File blocks a .. b - 1 are lost. */
static int items_add_lost(struct fsck *f, struct items *l, const struct repair *r)
{
	uint64_t len = r->b - r->a;
	struct disk_map d = {.start = put64(len >> 32),
			     .birth = f->super.gen,
			     .len = put32((uint32_t)len),
			     .flags = put32(MAP_LOST)};
	struct rawkey k;
	uint8_t at[8];

	if (!len)
		return 0;
	be64_put(at, r->a);
	file_key(&k, r->ino, KEY_MAP, at, sizeof(at));
	return items_add(l, JITEM_PUT, TABLE_FILES, k.b, k.len, &d, sizeof(d));
}

static int item_changes(struct fsck *f, struct items *l)
{
	int ret = 0;

	for (size_t i = 0; !ret && i < f->repairs.count; i++) {
		const struct repair *r = &f->repairs.v[i];

		if (r->kind == REPAIR_ITEM_REMOVE)
			ret = items_add(l, JITEM_DEL, (enum table)r->a, r->name,
					r->name_len, NULL, 0);
		else if (r->kind == REPAIR_ITEM_PUT)
			ret = items_add(l, JITEM_PUT, (enum table)r->a, r->name,
					r->b, r->name + r->b, r->name_len - r->b);
		else if (r->kind == REPAIR_LOST_RUN)
			ret = items_add_lost(f, l, r);
	}
	return ret;
}

/* What the bitmaps have to be told before anything is allocated. */
static int space_changes(struct fsck *f, struct runs *claim, struct runs *release)
{
	int ret = 0;

	if (repair_bitmaps_anew(f))
		return claim_owned(f, claim);

	for (size_t i = 0; !ret && i < f->repairs.count; i++) {
		const struct repair *r = &f->repairs.v[i];

		if (r->kind == REPAIR_SPACE)
			ret = runs_add(r->id == P_OWNED_FREE ? claim : release,
				       r->a, r->b);
	}
	return ret;
}

static bool is_node(const struct repair *r)
{
	return r->kind == REPAIR_NODE || r->kind == REPAIR_SORT;
}

/* Nodes to be given up, as volume_repair wants them. */
static struct lost_node *lost_nodes(const struct fsck *f, size_t *count)
{
	struct lost_node *v = calloc(f->repairs.count + 1, sizeof(*v));

	*count = 0;
	for (size_t i = 0; v && i < f->repairs.count; i++) {
		const struct repair *r = &f->repairs.v[i];

		if (is_node(r))
			v[(*count)++] = (struct lost_node){
				.table = (enum table)r->ino,
				.level = (unsigned)r->a,
				.block = r->b};
	}
	return v;
}

static int open_for_repair(struct fsck *f, const struct runs *claim,
			   const struct runs *release, const struct items *items)
{
	const struct volume_repair space = {.heart = f->heart,
					    .gen = get64(f->super.gen),
					    .claim = claim->v,
					    .claims = claim->count,
					    .release = release->v,
					    .releases = release->count,
					    .bitmaps_anew = repair_bitmaps_anew(f),
					    .found = f->found,
					    .founds = f->found_count,
					    .lost = f->saved,
					    .losts = f->saved_count,
					    .items = items->v,
					    .item_count = items->count};
	struct volume_options opt = {.no_threads = true,
				     .repair = &space,
				     .program = cli_program,
				     .message = say,
				     .message_ctx = f};
	char msg[240] = "";
	int ret;

	volume_close(f->v);
	f->v = NULL;
	ret = volume_open(f->im, &opt, &f->v, msg, sizeof(msg));
	if (ret) {
		f->v = NULL;
		cli_warn("'%s' cannot be opened for repairs: %s", f->path,
			 *msg ? msg : cli_error(ret));
	}
	return ret;
}

/*
 * An inode without an entry may get the one back that an index still names:
 * so those come first, and lost+found takes what is left in the next round. Of a
 * directory that is made anew they are not looked at before that.
 */
static bool entries_come_back(const struct repairs *rs)
{
	for (size_t i = 0; i < rs->count; i++)
		if (rs->v[i].kind == REPAIR_INDEX_ENTRY ||
		    (rs->v[i].kind == REPAIR_INODE && S_ISDIR(rs->v[i].a)))
			return true;
	return false;
}

static bool only_super(const struct repairs *rs)
{
	for (size_t i = 0; i < rs->count; i++)
		if (rs->v[i].kind != REPAIR_SUPER && rs->v[i].kind != REPAIR_COPY)
			return false;
	return true;
}

bool repair_hasty(struct fsck *f)
{
	static uint8_t buf[1u << BLOCK_SHIFT_MAX];

	for (size_t i = 0; i < f->repairs.count; i++) {
		const struct repair *r = &f->repairs.v[i];

		if (r->unread && r->b < f->blocks &&
		    !image_pread(f->im, buf, (size_t)1 << f->shift, r->b << f->shift))
			return true;
	}
	return false;
}

/*
 * All that is to be done with opening, in one checkpoint. The trees become just
 * what this round has seen: what owns a block is known of nothing else.
 */
static int open_repaired(struct fsck *f)
{
	struct runs claim = {0}, release = {0};
	struct items items = {0};
	int ret = space_changes(f, &claim, &release);

	if (!ret)
		ret = item_changes(f, &items);
	if (!ret)
		ret = open_for_repair(f, &claim, &release, &items);
	for (size_t i = 0; !ret && i < f->saved_count; i++)
		problem_fixed(P_NODE_BAD);
	if (!ret)
		saved_fini(f);
	free(claim.v);
	free(release.v);
	free(items.v);
	return ret;
}

/* The root of the files, and nothing of what it led to. */
static bool all_lost(const struct fsck *f)
{
	for (size_t i = 0; !f->found_count && i < f->saved_count; i++)
		if (!f->saved[i].items && is_files_root(f, &f->saved[i]))
			return true;
	return false;
}

/* What is lost, and what can be had of it: another round is to see it so. */
static int see_lost(struct fsck *f)
{
	uint64_t found = f->found_count, items = 0;
	size_t losts, had = f->saved_count;
	struct lost_node *lost = lost_nodes(f, &losts);
	int ret = lost ? salvage(f, lost, losts) : -ENOMEM;

	free(lost);
	for (size_t i = had; i < f->saved_count; i++)
		items += f->saved[i].item_count;
	if (!ret && (f->found_count > found || items))
		printf("%s: of what lost nodes held some is found%s\n", f->path,
		       f->bitmaps_lost ? "; without the bitmaps, some of that may be "
					 "older than what was lost" : "");
	return ret;
}

int repair_all(struct fsck *f)
{
	int ret = repair_super(f), closed;
	bool wait;

	if (ret || !f->v || (only_super(&f->repairs) && !f->saved_count))
		return ret;
	ret = see_lost(f);
	if (!ret && all_lost(f)) {
		saved_fini(f);
		f->seen_anew = false;
		return rescue(f, P_NODE_BAD, &f->super);
	}
	if (!ret && !f->seen_anew)
		ret = open_repaired(f);
	if (ret || f->seen_anew)
		return ret;
	wait = entries_come_back(&f->repairs);
	/* What is shared is marked so before anything can be freed. */
	for (size_t i = 0; i < 2 * f->repairs.count; i++) {
		const struct repair *r = &f->repairs.v[i % f->repairs.count];
		bool first = r->kind == REPAIR_REF ||
			     (r->kind == REPAIR_ATTR && r->a == FIELD_SHARED);

		if (first != (i < f->repairs.count))
			continue;
		if (r->kind == REPAIR_LOST && wait)
			continue;
		ret = repair_one(f, r);
		if (!ret && r->kind != REPAIR_SUPER && r->kind != REPAIR_COPY)
			problem_fixed(r->id);
		else if (ret && f->verbose)
			cli_warn("a repair has to wait: %s", cli_error(ret));
		if (ret == -EIO || ret == -EROFS)
			break;
		ret = 0;
		cli_progress("repairs", i, 2 * f->repairs.count);
	}
	cli_progress_end();
	closed = volume_close(f->v);
	f->v = NULL;
	return ret ? ret : closed;
}
