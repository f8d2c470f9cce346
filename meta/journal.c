/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The journal: a ring of groups, where every change is written first.
 *
 * Life of a group
 *   open     transactions append their items to it in memory, under the commit
 *            lock; the data they speak of is in the image already, unflushed
 *   closed   it has its place in the ring; no more items
 *   written  in the image; it may be torn by a crash, so may its data
 *   durable  a flush began after it, all before it and all their data were
 *            written, and succeeded
 * One thread at a time writes and flushes (`writing`): it closes the open
 * group, writes all closed ones in order and flushes once for all who wait;
 * those who come meanwhile fill the next group. So a lone fsync costs one
 * write into the ring and one flush, and eight at once share theirs.
 *
 * Invariants
 *  1. Groups stand in the ring one behind the other, each at a multiple of
 *     JOURNAL_UNIT, and carry the sequence number and checksum that chain them.
 *  2. Nobody is told "durable" for a group before one flush covered it, all
 *     earlier ones and their data. Hence no order of writes is needed between
 *     data and group: if a flush did not complete, nobody was told, and replay
 *     finds out by the checksums, of group and data alike.
 *  3. Each group says up to which one all was durable when it was written
 *     (durable_seq), and which checkpoint was. So replay knows what is damage
 *     (below that point) and what a torn write (beyond it). An idle volume
 *     writes a last mark for the last flush.
 *  4. A salt drawn at each writable mount is in every group: none of an
 *     earlier lap, mount or mkfs is ever taken for one of this.
 *  5. No unit of a group but its first begins with GROUP_MAGIC, whatever users
 *     write: a search of the ring, which looks at every unit, never takes the
 *     contents of a file, or of an xattr, for a group.
 *
 * Replay (journal_scan, journal_apply): the highest durable_seq in the ring is
 * found first; then the chain is followed from the tail. Beyond durable_seq
 * the data of each group is read and checked too, and the first that does not
 * match ends the volume's history there; where it cannot be read, or memory is
 * short, the volume does not open. Applying is items_apply_locked(), item by item.
 *
 * Space in the ring is promised before a transaction's first lock and returned
 * when it is known what was used. A part stays aside for checkpoints, which
 * are what makes room: for padding and marks, and for three of the largest groups
 * that they can write for themselves (own_set_aside()).
 */
#include "meta/meta_priv.h"
#include "meta/repair.h"

#include <assert.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

static size_t round_unit(size_t bytes)
{
	return (bytes + JOURNAL_UNIT - 1) / JOURNAL_UNIT * JOURNAL_UNIT;
}

/* ---- groups in memory --------------------------------------------------------- */

static struct group *group_new(struct volume *v, size_t room)
{
	struct group *g = calloc(1, sizeof(*g));

	if (!g)
		return NULL;
	g->cap = round_unit(sizeof(struct disk_group) + room);
	g->buf = malloc(g->cap);
	if (!g->buf) {
		free(g);
		return NULL;
	}
	memset(g->buf, 0, sizeof(struct disk_group));
	g->len = sizeof(struct disk_group);
	g->seq = v->next_seq;
	return g;
}

static void group_free(struct group *g)
{
	held_list_free(g->held.head);
	free(g->buf);
	free(g);
}

static int group_room(struct group *g, size_t more)
{
	size_t cap = g->cap;
	uint8_t *p;

	while (cap < round_unit(g->len + more))
		cap *= 2;
	if (cap == g->cap)
		return 0;
	p = realloc(g->buf, cap);
	if (!p)
		return -ENOMEM;
	g->buf = p;
	g->cap = cap;
	return 0;
}

/*
 * A filler goes before an item that would put GROUP_MAGIC at the start of a
 * unit: the deletion of a key that is never there, of this table and beginning
 * with this byte, for which no kind of reference has been defined.
 */
#define FILLER_TABLE TABLE_REFS
#define FILLER_KEY_MAX 2u
#define FILLER_MAX (sizeof(struct disk_jitem) + FILLER_KEY_MAX)

/* Fillers that so many bytes of items can need: one where a unit begins. */
static size_t fillers_max(size_t len)
{
	return (len / JOURNAL_UNIT + 2) * FILLER_MAX;
}

/*
 * Does a unit that begins within [from, to) of this buffer begin as a group
 * does? Items begin and end there. The magic lies across none of their ends: an
 * item's header begins and ends with bytes that are not in it.
 */
