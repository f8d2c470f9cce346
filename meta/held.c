/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Small data that waits in memory for its group.
 *
 * A write of a block or two is not put into the image at once. It is held,
 * known by its block, and read from here, until its group is written:
 *   - closed because somebody waits for a flush, and with little data, the
 *     group carries the data itself (JITEM_DATA): a lone fsync is one write
 *     into the ring, which the host has had since mkfs, and one flush; no
 *     block of the host need be found for it before it is durable. Such data
 *     rides: it is held on until the next checkpoint puts it into its place,
 *     before that checkpoint's flush;
 *   - otherwise the data is put into its places right before the group is
 *     written, neighbours in one go: a thousand small files are some tens of
 *     writes.
 * Replay finds what rode in the group, holds it again and lets the first
 * checkpoint put it in place; a read-only volume goes on holding it.
 *
 * The host must not run out of space between the answer and the writing: a
 * block is held only where image_ensure() has set blocks aside, a megabyte at
 * a time; else, or if the host has none left, it is written at once, and the
 * error is the writer's.
 *
 * Threads: a reader asks here first and reads the image only for what is not
 * held; whoever ends holding has written the place before. held_lock (a leaf)
 * protects the table; lists belong to transaction, group, or the commit lock.
 */
#include "meta/meta_priv.h"

#include <assert.h>
#include <stdlib.h>

#define HELD_BUCKETS 4096u
#define ENSURE_BYTES (1u << 20)
#define IOV_MAX_HELD 64

static struct held **bucket(struct volume *v, uint64_t block)
{
	struct held **p = &v->held[(block * 0x9e3779b97f4a7c15ull >> 32) %
				   HELD_BUCKETS];

	while (*p && (*p)->block != block)
		p = &(*p)->hash_next;
	return p;
}

int held_init(struct volume *v)
{
	lock_init(&v->held_lock, RANK_LEAF, "held data");
	v->held = calloc(HELD_BUCKETS, sizeof(*v->held));
	return v->held ? 0 : -ENOMEM;
}

void held_list_free(struct held *h)
{
	while (h) {
		struct held *next = h->next;

		free(h);
		h = next;
	}
}

void held_fini(struct volume *v)
{
	held_list_free(v->riding.head);
	free(v->held);
	lock_fini(&v->held_lock);
}

static void held_append(struct held_list *l, struct held *h)
{
	h->next = NULL;
	if (l->tail)
		l->tail->next = h;
	else
		l->head = h;
	l->tail = h;
	l->count++;
}

void held_join(struct held_list *l, struct held_list *more)
{
	if (!more->head)
		return;
	if (l->tail)
		l->tail->next = more->head;
	else
		l->head = more->head;
	l->tail = more->tail;
	l->count += more->count;
	*more = (struct held_list){0};
}

/* ---- the host's blocks ------------------------------------------------------------ */

/*
 * Has the host blocks for this place? Remembers the megabytes that do, each
 * with the count of discards before it was asked: one more, and it is asked
 * again.
 */
static bool held_ensured(struct volume *v, uint64_t block)
{
	uint64_t mb = blk_off(v, block) / ENSURE_BYTES, len = ENSURE_BYTES;
	uint64_t off = mb * ENSURE_BYTES;
	uint64_t known = (atomic_load(&v->discards) + 1) << 32 | mb;
	_Atomic uint64_t *memo = &v->ensured[mb % ENSURED];
	int r;

	if (atomic_load_explicit(memo, memory_order_relaxed) == known)
		return true;
	if (off + len > v->im->bytes)
		len = v->im->bytes - off;
	r = image_ensure(v->im, off, len);
	if (r == 0)
		atomic_store(memo, known);
	return r == 0;
}

void held_forget_ensured(struct volume *v)
{
	atomic_fetch_add(&v->discards, 1);
}

/* ---- holding ------------------------------------------------------------------------ */

/* What may be held in memory, in blocks. */
static size_t held_max(const struct volume *v)
{
	size_t bytes = v->opt.cache_bytes / 4;

	return (bytes < HELD_BYTES ? bytes : HELD_BYTES) / v->block_bytes;
}

bool held_new(struct volume *v, struct held_list *l, uint64_t block, uint64_t n,
	      const uint8_t *buf)
{
	if (v->readonly || n > HELD_BLOCKS || v->block_bytes > HELD_BLOCK_BYTES ||
	    atomic_load(&v->held_count) > held_max(v))
		return false;
	for (uint64_t i = 0; i < n; i++)
		if (!held_ensured(v, block + i))
			return false;
	for (uint64_t i = 0; i < n; i++) {
		struct held *h = malloc(sizeof(*h) + v->block_bytes);

		if (!h)
			return false;
		h->block = block + i;
		memcpy(h->data, buf + blk_off(v, i), v->block_bytes);
		held_append(l, h);
	}
	return true;
}

static bool publish_locked(struct volume *v, struct held *h)
{
	struct held **p = bucket(v, h->block);

	if (*p)
		return false;
	h->hash_next = NULL;
	*p = h;
	atomic_fetch_add(&v->held_count, 1);
	return true;
}

