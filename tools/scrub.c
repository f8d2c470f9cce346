/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * spaceweave scrub IMAGE|DIR: reads all that the volume holds, from the host's
 * disk and not from its cache, and verifies it: superblocks and backups, the
 * journal, each node of each tree, bitmaps, all data. What is damaged is named:
 * files by their path and offset.
 *
 * A mounted volume is read beside its daemon, which need not know. What a
 * superblock leads to is not written over before a later superblock is there:
 * so something that does not verify is damage if the superblock is still the one
 * that was opened; else the volume is opened again and the scrub goes on at
 * that very place.
 *
 * The trees are walked in order of their keys: a place in the walk is a key.
 * With a state file (-s) it is kept, and what was found, so that a scrub which
 * was cut off goes on from there.
 */
#include "tools/cli.h"
#include "tools/verbs.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* As fsck(8) has them. */
#define EXIT_DAMAGED 4
#define EXIT_OPERATION 8
#define EXIT_USAGE 16
#define EXIT_CANCELLED 32

/* Why a walk ended before its end. */
#define WALK_MOVED 1
#define WALK_STOP 2

#define OPEN_TRIES 20
#define SAVE_SECONDS 10

static const char scrub_usage[] =
"usage: spaceweave scrub [-hq] [-r RATE] [-s FILE] IMAGE|DIR\n"
"Read all of a volume, mounted or not, verify it, and name what is damaged.\n"
"  -r RATE   read no more than so many bytes a second (K, M, G)\n"
"  -s FILE   keep in FILE how far it got, and go on from there next time\n"
"  -q        say nothing but what is damaged\n"
"  -h        this help\n"
"Exit status: 0 all is well, 4 something is damaged, 8 could not scrub, 16 usage,\n"
"32 cancelled; or a sum of these.\n";

/* Why a file's blocks do not read as what was written. Kept in state files. */
enum harm { WRONG, UNREADABLE, LOST };

/* Blocks of a file that are not what was written. */
struct damage {
	uint64_t ino, blk, len;
	enum harm harm;
	uint64_t dir;		/* of its first name; 0: not known */
	char *name;
};

struct scrub {
	const char *asked;
	char *image, *dir;	/* as in struct view */
	const char *state;	/* -s */
	uint64_t rate;
	bool quiet;

	struct image *im;
	struct volume *v;
	bool live;
	uint64_t gen;		/* of the superblock that v was opened with */
	uint64_t blocks;
	unsigned shift;
	uint8_t uuid[16];

	/* place in the walk */
	unsigned phase;
	uint8_t key[KEY_MAX];
	size_t klen;
	uint64_t done, total;	/* bytes */
	uint64_t paid;		/* of them, slept for */
	double start, saved;

	struct damage *bad;
	size_t bads, room;
	uint64_t other;		/* damage that is no file's */
	uint8_t *buf;		/* a run of data */
};

/* Bitmaps first: they are few. */
static const enum table phases[] = {TABLE_SPACE, TABLE_REFS, TABLE_FILES};

static volatile sig_atomic_t stopped;