static bool looks_like_group(const uint8_t *buf, size_t from, size_t to)
{
	le32 magic;

	for (size_t at = round_unit(from); at + sizeof(magic) <= to;
	     at += JOURNAL_UNIT) {
		memcpy(&magic, buf + at, sizeof(magic));
		if (get32(magic) == GROUP_MAGIC)
			return true;
	}
	return false;
}

static void filler_put(uint8_t *at, size_t klen)
{
	struct disk_jitem h = {.type = JITEM_DEL,
			       .table = FILLER_TABLE,
			       .klen = put16((uint16_t)klen)};

	memcpy(at, &h, sizeof(h));
	memset(at + sizeof(h), 0, klen);
}

/* Append an item, behind a filler if need be. Two places of the magic cannot
 * be one byte apart: the longer filler helps where the shorter does not. */
static void group_add_item(struct group *g, const struct disk_jitem *ji)
{
	size_t len = sizeof(*ji) + get16(ji->klen) + get16(ji->vlen), filler = 0;

	memcpy(g->buf + g->len, ji, len);
	for (size_t klen = 1; looks_like_group(g->buf, g->len, g->len + filler + len);
	     klen++) {
		assert(klen <= FILLER_KEY_MAX);
		filler = sizeof(*ji) + klen;
		filler_put(g->buf + g->len, klen);
		memcpy(g->buf + g->len + filler, ji, len);
	}
	g->len += filler + len;
	g->items += 1 + (filler > 0);
}

static void group_add(struct group *g, const void *items, size_t len,
		      unsigned count)
{
	const struct disk_jitem *ji = items;

	memcpy(g->buf + g->len, items, len);
	if (!looks_like_group(g->buf, g->len, g->len + len)) {
		g->len += len;
		g->items += count;
		return;
	}
	for (; count; count--, ji = item_next(ji))
		group_add_item(g, ji);
}

/*
 * Have an open group with room for `len` more bytes of items; called before
 * anything is applied, so that appending cannot fail.
 */
int journal_room_locked(struct volume *v, size_t len)
{
	len += fillers_max(len);
	if (!v->open) {
		v->open = group_new(v, len < 8192 ? 8192 : len);
		if (!v->open)
			return -ENOMEM;
		v->next_seq++;
	}
	return group_room(v->open, len);
}

uint64_t journal_append_locked(struct volume *v, struct txn *t)
{
	struct group *g = v->open;
	size_t before = g->len;

	group_add(g, t->buf, t->len, t->items);
	t->used = g->len - before;
	assert(g->len <= g->cap);
	g->data_bytes += t->data_bytes;
	atomic_fetch_add(&v->touched, t->touched);
	if (t->held.head) {
		held_publish(v, &t->held);
		held_join(&g->held, &t->held);
	}
	return g->seq;
}

/* Give a group its place and queue it. Its padding comes off the ring now. */
static void group_close_locked(struct volume *v, struct group *g)
{
	size_t padded = round_unit(g->len);

	memset(g->buf + g->len, 0, padded - g->len);
	g->unit = v->head_unit;
	g->salt = v->salt;
	v->head_unit += padded / JOURNAL_UNIT;
	/* a checkpoint's own has its room aside */
	if (!g->of_gen)
		atomic_fetch_sub(&v->ring_free,
				 (int64_t)(padded - (g->len - sizeof(struct disk_group))));
	atomic_fetch_add(&v->unflushed, g->data_bytes);
	g->next = NULL;
	lock_lock(&v->journal);
	*v->closed_tail = g;
	v->closed_tail = &g->next;
	lock_unlock(&v->journal);
}

static int64_t ring_take(struct volume *v, int64_t need);

/*
 * Let the data of a group go with it, if it is little and there is room, and if
 * none of it would look like a group: that is put into its place at once.
 */
static void group_load(struct volume *v, struct group *g)
{
	size_t len = held_ride_bytes(v, &g->held);

	if (!len || len > RIDE_BYTES || group_room(g, len) ||
	    ring_take(v, (int64_t)len) < 0)
		return;
	held_copy_items(v, &g->held, g->buf + g->len);
	if (looks_like_group(g->buf, g->len, g->len + len)) {
		ring_give(v, len);
		return;
	}
	g->items += g->held.count;
	g->len += len;
	held_join(&v->riding, &g->held);
}

void journal_close_locked(struct volume *v, bool ride)
{
	struct group *g = v->open;

	if (!g)
		return;
	v->open = NULL;
	if (ride)
		group_load(v, g);
	group_close_locked(v, g);
}

/* ---- a checkpoint's own group --------------------------------------------------- */

#define OWN_ITEM (sizeof(struct disk_jitem) + 16)	/* takes or frees a run */
/* What one bitmap that changes makes of it, at worst: it and its leaf are taken
 * and freed, and some of the nodes above. */
