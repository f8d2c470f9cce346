/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_LOCK_H
#define SPACEWEAVE_LOCK_H

/*
 * A mutex, a read-write lock and a latch that know their rank. In debug builds
 * (-DLOCK_DEBUG) each thread remembers the ranks it holds, and taking a lock
 * whose rank is not higher than the highest held aborts with both names
 * (after jemalloc's witness). In other builds they are pthread's own.
 *
 * Ranks grow downward through the layers: a thread that holds a lock may take
 * only locks of a higher rank. Equal ranks are for locks of one kind taken in
 * a stated order (inodes: by number), through *_lock_nested().
 */

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

enum lock_rank {
	RANK_NONE = 0,
	/* fs */
	RANK_FS_RENAME = 10,	/* one change of the tree's shape at a time */
	RANK_INODE = 20,	/* an inode; several in order of number */
	RANK_FS_HANDLES = 25,	/* table of the kernel's lookup counts */
	/* meta */
	RANK_REFS = 28,		/* reference counts, from read to commit */
	RANK_CHECKPOINT = 30,	/* one checkpoint at a time */
	RANK_PUNCH = 34,	/* free blocks on their way to the host */
	RANK_FLUSH = 36,	/* one flush of the image at a time */
	RANK_ICACHE = 40,	/* table of inodes in memory */
	RANK_COMMIT = 50,	/* trees, open group: the order of operations */
	RANK_JOURNAL = 60,	/* groups being written, durable point */
	/* alloc */
	RANK_ALLOC_STATE = 65,	/* one save or resize at a time */
	RANK_ALLOC_LOAD = 68,	/* chunks being described and loaded */
	RANK_SHARD = 70,	/* a shard; all, ascending, stop the world */
	RANK_CHUNKS = 72,	/* the table of chunks */
	RANK_CHUNK = 75,	/* a chunk; several ascending */
	RANK_LEAF = 100,	/* takes nothing below it */
};

struct lock {
	pthread_mutex_t m;
#ifdef LOCK_DEBUG
	enum lock_rank rank;
	const char *name;
#endif
};

struct rwlock {
	pthread_rwlock_t rw;
#ifdef LOCK_DEBUG
	enum lock_rank rank;
	const char *name;
#endif
};

#ifdef LOCK_DEBUG
void lock_witness_take(enum lock_rank rank, const char *name, bool nested);
void lock_witness_drop(enum lock_rank rank, const char *name);
bool lock_witness_holds(enum lock_rank rank);
#endif

void lock_init(struct lock *l, enum lock_rank rank, const char *name);
void lock_fini(struct lock *l);
void rwlock_init(struct rwlock *l, enum lock_rank rank, const char *name);
void rwlock_fini(struct rwlock *l);

/* `how` is true for a second lock of an equal rank, in the stated order. */
static inline void lock_lock_nested(struct lock *l, bool how)
{
#ifdef LOCK_DEBUG
	lock_witness_take(l->rank, l->name, how);
#else
	(void)how;
#endif
	pthread_mutex_lock(&l->m);
}

static inline void lock_lock(struct lock *l) { lock_lock_nested(l, false); }

static inline void lock_unlock(struct lock *l)
{
	pthread_mutex_unlock(&l->m);
#ifdef LOCK_DEBUG
	lock_witness_drop(l->rank, l->name);
#endif
}

/* Wait on `c`, which gives the lock up and takes it again. */
static inline void lock_wait(struct lock *l, pthread_cond_t *c)
{
	pthread_cond_wait(c, &l->m);
}

/*
 * A latch: a mutex of one word, for what is held for nanoseconds and taken
 * millions of times a second. Not for waiting on conditions. To let go is a
 * plain store: a thread that comes to wait just between the look and the store
 * is not woken, so nobody sleeps for longer than a millisecond (lock.c).
 */
struct latch {
	uint32_t word;		/* 0 free, 1 held, 2 held and waited for */
#ifdef LOCK_DEBUG
	enum lock_rank rank;
	const char *name;
#endif
};

void latch_init(struct latch *l, enum lock_rank rank, const char *name);
void latch_wait(struct latch *l);
void latch_wake(struct latch *l);

static inline void latch_lock_nested(struct latch *l, bool how)
{
	uint32_t free = 0;

#ifdef LOCK_DEBUG
	lock_witness_take(l->rank, l->name, how);
#else
	(void)how;
#endif
	if (__builtin_expect(!__atomic_compare_exchange_n(&l->word, &free, 1,
							  false, __ATOMIC_ACQUIRE,
							  __ATOMIC_RELAXED), 0))
		latch_wait(l);
}

static inline void latch_lock(struct latch *l) { latch_lock_nested(l, false); }

/* Without waiting, so in any order. */
static inline bool latch_try(struct latch *l)
{
	uint32_t free = 0;

	if (!__atomic_compare_exchange_n(&l->word, &free, 1, false,
					 __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
		return false;
#ifdef LOCK_DEBUG
	lock_witness_take(l->rank, l->name, true);
#endif
	return true;
}

static inline void latch_unlock(struct latch *l)
{
	uint32_t was = __atomic_load_n(&l->word, __ATOMIC_RELAXED);

	__atomic_store_n(&l->word, 0, __ATOMIC_RELEASE);
	if (__builtin_expect(was == 2, 0))
		latch_wake(l);
#ifdef LOCK_DEBUG
	lock_witness_drop(l->rank, l->name);
#endif
}

static inline void rwlock_read_nested(struct rwlock *l, bool how)
{
#ifdef LOCK_DEBUG
	lock_witness_take(l->rank, l->name, how);
#else
	(void)how;
#endif
	pthread_rwlock_rdlock(&l->rw);
}

static inline void rwlock_read(struct rwlock *l) { rwlock_read_nested(l, false); }

static inline void rwlock_write_nested(struct rwlock *l, bool how)
{
#ifdef LOCK_DEBUG
	lock_witness_take(l->rank, l->name, how);
#else
	(void)how;
#endif
	pthread_rwlock_wrlock(&l->rw);
}

static inline void rwlock_write(struct rwlock *l) { rwlock_write_nested(l, false); }

static inline void rwlock_unlock(struct rwlock *l)
{
	pthread_rwlock_unlock(&l->rw);
#ifdef LOCK_DEBUG
	lock_witness_drop(l->rank, l->name);
#endif
}

#endif
