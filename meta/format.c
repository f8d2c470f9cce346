/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Encode, decode, checksum, verify: the one place that knows disk structures
 * byte by byte. Nothing is believed before its checksum and bounds hold.
 */
#include "meta/meta_priv.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>
#include <time.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

uint64_t checksum(const void *buf, size_t len)
{
	return XXH3_64bits(buf, len);
}

uint64_t random64(void)
{
	uint64_t x = 0;

	while (getrandom(&x, sizeof(x), 0) != sizeof(x))
		;
	return x;
}

uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* ---- superblock ------------------------------------------------------------- */

static int complain(const char **why, const char *what, int err)
{
	if (why)
		*why = what;
	return -err;
}

void super_seal(struct disk_super *s, unsigned slot)
{
	s->slot = put32(slot);
	s->csum = put64(checksum(s, offsetof(struct disk_super, csum)));
}

int super_verify(const struct disk_super *s, unsigned slot, const char **why)
{
	unsigned shift = get32(s->block_shift);
	uint64_t blocks = get64(s->blocks), head, ring, unit_blks;

	if (get64(s->magic) != SUPER_MAGIC)
		return complain(why, "not a Spaceweave superblock", EINVAL);
	if (get64(s->csum) != checksum(s, offsetof(struct disk_super, csum)))
		return complain(why, "checksum does not match", EFSBADCRC);
	if (get32(s->version) != FORMAT_VERSION)
		return complain(why, "unknown version", EPROTONOSUPPORT);
	if (get64(s->incompat) & ~FEATURES_INCOMPAT)
		return complain(why, "unknown incompatible feature",
				EPROTONOSUPPORT);
	if (get32(s->slot) != slot)
		return complain(why, "belongs to another place", EFSCORRUPTED);
	if (shift < BLOCK_SHIFT_MIN || shift > BLOCK_SHIFT_MAX)
		return complain(why, "block size out of range", EFSCORRUPTED);
	if (blocks < VOLUME_MIN_BYTES >> shift || blocks > VOLUME_MAX_BYTES >> shift)
		return complain(why, "volume size out of range", EFSCORRUPTED);
	head = HEAD_BYTES >> shift;
	ring = get64(s->journal_units);
	unit_blks = (ring * JOURNAL_UNIT) >> shift;
	if (ring < JOURNAL_MIN_UNITS || ring > JOURNAL_MAX_UNITS ||
	    ring > blocks << (shift - 12) ||
	    (ring * JOURNAL_UNIT) & ((1u << shift) - 1) ||
	    get64(s->journal_block) < head ||
	    get64(s->journal_block) > blocks - 1 - unit_blks)
		return complain(why, "journal out of range", EFSCORRUPTED);
	if (get64(s->next_ino) < FIRST_INO || get64(s->next_ino) > INO_MAX + 1)
		return complain(why, "next inode number out of range",
				EFSCORRUPTED);
	if (get64(s->free_blks) > blocks)
		return complain(why, "free count exceeds the volume",
				EFSCORRUPTED);
	for (unsigned i = 0; i < TABLES; i++)
		if (get64(s->root[i].ptr.block) >= blocks ||
		    get32(s->root[i].level) >= TREE_LEVELS)
			return complain(why, "root out of range", EFSCORRUPTED);
	return 0;
}

/* *unread: a slot cannot be read. */
static int super_pick(struct image *im, struct disk_super *out, unsigned *slot,
		      bool *unread, char *msg, size_t msg_len)
{
	struct disk_super s;
	const char *why = "", *first = NULL;
	int err = -EINVAL, r;
	bool found = false;

	*unread = false;
	for (unsigned i = 0; i < SUPER_SLOTS; i++) {
		r = im->bytes < SUPER_SLOT_OFFSET(i) + SUPER_BYTES
			    ? complain(&why, "the image is too small", EINVAL)
			    : image_pread(im, &s, sizeof(s), SUPER_SLOT_OFFSET(i));
		if (r == 0)
			r = super_verify(&s, i, &why);
		*unread |= r == -EIO;
		if (r) {
			/* The more telling of two failures. */
			if (!first || (err == -EINVAL && r != -EINVAL)) {
				err = r;
				first = r == -EIO ? "cannot be read" : why;
			}
			continue;
		}
		if (found && get64(s.gen) <= get64(out->gen))
			continue;
		*out = s;
		*slot = i;
		found = true;
	}
	if (found)
		return 0;
	if (err == -EINVAL)
		snprintf(msg, msg_len, "not a Spaceweave volume");
	else
		snprintf(msg, msg_len, "superblock: %s", first);
	return err;
}

