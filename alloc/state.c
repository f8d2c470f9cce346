/* SPDX-License-Identifier: BSD-2-Clause */
#include "alloc/alloc_priv.h"

#include <errno.h>

int state_open(struct alloc *a)
{
	(void)a;
	return -EOPNOTSUPP;
}

int state_save(struct alloc *a)
{
	(void)a;
	return -EOPNOTSUPP;
}
