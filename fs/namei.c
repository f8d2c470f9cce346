/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Names: create, link, unlink, rename, readdir. Each change is one
 * transaction: entry, inode, times, link counts and the orphan's mark become
 * visible, and durable, together.
 *
 * Invariants
 *  1. All inodes a change reads or writes are locked exclusively, in order of
 *     number, from before their state is read until after the commit. Where a
 *     child's number is below its directory's, or two directories and two
 *     children are concerned, the names are looked up first, then everything
 *     is locked in order and the names are looked up again; if they now mean
 *     something else, it starts over.
 *  2. A lookup counts the child under the directory's lock, while the entry
 *     stands; attributes are read after that lock is dropped, since the
 *     child's number may be lower. The count keeps the inode.
 *  3. An inode whose last name goes becomes an orphan in the same transaction.
 *     It is freed by whoever finds it uncounted (counts.c), after the locks
 *     are dropped.
 *  4. Renames between directories hold rename_lock, so the tree's shape above
 *     any directory stands still while it is searched for a loop.
 *  5. A directory without links is dead: nothing is found or made in it.
 */
#include "fs/fs_priv.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/sysmacros.h>

#define DEPTH_MAX (1u << 20)	/* of directories, before it must be a loop */
#define RETRY 1			/* what was looked up changed meanwhile */
#define RETRIES_MAX 1000000u

/* ---- locking -------------------------------------------------------------------- */

static int alive(struct fs *fs, struct inode *ip)
{
	if (!ip->dead)
		return 0;
	inode_unlock_put(fs, ip);
	return -ESTALE;
}

int inode_read_lock(struct fs *fs, uint64_t ino, struct inode **out)
{
	int err = inode_get(fs->v, ino, out);

	if (err)
		return err;
	rwlock_read(&(*out)->lock);
	return alive(fs, *out);
}

int inode_write_lock(struct fs *fs, uint64_t ino, struct inode **out)
{
	int err = inode_get(fs->v, ino, out);

	if (err)
		return err;
	rwlock_write(&(*out)->lock);
	return alive(fs, *out);
}

void inode_unlock_put(struct fs *fs, struct inode *ip)
{
	rwlock_unlock(&ip->lock);
	inode_put(fs->v, ip);
}

/* Sorted by number, without NULLs and equals. Returns how many. */
static unsigned in_order(struct inode *const *ips, unsigned n,
			 struct inode *out[LOCK_SET_MAX])
{
	unsigned count = 0;

	for (unsigned i = 0; i < n; i++) {
		unsigned at = 0;

		if (!ips[i])
			continue;
		while (at < count && out[at]->ino < ips[i]->ino)
			at++;
		if (at < count && out[at] == ips[i])
			continue;
		memmove(out + at + 1, out + at, (count - at) * sizeof(*out));
		out[at] = ips[i];
		count++;
	}
	return count;
}

void inodes_lock(struct inode *const *ips, unsigned n)
{
	struct inode *sorted[LOCK_SET_MAX];
	unsigned count = in_order(ips, n, sorted);

	for (unsigned i = 0; i < count; i++)
		rwlock_write_nested(&sorted[i]->lock, i > 0);
}

void inodes_unlock(struct inode *const *ips, unsigned n)
{
	struct inode *sorted[LOCK_SET_MAX];
	unsigned count = in_order(ips, n, sorted);

	while (count-- > 0)
		rwlock_unlock(&sorted[count]->lock);
}

static void inodes_put(struct fs *fs, struct inode **ips, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		if (ips[i])
			inode_put(fs->v, ips[i]);
}

/* ---- the file system as a whole --------------------------------------------------- */

int fs_open(struct volume *v, const struct fs_options *opt, struct fs **out)
{
	struct fs *fs = calloc(1, sizeof(*fs));

	if (!fs)
		return -ENOMEM;
	fs->v = v;
	fs->opt = *opt;
	fs->shift = volume_block_shift(v);
	fs->readonly = volume_readonly(v);
	lock_init(&fs->rename_lock, RANK_FS_RENAME, "rename");
	counts_init(&fs->counts);
	gaps_init(&fs->gaps);
	*out = fs;
	return 0;
}

int fs_close(struct fs *fs)
{
	uint64_t ino;

	while (!fs->readonly && (ino = counts_take_orphan(&fs->counts)))
		fs_evict(fs, ino);
	counts_fini(&fs->counts);
	gaps_fini(&fs->gaps);
	lock_fini(&fs->rename_lock);
	free(fs);
	return 0;
}

struct volume *fs_volume(struct fs *fs) { return fs->v; }

int fs_settle(struct fs *fs, uint64_t seq, uint32_t flags, bool dir)
{
	if (!fs->opt.sync && !(dir && fs->opt.dirsync) &&
	    !(flags & (dir ? INODE_DIRSYNC | INODE_SYNC : INODE_SYNC)))
		return 0;
	return fs_sync_to(fs, seq);
}

/*
 * Durable up to `seq`. An inode that was read from disk since does not say
 * which transaction changed it last (0): then it may have been any.
 */
int fs_sync_to(struct fs *fs, uint64_t seq)
{
	return seq ? volume_sync_to(fs->v, seq) : volume_sync(fs->v);
}

/*
 * Without space: an inode may be on its way out in another thread, and what
 * was freed counts only after a checkpoint.
 */
bool fs_reclaim(struct fs *fs, unsigned *tries)
{
	const struct timespec ms = {0, 1000000};

	if ((*tries)++ >= 2)
		return false;
	nanosleep(&ms, NULL);
	while (__atomic_load_n(&fs->evicting, __ATOMIC_ACQUIRE))
		nanosleep(&ms, NULL);
	return !volume_checkpoint(fs->v);
}

