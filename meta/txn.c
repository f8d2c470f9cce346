/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A transaction: items changed, blocks taken and freed, all or nothing.
 *
 * While it is built it is a list of journal items in memory and of blocks
 * claimed or marked; nobody sees any of it. txn_commit() then, under the
 * commit lock and in one go,
 *   1. sees that every leaf concerned is in memory and the pool has the blocks
 *      that copies of nodes may need (or drops the lock, gets them, and tries
 *      again): from here nothing can fail;
 *   2. applies the items to the trees, as replay would;
 *   3. appends the very same bytes to the open group;
 *   4. notes the blocks taken and freed for the checkpoint of this generation.
 * The order in which transactions pass step 3 is the order of operations that
 * the promise speaks of.
 *
 * Blocks. A block taken is claimed in the allocator at once and free on disk
 * until the checkpoint that covers the commit. A block freed is marked at once
 * (so that a second free is refused before it commits) and free in the
 * allocator after that checkpoint.
 *
 * Shared blocks: references are counted in TABLE_REFS, only where there are
 * two or more. Changes to them are collected and worked out at commit under
 * the lock of that table, since several runs may concern one item.
 */
#include "meta/meta_priv.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>


/* ---- lists ----------------------------------------------------------------------- */

static int deltas_room(struct deltas *d, size_t more)
{
	size_t cap = d->cap ? d->cap : 64;
	struct delta *p;

	if (d->count + more <= d->cap)
		return 0;
	while (cap < d->count + more)
		cap *= 2;
	p = realloc(d->v, cap * sizeof(*p));
	if (!p)
		return -ENOMEM;
	d->v = p;
	d->cap = cap;
	return 0;
}

/* Take the last `len` blocks of the last entry back. */
static void delta_trim(struct deltas *d, uint64_t len)
{
	d->v[d->count - 1].len -= len;
	if (d->v[d->count - 1].len == 0)
		d->count--;
}

static int delta_push(struct deltas *d, struct delta e)
{
	if (deltas_room(d, 1))
		return -ENOMEM;
	d->v[d->count++] = e;
	return 0;
}

int delta_add(struct deltas *d, uint64_t start, uint64_t len, bool is_free)
{
	struct delta *last = d->count ? &d->v[d->count - 1] : NULL;

	if (last && last->free == is_free && !last->own &&
	    last->start + last->len == start) {
		last->len += len;
		return 0;
	}
	return delta_push(d, (struct delta){start, len, is_free, false});
}

int delta_add_own(struct deltas *d, uint64_t start, uint64_t len, bool is_free)
{
	return delta_push(d, (struct delta){start, len, is_free, true});
}

/* ---- building ----------------------------------------------------------------------- */

static _Thread_local struct txn *store;

/* A finished transaction's memory serves the thread's next one. */
static struct txn *txn_new(void)
{
	struct txn *t = store;

	if (t) {
		store = NULL;
		return t;
	}
	return calloc(1, sizeof(*t));
}

static void txn_destroy(struct txn *t)
{
	free(t->buf);
	free(t->deltas.v);
	free(t->refs);
	free(t);
}

static void txn_store_free(void *unused)
{
	(void)unused;
	if (store)
		txn_destroy(store);
	store = NULL;
}

static pthread_key_t store_key;
static pthread_once_t store_once = PTHREAD_ONCE_INIT;

static void store_key_make(void)
{
	pthread_key_create(&store_key, txn_store_free);
}

static void txn_release(struct txn *t)
{
	if (t->refs_locked)
		lock_unlock(&t->v->refs);
	t->refs_locked = false;
	ring_unpromise(t->v, t->promise, t->used);
	t->promise = t->used = 0;
	t->len = t->items = t->edits = 0;
	t->data_bytes = t->touched = t->aside = t->extra = 0;
	t->deltas.count = t->ref_count = t->ref_bytes = 0;
	t->in_place = false;
	if (store || t->cap > 65536) {
		txn_destroy(t);
		return;
	}
	pthread_once(&store_once, store_key_make);
	pthread_setspecific(store_key, t);
	store = t;
}

