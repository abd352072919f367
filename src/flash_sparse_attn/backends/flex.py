"""FlexAttention backend: PyTorch's own attention template, compiled for each form of a call.

It is a choice for portability, never an automatic one: it runs where PyTorch's compiler has a GPU
target, leaves out whole blocks of 128 queries by 128 keys but no single keys, and takes seconds to
compile. On CPUs PyTorch runs the template unfused, with O(Q K) memory and without gradients.

Its backward pass knows of a row's probabilities only the log-sum-exp, which has 24 bits: gradients
of rows whose largest visible bias exceeds some 1e5 in size are inexact.

What a query sees is one interval of query *rows* per key, which covers causality, selections,
padding and packed sequences, and on top a bool tensor where a mask depends on query and key.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import checks
from ..intervals import KeySelection
from ..problem import Problem
from ..reference import expand_heads

MIN_TORCH = (2, 9)
"""The oldest version that has the interface used here (`AuxRequest`)."""

_BLOCK = 128
_MIN_HEAD_DIM = 16
_DEVICES = ("cuda", "xpu", "cpu")
_GPU_DTYPES = (torch.float16, torch.bfloat16)
_INT32_ELEMENTS = 2**31
_SCORES_PER_STEP = 1 << 27
# Finite biases stay finite when they are multiplied by log2(e).
_LARGEST_BIAS = 2.3e38


def unavailable() -> list[str]:
    """Why this backend cannot run on this machine."""
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found >= MIN_TORCH:
        return []
    wanted = ".".join(map(str, MIN_TORCH))
    return [f"PyTorch {torch.__version__} is too old, {wanted} is needed for FlexAttention"]


def unsupported(problem: Problem) -> list[str]:
    """Why this backend cannot run this call."""
    reasons = []
    device = problem.device.type
    if device not in _DEVICES:
        reasons.append(f"it runs on {', '.join(_DEVICES)}, the tensors are on {problem.device}")
    if device == "cpu":
        if problem.requires_grad:
            reasons.append("PyTorch's FlexAttention has no gradients on CPUs; use backend='eager'")
    else:
        if problem.dtype not in _GPU_DTYPES:
            reasons.append(
                f"it takes fp16 and bf16 on GPUs, query is {problem.dtype}; cast, or use autocast"
            )
        if importlib.util.find_spec("triton") is None:
            reasons.append("Triton is not installed; a GPU build of PyTorch brings it")
        if problem.bias_dtype == torch.float64:
            reasons.append("it takes biases up to fp32, attn_bias is fp64; cast it")
    if problem.deterministic and problem.bias_requires_grad:
        reasons.append(
            "it sums the gradient of a bias by atomic additions, in no fixed order; use another "
            "backend, or deterministic=False"
        )
    for name, shape in (("attn_mask", problem.mask_shape), ("attn_bias", problem.bias_shape)):
        if shape is not None and math.prod(shape) >= _INT32_ELEMENTS:
            reasons.append(f"it indexes with 32 bits, {name} has 2^31 elements or more")
    return reasons


def attention(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | KeySelection | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``out [B, Q, H, D]`` and ``lse [B, H, Q]``; packed calls as one batch entry."""
    with torch.autocast(problem.device.type, enabled=False):  # autocast would round the bias
        visible = _Visible.of(problem, mask, bias)
        out, lse = _attend(problem, visible, query, key, value, bias)
    bad = lse.isnan() | (lse == torch.inf)
    if bias is not None and checks.looks_at_values(lse) and bool(bad.any()):
        spread = expand_heads(bias.detach(), problem.num_heads)
        checks.check_bias_values(spread, visible.dense(problem.num_heads))
    return out, lse


