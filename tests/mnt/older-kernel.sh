#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# On a kernel that does not offer what newer ones do, attributes are set as asked for,
# and setuid goes with a write. What this kernel offers is cut down in the daemon's
# read() of INIT.

. "$(dirname "$0")/lib.sh"
need cc setfattr getfattr

cat >"$work/older.c" <<'END'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <unistd.h>

ssize_t read(int fd, void *buf, size_t len)
{
	static ssize_t (*real)(int, void *, size_t);
	struct fuse_in_header *in = buf;
	struct fuse_init_in *init = (void *)(in + 1);
	ssize_t n;

	if (!real)
		real = dlsym(RTLD_NEXT, "read");
	n = real(fd, buf, len);
	if (n >= (ssize_t)(sizeof(*in) + sizeof(*init)) && in->len == n &&
	    in->opcode == FUSE_INIT)
		init->flags &= ~(uint32_t)strtoul(getenv("LACKS"), NULL, 0);
	return n;
}
END
cc -shared -fPIC -o "$work/older.so" "$work/older.c" -ldl
LD_PRELOAD=$work/older.so mount.spaceweave -V >"$work/said" 2>&1 ||
	skip "the daemon takes no other read()"

# the longer SETXATTR; that, KILLPRIV_V2, and all that has come since
for lacks in 0x20000000 0x70000000; do
	format 64M
	LACKS=$lacks LD_PRELOAD=$work/older.so start
	echo a >"$mnt/f"
	for name in user.a user.longer.than.eight; do
		setfattr -n $name -v "of $name" "$mnt/f"
	done
	if [ "$(id -u)" = 0 ]; then
		setfattr -n trusted.user.secret -v secret "$mnt/f"
		chmod 4777 "$mnt/f"
		setpriv --reuid=nobody --clear-groups sh -c "echo b >&9" 9>>"$mnt/f"
		same "$(stat -c %a "$mnt/f")" 777 "after a write"
	fi
	stop
	check
	start
	for name in user.a user.longer.than.eight; do
		same "$(getfattr --only-values -n $name "$mnt/f" 2>/dev/null)" "of $name"
	done
	if getfattr -n user.secret "$mnt/f" >/dev/null 2>&1; then
		fail "trusted.user.secret is called user.secret"
	fi
	stop
done
