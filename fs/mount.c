/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * mount.spaceweave: options, the daemon, its threads, and the end of it.
 *
 * Start. The parent checks what it was given and forks; the child leads a
 * session of its own, opens image and volume, mounts, answers INIT, starts the
 * workers, lets go of terminal and directory, and only then tells the parent,
 * which exits with 0. Before that every failure is a sentence on the parent's
 * stderr and the child's exit status becomes the parent's. Threads exist only
 * in the child.
 *
 * Work. Each worker reads a request and handles it: read() and writev() on
 * /dev/fuse are ours (the "wire"), because libfuse 3.14 neither asks for nor
 * passes on some things that the kernel offers: KILLPRIV_V2, PARALLEL_DIROPS,
 * the longer SETXATTR, TMPFILE. The flags are added to the answer to INIT as
 * it goes out, and the requests are brought into the form libfuse knows as
 * they come in. With -o io_uring most requests come over a ring instead (ring.h),
 * by the same wire_in() and wire_writev(); one worker reads what does not.
 *
 * End. The kernel has dirty pages of ours; whoever just closed /dev/fuse would
 * lose them. So a signal unmounts first, while the workers still answer, and
 * the workers end when the kernel says ENODEV. Only if the mount is busy is
 * it synced and then cut off. None of that is done by this process, nor anything
 * else that waits for the mount, but by the waiter (waiter.h): it may be killed at
 * any time, and must not hold the image then. umount(8) does not wait for us: after the
 * workers come fs_close(), volume_close() with the last flush, and the lock of
 * the image goes last.
 */
#define FUSE_USE_VERSION 314

#include "fs/fs_priv.h"
#include "fs/ring.h"
#include "fs/waiter.h"
#include "tools/cli.h"

#include <dirent.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <getopt.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <syslog.h>
#include <unistd.h>

#define EXIT_USAGE 1
#define EXIT_FAIL 32			/* as mount(8) has it */
#define THREADS_MAX 64
#define THREADS 4
#define HELD_WAIT_MS 1000		/* umount(8) returns before the daemon ends */
#define CLOSING_WAIT_MS 30000
#define HEARTBEAT_S 5		/* where locks may not reach other hosts */
#define READ_AHEAD_KB 1024
#define POLL_US 20u
#define POLL_US_MAX 1000

extern char **environ;

/* ---- options ---------------------------------------------------------------------- */

struct options {
	char *image;			/* absolute */
	char *dir;
	char *fsname;			/* as given */
	bool foreground, debug, nonempty, writethrough, remount, heartbeat_said,
	     export, io_uring;
	int allow_other;		/* -1: not said */
	unsigned threads;		/* 0: not said */
	int poll_us;			/* 0: a worker that waits sleeps at once; -1: not said */
	struct fs_options fs;
	struct volume_options volume;
	struct fuse_args args;		/* for libfuse */
};

static void usage(FILE *to)
{
	fprintf(to,
		"usage: mount.spaceweave [-fdsnvhV] IMAGE DIR [-o OPTION,...]\n"
		"\n"
		"  -f   stay in the foreground\n"
		"  -d   the same, and print every request\n"
		"  -s   one thread\n"
		"  -h   this text      -V   version\n"
		"\n"
		"  ro rw dev nodev suid nosuid exec noexec sync async dirsync\n"
		"  atime noatime relatime strictatime nodiratime lazytime\n"
		"  allow_other noallow_other default_permissions nonempty\n"
		"  fsname=NAME      source in /proc/mounts; IMAGE\n"
		"  commit=SECONDS   what was answered is durable after that; 5\n"
		"  heartbeat=SECONDS  show other hosts that the image is held; 5 on\n"
		"                   network file systems, else 0: the lock says it\n"
		"  discard          give freed blocks back to the host; nodiscard\n"
		"  cache=SIZE       memory for trees and inodes; 128M\n"
		"  threads=N        that answer requests; 4\n"
		"  poll=USEC        look for the next request so long before sleeping; 20\n"
		"  io_uring         let requests come over io_uring, if the kernel can\n"
		"  writethrough     no dirty pages in the kernel\n"
		"  export           files can be opened by handle, as NFS servers do\n");
}

static void die_usage(const char *fmt, ...)
	__attribute__((format(printf, 1, 2), noreturn));
static void die_usage(const char *fmt, ...)
{
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	cli_die(EXIT_USAGE, "%s (-h lists what there is)", text);
}

static void fuse_arg(struct options *o, const char *name, const char *value)
{
	char *text = NULL, *at;
	size_t room = strlen(name) + 2 * strlen(value) + 4;

	text = malloc(room);
	if (!text)
		cli_die(EXIT_FAIL, "out of memory");
	at = text + sprintf(text, "-o%s", name);
	for (; *value; value++) {
		if (*value == ',' || *value == '\\')
			*at++ = '\\';
		*at++ = *value;
	}
	*at = 0;
	if (fuse_opt_add_arg(&o->args, text))
		cli_die(EXIT_FAIL, "out of memory");
	free(text);
}

/* Words that set a flag of ours; beside them the kernel may have to know. */
struct word {
	const char *name;
	size_t offset;
	bool value;
	bool kernel;
};
#define WORD(name, field, value, kernel) \
	{name, offsetof(struct options, field), value, kernel}

