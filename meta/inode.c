/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Inodes in memory, and how inodes come and go.
 *
 * An inode in memory is a copy of its item, made when somebody first asks and
 * kept while referenced; some that are not are kept too, the least recently
 * used go first. A number is in the table at most once, so the lock in it is
 * the inode's lock. While one is being read it is in the table already, and
 * others wait for it: so a copy can never be older than the item.
 *
 * An orphan has no name but may be in use; its item in TABLE_REFS makes it
 * known to the next mount. Evicting it cuts its map, in as many transactions as
 * that takes, and removes what is left with the last one.
 */
#include "meta/meta_priv.h"

#include <stdlib.h>
#include <sys/stat.h>


/* ---- the table --------------------------------------------------------------------- */

static struct inode **islot(struct volume *v, uint64_t ino)
{
	struct inode **p =
		&v->ihash[(ino * 0x9e3779b97f4a7c15ull >> 20) & v->ihash_mask];

	while (*p && (*p)->ino != ino)
		p = &(*p)->next;
	return p;
}

static void lru_del(struct volume *v, struct inode *ip)
{
	*(ip->lru_prev ? &ip->lru_prev->lru_next : &v->lru_head) = ip->lru_next;
	*(ip->lru_next ? &ip->lru_next->lru_prev : &v->lru_tail) = ip->lru_prev;
	v->iunused--;
}

static void lru_add(struct volume *v, struct inode *ip)
{
	ip->lru_prev = NULL;
	ip->lru_next = v->lru_head;
	*(v->lru_head ? &v->lru_head->lru_prev : &v->lru_tail) = ip;
	v->lru_head = ip;
	v->iunused++;
}

static void inode_unhash(struct volume *v, struct inode *ip)
{
	struct inode **p = islot(v, ip->ino);

	if (*p == ip) {
		*p = ip->next;
		v->icount--;
	}
}

static void inode_free(struct inode *ip)
{
	rwlock_fini(&ip->lock);
	free(ip);
}

static void icache_shrink(struct volume *v)
{
	while (v->icount > v->ilimit && v->lru_tail) {
		struct inode *ip = v->lru_tail;

		lru_del(v, ip);
		inode_unhash(v, ip);
		inode_free(ip);
	}
}

static struct inode *inode_new(uint64_t ino)
{
	struct inode *ip = calloc(1, sizeof(*ip));

	if (!ip)
		return NULL;
	ip->ino = ino;
	ip->refs = 1;
	ip->goal = ALLOC_NO_GOAL;
	rwlock_init(&ip->lock, RANK_INODE, "inode");
	return ip;
}

static void inode_hash(struct volume *v, struct inode *ip)
{
	struct inode **p = islot(v, ip->ino);

	ip->next = NULL;
	*p = ip;
	v->icount++;
}

/* Was a cut of its map left unfinished, by an error on the way? */
static int intent_exists(struct volume *v, uint64_t ino, bool *exists)
{
	struct disk_intent d;
	struct key k;
	size_t len;
	int r;

	key_refs(&k, KEY_INTENT, ino);
	r = tree_lookup(v, TABLE_REFS, k.b, k.len, &d, sizeof(d), &len);
	*exists = r == 0;
	return r == -ENOENT ? 0 : r;
}

static int inode_load(struct volume *v, struct inode *ip)
{
	struct disk_inode d;
	struct key k;
	size_t len;
	int r;

	key_file(&k, ip->ino, KEY_INODE);
	r = tree_lookup(v, TABLE_FILES, k.b, k.len, &d, sizeof(d), &len);
	if (r == -ENOENT)
		return -ESTALE;
	if (r)
		return r;
	if (len != sizeof(d)) {
		volume_message(v, "inode %llu: item of %zu bytes",
			       (unsigned long long)ip->ino, len);
		return -EFSCORRUPTED;
	}
	attr_decode(&d, &ip->a);
	return intent_exists(v, ip->ino, &ip->unfinished);
}

