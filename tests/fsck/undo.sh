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

# Cut off in the end record: the rest counts.
cp --sparse=always repaired image
head -c -100 saved >part
undo part image || fail "a file without an end"
[ "$before" = "$(sum image)" ] || fail "a file without an end does not bring all back"

# ---- a file without an end: fsck was killed, or the power cut
# What the image's slots hold decides whether anybody else had it since.
refused() { # FILE IMAGE WHY: and nothing is written
	local was
	was=$(sum "$2")
	undo "$1" "$2" && fail "undone: $3"
	tail -n 3 out | grep -q 'was changed since, or is not the image' || fail "it does not say so: $3"
	[ "$was" = "$(sum "$2")" ] || fail "refused, and changed: $3"
}
back() { # FILE IMAGE WHAT: all is as it was before fsck
	undo "$1" "$2" || fail "not undone: $3"
	[ "$before" = "$(sum "$2")" ] || fail "undone, and not all is back: $3"
}
# The file's records: where each stands, its kind, place and length.
records() {
	local at=0 end kind place bytes
	end=$(stat -c %s "$1")
	while [ $at -lt "$end" ]; do
		kind=$(od -An -v -t u4 -j $((at + 12)) -N 4 "$1")
		read -r place bytes < <(od -An -v -t u8 -j $((at + 24)) -N 16 "$1")
		[ $((kind)) != 0 ] || bytes=0	# the head tells the image's
		echo "$at $((kind)) $place $bytes"
		at=$((at + 4096 + (bytes + 4095) / 4096 * 4096))
	done
}
put() { # FROM OFFSET TO OFFSET BYTES
	dd if="$1" of="$3" bs=512 skip=$(($2 / 512)) seek=$(($4 / 512)) count=$(($5 / 512)) \
		conv=notrunc status=none
}
cp --sparse=always repaired image
"$damage" image dirty 1
refused part image "used since"
undo -f part image || fail "a file without an end, with -f"
"$bin/mkfs.spaceweave" -q other 16M
refused part other "another volume"
truncate -s 16M nothing
refused part nothing "no volume"

# All that fsck had in a slot at any time, with the other as it found it, or left it.
states=0
while read -r at kind place bytes; do
	[ "$kind" = 3 ] || continue
	states=$((states + 1))
	for file in part saved; do
		cp --sparse=always repaired image
		put saved $((at + 4096)) image "$place" "$bytes"
		back $file image "slot at $place, state $states"
		cp --sparse=always repaired image
		for slot in 0 65536; do put base $slot image $slot 4096; done
		put saved $((at + 4096)) image "$place" "$bytes"
		back $file image "slot at $place, state $states, and the other as it was"
	done
done < <(records saved)
[ $states -gt 3 ] || fail "fsck told of $states states of the slots only"
# ... and one that was torn.
cp --sparse=always repaired image
for slot in 0 65536; do put base $slot image $slot 1024; done
back part image "a torn slot"
printf x | dd of=image bs=1 seek=2000 conv=notrunc status=none
refused part image "a slot that is neither"

# Files of earlier versions know nothing of slots.
while read -r at kind place bytes; do
	[ "$kind" = 3 ] || dd if=saved bs=4096 skip=$((at / 4096)) count=$((1 + (bytes + 4095) / 4096)) status=none
done < <(records saved) >old
cp --sparse=always repaired image
back old image "a file of an earlier version"
cp --sparse=always repaired image
"$damage" image dirty 1
refused old image "a file of an earlier version, and used since"
head -c -100 old >oldpart
cp --sparse=always repaired image
back oldpart image "a file of an earlier version, without an end"

# All superblocks spoilt, and then fsck cut off.
cp --sparse=always base image
for i in 0 1 2 3; do "$damage" image super $i spoil; done
spoilt=$(sum image)
fsck -fy -u spoiltundo image && fail "no errors were found"
fsck -fn image || fail "not repaired"
head -c -100 spoiltundo >spoiltpart
undo spoiltpart image || fail "all superblocks spoilt: cannot be undone"
[ "$spoilt" = "$(sum image)" ] || fail "all superblocks spoilt: not all is back"

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
	ulimit -f 22		# KiB: what it begins with, and not what is saved first
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
mkfifo fifo
undo fifo image && fail "a FIFO was taken"
says "is not an undo file"
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
grep -q 'File too large' out || fail "it does not say 'File too large'"
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
