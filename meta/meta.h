/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_META_H
#define SPACEWEAVE_META_H

/*
 * The volume: whatever must survive a crash. Inodes, directories, extent maps
 * and xattrs are items in one copy-on-write tree; a transaction changes items
 * and takes or frees blocks, all or nothing; the journal makes transactions
 * durable in the order of their commits; checkpoints write the trees.
 *
 * Calls return 0 or a negative errno. -EUCLEAN and -EBADMSG mean damage, which
 * has been reported through volume_options.message with structure and block.
 * -EROFS: the volume is read-only, or became so after a failed write.
 *
 * What protects what:
 *   inode.lock (RANK_INODE, in order of number) protects the inode's
 *     attributes and all items of the inode, its dirents included. Held shared
 *     to read, exclusively by whoever commits a change to them.
 *   The commit lock (RANK_COMMIT, inside) protects trees and open group. It is
 *     held for memory operations only; a node that is not in memory is read
 *     with no lock held but the inode's.
 *
 * Lock ordering:
 *   inode.lock (several: by number)
 *     lock of the table of references
 *       checkpoint lock
 *         lock of punching
 *           flush lock
 *             table of inodes
 *               commit lock
 *                 journal lock
 *                   alloc's locks
 * Nothing is held over a flush but the checkpoint lock and the flush lock, whose
 * purpose that is.
 */

#include "alloc/alloc.h"
#include "alloc/lock.h"
#include "meta/format.h"
#include "meta/image.h"

#include <sys/types.h>

struct volume;
struct txn;

struct volume_options {
	bool readonly;		/* change no byte of the image; replay in memory */
	bool discard;		/* give freed blocks back to the host */
	bool no_threads;	/* no timer, no background checkpoints: tests */
	unsigned commit_ms;	/* commit interval; 0: 5000 */
	unsigned heartbeat_s;	/* the holder's block is written so often; 0: once */
	size_t cache_bytes;	/* bound of what trees and inodes may hold; 0: 128 MiB */
	enum alloc_policy policy;
	unsigned shards;	/* of the allocator; 0: its default */
	const char *program;	/* for the record of who holds the volume */
	/* Told of damage and of turning read-only, one sentence each. NULL: stderr */
	void (*message)(void *ctx, const char *text);
	void *message_ctx;
	/* For fsck alone (meta/repair.h): intents and orphans stay as they are. */
	const struct volume_repair *repair;
};

/* What mkfs decides. Zero means the default where there is one. */
struct volume_geometry {
	uint64_t bytes;			/* of the volume; rounded down to blocks */
	unsigned block_shift;		/* 12 .. 16; 0: 12 */
	uint64_t journal_bytes;		/* 0: by size */
	bool discard;			/* give the image's old blocks back, if it can be */
	uint8_t uuid[16];
	char label[LABEL_BYTES];
	uint32_t root_mode, root_uid, root_gid;	/* mode 0: 0755 */
};

/* Fill in defaults and check bounds; -EINVAL with a sentence in msg. */
int volume_geometry_check(struct volume_geometry *g, char *msg, size_t msg_len);

/*
 * Write an empty volume. Nothing of what stood there can be taken for part of
 * it. Costs what writing the journal costs.
 */
int volume_format(struct image *im, const struct volume_geometry *g);

/*
 * Open: superblock, replay, one checkpoint of what was replayed. The image
 * stays the caller's, to be closed after volume_close(). On failure a sentence
 * is in msg: -EINVAL not a Spaceweave volume, -EPROTONOSUPPORT an unknown version or
 * feature, -EUCLEAN damage.
 */
int volume_open(struct image *im, const struct volume_options *opt,
		struct volume **out, char *msg, size_t msg_len);

/* Everything durable, marked clean, closed. Returns the first error of that;
 * the volume is gone in any case. */
int volume_close(struct volume *v);

/* As if power had been cut: closes without writing anything. For tests. */
void volume_abandon(struct volume *v);

/* Returns when every transaction committed before the call is durable. */
int volume_sync(struct volume *v);
/* The same up to transaction `seq` (inode.last_seq), sparing the flush if so. */
int volume_sync_to(struct volume *v, uint64_t seq);
/* A checkpoint now: trees written, pending frees released. */
int volume_checkpoint(struct volume *v);
/* What the timer does each commit interval. Called by it, and by tests. */
int volume_tick(struct volume *v);

/* Give the host what is free in [from, to), where it is min_blks long or more. */
int volume_trim(struct volume *v, uint64_t from, uint64_t to, uint64_t min_blks,
		uint64_t *done_blks);

