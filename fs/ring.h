/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_FS_RING_H
#define SPACEWEAVE_FS_RING_H

/*
 * Requests of the kernel's FUSE over io_uring instead of reads and writes of
 * /dev/fuse (Linux 6.14 and later). The kernel has a queue for each CPU; each
 * queue gets threads of ours, which call `handle` for what comes. Whatever is
 * not an answer, and what the kernel never sends this way (INIT, forgets,
 * interrupts), stays on /dev/fuse. One ring in a process.
 */

#include <stdbool.h>
#include <stddef.h>
#include <sys/uio.h>

struct fuse_in_header;

struct ring_options {
	int fd;				/* /dev/fuse */
	unsigned threads;		/* of each queue; fewer than 2 are 2 */
	size_t payload;			/* bytes of the longest request or answer */
	void *ctx;
	/*
	 * A request, as a read of /dev/fuse would have given it, in->len bytes
	 * and writable. What follows the operation's own arguments begins at a
	 * page.
	 */
	void (*handle)(void *ctx, struct fuse_in_header *in);
	/* In each thread when it ends; `over`: because the connection has. */
	void (*end)(void *ctx, bool over);
};

/*
 * Make all that can fail, threads included, before INIT is answered: who says
 * yes there and then does not come has a mount that hangs. -errno: no ring.
 */
int ring_open(const struct ring_options *opt);
/*
 * After INIT was answered, with io_uring: requests come from here on. -errno:
 * the kernel did not take it and goes on over /dev/fuse; the ring is to be closed.
 */
int ring_start(void);
/*
 * The answer to a request, as it would have been written to /dev/fuse. False:
 * it is none to a request that came over the ring, write it there.
 */
bool ring_reply(const struct iovec *iov, int n);
/*
 * Where the answer to the request that this thread handles goes, if it came over
 * the ring and `bytes` (somewhat more than the longest answer) are there: what is
 * put together at its start is not copied once more. Else NULL. Only for requests
 * that have nothing after their own arguments.
 */
void *ring_buffer(size_t bytes);
/*
 * The request that this thread handles is to be answered by another, after the
 * kernel has sent more requests. False: that must not be, since this is the
 * last on its queue that could take them. Always true without a ring.
 */
bool ring_hold(void);
/* End the threads; those that wait for answers do not get them. */
void ring_stop(void);
/* Free it. No other thread calls ring_reply() any more. */
void ring_close(void);

#endif