/* ---- lookup counts ----------------------------------------------------------------- */

/*
 * What cannot be freed now stays an orphan on disk: the volume tries again, or
 * the next mount does, and its number stays stale.
 */
void fs_evict(struct fs *fs, uint64_t ino)
{
	__atomic_add_fetch(&fs->evicting, 1, __ATOMIC_ACQ_REL);
	if (inode_evict(fs->v, ino) == 0)
		counts_evicted(&fs->counts, ino);
	__atomic_sub_fetch(&fs->evicting, 1, __ATOMIC_ACQ_REL);
}

void fs_forget(struct fs *fs, uint64_t ino, uint64_t n)
{
	if (fs->readonly)
		return;
	if (counts_sub(&fs->counts, ino, n))
		fs_evict(fs, ino);
	if (gaps_any(&fs->gaps) && !counts_known(&fs->counts, ino))
		gaps_drop(&fs->gaps, ino);
}

void fs_remember(struct fs *fs, uint64_t ino)
{
	if (!fs->readonly)
		counts_add(&fs->counts, ino);
}

static int count(struct fs *fs, uint64_t ino)
{
	return fs->readonly ? 0 : counts_add(&fs->counts, ino);
}

/* Attributes of an inode that has just been counted. */
static int entry_fill(struct fs *fs, uint64_t ino, struct fs_entry *e)
{
	int err = fs_getattr(fs, ino, &e->st);

	e->ino = ino;
	if (err)
		fs_forget(fs, ino, 1);
	return err;
}

/* ---- lookup ------------------------------------------------------------------------- */

static int name_check(const char *name, size_t *len)
{
	*len = strlen(name);
	if (!*len)
		return -ENOENT;
	return *len > NAME_BYTES_MAX ? -ENAMETOOLONG : 0;
}

static bool is_dots(const char *name)
{
	return name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2]));
}

static int dir_check(const struct inode *dp)
{
	if (!S_ISDIR(dp->a.mode))
		return -ENOTDIR;
	return dp->a.nlink ? 0 : -ENOENT;
}

/* An entry's inode. One that is not there is damage. */
static int child_get(struct fs *fs, struct inode *dp, uint64_t ino,
		     struct inode **out)
{
	int err = inode_get(fs->v, ino, out);

	if (err != -ESTALE)
		return err;
	volume_message(fs->v, "directory %llu has an entry for inode %llu, "
		       "which does not exist", (unsigned long long)dp->ino,
		       (unsigned long long)ino);
	return -EUCLEAN;
}

/* What `name` in a directory means, and count that. */
static int lookup_count(struct fs *fs, uint64_t dir, const char *name,
			size_t len, uint64_t *ino)
{
	struct dirent_info info;
	struct inode *dp;
	int err = inode_read_lock(fs, dir, &dp);

	if (err)
		return err;
	err = dir_check(dp);
	if (!err && !strcmp(name, "..")) {
		*ino = dp->a.parent;
	} else if (!err) {
		err = dir_lookup(fs->v, dp, name, len, &info);
		*ino = info.ino;
	}
	if (!err)
		err = count(fs, *ino);
	inode_unlock_put(fs, dp);
	return err;
}

int fs_lookup(struct fs *fs, uint64_t dir, const char *name, struct fs_entry *e)
{
	uint64_t ino = dir;
	size_t len;
	int err = name_check(name, &len);

	if (err)
		return err;
	/* "." asks for the inode itself, directory or not (NFS handles). */
	if (!strcmp(name, "."))
		err = count(fs, ino);
	else
		err = lookup_count(fs, dir, name, len, &ino);
	if (!err)
		err = entry_fill(fs, ino, e);
	/* A handle of what has no name any more, or is on its way out. */
	if (!err && !e->st.st_nlink && !strcmp(name, ".")) {
		fs_forget(fs, ino, 1);
		err = -ESTALE;
	}
	return err;
}

int fs_readlink(struct fs *fs, uint64_t ino, char *buf, size_t size)
{
	struct inode *ip;
	bool touch;
	size_t len;
	int err = inode_get(fs->v, ino, &ip);

	if (err)
		return err;
	rwlock_read(&ip->lock);
	if (ip->dead)
		err = -ESTALE;
	else if (!S_ISLNK(ip->a.mode))
		err = -EINVAL;
	else
		err = symlink_get(fs->v, ip, buf, size - 1, &len);
	if (!err)
		buf[len] = 0;
	touch = !err && atime_due(fs, ip);
	rwlock_unlock(&ip->lock);
	if (touch)
		atime_touch(fs, ip);
	inode_put(fs->v, ip);
	return err;
}

/* ---- create -------------------------------------------------------------------------- */

/* What is to be made. */
struct making {
	const struct fs_cred *cred;
	mode_t mode;
	uint32_t rdev;
	const char *target;		/* of a symlink */
	struct acl_inherit acl;
};

static uint32_t rdev_encode(dev_t dev)
{
	unsigned ma = major(dev), mi = minor(dev);

	return (mi & 0xff) | (ma & 0xfff) << 8 | (mi & 0xfff00) << 12;
}

static uint8_t mode_type(mode_t mode) { return (uint8_t)(mode >> 12 & 15); }

static void attr_new(const struct inode *dp, const struct making *m,
		     struct attr *a)
{
	const uint32_t inherited = INODE_SYNC | INODE_NODUMP | INODE_NOATIME;
	struct time_ns now = time_now();

