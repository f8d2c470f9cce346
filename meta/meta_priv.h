/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_META_PRIV_H
#define SPACEWEAVE_META_PRIV_H

/*
 * What the files of meta/ share and nobody else sees.
 *
 * A volume in memory, in the order data flows through it:
 *
 *   txn  ->  commit  ->  trees (nodes, copied before they change)
 *                   \->  open group  ->  closed groups  ->  ring
 *                   \->  deltas: blocks taken and freed
 *   checkpoint: frozen nodes and deltas of generation G  ->  image  ->  slot
 *
 * The commit lock makes the three effects of a commit one. Freezing a
 * generation is a matter of moving three list heads under that lock.
 */

#include "meta/meta.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define EFSCORRUPTED EUCLEAN
#define EFSBADCRC EBADMSG

#define TREE_LEVELS 16

/* A group is closed when it holds so much, whatever the time. */
#define GROUP_FULL_BYTES (256u << 10)
#define GROUP_FULL_DATA (16u << 20)

/* Data that may be written and not flushed. */
#define UNFLUSHED_MAX (256u << 20)
/* Freed runs so long are discarded at once; shorter ones when so much of them
 * has come together. */
#define DISCARD_BYTES (128u << 10)
#define TRIM_BYTES (4u << 20)

/* So much goes to the host in one call. */
#define DISCARD_PIECE_BYTES (64u << 20)

/* A block's address that is none: new nodes of a read-only volume. */
#define FAKE_BLOCK (1ull << 62)

struct ptr {
	uint64_t block, stamp, birth;
};

/* A node in memory: the block as it is on disk, and what it is to the cache. */
struct node {
	struct ptr self;
	struct node *hash_next;
	struct node *prev, *next;	/* in the clock, or in a dirty list */
	uint8_t table, level;
	bool dirty;			/* not written at self.block yet */
	bool superseded;		/* frozen, and replaced since */
	_Atomic bool used;		/* seen since the clock's hand passed */
	uint32_t coming;		/* bytes that the change `met` puts into it */
	uint64_t met;			/* number of the last change prepared here */
	struct disk_node *d;
};

struct node_list {
	struct node *head;
	size_t count;
};

struct tree {
	enum table table;
	struct ptr root;
	unsigned level;
	uint64_t nodes, items;
	uint64_t gen;			/* nodes of it, dirty, change in place */
	struct deltas *frees;		/* nodes of older generations, replaced */
	struct node_list dirty;
	bool unsettled;			/* a change in progress left a leaf with little */
};

/* A block run taken (free false) or freed by a committed transaction. */
struct delta {
	uint64_t start, len;
	bool free;
	bool own;		/* of nodes or bitmaps: the host has blocks there */
};

struct deltas {
	struct delta *v;
	size_t count, cap;
};

/* A block's data that is not in the image yet: held.c. */
struct held {
	uint64_t block;
	struct held *hash_next, *next;
	uint8_t data[];
};

struct held_list {
	struct held *head, *tail;
	size_t count;
};

/* Writes so short are held, of blocks so small. */
#define HELD_BLOCKS 4u
#define HELD_BLOCK_BYTES 16384u
/* A group that is flushed carries so much data itself. */
#define RIDE_BYTES (64u << 10)
/* So much memory is held in all, and that only while cache= leaves it. */
#define HELD_BYTES (32u << 20)
#define ENSURED 256u

/* Transactions that become durable together. */
struct group {
	struct group *next;
	uint64_t seq;
	uint64_t unit;			/* place, once closed */
	uint64_t of_gen;
	uint64_t salt;
	uint32_t items;
	uint64_t data_bytes;
	struct held_list held;		/* to be put in place before it */
	uint8_t *buf;			/* header's room, then items */
	size_t len, cap;
};

/* What says that somebody holds an image: mmp.c. */
struct heart {
	struct image *im;
	const char *program;
	unsigned interval_s;		/* 0: it does not beat */
	uint64_t before;		/* mmp_expect(), before anything was read */
	bool before_known;
	_Atomic int *failed;		/* not 0: it beats no more */
	_Atomic int none_failed;
	void (*lost)(void *ctx, int err, const char *why);
	void *ctx;
	struct lock lock;		/* of the block */
	struct disk_mmp mmp;
	pthread_cond_t wake;
	pthread_t thread;
	bool runs, stop;
	_Atomic uint64_t beat_s;	/* when it was last written */
};

