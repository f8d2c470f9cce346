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

/* "4096", "64K", "10G", "1T", "1P": bytes, powers of 1024. -EINVAL, -ERANGE. */
int cli_parse_size(const char *text, uint64_t *bytes);
/* "10.0 GiB" into buf, returned. */
const char *cli_size(uint64_t bytes, char buf[16]);
void cli_uuid(const uint8_t uuid[16], char buf[37]);

/* A line that is redrawn on a terminal, and printed once on SIGUSR1. */
void cli_progress(const char *what, uint64_t done, uint64_t of);
void cli_progress_end(void);

#endif