static const struct word words[] = {
	WORD("ro", volume.readonly, true, true),
	WORD("rw", volume.readonly, false, true),
	WORD("sync", fs.sync, true, true),
	WORD("async", fs.sync, false, true),
	WORD("dirsync", fs.dirsync, true, true),
	WORD("noatime", fs.noatime, true, false),
	WORD("atime", fs.noatime, false, false),
	WORD("relatime", fs.relatime, true, false),
	WORD("norelatime", fs.relatime, false, false),
	WORD("strictatime", fs.strictatime, true, false),
	WORD("nostrictatime", fs.strictatime, false, false),
	WORD("nodiratime", fs.nodiratime, true, false),
	WORD("diratime", fs.nodiratime, false, false),
	WORD("lazytime", fs.lazytime, true, false),
	WORD("nolazytime", fs.lazytime, false, false),
	WORD("discard", volume.discard, true, false),
	WORD("nodiscard", volume.discard, false, false),
	WORD("nonempty", nonempty, true, false),
	WORD("remount", remount, true, false),
	WORD("writethrough", writethrough, true, false),
	WORD("io_uring", io_uring, true, false),
	WORD("noio_uring", io_uring, false, false),
	WORD("export", export, true, false),
	WORD("noexport", export, false, false),
};

static bool option_word(struct options *o, const char *name)
{
	for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
		if (strcmp(words[i].name, name))
			continue;
		*(bool *)((char *)o + words[i].offset) = words[i].value;
		if (words[i].kernel)
			fuse_arg(o, name, "");
		return true;
	}
	return false;
}

static bool in_list(const char *const *list, const char *name)
{
	for (; *list; list++)
		if (!strcmp(*list, name))
			return true;
	return false;
}

/* What fstab and mount(8) say to themselves, or what is so anyway. To remount,
 * mount(8) hands back what /proc/mounts says. */
static bool option_ignored(const char *name)
{
	static const char *const list[] = {
		"defaults", "auto", "noauto", "user", "nouser", "users",
		"nousers", "owner", "noowner", "group", "nogroup", "_netdev",
		"nofail", "loop", "default_permissions", "silent", "loud",
		"mand", "nomand", "iversion", "noiversion", NULL};

	return in_list(list, name) || !strncmp(name, "x-", 2) ||
	       !strncmp(name, "X-", 2) || !strncmp(name, "comment=", 8) ||
	       !strncmp(name, "subtype=", 8) ||
	       !strncmp(name, "user_id=", 8) || !strncmp(name, "group_id=", 9);
}

static bool option_kernel(struct options *o, const char *name)
{
	static const char *const any[] = {"nodev", "nosuid", "exec", "noexec",
					  NULL};
	static const char *const root[] = {"dev", "suid", NULL};

	if (in_list(any, name))
		fuse_arg(o, name, "");
	else if (!in_list(root, name))
		return false;
	else if (!geteuid())
		fuse_arg(o, name, "");
	return true;
}

static uint64_t number(const char *name, const char *text, uint64_t min,
		       uint64_t max)
{
	char *end;
	unsigned long long n;

	errno = 0;
	n = strtoull(text, &end, 10);
	if (!*text || *text == '-' || *end || errno || n < min || n > max)
		die_usage("%s=%s: want %llu to %llu", name, text,
			  (unsigned long long)min, (unsigned long long)max);
	return n;
}

static bool option_valued(struct options *o, char *text)
{
	char *value = strchr(text, '=');
	uint64_t bytes;

	if (!value)
		return false;
	*value++ = 0;
	if (!strcmp(text, "fsname")) {
		o->fsname = value;
	} else if (!strcmp(text, "commit")) {
		o->volume.commit_ms =
			(unsigned)number(text, value, 0, 300) * 1000;
	} else if (!strcmp(text, "heartbeat")) {
		o->volume.heartbeat_s = (unsigned)number(text, value, 0, 60);
		o->heartbeat_said = true;
	} else if (!strcmp(text, "threads")) {
		o->threads = (unsigned)number(text, value, 1, THREADS_MAX);
	} else if (!strcmp(text, "poll")) {
		o->poll_us = (int)number(text, value, 0, POLL_US_MAX);
	} else if (!strcmp(text, "cache")) {
		if (cli_parse_size(value, &bytes) || bytes < 1 << 20)
			die_usage("cache=%s: want a size of at least 1M", value);
		o->volume.cache_bytes = bytes;
	} else {
		value[-1] = '=';
		return false;
	}
	return true;
}

static void option(struct options *o, char *text)
{
	if (!*text || option_word(o, text) || option_kernel(o, text))
		return;
	if (!strcmp(text, "allow_other"))
		o->allow_other = 1;
	else if (!strcmp(text, "noallow_other"))
		o->allow_other = 0;
	else if (!option_ignored(text) && !option_valued(o, text))
		die_usage("unknown option '%s'", text);
}

/* Separated by commas; a backslash takes the next character as it is. */
static void options_list(struct options *o, char *list)
{
	char *from = list, *to = list, *start = list;
	bool end = false;

	while (!end) {
		end = !*from;
		if (*from == '\\' && from[1]) {
			from++;
			*to++ = *from++;
			continue;
		}
		if (!end && *from != ',') {
			*to++ = *from++;
			continue;
		}
		from++;
		*to++ = 0;
		option(o, start);
		start = to;
	}
}

static void parse(struct options *o, int argc, char **argv)
{
	int c;

	while ((c = getopt(argc, argv, "o:fdsnvwrhV")) != -1) {
		switch (c) {
		case 'o':
			options_list(o, optarg);
			break;
		case 'd':
			o->debug = true;
			fuse_opt_add_arg(&o->args, "-d");
			/* fall through */
		case 'f':
			o->foreground = true;
			break;
		case 's':
			o->threads = 1;
			break;
		case 'r':
			option_word(o, "ro");
			break;
		case 'w':
			option_word(o, "rw");
			break;
		case 'n':
		case 'v':
			break;		/* mount(8)'s own business */
		case 'h':
			usage(stdout);
			exit(0);
		case 'V':
			printf("mount.spaceweave %s (libfuse %s)\n",
			       SPACEWEAVE_VERSION, fuse_pkgversion());
			exit(0);
		default:
			usage(stderr);
			exit(EXIT_USAGE);
		}
	}
	if (argc - optind != 2) {
		usage(stderr);
		exit(EXIT_USAGE);
	}
}

