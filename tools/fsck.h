/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_FSCK_H
#define SPACEWEAVE_FSCK_H

/*
 * What the passes of fsck.spaceweave share. One thread.
 *
 * A round looks at the volume once: at the superblocks and the journal as they
 * stand in the image, then at the volume as it is after replay, opened
 * read-only. The tree of files is walked once, in order of inode numbers;
 * what a pass has to know of all inodes together goes into a table (24 bytes
 * an inode, with its index less than 40), what it has to know of all blocks
 * into a sparse bitmap (a bit a block where there are any). Only when
 * something does not add up is the tree walked again, to name names.
 */

#include "meta/meta.h"
#include "meta/repair.h"
#include "tools/cli.h"
#include "tools/problem.h"

#include <errno.h>

/* ---- all inodes -------------------------------------------------------------- */

#define INO_SEEN 0x01u		/* it has an inode item */
#define INO_ORPHAN 0x02u	/* it is in the list of orphans */
#define INO_INTENT 0x04u
#define INO_SHARED 0x08u	/* it is marked to have shared blocks */
#define INO_SHARES 0x10u	/* it has */
#define INO_TYPE_ODD 0x20u	/* an entry says another type */
#define INO_NAMED 0x40u		/* second look: its first entry was met */
#define INO_ODD_MODE 0x80u	/* it is no known kind of file */

#define FATE_REMADE 1u		/* it is to be made anew */
#define FATE_DROPPED 2u		/* what else belongs to it is to go */

struct ino_rec {
	uint64_t ino;
	uint32_t nlink;		/* as the inode says */
	uint32_t links;		/* entries for it */
	uint32_t dir;		/* of a directory: its place in dirs[], + 1 */
	uint8_t flags;		/* INO_ */
	uint8_t type;		/* DT_, by its mode */
	uint8_t entry_type;	/* DT_, by its first entry */
	uint8_t fate;		/* FATE_, where its inode item is lost */
};

struct dir_rec {
	uint64_t ino;
	uint64_t parent;	/* as the inode says */
	uint64_t from;		/* directory that has an entry for it */
	uint64_t last;		/* the last one met that has */
	uint32_t subdirs;
	uint32_t round;		/* of the search for cycles that met it */
	bool cycle;		/* it is among its own parents */
	bool suspect;		/* its entries and its indexes do not agree */
};

struct ino_table {
	struct ino_rec *rec;
	size_t count, room;
	size_t last;		/* place found last */
	uint32_t *hash;		/* place in rec[] + 1; 0 none */
	size_t mask;
	struct dir_rec *dirs;
	size_t dir_count, dir_room;
};

/* Room for so many at once; more find theirs all the same. */
int ino_init(struct ino_table *t, uint64_t expected);
/* NULL when there is no such inode. */
struct ino_rec *ino_find(struct ino_table *t, uint64_t ino);
/* Find it or make it. NULL when memory is short. */
struct ino_rec *ino_need(struct ino_table *t, uint64_t ino);
/* The directory's record, made if need be. Invalid after the next of these. */
struct dir_rec *dir_need(struct ino_table *t, struct ino_rec *r);
void ino_fini(struct ino_table *t);

/* ---- all blocks --------------------------------------------------------------- */

/* A set of blocks: pages of bits, made when a bit in them is set. */
#define BLOCKS_PAGE 32768u
#define BLOCKS_GROUP 512u
struct blocks {
	uint8_t **page;
	uint64_t pages;
	uint8_t *some;		/* is there a page in this group of them? */
};
_Static_assert(BLOCKS_PAGE == ALLOC_CHUNK, "pages are what the allocator loads");

int blocks_init(struct blocks *b, uint64_t blocks);
void blocks_fini(struct blocks *b);
/*
 * Put [start, start + len) in. *twice is how many of them, from start on, were
 * in already (0: none; then all are put in). Put in what follows by calling
 * again. Returns the blocks dealt with, or -ENOMEM.
 */
int64_t blocks_put(struct blocks *b, uint64_t start, uint64_t len, bool *twice);
/* The first page from `page` on that is not empty, or b->pages. */
uint64_t blocks_next(const struct blocks *b, uint64_t page);
/* The page's bits, or NULL when it is empty. */
const uint8_t *blocks_page(const struct blocks *b, uint64_t page);

/* ---- lists --------------------------------------------------------------------- */

