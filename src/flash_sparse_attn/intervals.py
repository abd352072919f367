"""Which keys are visible to whom: one interval of positions per key.

A score does not depend on the query, so a causal prefix only grows: once ``W`` better keys exist,
a key is out for ever. Key ``j`` is therefore visible exactly to the positions
``[start_j, expiry_j)``, and a selection is two integers per key instead of a ``Q x K`` mask.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .plan import Plan

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
    if is_causal:  # an interval starts at 0 or at its key, never later
        return (key_position <= position) & (position < expiry)
    # With more queries than keys the first positions are negative; without causality they stand
    # where the sequence begins.
    position = position.clamp(min=0)
    return (start <= position) & (position < expiry)


def mask_rows(key_mask: Tensor, shape: torch.Size) -> Tensor:
    """Broadcast ``[B, K]`` over the KV heads of ``[B, Hkv, K]``, or ``[T]`` of ``[Hkv, T]``."""
    return (key_mask[:, None] if key_mask.dim() == 2 else key_mask).expand(shape)


@dataclass(frozen=True, eq=False, repr=False)
class KeySelection:
    """The interval of positions to which each key is visible. Immutable; a pytree of tensors.

    Query ``i`` of a sequence with ``Q`` queries and ``K`` keys stands at position ``i + K - Q``.

    Attributes:
        start: int32 ``[B, Hkv, K]`` (packed: ``[Hkv, total_k]``), first position to see it.
        expiry: int32, the first position that no longer sees it; `NEVER` if it stays to the end. A
            key that is never visible has ``start == expiry``.
        score: fp32, the detached scores the choice was made from.
        mode: ``"causal"``, ``"shared"`` or ``"relu"``.
        window_size: Number of keys kept.
        keep_first: Number of first keys of each sequence that stay visible for ever.
        keep_recent: Number of newest keys that are visible whatever their score.
        key_mask: Bool ``[B, K]`` (packed: ``[total_k]``), False for padding, or ``None``.
        cu_seqlens: int32 ``[N + 1]``, the borders of packed sequences, or ``None``.
        plan: What the GPU kernels walk, from `prepare_selection`, or ``None``: then each call makes
            its own.
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
    plan: Plan | None = None

    @property
    def is_causal(self) -> bool | None:
        """True if the choice itself is causal; ``None`` if the attention call has to say it."""
        return True if self.mode == "causal" else None

    def resolve_causality(self, is_causal: bool | None) -> bool:
        """What `is_causal` of a call means with this selection.

        Raises:
            ValueError: It contradicts the selection, or is left open where the mode does not say
                it.
        """
        if self.is_causal is None:
            if is_causal is None:
                raise ValueError(
                    f"is_causal: mode={self.mode!r} of a selection does not say it; expected True "
                    "or False, got None; pass is_causal explicitly"
                )
            return is_causal
        if is_causal is False:
            raise ValueError(
                "is_causal: expected None or True with a causal selection, got False; use "
                "select_keys(..., mode='shared') for keys that every query sees"
            )
        return True

    @property
    def capacity(self) -> int | None:
        """Most keys any position can see, from shapes alone; ``None`` for ``"relu"`` (no bound)."""
        if self.mode == "relu":
            return None
        return min(self.window_size + self.keep_first + self.keep_recent, self.start.shape[-1])

    def to(self, device: torch.device | str) -> KeySelection:
        """The same selection with its tensors on another device."""
        moved: dict[str, Any] = {
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
            plan=None,
        )

    def to_dense(self, query_len: int | None = None, is_causal: bool | None = None) -> Tensor:
        """The mask ``[B, Hkv, Q, K]`` this selection stands for (packed: ``[Hkv, total, total]``).

        Args:
            query_len: Number of queries, aligned to the end of the keys; default as many as keys.
                Packed selections have as many queries as keys in every sequence.
            is_causal: Has to be given for the modes ``"shared"`` and ``"relu"``.
        """
        causal = self.resolve_causality(is_causal)
        if query_len is not None and query_len < 0:
            raise ValueError(f"query_len: expected at least 0, got {query_len}")
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
                    f"query_len: a packed selection has as many queries as keys, {key_len}; "
                    f"got {query_len}; leave it out"
                )
            first, _ = sequence_bounds(self.cu_seqlens, key_len)
            key_position = position = index - first
            same_sequence = first[:, None] == first[None, :]
        visible = visible_to(
            position[:, None],
            self.start[..., None, :],
            self.expiry[..., None, :],
            key_position,
            causal,
        )
        return visible if same_sequence is None else visible & same_sequence

    def live_keys(self) -> Tensor:
        """Number of visible keys at every position, int64 in the shape of `start`."""
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
            real = mask_rows(self.key_mask, self.score.shape)
            order = torch.where(
                real, order, -(1 << 40) - index
            )  # unique: padding ties with nothing
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
        selection.plan,
    ]
    return tensors, (
        selection.mode,
        selection.window_size,
        selection.keep_first,
        selection.keep_recent,
    )


def _unflatten(children: Any, context: Any) -> KeySelection:
    start, expiry, score, key_mask, cu_seqlens, plan = children
    mode, window_size, keep_first, keep_recent = context
    return KeySelection(
        start, expiry, score, mode, window_size, keep_first, keep_recent, key_mask, cu_seqlens, plan
    )


_pytree.register_pytree_node(
    KeySelection,
    _flatten,
    _unflatten,
    serialized_type_name="flash_sparse_attn.KeySelection",
)
