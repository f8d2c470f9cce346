/* SPDX-License-Identifier: BSD-2-Clause */

/*
 * fsck.spaceweave on an image that fails: each read, write, flush and allocation
 * of memory, once or from then on, while it checks and while it repairs; and the
 * power cut anywhere in a repair. Whatever happens,
 *   - checking writes nothing, and calls nothing clean that is not;
 *   - what it says it has repaired is repaired;
 *   - what was interrupted can be repaired by the next run, and no file is lost
 *     by it that an undisturbed repair keeps;
 *   - what can be read afterwards is what was written.
 *
 *   STATES=n   at most so many runs of a kind, spread evenly; 0: all
 *   CASE=c KIND=k INDEX=n MODE=m   this run alone, with what it says
 */

#include "meta/meta.h"
#include "meta/repair.h"
#include "tests/fault.h"
#include "tests/fsck/call.h"
#include "tests/group.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define BYTES (4u << 20)
#define MEMORY FAULT_CALLS	/* as a kind of failure */

/* Volumes with something of everything in it (tests/fsck/damage.c), and broken. */
static const struct broken {
	const char *name, *damage;
	bool sound;		/* nothing is wrong with it */
	const char *first;	/* done before what is read is noted; NULL: it is not */
	enum {
		SOME,		/* something is lost */
		ALL,		/* nothing is, to the last item */
		ALL_IN_PEACE,	/* unless the repair is disturbed */
	} keeps;
} cases[] = {
	{.name = "whole", .damage = "", .sound = true},
	{.name = "not closed", .damage = "dirty 3", .sound = true},
	{.name = "entries",
	 .damage = "index-del / file; dirent / hard2 type 4;"
		   "dirent-put /dir again /dir/sub/end 4; dirent-del /dir sub;"
		   " dirent-del / dir;dirent-put / none 999 8;"
		   " index / link name other"},
	{.name = "inodes",
	 .damage = "inode /file size +5; inode /file mode 0; inode /sparse blks 7;"
		   "inode /fifo rdev 3; inode /dir nlink 9; inode-del /shared1;"
		   "xattr-del /xattrs user.big 1; orphan 777; intent /file 5 5;"
		   "inode /hard1 nlink 0"},
	{.name = "space",
	 .damage = "claim-free 20; release /file 0; super new free +3;"
		   "super new next_ino 20; super new inodes 1"},
	{.name = "shared", .damage = "ref-of /shared1 0 1 7; map-copy /file 0 /prealloc 40"},
	{.name = "bitmap lost", .damage = "bitmap 0"},
	{.name = "leaf lost", .damage = "dirty 3; node 0 0 1"},
	{.name = "leaf lost that the journal wants", .damage = "dirty 3; node 0 0 0"},
	{.name = "references lost", .damage = "node 1 0 0"},
	{.name = "superblocks lost", .damage = "dirty 3; super 0 spoil; super 1 spoil"},
	{.name = "newest superblock lost", .damage = "dirty 3; super new spoil"},
	{.name = "older superblock and backups", .damage = "super old spoil; super 2 spoil; super 3 uuid"},
	{.name = "journal damaged", .damage = "dirty 4; group 1"},
	{.name = "root lost", .damage = "node 0 1 0",
	 .first = "many 300; dirty 3", .keeps = ALL},
	{.name = "root and inner nodes lost", .damage = "node 0 1 0; node 0 1 1; node 0 2 0",
	 .first = "many 2000", .keeps = ALL},
	{.name = "inner nodes and a bitmap lost", .damage = "bitmap 0; node 0 1 1; node 0 2 0",
	 .first = "twice 20 5; many 2000", .keeps = ALL},
	{.name = "neighbours lost below a lost root",
	 .damage = "node 0 0 40; node 0 0 41; node 0 1 0; node 0 1 1; node 0 2 0",
	 .first = "many 2000", .keeps = SOME},
	{.name = "root and a leaf lost", .damage = "node 0 0 3; node 0 1 0",
	 .first = "scatter /scatter 99", .keeps = SOME},
	{.name = "leaf of a map lost", .damage = "node 0 0 last",
	 .first = "scatter /scatter 300", .keeps = SOME},
	{.name = "a run that makes no sense", .damage = "map /scatter 6 len 0; map /scatter 10 start 2",
	 .first = "scatter /scatter 20", .keeps = SOME},
	/* over which a repair may write */
	{.name = "leaf lost that the older tree has", .damage = "node 0 0 last",
	 .first = "twice 20 5", .keeps = ALL_IN_PEACE},
	{.name = "leaves in each other's place", .damage = "child-swap 0 1 3",
	 .first = "many 300", .keeps = ALL},
	{.name = "all superblocks lost",
	 .damage = "super 0 spoil; super 1 spoil; super 2 spoil; super 3 spoil",
	 .first = "scatter /scatter 20; dirty 3", .keeps = ALL},
	{.name = "superblocks and a leaf lost", .damage = "node 0 0 2; super 0 spoil; super 1 spoil",
	 .first = "scatter /scatter 300", .keeps = SOME},
	{.name = "tree of the bitmaps lost", .damage = "node 2 0 0",
	 .first = "dirty 3", .keeps = ALL},
};

