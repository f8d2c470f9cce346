/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The FUSE face: one short function for each request that decodes it, calls
 * fs.h and replies. The sign of errors flips here, and nowhere else.
 *
 * What the kernel is told, and may rely on, since nobody else writes:
 *   - inode numbers are node ids; they are never used twice, so generation 0
 *   - names, also those that are not there, and attributes hold for ever
 *   - it owns size and times of regular files while it has dirty pages
 *     (writeback cache); the pages it hands back carry neither
 *   - open, opendir and flush need no request: ENOSYS. So truncation by open
 *     must come as a setattr: ATOMIC_O_TRUNC stays off
 *   - it applies no umask (a default ACL may stand in its place) and leaves
 *     the loss of setuid, setgid and capabilities to us (KILLPRIV_V2, which
 *     also spares it a getxattr for each write)
 */
#define FUSE_USE_VERSION 314

#include "fs/fs_priv.h"
#include "fs/ring.h"
#include "fs/waiter.h"
#include "tools/cli.h"

#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <linux/fs.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>

#define FOR_EVER 1e9		/* seconds */
#define XATTR_BUF (64u << 10)

_Thread_local struct face_extra face_extra;

static struct fs *fs_of(fuse_req_t req)
{
	struct face *face = fuse_req_userdata(req);

	return face->fs;
}

static struct fs_cred cred_of(fuse_req_t req)
{
	const struct fuse_ctx *c = fuse_req_ctx(req);

	return (struct fs_cred){.uid = c->uid, .gid = c->gid,
				.umask = c->umask, .pid = (uint32_t)c->pid};
}

/* ---- buffers: one for each thread, kept ----------------------------------------- */

static _Thread_local char *buffer;
static _Thread_local size_t buffer_bytes;

static char *buffer_of(size_t bytes)
{
	if (bytes <= buffer_bytes)
		return buffer;
	bytes = (bytes + 4095) & ~4095ul;
	free(buffer);
	buffer = aligned_alloc(4096, bytes);
	buffer_bytes = buffer ? bytes : 0;
	return buffer;
}

void face_thread_fini(void)
{
	free(buffer);
	buffer = NULL;
	buffer_bytes = 0;
}

/* ---- replies -------------------------------------------------------------------- */

static void reply_err(fuse_req_t req, int err) { fuse_reply_err(req, -err); }

static void entry_param(const struct fs_entry *e, struct fuse_entry_param *out)
{
	*out = (struct fuse_entry_param){
		.ino = e->ino,
		.attr = e->st,
		.attr_timeout = FOR_EVER,
		.entry_timeout = FOR_EVER,
	};
}

/* A reply that nobody took was not counted. */
static void reply_entry(fuse_req_t req, int err, const struct fs_entry *e)
{
	struct fs *fs = fs_of(req);
	struct fuse_entry_param p;

	if (err) {
		reply_err(req, err);
		return;
	}
	entry_param(e, &p);
	if (fuse_reply_entry(req, &p))
		fs_forget(fs, e->ino, 1);
}

static void reply_attr(fuse_req_t req, int err, const struct stat *st)
{
	if (err)
		reply_err(req, err);
	else
		fuse_reply_attr(req, st, FOR_EVER);
}

/* ---- writes that failed after they had been answered ---------------------------------- */

/*
 * The kernel answers a write from its cache before it comes to us; when there
 * is no space for it then, only fsync and close would hear of it, and who just
 * goes on writing would do so for ever. But a write begins with the attributes:
 * so after a failure they are invalidated, and the request for them that comes
 * with an open file is answered with the error, once.
 *
 * That request does not say whose it is. Who had written is told by the kernel, at
 * fsync or close, each open file once. So here an error is given only while it is
 * true of any write to that file, and kept only while the kernel knows the file.
 */
#define LATE_MAX 64

struct late {
	fuse_ino_t ino;
	int err;
	uint64_t room;		/* blocks that would have been enough */
};

static struct {
	pthread_mutex_t lock;
	unsigned count;		/* atomic: mostly 0 */
	struct late e[LATE_MAX];
} late = {.lock = PTHREAD_MUTEX_INITIALIZER};

static bool late_find_locked(fuse_ino_t ino, unsigned *i)
{
	for (*i = 0; *i < late.count; (*i)++)
		if (late.e[*i].ino == ino)
			return true;
	return false;
}

/* Of more files than there is room for, the others hear when they write again. */
static void late_add(struct fs *fs, fuse_ino_t ino, int err, size_t bytes)
{
	struct late l = {.ino = ino, .err = err};
	struct statvfs st;
	unsigned i;

	fs_statfs(fs, &st);
	l.room = st.f_bavail + bytes / st.f_bsize + 1;
	pthread_mutex_lock(&late.lock);
	if (late_find_locked(ino, &i) || i < LATE_MAX)
		late.e[i] = l;
	if (i == late.count && i < LATE_MAX)
		__atomic_store_n(&late.count, i + 1, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&late.lock);
}

