/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * nullfs: the floor of FUSE. A server that has nothing to do: inodes in
 * memory, every request answered at once, everything cached by the kernel for
 * ever. What a real server adds to it is the real server's; what remains is
 * the price of the transport. Nothing is ever durable.
 *
 *	nullfs DIR [-o OPTION,...] [-f] [-d] [-s]
 *
 * Options of its own, besides libfuse's (default_permissions, allow_other,
 * clone_fd, max_idle_threads=N ...):
 *	data		keep what is written, so that reads return it (otherwise zeroes)
 *	xattr		answer GETXATTR and LISTXATTR (with "none") instead of ENOSYS
 *	acl		let the kernel check POSIX ACLs (there are none)
 *	open		answer OPEN and OPENDIR instead of ENOSYS
 *	nowriteback	no writeback cache
 *	killpriv	take over from the kernel to clear setuid on writes, so that it does
 *			not ask for attributes at each (it is not cleared: this is a yardstick)
 *	lead		one worker reads the requests, and answers them, until there are more
 *			than it can answer; only then does the next worker read as well
 *	poll=US		with lead: it looks for the next request so long before it sleeps
 *	workers=N	so many workers then (default 2)
 *
 * Locks: one mutex guards the names and all attributes; each file's rwlock
 * guards its data and is taken without the mutex.
 */
#define FUSE_USE_VERSION 312

#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sched.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define FOREVER 1e8

struct node;

/* A name in a directory: in the table of names, and in its directory's slots. */
struct name {
	struct name *hash_next;
	struct node *dir, *node;
	uint32_t hash;
	uint32_t slot;
	char text[];
};

struct node {
	struct stat st;
	uint64_t nlookup;
	struct node *parent;		/* of a directory */
	struct name **slots;		/* of a directory: in order of creation, with gaps */
	uint32_t slot_nr, slot_max, live;
	char *target;			/* of a symbolic link */
	pthread_rwlock_t data_lock;
	char *data;
	size_t data_max;
};

static struct node root;
static pthread_mutex_t big = PTHREAD_MUTEX_INITIALIZER;
static struct name **table;
static uint32_t table_mask, table_nr;
static uint64_t next_ino = 2;
static uint64_t node_nr = 1;
static char zeroes[1 << 20];

static struct {
	int data, xattr, acl, open, nowriteback;
	int lead, killpriv;
	unsigned poll_us, workers;
} opt = { .workers = 2 };

static struct node *node_of(fuse_ino_t ino)
{
	return ino == FUSE_ROOT_ID ? &root : (struct node *)(uintptr_t)ino;
}

static fuse_ino_t ino_of(const struct node *n)
{
	return n == &root ? FUSE_ROOT_ID : (fuse_ino_t)(uintptr_t)n;
}

/* The kernel's own clock for new files: a finer one costs a SETATTR each. */
static void stamp(struct timespec *ts)
{
	clock_gettime(CLOCK_REALTIME_COARSE, ts);
}

/* ---- names ------------------------------------------------------------------- */

static uint32_t name_hash(const struct node *dir, const char *text)
{
	uint64_t h = (uintptr_t)dir * 0x9e3779b97f4a7c15ull;
	for (; *text; text++)
		h = (h ^ (unsigned char)*text) * 0x100000001b3ull;
	return (uint32_t)(h ^ (h >> 32));
}

static void table_grow(void)
{
	uint32_t mask = table_mask * 2 + 1;
	struct name **t = calloc((size_t)mask + 1, sizeof(*t));

	if (!t)
		return;
	for (uint32_t i = 0; i <= table_mask; i++) {
		for (struct name *n = table[i], *next; n; n = next) {
			next = n->hash_next;
			n->hash_next = t[n->hash & mask];
			t[n->hash & mask] = n;
		}
	}
	free(table);
	table = t;
	table_mask = mask;
}

static struct name *name_find(struct node *dir, const char *text)
{
	uint32_t h = name_hash(dir, text);
	struct name *n = table[h & table_mask];

