"""Which blocks of slots a query tile walks under a bool mask, and which tiles a block of slots.

From the bits of a plan, for the tile sizes of one kernel: first the blocks that are visible whole,
then those that are in part. What nobody sees is on no list, and costs nothing. A plan holds the
lists for the kernels it was made for; others are made by the passes that read them.

Sliding windows, documents and prefixes show every epoch a run of neighbouring keys. Then the list
of a tile says where it begins, and whole blocks of keys are loaded as they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import ListSizes, Plan
from .inputs import words_of_tile
from .launch import launch
from .tiles import NUMBERS

_AT_ONCE = 3  # lists that one launch makes: those of forward, of dQ, and of dK and dV
_OWNERS = 4  # tiles or blocks that one program takes together
# Of the blocks of an epoch at most, since most hold no slots: for the best 1024 of 32768 keys
# planning takes 0.181 milliseconds without a bound, 0.173 with 4, 0.174 with 8, 16 and 32.
_PROGRAMS = 16
_SIZE = 64  # blocks or tiles that it looks at together for them


@triton.jit
def _flags(
    ptr_bits, tile, block, num_queries, num_words, num_slots, live,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether any row of a tile sees any slot of a block, and whether all see all.

    One of `tile` and `block` is a column, the other a row. A block smaller than the 32 slots of a
    flag takes that of all 32, which is on the safe side.
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
        one = (low * 0 + 1).to(tl.int64)
        asked = ((one << high) - (one << low)).to(tl.int32)
        for member in tl.static_range(MEMBERS):
            for part in tl.static_range(PARTS):
                index = (member * num_words + word) * (num_slots // 32) + block * BLOCK_N // 32
                pair = tl.load(ptr_bits + (index + part), mask=live & (high > low), other=0)
                sees_any = sees_any | ((pair.to(tl.int32) & asked) != 0)
                sees_all = sees_all & (((pair >> 32).to(tl.int32) & asked) == asked)
    return sees_any, sees_all


@triton.jit
def _write_lists(
    i_program, ptr_bits, ptr_key, ptr_counts, ptr_lists, query_len, epoch_len, num_epochs,
    num_slots,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    OF_TILES: tl.constexpr,
    OWNERS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Of some tiles, or blocks, of an epoch: numbers of full and of all entries, for tiles the
    first key of the epoch's run or -1, then the entries."""
    HEAD: tl.constexpr = 3 if OF_TILES else 2
    num_tiles, num_blocks = tl.cdiv(epoch_len * GROUP, BLOCK_M), num_slots // BLOCK_N
    num_owners = num_tiles if OF_TILES else num_blocks
    num_entries = num_blocks if OF_TILES else num_tiles
    num_programs = tl.cdiv(num_owners, OWNERS)
    if not OF_TILES:
        num_programs = tl.minimum(num_programs, PROGRAMS)
    i_list = (i_program // num_programs).to(tl.int64)
    num_queries = tl.minimum(epoch_len, query_len - (i_list % num_epochs).to(tl.int32) * epoch_len)
    num_words = epoch_len // 32
    count = tl.load(ptr_counts + i_list * 2)
    used = tl.cdiv(count, BLOCK_N)
    owners, size = used, num_tiles
    run_0 = -1
    if OF_TILES:
        owners, size = num_owners, used
        ptr_key += i_list * num_slots
        first = tl.load(ptr_key)
        last = tl.load(ptr_key + tl.maximum(count - 1, 0))
        run_0 = tl.where((count > 0) & (last - first == count - 1), first, -1)
    ptr_bits += i_list * MEMBERS * num_words * (num_slots // 32)
    entry = tl.arange(0, SIZE)[None, :]  # [1, SIZE]
    for owner_0 in range(i_program % num_programs * OWNERS, owners, num_programs * OWNERS):
        owner = owner_0 + tl.arange(0, OWNERS)[:, None]  # [OWNERS, 1]
        exists = owner < owners
        ptrs = ptr_lists + (i_list * num_owners + owner) * (num_entries + HEAD)  # [OWNERS, 1]
        num_full = tl.zeros([OWNERS, 1], tl.int32)
        for i in range(0, size, SIZE):
            item = i + entry
            _, full = _flags(
                ptr_bits, owner if OF_TILES else item, item if OF_TILES else owner, num_queries,
                num_words, num_slots, exists & (item < size), GROUP, MEMBERS, WORDS, BLOCK_M,
                BLOCK_N,
            )  # fmt: skip
            rank = tl.cumsum(full.to(tl.int32), 1)
            tl.store(ptrs + HEAD - 1 + num_full + rank, item + owner * 0, mask=full)
            num_full += tl.max(rank, 1)[:, None]
        num_all = num_full
        for i in range(0, size, SIZE):
            item = i + entry
            some, full = _flags(
                ptr_bits, owner if OF_TILES else item, item if OF_TILES else owner, num_queries,
                num_words, num_slots, exists & (item < size), GROUP, MEMBERS, WORDS, BLOCK_M,
                BLOCK_N,
            )  # fmt: skip
            some = some & (full == 0)
            rank = tl.cumsum(some.to(tl.int32), 1)
            tl.store(ptrs + HEAD - 1 + num_all + rank, item + owner * 0, mask=some)
            num_all += tl.max(rank, 1)[:, None]
        tl.store(ptrs, num_full, mask=exists)
        tl.store(ptrs + 1, num_all, mask=exists)
        if OF_TILES:
            tl.store(ptrs + 2, owner * 0 + run_0, mask=exists)


@triton.jit(do_not_specialize=NUMBERS)
def list_kernel(
    ptr_bits, ptr_key, ptr_counts, ptr_lists_0, ptr_lists_1, ptr_lists_2, query_len, epoch_len,
    num_epochs, num_slots, programs_0, programs_1,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_M_0: tl.constexpr,
    BLOCK_M_1: tl.constexpr,
    BLOCK_M_2: tl.constexpr,
    BLOCK_N_0: tl.constexpr,
    BLOCK_N_1: tl.constexpr,
    BLOCK_N_2: tl.constexpr,
    WORDS_0: tl.constexpr,
    WORDS_1: tl.constexpr,
    WORDS_2: tl.constexpr,
    OF_TILES_0: tl.constexpr,
    OF_TILES_1: tl.constexpr,
    OF_TILES_2: tl.constexpr,
    OWNERS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """One program per (list, row of the plan, epoch, some tiles or blocks); see `_write_lists`."""
    i_program = tl.program_id(0)
    if i_program < programs_0:
        _write_lists(
            i_program, ptr_bits, ptr_key, ptr_counts, ptr_lists_0, query_len, epoch_len,
            num_epochs, num_slots, GROUP, MEMBERS, BLOCK_M_0, BLOCK_N_0, WORDS_0, OF_TILES_0,
            OWNERS, PROGRAMS, SIZE,
        )  # fmt: skip
    elif i_program < programs_0 + programs_1:
        if ptr_lists_1 is not None:
            _write_lists(
                i_program - programs_0, ptr_bits, ptr_key, ptr_counts, ptr_lists_1, query_len,
                epoch_len, num_epochs, num_slots, GROUP, MEMBERS, BLOCK_M_1, BLOCK_N_1, WORDS_1,
                OF_TILES_1, OWNERS, PROGRAMS, SIZE,
            )  # fmt: skip
    else:
        if ptr_lists_2 is not None:
            _write_lists(
                i_program - programs_0 - programs_1, ptr_bits, ptr_key, ptr_counts, ptr_lists_2,
                query_len, epoch_len, num_epochs, num_slots, GROUP, MEMBERS, BLOCK_M_2, BLOCK_N_2,
                WORDS_2, OF_TILES_2, OWNERS, PROGRAMS, SIZE,
            )  # fmt: skip


def fill_lists(plan: Plan, lists: Sequence[Tensor], list_sizes: Sequence[ListSizes]) -> None:
    """Fill up to 3 lists of a plan of bits, for one number of heads, in one launch.

    Args:
        plan: With `counts` and `block_bits` filled.
        lists: int32 ``[rows, E, *sizes.shape(...)]``.
        list_sizes: What each is for.
    """
    assert plan.slot_key is not None and plan.block_bits is not None
    num_lists = plan.slot_key.shape[:-1].numel()
    programs = [0] * _AT_ONCE
    constants: dict[str, Any] = {}
    for i in range(_AT_ONCE):
        each = list_sizes[i] if i < len(lists) else None
        if each is not None:
            num_owners, _ = each.shape(plan.epoch_len, plan.num_slots)
            of_list = triton.cdiv(num_owners, _OWNERS)
            programs[i] = num_lists * (of_list if each.of_tiles else min(of_list, _PROGRAMS))
        constants |= {
            f"BLOCK_M_{i}": each and each.block_m,
            f"BLOCK_N_{i}": each and each.block_n,
            f"WORDS_{i}": each and words_of_tile(each.block_m, each.group),
            f"OF_TILES_{i}": each and each.of_tiles,
        }
    outs: list[Any] = [*lists, *[None] * (_AT_ONCE - len(lists))]
    launch(list_kernel, sum(programs))(
        plan.block_bits.view(torch.int64), plan.slot_key, plan.counts, *outs, plan.query_len,
        plan.epoch_len, plan.num_epochs, plan.num_slots, *programs[:2], GROUP=list_sizes[0].group,
        MEMBERS=plan.members, **constants, OWNERS=_OWNERS, PROGRAMS=_PROGRAMS, SIZE=_SIZE,
        num_warps=1,
    )  # fmt: skip


def tile_lists(plan: Plan, group: int, block_m: int, block_n: int) -> Tensor | None:
    """The blocks of every tile, int32 ``[rows, E, tiles, 3 + blocks]``; ``None`` without bits."""
    return _lists_for(plan, ListSizes(True, group, block_m, block_n))


def slot_lists(plan: Plan, group: int, block_m: int, block_n: int) -> Tensor | None:
    """The tiles of every block, int32 ``[rows, E, blocks, 2 + tiles]``; ``None`` without bits."""
    return _lists_for(plan, ListSizes(False, group, block_m, block_n))


def _lists_for(plan: Plan, sizes: ListSizes) -> Tensor | None:
    if plan.slot_bits is None or plan.slot_key is None:
        return None
    ready = plan.lists_for(sizes)
    if ready is not None:
        return ready
    shape = (*plan.slot_key.shape[:-1], *sizes.shape(plan.epoch_len, plan.num_slots))
    lists = torch.empty(shape, dtype=torch.int32, device=plan.slot_key.device)
    fill_lists(plan, [lists], [sizes])
    return lists
