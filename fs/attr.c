/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Attributes: times, modes, owners, flags, xattrs. Each change is one
 * transaction.
 *
 * What a change of one thing does to others is done here: chown takes setuid,
 * setgid and capabilities off, chmod and the access ACL follow each other, and
 * ctime follows everything. Who may do what, the kernel has checked, but for
 * immutable and append-only inodes, which it does not know of.
 */
#include "fs/fs_priv.h"

#include <dirent.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#define CAPABILITY "security.capability"
#define BTIME "system.spaceweave.btime"
#define TRUSTED "trusted."
#define DAY_S 86400

static dev_t rdev_decode(uint32_t r)
{
	return makedev(r >> 8 & 0xfff, (r & 0xff) | (r >> 12 & 0xfff00));
}

void attr_to_stat(const struct fs *fs, uint64_t ino, const struct attr *a,
		  struct stat *st)
{
	*st = (struct stat){
		.st_ino = ino,
		.st_mode = a->mode,
		.st_nlink = a->nlink,
		.st_uid = a->uid,
		.st_gid = a->gid,
		.st_rdev = rdev_decode(a->rdev),
		.st_size = (off_t)a->size,
		.st_blocks = (blkcnt_t)(a->blks << (fs->shift - 9)),
		.st_blksize = (blksize_t)1 << fs->shift,
		.st_atim = {a->atime.sec, a->atime.nsec},
		.st_mtim = {a->mtime.sec, a->mtime.nsec},
		.st_ctim = {a->ctime.sec, a->ctime.nsec},
	};
}

int fs_getattr(struct fs *fs, uint64_t ino, struct stat *st)
{
	struct inode *ip;
	int err = inode_read_lock(fs, ino, &ip);

	if (err)
		return err;
	attr_to_stat(fs, ino, &ip->a, st);
	inode_unlock_put(fs, ip);
	return 0;
}

int fs_btime(struct fs *fs, uint64_t ino, struct timespec *ts)
{
	struct inode *ip;
	int err = inode_read_lock(fs, ino, &ip);

	if (err)
		return err;
	*ts = (struct timespec){ip->a.btime.sec, ip->a.btime.nsec};
	inode_unlock_put(fs, ip);
	return 0;
}

/* ---- access times -------------------------------------------------------------- */

bool atime_due(const struct fs *fs, const struct inode *ip)
{
	const struct attr *a = &ip->a;

	if (fs->readonly || fs->opt.noatime || (a->flags & INODE_NOATIME) ||
	    (fs->opt.nodiratime && S_ISDIR(a->mode)))
		return false;
	if (fs->opt.strictatime && !fs->opt.lazytime)
		return time_cmp(a->atime, time_now()) != 0;
	return time_cmp(a->atime, a->mtime) <= 0 ||
	       time_cmp(a->atime, a->ctime) <= 0 ||
	       time_now().sec - a->atime.sec >= DAY_S;
}

/* Failing to note a read is no reason to fail it. */
void atime_touch(struct fs *fs, struct inode *ip)
{
	struct txn *t;

	rwlock_write(&ip->lock);
	if (!ip->dead && atime_due(fs, ip) &&
	    !txn_begin(fs->v, TXN_NORMAL, &t)) {
		struct attr *a = inode_edit(t, ip);

		if (a) {
			a->atime = time_now();
			txn_commit(t);
		} else {
			txn_abort(t);
		}
	}
	rwlock_unlock(&ip->lock);
}

/* ---- setattr ------------------------------------------------------------------- */

int attr_kill_caps(struct txn *t, struct fs *fs, struct inode *ip)
{
	size_t len = 0;
	int err;

	if (!ip->a.xattrs)
		return 0;
	err = xattr_get(fs->v, ip, CAPABILITY, NULL, &len);
	if (!err)
		err = xattr_remove(t, ip, CAPABILITY);
	return err == -ENODATA ? 0 : err;
}

int attr_kill_priv(struct txn *t, struct inode *ip)
{
	mode_t drop = ip->a.mode & S_ISUID;
	struct attr *a;

	if ((ip->a.mode & (S_ISGID | S_IXGRP)) == (S_ISGID | S_IXGRP))
		drop |= S_ISGID;
	if (!drop || S_ISDIR(ip->a.mode))
		return 0;
	a = inode_edit(t, ip);
	if (!a)
		return -ENOMEM;
	a->mode &= ~drop;
	return 0;
}