	while (n && (n->hash != h || n->dir != dir || strcmp(n->text, text)))
		n = n->hash_next;
	return n;
}

static int name_add(struct node *dir, const char *text, struct node *node)
{
	size_t len = strlen(text);
	struct name *n = malloc(sizeof(*n) + len + 1);

	if (!n)
		return ENOMEM;
	if (dir->slot_nr == dir->slot_max) {
		uint32_t max = dir->slot_max ? dir->slot_max * 2 : 8;
		struct name **s = realloc(dir->slots, max * sizeof(*s));
		if (!s) {
			free(n);
			return ENOMEM;
		}
		dir->slots = s;
		dir->slot_max = max;
	}
	memcpy(n->text, text, len + 1);
	n->dir = dir;
	n->node = node;
	n->hash = name_hash(dir, text);
	n->slot = dir->slot_nr;
	dir->slots[dir->slot_nr++] = n;
	dir->live++;
	if (table_nr++ > table_mask)
		table_grow();
	n->hash_next = table[n->hash & table_mask];
	table[n->hash & table_mask] = n;
	stamp(&dir->st.st_mtim);
	dir->st.st_ctim = dir->st.st_mtim;
	return 0;
}

static void name_remove(struct name *n)
{
	struct name **p = &table[n->hash & table_mask];
	struct node *dir = n->dir;

	while (*p != n)
		p = &(*p)->hash_next;
	*p = n->hash_next;
	table_nr--;
	dir->slots[n->slot] = NULL;
	if (--dir->live == 0)
		dir->slot_nr = 0;
	stamp(&dir->st.st_mtim);
	dir->st.st_ctim = dir->st.st_mtim;
	free(n);
}

/* ---- nodes ------------------------------------------------------------------- */

static struct node *node_create(const struct fuse_ctx *c, struct node *dir,
				mode_t mode, dev_t rdev)
{
	struct node *n = calloc(1, sizeof(*n));

	if (!n)
		return NULL;
	n->st.st_ino = next_ino++;
	n->st.st_mode = mode;
	n->st.st_rdev = rdev;
	n->st.st_nlink = S_ISDIR(mode) ? 2 : 1;
	n->st.st_uid = c->uid;
	n->st.st_gid = c->gid;
	if (dir->st.st_mode & S_ISGID) {
		n->st.st_gid = dir->st.st_gid;
		if (S_ISDIR(mode))
			n->st.st_mode |= S_ISGID;
	}
	n->st.st_blksize = 4096;
	if (opt.acl)
		n->st.st_mode &= ~c->umask;
	stamp(&n->st.st_mtim);
	n->st.st_atim = n->st.st_ctim = n->st.st_mtim;
	pthread_rwlock_init(&n->data_lock, NULL);
	if (S_ISDIR(mode)) {
		n->parent = dir;
		dir->st.st_nlink++;
	}
	node_nr++;
	return n;
}

/*
 * Small files live in one large arena of huge pages, in blocks of powers of
 * two that are used again: no page faults that a server without data would not
 * have. Larger files are mapped, so that growing copies nothing.
 */
#define DATA_MIN 4096u
#define MAP_FROM (256u << 10)
#define ARENA_BYTES (64ull << 30)

static char *arena, *arena_next;
static void *data_spare[32];		/* by log2; each begins with the next */
static pthread_mutex_t data_lock = PTHREAD_MUTEX_INITIALIZER;