struct volume {
	struct image *im;
	struct volume_options opt;
	unsigned shift;			/* log2 of the block size */
	uint32_t block_bytes;
	uint64_t blocks;
	bool readonly;			/* opened so */
	bool replaying;			/* replay may change a read-only volume */
	bool was_clean;
	_Atomic int failed;		/* errno of the failure that ended writing */
	struct alloc *alloc;

	/* -- commit lock -- */
	struct rwlock commit;
	struct disk_super super;	/* as read, or written last */
	unsigned slot;			/* that it came from */
	struct tree trees[TABLES];
	uint64_t gen;			/* being made; the next checkpoint's */
	uint64_t next_stamp;
	uint64_t inodes;
	uint64_t aside;			/* blocks that maps hold unwritten */
	struct node **hash;
	size_t hash_mask, cached;	/* nodes in the table */
	size_t cache_nodes;		/* their bound */
	struct node_list clock;		/* clean nodes; its head is the hand */
	struct node *spare;		/* node memory to be used again */
	size_t spares;
	struct slab *slabs;		/* where all memory of nodes lies */
	uint8_t *scratch;		/* one block */
	_Atomic uint64_t ahead_from;	/* leaves were read ahead from there */
	struct group *open;
	struct deltas deltas;		/* of the open generation */
	struct deltas node_frees;	/* trees[].frees of files and references */
	struct deltas space_frees;	/* and of the table of bitmaps */
	struct extent *pool;		/* claimed blocks for new nodes */
	size_t pool_count, pool_cap;
	uint64_t pool_blks;
	uint64_t joins;			/* of them, for nodes that take a neighbour in */
	uint64_t changes;		/* prepared so far */
	uint64_t pool_floor;		/* the last of them are for what frees */
	uint64_t *changed;		/* a bit for each bitmap this generation changes */
	uint64_t changed_before;	/* how many the one did that is being written */
	uint64_t backed;		/* of the pool, at least so many are for them */
	uint64_t fake_next;
	uint64_t head_unit;		/* where the next group will stand */
	uint64_t next_seq;		/* of the next group to be opened */
	uint64_t salt;
	struct deltas dropped;		/* read-only: nodes that replay dropped */
	struct held_list riding;	/* in the ring, not in place */

	struct lock flush;		/* one flush of the image at a time */

	/* -- journal lock -- */
	struct lock journal;
	pthread_cond_t journal_done;
	bool writing;			/* somebody writes groups or flushes */
	struct group *closed, **closed_tail;
	uint64_t written_seq, durable_seq, attested_seq, mark_seq;
	uint64_t last_csum;

	/* -- checkpoint lock -- */
	struct lock checkpoint;
	uint64_t tail_unit;
	uint64_t own_units;		/* of them, groups of checkpoints' own */
	uint64_t bitmap_free;		/* free in the bitmaps as last written */
	struct deltas merging;		/* replayed: what load() must add */

