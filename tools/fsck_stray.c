/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Nodes of the volume to which the way is lost.
 *
 * An inner node holds nothing but pointers. The nodes they led to still stand in
 * the image. Which of the whole nodes there, that nobody owns now, are the
 * volume's, and not what it replaced long ago?
 *
 *   1. The bitmaps know: those in use.
 *   2. Where bitmaps are lost, the generations know, nearly: the newest are. A
 *      change writes all nodes from the leaf up to the root anew, so a node
 *      is older than none below it. From the newest on, a node is taken
 *      unless it is contradicted by those taken before it: one of its level has
 *      some of its keys; or one above it covers it, but leads elsewhere; or one
 *      below it is newer. What may be taken wrongly is an older state of what
 *      was deleted or changed, where all that tells of the change is lost.
 *
 * Those that another stray leads to come along with it.
 */
#include "tools/fsck.h"

#include <stdlib.h>
#include <string.h>

#define PIECE_BLOCKS 256u

struct stray {
	struct disk_ptr ptr;
	size_t keys;			/* its lowest and its highest, in search.keys */
	uint16_t klen, high_len;
	uint8_t table, level;
	bool taken;
};

struct search {
	struct fsck *f;
	bool (*wanted)(void *ctx, const struct found_node *n);
	void *ctx;
	size_t size;			/* of a block */
	struct stray *stray;
	size_t strays, stray_room;
	uint8_t *keys;
	size_t key_bytes, key_room;
	struct disk_ptr *led;		/* where they lead to, sorted */
	size_t leds, led_room;
	struct stray **taken;		/* by table, the highest level first, then by key */
	size_t takens;
	struct blocks blind;		/* whole nodes without a leaf below them */
};

/* ---- what a node says ------------------------------------------------------------- */

const uint8_t *item_at(const struct disk_node *d, unsigned i, struct disk_item *it)
{
	const uint8_t *at = (const uint8_t *)d + get16(((const le16 *)(d + 1))[i]);

	memcpy(it, at, sizeof(*it));
	return at + sizeof(*it);
}

static struct disk_ptr child_at(const struct disk_node *d, unsigned i)
{
	struct disk_item it;
	const uint8_t *key = item_at(d, i, &it);
	struct disk_ptr p;

	memcpy(&p, key + get16(it.klen), sizeof(p));
	return p;
}

static bool is_set(const uint8_t *bits, uint64_t i)
{
	return bits && bits[i / 8] >> (i % 8) & 1;
}

/* Read the node that another points to; false: it is lost, or leads to no leaf. */
static bool read_child(struct search *s, const struct disk_ptr *p, enum table t,
		       unsigned level, struct disk_node *d)
{
	uint64_t block = get64(p->block);

	if (!fsck_in_volume(s->f, block, 1) ||
	    is_set(blocks_page(&s->blind, block / BLOCKS_PAGE), block % BLOCKS_PAGE))
		return false;
	fsck_read_all(s->f, d, s->size, 1, block << s->f->shift);
	return !repair_node_verify(d, s->size, block) && get16(d->count) &&
	       !memcmp(&d->self, p, sizeof(*p)) && d->level == level &&
	       d->table == t;
}

/*
 * The lowest or highest key below a node. Above the leaves a first key may be
 * lower, or higher, than all there is, so the way goes down to the first leaf
 * there is, or the last. Where there is none it is not looked for again: nodes that
 * lead to the same ones many times would multiply, level by level.
 */
static bool edge_key(struct search *s, const struct disk_node *d, bool high,
		     uint8_t *key, uint16_t *klen)
{
	unsigned count = get16(d->count);
	struct disk_node *below;
	struct disk_item it;
	bool found = false, twice;

	if (!d->level) {
		const uint8_t *at = item_at(d, high ? count - 1 : 0, &it);

		*klen = get16(it.klen);
		memcpy(key, at, *klen);
		return true;
	}
	below = malloc(s->size);
	for (unsigned i = 0; below && !found && i < count; i++) {
		struct disk_ptr p = child_at(d, high ? count - 1 - i : i);

		found = read_child(s, &p, d->table, d->level - 1u, below) &&
			edge_key(s, below, high, key, klen);
	}
	if (below && !found)	/* without memory it is just not noted */
		(void)blocks_put(&s->blind, get64(d->self.block), 1, &twice);
	free(below);
	return found;
}