#define CASES (sizeof(cases) / sizeof(cases[0]))

static struct fault *base[CASES];	/* each of these */
static struct fault *disk;		/* what fsck is given */

/* ---- the program as a function ------------------------------------------------- */

static char *said;
static size_t said_len;

/* Its exit status; what it says on both channels is in `said`. */
static int fsck(const char *options)
{
	FILE *out = stdout, *err = stderr;
	int ret;

	free(said);
	said = NULL;
	stdout = stderr = open_memstream(&said, &said_len);
	ret = fsck_call(fault_image(disk), options);
	fclose(stdout);
	stdout = out;
	stderr = err;
	return ret;
}

/* ---- what there is to lose -------------------------------------------------------- */

struct files {
	uint64_t ino[3000];
	unsigned count;
};

static int note_file(void *ctx, enum table t, const uint8_t *key, size_t klen,
		     const uint8_t *val, size_t vlen)
{
	struct files *n = ctx;
	struct disk_dirent d;

	(void)t;
	if (klen <= 9 || key[8] != KEY_DIRENT || vlen != sizeof(d) || n->count == 3000)
		return 0;
	if (klen == 19 && !memcmp(key + 9, "lost+found", 10))
		return 0;
	memcpy(&d, val, sizeof(d));
	n->ino[n->count++] = get64(d.ino);
	return 0;
}

/* Every inode that has a name, be it in lost+found. */
static int files_load(struct files *n)
{
	struct volume_options opt = {.readonly = true, .no_threads = true};
	struct walk w = {.ctx = n, .item = note_file};
	struct volume *v;
	char msg[200];
	int ret = volume_open(fault_image(disk), &opt, &v, msg, sizeof(msg));

	n->count = 0;
	if (ret)
		return ret;
	ret = volume_walk(v, TABLE_FILES, &w);
	volume_close(v);
	return ret;
}

static bool has_file(const struct files *n, uint64_t ino)
{
	for (unsigned i = 0; i < n->count; i++)
		if (n->ino[i] == ino)
			return true;
	return false;
}

static struct files kept[CASES];	/* by an undisturbed repair */

/* ---- what is in it ------------------------------------------------------------------ */

struct contents {
	uint64_t digest;		/* of all items */
	struct {
		uint64_t ino, blk, hash;
	} v[4000];
	unsigned count;
	uint64_t ino[3000];		/* of regular files */
	uint64_t size[3000];
	unsigned files;
};

static struct contents written[CASES];	/* of those with something done first */

static int note_item(void *ctx, enum table t, const uint8_t *key, size_t klen,
		     const uint8_t *val, size_t vlen)
{
	struct contents *c = ctx;
	uint64_t all[3] = {c->digest, checksum(key, klen), checksum(val, vlen)};
	struct disk_inode d;

	(void)t;
	c->digest = checksum(all, sizeof(all));
	if (klen != 9 || key[8] != KEY_INODE || vlen != sizeof(d))
		return 0;
	memcpy(&d, val, sizeof(d));
	if (get32(d.mode) >> 12 != 8)
		return 0;
	assert_true(c->files < sizeof(c->ino) / sizeof(c->ino[0]));
	c->ino[c->files] = be64_get(key);
	c->size[c->files++] = get64(d.size);
	return 0;
}

