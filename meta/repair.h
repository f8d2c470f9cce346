/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_REPAIR_H
#define SPACEWEAVE_REPAIR_H

/*
 * What fsck needs beyond meta.h: items as they are, whether or not they make
 * sense; and, with undo, to hold an image without a volume. Nobody else includes
 * this. The volume is open with
 * volume_options.repair and has one thread.
 */

#include "meta/meta.h"

/*
 * Hold an image for other hosts to see, from before it is read until nothing of it
 * will be written any more, as the last holder did: if his heart did not beat, *out
 * is NULL. `lost`, which may be called by another thread, says that it is another's
 * now, or that the block cannot be read or written: nothing may be written then.
 * -EBUSY: somebody has taken it meanwhile.
 */
struct heart;
int heart_hold(struct image *im, const char *program,
	       void (*lost)(void *ctx, int err, const char *why), void *ctx,
	       struct heart **out);
/* Before something is written that no volume writes; h may be NULL. */
int heart_look(struct heart *h);
void heart_release(struct heart *h);

/*
 * What is to be put right by opening for writing, bitmaps before anything is
 * allocated; durable with the checkpoint that ends the opening, or not at all.
 */
struct volume_repair {
	/* Has taken the image already; NULL: the volume takes it for itself. */
	struct heart *heart;
	/* The checkpoint that was looked at: where the slot with it cannot be
	 * read just now, the other one is not opened instead. 0: any. */
	uint64_t gen;
	const struct extent *claim;	/* in use, but free in the bitmaps */
	size_t claims;
	const struct extent *release;	/* in use in the bitmaps alone */
	size_t releases;
	/* Read-only: the trees as they are without the journal. */
	bool no_replay;
	/* Read-only: begin at this superblock, though there is a newer one of
	 * the same salt; what that says is durable (must) has to be there. */
	const struct disk_super *older;
	uint64_t must;
	/* All bitmaps anew: what is claimed is in use, and nothing else. */
	bool bitmaps_anew;
	/*
	 * Before replay: nodes of which the parents are lost go back into their
	 * trees. Where the way there leads to a lost node, new ones are made in
	 * its place.
	 */
	const struct found_node {
		enum table table;
		unsigned level;
		struct disk_ptr ptr;
		uint16_t klen;
		uint8_t key[KEY_MAX];	/* its lowest */
	} *found;
	size_t founds;
	/*
	 * Then the lost nodes that are still there are given up, with all below
	 * them. What is known of that otherwise is put: JITEM_PUTs, one behind
	 * the other.
	 */
	const struct lost_node {
		enum table table;
		unsigned level;
		uint64_t block;
		bool keep;		/* not given up: there may be more to find */
		const void *items;
		unsigned item_count;
	} *lost;
	size_t losts;
	/* After replay: JITEM_PUTs and JITEM_DELs, one behind the other. */
	const void *items;
	unsigned item_count;
};

/* Put or delete one item. What inodes in memory know is not changed: no inode
 * whose own item this concerns may be in use. */
int repair_put(struct txn *t, enum table table, const void *key, size_t klen,
	       const void *val, size_t vlen);
int repair_del(struct txn *t, enum table table, const void *key, size_t klen);

/*
 * A block that says it is a node at `block`: is it whole? 0, -EUCLEAN or
 * -EBADMSG.
 */
int repair_node_verify(const struct disk_node *d, size_t block_bytes,
		       uint64_t block);

/* The value of an item; -ENOENT. */
int repair_get(struct volume *v, enum table table, const void *key, size_t klen,
	       void *val, size_t cap, size_t *vlen);

#endif
