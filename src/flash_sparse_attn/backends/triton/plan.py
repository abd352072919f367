"""Plans on the GPU: the key slots of every epoch from the intervals of a selection.

1. `_epochs_kernel` (packed sequences only) writes the table of epochs.
2. `collect.py` lists the old keys of every epoch and writes its new slots. Long sequences do it
   twice, first for coarse epochs, so that no epoch reads more than one coarse epoch and the
   survivors at its start.
3. `_sort_kernel` sorts the survivors in runs, and `_place_kernel` merges the runs into slots and
   counts how many of them each query sees.
4. For backward, `_uses_kernel` counts the epochs of every key and of all keys before it, and
   `_link_kernel` lists its slots.

Nothing is read back by the host: every size is a bound from shapes.

Symbols: ``R`` rows (batch x KV heads), ``E`` epochs of ``L`` queries, ``P`` slots of an epoch, of
which the old part has ``old_slots``. Positions count from the start of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from .collect import collect, distinct_borders, epoch_table, pad_slots, sequence_of
from .launch import launch, repeat_call
from .layout import Layout
from .select_rows import sequence_of as sequence_of_index
from .tiles import NUMBERS, count_prefix, epoch_bounds, row_and_rest

if TYPE_CHECKING:
    from ...intervals import KeySelection
    from ...varlen import PackedSequences

_NO_KEY = tl.constexpr(-(2**63))
_RUN = 1024  # keys sorted by one program
_USES = 1024  # keys whose uses are counted together,
_PIECES = 1024  # and how many programs do so at most: each adds up what those before it counted


@triton.jit(do_not_specialize=NUMBERS)
def _sort_kernel(
    ptr_score,
    ptr_list,
    ptr_counts,
    ptr_epochs,
    ptr_sorted,
    key_len,
    num_epochs,
    old_slots,
    keep_first,
    num_runs,
    PACKED: tl.constexpr,
    RUN: tl.constexpr,
):
    """One program per (row, epoch, run): a run of listed keys, best first, as order key and key."""
    i_row, rest = row_and_rest(num_epochs * num_runs)
    i_epoch, i_run = rest // num_runs, rest % num_runs
    count = tl.load(ptr_counts + (i_row * num_epochs + i_epoch) * 2)
    if i_run * RUN < count:
        key_0, _, _, _ = sequence_of(i_epoch, ptr_epochs, key_len, PACKED)
        index = i_run * RUN + tl.arange(0, RUN)  # [RUN]
        used = index < count
        key = tl.load(
            ptr_list + (i_row * num_epochs + i_epoch) * old_slots + index, mask=used, other=0
        )
        score = tl.load(ptr_score + i_row * key_len + key_0 + key, mask=used, other=0.0)
        bits = tl.where(score == 0.0, 0, score.to(tl.int32, bitcast=True))
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        order = tl.where(score != score, -0x7FFFFFFF, order)
        # The first keys are listed first, stay for ever and so rank above all others.
        order = tl.where(index < keep_first, 0x7FFFFFFF, order)
        packed = (order.to(tl.int64) << 32) | key.to(tl.int64)
        packed = tl.sort(tl.where(used, packed, _NO_KEY), descending=True)
        out = ((i_row * num_epochs + i_epoch) * num_runs + i_run) * RUN + tl.arange(0, RUN)
        tl.store(ptr_sorted + out, packed)


@triton.jit(do_not_specialize=NUMBERS)
def _place_kernel(
    ptr_start,
    ptr_expiry,
    ptr_list,
    ptr_sorted,
    ptr_counts,
    ptr_epochs,
    ptr_key,
    ptr_slot_start,
    ptr_slot_expiry,
    ptr_visible,
    query_len,
    key_len,
    epoch_len,
    num_epochs,
    old_slots,
    num_slots,
    num_runs,
    num_bits,
    SORTED: tl.constexpr,
    RANKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    RUN: tl.constexpr,
):
    """One program per (row, epoch): old slots in order, and how many of them each query sees."""
    i_row, i_epoch = row_and_rest(num_epochs)
    first, num, position = epoch_bounds(i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED)
    key_0, _, _, _ = sequence_of(i_epoch, ptr_epochs, key_len, PACKED)
    count = tl.load(ptr_counts + (i_row * num_epochs + i_epoch) * 2)
    slot_base = (i_row * num_epochs + i_epoch) * num_slots
    ptr_key += slot_base
    ptr_slot_start += slot_base
    ptr_slot_expiry += slot_base
    ptr_list += (i_row * num_epochs + i_epoch) * old_slots
    if SORTED:
        ptr_sorted += (i_row * num_epochs + i_epoch) * num_runs * RUN
    ptr_start += i_row * key_len + key_0
    ptr_expiry += i_row * key_len + key_0

    offs = tl.arange(0, RUN)  # [RUN]
    for i in range(0, count, RUN):
        used = i + offs < count
        slot = i + offs
        if SORTED:
            mine = tl.load(ptr_sorted + i + offs, mask=used, other=_NO_KEY)
            key = (mine & 0xFFFFFFFF).to(tl.int32)
            slot = offs
            for other in range(0, count, RUN):
                if other != i:
                    length = tl.minimum(count - other, RUN)
                    slot += count_prefix(ptr_sorted + other, length, mine, 11, "above", RUN)
        else:
            key = tl.load(ptr_list + i + offs, mask=used, other=0)
        start = tl.load(ptr_start + key, mask=used, other=0)
        expiry = tl.load(ptr_expiry + key, mask=used, other=0)
        if CAUSAL:
            start = tl.maximum(start, key)
        tl.store(ptr_key + slot, key_0 + key, mask=used)
        tl.store(ptr_slot_start + slot, start, mask=used)
        tl.store(ptr_slot_expiry + slot, expiry, mask=used)
    pad_slots(ptr_key, ptr_slot_start, ptr_slot_expiry, count)

    # What this program's other threads have just written is read back.
    tl.debug_barrier()
    ptr_visible += i_row * query_len + first
    for i in range(0, num, RUN):
        at = position + i + offs
        if not CAUSAL:
            at = tl.maximum(at, 0)
        if RANKED:
            seen = count_prefix(ptr_slot_expiry, count, at, num_bits, "above", RUN)
        else:
            seen = count_prefix(ptr_slot_start, count, at, num_bits, "up to", RUN)
        tl.store(ptr_visible + i + offs, seen, mask=i + offs < num)


@triton.jit(do_not_specialize=NUMBERS)
def _uses_kernel(
    ptr_start,
    ptr_expiry,
    ptr_cu_q,
    ptr_cu_k,
    ptr_totals,
    ptr_use_end,
    query_len,
    key_len,
    epoch_len,
    num_sequences,
    num_items,
    piece_len,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    ENDS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per piece of the keys of all rows: how many epochs its keys are part of.

    Of all its keys together; with `ENDS`, which has the totals of all pieces, the sums up to each.
    """
    i_piece = tl.program_id(0)
    piece = i_piece.to(tl.int64) * piece_len
    offs = tl.arange(0, BLOCK)  # [BLOCK]
    totals = tl.zeros([BLOCK], tl.int64)
    before = piece * 0
    if ENDS:
        others = tl.arange(0, PIECES)  # [PIECES]
        before += tl.sum(tl.load(ptr_totals + others, mask=others < i_piece, other=0), 0)
    for i in range(0, piece_len, BLOCK):
        index = piece + i + offs
        inside = index < num_items
        key = ((piece + i) % key_len).to(tl.int32) + offs
        key = key % key_len  # of its row
        shift, num_keys = key * 0 + (key_len - query_len), key * 0 + key_len
        if PACKED:
            seq = sequence_of_index(ptr_cu_k, num_sequences, key, 1, False)
            key_0 = tl.load(ptr_cu_k + seq)
            num_keys = tl.load(ptr_cu_k + seq + 1) - key_0
            # Without queries the shift is the number of keys, and nothing is beyond that.
            shift = num_keys - tl.load(ptr_cu_q + seq + 1) + tl.load(ptr_cu_q + seq)
            key -= key_0
            inside = inside & (key < num_keys)
        start = tl.load(ptr_start + index, mask=inside, other=0)
        expiry = tl.load(ptr_expiry + index, mask=inside, other=0)
        if CAUSAL:
            start = tl.maximum(start, key)
        stop = tl.minimum(expiry, num_keys)
        from_epoch = tl.maximum(start - shift, 0) // epoch_len
        if not CAUSAL:
            from_epoch = tl.where(start <= 0, 0, from_epoch)
        to_epoch = (stop - 1 - shift) // epoch_len
        used = inside & (stop > start) & (stop > shift)
        uses = tl.where(used, to_epoch - from_epoch + 1, 0).to(tl.int64)
        if ENDS:
            tl.store(ptr_use_end + index, before + tl.cumsum(uses, 0), mask=index < num_items)
            before += tl.sum(uses, 0)
        else:
            totals += uses
    if not ENDS:
        tl.store(ptr_totals + i_piece, tl.sum(totals, 0))


