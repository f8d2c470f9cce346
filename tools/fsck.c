/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * fsck.spaceweave: checks a volume and repairs it.
 *
 * A round is the list of passes below, over the volume as it is after replay,
 * which happens in memory: checking writes nothing. What is to be repaired is
 * collected meanwhile and done afterwards, through transactions where there
 * are any (fsck_repair.c); then another round looks at the result, and what it
 * still finds is what could not be corrected. With -n there is one round.
 *
 * A live image, one that somebody has mounted, can be looked at too (-n). What
 * a superblock refers to is not overwritten before a later superblock is
 * there, so a round counts if the superblock is the same at its end; else it
 * is made again.
 */
#include "tools/fsck.h"
#include "tools/undo.h"

#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* fsck(8)'s exit status is the sum of: */
#define EXIT_CORRECTED 1
#define EXIT_LEFT 4
#define EXIT_OPERATION 8
#define EXIT_USAGE 16
#define EXIT_CANCELLED 32

#define LIVE_TRIES 5
#define ROUNDS 12

struct pass {
	const char *name;
	int (*run)(struct fsck *f);
	bool raw;		/* looks at the image, not at the volume */
};

static const struct pass passes[] = {
	{"superblocks", pass1, true},
	{"journal", pass2, true},
	{"references, orphans and intents", pass3, false},
	{"files", pass4, false},
	{"directories", pass5, false},
	{"links", pass6, false},
	{"shared blocks", pass7, false},
	{"space", pass8, false},
	{"allocator", pass9, false},
	{"names of what was found", second_look, false},
};

static const char usage_text[] =
"usage: fsck.spaceweave [-n | -p | -y] [-cdfvV] [-b superblock] [-u FILE] IMAGE\n"
"Check a Spaceweave volume, and repair it. Without -n, -p or -y each repair is\n"
"asked for on the terminal; where there is none nothing is changed.\n"
"  -n        change nothing; works on a mounted volume too\n"
"  -p, -a    repair what can be repaired without any loss\n"
"  -y        repair everything that can be repaired\n"
"  -f        check even if the volume is clean\n"
"  -c        read all data too, and verify their checksums\n"
"  -b N      say what superblock N (0, 1; backups 2, 3) holds, and end\n"
"  -u FILE   save into FILE what repairs change: 'spaceweave undo FILE IMAGE'\n"
"  -v        say more, and all findings of a kind however many\n"
"  -d        debugging: what the volume says while it is read\n"
"  -h, -V    this help; the version\n"
"Exit status: 0 no errors, 1 corrected, 4 left uncorrected, 8 could not check,\n"
"16 usage, 32 cancelled; or a sum of these.\n";

static void usage(void)
{
	fputs(usage_text, stderr);
	exit(EXIT_USAGE);
}

static void set_mode(struct fsck *f, enum problem_mode mode)
{
	if (f->mode != PROBLEM_ASK && f->mode != mode)
		cli_die(EXIT_USAGE, "only one of -n, -p and -y");
	f->mode = mode;
}

static void parse_options(int argc, char **argv, struct fsck *f)
{
	int c;

	f->mode = PROBLEM_ASK;
	f->slot_wanted = -1;
	while ((c = getopt(argc, argv, "npayfcvdVhb:u:")) != -1) {
		switch (c) {
		case 'n':
			set_mode(f, PROBLEM_CHECK);
			break;
		case 'p':
		case 'a':
			set_mode(f, PROBLEM_PREEN);
			break;
		case 'y':
			set_mode(f, PROBLEM_YES);
			break;
		case 'f':
			f->force = true;
			break;
		case 'c':
			f->data = true;
			f->force = true;
			break;
		case 'v':
			f->verbose = true;
			break;
		case 'd':
			f->debug = true;
			break;
		case 'b':
			if (strlen(optarg) != 1 || *optarg < '0' || *optarg > '3')
				cli_die(EXIT_USAGE,
					"superblock '%s': 0, 1, 2 or 3", optarg);
			f->slot_wanted = *optarg - '0';
			break;
		case 'u':
			f->undo = optarg;
			break;
		case 'V':
			cli_version();
			exit(cli_finish(0, EXIT_OPERATION));
		case 'h':
			fputs(usage_text, stdout);
			exit(cli_finish(0, EXIT_OPERATION));
		default:
			usage();
		}
	}
	if (argc - optind != 1)
		usage();
	f->path = argv[optind];
	if (f->mode == PROBLEM_ASK && !(isatty(STDIN_FILENO) && isatty(STDOUT_FILENO)))
		f->mode = PROBLEM_CHECK;
}