/* The calling thread's spare transaction, which its end would free too. */
void txn_thread_done(void) { txn_store_free(NULL); }

static int txn_can_write(const struct volume *v)
{
	if (v->replaying)
		return 0;
	if (v->readonly || atomic_load_explicit(&v->failed, memory_order_relaxed))
		return -EROFS;
	return 0;
}

int txn_begin(struct volume *v, enum txn_kind kind, struct txn **out)
{
	/* replay has the ring for itself */
	size_t promise = v->replaying ? 0 : v->txn_max +
					    sizeof(struct disk_group) +
					    JOURNAL_UNIT;
	struct txn *t;
	int r = txn_can_write(v);

	if (r)
		return r;
	r = ring_promise(v, promise);
	if (r)
		return r;
	t = txn_new();
	if (!t) {
		ring_unpromise(v, promise, 0);
		return -ENOMEM;
	}
	t->v = v;
	t->kind = kind;
	t->promise = promise;
	*out = t;
	return 0;
}

/* Bytes that the rest of the transaction will still add on its own. */
static size_t txn_tail(const struct txn *t)
{
	size_t edit = sizeof(struct disk_jitem) + 9 + sizeof(struct disk_inode);

	return 4 * edit + t->ref_bytes;
}

bool txn_has_room(const struct txn *t, unsigned items)
{
	return t->len + txn_tail(t) + items * 96u <= t->v->txn_max &&
	       t->touched <= txn_touched_max(t->v);
}

bool txn_cuts_enough(const struct txn *t)
{
	return t->items + 4 * t->ref_count >= t->v->cut_items ||
	       t->touched >= TXN_BITMAPS;
}

static int txn_item(struct txn *t, enum journal_item type, enum table table,
		    const void *key, size_t klen, const void *val, size_t vlen)
{
	size_t len = sizeof(struct disk_jitem) + klen + vlen;
	struct disk_jitem h = {.type = (uint8_t)type,
			       .table = (uint8_t)table,
			       .klen = put16((uint16_t)klen),
			       .vlen = put16((uint16_t)vlen)};

	if (t->len + len > t->v->txn_max)
		return -ENOSPC;
	if (t->len + len > t->cap) {
		size_t cap = t->cap ? t->cap : 1024;
		uint8_t *p;

		while (cap < t->len + len)
			cap *= 2;
		p = realloc(t->buf, cap);
		if (!p)
			return -ENOMEM;
		t->buf = p;
		t->cap = cap;
	}
	memcpy(t->buf + t->len, &h, sizeof(h));
	memcpy(t->buf + t->len + sizeof(h), key, klen);
	if (vlen)
		memcpy(t->buf + t->len + sizeof(h) + klen, val, vlen);
	t->len += len;
	t->items++;
	return 0;
}

int txn_put(struct txn *t, enum table table, const struct key *k,
	    const void *val, size_t vlen)
{
	assert(vlen <= VALUE_MAX);
	return txn_item(t, JITEM_PUT, table, k->b, k->len, val, vlen);
}

int txn_del(struct txn *t, enum table table, const struct key *k)
{
	return txn_item(t, JITEM_DEL, table, k->b, k->len, NULL, 0);
}

static int txn_extent(struct txn *t, enum journal_item type, uint64_t start,
		      uint64_t len)
{
	le64 run[2] = {put64(start), put64(len)};
	uint64_t per = space_per_bitmap(t->v);

	t->touched += (start + len - 1) / per - start / per + 1;
	return txn_item(t, type, 0, run, sizeof(run), NULL, 0);
}

/* For blocks of files. */
static enum spend spend_of(const struct txn *t)
{
	static const enum spend of[] = {
		[TXN_NORMAL] = SPEND_NONE,
		[TXN_REWRITE] = SPEND_REWRITE,
		[TXN_FREEING] = SPEND_FREEING,
	};

	return of[t->kind];
}

/* For nodes. */
static enum spend spend_of_nodes(const struct txn *t)
{
	enum spend spend = spend_of(t);

	return t->in_place && spend < SPEND_ASIDE ? SPEND_ASIDE : spend;
}

