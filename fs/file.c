/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Contents: read, write, truncate, fallocate, copy, fsync.
 *
 * The order of data and metadata. A write puts its data into new blocks of the
 * image and then commits one transaction that maps them, moves the size and
 * stamps the times; blocks that were there before are freed by the same
 * transaction. So whoever sees the new map sees the new data, and a crash
 * leaves all of a write (up to map_write_max() blocks) or nothing of it. fsync
 * waits until the transaction that changed the inode last is durable, with all
 * before it: among them the one that made its name.
 *
 * Invariants
 *  1. What a file's last block holds beyond the file's size is zero on disk.
 *     Whoever shrinks a file inside a block writes that block anew; growing
 *     then needs no block at all.
 *  2. Blocks beyond the size are unwritten (set aside) or not there.
 *  3. A partial block is read, changed and written under the inode's lock.
 *
 * Big changes are cut up: a large write or copy into transactions of which
 * each is a shorter write; truncation and punching by map_cut(), whose first
 * transaction has the whole visible effect, the rest being freed by
 * map_finish() under the lock.
 *
 * A full volume: what only frees may use the reserve, what writes anew blocks
 * that are there a part of it, for that can take more room than it gives, or
 * frees nothing (where it cuts up runs, and where clones keep what was there).
 * What was set aside can always be written: fallocate sees to that.
 * Everything else gets -ENOSPC after fs_reclaim() found nothing.
 */
#include "fs/fs_priv.h"

#include <linux/falloc.h>
#include <stdlib.h>
#include <unistd.h>

#define COPY_BYTES 131072u	/* writes up to it go through one buffer */
#define COPY_STEP 4194304u	/* bytes copied by hand in one call */

/* A transaction ends: committed, or on an error aborted. */
static int txn_end(struct txn *t, int err)
{
	if (!err)
		return txn_commit(t);
	txn_abort(t);
	return err;
}

static uint64_t blocks_up(const struct fs *fs, uint64_t bytes)
{
	return (bytes >> fs->shift) + !!(bytes & fs_mask(fs));
}

static int regular(const struct inode *ip)
{
	if (S_ISDIR(ip->a.mode))
		return -EISDIR;
	return S_ISREG(ip->a.mode) ? 0 : -EINVAL;
}

/* ---- read ------------------------------------------------------------------------- */

size_t fs_read_room(struct fs *fs, size_t len)
{
	return len + (2ul << fs->shift);
}

static ssize_t read_locked(struct fs *fs, struct inode *ip, void *buf,
			   size_t len, uint64_t off)
{
	uint64_t first = off >> fs->shift;
	int err = ip->dead ? -ESTALE : regular(ip);

	if (err)
		return err;
	if (off >= ip->a.size || !len)
		return 0;
	if (len > ip->a.size - off)
		len = ip->a.size - off;
	err = map_read(fs->v, ip, first, blocks_up(fs, off + len) - first, buf);
	return err ? err : (ssize_t)len;
}

ssize_t fs_read(struct fs *fs, uint64_t ino, void *buf, size_t len, off_t off,
		char **data)
{
	struct inode *ip;
	ssize_t got;
	bool touch;
	int err = off < 0 ? -EINVAL : inode_get(fs->v, ino, &ip);

	if (err)
		return err;
	rwlock_read(&ip->lock);
	got = read_locked(fs, ip, buf, len, (uint64_t)off);
	touch = got >= 0 && atime_due(fs, ip);
	rwlock_unlock(&ip->lock);
	if (touch)
		atime_touch(fs, ip);
	inode_put(fs->v, ip);
	*data = (char *)buf + ((uint64_t)off & fs_mask(fs));
	return got;
}

/* ---- write ------------------------------------------------------------------------ */

/* One block as it is now. */
static int block_load(struct fs *fs, struct inode *ip, uint64_t blk, void *buf)
{
	if (blk << fs->shift < ip->a.size)
		return map_read(fs->v, ip, blk, 1, buf);
	memset(buf, 0, 1ul << fs->shift);
	return 0;
}

/*
 * Write [off, off + len) through a buffer that has room for all blocks
 * concerned and takes in what those at both ends hold beside it.
 */
