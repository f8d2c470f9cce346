/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The table of what fsck.spaceweave finds. A code, once given, keeps its
 * meaning: S superblocks, J journal, T trees, I inodes, D directories, M extent
 * maps, X xattrs and symlinks, L links, R references, A allocation.
 */
#include "tools/problem.h"

#include "tools/cli.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum severity {
	NOTE,		/* worth a line, no error */
	ERROR,
	SEVERE,		/* something may be lost */
};

enum repair {
	NONE,		/* this program cannot */
	SAFE,		/* nothing can be lost by it: -p does it */
	FULL,		/* -y does it, or a person who says yes */
};

struct row {
	const char *code;
	enum severity severity;
	enum repair repair;
	const char *sentence;	/* %x: of a finding; {one|many}: see put_choice() */
	const char *remedy;	/* "Restored": said when it will be repaired */
};

static const struct row rows[PROBLEMS] = {
	[P_SUPER_SLOT] = {"S01", ERROR, SAFE,
		"superblock %x is not good: %w", "written from the other"},
	[P_SUPER_TORN] = {"S02", NOTE, SAFE,
		"superblock %x was being written when the volume stopped: %w",
		"written from the other"},
	[P_SUPER_DIFFER] = {"S03", ERROR, SAFE,
		"superblock %x disagrees with the newer one: %w",
		"written from the newer"},
	[P_SUPER_SHORT] = {"S04", SEVERE, FULL,
		"the image holds %x bytes, the volume %y: it was cut short",
		"made as long again; what stood there is lost"},
	[P_BACKUP_BAD] = {"S05", ERROR, SAFE,
		"backup superblock %x is not good: %w", "written anew"},
	[P_BACKUP_DIFFERS] = {"S06", ERROR, SAFE,
		"backup superblock %x disagrees with the superblock: %w",
		"written anew"},
	[P_SUPER_FREE] = {"S07", ERROR, SAFE,
		"the superblock counts %x free {block|blocks}, the bitmaps %y",
		"count corrected"},
	[P_SUPER_INODES] = {"S08", ERROR, SAFE,
		"the superblock counts %x {inode|inodes} instead of %y",
		"count corrected"},
	[P_SUPER_NEXT_INO] = {"S09", ERROR, SAFE,
		"the next inode number is %x, but inode %i exists",
		"number raised"},
	[P_SUPER_LOST] = {"S10", SEVERE, FULL,
		"both superblocks are lost (%w), backup %x is good",
		"rebuilt from backup, trees and journal"},
	[P_SUPER_STALE] = {"S11", SEVERE, FULL,
		"the newest superblock is lost: what is left is of checkpoint %x, the journal speaks of %y",
		"rebuilt from the other, trees and journal"},
	[P_SUPER_NONE] = {"S12", SEVERE, FULL,
		"all superblocks are lost, and all backups: %w",
		"rebuilt from trees and journal, with a new UUID and no label"},
	[P_SUPER_NO_TREE] = {"S13", SEVERE, NONE,
		"no tree of files is left in the image", NULL},
	[P_SUPER_ASIDE] = {"S14", ERROR, SAFE,
		"the superblock counts %x blocks set aside, there are %y",
		"count corrected"},

	[P_JOURNAL_REPLAY] = {"J01", NOTE, SAFE,
		"the journal holds %x {group|groups} to be replayed", "replayed"},
	[P_JOURNAL_GROUP] = {"J02", SEVERE, FULL,
		"journal group %x is damaged: %w",
		"cut off, with all that happened later"},
	[P_JOURNAL_ITEM] = {"J03", SEVERE, FULL,
		"journal group %x holds an item that makes no sense: %w",
		"cut off, with all that happened later"},
	[P_JOURNAL_CLEAN] = {"J04", ERROR, SAFE,
		"the volume is marked clean, but its journal holds %x {group|groups}",
		"replayed"},

	[P_NODE_BAD] = {"T01", SEVERE, FULL,
		"a node of level %x of the tree of %s at block %b is lost: %w",
		"given up, with what it held"},
	[P_LEAF_PLACE] = {"T03", SEVERE, FULL,
		"a leaf of the tree of %s, at block %b, stands where its keys do not lead",
		"put where they belong"},
	[P_KEY_FORM] = {"T04", SEVERE, FULL,
		"an item of the tree of %s has a key that makes no sense (near %i): %w",
		"removed"},
	[P_VALUE_FORM] = {"T05", SEVERE, FULL,
		"an item of the tree of %s has a value that makes no sense (near %i): %w",
		"removed"},
	[P_ROOT_NODES] = {"T06", ERROR, SAFE,
		"the tree of %s counts %x {node|nodes} instead of %y", "count corrected"},
	[P_ROOT_ITEMS] = {"T07", ERROR, SAFE,
		"the tree of %s counts %x {item|items} instead of %y", "count corrected"},

	[P_VOLUME] = {"T08", SEVERE, NONE,
		"the volume does not open: %w", NULL},
	[P_BITMAPS] = {"A11", SEVERE, NONE,
		"the bitmaps cannot be read: %w", NULL},

	[P_INODE_NUMBER] = {"I01", NOTE, NONE,
		"inode %i has a number that is reserved", NULL},
	[P_INODE_MODE] = {"I02", ERROR, FULL,
		"inode %i is no kind of file", "made what its entry says"},
	[P_INODE_FIELD] = {"I03", ERROR, FULL,
		"inode %i: %w is %x", "set to %y"},
	[P_INODE_TIME] = {"I04", ERROR, FULL,
		"inode %i: %w has %x {nanosecond|nanoseconds}", "set to 0"},
	[P_INODE_MISSING] = {"I05", SEVERE, FULL,
		"there is no inode %i, but items of it (%w)",
		"made anew, or removed where that makes no sense"},
	[P_INODE_BLKS] = {"I06", ERROR, FULL,
		"inode %i counts %x {block|blocks}, its map holds %y", "count corrected"},
	[P_INODE_FOREIGN] = {"I07", ERROR, FULL,
		"inode %i has items that its kind of file has not: %w",
		"made what they say, or removed where it has its own"},
	[P_ROOT_MISSING] = {"I08", SEVERE, FULL,
		"the root directory is missing: %w", "made anew"},

	[P_NAME_BAD] = {"D01", ERROR, FULL,
		"directory %d: the name '%s' is not allowed: %w", "entry removed"},
	[P_ENTRY_NO_INDEX] = {"D02", ERROR, FULL,
		"directory %d: entry '%s' has no place in the order (index %x)",
		"put at the end"},
	[P_INDEX_NO_ENTRY] = {"D03", ERROR, FULL,
		"directory %d: index %x names '%s', which is no entry",
		"entry made"},
	[P_ENTRY_INDEX_DIFFER] = {"D04", ERROR, FULL,
		"directory %d: entry '%s' and index %x disagree: %w",
		"set by the entry"},
	[P_DIR_SIZE] = {"D05", ERROR, FULL,
		"directory %i counts %x {entry|entries} instead of %y", "count corrected"},
	[P_DIR_NEXT_INDEX] = {"D06", ERROR, FULL,
		"directory %i: its next index is %x, but %y is in use",
		"raised"},
	[P_ENTRY_NO_INODE] = {"D07", SEVERE, FULL,
		"directory %d: entry '%s' is for inode %i, which does not exist",
		"entry removed"},
	[P_ENTRY_TYPE] = {"D08", ERROR, FULL,
		"directory %d: entry '%s' says that inode %i is %w",
		"type corrected"},
	[P_ENTRY_ORPHAN] = {"D09", ERROR, FULL,
		"directory %d: entry '%s' is for inode %i, which is an orphan",
		"orphan no more"},
	[P_DIR_PARENT] = {"D10", ERROR, FULL,
		"directory %i has %x as parent, but its entry is in %y",
		"parent corrected"},
	[P_DIR_TWICE] = {"D11", ERROR, FULL,
		"directory %i has a second entry, '%s' in %d",
		"second entry removed"},
	[P_DIR_NLINK] = {"D12", ERROR, FULL,
		"directory %i has %x {link|links} instead of %y", "corrected"},
	[P_DIR_LOST] = {"D13", SEVERE, FULL,
		"directory %i has no entry", "put into lost+found"},
	[P_DIR_CYCLE] = {"D14", SEVERE, FULL,
		"directory %i is among its own parents: entry '%s' in %d",
		"taken out of there"},

	[P_MAP_RUN] = {"M01", SEVERE, FULL,
		"inode %i, file block %x: the run makes no sense: %w",
		"marked as lost: reading it fails"},
	[P_MAP_ORDER] = {"M02", SEVERE, FULL,
		"inode %i, file block %x: the run overlaps the one before",
		"removed; what it alone held is marked as lost"},
	[P_MAP_PLACE] = {"M03", SEVERE, FULL,
		"inode %i, file block %x: %e {is|are} not within the volume's blocks",
		"marked as lost: reading it fails"},
	[P_MAP_BEYOND] = {"M04", ERROR, FULL,
		"inode %i: file block %x is written, but beyond the end of the file",
		"unmapped"},
	[P_MAP_BIRTH] = {"M05", ERROR, FULL,
		"inode %i, file block %x: the run is from generation %y, which is still to come",
		"set to the newest there is"},
	[P_MAP_LOST] = {"M08", SEVERE, FULL,
		"inode %i: blocks are missing, and its map from file block %x to %y is lost",
		"marked as lost: reading them fails"},
	[P_MAP_OWN] = {"M09", SEVERE, FULL,
		"inode %i, file block %x: at %e {stands a node or a bitmap|stand nodes or bitmaps}",
		"marked as lost: reading it fails"},
	[P_DATA_BAD] = {"M06", SEVERE, NONE,
		"inode %i, file block %x (block %b): the data are not what was written",
		NULL},
	[P_DATA_READ] = {"M07", SEVERE, NONE,
		"inode %i, file block %x (block %b): cannot be read: %w", NULL},

	[P_XATTR_PIECES] = {"X01", SEVERE, FULL,
		"inode %i: xattr '%s' is not whole: %w", "removed"},
	[P_XATTR_COUNT] = {"X02", ERROR, FULL,
		"inode %i counts %x {xattr|xattrs} instead of %y", "count corrected"},
	[P_SYMLINK] = {"X03", SEVERE, FULL,
		"inode %i: the symbolic link is not whole: %x {byte|bytes} of %y",
		"removed, with its entries"},

	[P_NLINK] = {"L01", ERROR, FULL,
		"inode %i has %x {link|links} and %y {entry|entries}", "corrected"},
	[P_LOST] = {"L02", ERROR, FULL,
		"inode %i has %x {link|links}, but no entry", "put into lost+found"},
	[P_ORPHAN_LINKED] = {"L03", ERROR, FULL,
		"inode %i is listed as orphan, but has %x {link|links}", "list corrected"},
	[P_ORPHAN_MISSING] = {"L04", ERROR, FULL,
		"inode %i has no links and is not listed as orphan", "freed"},
	[P_ORPHAN_NO_INODE] = {"L05", ERROR, FULL,
		"inode %i is listed as orphan, but does not exist",
		"list corrected"},
	[P_INTENT_NO_INODE] = {"L06", ERROR, FULL,
		"an intent is for inode %i, which does not exist", "removed"},
	[P_INTENT_RANGE] = {"L07", ERROR, FULL,
		"the intent of inode %i makes no sense: from %x to %y", "removed"},

	[P_REF_FORM] = {"R01", ERROR, FULL,
		"the reference count of %e makes no sense: %w", "removed"},
	[P_REF_COUNT] = {"R02", ERROR, FULL,
		"%e {is|are} counted as shared %x {time|times} instead of %y",
		"count corrected"},
	[P_REF_FLAG] = {"R03", ERROR, FULL,
		"inode %i shares blocks, but is not marked so", "marked"},

	[P_OWNED_TWICE] = {"A01", SEVERE, FULL,
		"%e {has|have} more than one owner: %w", "shared by its owners"},
	[P_USED_UNOWNED] = {"A02", ERROR, FULL,
		"%e {is|are} in use, but without an owner", "freed"},
	[P_OWNED_FREE] = {"A03", SEVERE, FULL,
		"%e {is|are} free in the bitmap, but owned", "marked in use"},
	[P_SPACE_PLACE] = {"A04", SEVERE, FULL,
		"bitmap %x stands at block %b, which cannot be",
		"all bitmaps written anew"},
	[P_SPACE_READ] = {"A05", SEVERE, FULL,
		"bitmap %x, at block %b, cannot be read: %w",
		"all bitmaps written anew"},
	[P_SPACE_CSUM] = {"A06", SEVERE, FULL,
		"bitmap %x, at block %b, is damaged: its checksum does not match",
		"all bitmaps written anew"},
	[P_SPACE_FREE] = {"A07", ERROR, FULL,
		"bitmap %b is said to have %x free {block|blocks}, it has %y",
		"all bitmaps written anew"},
	[P_ALLOC_OPEN] = {"A08", ERROR, NONE,
		"the allocator does not take the bitmaps: %w", NULL},
	[P_ALLOC_CHECK] = {"A09", ERROR, NONE,
		"the allocator finds its bitmap and trees at odds: %w", NULL},
	[P_ALLOC_RUNS] = {"A10", ERROR, NONE,
		"the allocator finds %x free {block|blocks}, the bitmaps hold %y", NULL},
};

