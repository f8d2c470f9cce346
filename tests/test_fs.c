/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The file system through its door, without a mount: what the kernel would ask
 * in order, and what it never would. The image is a file in TMPDIR that has no
 * name any more.
 */
#include "fs/fs_priv.h"
#include "meta/meta_priv.h"
#include "meta/repair.h"
#include "tests/fault.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <cmocka.h>

#define VOLUME_BYTES (64ull << 20)
#define BLOCK 4096

struct world {
	struct image *im;
	struct volume *v;
	struct fs *fs;
	struct fs_options opt;
	char path[64];
};

static const struct fs_cred cred = {.uid = 1000, .gid = 1000, .umask = 022};
static unsigned seed;

static int ok_(int err, int line)
{
	if (err < 0)
		fail_msg("line %d: %s", line, strerror(-err));
	return err;
}
#define OK(call) ok_((int)(call), __LINE__)

static void world_open(struct world *w)
{
	struct volume_options o = {.no_threads = true};
	char msg[256] = "";

	if (volume_open(w->im, &o, &w->v, msg, sizeof(msg)))
		fail_msg("volume_open: %s", msg);
	OK(fs_open(w->v, &w->opt, &w->fs));
}

static void world_close(struct world *w)
{
	OK(fs_close(w->fs));
	OK(volume_close(w->v));
}

static void world_again(struct world *w)
{
	world_close(w);
	world_open(w);
}

static void world_make_with(struct world *w, uint64_t bytes, uint64_t journal_bytes)
{
	struct volume_geometry g = {.bytes = bytes,
				    .journal_bytes = journal_bytes,
				    .root_mode = 0755};
	const char *tmp = getenv("TMPDIR");
	char msg[128];
	int fd;

	snprintf(w->path, sizeof(w->path), "%.40s/test_fs.XXXXXX",
		 tmp ? tmp : "/tmp");
	fd = mkstemp(w->path);
	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, (off_t)bytes), 0);
	close(fd);
	OK(image_open(w->path, IMAGE_WRITE, &w->im));
	unlink(w->path);
	OK(volume_geometry_check(&g, msg, sizeof(msg)));
	OK(volume_format(w->im, &g));
	world_open(w);
}

static void world_make(struct world *w, uint64_t bytes)
{
	world_make_with(w, bytes, 0);
}

static int setup(void **state)
{
	struct world *w = calloc(1, sizeof(*w));

	world_make(w, VOLUME_BYTES);
	*state = w;
	return 0;
}

static int teardown(void **state)
{
	struct world *w = *state;

	world_close(w);
	image_close(w->im);
	free(w);
	return 0;
}

/* ---- short words --------------------------------------------------------------- */

static uint64_t make(struct world *w, uint64_t dir, const char *name)
{
	struct fs_entry e;

	OK(fs_mknod(w->fs, &cred, dir, name, S_IFREG | 0644, 0, &e));
	return e.ino;
}

static uint64_t make_dir(struct world *w, uint64_t dir, const char *name)
{
	struct fs_entry e;

	OK(fs_mkdir(w->fs, &cred, dir, name, 0755, &e));
	return e.ino;
}

static struct stat stat_of(struct world *w, uint64_t ino)
{
	struct stat st;

	OK(fs_getattr(w->fs, ino, &st));
	return st;
}

/* The inode a name stands for, not counted; 0 when there is none. */
static uint64_t find(struct world *w, uint64_t dir, const char *name)
{
	struct fs_entry e;
	int err = fs_lookup(w->fs, dir, name, &e);

	if (err == -ENOENT)
		return 0;
	OK(err);
	fs_forget(w->fs, e.ino, 1);
	return e.ino;
}

static void put(struct world *w, uint64_t ino, const char *text, off_t off)
{
	ssize_t n = fs_write(w->fs, ino, text, strlen(text), off, 0);

	assert_int_equal(n, strlen(text));
}

static ssize_t get(struct world *w, uint64_t ino, void *buf, size_t len, off_t off)
{
	char *room = malloc(fs_read_room(w->fs, len)), *data;
	ssize_t n = fs_read(w->fs, ino, room, len, off, &data);

	if (n > 0)
		memcpy(buf, data, (size_t)n);
	free(room);
	return n;
}

static void resize(struct world *w, uint64_t ino, off_t size)
{
	struct stat st = {.st_size = size};

	OK(fs_setattr(w->fs, ino, FS_SET_SIZE, &st));
	assert_int_equal(st.st_size, size);
}

/* ---- names ------------------------------------------------------------------------ */

static void a_name_is_made_found_and_removed(void **state)
{
	struct world *w = *state;
	struct fs_entry e;
	uint64_t ino = make(w, ROOT_INO, "file");

	assert_int_equal(find(w, ROOT_INO, "file"), ino);
	assert_int_equal(stat_of(w, ino).st_mode, S_IFREG | 0644);
	assert_int_equal(stat_of(w, ino).st_uid, 1000);
	assert_int_equal(fs_mknod(w->fs, &cred, ROOT_INO, "file", 0644, 0, &e),
			 -EEXIST);
	OK(fs_unlink(w->fs, ROOT_INO, "file"));
	assert_int_equal(find(w, ROOT_INO, "file"), 0);
	assert_int_equal(fs_unlink(w->fs, ROOT_INO, "file"), -ENOENT);
}

static void names_have_up_to_255_bytes(void **state)
{
	struct world *w = *state;
	char name[258];
	struct fs_entry e;

	memset(name, 'x', sizeof(name));
	name[255] = 0;
	make(w, ROOT_INO, name);
	name[255] = 'x';
	name[256] = 0;
	assert_int_equal(fs_mknod(w->fs, &cred, ROOT_INO, name, 0644, 0, &e),
			 -ENAMETOOLONG);
	assert_int_equal(fs_lookup(w->fs, ROOT_INO, name, &e), -ENAMETOOLONG);
}

static void an_unlinked_file_lives_until_it_is_forgotten(void **state)
{
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "open");
	struct stat st;
	char c;

	put(w, ino, "still here", 0);
	OK(fs_unlink(w->fs, ROOT_INO, "open"));
	assert_int_equal(stat_of(w, ino).st_nlink, 0);
	assert_int_equal(get(w, ino, &c, 1, 6), 1);
	assert_int_equal(c, 'h');
	fs_forget(w->fs, ino, 1);
	assert_int_equal(fs_getattr(w->fs, ino, &st), -ESTALE);
}

static void an_unlinked_file_is_gone_after_a_mount(void **state)
{
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "open");
	struct stat st;

	OK(fs_unlink(w->fs, ROOT_INO, "open"));
	world_again(w);
	assert_int_equal(fs_getattr(w->fs, ino, &st), -ESTALE);
}

static void a_file_without_a_name_can_get_one(void **state)
{
	struct world *w = *state;
	struct fs_entry e, f;

	OK(fs_tmpfile(w->fs, &cred, ROOT_INO, 0600, &e));
	assert_int_equal(e.st.st_nlink, 0);
	OK(fs_link(w->fs, e.ino, ROOT_INO, "named", &f));
	assert_int_equal(f.st.st_nlink, 1);
	fs_forget(w->fs, e.ino, 2);
	world_again(w);
	assert_int_equal(find(w, ROOT_INO, "named"), e.ino);
}

static void links_are_counted(void **state)
{
	struct world *w = *state;
	uint64_t dir = make_dir(w, ROOT_INO, "dir"), ino = make(w, dir, "a");
	struct fs_entry e;

	OK(fs_link(w->fs, ino, ROOT_INO, "b", &e));
	assert_int_equal(e.st.st_nlink, 2);
	assert_int_equal(fs_link(w->fs, ino, ROOT_INO, "b", &e), -EEXIST);
	assert_int_equal(fs_link(w->fs, dir, ROOT_INO, "c", &e), -EPERM);
	OK(fs_unlink(w->fs, dir, "a"));
	assert_int_equal(stat_of(w, ino).st_nlink, 1);
	assert_int_equal(stat_of(w, ROOT_INO).st_nlink, 3);
	OK(fs_rmdir(w->fs, ROOT_INO, "dir"));
	assert_int_equal(stat_of(w, ROOT_INO).st_nlink, 2);
}

static void a_directory_must_be_empty_to_go(void **state)
{
	struct world *w = *state;
	uint64_t dir = make_dir(w, ROOT_INO, "dir");
	struct fs_entry e;

	make(w, dir, "in");
	assert_int_equal(fs_rmdir(w->fs, ROOT_INO, "dir"), -ENOTEMPTY);
	assert_int_equal(fs_unlink(w->fs, ROOT_INO, "dir"), -EISDIR);
	assert_int_equal(fs_rmdir(w->fs, dir, "in"), -ENOTDIR);
	OK(fs_unlink(w->fs, dir, "in"));
	OK(fs_rmdir(w->fs, ROOT_INO, "dir"));
	/* It is still held: nothing is found or made in it. */
	assert_int_equal(fs_lookup(w->fs, dir, "in", &e), -ENOENT);
	assert_int_equal(fs_mknod(w->fs, &cred, dir, "x", 0644, 0, &e), -ENOENT);
	assert_int_equal(fs_lookup(w->fs, dir, "..", &e), -ENOENT);
}

static void a_symlink_says_what_it_was_told(void **state)
{
	struct world *w = *state;
	char target[4096], got[4097];
	struct fs_entry e;

	memset(target, 't', sizeof(target));
	target[4095] = 0;
	OK(fs_symlink(w->fs, &cred, ROOT_INO, "link", target, &e));
	assert_int_equal(e.st.st_size, 4095);
	world_again(w);
	OK(fs_readlink(w->fs, e.ino, got, sizeof(got)));
	assert_string_equal(got, target);
}

/* ---- rename -------------------------------------------------------------------------- */

static int ren(struct world *w, uint64_t d, const char *n, uint64_t d2,
	       const char *n2, unsigned flags)
{
	return fs_rename(w->fs, &cred, d, n, d2, n2, flags);
}

static void rename_replaces(void **state)
{
	struct world *w = *state;
	uint64_t a = make(w, ROOT_INO, "a"), b = make(w, ROOT_INO, "b");

	assert_int_equal(ren(w, ROOT_INO, "a", ROOT_INO, "b", RENAME_NOREPLACE),
			 -EEXIST);
	OK(ren(w, ROOT_INO, "a", ROOT_INO, "b", 0));
	assert_int_equal(find(w, ROOT_INO, "a"), 0);
	assert_int_equal(find(w, ROOT_INO, "b"), a);
	assert_int_equal(stat_of(w, b).st_nlink, 0);
	assert_int_equal(ren(w, ROOT_INO, "a", ROOT_INO, "c", 0), -ENOENT);
}

/* "gone" in the root. */
static void make_entry_for_no_inode(struct world *w)
{
	struct inode *root;
	struct txn *t;

	OK(inode_get(w->v, ROOT_INO, &root));
	rwlock_write(&root->lock);
	OK(txn_begin(w->v, TXN_NORMAL, &t));
	OK(dir_add(t, root, "gone", 4, 12345, DT_REG));
	OK(txn_commit(t));
	rwlock_unlock(&root->lock);
	inode_put(w->v, root);
}

/* Not a race that would be lost over and over. */
static void rename_of_an_entry_for_no_inode_is_damage(void **state)
{
	struct world *w = *state;

	make(w, ROOT_INO, "a");
	make_entry_for_no_inode(w);
	alarm(10);
	assert_int_equal(ren(w, ROOT_INO, "gone", ROOT_INO, "b", 0), -EUCLEAN);
	assert_int_equal(ren(w, ROOT_INO, "a", ROOT_INO, "gone", 0), -EUCLEAN);
	alarm(0);
}