static void read_file(struct volume *v, struct contents *c, uint64_t ino, uint64_t size)
{
	static uint8_t buf[4096];
	struct inode *ip;

	assert_int_equal(inode_get(v, ino, &ip), 0);
	rwlock_read(&ip->lock);
	for (uint64_t blk = 0; blk * sizeof(buf) < size; blk++) {
		int err = map_read(v, ip, blk, 1, buf);

		assert_true(!err || err == -EBADMSG || err == -EUCLEAN);
		if (err)
			continue;
		assert_true(c->count < sizeof(c->v) / sizeof(c->v[0]));
		c->v[c->count].ino = ino;
		c->v[c->count].blk = blk;
		c->v[c->count++].hash = checksum(buf, sizeof(buf));
	}
	rwlock_unlock(&ip->lock);
	inode_put(v, ip);
}

static void quiet(void *ctx, const char *text)
{
	(void)ctx, (void)text;
}

/* Every block that can be read. */
static void contents_load(struct fault *f, struct contents *c)
{
	struct volume_options opt = {.readonly = true, .no_threads = true,
				     .message = quiet};
	struct walk w = {.ctx = c, .item = note_item};
	struct volume *v;
	char msg[200];

	c->digest = c->count = c->files = 0;
	assert_int_equal(volume_open(fault_image(f), &opt, &v, msg, sizeof(msg)), 0);
	assert_int_equal(volume_walk(v, TABLE_FILES, &w), 0);
	for (unsigned i = 0; i < c->files; i++)
		read_file(v, c, c->ino[i], c->size[i]);
	volume_close(v);
}

static bool was_read(const struct contents *c, uint64_t ino, uint64_t blk,
		     uint64_t hash)
{
	for (unsigned i = 0; i < c->count; i++)
		if (c->v[i].ino == ino && c->v[i].blk == blk)
			return c->v[i].hash == hash;
	return false;
}
static char repro[200];

static void wrong(const char *what, int status)
{
	char *text = said;

	said = NULL;
	print_message("%s\nsaid:\n%s", repro, text ? text : "");
	free(text);
	fail_msg("%s (status %d); again: %s", what, status, repro);
}

static void nothing_is_wrong(unsigned c, bool disturbed)
{
	static struct contents now;
	const struct broken *b = &cases[c];

	if (!b->first)
		return;
	contents_load(disk, &now);
	if (b->keeps != SOME && !(b->keeps == ALL_IN_PEACE && disturbed) &&
	    now.digest != written[c].digest)
		wrong("not all is there", 0);
	for (unsigned i = 0; i < now.count; i++)
		if (!was_read(&written[c], now.v[i].ino, now.v[i].blk, now.v[i].hash))
			wrong("what is read was not written", (int)now.v[i].ino);
}

/* Nothing fails any more: the next run repairs what is left. */
static void comes_right(unsigned c, bool disturbed)
{
	struct files now;
	int status = fsck("-fy");

	if (status & ~1)
		wrong("not repaired by the next run", status);
	status = fsck("-fn");
	if (status)
		wrong("the next run leaves errors", status);
	status = files_load(&now);
	if (status)
		wrong("does not open after a repair", status);
	for (unsigned i = 0; i < kept[c].count; i++)
		if (!has_file(&now, kept[c].ino[i]) && cases[c].keeps != ALL_IN_PEACE)
			wrong("a file is lost that need not be", 0);
	nothing_is_wrong(c, disturbed);
}

/* ---- making them ------------------------------------------------------------------- */

static void run_damage(const char *dir, const char *image, const char *command)
{
	char line[1200];

	snprintf(line, sizeof(line), "'%s/fsck/damage' '%s' %s", dir, image, command);
	if (system(line))
		fail_msg("%s", line);
}

