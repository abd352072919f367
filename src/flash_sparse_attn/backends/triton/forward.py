"""Forward over epochs: every query tile walks the key slots of its epoch.

Two loops without a branch: old blocks that the whole tile sees, without any mask; then the old
blocks at the border and the new blocks, where positions are compared with intervals. A block gives
the same bits in either loop, so that a key that dies later changes nothing before.

Grid: (row, epoch, tile). Symbols: ``R`` rows (batch x KV heads), ``E`` epochs, ``P`` slots, ``G``
heads of a KV head, ``M`` rows of a tile, ``N`` slots of a block, ``D`` the head dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from .config import (
    TileConfig,
    architecture_of,
    padded_head_dim,
    role_config,
    slot_rows,
    tiles_for,
)
from .inputs import Call, is_aligned
from .launch import launch
from .slots import copy_slots, slot_dim
from .tiles import (
    LOWEST,
    epoch_bounds,
    load_rows,
    load_slots,
    log2_bias,
    row_and_rest,
    row_offsets,
    scaled_scores,
    softmax_update,
    store_rows,
    tile_blocks,
    tile_rows,
)

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
    "spb",
    "spk",
    "spg",
    "spq",
    "spn",
)


@triton.jit
def _attend(
    q, peak, total, acc, block, at, i_group, mask_row, slots_k, slots_v, slot_base, ptr_key,
    ptr_start, ptr_expiry, ptr_slot_bias, ptr_pair, stride_member, spn, scale, softcap,
    MASKED: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    PAIR_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SLOT_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Attend to one block of slots. Returns the new peak, total and accumulator."""
    slot = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    k = load_slots(slots_k, slot_base + block * BLOCK_N, SLOT_D, BLOCK_N, BLOCK_D, TMA)  # [N, D]
    scores, _ = scaled_scores(tl.dot(q, tl.trans(k)), scale, softcap, HAS_SOFTCAP)  # [M, N]
    if KEY_BIAS == "kv head":
        scores += tl.load(ptr_slot_bias + slot)[None, :]
    elif KEY_BIAS == "head":
        offs = i_group.to(tl.int64) * stride_member
        scores += tl.load(ptr_slot_bias + offs[:, None] + slot[None, :])
    if PAIR_BIAS:
        key = tl.load(ptr_key + slot)
        seen = mask_row[:, None] & (key >= 0)[None, :]
        pair = tl.load(ptr_pair + (key.to(tl.int64) * spn)[None, :], mask=seen, other=0.0)
        scores += log2_bias(pair)
    if MASKED:
        start = tl.load(ptr_start + slot)
        expiry = tl.load(ptr_expiry + slot)
        sees = (start[None, :] <= at[:, None]) & (at[:, None] < expiry[None, :])
        scores = tl.where(sees, scores, float("-inf"))
    probs, factor, peak, total = softmax_update(scores, peak, total)
    v = load_slots(slots_v, slot_base + block * BLOCK_N, SLOT_D, BLOCK_N, BLOCK_D, TMA)  # [N, D]
    acc = tl.dot(probs.to(v.dtype), v, acc * factor[:, None])
    return peak, total, acc


