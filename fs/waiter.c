/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The waiter. One thread takes calls from a socket and makes them, the other looks
 * whether the daemon is still there, at the other end of the socket.
 *
 * Its descriptor of the connection is one of its own (FUSE_DEV_IOC_CLONE). So when
 * the daemon dies the kernel lets go of the daemon's, and fails what the daemon had
 * read and not answered. What nobody has read yet the waiter then reads, and fails.
 * What comes over io_uring it can't read: that ends with the connection, if that can
 * be aborted by its number (where fusectl is mounted, as it mostly is). Else the
 * waiter stays, without the image, until umount -f ends it.
 */
#include "fs/waiter.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REQUEST_BYTES ((1u << 20) + 8192)	/* the longest there is */

struct call {
	enum call_kind {
		CALL_ATTACH,		/* a descriptor comes with it */
		CALL_FLUSH,
		CALL_SYNC,
		CALL_SYNC_ALL,
		CALL_UNMOUNT,
	} kind;
	uint64_t ino;
	int64_t off, len;
};

/* ---- in the waiter ------------------------------------------------------------------ */

static struct {
	int sock;
	int dev;		/* of the connection; -1 */
	int abort;		/* a byte written there ends it; -1 */
	const char *dir;
} waiter = {.sock = -1, .dev = -1, .abort = -1};

static int flush(const struct call *c)
{
	struct fuse_notify_inval_inode_out arg = {
		.ino = c->ino, .off = c->off, .len = c->len};
	struct fuse_out_header head = {.len = sizeof(head) + sizeof(arg),
				       .error = FUSE_NOTIFY_INVAL_INODE};
	struct iovec iov[] = {{&head, sizeof(head)}, {&arg, sizeof(arg)}};

	if (waiter.dev < 0)
		return -ENOTCONN;
	/* An inode that the kernel does not know has nothing to be written. */
	return writev(waiter.dev, iov, 2) < 0 && errno != ENOENT ? -errno : 0;
}

static int sync_dir(void)
{
	int fd = open(waiter.dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC), err = 0;

	if (fd < 0)
		return -errno;
	if (syncfs(fd))
		err = -errno;
	close(fd);
	return err;
}

/* The number is asked for alone: that is no request to the daemon. */
static int abort_open(void)
{
	char path[64];
	struct statx st;

	if (statx(AT_FDCWD, waiter.dir, AT_STATX_DONT_SYNC, 0, &st))
		return -1;
	snprintf(path, sizeof(path), "/sys/fs/fuse/connections/%u/abort",
		 st.stx_dev_minor);
	return open(path, O_WRONLY | O_CLOEXEC);
}

static int make(const struct call *c)
{
	switch (c->kind) {
	case CALL_ATTACH:
		waiter.abort = abort_open();
		return 0;
	case CALL_FLUSH:
		return flush(c);
	case CALL_SYNC:
		return sync_dir();
	case CALL_SYNC_ALL:
		sync();
		return 0;
	case CALL_UNMOUNT:
		return umount2(waiter.dir, UMOUNT_NOFOLLOW) ? -errno : 0;
	default:
		return 0;
	}
}

