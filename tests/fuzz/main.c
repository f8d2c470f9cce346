/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A fuzz target without libFuzzer: for `make check`, and any compiler.
 *
 *   fuzz-TARGET [-t SECONDS] [INPUT]...
 *
 * runs each INPUT once: a file, all files of a folder, or all members of an
 * archive (ar(1), how the corpus lies in the tree). Without any the target
 * writes its own first ones. Then, for so many seconds, inputs that are made
 * of those at random (SEED=n).
 *
 * What runs is in the file "last" of the working folder (or LAST=FILE), so
 * it is there after a crash. An input that takes 60 seconds is a hang.
 */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define INPUT_MAX 9000u		/* as `make fuzz` has it */
#define HANG_S 60u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
/* Not every target has one. */
int LLVMFuzzerInitialize(int *argc, char ***argv) __attribute__((weak));

struct input {
	uint8_t *b;
	size_t len;
};

static struct input *inputs;
static size_t count, room;
static const char *last = "last";

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static void *must(void *p)
{
	if (!p)
		die("memory");
	return p;
}

/* ---- inputs ---------------------------------------------------------------------- */

static void input_add(const uint8_t *b, size_t len)
{
	if (count == room) {
		room = room ? 2 * room : 256;
		inputs = must(realloc(inputs, room * sizeof(*inputs)));
	}
	inputs[count] = (struct input){must(malloc(len + 1)), len};
	memcpy(inputs[count++].b, b, len);
}

#define AR_MAGIC "!<arch>\n"

/* Each member: 60 bytes of header, its length in decimal among them. */
static void archive_add(const uint8_t *b, size_t len)
{
	size_t at = 8, n;

	while (len - at >= 60) {
		char size[11] = "";

		memcpy(size, b + at + 48, 10);
		n = strtoul(size, NULL, 10);
		at += 60;
		if (n > len - at)
			break;
		/* Tables of names and symbols ("//", "/") are no inputs; "/" and a
		 * number is a long name. */
		if (b[at - 60] != '/' || (b[at - 59] >= '0' && b[at - 59] <= '9'))
			input_add(b + at, n);
		at += n + (n & 1);
		if (at > len)
			break;
	}
}

static void file_add(const char *path)
{
	FILE *f = fopen(path, "rb");
	uint8_t *b = NULL;
	size_t len = 0, cap = 0, n;

	if (!f)
		die(path);
	do {
		if (len == cap) {
			cap = cap ? 2 * cap : 65536;
			b = must(realloc(b, cap));
		}
		n = fread(b + len, 1, cap - len, f);
		len += n;
	} while (n);
	fclose(f);
	if (len >= 8 && !memcmp(b, AR_MAGIC, 8))
		archive_add(b, len);
	else
		input_add(b, len);
	free(b);
}

static void path_add(const char *path)
{
	struct dirent **names;
	char file[4096];
	struct stat st;
	int n;

	if (stat(path, &st))
		die(path);
	if (!S_ISDIR(st.st_mode)) {
		file_add(path);
		return;
	}
	n = scandir(path, &names, NULL, alphasort);
	if (n < 0)
		die(path);
	for (int i = 0; i < n; i++) {
		snprintf(file, sizeof(file), "%s/%s", path, names[i]->d_name);
		if (stat(file, &st) == 0 && S_ISREG(st.st_mode))
			file_add(file);
		free(names[i]);
	}
	free(names);
}

/* The target writes them and ends, so in a process of its own. */
static void first_ones(int *argc, char ***argv)
{
	char dir[] = "/tmp/fuzz-seeds-XXXXXX", cmd[64];
	int status;
	pid_t pid;

	if (!LLVMFuzzerInitialize) {
		input_add((const uint8_t *)"", 0);
		return;
	}
	if (!mkdtemp(dir))
		die(dir);
	pid = fork();
	if (pid < 0)
		die("fork");
	if (pid == 0) {
		setenv("FUZZ_SEEDS", dir, 1);
		LLVMFuzzerInitialize(argc, argv);
		_exit(1);
	}
	if (waitpid(pid, &status, 0) != pid || status) {
		fprintf(stderr, "fuzz: no first inputs\n");
		exit(2);
	}
	path_add(dir);
	snprintf(cmd, sizeof(cmd), "rm -rf %s", dir);
	if (system(cmd))
		die(cmd);
}

