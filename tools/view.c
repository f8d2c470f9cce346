/* SPDX-License-Identifier: BSD-2-Clause */
/* Finding mounts and looking at volumes, for the verbs. */
#include "tools/cli.h"
#include "tools/verbs.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

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

/* As the kernel knows them: no daemon, of a file system below, is asked. */
static bool same_file(const char *a, const char *b)
{
	struct statx x, y;

	return !statx(AT_FDCWD, a, AT_STATX_DONT_SYNC, STATX_INO, &x) &&
	       !statx(AT_FDCWD, b, AT_STATX_DONT_SYNC, STATX_INO, &y) &&
	       x.stx_ino == y.stx_ino && x.stx_dev_major == y.stx_dev_major &&
	       x.stx_dev_minor == y.stx_dev_minor;
}

/*
 * In a process of its own, for there is no way back out of asking. It may be left
 * behind, and keeps nothing open that others wait for.
 */
static void ask_child(const char *target, int to)
{
	char path[PATH_MAX];
	ssize_t n;

	for (int i = 0; i < 3; i++)
		if (i != to)
			close(i);
	n = getxattr(target, CLI_IMAGE_XATTR, path, sizeof(path));
	_exit(n > 0 && write(to, path, (size_t)n) == n ? 0 : 1);
}

/*
 * What its daemon says the image of a mount is, the caller's to free. -ETIMEDOUT
 * when it has not answered in so many seconds (0: for ever).
 */
static int ask(const char *target, unsigned seconds, char **image)
{
	int ms = seconds && seconds < INT_MAX / 1000 ? (int)seconds * 1000 : -1;
	struct pollfd p = {.events = POLLIN};
	char path[PATH_MAX + 1];
	ssize_t n;
	int fd[2];
	pid_t pid;

	if (pipe2(fd, O_CLOEXEC))
		return -errno;
	pid = fork();
	if (!pid)
		ask_child(target, fd[1]);
	close(fd[1]);
	p.fd = fd[0];
	while (pid > 0 && (n = poll(&p, 1, ms)) < 0 && errno == EINTR)
		;
	if (pid < 0 || n <= 0) {
		close(fd[0]);
		if (pid < 0)
			return -EAGAIN;
		/* It may be past being killed: it goes when the daemon does. */
		kill(pid, SIGKILL);
		return -ETIMEDOUT;
	}
	n = read(fd[0], path, PATH_MAX);
	close(fd[0]);
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
	if (n <= 0)
		return -ENOTCONN;
	*image = strndup(path, (size_t)n);
	return *image ? 0 : -ENOMEM;
}

int mount_image(const struct mount_entry *m, unsigned seconds, char **image)
{
	if (*m->source != '/')
		return ask(m->target, seconds, image);
	*image = strdup(m->source);
	return *image ? 0 : -ENOMEM;
}

/* ---- finding one -------------------------------------------------------------- */

#define ASK_SECONDS 10

static bool by_target(const struct mount_entry *m, const char *path)
{
	return !strcmp(m->target, path);
}

static bool by_source(const struct mount_entry *m, const char *path)
{
	return *m->source == '/' && same_file(m->source, path);
}

/* The source was given from a folder that nobody knows: its daemon has to say. */
static bool by_answer(const struct mount_entry *m, const char *path)
{
	char *image;
	bool same;

	if (*m->source == '/' || mount_image(m, ASK_SECONDS, &image))
		return false;
	same = same_file(image, path);
	free(image);
	return same;
}

/* The last one that matches lies on top. */
static int find(bool (*is)(const struct mount_entry *m, const char *path),
		const char *path, struct mount_entry *out)
{
	FILE *f = fopen("/proc/self/mountinfo", "re");
	char *line = NULL;
	size_t room = 0;
	int ret = -ENOENT;

	if (!f)
		return -errno;
	while (getline(&line, &room, f) > 0) {
		struct mount_entry m;

		if (!parse_mountinfo(line, &m.target, &m.source) || !is(&m, path))
			continue;
		if (!ret)
			mount_free(out);
		out->source = strdup(m.source);
		out->target = strdup(m.target);
		ret = out->source && out->target ? 0 : -ENOMEM;
		if (ret) {
			mount_free(out);
			break;
		}
	}
	free(line);
	fclose(f);
	return ret;
}

/*
 * The path from / of what may be a mount's root, which itself is not looked at.
 * NULL when it is written so that it has to be.
 */
static char *path_of(const char *path)
{
	char *copy = strdup(path), *dir = NULL, *out = NULL, *name;
	size_t n = strlen(path);

	while (copy && n > 1 && copy[n - 1] == '/')
		copy[--n] = 0;
	name = copy ? strrchr(copy, '/') : NULL;
	name = name ? name + 1 : copy;
	if (name && *name && strcmp(name, ".") && strcmp(name, "..")) {
		char *parent = strndup(copy, (size_t)(name - copy));

		dir = parent ? realpath(*parent ? parent : ".", NULL) : NULL;
		free(parent);
	}
	if (dir && asprintf(&out, "%s/%s", strcmp(dir, "/") ? dir : "", name) < 0)
		out = NULL;
	free(dir);
	free(copy);
	return out;
}

/*
 * By the directory first, for that needs nobody's answer; a daemon that stands
 * still holds up no other volume. Then what leads there by links, then images.
 */
int mount_find(const char *path, struct mount_entry *out)
{
	char *name = path_of(path), *real;
	struct statx st;
	int ret = name ? find(by_target, name, out) : -ENOENT;

	free(name);
	if (!ret)
		return 0;
	real = realpath(path, NULL);
	if (real)
		ret = find(by_target, real, out);
	free(real);
	if (!ret || statx(AT_FDCWD, path, AT_STATX_DONT_SYNC, STATX_TYPE, &st) ||
	    S_ISDIR(st.stx_mode))
		return ret;
	ret = find(by_source, path, out);
	return ret == -ENOENT ? find(by_answer, path, out) : ret;
}

void mount_free(struct mount_entry *m)
{
	free(m->source);
	free(m->target);
	m->source = m->target = NULL;
}

/* ---- views -------------------------------------------------------------------- */

#define LIVE_TRIES 20
#define ANSWER_SECONDS 60

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

int view_find(const char *path, char **image, char **dir)
{
	struct mount_entry m = {0};
	int ret = 0;

	*image = *dir = NULL;
	if (mount_find(path, &m))
		*image = strdup(path);
	else
		ret = mount_image(&m, ANSWER_SECONDS, image);
	if (!ret && !*image)
		ret = -ENOMEM;
	if (ret == -ETIMEDOUT || ret == -ENOTCONN)
		cli_warn("'%s': its daemon does not answer, and '%s' is no path from /",
			 m.target, m.source);
	else if (ret)
		cli_warn("'%s': %s", path, cli_error(ret));
	free(m.source);
	if (ret)
		free(m.target);
	else
		*dir = m.target;
	return ret;
}

int view_open(const char *path, struct view *w)
{
	char msg[240];
	int ret;

	memset(w, 0, sizeof(*w));
	ret = view_find(path, &w->image, &w->dir);
	if (ret)
		return ret;
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
