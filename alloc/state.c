/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The state file of a program that has no volume.
 *
 * A save is one point in time: with the world stopped the epoch moves on, and
 * from then on whoever changes a chunk for the first time keeps an image of
 * it. The save collects images, or chunks nobody changed, one at a time, while
 * others go on. Its steps, and what a crash in each leaves:
 *
 *  1. Write all to PATH.tmp, fsync it.		PATH as it was
 *  2. Unlink PATH.old; link PATH as PATH.old.	PATH, with or without .old
 *  3. Rename PATH.tmp to PATH.			the new one, or as in 2
 *  4. fsync the directory; then the save is durable.
 *
 * So there always is a whole PATH, and after damage to it the one before. When
 * PATH was found damaged, step 2 is left out: PATH.old is what there is.
 *
 * The file: struct disk_state, then records until `payload_bytes` are over.
 * Numbers in records are unsigned LEB128, of at most ten bytes. A record:
 *
 *	skip		chunks that are wholly free, before those of the record
 *	kind		RECORD_FULL, RECORD_EDGES or RECORD_BITS
 *	FULL: count	so many full chunks
 *	EDGES: count, then as many differences	one chunk: where units in use
 *			begin and end, ascending, the first from 0 on
 *	BITS: ALLOC_CHUNK_BYTES	one chunk: a bit for each unit, set when in use
 *
 * Chunks after the last record are wholly free. So the file is in proportion
 * to what is in use, and never more than a bit for a unit and a little.
 */
#include "alloc/alloc_priv.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#define STATE_MAGIC "SWALLOC\1"
#define BUFFER_BYTES (1u << 18)
#define EDGES_MAX 512			/* more of them take more than bits */

struct disk_state {
	char magic[8];
	uint64_t units;
	uint64_t unit_bytes;
	uint64_t free_units;
	uint64_t payload_bytes;
	uint64_t payload_xxh3;
	uint64_t reserved;		/* zero */
	uint64_t header_xxh3;		/* of all before it */
};

_Static_assert(sizeof(struct disk_state) == 64, "on disk");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "as it is on disk");

enum { RECORD_FULL, RECORD_EDGES, RECORD_BITS };

struct saver {
	pthread_t thread;
	struct lock lock;		/* RANK_LEAF */
	pthread_cond_t wake;
	/* Under lock: */
	bool stop, due;
	char notice[PATH_MAX + 160];
	/* Under state_lock: */
	bool keep_old;			/* PATH is no good, PATH.old is */
	uint64_t calls;			/* atomic: since the last save */
};

/* -- Writing -- */

struct writer {
	int fd, err;
	unsigned char *buf;
	size_t used;
	uint64_t bytes, free;
	uint64_t skip, full;		/* chunks seen, free then full, that
					   are not written yet */
	XXH3_state_t *hash;
};

static void write_out(struct writer *w)
{
	size_t done = 0;

	XXH3_64bits_update(w->hash, w->buf, w->used);
	w->bytes += w->used;
	while (!w->err && done < w->used) {
		ssize_t n = write(w->fd, w->buf + done, w->used - done);

		if (n > 0)
			done += (size_t)n;
		else if (n == 0 || errno != EINTR)
			w->err = n ? -errno : -EIO;
	}
	w->used = 0;
}

/* Room for `n` bytes more. */
static unsigned char *write_room(struct writer *w, size_t n)
{
	unsigned char *at;

	if (w->used + n > BUFFER_BYTES)
		write_out(w);
	at = w->buf + w->used;
	w->used += n;
	return at;
}

static void write_number(struct writer *w, uint64_t n)
{
	do {
		*write_room(w, 1) = (unsigned char)((n & 0x7f) |
						    (n > 0x7f ? 0x80 : 0));
		n >>= 7;
	} while (n);
}

static void write_full(struct writer *w)
{
	if (!w->full)
		return;
	write_number(w, w->skip);
	write_number(w, RECORD_FULL);
	write_number(w, w->full);
	w->skip = w->full = 0;
}

static void write_record(struct writer *w, unsigned kind)
{
	write_full(w);
	write_number(w, w->skip);
	write_number(w, kind);
	w->skip = 0;
}

static void write_alike(struct writer *w, uint64_t count, bool free)
{
	if (free) {
		write_full(w);
		w->skip += count;
	} else {
		w->full += count;
	}
}