static int arena_init(void)
{
	arena = mmap(NULL, ARENA_BYTES, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (arena == MAP_FAILED)
		return ENOMEM;
	madvise(arena, ARENA_BYTES, MADV_HUGEPAGE);
	arena_next = arena;
	return 0;
}

static char *data_alloc(size_t size)
{
	void **spare = &data_spare[__builtin_ctzl(size)];
	char *d = NULL;

	pthread_mutex_lock(&data_lock);
	if (*spare) {
		d = *spare;
		memcpy(spare, d, sizeof(*spare));
	} else if (size <= (size_t)(arena + ARENA_BYTES - arena_next)) {
		d = arena_next;
		arena_next += size;
	}
	pthread_mutex_unlock(&data_lock);
	return d;
}

static void data_free(char *d, size_t size)
{
	void **spare = &data_spare[size ? __builtin_ctzl(size) : 0];

	if (size >= MAP_FROM) {
		munmap(d, size);
	} else if (size) {
		pthread_mutex_lock(&data_lock);
		memcpy(d, spare, sizeof(*spare));
		*spare = d;
		pthread_mutex_unlock(&data_lock);
	}
}

/* Room for [off, end), called with the node's data lock; the rest is zeroes. */
static int data_grow(struct node *n, uint64_t off, uint64_t end)
{
	size_t old = n->data_max, max = old ? old : DATA_MIN;
	char *d;

	if (end <= old)
		return 0;
	while (max < end)
		max *= 2;
	if (old >= MAP_FROM)
		d = mremap(n->data, old, max, MREMAP_MAYMOVE);
	else if (max >= MAP_FROM)
		d = mmap(NULL, max, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	else
		d = data_alloc(max);
	if (!d || d == MAP_FAILED)
		return ENOMEM;
	if (max >= MAP_FROM)
		madvise(d, max, MADV_HUGEPAGE);
	if (max < MAP_FROM) {
		if (off > old)
			memset(d + old, 0, off - old);
		memset(d + end, 0, max - end);
	}
	if (old && old < MAP_FROM) {
		memcpy(d, n->data, old);
		data_free(n->data, old);
	}
	n->data = d;
	n->data_max = max;
	return 0;
}

static void node_put(struct node *n)
{
	if (n == &root || n->nlookup || n->st.st_nlink)
		return;
	pthread_rwlock_destroy(&n->data_lock);
	free(n->slots);
	free(n->target);
	data_free(n->data, n->data_max);
	free(n);
	node_nr--;
}

static void entry_fill(struct fuse_entry_param *e, const struct node *n)
{
	memset(e, 0, sizeof(*e));
	e->ino = ino_of(n);
	e->attr = n->st;
	e->attr_timeout = e->entry_timeout = FOREVER;
}

/* Takes a name off its node, and the node off the world if it was the last. */
static void name_drop(struct name *nm)
{
	struct node *n = nm->node, *dir = nm->dir;

	name_remove(nm);
	if (S_ISDIR(n->st.st_mode)) {
		n->st.st_nlink = 0;
		dir->st.st_nlink--;
	} else {
		n->st.st_nlink--;
	}
	stamp(&n->st.st_ctim);
	node_put(n);
}

/* ---- requests ---------------------------------------------------------------- */

static void null_init(void *userdata, struct fuse_conn_info *conn)
{
	(void)userdata;
	conn->want &= ~FUSE_CAP_AUTO_INVAL_DATA;
	conn->want |= conn->capable & (FUSE_CAP_READDIRPLUS | FUSE_CAP_PARALLEL_DIROPS |
				       FUSE_CAP_ASYNC_READ | FUSE_CAP_ASYNC_DIO |
				       FUSE_CAP_ATOMIC_O_TRUNC);
	conn->want &= ~FUSE_CAP_READDIRPLUS_AUTO;
	if (opt.acl)
		conn->want |= conn->capable & (FUSE_CAP_POSIX_ACL | FUSE_CAP_DONT_MASK);
	if (!opt.nowriteback)
		conn->want |= conn->capable & FUSE_CAP_WRITEBACK_CACHE;
	conn->max_write = 1 << 20;
	conn->max_readahead = 1 << 20;
	conn->time_gran = 1;
}

static void null_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param e;
	struct node *dir = node_of(parent);
	struct node *n = NULL;

	pthread_mutex_lock(&big);
	if (!strcmp(name, ".")) {
		n = dir;
	} else if (!strcmp(name, "..")) {
		n = dir->parent;
	} else {
		struct name *nm = name_find(dir, name);
		n = nm ? nm->node : NULL;
	}
	if (n) {
		n->nlookup++;
		entry_fill(&e, n);
	} else {
		memset(&e, 0, sizeof(e));
		e.entry_timeout = FOREVER;
	}
	pthread_mutex_unlock(&big);
	fuse_reply_entry(req, &e);
}

static void forget_locked(fuse_ino_t ino, uint64_t nlookup)
{
	struct node *n = node_of(ino);

	if (n == &root)
		return;
	n->nlookup -= nlookup;
	node_put(n);
}

static void null_forget(fuse_req_t req, fuse_ino_t ino, uint64_t nlookup)
{
	pthread_mutex_lock(&big);
	forget_locked(ino, nlookup);
	pthread_mutex_unlock(&big);
	fuse_reply_none(req);
}

static void null_forget_multi(fuse_req_t req, size_t count,
			      struct fuse_forget_data *f)
{
	pthread_mutex_lock(&big);
	for (size_t i = 0; i < count; i++)
		forget_locked(f[i].ino, f[i].nlookup);
	pthread_mutex_unlock(&big);
	fuse_reply_none(req);
}

static void null_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)fi;
	pthread_mutex_lock(&big);
	struct stat st = node_of(ino)->st;
	pthread_mutex_unlock(&big);
	fuse_reply_attr(req, &st, FOREVER);
}

