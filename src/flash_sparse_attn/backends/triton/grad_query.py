"""dQ over epochs: a query tile walks the slots of its epoch as in forward and owns its gradient.

It also computes ``delta = rowsum(dO * O)``, which the gradients of keys need, and the gradient of a
bias that depends on the query. Grid and symbols as in `forward.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from .config import TileConfig, padded_head_dim, slot_rows
from .inputs import Call, is_aligned
from .slots import copy_slots, slot_dim
from .tiles import (
    epoch_bounds,
    load_grads,
    load_rows,
    load_slots,
    log2_bias,
    row_and_rest,
    row_offsets,
    scaled_scores,
    store_rows,
    tile_blocks,
    tile_rows,
)

_INF = tl.constexpr(float("inf"))

_INTS = (
    "query_len",
    "key_len",
    "epoch_len",
    "num_epochs",
    "num_tiles",
    "old_slots",
    "num_slots",
    "row_0",
    "sqb",
    "sqn",
    "sqh",
    "sgb",
    "sgn",
    "sgh",
    "sgd",
    "spb",
    "spk",
    "spg",
    "spq",
    "spn",
)


@triton.jit
def _add_block(
    q, grad, norm, delta, acc, acc_row, block, at, i_group, mask_row, slots_k, slots_v, slot_base,
    ptr_key, ptr_start, ptr_expiry, ptr_slot_bias, ptr_pair, ptr_grad_pair, stride_member, spn,
    scale, softcap,
    MASKED: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    PAIR_BIAS: tl.constexpr,
    PAIR_GRAD: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SLOT_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one block of slots to dQ, and to the gradient of a pair bias."""
    slot = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    k = load_slots(slots_k, slot_base + block * BLOCK_N, SLOT_D, BLOCK_N, BLOCK_D, TMA)  # [N, D]
    v = load_slots(slots_v, slot_base + block * BLOCK_N, SLOT_D, BLOCK_N, BLOCK_D, TMA)  # [N, D]
    scores, tanh = scaled_scores(tl.dot(q, tl.trans(k)), scale, softcap, HAS_SOFTCAP)  # [M, N]
    if KEY_BIAS == "kv head":
        scores += tl.load(ptr_slot_bias + slot)[None, :]
    elif KEY_BIAS == "head":
        offs = i_group.to(tl.int64) * stride_member
        scores += tl.load(ptr_slot_bias + offs[:, None] + slot[None, :])
    if PAIR_BIAS:
        key = tl.load(ptr_key + slot)
        sees = mask_row[:, None] & (key >= 0)[None, :]
        pair = tl.load(ptr_pair + (key.to(tl.int64) * spn)[None, :], mask=sees, other=0.0)
        scores += log2_bias(pair)
    if MASKED:
        start = tl.load(ptr_start + slot)
        expiry = tl.load(ptr_expiry + slot)
        inside = (start[None, :] <= at[:, None]) & (at[:, None] < expiry[None, :])
        scores = tl.where(inside, scores, -_INF)
    probs = tl.exp2(scores - norm[:, None])
    grad_scores = probs * (tl.dot(grad, tl.trans(v)) - delta[:, None])  # [M, N]
    if PAIR_GRAD == "pairs":
        if MASKED:
            sees = sees & inside
        tl.store(
            ptr_grad_pair + key[None, :], grad_scores.to(ptr_grad_pair.dtype.element_ty), mask=sees
        )
    elif PAIR_GRAD == "rows":
        acc_row += tl.sum(grad_scores, 1)
    if HAS_SOFTCAP:
        grad_scores *= 1.0 - tanh * tanh
    return tl.dot(grad_scores.to(k.dtype), k, acc), acc_row


