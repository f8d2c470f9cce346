/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * tree IMAGE|DIR DIRS FILES [BYTES]: fills an empty volume, or a directory of
 * any file system, with DIRS directories of FILES files of BYTES bytes each.
 * The volume is filled through fs.h, without a mount: to compare fsck with
 * others' (README.md).
 */
#include "fs/fs.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static unsigned long dirs, files, bytes;
static char data[1 << 20];

static void must(const char *what, int ret)
{
	if (ret >= 0)
		return;
	fprintf(stderr, "tree: %s: %s\n", what, strerror(-ret));
	exit(1);
}

static void fill_dir(const char *root)
{
	char path[64];

	must(root, chdir(root) ? -errno : 0);
	for (unsigned long i = 0; i < dirs; i++) {
		snprintf(path, sizeof(path), "dir-%05lu", i);
		must(path, mkdir(path, 0755) ? -errno : 0);
		for (unsigned long j = 0; j < files; j++) {
			int fd;

			snprintf(path, sizeof(path), "dir-%05lu/file-%06lu", i, j);
			fd = open(path, O_WRONLY | O_CREAT, 0644);
			must(path, fd < 0 ? -errno : 0);
			if (bytes && write(fd, data, bytes) != (ssize_t)bytes)
				must(path, -EIO);
			close(fd);
		}
	}
}

static void fill_image(const char *path)
{
	const struct fs_cred c = {.uid = 1000, .gid = 1000};
	struct volume_options opt = {.program = "tree"};
	struct fs_options none = {0};
	struct fs_entry d, e;
	struct image *im;
	struct volume *v;
	struct fs *fs;
	char msg[200], name[32];

	must(path, image_open(path, IMAGE_WRITE, &im));
	must(path, volume_open(im, &opt, &v, msg, sizeof(msg)));
	must(path, fs_open(v, &none, &fs));
	for (unsigned long i = 0; i < dirs; i++) {
		snprintf(name, sizeof(name), "dir-%05lu", i);
		must(name, fs_mkdir(fs, &c, ROOT_INO, name, 0755, &d));
		for (unsigned long j = 0; j < files; j++) {
			snprintf(name, sizeof(name), "file-%06lu", j);
			must(name, fs_mknod(fs, &c, d.ino, name, S_IFREG | 0644,
					    0, &e));
			if (bytes)
				must(name, (int)fs_write(fs, e.ino, data, bytes,
							 0, 0));
			fs_forget(fs, e.ino, 1);
		}
		fs_forget(fs, d.ino, 1);
	}
	must("close", fs_close(fs));
	must("close", volume_close(v));
	image_close(im);
}

int main(int argc, char **argv)
{
	struct stat st;

	if (argc < 4 || argc > 5 || stat(argv[1], &st)) {
		fputs("usage: tree IMAGE|DIR DIRS FILES [BYTES]\n", stderr);
		return 1;
	}
	dirs = strtoul(argv[2], NULL, 0);
	files = strtoul(argv[3], NULL, 0);
	bytes = argc > 4 ? strtoul(argv[4], NULL, 0) : 0;
	if (bytes > sizeof(data))
		bytes = sizeof(data);
	memset(data, 'd', sizeof(data));
	if (S_ISDIR(st.st_mode))
		fill_dir(argv[1]);
	else
		fill_image(argv[1]);
	return 0;
}