/* Free units of an image. Units that do not exist are in use. */
static uint32_t image_free(const struct chunk_image *im)
{
	uint32_t free = 0, from = 0;

	if (im->bits) {
		for (unsigned i = 0; i < ALLOC_CHUNK / 64; i++)
			free += 64u - (uint32_t)__builtin_popcountll(im->bits[i]);
		return free;
	}
	for (uint32_t i = 0; i < im->edges; i++) {
		if (i % 2 == 0)
			free += (uint32_t)im->edge[i] - from;
		from = (uint32_t)im->edge[i];
	}
	return im->edges % 2 ? free : free + ALLOC_CHUNK - from;
}

static void write_edges(struct writer *w, const struct chunk_image *im)
{
	uint32_t from = 0, at = 0;
	uint64_t flip = 0;

	write_record(w, RECORD_EDGES);
	write_number(w, im->edges);
	for (uint32_t i = 0; i < im->edges; i++, from = at, flip = ~flip) {
		if (!im->bits) {
			at = (uint32_t)im->edge[i];
		} else {
			uint64_t word = (im->bits[at / 64] ^ flip) &
					~0ull << at % 64;

			while (!word) {
				at = (at / 64 + 1) * 64;
				word = im->bits[at / 64] ^ flip;
			}
			at = at / 64 * 64 + (uint32_t)__builtin_ctzll(word);
		}
		write_number(w, at - from);
	}
}

static void write_image(struct writer *w, const struct chunk_image *im)
{
	w->free += image_free(im);
	if (im->edges == 0) {
		write_alike(w, 1, true);
	} else if (!im->bits && im->edges == 1 && !im->edge[0]) {
		write_alike(w, 1, false);
	} else if (!im->bits || im->edges <= EDGES_MAX) {
		write_edges(w, im);
	} else {
		write_record(w, RECORD_BITS);
		memcpy(write_room(w, ALLOC_CHUNK_BYTES), im->bits,
		       ALLOC_CHUNK_BYTES);
	}
}

static int write_chunk(struct alloc *a, struct writer *w, uint64_t index)
{
	struct chunk *c = chunks_peek(&a->chunks, index);
	struct chunk_image im;
	bool borrowed;
	struct op op;
	int err = 0;

	/* Must not fail: an image left behind would go into the next save. */
	op_enter_to_count(a, &op);
	latch_lock(&c->latch);
	chunk_save(&a->chunks, c, &im, &borrowed);
	if (borrowed && im.bits) {
		/* Out of the latch with it: writing may wait for the disk. */
		if (w->used + ALLOC_CHUNK_BYTES + 64 <= BUFFER_BYTES) {
			write_image(w, &im);
			im.bits = NULL;
			im.edges = UINT32_MAX;
		} else {
			uint64_t *copy = pool_get(&a->chunks.maps);

			if (copy)
				memcpy(copy, im.bits, ALLOC_CHUNK_BYTES);
			else
				err = -ENOMEM;
			im.bits = copy;
			borrowed = false;
		}
	}
	latch_unlock(&c->latch);
	op_leave(&op);
	if (!err && im.edges != UINT32_MAX)
		write_image(w, &im);
	if (!borrowed && im.bits)
		pool_put(&a->chunks.maps, im.bits);
	return err;
}

/* Everything as it is now, behind the header that comes last. */
static int write_state(struct alloc *a, struct writer *w)
{
	struct disk_state head = { .unit_bytes = a->cfg.unit_bytes };
	enum chunks_saved what;
	uint64_t index, count;
	bool free;
	struct op op;
	int err = 0;

	if (lseek(w->fd, sizeof(head), SEEK_SET) < 0)
		return -errno;
	err = op_enter_world(a, &op);
	if (err)
		return err;
	chunks_save_begin(&a->chunks);
	op_leave(&op);
	head.units = a->units;
	/* To the end even after an error: images must not stay behind. */
	while ((what = chunks_save_next(&a->chunks, &index, &count, &free))) {
		if (what == SAVED_STRUCT) {
			int e = write_chunk(a, w, index);

			err = err ? err : e;
			continue;
		}
		write_alike(w, count, free);
		if (free)
			w->free += min_u64(count * ALLOC_CHUNK,
					   head.units - index * ALLOC_CHUNK);
	}
	write_full(w);
	write_out(w);
	if (err || w->err)
		return err ? err : w->err;
	memcpy(head.magic, STATE_MAGIC, sizeof(head.magic));
	head.free_units = w->free;
	head.payload_bytes = w->bytes;
	head.payload_xxh3 = XXH3_64bits_digest(w->hash);
	head.header_xxh3 = XXH3_64bits(&head, offsetof(struct disk_state,
						       header_xxh3));
	if (pwrite(w->fd, &head, sizeof(head), 0) != sizeof(head))
		return errno ? -errno : -EIO;
	return 0;
}

