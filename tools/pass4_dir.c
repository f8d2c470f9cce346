/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Pass 4, directories: each entry stands there twice, by name and by index.
 * A sum over both kinds tells whether they agree, however large the directory
 * is; the second look finds out which do not. Entries count as links of their
 * inodes, in the table, for passes 5 and 6.
 */
#include "tools/fsck.h"

#include <dirent.h>
#include <string.h>
#include <sys/stat.h>

static uint64_t entry_sum(const char *name, size_t len, uint64_t ino,
			  uint64_t index, uint8_t type)
{
	uint8_t buf[256 + 17];

	memcpy(buf, name, len);
	memcpy(buf + len, &ino, 8);
	memcpy(buf + len + 8, &index, 8);
	buf[len + 16] = type;
	return checksum(buf, len + 17);
}

static int count_link(struct fsck *f, uint64_t dir, uint64_t ino, uint8_t type)
{
	struct ino_rec *r = ino_need(&f->inodes, ino);
	struct dir_rec *d;

	if (!r)
		return -ENOMEM;
	if (r->links && r->entry_type != type)
		r->flags |= INO_TYPE_ODD;
	r->entry_type = type;
	r->links++;
	if (type != DT_DIR)
		return 0;
	d = dir_need(&f->inodes, r);
	if (!d)
		return -ENOMEM;
	/* where there are two, the one that its inode names is the true one */
	if (!d->from || (r->flags & INO_SEEN && d->parent == dir))
		d->from = dir;
	d->last = dir;
	r = ino_need(&f->inodes, dir);
	d = r ? dir_need(&f->inodes, r) : NULL;
	if (!d)
		return -ENOMEM;
	d->subdirs++;
	return 0;
}

const char *name_wrong(const char *name, size_t len)
{
	if (!len)
		return "it is empty";
	if (len > 255)
		return "it is too long";
	if (memchr(name, '/', len))
		return "it holds a slash";
	if (memchr(name, 0, len))
		return "it holds a NUL";
	if (name[0] == '.' && (len == 1 || (len == 2 && name[1] == '.')))
		return "it stands for a directory itself";
	return NULL;
}

int dirent_item(struct fsck *f, struct cur *c, const char *name, size_t len,
		const uint8_t *val, size_t vlen)
{
	struct disk_dirent d;
	const char *why = name_wrong(name, len);

	if (vlen != sizeof(d)) {
		return ITEM_AWAY(f, P_VALUE_FORM, .name = table_name(TABLE_FILES),
				 .ino = c->ino, .what = "an entry");
	}
	memcpy(&d, val, sizeof(d));
	c->entries++;
	if (len <= 255)
		c->entry_sum += entry_sum(name, len, get64(d.ino),
					  get64(d.index), d.type);
	if (why) {
		struct repair r = {.kind = REPAIR_ENTRY_REMOVE,
				   .id = P_NAME_BAD,
				   .a = c->ino,
				   .name = (char *)name,
				   .name_len = (uint16_t)len};

		if (PROBLEM(P_NAME_BAD, .dir = c->ino, .name = name,
			    .name_len = (unsigned)len, .what = why) &&
		    repair_later(f, &r))
			return -ENOMEM;
	}
	return count_link(f, c->ino, get64(d.ino), d.type);
}

int index_item(struct fsck *f, struct cur *c, uint64_t index,
	       const uint8_t *val, size_t vlen)
{
	const size_t head = offsetof(struct disk_index, name);
	const struct disk_index *d = (const void *)val;
	le64 ino;

	if (vlen < head || vlen > head + 255) {
		return ITEM_AWAY(f, P_VALUE_FORM, .name = table_name(TABLE_FILES),
				 .ino = c->ino, .what = "an index");
	}
	memcpy(&ino, &d->ino, sizeof(ino));
	c->indexes++;
	if (index > c->index_max)
		c->index_max = index;
	c->index_sum += entry_sum((const char *)val + head, vlen - head,
				  get64(ino), index,
				  val[offsetof(struct disk_index, type)]);
	(void)f;
	return 0;
}

static int field(struct fsck *f, struct cur *c, enum problem_id id,
		 enum repair_field which, uint64_t is, uint64_t want,
		 uint64_t show)
{
	struct repair r = {.kind = REPAIR_ATTR,
			   .id = id,
			   .ino = c->ino,
			   .a = which,
			   .b = want};

	if (PROBLEM(id, .ino = c->ino, .is = is, .want = show))
		return repair_later(f, &r);
	return 0;
}

int dir_end(struct fsck *f, struct cur *c)
{
	struct ino_rec *r = ino_find(&f->inodes, c->ino);
	int ret = 0;

	if (c->entries != c->indexes || c->entry_sum != c->index_sum) {
		f->inodes.dirs[r->dir - 1].suspect = true;
		f->look_again = true;
	}
	if (c->a.size != c->entries)
		ret = field(f, c, P_DIR_SIZE, FIELD_SIZE, c->a.size, c->entries,
			    c->entries);
	if (!ret && c->indexes && c->a.next_index <= c->index_max)
		ret = field(f, c, P_DIR_NEXT_INDEX, FIELD_NEXT_INDEX,
			    c->a.next_index, c->index_max + 1, c->index_max);
	return ret;
}