#define OWN_BITMAP_BYTES (5 * OWN_ITEM)
/* The rest of the ring, which is for transactions. */
#define RING_LEAST (40 * JOURNAL_UNIT)

/*
 * Bytes of the largest group that a checkpoint can write for itself: all bitmaps
 * change, and all nodes of their table, which are a quarter full at least.
 */
static uint64_t own_most(uint64_t blocks, unsigned shift)
{
	uint64_t per = 8ull << shift, bitmaps = (blocks + per - 1) / per;
	uint64_t leaf = (1ull << shift) / 4 / (sizeof(struct disk_item) + 8 +
					       sizeof(struct disk_space) +
					       sizeof(le16));
	uint64_t nodes = bitmaps / leaf + bitmaps / leaf / 8 + TREE_LEVELS;

	return round_unit(sizeof(struct disk_group) +
			  2 * (bitmaps + nodes) * OWN_ITEM);
}

uint64_t journal_least(uint64_t blocks, unsigned shift)
{
	uint64_t least = 3 * own_most(blocks, shift) + RING_LEAST;

	return least < JOURNAL_MIN_UNITS * JOURNAL_UNIT
		       ? JOURNAL_MIN_UNITS * JOURNAL_UNIT
	       : least < JOURNAL_USUAL ? least : JOURNAL_USUAL;
}

/*
 * The room for groups of checkpoints' own: three of the largest. One is that of
 * the last checkpoint, which the next one frees; one that of a checkpoint which a
 * crash has cut off; one that of the checkpoint which ends the next opening.
 *
 * A volume so large, or a journal so small (as mkfs made them once), that there is
 * no room for that has three eighths of the ring. Then a generation ends when it
 * has touched as many bitmaps as make half such a group (after a crash two of them
 * are made one), and a transaction when it has touched a quarter of that.
 */
static uint64_t own_set_aside(struct volume *v)
{
	uint64_t ring = v->ring_units * JOURNAL_UNIT;
	uint64_t most = own_most(v->blocks, v->shift);

	v->touched_max = UINT64_MAX;
	if (3 * most + RING_LEAST > ring) {
		most = ring / 8 / JOURNAL_UNIT * JOURNAL_UNIT;
		v->touched_max = most / 2 / OWN_BITMAP_BYTES;
	}
	return 3 * most;
}

/* Would it write over what is still needed? Then nothing is written. */
static int own_fits_locked(struct volume *v, size_t len)
{
	uint64_t units = round_unit(sizeof(struct disk_group) + len) / JOURNAL_UNIT;

	return v->head_unit + units - v->tail_unit <= v->ring_units ? 0 : -ENOSPC;
}

int journal_own_group(struct volume *v, uint64_t gen, const struct deltas *d,
		      uint64_t *seq, uint64_t *units)
{
	size_t each = OWN_ITEM, len = d->count * each;
	struct group *g;
	int r;

	rwlock_write(&v->commit);
	journal_close_locked(v, false);
	r = own_fits_locked(v, len);
	if (r)
		goto out;
	g = group_new(v, len);
	if (!g) {
		r = -ENOMEM;
		goto out;
	}
	v->next_seq++;
	g->of_gen = gen;
	for (size_t i = 0; i < d->count; i++) {
		struct disk_jitem h = {.type = d->v[i].free ? JITEM_FREE
							    : JITEM_TAKE,
				       .klen = put16(16)};
		le64 run[2] = {put64(d->v[i].start), put64(d->v[i].len)};

		memcpy(g->buf + g->len, &h, sizeof(h));
		memcpy(g->buf + g->len + sizeof(h), run, sizeof(run));
		g->len += each;
		g->items++;
		r = delta_add_own(&v->deltas, d->v[i].start, d->v[i].len,
				  d->v[i].free);
		if (r)
			break;
		pool_changed_locked(v, d->v[i].start, d->v[i].len, d->v[i].free);
	}
	*seq = g->seq;
	*units = round_unit(g->len) / JOURNAL_UNIT;
	group_close_locked(v, g);
out:
	rwlock_unlock(&v->commit);
	if (r == -ENOSPC)
		volume_message(v, "the journal has no room for a checkpoint's own "
			       "%zu bytes", len);
	return r;
}

/* ---- writing -------------------------------------------------------------------- */

