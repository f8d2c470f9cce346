/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_TESTS_MNT_PATTERN_H
#define SPACEWEAVE_TESTS_MNT_PATTERN_H

/*
 * Bytes that can be told: each a function of the file's key and of its place,
 * and never 0, so that holes and foreign bytes show.
 */
#include <stddef.h>
#include <stdint.h>

static inline uint64_t pattern_mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
	return x ^ (x >> 31);
}

static inline uint8_t pattern_byte(uint64_t key, uint64_t at)
{
	return (uint8_t)(pattern_mix(key ^ (at >> 3)) >> (8 * (at & 7))) | 1;
}

static inline void pattern_fill(uint64_t key, uint64_t at, void *buf, size_t n)
{
	uint8_t *p = buf;

	for (size_t i = 0; i < n; i++)
		p[i] = pattern_byte(key, at + i);
}

#endif
