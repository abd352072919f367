"""Which keys are visible to whom: one score per key, one interval of positions per key.

A score does not depend on the query, so a causal prefix only grows: once ``W`` better keys exist, a
key is out for ever. Key ``j`` is therefore visible exactly to the positions ``[start_j, expiry_j)``,
and a selection is two integers per key instead of a ``Q x K`` mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from . import checks

NEVER = 2**31 - 1
"""The expiry of a key that stays visible to the end of its sequence."""

MODES = ("causal", "shared", "relu")

# Rows are ranked in groups of this many keys, so that selecting from millions of scores needs
# little memory: about 100 bytes for each key of a group.
_KEYS_PER_GROUP = 1 << 20

# Long sequences are ranked in chunks whose arrays stay in the processor's cache.
_CHUNK = 1 << 13


@dataclass(frozen=True, eq=False, repr=False)
class KeySelection:
    """The interval of positions to which each key is visible. Immutable; a pytree of tensors.

    Query ``i`` of a sequence with ``Q`` queries and ``K`` keys stands at position ``i + K - Q``.

    Attributes:
        start: int32 ``[B, Hkv, K]`` (packed: ``[Hkv, total_k]``), the first position that sees the key.
        expiry: int32, the first position that no longer sees it; `NEVER` if it stays to the end. A
            key that is never visible has ``start == expiry``.
        score: fp32, the detached scores the choice was made from.
        mode: ``"causal"``, ``"shared"`` or ``"relu"``.
        window_size: Number of keys kept.
        keep_first: Number of first keys of each sequence that stay visible for ever.
        keep_recent: Number of newest keys that are visible whatever their score.
        key_mask: Bool ``[B, K]`` (packed: ``[total_k]``), False for padding, or ``None``.
        cu_seqlens: int32 ``[N + 1]``, the borders of packed sequences, or ``None``.
    """

    start: Tensor
    expiry: Tensor
    score: Tensor
    mode: str
    window_size: int
    keep_first: int = 0
    keep_recent: int = 0
    key_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def is_causal(self) -> bool | None:
        """True if the choice itself is causal; ``None`` if the attention call has to say it."""
        return True if self.mode == "causal" else None

    @property
    def capacity(self) -> int | None:
        """Most keys any position can see, from shapes alone; ``None`` for ``"relu"`` (no bound)."""
        if self.mode == "relu":
            return None
        return min(self.window_size + self.keep_first + self.keep_recent, self.start.shape[-1])

    def to(self, device: torch.device | str) -> KeySelection:
        """The same selection with its tensors on another device."""
        moved = {
            f.name: v.to(device)
            for f in fields(self)
            if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def sequence(self, index: int, length: int) -> KeySelection:
        """The first `length` keys of one batch entry, as a selection of batch size 1."""
        row = slice(index, index + 1)
        return replace(
            self,
            start=self.start[row, :, :length],
            expiry=self.expiry[row, :, :length],
            score=self.score[row, :, :length],
            key_mask=None if self.key_mask is None else self.key_mask[row, :length],
        )

    def to_dense(self, query_len: int | None = None, is_causal: bool | None = None) -> Tensor:
        """The mask ``[B, Hkv, Q, K]`` this selection stands for (packed: ``[Hkv, total, total]``).

        Args:
            query_len: Number of queries, aligned to the end of the keys; default as many as keys.
                Packed selections have as many queries as keys in every sequence.
            is_causal: Has to be given for the modes ``"shared"`` and ``"relu"``.
        """
        causal = checks.resolve_causality(self, is_causal)
        key_len = self.start.shape[-1]
        index = torch.arange(key_len, device=self.start.device)
        if self.cu_seqlens is None:
            query_len = key_len if query_len is None else query_len
            key_position = index
            position = torch.arange(query_len, device=index.device) + key_len - query_len
            same_sequence = None
        else:
            if query_len not in (None, key_len):
                raise ValueError(
                    f"query_len: a packed selection has as many queries as keys ({key_len}), got {query_len}"
                )
            first, _ = sequence_bounds(self.cu_seqlens, key_len)
            key_position = position = index - first
            same_sequence = first[:, None] == first[None, :]
        visible = visible_to(
            position[:, None], self.start[..., None, :], self.expiry[..., None, :], key_position, causal
        )
        return visible if same_sequence is None else visible & same_sequence

    def live_keys(self) -> Tensor:
        """Number of visible keys at every position, int64 ``[B, Hkv, K]`` (packed: ``[Hkv, total]``)."""
        key_len = self.start.shape[-1]
        first, end = sequence_bounds(self.cu_seqlens, key_len, self.start.device)
        begin = torch.arange(key_len, device=first.device).expand(self.start.shape)
        stop = torch.maximum(torch.minimum(first + self.expiry.long(), end), begin)
        change = begin.new_zeros(*self.start.shape[:-1], key_len + 1)
        change.scatter_add_(-1, begin, torch.ones_like(begin))
        change.scatter_add_(-1, stop, -torch.ones_like(stop))
        return change.cumsum(-1)[..., :-1]

    def density(self) -> float:
        """Visible (query, key) pairs over causal pairs, with one query for every key."""
        first, _ = sequence_bounds(self.cu_seqlens, self.start.shape[-1], self.start.device)
        pairs = (torch.arange(self.start.shape[-1], device=first.device) - first + 1).sum()
        rows = self.start.shape[:-1].numel()
        return float(self.live_keys().sum() / (pairs * rows).clamp(min=1))

    def statistics(self) -> dict[str, float]:
        """What the selection does, over all positions that causality lets see a key.

        Returns:
            ``density`` as above; ``live_keys``, the mean number of visible keys; ``age``, the mean
            distance in positions from a query to the keys it sees; ``churn``, evictions for each
            position; ``tied``, the part of real keys whose score another real key of the same
            sequence has as well.
        """
        key_len = self.start.shape[-1]
        first, end = sequence_bounds(self.cu_seqlens, key_len, self.start.device)
        index = torch.arange(key_len, device=first.device)
        stop = torch.minimum(first + self.expiry.long(), end)
        life = (stop - index).clamp(min=0).double()
        evicted = (life > 0) & (stop < end)

        order = order_key(self.score).long() + (first << 33)
        real = torch.ones_like(order, dtype=torch.bool)
        if self.key_mask is not None:
            real = _mask_rows(self.key_mask, self.score.shape)
            order = torch.where(real, order, -(1 << 40) - index)  # unique: padding ties with nothing
        order = order.sort(dim=-1).values
        same = torch.nn.functional.pad(order[..., 1:] == order[..., :-1], (1, 1))
        tied = same[..., 1:] | same[..., :-1]
        return {
            "density": self.density(),
            "live_keys": float(self.live_keys().double().mean()),
            "age": float((life * (life - 1) / 2).sum() / life.sum().clamp(min=1)),
            "churn": float(evicted.double().mean()),
            "tied": float(tied.sum() / real.sum().clamp(min=1)),
        }

    def __repr__(self) -> str:
        shape = " x ".join(str(size) for size in self.start.shape)
        extras = "".join(
            f", {name}={getattr(self, name)}"
            for name in ("keep_first", "keep_recent")
            if getattr(self, name)
        )
        packed = "" if self.cu_seqlens is None else f", {len(self.cu_seqlens) - 1} packed sequences"
        padded = "" if self.key_mask is None else ", padded"
        density = "" if self.start.is_meta else f", density {self.density():.2%}"
        return (
            f"KeySelection({self.mode}, [{shape}] keys, window_size={self.window_size}"
            f"{extras}{packed}{padded}{density}, device={self.start.device})"
        )


def _flatten(selection: KeySelection) -> tuple[list[Any], tuple[Any, ...]]:
    tensors = [
        selection.start,
        selection.expiry,
        selection.score,
        selection.key_mask,
        selection.cu_seqlens,
    ]
    return tensors, (
        selection.mode,
        selection.window_size,
        selection.keep_first,
        selection.keep_recent,
    )


def _unflatten(children: Any, context: Any) -> KeySelection:
    start, expiry, score, key_mask, cu_seqlens = children
    return KeySelection(start, expiry, score, *context, key_mask, cu_seqlens)


_pytree.register_pytree_node(
    KeySelection,
    _flatten,
    _unflatten,
    serialized_type_name="flash_sparse_attn.selection.KeySelection",
)


def select_keys(
    scores: Tensor,
    window_size: int,
    *,
    mode: str = "causal",
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
) -> KeySelection:
    """Choose the keys that each position sees, by one score per key.

    The order is strict: score first, then position. ``NaN`` ranks below ``-inf``, padding below
    everything. The selection reads detached scores in fp32 and has no gradient.

    Args:
        scores: Float ``[B, Hkv, K]``, or ``[Hkv, total_k]`` with `cu_seqlens`.
        window_size: ``W >= 1``, the number of keys kept. ``W >= K`` keeps all.
        mode: ``"causal"``: position ``t`` sees the ``W`` best keys among positions ``<= t``; equal
            scores: the newer key wins, so constant scores are a sliding window. ``"shared"``: the
            ``W`` best keys of the whole sequence for every query (older wins); **the choice reads
            the future**. ``"relu"``: every key with a score above 0.
        key_mask: Bool ``[B, K]`` (packed: ``[total_k]``), True for real tokens. Padding is never
            visible and never competes.
        cu_seqlens: int32 ``[N + 1]``, borders of packed sequences; each is selected on its own.
        keep_first: The first keys of each sequence that are visible for ever, on top of the ``W``.
        keep_recent: The newest keys that are visible to a query, on top of the ``W`` best.

    Returns:
        A `KeySelection` with intervals for every key.

    Raises:
        TypeError, ValueError: An argument has a wrong type, shape, dtype or value. NaN scores are
            looked for on CPU tensors, and on GPUs with ``FLASH_SPARSE_ATTN_CHECK=1``.
    """
    checks.check_selection_arguments(
        scores, window_size, mode, MODES, key_mask, cu_seqlens, keep_first, keep_recent
    )
    score = scores.detach().to(torch.float32).contiguous()
    start, expiry = _intervals(
        score, window_size, mode, key_mask, cu_seqlens, keep_first, keep_recent
    )
    return KeySelection(
        start,
        expiry,
        score,
        mode,
        window_size,
        keep_first,
        keep_recent,
        key_mask,
        cu_seqlens,
    )


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
        key = torch.where(_mask_rows(key_mask, score.shape), key, _PADDING)
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


def _mask_rows(key_mask: Tensor, shape: torch.Size) -> Tensor:
    """Broadcast ``[B, K]`` over the KV heads of ``[B, Hkv, K]`` (packed: ``[T]`` over ``[Hkv, T]``)."""
    return (key_mask[:, None] if key_mask.dim() == 2 else key_mask).expand(shape)


def _intervals(
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
    first, end = sequence_bounds(cu_seqlens, key_len, score.device)
    position = torch.arange(key_len, device=score.device) - first
    real = None if key_mask is None else _mask_rows(key_mask, score.shape)

    start = position.expand(score.shape)
    if mode == "causal":
        key = order_key(score, key_mask)
        if cu_seqlens is None:
            expiry = _chunked_window_expiry(key, window_size)
        else:
            expiry = _by_rows(lambda rows: _window_expiry(rows, first, end, window_size), key)
    else:
        if mode == "relu":
            chosen = score > 0
        else:
            key = order_key(score, key_mask)
            chosen = _by_rows(lambda rows: _rank(rows, first, False), key) < first + window_size
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
    if key.numel() == 0:
        return torch.zeros_like(key, dtype=torch.int64)
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
    ``survivors + chunk``. All keys of a full window survive up to the chunk, and exactly W leave it.
    """
    rows = key.reshape(-1, key.shape[-1])
    expiry = rows.new_full(rows.shape, NEVER, dtype=torch.int64)
    alive = torch.empty(rows.shape[0], 0, dtype=torch.int64, device=key.device)
    chunk_len = max(_CHUNK, 2 * window_size)
    for begin in range(0, rows.shape[-1], chunk_len):
        chunk = torch.arange(begin, min(begin + chunk_len, rows.shape[-1]), device=key.device)
        index = torch.cat([alive, chunk.expand(rows.shape[0], -1)], dim=-1)
        first, end = sequence_bounds(None, index.shape[-1], key.device)
        local = _by_rows(
            lambda group, f=first, e=end: _window_expiry(group, f, e, window_size),
            rows.gather(-1, index),
        )
        stays = local == index.shape[-1]
        offset = begin - alive.shape[-1]
        expiry.scatter_(-1, index, torch.where(stays, NEVER, local + offset))
        # The same number stays in every row; a stable sort keeps them in the order of positions.
        survivors = min(window_size, index.shape[-1])
        alive = index.gather(-1, stays.byte().argsort(dim=-1, descending=True, stable=True)[:, :survivors])
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
    """For every index ``t`` the ``k``-th smallest of ``rank[first_t .. t]`` (``k`` from 0), ``[R, K]``.

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
    """Local position at which `keep_recent` newer real keys have arrived; `NEVER` if they do not."""
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
