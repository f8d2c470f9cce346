/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A fuzz target: any bytes as a state file. state.c is compiled in here with
 * the file in memory and no disk below. The first byte says whether the header
 * is made to fit the rest, so that the fuzzer gets past checksums. What opens
 * must be a sound space, and must save.
 *
 * `make fuzz` builds it with clang's libFuzzer and runs it, `make check` with
 * main.c.
 */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static unsigned char *file;
static size_t file_len, file_at;

enum { FILE_IN = 3, FILE_OUT };

static int fuzz_open(const char *name, int flags, ...)
{
	file_at = 0;
	errno = ENOENT;
	if (flags & (O_CREAT | O_DIRECTORY))
		return FILE_OUT;
	return strcmp(name, "state") ? -1 : FILE_IN;
}

static ssize_t fuzz_read(int fd, void *buf, size_t n)
{
	(void)fd;
	n = n < file_len - file_at ? n : file_len - file_at;
	memcpy(buf, file + file_at, n);
	file_at += n;
	return (ssize_t)n;
}

static int fuzz_fstat(int fd, struct stat *st)
{
	(void)fd;
	st->st_size = (off_t)file_len;
	return 0;
}

#define open fuzz_open
#define read fuzz_read
#define fstat(fd, st) fuzz_fstat(fd, st)
#define close(fd) ((void)(fd), 0)
#define write(fd, buf, n) ((void)(fd), (void)(buf), (ssize_t)(n))
#define pwrite(fd, buf, n, at) ((void)(fd), (void)(buf), (ssize_t)(n))
#define lseek(fd, at, how) ((void)(fd), (off_t)(at))
#define fsync(fd) ((void)(fd), 0)
#define unlink(name) ((void)(name), 0)
#define link(from, to) ((void)(from), (void)(to), 0)
#define rename(from, to) ((void)(from), (void)(to), 0)
#include "alloc/state.c"
#undef read

#define UNITS (5 * (uint64_t)ALLOC_CHUNK + 100)

/* Make the header fit what follows it. */
static void seal(void)
{
	static struct alloc *a;		/* only asked how large it is */
	struct alloc_config cfg = { .units = UNITS, .shards = 1 };
	struct disk_state head = { .units = UNITS, .unit_bytes = 4096 };
	struct reader r = { file + sizeof(head), file + file_len, 0, 0 };

	if (!a && alloc_open(&cfg, NULL, 0, &a))
		abort();
	r.count = a->chunks.count;
	if (read_records(a, r, false, &head.free_units))
		head.free_units = 0;
	memcpy(head.magic, STATE_MAGIC, sizeof(head.magic));
	head.payload_bytes = file_len - sizeof(head);
	head.payload_xxh3 = XXH3_64bits(file + sizeof(head), head.payload_bytes);
	head.header_xxh3 = XXH3_64bits(&head, offsetof(struct disk_state,
						       header_xxh3));
	memcpy(file, &head, sizeof(head));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct alloc_config cfg = { .units = UNITS, .shards = 1,
				    .state_path = "state",
				    .backup_interval_s = UINT32_MAX,
				    .operation_threshold = UINT32_MAX };
	size_t head = size && data[0] % 8 ? sizeof(struct disk_state) : 0;
	char msg[200] = "";
	struct alloc *a;

	if (!size)
		return 0;
	file_len = head + size - 1;
	file = malloc(file_len + 1);
	memcpy(file + head, data + 1, size - 1);
	if (head)
		seal();
	if (!alloc_open(&cfg, NULL, 0, &a)) {
		if (alloc_check(a, msg, sizeof(msg))) {
			fprintf(stderr, "%s\n", msg);
			abort();
		}
		if (alloc_close(a))
			abort();
	}
	free(file);
	return 0;
}