	*a = (struct attr){
		.mode = m->mode,
		.nlink = S_ISDIR(m->mode) ? 2 : 1,
		.uid = m->cred->uid,
		.gid = m->cred->gid,
		.rdev = m->rdev,
		.atime = now, .mtime = now, .ctime = now, .btime = now,
	};
	if (dp->a.mode & S_ISGID) {
		a->gid = dp->a.gid;
		if (S_ISDIR(m->mode))
			a->mode |= S_ISGID;
	}
	if (S_ISDIR(m->mode)) {
		a->parent = dp->ino;
		a->next_index = FIRST_INDEX;
		a->flags = dp->a.flags & (inherited | INODE_DIRSYNC);
	} else if (S_ISREG(m->mode)) {
		a->flags = dp->a.flags & inherited;
	}
}

/* A new inode in t, locked, with all but its name. */
static int make_inode(struct fs *fs, struct txn *t, struct inode *dp,
		      const struct making *m, struct inode **out)
{
	struct attr a;
	int err;

	attr_new(dp, m, &a);
	err = inode_create(t, &a, out);
	if (err)
		return err;
	if (m->acl.len)
		err = acl_inherit_set(t, *out, &m->acl);
	if (!err && m->target)
		err = symlink_set(t, *out, m->target, strlen(m->target));
	if (!err)
		return 0;
	inode_unlock_put(fs, *out);
	*out = NULL;
	return err;
}

static int make_name(struct txn *t, struct inode *dp, const char *name,
		     size_t len, const struct inode *ip, mode_t mode)
{
	struct attr *d;
	int err = dir_add(t, dp, name, len, ip->ino, mode_type(mode));

	if (err)
		return err;
	d = inode_edit(t, dp);
	if (!d)
		return -ENOMEM;
	d->mtime = d->ctime = time_now();
	if (S_ISDIR(mode))
		d->nlink++;
	return 0;
}

static int create_allowed(struct fs *fs, struct inode *dp, const char *name,
			  size_t len, mode_t mode)
{
	struct dirent_info info;
	int err = dir_check(dp);

	if (err)
		return err;
	err = dir_lookup(fs->v, dp, name, len, &info);
	if (err != -ENOENT)
		return err ? err : -EEXIST;
	if (dp->a.flags & INODE_IMMUTABLE)
		return -EPERM;
	return S_ISDIR(mode) && dp->a.nlink >= LINKS_MAX ? -EMLINK : 0;
}

/* Within the directory's lock; on success *out is locked and counted. */
static int create_locked(struct fs *fs, struct inode *dp, const char *name,
			 size_t len, struct making *m, struct inode **out)
{
	struct inode *ip = NULL;
	struct txn *t;
	int err = create_allowed(fs, dp, name, len, m->mode);

	if (err)
		return err;
	err = txn_begin(fs->v, TXN_NORMAL, &t);
	if (err)
		return err;
	err = make_inode(fs, t, dp, m, &ip);
	if (!err)
		err = make_name(t, dp, name, len, ip, m->mode);
	if (!err)
		err = count(fs, ip->ino);
	if (err) {
		txn_abort(t);
	} else {
		err = txn_commit(t);
		if (err)
			counts_sub(&fs->counts, ip->ino, 1);
	}
	if (err && ip)
		inode_unlock_put(fs, ip);
	*out = ip;
	return err;
}

static int create_once(struct fs *fs, uint64_t dir, const char *name, size_t len,
		       struct making *m, struct fs_entry *e)
{
	struct inode *dp, *ip;
	mode_t asked = m->mode;
	uint64_t seq;
	uint32_t flags;
	int err = inode_write_lock(fs, dir, &dp);

	if (err)
		return err;
	err = acl_inherit(fs, dp, m->cred->umask, &m->mode, &m->acl);
	if (!err)
		err = create_locked(fs, dp, name, len, m, &ip);
	if (!err) {
		/* cppcheck-suppress uninitStructMember	; create_locked() */
		e->ino = ip->ino;
		attr_to_stat(fs, ip->ino, &ip->a, &e->st);
		inode_unlock_put(fs, ip);
	}
	seq = dp->last_seq;
	flags = dp->a.flags;
	inode_unlock_put(fs, dp);
	acl_inherit_fini(&m->acl);
	m->mode = asked;
	return err ? err : fs_settle(fs, seq, flags, true);
}

static int create(struct fs *fs, uint64_t dir, const char *name,
		  struct making *m, struct fs_entry *e)
{
	unsigned tries = 0;
	size_t len;
	int err = fs->readonly ? -EROFS : name_check(name, &len);

	if (!err && is_dots(name))
		err = -EEXIST;
	if (err)
		return err;
	do
		err = create_once(fs, dir, name, len, m, e);
	while (err == -ENOSPC && fs_reclaim(fs, &tries));
	return err;
}

int fs_mknod(struct fs *fs, const struct fs_cred *c, uint64_t dir,
	     const char *name, mode_t mode, dev_t rdev, struct fs_entry *e)
{
	struct making m = {.cred = c, .mode = mode};

	if (!(mode & S_IFMT))
		m.mode |= S_IFREG;
	if (S_ISDIR(m.mode) || S_ISLNK(m.mode))
		return -EINVAL;
	if (S_ISCHR(mode) || S_ISBLK(mode))
		m.rdev = rdev_encode(rdev);
	return create(fs, dir, name, &m, e);
}

int fs_mkdir(struct fs *fs, const struct fs_cred *c, uint64_t dir,
	     const char *name, mode_t mode, struct fs_entry *e)
{
	struct making m = {.cred = c, .mode = S_IFDIR | (mode & 07777)};

	return create(fs, dir, name, &m, e);
}

