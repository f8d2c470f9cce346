/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Open and close, and what happens in between without being asked.
 *
 * Opening for writing
 *   1. a flush, and the host forgets what it has in memory (super_settle()): what
 *      is written from here on relies on what is read, so that has to be on the
 *      disk: blocks are taken that are free by that superblock only, groups say
 *      what is durable
 *   2. the newest good superblock slot; the journal from its tail on
 *   3. blocks: of the host, for the whole ring; the allocator, over the bitmaps
 *      and what the journal took
 *   4. the journal's items, into the trees
 *   5. a checkpoint of that under a new salt, before anything is answered: so
 *      nothing that this mount writes can continue the old journal
 *   6. what was cut off: intents are finished, orphans evicted
 * A crash in any of these leaves the old superblock and its journal as they
 * were. Opening read-only does 2, 4 and 6 in memory and writes nothing.
 *
 * mkfs is the same: one superblock, one group in the ring that takes the fixed
 * blocks and makes the root directory, then open and close.
 *
 * A thread commits what is older than the commit interval, writes groups that
 * are full, and runs checkpoints. It sleeps while nothing is dirty.
 */
#include "meta/meta_priv.h"
#include "meta/repair.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* ---- saying things ------------------------------------------------------------- */

void volume_message(struct volume *v, const char *fmt, ...)
{
	char text[512];
	va_list ap;
	size_t n;

	n = (size_t)snprintf(text, sizeof(text), "%s: ", v->im->name);
	if (n >= sizeof(text))
		n = sizeof(text) - 1;
	va_start(ap, fmt);
	vsnprintf(text + n, sizeof(text) - n, fmt, ap);
	va_end(ap);
	if (v->opt.message)
		v->opt.message(v->opt.message_ctx, text);
	else
		fprintf(stderr, "%s\n", text);
}

int volume_fail(struct volume *v, int err, const char *what)
{
	int none = 0;

	if (atomic_compare_exchange_strong(&v->failed, &none, -err))
		volume_message(v, "%s failed: %s; the volume is read-only now",
			       what, strerror(-err));
	return err;
}

/* ---- mkfs ------------------------------------------------------------------------- */

int volume_geometry_check(struct volume_geometry *g, char *msg, size_t msg_len)
{
	uint64_t block, min, max;

	if (!g->block_shift)
		g->block_shift = BLOCK_SHIFT_MIN;
	if (g->block_shift < BLOCK_SHIFT_MIN || g->block_shift > BLOCK_SHIFT_MAX) {
		snprintf(msg, msg_len, "block size 2^%u is not one of 4 KiB .. "
			 "64 KiB", g->block_shift);
		return -EINVAL;
	}
	block = 1ull << g->block_shift;
	g->bytes &= ~(block - 1);
	if (g->bytes < VOLUME_MIN_BYTES || g->bytes > VOLUME_MAX_BYTES) {
		snprintf(msg, msg_len, "size %llu is not between %llu (1 MiB) and "
			 "%llu (1 PiB) bytes", (unsigned long long)g->bytes,
			 (unsigned long long)VOLUME_MIN_BYTES,
			 (unsigned long long)VOLUME_MAX_BYTES);
		return -EINVAL;
	}
	min = journal_least(g->bytes >> g->block_shift, g->block_shift);
	if (!g->journal_bytes) {
		g->journal_bytes = g->bytes / 32;
		if (g->journal_bytes > JOURNAL_USUAL)
			g->journal_bytes = JOURNAL_USUAL;
		if (g->journal_bytes < min)
			g->journal_bytes = min;
	}
	g->journal_bytes = (g->journal_bytes + block - 1) & ~(block - 1);
	max = (uint64_t)JOURNAL_MAX_UNITS * JOURNAL_UNIT;
	if (max > g->bytes / 2)
		max = g->bytes / 2;
	if (g->journal_bytes < min || g->journal_bytes > max) {
		snprintf(msg, msg_len, "journal size %llu is not between %llu and "
			 "%llu bytes", (unsigned long long)g->journal_bytes,
			 (unsigned long long)min, (unsigned long long)max);
		return -EINVAL;
	}
	if (!g->root_mode)
		g->root_mode = 0755;
	return 0;
}

