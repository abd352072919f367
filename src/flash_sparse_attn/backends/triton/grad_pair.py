"""The gradient of a bias that depends on the query, summed over what it is broadcast over.

The dQ kernel stores the gradient of the scores of each slot, for some query tiles of all rows at a
time, the queries of a slot side by side: a thread reads those of a key, if there are any, at once.
`spread_kernel` then owns the elements of the bias: it adds the heads and batch entries that share
one in a fixed order in fp32, rounds once, and writes zeros where nobody sees the key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...intervals import NEVER
from ...plan import Plan
from .config import TileConfig
from .grad_query import num_query_tiles, run_grad_query
from .inputs import Bias, Call, Saved
from .launch import launch
from .tiles import NUMBERS, row_and_rest, row_offsets

_NEVER = tl.constexpr(NEVER)
_BUFFER = 1 << 30  # bytes, unless the gradient itself or one tile of all rows takes more
# With 256 to 1024 keys, 4 to 16 queries together, and 2 to 8 warps, all of backward took the same
# within 1 % (the best 1024 of 32768 keys, a bias of pairs).
_KEYS = 512  # keys of one program,
_QUERIES = 32  # its queries, where it has enough company,
_TOGETHER = 8  # and those that it loads and stores at a time
_PROGRAMS = 1024  # so many are company enough
_WARPS = 4


@triton.jit(do_not_specialize=("num_slots", "key_len"))
def inverse_kernel(
    ptr_key, ptr_counts, ptr_use_slot, key_len, old_slots, num_slots, BLOCK: tl.constexpr
):
    """One program per (row, list): the slot of every key that has one."""
    i_list, _ = row_and_rest(1)
    for part in tl.static_range(2):
        used = tl.load(ptr_counts + i_list * 2 + part)
        for i in range(0, used, BLOCK):
            slot = i + tl.arange(0, BLOCK)  # [BLOCK]
            live = slot < used
            slot += part * old_slots
            key = tl.load(ptr_key + i_list * num_slots + slot, mask=live, other=0)
            tl.store(ptr_use_slot + i_list * key_len + key, slot, mask=live)


@triton.jit
def _slots_and_views(
    ptr_use_slot, ptr_start, ptr_expiry, ptr_bits, plan_list, key, live_k, key_len, num_slots,
    num_words, i_word, member,
    SLOTS: tl.constexpr,
    MEMBERS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    CLAMPS: tl.constexpr,
):  # fmt: skip
    """The slot of each key ``[K']``, and who sees it: a word (twice), or positions from and to.

    The word is that of one head or, without `HEAD_ROWS`, of any head of the KV head.
    """
    slot = key
    if SLOTS != "keys":
        slot = tl.load(ptr_use_slot + plan_list * key_len + key, mask=live_k, other=-1)
    used = live_k & (slot >= 0)
    if SLOTS == "gathered":
        rows = plan_list * MEMBERS
        ptrs = ptr_bits + slot
        if HEAD_ROWS and MEMBERS > 1:
            word = tl.load(
                ptrs + ((rows + member) * num_words + i_word) * num_slots, mask=used, other=0
            )
        else:
            word = tl.zeros(key.shape, tl.int32)
            for each in tl.static_range(MEMBERS):
                offs = ((rows + each) * num_words + i_word) * num_slots
                word |= tl.load(ptrs + offs, mask=used, other=0)
        return slot, word, word
    elif SLOTS == "copied":
        ptrs = ptr_start + plan_list * num_slots + slot
        start = tl.load(ptrs, mask=used, other=_NEVER)
        ptrs = ptr_expiry + plan_list * num_slots + slot
        return slot, start, tl.load(ptrs, mask=used, other=0)
    else:
        start = key * 0 if CLAMPS else key
        return slot, tl.where(used, start, _NEVER), key * 0 + _NEVER


@triton.jit
def _load_pairs(
    ptr_pairs, tile, row, num_slots, slot, view, end, i_bit, at_first, at_last,
    SLOTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Gradients of some queries ``[Q']``, for each key that any of them sees, and 0 elsewhere."""
    if SLOTS == "gathered":
        near = ((view >> i_bit) & ((1 << TOGETHER) - 1)) != 0
    else:
        near = (view <= at_last) & (at_first < end)
    tile += row // TILE_ROWS
    row_0 = row % TILE_ROWS
    if ROWS == 1:
        row_0 = tl.multiple_of(row_0, TOGETHER)
    row = row_0 + tl.arange(0, TOGETHER) * ROWS
    ptrs = ptr_pairs + tile * num_slots * TILE_ROWS + row[:, None] + (slot * TILE_ROWS)[None, :]
    return tl.load(ptrs, mask=near[None, :], other=0.0)


@triton.jit(do_not_specialize=NUMBERS)
def spread_kernel(
    ptr_pairs, ptr_grad_bias, ptr_use_slot, ptr_start, ptr_expiry, ptr_bits, query_len, key_len,
    epoch_len, num_epochs, num_lists, num_slots, unit_0, units_now, unit_len, num_tiles,
    units_of_epoch, num_batches, num_blocks, plan_b, plan_h,
    HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS_BATCHES: tl.constexpr,
    BIAS_HEADS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SUMS: tl.constexpr,
    SLOTS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CLAMPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    QUERIES: tl.constexpr,
    TOGETHER: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """One program per (batch entry and head of the bias, queries of a unit, block of keys).

    A unit is what the buffer is cut into: the queries of a tile, or of an epoch with `num_tiles`
    tiles. `TOGETHER` queries, which lie in one tile, are loaded and stored at a time. Where none of
    the program's queries can see a key zeros are stored at once. `SUMS`: an element is the sum of
    several. `ALIGNED` promises that a row of the bias has a multiple of 8 keys.
    """
    subs = unit_len // QUERIES
    i_plane, rest = row_and_rest(units_now * subs * num_blocks)
    i_block, rest = rest % num_blocks, rest // num_blocks
    i_unit, i_sub = rest // subs, rest % subs
    i_epoch = (unit_0 + i_unit) // units_of_epoch
    unit_query = (unit_0 + i_unit) % units_of_epoch * unit_len
    query_0 = unit_query + i_sub * QUERIES  # of the epoch
    first = i_epoch * epoch_len
    num = tl.minimum(epoch_len, query_len - first)
    position = first + key_len - query_len
    key = i_block * KEYS + tl.arange(0, KEYS)  # [K']
    live_k = (key // 8 * 8 if ALIGNED else key) < key_len  # as both ends of a row are aligned
    batch_0, num_entries = i_plane // BIAS_HEADS, num_batches // BIAS_BATCHES
    bias_head = i_plane % BIAS_HEADS
    head_0 = bias_head * HEADS_KV // BIAS_HEADS
    ROWS: tl.constexpr = GROUP if HEAD_ROWS else 1
    HEADS_NOW: tl.constexpr = 1 if BIAS_HEADS >= HEADS_KV else HEADS_KV
    MEMBERS_NOW: tl.constexpr = 1 if BIAS_HEADS > HEADS_KV else ROWS
    member_0 = bias_head % GROUP if BIAS_HEADS > HEADS_KV else 0
    i_list = i_epoch % num_lists
    num_words, i_word = epoch_len // 32, query_0 // 32  # the queries lie in one word

    offs_q = tl.arange(0, TOGETHER)  # [Q']
    row_0 = i_plane * query_len + first
    offs_out = row_offsets(offs_q, key_len, ALIGNED)[:, None] + key[None, :]
    last = tl.minimum(query_0 + QUERIES, num) - 1
    is_seen = query_0 <= last
    if not CLAMPS:
        is_seen = is_seen & (i_block * KEYS <= position + last)
    if is_seen:
        if not SUMS:
            slot, view, end = _slots_and_views(
                ptr_use_slot, ptr_start, ptr_expiry, ptr_bits,
                (batch_0 * plan_b + head_0 * plan_h) * num_lists + i_list, key, live_k, key_len,
                num_slots, num_words, i_word, member_0, SLOTS, MEMBERS, HEAD_ROWS, CLAMPS,
            )  # fmt: skip
        for i_query in range(query_0, query_0 + QUERIES, TOGETHER):
            at_first = position + i_query
            at_last = position + tl.minimum(i_query + TOGETHER, num) - 1
            if CLAMPS:
                at_first, at_last = tl.maximum(at_first, 0), tl.maximum(at_last, 0)
            if SUMS:
                total = tl.zeros([TOGETHER, KEYS], tl.float32)
                for i in range(0, num_entries * HEADS_NOW):
                    i_batch, i_head = batch_0 + i // HEADS_NOW, head_0 + i % HEADS_NOW
                    plan_list = (i_batch * plan_b + i_head * plan_h) * num_lists + i_list
                    tile = ((i_batch * HEADS_KV + i_head) * units_now + i_unit) * num_tiles
                    for member in tl.static_range(MEMBERS_NOW):
                        slot, view, end = _slots_and_views(
                            ptr_use_slot, ptr_start, ptr_expiry, ptr_bits, plan_list, key, live_k,
                            key_len, num_slots, num_words, i_word, member_0 + member, SLOTS,
                            MEMBERS, HEAD_ROWS, CLAMPS,
                        )  # fmt: skip
                        row = (i_query - unit_query) * ROWS + member_0 + member
                        total += _load_pairs(
                            ptr_pairs, tile, row, num_slots, slot, view, end, i_query % 32,
                            at_first, at_last, SLOTS, TILE_ROWS, ROWS, TOGETHER,
                        )  # fmt: skip
            else:
                tile = ((batch_0 * HEADS_KV + head_0) * units_now + i_unit) * num_tiles
                row = (i_query - unit_query) * ROWS + member_0
                total = _load_pairs(
                    ptr_pairs, tile, row, num_slots, slot, view, end, i_query % 32, at_first,
                    at_last, SLOTS, TILE_ROWS, ROWS, TOGETHER,
                )  # fmt: skip
            tl.store(
                ptr_grad_bias + row_offsets(row_0 + i_query, key_len, ALIGNED) + offs_out,
                total.to(ptr_grad_bias.dtype.element_ty),
                mask=(i_query + offs_q < num)[:, None] & live_k[None, :],
            )
    else:
        zeros = tl.zeros([TOGETHER, KEYS], ptr_grad_bias.dtype.element_ty)
        for i_query in range(query_0, query_0 + QUERIES, TOGETHER):
            tl.store(
                ptr_grad_bias + row_offsets(row_0 + i_query, key_len, ALIGNED) + offs_out,
                zeros,
                mask=(i_query + offs_q < num)[:, None] & live_k[None, :],
            )


def _slots_of_keys(plan: Plan) -> Tensor | None:
    """int32 ``[rows, lists, K]``: the slot of every key, -1 for none; ``None`` if it is the key."""
    if plan.slot_key is None or (plan.use_end is None and plan.use_slot is not None):
        return plan.use_slot
    lists = plan.slot_key.numel() // plan.num_slots
    use_slot = torch.full((lists, plan.key_len), -1, dtype=torch.int32, device=plan.slot_key.device)
    launch(inverse_kernel, lists)(
        plan.slot_key, plan.counts, use_slot, plan.key_len, plan.old_slots, plan.num_slots,
        BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return use_slot


def run_grad_pair(
    plan: Plan, saved: Saved, call: Call, config: TileConfig, grad_query: Tensor | None, bias: Bias
) -> Tensor:
    """Run the dQ kernel for a bias that depends on the query; returns the gradient of the bias.

    Args:
        plan, saved, call: Of the call.
        config: Tile sizes.
        grad_query: ``[B, Q, H, D]``, contiguous, or ``None`` if it is not asked for.
        bias: Of the call, more than one query and more than one key.

    Returns:
        The gradient in the bias's shape and dtype, contiguous.
    """
    shape, dtype = bias.tensor.shape, bias.tensor.dtype
    group, heads_kv = bias.group, bias.heads_kv
    num_heads = group * heads_kv
    grad_bias = torch.empty(shape, dtype=dtype, device=bias.tensor.device)
    is_cut_by_tile = config.block_m % group == 0
    sums_group = group > 1 and shape[1] != num_heads and is_cut_by_tile
    num_tiles = num_query_tiles(plan, saved, config)
    tiles_of_unit = 1 if is_cut_by_tile else num_tiles
    units_of_epoch = num_tiles // tiles_of_unit
    unit_len = config.block_m // group if is_cut_by_tile else plan.epoch_len
    tile_rows = config.block_m // group if sums_group else config.block_m
    adds = saved.query.shape[0] // shape[0] * max(1, heads_kv // shape[1])
    adds *= group if shape[1] != num_heads and not sums_group else 1
    part_dtype = dtype if adds == 1 else torch.float32

    num_units = plan.num_epochs * units_of_epoch
    unit_elements = len(saved.rows) * tile_rows * tiles_of_unit * plan.num_slots
    buffer = max(_BUFFER, grad_bias.nbytes)
    step = max(1, min(num_units, buffer // (unit_elements * part_dtype.itemsize)))
    pairs = torch.empty(step * unit_elements, dtype=part_dtype, device=grad_bias.device)
    use_slot = _slots_of_keys(plan)
    keys = min(_KEYS, max(256, triton.next_power_of_2(plan.key_len)))
    key_blocks = triton.cdiv(plan.key_len, keys)
    planes = shape[0] * shape[1]
    queries = min(_QUERIES, unit_len & -unit_len)
    # Queries that are loaded together lie in one tile.
    together = min(_TOGETHER, queries) if is_cut_by_tile else 1
    while queries > together and planes * step * unit_len // queries * key_blocks < _PROGRAMS:
        queries //= 2
    for unit in range(0, num_units, step):
        now = min(step, num_units - unit)
        run_grad_query(
            plan, saved, call, config, grad_query, pairs, "group" if sums_group else "head",
            range(unit * tiles_of_unit, (unit + now) * tiles_of_unit),
        )  # fmt: skip
        launch(spread_kernel, planes * now * (unit_len // queries) * key_blocks)(
            pairs, grad_bias, use_slot, plan.slot_start, plan.slot_expiry, plan.slot_bits,
            plan.query_len, plan.key_len, plan.epoch_len, plan.num_epochs, plan.num_lists,
            plan.num_slots, unit, now, unit_len, tiles_of_unit, units_of_epoch,
            saved.query.shape[0], key_blocks, *plan.row_strides(heads_kv), HEADS_KV=heads_kv,
            GROUP=group, BIAS_BATCHES=shape[0], BIAS_HEADS=shape[1], HEAD_ROWS=not sums_group,
            TILE_ROWS=tile_rows, SUMS=adds > 1, SLOTS=plan.slots, MEMBERS=plan.members,
            CLAMPS=plan.clamps_positions, ALIGNED=plan.key_len % 8 == 0, QUERIES=queries,
            TOGETHER=together, KEYS=keys, num_warps=_WARPS,
        )  # fmt: skip
    return grad_bias
