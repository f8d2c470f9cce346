# SPDX-License-Identifier: BSD-2-Clause
# For the scripts in tests/fsck: source it first. $bin has the programs, $damage
# breaks volumes, and $work goes when the script ends.
set -eu
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bin=${SPACEWEAVE_BIN:-$top/build/bin}
damage=${SPACEWEAVE_DAMAGE:-$top/build/tests/fsck/damage}
tmp=${TMPDIR:-/var/tmp}
[ -n "${TMPDIR:-}" ] || [ ! -w /dev/shm ] || tmp=/dev/shm
work=$(mktemp -d "$tmp/spaceweave-fsck.XXXXXX")
trap 'rm -rf "$work"' EXIT