static unsigned fixed_blocks(const struct disk_super *s, struct extent out[8])
{
	unsigned shift = get32(s->block_shift);
	uint64_t ring = get64(s->journal_units) * JOURNAL_UNIT;

	out[0] = (struct extent){0, HEAD_BYTES >> shift};
	out[1] = (struct extent){get64(s->journal_block), ring >> shift};
	out[2] = (struct extent){get64(s->blocks) - 1, 1};
	return 3;
}

static size_t jitem_put(uint8_t *at, enum journal_item type, enum table table,
			const void *key, size_t klen, const void *val, size_t vlen)
{
	struct disk_jitem h = {.type = (uint8_t)type,
			       .table = (uint8_t)table,
			       .klen = put16((uint16_t)klen),
			       .vlen = put16((uint16_t)vlen)};

	memcpy(at, &h, sizeof(h));
	memcpy(at + sizeof(h), key, klen);
	if (vlen)
		memcpy(at + sizeof(h) + klen, val, vlen);
	return sizeof(h) + klen + vlen;
}

/* The first group: the fixed blocks are taken, the root directory is there. */
static void first_group(uint8_t *buf, const struct disk_super *s,
			const struct volume_geometry *g)
{
	struct disk_group *h = (void *)buf;
	struct extent fixed[8];
	struct disk_inode d = {0};
	struct attr a = {0};
	struct key k;
	size_t len = sizeof(*h);
	unsigned n = fixed_blocks(s, fixed);
	uint64_t now = now_ns();

	for (unsigned i = 0; i < n; i++) {
		le64 run[2] = {put64(fixed[i].start), put64(fixed[i].len)};

		len += jitem_put(buf + len, JITEM_TAKE, 0, run, sizeof(run),
				 NULL, 0);
	}
	a.mode = S_IFDIR | (g->root_mode & 07777);
	a.uid = g->root_uid;
	a.gid = g->root_gid;
	a.nlink = 2;
	a.parent = ROOT_INO;
	a.next_index = FIRST_INDEX;
	a.btime.sec = (int64_t)(now / 1000000000u);
	a.btime.nsec = (uint32_t)(now % 1000000000u);
	a.atime = a.mtime = a.ctime = a.btime;
	attr_encode(&a, &d);
	key_file(&k, ROOT_INO, KEY_INODE);
	len += jitem_put(buf + len, JITEM_PUT, TABLE_FILES, k.b, k.len, &d,
			 sizeof(d));
	h->magic = put32(GROUP_MAGIC);
	h->bytes = put32((uint32_t)len);
	h->salt = s->salt;
	h->seq = s->tail_seq;
	h->items = put32(n + 1);
	h->csum = put64(checksum(buf, len));
}

static void super_make(struct disk_super *s, const struct volume_geometry *g)
{
	memset(s, 0, sizeof(*s));
	s->magic = put64(SUPER_MAGIC);
	s->version = put32(FORMAT_VERSION);
	memcpy(s->uuid, g->uuid, sizeof(s->uuid));
	memcpy(s->label, g->label, sizeof(s->label));
	s->compat = put64(FEATURES_COMPAT);
	s->ro_compat = put64(FEATURES_RO_COMPAT);
	s->incompat = put64(FEATURES_INCOMPAT);
	s->block_shift = put32(g->block_shift);
	s->blocks = put64(g->bytes >> g->block_shift);
	s->journal_block = put64(HEAD_BYTES >> g->block_shift);
	s->journal_units = put64(g->journal_bytes / JOURNAL_UNIT);
	s->created_ns = put64(now_ns());
	s->salt = put64(random64());
	s->tail_seq = put64(1);
	s->next_ino = put64(FIRST_INO);
	s->free_blks = s->blocks;
	/* No numbers have to be skipped: nobody has been given one. */
	s->flags = put32(SUPER_CLEAN);
}

/*
 * The ring is really written: the first write into a hole of a sparse host
 * file would cost the host a journal commit of its own at the next flush.
 */
static int ring_write_first(struct image *im, const struct disk_super *s,
			    const struct volume_geometry *g)
{
	size_t chunk = 1u << 20;
	uint64_t base = get64(s->journal_block) << g->block_shift;
	uint8_t *buf = calloc(1, chunk);
	int r = 0;

	if (!buf)
		return -ENOMEM;
	for (uint64_t at = chunk; at < g->journal_bytes && r == 0; at += chunk)
		r = image_pwrite(im, buf, g->journal_bytes - at < chunk
						  ? g->journal_bytes - at
						  : chunk, base + at);
	first_group(buf, s, g);
	if (r == 0)
		r = image_pwrite(im, buf, g->journal_bytes < chunk
						  ? g->journal_bytes
						  : chunk, base);
	free(buf);
	return r;
}

