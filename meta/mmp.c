/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Who holds the volume: one block that names host and process.
 *
 * On one host the lock on the image decides, and the block only tells who has
 * it. Where a lock may not reach the other host (a network file system, a disk
 * shared by several machines) the holder's heart beats: every interval it reads
 * the block past its own host's caches, sees that its nonce is still there, and
 * writes it with a higher number. Then (the same as ext4's multiple mount
 * protection, in ext4's words):
 *   - who opens an image whose block says that a heart beats watches the block
 *     for two intervals and a second first, and is refused if it changes;
 *   - who takes it looks once more: if the block is not what it was before
 *     anything of the volume was read, somebody else has had the volume meanwhile;
 *   - who has taken it looks again after a second: of two who took it at once,
 *     the later one has it;
 *   - a holder that finds another's nonce writes nothing more. One that comes
 *     to itself after more than two intervals (a stopped virtual machine) looks
 *     before it writes a group or a superblock, and each looks before it says that
 *     it is done.
 * What such a host's kernel had in its page cache when it was stopped it may
 * still write: only a fence around the disk prevents that.
 */
#include "meta/meta_priv.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define INTERVAL_MAX_S 300u	/* longer: damage */

/* The block as other hosts see it. */
static int block_io(struct image *im, bool write, struct disk_mmp *m)
{
	uint8_t block[MMP_BYTES] __attribute__((aligned(4096)));
	int r;

	memcpy(block, m, sizeof(*m));
	r = image_shared(im, write, block, sizeof(block), MMP_OFFSET);
	memcpy(m, block, sizeof(*m));
	return r;
}

int mmp_load(struct image *im, struct disk_mmp *out)
{
	int r;

	memset(out, 0, sizeof(*out));
	r = block_io(im, false, out);
	if (r)
		return r;
	if (get64(out->magic) != MMP_MAGIC)
		return -EINVAL;
	if (get64(out->csum) != checksum(out, offsetof(struct disk_mmp, csum)))
		return -EFSBADCRC;
	out->host[sizeof(out->host) - 1] = 0;
	out->program[sizeof(out->program) - 1] = 0;
	return 0;
}

static bool changed(const struct disk_mmp *a, const struct disk_mmp *b)
{
	return get64(a->seq) != get64(b->seq) || get64(a->nonce) != get64(b->nonce);
}

int mmp_watch(struct image *im)
{
	const struct timespec step = {0, 100000000};
	struct disk_mmp first, now;
	unsigned s;

	if (mmp_load(im, &first))
		return 0;
	im->holder = get64(first.csum);
	s = get32(first.interval_s);
	if (get32(first.state) == MMP_FREE || !s || s > INTERVAL_MAX_S)
		return 0;
	for (unsigned i = 0; i < (2 * s + 1) * 10; i++) {
		nanosleep(&step, NULL);
		if (mmp_load(im, &now) || !changed(&first, &now))
			continue;
		im->holder = get64(now.csum);
		return get32(now.state) == MMP_FREE ? 0 : -EBUSY;
	}
	return 0;
}

/* What is in the block, in one number; 0: nobody has written it. */
static int mmp_look(struct image *im, struct disk_mmp *m, uint64_t *holder)
{
	int r = mmp_load(im, m);

	*holder = r ? 0 : get64(m->csum);
	return r == -EINVAL || r == -EFSBADCRC ? 0 : r;
}

int mmp_expect(struct image *im, uint64_t *holder)
{
	struct disk_mmp m;
	int r = 0;

	*holder = im->holder;
	im->holder = 0;
	if (!*holder)
		r = mmp_look(im, &m, holder);
	return r;
}

int mmp_clear(struct image *im)
{
	struct disk_mmp m, none = {0};
	uint64_t before, holder;
	int r = mmp_expect(im, &before);

	if (r == 0)
		r = mmp_look(im, &m, &holder);
	if (r == 0 && holder != before)
		r = -EBUSY;
	return r ? r : image_pwrite(im, &none, sizeof(none), MMP_OFFSET);
}

/* ---- the holder --------------------------------------------------------------------- */

static uint64_t now_s(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_BOOTTIME, &ts);
	return (uint64_t)ts.tv_sec;
}

static int write_locked(struct volume *v, uint32_t state)
{
	struct disk_mmp *m = &v->mmp;
	int r;

	m->magic = put64(MMP_MAGIC);
	m->seq = put64(get64(m->seq) + 1);
	m->time_ns = put64(now_ns());
	m->state = put32(state);
	m->pid = put32((uint32_t)getpid());
	m->interval_s = put32(v->opt.heartbeat_s);
	gethostname(m->host, sizeof(m->host) - 1);
	snprintf(m->program, sizeof(m->program), "%s",
		 v->opt.program ? v->opt.program : "spaceweave");
	m->csum = put64(checksum(m, offsetof(struct disk_mmp, csum)));
	if (!v->opt.heartbeat_s)
		return image_pwrite(v->im, m, sizeof(*m), MMP_OFFSET);
	r = block_io(v->im, true, m);
	atomic_store(&v->beat_s, now_s());
	return r;
}

