#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-2-Clause
"""Draw results.json of bench.py as an SVG: speed relative to the null FUSE server.

    chart.py results.json > chart.svg

One dot a file system in each row, on a logarithmic scale: right is faster. For
rows measured in seconds the ratio is turned round, so that right is faster too.
"""
import json
import math
import sys
from html import escape

COLOURS = {"spaceweave": "#d1495b", "null-bare": "#b8b8b8", "fuse2fs": "#edae49",
           "ntfs-3g": "#66a182", "ext4": "#2e4057", "xfs": "#8d96a3"}
LEFT, RIGHT, ROW, TOP = 230, 30, 22, 74
WIDTH = 860
LESS = ("seconds", "p50_us", "p99_us")


def draw(result):
    rows = []
    for row in result["rows"].values():
        base = row["median"].get("null")
        if not base or row["field"] in ("ratio", "mib"):
            continue
        points = {n: base / v if row["field"] in LESS else v / base
                  for n, v in row["median"].items() if n != "null" and v}
        if points:
            rows.append((row["title"], points))
    names = [n for n in COLOURS if any(n in p for _, p in rows)]
    values = [v for _, p in rows for v in p.values()] or [1]
    low = min(-1, math.floor(math.log10(min(values)) * 2) / 2)
    high = max(1, math.ceil(math.log10(max(values)) * 2) / 2)
    height = TOP + ROW * len(rows) + 40

    def x(v):
        return LEFT + (math.log10(v) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" '
           'viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">' %
           (WIDTH, height, WIDTH, height),
           '<rect width="100%" height="100%" fill="#ffffff"/>',
           '<text x="16" y="24" font-size="16" font-weight="bold" fill="#222222">'
           'Speed relative to a FUSE server that does nothing (right is faster)</text>']
    at = 16
    for n in names:
        out.append('<circle cx="%d" cy="46" r="5" fill="%s"/>' % (at + 5, COLOURS[n]))
        out.append('<text x="%d" y="50" fill="#222222">%s</text>' % (at + 15, escape(n)))
        at += 32 + 7 * len(n)
    bottom = TOP + ROW * len(rows)
    for e in range(math.ceil(low), math.floor(high) + 1):
        v = 10.0 ** e
        out.append('<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="%s"/>' %
                   (x(v), TOP - 8, x(v), bottom, "#222222" if e == 0 else "#dddddd"))
        out.append('<text x="%.1f" y="%d" text-anchor="middle" fill="#555555">%s</text>' %
                   (x(v), bottom + 16, "null server" if e == 0 else "%g" % v))
    for i, (title, points) in enumerate(rows):
        y = TOP + ROW * i + ROW // 2
        if i % 2 == 0:
            out.append('<rect x="0" y="%d" width="%d" height="%d" fill="#000000" '
                       'fill-opacity="0.03"/>' % (y - ROW // 2, WIDTH, ROW))
        out.append('<text x="%d" y="%d" text-anchor="end" fill="#222222">%s</text>' %
                   (LEFT - 12, y + 4, escape(title)))
        for n in reversed(names):
            if n in points:
                out.append('<circle cx="%.1f" cy="%d" r="%d" fill="%s"><title>%s: %.2f'
                           '</title></circle>' % (x(points[n]), y, 6 if n == "spaceweave" else 5,
                                                  COLOURS[n], escape(n), points[n]))
    m = result["machine"]
    out.append('<text x="16" y="%d" fill="#555555" font-size="10">%s</text>' %
               (height - 8, escape("Linux %s, %d CPUs, %s" % (m["kernel"], m["cpus"],
                                                              m["date"]))))
    out.append("</svg>")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: chart.py results.json > chart.svg")
    with open(sys.argv[1]) as source:
        sys.stdout.write(draw(json.load(source)))
