/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * An image in a file or on a block device: buffered I/O, one descriptor.
 */
#include "meta/image.h"
#include "meta/meta_priv.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct file_image {
	struct image im;
	int fd;
	int lone;		/* the same, without the kernel's guess what follows */
	int direct;		/* past the page cache; -1: not opened yet */
	int below;		/* has the lock on what a loop device stands on; -1 */
};

static int fd_of(const struct image *im)
{
	return ((const struct file_image *)im)->fd;
}

/* Open once more what a descriptor stands for, whatever its name is by now. */
static int fd_again(int fd, int flags)
{
	char path[40];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return open(path, flags | O_CLOEXEC);
}

void (*image_waits)(void);

#define MUCH_BYTES (64u << 10)

static void waits(void)
{
	if (image_waits)
		image_waits();
}

/* What the host has in memory is read without telling anybody. */
static int fd_pread(int fd, void *buf, size_t len, uint64_t off)
{
	int flags = image_waits && len < MUCH_BYTES ? RWF_NOWAIT : 0;

	while (len) {
		struct iovec iov = {buf, len};
		ssize_t n;

		if (!flags)
			waits();
		n = preadv2(fd, &iov, 1, (off_t)off, flags);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && flags && (errno == EAGAIN || errno == EOPNOTSUPP)) {
			flags = 0;
			continue;
		}
		if (n < 0)
			return -errno;
		if (n == 0)
			return -ENXIO;
		buf = (char *)buf + n;
		len -= (size_t)n;
		off += (size_t)n;
	}
	return 0;
}

static int file_pread(struct image *im, void *buf, size_t len, uint64_t off)
{
	return fd_pread(fd_of(im), buf, len, off);
}

static int file_fetch(struct image *im, void *buf, size_t len, uint64_t off,
		      uint64_t ahead)
{
	int fd = ((struct file_image *)im)->lone;

	if (ahead)
		posix_fadvise(fd, (off_t)off, (off_t)ahead, POSIX_FADV_WILLNEED);
	return fd_pread(fd, buf, len, off);
}

static int file_pwrite(struct image *im, const void *buf, size_t len, uint64_t off)
{
	if (len >= MUCH_BYTES)
		waits();
	while (len) {
		ssize_t n = pwrite(fd_of(im), buf, len, (off_t)off);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -EIO;
		buf = (const char *)buf + n;
		len -= (size_t)n;
		off += (size_t)n;
	}
	return 0;
}

static int file_pwritev(struct image *im, const struct iovec *iov, int n,
			uint64_t off)
{
	size_t want = 0;
	ssize_t got;

	for (int i = 0; i < n; i++)
		want += iov[i].iov_len;
	if (want >= MUCH_BYTES)
		waits();
	got = pwritev(fd_of(im), iov, n, (off_t)off);
	if (got == (ssize_t)want)
		return 0;
	if (got < 0 && errno != EINTR)
		return -errno;
	/* Cut short: piece by piece. */
	for (int i = 0; i < n; i++) {
		int r = file_pwrite(im, iov[i].iov_base, iov[i].iov_len, off);

		if (r)
			return r;
		off += iov[i].iov_len;
	}
	return 0;
}

static int file_flush(struct image *im)
{
	waits();
	return fdatasync(fd_of(im)) ? -errno : 0;
}

/* tmpfs gives up when the thread was stopped or frozen meanwhile. */
static int fd_allocate(int fd, int mode, uint64_t off, uint64_t len)
{
	int r;

	do
		r = fallocate(fd, mode, (off_t)off, (off_t)len);
	while (r && errno == EINTR);
	return r ? -errno : 0;
}

static int file_discard(struct image *im, uint64_t off, uint64_t len)
{
	if (im->blockdev) {
		uint64_t range[2] = {off, len};

		return ioctl(fd_of(im), BLKDISCARD, range) ? -errno : 0;
	}
	return fd_allocate(fd_of(im), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			   off, len);
}

static int file_ensure(struct image *im, uint64_t off, uint64_t len)
{
	if (im->blockdev)
		return 0;
	return fd_allocate(fd_of(im), FALLOC_FL_KEEP_SIZE, off, len);
}

static int file_mapped(struct image *im, uint64_t *off, uint64_t *len)
{
	struct {
		struct fiemap head;
		struct fiemap_extent e;
	} map;

	do {
		map.head = (struct fiemap){.fm_start = *off,
					   .fm_length = FIEMAP_MAX_OFFSET - *off,
					   .fm_extent_count = 1};
		if (ioctl(fd_of(im), FS_IOC_FIEMAP, &map))
			return -errno;
		if (!map.head.fm_mapped_extents)
			return -ENOENT;
		if (map.e.fe_logical > *off)
			*off = map.e.fe_logical;
		*len = map.e.fe_logical + map.e.fe_length - *off;
		if (!(map.e.fe_flags & (FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_SHARED)))
			return 0;
		*off += *len;	/* promised, not there; or shared with others */
	} while (!(map.e.fe_flags & FIEMAP_EXTENT_LAST));
	return -ENOENT;
}

static int file_shared(struct image *im, bool write, void *buf, size_t len,
		       uint64_t off)
{
	struct file_image *f = (struct file_image *)im;
	ssize_t done;

	if (f->direct < 0)
		f->direct = fd_again(f->fd, (im->readonly ? O_RDONLY : O_RDWR) |
						    O_DIRECT);
	if (f->direct < 0)	/* a file system without: then it has no other hosts */
		return write ? file_pwrite(im, buf, len, off) :
			       file_pread(im, buf, len, off);
	done = write ? pwrite(f->direct, buf, len, (off_t)off) :
		       pread(f->direct, buf, len, (off_t)off);
	return done == (ssize_t)len ? 0 : done < 0 ? -errno : -EIO;
}