	/* -- no lock -- */
	_Atomic uint64_t next_ino;
	uint64_t ring_room;		/* bytes of the ring for transactions */
	_Atomic int64_t ring_free;	/* of them, not promised, nor in use */
	_Atomic int64_t ring_promised;
	_Atomic unsigned ring_waiters;	/* for ring_wake, with ring_lock */
	struct lock ring_lock;
	pthread_cond_t ring_wake;
	_Atomic uint64_t durable_gen;
	_Atomic uint64_t free_blks;	/* no file's, no node's, no bitmap's */
	_Atomic uint64_t pending_blks;	/* freed, not released yet */
	_Atomic uint64_t pending_own;	/* of them, by the last checkpoint itself */
	_Atomic uint64_t reserve_held;	/* blocks promised to us by alloc */
	uint64_t reserve_txns;		/* of what it should be: for transactions */
	uint64_t checkpoint_blks;	/* and what one checkpoint takes at most */
	unsigned cut_items;		/* of a transaction that cuts up a map */
	_Atomic bool host_full;		/* it had no blocks, the last time */
	_Atomic uint64_t dirty_nodes;
	_Atomic uint64_t touched;	/* bitmaps, by this generation's runs; at most */
	uint64_t touched_max;		/* then it ends, if the journal is small */
	_Atomic uint64_t changed_maps;	/* bits in `changed` */
	_Atomic uint64_t back_at;	/* with so many the pool is looked at */
	size_t txn_max;			/* bytes one transaction may log */
	uint64_t ring_reserve;		/* bytes that only checkpoints may use */
	_Atomic uint64_t n_commits, n_groups, n_flushes, n_checkpoints;
	uint64_t replayed_groups;
	struct group *replay, **replay_tail;	/* while opening */
	uint64_t ring_units, ring_offset;	/* offset in bytes */
	_Atomic uint64_t unflushed;	/* bytes of data, in closed groups */
	_Atomic uint64_t trim_due;	/* released but not discarded */

	/* -- lock of held data -- */
	struct lock held_lock;
	struct held **held;
	_Atomic size_t held_count;
	_Atomic uint64_t ensured[ENSURED];	/* megabytes that the host has */
	_Atomic uint64_t discards;		/* what is older is not so */

	/* Held by who takes free blocks to punch them, until he has given them back:
	 * a writer who finds none waits for it and looks again. */
	struct lock punch;

	/* -- lock of the table of references -- */
	struct lock refs;

	/* -- lock of the table of inodes -- */
	struct lock icache;
	pthread_cond_t icache_loaded;
	struct inode **ihash;
	size_t ihash_mask, icount, iunused, ilimit;
	struct inode *lru_head, *lru_tail;
	uint64_t *late;			/* orphans that could not be freed yet */
	size_t late_count, late_cap;

	/* who holds the volume: it, or who has opened it */
	struct heart own_heart, *heart;

	/* the thread of timer and background checkpoints */
	struct lock timer;
	pthread_cond_t timer_wake;
	pthread_t thread;
	bool thread_runs, thread_stop, want_checkpoint, want_write;
	_Atomic bool armed;		/* something waits for the timer */
};

struct inode_change {
	struct inode *ip;
	struct attr a;
	bool created;
};

struct ref_change {
	uint64_t start, len;
	int by;			/* +1, -1 */
};

struct txn {
	struct volume *v;
	enum txn_kind kind;
	uint8_t *buf;			/* journal items */
	size_t len, cap;
	unsigned items;
	bool in_place;			/* writes to blocks set aside before */
	uint64_t aside, extra;		/* blocks it sets aside; promised for them */
	size_t promise, used;		/* bytes of the ring held; and logged */
	uint64_t data_bytes;
	uint64_t touched;		/* bitmaps, by its runs; at most */
	struct inode_change edit[10];
	unsigned edits;
	struct held_list held;
	struct deltas deltas;		/* taken, and freed (deferred) */
	struct ref_change *refs;
	size_t ref_count, ref_cap;
	size_t ref_bytes;		/* that the changes will log */
	bool refs_locked;
};

/* ---- format.c ------------------------------------------------------------- */

uint64_t random64(void);
uint64_t now_ns(void);

struct key {
	uint16_t len;
	uint8_t b[KEY_MAX];
};

/* Keys of TABLE_FILES: (ino, type), and with a number or bytes behind. */
void key_file(struct key *k, uint64_t ino, enum file_key type);
void key_file_num(struct key *k, uint64_t ino, enum file_key type, uint64_t num);
void key_file_bytes(struct key *k, uint64_t ino, enum file_key type,
		    const void *b, size_t len);
void key_file_piece(struct key *k, uint64_t ino, enum file_key type,
		    const char *name, unsigned piece);
void key_refs(struct key *k, enum refs_key type, uint64_t num);
void key_space(struct key *k, uint64_t index);

/* One block of a node against its pointer: bounds of every item included. */
int node_verify(const struct disk_node *d, size_t block_bytes, enum table table,
		unsigned level, const struct ptr *self, const char **why);
