"""The sum of what the epochs contributed to the gradients of a key, in order, rounded once."""

from __future__ import annotations

import triton
import triton.language as tl

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
