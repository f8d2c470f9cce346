/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_CLI_H
#define SPACEWEAVE_CLI_H

/* What all programs share: messages, sizes, progress. One thread. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Name for messages: the last part of argv[0]. Call first. */
void cli_init(const char *argv0);
extern const char *cli_program;

/* "program: text\n" on stderr. cli_die exits with `status`. */
void cli_warn(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void cli_die(int status, const char *fmt, ...)
	__attribute__((format(printf, 2, 3), noreturn));
/* For volume_options.message: cli_warn(text). */
void cli_message(void *ctx, const char *text);
/* -V: "program (Spaceweave) 0.1" on stdout. */
void cli_version(void);
/* Flush stdout; a result that could not be written makes `status` `failed`. */
int cli_finish(int status, int failed);

/* "4096", "64K", "10G", "1T", "1P": bytes, powers of 1024. -EINVAL, -ERANGE. */
int cli_parse_size(const char *text, uint64_t *bytes);
/* "10.0 GiB" into buf, returned. */
const char *cli_size(uint64_t bytes, char buf[16]);
void cli_uuid(const uint8_t uuid[16], char buf[37]);

/* strerror(-err), with our own words for damage. */
const char *cli_error(int err);

/*
 * The source in /proc/mounts is the image as it was given, which may be
 * relative to a folder that nobody knows any more. So the root of a mount has
 * this attribute, listed nowhere: the image's path from /.
 */
#define CLI_IMAGE_XATTR "spaceweave.image"

/*
 * Who holds the image for writing, from its block for that:
 * "mount.spaceweave on host, process 42" into buf, returned; "another process"
 * when the block names nobody.
 */
const char *cli_holder(const char *image, char *buf, size_t len);
/*
 * "'disk.img' (also '/dev/loop0') is in use by mount.spaceweave on ...": why an
 * image, called as the user calls it, is refused. Into buf, returned.
 */
#define CLI_IN_USE 9000
const char *cli_in_use(const char *image, const char *given, char *buf, size_t len);

/* A line that is redrawn on a terminal, and printed once on SIGUSR1. */
void cli_progress(const char *what, uint64_t done, uint64_t of);
void cli_progress_end(void);

#endif