static int write_through(struct fs *fs, struct txn *t, struct inode *ip,
			 const void *buf, size_t len, uint64_t off, uint8_t *copy)
{
	uint64_t first = off >> fs->shift, end = off + len;
	uint64_t n = blocks_up(fs, end) - first;
	size_t head = off & fs_mask(fs), total = n << fs->shift;
	uint8_t *last = copy + total - (1ul << fs->shift);
	int err = 0;

	if (head)
		err = block_load(fs, ip, first, copy);
	if (!err && (end & fs_mask(fs)) && !(head && n == 1)) {
		if (end < ip->a.size)
			err = block_load(fs, ip, first + n - 1, last);
		else
			memset(copy + head + len, 0, total - head - len);
	}
	if (err)
		return err;
	memcpy(copy + head, buf, len);
	return map_write(t, ip, first, n, copy);
}

static int write_small(struct fs *fs, struct txn *t, struct inode *ip,
		       const char *buf, size_t len, uint64_t off)
{
	uint8_t copy[COPY_BYTES] __attribute__((aligned(4096)));

	return write_through(fs, t, ip, buf, len, off, copy);
}

/* Whole blocks go from the caller's buffer. */
static int write_data(struct fs *fs, struct txn *t, struct inode *ip,
		      const char *buf, size_t len, uint64_t off)
{
	const uint64_t mask = fs_mask(fs);
	size_t total = blocks_up(fs, (off & mask) + len) << fs->shift;
	uint8_t *copy;
	int err;

	if (!((off | len) & mask))
		return map_write(t, ip, off >> fs->shift, len >> fs->shift, buf);
	if (total <= COPY_BYTES)
		return write_small(fs, t, ip, buf, len, off);
	copy = aligned_alloc(4096, total);
	err = copy ? write_through(fs, t, ip, buf, len, off, copy) : -ENOMEM;
	free(copy);
	return err;
}

/* Size, times and privileges after a write that ends at `end`. */
static int write_attr(struct fs *fs, struct txn *t, struct inode *ip,
		      uint64_t end, unsigned flags)
{
	struct attr *a;
	int err = 0;

	if (flags & FS_WRITE_KILL_SUID)
		err = attr_kill_priv(t, ip);
	if (!err && !(flags & FS_WRITE_CACHED))
		err = attr_kill_caps(t, fs, ip);
	if (err)
		return err;
	a = inode_edit(t, ip);
	if (!a)
		return -ENOMEM;
	if (end > a->size)
		a->size = end;
	if (!(flags & FS_WRITE_CACHED))
		a->mtime = a->ctime = time_now();
	return 0;
}

/* Every block of the range is there already: writing it takes nothing more. */
static bool overwrites(struct fs *fs, struct inode *ip, uint64_t off, size_t len)
{
	uint64_t blk = off >> fs->shift, end = blocks_up(fs, off + len);
	struct run run;

	while (blk < end) {
		if (map_lookup(fs->v, ip, blk, &run) || !run.start)
			return false;
		blk = run.blk + run.len;
	}
	return true;
}

/* The file is about to grow from `from` on, beyond what may be on its way. */
static int gap_before(struct fs *fs, struct inode *ip, uint64_t from)
{
	if (from <= ip->a.size)
		return 0;
	return gaps_add(&fs->gaps, ip->ino, ip->a.flags & INODE_APPEND,
			ip->a.size, from);
}

static int write_chunk(struct fs *fs, struct inode *ip, const char *buf,
		       size_t len, uint64_t off, unsigned flags, bool full)
{
	enum txn_kind kind = full && overwrites(fs, ip, off, len)
				     ? TXN_REWRITE : TXN_NORMAL;
	struct txn *t;
	int err = gap_before(fs, ip, off);

	if (!err)
		err = txn_begin(fs->v, kind, &t);
	if (err)
		return err;
	err = write_data(fs, t, ip, buf, len, off);
	if (!err)
		err = write_attr(fs, t, ip, off + len, flags);
	err = txn_end(t, err);
	if (err)
		return err;
	gaps_fill(&fs->gaps, ip->ino, off, off + len);
	ip->owes_times |= flags & FS_WRITE_CACHED;
	return 0;
}

