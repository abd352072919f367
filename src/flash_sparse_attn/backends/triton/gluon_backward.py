"""Backward over epochs for Hopper: dK and dV by warps with roles, and dQ from what they keep.

One program per (unit, block of 128 slots), a unit being a (row of keys, epoch). A producer warp
loads keys and values of the block once, and the tiles of queries and dO that see it ahead of use
(TMA, a ring of buffers guarded by barriers); two consumers of four warps own the gradients of 64
slots each. So a tile is read once for 128 slots, half as often as by the kernel of `grad_key.py`:
what that loads comes near to what the L2 cache can give.

Products are five, not seven: the gradients of scores, which are rounded to be multiplied with the
queries, are stored as well, for some units after the others, and `grad_product.py` multiplies them
with the keys. As everywhere in backward nothing is summed by atomics.

Per-key biases of KV heads only, all of dQ, dK and dV, and rows of keys whose (query, head) pairs
begin at multiples of 4; other calls are served by `grad_query.py` and `grad_key.py`. Symbols as in
`forward.py`; written in Gluon, see `role_config.roles_for`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...plan import Plan
from .gluon_forward import describe_rows, describe_tiles, lane_sums
from .grad_product import run_delta, run_product
from .inputs import Call, Saved
from .launch import launch
from .reduce import Parts
from .role_config import Roles, kept_units
from .slots import copy_slots
from .tiles import NUMBERS, block_tiles, epoch_bounds, row_and_rest

_ROWS = gl.constexpr(64)  # slots of a consumer: what one group of four warps multiplies at a time


@gluon.jit
def _walk_of(
    ptr_start, ptr_expiry, position, num, num_tiles, is_new,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    KEPT_TILES: gl.constexpr,
    CLAMPS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """First tile of a block's walk, begin and end of those that see all of it, and the end.

    What is kept is read `KEPT_TILES` tiles at a time, and of new slots to the end of the epoch: the
    walk is as long as that, so that nothing is read that was not written.
    """
    # Every warp has all slots: no warp waits for another.
    offs = gl.arange(0, BLOCK_N, gl.BlockedLayout([BLOCK_N // 32], [32], [WARPS], [0]))
    start, expiry = gl.load(ptr_start + offs), gl.load(ptr_expiry + offs)
    tile_0, full_0, full_1, tile_1 = block_tiles(
        gl.min(start, 0), gl.max(start, 0), gl.min(expiry, 0), gl.max(expiry, 0), position, num,
        GROUP, BLOCK_M, CLAMPS,
    )  # fmt: skip
    tile_1 = gl.where(is_new, num_tiles, tile_1)
    tile_0 = tile_0 // KEPT_TILES * KEPT_TILES
    tile_1 = gl.minimum(gl.cdiv(tile_1, KEPT_TILES) * KEPT_TILES, num_tiles)
    return tile_0, full_0, full_1, tile_1


@gluon.jit
def _border_tile(i, tile_0, full_0, full_1):
    """The tile with the number `i` among those that do not see all of a block."""
    return gl.where(i < full_0 - tile_0, tile_0 + i, full_1 - full_0 + tile_0 + i)


@gluon.jit
def _produce(
    tiles_q, tiles_grad, slots_k, slots_v, lines_peak, lines_share, lines_delta, buf_k, buf_v,
    buf_q, buf_grad, buf_peak, buf_share, buf_delta, kv_full, full, empty, ptr_start, ptr_expiry,
    copied, batch, head, first, line_0, position, num, num_tiles, is_new,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    BUFFERS: gl.constexpr,
    KEPT_TILES: gl.constexpr,
    CLAMPS: gl.constexpr,
):  # fmt: skip
    """Load what the consumers need, in their order."""
    BYTES: gl.constexpr = slots_k.dtype.primitive_bitwidth // 8
    mbarrier.expect(kv_full, 2 * BLOCK_N * D * BYTES)
    for part in gl.static_range(BLOCK_N // _ROWS):
        slot = [copied + part * _ROWS, 0]
        tma.async_copy_global_to_shared(slots_k, slot, kv_full, buf_k.index(part))
        tma.async_copy_global_to_shared(slots_v, slot, kv_full, buf_v.index(part))
    tile_0, full_0, full_1, tile_1 = _walk_of(
        ptr_start, ptr_expiry, position, num, num_tiles, is_new, GROUP, BLOCK_M, BLOCK_N,
        KEPT_TILES, CLAMPS, 1,
    )  # fmt: skip
    num_full = full_1 - full_0
    for step in range(gl.maximum(tile_1 - tile_0, num_full)):
        border = _border_tile(step - num_full, tile_0, full_0, full_1)
        tile = gl.where(step < num_full, full_0 + step, border)
        b = step % BUFFERS
        mbarrier.wait(empty.index(b), (step // BUFFERS & 1) ^ 1)
        ready = full.index(b)
        mbarrier.expect(ready, BLOCK_M * (2 * D * BYTES + 12))
        at = [batch, first + tile * (BLOCK_M // GROUP), head * GROUP, 0]
        line = [0, line_0 + tile * BLOCK_M]
        tma.async_copy_global_to_shared(tiles_q, at, ready, buf_q.index(b))
        tma.async_copy_global_to_shared(lines_peak, line, ready, buf_peak.index(b))
        tma.async_copy_global_to_shared(lines_share, line, ready, buf_share.index(b))
        tma.async_copy_global_to_shared(lines_delta, line, ready, buf_delta.index(b))
        tma.async_copy_global_to_shared(tiles_grad, at, ready, buf_grad.index(b))


@gluon.jit
def _step(
    step, tile, k, v, bias, start, expiry, grad_k, grad_v, grad_bias, buf_q, buf_grad, buf_peak,
    buf_share, buf_delta, buf_kept, kept, kept_row, full, empty, position, num, scale,
    MASKED: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BUFFERS: gl.constexpr,
    CLAMPS: gl.constexpr,
    NEEDS_BIAS: gl.constexpr,
):  # fmt: skip
    """Add the contribution of one tile; scores are transposed, slots x rows."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, grad_k.type.layout, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S)
    D: gl.constexpr = grad_k.shape[1]
    nothing = gl.zeros([_ROWS, BLOCK_M], gl.float32, S)
    b = step % BUFFERS
    q = buf_q.index(b).reshape([BLOCK_M, D])
    grad = buf_grad.index(b).reshape([BLOCK_M, D])
    mbarrier.wait(full.index(b), step // BUFFERS & 1)
    scores = warpgroup_mma(k, q.permute([1, 0]), nothing, use_acc=False, is_async=True)
    products = warpgroup_mma(v, grad.permute([1, 0]), nothing, use_acc=False, is_async=True)
    peak = buf_peak.index(b).reshape([BLOCK_M]).load(COLUMNS)
    scores = warpgroup_mma_wait(1, deps=[scores])
    scores = scores * scale + bias[:, None]
    if MASKED:
        # The last tile of an epoch may be short: at -1 nothing is seen.
        row = tile * BLOCK_M + gl.arange(0, BLOCK_M, COLUMNS)
        at = position + row // GROUP
        if CLAMPS:
            at = gl.maximum(at, 0)
        at = gl.where(row < num * GROUP, at, -1)
        sees = (start[:, None] <= at[None, :]) & (at[None, :] < expiry[:, None])
        scores = gl.where(sees, scores, float("-inf"))
    probs = gl.exp2(scores - peak[None, :])
    # Not before: registers are few.
    probs *= buf_share.index(b).reshape([BLOCK_M]).load(COLUMNS)[None, :]
    rounded_probs = gl.convert_layout(probs.to(buf_q.dtype), LEFT)
    products = warpgroup_mma_wait(0, deps=[products])
    grad_v = warpgroup_mma(rounded_probs, grad, grad_v, is_async=True)
    delta = buf_delta.index(b).reshape([BLOCK_M]).load(COLUMNS)
    grad_scores = probs * (products - delta[None, :])
    if NEEDS_BIAS:
        grad_bias += lane_sums(grad_scores)
    rounded = grad_scores.to(buf_q.dtype)
    rounded_grads = gl.convert_layout(rounded, LEFT)
    grad_k = warpgroup_mma(rounded_grads, q, grad_k, is_async=True)
    # Stored while the tensor cores work; the store of the step before has read its buffer.
    tma.store_wait(0)
    buf_kept.store(rounded)
    hopper.fence_async_shared()
    tma.async_copy_shared_to_global(kept, [kept_row, tile * BLOCK_M], buf_kept)
    grad_k, grad_v, rounded_probs, rounded_grads = warpgroup_mma_wait(
        0, deps=[grad_k, grad_v, rounded_probs, rounded_grads]
    )
    mbarrier.arrive(empty.index(b), count=1)
    return grad_k, grad_v, grad_bias


@gluon.jit
def _consume(
    buf_k, buf_v, buf_q, buf_grad, buf_peak, buf_share, buf_delta, buf_kept, kept, kv_full, full,
    empty, ptr_key, ptr_start, ptr_expiry, ptr_slot_bias, ptr_part_k, ptr_part_v, ptr_part_bias,
    kept_row, position, num, num_tiles, is_new, scale, softmax_scale,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    BUFFERS: gl.constexpr,
    KEPT_TILES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    NEEDS_BIAS: gl.constexpr,
    CLAMPS: gl.constexpr,
    PART: gl.constexpr,
):  # fmt: skip
    """What an epoch contributes to the gradients of one part of a block."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    tile_0, full_0, full_1, tile_1 = _walk_of(
        ptr_start, ptr_expiry, position, num, num_tiles, is_new, GROUP, BLOCK_M, BLOCK_N,
        KEPT_TILES, CLAMPS, 4,
    )  # fmt: skip
    slot = PART * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, S))  # [64]
    start, expiry = gl.load(ptr_start + slot), gl.load(ptr_expiry + slot)
    if HAS_BIAS:
        bias = gl.load(ptr_slot_bias + slot)
    else:
        bias = gl.zeros([_ROWS], gl.float32, gl.SliceLayout(1, S))
    k, v, kept_part = buf_k.index(PART), buf_v.index(PART), buf_kept.index(PART)
    kept_row += PART * _ROWS
    grad_k = gl.zeros([_ROWS, D], gl.float32, ACC)
    grad_v = gl.zeros([_ROWS, D], gl.float32, ACC)
    grad_bias = lane_sums(gl.zeros([_ROWS, BLOCK_M], gl.float32, S))
    num_full = full_1 - full_0
    mbarrier.wait(kv_full, 0)
    for step in range(num_full):
        grad_k, grad_v, grad_bias = _step(
            step, full_0 + step, k, v, bias, start, expiry, grad_k, grad_v, grad_bias, buf_q,
            buf_grad, buf_peak, buf_share, buf_delta, kept_part, kept, kept_row, full, empty,
            position, num, scale, False, GROUP, BLOCK_M, BUFFERS, CLAMPS, NEEDS_BIAS,
        )  # fmt: skip
    for step in range(num_full, tile_1 - tile_0):
        tile = _border_tile(step - num_full, tile_0, full_0, full_1)
        grad_k, grad_v, grad_bias = _step(
            step, tile, k, v, bias, start, expiry, grad_k, grad_v, grad_bias, buf_q, buf_grad,
            buf_peak, buf_share, buf_delta, kept_part, kept, kept_row, full, empty, position, num,
            scale, True, GROUP, BLOCK_M, BUFFERS, CLAMPS, NEEDS_BIAS,
        )  # fmt: skip
    tma.store_wait(0)
    line = PART * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, ACC))  # [64]
    offs = (line * D)[:, None] + gl.arange(0, D, gl.SliceLayout(0, ACC))[None, :]
    exists = (gl.load(ptr_key + line) >= 0)[:, None]
    gl.store(ptr_part_k + offs, grad_k * softmax_scale, mask=exists)
    gl.store(ptr_part_v + offs, grad_v, mask=exists)
    if NEEDS_BIAS:
        total = gl.convert_layout(gl.sum(grad_bias, 1), gl.SliceLayout(1, S))
        gl.store(ptr_part_bias + slot, total)


@gluon.jit(do_not_specialize=NUMBERS)
def gluon_grad_key_kernel(
    tiles_q, tiles_grad, slots_k, slots_v, lines_peak, lines_share, lines_delta, kept, ptr_part_k,
    ptr_part_v, ptr_part_bias, ptr_key, ptr_start, ptr_expiry, ptr_counts, ptr_epochs,
    ptr_slot_bias, scale, softmax_scale, query_len, key_len, epoch_len, num_epochs, num_tiles,
    num_blocks, old_slots, num_slots, unit_0, row_0,
    HEADS_KV: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    BUFFERS: gl.constexpr,
    KEPT_TILES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    NEEDS_BIAS: gl.constexpr,
    CLAMPS: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """What every unit contributes to dK, dV and the gradient of the bias, as `grad_key_kernel`."""
    PARTS: gl.constexpr = BLOCK_N // _ROWS
    i_unit, i_block = row_and_rest(num_blocks)
    unit = unit_0 + i_unit  # among those of `row_0` and after
    plan_list = row_0 * num_epochs + unit
    i_epoch = (unit % num_epochs).to(gl.int32)
    i_row = row_0 + unit // num_epochs
    slot_0 = i_block * BLOCK_N
    is_new = slot_0 >= old_slots
    used = gl.load(ptr_counts + plan_list * 2 + is_new.to(gl.int32))
    if slot_0 - gl.where(is_new, old_slots, 0) < used:
        first, num, position = epoch_bounds(
            i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED
        )
        planned = plan_list * num_slots + slot_0
        ptr_key += planned
        ptr_start += planned
        ptr_expiry += planned
        own = unit * num_slots + slot_0
        if HAS_BIAS:
            ptr_slot_bias += own
        ptr_part_k += own * D
        ptr_part_v += own * D
        if NEEDS_BIAS:
            ptr_part_bias += own
        copied = own.to(gl.int32)
        kept_row = i_unit.to(gl.int32) * num_slots + slot_0
        line_0 = ((i_row * query_len + first) * GROUP).to(gl.int32)
        batch, head = (i_row // HEADS_KV).to(gl.int32), (i_row % HEADS_KV).to(gl.int32)
        BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
        TYPE: gl.constexpr = slots_k.dtype
        TILES: gl.constexpr = [BUFFERS, 1, BLOCK_M // GROUP, GROUP, D]
        LINES: gl.constexpr = [BUFFERS, 1, BLOCK_M]
        buf_k = gl.allocate_shared_memory(TYPE, [PARTS, _ROWS, D], slots_k.layout)
        buf_v = gl.allocate_shared_memory(TYPE, [PARTS, _ROWS, D], slots_v.layout)
        buf_q = gl.allocate_shared_memory(TYPE, TILES, tiles_q.layout)
        buf_grad = gl.allocate_shared_memory(TYPE, TILES, tiles_grad.layout)
        buf_peak = gl.allocate_shared_memory(gl.float32, LINES, lines_peak.layout)
        buf_share = gl.allocate_shared_memory(gl.float32, LINES, lines_share.layout)
        buf_delta = gl.allocate_shared_memory(gl.float32, LINES, lines_delta.layout)
        buf_kept = gl.allocate_shared_memory(TYPE, [PARTS, _ROWS, BLOCK_M], kept.layout)
        kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
        full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
        empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
        mbarrier.init(kv_full, count=1)
        for b in gl.static_range(BUFFERS):
            mbarrier.init(full.index(b), count=1)
            mbarrier.init(empty.index(b), count=PARTS)
        hopper.fence_async_shared()
        gl.warp_specialize(
            [
                (_consume, (
                    buf_k, buf_v, buf_q, buf_grad, buf_peak, buf_share, buf_delta, buf_kept, kept,
                    kv_full, full, empty, ptr_key, ptr_start, ptr_expiry, ptr_slot_bias, ptr_part_k,
                    ptr_part_v, ptr_part_bias, kept_row, position, num, num_tiles, is_new, scale,
                    softmax_scale, GROUP, BLOCK_M, BLOCK_N, D, BUFFERS, KEPT_TILES, HAS_BIAS,
                    NEEDS_BIAS, CLAMPS, 0,
                )),
                (_consume, (
                    buf_k, buf_v, buf_q, buf_grad, buf_peak, buf_share, buf_delta, buf_kept, kept,
                    kv_full, full, empty, ptr_key, ptr_start, ptr_expiry, ptr_slot_bias, ptr_part_k,
                    ptr_part_v, ptr_part_bias, kept_row, position, num, num_tiles, is_new, scale,
                    softmax_scale, GROUP, BLOCK_M, BLOCK_N, D, BUFFERS, KEPT_TILES, HAS_BIAS,
                    NEEDS_BIAS, CLAMPS, 1,
                )),
                (_produce, (
                    tiles_q, tiles_grad, slots_k, slots_v, lines_peak, lines_share, lines_delta,
                    buf_k, buf_v, buf_q, buf_grad, buf_peak, buf_share, buf_delta, kv_full, full,
                    empty, ptr_start, ptr_expiry, copied, batch, head, first, line_0, position, num,
                    num_tiles, is_new, GROUP, BLOCK_M, BLOCK_N, D, BUFFERS, KEPT_TILES, CLAMPS,
                )),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


def _describe_lines(tensor: Tensor, block_m: int) -> TensorDescriptor:
    """A descriptor of parts of one long row, which begin at multiples of 4."""
    size = tensor.numel()
    layout = gl.NVMMASharedLayout(0, 32, 2)
    # The stride of a dimension of size 1 means nothing, but must be a multiple of 16 bytes.
    return TensorDescriptor(tensor, [1, size], [-(-size // 4) * 4, 1], [1, block_m], layout)


def gluon_backward(
    plan: Plan,
    saved: Saved,
    call: Call,
    roles: Roles,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_bias: Tensor | None,
) -> bool:
    """Fill the gradients, or return ``False`` for a call that these kernels do not serve.

    Args:
        plan, saved, call: Of the call; the plan is one of a selection.
        roles: Sizes, from the table.
        grad_query: ``[B, Q, H, D]``, contiguous.
        grad_key, grad_value, grad_bias: As in `grad_key.run_grad_key`.
    """
    query, key, value, config = saved.query, saved.key, saved.value, roles.grad_key
    heads_kv, head_dim, group = key.shape[2], key.shape[3], saved.group
    rows = plan.epoch_len * group
    # Tiles are whole, and lines are loaded from multiples of 16 bytes.
    is_even = group % 4 == 0 or (plan.epochs is None and plan.query_len * group % 4 == 0)
    if rows % config.block_m or not is_even or not call.is_plain:
        return False
    tiles_q, tiles_grad = (
        describe_tiles(tensor, group, config.block_m) for tensor in (query, saved.grad_out)
    )
    num_blocks, num_tiles = plan.num_slots // config.block_n, rows // config.block_m
    units = len(saved.rows) * plan.num_epochs
    at_once = kept_units(units, num_blocks, plan.num_slots * rows * query.element_size())
    if tiles_q is None or tiles_grad is None or not at_once:
        return False
    run_delta(saved)
    parts = Parts.of(plan, saved, 1, grad_key, grad_value, grad_bias)
    kept = torch.empty(at_once * plan.num_slots, rows, dtype=query.dtype, device=query.device)
    rows_of = [_ROWS.value, head_dim]
    for now in parts.chunks:
        slots = copy_slots(plan, key, value, call.bias, now)
        assert slots.key is not None and slots.value is not None
        for unit in range(0, len(now) * plan.num_epochs, at_once):
            kept_now = range(unit, min(unit + at_once, len(now) * plan.num_epochs))
            launch(gluon_grad_key_kernel, len(kept_now) * num_blocks)(
                tiles_q, tiles_grad, describe_rows(slots.key, rows_of),
                describe_rows(slots.value, rows_of), *(
                    _describe_lines(lines, config.block_m) for lines in (*saved.norm, saved.delta)
                ),
                TensorDescriptor.from_tensor(
                    kept, [_ROWS.value, config.block_m], gl.NVMMASharedLayout(128, 16, 2)
                ),
                *parts.tensors, plan.slot_key, plan.slot_start, plan.slot_expiry, plan.counts,
                plan.epochs, slots.bias, call.factors[0], call.softmax_scale, plan.query_len,
                plan.key_len, plan.epoch_len, plan.num_epochs, num_tiles, num_blocks,
                plan.old_slots, plan.num_slots, unit, now.start, HEADS_KV=heads_kv, GROUP=group,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, D=head_dim, BUFFERS=config.buffers,
                KEPT_TILES=roles.grad_query.block_m // config.block_m,
                CONSUMER_REGISTERS=config.consumer_registers,
                PRODUCER_REGISTERS=config.producer_registers, HAS_BIAS=slots.bias is not None,
                NEEDS_BIAS=grad_bias is not None, CLAMPS=plan.clamps_positions,
                PACKED=plan.epochs is not None, num_warps=4, maxnreg=config.registers,
            )  # fmt: skip
            run_product(
                plan, saved, slots, kept, call.softmax_scale, roles.grad_query, grad_query, now,
                kept_now,
            )  # fmt: skip
        parts.add_up(now)
    return True
