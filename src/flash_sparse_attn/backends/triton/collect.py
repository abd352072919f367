"""The keys of every epoch of a plan: a list of the old ones, and the slots of the new ones.

A key is *old* to an epoch if its place in the list says when it is visible: in a causal selection
if it entered before the epoch (and is not kept for being recent), else if it never leaves.
Symbols as in `plan.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...intervals import NEVER, KeySelection
from ...varlen import PackedSequences
from .config import SLOT_ALIGN
from .launch import launch
from .layout import Layout
from .tiles import NUMBERS, epoch_bounds, row_and_rest

_NEVER = tl.constexpr(NEVER)
_ALIGN = tl.constexpr(SLOT_ALIGN)

_COARSE = 1 << 15  # queries of a coarse epoch,
_LEVEL = 8  # of which so many make one of the next level
_BLOCK = 4096  # keys looked at together
_PROGRAMS = 256  # programs of 16 warps that keep a GPU busy
_PIECE = 1 << 16  # keys that one program looks at, if those before it are many


@triton.jit(do_not_specialize=NUMBERS)
def _epochs_kernel(ptr_cu_q, ptr_cu_k, ptr_epochs, epoch_len, num_sequences):
    """One program per epoch. Epoch ``m`` of sequence ``n`` has number ``cu_q[n] // L + n + m``."""
    i_epoch = tl.program_id(0)
    seq = 0
    size = num_sequences
    while size > 1:
        half = size // 2
        begin = tl.load(ptr_cu_q + seq + half) // epoch_len + seq + half
        seq = tl.where(begin <= i_epoch, seq + half, seq)
        size -= half
    q_begin = tl.load(ptr_cu_q + seq)
    q_end = tl.load(ptr_cu_q + seq + 1)
    k_begin = tl.load(ptr_cu_k + seq)
    num_keys = tl.load(ptr_cu_k + seq + 1) - k_begin
    epoch_0 = q_begin // epoch_len + seq
    first = q_begin + (i_epoch - epoch_0) * epoch_len
    num = tl.maximum(tl.minimum(epoch_len, q_end - first), 0)
    ptr = ptr_epochs + i_epoch * 8
    tl.store(ptr, first)
    tl.store(ptr + 1, num)
    tl.store(ptr + 2, first - q_end + num_keys)
    tl.store(ptr + 3, k_begin)
    tl.store(ptr + 4, num_keys)
    tl.store(ptr + 5, epoch_0)
    tl.store(ptr + 6, seq)
    tl.store(ptr + 7, 0)


@triton.jit
def sequence_of(i_epoch, ptr_epochs, key_len, PACKED: tl.constexpr):
    """First key, number of keys, first epoch and number of the sequence of an epoch."""
    if PACKED:
        ptr = ptr_epochs + i_epoch * 8
        return tl.load(ptr + 3), tl.load(ptr + 4), tl.load(ptr + 5), tl.load(ptr + 6)
    else:
        return 0, key_len, 0, 0


@triton.jit
def pad_slots(ptr_key, ptr_start, ptr_expiry, used):
    """Fill the last block of slots with slots that nobody sees."""
    offs = tl.arange(0, _ALIGN)  # [ALIGN]
    slot = used // _ALIGN * _ALIGN + offs
    mask = (slot >= used) & (used % _ALIGN != 0)
    tl.store(ptr_key + slot, -1, mask=mask)
    tl.store(ptr_start + slot, _NEVER, mask=mask)
    tl.store(ptr_expiry + slot, 0, mask=mask)


