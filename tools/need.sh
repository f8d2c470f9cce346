#!/bin/sh
# need.sh PACKAGE...: install, through apt, those Debian packages that are not
# there, and say so; with sudo when not root. Silent when nothing is missing.
set -eu

missing=
if command -v dpkg-query >/dev/null 2>&1; then
	for p; do
		dpkg-query -W -f '${Status}\n' "$p" 2>/dev/null |
			grep -q ' installed$' || missing="$missing $p"
	done
fi
[ -n "$missing" ] || exit 0

sudo=
if [ "$(id -u)" != 0 ]; then
	sudo=sudo
	command -v sudo >/dev/null 2>&1 || {
		echo "need.sh: please install:$missing" >&2
		exit 1
	}
fi
echo "installing what is missing:${sudo:+ (with sudo)}$missing"
export DEBIAN_FRONTEND=noninteractive
quiet="$sudo apt-get -o Dpkg::Use-Pty=0 -qq"
# shellcheck disable=SC2086 # words are meant
if ! $quiet install -y --no-install-recommends $missing >/dev/null 2>&1; then
	# the lists may be old, or not there at all
	$quiet update >/dev/null
	$quiet install -y --no-install-recommends $missing >/dev/null
fi