/*
 * The array `v` with room for one more element of `size` bytes; *room, in
 * elements, doubles when it is full. NULL when memory is short: then `v` is as
 * it was.
 */
void *grow(void *v, size_t size, size_t count, size_t *room);

/* Places in an array by a number, which several may have. */
struct index {
	struct index_slot {
		uint64_t key;
		size_t place;	/* + 1; 0: none */
	} *slot;
	size_t mask, count;
};
int index_add(struct index *x, uint64_t key, size_t place);
/* One after the other: *at begins with 0. False: there are no more. */
bool index_next(const struct index *x, uint64_t key, size_t *at, size_t *place);
void index_fini(struct index *x);

/* Extents. */

struct runs {
	struct extent *v;
	size_t count, room;
};
int runs_add(struct runs *r, uint64_t start, uint64_t len);
/* By start. */
void runs_sort(struct runs *r);
/* Sorted, without overlaps: the place of the first that ends behind `start`, or
 * how many there are. */
size_t runs_first(const struct runs *r, uint64_t start);
/* Of the same: does one meet [start, start + len)? */
bool runs_meet(const struct runs *r, uint64_t start, uint64_t len);

/* Items of the journal, one behind the other, as volume_repair takes them. */
struct items {
	uint8_t *v;
	size_t bytes, room;
	unsigned count;
};
int items_add(struct items *l, enum journal_item type, enum table table,
	      const void *key, size_t klen, const void *val, size_t vlen);

/* ---- what is shared ------------------------------------------------------------- */

struct ref_run {
	uint64_t start, len;
	uint32_t count;
};

struct intent_run {
	uint64_t ino, from, to;
};

/* ---- what was lost with a node ---------------------------------------------------- */

/*
 * A node that cannot be read, and the keys that it may have held: those
 * between the last item before it and the first behind it.
 */
struct gap {
	enum table table;
	unsigned level;
	uint64_t block;
	bool open;		/* what is behind it is still to come */
	size_t lo_len, hi_len;	/* 0: there is none */
	uint8_t lo[KEY_MAX], hi[KEY_MAX];
};

/* What is to be done once the round is over and the volume open for writing. */
enum repair_kind {
	REPAIR_ATTR,		/* set inode `ino`'s field `a` to `b` */
	REPAIR_ENTRY_REMOVE,	/* name in dir `a` */
	REPAIR_ENTRY_TYPE,	/* name in dir `a` to type `b` */
	REPAIR_ENTRY_INDEX,	/* entry name in dir `a` gets an index */
	REPAIR_INDEX_ENTRY,	/* index `b` of dir `a` gets its entry */
	REPAIR_INDEX_SET,	/* index `b` of dir `a` as its entry has it */
	REPAIR_INODE,		/* make inode ino, of mode `a` and size `b` */
	REPAIR_LOST,		/* ino into lost+found */
	REPAIR_ORPHAN_ADD,
	REPAIR_ORPHAN_REMOVE,
	REPAIR_CUT,		/* ino from file block `a` on */
	REPAIR_LOST_RUN,	/* ino's file blocks `a` to `b` - 1 */
	REPAIR_XATTR_REMOVE,	/* name of ino */
	REPAIR_NODE,		/* give up the node of table `ino`, level `a`, block `b` */
	REPAIR_SORT,		/* table `ino`: items of leaf `b` to where they belong */
	REPAIR_BITMAPS,		/* all of them anew */
	REPAIR_SPACE,		/* blocks from `a` on, `b` of them: used or free */
	REPAIR_ITEM_REMOVE,	/* the item of table `a` whose key is name */
	REPAIR_ITEM_PUT,	/* name: a key for table `a`, `b` bytes, and its value */
	REPAIR_REF,		/* blocks `a`, `b` of them, have `ino` references */
	REPAIR_REPLAY,		/* open for writing and close: no more */
	REPAIR_SUPER,		/* superblock's field `a` to `b`; see pass1.c */
	REPAIR_COPY,		/* superblock or backup `a` */
};