static void file_push(struct image *im)
{
	sync_file_range(fd_of(im), 0, 0, SYNC_FILE_RANGE_WRITE);
}

static void file_forget(struct image *im, uint64_t off, uint64_t len)
{
	posix_fadvise(fd_of(im), (off_t)off, (off_t)len, POSIX_FADV_DONTNEED);
}

static int file_resize(struct image *im, uint64_t bytes)
{
	if (im->blockdev)
		return bytes <= im->bytes ? 0 : -ENOSPC;
	if (ftruncate(fd_of(im), (off_t)bytes))
		return -errno;
	im->bytes = bytes;
	return 0;
}

static void file_close(struct image *im)
{
	struct file_image *f = (struct file_image *)im;

	if (f->direct >= 0)
		close(f->direct);
	if (f->lone != f->fd)
		close(f->lone);
	if (f->below >= 0)
		close(f->below);
	close(f->fd);
	free(im->name);
	free(im);
}

static const struct image_ops file_ops = {
	.pread = file_pread,
	.fetch = file_fetch,
	.pwrite = file_pwrite,
	.pwritev = file_pwritev,
	.flush = file_flush,
	.discard = file_discard,
	.ensure = file_ensure,
	.mapped = file_mapped,
	.shared = file_shared,
	.push = file_push,
	.forget = file_forget,
	.resize = file_resize,
	.close = file_close,
};

int image_fd(const struct image *im)
{
	return im->ops == &file_ops ? fd_of(im) : -1;
}

static int fd_lock(int fd, enum image_mode mode)
{
	struct flock fl = {.l_type = mode == IMAGE_READ ? F_RDLCK : F_WRLCK,
			   .l_whence = SEEK_SET};

	if (fcntl(fd, F_OFD_SETLK, &fl) == 0)
		return 0;
	return errno == EAGAIN || errno == EACCES ? -EBUSY : -errno;
}

/* All locks that keep others out, under whatever name they open these bytes. */
static int image_lock(struct file_image *f, enum image_mode mode)
{
	int r;

	if (mode == IMAGE_PEEK)
		return 0;
	r = fd_lock(f->fd, mode);
	if (!r)
		r = loop_lock(f->fd, f->im.bytes, mode == IMAGE_WRITE, &f->below);
	if (!r && mode == IMAGE_WRITE && loop_over(f->fd))
		r = -EBUSY;
	return r;
}

static int fd_bytes(int fd, const struct stat *st, uint64_t *bytes)
{
	*bytes = (uint64_t)st->st_size;
	if (!S_ISREG(st->st_mode) && !S_ISBLK(st->st_mode))
		return -EINVAL;
	if (S_ISBLK(st->st_mode) && ioctl(fd, BLKGETSIZE64, bytes))
		return -errno;
	return 0;
}

/* Takes `fd`, on failure too. */
static int image_wrap(int fd, const char *path, enum image_mode mode,
		      struct image **out)
{
	struct file_image *f = calloc(1, sizeof(*f));
	struct stat st;
	int r;

	if (!f) {
		close(fd);
		return -ENOMEM;
	}
	f->im.ops = &file_ops;
	f->fd = f->lone = fd;
	f->direct = f->below = -1;
	r = fstat(fd, &st) ? -errno : fd_bytes(fd, &st, &f->im.bytes);
	if (!r)
		r = image_lock(f, mode);
	if (!r) {
		f->im.name = strdup(path);
		r = f->im.name ? 0 : -ENOMEM;
	}
	if (r) {
		image_close(&f->im);
		return r;
	}
	f->im.readonly = mode != IMAGE_WRITE;
	f->im.blockdev = S_ISBLK(st.st_mode);
	if (mode != IMAGE_PEEK) {
		int lone = fd_again(fd, O_RDONLY);

		if (lone >= 0) {
			posix_fadvise(lone, 0, 0, POSIX_FADV_RANDOM);
			f->lone = lone;
		}
	}
	*out = &f->im;
	return 0;
}

static int image_get(const char *path, int flags, enum image_mode mode,
		     struct image **out)
{
	struct stat st;
	int fd;

	/* A device that somebody has mounted refuses O_EXCL. */
	if (mode == IMAGE_WRITE && stat(path, &st) == 0 && S_ISBLK(st.st_mode))
		flags = (flags & ~O_CREAT) | O_EXCL;
	fd = open(path, flags | O_CLOEXEC | O_NONBLOCK, 0666);
	return fd < 0 ? -errno : image_wrap(fd, path, mode, out);
}

static int image_open_flags(const char *path, int flags, enum image_mode mode,
			    struct image **out)
{
	int r = image_get(path, flags, mode, out);

	if (r)
		return r;
	r = mode == IMAGE_PEEK ? 0 : mmp_watch(*out);
	if (r) {
		image_close(*out);
		*out = NULL;
	}
	return r;
}

int image_open(const char *path, enum image_mode mode, struct image **out)
{
	return image_open_flags(path, mode == IMAGE_WRITE ? O_RDWR : O_RDONLY,
				mode, out);
}

int image_released(const char *path)
{
	struct image *im;
	int r = image_get(path, O_RDONLY, IMAGE_READ, &im);

	if (r == 0)
		image_close(im);
	return r;
}

int image_create(const char *path, struct image **out)
{
	return image_open_flags(path, O_RDWR | O_CREAT, IMAGE_WRITE, out);
}

void *big_alloc(size_t bytes)
{
	const size_t large = 2u << 20;
	void *p;

	if (bytes < large)
		return malloc(bytes ? bytes : 1);
	bytes = (bytes + large - 1) / large * large;
	p = aligned_alloc(large, bytes);
	if (p)
		madvise(p, bytes, MADV_HUGEPAGE);
	return p;
}
