/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * spaceweave umount DIR: the kernel takes the mount away while the daemon still
 * writes what is left. So: unmount, then wait until the image's lock is free,
 * which the daemon gives up after its last flush.
 */
#include "tools/cli.h"
#include "tools/verbs.h"

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char umount_usage[] =
"usage: spaceweave umount [-lqh] [-t SECONDS] DIR|IMAGE\n"
"Unmount a volume and return when its image is released and durable.\n"
"  -l           lazily: detach now, even if files are open, and do not wait\n"
"  -q           say nothing but errors\n"
"  -t SECONDS   how long to wait for all that (60; 0: for ever)\n"
"  -h           this help\n";

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

/* How long to wait for all of it. */
struct patience {
	unsigned seconds;	/* 0: for ever */
	double start;
	useconds_t nap;
};

/* Wait a little longer each time. False: it has been long enough. */
static bool nap(struct patience *p)
{
	if (p->seconds && now() - p->start > p->seconds)
		return false;
	usleep(p->nap);
	if (p->nap < 50000)
		p->nap *= 2;
	return true;
}

/* What a program that was run has said, to our own standard error. */
static void pass_on(int fd)
{
	char text[512];
	ssize_t n;
	off_t at = 0;

	while ((n = pread(fd, text, sizeof(text), at)) > 0) {
		fwrite(text, 1, (size_t)n, stderr);
		at += n;
	}
}

/*
 * Its exit status. -ETIMEDOUT when it has not ended in time: the kernel waits
 * for the daemon to write what is dirty, and past being killed. So the program
 * keeps nothing open of ours, and what it says is kept for it.
 */
static int run(char *const argv[], struct patience *p)
{
	int status, said = memfd_create("said", MFD_CLOEXEC);
	pid_t pid = said < 0 ? -1 : fork(), done;

	if (pid < 0)
		return -errno;
	if (pid == 0) {
		for (int i = 0; i < 3; i++)
			dup2(said, i);
		execvp(argv[0], argv);
		_exit(127);
	}
	p->nap = 1000;
	while ((done = waitpid(pid, &status, WNOHANG)) != pid) {
		if (done < 0 && errno != EINTR)
			return -errno;
		if (!nap(p)) {
			kill(pid, SIGKILL);
			return -ETIMEDOUT;
		}
	}
	pass_on(said);
	close(said);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

/* As root umount(8), else fusermount3, which may do it for us. They say why not. */
static int unmount(const char *dir, bool lazy, struct patience *p)
{
	char *as_root[] = {"umount", "-i", "--", (char *)dir, NULL};
	char *as_root_lazy[] = {"umount", "-i", "-l", "--", (char *)dir, NULL};
	char *as_user[] = {"fusermount3", "-u", "--", (char *)dir, NULL};
	char *as_user_lazy[] = {"fusermount3", "-u", "-z", "--", (char *)dir, NULL};
	int ret;

	if (geteuid() == 0)
		ret = run(lazy ? as_root_lazy : as_root, p);
	else
		ret = run(lazy ? as_user_lazy : as_user, p);
	if (ret == -ETIMEDOUT)
		cli_warn("'%s' is not unmounted after %u seconds: its daemon does "
			 "not answer; -l detaches it", dir, p->seconds);
	else if (ret < 0 || ret >= 126)
		cli_warn("cannot run %s",
			 geteuid() == 0 ? as_root[0] : as_user[0]);
	return ret;
}

/* -ETIMEDOUT when the image is still held. */
static int wait_free(const char *image, struct patience *p)
{
	p->nap = 1000;
	for (;;) {
		int ret = image_released(image);

		if (ret != -EBUSY)
			return ret;
		if (!nap(p))
			return -ETIMEDOUT;
	}
}

static void report(const char *dir, const char *image, unsigned seconds, bool quiet,
		   int ret)
{
	char holder[160];

	if (ret == -ETIMEDOUT)
		cli_warn("'%s' is unmounted, but %s still writes to '%s' after %u "
			 "seconds", dir, cli_holder(image, holder, sizeof(holder)),
			 image, seconds);
	else if (ret)
		/* Unreadable for us or gone: no way to wait for it. */
		cli_warn("'%s' is unmounted, but '%s' cannot be opened to see when it "
			 "is durable: %s", dir, image, strerror(-ret));
	else if (!quiet && isatty(STDOUT_FILENO))
		printf("%s: unmounted, all durable\n", image);
}

/* The image is asked for first: afterwards nobody knows it any more. */
static int unmount_and_wait(const struct mount_entry *m, unsigned seconds, bool quiet)
{
	struct patience p = {.seconds = seconds, .start = now()};
	char *image = NULL;
	int known = mount_image(m, seconds, &image), ret;

	if (known == -ETIMEDOUT) {
		cli_warn("'%s' is not unmounted: its daemon does not answer; -l "
			 "detaches it", m->target);
		return known;
	}
	ret = unmount(m->target, false, &p);
	if (!ret) {
		ret = known ? known : wait_free(image, &p);
		report(m->target, image ? image : m->source, seconds, quiet, ret);
	}
	free(image);
	return ret;
}

static int unmount_lazily(const struct mount_entry *m, unsigned seconds)
{
	struct patience p = {.seconds = seconds, .start = now()};

	return unmount(m->target, true, &p);
}

int verb_umount(int argc, char **argv)
{
	bool lazy = false, quiet = false;
	unsigned seconds = 60;
	struct mount_entry m;
	unsigned long n;
	char *end;
	int c, ret;

	optind = 1;
	while ((c = getopt(argc, argv, "lqht:")) != -1) {
		switch (c) {
		case 'l':
			lazy = true;
			break;
		case 'q':
			quiet = true;
			break;
		case 't':
			errno = 0;
			n = strtoul(optarg, &end, 10);
			seconds = (unsigned)n;
			if (*end || !isdigit((unsigned char)*optarg) || errno ||
			    n > UINT_MAX) {
				cli_warn("'%s' is not a number of seconds",
					 optarg);
				return 1;
			}
			break;
		case 'h':
			fputs(umount_usage, stdout);
			return 0;
		default:
			fputs(umount_usage, stderr);
			return 1;
		}
	}
	if (argc - optind != 1) {
		fputs(umount_usage, stderr);
		return 1;
	}
	if (mount_find(argv[optind], &m)) {
		cli_warn("no Spaceweave volume is mounted at '%s'", argv[optind]);
		return 1;
	}
	ret = lazy ? unmount_lazily(&m, seconds) :
		     unmount_and_wait(&m, seconds, quiet);
	mount_free(&m);
	return ret ? 1 : 0;
}