/* May this be written, and is what an earlier error left unfinished done? */
static int write_allowed(struct fs *fs, struct inode *ip, uint64_t off,
			 unsigned flags)
{
	int err = ip->dead ? -ESTALE : regular(ip);

	if (err)
		return err;
	if (ip->a.flags & INODE_IMMUTABLE)
		return -EPERM;
	/* A cache gives back whole pages: write_new() looks closer. */
	if ((ip->a.flags & INODE_APPEND) && off < ip->a.size &&
	    !(flags & FS_WRITE_CACHED))
		return -EPERM;
	return map_finish(fs->v, ip);
}

/* What has to be durable if the mount or the inode wants it so. */
struct settling {
	uint64_t seq;
	uint32_t flags;
};

static struct settling settling(const struct inode *ip)
{
	return (struct settling){ip->last_seq, ip->a.flags};
}

/* What is still to be written, and what came of it. */
struct writing {
	const char *buf;
	size_t len;
	uint64_t off;
	unsigned flags;
	bool full;			/* space ran out before */
	bool refused;			/* of an append-only file: not all was new */
	struct settling s;
};

/*
 * `at` holds the first `old` bytes as they are in the file. What may be written
 * of `len` comes in beside them; returns where it begins.
 */
static size_t take_new(struct fs *fs, struct inode *ip, struct writing *w,
		       char *at, size_t old, size_t len)
{
	size_t pos = 0, first = len;

	while (pos < old) {
		struct gap g = gaps_next(&fs->gaps, ip->ino, w->off + pos);
		size_t from = g.from - w->off < old ? g.from - w->off : old;
		size_t to = g.to - w->off < old ? g.to - w->off : old;

		if (memcmp(at + pos, w->buf + pos, from - pos))
			w->refused = true;
		if (from < to && first == len)
			first = from;
		memcpy(at + from, w->buf + from, to - from);
		pos = to;
	}
	memcpy(at + old, w->buf + old, len - old);
	return old < first ? old : first;
}

/*
 * A cache gives back whole pages. What it gives below the end of an append-only
 * file has to be what is there, or what a gap still lacks. The rest is refused, but
 * not with it what others may have appended: that is written.
 */
static int write_new(struct fs *fs, struct inode *ip, struct writing *w, size_t len)
{
	size_t old = len < ip->a.size - w->off ? len : ip->a.size - w->off;
	uint64_t blk = w->off >> fs->shift;
	char *copy = aligned_alloc(4096, (fs_read_room(fs, len) + 4095) & ~4095ul);
	char *at = copy + (w->off & fs_mask(fs));
	size_t first;
	int err = copy ? map_read(fs->v, ip, blk,
				  blocks_up(fs, w->off + old) - blk, copy)
		       : -ENOMEM;

	if (!err) {
		first = take_new(fs, ip, w, at, old, len);
		if (first < len)
			err = write_chunk(fs, ip, at + first, len - first,
					  w->off + first, w->flags, w->full);
	}
	free(copy);
	return err;
}

/* Write what fits one transaction; returns how much that was. */
static ssize_t write_once(struct fs *fs, struct inode *ip, struct writing *w)
{
	size_t len = w->len, most;
	int err;

	rwlock_write(&ip->lock);
	most = (size_t)(map_write_max(fs->v, ip) - 1) << fs->shift;
	if (len > most)
		len = most - (w->off & fs_mask(fs));
	err = write_allowed(fs, ip, w->off, w->flags);
	if (!err && (ip->a.flags & INODE_APPEND) && w->off < ip->a.size)
		err = write_new(fs, ip, w, len);
	else if (!err)
		err = write_chunk(fs, ip, w->buf, len, w->off, w->flags, w->full);
	w->s = settling(ip);
	rwlock_unlock(&ip->lock);
	return err ? err : (ssize_t)len;
}