static struct time_ns time_of(const struct timespec *ts)
{
	return (struct time_ns){ts->tv_sec, (uint32_t)ts->tv_nsec};
}

static void apply_times(struct attr *a, int what, const struct stat *st,
			struct time_ns now)
{
	if (what & FS_SET_ATIME)
		a->atime = time_of(&st->st_atim);
	if (what & FS_SET_MTIME)
		a->mtime = time_of(&st->st_mtim);
	if (what & FS_SET_ATIME_NOW)
		a->atime = now;
	if (what & FS_SET_MTIME_NOW)
		a->mtime = now;
	a->ctime = now;
	if (what & FS_SET_CTIME)
		a->ctime = time_of(&st->st_ctim);
}

int attr_apply(struct txn *t, struct fs *fs, struct inode *ip, int what,
	       const struct stat *st)
{
	struct attr *a = inode_edit(t, ip);
	int err = 0;

	if (!a)
		return -ENOMEM;
	if (what & (FS_SET_UID | FS_SET_GID | FS_SET_KILL_SUID))
		err = attr_kill_priv(t, ip);
	/* once: what the transaction has removed is still found */
	if (!err && (what & (FS_SET_UID | FS_SET_GID | FS_SET_SIZE)) &&
	    !S_ISDIR(ip->a.mode))
		err = attr_kill_caps(t, fs, ip);
	if (!err && (what & FS_SET_MODE))
		err = acl_chmod(t, fs, ip, st->st_mode);
	if (err)
		return err;
	a = inode_edit(t, ip);
	if (what & FS_SET_MODE)
		a->mode = (a->mode & S_IFMT) | (st->st_mode & 07777);
	if (what & FS_SET_UID)
		a->uid = st->st_uid;
	if (what & FS_SET_GID)
		a->gid = st->st_gid;
	apply_times(a, what, st, time_now());
	return 0;
}

/*
 * Nothing but what a cache owes: it has written the file, or moved its ctime. Of an
 * immutable file it may owe the time of what it wrote before.
 */
static bool times_owed(const struct inode *ip, int what, const struct stat *st)
{
	return (what & ~FS_SET_CACHED) == (FS_SET_MTIME | FS_SET_CTIME) &&
	       ((what & FS_SET_CACHED) ||
		(!(ip->a.flags & INODE_IMMUTABLE) &&
		 !time_cmp(time_of(&st->st_mtim), ip->a.mtime)));
}

/* Times other than now; a cache's "now" comes as an mtime like its ctime. */
static bool times_said(int what, const struct stat *st)
{
	if ((what & (FS_SET_ATIME | FS_SET_ATIME_NOW)) == FS_SET_ATIME)
		return true;
	if ((what & (FS_SET_MTIME | FS_SET_MTIME_NOW)) != FS_SET_MTIME)
		return false;
	return !(what & FS_SET_CTIME) ||
	       time_cmp(time_of(&st->st_mtim), time_of(&st->st_ctim));
}

static int setattr_allowed(const struct inode *ip, int what,
			   const struct stat *st)
{
	const int never = FS_SET_MODE | FS_SET_UID | FS_SET_GID | FS_SET_SIZE;

	if (!(ip->a.flags & (INODE_IMMUTABLE | INODE_APPEND)) ||
	    times_owed(ip, what, st))
		return 0;
	if ((ip->a.flags & INODE_IMMUTABLE) || (what & never) ||
	    times_said(what, st))
		return -EPERM;
	return 0;
}

/*
 * A cache tells when it wrote an immutable file. What it wrote before the flag was
 * set, which moved ctime, was written then at the latest. What it took since, it
 * took in vain: that moves nothing, and is no error of who has these times
 * written. False: there is nothing to do.
 */
static bool times_before_flag(struct inode *ip, struct stat *st)
{
	const struct attr *a = &ip->a;

	st->st_ctim = (struct timespec){a->ctime.sec, a->ctime.nsec};
	return ip->owes_times && time_cmp(time_of(&st->st_mtim), a->ctime) <= 0;
}

