"""What rows of measurements show: two runs beside each other, and figures, from the rows alone."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from pathlib import Path
from typing import Any

from .console import format_bytes, format_seconds, table, write_whole
from .digest import is_stale
from .figures import FIGURES, latest, part_chart
from .store import Row, read_rows

PARTS = ("total", "selection", "forward", "backward")


def add_arguments(actions: Any) -> None:
    """Add `status`, `compare` and `plot` to the subcommands of `bench`."""
    status = actions.add_parser(
        "status", help="list the rows that were measured with other kernels than the present ones"
    )
    status.add_argument(
        "rows", type=Path, nargs="*", help="files of rows (default results/*.jsonl)"
    )
    status.set_defaults(run=_status)
    compare = actions.add_parser(
        "compare",
        help="two result files, or two commits in one file; status 1 after a regression",
    )
    compare.add_argument("before", help="a file of rows; with --rows a commit, or its first digits")
    compare.add_argument("after", help="likewise")
    compare.add_argument("--rows", type=Path, help="the file that holds the rows of both commits")
    compare.set_defaults(run=_compare)
    plot = actions.add_parser("plot", help="draw time against the size that varies, or a figure")
    plot.add_argument("rows", type=Path, nargs="+", help="files of rows")
    plot.add_argument("--out", type=Path, required=True, help="the picture, an .svg")
    plot.add_argument("--case", default="*", metavar="PATTERN", help="names of cases, * allowed")
    chosen = plot.add_mutually_exclusive_group()
    chosen.add_argument("--part", choices=PARTS, default="total", help="what is drawn")
    chosen.add_argument("--figure", choices=tuple(FIGURES), help="one of the documentation's")
    plot.set_defaults(run=_plot)
    for parser in (compare, plot):
        parser.set_defaults(error=parser.error)


REGRESSION = 1.05
"""How many times the former time is one, if the spreads of both lie apart."""
_SLOWER = "REGRESSION"


def change(before: Row, after: Row) -> str:
    """What became of a row, in a word; the spread over the runs of both is taken into account."""
    if not (after["spread"][1] < before["spread"][0] or after["spread"][0] > before["spread"][1]):
        return "within the spread"
    ratio = after["seconds"]["total"] / before["seconds"]["total"]
    if ratio <= 1:
        return "faster"
    return _SLOWER if ratio >= REGRESSION else "slower"


def comparison(before: list[Row], after: list[Row]) -> str:
    """A table of what both have, and notes on what makes it unfair."""
    old, new = latest(before), latest(after)
    lines, notes = [], set()
    for key in old:
        if key not in new:
            continue
        a, b = old[key], new[key]
        ratio = b["seconds"]["total"] / a["seconds"]["total"]
        lines.append(
            [
                *key,
                *(format_seconds(row["seconds"]["total"]) for row in (a, b)),
                f"{ratio:.2f}",
                change(a, b),
                *(format_bytes(row["peak_bytes"]) for row in (a, b)),
                *(f"{max(row['errors'].values()):.1e}" for row in (a, b)),
            ]
        )
        for what in ("hardware", "versions"):
            for name in sorted({*a[what], *b[what]}):
                values = [row[what].get(name) for row in (a, b)]
                if values[0] != values[1]:
                    notes.add(f"{what} differ: {name} {values[0]} and {values[1]}")
    pairs = ("memory", "after", "error", "after")
    header = ("case", "provider", "before", "after", "ratio", "", *pairs)
    names = [", ".join(sorted({row["commit"] for row in rows.values()})) for rows in (old, new)]
    alone = len(old.keys() ^ new.keys())
    return "\n".join(
        [
            f"commits {names[0] or '-'} and {names[1] or '-'}; totals, medians",
            table(header, lines),
            *sorted(notes),
            *([f"{alone} rows are in one of the two only"] if alone else []),
        ]
    )


def _status(arguments: argparse.Namespace) -> int:
    paths = arguments.rows or sorted(Path("results").glob("*.jsonl"))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        names = ", ".join(missing) or "results/*.jsonl"
        print(f"status: no file {names}; name files of rows", file=sys.stderr)
        return 2
    for path in paths:
        rows = last_of_each(read_rows(path))
        stale = [row for row in rows if is_stale(row)]
        print(f"{path}: {len(stale)} of {len(rows)} rows are stale")
        if stale:
            cells = [
                [row["case"], row["provider"], row["commit"], row.get("kernels", "not stated")]
                for row in stale
            ]
            print(table(("case", "provider", "commit", "kernels"), cells))
    return 0


def last_of_each(rows: list[Row]) -> list[Row]:
    """The last row of every case, provider, what was done, and training: its seed and lessons."""
    kept = {}
    for row in rows:
        what = row.get("what"), row.get("seed"), str(row.get("curriculum"))
        kept[row["case"], row["provider"], what] = row
    return list(kept.values())


def _compare(arguments: argparse.Namespace) -> int:
    sides = []
    for name in (arguments.before, arguments.after):
        path = arguments.rows or Path(name)
        if not path.is_file():
            arguments.error(
                f"no file {path}; name a file of rows, or a commit together with --rows"
            )
        rows = read_rows(path)
        if arguments.rows:
            rows = [row for row in rows if row["commit"].startswith(name)]
        sides.append(rows)
    if not latest(sides[0]).keys() & latest(sides[1]).keys():
        print("compare: the two have no case and provider in common", file=sys.stderr)
        return 2
    print(comparison(*sides))
    old, new = map(latest, sides)
    return int(any(change(old[key], new[key]) == _SLOWER for key in old.keys() & new.keys()))


def _plot(arguments: argparse.Namespace) -> int:
    if arguments.out.suffix != ".svg":
        arguments.error(f"--out: expected a name that ends with .svg, got {arguments.out}")
    rows = [row for path in arguments.rows for row in read_rows(path)]
    rows = [row for row in rows if fnmatch.fnmatch(row["case"], arguments.case)]
    if arguments.figure:
        chart, wanted = FIGURES[arguments.figure](rows), f"the figure {arguments.figure!r}"
    else:
        chart, wanted = part_chart(rows, arguments.part), arguments.part
    if chart is None:
        print(f"plot: no rows of cases {arguments.case} for {wanted}", file=sys.stderr)
        return 2
    write_whole(arguments.out, chart.svg().encode())
    print(f"{arguments.out}: {chart.title}, {len(chart.lines)} lines")
    return 0
