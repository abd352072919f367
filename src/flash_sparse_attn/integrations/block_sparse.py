"""Attention over blocks of keys that each query names itself (MiniMax-M3 in Transformers)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import checks
from ..attention import cast_under_autocast, flash_sparse_attn_func
from ..backends import triton
from ..problem import Problem

# Bytes of the bool mask that is alive at any time, forward and backward.
_MASK_BYTES = 1 << 26


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    block_size: int,
    *,
    visible: Tensor | None = None,
    is_causal: bool = True,
    **options: Any,
) -> Tensor:
    """Attention in which query ``i`` sees the keys of the blocks it lists, and causality holds.

    The kernels plan from the lists themselves. Elsewhere (on CPUs, in fp32, for a few queries
    without gradients, and where `visible` depends on the query) lists are written out as a bool
    mask for as many queries at a time as fit a fixed number of bytes; for the backward pass each
    part is made again.

    Args:
        query: ``[B, Q, H, D]``.
        key: ``[B, K, Hkv, D]``.
        value: ``[B, K, Hkv, D]``.
        block_indices: Integer ``[B, {1|Hkv|H}, Q, topk]``; -1 names no block. Block ``n`` holds the
            keys ``n * block_size`` to ``(n + 1) * block_size - 1``.
        block_size: Keys of a block.
        visible: Bool ``({1|B}, 1, {1|Q}, {1|K})``: what is False is hidden besides; ``None``:
            nothing is.
        is_causal: Query ``i`` stands at position ``i + K - Q`` and sees nothing after it.
        **options: `softmax_scale`, `softcap` and `deterministic` of `flash_sparse_attn_func`.

    Returns:
        ``[B, Q, H, D]``.

    Raises:
        TypeError, ValueError: An argument has a wrong type, shape or value.
    """
    query, key, value = cast_under_autocast(query, key, value)
    checks.check_qkv(query, key, value)
    checks.check_count("block_size", block_size, 1)
    _check_indices(block_indices, query, key, block_size)
    batch, query_len = query.shape[:2]
    key_len = key.shape[1]
    if visible is not None:
        checks.check_mask(visible, (batch, 1, query_len, key_len), 1, query.device)
    if visible is None or visible.shape[2] == 1:
        problem = _problem(query, key, value, is_causal, **options)
        if triton.serves_blocks(problem):
            lists = (block_indices, visible, block_size)
            return triton.block_attention(problem, query, key, value, *lists)
    rows = max(1, _MASK_BYTES // max(1, batch * block_indices.shape[1] * key_len))
    options = {"block_size": block_size, "is_causal": is_causal, **options}
    attend: Callable[..., Tensor] = partial(_attend, **options)
    if rows >= query_len:
        return attend(query, key, value, block_indices, visible)
    outs = []
    for begin in range(0, query_len, rows):
        part = slice(begin, min(begin + rows, query_len))
        # Causality hides everything behind the part's last query.
        end = max(0, key_len - query_len + part.stop) if is_causal else key_len
        seen = visible
        if visible is not None:
            seen = visible if visible.shape[2] == 1 else visible[:, :, part]
            seen = seen if visible.shape[3] == 1 else seen[..., :end]
        inputs = (query[:, part], key[:, :end], value[:, :end], block_indices[:, :, part], seen)
        outs.append(checkpoint(attend, *inputs, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outs, dim=1)


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
) -> Problem:
    checks.check_options(softmax_scale, deterministic)
    return Problem.of(
        query,
        key,
        value,
        None,
        None,
        is_causal=is_causal,
        softmax_scale=softmax_scale,
        softcap=checks.check_softcap(softcap),
        deterministic=deterministic,
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    visible: Tensor | None,
    *,
    block_size: int,
    is_causal: bool,
    **options: Any,
) -> Tensor:
    blocks = -(-key.shape[1] // block_size)
    # Column `blocks` takes the -1 and whatever lies behind the keys.
    listed = block_indices.long()
    listed = torch.where((listed < 0) | (listed > blocks), blocks, listed)
    mask = torch.zeros(*listed.shape[:3], blocks + 1, dtype=torch.bool, device=key.device)
    mask = mask.scatter(3, listed, True)[..., :blocks]
    mask = mask.repeat_interleave(block_size, dim=3)[..., : key.shape[1]]
    if visible is not None:
        mask = mask & visible
    return flash_sparse_attn_func(query, key, value, mask, is_causal=is_causal, **options)


def _check_indices(block_indices: Tensor, query: Tensor, key: Tensor, block_size: int) -> None:
    form = "[B, {1|Hkv|H}, Q, topk]"
    checks.check_tensor("block_indices", block_indices, form)
    if block_indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"block_indices: expected int32 or int64, got {block_indices.dtype}")
    batch, heads, query_len, _ = block_indices.shape
    expected = (query.shape[0], query.shape[1])
    if (batch, query_len) != expected or heads not in (1, key.shape[2], query.shape[2]):
        raise ValueError(
            f"block_indices: expected {form} with B, Q = {expected} and 1, {key.shape[2]} or "
            f"{query.shape[2]} heads, got {tuple(block_indices.shape)}"
        )
    blocks = -(-key.shape[1] // block_size)
    if checks.looks_at_values(block_indices) and block_indices.numel():
        low, high = int(block_indices.min()), int(block_indices.max())
        if low < -1 or high >= blocks:
            raise ValueError(
                f"block_indices: expected -1 (none) to {blocks - 1}, because {key.shape[1]} keys "
                f"make {blocks} blocks of {block_size}, got {low} to {high}"
            )