static void null_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr, int to_set,
			 struct fuse_file_info *fi)
{
	struct node *n = node_of(ino);
	struct timespec now;

	(void)fi;
	if (to_set & FUSE_SET_ATTR_SIZE) {
		pthread_rwlock_wrlock(&n->data_lock);
		if (n->data && (uint64_t)attr->st_size < n->data_max)
			memset(n->data + attr->st_size, 0, n->data_max - (size_t)attr->st_size);
		pthread_rwlock_unlock(&n->data_lock);
	}
	stamp(&now);
	pthread_mutex_lock(&big);
	if (to_set & FUSE_SET_ATTR_MODE)
		n->st.st_mode = (n->st.st_mode & S_IFMT) | (attr->st_mode & 07777);
	if (to_set & FUSE_SET_ATTR_UID)
		n->st.st_uid = attr->st_uid;
	if (to_set & FUSE_SET_ATTR_GID)
		n->st.st_gid = attr->st_gid;
	if (to_set & FUSE_SET_ATTR_SIZE) {
		n->st.st_size = attr->st_size;
		n->st.st_blocks = (attr->st_size + 511) / 512;
	}
	if (to_set & FUSE_SET_ATTR_ATIME_NOW)
		n->st.st_atim = now;
	else if (to_set & FUSE_SET_ATTR_ATIME)
		n->st.st_atim = attr->st_atim;
	if (to_set & FUSE_SET_ATTR_MTIME_NOW)
		n->st.st_mtim = now;
	else if (to_set & FUSE_SET_ATTR_MTIME)
		n->st.st_mtim = attr->st_mtim;
	n->st.st_ctim = to_set & FUSE_SET_ATTR_CTIME ? attr->st_ctim : now;
	struct stat st = n->st;
	pthread_mutex_unlock(&big);
	fuse_reply_attr(req, &st, FOREVER);
}

static int node_make(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode,
		     dev_t rdev, const char *target, struct fuse_entry_param *e)
{
	struct node *dir = node_of(parent);
	int err = EEXIST;

	pthread_mutex_lock(&big);
	if (!name_find(dir, name)) {
		struct node *n = node_create(fuse_req_ctx(req), dir, mode, rdev);
		err = n ? name_add(dir, name, n) : ENOMEM;
		if (!err) {
			if (target) {
				n->target = strdup(target);
				n->st.st_size = (off_t)strlen(target);
			}
			n->nlookup++;
			entry_fill(e, n);
		}
	}
	pthread_mutex_unlock(&big);
	return err;
}

