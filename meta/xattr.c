/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Extended attributes, and the targets of symlinks: values cut into pieces,
 * each an item. The first piece of an xattr says how long the value is.
 */
#include "meta/meta_priv.h"

#include <assert.h>
#include <stdio.h>
#include <sys/xattr.h>

static unsigned pieces(size_t len)
{
	return len ? (unsigned)((len + PIECE_BYTES - 1) / PIECE_BYTES) : 1;
}

static int piece_broken(struct volume *v, uint64_t ino, const char *name)
{
	volume_message(v, "inode %llu: broken value of %s",
		       (unsigned long long)ino, name ? name : "its symlink");
	return -EFSCORRUPTED;
}

/* Length of the value that is there; -ENODATA. */
static int xattr_length(struct volume *v, struct inode *ip, const char *name,
			size_t *len, uint8_t *first, size_t *first_len)
{
	uint8_t val[VALUE_MAX];
	struct disk_xattr d;
	struct key k;
	size_t vlen;
	int r;

	if (ip->a.xattrs == 0)
		return -ENODATA;
	key_file_piece(&k, ip->ino, KEY_XATTR, name, 0);
	r = tree_lookup(v, TABLE_FILES, k.b, k.len, val, sizeof(val), &vlen);
	if (r == -ENOENT)
		return -ENODATA;
	if (r)
		return r;
	if (vlen < sizeof(d) || vlen > sizeof(d) + PIECE_BYTES)
		return piece_broken(v, ip->ino, name);
	memcpy(&d, val, sizeof(d));
	*len = get32(d.bytes);
	*first_len = vlen - sizeof(d);
	if (*len > XATTR_VALUE_MAX ||
	    *first_len != (*len < PIECE_BYTES ? *len : PIECE_BYTES))
		return piece_broken(v, ip->ino, name);
	memcpy(first, val + sizeof(d), *first_len);
	return 0;
}

int xattr_get(struct volume *v, struct inode *ip, const char *name, void *buf,
	      size_t *len)
{
	uint8_t first[PIECE_BYTES];
	size_t size = *len, whole, at, got;
	struct key k;
	int r = xattr_length(v, ip, name, &whole, first, &at);

	if (r)
		return r;
	*len = whole;
	if (size == 0)
		return 0;
	if (size < whole)
		return -ERANGE;
	memcpy(buf, first, at);
	for (unsigned i = 1; at < whole; i++, at += got) {
		key_file_piece(&k, ip->ino, KEY_XATTR, name, i);
		r = tree_lookup(v, TABLE_FILES, k.b, k.len, (char *)buf + at,
				whole - at, &got);
		if (r == -ENOENT || (r == 0 && (!got || got > whole - at)))
			return piece_broken(v, ip->ino, name);
		if (r)
			return r;
	}
	return 0;
}

static int pieces_del(struct txn *t, struct inode *ip, const char *name,
		      unsigned from, unsigned to)
{
	struct key k;
	int r = 0;

	for (unsigned i = from; i < to && r == 0; i++) {
		key_file_piece(&k, ip->ino, KEY_XATTR, name, i);
		r = txn_del(t, TABLE_FILES, &k);
	}
	return r;
}

int xattr_set(struct txn *t, struct inode *ip, const char *name,
	      const void *value, size_t len, int flags)
{
	uint8_t val[sizeof(struct disk_xattr) + PIECE_BYTES];
	struct disk_xattr d = {.bytes = put32((uint32_t)len)};
	size_t old = 0, first_len, at = 0;
	struct key k;
	int r = xattr_length(t->v, ip, name, &old, val, &first_len);

	if (r && r != -ENODATA)
		return r;
	if (r == 0 && (flags & XATTR_CREATE))
		return -EEXIST;
	if (r == -ENODATA && (flags & XATTR_REPLACE))
		return -ENODATA;
	if (len > XATTR_VALUE_MAX)
		return -E2BIG;
	if (r == -ENODATA)
		inode_edit(t, ip)->xattrs++;
	else if ((r = pieces_del(t, ip, name, pieces(len), pieces(old))))
		return r;
	r = 0;
	for (unsigned i = 0; i < pieces(len) && r == 0; i++) {
		size_t n = len - at < PIECE_BYTES ? len - at : PIECE_BYTES;
		size_t head = i ? 0 : sizeof(d);

		memcpy(val, &d, head);
		if (n)
			memcpy(val + head, (const char *)value + at, n);
		key_file_piece(&k, ip->ino, KEY_XATTR, name, i);
		r = txn_put(t, TABLE_FILES, &k, val, head + n);
		at += n;
	}
	return r;
}

int xattr_remove(struct txn *t, struct inode *ip, const char *name)
{
	uint8_t first[PIECE_BYTES];
	size_t len, first_len;
	int r = xattr_length(t->v, ip, name, &len, first, &first_len);

	if (r)
		return r;
	inode_edit(t, ip)->xattrs--;
	return pieces_del(t, ip, name, 0, pieces(len));
}

struct names {
	char *buf;
	size_t size, len;
};

static int name_add(void *ctx, const uint8_t *key, size_t klen, const uint8_t *val,
		    size_t vlen)
{
	struct names *n = ctx;
	size_t len = klen - 9 - 2;	/* with its NUL */

	(void)val;
	(void)vlen;
	if (klen < 9 + 2 + 2)
		return -EFSCORRUPTED;
	if (key[klen - 1] || key[klen - 2])
		return 0;		/* not the first piece */
	if (n->size) {
		if (n->len + len > n->size)
			return -ERANGE;
		memcpy(n->buf + n->len, key + 9, len);
	}
	n->len += len;
	return n->len > XATTR_LIST_MAX ? -E2BIG : 0;
}

int xattr_list(struct volume *v, struct inode *ip, char *buf, size_t *len)
{
	struct names n = {.buf = buf, .size = *len};
	struct key lo, hi;
	int r = 0;

	if (ip->a.xattrs) {
		key_file(&lo, ip->ino, KEY_XATTR);
		key_file(&hi, ip->ino, KEY_XATTR + 1);
		r = tree_range(v, TABLE_FILES, &lo, &hi, name_add, &n);
	}
	if (r == 0)
		*len = n.len;
	return r;
}

/* ---- symlinks ------------------------------------------------------------------------- */

int symlink_set(struct txn *t, struct inode *ip, const char *target, size_t len)
{
	struct key k;
	int r = 0;

	inode_edit(t, ip)->size = len;
	for (unsigned i = 0; i < pieces(len) && r == 0; i++) {
		size_t at = (size_t)i * PIECE_BYTES;
		size_t n = len - at < PIECE_BYTES ? len - at : PIECE_BYTES;

		key_file_piece(&k, ip->ino, KEY_SYMLINK, NULL, i);
		r = txn_put(t, TABLE_FILES, &k, target + at, n);
	}
	return r;
}

int symlink_get(struct volume *v, struct inode *ip, char *buf, size_t size,
		size_t *len)
{
	size_t whole = ip->a.size, at = 0, got;
	struct key k;
	int r;

	if (whole >= size)
		return -ERANGE;
	for (unsigned i = 0; at < whole; i++, at += got) {
		key_file_piece(&k, ip->ino, KEY_SYMLINK, NULL, i);
		r = tree_lookup(v, TABLE_FILES, k.b, k.len, buf + at, whole - at,
				&got);
		if (r == -ENOENT || (r == 0 && (!got || got > whole - at)))
			return piece_broken(v, ip->ino, NULL);
		if (r)
			return r;
	}
	buf[whole] = 0;
	*len = whole;
	return 0;
}
