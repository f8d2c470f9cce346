/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Latches that are waited for, and the witness of lock ranks: each thread's
 * held ranks in the order taken.
 */
#include "alloc/lock.h"

#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

void lock_init(struct lock *l, enum lock_rank rank, const char *name)
{
	pthread_mutex_init(&l->m, NULL);
#ifdef LOCK_DEBUG
	l->rank = rank;
	l->name = name;
#else
	(void)rank;
	(void)name;
#endif
}

void lock_fini(struct lock *l) { pthread_mutex_destroy(&l->m); }

/*
 * Writers go first: otherwise a stream of readers would starve them. Nobody
 * takes a read lock twice, so that cannot deadlock.
 */
void rwlock_init(struct rwlock *l, enum lock_rank rank, const char *name)
{
	pthread_rwlockattr_t attr;

	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(
		&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&l->rw, &attr);
	pthread_rwlockattr_destroy(&attr);
#ifdef LOCK_DEBUG
	l->rank = rank;
	l->name = name;
#else
	(void)rank;
	(void)name;
#endif
}

void rwlock_fini(struct rwlock *l) { pthread_rwlock_destroy(&l->rw); }

void latch_init(struct latch *l, enum lock_rank rank, const char *name)
{
	l->word = 0;
#ifdef LOCK_DEBUG
	l->rank = rank;
	l->name = name;
#else
	(void)rank;
	(void)name;
#endif
}

/* Long enough for a holder that runs, short if it does not. */
#define LATCH_SPINS 200

void latch_wait(struct latch *l)
{
	for (int i = 0; i < LATCH_SPINS; i++) {
		uint32_t word = __atomic_load_n(&l->word, __ATOMIC_RELAXED);

		if (!word && __atomic_compare_exchange_n(&l->word, &word, 1,
							 false, __ATOMIC_ACQUIRE,
							 __ATOMIC_RELAXED))
			return;
		if (word == 2)
			break;
#if defined(__x86_64__) || defined(__i386__)
		__builtin_ia32_pause();
#endif
	}
	/* From now on it says 2, so that whoever drops it wakes one; but for
	   one who looked before and stores 0 after: so look again. */
	while (__atomic_exchange_n(&l->word, 2, __ATOMIC_ACQUIRE))
		syscall(SYS_futex, &l->word, FUTEX_WAIT_PRIVATE, 2,
			&(struct timespec){ .tv_nsec = 1000000 });
}

void latch_wake(struct latch *l)
{
	syscall(SYS_futex, &l->word, FUTEX_WAKE_PRIVATE, 1);
}

#ifdef LOCK_DEBUG

#define HELD_MAX 1100	/* all shards and a few */

static _Thread_local struct {
	enum lock_rank rank;
	const char *name;
} held[HELD_MAX];
static _Thread_local int held_count;

void lock_witness_take(enum lock_rank rank, const char *name, bool nested)
{
	for (int i = 0; i < held_count; i++) {
		if (held[i].rank < rank || (nested && held[i].rank == rank))
			continue;
		fprintf(stderr, "lock order: %s (%d) taken under %s (%d)\n",
			name, rank, held[i].name, held[i].rank);
		abort();
	}
	if (held_count == HELD_MAX)
		abort();
	held[held_count].rank = rank;
	held[held_count++].name = name;
}

void lock_witness_drop(enum lock_rank rank, const char *name)
{
	for (int i = held_count; i-- > 0;) {
		if (held[i].rank != rank || held[i].name != name)
			continue;
		for (; i + 1 < held_count; i++)
			held[i] = held[i + 1];
		held_count--;
		return;
	}
	fprintf(stderr, "lock order: %s (%d) dropped but not held\n", name, rank);
	abort();
}

bool lock_witness_holds(enum lock_rank rank)
{
	for (int i = 0; i < held_count; i++)
		if (held[i].rank == rank)
			return true;
	return false;
}

#endif
