/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_FORMAT_H
#define SPACEWEAVE_FORMAT_H

/*
 * What is on disk, as C. FORMAT.md says the same in words and pictures; where
 * the two differ, FORMAT.md is right and this is a bug. Integers are
 * little-endian but inside keys, which are byte strings in memcmp order and
 * so hold big-endian integers. What is reserved is zero.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Wrapped, so that a forgotten conversion does not compile; of alignment 1, for
 * items stand where they fit. */
typedef struct { uint16_t raw; } __attribute__((packed)) le16;
typedef struct { uint32_t raw; } __attribute__((packed)) le32;
typedef struct { uint64_t raw; } __attribute__((packed)) le64;

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define LE_SWAP16(x) (x)
#define LE_SWAP32(x) (x)
#define LE_SWAP64(x) (x)
#else
#define LE_SWAP16(x) __builtin_bswap16(x)
#define LE_SWAP32(x) __builtin_bswap32(x)
#define LE_SWAP64(x) __builtin_bswap64(x)
#endif

static inline uint16_t get16(le16 x) { return LE_SWAP16(x.raw); }
static inline uint32_t get32(le32 x) { return LE_SWAP32(x.raw); }
static inline uint64_t get64(le64 x) { return LE_SWAP64(x.raw); }
static inline le16 put16(uint16_t x) { return (le16){LE_SWAP16(x)}; }
static inline le32 put32(uint32_t x) { return (le32){LE_SWAP32(x)}; }
static inline le64 put64(uint64_t x) { return (le64){LE_SWAP64(x)}; }

/* The same in keys, which are ordered as bytes. */
static inline void be64_put(uint8_t *p, uint64_t x)
{
	x = __builtin_bswap64(LE_SWAP64(x));
	__builtin_memcpy(p, &x, 8);
}

static inline uint64_t be64_get(const uint8_t *p)
{
	uint64_t x;

	__builtin_memcpy(&x, p, 8);
	return LE_SWAP64(__builtin_bswap64(x));
}

/* ---- where things stand -------------------------------------------------- */

#define FORMAT_VERSION 1u
#define SUPER_MAGIC 0x4556415745434150ull	/* "PACEWAVE" */
#define SUPER_BYTES 4096u
#define SUPER_SLOTS 2
#define SUPER_SLOT_OFFSET(slot) ((uint64_t)(slot) * 65536u)
#define MMP_OFFSET 32768u		/* the block that names the writer */
#define MMP_BYTES 4096u
#define MMP_MAGIC 0x4b434f4c45564157ull	/* "WAVELOCK" */
#define BACKUP_OFFSET 98304u		/* superblock's backup near the start */
#define HEAD_BYTES 131072u		/* blocks below belong to the above */
/* A second backup stands in the volume's last block. */

#define VOLUME_MIN_BYTES (1ull << 20)
#define VOLUME_MAX_BYTES (1ull << 50)
#define BLOCK_SHIFT_MIN 12
#define BLOCK_SHIFT_MAX 16
#define LABEL_BYTES 64

/* Which tree. */
enum table {
	TABLE_FILES = 0,	/* inodes and all that belongs to one */
	TABLE_REFS = 1,		/* shared blocks, orphans, intents: one a volume */
	TABLE_SPACE = 2,	/* where the bitmaps are */
	TABLES = 3,
	TABLES_MAX = 6,		/* places in the superblock */
};

/* A pointer to a node. The node carries the same block, stamp and birth. */
struct disk_ptr {
	le64 block;		/* 0: no node, the table is empty */
	le64 stamp;		/* drawn for this node alone, never used twice */
	le64 birth;		/* generation that wrote it */
};

struct disk_root {
	struct disk_ptr ptr;
	le64 nodes;		/* nodes of the tree, all levels */
	le64 items;		/* items in its leaves */
	le32 level;		/* of the root; leaves are 0 */
	le32 reserved;
};

/* Features: a reader that does not know an incompatible one must not open the
 * volume; a read-only compatible one, not for writing. None exists yet. */