static struct late late_take(fuse_ino_t ino)
{
	struct late l = {0};
	unsigned i;

	if (!__atomic_load_n(&late.count, __ATOMIC_ACQUIRE))
		return l;
	pthread_mutex_lock(&late.lock);
	if (late_find_locked(ino, &i)) {
		l = late.e[i];
		late.e[i] = late.e[late.count - 1];
		__atomic_store_n(&late.count, late.count - 1, __ATOMIC_RELEASE);
	}
	pthread_mutex_unlock(&late.lock);
	return l;
}

/* What a write to the file would still fail with. */
static int late_error(struct fs *fs, fuse_ino_t ino)
{
	const struct late l = late_take(ino);
	uint32_t flags, projid;
	struct statvfs st;

	switch (l.err) {
	case -ENOSPC:			/* of the volume, or of its host */
		fs_statfs(fs, &st);
		return st.f_bavail < l.room ? l.err : 0;
	case -EPERM:			/* who appends may still do so */
		return !fs_getflags(fs, ino, &flags, &projid) &&
		       (flags & FS_IMMUTABLE_FL) ? l.err : 0;
	case -EROFS:
		return l.err;
	default:
		return 0;
	}
}

/* ---- names ---------------------------------------------------------------------- */

static void do_lookup(fuse_req_t req, fuse_ino_t dir, const char *name)
{
	const struct fuse_entry_param absent = {.entry_timeout = FOR_EVER};
	struct fs_entry e;
	int err = fs_lookup(fs_of(req), dir, name, &e);

	if (err == -ENOENT)
		fuse_reply_entry(req, &absent);
	else
		reply_entry(req, err, &e);
}

static void do_forget(fuse_req_t req, fuse_ino_t ino, uint64_t n)
{
	late_take(ino);
	fs_forget(fs_of(req), ino, n);
	fuse_reply_none(req);
}

static void do_forget_multi(fuse_req_t req, size_t count,
			    struct fuse_forget_data *f)
{
	for (size_t i = 0; i < count; i++) {
		late_take(f[i].ino);
		fs_forget(fs_of(req), f[i].ino, f[i].nlookup);
	}
	fuse_reply_none(req);
}

static void do_mknod(fuse_req_t req, fuse_ino_t dir, const char *name,
		     mode_t mode, dev_t rdev)
{
	struct fs_cred c = cred_of(req);
	struct fs_entry e;

	reply_entry(req, fs_mknod(fs_of(req), &c, dir, name, mode, rdev, &e), &e);
}

static void do_mkdir(fuse_req_t req, fuse_ino_t dir, const char *name,
		     mode_t mode)
{
	struct fs_cred c = cred_of(req);
	struct fs_entry e;

	reply_entry(req, fs_mkdir(fs_of(req), &c, dir, name, mode, &e), &e);
}

static void do_symlink(fuse_req_t req, const char *target, fuse_ino_t dir,
		       const char *name)
{
	struct fs_cred c = cred_of(req);
	struct fs_entry e;

	reply_entry(req, fs_symlink(fs_of(req), &c, dir, name, target, &e), &e);
}

static void do_link(fuse_req_t req, fuse_ino_t ino, fuse_ino_t dir,
		    const char *name)
{
	struct fs_entry e;

	reply_entry(req, fs_link(fs_of(req), ino, dir, name, &e), &e);
}

static void do_unlink(fuse_req_t req, fuse_ino_t dir, const char *name)
{
	reply_err(req, fs_unlink(fs_of(req), dir, name));
}

static void do_rmdir(fuse_req_t req, fuse_ino_t dir, const char *name)
{
	reply_err(req, fs_rmdir(fs_of(req), dir, name));
}

static void do_rename(fuse_req_t req, fuse_ino_t dir, const char *name,
		      fuse_ino_t new_dir, const char *new_name, unsigned flags)
{
	struct fs_cred c = cred_of(req);

	reply_err(req, fs_rename(fs_of(req), &c, dir, name, new_dir, new_name,
				 flags));
}

static void do_readlink(fuse_req_t req, fuse_ino_t ino)
{
	char target[4097];
	int err = fs_readlink(fs_of(req), ino, target, sizeof(target));

	if (err)
		reply_err(req, err);
	else
		fuse_reply_readlink(req, target);
}