/* ---- what was given: is it there? ------------------------------------------------------ */

static void check_image(struct options *o, const char *given)
{
	o->image = realpath(given, NULL);
	if (!o->image)
		cli_die(EXIT_FAIL, "cannot open '%s': %s", given,
			strerror(errno));
	if (!o->fsname)
		o->fsname = strdup(given);
}

static bool is_empty(DIR *d)
{
	const struct dirent *e;

	while ((e = readdir(d)))
		if (strcmp(e->d_name, ".") && strcmp(e->d_name, ".."))
			return false;
	return true;
}

static void check_dir(struct options *o, const char *given)
{
	DIR *d = opendir(given);
	bool empty;

	o->dir = d ? realpath(given, NULL) : NULL;
	if (!o->dir)
		cli_die(EXIT_FAIL, "cannot mount on '%s': %s", given,
			strerror(errno));
	empty = is_empty(d);
	closedir(d);
	if (!empty && !o->nonempty)
		cli_die(EXIT_FAIL, "cannot mount on '%s': it is not empty "
			"(-o nonempty hides what is there)", given);
}

static void fuse_args_finish(struct options *o)
{
	fuse_arg(o, "fsname=", o->fsname);
	fuse_arg(o, "subtype=", "spaceweave");
	fuse_arg(o, "default_permissions", "");
	if (o->fs.noatime)		/* newer libfuse has no word for atime */
		fuse_arg(o, "noatime", "");
	/* Who mounts as root mounts for all, as with every other file system. */
	if (o->allow_other > 0 || (o->allow_other < 0 && !geteuid()))
		fuse_arg(o, "allow_other", "");
}

/* ---- messages ------------------------------------------------------------------------------ */

static bool to_syslog;			/* the terminal is gone */

static void message(void *ctx, const char *text)
{
	const struct options *o = ctx;

	if (to_syslog)
		syslog(LOG_ERR, "%s: %s", o->fsname, text);
	else
		cli_warn("%s: %s", o->fsname, text);
}

static void message_err(struct options *o, const char *what, int err)
{
	char text[256];

	snprintf(text, sizeof(text), "%s: %s", what, strerror(-err));
	message(o, text);
}

/* ---- the image and who else has it ------------------------------------------------------------ */

static void holder(const struct options *o, struct disk_mmp *mmp)
{
	struct image *im;

	memset(mmp, 0, sizeof(*mmp));
	if (image_open(o->image, IMAGE_PEEK, &im))
		return;
	if (mmp_load(im, mmp))
		memset(mmp, 0, sizeof(*mmp));
	image_close(im);
}

static int image_busy(const struct options *o)
{
	char text[CLI_IN_USE];

	cli_warn("%s", cli_in_use(o->image, o->fsname, text, sizeof(text)));
	return -EBUSY;
}

/* May another host have the image where our lock does not reach? */
static bool is_remote(const char *path)
{
	static const unsigned long magic[] = {
		0x6969, 0xfe534d42, 0xff534d42, 0x517b,	/* NFS, SMB, CIFS */
		0x00c36400, 0x5346414f, 0x01021997,	/* Ceph, AFS, 9P */
		0x0bd00bd0, 0x47504653, 0x7461636f,	/* Lustre, GPFS, OCFS2 */
		0x01161970, 0x65735546, 0x786f4256,	/* GFS2, FUSE, VirtualBox */
	};
	struct statfs st;

	if (statfs(path, &st))
		return false;
	for (size_t i = 0; i < sizeof(magic) / sizeof(magic[0]); i++)
		if ((unsigned long)st.f_type == magic[i])
			return true;
	return false;
}

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

/* A daemon that is just finishing is waited for. Each look can take long: a heart
 * that beats is watched (mmp.c). */
static int image_wait(const struct options *o, struct image **out)
{
	const enum image_mode mode =
		o->volume.readonly ? IMAGE_READ : IMAGE_WRITE;
	const struct timespec step = {0, 20000000};
	const uint64_t start = now_ns();
	struct disk_mmp mmp;
	int err;

	for (;;) {
		err = image_open(o->image, mode, out);
		if (err != -EBUSY)
			break;
		holder(o, &mmp);
		if ((now_ns() - start) / 1000000 >=
		    (get32(mmp.state) == MMP_CLOSING ? CLOSING_WAIT_MS : HELD_WAIT_MS))
			return image_busy(o);
		nanosleep(&step, NULL);
	}
	if (err)
		cli_warn("cannot open '%s': %s", o->fsname,
			 err == -EINVAL ? "neither a regular file nor a block device" :
					  strerror(-err));
	return err;
}

struct mount {
	struct options *o;
	struct image *im;
	struct volume *v;
	struct face face;
	struct fuse_session *se;
	pthread_t main, workers[THREADS_MAX], relief;
	unsigned running;
	bool relieved;			/* the thread runs */
	bool ringed;			/* there is a ring */
	dev_t dev;			/* the mount's number */
	bool elsewhere;			/* cut off, but not from its directory */
};

static int open_volume(struct mount *m)
{
	char msg[256] = "";
	int err = image_wait(m->o, &m->im);

	if (err)
		return err;
	if (!m->o->heartbeat_said && is_remote(m->o->image))
		m->o->volume.heartbeat_s = HEARTBEAT_S;
	err = volume_open(m->im, &m->o->volume, &m->v, msg, sizeof(msg));
	if (err) {
		cli_warn("cannot mount '%s': %s", m->o->fsname,
			 *msg ? msg : strerror(-err));
		return err;
	}
	err = fs_open(m->v, &m->o->fs, &m->face.fs);
	if (err)
		message_err(m->o, "cannot open", err);
	return err;
}