void node_seal(struct disk_node *d, size_t block_bytes);

static inline struct ptr ptr_get(const struct disk_ptr *d)
{
	return (struct ptr){get64(d->block), get64(d->stamp), get64(d->birth)};
}

static inline struct disk_ptr ptr_put(const struct ptr *p)
{
	return (struct disk_ptr){put64(p->block), put64(p->stamp), put64(p->birth)};
}

/* ---- tree.c: every call takes the commit lock itself unless _locked -------- */

int tree_init(struct volume *v);
void tree_fini(struct volume *v);

/* The value of `key`: up to `cap` bytes into val, *vlen its length. */
int tree_lookup(struct volume *v, enum table t, const void *key, size_t klen,
		void *val, size_t cap, size_t *vlen);

/*
 * Items with lo <= key < hi in order, until fn returns nonzero (which is
 * returned). fn runs under the commit lock: it copies, no more. With `floor`
 * the last item below lo comes first, if there is one >= *floor_min.
 */
typedef int (*tree_fn)(void *ctx, const uint8_t *key, size_t klen,
		       const uint8_t *val, size_t vlen);
int tree_range(struct volume *v, enum table t, const struct key *lo,
	       const struct key *hi, tree_fn fn, void *ctx);
int tree_range_floor(struct volume *v, enum table t, const struct key *floor_min,
		     const struct key *lo, const struct key *hi, tree_fn fn,
		     void *ctx);

struct tree_miss {
	enum table table;
	unsigned level;
	struct ptr ptr;
	uint64_t ahead;		/* blocks from there that will be wanted; 0: who knows */
	const char *why;
};
/*
 * What a change of several items can need, counted before it begins: exactly
 * which nodes it meets, and how many of them may not have the room.
 */
struct tree_need {
	uint64_t nodes;		/* to be made: copies, and halves of full ones */
	uint64_t gone;		/* that it can leave without use */
};
/* A change is to be prepared: its items follow. */
void tree_need_init_locked(struct volume *v, struct tree_need *need);
/* Is all in memory that this item of it touches? -EAGAIN: load *miss. */
int tree_prepare_locked(struct volume *v, const struct disk_jitem *ji,
			struct tree_need *need, struct tree_miss *miss);
/*
 * Bring a missing node into memory. *bad is the last node that failed to
 * verify: once it is still wanted it is reported, and its error returned.
 */
int tree_load(struct volume *v, const struct tree_miss *miss, struct tree_miss *bad,
	      int *bad_err);
/* A block of the pool, and one back into it, which has room for it. */
/* Nobody's any more; to be used again after the next checkpoint. */
static inline void blocks_pend(struct volume *v, uint64_t n)
{
	atomic_fetch_add(&v->free_blks, n);
	atomic_fetch_add(&v->pending_blks, n);
}
uint64_t block_pop_locked(struct volume *v);
void block_push_locked(struct volume *v, uint64_t block);
/* These cannot fail after tree_prepare_locked() and a filled pool. */
/* The value of a key if it is there: up to `cap` bytes of it. */
bool tree_peek_locked(struct volume *v, enum table t, const void *key, size_t klen,
		      void *val, size_t cap, size_t *vlen);
/* True when the key was not there before; true when it was there. */
bool tree_put_locked(struct volume *v, enum table t, const void *key, size_t klen,
		     const void *val, size_t vlen);
bool tree_del_locked(struct volume *v, enum table t, const void *key, size_t klen);
/* For a key that was deleted, when all items of the change are in: what is
 * empty goes, what holds little may join a neighbour. */
void tree_settle_locked(struct volume *v, enum table t, const void *key, size_t klen);
int tree_spares_locked(struct volume *v, size_t want);
/*
 * Make a tree whole again as opt.repair says, but for the items. Not journaled:
 * for opening, before the first checkpoint.
 */
int tree_mend(struct volume *v, enum table t);
/*
 * Drop clean nodes not used lately until the cache is within its bound: when
 * one is read, and when one is made or written. Not while a path is held.
 */
void tree_shrink_locked(struct volume *v);
/*
 * These blocks will be new nodes. Nodes that are in memory and not dirty go: what
 * still leads to one leads to a free block, and is to be found damaged.
 */