enum repair_field {
	FIELD_NLINK,
	FIELD_SIZE,
	FIELD_BLKS,
	FIELD_PARENT,
	FIELD_NEXT_INDEX,
	FIELD_XATTRS,
	FIELD_SHARED,
	FIELD_FLAGS,
	FIELD_MODE,
	FIELD_RDEV,
	FIELD_ATIME,
	FIELD_MTIME,
	FIELD_CTIME,
	FIELD_BTIME,
	SUPER_FREE = 100,
	SUPER_INODES,
	SUPER_ASIDE,
	SUPER_NEXT_INO,
	SUPER_NODES,		/* + table */
	SUPER_ITEMS = SUPER_NODES + TABLES_MAX,
};

struct repair {
	enum repair_kind kind;
	enum problem_id id;
	uint64_t ino, a, b;
	bool unread;		/* REPAIR_NODE: it could not be read */
	uint16_t name_len;
	char *name;
};

struct repairs {
	struct repair *v;
	size_t count, room;
};

/* ---- a run of the program --------------------------------------------------------- */

struct fsck {
	/* what was asked */
	const char *path;
	enum problem_mode mode;
	bool force, verbose, debug, data;
	int slot_wanted;		/* -b; -1 */
	const char *undo;		/* -u; NULL */

	/* what is looked at */
	struct heart *heart;		/* holds the image; NULL: nobody's has beaten */
	struct image *im;		/* what is written over is saved, with -u */
	struct image *file;		/* the image itself */
	struct volume *v;
	bool live;			/* somebody holds it for writing */
	bool super_good;		/* pass 1 found one: */
	struct disk_super super;
	unsigned slot;
	unsigned shift;
	uint64_t blocks;
	struct extent fixed[8];		/* blocks of the head, the ring, the backup */
	unsigned fixeds;
	uint64_t per_bitmap;		/* blocks a bitmap covers */
	uint64_t groups;		/* in the journal, after its tail */
	uint64_t changes;		/* of them, those that change items */

	/* what the passes know */
	struct ino_table inodes;
	struct blocks owned;
	struct runs twice;		/* owned more than once, as first seen */
	struct ref_run *refs;
	size_t ref_count, ref_room;
	struct runs shared;		/* each reference to blocks in refs */
	struct runs ridden;		/* that replay writes to: data rode in the journal */
	struct intent_run *intents;
	size_t intent_count, intent_room;
	uint8_t *there;			/* a bit for each bitmap that there is, or
					   that the journal takes blocks of */
	uint32_t *chunk_used;		/* of each ALLOC_CHUNK, by the bitmaps */
	uint64_t free_blks;		/* by the bitmaps */
	uint64_t data_blks;		/* verified */
	uint64_t inode_count;
	uint64_t aside_blks;		/* unwritten in maps */
	uint64_t next_ino_want;		/* 0: the superblock has it right */
	uint64_t nodes[TABLES], items[TABLES];
	bool refs_anew;			/* a reference count is to be corrected */
	bool look_again;		/* the second walk is needed */
	bool incomplete;		/* nodes are lost: counts mean little */
	bool lost[TABLES];		/* of these tables */
	struct lost_node *gone;		/* nodes that replay must do without */
	size_t gone_count;
	struct gap *gaps;		/* of all rounds */
	size_t gap_count, gap_room;
	struct index gap_at;		/* by block */
	size_t *gap_open;		/* which are open */
	size_t gaps_open, gap_open_room;
	struct lost_node *saved;	/* lost nodes, with what is found of them: the volume
					   is seen so until a round finds no more, and
					   then made so */
	size_t saved_count, saved_room;
	struct index saved_at;		/* by block */
	struct found_node *found;	/* and with these */
	size_t found_count, found_room;
	bool seen_anew;			/* this round has found some more */
	bool keep_blocks;		/* free none: who owns them is in doubt */
	bool bitmaps_lost;		/* some cannot be read */
	struct repairs repairs;
	/* the item that the walk is at */
	enum table table;
	const uint8_t *key;
	size_t klen;
	bool new_leaf;			/* it is the first of its leaf, or there is none */
	char text[160];			/* for a finding's `what` */
};

/*
 * Each returns 0, or a negative errno when it cannot go on (memory, the image
 * cannot be read): then the round ends. Findings are no errors.
 */
int pass1(struct fsck *f);	/* superblocks and backups */
int pass2(struct fsck *f);	/* journal */
int pass3(struct fsck *f);	/* table of references, orphans and intents */
int pass4(struct fsck *f);	/* files: the walk; inodes, xattrs, symlinks */
int pass5(struct fsck *f);	/* directories: links, parents, connectivity */
int pass6(struct fsck *f);	/* link counts, orphans, intents */
int pass7(struct fsck *f);	/* references of shared blocks */
int pass8(struct fsck *f);	/* bitmaps against owners, counts */
int pass9(struct fsck *f);	/* the allocator over the same bitmaps */
int second_look(struct fsck *f);	/* names of what 5 and 7 found */