#define FEATURES_COMPAT 0ull
#define FEATURES_RO_COMPAT 0ull
#define FEATURES_INCOMPAT 0ull

#define SUPER_CLEAN 1u		/* unmounted; the ring holds nothing in doubt */

struct disk_super {
	le64 magic;
	le32 version;
	le32 slot;		/* which copy: 0, 1; 2, 3 for the backups */
	/* What does not change but by a tool. */
	uint8_t uuid[16];
	char label[LABEL_BYTES];	/* NUL-padded */
	le64 compat;
	le64 ro_compat;
	le64 incompat;
	le32 block_shift;	/* log2 of the block size in bytes */
	le32 reserved0;
	le64 blocks;		/* size of the volume */
	le64 journal_block;	/* first block of the ring */
	le64 journal_units;	/* length of the ring, in JOURNAL_UNITs */
	le64 created_ns;	/* since 1970 */
	/* The state as of a checkpoint. A backup holds what mkfs wrote. */
	le64 gen;		/* number of the checkpoint */
	le64 salt;		/* of the groups from the tail on */
	le64 tail_unit;		/* position of the tail in the endless ring */
	le64 tail_seq;		/* the sequence number expected there */
	le64 tail_prev;		/* checksum of its predecessor */
	le64 durable_seq;	/* groups to this one are whole, or damaged */
	le64 next_ino;
	le64 free_blks;		/* free in the bitmaps of this checkpoint */
	le64 inodes;
	le64 written_ns;
	le32 flags;		/* SUPER_ */
	le32 mounts;		/* writable mounts so far */
	struct disk_root root[TABLES_MAX];
	le64 aside;		/* blocks that maps hold unwritten */
	uint8_t reserved[SUPER_BYTES - 248 - TABLES_MAX * 48 - 16];
	le64 csum;		/* XXH3-64 of all before it */
};

/* Written by who holds the volume for writing, so that others can be told. */
#define MMP_FREE 0u
#define MMP_HELD 1u
#define MMP_CLOSING 2u
struct disk_mmp {
	le64 magic;
	le64 seq;		/* grows with every write of the block */
	le64 nonce;		/* drawn by the holder */
	le64 time_ns;
	le32 state;		/* MMP_ */
	le32 pid;
	le32 interval_s;	/* how often the holder writes; 0: once */
	le32 reserved0;
	char host[64];
	char program[32];
	uint8_t reserved[MMP_BYTES - 48 - 96 - 8];
	le64 csum;
};

/* ---- nodes --------------------------------------------------------------- */

/*
 * A node fills one block. After the header an array of le16, the offsets of
 * its items in key order; items grow down from the block's end. In a leaf an
 * item's value belongs to the table; above, it is a disk_ptr, and the key is
 * a lower bound of the child's keys (the first one's counts as lower than any).
 */
#define NODE_MAGIC 0x444f4e53u		/* "SNOD" */
struct disk_node {
	le32 magic;
	uint8_t level;
	uint8_t table;
	le16 count;		/* items */
	le64 csum;		/* XXH3-64 of the block with this field zero */
	struct disk_ptr self;
	le16 heap;		/* where items begin; 0 stands for 65536 */
	le16 garbage;		/* bytes in the heap that no item owns */
	le32 reserved;
};

struct disk_item {
	le16 klen;
	le16 vlen;
	uint8_t bytes[];	/* key, then value */
};

/* The order of keys: by bytes, and of one that begins as another the longer last. */
static inline int key_cmp(const void *a, size_t alen, const void *b, size_t blen)
{
	int c = memcmp(a, b, alen < blen ? alen : blen);

	return c ? c : (alen > blen) - (alen < blen);
}

#define KEY_MAX 268u		/* longest key: an xattr piece's, 8 + 1 + 255 + 1 + 2 */
/* Longest value, so that four items always fit a node of the smallest block. */
#define VALUE_MAX 704u

