/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Extent maps: file block to volume block, and the blocks themselves.
 *
 * A written run carries the checksum of each of its blocks, so that one leaf
 * gives both where the data is and what it must be, and a clone takes the
 * checksums along. A run is cut where a change begins or ends; runs that lie
 * end to end on the volume are joined when a file grows.
 *
 * Data is never overwritten while it is alive: map_write() puts it into new
 * blocks, or into ones that were set aside unwritten for just that place (for
 * nothing alive is there, and they are shared with no other file), and only the
 * commit makes it the file's.
 *
 * Calls that change the map see what the transaction holds already: a block's
 * place may be cut out of a run and what is left of it changed again.
 */
#include "meta/meta_priv.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>

#define EXTENTS_MAX 256u
#define REF_ITEMS 35u		/* room for MAP_MAX references of a block each */

/* ---- reading the map ------------------------------------------------------------ */

struct map_item {
	uint64_t blk, len;
	uint64_t start;			/* 0 of a lost one */
	uint32_t flags;
	le64 csum[MAP_MAX];
};

static bool has_blocks(const struct map_item *m) { return !(m->flags & MAP_LOST); }

static size_t sums_bytes(const struct map_item *m)
{
	return m->flags ? 0 : m->len * sizeof(m->csum[0]);
}

static uint64_t item_end(const struct map_item *m) { return m->blk + m->len; }

static int item_decode(struct map_item *m, const uint8_t *key, size_t klen,
		       const uint8_t *val, size_t vlen)
{
	struct disk_map d;

	if (klen != 17 || vlen < sizeof(d))
		return -EFSCORRUPTED;
	memcpy(&d, val, sizeof(d));
	m->blk = be64_get(key + 9);
	m->flags = get32(d.flags);
	m->start = has_blocks(m) ? get64(d.start) : 0;
	m->len = map_len(&d);
	if (m->len == 0 || m->blk + m->len < m->blk ||
	    m->flags > MAP_LOST ||
	    vlen != sizeof(d) + sums_bytes(m) || (!m->flags && m->len > MAP_MAX))
		return -EFSCORRUPTED;
	memcpy(m->csum, val + sizeof(d), vlen - sizeof(d));
	return 0;
}

/*
 * Items that overlap [from, to), a few at a time: after overlap_load() those
 * that overlap [from, next). `max` of them come from the tree.
 */
struct overlap {
	uint64_t from, to, next;
	unsigned max, count, cap;
	struct map_item *item;		/* on the heap; overlap_fini() */
};

static int overlap_grow(struct overlap *o)
{
	unsigned cap = o->cap ? o->cap * 2 : o->max + 1;
	void *p;

	if (o->count < o->cap)
		return 0;
	p = realloc(o->item, cap * sizeof(*o->item));
	if (!p)
		return -ENOMEM;
	o->item = p;
	o->cap = cap;
	return 0;
}

static void overlap_fini(struct overlap *o) { free(o->item); }

static int overlap_add(void *ctx, const uint8_t *key, size_t klen,
		       const uint8_t *val, size_t vlen)
{
	struct overlap *o = ctx;
	struct map_item *m;
	int r = overlap_grow(o);

	if (r)
		return r;
	m = &o->item[o->count];
	r = item_decode(m, key, klen, val, vlen);
	if (r)
		return r;
	if (o->count == o->max) {
		o->next = m->blk;
		return 1;
	}
	if (item_end(m) > o->from)
		o->count++;
	return 0;
}

/* What the transaction already holds for this inode's map, the last word on
 * each key: an item, or none (len 0). */
static int pending_add(struct overlap *o, const struct disk_jitem *ji)
{
	size_t klen = get16(ji->klen);
	uint64_t blk = be64_get(ji->bytes + 9);
	struct map_item *m = NULL;
	int r;

	for (unsigned i = 0; i < o->count && !m; i++)
		if (o->item[i].blk == blk)
			m = &o->item[i];
	if (!m) {
		r = overlap_grow(o);
		if (r)
			return r;
		m = &o->item[o->count++];
	}
	m->blk = blk;
	m->len = 0;
	return ji->type == JITEM_DEL
		       ? 0
		       : item_decode(m, ji->bytes, klen, ji->bytes + klen,
				     get16(ji->vlen));
}

