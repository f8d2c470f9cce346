/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * mangle IMAGE SEED OLDER: damages an image at random, as a disk, a cable or a
 * controller might: nothing is sealed again. Prints what it did.
 *
 * Some bits flipped; 512 bytes to 64 KiB of noise, of zeroes or of what is
 * somewhere else; two blocks swapped; blocks as they were in OLDER, an earlier
 * copy of the image; rarely the image cut short. Half of it where metadata is:
 * in blocks that begin as ours do, or in the volume's first ones; the other half
 * anywhere that is not zero. Every eighth time a share of all nodes instead.
 */
#include "meta/format.h"
#include "tests/mnt/pattern.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define BLOCK 4096

static uint64_t state;
static uint8_t *now, *older;
static uint64_t *used, *meta, *differ;
static size_t used_n, meta_n, differ_n;
static uint64_t blocks;

static uint64_t rnd(uint64_t below)
{
	state = pattern_mix(state);
	return state % below;
}

static void *load(const char *path, uint64_t *bytes)
{
	int fd = open(path, O_RDONLY);
	struct stat st;
	uint8_t *p;

	if (fd < 0 || fstat(fd, &st)) {
		perror(path);
		exit(2);
	}
	*bytes = (uint64_t)st.st_size;
	p = calloc(1, *bytes + BLOCK);
	for (uint64_t at = 0; at < *bytes;) {
		ssize_t n = pread(fd, p + at, *bytes - at, (off_t)at);

		if (n <= 0)
			exit(2);
		at += (uint64_t)n;
	}
	close(fd);
	return p;
}

/* Ours, but of a block of data, by how it begins. */
static bool is_meta(const uint8_t *p, uint64_t blk)
{
	uint64_t eight;
	uint32_t four;

	memcpy(&eight, p, 8);
	memcpy(&four, p, 4);
	return blk < 16 || eight == SUPER_MAGIC || eight == MMP_MAGIC || four == NODE_MAGIC ||
	       four == GROUP_MAGIC;
}

static void survey(void)
{
	static const uint8_t zero[BLOCK];

	used = malloc(blocks * sizeof(*used));
	meta = malloc(blocks * sizeof(*meta));
	differ = malloc(blocks * sizeof(*differ));
	for (uint64_t b = 0; b < blocks; b++) {
		const uint8_t *p = now + b * BLOCK;

		if (memcmp(p, zero, BLOCK))
			used[used_n++] = b;
		if (is_meta(p, b))
			meta[meta_n++] = b;
		if (memcmp(p, older + b * BLOCK, BLOCK))
			differ[differ_n++] = b;
	}
}

static uint64_t somewhere(void)
{
	return rnd(2) ? meta[rnd(meta_n)] : used[rnd(used_n)];
}

static uint64_t length(uint64_t at)
{
	uint64_t n = 512u << rnd(8);

	return n < blocks * BLOCK - at ? n : blocks * BLOCK - at;
}

static void one(uint64_t *cut)
{
	uint64_t b = somewhere(), at = b * BLOCK, n, other;
	uint8_t spare[BLOCK];

	switch (rnd(20)) {
	case 0:
		if (rnd(3))
			return;
		*cut = rnd(2) ? rnd(blocks * BLOCK) : at;
		printf("cut at %llu\n", (unsigned long long)*cut);
		return;
	case 1:
	case 2:
	case 3:
	case 4:
		n = 1 + rnd(8);
		for (uint64_t i = 0; i < n; i++)
			now[at + rnd(BLOCK)] ^= (uint8_t)(1 << rnd(8));
		printf("block %llu: %llu bits\n", (unsigned long long)b, (unsigned long long)n);
		return;
	case 5:
	case 6:
	case 7:
		at += rnd(8) * 512;
		n = length(at);
		for (uint64_t i = 0; i < n; i++)
			now[at + i] = (uint8_t)rnd(256);
		printf("%llu: %llu bytes of noise\n", (unsigned long long)at, (unsigned long long)n);
		return;
	case 8:
	case 9:
	case 10:
		at += rnd(8) * 512;
		n = length(at);
		memset(now + at, 0, n);
		printf("%llu: %llu zeroes\n", (unsigned long long)at, (unsigned long long)n);
		return;
	case 11:
	case 12:
	case 13:
		n = length(at);
		other = somewhere() * BLOCK;
		if (n > blocks * BLOCK - other)
			n = blocks * BLOCK - other;
		memmove(now + at, now + other, n);
		printf("%llu: %llu bytes of %llu\n", (unsigned long long)at, (unsigned long long)n,
		       (unsigned long long)other);
		return;
	case 14:
	case 15:
	case 16:
		other = somewhere();
		memcpy(spare, now + at, BLOCK);
		memcpy(now + at, now + other * BLOCK, BLOCK);
		memcpy(now + other * BLOCK, spare, BLOCK);
		printf("blocks %llu and %llu swapped\n", (unsigned long long)b, (unsigned long long)other);
		return;
	default:
		if (!differ_n)
			return;
		b = differ[rnd(differ_n)];
		for (n = 0; n < (rnd(4) ? 1 : 16) && b + n < blocks; n++)
			memcpy(now + (b + n) * BLOCK, older + (b + n) * BLOCK, BLOCK);
		printf("block %llu: %llu as they were\n", (unsigned long long)b, (unsigned long long)n);
	}
}

/* Nodes alone, 1 to 50 % of them. */
static void many(void)
{
	static const unsigned shares[] = {1, 5, 20, 50};
	unsigned share = shares[rnd(4)], spoilt = 0;
	uint32_t magic;

	for (size_t i = 0; i < meta_n; i++) {
		uint8_t *p = now + meta[i] * BLOCK;

		memcpy(&magic, p, 4);
		if (magic != NODE_MAGIC || rnd(100) >= share)
			continue;
		p[8 + rnd(BLOCK - 8)] ^= (uint8_t)(1 << rnd(8));
		spoilt++;
	}
	printf("%u nodes\n", spoilt);
}

int main(int argc, char **argv)
{
	uint64_t bytes, old_bytes, left = 0, cut = 0;
	uint8_t *was;
	int fd;

	if (argc != 4) {
		fprintf(stderr, "usage: mangle IMAGE SEED OLDER\n");
		return 2;
	}
	now = load(argv[1], &bytes);
	older = load(argv[3], &old_bytes);
	if (bytes != old_bytes || bytes % BLOCK)
		return 2;
	blocks = bytes / BLOCK;
	state = pattern_mix((uint64_t)atoll(argv[2]));
	was = malloc(bytes);
	memcpy(was, now, bytes);
	survey();
	if (rnd(8))
		left = 1 + (rnd(3) ? rnd(3) : rnd(12));
	else
		many();
	while (!cut && (left || !memcmp(was, now, bytes))) {
		one(&cut);
		left -= left > 0;
	}
	fd = open(argv[1], O_WRONLY);
	for (uint64_t b = 0; b < blocks; b++)
		if (memcmp(was + b * BLOCK, now + b * BLOCK, BLOCK) &&
		    pwrite(fd, now + b * BLOCK, BLOCK, (off_t)(b * BLOCK)) != BLOCK)
			return 2;
	if (cut && ftruncate(fd, (off_t)cut))
		return 2;
	return close(fd) ? 2 : 0;
}