static int close_volume(struct mount *m)
{
	int err = m->face.fs ? fs_close(m->face.fs) : 0, err2 = 0;

	if (m->v)
		err2 = volume_close(m->v);
	image_close(m->im);
	m->face.fs = NULL;
	m->v = NULL;
	m->im = NULL;
	if (!err)
		err = err2;
	if (err)
		message_err(m->o, "the last changes may be lost", err);
	return err;
}

/* ---- the wire: /dev/fuse ------------------------------------------------------------------------- */

#define WIRE_BYTES (FACE_MAX_WRITE + 4096)
#define WIRE_WRITE_HEAD (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in))
#define WIRE_TMPFILE 51			/* FUSE_TMPFILE, protocol 7.37 */

#define WIRE_NO_EXPORT (1u << 6)		/* of flags2: FUSE_NO_EXPORT_SUPPORT */
#define WIRE_IO_URING (1u << 9)		/* of flags2: FUSE_OVER_IO_URING */

static uint64_t init_unique;		/* INIT, to be answered; then 0 */
static uint32_t init_offered, init_offered2;
static bool init_export;
static struct mount *init_ring;		/* requests are to come over io_uring */

/* SETXATTR with the longer header, which we ask for where there is one (Linux
 * 5.13): cut back to the short. */
static ssize_t wire_setxattr(struct fuse_in_header *in, ssize_t n)
{
	struct fuse_setxattr_in *arg = (void *)(in + 1);
	const size_t extra = sizeof(*arg) - FUSE_COMPAT_SETXATTR_IN_SIZE;
	char *rest = (char *)arg + sizeof(*arg);

	if (!(init_offered & FUSE_SETXATTR_EXT))
		return n;
	face_extra.kill_sgid = arg->setxattr_flags & FUSE_SETXATTR_ACL_KILL_SGID;
	memmove(rest - extra, rest, (size_t)n - (size_t)(rest - (char *)in));
	in->len -= (uint32_t)extra;
	return n - (ssize_t)extra;
}

static ssize_t wire_in(struct fuse_in_header *in, ssize_t n)
{
	const struct fuse_write_in *w = (void *)(in + 1);
	const struct fuse_init_in *init = (void *)(in + 1);

	face_extra = (struct face_extra){0};
	switch (in->opcode) {
	case FUSE_INIT:
		init_unique = in->unique;
		init_offered = init->flags;
		init_offered2 = init->flags & FUSE_INIT_EXT ? init->flags2 : 0;
		break;
	case FUSE_WRITE:
		face_extra.kill_suid = w->write_flags & FUSE_WRITE_KILL_SUIDGID;
		break;
	case FUSE_SETXATTR:
		return wire_setxattr(in, n);
	case WIRE_TMPFILE:
		face_extra.tmpfile = true;
		in->opcode = FUSE_CREATE;
		break;
	}
	return n;
}

static ssize_t wire_read(int fd, void *buf, size_t len, void *ctx)
{
	int state;
	ssize_t n;

	(void)ctx;
	pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, &state);
	n = read(fd, buf, len < WIRE_BYTES ? len : WIRE_BYTES);
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
	return n < (ssize_t)sizeof(struct fuse_in_header) ? n : wire_in(buf, n);
}

static void ring_handle(void *ctx, struct fuse_in_header *in)
{
	struct mount *m = ctx;
	struct fuse_buf buf = {.mem = in};

	buf.size = (size_t)wire_in(in, in->len);
	fuse_session_process_buf(m->se, &buf);
}

static void ring_ended(void *ctx, bool over)
{
	struct mount *m = ctx;

	face_thread_fini();
	if (!over)
		return;
	fuse_session_exit(m->se);
	pthread_kill(m->main, SIGUSR1);
}

static void ring_absent(struct mount *m, const char *why)
{
	char text[160];

	snprintf(text, sizeof(text),
		 "no io_uring (%s): requests come over /dev/fuse", why);
	message(m->o, text);
}

/* What the kernel wants room for, by what INIT is answered with. */
static size_t ring_payload(const struct fuse_init_out *init)
{
	const size_t page = (size_t)sysconf(_SC_PAGESIZE),
		     pages = init->flags & FUSE_MAX_PAGES ? init->max_pages : 32;
	size_t most = init->max_write > pages * page ? init->max_write
						     : pages * page;

	return most > FUSE_MIN_READ_BUFFER ? most : FUSE_MIN_READ_BUFFER;
}

static void wire_ring(struct mount *m, struct fuse_init_out *init)
{
	const struct ring_options opt = {.fd = fuse_session_fd(m->se),
					 .threads = m->o->threads,
					 .payload = ring_payload(init),
					 .ctx = m,
					 .handle = ring_handle,
					 .end = ring_ended};
	int err;

	if (!(init_offered2 & WIRE_IO_URING)) {
		ring_absent(m, "the kernel does not offer it: it needs Linux 6.14 "
			       "and enable_uring=Y of its module fuse");
		return;
	}
	err = ring_open(&opt);
	if (err) {
		ring_absent(m, strerror(-err));
		return;
	}
	init->flags |= FUSE_INIT_EXT;
	init->flags2 |= WIRE_IO_URING;
	m->ringed = true;
}

/*
 * Not to export is said, and not only left out: where a kernel has handles that
 * can be opened, an overlay on us looks for the lower layer's file by handle
 * after a copy up; and Linux's FUSE takes what it finds so, if its name is not
 * cached any more, for stale.
 */
