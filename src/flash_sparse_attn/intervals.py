"""Intervals of positions: the order of keys, the borders of sequences, and who sees whom."""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = 2**31 - 1
"""The expiry of a key that stays visible to the end of its sequence."""

_NAN = -(2**31) + 1
_PADDING = -(2**31)


def order_key(score: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Map fp32 scores to int32 keys with the same order: larger is better.

    ``-0`` equals ``+0``; NaN is one class below ``-inf``; padding is the lowest class.
    """
    bits = (score + 0.0).view(torch.int32)  # -0 + 0 is +0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = torch.where(torch.isnan(score), _NAN, key)
    if key_mask is not None:
        key = torch.where(mask_rows(key_mask, score.shape), key, _PADDING)
    return key


def sequence_bounds(
    cu_seqlens: Tensor | None, total: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """First index and end of the sequence that each of `total` packed tokens belongs to, int64."""
    if cu_seqlens is None:
        return (
            torch.zeros(total, dtype=torch.int64, device=device),
            torch.full((total,), total, dtype=torch.int64, device=device),
        )
    borders = cu_seqlens.long()
    index = torch.arange(total, device=borders.device)
    sequence = torch.searchsorted(borders, index, right=True) - 1
    return borders[sequence], borders[sequence + 1]


def visible_to(
    position: Tensor, start: Tensor, expiry: Tensor, key_position: Tensor, is_causal: bool
) -> Tensor:
    """Whether keys with these intervals are visible to these query positions (broadcast)."""
    if is_causal:
        return (start <= position) & (position < expiry) & (key_position <= position)
    # With more queries than keys the first positions are negative; without causality they stand
    # where the sequence begins.
    position = position.clamp(min=0)
    return (start <= position) & (position < expiry)


def mask_rows(key_mask: Tensor, shape: torch.Size) -> Tensor:
    """Broadcast ``[B, K]`` over the KV heads of ``[B, Hkv, K]``, or ``[T]`` of ``[Hkv, T]``."""
    return (key_mask[:, None] if key_mask.dim() == 2 else key_mask).expand(shape)
