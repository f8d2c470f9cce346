/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_FS_H
#define SPACEWEAVE_FS_H

/*
 * The file system: the calls a user of files makes, free of FUSE, so that
 * tests need no mount. An inode is known by its number. Each call that changes
 * something is one transaction, visible as one, or says that it is not.
 *
 * Calls return 0 (or a count, where said) or a negative errno. Any thread may
 * make any call. Permissions are the caller's (the kernel checks them); what
 * follows from mode bits (setgid directories, loss of setuid on write) is
 * done here.
 *
 * Locks: fs_rename's (RANK_FS_RENAME) serializes renames of directories;
 * inode locks are taken in order of number; the table of lookup counts
 * (RANK_FS_HANDLES) is taken inside them.
 */

#include "meta/meta.h"

#include <sys/stat.h>
#include <sys/statvfs.h>

struct fs;

struct fs_options {
	bool noatime, relatime, strictatime, nodiratime, lazytime;
	bool sync, dirsync;	/* every change durable before its answer */
};

/* Whose request it is. */
struct fs_cred {
	uint32_t uid, gid;
	uint32_t umask;
	uint32_t pid;
};

/* The volume stays the caller's, to be closed after fs_close(). */
int fs_open(struct volume *v, const struct fs_options *opt, struct fs **out);
/* Evicts what nobody has open any more. */
int fs_close(struct fs *fs);
struct volume *fs_volume(struct fs *fs);

/*
 * Lookup counts. A call that says "counts" adds one to the count of the inode
 * it gives, as an answer to the kernel does; fs_forget() takes n off. An inode
 * without names is freed when its count becomes 0.
 */
void fs_forget(struct fs *fs, uint64_t ino, uint64_t n);
/* Take one on an inode again (a handle that is used after a drop of caches). */
void fs_remember(struct fs *fs, uint64_t ino);

struct fs_entry {
	uint64_t ino;
	struct stat st;
};

/* ---- names -------------------------------------------------------------------- */

/* Counts. "." and ".." too. Names longer than 255 bytes: -ENAMETOOLONG. */
int fs_lookup(struct fs *fs, uint64_t dir, const char *name, struct fs_entry *e);
/* Counts. `mode` with type and permissions, before umask. rdev as stat's. */
int fs_mknod(struct fs *fs, const struct fs_cred *c, uint64_t dir,
	     const char *name, mode_t mode, dev_t rdev, struct fs_entry *e);
int fs_mkdir(struct fs *fs, const struct fs_cred *c, uint64_t dir,
	     const char *name, mode_t mode, struct fs_entry *e);
int fs_symlink(struct fs *fs, const struct fs_cred *c, uint64_t dir,
	       const char *name, const char *target, struct fs_entry *e);
/* Counts. A regular file without a name. */
int fs_tmpfile(struct fs *fs, const struct fs_cred *c, uint64_t dir,
	       mode_t mode, struct fs_entry *e);
/* Counts. */
int fs_link(struct fs *fs, uint64_t ino, uint64_t dir, const char *name,
	    struct fs_entry *e);
int fs_unlink(struct fs *fs, uint64_t dir, const char *name);
int fs_rmdir(struct fs *fs, uint64_t dir, const char *name);
/* flags: RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT of linux/fs.h. */
int fs_rename(struct fs *fs, const struct fs_cred *c, uint64_t dir,
	      const char *name, uint64_t new_dir, const char *new_name,
	      unsigned flags);
int fs_readlink(struct fs *fs, uint64_t ino, char *buf, size_t size);

/*
 * Entries after `cookie` (0: from the start, "." and ".." first), until fn
 * returns nonzero; that entry was not taken. `next` is the cookie after the
 * entry. Cookies stay good while entries come and go. With `plus`, e->st is
 * whole and each entry taken except "." and ".." counts; else, and where the
 * inode cannot be read (e->ino is 0), only st_ino and the type in st_mode are
 * set.
 */
int fs_readdir(struct fs *fs, uint64_t dir, uint64_t cookie, bool plus,
	       int (*fn)(void *ctx, const char *name, const struct fs_entry *e,
			 uint64_t next),
	       void *ctx);

/* ---- attributes ---------------------------------------------------------------- */

int fs_getattr(struct fs *fs, uint64_t ino, struct stat *st);