ssize_t fs_write(struct fs *fs, uint64_t ino, const void *buf, size_t len,
		 off_t off, unsigned flags)
{
	struct writing w = {.buf = buf, .len = len, .off = (uint64_t)off,
			    .flags = flags};
	unsigned tries = 0;
	struct inode *ip;
	ssize_t n = 0;
	int err;

	if (fs->readonly)
		return -EROFS;
	if (off < 0)
		return -EINVAL;
	if (len > (uint64_t)INT64_MAX - (uint64_t)off)
		return -EFBIG;
	err = inode_get(fs->v, ino, &ip);
	if (err)
		return err;
	while (w.len) {
		w.full = tries > 0;
		n = write_once(fs, ip, &w);
		if (n > 0) {
			w.buf += n;
			w.off += (uint64_t)n;
			w.len -= (size_t)n;
		} else if (n != -ENOSPC || !fs_reclaim(fs, &tries)) {
			break;
		}
	}
	inode_put(fs->v, ip);
	err = n < 0 ? (int)n : fs_settle(fs, w.s.seq, w.s.flags, false);
	if (!err && w.refused)
		err = -EPERM;
	return err ? err : (ssize_t)len;
}

/* ---- holes and sizes ---------------------------------------------------------------- */

/* Zero [from, to) of block `blk` on disk, if it has anything there. */
static int block_zero(struct fs *fs, struct txn *t, struct inode *ip,
		      uint64_t blk, size_t from, size_t to)
{
	uint8_t buf[1u << BLOCK_SHIFT_MAX] __attribute__((aligned(4096)));
	struct run run;
	int err = map_lookup(fs->v, ip, blk, &run);

	/* what is lost stays so, all of the block */
	if (err || run.kind != RUN_WRITTEN)
		return err;
	err = map_read(fs->v, ip, blk, 1, buf);
	if (err)
		return err;
	memset(buf + from, 0, to - from);
	return map_write(t, ip, blk, 1, buf);
}

/* The size in t; and the modification time, unless it is set beside. */
static int resize_attr(struct fs *fs, struct txn *t, struct inode *ip, int what,
		       const struct stat *st)
{
	bool moved = ip->a.size != (uint64_t)st->st_size;
	struct attr *a;
	int err = attr_apply(t, fs, ip, what, st);

	if (err)
		return err;
	a = inode_edit(t, ip);
	a->size = (uint64_t)st->st_size;
	if (moved && !(what & (FS_SET_MTIME | FS_SET_MTIME_NOW)))
		a->mtime = time_now();
	return 0;
}

/* Is something lost among the first `blks` blocks? */
static int any_lost(struct fs *fs, struct inode *ip, uint64_t blks, bool *lost)
{
	struct run run = {.kind = RUN_HOLE};
	int err = 0;

	*lost = false;
	if (!(ip->a.flags & INODE_LOST))
		return 0;
	for (uint64_t blk = 0; !err && !*lost && blk < blks;
	     blk = run.len < blks - blk ? blk + run.len : blks) {
		err = map_lookup(fs->v, ip, blk, &run);
		*lost = run.kind == RUN_LOST;
	}
	return err;
}

static int shrink(struct fs *fs, struct inode *ip, int what, const struct stat *st)
{
	uint64_t size = (uint64_t)st->st_size;
	size_t tail = size < ip->a.size ? size & fs_mask(fs) : 0;
	struct txn *t;
	bool lost;
	int err = any_lost(fs, ip, blocks_up(fs, size), &lost);

	if (!err)
		err = txn_begin(fs->v, tail ? TXN_REWRITE : TXN_FREEING, &t);
	if (err)
		return err;
	if (tail)
		err = block_zero(fs, t, ip, size >> fs->shift, tail,
				 1ul << fs->shift);
	if (!err)
		err = map_cut(t, ip, blocks_up(fs, size), UINT64_MAX);
	if (!err)
		err = resize_attr(fs, t, ip, what, st);
	if (!err && !lost)
		inode_edit(t, ip)->flags &= ~INODE_LOST;
	err = txn_end(t, err);
	return err ? err : map_finish(fs->v, ip);
}