static int create(fuse_req_t req, fuse_ino_t dir, const char *name, mode_t mode,
		  int flags, struct fs_entry *e)
{
	struct fs_cred c = cred_of(req);
	int err;

	if (face_extra.tmpfile)
		return fs_tmpfile(fs_of(req), &c, dir, mode, e);
	err = fs_mknod(fs_of(req), &c, dir, name, S_IFREG | (mode & 07777), 0, e);
	if (err == -EEXIST && !(flags & O_EXCL))
		err = fs_lookup(fs_of(req), dir, name, e);
	return err;
}

static void do_create(fuse_req_t req, fuse_ino_t dir, const char *name,
		      mode_t mode, struct fuse_file_info *fi)
{
	struct fs *fs = fs_of(req);
	struct fuse_entry_param p;
	struct fs_entry e;
	int err = create(req, dir, name, mode, fi->flags, &e);

	if (err) {
		reply_err(req, err);
		return;
	}
	entry_param(&e, &p);
	fi->keep_cache = 1;
	if (fuse_reply_create(req, &p, fi))
		fs_forget(fs, e.ino, 1);
}

/* ---- directories ------------------------------------------------------------------ */

struct listing {
	fuse_req_t req;
	bool plus;
	char *buf;
	size_t size, used;
};

static int list_one(void *ctx, const char *name, const struct fs_entry *e,
		    uint64_t next)
{
	struct listing *l = ctx;
	size_t room = l->size - l->used, need;
	struct fuse_entry_param p;
	char *at = l->buf + l->used;

	if (l->plus) {
		entry_param(e, &p);
		if (next <= 2)			/* "." and ".." do not count */
			p.ino = 0;
		need = fuse_add_direntry_plus(l->req, at, room, name, &p,
					      (off_t)next);
	} else {
		need = fuse_add_direntry(l->req, at, room, name, &e->st,
					 (off_t)next);
	}
	if (need > room)
		return 1;
	l->used += need;
	return 0;
}

static void list(fuse_req_t req, fuse_ino_t dir, size_t size, off_t off,
		 bool plus)
{
	struct listing l = {req, plus, buffer_of(size), size, 0};
	int err = l.buf ? fs_readdir(fs_of(req), dir, (uint64_t)off, plus,
				     list_one, &l)
			: -ENOMEM;

	if (err && !l.used)
		reply_err(req, err);
	else
		fuse_reply_buf(req, l.buf, l.used);
}

static void do_readdir(fuse_req_t req, fuse_ino_t dir, size_t size, off_t off,
		       struct fuse_file_info *fi)
{
	(void)fi;
	list(req, dir, size, off, false);
}

static void do_readdirplus(fuse_req_t req, fuse_ino_t dir, size_t size,
			   off_t off, struct fuse_file_info *fi)
{
	(void)fi;
	list(req, dir, size, off, true);
}

/* ---- attributes --------------------------------------------------------------------- */

static void do_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct stat st;
	int err = fi ? late_error(fs_of(req), ino) : 0;

	if (err)
		reply_err(req, err);
	else
		reply_attr(req, fs_getattr(fs_of(req), ino, &st), &st);
}

#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 18)
static void statx_of(const struct stat *st, const struct timespec *btime,
		     struct statx *out)
{
	*out = (struct statx){
		.stx_mask = STATX_BASIC_STATS | STATX_BTIME,
		.stx_blksize = (uint32_t)st->st_blksize,
		.stx_nlink = (uint32_t)st->st_nlink,
		.stx_uid = st->st_uid,
		.stx_gid = st->st_gid,
		.stx_mode = (uint16_t)st->st_mode,
		.stx_ino = st->st_ino,
		.stx_size = (uint64_t)st->st_size,
		.stx_blocks = (uint64_t)st->st_blocks,
		.stx_atime = {st->st_atim.tv_sec, (uint32_t)st->st_atim.tv_nsec},
		.stx_btime = {btime->tv_sec, (uint32_t)btime->tv_nsec},
		.stx_ctime = {st->st_ctim.tv_sec, (uint32_t)st->st_ctim.tv_nsec},
		.stx_mtime = {st->st_mtim.tv_sec, (uint32_t)st->st_mtim.tv_nsec},
		.stx_rdev_major = major(st->st_rdev),
		.stx_rdev_minor = minor(st->st_rdev),
	};
}

static void do_statx(fuse_req_t req, fuse_ino_t ino, int flags, int mask,
		     struct fuse_file_info *fi)
{
	struct timespec btime;
	struct statx stx;
	struct stat st;
	int err = fs_getattr(fs_of(req), ino, &st);