static int ring_pwrite(struct volume *v, uint64_t unit, const uint8_t *buf,
		       size_t len)
{
	uint64_t base = v->ring_offset;
	uint64_t at = unit % v->ring_units, fit = v->ring_units - at;
	size_t first = len;
	int r;

	if (first > fit * JOURNAL_UNIT)
		first = fit * JOURNAL_UNIT;
	r = image_pwrite(v->im, buf, first, base + at * JOURNAL_UNIT);
	if (r == 0 && first < len)
		r = image_pwrite(v->im, buf + first, len - first, base);
	return r;
}

static int group_write(struct volume *v, struct group *g)
{
	struct disk_group *h = (void *)g->buf;
	uint64_t durable = v->durable_seq;
	int r = held_write(v, &g->held);

	if (r)
		return r;
	*h = (struct disk_group){
		.magic = put32(GROUP_MAGIC),
		.bytes = put32((uint32_t)g->len),
		.salt = put64(g->salt),
		.seq = put64(g->seq),
		.prev = put64(v->last_csum),
		.durable_seq = put64(durable),
		.checkpoint_gen = put64(atomic_load(&v->durable_gen)),
		.of_gen = put64(g->of_gen),
		.items = put32(g->items),
	};
	h->csum = put64(checksum(g->buf, g->len));
	v->last_csum = get64(h->csum);
	lock_lock(&v->journal);
	v->attested_seq = durable;
	lock_unlock(&v->journal);
	atomic_fetch_add_explicit(&v->n_groups, 1, memory_order_relaxed);
	return ring_pwrite(v, g->unit, g->buf, round_unit(g->len));
}

static struct group *closed_pop(struct volume *v, uint64_t seq)
{
	struct group *g;

	lock_lock(&v->journal);
	g = v->closed;
	if (g && g->seq > seq)
		g = NULL;
	if (g) {
		v->closed = g->next;
		if (!v->closed)
			v->closed_tail = &v->closed;
	}
	lock_unlock(&v->journal);
	return g;
}

/* By whoever has `writing`: the closed groups to `seq`, in order. */
static int write_closed(struct volume *v, uint64_t seq, uint64_t *last)
{
	struct group *g;
	int r = mmp_still_ours(v);

	while (r == 0 && (g = closed_pop(v, seq))) {
		r = group_write(v, g);
		if (r == 0) {
			*last = g->seq;
		} else {
			/* Reads still find what was not written. */
			rwlock_write(&v->commit);
			held_join(&v->riding, &g->held);
			rwlock_unlock(&v->commit);
		}
		group_free(g);
	}
	if (r)
		volume_fail(v, r, "writing the journal");
	return r;
}

/* Become the one who writes, unless the answer is known without: then 1. */
static int writing_begin(struct volume *v, uint64_t seq, bool flush)
{
	int r = 0;

	lock_lock(&v->journal);
	while (v->writing && !atomic_load(&v->failed) &&
	       (flush ? v->durable_seq : v->written_seq) < seq)
		lock_wait(&v->journal, &v->journal_done);
	if (atomic_load(&v->failed))
		r = -EIO;
	else if ((flush ? v->durable_seq : v->written_seq) >= seq)
		r = 1;
	else
		v->writing = true;
	lock_unlock(&v->journal);
	return r;
}

static void writing_end(struct volume *v, uint64_t written, bool flushed)
{
	lock_lock(&v->journal);
	v->written_seq = written;
	if (flushed)
		v->durable_seq = written;
	v->writing = false;
	pthread_cond_broadcast(&v->journal_done);
	lock_unlock(&v->journal);
}

/*
 * The host tells of a write that failed once: of two flushes at a time the other
 * one would call durable what is lost. So the lock is held over the flush, until
 * the volume has failed. Nobody waits for it but who wants to flush.
 */
int journal_flush(struct volume *v)
{
	int r;

	lock_lock(&v->flush);
	r = atomic_load(&v->failed) ? -EIO : image_flush(v->im);
	if (r)
		volume_fail(v, r, "flushing");
	lock_unlock(&v->flush);
	return r;
}

int journal_write(struct volume *v, uint64_t seq, bool flush)
{
	uint64_t last, data;
	int r = writing_begin(v, seq, flush);

	if (r)
		return r < 0 ? r : 0;
	last = v->written_seq;
	rwlock_write(&v->commit);
	if (v->open && v->open->seq <= seq)
		journal_close_locked(v, flush);
	rwlock_unlock(&v->commit);
	r = write_closed(v, UINT64_MAX, &last);
	data = atomic_load(&v->unflushed);
	if (r == 0 && flush) {
		atomic_fetch_add_explicit(&v->n_flushes, 1,
					  memory_order_relaxed);
		r = journal_flush(v);
		atomic_fetch_sub(&v->unflushed, data);
	}
	writing_end(v, last, r == 0 && flush);
	return r;
}