void tree_forget_locked(struct volume *v, uint64_t start, uint64_t len);
/* Frozen nodes are on disk now. */
void tree_written_locked(struct volume *v, struct node **nodes, size_t count);
/* Frozen nodes of a checkpoint that failed: the volume's again. */
void tree_unwritten_locked(struct volume *v, enum table t, struct node_list *l);

/* ---- txn.c ------------------------------------------------------------------ */

/*
 * Who asks for blocks decides what may be done to get them: let a checkpoint
 * release what is pending, and then take of the reserve, each down to where it
 * is kept for those below (pool.c).
 */
enum spend {
	SPEND_NONE,		/* nothing of the reserve */
	SPEND_REWRITE,		/* writes anew what is there already */
	SPEND_ASIDE,		/* writes what was set aside for it */
	SPEND_FREEING,		/* gives more than it takes, sooner or later */
	SPEND_CHECKPOINT,	/* all of it, at once: this is a checkpoint */
};

int txn_put(struct txn *t, enum table table, const struct key *k,
	    const void *val, size_t vlen);
int txn_del(struct txn *t, enum table table, const struct key *k);
/* One that cuts up a map shall be ended: what it needs stays within what the
 * reserve has for it. */
bool txn_cuts_enough(const struct txn *t);
#define TXN_BITMAPS 64u		/* when it has changed so many, that is */
/* Take blocks: up to `max` extents; fewer than `n` in all when max is small. */
int txn_alloc(struct txn *t, uint64_t goal, uint64_t n, struct extent *out,
	      unsigned max, unsigned *count, uint64_t *got);
/* So many bitmaps one transaction may touch, and a run more. */
static inline uint64_t txn_touched_max(const struct volume *v)
{
	return v->touched_max / 4;
}
/* Promise what writing n blocks that are set aside will take. -ENOSPC. */
int txn_set_aside(struct txn *t, uint64_t n);
/* Free a run once this commits and a checkpoint has covered it. */
int txn_free(struct txn *t, uint64_t start, uint64_t len);
/* One reference more (+1) or less (-1) on blocks that may be shared. */
int txn_ref(struct txn *t, uint64_t start, uint64_t len, int by);
/*
 * Apply items of the journal, one behind the other and all prepared for, to
 * trees and deltas: all there is to replay.
 */
int items_apply_locked(struct volume *v, const struct disk_jitem *ji, unsigned items);
const struct disk_jitem *item_next(const struct disk_jitem *ji);
/*
 * Take the commit lock for writing, with all in memory and in the pool that
 * applying these items can need; or fail without the lock.
 */
int commit_lock_prepared(struct volume *v, const void *items, unsigned count,
			 enum spend spend);
void txn_thread_done(void);
int delta_add(struct deltas *d, uint64_t start, uint64_t len, bool free);
int delta_add_own(struct deltas *d, uint64_t start, uint64_t len, bool free);
/* These blocks are taken or freed: what bitmaps change with that in this generation? */
void pool_changed_locked(struct volume *v, uint64_t start, uint64_t len, bool free);
/* The generation ends; and its bitmaps have their blocks. */
void pool_freeze_locked(struct volume *v);
void pool_written_locked(struct volume *v);
/* What of the pool is not for this spender's nodes. */
uint64_t pool_leave_locked(const struct volume *v, enum spend spend);
/* Has it blocks for the bitmaps that have changed? -EAGAIN: not without a
 * checkpoint, for the host is full. */
int pool_back(struct volume *v);
/* Fill it for the first time: -ENOSPC when the host is full. */
int pool_open(struct volume *v);
/* Put n more blocks into the pool. */
int pool_fill(struct volume *v, uint64_t n, enum spend spend);
bool pool_has_locked(const struct volume *v, uint64_t block);
/* Room for `more` runs in its list. */
int pool_room_locked(struct volume *v, size_t more);
/* One block out of it, for the checkpoint. */
int pool_take(struct volume *v, uint64_t *block);
/* Keep freed blocks of nodes and bitmaps while the pool is low; they are taken
 * off their runs. */
