"""Backward over epochs, without atomics: every sum has one owner and one order.

1. `grad_query_kernel`: a query tile walks the slots of its epoch as in forward and owns its dQ. It also
   computes ``delta = rowsum(dO * O)`` for the next kernel.
2. `grad_key_kernel`: a block of slots walks the query tiles of its epoch that see it and owns the fp32
   dK, dV and bias gradient that this epoch contributes. Scores are transposed (keys x queries): Triton
   3.4 to 3.7.0 can compile ``dot(trans(ds), q)`` wrongly for Hopper.
3. `reduce_kernel`: every key adds the contributions of its epochs, in their order, and rounds once.

Symbols as in `forward.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from .config import TileConfig, Tiles, architecture_of, padded_head_dim, partial_rows, tiles_for
from .forward import slot_bias
from .inputs import Bias, Call, is_aligned
from .tiles import (
    epoch_bounds,
    load_rows,
    log2_bias,
    row_and_rest,
    row_offsets,
    scaled_scores,
    store_rows,
    tile_blocks,
)

_NEVER = tl.constexpr(2**31 - 1)
_INF = tl.constexpr(float("inf"))

_INTS = (
    "query_len",
    "key_len",
    "epoch_len",
    "num_epochs",
    "num_tiles",
    "num_blocks",
    "old_slots",
    "num_slots",
    "row_0",
    "sqb",
    "sqn",
    "sqh",
    "skb",
    "skn",
    "skh",
    "svb",
    "svn",
    "svh",
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
def _load_grads(
    ptr, first_row, offs_head, sgn, sgh, sgd, mask_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GRAD_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Rows of dO, which may have any strides: a sum's gradient has stride 0 everywhere."""
    offs = row_offsets(first_row, sgn, GRAD_ALIGNED) + row_offsets(offs_head, sgh, GRAD_ALIGNED)
    if GRAD_ALIGNED:
        return load_rows(ptr, offs, mask_row, D, BLOCK_D, True)
    else:
        offs_d = tl.arange(0, BLOCK_D)
        mask = mask_row[:, None] & (offs_d < D)[None, :]
        return tl.load(ptr + offs[:, None] + (offs_d * sgd)[None, :], mask=mask, other=0.0)


