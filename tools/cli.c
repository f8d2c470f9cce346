/* SPDX-License-Identifier: BSD-2-Clause */
#include "tools/cli.h"

#include "meta/meta.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

const char *cli_program = "spaceweave";

/* The progress line on the terminal, to be wiped before anything else is said. */
static bool line_shown;

/*
 * Who is called without one of the first three descriptors would open the image as
 * that one, and say to the image what is for a terminal. What is written to these
 * still fails.
 */
static void hold_standard(void)
{
	for (int fd = 0; fd < 3; fd++)
		if (fcntl(fd, F_GETFD) < 0 &&
		    open("/dev/null", fd ? O_RDONLY : O_WRONLY) != fd)
			_exit(127);
}

void cli_init(const char *argv0)
{
	const char *slash;

	hold_standard();
	if (!argv0 || !*argv0)
		return;
	slash = strrchr(argv0, '/');
	cli_program = slash && slash[1] ? slash + 1 : argv0;
}

static void say(const char *fmt, va_list ap)
{
	cli_progress_end();
	fflush(stdout);
	fprintf(stderr, "%s: ", cli_program);
	vfprintf(stderr, fmt, ap);
	fputc('\n', stderr);
}

void cli_warn(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	say(fmt, ap);
	va_end(ap);
}

void cli_die(int status, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	say(fmt, ap);
	va_end(ap);
	exit(status);
}

void cli_message(void *ctx, const char *text)
{
	(void)ctx;
	cli_warn("%s", text);
}

void cli_version(void)
{
	printf("%s (Spaceweave) %s\n", cli_program, SPACEWEAVE_VERSION);
}

int cli_finish(int status, int failed)
{
	cli_progress_end();
	if (fflush(stdout) || ferror(stdout)) {
		cli_warn("cannot write to standard output: %s", strerror(errno));
		return failed;
	}
	return status;
}

/* ---- sizes ---------------------------------------------------------------- */

int cli_parse_size(const char *text, uint64_t *bytes)
{
	static const char units[] = "KMGTPE";
	uint64_t n = 0;
	unsigned shift = 0;
	const char *p = text;

	if (*p < '0' || *p > '9')
		return -EINVAL;
	for (; *p >= '0' && *p <= '9'; p++)
		if (__builtin_mul_overflow(n, 10u, &n) ||
		    __builtin_add_overflow(n, (unsigned)(*p - '0'), &n))
			return -ERANGE;
	if (*p) {
		const char *u = strchr(units, *p >= 'a' ? *p - 'a' + 'A' : *p);

		if (!u || !*u)
			return -EINVAL;
		shift = 10 * ((unsigned)(u - units) + 1);
		p++;
		if (!strcmp(p, "iB") || !strcmp(p, "B"))
			p += strlen(p);
	}
	if (*p)
		return -EINVAL;
	if (n > UINT64_MAX >> shift)
		return -ERANGE;
	*bytes = n << shift;
	return 0;
}

const char *cli_size(uint64_t bytes, char buf[16])
{
	static const char *const units[] = {"B",   "KiB", "MiB", "GiB",
					    "TiB", "PiB", "EiB"};
	unsigned u = 0;
	double x = (double)bytes;

	while (x >= 1024 && u < 6) {
		x /= 1024;
		u++;
	}
	if (u == 0)
		snprintf(buf, 16, "%u B", (unsigned)bytes);
	else
		snprintf(buf, 16, x < 1000 ? "%.1f %s" : "%.0f %s", x, units[u]);
	return buf;
}

void cli_uuid(const uint8_t uuid[16], char buf[37])
{
	char *p = buf;

	for (unsigned i = 0; i < 16; i++) {
		if (i == 4 || i == 6 || i == 8 || i == 10)
			*p++ = '-';
		p += sprintf(p, "%02x", uuid[i]);
	}
}

const char *cli_error(int err)
{
	err = err < 0 ? -err : err;
	if (err == EUCLEAN)
		return "the volume is damaged";
	if (err == EBADMSG)
		return "a checksum does not match";
	return strerror(err);
}

/* ---- who holds an image ---------------------------------------------------- */

/* A string of a disk structure, made fit to be printed. */
static void copy_text(char *out, size_t room, const char *text, size_t max)
{
	size_t n = 0;

	for (; n < max && n + 1 < room && text[n]; n++)
		out[n] = text[n] >= ' ' && text[n] < 0x7f ? text[n] : '?';
	out[n] = 0;
}

/* What the block says that names the holder. False: nothing. */
static bool holder_text(struct image *im, char *buf, size_t len)
{
	struct disk_mmp mmp;
	char host[65], program[33];

	if (mmp_load(im, &mmp) || get32(mmp.state) == MMP_FREE)
		return false;
	copy_text(host, sizeof(host), mmp.host, sizeof(mmp.host));
	copy_text(program, sizeof(program), mmp.program, sizeof(mmp.program));
	snprintf(buf, len, "%s on %s, process %u",
		 *program ? program : "a program", *host ? host : "this host",
		 get32(mmp.pid));
	return true;
}

const char *cli_holder(const char *image, char *buf, size_t len)
{
	struct image *im;
	bool known = false;

	if (!image_open(image, IMAGE_PEEK, &im)) {
		known = holder_text(im, buf, len);
		image_close(im);
	}
	if (!known)
		snprintf(buf, len, "another process");
	return buf;
}

const char *cli_in_use(const char *image, const char *given, char *buf, size_t len)
{
	char holder[160], name[PATH_MAX], other[PATH_MAX];

	cli_holder(image, holder, sizeof(holder));
	if (image_other(image, name, sizeof(name))) {
		copy_text(other, sizeof(other), name, sizeof(name));
		snprintf(buf, len, "'%s' (also '%s') is in use by %s", given,
			 other, holder);
	} else {
		snprintf(buf, len, "'%s' is in use by %s", given, holder);
	}
	return buf;
}

/* ---- progress --------------------------------------------------------------- */

static volatile sig_atomic_t asked;

static void on_usr1(int sig)
{
	(void)sig;
	asked = 1;
}

static uint64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000;
}

void cli_progress(const char *what, uint64_t done, uint64_t of)
{
	static bool ready, terminal;
	static uint64_t last;
	uint64_t now;
	char line[80];

	if (!ready) {
		struct sigaction sa = {.sa_handler = on_usr1,
				       .sa_flags = SA_RESTART};

		sigaction(SIGUSR1, &sa, NULL);
		terminal = isatty(STDERR_FILENO);
		ready = true;
	}
	if (!terminal && !asked)
		return;
	now = now_ms();
	if (!asked && now - last < 100)
		return;
	last = now;
	if (of)
		snprintf(line, sizeof(line), "%s: %3u%% (%" PRIu64 " of %" PRIu64 ")",
			 what, (unsigned)((double)done * 100.0 / (double)of),
			 done, of);
	else
		snprintf(line, sizeof(line), "%s: %" PRIu64, what, done);
	if (terminal) {
		fprintf(stderr, "\r%-79s", line);
		fflush(stderr);
		line_shown = true;
	} else {
		fprintf(stderr, "%s: %s\n", cli_program, line);
	}
	asked = 0;
}

void cli_progress_end(void)
{
	if (line_shown)
		fprintf(stderr, "\r%-79s\r", "");
	line_shown = false;
}
