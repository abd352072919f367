"""Slots and bits of a mask over queries and keys.

The mask is read once, with causality nothing after the diagonal: 32 neighbouring queries of a key
become one word. A key with a word that is not 0 gets a slot in the epoch, by position, and the
words of the slots follow it there.

Symbols as in `plan.py`. The words of an epoch are cut into parts; a sheet is one part of one head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from .config import SLOT_ALIGN
from .inputs import broadcast_strides
from .launch import launch
from .masks import MaskLayout
from .tiles import NUMBERS, epoch_bounds, row_and_rest, row_offsets
from .words import popcount

_ALIGN = tl.constexpr(SLOT_ALIGN)

# The causal mask of 32768 queries, in microseconds, where to read its half takes 135: 141; 16 rows
# 143, 4 words 147, 1024 keys by two warps 142. With 16 rows: 2048 keys by four warps 150, 256 keys
# 150; with 4 words as well: 166, 512 keys by two warps 172, 1024 keys by one 166.
_PACKED = 512  # keys of one program that packs,
_PACK_WARPS = 1  # its warps,
_ROWS = 32  # and the rows that it has under way
_WORDS = 2  # words that it packs, or fewer for the sake of
_PROGRAMS = 8192  # so many programs
_SCANNED = 128  # times 32 keys get slots by one program,
_COUNTED_WORDS = 8192  # and so many words of 32 keys, of all parts, are counted together


@triton.jit
def _quads(
    ptr_quads, at, stride, key_0, query, num, position, key_len,
    CAUSAL: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Words of 4 `SIZE` keys from 32 rows of bytes that are 0 or 1, read 16 at a time.

    8 rows fit the bits of a byte, so that a shift and a sum serve 4 keys. All of `ROWS` rows are
    under way before the first is used. With causality nothing after the diagonal is read but what
    shares 16 bytes with something before it.
    """
    quad = tl.arange(0, SIZE)  # [SIZE]
    key = key_0 + quad // 4 * 16
    at, stride = at // 4, stride // 4
    word_0 = tl.zeros([SIZE], tl.int32)
    word_1, word_2, word_3 = word_0, word_0, word_0
    BYTES: tl.constexpr = ROWS // 8
    # From which of the 32 rows on a key is read.
    begin = key - (position + query) if CAUSAL else key * 0
    begin = tl.where(key < key_len, begin, 32)
    for part in tl.range(0, 32, ROWS):
        row = part + tl.arange(0, ROWS)  # [ROWS]
        starts = tl.multiple_of(at + row * stride, 4)
        inside = (begin[None, :] <= row[:, None]) & (query + row < num)[:, None]
        ptrs = ptr_quads + starts[:, None] + quad[None, :]
        read = tl.load(ptrs, mask=inside, other=0, eviction_policy="evict_first")
        rows = tl.sum((read << (row % 8)[:, None]).reshape(BYTES, 8, SIZE), 1)  # [BYTES, SIZE]
        to = part + tl.arange(0, BYTES)[:, None] * 8
        # One byte for each of the 4 keys.
        word_0 |= tl.sum((rows & 255) << to, 0)
        word_1 |= tl.sum(((rows >> 8) & 255) << to, 0)
        word_2 |= tl.sum(((rows >> 16) & 255) << to, 0)
        word_3 |= tl.sum(((rows >> 24) & 255) << to, 0)
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3)).reshape(SIZE * 4)
    if CAUSAL and key_0 + SIZE * 4 - 1 > position + query:
        # How many of the queries come before the key.
        before = key_0 + tl.arange(0, SIZE * 4) - (position + query)
        words = tl.where(before < 32, words & (-1 << tl.maximum(before, 0)), 0)
    return words