int txn_alloc(struct txn *t, uint64_t goal, uint64_t n, struct extent *out,
	      unsigned max, unsigned *count, uint64_t *got)
{
	struct volume *v = t->v;
	unsigned i;
	int r = volume_take_waiting(v, goal, n, out, max, count, got,
				    spend_of(t));

	if (r)
		return r;
	for (i = 0; i < *count; i++) {
		r = delta_add(&t->deltas, out[i].start, out[i].len, false);
		if (r)
			break;
		r = txn_extent(t, JITEM_TAKE, out[i].start, out[i].len);
		if (r) {
			delta_trim(&t->deltas, out[i].len);
			break;
		}
	}
	/* What is not in the list of takes, abort can't give back. */
	for (; r && i < *count; i++)
		alloc_free(v->alloc, out[i].start, out[i].len);
	return r;
}

int txn_set_aside(struct txn *t, uint64_t n)
{
	uint64_t more = aside_extra(t->aside + n) - t->extra;
	int r = reserve_more(t->v, more);

	if (r)
		return r;
	t->aside += n;
	t->extra += more;
	return 0;
}

int txn_free(struct txn *t, uint64_t start, uint64_t len)
{
	struct volume *v = t->v;
	int r;

	if (len == 0)
		return 0;
	if (start + len > v->blocks || start + len < start) {
		volume_message(v, "a map holds blocks %llu+%llu outside the volume",
			       (unsigned long long)start, (unsigned long long)len);
		return -EFSCORRUPTED;
	}
	r = v->alloc ? alloc_defer(v->alloc, start, len) : 0;
	if (r == -EINVAL || r == -ERANGE) {
		volume_message(v, "blocks %llu+%llu are freed but not in use",
			       (unsigned long long)start, (unsigned long long)len);
		return -EFSCORRUPTED;
	}
	if (r)
		return r;
	r = delta_add(&t->deltas, start, len, true);
	if (r == 0) {
		r = txn_extent(t, JITEM_FREE, start, len);
		if (r)
			delta_trim(&t->deltas, len);
	}
	if (r && v->alloc)
		alloc_undefer(v->alloc, start, len);
	return r;
}

/* Items of references that meet blocks from `start` on. */
struct ref_meets {
	uint64_t start;
	size_t count;
};

static int ref_meets_add(void *ctx, const uint8_t *key, size_t klen,
			 const uint8_t *val, size_t vlen)
{
	struct ref_meets *m = ctx;
	struct disk_ref d;

	if (klen != 9 || vlen != sizeof(d))
		return -EFSCORRUPTED;
	memcpy(&d, val, sizeof(d));
	m->count += be64_get(key + 1) + get64(d.len) > m->start;
	return 0;
}

/*
 * What a change of references will log: each item that it meets goes, and what
 * they and it cut the blocks into gets one, or is freed.
 */
static int ref_bytes(struct txn *t, uint64_t start, uint64_t len, size_t *bytes)
{
	const size_t del = sizeof(struct disk_jitem) + 9;
	const size_t put = del + sizeof(struct disk_ref);
	struct ref_meets m = {.start = start};
	struct key min, lo, hi;
	int r;

	key_refs(&min, KEY_REF, 0);
	key_refs(&lo, KEY_REF, start);
	key_refs(&hi, KEY_REF, start + len);
	r = tree_range_floor(t->v, TABLE_REFS, &min, &lo, &hi, ref_meets_add, &m);
	*bytes = m.count * del +
		 (2 * m.count + 1 < len ? 2 * m.count + 1 : len) * put + 2 * put;
	return r;
}

int txn_ref(struct txn *t, uint64_t start, uint64_t len, int by)
{
	size_t bytes;
	int r = ref_bytes(t, start, len, &bytes);

	if (r)
		return r;
	if (t->ref_count == t->ref_cap) {
		size_t cap = t->ref_cap ? t->ref_cap * 2 : 32;
		void *p = realloc(t->refs, cap * sizeof(*t->refs));

		if (!p)
			return -ENOMEM;
		t->refs = p;
		t->ref_cap = cap;
	}
	t->refs[t->ref_count++] = (struct ref_change){start, len, by};
	t->ref_bytes += bytes;
	return 0;
}

