/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_FS_WAITER_H
#define SPACEWEAVE_FS_WAITER_H

/*
 * The waiter: a process beside the daemon that makes the calls which wait for the
 * daemon's own mount: writing out a file's pages, syncing, unmounting.
 *
 * Who waits in the kernel for an answer to a FUSE request can't be killed. Would a
 * thread of the daemon wait for what the daemon itself has to answer, then the
 * daemon, killed just then, would be there for ever, and hold the image. The waiter
 * holds nothing of the image. When the daemon is gone it answers, with an error,
 * what is still being asked, until its own call returns; then it ends, and with it
 * the last descriptor of the mount's connection, which ends that.
 */

#include <stdbool.h>
#include <stdint.h>

/* Before there are threads, and before the image is open. Without a waiter the
 * calls below say false. */
void waiter_start(const char *dir);
/* Once it is mounted: let the waiter have a descriptor of the connection. */
void waiter_attach(int fuse_fd);

/* Any thread may call these, one is made at a time. False: it was not made. */
/* Write out and drop what the kernel has of [off, off + len); len 0: to the end. */
bool waiter_flush(uint64_t ino, int64_t off, int64_t len);
/* Write out all that the kernel has of the mount; `all`: of every file system, for
 * who can't name the mount by its directory. */
bool waiter_sync(bool all);
/* *err: 0, or -errno, as -EBUSY. */
bool waiter_unmount(int *err);

/* Nobody will answer any more: whoever is in a call comes back. */
void waiter_cut(void);
/* After the daemon has closed the connection. */
void waiter_end(void);

#endif