static int grow(struct fs *fs, struct inode *ip, int what, const struct stat *st)
{
	struct txn *t;
	int err = txn_begin(fs->v, TXN_FREEING, &t);

	return err ? err : txn_end(t, resize_attr(fs, t, ip, what, st));
}

int file_resize(struct fs *fs, struct inode *ip, int what, const struct stat *st)
{
	int err = regular(ip);

	if (!err && st->st_size < 0)
		err = -EINVAL;
	if (!err)
		err = map_finish(fs->v, ip);
	if (err)
		return err;
	/* The same size: blocks set aside beyond it go. What is lost has none. */
	if ((uint64_t)st->st_size > ip->a.size ||
	    (!ip->a.blks && !(ip->a.flags & INODE_LOST)))
		return grow(fs, ip, what, st);
	return shrink(fs, ip, what, st);
}

/* ---- fallocate ------------------------------------------------------------------------ */

struct range {
	uint64_t from, to;		/* bytes */
};

static int stamp(struct txn *t, struct inode *ip, uint64_t size)
{
	struct attr *a = inode_edit(t, ip);

	if (!a)
		return -ENOMEM;
	if (size > a->size)
		a->size = size;
	a->mtime = a->ctime = time_now();
	return 0;
}

/* Make a range read as zeroes: ragged ends are written, whole blocks cut. */
static int punch_in(struct fs *fs, struct txn *t, struct inode *ip,
		    const struct range *r)
{
	const uint64_t mask = fs_mask(fs);
	uint64_t first = r->from >> fs->shift, last = r->to >> fs->shift;
	size_t head = r->from & mask, tail = r->to & mask;
	int err = 0;

	if (first == last)
		return block_zero(fs, t, ip, first, head, tail);
	if (head)
		err = block_zero(fs, t, ip, first, head, mask + 1);
	if (!err && tail)
		err = block_zero(fs, t, ip, last, 0, tail);
	if (!err && first + !!head < last)
		err = map_cut(t, ip, first + !!head, last);
	return err;
}

/* The file is then at least `size` long. */
static int punch(struct fs *fs, struct inode *ip, struct range r, uint64_t size)
{
	enum txn_kind kind = TXN_FREEING;
	struct txn *t;
	int err;

	/* Beyond the size there is nothing to keep. */
	if (r.to >= ip->a.size && r.to <= (uint64_t)INT64_MAX - fs_mask(fs))
		r.to = blocks_up(fs, r.to) << fs->shift;
	if (((r.from | r.to) & fs_mask(fs)) || (ip->a.flags & INODE_SHARED))
		kind = TXN_REWRITE;
	err = txn_begin(fs->v, kind, &t);
	if (err)
		return err;
	err = punch_in(fs, t, ip, &r);
	if (!err)
		err = stamp(t, ip, size);
	err = txn_end(t, err);
	return err ? err : map_finish(fs->v, ip);
}

/* Are there as many free blocks as the range has holes, and what writing them
 * will take? */
static int room_for(struct fs *fs, struct inode *ip, uint64_t blk, uint64_t end)
{
	uint64_t holes = 0;
	struct volume_stat st;

	while (blk < end) {
		struct run run;
		uint64_t to;
		int err = map_lookup(fs->v, ip, blk, &run);

		if (err)
			return err;
		to = run.len < end - run.blk ? run.blk + run.len : end;
		if (run.kind == RUN_HOLE)
			holes += to - blk;
		blk = to;
	}
	volume_stat(fs->v, &st);
	return holes + aside_extra(holes) > st.avail_blks ? -ENOSPC : 0;
}

static int prealloc(struct fs *fs, struct inode *ip, const struct range *r,
		    uint64_t size)
{
	uint64_t blk = r->from >> fs->shift, end = blocks_up(fs, r->to);
	int err = room_for(fs, ip, blk, end);

	while (!err && blk < end) {
		struct txn *t;
		uint64_t next = end;

		err = txn_begin(fs->v, TXN_NORMAL, &t);
		if (err)
			break;
		err = map_prealloc(t, ip, blk, end - blk, &next);
		if (!err)
			err = stamp(t, ip, next >= end ? size : 0);
		err = txn_end(t, err);
		blk = next;
	}
	return err;
}