static void reply_made(fuse_req_t req, int err, const struct fuse_entry_param *e)
{
	if (err)
		fuse_reply_err(req, err);
	else
		fuse_reply_entry(req, e);
}

static void null_mknod(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode,
		       dev_t rdev)
{
	struct fuse_entry_param e;
	reply_made(req, node_make(req, parent, name, mode, rdev, NULL, &e), &e);
}

static void null_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
	struct fuse_entry_param e;
	reply_made(req, node_make(req, parent, name, S_IFDIR | mode, 0, NULL, &e), &e);
}

static void null_symlink(fuse_req_t req, const char *target, fuse_ino_t parent,
			 const char *name)
{
	struct fuse_entry_param e;
	reply_made(req, node_make(req, parent, name, S_IFLNK | 0777, 0, target, &e), &e);
}

static void null_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode,
			struct fuse_file_info *fi)
{
	struct fuse_entry_param e;
	int err = node_make(req, parent, name, mode, 0, NULL, &e);

	if (err)
		fuse_reply_err(req, err);
	else
		fuse_reply_create(req, &e, fi);
}

static void null_readlink(fuse_req_t req, fuse_ino_t ino)
{
	fuse_reply_readlink(req, node_of(ino)->target);
}

static void null_link(fuse_req_t req, fuse_ino_t ino, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param e;
	struct node *n = node_of(ino), *dir = node_of(parent);
	int err = EEXIST;

	pthread_mutex_lock(&big);
	if (!name_find(dir, name)) {
		err = name_add(dir, name, n);
		if (!err) {
			n->st.st_nlink++;
			stamp(&n->st.st_ctim);
			n->nlookup++;
			entry_fill(&e, n);
		}
	}
	pthread_mutex_unlock(&big);
	reply_made(req, err, &e);
}

static void unlink_or_rmdir(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	int err = 0;

	pthread_mutex_lock(&big);
	struct name *nm = name_find(node_of(parent), name);
	if (!nm)
		err = ENOENT;
	else if (nm->node->live)
		err = ENOTEMPTY;
	else
		name_drop(nm);
	pthread_mutex_unlock(&big);
	fuse_reply_err(req, err);
}

static void null_rename(fuse_req_t req, fuse_ino_t parent, const char *name,
			fuse_ino_t newparent, const char *newname, unsigned int flags)
{
	struct node *from = node_of(parent), *to = node_of(newparent);
	int err = 0;

	if (flags & ~1u) {
		fuse_reply_err(req, EINVAL);
		return;
	}
	pthread_mutex_lock(&big);
	struct name *nm = name_find(from, name);
	struct name *old = name_find(to, newname);
	if (!nm) {
		err = ENOENT;
	} else if (old && flags) {
		err = EEXIST;
	} else if (old && old->node->live) {
		err = ENOTEMPTY;
	} else if (!old || old->node != nm->node) {
		struct node *n = nm->node;
		if (old)
			name_drop(old);
		err = name_add(to, newname, n);
		if (!err) {
			name_remove(nm);
			stamp(&n->st.st_ctim);
			if (S_ISDIR(n->st.st_mode) && from != to) {
				n->parent = to;
				from->st.st_nlink--;
				to->st.st_nlink++;
			}
		}
	}
	pthread_mutex_unlock(&big);
	fuse_reply_err(req, err);
}

static void null_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)ino;
	if (!opt.open) {
		fuse_reply_err(req, ENOSYS);
		return;
	}
	fi->keep_cache = 1;
	fi->cache_readdir = 1;
	fuse_reply_open(req, fi);
}

static void null_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)ino;
	(void)fi;
	fuse_reply_err(req, 0);
}

static void null_enosys(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)ino;
	(void)fi;
	fuse_reply_err(req, ENOSYS);
}

