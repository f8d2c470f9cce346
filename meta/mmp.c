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
 * fsck and undo, which also write where no volume is open, hold the block from start
 * to end if the last holder's heart has beaten; fsck's volumes leave it alone.
 *
 * What such a host's kernel had in its page cache when it was stopped it may
 * still write: only a fence around the disk prevents that.
 */
#include "meta/meta_priv.h"
#include "meta/repair.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define INTERVAL_MAX_S 300u	/* longer: damage */
#define WHO_BYTES 160u

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

static int write_locked(struct heart *h, uint32_t state)
{
	struct disk_mmp *m = &h->mmp;
	int r;

	m->magic = put64(MMP_MAGIC);
	m->seq = put64(get64(m->seq) + 1);
	m->time_ns = put64(now_ns());
	m->state = put32(state);
	m->pid = put32((uint32_t)getpid());
	m->interval_s = put32(h->interval_s);
	gethostname(m->host, sizeof(m->host) - 1);
	snprintf(m->program, sizeof(m->program), "%s",
		 h->program ? h->program : "spaceweave");
	m->csum = put64(checksum(m, offsetof(struct disk_mmp, csum)));
	if (!h->interval_s)
		return image_pwrite(h->im, m, sizeof(*m), MMP_OFFSET);
	r = block_io(h->im, true, m);
	atomic_store(&h->beat_s, now_s());
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
static int keep_locked(struct heart *h, char *who, size_t len)
{
	struct disk_mmp now;
	int r = mmp_load(h->im, &now);

	snprintf(who, len, "the heartbeat");
	return r == 0 && get64(now.nonce) != get64(h->mmp.nonce)
		       ? taken(&now, who, len) : r;
}

static int say(struct heart *h, uint32_t state)
{
	char who[WHO_BYTES];
	int r;

	lock_lock(&h->lock);
	r = keep_locked(h, who, sizeof(who));
	/* Without a heart the block but tells who it is. */
	if (r != -EBUSY && !h->interval_s)
		r = 0;
	if (r == 0)
		r = write_locked(h, state);
	lock_unlock(&h->lock);
	if (r == -EBUSY)
		h->lost(h->ctx, r, who);
	return r;
}

static int beat(struct heart *h)
{
	char who[WHO_BYTES];
	int r;

	if (atomic_load(h->failed))
		return -EIO;
	lock_lock(&h->lock);
	r = keep_locked(h, who, sizeof(who));
	if (r == 0)
		r = write_locked(h, get32(h->mmp.state));
	lock_unlock(&h->lock);
	if (r)
		h->lost(h->ctx, r, who);
	return r;
}

static void *heart_main(void *arg)
{
	struct heart *h = arg;
	struct timespec due;
	bool stop = false;

	while (!stop && beat(h) == 0) {
		clock_gettime(CLOCK_MONOTONIC, &due);
		due.tv_sec += h->interval_s;
		lock_lock(&h->lock);
		while (!h->stop &&
		       pthread_cond_timedwait(&h->wake, &h->lock.m, &due) == 0)
			;
		stop = h->stop;
		lock_unlock(&h->lock);
	}
	return NULL;
}

static void heart_init(struct heart *h)
{
	pthread_condattr_t attr;

	lock_init(&h->lock, RANK_LEAF, "heart");
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&h->wake, &attr);
	pthread_condattr_destroy(&attr);
}

static void heart_fini(struct heart *h)
{
	lock_fini(&h->lock);
	pthread_cond_destroy(&h->wake);
}

/* Write the block, if it is still what it was. Without a heart it need not be
 * readable. */
static int take_locked(struct heart *h, char *who, size_t len)
{
	struct disk_mmp old;
	uint64_t holder;
	int r = mmp_look(h->im, &old, &holder);

	if (h->interval_s && (r || !h->before_known))
		return r ? r : -EIO;
	if (r == 0 && h->before_known && holder != h->before)
		return taken(&old, who, len);
	if (holder)
		h->mmp.seq = old.seq;
	h->mmp.nonce = put64(random64());
	return write_locked(h, MMP_HELD);
}

