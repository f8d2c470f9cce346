#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# Images damaged at random: what is read is what was written, or an error; no
# daemon dies, nothing hangs; fsck looks without writing, repairs until it finds
# nothing, and undo takes that back; scrub finds what anybody else does.
# timeout: 14400
#
# IMAGES=n (8): how many, from SEED on. Every second one was not unmounted. A line
# for each; what is not as it should be is counted by kind and told in full. With
# KEEP=1 the images stay, those of a violation too: FROM=that folder uses them, so
# that a seed does again what it did.

. "$(dirname "$0")/lib.sh"
images=${IMAGES:-8}
for h in witness mangle; do
	[ -x "$helpers/$h" ] || skip "no $helpers/$h: make tests"
done
witness=$helpers/witness
limit=${LIMIT:-60}	# seconds that anything may take
declare -A count=([images]=0)
kinds="wrong-data dead-daemon hang mount fsck-n fsck-y not-idempotent undo scrub"

bad() { # KIND WORDS...
	local kind=$1
	shift
	count[$kind]=$((${count[$kind]:-0} + 1))
	echo "VIOLATION: SEED=$s IMAGES=1: $kind: $*"
	[ -z "${KEEP:-}" ] || cp --sparse=always "$work/mangled.img" "$work/violation.$s"
	[ ! -s "$work/out" ] || tail -n 15 "$work/out" | cut -c1-300
}

# limited COMMAND...: its status, in $status; its output in $work/out
limited() {
	status=0
	timeout -k 5 "$limit" "$@" >"$work/out" 2>&1 </dev/null || status=$?
	case $status in
	124 | 137) bad hang "$*" ;;
	13[0-9] | 14[0-9]) bad dead-daemon "$*: status $status" ;;
	esac
}

# on IMAGE OPTIONS: mounted, or not, in $mounted
on() {
	mounted=
	image=$1
	limited mount.spaceweave "$1" "$mnt" -o "$2"
	case $status in
	0) mounted=1 ;;
	32) ;;
	124 | 137) cut_off ;;
	*)
		bad mount "status $status"
		cut_off
		;;
	esac
}

cut_off() { # the mount of a daemon that hangs or is dead
	local p
	for p in $(grep -lzxF "$mnt" /proc/[0-9]*/cmdline 2>/dev/null | sed 's|/proc/||; s|/.*||'); do
		[ "$(cat "/proc/$p/comm" 2>/dev/null)" != mount.spaceweav ] || kill -KILL "$p" || true
	done
	umount -l "$mnt" 2>/dev/null || fusermount3 -uz "$mnt" 2>/dev/null || true
}

off() {
	limited stat -f "$mnt"
	case $status in
	0)
		limited spaceweave umount -q -t "$limit" "$mnt"
		[ $status = 0 ] || [ $status = 124 ] || bad hang "umount: status $status"
		;;
	124 | 137) ;;
	*) bad dead-daemon "mounted on $image" ;;
	esac
	! is_mounted "$mnt" || cut_off
}

# compare MODE [PROMISED|OLDER...]: $unread and $errors are what it counted
compare() {
	local mode=$1
	limited "$witness" compare "$mnt" "$work/$base.notes" "$@"
	cp "$work/out" "$work/compared"
	unread=$(sed -n 's/.* \([0-9]*\) unread.*/\1/p' "$work/out")
	errors=$(sed -n 's/.* \([0-9]*\) errors.*/\1/p' "$work/out")
	case $status in
	0 | 124 | 137) ;;
	3) bad dead-daemon "$1" ;;
	*) bad wrong-data "$1" ;;
	esac
	: "${unread:=0}" "${errors:=0}"
}

same_as() { # IMAGE WHEN: nobody has written since
	[ "$(stat -c '%y %s' "$1")" = "$2" ]
}

# check_only IMAGE: fsck -fn, which writes nothing; $n is its status
check_only() {
	local before
	before=$(stat -c '%y %s' "$1")
	limited fsck.spaceweave -fn "$1"
	n=$status
	cp "$work/out" "$work/checked"
	case $n in 0 | 4 | 8 | 12 | 124 | 137) ;; *) bad fsck-n "status $n" ;; esac
	same_as "$1" "$before" || bad fsck-n "it wrote"
}