static int setattr_plain(struct fs *fs, struct inode *ip, int what,
			 const struct stat *st)
{
	struct txn *t;
	int err = txn_begin(fs->v, TXN_FREEING, &t);

	if (err)
		return err;
	err = attr_apply(t, fs, ip, what, st);
	if (err) {
		txn_abort(t);
		return err;
	}
	return txn_commit(t);
}

static int setattr_once(struct fs *fs, uint64_t ino, int what, struct stat *st)
{
	struct inode *ip;
	uint64_t seq;
	uint32_t flags;
	int err = inode_write_lock(fs, ino, &ip);

	if (err)
		return err;
	err = setattr_allowed(ip, what, st);
	if (!err && (what & FS_SET_SIZE))
		err = file_resize(fs, ip, what, st);
	else if (!err && (!(ip->a.flags & INODE_IMMUTABLE) ||
			  times_before_flag(ip, st)))
		err = setattr_plain(fs, ip, what, st);
	if (!err && (what & FS_SET_CACHED))
		ip->owes_times = false;
	if (!err)
		attr_to_stat(fs, ino, &ip->a, st);
	seq = ip->last_seq;
	flags = ip->a.flags;
	inode_unlock_put(fs, ip);
	return err ? err : fs_settle(fs, seq, flags, false);
}

int fs_setattr(struct fs *fs, uint64_t ino, int what, struct stat *st)
{
	unsigned tries = 0;
	int err;

	if (fs->readonly)
		return -EROFS;
	do
		err = setattr_once(fs, ino, what, st);
	while (err == -ENOSPC && fs_reclaim(fs, &tries));
	return err;
}

/* ---- chattr's flags ------------------------------------------------------------- */

static const struct {
	uint32_t inode, chattr;
} flag_names[] = {
	{INODE_IMMUTABLE, FS_IMMUTABLE_FL}, {INODE_APPEND, FS_APPEND_FL},
	{INODE_NODUMP, FS_NODUMP_FL},	    {INODE_NOATIME, FS_NOATIME_FL},
	{INODE_SYNC, FS_SYNC_FL},	    {INODE_DIRSYNC, FS_DIRSYNC_FL},
};
#define FLAG_NAMES (sizeof(flag_names) / sizeof(flag_names[0]))

int fs_getflags(struct fs *fs, uint64_t ino, uint32_t *flags, uint32_t *projid)
{
	struct inode *ip;
	int err = inode_read_lock(fs, ino, &ip);

	if (err)
		return err;
	*flags = 0;
	for (size_t i = 0; i < FLAG_NAMES; i++)
		if (ip->a.flags & flag_names[i].inode)
			*flags |= flag_names[i].chattr;
	*projid = ip->a.projid;
	inode_unlock_put(fs, ip);
	return 0;
}

static int flags_to_inode(uint32_t chattr, uint32_t *out)
{
	*out = 0;
	for (size_t i = 0; i < FLAG_NAMES; i++) {
		if (chattr & flag_names[i].chattr)
			*out |= flag_names[i].inode;
		chattr &= ~flag_names[i].chattr;
	}
	/* What says nothing here may stand: chattr hands back what it read. */
	return chattr & ~(uint32_t)FS_EXTENT_FL ? -EOPNOTSUPP : 0;
}

static int setflags_locked(struct fs *fs, struct inode *ip,
			   const uint32_t *flags, const uint32_t *projid)
{
	const uint32_t known = INODE_IMMUTABLE | INODE_APPEND | INODE_NODUMP |
			       INODE_NOATIME | INODE_SYNC | INODE_DIRSYNC;
	uint32_t set = 0;
	struct txn *t;
	struct attr *a;
	int err = flags ? flags_to_inode(*flags, &set) : 0;

	if (!err && (set & INODE_DIRSYNC) && !S_ISDIR(ip->a.mode))
		err = -EOPNOTSUPP;
	if (!err && !flags && (ip->a.flags & INODE_IMMUTABLE))
		err = -EPERM;
	if (!err)
		err = txn_begin(fs->v, TXN_FREEING, &t);
	if (err)
		return err;
	a = inode_edit(t, ip);
	if (!a) {
		txn_abort(t);
		return -ENOMEM;
	}
	if (flags)
		a->flags = (a->flags & ~known) | set;
	if (projid)
		a->projid = *projid;
	a->ctime = time_now();
	return txn_commit(t);
}