static void run_damages(const char *dir, const char *image, const char *list)
{
	char commands[500], *save = NULL;

	snprintf(commands, sizeof(commands), "%s", list);
	for (char *one = strtok_r(commands, ";", &save); one;
	     one = strtok_r(NULL, ";", &save))
		run_damage(dir, image, one);
}

static struct fault *load(const char *image)
{
	struct fault *f = fault_create(BYTES);
	static uint8_t buf[BYTES];
	int fd = open(image, O_RDONLY);

	assert_true(fd >= 0 && pread(fd, buf, BYTES, 0) == (ssize_t)BYTES);
	close(fd);
	for (size_t at = 0; at < BYTES; at += FAULT_PAGE) {
		static const uint8_t none[FAULT_PAGE];

		if (memcmp(buf + at, none, FAULT_PAGE))
			fault_poke(f, buf + at, FAULT_PAGE, at);
	}
	return f;
}

static int make_all(void **state)
{
	struct volume_geometry g = {.bytes = BYTES, .label = "test"};
	const char *tmp = getenv("TMPDIR");
	char image[300], self[300], *slash;
	ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
	struct image *im;
	int fd;

	(void)state;
	assert_true(n > 0);
	self[n] = 0;
	slash = strrchr(self, '/');
	*slash = 0;
	snprintf(image, sizeof(image), "%s/spaceweave-fsck.XXXXXX",
		 tmp ? tmp : access("/dev/shm", W_OK) ? "/var/tmp" : "/dev/shm");
	fd = mkstemp(image);
	assert_true(fd >= 0);
	for (unsigned c = 0; c < CASES; c++) {
		assert_int_equal(ftruncate(fd, 0), 0);
		assert_int_equal(ftruncate(fd, BYTES), 0);
		assert_int_equal(image_open(image, IMAGE_WRITE, &im), 0);
		assert_int_equal(volume_format(im, &g), 0);
		image_close(im);
		run_damage(self, image, "make");
		if (cases[c].first) {
			run_damages(self, image, cases[c].first);
			base[c] = load(image);
			contents_load(base[c], &written[c]);
			fault_destroy(base[c]);
		}
		run_damages(self, image, cases[c].damage);
		base[c] = load(image);
	}
	close(fd);
	unlink(image);
	disk = fault_create(BYTES);
	return 0;
}

/* ---- undisturbed -------------------------------------------------------------------- */

static void what_is_broken_is_found_and_repaired(void **state)
{
	(void)state;
	for (unsigned c = 0; c < CASES; c++) {
		int status;

		snprintf(repro, sizeof(repro), "test_fsck: '%s'", cases[c].name);
		fault_fork(disk, base[c]);
		fault_freeze(disk, true);
		status = fsck("-fcn");
		if (status != (cases[c].sound ? 0 : 4))
			wrong("-n", status);
		fault_freeze(disk, false);
		status = fsck("-fy");
		if (status != (cases[c].sound ? 0 : 1))
			wrong("-y", status);
		status = files_load(&kept[c]);
		assert_int_equal(status, 0);
		assert_true(kept[c].count > 200 || c == 7 || c == 8 ||
			    cases[c].keeps == SOME);
		comes_right(c, false);
	}
}

/* ---- in use before anybody has checked ------------------------------------------------ */

static char told[1000];

static void note(void *ctx, const char *text)
{
	(void)ctx;
	snprintf(told + strlen(told), sizeof(told) - strlen(told), "%s\n", text);
}

static int open_broken(const char *name, struct volume **v)
{
	struct volume_options opt = {.no_threads = true, .message = note};
	char msg[200];
	unsigned c = 0;

	while (strcmp(cases[c].name, name))
		c++;
	fault_fork(disk, base[c]);
	told[0] = 0;
	return volume_open(fault_image(disk), &opt, v, msg, sizeof(msg));
}

static void told_of(const char *what)
{
	if (!strstr(told, what))
		fail_msg("'%s', not '%s'", told, what);
}

