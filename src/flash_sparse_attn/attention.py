"""The attention functions: check the arguments, choose a backend, run it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch
from .intervals import KeySelection
from .problem import Problem
from .reference import attention_reference
from .varlen import PackedSequences

Mask = Tensor | KeySelection | None


def flash_sparse_attn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Mask = None,
    attn_bias: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    *,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention under a mask with a trainable additive bias: work only where the mask is true.

    ``softmax(softmax_scale * q.k + bias, where visible) . v``; visible is mask AND causal, and
    causal is bottom-right: query ``i`` stands at position ``i + K - Q``. Gradients for query, key,
    value and bias. A query without a visible key gives 0.

    Args:
        query: ``[B, Q, H, D]``, fp16 or bf16 (eager also fp32, fp64), any strides.
        key: ``[B, K, Hkv, D]``, ``H % Hkv == 0``; head ``h`` reads KV head ``h // (H / Hkv)``.
        value: ``[B, K, Hkv, D]``.
        attn_mask: Bool ``({1|B}, {1|Hkv|H}, {1|Q}, {1|K})``, True = visible, or a `KeySelection`.
        attn_bias: fp16, bf16 or fp32, of the same set of shapes on its own. ``-inf`` hides.
        softmax_scale: Default ``D ** -0.5``.
        is_causal: ``None`` follows a `KeySelection` and means False for bool masks.
        softcap: ``c`` in ``c * tanh(score / c)``, before the bias; ``None`` or 0.0 is off.
        deterministic: Bitwise repeatable results, forward and backward.
        return_attn_probs: Also return the probabilities ``[B, H, Q, K]``; for tests, O(Q K) memory.
        return_lse: Also return ``lse [B, H, Q]``, natural logarithm, fp32, not differentiable.
        backend: ``"cuda"``, ``"triton"``, ``"flex"`` or ``"eager"``: that one or an error. ``None``
            is the best available.

    Returns:
        ``out [B, Q, H, D]``; ``(out, lse)``; or ``(out, lse, probs)``.

    Raises:
        TypeError, ValueError: An argument has a wrong type, shape, dtype, device or value.
        RuntimeError: The named backend cannot run the call; the message lists the reasons.
    """
    dispatch.check_name(backend)
    query, key, value = cast_under_autocast(query, key, value)
    options = (softmax_scale, is_causal, softcap, deterministic)
    problem, module = check_and_choose(query, key, value, attn_mask, attn_bias, options, backend)
    out, lse = module.attention(problem, query, key, value, attn_mask, attn_bias)
    if return_attn_probs:
        return out, lse, _probabilities(problem, query, key, value, attn_mask, attn_bias)
    return (out, lse) if return_lse else out


