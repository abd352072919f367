"""Attention of a few queries over many keys: the keys split over programs, and the parts combined.

Rows are the (query, head) pairs of one KV head, as in `tiles`. A first kernel lets every split of
the keys of a row attend on its own and leaves an accumulator, its peak and its total; a second one
adds them in a fixed order. The number of splits follows from shapes, never from lengths on the
device, so that captured graphs stay valid.

Where a mask or a selection hides keys, a split first lists those that any of its rows sees, and
then reads these alone: keys and values cost what is visible.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .append import row_scale, to_fp8
from .survivors import (
    NOTES,
    commit_token,
    keeps_slots,
    keeps_token,
    load_token,
    no_notes,
    note_slots,
    rank_keys,
    store_notes,
)
from .tiles import LOWEST, load_rows, log2_bias, scaled_scores, softmax_update, tile_rows

TURN = 64
"""Neighbouring keys that a split lists before it is the next one's turn: a window of visible keys
is spread over all splits."""
_TURN = tl.constexpr(TURN)
_LN2 = tl.constexpr(0.6931471805599453)

_INTS = (
    "key_len", "num_pages", "max_pages", "list_len", "window_size", "keep_first", "keep_recent",
)  # fmt: skip


@triton.jit
def _list_keys(
    ptr_list, ptr_mask, ptr_bias, ptr_start, ptr_expiry, i_split, i_tile, length, query_len,
    smg, smq, smn, sbg, sbq, sbn,
    MASK: tl.constexpr, BIAS: tl.constexpr, INTERVALS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """List the keys that any row of the tile sees, in order of position; returns their number."""
    first = i_tile * BLOCK_M
    last = tl.minimum(first + BLOCK_M, query_len * GROUP) - 1
    low, high = length - query_len + first // GROUP, length - query_len + last // GROUP
    count = 0
    own = tl.cdiv(tl.cdiv(length, _TURN), SPLITS) * _TURN
    for i in range(0, own, SCAN):
        index = i + tl.arange(0, SCAN)
        key = ((index // _TURN) * SPLITS + i_split) * _TURN + index % _TURN
        seen = (index < own) & (key < length)
        if IS_CAUSAL:
            seen = seen & (key <= high)
        if INTERVALS:
            start = key
            if not IS_CAUSAL:
                start = tl.load(ptr_start + key, mask=seen, other=0)
                low, high = tl.maximum(low, 0), tl.maximum(high, 0)
            expiry = tl.load(ptr_expiry + key, mask=seen, other=0)
            seen = seen & (tl.maximum(start, low) <= tl.minimum(expiry - 1, high))
        offs_key = key.to(tl.int64)
        shown = seen  # neither load waits for the other
        if MASK == "shared":
            shown = shown & (tl.load(ptr_mask + offs_key * smn, mask=seen, other=0) != 0)
        if BIAS == "shared":
            bias = tl.load(ptr_bias + offs_key * sbn, mask=seen, other=0.0)
            shown = shown & (bias != float("-inf"))
        seen = shown
        if MASK == "rows" or BIAS == "rows":
            some = index < 0
            for row in range(first, last + 1):
                i_query, i_group = tl.cast(row // GROUP, tl.int64), tl.cast(row % GROUP, tl.int64)
                at = length - query_len + row // GROUP
                sees = seen
                if IS_CAUSAL:
                    sees = sees & (key <= at)
                else:
                    at = tl.maximum(at, 0)
                if INTERVALS:
                    sees = sees & (start <= at) & (at < expiry)
                if MASK == "rows":
                    ptrs = ptr_mask + (i_query * smq + i_group * smg) + offs_key * smn
                    sees = sees & (tl.load(ptrs, mask=sees, other=0) != 0)
                if BIAS == "rows":
                    ptrs = ptr_bias + (i_query * sbq + i_group * sbg) + offs_key * sbn
                    sees = sees & (tl.load(ptrs, mask=sees, other=0.0) != float("-inf"))
                some = some | sees
            seen = some
        listed = seen.to(tl.int32)
        place = count + tl.cumsum(listed, 0) - listed
        tl.store(ptr_list + place, key, mask=seen)
        count += tl.sum(listed, 0)
    # What one thread has listed, others read.
    tl.debug_barrier()
    return count


@triton.jit
def _offsets(page, place, stride_page, stride_key, PAGE: tl.constexpr):
    """Offsets of keys at `place` in their pages, or without pages in their sequence."""
    if PAGE == 0:
        return place * stride_key
    else:
        return page * stride_page + place * stride_key


@triton.jit
def _halves(pairs, UNPACKS: tl.constexpr):
    """The first and the second e4m3 of every 16 bits, as fp16, which holds them exactly.

    `UNPACKS`: with the instructions of capability 8.9, two for two numbers. Triton's own casts take
    twice as many.
    """
    if UNPACKS:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes;
            .reg .b16 two, none;
            prmt.b32 bytes, $2, 0, 0x4420;
            mov.b32 {two, none}, bytes;
            cvt.rn.f16x2.e4m3x2 $0, two;
            prmt.b32 bytes, $2, 0, 0x4431;
            mov.b32 {two, none}, bytes;
            cvt.rn.f16x2.e4m3x2 $1, two;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        first = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        second = ((pairs >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        return first, second


@triton.jit
def _cleared(rows, visible, UNPACKS: tl.constexpr):
    """Zeros in rows where `visible` is False: they may hold anything, and 0 * NaN is NaN.

    `UNPACKS`: rows of 16 bits, two numbers at a time.
    """
    if UNPACKS:
        bits = tl.broadcast_to((-visible.to(tl.int16))[:, None], rows.shape)
        bits = tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;",
            "=r,r,r",
            [rows.to(tl.int16, bitcast=True), bits],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
        return bits.to(rows.dtype, bitcast=True)
    else:
        return tl.where(visible[:, None], rows, tl.zeros_like(rows))


@triton.jit
def _in_range(q, unit):
    """Queries as fp16, over the power of two that brings them into its range."""
    return (q.to(tl.float32) / unit[:, None]).to(tl.float16)


@triton.jit(do_not_specialize=_INTS)
def split_kernel(
    ptr_q, ptr_k, ptr_v, ptr_part, ptr_stat, ptr_out, ptr_lse, ptr_length, ptr_table, ptr_list,
    ptr_mask, ptr_bias, ptr_start, ptr_expiry, ptr_k_scale, ptr_v_scale, ptr_position,
    ptr_threshold, ptr_new_score, ptr_real, ptr_seen, ptr_note,
    scale, softcap, query_len, key_len, num_pages, max_pages, list_len, keep_first, keep_recent,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh, smb, smk, smg, smq, smn, sbb, sbk, sbg, sbq, sbn,
    sxb, sxn, sxh, syb, syn, syh,
    HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    SCAN: tl.constexpr,
    PAGE: tl.constexpr,
    MASK: tl.constexpr,
    BIAS: tl.constexpr,
    INTERVALS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    KEEPS: tl.constexpr,
    UNPACKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One split of the keys of one row tile; where it is the only one, the result."""
    i_program = tl.program_id(0)
    num_rows = query_len * GROUP
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    i_tile = i_program % num_tiles
    i_split = (i_program // num_tiles) % SPLITS
    i_row = (i_program // (num_tiles * SPLITS)).to(tl.int64)
    i_batch, i_head = i_row // HEADS_KV, i_row % HEADS_KV
    LISTS: tl.constexpr = MASK != "none" or INTERVALS
    WINDOW: tl.constexpr = ptr_note is not None
    SCALED: tl.constexpr = ptr_k_scale is not None
    # Keys and values of 8 bits come in pairs, so that all else is as with 16: even and odd columns
    # are products of their own.
    PAIRS: tl.constexpr = ptr_k.dtype.element_ty == tl.int16

    row, i_query, i_group = tile_rows(i_tile, GROUP, BLOCK_M)  # [M]
    mask_row = row < num_rows
    offs_q = i_query.to(tl.int64) * sqn + (i_head * GROUP + i_group) * sqh
    ptr_q += i_batch * sqb
    COLUMNS: tl.constexpr = D // 2 if PAIRS else D
    BLOCK: tl.constexpr = BLOCK_D // 2 if PAIRS else BLOCK_D
    offs_d = tl.arange(0, BLOCK)
    if PAIRS:
        ptrs = ptr_q + offs_q[:, None] + 2 * offs_d[None, :]
        mask = mask_row[:, None] & (offs_d < COLUMNS)[None, :]
        q, q_odd = tl.load(ptrs, mask=mask, other=0.0), tl.load(ptrs + 1, mask=mask, other=0.0)
        largest = tl.maximum(tl.max(tl.abs(q), 1), tl.max(tl.abs(q_odd), 1)).to(tl.float32)  # [M]
        unit = tl.exp2(tl.floor(tl.log2(tl.maximum(largest, 1e-30))))
        q, q_odd = _in_range(q, unit), _in_range(q_odd, unit)
    else:
        q = load_rows(ptr_q, offs_q, mask_row, D, BLOCK_D, True)  # [M, D]
    length = key_len
    if ptr_length is not None:
        length = tl.minimum(tl.maximum(tl.load(ptr_length + i_batch), 0), key_len)
    at = length - query_len + i_query

    i_base = i_batch if PAGE == 0 else 0
    ptr_k += i_base * skb + i_head * skh
    ptr_v += i_base * svb + i_head * svh
    if SCALED:
        ptr_k_scale += i_base * sxb + i_head * sxh
        ptr_v_scale += i_base * syb + i_head * syh
    if PAGE != 0:
        ptr_table += i_batch * max_pages
    if MASK != "none":
        ptr_mask += i_batch * smb + i_head * smk
    if BIAS != "none":
        ptr_bias += i_batch * sbb + i_head * sbk
    if INTERVALS:
        ptr_start += i_row * key_len
        ptr_expiry += i_row * key_len
    if LISTS:
        ptr_list += i_program.to(tl.int64) * list_len
        begin = 0
        end = _list_keys(
            ptr_list, ptr_mask, ptr_bias, ptr_start, ptr_expiry, i_split, i_tile, length, query_len,
            smg, smq, smn, sbg, sbq, sbn, MASK, BIAS, INTERVALS, IS_CAUSAL, GROUP, BLOCK_M, SPLITS,
            SCAN,
        )  # fmt: skip
    else:
        own = tl.cdiv(tl.cdiv(length, BLOCK_N), SPLITS) * BLOCK_N
        begin = i_split * own
        end = tl.minimum(begin + own, length)
    if WINDOW:
        ptr_position += i_row * key_len
        seen = tl.load(ptr_seen + i_batch)
        token, _score, real = load_token(ptr_new_score, ptr_real, seen, i_row, i_batch)
        threshold = tl.load(ptr_threshold + i_row)
        above, free, first_lost, last_lost = no_notes(BLOCK_N)

    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    if PAIRS:
        acc_odd = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        index = n + tl.arange(0, BLOCK_N)  # [N]
        inside = index < end
        key = index
        if LISTS:
            key = tl.load(ptr_list + index, mask=inside, other=0)
        place, page = key.to(tl.int64), 0
        if PAGE != 0:
            place = place % PAGE
            if LISTS or PAGE % BLOCK_N != 0:
                page = tl.load(ptr_table + key // PAGE, mask=inside, other=0)
            else:
                page = tl.load(ptr_table + n // PAGE)
            # A page that does not exist has no keys: foreign memory is never read.
            inside = inside & (page >= 0) & (page < num_pages)
            page = page.to(tl.int64)

        offs = _offsets(page, place, skb, skn, PAGE)
        k = load_rows(ptr_k, offs, inside, COLUMNS, BLOCK, True)  # [N, D]
        if PAIRS:
            k, k_odd = _halves(k, UNPACKS)
            product = tl.dot(q_odd, tl.trans(k_odd), tl.dot(q, tl.trans(k))) * unit[:, None]
        else:
            product = tl.dot(q, tl.trans(k))  # [M, N]
        if SCALED:
            offs = _offsets(page, place, sxb, sxn, PAGE)
            product *= tl.load(ptr_k_scale + offs, mask=inside, other=0.0)[None, :]
        scores, _tanh = scaled_scores(product, scale, softcap, HAS_SOFTCAP)
        offs_key = key.to(tl.int64)
        sees, visible = inside[None, :], inside  # to a row, and to any row
        if BIAS == "shared":
            bias = tl.load(ptr_bias + offs_key * sbn, mask=inside, other=0.0)
            scores += log2_bias(bias)[None, :]
            visible = visible & (bias != float("-inf"))
        elif BIAS == "rows":
            offs_row = (i_query.to(tl.int64) * sbq + i_group.to(tl.int64) * sbg)[:, None]
            ptrs = ptr_bias + offs_row + (offs_key * sbn)[None, :]
            bias = log2_bias(tl.load(ptrs, mask=mask_row[:, None] & sees, other=float("-inf")))
            scores = tl.where(bias == float("-inf"), bias, scores + bias)
        if MASK == "rows":
            offs_row = (i_query.to(tl.int64) * smq + i_group.to(tl.int64) * smg)[:, None]
            ptrs = ptr_mask + offs_row + (offs_key * smn)[None, :]
            sees = sees & (tl.load(ptrs, mask=mask_row[:, None] & sees, other=0) != 0)
        if IS_CAUSAL:
            sees = sees & (key[None, :] <= at[:, None])
        if INTERVALS:
            expiry = tl.load(ptr_expiry + key, mask=inside, other=0)
            if IS_CAUSAL:
                sees = sees & (at[:, None] < expiry[None, :])
            else:
                start = tl.load(ptr_start + key, mask=inside, other=0)
                begun = tl.maximum(at, 0)[:, None]
                sees = sees & (start[None, :] <= begun) & (begun < expiry[None, :])
        if WINDOW:
            position = tl.load(ptr_position + key, mask=inside, other=-1)
            rank = rank_keys(bias, position)
            kept = keeps_slots(
                rank, position, token, seen + real, threshold, keep_first, keep_recent, KEEPS
            )
            above, free, first_lost, last_lost = note_slots(
                above, free, first_lost, last_lost, key, inside, rank, position, kept, threshold
            )
            visible = visible & kept
        scores = tl.where(sees & visible[None, :], scores, float("-inf"))
        if BIAS == "rows" and not LISTS:
            visible = tl.max(scores, 0) != float("-inf")

        probs, factor, peak, total = softmax_update(scores, peak, total)
        if SCALED:
            offs = _offsets(page, place, syb, syn, PAGE)
            v_scale = tl.load(ptr_v_scale + offs, mask=inside, other=0.0)
            probs *= tl.where(visible, v_scale, 0.0)[None, :]
        offs = _offsets(page, place, svb, svn, PAGE)
        v = load_rows(ptr_v, offs, inside, COLUMNS, BLOCK, True)  # [N, D]
        # All that is listed is visible. Wide rows of 8 bits stay: to clear them takes another copy
        # of the block in shared memory, more than GPUs of capability 8.9 and 12.0 have.
        if BIAS != "none" and not LISTS and not (PAIRS and BLOCK_D > 128):
            v = _cleared(v, visible, UNPACKS)
        probs = probs.to(q.dtype)
        if PAIRS:
            v, v_odd = _halves(v, UNPACKS)
            acc_odd = tl.dot(probs, v_odd, acc_odd * factor[:, None])
        acc = tl.dot(probs, v, acc * factor[:, None])
    if PAIRS:
        acc = tl.interleave(acc, acc_odd)
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_row[:, None] & (offs_d < D)[None, :]

    if SPLITS > 1 or WINDOW:
        index = (i_row * num_rows + row) * SPLITS + i_split
        tl.store(ptr_part + index[:, None] * D + offs_d[None, :], acc, mask=mask)
        tl.store(ptr_stat + index * 2, peak, mask=mask_row)
        tl.store(ptr_stat + index * 2 + 1, total, mask=mask_row)
        if WINDOW:
            # Tiles of one row note the same.
            ptr_note += (i_row * SPLITS + i_split) * NOTES
            store_notes(ptr_note, above, free, first_lost, last_lost, threshold, seen)
    else:
        norm = tl.where(total == 0, 1.0, total)
        index = (i_batch * query_len + i_query) * (HEADS_KV * GROUP) + i_head * GROUP + i_group
        out = (acc / norm[:, None]).to(ptr_out.dtype.element_ty)
        tl.store(ptr_out + index[:, None] * D + offs_d[None, :], out, mask=mask)
        lse = tl.where(total == 0, float("-inf"), (peak + tl.log2(norm)) * _LN2)
        index = (i_row * GROUP + i_group) * query_len + i_query
        tl.store(ptr_lse + index, lse, mask=mask_row)


@triton.jit(do_not_specialize=_INTS)
def combine_kernel(
    ptr_part, ptr_stat, ptr_out, ptr_lse, ptr_q, ptr_new_k, ptr_new_v, ptr_new_score, ptr_real,
    ptr_note, ptr_k, ptr_v, ptr_k_scale, ptr_v_scale, ptr_slot_score, ptr_position, ptr_threshold,
    ptr_seen, ptr_evicted, scale, softcap, query_len, key_len, window_size, keep_first, keep_recent,
    sqb, sqh, skb, skh, svb, svh,
    HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    TAKES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Sum the splits of one row; of a `WindowCache` also attend to the new token and commit it."""
    num_rows = query_len * GROUP
    index = tl.program_id(0).to(tl.int64)
    i_row, row = index // num_rows, (index % num_rows).to(tl.int32)
    i_batch, i_head = i_row // HEADS_KV, i_row % HEADS_KV
    i_query, i_group = row // GROUP, row % GROUP
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D

    peak = LOWEST
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, SPLITS, TAKES):
        split = first + tl.arange(0, TAKES)
        mask = split < SPLITS
        part = index * SPLITS + split
        peaks = tl.load(ptr_stat + part * 2, mask=mask, other=LOWEST)
        totals = tl.load(ptr_stat + part * 2 + 1, mask=mask, other=0.0)
        ptrs = ptr_part + part[:, None] * D + offs_d[None, :]
        parts = tl.load(ptrs, mask=mask[:, None] & mask_d[None, :], other=0.0)
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        weight, factor = tl.exp2(peaks - new_peak), tl.exp2(peak - new_peak)
        acc = acc * factor + tl.sum(parts * weight[:, None], 0)
        total = total * factor + tl.sum(totals * weight, 0)
        peak = new_peak

    if ptr_note is not None:
        ptr_note += i_row * SPLITS * NOTES
        threshold, position = tl.load(ptr_note + 4), tl.load(ptr_note + 5)
        token, new_score, real = load_token(ptr_new_score, ptr_real, position, i_row, i_batch)
        stored = keeps_token(token, position, threshold, keep_first, keep_recent)
        ptr_q += i_batch * sqb + (i_head * GROUP + i_group) * sqh
        q = tl.load(ptr_q + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        mask = mask_d & stored
        k = tl.load(ptr_new_k + i_batch * skb + i_head * skh + offs_d, mask=mask, other=0.0)
        v = tl.load(ptr_new_v + i_batch * svb + i_head * svh + offs_d, mask=mask, other=0.0)
        k, v = k.to(tl.float32), v.to(tl.float32)
        product = tl.sum(q * k, 0)
        scores, _tanh = scaled_scores(product, scale, softcap, HAS_SOFTCAP)
        sees = stored & (new_score != float("-inf"))
        scores = tl.where(sees, scores + log2_bias(new_score), float("-inf"))
        new_peak = tl.maximum(peak, scores)
        weight, factor = tl.exp2(scores - new_peak), tl.exp2(peak - new_peak)
        acc = acc * factor + tl.where(sees, v, 0.0) * weight
        total = total * factor + weight
        peak = new_peak
        if row == 0:
            slot = commit_token(
                ptr_note, ptr_slot_score, ptr_position, ptr_threshold, ptr_seen, ptr_evicted, token,
                new_score, position, position + real, threshold, stored, i_row, i_batch, i_head,
                key_len, window_size, SPLITS, SPLITS_PAD,
            )  # fmt: skip
            place = i_row * key_len + slot
            mask = mask_d & (slot < key_len)
            if ptr_k_scale is not None:
                k_scale, v_scale = row_scale(k, 0), row_scale(v, 0)
                k, v = to_fp8(k, k_scale), to_fp8(v, v_scale)
                tl.store(ptr_k_scale + place, k_scale, mask=slot < key_len)
                tl.store(ptr_v_scale + place, v_scale, mask=slot < key_len)
            tl.store(ptr_k + place * D + offs_d, k.to(ptr_k.dtype.element_ty), mask=mask)
            tl.store(ptr_v + place * D + offs_d, v.to(ptr_v.dtype.element_ty), mask=mask)

    norm = tl.where(total == 0, 1.0, total)
    index = (i_batch * query_len + i_query) * (HEADS_KV * GROUP) + i_head * GROUP + i_group
    tl.store(ptr_out + index * D + offs_d, (acc / norm).to(ptr_out.dtype.element_ty), mask=mask_d)
    lse = tl.where(total == 0, float("-inf"), (peak + tl.log2(norm)) * _LN2)
    tl.store(ptr_lse + (i_row * GROUP + i_group) * query_len + i_query, lse)
