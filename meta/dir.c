/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Directories: each entry is two items of the directory's inode.
 *
 * By name, to find it in one step whatever the size; the name itself is the
 * key, so there are no hash collisions and names that come in order fill
 * their leaves in order. By index, a number that grows with each entry and is
 * never used again: the order of readdir and its cookie. So a cookie stays
 * good whatever comes and goes, no entry is listed twice or missed, and a walk
 * of the directory meets inodes in the order they were made, which is the
 * order they and their data lie in. A new name in the same directory keeps the
 * index, or who renames what it lists would never come to the end.
 */
#include "meta/meta_priv.h"

#include <stdlib.h>

int dir_lookup(struct volume *v, struct inode *dir, const char *name, size_t len,
	       struct dirent_info *out)
{
	struct disk_dirent d;
	struct key k;
	size_t vlen;
	int r;

	key_file_bytes(&k, dir->ino, KEY_DIRENT, name, len);
	r = tree_lookup(v, TABLE_FILES, k.b, k.len, &d, sizeof(d), &vlen);
	if (r)
		return r;
	if (vlen != sizeof(d)) {
		volume_message(v, "directory %llu: entry of %zu bytes",
			       (unsigned long long)dir->ino, vlen);
		return -EFSCORRUPTED;
	}
	*out = (struct dirent_info){get64(d.ino), get64(d.index), d.type};
	return 0;
}

static int entry_put(struct txn *t, struct inode *dir, const char *name, size_t len,
		     uint64_t ino, uint8_t type, uint64_t index)
{
	struct disk_dirent d = {
		.ino = put64(ino), .index = put64(index), .type = type};
	struct {
		struct disk_index d;
		char name[256];
	} i = {.d = {.ino = put64(ino), .type = type}};
	struct key k;
	int r;

	memcpy(i.d.name, name, len);
	key_file_bytes(&k, dir->ino, KEY_DIRENT, name, len);
	r = txn_put(t, TABLE_FILES, &k, &d, sizeof(d));
	if (r)
		return r;
	key_file_num(&k, dir->ino, KEY_INDEX, index);
	return txn_put(t, TABLE_FILES, &k, &i, sizeof(i.d) + len);
}

int dir_add(struct txn *t, struct inode *dir, const char *name, size_t len,
	    uint64_t ino, uint8_t type)
{
	struct attr *a = inode_edit(t, dir);

	a->size++;
	return entry_put(t, dir, name, len, ino, type, a->next_index++);
}

int dir_remove(struct txn *t, struct inode *dir, const char *name, size_t len,
	       const struct dirent_info *e)
{
	struct key k;
	int r;

	inode_edit(t, dir)->size--;
	key_file_bytes(&k, dir->ino, KEY_DIRENT, name, len);
	r = txn_del(t, TABLE_FILES, &k);
	if (r)
		return r;
	key_file_num(&k, dir->ino, KEY_INDEX, e->index);
	return txn_del(t, TABLE_FILES, &k);
}

int dir_replace(struct txn *t, struct inode *dir, const char *name, size_t len,
		const struct dirent_info *e, uint64_t ino, uint8_t type)
{
	return entry_put(t, dir, name, len, ino, type, e->index);
}

int dir_rename(struct txn *t, struct inode *dir, const char *name, size_t len,
	       const struct dirent_info *e, const char *new_name, size_t new_len)
{
	struct key k;
	int r;

	inode_edit(t, dir);
	key_file_bytes(&k, dir->ino, KEY_DIRENT, name, len);
	r = txn_del(t, TABLE_FILES, &k);
	return r ? r : entry_put(t, dir, new_name, new_len, e->ino, e->type,
				 e->index);
}

/* ---- listing ----------------------------------------------------------------------- */

/* A few entries at a time are copied, then told. */
#define BATCH_BYTES 8192u

struct listed {
	struct dirent_info e;
	uint16_t len;
	uint16_t at;		/* of the name in batch.names */
};

struct batch {
	struct volume *v;
	uint64_t dir;
	unsigned count;
	size_t used;
	struct listed entry[128];
	char names[BATCH_BYTES];
};

static int batch_add(void *ctx, const uint8_t *key, size_t klen,
		     const uint8_t *val, size_t vlen)
{
	struct batch *b = ctx;
	struct disk_index d;
	size_t len = vlen - sizeof(d);
	struct listed *l;

	if (klen != 17 || vlen <= sizeof(d) || len > 255)
		return -EFSCORRUPTED;
	if (b->count == sizeof(b->entry) / sizeof(b->entry[0]) ||
	    b->used + len > sizeof(b->names))
		return 1;
	memcpy(&d, val, sizeof(d));
	l = &b->entry[b->count++];
	l->e = (struct dirent_info){get64(d.ino), be64_get(key + 9), d.type};
	l->len = (uint16_t)len;
	l->at = (uint16_t)b->used;
	memcpy(b->names + b->used, val + sizeof(d), len);
	b->used += len;
	return 0;
}

int dir_scan(struct volume *v, struct inode *dir, uint64_t from,
	     int (*fn)(void *ctx, const struct dirent_info *e, const char *name,
		       size_t len),
	     void *ctx)
{
	struct batch *b = malloc(sizeof(*b));
	struct key lo, hi;
	int r = 1, stop = 0;

	if (!b)
		return -ENOMEM;
	b->v = v;
	b->dir = dir->ino;
	while (r == 1 && !stop) {
		b->count = 0;
		b->used = 0;
		key_file_num(&lo, dir->ino, KEY_INDEX, from);
		key_file(&hi, dir->ino, KEY_INDEX + 1);
		r = tree_range(v, TABLE_FILES, &lo, &hi, batch_add, b);
		if (r == -EFSCORRUPTED)
			volume_message(v, "directory %llu: bad entry",
				       (unsigned long long)dir->ino);
		for (unsigned i = 0; i < b->count && !stop && r >= 0; i++) {
			struct listed *l = &b->entry[i];

			from = l->e.index + 1;
			stop = fn(ctx, &l->e, b->names + l->at, l->len);
		}
	}
	free(b);
	return r < 0 ? r : stop;
}