/* ---- the image ------------------------------------------------------------------ */

static void open_image(struct fsck *f)
{
	bool check = f->mode == PROBLEM_CHECK;
	char text[CLI_IN_USE];
	int ret = image_open(f->path, check ? IMAGE_READ : IMAGE_WRITE, &f->im);

	if (ret == -EBUSY && check) {
		f->live = true;
		ret = image_open(f->path, IMAGE_PEEK, &f->im);
	}
	if (ret == -EBUSY)
		cli_die(EXIT_OPERATION, "%s; only -n can check it",
			cli_in_use(f->path, f->path, text, sizeof(text)));
	if (ret == -EINVAL)
		cli_die(EXIT_OPERATION,
			"'%s' is neither a regular file nor a block device",
			f->path);
	if (ret)
		cli_die(EXIT_OPERATION, "cannot open '%s': %s", f->path,
			strerror(-ret));
	f->file = f->im;
	if (f->live)
		cli_warn("%s: what is found may be in motion",
			 cli_in_use(f->path, f->path, text, sizeof(text)));
}

static void lost(void *ctx, int err, const char *why)
{
	const struct fsck *f = ctx;

	cli_warn("'%s': %s failed: %s; repairs end here", f->path, why, strerror(-err));
	_exit(EXIT_OPERATION | EXIT_LEFT);
}

/* No other host shall have it until the last repair is made. */
static void hold(struct fsck *f)
{
	int ret = heart_hold(f->im, cli_program, lost, f, &f->heart);
	char text[CLI_IN_USE];

	if (ret == -EBUSY)
		cli_die(EXIT_OPERATION, "%s",
			cli_in_use(f->path, f->path, text, sizeof(text)));
	if (ret)
		cli_die(EXIT_OPERATION, "cannot hold '%s': %s", f->path,
			strerror(-ret));
}

static void settle(const struct fsck *f)
{
	int ret = super_settle(f->im);

	if (ret)
		cli_die(EXIT_OPERATION, "what was written to '%s' before cannot be "
			"made durable: %s", f->path, strerror(-ret));
}

/* From now on what is written over is saved first. */
static void open_undo(struct fsck *f)
{
	int ret = undo_image(f->im, f->undo, &f->im);

	if (ret)
		cli_die(EXIT_OPERATION, "cannot make the undo file '%s': %s",
			f->undo, strerror(-ret));
}

/* Is this a volume of ours at all, of a version that we know? */
static void recognise(struct fsck *f)
{
	struct disk_super s;
	unsigned slot;
	char msg[200];
	int ret = super_load(f->im, &s, &slot, msg, sizeof(msg));

	if (ret == -EPROTONOSUPPORT)
		cli_die(EXIT_OPERATION, "'%s': %s", f->path, msg);
	if (ret != -EINVAL)
		return;
	/* both slots wiped: a backup may tell that there was a volume */
	if (f->im->bytes >= BACKUP_OFFSET + SUPER_BYTES &&
	    !image_pread(f->im, &s, sizeof(s), BACKUP_OFFSET) &&
	    !super_verify(&s, 2, NULL))
		return;
	if (f->im->bytes >= VOLUME_MIN_BYTES && super_last(f->im, &s))
		return;
	/* nothing tells; who insists may have it looked for */
	if (f->force && f->mode != PROBLEM_CHECK && f->mode != PROBLEM_PREEN &&
	    f->im->bytes >= VOLUME_MIN_BYTES && !guess_super(f, &s))
		return;
	cli_die(EXIT_OPERATION, "'%s' is not a Spaceweave volume", f->path);
}