@triton.jit
def _recent_begin(ptr_mask, at, keep_recent, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """The oldest key that position `at` sees for being recent; with a mask only real keys count."""
    if HAS_MASK:
        need = tl.maximum(keep_recent, 1)
        last = at
        begin = 0
        while (need > 0) & (last >= 0):
            key = last - tl.arange(0, BLOCK)  # [BLOCK] newest first
            real = (tl.load(ptr_mask + key, mask=key >= 0, other=0) != 0).to(tl.int32)
            found = tl.sum((tl.cumsum(real, 0) < need).to(tl.int32), 0)
            begin = tl.where(found < BLOCK, last - found, begin)
            need = tl.where(found < BLOCK, 0, need - tl.sum(real, 0))
            last -= BLOCK
        return begin
    else:
        return at - tl.maximum(keep_recent, 1) + 1


@triton.jit
def _is_old(
    ptr_start, ptr_expiry, key, mask, low, old_limit, RANKED: tl.constexpr, CAUSAL: tl.constexpr
):
    """Which of these keys belong to the old part of an epoch that begins at `low`."""
    expiry = tl.load(ptr_expiry + key, mask=mask, other=0)
    if RANKED:
        return mask & (expiry > low)
    else:
        start = tl.load(ptr_start + key, mask=mask, other=_NEVER)
        if CAUSAL:
            start = tl.maximum(start, key)
        return mask & (expiry == _NEVER) & (start <= old_limit)


@triton.jit
def _write_new(
    ptr_start, ptr_expiry, ptr_key, ptr_slot_start, ptr_slot_expiry, ptr_entered, key_0, position,
    num, low, high, new_begin, new_end, old_limit, capacity,
    RANKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the new slots of an epoch and how many each query may see; returns their number."""
    offs = tl.arange(0, BLOCK)  # [BLOCK]
    entered = 0
    for i in range(new_begin, high + 1, BLOCK):
        key = i + offs
        inside = (key >= 0) & (key < new_end)
        expiry = tl.load(ptr_expiry + key, mask=inside, other=0)
        start = tl.load(ptr_start + key, mask=inside, other=0)
        if CAUSAL:
            start = tl.maximum(start, key)
        keep = inside & (expiry > tl.maximum(start, low)) & (start <= high)
        if not RANKED:
            keep = keep & ((expiry != _NEVER) | (start > old_limit))
        ones = keep.to(tl.int32)
        inclusive = entered + tl.cumsum(ones, 0)
        slot = inclusive - 1
        keep = keep & (slot < capacity)
        tl.store(ptr_key + slot, key_0 + key, mask=keep)
        tl.store(ptr_slot_start + slot, start, mask=keep)
        tl.store(ptr_slot_expiry + slot, expiry, mask=keep)
        if CAUSAL:
            offs_query = key - position
            tl.store(ptr_entered + offs_query, inclusive, mask=(offs_query >= 0) & (key <= high))
        entered += tl.sum(ones, 0)
    if not CAUSAL:
        for i in range(0, num, BLOCK):
            tl.store(ptr_entered + i + offs, tl.zeros_like(offs) + entered, mask=i + offs < num)
    pad_slots(ptr_key, ptr_slot_start, ptr_slot_expiry, entered)
    return entered


@triton.jit(do_not_specialize=NUMBERS)
def collect_kernel(
    ptr_start, ptr_expiry, ptr_mask, ptr_coarse, ptr_coarse_counts, ptr_epochs, ptr_list, ptr_key,
    ptr_slot_start, ptr_slot_expiry, ptr_counts, ptr_entered, query_len, key_len, epoch_len,
    num_epochs, old_slots, num_slots, coarse_len, num_coarse, keep_recent, piece_len, num_pieces,
    HEADS_KV: tl.constexpr,
    HAS_MASK: tl.constexpr,
    RANKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    FROM_COARSE: tl.constexpr,
    ONLY_OLD: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program per (row, epoch, piece): a piece of the list of old keys, by position.

    A piece first counts the keys before its own, which needs no order and so no waiting. The last
    piece writes the new slots instead.
    """
    i_row, rest = row_and_rest(num_epochs * num_pieces)
    i_epoch = num_epochs - 1 - rest // num_pieces  # those with the longest past first
    i_piece = rest % num_pieces
    first, num, position = epoch_bounds(i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED)
    key_0, num_keys, epoch_0, seq = sequence_of(i_epoch, ptr_epochs, key_len, PACKED)
    ptr_start += i_row * key_len + key_0
    ptr_expiry += i_row * key_len + key_0
    ptr_counts += (i_row * num_epochs + i_epoch) * 2
    offs = tl.arange(0, BLOCK)  # [BLOCK]

    low, high = position, position + num - 1
    if not CAUSAL:
        low, high = tl.maximum(low, 0), tl.maximum(high, 0)
    if HAS_MASK:
        ptr_mask += i_row // HEADS_KV * key_len + key_0
    new_begin = _recent_begin(ptr_mask, low, keep_recent, HAS_MASK, BLOCK)
    new_end = tl.where(num > 0, tl.minimum(high + 1, num_keys), 0)
    if RANKED:
        old_end = tl.minimum(new_begin, num_keys)
    elif CAUSAL:
        old_end = new_end
    else:
        old_end = num_keys
    old_end = tl.where(num > 0, old_end, 0)
    old_limit = high if CAUSAL else low

    old_pieces = num_pieces
    if not ONLY_OLD:
        old_pieces = num_pieces - 1
        if i_piece == old_pieces:
            slot_base = (i_row * num_epochs + i_epoch) * num_slots + old_slots
            entered = _write_new(
                ptr_start, ptr_expiry, ptr_key + slot_base, ptr_slot_start + slot_base,
                ptr_slot_expiry + slot_base, ptr_entered + i_row * query_len + first, key_0,
                position, num, low, high, new_begin, new_end, old_limit, num_slots - old_slots,
                RANKED, CAUSAL, BLOCK,
            )  # fmt: skip
            tl.store(ptr_counts + 1, entered)
    if i_piece < old_pieces:
        ptr_list += (i_row * num_epochs + i_epoch) * old_slots
        scan_begin = 0
        listed = 0
        if FROM_COARSE:
            within = (i_epoch - epoch_0) * epoch_len
            i_coarse = (first - within) // coarse_len + seq + within // coarse_len
            coarse_at = low - within % coarse_len
            scan_begin = _recent_begin(ptr_mask, coarse_at, keep_recent, HAS_MASK, BLOCK)
            scan_begin = tl.maximum(scan_begin, 0)
            ptr_coarse += (i_row * num_coarse + i_coarse) * old_slots
            if num > 0:
                listed = tl.load(ptr_coarse_counts + (i_row * num_coarse + i_coarse) * 2)
        begin = scan_begin + i_piece * piece_len
        end = tl.minimum(begin + piece_len, old_end)
        if (i_piece == 0) | (begin < old_end):
            before = tl.zeros([BLOCK], tl.int32)
            count = 0
            if FROM_COARSE:
                for i in tl.range(0, listed, BLOCK, num_stages=STAGES):
                    used = i + offs < listed
                    key = tl.load(ptr_coarse + i + offs, mask=used, other=0)
                    keep = _is_old(
                        ptr_start, ptr_expiry, key, used, low, old_limit, RANKED, CAUSAL
                    ).to(tl.int32)
                    if i_piece == 0:
                        place = count + tl.cumsum(keep, 0) - 1
                        tl.store(ptr_list + place, key, mask=(keep > 0) & (place < old_slots))
                        count += tl.sum(keep, 0)
                    else:
                        before += keep
            for i in tl.range(scan_begin, begin, BLOCK, num_stages=STAGES):
                key = i + offs
                before += _is_old(
                    ptr_start, ptr_expiry, key, key < begin, low, old_limit, RANKED, CAUSAL
                ).to(tl.int32)
            count += tl.sum(before, 0)
            for i in tl.range(begin, end, BLOCK, num_stages=STAGES):
                key = i + offs
                keep = _is_old(
                    ptr_start, ptr_expiry, key, key < end, low, old_limit, RANKED, CAUSAL
                ).to(tl.int32)
                place = count + tl.cumsum(keep, 0) - 1
                tl.store(ptr_list + place, key, mask=(keep > 0) & (place < old_slots))
                count += tl.sum(keep, 0)
            if end >= old_end:
                tl.store(ptr_counts, tl.minimum(count, old_slots))


def distinct_borders(packed: PackedSequences) -> tuple[Tensor, ...]:
    """The borders of queries and of keys, once if they are the same: often they are, and a call
    that is repeated could not tell two tensors at one address apart."""
    queries, keys = packed.cu_seqlens_q, packed.cu_seqlens_k
    return (queries,) if queries.data_ptr() == keys.data_ptr() else (queries, keys)


def epoch_table(packed: PackedSequences, total_q: int, length: int) -> Tensor:
    """The table of the epochs of a length; see `Plan.epochs`."""
    num_sequences = packed.cu_seqlens_q.numel() - 1
    num_epochs = total_q // length + num_sequences
    table = torch.empty(num_epochs, 8, dtype=torch.int32, device=packed.cu_seqlens_q.device)
    launch(_epochs_kernel, num_epochs)(
        packed.cu_seqlens_q, packed.cu_seqlens_k, table, length, num_sequences
    )
    return table


def collect(
    selection: KeySelection,
    layout: Layout,
    mask: Tensor | None,
    packed: PackedSequences | None,
    table: Tensor | None,
    facts: dict[str, Any],
    results: tuple[Tensor, ...],
) -> None:
    """List the old keys of every epoch, and write its new slots.

    Args:
        selection: Intervals of the keys.
        layout: Sizes of the plan.
        mask: Bool ``[B, K]`` (packed: ``[total_k]``), contiguous, False for padding, where recent
            keys are kept: padding does not count among them.
        packed: Borders of packed sequences.
        table: Their epochs, from `epoch_table`.
        facts: The constants ``RANKED``, ``CAUSAL`` and ``PACKED``.
        results: The list of old keys ``[R, E, old_slots]``; keys, starts and expiries of slots;
            counts; entered.
    """
    query_len, key_len = layout.query_len, layout.key_len
    rows = selection.start.numel() // key_len
    recent = selection.keep_recent
    inputs = (selection.start, selection.expiry, mask)
    constants = {
        "HEADS_KV": selection.start.shape[-2], "HAS_MASK": mask is not None,
        "BLOCK": _BLOCK, "STAGES": 3, "num_warps": 16, **facts,
    }  # fmt: skip

    def pieces(num_epochs: int, reach: int) -> tuple[int, int]:
        """Keys of a piece, and pieces of an epoch that looks at `reach` keys."""
        # Pieces share the wait where there are few epochs. Where there are many they only add
        # work: at 8 x 16 epochs, 9 pieces took 0.041 ms and one 0.028. With padding the recent
        # keys may reach back any distance.
        if mask is not None:
            return key_len, 1
        number = max(_PROGRAMS // (rows * num_epochs), reach // _PIECE, 1)
        number = min(number, triton.cdiv(reach, _BLOCK))
        return triton.cdiv(triton.cdiv(reach, number), _BLOCK) * _BLOCK, number

    lengths: list[int] = []
    length = _COARSE
    while facts["RANKED"] and query_len > 2 * length > 2 * layout.epoch_len:
        lengths.insert(0, length)
        length *= _LEVEL
    coarse: tuple[Any, ...] = (None, None)
    coarse_len, num_coarse, reach = _COARSE, 0, key_len
    for length in lengths:
        num = triton.cdiv(query_len, length)
        level_table = None
        if packed is not None:
            level_table = epoch_table(packed, query_len, length)
            num = level_table.shape[0]
        piece_len, num_pieces = pieces(num, reach)
        shape = (rows, num, layout.old_slots)
        level = torch.empty(shape, dtype=torch.int32, device=selection.start.device)
        counts = torch.empty((rows, num, 2), dtype=torch.int32, device=level.device)
        launch(collect_kernel, rows * num * num_pieces)(
            *inputs, *coarse, level_table, level, None, None, None, counts, None, query_len,
            key_len, length, num, layout.old_slots, layout.num_slots, coarse_len, num_coarse,
            recent, piece_len, num_pieces, FROM_COARSE=num_coarse > 0, ONLY_OLD=True, **constants,
        )  # fmt: skip
        coarse, coarse_len, num_coarse, reach = (level, counts), length, num, length
    piece_len, num_pieces = pieces(layout.num_epochs, reach)
    launch(collect_kernel, rows * layout.num_epochs * (num_pieces + 1))(
        *inputs, *coarse, table, *results, query_len, key_len, layout.epoch_len, layout.num_epochs,
        layout.old_slots, layout.num_slots, coarse_len, num_coarse, recent, piece_len,
        num_pieces + 1, FROM_COARSE=num_coarse > 0, ONLY_OLD=False, **constants,
    )  # fmt: skip
