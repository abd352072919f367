"""Exact decoding state of constant size: the keys that later queries can still see, and no others.

A score does not depend on the query, so a key that ``W`` better keys have overtaken is invisible
for ever. What a query sees therefore depends on the survivors alone: at most ``window_size +
keep_first + keep_recent`` keys per KV head, however long the text. A step costs O(W) time and no
new memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .attention import flash_sparse_attn_func
from .intervals import NEVER, order_key
from .selection import KeySelection, select_keys

_TENSORS = ("key", "value", "score", "position", "seen_tokens", "evicted_at")
_SIZES = ("window_size", "keep_first", "keep_recent")
_Candidates = tuple[Tensor, Tensor, Tensor]


class WindowCache:
    """Keys, values, scores and positions of the survivors of a text that is read once, in order.

    The cache gives what `dynamic_mask_attn_func` gives over the whole text with the same scores,
    whatever the lengths of the pieces the text arrives in; ``mode="causal"`` only. The bias is the
    score. Every batch entry and KV head keeps its own survivors. The stored state carries no
    graph: a step is differentiable in its own arguments, not in those of earlier calls.

    Attributes:
        key: ``[B, Hkv, C, D]``, the survivors' keys in any order, with ``C = window_size +
            keep_first + keep_recent`` slots. A new key takes the slot of one that was evicted.
        value: ``[B, Hkv, C, D]``.
        score: fp32 ``[B, Hkv, C]``.
        position: int64 ``[B, Hkv, C]``, the number of real tokens before the key; -1: empty slot.
        seen_tokens: int64 ``[B]``, the number of real tokens read.
        evicted_at: int64 ``[B]``, the value of `seen_tokens` when a key was last evicted.

    Args:
        batch_size: Number of sequences ``B``.
        num_kv_heads: Number of key-value heads ``Hkv``.
        head_dim: Head dimension ``D <= 256``.
        window_size: ``W``, the number of best keys that a query sees.
        keep_first: First tokens that stay visible for ever, on top of the ``W``.
        keep_recent: Newest tokens that are visible whatever their score, on top of the ``W``.
        dtype: dtype of keys and values; default: torch's default dtype.
        device: Device of the state; default: torch's default device.
        mode: ``"causal"``; the others are refused with the reason.
    """

    key: Tensor
    value: Tensor
    score: Tensor
    position: Tensor
    seen_tokens: Tensor
    evicted_at: Tensor

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        window_size: int,
        *,
        keep_first: int = 0,
        keep_recent: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mode: str = "causal",
    ) -> None:
        if mode != "causal":
            raise ValueError(
                f"mode: a WindowCache serves 'causal' only, got {mode!r}: there a key that leaves "
                "the window never returns and can be forgotten. 'shared' ranks the whole text, "
                "later tokens included, and 'relu' has no bound; keep all keys for them"
            )
        checks.check_count("batch_size", batch_size, 1)
        checks.check_count("num_kv_heads", num_kv_heads, 1)
        checks.check_count("head_dim", head_dim, 1)
        checks.check_count("window_size", window_size, 1)
        checks.check_count("keep_first", keep_first, 0)
        checks.check_count("keep_recent", keep_recent, 0)
        if head_dim > checks.MAX_HEAD_DIM:
            raise ValueError(f"head_dim: expected at most {checks.MAX_HEAD_DIM}, got {head_dim}")
        dtype = _float_dtype(dtype or torch.get_default_dtype())

        self.window_size = window_size
        self.keep_first = keep_first
        self.keep_recent = keep_recent
        slots = (batch_size, num_kv_heads, window_size + keep_first + keep_recent)
        self.key = torch.zeros(*slots, head_dim, dtype=dtype, device=device)
        self.value = torch.zeros_like(self.key)
        self.score = torch.zeros(slots, dtype=torch.float32, device=device)
        self.position = torch.full(slots, -1, dtype=torch.int64, device=device)
        self.seen_tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.evicted_at = torch.zeros_like(self.seen_tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole state. They do not depend on the length of the text."""
        return sum(getattr(self, name).nbytes for name in _TENSORS)

    def prefill(
        self, key: Tensor, value: Tensor, scores: Tensor, *, key_mask: Tensor | None = None
    ) -> None:
        """Read tokens without attending: a prompt at once, or chunk by chunk with constant memory.

        Args:
            key: ``[B, T, Hkv, D]`` in the dtype and on the device of the cache.
            value: ``[B, T, Hkv, D]``.
            scores: fp16, bf16 or fp32 ``[B, Hkv, T]``.
            key_mask: Bool ``[B, T]``, True for real tokens. Padding is never stored.

        Raises:
            TypeError, ValueError: An argument does not fit. The cache is unchanged.
        """
        self._check(key, value, scores, key_mask)
        candidates = self._candidates(scores, key_mask)
        self._commit(key, value, candidates, self._kept(*candidates))

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        *,
        key_mask: Tensor | None = None,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        return_lse: bool = False,
        backend: str | None = None,
    ) -> Any:
        """Attend from the next ``T`` tokens, as over the whole text, then read them.

        A key that is worse than ``W`` survivors when it arrives is neither stored nor visible, not
        even to its own query, unless `keep_first` or `keep_recent` holds it.

        Args:
            query: ``[B, T, H, D]`` with ``H`` a multiple of ``Hkv``, dtype and device of the cache.
            key: ``[B, T, Hkv, D]``.
            value: ``[B, T, Hkv, D]``.
            scores: fp16, bf16 or fp32 ``[B, Hkv, T]``; they select and are the bias.
            key_mask: Bool ``[B, T]``, True for real tokens. Rows of padding see the text so far.
            softmax_scale: Factor of ``q k``; default ``D ** -0.5``.
            softcap: Cap of the logits before the bias; ``None`` or 0.0 is off.
            return_lse: Also return the log-sum-exp of the logits.
            backend: ``"eager"``, ``"triton"``, ...; default: the best available.

        Returns:
            ``[B, T, H, D]``, and with `return_lse` the fp32 ``[B, H, T]``.

        Raises:
            TypeError, ValueError: An argument does not fit. The cache is unchanged.
            RuntimeError: The named backend cannot run. The cache is unchanged.
        """
        self._check(key, value, scores, key_mask)
        checks.check_qkv(query, key, value)
        if query.shape[1] != key.shape[1]:
            raise ValueError(
                f"query: expected T = {key.shape[1]} tokens as in key, got {query.shape[1]}"
            )
        score, position, _ = candidates = self._candidates(scores, key_mask)
        kept = self._kept(*candidates)
        intervals = self._intervals(score, position, kept)
        sizes = (self.window_size, self.keep_first, self.keep_recent)
        selection = KeySelection(*intervals, score.detach()[:, None], "causal", *sizes)

        # Survivors differ from head to head: each (batch entry, KV head) is a batch entry here.
        batch, length, heads = query.shape[:3]
        kv_heads = key.shape[2]
        result = flash_sparse_attn_func(
            query.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(0, 1),
            _join(self.key, key),
            _join(self.value, value),
            selection,
            score[:, None, None],
            softmax_scale,
            softcap=softcap,
            return_lse=return_lse,
            backend=backend,
        )
        self._commit(key, value, candidates, kept)

        out, lse = result if return_lse else (result, None)
        out = out.unflatten(0, (batch, kv_heads)).transpose(1, 2).reshape(query.shape)
        return out if lse is None else (out, lse.reshape(batch, heads, length))

    def crop(self, length: int) -> None:
        """Forget all but the first `length` real tokens of every sequence (rejected guesses).

        Raises:
            ValueError: A key was evicted after that. It would have to return, and it is gone.
        """
        checks.check_count("length", length, 0)
        latest = int(self.evicted_at.max())
        if length < latest:
            raise ValueError(
                f"length: cannot roll back to {length} tokens: a key was evicted at {latest}; "
                "it is gone and would be visible again; keep a copy from before (copy.deepcopy)"
            )
        self.position.masked_fill_(self.position >= length, -1)
        self.seen_tokens.clamp_(max=length)

    def reorder(self, index: Tensor) -> None:
        """Let batch entry ``b`` continue what was entry ``index[b]`` (beam search).

        Args:
            index: int32 or int64 ``[B']``. Another length than ``B`` changes the batch size.

        Raises:
            TypeError, ValueError: Not an integer vector, or out of range (looked at on CPUs).
        """
        checks.check_tensor("index", index, "[B]")
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"index: expected int32 or int64 batch entries, got {index.dtype}")
        batch = len(self.key)
        if checks.looks_at_values(index) and bool(((index < 0) | (index >= batch)).any()):
            raise ValueError(
                f"index: expected batch entries 0 ... {batch - 1}, got {index.tolist()}"
            )
        for name in _TENSORS:
            state = getattr(self, name)
            moved = state.index_select(0, index)
            # In place where possible, so that captured graphs keep their addresses.
            setattr(self, name, state.copy_(moved) if len(index) == batch else moved)

    def reset(self) -> None:
        """Forget the text; the memory stays."""
        self.position.fill_(-1)
        self.seen_tokens.zero_()
        self.evicted_at.zero_()

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> WindowCache:
        """Move the state, in place, and return self. `dtype` is for keys and values alone."""
        for name in _TENSORS:
            kind = _float_dtype(dtype) if dtype and name in ("key", "value") else None
            setattr(self, name, getattr(self, name).to(device=device, dtype=kind))
        return self

    def state_dict(self) -> dict[str, Any]:
        """Copies of all tensors, and the three window sizes."""
        return {name: getattr(self, name).clone() for name in _TENSORS} | self._sizes()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of a cache of the same shape and window sizes gave.

        Raises:
            ValueError: An entry is missing or unknown, or differs in size. The cache is unchanged.
        """
        if set(state) != {*_TENSORS, *_SIZES}:
            raise ValueError(f"state: expected {[*_TENSORS, *_SIZES]}, got {list(state)}")
        for name in (*_SIZES, *_TENSORS):
            own, new = getattr(self, name), state[name]
            own, new = (own.shape, new.shape) if name in _TENSORS else (own, new)
            if own != new:
                raise ValueError(f"state: expected {name} {own} as in this cache, got {new}")
        for name in _TENSORS:
            getattr(self, name).copy_(state[name])

    def __repr__(self) -> str:
        batch, kv_heads, capacity, head_dim = self.key.shape
        sizes = ", ".join(f"{name}={size}" for name, size in self._sizes().items() if size)
        return (
            f"WindowCache(B={batch}, Hkv={kv_heads}, D={head_dim}, {sizes}, {capacity} slots, "
            f"{self.nbytes} bytes, {self.key.dtype}, device={self.key.device})"
        )

    def _sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _SIZES}

    def _check(self, key: Tensor, value: Tensor, scores: Tensor, key_mask: Tensor | None) -> None:
        """The new tokens fit this cache."""
        batch, kv_heads, _, head_dim = self.key.shape
        for name, tensor in (("key", key), ("value", value)):
            checks.check_tensor(name, tensor, "[B, T, Hkv, D]")
            expected = (batch, key.shape[1], kv_heads, head_dim)
            if tensor.shape != expected:
                raise ValueError(
                    f"{name}: expected [B, T, Hkv, D] = {expected} as in the cache, got "
                    f"{tuple(tensor.shape)}"
                )
            if (tensor.dtype, tensor.device) != (self.key.dtype, self.key.device):
                raise TypeError(
                    f"{name}: expected {self.key.dtype} on {self.key.device} as in the cache, got "
                    f"{tensor.dtype} on {tensor.device}; cast or move one of them with .to()"
                )
        checks.check_scores(scores, key)
        if scores.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(
                f"scores: expected 16 or 32 bit floats, got {scores.dtype}; use .float()"
            )
        checks.check_selection_arguments(
            scores, self.window_size, "causal", ("causal",), key_mask, None, 0, 0
        )

    def _candidates(self, scores: Tensor, key_mask: Tensor | None) -> _Candidates:
        """``[survivors | new tokens]``: scores and positions ``[B * Hkv, C + T]``; seen ``[B]``."""
        if key_mask is None:
            key_mask = torch.ones_like(scores[:, 0], dtype=torch.bool)
        count = self.seen_tokens[:, None] + key_mask.cumsum(-1)
        position = torch.where(key_mask, count - 1, -1)[:, None].expand(scores.shape)
        return (
            torch.cat([self.score, scores.float()], dim=-1).flatten(0, 1),
            torch.cat([self.position, position], dim=-1).flatten(0, 1),
            self.seen_tokens + key_mask.sum(-1),
        )

    def _kept(self, score: Tensor, position: Tensor, seen: Tensor) -> Tensor:
        """The candidates visible after `seen` real tokens, bool ``[B * Hkv, C + T]``."""
        occupied = position >= 0
        # One integer holds the order: score, then position.
        order = order_key(score.detach()[:, None], occupied)[:, 0].long() * 2**32
        order += position.clamp(min=0)
        best = order.topk(self.window_size, dim=-1, sorted=False).values
        kept = order >= best.amin(-1, keepdim=True)
        kept |= position < self.keep_first
        kept |= position >= self._rows(seen) - self.keep_recent
        return kept & occupied

    def _intervals(self, score: Tensor, position: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Start and expiry of candidates for queries from ``C`` on, ``[B * Hkv, 1, C + T]``."""
        capacity, total = self.key.shape[2], score.shape[-1]
        start = torch.arange(total, dtype=torch.int32, device=score.device).repeat(len(score), 1)
        if total == capacity + 1:  # a single query sees exactly what is kept
            return start[:, None], torch.where(kept, NEVER, start)[:, None]
        occupied = position >= 0
        order = start.long()
        order[:, :capacity] = position[:, :capacity].argsort(-1)
        score, key_mask = score.gather(1, order)[:, None], occupied.gather(1, order)
        expiry = select_keys(score, self.window_size, key_mask=key_mask).expiry[:, 0]
        expiry = torch.zeros_like(expiry).scatter(1, order, expiry)
        expiry = torch.where(position < self.keep_first, NEVER, expiry)
        if self.keep_recent:
            # A key stops being recent when the new real token of this number (from 1) arrives.
            number = position + self.keep_recent - self._rows(self.seen_tokens) + 1
            arrived = occupied[:, capacity:].cumsum(-1)
            expiry = torch.maximum(expiry, capacity + torch.searchsorted(arrived, number).int())
        expiry = torch.where(expiry < total, expiry, NEVER)
        seen = occupied & (expiry > start.clamp(min=capacity))
        return start[:, None], torch.where(seen, expiry, start)[:, None]

    @torch.no_grad()
    def _commit(self, key: Tensor, value: Tensor, candidates: _Candidates, kept: Tensor) -> None:
        """Empty the slots of evicted keys, and put the kept new ones into empty slots."""
        score, position, seen = candidates
        slots, (batch, length, kv_heads) = self.position.shape, key.shape[:3]
        if length == 0:
            return
        # A newest token that is not kept was never visible: losing it takes nothing from the past.
        lost = (position >= 0) & ~kept & (position < self._rows(seen) - 1)
        evicted = lost.view(batch, -1).any(-1)
        self.evicted_at.copy_(torch.where(evicted, seen, self.evicted_at))
        self.seen_tokens.copy_(seen)

        stays, enters = kept.view(batch, kv_heads, -1).split([slots[2], length], dim=-1)
        self.position.masked_fill_(~stays, -1)
        # The n-th kept new token goes to the n-th empty slot. There may be fewer of either: pairs
        # without a slot repeat the first pair, and slots without a token get what they hold.
        pairs = torch.arange(1, min(slots[2], length) + 1, device=seen.device)
        empty = (~stays).cumsum(-1)
        pairs = torch.where(pairs <= empty[..., -1:], pairs, 1)
        slot = torch.searchsorted(empty, pairs).clamp(max=slots[2] - 1)
        token = torch.searchsorted(enters.cumsum(-1), pairs)
        entry = torch.arange(batch, device=seen.device)[:, None, None]
        head = torch.arange(kv_heads, device=seen.device)[:, None]
        is_new, token = token < length, token.clamp(max=length - 1)
        new_score, new_position = (
            t.view(*slots[:2], -1)[..., slots[2] :] for t in (score, position)
        )
        for state, new in (
            (self.key, key[entry, token, head]),
            (self.value, value[entry, token, head]),
            (self.score, new_score.gather(2, token)),
            (self.position, new_position.gather(2, token)),
        ):
            old = state[entry, head, slot]
            mask = is_new.view(*is_new.shape, *[1] * (new.dim() - 3))
            state[entry, head, slot] = torch.where(mask, new, old)

    def _rows(self, per_entry: Tensor) -> Tensor:
        """``[B]`` as a column for arrays of ``[B * Hkv, C + T]``."""
        return per_entry[:, None].expand(-1, self.key.shape[1]).reshape(-1, 1)


def _join(survivors: Tensor, new: Tensor) -> Tensor:
    """``[B, Hkv, C, D]`` and ``[B, T, Hkv, D]`` as ``[B * Hkv, C + T, 1, D]``."""
    return torch.cat([survivors, new.transpose(1, 2)], dim=2).flatten(0, 1).unsqueeze(2)


def _float_dtype(dtype: torch.dtype) -> torch.dtype:
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    return dtype