/* ---- candidates ------------------------------------------------------------------- */

static const uint8_t *low(const struct search *s, const struct stray *n)
{
	return s->keys + n->keys;
}

static const uint8_t *high(const struct search *s, const struct stray *n)
{
	return s->keys + n->keys + n->klen;
}

static struct found_node as_found(const struct search *s, const struct stray *n)
{
	struct found_node found = {.table = (enum table)n->table,
				   .level = n->level,
				   .ptr = n->ptr,
				   .klen = n->klen};

	memcpy(found.key, low(s, n), n->klen);
	return found;
}

static int stray_add(struct search *s, const struct disk_node *d,
		     const struct found_node *n, const uint8_t *high_key,
		     uint16_t high_len)
{
	struct stray *p = grow(s->stray, sizeof(*p), s->strays, &s->stray_room);
	uint8_t *keys = s->keys;

	if (!p)
		return -ENOMEM;
	s->stray = p;
	if (s->key_room - s->key_bytes < 2 * KEY_MAX) {
		keys = realloc(keys, 2 * s->key_room);
		if (!keys)
			return -ENOMEM;
		s->keys = keys;
		s->key_room *= 2;
	}
	keys += s->key_bytes;
	p[s->strays++] = (struct stray){.ptr = d->self,
					.keys = s->key_bytes,
					.klen = n->klen,
					.high_len = high_len,
					.table = d->table,
					.level = d->level};
	memcpy(keys, n->key, n->klen);
	memcpy(keys + n->klen, high_key, high_len);
	s->key_bytes += (size_t)n->klen + high_len;
	return 0;
}

/* A block that has no owner: is it a node that lost its way? */
static int look_at(struct search *s, uint64_t block, const struct disk_node *d)
{
	struct found_node n = {.table = (enum table)d->table, .level = d->level};
	uint8_t high_key[KEY_MAX];
	uint16_t high_len;

	if (get32(d->magic) != NODE_MAGIC || !get16(d->count) ||
	    get64(d->self.birth) > get64(s->f->super.gen) ||
	    repair_node_verify(d, s->size, block) ||
	    !edge_key(s, d, false, n.key, &n.klen) || !s->wanted(s->ctx, &n) ||
	    !edge_key(s, d, true, high_key, &high_len))
		return 0;
	return stray_add(s, d, &n, high_key, high_len);
}

/* Blocks start .. start + n, but those that have an owner. */
static int look_at_run(struct search *s, uint8_t *piece, uint64_t start, uint64_t n)
{
	int ret = 0;

	while (!ret && n) {
		uint64_t now = n < PIECE_BLOCKS ? n : PIECE_BLOCKS;

		fsck_read_all(s->f, piece, s->size, now, start << s->f->shift);
		for (uint64_t i = 0; !ret && i < now; i++)
			if (!is_set(blocks_page(&s->f->owned, (start + i) / BLOCKS_PAGE),
				    (start + i) % BLOCKS_PAGE))
				ret = look_at(s, start + i, (void *)(piece + i * s->size));
		start += now;
		n -= now;
	}
	return ret;
}

/* ---- where they lead to -------------------------------------------------------------- */

static int ptr_cmp(const void *a, const void *b)
{
	return memcmp(a, b, sizeof(struct disk_ptr));
}

static bool is_led(const struct search *s, const struct stray *n)
{
	return s->leds && bsearch(&n->ptr, s->led, s->leds, sizeof(*s->led), ptr_cmp);
}

/* Behind the others, which are sorted: leads_merge() does the rest. */
static int leads_add(struct search *s, const struct stray *n)
{
	struct disk_node *d;
	int ret = 0;

	if (!n->level)
		return 0;
	d = malloc(s->size);
	if (!d)
		return -ENOMEM;
	fsck_read_all(s->f, d, s->size, 1, get64(n->ptr.block) << s->f->shift);
	if (repair_node_verify(d, s->size, get64(n->ptr.block)))
		d->count = put16(0);	/* it was whole before */
	for (unsigned i = 0; !ret && i < get16(d->count); i++) {
		struct disk_ptr *p = grow(s->led, sizeof(*p), s->leds, &s->led_room);

		if (p) {
			s->led = p;
			p[s->leds++] = child_at(d, i);
		} else {
			ret = -ENOMEM;
		}
	}
	free(d);
	return ret;
}