static int pending_load(struct txn *t, struct inode *ip, struct overlap *p)
{
	const struct disk_jitem *ji = (const void *)t->buf;
	int r = 0;

	for (unsigned i = 0; i < t->items && r == 0; i++, ji = item_next(ji))
		if ((ji->type == JITEM_PUT || ji->type == JITEM_DEL) &&
		    ji->table == TABLE_FILES && get16(ji->klen) == 17 &&
		    ji->bytes[8] == KEY_MAP && be64_get(ji->bytes) == ip->ino)
			r = pending_add(p, ji);
	return r;
}

static int item_cmp(const void *a, const void *b)
{
	const struct map_item *x = a, *y = b;

	return (x->blk > y->blk) - (x->blk < y->blk);
}

/* Let what the transaction holds replace what the tree says. */
static int overlap_merge(struct overlap *o, const struct overlap *p)
{
	unsigned kept = 0;
	int r = 0;

	for (unsigned i = 0; i < o->count; i++) {
		bool replaced = false;

		for (unsigned j = 0; j < p->count && !replaced; j++)
			replaced = p->item[j].blk == o->item[i].blk;
		if (!replaced)
			o->item[kept++] = o->item[i];
	}
	o->count = kept;
	for (unsigned j = 0; j < p->count && r == 0; j++) {
		const struct map_item *m = &p->item[j];

		if (!m->len || m->blk >= o->next || item_end(m) <= o->from)
			continue;
		r = overlap_grow(o);
		if (r == 0)
			o->item[o->count++] = *m;
	}
	if (o->count)
		qsort(o->item, o->count, sizeof(*o->item), item_cmp);
	return r;
}

/* As the map is now; with `t`, as it will be if that commits as it stands. */
static int overlap_load(struct volume *v, struct txn *t, struct inode *ip,
			struct overlap *o)
{
	struct overlap pending = {.max = 16};
	struct key min, lo, hi;
	int r;

	key_file_num(&min, ip->ino, KEY_MAP, 0);
	key_file_num(&lo, ip->ino, KEY_MAP, o->from);
	if (o->to == UINT64_MAX)
		key_file(&hi, ip->ino, KEY_MAP + 1);
	else
		key_file_num(&hi, ip->ino, KEY_MAP, o->to);
	o->count = 0;
	o->next = o->to;
	r = tree_range_floor(v, TABLE_FILES, &min, &lo, &hi, overlap_add, o);
	if (r == -EFSCORRUPTED)
		volume_message(v, "inode %llu: bad extent near block %llu",
			       (unsigned long long)ip->ino,
			       (unsigned long long)o->from);
	if (r >= 0 && t && t->items) {
		r = pending_load(t, ip, &pending);
		if (r == 0 && pending.count)
			r = overlap_merge(o, &pending);
		overlap_fini(&pending);
	}
	return r < 0 ? r : 0;
}

static int lookup(struct volume *v, struct txn *t, struct inode *ip, uint64_t blk,
		  struct run *out)
{
	struct overlap o = {.from = blk, .to = UINT64_MAX, .max = 1};
	const struct map_item *m;
	int r;

	/* The one there may be gone in the transaction: then the next. */
	do {
		r = overlap_load(v, t, ip, &o);
	} while (r == 0 && o.count == 0 && o.next != UINT64_MAX &&
		 (o.from = o.next, true));
	m = o.item;
	if (r == 0 && o.count == 0)
		*out = (struct run){blk, UINT64_MAX - blk, 0, RUN_HOLE};
	else if (r == 0 && m->blk > blk)
		*out = (struct run){blk, m->blk - blk, 0, RUN_HOLE};
	else if (r == 0 && !has_blocks(m))
		*out = (struct run){blk, item_end(m) - blk, 0, RUN_LOST};
	else if (r == 0)
		*out = (struct run){blk, item_end(m) - blk,
				    m->start + (blk - m->blk),
				    m->flags ? RUN_UNWRITTEN : RUN_WRITTEN};
	overlap_fini(&o);
	return r;
}

