"""What rows of measurements show: two runs beside each other, and figures, from the rows alone."""

from __future__ import annotations

import argparse
import fnmatch
import io
import sys
from pathlib import Path
from typing import Any

from .console import format_bytes, format_seconds, table, write_whole
from .digest import is_stale
from .store import Row, read_rows

PARTS = ("total", "selection", "forward", "backward")
_SIZES = ("length", "window", "batch", "heads", "head_dim")


def add_arguments(actions: Any) -> None:
    """Add `status`, `compare` and `plot` to the subcommands of `bench`."""
    status = actions.add_parser(
        "status", help="list the rows that were measured with other kernels than the present ones"
    )
    status.add_argument(
        "rows", type=Path, nargs="*", help="files of rows (default results/*.jsonl)"
    )
    status.set_defaults(run=_status)
    compare = actions.add_parser("compare", help="two result files, or two commits in one file")
    compare.add_argument("before", help="a file of rows; with --rows a commit, or its first digits")
    compare.add_argument("after", help="likewise")
    compare.add_argument("--rows", type=Path, help="the file that holds the rows of both commits")
    compare.set_defaults(run=_compare)
    plot = actions.add_parser("plot", help="draw time against the size that varies")
    plot.add_argument("rows", type=Path, nargs="+", help="files of rows")
    plot.add_argument("--out", type=Path, required=True, help="the figure: .png, .svg or .pdf")
    plot.add_argument("--case", default="*", metavar="PATTERN", help="names of cases, * allowed")
    plot.add_argument("--part", choices=PARTS, default="total")
    plot.set_defaults(run=_plot)
    for parser in (compare, plot):
        parser.set_defaults(error=parser.error)


def latest(rows: list[Row]) -> dict[tuple[str, str], Row]:
    """The last timed row of every case and provider."""
    return {(row["case"], row["provider"]): row for row in rows if "seconds" in row}


def comparison(before: list[Row], after: list[Row]) -> str:
    """A table of what both have, and notes on what makes it unfair."""
    old, new = latest(before), latest(after)
    lines, notes = [], set()
    for key in old:
        if key not in new:
            continue
        a, b = old[key], new[key]
        ratio = b["seconds"]["total"] / a["seconds"]["total"]
        # Fastest and slowest run of one do not reach those of the other.
        apart = b["spread"][1] < a["spread"][0] or b["spread"][0] > a["spread"][1]
        lines.append(
            [
                *key,
                *(format_seconds(row["seconds"]["total"]) for row in (a, b)),
                f"{ratio:.2f}",
                ("slower" if ratio > 1 else "faster") if apart else "within the spread",
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
    """The last row of every case, provider and seed."""
    return list({(row["case"], row["provider"], row.get("seed")): row for row in rows}.values())


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
    return 0


def series(rows: list[Row], part: str) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """The size that varies most, and for every provider its points (size, seconds), by size.

    Of several rows at one size the latest counts; other sizes that vary are not told apart, so
    rows should be chosen such that one varies.
    """
    chosen = [row for row in latest(rows).values() if part in row["seconds"]]
    size = max(_SIZES, key=lambda name: len({row["shape"][name] for row in chosen}))
    points: dict[str, dict[float, float]] = {}
    for row in chosen:
        points.setdefault(row["provider"], {})[row["shape"][size]] = row["seconds"][part]
    return size, {name: sorted(found.items()) for name, found in points.items()}


def _plot(arguments: argparse.Namespace) -> int:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("plot: matplotlib is not installed; pip install matplotlib", file=sys.stderr)
        return 2
    rows = [row for path in arguments.rows for row in read_rows(path)]
    rows = [row for row in rows if fnmatch.fnmatch(row["case"], arguments.case)]
    size, lines = series(rows, arguments.part)
    if not lines:
        print(f"plot: no row has a case {arguments.case} and {arguments.part}", file=sys.stderr)
        return 2
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in sorted(lines.items()):
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel=size.replace("_", " "), ylabel=f"{arguments.part}, seconds")
    machines = {row["hardware"].get("gpu", row["hardware"]["cpu"]) for row in rows}
    commits = {row["commit"] for row in rows}
    axes.set_title(f"{', '.join(sorted(machines))}; commit {', '.join(sorted(commits))}", size=9)
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format=arguments.out.suffix.lstrip(".") or "png", dpi=150)
    write_whole(arguments.out, content.getvalue())
    print(f"{arguments.out}: {arguments.part} against {size}, {len(lines)} providers")
    return 0