struct volume_stat {
	/* Free at the latest after the next checkpoint; avail: without the
	 * volume's own reserve. A bitmap that does not exist yet counts as if
	 * it did, or else the count would depend on where blocks once were:
	 * absent_blks, free in the bitmaps and not here. */
	uint64_t blocks, free_blks, avail_blks, absent_blks;
	uint64_t inodes;
	uint64_t gen;
	uint64_t journal_units, journal_used;
	uint64_t pending_blks;		/* of them, not before the next checkpoint */
	uint64_t aside_blks;		/* in use, unwritten */
	uint64_t cache_bytes, cache_limit, dirty_bytes;
	uint64_t commits, groups, flushes, checkpoints, replayed_groups;
	uint32_t block_bytes;
	uint32_t mounts;
	bool readonly, failed, was_clean;
	uint8_t uuid[16];
	char label[LABEL_BYTES];
};
void volume_stat(struct volume *v, struct volume_stat *out);
unsigned volume_block_shift(const struct volume *v);
bool volume_readonly(const struct volume *v);
struct alloc *volume_alloc(struct volume *v);	/* NULL when read-only */
struct image *volume_image(struct volume *v);

/* Say something through volume_options.message (printf). */
void volume_message(struct volume *v, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));

/* ---- inodes --------------------------------------------------------------- */

struct time_ns {
	int64_t sec;
	uint32_t nsec;
};

struct attr {
	uint32_t mode, nlink, uid, gid, flags, rdev, projid, xattrs;
	uint64_t size;		/* bytes; of a directory: entries */
	uint64_t blks;		/* volume blocks its map holds */
	uint64_t parent;	/* of a directory */
	uint64_t next_index;	/* of a directory */
	struct time_ns atime, mtime, ctime, btime;
};

/*
 * An inode in memory: a copy of what the tree says, with its lock. Exists once
 * for each number while somebody holds a reference.
 */
struct inode {
	uint64_t ino;
	struct rwlock lock;
	/* Under lock: */
	struct attr a;
	uint64_t last_seq;	/* transaction that changed it last; 0: not known */
	uint64_t goal;		/* block where its next data would best stand */
	bool dead;		/* the item is gone: nothing may use it any more */
	bool unfinished;	/* map_cut() left an intent */
	bool owes_times;	/* the kernel wrote, and has not told us when */
	/* Private to inode.c. */
	bool loading;
	unsigned refs;
	struct inode *next, *lru_next, *lru_prev;
};

/* -ESTALE when there is no such inode. */
int inode_get(struct volume *v, uint64_t ino, struct inode **out);
void inode_put(struct volume *v, struct inode *ip);

/* ---- transactions ----------------------------------------------------------
 *
 *   txn_begin(v, TXN_NORMAL, &t)   reserves ring and blocks; may wait for a
 *                                  checkpoint, so: no lock held but inodes'
 *   inode_edit, dir_add, map_write ...   say what is to change; a call that
 *                                  fails leaves the transaction to be aborted
 *   txn_commit(t)                  all of it, at one point in the order of
 *                                  operations; on failure nothing of it
 *   txn_abort(t)                   or nothing
 *
 * Changes are seen by lookups only after the commit. The locks of all inodes
 * concerned are held exclusively from before their state is read until after
 * the commit.
 */
enum txn_kind {
	TXN_NORMAL,
	TXN_REWRITE,	/* writes anew what is there: may use a part of the reserve */
	TXN_FREEING,	/* gives at least what it takes: may use more of it */
};

int txn_begin(struct volume *v, enum txn_kind kind, struct txn **out);
int txn_commit(struct txn *t);
void txn_abort(struct txn *t);
/* Is there room for another `items` items of middling size? If not, commit. */
bool txn_has_room(const struct txn *t, unsigned items);

/*
 * The attributes as they will be after the commit, to be changed in place.
 * One copy for each inode and transaction.
 */
struct attr *inode_edit(struct txn *t, struct inode *ip);

/*
 * A new inode, referenced, its lock held exclusively, its attributes those of
 * *a. Its number was never used before. Gone again if the transaction aborts.
 */
int inode_create(struct txn *t, const struct attr *a, struct inode **out);

/*
 * An inode without names stays, as an orphan, until inode_evict(). Put both
 * into the transaction that changes nlink from or to 0.
 */
int orphan_add(struct txn *t, const struct inode *ip);
int orphan_remove(struct txn *t, const struct inode *ip);

/*
 * Free an orphan and all it holds, in as many transactions as it takes. The
 * caller knows that nobody uses it; takes the inode's lock itself. Cut off by a
 * crash it stays an orphan, which the next writable mount evicts; refused for
 * want of room or memory, the timer tries again.
 */
