/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * POSIX ACLs. The kernel enforces them; what a file system must do itself is
 * to keep them in step with the mode bits:
 *
 *   a new inode takes its directory's default ACL, masked by the mode it was
 *   asked for, in place of the umask        acl_inherit, acl_inherit_set
 *   chmod changes the access ACL            acl_chmod
 *   setting the access ACL changes the mode acl_to_mode; one that says no
 *                                           more than the mode is not kept
 *
 * They are stored as the xattr interface has them: a version, then entries of
 * tag, permissions, id, little-endian.
 */
#include "fs/fs_priv.h"

#include <stdlib.h>

#define ACL_VERSION 2u
#define ACL_USER_OBJ 0x01u
#define ACL_USER 0x02u
#define ACL_GROUP_OBJ 0x04u
#define ACL_GROUP 0x08u
#define ACL_MASK 0x10u
#define ACL_OTHER 0x20u

struct acl_entry {
	le16 tag;
	le16 perm;
	le32 id;
};

struct acl_header {
	le32 version;
	struct acl_entry e[];
};

/* How many entries, or -EINVAL. */
static int acl_count(const void *value, size_t len)
{
	const struct acl_header *h = value;

	if (len < sizeof(*h) || (len - sizeof(*h)) % sizeof(h->e[0]) ||
	    get32(h->version) != ACL_VERSION)
		return -EINVAL;
	return (int)((len - sizeof(*h)) / sizeof(h->e[0]));
}

int acl_to_mode(const void *value, size_t len, mode_t *mode)
{
	const struct acl_header *h = value;
	int n = acl_count(value, len), more = 0, mask = -1, group = -1;
	mode_t m = 0;

	if (n < 0)
		return n;
	for (int i = 0; i < n; i++) {
		unsigned perm = get16(h->e[i].perm) & 7u;

		switch (get16(h->e[i].tag)) {
		case ACL_USER_OBJ:
			m |= perm << 6;
			break;
		case ACL_GROUP_OBJ:
			group = (int)perm;
			break;
		case ACL_OTHER:
			m |= perm;
			break;
		case ACL_MASK:
			mask = (int)perm;
			more = 1;
			break;
		case ACL_USER:
		case ACL_GROUP:
			more = 1;
			break;
		default:
			return -EINVAL;
		}
	}
	if (group < 0)
		return -EINVAL;
	*mode = m | (mode_t)(mask >= 0 ? mask : group) << 3;
	return more;
}

/*
 * Walk an ACL's classes beside a mode's: each class's permissions become
 * fn(permissions of the ACL, of the mode). Where there is a mask, it stands
 * for the group class and the owning group's entry stays as it is.
 */
static void acl_classes(void *value, int n, unsigned (*fn)(unsigned, unsigned),
			mode_t *mode)
{
	struct acl_header *h = value;
	struct acl_entry *group = NULL, *mask = NULL;
	mode_t m = *mode & 07777 & ~0777u;

	for (int i = 0; i < n; i++) {
		struct acl_entry *e = &h->e[i];
		unsigned shift = 0, p;

		switch (get16(e->tag)) {
		case ACL_USER_OBJ:
			shift = 6;
			break;
		case ACL_OTHER:
			break;
		case ACL_GROUP_OBJ:
			group = e;
			continue;
		case ACL_MASK:
			mask = e;
			continue;
		default:
			continue;
		}
		p = fn(get16(e->perm) & 7u, *mode >> shift & 7u);
		e->perm = put16((uint16_t)p);
		m |= p << shift;
	}
	if (mask)
		group = mask;
	if (group) {
		unsigned p = fn(get16(group->perm) & 7u, *mode >> 3 & 7u);

		group->perm = put16((uint16_t)p);
		m |= p << 3;
	}
	*mode = (*mode & ~07777u) | m;
}

static unsigned both(unsigned acl, unsigned mode) { return acl & mode; }
static unsigned mode_wins(unsigned acl, unsigned mode)
{
	(void)acl;
	return mode;
}

/* The whole value of an xattr into a new buffer; NULL, 0 when there is none. */
static int xattr_load(struct fs *fs, struct inode *ip, const char *name,
		      uint8_t **value, size_t *len)
{
	int err;

	*value = NULL;
	*len = 0;
	if (!ip->a.xattrs)
		return 0;
	err = xattr_get(fs->v, ip, name, NULL, len);
	if (err || !*len) {
		*len = 0;
		return err == -ENODATA ? 0 : err;
	}
	*value = malloc(*len);
	if (!*value)
		return -ENOMEM;
	err = xattr_get(fs->v, ip, name, *value, len);
	if (err) {
		free(*value);
		*value = NULL;
	}
	return err;
}

int acl_inherit(struct fs *fs, struct inode *dir, uint32_t umask, mode_t *mode,
		struct acl_inherit *out)
{
	mode_t same;
	int n, err;

	*out = (struct acl_inherit){0};
	if (S_ISLNK(*mode))
		return 0;
	err = xattr_load(fs, dir, ACL_DEFAULT, &out->dflt, &out->len);
	if (err)
		return err;
	if (!out->dflt) {
		*mode &= ~(mode_t)(umask & 0777);
		return 0;
	}
	n = acl_count(out->dflt, out->len);
	out->own = n < 0 ? NULL : malloc(out->len);
	if (!out->own) {
		acl_inherit_fini(out);
		return n < 0 ? -EUCLEAN : -ENOMEM;
	}
	memcpy(out->own, out->dflt, out->len);
	acl_classes(out->own, n, both, mode);
	out->access = acl_to_mode(out->own, out->len, &same) > 0;
	return 0;
}

int acl_inherit_set(struct txn *t, struct inode *ip, const struct acl_inherit *in)
{
	int err = 0;

	if (in->access)
		err = xattr_set(t, ip, ACL_ACCESS, in->own, in->len, 0);
	if (!err && in->len && S_ISDIR(ip->a.mode))
		err = xattr_set(t, ip, ACL_DEFAULT, in->dflt, in->len, 0);
	return err;
}

void acl_inherit_fini(struct acl_inherit *in)
{
	free(in->dflt);
	free(in->own);
	*in = (struct acl_inherit){0};
}

int acl_chmod(struct txn *t, struct fs *fs, struct inode *ip, mode_t mode)
{
	uint8_t *acl;
	size_t len;
	int n, err = xattr_load(fs, ip, ACL_ACCESS, &acl, &len);

	if (err || !acl)
		return err;
	n = acl_count(acl, len);
	if (n < 0) {
		err = -EUCLEAN;
	} else {
		acl_classes(acl, n, mode_wins, &mode);
		err = xattr_set(t, ip, ACL_ACCESS, acl, len, 0);
	}
	free(acl);
	return err;
}