def flash_sparse_attn_varlen_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    *,
    attn_mask: Mask = None,
    attn_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`flash_sparse_attn_func` for packed sequences: each attends to itself only.

    Args:
        query: ``[total_q, H, D]``.
        key: ``[total_k, Hkv, D]``.
        value: ``[total_k, Hkv, D]``.
        cu_seqlens_q: int32 ``[N + 1]``, borders of the queries from 0 to ``total_q``.
        cu_seqlens_k: int32 ``[N + 1]``, borders of the keys. Sequences may be empty.
        max_seqlen_q: Length of the longest query sequence.
        max_seqlen_k: Length of the longest key sequence.
        softmax_scale, is_causal, softcap, deterministic, return_lse, backend: As there; causal is
            bottom-right in every sequence.
        attn_mask: Bool ``[total_k]`` (True = visible), or a `KeySelection` with `cu_seqlens_k`.
        attn_bias: ``[{1|Hkv|H}, total_k]``, one bias per key.

    Returns:
        ``out [total_q, H, D]``, or ``(out, lse [H, total_q])``.
    """
    dispatch.check_name(backend)
    query, key, value = cast_under_autocast(query, key, value)
    checks.check_qkv(query, key, value, packed=True)
    checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.shape[0], query.device)
    checks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, key.shape[0], query.device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k: expected as many borders as cu_seqlens_q, {cu_seqlens_q.numel()}, "
            f"got {cu_seqlens_k.numel()}"
        )
    checks.check_max_seqlen("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    checks.check_max_seqlen("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    packed = PackedSequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if isinstance(attn_mask, KeySelection):
        checks.check_same_borders(attn_mask, cu_seqlens_k)
    if isinstance(attn_mask, Tensor):
        checks.check_tensor("attn_mask", attn_mask, "[total_k]")
        attn_mask = attn_mask[None, None, None]
    if attn_bias is not None:
        checks.check_tensor("attn_bias", attn_bias, "[{1|Hkv|H}, total_k]")
        attn_bias = attn_bias[None, :, None]
    query, key, value = query[None], key[None], value[None]
    problem = _check(
        query,
        key,
        value,
        attn_mask,
        attn_bias,
        softmax_scale,
        is_causal,
        softcap,
        deterministic,
        packed,
    )
    out, lse = dispatch.choose(problem, backend).attention(
        problem, query, key, value, attn_mask, attn_bias
    )
    return (out[0], lse[0]) if return_lse else out[0]


def flash_sparse_attn_func_auto(backend: str | None = None) -> Callable[..., Any]:
    """`flash_sparse_attn_func` bound to a backend.

    Args:
        backend: ``"cuda"``, ``"triton"``, ``"flex"``, ``"eager"``, or ``None`` for the best one.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The backend cannot run on this machine; the message lists the reasons.
    """
    dispatch.check_name(backend)
    if backend is not None and (reasons := dispatch.explain_backends()[backend]):
        raise RuntimeError(f"backend={backend!r} is not available: " + "; ".join(reasons))
    return partial(flash_sparse_attn_func, backend=backend)


def check_and_choose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    bias: Tensor | None,
    options: tuple[Any, ...],
    backend: str | None,
) -> tuple[Problem, ModuleType]:
    """Check a call and choose what runs it; one like an earlier call takes neither any more.

    Both read shapes, dtypes and options alone. Checks took 12 of the 31 us of host time that a call
    spent outside of its launches, the choice 2.
    """
    facts: tuple[Any, ...] | None = None
    known = None
    if not torch.compiler.is_compiling():
        try:
            facts = (
                *_describe(query),
                *_describe(key),
                *_describe(value),
                *_describe(mask),
                *_describe(bias),
                *options,
                *map(type, options),  # 1 equals True
                backend,
                torch.is_grad_enabled(),
                torch.are_deterministic_algorithms_enabled(),
            )
            known = _KNOWN_CALLS.get(facts)
        except (AttributeError, TypeError):  # not what is expected, or sizes that are symbols
            facts = None
    if known is None:
        problem = _check(query, key, value, mask, bias, *options)
        known = problem, dispatch.choose(problem, backend)
        if facts is not None:
            if len(_KNOWN_CALLS) >= _MAX_KNOWN:
                _KNOWN_CALLS.clear()
            _KNOWN_CALLS[facts] = known
    return known


_KNOWN_CALLS: dict[tuple[Any, ...], tuple[Problem, ModuleType]] = {}
_MAX_KNOWN = 1024


def _describe(tensor: Any) -> tuple[Any, ...]:
    """All that the checks read of a tensor or selection."""
    if tensor is None:
        return (None,)
    if isinstance(tensor, KeySelection):
        start = tensor.start
        return tensor.mode, tensor.cu_seqlens is None, start.shape, start.device
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    bias: Tensor | None,
    softmax_scale: float | None,
    is_causal: bool | None,
    softcap: float | None,
    deterministic: bool | None,
    packed: PackedSequences | None = None,
) -> Problem:
    """Check a call with 4-D query, key and value (packed ones checked before)."""
    if packed is None:
        checks.check_qkv(query, key, value)
    batch, query_len, heads, _ = query.shape
    key_len, kv_heads = key.shape[1:3]
    shape = (batch, heads, query_len, key_len)
    if isinstance(mask, KeySelection):
        checks.check_selection(mask, batch, kv_heads, key_len, query.device, packed is not None)
    elif mask is not None:
        checks.check_mask(mask, shape, kv_heads, query.device)
    checks.check_options(softmax_scale, deterministic)
    if bias is not None:
        checks.check_bias(bias, shape, kv_heads, query)
    return Problem.of(
        query,
        key,
        value,
        mask,
        bias,
        is_causal=checks.resolve_causality(mask, is_causal),
        softmax_scale=softmax_scale,
        softcap=checks.check_softcap(softcap),
        deterministic=deterministic,
        packed=packed,
    )


def cast_under_autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast query, key and value take its dtype; bias and scores keep theirs."""
    if not isinstance(tensors[0], Tensor):
        return tensors  # left to the checks
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    if not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _probabilities(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, mask: Mask, bias: Tensor | None
) -> Tensor:
    """``[B, H, Q, K]`` by the reference, in the precision of the kernels."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if isinstance(mask, KeySelection):
        mask = mask.to_dense(problem.query_len, problem.is_causal)
    with torch.no_grad():
        _, _, probs = attention_reference(
            query.to(dtype),
            key.to(dtype),
            value.to(dtype),
            mask,
            bias,
            softmax_scale=problem.softmax_scale,
            is_causal=problem.is_causal,
            softcap=problem.softcap,
        )
    return probs