@triton.jit
def _query_block(
    q, grad, norm, delta, acc, acc_row, slot, at, i_group, mask_row, ptr_k, ptr_v, ptr_key, ptr_start,
    ptr_expiry, ptr_slot_bias, ptr_pair, ptr_grad_pair, stride_slot_bias, skn, svn, spn, scale, softcap,
    MASKED: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    PAIR_BIAS: tl.constexpr,
    PAIR_GRAD: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one block of slots to dQ, and to the gradient of a pair bias."""
    key = tl.load(ptr_key + slot)  # [N]
    k = load_rows(ptr_k, row_offsets(key, skn, ALIGNED), key >= 0, D, BLOCK_D, MASKED)  # [N, D]
    v = load_rows(ptr_v, row_offsets(key, svn, ALIGNED), key >= 0, D, BLOCK_D, MASKED)  # [N, D]
    scores, tanh = scaled_scores(tl.dot(q, tl.trans(k)), scale, softcap, HAS_SOFTCAP)  # [M, N]
    if KEY_BIAS == "kv head":
        scores += tl.load(ptr_slot_bias + slot)[None, :]
    elif KEY_BIAS == "head":
        offs = i_group.to(tl.int64) * stride_slot_bias
        scores += tl.load(ptr_slot_bias + offs[:, None] + slot[None, :])
    if PAIR_BIAS:
        seen = mask_row[:, None] & (key >= 0)[None, :]
        pair = tl.load(ptr_pair + (key.to(tl.int64) * spn)[None, :], mask=seen, other=0.0)
        scores += log2_bias(pair)
    if MASKED:
        start = tl.load(ptr_start + slot)
        expiry = tl.load(ptr_expiry + slot)
        sees = (start[None, :] <= at[:, None]) & (at[:, None] < expiry[None, :])
        scores = tl.where(sees, scores, -_INF)
    probs = tl.exp2(scores - norm[:, None])
    grad_scores = probs * (tl.dot(grad, tl.trans(v)) - delta[:, None])  # [M, N]
    if PAIR_GRAD == "pairs":
        sees = mask_row[:, None] & (key >= 0)[None, :]
        if MASKED:
            sees = sees & (start[None, :] <= at[:, None]) & (at[:, None] < expiry[None, :])
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
    ptr_q, ptr_k, ptr_v, ptr_out, ptr_grad, ptr_norm, ptr_delta, ptr_grad_q, ptr_grad_pair, ptr_key,
    ptr_start, ptr_expiry, ptr_visible, ptr_entered, ptr_epochs, ptr_slot_bias, ptr_pair, scale,
    softcap, softmax_scale, query_len, key_len, epoch_len, num_epochs, num_tiles, old_slots, num_slots,
    row_0,
    sqb: tl.int64,
    sqn: tl.int64,
    sqh: tl.int64,
    skb: tl.int64,
    skn: tl.int64,
    skh: tl.int64,
    svb: tl.int64,
    svn: tl.int64,
    svh: tl.int64,
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
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    PAIR_BIAS: tl.constexpr,
    PAIR_GRAD: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_BLOCKS: tl.constexpr,
    CLAMPS: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program per (row, epoch, tile): dQ, delta, and the gradient of a bias for each query."""
    i_local, rest = row_and_rest(num_epochs * num_tiles)
    i_tile = num_epochs * num_tiles - 1 - rest
    i_epoch, i_tile = i_tile // num_tiles, i_tile % num_tiles
    i_row = row_0 + i_local
    i_batch, i_head = i_row // HEADS_KV, i_row % HEADS_KV
    first, num, position = epoch_bounds(i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED)

    row = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [M] rows of the epoch
    i_query, i_group = row // GROUP, row % GROUP
    mask_row = row < num * GROUP
    offs_head = i_head * GROUP + i_group
    HEADS: tl.constexpr = HEADS_KV * GROUP
    ptr_grad += row_offsets(i_batch, sgb, GRAD_ALIGNED)
    grad = _load_grads(
        ptr_grad, first + i_query, offs_head, sgn, sgh, sgd, mask_row, D, BLOCK_D, GRAD_ALIGNED
    )  # [M, D]
    offs_out = (i_batch * query_len + first + i_query) * HEADS + offs_head
    offs_out_d = offs_out * D
    if D % 8 == 0:
        offs_out_d = tl.multiple_of(offs_out_d, 8)
    out = load_rows(ptr_out, offs_out_d, mask_row, D, BLOCK_D, True)  # [M, D]
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)  # [M]
    index = (i_batch * HEADS + offs_head) * query_len + first + i_query
    tl.store(ptr_delta + index, delta, mask=mask_row)

    if NEEDS_BLOCKS:
        norm = tl.load(ptr_norm + index, mask=mask_row, other=_INF)
        at = position + i_query
        if CLAMPS:
            at = tl.maximum(at, 0)
        num_full, num_old, num_new = 0, 0, 0
        if i_tile * BLOCK_M < num * GROUP:
            last = tl.minimum((i_tile * BLOCK_M + BLOCK_M - 1) // GROUP, num - 1)
            i_q = i_row * query_len + first
            i_first = i_q + i_tile * BLOCK_M // GROUP
            num_full, num_old, num_new = tile_blocks(
                ptr_visible, ptr_entered, i_first, i_q + last, old_slots, BLOCK_N
            )
        offs_q = row_offsets(first + i_query, sqn, ALIGNED) + row_offsets(offs_head, sqh, ALIGNED)
        q = load_rows(ptr_q + row_offsets(i_batch, sqb, ALIGNED), offs_q, mask_row, D, BLOCK_D, True)  # [M, D]
        grad = grad.to(q.dtype)
        ptr_k += row_offsets(i_batch, skb, ALIGNED) + row_offsets(i_head, skh, ALIGNED)
        ptr_v += row_offsets(i_batch, svb, ALIGNED) + row_offsets(i_head, svh, ALIGNED)
        slot_base = tl.multiple_of((i_row * num_epochs + i_epoch) * num_slots, 128)
        ptr_key += slot_base
        ptr_start += slot_base
        ptr_expiry += slot_base
        stride_slot_bias = num_epochs.to(tl.int64) * num_slots
        bias_heads: tl.constexpr = GROUP if KEY_BIAS == "head" else 1
        if KEY_BIAS != "none":
            ptr_slot_bias += tl.multiple_of(
                (i_row * bias_heads * num_epochs + i_epoch) * num_slots, 128
            )
        if PAIR_BIAS:
            ptr_pair += i_batch * spb + i_head * spk
            ptr_pair += (i_group * spg + (first + i_query) * spq)[:, None]
        if PAIR_GRAD == "pairs":
            pair_row = (i_local * GROUP + i_group) * query_len + first + i_query
            ptr_grad_pair += (pair_row * key_len)[:, None]

        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        acc_row = tl.zeros([BLOCK_M], tl.float32)
        offs_n = tl.arange(0, BLOCK_N)  # [N]
        for i in tl.range(0, num_full, num_stages=STAGES):
            acc, acc_row = _query_block(
                q, grad, norm, delta, acc, acc_row, i * BLOCK_N + offs_n, at, i_group, mask_row, ptr_k,
                ptr_v, ptr_key, ptr_start, ptr_expiry, ptr_slot_bias, ptr_pair, ptr_grad_pair,
                stride_slot_bias, skn, svn, spn, scale, softcap,
                False, KEY_BIAS, PAIR_BIAS, PAIR_GRAD, HAS_SOFTCAP, ALIGNED, D, BLOCK_D,
            )  # fmt: skip
        num_border = num_old - num_full
        new_block = old_slots // BLOCK_N - num_border
        for i in tl.range(0, num_border + num_new, num_stages=STAGES):
            block = tl.where(i < num_border, num_full + i, new_block + i)
            acc, acc_row = _query_block(
                q, grad, norm, delta, acc, acc_row, block * BLOCK_N + offs_n, at, i_group, mask_row,
                ptr_k, ptr_v, ptr_key, ptr_start, ptr_expiry, ptr_slot_bias, ptr_pair, ptr_grad_pair,
                stride_slot_bias, skn, svn, spn, scale, softcap,
                True, KEY_BIAS, PAIR_BIAS, PAIR_GRAD, HAS_SOFTCAP, ALIGNED, D, BLOCK_D,
            )  # fmt: skip
        if ptr_grad_q is not None:
            store_rows(ptr_grad_q, offs_out_d, mask_row, acc * softmax_scale, D, BLOCK_D)
        if PAIR_GRAD == "rows":
            tl.store(ptr_grad_pair + index, acc_row, mask=mask_row)


@triton.jit
def _key_block(
    k, v, bias, start, expiry, grad_k, grad_v, grad_bias, i_tile, first, num, position, key, ptr_q,
    ptr_grad, ptr_norm, ptr_delta, ptr_slot_bias, ptr_pair, stride_slot_bias, i_head, query_len, sqn,
    sqh, sgn, sgh, sgd, spg, spq, spn, scale, softcap,
    MASKED: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    PAIR_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_KEY: tl.constexpr,
    NEEDS_VALUE: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    CLAMPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one query tile to the gradients of a block of slots."""
    row = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    i_query, i_group = row // GROUP, row % GROUP
    mask_row = row < num * GROUP
    offs_head = i_head * GROUP + i_group
    offs_q = row_offsets(first + i_query, sqn, ALIGNED) + row_offsets(offs_head, sqh, ALIGNED)
    q = load_rows(ptr_q, offs_q, mask_row, D, BLOCK_D, True)  # [M, D]
    grad = _load_grads(
        ptr_grad, first + i_query, offs_head, sgn, sgh, sgd, mask_row, D, BLOCK_D, GRAD_ALIGNED
    ).to(q.dtype)  # [M, D]
    index = offs_head * query_len + first + i_query
    # Rows past the end of the epoch have no probability.
    norm = tl.load(ptr_norm + index, mask=mask_row, other=_INF)  # [M]
    scores, tanh = scaled_scores(tl.dot(k, tl.trans(q)), scale, softcap, HAS_SOFTCAP)  # [N, M]
    if KEY_BIAS == "kv head":
        scores += bias[:, None]
    elif KEY_BIAS == "head":
        offs = i_group.to(tl.int64) * stride_slot_bias
        scores += tl.load(ptr_slot_bias + offs[None, :])
    if PAIR_BIAS:
        offs = i_group * spg + (first + i_query) * spq
        seen = (key >= 0)[:, None] & mask_row[None, :]
        pair = tl.load(ptr_pair + (key.to(tl.int64) * spn)[:, None] + offs[None, :], mask=seen, other=0.0)
        scores += log2_bias(pair)
    if MASKED:
        at = position + i_query
        if CLAMPS:
            at = tl.maximum(at, 0)
        sees = (start[:, None] <= at[None, :]) & (at[None, :] < expiry[:, None])
        scores = tl.where(sees, scores, -_INF)
    probs = tl.exp2(scores - norm[None, :])
    if NEEDS_VALUE:
        grad_v = tl.dot(probs.to(grad.dtype), grad, grad_v)
    if NEEDS_KEY or NEEDS_BIAS:
        delta = tl.load(ptr_delta + index, mask=mask_row, other=0.0)  # [M]
        grad_scores = probs * (tl.dot(v, tl.trans(grad)) - delta[None, :])  # [N, M]
        if NEEDS_BIAS:
            if KEY_BIAS == "head":
                for member in tl.static_range(GROUP):
                    part = tl.sum(tl.where((i_group == member)[None, :], grad_scores, 0.0), 1)
                    is_member = tl.arange(0, grad_bias.shape[1]) == member
                    grad_bias += tl.where(is_member[None, :], part[:, None], 0.0)
            else:
                grad_bias += tl.sum(grad_scores, 1)
        if NEEDS_KEY:
            if HAS_SOFTCAP:
                grad_scores *= 1.0 - tanh * tanh
            grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k)
    return grad_k, grad_v, grad_bias


@triton.jit(do_not_specialize=_INTS)
def grad_key_kernel(
    ptr_q, ptr_k, ptr_v, ptr_grad, ptr_norm, ptr_delta, ptr_part_k, ptr_part_v, ptr_part_bias, ptr_key,
    ptr_start, ptr_expiry, ptr_counts, ptr_epochs, ptr_slot_bias, ptr_pair, scale, softcap,
    softmax_scale, query_len, key_len, epoch_len, num_epochs, num_blocks, old_slots, num_slots, row_0,
    sqb: tl.int64,
    sqn: tl.int64,
    sqh: tl.int64,
    skb: tl.int64,
    skn: tl.int64,
    skh: tl.int64,
    svb: tl.int64,
    svn: tl.int64,
    svh: tl.int64,
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
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    PAIR_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_KEY: tl.constexpr,
    NEEDS_VALUE: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    CLAMPS: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program per (row, epoch, block of slots): what the epoch adds to the gradients of its keys."""
    i_local, rest = row_and_rest(num_epochs * num_blocks)
    i_epoch, i_block = rest // num_blocks, rest % num_blocks
    i_row = row_0 + i_local
    i_batch, i_head = i_row // HEADS_KV, i_row % HEADS_KV
    slot_0 = i_block * BLOCK_N
    part = (slot_0 >= old_slots).to(tl.int32)
    used = tl.load(ptr_counts + (i_row * num_epochs + i_epoch) * 2 + part)
    if slot_0 - part * old_slots < used:
        first, num, position = epoch_bounds(
            i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED
        )
        slot = slot_0 + tl.arange(0, BLOCK_N)  # [N]
        slot_base = tl.multiple_of((i_row * num_epochs + i_epoch) * num_slots, 128)
        key = tl.load(ptr_key + slot_base + slot)
        start = tl.load(ptr_start + slot_base + slot)
        expiry = tl.load(ptr_expiry + slot_base + slot)

        # Queries of the epoch, from its first on, that see any of the slots, and that see all.
        end = tl.maximum(position + num, 0)
        from_any = tl.maximum(tl.min(start, 0) - position, 0)
        to_any = tl.minimum(tl.max(expiry, 0), end) - position
        from_all = tl.maximum(tl.minimum(tl.max(start, 0), end) - position, 0)
        to_all = tl.minimum(tl.min(expiry, 0), end) - position
        if CLAMPS:
            from_any = tl.where(tl.min(start, 0) <= 0, 0, from_any)
            from_all = tl.where(tl.max(start, 0) <= 0, 0, from_all)
        tile_0 = from_any * GROUP // BLOCK_M
        tile_1 = tl.maximum(tl.cdiv(tl.minimum(to_any, num) * GROUP, BLOCK_M), tile_0)
        full_0 = tl.minimum(tl.cdiv(from_all * GROUP, BLOCK_M), tile_1)
        # The last tile of the epoch may be short: what it lacks has no probability.
        full_1 = tl.where(to_all >= num, tile_1, tl.maximum(to_all, 0) * GROUP // BLOCK_M)
        full_1 = tl.maximum(tl.minimum(full_1, tile_1), full_0)

        ptr_q += row_offsets(i_batch, sqb, ALIGNED)
        ptr_grad += row_offsets(i_batch, sgb, GRAD_ALIGNED)
        HEADS: tl.constexpr = HEADS_KV * GROUP
        ptr_norm += i_batch * HEADS * query_len
        ptr_delta += i_batch * HEADS * query_len
        ptr_k += row_offsets(i_batch, skb, ALIGNED) + row_offsets(i_head, skh, ALIGNED)
        ptr_v += row_offsets(i_batch, svb, ALIGNED) + row_offsets(i_head, svh, ALIGNED)
        k = load_rows(ptr_k, row_offsets(key, skn, ALIGNED), key >= 0, D, BLOCK_D, True)  # [N, D]
        v = load_rows(ptr_v, row_offsets(key, svn, ALIGNED), key >= 0, D, BLOCK_D, True)  # [N, D]
        stride_slot_bias = num_epochs.to(tl.int64) * num_slots
        bias = tl.zeros([BLOCK_N], tl.float32)
        bias_heads: tl.constexpr = GROUP if KEY_BIAS == "head" else 1
        bias_base = (i_row * bias_heads * num_epochs + i_epoch) * num_slots
        if KEY_BIAS == "kv head":
            bias = tl.load(ptr_slot_bias + bias_base + slot)
        elif KEY_BIAS == "head":
            ptr_slot_bias += (bias_base + slot)[:, None]
        if PAIR_BIAS:
            ptr_pair += i_batch * spb + i_head * spk

        grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if KEY_BIAS == "head":
            grad_bias = tl.zeros([BLOCK_N, GROUP_PAD], tl.float32)
        else:
            grad_bias = tl.zeros([BLOCK_N], tl.float32)
        for i in tl.range(full_0, full_1, num_stages=STAGES):
            grad_k, grad_v, grad_bias = _key_block(
                k, v, bias, start, expiry, grad_k, grad_v, grad_bias, i, first, num, position, key,
                ptr_q, ptr_grad, ptr_norm, ptr_delta, ptr_slot_bias, ptr_pair, stride_slot_bias, i_head,
                query_len, sqn, sqh, sgn, sgh, sgd, spg, spq, spn, scale, softcap,
                False, GROUP, D, BLOCK_D, BLOCK_M, KEY_BIAS, PAIR_BIAS, HAS_SOFTCAP, NEEDS_KEY,
                NEEDS_VALUE, NEEDS_BIAS, CLAMPS, ALIGNED, GRAD_ALIGNED,
            )  # fmt: skip
        num_before = full_0 - tile_0
        for i in tl.range(0, num_before + tile_1 - full_1, num_stages=STAGES):
            tile = tl.where(i < num_before, tile_0 + i, full_1 - num_before + i)
            grad_k, grad_v, grad_bias = _key_block(
                k, v, bias, start, expiry, grad_k, grad_v, grad_bias, tile, first, num, position, key,
                ptr_q, ptr_grad, ptr_norm, ptr_delta, ptr_slot_bias, ptr_pair, stride_slot_bias, i_head,
                query_len, sqn, sqh, sgn, sgh, sgd, spg, spq, spn, scale, softcap,
                True, GROUP, D, BLOCK_D, BLOCK_M, KEY_BIAS, PAIR_BIAS, HAS_SOFTCAP, NEEDS_KEY,
                NEEDS_VALUE, NEEDS_BIAS, CLAMPS, ALIGNED, GRAD_ALIGNED,
            )  # fmt: skip

        out = (i_local * num_epochs + i_epoch) * num_slots + slot
        if NEEDS_KEY:
            store_rows(ptr_part_k, out * D, key >= 0, grad_k * softmax_scale, D, BLOCK_D)
        if NEEDS_VALUE:
            store_rows(ptr_part_v, out * D, key >= 0, grad_v, D, BLOCK_D)
        if NEEDS_BIAS:
            if KEY_BIAS == "head":
                member = tl.arange(0, GROUP_PAD)
                tl.store(
                    ptr_part_bias + (out * GROUP)[:, None] + member[None, :],
                    grad_bias,
                    mask=(member < GROUP)[None, :],
                )
            else:
                tl.store(ptr_part_bias + out, grad_bias)


@triton.jit(do_not_specialize=_INTS)
def reduce_kernel(
    ptr_part_k, ptr_part_v, ptr_part_bias, ptr_use_end, ptr_use_slot, ptr_grad_k, ptr_grad_v,
    ptr_grad_bias, key_len, num_epochs, num_slots, num_blocks, row_0,
    HEADS_KV: tl.constexpr,
    MEMBERS: tl.constexpr,
    MEMBERS_PAD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    NEEDS_KEY: tl.constexpr,
    NEEDS_VALUE: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
):  # fmt: skip
    """One program per (row, block of keys): the sum over the epochs of each key, zero if it has none."""
    i_local, i_block = row_and_rest(num_blocks)
    i_row = row_0 + i_local
    key = i_block * BLOCK_K + tl.arange(0, BLOCK_K)  # [K]
    live = key < key_len
    index = i_row * key_len + key
    end = tl.load(ptr_use_end + index, mask=live, other=0)
    begin = tl.load(ptr_use_end + index - 1, mask=live & (index > 0), other=0)
    uses = (end - begin).to(tl.int32)
    part_base = i_local * num_epochs * num_slots
    grad_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_K, MEMBERS_PAD], tl.float32)
    member = tl.arange(0, MEMBERS_PAD)
    for i in tl.range(0, tl.max(uses, 0), num_stages=STAGES):
        used = i < uses
        slot = part_base + tl.load(ptr_use_slot + begin + i, mask=used, other=0)
        if NEEDS_KEY:
            grad_k += load_rows(ptr_part_k, slot * D, used, D, BLOCK_D, True)
        if NEEDS_VALUE:
            grad_v += load_rows(ptr_part_v, slot * D, used, D, BLOCK_D, True)
        if NEEDS_BIAS:
            ptrs = ptr_part_bias + (slot * MEMBERS)[:, None] + member[None, :]
            grad_bias += tl.load(ptrs, mask=used[:, None] & (member < MEMBERS)[None, :], other=0.0)
    out = (i_row // HEADS_KV * key_len + key) * HEADS_KV + i_row % HEADS_KV
    if NEEDS_KEY:
        store_rows(ptr_grad_k, out * D, live, grad_k, D, BLOCK_D)
    if NEEDS_VALUE:
        store_rows(ptr_grad_v, out * D, live, grad_v, D, BLOCK_D)
    if NEEDS_BIAS:
        offs = (i_row * MEMBERS + member)[None, :] * key_len + key[:, None]
        tl.store(
            ptr_grad_bias + offs, grad_bias, mask=live[:, None] & (member < MEMBERS)[None, :]
        )


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for."""

    query: bool = True
    key: bool = True
    value: bool = True
    bias: bool = False

    def flags(self, bias: Bias | None) -> dict[str, bool]:
        """The constants of the kernels that own keys; a pair bias belongs to the query tiles."""
        per_key = self.bias and bias is not None and bias.is_per_key
        return {"NEEDS_KEY": self.key, "NEEDS_VALUE": self.value, "NEEDS_BIAS": per_key}


def backward(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    norm: Tensor,
    grad_out: Tensor,
    call: Call,
    needs: Needs,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients that `needs` asks for; bitwise repeatable.

    Args:
        plan: As in `forward`, made for backward.
        query, key, value: As in `forward`.
        out: ``[B, Q, H, D]``, contiguous, from `forward`.
        norm: fp32 ``[B, H, Q]``, from `forward`.
        grad_out: ``[B, Q, H, D]``, any strides.
        call: As in `forward`.
        needs: Which gradients.
        tiles: Tile sizes; default from the table.

    Returns:
        Gradients of query, key and value, contiguous, and of the bias in its shape and dtype; ``None``
        for those not asked for.
    """
    tiles = tiles or tiles_for(architecture_of(query.device), query.shape[-1])
    delta = torch.empty_like(norm)
    bias = call.bias
    biases = slot_bias(plan, bias) if bias is not None and bias.is_per_key else None
    grad_query = None
    if needs.query:
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    saved = (query, key, value, out, grad_out, norm, delta)
    grad_bias = None
    if needs.bias and bias is not None and not bias.is_per_key:
        grad_bias = _pair_gradient(plan, saved, biases, grad_query, call, bias, tiles.grad_query)
    else:
        _run_grad_query(plan, saved, biases, grad_query, None, call, tiles.grad_query)
    grad_key = grad_value = None
    if needs.key or needs.value or (needs.bias and grad_bias is None):
        grad_key, grad_value, grad_bias_key = _key_gradients(
            plan, saved, biases, call, needs, tiles.grad_key
        )
        grad_bias = grad_bias if grad_bias_key is None else grad_bias_key
    return grad_query, grad_key, grad_value, grad_bias


def _constants(plan: Plan, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, call: Call) -> dict:
    return {
        "HEADS_KV": key.shape[2],
        "GROUP": query.shape[2] // key.shape[2],
        "D": query.shape[3],
        "BLOCK_D": padded_head_dim(query.shape[3]),
        "CLAMPS": plan.clamps_positions,
        "PACKED": plan.epochs is not None,
        "ALIGNED": is_aligned(query, key, value),
        "GRAD_ALIGNED": is_aligned(grad),
        **call.flags,
    }


def _run_grad_query(
    plan: Plan,
    saved: tuple[Tensor, ...],
    biases: Tensor | None,
    grad_query: Tensor | None,
    grad_pair: Tensor | None,
    call: Call,
    config: TileConfig,
    rows: range | None = None,
) -> None:
    """dQ, delta and the gradient of a pair bias, for all rows or some."""
    query, key, value, out, grad, norm, delta = saved
    rows = rows or range(query.shape[0] * key.shape[2])
    num_tiles = triton.cdiv(plan.epoch_len * (query.shape[2] // key.shape[2]), config.block_m)
    pair_grad = "none"
    if grad_pair is not None:
        pair_grad = "rows" if grad_pair.dim() == 3 else "pairs"
    grad_query_kernel[(len(rows) * plan.num_epochs * num_tiles,)](
        query, key, value, out, grad, norm, delta, grad_query, grad_pair, plan.slot_key,
        plan.slot_start, plan.slot_expiry, plan.visible, plan.entered, plan.epochs, biases,
        call.pair_tensor, *call.factors, call.softmax_scale, query.shape[1], plan.key_len,
        plan.epoch_len, plan.num_epochs, num_tiles, plan.old_slots, plan.num_slots, rows.start,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride(),
        *call.pair_strides, BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.num_stages,
        PAIR_GRAD=pair_grad, NEEDS_BLOCKS=grad_query is not None or grad_pair is not None,
        **_constants(plan, query, key, value, grad, call), num_warps=config.num_warps,
    )  # fmt: skip


def _pair_gradient(
    plan: Plan,
    saved: tuple[Tensor, ...],
    biases: Tensor | None,
    grad_query: Tensor | None,
    call: Call,
    bias: Bias,
    config: TileConfig,
) -> Tensor:
    """Run the dQ kernel for a bias that depends on the query; returns the gradient of the bias."""
    query, key = saved[:2]
    batch, query_len, num_heads, _ = query.shape
    heads_kv, group = key.shape[2], num_heads // key.shape[2]
    shape, dtype = bias.tensor.shape, bias.tensor.dtype
    full = (batch, num_heads, query_len, key.shape[1])
    if shape == full:
        pairs = torch.zeros(shape, dtype=dtype, device=query.device)
        _run_grad_query(plan, saved, biases, grad_query, pairs, call, config)
        return pairs
    if shape[3] == 1:
        per_row = torch.empty(full[:3], dtype=torch.float32, device=query.device)
        _run_grad_query(plan, saved, biases, grad_query, per_row, call, config)
        return _sum_to(per_row[..., None], shape, heads_kv).to(dtype)
    # One KV head after the other, so that shared biases need no O(B H Q K) memory.
    total = torch.zeros(shape, dtype=torch.float32, device=query.device)
    for row in range(batch * heads_kv):
        pairs = torch.zeros((1, group, *full[2:]), dtype=torch.float32, device=query.device)
        _run_grad_query(
            plan, saved, biases, grad_query, pairs, call, config, range(row, row + 1)
        )
        i_batch = row // heads_kv if shape[0] > 1 else 0
        i_head = row % heads_kv
        if shape[1] == num_heads:
            total[i_batch, i_head * group : (i_head + 1) * group] += pairs[0]
        else:
            total[i_batch, i_head if shape[1] > 1 else 0] += pairs[0].sum(0)
    return total.to(dtype)


def _sum_to(grad: Tensor, shape: torch.Size, heads_kv: int) -> Tensor:
    """Sum a 4-D gradient over the dimensions in which the bias is broadcast, in fp32."""
    if shape[1] == heads_kv and grad.shape[1] != heads_kv:
        grad = grad.unflatten(1, (heads_kv, -1)).sum(2)
    dims = [d for d in range(4) if shape[d] == 1 and grad.shape[d] > 1]
    return grad.sum(dims, keepdim=True) if dims else grad


def _key_gradients(
    plan: Plan,
    saved: tuple[Tensor, ...],
    biases: Tensor | None,
    call: Call,
    needs: Needs,
    config: TileConfig,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dK, dV and the gradient of a per-key bias, some rows after the others to bound memory."""
    query, key, value, _, grad, norm, delta = saved
    batch, key_len, heads_kv, head_dim = key.shape
    bias = call.bias
    flags = needs.flags(bias)
    members = bias.group if bias is not None and bias.kind == "head" else 1

    def fresh(wanted: bool, like: Tensor) -> Tensor | None:
        return torch.empty_like(like, memory_format=torch.contiguous_format) if wanted else None

    grad_key, grad_value = fresh(needs.key, key), fresh(needs.value, value)
    grad_bias = None
    if flags["NEEDS_BIAS"]:
        grad_bias = torch.empty(
            batch, heads_kv * members, 1, key_len, dtype=torch.float32, device=key.device
        )
    rows = batch * heads_kv
    chunk = partial_rows(rows, plan.num_epochs * plan.num_slots * head_dim, query, key)
    slots = (chunk, plan.num_epochs, plan.num_slots)

    def part(wanted: bool, *last: int) -> Tensor | None:
        return torch.empty(*slots, *last, dtype=torch.float32, device=key.device) if wanted else None

    part_key, part_value = part(needs.key, head_dim), part(needs.value, head_dim)
    part_bias = part(grad_bias is not None, members)
    constants = _constants(plan, query, key, value, grad, call)
    num_blocks = triton.cdiv(plan.num_slots, config.block_n)
    block_k = max(1, 2048 // padded_head_dim(head_dim))
    for row in range(0, rows, chunk):
        now = min(chunk, rows - row)
        grad_key_kernel[(now * plan.num_epochs * num_blocks,)](
            query, key, value, grad, norm, delta, part_key, part_value, part_bias, plan.slot_key,
            plan.slot_start, plan.slot_expiry, plan.counts, plan.epochs, biases, call.pair_tensor,
            *call.factors, call.softmax_scale, query.shape[1], plan.key_len, plan.epoch_len,
            plan.num_epochs, num_blocks, plan.old_slots, plan.num_slots, row, *query.stride()[:3],
            *key.stride()[:3], *value.stride()[:3], *grad.stride(), *call.pair_strides,
            GROUP_PAD=triton.next_power_of_2(members), BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, STAGES=config.num_stages, **flags, **constants,
            num_warps=config.num_warps,
        )  # fmt: skip
        key_blocks = triton.cdiv(key_len, block_k)
        reduce_kernel[(now * key_blocks,)](
            part_key, part_value, part_bias, plan.use_end, plan.use_slot, grad_key, grad_value,
            grad_bias, key_len, plan.num_epochs, plan.num_slots, key_blocks, row, HEADS_KV=heads_kv,
            MEMBERS=members, MEMBERS_PAD=triton.next_power_of_2(members), D=head_dim,
            BLOCK_D=padded_head_dim(head_dim), BLOCK_K=block_k, STAGES=2, **flags, num_warps=4,
        )  # fmt: skip
    if grad_bias is not None and bias is not None:
        grad_bias = _sum_to(grad_bias, bias.tensor.shape, heads_kv).to(bias.tensor.dtype)
    return grad_key, grad_value, grad_bias
