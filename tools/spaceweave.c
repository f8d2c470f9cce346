/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * spaceweave VERB ...: the one command to remember. mount, mkfs and fsck run
 * the programs of those names, the one beside this one first; the other verbs
 * are functions, listed in verbs[].
 */
#include "tools/cli.h"
#include "tools/verbs.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct verb {
	const char *name;
	int (*run)(int argc, char **argv);	/* or, NULL: */
	const char *program;
	const char *what;
};

static const struct verb verbs[] = {
	{"mkfs", NULL, "mkfs.spaceweave", "write an empty volume: IMAGE [SIZE]"},
	{"mount", NULL, "mount.spaceweave", "mount a volume: IMAGE DIR [-o OPTIONS]"},
	{"umount", verb_umount, NULL, "unmount, wait until all is durable: DIR"},
	{"fsck", NULL, "fsck.spaceweave", "check and repair: IMAGE"},
	{"scrub", verb_scrub, NULL, "verify all data and metadata: IMAGE|DIR"},
	{"undo", verb_undo, NULL, "take back what fsck -u changed: FILE IMAGE"},
	{"info", verb_info, NULL, "what a volume is and holds: IMAGE|DIR"},
	{"map", verb_map, NULL, "a picture of its free space: IMAGE|DIR"},
};

static void print_usage(FILE *to)
{
	fputs("usage: spaceweave VERB [ARGUMENTS]\n", to);
	for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++)
		fprintf(to, "  %-8s %s\n", verbs[i].name, verbs[i].what);
	fputs("  -h, -V   this help; the version\n"
	      "'spaceweave VERB -h' tells more.\n",
	      to);
}

/* Run the program beside this one, else the one in PATH. */
static int run_program(const char *name, char **argv)
{
	char self[PATH_MAX], path[PATH_MAX + 64];
	ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
	char *slash;

	argv[0] = (char *)name;
	if (n > 0) {
		self[n] = 0;
		slash = strrchr(self, '/');
		if (slash) {
			*slash = 0;
			snprintf(path, sizeof(path), "%s/%s", self, name);
			execv(path, argv);
			/* installed: programs in bin, mkfs and fsck in sbin */
			snprintf(path, sizeof(path), "%s/../sbin/%s", self, name);
			execv(path, argv);
		}
	}
	execvp(name, argv);
	cli_warn("cannot run %s: %s", name, strerror(errno));
	return errno == ENOENT ? 127 : 126;
}

int main(int argc, char **argv)
{
	cli_init(argv[0]);
	if (argc < 2) {
		print_usage(stderr);
		return 1;
	}
	if (!strcmp(argv[1], "-V") || !strcmp(argv[1], "--version")) {
		cli_version();
		return cli_finish(0, 1);
	}
	if (!strcmp(argv[1], "-h") || !strcmp(argv[1], "--help") ||
	    !strcmp(argv[1], "help")) {
		print_usage(stdout);
		return cli_finish(0, 1);
	}
	for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++) {
		if (strcmp(argv[1], verbs[i].name))
			continue;
		if (!verbs[i].run)
			return run_program(verbs[i].program, argv + 1);
		return cli_finish(verbs[i].run(argc - 1, argv + 1), 1);
	}
	cli_warn("no verb '%s'; 'spaceweave -h' lists them", argv[1]);
	return 1;
}