	(void)flags;
	(void)mask;
	(void)fi;
	if (!err)
		err = fs_btime(fs_of(req), ino, &btime);
	if (err) {
		reply_err(req, err);
		return;
	}
	statx_of(&st, &btime, &stx);
	fuse_reply_statx(req, 0, &stx, FOR_EVER);
}
#endif

static int setattr_what(int set)
{
	static const int pairs[][2] = {
		{FUSE_SET_ATTR_MODE, FS_SET_MODE},
		{FUSE_SET_ATTR_UID, FS_SET_UID},
		{FUSE_SET_ATTR_GID, FS_SET_GID},
		{FUSE_SET_ATTR_SIZE, FS_SET_SIZE},
		{FUSE_SET_ATTR_ATIME, FS_SET_ATIME},
		{FUSE_SET_ATTR_MTIME, FS_SET_MTIME},
		{FUSE_SET_ATTR_ATIME_NOW, FS_SET_ATIME_NOW},
		{FUSE_SET_ATTR_MTIME_NOW, FS_SET_MTIME_NOW},
		{FUSE_SET_ATTR_CTIME, FS_SET_CTIME},
		{FUSE_SET_ATTR_KILL_SUID, FS_SET_KILL_SUID},
	};
	int what = 0;

	for (size_t i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++)
		if (set & pairs[i][0])
			what |= pairs[i][1];
	return what;
}

/*
 * A change of nothing comes before a write, fallocate or copy by someone who
 * may cost the file its setuid (KILLPRIV_V2). Only its answer tells the kernel
 * of the new mode; what root does leaves it.
 */
static void do_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr,
		       int set, struct fuse_file_info *fi)
{
	struct stat st = *attr;
	int what = setattr_what(set);

	if (!what && fuse_req_ctx(req)->uid)
		what = FS_SET_KILL_SUID;
	/* utimes comes without the open file, a cache with it */
	if (fi && what == (FS_SET_MTIME | FS_SET_CTIME))
		what |= FS_SET_CACHED;
	reply_attr(req, fs_setattr(fs_of(req), ino, what, &st), &st);
}

static void do_statfs(fuse_req_t req, fuse_ino_t ino)
{
	struct statvfs st;

	(void)ino;
	fs_statfs(fs_of(req), &st);
	fuse_reply_statfs(req, &st);
}

/* A size of 0 asks how long the answer is. */
static void reply_sized(fuse_req_t req, ssize_t n, const char *buf, size_t size)
{
	if (n < 0)
		reply_err(req, (int)n);
	else if (!size)
		fuse_reply_xattr(req, (size_t)n);
	else
		fuse_reply_buf(req, buf, (size_t)n);
}

static void do_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name,
			size_t size)
{
	const struct face *face = fuse_req_userdata(req);
	const char *image = face->image;
	size_t room = size < XATTR_BUF ? size : XATTR_BUF;
	char *buf = buffer_of(room ? room : 1);

	if (ino == FUSE_ROOT_ID && image && !strcmp(name, CLI_IMAGE_XATTR)) {
		size_t len = strlen(image);

		reply_sized(req, size && len > size ? -ERANGE : (ssize_t)len,
			    image, size);
		return;
	}
	reply_sized(req, buf ? fs_getxattr(fs_of(req), ino, name, buf, room)
			     : -ENOMEM, buf, size);
}

static void do_listxattr(fuse_req_t req, fuse_ino_t ino, size_t size)
{
	size_t room = size < XATTR_BUF ? size : XATTR_BUF;
	char *buf = buffer_of(room ? room : 1);
	struct fs_cred c = cred_of(req);

	reply_sized(req, buf ? fs_listxattr(fs_of(req), &c, ino, buf, room)
			     : -ENOMEM, buf, size);
}

static void do_setxattr(fuse_req_t req, fuse_ino_t ino, const char *name,
			const char *value, size_t size, int flags)
{
	struct fs_cred c = cred_of(req);

	if (face_extra.kill_sgid)
		flags |= FS_XATTR_KILL_SGID;
	reply_err(req, fs_setxattr(fs_of(req), &c, ino, name, value, size, flags));
}

static void do_removexattr(fuse_req_t req, fuse_ino_t ino, const char *name)
{
	struct fs_cred c = cred_of(req);

	reply_err(req, fs_removexattr(fs_of(req), &c, ino, name));
}

/* ---- what the kernel has to write out first ------------------------------------------ */

/*
 * With the writeback cache the kernel asks where the data are without handing
 * over the dirty pages first, and holes would be reported where there is data
 * only in its cache. So before a hole is believed the kernel is made to write
 * out what it has there, by invalidating just that range (in which a clean
 * page holds nothing but zeroes). In the same way a file is written out before
 * it becomes immutable or append-only: what was written before must not be refused
 * after. And what was refused is dropped, so that it is not read either.
 * That waits for writes which the workers must be free to serve: one thread of
 * its own has it done by the waiter, and answers.
 */