int inode_evict(struct volume *v, uint64_t ino);

/* ---- directories: entries of the directory `dir`, whose lock is held -------- */

struct dirent_info {
	uint64_t ino;
	uint64_t index;		/* place in the order of creation, from FIRST_INDEX on */
	uint8_t type;		/* DT_ */
};

/* -ENOENT when there is none. */
int dir_lookup(struct volume *v, struct inode *dir, const char *name, size_t len,
	       struct dirent_info *out);
/* The name must not exist. Adjusts the directory's size and next_index;
 * times and nlink are the caller's. */
int dir_add(struct txn *t, struct inode *dir, const char *name, size_t len,
	    uint64_t ino, uint8_t type);
/* `e` is what dir_lookup() gave. */
int dir_remove(struct txn *t, struct inode *dir, const char *name, size_t len,
	       const struct dirent_info *e);
/* Let an existing name stand for another inode, at its old index. */
int dir_replace(struct txn *t, struct inode *dir, const char *name, size_t len,
		const struct dirent_info *e, uint64_t ino, uint8_t type);
/* Another name in the same directory, at the same place of it. */
int dir_rename(struct txn *t, struct inode *dir, const char *name, size_t len,
	       const struct dirent_info *e, const char *new_name, size_t new_len);
/*
 * Entries with index >= from in order, until fn returns nonzero. The entries
 * are a copy taken before fn is called, so fn may do what it likes.
 */
int dir_scan(struct volume *v, struct inode *dir, uint64_t from,
	     int (*fn)(void *ctx, const struct dirent_info *e, const char *name,
		       size_t len),
	     void *ctx);

/* ---- contents: blocks of a file or symlink, whose lock is held --------------- */

struct run {
	uint64_t blk;		/* file block where it begins */
	uint64_t len;		/* file blocks; a hole's reaches to the next run */
	uint64_t start;		/* volume block; 0 of a hole and of what is lost */
	enum run_kind {
		RUN_HOLE,
		RUN_WRITTEN,
		RUN_UNWRITTEN,	/* set aside: reads as zeroes */
		RUN_LOST,	/* fsck gave up what it held: cannot be read */
	} kind;
};

/* The run that holds file block `blk` (from `blk` on; a hole at the end of
 * the map is UINT64_MAX - blk long). */
int map_lookup(struct volume *v, struct inode *ip, uint64_t blk, struct run *out);

/*
 * Read `n` blocks from file block `blk` into buf, verified; holes and
 * unwritten runs give zeroes. -EBADMSG, reported, when a block is not what was
 * written, or lost: then buf's contents must not be used.
 */
int map_read(struct volume *v, struct inode *ip, uint64_t blk, uint64_t n,
	     void *buf);

/*
 * Write `n` blocks from buf to new places and map them at `blk`, in place of
 * what was there. n at most map_write_max(). The data is in the image (not yet
 * durable) before this returns.
 */
#define MAP_WRITE_MAX 1024u
/* What one transaction can take of it: less than MAP_WRITE_MAX where the
 * journal is small, or blocks of the inode are shared. */
unsigned map_write_max(const struct volume *v, const struct inode *ip);
int map_write(struct txn *t, struct inode *ip, uint64_t blk, uint64_t n,
	      const void *buf);

/* Set blocks aside as unwritten where [blk, blk+n) has holes. *next is how far
 * this transaction got; go on from there in another one. Writing them later
 * takes nodes, so aside_extra() blocks more are promised until that is done. */
static inline uint64_t aside_extra(uint64_t blks) { return (blks + 31) / 32; }
int map_prealloc(struct txn *t, struct inode *ip, uint64_t blk, uint64_t n,
		 uint64_t *next);

/*
 * Unmap [from, to). What does not fit this transaction is left to an intent:
 * the caller commits and then, still under the lock, calls map_finish(),
 * which frees the rest. Nobody sees the rest any more only if the caller made
 * it invisible (beyond the size) or holds the lock until map_finish() returns.
 * If that fails, the rest waits for the next map_finish(), at the latest in
 * the next mount: whoever changes size or map calls it first. It costs nothing
 * when nothing waits.
 */
int map_cut(struct txn *t, struct inode *ip, uint64_t from, uint64_t to);
int map_finish(struct volume *v, struct inode *ip);

/*
 * Let dst's [dst_blk, ..+n) share the blocks of src's [src_blk, ..+n). Both
 * locked. src and dst may be the same inode, the ranges then must not overlap.
 * *next is how many blocks this transaction managed.
 */