static int write_file(struct alloc *a, const char *path)
{
	struct writer w = { .fd = open(path, O_WRONLY | O_CREAT | O_TRUNC |
					      O_CLOEXEC, 0666) };
	int err;

	if (w.fd < 0)
		return -errno;
	w.buf = malloc(BUFFER_BYTES);
	w.hash = XXH3_createState();
	if (w.buf && w.hash) {
		XXH3_64bits_reset(w.hash);
		err = write_state(a, &w);
	} else {
		err = -ENOMEM;
	}
	if (!err && fsync(w.fd))
		err = -errno;
	if (close(w.fd) && !err)
		err = -errno;
	free(w.buf);
	XXH3_freeState(w.hash);
	return err;
}

static int sync_directory(const char *path)
{
	char copy[PATH_MAX];
	int fd, err = 0;

	snprintf(copy, sizeof(copy), "%s", path);
	fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	if (fsync(fd))
		err = -errno;
	close(fd);
	return err;
}

static int replace_file(const char *path, const char *tmp, const char *old,
			bool keep_old)
{
	if (!keep_old && unlink(old) && errno != ENOENT)
		return -errno;
	/* The first save has none; some file systems know no links. */
	if (!keep_old && link(path, old) && errno != ENOENT && errno != EPERM &&
	    errno != EOPNOTSUPP)
		return -errno;
	if (rename(tmp, path))
		return -errno;
	return sync_directory(path);
}

int state_save(struct alloc *a)
{
	const char *path = a->cfg.state_path;
	char tmp[PATH_MAX], old[PATH_MAX];
	int err;

	lock_lock(&a->state_lock);
	__atomic_store_n(&a->saver->calls, 0, __ATOMIC_RELAXED);
	snprintf(tmp, sizeof(tmp), "%s.tmp", path);
	snprintf(old, sizeof(old), "%s.old", path);
	err = write_file(a, tmp);
	if (!err)
		err = replace_file(path, tmp, old, a->saver->keep_old);
	else
		unlink(tmp);
	if (!err) {
		struct op op;

		a->saver->keep_old = false;
		op_enter_to_count(a, &op);
		op.sh->n.saves++;
		op_leave(&op);
	}
	lock_unlock(&a->state_lock);
	return err;
}

/* -- Reading -- */

struct reader {
	const unsigned char *at, *end;
	uint64_t count, chunk;		/* chunks of the space, and come to */
};

static bool read_number(struct reader *r, uint64_t *out)
{
	uint64_t n = 0;

	for (unsigned shift = 0; shift < 64 && r->at < r->end; shift += 7) {
		unsigned char byte = *r->at++;

		if (shift == 63 && byte > 1)
			return false;
		n |= (uint64_t)(byte & 0x7f) << shift;
		if (!(byte & 0x80)) {
			*out = n;
			return true;
		}
	}
	return false;
}

static bool read_edges(struct reader *r, uint64_t *bits)
{
	uint64_t count, n, at = 0, from = 0;

	if (!read_number(r, &count) || !count || count > EDGES_MAX)
		return false;
	memset(bits, 0, ALLOC_CHUNK_BYTES);
	for (uint64_t i = 0; i <= count; i++) {
		if (i == count)
			n = ALLOC_CHUNK - at;
		else if (!read_number(r, &n) || (i && !n) ||
			 n >= ALLOC_CHUNK - at)
			return false;
		at += n;
		for (; i % 2 && from < at; from++)
			bits[from / 64] |= 1ull << from % 64;
		from = at;
	}
	return true;
}

/*
 * One record: `bits` of a chunk (*count 0), or *count full chunks. r->chunk is
 * the first; *skipped are free before it.
 */
static bool read_record(struct reader *r, uint64_t *bits, uint64_t *skipped,
			uint64_t *count)
{
	uint64_t kind;

	*count = 0;
	if (!read_number(r, skipped) || *skipped >= r->count - r->chunk ||
	    !read_number(r, &kind))
		return false;
	r->chunk += *skipped;
	switch (kind) {
	case RECORD_FULL:
		return read_number(r, count) && *count &&
		       *count <= r->count - r->chunk;
	case RECORD_EDGES:
		return read_edges(r, bits);
	case RECORD_BITS:
		if (r->end - r->at < (ptrdiff_t)ALLOC_CHUNK_BYTES)
			return false;
		memcpy(bits, r->at, ALLOC_CHUNK_BYTES);
		r->at += ALLOC_CHUNK_BYTES;
		return true;
	default:
		return false;
	}
}

