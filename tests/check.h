/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_TESTS_CHECK_H
#define SPACEWEAVE_TESTS_CHECK_H

#include "meta/meta.h"

/*
 * Hold the structures of a volume against each other: every block owned once,
 * or as often as the table of references says; free in the bitmaps what nobody
 * owns, and nothing else; links, entries, sizes and counts. `settled` says that
 * a writable mount has ended since the crash: no orphan and no intent is left.
 * Returns 0, or a negative errno with a sentence in msg.
 *
 * The volume is open read-only. What replay changed in memory has no block of
 * its own yet: volume_walk() gives such nodes their old block, or one beyond
 * CHECK_NEW_NODE when they are new, and dropped nodes the level 255.
 */
#define CHECK_NEW_NODE (1ull << 62)
#define CHECK_DROPPED 255u

int check_volume(struct volume *v, bool settled, char *msg, size_t msg_len);

#endif