int volume_format(struct image *im, const struct volume_geometry *geometry)
{
	struct volume_geometry checked = *geometry, *g = &checked;
	struct volume_options opt = {.no_threads = true, .program = "mkfs"};
	struct disk_super s, none = {0};
	struct volume *v;
	char msg[256];
	int r = volume_geometry_check(g, msg, sizeof(msg));

	if (r)
		return r;
	super_make(&s, g);
	r = mmp_clear(im);
	if (r)
		return r;
	if (g->discard)
		image_discard(im, 0, im->bytes);
	/* The old superblocks first: what is half made shall not be mounted. */
	for (unsigned i = 0; i < SUPER_SLOTS; i++) {
		r = image_pwrite(im, &none, sizeof(none), SUPER_SLOT_OFFSET(i));
		if (r)
			return r;
	}
	r = ring_write_first(im, &s, g);
	super_seal(&s, 2);
	if (r == 0)
		r = image_pwrite(im, &s, sizeof(s), BACKUP_OFFSET);
	super_seal(&s, 3);
	if (r == 0)
		r = image_pwrite(im, &s, sizeof(s),
				 g->bytes - (1ull << g->block_shift));
	if (r == 0)
		r = image_flush(im);
	super_seal(&s, 0);
	if (r == 0)
		r = image_pwrite(im, &s, sizeof(s), SUPER_SLOT_OFFSET(0));
	if (r)
		return r;
	r = volume_open(im, &opt, &v, msg, sizeof(msg));
	return r ? r : volume_close(v);
}

/* ---- the thread --------------------------------------------------------------------- */

/* Something is dirty: the timer shall run. */
void volume_arm(struct volume *v)
{
	if (v->opt.no_threads || atomic_exchange(&v->armed, true))
		return;
	lock_lock(&v->timer);
	pthread_cond_signal(&v->timer_wake);
	lock_unlock(&v->timer);
}

void volume_kick(struct volume *v, bool checkpoint)
{
	if (v->opt.no_threads)
		return;
	lock_lock(&v->timer);
	if (checkpoint)
		v->want_checkpoint = true;
	else
		v->want_write = true;
	pthread_cond_signal(&v->timer_wake);
	lock_unlock(&v->timer);
}

static uint64_t last_seq(struct volume *v)
{
	uint64_t seq;

	rwlock_read(&v->commit);
	seq = v->next_seq - 1;
	rwlock_unlock(&v->commit);
	return seq;
}

int volume_tick(struct volume *v)
{
	uint64_t seq, durable;
	int r;

	if (v->readonly)
		return 0;
	if (atomic_load(&v->failed))
		return -EIO;
	inodes_evict_late(v);
	/* What can be freed is waited for, where the host is full. */
	if (atomic_load(&v->host_full) &&
	    atomic_load(&v->pending_blks) > atomic_load(&v->pending_own))
		return checkpoint_run(v, false);
	seq = last_seq(v);
	lock_lock(&v->journal);
	durable = v->durable_seq;
	if (seq == v->mark_seq)
		seq = durable;
	lock_unlock(&v->journal);
	if (seq > durable)
		return journal_write(v, seq, true);
	/* Nothing new for an interval: the last mark, and free what can be. */
	if (atomic_load(&v->pending_blks) > atomic_load(&v->pending_own)) {
		r = checkpoint_run(v, false);
		if (r)
			return r;
	} else if (v->opt.discard && blk_off(v, atomic_load(&v->trim_due)) >=
					     TRIM_BYTES) {
		atomic_store(&v->trim_due, 0);
		volume_trim(v, 0, v->blocks, DISCARD_BYTES >> v->shift, NULL);
	}
	return journal_mark(v);
}

static void timer_deadline(struct volume *v, struct timespec *ts)
{
	clock_gettime(CLOCK_MONOTONIC, ts);
	ts->tv_sec += v->opt.commit_ms / 1000;
	ts->tv_nsec += (long)(v->opt.commit_ms % 1000) * 1000000;
	if (ts->tv_nsec >= 1000000000) {
		ts->tv_nsec -= 1000000000;
		ts->tv_sec++;
	}
}

