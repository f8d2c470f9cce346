#!/bin/bash
# timeout: 600
# Bytes of items changed at random, checksums right again: fsck neither crashes
# nor hangs; what -n calls clean -y does too, and after -y exits with 0 or 1
# another run exits with 0. SEED=n begins there, RUNS=n makes so many.
. "$(dirname "$0")/lib.sh"
first=${SEED:-$((RANDOM * 32768 + RANDOM))}
echo "seed $first"

fsck() { # fsck OPTIONS: its exit status
	local status=0
	timeout 60 "$bin/fsck.spaceweave" "$@" "$work/image" </dev/null >>"$work/out" 2>&1 || status=$?
	echo $status
}

fail() {
	echo "FAILED: SEED=$seed: $*"
	tail -n 40 "$work/out"
	exit 1
}

"$bin/mkfs.spaceweave" -q "$work/base" 16M
"$damage" "$work/base" make
for ((seed = first; seed < first + ${RUNS:-30}; seed++)); do
	cp --sparse=always "$work/base" "$work/image"
	: >"$work/out"
	"$damage" "$work/image" fuzz "$seed"
	n=$(fsck -fn)
	y=$(fsck -fy)
	again=$(fsck -fn)
	case $n in 0 | 4) ;; *) fail "-n exits with $n" ;; esac
	case $y in 0 | 1 | 4 | 5 | 12 | 13) ;; *) fail "-y exits with $y" ;; esac
	[ "$n" != 0 ] || [ "$y" = 0 ] || fail "-n finds nothing, -y exits with $y"
	[ "$y" -gt 1 ] || [ "$again" = 0 ] || fail "$again after -y had exited with $y"
done
