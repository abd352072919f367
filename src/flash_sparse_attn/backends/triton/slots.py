"""Where the kernels read keys, values and per-key bias of the slots of a plan.

All tiles of an epoch read the same slots, so that one copy pays for itself where their number is
bounded: tiles then load whole blocks instead of gathering rows. Empty slots of a used block hold
zeros. Of other plans keys and values are read from the call's own tensors, and only a bias per key
is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...plan import Plan
from .config import SLOT_ALIGN, TileConfig, architecture_of, padded_head_dim, slot_rows
from .inputs import Bias, Call, head_tiles, is_aligned
from .launch import launch
from .tiles import NUMBERS, load_rows, log2_bias, row_and_rest, row_offsets

_BIASES = 512  # slots whose bias one program copies where keys and values are not


@triton.jit
def _block_of(num_lists, num_blocks, row_0, plan_b, plan_h, HEADS_KV: tl.constexpr):
    """Of this program: row among those at hand, batch entry, KV head, list, its number in the plan,
    and block."""
    i_local, rest = row_and_rest(num_lists * num_blocks)
    i_list, i_block = rest // num_blocks, rest % num_blocks
    i_row = row_0 + i_local
    i_batch, i_head = i_row // HEADS_KV, i_row % HEADS_KV
    plan_list = (i_batch * plan_b + i_head * plan_h) * num_lists + i_list
    return i_local, i_batch, i_head, i_list, plan_list, i_block


@triton.jit(do_not_specialize=NUMBERS)
def copy_kernel(
    ptr_k,
    ptr_v,
    ptr_bias,
    ptr_key,
    ptr_counts,
    ptr_slot_k,
    ptr_slot_v,
    ptr_slot_bias,
    num_lists,
    old_slots,
    num_slots,
    num_blocks,
    row_0,
    plan_b,
    plan_h,
    skb: tl.int64,
    skn: tl.int64,
    skh: tl.int64,
    svb: tl.int64,
    svn: tl.int64,
    svh: tl.int64,
    sbb: tl.int64,
    sbk: tl.int64,
    sbg: tl.int64,
    sbn: tl.int64,
    HEADS_KV: tl.constexpr,
    MEMBERS: tl.constexpr,
    D: tl.constexpr,
    SLOT_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One program per (row, list, block of slots)."""
    i_local, i_batch, i_head, i_list, plan_list, i_block = _block_of(
        num_lists, num_blocks, row_0, plan_b, plan_h, HEADS_KV
    )
    slot_0 = i_block * BLOCK_N
    part = (slot_0 >= old_slots).to(tl.int32)
    used = tl.load(ptr_counts + plan_list * 2 + part)
    # Whole blocks of the largest size are written: kernels read them whole.
    used = tl.cdiv(used, 128) * 128
    if slot_0 - part * old_slots < used:
        slot = slot_0 + tl.arange(0, BLOCK_N)  # [N]
        key = tl.load(ptr_key + plan_list * num_slots + slot)
        out = tl.multiple_of((i_local * num_lists + i_list) * num_slots, 128) + slot
        filled = key >= 0
        if ROWS:
            offs_d = tl.arange(0, BLOCK_D)
            mask = tl.broadcast_to((offs_d < SLOT_D)[None, :], [BLOCK_N, BLOCK_D])
            offs_out = (out * SLOT_D)[:, None] + offs_d[None, :]
            ptr_k += row_offsets(i_batch, skb, ALIGNED) + row_offsets(i_head, skh, ALIGNED)
            ptr_v += row_offsets(i_batch, svb, ALIGNED) + row_offsets(i_head, svh, ALIGNED)
            k = load_rows(ptr_k, row_offsets(key, skn, ALIGNED), filled, D, BLOCK_D, True)
            v = load_rows(ptr_v, row_offsets(key, svn, ALIGNED), filled, D, BLOCK_D, True)
            tl.store(ptr_slot_k + offs_out, k, mask=mask)
            tl.store(ptr_slot_v + offs_out, v, mask=mask)
        if HAS_BIAS:
            ptr_bias += i_batch * sbb + i_head * sbk
            for member in tl.static_range(MEMBERS):
                ptrs = ptr_bias + member * sbg + key * sbn
                bias = log2_bias(tl.load(ptrs, mask=filled, other=0.0))
                base = ((i_local * MEMBERS + member) * num_lists + i_list) * num_slots
                tl.store(ptr_slot_bias + base + slot, bias)