int map_share(struct txn *t, struct inode *src, uint64_t src_blk,
	      struct inode *dst, uint64_t dst_blk, uint64_t n, uint64_t *next);

int symlink_set(struct txn *t, struct inode *ip, const char *target, size_t len);
/* With a NUL behind, for which size must have room: -ERANGE. */
int symlink_get(struct volume *v, struct inode *ip, char *buf, size_t size,
		size_t *len);

/* ---- xattrs ------------------------------------------------------------------ */

#define XATTR_VALUE_MAX 65536u
#define XATTR_LIST_MAX 65536u

/* *len in: size of buf (0: only ask); out: size of the value. -ENODATA,
 * -ERANGE when it does not fit. */
int xattr_get(struct volume *v, struct inode *ip, const char *name, void *buf,
	      size_t *len);
/* flags: 0, XATTR_CREATE (-EEXIST), XATTR_REPLACE (-ENODATA). */
int xattr_set(struct txn *t, struct inode *ip, const char *name,
	      const void *value, size_t len, int flags);
int xattr_remove(struct txn *t, struct inode *ip, const char *name);
/* Names, each with its NUL, as listxattr(2). -ERANGE, -E2BIG. */
int xattr_list(struct volume *v, struct inode *ip, char *buf, size_t *len);

/* ---- for fsck, scrub and other tools ------------------------------------------ */

/*
 * Walk a table's nodes and items as they are now (a read-only volume: after
 * replay). Nodes are verified: what fails is reported to `bad` and skipped.
 * Any callback may be NULL; a nonzero return ends the walk with it. `ahead`: a
 * thread of its own reads and verifies ahead of the callbacks. `from`: nodes
 * that hold nothing but lower keys are left out. `bad`: a node is lost; `what` is
 * NODE_UNREAD if reading it failed, which may pass, and NODE_MISPLACED of a leaf
 * that is whole, but stands where its keys do not lead.
 */
#define NODE_UNREAD "cannot be read"
#define NODE_MISPLACED "its keys lead elsewhere"
struct walk {
	void *ctx;
	bool ahead;
	const uint8_t *from;
	size_t from_len;
	int (*node)(void *ctx, enum table table, unsigned level, uint64_t block);
	int (*item)(void *ctx, enum table table, const uint8_t *key, size_t klen,
		    const uint8_t *val, size_t vlen);
	int (*bad)(void *ctx, enum table table, unsigned level, uint64_t block,
		   const char *what);
};
int volume_walk(struct volume *v, enum table table, const struct walk *w);

/*
 * Fill `bits` (one block) with bitmap block `index` as the volume's state has
 * it: the checkpoint's, with the takes and frees replayed since. -EBADMSG.
 */
int volume_bitmap(struct volume *v, uint64_t index, void *bits);
/* Blocks as the volume has them, in the image or still in memory. Not verified. */
int volume_blocks(struct volume *v, uint64_t start, uint64_t n, void *buf);
/* Fixed blocks that belong to the head, the ring and the backup. */
unsigned volume_fixed(struct volume *v, struct extent out[8]);
/* The superblock as read, and which slot it came from. */
const struct disk_super *volume_super(const struct volume *v);

/* meta/format.c: verify and decode; a sentence in `why` (may be NULL) on -EUCLEAN
 * or -EBADMSG. */
int super_verify(const struct disk_super *s, unsigned slot, const char **why);
void super_seal(struct disk_super *s, unsigned slot);
/*
 * Before anything is read that somebody is going to build on by writing: what
 * reads show from here on is on the disk. A daemon that was killed may not have
 * flushed what it wrote; and where a flush has failed, the host's memory shows
 * what no later flush writes. That it forgets: the head, and of a volume that is
 * not clean everything (before a superblock says clean, a flush has succeeded).
 */
int super_settle(struct image *im);
/* Read the newest good slot. Looks only; needs no lock. -EINVAL: neither is a
 * superblock. */
int super_load(struct image *im, struct disk_super *out, unsigned *slot,
	       char *msg, size_t msg_len);
/*
 * The same for who is going to write: -EIO if the other slot cannot be read.
 * With the journal the older one shows the same state as the newer; but to
 * write to blocks that are free by the older alone could ruin the newer.
 */
int super_load_to_write(struct image *im, struct disk_super *out, unsigned *slot,
			char *msg, size_t msg_len);
/* The block that names the holder, as other hosts see it. */
int mmp_load(struct image *im, struct disk_mmp *out);
uint64_t checksum(const void *buf, size_t len);
void attr_decode(const struct disk_inode *d, struct attr *a);
void attr_encode(const struct attr *a, struct disk_inode *d);

#endif