#define SHOWN 50u	/* sentences of one kind, without -v */

static struct {
	const char *image;
	enum problem_mode mode;
	bool verbose;
	bool only_nodes;	/* nothing else is told of this round */
	uint64_t found[PROBLEMS], fixed[PROBLEMS];
	FILE *held;		/* sentences held back */
	char *text;
	size_t text_len;
} state;

void problem_init(const char *image, enum problem_mode mode, bool verbose)
{
	memset(&state, 0, sizeof(state));
	state.image = image;
	state.mode = mode;
	state.verbose = verbose;
}

/* ---- sentences ------------------------------------------------------------- */

static void put_name(FILE *to, const struct finding *f)
{
	size_t len = f->name_len ? f->name_len : f->name ? strlen(f->name) : 0;

	for (size_t i = 0; i < len; i++) {
		unsigned char c = (unsigned char)f->name[i];

		if (c < ' ' || c == 0x7f || c == '\\')
			fprintf(to, "\\%03o", c);
		else
			fputc(c, to);
	}
}

static void put_extent(FILE *to, const struct finding *f)
{
	if (f->len <= 1)
		fprintf(to, "block %" PRIu64, f->blk);
	else
		fprintf(to, "blocks %" PRIu64 " to %" PRIu64, f->blk,
			f->blk + f->len - 1);
}