static int fallocate_locked(struct fs *fs, struct inode *ip, int mode,
			    const struct range *r)
{
	uint64_t size = mode & FALLOC_FL_KEEP_SIZE ? 0 : r->to;
	int err = write_allowed(fs, ip, r->from, mode & ~FALLOC_FL_KEEP_SIZE
						     ? 0 : FS_WRITE_CACHED);

	if (!err)
		err = gap_before(fs, ip, size);
	if (!err && (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)))
		err = punch(fs, ip, *r, mode & FALLOC_FL_ZERO_RANGE ? size : 0);
	if (!err && !(mode & FALLOC_FL_PUNCH_HOLE))
		err = prealloc(fs, ip, r, size);
	return err;
}

static int fallocate_check(struct fs *fs, int mode, off_t off, off_t len)
{
	const int known = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE |
			  FALLOC_FL_ZERO_RANGE;
	const int both = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE;

	if (fs->readonly)
		return -EROFS;
	if ((mode & ~known) || (mode & both) == both ||
	    ((mode & FALLOC_FL_PUNCH_HOLE) && !(mode & FALLOC_FL_KEEP_SIZE)))
		return -EOPNOTSUPP;
	if (off < 0 || len <= 0)
		return -EINVAL;
	return len > INT64_MAX - off ? -EFBIG : 0;
}

int fs_fallocate(struct fs *fs, uint64_t ino, int mode, off_t off, off_t len)
{
	const struct range r = {(uint64_t)off, (uint64_t)off + (uint64_t)len};
	struct settling s = {0};
	unsigned tries = 0;
	struct inode *ip;
	int err = fallocate_check(fs, mode, off, len);

	if (!err)
		err = inode_get(fs->v, ino, &ip);
	if (err)
		return err;
	do {
		rwlock_write(&ip->lock);
		err = fallocate_locked(fs, ip, mode, &r);
		s = settling(ip);
		rwlock_unlock(&ip->lock);
	} while (err == -ENOSPC && fs_reclaim(fs, &tries));
	inode_put(fs->v, ip);
	return err ? err : fs_settle(fs, s.seq, s.flags, false);
}

/* ---- seek ------------------------------------------------------------------------------- */

static off_t seek_locked(struct fs *fs, struct inode *ip, uint64_t off, bool data)
{
	uint64_t blk = off >> fs->shift, end = blocks_up(fs, ip->a.size);
	int err = regular(ip);

	if (err)
		return err;
	if (off >= ip->a.size)
		return -ENXIO;
	while (blk < end) {
		struct run run;

		err = map_lookup(fs->v, ip, blk, &run);
		if (err)
			return err;
		if ((run.kind == RUN_WRITTEN || run.kind == RUN_LOST) == data) {
			uint64_t at = blk << fs->shift;

			return (off_t)(at > off ? at : off);
		}
		if (run.len >= end - run.blk)
			break;
		blk = run.blk + run.len;
	}
	return data ? -ENXIO : (off_t)ip->a.size;
}

off_t fs_lseek(struct fs *fs, uint64_t ino, off_t off, int whence)
{
	struct inode *ip;
	off_t at;
	int err;

	if (whence != SEEK_DATA && whence != SEEK_HOLE)
		return -EINVAL;
	if (off < 0)
		return -ENXIO;
	err = inode_read_lock(fs, ino, &ip);
	if (err)
		return err;
	at = seek_locked(fs, ip, (uint64_t)off, whence == SEEK_DATA);
	inode_unlock_put(fs, ip);
	return at;
}

/* ---- copy ------------------------------------------------------------------------------- */

struct copying {
	struct inode *src, *dst;
	uint64_t src_off, dst_off;	/* where it has got to */
	uint64_t len;			/* still to be done */
};

static void copied(struct copying *c, uint64_t n)
{
	c->src_off += n;
	c->dst_off += n;
	c->len -= n;
}

