#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# The daemon is told to end, or killed, while the kernel writes a file out because
# the daemon wants to know where it has data, and while it is synced or unmounted:
# it ends, and lets go of the image.
#
# The daemon's read() is replaced by one that, while $work/hold names the process,
# keeps to itself each request to write: so the kernel waits for an answer for sure,
# and not only if the moment is the right one.

. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/posix.inc"
need cc python3
leave() { rm -f "$work/hold"; }
both_users

cat >"$work/hold.c" <<'END'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static int hold(void)
{
	FILE *f = fopen(getenv("HOLD"), "re");
	int pid = 0;

	if (f && fscanf(f, "%d", &pid) != 1)
		pid = 0;
	if (f)
		fclose(f);
	return pid == getpid();
}

ssize_t read(int fd, void *buf, size_t len)
{
	static ssize_t (*real)(int, void *, size_t);
	const struct timespec ms = {0, 1000000};
	const struct fuse_in_header *in = buf;
	ssize_t n;

	if (!real)
		real = dlsym(RTLD_NEXT, "read");
	n = real(fd, buf, len);
	if (n < (ssize_t)sizeof(*in) || in->len != n || in->opcode != FUSE_WRITE)
		return n;
	while (hold()) {
		close(open(getenv("HELD"), O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
		nanosleep(&ms, NULL);
	}
	return n;
}
END
cc -shared -fPIC -o "$work/hold.so" "$work/hold.c" -ldl
export HOLD=$work/hold HELD=$work/held
LD_PRELOAD=$work/hold.so mount.spaceweave -V >"$work/said" 2>&1 ||
	skip "the daemon takes no other read()"

until_true() { # WHAT COMMAND...: for 60 s at most
	local what=$1 i
	shift
	for ((i = 0; i < 600; i++)); do
		if "$@"; then return 0; fi
		sleep 0.1
	done
	fail "not within a minute: $what"
}

# Not before its last thread is: a main thread that has ended leaves a Z as well.
gone() {
	local state
	state=$(cut -d' ' -f3 "/proc/$1/task/"*/stat 2>/dev/null) || true
	[ -z "$state" ] || [ "$state" = Z ]
}

# A file with data that only the kernel has, and somebody who looks for a hole.
begin() { # COMMAND to make the kernel write
	rm -f "$HELD"
	format 64M
	LD_PRELOAD=$work/hold.so start
	pid=$(daemon_pid)
	echo "$pid" >"$HOLD"
	python3 -c "$1" "$mnt/f" &
	user=$!
	until_true "the kernel writes" test -e "$HELD"
}

seek='
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
for at in range(0, 64, 2):
    os.pwrite(fd, b"x" * 4096, at * 4096)
try:
    os.lseek(fd, 0, os.SEEK_HOLE)
except OSError:
    pass
'

over() { # the daemon and who asked it are gone, the image can be used
	until_true "the daemon ends" gone "$pid"
	until_true "who waited ends" gone "$user"
	wait "$user" || true
	rm -f "$HOLD"
	if is_mounted "$mnt"; then fusermount3 -uz "$mnt"; fi
	start
	stop
	check
}

# killed
begin "$seek"
kill -KILL "$pid"
over

# killed while it is about to end: it syncs the mount, which is busy
begin "$seek"
kill -TERM "$pid"
kill -KILL "$pid"
over

# told to end: what the kernel has is taken first
begin "$seek"
kill -TERM "$pid"
sleep 0.2
rm -f "$HOLD"
over
