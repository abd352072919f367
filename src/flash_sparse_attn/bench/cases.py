"""Named problems: their shapes, their inputs, and the formulas for the work that they need."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PATTERNS = ("random", "equal", "ascending", "descending", "values95")


@dataclass(frozen=True)
class Case:
    """One problem: causal dynamic mask attention, or its selection alone.

    Attributes:
        name: Unique name on the command line and in rows.
        what: ``"attention"`` (selection, forward, all gradients) or ``"selection"``.
        batch, heads, kv_heads, length, head_dim, window: B, H, Hkv, N, D, W.
        pattern: How the scores are drawn, one of `PATTERNS`.
        dtype: dtype of query, key and value; scores are fp32.
        device: ``"cpu"`` or ``"cuda"``.
        providers: What is measured; the first is ours, the others are its baselines.
    """

    name: str
    what: str
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    window: int
    pattern: str = "random"
    dtype: str = "float32"
    device: str = "cpu"
    providers: tuple[str, ...] = ("ours",)

    @property
    def shape(self) -> str:
        """The sizes in one word."""
        sizes = f"B{self.batch} H{self.heads} Hkv{self.kv_heads} N{self.length} D{self.head_dim}"
        return f"{sizes} W{self.window}"

    def pairs(self, dense: bool = False) -> int:
        """Visible (head, query, key) triples: ``min(t + 1, W)`` keys at position ``t``.

        Args:
            dense: Count all causal keys instead.
        """
        seen = self.length if dense else min(self.window, self.length)
        full_rows = self.length - seen
        return self.batch * self.heads * (seen * (seen + 1) // 2 + full_rows * seen)

    def flops(self, dense: bool = False) -> int:
        """Useful operations: ``4 D`` for each visible triple, and 2.5 times that backward."""
        return 0 if self.what == "selection" else 14 * self.head_dim * self.pairs(dense)

    def min_bytes(self) -> int:
        """Least traffic: in every pass each input is read and each result written once."""
        scores = 4 * self.batch * self.kv_heads * self.length
        if self.what == "selection":
            return 3 * scores
        item = getattr(torch, self.dtype).itemsize
        query = item * self.batch * self.heads * self.length * self.head_dim
        key = item * self.batch * self.kv_heads * self.length * self.head_dim
        lse = 4 * self.batch * self.heads * self.length
        forward = 2 * query + 2 * key + scores + lse
        backward = 4 * query + 4 * key + 2 * scores + lse
        return 3 * scores + forward + backward

    def reduced(self) -> Case:
        """The same problem, short enough for the dense reference in fp64."""
        length = min(self.length, max(4 * min(self.window, 512), 256))
        return replace(self, length=length, window=min(self.window, length // 4))


@dataclass
class Inputs:
    """The tensors of a case.

    ``query``, ``grad_out [B, N, H, D]``; ``key``, ``value [B, N, Hkv, D]``; ``scores [B, Hkv, N]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    grad_out: Tensor

    def leaves(self) -> list[Tensor]:
        """The tensors that require gradients, in the order of `GRADIENTS`."""
        return [self.query, self.key, self.value, self.scores]


GRADIENTS = ("query", "key", "value", "scores")


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Seeded inputs of a case; drawn on the CPU, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def draw(heads: int) -> Tensor:
        shape = (case.batch, case.length, heads, case.head_dim)
        return torch.randn(shape, generator=generator).to(case.device, dtype)

    scores = make_scores(case, generator).to(case.device)
    if case.what == "selection":
        empty = torch.empty(0)
        return Inputs(empty, empty, empty, scores, empty)
    query, key, value = draw(case.heads), draw(case.kv_heads), draw(case.kv_heads)
    inputs = Inputs(query, key, value, scores, draw(case.heads))
    for leaf in inputs.leaves():
        leaf.requires_grad_()
    return inputs


def make_scores(case: Case, generator: torch.Generator) -> Tensor:
    """Scores fp32 ``[B, Hkv, N]`` of the case's pattern."""
    shape = (case.batch, case.kv_heads, case.length)
    if case.pattern == "random":
        return torch.randn(shape, generator=generator)
    if case.pattern == "values95":
        return torch.randint(0, 95, shape, generator=generator) / 47.0 - 1.0
    line = {
        "equal": torch.zeros(case.length),
        "ascending": torch.linspace(-2, 2, case.length),
        "descending": torch.linspace(2, -2, case.length),
    }[case.pattern]
    return line.expand(shape).contiguous()


_ALL = ("ours", "sdpa-causal", "sdpa-masked")
_CPU_16K = Case("cpu-16k-random", "attention", 1, 4, 2, 16384, 64, 256, providers=_ALL)

CASES = {
    case.name: case
    for case in (
        _CPU_16K,
        *(
            replace(_CPU_16K, name=f"cpu-16k-{pattern}", pattern=pattern, providers=("ours",))
            for pattern in PATTERNS[1:]
        ),
        Case("cpu-select-1m", "selection", 1, 8, 8, 1 << 20, 1, 2048),
        Case("cpu-smoke", "attention", 1, 2, 1, 512, 16, 32, providers=_ALL),
    )
}
"""Every case by name. ``cpu-smoke`` is a check of the frame and belongs to no yardstick."""
