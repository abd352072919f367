"""dQ as a product: the gradients of scores that the kernel of dK and dV kept, times the keys.

Computing scores and their gradients a second time would take three products instead of one. What is
kept are the numbers that the other kernel multiplies, rounded as it rounds them.

Symbols as in `forward.py`. A unit is a (row of keys, epoch).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...plan import Plan
from .config import TileConfig
from .inputs import Saved, rest_arguments
from .launch import launch
from .slots import Slots
from .tiles import (
    NUMBERS,
    epoch_bounds,
    load_out,
    load_rows,
    row_and_rest,
    row_offsets,
    store_rows,
    tile_blocks,
    tile_rows,
)

_LINES = 64  # rows whose delta one program computes


@triton.jit(do_not_specialize=NUMBERS)
def delta_kernel(
    ptr_out, ptr_out_rest, has_rest, ptr_grad, ptr_delta, query_len, num_blocks,
    sgb: tl.int64,
    sgn: tl.int64,
    sgh: tl.int64,
    HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (batch entry, block of (query, head)): ``delta = rowsum(dO * O)``."""
    i_batch, i_block = row_and_rest(num_blocks)
    HEADS: tl.constexpr = HEADS_KV * GROUP
    line = i_block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    i_query, i_head = line // HEADS, line % HEADS
    mask = i_query < query_len
    offs_out = tl.multiple_of((i_batch * query_len * HEADS + line) * D, 8)
    out = load_out(ptr_out, ptr_out_rest, has_rest, offs_out, mask, D, D)  # [BLOCK, D]
    offs = row_offsets(i_batch, sgb, True) + row_offsets(i_query, sgn, True)
    grad = load_rows(ptr_grad, offs + row_offsets(i_head, sgh, True), mask, D, D, True)
    row = (i_batch * HEADS_KV + i_head // GROUP) * query_len + i_query
    delta = tl.sum(out * grad.to(tl.float32), 1)
    tl.store(ptr_delta + row * GROUP + i_head % GROUP, delta, mask=mask)


@triton.jit(do_not_specialize=NUMBERS)
def product_kernel(
    tiles_kept, slots_k, ptr_grad_q, ptr_visible, ptr_entered, ptr_epochs, softmax_scale, query_len,
    key_len, epoch_len, num_epochs, num_tiles, old_slots, num_slots, unit_0, row_0,
    HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """One program per (unit, tile): its dQ."""
    i_unit, i_tile = row_and_rest(num_tiles)
    i_row = row_0 + (unit_0 + i_unit) // num_epochs
    i_epoch = ((unit_0 + i_unit) % num_epochs).to(tl.int32)
    i_batch, i_head = i_row // HEADS_KV, i_row % HEADS_KV
    first, num, _ = epoch_bounds(i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED)
    row, i_query, i_group = tile_rows(i_tile, GROUP, BLOCK_M)  # [M]
    if i_tile * BLOCK_M < num * GROUP:
        i_q = i_row * query_len + first
        last = tl.minimum((i_tile * BLOCK_M + BLOCK_M - 1) // GROUP, num - 1)
        _, num_old, num_new = tile_blocks(
            ptr_visible, ptr_entered, i_q + i_tile * BLOCK_M // GROUP, i_q + last, BLOCK_N
        )
        kept_0 = i_unit.to(tl.int32) * num_slots
        slot_0 = (unit_0 + i_unit).to(tl.int32) * num_slots
        new_block = old_slots // BLOCK_N - num_old
        acc = tl.zeros([BLOCK_M, D], tl.float32)
        for i in tl.range(0, num_old + num_new, num_stages=STAGES):
            slot = tl.where(i < num_old, i, new_block + i) * BLOCK_N
            kept = tiles_kept.load([kept_0 + slot, i_tile * BLOCK_M])  # [N, M]
            k = slots_k.load([slot_0 + slot, 0])  # [N, D]
            acc = tl.dot(tl.trans(kept), k, acc)
        offs_head = i_head * GROUP + i_group
        offs_out = ((i_batch * query_len + first + i_query) * HEADS_KV * GROUP + offs_head) * D
        offs_out = tl.multiple_of(offs_out, 8)
        store_rows(ptr_grad_q, offs_out, row < num * GROUP, acc * softmax_scale, D, D)


def run_delta(saved: Saved) -> None:
    """Fill delta. Rows of dO are aligned, and `D` is a power of two."""
    batch, query_len, num_heads, head_dim = saved.query.shape
    num_blocks = triton.cdiv(query_len * num_heads, _LINES)
    launch(delta_kernel, batch * num_blocks)(
        saved.out, *rest_arguments(saved.out, saved.out_rest), saved.grad_out, saved.delta,
        query_len, num_blocks, *saved.grad_out.stride()[:3], HEADS_KV=saved.key.shape[2],
        GROUP=saved.group, D=head_dim, BLOCK=_LINES, num_warps=4,
    )  # fmt: skip


def run_product(
    plan: Plan,
    saved: Saved,
    slots: Slots,
    kept: Tensor,
    softmax_scale: float,
    config: TileConfig,
    grad_query: Tensor,
    rows: range,
    units: range,
) -> None:
    """Fill `grad_query` for some units.

    Args:
        plan, saved: Of the call; the plan is one of a selection.
        slots: Copies of the slots of `rows`.
        kept: ``[units P, M]``, the gradients of the scores of all slots and all rows of an epoch.
        softmax_scale: Of the call.
        config: Tile sizes.
        grad_query: ``[B, Q, H, D]``, contiguous.
        rows: Rows of keys whose slots were copied.
        units: Of these rows, those that are kept.
    """
    assert slots.key is not None
    head_dim, heads_kv = saved.key.shape[3], saved.key.shape[2]
    num_tiles = triton.cdiv(plan.epoch_len * saved.group, config.block_m)
    launch(product_kernel, len(units) * num_tiles)(
        TensorDescriptor.from_tensor(kept, [config.block_n, config.block_m]),
        TensorDescriptor.from_tensor(slots.key.view(-1, head_dim), [config.block_n, head_dim]),
        grad_query, plan.visible, plan.entered, plan.epochs, softmax_scale, plan.query_len,
        plan.key_len, plan.epoch_len, plan.num_epochs, num_tiles, plan.old_slots, plan.num_slots,
        units.start, rows.start, HEADS_KV=heads_kv, GROUP=saved.group, D=head_dim,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.num_stages,
        PACKED=plan.epochs is not None, **config.options,
    )  # fmt: skip
