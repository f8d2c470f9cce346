/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A superblock from what is left, when the newest one is lost. What never
 * changes comes from a backup, or from the older slot. The rest:
 *
 *   1. Each checkpoint leaves a group in the ring that names it (of_gen), and
 *      groups after it say that it was durable. The newest such checkpoint is
 *      the one to go on from, also where its own group is lost; its groups
 *      have the salt.
 *   2. What it changed in the tree of files was written with its number, the
 *      root among it: the root is the node of the highest level among those
 *      of the highest birth that is not above it. So all nodes in the image
 *      are looked at; the first root below which everything is there is it.
 *      If there is none the newest is taken, and later passes repair that.
 *   3. The chain of groups that ends with the last one, from before the
 *      checkpoint. Items are absolute, so applying more of them, in order, comes
 *      to the same, and helps where what is found of a tree is older. But data
 *      that rode in a group (JITEM_DATA) is written to its block, which may
 *      have been freed since and hold something else. The checkpoint put it in
 *      its place, if it rode before the end of the generation: so a group from
 *      before that end is left out, and all before it, if its data is not there
 *      now. Where that end is, between the group of the checkpoint before and
 *      its own, is not known; but what was freed is not taken again before the
 *      checkpoint that the freeing is part of, so a group that frees what one
 *      after the checkpoint takes came before it, and is left out as well. Part
 *      of the ring stays free for whoever opens the volume, as it was when the
 *      checkpoint was made.
 *
 * Where backups are lost as well, what never changes is guessed (guess_super):
 * a node knows its own block number, which gives the block size; the size is
 * the image's; the ring stands where mkfs puts it, and is as long as mkfs makes
 * it, unless the first node says that it is shorter, or groups behind its end
 * that it is longer.
 *
 * Not taken over are the table of references, whose older states lie about as
 * well (an intent of yesterday would cut today's file), and the bitmaps. Both
 * are made anew from the files. Until the next round has done so the table of
 * bitmaps has a root that is none, and nobody can open the volume for writing.
 */
#include "tools/fsck.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#define ROOTS 32u
#define PIECE (1u << 20)

struct root {
	struct disk_ptr ptr;
	unsigned level;
};

/* What was found below a root. */
struct census {
	uint64_t nodes, items, inodes, aside, max_ino, lost;
};

/* A group in the ring; of the blocks that all of them take and free, its own
 * are those from place `space` on, and of data that rides those from `ride` on. */
struct group_at {
	uint64_t unit, units, salt, seq, prev, csum, durable, checkpoint, of_gen;
	size_t space, ride;
};

struct delta_at {
	struct extent e;
	bool free;
};

struct ride_at {
	uint64_t block, csum;
};

struct rescue {
	struct fsck *f;
	struct disk_super s;
	unsigned shift;
	uint64_t blocks, limit;
	struct group_at *groups;	/* by their place in the ring */
	size_t count;
	struct delta_at *space;
	size_t spaces, space_room;
	struct ride_at *ride;
	size_t rides, ride_room;
	struct root root[ROOTS];	/* by birth, the newest first */
	unsigned roots;
	unsigned top;			/* the highest level met */
	struct census census;
};

void super_distrust_space(struct disk_super *s)
{
	s->root[TABLE_SPACE] = (struct disk_root){
		.ptr = {.block = put64(get64(s->blocks) - 1), .birth = s->gen}};
	s->free_blks = put64(0);
	s->flags = put32(get32(s->flags) & ~SUPER_CLEAN);
}

/* ---- the ring ------------------------------------------------------------------ */

static int note_space(struct rescue *r, const struct disk_jitem *ji)
{
	struct delta_at *p = grow(r->space, sizeof(*p), r->spaces, &r->space_room);
	le64 run[2];

	if (!p)
		return -ENOMEM;
	r->space = p;
	memcpy(run, ji->bytes, sizeof(run));
	p[r->spaces++] = (struct delta_at){{get64(run[0]), get64(run[1])},
					   ji->type == JITEM_FREE};
	return 0;
}

static int note_ride(struct rescue *r, const struct disk_jitem *ji)
{
	struct ride_at *p = grow(r->ride, sizeof(*p), r->rides, &r->ride_room);
	le64 block;

	if (!p)
		return -ENOMEM;
	r->ride = p;
	memcpy(&block, ji->bytes, sizeof(block));
	p[r->rides++] = (struct ride_at){get64(block),
					 checksum(ji->bytes + sizeof(block),
						  get16(ji->vlen))};
	return 0;
}

/* What a group takes and frees, and what rides in it. */
static int items_survey(struct rescue *r, const struct disk_group *g)
{
	const struct disk_jitem *ji = NULL;
	int ret = 0;

	while (!ret && (ji = group_item(g, ji))) {
		size_t klen = get16(ji->klen);

		if ((ji->type == JITEM_TAKE || ji->type == JITEM_FREE) && klen == 16)
			ret = note_space(r, ji);
		else if (ji->type == JITEM_DATA && klen == 8)
			ret = note_ride(r, ji);
	}
	return ret;
}

static int ring_survey(struct rescue *r)
{
	struct ring ring;
	const char *why;
	size_t room = 0;
	int ret = ring_load(r->f, &r->s, &ring);

	for (uint64_t u = 0; !ret && u < ring.units; u++) {
		const struct disk_group *g = ring_group(&ring, u, NULL, &why);
		struct group_at *p;

		if (!g)
			continue;
		p = grow(r->groups, sizeof(*p), r->count, &room);
		if (!p) {
			ret = -ENOMEM;
			break;
		}
		r->groups = p;
		p[r->count++] = (struct group_at){
			u, group_units(g), get64(g->salt), get64(g->seq),
			get64(g->prev), get64(g->csum), get64(g->durable_seq),
			get64(g->checkpoint_gen), get64(g->of_gen), r->spaces, r->rides};
		ret = items_survey(r, g);
		u += group_units(g) - 1;
	}
	ring_fini(&ring);
	return ret;
}

/* The newest checkpoint that a group is of, below `below`; its group or NULL. */
static const struct group_at *newest_checkpoint(const struct rescue *r,
						uint64_t below)
{
	const struct group_at *best = NULL;

	for (size_t i = 0; i < r->count; i++) {
		const struct group_at *g = &r->groups[i];

		/* The later one of two, of which a crash ended the first. */
		if (g->of_gen && g->of_gen < below &&
		    (!best || g->of_gen > best->of_gen ||
		     (g->of_gen == best->of_gen && g->seq > best->seq)))
			best = g;
	}
	return best;
}

/* Is q the group that follows p? */
static bool follows(const struct rescue *r, const struct group_at *p,
		    const struct group_at *q)
{
	return q->salt == p->salt && q->seq == p->seq + 1 && q->prev == p->csum &&
	       q->unit == (p->unit + p->units) % get64(r->s.journal_units);
}

/* The one behind it in the ring, or before it; it may be itself. */
static const struct group_at *behind(const struct rescue *r, const struct group_at *g)
{
	return g + 1 < r->groups + r->count ? g + 1 : r->groups;
}

static const struct group_at *before(const struct rescue *r, const struct group_at *g)
{
	return g > r->groups ? g - 1 : r->groups + r->count - 1;
}

static size_t space_end(const struct rescue *r, const struct group_at *g)
{
	return g + 1 < r->groups + r->count ? g[1].space : r->spaces;
}

static size_t ride_end(const struct rescue *r, const struct group_at *g)
{
	return g + 1 < r->groups + r->count ? g[1].ride : r->rides;
}

/* What is known of the groups that are to be replayed, while more are looked at. */
struct replay {
	uint64_t units;
	struct runs taken;		/* by those after the checkpoint */
	struct blocks ridden;		/* blocks that data rides for */
	bool older;			/* those before are of older generations */
};

/* Note the blocks that data rides for. *again: some were known. */
static int ridden(struct rescue *r, const struct group_at *g, struct replay *p,
		  bool *again)
{
	*again = false;
	for (size_t i = g->ride; i < ride_end(r, g); i++) {
		bool twice = true;

		if (r->ride[i].block < r->blocks &&
		    blocks_put(&p->ridden, r->ride[i].block, 1, &twice) < 0)
			return -ENOMEM;
		*again = *again || twice;
	}
	return 0;
}

/* The groups after this one. */
static int replay_after(struct rescue *r, const struct group_at *own,
			struct replay *p)
{
	const struct group_at *g = own;
	bool again;
	int ret = blocks_init(&p->ridden, r->blocks);

	p->units = own->units;
	if (!ret)
		ret = ridden(r, own, p, &again);
	while (!ret && follows(r, g, behind(r, g))) {
		g = behind(r, g);
		p->units += g->units;
		for (size_t i = g->space; !ret && i < space_end(r, g); i++)
			if (!r->space[i].free)
				ret = runs_add(&p->taken, r->space[i].e.start,
					       r->space[i].e.len);
		if (!ret)
			ret = ridden(r, g, p, &again);
	}
	runs_sort(&p->taken);
	return ret;
}

/* Is all that rides in it where it belongs? */
static bool in_place(const struct rescue *r, const struct group_at *g)
{
	static uint8_t buf[1u << BLOCK_SHIFT_MAX];
	size_t size = (size_t)1 << r->shift;

	for (size_t i = g->ride; i < ride_end(r, g); i++)
		if (r->ride[i].block >= r->blocks ||
		    image_pread(r->f->im, buf, size, r->ride[i].block << r->shift) ||
		    checksum(buf, size) != r->ride[i].csum)
			return false;
	return true;
}

/* Does it free what was taken again? */
static bool frees(const struct rescue *r, const struct group_at *g,
		  const struct runs *taken)
{
	for (size_t i = g->space; i < space_end(r, g); i++)
		if (r->space[i].free &&
		    runs_meet(taken, r->space[i].e.start, r->space[i].e.len))
			return true;
	return false;
}

/* May this group, the one before those of `p`, be replayed too? */
static int replay_before(struct rescue *r, const struct group_at *g,
			 struct replay *p, bool *yes)
{
	uint64_t most = get64(r->s.journal_units);
	bool again = false;
	int ret = 0;

	p->older = p->older || g->of_gen;
	*yes = p->units + g->units <= most - most / 8 &&
	       (p->older ? in_place(r, g) : !frees(r, g, &p->taken));
	if (*yes)
		ret = ridden(r, g, p, &again);
	*yes = *yes && !again;
	p->units += g->units;
	return ret;
}

/* What is to be replayed upon the checkpoint whose own group this is, or, where
 * that is lost, a later one. */
static int set_tail(struct rescue *r, const struct group_at *own)
{
	uint64_t must = own->of_gen ? own->seq : own->durable;
	const struct group_at *g = own;
	struct replay p = {0};
	bool yes = true;
	int ret = replay_after(r, own, &p);

	while (!ret && yes && follows(r, before(r, g), g)) {
		ret = replay_before(r, before(r, g), &p, &yes);
		if (yes)
			g = before(r, g);
	}
	free(p.taken.v);
	blocks_fini(&p.ridden);
	for (size_t i = 0; i < r->count; i++)
		if (r->groups[i].salt == own->salt && r->groups[i].durable > must)
			must = r->groups[i].durable;
	r->s.salt = put64(g->salt);
	r->s.durable_seq = put64(must);
	r->s.tail_unit = put64(g->unit);
	r->s.tail_seq = put64(g->seq);
	r->s.tail_prev = put64(g->prev);
	return ret;
}

/* ---- nodes ----------------------------------------------------------------------- */

/* Is this block a node of the files that knows its own place? */
static bool is_node(const struct rescue *r, const struct disk_node *d,
		    uint64_t block)
{
	return get32(d->magic) == NODE_MAGIC && d->table == TABLE_FILES &&
	       !repair_node_verify(d, (size_t)1 << r->shift, block);
}

/* Keep the highest node of each birth, of the newest births. */
static void note_node(struct rescue *r, const struct disk_node *d)
{
	uint64_t birth = get64(d->self.birth);
	unsigned i = 0;

	if (birth > r->limit)
		return;
	if (d->level > r->top)
		r->top = d->level;
	while (i < r->roots && get64(r->root[i].ptr.birth) > birth)
		i++;
	if (i == ROOTS)
		return;
	if (i < r->roots && get64(r->root[i].ptr.birth) == birth) {
		if (d->level > r->root[i].level)
			r->root[i] = (struct root){d->self, d->level};
		return;
	}
	if (r->roots < ROOTS)
		r->roots++;
	memmove(&r->root[i + 1], &r->root[i],
		(r->roots - 1 - i) * sizeof(r->root[0]));
	r->root[i] = (struct root){d->self, d->level};
}

static int scan_nodes(struct rescue *r)
{
	size_t size = (size_t)1 << r->shift;
	uint8_t *buf = malloc(PIECE);
	uint64_t off = HEAD_BYTES, end;
	int ret = buf ? 0 : -ENOMEM;

	r->roots = r->top = 0;
	while (buf && fsck_next_data(r->f, r->shift, r->blocks, &off, &end))
		while (off < end) {
			size_t n = end - off < PIECE ? (size_t)(end - off) : PIECE;

			fsck_read_all(r->f, buf, size, n / size, off);
			for (size_t at = 0; at < n; at += size)
				if (is_node(r, (void *)(buf + at), (off + at) >> r->shift))
					note_node(r, (void *)(buf + at));
			off += n;
			cli_progress("nodes", off >> r->shift, r->blocks);
		}
	cli_progress_end();
	free(buf);
	return ret;
}

/* ---- below a root ------------------------------------------------------------------ */

static void count_item(struct census *c, const struct disk_item *it)
{
	const uint8_t *key = it->bytes;
	size_t klen = get16(it->klen);

	c->items++;
	if (klen < 9)
		return;
	if (be64_get(key) > c->max_ino && be64_get(key) <= INO_MAX)
		c->max_ino = be64_get(key);
	c->inodes += key[8] == KEY_INODE;
	c->aside += map_aside(key, klen, key + klen, get16(it->vlen));
}

static int count_below(struct rescue *r, const struct disk_ptr *ptr,
		       unsigned level)
{
	size_t size = (size_t)1 << r->shift;
	uint64_t block = get64(ptr->block);
	struct disk_node *d = malloc(size);
	struct census *c = &r->census;
	int ret = 0;

	if (!d)
		return -ENOMEM;
	if (!block || block >= r->blocks || c->nodes > r->blocks ||
	    image_pread(r->f->im, d, size, block << r->shift) ||
	    !is_node(r, d, block) || d->level != level ||
	    memcmp(&d->self, ptr, sizeof(*ptr))) {
		c->lost++;
		free(d);
		return 0;
	}
	c->nodes++;
	for (unsigned i = 0; !ret && i < get16(d->count); i++) {
		size_t at = get16(((const le16 *)(d + 1))[i]);
		const struct disk_item *it = (const void *)((uint8_t *)d + at);
		struct disk_ptr child;

		if (at + sizeof(*it) > size ||
		    at + sizeof(*it) + get16(it->klen) + get16(it->vlen) > size ||
		    (level && get16(it->vlen) != sizeof(child))) {
			c->lost++;
			break;
		}
		if (!level) {
			count_item(c, it);
			continue;
		}
		memcpy(&child, it->bytes + get16(it->klen), sizeof(child));
		ret = count_below(r, &child, level - 1);
	}
	free(d);
	return ret;
}

/* The first root, of the highest level if `top`, that has all below it. */
static int whole_root(struct rescue *r, bool top, const struct root **out)
{
	int ret = 0;

	*out = NULL;
	for (unsigned i = 0; !ret && !*out && i < r->roots; i++) {
		if (top && r->root[i].level != r->top)
			continue;
		r->census = (struct census){0};
		ret = count_below(r, &r->root[i].ptr, r->root[i].level);
		if (!r->census.lost)
			*out = &r->root[i];
	}
	return ret;
}

static int set_root(struct rescue *r, bool whole, bool *found)
{
	const struct root *root;
	uint64_t next_ino;
	int ret = whole_root(r, true, &root);

	if (!ret && !root)
		ret = whole_root(r, false, &root);
	if (!ret && !root && !whole && r->roots) {
		root = &r->root[0];
		r->census = (struct census){0};
		ret = count_below(r, &root->ptr, root->level);
	}
	*found = !ret && root;
	if (!*found)
		return ret;
	r->s.root[TABLE_FILES] = (struct disk_root){
		.ptr = root->ptr,
		.nodes = put64(r->census.nodes),
		.items = put64(r->census.items),
		.level = put32(root->level)};
	r->s.inodes = put64(r->census.inodes);
	r->s.aside = put64(r->census.aside);
	/* None is given out twice, however many had been since. */
	next_ino = r->census.max_ino + (1ull << 40);
	r->s.next_ino = put64(next_ino <= INO_MAX ? next_ino : INO_MAX + 1);
	return 0;
}

/* ---- the whole ----------------------------------------------------------------------- */

/* A group after the newest durable checkpoint, if one tells of it; or NULL. */
static const struct group_at *newest_durable(const struct rescue *r)
{
	const struct group_at *best = NULL;

	for (size_t i = 0; i < r->count; i++) {
		const struct group_at *g = &r->groups[i];

		/* not the first of the next mount, if there is another */
		if (!best || g->checkpoint > best->checkpoint ||
		    (g->checkpoint == best->checkpoint && !g->of_gen &&
		     (best->of_gen || g->seq > best->seq)))
			best = g;
	}
	return best && best->checkpoint ? best : NULL;
}

/* From checkpoint `gen`, and group `g`, its own or a later one, on. */
static int build_from(struct rescue *r, const struct group_at *g, uint64_t gen,
		      bool whole, bool *found)
{
	int ret = set_tail(r, g);

	r->limit = gen;
	r->s.gen = put64(gen);
	if (!ret)
		ret = scan_nodes(r);
	return ret ? ret : set_root(r, whole, found);
}

static int build(struct rescue *r)
{
	const struct group_at *g = newest_checkpoint(r, UINT64_MAX);
	const struct group_at *last = newest_durable(r);
	uint64_t durable = last ? last->checkpoint : 0;
	bool found = false;
	int ret = 0;

	/* One that may not have taken place counts if all of it is there. */
	for (; !ret && !found && g && g->of_gen > durable;
	     g = newest_checkpoint(r, g->of_gen))
		ret = build_from(r, g, g->of_gen, true, &found);
	/* The one that did counts, though its own group may be lost: no older one
	 * opens with a journal that tells of it. */
	if (!ret && !found && durable)
		ret = build_from(r, g && g->of_gen == durable ? g : last, durable,
				 false, &found);
	if (ret || found)
		return ret;
	/* No journal: the newest tree there is. */
	r->limit = UINT64_MAX;
	ret = scan_nodes(r);
	if (!ret)
		ret = set_root(r, false, &found);
	if (!ret && found)
		r->s.gen = r->root[0].ptr.birth;
	return ret ? ret : found ? 0 : -ENOENT;
}

/* ---- without any superblock ------------------------------------------------------------ */

/* The block size by which `at`, which may be a node of any size, is one; or 0. */
static unsigned node_shift(const uint8_t *at, size_t left, uint64_t off)
{
	const struct disk_node *d = (const void *)at;

	if (get32(d->magic) != NODE_MAGIC)
		return 0;
	for (unsigned s = BLOCK_SHIFT_MIN; s <= BLOCK_SHIFT_MAX; s++)
		if (off >> s << s == off && left >= (size_t)1 << s &&
		    get64(d->self.block) == off >> s &&
		    !repair_node_verify(d, (size_t)1 << s, off >> s))
			return s;
	return 0;
}

/* The first node in the image: where, and its block size. */
static int first_node(struct rescue *r, uint64_t *at)
{
	uint8_t *buf = malloc(PIECE);
	uint64_t off = HEAD_BYTES, end;
	int ret = buf ? -ENOENT : -ENOMEM;

	r->shift = BLOCK_SHIFT_MAX;
	while (ret == -ENOENT &&
	       fsck_next_data(r->f, r->shift, r->blocks, &off, &end)) {
		size_t n = end - off < PIECE ? (size_t)(end - off) : PIECE;

		fsck_read_all(r->f, buf, 4096, n / 4096, off);
		for (size_t i = 0; ret && i + sizeof(struct disk_node) <= n;
		     i += 4096) {
			unsigned shift = node_shift(buf + i, n - i, off + i);

			if (!shift)
				continue;
			r->shift = shift;
			*at = off + i;
			ret = 0;
		}
		off += n;
	}
	free(buf);
	return ret;
}

/* Where the last group ends that begins in [from, to); `from`: there is none. */
static uint64_t groups_end(struct rescue *r, uint64_t from, uint64_t to)
{
	struct disk_super s = r->s;
	struct ring ring;
	const char *why;
	uint64_t end = from;

	s.journal_block = put64(from >> r->shift);
	s.journal_units = put64((to - from) / JOURNAL_UNIT);
	for (uint64_t u = ring_load(r->f, &s, &ring) ? ring.units : 0;
	     u < ring.units; u++) {
		const struct disk_group *g = ring_group(&ring, u, NULL, &why);

		if (g && u + group_units(g) <= ring.units)
			end = from + (u + group_units(g)) * JOURNAL_UNIT;
	}
	ring_fini(&ring);
	return end;
}

#define RING_MAX ((uint64_t)JOURNAL_MAX_UNITS * JOURNAL_UNIT)

int guess_super(struct fsck *f, struct disk_super *out)
{
	struct rescue r = {.f = f};
	struct volume_geometry g = {.bytes = f->im->bytes};
	struct timespec now;
	uint64_t node, end, most;
	char msg[160];
	int ret;

	r.blocks = f->im->bytes >> BLOCK_SHIFT_MAX;
	ret = first_node(&r, &node);
	if (ret)
		return ret;
	g.block_shift = r.shift;
	if (volume_geometry_check(&g, msg, sizeof(msg)))
		return -ENOENT;
	clock_gettime(CLOCK_REALTIME, &now);
	r.s = (struct disk_super){
		.magic = put64(SUPER_MAGIC),
		.version = put32(FORMAT_VERSION),
		.block_shift = put32(r.shift),
		.blocks = put64(g.bytes >> r.shift),
		.journal_block = put64(HEAD_BYTES >> r.shift),
		.created_ns = put64((uint64_t)now.tv_sec * 1000000000u)};
	if (getrandom(r.s.uuid, sizeof(r.s.uuid), 0) != sizeof(r.s.uuid))
		return -EIO;
	end = HEAD_BYTES + g.journal_bytes;
	most = node < HEAD_BYTES + RING_MAX ? node : HEAD_BYTES + RING_MAX;
	end = most <= end ? most : groups_end(&r, end, most);
	end = end >> r.shift << r.shift;
	r.s.journal_units = put64((end - HEAD_BYTES) / JOURNAL_UNIT);
	*out = r.s;
	return end - HEAD_BYTES < JOURNAL_MIN_UNITS * JOURNAL_UNIT ? -ENOENT : 0;
}

static int rescue_init(struct rescue *r, struct fsck *f, const struct disk_super *from)
{
	int ret;

	r->f = f;
	r->s = *from;
	r->shift = get32(from->block_shift);
	r->blocks = get64(from->blocks);
	memset(r->s.root, 0, sizeof(r->s.root));
	r->s.gen = r->s.tail_unit = r->s.tail_prev = put64(0);
	r->s.durable_seq = put64(0);
	r->s.tail_seq = put64(1);
	ret = ring_survey(r);
	return ret ? ret : build(r);
}

static void rescue_free(struct rescue *r)
{
	if (!r)
		return;
	free(r->groups);
	free(r->space);
	free(r->ride);
	free(r);
}

int rescue_super(struct fsck *f, const struct disk_super *from,
		 struct disk_super *out)
{
	struct rescue *r = calloc(1, sizeof(*r));
	int ret = r ? rescue_init(r, f, from) : -ENOMEM;

	if (!ret) {
		super_distrust_space(&r->s);
		*out = r->s;
	}
	rescue_free(r);
	return ret;
}

bool rescue_finds_more(struct fsck *f, const struct found_node *n, size_t count)
{
	struct rescue *r = calloc(1, sizeof(*r));
	uint64_t items;
	int ret;

	if (!r)
		return false;
	ret = rescue_init(r, f, &f->super);
	items = r->census.items;
	r->census = (struct census){0};
	for (size_t i = 0; !ret && i < count; i++)
		if (n[i].table == TABLE_FILES)
			ret = count_below(r, &n[i].ptr, n[i].level);
	if (!ret)
		ret = items > r->census.items;
	rescue_free(r);
	return ret > 0;
}
