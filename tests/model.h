/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_TESTS_MODEL_H
#define SPACEWEAVE_TESTS_MODEL_H

/*
 * The oracle. A world is a volume in use on a simulated image together with
 * what it should hold: every state it has had, one for each operation, and
 * which of them is promised to survive. A state is a value: inodes with names,
 * attributes, bytes, xattrs; those that did not change are shared between
 * states.
 *
 * world_* does an operation on both. What the volume answers must be what the
 * model expects, or the test fails at once; an error is returned and leaves
 * the model as it was. Times, and the size and link count that directories
 * report, are taken from the volume: the model holds recovery to them, not to
 * what they ought to be.
 *
 * Operations that may take several transactions (fallocate, copy_file_range)
 * can be cut between them: then one inode may hold, byte by byte, what it held
 * before or after, and nothing else may differ.
 *
 * world_crash() is the fault_fn that holds a crash image against all that.
 */

#include "fs/fs.h"
#include "tests/fault.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>

#include <cmocka.h>

struct state;

struct world_options {
	uint64_t bytes;			/* of the image; 0: 2 MiB */
	unsigned block_shift;
	uint64_t journal_bytes;		/* 0: the smallest */
	struct volume_options volume;	/* no_threads is set, and messages */
	struct fs_options fs;
	bool no_crash_readonly;		/* world_crash: leave out these steps */
	bool no_crash_recheck;
	bool no_crash_use;
};

struct world {
	struct world_options opt;
	struct fault *f;
	bool own_f;
	struct volume *v;		/* NULL when closed */
	struct fs *fs;
	/* States first .. t; state[0] is the first one's. */
	struct state **state;
	uint64_t *loose;	/* the inode that operation t changed in steps */
	uint64_t first, t, room;
	uint64_t promised;
	/* As of the beginning of the image's log. */
	uint64_t log_started, log_promised;
	/* Inodes that are held open: a lookup count each. */
	uint64_t held[64];
	unsigned n_held;
	/* What was done, for the report of a failure. */
	char *story;
	size_t story_len, story_room;
	char message[4096];		/* what the volume said last */
	/* Of world_crash. */
	struct fault *scratch;
	uint64_t crashes, recoveries;
	uint64_t number_base;	/* added to the number of a crash state, to name it */
	bool quiet;			/* a failure is counted, not reported */
	uint64_t violations;
	char violation[512];		/* the first one */
};

/* Printed with every failure: how to do it again. */
extern char repro[512];

/* Fail the test: story, seed and reason. */
void world_fail(struct world *w, const char *fmt, ...)
	__attribute__((format(printf, 2, 3), noreturn));

/*
 * Format an image and open it. With `f` the volume is made over what stands
 * there. world_fork() begins a world where `from`, closed, ended; its states
 * are shared, its image lies over the other's.
 */
struct world *world_create(const struct world_options *opt, struct fault *f);
struct world *world_fork(const struct world *from);
void world_destroy(struct world *w);

/* Open and close the volume; power cut. All return what the volume says. */
int world_open(struct world *w);
int world_close(struct world *w);
void world_abandon(struct world *w);

/* ---- operations ------------------------------------------------------------- */

#define NO_INO 0ull

/* By path ("/a/b") in the model's newest state; NO_INO if there is none. */
uint64_t world_path(const struct world *w, const char *path);

/* `*ino` (may be NULL) is the new inode. S_IFREG when mode has no type. */
int world_create_file(struct world *w, uint64_t dir, const char *name, mode_t mode,
		      dev_t rdev, uint64_t *ino);
int world_mkdir(struct world *w, uint64_t dir, const char *name, mode_t mode,
		uint64_t *ino);
int world_symlink(struct world *w, uint64_t dir, const char *name,
		  const char *target, uint64_t *ino);
int world_link(struct world *w, uint64_t ino, uint64_t dir, const char *name);
int world_unlink(struct world *w, uint64_t dir, const char *name);
int world_rmdir(struct world *w, uint64_t dir, const char *name);
int world_rename(struct world *w, uint64_t dir, const char *name,
		 uint64_t new_dir, const char *new_name, unsigned flags);
/* Held. */
int world_tmpfile(struct world *w, uint64_t dir, mode_t mode, uint64_t *ino);
/* Keep an inode by number though its names go, and let it go. */
int world_hold(struct world *w, uint64_t dir, const char *name);
int world_let_go(struct world *w, uint64_t ino);

/* `len` bytes made from `seed`. */
int world_write(struct world *w, uint64_t ino, uint64_t off, size_t len,
		uint64_t seed);
int world_truncate(struct world *w, uint64_t ino, uint64_t size);
int world_fallocate(struct world *w, uint64_t ino, int mode, uint64_t off,
		    uint64_t len);
int world_copy(struct world *w, uint64_t src, uint64_t src_off, uint64_t dst,
	       uint64_t dst_off, size_t len);
int world_chmod(struct world *w, uint64_t ino, mode_t mode);
int world_chown(struct world *w, uint64_t ino, uid_t uid, gid_t gid);
int world_utimes(struct world *w, uint64_t ino, int64_t sec);
int world_setflags(struct world *w, uint64_t ino, uint32_t flags, uint32_t projid);
int world_setxattr(struct world *w, uint64_t ino, const char *name, size_t len,
		   uint64_t seed);
int world_removexattr(struct world *w, uint64_t ino, const char *name);

/* Promises. */
int world_fsync(struct world *w, uint64_t ino);
int world_sync(struct world *w);
int world_tick(struct world *w);
int world_checkpoint(struct world *w);

/* ---- looking ----------------------------------------------------------------- */

/* The volume in use is what the newest state says, and its parts fit. */
void world_check(struct world *w);

/* Random picks from the newest state; NO_INO if there is none. */
uint64_t world_pick_dir(const struct world *w, struct rng *r);
uint64_t world_pick_file(const struct world *w, struct rng *r);
uint64_t world_pick_any(const struct world *w, struct rng *r);
/* An entry: its directory, name (a copy of at most 255), inode. */
bool world_pick_entry(const struct world *w, struct rng *r, uint64_t *dir,
		      char name[256], uint64_t *ino);
uint64_t world_size(const struct world *w, uint64_t ino);
mode_t world_mode(const struct world *w, uint64_t ino);
unsigned world_inodes(const struct world *w);
bool world_is_held(const struct world *w, uint64_t ino);

/* ---- crashes ------------------------------------------------------------------- */

/*
 * A crash image must recover to a state that the cut allows: seen first
 * read-only, with no write to the image; then writable; then, closed again,
 * with all its structures whole. ctx is the world. *Returns nonzero, after
 * counting it, only when w->quiet.
 */
int world_crash(void *ctx, struct fault *crashed, const struct fault_cut *cut);
/* The same, for a known number of the state, which must come back exactly. */
int world_crash_exactly(struct world *w, struct fault *crashed, uint64_t t,
			const char *what);
/*
 * Recover a crash image for writing and say which state it is; the world is a
 * new one that goes on from there. The crash image is not changed.
 */
struct world *world_recover(const struct world *from, struct fault *crashed,
			    const struct fault_cut *cut);

/* fault_explore() with world_crash; numbers and the log's beginning kept. */
int world_explore(struct world *w, const struct fault_plan *plan, bool final);
/* Forget the states that no crash can bring back any more. */
void world_forget(struct world *w);

#endif