int fs_setflags(struct fs *fs, uint64_t ino, const uint32_t *flags,
		const uint32_t *projid)
{
	struct inode *ip;
	uint64_t seq;
	uint32_t iflags;
	int err = fs->readonly ? -EROFS : inode_write_lock(fs, ino, &ip);

	if (err)
		return err;
	err = setflags_locked(fs, ip, flags, projid);
	if (!err && flags && !(*flags & FS_APPEND_FL))
		gaps_drop(&fs->gaps, ino);
	seq = ip->last_seq;
	iflags = ip->a.flags;
	inode_unlock_put(fs, ip);
	return err ? err : fs_settle(fs, seq, iflags, false);
}

int fs_append_begin(struct fs *fs, uint64_t ino)
{
	return gaps_watch(&fs->gaps, ino);
}

void fs_append_end(struct fs *fs, uint64_t ino)
{
	gaps_unwatch(&fs->gaps, ino);
}

/* ---- xattrs -------------------------------------------------------------------- */

static bool is_acl(const char *name)
{
	return !strcmp(name, ACL_ACCESS) || !strcmp(name, ACL_DEFAULT);
}

/* The namespaces there are; of system only the ACLs. */
static int xattr_name_check(const char *name)
{
	static const char *const spaces[] = {"user.", TRUSTED, "security."};
	size_t len = strlen(name);

	if (len > XATTR_NAME_MAX)
		return -ERANGE;
	if (is_acl(name))
		return 0;
	for (int i = 0; i < 3; i++)
		if (!strncmp(name, spaces[i], strlen(spaces[i])))
			return name[strlen(spaces[i])] ? 0 : -EINVAL;
	return -EOPNOTSUPP;
}

/* When an inode was made, for kernels and libraries that cannot say statx. */
static ssize_t btime_get(struct fs *fs, uint64_t ino, void *buf, size_t size)
{
	struct timespec ts;
	char text[48];
	int len, err = fs_btime(fs, ino, &ts);

	if (err)
		return err;
	len = snprintf(text, sizeof(text), "%lld.%09ld", (long long)ts.tv_sec,
		       ts.tv_nsec);
	if (size && size < (size_t)len)
		return -ERANGE;
	if (size)
		memcpy(buf, text, (size_t)len);
	return len;
}

ssize_t fs_getxattr(struct fs *fs, uint64_t ino, const char *name, void *buf,
		    size_t size)
{
	struct inode *ip;
	size_t len = size;
	int err;

	if (!strcmp(name, BTIME))
		return btime_get(fs, ino, buf, size);
	err = xattr_name_check(name);
	if (!err)
		err = inode_read_lock(fs, ino, &ip);
	if (err)
		return err;
	err = ip->a.xattrs ? xattr_get(fs->v, ip, name, buf, &len) : -ENODATA;
	inode_unlock_put(fs, ip);
	return err ? err : (ssize_t)len;
}

static ssize_t list_all(struct fs *fs, uint64_t ino, char *buf, size_t size)
{
	struct inode *ip;
	size_t len = size;
	int err = inode_read_lock(fs, ino, &ip);

	if (err)
		return err;
	if (ip->a.xattrs)
		err = xattr_list(fs->v, ip, buf, &len);
	else
		len = 0;
	inode_unlock_put(fs, ip);
	return err ? err : (ssize_t)len;
}

/* Keep the names that do not begin so; returns the bytes that are left. */
static size_t names_without(char *buf, size_t len, const char *start)
{
	size_t kept = 0, n;

	for (size_t at = 0; at < len; at += n) {
		n = strlen(buf + at) + 1;
		if (!strncmp(buf + at, start, strlen(start)))
			continue;
		memmove(buf + kept, buf + at, n);
		kept += n;
	}
	return kept;
}

ssize_t fs_listxattr(struct fs *fs, const struct fs_cred *c, uint64_t ino, char *buf,
		     size_t size)
{
	char *all;
	ssize_t n;

	if (!c || !c->uid)
		return list_all(fs, ino, buf, size);
	all = malloc(XATTR_LIST_MAX);
	n = all ? list_all(fs, ino, all, XATTR_LIST_MAX) : -ENOMEM;
	if (n > 0)
		n = (ssize_t)names_without(all, (size_t)n, TRUSTED);
	if (n > 0 && size && (size_t)n > size)
		n = -ERANGE;
	if (n > 0 && size)
		memcpy(buf, all, (size_t)n);
	free(all);
	return n;
}