/* The first `sorted` are; now all. */
static int leads_merge(struct search *s, size_t sorted)
{
	size_t n = s->leds - sorted, at = s->leds, i = sorted, j = n;
	struct disk_ptr *more;

	if (!n)
		return 0;
	more = malloc(n * sizeof(*more));
	if (!more)
		return -ENOMEM;
	memcpy(more, s->led + sorted, n * sizeof(*more));
	qsort(more, n, sizeof(*more), ptr_cmp);
	while (j)
		s->led[--at] = i && ptr_cmp(&s->led[i - 1], &more[j - 1]) > 0
				       ? s->led[--i] : more[--j];
	free(more);
	return 0;
}

/* ---- by the bitmaps ----------------------------------------------------------------- */

/* All that is in use in a page of the bitmaps, and has no owner. */
static int look_at_page(struct search *s, uint8_t *piece, uint64_t page,
			const uint8_t *bits)
{
	const uint8_t *owned = blocks_page(&s->f->owned, page);
	uint64_t len = 0, at = page * BLOCKS_PAGE;
	int ret = 0;

	for (unsigned i = 0; !ret && i < BLOCKS_PAGE; i++, at++) {
		if (is_set(bits, i) && !is_set(owned, i)) {
			len++;
		} else if (len) {
			ret = look_at_run(s, piece, at - len, len);
			len = 0;
		}
	}
	return ret || !len ? ret : look_at_run(s, piece, at - len, len);
}

static int look_in_use(struct search *s, uint8_t *piece)
{
	struct fsck *f = s->f;
	uint64_t per = f->per_bitmap / BLOCKS_PAGE;
	uint64_t count = fsck_bitmaps(f);
	uint8_t *bits = malloc(s->size);
	int ret = bits ? 0 : -ENOMEM;

	for (uint64_t i = 0; !ret && i < count; i = fsck_next_bitmap(f, i + 1)) {
		ret = volume_bitmap(f->v, i, bits);
		for (uint64_t p = 0; !ret && p < per; p++)
			ret = look_at_page(s, piece, i * per + p,
					   bits + p * (BLOCKS_PAGE / 8));
		cli_progress("what lost nodes held", i, count);
	}
	free(bits);
	for (size_t i = 0; !ret && i < s->strays; i++) {
		s->stray[i].taken = true;
		ret = leads_add(s, &s->stray[i]);
	}
	return ret ? ret : leads_merge(s, 0);
}

/* ---- by the generations ------------------------------------------------------------- */

static int look_everywhere(struct search *s, uint8_t *piece)
{
	struct fsck *f = s->f;
	uint64_t off = HEAD_BYTES, end;
	int ret = 0;

	while (!ret && fsck_next_data(f, f->shift, f->blocks, &off, &end))
		while (!ret && off < end) {
			uint64_t n = (end - off) >> f->shift;

			n = n < PIECE_BLOCKS ? n : PIECE_BLOCKS;
			ret = look_at_run(s, piece, off >> f->shift, n);
			off += n << f->shift;
			cli_progress("what lost nodes held", off >> f->shift, f->blocks);
		}
	return ret;
}

/* By table, the highest level first, then by key. */
static int place_cmp(const struct search *s, const struct stray *x, const struct stray *y)
{
	if (x->table != y->table)
		return x->table < y->table ? -1 : 1;
	if (x->level != y->level)
		return x->level < y->level ? 1 : -1;
	return key_cmp(low(s, x), x->klen, low(s, y), y->klen);
}

/* The newest first. */
static int age_cmp(const void *a, const void *b, void *search)
{
	const struct stray *x = a, *y = b;
	uint64_t xb = get64(x->ptr.birth), yb = get64(y->ptr.birth);

	return xb != yb ? (xb < yb ? 1 : -1) : place_cmp(search, x, y);
}

