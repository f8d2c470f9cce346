/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * spaceweave undo FILE IMAGE: takes back what fsck.spaceweave -u FILE did. All
 * records are verified before the first byte is written. A record that is cut
 * off at the end of the file is no loss: fsck stopped there before it touched
 * the image.
 */
#include "tools/undo.h"

#include "tools/cli.h"
#include "tools/verbs.h"

#include "meta/meta.h"
#include "meta/repair.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char undo_usage[] =
"usage: spaceweave undo [-fnh] FILE IMAGE\n"
"Take back what 'fsck.spaceweave -u FILE' has changed in an image.\n"
"  -f   even if the image was changed since\n"
"  -n   only verify FILE, and say what would be done\n"
"  -h   this help\n";

struct undo {
	const char *path;
	int fd;
	uint64_t bytes, salt;		/* of the file */
	uint64_t bytes_before;		/* of the image */
	struct disk_undo *rec;		/* and its bytes */
	struct image *im;
	struct heart *heart;		/* holds it; NULL: nobody's has beaten */
	uint64_t saved;
	/* Is it the image that fsck left, and nobody has used since? */
	uint8_t slots[SUPER_SLOTS][SUPER_BYTES];	/* of the image, now */
	uint8_t known[SUPER_SLOTS];	/* which sectors of them are fsck's */
	bool told;			/* the file knows what is fsck's */
	bool ended, as_left;
	uint64_t bytes_after;		/* of the image; with `ended` */
};

/* A write that was cut off may have left some sectors old and some new. */
#define SECTOR 512u
#define ALL_KNOWN ((1u << SUPER_BYTES / SECTOR) - 1)

/* The record at `at`: its length in the file, 0 when there is none. */
static uint64_t record_read(struct undo *u, uint64_t at)
{
	struct disk_undo *d = u->rec;
	uint64_t len, sum;

	if (at + UNDO_UNIT > u->bytes ||
	    pread(u->fd, d, UNDO_UNIT, (off_t)at) != UNDO_UNIT ||
	    get64(d->magic) != UNDO_MAGIC || get32(d->version) != UNDO_VERSION)
		return 0;
	len = get32(d->kind) == UNDO_HEAD ? 0 : get64(d->bytes);
	if (len > UNDO_RECORD_MAX || at + UNDO_UNIT + len > u->bytes ||
	    pread(u->fd, d + 1, len, (off_t)(at + UNDO_UNIT)) != (ssize_t)len)
		return 0;
	sum = get64(d->csum);
	d->csum = put64(0);
	if (checksum(d, UNDO_UNIT + len) != sum)
		return 0;
	return UNDO_UNIT + (len + UNDO_UNIT - 1) / UNDO_UNIT * UNDO_UNIT;
}

static bool head_read(struct undo *u)
{
	if (!record_read(u, 0) || get32(u->rec->kind) != UNDO_HEAD) {
		cli_warn("'%s' is not an undo file", u->path);
		return false;
	}
	u->salt = get64(u->rec->salt);
	/* fsck may have made it longer */
	u->bytes_before = get64(u->rec->bytes);
	if (u->bytes_before <= u->im->bytes)
		return true;
	cli_warn("'%s' is for an image of %" PRIu64 " bytes, not %" PRIu64,
		 u->path, get64(u->rec->bytes), u->im->bytes);
	return false;
}

/* One that cannot be read counts as zeroes, for fsck too. */
static void slots_load(struct undo *u)
{
	for (unsigned i = 0; i < SUPER_SLOTS; i++)
		if (image_pread(u->im, u->slots[i], SUPER_BYTES,
				SUPER_SLOT_OFFSET(i)))
			memset(u->slots[i], 0, SUPER_BYTES);
}

/* Something that fsck has seen or written in a slot. */
static int super_compare(struct undo *u)
{
	const uint8_t *then = (const uint8_t *)(u->rec + 1);
	unsigned slot = get64(u->rec->offset) == SUPER_SLOT_OFFSET(1);

	if (get64(u->rec->offset) != SUPER_SLOT_OFFSET(slot) ||
	    get64(u->rec->bytes) != SUPER_BYTES)
		return -EINVAL;
	u->told = true;
	for (unsigned i = 0; i < SUPER_BYTES / SECTOR; i++)
		if (!memcmp(u->slots[slot] + i * SECTOR, then + i * SECTOR, SECTOR))
			u->known[slot] |= (uint8_t)(1u << i);
	return 0;
}

/* How fsck left the superblocks. */
static int end_compare(struct undo *u)
{
	if (get64(u->rec->bytes) != sizeof(u->slots))
		return -EINVAL;
	u->ended = true;
	u->bytes_after = get64(u->rec->offset);
	u->as_left = !memcmp(u->rec + 1, u->slots, sizeof(u->slots));
	return 0;
}

static bool is_changed(const struct undo *u)
{
	if (u->ended && u->im->bytes != u->bytes_after &&
	    u->im->bytes != u->bytes_before)
		return true;
	if (!u->told)
		return u->ended && !u->as_left;
	for (unsigned i = 0; i < SUPER_SLOTS; i++)
		if (u->known[i] != ALL_KNOWN)
			return true;
	return false;
}

