"""dQ over epochs: a query tile walks the slots of its epoch as in forward and owns its gradient.

It also computes ``delta = rowsum(dO * O)``, which the gradients of keys need, and what the gradient
of a bias that depends on the query is summed from, see `grad_pair.py`. Grid and symbols as in
`forward.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from .block_lists import tile_lists
from .config import TileConfig, padded_head_dim
from .inputs import (
    Call,
    Saved,
    are_short,
    has_rows,
    is_aligned,
    mask_strides,
    plan_flags,
    rest_arguments,
    shares_bias,
    words_of_tile,
)
from .launch import launch
from .slots import run_sources, slot_chunks, slot_dim, slots_of, uses_descriptors
from .tiles import (
    NUMBERS,
    bias_offsets,
    epoch_bounds,
    for_heads,
    gathered_bias,
    hide,
    key_blocks,
    key_bounds,
    last_key,
    load_grads,
    load_out,
    load_rows,
    load_slots,
    log2_bias,
    near_rows,
    row_and_rest,
    row_offsets,
    scaled_scores,
    slot_intervals,
    slot_keys,
    store_rows,
    tile_blocks,
    tile_rows,
    where_negative,
)

_INF = tl.constexpr(float("inf"))


@triton.jit
def _add_block(
    q, grad, peak, share, delta, acc, pair, block, following, is_one, at, i_query, i_group,
    mask_row, i_batch, i_head, slots_k, slots_v, slot_base, skn, svn, ptr_key, ptr_start,
    ptr_expiry, ptr_bits, word_0, num_words, num_slots, key_0, num_keys, ptr_slot_bias, ptr_bias,
    ptr_pairs, stride_member, sbn, ptr_mask, smn, scale, softcap,
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
    PAIR_GRAD: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    SLOT_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED_KV: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one block of slots to dQ, and store the gradient of its scores.

    `pair`, `following` and `is_one` as in `forward.py`. On demand keys that no row of the tile sees
    count as 0: such may hold anything.
    """
    FETCHED: tl.constexpr = PAIR_BIAS and SLOTS == "gathered"
    LISTED: tl.constexpr = SLOTS == "gathered" or SLOTS == "run"
    HIDES: tl.constexpr = (MASKED or (HAS_MASK and ROWS)) and not FETCHED
    slot = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    key = slot
    if SLOTS != "copied" or PAIR_BIAS:
        key = slot_keys(ptr_key, slot, key_0, num_keys, SLOTS)
    if HIDES and MASKED and not LISTED:
        if SLOTS == "keys":
            last = last_key(at, num_keys, CLAMPS)[:, None]
            sees = slot[None, :] <= last
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
    k = load_slots(
        slots_k, slot_base, block, key, key_0, i_batch, i_head, skn, SLOTS, D, SLOT_D, BLOCK_N,
        BLOCK_D, ALIGNED_KV, TMA, MASKED,
    )  # [N, D]  # fmt: skip
    v = load_slots(
        slots_v, slot_base, block, key, key_0, i_batch, i_head, svn, SLOTS, D, SLOT_D, BLOCK_N,
        BLOCK_D, ALIGNED_KV, TMA, MASKED,
    )  # [N, D]  # fmt: skip
    if HIDES and CLEARS:
        k = tl.where((tl.max(sees.to(tl.int32), 0) > 0)[:, None], k, 0.0)
    scores, tanh = scaled_scores(tl.dot(q, tl.trans(k)), scale, softcap, HAS_SOFTCAP)  # [M, N]
    if KEY_BIAS == "kv head":
        scores += tl.load(ptr_slot_bias + slot)[None, :]
    elif KEY_BIAS == "head":
        offs = i_group.to(tl.int64) * stride_member
        scores += tl.load(ptr_slot_bias + offs[:, None] + slot[None, :])
    if FETCHED:
        read = for_heads(pair, scores.shape[0] // pair.shape[0], False)
        scores = tl.where(read == -_INF, -_INF, scores + log2_bias(read))
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
    elif HIDES and SLOTS == "keys" and not HAS_MASK:
        scores = where_negative(slot[None, :] - last - 1, scores)
    elif HIDES:
        scores = tl.where(sees, scores, -_INF)
    probs = tl.exp2(scores - peak[:, None])  # times the row's share
    if PAIR_GRAD != "none":
        probs = tl.where(scores == -_INF, 0.0, probs)  # also of rows that hold NaN
    products = tl.dot(grad, tl.trans(v))
    grad_scores = probs * (products * share[:, None] - delta[:, None])  # [M, N]
    if HAS_MASK and HIDES:
        grad_scores = tl.where(sees, grad_scores, 0.0)  # a hidden value may hold NaN
    if PAIR_GRAD != "none":
        pairs = tl.where(probs == 0.0, 0.0, grad_scores)  # a hidden value may hold NaN
        if PAIR_GRAD == "group":
            # The heads of a query lie side by side.
            pairs = tl.sum(pairs.reshape(pairs.shape[0] // GROUP, GROUP, BLOCK_N), 1)
        tl.store(ptr_pairs + (slot * pairs.shape[0])[None, :], pairs.to(ptr_pairs.dtype.element_ty))
    if HAS_SOFTCAP:
        grad_scores *= 1.0 - tanh * tanh
    return tl.dot(grad_scores.to(k.dtype), k, acc), pair


@triton.jit
def _walk(
    q, grad, peak, share, delta, num_full, num_old, num_new, old_slots, ptr_lists, at, i_query,
    i_group, mask_row, i_batch, i_head, slots_k, slots_v, slot_base, skn, svn, ptr_key, ptr_start,
    ptr_expiry, ptr_bits, word_0, num_words, num_slots, key_0, num_keys, ptr_slot_bias, ptr_bias,
    ptr_pairs, stride_member, sbn, ptr_mask, smn, scale, softcap,
    CLEARS: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    CLAMPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    WORDS: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    PAIR_BIAS: tl.constexpr,
    PAIR_GRAD: tl.constexpr,
    GROUP: tl.constexpr,
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
    """Add the contributions of all blocks of a tile. Returns dQ before its scale."""
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    LISTED: tl.constexpr = SLOTS == "gathered" or SLOTS == "run"
    # The conditions keep wgmma asynchronous, see `forward.py`.
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
            acc, pair = _add_block(
                q, grad, peak, share, delta, acc, pair, block, following, i + 1 < num_full, at,
                i_query, i_group, mask_row, i_batch, i_head, slots_k, slots_v, slot_base, skn, svn,
                ptr_key, ptr_start, ptr_expiry, ptr_bits, word_0, num_words, num_slots, key_0,
                num_keys, ptr_slot_bias, ptr_bias, ptr_pairs, stride_member, sbn, ptr_mask,
                smn, scale, softcap, False, CLEARS, SLOTS, HAS_MASK, ROWS, CLAMPS, MEMBERS, WORDS,
                KEY_BIAS, PAIR_BIAS, PAIR_GRAD, GROUP, HAS_SOFTCAP, D, SLOT_D, BLOCK_N, BLOCK_D,
                ALIGNED_KV, TMA,
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
                following = tl.load(ptr_lists + 3 + tl.minimum(num_full + i + 1, num_old - 1))
            else:
                block = tl.where(i < num_border, num_full + i, new_block + i)
                following = block
            acc, pair = _add_block(
                q, grad, peak, share, delta, acc, pair, block, following, i + 1 < num_border, at,
                i_query, i_group, mask_row, i_batch, i_head, slots_k, slots_v, slot_base, skn, svn,
                ptr_key, ptr_start, ptr_expiry, ptr_bits, word_0, num_words, num_slots, key_0,
                num_keys, ptr_slot_bias, ptr_bias, ptr_pairs, stride_member, sbn, ptr_mask,
                smn, scale, softcap, True, CLEARS, SLOTS, HAS_MASK, ROWS, CLAMPS, MEMBERS, WORDS,
                KEY_BIAS, PAIR_BIAS, PAIR_GRAD, GROUP, HAS_SOFTCAP, D, SLOT_D, BLOCK_N, BLOCK_D,
                ALIGNED_KV, TMA,
            )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=NUMBERS)
def grad_query_kernel(
    ptr_q, slots_k, slots_v, runs_k, runs_v, ptr_out, ptr_out_rest, has_rest, ptr_grad, ptr_peak,
    ptr_share, ptr_delta, ptr_grad_q, ptr_pairs, ptr_key, ptr_start, ptr_expiry, ptr_visible,
    ptr_entered, ptr_epochs, ptr_bits, ptr_lists, ptr_mask, ptr_slot_bias, ptr_bias, scale, softcap,
    softmax_scale, query_len, key_len, epoch_len, num_epochs, num_lists, num_tiles, tile_0, num_now,
    old_slots, num_slots, row_0, plan_b, plan_h,
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
    PAIR_GRAD: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_QUERY: tl.constexpr,
    CLAMPS: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIGNED_KV: tl.constexpr,
    SHORT_KV: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    TMA: tl.constexpr,
    RUNS: tl.constexpr,
):  # fmt: skip
    """One program per (row, epoch, tile): dQ, delta, and the gradient of the scores of pairs."""
    i_local, rest = row_and_rest(num_now)
    i_now = num_now - 1 - rest
    i_epoch, i_tile = (tile_0 + i_now) // num_tiles, (tile_0 + i_now) % num_tiles
    i_row = row_0 + i_local
    i_batch, i_head = i_row // HEADS_KV, i_row % HEADS_KV
    plan_row = i_batch * plan_b + i_head * plan_h
    i_list = i_epoch % num_lists
    first, num, position = epoch_bounds(i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED)
    key_0, num_keys = key_bounds(i_epoch, ptr_epochs, key_len, PACKED)

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
    out = load_out(ptr_out, ptr_out_rest, has_rest, offs_out, mask_row, D, BLOCK_D)  # [M, D]
    delta = tl.sum(out * grad.to(tl.float32), 1)  # [M]
    index = (i_row * query_len + first) * GROUP + row
    tl.store(ptr_delta + index, delta, mask=mask_row)

    if NEEDS_QUERY or PAIR_GRAD != "none":
        # Rows past the end of the epoch have no probability.
        peak = tl.load(ptr_peak + index, mask=mask_row, other=_INF)
        share = tl.load(ptr_share + index, mask=mask_row, other=0.0)
        delta *= share
        at = position + i_query
        if CLAMPS:
            at = tl.maximum(at, 0)
        num_words, word_0 = epoch_len // 32, i_tile * BLOCK_M // GROUP // 32
        num_full, num_old, num_new = 0, 0, 0
        run_0 = key_0
        if i_tile * BLOCK_M < num * GROUP:
            begin = i_tile * BLOCK_M // GROUP
            last = tl.minimum((i_tile * BLOCK_M + BLOCK_M - 1) // GROUP, num - 1)
            if SLOTS == "copied":
                i_q = plan_row * query_len + first
                num_full, num_old, num_new = tile_blocks(
                    ptr_visible, ptr_entered, i_q + begin, i_q + last, BLOCK_N
                )
            elif SLOTS == "keys":
                num_full, num_old, num_new = key_blocks(
                    position + begin, position + last, num_keys, CLAMPS, HAS_MASK and not ROWS,
                    BLOCK_N,
                )  # fmt: skip
            else:
                i_list_of_tile = (plan_row * num_epochs + i_epoch) * num_tiles + i_tile
                ptr_lists += i_list_of_tile * (num_slots // BLOCK_N + 3)
                num_full, num_old = tl.load(ptr_lists), tl.load(ptr_lists + 1)
                if RUNS:
                    run_0 = tl.load(ptr_lists + 2)
        offs_q = row_offsets(first + i_query, sqn, ALIGNED) + row_offsets(offs_head, sqh, ALIGNED)
        ptr_q += row_offsets(i_batch, sqb, ALIGNED)
        q = load_rows(ptr_q, offs_q, mask_row, D, BLOCK_D, True)
        grad = grad.to(q.dtype)
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
        if PAIR_GRAD != "none":
            TILE: tl.constexpr = BLOCK_M // GROUP if PAIR_GRAD == "group" else BLOCK_M
            slot_0 = (i_local * num_now + i_now) * num_slots
            ptr_pairs = ptr_pairs + slot_0 * TILE + tl.arange(0, TILE)[:, None]

        if not RUNS:
            runs_k, runs_v = slots_k, slots_v
        is_run = run_0 >= 0
        # As in `forward.py`: keys that nobody in the tile sees are cleared only if NaN came out.
        acc = _walk(
            q, grad, peak, share, delta, tl.where(is_run, num_full, 0),
            tl.where(is_run, num_old, 0), num_new, old_slots, ptr_lists, at, i_query, i_group,
            mask_row, i_batch, i_head, runs_k, runs_v, slot_base, skn, svn, ptr_key, ptr_start,
            ptr_expiry, ptr_bits, word_0, num_words, num_slots, run_0, num_keys - run_0 + key_0,
            ptr_slot_bias, ptr_bias, ptr_pairs, stride_member, sbn, ptr_mask, smn, scale,
            softcap, False, "run" if RUNS else SLOTS, HAS_MASK, ROWS, CLAMPS, MEMBERS, WORDS,
            KEY_BIAS, PAIR_BIAS, PAIR_GRAD, GROUP, HAS_SOFTCAP, D, SLOT_D, BLOCK_M, BLOCK_N,
            BLOCK_D, STAGES, ALIGNED_KV, TMA or RUNS,
        )  # fmt: skip
        if HAS_MASK or RUNS:
            has_nan = tl.max(tl.max((acc != acc).to(tl.int32), 1), 0)
            if (has_nan > 0) | (not is_run):
                acc = _walk(
                    q, grad, peak, share, delta, num_full, num_old, num_new, old_slots, ptr_lists,
                    at, i_query, i_group, mask_row, i_batch, i_head, slots_k, slots_v, slot_base,
                    skn, svn, ptr_key, ptr_start, ptr_expiry, ptr_bits, word_0, num_words,
                    num_slots, key_0, num_keys, ptr_slot_bias, ptr_bias, ptr_pairs, stride_member,
                    sbn, ptr_mask, smn, scale, softcap, HAS_MASK, SLOTS, HAS_MASK, ROWS,
                    CLAMPS, MEMBERS, WORDS, KEY_BIAS, PAIR_BIAS, PAIR_GRAD, GROUP, HAS_SOFTCAP, D,
                    SLOT_D, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, ALIGNED_KV, TMA,
                )  # fmt: skip
        if NEEDS_QUERY:
            store_rows(ptr_grad_q, offs_out, row < num * GROUP, acc * softmax_scale, D, BLOCK_D)


def num_query_tiles(plan: Plan, saved: Saved, config: TileConfig) -> int:
    """Query tiles of an epoch."""
    return triton.cdiv(plan.epoch_len * saved.group, config.block_m)


def run_grad_query(
    plan: Plan,
    saved: Saved,
    call: Call,
    config: TileConfig,
    grad_query: Tensor | None,
    pairs: Tensor | None = None,
    pair_grad: str = "none",
    tiles: range | None = None,
) -> Tensor | None:
    """Fill delta, `grad_query` and `pairs`, for all query tiles or some.

    Returns the per-key bias in the order of slots, see `Slots`, if it was copied for all rows.

    Args:
        plan, saved, call: Of the call.
        config: Tile sizes.
        grad_query: ``[B, Q, H, D]``, contiguous, or ``None`` if it is not asked for.
        pairs: ``[B * Hkv, tiles, P, rows]`` for the gradient of the scores of each slot, or
            ``None``. Blocks of slots that a tile does not see are not written.
        pair_grad: ``"head"``: `block_m` rows of a tile; ``"group"``: of queries, summed over heads.
        tiles: Numbers of tiles, those of all epochs one after the other; default all.
    """
    query, key, value = saved.query, saved.key, saved.value
    heads_kv, head_dim, group = key.shape[2], key.shape[3], saved.group
    num_tiles = num_query_tiles(plan, saved, config)
    tiles = tiles or range(plan.num_epochs * num_tiles)
    lists = tile_lists(plan, group, config.block_m, config.block_n)
    uses_tma = uses_descriptors(plan, key, value, config)
    runs = run_sources(plan, key, value, call, config)
    chunks = [saved.rows] if pairs is not None else slot_chunks(plan, saved.rows, query, key)
    for now in chunks:
        walks = grad_query is not None or pairs is not None
        slots = slots_of(plan, key, value, call.bias, now, with_rows=walks)
        sources = slots.sources(config.block_n, uses_tma) if walks else (None, None)
        launch(grad_query_kernel, len(now) * len(tiles))(
            query, *sources, *runs, saved.out, *rest_arguments(saved.out, saved.out_rest),
            saved.grad_out, *saved.norm, saved.delta, grad_query, pairs, plan.slot_key,
            plan.slot_start, plan.slot_expiry, plan.visible, plan.entered, plan.epochs,
            plan.slot_bits, lists, plan.mask, slots.bias, call.bias_tensor, *call.factors,
            call.softmax_scale, query.shape[1], plan.key_len, plan.epoch_len, plan.num_epochs,
            plan.num_lists, num_tiles, tiles.start, len(tiles), plan.old_slots, plan.num_slots,
            now.start, *plan.row_strides(heads_kv), *query.stride()[:3], *key.stride()[:3],
            *value.stride()[:3], *saved.grad_out.stride(), *call.bias_strides,
            *mask_strides(plan, heads_kv, group), HEADS_KV=heads_kv, GROUP=group, D=head_dim,
            SLOT_D=slot_dim(head_dim), BLOCK_D=padded_head_dim(head_dim), BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, STAGES=config.num_stages, **plan_flags(plan),
            ROWS=has_rows(plan, call), SHARED=shares_bias(plan, call, config.block_m, group),
            WORDS=words_of_tile(config.block_m, group), **call.flags, PAIR_GRAD=pair_grad,
            NEEDS_QUERY=grad_query is not None, PACKED=plan.epochs is not None,
            ALIGNED=is_aligned(query), ALIGNED_KV=is_aligned(key, value),
            SHORT_KV=are_short(key, value), GRAD_ALIGNED=is_aligned(saved.grad_out), TMA=uses_tma,
            RUNS=bool(runs[0]), **config.options,
        )  # fmt: skip
    return slots.bias if len(chunks) == 1 and slots.are_copies else None