@triton.jit(do_not_specialize=NUMBERS)
def _link_kernel(
    ptr_key,
    ptr_slot_expiry,
    ptr_counts,
    ptr_epochs,
    ptr_use_end,
    ptr_use_slot,
    query_len,
    key_len,
    epoch_len,
    num_epochs,
    old_slots,
    num_slots,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (row, epoch): enter the epoch's slots among the uses of their keys."""
    i_row, i_epoch = row_and_rest(num_epochs)
    _, _, position = epoch_bounds(i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED)
    _, num_keys, epoch_0, _ = sequence_of(i_epoch, ptr_epochs, key_len, PACKED)
    shift = position - (i_epoch - epoch_0) * epoch_len
    slot_base = (i_row * num_epochs + i_epoch) * num_slots
    for part in tl.static_range(2):
        used = tl.load(ptr_counts + (i_row * num_epochs + i_epoch) * 2 + part)
        for i in range(0, used, BLOCK):
            offs = i + tl.arange(0, BLOCK)  # [BLOCK]
            slot = part * old_slots + offs
            key = tl.load(ptr_key + slot_base + slot, mask=offs < used, other=0)
            expiry = tl.load(ptr_slot_expiry + slot_base + slot, mask=offs < used, other=0)
            last = epoch_0 + (tl.minimum(expiry, num_keys) - 1 - shift) // epoch_len
            end = tl.load(ptr_use_end + i_row * key_len + key, mask=offs < used, other=0)
            place = end - 1 - (last - i_epoch)
            tl.store(ptr_use_slot + place, i_epoch * num_slots + slot, mask=offs < used)


def build_plan(
    selection: KeySelection,
    query_len: int,
    *,
    is_causal: bool,
    packed: PackedSequences | None = None,
    epoch_len: int | None = None,
    for_backward: bool = True,
) -> Plan:
    """Lay out the epochs and key slots of a call. No host synchronization; capturable in a graph.

    Args:
        selection: Intervals ``[B, Hkv, K]`` (packed: ``[Hkv, total_k]``), contiguous, on the GPU.
        query_len: ``Q`` (packed: ``total_q``), at least 1.
        is_causal: Whether keys after a query's position are hidden.
        packed: Borders of packed sequences.
        epoch_len: Queries of an epoch, a power of two; default by the window.
        for_backward: Also list the uses of every key.
    """
    layout = Layout.of(
        query_len,
        selection.start.shape[-1],
        selection.mode,
        selection.window_size,
        selection.keep_first,
        selection.keep_recent,
        None if packed is None else packed.cu_seqlens_q.numel() - 1,
        epoch_len,
    )
    # Padding counts only where recent keys do.
    mask = selection.key_mask if selection.keep_recent else None
    mask = None if mask is None else mask.contiguous()
    borders = () if packed is None else distinct_borders(packed)
    given = (selection.start, selection.expiry, selection.score, mask, *borders)
    facts = ("plan", layout, selection.mode, selection.keep_first, selection.keep_recent)
    run = partial(_plan, selection, layout, is_causal, mask, packed, for_backward)
    tensors = repeat_call((*facts, is_causal, for_backward), given, run)
    sizes = (layout.epoch_len, layout.old_slots, query_len, layout.key_len)
    return Plan.of(tensors, sizes, not is_causal)


def _plan(
    selection: KeySelection,
    layout: Layout,
    is_causal: bool,
    mask: Tensor | None,
    packed: PackedSequences | None,
    for_backward: bool,
) -> Sequence[Tensor | None]:
    """The tensors of a plan in its order."""
    query_len, key_len = layout.query_len, layout.key_len
    epoch_len, num_epochs = layout.epoch_len, layout.num_epochs
    old_slots, num_slots = layout.old_slots, layout.num_slots
    rows, device = selection.start.numel() // key_len, selection.start.device

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    slots = (rows, num_epochs, num_slots)
    slot_key, slot_start, slot_expiry = ints(*slots), ints(*slots), ints(*slots)
    counts, visible = ints(rows, num_epochs, 2), ints(rows, query_len)
    entered, listed = ints(rows, query_len), ints(rows, num_epochs, old_slots)
    table = None if packed is None else epoch_table(packed, query_len, epoch_len)
    facts = {
        "RANKED": selection.mode == "causal", "CAUSAL": is_causal, "PACKED": packed is not None,
    }  # fmt: skip
    intervals = (selection.start, selection.expiry)
    sizes = (query_len, key_len)
    collect(
        selection, layout, mask, packed, table, facts,
        (listed, slot_key, slot_start, slot_expiry, counts, entered),
    )  # fmt: skip

    ordered, num_runs = None, triton.cdiv(old_slots, _RUN)
    if layout.is_sorted:
        ordered = torch.empty(rows, num_epochs, num_runs, _RUN, dtype=torch.int64, device=device)
        launch(_sort_kernel, rows * num_epochs * num_runs)(
            selection.score, listed, counts, table, ordered, key_len, num_epochs, old_slots,
            selection.keep_first, num_runs, PACKED=packed is not None, RUN=_RUN, num_warps=16,
        )  # fmt: skip
    launch(_place_kernel, rows * num_epochs)(
        *intervals, listed, ordered, counts, table, slot_key, slot_start, slot_expiry, visible,
        *sizes, epoch_len, num_epochs, old_slots, num_slots, num_runs, old_slots.bit_length(),
        SORTED=layout.is_sorted, **facts, RUN=_RUN, num_warps=8,
    )  # fmt: skip

    use_end = use_slot = None
    if for_backward:
        use_end = _use_ends(intervals, packed, layout, is_causal)
        use_slot = ints(rows * num_epochs * num_slots)
        launch(_link_kernel, rows * num_epochs)(
            slot_key, slot_expiry, counts, table, use_end, use_slot, *sizes, epoch_len, num_epochs,
            old_slots, num_slots, PACKED=packed is not None, BLOCK=1024, num_warps=8,
        )  # fmt: skip
    return (
        slot_key, slot_start, slot_expiry, counts, visible, entered, use_end, use_slot, table,
        *(None,) * 3,  # of masks
    )  # fmt: skip


def _use_ends(
    intervals: tuple[Tensor, Tensor],
    packed: PackedSequences | None,
    layout: Layout,
    is_causal: bool,
) -> Tensor:
    """`Plan.use_end`: a sum in two steps, first of pieces and then of what they hold."""
    num_items = intervals[0].numel()
    num_pieces = min(_PIECES, triton.cdiv(num_items, _USES))
    piece_len = triton.cdiv(triton.cdiv(num_items, num_pieces), _USES) * _USES
    use_end = intervals[0].new_empty(num_items, dtype=torch.int64)
    totals = use_end.new_empty(num_pieces)
    borders = (None, None) if packed is None else (packed.cu_seqlens_q, packed.cu_seqlens_k)
    num_sequences = 0 if packed is None else packed.cu_seqlens_q.numel() - 1
    for has_totals in (False, True):
        launch(_uses_kernel, num_pieces)(
            *intervals, *borders, totals, use_end, layout.query_len, layout.key_len,
            layout.epoch_len, num_sequences, num_items, piece_len, CAUSAL=is_causal,
            PACKED=packed is not None, ENDS=has_totals, PIECES=_PIECES, BLOCK=_USES, num_warps=4,
        )  # fmt: skip
    return use_end
