"""Backward over epochs, without atomics: every sum has one owner and one order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...plan import Plan
from .block_lists import slot_lists
from .config import (
    REDUCED_FLOATS,
    USES_AT_ONCE,
    TileConfig,
    Tiles,
    architecture_of,
    padded_head_dim,
    partial_rows,
    tiles_for,
)
from .grad_key import grad_key_kernel
from .grad_pair import run_grad_pair
from .grad_query import num_query_tiles, run_grad_query
from .inputs import (
    Call,
    Saved,
    has_rows,
    is_aligned,
    mask_strides,
    pair_tensors,
    plan_flags,
    query_tiles,
    shares_bias,
    words_of_tile,
)
from .launch import launch
from .reduce import reduce_kernel
from .slots import slots_of


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for."""

    query: bool = True
    key: bool = True
    value: bool = True
    bias: bool = False


def backward(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    norm: Tensor,
    out_rest: Tensor | None,
    grad_out: Tensor,
    call: Call,
    needs: Needs,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients that `needs` asks for; bitwise repeatable.

    Args:
        plan: As in `forward`, made for backward.
        query, key, value: As in `forward`.
        out: ``[B, Q, H, D]``, contiguous, from `forward`.
        norm, out_rest: From `forward`.
        grad_out: ``[B, Q, H, D]``, any strides.
        call: As in `forward`.
        needs: Which gradients.
        tiles: Tile sizes; default from the table.

    Returns:
        Gradients of query, key and value, contiguous, and of the bias in its shape and dtype;
        ``None`` for those not asked for.
    """
    if tiles is None:
        reads_pairs = bool(pair_tensors(plan, call))
        tiles = tiles_for(architecture_of(query.device), query.shape[-1], reads_pairs)
    delta = torch.empty(norm.shape[1:], dtype=torch.float32, device=norm.device)
    saved = Saved(query, key, value, out, out_rest, grad_out, norm, delta)
    bias = call.bias if needs.bias else None
    grad_query = _fresh(needs.query, query)
    grad_bias: Tensor | None = None
    if bias is not None and bias.tensor.shape[3] == 1:
        # Adding one number to all scores of a row changes nothing.
        grad_bias, bias = torch.zeros_like(bias.tensor, memory_format=torch.contiguous_format), None
    slot_bias = None
    if bias is not None and not bias.is_per_key:
        grad_bias = run_grad_pair(plan, saved, call, tiles.grad_query, grad_query, bias)
    else:
        slot_bias = run_grad_query(plan, saved, call, tiles.grad_query, grad_query)
    grad_key, grad_value = _fresh(needs.key, key), _fresh(needs.value, value)
    per_key = None
    if bias is not None and bias.is_per_key:
        batch, key_len, heads_kv, _ = key.shape
        shape = (batch, heads_kv * bias.members, 1, key_len)
        per_key = torch.empty(shape, dtype=torch.float32, device=key.device)
    if needs.key or needs.value or per_key is not None:
        _run_grad_key(plan, saved, call, tiles.grad_key, grad_key, grad_value, per_key, slot_bias)
    if per_key is not None and bias is not None:
        grad_bias = _sum_to(per_key, bias.tensor.shape, bias.heads_kv)
        # A cast to the same dtype, too, is an operator, and calls with operators are not repeated.
        if grad_bias.dtype != bias.tensor.dtype:
            grad_bias = grad_bias.to(bias.tensor.dtype)
    return grad_query, grad_key, grad_value, grad_bias


def _fresh(wanted: bool, like: Tensor) -> Tensor | None:
    return torch.empty_like(like, memory_format=torch.contiguous_format) if wanted else None


def _sum_to(grad: Tensor, shape: torch.Size, heads_kv: int) -> Tensor:
    """Sum a 4-D gradient over the dimensions in which the bias is broadcast, in fp32."""
    if shape[1] == heads_kv and grad.shape[1] != heads_kv:
        grad = grad.unflatten(1, (heads_kv, -1)).sum(2)
    dims = [d for d in range(4) if shape[d] == 1 and grad.shape[d] > 1]
    return grad.sum(dims, keepdim=True) if dims else grad


def _run_grad_key(
    plan: Plan,
    saved: Saved,
    call: Call,
    config: TileConfig,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_bias: Tensor | None,
    slot_bias: Tensor | None,
) -> None:
    """Fill the gradients that are not ``None``, some rows after the others to bound memory.

    Args:
        plan, saved, call: Of the call; delta is filled.
        config: Tile sizes.
        grad_key: ``[B, K, Hkv, D]``, contiguous.
        grad_value: ``[B, K, Hkv, D]``, contiguous.
        grad_bias: fp32 ``[B, Hkv * members, 1, K]``, contiguous, of a bias per key.
        slot_bias: From `run_grad_query`.
    """
    query, key, value = saved.query, saved.key, saved.value
    batch, key_len, heads_kv, head_dim = key.shape
    group = query.shape[2] // heads_kv
    members = 1 if call.bias is None else call.bias.members
    flags = {
        "NEEDS_KEY": grad_key is not None,
        "NEEDS_VALUE": grad_value is not None,
        "NEEDS_BIAS": grad_bias is not None,
    }
    rows = batch * heads_kv
    chunk = partial_rows(rows, plan.num_epochs * plan.num_slots * head_dim, query, key)

    def part(wanted: bool, *last: int) -> Tensor | None:
        shape = (chunk, plan.num_epochs, plan.num_slots, *last)
        return torch.empty(shape, dtype=torch.float32, device=key.device) if wanted else None

    part_key = part(grad_key is not None, head_dim)
    part_value = part(grad_value is not None, head_dim)
    part_bias = part(grad_bias is not None, members)
    tiles_q: Any = None
    tiles_grad: Any = None
    if config.uses_tma:
        tiles_q = query_tiles(query, group, config.block_m)
        tiles_grad = query_tiles(saved.grad_out, group, config.block_m)
    num_blocks = triton.cdiv(plan.num_slots, config.block_n)
    num_tiles = num_query_tiles(plan, saved, config)
    lists = slot_lists(plan, group, num_tiles, config.block_m, config.block_n)
    block_k = max(1, REDUCED_FLOATS // padded_head_dim(head_dim))
    key_blocks = triton.cdiv(key_len, block_k)
    for row in range(0, rows, chunk):
        now = range(row, min(row + chunk, rows))
        bias = slot_bias
        if bias is None or len(now) < rows:
            bias = slots_of(plan, key, value, call.bias, now, with_rows=False).bias
        launch(grad_key_kernel, len(now) * plan.num_epochs * num_blocks)(
            tiles_q or query, key, value, tiles_grad or saved.grad_out, *saved.norm, saved.delta,
            part_key, part_value, part_bias, plan.slot_key, plan.slot_start, plan.slot_expiry,
            plan.counts, plan.epochs, plan.slot_bits, lists, plan.mask, bias, call.bias_tensor,
            *call.factors, call.softmax_scale, query.shape[1], plan.key_len, plan.epoch_len,
            plan.num_epochs, plan.num_lists, num_tiles, num_blocks, plan.old_slots, plan.num_slots,
            row, *plan.row_strides(heads_kv), *query.stride()[:3], *key.stride()[:3],
            *value.stride()[:3], *saved.grad_out.stride(), *call.bias_strides,
            *mask_strides(plan, heads_kv, group), HEADS_KV=heads_kv, GROUP=group,
            GROUP_PAD=triton.next_power_of_2(members), D=head_dim,
            BLOCK_D=padded_head_dim(head_dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            STAGES=config.num_stages, **plan_flags(plan), ROWS=has_rows(plan, call),
            SHARED=shares_bias(plan, call, config.block_m, group),
            WORDS=words_of_tile(config.block_m, group), **call.flags, **flags,
            PACKED=plan.epochs is not None, ALIGNED=is_aligned(query),
            ALIGNED_KV=is_aligned(key, value), GRAD_ALIGNED=is_aligned(saved.grad_out),
            TMA_Q=tiles_q is not None, TMA_GRAD=tiles_grad is not None, **config.options,
        )  # fmt: skip
        launch(reduce_kernel, len(now) * key_blocks)(
            part_key, part_value, part_bias, plan.use_end, plan.use_slot, grad_key, grad_value,
            grad_bias, plan.query_len, key_len, plan.epoch_len, plan.num_epochs, plan.num_lists,
            plan.num_slots, key_blocks, row,
            *plan.row_strides(heads_kv), HEADS_KV=heads_kv, MEMBERS=members,
            MEMBERS_PAD=triton.next_power_of_2(members), D=head_dim,
            BLOCK_D=padded_head_dim(head_dim), BLOCK_K=block_k, USES=USES_AT_ONCE,
            SLOTS=plan.slots, LISTED=plan.use_end is not None, CAUSAL=not plan.clamps_positions,
            PACKED=plan.epochs is not None, **flags, num_warps=4,
        )  # fmt: skip