/* Is there anything the timer would have to come back for? */
static bool timer_idle(struct volume *v)
{
	uint64_t seq = last_seq(v);
	bool idle;

	lock_lock(&v->journal);
	idle = v->attested_seq >= v->durable_seq &&
	       (seq == v->durable_seq || seq == v->mark_seq);
	lock_unlock(&v->journal);
	return idle && !inodes_late(v) &&
	       atomic_load(&v->pending_blks) <= atomic_load(&v->pending_own) &&
	       !(v->opt.discard &&
		 blk_off(v, atomic_load(&v->trim_due)) >= TRIM_BYTES);
}

/*
 * A group is full: write it, and let its data go out as well, for the next
 * flush waits for all of it. What replay has to check is bounded likewise.
 */
static void push_out(struct volume *v)
{
	uint64_t seq = last_seq(v);

	if (journal_write(v, seq, false))
		return;
	image_push(v->im);
	if (atomic_load(&v->unflushed) > UNFLUSHED_MAX)
		journal_write(v, seq, true);
}

static void *timer_main(void *arg)
{
	struct volume *v = arg;
	struct timespec due;
	bool checkpoint, write, stop = false, timed_out;

	timer_deadline(v, &due);
	while (!stop) {
		timed_out = false;
		lock_lock(&v->timer);
		while (!v->thread_stop && !v->want_checkpoint && !v->want_write &&
		       !timed_out) {
			if (!atomic_load(&v->armed)) {
				lock_wait(&v->timer, &v->timer_wake);
				timer_deadline(v, &due);
			} else if (pthread_cond_timedwait(&v->timer_wake,
							  &v->timer.m, &due)) {
				timed_out = true;
			}
		}
		checkpoint = v->want_checkpoint;
		write = v->want_write;
		stop = v->thread_stop;
		v->want_checkpoint = v->want_write = false;
		lock_unlock(&v->timer);
		if (stop)
			break;
		if (write)
			push_out(v);
		if (checkpoint)
			checkpoint_run(v, false);
		if (timed_out) {
			atomic_store(&v->armed, false);
			if (volume_tick(v) == 0 && !timer_idle(v))
				atomic_store(&v->armed, true);
			timer_deadline(v, &due);
		}
	}
	txn_thread_done();
	return NULL;
}

static int timer_start(struct volume *v)
{
	pthread_condattr_t attr;

	lock_init(&v->timer, RANK_LEAF, "timer");
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&v->timer_wake, &attr);
	pthread_condattr_destroy(&attr);
	if (v->opt.no_threads || v->readonly)
		return 0;
	if (pthread_create(&v->thread, NULL, timer_main, v))
		return -EAGAIN;
	v->thread_runs = true;
	return 0;
}

static void timer_stop(struct volume *v)
{
	if (!v->thread_runs)
		return;
	lock_lock(&v->timer);
	v->thread_stop = true;
	pthread_cond_signal(&v->timer_wake);
	lock_unlock(&v->timer);
	pthread_join(v->thread, NULL);
	v->thread_runs = false;
}

/* ---- opening and closing --------------------------------------------------------------- */

static void volume_free(struct volume *v)
{
	if (v->alloc)
		alloc_close(v->alloc);
	mmp_fini(v);
	icache_fini(v);
	journal_fini(v);
	held_fini(v);
	tree_fini(v);
	free(v->deltas.v);
	free(v->node_frees.v);
	free(v->space_frees.v);
	free(v->dropped.v);
	free(v->merging.v);
	free(v->pool);
	free(v->changed);
	rwlock_fini(&v->commit);
	lock_fini(&v->checkpoint);
	lock_fini(&v->punch);
	lock_fini(&v->refs);
	lock_fini(&v->timer);
	pthread_cond_destroy(&v->timer_wake);
	free(v);
	txn_thread_done();
}

static void roots_load(struct volume *v)
{
	for (unsigned t = 0; t < TABLES; t++) {
		const struct disk_root *d = &v->super.root[t];
		struct tree *tr = &v->trees[t];

		tr->table = t;
		tr->root = ptr_get(&d->ptr);
		tr->level = get32(d->level);
		tr->nodes = get64(d->nodes);
		tr->items = get64(d->items);
		tr->gen = v->gen;
		tr->frees = t == TABLE_SPACE ? &v->space_frees : &v->node_frees;
	}
}

static int volume_new(struct image *im, const struct volume_options *opt,
		      const struct disk_super *s, unsigned slot,
		      struct volume **out)
{
	struct volume *v = calloc(1, sizeof(*v));
	int r;