static void a_file_that_counts_blocks_it_has_not_goes_no_further(void **state)
{
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "a");
	struct inode *ip;
	struct txn *t;

	OK(inode_get(w->v, ino, &ip));
	rwlock_write(&ip->lock);
	OK(txn_begin(w->v, TXN_NORMAL, &t));
	inode_edit(t, ip)->blks = 7;
	OK(txn_commit(t));
	rwlock_unlock(&ip->lock);
	inode_put(w->v, ip);
	alarm(10);
	fs_unlink(w->fs, ROOT_INO, "a");
	assert_int_equal(inode_evict(w->v, ino), -EUCLEAN);
	alarm(0);
}

static void rename_of_two_names_of_one_file_does_nothing(void **state)
{
	struct world *w = *state;
	uint64_t a = make(w, ROOT_INO, "a");
	struct fs_entry e;

	OK(fs_link(w->fs, a, ROOT_INO, "b", &e));
	OK(ren(w, ROOT_INO, "a", ROOT_INO, "b", 0));
	assert_int_equal(find(w, ROOT_INO, "a"), a);
	assert_int_equal(find(w, ROOT_INO, "b"), a);
}

static void rename_moves_directories_with_their_parents(void **state)
{
	struct world *w = *state;
	uint64_t d1 = make_dir(w, ROOT_INO, "d1"), d2 = make_dir(w, ROOT_INO, "d2");
	uint64_t sub = make_dir(w, d1, "sub");

	OK(ren(w, d1, "sub", d2, "moved", 0));
	assert_int_equal(find(w, sub, ".."), d2);
	assert_int_equal(stat_of(w, d1).st_nlink, 2);
	assert_int_equal(stat_of(w, d2).st_nlink, 3);
	OK(ren(w, d2, "moved", ROOT_INO, "d1", 0));	/* an empty one goes */
	assert_int_equal(find(w, ROOT_INO, "d1"), sub);
	assert_int_equal(stat_of(w, d1).st_nlink, 0);
	assert_int_equal(stat_of(w, ROOT_INO).st_nlink, 4);
}

static void rename_refuses_loops_and_wrong_kinds(void **state)
{
	struct world *w = *state;
	uint64_t a = make_dir(w, ROOT_INO, "a"), b = make_dir(w, a, "b");

	make(w, ROOT_INO, "f");
	make(w, b, "in");
	assert_int_equal(ren(w, ROOT_INO, "a", b, "a", 0), -EINVAL);
	assert_int_equal(ren(w, ROOT_INO, "a", a, "a", 0), -EINVAL);
	assert_int_equal(ren(w, ROOT_INO, "a", b, "in", RENAME_EXCHANGE), -EINVAL);
	assert_int_equal(ren(w, b, "in", ROOT_INO, "a", RENAME_EXCHANGE), -EINVAL);
	assert_int_equal(ren(w, ROOT_INO, "f", ROOT_INO, "a", 0), -EISDIR);
	assert_int_equal(ren(w, ROOT_INO, "a", ROOT_INO, "f", 0), -ENOTDIR);
	assert_int_equal(ren(w, a, "b", ROOT_INO, "a", 0), -ENOTEMPTY);
}

static void rename_exchanges(void **state)
{
	struct world *w = *state;
	uint64_t d = make_dir(w, ROOT_INO, "d"), x = make_dir(w, d, "x");
	uint64_t f = make(w, ROOT_INO, "f");

	OK(ren(w, d, "x", ROOT_INO, "f", RENAME_EXCHANGE));
	assert_int_equal(find(w, d, "x"), f);
	assert_int_equal(find(w, ROOT_INO, "f"), x);
	assert_int_equal(find(w, x, ".."), ROOT_INO);
	assert_int_equal(stat_of(w, d).st_nlink, 2);
	assert_int_equal(stat_of(w, ROOT_INO).st_nlink, 4);
	assert_int_equal(ren(w, d, "none", d, "x", RENAME_EXCHANGE), -ENOENT);
}

static void rename_leaves_a_whiteout(void **state)
{
	struct world *w = *state;
	uint64_t f = make(w, ROOT_INO, "f"), white;

	OK(ren(w, ROOT_INO, "f", ROOT_INO, "g", RENAME_WHITEOUT));
	white = find(w, ROOT_INO, "f");
	assert_int_equal(find(w, ROOT_INO, "g"), f);
	assert_int_equal(stat_of(w, white).st_mode, S_IFCHR);
	assert_int_equal(stat_of(w, white).st_rdev, 0);
}

/* ---- readdir ---------------------------------------------------------------------------- */

struct seen {
	unsigned count, stop_after, unread;
	uint64_t next;
	char last[256];
};

static int see(void *ctx, const char *name, const struct fs_entry *e, uint64_t next)
{
	struct seen *s = ctx;

	if (s->count == s->stop_after)
		return 1;
	s->count++;
	s->unread += !e->ino;
	s->next = next;
	snprintf(s->last, sizeof(s->last), "%s", name);
	return 0;
}

static void a_listing_meets_each_name_once(void **state)
{
	struct world *w = *state;
	uint64_t dir = make_dir(w, ROOT_INO, "dir");
	struct seen s = {.stop_after = 1};
	unsigned total = 0;
	char name[16];

	for (int i = 0; i < 500; i++) {
		snprintf(name, sizeof(name), "n%d", i);
		fs_forget(w->fs, make(w, dir, name), 1);
	}
	/* Step by step, removing what was seen and adding new ones. */
	do {
		s.count = 0;
		OK(fs_readdir(w->fs, dir, s.next, false, see, &s));
		total += s.count;
		if (s.count && s.last[0] == 'n')
			OK(fs_unlink(w->fs, dir, s.last));
	} while (s.count);
	assert_int_equal(total, 502);
	OK(fs_rmdir(w->fs, ROOT_INO, "dir"));
}

static void a_listing_with_attributes_counts_what_was_taken(void **state)
{
	struct world *w = *state;
	uint64_t dir = make_dir(w, ROOT_INO, "dir"), ino[3];
	struct seen s = {.stop_after = 4};
	struct stat st;
	const char *const names[] = {"a", "b", "c"};

	for (int i = 0; i < 3; i++) {
		ino[i] = make(w, dir, names[i]);
		fs_forget(w->fs, ino[i], 1);
	}
	OK(fs_readdir(w->fs, dir, 0, true, see, &s));	/* . .. a b */
	for (int i = 0; i < 3; i++)
		OK(fs_unlink(w->fs, dir, names[i]));
	OK(fs_getattr(w->fs, ino[0], &st));
	OK(fs_getattr(w->fs, ino[1], &st));
	assert_int_equal(fs_getattr(w->fs, ino[2], &st), -ESTALE);
	fs_forget(w->fs, ino[1], 1);
	assert_int_equal(fs_getattr(w->fs, ino[1], &st), -ESTALE);
}

static void a_listing_names_what_cannot_be_read(void **state)
{
	struct world *w = *state;
	struct seen s = {.stop_after = 10};

	fs_forget(w->fs, make(w, ROOT_INO, "a"), 1);
	make_entry_for_no_inode(w);
	fs_forget(w->fs, make(w, ROOT_INO, "z"), 1);
	OK(fs_readdir(w->fs, ROOT_INO, 0, true, see, &s));
	assert_int_equal(s.count, 5);
	assert_int_equal(s.unread, 1);
	assert_string_equal(s.last, "z");
}

/* ---- attributes ---------------------------------------------------------------------------- */

static void a_setgid_directory_hands_its_group_on(void **state)
{
	struct world *w = *state;
	uint64_t dir = make_dir(w, ROOT_INO, "dir");
	struct stat st = {.st_gid = 77, .st_mode = 02775};
	struct fs_entry e;

	OK(fs_setattr(w->fs, dir, FS_SET_GID, &st));
	st.st_mode = 02775;
	OK(fs_setattr(w->fs, dir, FS_SET_MODE, &st));
	assert_int_equal(stat_of(w, make(w, dir, "f")).st_gid, 77);
	OK(fs_mkdir(w->fs, &cred, dir, "d", 0777, &e));
	assert_int_equal(e.st.st_gid, 77);
	assert_int_equal(e.st.st_mode, S_IFDIR | 02755);
}

static void chown_and_writes_take_privileges(void **state)
{
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "f");
	struct stat st = {.st_mode = 06755};

	OK(fs_setattr(w->fs, ino, FS_SET_MODE, &st));
	OK(fs_setxattr(w->fs, &cred, ino, "security.capability", "x", 1, 0));
	put(w, ino, "x", 0);			/* by root: not the bits */
	assert_int_equal(stat_of(w, ino).st_mode & 07777, 06755);
	assert_int_equal(fs_getxattr(w->fs, ino, "security.capability", NULL, 0),
			 -ENODATA);
	assert_int_equal(fs_write(w->fs, ino, "x", 1, 0, FS_WRITE_KILL_SUID), 1);
	assert_int_equal(stat_of(w, ino).st_mode & 07777, 0755);
	st.st_mode = 06755;
	OK(fs_setattr(w->fs, ino, FS_SET_MODE, &st));
	st.st_uid = 5;
	OK(fs_setattr(w->fs, ino, FS_SET_UID, &st));
	assert_int_equal(st.st_mode & 07777, 0755);
}

static void an_owner_and_a_size_take_capabilities_once(void **state)
{
	struct stat st = {.st_uid = 5, .st_size = 10};
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "f");

	OK(fs_setxattr(w->fs, &cred, ino, "user.kept", "x", 1, 0));
	OK(fs_setxattr(w->fs, &cred, ino, "security.capability", "x", 1, 0));
	OK(fs_setattr(w->fs, ino, FS_SET_UID | FS_SET_SIZE, &st));
	assert_int_equal(fs_getxattr(w->fs, ino, "security.capability", NULL, 0),
			 -ENODATA);
	assert_int_equal(fs_getxattr(w->fs, ino, "user.kept", NULL, 0), 1);
}

static void flags_forbid(void **state)
{
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "f");
	uint32_t flags = FS_IMMUTABLE_FL, got, projid;
	struct stat st = {.st_mode = 0600};
	struct fs_entry e;

	OK(fs_setflags(w->fs, ino, &flags, NULL));
	OK(fs_getflags(w->fs, ino, &got, &projid));
	assert_int_equal(got, flags);
	assert_int_equal(fs_unlink(w->fs, ROOT_INO, "f"), -EPERM);
	assert_int_equal(fs_write(w->fs, ino, "x", 1, 0, 0), -EPERM);
	assert_int_equal(fs_setattr(w->fs, ino, FS_SET_MODE, &st), -EPERM);
	assert_int_equal(fs_link(w->fs, ino, ROOT_INO, "g", &e), -EPERM);
	assert_int_equal(ren(w, ROOT_INO, "f", ROOT_INO, "g", 0), -EPERM);
	flags = FS_APPEND_FL;
	OK(fs_setflags(w->fs, ino, &flags, NULL));
	put(w, ino, "abc", 0);
	put(w, ino, "def", 3);
	assert_int_equal(fs_write(w->fs, ino, "x", 1, 0, 0), -EPERM);
	assert_int_equal(fs_setattr(w->fs, ino, FS_SET_SIZE, &st), -EPERM);
	flags = 0;
	OK(fs_setflags(w->fs, ino, &flags, NULL));
	OK(fs_unlink(w->fs, ROOT_INO, "f"));
}

/* What a cache hands over: `len` bytes of `c` at `off`. */
static ssize_t put_cached(struct world *w, uint64_t ino, char c, size_t len, off_t off)
{
	static char data[16 * BLOCK];

	memset(data, c, len);
	return fs_write(w->fs, ino, data, len, off, FS_WRITE_CACHED);
}

/* The file as runs of a letter: "a5000 b2" */
static const char *runs_of(struct world *w, uint64_t ino)
{
	static char data[17 * BLOCK], out[256];
	ssize_t n = get(w, ino, data, sizeof(data), 0), from = 0;
	size_t used = 0;

	out[0] = 0;
	for (ssize_t i = 1; i <= n; i++)
		if (i == n || data[i] != data[from]) {
			used += (size_t)snprintf(out + used, sizeof(out) - used, "%s%c%zd",
						 used ? " " : "",
						 data[from] ? data[from] : '0', i - from);
			from = i;
		}
	return out;
}

