"""The configurations of the predecessors' benchmark scripts, every one, as cases.

A bool mask is an input: of every query the W best keys of its past. The bias is one number per key
and KV head. Their scripts had head dimension 64, the tables of their README 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .cases import Case

HEAD_DIMS = (64, 128)
SIDES = ("ours", "sdpa-additive", "sdpa-causal", "flex")

_LENGTHS = tuple(2**n for n in range(7, 13))
_DIMS = (32, 64, 96, 128, 192, 256)


def equivalence(window: int = 1024) -> list[tuple[Case, bool]]:
    """72 cases, each with whether the call is causal; the mask holds past keys in either case."""
    return [
        (_case(f"{n}-d{dim}-{'causal' if causal else 'full'}", n, dim, window), causal)
        for n in _LENGTHS
        for dim in _DIMS
        for causal in (True, False)
    ]


def forward_performance(head_dim: int = 64, window: int = 1024) -> list[Case]:
    """45 cases: lengths, decoding, batch sizes, heads, head dimensions, windows."""
    cases = [_case(f"train-{2**n}", 2**n, head_dim, window) for n in range(8, 16)]
    cases += [
        replace(_case(f"infer-{2**n}", 2**n, head_dim, window), query_length=1)
        for n in range(8, 20)
    ]
    cases += _at(4096, head_dim, window)
    cases += [_case(f"dim-{dim}", 4096, dim, window) for dim in _DIMS]
    cases += [_case(f"window-{2**n}", 32768, head_dim, 2**n) for n in range(5, 16)]
    return [
        replace(case, name=f"forward-{case.name}-d{case.head_dim}", what="forward")
        for case in cases
    ]


def backward_performance(head_dim: int = 64, window: int = 1024) -> list[Case]:
    """29 cases; with head dimension 128 also the rows that only the README's table has."""
    cases = [_case(f"train-{2**n}", 2**n, head_dim, window) for n in range(8, 15)]
    cases += _at(4096, head_dim, window)
    cases += [_case(f"dim-{dim}", 16384, dim, window) for dim in (32, 64, 96, 128)]
    cases += [_case(f"window-{2**n}", 16384, head_dim, 2**n) for n in range(5, 15)]
    if head_dim == 128:
        cases += [_case("train-32768", 32768, head_dim, window)]
        cases += [_case(f"window-{2**n}-of-32768", 32768, head_dim, 2**n) for n in range(5, 16)]
    return [replace(case, name=f"backward-{case.name}-d{case.head_dim}") for case in cases]


def suits_cpu(case: Case, head_dims: Sequence[int], longest: int = 512) -> bool:
    """Whether a CPU does it in seconds; a single query may have 4096 keys."""
    return case.head_dim in head_dims and case.length <= (longest if case.queries > 1 else 4096)


def about_cpu(chosen: int, of: int, dtype: str) -> str:
    """What a script says that takes those configurations which suit a CPU."""
    return (
        f"On a CPU: the eager backend, {dtype}, and the {chosen} short ones of {of} configurations."
        "\nThis shows that everything runs, not how fast it is on a GPU. Options choose others: "
        "--config, --dtype, --test-type."
    )


def _at(length: int, head_dim: int, window: int) -> list[Case]:
    """Batch sizes and head counts."""
    case = _case("", length, head_dim, window)
    batches = [replace(case, name=f"batch-{batch}", batch=batch) for batch in (1, 2, 4, 8)]
    heads = [
        replace(case, name=f"heads-{heads}-{kv_heads}", heads=heads, kv_heads=kv_heads)
        for heads, kv_heads in ((1, 1), (2, 1), (4, 1), (8, 2))
    ]
    return batches + heads


def _case(name: str, length: int, head_dim: int, window: int) -> Case:
    return Case(
        name,
        "attention",
        batch=1,
        heads=2,
        kv_heads=1,
        length=length,
        head_dim=head_dim,
        window=window,
        dtype="bfloat16",
        device="cuda",
        providers=SIDES,
        mask="pairs",
    )
