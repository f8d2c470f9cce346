#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# mkfs and mount cost the same however large the image is and however many
# files are in it. Prints times; asserts none, for the machine may be busy.
#
# FILES=n (20000)

. "$(dirname "$0")/lib.sh"
files=${FILES:-20000}
fill=$helpers/fill
[ -x "$fill" ] || skip "no $fill: make tests"

ms() { # the best of three of a command, in milliseconds; $after undoes it
	local best=999999 t0 t
	for _ in 1 2 3; do
		t0=$(date +%s%N)
		"$@"
		t=$((($(date +%s%N) - t0) / 100000))
		$after
		[ $t -ge $best ] || best=$t
	done
	printf '%d.%d' $((best / 10)) $((best % 10))
}
ratio() {
	awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", a / b }'
}

after=:
mkfs_1g=$(ms format 1G)
after=stop
mount_1g=$(ms start)
echo "1 GiB: mkfs $mkfs_1g ms, mount $mount_1g ms"

# the largest that the host can hold: 1 PiB wants XFS
small=$image huge=
for size in 1P 15T 7T; do
	if truncate -s $size "$work/huge" 2>/dev/null; then huge=$work/huge; break; fi
	if [ $size = 1P ] && [ "$(id -u)" = 0 ] && command -v mkfs.xfs >/dev/null; then
		truncate -s 2G "$work/xfs"
		mkdir "$work/host"
		if mkfs.xfs -q "$work/xfs" && mount -o loop "$work/xfs" "$work/host" 2>/dev/null; then
			if truncate -s 1P "$work/host/huge"; then huge=$work/host/huge; break; fi
		fi
	fi
done
if [ -n "$huge" ]; then
	image=$huge
	# with the same journal, which is what mkfs and mount cost
	journal=$(spaceweave info "$small" | sed -n 's/^journal *\([0-9]*\)\(\.[0-9]*\)\? \([KMG]\)iB.*/\1\3/p')
	after=:
	format_huge() { rm -f "$image"; mkfs.spaceweave -q -J "$journal" "$image" "$size"; }
	mkfs_huge=$(ms format_huge)
	after=stop
	mount_huge=$(ms start)
	echo "$size: mkfs $mkfs_huge ms ($(ratio "$mkfs_huge" "$mkfs_1g")), mount $mount_huge ms ($(ratio "$mount_huge" "$mount_1g"))"
	start
	cp -r /etc/init.d "$mnt/"
	diff -r /etc/init.d "$mnt/init.d" || fail "not what was copied"
	df -h "$mnt" | tail -n 1
	stop
	start
	diff -r /etc/init.d "$mnt/init.d" || fail "not what was copied"
	stop
	rm -f "$image"
else
	echo "the host holds no file larger than 7 TiB"
fi

image=$small
format 4G
start
mkdir "$mnt/many"
t0=$(date +%s%N)
"$fill" fast "$mnt/many" "$files" >/dev/null
stop
echo "$files files made and unmounted in $((($(date +%s%N) - t0) / 1000000)) ms"
mount_many=$(ms start)
echo "$files files: mount $mount_many ms ($(ratio "$mount_many" "$mount_1g"))"
check