struct behind {
	struct behind *next;
	void (*run)(struct behind *b);
	fuse_req_t req;
	fuse_ino_t ino;
	union {
		struct {
			off_t off;
			int whence;
		} seek;
		struct {
			uint32_t flags, projid;
			bool has_projid;
		} set;
		struct {
			off_t off;
			size_t len;
		} drop;
	};
};

static struct {
	struct lock lock;
	pthread_cond_t wake;
	pthread_t thread;
	bool started, stop;
	struct behind *first, **last;
	struct face *face;
	struct fuse_session *se;
} flusher;

static bool stopping(void)
{
	bool stop;

	lock_lock(&flusher.lock);
	stop = flusher.stop;
	lock_unlock(&flusher.lock);
	return stop;
}

/*
 * Write out what the kernel has in [from, to); to 0: to the end. Without a waiter
 * this thread waits itself. At the end it must not: there may be nobody to answer.
 */
static void flush_cached(fuse_ino_t ino, off_t from, off_t to)
{
	const off_t len = to ? to - from : 0;

	if (!waiter_flush(ino, from, len) && !stopping())
		fuse_lowlevel_notify_inval_inode(flusher.se, ino, from, len);
}

/* The kernel is to ask for the attributes again. */
static void forget_attr(fuse_ino_t ino)
{
	fuse_lowlevel_notify_inval_inode(flusher.se, ino, -1, 0);
}

static void *flusher_run(void *arg)
{
	struct behind *b;

	(void)arg;
	lock_lock(&flusher.lock);
	while (!flusher.stop) {
		b = flusher.first;
		if (!b) {
			lock_wait(&flusher.lock, &flusher.wake);
			continue;
		}
		flusher.first = b->next;
		if (!b->next)
			flusher.last = &flusher.first;
		lock_unlock(&flusher.lock);
		b->run(b);
		free(b);
		lock_lock(&flusher.lock);
	}
	lock_unlock(&flusher.lock);
	return NULL;
}

int face_start(struct face *face, struct fuse_session *se)
{
	lock_init(&flusher.lock, RANK_LEAF, "flusher");
	pthread_cond_init(&flusher.wake, NULL);
	flusher.last = &flusher.first;
	flusher.face = face;
	flusher.se = se;
	flusher.started = !pthread_create(&flusher.thread, NULL, flusher_run,
					  NULL);
	return flusher.started ? 0 : -EAGAIN;
}

static void behind_cancel(struct behind *b)
{
	if (b->req)
		reply_err(b->req, -ENOTCONN);
	free(b);
}

/* Workers may still answer; what comes to the thread now is not done any more. */
void face_stop(bool unserved)
{
	struct behind *b;

	if (!flusher.started)
		return;
	lock_lock(&flusher.lock);
	flusher.stop = true;
	pthread_cond_signal(&flusher.wake);
	lock_unlock(&flusher.lock);
	if (unserved)
		waiter_cut();
	pthread_join(flusher.thread, NULL);
	flusher.started = false;
	while ((b = flusher.first)) {
		flusher.first = b->next;
		behind_cancel(b);
	}
}

static void behind_add(struct behind *b)
{
	bool stop;

	lock_lock(&flusher.lock);
	stop = flusher.stop;
	if (!stop) {
		*flusher.last = b;
		flusher.last = &b->next;
		pthread_cond_signal(&flusher.wake);
	}
	lock_unlock(&flusher.lock);
	if (stop)
		behind_cancel(b);
}

/* Let the thread answer this one; or say `else_err`, if no other request could
 * come then. */
static void answer_behind(const struct behind *what, int else_err)
{
	struct behind *b = malloc(sizeof(*b));

	if (!b || !ring_hold()) {
		free(b);
		reply_err(what->req, b ? else_err : -ENOMEM);
		return;
	}
	*b = *what;
	behind_add(b);
}

static void drop_run(struct behind *b)
{
	flush_cached(b->ino, b->drop.off, b->drop.off + (off_t)b->drop.len);
}

/* The kernel is not to show what was refused. */
static void drop_behind(fuse_ino_t ino, off_t off, size_t len)
{
	struct behind *b = calloc(1, sizeof(*b));

	if (!b)
		return;
	b->run = drop_run;
	b->ino = ino;
	b->drop.off = off;
	b->drop.len = len;
	behind_add(b);
}

/* ---- seeking for data and holes ---------------------------------------------------- */

static void seek_reply(fuse_req_t req, off_t at)
{
	if (at < 0)
		reply_err(req, (int)at);
	else
		fuse_reply_lseek(req, at);
}