@triton.jit(do_not_specialize=NUMBERS)
def bias_kernel(
    ptr_bias,
    ptr_key,
    ptr_counts,
    ptr_slot_bias,
    key_len,
    num_lists,
    num_slots,
    num_blocks,
    row_0,
    plan_b,
    plan_h,
    sbb: tl.int64,
    sbk: tl.int64,
    sbg: tl.int64,
    sbn: tl.int64,
    HEADS_KV: tl.constexpr,
    MEMBERS: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (row, list, block of slots), or per (row, block of keys) without lists."""
    i_local, i_batch, i_head, i_list, plan_list, i_block = _block_of(
        num_lists, num_blocks, row_0, plan_b, plan_h, HEADS_KV
    )
    slot = i_block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    used = num_slots
    if LISTED:
        used = tl.cdiv(tl.load(ptr_counts + plan_list * 2), 128) * 128
    if i_block * BLOCK < used:
        if LISTED:
            ptrs = ptr_key + tl.multiple_of(plan_list * num_slots, 128) + slot
            key = tl.load(ptrs, mask=slot < used, other=-1)
        else:
            key = tl.where(slot < key_len, slot, -1)
        ptr_bias += i_batch * sbb + i_head * sbk
        for member in tl.static_range(MEMBERS):
            ptrs = ptr_bias + member * sbg + key.to(tl.int64) * sbn
            bias = log2_bias(tl.load(ptrs, mask=key >= 0, other=0.0))
            out = ((i_local * MEMBERS + member) * num_lists + i_list) * num_slots
            tl.store(ptr_slot_bias + tl.multiple_of(out, 128) + slot, bias, mask=slot < used)


@dataclass(frozen=True)
class Slots:
    """Where the slots of some rows of a plan are read.

    Attributes:
        key: Copies ``[rows, lists, P, SLOT_D]``, or the call's own ``[B, K, Hkv, D]``; ``None`` if
            only the bias is copied.
        value: The same.
        bias: fp32 copies ``[rows, members, lists, P]`` in units of log 2, or ``None``; where slots
            are the keys in the order of keys, a multiple of 128 with at least one block more.
        are_copies: Which of the two keys and values are.
    """

    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None
    are_copies: bool

    def sources(self, block_n: int, uses_tma: bool) -> tuple[Any, Any]:
        """What a kernel loads blocks of keys and values from: descriptors, or the pointers."""
        if not uses_tma:
            return self.key, self.value

        def describe(tensor: Tensor) -> TensorDescriptor:
            if self.are_copies:
                block = [block_n, padded_head_dim(tensor.shape[-1])]
                return TensorDescriptor.from_tensor(tensor.view(-1, tensor.shape[-1]), block)
            descriptor = head_tiles(tensor, [1, block_n, 1])
            assert descriptor is not None
            return descriptor

        assert self.key is not None and self.value is not None
        return describe(self.key), describe(self.value)


def slot_dim(head_dim: int) -> int:
    """Elements of a copied row: whole units of 16 bytes."""
    return -(-head_dim // 8) * 8


def slot_chunks(plan: Plan, rows: range, query: Tensor, key: Tensor) -> list[range]:
    """How many rows are taken at a time, so that copies stay small beside the call's tensors."""
    step = len(rows)
    if plan.slots == "copied":
        elements = plan.num_lists * plan.num_slots * slot_dim(key.shape[3])
        step = slot_rows(len(rows), elements, query, key)
    return [range(row, min(row + step, rows.stop)) for row in range(rows.start, rows.stop, step)]


def uses_descriptors(plan: Plan, key: Tensor, value: Tensor, config: TileConfig) -> bool:
    """Whether blocks of slots are loaded through tensor descriptors."""
    if plan.slots != "keys" or not config.uses_tma:
        return config.uses_tma and plan.slots == "copied"
    return plan.epochs is None and all(
        head_tiles(tensor, [1, 1, 1]) is not None for tensor in (key, value)
    )


def run_sources(
    plan: Plan, key: Tensor, value: Tensor, call: Call, config: TileConfig
) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """What a kernel loads neighbouring keys and values of gathered slots from, see `block_lists`.

    ``None`` where it gathers them row by row all the same: a bias of pairs costs more than that,
    and Triton 3.6 fails to compile both ways in one kernel for sm_100.
    """
    reads_pairs = call.bias is not None and not call.bias.is_per_key
    can_load = config.uses_tma and architecture_of(key.device) != "sm_100"
    if plan.slots != "gathered" or reads_pairs or not can_load:
        return None, None
    of_key, of_value = (head_tiles(tensor, [1, config.block_n, 1]) for tensor in (key, value))
    return (None, None) if of_key is None or of_value is None else (of_key, of_value)


def slots_of(
    plan: Plan,
    key: Tensor,
    value: Tensor,
    bias: Bias | None,
    rows: range,
    *,
    with_rows: bool = True,
) -> Slots:
    """The slots of some rows: copies, or where the plan has none the call's own tensors.

    Of these, too, the bias is copied: fetched and scaled in the loop over the slots it would cost
    as many instructions as all the rest.
    """
    if plan.slots == "copied":
        return copy_slots(plan, key, value, bias, rows, with_rows=with_rows)
    if bias is None or not bias.is_per_key or not with_rows:
        return Slots(key, value, None, False)
    return Slots(key, value, _copy_bias(plan, key, bias, rows), False)


def _copy_bias(plan: Plan, key: Tensor, bias: Bias, rows: range) -> Tensor:
    key_len, heads_kv = key.shape[1], key.shape[2]
    is_listed = plan.slots == "gathered"
    num_lists, num_slots = 1, (triton.cdiv(key_len, SLOT_ALIGN) + 1) * SLOT_ALIGN
    if is_listed:
        num_lists, num_slots = plan.num_lists, plan.num_slots
    shape = (len(rows), bias.members, num_lists, num_slots)
    slot_bias = torch.empty(shape, dtype=torch.float32, device=key.device)
    num_blocks = triton.cdiv(num_slots, _BIASES)
    launch(bias_kernel, len(rows) * num_lists * num_blocks)(
        bias.tensor, plan.slot_key, plan.counts, slot_bias, key_len, num_lists, num_slots,
        num_blocks, rows.start, *plan.row_strides(heads_kv), *bias.key_strides, HEADS_KV=heads_kv,
        MEMBERS=bias.members, LISTED=is_listed, BLOCK=_BIASES, num_warps=4,
    )  # fmt: skip
    return slot_bias


def copy_slots(
    plan: Plan,
    key: Tensor,
    value: Tensor,
    bias: Bias | None,
    rows: range,
    *,
    with_rows: bool = True,
) -> Slots:
    """Copy keys, values and a per-key bias to the slots of some rows of a plan."""
    head_dim, heads_kv = key.shape[3], key.shape[2]
    shape = (len(rows), plan.num_lists, plan.num_slots)
    slot_key = slot_value = slot_bias = None
    if with_rows:
        slot_key = torch.empty(*shape, slot_dim(head_dim), dtype=key.dtype, device=key.device)
        slot_value = torch.empty_like(slot_key)
    has_bias = bias is not None and bias.is_per_key
    members = 1
    strides = (0, 0, 0, 0)
    if bias is not None and bias.is_per_key:
        members, strides = bias.members, bias.key_strides
        slot_bias = torch.empty(
            shape[0], members, *shape[1:], dtype=torch.float32, device=key.device
        )
    if with_rows or has_bias:
        block_n = max(16, min(SLOT_ALIGN, 8192 // padded_head_dim(head_dim))) if with_rows else 128
        num_blocks = plan.num_slots // block_n
        launch(copy_kernel, len(rows) * plan.num_lists * num_blocks)(
            key, value, bias.tensor if has_bias and bias else None, plan.slot_key, plan.counts,
            slot_key, slot_value, slot_bias, plan.num_lists, plan.old_slots, plan.num_slots,
            num_blocks, rows.start, *plan.row_strides(heads_kv), *key.stride()[:3],
            *value.stride()[:3], *strides,
            HEADS_KV=heads_kv, MEMBERS=members, D=head_dim, SLOT_D=slot_dim(head_dim),
            BLOCK_D=padded_head_dim(head_dim), BLOCK_N=block_n, ROWS=with_rows, HAS_BIAS=has_bias,
            ALIGNED=is_aligned(key, value), num_warps=4,
        )  # fmt: skip
    return Slots(slot_key, slot_value, slot_bias, True)
