"""The sum of what the epochs contributed to the gradients of a key, in order, rounded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import Plan
from .config import REDUCED_FLOATS, USES_AT_ONCE, padded_head_dim, partial_rows
from .inputs import Saved
from .launch import launch
from .tiles import NUMBERS, load_rows, row_and_rest, store_rows

_SEARCHED = tl.constexpr(32)  # epochs whose use of keys is looked up together


@triton.jit(do_not_specialize=NUMBERS)
def reduce_kernel(
    ptr_part_k, ptr_part_v, ptr_part_bias, ptr_use_end, ptr_use_slot, ptr_grad_k, ptr_grad_v,
    ptr_grad_bias, query_len, key_len, epoch_len, num_epochs, num_lists, num_slots, num_blocks,
    row_0, plan_b, plan_h,
    HEADS_KV: tl.constexpr,
    MEMBERS: tl.constexpr,
    MEMBERS_PAD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USES: tl.constexpr,
    SLOTS: tl.constexpr,
    LISTED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    NEEDS_KEY: tl.constexpr,
    NEEDS_VALUE: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
):  # fmt: skip
    """One program per (row, block of keys): the sum over the epochs of each key, or zero.

    `USES` steps are written out, so that their loads are on their way together.
    """
    i_local, i_block = row_and_rest(num_blocks)
    i_row = row_0 + i_local
    key = i_block * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    live = key < key_len
    begin, first = i_row * 0, i_row * 0
    uses = tl.full([BLOCK_K], num_epochs, tl.int32)
    if LISTED:
        index = i_row * key_len + key
        end = tl.load(ptr_use_end + index, mask=live, other=0)
        begin = tl.load(ptr_use_end + index - 1, mask=live & (index > 0), other=0)
        uses = (end - begin).to(tl.int32)
    elif PACKED:
        uses = tl.full([BLOCK_K], 1, tl.int32)  # an epoch is a sequence
    elif CAUSAL:
        # Not before the epoch of the query at the first key's position.
        first = tl.maximum(i_block * BLOCK_K - key_len + query_len, 0) // epoch_len
    plan_row = i_row // HEADS_KV * plan_b + i_row % HEADS_KV * plan_h
    if not LISTED and not PACKED and SLOTS != "keys":
        # From the first to the last epoch that sees any of the keys.
        since, until = first * 0 + num_epochs, first * 0
        for i in range(first, num_epochs, _SEARCHED):
            epoch = i + tl.arange(0, _SEARCHED)
            i_list = plan_row * num_lists + epoch % num_lists
            ptrs = ptr_use_slot + (i_list * key_len)[:, None] + key[None, :]
            mask = (epoch < num_epochs)[:, None] & live[None, :]
            sees = tl.max(tl.load(ptrs, mask=mask, other=-1), 1) >= 0
            since = tl.minimum(since, tl.min(tl.where(sees, epoch, num_epochs), 0))
            until = tl.maximum(until, tl.max(tl.where(sees, epoch + 1, 0), 0))
        first = since
        uses = tl.zeros([BLOCK_K], tl.int32) + until.to(tl.int32)
    part_base = i_local * num_epochs * num_slots
    grad_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_K, MEMBERS_PAD], tl.float32)
    member = tl.arange(0, MEMBERS_PAD)
    for i in range(first, tl.max(uses, 0), USES):
        for step in tl.static_range(USES):
            used = (i + step < uses) & live
            if LISTED:
                slot = tl.load(ptr_use_slot + begin + i + step, mask=used, other=0)
            elif PACKED:
                slot = tl.load(ptr_use_slot + key, mask=used, other=-1)
                used = used & (slot >= 0)
            else:
                slot = key
                if SLOTS != "keys":
                    i_list = plan_row * num_lists + (i + step) % num_lists
                    slot = tl.load(ptr_use_slot + i_list * key_len + key, mask=used, other=-1)
                    used = used & (slot >= 0)
                slot += (i + step) * num_slots
            slot = part_base + slot
            if NEEDS_KEY:
                grad_k += load_rows(ptr_part_k, slot * D, used, D, BLOCK_D, True)
            if NEEDS_VALUE:
                grad_v += load_rows(ptr_part_v, slot * D, used, D, BLOCK_D, True)
            if NEEDS_BIAS:
                ptrs = ptr_part_bias + (slot * MEMBERS)[:, None] + member[None, :]
                mask = used[:, None] & (member < MEMBERS)[None, :]
                grad_bias += tl.load(ptrs, mask=mask, other=0.0)
    out = (i_row // HEADS_KV * key_len + key) * HEADS_KV + i_row % HEADS_KV
    if NEEDS_KEY:
        store_rows(ptr_grad_k, out * D, live, grad_k, D, BLOCK_D)
    if NEEDS_VALUE:
        store_rows(ptr_grad_v, out * D, live, grad_v, D, BLOCK_D)
    if NEEDS_BIAS:
        ptrs = ptr_grad_bias + (i_row * MEMBERS + member)[None, :] * key_len + key[:, None]
        tl.store(ptrs, grad_bias, mask=live[:, None] & (member < MEMBERS)[None, :])


@dataclass(frozen=True)
class Parts:
    """What every epoch contributes to the gradients of its slots, for some rows after the others.

    Attributes:
        plan: Of the call.
        tensors: fp32 ``[rows, E, P, D]`` of keys and of values, and ``[rows, E, P, members]`` of a
            bias per key; ``None`` for what is not asked for.
        grads: What they are summed to: gradients of key and value, ``[B, K, Hkv, D]``, and of the
            bias, fp32 ``[B, Hkv * members, 1, K]``, all contiguous.
        chunks: Rows of keys that are taken at a time, to bound memory.
        shape: ``(K, Hkv, D, members)``.
    """

    plan: Plan
    tensors: tuple[Tensor | None, Tensor | None, Tensor | None]
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]
    chunks: list[range]
    shape: tuple[int, int, int, int]

    @classmethod
    def of(
        cls,
        plan: Plan,
        saved: Saved,
        members: int,
        grad_key: Tensor | None,
        grad_value: Tensor | None,
        grad_bias: Tensor | None,
    ) -> Parts:
        """Room for the parts of these gradients."""
        key_len, heads_kv, head_dim = saved.key.shape[1:]
        rows = len(saved.rows)
        elements = plan.num_epochs * plan.num_slots * head_dim
        step = partial_rows(rows, elements, saved.query, saved.key)
        grads = grad_key, grad_value, grad_bias
        tensors = (
            None if grad is None else torch.empty(
                (step, plan.num_epochs, plan.num_slots, last), dtype=torch.float32,
                device=grad.device,
            )
            for grad, last in zip(grads, (head_dim, head_dim, members), strict=True)
        )  # fmt: skip
        chunks = [range(row, min(row + step, rows)) for row in range(0, rows, step)]
        return cls(plan, tuple(tensors), grads, chunks, (key_len, heads_kv, head_dim, members))  # type: ignore[arg-type]

    @property
    def flags(self) -> dict[str, Any]:
        """Which gradients are asked for, as constants of kernels."""
        names = "NEEDS_KEY", "NEEDS_VALUE", "NEEDS_BIAS"
        return {name: grad is not None for name, grad in zip(names, self.grads, strict=True)}

    def add_up(self, rows: range) -> None:
        """Fill the gradients of some rows."""
        plan = self.plan
        key_len, heads_kv, head_dim, members = self.shape
        block_k = max(1, REDUCED_FLOATS // padded_head_dim(head_dim))
        key_blocks = triton.cdiv(key_len, block_k)
        launch(reduce_kernel, len(rows) * key_blocks)(
            *self.tensors, plan.use_end, plan.use_slot, *self.grads, plan.query_len, key_len,
            plan.epoch_len, plan.num_epochs, plan.num_lists, plan.num_slots, key_blocks, rows.start,
            *plan.row_strides(heads_kv), HEADS_KV=heads_kv, MEMBERS=members,
            MEMBERS_PAD=triton.next_power_of_2(members), D=head_dim,
            BLOCK_D=padded_head_dim(head_dim), BLOCK_K=block_k, USES=USES_AT_ONCE, SLOTS=plan.slots,
            LISTED=plan.use_end is not None, CAUSAL=not plan.clamps_positions,
            PACKED=plan.epochs is not None, **self.flags, num_warps=4,
        )  # fmt: skip