static void wire_init(struct iovec *iov)
{
	const uint32_t more = FUSE_HANDLE_KILLPRIV_V2 | FUSE_SETXATTR_EXT |
			      FUSE_PARALLEL_DIROPS;
	const struct fuse_out_header *out = iov[0].iov_base;
	struct fuse_init_out *init = iov[1].iov_base;

	if (out->unique != init_unique || out->error)
		return;
	init->flags |= more & init_offered;
	if (!init_export && (init_offered2 & WIRE_NO_EXPORT)) {
		init->flags |= FUSE_INIT_EXT;
		init->flags2 |= WIRE_NO_EXPORT;
	}
	if (init_ring)
		wire_ring(init_ring, init);
	init_unique = 0;
}

static ssize_t wire_writev(int fd, struct iovec *iov, int n, void *ctx)
{
	ssize_t len = 0;

	(void)ctx;
	if (init_unique && n > 1 && iov[1].iov_len >= sizeof(struct fuse_init_out))
		wire_init(iov);
	if (ring_reply(iov, n)) {
		for (int i = 0; i < n; i++)
			len += (ssize_t)iov[i].iov_len;
		return len;
	}
	return writev(fd, iov, n);
}

static int wire_open(struct mount *m)
{
	static const struct fuse_custom_io io = {.writev = wire_writev,
						 .read = wire_read};
	int fd;

	if (fuse_session_mount(m->se, m->o->dir))
		return -EIO;			/* libfuse has said why */
	fd = fuse_session_fd(m->se);
	fcntl(fd, F_SETFD, FD_CLOEXEC);
	return fuse_session_custom_io(m->se, &io, fd);
}

/* ---- workers ---------------------------------------------------------------------------------------- */

/* A buffer in which the data of a write begin at a page. */
struct wire_buffer {
	void *block;
	struct fuse_buf buf;
};

static int wire_buffer_init(struct wire_buffer *b)
{
	b->block = aligned_alloc(4096, WIRE_BYTES + 8192);
	if (!b->block)
		return -ENOMEM;
	b->buf = (struct fuse_buf){
		.mem = (char *)b->block + 4096 - WIRE_WRITE_HEAD};
	return 0;
}

/*
 * The lead. Workers that all wait in the device are woken in turn, each on a CPU
 * where it finds nothing in the caches. So only one waits there, and answers
 * what it has read: twice as many small requests in a second (measured on a
 * server that does nothing). It gives the lead to the next worker
 *   - before an fsync, which waits for others, and before a forget, which may
 *     free a file while nobody waits for it;
 *   - before the image waits for its disk, or moves much (image_waits);
 * and it is taken away, by the relief, from a worker that is stuck in a request
 * for a whole tick, whatever the reason. The relief sleeps while nothing happens.
 *
 * Nobody leads in a crowd: when the next request was already there more than
 * BEHIND_MAX times more often than it was not, all workers read, until it was
 * as often not there.
 *
 * A worker that has lost the lead may still be on its way into the device. Then
 * two wait there for one request: no harm.
 */
#define BEHIND_MAX 8
#define RELIEF_NS 1000000
#define RELIEF_TICKS 50		/* idle ones before the relief sleeps */

static struct {
	pthread_mutex_t lock;
	pthread_cond_t next, kick;
	_Atomic uint64_t holder;	/* its turn; 0: nobody. Set under lock */
	uint64_t turns;			/* under lock */
	atomic_int behind;		/* a guess: not exact among several */
	atomic_bool crowd;		/* set under lock */
	_Atomic uint64_t steps;		/* odd: in a request. The holder's */
	atomic_bool asleep;		/* the relief. Set under lock */
	atomic_bool ended;		/* the relief is to end. Set under lock */
} lead = {.lock = PTHREAD_MUTEX_INITIALIZER, .next = PTHREAD_COND_INITIALIZER,
	  .kick = PTHREAD_COND_INITIALIZER};
static _Thread_local uint64_t turn;	/* mine, or an old one */

static bool leading(void)
{
	return turn && atomic_load(&lead.holder) == turn;
}

static void lead_take(void)
{
	if (leading() || atomic_load(&lead.crowd))
		return;
	pthread_mutex_lock(&lead.lock);
	while (atomic_load(&lead.holder) && !atomic_load(&lead.crowd))
		pthread_cond_wait(&lead.next, &lead.lock);
	if (!atomic_load(&lead.crowd)) {
		turn = ++lead.turns;
		atomic_store(&lead.holder, turn);
		atomic_store(&lead.steps, (atomic_load(&lead.steps) | 1) + 1);
	}
	pthread_mutex_unlock(&lead.lock);
}

/* From the worker that had this turn, if it still has it. */
static void lead_free(uint64_t t)
{
	if (!t || !atomic_compare_exchange_strong(&lead.holder, &t, 0))
		return;
	pthread_mutex_lock(&lead.lock);
	pthread_cond_signal(&lead.next);
	pthread_mutex_unlock(&lead.lock);
}

static void lead_pass(void)
{
	lead_free(turn);
	turn = 0;
}

static void crowd_set(bool crowd)
{
	pthread_mutex_lock(&lead.lock);
	atomic_store(&lead.crowd, crowd);
	pthread_cond_broadcast(&lead.next);
	pthread_mutex_unlock(&lead.lock);
}

