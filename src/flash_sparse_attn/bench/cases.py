"""Named problems: their shapes, their inputs, and the formulas for the work that they need."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..selection import select_keys

PATTERNS = ("random", "equal", "ascending", "descending", "values95")
GPU_PATTERNS = (*PATTERNS, "two-level", "ar1", "trend-up", "trend-down")


@dataclass(frozen=True)
class Case:
    """One problem: attention under a mask with a bias, or the selection alone.

    Attributes:
        name: Unique name on the command line and in rows.
        what: ``"attention"`` (selection, forward, all gradients), ``"forward"`` (without
            gradients), ``"selection"``, or ``"decode"``: one token after the N - 1 that a cache
            has read, Q = 1.
        batch, heads, kv_heads, length, head_dim, window: B, H, Hkv, N, D, W.
        pattern: How the scores are drawn, one of `GPU_PATTERNS`.
        dtype: dtype of query, key and value; scores are fp32.
        device: ``"cpu"`` or ``"cuda"``.
        providers: What is measured; the first is ours, the others are its baselines.
        query_length: Q, the last positions of the sequence; 0 stands for N.
        mask: ``"selection"``: the W best keys of the past, from the scores. Or a bool tensor that
            is an input of all sides, one of `MASKS`.
        bias: ``"keys"``, one number per key and KV head, or ``"pairs"``, per query as well.
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
    query_length: int = 0
    mask: str = "selection"
    bias: str = "keys"

    @property
    def queries(self) -> int:
        """Q."""
        return self.query_length or self.length

    @property
    def shape(self) -> str:
        """The sizes in one word."""
        queries = f" Q{self.query_length}" if self.query_length else ""
        sizes = f"B{self.batch} H{self.heads} Hkv{self.kv_heads}{queries} N{self.length}"
        return f"{sizes} D{self.head_dim} W{self.window}"

    def pairs(self, dense: bool = False) -> int:
        """Visible (head, query, key) triples: ``min(t + 1, W)`` keys at position ``t``.

        Args:
            dense: Count all causal keys instead.
        """
        most = self.length if dense else min(self.window, self.length)

        def seen(positions: int) -> int:
            short = min(most, positions)
            return short * (short + 1) // 2 + (positions - short) * most

        rows = seen(self.length) - seen(self.length - self.queries)
        return self.batch * self.heads * rows

    def flops(self, dense: bool = False, pairs: int | None = None) -> int:
        """Useful operations: ``4 D`` for each visible triple, and 2.5 times that backward.

        Args:
            dense: As in `pairs`.
            pairs: The number of visible triples where the mask is not a selection of W keys.
        """
        each = {"selection": 0, "decode": 4, "forward": 4, "attention": 14}[
            self.what
        ] * self.head_dim
        return each * (self.pairs(dense) if dense or pairs is None else pairs)

    def min_bytes(self) -> int:
        """Least traffic: in every pass each input is read and each result written once."""
        given = 3 * 4 * self.batch * self.kv_heads * self.length
        if self.what == "decode":
            given = 0
        if self.mask != "selection":
            given = mask_elements(self)  # one byte each
        return given + sum(self.pass_bytes().values())

    def pass_bytes(self) -> dict[str, int]:
        """The same for each pass alone, ``"forward"`` and ``"backward"``, as far as it has them."""
        if self.what == "selection":
            return {}
        # A step reads the window, not the text.
        keys = min(self.window, self.length) if self.what == "decode" else self.length
        scores = 4 * self.batch * self.kv_heads * keys
        item = getattr(torch, self.dtype).itemsize
        query = item * self.batch * self.heads * self.queries * self.head_dim
        key = item * self.batch * self.kv_heads * keys * self.head_dim
        lse = 4 * self.batch * self.heads * self.queries
        bias = scores
        if self.mask != "selection":
            bias = item * scores // 4 * (self.queries if self.bias == "pairs" else 1)
        passes = {"forward": 2 * query + 2 * key + bias + lse}
        if self.what == "attention":
            passes["backward"] = 4 * query + 4 * key + 2 * bias + lse
        return passes

    def reduced(self) -> Case:
        """The same problem, short enough for the dense reference in fp64."""
        length = min(self.length, max(4 * min(self.window, 512), 256))
        return replace(self, length=length, window=min(self.window, length // 4))


@dataclass
class Inputs:
    """The tensors of a case.

    ``query``, ``grad_out [B, Q, H, D]``; ``key``, ``value [B, N, Hkv, D]``; ``scores``, which the
    bias is, ``[B, Hkv, N]`` or ``[B, Hkv, Q, N]``; ``mask`` bool and 4-D where it is an input;
    ``decodes``: whether the query is that of one more token, after a text that a cache has read.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    grad_out: Tensor
    mask: Tensor | None = None
    is_causal: bool = True
    decodes: bool = False

    @property
    def bias(self) -> Tensor:
        """``[B, Hkv, {1|Q}, N]``."""
        return self.scores[:, :, None] if self.scores.dim() == 3 else self.scores

    def leaves(self) -> list[Tensor]:
        """The tensors that require gradients, in the order of `GRADIENTS`."""
        return [self.query, self.key, self.value, self.scores]


GRADIENTS = ("query", "key", "value", "scores")


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Seeded inputs of a case, drawn on its device."""
    generator = torch.Generator(case.device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def draw(heads: int, length: int) -> Tensor:
        shape = (case.batch, length, heads, case.head_dim)
        tensor = torch.empty(shape, device=case.device, dtype=dtype)
        return tensor.normal_(generator=generator)

    scores = make_scores(case, generator)
    if case.what == "selection":
        empty = torch.zeros(case.batch, case.length, 1, 0, requires_grad=True)
        return Inputs(empty, empty, empty, scores, empty)
    query = draw(case.heads, case.queries)
    key, value = (draw(case.kv_heads, case.length) for _ in range(2))
    mask = None
    if case.mask != "selection":
        mask = make_mask(case, scores)
        scores = scores.to(dtype)
        if case.bias == "pairs":
            full = (case.batch, case.kv_heads, case.queries, case.length)
            scores = torch.randn(full, generator=generator, device=case.device, dtype=dtype)
    grad_out = draw(case.heads, case.queries)
    decodes = case.what == "decode"
    if decodes:  # the new token stays, so that a step has to store it
        scores[..., -1] = scores.amax(-1)
    inputs = Inputs(query, key, value, scores, grad_out, mask, case.mask != "prefix", decodes)
    for leaf in inputs.leaves():
        leaf.requires_grad_(case.what == "attention")
    return inputs


MASKS = ("pairs", "keys", "sliding", "documents", "prefix", "blocks", "independent")
"""Masks given as bool tensors; calls are causal besides, but for ``prefix``.

``pairs``: the W best keys of the past of every query, by the scores, ``[B, Hkv, Q, N]``; ``keys``:
the W best of all keys, ``[B, Hkv, 1, N]``. Of shape ``[1, 1, Q, N]``: ``sliding``, the W newest;
``documents``, those of the same W tokens; ``prefix``, the first W and the past; ``blocks``, the own
and random blocks of 64 x 64, W of N; ``independent``, every pair with probability W / N.
"""


def make_mask(case: Case, scores: Tensor) -> Tensor:
    """The bool mask of a case whose mask is an input."""
    if case.mask == "keys":
        return select_keys(scores, case.window, mode="shared").to_dense(1, is_causal=False)
    if case.mask == "pairs":
        return select_keys(scores, case.window).to_dense(case.queries)
    key = torch.arange(case.length, device=scores.device)
    position = key[-case.queries :, None]
    causal = key <= position
    if case.mask == "sliding":
        seen = causal & (key > position - case.window)
    elif case.mask == "documents":
        seen = causal & (key // case.window == position // case.window)
    elif case.mask == "prefix":
        seen = causal | (key < case.window)
    else:
        generator = torch.Generator(scores.device).manual_seed(1)
        block = 64 if case.mask == "blocks" else 1
        rows, columns = -(-case.queries // block), -(-case.length // block)
        drawn = torch.rand(rows, columns, generator=generator, device=scores.device)
        drawn = drawn < case.window / case.length
        if block > 1:
            drawn = drawn.repeat_interleave(block, 0)[: case.queries]
            drawn = drawn.repeat_interleave(block, 1)[:, : case.length]
        seen = causal & (drawn | (key // block == position // block))
    return seen[None, None]


def mask_elements(case: Case) -> int:
    """Elements of the bool mask of a case, 0 if there is none."""
    if case.mask == "selection":
        return 0
    heads = case.batch * case.kv_heads if case.mask in ("pairs", "keys") else 1
    return heads * case.length * (1 if case.mask == "keys" else case.queries)


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

_DENSE = ("ours", "sdpa-causal")
_GPU_A = Case("gpu-a", "attention", 1, 2, 1, 32768, 64, 1024, "random", "bfloat16", "cuda", _DENSE)
_GPU_B = replace(_GPU_A, name="gpu-b", heads=32, kv_heads=8, head_dim=128, window=2048)
_GPU = (
    _GPU_A,
    _GPU_B,
    replace(_GPU_B, name="gpu-c", length=131072),
    replace(_GPU_B, name="gpu-65536", length=65536),
    *(  # dense attention would take minutes
        replace(_GPU_B, name=f"gpu-{name}", length=n, providers=("ours",))
        for name, n in (("262144", 1 << 18), ("524288", 1 << 19), ("1m", 1 << 20))
    ),
    *(  # at more, FlexAttention would take minutes
        replace(_GPU_B, name=f"gpu-{n}", length=n, providers=(*_DENSE, "flex"))
        for n in (2048, 4096, 8192, 16384)
    ),
    *(  # with gpu-b, whose window is 2048, from 32 to 4096
        replace(_GPU_B, name=f"gpu-window-{w}", window=w)
        for w in (32, 64, 128, 256, 512, 1024, 4096)
    ),
    *(
        replace(_GPU_B, name=f"gpu-b-{pattern}", pattern=pattern, providers=("ours",))
        for pattern in GPU_PATTERNS[1:]
    ),
)

_GPU_MASKED = replace(
    _GPU_A,
    name="gpu-mask-pair-bias",
    mask="pairs",
    bias="pairs",
    providers=("ours", "sdpa-additive"),
)
_KEY_BIAS = replace(_GPU_MASKED, bias="keys")
_GPU_MASKS = (
    _GPU_MASKED,
    replace(_KEY_BIAS, name="gpu-mask-key-bias"),
    replace(_KEY_BIAS, name="gpu-mask-of-keys", mask="keys"),
    *(
        replace(_KEY_BIAS, name=f"gpu-{mask}-{length}", mask=mask, length=length)
        for mask in ("sliding", "documents", "prefix", "blocks")
        for length in (8192, 32768)
    ),
    *(  # one pair in 32 and in 256
        replace(_KEY_BIAS, name=f"gpu-independent-{part}", mask="independent", window=32768 // part)
        for part in (32, 256)
    ),
)

_GPU_DECODE = tuple(
    replace(
        _GPU_B,
        name=f"gpu-decode-{name}",
        what="decode",
        batch=8,
        length=n,
        query_length=1,
    )
    for name, n in (*((str(1 << n), 1 << n) for n in range(13, 20)), ("1m", 1 << 20))
)
_CPU_SMOKE = Case("cpu-smoke", "attention", 1, 2, 1, 512, 16, 32, providers=_ALL)

CASES = {
    case.name: case
    for case in (
        *_GPU,
        *_GPU_DECODE,
        *_GPU_MASKS,
        _CPU_16K,
        *(
            replace(_CPU_16K, name=f"cpu-16k-{pattern}", pattern=pattern, providers=("ours",))
            for pattern in PATTERNS[1:]
        ),
        Case("cpu-select-1m", "selection", 1, 8, 8, 1 << 20, 1, 2048),
        _CPU_SMOKE,
        replace(_CPU_SMOKE, name="cpu-smoke-step", what="decode", query_length=1, providers=_DENSE),
    )
}
"""Every case by name. ``cpu-smoke*`` are checks of the frame and belong to no yardstick.

With the providers that each names, those of a GPU are the rows of ``results/h200.jsonl``.
"""