static void set_flags(struct world *w, uint64_t ino, uint32_t flags)
{
	OK(fs_setflags(w->fs, ino, &flags, NULL));
}

static void an_append_only_file_gets_nothing_but_what_is_new(void **state)
{
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "log");
	struct stat st = {.st_mtim = {5, 0}, .st_ctim = {5, 0}};

	OK(put_cached(w, ino, 'a', 5000, 0));
	set_flags(w, ino, FS_APPEND_FL);
	/* whole pages, as they are; the last one with what was appended */
	assert_int_equal(put_cached(w, ino, 'a', BLOCK, 0), BLOCK);
	assert_int_equal(put_cached(w, ino, 'a', 6000 - BLOCK, BLOCK), 6000 - BLOCK);
	assert_string_equal(runs_of(w, ino), "a6000");
	/* changed: in the midst, at the end, alone and beside what is appended */
	assert_int_equal(put_cached(w, ino, 'x', 1, 100), -EPERM);
	assert_int_equal(put_cached(w, ino, 'x', 1, 5999), -EPERM);
	assert_int_equal(put_cached(w, ino, 'x', 6000 - BLOCK, BLOCK), -EPERM);
	assert_string_equal(runs_of(w, ino), "a6000");
	assert_int_equal(put_cached(w, ino, 'b', 3 * BLOCK, 0), -EPERM);
	assert_string_equal(runs_of(w, ino), "a6000 b6288");
	assert_int_equal(put_cached(w, ino, 'b', 1, 3 * BLOCK - 1), 1);
	/* what is not from a cache never is below the end */
	assert_int_equal(fs_write(w->fs, ino, "b", 1, 3 * BLOCK - 1, 0), -EPERM);
	/* an append moves the times */
	OK(fs_setattr(w->fs, ino, FS_SET_MTIME | FS_SET_CTIME | FS_SET_CACHED, &st));
	assert_int_equal(st.st_mtime, 5);
	world_again(w);
	assert_string_equal(runs_of(w, find(w, ROOT_INO, "log")), "a6000 b6288");
}

static void what_is_appended_may_come_in_any_order(void **state)
{
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "log"), sparse = make(w, ROOT_INO, "sparse");

	OK(put_cached(w, ino, 'a', 1000, 0));
	set_flags(w, ino, FS_APPEND_FL);
	OK(put_cached(w, ino, 'd', BLOCK, 2 * BLOCK));
	OK(put_cached(w, ino, 'f', BLOCK, 4 * BLOCK));
	OK(fs_fallocate(w->fs, ino, 0, 6 * BLOCK, BLOCK));
	OK(fs_write(w->fs, ino, "h", 1, 7 * BLOCK + 1, 0));
	/* what is missing, once */
	OK(put_cached(w, ino, 'e', 100, 3 * BLOCK));
	assert_int_equal(put_cached(w, ino, 'x', 101, 3 * BLOCK), -EPERM);
	assert_int_equal(put_cached(w, ino, 'e', BLOCK, 3 * BLOCK), -EPERM);
	OK(put_cached(w, ino, 'c', 2 * BLOCK - 1000, 1000));
	OK(put_cached(w, ino, 'g', 2 * BLOCK + 1, 5 * BLOCK));
	assert_string_equal(runs_of(w, ino), "a1000 c7192 d4096 e100 x1 e3995 f4096 g8193 h1");
	for (int i = 0; i < 7; i++)
		assert_int_equal(put_cached(w, ino, 'x', BLOCK, i * BLOCK), -EPERM);
	assert_string_equal(runs_of(w, ino), "a1000 c7192 d4096 e100 x1 e3995 f4096 g8193 h1");
	/* a hole that was there is none of it, nor what the kernel has forgotten */
	OK(put_cached(w, sparse, 'b', 1, BLOCK));
	set_flags(w, sparse, FS_APPEND_FL);
	assert_int_equal(put_cached(w, sparse, 'a', BLOCK, 0), -EPERM);
	OK(put_cached(w, sparse, 'b', 1, 2 * BLOCK));
	fs_forget(w->fs, sparse, 1);
	assert_int_equal(put_cached(w, sparse, 'x', 1, BLOCK + 1), -EPERM);
	assert_string_equal(runs_of(w, sparse), "04096 b1 04095 b1");
	/* on its way when the flag came */
	set_flags(w, ino, 0);
	OK(fs_append_begin(w->fs, ino));
	OK(put_cached(w, ino, 'j', 100, 8 * BLOCK));
	set_flags(w, ino, FS_APPEND_FL);
	fs_append_end(w->fs, ino);
	OK(put_cached(w, ino, 'i', BLOCK - 2, 7 * BLOCK + 2));
	assert_string_equal(runs_of(w, ino),
			    "a1000 c7192 d4096 e100 x1 e3995 f4096 g8193 h1 i4094 j100");
	assert_false(gaps_any(&w->fs->gaps));
}

static void what_an_immutable_file_refuses_moves_no_time(void **state)
{
	const int owed = FS_SET_MTIME | FS_SET_CTIME;
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "f");
	struct stat before, st;

	OK(put_cached(w, ino, 'a', 10, 0));
	set_flags(w, ino, FS_IMMUTABLE_FL);
	before = st = stat_of(w, ino);
	/* the time of what was written before comes late */
	st.st_mtim.tv_sec -= 100;
	st.st_ctim = st.st_mtim;
	OK(fs_setattr(w->fs, ino, owed | FS_SET_CACHED, &st));
	st = stat_of(w, ino);
	assert_int_equal(st.st_mtim.tv_sec, before.st_mtim.tv_sec - 100);
	assert_memory_equal(&st.st_ctim, &before.st_ctim, sizeof(st.st_ctim));
	/* the times of what was refused */
	before = st;
	assert_int_equal(put_cached(w, ino, 'b', 10, 0), -EPERM);
	for (int i = -100; i <= 300; i += 400) {
		st.st_mtim.tv_sec += i;
		st.st_ctim.tv_sec += i;
		OK(fs_setattr(w->fs, ino, owed | FS_SET_CACHED, &st));
		assert_memory_equal(&st, &before, sizeof(st));
	}
	assert_int_equal(fs_setattr(w->fs, ino, owed, &st), -EPERM);
	assert_int_equal(fs_setattr(w->fs, ino, FS_SET_SIZE, &st), -EPERM);
	assert_int_equal(fs_setattr(w->fs, ino, FS_SET_ATIME_NOW | FS_SET_MTIME_NOW, &st),
			 -EPERM);
	st = stat_of(w, ino);
	assert_memory_equal(&st, &before, sizeof(st));
	assert_string_equal(runs_of(w, ino), "a10");
}

static uint64_t flushes(struct world *w)
{
	struct volume_stat st;

	volume_stat(w->v, &st);
	return st.flushes;
}

static void with_sync_flags_are_durable_when_answered(void **state)
{
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "f"), before = flushes(w);
	uint32_t projid = 7;

	set_flags(w, ino, FS_NODUMP_FL);
	assert_int_equal(flushes(w), before);
	set_flags(w, ino, FS_SYNC_FL);
	assert_true(flushes(w) > before);
	before = flushes(w);
	OK(fs_setflags(w->fs, ino, NULL, &projid));
	assert_true(flushes(w) > before);
	set_flags(w, ino, 0);
	w->opt.sync = true;
	world_again(w);
	ino = find(w, ROOT_INO, "f");
	before = flushes(w);
	set_flags(w, ino, FS_NODUMP_FL);
	assert_true(flushes(w) > before);
}

static void xattrs_of_all_sizes_are_kept(void **state)
{
	static const size_t sizes[] = {0, 1, 639, 640, 641, 4096, 65536};
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "f");
	char *in = malloc(65536), *out = malloc(65536), name[32];

	for (size_t i = 0; i < 65536; i++)
		in[i] = (char)(i * 7);
	for (int i = 0; i < 7; i++) {
		snprintf(name, sizeof(name), "user.x%d", i);
		OK(fs_setxattr(w->fs, &cred, ino, name, in, sizes[i], 0));
	}
	world_again(w);
	for (int i = 0; i < 7; i++) {
		snprintf(name, sizeof(name), "user.x%d", i);
		assert_int_equal(fs_getxattr(w->fs, ino, name, out, 65536),
				 sizes[i]);
		assert_memory_equal(in, out, sizes[i]);
	}
	assert_int_equal(fs_getxattr(w->fs, ino, "user.x3", out, 10), -ERANGE);
	assert_int_equal(fs_listxattr(w->fs, NULL, ino, out, 65536), 7 * 8);
	assert_int_equal(fs_setxattr(w->fs, &cred, ino, "user.x0", "y", 1,
				     XATTR_CREATE), -EEXIST);
	assert_int_equal(fs_setxattr(w->fs, &cred, ino, "user.y", "y", 1,
				     XATTR_REPLACE), -ENODATA);
	assert_int_equal(fs_setxattr(w->fs, &cred, ino, "other.y", "y", 1, 0),
			 -EOPNOTSUPP);
	assert_int_equal(fs_setxattr(w->fs, &cred, ino, "user.big", in, 65537, 0),
			 -E2BIG);
	OK(fs_removexattr(w->fs, &cred, ino, "user.x6"));
	assert_int_equal(fs_removexattr(w->fs, &cred, ino, "user.x6"), -ENODATA);
	free(in);
	free(out);
}

/* user::rw-, user:7:rwx, group::r-x, mask::rwx, other::r-- */
static const uint8_t acl[] = {2, 0, 0, 0,
	0x01, 0, 6, 0, 0xff, 0xff, 0xff, 0xff,
	0x02, 0, 7, 0, 7, 0, 0, 0,
	0x04, 0, 5, 0, 0xff, 0xff, 0xff, 0xff,
	0x10, 0, 7, 0, 0xff, 0xff, 0xff, 0xff,
	0x20, 0, 4, 0, 0xff, 0xff, 0xff, 0xff};
#define ACL_MASK_PERM 30	/* offset of the mask's permissions */

static void names_of_trusted_xattrs_are_roots_to_see(void **state)
{
	static const char *const names[] = {"trusted.a", "user.b", "trusted.c",
					    "security.d", "trusted.e"};
	const struct fs_cred root = {0};
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "f"), only = make(w, ROOT_INO, "g");
	char all[128], some[128];

	for (size_t i = 0; i < 5; i++)
		OK(fs_setxattr(w->fs, &root, ino, names[i], "v", 1, 0));
	OK(fs_setxattr(w->fs, &root, only, names[0], "v", 1, 0));
	assert_int_equal(fs_listxattr(w->fs, &root, ino, all, sizeof(all)), 48);
	assert_int_equal(fs_listxattr(w->fs, &cred, ino, NULL, 0), 18);
	assert_int_equal(fs_listxattr(w->fs, &cred, ino, some, 17), -ERANGE);
	assert_int_equal(fs_listxattr(w->fs, &cred, ino, some, 18), 18);
	for (size_t at = 0; at < 18; at += strlen(some + at) + 1)
		assert_true(!strcmp(some + at, "user.b") || !strcmp(some + at, "security.d"));
	assert_int_equal(fs_listxattr(w->fs, &cred, only, some, sizeof(some)), 0);
	assert_int_equal(fs_listxattr(w->fs, &cred, only, NULL, 0), 0);
}

static void acls_follow_modes_and_modes_acls(void **state)
{
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "f");
	struct stat st = {.st_mode = 0640};
	uint8_t got[sizeof(acl)];

	OK(fs_setxattr(w->fs, &cred, ino, ACL_ACCESS, acl, sizeof(acl), 0));
	assert_int_equal(stat_of(w, ino).st_mode & 07777, 0674);
	OK(fs_setattr(w->fs, ino, FS_SET_MODE, &st));
	assert_int_equal(fs_getxattr(w->fs, ino, ACL_ACCESS, got, sizeof(got)),
			 sizeof(acl));
	assert_int_equal(got[ACL_MASK_PERM], 4);
	assert_int_equal(got[sizeof(acl) - 6], 0);
}