void pool_keep(struct volume *v, struct deltas *l);
/* What it has beyond that is free again. */
int pool_lower(struct volume *v);
/* Take blocks for the volume's own use, from the reserve if it must be. */
int volume_take(struct volume *v, uint64_t goal, uint64_t n, struct extent *out,
		unsigned max, unsigned *count, uint64_t *got, enum spend spend);
/* The same; and when there is no space, let a checkpoint release what waits for
 * one, and try once more. */
int volume_take_waiting(struct volume *v, uint64_t goal, uint64_t n,
			struct extent *out, unsigned max, unsigned *count,
			uint64_t *got, enum spend spend);
/* How large it shall be, decided when a volume is opened for writing. */
int reserve_init(struct volume *v);
void reserve_top_up(struct volume *v);
/* The allocator's promise of n blocks more, for whoever counts them in then. */
int reserve_more(struct volume *v, uint64_t n);
/* A freed run that is free now: to the reserve if that lacks blocks. */
int reserve_release(struct volume *v, uint64_t start, uint64_t len);

/* ---- held.c ------------------------------------------------------------------------ */

int held_init(struct volume *v);
void held_fini(struct volume *v);
/* Hold copies of n blocks; false: write them at once instead (what was put on
 * the list does no harm). */
bool held_new(struct volume *v, struct held_list *l, uint64_t block, uint64_t n,
	      const uint8_t *buf);
void held_join(struct held_list *l, struct held_list *more);
void held_list_free(struct held *h);
void held_publish(struct volume *v, const struct held_list *l);
void held_end(struct volume *v, struct held_list *l);
/* Put all of a list into place and end holding it. */
int held_write(struct volume *v, struct held_list *l);
/* What rides in a group as journal items, so many bytes (0: none of it, there is
 * too much): copied here, and held on in v->riding. */
size_t held_ride_bytes(const struct volume *v, const struct held_list *l);
void held_copy_items(const struct volume *v, const struct held_list *l, uint8_t *to);
/* Hold what rode in a group; -EFSCORRUPTED if the block is held already. */
int held_replay(struct volume *v, const struct disk_jitem *ji,
		struct held_list *l);
/* Blocks were given back to the host. */
void held_forget_ensured(struct volume *v);

/* ---- journal.c ---------------------------------------------------------------- */

int journal_init(struct volume *v);
void journal_fini(struct volume *v);
/* Room for `len` more bytes in the open group, so that appending cannot fail. */
int journal_room_locked(struct volume *v, size_t len);
/* Append a transaction's items and data to the open group; returns its seq, and
 * in t->used what that takes of the ring. */
uint64_t journal_append_locked(struct volume *v, struct txn *t);
/* Close the open group, if there is one; with `ride`, little data goes into it. */
void journal_close_locked(struct volume *v, bool ride);
/*
 * A group of its own for the blocks of checkpoint `gen`, of so many units. -ENOSPC,
 * reported, where the ring has no room for it. Caller holds the checkpoint lock.
 */
int journal_own_group(struct volume *v, uint64_t gen, const struct deltas *d,
		      uint64_t *seq, uint64_t *units);
/* Bytes of the smallest journal for a volume so large. */
uint64_t journal_least(uint64_t blocks, unsigned shift);
/* What mkfs makes of large volumes; it never asks for more. */
#define JOURNAL_USUAL (32ull << 20)
/* Write groups up to `seq`; with `flush`, make them durable. */
int journal_write(struct volume *v, uint64_t seq, bool flush);
/* Flush the image; when that fails, so has the volume. May be called at any time
 * by any thread. */
int journal_flush(struct volume *v);
/*
 * Between two groups: all before is written, freeze() was called under the
 * commit lock at that very moment.
 */
struct cut {
	uint64_t unit, seq, salt, prev;
};
int journal_cut(struct volume *v, void (*freeze)(void *ctx), void *ctx,
		struct cut *out);
/* The last mark of an idle volume, unflushed. */
int journal_mark(struct volume *v);
/* Hold `bytes` of the ring for a transaction; may run a checkpoint, and wait for
 * others to end theirs: no lock is held. And give back what was not used. */
