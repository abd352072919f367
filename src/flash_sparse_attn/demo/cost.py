"""Question b: what does it cost? Time and peak memory against PyTorch's attention by length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..bench.cases import Case
from ..bench.console import Progress, format_bytes, format_seconds, paragraph, table
from ..bench.machine import busy_note
from ..bench.measure import measure_isolated
from ..bench.providers import verify

COLUMNS = {
    "ours": "dynamic mask",
    "sdpa-causal": "dense causal SDPA",
    "sdpa-masked": "SDPA, N x N mask",
}


@dataclass(frozen=True)
class CostSettings:
    """Shapes that are measured, each in a process of its own; a GPU adds longer sequences.

    Attributes:
        lengths: Of the sequence.
        gpu_lengths: More of them on a GPU, where short ones take no time.
        window: Keys that a query sees.
        masked_up_to: Longest sequence for SDPA with a stored mask: memory grows as its square.
        budget_seconds: No new repetition is started after this time.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    gpu_lengths: tuple[int, ...] = (32768, 65536)
    window: int = 256
    masked_up_to: int = 4096
    budget_seconds: float = 1.5


QUICK = CostSettings(
    lengths=(256,), gpu_lengths=(), window=32, masked_up_to=256, budget_seconds=0.1
)


def make_case(settings: CostSettings, length: int, device: torch.device) -> Case:
    """One query group of two on each KV head; on a GPU in bf16 and with more heads."""
    gpu = device.type == "cuda"
    return Case(
        f"demo-{length}",
        "attention",
        1,
        16 if gpu else 4,
        4 if gpu else 2,
        length,
        64,
        settings.window,
        dtype="bfloat16" if gpu else "float32",
        device=device.type,
    )


def run(settings: CostSettings, device: torch.device) -> dict[str, Any]:
    """Check every method against fp64, then time it; see `describe` for what is printed."""
    lengths = settings.lengths + (settings.gpu_lengths if device.type == "cuda" else ())
    cases = {length: make_case(settings, length, device) for length in lengths}
    first = cases[lengths[0]]
    errors = {name: max(verify(first, name).values()) for name in COLUMNS}
    jobs = [
        (name, length)
        for length in lengths
        for name in COLUMNS
        if name != "sdpa-masked" or length <= settings.masked_up_to
    ]
    measured: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in COLUMNS}
    with Progress("measure", len(jobs)) as bar:
        for name, length in jobs:
            measured[name][length] = measure_isolated(
                cases[length], name, budget_seconds=settings.budget_seconds
            )
            bar.update(f"{COLUMNS[name]}, {length} tokens")
    return {"settings": settings, "case": first, "measured": measured, "errors": errors}


def describe(results: dict[str, Any]) -> str:
    """The answer in words and a table."""
    case: Case = results["case"]
    measured, errors = results["measured"], results["errors"]
    ours, dense = measured["ours"], measured["sdpa-causal"]
    lengths = list(ours)
    shortest, longest = lengths[0], lengths[-1]
    header = ["length", *COLUMNS.values(), "dense / ours", "memory ours", "dense", "N x N mask"]
    worst = ", ".join(f"{COLUMNS[name]} {error:.0e}" for name, error in errors.items())
    lines = [
        paragraph(
            f"Forward and backward pass with all gradients: batch {case.batch}, {case.heads} query",
            f"heads, {case.kv_heads} KV heads of {case.head_dim}, {case.dtype}, random scores,",
            f"{case.window} keys for every query, selection included; medians. Dense causal SDPA",
            "reads all keys and has no learned bias: a different function, the usual one. SDPA",
            "with a stored N x N mask and bias computes the same function as ours (mask building",
            "included).",
        ),
        "",
        table(header, [_row(length, measured) for length in lengths]),
        "",
        paragraph(
            "Each in a process of its own; memory is the peak above the inputs. Largest error of",
            f"output and gradients against fp64: {worst}.",
        ),
        "",
    ]
    ratio = _seconds(dense[longest]) / _seconds(ours[longest])
    if ratio > 1:
        slower = [n for n in lengths if _seconds(ours[n]) >= _seconds(dense[n])]
        first = min(n for n in lengths if n > max(slower, default=0))
        verdict = f"{ratio:.1f} times faster than dense causal SDPA, and faster from {first} on."
    else:
        verdict = f"{1 / ratio:.1f} times SLOWER than dense causal SDPA."
    growth = [_seconds(x[longest]) / _seconds(x[shortest]) for x in (ours, dense)]
    lines.append(
        paragraph(
            f"Answer: at length {longest} the dynamic mask is {verdict} From {shortest} to",
            f"{longest} tokens, {longest // shortest} times as many, its time grows",
            f"{growth[0]:.1f} times, that of dense attention {growth[1]:.1f} times.",
        )
    )
    if note := busy_note(one for name in measured for one in measured[name].values()):
        lines.append(paragraph(note))
    return "\n".join(lines)


def _row(length: int, measured: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    found = [measured[name].get(length) for name in COLUMNS]
    ours, dense = found[0], found[1]
    assert ours is not None and dense is not None
    return [
        str(length),
        *(format_seconds(_seconds(one) if one else None) for one in found),
        f"{_seconds(dense) / _seconds(ours):.2f}",
        *(format_bytes(one["peak_bytes"] if one else None) for one in found),
    ]


def _seconds(measured: dict[str, Any]) -> float:
    return measured["seconds"]["total"]
