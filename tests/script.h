/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_TESTS_SCRIPT_H
#define SPACEWEAVE_TESTS_SCRIPT_H

/*
 * An oracle for several threads. Each has a script, a list of steps, and a
 * directory of its own to do them in, so what is in the directory after any
 * number of steps is known. A crash image has to hold each directory as it was
 * after some number of its steps: at least those promised, at most those
 * begun. And a step that is there brings with it all those of other threads
 * that had ended when it began: so all of it together is what the volume was
 * after one operation.
 *
 * A step for which there is no space (-ENOSPC) has done nothing, and the
 * script goes on. Any other failure ends it.
 *
 * Threads: script_run() is for the script's own; the rest for one thread while
 * no script runs.
 */

#include "fs/fs.h"
#include "tests/fault.h"

#include <stdatomic.h>

#define SCRIPT_FILES 8
#define SCRIPT_STEPS 640

enum deed {
	/* Of a file of the directory, by number. */
	CREATE,
	WRITE,			/* len bytes at off, made from thread and step */
	TRUNCATE,		/* to off */
	UNLINK,
	RENAME,			/* to file `to`, which may be there */
	CLONE,			/* len bytes of it from off, to the same place in `to` */
	/* Of the volume. */
	SYNC,
	CHECKPOINT,
	TICK,
	TRIM,
};

struct step {
	enum deed deed;
	uint8_t file, to;
	bool sync;		/* and fsync: the file, or the directory if it is gone */
	uint32_t off, len;
};

/* What is known of a directory. */
struct script_state {
	struct {
		int64_t size;	/* -1: no such file */
		uint64_t sum;
	} file[SCRIPT_FILES];
};

struct script {
	struct scripts *all;
	unsigned who;
	uint64_t dir;
	struct step step[SCRIPT_STEPS];
	unsigned steps;
	_Atomic unsigned done;		/* how many have ended */
	_Atomic bool stop;		/* no further step is to be begun */
	bool refused[SCRIPT_STEPS];	/* there was no space */
	unsigned seen[SCRIPT_STEPS][FAULT_WHO];	/* others' steps done when it began */
	int err;			/* of step `done` */
	struct script_state *state;	/* after so many steps */
};

struct scripts {
	struct script *script;
	unsigned n;
	struct fs *fs;
	struct fault *f;
	const char *again;		/* printed with every failure */
	uint64_t states;		/* crash images judged */
	struct effort effort;
};

/* `n` empty scripts for a volume in use, each with a new directory of its own. */
void scripts_init(struct scripts *all, unsigned n, struct fs *fs, struct fault *f);
void scripts_fini(struct scripts *all);

/* Leave so many blocks free, by a file beside the scripts. */
void scripts_leave(struct fs *fs, unsigned blks);

void script_add(struct script *s, struct step step);
/* Do the steps up to `upto`, or until s->stop. */
void script_run(struct script *s, unsigned upto);
/* What is done is durable and a log begins here: note that in it. */
void scripts_note(struct scripts *all);
/* All scripts have ended: fail if one did by an error; work out the states. */
void scripts_end(struct scripts *all);

/*
 * The volume was opened anew in all->fs, after a daemon was killed: what it had
 * not written is lost. Forget those steps, and go on from what is there.
 */
void scripts_resume(struct scripts *all);

/* A fault_fn; ctx is struct scripts. Nonzero once the effort is spent. */
int scripts_crash(void *ctx, struct fault *crashed, const struct fault_cut *cut);

#endif