int fs_symlink(struct fs *fs, const struct fs_cred *c, uint64_t dir,
	       const char *name, const char *target, struct fs_entry *e)
{
	struct making m = {.cred = c, .mode = S_IFLNK | 0777, .target = target};

	if (!*target)
		return -ENOENT;
	if (strlen(target) > 4095)
		return -ENAMETOOLONG;
	return create(fs, dir, name, &m, e);
}

/* ---- files without a name, and names for files that are there ---------------------------- */

static int tmpfile_locked(struct fs *fs, struct inode *dp, struct making *m,
			  struct fs_entry *e)
{
	struct inode *ip = NULL;
	struct attr *a;
	struct txn *t;
	int err = txn_begin(fs->v, TXN_NORMAL, &t);

	if (err)
		return err;
	err = make_inode(fs, t, dp, m, &ip);
	if (!err) {
		a = inode_edit(t, ip);
		if (a)
			a->nlink = 0;
		err = a ? orphan_add(t, ip) : -ENOMEM;
	}
	if (!err)
		err = count(fs, ip->ino);
	if (err) {
		txn_abort(t);
	} else {
		err = txn_commit(t);
		if (err)
			counts_sub(&fs->counts, ip->ino, 1);
		else
			counts_orphan(&fs->counts, ip->ino);
	}
	if (!err) {
		e->ino = ip->ino;
		attr_to_stat(fs, ip->ino, &ip->a, &e->st);
	}
	if (ip)
		inode_unlock_put(fs, ip);
	return err;
}

static int tmpfile_once(struct fs *fs, uint64_t dir, struct making *m,
			struct fs_entry *e)
{
	mode_t asked = m->mode;
	struct inode *dp;
	int err = inode_write_lock(fs, dir, &dp);

	if (err)
		return err;
	err = dir_check(dp);
	if (!err)
		err = acl_inherit(fs, dp, m->cred->umask, &m->mode, &m->acl);
	if (!err)
		err = tmpfile_locked(fs, dp, m, e);
	acl_inherit_fini(&m->acl);
	inode_unlock_put(fs, dp);
	m->mode = asked;
	return err;
}

int fs_tmpfile(struct fs *fs, const struct fs_cred *c, uint64_t dir,
	       mode_t mode, struct fs_entry *e)
{
	struct making m = {.cred = c, .mode = S_IFREG | (mode & 07777)};
	unsigned tries = 0;
	int err;

	if (fs->readonly)
		return -EROFS;
	do
		err = tmpfile_once(fs, dir, &m, e);
	while (err == -ENOSPC && fs_reclaim(fs, &tries));
	return err;
}

static int link_in(struct txn *t, struct inode *dp, const char *name,
		   size_t len, struct inode *ip)
{
	struct attr *a = inode_edit(t, ip);
	int err = a ? 0 : -ENOMEM;

	if (!err && !a->nlink)
		err = orphan_remove(t, ip);
	if (err)
		return err;
	a = inode_edit(t, ip);
	a->nlink++;
	a->ctime = time_now();
	return make_name(t, dp, name, len, ip, ip->a.mode);
}

static int link_locked(struct fs *fs, struct inode *ip, struct inode *dp,
		       const char *name, size_t len)
{
	struct txn *t;
	int err;

	if (ip->dead || dp->dead)
		return -ESTALE;
	if (S_ISDIR(ip->a.mode))
		return -EPERM;
	err = create_allowed(fs, dp, name, len, ip->a.mode);
	if (err)
		return err;
	if (ip->a.flags & (INODE_IMMUTABLE | INODE_APPEND))
		return -EPERM;
	if (ip->a.nlink >= LINKS_MAX)
		return -EMLINK;
	err = txn_begin(fs->v, TXN_NORMAL, &t);
	if (err)
		return err;
	err = link_in(t, dp, name, len, ip);
	if (err) {
		txn_abort(t);
		return err;
	}
	err = txn_commit(t);
	if (!err)
		counts_adopt(&fs->counts, ip->ino);
	return err;
}

static int link_once(struct fs *fs, uint64_t ino, uint64_t dir,
		     const char *name, size_t len, struct fs_entry *e)
{
	struct inode *ips[2] = {NULL, NULL};
	uint64_t seq = 0;
	uint32_t flags = 0;
	int err = inode_get(fs->v, ino, &ips[0]);

	if (!err)
		err = inode_get(fs->v, dir, &ips[1]);
	if (!err) {
		inodes_lock(ips, 2);
		err = link_locked(fs, ips[0], ips[1], name, len);
		attr_to_stat(fs, ino, &ips[0]->a, &e->st);
		e->ino = ino;
		seq = ips[1]->last_seq;
		flags = ips[1]->a.flags;
		inodes_unlock(ips, 2);
	}
	inodes_put(fs, ips, 2);
	return err ? err : fs_settle(fs, seq, flags, true);
}

int fs_link(struct fs *fs, uint64_t ino, uint64_t dir, const char *name,
	    struct fs_entry *e)
{
	unsigned tries = 0;
	size_t len;
	int err = fs->readonly ? -EROFS : name_check(name, &len);

	if (!err && is_dots(name))
		err = -EEXIST;
	if (!err)
		err = count(fs, ino);	/* first: it must not be freed */
	if (err)
		return err;
	do
		err = link_once(fs, ino, dir, name, len, e);
	while (err == -ENOSPC && fs_reclaim(fs, &tries));
	if (err)
		fs_forget(fs, ino, 1);
	return err;
}

/* ---- unlink and rmdir --------------------------------------------------------------------- */

/*
 * A directory, the inode that a name in it stands for, both locked. When the
 * child's number is the lower one, it has to be locked first, and the name
 * looked up again.
 */
