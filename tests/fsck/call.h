/* SPDX-License-Identifier: BSD-2-Clause */
#ifndef SPACEWEAVE_TESTS_FSCK_CALL_H
#define SPACEWEAVE_TESTS_FSCK_CALL_H

/*
 * fsck.spaceweave as a function. What it has in memory when it ends by exit() is
 * left. One thread. Linked with --wrap=image_open,--wrap=exit.
 */
#include "meta/image.h"

/* On this image, which stays open unless fsck closes it. Its exit status. */
int fsck_call(struct image *im, const char *options);

#endif