/* A bitmap is needed at once: a volume without does not open for writing. */
static void a_spoilt_bitmap_is_named(void **state)
{
	struct disk_super was, after;
	unsigned slot, slot_after;
	struct volume *v;
	char msg[100];

	(void)state;
	assert_int_equal(open_broken("bitmap lost", &v), -EBADMSG);
	told_of("bitmap 0 at block ");
	told_of("checksum does not match");
	assert_int_equal(super_load(fault_image(disk), &after, &slot_after, msg,
				    sizeof(msg)), 0);
	fault_fork(disk, base[6]);
	assert_int_equal(super_load(fault_image(disk), &was, &slot, msg, sizeof(msg)),
			 0);
	assert_int_equal(slot, slot_after);
	assert_memory_equal(&was, &after, sizeof(was));
}

/* A file holds a block that is free in the bitmap: it is not freed once more. */
static void a_block_that_is_free_already_is_not_freed(void **state)
{
	struct dirent_info e;
	struct inode *root, *ip;
	struct volume *v;
	struct txn *t;

	(void)state;
	assert_int_equal(open_broken("space", &v), 0);
	assert_int_equal(inode_get(v, ROOT_INO, &root), 0);
	assert_int_equal(dir_lookup(v, root, "file", 4, &e), 0);
	inode_put(v, root);
	assert_int_equal(inode_get(v, e.ino, &ip), 0);
	rwlock_write(&ip->lock);
	assert_int_equal(txn_begin(v, TXN_FREEING, &t), 0);
	assert_int_equal(map_cut(t, ip, 0, UINT64_MAX), -EUCLEAN);
	txn_abort(t);
	rwlock_unlock(&ip->lock);
	inode_put(v, ip);
	told_of("are freed but not in use");
	assert_int_equal(volume_close(v), 0);
}

/* ---- found, and repaired ---------------------------------------------------------------- */

static void check_and_repair(const char *want, const char *options)
{
	int status = fsck("-fn");

	if (status != 4 || !strstr(said, want))
		wrong("not found", status);
	status = fsck(options);
	if (status != 1)
		wrong("not repaired", status);
	status = fsck("-fn");
	if (status)
		wrong("not repaired for good", status);
}

/* What never changes says which copy is to be believed. */
static void copies_of_the_superblock_are_compared(void **state)
{
	static const struct {
		const char *what;
		size_t at;
		uint64_t add;
	} fields[] = {
#define AT(field) offsetof(struct disk_super, field)
		{"UUID", AT(uuid), 1},
		{"label", AT(label), 1},
		{"features", AT(compat), 1},
		{"features", AT(ro_compat), 1},
		{"block size", AT(block_shift), 1},
		{"size", AT(blocks), 1},
		{"journal", AT(journal_block), 1},
		{"journal", AT(journal_units), 1},
		{"time of creation", AT(created_ns), 1},
#undef AT
	};
	struct disk_super s;
	unsigned newest;
	char msg[100], want[100];

	(void)state;
	for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++)
		for (unsigned copy = 0; copy < 2; copy++) {
			uint64_t off = BACKUP_OFFSET;
			unsigned slot = 2;
			le64 value;

			fault_fork(disk, base[0]);
			assert_int_equal(super_load(fault_image(disk), &s, &newest, msg,
						    sizeof(msg)), 0);
			if (copy == 0) {
				slot = 1 - newest;
				off = SUPER_SLOT_OFFSET(slot);
			}
			fault_peek(disk, &s, sizeof(s), off);
			memcpy(&value, (char *)&s + fields[i].at, sizeof(value));
			value = put64(get64(value) + fields[i].add);
			memcpy((char *)&s + fields[i].at, &value, sizeof(value));
			super_seal(&s, slot);
			fault_poke(disk, &s, sizeof(s), off);
			snprintf(want, sizeof(want), "superblock %u disagrees with the "
				 "%s: %s\n", slot, slot == 2 ? "superblock" : "newer one",
				 fields[i].what);
			snprintf(repro, sizeof(repro), "superblock %u, %s", slot,
				 fields[i].what);
			check_and_repair(want, "-fp");
		}
}