static void default_acls_are_inherited(void **state)
{
	struct world *w = *state;
	uint64_t dir = make_dir(w, ROOT_INO, "d"), f;
	uint8_t got[sizeof(acl)];
	struct fs_entry e;

	OK(fs_setxattr(w->fs, &cred, dir, ACL_DEFAULT, acl, sizeof(acl), 0));
	f = make(w, dir, "f");			/* 0644, and no umask */
	assert_int_equal(stat_of(w, f).st_mode & 07777, 0644);
	assert_int_equal(fs_getxattr(w->fs, f, ACL_ACCESS, got, sizeof(got)),
			 sizeof(acl));
	assert_int_equal(got[ACL_MASK_PERM], 4);
	assert_int_equal(fs_getxattr(w->fs, f, ACL_DEFAULT, NULL, 0), -ENODATA);
	OK(fs_mkdir(w->fs, &cred, dir, "d", 0777, &e));
	assert_int_equal(e.st.st_mode & 07777, 0674);
	assert_int_equal(fs_getxattr(w->fs, e.ino, ACL_DEFAULT, got, sizeof(got)),
			 sizeof(acl));
	assert_memory_equal(got, acl, sizeof(acl));
}

/* ---- contents: against a model ----------------------------------------------------------------- */

#define MODEL_BYTES (3 << 20)

struct model {
	uint64_t ino;
	size_t size;
	uint8_t *bytes;
};

static size_t pick(size_t n) { return n ? (size_t)rand_r(&seed) % n : 0; }

/* Mostly small, sometimes aligned, sometimes large. */
static size_t pick_len(void)
{
	switch (pick(4)) {
	case 0:
		return 1 + pick(100);
	case 1:
		return BLOCK * (1 + pick(16));
	case 2:
		return 1 + pick(20000);
	default:
		return 1 + pick(600000);
	}
}

static size_t pick_off(size_t limit)
{
	size_t off = pick(limit);

	return pick(3) ? off : off & ~(size_t)(BLOCK - 1);
}

static void model_extend(struct model *m, size_t to)
{
	if (to <= m->size)
		return;
	memset(m->bytes + m->size, 0, to - m->size);
	m->size = to;
}

static void model_check(struct world *w, struct model *m)
{
	uint8_t *got = malloc(MODEL_BYTES + 1);
	ssize_t n = get(w, m->ino, got, MODEL_BYTES + 1, 0);

	assert_int_equal(stat_of(w, m->ino).st_size, m->size);
	assert_int_equal(n, m->size);
	for (size_t i = 0; i < m->size; i++)
		if (got[i] != m->bytes[i])
			fail_msg("byte %zu of %zu is %02x, not %02x", i, m->size,
				 got[i], m->bytes[i]);
	free(got);
}

static void step_write(struct world *w, struct model *m)
{
	size_t off = pick_off(MODEL_BYTES - 1), len = pick_len();
	uint8_t fill = (uint8_t)(1 + pick(255));
	size_t old = m->size;

	if (len > MODEL_BYTES - off)
		len = MODEL_BYTES - off;
	if (off + len > m->size)
		model_extend(m, off + len);
	(void)old;
	for (size_t i = 0; i < len; i++)
		m->bytes[off + i] = (uint8_t)(fill + i % 251);
	assert_int_equal(fs_write(w->fs, m->ino, m->bytes + off, len, (off_t)off,
				  0), len);
}

static void step_resize(struct world *w, struct model *m)
{
	size_t to = pick_off(MODEL_BYTES);

	resize(w, m->ino, (off_t)to);
	if (to > m->size)
		model_extend(m, to);
	m->size = to;
}

static void step_fallocate(struct world *w, struct model *m)
{
	static const int modes[] = {
		0, FALLOC_FL_KEEP_SIZE,
		FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		FALLOC_FL_ZERO_RANGE,
		FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE};
	size_t off = pick_off(MODEL_BYTES - 1), len = pick_len();
	int mode = modes[pick(5)];

	if (len > MODEL_BYTES - off)
		len = MODEL_BYTES - off;
	OK(fs_fallocate(w->fs, m->ino, mode, (off_t)off, (off_t)len));
	if (!(mode & FALLOC_FL_KEEP_SIZE))
		model_extend(m, off + len);
	if (mode & ~FALLOC_FL_KEEP_SIZE)
		for (size_t i = off; i < off + len && i < m->size; i++)
			m->bytes[i] = 0;
}

static void step_copy(struct world *w, struct model *a, struct model *b)
{
	size_t off = pick_off(a->size), to = pick_off(MODEL_BYTES / 2);
	size_t len = pick_len();
	ssize_t n;

	if (!pick(3))
		to = (to & ~(size_t)(BLOCK - 1)) | (off & (BLOCK - 1));
	if (len > MODEL_BYTES - to)
		len = MODEL_BYTES - to;
	n = fs_copy_file_range(w->fs, a->ino, (off_t)off, b->ino, (off_t)to, len);
	if (n == -EINVAL && a == b)
		return;
	OK(n);
	assert_int_equal(n, off >= a->size ? 0
			 : len < a->size - off ? len : a->size - off);
	if (!n)
		return;
	model_extend(b, to + (size_t)n);
	memcpy(b->bytes + to, a->bytes + off, (size_t)n);
}

/* More runs give way than one transaction can cut, and full ones come. */
static void a_copy_goes_over_many_runs(void **state)
{
	struct world *w = *state;
	uint64_t src = make(w, ROOT_INO, "src"), dst = make(w, ROOT_INO, "dst");
	size_t full = 8 * 64 * BLOCK, len = 10000 * BLOCK;
	char *buf = malloc(full), *back = malloc(full);
	size_t done = 0;

	for (size_t i = 0; i < full; i++)
		buf[i] = (char)pick(256);
	assert_int_equal(fs_write(w->fs, src, buf, full, 0, 0), full);
	put(w, src, "end", (off_t)len);
	for (unsigned i = 0; i < 3000; i++)
		put(w, dst, "old", (off_t)i * 2 * BLOCK);
	while (done < len + 3) {
		ssize_t n = fs_copy_file_range(w->fs, src, (off_t)done, dst,
					       (off_t)done, len + 3 - done);

		OK(n);
		assert_true(n > 0);
		done += (size_t)n;
	}
	assert_int_equal(get(w, dst, back, full, 0), full);
	assert_memory_equal(back, buf, full);
	assert_int_equal(get(w, dst, back, full, (off_t)full), full);
	for (size_t i = 0; i < full; i++)
		assert_int_equal(back[i], 0);
	free(buf);
	free(back);
}

/* Each block of it a run of its own, and shared. */
static void a_write_goes_over_many_shared_runs(void **state)
{
	struct world *w = *state;
	uint64_t src = make(w, ROOT_INO, "src"), dst = make(w, ROOT_INO, "dst");
	size_t len = 1000 * BLOCK;
	char *buf = malloc(len), *back = malloc(len);

	memset(buf, 'x', len);
	for (size_t at = len; at; at -= BLOCK)
		assert_int_equal(fs_write(w->fs, src, buf, BLOCK,
					  (off_t)(at - BLOCK), 0), BLOCK);
	assert_int_equal(fs_copy_file_range(w->fs, src, 0, dst, 0, len), len);
	memset(buf, 'y', len);
	assert_int_equal(fs_write(w->fs, src, buf, len, 0, 0), len);
	assert_int_equal(get(w, src, back, len, 0), len);
	assert_memory_equal(back, buf, len);
	memset(buf, 'x', len);
	assert_int_equal(get(w, dst, back, len, 0), len);
	assert_memory_equal(back, buf, len);
	free(buf);
	free(back);
}

/* One run that goes meets many references; many runs go at once. */
static void a_file_goes_whose_blocks_are_shared_one_by_one(void **state)
{
	struct world *w = *state;
	uint64_t src = make(w, ROOT_INO, "src"), dst = make(w, ROOT_INO, "dst");
	size_t blks = 100 * 64;
	char *buf = calloc(blks, BLOCK);
	struct statvfs before, after;

	OK(fs_statfs(w->fs, &before));
	for (size_t i = 0; i < blks * BLOCK; i += 64)
		buf[i] = (char)pick(256);
	assert_int_equal(fs_write(w->fs, src, buf, blks * BLOCK, 0, 0), blks * BLOCK);
	for (size_t i = 0; i < blks; i += 2)
		assert_int_equal(fs_copy_file_range(w->fs, src, (off_t)(i * BLOCK),
						    dst, (off_t)(i * BLOCK), BLOCK),
				 BLOCK);
	OK(fs_unlink(w->fs, ROOT_INO, "src"));
	fs_forget(w->fs, src, 1);
	OK(volume_sync(w->v));
	OK(volume_checkpoint(w->v));
	OK(fs_statfs(w->fs, &after));
	assert_true(before.f_bfree - after.f_bfree < blks / 2 + 100);
	free(buf);
}

static void step_seek(struct world *w, struct model *m)
{
	off_t at = 0, hole;

	/* What lies between data must be zero, and the walk must end. */
	while ((at = fs_lseek(w->fs, m->ino, at, SEEK_HOLE)) >= 0 &&
	       (size_t)at < m->size) {
		hole = at;
		at = fs_lseek(w->fs, m->ino, at, SEEK_DATA);
		if (at < 0)
			at = (off_t)m->size;
		assert_true(at > hole);
		for (off_t i = hole; i < at; i++)
			assert_int_equal(m->bytes[i], 0);
	}
}

static void contents_are_those_of_a_model(void **state)
{
	struct world *w = *state;
	struct model m[2];

	for (int i = 0; i < 2; i++) {
		m[i].ino = make(w, ROOT_INO, i ? "b" : "a");
		m[i].size = 0;
		m[i].bytes = calloc(1, MODEL_BYTES);
	}
	for (int step = 0; step < 1500; step++) {
		struct model *x = &m[pick(2)];

		switch (pick(8)) {
		case 0: case 1: case 2:
			step_write(w, x);
			break;
		case 3:
			step_resize(w, x);
			break;
		case 4:
			step_fallocate(w, x);
			break;
		case 5: case 6:
			step_copy(w, x, &m[pick(2)]);
			break;
		default:
			step_seek(w, x);
		}
		if (!pick(20))
			model_check(w, &m[pick(2)]);
		if (!pick(100))
			OK(volume_tick(w->v));
		if (!pick(300))
			world_again(w);
	}
	for (int i = 0; i < 2; i++) {
		model_check(w, &m[i]);
		free(m[i].bytes);
	}
}

static void blocks_come_back(void **state)
{
	struct world *w = *state;
	struct statvfs before, after;
	uint64_t ino;
	char *buf = malloc(1 << 20);

	memset(buf, 'x', 1 << 20);
	OK(volume_checkpoint(w->v));
	fs_statfs(w->fs, &before);
	ino = make(w, ROOT_INO, "f");
	for (int i = 0; i < 16; i++)
		OK(fs_write(w->fs, ino, buf, 1 << 20, (off_t)i << 20, 0));
	assert_int_equal(stat_of(w, ino).st_blocks, 16 << 11);
	OK(fs_fallocate(w->fs, ino, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			1 << 20, 4 << 20));
	assert_int_equal(stat_of(w, ino).st_blocks, 12 << 11);
	resize(w, ino, 6 << 20);
	assert_int_equal(stat_of(w, ino).st_blocks, 2 << 11);
	OK(fs_unlink(w->fs, ROOT_INO, "f"));
	fs_forget(w->fs, ino, 1);
	OK(volume_checkpoint(w->v));
	OK(volume_checkpoint(w->v));
	fs_statfs(w->fs, &after);
	assert_in_range(after.f_bfree, before.f_bfree - 64, before.f_bfree + 64);
	free(buf);
}

struct churn {
	struct world *w;
	uint64_t ino;
	char bytes[256 << 10];
	_Atomic bool ended;
};

/* Files come and go, checkpoints pass. Of the volume's own blocks some are
 * always on their way from one place to another. */