/* At "{one|many}": print one of them, and return where it ends. */
static const char *put_choice(FILE *to, const char *s, bool one)
{
	const char *from = one ? s + 1 : strchr(s, '|') + 1;

	fwrite(from, 1, strcspn(from, "|}"), to);
	return strchr(s, '}');
}

/* A choice goes by the number, or the blocks, last spoken of. */
static void put_sentence(FILE *to, const char *s, const struct finding *f)
{
	uint64_t n = 0;

	for (; *s; s++) {
		if (*s == '{') {
			s = put_choice(to, s, n == 1);
			continue;
		}
		if (*s != '%') {
			fputc(*s, to);
			continue;
		}
		switch (*++s) {
		case 'i':
			fprintf(to, "%" PRIu64, f->ino);
			break;
		case 'd':
			fprintf(to, "%" PRIu64, f->dir);
			break;
		case 'b':
			fprintf(to, "%" PRIu64, f->blk);
			break;
		case 'x':
			fprintf(to, "%" PRIu64, n = f->is);
			break;
		case 'y':
			fprintf(to, "%" PRIu64, n = f->want);
			break;
		case 'e':
			put_extent(to, f);
			n = f->len ? f->len : 1;
			break;
		case 's':
			put_name(to, f);
			break;
		case 'w':
			fputs(f->what ? f->what : "?", to);
			break;
		}
	}
}