/* It may be of a writer that was out of its mind, but torn it is not. */
static void a_group_that_makes_no_sense_is_named_and_cut_off(void **state)
{
	struct volume_geometry g = {.bytes = 2u << 20};
	struct fault *f = fault_create(g.bytes);

	(void)state;
	assert_int_equal(volume_format(fault_image(f), &g), 0);
	for (unsigned i = 0; i < GROUP_ITEMS + 2; i++) {
		bool odd = i >= GROUP_ITEMS;	/* bytes left over, an item lacking */
		const struct group_item *it = &group_items[odd ? 0 : i];
		char want[200];
		uint64_t seq;

		if (!odd && !it->wrong)
			continue;
		fault_fork(disk, f);
		seq = group_append(disk, it, true, i == GROUP_ITEMS,
				   1 + (i == GROUP_ITEMS + 1));
		snprintf(want, sizeof(want), "J03 journal group %" PRIu64 " holds an item "
			 "that makes no sense: %s\n", seq, it->wrong ? it->wrong :
			 i == GROUP_ITEMS ? "bytes are left over" : "it is cut off");
		snprintf(repro, sizeof(repro), "group: %s", it->name);
		check_and_repair(want, "-fy");
	}
	fault_destroy(f);
}

/* ---- each call fails ------------------------------------------------------------------ */

static const char *const kinds[] = {"reading", "writing", "flushing", "discarding",
				    "ensuring", "memory"};

/* One run, and whether anything has failed in it. */
static int run(unsigned c, unsigned kind, uint64_t index, bool for_ever,
	       const char *options, bool *failed)
{
	int status;

	snprintf(repro, sizeof(repro), "CASE=%u KIND=%u INDEX=%" PRIu64 " MODE=%d: "
		 "fsck %s of '%s', %s fails", c, kind, index, for_ever, options,
		 cases[c].name, kinds[kind]);
	fault_fork(disk, base[c]);
	if (kind == MEMORY)
		fault_memory(index, for_ever);
	else
		fault_fail(disk, kind, index, EIO, for_ever, false);
	status = fsck(options);
	*failed = fault_failures(disk) ||
		  (kind == MEMORY && fault_memory(UINT64_MAX, false) > index);
	fault_memory(UINT64_MAX, false);
	fault_fail(disk, FAULT_READ, 0, 0, false, false);
	if (getenv("INDEX"))
		print_message("%s\n%sstatus %d\n", repro, said, status);
	if (status & ~(1 | 4 | 8) || status < 0)
		wrong("an exit status that there is not", status);
	return status;
}

static void check(unsigned c, unsigned kind, uint64_t index, bool for_ever)
{
	bool failed;
	int status = run(c, kind, index, for_ever, "-fcn", &failed);

	if (fault_count(disk, FAULT_WRITE) || fault_count(disk, FAULT_DISCARD))
		wrong("checking writes", status);
	if (!status && !cases[c].sound)
		wrong("called clean, and is not", status);
	/* memory may be wanted for speed alone */
	if (!status && failed && for_ever && kind != MEMORY)
		wrong("called clean, and was not looked at", status);
	if (status & 1)
		wrong("checking corrects", status);
}

static void repair(unsigned c, unsigned kind, uint64_t index, bool for_ever)
{
	bool failed;
	int status = run(c, kind, index, for_ever, "-fy", &failed);

	if (!(status & ~1)) {
		int now = fsck("-fn");

		if (now)
			wrong("said to be repaired, and is not", now);
	}
	comes_right(c, true);
}

/* How many calls of a kind there are when nothing fails. */
static uint64_t calls(unsigned c, unsigned kind, const char *options)
{
	fault_fork(disk, base[c]);
	fault_memory(UINT64_MAX, false);
	fsck(options);
	return kind == MEMORY ? fault_memory(UINT64_MAX, false)
			      : fault_count(disk, kind);
}