/* Is there another request already? True: all are to read. */
static bool crowd_review(struct fuse_session *se)
{
	struct pollfd p = {.fd = fuse_session_fd(se), .events = POLLIN};
	bool more = poll(&p, 1, 0) == 1, crowd = atomic_load(&lead.crowd);
	int n = atomic_load(&lead.behind);

	if (more && n < 2 * BEHIND_MAX)
		atomic_store(&lead.behind, ++n);
	else if (!more && n > 0)
		atomic_store(&lead.behind, --n);
	if (crowd ? n == 0 : n > BEHIND_MAX)
		crowd_set(crowd = !crowd);
	return crowd;
}

/* Requests that wait for others, or that nobody waits for. */
static bool in_passing(uint32_t opcode)
{
	return opcode == FUSE_FSYNC || opcode == FUSE_FSYNCDIR ||
	       opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET;
}

static void lead_begin(struct fuse_session *se, const struct wire_buffer *b)
{
	const struct fuse_in_header *in = b->buf.mem;

	if (crowd_review(se) || in_passing(in->opcode))
		lead_pass();
	if (!leading())
		return;
	atomic_fetch_or(&lead.steps, 1);
	if (!atomic_load(&lead.asleep))
		return;
	pthread_mutex_lock(&lead.lock);
	pthread_cond_signal(&lead.kick);
	pthread_mutex_unlock(&lead.lock);
}

static void lead_end(void)
{
	if (leading())
		atomic_store(&lead.steps, (atomic_load(&lead.steps) | 1) + 1);
}

static void relief_sleep(void)
{
	pthread_mutex_lock(&lead.lock);
	atomic_store(&lead.asleep, true);
	if (!lead.ended)
		pthread_cond_wait(&lead.kick, &lead.lock);
	atomic_store(&lead.asleep, false);
	pthread_mutex_unlock(&lead.lock);
}

static void *relief(void *arg)
{
	const struct timespec tick = {.tv_nsec = RELIEF_NS};
	uint64_t steps, before = 0;
	unsigned quiet = 0;

	while (!atomic_load(&lead.ended)) {
		nanosleep(&tick, NULL);
		steps = atomic_load(&lead.steps);
		quiet = steps == before ? quiet + 1 : 0;
		before = steps;
		if (quiet && steps & 1)
			lead_free(atomic_load(&lead.holder));
		if (quiet > RELIEF_TICKS) {
			relief_sleep();
			quiet = 0;
		}
	}
	return arg;
}

static void relief_end(void)
{
	pthread_mutex_lock(&lead.lock);
	atomic_store(&lead.ended, true);
	pthread_cond_signal(&lead.kick);
	pthread_mutex_unlock(&lead.lock);
}

/*
 * Polling (-o poll). Waking a worker that sleeps in the device costs more than
 * most requests do, so the leader may look for the next one for a while before
 * it sleeps, lending its CPU to whoever wants it. Two things decide whether:
 *   - Requests must be close: the last one came within twice the time (of which
 *     waking the leader is a part), is no fsync, whose caller waits for the disk,
 *     and no look was in vain since. So nobody looks on an idle mount.
 *   - It must pay: with client and leader on one CPU it may not. So requests are
 *     counted in laps, and the kind of lap, with looking or without, in which
 *     they came faster is the next one's; each LAPS_SURE-th is of the other kind.
 * A worker that has lost the lead may still count with the next: all is a guess.
 */
#define LAP 128				/* requests */
#define LAPS_SURE 64

static struct {
	uint64_t ns;			/* the longest look; 0: none, ever */
	_Atomic uint64_t last;		/* when the last request came */
	_Atomic uint64_t lap_ns;
	_Atomic uint64_t mean_ns[2];	/* of laps without and with looking */
	atomic_bool close;
	atomic_uint lap, laps;
	atomic_bool on;			/* this lap is with looking */
} look;

static void look_ahead(struct fuse_session *se, uint64_t since)
{
	struct pollfd p = {.fd = fuse_session_fd(se), .events = POLLIN};

	if (!look.on || !look.close)
		return;
	while (!poll(&p, 1, 0)) {
		if (now_ns() - since > look.ns) {
			look.close = false;
			return;
		}
		sched_yield();
	}
}

static void look_lap(uint64_t ns)
{
	const bool on = look.on;

	look.lap_ns += ns;
	if (++look.lap < LAP)
		return;
	look.mean_ns[on] = (look.mean_ns[on] + look.lap_ns / LAP) / 2;
	look.on = look.mean_ns[1] < look.mean_ns[0];
	if (++look.laps % LAPS_SURE == 0)
		look.on = !look.on;
	look.lap = 0;
	look.lap_ns = 0;
}

/* A request came at last, for which the leader had waited since then. */
static void look_learn(uint64_t since, uint32_t opcode)
{
	const uint64_t now = now_ns(), last = look.last;
	const bool close = now - since <= 2 * look.ns;

	look.last = now;
	look.close = close && opcode != FUSE_FSYNC;
	if (close)
		look_lap(now - last);
}

static int receive(struct fuse_session *se, struct wire_buffer *b)
{
	uint64_t since;
	int n;

	if (!look.ns || !leading())
		return fuse_session_receive_buf(se, &b->buf);
	since = now_ns();
	look_ahead(se, since);
	n = fuse_session_receive_buf(se, &b->buf);
	if (n > 0)
		look_learn(since, ((const struct fuse_in_header *)b->buf.mem)->opcode);
	return n;
}

/* One request. False: the session is over. */
static bool serve(struct fuse_session *se, struct wire_buffer *b)
{
	int n = receive(se, b);

	if (n == -EINTR || n == -EAGAIN)
		return true;
	if (n <= 0)
		return false;
	lead_begin(se, b);
	fuse_session_process_buf(se, &b->buf);
	lead_end();
	return !fuse_session_exited(se);
}

static void worker_end(void *arg)
{
	struct wire_buffer *b = arg;

	free(b->block);
	face_thread_fini();
	lead_pass();
}

