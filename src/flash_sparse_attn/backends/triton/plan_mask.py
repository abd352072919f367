"""Plans of calls without a selection: from a bool mask, or from nothing.

A mask over queries and keys is read once: 32 neighbouring queries of a key become one word. A key
with a word that is not 0 gets a slot in the epoch, by position. A mask over keys alone keeps the
keys that it shows, in one list for all epochs. Without a mask, and where keys are so few that a
plan would cost more than it saves, the slots are the keys themselves.

Broadcast dimensions of a mask are read once and never expanded, and with causality nothing after
the diagonal is read. Symbols as in `plan.py`; ``W`` words of 32 queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...intervals import NEVER
from ...plan import Plan
from ...varlen import PackedSequences
from .block_lists import fill_lists
from .collect import distinct_borders, epoch_table, pad_slots
from .config import SLOT_ALIGN
from .inputs import broadcast_strides
from .launch import launch, repeat_call
from .masks import MaskLayout
from .select_rows import sequence_of
from .tiles import NUMBERS, row_and_rest, row_offsets

_NEVER = tl.constexpr(NEVER)
_ALIGN = tl.constexpr(SLOT_ALIGN)

_SCANNED = 4096  # keys that one program looks at together
_COUNTED = 16384  # bytes of a mask over keys that one program counts together
_OWNED = 1024  # keys of a mask over keys that one program gives slots
# At 32768, 4096 to 16384 programs, 8 to 32 parts and 512 or 1024 keys took the same within 2 %.
_PACKED = 512  # keys of one program that packs: of one warp, 16 of each of its threads
_PROGRAMS = 8192  # so many, with those that causality leaves idle, keep a GPU reading; if need be,
_PARTS = 16  # the words of an epoch are cut into so many parts


@triton.jit
def _epoch(i_epoch, query_len, key_len, epoch_len):
    """First query of an epoch, its number of queries, and the position of the first."""
    first = i_epoch * epoch_len
    return first, tl.minimum(epoch_len, query_len - first), first + key_len - query_len


@triton.jit
def _pack_quads(
    ptr_quads, at, stride, key_0, query, num, position, key_len,
    CAUSAL: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Words of 4 `SIZE` keys from 32 rows of bytes that are 0 or 1, read 16 at a time.

    8 rows fit the bits of a byte, so that a shift and a sum serve 4 keys. With causality nothing
    after the diagonal is read but what shares 16 bytes with something before it.
    """
    quad = tl.arange(0, SIZE)  # [SIZE]
    key = key_0 + quad // 4 * 16
    at, stride = at // 4, stride // 4
    word_0 = tl.zeros([SIZE], tl.int32)
    word_1, word_2, word_3 = word_0, word_0, word_0
    for part in tl.range(0, 32, 8):
        # From which row of the 8 on they are read.
        begin = key - (position + query + part) if CAUSAL else key * 0
        begin = tl.where(key < key_len, begin, 8)
        rows = tl.zeros([SIZE], tl.int32)
        for j in tl.static_range(8):
            row = tl.multiple_of(at + (part + j) * stride, 4)
            inside = (begin <= j) & (query + part + j < num)
            rows += tl.load(ptr_quads + row + quad, mask=inside, other=0) << j
        # One byte for each of the 4 keys.
        word_0 |= (rows & 255) << part
        word_1 |= ((rows >> 8) & 255) << part
        word_2 |= ((rows >> 16) & 255) << part
        word_3 |= ((rows >> 24) & 255) << part
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3)).reshape(SIZE * 4)
    if CAUSAL and key_0 + SIZE * 4 - 1 > position + query:
        # How many of the queries come before the key.
        before = key_0 + tl.arange(0, SIZE * 4) - (position + query)
        words = tl.where(before < 32, words & (-1 << tl.maximum(before, 0)), 0)
    return words