int map_lookup(struct volume *v, struct inode *ip, uint64_t blk, struct run *out)
{
	return lookup(v, NULL, ip, blk, out);
}

/* ---- reading data ------------------------------------------------------------------ */

static int read_run(struct volume *v, struct inode *ip, const struct map_item *m,
		    uint64_t from, uint64_t to, uint8_t *buf)
{
	size_t bytes = blk_off(v, to - from);
	uint64_t start = m->start + (from - m->blk);
	int r;

	if (!has_blocks(m)) {
		volume_message(v, "inode %llu: block %llu was lost, and given up "
			       "by fsck", (unsigned long long)ip->ino,
			       (unsigned long long)from);
		return -EFSBADCRC;
	}
	if (m->flags & MAP_UNWRITTEN) {
		memset(buf, 0, bytes);
		return 0;
	}
	if (start + (to - from) > v->blocks || start + (to - from) < start) {
		volume_message(v, "inode %llu: extent outside the volume",
			       (unsigned long long)ip->ino);
		return -EFSCORRUPTED;
	}
	r = volume_blocks(v, start, to - from, buf);
	if (r) {
		volume_message(v, "inode %llu: block %llu (volume block %llu) "
			       "cannot be read: %s", (unsigned long long)ip->ino,
			       (unsigned long long)from,
			       (unsigned long long)start, strerror(-r));
		return r;
	}
	for (uint64_t b = from; b < to; b++, buf += v->block_bytes)
		if (checksum(buf, v->block_bytes) != get64(m->csum[b - m->blk])) {
			volume_message(v, "inode %llu: block %llu (volume block "
				       "%llu): checksum does not match",
				       (unsigned long long)ip->ino,
				       (unsigned long long)b,
				       (unsigned long long)(m->start +
							    (b - m->blk)));
			return -EFSBADCRC;
		}
	return 0;
}

int map_read(struct volume *v, struct inode *ip, uint64_t blk, uint64_t n,
	     void *buf)
{
	struct overlap o = {.to = blk + n, .max = 8};
	uint8_t *at = buf;
	int r = 0;

	while (blk < o.to && r == 0) {
		o.from = blk;
		r = overlap_load(v, NULL, ip, &o);
		for (unsigned i = 0; i < o.count && r == 0; i++) {
			const struct map_item *m = &o.item[i];
			uint64_t to = item_end(m) < o.to ? item_end(m) : o.to;

			if (m->blk > blk) {
				memset(at, 0, blk_off(v, m->blk - blk));
				at += blk_off(v, m->blk - blk);
				blk = m->blk;
			}
			r = read_run(v, ip, m, blk, to, at);
			at += blk_off(v, to - blk);
			blk = to;
		}
		if (r == 0 && blk < o.next) {
			memset(at, 0, blk_off(v, o.next - blk));
			at += blk_off(v, o.next - blk);
			blk = o.next;
		}
	}
	overlap_fini(&o);
	return r;
}

/* ---- changing the map ---------------------------------------------------------------- */

static int item_put(struct txn *t, struct inode *ip, const struct map_item *m)
{
	struct {
		struct disk_map d;
		le64 csum[MAP_MAX];
	} val = {.d = {.start = put64(has_blocks(m) ? m->start : m->len >> 32),
		       .birth = put64(atomic_load_explicit(&t->v->durable_gen,
							   memory_order_relaxed) +
				     1),
		       .len = put32((uint32_t)m->len),
		       .flags = put32(m->flags)}};
	struct key k;

	memcpy(val.csum, m->csum, sums_bytes(m));
	key_file_num(&k, ip->ino, KEY_MAP, m->blk);
	return txn_put(t, TABLE_FILES, &k, &val, sizeof(val.d) + sums_bytes(m));
}

