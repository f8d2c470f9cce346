/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_PROBLEM_H
#define SPACEWEAVE_PROBLEM_H

/*
 * What fsck.spaceweave can find: one row for each in problem.c's table, with its
 * code, its sentence, how bad it is and how far a repair goes. Here are the
 * names of the rows. One thread.
 */

#include <stdbool.h>
#include <stdint.h>

enum problem_id {
	/* superblocks and backups */
	P_SUPER_SLOT,
	P_SUPER_TORN,
	P_SUPER_DIFFER,
	P_SUPER_SHORT,
	P_BACKUP_BAD,
	P_BACKUP_DIFFERS,
	P_SUPER_FREE,
	P_SUPER_INODES,
	P_SUPER_NEXT_INO,
	P_SUPER_LOST,
	P_SUPER_STALE,
	P_SUPER_NONE,
	P_SUPER_NO_TREE,
	P_SUPER_ASIDE,
	/* journal */
	P_JOURNAL_REPLAY,
	P_JOURNAL_GROUP,
	P_JOURNAL_ITEM,
	P_JOURNAL_CLEAN,
	/* trees */
	P_NODE_BAD,
	P_LEAF_PLACE,
	P_KEY_FORM,
	P_VALUE_FORM,
	P_ROOT_NODES,
	P_ROOT_ITEMS,
	P_VOLUME,
	P_BITMAPS,
	/* inodes */
	P_INODE_NUMBER,
	P_INODE_MODE,
	P_INODE_FIELD,
	P_INODE_TIME,
	P_INODE_MISSING,
	P_INODE_BLKS,
	P_INODE_FOREIGN,
	P_ROOT_MISSING,
	/* directories */
	P_NAME_BAD,
	P_ENTRY_NO_INDEX,
	P_INDEX_NO_ENTRY,
	P_ENTRY_INDEX_DIFFER,
	P_DIR_SIZE,
	P_DIR_NEXT_INDEX,
	P_ENTRY_NO_INODE,
	P_ENTRY_TYPE,
	P_ENTRY_ORPHAN,
	P_DIR_PARENT,
	P_DIR_TWICE,
	P_DIR_NLINK,
	P_DIR_LOST,
	P_DIR_CYCLE,
	/* extent maps */
	P_MAP_RUN,
	P_MAP_ORDER,
	P_MAP_PLACE,
	P_MAP_BEYOND,
	P_MAP_BIRTH,
	P_MAP_LOST,
	P_MAP_OWN,
	P_DATA_BAD,
	P_DATA_READ,
	/* xattrs, symlinks */
	P_XATTR_PIECES,
	P_XATTR_COUNT,
	P_SYMLINK,
	/* links, orphans, intents */
	P_NLINK,
	P_LOST,
	P_ORPHAN_LINKED,
	P_ORPHAN_MISSING,
	P_ORPHAN_NO_INODE,
	P_INTENT_NO_INODE,
	P_INTENT_RANGE,
	/* references and allocation */
	P_REF_FORM,
	P_REF_COUNT,
	P_REF_FLAG,
	P_OWNED_TWICE,
	P_USED_UNOWNED,
	P_OWNED_FREE,
	P_SPACE_PLACE,
	P_SPACE_READ,
	P_SPACE_CSUM,
	P_SPACE_FREE,
	P_ALLOC_OPEN,
	P_ALLOC_CHECK,
	P_ALLOC_RUNS,
	PROBLEMS
};

/* What a sentence speaks of. Fields that it does not name stay zero. */
struct finding {
	uint64_t ino;		/* %i */
	uint64_t dir;		/* %d */
	uint64_t blk;		/* %b; with len: %e, "blocks 7 to 9" */
	uint64_t len;
	uint64_t is, want;	/* %x, %y */
	const char *name;	/* %s, of name_len bytes, made printable */
	unsigned name_len;
	const char *what;	/* %w */
};

enum problem_mode {
	PROBLEM_CHECK,		/* -n */
	PROBLEM_PREEN,		/* -p: what is always safe */
	PROBLEM_YES,		/* -y */
	PROBLEM_ASK,		/* on a terminal */
};

void problem_init(const char *image, enum problem_mode mode, bool verbose);

/*
 * Report a finding. Returns whether to repair it now (or to note that, and do it
 * once all is known); the caller says problem_fixed() if that went well.
 */
bool problem(enum problem_id id, const struct finding *f);
#define PROBLEM(id, ...) problem(id, &(struct finding){__VA_ARGS__})
void problem_fixed(enum problem_id id);

/* Begin a round of checking: counts start at 0. */
void problem_round(void);
/*
 * Nodes are lost, and another round is to see what there is without them: until
 * this one ends no other findings are told, counted or repaired.
 */
void problem_only_nodes(void);
/* Say how often a sentence was held back because it had been said so often. */
void problem_end_round(void);
/*
 * Hold all sentences back from now on, until problem_show() prints them or
 * problem_drop() forgets them and their counts.
 */
void problem_hold(void);
void problem_show(void);
void problem_drop(void);

/* Errors found in this round (notes do not count), and those repaired at once. */
uint64_t problem_errors(void);
uint64_t problem_repaired(void);
/* Was anything done at all, notes included? */
bool problem_progress(void);
/* Found in this round: this one? */
uint64_t problem_count(enum problem_id id);
/* Was anything found by which something may be lost? Then no repair is always safe:
 * what is written may be written over blocks with an owner that count as free, or
 * over the older state that has what is lost. */
bool problem_severe(void);

#endif
