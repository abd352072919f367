"""Which blocks of slots a query tile walks under a bool mask, and which tiles a block of slots.

From the bits of a plan, for the tile sizes of one kernel: first the blocks that are visible whole,
then those that are in part. What nobody sees is on no list, and costs nothing.

Sliding windows, documents and prefixes show every epoch a run of neighbouring keys. Then the list
of a tile says where it begins, and whole blocks of keys are loaded as they lie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from .inputs import words_of_tile
from .launch import launch
from .tiles import NUMBERS, row_and_rest

_SIZE = 512  # blocks or tiles looked at together


@triton.jit
def _flags(
    ptr_bits, tile, block, num_queries, num_words, num_slots, live,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether any row of a tile sees any slot of a block, and whether all see all. One is a vector.

    A block smaller than the 32 slots of a flag takes that of all 32, which is on the safe side.
    """
    begin = tile * BLOCK_M // GROUP
    end = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, num_queries)
    sees_any = live & (begin < 0)
    sees_all = live & (begin < end)
    PARTS: tl.constexpr = (BLOCK_N + 31) // 32
    for step in tl.static_range(WORDS):
        word = begin // 32 + step
        low = tl.minimum(tl.maximum(begin - word * 32, 0), 32)
        high = tl.minimum(tl.maximum(end - word * 32, low), 32)
        asked = (((low * 0 + 1).to(tl.int64) << high) - ((low * 0 + 1).to(tl.int64) << low)).to(
            tl.int32
        )
        for member in tl.static_range(MEMBERS):
            for part in tl.static_range(PARTS):
                index = (member * num_words + word) * (num_slots // 32) + block * BLOCK_N // 32
                ptrs = ptr_bits + (index + part) * 2
                mask = live & (high > low)
                any_bits = tl.load(ptrs, mask=mask, other=0)
                all_bits = tl.load(ptrs + 1, mask=mask, other=-1)
                sees_any = sees_any | ((any_bits & asked) != 0)
                sees_all = sees_all & ((all_bits & asked) == asked)
    return sees_any, sees_all


@triton.jit(do_not_specialize=NUMBERS)
def list_kernel(
    ptr_bits, ptr_key, ptr_counts, ptr_lists, query_len, epoch_len, num_epochs, num_slots, num_tiles,
    num_owners, num_entries,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OF_TILES: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """One program per (row of the plan, epoch, tile or block): its numbers of full and of all
    entries, for a tile the first key of the epoch's run or -1, then the entries."""
    HEAD: tl.constexpr = 3 if OF_TILES else 2
    i_row, rest = row_and_rest(num_epochs * num_owners)
    i_epoch, owner = rest // num_owners, rest % num_owners
    i_list = i_row * num_epochs + i_epoch
    num_queries = tl.minimum(epoch_len, query_len - i_epoch * epoch_len)
    num_words = epoch_len // 32
    count = tl.load(ptr_counts + i_list * 2)
    used = tl.cdiv(count, BLOCK_N)
    size = used if OF_TILES else tl.where(owner < used, num_tiles, 0)
    ptr_bits += i_list * MEMBERS * num_words * (num_slots // 32) * 2
    ptr_lists += (i_list * num_owners + owner) * (num_entries + HEAD)
    num_full = 0
    for i in range(0, size, SIZE):
        item = i + tl.arange(0, SIZE)  # [SIZE]
        tile = owner if OF_TILES else item
        block = item if OF_TILES else owner
        _, full = _flags(
            ptr_bits, tile, block, num_queries, num_words, num_slots, item < size, GROUP, MEMBERS,
            WORDS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        rank = tl.cumsum(full.to(tl.int32), 0)
        tl.store(ptr_lists + HEAD - 1 + num_full + rank, item, mask=full)
        num_full += tl.max(rank, 0)
    num_all = num_full
    for i in range(0, size, SIZE):
        item = i + tl.arange(0, SIZE)  # [SIZE]
        tile = owner if OF_TILES else item
        block = item if OF_TILES else owner
        some, full = _flags(
            ptr_bits, tile, block, num_queries, num_words, num_slots, item < size, GROUP, MEMBERS,
            WORDS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        some = some & (full == 0)
        rank = tl.cumsum(some.to(tl.int32), 0)
        tl.store(ptr_lists + HEAD - 1 + num_all + rank, item, mask=some)
        num_all += tl.max(rank, 0)
    tl.store(ptr_lists, num_full)
    tl.store(ptr_lists + 1, num_all)
    if OF_TILES:
        ptr_key += i_list * num_slots
        first = tl.load(ptr_key)
        last = tl.load(ptr_key + tl.maximum(count - 1, 0))
        tl.store(ptr_lists + 2, tl.where((count > 0) & (last - first == count - 1), first, -1))


def tile_lists(plan: Plan, group: int, num_tiles: int, block_m: int, block_n: int) -> Tensor | None:
    """The blocks of every tile, int32 ``[rows, E, tiles, 3 + blocks]``; ``None`` without bits."""
    return _lists(plan, group, num_tiles, block_m, block_n, True)


def slot_lists(plan: Plan, group: int, num_tiles: int, block_m: int, block_n: int) -> Tensor | None:
    """The tiles of every block, int32 ``[rows, E, blocks, 2 + tiles]``; ``None`` without bits."""
    return _lists(plan, group, num_tiles, block_m, block_n, False)


def _lists(
    plan: Plan, group: int, num_tiles: int, block_m: int, block_n: int, of_tiles: bool
) -> Tensor | None:
    if plan.slot_bits is None or plan.slot_key is None:
        return None
    num_blocks = plan.num_slots // block_n
    num_owners, num_entries = (num_tiles, num_blocks) if of_tiles else (num_blocks, num_tiles)
    rows = plan.slot_key.shape[0] * plan.slot_key.shape[1]
    lists = torch.empty(
        rows, plan.num_epochs, num_owners, (3 if of_tiles else 2) + num_entries, dtype=torch.int32,
        device=plan.slot_key.device,
    )  # fmt: skip
    launch(list_kernel, rows * plan.num_epochs * num_owners)(
        plan.block_bits, plan.slot_key, plan.counts, lists, plan.query_len, plan.epoch_len, plan.num_epochs,
        plan.num_slots, num_tiles, num_owners, num_entries, GROUP=group, MEMBERS=plan.members,
        WORDS=words_of_tile(block_m, group), BLOCK_M=block_m, BLOCK_N=block_n, OF_TILES=of_tiles,
        SIZE=min(_SIZE, triton.next_power_of_2(num_entries)), num_warps=1,
    )  # fmt: skip
    return lists