@triton.jit(do_not_specialize=_INTS)
def grad_query_kernel(
    ptr_q, slots_k, slots_v, ptr_out, ptr_grad, ptr_norm, ptr_delta, ptr_grad_q, ptr_grad_pair,
    ptr_key, ptr_start, ptr_expiry, ptr_visible, ptr_entered, ptr_epochs, ptr_slot_bias, ptr_pair,
    scale, softcap, softmax_scale, query_len, key_len, epoch_len, num_epochs, num_tiles, old_slots,
    num_slots, row_0,
    sqb: tl.int64,
    sqn: tl.int64,
    sqh: tl.int64,
    sgb: tl.int64,
    sgn: tl.int64,
    sgh: tl.int64,
    sgd: tl.int64,
    spb: tl.int64,
    spk: tl.int64,
    spg: tl.int64,
    spq: tl.int64,
    spn: tl.int64,
    HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SLOT_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    PAIR_BIAS: tl.constexpr,
    PAIR_GRAD: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_QUERY: tl.constexpr,
    CLAMPS: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """One program per (row, epoch, tile): dQ, delta, and the gradient of a bias for each query."""
    i_local, rest = row_and_rest(num_epochs * num_tiles)
    i_tile = num_epochs * num_tiles - 1 - rest
    i_epoch, i_tile = i_tile // num_tiles, i_tile % num_tiles
    i_row = row_0 + i_local
    i_batch, i_head = i_row // HEADS_KV, i_row % HEADS_KV
    first, num, position = epoch_bounds(i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED)

    row, i_query, i_group = tile_rows(i_tile, GROUP, BLOCK_M)  # [M]
    mask_row = row < num * GROUP
    offs_head = i_head * GROUP + i_group
    HEADS: tl.constexpr = HEADS_KV * GROUP
    grad = load_grads(
        ptr_grad + row_offsets(i_batch, sgb, GRAD_ALIGNED), first + i_query, offs_head, sgn, sgh,
        sgd, mask_row, D, BLOCK_D, GRAD_ALIGNED,
    )  # [M, D]  # fmt: skip
    offs_out = ((i_batch * query_len + first + i_query) * HEADS + offs_head) * D
    if D % 8 == 0:
        offs_out = tl.multiple_of(offs_out, 8)
    out = load_rows(ptr_out, offs_out, mask_row, D, BLOCK_D, True)  # [M, D]
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)  # [M]
    index = (i_row * query_len + first) * GROUP + row
    tl.store(ptr_delta + index, delta, mask=mask_row)

    if NEEDS_QUERY or PAIR_GRAD != "none":
        # Rows past the end of the epoch have no probability.
        norm = tl.load(ptr_norm + index, mask=mask_row, other=_INF)
        at = position + i_query
        if CLAMPS:
            at = tl.maximum(at, 0)
        num_full, num_old, num_new = 0, 0, 0
        if i_tile * BLOCK_M < num * GROUP:
            last = tl.minimum((i_tile * BLOCK_M + BLOCK_M - 1) // GROUP, num - 1)
            i_q = i_row * query_len + first
            num_full, num_old, num_new = tile_blocks(
                ptr_visible, ptr_entered, i_q + i_tile * BLOCK_M // GROUP, i_q + last, BLOCK_N
            )
        offs_q = row_offsets(first + i_query, sqn, ALIGNED) + row_offsets(offs_head, sqh, ALIGNED)
        q = load_rows(
            ptr_q + row_offsets(i_batch, sqb, ALIGNED), offs_q, mask_row, D, BLOCK_D, True
        )
        grad = grad.to(q.dtype)
        slot_base = tl.multiple_of((i_local * num_epochs + i_epoch) * num_slots, 128)
        plan_base = tl.multiple_of((i_row * num_epochs + i_epoch) * num_slots, 128)
        ptr_key += plan_base
        ptr_start += plan_base
        ptr_expiry += plan_base
        stride_member = num_epochs.to(tl.int64) * num_slots
        if KEY_BIAS == "kv head":
            ptr_slot_bias += slot_base
        elif KEY_BIAS == "head":
            ptr_slot_bias += (i_local * GROUP * num_epochs + i_epoch) * num_slots
        if PAIR_BIAS:
            ptr_pair += i_batch * spb + i_head * spk
            ptr_pair += (i_group * spg + (first + i_query) * spq)[:, None]
        if PAIR_GRAD == "pairs":
            ptr_grad_pair += ((i_local * GROUP + i_group) * query_len + first + i_query)[
                :, None
            ] * key_len

        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        acc_row = tl.zeros([BLOCK_M], tl.float32)
        # The conditions keep wgmma asynchronous, see `forward.py`.
        if num_full > 0:
            for block in tl.range(0, num_full, num_stages=STAGES):
                acc, acc_row = _add_block(
                    q, grad, norm, delta, acc, acc_row, block, at, i_group, mask_row, slots_k,
                    slots_v, slot_base, ptr_key, ptr_start, ptr_expiry, ptr_slot_bias, ptr_pair,
                    ptr_grad_pair, stride_member, spn, scale, softcap, False, KEY_BIAS, PAIR_BIAS,
                    PAIR_GRAD, HAS_SOFTCAP, SLOT_D, BLOCK_N, BLOCK_D, TMA,
                )  # fmt: skip
        num_border = num_old - num_full
        new_block = old_slots // BLOCK_N - num_border
        if num_border + num_new > 0:
            for i in tl.range(0, num_border + num_new, num_stages=STAGES):
                block = tl.where(i < num_border, num_full + i, new_block + i)
                acc, acc_row = _add_block(
                    q, grad, norm, delta, acc, acc_row, block, at, i_group, mask_row, slots_k,
                    slots_v, slot_base, ptr_key, ptr_start, ptr_expiry, ptr_slot_bias, ptr_pair,
                    ptr_grad_pair, stride_member, spn, scale, softcap, True, KEY_BIAS, PAIR_BIAS,
                    PAIR_GRAD, HAS_SOFTCAP, SLOT_D, BLOCK_N, BLOCK_D, TMA,
                )  # fmt: skip
        if NEEDS_QUERY:
            store_rows(ptr_grad_q, offs_out, mask_row, acc * softmax_scale, D, BLOCK_D)
        if PAIR_GRAD == "rows":
            index = (i_batch * HEADS + offs_head) * query_len + first + i_query
            tl.store(ptr_grad_pair + index, acc_row, mask=mask_row)


@dataclass(frozen=True)
class Saved:
    """What the backward kernels read: inputs, results of forward, and delta, which they fill."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    grad_out: Tensor
    norm: Tensor
    delta: Tensor


def run_grad_query(
    plan: Plan,
    saved: Saved,
    call: Call,
    config: TileConfig,
    grad_query: Tensor | None,
    grad_pair: Tensor | None = None,
    rows: range | None = None,
) -> None:
    """Fill delta, `grad_query` and `grad_pair`, for all rows of keys or some.

    Args:
        plan, saved, call: Of the call.
        config: Tile sizes.
        grad_query: ``[B, Q, H, D]``, contiguous, or ``None`` if it is not asked for.
        grad_pair: Zeros ``[.., Q, K]`` for the heads of `rows`, or fp32 ``[B, H, Q]`` for the sum
            over keys, or ``None``.
        rows: Default all.
    """
    query, key = saved.query, saved.key
    heads_kv, head_dim = key.shape[2], key.shape[3]
    group = query.shape[2] // heads_kv
    rows = rows or range(query.shape[0] * heads_kv)
    num_tiles = triton.cdiv(plan.epoch_len * group, config.block_m)
    pair_grad = "none"
    if grad_pair is not None:
        pair_grad = "rows" if grad_pair.dim() == 3 else "pairs"
    walks = grad_query is not None or grad_pair is not None
    chunk = len(rows)
    if pair_grad != "pairs":
        elements = plan.num_epochs * plan.num_slots * slot_dim(head_dim)
        chunk = slot_rows(len(rows), elements, query, key)
    for row in range(rows.start, rows.stop, chunk):
        now = range(row, min(row + chunk, rows.stop))
        slots = copy_slots(plan, key, saved.value, call.bias, now) if walks else None
        sources = slots.sources(config.block_n, config.uses_tma) if slots else (None, None)
        grad_query_kernel[(len(now) * plan.num_epochs * num_tiles,)](
            query, *sources, saved.out, saved.grad_out, saved.norm, saved.delta, grad_query,
            grad_pair, plan.slot_key, plan.slot_start, plan.slot_expiry, plan.visible,
            plan.entered, plan.epochs, slots.bias if slots else None, call.pair_tensor,
            *call.factors, call.softmax_scale, query.shape[1], plan.key_len, plan.epoch_len,
            plan.num_epochs, num_tiles, plan.old_slots, plan.num_slots, row, *query.stride()[:3],
            *saved.grad_out.stride(), *call.pair_strides, HEADS_KV=heads_kv, GROUP=group,
            D=head_dim, SLOT_D=slot_dim(head_dim), BLOCK_D=padded_head_dim(head_dim),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.num_stages, **call.flags,
            PAIR_GRAD=pair_grad, NEEDS_QUERY=grad_query is not None, CLAMPS=plan.clamps_positions,
            PACKED=plan.epochs is not None, ALIGNED=is_aligned(query),
            GRAD_ALIGNED=is_aligned(saved.grad_out), TMA=config.uses_tma,
            num_warps=config.num_warps,
        )  # fmt: skip