one() { # SEED
	local kept was scrub said ro=refused rw=- y again after=refused repaired states
	s=$1
	base=clean
	[ $((s % 2)) = 0 ] || base=dirty
	cp --sparse=always "$work/$base" "$work/img"
	"$helpers/mangle" "$work/img" "$s" "$work/older" >"$work/mangled"
	said=$(paste -sd';' "$work/mangled")
	cp --sparse=always "$work/img" "$work/mangled.img"
	cp --sparse=always "$work/img" "$work/rw"

	limited spaceweave scrub -q -r 10G "$work/img"
	scrub=$status
	case $scrub in 0 | 4 | 8 | 12 | 124 | 137) ;; *) bad scrub "status $scrub" ;; esac

	# read-only
	check_only "$work/img"
	was=$(stat -c '%y %s' "$work/img")
	on "$work/img" ro
	if [ -n "$mounted" ]; then
		compare exact
		ro="$unread+$errors errors"
		off
		[ "$n" != 0 ] || [ "$errors" = 0 ] || bad fsck-n "it finds nothing, but there are $errors errors"
		[ "$scrub" != 0 ] || [ "$unread$errors" = 00 ] || bad scrub "it finds nothing, but reading did"
	else
		[ "$n" != 0 ] || bad fsck-n "it finds nothing, but the image is not mounted: $(cat "$work/out")"
	fi
	[ "$scrub" != 0 ] || [ "$n" = 0 ] || bad scrub "it finds nothing, but fsck does: $(cat "$work/checked")"
	same_as "$work/img" "$was" || bad mount "read-only, it wrote"

	# and used
	on "$work/rw" rw
	if [ -n "$mounted" ]; then
		# changed at once, or when all has been read
		rw=
		if [ $((s % 3)) = 0 ]; then
			compare exact
			rw="$unread+$errors, "
		fi
		limited "$witness" change "$mnt"
		case $status in
		0 | 124 | 137) ;;
		3) bad dead-daemon "change" ;;
		*) bad wrong-data "change: status $status" ;;
		esac
		grep '^[a-z/]*new\.' "$work/out" >"$work/promised" || true
		rw="$rw$(wc -l <"$work/promised") new"
		compare changed "$work/promised"
		rw="$rw, $unread+$errors"
		off
		on "$work/rw" ro
		if [ -n "$mounted" ]; then
			compare changed "$work/promised"
			rw="$rw, $unread+$errors"
			off
		else
			rw="$rw, refused"
		fi
		check_only "$work/rw"
	fi

	# repaired, the one or the other
	repaired=$work/img
	kept=$work/mangled.img
	if [ $((s % 4)) -ge 2 ]; then
		repaired=$work/rw
		kept=$work/kept
		cp --sparse=always "$repaired" "$kept"
	fi
	rm -f "$work/undo"
	limited fsck.spaceweave -fy -u "$work/undo" "$repaired"
	y=$status
	cp "$work/out" "$work/repaired"
	case $y in 0 | 1 | 4 | 5 | 8 | 9 | 12 | 13 | 124 | 137) ;; *) bad fsck-y "status $y" ;; esac
	[ "$y" -lt 4 ] || {
		count[left]=$((${count[left]:-0} + 1))
		sed 's/^/  | /' "$work/repaired" | tail -n 8
	}
	check_only "$repaired"
	again=$n
	case $y in
	0 | 1) [ "$again" = 0 ] || bad not-idempotent "-y $y, then -n $again: $(cat "$work/repaired")" ;;
	esac
	on "$repaired" ro
	if [ -n "$mounted" ]; then
		# Where it says so, what was deleted may be there again: before the
		# crash, or before the mount that was closed in peace.
		if grep -q 'may be older' "$work/repaired"; then
			states=("$work/older.notes")
			[ "$base" = clean ] || states=("$work/clean.notes" "${states[@]}")
			compare repaired "${states[@]}"
			count[older]=$((${count[older]:-0} + 1))
		else
			compare repaired
		fi
		after="$(sed -n '$s/.*blocks, //p' "$work/out")"
		off
		[ "$again" != 0 ] || [ "$errors" = 0 ] || bad fsck-n "repaired, it finds nothing, but there are $errors errors"
	else
		case $y in 0 | 1) bad mount "refused after fsck -y exited with $y" ;; esac
	fi
	if [ -e "$work/undo" ]; then
		limited spaceweave undo "$work/undo" "$repaired"
		[ $status = 0 ] || bad undo "status $status"
	fi
	cmp -s "$repaired" "$kept" || bad undo "not what it was"
	count[images]=$((count[images] + 1))
	echo "$s $base: ${said:0:160}: scrub $scrub; ro $ro; rw $rw; -y $y, -n $again; $after"
}

# An earlier state, a clean one, and one that the daemon was killed in.
make_images() {
	format 64M
	start
	"$witness" make "$mnt" 1
	stop
	cp --sparse=always "$image" "$work/older"
	start
	"$witness" make "$mnt" 2
	rm -r "$mnt"/many.1/*1 "$mnt"/sparse.1.1* "$mnt"/clone.1.3
	mv "$mnt/deep.1" "$mnt/many.2/deeper"
	stop
	cp --sparse=always "$image" "$work/clean"
	start -o ro
	"$witness" note "$mnt" "$work/clean.notes"
	stop
	start -o commit=1
	rm -r "$mnt"/many.2/*3 "$mnt"/sparse.2.2
	mkdir "$mnt/late"
	"$witness" make "$mnt/late" 2
	mv "$mnt/many.2" "$mnt/late/moved"
	sync -f "$mnt"
	sync "$mnt"
	"$witness" note "$mnt" "$work/dirty.notes"
	# What was durable last is attested by what follows it, a mark when all is quiet.
	sleep 3
	pid=$(daemon_pid)
	kill -KILL "$pid"
	umount -l "$mnt" 2>/dev/null || fusermount3 -uz "$mnt"
	while kill -0 "$pid" 2>/dev/null; do sleep 0.01; done
	cp --sparse=always "$image" "$work/dirty"
}

if [ -n "${FROM:-}" ]; then
	for f in older clean dirty clean.notes dirty.notes; do
		cp --sparse=always "$FROM/$f" "$work/"
	done
else
	make_images
fi
s=0
on "$work/older" ro
limited "$witness" note "$mnt" "$work/older.notes"
off
for base in clean dirty; do
	on "$work/$base" ro
	compare exact
	off
	grep -q ' 0 unread, 0 errors, .* 0 wrong' "$work/compared" || fail "undamaged: $(cat "$work/compared")"
done

for ((n_seed = 0; n_seed < images; n_seed++)); do
	one $((seed + n_seed))
done
echo "${count[images]} images; after fsck -y ${count[left]:-0} are not whole, ${count[older]:-0} may be older in part"
total=0
for k in $kinds; do
	echo "$k: ${count[$k]:-0}"
	total=$((total + ${count[$k]:-0}))
done
[ $total = 0 ] || fail "$total violations"
