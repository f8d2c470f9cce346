/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_REPAIR_H
#define SPACEWEAVE_REPAIR_H

/*
 * What fsck needs beyond meta.h: items as they are, whether or not they make
 * sense. Nobody else includes this. The volume is open with
 * volume_options.repair and has one thread.
 */

#include "meta/meta.h"

/*
 * What is to be put right by opening for writing, bitmaps before anything is
 * allocated; durable with the checkpoint that ends the opening, or not at all.
 */
struct volume_repair {
	/* The checkpoint that was looked at: where the slot with it cannot be
	 * read just now, the other one is not opened instead. 0: any. */
	uint64_t gen;
	const struct extent *claim;	/* in use, but free in the bitmaps */
	size_t claims;
	const struct extent *release;	/* in use in the bitmaps alone */
	size_t releases;
	/* Read-only: the trees as they are without the journal. */
	bool no_replay;
	/* All bitmaps anew: what is claimed is in use, and nothing else. */
	bool bitmaps_anew;
	/* Nodes that cannot be read: given up, with all below them. */
	const struct lost_node {
		enum table table;
		unsigned level;
		uint64_t block;
	} *lost;
	size_t losts;
};

/* Put or delete one item. What inodes in memory know is not changed: no inode
 * whose own item this concerns may be in use. */
int repair_put(struct txn *t, enum table table, const void *key, size_t klen,
	       const void *val, size_t vlen);
int repair_del(struct txn *t, enum table table, const void *key, size_t klen);

/* The value of an item; -ENOENT. */
int repair_get(struct volume *v, enum table table, const void *key, size_t klen,
	       void *val, size_t cap, size_t *vlen);

#endif
