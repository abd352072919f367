"""Where others are faster: counted over all rows, so that none is left out of a text."""

from __future__ import annotations

from table_parts import (
    NAMES,
    Row,
    Words,
    case_and_run,
    digits,
    latest,
    markdown,
    marked,
    ours_by_run,
)

from flash_sparse_attn.bench.store import WHAT

_GRIDS = {"forward": "predecessors' grids, forward", "attention": "predecessors' grids, backward"}


def faster(whole: list[Row], grids: list[Row], words: Words) -> list[str]:
    """For each peer and kind of call, how often it is faster than ours of the same run, and where.

    Args:
        whole: Rows whose totals are compared, those of a GPU.
        grids: Rows of the predecessors' grids, each of which is about its last pass.
        words: Of the page.
    """
    lines = [*_count(whole, {}), *_count(grids, _GRIDS)]
    header = ["rows", "peer", "is faster in", "most of all", "by"]
    return markdown(header, lines) if lines else [words("no rows yet")]


def _count(rows: list[Row], titles: dict[str, str]) -> list[list[str]]:
    """Lines of one file; `titles` are those of rows that are about one pass, by `Case.what`."""
    ours = ours_by_run(rows)
    ratios: dict[tuple[str, str], list[tuple[float, Row]]] = {}
    for found in latest(rows).values():
        for name, row in found.items():
            own = ours.get(case_and_run(row))
            if name == "ours" or name not in NAMES or own is None:
                continue
            kind = next(kind for kind, what in WHAT.items() if what == row["what"])
            part = ("backward" if kind == "attention" else "forward") if titles else "total"
            ratio = own["seconds"][part] / row["seconds"][part]
            selects = row.get("mask", "selection") == "selection"
            title = titles.get(kind, row["what"] if selects else "bool masks, forward + backward")
            ratios.setdefault((title, NAMES[name]), []).append((ratio, own))
    lines = []
    for (title, name), of_peer in ratios.items():
        most, own = max(of_peer, key=lambda one: one[0])
        wins = sum(ratio > 1 for ratio, _ in of_peer)
        worst = [marked(own["case"], own), f"{digits(most)} times"] if wins else ["", ""]
        lines.append([title, name, f"{wins} of {len(of_peer)}", *worst])
    return lines
