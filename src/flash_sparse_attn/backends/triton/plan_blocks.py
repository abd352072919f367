"""Plans of calls whose queries list the blocks of keys that they see.

The plan is the one that `plan_mask.py` makes of a bool mask over queries and keys, without that
mask: 32 neighbouring queries and a *block* become one word, so that lists of ``n`` blocks are read
once, in O(Q n), and words take ``Q K / (8 block_size)`` bytes. Keys of a block share its word, but
for the diagonal of causality and for keys that nobody sees.

Symbols as in `plan.py`; ``W`` words of 32 queries in an epoch, ``N`` blocks of keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from .config import SLOT_ALIGN
from .inputs import broadcast_strides
from .launch import launch, repeat_call
from .mask_bits import fill_slots, store_bits
from .masks import MaskLayout
from .tiles import NUMBERS, row_and_rest

_LISTED = 64  # entries of the lists of 32 queries that one program reads together
_CLEARED = 1024  # words that it clears together
_SEEN = 1024  # keys that one program looks at


@triton.jit(do_not_specialize=NUMBERS)
def mark_kernel(
    ptr_lists, ptr_words, query_len, key_len, epoch_len, num_epochs, num_entries, num_blocks,
    block_size,
    smb: tl.int64,
    smk: tl.int64,
    smg: tl.int64,
    smq: tl.int64,
    smn: tl.int64,
    ROW_HEADS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CAUSAL: tl.constexpr,
    CLEARED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (row, member, word of 32 queries): which of the queries list each block."""
    num_words = num_epochs * (epoch_len // 32)
    i_row, rest = row_and_rest(MEMBERS * num_words)
    member, i_word = rest // num_words, rest % num_words
    ptr_lists += i_row // ROW_HEADS * smb + i_row % ROW_HEADS * smk + member * smg
    ptr_words += ((i_row * MEMBERS + member) * num_words + i_word) * num_blocks
    for i in range(0, num_blocks, CLEARED):
        block = i + tl.arange(0, CLEARED)  # [CLEARED]
        tl.store(ptr_words + block, 0, mask=block < num_blocks)
    tl.debug_barrier()
    number = tl.arange(0, 32)
    query = i_word * 32 + number  # [32]
    position = query + key_len - query_len
    bit = tl.full([32], 1, tl.int32) << number
    for i in range(0, num_entries, BLOCK):
        entry = i + tl.arange(0, BLOCK)  # [BLOCK]
        offs = query.to(tl.int64)[:, None] * smq + entry.to(tl.int64)[None, :] * smn
        inside = (query < query_len)[:, None] & (entry < num_entries)[None, :]
        block = tl.load(ptr_lists + offs, mask=inside, other=-1)  # [32, BLOCK]
        listed = (block >= 0) & (block < num_blocks)
        if CAUSAL:
            listed = listed & (block * block_size <= position[:, None])
        bits = tl.broadcast_to(bit[:, None], [32, BLOCK])
        # Several queries, and one twice, may list a block: in any order the word is the same.
        tl.atomic_or(ptr_words + block, bits, mask=listed, sem="relaxed")


@triton.jit
def _from_key(words, before):
    """`words` without their first `before` queries, which stand before the key."""
    return tl.where(before < 32, words & (-1 << tl.minimum(tl.maximum(before, 0), 31)), 0)


@triton.jit(do_not_specialize=NUMBERS)
def seen_kernel(
    ptr_words, ptr_visible, ptr_shown, query_len, key_len, epoch_len, num_epochs, num_parts,
    num_blocks, block_size,
    smb: tl.int64,
    smn: tl.int64,
    ROW_HEADS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (row, epoch, part of the keys): bits of those that any query sees."""
    i_row, rest = row_and_rest(num_epochs * num_parts)
    i_epoch, i_part = rest // num_parts, rest % num_parts
    first = i_epoch * epoch_len + key_len - query_len  # position of the first query
    num_words = epoch_len // 32
    key_0 = i_part * BLOCK
    key = key_0 + tl.arange(0, BLOCK)  # [BLOCK]
    live = key < key_len
    if HAS_VISIBLE:
        ptrs = ptr_visible + i_row // ROW_HEADS * smb + key.to(tl.int64) * smn
        live = live & (tl.load(ptrs, mask=live, other=0) != 0)
    words = tl.zeros([BLOCK], tl.int32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(key_0 - first, 0) // 32
    for i in range(begin, num_words):
        for member in tl.static_range(MEMBERS):
            row = ((i_row * MEMBERS + member) * num_epochs + i_epoch) * num_words + i
            bits = tl.load(ptr_words + row * num_blocks + key // block_size, mask=live, other=0)
            if CAUSAL:
                bits = _from_key(bits, key - first - i * 32)
            words |= bits
    bits = (words != 0).to(tl.int32).reshape(BLOCK // 32, 32) << tl.arange(0, 32)[None, :]
    out = ((i_row * num_epochs + i_epoch) * num_parts + i_part) * (BLOCK // 32)
    tl.store(ptr_shown + out + tl.arange(0, BLOCK // 32), tl.sum(bits, 1))


@triton.jit(do_not_specialize=NUMBERS)
def spread_kernel(
    ptr_words, ptr_key, ptr_counts, ptr_slot_bits, ptr_block_bits, query_len, key_len, epoch_len,
    num_epochs, num_slots, num_blocks, block_size,
    MEMBERS: tl.constexpr,
    CAUSAL: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (row, epoch, block of slots): the word of each slot's key, and their sums."""
    i_row, rest = row_and_rest(num_epochs * (num_slots // BLOCK))
    i_epoch, i_block = rest // (num_slots // BLOCK), rest % (num_slots // BLOCK)
    i_list = i_row * num_epochs + i_epoch
    if i_block * BLOCK < tl.load(ptr_counts + i_list * 2):
        first = i_epoch * epoch_len + key_len - query_len
        num_words = epoch_len // 32
        slot = i_block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        key = tl.load(ptr_key + tl.multiple_of(i_list * num_slots, BLOCK) + slot)
        for member in tl.static_range(MEMBERS):
            for i in range(0, num_words, STEP):
                word = i + tl.arange(0, STEP)  # [STEP]
                row = ((i_row * MEMBERS + member) * num_epochs + i_epoch) * num_words + word
                ptrs = ptr_words + (row * num_blocks)[:, None] + (key // block_size)[None, :]
                known = tl.broadcast_to((key >= 0)[None, :], [STEP, BLOCK])
                bits = tl.load(ptrs, mask=known, other=0)
                if CAUSAL:
                    bits = _from_key(bits, key[None, :] - (first + word * 32)[:, None])
                out = (i_list * MEMBERS + member) * num_words + word
                offs = tl.multiple_of(out * num_slots, BLOCK)[:, None] + slot[None, :]
                store_bits(
                    ptr_slot_bits + offs, ptr_block_bits, bits, out, i_block, num_slots, STEP, BLOCK
                )


def plan_blocks(
    block_indices: Tensor,
    visible: Tensor | None,
    block_size: int,
    layout: MaskLayout,
    *,
    is_causal: bool,
    for_backward: bool,
) -> Plan:
    """The plan of lists of blocks ``[B, {1|Hkv|H}, Q, n]``, any strides.

    No host synchronization; capturable in a graph; the same in every bit whatever the order of a
    list. Bits take ``Q K / 8`` bytes for every batch entry and head of the lists.

    Args:
        block_indices: int32 or int64, on the GPU; what is no block of the keys names none.
        visible: Bool ``({1|B}, 1, 1, {1|K})`` or ``None``: which keys are seen at all; more than
            those of the layout may follow.
        block_size: Keys of a block.
        layout: Of the kind ``"bits"``, for a mask ``[B, {1|Hkv|H}, Q, K]``.
        is_causal: Whether keys after a query's position are hidden as well.
        for_backward: Also list the slots of every key.
    """

    def run() -> list[Tensor | None]:
        tensors = layout.empty(block_indices.device, for_backward)
        plan = Plan.of(tensors, layout.sizes, not is_causal)
        _fill(plan, block_indices, visible, block_size, layout, is_causal)
        return tensors

    facts = ("plan blocks", layout, block_size, is_causal, for_backward)
    tensors = repeat_call(facts, (block_indices, visible), run)
    return Plan.of(tensors, layout.sizes, not is_causal)


def _fill(
    plan: Plan,
    block_indices: Tensor,
    visible: Tensor | None,
    block_size: int,
    layout: MaskLayout,
    is_causal: bool,
) -> None:
    query_len, key_len, epoch_len = layout.query_len, layout.key_len, layout.epoch_len
    rows, num_epochs = layout.row_batches * layout.row_heads, layout.num_epochs
    members, num_words = layout.members, epoch_len // 32
    num_blocks, num_entries = triton.cdiv(key_len, block_size), block_indices.shape[3]
    device = block_indices.device
    words = torch.empty(
        rows, members, num_epochs * num_words, num_blocks, dtype=torch.int32, device=device
    )
    looked_at = min(_SEEN, max(32, triton.next_power_of_2(key_len)))
    num_parts = triton.cdiv(key_len, looked_at)
    shown = words.new_empty(rows * num_epochs, num_parts * looked_at // 32)
    launch(mark_kernel, rows * members * num_epochs * num_words)(
        block_indices, words, query_len, key_len, epoch_len, num_epochs, num_entries, num_blocks,
        block_size, *broadcast_strides(block_indices, layout.row_heads, members),
        ROW_HEADS=layout.row_heads, MEMBERS=members, CAUSAL=is_causal,
        CLEARED=min(_CLEARED, max(32, triton.next_power_of_2(num_blocks))),
        BLOCK=min(_LISTED, triton.next_power_of_2(max(1, num_entries))), num_warps=4,
    )  # fmt: skip
    strides = (0,) * 5 if visible is None else broadcast_strides(visible, 1, 1)
    launch(seen_kernel, rows * num_epochs * num_parts)(
        words, None if visible is None else visible.view(torch.uint8), shown, query_len, key_len,
        epoch_len, num_epochs, num_parts, num_blocks, block_size, strides[0], strides[4],
        ROW_HEADS=layout.row_heads, MEMBERS=members, CAUSAL=is_causal,
        HAS_VISIBLE=visible is not None, BLOCK=looked_at, num_warps=4,
    )  # fmt: skip
    fill_slots(plan, layout, shown, 1)
    launch(spread_kernel, rows * num_epochs * (layout.num_slots // SLOT_ALIGN))(
        words, plan.slot_key, plan.counts, plan.slot_bits, plan.block_bits, query_len, key_len,
        epoch_len, num_epochs, layout.num_slots, num_blocks, block_size, MEMBERS=members,
        CAUSAL=is_causal, STEP=min(8, num_words & -num_words), BLOCK=SLOT_ALIGN, num_warps=4,
    )  # fmt: skip