/* The inode if it is in memory, waited for and referenced. */
static struct inode *inode_find_locked(struct volume *v, uint64_t ino)
{
	struct inode *ip;

	while ((ip = *islot(v, ino)) && ip->loading)
		lock_wait(&v->icache, &v->icache_loaded);
	if (ip && ip->refs++ == 0)
		lru_del(v, ip);
	return ip;
}

int inode_get(struct volume *v, uint64_t ino, struct inode **out)
{
	struct inode *ip;
	int r;

	lock_lock(&v->icache);
	ip = inode_find_locked(v, ino);
	if (ip) {
		lock_unlock(&v->icache);
		*out = ip;
		return 0;
	}
	ip = inode_new(ino);
	if (!ip) {
		lock_unlock(&v->icache);
		return -ENOMEM;
	}
	ip->loading = true;
	inode_hash(v, ip);
	lock_unlock(&v->icache);

	r = inode_load(v, ip);

	lock_lock(&v->icache);
	ip->loading = false;
	pthread_cond_broadcast(&v->icache_loaded);
	if (r)
		inode_unhash(v, ip);
	else
		icache_shrink(v);
	lock_unlock(&v->icache);
	if (r) {
		inode_free(ip);
		return r;
	}
	*out = ip;
	return 0;
}

void inode_put(struct volume *v, struct inode *ip)
{
	bool gone = false;

	lock_lock(&v->icache);
	if (--ip->refs == 0) {
		gone = ip->dead;
		if (gone)
			inode_unhash(v, ip);
		else
			lru_add(v, ip);
		icache_shrink(v);
	}
	lock_unlock(&v->icache);
	if (gone)
		inode_free(ip);
}

int icache_init(struct volume *v)
{
	size_t buckets = 1024;

	lock_init(&v->icache, RANK_ICACHE, "inodes");
	pthread_cond_init(&v->icache_loaded, NULL);
	v->ilimit = v->opt.cache_bytes / 8 / (sizeof(struct inode) + 32);
	if (v->ilimit < 128)
		v->ilimit = 128;
	while (buckets < v->ilimit)
		buckets *= 2;
	v->ihash_mask = buckets - 1;
	v->ihash = calloc(buckets, sizeof(*v->ihash));
	return v->ihash ? 0 : -ENOMEM;
}

void icache_fini(struct volume *v)
{
	for (size_t i = 0; v->ihash && i <= v->ihash_mask; i++)
		while (v->ihash[i]) {
			struct inode *ip = v->ihash[i];

			v->ihash[i] = ip->next;
			inode_free(ip);
		}
	free(v->ihash);
	free(v->late);
	lock_fini(&v->icache);
	pthread_cond_destroy(&v->icache_loaded);
}

/* ---- coming ---------------------------------------------------------------------------- */

static int last_ino(void *ctx, const uint8_t *key, size_t klen,
		    const uint8_t *val, size_t vlen)
{
	(void)val;
	(void)vlen;
	if (klen >= 8)
		*(uint64_t *)ctx = be64_get(key);
	return 1;
}

int inodes_skip_used(struct volume *v)
{
	struct key min, end;
	uint64_t last = 0;
	int r;

	key_file(&min, 0, 0);
	key_file(&end, INO_MAX + 1, 0);
	r = tree_range_floor(v, TABLE_FILES, &min, &end, &end, last_ino, &last);
	if (last >= atomic_load(&v->next_ino))
		atomic_store(&v->next_ino, last + 1);
	return r == -ENOMEM ? r : 0;
}

int inode_create(struct txn *t, const struct attr *a, struct inode **out)
{
	struct volume *v = t->v;
	uint64_t ino = atomic_fetch_add(&v->next_ino, 1);
	struct inode *ip;

	if (ino > INO_MAX) {
		atomic_store(&v->next_ino, INO_MAX + 1);
		return -ENOSPC;
	}
	ip = inode_new(ino);
	if (!ip)
		return -ENOMEM;
	ip->a = *a;
	if (S_ISDIR(a->mode) && a->next_index < FIRST_INDEX)
		ip->a.next_index = FIRST_INDEX;
	rwlock_write_nested(&ip->lock, true);
	lock_lock(&v->icache);
	inode_hash(v, ip);
	lock_unlock(&v->icache);
	inode_edit(t, ip);
	t->edit[t->edits - 1].created = true;
	*out = ip;
	return 0;
}

