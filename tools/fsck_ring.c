/* SPDX-License-Identifier: BSD-2-Clause */
/* The journal's ring as it stands in the image: its groups, one by one. */
#include "tools/fsck.h"

#include <stdlib.h>
#include <string.h>

int ring_load(struct fsck *f, const struct disk_super *s, struct ring *r)
{
	unsigned shift = get32(s->block_shift);

	*r = (struct ring){.units = get64(s->journal_units),
			   .offset = get64(s->journal_block) << shift};
	r->len = (size_t)(r->units * JOURNAL_UNIT);
	r->bytes = big_alloc(r->len);
	r->group = big_alloc(r->len);
	if (!r->bytes || !r->group)
		return -ENOMEM;
	return image_pread(f->im, r->bytes, r->len, r->offset);
}

void ring_fini(struct ring *r)
{
	free(r->bytes);
	free(r->group);
}

const struct disk_group *ring_group(struct ring *r, uint64_t unit,
				    const uint64_t *salt, const char **why)
{
	size_t at = (size_t)(unit % r->units) * JOURNAL_UNIT, first, len;
	struct disk_group *g = (void *)r->group;
	uint64_t sum;

	memcpy(g, r->bytes + at, sizeof(*g));
	len = get32(g->bytes);
	*why = NULL;
	if (get32(g->magic) != GROUP_MAGIC)
		*why = "there is no group";
	else if (salt && get64(g->salt) != *salt)
		*why = "it is from another time";
	else if (len < sizeof(*g) || len > r->len)
		*why = "its length makes no sense";
	if (*why)
		return NULL;
	first = len < r->len - at ? len : r->len - at;
	memcpy(r->group, r->bytes + at, first);
	memcpy(r->group + first, r->bytes, len - first);
	sum = get64(g->csum);
	g->csum = put64(0);
	if (checksum(g, len) != sum) {
		*why = "its checksum does not match";
		return NULL;
	}
	g->csum = put64(sum);
	return g;
}

uint64_t group_units(const struct disk_group *g)
{
	return (get32(g->bytes) + JOURNAL_UNIT - 1) / JOURNAL_UNIT;
}

const struct disk_jitem *group_item(const struct disk_group *g,
				    const struct disk_jitem *ji)
{
	const uint8_t *at = ji ? ji->bytes + get16(ji->klen) + get16(ji->vlen) :
				 (const uint8_t *)(g + 1);
	size_t left = (size_t)((const uint8_t *)g + get32(g->bytes) - at);

	ji = (const void *)at;
	if (left < sizeof(*ji) ||
	    left - sizeof(*ji) < (size_t)get16(ji->klen) + get16(ji->vlen))
		return NULL;
	return ji;
}
