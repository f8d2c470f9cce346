/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * FUSE over io_uring.
 *
 * The kernel's side (fs/fuse/dev_uring.c): each possible CPU has a queue, into
 * which go the requests that are made on that CPU. We register entries with a
 * queue, each a header and a payload in our memory. A request is copied into an
 * entry that is free, in the context of the thread that registered it, and
 * completes its command; COMMIT_AND_FETCH answers it and makes the entry free
 * again. So a request costs one system call: the answer to the last one and the
 * wait for the next. Nothing comes until each queue has an entry.
 *
 * Ours: each thread has an io_uring and one entry of its own, so no request
 * waits behind another that a thread is stuck in (an fsync, say) while there is
 * an idle thread. The kernel takes the entry that became free last: of the
 * threads of a queue those that are not needed sleep, and what they have for
 * buffers is never touched. Under load more of them sleep and wake, though: with
 * eight busy clients two for each queue did more than four (measured once, on two
 * CPUs), four no more than sixteen. A thread runs on the CPU of its queue, where the
 * program that asks has just gone to sleep.
 *
 * An entry:
 *
 *	head ... gap  in_header  op_in | payload
 *	^ page                         ^ page
 *
 * The kernel fills head and payload; in_header and op_in are copied from head to
 * just before the payload, and the request is as /dev/fuse would have given it.
 *
 * A request that is held (ring_hold) keeps its thread and its entry. Who answers
 * it waits for other requests, on any queue; so on each queue one thread must be
 * left that does not hold: it answers by itself, and so fetches what waits.
 *
 * "lock" protects what is below it in struct ring, and `answered` of a worker
 * that holds. No other lock is taken under it.
 */
#include "fs/ring.h"

#include <assert.h>
#include <errno.h>
#include <liburing.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- what older headers lack -------------------------------------------------- */

#define CMD_REGISTER 1
#define CMD_COMMIT_AND_FETCH 2

struct head {
	union {
		struct fuse_in_header in;
		struct fuse_out_header out;
		char in_out[128];
	};
	char op_in[128];
	uint64_t flags;
	uint64_t commit_id;
	uint32_t payload_bytes;		/* both ways */
	uint32_t pad;
	uint64_t reserved;
};

struct cmd {				/* in the command's second half */
	uint64_t flags;
	uint64_t commit_id;
	uint16_t queue;
	uint8_t pad[6];
};

_Static_assert(sizeof(struct head) == 288, "fuse_uring_req_header");
_Static_assert(sizeof(struct cmd) == 24, "fuse_uring_cmd_req");

/* ---- the ring ------------------------------------------------------------------ */

#define PAGE 4096
#define SPARE (128u << 10)		/* behind a payload, for who reads whole blocks */
#define THREADS_MIN 2			/* for each queue: see ring_hold() */

struct worker {
	pthread_t thread;
	struct io_uring uring;
	struct head *head;
	char *payload;
	struct iovec iov[2];		/* both, for the kernel */
	unsigned queue;
	int cmd;			/* the last that was sent */
	uint64_t unique;		/* of the request in hand */
	bool answered, held;
};

struct queue {
	unsigned live, held;		/* workers */
};

static struct ring {
	struct ring_options opt;
	int wake;			/* an eventfd; readable: the end */
	unsigned queues, started;
	struct worker *workers;
	pthread_mutex_t lock;
	pthread_cond_t change;
	unsigned ready;			/* workers that came to the next step */
	int err;			/* of one that did not */
	bool go, stopping;
	struct queue *queue;
} *ring;
static _Thread_local struct worker *self;

/* ---- a worker ------------------------------------------------------------------- */

static struct io_uring_sqe *sqe_new(struct worker *w, int op, int fd)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&w->uring);

	assert(sqe);			/* there is room for more than we have */
	memset(sqe, 0, 2 * sizeof(*sqe));
	sqe->opcode = (uint8_t)op;
	sqe->fd = fd;
	return sqe;
}

static void command(struct worker *w, int op)
{
	struct io_uring_sqe *sqe = sqe_new(w, IORING_OP_URING_CMD, ring->opt.fd);
	const struct cmd cmd = {.queue = (uint16_t)w->queue,
				.commit_id = w->head->commit_id};

	w->cmd = op;
	sqe->cmd_op = (uint32_t)op;
	sqe->user_data = 1;
	if (op == CMD_REGISTER) {
		sqe->addr = (uintptr_t)w->iov;
		sqe->len = 2;
	}
	memcpy(sqe->cmd, &cmd, sizeof(cmd));
}

