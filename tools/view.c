/* SPDX-License-Identifier: BSD-2-Clause */
/* Finding mounts and looking at volumes, for the verbs. */
#include "tools/cli.h"
#include "tools/verbs.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>

/* ---- mounts ------------------------------------------------------------------ */

/* The kernel writes blanks and backslashes as \ooo. In place. */
static void unescape(char *s)
{
	char *out = s;

	for (; *s; s++) {
		if (s[0] == '\\' && s[1] >= '0' && s[1] <= '3' && s[2] && s[3]) {
			*out++ = (char)((s[1] - '0') << 6 | (s[2] - '0') << 3 |
					(s[3] - '0'));
			s += 3;
		} else {
			*out++ = *s;
		}
	}
	*out = 0;
}

/*
 * A line of mountinfo: ID PARENT MAJ:MIN ROOT TARGET OPTIONS [TAG...] - TYPE
 * SOURCE SUPEROPTIONS. False when it is no mount of ours.
 */
static bool parse_mountinfo(char *line, char **target, char **source)
{
	char *save = NULL, *dash = strstr(line, " - ");
	char *field, *type;

	if (!dash)
		return false;
	*dash = 0;
	*target = NULL;
	field = strtok_r(line, " ", &save);
	for (unsigned i = 0; field && i < 5; i++) {
		if (i == 4)
			*target = field;
		field = strtok_r(NULL, " ", &save);
	}
	type = strtok_r(dash + 3, " ", &save);
	*source = strtok_r(NULL, " \n", &save);
	if (!*target || !type || !*source)
		return false;
	if (strcmp(type, "fuse.spaceweave") && strcmp(type, "spaceweave"))
		return false;
	unescape(*target);
	unescape(*source);
	return true;
}

static bool same_file(const char *a, const char *b)
{
	struct stat x, y;

	return !stat(a, &x) && !stat(b, &y) && x.st_dev == y.st_dev &&
	       x.st_ino == y.st_ino;
}

/* The image of a mount, the caller's to free. NULL when nobody knows. */
static char *image_of(const char *target, const char *source)
{
	char path[PATH_MAX + 1];
	ssize_t n;

	if (*source == '/')
		return strdup(source);
	n = getxattr(target, CLI_IMAGE_XATTR, path, PATH_MAX);
	if (n <= 0)
		return strdup(source);		/* its daemon is dead */
	path[n] = 0;
	return strdup(path);
}

int mount_find(const char *path, struct mount_entry *out)
{
	char *real = realpath(path, NULL);
	size_t room = 0;
	char *line = NULL;
	FILE *f = fopen("/proc/self/mountinfo", "r");
	int ret = -ENOENT;

	if (!f) {
		free(real);
		return -errno;
	}
	/* The last one that matches lies on top. A dead daemon's directory
	   has no real path, but its name is there as it was given. */
	while (getline(&line, &room, f) > 0) {
		char *target, *source;

		if (!parse_mountinfo(line, &target, &source))
			continue;
		source = image_of(target, source);
		if (!source || (strcmp(real ? real : path, target) &&
				!same_file(path, source))) {
			free(source);
			continue;
		}
		if (!ret)
			mount_free(out);
		out->source = source;
		out->target = strdup(target);
		ret = 0;
	}
	free(line);
	free(real);
	fclose(f);
	return ret;
}

void mount_free(struct mount_entry *m)
{
	free(m->source);
	free(m->target);
	m->source = m->target = NULL;
}

/* ---- views -------------------------------------------------------------------- */

#define LIVE_TRIES 20

static void unsaid(void *ctx, const char *text)
{
	(void)ctx;
	(void)text;
}

/*
 * A live image moves on while it is read: try again when that went wrong. Only
 * the last try says what it met, for what is overwritten meanwhile is no damage.
 */
static int open_volume(struct view *w, char *msg, size_t len)
{
	struct volume_options opt = {.readonly = true,
				     .no_threads = true,
				     .program = cli_program};
	unsigned tries = w->live ? LIVE_TRIES : 1;
	int ret = 0;

	for (unsigned i = 1; i <= tries; i++) {
		opt.message = i == tries ? cli_message : unsaid;
		ret = volume_open(w->im, &opt, &w->v, msg, len);
		if (ret != -EUCLEAN && ret != -EBADMSG)
			break;
	}
	return ret;
}

int view_open(const char *path, struct view *w)
{
	struct mount_entry m = {0};
	char msg[240];
	int ret;

	memset(w, 0, sizeof(*w));
	if (!mount_find(path, &m)) {
		w->image = m.source;
		w->dir = m.target;
	} else {
		w->image = strdup(path);
	}
	ret = w->dir ? -EBUSY : image_open(w->image, IMAGE_READ, &w->im);
	if (ret == -EBUSY) {
		w->live = true;
		ret = image_open(w->image, IMAGE_PEEK, &w->im);
	}
	if (ret) {
		struct stat st;

		if (ret == -EINVAL && !stat(path, &st) && S_ISDIR(st.st_mode))
			cli_warn("no Spaceweave volume is mounted at '%s'", path);
		else
			cli_warn("cannot open '%s': %s", w->image,
				 ret == -EINVAL ? "neither a regular file nor a block device" :
						  cli_error(ret));
		view_close(w);
		return ret;
	}
	ret = open_volume(w, msg, sizeof(msg));
	if (ret) {
		w->v = NULL;
		cli_warn("cannot open '%s': %s", w->image, msg);
		view_close(w);
	}
	return ret;
}

void view_close(struct view *w)
{
	if (w->v)
		volume_close(w->v);
	image_close(w->im);
	free(w->image);
	free(w->dir);
	memset(w, 0, sizeof(*w));
}
