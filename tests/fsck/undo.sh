#!/bin/bash
# fsck -u FILE and spaceweave undo: what is refused, and a file that was cut off.
. "$(dirname "$0")/lib.sh"
cd "$work"

fail() {
	echo "FAILED: $*"
	exit 1
}

fsck() { "$bin/fsck.spaceweave" "$@" </dev/null >>out 2>&1; }
undo() { "$bin/spaceweave" undo "$@" >>out 2>&1; }
sum() { sha256sum <"$1"; }

"$bin/mkfs.spaceweave" -q base 16M
"$damage" base make
fsck -fy -u none base || fail "a volume without errors"
[ ! -e none ] || fail "nothing was repaired, and there is an undo file"
"$damage" base node 0 0 0
before=$(sum base)
cp --sparse=always base image
fsck -fy -u saved image && fail "no errors were found"
cp --sparse=always image repaired
after=$(sum image)

fsck -fy -u saved base && fail "an undo file was written over"
[ "$before" = "$(sum base)" ] || fail "and the image was changed"

undo -n saved image || fail "undo -n"
[ "$after" = "$(sum image)" ] || fail "undo -n has changed the image"

truncate -s 32M longer
undo saved longer && fail "an image of another size was taken"

# A volume that was used since.
"$damage" image dirty 1
undo saved image && fail "undone, though the image was changed since"
undo -f saved image || fail "undo -f"

# Cut off in the end record, and in any other: the rest counts.
cp --sparse=always repaired image
head -c -100 saved >part
undo part image || fail "a file without an end"
[ "$before" = "$(sum image)" ] || fail "a file without an end does not bring all back"

# Damaged in the middle: nothing is written.
cp --sparse=always repaired image
cp saved bad
printf 'xx' | dd of=bad bs=1 seek=10000 conv=notrunc status=none
undo bad image && fail "a damaged file was taken"
[ "$after" = "$(sum image)" ] || fail "and the image was changed"
undo image saved && fail "an image was taken for an undo file"
exit 0