static void *churn(void *arg)
{
	struct churn *c = arg;
	char name[16];

	for (int i = 0; i < 400; i++) {
		struct fs_entry e;

		snprintf(name, sizeof(name), "c%d", i % 50);
		if (i % 100 < 50) {
			OK(fs_mknod(c->w->fs, &cred, ROOT_INO, name, S_IFREG,
				    0, &e));
			fs_forget(c->w->fs, e.ino, 1);
		} else {
			OK(fs_unlink(c->w->fs, ROOT_INO, name));
		}
		OK(fs_write(c->w->fs, c->ino, c->bytes, sizeof(c->bytes), 0, 0));
		OK(fs_fallocate(c->w->fs, c->ino,
				FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
				sizeof(c->bytes)));
		OK(volume_checkpoint(c->w->v));
	}
	atomic_store(&c->ended, true);
	return NULL;
}

static void statfs_is_true_while_checkpoints_pass(void **state)
{
	struct churn c = {.w = *state};
	struct statvfs before, now;
	pthread_t thread;

	c.ino = make(c.w, ROOT_INO, "f");
	OK(volume_checkpoint(c.w->v));
	fs_statfs(c.w->fs, &before);
	assert_int_equal(pthread_create(&thread, NULL, churn, &c), 0);
	while (!atomic_load(&c.ended)) {
		fs_statfs(c.w->fs, &now);
		/* the file's; nodes and bitmaps, old and new */
		assert_in_range(now.f_bfree,
				before.f_bfree - sizeof(c.bytes) / BLOCK - 24,
				before.f_bfree + 8);
	}
	pthread_join(thread, NULL);
}

static void a_full_volume_can_be_emptied_and_filled_again(void **state)
{
	struct world *w = *state;
	char *buf = malloc(1 << 20), name[16];
	unsigned filled[2];

	memset(buf, 'x', 1 << 20);
	for (int round = 0; round < 2; round++) {
		ssize_t n = 1;

		for (filled[round] = 0; n > 0; filled[round] += n > 0) {
			struct fs_entry e;

			snprintf(name, sizeof(name), "f%u", filled[round]);
			n = fs_mknod(w->fs, &cred, ROOT_INO, name, 0644, 0, &e);
			if (n < 0)
				break;
			fs_forget(w->fs, e.ino, 1);
			n = fs_write(w->fs, e.ino, buf, 1 << 20, 0, 0);
		}
		assert_int_equal(n, -ENOSPC);
		assert_true(filled[round] > 40);
		/* What is there can be written again. */
		assert_int_equal(fs_write(w->fs, find(w, ROOT_INO, "f0"), buf,
					  BLOCK, 0, 0), BLOCK);
		for (unsigned i = 0; i <= filled[round]; i++) {
			snprintf(name, sizeof(name), "f%u", i);
			if (find(w, ROOT_INO, name))
				OK(fs_unlink(w->fs, ROOT_INO, name));
		}
	}
	assert_in_range(filled[1], filled[0] - 1, filled[0] + 1);
	free(buf);
}

/* ---- a full volume ----------------------------------------------------------------- */

/* The world anew, of another size. */
static void world_of(struct world *w, uint64_t bytes)
{
	world_close(w);
	image_close(w->im);
	world_make(w, bytes);
}

static uint64_t avail(struct world *w)
{
	struct statvfs st;

	OK(volume_checkpoint(w->v));
	OK(volume_checkpoint(w->v));
	fs_statfs(w->fs, &st);
	return st.f_bavail;
}

/* Write the file on until not a block is to be had. Returns its blocks. */
static unsigned fill(struct world *w, uint64_t ino)
{
	static char buf[1 << 20];
	size_t at = 0;

	memset(buf, 'f', sizeof(buf));
	for (size_t step = sizeof(buf); step >= BLOCK;) {
		ssize_t n = fs_write(w->fs, ino, buf, step, (off_t)at, 0);

		if (n != (ssize_t)step)
			assert_true(n == -ENOSPC || n > 0);
		if (n > 0)
			at += (size_t)n;
		else
			step /= 2;
	}
	return (unsigned)(at / BLOCK);
}

/* Write blocks of the file in any order, as long as that is granted. */
static void overwrite(struct world *w, uint64_t ino, unsigned blocks, unsigned n)
{
	static const char buf[BLOCK] = "over";
	unsigned r = 1;

	while (n--) {
		off_t at = (off_t)(rand_r(&r) % blocks) * BLOCK;
		ssize_t got = fs_write(w->fs, ino, buf, BLOCK, at, 0);

		assert_true(got == BLOCK || got == -ENOSPC);
		if (got < 0)
			break;
	}
}

static void remove_it(struct world *w, const char *name)
{
	uint64_t ino = find(w, ROOT_INO, name);

	OK(fs_unlink(w->fs, ROOT_INO, name));
	fs_forget(w->fs, ino, 1);
}

/* All that changes a full volume without freeing, until it is refused. */
static void wear_out(struct world *w, uint64_t ino, uint64_t clone, unsigned blocks)
{
	unsigned r = 2;

	overwrite(w, ino, blocks, 4 * blocks);
	overwrite(w, clone, blocks, 4 * blocks);
	for (unsigned i = 0; i < blocks; i++) {
		off_t at = (off_t)(rand_r(&r) % blocks) * BLOCK;
		int err = fs_fallocate(w->fs, clone, FALLOC_FL_PUNCH_HOLE |
				       FALLOC_FL_KEEP_SIZE, at, i % 2 ? BLOCK : 100);

		assert_true(err == 0 || err == -ENOSPC);
		if (err)
			break;
	}
	overwrite(w, ino, blocks, 4 * blocks);
}

static void a_full_volume_that_was_worn_out_can_be_emptied(void **state)
{
	static const uint64_t sizes[] = {2 << 20, 16 << 20, 64 << 20};
	struct world *w = *state;

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		uint64_t ino, clone, before;
		unsigned blocks;

		world_of(w, sizes[i]);
		before = avail(w);
		clone = make(w, ROOT_INO, "clone");
		ino = make(w, ROOT_INO, "f");
		fill(w, ino);
		resize(w, ino, (off_t)stat_of(w, ino).st_size / 8 * 7);
		blocks = (unsigned)(stat_of(w, ino).st_size / BLOCK);
		OK(fs_copy_file_range(w->fs, ino, 0, clone, 0, blocks * BLOCK));
		fill(w, make(w, ROOT_INO, "rest"));
		wear_out(w, ino, clone, blocks);
		remove_it(w, "f");
		remove_it(w, "rest");
		remove_it(w, "clone");
		assert_in_range(avail(w), before - 8, before);
		world_again(w);
		assert_in_range(avail(w), before - 8, before);
		assert_in_range(fill(w, make(w, ROOT_INO, "f")), blocks, before);
		remove_it(w, "f");
	}
}

/* Values of xattrs, an eighth of the volume of them; or none. */
static void set_values(struct world *w, uint64_t ino, uint64_t bytes, bool there)
{
	static const char value[16000] = "value";
	char name[16];

	for (uint64_t i = 0; i < bytes / 8 / sizeof(value); i++) {
		snprintf(name, sizeof(name), "user.%u", (unsigned)i);
		if (there)
			OK(fs_setxattr(w->fs, &cred, ino, name, value,
				       sizeof(value), 0));
		else
			OK(fs_removexattr(w->fs, &cred, ino, name));
	}
}

static void what_is_free_can_be_had_though_nodes_had_it(void **state)
{
	static const uint64_t sizes[] = {2 << 20, 16 << 20, 64 << 20};
	struct world *w = *state;

	for (size_t i = 0; i < 2 * sizeof(sizes) / sizeof(sizes[0]); i++) {
		uint64_t bytes = sizes[i / 2], most = bytes / BLOCK / 64 + 8;
		uint64_t before, ino, free;

		/* With a journal that holds it all, they are gone before a
		 * checkpoint has seen them. */
		world_close(w);
		image_close(w->im);
		world_make_with(w, bytes, bytes / 4);
		ino = make(w, ROOT_INO, "f");
		before = avail(w);
		set_values(w, ino, bytes, true);
		if (i % 2)
			OK(volume_checkpoint(w->v));
		set_values(w, ino, bytes, false);
		assert_in_range(avail(w), before - 8, before);
		free = alloc_free_units(volume_alloc(w->v));
		assert_in_range(free, before - most, before);
		OK(fs_fallocate(w->fs, ino, 0, 0, (off_t)(free - free / 16) * BLOCK));
	}
}

/* A tree of many nodes, at no cost: many runs that share some blocks. */
static void many_nodes(struct world *w, const char *name, unsigned runs)
{
	static char buf[MAP_MAX * BLOCK];
	uint64_t few = make(w, ROOT_INO, "few"), many = make(w, ROOT_INO, name);

	memset(buf, 'm', sizeof(buf));
	OK(fs_write(w->fs, few, buf, sizeof(buf), 0, 0));
	for (unsigned i = 0; i < runs; i++)
		OK(fs_copy_file_range(w->fs, few, 0, many,
				      (off_t)i * (off_t)sizeof(buf), sizeof(buf)));
}

/* Set aside what is left, to the last block. */
static void fill_aside(struct world *w, uint64_t ino)
{
	off_t at = 0;

	for (off_t step = (off_t)1 << 50; step >= BLOCK;) {
		int err = fs_fallocate(w->fs, ino, 0, at, step);

		assert_true(err == 0 || err == -ENOSPC);
		if (err)
			step /= 2;
		else
			at += step;
	}
}

static void large_files_can_be_removed_from_a_full_volume(void **state)
{
	static char buf[BLOCK] = "x";
	struct world *w = *state;
	uint64_t ino, before;

	world_of(w, 4ull << 30);
	before = avail(w);
	ino = make(w, ROOT_INO, "pieces");
	for (off_t i = 0; i < 6000; i++)
		OK(fs_write(w->fs, ino, buf, BLOCK, i * 2 * BLOCK, 0));
	many_nodes(w, "many", 40000);
	fill_aside(w, make(w, ROOT_INO, "rest"));
	remove_it(w, "pieces");
	assert_in_range(avail(w), 5000, before);
	remove_it(w, "many");
	remove_it(w, "few");
	remove_it(w, "rest");
	assert_in_range(avail(w), before - 64, before);
	put(w, make(w, ROOT_INO, "again"), "once more", 0);
}

enum order { UP, DOWN, SHUFFLED, SHARED };

/* Every block that was set aside can be written, one by one, in any order. */
static void write_aside(struct world *w, enum order order, uint64_t bytes)
{
	char buf[BLOCK] = "aside";
	unsigned r = 3, blocks, *at;
	uint64_t ino, clone;

	world_of(w, bytes);
	ino = make(w, ROOT_INO, "f");
	fill_aside(w, ino);
	blocks = (unsigned)(stat_of(w, ino).st_size / BLOCK);
	assert_in_range(blocks, bytes / BLOCK / 4 * 3, bytes / BLOCK);
	if (order == SHARED) {
		clone = make(w, ROOT_INO, "clone");
		OK(fs_copy_file_range(w->fs, ino, 0, clone, 0, blocks * (size_t)BLOCK));
	}
	fill(w, make(w, ROOT_INO, "rest"));
	overwrite(w, find(w, ROOT_INO, "rest"), 1, 10);
	at = malloc(blocks * sizeof(*at));
	for (unsigned i = 0; i < blocks; i++) {
		unsigned j = order >= SHUFFLED ? (unsigned)rand_r(&r) % (i + 1) : i;

		at[i] = at[j];
		at[j] = i;
	}
	for (unsigned i = 0; i < blocks; i++) {
		unsigned b = order == DOWN ? blocks - 1 - i : at[i];

		if (i == blocks / 2)
			world_again(w);
		memcpy(buf + 8, &b, sizeof(b));
		OK(fs_write(w->fs, ino, buf, BLOCK, (off_t)b * BLOCK, 0));
		if (i % 64 == 0)
			OK(fs_fsync(w->fs, ino, false));
	}
	world_again(w);
	for (unsigned b = 0; b < blocks; b++) {
		assert_int_equal(get(w, ino, buf, BLOCK, (off_t)b * BLOCK), BLOCK);
		assert_memory_equal(buf + 8, &b, sizeof(b));
	}
	free(at);
	OK(fs_unlink(w->fs, ROOT_INO, "f"));
}

