"""The gradient of a bias that depends on the query, summed over what it is broadcast over.

The dQ kernel stores the gradient of the scores of each slot, for some query tiles of all rows at a
time. `spread_kernel` then owns the elements of the bias: it adds the heads and batch entries that
share one in a fixed order in fp32, rounds once, and writes zeros where nobody sees the key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from .config import TileConfig
from .grad_query import Saved, num_query_tiles, run_grad_query
from .inputs import Bias, Call
from .launch import launch
from .tiles import NUMBERS, row_and_rest

_BUFFER = 1 << 30  # bytes, if one tile of all rows takes no more
_KEYS = 256  # keys of one program


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


@triton.jit(do_not_specialize=NUMBERS)
def spread_kernel(
    ptr_pairs, ptr_grad_bias, ptr_use_slot, ptr_start, ptr_expiry, ptr_bits, query_len, key_len,
    epoch_len, num_epochs, num_lists, num_slots, unit_0, units_now, unit_len, unit_rows,
    units_of_epoch, num_batches, num_blocks, plan_b, plan_h,
    HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS_BATCHES: tl.constexpr,
    BIAS_HEADS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CLAMPS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """One program per (batch entry and head of the bias, queries of a unit, block of keys).

    A unit is what the buffer is cut into: the queries of a tile, or of an epoch.
    """
    subs = unit_len // QUERIES
    i_plane, rest = row_and_rest(units_now * subs * num_blocks)
    i_block, rest = rest % num_blocks, rest // num_blocks
    i_unit, i_sub = rest // subs, rest % subs
    i_epoch = (unit_0 + i_unit) // units_of_epoch
    unit_query = (unit_0 + i_unit) % units_of_epoch * unit_len
    query_0 = unit_query + i_sub * QUERIES
    first = i_epoch * epoch_len
    query = query_0 + tl.arange(0, QUERIES)  # [Q'] of the epoch
    live_q = (query < epoch_len) & (first + query < query_len)
    at = first + query + key_len - query_len
    if CLAMPS:
        at = tl.maximum(at, 0)
    key = i_block * KEYS + tl.arange(0, KEYS)  # [K']
    live_k = key < key_len
    batch_0, num_entries = i_plane // BIAS_HEADS, num_batches // BIAS_BATCHES
    bias_head = i_plane % BIAS_HEADS
    head_0 = bias_head * HEADS_KV // BIAS_HEADS
    ROWS: tl.constexpr = GROUP if HEAD_ROWS else 1
    HEADS_NOW: tl.constexpr = 1 if BIAS_HEADS >= HEADS_KV else HEADS_KV
    MEMBERS_NOW: tl.constexpr = 1 if BIAS_HEADS > HEADS_KV else ROWS
    member_0 = bias_head % GROUP if BIAS_HEADS > HEADS_KV else 0

    total = tl.zeros([QUERIES, KEYS], tl.float32)
    for i in range(0, num_entries * HEADS_NOW):
        i_batch, i_head = batch_0 + i // HEADS_NOW, head_0 + i % HEADS_NOW
        plan_list = (i_batch * plan_b + i_head * plan_h) * num_lists
        plan_list += i_epoch % num_lists
        slot = key
        if SLOTS != "keys":
            slot = tl.load(ptr_use_slot + plan_list * key_len + key, mask=live_k, other=-1)
        used = live_k & (slot >= 0)
        if SLOTS == "gathered":
            # The queries lie in one word.
            word = tl.zeros([KEYS], tl.int32)
            for member in tl.static_range(MEMBERS):
                out = (plan_list * MEMBERS + member) * (epoch_len // 32) + query_0 // 32
                word |= tl.load(ptr_bits + out * num_slots + slot, mask=used, other=0)
            sees = ((word[None, :] >> (query % 32)[:, None]) & 1) != 0
        elif SLOTS == "copied":
            start = tl.load(ptr_start + plan_list * num_slots + slot, mask=used, other=0)
            expiry = tl.load(ptr_expiry + plan_list * num_slots + slot, mask=used, other=0)
            sees = (start[None, :] <= at[:, None]) & (at[:, None] < expiry[None, :])
        else:
            sees = used[None, :] & ((key[None, :] <= at[:, None]) | CLAMPS)
        sees = sees & live_q[:, None]
        row = (i_batch * HEADS_KV + i_head) * units_now + i_unit
        row = row * unit_rows + (query - unit_query) * ROWS + member_0
        for member in tl.static_range(MEMBERS_NOW):
            ptrs = ptr_pairs + ((row + member) * num_slots)[:, None] + slot[None, :]
            total += tl.load(ptrs, mask=sees, other=0.0).to(tl.float32)
    out = (i_plane * query_len + first + query) * key_len
    tl.store(
        ptr_grad_bias + out[:, None] + key[None, :],
        total.to(ptr_grad_bias.dtype.element_ty),
        mask=live_q[:, None] & live_k[None, :],
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
    unit_rows = (config.block_m // group if sums_group else config.block_m) * tiles_of_unit
    adds = saved.query.shape[0] // shape[0] * max(1, heads_kv // shape[1])
    adds *= group if shape[1] != num_heads and not sums_group else 1
    part_dtype = dtype if adds == 1 else torch.float32

    num_units = plan.num_epochs * units_of_epoch
    unit_elements = len(saved.rows) * unit_rows * plan.num_slots
    step = max(1, min(num_units, _BUFFER // (unit_elements * part_dtype.itemsize)))
    pairs = torch.empty(step * unit_elements, dtype=part_dtype, device=grad_bias.device)
    use_slot = _slots_of_keys(plan)
    queries = min(16, unit_len & -unit_len)
    key_blocks = triton.cdiv(plan.key_len, _KEYS)
    for unit in range(0, num_units, step):
        now = min(step, num_units - unit)
        run_grad_query(
            plan, saved, call, config, grad_query, pairs, "group" if sums_group else "head",
            range(unit * tiles_of_unit, (unit + now) * tiles_of_unit),
        )  # fmt: skip
        planes = shape[0] * shape[1]
        launch(spread_kernel, planes * now * (unit_len // queries) * key_blocks)(
            pairs, grad_bias, use_slot, plan.slot_start, plan.slot_expiry, plan.slot_bits,
            plan.query_len, plan.key_len, plan.epoch_len, plan.num_epochs, plan.num_lists,
            plan.num_slots, unit, now, unit_len, unit_rows, units_of_epoch, saved.query.shape[0],
            key_blocks, *plan.row_strides(heads_kv), HEADS_KV=heads_kv, GROUP=group,
            BIAS_BATCHES=shape[0], BIAS_HEADS=shape[1], HEAD_ROWS=not sums_group,
            SLOTS=plan.slots, MEMBERS=plan.members, CLAMPS=plan.clamps_positions, QUERIES=queries,
            KEYS=_KEYS, num_warps=4,
        )  # fmt: skip
    return grad_bias
