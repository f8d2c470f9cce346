/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Pieces of one size. Slabs grow from 64 KiB to 2 MiB: a small space stays
 * small, a big one takes few page faults. A slab's first piece is its header.
 */
#include "alloc/pool.h"

#include <errno.h>
#include <sys/mman.h>

#define SLAB_MIN (64u << 10)
#define SLAB_MAX (2u << 20)

struct slab {
	struct slab *next;
	size_t bytes;
};

void pool_init(struct pool *p, size_t piece, size_t link, const char *name)
{
	*p = (struct pool){ .piece = piece, .link = link,
			    .next_slab = SLAB_MIN };
	latch_init(&p->latch, RANK_LEAF, name);
}

void pool_fini(struct pool *p)
{
	for (struct slab *slab = p->slabs, *next; slab; slab = next) {
		next = slab->next;
		munmap(slab, slab->bytes);
	}
}

/* Map `bytes`, a power of two, aligned to themselves. */
static void *map_aligned(size_t bytes)
{
	char *at = mmap(NULL, 2 * bytes, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	size_t head;

	if (at == MAP_FAILED)
		return NULL;
	head = -(uintptr_t)at & (bytes - 1);
	if (head)
		munmap(at, head);
	munmap(at + head + bytes, bytes - head);
	/* cppcheck-suppress deallocret	; only its ends were given back */
	return at + head;
}

/* Add a slab; what is left of the last becomes spare pieces. */
static int grow_locked(struct pool *p)
{
	struct slab *slab = map_aligned(p->next_slab);

	if (!slab)
		return -ENOMEM;
#ifdef MADV_HUGEPAGE
	if (p->next_slab == SLAB_MAX)
		madvise(slab, SLAB_MAX, MADV_HUGEPAGE);
#endif
	slab->next = p->slabs;
	slab->bytes = p->next_slab;
	p->slabs = slab;
	p->fresh = (char *)slab + p->piece;
	p->fresh_end = (char *)slab + slab->bytes / p->piece * p->piece;
	__atomic_store_n(&p->bytes, p->bytes + p->piece, __ATOMIC_RELAXED);
	if (p->next_slab < SLAB_MAX)
		p->next_slab *= p->next_slab == SLAB_MIN ? 8 : 2;
	return 0;
}

static char *link_get(struct pool *p, char *piece)
{
	return __atomic_load_n((char **)(piece + p->link), __ATOMIC_RELAXED);
}

static void spare_push_locked(struct pool *p, char *piece)
{
	__atomic_store_n((char **)(piece + p->link), p->spare,
			 __ATOMIC_RELEASE);
	p->spare = piece;
	__atomic_store_n(&p->spares, p->spares + 1, __ATOMIC_RELAXED);
}

static char *fresh_locked(struct pool *p)
{
	char *piece = p->fresh;

	p->fresh += p->piece;
	__atomic_store_n(&p->bytes, p->bytes + p->piece, __ATOMIC_RELAXED);
	return piece;
}

int pool_stock(struct pool *p, size_t count)
{
	int err = 0;

	latch_lock(&p->latch);
	/* Twice as many, so as not to be back here at once. */
	while (!err && p->spares < 2 * count) {
		if (p->fresh == p->fresh_end)
			err = grow_locked(p);
		else
			spare_push_locked(p, fresh_locked(p));
	}
	latch_unlock(&p->latch);
	return err;
}

void *pool_get(struct pool *p)
{
	char *piece = NULL;

	latch_lock(&p->latch);
	if (p->spare) {
		piece = p->spare;
		p->spare = link_get(p, piece);
		__atomic_store_n(&p->spares, p->spares - 1, __ATOMIC_RELAXED);
	} else if (p->fresh != p->fresh_end || !grow_locked(p)) {
		piece = fresh_locked(p);
	}
	latch_unlock(&p->latch);
	return piece;
}

void pool_put(struct pool *p, void *piece)
{
	latch_lock(&p->latch);
	spare_push_locked(p, piece);
	latch_unlock(&p->latch);
}

size_t pool_bytes(const struct pool *p)
{
	return __atomic_load_n(&p->bytes, __ATOMIC_RELAXED);
}