/* Take the image, and begin to beat. */
static int take(struct heart *h, char *who, size_t len)
{
	const struct timespec second = {1, 0};
	int r;

	snprintf(who, len, "the heartbeat");
	lock_lock(&h->lock);
	r = take_locked(h, who, len);
	lock_unlock(&h->lock);
	if (r == 0 && h->interval_s) {
		nanosleep(&second, NULL);
		r = keep_locked(h, who, len);
	}
	if (r || !h->interval_s)
		return r;
	r = -pthread_create(&h->thread, NULL, heart_main, h);
	h->runs = !r;
	return r;
}

static void stop(struct heart *h)
{
	if (!h->runs)
		return;
	lock_lock(&h->lock);
	h->stop = true;
	pthread_cond_signal(&h->wake);
	lock_unlock(&h->lock);
	pthread_join(h->thread, NULL);
	h->runs = false;
}

int heart_look(struct heart *h)
{
	if (!h || !h->interval_s ||
	    now_s() - atomic_load(&h->beat_s) <= 2 * h->interval_s)
		return 0;
	return beat(h);
}

/* ---- a volume ------------------------------------------------------------------------- */

static void volume_lost(void *ctx, int err, const char *why)
{
	volume_fail(ctx, err, why);
}

void mmp_init(struct volume *v)
{
	const struct volume_repair *rep = v->opt.repair;

	v->own_heart = (struct heart){.im = v->im,
				      .program = v->opt.program,
				      .interval_s = v->opt.heartbeat_s,
				      .failed = &v->failed,
				      .lost = volume_lost,
				      .ctx = v};
	heart_init(&v->own_heart);
	v->heart = rep && rep->heart ? rep->heart : &v->own_heart;
}

void mmp_fini(struct volume *v) { heart_fini(&v->own_heart); }

static bool is_own(const struct volume *v) { return v->heart == &v->own_heart; }

int mmp_take(struct volume *v, char *msg, size_t msg_len)
{
	char who[WHO_BYTES];
	int r = is_own(v) ? take(v->heart, who, sizeof(who)) : heart_look(v->heart);

	if (r && is_own(v))
		snprintf(msg, msg_len, "%s failed: %s", who, strerror(-r));
	return r;
}

int mmp_write(struct volume *v, uint32_t state)
{
	return is_own(v) ? say(v->heart, state) : 0;
}

int mmp_still_ours(struct volume *v) { return heart_look(v->heart); }

void mmp_stop(struct volume *v) { stop(&v->own_heart); }

/* ---- who writes without a volume ------------------------------------------------------- */

int heart_hold(struct image *im, const char *program,
	       void (*lost)(void *ctx, int err, const char *why), void *ctx,
	       struct heart **out)
{
	struct disk_mmp m;
	struct heart *h;
	char who[WHO_BYTES];
	int r;

	*out = NULL;
	if (mmp_load(im, &m) || !get32(m.interval_s) ||
	    get32(m.interval_s) > INTERVAL_MAX_S)
		return 0;
	h = calloc(1, sizeof(*h));
	if (!h)
		return -ENOMEM;
	h->im = im;
	h->program = program;
	h->interval_s = get32(m.interval_s);
	h->lost = lost;
	h->ctx = ctx;
	h->failed = &h->none_failed;
	heart_init(h);
	h->before_known = mmp_expect(im, &h->before) == 0;
	r = take(h, who, sizeof(who));
	if (r) {
		heart_fini(h);
		free(h);
		return r;
	}
	*out = h;
	return 0;
}

void heart_release(struct heart *h)
{
	if (!h)
		return;
	stop(h);
	say(h, MMP_FREE);
	heart_fini(h);
	free(h);
}