/* Repairs that wait for a volume open for writing. */
int repair_later(struct fsck *f, const struct repair *r);
int repair_all(struct fsck *f);
/* Can a node be read now that could not when the round passed? Then what was
 * found without it does not hold. */
bool repair_hasty(struct fsck *f);
/* Are all bitmaps to be made anew? */
bool repair_bitmaps_anew(const struct fsck *f);
int repair_super(struct fsck *f);
void repairs_fini(struct repairs *r);
/*
 * Look for what lost nodes held. They go to f->saved, with what is found of them,
 * or to be given up; f->seen_anew says that there are some.
 */
int salvage(struct fsck *f, struct lost_node *lost, size_t losts);
void saved_fini(struct fsck *f);
/* What is saved and `more`, as volume_repair wants it; to be freed. */
struct lost_node *saved_and(const struct fsck *f, const struct lost_node *more,
			    size_t count);
/* Does the superblock lead to it, and it to others? */
bool is_files_root(const struct fsck *f, const struct lost_node *n);
/*
 * Nodes in the image that the volume has, though nobody leads to them, of those
 * that are wanted; in an array to be freed.
 */
int strays_find(struct fsck *f, bool (*wanted)(void *ctx, const struct found_node *n),
		void *ctx, struct found_node **out, size_t *count);
/* The key of item i in a node, *it its lengths; the value stands behind it. */
const uint8_t *item_at(const struct disk_node *d, unsigned i, struct disk_item *it);
/* Where the host holds data from *off on, up to *end; false: nowhere. */
bool fsck_next_data(struct fsck *f, unsigned shift, uint64_t blocks, uint64_t *off,
		    uint64_t *end);

/* ---- helpers of the passes ---------------------------------------------------------- */

/* printf into f->text, which is returned. */
const char *fsck_text(struct fsck *f, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));
const char *table_name(enum table t);

/*
 * Walk a table: checks places and order, marks nodes as owned, reports what is
 * lost, and gives each item to `item` (may be NULL).
 */
int fsck_walk(struct fsck *f, enum table t,
	      int (*item)(struct fsck *f, const uint8_t *key, size_t klen,
			  const uint8_t *val, size_t vlen));
struct gap *gap_find(struct fsck *f, const struct lost_node *n);
/* From now on anything may have been lost of the files. */
int gap_anywhere(struct fsck *f);
/* Which blocks of inode `ino` may have been mapped there; false: none. */
bool gap_blocks(const struct gap *g, uint64_t ino, uint64_t *from, uint64_t *to);
/*
 * Read `n` pieces of `size` bytes, to be looked through: those that cannot be
 * read, each by itself and twice, are zeroes.
 */
void fsck_read_all(struct fsck *f, void *buf, size_t size, size_t n, uint64_t off);
/* The item that the walk is at makes no sense: report, and note to remove it. */
int item_away(struct fsck *f, enum problem_id id, const struct finding *what);
#define ITEM_AWAY(f, id, ...) item_away(f, id, &(struct finding){__VA_ARGS__})
/* Mark blocks as owned by inode `ino` (0: the volume). Shared ones are noted. */
int fsck_own(struct fsck *f, uint64_t ino, uint64_t start, uint64_t len);
/* Nodes of the table of references, marked before any count was known: those that
 * stand where one says that files share. */
int fsck_own_counted(struct fsck *f);
/*
 * References to blocks, each an extent: fn is told of stretches of one count,
 * in order, from block 0 to the volume's end.
 */
int refs_sweep(struct fsck *f, const struct runs *refs,
	       int (*fn)(struct fsck *f, uint64_t from, uint64_t to,
			 uint64_t count));
/* The first chunk from `chunk` on that may have blocks in use, or how many
 * chunks there are. */
uint64_t fsck_next_used(const struct fsck *f, uint64_t chunk);
/* How many bitmaps a volume of this size may have; and the first of them from
 * `index` on that may tell of blocks in use, or how many there may be. */