/* Has one of this level, among those taken, keys from x's lowest to `to`? */
static bool overlapped(const struct search *s, const struct stray *x, unsigned level,
		       const uint8_t *to, size_t to_len)
{
	struct stray k = *x;
	size_t from = 0, end = s->takens;
	const struct stray *b;

	k.level = (uint8_t)level;
	while (from < end) {
		size_t mid = from + (end - from) / 2;

		if (place_cmp(s, s->taken[mid], &k) < 0)
			from = mid + 1;
		else
			end = mid;
	}
	b = from < s->takens ? s->taken[from] : NULL;
	if (b && b->table == x->table && b->level == level &&
	    key_cmp(low(s, b), b->klen, to, to_len) <= 0)
		return true;
	b = from ? s->taken[from - 1] : NULL;
	return b && b->table == x->table && b->level == level &&
	       key_cmp(low(s, x), x->klen, high(s, b), b->high_len) <= 0;
}

/* Those taken are newer, or of the same age and above it. */
static bool contradicted(const struct search *s, const struct stray *x)
{
	if (overlapped(s, x, x->level, high(s, x), x->high_len) ||
	    overlapped(s, x, x->level + 1u, low(s, x), x->klen))
		return true;
	for (unsigned l = 0; l < x->level; l++)
		if (overlapped(s, x, l, high(s, x), x->high_len))
			return true;
	return false;
}

/* Of one birth, table and level, by key: n of them from stray[from] on. */
static int take_some(struct search *s, size_t from, size_t n)
{
	struct stray **more = calloc(n, sizeof(*more)), *last = NULL;
	size_t sorted = s->leds, count = 0, i = s->takens, at;
	int ret = more ? 0 : -ENOMEM;

	for (struct stray *x = s->stray + from; !ret && x < s->stray + from + n; x++) {
		/* A crash may have left two of one number. */
		if (last && key_cmp(low(s, x), x->klen, high(s, last),
				    last->high_len) <= 0)
			continue;
		if (!is_led(s, x) && contradicted(s, x))
			continue;
		x->taken = true;
		more[count++] = last = x;
		ret = leads_add(s, x);
	}
	if (!ret)
		ret = leads_merge(s, sorted);
	s->takens += count;
	for (at = s->takens; count;)
		s->taken[--at] = i && place_cmp(s, s->taken[i - 1], more[count - 1]) > 0
					 ? s->taken[--i] : more[--count];
	free(more);
	return ret;
}

static int look_by_birth(struct search *s, uint8_t *piece)
{
	int ret = look_everywhere(s, piece);
	size_t n;

	if (ret || !s->strays)
		return ret;
	qsort_r(s->stray, s->strays, sizeof(*s->stray), age_cmp, s);
	s->taken = calloc(s->strays, sizeof(struct stray *));
	if (!s->taken)
		return -ENOMEM;
	for (size_t i = 0; !ret && i < s->strays; i += n) {
		const struct stray *a = &s->stray[i];

		for (n = 1; i + n < s->strays && a[n].table == a->table &&
			    a[n].level == a->level &&
			    get64(a[n].ptr.birth) == get64(a->ptr.birth); n++)
			;
		ret = take_some(s, i, n);
	}
	return ret;
}

/* ---- both --------------------------------------------------------------------------- */

int strays_find(struct fsck *f, bool (*wanted)(void *ctx, const struct found_node *n),
		void *ctx, struct found_node **out, size_t *count)
{
	struct search s = {.f = f, .wanted = wanted, .ctx = ctx,
			   .size = (size_t)1 << f->shift,
			   .key_room = 64 * 1024};
	uint8_t *piece = malloc(PIECE_BLOCKS * s.size);
	int ret = -ENOMEM;

	*out = NULL;
	*count = 0;
	s.keys = malloc(s.key_room);
	if (piece && s.keys && !blocks_init(&s.blind, f->blocks))
		ret = f->bitmaps_lost ? look_by_birth(&s, piece) : look_in_use(&s, piece);
	cli_progress_end();
	if (!ret) {
		*out = calloc(s.strays + 1, sizeof(**out));
		ret = *out ? 0 : -ENOMEM;
	}
	for (size_t i = 0; !ret && i < s.strays; i++)
		if (s.stray[i].taken && !is_led(&s, &s.stray[i]))
			(*out)[(*count)++] = as_found(&s, &s.stray[i]);
	free(piece);
	free(s.stray);
	free(s.keys);
	free(s.led);
	free(s.taken);
	blocks_fini(&s.blind);
	return ret;
}
