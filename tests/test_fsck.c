/* SPDX-License-Identifier: BSD-2-Clause */

/*
 * fsck.spaceweave on an image that fails: each read, write, flush and allocation
 * of memory, once or from then on, while it checks and while it repairs; and the
 * power cut anywhere in a repair. Whatever happens,
 *   - checking writes nothing, and calls nothing clean that is not;
 *   - what it says it has repaired is repaired;
 *   - what was interrupted can be repaired by the next run, and no file is lost
 *     by it that an undisturbed repair keeps.
 *
 *   STATES=n   at most so many runs of a kind, spread evenly; 0: all
 *   CASE=c KIND=k INDEX=n MODE=m   this run alone, with what it says
 */

#include "meta/meta.h"
#include "meta/repair.h"
#include "tests/fault.h"
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
} cases[] = {
	{"whole", "", true},
	{"not closed", "dirty 3", true},
	{"entries", "index-del / file; dirent / hard2 type 4;"
	 "dirent-put /dir again /dir/sub/end 4; dirent-del /dir sub; dirent-del / dir;"
	 "dirent-put / none 999 8; index / link name other", false},
	{"inodes", "inode /file size +5; inode /file mode 0; inode /sparse blks 7;"
	 "inode /fifo rdev 3; inode /dir nlink 9; inode-del /shared1;"
	 "xattr-del /xattrs user.big 1; orphan 777; intent /file 5 5;"
	 "inode /hard1 nlink 0", false},
	{"space", "claim-free 20; release /file 0; super new free +3;"
	 "super new next_ino 20; super new inodes 1", false},
	{"shared", "ref-of /shared1 0 1 7; map-copy /file 0 /prealloc 40", false},
	{"bitmap lost", "bitmap 0", false},
	{"leaf lost", "dirty 3; node 0 0 1", false},
	{"leaf lost that the journal wants", "dirty 3; node 0 0 0", false},
	{"references lost", "node 1 0 0", false},
	{"superblocks lost", "dirty 3; super 0 spoil; super 1 spoil", false},
	{"newest superblock lost", "dirty 3; super new spoil", false},
	{"older superblock and backups", "super old spoil; super 2 spoil;"
	 "super 3 uuid", false},
	{"journal damaged", "dirty 4; group 1", false},
};

#define CASES (sizeof(cases) / sizeof(cases[0]))

static struct fault *base[CASES];	/* each of these */
static struct fault *disk;		/* what fsck is given */

/* ---- the program as a function ------------------------------------------------- */

int fsck_main(int argc, char **argv);
int __wrap_image_open(const char *path, enum image_mode mode, struct image **out);
int __real_image_open(const char *path, enum image_mode mode, struct image **out);
void __wrap_exit(int status) __attribute__((noreturn));
void __real_exit(int status) __attribute__((noreturn));

static jmp_buf out_of_fsck;
static bool in_fsck;
static char *said;
static size_t said_len;

int __wrap_image_open(const char *path, enum image_mode mode, struct image **out)
{
	if (!in_fsck)
		return __real_image_open(path, mode, out);
	*out = fault_image(disk);
	return 0;
}

void __wrap_exit(int status)
{
	if (in_fsck)
		longjmp(out_of_fsck, status + 1);
	__real_exit(status);
}

/* Its exit status; what it says on both channels is in `said`. */
static int fsck(const char *options)
{
	static FILE *out, *err;
	char *argv[] = {(char *)"fsck", (char *)options, (char *)"image", NULL};
	int ret;

	free(said);
	said = NULL;
	out = stdout;
	err = stderr;
	stdout = stderr = open_memstream(&said, &said_len);
	ret = setjmp(out_of_fsck);
	if (ret) {
		ret--;
	} else {
		in_fsck = true;
		optind = 0;
		ret = fsck_main(3, argv);
	}
	in_fsck = false;
	fclose(stdout);
	stdout = out;
	stderr = err;
	return ret;
}

/* ---- what there is to lose -------------------------------------------------------- */

struct files {
	uint64_t ino[2000];
	unsigned count;
};

static int note_file(void *ctx, enum table t, const uint8_t *key, size_t klen,
		     const uint8_t *val, size_t vlen)
{
	struct files *n = ctx;
	struct disk_dirent d;

	(void)t;
	if (klen <= 9 || key[8] != KEY_DIRENT || vlen != sizeof(d) || n->count == 2000)
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
static char repro[200];

static void wrong(const char *what, int status)
{
	char *text = said;

	said = NULL;
	print_message("%s\nsaid:\n%s", repro, text ? text : "");
	free(text);
	fail_msg("%s (status %d); again: %s", what, status, repro);
}

/* Nothing fails any more: the next run repairs what is left. */
static void comes_right(unsigned c)
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
		if (!has_file(&now, kept[c].ino[i]))
			wrong("a file is lost that need not be", 0);
}

/* ---- making them ------------------------------------------------------------------- */

static void run_damage(const char *dir, const char *image, const char *command)
{
	char line[1200];

	snprintf(line, sizeof(line), "'%s/fsck/damage' '%s' %s", dir, image, command);
	if (system(line))
		fail_msg("%s", line);
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
		char commands[500], *save = NULL;

		assert_int_equal(ftruncate(fd, 0), 0);
		assert_int_equal(ftruncate(fd, BYTES), 0);
		assert_int_equal(image_open(image, IMAGE_WRITE, &im), 0);
		assert_int_equal(volume_format(im, &g), 0);
		image_close(im);
		run_damage(self, image, "make");
		snprintf(commands, sizeof(commands), "%s", cases[c].damage);
		for (char *one = strtok_r(commands, ";", &save); one;
		     one = strtok_r(NULL, ";", &save))
			run_damage(self, image, one);
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
		assert_true(kept[c].count > 200 || c == 7 || c == 8);
		comes_right(c);
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
	struct disk_super before, after;
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
	assert_int_equal(super_load(fault_image(disk), &before, &slot, msg, sizeof(msg)),
			 0);
	assert_int_equal(slot, slot_after);
	assert_memory_equal(&before, &after, sizeof(before));
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
	comes_right(c);
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
	comes_right(cut_case);
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