/* The transaction that would have made it was aborted. */
void inode_drop_dead(struct volume *v, struct inode *ip)
{
	(void)v;
	ip->dead = true;
}

/* ---- orphans ------------------------------------------------------------------------------ */

int orphan_add(struct txn *t, const struct inode *ip)
{
	struct key k;

	key_refs(&k, KEY_ORPHAN, ip->ino);
	return txn_put(t, TABLE_REFS, &k, "", 0);
}

int orphan_remove(struct txn *t, const struct inode *ip)
{
	struct key k;

	key_refs(&k, KEY_ORPHAN, ip->ino);
	return txn_del(t, TABLE_REFS, &k);
}

struct remove {
	struct txn *t;
	unsigned left;		/* items that still find room */
	bool more;
	struct key key[32];
};

static int remove_collect(void *ctx, const uint8_t *key, size_t klen,
			  const uint8_t *val, size_t vlen)
{
	struct remove *rm = ctx;
	struct key *k;

	(void)val;
	(void)vlen;
	if (rm->left == sizeof(rm->key) / sizeof(rm->key[0])) {
		rm->more = true;
		return 1;
	}
	k = &rm->key[rm->left++];
	memcpy(k->b, key, klen);
	k->len = (uint16_t)klen;
	return 0;
}

/* Remove items of the inode in [lo, hi) until the transaction is full. */
static int items_remove(struct txn *t, const struct key *lo, const struct key *hi,
			bool *done)
{
	struct remove rm = {.t = t};
	struct key from = *lo;
	int r;

	for (;;) {
		rm.left = 0;
		rm.more = false;
		r = tree_range(t->v, TABLE_FILES, &from, hi, remove_collect, &rm);
		if (r < 0)
			return r;
		for (unsigned i = 0; i < rm.left; i++) {
			if (!txn_has_room(t, 4) || txn_cuts_enough(t)) {
				*done = false;
				return 0;
			}
			r = txn_del(t, TABLE_FILES, &rm.key[i]);
			if (r)
				return r;
		}
		if (!rm.more) {
			*done = true;
			return 0;
		}
		/* Behind the last one removed. */
		from = rm.key[rm.left - 1];
		from.b[from.len++] = 0;
	}
}

/* One transaction's worth of eviction; *done when nothing is left. */
static int evict_step(struct volume *v, struct inode *ip, bool *done)
{
	struct txn *t;
	struct key lo, hi;
	bool all = false;
	uint64_t blks = ip->a.blks;
	int r = txn_begin(v, TXN_FREEING, &t);

	if (r)
		return r;
	*done = false;
	if (ip->a.blks) {
		r = map_cut(t, ip, 0, UINT64_MAX);
	} else {
		/* Everything but the inode itself, then that too. */
		key_file(&lo, ip->ino, KEY_INODE);
		lo.b[lo.len++] = 0;
		key_file(&hi, ip->ino + 1, 0);
		r = items_remove(t, &lo, &hi, &all);
		if (r == 0 && all) {
			key_file(&lo, ip->ino, KEY_INODE);
			r = txn_del(t, TABLE_FILES, &lo);
			if (r == 0)
				r = orphan_remove(t, ip);
		}
	}
	if (r) {
		txn_abort(t);
		return r;
	}
	r = txn_commit(t);
	if (r == 0 && all)
		*done = true;
	if (r == 0)
		r = map_finish(v, ip);
	if (r == 0 && blks && ip->a.blks >= blks) {
		volume_message(v, "inode %llu: its map does not hold the %llu "
			       "blocks it counts", (unsigned long long)ip->ino,
			       (unsigned long long)blks);
		r = -EFSCORRUPTED;
	}
	return r;
}

