"""What the measurements are held against: every verdict is computed from rows of one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .cases import GPU_PATTERNS, PATTERNS
from .console import format_bytes, format_seconds
from .store import Row

# Seconds that parts of a case may take on one H200.
_LIMITS = {
    "gpu-a": {"selection": 80e-6, "forward": 75e-6, "backward": 220e-6},
    "gpu-b": {"selection": 200e-6, "forward": 3.0e-3, "backward": 8.5e-3},
    "gpu-c": {"selection": 0.5e-3},
    "gpu-1m": {"selection": 4e-3, "total": 0.5},
}
# How many times faster than dense causal SDPA, on GPUs, everything included.
_FASTER_THAN_DENSE = {"gpu-c": 16, "gpu-8192": 1.25, "gpu-4096": 1}
_WITH_FLEX = ("gpu-2048", "gpu-4096", "gpu-8192", "gpu-16384", "gpu-a", "gpu-b")


@dataclass(frozen=True)
class Verdict:
    """One yardstick: its text, what was measured, and whether it holds."""

    text: str
    measured: str
    holds: bool

    def __str__(self) -> str:
        return f"{'met   ' if self.holds else 'MISSED'}  {self.text}: {self.measured}"


def verdicts(rows: list[Row]) -> list[Verdict]:
    """The verdicts for which `rows` hold the measurements; the latest row of each kind counts."""
    latest = {(row["case"], row["provider"]): row for row in rows}
    found: list[Verdict] = []

    def compare(
        base: tuple[str, str], other: tuple[str, str], make: Callable[[Row, Row], Verdict]
    ) -> None:
        if base in latest and other in latest:
            found.append(make(latest[base], latest[other]))

    ours, masked, causal = (("cpu-16k-random", p) for p in ("ours", "sdpa-masked", "sdpa-causal"))
    compare(ours, masked, lambda a, b: _faster("SDPA with materialised mask and bias", a, b, 15))
    compare(ours, masked, _tenth_of_memory)
    compare(ours, causal, lambda a, b: _faster("plain dense causal SDPA", a, b, 10))
    for pattern in PATTERNS[1:]:
        compare(ours, (f"cpu-16k-{pattern}", "ours"), _independent_of_data)
    if row := latest.get(("cpu-select-1m", "ours")):
        found += _selection(row)

    for case, limits in _LIMITS.items():
        if row := latest.get((case, "ours")):
            found += [_within(row, part, limit) for part, limit in limits.items()]
    for case, factor in _FASTER_THAN_DENSE.items():
        than_dense = partial(_faster, "dense causal SDPA", factor=factor)
        compare((case, "ours"), (case, "sdpa-causal"), than_dense)
    for case in _WITH_FLEX:
        compare((case, "ours"), (case, "flex"), _faster_than_flex)
    for pattern in GPU_PATTERNS[1:]:
        compare(("gpu-b", "ours"), (f"gpu-b-{pattern}", "ours"), _steady)
    return found


def _within(row: Row, part: str, limit: float) -> Verdict:
    seconds = row["seconds"][part]
    text = f"{row['case']}: {part} in at most {format_seconds(limit)}"
    return Verdict(text, format_seconds(seconds), seconds <= limit)


def _passes(row: Row) -> float:
    return row["seconds"]["forward"] + row["seconds"]["backward"]


def _faster_than_flex(ours: Row, flex: Row) -> Verdict:
    mine, its = _passes(ours), _passes(flex)
    times = f"{format_seconds(its)} / {format_seconds(mine)} = {its / mine:.1f} times"
    text = f"{ours['case']}: faster than FlexAttention, masks built before"
    return Verdict(text, times, mine < its)


def _steady(random: Row, row: Row) -> Verdict:
    passes = _passes(row) / _passes(random)
    selection = row["seconds"]["selection"] / random["seconds"]["selection"]
    text = f"scores {row['pattern']}: attention at most 1.15, selection 1.5 times random scores"
    measured = f"{passes:.2f}, {selection:.2f} times"
    return Verdict(text, measured, passes <= 1.15 and selection <= 1.5)


def _total(row: Row) -> float:
    return row["seconds"]["total"]


def _faster(name: str, ours: Row, other: Row, factor: float) -> Verdict:
    ratio = _total(other) / _total(ours)
    times = f"{format_seconds(_total(other))} / {format_seconds(_total(ours))} = {ratio:.1f} times"
    text = f"{ours['case']}: at least {factor} times faster than {name}"
    return Verdict(text, times, ratio >= factor)


def _tenth_of_memory(ours: Row, other: Row) -> Verdict:
    text = "less than a tenth of the peak memory of SDPA with materialised mask and bias"
    mine, its = ours["peak_bytes"], other["peak_bytes"]
    if mine is None or its is None:
        return Verdict(text, "this system does not tell peak memory", False)
    measured = f"{format_bytes(mine)} / {format_bytes(its)} = 1/{its / max(mine, 1):.0f}"
    return Verdict(text, measured, mine * 10 < its)


def _independent_of_data(random: Row, row: Row) -> Verdict:
    ratio = _total(row) / _total(random)
    text = f"scores {row['pattern']}: at most 1.25 times the time of random scores"
    return Verdict(text, f"{format_seconds(_total(row))}, {ratio:.2f} times", ratio <= 1.25)


def _selection(row: Row) -> list[Verdict]:
    text = "selecting from 1,048,576 scores (8 rows, W 2048) in less than"
    peak = row["peak_bytes"]
    return [
        Verdict(f"{text} 10 s", format_seconds(_total(row)), _total(row) < 10),
        Verdict(f"{text} 1 GiB", format_bytes(peak), peak is not None and peak < 2**30),
    ]
