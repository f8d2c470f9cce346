/* SPDX-License-Identifier: BSD-2-Clause */
/* Writing the undo file: an image before the image. */
#include "tools/undo.h"

#include "tools/cli.h"

#include "meta/meta.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

struct undo {
	struct image im;
	struct image *under;
	int fd;
	uint64_t salt, at;	/* length of the file */
	uint8_t *buf;		/* a record */
	uint64_t *saved;	/* hash of units, + 1; 0 none */
	size_t count, mask;
	int failed;		/* something could not be saved */
};

static struct undo *undo_of(struct image *im) { return (struct undo *)im; }

/* ---- units saved already ---------------------------------------------------------- */

static uint64_t *slot_of(const struct undo *u, uint64_t unit)
{
	size_t i = (size_t)(unit * 0x9e3779b97f4a7c15ull >> 20);

	while (u->saved[i & u->mask] && u->saved[i & u->mask] != unit + 1)
		i++;
	return &u->saved[i & u->mask];
}

static int set_grow(struct undo *u)
{
	struct undo old = *u;

	if (u->saved && u->count < u->mask / 2)
		return 0;
	u->mask = u->saved ? u->mask * 2 + 1 : 1023;
	u->saved = calloc(u->mask + 1, sizeof(*u->saved));
	if (!u->saved) {
		*u = old;
		return -ENOMEM;
	}
	for (size_t i = 0; old.saved && i <= old.mask; i++)
		if (old.saved[i])
			*slot_of(u, old.saved[i] - 1) = old.saved[i];
	free(old.saved);
	return 0;
}

/* ---- records ------------------------------------------------------------------------ */

/* The bytes are in u->buf behind the first unit. */
static int record_write(struct undo *u, enum undo_kind kind, uint64_t off,
			uint64_t bytes, size_t len)
{
	size_t padded = (len + UNDO_UNIT - 1) / UNDO_UNIT * UNDO_UNIT + UNDO_UNIT;
	struct disk_undo *d = (void *)u->buf;
	ssize_t n;

	memset(u->buf + UNDO_UNIT + len, 0, padded - UNDO_UNIT - len);
	*d = (struct disk_undo){.magic = put64(UNDO_MAGIC),
				.version = put32(UNDO_VERSION),
				.kind = put32(kind),
				.salt = put64(u->salt),
				.offset = put64(off),
				.bytes = put64(bytes)};
	d->csum = put64(checksum(u->buf, UNDO_UNIT + len));
	n = pwrite(u->fd, u->buf, padded, (off_t)u->at);
	if (n != (ssize_t)padded)
		return n < 0 ? -errno : -ENOSPC;
	u->at += padded;
	return 0;
}

/* Save what is not saved yet of these bytes. */
static int save(struct undo *u, uint64_t off, uint64_t len)
{
	uint64_t unit = off / UNDO_UNIT, end = (off + len + UNDO_UNIT - 1) / UNDO_UNIT;
	int ret = 0;

	while (!ret && unit < end) {
		uint64_t n = 0, from = unit * UNDO_UNIT, bytes;

		while (!ret && unit + n < end && n < UNDO_RECORD_MAX / UNDO_UNIT) {
			ret = set_grow(u);
			if (ret || *slot_of(u, unit + n))
				break;
			*slot_of(u, unit + n) = unit + n + 1;
			u->count++;
			n++;
		}
		unit += n ? n : 1;
		if (ret || !n)
			continue;
		bytes = n * UNDO_UNIT;
		if (bytes > u->under->bytes - from)
			bytes = u->under->bytes - from;
		ret = image_pread(u->under, u->buf + UNDO_UNIT, bytes, from);
		if (!ret)
			ret = record_write(u, UNDO_SAVED, from, bytes, bytes);
	}
	return ret;
}

/* A superblock's slot as it is, with the bytes over it that are to be written. */
static int super_record(struct undo *u, unsigned slot, const uint8_t *over,
			uint64_t off, uint64_t len)
{
	uint64_t start = SUPER_SLOT_OFFSET(slot), end = start + SUPER_BYTES;
	uint8_t *s = u->buf + UNDO_UNIT;

	if (image_pread(u->under, s, SUPER_BYTES, start))
		memset(s, 0, SUPER_BYTES);	/* as undo will take it */
	for (uint64_t at = start; at < end; at++)
		if (at >= off && at < off + len)
			s[at - start] = over[at - off];
	return record_write(u, UNDO_SUPER, start, SUPER_BYTES, SUPER_BYTES);
}

static int supers_record(struct undo *u, const uint8_t *over, uint64_t off,
			 uint64_t len)
{
	int ret = 0;

	for (unsigned i = 0; !ret && i < SUPER_SLOTS; i++)
		if (off < SUPER_SLOT_OFFSET(i) + SUPER_BYTES &&
		    SUPER_SLOT_OFFSET(i) < off + len)
			ret = super_record(u, i, over, off, len);
	return ret;
}

