"""Attention over listed blocks of keys, forward and backward, some queries after the others.

The bits of a plan are as many as queries times keys. So that they stay small, the queries are cut
into parts, each with a plan of its own, which is made again for the backward pass: to read the
lists twice is little work beside attention, and nothing of a plan is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...plan import Plan
from .calls import run_backward, run_forward
from .config import mask_epoch_length
from .masks import MaskLayout
from .plan_blocks import plan_blocks

_PLAN_BYTES = 1 << 27  # of the bits of a part at least, and more beside large queries:
_QUERY_SHARE = 16  # as a 16th of their bytes, so that parts of long texts fill a GPU
_SHORT_EPOCH = 128  # where longer ones, for all rows, would take more


@dataclass(frozen=True)
class BlockLists:
    """Which blocks of keys each query sees.

    Attributes:
        indices: int32 or int64 ``[B, {1|Hkv|H}, Q, n]``; what is no block of the keys names none.
        visible: Bool ``({1|B}, 1, 1, {1|K})`` or ``None``: which keys are seen at all.
        block_size: Keys of a block.
        is_causal: Whether query ``i`` sees nothing behind the position ``i + K - Q``.
    """

    indices: Tensor
    visible: Tensor | None
    block_size: int
    is_causal: bool


@dataclass(frozen=True)
class _Part:
    """Some queries, and the keys up to the last that they may see.

    Attributes:
        queries: Which.
        key_len: How many keys.
        epoch_len: Of their plan.
    """

    queries: slice
    key_len: int
    epoch_len: int

    def plan(self, lists: BlockLists, num_heads: int, heads_kv: int, for_backward: bool) -> Plan:
        indices = lists.indices[:, :, self.queries]
        batch, heads, query_len, _ = indices.shape
        layout = MaskLayout.of(
            (batch, heads, query_len, self.key_len), query_len, self.key_len, num_heads, heads_kv,
            batch, "bits", self.epoch_len,
        )  # fmt: skip
        return plan_blocks(
            indices, lists.visible, lists.block_size, layout, is_causal=lists.is_causal,
            for_backward=for_backward,
        )  # fmt: skip


def _parts(query: Tensor, key: Tensor, lists: BlockLists) -> Iterator[_Part]:
    """Parts of all queries but those that come before all keys."""
    query_len, key_len = query.shape[1], key.shape[1]
    bits = lists.indices.shape[0] * lists.indices.shape[1] * key_len  # of a query
    most = 8 * max(_PLAN_BYTES, query.numel() * query.element_size() // _QUERY_SHARE)
    epoch_len = mask_epoch_length(query_len)
    while epoch_len > _SHORT_EPOCH and epoch_len * bits > most:
        epoch_len //= 2
    step = max(1, most // (bits * epoch_len)) * epoch_len
    for begin in range(0, query_len, step):
        end = min(begin + step, query_len)
        keys = min(key_len, key_len - query_len + end) if lists.is_causal else key_len
        if keys > 0:
            yield _Part(slice(begin, end), keys, epoch_len)


def run_block_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """``out [B, Q, H, D]``, contiguous, and ``norm``, fp32 ``[2 * B * H * Q]``, for backward.

    `norm` holds what `forward` calls so of every part, one after another.
    """
    batch, query_len, num_heads, _ = query.shape
    size = 2 * batch * num_heads  # numbers of a query
    out = norm = None
    for part in _parts(query, key, lists):
        at = part.queries
        plan = part.plan(lists, num_heads, key.shape[2], False)
        tensors = (query[:, at], key[:, : part.key_len], value[:, : part.key_len])
        call = (*tensors, None, plan, softmax_scale, softcap)
        now, _, now_norm, _ = run_forward(*call, with_norm=True)
        if now.shape[1] == query_len:
            return now, now_norm.flatten()
        if out is None or norm is None:
            out = torch.zeros_like(query, memory_format=torch.contiguous_format)
            norm = torch.zeros(size * query_len, dtype=torch.float32, device=query.device)
        out[:, at] = now
        norm[size * at.start : size * at.stop] = now_norm.flatten()
    assert out is not None and norm is not None  # the last query sees a key
    return out, norm


def run_block_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    out: Tensor,
    norm: Tensor,
    softmax_scale: float,
    softcap: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key and value; ``None`` for those that `needs` leaves out.

    Those of keys and values are added over the parts in fp32, in order, and rounded once.
    """
    batch, query_len, num_heads, _ = query.shape
    size = 2 * batch * num_heads
    sums: list[Tensor | None] = []
    for part in _parts(query, key, lists):
        at, keys = part.queries, slice(part.key_len)
        plan = part.plan(lists, num_heads, key.shape[2], True)
        now_norm = norm[size * at.start : size * at.stop].view(2, batch, num_heads, -1)
        tensors = (grad_out[:, at], query[:, at], key[:, keys], value[:, keys], None)
        saved = (out[:, at].contiguous(), now_norm, None)
        is_whole = at.stop - at.start == query_len
        call = (*tensors, *saved, plan, softmax_scale, softcap, [*needs, False])
        found = run_backward(*call, sum_dtype=None if is_whole else torch.float32)[:3]
        if is_whole:
            return found[0], found[1], found[2]
        if not sums:
            sums = [
                None if now is None else torch.zeros(like.shape, dtype=now.dtype, device=now.device)
                for now, like in zip(found, (query, key, value), strict=True)
            ]
        for total, now, where in zip(sums, found, (at, keys, keys), strict=True):
            if total is not None and now is not None:
                total[:, where] += now
    grad_query, grad_key, grad_value = (
        None if total is None else total.to(query.dtype) for total in sums
    )
    return grad_query, grad_key, grad_value