/* The mode follows the access ACL; true: the ACL itself need not be kept. */
static int acl_set_mode(struct txn *t, struct inode *ip, const void *value,
			size_t size, int flags, bool *redundant)
{
	struct attr *a;
	mode_t mode;
	int more = acl_to_mode(value, size, &mode);

	if (more < 0)
		return more;
	a = inode_edit(t, ip);
	if (!a)
		return -ENOMEM;
	a->mode = (a->mode & ~0777u) | mode;
	if (flags & FS_XATTR_KILL_SGID)
		a->mode &= ~(uint32_t)S_ISGID;
	*redundant = !more;
	return 0;
}

static int xattr_has(struct fs *fs, struct inode *ip, const char *name)
{
	size_t len = 0;

	return ip->a.xattrs ? xattr_get(fs->v, ip, name, NULL, &len) : -ENODATA;
}

static int setxattr_in(struct txn *t, struct fs *fs, struct inode *ip,
		       const char *name, const void *value, size_t size,
		       int flags)
{
	bool redundant = false;
	struct attr *a;
	int err = 0;

	if (!strcmp(name, ACL_ACCESS))
		err = acl_set_mode(t, ip, value, size, flags, &redundant);
	else if (!strcmp(name, ACL_DEFAULT) && !S_ISDIR(ip->a.mode))
		err = -EACCES;
	if (err)
		return err;
	if (!redundant)
		err = xattr_set(t, ip, name, value, size,
				flags & (XATTR_CREATE | XATTR_REPLACE));
	else if (!xattr_has(fs, ip, name))
		err = xattr_remove(t, ip, name);
	if (err)
		return err;
	a = inode_edit(t, ip);
	if (!a)
		return -ENOMEM;
	a->ctime = time_now();
	return 0;
}

static int removexattr_in(struct txn *t, struct inode *ip, const char *name)
{
	int err = xattr_remove(t, ip, name);
	struct attr *a = err ? NULL : inode_edit(t, ip);

	if (a)
		a->ctime = time_now();
	return err;
}

/* Set (value) or remove (no value). */
static int xattr_change(struct fs *fs, uint64_t ino, const char *name,
			const void *value, size_t size, int flags)
{
	struct inode *ip;
	struct txn *t;
	uint64_t seq;
	uint32_t iflags;
	int err = inode_write_lock(fs, ino, &ip);

	if (err)
		return err;
	if (ip->a.flags & (INODE_IMMUTABLE | INODE_APPEND))
		err = -EPERM;
	else if (!value)
		err = xattr_has(fs, ip, name);
	if (!err)
		err = txn_begin(fs->v, value ? TXN_NORMAL : TXN_FREEING, &t);
	if (err)
		goto out;
	err = value ? setxattr_in(t, fs, ip, name, value, size, flags)
		    : removexattr_in(t, ip, name);
	if (err)
		txn_abort(t);
	else
		err = txn_commit(t);
out:
	seq = ip->last_seq;
	iflags = ip->a.flags;
	inode_unlock_put(fs, ip);
	return err ? err : fs_settle(fs, seq, iflags, false);
}

int fs_setxattr(struct fs *fs, const struct fs_cred *c, uint64_t ino,
		const char *name, const void *value, size_t size, int flags)
{
	unsigned tries = 0;
	int err = fs->readonly ? -EROFS : xattr_name_check(name);

	(void)c;
	if (err)
		return err;
	if (size > XATTR_VALUE_MAX)
		return -E2BIG;
	do
		err = xattr_change(fs, ino, name, value ? value : "", size, flags);
	while (err == -ENOSPC && fs_reclaim(fs, &tries));
	return err;
}

int fs_removexattr(struct fs *fs, const struct fs_cred *c, uint64_t ino,
		   const char *name)
{
	int err = fs->readonly ? -EROFS : xattr_name_check(name);

	(void)c;
	return err ? err : xattr_change(fs, ino, name, NULL, 0, 0);
}