/* The part [from, to) of a run as a run of its own. */
static struct map_item item_part(const struct map_item *m, uint64_t from,
				 uint64_t to)
{
	struct map_item p = {.blk = from,
			     .len = to - from,
			     .flags = m->flags};

	if (has_blocks(m))
		p.start = m->start + (from - m->blk);
	if (sums_bytes(&p))
		memcpy(p.csum, m->csum + (from - m->blk), sums_bytes(&p));
	return p;
}

/* Let go of blocks that this inode referred to. */
static int blocks_drop(struct txn *t, struct inode *ip, uint64_t start, uint64_t len)
{
	if (ip->a.flags & INODE_SHARED)
		return txn_ref(t, start, len, -1);
	return txn_free(t, start, len);
}

/*
 * Items' worth of room that one cut may take: a run left at either side, and
 * the references of a run, which may differ from block to block.
 */
static unsigned cut_items(const struct inode *ip)
{
	return ip->a.flags & INODE_SHARED ? 14 + REF_ITEMS : 14;
}

/*
 * Take [from, to) out of one run: what is left of it to the left and right
 * stays. The blocks are dropped unless `keep`.
 */
static int item_cut(struct txn *t, struct inode *ip, const struct map_item *m,
		    uint64_t from, uint64_t to, bool keep)
{
	struct map_item part;
	struct key k;
	int r = 0;

	if (from < m->blk)
		from = m->blk;
	if (to > item_end(m))
		to = item_end(m);
	if (from == m->blk) {
		key_file_num(&k, ip->ino, KEY_MAP, m->blk);
		r = txn_del(t, TABLE_FILES, &k);
	} else {
		part = item_part(m, m->blk, from);
		r = item_put(t, ip, &part);
	}
	if (r == 0 && to < item_end(m)) {
		part = item_part(m, to, item_end(m));
		r = item_put(t, ip, &part);
	}
	if (r == 0 && !keep && has_blocks(m)) {
		r = blocks_drop(t, ip, m->start + (from - m->blk), to - from);
		inode_edit(t, ip)->blks -= to - from;
	}
	return r;
}

#define ITEMS_AT_ONCE 64u

/*
 * Cut what overlaps [from, to), as long as there is room for `more` items after
 * it; *next is how far the transaction got.
 */
static int range_cut(struct txn *t, struct inode *ip, uint64_t from, uint64_t to,
		     unsigned more, uint64_t *next)
{
	struct overlap o = {.to = to, .max = ITEMS_AT_ONCE};
	bool full = false;
	int r = 0;

	*next = from;
	while (r == 0 && *next < to && !full) {
		o.from = *next;
		r = overlap_load(t->v, t, ip, &o);
		for (unsigned i = 0; i < o.count && r == 0 && !full; i++) {
			struct map_item *m = &o.item[i];

			full = !txn_has_room(t, cut_items(ip) + more) ||
			       (*next > from && txn_cuts_enough(t));
			if (full)
				break;
			r = item_cut(t, ip, m, from, to, false);
			*next = item_end(m) < to ? item_end(m) : to;
		}
		if (!full)
			*next = o.next;
	}
	overlap_fini(&o);
	return r;
}

/* ---- cutting, with an intent for what one transaction can't hold ----------------------- */

static int intent_put(struct txn *t, struct inode *ip, uint64_t from, uint64_t to)
{
	struct disk_intent d = {put64(from), put64(to)};
	struct key k;

	key_refs(&k, KEY_INTENT, ip->ino);
	return txn_put(t, TABLE_REFS, &k, &d, sizeof(d));
}

int map_cut(struct txn *t, struct inode *ip, uint64_t from, uint64_t to)
{
	uint64_t next;
	int r = range_cut(t, ip, from, to, 0, &next);

	if (r || next == to)
		return r;
	ip->unfinished = true;
	return intent_put(t, ip, next, to);
}

