#!/bin/bash
# fsck.spaceweave: what it is asked and what it answers: options, exit statuses,
# what is no volume, one superblock (-b), a volume that somebody else has open.
. "$(dirname "$0")/lib.sh"
cd "$work"

fail() {
	echo "FAILED: $*"
	cat out
	exit 1
}

# fsck STATUS OPTIONS...
fsck() {
	local want=$1 status=0
	shift
	timeout 60 "$bin/fsck.spaceweave" "$@" </dev/null >out 2>&1 || status=$?
	[ $status = "$want" ] || fail "fsck $*: status $status, not $want"
}
says() { grep -q -- "$*" out || fail "it does not say '$*'"; }
silent() { ! grep -q -- "$*" out || fail "it says '$*'"; }

"$bin/mkfs.spaceweave" -q -L name image 16M
"$damage" image make
cp --sparse=always image good

# ---- usage
fsck 16
says usage:
fsck 16 image image
fsck 16 -x image
fsck 16 -n -y image
says 'only one of -n, -p and -y'
fsck 16 -a -n image
fsck 0 -p -a image
fsck 16 -b 4 image
says "superblock '4': 0, 1, 2 or 3"
fsck 16 -b 12 image
fsck 0 -h
says 'Exit status: 0 no errors'
fsck 0 -V
says Spaceweave
status=0
"$bin/fsck.spaceweave" -n image >/dev/full 2>out || status=$?
[ $status = 8 ] || fail "output cannot be written: status $status"
says 'cannot write to standard output'

# ---- no volume
fsck 8 -n none
says 'No such file'
fsck 8 -n /dev/null
says 'neither a regular file nor a block device'
: >empty
fsck 8 -n empty
says 'is not a Spaceweave volume'
truncate -s 2M empty
fsck 8 -y empty
says 'is not a Spaceweave volume'
cmp -n 2097152 empty /dev/zero || fail "it was written to"
for slot in 0 1; do "$damage" image super $slot version 99; done
fsck 8 -y image
says 'unknown version'
cp --sparse=always good image
for slot in 0 1; do "$damage" image super $slot incompat 64; done
fsck 8 -y image
says 'unknown incompatible feature'

# ---- how much it says
cp --sparse=always good image
fsck 0 -n image
says 'clean, '
fsck 0 -nv image
silent 'pass 4'
fsck 0 -fnv image
says 'pass 4, files: '
says 'pass 10, '
fsck 0 -nc image
says 'blocks of data verified'
"$damage" image dirty 3
"$damage" image node 0 0 0
fsck 4 -fn image
silent 'fsck.spaceweave: .*node at block'
fsck 4 -fnd image
says 'fsck.spaceweave: .*node at block .*: checksum does not match'
cp --sparse=always good image
"$damage" image inode /file nlink 2
"$damage" image inode-put 100000
"$damage" image release /sparse 0
fsck 4 -fn image
says 'inode [0-9]* has 2 links and 1 entry$'
says 'inode 100000 has 1 link, but no entry$'
says 'block [0-9]* is free in the bitmap, but owned$'
"$damage" image claim-free 20
fsck 4 -fn image
says 'blocks [0-9]* to [0-9]* are in use, but without an owner$'
cp --sparse=always good image
"$damage" image many 60
for i in $(seq 60); do
	"$damage" image dirent-put / "none$i" $((70000 + i)) 8
done
fsck 4 -fn image
[ "$(grep -c ': D07 .*entry' out)" = 50 ] || fail "not 50 sentences of a kind"
says 'D07 and 10 more of these (-v)'
fsck 4 -fnv image
[ "$(grep -c ': D07 .*entry' out)" = 60 ] || fail "-v does not say them all"
"$damage" image dirent-put / $'odd\n\\name' 80000 8
fsck 4 -fnv image
says "'odd\\\\012\\\\134name'"

# ---- one superblock
cp --sparse=always good image
for slot in 0 1 2 3; do
	fsck 0 -b $slot image
	says 'UUID .*, label .name.'
	says '16.0 MiB in blocks of 4096'
done
"$damage" image super 1 spoil
fsck 4 -b 1 image
says 'superblock 1: checksum does not match'
fsck 0 -b 0 image
fsck 0 -b 3 image
"$damage" image super 0 spoil
fsck 4 -b 0 image
fsck 0 -b 3 image
says 'backup 3 is good'
truncate -s 1M image
fsck 4 -b 3 image
truncate -s 90000 image
fsck 8 -b 2 image
says 'cannot read backup 2'

# ---- somebody has it open
busy() { # DAMAGE MILLISECONDS
	"$damage" image busy stop "$1" &
	pid=$!
	while [ ! -e stop.held ]; do sleep 0.02; done
}
let_go() {
	touch stop
	wait "$pid" || fail "the holder failed"
	rm -f stop stop.held
}
cp --sparse=always good image
busy -1
fsck 8 -y image
says 'is in use by damage on .*, process [0-9]*; only -n can check it'
fsck 0 -n image
says 'is in use by damage on .*: what is found may be in motion'
let_go
busy 0
for i in 1 2 3; do
	status=0
	timeout 60 "$bin/fsck.spaceweave" -nv image >out 2>&1 || status=$?
	case $status in
	0) ;;
	8) says 'changes too fast to be checked' ;;
	*) fail "a volume in motion: status $status" ;;
	esac
done
let_go
# Its errors count when it stands still, and are not told as long as it moves.
"$damage" image inode /file nlink 7
busy -1
fsck 4 -n image
says 'L01 '
let_go
busy 0
status=0
timeout 60 "$bin/fsck.spaceweave" -nv image >out 2>&1 || status=$?
case $status in
4) says 'L01 ' ;;
8)
	says 'the volume has moved on: once more'
	silent 'L01 '
	;;
*) fail "errors in motion: status $status" ;;
esac
let_go
fsck 1 -fy image
fsck 0 -fn image

# ---- blocks and volumes of any size: bitmaps cover more blocks than a chunk has
for block in 4096 8192 16384 32768 65536; do
	for size in 2M 16M 777M 50G 9T; do
		"$bin/mkfs.spaceweave" -qf -b $block sized $size
		fsck 0 -fn sized
		rm sized
	done
	"$bin/mkfs.spaceweave" -q -b $block sized 16M
	"$damage" sized make
	"$damage" sized many 1500
	"$damage" sized node 0 1 0
	fsck 1 -fy sized
	fsck 0 -fn sized
	rm sized
done

# ---- nothing but the head is left
truncate -s 600000 image
fsck 5 -fy image
says 'S13 no tree of files is left'
exit 0
