"""Attention over full caches of keys and values, in sequences or in pages, for inference."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import cache_checks, dispatch
from .attention import Mask, check_and_choose, flash_sparse_attn_func
from .backends import triton
from .backends.triton import decode_ops
from .intervals import KeySelection
from .quantize import as_bytes, dequantize, quantize


def flash_sparse_attn_with_kvcache_func(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    attn_mask: Mask = None,
    attn_bias: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of a few new queries over a cache of keys and values, for inference.

    Sequence ``b`` has ``cache_seqlens[b]`` keys, and its queries are the last ones of it. The new
    keys have to be in the cache already: see `append_kvcache`.

    On a GPU, without gradients, this is two kernels, which read lengths, page numbers, mask and
    bias on the device: nothing waits for the GPU, and a captured CUDA graph stays valid while they
    change. What a mask or selection hides is not read. Page numbers are looked at on CPUs, and on
    GPUs with ``FLASH_SPARSE_ATTN_CHECK=1``; without, pages that do not exist hold no keys.

    Args:
        query: ``[B, Q, H, D]``.
        k_cache: ``[B, K, Hkv, D]``; with `block_table` ``[num_pages, page_size, Hkv, D]``. Any
            strides with contiguous ``D``, so that pages ``[num_pages, Hkv, page_size, D]`` are
            passed as ``.transpose(1, 2)``. dtype of `query`, or ``torch.float8_e4m3fn`` with
            scales.
        v_cache: As `k_cache`.
        attn_mask: Bool ``({1|B}, {1|Hkv|H}, {1|Q}, {1|K})``, or a `KeySelection` of
            ``[B, Hkv, K]``; with pages ``K = block_table.shape[1] * page_size``. Values past the
            length are not read.
        attn_bias: Float, of the same set of shapes.
        cache_seqlens: int32 ``[B]``.
        block_table: int32 ``[B, max_pages]``, the pages of every sequence in order.
        k_scale: fp32, what 8-bit keys are multiplied by: ``[Hkv]``, or one for each key in the
            shape of ``k_cache[..., 0]``.
        v_scale: As `k_scale`, of values.
        softmax_scale, is_causal, softcap, return_lse, backend: As in `flash_sparse_attn_func`.

    Returns:
        ``out [B, Q, H, D]``, or ``(out, lse [B, H, Q])``.

    Raises:
        TypeError, ValueError: An argument has a wrong type, shape, dtype, device or value.
        RuntimeError: The named backend cannot run the call; the message lists the reasons.
    """
    dispatch.check_name(backend)
    scales = (k_scale, v_scale)
    cache_checks.check_cache(query, k_cache, v_cache, block_table, scales)
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    cache_checks.check_cache_seqlens(cache_seqlens, query, capacity)
    if block_table is not None:
        cache_checks.check_pages(k_cache, block_table, cache_seqlens)
    # Stands for the keys, of which there need be no tensor [B, K, Hkv, D].
    keys = query.new_empty(()).expand(len(query), capacity, *k_cache.shape[2:])
    options = (softmax_scale, is_causal, softcap, None)
    # The eager backend takes every call: what runs this one is chosen below.
    problem, _ = check_and_choose(query, keys, keys, attn_mask, attn_bias, options, "eager")
    if _on_kernels(query, k_cache, attn_bias, backend):
        out, lse = decode_ops.decode(
            query,
            k_cache,
            v_cache,
            attn_mask,
            attn_bias,
            lengths=cache_seqlens,
            block_table=block_table,
            key_scale=k_scale,
            value_scale=v_scale,
            softmax_scale=problem.softmax_scale,
            softcap=problem.softcap,
            is_causal=problem.is_causal,
        )
        return (out, lse) if return_lse else out

    k_cache, v_cache = (
        cache if scale is None else dequantize(cache, scale.expand(cache.shape[:3]), query.dtype)
        for cache, scale in ((k_cache, k_scale), (v_cache, v_scale))
    )
    if block_table is not None:
        pages = block_table.clamp(min=0).long()
        k_cache, v_cache = k_cache[pages].flatten(1, 2), v_cache[pages].flatten(1, 2)
    outs, lses = [], []
    for row, length in enumerate(cache_seqlens.tolist()):
        out, lse = flash_sparse_attn_func(
            query[row : row + 1],
            k_cache[row : row + 1, :length],
            v_cache[row : row + 1, :length],
            _cache_row(attn_mask, row, length, capacity),
            cast("Tensor | None", _cache_row(attn_bias, row, length, capacity)),
            softmax_scale,
            is_causal,
            softcap,
            return_lse=True,
            backend=backend,
        )
        outs.append(out)
        lses.append(lse)
    if not outs:
        outs = [torch.empty_like(query)]
        lses = [query.new_empty(0, query.shape[2], query.shape[1], dtype=torch.float32)]
    return (torch.cat(outs), torch.cat(lses)) if return_lse else torch.cat(outs)