/* ---- keys and values of TABLE_FILES --------------------------------------- */

/* Key: inode number (8, big-endian), type (1), then by type: */
enum file_key {
	KEY_INODE = 1,		/* - ; disk_inode */
	KEY_DIRENT = 2,		/* name ; disk_dirent */
	KEY_INDEX = 3,		/* index (8) ; disk_index */
	KEY_XATTR = 4,		/* name, NUL, piece (2) ; disk_xattr in piece 0 */
	KEY_SYMLINK = 5,	/* piece (2) ; target's bytes */
	KEY_INLINE = 6,		/* reserved: a small file's bytes */
	KEY_MAP = 7,		/* file block (8) ; disk_map */
};

#define PIECE_BYTES 640u	/* of a symlink or xattr value an item holds */

#define ROOT_INO 1ull
#define FIRST_INO 16ull		/* numbers below are reserved but the root's */
#define INO_MAX (1ull << 62)	/* none is higher */

#define FIRST_INDEX 3ull	/* of a directory's entries; "." and ".." are 1, 2 */

#define INODE_IMMUTABLE 0x0001u
#define INODE_APPEND 0x0002u
#define INODE_NODUMP 0x0004u
#define INODE_NOATIME 0x0008u
#define INODE_SYNC 0x0010u
#define INODE_DIRSYNC 0x0020u
#define INODE_SHARED 0x0100u	/* its blocks may be in the table of references */
#define INODE_LOST 0x0200u	/* its map has, or had, lost runs */

struct disk_time {
	le64 sec;		/* signed, since 1970 */
	le32 nsec;
	le32 reserved;
};

struct disk_inode {
	le32 mode;
	le32 nlink;
	le32 uid;
	le32 gid;
	le32 flags;		/* INODE_ */
	le32 rdev;		/* Linux's 32-bit encoding: major 12, minor 20 */
	le32 projid;
	le32 xattrs;		/* how many */
	le64 size;		/* bytes; of a directory: its entries */
	le64 blks;		/* volume blocks its map holds */
	le64 parent;		/* of a directory */
	le64 next_index;	/* of a directory: the next entry's index */
	struct disk_time atime, mtime, ctime, btime;
};

/* By name, for lookup. */
struct disk_dirent {
	le64 ino;
	le64 index;
	uint8_t type;		/* DT_ */
	uint8_t reserved[7];
};

/* The same entry by its index, in the order of creation, for readdir. */
struct disk_index {
	le64 ino;
	uint8_t type;
	uint8_t name[];
} __attribute__((packed));

struct disk_xattr {
	le32 bytes;		/* of the whole value */
	uint8_t value[];	/* the first PIECE_BYTES of it */
};

/*
 * `len` blocks of the file from the key's block on stand at `start`. A written
 * run (flags 0) has a checksum for each block and is at most MAP_MAX long; an
 * unwritten one reads as zeroes and has none. A lost one stands where a repair
 * found that the map itself was damaged: reading it fails, for it may have been
 * data; it has neither place nor checksums, and may be as long as a file: `start`
 * is the upper half of its length.
 */
#define MAP_UNWRITTEN 1u
#define MAP_LOST 2u
#define MAP_MAX 64u
#define MAP_BARE_MAX 0x40000000u	/* of an unwritten run */
struct disk_map {
	le64 start;
	le64 birth;		/* generation that made this reference */
	le32 len;
	le32 flags;
	le64 csum[];		/* XXH3-64 of each block */
};

static inline uint64_t map_len(const struct disk_map *m)
{
	return get32(m->len) | (get32(m->flags) & MAP_LOST ? get64(m->start) << 32 : 0);
}

/* Of an item of TABLE_FILES: how many blocks it sets aside. */
static inline uint64_t map_aside(const uint8_t *key, size_t klen, const void *val,
				 size_t vlen)
{
	struct disk_map m;

	if (klen != 17 || key[8] != KEY_MAP || vlen != sizeof(m))
		return 0;
	memcpy(&m, val, sizeof(m));
	return get32(m.flags) == MAP_UNWRITTEN ? get32(m.len) : 0;
}

