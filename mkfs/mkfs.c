/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * mkfs.spaceweave: writes an empty volume. In order:
 *
 *   1. open the image under its lock: what is mounted is refused here;
 *   2. look at what stands there: without -f nothing recognisable is
 *      overwritten, in a regular file nothing but zeroes;
 *   3. settle the geometry (meta's volume_geometry_check does the arithmetic);
 *   4. size the file, discard, volume_format().
 *
 * With -n it ends after step 3 and opens the image for reading only.
 */
#include "meta/meta.h"
#include "tools/cli.h"

#include <blkid/blkid.h>
#include <uuid/uuid.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define EXIT_USAGE 1

struct options {
	bool force, dry, quiet, verbose;
	uint64_t block_bytes;
	uint64_t size;
	const char *image;
	struct volume_geometry geometry;
};

static const char usage_text[] =
"usage: mkfs.spaceweave [-fnqvKV] [-b block] [-J journal] [-L label] [-U uuid]\n"
"                       IMAGE [SIZE]\n"
"Write an empty Spaceweave volume into IMAGE, a file or a block device. A file\n"
"that does not exist is made, sparse, SIZE bytes long.\n"
"  -b SIZE    block size, 4K to 64K (4K)\n"
"  -J SIZE    journal size (by the volume's size)\n"
"  -L LABEL   name of the volume, at most 63 bytes\n"
"  -U UUID    its UUID, or 'random' or 'time' (random)\n"
"  -f         overwrite what is there\n"
"  -K         do not discard the old blocks first\n"
"  -n         only say what would be done\n"
"  -q, -v     say nothing; say more\n"
"  -h, -V     this help; the version\n"
"SIZE takes K, M, G, T or P.\n";

static void usage(void)
{
	fputs(usage_text, stderr);
	exit(EXIT_USAGE);
}

static uint64_t size_argument(const char *what, const char *text)
{
	uint64_t n;
	int ret = cli_parse_size(text, &n);

	if (ret)
		cli_die(EXIT_USAGE, "%s '%s': %s", what, text,
			ret == -ERANGE ? "too large" : "not a size");
	return n;
}

static void parse_uuid(const char *text, uint8_t out[16])
{
	if (!strcmp(text, "random"))
		uuid_generate(out);
	else if (!strcmp(text, "time"))
		uuid_generate_time(out);
	else if (uuid_parse(text, out))
		cli_die(EXIT_USAGE, "UUID '%s': not a UUID", text);
}

static void parse_options(int argc, char **argv, struct options *o)
{
	int c;

	uuid_generate(o->geometry.uuid);
	while ((c = getopt(argc, argv, "fnqvKVhb:J:L:U:")) != -1) {
		switch (c) {
		case 'f':
			o->force = true;
			break;
		case 'n':
			o->dry = true;
			break;
		case 'q':
			o->quiet = true;
			break;
		case 'v':
			o->verbose = true;
			break;
		case 'K':
			o->geometry.discard = false;
			break;
		case 'b':
			o->block_bytes = size_argument("block size", optarg);
			break;
		case 'J':
			o->geometry.journal_bytes =
				size_argument("journal size", optarg);
			break;
		case 'L':
			if (strlen(optarg) >= LABEL_BYTES)
				cli_die(EXIT_USAGE,
					"label '%s': longer than %u bytes",
					optarg, LABEL_BYTES - 1);
			strcpy(o->geometry.label, optarg);
			break;
		case 'U':
			parse_uuid(optarg, o->geometry.uuid);
			break;
		case 'V':
			cli_version();
			exit(cli_finish(0, 1));
		case 'h':
			fputs(usage_text, stdout);
			exit(cli_finish(0, 1));
		default:
			usage();
		}
	}
	if (argc - optind < 1 || argc - optind > 2)
		usage();
	o->image = argv[optind];
	if (argc - optind == 2) {
		o->size = size_argument("size", argv[optind + 1]);
		if (!o->size)
			cli_die(EXIT_USAGE, "size 0: nothing fits");
	}
}

static unsigned block_shift(uint64_t bytes)
{
	unsigned shift = BLOCK_SHIFT_MIN;

	if (!bytes)
		return 0;
	while (shift < BLOCK_SHIFT_MAX && (1ull << shift) < bytes)
		shift++;
	if (1ull << shift != bytes)
		cli_die(EXIT_USAGE,
			"block size %" PRIu64 ": a power of two from 4K to 64K",
			bytes);
	return shift;
}

/* ---- what stands there ------------------------------------------------------ */

static bool is_volume(struct image *im, char *what, size_t len)
{
	struct disk_super s;
	unsigned slot;
	char msg[200];
	int ret = super_load(im, &s, &slot, msg, sizeof(msg));

	if (ret == -EINVAL || ret == -ENXIO || ret == -EIO)
		return false;
	if (ret || !s.label[0])
		snprintf(what, len, "a Spaceweave volume");
	else
		snprintf(what, len, "a Spaceweave volume, label '%.63s'",
			 s.label);
	return true;
}

/* What libblkid finds in it: a file system, a RAID, a partition table. */
static bool is_known(int fd, char *what, size_t len)
{
	const char *type = NULL, *label = NULL;
	blkid_probe pr = blkid_new_probe();
	int ret;

	if (!pr)
		return false;
	if (blkid_probe_set_device(pr, fd, 0, 0)) {
		blkid_free_probe(pr);
		return false;
	}
	blkid_probe_enable_superblocks(pr, 1);
	blkid_probe_set_superblocks_flags(pr, BLKID_SUBLKS_LABEL |
						      BLKID_SUBLKS_TYPE);
	blkid_probe_enable_partitions(pr, 1);
	ret = blkid_do_fullprobe(pr);
	if (ret == 0) {
		if (blkid_probe_lookup_value(pr, "TYPE", &type, NULL) &&
		    blkid_probe_lookup_value(pr, "PTTYPE", &type, NULL))
			type = "something libblkid knows";
		blkid_probe_lookup_value(pr, "LABEL", &label, NULL);
		if (label)
			snprintf(what, len, "%s, label '%.63s'", type, label);
		else
			snprintf(what, len, "%s", type);
	}
	blkid_free_probe(pr);
	return ret == 0;
}

/* Does the head of a regular file hold anything but zeroes? */
static bool holds_data(struct image *im)
{
	uint64_t len = im->bytes < HEAD_BYTES ? im->bytes : HEAD_BYTES;
	bool found = false;
	char *buf;

	if (im->blockdev || !len)
		return false;
	buf = malloc(len);
	if (!buf)
		return false;
	if (image_pread(im, buf, len, 0))
		found = true;
	else
		found = buf[0] || memcmp(buf, buf + 1, len - 1);
	free(buf);
	return found;
}

static int refuse(const struct options *o, struct image *im)
{
	char what[160];

	if (o->force)
		return 0;
	if (is_volume(im, what, sizeof(what)) ||
	    (image_fd(im) >= 0 && is_known(image_fd(im), what, sizeof(what)))) {
		cli_warn("'%s' contains %s; -f overwrites it", o->image, what);
		return -EEXIST;
	}
	if (holds_data(im)) {
		cli_warn("'%s' holds data; -f overwrites it", o->image);
		return -EEXIST;
	}
	return 0;
}

/* ---- the work ----------------------------------------------------------------- */

/* Open it, or make it. *im is NULL with -n when there is nothing yet. */
static int open_image(const struct options *o, bool *made, struct image **im)
{
	struct stat st;
	char text[CLI_IN_USE];
	int ret;

	*im = NULL;
	*made = stat(o->image, &st) != 0;
	if (*made && errno != ENOENT) {
		cli_warn("cannot open '%s': %s", o->image, strerror(errno));
		return -errno;
	}
	if (!*made && !S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) {
		cli_warn("'%s' is neither a regular file nor a block device",
			 o->image);
		return -EINVAL;
	}
	if (*made && !o->size) {
		cli_warn("'%s' does not exist: a SIZE is needed to make it",
			 o->image);
		return -ENOENT;
	}
	if (*made && o->dry)
		return 0;
	ret = o->dry ? image_open(o->image, IMAGE_READ, im) :
		       image_create(o->image, im);
	/* What -n opens for reading would be refused for writing. */
	if (!ret && o->dry && !(*im)->blockdev &&
	    image_other(o->image, text, sizeof(text))) {
		image_close(*im);
		*im = NULL;
		ret = -EBUSY;
	}
	if (ret == -EBUSY)
		cli_warn("%s", cli_in_use(o->image, o->image, text,
					  sizeof(text)));
	else if (ret)
		cli_warn("cannot open '%s': %s", o->image, strerror(-ret));
	/* somebody else may have made it just before */
	if (ret || (*im)->bytes)
		*made = false;
	return ret;
}

static int settle_geometry(struct options *o, const struct image *im)
{
	struct volume_geometry *g = &o->geometry;
	char msg[200], a[16], b[16];
	int ret;

	g->bytes = o->size ? o->size : im ? im->bytes : 0;
	g->block_shift = block_shift(o->block_bytes);
	if (!g->root_mode) {
		g->root_mode = 0755;
		g->root_uid = getuid();
		g->root_gid = getgid();
	}
	if (im && im->blockdev && g->bytes > im->bytes) {
		cli_warn("'%s' is only %s long, not %s", o->image,
			 cli_size(im->bytes, a), cli_size(g->bytes, b));
		return -ENOSPC;
	}
	ret = volume_geometry_check(g, msg, sizeof(msg));
	if (ret)
		cli_warn("%s", msg);
	return ret;
}

static void report(const struct options *o)
{
	const struct volume_geometry *g = &o->geometry;
	char a[16], b[16], c[16], uuid[37];

	if (o->quiet)
		return;
	cli_uuid(g->uuid, uuid);
	printf("%s: %s in %" PRIu64 " blocks of %s, journal %s\n", o->image,
	       cli_size(g->bytes, a), g->bytes >> g->block_shift,
	       cli_size(1ull << g->block_shift, b),
	       cli_size(g->journal_bytes, c));
	printf("UUID %s%s%s\n", uuid, g->label[0] ? ", label " : "", g->label);
	if (o->dry)
		printf("nothing was written (-n)\n");
}

static int write_volume(const struct options *o, struct image *im)
{
	const struct volume_geometry *g = &o->geometry;
	uint64_t bytes = o->size && !im->blockdev ? o->size : g->bytes;
	int ret;

	if (!im->blockdev && im->bytes < bytes) {
		ret = im->ops->resize(im, bytes);
		if (ret) {
			cli_warn("cannot make '%s' %" PRIu64 " bytes long: %s",
				 o->image, bytes, strerror(-ret));
			return ret;
		}
	}
	ret = volume_format(im, g);
	if (ret)
		cli_warn("cannot write '%s': %s", o->image, cli_error(ret));
	return ret;
}

int main(int argc, char **argv)
{
	struct options o = {.geometry.discard = true};
	struct timespec t0, t1;
	struct image *im;
	bool made;
	int ret;

	cli_init(argv[0]);
	parse_options(argc, argv, &o);
	clock_gettime(CLOCK_MONOTONIC, &t0);
	ret = open_image(&o, &made, &im);
	if (ret)
		return 1;
	if (im && !made)
		ret = refuse(&o, im);
	if (!ret)
		ret = settle_geometry(&o, im);
	if (!ret && !o.dry)
		ret = write_volume(&o, im);
	image_close(im);
	if (ret) {
		if (made)
			unlink(o.image);
		return 1;
	}
	report(&o);
	if (o.verbose && !o.dry) {
		clock_gettime(CLOCK_MONOTONIC, &t1);
		printf("%.3f s\n", (double)(t1.tv_sec - t0.tv_sec) +
					   (double)(t1.tv_nsec - t0.tv_nsec) / 1e9);
	}
	return cli_finish(0, 1);
}
