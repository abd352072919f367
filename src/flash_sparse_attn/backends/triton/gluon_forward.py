"""Forward over epochs for Hopper: the same walk as `forward.py`, by warps with different roles.

One program per multiprocessor takes tile after tile. A producer warp loads the queries of a tile
and its blocks of slots ahead of use (TMA, a ring of buffers guarded by barriers); two consumers of
four warps own 64 rows each. A consumer starts the scores of a block, then the product of the block
before with its values, and exponentiates while the tensor cores work; the consumers take turns at
starting products, so that one computes exponentials while the other multiplies. Written in Gluon,
which is part of Triton but changes with every version: see `role_config.roles_for`.

Per-key biases of KV heads only; everything else is served by `forward.py`. As there, a block gives
the same bits with the comparisons and without. Symbols as there.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
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
from .config import keeps_rest, slot_rows
from .inputs import Call, query_tiles, rest_arguments
from .launch import launch
from .role_config import RoleConfig
from .slots import copy_slots
from .tiles import LOWEST, NUMBERS, epoch_bounds, tile_blocks

_LN2 = gl.constexpr(0.6931471805599453)
_ROWS = gl.constexpr(64)  # of a consumer: what one group of four warps multiplies at a time


@gluon.jit
def _tile_of(item, num_rows, num_epochs, num_tiles, TOGETHER: gl.constexpr):
    """Row of keys, epoch and tile with the number `item`.

    Those with the most work come first, of few rows at a time: their slots stay in the L2 cache.
    """
    per_row = num_epochs * num_tiles
    row_0 = item // (TOGETHER * per_row) * TOGETHER
    size = gl.minimum(TOGETHER, num_rows - row_0)
    item -= row_0 * per_row
    rest = per_row - 1 - item // size
    return row_0 + item % size, rest // num_tiles, rest % num_tiles


@gluon.jit
def _blocks_of(
    item, num_items, num_rows, row_0, num_epochs, num_tiles, ptr_epochs, ptr_visible, ptr_entered,
    query_len, key_len, epoch_len,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TOGETHER: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """The blocks of a tile, see `tiles.tile_blocks`; none past the last item."""
    num_full, num_old, num_new = 0, 0, 0
    if item < num_items:
        i_local, i_epoch, i_tile = _tile_of(item, num_rows, num_epochs, num_tiles, TOGETHER)
        first, num, _at = epoch_bounds(i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED)
        if i_tile * BLOCK_M < num * GROUP:
            last = gl.minimum((i_tile * BLOCK_M + BLOCK_M - 1) // GROUP, num - 1)
            index = (row_0 + i_local).to(gl.int64) * query_len + first
            num_full, num_old, num_new = tile_blocks(
                ptr_visible, ptr_entered, index + i_tile * BLOCK_M // GROUP, index + last, BLOCK_N
            )
    return num_full, num_old, num_new


@gluon.jit
def _produce(
    tiles_q, slots_k, slots_v, slots_bias, slots_start, slots_expiry, buf_q, buf_k, buf_v,
    buf_bias, buf_start, buf_expiry, q_full, q_empty, k_full, v_full, empty, ptr_epochs,
    ptr_visible, ptr_entered, num_items, num_rows, row_0, num_epochs, num_tiles, query_len,
    key_len, epoch_len, old_slots, num_slots,
    HEADS_KV: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    BUFFERS: gl.constexpr,
    TOGETHER: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """Load what the consumers need, in their order."""
    BYTES: gl.constexpr = slots_k.dtype.primitive_bitwidth // 8
    step, walked = 0, 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        _full, num_old, num_new = _blocks_of(
            item, num_items, num_rows, row_0, num_epochs, num_tiles, ptr_epochs, ptr_visible,
            ptr_entered, query_len, key_len, epoch_len, GROUP, BLOCK_M, BLOCK_N, TOGETHER, PACKED,
        )  # fmt: skip
        num_steps = num_old + num_new
        if num_steps > 0:
            i_local, i_epoch, i_tile = _tile_of(item, num_rows, num_epochs, num_tiles, TOGETHER)
            first, _num, _at = epoch_bounds(
                i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED
            )
            i_row = row_0 + i_local
            query = first + i_tile * (BLOCK_M // GROUP)
            mbarrier.wait(q_empty, (walked & 1) ^ 1)
            mbarrier.expect(q_full, BLOCK_M * D * BYTES)
            for part in gl.static_range(BLOCK_M // _ROWS):
                begin = query + part * (_ROWS // GROUP)
                tma.async_copy_global_to_shared(
                    tiles_q, [i_row // HEADS_KV, begin, i_row % HEADS_KV * GROUP, 0], q_full,
                    buf_q.index(part),
                )  # fmt: skip
            walked += 1
            new_block = old_slots // BLOCK_N - num_old
            copied = (i_local * num_epochs + i_epoch) * (num_slots // BLOCK_N)
            planned = (i_row * num_epochs + i_epoch) * (num_slots // BLOCK_N)
            for i in range(num_steps):
                block = gl.where(i < num_old, i, new_block + i)
                b = step % BUFFERS
                phase = step // BUFFERS & 1
                full = k_full.index(b)
                mbarrier.wait(empty.index(b), phase ^ 1)
                mbarrier.expect(full, BLOCK_N * (D * BYTES + (12 if HAS_BIAS else 8)))
                slot = (copied + block) * BLOCK_N
                line = planned + block
                tma.async_copy_global_to_shared(slots_k, [slot, 0], full, buf_k.index(b))
                tma.async_copy_global_to_shared(slots_start, [line, 0], full, buf_start.index(b))
                tma.async_copy_global_to_shared(slots_expiry, [line, 0], full, buf_expiry.index(b))
                if HAS_BIAS:
                    line = copied + block
                    tma.async_copy_global_to_shared(slots_bias, [line, 0], full, buf_bias.index(b))
                # The values of two steps ago were released together with the keys of one step ago.
                before = step + BUFFERS - 1
                mbarrier.wait(empty.index(before % BUFFERS), (before // BUFFERS & 1) ^ 1)
                mbarrier.expect(v_full.index(b), BLOCK_N * D * BYTES)
                tma.async_copy_global_to_shared(slots_v, [slot, 0], v_full.index(b), buf_v.index(b))
                step += 1


@gluon.jit
def lane_sums(block):
    """The part of every row's sum that one thread holds, ``[M, 4]``: no exchange until the end."""
    block = block.reshape([block.shape[0], block.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(block, 3), 1)


@gluon.jit
def _bias_of(buf_bias, b, HAS_BIAS: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """The biases in one buffer ``[N]``, to be asked for before the scores are there."""
    if HAS_BIAS:
        return buf_bias.index(b).reshape([BLOCK_N]).load(LAYOUT)
    else:
        return gl.zeros([BLOCK_N], gl.float32, LAYOUT)


@gluon.jit
def _softmax(
    scores, peak, total, at, bias, start, expiry, scale,
    MASKED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """As `tiles.softmax_update` from products: probabilities, factor, peak, total."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
    BLOCK_N: gl.constexpr = scores.shape[1]
    scores *= scale
    if HAS_BIAS:
        scores += bias[None, :]
    if MASKED:
        start = start.reshape([BLOCK_N]).load(COLUMNS)
        expiry = expiry.reshape([BLOCK_N]).load(COLUMNS)
        sees = (start[None, :] <= at[:, None]) & (at[:, None] < expiry[None, :])
        scores = gl.where(sees, scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1))
    probs = gl.exp2(scores - new_peak[:, None])
    factor = gl.exp2(peak - new_peak)
    kept = gl.convert_layout(factor, gl.SliceLayout(1, total.type.layout))[:, None]
    return probs, factor, new_peak, total * kept + lane_sums(probs)


@gluon.jit
def _step(
    probs, peak, total, acc, step, q, at, buf_k, buf_v, buf_bias, buf_start, buf_expiry, k_full,
    v_full, empty, turns, scale,
    MASKED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BUFFERS: gl.constexpr,
    PART: gl.constexpr,
):  # fmt: skip
    """Probabilities of block `step` while those of the block before meet its values."""
    b = step % BUFFERS
    before = (step - 1) % BUFFERS
    phase = step // BUFFERS & 1
    BLOCK_N: gl.constexpr = buf_k.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    nothing = gl.zeros([_ROWS, BLOCK_N], gl.float32, S)
    mbarrier.wait(k_full.index(b), phase)
    mbarrier.wait(turns.index(PART), step & 1)
    k = buf_k.index(b).permute([1, 0])
    scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
    acc = warpgroup_mma(probs, buf_v.index(before), acc, is_async=True)
    mbarrier.arrive(turns.index(1 - PART), count=1)
    bias = _bias_of(buf_bias, b, HAS_BIAS, BLOCK_N, gl.SliceLayout(0, S))
    scores = warpgroup_mma_wait(1, deps=[scores])
    new_probs, factor, peak, total = _softmax(
        scores, peak, total, at, bias, buf_start.index(b), buf_expiry.index(b), scale, MASKED,
        HAS_BIAS,
    )  # fmt: skip
    new_probs = gl.convert_layout(new_probs.to(buf_v.dtype), probs.type.layout)
    # Needed in the next step only. Waiting here ends a basic block: otherwise ptxas moves the
    # exponentials past the wait for the product, and nothing overlaps.
    mbarrier.wait(v_full.index(b), phase)
    acc, probs = warpgroup_mma_wait(0, deps=[acc, probs])
    # Every arrival stops all four warps: one for both, the keys of this step and the values of the
    # one before. Releasing keys as soon as their scores were there cost 5 %.
    mbarrier.arrive(empty.index(b), count=1)
    acc *= gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]
    return new_probs, peak, total, acc


@gluon.jit
def _consume(
    buf_q, buf_k, buf_v, buf_bias, buf_start, buf_expiry, q_full, q_empty, k_full, v_full, empty,
    turns, ptr_out, ptr_out_rest, has_rest, ptr_lse, ptr_peak, ptr_share, ptr_epochs, ptr_visible,
    ptr_entered, scale, num_items, num_rows, row_0, num_epochs, num_tiles, query_len, key_len,
    epoch_len,
    HEADS_KV: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    BUFFERS: gl.constexpr,
    TOGETHER: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_NORM: gl.constexpr,
    CLAMPS: gl.constexpr,
    PACKED: gl.constexpr,
    PART: gl.constexpr,
):  # fmt: skip
    """Attention of the rows of one part of every tile."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    HEADS: gl.constexpr = HEADS_KV * GROUP
    offs = PART * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, S))
    offs_lines = PART * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, LINES))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, LINES))
    q = buf_q.index(PART).reshape([_ROWS, D])
    nothing = gl.zeros([_ROWS, BLOCK_N], gl.float32, S)
    step, walked = 0, 0
    next_full, next_old, next_new = _blocks_of(
        gl.program_id(0), num_items, num_rows, row_0, num_epochs, num_tiles, ptr_epochs,
        ptr_visible, ptr_entered, query_len, key_len, epoch_len, GROUP, BLOCK_M, BLOCK_N, TOGETHER,
        PACKED,
    )  # fmt: skip
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        num_full = next_full
        num_steps = next_old + next_new
        # Asked for now, there when the next tile begins.
        next_full, next_old, next_new = _blocks_of(
            item + gl.num_programs(0), num_items, num_rows, row_0, num_epochs, num_tiles,
            ptr_epochs, ptr_visible, ptr_entered, query_len, key_len, epoch_len, GROUP, BLOCK_M,
            BLOCK_N, TOGETHER, PACKED,
        )  # fmt: skip
        i_local, i_epoch, i_tile = _tile_of(item, num_rows, num_epochs, num_tiles, TOGETHER)
        first, num, position = epoch_bounds(
            i_epoch, ptr_epochs, query_len, key_len, epoch_len, PACKED
        )
        row = i_tile * BLOCK_M + offs  # [64]
        at = position + row // GROUP
        if CLAMPS:
            at = gl.maximum(at, 0)
        peak = gl.full([_ROWS], LOWEST, gl.float32, gl.SliceLayout(1, S))
        total = lane_sums(nothing)
        acc = gl.zeros([_ROWS, D], gl.float32, ACC)
        # Triton 3.6 forgets to carry a variable around a loop that is read in nested blocks alone,
        # so that `num_full` stands in this condition, too; it is never above `num_steps`.
        if gl.maximum(num_full, num_steps) > 0:
            b = step % BUFFERS
            phase = step // BUFFERS & 1
            mbarrier.wait(q_full, walked & 1)
            mbarrier.wait(k_full.index(b), phase)
            mbarrier.wait(turns.index(PART), step & 1)
            k = buf_k.index(b).permute([1, 0])
            scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            mbarrier.arrive(turns.index(1 - PART), count=1)
            bias = _bias_of(buf_bias, b, HAS_BIAS, BLOCK_N, gl.SliceLayout(0, S))
            scores = warpgroup_mma_wait(0, deps=[scores])
            probs, _factor, peak, total = _softmax(
                scores, peak, total, at, bias, buf_start.index(b), buf_expiry.index(b), scale,
                True, HAS_BIAS,
            )  # fmt: skip
            probs = gl.convert_layout(probs.to(buf_v.dtype), gl.DotOperandLayout(0, ACC, 2))
            mbarrier.wait(v_full.index(b), phase)
            mbarrier.arrive(empty.index(b), count=1)
            for i in range(1, num_full):
                probs, peak, total, acc = _step(
                    probs, peak, total, acc, step + i, q, at, buf_k, buf_v, buf_bias, buf_start,
                    buf_expiry, k_full, v_full, empty, turns, scale, False, HAS_BIAS,
                    BUFFERS, PART,
                )  # fmt: skip
            for i in range(gl.maximum(num_full, 1), num_steps):
                probs, peak, total, acc = _step(
                    probs, peak, total, acc, step + i, q, at, buf_k, buf_v, buf_bias, buf_start,
                    buf_expiry, k_full, v_full, empty, turns, scale, True, HAS_BIAS,
                    BUFFERS, PART,
                )  # fmt: skip
            mbarrier.arrive(q_empty, count=1)
            step += num_steps
            walked += 1
            # The next step releases these values.
            acc = warpgroup_mma(probs, buf_v.index((step - 1) % BUFFERS), acc, is_async=True)
            acc, probs = warpgroup_mma_wait(0, deps=[acc, probs])

        total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, S))  # [64]
        is_empty = total == 0
        total = gl.where(is_empty, 1.0, total)
        share = 1.0 / total
        acc *= gl.convert_layout(share, gl.SliceLayout(1, ACC))[:, None]
        i_row = (row_0 + i_local).to(gl.int64)
        i_batch, i_head = i_row // HEADS_KV, i_row % HEADS_KV * GROUP
        line = i_tile * BLOCK_M + offs_lines  # [64]
        index = (i_batch * query_len + first + line // GROUP) * HEADS + i_head + line % GROUP
        offs_out = (index * D)[:, None] + offs_d[None, :]
        out = acc.to(buf_v.dtype)
        is_line = (line < num * GROUP)[:, None]
        gl.store(ptr_out + offs_out, gl.convert_layout(out, LINES), mask=is_line)
        is_row = row < num * GROUP
        index = (i_batch * HEADS + i_head + row % GROUP) * query_len + first + row // GROUP
        lse = gl.where(is_empty, float("-inf"), (peak + gl.log2(total)) * _LN2)
        gl.store(ptr_lse + index, lse, mask=is_row)
        if HAS_NORM:
            index = (i_row * query_len + first) * GROUP + row
            gl.store(ptr_peak + index, gl.where(is_empty, float("inf"), peak), mask=is_row)
            gl.store(ptr_share + index, gl.where(is_empty, 0.0, share), mask=is_row)
            # Last: beside the output, what the roles share would be spilled.
            if has_rest > 0:
                lost = (acc - out.to(gl.float32)).to(buf_v.dtype)
                gl.store(ptr_out_rest + offs_out, gl.convert_layout(lost, LINES), mask=is_line)


@gluon.jit(do_not_specialize=NUMBERS)
def gluon_forward_kernel(
    tiles_q, slots_k, slots_v, slots_bias, slots_start, slots_expiry, ptr_out, ptr_out_rest,
    has_rest, ptr_lse, ptr_peak, ptr_share, ptr_epochs, ptr_visible, ptr_entered, scale, num_items,
    num_rows, row_0, num_epochs, num_tiles, query_len, key_len, epoch_len, old_slots, num_slots,
    HEADS_KV: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    BUFFERS: gl.constexpr,
    TOGETHER: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_NORM: gl.constexpr,
    CLAMPS: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """Output, natural log-sum-exp, and for backward the same as the kernel of `forward.py`."""
    PARTS: gl.constexpr = BLOCK_M // _ROWS
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    LINE: gl.constexpr = slots_start.layout
    buf_q = gl.allocate_shared_memory(
        tiles_q.dtype, [PARTS, 1, _ROWS // GROUP, GROUP, D], tiles_q.layout
    )
    buf_k = gl.allocate_shared_memory(slots_k.dtype, [BUFFERS, BLOCK_N, D], slots_k.layout)
    buf_v = gl.allocate_shared_memory(slots_v.dtype, [BUFFERS, BLOCK_N, D], slots_v.layout)
    buf_bias = gl.allocate_shared_memory(gl.float32, [BUFFERS, 1, BLOCK_N], LINE)
    buf_start = gl.allocate_shared_memory(gl.int32, [BUFFERS, 1, BLOCK_N], LINE)
    buf_expiry = gl.allocate_shared_memory(gl.int32, [BUFFERS, 1, BLOCK_N], LINE)
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [PARTS, 1], BARRIER)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=PARTS)
    for b in gl.static_range(BUFFERS):
        mbarrier.init(k_full.index(b), count=1)
        mbarrier.init(empty.index(b), count=PARTS)
        mbarrier.init(v_full.index(b), count=1)
    for part in gl.static_range(PARTS):
        mbarrier.init(turns.index(part), count=1)
    hopper.fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    gl.warp_specialize(
        [
            (_consume, (
                buf_q, buf_k, buf_v, buf_bias, buf_start, buf_expiry, q_full, q_empty, k_full,
                v_full, empty, turns, ptr_out, ptr_out_rest, has_rest, ptr_lse, ptr_peak, ptr_share,
                ptr_epochs, ptr_visible, ptr_entered, scale, num_items, num_rows, row_0, num_epochs,
                num_tiles, query_len, key_len, epoch_len, HEADS_KV, GROUP, BLOCK_M, BLOCK_N, D,
                BUFFERS, TOGETHER, HAS_BIAS, HAS_NORM, CLAMPS, PACKED, 0,
            )),
            (_consume, (
                buf_q, buf_k, buf_v, buf_bias, buf_start, buf_expiry, q_full, q_empty, k_full,
                v_full, empty, turns, ptr_out, ptr_out_rest, has_rest, ptr_lse, ptr_peak, ptr_share,
                ptr_epochs, ptr_visible, ptr_entered, scale, num_items, num_rows, row_0, num_epochs,
                num_tiles, query_len, key_len, epoch_len, HEADS_KV, GROUP, BLOCK_M, BLOCK_N, D,
                BUFFERS, TOGETHER, HAS_BIAS, HAS_NORM, CLAMPS, PACKED, 1,
            )),
            (_produce, (
                tiles_q, slots_k, slots_v, slots_bias, slots_start, slots_expiry, buf_q, buf_k,
                buf_v, buf_bias, buf_start, buf_expiry, q_full, q_empty, k_full, v_full, empty,
                ptr_epochs, ptr_visible, ptr_entered, num_items, num_rows, row_0,
                num_epochs, num_tiles, query_len, key_len, epoch_len, old_slots, num_slots,
                HEADS_KV, GROUP, BLOCK_M, BLOCK_N, D, BUFFERS, TOGETHER, HAS_BIAS, PACKED,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def describe_rows(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """A descriptor of blocks of a contiguous tensor, seen as rows as wide as a block."""
    swizzle = 128 if tensor.element_size() == 2 else 0
    layout = gl.NVMMASharedLayout(swizzle, 8 * tensor.element_size(), len(block))
    return TensorDescriptor.from_tensor(tensor.view(-1, block[-1]), block, layout)


def describe_tiles(tensor: Tensor, group: int, block_m: int) -> TensorDescriptor | None:
    """`inputs.query_tiles` for a kernel in Gluon."""
    tiles = query_tiles(tensor, group, block_m)
    if tiles is None:
        return None
    layout = gl.NVMMASharedLayout(128, 8 * tensor.element_size(), 4)
    return TensorDescriptor(tensor, tiles.shape, tiles.strides, tiles.block_shape, layout)


def gluon_forward(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    config: RoleConfig,
    *,
    with_norm: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """As `forward.forward`; ``None`` for a call that this kernel does not serve.

    Args:
        plan, query, key, value, call, with_norm: As there.
        config: Sizes, from the table.
    """
    batch, query_len, num_heads, head_dim = query.shape
    heads_kv = key.shape[2]
    group = num_heads // heads_kv
    tiles_q = describe_tiles(query, group, _ROWS.value)
    if tiles_q is None or not call.is_plain:
        return None
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_heads, query_len, dtype=torch.float32, device=query.device)
    norm = lse.new_empty((2, *lse.shape)) if with_norm else None
    peak, share = (None, None) if norm is None else (norm[0], norm[1])
    out_rest = torch.empty_like(out) if with_norm and keeps_rest(out) else None
    block, line = [config.block_n, head_dim], [1, config.block_n]
    num_tiles = triton.cdiv(plan.epoch_len * group, config.block_m)
    rows = batch * heads_kv
    chunk = slot_rows(rows, plan.num_epochs * plan.num_slots * head_dim, query, key)
    for row in range(0, rows, chunk):
        now = range(row, min(row + chunk, rows))
        slots = copy_slots(plan, key, value, call.bias, now)
        assert slots.key is not None and slots.value is not None
        num_items = len(now) * plan.num_epochs * num_tiles
        assert plan.slot_start is not None and plan.slot_expiry is not None
        launch(gluon_forward_kernel, min(num_items, _multiprocessors(query.device)))(
            tiles_q, describe_rows(slots.key, block), describe_rows(slots.value, block),
            None if slots.bias is None else describe_rows(slots.bias, line),
            describe_rows(plan.slot_start, line), describe_rows(plan.slot_expiry, line), out,
            *rest_arguments(out, out_rest), lse, peak, share, plan.epochs, plan.visible,
            plan.entered, call.factors[0], num_items, len(now), row, plan.num_epochs, num_tiles,
            query_len, plan.key_len, plan.epoch_len, plan.old_slots, plan.num_slots,
            HEADS_KV=heads_kv, GROUP=group, BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, D=head_dim, BUFFERS=config.buffers,
            TOGETHER=config.rows_together, CONSUMER_REGISTERS=config.consumer_registers,
            PRODUCER_REGISTERS=config.producer_registers, HAS_BIAS=slots.bias is not None,
            HAS_NORM=with_norm, CLAMPS=plan.clamps_positions, PACKED=plan.epochs is not None,
            num_warps=4, maxnreg=config.registers,
        )  # fmt: skip
    return out, lse, norm, out_rest