/* All but the block that says who holds the image: where a heart beats, that is ours. */
static int put_back(struct undo *u, const uint8_t *bytes, uint64_t off, uint64_t len)
{
	uint64_t end = off + len, after = MMP_OFFSET + MMP_BYTES;
	int ret = heart_look(u->heart);

	if (ret)
		return ret;
	if (!u->heart || end <= MMP_OFFSET || off >= after)
		return image_pwrite(u->im, bytes, len, off);
	if (off < MMP_OFFSET)
		ret = image_pwrite(u->im, bytes, MMP_OFFSET - off, off);
	if (!ret && end > after)
		ret = image_pwrite(u->im, bytes + (after - off), end - after, after);
	return ret;
}

static int record_use(struct undo *u, bool write)
{
	uint64_t off = get64(u->rec->offset), len = get64(u->rec->bytes);

	if (get32(u->rec->kind) == UNDO_END)
		return write ? 0 : end_compare(u);
	if (get32(u->rec->kind) == UNDO_SUPER)
		return write ? 0 : super_compare(u);
	if (get32(u->rec->kind) != UNDO_SAVED)
		return -EINVAL;
	if (write)
		return put_back(u, (const uint8_t *)(u->rec + 1), off, len);
	if (off > u->im->bytes || len > u->im->bytes - off)
		return -EINVAL;
	u->saved += len;
	return 0;
}

/* All records in order. False after an error, which has been reported. */
static bool each_record(struct undo *u, bool write)
{
	uint64_t at = UNDO_UNIT, len;

	while ((len = record_read(u, at)) && get64(u->rec->salt) == u->salt) {
		int ret = record_use(u, write);

		if (ret) {
			cli_warn("'%s': %s", write ? u->im->name : u->path,
				 strerror(-ret));
			return false;
		}
		at += len;
		cli_progress(write ? "undo" : "verify", at, u->bytes);
	}
	/* What is cut off was the last: nothing may follow it. */
	for (; at < u->bytes; at += UNDO_UNIT)
		if (record_read(u, at) && get64(u->rec->salt) == u->salt) {
			cli_warn("'%s' is damaged before byte %" PRIu64,
				 u->path, at);
			return false;
		}
	return true;
}

static int undo(struct undo *u, bool force, bool look)
{
	char size[16];
	int ret;

	slots_load(u);
	if (!head_read(u) || !each_record(u, false))
		return 1;
	if (!u->ended)
		cli_warn("'%s' has no end: fsck was cut off", u->path);
	if (is_changed(u) && !force) {
		cli_warn("'%s' was changed since, or is not the image that '%s' is "
			 "for; -f takes back what fsck did nevertheless",
			 u->im->name, u->path);
		return 1;
	}
	if (!look) {
		if (!each_record(u, true))
			return 1;
		ret = image_flush(u->im);
		if (!ret && u->im->bytes > u->bytes_before) {
			ret = u->im->ops->resize(u->im, u->bytes_before);
			if (!ret)
				ret = image_flush(u->im);
		}
		if (ret) {
			cli_warn("'%s': %s", u->im->name, strerror(-ret));
			return 1;
		}
	}
	printf("%s: %s %s\n", u->im->name, cli_size(u->saved, size),
	       look ? "to be put back" : "put back");
	return 0;
}

static void lost(void *ctx, int err, const char *why)
{
	const struct undo *u = ctx;

	cli_warn("'%s': %s failed: %s; run undo again where it is held", u->im->name,
		 why, strerror(-err));
	_exit(1);
}

/* No other host shall have it meanwhile, and what is compared is what the disk has. */
static int take_image(struct undo *u, const char *image, bool look)
{
	char text[CLI_IN_USE];
	int ret = image_open(image, look ? IMAGE_READ : IMAGE_WRITE, &u->im);

	if (!ret && !look)
		ret = heart_hold(u->im, cli_program, lost, u, &u->heart);
	if (!ret && !look)
		ret = super_settle(u->im);
	if (ret == -EBUSY)
		cli_warn("%s", cli_in_use(image, image, text, sizeof(text)));
	else if (ret)
		cli_warn("cannot open '%s': %s", image, strerror(-ret));
	return ret;
}

static int take_file(struct undo *u)
{
	struct stat st;

	u->rec = malloc(UNDO_UNIT + UNDO_RECORD_MAX);
	/* a FIFO is not waited for */
	u->fd = open(u->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (!u->rec || u->fd < 0 || fstat(u->fd, &st)) {
		cli_warn("cannot open '%s': %s", u->path, strerror(errno));
		return -EIO;
	}
	u->bytes = (uint64_t)st.st_size;
	return 0;
}

static int run(const char *file, const char *image, bool force, bool look)
{
	struct undo u = {.path = file, .fd = -1};
	int ret = 1;

	if (!take_image(&u, image, look) && !take_file(&u))
		ret = undo(&u, force, look);
	if (u.fd >= 0)
		close(u.fd);
	free(u.rec);
	heart_release(u.heart);
	if (u.im)
		image_close(u.im);
	return ret;
}

int verb_undo(int argc, char **argv)
{
	bool force = false, look = false;
	int c;

	optind = 1;
	while ((c = getopt(argc, argv, "fnh")) != -1) {
		switch (c) {
		case 'f':
			force = true;
			break;
		case 'n':
			look = true;
			break;
		case 'h':
			fputs(undo_usage, stdout);
			return 0;
		default:
			fputs(undo_usage, stderr);
			return 1;
		}
	}
	if (argc - optind != 2) {
		fputs(undo_usage, stderr);
		return 1;
	}
	return run(argv[optind], argv[optind + 1], force, look);
}