int ring_promise(struct volume *v, size_t bytes);
void ring_unpromise(struct volume *v, uint64_t bytes, uint64_t used);
/* What a checkpoint has done with. */
void ring_give(struct volume *v, uint64_t bytes);
/* Find the groups to be replayed, and the deltas in them; then apply the rest. */
int journal_scan(struct volume *v, char *msg, size_t msg_len);
int journal_apply(struct volume *v);
/* PUT and DEL items, one behind the other, into the trees: for opening. */
int items_apply(struct volume *v, const void *items, unsigned count);

/* ---- checkpoint.c, space.c ------------------------------------------------------ */

int checkpoint_run(struct volume *v, bool clean);
int space_open(struct volume *v);
/*
 * Write bitmaps that are the last ones with `changes` (sorted by start), and
 * enter them into TABLE_SPACE. What this takes and frees itself goes to `own`.
 */
int space_write(struct volume *v, const struct deltas *changes,
		struct deltas *own);
/* Bitmap block `index` as last written, verified; zeroes where there is none. */
int space_read(struct volume *v, uint64_t index, void *bits, bool *exists);
uint64_t space_per_bitmap(const struct volume *v);
uint64_t space_bitmaps(const struct volume *v);
/* How many bitmaps there are not: of stretches where nothing is in use. */
uint64_t space_absent_locked(const struct volume *v);
int space_discard(struct volume *v, uint64_t start, uint64_t len);

/* ---- repair.c: as volume_options.repair says, while a volume opens ---- */
/* Before the bitmaps are read, after, and once blocks can be allocated. */
int repair_bitmaps(struct volume *v);
int repair_space(struct volume *v);
int repair_nodes(struct volume *v);

/* ---- volume.c --------------------------------------------------------------------- */

/* The volume can't be written any more: say so once. Returns -err. */
int volume_fail(struct volume *v, int err, const char *what);
void volume_kick(struct volume *v, bool checkpoint);
void volume_arm(struct volume *v);
static inline uint64_t blk_off(const struct volume *v, uint64_t blk)
{
	return blk << v->shift;
}

/* ---- inode.c, map.c ------------------------------------------------------------------ */

/* ---- mmp.c: who holds the volume ---------------------------------------------------- */

void mmp_init(struct volume *v);
void mmp_fini(struct volume *v);
/* Does another host's heart beat in the image? -EBUSY, after some intervals. */
int mmp_watch(struct image *im);
/* What the block has to be when the volume is taken: what it was when the image was
 * opened and watched, or, that having been used, what it is now. */
int mmp_expect(struct image *im, uint64_t *holder);
/* For mkfs: nobody holds it. -EBUSY if somebody has taken it meanwhile. */
int mmp_clear(struct image *im);
/* Take the volume, and begin to beat; -EBUSY with a sentence. */
int mmp_take(struct volume *v, char *msg, size_t msg_len);
/* Say how things stand; -EBUSY if the volume is another's, and has failed here. */
int mmp_write(struct volume *v, uint32_t state);
void mmp_stop(struct volume *v);
/* Before something is written that would harm another holder. */
int mmp_still_ours(struct volume *v);

/* ---- loop.c: images that are loop devices as well ------------------------------ */

/*
 * If `loop` is a loop device, lock the bytes of the file below it that its
 * `bytes` stand for. *out: a descriptor that holds the lock; -1 when there is
 * nothing to lock, or no way to. -EBUSY when they are locked.
 */
int loop_lock(int loop, uint64_t bytes, bool write, int *out);
/* Does a loop device stand on the file that is open as `fd`? */
bool loop_over(int fd);

int icache_init(struct volume *v);
void icache_fini(struct volume *v);
/* Let the next inode's number be higher than all in the tree, whatever the
 * superblock says; where the last of them cannot be read, that is believed. */
int inodes_skip_used(struct volume *v);
int intents_finish(struct volume *v);
int orphans_evict(struct volume *v);
/* Orphans whose freeing failed for want of room: how many; try again. */
size_t inodes_late(struct volume *v);
void inodes_evict_late(struct volume *v);
void inode_drop_dead(struct volume *v, struct inode *ip);

#endif
