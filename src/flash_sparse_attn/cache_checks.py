"""Checks of caches, pages, slots and scales. Messages are as in `checks`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_tensor, looks_at_values
from .quantize import FP8

_Scales = tuple[Tensor | None, Tensor | None]


def check_cache(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None, scales: _Scales
) -> None:
    """Queries, keys and values of a cache, in sequences or in pages, and their scales."""
    check_tensor("query", query, "[B, Q, H, D]")
    form = "[B, K, Hkv, D]"
    if block_table is not None:
        form = "[num_pages, page_size, Hkv, D]"
        check_tensor("block_table", block_table, "[B, max_pages]")
        if block_table.dtype != torch.int32:
            raise TypeError(
                f"block_table: expected torch.int32, got {block_table.dtype}; use .int()"
            )
        if block_table.device != query.device:
            raise ValueError(
                f"block_table: expected device {query.device}, got {block_table.device}; move it"
            )
        if block_table.shape[0] != query.shape[0]:
            raise ValueError(
                f"block_table: expected {query.shape[0]} rows as in query, "
                f"got {block_table.shape[0]}"
            )
    _check_stores(form, k_cache, v_cache, scales, query)
    if block_table is None and k_cache.shape[0] != query.shape[0]:
        raise ValueError(
            f"k_cache: expected batch size {query.shape[0]} as in query, got {k_cache.shape[0]}; "
            "pages come with a block_table"
        )


def check_cache_seqlens(cache_seqlens: Tensor, query: Tensor, capacity: int) -> None:
    """int32 lengths ``[B]`` between 0 and the capacity of the cache."""
    check_tensor("cache_seqlens", cache_seqlens, "[B]")
    if cache_seqlens.dtype != torch.int32:
        raise TypeError(
            f"cache_seqlens: expected torch.int32, got {cache_seqlens.dtype}; use .int()"
        )
    if cache_seqlens.shape[0] != query.shape[0]:
        raise ValueError(
            f"cache_seqlens: expected [B] = ({query.shape[0]},), got {tuple(cache_seqlens.shape)}"
        )
    if cache_seqlens.device != query.device:
        raise ValueError(
            f"cache_seqlens: expected device {query.device}, got {cache_seqlens.device}"
        )
    if looks_at_values(cache_seqlens) and cache_seqlens.numel():
        low, high = int(cache_seqlens.min()), int(cache_seqlens.max())
        if low < 0 or high > capacity:
            raise ValueError(
                f"cache_seqlens: expected lengths from 0 to the capacity {capacity}, "
                f"got {low} to {high}"
            )


def check_pages(k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> None:
    """Pages below a sequence's length exist; later entries of a table mean nothing."""
    if not looks_at_values(block_table):
        return
    page = torch.arange(block_table.shape[1], device=block_table.device)
    needed = page < -(-cache_seqlens[:, None] // k_cache.shape[1])
    bad = needed & ((block_table < 0) | (block_table >= k_cache.shape[0]))
    if bad.any():
        raise ValueError(
            f"block_table: expected pages from 0 to {k_cache.shape[0] - 1}, got "
            f"{block_table[bad].unique().tolist()}"
        )


def check_append(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    scales: _Scales,
) -> None:
    """The arguments of `append_kvcache`."""
    for name, new in (("key", key), ("value", value)):
        check_tensor(name, new, "[T, Hkv, D]")
        expected = (key.shape[0], *k_cache.shape[2:])
        if tuple(new.shape) != expected:
            raise ValueError(
                f"{name}: expected [T, Hkv, D] = {expected} as in k_cache, got {tuple(new.shape)}"
            )
        if (new.dtype, new.device) != (key.dtype, key.device):
            raise ValueError(
                f"{name}: expected {key.dtype} on {key.device} as key, got {new.dtype} on "
                f"{new.device}"
            )
    _check_stores("[num_pages, page_size, Hkv, D]", k_cache, v_cache, scales, key)
    check_tensor("slot_mapping", slot_mapping, "[T]")
    if slot_mapping.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"slot_mapping: expected int32 or int64, got {slot_mapping.dtype}")
    if slot_mapping.shape != key.shape[:1] or slot_mapping.device != key.device:
        raise ValueError(
            f"slot_mapping: expected [T] = ({len(key)},) on {key.device}, got "
            f"{tuple(slot_mapping.shape)} on {slot_mapping.device}"
        )
    slots = k_cache.shape[0] * k_cache.shape[1]
    if looks_at_values(slot_mapping):
        bad = (slot_mapping < -1) | (slot_mapping >= slots)
        if bad.any():
            raise ValueError(
                f"slot_mapping: expected slots from 0 to {slots - 1}, or -1 to write nothing, got "
                f"{slot_mapping[bad].unique().tolist()}"
            )


def _check_stores(
    form: str, k_cache: Tensor, v_cache: Tensor, scales: _Scales, tokens: Tensor
) -> None:
    """Keys and values as they are stored, for the tokens `query` or `key`."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, cache, form)
        if tuple(cache.shape) != tuple(k_cache.shape):
            raise ValueError(
                f"{name}: expected the shape of k_cache, {tuple(k_cache.shape)}, got "
                f"{tuple(cache.shape)}"
            )
        if cache.device != tokens.device:
            raise ValueError(f"{name}: expected device {tokens.device}, got {cache.device}")
        if cache.stride(3) != 1 and cache.numel():
            raise ValueError(
                f"{name}: expected a contiguous last dimension, got strides {cache.stride()}; a "
                "copy at every call would cost more than the attention"
            )
    for name, cache, scale in zip(("k", "v"), (k_cache, v_cache), scales, strict=True):
        if cache.dtype not in (tokens.dtype, FP8) or cache.dtype != k_cache.dtype:
            raise TypeError(
                f"{name}_cache: expected {tokens.dtype}, or {FP8} with scales, both caches alike, "
                f"got {cache.dtype}"
            )
        if (scale is not None) != (cache.dtype == FP8):
            got = "none" if scale is None else "one"
            raise ValueError(
                f"{name}_scale: expected a scale with caches of {FP8} and none with others, got "
                f"{got} with {cache.dtype}"
            )
        if scale is not None:
            _check_scale(f"{name}_scale", scale, cache.shape[:3], tokens)


def _check_scale(name: str, scale: Tensor, shape: Sequence[int], tokens: Tensor) -> None:
    allowed = (tuple(shape[2:]), tuple(shape))
    if not isinstance(scale, Tensor) or tuple(scale.shape) not in allowed:
        got = tuple(scale.shape) if isinstance(scale, Tensor) else type(scale).__name__
        raise ValueError(f"{name}: expected [Hkv] = {allowed[0]} or {allowed[1]}, got {got}")
    if scale.dtype != torch.float32 or scale.device != tokens.device:
        raise TypeError(
            f"{name}: expected torch.float32 on {tokens.device}, got {scale.dtype} on "
            f"{scale.device}"
        )
