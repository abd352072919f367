"""Decoding operators, registered without Triton: kernels are imported when an operator runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...intervals import KeySelection
from ...problem import Problem
from ...quantize import FP8
from ...tracing import is_traced
from ...window_state import WindowState
from .ops import on_device

_DTYPES = (torch.float16, torch.bfloat16)
_FP8_CAPABILITY = (8, 9)
_FEW_QUERIES, _MAX_ROWS = 16, 64

_library = torch.library.Library("flash_sparse_attn", "FRAGMENT")
_library.define(
    "window_step(Tensor query, Tensor key, Tensor value, Tensor scores, Tensor? key_mask,"
    " Tensor(a!)[] state, int[] sizes, float softmax_scale, float softcap) -> (Tensor, Tensor)"
)
_library.define(
    "decode(Tensor query, Tensor key, Tensor value, Tensor? lengths, Tensor? block_table,"
    " Tensor? key_scale, Tensor? value_scale, Tensor? mask, Tensor? bias, Tensor? start,"
    " Tensor? expiry, float softmax_scale, float softcap, bool is_causal) -> (Tensor, Tensor)"
)
_library.define(
    "append(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping,"
    " Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> ()"
)


@on_device
def _window_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    key_mask: Tensor | None,
    state: list[Tensor],
    sizes: list[int],
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    from .decode_launch import step
    from .inputs import Call

    record = WindowState.of(state, sizes)
    return step(query, key, value, scores, key_mask, record, Call(softmax_scale, softcap))


@on_device
def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    start: Tensor | None,
    expiry: Tensor | None,
    softmax_scale: float,
    softcap: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    from .decode_launch import Keys, decode
    from .inputs import Call

    keys = Keys(key, value, lengths, block_table, key_scale, value_scale)
    intervals = None if start is None or expiry is None else (start, expiry)
    call = Call(softmax_scale, softcap)
    return decode(query, keys, mask, intervals, bias, call, is_causal)


@on_device
def _append(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    from .append import append

    append(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale)


_library.impl("append", _append, "CUDA")
_library.impl("window_step", _window_step, "CUDA")
_library.impl("decode", _decode, "CUDA")


@torch.library.register_fake("flash_sparse_attn::window_step", lib=_library)
def _(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _results(query)


@torch.library.register_fake("flash_sparse_attn::decode", lib=_library)
def _(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _results(query)


@torch.library.register_fake("flash_sparse_attn::append", lib=_library)
def _(*args: Any) -> None:
    return None


def _results(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(batch, heads, length, dtype=torch.float32)


def serves(problem: Problem) -> bool:
    """Whether a call of the attention functions is one of few queries without gradients.

    Its rows (queries times heads of a KV head) are one tile: that needs no plan, and the keys are
    split over all multiprocessors.
    """
    rows = problem.query_len * (problem.num_heads // problem.num_kv_heads)
    is_small = problem.query_len < _FEW_QUERIES and rows <= _MAX_ROWS
    return is_small and problem.packed is None and not problem.requires_grad


def attention(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | KeySelection | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``out [B, Q, H, D]`` and ``lse [B, H, Q]`` of a call that `serves`."""
    return decode(
        query,
        key,
        value,
        mask,
        bias,
        softmax_scale=problem.softmax_scale,
        softcap=problem.softcap,
        is_causal=problem.is_causal,
    )


def unsupported(query: Tensor, stored: Tensor) -> list[str]:
    """Why the kernels cannot decode with these queries over keys or values stored like this."""
    reasons = cannot_store(query, stored.dtype)
    if stored.dtype == FP8 and any(size % 2 for size in (query.shape[-1], *stored.stride()[:-1])):
        reasons.append(f"keys of 8 bits need an even D and even strides, got {stored.stride()}")
    if query.dtype not in _DTYPES:
        reasons.append(f"it takes fp16 and bf16, query is {query.dtype}; cast, or use autocast")
    return reasons


def cannot_store(tokens: Tensor, stored: torch.dtype) -> list[str]:
    """Why the kernels cannot write tokens into a cache of a dtype."""
    if tokens.device.type != "cuda":
        return [f"it runs on GPUs, the tensors are on {tokens.device}"]
    if stored == FP8 and torch.cuda.get_device_capability(tokens.device) < _FP8_CAPABILITY:
        return [f"keys of 8 bits need a GPU of capability {_FP8_CAPABILITY}"]
    return []


def window_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    key_mask: Tensor | None,
    state: WindowState,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attend from the next tokens and commit each; see `decode_launch.step`."""
    call = torch.ops.flash_sparse_attn.window_step if is_traced(query) else _window_step
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    sizes = list(state.sizes)
    return call(query, key, value, scores, key_mask, state.tensors(), sizes, softmax_scale, softcap)


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | KeySelection | None,
    bias: Tensor | None,
    *,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    softmax_scale: float,
    softcap: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of a few queries over many keys; see `decode_launch.attend`."""
    call = torch.ops.flash_sparse_attn.decode if is_traced(query) else _decode
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    lengths, block_table = (
        None if tensor is None else tensor.contiguous() for tensor in (lengths, block_table)
    )
    selection = mask if isinstance(mask, KeySelection) else None
    return call(
        query,
        key,
        value,
        lengths,
        block_table,
        key_scale,
        value_scale,
        mask if isinstance(mask, Tensor) else None,
        bias,
        None if selection is None else selection.start.contiguous(),
        None if selection is None else selection.expiry.contiguous(),
        softmax_scale,
        softcap,
        is_causal,
    )


def append(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Write new keys and values into a cache; see `append_kvcache`."""
    call = torch.ops.flash_sparse_attn.append if is_traced(key) else _append
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    call(key, value, k_cache, v_cache, slot_mapping.contiguous(), k_scale, v_scale)