/* Copy n bytes by reading and writing; buf has room for them and two blocks. */
static int copy_bytes(struct fs *fs, struct copying *c, uint64_t n, char *buf)
{
	uint64_t first = c->src_off >> fs->shift;
	struct txn *t;
	int err = map_read(fs->v, c->src, first,
			   blocks_up(fs, c->src_off + n) - first, buf);

	if (err)
		return err;
	err = txn_begin(fs->v, TXN_NORMAL, &t);
	if (err)
		return err;
	err = write_data(fs, t, c->dst, buf + (c->src_off & fs_mask(fs)), n,
			 c->dst_off);
	if (!err)
		err = write_attr(fs, t, c->dst, c->dst_off + n, 0);
	err = txn_end(t, err);
	if (!err)
		copied(c, n);
	return err;
}

/* Whole blocks at the same place within theirs are shared. */
static int copy_share(struct fs *fs, struct copying *c, uint64_t blks,
		      uint64_t bytes)
{
	while (blks) {
		uint64_t done = 0, n;
		struct txn *t;
		int err = txn_begin(fs->v, TXN_NORMAL, &t);

		if (err)
			return err;
		err = map_share(t, c->src, c->src_off >> fs->shift, c->dst,
				c->dst_off >> fs->shift, blks, &done);
		n = done << fs->shift < bytes ? done << fs->shift : bytes;
		if (!err && !done)
			err = -EUCLEAN;
		if (!err)
			err = write_attr(fs, t, c->dst, c->dst_off + n, 0);
		err = txn_end(t, err);
		if (err)
			return err;
		copied(c, n);
		blks -= done;
		bytes -= n;
	}
	return 0;
}

/* How many of the next bytes can be shared as blocks; *blks of them. */
static uint64_t sharable(struct fs *fs, const struct copying *c, uint64_t *blks)
{
	const uint64_t mask = fs_mask(fs);
	uint64_t bytes = c->len & ~mask;

	*blks = 0;
	if ((c->src_off | c->dst_off) & mask)
		return 0;
	/* A ragged end as well, where both files end in that block. */
	if ((c->len & mask) && c->src_off + c->len == c->src->a.size &&
	    c->dst_off + c->len >= c->dst->a.size)
		bytes = c->len;
	*blks = blocks_up(fs, bytes);
	return bytes;
}

static int copy_step(struct fs *fs, struct copying *c, char *buf)
{
	const uint64_t mask = fs_mask(fs);
	uint64_t blks, n = sharable(fs, c, &blks);

	if (n)
		return copy_share(fs, c, blks, n);
	n = (uint64_t)(map_write_max(fs->v, c->dst) - 1) << fs->shift;
	n = n < COPY_BYTES ? n : COPY_BYTES;
	n = c->len < n ? c->len : n;
	/* Up to the next border, if beyond it blocks can be shared. */
	if (!((c->src_off ^ c->dst_off) & mask) && (c->src_off & mask) &&
	    n > (-c->src_off & mask))
		n = -c->src_off & mask;
	return copy_bytes(fs, c, n, buf);
}

static int copy_allowed(struct fs *fs, struct copying *c)
{
	int err = c->src->dead ? -ESTALE : regular(c->src);

	if (!err)
		err = write_allowed(fs, c->dst, c->dst_off, 0);
	if (err)
		return err;
	if (c->src_off >= c->src->a.size) {
		c->len = 0;
		return 0;
	}
	if (c->len > c->src->a.size - c->src_off)
		c->len = c->src->a.size - c->src_off;
	if (c->src == c->dst && c->src_off < c->dst_off + c->len &&
	    c->dst_off < c->src_off + c->len)
		return -EINVAL;
	/* Copying by hand holds the locks: a step, the caller comes again. */
	if (((c->src_off ^ c->dst_off) & fs_mask(fs)) && c->len > COPY_STEP)
		c->len = COPY_STEP;
	return 0;
}

static ssize_t copy_locked(struct fs *fs, struct copying *c)
{
	uint64_t start = c->src_off, dst_start = c->dst_off;
	int err = copy_allowed(fs, c);
	char *buf = NULL;

	if (!err && c->len)
		err = gap_before(fs, c->dst, c->dst_off);
	if (!err && c->len)
		buf = aligned_alloc(4096, fs_read_room(fs, COPY_BYTES));
	if (!err && c->len && !buf)
		err = -ENOMEM;
	while (!err && c->len)
		err = copy_step(fs, c, buf);
	free(buf);
	gaps_fill(&fs->gaps, c->dst->ino, dst_start, c->dst_off);
	return c->src_off > start ? (ssize_t)(c->src_off - start) : err;
}