@torch.no_grad()
def append_kvcache(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write new keys and values into a cache, in place.

    Args:
        key: ``[T, Hkv, D]``, the new tokens of all sequences.
        value: ``[T, Hkv, D]``.
        k_cache: ``[num_pages, page_size, Hkv, D]``, or ``[B, K, Hkv, D]``; any strides with
            contiguous ``D``. dtype of `key`, or ``torch.float8_e4m3fn`` with scales.
        v_cache: As `k_cache`.
        slot_mapping: int32 or int64 ``[T]``: token ``t`` goes to key ``slot % page_size`` of page
            ``slot // page_size`` (without pages: of ``K`` and entry); -1 writes nothing. Looked at
            on CPUs, and on GPUs with ``FLASH_SPARSE_ATTN_CHECK=1``; without, a slot that does not
            exist writes nothing.
        k_scale: fp32 ``[Hkv]``, the scales to store 8-bit keys with, which are read; or in the
            shape of ``k_cache[..., 0]``, which get the scale of every new key.
        v_scale: As `k_scale`, of values.

    Raises:
        TypeError, ValueError: An argument has a wrong type, shape, dtype, device or value.
    """
    cache_checks.check_append(key, value, k_cache, v_cache, slot_mapping, (k_scale, v_scale))
    if not triton.unavailable() and not decode_ops.cannot_store(key, k_cache.dtype):
        decode_ops.append(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale)
        return
    written = slot_mapping >= 0
    slot = slot_mapping[written].long()
    place = (slot // k_cache.shape[1], slot % k_cache.shape[1])
    for new, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        rows = new[written]
        if scale is not None:
            rows, factor = quantize(rows, scale if scale.dim() == 1 else None)
            if scale.dim() > 1:
                scale[place] = factor
        as_bytes(cache)[place] = as_bytes(rows)


def _on_kernels(query: Tensor, k_cache: Tensor, bias: Tensor | None, backend: str | None) -> bool:
    """Whether the decoding kernels take a call.

    Raises:
        RuntimeError: They are asked for by name and cannot.
    """
    if backend not in (None, "cuda", "triton"):
        return False
    reasons = triton.unavailable() or decode_ops.unsupported(query, k_cache)
    if bias is not None and bias.dtype == torch.float64:
        reasons.append("it takes biases up to fp32, attn_bias is fp64; cast it")
    if reasons and backend is not None:
        listed = "".join(f"\n  - {reason}" for reason in reasons)
        raise RuntimeError(f"backend={backend!r} cannot run this call:{listed}")
    tensors = (query, k_cache) if bias is None else (query, k_cache, bias)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not reasons and not needs_grad and query.numel() > 0


def _cache_row(mask: Mask, row: int, length: int, capacity: int) -> Mask:
    """The part of a mask, bias or selection that belongs to one sequence of a cache."""
    if isinstance(mask, KeySelection):
        return mask.sequence(row, length)
    if mask is None:
        return None
    part = mask[row : row + 1] if mask.shape[0] > 1 else mask
    return part[..., :length] if mask.shape[-1] == capacity else part
