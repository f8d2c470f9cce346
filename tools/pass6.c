/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Pass 6: link counts of files against their entries, orphans, intents. An
 * inode without links is an orphan, and only such a one is: where the list says
 * so of one with links, but without an entry, the list is not believed, for then
 * it would be freed.
 */
#include "tools/fsck.h"

#include <dirent.h>

static int later(struct fsck *f, enum repair_kind kind, enum problem_id id,
		 const struct ino_rec *r, uint64_t a, uint64_t b)
{
	struct repair p = {.kind = kind, .id = id, .ino = r->ino, .a = a, .b = b};

	return repair_later(f, &p);
}

/* An orphan or an intent of an inode that is not there. */
static int refs_remove(struct fsck *f, enum problem_id id, enum refs_key type,
		       uint64_t ino)
{
	char key[9] = {(char)type};
	struct repair r = {.kind = REPAIR_ITEM_REMOVE,
			   .id = id,
			   .a = TABLE_REFS,
			   .name = key,
			   .name_len = sizeof(key)};

	if (!PROBLEM(id, .ino = ino))
		return 0;
	be64_put((uint8_t *)key + 1, ino);
	return repair_later(f, &r);
}

/* Of no known kind: what its entry says, if there is one. */
static int check_kind(struct fsck *f, const struct ino_rec *r)
{
	if (!PROBLEM(P_INODE_MODE, .ino = r->ino))
		return 0;
	return later(f, REPAIR_ATTR, P_INODE_MODE, r, FIELD_MODE,
		     (uint64_t)(r->links ? r->entry_type : DT_REG) << 12 | 0600);
}

static int check_links(struct fsck *f, const struct ino_rec *r)
{
	if (r->type == DT_DIR)
		return 0;
	if (r->nlink == r->links)
		return 0;
	if (!r->links) {
		if (PROBLEM(P_LOST, .ino = r->ino, .is = r->nlink))
			return later(f, REPAIR_LOST, P_LOST, r, 0, r->type);
		return 0;
	}
	if (PROBLEM(P_NLINK, .ino = r->ino, .is = r->nlink, .want = r->links))
		return later(f, REPAIR_ATTR, P_NLINK, r, FIELD_NLINK, r->links);
	return 0;
}

static int check_orphan(struct fsck *f, const struct ino_rec *r)
{
	bool orphan = r->flags & INO_ORPHAN;

	if (r->ino == ROOT_INO && !orphan)
		return 0;
	if (orphan && !(r->flags & INO_SEEN)) {
		return f->incomplete ? 0 :
				       refs_remove(f, P_ORPHAN_NO_INODE,
						   KEY_ORPHAN, r->ino);
	}
	if (orphan && r->nlink) {
		if (!PROBLEM(P_ORPHAN_LINKED, .ino = r->ino, .is = r->nlink))
			return 0;
		return later(f, REPAIR_ORPHAN_REMOVE, P_ORPHAN_LINKED, r, 0, 0);
	}
	if (!orphan && r->flags & INO_SEEN && !r->nlink && !r->links &&
	    r->type != DT_DIR && !f->lost[TABLE_REFS]) {
		if (PROBLEM(P_ORPHAN_MISSING, .ino = r->ino))
			return later(f, REPAIR_ORPHAN_ADD, P_ORPHAN_MISSING, r,
				     0, 0);
	}
	return 0;
}

int pass6(struct fsck *f)
{
	struct ino_table *t = &f->inodes;
	int ret = 0;

	for (size_t i = 0; !ret && i < t->count; i++) {
		const struct ino_rec *r = &t->rec[i];

		if (r->links && (!(r->flags & INO_SEEN) ||
				 r->flags & INO_TYPE_ODD ||
				 (r->entry_type != r->type &&
				  !(r->flags & INO_ODD_MODE)) ||
				 r->flags & INO_ORPHAN))
			f->look_again = true;
		if (r->flags & INO_ODD_MODE)
			ret = check_kind(f, r);
		else if (r->flags & INO_SEEN)
			ret = check_links(f, r);
		if (!ret)
			ret = check_orphan(f, r);
		if (!ret && r->flags & INO_INTENT && !(r->flags & INO_SEEN) &&
		    !f->incomplete)
			ret = refs_remove(f, P_INTENT_NO_INODE, KEY_INTENT,
					  r->ino);
		if (i % 65536 == 0)
			cli_progress("links", i, t->count);
	}
	cli_progress_end();
	return ret;
}
