"""Named problems: their shapes, their inputs, and the formulas for the work that they need."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PATTERNS = ("random", "equal", "ascending", "descending", "values95")
GPU_PATTERNS = (*PATTERNS, "two-level", "ar1", "trend-up", "trend-down")


@dataclass(frozen=True)
class Case:
    """One problem: causal dynamic mask attention, or its selection alone.

    Attributes:
        name: Unique name on the command line and in rows.
        what: ``"attention"`` (selection, forward, all gradients) or ``"selection"``.
        batch, heads, kv_heads, length, head_dim, window: B, H, Hkv, N, D, W.
        pattern: How the scores are drawn, one of `GPU_PATTERNS`.
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
    """Seeded inputs of a case, drawn on its device."""
    generator = torch.Generator(case.device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def draw(heads: int) -> Tensor:
        shape = (case.batch, case.length, heads, case.head_dim)
        tensor = torch.empty(shape, device=case.device, dtype=dtype)
        return tensor.normal_(generator=generator)

    scores = make_scores(case, generator)
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
    device = generator.device
    if case.pattern == "values95":
        return torch.randint(0, 95, shape, generator=generator, device=device) / 47.0 - 1.0
    noise = torch.randn(shape, generator=generator, device=device)
    line = torch.linspace(-2, 2, case.length, device=device).expand(shape)
    if case.pattern == "ar1":
        # y_t = 0.99 y_{t-1} + x_t as a convolution with the first powers of 0.99
        powers = 0.99 ** torch.arange(1024, device=device)
        size = case.length + 1024
        product = torch.fft.rfft(noise, size) * torch.fft.rfft(powers, size)
        return torch.fft.irfft(product, size)[..., : case.length].contiguous() / 7
    return {
        "random": noise,
        "equal": torch.zeros_like(noise),
        "ascending": line.contiguous(),
        "descending": -line,
        "two-level": (noise > 1).float(),
        "trend-up": noise + line,
        "trend-down": noise - line,
    }[case.pattern]


_ALL = ("ours", "sdpa-causal", "sdpa-masked")
_CPU_16K = Case("cpu-16k-random", "attention", 1, 4, 2, 16384, 64, 256, providers=_ALL)

_SAME = ("ours", "sdpa-causal", "flex")
_GPU_A = Case("gpu-a", "attention", 1, 2, 1, 32768, 64, 1024, "random", "bfloat16", "cuda", _SAME)
_GPU_B = Case("gpu-b", "attention", 1, 32, 8, 32768, 128, 2048, "random", "bfloat16", "cuda", _SAME)
_GPU = (
    _GPU_A,
    _GPU_B,
    replace(_GPU_B, name="gpu-c", length=131072, providers=("ours", "sdpa-causal")),
    replace(_GPU_B, name="gpu-1m", length=1 << 20, providers=("ours",)),
    *(replace(_GPU_B, name=f"gpu-{n}", length=n) for n in (2048, 4096, 8192, 16384)),
    *(
        replace(_GPU_B, name=f"gpu-b-{pattern}", pattern=pattern, providers=("ours",))
        for pattern in GPU_PATTERNS[1:]
    ),
)

CASES = {
    case.name: case
    for case in (
        *_GPU,
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
