/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_UNDO_H
#define SPACEWEAVE_UNDO_H

/*
 * The undo file of fsck.spaceweave -u: what stood in the image before it was
 * written over. A head of one unit, then records: a unit that says what they
 * are, and the units they saved. A record is durable before the image is
 * touched, each unit of the image is saved once, so the order of putting them
 * back does not matter.
 *
 * Whoever uses a volume writes its superblocks. So records tell what fsck found
 * in their slots and, before it is written, all that it writes there: an image
 * whose slots hold nothing else was not changed by anybody since, wherever fsck,
 * or undo, was cut off. Files of earlier versions have no such records, and tell
 * in the last one alone how fsck left the slots.
 */

#include "meta/format.h"
#include "meta/image.h"

#define UNDO_UNIT 4096u
#define UNDO_MAGIC 0x4f444e5545564157ull	/* "WAVEUNDO" */
#define UNDO_VERSION 1u
#define UNDO_RECORD_MAX (1u << 20)		/* bytes saved by one */

enum undo_kind {
	UNDO_HEAD,		/* bytes: of the image */
	UNDO_SAVED,
	UNDO_END,		/* both slots; offset: of the image's end */
	UNDO_SUPER,		/* a slot's contents at some time; offset: the slot's */
};

struct disk_undo {
	le64 magic;
	le32 version;
	le32 kind;
	le64 salt;		/* drawn for this file */
	le64 offset;		/* in the image */
	le64 bytes;		/* behind this unit, padded to units */
	uint8_t reserved[UNDO_UNIT - 48];
	le64 csum;		/* of this unit with 0 here, and the bytes */
};

/*
 * An image that saves into a new file at `path` (-EEXIST) what is about to be
 * changed in `under`. Closing it closes the file, and removes it if nothing was saved;
 * `under` stays the caller's.
 */
int undo_image(struct image *under, const char *path, struct image **out);

#endif