struct named {
	struct inode *ip[2];		/* directory, child */
	struct dirent_info info;
};

static int named_try(struct fs *fs, struct named *n, const char *name,
		     size_t len)
{
	struct dirent_info again;
	int err;

	rwlock_write(&n->ip[0]->lock);
	err = n->ip[0]->dead ? -ESTALE : dir_check(n->ip[0]);
	if (!err)
		err = dir_lookup(fs->v, n->ip[0], name, len, &n->info);
	if (!err)
		err = child_get(fs, n->ip[0], n->info.ino, &n->ip[1]);
	if (!err && n->ip[1]->ino > n->ip[0]->ino) {
		rwlock_write_nested(&n->ip[1]->lock, true);
		return 0;
	}
	rwlock_unlock(&n->ip[0]->lock);
	if (err)
		return err;
	inodes_lock(n->ip, 2);
	err = n->ip[0]->dead ? -ESTALE : dir_check(n->ip[0]);
	if (!err)
		err = dir_lookup(fs->v, n->ip[0], name, len, &again);
	if (!err && again.ino == n->info.ino && again.index == n->info.index)
		return 0;
	inodes_unlock(n->ip, 2);
	return err ? err : RETRY;
}

static int named_lock(struct fs *fs, uint64_t dir, const char *name, size_t len,
		      struct named *n)
{
	int err;

	*n = (struct named){0};
	err = inode_get(fs->v, dir, &n->ip[0]);
	while (!err && (err = named_try(fs, n, name, len)) == RETRY) {
		inode_put(fs->v, n->ip[1]);
		n->ip[1] = NULL;
		err = 0;
	}
	if (err)
		inodes_put(fs, n->ip, 2);
	return err;
}

static void named_unlock(struct fs *fs, struct named *n)
{
	inodes_unlock(n->ip, 2);
	inodes_put(fs, n->ip, 2);
}

/* One name less for `ip`; a directory has only the one. */
static int drop_link(struct txn *t, struct inode *ip)
{
	struct attr *a = inode_edit(t, ip);

	if (!a)
		return -ENOMEM;
	a->ctime = time_now();
	a->nlink = S_ISDIR(a->mode) || !a->nlink ? 0 : a->nlink - 1;
	return a->nlink ? 0 : orphan_add(t, ip);
}

static int remove_in(struct txn *t, struct named *n, const char *name,
		     size_t len)
{
	struct attr *d;
	int err = dir_remove(t, n->ip[0], name, len, &n->info);

	if (!err)
		err = drop_link(t, n->ip[1]);
	if (err)
		return err;
	d = inode_edit(t, n->ip[0]);
	if (!d)
		return -ENOMEM;
	d->mtime = d->ctime = time_now();
	if (S_ISDIR(n->ip[1]->a.mode))
		d->nlink--;
	return 0;
}

static int remove_allowed(const struct named *n, bool dir)
{
	const struct attr *d = &n->ip[0]->a, *c = &n->ip[1]->a;

	if (dir != !!S_ISDIR(c->mode))
		return dir ? -ENOTDIR : -EISDIR;
	if ((d->flags | c->flags) & (INODE_IMMUTABLE | INODE_APPEND))
		return -EPERM;
	return dir && c->size ? -ENOTEMPTY : 0;
}

static int remove_locked(struct fs *fs, struct named *n, const char *name,
			 size_t len, bool dir)
{
	struct txn *t;
	int err = remove_allowed(n, dir);

	if (!err)
		err = txn_begin(fs->v, TXN_FREEING, &t);
	if (err)
		return err;
	err = remove_in(t, n, name, len);
	if (!err)
		return txn_commit(t);
	txn_abort(t);
	return err;
}

static int remove_name(struct fs *fs, uint64_t dir, const char *name, bool isdir)
{
	bool evict = false;
	struct named n;
	uint64_t seq, ino;
	uint32_t flags;
	size_t len;
	int err = fs->readonly ? -EROFS : name_check(name, &len);

	if (!err)
		err = named_lock(fs, dir, name, len, &n);
	if (err)
		return err;
	err = remove_locked(fs, &n, name, len, isdir);
	ino = n.ip[1]->ino;
	if (!err && !n.ip[1]->a.nlink)
		evict = counts_orphan(&fs->counts, ino);
	seq = n.ip[0]->last_seq;
	flags = n.ip[0]->a.flags;
	named_unlock(fs, &n);
	if (evict)
		fs_evict(fs, ino);
	return err ? err : fs_settle(fs, seq, flags, true);
}

int fs_unlink(struct fs *fs, uint64_t dir, const char *name)
{
	return is_dots(name) ? -EISDIR : remove_name(fs, dir, name, false);
}

int fs_rmdir(struct fs *fs, uint64_t dir, const char *name)
{
	if (is_dots(name))
		return name[1] ? -ENOTEMPTY : -EINVAL;
	return remove_name(fs, dir, name, true);
}

/* ---- rename ------------------------------------------------------------------------------- */

enum { OLD_DIR, NEW_DIR, SOURCE, TARGET };

struct renaming {
	const struct fs_cred *cred;
	uint64_t dir, new_dir;
	const char *name, *new_name;
	size_t len, new_len;
	unsigned flags;
	struct inode *ip[LOCK_SET_MAX];	/* as the enum; no target: NULL */
	struct dirent_info source, target;
	bool evict;			/* the target is to be freed */
	uint64_t seq;
	uint32_t dir_flags;
};

/* What a name means at this moment. */
static int peek(struct fs *fs, struct inode *dp, const char *name, size_t len,
		struct dirent_info *info)
{
	int err;