struct attr *inode_edit(struct txn *t, struct inode *ip)
{
	for (unsigned i = 0; i < t->edits; i++)
		if (t->edit[i].ip == ip)
			return &t->edit[i].a;
	assert(t->edits < sizeof(t->edit) / sizeof(t->edit[0]));
	t->edit[t->edits] = (struct inode_change){.ip = ip, .a = ip->a};
	return &t->edit[t->edits++].a;
}

void txn_abort(struct txn *t)
{
	struct volume *v = t->v;

	for (size_t i = t->deltas.count; v->alloc && i-- > 0;) {
		struct delta *d = &t->deltas.v[i];

		if (d->free)
			alloc_undefer(v->alloc, d->start, d->len);
		else
			alloc_free(v->alloc, d->start, d->len);
	}
	if (t->extra)
		alloc_unreserve(v->alloc, t->extra);
	held_list_free(t->held.head);
	t->held = (struct held_list){0};
	for (unsigned i = 0; i < t->edits; i++)
		if (t->edit[i].created)
			inode_drop_dead(v, t->edit[i].ip);
	txn_release(t);
}

/* ---- references to shared blocks -------------------------------------------------------- */

/*
 * The changes and the items they meet cut the blocks concerned into stretches
 * of one count each. point[i] .. point[i + 1] is stretch i.
 */
struct stretches {
	uint64_t *point;
	uint32_t *count;	/* by an item; 0: no item, so one reference */
	int *by;
	bool *changed;
	size_t points;
	struct ref_item {
		uint64_t start, len;
		uint32_t count;
	} *item;
	size_t items, item_cap;
};

static int ref_item_add(void *ctx, const uint8_t *key, size_t klen,
			const uint8_t *val, size_t vlen)
{
	struct stretches *s = ctx;
	struct disk_ref d;

	if (klen != 9 || vlen != sizeof(d))
		return -EFSCORRUPTED;
	memcpy(&d, val, sizeof(d));
	if (s->items == s->item_cap) {
		size_t cap = s->item_cap ? s->item_cap * 2 : 64;
		void *p = realloc(s->item, cap * sizeof(*s->item));

		if (!p)
			return -ENOMEM;
		s->item = p;
		s->item_cap = cap;
	}
	s->item[s->items++] = (struct ref_item){be64_get(key + 1), get64(d.len),
						get32(d.count)};
	return 0;
}

