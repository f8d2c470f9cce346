/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Pass 5: the tree of directories. Each has one entry, in the directory it
 * calls its parent; its links are two and one for each directory in it; from
 * each the way up ends at the root.
 */
#include "tools/fsck.h"

#include <dirent.h>
#include <stdlib.h>
#include <sys/stat.h>

static int attr_repair(struct fsck *f, enum problem_id id, uint64_t ino,
		       enum repair_field field, uint64_t want)
{
	struct repair r = {.kind = REPAIR_ATTR,
			   .id = id,
			   .ino = ino,
			   .a = field,
			   .b = want};

	return repair_later(f, &r);
}

static int check_dir(struct fsck *f, struct ino_rec *r)
{
	const struct dir_rec *d = &f->inodes.dirs[r->dir - 1];
	/* an orphan directory has lost its name, and with it both links */
	uint32_t want = r->links || r->ino == ROOT_INO ? 2 + d->subdirs : 0;
	int ret = 0;

	if (r->ino == ROOT_INO) {
		if (d->parent != ROOT_INO &&
		    PROBLEM(P_DIR_PARENT, .ino = r->ino, .is = d->parent,
			    .want = ROOT_INO))
			ret = attr_repair(f, P_DIR_PARENT, r->ino, FIELD_PARENT,
					  ROOT_INO);
		if (r->links)
			f->look_again = true;
	} else if (!r->links && (!(r->flags & INO_ORPHAN) || r->nlink)) {
		struct repair lost = {.kind = REPAIR_LOST,
				      .id = P_DIR_LOST,
				      .ino = r->ino,
				      .b = DT_DIR};

		if (PROBLEM(P_DIR_LOST, .ino = r->ino))
			ret = repair_later(f, &lost);
		return ret;
	} else if (r->links && d->parent != d->from) {
		if (PROBLEM(P_DIR_PARENT, .ino = r->ino, .is = d->parent,
			    .want = d->from))
			ret = attr_repair(f, P_DIR_PARENT, r->ino, FIELD_PARENT,
					  d->from);
	}
	if (r->links > 1)
		f->look_again = true;
	if (!ret && r->nlink != want && !f->incomplete &&
	    PROBLEM(P_DIR_NLINK, .ino = r->ino, .is = r->nlink, .want = want))
		ret = attr_repair(f, P_DIR_NLINK, r->ino, FIELD_NLINK, want);
	return ret;
}

/* Follow the entries upward; what meets itself is a cycle. */
static void check_reach(struct fsck *f, uint32_t first)
{
	struct ino_table *t = &f->inodes;
	uint32_t round = first + 1, at = first;

	for (;;) {
		struct dir_rec *d = &t->dirs[at];
		const struct ino_rec *up;

		if (d->round && d->round != round)
			return;		/* an earlier search went on from here */
		if (d->round == round) {
			d->cycle = true;
			f->look_again = true;
			return;
		}
		d->round = round;
		if (d->ino == ROOT_INO || !d->from)
			return;
		up = ino_find(t, d->from);
		if (!up || !up->dir)
			return;
		at = up->dir - 1;
	}
}

int pass5(struct fsck *f)
{
	struct ino_table *t = &f->inodes;
	const struct ino_rec *root = ino_find(t, ROOT_INO);
	int ret = 0;

	if (!root || !(root->flags & INO_SEEN)) {
		struct repair r = {.kind = REPAIR_INODE,
				   .id = P_ROOT_MISSING,
				   .ino = ROOT_INO,
				   .a = S_IFDIR | 0755};

		if (PROBLEM(P_ROOT_MISSING, .what = "there is no inode 1"))
			ret = repair_later(f, &r);
	}
	for (size_t i = 0; !ret && i < t->count; i++) {
		struct ino_rec *r = &t->rec[i];

		if (r->flags & INO_SEEN && r->type == DT_DIR)
			ret = check_dir(f, r);
		if (i % 65536 == 0)
			cli_progress("directories", i, t->count);
	}
	for (size_t i = 0; !ret && i < t->dir_count; i++)
		check_reach(f, (uint32_t)i);
	cli_progress_end();
	return ret;
}