	rwlock_read(&dp->lock);
	err = dp->dead ? -ESTALE : dir_check(dp);
	if (!err)
		err = dir_lookup(fs->v, dp, name, len, info);
	rwlock_unlock(&dp->lock);
	return err;
}

static int parent_of(struct fs *fs, uint64_t ino, uint64_t *parent)
{
	struct inode *ip;
	int err = inode_read_lock(fs, ino, &ip);

	if (err)
		return err;
	*parent = ip->a.parent;
	inode_unlock_put(fs, ip);
	return 0;
}

/* -EINVAL when `dir` is `above` or lies below it. rename_lock is held. */
static int not_below(struct fs *fs, uint64_t dir, uint64_t above)
{
	for (unsigned depth = 0; depth < DEPTH_MAX; depth++) {
		int err;

		if (dir == above)
			return -EINVAL;
		if (dir == ROOT_INO)
			return 0;
		err = parent_of(fs, dir, &dir);
		if (err)
			return err;
	}
	volume_message(fs->v, "the parents of directory %llu form a loop",
		       (unsigned long long)dir);
	return -EUCLEAN;
}

static int rename_loops(struct fs *fs, const struct renaming *r)
{
	int err = 0;

	if (r->dir == r->new_dir)
		return 0;
	if (r->source.type == DT_DIR)
		err = not_below(fs, r->new_dir, r->source.ino);
	if (!err && (r->flags & RENAME_EXCHANGE) && r->target.type == DT_DIR)
		err = not_below(fs, r->dir, r->target.ino);
	return err;
}

/*
 * The inode that a name meant a moment ago, or RETRY: it was removed since. A
 * name that goes on meaning an inode that is not there is damage.
 */
static int get_named(struct fs *fs, struct inode *dp, const char *name, size_t len,
		     const struct dirent_info *info, struct inode **out)
{
	struct dirent_info now;
	int err = inode_get(fs->v, info->ino, out);

	if (err != -ESTALE)
		return err;
	rwlock_read(&dp->lock);
	err = RETRY;
	if (!dp->dead && !dir_lookup(fs->v, dp, name, len, &now) &&
	    now.ino == info->ino)
		err = child_get(fs, dp, info->ino, out);
	rwlock_unlock(&dp->lock);
	return err;
}

/* Find and get, without locks, the four inodes. */
static int rename_find(struct fs *fs, struct renaming *r)
{
	int err = inode_get(fs->v, r->dir, &r->ip[OLD_DIR]);

	if (!err)
		err = inode_get(fs->v, r->new_dir, &r->ip[NEW_DIR]);
	if (!err)
		err = peek(fs, r->ip[OLD_DIR], r->name, r->len, &r->source);
	if (err)
		return err;
	err = peek(fs, r->ip[NEW_DIR], r->new_name, r->new_len, &r->target);
	if (err == -ENOENT && !(r->flags & RENAME_EXCHANGE))
		r->target.ino = 0;
	else if (err)
		return err;
	else if (r->flags & RENAME_NOREPLACE)
		return -EEXIST;
	err = rename_loops(fs, r);
	if (err)
		return err;
	err = get_named(fs, r->ip[OLD_DIR], r->name, r->len, &r->source,
			&r->ip[SOURCE]);
	if (!err && r->target.ino)
		err = get_named(fs, r->ip[NEW_DIR], r->new_name, r->new_len,
				&r->target, &r->ip[TARGET]);
	return err;
}

/* All are locked: do the names still mean what they did? */
static int rename_verify(struct fs *fs, struct renaming *r)
{
	struct dirent_info s, t = {0};
	int err;

	for (int i = 0; i < LOCK_SET_MAX; i++)
		if (r->ip[i] && r->ip[i]->dead)
			return RETRY;
	err = dir_check(r->ip[OLD_DIR]);
	if (!err)
		err = dir_check(r->ip[NEW_DIR]);
	if (!err)
		err = dir_lookup(fs->v, r->ip[OLD_DIR], r->name, r->len, &s);
	if (err)
		return err;
	err = dir_lookup(fs->v, r->ip[NEW_DIR], r->new_name, r->new_len, &t);
	if (err && err != -ENOENT)
		return err;
	if (s.ino != r->source.ino || (err ? 0 : t.ino) != r->target.ino)
		return RETRY;
	r->source = s;
	r->target = t;
	return 0;
}

static int rename_allowed(const struct renaming *r)
{
	const uint32_t fixed = INODE_IMMUTABLE | INODE_APPEND;
	const struct attr *s = &r->ip[SOURCE]->a;
	const struct attr *t = r->ip[TARGET] ? &r->ip[TARGET]->a : NULL;
	const struct attr *nd = &r->ip[NEW_DIR]->a;

	if ((r->ip[OLD_DIR]->a.flags & fixed) || (s->flags & fixed) ||
	    (nd->flags & (t ? fixed : INODE_IMMUTABLE)) ||
	    (t && (t->flags & fixed)))
		return -EPERM;
	if (r->dir != r->new_dir && S_ISDIR(s->mode) &&
	    !(t && S_ISDIR(t->mode)) && nd->nlink >= LINKS_MAX)
		return -EMLINK;
	if (!t || (r->flags & RENAME_EXCHANGE))
		return 0;
	if (S_ISDIR(s->mode) != S_ISDIR(t->mode))
		return S_ISDIR(s->mode) ? -ENOTDIR : -EISDIR;
	return S_ISDIR(t->mode) && t->size ? -ENOTEMPTY : 0;
}

