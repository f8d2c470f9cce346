/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * spaceweave map: a picture of a volume's free space, each character one part
 * of the volume, and how long its free extents are.
 */
#include "tools/cli.h"
#include "tools/verbs.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char map_usage[] =
"usage: spaceweave map [-h] IMAGE|DIR\n"
"Show where a volume is free ('.' free, '1'-'9' tenths in use, '#' full) and\n"
"how long its free extents are.\n";

#define CELLS 1024u		/* characters of the picture */
#define WIDTH 64u

struct picture {
	uint64_t blocks;
	uint64_t per_cell;
	uint64_t used[CELLS];
	uint64_t run;			/* free blocks just before here */
	uint64_t extents[64], blks[64];	/* by log2 of the length */
	uint64_t largest;
};

static void end_run(struct picture *p)
{
	unsigned class;

	if (!p->run)
		return;
	class = 63 - (unsigned)__builtin_clzll(p->run);
	p->extents[class]++;
	p->blks[class] += p->run;
	if (p->run > p->largest)
		p->largest = p->run;
	p->run = 0;
}

/* Count `n` blocks from `start`, all used or all free. */
static void count(struct picture *p, uint64_t start, uint64_t n, bool used)
{
	if (!used) {
		p->run += n;
		return;
	}
	end_run(p);
	while (n) {
		uint64_t cell = start / p->per_cell;
		uint64_t len = (cell + 1) * p->per_cell - start;

		len = len < n ? len : n;
		p->used[cell] += len;
		start += len;
		n -= len;
	}
}

static bool bit(const uint8_t *bits, uint64_t i)
{
	return bits[i / 8] >> (i % 8) & 1;
}

static void count_bitmap(struct picture *p, const uint8_t *bits, uint64_t first,
			 uint64_t n)
{
	uint64_t i = 0;

	while (i < n) {
		bool used = bit(bits, i);
		uint64_t from = i;

		/* whole bytes alike first, then bit by bit */
		while (i < n) {
			if (i % 8 == 0 && n - i >= 8 &&
			    bits[i / 8] == (used ? 0xff : 0))
				i += 8;
			else if (bit(bits, i) == used)
				i++;
			else
				break;
		}
		count(p, first + from, i - from, used);
	}
}

static int take_picture(struct view *w, struct picture *p)
{
	uint64_t per = 8ull << volume_block_shift(w->v);
	uint8_t *bits = malloc(per / 8);
	int ret = bits ? 0 : -ENOMEM;

	for (uint64_t i = 0; !ret && i * per < p->blocks; i++) {
		uint64_t left = p->blocks - i * per;

		ret = volume_bitmap(w->v, i, bits);
		if (!ret)
			count_bitmap(p, bits, i * per, left < per ? left : per);
		cli_progress("bitmaps", i, p->blocks / per);
	}
	end_run(p);
	cli_progress_end();
	free(bits);
	return ret;
}

static void draw(const struct picture *p)
{
	uint64_t cells = (p->blocks + p->per_cell - 1) / p->per_cell;

	for (uint64_t i = 0; i < cells; i++) {
		uint64_t size = p->per_cell;
		unsigned tenths;
		char c;

		if ((i + 1) * size > p->blocks)
			size = p->blocks - i * size;
		tenths = (unsigned)((double)p->used[i] * 10.0 / (double)size);
		if (p->used[i] == size)
			c = '#';
		else if (!p->used[i])
			c = '.';
		else
			c = (char)('0' + (tenths < 1 ? 1 : tenths));
		putchar(c);
		if (i % WIDTH == WIDTH - 1 || i + 1 == cells)
			putchar('\n');
	}
}

static void histogram(const struct picture *p, unsigned shift)
{
	uint64_t extents = 0, blks = 0;
	char a[16], b[16];

	for (unsigned i = 0; i < 64; i++) {
		extents += p->extents[i];
		blks += p->blks[i];
	}
	printf("%12s %10s %12s %6s\n", "free extents", "count", "total", "share");
	for (unsigned i = 0; i < 64; i++)
		if (p->extents[i])
			printf("%9s -  %10" PRIu64 " %12s %5.1f%%\n",
			       cli_size(1ull << i << shift, a), p->extents[i],
			       cli_size(p->blks[i] << shift, b),
			       100.0 * (double)p->blks[i] / (double)blks);
	printf("%s free in %" PRIu64 " extents, ", cli_size(blks << shift, a),
	       extents);
	printf("the largest %s\n", cli_size(p->largest << shift, b));
}

int verb_map(int argc, char **argv)
{
	struct picture *p;
	struct view w;
	char size[16];
	unsigned shift;
	int ret;

	if (argc == 2 && !strcmp(argv[1], "-h")) {
		fputs(map_usage, stdout);
		return 0;
	}
	if (argc != 2 || argv[1][0] == '-') {
		fputs(map_usage, stderr);
		return 1;
	}
	p = calloc(1, sizeof(*p));
	if (!p) {
		cli_warn("out of memory");
		return 1;
	}
	if (view_open(argv[1], &w)) {
		free(p);
		return 1;
	}
	shift = volume_block_shift(w.v);
	p->blocks = get64(volume_super(w.v)->blocks);
	p->per_cell = (p->blocks + CELLS - 1) / CELLS;
	ret = take_picture(&w, p);
	if (ret) {
		cli_warn("cannot read the bitmaps of '%s': %s", w.image,
			 cli_error(ret));
	} else {
		printf("%s: each character is %s\n", w.image,
		       cli_size(p->per_cell << shift, size));
		draw(p);
		histogram(p, shift);
	}
	view_close(&w);
	free(p);
	return ret ? 1 : 0;
}