int super_load(struct image *im, struct disk_super *out, unsigned *slot,
	       char *msg, size_t msg_len)
{
	bool unread;

	return super_pick(im, out, slot, &unread, msg, msg_len);
}

/* The head, and what of a host's largest pages may lie beyond it: a part of one is
 * not forgotten. */
#define HEAD_FORGET_BYTES (4u << 20)

int super_settle(struct image *im)
{
	struct disk_super s;
	char msg[128];
	unsigned slot;
	int r = image_flush(im);

	if (r == 0) {
		image_forget(im, 0, HEAD_FORGET_BYTES);
		if (super_load(im, &s, &slot, msg, sizeof(msg)) == 0 &&
		    get32(s.flags) & SUPER_CLEAN)
			return 0;
	}
	image_forget(im, 0, im->bytes);
	return r;
}

int super_load_to_write(struct image *im, struct disk_super *out, unsigned *slot,
			char *msg, size_t msg_len)
{
	bool unread;
	int r = super_pick(im, out, slot, &unread, msg, msg_len);

	if (r || !unread)
		return r;
	snprintf(msg, msg_len, "superblock: slot %u cannot be read, and may be "
		 "the newer one", 1 - *slot);
	return -EIO;
}

/* ---- inodes -------------------------------------------------------------------- */

static struct time_ns time_decode(const struct disk_time *d)
{
	uint32_t ns = get32(d->nsec);

	return (struct time_ns){(int64_t)get64(d->sec), ns < 1000000000u ? ns : 0};
}

static struct disk_time time_encode(const struct time_ns *t)
{
	return (struct disk_time){.sec = put64((uint64_t)t->sec),
				  .nsec = put32(t->nsec)};
}

void attr_decode(const struct disk_inode *d, struct attr *a)
{
	a->mode = get32(d->mode);
	a->nlink = get32(d->nlink);
	a->uid = get32(d->uid);
	a->gid = get32(d->gid);
	a->flags = get32(d->flags);
	a->rdev = get32(d->rdev);
	a->projid = get32(d->projid);
	a->xattrs = get32(d->xattrs);
	a->size = get64(d->size);
	a->blks = get64(d->blks);
	a->parent = get64(d->parent);
	a->next_index = get64(d->next_index);
	a->atime = time_decode(&d->atime);
	a->mtime = time_decode(&d->mtime);
	a->ctime = time_decode(&d->ctime);
	a->btime = time_decode(&d->btime);
}

void attr_encode(const struct attr *a, struct disk_inode *d)
{
	d->mode = put32(a->mode);
	d->nlink = put32(a->nlink);
	d->uid = put32(a->uid);
	d->gid = put32(a->gid);
	d->flags = put32(a->flags);
	d->rdev = put32(a->rdev);
	d->projid = put32(a->projid);
	d->xattrs = put32(a->xattrs);
	d->size = put64(a->size);
	d->blks = put64(a->blks);
	d->parent = put64(a->parent);
	d->next_index = put64(a->next_index);
	d->atime = time_encode(&a->atime);
	d->mtime = time_encode(&a->mtime);
	d->ctime = time_encode(&a->ctime);
	d->btime = time_encode(&a->btime);
}

/* ---- keys --------------------------------------------------------------------------- */

void key_file(struct key *k, uint64_t ino, enum file_key type)
{
	be64_put(k->b, ino);
	k->b[8] = (uint8_t)type;
	k->len = 9;
}

void key_file_num(struct key *k, uint64_t ino, enum file_key type, uint64_t num)
{
	key_file(k, ino, type);
	be64_put(k->b + 9, num);
	k->len = 17;
}

void key_file_bytes(struct key *k, uint64_t ino, enum file_key type,
		    const void *b, size_t len)
{
	key_file(k, ino, type);
	memcpy(k->b + 9, b, len);
	k->len = (uint16_t)(9 + len);
}