	if (!v)
		return -ENOMEM;
	v->im = im;
	v->opt = *opt;
	if (!v->opt.commit_ms)
		v->opt.commit_ms = 5000;
	if (!v->opt.cache_bytes)
		v->opt.cache_bytes = 128u << 20;
	v->super = *s;
	v->slot = slot;
	v->shift = get32(s->block_shift);
	v->block_bytes = 1u << v->shift;
	v->blocks = get64(s->blocks);
	v->readonly = opt->readonly;
	v->was_clean = get32(s->flags) & SUPER_CLEAN;
	v->gen = get64(s->gen) + 1;
	v->next_stamp = random64();
	v->inodes = get64(s->inodes);
	v->aside = get64(s->aside) < v->blocks ? get64(s->aside) : v->blocks;
	atomic_store(&v->durable_gen, get64(s->gen));
	rwlock_init(&v->commit, RANK_COMMIT, "commit");
	lock_init(&v->checkpoint, RANK_CHECKPOINT, "checkpoint");
	lock_init(&v->punch, RANK_PUNCH, "punching");
	lock_init(&v->refs, RANK_REFS, "references");
	lock_init(&v->timer, RANK_LEAF, "timer");
	pthread_cond_init(&v->timer_wake, NULL);
	mmp_init(v);
	roots_load(v);
	r = tree_init(v);
	if (r == 0)
		r = held_init(v);
	if (r == 0)
		r = journal_init(v);
	if (r == 0)
		r = icache_init(v);
	*out = v;
	return r;
}

/*
 * A copy that was made sparse has holes in the ring, for which a full host would
 * have no blocks when a commit needs them. Where there are none it costs nothing.
 */
static int ring_ensure(struct volume *v)
{
	int r = image_ensure(v->im, v->ring_offset, v->ring_units * JOURNAL_UNIT);

	if (r == -ENOSPC || r == -EDQUOT)
		atomic_store(&v->host_full, true);
	return r == -EOPNOTSUPP ? 0 : r;
}

static int open_rw(struct volume *v, char *msg, size_t msg_len)
{
	uint64_t used = v->head_unit - get64(v->super.tail_unit) - v->own_units;
	int r;

	v->tail_unit = get64(v->super.tail_unit);
	atomic_fetch_sub(&v->ring_free, (int64_t)(used * JOURNAL_UNIT));
	v->written_seq = v->durable_seq = v->attested_seq = v->next_seq - 1;
	r = reserve_init(v);
	if (r == 0)
		r = repair_bitmaps(v);
	if (r == 0)
		r = mmp_take(v, msg, msg_len);
	if (r == 0)
		r = ring_ensure(v);
	if (r == 0)
		r = space_open(v);
	if (r == 0)
		r = repair_space(v);
	if (r)
		goto out;
	reserve_top_up(v);
	r = pool_open(v);
	if (r == 0)
		r = repair_nodes(v);
	if (r == 0)
		r = journal_apply(v);
	if (r == 0 && v->opt.repair)
		r = items_apply(v, v->opt.repair->items,
				v->opt.repair->item_count);
	if (r)
		goto out;
	/* What fsck has found to be wrong is fsck's to put right. */
	if (!v->opt.repair)
		r = inodes_skip_used(v);
	if (r)
		goto out;
	if (!v->was_clean)
		atomic_fetch_add(&v->next_ino, 1ull << 32);
	v->salt = random64();
	v->last_csum = 0;
	v->super.mounts = put32(get32(v->super.mounts) + 1);
	r = checkpoint_run(v, false);
	v->merging.count = 0;
	if (r == 0 && !v->opt.repair)
		r = intents_finish(v);
	if (r == 0 && !v->opt.repair)
		r = orphans_evict(v);
	if (r == 0)
		r = timer_start(v);
out:
	if (r && !*msg)
		snprintf(msg, msg_len, "cannot be opened for writing: %s%s",
			 strerror(-r), atomic_load(&v->host_full)
			 ? ": the disk that holds the image is full; reading "
			   "(ro) needs no room" : "");
	return r;
}

static int open_ro(struct volume *v)
{
	int r;

	bool replay = !v->opt.repair || !v->opt.repair->no_replay;

	v->replaying = true;
	r = repair_nodes(v);
	if (r == 0 && replay)
		r = journal_apply(v);
	if (r == 0 && !v->opt.repair)
		r = intents_finish(v);
	v->replaying = false;
	return r;
}

