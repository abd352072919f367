"""Tables of the predecessors' grids: what their scripts time and compare."""

from __future__ import annotations

from collections.abc import Sequence

from table_parts import (
    NAMES,
    Row,
    Words,
    against,
    duration,
    latest,
    markdown,
    marked,
    ours_by_run,
    paragraphs,
    shape_of,
    source,
)

from flash_sparse_attn.bench import grids
from flash_sparse_attn.bench.cases import Case

TIMED, SAME = "predecessors.jsonl", "equivalence.jsonl"
"""Their files in results/."""


def forward(rows: list[Row], words: Words) -> list[str]:
    """The predecessors' forward table: lengths, batches, heads, head dimensions, windows."""
    return _grid(rows, [case for case in _forward_grid() if case.queries > 1], "forward", words)


def inference(rows: list[Row], words: Words) -> list[str]:
    """The predecessors' table of single queries."""
    return _grid(rows, [case for case in _forward_grid() if case.queries == 1], "forward", words)


def backward(rows: list[Row], words: Words) -> list[str]:
    """The predecessors' backward table."""
    cases = [case for dim in grids.HEAD_DIMS for case in grids.backward_performance(dim)]
    return _grid(rows, cases, "backward", words)


def _forward_grid() -> list[Case]:
    return [case for dim in grids.HEAD_DIMS for case in grids.forward_performance(dim)]


def _grid(rows: list[Row], cases: Sequence[Case], part: str, words: Words) -> list[str]:
    """One line for each configuration: the time of a pass, by provider."""
    known, runs = latest(rows), ours_by_run(rows)
    found = {case.name: known[case.name] for case in cases if "ours" in known.get(case.name, ())}
    if not found:
        return [words("no rows yet")]
    others = [n for n in NAMES if n != "ours" and any(n in one for one in found.values())]
    table = []
    for name, one in found.items():
        ours = one["ours"]
        shape = ours["shape"]
        cells = [name.split("-", 1)[1], f"{shape['batch']}, {shape_of(ours)[1]}"]
        cells += [f"{shape['queries']} x {shape['length']}, {shape['window']}"]
        cells += [marked(duration(ours["seconds"][part]), ours)]
        table.append([*cells, *(against(runs, one.get(other), words, part) for other in others)])
    header = ["configuration", "B, H / Hkv, D", "Q x N, W", "ours", *(NAMES[n] for n in others)]
    used = [row for one in found.values() for row in one.values() if row["provider"] in NAMES]
    missing = len(dict.fromkeys(case.name for case in cases)) - len(found)
    left_out = [f"{missing} configurations were not measured."] * (missing > 0)
    lines = [*left_out, *source(TIMED, used, words)]
    return [*markdown(header, table), "", *paragraphs(lines)]


def equivalence(rows: list[Row], words: Words) -> list[str]:
    """The predecessors' equivalence scripts: the largest error over what the error rule allows."""
    if not rows:
        return [words("no rows yet")]
    last = {(row["case"], row["provider"], row["what"]): row for row in rows}
    table = []
    for (case, provider, what), row in last.items():
        shares = {name: row["errors"][name] / row["allowed"][name] for name in row["errors"]}
        gradients = [share for name, share in shares.items() if name != "out"]
        cells = [case, marked(provider, row), what.removeprefix("equivalence, "), row["dtype"]]
        cells += [f"{shares['out']:.2f}", f"{max(gradients):.2f}" if gradients else ""]
        table.append([*cells, f"{min(row['inside'].values()):.2%}", _verdict(row)])
    header = ["configuration", "backend", "compared", "dtype", "out", "worst gradient"]
    header += ["inside the tolerance", ""]
    lines = source(SAME, last.values(), words)
    return [*markdown(header, table), "", *paragraphs(lines)]


def _verdict(row: Row) -> str:
    return "agrees" if row["agrees"] else "**differs**"
