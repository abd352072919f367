"""Forward without gradients: no operator, and hardly more host time than the launches take."""

from __future__ import annotations

from torch import Tensor

from ...plan import Plan
from ...problem import Problem
from .forward import forward
from .inputs import Bias, Call
from .launch import repeat


def infer(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor]:
    """``out [B, Q, H, D]`` and ``lse [B, H, Q]`` over the slots of a plan."""

    def run() -> tuple[Tensor, Tensor]:
        wrapped = None if bias is None else Bias.of(bias, query.shape[2], key.shape[2])
        call = Call(problem.softmax_scale, problem.softcap, wrapped)
        return forward(plan, query, key, value, call)[:2]

    tensors = (query, key, value) if bias is None else (query, key, value, bias)
    given = [tensor.data_ptr() for tensor in tensors]
    facts = (
        problem.device, problem.dtype, problem.bias_dtype, problem.softmax_scale, problem.softcap,
        plan.facts, *[(tensor.shape, tensor.stride()) for tensor in tensors],
        *[address & 15 for address in given],
    )  # fmt: skip
    out, lse = repeat(facts, (*given, *plan.addresses), problem.device, run)
    return out, lse