@triton.jit(do_not_specialize=NUMBERS)
def pack_kernel(
    ptr_mask, ptr_quads, ptr_words, ptr_seen, query_len, key_len, epoch_len, num_epochs, num_parts,
    num_blocks,
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
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (row, epoch, part of its words, block of keys).

    Stores the words of the keys, and whether any query of the part sees them. Words of keys after
    their last query are neither computed nor stored.
    """
    i_row, rest = row_and_rest(num_epochs * num_parts * num_blocks)
    rest = num_epochs * num_parts * num_blocks - 1 - rest  # with causality the long ones first
    i_epoch, rest = rest // (num_parts * num_blocks), rest % (num_parts * num_blocks)
    i_part, key_0 = rest // num_blocks, rest % num_blocks * BLOCK
    first, num, position = _epoch(i_epoch, query_len, key_len, epoch_len)
    num_words = epoch_len // 32
    words_now = num_words // num_parts
    key = key_0 + tl.arange(0, BLOCK)  # [BLOCK]
    live = (key // 16 * 16 if QUADS else key) < key_len
    offs = key.to(tl.int64) if UNIT else key.to(tl.int64) * smn
    row_offs = i_row // ROW_HEADS * smb + i_row % ROW_HEADS * smk
    seen = tl.zeros([BLOCK], tl.int32)
    for i in range(i_part * words_now, (i_part + 1) * words_now):
        query = i * 32
        reached = query < num
        whole = (query + 32 <= num) & (key_0 + BLOCK <= key_len)
        if CAUSAL:
            reached = reached & (key_0 <= position + query + 31)
            whole = whole & (key_0 + BLOCK - 1 <= position + query)
        if reached:
            for member in tl.static_range(MEMBERS):
                base = row_offs + member * smg + (first + query) * smq
                word = tl.zeros([BLOCK], tl.int32)
                if QUADS:
                    word = _pack_quads(
                        ptr_quads, base + key_0, smq, key_0, query, num, position, key_len, CAUSAL,
                        BLOCK // 4,
                    )  # fmt: skip
                elif whole:
                    for j in tl.static_range(32):
                        word |= tl.load(ptr_mask + base + j * smq + offs).to(tl.int32) << j
                else:
                    for j in tl.static_range(32):
                        inside = (key < key_len) & (query + j < num)
                        if CAUSAL:
                            inside = inside & (key <= position + query + j)
                        bit = tl.load(ptr_mask + base + j * smq + offs, mask=inside, other=0)
                        word |= bit.to(tl.int32) << j
                out = ((i_row * MEMBERS + member) * num_epochs + i_epoch) * num_words + i
                tl.store(ptr_words + row_offsets(out, key_len, QUADS) + key, word, mask=live)
                seen |= word
    out = (i_row * num_epochs + i_epoch) * num_parts + i_part
    tl.store(ptr_seen + row_offsets(out, key_len, QUADS) + key, (seen != 0).to(tl.int8), mask=live)


@triton.jit
def _any_part(ptr_seen, row, key, key_len, PARTS: tl.constexpr, ALIGNED: tl.constexpr):
    """1 for each of the keys that any part of an epoch sees, 0 for the others."""
    live = (key // 16 * 16 if ALIGNED else key) < key_len
    seen = tl.zeros(key.shape, tl.int8)
    for part in tl.static_range(PARTS):
        offs = row_offsets(row + part, key_len, ALIGNED) + key
        seen |= tl.load(ptr_seen + offs, mask=live, other=0)
    return seen.to(tl.int32)


@triton.jit(do_not_specialize=NUMBERS)
def slot_kernel(
    ptr_seen, ptr_key, ptr_counts, ptr_use_slot, key_len, num_epochs, num_slots,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    USES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (row, epoch): a slot for every key that any query of the epoch sees."""
    i_list, _ = row_and_rest(1)
    row = i_list * PARTS
    count = 0
    following = _any_part(ptr_seen, row, tl.arange(0, BLOCK), key_len, PARTS, ALIGNED)
    for i in range(0, key_len, BLOCK):
        key = i + tl.arange(0, BLOCK)  # [BLOCK]
        seen = following
        # Loaded while these are summed.
        following = _any_part(ptr_seen, row, key + BLOCK, key_len, PARTS, ALIGNED)
        rank = tl.cumsum(seen, 0)
        slot = count + rank - 1
        tl.store(ptr_key + i_list * num_slots + slot, key, mask=seen != 0)
        if USES:
            slot = tl.where(seen != 0, slot, -1)
            offs = row_offsets(i_list, key_len, ALIGNED) + key
            live = (key // 16 * 16 if ALIGNED else key) < key_len
            tl.store(ptr_use_slot + offs, slot, mask=live)
        count += tl.max(rank, 0)
    offs = tl.arange(0, _ALIGN)  # [ALIGN]
    slot = count // _ALIGN * _ALIGN + offs
    is_rest = (slot >= count) & (count % _ALIGN != 0)
    tl.store(ptr_key + i_list * num_slots + slot, -1, mask=is_rest)
    tl.store(ptr_counts + i_list * 2, count)
    tl.store(ptr_counts + i_list * 2 + 1, 0)


@triton.jit
def _or(left, right):
    return left | right


@triton.jit
def _and(left, right):
    return left & right


@triton.jit(do_not_specialize=NUMBERS)
def bits_kernel(
    ptr_words, ptr_key, ptr_counts, ptr_slot_bits, ptr_block_bits, query_len, key_len, epoch_len,
    num_epochs, num_slots,
    MEMBERS: tl.constexpr,
    CAUSAL: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (row, epoch, block of slots): words in the order of slots, and their sums."""
    i_row, rest = row_and_rest(num_epochs * (num_slots // BLOCK))
    i_epoch, i_block = rest // (num_slots // BLOCK), rest % (num_slots // BLOCK)
    i_list = i_row * num_epochs + i_epoch
    if i_block * BLOCK < tl.load(ptr_counts + i_list * 2):
        _, num, position = _epoch(i_epoch, query_len, key_len, epoch_len)
        num_words = epoch_len // 32
        slot = i_block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        key = tl.load(ptr_key + i_list * num_slots + slot)
        part = i_block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
        for member in tl.static_range(MEMBERS):
            for i in range(0, num_words, STEP):
                word = i + tl.arange(0, STEP)  # [STEP]
                known = (key >= 0)[None, :] & (word * 32 < num)[:, None]
                if CAUSAL:
                    known = known & (key[None, :] <= (position + word * 32 + 31)[:, None])
                row = ((i_row * MEMBERS + member) * num_epochs + i_epoch) * num_words + word
                ptrs = ptr_words + (row * key_len)[:, None] + key[None, :]
                bits = tl.load(ptrs, mask=known, other=0)
                out = (i_list * MEMBERS + member) * num_words + word
                tl.store(ptr_slot_bits + (out * num_slots)[:, None] + slot[None, :], bits)
                parts = bits.reshape(STEP, BLOCK // 32, 32)
                ptrs = ptr_block_bits + ((out * (num_slots // 32))[:, None] + part[None, :]) * 2
                tl.store(ptrs, tl.reduce(parts, 2, _or))
                tl.store(ptrs + 1, tl.reduce(parts, 2, _and))


@triton.jit
def _count(ptr_mask, begin, end, smn, UNIT: tl.constexpr, COUNTED: tl.constexpr):
    """How many of the keys from `begin` to `end` a mask over keys shows."""
    total = tl.zeros([COUNTED], tl.int32)
    for i in range(begin, end, COUNTED):
        key = i + tl.arange(0, COUNTED)  # [COUNTED]
        offs = key if UNIT else key.to(tl.int64) * smn
        total += tl.load(ptr_mask + offs, mask=key < end, other=0).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=NUMBERS)
def keys_kernel(
    ptr_mask, ptr_key, ptr_start, ptr_expiry, ptr_counts, ptr_visible, ptr_entered, ptr_use_slot,
    query_len, key_len, num_slots, num_blocks,
    smb: tl.int64,
    smk: tl.int64,
    smn: tl.int64,
    ROW_HEADS: tl.constexpr,
    CAUSAL: tl.constexpr,
    USES: tl.constexpr,
    UNIT: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (row of a mask over keys, block of keys): a slot for every key it shows.

    Every program counts the keys before its own, so that none waits for another.
    """
    i_row, i_block = row_and_rest(num_blocks)
    offs_row = i_row // ROW_HEADS * smb + i_row % ROW_HEADS * smk
    ptr_mask += offs_row // 16 * 16 if UNIT else offs_row  # aligned, as the compiler sees
    ptr_visible += i_row * query_len
    ptr_entered += i_row * query_len
    slots = i_row * num_slots
    key_0 = i_block * BLOCK
    count = _count(ptr_mask, 0, key_0, smn, UNIT, COUNTED)
    key = key_0 + tl.arange(0, BLOCK)  # [BLOCK]
    seen = tl.load(ptr_mask + key.to(tl.int64) * smn, mask=key < key_len, other=0).to(tl.int32)
    upto = count + tl.cumsum(seen, 0)
    slot = upto - 1
    tl.store(ptr_key + slots + slot, key, mask=seen != 0)
    tl.store(ptr_start + slots + slot, key if CAUSAL else key * 0, mask=seen != 0)
    tl.store(ptr_expiry + slots + slot, key * 0 + _NEVER, mask=seen != 0)
    if USES:
        slot = tl.where(seen != 0, slot, -1)
        tl.store(ptr_use_slot + i_row * key_len + key, slot, mask=key < key_len)
    count += tl.sum(seen, 0)
    if CAUSAL:
        # The query that stands at the key's position.
        query = key - key_len + query_len
        tl.store(ptr_visible + query, upto, mask=(key < key_len) & (query >= 0))
    else:
        total = count + _count(ptr_mask, key_0 + BLOCK, key_len, smn, UNIT, COUNTED)
    for i in range(key_0, query_len, num_blocks * BLOCK):
        query = i + tl.arange(0, BLOCK)
        tl.store(ptr_entered + query, 0, mask=query < query_len)
        if CAUSAL:
            before = (query < query_len) & (query < query_len - key_len)
            tl.store(ptr_visible + query, 0, mask=before)
        else:
            tl.store(ptr_visible + query, query * 0 + total, mask=query < query_len)
    if i_block == num_blocks - 1:
        pad_slots(ptr_key + slots, ptr_start + slots, ptr_expiry + slots, count)
        tl.store(ptr_counts + i_row * 2, count)
        tl.store(ptr_counts + i_row * 2 + 1, 0)


@triton.jit(do_not_specialize=NUMBERS)
def uses_kernel(
    ptr_cu_q, ptr_cu_k, ptr_use_slot, key_len, epoch_len, num_slots, num_sequences,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of keys: the slot of each, where an epoch is a whole sequence."""
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    live = key < key_len
    seq = sequence_of(ptr_cu_k, num_sequences, key, 1, False)
    key_0 = tl.load(ptr_cu_k + seq)
    key_end = tl.load(ptr_cu_k + seq + 1)
    query_0 = tl.load(ptr_cu_q + seq)
    query_end = tl.load(ptr_cu_q + seq + 1)
    slot = (query_0 // epoch_len + seq) * num_slots + key - key_0
    slot = tl.where((key < key_end) & (query_0 < query_end), slot, -1)
    tl.store(ptr_use_slot + key, slot, mask=live)


def plan_packed(
    packed: PackedSequences, query_len: int, key_len: int, *, for_backward: bool
) -> tuple[Tensor, Tensor | None]:
    """Epoch table, and the slot of every key, of packed sequences whose slots are their keys.

    Args:
        packed: Borders of the sequences, and how many queries and keys each has at most: an epoch
            is a whole sequence.
        query_len, key_len: Totals.
        for_backward: Also list the slot of every key, int32 ``[total_k]``, -1 for none.
    """
    sizes = (query_len, key_len, packed.max_seqlen_q, packed.max_seqlen_k)

    def run() -> tuple[Tensor, Tensor | None]:
        table = epoch_table(packed, query_len, packed.max_seqlen_q)
        if not for_backward:
            return table, None
        use_slot = table.new_empty(key_len)
        launch(uses_kernel, triton.cdiv(key_len, 1024))(
            packed.cu_seqlens_q, packed.cu_seqlens_k, use_slot, key_len, packed.max_seqlen_q,
            packed.max_seqlen_k, packed.cu_seqlens_q.numel() - 1, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        return table, use_slot

    facts = ("plan packed", *sizes, for_backward)
    table, use_slot = repeat_call(facts, distinct_borders(packed), run)
    return table, use_slot


def plan_mask(mask: Tensor, layout: MaskLayout, *, is_causal: bool, for_backward: bool) -> Plan:
    """The plan of a bool mask ``({1|B}, {1|Hkv|H}, {1|Q}, {1|K})``, any strides.

    No host synchronization; capturable in a graph. Bits take ``Q K / 8`` bytes for every batch
    entry and head of the mask, and as much again while they are made.

    Args:
        mask: Bool, on the GPU.
        layout: For the mask and the call; not of the kind ``"keys"``.
        is_causal: Whether keys after a query's position are hidden as well.
        for_backward: Also list the slots of every key.

    Returns:
        The plan, with the lists of the layout.
    """

    def run() -> list[Tensor | None]:
        tensors = [
            torch.empty(shape, dtype=dtype, device=mask.device) if shape != (0,) else None
            for shape, dtype in layout.shapes(for_backward)
        ]
        plan = Plan.of(tensors, layout.sizes, not is_causal)
        if layout.kind == "shown":
            _fill_shown(plan, mask, layout, is_causal)
        else:
            _fill_bits(plan, mask, layout, is_causal)
            if plan.lists:
                fill_lists(plan, plan.lists, plan.list_sizes)
        return tensors

    tensors = repeat_call(("plan mask", layout, is_causal, for_backward), (mask,), run)
    return Plan.of(tensors, layout.sizes, not is_causal)


def _fill_shown(plan: Plan, mask: Tensor, layout: MaskLayout, is_causal: bool) -> None:
    batch, head, _, _, key = broadcast_strides(mask, layout.row_heads, 1)
    block = min(_OWNED, max(128, triton.next_power_of_2(layout.key_len)))
    num_blocks = max(1, triton.cdiv(layout.key_len, block))
    is_unit = key == 1 and not any(part % 16 for part in (mask.data_ptr(), batch, head))
    launch(keys_kernel, layout.row_batches * layout.row_heads * num_blocks)(
        mask.view(torch.uint8), plan.slot_key, plan.slot_start, plan.slot_expiry, plan.counts,
        plan.visible, plan.entered, plan.use_slot, layout.query_len, layout.key_len,
        layout.num_slots, num_blocks, batch, head, key, ROW_HEADS=layout.row_heads,
        CAUSAL=is_causal, USES=plan.use_slot is not None, UNIT=is_unit, COUNTED=_COUNTED,
        BLOCK=block, num_warps=8,
    )  # fmt: skip


def _fill_bits(plan: Plan, mask: Tensor, layout: MaskLayout, is_causal: bool) -> None:
    query_len, key_len, epoch_len = layout.query_len, layout.key_len, layout.epoch_len
    rows, num_epochs = layout.row_batches * layout.row_heads, layout.num_epochs
    members, num_words = layout.members, epoch_len // 32
    block = min(_PACKED, max(32, triton.next_power_of_2(key_len)))
    num_blocks = triton.cdiv(key_len, block)
    num_parts, programs = 1, rows * num_epochs * num_blocks
    while num_parts < min(num_words, _PARTS) and programs * num_parts < _PROGRAMS:
        num_parts *= 2
    words = torch.empty(
        rows, members, num_epochs * num_words, key_len, dtype=torch.int32, device=mask.device
    )
    seen = torch.empty(rows, num_epochs, num_parts, key_len, dtype=torch.int8, device=mask.device)
    strides = broadcast_strides(mask, layout.row_heads, members)
    is_unit = strides[4] == 1
    quads, flat = None, mask.view(torch.uint8)
    steps = (mask.shape[3], *strides[:4])
    if is_unit and mask.data_ptr() % 16 == 0 and not any(step % 16 for step in steps):
        quads = flat.view(torch.int32)
    launch(pack_kernel, programs * num_parts)(
        flat, quads, words, seen, query_len, key_len, epoch_len, num_epochs, num_parts,
        num_blocks, *strides, ROW_HEADS=layout.row_heads, MEMBERS=members, CAUSAL=is_causal,
        UNIT=is_unit, QUADS=quads is not None, BLOCK=block, num_warps=max(1, block // 512),
    )  # fmt: skip
    scanned = min(_SCANNED, max(128, triton.next_power_of_2(key_len)))
    launch(slot_kernel, rows * num_epochs)(
        seen, plan.slot_key, plan.counts, plan.use_slot, key_len, num_epochs, layout.num_slots,
        PARTS=num_parts, ALIGNED=key_len % 16 == 0, USES=plan.use_slot is not None, BLOCK=scanned,
        num_warps=max(4, scanned // 256),
    )  # fmt: skip
    launch(bits_kernel, rows * num_epochs * (layout.num_slots // SLOT_ALIGN))(
        words, plan.slot_key, plan.counts, plan.slot_bits, plan.block_bits, query_len, key_len,
        epoch_len, num_epochs, layout.num_slots, MEMBERS=members, CAUSAL=is_causal,
        STEP=min(8, num_words & -num_words), BLOCK=SLOT_ALIGN, num_warps=4,
    )  # fmt: skip