static off_t seek_data(struct fs *fs, fuse_ino_t ino, off_t off)
{
	off_t at = fs_lseek(fs, ino, off, SEEK_DATA);

	if (at == off || (at < 0 && at != -ENXIO))
		return at;
	flush_cached(ino, off, at < 0 ? 0 : at);
	return fs_lseek(fs, ino, off, SEEK_DATA);
}

static off_t seek_hole(struct fs *fs, fuse_ino_t ino, off_t off)
{
	off_t hole = fs_lseek(fs, ino, off, SEEK_HOLE), end = 0;

	/* A hole is one if it still is after what lay in it was written. */
	for (;;) {
		off_t from = hole == -ENXIO ? off : hole;

		if (from < 0 || (end && from < end))
			return hole;
		end = fs_lseek(fs, ino, from, SEEK_DATA);
		if (end < 0)
			end = 0;
		flush_cached(ino, from, end);
		hole = fs_lseek(fs, ino, off, SEEK_HOLE);
		if (!end)
			return hole;
	}
}

static void seek_behind(struct behind *b)
{
	struct fs *fs = flusher.face->fs;

	seek_reply(b->req, b->seek.whence == SEEK_DATA
		   ? seek_data(fs, b->ino, b->seek.off)
		   : seek_hole(fs, b->ino, b->seek.off));
}

static void do_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence,
		     struct fuse_file_info *fi)
{
	const struct behind b = {.run = seek_behind, .req = req, .ino = ino,
				 .seek = {off, whence}};
	const struct face *face = fuse_req_userdata(req);
	off_t at = fs_lseek(face->fs, ino, off, whence);

	(void)fi;
	/* Data is data; only a hole may be one in our eyes alone. Told ENOSYS,
	 * the kernel takes all for data from now on, which is true enough. */
	if (face->writeback && (at == -ENXIO || at >= 0) &&
	    !(whence == SEEK_DATA && at == off))
		answer_behind(&b, -ENOSYS);
	else
		seek_reply(req, at);
}

/* ---- contents ------------------------------------------------------------------------- */

static void do_nosys(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)ino;
	(void)fi;
	fuse_reply_err(req, ENOSYS);
}

static void do_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off,
		    struct fuse_file_info *fi)
{
	const size_t room = fs_read_room(fs_of(req), size);
	char *ringed = ring_buffer(room), *data,
	     *buf = ringed ? ringed : buffer_of(room);
	ssize_t n = buf ? fs_read(fs_of(req), ino, buf, size, off, &data)
			: -ENOMEM;

	(void)fi;
	if (n < 0)
		reply_err(req, (int)n);
	else
		fuse_reply_buf(req, data, (size_t)n);
}

static void do_write(fuse_req_t req, fuse_ino_t ino, const char *buf,
		     size_t size, off_t off, struct fuse_file_info *fi)
{
	const struct face *face = fuse_req_userdata(req);
	unsigned flags = 0;
	ssize_t n;

	if (fi->writepage && face->writeback)
		flags |= FS_WRITE_CACHED;
	if (face_extra.kill_suid)
		flags |= FS_WRITE_KILL_SUID;
	n = fs_write(face->fs, ino, buf, size, off, flags);
	if (n >= 0) {
		fuse_reply_write(req, (size_t)n);
		return;
	}
	if (flags & FS_WRITE_CACHED)
		late_add(face->fs, ino, (int)n, size);
	reply_err(req, (int)n);
	if (flags & FS_WRITE_CACHED)
		forget_attr(ino);
	if ((flags & FS_WRITE_CACHED) && n == -EPERM)
		drop_behind(ino, off, size);
}

static void do_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t off,
			 off_t len, struct fuse_file_info *fi)
{
	(void)fi;
	reply_err(req, fs_fallocate(fs_of(req), ino, mode, off, len));
}

static void do_copy_file_range(fuse_req_t req, fuse_ino_t src, off_t src_off,
			       struct fuse_file_info *src_fi, fuse_ino_t dst,
			       off_t dst_off, struct fuse_file_info *dst_fi,
			       size_t len, int flags)
{
	const size_t most = 0x7ffff000;		/* the reply has 32 bits */
	ssize_t n = fs_copy_file_range(fs_of(req), src, src_off, dst, dst_off,
				       len < most ? len : most);

	(void)src_fi;
	(void)dst_fi;
	(void)flags;
	if (n < 0)
		reply_err(req, (int)n);
	else
		fuse_reply_write(req, (size_t)n);
}