int journal_cut(struct volume *v, void (*freeze)(void *ctx), void *ctx,
		struct cut *out)
{
	uint64_t last;
	int r = writing_begin(v, UINT64_MAX, false);

	if (r)
		return r;
	last = v->written_seq;
	rwlock_write(&v->commit);
	journal_close_locked(v, false);
	freeze(ctx);
	out->unit = v->head_unit;
	out->seq = v->next_seq;
	out->salt = v->salt;
	rwlock_unlock(&v->commit);
	r = write_closed(v, out->seq - 1, &last);
	out->prev = v->last_csum;
	writing_end(v, last, false);
	return r;
}

int journal_mark(struct volume *v)
{
	struct group *g = NULL;
	uint64_t seq = 0;
	bool idle;

	lock_lock(&v->journal);
	idle = !v->writing && v->durable_seq == v->written_seq &&
	       v->attested_seq < v->durable_seq;
	lock_unlock(&v->journal);
	if (!idle || atomic_load(&v->failed) ||
	    atomic_load(&v->ring_free) < (int64_t)v->ring_reserve)
		return 0;
	rwlock_write(&v->commit);
	if (!v->open)
		g = group_new(v, 0);
	if (g) {
		seq = v->next_seq++;
		group_close_locked(v, g);
		lock_lock(&v->journal);
		v->mark_seq = seq;
		lock_unlock(&v->journal);
	}
	rwlock_unlock(&v->commit);
	return g ? journal_write(v, seq, false) : 0;
}

/* ---- room in the ring, and in the cache ------------------------------------------------------------- */

/* Take so much of the ring, and say what is left; or nothing, and -1. */
static int64_t ring_take(struct volume *v, int64_t need)
{
	int64_t free = atomic_load(&v->ring_free);

	do {
		if (free - need < (int64_t)v->ring_reserve)
			return -1;
	} while (!atomic_compare_exchange_weak(&v->ring_free, &free, free - need));
	return free - need;
}

void ring_give(struct volume *v, uint64_t bytes)
{
	atomic_fetch_add(&v->ring_free, (int64_t)bytes);
	if (!atomic_load(&v->ring_waiters))
		return;
	lock_lock(&v->ring_lock);
	pthread_cond_broadcast(&v->ring_wake);
	lock_unlock(&v->ring_lock);
}

void ring_unpromise(struct volume *v, uint64_t bytes, uint64_t used)
{
	atomic_fetch_sub(&v->ring_promised, (int64_t)bytes);
	ring_give(v, bytes - used);
}

/*
 * A checkpoint has left too little: then others hold promises. They need
 * nothing that we hold, which is no lock, and give back what they do not use.
 */
static void ring_wait(struct volume *v, int64_t need)
{
	atomic_fetch_add(&v->ring_waiters, 1);
	lock_lock(&v->ring_lock);
	if (atomic_load(&v->ring_free) - need < (int64_t)v->ring_reserve &&
	    atomic_load(&v->ring_promised))
		lock_wait(&v->ring_lock, &v->ring_wake);
	lock_unlock(&v->ring_lock);
	atomic_fetch_sub(&v->ring_waiters, 1);
}

int ring_promise(struct volume *v, size_t bytes)
{
	int64_t left, need = (int64_t)bytes;
	uint64_t dirty;
	bool full;
	int r;

	if (v->replaying)
		return 0;
	for (unsigned tries = 0;; tries++) {
		dirty = atomic_load(&v->dirty_nodes);
		full = dirty >= v->cache_nodes ||
		       dirty + atomic_load(&v->touched) >= v->touched_max;
		r = full || tries >= 4 ? 0 : pool_back(v);
		if (r && r != -EAGAIN)
			return r;
		full = full || r;
		left = !full || tries >= 4 ? ring_take(v, need) : -1;
		if (left >= 0)
			break;
		if (atomic_load(&v->failed))
			return -EROFS;
		if (tries >= 4)
			ring_wait(v, need);
		r = checkpoint_run(v, false);
		if (r)
			return r;
	}
	atomic_fetch_add(&v->ring_promised, need);
	if (left < (int64_t)(v->ring_room / 2) ||
	    dirty > v->cache_nodes / 2)
		volume_kick(v, true);
	return 0;
}

/* ---- replay -------------------------------------------------------------------------- */

struct scan {
	struct volume *v;
	uint8_t *ring;			/* the whole of it */
	uint64_t must;			/* groups to this one have to be whole */
	bool any_salt;			/* groups of earlier mounts count too */
	uint64_t max_ino;
	char *msg;
	size_t msg_len;
};