int volume_open(struct image *im, const struct volume_options *opt,
		struct volume **out, char *msg, size_t msg_len)
{
	struct disk_super s;
	struct volume *v = NULL;
	uint64_t holder = 0;
	bool known = !opt->readonly && mmp_expect(im, &holder) == 0;
	unsigned slot;
	int r;

	if (msg_len)
		*msg = 0;
	r = opt->readonly ? 0 : super_settle(im);
	if (r) {
		snprintf(msg, msg_len, "what was written before cannot be made "
			 "durable: %s", strerror(-r));
		return r;
	}
	r = opt->readonly || opt->repair
		    ? super_load(im, &s, &slot, msg, msg_len)
		    : super_load_to_write(im, &s, &slot, msg, msg_len);
	if (r)
		return r;
	if (opt->repair && opt->repair->older)
		s = *opt->repair->older;
	else if (opt->repair && opt->repair->gen && opt->repair->gen != get64(s.gen)) {
		snprintf(msg, msg_len, "superblock: that of checkpoint %llu is not "
			 "to be had", (unsigned long long)opt->repair->gen);
		return -EIO;
	}
	if (get64(s.blocks) << get32(s.block_shift) > im->bytes) {
		snprintf(msg, msg_len, "the image was cut short: %llu bytes of %llu",
			 (unsigned long long)im->bytes,
			 (unsigned long long)(get64(s.blocks)
					      << get32(s.block_shift)));
		return -EFSCORRUPTED;
	}
	if (!opt->readonly && get64(s.ro_compat) & ~FEATURES_RO_COMPAT) {
		snprintf(msg, msg_len, "an unknown feature allows read-only "
			 "mounts alone");
		return -EPROTONOSUPPORT;
	}
	r = volume_new(im, opt, &s, slot, &v);
	if (!v)
		return r;
	v->own_heart.before = holder;
	v->own_heart.before_known = known;
	if (r == 0)
		r = journal_scan(v, msg, msg_len);
	if (r == 0)
		r = opt->readonly ? open_ro(v) : open_rw(v, msg, msg_len);
	if (r) {
		if (msg_len && !*msg)
			snprintf(msg, msg_len, "cannot be opened: %s",
				 strerror(-r));
		volume_abandon(v);
		return r;
	}
	*out = v;
	return 0;
}

void volume_abandon(struct volume *v)
{
	timer_stop(v);
	mmp_stop(v);
	volume_free(v);
}

int volume_close(struct volume *v)
{
	int r = 0;

	timer_stop(v);
	if (!v->readonly) {
		r = atomic_load(&v->failed) ? -EIO : mmp_write(v, MMP_CLOSING);
		if (r == 0)
			inodes_evict_late(v);
		if (r == 0)
			r = volume_sync(v);
		/* What this session freed, then the state that is clean. */
		if (r == 0 && atomic_load(&v->pending_blks) >
				      atomic_load(&v->pending_own))
			r = checkpoint_run(v, false);
		if (r == 0 && v->opt.discard && atomic_load(&v->trim_due))
			volume_trim(v, 0, v->blocks, DISCARD_BYTES >> v->shift,
				    NULL);
		if (r == 0)
			r = checkpoint_run(v, true);
	}
	mmp_stop(v);
	if (!v->readonly && !atomic_load(&v->failed) &&
	    mmp_write(v, MMP_FREE) == -EBUSY)
		r = -EBUSY;
	volume_free(v);
	return r;
}

/* ---- calls ------------------------------------------------------------------------------- */

int volume_sync_to(struct volume *v, uint64_t seq)
{
	if (v->readonly)
		return 0;
	if (atomic_load(&v->failed))
		return -EIO;
	return journal_write(v, seq, true);
}

int volume_sync(struct volume *v)
{
	return volume_sync_to(v, v->readonly ? 0 : last_seq(v));
}

int volume_checkpoint(struct volume *v)
{
	return v->readonly ? -EROFS : checkpoint_run(v, false);
}

/*
 * Punch free blocks from `start` on, at most n. They are ours meanwhile. Where
 * somebody has taken some of them, fewer; 0 if the first is not to be had.
 */
static int punch_some(struct volume *v, uint64_t start, uint64_t *n)
{
	int r = 0;

	lock_lock(&v->punch);
	while (*n && alloc_exact(v->alloc, start, *n))
		*n /= 2;
	if (*n) {
		r = space_discard(v, start, *n);
		alloc_free(v->alloc, start, *n);
	}
	lock_unlock(&v->punch);
	return r;
}