/* The inode moves to another directory, or stays with another name. */
static int rename_moved(struct txn *t, struct inode *ip, uint64_t parent)
{
	struct attr *a = inode_edit(t, ip);

	if (!a)
		return -ENOMEM;
	a->ctime = time_now();
	if (S_ISDIR(a->mode))
		a->parent = parent;
	return 0;
}

static int rename_exchange(struct txn *t, struct renaming *r)
{
	int err = dir_replace(t, r->ip[OLD_DIR], r->name, r->len, &r->source,
			      r->target.ino, r->target.type);

	if (!err)
		err = dir_replace(t, r->ip[NEW_DIR], r->new_name, r->new_len,
				  &r->target, r->source.ino, r->source.type);
	if (!err)
		err = rename_moved(t, r->ip[TARGET], r->dir);
	return err;
}

/* What stays at the old place. *white is locked. */
static int rename_leave(struct fs *fs, struct txn *t, struct renaming *r,
			struct inode **white)
{
	struct making m = {.cred = r->cred, .mode = S_IFCHR};
	int err;

	if (!(r->flags & RENAME_WHITEOUT))
		return dir_remove(t, r->ip[OLD_DIR], r->name, r->len, &r->source);
	err = make_inode(fs, t, r->ip[OLD_DIR], &m, white);
	if (err)
		return err;
	return dir_replace(t, r->ip[OLD_DIR], r->name, r->len, &r->source,
			   (*white)->ino, DT_CHR);
}

static int rename_replace(struct fs *fs, struct txn *t, struct renaming *r,
			  struct inode **white)
{
	int err;

	if (r->dir == r->new_dir && !r->ip[TARGET] &&
	    !(r->flags & RENAME_WHITEOUT))
		return dir_rename(t, r->ip[OLD_DIR], r->name, r->len, &r->source,
				  r->new_name, r->new_len);
	err = rename_leave(fs, t, r, white);
	if (err)
		return err;
	if (!r->ip[TARGET])
		return dir_add(t, r->ip[NEW_DIR], r->new_name, r->new_len,
			       r->source.ino, r->source.type);
	err = dir_replace(t, r->ip[NEW_DIR], r->new_name, r->new_len,
			  &r->target, r->source.ino, r->source.type);
	return err ? err : drop_link(t, r->ip[TARGET]);
}

/* Times and link counts of the two directories. */
static int rename_dirs(struct txn *t, struct renaming *r)
{
	bool s = S_ISDIR(r->ip[SOURCE]->a.mode);
	bool d = r->ip[TARGET] && S_ISDIR(r->ip[TARGET]->a.mode);
	struct attr *old = inode_edit(t, r->ip[OLD_DIR]), *new;

	if (!old)
		return -ENOMEM;
	old->mtime = old->ctime = time_now();
	old->nlink -= s;
	if (d && (r->flags & RENAME_EXCHANGE))
		old->nlink++;
	new = inode_edit(t, r->ip[NEW_DIR]);
	if (!new)
		return -ENOMEM;
	new->mtime = new->ctime = time_now();
	new->nlink = new->nlink + s - d;
	return 0;
}

static int rename_in(struct fs *fs, struct txn *t, struct renaming *r,
		     struct inode **white)
{
	int err = r->flags & RENAME_EXCHANGE ? rename_exchange(t, r)
					     : rename_replace(fs, t, r, white);

	if (!err)
		err = rename_moved(t, r->ip[SOURCE], r->new_dir);
	return err ? err : rename_dirs(t, r);
}

static int rename_locked(struct fs *fs, struct renaming *r)
{
	struct inode *white = NULL;
	struct txn *t;
	int err = rename_verify(fs, r);

	/* Two names of one file: nothing happens, as POSIX has it. */
	if (err || r->source.ino == r->target.ino)
		return err;
	err = rename_allowed(r);
	if (!err)
		err = txn_begin(fs->v, r->ip[TARGET] ? TXN_FREEING : TXN_NORMAL,
				&t);
	if (err)
		return err;
	err = rename_in(fs, t, r, &white);
	if (err)
		txn_abort(t);
	else
		err = txn_commit(t);
	if (white)
		inode_unlock_put(fs, white);
	if (!err && r->ip[TARGET] && !r->ip[TARGET]->a.nlink)
		r->evict = counts_orphan(&fs->counts, r->target.ino);
	r->seq = r->ip[SOURCE]->last_seq;
	r->dir_flags = r->ip[OLD_DIR]->a.flags | r->ip[NEW_DIR]->a.flags;
	return err;
}

static int rename_once(struct fs *fs, struct renaming *r)
{
	int err;

	memset(r->ip, 0, sizeof(r->ip));
	r->evict = false;
	err = rename_find(fs, r);
	if (!err) {
		inodes_lock(r->ip, LOCK_SET_MAX);
		err = rename_locked(fs, r);
		inodes_unlock(r->ip, LOCK_SET_MAX);
	}
	inodes_put(fs, r->ip, LOCK_SET_MAX);
	if (r->evict)
		fs_evict(fs, r->target.ino);
	return err;
}

static int rename_serial(struct fs *fs, struct renaming *r)
{
	bool across = r->dir != r->new_dir;
	unsigned again = 0;
	int err;

	if (across)
		lock_lock(&fs->rename_lock);
	while ((err = rename_once(fs, r)) == RETRY && again++ < RETRIES_MAX)
		sched_yield();
	if (err == RETRY)
		err = -EUCLEAN;
	if (across)
		lock_unlock(&fs->rename_lock);
	return err;
}