static uint64_t exist_in(const struct alloc *a, uint64_t chunk, uint64_t count)
{
	return min_u64(count * ALLOC_CHUNK, a->units - chunk * ALLOC_CHUNK);
}

/* Free units of `bits`, as far as they exist. */
static uint64_t bits_free(const uint64_t *bits, uint64_t exist)
{
	uint64_t free = 0;

	for (unsigned i = 0; i < ALLOC_CHUNK / 64 && i * 64 < exist; i++) {
		uint64_t word = ~bits[i];

		if (exist - i * 64 < 64)
			word &= ~0ull >> (64 - (exist - i * 64));
		free += (uint64_t)__builtin_popcountll(word);
	}
	return free;
}

/*
 * Go through all records: `apply` them, or only see whether they make sense;
 * -EUCLEAN when they do not. *free_units: what they come to.
 */
static int read_records(struct alloc *a, struct reader r, bool apply,
			uint64_t *free_units)
{
	uint64_t free = 0, skipped, count;
	int err = 0;

	while (!err && r.at < r.end) {
		uint64_t *bits = pool_get(&a->chunks.maps);
		uint64_t before = r.chunk;

		if (!bits)
			return -ENOMEM;
		if (r.chunk >= r.count ||
		    !read_record(&r, bits, &skipped, &count)) {
			pool_put(&a->chunks.maps, bits);
			return -EUCLEAN;
		}
		free += skipped * ALLOC_CHUNK;
		if (!count)
			free += bits_free(bits, exist_in(a, r.chunk, 1));
		if (apply && skipped)
			err = load_alike(a, before, skipped, true);
		if (apply && !err && !count) {
			err = load_adopt(a, r.chunk, bits, UINT32_MAX);
			bits = NULL;
		}
		if (apply && !err && count)
			err = load_alike(a, r.chunk, count, false);
		if (bits)
			pool_put(&a->chunks.maps, bits);
		r.chunk += count ? count : 1;
	}
	if (!err && r.chunk < r.count) {
		free += exist_in(a, r.chunk, r.count - r.chunk);
		if (apply)
			err = load_alike(a, r.chunk, r.count - r.chunk, true);
	}
	*free_units = free;
	return err;
}

/* The whole file, malloc'ed. -ENOENT when there is none. */
static int read_file(const char *path, unsigned char **data, size_t *bytes)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC), err = 0;
	struct stat st;
	size_t done = 0;

	if (fd < 0)
		return -errno;
	*data = NULL;
	if (fstat(fd, &st))
		err = -errno;
	else if (!(*data = malloc((size_t)st.st_size + 1)))
		err = -ENOMEM;
	while (!err && done < (size_t)st.st_size) {
		ssize_t n = read(fd, *data + done, (size_t)st.st_size - done);

		if (n > 0)
			done += (size_t)n;
		else if (n == 0)
			break;
		else if (errno != EINTR)
			err = -errno;
	}
	close(fd);
	if (err)
		free(*data);
	*bytes = done;
	return err;
}

/* What is wrong with the header, or the payload as a whole; or NULL. */
static const char *verify_sums(const unsigned char *data, size_t bytes,
			       struct disk_state *head)
{
	if (bytes < sizeof(*head))
		return "it is cut short";
	memcpy(head, data, sizeof(*head));
	if (memcmp(head->magic, STATE_MAGIC, sizeof(head->magic)))
		return "it is no state file";
	if (XXH3_64bits(head, offsetof(struct disk_state, header_xxh3)) !=
	    head->header_xxh3)
		return "the checksum of its header does not match";
	if (head->payload_bytes != bytes - sizeof(*head))
		return "it is not as long as it says";
	if (XXH3_64bits(data + sizeof(*head), bytes - sizeof(*head)) !=
	    head->payload_xxh3)
		return "its checksum does not match";
	return NULL;
}

/*
 * -EUCLEAN and *why when the file is damaged, -EINVAL when it is of another
 * space; or -ENOMEM, which says nothing about the file.
 */
static int verify(struct alloc *a, const unsigned char *data, size_t bytes,
		  struct reader *r, const char **why)
{
	struct disk_state head;
	uint64_t free_units;
	int err;

