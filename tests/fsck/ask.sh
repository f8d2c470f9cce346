#!/bin/bash
# fsck.spaceweave on a terminal: each repair is asked for, and only what was said
# yes to is done; progress is shown, and wiped.
. "$(dirname "$0")/lib.sh"
cd "$work"
command -v script >/dev/null || {
	echo "no script(1) here"
	exit 77
}

fail() {
	echo "FAILED: $*"
	cat out
	exit 1
}

# terminal STATUS ANSWERS OPTIONS: fsck must end with STATUS.
terminal() {
	local want=$1 answers=$2 status=0
	shift 2
	printf '%b' "$answers" |
		timeout 60 script -qec "'$bin/fsck.spaceweave' $* image" /dev/null >out 2>&1 ||
		status=$?
	[ $status = "$want" ] || fail "fsck $*: status $status, not $want"
}
asked() { grep -c ' to be .*? ' out || true; }
sum() { sha256sum <image; }

"$bin/mkfs.spaceweave" -q image 16M
"$damage" image make
"$damage" image inode /file nlink 7
"$damage" image inode /dir/sub/deep nlink 5
before=$(sum)

terminal 4 'n\nn\n' -f
[ "$(asked)" = 2 ] || fail "not asked twice"
[ "$before" = "$(sum)" ] || fail "changed, though the answer was no"
terminal 4 '\004\004' -f
[ "$before" = "$(sum)" ] || fail "changed, though there was no answer"
terminal 4 'maybe\nn\n' -f
[ "$before" = "$(sum)" ] || fail "changed, though nobody said yes"
terminal 4 '' -fn
[ "$(asked)" = 0 ] || fail "-n asks"
[ "$before" = "$(sum)" ] || fail "-n changes"

# One of the two; what was refused is not asked for again.
terminal 5 'y\nn\n' -f
[ "$(asked)" = 2 ] || fail "asked $(asked) times, not twice"
grep -q 'checking again' out || fail "the result was not looked at"
terminal 1 'Yes\n' -f
[ "$(asked)" = 1 ] || fail "the other one was not left"
terminal 0 '' -f
[ "$(asked)" = 0 ] || fail "asked about a volume without errors"

# Interrupted while it waits for an answer.
"$damage" image inode /file nlink 7
before=$(sum)
status=0
sleep 3 | timeout 60 script -qec \
	"timeout --foreground --preserve-status -s INT 1 '$bin/fsck.spaceweave' -f image" \
	/dev/null >out 2>&1 || status=$?
[ $status = 32 ] || fail "interrupted: status $status, not 32"
[ "$before" = "$(sum)" ] || fail "interrupted, and the image was changed"

# Progress: a line for each table with much in it, and an empty one over it.
rm image
"$bin/mkfs.spaceweave" -q image 16M
"$damage" image make
"$damage" image many 1500
terminal 0 '' -f
grep -q $'\rfiles: *[0-9]*% ([0-9]* of [0-9]*)' out || fail "no progress"
grep -q $'\r *\r' out || fail "progress was not wiped"
"$bin/fsck.spaceweave" -fn image >out 2>&1
grep -q '%' out && fail "progress where there is no terminal"
exit 0