static int finish_step(struct volume *v, struct inode *ip, uint64_t from,
		       uint64_t to, uint64_t *next)
{
	struct txn *t;
	struct key k;
	int r = txn_begin(v, TXN_FREEING, &t);

	if (r)
		return r;
	r = range_cut(t, ip, from, to, 0, next);
	if (r == 0 && *next < to) {
		r = intent_put(t, ip, *next, to);
	} else if (r == 0) {
		key_refs(&k, KEY_INTENT, ip->ino);
		r = txn_del(t, TABLE_REFS, &k);
	}
	if (r) {
		txn_abort(t);
		return r;
	}
	return txn_commit(t);
}

int map_finish(struct volume *v, struct inode *ip)
{
	struct disk_intent d;
	struct key k;
	uint64_t from, to;
	size_t len;
	int r;

	if (!ip->unfinished)
		return 0;
	key_refs(&k, KEY_INTENT, ip->ino);
	r = tree_lookup(v, TABLE_REFS, k.b, k.len, &d, sizeof(d), &len);
	if (r == -ENOENT)
		r = 0;
	else if (r == 0 && len != sizeof(d))
		r = -EFSCORRUPTED;
	else if (r == 0)
		for (from = get64(d.from), to = get64(d.to);
		     r == 0 && from < to;)
			r = finish_step(v, ip, from, to, &from);
	if (r == 0)
		ip->unfinished = false;
	return r;
}

/* ---- writing -------------------------------------------------------------------------- */

/*
 * Where the blocks of a write go: pieces in file order, each to new blocks or
 * to ones set aside for it.
 */
struct place {
	uint64_t blk;
	struct extent e;
	bool in_place;
};

struct writing {
	struct place p[MAP_WRITE_MAX];	/* of a block each, at least */
	unsigned count;
	uint64_t in_place;
};

static int place_new(struct txn *t, struct inode *ip, struct writing *w,
		     uint64_t blk, uint64_t to)
{
	struct extent e[EXTENTS_MAX / 4];
	unsigned count;
	uint64_t got;

	while (blk < to) {
		int r = txn_alloc(t, ip->goal, to - blk, e, EXTENTS_MAX / 4, &count,
				  &got);

		if (r)
			return r;
		for (unsigned i = 0; i < count; i++) {
			if (!txn_has_room(t, 8))
				return -ENOSPC;
			w->p[w->count++] = (struct place){blk, e[i], false};
			blk += e[i].len;
			ip->goal = e[i].start + e[i].len;
		}
	}
	return 0;
}

static void place_old(struct txn *t, struct writing *w, const struct map_item *m,
		      uint64_t from, uint64_t to)
{
	w->p[w->count++] = (struct place){
		from, {m->start + (from - m->blk), to - from}, true};
	w->in_place += to - from;
	t->in_place = true;
}

/*
 * Take [from, to) out of the map, keeping unwritten runs as places to write
 * to, and find places for the rest.
 */
static int places_find(struct txn *t, struct inode *ip, struct writing *w,
		       uint64_t from, uint64_t to)
{
	struct overlap o = {.to = to, .max = ITEMS_AT_ONCE};
	uint64_t fresh = from, seen = from;	/* to be placed; looked at */
	int r = 0;

	while (r == 0 && seen < to) {
		o.from = seen;
		r = overlap_load(t->v, t, ip, &o);
		for (unsigned i = 0; i < o.count && r == 0; i++) {
			struct map_item *m = &o.item[i];
			uint64_t a = m->blk > from ? m->blk : from;
			uint64_t b = item_end(m) < to ? item_end(m) : to;
			bool keep = m->flags & MAP_UNWRITTEN &&
				    w->count < EXTENTS_MAX;

			if (!txn_has_room(t, cut_items(ip)))
				r = -ENOSPC;
			if (r == 0)
				r = item_cut(t, ip, m, from, to, keep);
			if (r == 0 && keep) {
				r = place_new(t, ip, w, fresh, a);
				if (r == 0)
					place_old(t, w, m, a, b);
				fresh = b;
			}
		}
		seen = o.next;
	}
	overlap_fini(&o);
	return r ? r : place_new(t, ip, w, fresh, to);
}