def _attend(
    problem: Problem,
    visible: _Visible,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import BlockMask

    heads = problem.num_heads
    partial, full, seen = visible.blocks()
    # A key that nobody sees may hold anything: in a block that is visible in part, 0 * NaN counts.
    unseen = ~_any_head(seen, problem.num_kv_heads).transpose(1, 2)[..., None]
    rows = query, key.masked_fill(unseen, 0.0), value.masked_fill(unseen, 0.0)
    block_mask = BlockMask.from_kv_blocks(
        *_block_list(partial, heads),
        *_block_list(full, heads),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible.mask_mod(heads),
        seq_lengths=(problem.query_len, problem.key_len),
    )
    if bias is not None:
        bias = _ExactBias.apply(bias, torch.promote_types(query.dtype, torch.float32))
    # A compiler that traces this call compiles the template as well.
    run: Callable[..., tuple[Tensor, Tensor]] = _run
    if not torch.compiler.is_compiling():
        run = _compiled(_Form.of(problem, visible, bias))
    out, lse = run(
        *[_padded(tensor.transpose(1, 2)) for tensor in rows],
        score_mod=_score_mod(problem.softcap, bias, heads),
        block_mask=block_mask,
        scale=problem.softmax_scale,
        enable_gqa=heads != problem.num_kv_heads,
        kernel_options=_kernel_options(visible, bias, rows[0]),
    )
    return out[..., : problem.head_dim].transpose(1, 2).contiguous(), lse.detach()


@dataclass(frozen=True)
class _Visible:
    """Which query rows see which keys; ``M`` is 1, Hkv or H.

    Attributes:
        first: int32 ``[{1|B}, M, K]``, the first query row that sees each key.
        end: int32, the row after the last one; 0 if none sees it.
        query_len: Number of query rows.
        mask: Bool ``({1|B}, {1|Hkv|H}, Q, {1|K})`` that has to be true besides, or ``None``.
        finite: Bool of the same set of shapes, False where a bias of ``-inf`` hides; or ``None``.
    """

    first: Tensor
    end: Tensor
    query_len: int
    mask: Tensor | None
    finite: Tensor | None

    @classmethod
    def of(
        cls, problem: Problem, mask: Tensor | KeySelection | None, bias: Tensor | None
    ) -> _Visible:
        """Whatever is the same for all queries goes into the intervals."""
        first, end = _row_intervals(problem, mask if isinstance(mask, KeySelection) else None)
        pairs: list[Tensor | None] = []
        mask = _compact(mask) if isinstance(mask, Tensor) else None
        finite = None if bias is None else _compact(bias.detach()) != -torch.inf
        for tensor in (mask, finite):
            if tensor is not None and tensor.shape[2] == 1:
                kept, end = _same_heads(tensor[:, :, 0], end)
                end = torch.where(kept, end, 0)
                first = expand_heads(first, end.shape[1]).expand_as(end)
                tensor = None
            pairs.append(tensor)
        end = torch.where(end > first, end, 0)
        return cls(first.contiguous(), end.contiguous(), problem.query_len, *pairs)

    def mask_mod(self, heads: int) -> Callable[..., Tensor]:
        """The function of batch entry, head, query row and key that FlexAttention asks for."""
        first, end = (_reader(tensor[:, :, None], heads) for tensor in (self.first, self.end))
        mask = None if self.mask is None else _reader(self.mask, heads)

        def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            inside = (first(b, h, q, k) <= q) & (q < end(b, h, q, k))
            return inside if mask is None else inside & mask(b, h, q, k)

        return is_visible

    def rows(self, begin: int, end: int, with_bias: bool = True) -> Tensor:
        """Bool ``[{1|B}, M, R, K]``: what the query rows from `begin` to `end` see."""
        row = torch.arange(begin, end, device=self.first.device)[:, None]
        visible = (self.first[:, :, None] <= row) & (row < self.end[:, :, None])
        for tensor in (self.mask, self.finite if with_bias else None):
            if tensor is not None:
                part, visible = _same_heads(tensor[:, :, begin:end], visible)
                visible = visible & part
        return visible

    def dense(self, heads: int) -> Tensor:
        """Bool ``[{1|B}, H, Q, K]``, the keys that only a bias hides included."""
        return expand_heads(self.rows(0, self.query_len, with_bias=False), heads)

    def blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the blocks of queries and keys hold.

        Returns:
            Bool ``[{1|B}, M, blocks of Q, blocks of K]``: visible in part; visible as a whole; and
            ``[{1|B}, M, K]``: seen by a query at all.
        """
        pairs = self.mask is not None or self.finite is not None
        some, every, seen = self._blocks_of_pairs() if pairs else self._blocks_of_intervals()
        return some & ~every, every, seen

    def _blocks_of_intervals(self) -> tuple[Tensor, Tensor, Tensor]:
        """From the ends of the intervals: one comparison for each block of queries and key."""
        first, end = (
            F.pad(tensor, (0, -tensor.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))[:, :, None]
            for tensor in (self.first, self.end)
        )
        some, every = [], []
        step = max(1, _SCORES_PER_STEP // first.numel()) * _BLOCK
        for begin in range(0, self.query_len, step):
            stop = min(begin + step, self.query_len)
            row = torch.arange(begin, stop, _BLOCK, device=first.device)[:, None, None]
            last = (row + _BLOCK).clamp(max=self.query_len)
            some.append(((first < last) & (end > row)).any(dim=-1))
            every.append(((first <= row) & (end >= row + _BLOCK)).all(dim=-1))
        return torch.cat(some, dim=2), torch.cat(every, dim=2), self.end > 0

    def _blocks_of_pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """By one pass over the mask and the bias, in pieces of bounded size."""
        some, every, seen = [], [], []
        tensors = [t for t in (self.first, self.mask, self.finite) if t is not None]
        size = max(t.shape[0] for t in tensors) * max(t.shape[1] for t in tensors)
        step = max(1, _SCORES_PER_STEP // (size * self.first.shape[2] * _BLOCK)) * _BLOCK
        for begin in range(0, self.query_len, step):
            visible = self.rows(begin, min(begin + step, self.query_len))
            seen.append(visible.any(dim=2))
            # Rows and keys that only fill a block up are not visible.
            missing = (0, -visible.shape[3] % _BLOCK, 0, -visible.shape[2] % _BLOCK)
            tiles = F.pad(visible, missing).unflatten(3, (-1, _BLOCK)).unflatten(2, (-1, _BLOCK))
            some.append(tiles.any(dim=5).any(dim=3))
            every.append(tiles.all(dim=5).all(dim=3))
        return torch.cat(some, dim=2), torch.cat(every, dim=2), torch.stack(seen).any(dim=0)


def _row_intervals(problem: Problem, selection: KeySelection | None) -> tuple[Tensor, Tensor]:
    """First row that sees each key and the row after the last, int32 ``[{1|B}, {1|Hkv}, K]``."""
    position = torch.arange(problem.key_len, device=problem.device)
    low = torch.zeros_like(position)  # rows of the key's sequence
    high = low + problem.query_len
    shift = low + problem.key_len - problem.query_len  # row = position - shift
    if problem.packed is not None:
        queries, keys = problem.packed.cu_seqlens_q.long(), problem.packed.cu_seqlens_k.long()
        sequence = torch.searchsorted(keys, position, right=True) - 1
        low, high = queries[sequence], queries[sequence + 1]
        position = position - keys[sequence]
        shift = keys.diff()[sequence] - high
    first = position - shift if problem.is_causal else low
    end = high
    if selection is not None:
        start, expiry = (
            # A packed selection is that of one batch entry.
            (part if part.dim() == 3 else part[None]).long()
            for part in (selection.start, selection.expiry)
        )
        end = expiry - shift
        if not problem.is_causal:  # negative positions, of more queries than keys, count as 0
            first = torch.where(start > 0, start - shift, low)
            end = torch.where(expiry > 0, end, low)
    first, end = torch.maximum(first, low), torch.minimum(end, high)
    if end.dim() == 1:
        end = end[None, None]
    return first.expand_as(end).int(), end.clamp(min=0).int()


def _compact(tensor: Tensor) -> Tensor:
    """The same values with every expanded dimension of size 1 again."""
    return tensor[tuple(slice(None if stride else 1) for stride in tensor.stride())]


def _same_heads(tensor: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the heads of the one that has more."""
    heads = max(tensor.shape[1], other.shape[1])
    return expand_heads(tensor, heads), expand_heads(other, heads)


def _any_head(seen: Tensor, kv_heads: int) -> Tensor:
    """``[{1|B}, M, K]`` to ``[{1|B}, {1|Hkv}, K]``: seen by any head that reads the key."""
    return seen if seen.shape[1] <= kv_heads else seen.unflatten(1, (kv_heads, -1)).any(dim=2)


def _block_list(blocks: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which: int32, rising."""
    if blocks.shape[1] > 1:  # heads of the template's lists are counted modulo, not in groups
        blocks = expand_heads(blocks, heads)
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), order.int().contiguous()


def _reader(tensor: Tensor, heads: int) -> Callable[..., Tensor]:
    """How to read ``({1|B}, {1|Hkv|H}, {1|Q}, {1|K})`` at a batch entry, head, row and key."""
    batch, _, rows, keys = (int(size > 1) for size in tensor.shape)
    group = heads // tensor.shape[1]

    def read(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return tensor[b * batch, h // group, q * rows, k * keys]

    return read


def _score_mod(softcap: float, bias: Tensor | None, heads: int) -> Callable[..., Tensor] | None:
    """What happens to a scaled score before the softmax."""
    if not softcap and bias is None:
        return None
    read = None if bias is None else _reader(bias, heads)

    def modified(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        return score if read is None else score + read(b, h, q, k)

    return modified


class _ExactBias(torch.autograd.Function):
    """The bias in fp32, in which its gradient is summed, and finite in powers of two too."""

    @staticmethod
    def forward(ctx, bias, dtype):  # type: ignore[no-untyped-def]
        ctx.dtype = bias.dtype
        exact = bias.to(dtype)
        if dtype == torch.float64:
            return exact.clone()
        return torch.where(exact.isinf(), exact, exact.clamp(-_LARGEST_BIAS, _LARGEST_BIAS))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.to(ctx.dtype), None


def _padded(tensor: Tensor) -> Tensor:
    """The head dimension filled up with zeros to a power of two, as the template wants it."""
    dim = tensor.shape[-1]
    missing = max(_MIN_HEAD_DIM, 1 << (dim - 1).bit_length()) - dim
    return F.pad(tensor, (0, missing)) if missing else tensor


def _kernel_options(visible: _Visible, bias: Tensor | None, query: Tensor) -> dict[str, int]:
    """Less pipelining backward where tiles of a mask or bias need shared memory as well."""
    # With the template's own choice at D = 128, 233 KiB were asked for of the 227 that an H100 has.
    pairs = visible.mask is not None or (bias is not None and bias.shape[2] > 1)
    if not pairs or query.shape[-1] <= 64:
        return {}
    return {"bwd_num_stages": 2 if query.shape[-1] <= 128 else 1}


@dataclass(frozen=True)
class _Form:
    """What a compiled call has as constants; lengths are not among them."""

    constants: tuple[Any, ...]
    on_cpu: bool

    @classmethod
    def of(cls, problem: Problem, visible: _Visible, bias: Tensor | None) -> _Form:
        tensors = (visible.first, visible.mask, bias)
        broadcasts = tuple(
            None if tensor is None else (tensor.shape[1], *(size > 1 for size in tensor.shape))
            for tensor in tensors
        )
        sizes = (problem.num_heads, problem.num_kv_heads, problem.head_dim, problem.dtype)
        needs = (problem.requires_grad, problem.bias_requires_grad, torch.is_grad_enabled())
        constants = (broadcasts, sizes, needs, problem.softmax_scale, problem.softcap)
        return cls(constants, problem.device.type == "cpu")


_numbers = itertools.count()


@lru_cache(maxsize=64)
def _compiled(form: _Form) -> Callable[..., tuple[Tensor, Tensor]]:
    """`_run`, compiled for calls of one form; nothing of a call itself is kept."""
    # The compiler counts recompilations by code object and gives up after a few, and by its name
    # it remembers which constants changed, to make them variables: a form needs both for itself.
    # fullgraph makes it say that it gives up, instead of running unfused.
    code = _run.__code__.replace(co_name=f"_run_{next(_numbers)}")
    run = FunctionType(code, _run.__globals__)
    return torch.compile(run, fullgraph=True, backend="eager" if form.on_cpu else "inductor")


def _run(*tensors: Any, **options: Any) -> tuple[Tensor, Any]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    out, aux = flex_attention(*tensors, **options, return_aux=AuxRequest(lse=True))
    return out, aux.lse
