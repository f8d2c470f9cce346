#!/bin/sh
# SPDX-License-Identifier: BSD-2-Clause
# coverage.sh BUILD: what the tests that have run reached, of a build made with
# --coverage. Prints a table of the files that keep the promise, room by room,
# and fails if they miss the goal: 95 % of lines, 85 % of branches. Everything,
# with the lines that were missed, is in BUILD/coverage.txt.
#
# The only branch left out is an assertion's other side, which no test may take.
set -eu
cd "$(dirname "$0")/.."
build=$1

gcovr -r . --object-directory "$build" -e tests/ \
	--exclude-branches-by-pattern '.*assert\(.*' \
	--txt "$build/coverage.txt" --csv "$build/coverage.csv"
awk -F, '
function room(file) {
	if (file ~ /^meta\/(journal|held)\.c$/) return 1
	if (file ~ /^meta\/(checkpoint|space|pool|volume|mmp|format|repair)\.c$/) return 2
	if (file ~ /^meta\/(tree|txn)\.c$/) return 3
	if (file ~ /^alloc\/.*\.c$/) return 4
	if (file ~ /^tools\/(fsck.*|pass.*|problem|undo)\.c$/) return 5
	return 0
}
function row(name, l, lines, b, branches) {
	printf "%-24s %6d of %6d  %5.1f %%   %6d of %6d  %5.1f %%\n", name,
		l, lines, lines ? 100 * l / lines : 0,
		b, branches, branches ? 100 * b / branches : 0
}
function add(i, l, lines, b, branches) {
	sum[i, 1] += l; sum[i, 2] += lines; sum[i, 3] += b; sum[i, 4] += branches
}
function total(i, name) { row(name, sum[i, 1], sum[i, 2], sum[i, 3], sum[i, 4]) }
BEGIN {
	split("journal checkpoint trees allocator fsck", names, " ")
	printf "%-24s %25s   %25s\n", "", "lines", "branches"
}
NR > 1 && (r = room($1)) {
	text[r] = text[r] $0 "\n"
	add(r, $3, $2, $6, $5)
	add(0, $3, $2, $6, $5)
}
END {
	for (r = 1; r <= 5; r++) {
		n = split(text[r], file, "\n")
		for (i = 1; i < n; i++) {
			split(file[i], f, ",")
			row("  " f[1], f[3], f[2], f[6], f[5])
		}
		total(r, names[r])
	}
	total(0, "all")
	good = sum[0, 1] >= .95 * sum[0, 2] && sum[0, 3] >= .85 * sum[0, 4]
	print "goal: 95 % of lines, 85 % of branches:", good ? "met" : "missed"
	exit !good
}' "$build/coverage.csv"
