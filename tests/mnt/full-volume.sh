#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# Filled to ENOSPC by small and large files at once, emptied, filled again: no
# block is lost to the volume, and none to the host.
#
# SIZE (400M), TIMES (2)

. "$(dirname "$0")/lib.sh"
size=${SIZE:-400M}
times=${TIMES:-2}
fill=$helpers/fill
[ -x "$fill" ] || skip "no $fill: make tests"

host() { # KiB of the image on the host
	sync "$image"
	du -k "$image" | cut -f1
}
free() { # free and available blocks
	stat -fc '%f %a' "$mnt"
}
at_rest() { # the same of the image, unmounted
	spaceweave info "$image" | sed -n 's/^\(free\|available\) .*, \([0-9]*\) blocks/\2/p' | paste -sd' '
}
# The daemon frees what nobody uses any more when the kernel has said so and a
# checkpoint has passed.
settle() { # until it is so, for at most 20 s
	for ((i = 0; i < 40; i++)); do
		[ "$(free)" != "$1" ] || return 0
		sleep 0.5
	done
}

format "$size"
start
mkdir "$mnt/s" "$mnt/l"
sync -f "$mnt"
stop
empty_host=$(host)
rest=$(at_rest)
start
empty=$(free)
echo "empty: free and available $empty, $empty_host KiB on the host"

for ((t = 1; t <= times; t++)); do
	"$fill" small "$mnt/s" >"$work/small" &
	pid=$!
	"$fill" large "$mnt/l" >"$work/large" || fail "large files: $(cat "$work/large")"
	wait $pid || fail "small files: $(cat "$work/small")"
	echo "filled: small files $(cat "$work/small"), large files $(cat "$work/large"), free and available $(free)"
	avail=$(stat -fc '%a' "$mnt")
	[ "$avail" -lt $((64 * 1024)) ] || fail "full, yet $avail blocks available"

	# On the full volume: overwriting, and what happens to what does not fit.
	victim=$(find "$mnt/s/0" -size +16k | sort | head -n 1)
	cp "$victim" "$work/victim"
	status=0
	dd if="$work/victim" of="$victim" conv=notrunc,fsync bs=4k status=none 2>"$work/err" || status=$?
	echo "overwriting in a full volume: status $status $(cat "$work/err")"
	[ $status = 0 ] || grep -q 'No space left' "$work/err" || fail "neither done nor ENOSPC"
	cmp "$victim" "$work/victim" || fail "overwriting in a full volume lost what was there"
	status=0
	dd if=/dev/zero of="$mnt/never" bs=1M count=64 conv=fsync status=none 2>"$work/err" || status=$?
	[ $status != 0 ] && grep -q 'No space left' "$work/err" || fail "64 MiB went into a full volume"
	rm -f "$mnt/never"
	for what in s l; do
		"$fill" verify "$mnt/$what" >"$work/verify" || { head -n 5 "$work/verify"; fail "not what was written"; }
	done
	# the same after a new mount, and fsck
	stop
	check
	start
	for what in s l; do
		"$fill" verify "$mnt/$what" >"$work/verify" || { head -n 5 "$work/verify"; fail "not what was written, after mount"; }
	done
	# until nothing fits at all, and rm still works
	(i=0; while mkdir "$mnt/s/d$i" 2>/dev/null && [ $i -lt 20000 ]; do i=$((i + 1)); done)
	rm "$victim" || fail "rm in a full volume"
	rm -rf "${mnt:?}/s" "${mnt:?}/l" || fail "rm -rf in a full volume"
	mkdir "$mnt/s" "$mnt/l"
	settle "$empty"
	echo "emptied: free and available $(free)"
	[ "$(free)" = "$empty" ] || fail "statfs: $(free) is not $empty"
	stop
	echo "at rest: free and available $(at_rest), at first $rest"
	[ "$(at_rest)" = "$rest" ] || fail "blocks are lost at rest"
	start
done
stop
check
full_host=$(host)
echo "on the host: $empty_host KiB when empty, $full_host KiB now"
[ "$full_host" -le $((empty_host + empty_host / 50)) ] || fail "the host has not got its blocks back"