static void what_was_set_aside_can_be_written_on_a_full_volume(void **state)
{
	struct world *w = *state;

	write_aside(w, SHUFFLED, 4 << 20);
	for (enum order order = UP; order <= SHARED; order++)
		write_aside(w, order, 32 << 20);
}

static void a_full_volume_of_600_gib_takes_checkpoints(void **state)
{
	struct world *w = *state;
	uint64_t ino, before;

	world_of(w, 600ull << 30);
	before = avail(w);
	ino = make(w, ROOT_INO, "rest");
	fill_aside(w, ino);
	/* Every bitmap has to be written anew, and once more. */
	for (int round = 0; round < 2; round++) {
		off_t at = round * BLOCK;

		for (; at < (off_t)600 << 30; at += (off_t)128 << 20)
			OK(fs_fallocate(w->fs, ino, FALLOC_FL_PUNCH_HOLE |
					FALLOC_FL_KEEP_SIZE, at, BLOCK));
		OK(volume_checkpoint(w->v));
	}
	world_again(w);
	OK(fs_unlink(w->fs, ROOT_INO, "rest"));
	assert_in_range(avail(w), before - 64 - (1u << 13), before);
	world_again(w);
	put(w, make(w, ROOT_INO, "again"), "once more", 0);
}

/* ---- what the host gets back ------------------------------------------------------- */

/* Blocks that discards have named; what is done in the midst of a large one. */
static struct {
	const struct image_ops *real;
	struct image_ops ops;
	uint8_t times[VOLUME_BYTES / BLOCK];
	void (*during)(void *arg);
	void *arg;
} punched;

static int note_discard(struct image *im, uint64_t off, uint64_t len)
{
	void (*during)(void *arg) = len >= 1 << 20 ? punched.during : NULL;

	for (uint64_t b = off / BLOCK; b < (off + len) / BLOCK; b++)
		punched.times[b]++;
	if (during) {
		punched.during = NULL;
		during(punched.arg);
	}
	return punched.real->discard(im, off, len);
}

static void note_discards(struct world *w)
{
	memset(&punched, 0, sizeof(punched));
	punched.real = w->im->ops;
	punched.ops = *w->im->ops;
	punched.ops.discard = note_discard;
	w->im->ops = &punched.ops;
}

static void a_trim_punches_what_is_free_in_its_range_once(void **state)
{
	struct world *w = *state;
	uint64_t done, from = 0, free = 0, ino;
	struct extent e;

	/* Free and used blocks by turns, in part of the range. */
	ino = make(w, ROOT_INO, "f");
	OK(fs_fallocate(w->fs, ino, 0, 0, 8000 * BLOCK));
	for (off_t i = 0; i < 8000; i += 16)
		OK(fs_fallocate(w->fs, ino, FALLOC_FL_PUNCH_HOLE |
				FALLOC_FL_KEEP_SIZE, i * BLOCK, 8 * BLOCK));
	OK(volume_checkpoint(w->v));
	note_discards(w);
	/* From within a run, to within a run. */
	OK(fs_trim(w->fs, 5000 * BLOCK, 6000 * BLOCK, 0, &done));
	for (uint64_t b = 0; b < VOLUME_BYTES / BLOCK; b++)
		assert_true(punched.times[b] <= (b >= 5000 && b < 11000));
	while (!alloc_next_free(volume_alloc(w->v), from, &e)) {
		for (from = e.start; from < e.start + e.len; from++) {
			if (from < 5000 || from >= 11000)
				continue;
			assert_int_equal(punched.times[from], 1);
			free++;
		}
	}
	assert_in_range(free, 1000, 5999);
	assert_int_equal(done, free * BLOCK);
	w->im->ops = punched.real;
}

struct late_writer {
	struct world *w;
	pthread_t thread;
	uint64_t ino;
	unsigned blocks;
};

static void *late_fill(void *arg)
{
	struct late_writer *l = arg;

	l->blocks = fill(l->w, l->ino);
	return NULL;
}

/* He comes while blocks are being punched. On a busy machine he may come later. */
static void begin_to_fill(void *arg)
{
	struct late_writer *l = arg;

	assert_int_equal(pthread_create(&l->thread, NULL, late_fill, l), 0);
	usleep(200000);
}

static void blocks_that_are_being_punched_are_waited_for(void **state)
{
	struct world *w = *state;
	struct late_writer l = {.w = w};
	unsigned blocks;
	uint64_t done;

	l.ino = make(w, ROOT_INO, "f");
	blocks = fill(w, l.ino);
	resize(w, l.ino, (off_t)(blocks - 512) * BLOCK);
	OK(volume_checkpoint(w->v));
	OK(volume_checkpoint(w->v));
	l.ino = make(w, ROOT_INO, "more");
	note_discards(w);
	punched.during = begin_to_fill;
	punched.arg = &l;
	OK(fs_trim(w->fs, 0, VOLUME_BYTES, 0, &done));
	assert_null(punched.during);
	pthread_join(l.thread, NULL);
	assert_in_range(l.blocks, 512 - 16, 512 + 16);
	w->im->ops = punched.real;
}

/* A host that is full, and has no blocks for the ring: the copy was sparse. */
static struct {
	const struct image_ops *real;
	struct image_ops ops;
	uint64_t from, to;
} holes;

static int ensure_not_in_holes(struct image *im, uint64_t off, uint64_t len)
{
	if (off < holes.to && off + len > holes.from)
		return -ENOSPC;
	return holes.real->ensure(im, off, len);
}

static void the_rings_blocks_are_asked_for_at_once(void **state)
{
	struct world *w = *state;
	const struct disk_super *s = volume_super(w->v);
	struct volume_options o = {.no_threads = true};
	char msg[256];

	holes.from = get64(s->journal_block) * BLOCK;
	holes.to = holes.from + get64(s->journal_units) * JOURNAL_UNIT;
	holes.real = w->im->ops;
	holes.ops = *w->im->ops;
	holes.ops.ensure = ensure_not_in_holes;
	world_close(w);
	w->im->ops = &holes.ops;
	assert_int_equal(volume_open(w->im, &o, &w->v, msg, sizeof(msg)), -ENOSPC);
	assert_non_null(strstr(msg, "the disk that holds the image is full"));
	o.readonly = true;
	OK(volume_open(w->im, &o, &w->v, msg, sizeof(msg)));
	OK(volume_close(w->v));
	w->im->ops = holes.real;
	world_open(w);
}

/* A host that is to give no more blocks than it has given. */
static struct {
	const struct image_ops *real;
	struct image_ops ops;
	bool *has, full;
} host;

static int host_give(uint64_t off, uint64_t len)
{
	for (uint64_t b = off / BLOCK; b * BLOCK < off + len; b++) {
		if (host.full && !host.has[b])
			return -ENOSPC;
		host.has[b] = true;
	}
	return 0;
}

static int host_ensure_given(struct image *im, uint64_t off, uint64_t len)
{
	int r = host_give(off, len);

	return r ? r : host.real->ensure(im, off, len);
}

static int host_pwrite(struct image *im, const void *buf, size_t len, uint64_t off)
{
	int r = host_give(off, len);

	return r ? r : host.real->pwrite(im, buf, len, off);
}

static int host_mapped(struct image *im, uint64_t *off, uint64_t *len)
{
	uint64_t b = *off / BLOCK, blocks = im->bytes / BLOCK, end;

	while (b < blocks && !host.has[b])
		b++;
	for (end = b; end < blocks && host.has[end]; end++)
		;
	*off = b * BLOCK;
	*len = (end - b) * BLOCK;
	return b < blocks ? 0 : -ENOENT;
}

/* In each bitmap all but a block is freed: a checkpoint has to write each. */
static void a_full_host_lets_blocks_of_many_bitmaps_be_freed(void **state)
{
	const off_t bytes = 128ll << 30, piece = 128 << 20, used = bytes / 8 * 7;
	const struct disk_super *s;
	struct world *w = *state;
	uint64_t ino;

	world_of(w, (uint64_t)bytes);
	s = volume_super(w->v);
	host.has = calloc((size_t)(bytes / BLOCK), 1);
	assert_non_null(host.has);
	host.real = w->im->ops;
	host.ops = *w->im->ops;
	host.ops.ensure = host_ensure_given;
	host.ops.pwrite = host_pwrite;
	host.ops.mapped = host_mapped;
	OK(host_give(0, get64(s->journal_block) * BLOCK +
				get64(s->journal_units) * JOURNAL_UNIT));
	world_close(w);
	w->im->ops = &host.ops;
	world_open(w);
	ino = make(w, ROOT_INO, "f");
	OK(fs_fallocate(w->fs, ino, 0, 0, used));
	/* All that will be free and is the host's already. */
	for (off_t at = 0; at < used; at += piece)
		OK(fs_write(w->fs, ino, "data", 4, at + BLOCK, 0));
	world_again(w);
	ino = find(w, ROOT_INO, "f");
	host.full = true;
	for (off_t at = 0; at < used; at += piece)
		OK(fs_fallocate(w->fs, ino,
				FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				at + BLOCK, piece - BLOCK));
	OK(volume_checkpoint(w->v));
	world_again(w);
	assert_int_equal(stat_of(w, find(w, ROOT_INO, "f")).st_blocks,
			 used / piece * BLOCK / 512);
	host.full = false;
	world_close(w);
	w->im->ops = host.real;
	free(host.has);
	world_open(w);
}

/* Somebody has begun to free a file, and takes his time. */
static void *free_slowly(void *arg)
{
	struct world *w = arg;

	usleep(100000);
	remove_it(w, "f");
	__atomic_sub_fetch(&w->fs->evicting, 1, __ATOMIC_ACQ_REL);
	return NULL;
}

static void a_file_without_a_name_waits_for_what_is_freed(void **state)
{
	struct world *w = *state;
	struct fs_entry e;
	pthread_t thread;
	char name[16];
	int err = 0;

	/* Not a node is left. */
	fill(w, make(w, ROOT_INO, "f"));
	for (unsigned i = 0; !err; i++) {
		snprintf(name, sizeof(name), "d%u", i);
		err = fs_mkdir(w->fs, &cred, ROOT_INO, name, 0755, &e);
	}
	assert_int_equal(err, -ENOSPC);
	__atomic_add_fetch(&w->fs->evicting, 1, __ATOMIC_ACQ_REL);
	assert_int_equal(pthread_create(&thread, NULL, free_slowly, w), 0);
	err = fs_tmpfile(w->fs, &cred, ROOT_INO, 0644, &e);
	pthread_join(thread, NULL);
	OK(err);
	fs_forget(w->fs, e.ino, 1);
}

/* ---- threads -------------------------------------------------------------------------------------- */

#define STORM_DIRS 4
#define STORM_NAMES 6

struct storm {
	struct world *w;
	uint64_t dir[STORM_DIRS];
	unsigned seed;
};

static int storm_allowed(int err)
{
	switch (err) {
	case 0: case -ENOENT: case -EEXIST: case -ENOTEMPTY: case -EISDIR:
	case -ENOTDIR: case -EINVAL: case -EPERM: case -ESTALE:
		return 1;
	}
	return err > 0;
}

