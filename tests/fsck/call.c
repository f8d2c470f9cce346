/* SPDX-License-Identifier: BSD-2-Clause */
#include "tests/fsck/call.h"

#include <getopt.h>
#include <setjmp.h>

int fsck_main(int argc, char **argv);
int __wrap_image_open(const char *path, enum image_mode mode, struct image **out);
int __real_image_open(const char *path, enum image_mode mode, struct image **out);
void __wrap_exit(int status) __attribute__((noreturn));
void __real_exit(int status) __attribute__((noreturn));

static struct image *given;		/* NULL: fsck does not run */
static jmp_buf out;

int __wrap_image_open(const char *path, enum image_mode mode, struct image **im)
{
	if (!given)
		return __real_image_open(path, mode, im);
	*im = given;
	return 0;
}

void __wrap_exit(int status)
{
	if (given)
		longjmp(out, status + 1);
	__real_exit(status);
}

int fsck_call(struct image *im, const char *options)
{
	char *argv[] = {(char *)"fsck", (char *)options, (char *)"image", NULL};
	int ret = setjmp(out);

	if (ret) {
		given = NULL;
		return ret - 1;
	}
	given = im;
	optind = 0;
	ret = fsck_main(3, argv);
	given = NULL;
	return ret;
}
