"""dK, dV and the gradient of a per-key bias: owned by (epoch, block of slots), then summed by key.

1. `grad_key_kernel`: a block of slots walks the query tiles of its epoch that see it and owns what
   this epoch contributes, in fp32. Scores are transposed (keys x queries): Triton 3.4 to 3.7.0 can
   compile ``dot(trans(ds), q)`` wrongly for Hopper.
2. `reduce.Parts`: every key adds the contributions of its epochs, in their order, and rounds once.

Symbols as in `forward.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from .block_lists import slot_lists
from .config import TileConfig, padded_head_dim
from .grad_query import num_query_tiles
from .inputs import (
    Call,
    Saved,
    has_rows,
    is_aligned,
    mask_strides,
    plan_flags,
    query_tiles,
    shares_bias,
    words_of_tile,
)
from .launch import launch
from .reduce import Parts
from .slots import slots_of
from .tiles import (
    NUMBERS,
    bias_of_tile,
    block_tiles,
    epoch_bounds,
    for_heads,
    hide,
    key_bounds,
    load_grads,
    load_rows,
    log2_bias,
    near_rows,
    row_and_rest,
    row_offsets,
    scaled_scores,
    slot_intervals,
    slot_keys,
    store_rows,
    tile_rows,
)

_INF = tl.constexpr(float("inf"))


@triton.jit
def _add_tile(
    k, v, bias, start, expiry, grad_k, grad_v, grad_bias, pair, i_tile, following, is_one, i_batch,
    i_head, first, num, position, slot, key, num_keys, tiles_q, tiles_grad, ptr_peak, ptr_share,
    ptr_delta, ptr_bits, num_words, num_slots, ptr_slot_bias, ptr_bias, ptr_mask, stride_member,
    sqn, sqh, sgn, sgh, sgd, sbg, sbq, sbn, smg, smq, smn, scale, softcap,
    MASKED: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    MEMBERS: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    PAIR_BIAS: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_KEY: tl.constexpr,
    NEEDS_VALUE: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    CLAMPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    TMA_Q: tl.constexpr,
    TMA_GRAD: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one query tile to the gradients of a block of slots.

    `pair`, `following` and `is_one` as in `forward.py`.
    """
    FETCHED: tl.constexpr = PAIR_BIAS and SLOTS == "gathered"
    HIDES: tl.constexpr = MASKED and not FETCHED
    row, i_query, i_group = tile_rows(i_tile, GROUP, BLOCK_M)  # [M]
    mask_row = row < num * GROUP
    at = position + i_query
    if CLAMPS:
        at = tl.maximum(at, 0)
    offs_head = i_head * GROUP + i_group
    query_0 = first + i_tile * (BLOCK_M // GROUP)
    if TMA_Q:
        q = tiles_q.load([i_batch.to(tl.int32), query_0, (i_head * GROUP).to(tl.int32), 0])
        q = q.reshape(BLOCK_M, BLOCK_D)
    else:
        offs_q = row_offsets(first + i_query, sqn, ALIGNED) + row_offsets(offs_head, sqh, ALIGNED)
        q = load_rows(tiles_q, offs_q, mask_row, D, BLOCK_D, True)  # [M, D]
    if TMA_GRAD:
        grad = tiles_grad.load([i_batch.to(tl.int32), query_0, (i_head * GROUP).to(tl.int32), 0])
        grad = grad.reshape(BLOCK_M, BLOCK_D)
    else:
        grad = load_grads(
            tiles_grad, first + i_query, offs_head, sgn, sgh, sgd, mask_row, D, BLOCK_D,
            GRAD_ALIGNED,
        ).to(q.dtype)  # [M, D]  # fmt: skip
    # The last tile of an epoch may be short: what it lacks has no probability. Selections meet it
    # with `MASKED`, since these conditions are an eighth to a fifth of the other loop.
    SHORT: tl.constexpr = MASKED or SLOTS == "gathered"
    if SHORT:
        peak = tl.load(ptr_peak + row, mask=mask_row, other=_INF)  # [M]
        share = tl.load(ptr_share + row, mask=mask_row, other=0.0)  # [M]
    else:
        peak, share = tl.load(ptr_peak + row), tl.load(ptr_share + row)
    scores, tanh = scaled_scores(tl.dot(k, tl.trans(q)), scale, softcap, HAS_SOFTCAP)  # [N, M]
    if KEY_BIAS == "kv head":
        scores += bias[:, None]
    elif KEY_BIAS == "head":
        if SLOTS == "copied":
            offs_n = tl.arange(0, k.shape[0])
            offs = i_group.to(tl.int64) * stride_member
            scores += tl.load(ptr_slot_bias + offs_n[:, None] + offs[None, :])
        else:
            offs = (key.to(tl.int64) * sbn)[:, None] + (i_group * sbg)[None, :]
            scores += log2_bias(tl.load(ptr_bias + offs, mask=(key >= 0)[:, None], other=0.0))
    if HIDES and SLOTS != "gathered":
        sees = (start[:, None] <= at[None, :]) & (at[None, :] < expiry[:, None])
        if HAS_MASK:
            sees &= mask_row[None, :]
            offs = row_offsets(i_group, smg, ROWS) + row_offsets(first + i_query, smq, ROWS)
            if ROWS:
                near = near_rows(slot, at, mask_row, num_keys, MASKED, CLAMPS, True)
                offs = offs[None, :] + slot[:, None]
                sees &= tl.load(ptr_mask + offs, mask=near, other=0) != 0
            else:
                offs = (key.to(tl.int64) * smn)[:, None] + offs[None, :]
                sees &= tl.load(ptr_mask + offs, mask=sees, other=0) != 0
    if FETCHED:
        read = for_heads(pair, GROUP if SHARED else 1, True)
        scores = tl.where(read == -_INF, -_INF, scores + log2_bias(read))
        pair = bias_of_tile(
            following, is_one, first, num, slot, key, ptr_bits, num_words, num_slots, ptr_bias,
            sbg, sbq, sbn, MASKED, SHARED, MEMBERS, WORDS, GROUP, BLOCK_M,
        )  # fmt: skip
    elif PAIR_BIAS:
        offs = row_offsets(i_group, sbg, ROWS) + row_offsets(first + i_query, sbq, ROWS)
        if ROWS:
            near = near_rows(slot, at, mask_row, num_keys, MASKED, CLAMPS, True)
            read = tl.load(ptr_bias + (offs[None, :] + slot[:, None]), mask=near, other=0.0)
        else:
            seen = (key >= 0)[:, None] & mask_row[None, :]
            if MASKED:
                seen &= sees
            offs = (key.to(tl.int64) * sbn)[:, None] + offs[None, :]
            read = tl.load(ptr_bias + offs, mask=seen, other=0.0)
        scores += log2_bias(read)
    if HIDES and SLOTS == "gathered":
        scores = hide(
            scores, ptr_bits, slot, i_query, i_group, i_tile * BLOCK_M // GROUP // 32, num_words,
            num_slots, MEMBERS, WORDS, True,
        )  # fmt: skip
    elif HIDES:
        scores = tl.where(sees, scores, -_INF)
    probs = tl.exp2(scores - peak[None, :]) * share[None, :]
    if NEEDS_VALUE:
        grad_v = tl.dot(probs.to(grad.dtype), grad, grad_v)
    if NEEDS_KEY or NEEDS_BIAS:
        if SHORT:
            delta = tl.load(ptr_delta + row, mask=mask_row, other=0.0)  # [M]
        else:
            delta = tl.load(ptr_delta + row)  # [M]
        grad_scores = probs * (tl.dot(v, tl.trans(grad)) - delta[None, :])  # [N, M]
        if HAS_MASK and HIDES:
            grad_scores = tl.where(sees, grad_scores, 0.0)  # a hidden key may hold NaN
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
    return grad_k, grad_v, grad_bias, pair


@triton.jit(do_not_specialize=NUMBERS)
def grad_key_kernel(
    tiles_q, ptr_k, ptr_v, tiles_grad, ptr_peak, ptr_share, ptr_delta, ptr_part_k, ptr_part_v,
    ptr_part_bias, ptr_key, ptr_start, ptr_expiry, ptr_counts, ptr_epochs, ptr_bits, ptr_lists,
    ptr_mask, ptr_slot_bias, ptr_bias, scale, softcap, softmax_scale, query_len, key_len,
    epoch_len, num_epochs, num_lists, num_tiles, num_blocks, old_slots, num_slots, row_0, plan_b,
    plan_h,
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
    sbb: tl.int64,
    sbk: tl.int64,
    sbg: tl.int64,
    sbq: tl.int64,
    sbn: tl.int64,
    smb: tl.int64,
    smk: tl.int64,
    smg: tl.int64,
    smq: tl.int64,
    smn: tl.int64,
    HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    MEMBERS: tl.constexpr,
    WORDS: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    PAIR_BIAS: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_KEY: tl.constexpr,
    NEEDS_VALUE: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    CLAMPS: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIGNED_KV: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    TMA_Q: tl.constexpr,
    TMA_GRAD: tl.constexpr,
):  # fmt: skip
    """One program per (row, epoch, block of slots)."""
    i_local, rest = row_and_rest(num_epochs * num_blocks)
    if SLOTS == "gathered":
        # Most blocks hold nothing, and those that do are the first of their epochs: these first.
        i_block, i_epoch = rest // num_epochs, rest % num_epochs
    else:
        i_epoch, i_block = rest // num_blocks, rest % num_blocks
    i_row = row_0 + i_local
    i_batch, i_head = i_row // HEADS_KV, i_row % HEADS_KV
    plan_list = (i_batch * plan_b + i_head * plan_h) * num_lists
    plan_list += i_epoch % num_lists
    slot_0 = i_block * BLOCK_N
    part = (slot_0 >= old_slots).to(tl.int32)
    key_0, used = key_bounds(i_epoch, ptr_epochs, key_len, PACKED)
    num_keys = used
    if SLOTS != "keys":
        used = tl.load(ptr_counts + plan_list * 2 + part)
    if slot_0 - part * old_slots < used:
        first, num, position = epoch_bounds(
            i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED
        )
        slot = slot_0 + tl.arange(0, BLOCK_N)  # [N]
        plan_base = tl.multiple_of(plan_list * num_slots, 128)
        if SLOTS != "keys":
            ptr_key += plan_base
        key = slot_keys(ptr_key, slot, key_0, num_keys, SLOTS)
        num_words = epoch_len // 32
        start, expiry = slot, slot
        tile_0, num_before, num_border, full_0, full_1 = 0, 0, 0, 0, 0
        if SLOTS == "gathered":
            ptr_bits += plan_base * MEMBERS * num_words
            ptr_lists += (
                (plan_list // num_lists * num_epochs + i_epoch) * num_blocks + i_block
            ) * (num_tiles + 2)
            full_1 = tl.load(ptr_lists)
            num_border = tl.load(ptr_lists + 1) - full_1
        else:
            if SLOTS == "copied":
                ptr_start += plan_base
                ptr_expiry += plan_base
            start, expiry = slot_intervals(ptr_start, ptr_expiry, slot, num_keys, SLOTS, CLAMPS)
            tile_0, full_0, full_1, tile_1 = block_tiles(
                tl.min(start, 0), tl.max(start, 0), tl.min(expiry, 0), tl.max(expiry, 0), position,
                num, GROUP, BLOCK_M, CLAMPS,
            )  # fmt: skip
            if HAS_MASK:
                full_1 = full_0  # with a second loop ptxas serializes wgmma
            num_before = full_0 - tile_0
            num_border = num_before + tile_1 - full_1

        if not TMA_Q:
            tiles_q += row_offsets(i_batch, sqb, ALIGNED)
        if not TMA_GRAD:
            tiles_grad += row_offsets(i_batch, sgb, GRAD_ALIGNED)
        ptr_peak += (i_row * query_len + first) * GROUP
        ptr_share += (i_row * query_len + first) * GROUP
        ptr_delta += (i_row * query_len + first) * GROUP
        ptr_k += row_offsets(i_batch, skb, ALIGNED_KV) + row_offsets(i_head, skh, ALIGNED_KV)
        ptr_v += row_offsets(i_batch, svb, ALIGNED_KV) + row_offsets(i_head, svh, ALIGNED_KV)
        k = load_rows(ptr_k, row_offsets(key, skn, ALIGNED_KV), key >= 0, D, BLOCK_D, True)
        v = load_rows(ptr_v, row_offsets(key, svn, ALIGNED_KV), key >= 0, D, BLOCK_D, True)
        bias = tl.zeros([BLOCK_N], tl.float32)
        grad_bias = tl.zeros([BLOCK_N], tl.float32)
        stride_member = num_lists.to(tl.int64) * num_slots
        slot_list = i_local * num_lists + i_epoch % num_lists
        if PAIR_BIAS or (SLOTS != "copied" and KEY_BIAS != "none"):
            ALIGNED_BIAS: tl.constexpr = ROWS and PAIR_BIAS
            ptr_bias += row_offsets(i_batch, sbb, ALIGNED_BIAS)
            ptr_bias += row_offsets(i_head, sbk, ALIGNED_BIAS)
        if KEY_BIAS == "kv head":
            if SLOTS == "copied":
                bias = tl.load(ptr_slot_bias + slot_list * num_slots + slot)
            else:
                bias = tl.load(ptr_bias + key.to(tl.int64) * sbn, mask=key >= 0, other=0.0)
                bias = log2_bias(bias)
        elif KEY_BIAS == "head":
            if SLOTS == "copied":
                slot_list += i_local * (GROUP - 1) * num_lists
                ptr_slot_bias += slot_list * num_slots + slot_0
            grad_bias = tl.zeros([BLOCK_N, GROUP_PAD], tl.float32)
        if HAS_MASK:
            ptr_mask += row_offsets(i_batch, smb, ROWS) + row_offsets(i_head, smk, ROWS)

        grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        # The conditions keep wgmma asynchronous, see `forward.py`.
        FETCHED: tl.constexpr = PAIR_BIAS and SLOTS == "gathered"
        if full_0 < full_1:
            pair = 0
            if FETCHED:
                pair = bias_of_tile(
                    tl.load(ptr_lists + 2), True, first, num, slot, key, ptr_bits, num_words,
                    num_slots, ptr_bias, sbg, sbq, sbn, False, SHARED, MEMBERS, WORDS, GROUP,
                    BLOCK_M,
                )  # fmt: skip
            for i in tl.range(full_0, full_1, num_stages=STAGES):
                tile, following = i, i
                if SLOTS == "gathered":
                    tile = tl.load(ptr_lists + 2 + i)
                    following = tl.load(ptr_lists + 2 + tl.minimum(i + 1, full_1 - 1))
                grad_k, grad_v, grad_bias, pair = _add_tile(
                    k, v, bias, start, expiry, grad_k, grad_v, grad_bias, pair, tile, following,
                    i + 1 < full_1, i_batch, i_head, first, num, position, slot, key, num_keys,
                    tiles_q, tiles_grad, ptr_peak, ptr_share, ptr_delta, ptr_bits, num_words,
                    num_slots, ptr_slot_bias, ptr_bias, ptr_mask, stride_member, sqn, sqh, sgn, sgh,
                    sgd, sbg, sbq, sbn, smg, smq, smn, scale, softcap, False, SLOTS, HAS_MASK, ROWS,
                    MEMBERS, WORDS, GROUP, D, BLOCK_D, BLOCK_M, KEY_BIAS, PAIR_BIAS, SHARED,
                    HAS_SOFTCAP, NEEDS_KEY, NEEDS_VALUE, NEEDS_BIAS, CLAMPS, ALIGNED, GRAD_ALIGNED,
                    TMA_Q, TMA_GRAD,
                )  # fmt: skip
        if num_border > 0:
            pair = 0
            if FETCHED:
                pair = bias_of_tile(
                    tl.load(ptr_lists + 2 + full_1), True, first, num, slot, key, ptr_bits,
                    num_words, num_slots, ptr_bias, sbg, sbq, sbn, True, SHARED, MEMBERS, WORDS,
                    GROUP, BLOCK_M,
                )  # fmt: skip
            for i in tl.range(0, num_border, num_stages=STAGES):
                if SLOTS == "gathered":
                    tile = tl.load(ptr_lists + 2 + full_1 + i)
                    last = full_1 + num_border - 1
                    following = tl.load(ptr_lists + 2 + tl.minimum(full_1 + i + 1, last))
                else:
                    tile = tl.where(i < num_before, tile_0 + i, full_1 - num_before + i)
                    following = tile
                grad_k, grad_v, grad_bias, pair = _add_tile(
                    k, v, bias, start, expiry, grad_k, grad_v, grad_bias, pair, tile, following,
                    i + 1 < num_border, i_batch, i_head, first, num, position, slot, key, num_keys,
                    tiles_q, tiles_grad, ptr_peak, ptr_share, ptr_delta, ptr_bits, num_words,
                    num_slots, ptr_slot_bias, ptr_bias, ptr_mask, stride_member, sqn, sqh, sgn, sgh,
                    sgd, sbg, sbq, sbn, smg, smq, smn, scale, softcap, True, SLOTS, HAS_MASK, ROWS,
                    MEMBERS, WORDS, GROUP, D, BLOCK_D, BLOCK_M, KEY_BIAS, PAIR_BIAS, SHARED,
                    HAS_SOFTCAP, NEEDS_KEY, NEEDS_VALUE, NEEDS_BIAS, CLAMPS, ALIGNED, GRAD_ALIGNED,
                    TMA_Q, TMA_GRAD,
                )  # fmt: skip

        out = (i_local * num_epochs + i_epoch) * num_slots + slot
        if NEEDS_KEY:
            store_rows(ptr_part_k, out * D, key >= 0, grad_k * softmax_scale, D, BLOCK_D)
        if NEEDS_VALUE:
            store_rows(ptr_part_v, out * D, key >= 0, grad_v, D, BLOCK_D)
        if NEEDS_BIAS:
            if KEY_BIAS == "head":
                member = tl.arange(0, GROUP_PAD)
                ptrs = ptr_part_bias + (out * GROUP)[:, None] + member[None, :]
                tl.store(ptrs, grad_bias, mask=(member < GROUP)[None, :])
            else:
                tl.store(ptr_part_bias + out, grad_bias)


def run_grad_key(
    plan: Plan,
    saved: Saved,
    call: Call,
    config: TileConfig,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_bias: Tensor | None,
    slot_bias: Tensor | None,
) -> None:
    """Fill the gradients that are not ``None``, some rows after the others to bound memory.

    Args:
        plan, saved, call: Of the call; delta is filled.
        config: Tile sizes.
        grad_key: ``[B, K, Hkv, D]``, contiguous.
        grad_value: ``[B, K, Hkv, D]``, contiguous.
        grad_bias: fp32 ``[B, Hkv * members, 1, K]``, contiguous, of a bias per key.
        slot_bias: From `run_grad_query`.
    """
    query, key, value = saved.query, saved.key, saved.value
    heads_kv, head_dim, group = key.shape[2], key.shape[3], saved.group
    members = 1 if call.bias is None else call.bias.members
    parts = Parts.of(plan, saved, members, grad_key, grad_value, grad_bias)
    tiles_q, tiles_grad = (
        query_tiles(tensor, group, config.block_m) if config.uses_tma else None
        for tensor in (query, saved.grad_out)
    )
    num_blocks = triton.cdiv(plan.num_slots, config.block_n)
    num_tiles = num_query_tiles(plan, saved, config)
    lists = slot_lists(plan, group, config.block_m, config.block_n)
    for now in parts.chunks:
        bias = slot_bias
        if bias is None or len(parts.chunks) > 1:
            bias = slots_of(plan, key, value, call.bias, now, with_rows=False).bias
        launch(grad_key_kernel, len(now) * plan.num_epochs * num_blocks)(
            tiles_q or query, key, value, tiles_grad or saved.grad_out, *saved.norm, saved.delta,
            *parts.tensors, plan.slot_key, plan.slot_start, plan.slot_expiry,
            plan.counts, plan.epochs, plan.slot_bits, lists, plan.mask, bias, call.bias_tensor,
            *call.factors, call.softmax_scale, query.shape[1], plan.key_len, plan.epoch_len,
            plan.num_epochs, plan.num_lists, num_tiles, num_blocks, plan.old_slots, plan.num_slots,
            now.start, *plan.row_strides(heads_kv), *query.stride()[:3], *key.stride()[:3],
            *value.stride()[:3], *saved.grad_out.stride(), *call.bias_strides,
            *mask_strides(plan, heads_kv, group), HEADS_KV=heads_kv, GROUP=group,
            GROUP_PAD=triton.next_power_of_2(members), D=head_dim,
            BLOCK_D=padded_head_dim(head_dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            STAGES=config.num_stages, **plan_flags(plan), ROWS=has_rows(plan, call),
            SHARED=shares_bias(plan, call, config.block_m, group),
            WORDS=words_of_tile(config.block_m, group), **call.flags, **parts.flags,
            PACKED=plan.epochs is not None, ALIGNED=is_aligned(query),
            ALIGNED_KV=is_aligned(key, value), GRAD_ALIGNED=is_aligned(saved.grad_out),
            TMA_Q=tiles_q is not None, TMA_GRAD=tiles_grad is not None, **config.options,
        )  # fmt: skip
        parts.add_up(now)