static void null_fsync(fuse_req_t req, fuse_ino_t ino, int datasync,
		       struct fuse_file_info *fi)
{
	(void)ino;
	(void)datasync;
	(void)fi;
	fuse_reply_err(req, 0);
}

static void null_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off,
		      struct fuse_file_info *fi)
{
	struct node *n = node_of(ino);
	uint64_t end;

	(void)fi;
	pthread_mutex_lock(&big);
	end = (uint64_t)n->st.st_size;
	pthread_mutex_unlock(&big);
	if ((uint64_t)off >= end)
		size = 0;
	else if (size > end - (uint64_t)off)
		size = end - (uint64_t)off;
	pthread_rwlock_rdlock(&n->data_lock);
	if (size && n->data && (uint64_t)off + size <= n->data_max)
		fuse_reply_buf(req, n->data + off, size);
	else
		fuse_reply_buf(req, zeroes, size < sizeof(zeroes) ? size : sizeof(zeroes));
	pthread_rwlock_unlock(&n->data_lock);
}

static void null_write(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size,
		       off_t off, struct fuse_file_info *fi)
{
	struct node *n = node_of(ino);
	uint64_t end = (uint64_t)off + size;
	int err = 0;

	(void)fi;
	if (opt.data) {
		pthread_rwlock_wrlock(&n->data_lock);
		err = data_grow(n, (uint64_t)off, end);
		if (!err)
			memcpy(n->data + off, buf, size);
		pthread_rwlock_unlock(&n->data_lock);
	}
	pthread_mutex_lock(&big);
	if (!err && (uint64_t)n->st.st_size < end) {
		n->st.st_size = (off_t)end;
		n->st.st_blocks = (off_t)(end + 511) / 512;
	}
	pthread_mutex_unlock(&big);
	if (err)
		fuse_reply_err(req, err);
	else
		fuse_reply_write(req, size);
}

static void readdir_any(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, bool plus)
{
	struct node *dir = node_of(ino);
	char *buf = malloc(size);
	size_t used = 0;

	if (!buf) {
		fuse_reply_err(req, ENOMEM);
		return;
	}
	pthread_mutex_lock(&big);
	for (uint64_t i = (uint64_t)off; i < (uint64_t)dir->slot_nr + 2; i++) {
		struct fuse_entry_param e;
		struct node *n = i ? dir->parent : dir;
		const char *text = i ? ".." : ".";
		size_t len;

		if (i >= 2) {
			struct name *nm = dir->slots[i - 2];
			if (!nm)
				continue;
			n = nm->node;
			text = nm->text;
		}
		entry_fill(&e, n);
		if (plus)
			len = fuse_add_direntry_plus(req, buf + used, size - used, text, &e,
						     (off_t)(i + 1));
		else
			len = fuse_add_direntry(req, buf + used, size - used, text, &e.attr,
						(off_t)(i + 1));
		if (len > size - used)
			break;
		used += len;
		if (plus && i >= 2)
			n->nlookup++;
	}
	pthread_mutex_unlock(&big);
	fuse_reply_buf(req, buf, used);
	free(buf);
}

static void null_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off,
			 struct fuse_file_info *fi)
{
	(void)fi;
	readdir_any(req, ino, size, off, false);
}

static void null_readdirplus(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off,
			     struct fuse_file_info *fi)
{
	(void)fi;
	readdir_any(req, ino, size, off, true);
}

static void null_statfs(fuse_req_t req, fuse_ino_t ino)
{
	struct statvfs st = {
		.f_bsize = 4096, .f_frsize = 4096, .f_namemax = 255,
		.f_blocks = 1ull << 28, .f_bfree = 1ull << 28, .f_bavail = 1ull << 28,
		.f_files = 1ull << 40, .f_ffree = (1ull << 40) - node_nr,
		.f_favail = (1ull << 40) - node_nr,
	};
	(void)ino;
	fuse_reply_statfs(req, &st);
}