static void do_fsync(fuse_req_t req, fuse_ino_t ino, int datasync,
		     struct fuse_file_info *fi)
{
	(void)fi;
	reply_err(req, fs_fsync(fs_of(req), ino, datasync));
}

/* ---- ioctls ------------------------------------------------------------------------------ */

struct ioctl {
	fuse_req_t req;
	fuse_ino_t ino;
	const void *in;
	size_t in_bytes, out_bytes;
};

static void ioctl_reply(const struct ioctl *i, int err, const void *out,
			size_t bytes)
{
	if (err)
		reply_err(i->req, err);
	else
		fuse_reply_ioctl(i->req, 0, out,
				 bytes < i->out_bytes ? bytes : i->out_bytes);
}

static void ioctl_getflags(const struct ioctl *i)
{
	uint32_t flags[2] = {0, 0}, projid;	/* a long for some callers */
	int err = fs_getflags(fs_of(i->req), i->ino, &flags[0], &projid);

	ioctl_reply(i, err, flags, sizeof(flags));
}

/* The change moves ctime, and an ioctl tells the kernel nothing. */
static void setflags(struct behind *b)
{
	int err = fs_setflags(fs_of(b->req), b->ino, &b->set.flags,
			      b->set.has_projid ? &b->set.projid : NULL);

	if (err)
		reply_err(b->req, err);
	else
		fuse_reply_ioctl(b->req, 0, NULL, 0);
	if (!err)
		forget_attr(b->ino);
}

static void setflags_behind(struct behind *b)
{
	struct fs *fs = flusher.face->fs;
	bool append = (b->set.flags & FS_APPEND_FL) &&
		      !fs_append_begin(fs, b->ino);

	flush_cached(b->ino, 0, 0);
	setflags(b);
	if (append)
		fs_append_end(fs, b->ino);
}

static void ioctl_change(const struct ioctl *i, uint32_t flags,
			 const uint32_t *projid)
{
	struct behind b = {.run = setflags_behind, .req = i->req, .ino = i->ino,
			   .set = {.flags = flags, .has_projid = projid}};

	if (projid)
		b.set.projid = *projid;
	if (flags & (FS_IMMUTABLE_FL | FS_APPEND_FL))
		answer_behind(&b, -EAGAIN);
	else
		setflags(&b);
}

static void ioctl_setflags(const struct ioctl *i)
{
	uint32_t flags;

	if (i->in_bytes < sizeof(flags)) {
		reply_err(i->req, -EINVAL);
		return;
	}
	memcpy(&flags, i->in, sizeof(flags));
	ioctl_change(i, flags, NULL);
}

/* The same flags by their other names. */
static const uint32_t xflags[][2] = {
	{FS_IMMUTABLE_FL, FS_XFLAG_IMMUTABLE}, {FS_APPEND_FL, FS_XFLAG_APPEND},
	{FS_SYNC_FL, FS_XFLAG_SYNC},	       {FS_NOATIME_FL, FS_XFLAG_NOATIME},
	{FS_NODUMP_FL, FS_XFLAG_NODUMP},
};

static uint32_t xflags_map(uint32_t flags, int from)
{
	uint32_t to = 0;

	for (size_t i = 0; i < sizeof(xflags) / sizeof(xflags[0]); i++)
		if (flags & xflags[i][from])
			to |= xflags[i][!from];
	return to;
}

static void ioctl_fsgetxattr(const struct ioctl *i)
{
	struct fsxattr x = {0};
	uint32_t flags;
	int err = fs_getflags(fs_of(i->req), i->ino, &flags, &x.fsx_projid);

	if (!err)
		x.fsx_xflags = xflags_map(flags, 0);
	ioctl_reply(i, err, &x, sizeof(x));
}

static void ioctl_fssetxattr(const struct ioctl *i)
{
	uint32_t flags, projid;
	struct fsxattr x;
	int err = i->in_bytes < sizeof(x) ? -EINVAL : 0;

	if (!err)
		err = fs_getflags(fs_of(i->req), i->ino, &flags, &projid);
	if (!err) {
		memcpy(&x, i->in, sizeof(x));
		flags = (flags & FS_DIRSYNC_FL) | xflags_map(x.fsx_xflags, 1);
		if (x.fsx_extsize || x.fsx_cowextsize ||
		    x.fsx_xflags != xflags_map(flags, 0))
			err = -EOPNOTSUPP;
	}
	if (err)
		reply_err(i->req, err);
	else
		ioctl_change(i, flags, &x.fsx_projid);
}

