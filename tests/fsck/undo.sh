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

# says TEXT: the last command's output.
says() { tail -n 3 out | grep -q -- "$1" || fail "it does not say '$1'"; }

# What cannot be saved is not repaired.
for place in none/saved . "$work"; do
	cp --sparse=always base image
	fsck -fy -u "$place" image && fail "repaired without an undo file in '$place'"
	says 'cannot make the undo file'
	[ "$before" = "$(sum image)" ] || fail "and the image was changed"
done
(
	trap '' XFSZ
	ulimit -f 6		# KiB: the head, and not what comes first
	fsck -fy -u short image
) && fail "repaired with an undo file that cannot be written"
grep -q 'cannot write the undo file: .*; nothing is changed' out ||
	fail "it does not say why"
[ "$before" = "$(sum image)" ] || fail "and the image was changed"

# Usage, and what is not there.
for args in '' 'saved' 'saved image more' '-x saved image'; do
	# shellcheck disable=SC2086 # words are meant
	undo $args && fail "undo $args"
	says 'even if the image was changed\|only verify\|this help'
done
undo -h || fail "undo -h"
says 'this help'
undo saved none && fail "an image that is not there"
says "cannot open 'none': No such file"
undo none image && fail "an undo file that is not there"
says "cannot open 'none': No such file"
: >empty
undo empty image && fail "an empty undo file"
says "is not an undo file"

# An image that somebody has open.
"$damage" base busy stop -1 &
while [ ! -e stop.held ]; do sleep 0.02; done
undo saved base && fail "undone under a volume that is open"
says 'is in use by damage on .*, process [0-9]*'
touch stop
wait

# An image that cannot be written.
cp --sparse=always repaired image
: >out		# the limit is for this too
(
	trap '' XFSZ
	ulimit -f 6
	undo saved image
) && fail "an image that cannot be written"
says 'File too large'
undo saved image || fail "undone by halves, and not to be finished"
[ "$before" = "$(sum image)" ] || fail "finished, and not all is back"

# Much to be saved: of a large directory every fourth leaf is lost.
rm -f image saved2
"$bin/mkfs.spaceweave" -q image 32M
"$damage" image make
"$damage" image many 12000
for ((i = 0; i < 400; i += 4)); do
	"$damage" image node 0 0 $i
done
before=$(sum image)
fsck -fy -u saved2 image && fail "no errors were found"
[ "$(stat -c %s saved2)" -gt 2200000 ] || fail "little was saved: $(stat -c %s saved2)"
fsck -fn image || fail "not repaired"
undo saved2 image || fail "much cannot be undone"
[ "$before" = "$(sum image)" ] || fail "much was saved, and not all is back"
exit 0