ssize_t fs_copy_file_range(struct fs *fs, uint64_t src, off_t src_off,
			   uint64_t dst, off_t dst_off, size_t len)
{
	struct copying c = {.src_off = (uint64_t)src_off,
			    .dst_off = (uint64_t)dst_off, .len = len};
	struct inode *ips[2] = {NULL, NULL};
	struct settling s = {0};
	unsigned tries = 0;
	ssize_t n = 0;
	int err = fs->readonly ? -EROFS : 0;

	if (src_off < 0 || dst_off < 0)
		return -EINVAL;
	if (len > (uint64_t)INT64_MAX - (uint64_t)dst_off)
		return -EFBIG;
	if (!err)
		err = inode_get(fs->v, src, &ips[0]);
	if (!err)
		err = inode_get(fs->v, dst, &ips[1]);
	c.src = ips[0];
	c.dst = ips[1];
	do {
		if (err)
			break;
		inodes_lock(ips, 2);
		n = copy_locked(fs, &c);
		s = settling(c.dst);
		inodes_unlock(ips, 2);
	} while (n == -ENOSPC && fs_reclaim(fs, &tries));
	if (!err && n > 0)
		err = fs_settle(fs, s.seq, s.flags, false);
	for (int i = 0; i < 2; i++)
		if (ips[i])
			inode_put(fs->v, ips[i]);
	return err ? err : n;
}

/* ---- the whole ------------------------------------------------------------------------- */

int fs_fsync(struct fs *fs, uint64_t ino, bool datasync)
{
	struct inode *ip;
	uint64_t seq;
	int err;

	(void)datasync;			/* one flush makes both durable */
	if (fs->readonly)
		return 0;
	err = inode_get(fs->v, ino, &ip);
	if (err)
		return err;
	rwlock_read(&ip->lock);
	seq = ip->last_seq;
	inode_unlock_put(fs, ip);
	return fs_sync_to(fs, seq);
}

int fs_sync(struct fs *fs) { return fs->readonly ? 0 : volume_sync(fs->v); }

int fs_statfs(struct fs *fs, struct statvfs *st)
{
	/* An inode with its entry takes some 300 bytes of the tree. */
	const uint64_t per_block = (1ull << fs->shift) / 512;
	struct volume_stat v;
	uint64_t id[2];

	volume_stat(fs->v, &v);
	memcpy(id, v.uuid, sizeof(id));
	*st = (struct statvfs){
		.f_bsize = v.block_bytes,
		.f_frsize = v.block_bytes,
		.f_blocks = v.blocks,
		.f_bfree = v.free_blks,
		.f_bavail = v.avail_blks,
		.f_files = v.inodes + v.avail_blks * per_block,
		.f_ffree = v.avail_blks * per_block,
		.f_favail = v.avail_blks * per_block,
		.f_fsid = (unsigned long)(id[0] ^ id[1]),
		.f_flag = fs->readonly ? ST_RDONLY : 0,
		.f_namemax = NAME_BYTES_MAX,
	};
	return 0;
}

int fs_trim(struct fs *fs, uint64_t off, uint64_t len, uint64_t min,
	    uint64_t *done)
{
	uint64_t end = len > UINT64_MAX - off ? UINT64_MAX : off + len;
	uint64_t done_blks = 0, min_blks = blocks_up(fs, min);
	struct volume_stat st;
	int err;

	if (fs->readonly)
		return -EROFS;
	volume_stat(fs->v, &st);
	if (len <= fs_mask(fs) || off >> fs->shift >= st.blocks)
		return -EINVAL;
	err = volume_trim(fs->v, blocks_up(fs, off), end >> fs->shift,
			  min_blks ? min_blks : 1, &done_blks);
	*done = done_blks << fs->shift;
	return err;
}
