/* SPDX-License-Identifier: BSD-2-Clause */
#include "tests/group.h"

#include "meta/meta_priv.h"

#include <assert.h>
#include <string.h>

#define BLOCK 4096u
#define BLOCKS 512u

const struct group_item group_items[GROUP_ITEMS] = {
	{"a take", JITEM_TAKE, 0, 16, 0, {300, 2}, NULL, 0},
	{"a deletion", JITEM_DEL, TABLE_REFS, 9, 0, {0}, NULL, 0},
	{"a put", JITEM_PUT, TABLE_REFS, 9, 0, {0}, NULL, 0},
	{"a block's contents", JITEM_DATA, 0, 8, BLOCK, {300}, NULL, 0},
	{"of no known type", 9, 0, 16, 0, {300, 2},
	 "it is of no known type", 0},
	{"for a table that has no journal", JITEM_PUT, TABLE_SPACE, 8, 8, {0},
	 "it is for a table that has no journal", 0},
	{"a key too long", JITEM_PUT, TABLE_FILES, KEY_MAX + 1, 0, {0},
	 "it is too long", 0},
	{"a value too long", JITEM_PUT, TABLE_FILES, 9, VALUE_MAX + 1, {0},
	 "it is too long", 0},
	{"longer than the group", JITEM_PUT, TABLE_FILES, 9, 60000, {0},
	 "it is cut off", 0},
	{"no extent", JITEM_TAKE, 0, 8, 0, {300},
	 "it is no extent", 0},
	{"an extent with a value", JITEM_FREE, 0, 16, 4, {300, 2},
	 "it is no extent", 0},
	{"an extent of nothing", JITEM_TAKE, 0, 16, 0, {300, 0},
	 "its extent is outside the volume", 0},
	{"an extent outside", JITEM_TAKE, 0, 16, 0, {BLOCKS, 1},
	 "its extent is outside the volume", 0},
	{"an extent that reaches outside", JITEM_FREE, 0, 16, 0, {BLOCKS - 1, 2},
	 "its extent is outside the volume", 0},
	{"half a block's contents", JITEM_DATA, 0, 8, 100, {300},
	 "it is no block's contents", 0},
	{"contents of no block", JITEM_DATA, 0, 16, BLOCK, {300},
	 "it is no block's contents", 0},
	{"contents of a block outside", JITEM_DATA, 0, 8, BLOCK, {BLOCKS},
	 "its block is outside the volume", 0},
	{"a deletion with a value", JITEM_DEL, TABLE_REFS, 9, 4, {0},
	 "a deletion has no value", 0},
	{"a checkpoint's put", JITEM_PUT, TABLE_REFS, 9, 0, {0},
	 "a checkpoint takes and frees, no more", 1},
	{"a checkpoint's contents", JITEM_DATA, 0, 8, BLOCK, {300},
	 "a checkpoint takes and frees, no more", 1},
	{"the highest number there is", JITEM_PUT, TABLE_FILES, 8, 0, {UINT64_MAX},
	 "its inode number is too high", 0},
	{"a number too high", JITEM_PUT, TABLE_FILES, 8, 0, {0x0100000000000040},
	 "its inode number is too high", 0},
};

uint64_t group_append(struct fault *f, const struct group_item *it, bool durable,
		      unsigned extra, unsigned count)
{
	static uint8_t buf[3 * BLOCK];
	struct disk_group *g = (void *)buf;
	struct disk_jitem *ji = (void *)(g + 1);
	uint64_t unit, seq, prev;
	struct disk_super s;
	unsigned slot;
	char msg[100];
	size_t len = sizeof(*g) + sizeof(*ji) + it->klen;

	int r = super_load(fault_image(f), &s, &slot, msg, sizeof(msg));

	assert(!r);
	(void)r;
	unit = get64(s.tail_unit), seq = get64(s.tail_seq), prev = get64(s.tail_prev);
	for (;;) {
		struct disk_group h;

		fault_peek(f, &h, sizeof(h), (get64(s.journal_block) << 12) +
			   unit % get64(s.journal_units) * JOURNAL_UNIT);
		if (get32(h.magic) != GROUP_MAGIC || get64(h.salt) != get64(s.salt) ||
		    get64(h.seq) != seq)
			break;
		unit += (get32(h.bytes) + JOURNAL_UNIT - 1) / JOURNAL_UNIT;
		prev = get64(h.csum);
		seq++;
	}
	memset(buf, 0, sizeof(buf));
	*ji = (struct disk_jitem){.type = it->type,
				  .table = it->table,
				  .klen = put16(it->klen),
				  .vlen = put16(it->vlen)};
	memcpy(ji->bytes, it->num, it->klen < 16 ? it->klen : 16);
	if (it->table == TABLE_REFS)
		ji->bytes[0] = KEY_ORPHAN;
	len += it->vlen > BLOCK ? 0 : it->vlen;
	*g = (struct disk_group){.magic = put32(GROUP_MAGIC),
				 .bytes = put32((uint32_t)len + extra),
				 .salt = s.salt,
				 .seq = put64(seq),
				 .prev = put64(prev),
				 .durable_seq = put64(durable ? seq : 0),
				 .of_gen = put64(it->of_gen),
				 .items = put32(count)};
	g->csum = put64(checksum(buf, len + extra));
	fault_poke(f, buf, (len + extra + JOURNAL_UNIT - 1) / JOURNAL_UNIT *
		   JOURNAL_UNIT, (get64(s.journal_block) << 12) +
		   unit % get64(s.journal_units) * JOURNAL_UNIT);
	return seq;
}