static int show_super(struct fsck *f)
{
	static const char *const names[] = {"superblock 0", "superblock 1",
					    "backup 2", "backup 3"};
	unsigned n = (unsigned)f->slot_wanted;
	uint64_t off = n < 2 ? SUPER_SLOT_OFFSET(n) : BACKUP_OFFSET;
	struct disk_super s;
	const char *why = NULL;
	char uuid[37], size[16];
	int ret;

	if (n == 3) {
		/* its place: by any other that is good, else the image's end */
		unsigned slot;
		char msg[200];

		off = f->im->bytes / 4096 * 4096 - 4096;
		if (!super_load(f->im, &s, &slot, msg, sizeof(msg)))
			off = (get64(s.blocks) - 1) << get32(s.block_shift);
	}
	ret = image_pread(f->im, &s, sizeof(s), off);
	if (ret)
		cli_die(EXIT_OPERATION, "cannot read %s of '%s': %s", names[n],
			f->path, strerror(-ret));
	ret = super_verify(&s, n, &why);
	if (ret) {
		printf("%s: %s: %s\n", f->path, names[n], why ? why : "?");
		return EXIT_LEFT;
	}
	cli_uuid(s.uuid, uuid);
	printf("%s: %s is good\n", f->path, names[n]);
	printf("UUID %s, label '%.*s'\n", uuid, (int)LABEL_BYTES, s.label);
	printf("%s in blocks of %u, journal of %" PRIu64
	       " units at block %" PRIu64 "\n",
	       cli_size(get64(s.blocks) << get32(s.block_shift), size),
	       1u << get32(s.block_shift), get64(s.journal_units),
	       get64(s.journal_block));
	printf("checkpoint %" PRIu64 ", %s\n", get64(s.gen),
	       get32(s.flags) & SUPER_CLEAN ? "clean" : "not clean");
	return 0;
}

/* ---- a round --------------------------------------------------------------------- */

static void say(void *ctx, const char *text)
{
	const struct fsck *f = ctx;

	if (f->debug)
		cli_warn("%s", text);
}

static int tables_init(struct fsck *f)
{
	/* A leaf has no room for more than 27 inodes. */
	uint64_t most = f->blocks << (f->shift - 12) << 5;
	uint64_t inodes = get64(f->super.inodes);
	int ret = blocks_init(&f->owned, f->blocks);

	f->fixeds = volume_fixed(f->v, f->fixed);
	return ret ? ret : ino_init(&f->inodes, inodes < most ? inodes : most);
}

static int open_with(struct fsck *f, const struct volume_repair *how, char *msg,
		     size_t len)
{
	struct volume_options opt = {.readonly = true,
				     .no_threads = true,
				     .repair = how,
				     .program = cli_program,
				     .message = say,
				     .message_ctx = f};
	int ret = volume_open(f->im, &opt, &f->v, msg, len);

	if (ret)
		f->v = NULL;
	return ret;
}

/*
 * The volume as it is after replay. Where that fails for a node that replay
 * wants and that is lost, the lost ones are looked for without the journal,
 * and replay does without them: so it will be after the repair.
 */
static int open_volume(struct fsck *f)
{
	struct volume_repair how = {.gen = get64(f->super.gen),
				    .found = f->found,
				    .founds = f->found_count,
				    .lost = f->saved,
				    .losts = f->saved_count};
	char msg[240] = "";
	struct lost_node *all;
	int ret = open_with(f, &how, msg, sizeof(msg));

	if (!ret)
		return tables_init(f);
	PROBLEM(P_VOLUME, .what = *msg ? msg : cli_error(ret));
	how.no_replay = true;
	if ((ret != -EUCLEAN && ret != -EBADMSG) ||
	    open_with(f, &how, msg, sizeof(msg)))
		return ret;
	ret = tables_init(f);
	for (unsigned t = 0; !ret && t < TABLE_SPACE; t++)
		ret = fsck_walk(f, t, NULL);
	volume_close(f->v);
	f->v = NULL;
	blocks_fini(&f->owned);
	ino_fini(&f->inodes);
	memset(f->nodes, 0, sizeof(f->nodes));
	memset(f->items, 0, sizeof(f->items));
	if (ret)
		return ret;
	all = saved_and(f, f->gone, f->gone_count);
	if (!all)
		return -ENOMEM;
	how.no_replay = false;
	how.lost = all;
	how.losts = f->saved_count + f->gone_count;
	ret = open_with(f, &how, msg, sizeof(msg));
	free(all);
	return ret ? ret : tables_init(f);
}