static bool ask(const struct row *r)
{
	char answer[16];

	if (state.held)
		return false;
	printf("    to be %s? ", r->remedy);
	fflush(stdout);
	return fgets(answer, sizeof(answer), stdin) &&
	       (answer[0] == 'y' || answer[0] == 'Y');
}

static bool wanted(const struct row *r)
{
	switch (state.mode) {
	case PROBLEM_CHECK:
		return false;
	case PROBLEM_PREEN:
		return r->repair == SAFE;
	case PROBLEM_YES:
		return r->repair != NONE;
	case PROBLEM_ASK:
		return r->repair != NONE && ask(r);
	}
	return false;
}

bool problem(enum problem_id id, const struct finding *f)
{
	const struct row *r = &rows[id];
	FILE *to = state.held ? state.held : stdout;
	bool repair, shown;
	uint64_t n;

	if (state.only_nodes && id != P_NODE_BAD && id != P_LEAF_PLACE)
		return false;
	n = state.found[id]++;
	shown = state.verbose || n < SHOWN || state.mode == PROBLEM_ASK;
	if (shown) {
		cli_progress_end();
		fprintf(to, "%s: %s ", state.image, r->code);
		put_sentence(to, r->sentence, f);
		fputc('\n', to);
	}
	repair = r->remedy && wanted(r);
	if (repair && shown && state.mode != PROBLEM_ASK) {
		fputs("    to be ", to);
		put_sentence(to, r->remedy, f);
		fputc('\n', to);
	}
	return repair;
}

