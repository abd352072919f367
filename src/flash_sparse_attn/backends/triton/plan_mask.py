"""Plans of calls without a selection: from a bool mask, or from nothing.

A mask over queries and keys becomes bits, see `mask_bits.py`. A mask over keys alone keeps the keys
that it shows, in one list for all epochs. Without a mask, and where keys are so few that a plan
would cost more than it saves, the slots are the keys themselves.

Broadcast dimensions of a mask are read once and never expanded. Symbols as in `plan.py`.
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
from .inputs import broadcast_strides
from .launch import launch, repeat_call
from .mask_bits import fill_bits
from .masks import MaskLayout
from .select_rows import sequence_of
from .tiles import NUMBERS, row_and_rest

_NEVER = tl.constexpr(NEVER)

_COUNTED = 16384  # bytes of a mask over keys that one program counts together
_OWNED = 1024  # keys of a mask over keys that one program gives slots


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
    entry and head of the mask, and room for as much again while they are made.

    Args:
        mask: Bool, on the GPU.
        layout: For the mask and the call; not of the kind ``"keys"``.
        is_causal: Whether keys after a query's position are hidden as well.
        for_backward: Also list the slots of every key.

    Returns:
        The plan, with the lists of the layout.
    """

    def run() -> list[Tensor | None]:
        tensors = layout.empty(mask.device, for_backward)
        plan = Plan.of(tensors, layout.sizes, not is_causal)
        if layout.kind == "shown":
            _fill_shown(plan, mask, layout, is_causal)
        else:
            fill_bits(plan, mask, layout, is_causal)
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
