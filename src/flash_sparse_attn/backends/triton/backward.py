"""Backward over epochs, without atomics: every sum has one owner and one order.

The kernel of dK and dV could add up dQ by atomics on the way, with five products instead of seven.
It would not be faster: registers spill, and the best of ten sets of tiles took, of all of backward,
9.5 instead of 7.7 milliseconds at (B, H, Hkv, N, D, W) = (1, 32, 8, 32768, 128, 2048), 1.08 instead
of 0.87 at N = 4096, and 0.229 instead of 0.213 at (1, 2, 1, 32768, 64, 1024). Where there are
kernels by roles, five products are had in order, see `gluon_backward.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...plan import Plan
from .config import Tiles, architecture_of, tiles_for
from .grad_key import run_grad_key
from .grad_pair import run_grad_pair
from .grad_query import run_grad_query
from .inputs import Call, Saved, pair_tensors
from .role_config import roles_for


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
    sum_dtype: torch.dtype | None = None,
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
        sum_dtype: Of the gradients of key and value; default that of key.

    Returns:
        Gradients of query, key and value, contiguous, and of the bias in its shape and dtype;
        ``None`` for those not asked for.
    """
    roles = None
    if tiles is None:
        if plan.is_selection and plan.slots == "copied":
            roles = roles_for(architecture_of(query.device), query.shape[-1])
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
    grad_key, grad_value = _fresh(needs.key, key, sum_dtype), _fresh(needs.value, value, sum_dtype)
    per_key = None
    if bias is not None and bias.is_per_key:
        batch, key_len, heads_kv, _ = key.shape
        shape = (batch, heads_kv * bias.members, 1, key_len)
        per_key = torch.empty(shape, dtype=torch.float32, device=key.device)
    is_served = False
    if roles and grad_query is not None and grad_key is not None and grad_value is not None:
        from .gluon_backward import gluon_backward  # only where its version of Triton is installed

        grads = grad_query, grad_key, grad_value, per_key
        is_served = gluon_backward(plan, saved, call, roles, *grads)
    if not is_served:
        slot_bias = None
        if bias is not None and not bias.is_per_key:
            grad_bias = run_grad_pair(plan, saved, call, tiles.grad_query, grad_query, bias)
        else:
            slot_bias = run_grad_query(plan, saved, call, tiles.grad_query, grad_query)
        if needs.key or needs.value or per_key is not None:
            keys = grad_key, grad_value, per_key, slot_bias
            run_grad_key(plan, saved, call, tiles.grad_key, *keys)
    if per_key is not None and bias is not None:
        grad_bias = _sum_to(per_key, bias.tensor.shape, bias.heads_kv)
        # A cast to the same dtype, too, is an operator, and calls with operators are not repeated.
        if grad_bias.dtype != bias.tensor.dtype:
            grad_bias = grad_bias.to(bias.tensor.dtype)
    return grad_query, grad_key, grad_value, grad_bias


def _fresh(wanted: bool, like: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    if not wanted:
        return None
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _sum_to(grad: Tensor, shape: torch.Size, heads_kv: int) -> Tensor:
    """Sum a 4-D gradient over the dimensions in which the bias is broadcast, in fp32."""
    if shape[1] == heads_kv and grad.shape[1] != heads_kv:
        grad = grad.unflatten(1, (heads_kv, -1)).sum(2)
    dims = [d for d in range(4) if shape[d] == 1 and grad.shape[d] > 1]
    return grad.sum(dims, keepdim=True) if dims else grad