/* The run right before `blk` if new blocks at `start` would continue it. */
static int run_before(struct txn *t, struct inode *ip, uint64_t blk, uint64_t start,
		      struct map_item *m, bool *joins)
{
	struct overlap o = {.from = blk - 1, .to = blk, .max = 1};
	int r;

	*joins = false;
	if (!blk)
		return 0;
	r = overlap_load(t->v, t, ip, &o);
	if (r == 0 && o.count) {
		*m = o.item[0];
		*joins = !m->flags && item_end(m) == blk &&
			 m->start + m->len == start && m->len < MAP_MAX;
	}
	overlap_fini(&o);
	return r;
}

/* Enter one place into the map: `buf` holds its data, which is written. */
static int place_write(struct txn *t, struct inode *ip, const struct place *p,
		       const uint8_t *buf, bool first)
{
	struct volume *v = t->v;
	struct map_item m = {0};
	uint64_t done = 0;
	bool joins = false;
	int r = 0;

	if (!held_new(v, &t->held, p->e.start, p->e.len, buf))
		r = image_pwrite(v->im, buf, blk_off(v, p->e.len),
				 blk_off(v, p->e.start));
	if (r == 0 && first && !p->in_place)
		r = run_before(t, ip, p->blk, p->e.start, &m, &joins);
	while (r == 0 && done < p->e.len) {
		if (!joins)
			m = (struct map_item){.blk = p->blk + done,
					      .start = p->e.start + done};
		joins = false;
		for (; m.len < MAP_MAX && done < p->e.len; m.len++, done++)
			m.csum[m.len] = put64(checksum(buf + blk_off(v, done),
						       v->block_bytes));
		r = item_put(t, ip, &m);
	}
	return r;
}

unsigned map_write_max(const struct volume *v, const struct inode *ip)
{
	/* In the worst case each block costs a run cut, a run put, an extent
	 * taken and one freed, or a reference less. The rest is for the ends. */
	size_t rest = 4096, each = 144, n;

	if (ip->a.flags & INODE_SHARED) {
		rest = 8192;
		each = 240;
	}
	n = (v->txn_max - rest) / each;
	/* And two bitmaps may change: one that it was in, one that it goes to. */
	if (n > txn_touched_max(v) / 2)
		n = txn_touched_max(v) / 2;
	return n < MAP_WRITE_MAX ? (unsigned)n : MAP_WRITE_MAX;
}

/* Next to what stands before it in the file. */
static int goal_find(struct volume *v, struct inode *ip, uint64_t blk)
{
	struct overlap o = {.from = blk - 1, .to = blk, .max = 1};
	int r = blk ? overlap_load(v, NULL, ip, &o) : 0;

	if (r == 0 && o.count && has_blocks(&o.item[0]))
		ip->goal = o.item[0].start + o.item[0].len;
	overlap_fini(&o);
	return r;
}

int map_write(struct txn *t, struct inode *ip, uint64_t blk, uint64_t n,
	      const void *buf)
{
	struct writing *w = malloc(sizeof(*w));
	int r;

	assert(n <= MAP_WRITE_MAX);
	if (!w)
		return -ENOMEM;
	w->count = 0;
	w->in_place = 0;
	if (ip->goal == ALLOC_NO_GOAL)
		r = goal_find(t->v, ip, blk);
	else
		r = 0;
	if (r == 0)
		r = places_find(t, ip, w, blk, blk + n);
	for (unsigned i = 0; i < w->count && r == 0; i++)
		r = place_write(t, ip, &w->p[i],
				(const uint8_t *)buf +
					blk_off(t->v, w->p[i].blk - blk),
				i == 0);
	if (r == 0) {
		inode_edit(t, ip)->blks += n - w->in_place;
		t->data_bytes += blk_off(t->v, n);
	}
	free(w);
	return r;
}