static void *storm_run(void *arg)
{
	struct storm *s = arg;
	struct fs *fs = s->w->fs;

	for (int i = 0; i < 3000; i++) {
		uint64_t d = s->dir[rand_r(&s->seed) % STORM_DIRS];
		uint64_t d2 = s->dir[rand_r(&s->seed) % STORM_DIRS];
		char n[2] = {(char)('a' + rand_r(&s->seed) % STORM_NAMES), 0};
		char n2[2] = {(char)('a' + rand_r(&s->seed) % STORM_NAMES), 0};
		struct fs_entry e = {0};
		bool counted = false;
		int err;

		switch (rand_r(&s->seed) % 8) {
		case 0:
			err = fs_mknod(fs, &cred, d, n, 0644, 0, &e);
			counted = !err;
			break;
		case 1:
			err = fs_mkdir(fs, &cred, d, n, 0755, &e);
			counted = !err;
			break;
		case 2:
			err = fs_unlink(fs, d, n);
			break;
		case 3:
			err = fs_rmdir(fs, d, n);
			break;
		case 4:
			err = fs_rename(fs, &cred, d, n, d2, n2, 0);
			break;
		case 5:
			err = fs_rename(fs, &cred, d, n, d2, n2, RENAME_EXCHANGE);
			break;
		case 6:
			err = fs_lookup(fs, d, n, &e);
			counted = !err;
			if (counted && S_ISREG(e.st.st_mode))
				err = (int)fs_write(fs, e.ino, n, 1, 5000, 0);
			break;
		default:
			err = fs_lookup(fs, d, n, &e);
			counted = !err;
			if (!err && !fs_link(fs, e.ino, d2, n2, &e))
				fs_forget(fs, e.ino, 1);
		}
		if (counted)
			fs_forget(fs, e.ino, 1);
		if (!storm_allowed(err))
			return (void *)(intptr_t)err;
	}
	return NULL;
}

static int tally(void *ctx, const char *name, const struct fs_entry *e, uint64_t next)
{
	unsigned *dirs = ctx;

	(void)next;
	if (strcmp(name, ".") && strcmp(name, "..") && S_ISDIR(e->st.st_mode))
		++*dirs;
	return 0;
}

static void threads_leave_the_counts_right(void **state)
{
	struct world *w = *state;
	struct storm s[4];
	pthread_t t[4];
	char name[8];
	void *err;

	for (int i = 0; i < STORM_DIRS; i++) {
		snprintf(name, sizeof(name), "dir%d", i);
		s[0].dir[i] = make_dir(w, ROOT_INO, name);
	}
	for (int i = 0; i < 4; i++) {
		memcpy(s[i].dir, s[0].dir, sizeof(s[0].dir));
		s[i].w = w;
		s[i].seed = seed + (unsigned)i;
		pthread_create(&t[i], NULL, storm_run, &s[i]);
	}
	for (int i = 0; i < 4; i++) {
		pthread_join(t[i], &err);
		OK((intptr_t)err);
	}
	world_again(w);
	for (int i = 0; i < STORM_DIRS; i++) {
		unsigned dirs = 0;

		OK(fs_readdir(w->fs, s[0].dir[i], 0, false, tally, &dirs));
		assert_int_equal(stat_of(w, s[0].dir[i]).st_nlink, 2 + dirs);
	}
}

static void lookup_counts_are_exact(void **state)
{
	enum { INOS = 3000 };
	unsigned *model = calloc(INOS, sizeof(*model));
	struct counts *c = malloc(sizeof(*c));

	(void)state;
	counts_init(c);
	for (int i = 0; i < 300000; i++) {
		/* Waves, so that the tables grow and shrink. */
		bool add = pick(100) < ((i / 30000) % 2 ? 30u : 70u);
		size_t ino = pick(INOS);

		if (add) {
			OK(counts_add(c, ino + 1));
			model[ino]++;
		} else if (model[ino]) {
			assert_false(counts_sub(c, ino + 1, 1));
			model[ino]--;
		}
	}
	for (size_t ino = 0; ino < INOS; ino++) {
		/* No entry: to be freed at once. Else with the last count. */
		bool now = counts_orphan(c, ino + 1);

		assert_int_equal(now, !model[ino]);
		if (!now && model[ino] > 1)
			assert_false(counts_sub(c, ino + 1, model[ino] - 1));
		if (!now)
			assert_true(counts_sub(c, ino + 1, 1));
		assert_int_equal(counts_add(c, ino + 1), -ESTALE);
		counts_evicted(c, ino + 1);
	}
	for (int i = 0; i < COUNT_SHARDS; i++)
		assert_int_equal(c->shard[i].used, 0);
	counts_fini(c);
	free(c);
	free(model);
}

/* ---- what fsck had to give up ------------------------------------------------------ */

/* As fsck.spaceweave marks file blocks blk .. blk + n - 1 of a hole. */
static void put_lost(struct world *w, uint64_t ino, uint64_t blk, uint64_t n)
{
	struct disk_map d = {.start = put64(n >> 32),
			     .len = put32((uint32_t)n),
			     .flags = put32(MAP_LOST)};
	uint8_t key[17];
	struct txn *t;

	be64_put(key, ino);
	key[8] = KEY_MAP;
	be64_put(key + 9, blk);
	OK(txn_begin(w->v, TXN_NORMAL, &t));
	OK(repair_put(t, TABLE_FILES, key, sizeof(key), &d, sizeof(d)));
	OK(txn_commit(t));
}

/* "." data, "L" lost, " " zeroes, for each of the first blocks. */
static const char *blocks_of(struct world *w, uint64_t ino, unsigned n)
{
	static char out[64];
	static char room[2 * BLOCK];

	for (unsigned i = 0; i < n; i++) {
		char *data;
		ssize_t got = fs_read(w->fs, ino, room, BLOCK, (off_t)i * BLOCK, &data);

		assert_true(got == -EBADMSG || got > 0);
		out[i] = (char)(got < 0 ? 'L' : *data ? '.' : ' ');
	}
	out[n] = 0;
	return out;
}

/* It has no blocks; yet what is cut off must not come back. */
static void a_file_of_lost_blocks_alone_is_cut(void **state)
{
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "lost"), copy = make(w, ROOT_INO, "copy");

	put_lost(w, ino, 0, 6);
	resize(w, ino, 6 * BLOCK);
	/* fsck marks the inode, and so does a copy */
	OK(fs_copy_file_range(w->fs, ino, 0, copy, 0, 6 * BLOCK));
	assert_string_equal(blocks_of(w, copy, 6), "LLLLLL");
	resize(w, copy, 2 * BLOCK);
	resize(w, copy, 6 * BLOCK);
	assert_string_equal(blocks_of(w, copy, 6), "LL    ");
}

static void what_is_lost_fails_to_read_until_it_is_written_over(void **state)
{
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "lost"), copy = make(w, ROOT_INO, "copy");
	static char data[4 * BLOCK];
	struct stat st = {.st_size = 10 * BLOCK};

	memset(data, 'x', sizeof(data));
	OK(fs_write(w->fs, ino, data, BLOCK, 0, 0));
	OK(fs_write(w->fs, ino, data, BLOCK, 9 * BLOCK, 0));
	put_lost(w, ino, 2, 6);
	assert_string_equal(blocks_of(w, ino, 10), ". LLLLLL .");
	/* it takes no space, and is no hole */
	assert_int_equal(stat_of(w, ino).st_blocks, 2 * BLOCK / 512);
	assert_int_equal(fs_lseek(w->fs, ino, BLOCK, SEEK_DATA), 2 * BLOCK);
	assert_int_equal(fs_lseek(w->fs, ino, 2 * BLOCK, SEEK_HOLE), 8 * BLOCK);
	/* a part of a block can't be written, nor read for it */
	assert_int_equal(fs_write(w->fs, ino, data, 10, 3 * BLOCK, 0), -EBADMSG);
	OK(fs_write(w->fs, ino, data, 2 * BLOCK, 3 * BLOCK, 0));
	assert_string_equal(blocks_of(w, ino, 10), ". L..LLL .");
	/* nothing is set aside where something may have been */
	OK(fs_fallocate(w->fs, ino, 0, 0, 10 * BLOCK));
	assert_string_equal(blocks_of(w, ino, 10), ". L..LLL .");
	/* a clone is as unreadable */
	OK(fs_copy_file_range(w->fs, ino, 0, copy, 0, 10 * BLOCK));
	assert_string_equal(blocks_of(w, copy, 10), ". L..LLL .");
	OK(fs_fallocate(w->fs, ino, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			5 * BLOCK, BLOCK));
	assert_string_equal(blocks_of(w, ino, 10), ". L.. LL .");
	/* cut within a lost block; grown again it is lost still, the rest is not */
	st.st_size = 6 * BLOCK + 100;
	OK(fs_setattr(w->fs, ino, FS_SET_SIZE, &st));
	st.st_size = 10 * BLOCK;
	OK(fs_setattr(w->fs, ino, FS_SET_SIZE, &st));
	assert_string_equal(blocks_of(w, ino, 10), ". L.. L   ");
	world_again(w);
	ino = find(w, ROOT_INO, "lost");
	copy = find(w, ROOT_INO, "copy");
	assert_string_equal(blocks_of(w, ino, 10), ". L.. L   ");
	assert_string_equal(blocks_of(w, copy, 10), ". L..LLL .");
	OK(fs_unlink(w->fs, ROOT_INO, "lost"));
	OK(fs_unlink(w->fs, ROOT_INO, "copy"));
}

static void as_much_is_lost_as_a_file_is_long(void **state)
{
	struct world *w = *state;
	uint64_t ino = make(w, ROOT_INO, "long"), mid = 1ull << 45;
	struct stat st = {.st_size = INT64_MAX};
	static char data[BLOCK];
	char *got;

	OK(fs_setattr(w->fs, ino, FS_SET_SIZE, &st));
	put_lost(w, ino, 5, (1ull << 51) - 5);
	OK(fs_write(w->fs, ino, data, BLOCK, (off_t)(mid * BLOCK), 0));
	world_again(w);
	ino = find(w, ROOT_INO, "long");
	assert_string_equal(blocks_of(w, ino, 7), "     LL");
	for (int i = -1; i <= 1; i++) {
		ssize_t n = fs_read(w->fs, ino, data, BLOCK,
				    (off_t)((mid + (uint64_t)(int64_t)i) * BLOCK), &got);

		assert_int_equal(n, i ? -EBADMSG : BLOCK);
	}
	assert_int_equal(fs_lseek(w->fs, ino, 0, SEEK_DATA), 5 * BLOCK);
	assert_int_equal(fs_read(w->fs, ino, data, BLOCK, INT64_MAX - 10, &got),
			 -EBADMSG);
	OK(fs_unlink(w->fs, ROOT_INO, "long"));
}

static bool marked_lost(struct world *w, uint64_t ino, bool mark)
{
	struct inode *ip;
	struct txn *t;
	bool lost;

	OK(inode_write_lock(w->fs, ino, &ip));
	if (mark) {
		OK(txn_begin(w->v, TXN_NORMAL, &t));
		inode_edit(t, ip)->flags |= INODE_LOST;
		OK(txn_commit(t));
	}
	lost = ip->a.flags & INODE_LOST;
	inode_unlock_put(w->fs, ip);
	return lost;
}

static void truncation_drops_what_is_lost(void **state)
{
	struct world *w = *state;
	uint64_t all = make(w, ROOT_INO, "all"), some = make(w, ROOT_INO, "some");

	/* of one all is lost, of the other a block stays lost at first */
	resize(w, all, 10 * BLOCK);
	put_lost(w, all, 0, 10);
	marked_lost(w, all, true);
	put(w, some, "x", 0);
	resize(w, some, 10 * BLOCK);
	put_lost(w, some, 2, 3);
	put_lost(w, some, 7, 3);
	marked_lost(w, some, true);
	resize(w, all, 0);
	resize(w, some, 3 * BLOCK);
	assert_false(marked_lost(w, all, false));
	assert_true(marked_lost(w, some, false));
	resize(w, all, 10 * BLOCK);
	resize(w, some, 10 * BLOCK);
	assert_string_equal(blocks_of(w, all, 10), "          ");
	assert_string_equal(blocks_of(w, some, 10), ". L       ");
	resize(w, some, 2 * BLOCK);
	assert_false(marked_lost(w, some, false));
	world_again(w);
	all = find(w, ROOT_INO, "all");
	some = find(w, ROOT_INO, "some");
	resize(w, some, 10 * BLOCK);
	assert_false(marked_lost(w, all, false) || marked_lost(w, some, false));
	assert_string_equal(blocks_of(w, all, 10), "          ");
	assert_string_equal(blocks_of(w, some, 10), ".         ");
}