static void on_signal(int sig)
{
	(void)sig;
	stopped = 1;
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

/* ---- the state file ----------------------------------------------------------- */

static void put_hex(FILE *f, const char *word, const uint8_t *b, size_t n)
{
	fprintf(f, "%s ", word);
	for (size_t i = 0; i < n; i++)
		fprintf(f, "%02x", b[i]);
	fputc('\n', f);
}

static int state_save(struct scrub *s)
{
	char path[PATH_MAX];
	FILE *f;
	int ret;

	s->saved = now();
	if (!s->state)
		return 0;
	snprintf(path, sizeof(path), "%s.new", s->state);
	f = fopen(path, "w");
	if (!f)
		return -errno;
	put_hex(f, "scrub", s->uuid, sizeof(s->uuid));
	fprintf(f, "phase %u\ndone %" PRIu64 "\nother %" PRIu64 "\n", s->phase,
		s->done, s->other);
	if (s->klen)
		put_hex(f, "key", s->key, s->klen);
	for (size_t i = 0; i < s->bads; i++)
		fprintf(f, "bad %" PRIu64 " %" PRIu64 " %" PRIu64 " %d\n",
			s->bad[i].ino, s->bad[i].blk, s->bad[i].len,
			(int)s->bad[i].harm);
	ret = fflush(f) || fsync(fileno(f)) ? -errno : 0;
	if (fclose(f) && !ret)
		ret = -errno;
	return ret ? ret : rename(path, s->state) ? -errno : 0;
}

static size_t get_hex(const char *text, uint8_t *b, size_t room)
{
	size_t n = 0;

	for (; n < room && sscanf(text, "%2hhx", &b[n]) == 1; text += 2)
		n++;
	return n;
}

static int damage_add(struct scrub *s, uint64_t ino, uint64_t blk, uint64_t len,
		      enum harm harm)
{
	struct damage *d = s->bads ? &s->bad[s->bads - 1] : NULL;

	/* a run that is seen again, for the scrub was cut off in it */
	if (d && d->ino == ino && d->blk <= blk && blk < d->blk + d->len)
		return 0;
	if (d && d->ino == ino && d->blk + d->len == blk &&
	    d->harm == harm) {
		d->len += len;
		return 0;
	}
	if (s->bads == s->room) {
		size_t room = s->room ? s->room * 2 : 64;

		d = realloc(s->bad, room * sizeof(*d));
		if (!d)
			return -ENOMEM;
		s->bad = d;
		s->room = room;
	}
	s->bad[s->bads++] = (struct damage){
		.ino = ino, .blk = blk, .len = len, .harm = harm};
	return 0;
}

static int state_line(struct scrub *s, const char *line)
{
	uint64_t ino, blk, len;
	int harm;

	if (!strncmp(line, "key ", 4))
		s->klen = get_hex(line + 4, s->key, sizeof(s->key));
	else if (sscanf(line, "bad %" SCNu64 " %" SCNu64 " %" SCNu64 " %d", &ino,
			&blk, &len, &harm) == 4)
		return harm < 0 || harm > LOST ? -EINVAL :
			       damage_add(s, ino, blk, len, (enum harm)harm);
	else if (sscanf(line, "phase %u", &s->phase) != 1 &&
		 sscanf(line, "done %" SCNu64, &s->done) != 1 &&
		 sscanf(line, "other %" SCNu64, &s->other) != 1)
		return -EINVAL;
	return 0;
}

/* No file: from the start. One of another volume is refused. */
static int state_load(struct scrub *s)
{
	uint8_t uuid[16];
	char line[2 * KEY_MAX + 16];
	/* a FIFO is not waited for */
	int fd = open(s->state, O_RDONLY | O_CLOEXEC | O_NONBLOCK), ret = 0;
	FILE *f = fd < 0 ? NULL : fdopen(fd, "r");

	if (!f) {
		ret = errno == ENOENT ? 0 : -errno;
		if (fd >= 0)
			close(fd);
		return ret;
	}
	if (!fgets(line, sizeof(line), f) || strncmp(line, "scrub ", 6) ||
	    get_hex(line + 6, uuid, sizeof(uuid)) != sizeof(uuid))
		ret = -EINVAL;
	else if (memcmp(uuid, s->uuid, sizeof(uuid)))
		ret = -EXDEV;
	while (!ret && fgets(line, sizeof(line), f))
		ret = state_line(s, line);
	fclose(f);
	if (s->phase >= sizeof(phases) / sizeof(phases[0]))
		ret = -EINVAL;
	s->paid = s->done;
	if (!ret && !s->quiet)
		cli_warn("goes on where it was cut off");
	return ret;
}

/* ---- opening -------------------------------------------------------------------- */

static void quiet_message(void *ctx, const char *text)
{
	(void)ctx, (void)text;	/* what is damaged we say ourselves */
}

static uint64_t super_gen(struct scrub *s)
{
	struct disk_super super;
	unsigned slot;
	char msg[200];

	return super_load(s->im, &super, &slot, msg, sizeof(msg)) ?
		       0 : get64(super.gen);
}

/* The volume as it is now. */
static int volume_now(struct scrub *s)
{
	const struct volume_options opt = {.readonly = true,
					   .no_threads = true,
					   .program = cli_program,
					   .cache_bytes = 16u << 20,
					   .message = quiet_message};
	char msg[240] = "";
	int ret = 0;

	if (s->v)
		volume_close(s->v);
	for (unsigned i = 0; i < (s->live ? OPEN_TRIES : 1); i++) {
		ret = volume_open(s->im, &opt, &s->v, msg, sizeof(msg));
		if (ret != -EUCLEAN && ret != -EBADMSG)
			break;
		usleep(10000);
	}
	if (ret) {
		s->v = NULL;
		cli_warn("cannot open '%s': %s", s->image,
			 *msg ? msg : cli_error(ret));
		return ret;
	}
	s->gen = get64(volume_super(s->v)->gen);
	return 0;
}

static int open_all(struct scrub *s)
{
	struct image *im = NULL;
	struct volume_stat st;
	int ret = view_find(s->asked, &s->image, &s->dir);

	if (ret)
		return ret;
	ret = s->dir ? -EBUSY : image_open(s->image, IMAGE_READ, &im);
	if (ret == -EBUSY) {
		s->live = true;
		ret = image_open(s->image, IMAGE_PEEK, &im);
	}
	if (!ret)
		ret = image_direct(im, &s->im);
	if (ret) {
		cli_warn("cannot open '%s': %s", s->image,
			 ret == -EINVAL ? "neither a mounted volume nor an image" :
					  cli_error(ret));
		return ret;
	}
	ret = volume_now(s);
	if (ret)
		return ret;
	volume_stat(s->v, &st);
	s->shift = volume_block_shift(s->v);
	s->blocks = st.blocks;
	s->total = (st.blocks - st.free_blks) << s->shift;
	memcpy(s->uuid, st.uuid, sizeof(s->uuid));
	if (posix_memalign((void **)&s->buf, 4096, (size_t)MAP_MAX << s->shift))
		return -ENOMEM;
	return 0;
}

/* ---- while it goes --------------------------------------------------------------- */

/* So much has been read: say so, save the place, wait if it was too fast. */
static int tick(struct scrub *s, uint64_t bytes)
{
	int ret;

	s->done += bytes;
	if (!s->quiet)
		cli_progress("scrub, MiB", s->done >> 20, s->total >> 20);
	if (s->state && now() - s->saved > SAVE_SECONDS) {
		ret = state_save(s);
		if (ret) {
			cli_warn("cannot write '%s': %s", s->state, strerror(-ret));
			return ret;
		}
	}
	while (s->rate && !stopped) {
		double due = (double)(s->done - s->paid) / (double)s->rate;
		double ahead = due - (now() - s->start);

		if (ahead <= 0)
			break;
		usleep(ahead > 0.2 ? 200000 : (useconds_t)(ahead * 1e6));
	}
	return stopped ? WALK_STOP : 0;
}

/* Something does not verify. Has the volume moved on, so that this is no news? */
static bool moved(struct scrub *s)
{
	return s->live && super_gen(s) != s->gen;
}

static void other_damage(struct scrub *s, const char *what, uint64_t block,
			 const char *why)
{
	cli_progress_end();
	printf("%s: %s at block %" PRIu64 " is damaged: %s\n", s->image, what,
	       block, why);
	s->other++;
}

static bool below(const struct scrub *s, const uint8_t *key, size_t klen)
{
	int c = memcmp(key, s->key, klen < s->klen ? klen : s->klen);

	return c < 0 || (c == 0 && klen < s->klen);
}

static int see_node(void *ctx, enum table t, unsigned level, uint64_t block)
{
	struct scrub *s = ctx;

	(void)t, (void)level, (void)block;
	return tick(s, 1ull << s->shift);
}

static int see_bad(void *ctx, enum table t, unsigned level, uint64_t block,
		   const char *why)
{
	static const char *const names[TABLES] = {"files", "references", "space"};
	struct scrub *s = ctx;
	char what[100];

	if (moved(s))
		return WALK_MOVED;
	if (t == TABLE_FILES && s->klen >= 8)
		snprintf(what, sizeof(what),
			 "a node of level %u of the tree of files (from inode %" PRIu64
			 " on)", level, be64_get(s->key));
	else
		snprintf(what, sizeof(what), "a node of level %u of the tree of %s",
			 level, names[t]);
	other_damage(s, what, block, why);
	return 0;
}

static int see_bitmap(struct scrub *s, const uint8_t *val, size_t vlen)
{
	size_t size = (size_t)1 << s->shift;
	struct disk_space d;
	int ret;

	if (vlen != sizeof(d))
		return 0;
	memcpy(&d, val, sizeof(d));
	if (get64(d.block) >= s->blocks)
		return 0;
	ret = image_pread(s->im, s->buf, size, get64(d.block) << s->shift);
	if (ret || checksum(s->buf, size) != get64(d.csum)) {
		if (moved(s))
			return WALK_MOVED;
		other_damage(s, "a bitmap", get64(d.block),
			     ret ? strerror(-ret) : "its checksum does not match");
	}
	return tick(s, size);
}

/* Blocks of a run from `i` on that are alike good or bad; *bad says which. */
static int see_block(struct scrub *s, uint64_t start, const uint8_t *sum,
		     uint8_t *buf, bool again, bool *bad, enum harm *harm)
{
	size_t size = (size_t)1 << s->shift;
	le64 want;

	memcpy(&want, sum, sizeof(want));
	*harm = again && volume_blocks(s->v, start, 1, buf) ? UNREADABLE : WRONG;
	*bad = *harm == UNREADABLE || checksum(buf, size) != get64(want);
	return *bad && moved(s) ? WALK_MOVED : 0;
}

static int see_run(struct scrub *s, uint64_t ino, uint64_t blk,
		   const uint8_t *val, size_t vlen)
{
	size_t size = (size_t)1 << s->shift;
	struct disk_map m;
	uint64_t len;
	bool failed;
	int ret = 0;

	if (vlen < sizeof(m))
		return 0;	/* structures are fsck's */
	memcpy(&m, val, sizeof(m));
	len = map_len(&m);
	if (get32(m.flags) == MAP_LOST)
		return damage_add(s, ino, blk, len, LOST);
	if (get32(m.flags) || len > MAP_MAX ||
	    vlen != sizeof(m) + len * sizeof(le64) ||
	    get64(m.start) >= s->blocks || len > s->blocks - get64(m.start))
		return 0;
	failed = volume_blocks(s->v, get64(m.start), len, s->buf);
	for (uint32_t i = 0; !ret && i < len; i++) {
		enum harm harm;
		bool bad;

		ret = see_block(s, get64(m.start) + i,
				val + sizeof(m) + i * sizeof(le64),
				s->buf + i * size, failed, &bad, &harm);
		if (!ret && bad)
			ret = damage_add(s, ino, blk + i, 1, harm);
	}
	return ret ? ret : tick(s, len * size);
}

static int see_item(void *ctx, enum table t, const uint8_t *key, size_t klen,
		    const uint8_t *val, size_t vlen)
{
	struct scrub *s = ctx;
	int ret = 0;

	if (below(s, key, klen))
		return 0;
	memcpy(s->key, key, klen);
	s->klen = klen;
	if (t == TABLE_SPACE)
		ret = see_bitmap(s, val, vlen);
	else if (t == TABLE_FILES && klen == 17 && key[8] == KEY_MAP)
		ret = see_run(s, be64_get(key), be64_get(key + 9), val, vlen);
	if (!ret && s->klen < KEY_MAX)
		s->key[s->klen++] = 0;		/* on to what follows */
	return ret;
}

static int walk_phase(struct scrub *s)
{
	struct walk w = {.ctx = s,
			 .ahead = true,
			 .node = see_node,
			 .item = see_item,
			 .bad = see_bad};
	int ret;

	do {
		uint8_t from[KEY_MAX];

		memcpy(from, s->key, s->klen);
		w.from = from;
		w.from_len = s->klen;
		ret = volume_walk(s->v, phases[s->phase], &w);
		if (ret == WALK_MOVED && volume_now(s))
			return -EIO;
	} while (ret == WALK_MOVED);
	return ret;
}

/* ---- superblocks -------------------------------------------------------------------- */

static void see_supers(struct scrub *s)
{
	const struct disk_super *now_s = volume_super(s->v);
	bool torn = !s->live && !(get32(now_s->flags) & SUPER_CLEAN);
	const uint64_t at[] = {SUPER_SLOT_OFFSET(0), SUPER_SLOT_OFFSET(1),
			       BACKUP_OFFSET, (s->blocks - 1) << s->shift};
	struct disk_super copy;

	for (unsigned i = 0; i < 4; i++) {
		const char *why = "cannot be read";
		bool good = false;

		/* one that is just being written is whole soon */
		for (unsigned n = 0; !good && n < (s->live ? OPEN_TRIES : 1); n++) {
			if (n)
				usleep(10000);
			good = !image_pread(s->im, &copy, sizeof(copy), at[i]) &&
			       !super_verify(&copy, i, &why);
		}
		/* what a crash was writing is no damage */
		if (!good && !(torn && i < SUPER_SLOTS))
			other_damage(s, i < SUPER_SLOTS ? "a superblock" :
							  "a backup superblock",
				     at[i] >> s->shift, why);
	}
}

/* ---- names -------------------------------------------------------------------------- */

static int name_item(void *ctx, enum table t, const uint8_t *key, size_t klen,
		     const uint8_t *val, size_t vlen)
{
	struct scrub *s = ctx;
	struct disk_dirent d;

	(void)t;
	if (klen <= 9 || key[8] != KEY_DIRENT || vlen != sizeof(d))
		return 0;
	memcpy(&d, val, sizeof(d));
	for (size_t i = 0; i < s->bads; i++)
		if (s->bad[i].ino == get64(d.ino) && !s->bad[i].dir) {
			s->bad[i].dir = be64_get(key);
			s->bad[i].name = strndup((const char *)key + 9, klen - 9);
		}
	return 0;
}

struct find {
	uint64_t ino;
	char name[256];
};

static int find_entry(void *ctx, const struct dirent_info *e, const char *name,
		      size_t len)
{
	struct find *f = ctx;

	if (e->ino != f->ino)
		return 0;
	memcpy(f->name, name, len);
	f->name[len] = 0;
	return 1;
}

/* The directory's path, with a slash at its end; false if it is lost. */
static bool put_dir(struct scrub *s, uint64_t ino, unsigned depth)
{
	struct find f = {.ino = ino};
	struct inode *ip;
	uint64_t parent;
	int ret;

	if (ino == ROOT_INO) {
		printf("%s/", s->dir && strcmp(s->dir, "/") ? s->dir : "");
		return true;
	}
	if (depth > 1000 || inode_get(s->v, ino, &ip))
		return false;
	parent = ip->a.parent;
	inode_put(s->v, ip);
	if (inode_get(s->v, parent, &ip))
		return false;
	ret = dir_scan(s->v, ip, 0, find_entry, &f);
	inode_put(s->v, ip);
	if (ret != 1 || !put_dir(s, parent, depth + 1))
		return false;
	printf("%s/", f.name);
	return true;
}

static void report_files(struct scrub *s)
{
	struct walk w = {.ctx = s, .ahead = true, .item = name_item};

	if (!s->bads || (s->live && volume_now(s)))
		return;
	(void)volume_walk(s->v, TABLE_FILES, &w);
	cli_progress_end();
	for (size_t i = 0; i < s->bads; i++) {
		static const char *const harms[] = {
			[WRONG] = "are not what was written",
			[UNREADABLE] = "cannot be read",
			[LOST] = "were lost with their map"};
		struct damage *d = &s->bad[i];

		if (d->dir && put_dir(s, d->dir, 0))
			printf("%s", d->name ? d->name : "?");
		else
			printf("%s: inode %" PRIu64, s->image, d->ino);
		printf(": %" PRIu64 " bytes from offset %" PRIu64 " %s\n",
		       d->len << s->shift, d->blk << s->shift,
		       harms[d->harm]);
	}
}

/* ---- the whole ------------------------------------------------------------------------ */

static int scrub(struct scrub *s)
{
	int ret = s->state ? state_load(s) : 0;
	char size[16];

	if (ret) {
		cli_warn("state file '%s': %s", s->state,
			 ret == -EXDEV	? "it is of another volume" :
			 ret == -EINVAL ? "it is none" :
					  strerror(-ret));
		return EXIT_OPERATION;
	}
	s->start = s->saved = now();
	if (!s->phase && !s->klen)
		see_supers(s);
	while (!ret && s->phase < sizeof(phases) / sizeof(phases[0])) {
		ret = walk_phase(s);
		if (!ret) {
			s->phase++;
			s->klen = 0;
		}
	}
	cli_progress_end();
	report_files(s);
	if (ret < 0) {
		cli_warn("cannot go on with '%s': %s", s->image, cli_error(ret));
	} else if (ret == WALK_STOP) {
		cli_warn("stopped%s", s->state ? "; the same command goes on" : "");
	} else if (s->state) {
		unlink(s->state);
	}
	if (ret && s->phase < sizeof(phases) / sizeof(phases[0]))
		(void)state_save(s);
	if (!s->quiet && !ret)
		printf("%s: %s read, %s\n", s->image, cli_size(s->done, size),
		       s->bads || s->other ? "damaged" : "all is well");
	return (s->bads || s->other ? EXIT_DAMAGED : 0) |
	       (ret < 0 ? EXIT_OPERATION : ret ? EXIT_CANCELLED : 0);
}

static void scrub_free(struct scrub *s)
{
	if (s->v)
		volume_close(s->v);
	image_close(s->im);
	for (size_t i = 0; i < s->bads; i++)
		free(s->bad[i].name);
	free(s->bad);
	free(s->buf);
	free(s->image);
	free(s->dir);
}

int verb_scrub(int argc, char **argv)
{
	struct scrub s = {0};
	int c, status = EXIT_OPERATION;

	optind = 1;
	while ((c = getopt(argc, argv, "hqr:s:")) != -1) {
		switch (c) {
		case 'q':
			s.quiet = true;
			break;
		case 'r':
			if (cli_parse_size(optarg, &s.rate) || !s.rate) {
				cli_warn("'%s' is not a number of bytes", optarg);
				return EXIT_USAGE;
			}
			break;
		case 's':
			s.state = optarg;
			break;
		case 'h':
			fputs(scrub_usage, stdout);
			return 0;
		default:
			fputs(scrub_usage, stderr);
			return EXIT_USAGE;
		}
	}
	if (argc - optind != 1) {
		fputs(scrub_usage, stderr);
		return EXIT_USAGE;
	}
	s.asked = argv[optind];
	signal(SIGINT, on_signal);
	signal(SIGTERM, on_signal);
	if (!open_all(&s))
		status = scrub(&s);
	scrub_free(&s);
	return status;
}