static void null_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name, size_t size)
{
	(void)ino;
	(void)name;
	(void)size;
	fuse_reply_err(req, opt.xattr ? ENODATA : ENOSYS);
}

static void null_listxattr(fuse_req_t req, fuse_ino_t ino, size_t size)
{
	(void)ino;
	if (!opt.xattr)
		fuse_reply_err(req, ENOSYS);
	else if (size == 0)
		fuse_reply_xattr(req, 0);
	else
		fuse_reply_buf(req, NULL, 0);
}

static const struct fuse_lowlevel_ops null_ops = {
	.init = null_init,
	.lookup = null_lookup,
	.forget = null_forget,
	.forget_multi = null_forget_multi,
	.getattr = null_getattr,
	.setattr = null_setattr,
	.mknod = null_mknod,
	.mkdir = null_mkdir,
	.symlink = null_symlink,
	.create = null_create,
	.readlink = null_readlink,
	.link = null_link,
	.unlink = unlink_or_rmdir,
	.rmdir = unlink_or_rmdir,
	.rename = null_rename,
	.open = null_open,
	.opendir = null_open,
	.release = null_release,
	.releasedir = null_release,
	.flush = null_enosys,
	.fsync = null_fsync,
	.fsyncdir = null_fsync,
	.read = null_read,
	.write = null_write,
	.readdir = null_readdir,
	.readdirplus = null_readdirplus,
	.statfs = null_statfs,
	.getxattr = null_getxattr,
	.listxattr = null_listxattr,
};

/* ---- workers that lead and follow -------------------------------------------------- */

/*
 * Workers that all wait in the device are woken in turn, each on a CPU where it
 * finds nothing in the caches. Here only the holder of `lead` waits there. A
 * worker that has read a request keeps the lead while it answers, unless it has
 * fallen behind: several times in a row the next request was already there.
 */