static void forget(struct fsck *f)
{
	if (f->v)
		volume_close(f->v);
	f->v = NULL;
	ino_fini(&f->inodes);
	blocks_fini(&f->owned);
	free(f->twice.v);
	f->twice = (struct runs){0};
	free(f->shared.v);
	f->shared = (struct runs){0};
	free(f->refs);
	f->refs = NULL;
	f->ref_count = f->ref_room = 0;
	free(f->intents);
	f->intents = NULL;
	f->intent_count = f->intent_room = 0;
	free(f->chunk_used);
	f->chunk_used = NULL;
	free(f->there);
	f->there = NULL;
	repairs_fini(&f->repairs);
	memset(f->nodes, 0, sizeof(f->nodes));
	memset(f->items, 0, sizeof(f->items));
	f->inode_count = f->aside_blks = f->data_blks = f->free_blks = 0;
	memset(f->lost, 0, sizeof(f->lost));
	free(f->gone);
	f->gone = NULL;
	f->gone_count = 0;
	f->keep_blocks = f->look_again = f->incomplete = f->bitmaps_lost = false;
	f->super_good = f->seen_anew = false;
	for (size_t i = 0; i < f->saved_count; i++)
		f->incomplete = f->lost[f->saved[i].table] = true;
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

/* Clean, and not asked to look nevertheless? */
static bool may_skip(const struct fsck *f)
{
	return !f->force && !f->live && f->super_good &&
	       get32(f->super.flags) & SUPER_CLEAN && !problem_errors();
}

/*
 * One round. 0: made, whatever it found; *skipped when the volume is clean and
 * no more than that was looked at. Negative: it could not be made.
 */
static int round_once(struct fsck *f, bool *skipped)
{
	int ret = 0;

	problem_round();
	*skipped = false;
	for (size_t i = 0; !ret && i < sizeof(passes) / sizeof(passes[0]); i++) {
		const struct pass *p = &passes[i];
		double start = now();

		if (!p->raw && !f->v) {
			*skipped = may_skip(f);
			if (*skipped)
				break;
			ret = open_volume(f);
			if (!f->v) {
				ret = ret == -ENOMEM ? ret : 0;
				break;
			}
		}
		if (!ret)
			ret = p->run(f);
		if (f->verbose)
			cli_warn("pass %zu, %s: %.2f s", i + 1, p->name,
				 now() - start);
		if (!f->super_good)
			break;
	}
	problem_end_round();
	return ret;
}

static bool super_moved(struct fsck *f)
{
	struct disk_super s;
	unsigned slot;
	char msg[200];

	return super_load(f->im, &s, &slot, msg, sizeof(msg)) ||
	       get64(s.gen) != get64(f->super.gen);
}

/* Rounds over a live image until one counts. */
static int round_live(struct fsck *f, bool *skipped)
{
	int ret = 0;

	for (unsigned i = 0; i < LIVE_TRIES; i++) {
		bool moved;

		forget(f);
		problem_hold();
		ret = round_once(f, skipped);
		moved = !f->super_good || super_moved(f);
		if (!moved || (!ret && !problem_errors())) {
			problem_show();
			return ret;
		}
		problem_drop();
		if (f->verbose)
			cli_warn("the volume has moved on: once more");
	}
	cli_warn("'%s' changes too fast to be checked; unmount it", f->path);
	return -EBUSY;
}

/* ---- the whole --------------------------------------------------------------------- */

static void summary(const struct fsck *f, bool skipped)
{
	uint64_t free_blks = skipped ? get64(f->super.free_blks) : f->free_blks;
	uint64_t inodes = skipped ? get64(f->super.inodes) : f->inode_count;
	const char *word = problem_errors()			? "errors left" :
			   get32(f->super.flags) & SUPER_CLEAN ? "clean" :
								 "no errors";

	cli_progress_end();
	printf("%s: %s, %" PRIu64 " %s, %" PRIu64 " of %" PRIu64
	       " blocks in use\n",
	       f->path, word, inodes, inodes == 1 ? "inode" : "inodes",
	       f->blocks - free_blks, f->blocks);
	if (f->data)
		printf("%s: %" PRIu64 " %s of data verified\n", f->path,
		       f->data_blks, f->data_blks == 1 ? "block" : "blocks");
}

static int operation_failed(const struct fsck *f, int ret)
{
	cli_warn("cannot check '%s': %s", f->path, cli_error(ret));
	return EXIT_OPERATION;
}

static int check(struct fsck *f)
{
	bool skipped;
	int ret = f->live ? round_live(f, &skipped) : round_once(f, &skipped);

	if (ret)
		return operation_failed(f, ret);
	if (f->super_good && (f->v || skipped))
		summary(f, skipped);
	return problem_errors() ? EXIT_LEFT : 0;
}

static int repair(struct fsck *f)
{
	enum problem_mode mode = f->mode;
	bool skipped, fixed = false, again = true, asked = false;
	uint64_t errors = 0;
	int ret;

	for (unsigned i = 0; again && i < ROUNDS;) {
		ret = round_once(f, &skipped);
		if (ret)
			return operation_failed(f, ret);
		errors = problem_errors();
		if (repair_hasty(f)) {
			cli_warn("what could not be read can be now: once more");
			forget(f);
			i++;
			continue;
		}
		if (mode == PROBLEM_PREEN && problem_severe()) {
			cli_warn("something may be lost: no repair of '%s' is safe "
				 "before -y has seen to that", f->path);
			repairs_fini(&f->repairs);
		}
		if (f->repairs.count || f->saved_count) {
			ret = repair_all(f);
			if (ret < 0) {
				cli_warn("cannot repair '%s': %s", f->path,
					 cli_error(ret));
				forget(f);
				return EXIT_OPERATION | EXIT_LEFT |
				       (fixed ? EXIT_CORRECTED : 0);
			}
		}
		fixed = fixed || problem_repaired();
		again = problem_progress() || f->seen_anew;
		if (!again)
			break;
		/* Look at the result; ask nothing twice that was done. Rounds that
		 * only see more of what was lost end by themselves. */
		if (!f->seen_anew) {
			asked = true;
			i++;
		}
		forget(f);
		f->force = f->force || !skipped;
		if ((mode == PROBLEM_ASK && asked) || i + 1 == ROUNDS)
			problem_init(f->path, PROBLEM_CHECK, f->verbose);
		printf("%s: checking again\n", f->path);
	}
	if (f->super_good && (f->v || skipped))
		summary(f, skipped);
	return (errors ? EXIT_LEFT : 0) | (fixed ? EXIT_CORRECTED : 0);
}

static void on_signal(int sig)
{
	(void)sig;
	_exit(EXIT_CANCELLED);
}

int main(int argc, char **argv)
{
	struct fsck f = {0};
	int status;

	cli_init(argv[0]);
	parse_options(argc, argv, &f);
	problem_init(f.path, f.mode, f.verbose);
	signal(SIGINT, on_signal);
	signal(SIGTERM, on_signal);
	open_image(&f);
	if (f.slot_wanted >= 0) {
		status = show_super(&f);
	} else {
		if (f.mode != PROBLEM_CHECK) {
			hold(&f);
			settle(&f);
		}
		recognise(&f);
		if (f.undo && f.mode != PROBLEM_CHECK)
			open_undo(&f);
		status = f.mode == PROBLEM_CHECK ? check(&f) : repair(&f);
	}
	forget(&f);
	free(f.ridden.v);
	free(f.gaps);
	free(f.gap_open);
	index_fini(&f.gap_at);
	saved_fini(&f);
	if (f.im != f.file)
		image_close(f.im);
	heart_release(f.heart);
	image_close(f.file);
	return cli_finish(status, EXIT_OPERATION);
}