@triton.jit(do_not_specialize=_INTS)
def forward_kernel(
    ptr_q, slots_k, slots_v, ptr_out, ptr_lse, ptr_norm, ptr_key, ptr_start, ptr_expiry,
    ptr_visible, ptr_entered, ptr_epochs, ptr_slot_bias, ptr_pair, scale, softcap, query_len,
    key_len, epoch_len, num_epochs, num_tiles, old_slots, num_slots, row_0,
    sqb: tl.int64,
    sqn: tl.int64,
    sqh: tl.int64,
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
    HAS_SOFTCAP: tl.constexpr,
    HAS_NORM: tl.constexpr,
    CLAMPS: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Output, natural log-sum-exp, and for backward the same in log 2 units, +inf in empty rows."""
    i_local, rest = row_and_rest(num_epochs * num_tiles)
    i_tile = num_epochs * num_tiles - 1 - rest
    i_epoch, i_tile = i_tile // num_tiles, i_tile % num_tiles
    i_row = row_0 + i_local
    i_batch, i_head = i_row // HEADS_KV, i_row % HEADS_KV
    first, num, position = epoch_bounds(i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED)

    row, i_query, i_group = tile_rows(i_tile, GROUP, BLOCK_M)  # [M]
    mask_row = row < num * GROUP
    at = position + i_query
    if CLAMPS:
        at = tl.maximum(at, 0)
    num_full, num_old, num_new = 0, 0, 0
    if i_tile * BLOCK_M < num * GROUP:
        last = tl.minimum((i_tile * BLOCK_M + BLOCK_M - 1) // GROUP, num - 1)
        index = i_row * query_len + first
        num_full, num_old, num_new = tile_blocks(
            ptr_visible, ptr_entered, index + i_tile * BLOCK_M // GROUP, index + last, BLOCK_N
        )

    offs_head = i_head * GROUP + i_group
    offs_q = row_offsets(first + i_query, sqn, ALIGNED) + row_offsets(offs_head, sqh, ALIGNED)
    q = load_rows(ptr_q + row_offsets(i_batch, sqb, ALIGNED), offs_q, mask_row, D, BLOCK_D, True)
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
        ptr_pair = ptr_pair + (i_group * spg + (first + i_query) * spq)[:, None]

    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Without these conditions ptxas finds a path into the loops on which it has to copy
    # accumulators, and then serializes every wgmma.
    if num_full > 0:
        for block in tl.range(0, num_full, num_stages=STAGES):
            peak, total, acc = _attend(
                q, peak, total, acc, block, at, i_group, mask_row, slots_k, slots_v, slot_base,
                ptr_key, ptr_start, ptr_expiry, ptr_slot_bias, ptr_pair, stride_member, spn, scale,
                softcap, False, KEY_BIAS, PAIR_BIAS, HAS_SOFTCAP, SLOT_D, BLOCK_N, BLOCK_D, TMA,
            )  # fmt: skip
    num_border = num_old - num_full
    new_block = old_slots // BLOCK_N - num_border
    if num_border + num_new > 0:
        for i in tl.range(0, num_border + num_new, num_stages=STAGES):
            block = tl.where(i < num_border, num_full + i, new_block + i)
            peak, total, acc = _attend(
                q, peak, total, acc, block, at, i_group, mask_row, slots_k, slots_v, slot_base,
                ptr_key, ptr_start, ptr_expiry, ptr_slot_bias, ptr_pair, stride_member, spn, scale,
                softcap, True, KEY_BIAS, PAIR_BIAS, HAS_SOFTCAP, SLOT_D, BLOCK_N, BLOCK_D, TMA,
            )  # fmt: skip

    is_empty = total == 0
    acc = acc / tl.where(is_empty, 1.0, total)[:, None]
    norm = peak + tl.log2(tl.where(is_empty, 1.0, total))
    HEADS: tl.constexpr = HEADS_KV * GROUP
    index = (i_batch * query_len + first + i_query) * HEADS + offs_head
    store_rows(ptr_out, index * D, mask_row, acc, D, BLOCK_D)
    index = (i_batch * HEADS + offs_head) * query_len + first + i_query
    lse = tl.where(is_empty, float("-inf"), norm / 1.4426950408889634)
    tl.store(ptr_lse + index, lse, mask=mask_row)
    if HAS_NORM:
        # In the order of rows, so that backward reads those of a tile at once.
        index = (i_row * query_len + first) * GROUP + row
        tl.store(ptr_norm + index, tl.where(is_empty, float("inf"), norm), mask=mask_row)


def forward(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    *,
    with_norm: bool = False,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention over the slots of a plan.

    Args:
        plan: Of the call's selection; reusable.
        query: fp16 or bf16 ``[B, Q, H, D]``, packed calls with batch 1; the last stride is 1.
        key: ``[B, K, Hkv, D]``.
        value: ``[B, K, Hkv, D]``.
        call: Scale, softcap and bias.
        with_norm: Also return what `backward` needs of the normalization.
        config: Tile sizes of this kernel; default from the table, or the kernel of
            `gluon_forward.py` where that serves the call.

    Returns:
        ``out [B, Q, H, D]``, ``lse`` fp32 ``[B, H, Q]``, and ``norm`` or ``None``: as many fp32 as
        ``lse``, for `backward` alone.
    """
    batch, query_len, num_heads, head_dim = query.shape
    heads_kv = key.shape[2]
    group = num_heads // heads_kv
    roles = None if config else role_config(architecture_of(query.device), head_dim)
    if roles is not None:
        from .gluon_forward import gluon_forward  # only where its version of Triton is installed

        served = gluon_forward(plan, query, key, value, call, roles, with_norm=with_norm)
        if served is not None:
            return served
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_heads, query_len, dtype=torch.float32, device=query.device)
    norm = torch.empty_like(lse) if with_norm else None
    config = config or tiles_for(architecture_of(query.device), head_dim).forward
    num_tiles = triton.cdiv(plan.epoch_len * group, config.block_m)
    rows = batch * heads_kv
    chunk = slot_rows(rows, plan.num_epochs * plan.num_slots * slot_dim(head_dim), query, key)
    for row in range(0, rows, chunk):
        now = range(row, min(row + chunk, rows))
        slots = copy_slots(plan, key, value, call.bias, now)
        launch(forward_kernel, len(now) * plan.num_epochs * num_tiles)(
            query, *slots.sources(config.block_n, config.uses_tma), out, lse, norm,
            plan.slot_key, plan.slot_start, plan.slot_expiry, plan.visible, plan.entered,
            plan.epochs, slots.bias, call.pair_tensor, *call.factors, query_len, plan.key_len,
            plan.epoch_len, plan.num_epochs, num_tiles, plan.old_slots, plan.num_slots, row,
            *query.stride()[:3], *call.pair_strides, HEADS_KV=heads_kv, GROUP=group, D=head_dim,
            SLOT_D=slot_dim(head_dim), BLOCK_D=padded_head_dim(head_dim), BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, STAGES=config.num_stages, **call.flags, HAS_NORM=with_norm,
            CLAMPS=plan.clamps_positions, PACKED=plan.epochs is not None,
            ALIGNED=is_aligned(query), TMA=config.uses_tma, num_warps=config.num_warps,
        )  # fmt: skip
    return out, lse, norm
