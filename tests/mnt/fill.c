/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * fill: files that can be told, until no more fit.
 *
 *   fill small|large DIR [MAX]   until ENOSPC, or MAX files; each one fsynced
 *   fill fast DIR MAX            MAX small files, none fsynced, 1000 in a folder
 *   fill verify DIR              every file is whole, apart from the last
 *
 * The file that did not fit is removed, unless the file system is read-only
 * by then: so the last one may be anything. Prints "FILES BYTES".
 */
#include "tests/mnt/pattern.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static uint64_t number(const char *dir, unsigned long n)
{
	uint64_t h = 1469598103934665603u;

	for (; *dir; dir++)
		h = (h ^ (uint8_t)*dir) * 1099511628211u;
	return pattern_mix(h ^ n);
}

static const char *leaf(const char *dir)
{
	const char *at = strrchr(dir, '/');

	return at ? at + 1 : dir;
}

static int put(const char *path, uint64_t key, size_t bytes, bool sync)
{
	static uint8_t buf[1 << 20];
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0644), err = 0;

	if (fd < 0)
		return -errno;
	for (size_t at = 0; at < bytes && !err;) {
		size_t n = bytes - at < sizeof(buf) ? bytes - at : sizeof(buf);
		ssize_t done;

		pattern_fill(key, at, buf, n);
		done = write(fd, buf, n);
		if (done < 0)
			err = -errno;
		else
			at += (size_t)done;
	}
	if (!err && sync && fsync(fd))
		err = -errno;
	if (close(fd) && !err)
		err = -errno;
	return err;
}

static int fill(const char *dir, bool large, bool sync, unsigned long max)
{
	unsigned long n;
	uint64_t total = 0;
	char path[4096];
	int err = 0;

	for (n = 0; n < max; n++) {
		uint64_t key = number(leaf(dir), n);
		size_t bytes = large ? (4 << 20) + key % (12 << 20) :
			       sync ? key % 40000 : key % 2000;

		snprintf(path, sizeof(path), "%s/%lu", dir, n / 1000);
		if (n % 1000 == 0 && mkdir(path, 0755) && errno != EEXIST) {
			err = -errno;
			break;
		}
		snprintf(path, sizeof(path), "%s/%lu/%lu-%zu", dir, n / 1000, n, bytes);
		err = put(path, key, bytes, sync);
		if (err) {
			if (unlink(path) && errno != ENOENT && errno != EROFS) {
				fprintf(stderr, "fill: cannot remove %s: %s\n",
					path, strerror(errno));
				return 1;
			}
			break;
		}
		total += bytes;
	}
	printf("%lu %llu\n", n, (unsigned long long)total);
	if (err == -EROFS)
		fprintf(stderr, "fill: read-only from %s on\n", path);
	else if (err && err != -ENOSPC) {
		fprintf(stderr, "fill: %s: %s\n", path, strerror(-err));
		return 1;
	}
	return 0;
}

static int verify_one(const char *path, const char *name, const char *dir)
{
	unsigned long n;
	size_t bytes;
	uint8_t *buf;
	ssize_t got;
	int fd, wrong;

	if (sscanf(name, "%lu-%zu", &n, &bytes) != 2)
		return 0;
	fd = open(path, O_RDONLY);
	buf = malloc(bytes + 1);
	got = fd < 0 ? -1 : 0;
	for (size_t at = 0; got >= 0 && at <= bytes; at += (size_t)got) {
		got = read(fd, buf + at, bytes + 1 - at);
		if (!got) {
			got = (ssize_t)at;
			break;
		}
	}
	wrong = got != (ssize_t)bytes;
	for (size_t i = 0; !wrong && i < bytes; i++)
		wrong = buf[i] != pattern_byte(number(leaf(dir), n), i);
	if (wrong)
		printf("WRONG: %s: %zd bytes: %s\n", path, got,
		       got < 0 ? strerror(errno) : "not what was written");
	free(buf);
	if (fd >= 0)
		close(fd);
	return wrong;
}

static int verify(const char *dir)
{
	unsigned long wrong = 0, files = 0, last = 0, nr;
	char path[4096], file[8192];
	int last_wrong = 0, is_wrong;

	for (unsigned long n = 0;; n++) {
		struct dirent *e;
		DIR *d;

		snprintf(path, sizeof(path), "%s/%lu", dir, n);
		d = opendir(path);
		if (!d)
			break;
		while ((e = readdir(d))) {
			if (*e->d_name == '.')
				continue;
			snprintf(file, sizeof(file), "%s/%s", path, e->d_name);
			nr = strtoul(e->d_name, NULL, 10);
			is_wrong = verify_one(file, e->d_name, dir);
			if (nr >= last) {
				last = nr;
				last_wrong = is_wrong;
			}
			wrong += (unsigned long)is_wrong;
			files++;
		}
		closedir(d);
	}
	wrong -= (unsigned long)last_wrong;
	printf("%lu files, %lu wrong\n", files, wrong);
	return wrong ? 1 : 0;
}

int main(int argc, char **argv)
{
	unsigned long max = argc > 3 ? strtoul(argv[3], NULL, 10) : ~0ul;

	if (argc > 2 && !strcmp(argv[1], "small"))
		return fill(argv[2], false, true, max);
	if (argc > 2 && !strcmp(argv[1], "large"))
		return fill(argv[2], true, true, max);
	if (argc > 3 && !strcmp(argv[1], "fast"))
		return fill(argv[2], false, false, max);
	if (argc > 2 && !strcmp(argv[1], "verify"))
		return verify(argv[2]);
	fprintf(stderr, "usage: fill small|large|fast|verify DIR [MAX]\n");
	return 2;
}