/* Copy the group at `unit` out of the ring if it is one, whole, of this salt
 * or of any; else *out is NULL. -ENOMEM says nothing of either. */
static int group_at(const struct scan *s, uint64_t unit, struct group **out)
{
	struct volume *v = s->v;
	size_t ring_bytes = v->ring_units * JOURNAL_UNIT;
	size_t at = unit % v->ring_units * JOURNAL_UNIT, first;
	struct disk_group h;
	struct group *g;
	uint64_t sum;

	*out = NULL;
	memcpy(&h, s->ring + at, sizeof(h));
	if (get32(h.magic) != GROUP_MAGIC ||
	    (get64(h.salt) != v->salt && !s->any_salt) ||
	    get32(h.bytes) < sizeof(h) || get32(h.bytes) > ring_bytes)
		return 0;
	g = calloc(1, sizeof(*g));
	if (!g)
		return -ENOMEM;
	g->len = get32(h.bytes);
	g->buf = malloc(g->len);
	if (!g->buf) {
		free(g);
		return -ENOMEM;
	}
	first = g->len < ring_bytes - at ? g->len : ring_bytes - at;
	memcpy(g->buf, s->ring + at, first);
	memcpy(g->buf + first, s->ring, g->len - first);
	((struct disk_group *)g->buf)->csum = put64(0);
	sum = checksum(g->buf, g->len);
	if (sum != get64(h.csum)) {
		group_free(g);
		return 0;
	}
	((struct disk_group *)g->buf)->csum = h.csum;
	g->unit = unit;
	g->seq = get64(h.seq);
	g->items = get32(h.items);
	g->of_gen = get64(h.of_gen);
	*out = g;
	return 0;
}

/*
 * The newest statements in the ring: of this salt about what is durable, of any
 * salt about checkpoints, for those grow from mount to mount.
 */
static int scan_attests(struct scan *s)
{
	struct volume *v = s->v;
	uint64_t gen = 0;

	s->any_salt = true;
	for (uint64_t u = 0; u < v->ring_units; u++) {
		const struct disk_group *h;
		struct group *g;
		int r = group_at(s, u, &g);

		if (r)
			return r;
		if (!g)
			continue;
		h = (const void *)g->buf;
		if (get64(h->salt) == v->salt && get64(h->durable_seq) > s->must)
			s->must = get64(h->durable_seq);
		if (get64(h->checkpoint_gen) > gen)
			gen = get64(h->checkpoint_gen);
		u += (g->len + JOURNAL_UNIT - 1) / JOURNAL_UNIT - 1;
		group_free(g);
	}
	s->any_salt = false;
	if (v->opt.repair && v->opt.repair->older) {
		if (s->must < v->opt.repair->must)
			s->must = v->opt.repair->must;
	} else if (gen > get64(v->super.gen)) {
		snprintf(s->msg, s->msg_len,
			 "superblock: the slot of checkpoint %llu is lost, only "
			 "that of %llu is left",
			 (unsigned long long)gen,
			 (unsigned long long)get64(v->super.gen));
		return -EFSCORRUPTED;
	}
	return 0;
}

/* The inode that a PUT or DEL concerns, by its key; 0: none. */
static uint64_t item_ino(const struct disk_jitem *ji)
{
	return ji->table == TABLE_FILES && get16(ji->klen) >= 8
		       ? be64_get(ji->bytes) : 0;
}

/* Are the items of a group well formed? */
static bool group_sane(const struct volume *v, const struct group *g)
{
	const uint8_t *p = g->buf + sizeof(struct disk_group);
	const uint8_t *end = g->buf + g->len;

	for (unsigned i = 0; i < g->items; i++) {
		const struct disk_jitem *ji = (const void *)p;
		size_t klen, vlen;
		le64 run[2];

		if ((size_t)(end - p) < sizeof(*ji))
			return false;
		klen = get16(ji->klen);
		vlen = get16(ji->vlen);
		if ((size_t)(end - p) < sizeof(*ji) + klen + vlen)
			return false;
		if (ji->type == JITEM_DATA) {
			if (klen != 8 || vlen != v->block_bytes || g->of_gen)
				return false;
			memcpy(run, ji->bytes, sizeof(run[0]));
			if (get64(run[0]) >= v->blocks)
				return false;
		} else if (ji->type == JITEM_PUT || ji->type == JITEM_DEL) {
			if (klen > KEY_MAX || vlen > VALUE_MAX ||
			    (ji->type == JITEM_DEL && vlen) || ji->table >= TABLE_SPACE || g->of_gen)
				return false;
			/* fsck may delete what should not be there */
			if (ji->type == JITEM_PUT && item_ino(ji) > INO_MAX)
				return false;
		} else {
			if ((ji->type != JITEM_TAKE && ji->type != JITEM_FREE) ||
			    klen != 16 || vlen)
				return false;
			memcpy(run, ji->bytes, sizeof(run));
			if (get64(run[0]) >= v->blocks || !get64(run[1]) ||
			    get64(run[1]) > v->blocks - get64(run[0]))
				return false;
		}
		p += sizeof(*ji) + klen + vlen;
	}
	return p == end;
}

