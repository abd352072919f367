"""Custom operators of attention over listed blocks of keys.

As in `ops.py`, kernels are imported when an operator runs. A graph sees one operator forward and
one backward, which make their plans inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...problem import Problem
from .ops import on_device, refuse_second_derivatives

_library = torch.library.Library("flash_sparse_attn", "FRAGMENT")
_LISTS = "Tensor block_indices, Tensor? visible, int block_size, bool is_causal"
_FACTORS = "float softmax_scale, float softcap"
_library.define(
    f"block_forward(Tensor query, Tensor key, Tensor value, {_LISTS}, {_FACTORS})"
    " -> (Tensor, Tensor)"
)
_library.define(
    f"block_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, {_LISTS}, {_FACTORS},"
    " Tensor out, Tensor norm, bool[] needs) -> (Tensor, Tensor, Tensor)"
)


@on_device
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    visible: Tensor | None,
    block_size: int,
    is_causal: bool,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    from .block_calls import BlockLists, run_block_forward

    lists = BlockLists(block_indices, visible, block_size, is_causal)
    return run_block_forward(query, key, value, lists, softmax_scale, softcap)


@on_device
def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    visible: Tensor | None,
    block_size: int,
    is_causal: bool,
    softmax_scale: float,
    softcap: float,
    out: Tensor,
    norm: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    from .block_calls import BlockLists, run_block_backward

    lists = BlockLists(block_indices, visible, block_size, is_causal)
    tensors = (grad_out, query, key, value, lists, out, norm)
    grads = run_block_backward(*tensors, softmax_scale, softcap, needs)
    return tuple(norm.new_empty(0) if grad is None else grad for grad in grads)


_library.impl("block_forward", _forward, "CUDA")
_library.impl("block_backward", _backward, "CUDA")


@torch.library.register_fake("flash_sparse_attn::block_forward", lib=_library)
def _(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, query_len, num_heads, _ = query.shape
    norm = query.new_empty((2 * batch * num_heads * query_len,), dtype=torch.float32)
    return query.new_empty(query.shape), norm


@torch.library.register_fake("flash_sparse_attn::block_backward", lib=_library)
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    norm, needs = args[-2:]
    return tuple(
        tensor.new_empty(tensor.shape) if need else norm.new_empty(0)
        for tensor, need in zip((query, key, value), needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, block_indices, visible, *ctx.call = inputs
    out, norm = output
    ctx.mark_non_differentiable(norm)
    ctx.save_for_backward(query, key, value, block_indices, visible, out, norm)


def _differentiate(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:
    query, key, value, block_indices, visible, out, norm = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    grads = torch.ops.flash_sparse_attn.block_backward(
        grad_out, query, key, value, block_indices, visible, *ctx.call, out, norm, needs
    )
    asked = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (*asked, *[None] * 6)


torch.library.register_autograd(
    "flash_sparse_attn::block_forward", _differentiate, setup_context=_save, lib=_library
)
torch.library.register_autograd(
    "flash_sparse_attn::block_backward", refuse_second_derivatives, lib=_library
)


def attention(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    visible: Tensor | None,
    block_size: int,
) -> Tensor:
    """``out [B, Q, H, D]`` over the keys of listed blocks; see `block_calls.BlockLists`."""
    if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out, _ = torch.ops.flash_sparse_attn.block_forward(
        query, key, value, block_indices, visible, block_size, problem.is_causal,
        problem.softmax_scale, problem.softcap,
    )  # fmt: skip
    return out