static void *worker(void *arg)
{
	struct mount *m = arg;
	struct wire_buffer b;
	int state;

	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
	if (!wire_buffer_init(&b)) {
		pthread_cleanup_push(worker_end, &b);
		do
			lead_take();
		while (!fuse_session_exited(m->se) && serve(m->se, &b));
		pthread_cleanup_pop(1);
	}
	fuse_session_exit(m->se);
	pthread_kill(m->main, SIGUSR1);
	return NULL;
}

/* The ring, if there is one, gets its requests. */
static void start_ring(struct mount *m)
{
	int err = m->ringed ? ring_start() : 0;

	if (!err)
		return;
	ring_absent(m, strerror(-err));
	ring_stop();
	ring_close();
	m->ringed = false;
}

/* With one CPU there is nobody to look out for: who would ask waits for it. */
static uint64_t poll_us(const struct options *o)
{
	cpu_set_t cpus;

	if (o->poll_us >= 0)
		return (uint64_t)o->poll_us;
	return sched_getaffinity(0, sizeof(cpus), &cpus) || CPU_COUNT(&cpus) > 1
		       ? POLL_US : 0;
}

static int start(struct mount *m)
{
	struct wire_buffer b;
	unsigned threads = m->o->threads ? m->o->threads : THREADS;
	int err = wire_buffer_init(&b);

	if (err)
		return err;
	/* INIT comes first and alone; nobody else is let in before. */
	if (!serve(m->se, &b))
		err = -EIO;
	free(b.block);
	if (!err)
		waiter_attach(fuse_session_fd(m->se));
	if (!err)
		err = face_start(&m->face, m->se);
	if (!err)
		start_ring(m);
	if (m->ringed)
		threads = 1;		/* for what comes over /dev/fuse still */
	look.ns = poll_us(m->o) * 1000ull;
	if (threads > 1) {
		image_waits = lead_pass;
		m->relieved = !pthread_create(&m->relief, NULL, relief, NULL);
	}
	while (!err && m->running < threads) {
		err = -pthread_create(&m->workers[m->running], NULL, worker, m);
		m->running += !err;
	}
	return err;
}

static void stop(struct mount *m)
{
	/* While the workers still answer what it waits for, if they do. */
	face_stop(fuse_session_exited(m->se));
	fuse_session_exit(m->se);
	for (unsigned i = 0; i < m->running; i++)
		pthread_cancel(m->workers[i]);
	for (unsigned i = 0; i < m->running; i++)
		pthread_join(m->workers[i], NULL);
	m->running = 0;
	ring_stop();
	ring_close();
	if (m->relieved) {
		relief_end();
		pthread_join(m->relief, NULL);
	}
}

static void bdi_set(const struct statx *st, const char *name, unsigned value)
{
	char path[96];
	FILE *f;

	snprintf(path, sizeof(path), "/sys/class/bdi/%u:%u/%s",
		 st->stx_dev_major, st->stx_dev_minor, name);
	f = fopen(path, "we");
	if (!f)
		return;
	fprintf(f, "%u\n", value);
	fclose(f);
}

/* The number is asked for alone: that is no request to us. */
static bool dir_stat(const struct mount *m, struct statx *st)
{
	return !statx(AT_FDCWD, m->o->dir, AT_STATX_DONT_SYNC, 0, st);
}

/*
 * Root may let the kernel read ahead further than its default, and keep dirty
 * pages as it does for every other file system: a FUSE mount else gets a
 * hundredth of them, and whoever writes beside a stream is held up.
 */
static void tune_bdi(struct mount *m)
{
	struct statx st;

	if (!dir_stat(m, &st))
		return;
	m->dev = makedev(st.stx_dev_major, st.stx_dev_minor);
	if (geteuid())
		return;
	bdi_set(&st, "read_ahead_kb", READ_AHEAD_KB);
	bdi_set(&st, "strict_limit", 0);
}

/* ---- the end ------------------------------------------------------------------------------------------ */

static int run_fusermount(const char *dir)
{
	char *argv[] = {"fusermount3", "-u", "-q", "--", (char *)dir, NULL};
	posix_spawnattr_t attr;
	sigset_t none;
	int status;
	pid_t pid;

	sigemptyset(&none);
	posix_spawnattr_init(&attr);
	posix_spawnattr_setsigmask(&attr, &none);
	posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSIGMASK);
	if (posix_spawnp(&pid, argv[0], NULL, &attr, argv, environ))
		return -1;
	posix_spawnattr_destroy(&attr);
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return -1;
	return status ? -1 : 0;
}

/* Not after umount -l, for one, while somebody still uses it: then it has no place,
 * and what stands there now is not ours to unmount. */
static bool in_place(const struct mount *m)
{
	struct statx st;

	return dir_stat(m, &st) &&
	       makedev(st.stx_dev_major, st.stx_dev_minor) == m->dev;
}

