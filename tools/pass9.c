/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Pass 9: the allocator itself, opened over the bitmaps as they are after
 * replay, with several counts of shards. Its bitmap and both trees have to
 * agree, and to hold the free blocks that pass 8 counted.
 */
#include "tools/fsck.h"

#include <stdlib.h>
#include <string.h>

static int load(void *ctx, uint64_t chunk, void *bits)
{
	struct fsck *f = ctx;
	uint64_t at = chunk * ALLOC_CHUNK;
	uint8_t *block = malloc((size_t)1 << f->shift);
	int ret = block ? 0 : -ENOMEM;

	if (!ret)
		ret = volume_bitmap(f->v, at / f->per_bitmap, block);
	if (!ret)
		memcpy(bits, block + at % f->per_bitmap / 8, ALLOC_CHUNK_BYTES);
	free(block);
	return ret;
}

static uint32_t chunk_free(const struct fsck *f, uint64_t chunk)
{
	uint64_t left = f->blocks - chunk * ALLOC_CHUNK;

	return (uint32_t)(left < ALLOC_CHUNK ? left : ALLOC_CHUNK) -
	       f->chunk_used[chunk];
}

/* Chunks that are wholly free, or full, go together. */
static int describe(void *ctx, uint64_t chunk, uint64_t *count, uint32_t *units)
{
	struct fsck *f = ctx;
	uint64_t chunks = (f->blocks + ALLOC_CHUNK - 1) / ALLOC_CHUNK, n = 1;

	if (chunk >= chunks)
		return -ERANGE;
	*units = chunk_free(f, chunk);
	if (*units == ALLOC_CHUNK) {
		n = fsck_next_used(f, chunk) - chunk;
		/* the last one may be shorter */
		if (chunk + n == chunks && f->blocks % ALLOC_CHUNK)
			n--;
		n = n ? n : 1;
	} else if (*units == 0) {
		while (chunk + n < chunks && !chunk_free(f, chunk + n))
			n++;
	}
	*count = n;
	return 0;
}

static int check_runs(struct fsck *f, struct alloc *a)
{
	struct extent e;
	uint64_t at = 0, sum = 0;
	int ret;

	while (!(ret = alloc_next_free(a, at, &e))) {
		sum += e.len;
		at = e.start + e.len;
	}
	if (ret != -ENOENT)
		return ret;
	if (sum != f->free_blks)
		PROBLEM(P_ALLOC_RUNS, .is = sum, .want = f->free_blks);
	return 0;
}

static int check_with(struct fsck *f, uint32_t shards)
{
	struct alloc_config cfg = {.units = f->blocks,
				   .unit_bytes = 1u << f->shift,
				   .shards = shards};
	struct alloc_source source = {f, load, describe};
	struct alloc_stats stats;
	struct alloc *a;
	char msg[160] = "";
	int ret;

	ret = alloc_open(&cfg, &source, f->free_blks, &a);
	if (ret) {
		PROBLEM(P_ALLOC_OPEN, .what = strerror(-ret));
		return 0;
	}
	ret = alloc_stats(a, true, &stats);
	if (ret)
		PROBLEM(P_ALLOC_OPEN, .what = strerror(-ret));
	if (!ret && stats.free_units != f->free_blks)
		PROBLEM(P_ALLOC_RUNS, .is = stats.free_units,
			.want = f->free_blks);
	if (!ret && alloc_check(a, msg, sizeof(msg)))
		PROBLEM(P_ALLOC_CHECK, .what = msg);
	if (!ret)
		ret = check_runs(f, a);
	alloc_close(a);
	return ret;
}

int pass9(struct fsck *f)
{
	static const uint32_t shards[] = {1, 5, 16};
	int ret = 0;

	if (f->bitmaps_lost)
		return 0;
	for (unsigned i = 0; !ret && i < sizeof(shards) / sizeof(*shards); i++) {
		cli_progress("allocator", i, sizeof(shards) / sizeof(*shards));
		ret = check_with(f, shards[i]);
	}
	cli_progress_end();
	return ret;
}
