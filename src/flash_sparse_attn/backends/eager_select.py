"""Key selection in plain PyTorch: vectorised, O(K) memory, O(K log K) work, on any device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..intervals import NEVER, mask_rows, order_key, sequence_bounds

# Rows are ranked in groups of this many keys, so that selecting from millions of scores needs
# little memory: about 100 bytes for each key of a group.
_KEYS_PER_GROUP = 1 << 20

# Long sequences are ranked in chunks whose arrays stay in the processor's cache.
_CHUNK = 1 << 13


def intervals(
    score: Tensor,
    window_size: int,
    mode: str,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    keep_first: int,
    keep_recent: int,
) -> tuple[Tensor, Tensor]:
    """Start and expiry of every key, int32 in the shape of `score`."""
    key_len = score.shape[-1]
    if score.numel() == 0:
        return score.to(torch.int32), score.to(torch.int32)
    first, end = sequence_bounds(cu_seqlens, key_len, score.device)
    position = torch.arange(key_len, device=score.device) - first
    real = None if key_mask is None else mask_rows(key_mask, score.shape)

    start = position.expand(score.shape)
    if mode == "causal":
        key = order_key(score, key_mask)
        if cu_seqlens is None:
            expiry = _chunked_window_expiry(key, window_size)
        else:
            expire = partial(_window_expiry, first=first, end=end, window_size=window_size)
            expiry = _by_rows(expire, key)
    else:
        if mode == "relu":
            chosen = score > 0
        else:
            key = order_key(score, key_mask)
            rank = _by_rows(partial(_rank, first=first, newer_wins=False), key)
            chosen = rank < first + window_size
        expiry = torch.where(chosen, NEVER, start)
        start = torch.where(chosen, 0, start)

    if keep_first or keep_recent:
        rank = position.expand(score.shape) if real is None else _real_rank(real, first)
        if keep_first:
            kept = rank < keep_first
            expiry = torch.where(kept, NEVER, expiry)
            start = start if mode == "causal" else torch.where(kept, 0, start)
        if keep_recent:
            expiry = torch.maximum(expiry, _recent_until(rank, real, first, end, keep_recent))

    if real is not None:
        start = torch.where(real, start, position)
        expiry = torch.where(real, expiry, position)
    expiry = torch.where(expiry >= end - first, NEVER, expiry)
    return start.to(torch.int32).contiguous(), expiry.to(torch.int32).contiguous()


def _by_rows(function: Callable[[Tensor], Tensor], key: Tensor) -> Tensor:
    """Apply a function of ``[rows, K]`` to all leading dimensions, a bounded number at a time."""
    rows = key.reshape(-1, key.shape[-1])
    groups = rows.split(max(1, _KEYS_PER_GROUP // key.shape[-1]))
    return torch.cat([function(group) for group in groups]).view(key.shape)


def _rank(key: Tensor, first: Tensor, newer_wins: bool) -> Tensor:
    """Rank of every key, best first, counted from the first index of its sequence. ``[R, K]``."""
    sequence = (first > first.roll(1)).cumsum(0)
    composite = (sequence << 33) - key.long()
    if newer_wins:
        best_first = key.shape[-1] - 1 - composite.flip(-1).argsort(dim=-1, stable=True)
    else:
        best_first = composite.argsort(dim=-1, stable=True)
    index = torch.arange(key.shape[-1], device=key.device).expand(key.shape)
    return torch.empty_like(best_first).scatter_(-1, best_first, index)


def _chunked_window_expiry(key: Tensor, window_size: int) -> Tensor:
    """`_window_expiry` of single sequences ``[..., K]``, a chunk after the other.

    Only the W survivors of the past can still expire, so a chunk is the short sequence
    ``survivors + chunk``. A full window enters a chunk whole, and exactly W keys leave it.
    """
    rows = key.reshape(-1, key.shape[-1])
    expiry = rows.new_full(rows.shape, NEVER, dtype=torch.int64)
    alive = torch.empty(rows.shape[0], 0, dtype=torch.int64, device=key.device)
    chunk_len = max(_CHUNK, 2 * window_size)
    for begin in range(0, rows.shape[-1], chunk_len):
        chunk = torch.arange(begin, min(begin + chunk_len, rows.shape[-1]), device=key.device)
        index = torch.cat([alive, chunk.expand(rows.shape[0], -1)], dim=-1)
        first, end = sequence_bounds(None, index.shape[-1], key.device)
        expire = partial(_window_expiry, first=first, end=end, window_size=window_size)
        local = _by_rows(expire, rows.gather(-1, index))
        stays = local == index.shape[-1]
        offset = begin - alive.shape[-1]
        expiry.scatter_(-1, index, torch.where(stays, NEVER, local + offset))
        # The same number stays in every row; a stable sort keeps them in the order of positions.
        survivors = min(window_size, index.shape[-1])
        alive = index.gather(
            -1, stays.byte().argsort(dim=-1, descending=True, stable=True)[:, :survivors]
        )
    return expiry.view(key.shape)


def _window_expiry(key: Tensor, first: Tensor, end: Tensor, window_size: int) -> Tensor:
    """First local position at which `window_size` better keys exist, at least the key's own.

    The threshold of a prefix is the rank of its W-th best key and never gets worse, so a key
    expires after as many positions as have a threshold no better than its own rank. ``[R, K]``.
    """
    rank = _rank(key, first, True)
    index = torch.arange(key.shape[-1], device=key.device)
    full = index - first + 1 >= window_size
    threshold = torch.where(full, _prefix_quantile(rank, first, window_size - 1), end - 1)
    # at_least[r]: number of positions whose threshold is r or worse, over all sequences.
    at_least = torch.zeros_like(rank).scatter_add_(-1, threshold, torch.ones_like(rank))
    at_least = torch.nn.functional.pad(at_least.flip(-1).cumsum(-1).flip(-1), (0, 1))
    alive = at_least.gather(-1, rank) - at_least[:, end]
    return torch.maximum(alive, index - first)


def _prefix_quantile(rank: Tensor, first: Tensor, k: int) -> Tensor:
    """For every index ``t`` the ``k``-th smallest (from 0) of ``rank[first_t .. t]``, ``[R, K]``.

    A wavelet matrix: from the highest bit down, every prefix follows the half that holds its
    ``k``-th smallest value, and the values are partitioned by that bit, order kept. ``log2 K``
    rounds of whole-array operations, whatever the data. (Claude, Navarro, Ordonez: The wavelet
    matrix, 2015.) Prefixes shorter than ``k + 1`` give a meaningless rank.
    """
    length = rank.shape[-1]
    index = torch.arange(length, device=rank.device)
    low = first.expand(rank.shape)
    high = (index + 1).expand(rank.shape)
    remaining = torch.full_like(rank, k)
    result = torch.zeros_like(rank)
    values = rank
    for bit in reversed(range(max(1, (length - 1).bit_length()))):
        is_zero = ((values >> bit) & 1) == 0
        zeros = torch.nn.functional.pad(is_zero.cumsum(-1), (1, 0))
        total = zeros[:, -1:]
        zeros_low, zeros_high = zeros.gather(-1, low), zeros.gather(-1, high)
        count = zeros_high - zeros_low
        go_low = remaining < count
        low = torch.where(go_low, zeros_low, total + low - zeros_low)
        high = torch.where(go_low, zeros_high, total + high - zeros_high)
        remaining = torch.where(go_low, remaining, remaining - count)
        result = torch.where(go_low, result, result | (1 << bit))
        before = zeros[:, :-1]
        target = torch.where(is_zero, before, total + index - before)
        values = torch.empty_like(values).scatter_(-1, target, values)
    return result


def _real_rank(real: Tensor, first: Tensor) -> Tensor:
    """Number of real keys before each key in its sequence, in the shape of `real`."""
    before = real.cumsum(-1) - real.long()
    return before - before[..., first]


def _recent_until(
    rank: Tensor, real: Tensor | None, first: Tensor, end: Tensor, keep_recent: int
) -> Tensor:
    """Local position at which `keep_recent` newer real keys have arrived, else `NEVER`."""
    if real is None:
        return rank + keep_recent
    key_len = rank.shape[-1]
    index = torch.arange(key_len, device=rank.device)
    position_of = rank.new_full((*rank.shape[:-1], key_len + 1), NEVER)
    target = torch.where(real, first + rank, key_len)
    position_of.scatter_(-1, target, (index - first).expand(rank.shape))
    position_of[..., -1] = NEVER
    later = first + rank + keep_recent
    return position_of.gather(-1, torch.where(later < end, later, key_len))