static int rename_check(struct fs *fs, struct renaming *r)
{
	const unsigned known = RENAME_NOREPLACE | RENAME_EXCHANGE |
			       RENAME_WHITEOUT;
	int err = fs->readonly ? -EROFS : name_check(r->name, &r->len);

	if (!err)
		err = name_check(r->new_name, &r->new_len);
	if (err)
		return err;
	if ((r->flags & ~known) || ((r->flags & RENAME_EXCHANGE) &&
				    (r->flags & ~RENAME_EXCHANGE)))
		return -EINVAL;
	return is_dots(r->name) || is_dots(r->new_name) ? -EBUSY : 0;
}

int fs_rename(struct fs *fs, const struct fs_cred *c, uint64_t dir,
	      const char *name, uint64_t new_dir, const char *new_name,
	      unsigned flags)
{
	struct renaming r = {
		.cred = c, .flags = flags, .dir = dir, .new_dir = new_dir,
		.name = name, .new_name = new_name,
	};
	unsigned tries = 0;
	int err = rename_check(fs, &r);

	if (err)
		return err;
	do
		err = rename_serial(fs, &r);
	while (err == -ENOSPC && fs_reclaim(fs, &tries));
	return err ? err : fs_settle(fs, r.seq, r.dir_flags, true);
}

/* ---- readdir ------------------------------------------------------------------------------ */

/*
 * Cookies: 0 the start, 1 after ".", 2 after "..", then each entry's index,
 * which begin behind those. Entries are copied out under the directory's lock, and
 * counted there if need be, some at a time; attributes are read without it.
 */
#define BATCH 32
#define COOKIE_DOTS (FIRST_INDEX - 1)

typedef int dir_fn(void *ctx, const char *name, const struct fs_entry *e,
		   uint64_t next);

struct batch {
	struct fs *fs;
	bool plus;
	int err;
	unsigned n;
	struct dirent_info info[BATCH];
	char name[BATCH][NAME_BYTES_MAX + 1];
};

static int batch_add(void *ctx, const struct dirent_info *e, const char *name,
		     size_t len)
{
	struct batch *b = ctx;

	if (b->n == BATCH)
		return 1;
	if (b->plus) {
		b->err = count(b->fs, e->ino);
		if (b->err)
			return 1;
	}
	b->info[b->n] = *e;
	memcpy(b->name[b->n], name, len);
	b->name[b->n++][len] = 0;
	return 0;
}

static int batch_load(struct batch *b, uint64_t dir, uint64_t cookie)
{
	struct inode *dp;
	int err = inode_read_lock(b->fs, dir, &dp);

	b->n = 0;
	b->err = 0;
	if (err)
		return err;
	err = S_ISDIR(dp->a.mode) ? 0 : -ENOTDIR;
	if (!err)
		err = dir_scan(b->fs->v, dp, cookie + 1, batch_add, b);
	if (err == 1)
		err = b->err;
	inode_unlock_put(b->fs, dp);
	return err;
}

static void batch_forget(struct batch *b, unsigned from)
{
	for (unsigned i = from; b->plus && i < b->n; i++)
		fs_forget(b->fs, b->info[i].ino, 1);
}

/* Hand out a batch. Nonzero: fn has had enough. */
static int batch_emit(struct batch *b, dir_fn *fn, void *ctx)
{
	for (unsigned i = 0; i < b->n; i++) {
		struct fs_entry e = {
			.ino = b->info[i].ino,
			.st.st_ino = b->info[i].ino,
			.st.st_mode = (mode_t)b->info[i].type << 12,
		};
		/* An inode that cannot be read hides neither the others nor its
		   own name: who asks for it hears why. */
		if (b->plus && fs_getattr(b->fs, e.ino, &e.st))
			e.ino = 0;
		if (fn(ctx, b->name[i], &e, b->info[i].index)) {
			batch_forget(b, i);
			return 1;
		}
		if (!e.ino)
			fs_forget(b->fs, b->info[i].ino, 1);
	}
	return 0;
}

static int emit_dots(struct fs *fs, uint64_t dir, uint64_t *cookie, dir_fn *fn,
		     void *ctx)
{
	struct fs_entry e = {.ino = dir};
	uint64_t parent;
	int err = parent_of(fs, dir, &parent);

	if (err)
		return err;
	e.st.st_mode = S_IFDIR;
	for (; *cookie < COOKIE_DOTS; ++*cookie) {
		e.ino = e.st.st_ino = *cookie ? parent : dir;
		if (fn(ctx, *cookie ? ".." : ".", &e, *cookie + 1))
			return 1;
	}
	return 0;
}

static void dir_touch(struct fs *fs, uint64_t dir)
{
	struct inode *dp;
	bool due;

	if (fs->readonly || inode_get(fs->v, dir, &dp))
		return;
	rwlock_read(&dp->lock);
	due = !dp->dead && atime_due(fs, dp);
	rwlock_unlock(&dp->lock);
	if (due)
		atime_touch(fs, dp);
	inode_put(fs->v, dp);
}

int fs_readdir(struct fs *fs, uint64_t dir, uint64_t cookie, bool plus,
	       dir_fn *fn, void *ctx)
{
	struct batch b;			/* large: not cleared */
	int err = 0;

	b.fs = fs;
	b.plus = plus;
	b.n = 0;

	if (cookie < COOKIE_DOTS) {
		if (!cookie)
			dir_touch(fs, dir);
		err = emit_dots(fs, dir, &cookie, fn, ctx);
	}
	while (!err && !(err = batch_load(&b, dir, cookie)) && b.n) {
		cookie = b.info[b.n - 1].index;
		err = batch_emit(&b, fn, ctx);
	}
	if (err < 0)
		batch_forget(&b, 0);
	return err < 0 ? err : 0;
}