/* Somebody else's: say whose. */
static int taken(const struct disk_mmp *now, char *who, size_t len)
{
	snprintf(who, len, "holding the image, which %.31s on %.63s, process %u, has "
		 "taken,", now->program, now->host, get32(now->pid));
	return -EBUSY;
}

/* Is it still ours? */
static int keep_locked(struct volume *v, char *who, size_t len)
{
	struct disk_mmp now;
	int r = mmp_load(v->im, &now);

	snprintf(who, len, "the heartbeat");
	return r == 0 && get64(now.nonce) != get64(v->mmp.nonce)
		       ? taken(&now, who, len) : r;
}

int mmp_write(struct volume *v, uint32_t state)
{
	char who[160];
	int r;

	lock_lock(&v->heart);
	r = keep_locked(v, who, sizeof(who));
	/* Without a heart the block but tells who it is. */
	if (r != -EBUSY && !v->opt.heartbeat_s)
		r = 0;
	if (r == 0)
		r = write_locked(v, state);
	lock_unlock(&v->heart);
	return r == -EBUSY ? volume_fail(v, r, who) : r;
}

static int beat(struct volume *v)
{
	char who[160];
	int r;

	if (atomic_load(&v->failed))
		return -EIO;
	lock_lock(&v->heart);
	r = keep_locked(v, who, sizeof(who));
	if (r == 0)
		r = write_locked(v, get32(v->mmp.state));
	lock_unlock(&v->heart);
	return r ? volume_fail(v, r, who) : 0;
}

int mmp_still_ours(struct volume *v)
{
	if (!v->opt.heartbeat_s ||
	    now_s() - atomic_load(&v->beat_s) <= 2 * v->opt.heartbeat_s)
		return 0;
	return beat(v);
}

static void *heart_main(void *arg)
{
	struct volume *v = arg;
	struct timespec due;
	bool stop = false;

	while (!stop && beat(v) == 0) {
		clock_gettime(CLOCK_MONOTONIC, &due);
		due.tv_sec += v->opt.heartbeat_s;
		lock_lock(&v->heart);
		while (!v->heart_stop &&
		       pthread_cond_timedwait(&v->heart_wake, &v->heart.m, &due) == 0)
			;
		stop = v->heart_stop;
		lock_unlock(&v->heart);
	}
	return NULL;
}

void mmp_init(struct volume *v)
{
	pthread_condattr_t attr;

	lock_init(&v->heart, RANK_LEAF, "heart");
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&v->heart_wake, &attr);
	pthread_condattr_destroy(&attr);
}

/* Write the block, if it is still what it was. Without a heart it need not be
 * readable. */
static int take_locked(struct volume *v, char *who, size_t len)
{
	struct disk_mmp old;
	uint64_t holder;
	int r = mmp_look(v->im, &old, &holder);

	if (v->opt.heartbeat_s && (r || !v->holder_known))
		return r ? r : -EIO;
	if (r == 0 && v->holder_known && holder != v->holder)
		return taken(&old, who, len);
	if (holder)
		v->mmp.seq = old.seq;
	v->mmp.nonce = put64(random64());
	return write_locked(v, MMP_HELD);
}

int mmp_take(struct volume *v, char *msg, size_t msg_len)
{
	const struct timespec second = {1, 0};
	char who[160] = "the heartbeat";
	int r;

	lock_lock(&v->heart);
	r = take_locked(v, who, sizeof(who));
	lock_unlock(&v->heart);
	if (r == 0 && v->opt.heartbeat_s) {
		nanosleep(&second, NULL);
		r = keep_locked(v, who, sizeof(who));
	}
	if (r)
		snprintf(msg, msg_len, "%s failed: %s", who, strerror(-r));
	if (r || !v->opt.heartbeat_s)
		return r;
	r = -pthread_create(&v->heart_thread, NULL, heart_main, v);
	v->heart_runs = !r;
	return r;
}

void mmp_stop(struct volume *v)
{
	if (!v->heart_runs)
		return;
	lock_lock(&v->heart);
	v->heart_stop = true;
	pthread_cond_signal(&v->heart_wake);
	lock_unlock(&v->heart);
	pthread_join(v->heart_thread, NULL);
	v->heart_runs = false;
}