static int evict(struct volume *v, uint64_t ino)
{
	struct inode *ip;
	bool done = false;
	int r = inode_get(v, ino, &ip);

	if (r)
		return r;
	rwlock_write(&ip->lock);
	if (ip->dead)
		r = -ESTALE;
	else if (ip->a.nlink)
		r = -EBUSY;
	/* An intent must not outlive its inode: no volume opens with one that does. */
	if (r == 0)
		r = map_finish(v, ip);
	while (r == 0 && !done)
		r = evict_step(v, ip, &done);
	if (done)
		ip->dead = true;
	rwlock_unlock(&ip->lock);
	inode_put(v, ip);
	return r;
}

/* The host is full, or memory is short: the timer comes back for it. */
static void evict_later(struct volume *v, uint64_t ino)
{
	lock_lock(&v->icache);
	if (v->late_count == v->late_cap) {
		size_t cap = v->late_cap * 2 + 64;
		void *p = realloc(v->late, cap * sizeof(*v->late));

		if (p) {
			v->late = p;
			v->late_cap = cap;
		}
	}
	if (v->late_count < v->late_cap)
		v->late[v->late_count++] = ino;
	/* else it is an orphan until the next mount */
	lock_unlock(&v->icache);
	volume_arm(v);
}

static bool short_of_room(int r)
{
	return r == -ENOSPC || r == -EDQUOT || r == -ENOMEM;
}

int inode_evict(struct volume *v, uint64_t ino)
{
	int r = evict(v, ino);

	if (short_of_room(r))
		evict_later(v, ino);
	return r;
}

size_t inodes_late(struct volume *v)
{
	size_t n;

	lock_lock(&v->icache);
	n = v->late_count;
	lock_unlock(&v->icache);
	return n;
}

void inodes_evict_late(struct volume *v)
{
	/* Those that fail again are put behind these. */
	for (size_t n = inodes_late(v); n; n--) {
		uint64_t ino;

		lock_lock(&v->icache);
		ino = v->late[0];
		memmove(v->late, v->late + 1, --v->late_count * sizeof(*v->late));
		lock_unlock(&v->icache);
		if (short_of_room(inode_evict(v, ino)))
			break;
	}
}

/* ---- what a crash cut off -------------------------------------------------------------------- */

static int first_number(void *ctx, const uint8_t *key, size_t klen,
			const uint8_t *val, size_t vlen)
{
	(void)val;
	(void)vlen;
	if (klen != 9)
		return -EFSCORRUPTED;
	*(uint64_t *)ctx = be64_get(key + 1);
	return 1;
}

/* For each number that has an item of `type`, in order. */
static int for_each(struct volume *v, enum refs_key type,
		    int (*fn)(struct volume *v, uint64_t ino))
{
	struct key lo, hi;
	uint64_t ino = 0;
	int r;

	for (;;) {
		key_refs(&lo, type, ino);
		key_refs(&hi, type + 1, 0);
		r = tree_range(v, TABLE_REFS, &lo, &hi, first_number, &ino);
		if (r <= 0)
			return r;
		r = fn(v, ino++);
		if (r)
			return r;
	}
}

static int finish_one(struct volume *v, uint64_t ino)
{
	struct inode *ip;
	int r = inode_get(v, ino, &ip);

	if (r)
		return r;
	rwlock_write(&ip->lock);
	r = map_finish(v, ip);
	rwlock_unlock(&ip->lock);
	inode_put(v, ip);
	/* Without room, whoever changes the inode next finishes it. */
	return short_of_room(r) ? 0 : r;
}

int intents_finish(struct volume *v)
{
	return for_each(v, KEY_INTENT, finish_one);
}

static int evict_or_later(struct volume *v, uint64_t ino)
{
	int r = inode_evict(v, ino);

	return short_of_room(r) ? 0 : r;
}

int orphans_evict(struct volume *v)
{
	return for_each(v, KEY_ORPHAN, evict_or_later);
}