/* A few at a time, so that nobody waits long for them. */
static int punch_run(struct volume *v, uint64_t start, uint64_t end,
		     uint64_t *done)
{
	uint64_t most = DISCARD_PIECE_BYTES >> v->shift;
	int r = 0;

	if (most > v->blocks / 16 + 1)
		most = v->blocks / 16 + 1;
	while (r == 0 && start < end) {
		uint64_t n = end - start < most ? end - start : most;

		/* All that is free is promised: none is to be had at all. */
		if (n > alloc_free_units(v->alloc))
			n = alloc_free_units(v->alloc);
		if (!n)
			break;
		r = punch_some(v, start, &n);
		*done += n;
		start += n ? n : 1;
	}
	return r;
}

int volume_trim(struct volume *v, uint64_t from, uint64_t to, uint64_t min_blks,
		uint64_t *done_blks)
{
	uint64_t done = 0;
	struct extent e;
	int r = v->alloc ? 0 : -EROFS;

	while (r == 0 && from < to) {
		uint64_t start, end;

		r = alloc_next_free(v->alloc, from, &e);
		if (r || e.start >= to)
			break;
		/* A run is told from its start, which may lie before. */
		start = e.start > from ? e.start : from;
		end = e.start + e.len < to ? e.start + e.len : to;
		if (end - start >= min_blks)
			r = punch_run(v, start, end, &done);
		from = end;
	}
	if (done_blks)
		*done_blks = done;
	return r == -ENOENT ? 0 : r;
}

void volume_stat(struct volume *v, struct volume_stat *out)
{
	uint64_t own;

	memset(out, 0, sizeof(*out));
	out->blocks = v->blocks;
	out->block_bytes = v->block_bytes;
	rwlock_read(&v->commit);
	out->inodes = v->inodes;
	out->aside_blks = v->aside;
	out->gen = v->gen;
	out->cache_bytes = v->cached * (v->block_bytes + sizeof(struct node));
	out->absent_blks = own = space_absent_locked(v);
	if (v->alloc) {
		out->free_blks = atomic_load(&v->free_blks);
		own = v->pool_floor + atomic_load(&v->reserve_held);
	} else {
		out->free_blks = get64(v->super.free_blks);
		for (size_t i = 0; i < v->deltas.count; i++)
			out->free_blks += v->deltas.v[i].free
						  ? v->deltas.v[i].len
						  : -v->deltas.v[i].len;
	}
	out->mounts = get32(v->super.mounts);
	memcpy(out->uuid, v->super.uuid, sizeof(out->uuid));
	memcpy(out->label, v->super.label, sizeof(out->label));
	rwlock_unlock(&v->commit);
	out->pending_blks = atomic_load(&v->pending_blks);
	out->avail_blks = out->free_blks > own ? out->free_blks - own : 0;
	if (out->absent_blks > out->free_blks)
		out->absent_blks = out->free_blks;
	out->free_blks -= out->absent_blks;
	out->journal_units = v->ring_units;
	out->journal_used = (v->ring_room - (uint64_t)atomic_load(&v->ring_free)) /
			    JOURNAL_UNIT;
	out->cache_limit = v->opt.cache_bytes;
	out->dirty_bytes = atomic_load(&v->dirty_nodes) * v->block_bytes;
	out->commits = atomic_load(&v->n_commits);
	out->groups = atomic_load(&v->n_groups);
	out->flushes = atomic_load(&v->n_flushes);
	out->checkpoints = atomic_load(&v->n_checkpoints);
	out->replayed_groups = v->replayed_groups;
	out->readonly = volume_readonly(v);
	out->failed = atomic_load(&v->failed) != 0;
	out->was_clean = v->was_clean;
}

unsigned volume_block_shift(const struct volume *v) { return v->shift; }

bool volume_readonly(const struct volume *v)
{
	return v->readonly || atomic_load(&v->failed);
}

struct alloc *volume_alloc(struct volume *v) { return v->alloc; }

struct image *volume_image(struct volume *v) { return v->im; }

const struct disk_super *volume_super(const struct volume *v) { return &v->super; }

unsigned volume_fixed(struct volume *v, struct extent out[8])
{
	return fixed_blocks(&v->super, out);
}