/* ---- keys and values of TABLE_REFS ---------------------------------------- */

/* Key: type (1), then by type: */
enum refs_key {
	KEY_REF = 1,		/* first block (8) ; disk_ref */
	KEY_ORPHAN = 2,		/* inode number (8) ; - */
	KEY_INTENT = 3,		/* inode number (8) ; disk_intent */
};

struct disk_ref {
	le64 len;
	le32 count;		/* references; 2 or more */
	le32 reserved;
};

/* Blocks of a file still to be unmapped; they are beyond what anyone sees. */
struct disk_intent {
	le64 from;		/* file blocks */
	le64 to;
};

/* ---- TABLE_SPACE ---------------------------------------------------------- */

/*
 * Key: number of the bitmap block (8), which covers 8 * block size blocks;
 * bit i of byte i / 8 is set when the block is in use. No item: all free.
 */
struct disk_space {
	le64 block;		/* where the bitmap stands */
	le64 csum;		/* XXH3-64 of it */
	le64 birth;
	le32 free;
	le32 reserved;
};

/* ---- the journal ---------------------------------------------------------- */

#define JOURNAL_UNIT 4096u	/* groups begin at multiples of it */
#define JOURNAL_MIN_UNITS 48u
#define JOURNAL_MAX_UNITS 262144u	/* 1 GiB: opening reads all of it */
#define GROUP_MAGIC 0x50524753u		/* "SGRP" */

struct disk_group {
	le32 magic;
	le32 bytes;		/* with this header, without padding */
	le64 salt;
	le64 seq;
	le64 prev;		/* checksum of the group before */
	le64 durable_seq;	/* groups to this one were durable already */
	le64 checkpoint_gen;	/* the newest durable checkpoint */
	le64 of_gen;		/* not 0: blocks of that checkpoint itself; counts
				   only when replay starts from it */
	le32 items;
	le32 reserved;
	le64 reserved1;
	le64 csum;		/* XXH3-64 of the group with this field zero */
};

enum journal_item {
	JITEM_PUT = 1,		/* key, value */
	JITEM_DEL = 2,		/* key */
	JITEM_TAKE = 3,		/* klen 16: start, length (little-endian) */
	JITEM_FREE = 4,		/* the same */
	JITEM_DATA = 5,		/* klen 8: block (little-endian); its contents */
};

struct disk_jitem {
	uint8_t type;		/* JITEM_ */
	uint8_t table;
	le16 klen;
	le16 vlen;
	le16 reserved;
	uint8_t bytes[];
};

/* ---- checks of the above -------------------------------------------------- */

#define FORMAT_SIZE(s, n) _Static_assert(sizeof(struct s) == (n), #s)
FORMAT_SIZE(disk_ptr, 24);
FORMAT_SIZE(disk_root, 48);
FORMAT_SIZE(disk_super, SUPER_BYTES);
FORMAT_SIZE(disk_mmp, MMP_BYTES);
FORMAT_SIZE(disk_node, 48);
FORMAT_SIZE(disk_item, 4);
FORMAT_SIZE(disk_time, 16);
FORMAT_SIZE(disk_inode, 128);
FORMAT_SIZE(disk_dirent, 24);
FORMAT_SIZE(disk_index, 9);
FORMAT_SIZE(disk_map, 24);
FORMAT_SIZE(disk_ref, 16);
FORMAT_SIZE(disk_intent, 16);
FORMAT_SIZE(disk_space, 32);
FORMAT_SIZE(disk_group, 80);
FORMAT_SIZE(disk_jitem, 8);
_Static_assert(offsetof(struct disk_super, gen) == 160, "disk_super.gen");
_Static_assert(offsetof(struct disk_super, root) == 248, "disk_super.root");
_Static_assert(offsetof(struct disk_super, aside) == 536, "disk_super.aside");

#endif
