#!/bin/bash
# run.sh CASE: one case of broken volume. Its file `case` says, in bash,
#
#   damage COMMAND...    what to break (tests/fsck/damage.c), in this order
#   finds CODE...        what fsck -fn has to find, no more and no less
#   repaired_by p|y|none who repairs it: -p, only -y, or nothing here
#   keeps PATH...        what must be there after a repair
#   remembers            after a repair all is as it is now, to the last item
#   reads PATH BLK       after a repair this block can be read,
#   loses PATH BLK       or is refused
#
# Checking must change nothing and exit with 4. After a repair, which exits with
# 1, a second run must find nothing, nor one after the volume was written to. What
# -p must not repair it leaves alone.
# A repair is taken back in the end ("spaceweave undo"), to the last byte.
# `notes` instead of `finds`: no error, exit status 0 (with these notes).
. "$(dirname "$0")/lib.sh"
case=$(cd "$1" && pwd)
image=$work/image
want='' want_status=4 by=none data='' keep='' digest=''
looks=()

damage() { "$damage" "$image" "$@"; }
finds() { want=$*; }
notes() { want=$* want_status=0; }
repaired_by() { by=$1; }
keeps() { keep=$*; }
remembers() { digest=$(damage digest); }
reads() { looks+=("reads $*"); }
loses() { looks+=("lost $*"); }
with_data() { data=-c; }
size() { "$bin/mkfs.spaceweave" -qf "$@"; }

fail() {
	echo "FAILED: $*"
	[ ! -e "$work/out" ] || sed "s|$image|image|" "$work/out"
	exit 1
}

fsck() { # fsck WANTED-STATUS OPTIONS
	local want=$1 status=0
	shift
	timeout 60 "$bin/fsck.spaceweave" "$@" "$image" </dev/null >"$work/out" 2>&1 || status=$?
	[ $status = "$want" ] || fail "fsck $*: status $status, not $want"
}

# A volume with something of everything, the same for all cases.
"$bin/mkfs.spaceweave" -q "$image" 16M
damage make
# shellcheck source=/dev/null
. "$case/case"

before=$(sha256sum <"$image")
fsck $want_status -fn $data
found=$(sed -n 's/^[^ ]*: \([A-Z][0-9][0-9]\) .*/\1/p' "$work/out" | sort -u | tr '\n' ' ')
sed "s|$image|image|" "$work/out"
[ "$(echo $found)" = "$(echo $want | tr ' ' '\n' | sort -u | tr '\n' ' ' | sed 's/ $//')" ] ||
	fail "found '$found', not '$want'"
[ "$before" = "$(sha256sum <"$image")" ] || fail "-n has changed the image"
[ $want_status = 4 ] || exit 0

cp --sparse=always "$image" "$work/copy"
case $by in
p)
	fsck 1 -fp $data -u "$work/undo"
	fsck 0 -fn $data
	;;
y)
	status=0
	timeout 60 "$bin/fsck.spaceweave" -fp $data "$image" </dev/null >"$work/out" 2>&1 || status=$?
	[ $((status & ~1)) = 4 ] || fail "fsck -p: status $status, not 4 or 5"
	mv "$work/copy" "$image"
	fsck 1 -fy $data -u "$work/undo"
	sed "s|$image|image|" "$work/out"
	fsck 0 -fn $data
	;;
none)
	status=0
	timeout 60 "$bin/fsck.spaceweave" -fy $data "$image" </dev/null >"$work/out" 2>&1 || status=$?
	[ $((status & ~1)) = 4 ] || fail "fsck -y: status $status, not 4 or 5"
	;;
esac
for path in $keep; do
	damage has "$path" || fail "$path is gone"
done
[ -z "$digest" ] || [ "$digest" = "$(damage digest)" ] || fail "not all is as it was"
for look in "${looks[@]}"; do
	# shellcheck disable=SC2086 # words of its own
	damage $look 2>"$work/look" || { cat "$work/look"; fail "not so: $look"; }
done

[ $by != none ] || exit 0
# What is repaired can be written to.
cp --sparse=always "$image" "$work/copy"
"$damage" "$work/copy" scatter /written-since 2 2>"$work/out" || fail "it cannot be written to"
"$bin/fsck.spaceweave" -fn "$work/copy" >"$work/out" 2>&1 || fail "not clean once written to"

# A repair can be taken back, to the last byte.
"$bin/spaceweave" undo "$work/undo" "$image" >"$work/out" 2>&1 || fail "cannot be undone"
[ "$before" = "$(sha256sum <"$image")" ] || fail "undo did not bring back what was there"
