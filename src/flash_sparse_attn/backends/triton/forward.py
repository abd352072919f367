"""Forward over epochs: every query tile walks the key slots of its epoch.

Two loops without a branch: blocks that the whole tile sees, without any mask; then the blocks that
it sees in part, where positions are compared with intervals, or bits are read. A block gives the
same bits in either loop, so that a key that dies later changes nothing before.

Grid: (row, epoch, tile). Symbols: ``R`` rows (batch x KV heads), ``E`` epochs, ``P`` slots, ``G``
heads of a KV head, ``M`` rows of a tile, ``N`` slots of a block, ``D`` the head dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from .block_lists import tile_lists
from .config import TileConfig, architecture_of, keeps_rest, padded_head_dim, tiles_for
from .inputs import (
    Call,
    are_short,
    has_rows,
    is_aligned,
    mask_strides,
    pair_tensors,
    plan_flags,
    rest_arguments,
    shares_bias,
    words_of_tile,
)
from .launch import launch
from .role_config import roles_for
from .slots import run_sources, slot_chunks, slot_dim, slots_of, uses_descriptors
from .tiles import (
    LOWEST,
    NUMBERS,
    bias_offsets,
    epoch_bounds,
    for_heads,
    gathered_bias,
    hide,
    key_blocks,
    key_bounds,
    last_key,
    load_rows,
    load_slots,
    log2_bias,
    near_rows,
    row_and_rest,
    row_offsets,
    scaled_scores,
    slot_intervals,
    slot_keys,
    softmax_update,
    store_rows,
    tile_blocks,
    tile_rows,
)


@triton.jit
def _attend(
    q, peak, total, acc, pair, block, following, is_one, at, i_query, i_group, mask_row, i_batch,
    i_head, slots_k, slots_v, slot_base, skn, svn, ptr_key, ptr_start, ptr_expiry, ptr_bits, word_0,
    num_words, num_slots, key_0, num_keys, ptr_slot_bias, ptr_bias, stride_member, sbn,
    ptr_mask, smn, scale, softcap,
    MASKED: tl.constexpr,
    CLEARS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    CLAMPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    WORDS: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    PAIR_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    SLOT_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED_KV: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Attend to one block of slots. Returns the new peak, total and accumulator.

    `pair` is the bias of gathered slots, read a block ahead; that of the `following` block is
    returned as well, of none if that `is_one` is False.

    On demand values that no row of the tile sees count as 0: such may hold anything.
    """
    FETCHED: tl.constexpr = PAIR_BIAS and SLOTS == "gathered"
    LISTED: tl.constexpr = SLOTS == "gathered" or SLOTS == "run"
    HIDES: tl.constexpr = (MASKED or (HAS_MASK and ROWS)) and not FETCHED
    slot = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    key = slot
    if SLOTS != "copied" or PAIR_BIAS:
        key = slot_keys(ptr_key, slot, key_0, num_keys, SLOTS)
    k = load_slots(
        slots_k, slot_base, block, key, key_0, i_batch, i_head, skn, SLOTS, D, SLOT_D, BLOCK_N,
        BLOCK_D, ALIGNED_KV, TMA, MASKED,
    )  # [N, D]  # fmt: skip
    scores, _ = scaled_scores(tl.dot(q, tl.trans(k)), scale, softcap, HAS_SOFTCAP)  # [M, N]
    if KEY_BIAS == "kv head":
        scores += tl.load(ptr_slot_bias + slot)[None, :]
    elif KEY_BIAS == "head":
        offs = i_group.to(tl.int64) * stride_member
        scores += tl.load(ptr_slot_bias + offs[:, None] + slot[None, :])
    if HIDES and MASKED and not LISTED:
        if SLOTS == "keys":
            sees = slot[None, :] <= last_key(at, num_keys, CLAMPS)[:, None]
        else:
            start, expiry = slot_intervals(ptr_start, ptr_expiry, slot, num_keys, SLOTS, CLAMPS)
            sees = (start[None, :] <= at[:, None]) & (at[:, None] < expiry[None, :])
        if HAS_MASK and not ROWS:
            sees &= mask_row[:, None]
            offs = (key.to(tl.int64) * smn)[None, :]
            sees &= tl.load(ptr_mask + offs, mask=sees, other=0) != 0
    if HAS_MASK and ROWS:
        near = near_rows(slot, at, mask_row, num_keys, MASKED, CLAMPS, False)
        shown = tl.load(ptr_mask + slot[None, :], mask=near, other=0) != 0
        sees = sees & shown if MASKED else shown
    if FETCHED:
        read = for_heads(pair, scores.shape[0] // pair.shape[0], False)
        scores = tl.where(read == float("-inf"), float("-inf"), scores + log2_bias(read))
        pair = gathered_bias(
            following, is_one, i_query, i_group, mask_row, ptr_key, ptr_bits, word_0, num_words,
            num_slots, ptr_bias, sbn, MASKED, MEMBERS, WORDS, BLOCK_N,
        )  # fmt: skip
    elif PAIR_BIAS:
        if ROWS:
            # Not only what the mask shows: the loads need not wait for it.
            near = near_rows(slot, at, mask_row, num_keys, MASKED, CLAMPS, False)
            bias = tl.load(ptr_bias + slot[None, :], mask=near, other=0.0)
        else:
            seen = mask_row[:, None] & (key >= 0)[None, :]
            if MASKED:
                seen &= sees
            bias = tl.load(ptr_bias + (key.to(tl.int64) * sbn)[None, :], mask=seen, other=0.0)
        scores += log2_bias(bias)
    if HIDES and LISTED:
        scores = hide(
            scores, ptr_bits, slot, i_query, i_group, word_0, num_words, num_slots, MEMBERS, WORDS
        )
    elif HIDES:
        scores = tl.where(sees, scores, float("-inf"))
    probs, factor, peak, total = softmax_update(scores, peak, total)
    v = load_slots(
        slots_v, slot_base, block, key, key_0, i_batch, i_head, svn, SLOTS, D, SLOT_D, BLOCK_N,
        BLOCK_D, ALIGNED_KV, TMA, MASKED,
    )  # [N, D]  # fmt: skip
    if HIDES and CLEARS:
        v = tl.where((tl.max(sees.to(tl.int32), 0) > 0)[:, None], v, 0.0)
    acc = tl.dot(probs.to(v.dtype), v, acc * factor[:, None])
    return peak, total, acc, pair


@triton.jit
def _walk(
    q, num_full, num_old, num_new, old_slots, ptr_lists, at, i_query, i_group, mask_row, i_batch,
    i_head, slots_k, slots_v, slot_base, skn, svn, ptr_key, ptr_start, ptr_expiry, ptr_bits,
    word_0, num_words, num_slots, key_0, num_keys, ptr_slot_bias, ptr_bias, stride_member, sbn,
    ptr_mask, smn, scale, softcap,
    CLEARS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    CLAMPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    WORDS: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    PAIR_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    SLOT_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGNED_KV: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Attend to all blocks of a tile. Returns peak, total and accumulator."""
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    LISTED: tl.constexpr = SLOTS == "gathered" or SLOTS == "run"
    # Without these conditions ptxas finds a path into the loops on which it has to copy
    # accumulators, and then serializes every wgmma.
    if num_full > 0:
        pair = 0
        if PAIR_BIAS and SLOTS == "gathered":
            pair = gathered_bias(
                tl.load(ptr_lists + 3), True, i_query, i_group, mask_row, ptr_key, ptr_bits,
                word_0, num_words, num_slots, ptr_bias, sbn, False, MEMBERS, WORDS, BLOCK_N,
            )  # fmt: skip
        for i in tl.range(0, num_full, num_stages=STAGES):
            block, following = i, i
            if LISTED:
                block = tl.load(ptr_lists + 3 + i)
                following = tl.load(ptr_lists + 3 + tl.minimum(i + 1, num_full - 1))
            peak, total, acc, pair = _attend(
                q, peak, total, acc, pair, block, following, i + 1 < num_full, at, i_query, i_group,
                mask_row, i_batch, i_head, slots_k, slots_v, slot_base, skn, svn, ptr_key,
                ptr_start, ptr_expiry, ptr_bits, word_0, num_words, num_slots, key_0, num_keys,
                ptr_slot_bias, ptr_bias, stride_member, sbn, ptr_mask, smn, scale, softcap,
                False, CLEARS, SLOTS, HAS_MASK, ROWS, CLAMPS, MEMBERS, WORDS, KEY_BIAS, PAIR_BIAS,
                HAS_SOFTCAP, D, SLOT_D, BLOCK_N, BLOCK_D, ALIGNED_KV, TMA,
            )  # fmt: skip
    num_border = num_old - num_full
    new_block = old_slots // BLOCK_N - num_border
    if num_border + num_new > 0:
        pair = 0
        if PAIR_BIAS and SLOTS == "gathered":
            pair = gathered_bias(
                tl.load(ptr_lists + 3 + num_full), True, i_query, i_group, mask_row, ptr_key,
                ptr_bits, word_0, num_words, num_slots, ptr_bias, sbn, True, MEMBERS, WORDS,
                BLOCK_N,
            )  # fmt: skip
        for i in tl.range(0, num_border + num_new, num_stages=STAGES):
            if LISTED:
                block = tl.load(ptr_lists + 3 + num_full + i)
                last = num_full + num_border - 1
                following = tl.load(ptr_lists + 3 + tl.minimum(num_full + i + 1, last))
            else:
                block = tl.where(i < num_border, num_full + i, new_block + i)
                following = block
            peak, total, acc, pair = _attend(
                q, peak, total, acc, pair, block, following, i + 1 < num_border, at, i_query,
                i_group, mask_row, i_batch, i_head, slots_k, slots_v, slot_base, skn, svn, ptr_key,
                ptr_start, ptr_expiry, ptr_bits, word_0, num_words, num_slots, key_0, num_keys,
                ptr_slot_bias, ptr_bias, stride_member, sbn, ptr_mask, smn, scale, softcap,
                True, CLEARS, SLOTS, HAS_MASK, ROWS, CLAMPS, MEMBERS, WORDS, KEY_BIAS, PAIR_BIAS,
                HAS_SOFTCAP, D, SLOT_D, BLOCK_N, BLOCK_D, ALIGNED_KV, TMA,
            )  # fmt: skip
    return peak, total, acc


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    ptr_q, slots_k, slots_v, runs_k, runs_v, ptr_out, ptr_out_rest, has_rest, ptr_lse, ptr_peak,
    ptr_share, ptr_key, ptr_start, ptr_expiry, ptr_visible, ptr_entered, ptr_epochs, ptr_bits,
    ptr_lists, ptr_mask, ptr_slot_bias, ptr_bias, scale, softcap, query_len, key_len, epoch_len,
    num_epochs, num_lists, num_tiles, old_slots, num_slots, row_0, plan_b, plan_h,
    sqb: tl.int64,
    sqn: tl.int64,
    sqh: tl.int64,
    skb: tl.int64,
    skn: tl.int64,
    skh: tl.int64,
    svb: tl.int64,
    svn: tl.int64,
    svh: tl.int64,
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
    D: tl.constexpr,
    SLOT_D: tl.constexpr,
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
    HAS_NORM: tl.constexpr,
    CLAMPS: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIGNED_KV: tl.constexpr,
    SHORT_KV: tl.constexpr,
    TMA: tl.constexpr,
    RUNS: tl.constexpr,
):  # fmt: skip
    """Output, natural log-sum-exp, and for backward each row's peak and 1 / total.

    If `has_rest`, for backward also what rounding took from the output.
    """
    i_local, rest = row_and_rest(num_epochs * num_tiles)
    i_tile = num_epochs * num_tiles - 1 - rest
    i_epoch, i_tile = i_tile // num_tiles, i_tile % num_tiles
    i_row = row_0 + i_local
    i_batch, i_head = i_row // HEADS_KV, i_row % HEADS_KV
    plan_row = i_batch * plan_b + i_head * plan_h
    i_list = i_epoch % num_lists  # one for each epoch, or one for all
    first, num, position = epoch_bounds(i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED)
    key_0, num_keys = key_bounds(i_epoch, ptr_epochs, key_len, PACKED)

    row, i_query, i_group = tile_rows(i_tile, GROUP, BLOCK_M)  # [M]
    mask_row = row < num * GROUP
    at = position + i_query
    if CLAMPS:
        at = tl.maximum(at, 0)
    num_words = epoch_len // 32
    word_0 = i_tile * BLOCK_M // GROUP // 32
    num_full, num_old, num_new = 0, 0, 0
    run_0 = key_0
    if i_tile * BLOCK_M < num * GROUP:
        begin = i_tile * BLOCK_M // GROUP
        last = tl.minimum((i_tile * BLOCK_M + BLOCK_M - 1) // GROUP, num - 1)
        if SLOTS == "copied":
            index = plan_row * query_len + first
            num_full, num_old, num_new = tile_blocks(
                ptr_visible, ptr_entered, index + begin, index + last, BLOCK_N
            )
        elif SLOTS == "keys":
            num_full, num_old, num_new = key_blocks(
                position + begin, position + last, num_keys, CLAMPS, HAS_MASK and not ROWS, BLOCK_N
            )
        else:
            ptr_lists += ((plan_row * num_epochs + i_epoch) * num_tiles + i_tile) * (
                num_slots // BLOCK_N + 3
            )
            num_full, num_old = tl.load(ptr_lists), tl.load(ptr_lists + 1)
            if RUNS:
                run_0 = tl.load(ptr_lists + 2)

    offs_head = i_head * GROUP + i_group
    offs_q = row_offsets(first + i_query, sqn, ALIGNED) + row_offsets(offs_head, sqh, ALIGNED)
    q = load_rows(ptr_q + row_offsets(i_batch, sqb, ALIGNED), offs_q, mask_row, D, BLOCK_D, True)
    slot_base = tl.multiple_of((i_local * num_lists + i_list) * num_slots, 128)
    plan_base = tl.multiple_of((plan_row * num_lists + i_list) * num_slots, 128)
    if SLOTS != "keys":
        ptr_key += plan_base
    if SLOTS == "copied":
        ptr_start += plan_base
        ptr_expiry += plan_base
    elif SLOTS == "gathered":
        ptr_bits += plan_base * MEMBERS * num_words
    if SHORT_KV:
        skn, svn = skn.to(tl.int32), svn.to(tl.int32)
    if SLOTS != "copied" and not TMA:
        slots_k += row_offsets(i_batch, skb, ALIGNED_KV) + row_offsets(i_head, skh, ALIGNED_KV)
        slots_v += row_offsets(i_batch, svb, ALIGNED_KV) + row_offsets(i_head, svh, ALIGNED_KV)
    stride_member = 0
    if KEY_BIAS != "none":
        offs_bias, stride_member = bias_offsets(
            i_local, i_list, num_lists, num_slots, key_0, key_len, SLOTS, KEY_BIAS, GROUP
        )
        ptr_slot_bias += offs_bias
    if SHARED:
        # The rows of a query read one row of the bias.
        _, i_query, i_group = tile_rows(i_tile, 1, BLOCK_M // GROUP)
        mask_row = i_query < num
    if PAIR_BIAS:
        ptr_bias += row_offsets(i_batch, sbb, ROWS) + row_offsets(i_head, sbk, ROWS)
        offs = row_offsets(i_group, sbg, ROWS) + row_offsets(first + i_query, sbq, ROWS)
        ptr_bias = ptr_bias + offs[:, None]
    if HAS_MASK:
        ptr_mask += row_offsets(i_batch, smb, ROWS) + row_offsets(i_head, smk, ROWS)
        offs = row_offsets(i_group, smg, ROWS) + row_offsets(first + i_query, smq, ROWS)
        ptr_mask = ptr_mask + offs[:, None]

    if not RUNS:
        runs_k, runs_v = slots_k, slots_v
    is_run = run_0 >= 0

    # 0 * NaN is NaN: only if one came out, keys that nobody in the tile sees are cleared. Behind a
    # run such may lie as well; slots that are gathered hold none.
    peak, total, acc = _walk(
        q, tl.where(is_run, num_full, 0), tl.where(is_run, num_old, 0), num_new, old_slots,
        ptr_lists, at, i_query, i_group, mask_row, i_batch, i_head, runs_k, runs_v, slot_base, skn,
        svn, ptr_key, ptr_start, ptr_expiry, ptr_bits, word_0, num_words, num_slots, run_0,
        num_keys - run_0 + key_0, ptr_slot_bias, ptr_bias, stride_member, sbn, ptr_mask, smn,
        scale, softcap, False, "run" if RUNS else SLOTS, HAS_MASK, ROWS, CLAMPS, MEMBERS, WORDS,
        KEY_BIAS, PAIR_BIAS, HAS_SOFTCAP, D, SLOT_D, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, ALIGNED_KV,
        TMA or RUNS,
    )  # fmt: skip
    if HAS_MASK or RUNS:
        has_nan = tl.max(tl.max((acc != acc).to(tl.int32), 1), 0)
        if (has_nan > 0) | (not is_run):
            peak, total, acc = _walk(
                q, num_full, num_old, num_new, old_slots, ptr_lists, at, i_query, i_group, mask_row,
                i_batch, i_head, slots_k, slots_v, slot_base, skn, svn, ptr_key, ptr_start,
                ptr_expiry, ptr_bits, word_0, num_words, num_slots, key_0, num_keys, ptr_slot_bias,
                ptr_bias, stride_member, sbn, ptr_mask, smn, scale, softcap, HAS_MASK, SLOTS,
                HAS_MASK, ROWS, CLAMPS, MEMBERS, WORDS, KEY_BIAS, PAIR_BIAS, HAS_SOFTCAP, D,
                SLOT_D, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, ALIGNED_KV, TMA,
            )  # fmt: skip

    if SHARED:
        row, i_query, i_group = tile_rows(i_tile, GROUP, BLOCK_M)
        mask_row = row < num * GROUP
    is_empty = total == 0
    # In this order, or ptxas serializes wgmma again.
    acc = acc / tl.where(is_empty, 1.0, total)[:, None]
    lse = (peak + tl.log2(tl.where(is_empty, 1.0, total))) / 1.4426950408889634
    share = 1.0 / tl.where(is_empty, 1.0, total)
    HEADS: tl.constexpr = HEADS_KV * GROUP
    offs_out = ((i_batch * query_len + first + i_query) * HEADS + offs_head) * D
    ptr, block = ptr_out, acc.to(ptr_out.dtype.element_ty)
    lost = (acc - block.to(tl.float32)).to(block.dtype)
    # Once or twice through the same code. A second store after the first one would keep `acc` in
    # registers meanwhile, more than there are.
    for _ in range(1 + has_rest):
        store_rows(ptr, offs_out, mask_row, block, D, BLOCK_D)
        ptr, block = ptr_out_rest, lost
    index = (i_batch * HEADS + offs_head) * query_len + first + i_query
    tl.store(ptr_lse + index, tl.where(is_empty, float("-inf"), lse), mask=mask_row)
    if HAS_NORM:
        # In the order of rows, so that backward reads those of a tile at once. Two numbers: beside
        # a bias near the largest fp32 the logarithm of the total is lost.
        index = (i_row * query_len + first) * GROUP + row
        tl.store(ptr_peak + index, tl.where(is_empty, float("inf"), peak), mask=mask_row)
        tl.store(ptr_share + index, tl.where(is_empty, 0.0, share), mask=mask_row)


def forward(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    *,
    with_norm: bool = False,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Attention over the slots of a plan.

    Args:
        plan: Of the call's selection; reusable.
        query: fp16 or bf16 ``[B, Q, H, D]``, packed calls with batch 1; the last stride is 1.
        key: ``[B, K, Hkv, D]``.
        value: ``[B, K, Hkv, D]``.
        call: Scale, softcap and bias.
        with_norm: Also return what `backward` needs: `norm` and `out_rest`.
        config: Tile sizes of this kernel; default from the table, or the kernel of
            `gluon_forward.py` where that serves the call.

    Returns:
        ``out [B, Q, H, D]``, ``lse`` fp32 ``[B, H, Q]``, and for `backward` alone ``norm``, fp32
        ``[2, B, H, Q]``, and ``out_rest``, what rounding took from ``out``, in its shape and dtype.
        ``None`` for those not asked for; ``out_rest`` is of small outputs only.
    """
    batch, query_len, num_heads, head_dim = query.shape
    heads_kv = key.shape[2]
    group = num_heads // heads_kv
    roles = None
    if config is None and plan.is_selection:
        roles = roles_for(architecture_of(query.device), head_dim)
    if roles is not None:
        from .gluon_forward import gluon_forward  # only where its version of Triton is installed

        served = gluon_forward(plan, query, key, value, call, roles.forward, with_norm=with_norm)
        if served is not None:
            return served
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_heads, query_len, dtype=torch.float32, device=query.device)
    norm = peak = share = out_rest = None
    if with_norm:
        out_rest = torch.empty_like(out) if keeps_rest(out) else None
        norm = torch.empty(2, *lse.shape, dtype=torch.float32, device=query.device)
        peak, share = norm[0], norm[1]
    if config is None:
        reads_pairs = bool(pair_tensors(plan, call))
        tiles = tiles_for(architecture_of(query.device), head_dim, reads_pairs)
        config = tiles.forward_of(plan.slots, batch * query_len * num_heads)
    num_tiles = triton.cdiv(plan.epoch_len * group, config.block_m)
    lists = tile_lists(plan, group, config.block_m, config.block_n)
    uses_tma = uses_descriptors(plan, key, value, config)
    runs = run_sources(plan, key, value, call, config)
    for now in slot_chunks(plan, range(batch * heads_kv), query, key):
        slots = slots_of(plan, key, value, call.bias, now)
        launch(forward_kernel, len(now) * plan.num_epochs * num_tiles)(
            query, *slots.sources(config.block_n, uses_tma), *runs, out,
            *rest_arguments(out, out_rest), lse, peak, share, plan.slot_key, plan.slot_start,
            plan.slot_expiry, plan.visible, plan.entered, plan.epochs, plan.slot_bits, lists,
            plan.mask, slots.bias, call.bias_tensor, *call.factors, query_len, plan.key_len,
            plan.epoch_len, plan.num_epochs, plan.num_lists, num_tiles, plan.old_slots,
            plan.num_slots, now.start, *plan.row_strides(heads_kv), *query.stride()[:3],
            *key.stride()[:3], *value.stride()[:3], *call.bias_strides,
            *mask_strides(plan, heads_kv, group), HEADS_KV=heads_kv, GROUP=group, D=head_dim,
            SLOT_D=slot_dim(head_dim), BLOCK_D=padded_head_dim(head_dim), BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, STAGES=config.num_stages, **plan_flags(plan),
            ROWS=has_rows(plan, call), SHARED=shares_bias(plan, call, config.block_m, group),
            WORDS=words_of_tile(config.block_m, group), **call.flags, HAS_NORM=with_norm,
            PACKED=plan.epochs is not None, ALIGNED=is_aligned(query),
            ALIGNED_KV=is_aligned(key, value), SHORT_KV=are_short(key, value), TMA=uses_tma,
            RUNS=bool(runs[0]), **config.options,
        )  # fmt: skip
    return out, lse, norm, out_rest
