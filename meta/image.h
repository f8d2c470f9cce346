/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_IMAGE_H
#define SPACEWEAVE_IMAGE_H

/*
 * An image: the raw bytes a volume lives in, behind a small table. A file and
 * a block device implement it here; the crash simulator in tests/ does too.
 *
 * All offsets and lengths are in bytes. Calls return 0 or a negative errno and
 * are all or nothing from the caller's view: a short read or write is an error
 * (-EIO; -ENOSPC and -EDQUOT from a full host are passed on; reading past the
 * end of the image is -ENXIO). Any thread may call any of them at any time.
 */

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct image;

struct image_ops {
	int (*pread)(struct image *im, void *buf, size_t len, uint64_t off);
	int (*pwrite)(struct image *im, const void *buf, size_t len, uint64_t off);
	int (*pwritev)(struct image *im, const struct iovec *iov, int n,
		       uint64_t off);
	/* Returns when everything written before the call is durable. */
	int (*flush)(struct image *im);
	/* Give the host its blocks back; they read as zeroes or as before. */
	int (*discard)(struct image *im, uint64_t off, uint64_t len);
	/* Make the host set blocks aside, so that writing cannot fail (-ENOSPC);
	   contents are untouched. -EOPNOTSUPP where it can't. */
	int (*ensure)(struct image *im, uint64_t off, uint64_t len);
	/* The first run of blocks at or after *off that the host has, wherever
	   it keeps them; -ENOENT when there is none. May be NULL. */
	int (*mapped)(struct image *im, uint64_t *off, uint64_t *len);
	/* Read or write whole, aligned 4 KiB as other hosts that share the image
	   see them, past the caches of this one. NULL: as pread and pwrite. */
	int (*shared)(struct image *im, bool write, void *buf, size_t len,
		      uint64_t off);
	/* As pread, for what lies alone: read nothing beside it but, without
	   waiting, the `ahead` bytes from there. NULL: pread. */
	int (*fetch)(struct image *im, void *buf, size_t len, uint64_t off,
		     uint64_t ahead);
	/* Begin to write out what is dirty, without waiting. May be NULL. */
	void (*push)(struct image *im);
	/* What is read next comes from the disk, not from the host's memory of it;
	   what was not flushed may stay in that. May be NULL. */
	void (*forget)(struct image *im, uint64_t off, uint64_t len);
	int (*resize)(struct image *im, uint64_t bytes);
	void (*close)(struct image *im);
};

/*
 * Called, if set, by the thread that is about to wait for the host's disk or to
 * move much, so that somebody else can do what it would have done next. Set
 * before any image is in use.
 */
extern void (*image_waits)(void);

struct image {
	const struct image_ops *ops;
	uint64_t bytes;		/* size */
	bool readonly;		/* opened without the right to write */
	bool blockdev;
	char *name;		/* for messages */
	uint64_t holder;	/* what named the holder when it was opened: mmp.c */
};

static inline int image_pread(struct image *im, void *buf, size_t len, uint64_t off)
{
	return im->ops->pread(im, buf, len, off);
}

static inline int image_pwrite(struct image *im, const void *buf, size_t len,
			       uint64_t off)
{
	return im->ops->pwrite(im, buf, len, off);
}

static inline int image_pwritev(struct image *im, const struct iovec *iov, int n,
				uint64_t off)
{
	return im->ops->pwritev(im, iov, n, off);
}

static inline int image_flush(struct image *im) { return im->ops->flush(im); }

static inline int image_discard(struct image *im, uint64_t off, uint64_t len)
{
	return im->ops->discard(im, off, len);
}

static inline int image_ensure(struct image *im, uint64_t off, uint64_t len)
{
	return im->ops->ensure(im, off, len);
}

static inline int image_mapped(struct image *im, uint64_t *off, uint64_t *len)
{
	return im->ops->mapped ? im->ops->mapped(im, off, len) : -EOPNOTSUPP;
}

static inline int image_shared(struct image *im, bool write, void *buf, size_t len,
			       uint64_t off)
{
	if (im->ops->shared)
		return im->ops->shared(im, write, buf, len, off);
	return write ? image_pwrite(im, buf, len, off) :
		       image_pread(im, buf, len, off);
}

static inline int image_fetch(struct image *im, void *buf, size_t len, uint64_t off,
			      uint64_t ahead)
{
	if (im->ops->fetch)
		return im->ops->fetch(im, buf, len, off, ahead);
	return image_pread(im, buf, len, off);
}

static inline void image_push(struct image *im)
{
	if (im->ops->push)
		im->ops->push(im);
}

static inline void image_forget(struct image *im, uint64_t off, uint64_t len)
{
	if (im->ops->forget)
		im->ops->forget(im, off, len);
}

static inline void image_close(struct image *im)
{
	if (im)
		im->ops->close(im);
}

/* malloc() for much that is read in one go: in large pages where the host has
 * them, which spares thousands of faults. */
void *big_alloc(size_t bytes);

enum image_mode {
	IMAGE_READ,		/* O_RDONLY, shared lock */
	IMAGE_WRITE,		/* O_RDWR, exclusive lock */
	IMAGE_PEEK,		/* O_RDONLY, no lock: looking at a live image */
};

/*
 * Open a file or a block device and take its lock (an OFD lock on the whole
 * file; on a block device O_EXCL as well, and a lock on what a loop device
 * stands on). -EBUSY when the lock is held by somebody else, when a file that is
 * to be written has a loop device on it, or when a heart beats in the image
 * (mmp.c: that is watched); -EINVAL when it is neither a regular file nor a
 * block device.
 */
int image_open(const char *path, enum image_mode mode, struct image **out);

/* 0 when nobody on this host has it open for writing, else -EBUSY. Other hosts'
 * heartbeats are not waited for. */
int image_released(const char *path);

/* Create or open for mkfs: as IMAGE_WRITE; a file that is not there is made. */
int image_create(const char *path, struct image **out);

/*
 * By what other name the same bytes can be written: of a file, the loop device
 * that stands on it; of a loop device, the file below. False: by none.
 */
bool image_other(const char *path, char *buf, size_t len);

/* The descriptor of a file image, or -1. */
int image_fd(const struct image *im);

#endif