#define FS_SET_MODE 0x001
#define FS_SET_UID 0x002
#define FS_SET_GID 0x004
#define FS_SET_SIZE 0x008
#define FS_SET_ATIME 0x010
#define FS_SET_MTIME 0x020
#define FS_SET_ATIME_NOW 0x040
#define FS_SET_MTIME_NOW 0x080
#define FS_SET_CTIME 0x100
#define FS_SET_KILL_SUID 0x200	/* the size change comes from an unprivileged open */
#define FS_SET_CACHED 0x400	/* these times a cache owes for what it wrote;
				 * of an immutable file, only if that was taken */
/* Changes what `what` names to st's; *st is the result. */
int fs_setattr(struct fs *fs, uint64_t ino, int what, struct stat *st);

/* btime, which struct stat lacks. */
int fs_btime(struct fs *fs, uint64_t ino, struct timespec *ts);

/* chattr's flags (FS_*_FL of linux/fs.h) and project id. */
int fs_getflags(struct fs *fs, uint64_t ino, uint32_t *flags, uint32_t *projid);
int fs_setflags(struct fs *fs, uint64_t ino, const uint32_t *flags,
		const uint32_t *projid);
/*
 * Who makes a file append-only while a cache writes it: before what the cache has
 * is written out, and after the flag is set. What is appended in between may come
 * in any order.
 */
int fs_append_begin(struct fs *fs, uint64_t ino);
void fs_append_end(struct fs *fs, uint64_t ino);

/* As the system calls; size 0 asks for the length. Return the length. */
ssize_t fs_getxattr(struct fs *fs, uint64_t ino, const char *name, void *buf,
		    size_t size);
/* Names of trusted.* are root's alone to see; without a `c`, all are shown. Who may
 * get and set them, the kernel knows better: it asks for CAP_SYS_ADMIN. */
ssize_t fs_listxattr(struct fs *fs, const struct fs_cred *c, uint64_t ino, char *buf,
		     size_t size);
/* Among the flags of fs_setxattr(): an ACL that is set costs the setgid bit. */
#define FS_XATTR_KILL_SGID 0x10000
int fs_setxattr(struct fs *fs, const struct fs_cred *c, uint64_t ino,
		const char *name, const void *value, size_t size, int flags);
int fs_removexattr(struct fs *fs, const struct fs_cred *c, uint64_t ino,
		   const char *name);

/* ---- contents ------------------------------------------------------------------ */

/* Returns bytes read, less than len only at the end of the file. buf must
 * have room for fs_read_room(len) bytes; the data begin at *data in it. */
size_t fs_read_room(struct fs *fs, size_t len);
ssize_t fs_read(struct fs *fs, uint64_t ino, void *buf, size_t len, off_t off,
		char **data);
/*
 * Writes all or fails. Times move and capabilities go, unless the write comes
 * from a cache whose owner has seen to both (FS_WRITE_CACHED). Such a one may
 * give back, of an append-only file, what is there already; what it has changed
 * below the end is -EPERM and stays as it was, what is new is written.
 */
#define FS_WRITE_KILL_SUID 1u	/* drop setuid and setgid */
#define FS_WRITE_CACHED 2u
ssize_t fs_write(struct fs *fs, uint64_t ino, const void *buf, size_t len,
		 off_t off, unsigned flags);
/* mode: FALLOC_FL_ of linux/falloc.h (keep size, punch hole, zero range). */
int fs_fallocate(struct fs *fs, uint64_t ino, int mode, off_t off, off_t len);
/* SEEK_DATA, SEEK_HOLE; returns the offset. */
off_t fs_lseek(struct fs *fs, uint64_t ino, off_t off, int whence);
/* Shares blocks where it can; returns bytes done. */
ssize_t fs_copy_file_range(struct fs *fs, uint64_t src, off_t src_off,
			   uint64_t dst, off_t dst_off, size_t len);
/* Durable: the file's data, size, attributes and names. Of a directory: its entries. */
int fs_fsync(struct fs *fs, uint64_t ino, bool datasync);
int fs_sync(struct fs *fs);
int fs_statfs(struct fs *fs, struct statvfs *st);
/* FITRIM: give free runs of at least `min` bytes in the range to the host. */
int fs_trim(struct fs *fs, uint64_t off, uint64_t len, uint64_t min, uint64_t *done);

#endif