static int u64_cmp(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static int ref_item_cmp(const void *a, const void *b)
{
	return u64_cmp(&((const struct ref_item *)a)->start,
		       &((const struct ref_item *)b)->start);
}

/* The items that the changes meet, each once. */
static int stretches_load(struct txn *t, struct stretches *s)
{
	size_t kept = 0;
	int r = 0;

	for (size_t i = 0; i < t->ref_count && r == 0; i++) {
		struct ref_change *c = &t->refs[i];
		size_t first = s->items;
		struct key min, lo, hi;

		key_refs(&min, KEY_REF, 0);
		key_refs(&lo, KEY_REF, c->start);
		key_refs(&hi, KEY_REF, c->start + c->len);
		r = tree_range_floor(t->v, TABLE_REFS, &min, &lo, &hi,
				     ref_item_add, s);
		if (r == 0 && s->items > first &&
		    s->item[first].start + s->item[first].len <= c->start) {
			memmove(&s->item[first], &s->item[first + 1],
				(s->items - first - 1) * sizeof(*s->item));
			s->items--;
		}
	}
	if (r || !s->items)
		return r;
	qsort(s->item, s->items, sizeof(*s->item), ref_item_cmp);
	for (size_t i = 1; i < s->items; i++)
		if (s->item[i].start != s->item[kept].start)
			s->item[++kept] = s->item[i];
	s->items = kept + 1;
	return 0;
}

static size_t stretch_at(const struct stretches *s, uint64_t at)
{
	const uint64_t *p = bsearch(&at, s->point, s->points, sizeof(at), u64_cmp);

	return (size_t)(p - s->point);
}

static int stretches_cut(struct txn *t, struct stretches *s)
{
	size_t n = 2 * (t->ref_count + s->items), kept = 0;

	s->point = malloc(n * sizeof(*s->point));
	s->count = calloc(n, sizeof(*s->count));
	s->by = calloc(n, sizeof(*s->by));
	s->changed = calloc(n, sizeof(*s->changed));
	if (!s->point || !s->count || !s->by || !s->changed)
		return -ENOMEM;
	n = 0;
	for (size_t i = 0; i < t->ref_count; i++) {
		s->point[n++] = t->refs[i].start;
		s->point[n++] = t->refs[i].start + t->refs[i].len;
	}
	for (size_t i = 0; i < s->items; i++) {
		s->point[n++] = s->item[i].start;
		s->point[n++] = s->item[i].start + s->item[i].len;
	}
	qsort(s->point, n, sizeof(*s->point), u64_cmp);
	for (size_t i = 1; i < n; i++)
		if (s->point[i] != s->point[kept])
			s->point[++kept] = s->point[i];
	s->points = kept + 1;
	for (size_t i = 0; i < s->items; i++) {
		struct ref_item *it = &s->item[i];

		for (size_t j = stretch_at(s, it->start);
		     s->point[j] < it->start + it->len; j++)
			s->count[j] = it->count;
	}
	for (size_t i = 0; i < t->ref_count; i++) {
		struct ref_change *c = &t->refs[i];

		for (size_t j = stretch_at(s, c->start);
		     s->point[j] < c->start + c->len; j++) {
			s->by[j] += c->by;
			s->changed[j] = true;
		}
	}
	return 0;
}

static int ref_put(struct txn *t, uint64_t start, uint64_t len, int64_t count)
{
	struct disk_ref d = {.len = put64(len), .count = put32((uint32_t)count)};
	struct key k;

	if (count < 2 || !len)
		return 0;
	key_refs(&k, KEY_REF, start);
	return txn_put(t, TABLE_REFS, &k, &d, sizeof(d));
}

/* The old items go; what has two references or more gets new ones; what has
 * none is freed. */
static int stretches_emit(struct txn *t, const struct stretches *s)
{
	uint64_t start = 0, len = 0;
	int64_t count = 0;
	struct key k;
	int r = 0;

	for (size_t i = 0; i < s->items && r == 0; i++) {
		key_refs(&k, KEY_REF, s->item[i].start);
		r = txn_del(t, TABLE_REFS, &k);
	}
	for (size_t i = 0; i + 1 < s->points && r == 0; i++) {
		uint64_t n = s->point[i + 1] - s->point[i];
		int64_t now = s->count[i] ? s->count[i] : 1;

		if (!s->changed[i] && !s->count[i])
			now = -1;	/* nobody asked */
		else if ((now += s->by[i]) < 0)
			return -EFSCORRUPTED;
		if (now == 0)
			r = txn_free(t, s->point[i], n);
		if (now == count && start + len == s->point[i]) {
			len += n;
			continue;
		}
		if (r == 0)
			r = ref_put(t, start, len, count);
		start = s->point[i];
		len = n;
		count = now;
	}
	return r ? r : ref_put(t, start, len, count);
}

/* Turn the changes of references into items and frees. */
static int refs_resolve(struct txn *t)
{
	struct stretches s = {0};
	int r;

	lock_lock(&t->v->refs);
	t->refs_locked = true;
	r = stretches_load(t, &s);
	if (r == 0)
		r = stretches_cut(t, &s);
	if (r == 0)
		r = stretches_emit(t, &s);
	free(s.point);
	free(s.count);
	free(s.by);
	free(s.changed);
	free(s.item);
	return r;
}

/* ---- applying ------------------------------------------------------------------------------ */

const struct disk_jitem *item_next(const struct disk_jitem *ji)
{
	return (const void *)(ji->bytes + get16(ji->klen) + get16(ji->vlen));
}

static bool is_inode_key(const struct disk_jitem *ji)
{
	return ji->table == TABLE_FILES && get16(ji->klen) == 9 &&
	       ji->bytes[8] == KEY_INODE;
}

/* The item takes another's place: how many blocks are set aside after it. An
 * older volume may have more of them than it counts. */
static void aside_count_locked(struct volume *v, const struct disk_jitem *ji)
{
	size_t klen = get16(ji->klen), old_len;
	uint8_t old[sizeof(struct disk_map)];
	uint64_t less = 0;

	if (ji->table != TABLE_FILES || klen != 17 || ji->bytes[8] != KEY_MAP)
		return;
	if (tree_peek_locked(v, TABLE_FILES, ji->bytes, klen, old, sizeof(old),
			     &old_len))
		less = map_aside(ji->bytes, klen, old, old_len);
	if (ji->type == JITEM_PUT)
		v->aside += map_aside(ji->bytes, klen, ji->bytes + klen,
				      get16(ji->vlen));
	v->aside -= less < v->aside ? less : v->aside;
}

static int item_apply_locked(struct volume *v, const struct disk_jitem *ji)
{
	size_t klen = get16(ji->klen), vlen = get16(ji->vlen);
	le64 run[2];

	if (ji->type == JITEM_PUT || ji->type == JITEM_DEL)
		aside_count_locked(v, ji);

	switch (ji->type) {
	case JITEM_PUT:
		if (tree_put_locked(v, ji->table, ji->bytes, klen,
				    ji->bytes + klen, vlen) &&
		    is_inode_key(ji))
			v->inodes++;
		return 0;
	case JITEM_DEL:
		if (tree_del_locked(v, ji->table, ji->bytes, klen) &&
		    is_inode_key(ji))
			v->inodes--;
		return 0;
	default:
		memcpy(run, ji->bytes, sizeof(run));
		return delta_add(&v->deltas, get64(run[0]), get64(run[1]),
				 ji->type == JITEM_FREE);
	}
}

int items_apply_locked(struct volume *v, const struct disk_jitem *ji, unsigned items)
{
	const struct disk_jitem *at = ji;
	bool unsettled = false;
	int r = 0;

	for (unsigned i = 0; i < items && r == 0; i++, at = item_next(at))
		r = item_apply_locked(v, at);
	for (unsigned i = 0; i < TABLES; i++)
		unsettled = unsettled || v->trees[i].unsettled;
	for (unsigned i = 0; unsettled && i < items; i++, ji = item_next(ji))
		if (ji->type == JITEM_DEL && v->trees[ji->table].unsettled)
			tree_settle_locked(v, ji->table, ji->bytes, get16(ji->klen));
	for (unsigned i = 0; i < TABLES; i++)
		v->trees[i].unsettled = false;
	return r;
}

static void run_changes(struct volume *v, const struct disk_jitem *ji)
{
	le64 run[2];

	memcpy(run, ji->bytes, sizeof(run));
	pool_changed_locked(v, get64(run[0]), get64(run[1]), ji->type == JITEM_FREE);
}

/*
 * With the commit lock held: is everything at hand that applying these items
 * needs? -EAGAIN: *miss is to be loaded; -ENOBUFS: *blocks are to be in the pool.
 */
static int prepare_locked(struct volume *v, const struct disk_jitem *ji,
			  unsigned items, enum spend spend,
			  struct tree_miss *miss, uint64_t *blocks)
{
	struct tree_need need;
	uint64_t keep, room;
	int r;

	tree_need_init_locked(v, &need);
	for (unsigned i = 0; i < items; i++, ji = item_next(ji)) {
		if (ji->type == JITEM_TAKE || ji->type == JITEM_FREE)
			run_changes(v, ji);
		if (ji->type != JITEM_PUT && ji->type != JITEM_DEL)
			continue;
		r = tree_prepare_locked(v, ji, &need, miss);
		if (r)
			return r;
	}
	/* What is left without use, and a neighbour of it that is copied. */
	room = need.nodes + 2 * need.gone + TREE_LEVELS;
	if (tree_spares_locked(v, need.nodes + need.gone) ||
	    deltas_room(&v->deltas, items) || deltas_room(&v->node_frees, room) ||
	    deltas_room(&v->space_frees, room) ||
	    deltas_room(&v->dropped, room) || pool_room_locked(v, room))
		return -ENOMEM;
	keep = pool_leave_locked(v, spend);
	if (!v->readonly && v->pool_blks < need.nodes + keep) {
		*blocks = need.nodes + keep - v->pool_blks;
		return -ENOBUFS;
	}
	v->joins = v->pool_blks - need.nodes - keep;
	if (v->joins > need.gone)
		v->joins = need.gone;
	return 0;
}

int commit_lock_prepared(struct volume *v, const void *items, unsigned count,
			 enum spend spend)
{
	struct tree_miss miss, bad = {0};
	uint64_t blocks = 0;
	int r, bad_err = 0;
	bool helped = spend == SPEND_CHECKPOINT;

	for (;;) {
		rwlock_write(&v->commit);
		r = txn_can_write(v);
		if (r == 0)
			r = prepare_locked(v, items, count, spend, &miss, &blocks);
		if (r == 0)
			return 0;
		rwlock_unlock(&v->commit);
		if (r == -EAGAIN)
			r = tree_load(v, &miss, &bad, &bad_err);
		else if (r == -ENOBUFS)
			r = pool_fill(v, blocks, spend);
		if (r && !helped && atomic_load(&v->host_full) &&
		    (spend == SPEND_FREEING || atomic_load(&v->pending_blks) >
						       atomic_load(&v->pending_own))) {
			/* What it releases, the host has. */
			helped = true;
			r = checkpoint_run(v, false);
		}
		if (r)
			return r;
	}
}

static int edits_put(struct txn *t)
{
	struct disk_inode d;
	struct key k;
	int r = 0;

	for (unsigned i = 0; i < t->edits && r == 0; i++) {
		memset(&d, 0, sizeof(d));
		attr_encode(&t->edit[i].a, &d);
		if (t->edit[i].ip->dead)
			continue;
		key_file(&k, t->edit[i].ip->ino, KEY_INODE);
		r = txn_put(t, TABLE_FILES, &k, &d, sizeof(d));
	}
	return r;
}

static void apply_locked(struct txn *t)
{
	struct volume *v = t->v;
	uint64_t seq = 0, freed = 0, taken = 0;

	items_apply_locked(v, (const void *)t->buf, t->items);
	tree_shrink_locked(v);
	if (!v->readonly)
		seq = journal_append_locked(v, t);
	for (size_t i = 0; i < t->deltas.count; i++)
		*(t->deltas.v[i].free ? &freed : &taken) += t->deltas.v[i].len;
	atomic_fetch_sub(&v->free_blks, taken);
	atomic_fetch_add(&v->reserve_held, t->extra);
	blocks_pend(v, freed);
	for (unsigned i = 0; i < t->edits; i++) {
		t->edit[i].ip->a = t->edit[i].a;
		t->edit[i].ip->last_seq = seq;
	}
	atomic_fetch_add_explicit(&v->n_commits, 1, memory_order_relaxed);
}

int txn_commit(struct txn *t)
{
	struct volume *v = t->v;
	bool kick;
	int r = 0;

	if (t->ref_count)
		r = refs_resolve(t);
	if (r == 0)
		r = edits_put(t);
	if (r == 0 && t->items == 0) {
		txn_release(t);
		return 0;
	}
	if (r == 0)
		r = commit_lock_prepared(v, t->buf, t->items, spend_of_nodes(t));
	if (r == 0 && !v->readonly) {
		r = journal_room_locked(v, t->len);
		if (r)
			rwlock_unlock(&v->commit);
	}
	if (r) {
		txn_abort(t);
		return r;
	}
	apply_locked(t);
	kick = v->open && (v->open->len > GROUP_FULL_BYTES ||
			   v->open->data_bytes > GROUP_FULL_DATA);
	rwlock_unlock(&v->commit);
	txn_release(t);
	if (kick)
		volume_kick(v, false);
	else if (!atomic_load_explicit(&v->armed, memory_order_relaxed))
		volume_arm(v);
	return 0;
}
