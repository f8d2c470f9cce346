#!/bin/bash
# Every input of the corpus, and for a few seconds others made of them, through
# each fuzz target, with the address and undefined sanitizers.
#
#   SECS=n    of those others, for each target (2)
#   SEED=n    for them
#   TARGETS="super journal node raw fsck state"
# timeout: 600
cd "$(dirname "$0")/../.." || exit 1

bin=${SPACEWEAVE_FUZZ:-build-address-undefined}
logs=build/test-logs
mkdir -p $logs
# They end by longjmp in the midst of fsck, so memory is left.
export ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=8:max_malloc_fill_size=0

failed=0
for t in ${TARGETS:-super journal node raw fsck state}; do
	[ -x "$bin/fuzz-$t" ] || { echo "skip: $bin/fuzz-$t is not built"; exit 77; }
	start=$SECONDS
	# The target's own first inputs, and those that were kept.
	for from in "" "tests/fuzz/corpus/$t.ar"; do
		said=$(LAST=$logs/fuzz-$t.last "$bin/fuzz-$t" -t "${SECS:-2}" $from 2>&1 >/dev/null)
		status=$?
		if [ $status != 0 ]; then
			echo "$said" | tail -n 40
			echo "$t: exit status $status; again: $bin/fuzz-$t $logs/fuzz-$t.last"
			failed=1
			break
		fi
		echo "$t: $(echo "$said" | tail -n 1)"
	done
	echo "$t: $((SECONDS - start)) s"
done
exit $failed