/* ---- running ----------------------------------------------------------------------- */

static void run(const uint8_t *b, size_t len)
{
	/* To the last byte: a reader beyond it is caught. */
	uint8_t *copy = must(malloc(len ? len : 1));
	FILE *f = fopen(last, "wb");

	if (!f || fwrite(b, 1, len, f) != len || fclose(f))
		die(last);
	memcpy(copy, b, len);
	alarm(HANG_S);
	LLVMFuzzerTestOneInput(copy, len);
	alarm(0);
	free(copy);
}

static uint64_t rng;

static uint64_t below(uint64_t n)
{
	uint64_t z = (rng += 0x9e3779b97f4a7c15ull);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return n ? (z ^ (z >> 31)) % n : 0;
}

/* A number such as lengths and places have, of 1 to 8 bytes. */
static uint64_t odd_number(void)
{
	uint64_t near = 1ull << below(64);

	return below(3) ? near + below(3) - 1 : below(UINT64_MAX);
}

/* Change b in one way; returns the new length. */
static size_t change(uint8_t *b, size_t len)
{
	const struct input *other = &inputs[below(count)];
	size_t at = below(len + 1), n = 1 + below(16), from;
	uint64_t num = odd_number();

	switch (below(6)) {
	case 0:				/* a bit */
		if (at < len)
			b[at] ^= (uint8_t)(1u << below(8));
		return len;
	case 1:				/* a number */
		n = 1ull << below(4);
		if (n <= len - at)
			memcpy(b + at, &num, n);
		return len;
	case 2:				/* bytes go */
		if (n > len - at)
			n = len - at;
		memmove(b + at, b + at + n, len - at - n);
		return len - n;
	case 3:				/* bytes come */
		if (n > INPUT_MAX - len)
			return len;
		memmove(b + at + n, b + at, len - at);
		for (size_t i = 0; i < n; i++)
			b[at + i] = (uint8_t)below(256);
		return len + n;
	case 4:				/* the end is another's */
		from = below(other->len + 1);
		n = other->len - from;
		if (n > INPUT_MAX - at)
			n = INPUT_MAX - at;
		memcpy(b + at, other->b + from, n);
		return at + n;
	default:			/* some of another's in its place */
		from = below(other->len + 1);
		n = below(other->len - from + 1);
		if (n > len - at)
			n = len - at;
		memcpy(b + at, other->b + from, n);
		return len;
	}
}

static uint64_t run_changed(double seconds)
{
	static uint8_t b[INPUT_MAX];
	struct timespec begin, now;
	uint64_t n = 0;

	clock_gettime(CLOCK_MONOTONIC, &begin);
	for (;; n++) {
		const struct input *in = &inputs[below(count)];
		size_t len = in->len < INPUT_MAX ? in->len : INPUT_MAX;

		clock_gettime(CLOCK_MONOTONIC, &now);
		if ((double)(now.tv_sec - begin.tv_sec) +
		    (double)(now.tv_nsec - begin.tv_nsec) / 1e9 >= seconds)
			return n;
		memcpy(b, in->b, len);
		for (uint64_t k = 1 + below(4); k; k--)
			len = change(b, len);
		run(b, len);
	}
}

int main(int argc, char **argv)
{
	double seconds = 0;
	uint64_t changed = 0;
	int c;

	while ((c = getopt(argc, argv, "t:")) != -1) {
		if (c != 't')
			return 2;
		seconds = strtod(optarg, NULL);
	}
	if (getenv("LAST"))
		last = getenv("LAST");
	rng = getenv("SEED") ? strtoull(getenv("SEED"), NULL, 0) : 1;
	for (int i = optind; i < argc; i++)
		path_add(argv[i]);
	if (optind == argc)
		first_ones(&argc, &argv);
	/* What a target says of each input is of no interest. */
	if (!freopen("/dev/null", "w", stdout))
		die("/dev/null");
	if (LLVMFuzzerInitialize)
		LLVMFuzzerInitialize(&argc, &argv);
	for (size_t i = 0; i < count; i++)
		run(inputs[i].b, inputs[i].len);
	if (seconds > 0 && count)
		changed = run_changed(seconds);
	unlink(last);
	fprintf(stderr, "%zu inputs, %llu made of them\n", count, (unsigned long long)changed);
	for (size_t i = 0; i < count; i++)
		free(inputs[i].b);
	free(inputs);
	return 0;
}
