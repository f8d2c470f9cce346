#!/bin/sh
# run.sh BINDIR: what `make run` does once all is built: spaceweave.img,
# formatted if it is not there, mounted on ./mnt.
set -eu

bin=$1
image=${IMAGE:-spaceweave.img}
dir=${DIR:-mnt}
here=$(pwd -P)

mounted() {
	awk -v d="$here/$dir" '$5 == d && / - fuse.spaceweave / { n = 1 } END { exit !n }' \
		/proc/self/mountinfo
}

# A mount whose daemon died stands in the way.
if mounted && ! stat "$dir/." >/dev/null 2>&1; then
	"$bin/spaceweave" umount -l "$dir"
fi
[ -e "$image" ] || "$bin/mkfs.spaceweave" "$image" 10G
if ! mounted; then
	mkdir -p "$dir"
	"$bin/spaceweave" mount "$image" "$dir"
fi

cat <<END

$image is mounted on ./$dir. It is a file system like any other: try

  cp -r tools $dir/ && ls -l $dir/tools
  df -h $dir
  $bin/spaceweave info $dir

To unmount it, and to check it afterwards:

  $bin/spaceweave umount $dir
  $bin/spaceweave fsck $image
END