void problem_fixed(enum problem_id id)
{
	state.fixed[id]++;
}

/* ---- rounds ------------------------------------------------------------------ */

void problem_round(void)
{
	memset(state.found, 0, sizeof(state.found));
	memset(state.fixed, 0, sizeof(state.fixed));
}

void problem_only_nodes(void)
{
	state.only_nodes = true;
}

void problem_end_round(void)
{
	FILE *to = state.held ? state.held : stdout;

	state.only_nodes = false;
	if (state.verbose || state.mode == PROBLEM_ASK)
		return;
	for (unsigned i = 0; i < PROBLEMS; i++)
		if (state.found[i] > SHOWN)
			fprintf(to, "%s: %s and %" PRIu64 " more of these (-v)\n",
				state.image, rows[i].code,
				state.found[i] - SHOWN);
}

void problem_hold(void)
{
	if (!state.held)
		state.held = open_memstream(&state.text, &state.text_len);
}

void problem_show(void)
{
	if (!state.held)
		return;
	fclose(state.held);
	state.held = NULL;
	fwrite(state.text, 1, state.text_len, stdout);
	free(state.text);
	state.text = NULL;
}

void problem_drop(void)
{
	if (state.held) {
		fclose(state.held);
		state.held = NULL;
		free(state.text);
		state.text = NULL;
	}
	problem_round();
}

uint64_t problem_errors(void)
{
	uint64_t n = 0;

	for (unsigned i = 0; i < PROBLEMS; i++)
		if (rows[i].severity != NOTE)
			n += state.found[i];
	return n;
}

uint64_t problem_repaired(void)
{
	uint64_t n = 0;

	for (unsigned i = 0; i < PROBLEMS; i++)
		if (rows[i].severity != NOTE)
			n += state.fixed[i];
	return n;
}

bool problem_progress(void)
{
	for (unsigned i = 0; i < PROBLEMS; i++)
		if (state.fixed[i])
			return true;
	return false;
}

uint64_t problem_count(enum problem_id id)
{
	return state.found[id];
}

bool problem_severe(void)
{
	for (unsigned i = 0; i < PROBLEMS; i++)
		if (state.found[i] && rows[i].severity == SEVERE)
			return true;
	return false;
}
