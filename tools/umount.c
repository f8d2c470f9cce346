/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * spaceweave umount DIR: the kernel takes the mount away while the daemon still
 * writes what is left. So: unmount, then wait until the image's lock is free,
 * which the daemon gives up after its last flush.
 */
#include "tools/cli.h"
#include "tools/verbs.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char umount_usage[] =
"usage: spaceweave umount [-lqh] [-t SECONDS] DIR|IMAGE\n"
"Unmount a volume and return when its image is released and durable.\n"
"  -l           lazily: detach now, even if files are open, and do not wait\n"
"  -q           say nothing but errors\n"
"  -t SECONDS   how long to wait for the image (60; 0: for ever)\n"
"  -h           this help\n";

static int run(char *const argv[])
{
	int status;
	pid_t pid = fork();

	if (pid < 0)
		return -errno;
	if (pid == 0) {
		execvp(argv[0], argv);
		_exit(127);
	}
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return -errno;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

/* As root umount(8), else fusermount3, which may do it for us. They say why not. */
static int unmount(const char *dir, bool lazy)
{
	char *as_root[] = {"umount", "-i", "--", (char *)dir, NULL};
	char *as_root_lazy[] = {"umount", "-i", "-l", "--", (char *)dir, NULL};
	char *as_user[] = {"fusermount3", "-u", "--", (char *)dir, NULL};
	char *as_user_lazy[] = {"fusermount3", "-u", "-z", "--", (char *)dir, NULL};
	int ret;

	if (geteuid() == 0)
		ret = run(lazy ? as_root_lazy : as_root);
	else
		ret = run(lazy ? as_user_lazy : as_user);
	if (ret < 0 || ret >= 126)
		cli_warn("cannot run %s",
			 geteuid() == 0 ? as_root[0] : as_user[0]);
	return ret;
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

/* -ETIMEDOUT when the image is still held after `seconds` (0: for ever). */
static int wait_free(const char *image, unsigned seconds)
{
	double start = now();
	useconds_t nap = 1000;

	for (;;) {
		struct image *im;
		int ret = image_open(image, IMAGE_READ, &im);

		if (!ret)
			image_close(im);
		if (ret != -EBUSY)
			return ret;
		if (seconds && now() - start > seconds)
			return -ETIMEDOUT;
		usleep(nap);
		if (nap < 50000)
			nap *= 2;
	}
}

int verb_umount(int argc, char **argv)
{
	bool lazy = false, quiet = false;
	unsigned seconds = 60;
	struct mount_entry m;
	char holder[160], *end;
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
			seconds = (unsigned)strtoul(optarg, &end, 10);
			if (*end || end == optarg) {
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
	ret = unmount(m.target, lazy);
	if (!ret && !lazy) {
		ret = wait_free(m.source, seconds);
		if (ret == -ETIMEDOUT)
			cli_warn("'%s' is unmounted, but %s still writes to '%s' "
				 "after %u seconds",
				 m.target,
				 cli_holder(m.source, holder, sizeof(holder)),
				 m.source, seconds);
		else if (ret)
			/* Unreadable for us or gone: no way to wait for it. */
			cli_warn("'%s' is unmounted, but '%s' cannot be opened to "
				 "see when it is durable: %s",
				 m.target, m.source, strerror(-ret));
		else if (!quiet && isatty(STDOUT_FILENO))
			printf("%s: unmounted, all durable\n", m.source);
	}
	mount_free(&m);
	return ret ? 1 : 0;
}
