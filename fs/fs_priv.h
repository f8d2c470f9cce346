/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_FS_PRIV_H
#define SPACEWEAVE_FS_PRIV_H

/* What the files of fs/ share and nobody else sees. */

#include "fs/fs.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#define NAME_BYTES_MAX 255
#define LINKS_MAX 0x7fffffffu

/* ---- counts.c: how often the kernel has been told of an inode ---------------- */

#define COUNT_SHARDS 64

struct count_shard {
	struct lock lock;
	/* Under lock: an open-addressed table, `cap` a power of two. */
	struct count *slots;
	size_t cap, used;
};

struct counts {
	struct count_shard shard[COUNT_SHARDS];
};

void counts_init(struct counts *c);
void counts_fini(struct counts *c);
/* One more. -ESTALE when the inode is being freed, -ENOMEM. */
int counts_add(struct counts *c, uint64_t ino);
/* n fewer. True: nobody needs the inode any more, the caller is to free it. */
bool counts_sub(struct counts *c, uint64_t ino, uint64_t n);
/* The inode's last name is gone. True as above. */
bool counts_orphan(struct counts *c, uint64_t ino);
/* It has a name again. */
void counts_adopt(struct counts *c, uint64_t ino);
/* What counts_sub() or counts_orphan() asked for is done. */
void counts_evicted(struct counts *c, uint64_t ino);
/* One inode without names that is still counted, now to be freed; 0: none. */
uint64_t counts_take_orphan(struct counts *c);

/* Does the kernel know of the inode? */
bool counts_known(struct counts *c, uint64_t ino);

/* ---- gaps.c: what an append-only file has still to get ------------------------- */

struct gap {
	uint64_t from, to;		/* bytes */
};

struct gaps {
	struct lock lock;
	/* Under lock: */
	struct gap_file *first;
	unsigned files;			/* how many; read without lock */
};

/* The gaps of one inode are the business of who has it locked. */
void gaps_init(struct gaps *g);
void gaps_fini(struct gaps *g);
static inline bool gaps_any(const struct gaps *g)
{
	return __atomic_load_n(&g->files, __ATOMIC_ACQUIRE);
}
/* Have the inode's gaps noted although it is not append-only yet, and no more. */
int gaps_watch(struct gaps *g, uint64_t ino);
void gaps_unwatch(struct gaps *g, uint64_t ino);
/* The file of `from` bytes will be written from `to` on. Noted if it is `append`
 * only, or watched; -ENOMEM. */
int gaps_add(struct gaps *g, uint64_t ino, bool append, uint64_t from, uint64_t to);
/* [from, to) has been written. */
void gaps_fill(struct gaps *g, uint64_t ino, uint64_t from, uint64_t to);
/* The first gap, or what is left of it, from `at` on; UINT64_MAX: none. */
struct gap gaps_next(struct gaps *g, uint64_t ino, uint64_t at);
/* Nothing is on its way any more. */
void gaps_drop(struct gaps *g, uint64_t ino);

/* ---- the file system --------------------------------------------------------- */

struct fs {
	struct volume *v;
	struct fs_options opt;
	unsigned shift;			/* log2 of the block size */
	bool readonly;
	struct lock rename_lock;
	struct counts counts;
	struct gaps gaps;
	unsigned evicting;		/* evictions under way; atomic */
};

static inline uint64_t fs_mask(const struct fs *fs)
{
	return (1ull << fs->shift) - 1;
}

/* The kernel's clock for time stamps: a finer one would differ from its own. */
static inline struct time_ns time_now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME_COARSE, &ts);
	return (struct time_ns){ts.tv_sec, (uint32_t)ts.tv_nsec};
}

static inline int time_cmp(struct time_ns a, struct time_ns b)
{
	if (a.sec != b.sec)
		return a.sec < b.sec ? -1 : 1;
	return a.nsec < b.nsec ? -1 : a.nsec > b.nsec;
}

/* ---- namei.c ------------------------------------------------------------------ */