/*
 * All that has to be in the file before these bytes are written; durable when it
 * returns. After a failure there is no more writing: units count as saved that
 * are not in the file.
 */
static int before_write(struct undo *u, const struct iovec *iov, int n, uint64_t off)
{
	uint64_t at = u->at;
	int ret = u->failed;

	for (int i = 0; !ret && i < n; i++) {
		ret = save(u, off, iov[i].iov_len);
		if (!ret)
			ret = supers_record(u, iov[i].iov_base, off, iov[i].iov_len);
		off += iov[i].iov_len;
	}
	if (!ret && u->at != at && fdatasync(u->fd))
		ret = -errno;
	if (ret && !u->failed)
		cli_warn("cannot write the undo file: %s; nothing is changed",
			 strerror(-ret));
	u->failed = ret;
	return ret;
}

/* ---- the image ------------------------------------------------------------------------ */

static int undo_pread(struct image *im, void *buf, size_t len, uint64_t off)
{
	return image_pread(undo_of(im)->under, buf, len, off);
}

static int undo_pwritev(struct image *im, const struct iovec *iov, int n,
			uint64_t off)
{
	int ret = before_write(undo_of(im), iov, n, off);

	return ret ? ret : image_pwritev(undo_of(im)->under, iov, n, off);
}

static int undo_pwrite(struct image *im, const void *buf, size_t len, uint64_t off)
{
	const struct iovec iov = {(void *)buf, len};

	return undo_pwritev(im, &iov, 1, off);
}

static int undo_flush(struct image *im) { return image_flush(undo_of(im)->under); }

static int undo_ensure(struct image *im, uint64_t off, uint64_t len)
{
	return image_ensure(undo_of(im)->under, off, len);
}

/* The head has the length that it had. */
static int undo_resize(struct image *im, uint64_t bytes)
{
	struct image *under = undo_of(im)->under;
	int ret = under->ops->resize(under, bytes);

	im->bytes = under->bytes;
	return ret;
}

/* How fsck leaves the superblocks. */
static int finish(struct undo *u)
{
	int ret = 0;

	for (unsigned i = 0; !ret && i < SUPER_SLOTS; i++)
		ret = image_pread(u->under,
				  u->buf + UNDO_UNIT + (size_t)i * SUPER_BYTES,
				  SUPER_BYTES, SUPER_SLOT_OFFSET(i));
	if (!ret)
		ret = record_write(u, UNDO_END, u->under->bytes,
				   SUPER_SLOTS * SUPER_BYTES,
				   SUPER_SLOTS * SUPER_BYTES);
	if (!ret && fsync(u->fd))
		ret = -errno;
	return ret;
}

static void undo_close(struct image *im)
{
	struct undo *u = undo_of(im);
	int ret = u->count ? finish(u) : 0;

	if (!u->count)
		unlink(u->im.name);
	else if (ret)
		cli_warn("'%s' has no end: %s", u->im.name, strerror(-ret));
	close(u->fd);
	free(u->saved);
	free(u->buf);
	free(u->im.name);
	free(u);
}

/* A volume open for repairs discards nothing. */
static const struct image_ops undo_ops = {
	.pread = undo_pread,
	.pwrite = undo_pwrite,
	.pwritev = undo_pwritev,
	.flush = undo_flush,
	.ensure = undo_ensure,
	.resize = undo_resize,
	.close = undo_close,
};

/* The file's name is durable too. */
static int sync_dir(const char *path)
{
	char *copy = strdup(path);
	int fd = copy ? open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
	int ret = fd < 0 || fsync(fd) ? -errno : 0;

	if (fd >= 0)
		close(fd);
	free(copy);
	return ret;
}

static int begin(struct undo *u)
{
	int ret;

	if (!u->buf || !u->im.name)
		return -ENOMEM;
	if (getrandom(&u->salt, sizeof(u->salt), 0) != sizeof(u->salt))
		return -EIO;
	ret = record_write(u, UNDO_HEAD, 0, u->under->bytes, 0);
	for (unsigned i = 0; !ret && i < SUPER_SLOTS; i++)
		ret = super_record(u, i, NULL, 0, 0);
	return ret;
}

int undo_image(struct image *under, const char *path, struct image **out)
{
	struct undo *u = calloc(1, sizeof(*u));
	int ret;

	if (!u)
		return -ENOMEM;
	u->fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (u->fd < 0) {
		free(u);
		return -errno;
	}
	u->under = under;
	u->im = (struct image){.ops = &undo_ops,
			       .bytes = under->bytes,
			       .blockdev = under->blockdev,
			       .holder = under->holder,
			       .name = strdup(path)};
	u->buf = malloc(UNDO_UNIT + UNDO_RECORD_MAX);
	ret = begin(u);
	if (!ret)
		ret = sync_dir(path);
	if (ret) {
		undo_close(&u->im);
		return ret;
	}
	*out = &u->im;
	return 0;
}
