/* SPDX-License-Identifier: BSD-2-Clause */
/* spaceweave info: what a volume is and holds. */
#include "tools/cli.h"
#include "tools/verbs.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

static const char info_usage[] =
"usage: spaceweave info [-h] IMAGE|DIR\n"
"Say what a volume is and holds, mounted or not.\n";

static void print_time(const char *what, uint64_t ns)
{
	time_t sec = (time_t)(ns / 1000000000u);
	struct tm tm;
	char text[40];

	if (!ns || !localtime_r(&sec, &tm))
		return;
	strftime(text, sizeof(text), "%Y-%m-%d %H:%M:%S %z", &tm);
	printf("%-10s %s\n", what, text);
}

static void print_bytes(const char *what, uint64_t blks, unsigned shift)
{
	char size[16];

	printf("%-10s %s, %" PRIu64 " blocks\n", what,
	       cli_size(blks << shift, size), blks);
}

static void print_state(const struct view *w, const struct disk_super *s)
{
	char holder[160];

	if (w->live)
		printf("%-10s held by %s\n", "state",
		       cli_holder(w->image, holder, sizeof(holder)));
	else
		printf("%-10s %s\n", "state",
		       get32(s->flags) & SUPER_CLEAN ?
			       "clean" :
			       "not unmounted cleanly; the next mount replays");
	if (w->dir)
		printf("%-10s %s\n", "mounted", w->dir);
}

/* What the host really holds of a sparse image. */
static void print_host(const struct view *w)
{
	struct stat st;
	char a[16], b[16];

	if (image_fd(w->im) < 0 || fstat(image_fd(w->im), &st) ||
	    !S_ISREG(st.st_mode))
		return;
	printf("%-10s %s long, %s held by the host\n", "file",
	       cli_size((uint64_t)st.st_size, a),
	       cli_size((uint64_t)st.st_blocks * 512, b));
}

static void print_counts(const struct view *w, const struct volume_stat *st,
			 unsigned shift)
{
	struct statvfs fs;
	uint64_t total = st->blocks, free_blks = st->free_blks;
	uint64_t avail = st->avail_blks, inodes = st->inodes;

	/* The daemon knows better than its last checkpoint. */
	if (w->dir && !statvfs(w->dir, &fs)) {
		unsigned ratio = (unsigned)(fs.f_frsize >> shift);

		if (ratio) {
			free_blks = fs.f_bfree * ratio;
			avail = fs.f_bavail * ratio;
		}
		inodes = fs.f_files - fs.f_ffree;
	}
	print_bytes("size", total, shift);
	print_bytes("used", total - free_blks, shift);
	print_bytes("free", free_blks, shift);
	print_bytes("available", avail, shift);
	printf("%-10s %" PRIu64 "\n", "inodes", inodes);
}

int verb_info(int argc, char **argv)
{
	const struct disk_super *s;
	struct volume_stat st;
	struct view w;
	char uuid[37], a[16], b[16];
	unsigned shift;

	if (argc == 2 && !strcmp(argv[1], "-h")) {
		fputs(info_usage, stdout);
		return 0;
	}
	if (argc != 2 || argv[1][0] == '-') {
		fputs(info_usage, stderr);
		return 1;
	}
	if (view_open(argv[1], &w))
		return 1;
	s = volume_super(w.v);
	shift = get32(s->block_shift);
	volume_stat(w.v, &st);
	cli_uuid(s->uuid, uuid);
	printf("%-10s %s\n", "image", w.image);
	printf("%-10s %s\n", "UUID", uuid);
	if (s->label[0])
		printf("%-10s %.*s\n", "label", (int)LABEL_BYTES, s->label);
	printf("%-10s %u; features %#" PRIx64 " compatible, %#" PRIx64
	       " read-only, %#" PRIx64 " incompatible\n",
	       "format", get32(s->version), get64(s->compat),
	       get64(s->ro_compat), get64(s->incompat));
	print_state(&w, s);
	print_time("made", get64(s->created_ns));
	print_time("written", get64(s->written_ns));
	printf("%-10s %u, checkpoint %" PRIu64 "\n", "mounts", get32(s->mounts),
	       get64(s->gen));
	printf("%-10s %s\n", "block", cli_size(1ull << shift, a));
	printf("%-10s %s at block %" PRIu64 ", %s used\n", "journal",
	       cli_size(get64(s->journal_units) * JOURNAL_UNIT, a),
	       get64(s->journal_block),
	       cli_size(st.journal_used * JOURNAL_UNIT, b));
	print_counts(&w, &st, shift);
	print_host(&w);
	for (unsigned t = 0; t < TABLES; t++) {
		static const char *const names[] = {"files", "refs", "space"};

		printf("%-10s %" PRIu64 " items in %" PRIu64
		       " nodes, %u levels\n",
		       names[t], get64(s->root[t].items),
		       get64(s->root[t].nodes),
		       get64(s->root[t].ptr.block) ?
			       get32(s->root[t].level) + 1 : 0);
	}
	view_close(&w);
	return 0;
}