/* The kernel's dirty pages, while the workers can still take them. */
static void sync_mount(const struct mount *m)
{
	int fd;

	if (waiter_sync(m->elsewhere))
		return;
	if (m->elsewhere) {
		sync();
		return;
	}
	fd = open(m->o->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return;
	syncfs(fd);
	close(fd);
}

/* False: the mount is busy. */
static bool unmount(const struct mount *m)
{
	int err;

	if (!in_place(m))
		return fuse_session_exited(m->se);
	if (geteuid())
		err = run_fusermount(m->o->dir);
	else if (!waiter_unmount(&err))
		err = umount2(m->o->dir, UMOUNT_NOFOLLOW);
	return !err || fuse_session_exited(m->se);
}

static void run(struct mount *m, const sigset_t *signals)
{
	int sig;

	while (!fuse_session_exited(m->se)) {
		if (sigwait(signals, &sig) || sig == SIGUSR1)
			continue;
		if (unmount(m))
			continue;	/* the workers will say when */
		m->elsewhere = !in_place(m);
		message(m->o, "told to end while busy: unmounted all the same");
		sync_mount(m);
		break;
	}
}

/* ---- the daemon ------------------------------------------------------------------------------------------ */

static void detach(void)
{
	int fd = open("/dev/null", O_RDWR);

	if (fd >= 0) {
		for (int i = 0; i < 3; i++)
			dup2(fd, i);
		if (fd > 2)
			close(fd);
	}
	to_syslog = true;
}

static int begin(struct mount *m)
{
	int err = open_volume(m);

	if (err)
		return err;
	init_export = m->o->export;
	init_ring = m->o->io_uring ? m : NULL;
	m->se = fuse_session_new(&m->o->args, face_ops(),
				 sizeof(struct fuse_lowlevel_ops), &m->face);
	if (!m->se)
		return -EINVAL;
	err = wire_open(m);
	return err ? err : start(m);
}

/* Everything from opening the image to letting go of it. `tell` gets a byte
 * when the mount is live. */
static int serve_mount(struct options *o, int tell)
{
	struct mount m = {.o = o, .main = pthread_self(),
			  .face.image = o->image,
			  .face.export = o->export,
			  .face.writeback = !o->writethrough &&
					    !o->volume.readonly};
	sigset_t signals;
	int err;

	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGHUP);
	sigaddset(&signals, SIGUSR1);
	signal(SIGPIPE, SIG_IGN);
	pthread_sigmask(SIG_BLOCK, &signals, NULL);
	waiter_start(o->dir);
	err = begin(&m);
	if (!err) {
		tune_bdi(&m);
		if (!o->foreground)
			detach();
		if (tell >= 0 && write(tell, "", 1) == 1)
			close(tell);
		run(&m, &signals);
	}
	if (m.se) {
		stop(&m);
		if (!m.elsewhere)
			fuse_session_unmount(m.se);
		fuse_session_destroy(m.se);
	}
	waiter_end();
	if (close_volume(&m) && !err)
		err = -EIO;
	return err ? EXIT_FAIL : 0;
}

/* The parent: wait for the byte, or for the child's end. */
static int await(int fd, pid_t pid)
{
	int status;
	char byte;
	ssize_t n;

	do
		n = read(fd, &byte, 1);
	while (n < 0 && errno == EINTR);
	if (n == 1)
		return 0;
	if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status)) {
		cli_warn("the daemon died");
		return EXIT_FAIL;
	}
	return WEXITSTATUS(status) ? WEXITSTATUS(status) : EXIT_FAIL;
}

/* What the caller had open is none of a daemon's business. */
static void close_others(int keep)
{
	if (keep > 3)
		close_range(3, (unsigned)keep - 1, 0);
	close_range((unsigned)keep + 1, ~0u, 0);
}

static int daemonize(struct options *o)
{
	int fd[2];
	pid_t pid;

	if (pipe2(fd, O_CLOEXEC))
		cli_die(EXIT_FAIL, "cannot start the daemon: %s", strerror(errno));
	fflush(NULL);
	pid = fork();
	if (pid < 0)
		cli_die(EXIT_FAIL, "cannot start the daemon: %s", strerror(errno));
	if (pid) {
		close(fd[1]);
		return await(fd[0], pid);
	}
	close_others(fd[1]);
	setsid();
	if (chdir("/"))
		cli_warn("cannot leave the directory: %s", strerror(errno));
	return serve_mount(o, fd[1]);
}

/*
 * Only the kernel's flags can change; they came as arguments for libfuse. The
 * daemon goes on as it is, so what it opened read-only stays so.
 */
static int remount(const struct options *o, const char *dir)
{
	static const struct {
		const char *arg;
		unsigned long flag;
	} flags[] = {
		{"-onosuid", MS_NOSUID},    {"-onodev", MS_NODEV},
		{"-onoexec", MS_NOEXEC},    {"-osync", MS_SYNCHRONOUS},
		{"-odirsync", MS_DIRSYNC},
	};
	unsigned long set = MS_REMOUNT;

	if (o->volume.readonly)
		set |= MS_RDONLY;
	if (o->fs.noatime)
		set |= MS_NOATIME;
	for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++)
		for (int k = 0; k < o->args.argc; k++)
			if (!strcmp(o->args.argv[k], flags[i].arg))
				set |= flags[i].flag;
	if (mount("none", dir, NULL, set, NULL))
		cli_die(EXIT_FAIL, "cannot remount '%s': %s", dir,
			strerror(errno));
	return 0;
}

int main(int argc, char **argv)
{
	struct options o = {.allow_other = -1, .poll_us = -1,
			    .volume.discard = true};

	cli_init(argv[0]);
	fuse_opt_add_arg(&o.args, argv[0]);
	/* libfuse says nosuid,nodev; mount(8) does not pass on its defaults. */
	if (!geteuid()) {
		fuse_arg(&o, "dev", "");
		fuse_arg(&o, "suid", "");
	}
	parse(&o, argc, argv);
	if (o.remount)
		return remount(&o, argv[optind + 1]);
	check_image(&o, argv[optind]);
	check_dir(&o, argv[optind + 1]);
	fuse_args_finish(&o);
	o.volume.program = "mount.spaceweave";
	o.volume.message = message;
	o.volume.message_ctx = &o;
	openlog("mount.spaceweave", LOG_PID, LOG_DAEMON);
	return o.foreground ? serve_mount(&o, -1) : daemonize(&o);
}