uint64_t fsck_bitmaps(const struct fsck *f);
uint64_t fsck_next_bitmap(const struct fsck *f, uint64_t index);
/* Is [start, start + len) within the blocks that the allocator deals in? */
bool fsck_in_volume(const struct fsck *f, uint64_t start, uint64_t len);

/* ---- the journal, and superblocks ------------------------------------------------- */

struct ring {
	uint8_t *bytes;
	size_t len;
	uint64_t units, offset;
	uint8_t *group;		/* a copy of the one looked at */
};
/* Also to be ended when this fails. */
int ring_load(struct fsck *f, const struct disk_super *s, struct ring *r);
void ring_fini(struct ring *r);
/*
 * The group at `unit`, if it is one, whole, and of this salt (NULL: of any); or
 * NULL with a reason. Good until the next call.
 */
const struct disk_group *ring_group(struct ring *r, uint64_t unit,
				    const uint64_t *salt, const char **why);
uint64_t group_units(const struct disk_group *g);
/* The item behind `ji` (NULL: the first) in a whole group; NULL behind the last,
 * or where what follows is none. */
const struct disk_jitem *group_item(const struct disk_group *g,
				    const struct disk_jitem *ji);

/* The backup in the last block, where no superblock tells which that is. */
bool super_last(struct image *im, struct disk_super *s);
/* Write a superblock to both slots. */
int super_replace(struct fsck *f, const struct disk_super *s);
/* Let nobody open the volume for writing until its bitmaps are made anew. */
void super_distrust_space(struct disk_super *s);
/*
 * A superblock with what never changes as in `from`, and the rest from journal
 * and nodes. -ENOENT: there is no tree of files.
 */
int rescue_super(struct fsck *f, const struct disk_super *from,
		 struct disk_super *out);
/* Has the tree that it finds more in it than is below these nodes? */
bool rescue_finds_more(struct fsck *f, const struct found_node *n, size_t count);
/*
 * What never changes, where no superblock tells: from the nodes, from where mkfs
 * puts things, and a new UUID. -ENOENT: there is no node of ours in the image.
 */
int guess_super(struct fsck *f, struct disk_super *out);
/* A superblock as from rescue_super(), written; it ends the round. from NULL:
 * guessed. */
int rescue(struct fsck *f, enum problem_id id, const struct disk_super *from);

/* One item of an inode's, for the walk of pass 4. */
struct cur;
int map_item(struct fsck *f, struct cur *c, uint64_t blk, const uint8_t *val,
	     size_t vlen);
int map_end(struct fsck *f, struct cur *c);
/* Why a run makes no sense, or NULL. */
const char *run_wrong(const struct disk_map *m, size_t vlen);
/* Of an inode whose item is lost: may it have gone on behind its last run? Then
 * one block more is noted as lost, so that who reads it all meets an error. */
bool map_end_lost(struct fsck *f, struct cur *c);
/* Runs that are to be marked as lost; of an inode whose item is lost as well. */
int map_lost(struct fsck *f, struct cur *c);
int dirent_item(struct fsck *f, struct cur *c, const char *name, size_t len,
		const uint8_t *val, size_t vlen);
int index_item(struct fsck *f, struct cur *c, uint64_t index,
	       const uint8_t *val, size_t vlen);
const char *name_wrong(const char *name, size_t len);
int dir_end(struct fsck *f, struct cur *c);

/* The inode whose items are passing by. */
struct cur {
	uint64_t ino;
	bool seen;			/* the inode item was there */
	bool odd;			/* and of no known kind */
	struct attr a;
	/* xattrs */
	uint32_t xattrs;
	char xname[256];
	uint32_t xbytes, xgot;
	unsigned xpiece;
	bool xopen;
	/* symlink */
	uint64_t target_bytes;
	unsigned target_pieces;
	bool target_gap;
	/* map */
	uint64_t map_end, written_end, blks;
	const struct intent_run *intent;
	bool beyond;			/* said so once */
	bool bad;			/* a run that makes no sense, from bad_blk on */
	uint64_t bad_blk;
	struct runs bad_runs;		/* file blocks of runs that make no sense */
	struct runs gap_runs;		/* that nodes were lost of: holes, if not lost */
	struct runs unlikely_runs;	/* the same, but their neighbours are in one leaf */
	/* directory */
	uint64_t entries, indexes, entry_sum, index_sum, index_max;
	const char *foreign;		/* items of another kind of file */
};

#endif