/* The next call; with it may come a descriptor. False: the daemon is gone. */
static bool call_take(struct call *c)
{
	char room[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec iov = {c, sizeof(*c)};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1,
			   .msg_control = room, .msg_controllen = sizeof(room)};
	struct cmsghdr *head;
	ssize_t n;

	do
		n = recvmsg(waiter.sock, &m, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	head = n == sizeof(*c) ? CMSG_FIRSTHDR(&m) : NULL;
	if (head && head->cmsg_type == SCM_RIGHTS)
		memcpy(&waiter.dev, CMSG_DATA(head), sizeof(waiter.dev));
	return n == sizeof(*c);
}

static void *calls(void *arg)
{
	struct call c;

	while (call_take(&c)) {
		int err = make(&c);

		if (send(waiter.sock, &err, sizeof(err), MSG_NOSIGNAL) < 0)
			break;
	}
	_exit(0);
	return arg;
}

/* Fail all that is asked, until the other thread ends the process. */
static void fail_all(void)
{
	char *buf = malloc(REQUEST_BYTES);
	const struct fuse_in_header *in = (const void *)buf;

	if (waiter.abort >= 0 && write(waiter.abort, "1", 1) == 1)
		return;
	while (buf) {
		ssize_t n = read(waiter.dev, buf, REQUEST_BYTES);
		struct fuse_out_header out = {.len = sizeof(out),
					      .error = -ENOTCONN};

		if (n < 0 && (errno == EINTR || errno == EAGAIN || errno == ENOENT))
			continue;
		if (n < (ssize_t)sizeof(*in))
			break;
		out.unique = in->unique;
		/* a forget, say, takes no answer */
		if (write(waiter.dev, &out, sizeof(out)) < 0 && errno == ENODEV)
			break;
	}
}

static void run(void)
{
	struct pollfd p = {.fd = waiter.sock};
	pthread_t thread;
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);

	for (int i = 0; null >= 0 && i < 3; i++)
		dup2(null, i);
	setsid();
	if (chdir("/") || pthread_create(&thread, NULL, calls, NULL))
		_exit(1);
	while (!(p.revents & (POLLHUP | POLLERR)))
		poll(&p, 1, -1);
	fail_all();
	pthread_join(thread, NULL);
	_exit(0);
}

/* ---- in the daemon ------------------------------------------------------------------ */

static struct {
	pthread_mutex_t lock;		/* one call at a time */
	int sock;			/* -1: there is no waiter */
	bool attached;
} waiting = {.lock = PTHREAD_MUTEX_INITIALIZER, .sock = -1};

void waiter_start(const char *dir)
{
	int sock[2];
	pid_t pid;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sock))
		return;
	pid = fork();
	if (!pid) {
		/* as the only one that stays; the parent of the daemon waits for
		 * the others to be closed */
		waiter.sock = dup2(sock[1], 3);
		waiter.dir = dir;
		close_range(4, ~0u, 0);
		run();
	}
	close(sock[1]);
	if (pid < 0)
		close(sock[0]);
	else
		waiting.sock = sock[0];
}

static bool call(const struct call *c, int fd, int *err)
{
	char room[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec iov = {(void *)c, sizeof(*c)};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};
	ssize_t n;

	if (fd >= 0) {
		m.msg_control = room;
		m.msg_controllen = sizeof(room);
		*CMSG_FIRSTHDR(&m) = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)),
						      .cmsg_level = SOL_SOCKET,
						      .cmsg_type = SCM_RIGHTS};
		memcpy(CMSG_DATA(CMSG_FIRSTHDR(&m)), &fd, sizeof(fd));
	}
	pthread_mutex_lock(&waiting.lock);
	n = sendmsg(waiting.sock, &m, MSG_NOSIGNAL);
	while (n >= 0) {
		n = recv(waiting.sock, err, sizeof(*err), 0);
		if (n >= 0 || errno != EINTR)
			break;
		n = 0;
	}
	pthread_mutex_unlock(&waiting.lock);
	return n == sizeof(*err);
}

void waiter_attach(int fuse_fd)
{
	const struct call c = {.kind = CALL_ATTACH};
	uint32_t from = (uint32_t)fuse_fd;
	int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC), err;

	if (fd < 0)
		return;
	if (!ioctl(fd, FUSE_DEV_IOC_CLONE, &from))
		waiting.attached = call(&c, fd, &err);
	close(fd);
}

bool waiter_flush(uint64_t ino, int64_t off, int64_t len)
{
	const struct call c = {.kind = CALL_FLUSH, .ino = ino, .off = off,
			       .len = len};
	int err;

	return waiting.attached && call(&c, -1, &err);
}

bool waiter_sync(bool all)
{
	const struct call c = {.kind = all ? CALL_SYNC_ALL : CALL_SYNC};
	int err;

	return call(&c, -1, &err);
}

bool waiter_unmount(int *err)
{
	const struct call c = {.kind = CALL_UNMOUNT};

	return call(&c, -1, err);
}

void waiter_cut(void)
{
	shutdown(waiting.sock, SHUT_RDWR);
}

void waiter_end(void)
{
	if (waiting.sock >= 0)
		close(waiting.sock);
	waiting.sock = -1;
}
