/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Loop devices: the same bytes can be opened as a file and as the device that
 * stands on it, and a lock on one does not reach the other. So:
 *   - who opens a loop device locks the bytes below it, too (loop_lock), if it
 *     may open that file;
 *   - who opens a file to write is refused while a loop device stands on it
 *     (loop_over), for whoever has that open has a cache of his own, and
 *     perhaps no lock of ours.
 *
 * sysfs tells everybody the name of the file below. By now, or here, that may
 * be the name of no file or of another one: the device knows the file itself,
 * but only root may ask it. What cannot be found out is taken for nothing: then
 * a heartbeat (mmp.c) is all that keeps the other out.
 */
#include "meta/meta_priv.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/loop.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* A sysfs attribute without its newline; a name may hold others. */
static bool sys_read(const char *path, char *buf, size_t len)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, buf, len - 1);

	if (fd >= 0)
		close(fd);
	if (n <= 0)
		return false;
	buf[n - (buf[n - 1] == '\n')] = 0;
	return true;
}

/* An attribute of a block device, found by its number. */
static bool dev_read(dev_t dev, const char *what, char *buf, size_t len)
{
	char path[96];

	snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/%s", major(dev),
		 minor(dev), what);
	return sys_read(path, buf, len);
}

static bool is_below(int loop, const struct stat *st, struct loop_info64 *info)
{
	return !ioctl(loop, LOOP_GET_STATUS64, info) &&
	       info->lo_device == st->st_dev && info->lo_inode == st->st_ino;
}

/* ---- what is below a loop device ---------------------------------------------- */

/* The file's name; of a partition, that of its whole device's file. */
static bool below_name(dev_t dev, char *buf, size_t len)
{
	return dev_read(dev, "loop/backing_file", buf, len) ||
	       dev_read(dev, "../loop/backing_file", buf, len);
}

/*
 * Only the device's own bytes, for others may stand on others of the same file:
 * partitions, or devices with an offset.
 */
static int bytes_lock(int fd, const struct loop_info64 *info, dev_t dev,
		      uint64_t bytes, bool write)
{
	struct flock fl = {.l_type = write ? F_WRLCK : F_RDLCK,
			   .l_whence = SEEK_SET};
	uint64_t start = info->lo_offset;
	char sectors[32];

	if (dev_read(dev, "start", sectors, sizeof(sectors)))
		start += strtoull(sectors, NULL, 10) * 512;
	fl.l_start = (off_t)start;
	fl.l_len = (off_t)bytes;
	if (fcntl(fd, F_OFD_SETLK, &fl) == 0)
		return 0;
	return errno == EAGAIN || errno == EACCES ? -EBUSY : -errno;
}

int loop_lock(int loop, uint64_t bytes, bool write, int *out)
{
	struct loop_info64 info;
	struct stat dev, st;
	char file[PATH_MAX + 1];
	int fd, r;

	*out = -1;
	if (fstat(loop, &dev) || !S_ISBLK(dev.st_mode) ||
	    !below_name(dev.st_rdev, file, sizeof(file)) || stat(file, &st) ||
	    !is_below(loop, &st, &info))
		return 0;
	fd = open(file, (write ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return 0;
	r = fstat(fd, &st) || !is_below(loop, &st, &info) ?
		    -ESTALE :
		    bytes_lock(fd, &info, dev.st_rdev, bytes, write);
	if (r) {
		close(fd);
		return r == -EBUSY ? r : 0;
	}
	*out = fd;
	return 0;
}

/* ---- what is above a file --------------------------------------------------------- */

/* The kernel's word behind the name of a file that has lost it. */
static bool is_gone(const char *name)
{
	static const char gone[] = " (deleted)";
	const size_t n = strlen(name), k = sizeof(gone) - 1;

	return n >= k && !strcmp(name + n - k, gone);
}

/*
 * Is this a name, and one of the file? As the kernel knows it: the file may be
 * another's, on a file system whose server does not answer.
 */
static bool is_name(const char *name, const struct stat *st, bool *same)
{
	struct statx x;

	*same = false;
	if (statx(AT_FDCWD, name, AT_STATX_DONT_SYNC, STATX_INO, &x))
		return false;
	*same = x.stx_ino == st->st_ino &&
		makedev(x.stx_dev_major, x.stx_dev_minor) == st->st_dev;
	return true;
}

/* Does the loop device of this name stand on the file? */
static bool stands_on(const char *loop, const struct stat *st)
{
	char path[NAME_MAX + 64], file[PATH_MAX + 1];
	struct loop_info64 info;
	bool answer = false;
	int fd;

	snprintf(path, sizeof(path), "/sys/block/%s/loop/backing_file", loop);
	if (access(path, F_OK))
		return false;		/* it stands on nothing */
	if (sys_read(path, file, sizeof(file)) && is_name(file, st, &answer) &&
	    !is_gone(file))
		return answer;
	snprintf(path, sizeof(path), "/dev/%s", loop);
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return answer;
	answer = is_below(fd, st, &info);
	close(fd);
	return answer;
}

/* Its name into buf. */
static bool find_over(const struct stat *st, char *buf, size_t len)
{
	DIR *d = opendir("/sys/block");
	const struct dirent *e;
	bool found = false;

	while (d && !found && (e = readdir(d)))
		if (!strncmp(e->d_name, "loop", 4) && stands_on(e->d_name, st)) {
			snprintf(buf, len, "/dev/%s", e->d_name);
			found = true;
		}
	if (d)
		closedir(d);
	return found;
}

bool loop_over(int fd)
{
	char name[NAME_MAX + 8];
	struct stat st;

	return !fstat(fd, &st) && S_ISREG(st.st_mode) &&
	       find_over(&st, name, sizeof(name));
}

/* ---- for messages -------------------------------------------------------------------- */

bool image_other(const char *path, char *buf, size_t len)
{
	struct stat st;

	if (stat(path, &st))
		return false;
	return S_ISREG(st.st_mode) ? find_over(&st, buf, len) :
	       S_ISBLK(st.st_mode) ? below_name(st.st_rdev, buf, len) : false;
}