static uint64_t now_ns(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Before it sleeps, the leader looks for the next request for a while. */
static void look(struct fuse_session *se)
{
	struct pollfd p = { .fd = fuse_session_fd(se), .events = POLLIN };
	uint64_t since = now_ns();

	while (!poll(&p, 1, 0) && now_ns() - since < opt.poll_us * 1000ull)
		sched_yield();
}

#define BEHIND_MAX 8
static pthread_mutex_t lead = PTHREAD_MUTEX_INITIALIZER;

static void *lead_worker(void *arg)
{
	struct fuse_session *se = arg;
	struct fuse_buf buf = { .mem = NULL };
	bool mine = false;
	unsigned behind = 0;	/* requests in a row after which one more was waiting */

	for (;;) {
		if (!mine)
			pthread_mutex_lock(&lead);
		mine = true;
		if (fuse_session_exited(se))
			break;
		if (opt.poll_us)
			look(se);
		int n = fuse_session_receive_buf(se, &buf);
		if (n == -EINTR)
			continue;
		if (n <= 0)
			break;
		if (opt.workers > 1) {
			struct pollfd p = { .fd = fuse_session_fd(se), .events = POLLIN };
			behind = poll(&p, 1, 0) == 1 ? behind + 1 : 0;
			if (behind > BEHIND_MAX) {
				behind = 0;
				pthread_mutex_unlock(&lead);
				mine = false;
			}
		}
		fuse_session_process_buf(se, &buf);
	}
	fuse_session_exit(se);
	pthread_mutex_unlock(&lead);
	free(buf.mem);
	return NULL;
}

static int loop_own(struct fuse_session *se)
{
	pthread_t t[64];
	unsigned n = opt.workers < 1 ? 1 : opt.workers > 64 ? 64 : opt.workers;
	for (unsigned i = 0; i < n; i++)
		pthread_create(&t[i], NULL, lead_worker, se);
	for (unsigned i = 0; i < n; i++)
		pthread_join(t[i], NULL);
	return 0;
}

/* ---- what libfuse 3.14 cannot ask for ---------------------------------------------- */

/*
 * The kernel asks for security.capability at each write(2), unless the server
 * promises to clear setuid and capabilities itself (FUSE_HANDLE_KILLPRIV_V2).
 * That flag goes into the answer to INIT, the first one, as it passes.
 */
static ssize_t io_writev(int fd, struct iovec *iov, int count, void *userdata)
{
	static bool init_done;

	(void)userdata;
	if (!init_done && count == 2 && iov[1].iov_len >= sizeof(struct fuse_init_out)) {
		struct fuse_init_out *out = iov[1].iov_base;
		out->flags |= FUSE_HANDLE_KILLPRIV_V2;
		init_done = true;
	}
	return writev(fd, iov, count);
}

static ssize_t io_read(int fd, void *buf, size_t len, void *userdata)
{
	(void)userdata;
	return read(fd, buf, len);
}

static const struct fuse_custom_io own_io = { .writev = io_writev, .read = io_read };

/* ---- main ----------------------------------------------------------------------- */

#define OPT(t, m, v) { t, offsetof(__typeof__(opt), m), v }
static const struct fuse_opt own_opts[] = {
	OPT("data", data, 1), OPT("xattr", xattr, 1), OPT("acl", acl, 1), OPT("open", open, 1),
	OPT("nowriteback", nowriteback, 1), OPT("poll=%u", poll_us, 0),
	OPT("workers=%u", workers, 0), OPT("lead", lead, 1),
	OPT("killpriv", killpriv, 1), FUSE_OPT_END,
};

static int run(struct fuse_session *se, struct fuse_cmdline_opts *o)
{
	int err = 1;

	if (fuse_set_signal_handlers(se))
		return 1;
	if (!fuse_session_mount(se, o->mountpoint)) {
		fuse_daemonize(o->foreground);
		if (opt.killpriv)
			fuse_session_custom_io(se, &own_io, fuse_session_fd(se));
		if (opt.poll_us || opt.lead) {
			err = loop_own(se);
		} else if (o->singlethread) {
			err = fuse_session_loop(se);
		} else {
			struct fuse_loop_config *cfg = fuse_loop_cfg_create();
			fuse_loop_cfg_set_clone_fd(cfg, (unsigned)o->clone_fd);
			fuse_loop_cfg_set_idle_threads(cfg, o->max_idle_threads);
			err = fuse_session_loop_mt(se, cfg);
			fuse_loop_cfg_destroy(cfg);
		}
		fuse_session_unmount(se);
	}
	fuse_remove_signal_handlers(se);
	return err;
}

int main(int argc, char *argv[])
{
	struct fuse_args args = FUSE_ARGS_INIT(argc, argv);
	struct fuse_cmdline_opts o;
	int err = 1;

	if (fuse_opt_parse(&args, &opt, own_opts, NULL) || fuse_parse_cmdline(&args, &o))
		return 2;
	if (o.show_help || !o.mountpoint) {
		fprintf(stderr, "usage: nullfs DIR [-o data,xattr,acl,open,nowriteback,killpriv,"
				"poll=US,lead,workers=N,...] [-f]\n");
		return o.show_help ? 0 : 2;
	}
	table_mask = (1u << 16) - 1;
	table = calloc((size_t)table_mask + 1, sizeof(*table));
	if (!table || arena_init())
		return 1;
	root.st.st_ino = 1;
	root.st.st_mode = S_IFDIR | 0755;
	root.st.st_nlink = 2;
	root.st.st_uid = getuid();
	root.st.st_gid = getgid();
	root.parent = &root;
	stamp(&root.st.st_mtim);
	root.st.st_atim = root.st.st_ctim = root.st.st_mtim;

	struct fuse_session *se = fuse_session_new(&args, &null_ops, sizeof(null_ops), NULL);
	if (se) {
		err = run(se, &o);
		fuse_session_destroy(se);
	}
	free(o.mountpoint);
	fuse_opt_free_args(&args);
	return err ? 1 : 0;
}
