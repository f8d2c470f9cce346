/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The configuration: defaults, bounds, environment. Each field has one row
 * that check and environment share.
 */
#include "alloc/alloc.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PREFIX "SPACEWEAVE_ALLOC_"
#define UNITS_MAX (1ull << 52)

static int __attribute__((format(printf, 3, 4)))
complain(char *msg, size_t msg_len, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	if (msg && msg_len)
		vsnprintf(msg, msg_len, fmt, ap);
	va_end(ap);
	return -EINVAL;
}

static int check_bounds(const char *field, uint64_t value, uint64_t min,
			uint64_t max, char *msg, size_t msg_len)
{
	if (value >= min && value <= max)
		return 0;
	return complain(msg, msg_len,
			"%s is %" PRIu64 ", must be %" PRIu64 " to %" PRIu64,
			field, value, min, max);
}

static int check_power(const char *field, uint64_t value, char *msg,
		       size_t msg_len)
{
	if (!(value & (value - 1)))
		return 0;
	return complain(msg, msg_len, "%s is %" PRIu64
			", must be a power of two", field, value);
}

int alloc_config_check(struct alloc_config *cfg, char *msg, size_t msg_len)
{
	struct alloc_config c = *cfg;
	uint64_t limit_max;
	int err;

	c.unit_bytes = c.unit_bytes ? c.unit_bytes : 4096;
	c.shards = c.shards ? c.shards : 16;
	c.backup_interval_s = c.backup_interval_s ? c.backup_interval_s : 300;
	c.operation_threshold = c.operation_threshold ? c.operation_threshold
						      : 1000;
	if ((err = check_bounds("units", c.units, 1, UNITS_MAX, msg, msg_len)) ||
	    (err = check_bounds("unit_bytes", c.unit_bytes, 512, 1 << 20, msg,
				msg_len)) ||
	    (err = check_power("unit_bytes", c.unit_bytes, msg, msg_len)))
		return err;
	limit_max = (uint64_t)ALLOC_CHUNK / 4 * c.unit_bytes;
	if (limit_max > UINT32_MAX)
		limit_max = UINT32_MAX;
	if (!c.small_limit_bytes)
		c.small_limit_bytes = c.unit_bytes > 262144 ? c.unit_bytes
							    : 262144;
	if ((err = check_bounds("small_limit_bytes", c.small_limit_bytes,
				c.unit_bytes, limit_max, msg, msg_len)) ||
	    (err = check_bounds("shards", c.shards, 1, 1024, msg, msg_len)) ||
	    (err = check_bounds("policy", c.policy, ALLOC_POLICY_DEFAULT,
				ALLOC_BEST_FIT, msg, msg_len)))
		return err;
	if (!c.policy)
		c.policy = ALLOC_BEST_FIT;
	*cfg = c;
	return 0;
}

/* "16", "4K", "1T": a number and its power of 1024. */
static bool parse_size(const char *text, uint64_t *out)
{
	static const char powers[] = "KMGTP";
	char *end;
	uint64_t value;

	if (*text < '0' || *text > '9')
		return false;
	errno = 0;
	value = strtoull(text, &end, 10);
	if (errno)
		return false;
	if (*end) {
		const char *power = strchr(powers, *end & ~0x20);

		if (!power || end[1])
			return false;
		for (const char *p = powers; p <= power; p++) {
			if (value >> 54)
				return false;
			value <<= 10;
		}
	}
	*out = value;
	return true;
}

/* The number in variable `name`, if it is set, within what a field holds. */
static int env_number(const char *name, uint64_t max, uint64_t *out, char *msg,
		      size_t msg_len)
{
	const char *text = getenv(name);
	uint64_t value;

	if (!text || !*text)
		return 0;
	if (!parse_size(text, &value))
		return complain(msg, msg_len, "%s is '%s', must be a number, "
				"perhaps with K, M, G, T or P", name, text);
	if (value > max)
		return complain(msg, msg_len, "%s is '%s', must be at most %"
				PRIu64, name, text, max);
	*out = value;
	return 0;
}

static int env_u32(const char *name, uint32_t *out, char *msg, size_t msg_len)
{
	uint64_t value = *out;
	int err = env_number(name, UINT32_MAX, &value, msg, msg_len);

	*out = (uint32_t)value;
	return err;
}

static int env_policy(const char *name, enum alloc_policy *out, char *msg,
		      size_t msg_len)
{
	const char *text = getenv(name);

	if (!text || !*text)
		return 0;
	if (!strcmp(text, "first-fit"))
		*out = ALLOC_FIRST_FIT;
	else if (!strcmp(text, "best-fit"))
		*out = ALLOC_BEST_FIT;
	else
		return complain(msg, msg_len, "%s is '%s', must be first-fit "
				"or best-fit", name, text);
	return 0;
}

int alloc_config_env(struct alloc_config *cfg, char *msg, size_t msg_len)
{
	struct alloc_config c = *cfg;
	const char *path = getenv(PREFIX "STATE_PATH");
	int err;

	if ((err = env_u32(PREFIX "UNIT_BYTES", &c.unit_bytes, msg, msg_len)) ||
	    (err = env_number(PREFIX "UNITS", UNITS_MAX, &c.units, msg,
			      msg_len)) ||
	    (err = env_u32(PREFIX "SMALL_LIMIT", &c.small_limit_bytes, msg,
			   msg_len)) ||
	    (err = env_u32(PREFIX "SHARDS", &c.shards, msg, msg_len)) ||
	    (err = env_policy(PREFIX "POLICY", &c.policy, msg, msg_len)) ||
	    (err = env_u32(PREFIX "BACKUP_INTERVAL", &c.backup_interval_s, msg,
			   msg_len)) ||
	    (err = env_u32(PREFIX "OPERATION_THRESHOLD",
			   &c.operation_threshold, msg, msg_len)))
		return err;
	if (path && *path)
		c.state_path = path;
	err = alloc_config_check(&c, msg, msg_len);
	if (!err)
		*cfg = c;
	return err;
}