static void sweep(unsigned kind, bool repairs)
{
	struct effort e = effort_begin(40 * CASES, 2);
	uint64_t runs = 0, parts = e.states / CASES + 1;

	if (getenv("INDEX")) {
		if (env_u64("KIND", 0) == kind)
			(repairs ? repair : check)((unsigned)env_u64("CASE", 0), kind,
						   env_u64("INDEX", 0),
						   env_u64("MODE", 0));
		return;
	}
	/* Coarse first, then finer: a slow machine sees of each case a part. */
	for (uint64_t part = 0; part < parts; part++)
		for (unsigned c = 0; c < CASES; c++) {
			uint64_t n = calls(c, kind, repairs ? "-fy" : "-fcn");
			uint64_t from = n * part / parts;
			uint64_t to = e.states ? from + (n > part) : n;

			for (uint64_t i = from; i < to; i++) {
				if (e.until_ns && effort_spent(&e, 0))
					goto out;
				(repairs ? repair : check)(c, kind, i, i & 1);
				if (!e.states)
					(repairs ? repair : check)(c, kind, i,
								   !(i & 1));
				runs++;
			}
		}
out:
	print_message("%" PRIu64 " runs\n", runs);
}

static void a_failing_read_is_never_called_clean(void **state)
{
	(void)state;
	sweep(FAULT_READ, false);
}

static void memory_that_runs_out_is_never_called_clean(void **state)
{
	(void)state;
	sweep(MEMORY, false);
}

static void a_repair_survives_a_failing_read(void **state)
{
	(void)state;
	sweep(FAULT_READ, true);
}

static void a_repair_survives_a_failing_write(void **state)
{
	(void)state;
	sweep(FAULT_WRITE, true);
}

static void a_repair_survives_a_failing_flush(void **state)
{
	(void)state;
	sweep(FAULT_FLUSH, true);
}

static void a_repair_survives_a_lack_of_memory(void **state)
{
	(void)state;
	sweep(MEMORY, true);
}

/* ---- the power is cut ------------------------------------------------------------------ */

static unsigned cut_case;
static uint64_t cuts;
static struct effort cut_effort;

static int after_cut(void *ctx, struct fault *crashed, const struct fault_cut *cut)
{
	(void)ctx;
	snprintf(repro, sizeof(repro), "fsck -fy of '%s', cut %" PRIu64 ": %s",
		 cases[cut_case].name, cut->number, cut->text);
	fault_fork(disk, crashed);
	comes_right(cut_case, true);
	cuts++;
	return effort_spent(&cut_effort, 0);
}

static void a_cut_in_a_repair_is_no_harm(void **state)
{
	struct fault_plan plan = {.all_below = 2, .random = 2, .torn = 2,
				  .sparse = true};
	struct fault *f = fault_create(BYTES);
	uint64_t started = 0, promised = 0;

	(void)state;
	cuts = 0;
	for (unsigned c = 0; c < CASES; c++) {
		cut_case = c;
		cut_effort = effort_begin(0, 1);
		plan.seed = c;
		fault_fork(disk, base[c]);
		fault_record(disk, true);
		assert_int_equal(fsck("-fy"), cases[c].sound ? 0 : 1);
		/* The log is explored over what was there before it. */
		fault_fork(f, base[c]);
		struct fault *log = disk;

		disk = f;
		fault_explore(log, &plan, &started, &promised, true, after_cut, NULL);
		disk = log;
		fault_record(disk, false);
	}
	fault_destroy(f);
	print_message("%" PRIu64 " cuts\n", cuts);
}

static int done(void **state)
{
	(void)state;
	for (unsigned c = 0; c < CASES; c++)
		fault_destroy(base[c]);
	fault_destroy(disk);
	free(said);
	return 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(what_is_broken_is_found_and_repaired),
		cmocka_unit_test(a_spoilt_bitmap_is_named),
		cmocka_unit_test(a_block_that_is_free_already_is_not_freed),
		cmocka_unit_test(copies_of_the_superblock_are_compared),
		cmocka_unit_test(a_group_that_makes_no_sense_is_named_and_cut_off),
		cmocka_unit_test(a_failing_read_is_never_called_clean),
		cmocka_unit_test(memory_that_runs_out_is_never_called_clean),
		cmocka_unit_test(a_repair_survives_a_failing_read),
		cmocka_unit_test(a_repair_survives_a_failing_write),
		cmocka_unit_test(a_repair_survives_a_failing_flush),
		cmocka_unit_test(a_repair_survives_a_lack_of_memory),
		cmocka_unit_test(a_cut_in_a_repair_is_no_harm),
	};

	return cmocka_run_group_tests(tests, make_all, done);
}