	*why = verify_sums(data, bytes, &head);
	if (*why)
		return -EUCLEAN;
	if (head.units != a->units || head.unit_bytes != a->cfg.unit_bytes)
		return -EINVAL;
	*r = (struct reader){ data + sizeof(head), data + bytes,
			      a->chunks.count, 0 };
	err = read_records(a, *r, false, &free_units);
	if (!err && free_units != head.free_units)
		err = -EUCLEAN;
	if (err == -EUCLEAN)
		*why = "its records contradict each other";
	return err;
}

/* Read `path` into the space. *why: what is wrong when it is damaged. */
static int read_state(struct alloc *a, const char *path, const char **why)
{
	struct reader r;
	unsigned char *data = NULL;
	size_t bytes = 0;
	int err = read_file(path, &data, &bytes);

	*why = NULL;
	if (err)
		return err;
	err = verify(a, data, bytes, &r, why);
	if (!err)
		err = read_records(a, r, true, &a->pool);
	if (!err)
		a->cursor = a->source_chunks;
	free(data);
	return err;
}

static int read_either(struct alloc *a)
{
	const char *path = a->cfg.state_path, *why, *why_old;
	char old[PATH_MAX];
	int err = read_state(a, path, &why), err_old;

	if (err != -ENOENT && err != -EUCLEAN)
		return err;
	snprintf(old, sizeof(old), "%s.old", path);
	err_old = read_state(a, old, &why_old);
	if (err == -ENOENT && err_old == -ENOENT)
		return load_more(a);	/* a new space */
	if (err_old)
		return err_old == -ENOENT ? err : err_old;
	snprintf(a->saver->notice, sizeof(a->saver->notice),
		 "state file '%s' is %s%s; the one before it was used", path,
		 why ? "damaged: " : "missing", why ? why : "");
	a->saver->keep_old = true;
	return 0;
}

/* -- The saver -- */

void state_count_call(struct alloc *a)
{
	struct saver *s = a->saver;

	if (a->cfg.operation_threshold == UINT32_MAX ||
	    atomic_add(&s->calls, 1) != a->cfg.operation_threshold)
		return;
	lock_lock(&s->lock);
	s->due = true;
	pthread_cond_signal(&s->wake);
	lock_unlock(&s->lock);
}

static void *saver_run(void *arg)
{
	struct alloc *a = arg;
	struct saver *s = a->saver;
	uint32_t interval = a->cfg.backup_interval_s;

	lock_lock(&s->lock);
	while (!s->stop) {
		struct timespec until;
		int err = 0;

		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_sec += interval;
		while (!s->stop && !s->due && err != ETIMEDOUT) {
			if (interval == UINT32_MAX)
				lock_wait(&s->lock, &s->wake);
			else
				err = pthread_cond_timedwait(&s->wake,
							     &s->lock.m, &until);
		}
		if (s->stop)
			break;
		s->due = false;
		lock_unlock(&s->lock);
		err = state_save(a);
		lock_lock(&s->lock);
		if (err)
			snprintf(s->notice, sizeof(s->notice),
				 "cannot save state file '%s': %s",
				 a->cfg.state_path, strerror(-err));
		else
			s->notice[0] = 0;
	}
	lock_unlock(&s->lock);
	return NULL;
}

static void saver_free(struct alloc *a)
{
	pthread_cond_destroy(&a->saver->wake);
	lock_fini(&a->saver->lock);
	free(a->saver);
	a->saver = NULL;
}

int state_open(struct alloc *a)
{
	int err;

	if (strlen(a->cfg.state_path) > PATH_MAX - 8)
		return -ENAMETOOLONG;
	a->saver = calloc(1, sizeof(*a->saver));
	if (!a->saver)
		return -ENOMEM;
	lock_init(&a->saver->lock, RANK_LEAF, "saver");
	pthread_cond_init(&a->saver->wake, NULL);
	err = read_either(a);
	if (!err)
		err = -pthread_create(&a->saver->thread, NULL, saver_run, a);
	if (err)
		saver_free(a);
	return err;
}

int state_close(struct alloc *a)
{
	int err;

	lock_lock(&a->saver->lock);
	a->saver->stop = true;
	pthread_cond_signal(&a->saver->wake);
	lock_unlock(&a->saver->lock);
	pthread_join(a->saver->thread, NULL);
	err = state_save(a);
	saver_free(a);
	return err;
}

const char *alloc_notice(const struct alloc *a)
{
	return a->saver ? a->saver->notice : "";
}