/* From now on readers find it. */
void held_publish(struct volume *v, const struct held_list *l)
{
	lock_lock(&v->held_lock);
	for (struct held *h = l->head; h; h = h->next) {
		bool first = publish_locked(v, h);

		assert(first);
		(void)first;
	}
	lock_unlock(&v->held_lock);
}

/* From now on they find it in the image, or have no business with it. */
void held_end(struct volume *v, struct held_list *l)
{
	lock_lock(&v->held_lock);
	for (struct held *h = l->head; h; h = h->next) {
		struct held **p = bucket(v, h->block);

		assert(*p == h);
		*p = h->hash_next;
	}
	atomic_fetch_sub(&v->held_count, l->count);
	lock_unlock(&v->held_lock);
	held_list_free(l->head);
	*l = (struct held_list){0};
}

static bool held_copy(struct volume *v, uint64_t block, uint8_t *buf)
{
	struct held *h;

	lock_lock(&v->held_lock);
	h = *bucket(v, block);
	if (h)
		memcpy(buf, h->data, v->block_bytes);
	lock_unlock(&v->held_lock);
	return h != NULL;
}

int volume_blocks(struct volume *v, uint64_t block, uint64_t n, void *buf)
{
	uint8_t *at = buf;
	uint64_t from = block, end = block + n;
	int r = 0;

	if (atomic_load(&v->held_count) == 0)
		return image_pread(v->im, buf, blk_off(v, n), blk_off(v, block));
	/* What lies between held blocks is read in one go. */
	for (uint64_t b = block; b <= end && r == 0; b++) {
		if (b < end && !held_copy(v, b, at + blk_off(v, b - block)))
			continue;
		if (b > from)
			r = image_pread(v->im, at + blk_off(v, from - block),
					blk_off(v, b - from), blk_off(v, from));
		from = b + 1;
	}
	return r;
}

/* ---- writing ---------------------------------------------------------------------------- */

static int held_cmp(const void *a, const void *b)
{
	const struct held *x = *(struct held *const *)a;
	const struct held *y = *(struct held *const *)b;

	return (x->block > y->block) - (x->block < y->block);
}

static int write_sorted(struct volume *v, struct held **h, size_t count)
{
	struct iovec iov[IOV_MAX_HELD];
	size_t n;
	int r = 0;

	for (size_t i = 0; i < count && r == 0; i += n) {
		for (n = 0; n < IOV_MAX_HELD && i + n < count &&
			    h[i + n]->block == h[i]->block + n; n++)
			iov[n] = (struct iovec){h[i + n]->data, v->block_bytes};
		r = image_pwritev(v->im, iov, (int)n, blk_off(v, h[i]->block));
	}
	return r;
}

int held_write(struct volume *v, struct held_list *l)
{
	struct held **sorted;
	size_t n = 0;
	int r;

	if (!l->head)
		return 0;
	sorted = malloc(l->count * sizeof(*sorted));
	if (!sorted)
		return -ENOMEM;
	for (struct held *h = l->head; h; h = h->next)
		sorted[n++] = h;
	qsort(sorted, n, sizeof(*sorted), held_cmp);
	r = write_sorted(v, sorted, n);
	free(sorted);
	if (r == 0)
		held_end(v, l);
	return r;
}

/* ---- riding --------------------------------------------------------------------------------- */

size_t held_ride_bytes(const struct volume *v, const struct held_list *l)
{
	if (v->riding.count + l->count > held_max(v) / 2)
		return 0;
	return l->count * (sizeof(struct disk_jitem) + 8 + v->block_bytes);
}

void held_copy_items(const struct volume *v, const struct held_list *l, uint8_t *to)
{
	struct disk_jitem ji = {.type = JITEM_DATA,
				.klen = put16(8),
				.vlen = put16((uint16_t)v->block_bytes)};

	for (const struct held *h = l->head; h; h = h->next) {
		le64 block = put64(h->block);

		memcpy(to, &ji, sizeof(ji));
		memcpy(to + sizeof(ji), &block, sizeof(block));
		memcpy(to + sizeof(ji) + sizeof(block), h->data, v->block_bytes);
		to += sizeof(ji) + sizeof(block) + v->block_bytes;
	}
}

int held_replay(struct volume *v, const struct disk_jitem *ji,
		struct held_list *l)
{
	struct held *h = malloc(sizeof(*h) + v->block_bytes);
	le64 block;
	bool first;

	if (!h)
		return -ENOMEM;
	memcpy(&block, ji->bytes, sizeof(block));
	h->block = get64(block);
	memcpy(h->data, ji->bytes + sizeof(block), v->block_bytes);
	lock_lock(&v->held_lock);
	first = publish_locked(v, h);
	lock_unlock(&v->held_lock);
	if (!first) {
		free(h);
		return -EFSCORRUPTED;
	}
	held_append(l, h);
	return 0;
}