@triton.jit
def _word(
    ptr_mask, ptr_quads, base, key_0, query, num, position, key_len, smq, smn,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Which of 32 queries see the keys of a block, one bit each."""
    word = tl.zeros([BLOCK], tl.int32)
    reached = query < num
    whole = (query + 32 <= num) & (key_0 + BLOCK <= key_len)
    if CAUSAL:
        reached = reached & (key_0 <= position + query + 31)
        whole = whole & (key_0 + BLOCK - 1 <= position + query)
    if reached:
        base += query * smq
        if QUADS:
            word = _quads(
                ptr_quads, base + key_0, smq, key_0, query, num, position, key_len, CAUSAL,
                BLOCK // 4, ROWS,
            )  # fmt: skip
        else:
            key = key_0 + tl.arange(0, BLOCK)  # [BLOCK]
            offs = key.to(tl.int64) if UNIT else key.to(tl.int64) * smn
            if whole:
                for j in tl.static_range(32):
                    word |= tl.load(ptr_mask + base + j * smq + offs).to(tl.int32) << j
            else:
                for j in tl.static_range(32):
                    inside = (key < key_len) & (query + j < num)
                    if CAUSAL:
                        inside = inside & (key <= position + query + j)
                    bit = tl.load(ptr_mask + base + j * smq + offs, mask=inside, other=0)
                    word |= bit.to(tl.int32) << j
    return word


@triton.jit(do_not_specialize=NUMBERS)
def pack_kernel(
    ptr_mask, ptr_quads, ptr_words, ptr_shown, ptr_before, query_len, key_len, epoch_len,
    num_epochs, num_parts, num_blocks,
    smb: tl.int64,
    smk: tl.int64,
    smg: tl.int64,
    smq: tl.int64,
    smn: tl.int64,
    ROW_HEADS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIT: tl.constexpr,
    QUADS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program per (row, epoch, head, part of the epoch's words, block of keys).

    Stores which keys any query of the part sees, one bit each, and the `WORDS` words of these keys,
    one key after the other: few keys are seen, and what is not stored need not be read again. Of
    every 32 keys it also notes how many before them in the block are seen.
    """
    i_row, rest = row_and_rest(num_epochs * MEMBERS * num_parts * num_blocks)
    # With causality the long ones first.
    rest = num_epochs * MEMBERS * num_parts * num_blocks - 1 - rest
    i_sheet, key_0 = rest // num_blocks, rest % num_blocks * BLOCK
    i_part, i_member = i_sheet % num_parts, i_sheet // num_parts % MEMBERS
    i_epoch = i_sheet // (num_parts * MEMBERS)
    first, num, position = epoch_bounds(i_epoch, None, query_len, key_len, epoch_len, False)
    base = i_row // ROW_HEADS * smb + i_row % ROW_HEADS * smk + i_member * smg + first * smq
    query = i_part * WORDS * 32
    sheet = i_row * (num_epochs * MEMBERS * num_parts) + i_sheet
    word_0 = _word(
        ptr_mask, ptr_quads, base, key_0, query, num, position, key_len, smq, smn,
        CAUSAL, UNIT, QUADS, BLOCK, ROWS,
    )  # fmt: skip
    if WORDS > 1:
        word_1 = _word(
            ptr_mask, ptr_quads, base, key_0, query + 32, num, position, key_len, smq, smn,
            CAUSAL, UNIT, QUADS, BLOCK, ROWS,
        )  # fmt: skip
    if WORDS > 2:
        word_2 = _word(
            ptr_mask, ptr_quads, base, key_0, query + 64, num, position, key_len, smq, smn,
            CAUSAL, UNIT, QUADS, BLOCK, ROWS,
        )  # fmt: skip
        word_3 = _word(
            ptr_mask, ptr_quads, base, key_0, query + 96, num, position, key_len, smq, smn,
            CAUSAL, UNIT, QUADS, BLOCK, ROWS,
        )  # fmt: skip
    if WORDS == 1:
        words, sees = word_0.reshape(BLOCK, 1), word_0
    elif WORDS == 2:
        words, sees = tl.join(word_0, word_1), word_0 | word_1
    else:
        words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3)).reshape(BLOCK, 4)
        sees = word_0 | word_1 | word_2 | word_3
    seen = (sees != 0).to(tl.int32)  # [BLOCK]
    rank = tl.cumsum(seen, 0) - 1
    columns = num_blocks * BLOCK
    out = row_offsets(sheet, columns, True) + key_0 + rank
    ptrs = ptr_words + (out * WORDS)[:, None] + tl.arange(0, WORDS)[None, :]
    tl.store(ptrs, words, mask=(seen != 0)[:, None])
    shown = seen.reshape(BLOCK // 32, 32)
    bits = tl.sum(shown << tl.arange(0, 32)[None, :], 1)
    count = tl.sum(shown, 1)
    offs = sheet * (columns // 32) + key_0 // 32 + tl.arange(0, BLOCK // 32)
    tl.store(ptr_shown + offs, bits)
    tl.store(ptr_before + offs, tl.cumsum(count, 0) - count)


@triton.jit
def _shown(
    ptr_shown, begin, end, columns, SHEETS: tl.constexpr, SHEETS_PAD: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Which keys any head and part of an epoch sees, one bit each; `begin` counts 32 keys."""
    sheet = tl.arange(0, SHEETS_PAD)[:, None]
    at = begin + tl.arange(0, SIZE)[None, :]
    inside = (sheet < SHEETS) & (at < end)
    return tl.reduce(tl.load(ptr_shown + sheet * columns + at, mask=inside, other=0), 0, _or)


@triton.jit(do_not_specialize=NUMBERS)
def slot_kernel(
    ptr_shown, ptr_key, ptr_counts, ptr_use_slot, key_len, num_slots, num_blocks, columns,
    SHEETS: tl.constexpr,
    SHEETS_PAD: tl.constexpr,
    USES: tl.constexpr,
    ALIGNED: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (row, epoch, block of 32 `BLOCK` keys): a slot for each that is seen.

    Every program counts the keys before its own, so that none waits for another. `columns` is how
    many 32 keys there are, of which the last ones may not exist.
    """
    i_list, i_block = row_and_rest(num_blocks)
    ptr_shown += i_list * SHEETS * columns
    begin = i_block * BLOCK
    total = tl.zeros([COUNTED], tl.int32)
    for i in range(0, begin, COUNTED):
        total += popcount(_shown(ptr_shown, i, begin, columns, SHEETS, SHEETS_PAD, COUNTED))
    count = tl.sum(total, 0)
    word = _shown(ptr_shown, begin, columns, columns, SHEETS, SHEETS_PAD, BLOCK)  # [BLOCK]
    own = popcount(word)
    upto = tl.cumsum(own, 0)
    bit = tl.arange(0, 32)[None, :]
    key = (begin + tl.arange(0, BLOCK))[:, None] * 32 + bit  # [BLOCK, 32]
    slot = (count + upto - own)[:, None] + popcount(word[:, None] & ((1 << bit) - 1))
    seen = ((word[:, None] >> bit) & 1) != 0
    tl.store(ptr_key + i_list * num_slots + slot, key, mask=seen)
    if USES:
        live = (key // 16 * 16 if ALIGNED else key) < key_len
        ptrs = ptr_use_slot + row_offsets(i_list, key_len, ALIGNED) + key
        tl.store(ptrs, tl.where(seen, slot, -1), mask=live)
    if i_block == num_blocks - 1:
        count += tl.sum(own, 0)
        offs = tl.arange(0, _ALIGN)  # [ALIGN]
        last = count // _ALIGN * _ALIGN + offs
        is_rest = (last >= count) & (count % _ALIGN != 0)
        tl.store(ptr_key + i_list * num_slots + last, -1, mask=is_rest)
        tl.store(ptr_counts + i_list * 2, count)
        tl.store(ptr_counts + i_list * 2 + 1, 0)


@triton.jit
def _or(left, right):
    return left | right


@triton.jit
def _and(left, right):
    return left & right


@triton.jit
def store_bits(
    ptrs_slot, ptr_block_bits, bits, row, i_block, num_slots,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the words of a block of slots, and of every 32 slots what any has and what all have.

    `bits` ``[ROWS, BLOCK]`` go to `ptrs_slot`; `row` ``[ROWS]`` are their rows of `num_slots`.
    """
    tl.store(ptrs_slot, bits)
    flag = i_block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    ptrs = ptr_block_bits + ((row * (num_slots // 32))[:, None] + flag[None, :]) * 2
    parts = bits.reshape(ROWS, BLOCK // 32, 32)
    tl.store(ptrs, tl.reduce(parts, 2, _or))
    tl.store(ptrs + 1, tl.reduce(parts, 2, _and))


@triton.jit(do_not_specialize=NUMBERS)
def bits_kernel(
    ptr_words, ptr_shown, ptr_before, ptr_key, ptr_counts, ptr_slot_bits, ptr_block_bits,
    num_parts, num_slots, columns,
    MEMBERS: tl.constexpr,
    WORDS: tl.constexpr,
    STEP: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (row, epoch, block of slots): words in the order of slots, and their sums.

    `STEP` parts of `WORDS` words at a time; `PACKED` keys were packed by one program.
    """
    i_list, i_block = row_and_rest(num_slots // BLOCK)
    if i_block * BLOCK < tl.load(ptr_counts + i_list * 2):
        slot = i_block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        key = tl.load(ptr_key + i_list * num_slots + slot)[None, :]
        for member in tl.static_range(MEMBERS):
            for i in range(0, num_parts, STEP):
                row = (i_list * MEMBERS + member) * num_parts + i + tl.arange(0, STEP)[:, None]
                shown = tl.load(ptr_shown + row * columns + key // 32, mask=key >= 0, other=0)
                before = tl.load(ptr_before + row * columns + key // 32, mask=key >= 0, other=0)
                rank = before + popcount(shown & ((1 << (key % 32)) - 1))  # [STEP, BLOCK]
                known = ((shown >> (key % 32)) & 1) != 0
                offs = (row * (columns * 32) + key // PACKED * PACKED + rank) * WORDS
                ptrs = ptr_words + offs[:, None, :] + tl.arange(0, WORDS)[None, :, None]
                bits = tl.load(ptrs, mask=known[:, None, :], other=0)
                word = i * WORDS + tl.arange(0, STEP * WORDS)
                out = (i_list * MEMBERS + member) * (num_parts * WORDS) + word
                store_bits(
                    ptr_slot_bits + (out * num_slots)[:, None] + slot[None, :], ptr_block_bits,
                    bits.reshape(STEP * WORDS, BLOCK), out, i_block, num_slots, STEP * WORDS, BLOCK,
                )  # fmt: skip


def fill_slots(plan: Plan, layout: MaskLayout, shown: Tensor, sheets: int) -> None:
    """Fill slots, their counts and, where a plan is for backward, the slot of every key.

    Args:
        plan: Of the layout.
        layout: Of the kind ``"bits"``.
        shown: int32 ``[rows * E * sheets, columns]``: which keys a sheet shows, one bit each.
        sheets: Of an epoch: one shows what any of its queries sees, or several do together.
    """
    columns, lists = shown.shape[1], shown.shape[0] // sheets
    sheets_pad = triton.next_power_of_2(sheets)
    scanned = max(1, min(_SCANNED, triton.next_power_of_2(columns), _COUNTED_WORDS // sheets_pad))
    scans = triton.cdiv(columns, scanned)
    launch(slot_kernel, lists * scans)(
        shown, plan.slot_key, plan.counts, plan.use_slot, layout.key_len, layout.num_slots, scans,
        columns, SHEETS=sheets, SHEETS_PAD=sheets_pad, USES=plan.use_slot is not None,
        ALIGNED=layout.key_len % 16 == 0, COUNTED=max(scanned, _COUNTED_WORDS // sheets_pad),
        BLOCK=scanned, num_warps=8,
    )  # fmt: skip


def fill_bits(plan: Plan, mask: Tensor, layout: MaskLayout, is_causal: bool) -> None:
    """Fill slots, their bits and, where a plan is for backward, the slot of every key.

    Args:
        plan: Of the layout, its tensors not filled yet.
        mask: Bool ``({1|B}, {1|Hkv|H}, {1|Q}, {1|K})``, any strides.
        layout: Of the kind ``"bits"``.
        is_causal: Whether keys after a query's position are hidden as well.
    """
    query_len, key_len, epoch_len = layout.query_len, layout.key_len, layout.epoch_len
    rows, num_epochs = layout.row_batches * layout.row_heads, layout.num_epochs
    members, num_words = layout.members, epoch_len // 32
    block = min(_PACKED, max(32, triton.next_power_of_2(key_len)))
    num_blocks = triton.cdiv(key_len, block)
    together, programs = min(_WORDS, num_words & -num_words), rows * members * num_epochs
    while together > 1 and programs * num_blocks * num_words // together < _PROGRAMS:
        together //= 2
    num_parts = num_words // together
    sheets = members * num_parts
    all_sheets, columns = rows * num_epochs * sheets, num_blocks * block // 32
    shown = torch.empty(all_sheets, columns, dtype=torch.int32, device=mask.device)
    before = torch.empty_like(shown)
    # Room for the words of all keys, though only of those that are seen they are stored.
    words = shown.new_empty(all_sheets, columns * 32, together)
    strides = broadcast_strides(mask, layout.row_heads, members)
    is_unit = strides[4] == 1
    quads, flat = None, mask.view(torch.uint8)
    steps = (mask.shape[3], *strides[:4])
    if is_unit and mask.data_ptr() % 16 == 0 and not any(step % 16 for step in steps):
        quads = flat.view(torch.int32)
    launch(pack_kernel, programs * num_parts * num_blocks)(
        flat, quads, words, shown, before, query_len, key_len, epoch_len, num_epochs, num_parts,
        num_blocks, *strides, ROW_HEADS=layout.row_heads, MEMBERS=members, CAUSAL=is_causal,
        UNIT=is_unit, QUADS=quads is not None, WORDS=together, BLOCK=block, ROWS=_ROWS,
        num_warps=max(1, block * _PACK_WARPS // _PACKED),
    )  # fmt: skip
    fill_slots(plan, layout, shown, sheets)
    launch(bits_kernel, rows * num_epochs * (layout.num_slots // SLOT_ALIGN))(
        words, shown, before, plan.slot_key, plan.counts, plan.slot_bits, plan.block_bits,
        num_parts, layout.num_slots, columns, MEMBERS=members, WORDS=together,
        STEP=min(max(4, 8 // together), num_parts & -num_parts), PACKED=block, BLOCK=SLOT_ALIGN,
        num_warps=4,
    )  # fmt: skip
