"""Figures of rows: what is drawn against what, chosen from the rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .cases import Case
from .chart import Chart
from .console import format_bytes, format_seconds
from .digest import WHY_STALE, is_stale
from .providers import PROVIDERS
from .store import WHAT, Row

SIZES = ("length", "window", "batch", "heads", "head_dim")
_STEP = WHAT["decode"]
_SHARES = {"forward": 4, "backward": 10}  # of the useful operations; see `Case.flops`


def latest(rows: list[Row]) -> dict[tuple[str, str], Row]:
    """The last timed row of every case and provider."""
    return {(row["case"], row["provider"]): row for row in rows if "seconds" in row}


def against(rows: list[Row], size: str) -> list[Row]:
    """The largest family of rows that differ in one size alone; empty if ours has but one.

    Of several families the one in which ours has most sizes, then the one with most work.
    """
    families: dict[str, list[Row]] = {}
    for row in latest(rows).values():
        if row["provider"] in ("ours", *_OTHERS) and row.get("pattern", "random") == "random":
            families.setdefault(str(_family(row, size)), []).append(row)

    def rank(family: list[Row]) -> tuple[int, float, str]:
        ours = [row for row in family if row["provider"] == "ours"]
        work = max((row["useful_flops"] for row in ours), default=0)
        return len({row["shape"][size] for row in ours}), work, str(_family(family[0], size))

    best = max(families.values(), key=rank, default=[])
    return best if best and rank(best)[0] > 1 else []


# What stands beside ours, in the order of colours.
_OTHERS = tuple(name for name in PROVIDERS if not name.startswith("ours") and name != "reference")


def _family(row: Row, size: str) -> list[object]:
    """Everything that decides the time of a row, but one size."""
    shape = {"queries": row["shape"]["length"], **row["shape"]}
    shape["queries"] = "all" if shape["queries"] == shape["length"] else shape["queries"]
    shape.pop(size)
    kind = [row["what"], row["dtype"], row.get("mask", "selection"), row.get("bias", "keys")]
    return [sorted(shape.items()), kind, row.get("l2_cache", "cold"), _machine(row)]


def length(rows: list[Row]) -> Chart | None:
    """Whole calls against the length of the text."""
    found = [row for row in rows if _queries(row) > 1]
    return _lines("Time against length", against(found, "length"), "length", _seconds)


def window(rows: list[Row]) -> Chart | None:
    """Whole calls against the number of keys that a query sees."""
    found = [row for row in rows if _queries(row) > 1]
    return _lines("Time against window", against(found, "window"), "window", _seconds)


def decode(rows: list[Row]) -> Chart | None:
    """One query against the number of keys."""
    found = [row for row in rows if _queries(row) == 1]
    return _lines("Decoding against context", against(found, "length"), "length", _seconds)


def memory(rows: list[Row]) -> Chart | None:
    """Memory above the inputs against the length of the text."""
    found = [row for row in rows if _queries(row) > 1 and row["peak_bytes"]]
    found = against(found, "length")
    return _lines("Memory against length", found, "length", lambda row: row["peak_bytes"])


def roofline(rows: list[Row]) -> Chart | None:
    """Useful operations a second of every pass of ours, against operations for each byte.

    Decoding steps as well. Bounds are measured ones: the fastest pass of any provider, and what the
    machine reached in a matrix product and in copying, where the rows say.
    """
    found = [
        row
        for row in latest(rows).values()
        if row["useful_flops"] and (_queries(row) > 1 or row["what"] == _STEP)
    ]
    ours: dict[str, list[tuple[float, float]]] = {}
    fastest, holder = 0.0, ""
    for row in found:
        traffic = case_of(row).pass_bytes()
        passes = {part: share for part, share in _SHARES.items() if part in row["seconds"]}
        for part, share in passes.items():
            work = row["useful_flops"] * share / sum(passes.values())
            speed = work / row["seconds"][part]
            if speed > fastest:
                fastest, holder = speed, f"{row['provider']}, {part}"
            if row["provider"] == "ours":
                name = f"ours, {_STEP if row['what'] == _STEP else part}"
                ours.setdefault(name, []).append((work / traffic[part], speed / 1e12))
    if not ours:
        return None
    levels, notes = {f"fastest pass of all: {holder}": fastest / 1e12}, []
    bounds = {}
    if measured := [row["ceilings"] for row in found if "ceilings" in row]:
        product, copy = (
            max(one[name] for one in measured) for name in ("flops_per_second", "bytes_per_second")
        )
        levels["matrix product"] = product / 1e12
        least = min(x for points in ours.values() for x, _ in points)
        if least < product / copy:
            bounds["copy"] = [
                (least, least * copy / 1e12),
                (product / copy, product / 1e12),
            ]
        notes.append(
            f"A copy reached {copy / 1e12:.3g} TB/s: at more than {product / copy:.3g} operations "
            "for each byte arithmetic is the limit."
        )
    return Chart(
        "Useful work of each pass",
        "useful operations for each byte that has to be moved",
        "useful TFLOP/s",
        {name: sorted(points) for name, points in ours.items()},
        [*_notes(found), *notes],
        is_connected=False,
        ceilings=levels,
        bounds=bounds,
    )


FIGURES: dict[str, Callable[[list[Row]], Chart | None]] = {
    "length": length,
    "window": window,
    "decode": decode,
    "memory": memory,
    "roofline": roofline,
}
"""The figures by name; of rows that do not hold what one shows, there is none."""


def series(rows: list[Row], part: str) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """The size that varies most, and for every provider its points (size, seconds), by size.

    Of several rows at one size the latest counts; other sizes that vary are not told apart, so
    rows should be chosen such that one varies.
    """
    chosen = [row for row in latest(rows).values() if part in row["seconds"]]
    size = max(SIZES, key=lambda name: len({row["shape"][name] for row in chosen}))
    return size, _points(chosen, size, lambda row: row["seconds"][part])


def part_chart(rows: list[Row], part: str) -> Chart | None:
    """The time of a part against the size that varies most."""
    size, lines = series(rows, part)
    if not lines:
        return None
    return _chart(f"{part.capitalize()} against {_words(size)}", lines, rows, size, "seconds")


def case_of(row: Row) -> Case:
    """The case that a row is of, as far as its traffic goes."""
    shape = row["shape"]
    sizes = {name: value for name, value in shape.items() if name != "queries"}
    return Case(
        row["case"],
        _what(row),
        **sizes,
        dtype=row["dtype"],
        query_length=_queries(row) if _queries(row) != shape["length"] else 0,
        mask=row.get("mask", "selection"),
        bias=row.get("bias", "keys"),
    )


def _what(row: Row) -> str:
    if row["what"] == _STEP:
        return "decode"
    return "attention" if "backward" in row["seconds"] else "forward"


def _lines(title: str, rows: list[Row], size: str, value: Callable[[Row], float]) -> Chart | None:
    if not rows:
        return None
    y_label = "bytes" if title.startswith("Memory") else "seconds"
    return _chart(title, _points(rows, size, value), rows, size, y_label)


def _chart(
    title: str,
    lines: dict[str, list[tuple[float, float]]],
    rows: list[Row],
    size: str,
    y_label: str,
) -> Chart:
    text = format_bytes if y_label == "bytes" else format_seconds
    return Chart(title, _words(size), y_label, lines, _notes(rows), _size_text, text)


def _points(
    rows: list[Row], size: str, value: Callable[[Row], float]
) -> dict[str, list[tuple[float, float]]]:
    """By provider, ours first; a later row of the same size replaces an earlier one."""
    order = {name: index for index, name in enumerate(("ours", *PROVIDERS))}
    points: dict[str, dict[float, float]] = {}
    for row in sorted(rows, key=lambda row: order.get(row["provider"], len(order))):
        points.setdefault(row["provider"], {})[row["shape"][size]] = value(row)
    return {name: sorted(found.items()) for name, found in points.items()}


def _notes(rows: Iterable[Row]) -> list[str]:
    """What was measured and where: shape, machine and commits."""
    rows = list(rows)
    kept = []
    for name in ("batch", "heads", "kv_heads", "head_dim", "length", "window"):
        found = {row["shape"][name] for row in rows}
        if len(found) == 1:
            kept.append(f"{_words(name)} {min(found)}")
    kept += sorted({row["dtype"] for row in rows})
    runs = sorted({f"{_machine(row)}, torch {row['versions']['torch']}" for row in rows})
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    stale = [f"Rows are {WHY_STALE}."] * any(map(is_stale, rows))
    return [", ".join(kept), *(f"{run}; commit {commits}" for run in runs), *stale]


def _machine(row: Row) -> str:
    return row["hardware"].get("gpu") or row["hardware"]["cpu"]


def _queries(row: Row) -> int:
    return row["shape"].get("queries", row["shape"]["length"])


def _seconds(row: Row) -> float:
    return row["seconds"]["total"]


def _words(size: str) -> str:
    return {"kv_heads": "KV heads"}.get(size, size.replace("_", " "))


def _size_text(value: float) -> str:
    """Powers of two as people write them."""
    for unit, count in (("M", 1 << 20), ("K", 1 << 10)):
        if value >= count:
            return f"{value / count:g}{unit}"
    return f"{value:g}"
