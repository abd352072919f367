"""Write the tables of README.md, README_zh.md and docs/ from the rows in results/, and figures.

    python scripts/tables.py            write them
    python scripts/tables.py --check    say what is out of date, and write nothing

The figures are the files of docs/figures, byte for byte the same for the same rows; those for which
there are no rows yet do not exist.

A table stands between a line ``<!-- rows: NAME -->`` and the next ``<!-- end of rows -->``, and
says below itself which machine, versions, commit and command its rows have. The last row of every
case and provider counts; ratios are made within one run only. What was measured with other kernels
than those of the present sources is marked. The table ``support`` is made of tests, by support.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
import grid_tables
import peer_tables
import quality_tables
import support
import table_parts
from table_parts import (
    NAMES,
    Row,
    Words,
    against,
    digits,
    duration,
    latest,
    markdown,
    marked,
    ours_by_run,
    paragraphs,
    shape_of,
    size,
    source,
)

from flash_sparse_attn.bench.figures import FIGURES as CHARTS
from flash_sparse_attn.bench.results import last_of_each

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
FIGURES = ROOT / "docs" / "figures"
BLOCK = re.compile(r"(<!-- rows: ([a-z-]+) -->\n)(.*?)(<!-- end of rows -->)", re.DOTALL)


def all_rows(name: str) -> list[Row]:
    """The rows of a file in results/, in the order they were measured."""
    path = RESULTS / name
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line]


def read_rows(name: str) -> list[Row]:
    """Those that were timed."""
    return [row for row in all_rows(name) if "seconds" in row]


def _seconds(row: Row) -> dict[str, float]:
    """The times of a row; what selects nothing has none for that."""
    times = dict(row["seconds"])
    if row["provider"] == "sdpa-causal":
        times.pop("selection", None)
    return times


def headline(words: Words) -> list[str]:
    """Selections from random scores on a GPU, whole calls, against what else one could use."""
    cases = [case for case in _of_random_scores() if not _is_of_window(case["ours"])]
    cases.sort(key=lambda found: _work(found["ours"]))
    return _beside("h200.jsonl", cases, words)


def windows(words: Words) -> list[str]:
    """The same text with windows of all sizes."""
    cases = [found for found in _of_random_scores() if _is_of_window(found["ours"])]
    sizes = [_without_window(found["ours"]) for found in cases]
    cases += [
        found
        for found in _of_random_scores()
        if not _is_of_window(found["ours"]) and _without_window(found["ours"]) in sizes
    ]
    cases.sort(key=lambda found: found["ours"]["shape"]["window"])
    return _beside("h200.jsonl", cases, words)


def _of_random_scores() -> list[dict[str, Row]]:
    """Whole calls on a GPU with a selection from random scores and a cold cache, by provider."""
    return [
        providers
        for providers in latest(read_rows("h200.jsonl")).values()
        if "ours" in providers
        and providers["ours"].get("mask", "selection") == "selection"
        and providers["ours"].get("l2_cache", "cold") == "cold"
        and providers["ours"]["pattern"] == "random"
        and "backward" in providers["ours"]["seconds"]
    ]


def _is_of_window(row: Row) -> bool:
    return row["case"].startswith("gpu-window-")


def _without_window(row: Row) -> dict[str, int]:
    return {name: value for name, value in row["shape"].items() if name != "window"}


def decoding(words: Words) -> list[str]:
    """One more token on a GPU after texts of all lengths."""
    rows = [row for row in read_rows("h200.jsonl") if "cache_bytes" in row]
    cases = [found for found in latest(rows).values() if "ours" in found]
    if not cases:
        return [words("no rows yet")]
    cases.sort(key=lambda found: (found["ours"].get("l2_cache", ""), _work(found["ours"])))
    ours, table = ours_by_run(rows), []
    for found in cases:
        own, dense = found["ours"], found.get("sdpa-causal")
        shape = own["shape"]
        cells = [
            f"{shape['length']:,}",
            str(shape["batch"]),
            shape_of(own)[1],
            str(shape["window"]),
        ]
        cells += [own.get("l2_cache", ""), marked(duration(own["seconds"]["total"]), own)]
        cells += [size(own["cache_bytes"]), against(ours, dense, words)]
        table.append([*cells, size(dense["cache_bytes"]) if dense else ""])
    header = ["tokens", "sequences", "heads, D", "W", "L2 cache", "step", "its cache"]
    header += ["dense SDPA over all tokens", "its cache"]
    used = [row for found in cases for row in found.values()]
    return [*markdown(header, table), "", *paragraphs(source("h200.jsonl", used, words))]


def bool_masks(words: Words) -> list[str]:
    """Bool masks on a GPU, by what they are."""
    cases = [
        providers
        for providers in latest(read_rows("h200.jsonl")).values()
        if "ours" in providers and providers["ours"].get("mask", "selection") != "selection"
    ]
    cases.sort(key=lambda found: found["ours"]["case"])
    return _beside("h200.jsonl", cases, words, named=True)


def _work(row: Row) -> tuple[int, int]:
    return row["shape"]["heads"] * row["shape"]["head_dim"], row["shape"]["length"]


def _beside(name: str, cases: list[dict[str, Row]], words: Words, named: bool = False) -> list[str]:
    """One line for each case: our parts, and the totals of the others."""
    if not cases:
        return [words("no rows yet")]
    others = [other for other in NAMES if other != "ours" and any(other in c for c in cases)]
    parts = ("selection", "forward", "backward")
    header = [words(text) for text in ("length N, window W", "heads, D")]
    header += [words(text) for text in ("selection and plan", "forward", "backward", "all")]
    header += [words(NAMES[other]) for other in others]
    lines, runs = [], ours_by_run(read_rows(name))
    for found in cases:
        ours = found["ours"]
        seconds = ours["seconds"]
        cells = [*shape_of(ours), *(duration(seconds.get(part)) for part in parts)]
        cells += [marked(duration(seconds["total"]), ours)]
        cells += [against(runs, found.get(other), words) for other in others]
        lines.append([ours["case"], *cells] if named else cells)
    used = [row for found in cases for row in found.values() if row["provider"] in NAMES]
    header = ["case", *header] if named else header
    return [*markdown(header, lines), "", *paragraphs(source(name, used, words))]


def on_cpu(words: Words) -> list[str]:
    """Whole calls on CPU cores with random scores, by provider."""
    return _cpu_table("cpu-16k-random", words)


def patterns_on_cpu(words: Words) -> list[str]:
    """The same with every pattern of scores."""
    return _cpu_table("cpu-16k-", words)


def _cpu_table(prefix: str, words: Words) -> list[str]:
    """One line for every case that begins so, and provider."""
    rows = [
        row
        for providers in latest(read_rows("cpu.jsonl")).values()
        for row in providers.values()
        if row["case"].startswith(prefix)
    ]
    if not rows:
        return [words("no rows yet")]
    header = ["scores", "computed by", "selection and plan", "forward", "backward", "all"]
    header += ["fastest to slowest", "peak memory"]
    lines = []
    for row in rows:
        provider: str = row["provider"]
        seconds, (fastest, slowest) = _seconds(row), row["spread"]
        parts = (seconds.get(part) for part in ("selection", "forward", "backward", "total"))
        lines.append(
            [
                row["pattern"],
                marked(words(NAMES.get(provider, provider)), row),
                *(duration(part) for part in parts),
                f"{duration(fastest)} .. {duration(slowest)}" if row["repeats"] > 1 else "",
                size(row["peak_bytes"]),
            ]
        )
    table = markdown([words(text) for text in header], lines)
    return [*table, "", *paragraphs(source("cpu.jsonl", rows, words))]


def everything(words: Words) -> list[str]:
    """The last row of every case and provider of every file but those of the predecessors' grids.

    Their tables are whole already.
    """
    lines: list[str] = []
    for path in sorted(RESULTS.glob("*.jsonl")):
        if path.name == grid_tables.TIMED:
            continue
        rows = [row for found in latest(read_rows(path.name)).values() for row in found.values()]
        if not rows:
            continue
        header = ["case", "computed by", "B, H / Hkv, D", "Q x N, W", "dtype", "selection"]
        header += ["forward", "backward", "all", "repeats", "GFLOP/s", "peak memory", "error"]
        table = []
        for row in rows:
            shape, seconds = row["shape"], _seconds(row)
            parts = (seconds.get(part) for part in ("selection", "forward", "backward", "total"))
            useful = row.get("useful_gflops_per_second")
            table.append(
                [
                    row["case"],
                    marked(row["provider"], row),
                    f"{shape['batch']}, {shape['heads']} / {shape['kv_heads']}, "
                    f"{shape['head_dim']}",
                    f"{shape.get('queries', shape['length'])} x {shape['length']}, "
                    f"{shape['window']}",
                    row["dtype"],
                    *(duration(part) for part in parts),
                    str(row["repeats"]),
                    digits(useful) if useful else "",
                    size(row["peak_bytes"]),
                    f"{max(row['errors'].values()):.1e}",
                ]
            )
        lines += [f"## results/{path.name}", "", *markdown(header, table), ""]
        lines += [*paragraphs(source(path.name, rows, words)), ""]
    return lines[:-1] or [words("no rows yet")]


def runs(words: Words) -> list[str]:
    """Every command that made rows of `last_of_each`: how many, and in what time."""
    lines = []
    for path in sorted(RESULTS.glob("*.jsonl")):
        by_run: dict[tuple[str, ...], list[Row]] = {}
        for row in last_of_each(all_rows(path.name)):
            by_run.setdefault(table_parts.run_of(row), []).append(row)
        for (machine, _, commit, day, command), rows in by_run.items():
            known = [row["elapsed_seconds"] for row in rows if "elapsed_seconds" in row]
            took = f"{max(known):.0f} s" if len(known) == len(rows) else ""
            cells = [f"`{command}`", path.name, machine, f"{commit}, {day}"]
            lines.append([*cells, str(len(rows)), took])
    header = ["command", "rows of", "machine", "commit", "rows", "took"]
    return markdown(header, lines) if lines else [words("no rows yet")]


def features(words: Words) -> list[str]:
    """What works on which devices, by the tests that show it."""
    header, lines = support.table()
    return markdown([words(text) for text in header], lines)


def pictures() -> dict[str, tuple[str, str]]:
    """Every figure by file name: its title, and its SVG."""
    rows = read_rows("h200.jsonl")
    drawn = {name: draw(rows) for name, draw in CHARTS.items()}
    charts = {name: chart for name, chart in drawn.items() if chart is not None}
    charts |= quality_tables.charts(all_rows(quality_tables.GPU), "curve")
    charts |= quality_tables.charts(all_rows(quality_tables.CPU), "curve-cpu")
    return {f"{name}.svg": (chart.title, chart.svg()) for name, chart in charts.items()}


def figures(words: Words, of: str = "") -> list[str]:
    """Pictures, for a page in docs/: of time and memory, or those whose names begin with `of`."""
    shown = [
        f"![{title}]({FIGURES.name}/{name})"
        for name, (title, _) in pictures().items()
        if (name.startswith(of) if of else name.removesuffix(".svg") in CHARTS)
    ]
    return paragraphs(shown) or [words("no rows yet")]


def faster_peers(words: Words) -> list[str]:
    """How often others are faster."""
    return peer_tables.faster(read_rows("h200.jsonl"), read_rows(grid_tables.TIMED), words)


def _of(make: Callable[[list[Row], Words], list[str]], name: str, words: Words) -> list[str]:
    """A table of all rows of a file."""
    return make(all_rows(name), words)


TABLES: dict[str, Callable[[Words], list[str]]] = {
    "headline": headline,
    "windows": windows,
    "decoding": decoding,
    "predecessors-forward": partial(_of, grid_tables.forward, grid_tables.TIMED),
    "predecessors-inference": partial(_of, grid_tables.inference, grid_tables.TIMED),
    "predecessors-backward": partial(_of, grid_tables.backward, grid_tables.TIMED),
    "equivalence": partial(_of, grid_tables.equivalence, grid_tables.SAME),
    "bool-masks": bool_masks,
    "faster-peers": faster_peers,
    "cpu": on_cpu,
    "cpu-patterns": patterns_on_cpu,
    "runs": runs,
    "everything": everything,
    "quality-recall": partial(_of, quality_tables.recall, quality_tables.GPU),
    "quality-text": partial(_of, quality_tables.text, quality_tables.GPU),
    "quality-curves": partial(figures, of="curve-"),
    "quality-cpu": partial(_of, quality_tables.recall_on_cpu, quality_tables.CPU),
    "support": features,
    "figures": figures,
}


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def renewed(page: Path) -> str:
    """The text of a page with its tables made anew."""
    words = Words(page)

    def table(match: re.Match[str]) -> str:
        return match[1] + "\n".join(["", *TABLES[match[2]](words), "", match[4]])

    return BLOCK.sub(table, page.read_text(encoding="utf-8"))


def main(arguments: Sequence[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    due = {page: renewed(page) for page in pages()}
    due |= {FIGURES / name: svg for name, (_, svg) in pictures().items()}
    changed = [path for path, text in due.items() if not _holds(path, text)]
    old = set(FIGURES.glob("*")) - due.keys()
    for path in (*changed, *sorted(old)):
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        if arguments:
            print(f"{name}: not what results/ and tests/ give; run python scripts/tables.py")
        elif path in old:
            path.unlink()
            print(f"{name}: removed, there are no rows for it")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(due[path], encoding="utf-8")
            print(f"{name}: written")
    return bool(arguments and (changed or old))


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
