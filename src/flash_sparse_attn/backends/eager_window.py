"""A `WindowCache` in plain PyTorch: which keys a piece of text leaves, and putting them away."""

from __future__ import annotations

import torch
from torch import Tensor

from ..intervals import order_key
from ..quantize import as_bytes, dequantize, quantize
from ..window_state import EMPTY, WindowState

# Tokens that are read at once.
_PIECE = 1 << 16


class Candidates:
    """The survivors of a state and the tokens of a piece, side by side.

    Attributes:
        score: fp32 ``[B * Hkv, C + T]``, differentiable in the scores of the piece.
        position: int64 ``[B * Hkv, C + T]``, -1 for empty slots and padding.
        seen: int64 ``[B]``, real tokens read, the piece included.
        kept: Bool ``[B * Hkv, C + T]``, visible after the piece.
        threshold: int64 ``[B * Hkv]``, the ``W``-th best rank key.
    """

    def __init__(self, state: WindowState, scores: Tensor, key_mask: Tensor | None):
        self.state = state
        if key_mask is None:
            key_mask = torch.ones_like(scores[:, 0], dtype=torch.bool)
        count = state.seen_tokens[:, None] + key_mask.cumsum(-1)
        position = torch.where(key_mask, count - 1, -1)[:, None].expand(scores.shape)
        self.score = torch.cat([state.score, scores.float()], dim=-1).flatten(0, 1)
        self.position = torch.cat([state.position, position], dim=-1).flatten(0, 1)
        self.seen = state.seen_tokens + key_mask.sum(-1)
        rank = rank_keys(self.score.detach(), self.position)
        self.threshold = rank.topk(state.window_size, dim=-1, sorted=False).values.amin(-1)
        kept = rank >= self.threshold[:, None]
        kept |= self.position < state.keep_first
        kept |= self.position >= self._rows(self.seen) - state.keep_recent
        self.kept = kept & (self.position >= 0)

    def order(self) -> Tensor:
        """Candidates in the order of the text, empty slots first, int64 ``[B * Hkv, C + T]``.

        In this order they are a text of their own with the same choice as the whole one: what is
        missing is never visible again, and neither the first nor the newest tokens are missing.
        """
        capacity, total = self.state.key.shape[2], self.score.shape[-1]
        order = torch.arange(total, device=self.score.device).repeat(len(self.score), 1)
        order[:, :capacity] = self.position[:, :capacity].argsort(-1)
        return order

    @torch.no_grad()
    def commit(self, key: Tensor, value: Tensor) -> None:
        """Empty the slots of evicted keys, and put the kept new ones into empty slots.

        Args:
            key: ``[B, T, Hkv, D]``.
            value: ``[B, T, Hkv, D]``.
        """
        state, (batch, length, kv_heads) = self.state, key.shape[:3]
        if length == 0:
            return
        # A newest token that is not kept was never visible: losing it takes nothing from the past.
        newest = self._rows(self.seen) - 1
        lost = (self.position >= 0) & ~self.kept & (self.position < newest)
        evicted = lost.view(batch, -1).any(-1)
        state.evicted_at.copy_(torch.where(evicted, self.seen, state.evicted_at))
        state.seen_tokens.copy_(self.seen)
        state.threshold.copy_(self.threshold.view_as(state.threshold))

        slots = state.position.shape
        stays, enters = self.kept.view(batch, kv_heads, -1).split([slots[2], length], dim=-1)
        state.position.masked_fill_(~stays, -1)
        # The n-th kept new token goes to the n-th empty slot. There may be fewer of either: pairs
        # without a slot repeat the first pair, and slots without a token get what they hold.
        pairs = torch.arange(1, min(slots[2], length) + 1, device=key.device)
        empty = (~stays).cumsum(-1)
        pairs = torch.where(pairs <= empty[..., -1:], pairs, 1)
        slot = torch.searchsorted(empty, pairs).clamp(max=slots[2] - 1)
        token = torch.searchsorted(enters.cumsum(-1), pairs)
        entry = torch.arange(batch, device=key.device)[:, None, None]
        head = torch.arange(kv_heads, device=key.device)[:, None]
        is_new, token = token < length, token.clamp(max=length - 1)
        new_score, new_position = (
            t.view(*slots[:2], -1)[..., slots[2] :] for t in (self.score, self.position)
        )
        pieces = [
            (state.score, new_score.gather(2, token)),
            (state.position, new_position.gather(2, token)),
        ]
        for store, scale, rows in (
            (state.key, state.key_scale, key[entry, token, head]),
            (state.value, state.value_scale, value[entry, token, head]),
        ):
            if scale is not None:
                rows, factor = quantize(rows)
                pieces.append((scale, factor))
            pieces.append((as_bytes(store), as_bytes(rows)))
        for store, new in pieces:
            mask = is_new.view(*is_new.shape, *[1] * (new.dim() - 3))
            store[entry, head, slot] = torch.where(mask, new, store[entry, head, slot])

    def _rows(self, per_entry: Tensor) -> Tensor:
        """``[B]`` as a column for arrays of ``[B * Hkv, C + T]``."""
        return per_entry[:, None].expand(-1, self.state.key.shape[1]).reshape(-1, 1)


def read(
    state: WindowState, key: Tensor, value: Tensor, scores: Tensor, key_mask: Tensor | None
) -> None:
    """Read tokens ``[B, T, ...]`` of any number in the same extra memory."""
    for begin in range(0, key.shape[1], _PIECE):
        piece = slice(begin, begin + _PIECE)
        mask = None if key_mask is None else key_mask[:, piece]
        Candidates(state, scores[..., piece], mask).commit(key[:, piece], value[:, piece])


def rank_keys(score: Tensor, position: Tensor) -> Tensor:
    """One int64 per key that holds the order: score, then position; see `WindowState`."""
    rank = (order_key(score).long() << 32) + position
    return rank.masked_fill_(position < 0, EMPTY)


def threshold(state: WindowState) -> Tensor:
    """The ``W``-th best rank key of the slots, int64 ``[B, Hkv]``."""
    rank = rank_keys(state.score, state.position)
    return rank.topk(state.window_size, dim=-1, sorted=False).values.amin(-1)


def joined(store: Tensor, scale: Tensor | None, new: Tensor, order: Tensor | None) -> Tensor:
    """Slots ``[B, Hkv, C, D]`` and new tokens ``[B, T, Hkv, D]`` as ``[B * Hkv, C + T, 1, D]``."""
    if scale is not None:
        store = dequantize(store, scale, new.dtype)
    store = store.flatten(0, 1)
    if order is not None:
        store = store.take_along_dim(order[:, : store.shape[1], None], 1)
    return torch.cat([store, new.transpose(1, 2).flatten(0, 1)], dim=1).unsqueeze(2)