/*
 * Is the data that this run speaks of what was written? 1 or 0, or why it cannot
 * be read: that is not what a torn write looks like, and may pass. Who repairs
 * does without it.
 */
static int map_data_whole(struct volume *v, const struct disk_jitem *ji, void *buf)
{
	const uint8_t *val = ji->bytes + get16(ji->klen);
	struct disk_map m;
	int r;

	if (get16(ji->vlen) < sizeof(m))
		return 0;
	memcpy(&m, val, sizeof(m));
	if (get32(m.flags))
		return 1;
	if (get16(ji->vlen) != sizeof(m) + get32(m.len) * sizeof(le64) ||
	    get64(m.start) >= v->blocks ||
	    get32(m.len) > v->blocks - get64(m.start))
		return 0;
	for (uint32_t i = 0; i < get32(m.len); i++) {
		le64 sum;

		memcpy(&sum, val + sizeof(m) + i * sizeof(sum), sizeof(sum));
		r = volume_blocks(v, get64(m.start) + i, 1, buf);
		if (r)
			r = volume_blocks(v, get64(m.start) + i, 1, buf);
		if (r)
			return v->opt.repair ? 0 : r;
		if (checksum(buf, v->block_bytes) != get64(sum))
			return 0;
	}
	return 1;
}

static int group_data_whole(struct volume *v, const struct group *g)
{
	const struct disk_jitem *ji =
		(const void *)(g->buf + sizeof(struct disk_group));
	void *buf = malloc(v->block_bytes);
	int whole = buf ? 1 : -ENOMEM;

	for (unsigned i = 0; i < g->items && whole == 1; i++, ji = item_next(ji))
		if (ji->type == JITEM_PUT && ji->table == TABLE_FILES &&
		    get16(ji->klen) == 17 && ji->bytes[8] == KEY_MAP)
			whole = map_data_whole(v, ji, buf);
	free(buf);
	return whole;
}

/* Hold what rides in the group: all of it or nothing. */
static int group_hold(struct volume *v, const struct group *g,
		      struct held_list *l)
{
	const struct disk_jitem *ji =
		(const void *)(g->buf + sizeof(struct disk_group));
	int r = 0;

	for (unsigned i = 0; i < g->items && r == 0; i++, ji = item_next(ji))
		if (ji->type == JITEM_DATA)
			r = held_replay(v, ji, l);
	if (r)
		held_end(v, l);
	return r;
}

/* Note the deltas, and the numbers of inodes that were given out. */
static int group_note(struct scan *s, const struct group *g)
{
	const struct disk_jitem *ji =
		(const void *)(g->buf + sizeof(struct disk_group));
	struct volume *v = s->v;
	int r = 0;

	for (unsigned i = 0; i < g->items && r == 0; i++, ji = item_next(ji)) {
		if (ji->type == JITEM_TAKE || ji->type == JITEM_FREE)
			r = items_apply_locked(v, ji, 1);
		else if (ji->type != JITEM_DATA && item_ino(ji) > s->max_ino &&
			 item_ino(ji) <= INO_MAX)
			s->max_ino = item_ino(ji);
	}
	return r;
}