/* ---- a small journal of a large volume ------------------------------------------------ */

#define LARGE_BYTES (256ull << 30)
#define LARGE_LEAST 483328u	/* its smallest journal, in bytes */

/* As an earlier mkfs would have made it: the ring ends sooner. */
static void journal_shorten(struct world *w, uint64_t units)
{
	world_close(w);
	for (unsigned slot = 0; slot < SUPER_SLOTS; slot++) {
		struct disk_super s;

		OK(image_pread(w->im, &s, sizeof(s), SUPER_SLOT_OFFSET(slot)));
		if (!get64(s.magic))
			continue;
		assert_true(get64(s.tail_unit) + 8 < units);
		s.journal_units = put64(units);
		super_seal(&s, slot);
		OK(image_pwrite(w->im, &s, sizeof(s), SUPER_SLOT_OFFSET(slot)));
	}
	world_open(w);
}

/* A checkpoint's own group of so many bytes, or a few less, durable. */
static int write_own(struct world *w, size_t bytes)
{
	struct deltas d = {.count = (bytes - sizeof(struct disk_group)) /
				    (sizeof(struct disk_jitem) + 16)};
	uint64_t seq, units;
	int err;

	d.v = calloc(d.count, sizeof(*d.v));
	for (size_t i = 0; i < d.count; i++)
		d.v[i] = (struct delta){.start = 5000 + 2 * i, .len = 1};
	lock_lock(&w->v->checkpoint);
	err = journal_own_group(w->v, w->v->gen, &d, &seq, &units);
	if (!err)
		err = journal_write(w->v, seq, true);
	lock_unlock(&w->v->checkpoint);
	free(d.v);
	return err;
}

/* Files, each durable, until the ring has no room for another transaction. */
static unsigned fill_journal(struct world *w)
{
	struct volume *v = w->v;
	unsigned files = 0;
	char name[16];

	while (atomic_load(&v->ring_free) >=
	       (int64_t)(v->ring_reserve + v->txn_max + 2 * JOURNAL_UNIT)) {
		snprintf(name, sizeof(name), "f%u", files++);
		make(w, ROOT_INO, name);
		OK(volume_sync(v));
	}
	return files;
}

/*
 * The ring is full, and now the checkpoint's own blocks are to go there: two
 * more of the largest have room, others are refused, and what is durable is all there.
 */
static void a_checkpoint_writes_over_nothing_that_is_needed(void **state)
{
	(void)state;
	for (unsigned small = 0; small < 2; small++) {
		struct world w = {0};
		unsigned files, owns;
		size_t own;
		char name[16];
		int err;

		world_make_with(&w, LARGE_BYTES, LARGE_LEAST);
		if (small)
			journal_shorten(&w, JOURNAL_MIN_UNITS);
		OK(volume_checkpoint(w.v));
		files = fill_journal(&w);
		assert_true(files > 8);
		own = (size_t)(w.v->ring_units * JOURNAL_UNIT - w.v->ring_room) / 3;
		/* The last checkpoint's, which is in the ring already, is smaller. */
		for (owns = 0; !(err = write_own(&w, own)); owns++)
			;
		assert_int_equal(err, -ENOSPC);
		assert_true(owns >= 2);
		OK(fs_close(w.fs));
		volume_abandon(w.v);
		world_open(&w);
		for (unsigned i = 0; i < files; i++) {
			snprintf(name, sizeof(name), "f%u", i);
			assert_int_not_equal(find(&w, ROOT_INO, name), 0);
		}
		world_close(&w);
		image_close(w.im);
	}
}

/* As many transactions as it takes, each of which gets on. */
static void a_small_journal_takes_copies_over_what_is_there(void **state)
{
	static char buf[20 * BLOCK] = "copied";
	struct world w = {0};
	uint64_t from, to;

	(void)state;
	world_make_with(&w, LARGE_BYTES, LARGE_LEAST);
	journal_shorten(&w, JOURNAL_MIN_UNITS);
	from = make(&w, ROOT_INO, "from");
	to = make(&w, ROOT_INO, "to");
	OK(fs_write(w.fs, from, buf, sizeof(buf), 0, 0));
	OK(fs_write(w.fs, to, buf, sizeof(buf), 0, 0));
	for (unsigned i = 0; i < 2; i++) {
		/* Each block a run of its own. */
		for (off_t at = 0; at < (off_t)sizeof(buf); at += 2 * BLOCK) {
			OK(fs_write(w.fs, from, buf, BLOCK, at, 0));
			OK(fs_write(w.fs, to, buf + 1, BLOCK, at, 0));
		}
		assert_int_equal(fs_copy_file_range(w.fs, from, 0, to, 0, sizeof(buf)),
				 sizeof(buf));
	}
	world_close(&w);
	image_close(w.im);
}

/* Each block of the file may be freed in another bitmap. */
static void a_small_journal_takes_writes_over_many_runs(void **state)
{
	static char buf[60 * BLOCK] = "written";
	struct world w = {0};
	uint64_t ino;

	(void)state;
	world_make_with(&w, LARGE_BYTES, LARGE_LEAST);
	journal_shorten(&w, JOURNAL_MIN_UNITS);
	ino = make(&w, ROOT_INO, "f");
	OK(fs_write(w.fs, ino, buf, sizeof(buf), 0, 0));
	for (off_t at = 0; at < (off_t)sizeof(buf); at += 2 * BLOCK)
		OK(fs_write(w.fs, ino, buf, BLOCK, at, 0));
	assert_int_equal(fs_write(w.fs, ino, buf, sizeof(buf), 0, 0), sizeof(buf));
	world_close(&w);
	image_close(w.im);
}

/* Other threads begin transactions, as many as the ring has room for. */
static void promise_all(void *ctx)
{
	struct volume *v = ctx;
	size_t bytes = v->txn_max + 2 * JOURNAL_UNIT;

	while (atomic_load(&v->ring_free) - (int64_t)bytes >=
	       (int64_t)v->ring_reserve)
		OK(ring_promise(v, bytes));
}

/* An fsync takes the data along just as others begin. */
static void what_rides_leaves_the_ring_what_is_promised(void **state)
{
	struct world *w = *state;
	struct volume *v;
	char buf[4 * BLOCK] = "rides";
	uint64_t ino;

	world_of(w, 1 << 20);
	v = w->v;
	ino = make(w, ROOT_INO, "f");
	OK(volume_checkpoint(v));
	for (off_t at = 0; at < 12 * BLOCK; at += (off_t)sizeof(buf))
		OK(fs_write(w->fs, ino, buf, sizeof(buf), at, 0));
	fault_growing(promise_all, v);
	OK(fs_fsync(w->fs, ino, false));
	assert_true(atomic_load(&v->ring_promised) > 0);
	assert_true(atomic_load(&v->ring_free) >
		    (int64_t)v->ring_reserve - 2 * JOURNAL_UNIT);
	ring_unpromise(v, (uint64_t)atomic_load(&v->ring_promised), 0);
}

/* Where the journal is too small for all bitmaps at once, it takes more often. */
static void a_small_journal_lets_few_bitmaps_change_at_once(void **state)
{
	struct world w = {0};
	struct volume_stat st;
	uint64_t ino;

	(void)state;
	world_make_with(&w, LARGE_BYTES, LARGE_LEAST);
	journal_shorten(&w, JOURNAL_MIN_UNITS);
	for (unsigned i = 0; i < 2; i++) {
		ino = make(&w, ROOT_INO, "large");
		OK(fs_fallocate(w.fs, ino, 0, 0, LARGE_BYTES / 100 * 96));
		volume_stat(w.v, &st);
		assert_true(st.checkpoints > 10);
		world_again(&w);
		OK(fs_unlink(w.fs, ROOT_INO, "large"));
		world_again(&w);
		volume_stat(w.v, &st);
		assert_true(st.free_blks > st.blocks / 100 * 99);
	}
	world_close(&w);
	image_close(w.im);
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(a_name_is_made_found_and_removed),
		TEST(names_have_up_to_255_bytes),
		TEST(a_copy_goes_over_many_runs),
		TEST(a_file_goes_whose_blocks_are_shared_one_by_one),
		TEST(a_write_goes_over_many_shared_runs),
		TEST(an_unlinked_file_lives_until_it_is_forgotten),
		TEST(an_unlinked_file_is_gone_after_a_mount),
		TEST(a_file_without_a_name_can_get_one),
		TEST(links_are_counted),
		TEST(a_directory_must_be_empty_to_go),
		TEST(a_symlink_says_what_it_was_told),
		TEST(rename_replaces),
		TEST(rename_of_an_entry_for_no_inode_is_damage),
		TEST(a_file_that_counts_blocks_it_has_not_goes_no_further),
		TEST(rename_of_two_names_of_one_file_does_nothing),
		TEST(rename_moves_directories_with_their_parents),
		TEST(rename_refuses_loops_and_wrong_kinds),
		TEST(rename_exchanges),
		TEST(rename_leaves_a_whiteout),
		TEST(a_listing_meets_each_name_once),
		TEST(a_listing_with_attributes_counts_what_was_taken),
		TEST(a_listing_names_what_cannot_be_read),
		TEST(a_setgid_directory_hands_its_group_on),
		TEST(chown_and_writes_take_privileges),
		TEST(an_owner_and_a_size_take_capabilities_once),
		TEST(flags_forbid),
		TEST(an_append_only_file_gets_nothing_but_what_is_new),
		TEST(what_is_appended_may_come_in_any_order),
		TEST(what_an_immutable_file_refuses_moves_no_time),
		TEST(with_sync_flags_are_durable_when_answered),
		TEST(xattrs_of_all_sizes_are_kept),
		TEST(names_of_trusted_xattrs_are_roots_to_see),
		TEST(acls_follow_modes_and_modes_acls),
		TEST(default_acls_are_inherited),
		TEST(contents_are_those_of_a_model),
		TEST(blocks_come_back),
		TEST(statfs_is_true_while_checkpoints_pass),
		TEST(a_full_volume_can_be_emptied_and_filled_again),
		TEST(a_full_volume_that_was_worn_out_can_be_emptied),
		TEST(large_files_can_be_removed_from_a_full_volume),
		TEST(what_is_free_can_be_had_though_nodes_had_it),
		TEST(what_was_set_aside_can_be_written_on_a_full_volume),
		TEST(a_full_volume_of_600_gib_takes_checkpoints),
		TEST(a_trim_punches_what_is_free_in_its_range_once),
		TEST(blocks_that_are_being_punched_are_waited_for),
		TEST(the_rings_blocks_are_asked_for_at_once),
		TEST(a_full_host_lets_blocks_of_many_bitmaps_be_freed),
		TEST(a_file_without_a_name_waits_for_what_is_freed),
		TEST(what_rides_leaves_the_ring_what_is_promised),
		TEST(threads_leave_the_counts_right),
		TEST(what_is_lost_fails_to_read_until_it_is_written_over),
		TEST(a_file_of_lost_blocks_alone_is_cut),
		TEST(as_much_is_lost_as_a_file_is_long),
		TEST(truncation_drops_what_is_lost),
		cmocka_unit_test(lookup_counts_are_exact),
		cmocka_unit_test(a_checkpoint_writes_over_nothing_that_is_needed),
		cmocka_unit_test(a_small_journal_lets_few_bitmaps_change_at_once),
		cmocka_unit_test(a_small_journal_takes_copies_over_what_is_there),
		cmocka_unit_test(a_small_journal_takes_writes_over_many_runs),
	};
	const char *given = getenv("SEED");

	seed = given ? (unsigned)strtoul(given, NULL, 0) : (unsigned)time(NULL);
	fprintf(stderr, "SEED=%u\n", seed);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
