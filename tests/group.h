/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_TESTS_GROUP_H
#define SPACEWEAVE_TESTS_GROUP_H

/* Journal groups that nobody would write: one item each, whatever it says. */

#include "tests/fault.h"

/* The items, and why fsck.spaceweave does not take them; NULL: it does. */
struct group_item {
	const char *name;
	uint8_t type, table;
	uint16_t klen, vlen;
	uint64_t num[2];	/* the key of an extent or of a block's contents */
	const char *wrong;
	uint64_t of_gen;	/* in the group of this checkpoint */
};

/* For a volume of 512 blocks of 4 KiB; the first four are good. */
#define GROUP_ITEMS 22
extern const struct group_item group_items[GROUP_ITEMS];

/*
 * Write a group with this item behind the last one, chained and sealed. It says
 * to have `count` items, and `extra` bytes follow. `durable`: it calls itself so.
 * Returns its sequence number.
 */
uint64_t group_append(struct fault *f, const struct group_item *it, bool durable,
		      unsigned extra, unsigned count);

#endif