int map_prealloc(struct txn *t, struct inode *ip, uint64_t blk, uint64_t n,
		 uint64_t *next)
{
	/* What this enters lies behind it; what was there before it may matter. */
	struct txn *earlier = t->items ? t : NULL;
	uint64_t end = blk + n, got, max = MAP_BARE_MAX;
	struct extent e[32];
	struct run run;
	unsigned count;
	int r = 0;

	if (max / space_per_bitmap(t->v) > txn_touched_max(t->v))
		max = txn_touched_max(t->v) * space_per_bitmap(t->v);
	while (blk < end && r == 0 && txn_has_room(t, 80)) {
		uint64_t want;

		r = lookup(t->v, earlier, ip, blk, &run);
		if (r)
			break;
		want = run.len < end - blk ? run.len : end - blk;
		if (run.kind != RUN_HOLE) {
			blk += want;
			continue;
		}
		if (want > max)
			want = max;
		r = txn_alloc(t, ip->goal, want, e, 32, &count, &got);
		if (r == 0)
			r = txn_set_aside(t, got);
		for (unsigned i = 0; i < count && r == 0; i++) {
			struct map_item m = {.blk = blk,
					     .start = e[i].start,
					     .len = e[i].len,
					     .flags = MAP_UNWRITTEN};

			r = item_put(t, ip, &m);
			blk += e[i].len;
			ip->goal = e[i].start + e[i].len;
			inode_edit(t, ip)->blks += e[i].len;
		}
	}
	*next = blk;
	return r;
}

/* ---- sharing ------------------------------------------------------------------------------ */

/* Runs that one transaction shares, if it has the room, and room for each: a run,
 * its references. */
#define SHARED_MAX 8u
#define SHARED_ITEMS (6 + REF_ITEMS)

static int share_run(struct txn *t, struct inode *dst, const struct map_item *m,
		     uint64_t from, uint64_t to, uint64_t at)
{
	struct map_item part = item_part(m, from, to);
	int r = 0;

	part.blk = at;
	if (has_blocks(&part)) {
		r = txn_ref(t, part.start, part.len, 1);
		inode_edit(t, dst)->blks += part.len;
	} else {
		inode_edit(t, dst)->flags |= INODE_LOST;
	}
	return r ? r : item_put(t, dst, &part);
}

int map_share(struct txn *t, struct inode *src, uint64_t src_blk,
	      struct inode *dst, uint64_t dst_blk, uint64_t n, uint64_t *next)
{
	struct overlap o = {.from = src_blk, .to = src_blk + n, .max = SHARED_MAX};
	uint64_t cut;
	int r;

	while (o.max > 1 && !txn_has_room(t, o.max * SHARED_ITEMS + 60))
		o.max /= 2;
	r = overlap_load(t->v, t, src, &o);
	if (r)
		goto out;
	inode_edit(t, src)->flags |= INODE_SHARED;
	inode_edit(t, dst)->flags |= INODE_SHARED;
	/* As far as these runs reach, and as the old ones there can be cut. */
	r = range_cut(t, dst, dst_blk, dst_blk + (o.next - src_blk),
		      o.max * SHARED_ITEMS, &cut);
	cut -= dst_blk;
	for (unsigned i = 0; i < o.count && r == 0; i++) {
		struct map_item *m = &o.item[i];
		uint64_t from = m->blk > src_blk ? m->blk : src_blk;
		uint64_t to = item_end(m);

		if (to > src_blk + cut)
			to = src_blk + cut;
		/* What was never written reads as the hole it becomes. */
		if (from < to && !(m->flags & MAP_UNWRITTEN))
			r = share_run(t, dst, m, from, to,
				      dst_blk + (from - src_blk));
	}
	*next = cut;
out:
	overlap_fini(&o);
	return r;
}