/* `name` NULL: the piece alone. */
void key_file_piece(struct key *k, uint64_t ino, enum file_key type,
		    const char *name, unsigned piece)
{
	key_file(k, ino, type);
	if (name) {
		size_t len = strlen(name) + 1;

		memcpy(k->b + k->len, name, len);
		k->len = (uint16_t)(k->len + len);
	}
	k->b[k->len++] = (uint8_t)(piece >> 8);
	k->b[k->len++] = (uint8_t)piece;
}

void key_refs(struct key *k, enum refs_key type, uint64_t num)
{
	k->b[0] = (uint8_t)type;
	be64_put(k->b + 1, num);
	k->len = 9;
}

void key_space(struct key *k, uint64_t index)
{
	be64_put(k->b, index);
	k->len = 8;
}

/* ---- nodes ----------------------------------------------------------------------------- */

void node_seal(struct disk_node *d, size_t block_bytes)
{
	d->csum = put64(0);
	d->csum = put64(checksum(d, block_bytes));
}

static uint64_t node_sum(const struct disk_node *d, size_t block_bytes)
{
	static const uint64_t zero;
	XXH3_state_t st;

	XXH3_64bits_reset(&st);
	XXH3_64bits_update(&st, d, offsetof(struct disk_node, csum));
	XXH3_64bits_update(&st, &zero, 8);
	XXH3_64bits_update(&st, (const char *)d + offsetof(struct disk_node, self),
			   block_bytes - offsetof(struct disk_node, self));
	return XXH3_64bits_digest(&st);
}

static const uint8_t *node_bytes(const struct disk_node *d, unsigned i,
				 struct disk_item *item)
{
	const le16 *slots = (const le16 *)(d + 1);
	const uint8_t *at = (const uint8_t *)d + get16(slots[i]);

	memcpy(item, at, sizeof(*item));
	return at + sizeof(*item);
}

static int node_verify_items(const struct disk_node *d, size_t block_bytes,
			     unsigned heap, const char **why)
{
	const le16 *slots = (const le16 *)(d + 1);
	unsigned count = get16(d->count), used = 0;
	const uint8_t *prev = NULL;
	unsigned prev_len = 0;

	for (unsigned i = 0; i < count; i++) {
		unsigned at = get16(slots[i]), klen, vlen;
		struct disk_item item;
		const uint8_t *key;
		int c;

		if (at < heap || at + sizeof(item) > block_bytes)
			return complain(why, "item out of bounds", EFSCORRUPTED);
		key = node_bytes(d, i, &item);
		klen = get16(item.klen);
		vlen = get16(item.vlen);
		if (klen > KEY_MAX || vlen > VALUE_MAX ||
		    at + sizeof(item) + klen + vlen > block_bytes)
			return complain(why, "item too long", EFSCORRUPTED);
		if (d->level && vlen != sizeof(struct disk_ptr))
			return complain(why, "bad pointer", EFSCORRUPTED);
		used += (unsigned)sizeof(item) + klen + vlen;
		if (prev) {
			c = memcmp(prev, key, prev_len < klen ? prev_len : klen);
			if (c > 0 || (c == 0 && prev_len >= klen))
				return complain(why, "keys out of order",
						EFSCORRUPTED);
		}
		prev = key;
		prev_len = klen;
	}
	if (used + get16(d->garbage) != block_bytes - heap)
		return complain(why, "items overlap", EFSCORRUPTED);
	return 0;
}

int node_verify(const struct disk_node *d, size_t block_bytes, enum table table,
		unsigned level, const struct ptr *self, const char **why)
{
	unsigned count = get16(d->count), heap = get16(d->heap);
	struct ptr p = ptr_get(&d->self);

	if (heap == 0)
		heap = 65536;
	if (get32(d->magic) != NODE_MAGIC)
		return complain(why, "no node", EFSBADCRC);
	if (get64(d->csum) != node_sum(d, block_bytes))
		return complain(why, "checksum does not match", EFSBADCRC);
	if (p.block != self->block || p.stamp != self->stamp ||
	    p.birth != self->birth)
		return complain(why, "another node, or an older one",
				EFSCORRUPTED);
	if (d->table != table || d->level != level)
		return complain(why, "wrong table or level", EFSCORRUPTED);
	if (heap > block_bytes || sizeof(*d) + count * sizeof(le16) > heap)
		return complain(why, "header out of bounds", EFSCORRUPTED);
	if (level && count == 0)
		return complain(why, "empty", EFSCORRUPTED);
	return node_verify_items(d, block_bytes, heap, why);
}