static void ioctl_trim(const struct ioctl *i)
{
	struct fstrim_range r;
	uint64_t done = 0;
	int err = i->in_bytes < sizeof(r) ? -EINVAL : 0;

	if (!err && fuse_req_ctx(i->req)->uid)
		err = -EPERM;
	if (!err) {
		memcpy(&r, i->in, sizeof(r));
		err = fs_trim(fs_of(i->req), r.start, r.len, r.minlen, &done);
		r.len = done;
	}
	ioctl_reply(i, err, &r, sizeof(r));
}

static void ioctl_label(const struct ioctl *i)
{
	char label[FSLABEL_MAX] = "";
	struct volume_stat st;

	volume_stat(fs_volume(fs_of(i->req)), &st);
	memcpy(label, st.label, sizeof(st.label));
	ioctl_reply(i, 0, label, sizeof(label));
}

static void do_ioctl(fuse_req_t req, fuse_ino_t ino, unsigned cmd, void *arg,
		     struct fuse_file_info *fi, unsigned flags, const void *in,
		     size_t in_bytes, size_t out_bytes)
{
	const struct ioctl i = {req, ino, in, in_bytes, out_bytes};
	const uint32_t generation = 0;

	(void)arg;
	(void)fi;
	(void)flags;
	switch (cmd) {
	case FS_IOC_GETFLAGS:
		ioctl_getflags(&i);
		break;
	case FS_IOC_SETFLAGS:
		ioctl_setflags(&i);
		break;
	case FS_IOC_FSGETXATTR:
		ioctl_fsgetxattr(&i);
		break;
	case FS_IOC_FSSETXATTR:
		ioctl_fssetxattr(&i);
		break;
	case FS_IOC_GETVERSION:		/* says long, and means int */
	case FS_IOC32_GETVERSION:
		ioctl_reply(&i, 0, &generation, sizeof(generation));
		break;
	case FS_IOC_GETFSLABEL:
		ioctl_label(&i);
		break;
	case FITRIM:
		ioctl_trim(&i);
		break;
	default:
		fuse_reply_err(req, ENOTTY);
	}
}

/* ---- the session --------------------------------------------------------------------------- */

static void do_init(void *userdata, struct fuse_conn_info *conn)
{
	const unsigned off = FUSE_CAP_AUTO_INVAL_DATA | FUSE_CAP_ATOMIC_O_TRUNC |
			     FUSE_CAP_HANDLE_KILLPRIV | FUSE_CAP_SPLICE_READ |
			     FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE;
	unsigned on = FUSE_CAP_ASYNC_READ | FUSE_CAP_ASYNC_DIO |
		      FUSE_CAP_DONT_MASK | FUSE_CAP_READDIRPLUS | FUSE_CAP_READDIRPLUS_AUTO |
		      FUSE_CAP_PARALLEL_DIROPS | FUSE_CAP_POSIX_ACL |
		      FUSE_CAP_CACHE_SYMLINKS | FUSE_CAP_EXPLICIT_INVAL_DATA |
		      FUSE_CAP_IOCTL_DIR;
	struct face *face = userdata;

	face->writeback = face->writeback &&
			  (conn->capable & FUSE_CAP_WRITEBACK_CACHE);
	if (face->writeback)
		on |= FUSE_CAP_WRITEBACK_CACHE;
	if (face->export)
		on |= FUSE_CAP_EXPORT_SUPPORT;
	conn->want = (conn->want & ~off) | (on & conn->capable);
	conn->max_write = FACE_MAX_WRITE;
	conn->max_background = 64;
	conn->congestion_threshold = 48;
	conn->time_gran = 1;
}

static const struct fuse_lowlevel_ops ops = {
	.init = do_init,
	.lookup = do_lookup,
	.forget = do_forget,
	.forget_multi = do_forget_multi,
	.getattr = do_getattr,
	.setattr = do_setattr,
	.readlink = do_readlink,
	.mknod = do_mknod,
	.mkdir = do_mkdir,
	.unlink = do_unlink,
	.rmdir = do_rmdir,
	.symlink = do_symlink,
	.rename = do_rename,
	.link = do_link,
	.open = do_nosys,
	.opendir = do_nosys,
	.flush = do_nosys,
	.create = do_create,
	.read = do_read,
	.write = do_write,
	.fsync = do_fsync,
	.fsyncdir = do_fsync,
	.readdir = do_readdir,
	.readdirplus = do_readdirplus,
	.statfs = do_statfs,
	.setxattr = do_setxattr,
	.getxattr = do_getxattr,
	.listxattr = do_listxattr,
	.removexattr = do_removexattr,
	.ioctl = do_ioctl,
	.fallocate = do_fallocate,
	.copy_file_range = do_copy_file_range,
	.lseek = do_lseek,
#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 18)
	.statx = do_statx,
#endif
};

const struct fuse_lowlevel_ops *face_ops(void) { return &ops; }
