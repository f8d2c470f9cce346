# SPDX-License-Identifier: BSD-2-Clause
# bash completion for spaceweave and its programs

_spaceweave_programs()
{
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
	local name=$1 words
	case $name in
	mkfs) words="-b -f -h -J -K -L -n -q -U -v -V" ;;
	fsck) words="-a -b -c -d -f -h -n -p -u -v -V -y" ;;
	mount) words="-d -f -h -o -s -V" ;;
	umount) words="-h -l -q -t" ;;
	undo) words="-f -h -n" ;;
	scrub) words="-h -q -r -s" ;;
	*) words=-h ;;
	esac
	case $name:$prev in
	mkfs:-b) words="4K 8K 16K 32K 64K" cur_only=1 ;;
	mkfs:-U) words="random time" cur_only=1 ;;
	mount:-o)
		words="ro rw dev nodev suid nosuid exec noexec atime noatime relatime nodiratime
			strictatime lazytime sync dirsync allow_other default_permissions
			fsname= commit= heartbeat= discard nodiscard cache= threads= poll=
			io_uring noio_uring" cur_only=1
		;;
	*)
		cur_only=
		[[ $cur == -* ]] || words=
		;;
	esac
	mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
	[ -n "$cur_only" ] ||
		mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -f -- "$cur")
}

_spaceweave()
{
	local cur_only=
	case ${COMP_WORDS[0]##*/} in
	*.spaceweave)
		local name=${COMP_WORDS[0]##*/}
		_spaceweave_programs "${name%.spaceweave}"
		return
		;;
	esac
	if [ "$COMP_CWORD" = 1 ]; then
		mapfile -t COMPREPLY < <(compgen -W "mkfs mount umount fsck scrub undo info map -h -V" -- \
			"${COMP_WORDS[1]}")
	else
		_spaceweave_programs "${COMP_WORDS[1]}"
	fi
}

complete -o filenames -F _spaceweave spaceweave mkfs.spaceweave fsck.spaceweave mount.spaceweave