static int worker_open(struct worker *w)
{
	struct io_uring_params p = {
		.flags = IORING_SETUP_SQE128 | IORING_SETUP_SINGLE_ISSUER |
			 IORING_SETUP_DEFER_TASKRUN};
	cpu_set_t cpus;
	void *block;
	int err;

	CPU_ZERO(&cpus);
	CPU_SET(w->queue, &cpus);
	pthread_setaffinity_np(pthread_self(), sizeof(cpus), &cpus);
	block = mmap(NULL, PAGE + ring->opt.payload + SPARE, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (block == MAP_FAILED)
		return -errno;
	w->head = block;
	w->payload = (char *)block + PAGE;
	w->iov[0] = (struct iovec){w->head, sizeof(*w->head)};
	w->iov[1] = (struct iovec){w->payload, ring->opt.payload};
	err = io_uring_queue_init_params(4, &w->uring, &p);
	if (!err)
		io_uring_register_ring_fd(&w->uring);
	return err;
}

static int worker_register(struct worker *w)
{
	struct io_uring_sqe *sqe = sqe_new(w, IORING_OP_POLL_ADD, ring->wake);
	struct io_uring_cqe *cqe;
	int err;

	sqe->poll32_events = POLLIN;
	command(w, CMD_REGISTER);
	err = io_uring_submit(&w->uring);
	if (err < 0)
		return err;
	if (!io_uring_peek_cqe(&w->uring, &cqe) && cqe->res < 0)
		return cqe->res;
	return 0;
}

static void fill(struct worker *w, const struct iovec *iov, int n)
{
	struct head *h = w->head;
	size_t len = 0;

	h->out = *(const struct fuse_out_header *)iov[0].iov_base;
	for (int i = 1; i < n; i++) {
		if (iov[i].iov_len > ring->opt.payload - len) {
			h->out.error = -EIO;
			len = 0;
			break;
		}
		if (iov[i].iov_base != w->payload + len)
			memmove(w->payload + len, iov[i].iov_base,
				iov[i].iov_len);
		len += iov[i].iov_len;
	}
	h->payload_bytes = (uint32_t)len;
	w->answered = true;
}

/* Another thread is to answer. False: it will not. */
static bool await(struct worker *w)
{
	bool answered;

	pthread_mutex_lock(&ring->lock);
	while (!w->answered && !ring->stopping)
		pthread_cond_wait(&ring->change, &ring->lock);
	answered = w->answered;
	w->held = false;
	ring->queue[w->queue].held--;
	pthread_mutex_unlock(&ring->lock);
	return answered;
}

static bool request(struct worker *w)
{
	const struct head *h = w->head;
	const uint32_t head_len = h->in.len - h->payload_bytes;
	char *in = w->payload - head_len;
	const struct fuse_out_header lost = {.len = sizeof(lost), .error = -EIO,
					     .unique = h->in.unique};
	const struct iovec iov = {(void *)&lost, sizeof(lost)};

	w->unique = h->in.unique;
	w->answered = false;
	if (head_len >= sizeof(h->in) &&
	    head_len <= sizeof(h->in) + sizeof(h->op_in)) {
		memcpy(in, &h->in, sizeof(h->in));
		memcpy(in + sizeof(h->in), h->op_in, head_len - sizeof(h->in));
		ring->opt.handle(ring->opt.ctx, (struct fuse_in_header *)in);
	}
	if (w->held && !await(w))
		return false;
	if (!w->answered)
		fill(w, &iov, 1);
	command(w, CMD_COMMIT_AND_FETCH);
	return true;
}

/* What a completion says. False: it is over. */
static bool completed(struct worker *w, const struct io_uring_cqe *cqe)
{
	if (!cqe->user_data)
		return false;
	if (cqe->res == -EAGAIN || cqe->res == -EINTR)
		command(w, w->cmd);
	else
		return !cqe->res && request(w);
	return true;
}

static void serve(struct worker *w)
{
	struct io_uring_cqe *cqe, copy;
	int n;

	for (;;) {
		n = io_uring_submit_and_wait(&w->uring, 1);
		if (n < 0 && n != -EINTR && n != -EAGAIN)
			return;
		while (!io_uring_peek_cqe(&w->uring, &cqe)) {
			copy = *cqe;
			io_uring_cqe_seen(&w->uring, cqe);
			if (!completed(w, &copy))
				return;
		}
	}
}

/* A step is done, or failed. */
static void step(struct worker *w, int err)
{
	pthread_mutex_lock(&ring->lock);
	ring->ready++;
	if (err)
		ring->err = err;
	else if (ring->go)
		ring->queue[w->queue].live++;
	pthread_cond_broadcast(&ring->change);
	pthread_mutex_unlock(&ring->lock);
}

static bool await_go(void)
{
	bool go;

	pthread_mutex_lock(&ring->lock);
	while (!ring->go && !ring->stopping)
		pthread_cond_wait(&ring->change, &ring->lock);
	go = !ring->stopping;
	pthread_mutex_unlock(&ring->lock);
	return go;
}

static bool worker_left(struct worker *w)
{
	bool over;

	pthread_mutex_lock(&ring->lock);
	over = !ring->stopping;
	ring->queue[w->queue].live--;
	pthread_mutex_unlock(&ring->lock);
	return over;
}

static void *worker(void *arg)
{
	struct worker *w = self = arg;
	bool over = false;
	int err = worker_open(w), err2;

	step(w, err);
	if (!err && await_go()) {
		err2 = worker_register(w);
		step(w, err2);
		if (!err2) {
			serve(w);
			over = worker_left(w);
		}
	}
	if (!err)
		io_uring_queue_exit(&w->uring);
	ring->opt.end(ring->opt.ctx, over);
	return NULL;
}

/* ---- all of them ------------------------------------------------------------------- */

static int steps(void)
{
	int err;

	pthread_mutex_lock(&ring->lock);
	while (ring->ready < ring->started)
		pthread_cond_wait(&ring->change, &ring->lock);
	ring->ready = 0;
	err = ring->err;
	pthread_mutex_unlock(&ring->lock);
	return err;
}

/* As the kernel counts them: it waits for a queue of each. 0: not known. */
static unsigned possible_cpus(void)
{
	FILE *f = fopen("/sys/devices/system/cpu/possible", "re");
	unsigned from, to, n = 0;

	if (!f)
		return 0;
	while (fscanf(f, "%u", &from) == 1) {
		to = from;
		if (fscanf(f, "-%u", &to) != 1 || to < from)
			to = from;
		fgetc(f);			/* a comma */
		n += to - from + 1;
	}
	fclose(f);
	return n;
}

static int ring_new(const struct ring_options *opt)
{
	const unsigned cpus = possible_cpus();
	unsigned count;

	if (!cpus)
		return -ENOSYS;
	count = cpus * (opt->threads > THREADS_MIN ? opt->threads : THREADS_MIN);
	ring = calloc(1, sizeof(*ring));
	if (!ring)
		return -ENOMEM;
	ring->opt = *opt;
	ring->queues = cpus;
	ring->workers = calloc(count, sizeof(*ring->workers));
	ring->queue = calloc(cpus, sizeof(*ring->queue));
	pthread_mutex_init(&ring->lock, NULL);
	pthread_cond_init(&ring->change, NULL);
	ring->wake = eventfd(0, EFD_CLOEXEC);
	if (!ring->workers || !ring->queue)
		return -ENOMEM;
	if (ring->wake < 0)
		return -errno;
	for (unsigned i = 0; i < count; i++, ring->started++) {
		struct worker *w = &ring->workers[i];
		int err;

		w->queue = i % cpus;
		err = pthread_create(&w->thread, NULL, worker, w);
		if (err)
			return -err;
	}
	return 0;
}

int ring_open(const struct ring_options *opt)
{
	int err = ring_new(opt), err2;

	if (!ring)
		return err;
	err2 = steps();
	if (!err)
		err = err2;
	if (err) {
		ring_stop();
		ring_close();
	}
	return err;
}

int ring_start(void)
{
	unsigned all = 0;
	int err;

	pthread_mutex_lock(&ring->lock);
	ring->go = true;
	pthread_cond_broadcast(&ring->change);
	pthread_mutex_unlock(&ring->lock);
	err = steps();
	pthread_mutex_lock(&ring->lock);
	while (all < ring->queues && ring->queue[all].live)
		all++;
	pthread_mutex_unlock(&ring->lock);
	return all == ring->queues ? 0 : err;	/* with fewer threads, perhaps */
}

/* One that holds this request. */
static struct worker *holder(uint64_t unique)
{
	for (unsigned i = 0; i < ring->started; i++)
		if (ring->workers[i].held && ring->workers[i].unique == unique)
			return &ring->workers[i];
	return NULL;
}

bool ring_reply(const struct iovec *iov, int n)
{
	const struct fuse_out_header *out = iov[0].iov_base;
	struct worker *w = self;

	if (!ring || !out->unique)
		return false;
	if (w && w->unique == out->unique && !w->held) {
		fill(w, iov, n);
		return true;
	}
	pthread_mutex_lock(&ring->lock);
	w = holder(out->unique);
	if (w)
		fill(w, iov, n);
	pthread_cond_broadcast(&ring->change);
	pthread_mutex_unlock(&ring->lock);
	return w;
}

void *ring_buffer(size_t bytes)
{
	return self && bytes <= ring->opt.payload + SPARE ? self->payload : NULL;
}

bool ring_hold(void)
{
	struct queue *q;

	if (!self)
		return true;
	pthread_mutex_lock(&ring->lock);
	q = &ring->queue[self->queue];
	self->held = q->held + 1 < q->live;
	q->held += self->held;
	pthread_mutex_unlock(&ring->lock);
	return self->held;
}

void ring_stop(void)
{
	const uint64_t one = 1;

	if (!ring)
		return;
	pthread_mutex_lock(&ring->lock);
	ring->stopping = true;
	pthread_cond_broadcast(&ring->change);
	pthread_mutex_unlock(&ring->lock);
	if (ring->wake >= 0 && write(ring->wake, &one, sizeof(one)) < 0)
		abort();
	for (unsigned i = 0; i < ring->started; i++)
		pthread_join(ring->workers[i].thread, NULL);
}

void ring_close(void)
{
	if (!ring)
		return;
	for (unsigned i = 0; i < ring->started; i++)
		if (ring->workers[i].head)
			munmap(ring->workers[i].head, PAGE + ring->opt.payload + SPARE);
	if (ring->wake >= 0)
		close(ring->wake);
	pthread_mutex_destroy(&ring->lock);
	pthread_cond_destroy(&ring->change);
	free(ring->workers);
	free(ring->queue);
	free(ring);
	ring = NULL;
}