/* Get an inode and lock it; -ESTALE when it is gone. */
int inode_read_lock(struct fs *fs, uint64_t ino, struct inode **out);
int inode_write_lock(struct fs *fs, uint64_t ino, struct inode **out);
void inode_unlock_put(struct fs *fs, struct inode *ip);
/* Lock several in order of number. Equal ones are locked once. */
#define LOCK_SET_MAX 4
void inodes_lock(struct inode *const *ips, unsigned n);
void inodes_unlock(struct inode *const *ips, unsigned n);

void attr_to_stat(const struct fs *fs, uint64_t ino, const struct attr *a,
		  struct stat *st);
/* Free an inode that counts_sub() or counts_orphan() gave us. */
void fs_evict(struct fs *fs, uint64_t ino);
/*
 * Space ran out: finish what frees some. False when nothing more can be done
 * about it; *tries starts at 0. No lock held.
 */
bool fs_reclaim(struct fs *fs, unsigned *tries);
/* Durable before the answer, if the mount or the inode's flags want that. */
int fs_sync_to(struct fs *fs, uint64_t seq);
int fs_settle(struct fs *fs, uint64_t seq, uint32_t flags, bool dir);

/* ---- attr.c -------------------------------------------------------------------- */

/* What fs_setattr() asks for, within a transaction; not the size. */
int attr_apply(struct txn *t, struct fs *fs, struct inode *ip, int what,
	       const struct stat *st);
/* Setuid, setgid (if executable by the group) and capabilities go. */
int attr_kill_priv(struct txn *t, struct inode *ip);
int attr_kill_caps(struct txn *t, struct fs *fs, struct inode *ip);
/* A read reached us: does the access time want to be moved, and do it. */
bool atime_due(const struct fs *fs, const struct inode *ip);
void atime_touch(struct fs *fs, struct inode *ip);

/* ---- acl.c --------------------------------------------------------------------- */

#define ACL_ACCESS "system.posix_acl_access"
#define ACL_DEFAULT "system.posix_acl_default"

/*
 * What a new inode takes from its directory: *mode is masked by the default
 * ACL if there is one, else by the umask. `ip` is the new inode, in t.
 */
struct acl_inherit {
	size_t len;		/* of the directory's default ACL; 0: none */
	bool access;		/* the child needs an access ACL of its own */
	uint8_t *dflt, *own;
};
int acl_inherit(struct fs *fs, struct inode *dir, uint32_t umask, mode_t *mode,
		struct acl_inherit *out);
int acl_inherit_set(struct txn *t, struct inode *ip, const struct acl_inherit *in);
void acl_inherit_fini(struct acl_inherit *in);
/* The mode changed: change the access ACL, if there is one, to fit. */
int acl_chmod(struct txn *t, struct fs *fs, struct inode *ip, mode_t mode);
/* The permission bits that an access ACL stands for. 1: it says more than
 * they do and must be kept, 0: it does not; -EINVAL. */
int acl_to_mode(const void *value, size_t len, mode_t *mode);

/* ---- file.c -------------------------------------------------------------------- */

/* Change the size, with the other attributes `what` names. Locked for writing. */
int file_resize(struct fs *fs, struct inode *ip, int what, const struct stat *st);

/* ---- fuse.c, for mount.c ------------------------------------------------------------ */

struct fuse_lowlevel_ops;
struct fuse_session;

/* What the requests of a session share: libfuse's userdata. */
struct face {
	struct fs *fs;
	bool writeback;			/* the kernel may keep dirty pages */
	bool export;			/* files can be opened by handle */
	const char *image;		/* its path, for who asks the root; or NULL */
};

/*
 * What a request says that this libfuse does not pass on. The loop fills it
 * in, in the thread that then handles the request.
 */
struct face_extra {
	bool tmpfile;			/* a create without a name */
	bool kill_suid;			/* of a write */
	bool kill_sgid;			/* of an ACL that is set */
};
extern _Thread_local struct face_extra face_extra;

const struct fuse_lowlevel_ops *face_ops(void);
/* A thread beside the workers; before the first request, after the last. */
int face_start(struct face *face, struct fuse_session *se);
/* `unserved`: nobody answers requests any more. */
void face_stop(bool unserved);
/* Free what requests of this thread have used. */
void face_thread_fini(void);
#define FACE_MAX_WRITE (1u << 20)

#endif