/* Follow the chain from the tail to where the volume's history ends. */
static int scan_chain(struct scan *s)
{
	struct volume *v = s->v;
	uint64_t unit = get64(v->super.tail_unit), seq = get64(v->super.tail_seq);
	uint64_t prev = get64(v->super.tail_prev), start = unit;
	int r, whole;

	for (;;) {
		const struct disk_group *h;
		struct held_list held = {0};
		struct group *g;
		uint64_t units;

		r = group_at(s, unit, &g);
		if (r)
			return r;
		h = g ? (const void *)g->buf : NULL;
		units = g ? (g->len + JOURNAL_UNIT - 1) / JOURNAL_UNIT : 0;
		if (!g || g->seq != seq || get64(h->prev) != prev ||
		    unit + units - start > v->ring_units || !group_sane(v, g)) {
			if (g)
				group_free(g);
			break;
		}
		r = group_hold(v, g, &held);
		if (r) {
			group_free(g);
			return r;
		}
		whole = seq > s->must ? group_data_whole(v, g) : 1;
		if (whole <= 0) {
			held_end(v, &held);
			group_free(g);
			if (whole == 0)
				break;
			snprintf(s->msg, s->msg_len,
				 "journal: data of group %llu cannot be read: %s",
				 (unsigned long long)seq, strerror(-whole));
			return whole;
		}
		held_join(&v->riding, &held);
		prev = get64(h->csum);
		unit += units;
		seq++;
		if (g->of_gen)
			v->own_units += units;
		*v->replay_tail = g;
		v->replay_tail = &g->next;
		/* A checkpoint's own blocks count only if it took place. */
		if (!g->of_gen || g->of_gen == get64(v->super.gen))
			r = group_note(s, g);
		v->replayed_groups++;
		if (r)
			return r;
	}
	if (seq <= s->must) {
		snprintf(s->msg, s->msg_len,
			 "journal: group %llu, which was durable, is damaged",
			 (unsigned long long)seq);
		return -EFSCORRUPTED;
	}
	v->head_unit = unit;
	v->next_seq = seq;
	v->last_csum = prev;
	return 0;
}

int journal_scan(struct volume *v, char *msg, size_t msg_len)
{
	struct scan s = {.v = v,
			 .must = get64(v->super.durable_seq),
			 .max_ino = get64(v->super.next_ino) - 1,
			 .msg = msg,
			 .msg_len = msg_len};
	size_t bytes = v->ring_units * JOURNAL_UNIT;
	int r;

	v->salt = get64(v->super.salt);
	s.ring = big_alloc(bytes);
	if (!s.ring)
		return -ENOMEM;
	r = image_pread(v->im, s.ring, bytes,
			v->ring_offset);
	if (r)
		snprintf(msg, msg_len, "journal: cannot be read: %s",
			 strerror(-r));
	if (r == 0)
		r = scan_attests(&s);
	if (r == 0)
		r = scan_chain(&s);
	free(s.ring);
	if (r == 0)
		atomic_store(&v->next_ino, s.max_ino + 1);
	return r;
}

int items_apply(struct volume *v, const void *items, unsigned count)
{
	const struct disk_jitem *ji = items;
	int r = 0;

	for (unsigned i = 0; i < count && r == 0; i++, ji = item_next(ji)) {
		if (ji->type != JITEM_PUT && ji->type != JITEM_DEL)
			continue;
		r = commit_lock_prepared(v, ji, 1, SPEND_CHECKPOINT);
		if (r)
			break;
		items_apply_locked(v, ji, 1);
		rwlock_unlock(&v->commit);
	}
	return r;
}

int journal_apply(struct volume *v)
{
	int r = 0;

	while (v->replay) {
		struct group *g = v->replay;

		if (r == 0)
			r = items_apply(v, g->buf + sizeof(struct disk_group),
					g->items);
		v->replay = g->next;
		group_free(g);
	}
	return r;
}

/* ---- life ----------------------------------------------------------------------------- */

int journal_init(struct volume *v)
{
	lock_init(&v->flush, RANK_FLUSH, "flush");
	lock_init(&v->journal, RANK_JOURNAL, "journal");
	pthread_cond_init(&v->journal_done, NULL);
	lock_init(&v->ring_lock, RANK_LEAF, "ring");
	pthread_cond_init(&v->ring_wake, NULL);
	v->closed_tail = &v->closed;
	v->replay_tail = &v->replay;
	v->ring_units = get64(v->super.journal_units);
	v->ring_offset = blk_off(v, get64(v->super.journal_block));
	v->ring_room = v->ring_units * JOURNAL_UNIT - own_set_aside(v);
	v->ring_reserve = v->ring_room / 8;
	v->txn_max = v->ring_reserve < (128u << 10) ? v->ring_reserve
						     : 128u << 10;
	atomic_store(&v->ring_free, (int64_t)v->ring_room);
	return 0;
}

static void groups_free(struct group *g)
{
	while (g) {
		struct group *next = g->next;

		group_free(g);
		g = next;
	}
}

void journal_fini(struct volume *v)
{
	groups_free(v->closed);
	groups_free(v->open);
	groups_free(v->replay);
	lock_fini(&v->flush);
	lock_fini(&v->journal);
	pthread_cond_destroy(&v->journal_done);
	lock_fini(&v->ring_lock);
	pthread_cond_destroy(&v->ring_wake);
}
