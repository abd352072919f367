"""Forward and backward passes as the operators want them, with little host time when repeated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...plan import Plan
from .backward import Needs, backward
from .forward import forward
from .inputs import Bias, Call
from .launch import repeat_call


def _call(
    query: Tensor, key: Tensor, bias: Tensor | None, softmax_scale: float, softcap: float
) -> Call:
    wrapped = None if bias is None else Bias.of(bias, query.shape[2], key.shape[2])
    return Call(softmax_scale, softcap, wrapped)


def run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    plan: Plan,
    softmax_scale: float,
    softcap: float,
    *,
    with_norm: bool,
) -> Sequence[Tensor]:
    """``out [B, Q, H, D]``, ``lse [B, H, Q]``, and ``norm`` and ``out_rest`` of `forward`."""

    def run() -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        call = _call(query, key, bias, softmax_scale, softcap)
        return forward(plan, query, key, value, call, with_norm=with_norm)

    facts = ("forward", softmax_scale, softcap, with_norm, *plan.facts)
    return repeat_call(facts, (query, key, value, bias), run, plan.addresses)


def run_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    norm: Tensor,
    out_rest: Tensor | None,
    plan: Plan,
    softmax_scale: float,
    softcap: float,
    needs: Sequence[bool],
    *,
    sum_dtype: torch.dtype | None = None,
) -> Sequence[Tensor | None]:
    """Gradients of query, key, value and bias; ``None`` for those that `needs` leaves out."""

    def run() -> tuple[Tensor | None, ...]:
        call = _call(query, key, bias, softmax_scale, softcap)
        return backward(
            plan, query, key, value, out, norm, out_rest, grad_out, call, Needs(*needs),
            sum_dtype=sum_dtype,
        )  # fmt: skip

    facts = ("backward", softmax_scale, softcap, *needs, sum_dtype, *plan.facts)
    tensors = (query, key, value, bias, out, norm, out_rest, grad_out)
    return repeat_call(facts, tensors, run, plan.addresses)
