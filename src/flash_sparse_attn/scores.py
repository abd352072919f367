"""The score of a key from its token's hidden state, with the same bits in every batch and chunk.

A matrix product may give a token other last bits in another batch, and the last bit can decide a
choice. Here the weights of two linear layers are folded into one row per KV head, and products are
summed in fp32 in an order that depends on the width alone. On GPUs that is done by kernels of their
own, `backends/triton/key_scores.py`; elsewhere by PyTorch, below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .backends import triton
from .backends.triton.ops import refuse_second_derivatives
from .tracing import is_traced, is_watched

# Scores are summed in parts of so many products: parts that stay in a processor's cache, and parts
# that fill a GPU without taking gigabytes.
_PRODUCTS_ON_CPU, _PRODUCTS_ON_GPU = 1 << 18, 1 << 25
_INPUTS = (
    "Tensor hidden, Tensor v_weight, Tensor? v_bias, Tensor dt_weight, Tensor? dt_bias, Tensor A"
)


def folded_key_scores(
    hidden_states: Tensor, v_proj: nn.Linear, dt_proj: nn.Linear, A: Tensor, exponential: bool
) -> Tensor:
    """``A * softplus(dt_proj(v_proj(x)))`` or its ``exp``, in fp32, outside autocast.

    Args:
        hidden_states: ``[..., S, hidden_size]``, any float dtype.
        v_proj: ``hidden_size -> Hkv * D``; its weight is read, its forward is not run.
        dt_proj: ``Hkv * D -> Hkv``, as well.
        A: ``[Hkv]``.
        exponential: Whether the score is the ``exp`` of the product.

    Returns:
        fp32 ``[..., Hkv, S]``, differentiable in `hidden_states` and all weights.
    """
    layers = (v_proj.weight, v_proj.bias, dt_proj.weight, dt_proj.bias, A)
    if is_watched(hidden_states) or is_traced(v_proj.weight) or is_traced(dt_proj.weight):
        return _key_scores(hidden_states, *layers, exponential)[0]
    if torch.is_grad_enabled() and any(
        one is not None and one.requires_grad for one in (hidden_states, *layers)
    ):
        return _KeyScores.apply(hidden_states, *layers, exponential)
    return _score(hidden_states, layers, exponential, with_logit=False)[0]


def _score(
    hidden: Tensor, layers: Sequence[Any], exponential: bool, with_logit: bool
) -> Sequence[Any]:
    """Scores and logits, fp32 ``[..., Hkv, S]``; kernels keep logits only if asked to."""
    if _on_gpu_kernels(hidden):
        return triton.score_keys(hidden, layers, exponential, with_logit)
    with torch.autocast(hidden.device.type, enabled=False):
        return _compute(hidden, *_fold(*layers[:4]), layers[4].float(), exponential)


def _on_gpu_kernels(hidden: Tensor) -> bool:
    """Whether the GPU's own kernels compute the scores of hidden states like these."""
    if hidden.device.type != "cuda" or triton.unavailable():
        return False
    return 0 < hidden.numel() < hidden.shape[-1] << 30  # tokens are counted in 32 bits


def _fold(
    v_weight: Tensor, v_bias: Tensor | None, dt_weight: Tensor, dt_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weight ``[Hkv, N]`` and offset ``[Hkv]`` of both layers as one, fp32."""
    rows = dt_weight.float()
    weight = rows @ v_weight.float()
    offset = weight.new_zeros(len(weight))
    if v_bias is not None:
        offset = offset + rows @ v_bias.float()
    if dt_bias is not None:
        offset = offset + dt_bias.float()
    return weight, offset


def _compute(
    hidden: Tensor, weight: Tensor, offset: Tensor, A: Tensor, exponential: bool
) -> tuple[Tensor, Tensor]:
    """Scores and logits, fp32 ``[..., Hkv, S]``, of ``hidden [..., S, N]``; ``weight [Hkv, N]``.

    Products are added in halves, element by element: correctly rounded operations in an order fixed
    by ``N``.
    """
    products = _PRODUCTS_ON_CPU if hidden.device.type == "cpu" else _PRODUCTS_ON_GPU
    parts = hidden.reshape(-1, hidden.shape[-1]).split(max(1, products // weight.numel()))
    logit = torch.cat([_sum_in_halves(part.float()[:, None] * weight) for part in parts]) + offset
    logit = logit.view(*hidden.shape[:-1], len(weight)).transpose(-1, -2).contiguous()
    # Not F.softplus: on CPUs its vector body and its scalar tail round differently.
    score = A[:, None] * (logit.clamp(min=0) + torch.log1p(torch.exp(-logit.abs())))
    return torch.exp(score) if exponential else score, logit


def _sum_in_halves(terms: Tensor) -> Tensor:
    """Sum the last dimension in place, adding the upper half to the lower until one is left."""
    size = terms.shape[-1]
    while size > 1:
        half = 1 << ((size - 1).bit_length() - 1)
        terms.narrow(-1, 0, size - half).add_(terms.narrow(-1, half, size - half))
        size = half
    return terms[..., 0]


def _differentiate(
    grad_score: Tensor,
    hidden: Tensor,
    layers: Sequence[Any],
    logit: Tensor,
    exponential: bool,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Gradients of the hidden states and of the layers, ``None`` where `needs` is False.

    PyTorch's are plain matrix products: they need not have the same bits in every batch.
    """
    if _on_gpu_kernels(hidden):
        return triton.grad_scores(grad_score, hidden, layers, logit, exponential, needs)
    v_weight, v_bias, dt_weight, dt_bias, A = layers
    with torch.autocast(hidden.device.type, enabled=False):
        values, rows, rate = v_weight.float(), dt_weight.float(), A.float()[:, None]
        softplus = F.softplus(logit)
        grad = grad_score * torch.exp(rate * softplus) if exponential else grad_score
        grad_logit = (grad * rate * torch.sigmoid(logit)).transpose(-1, -2)
        per_token = grad_logit.flatten(0, -2)
        offset = per_token.sum(0)
        grads: list[Tensor | None] = [None] * 6
        if needs[0]:
            grads[0] = (grad_logit @ (rows @ values)).to(hidden.dtype)
        if needs[1] or needs[3]:
            weight = per_token.t() @ hidden.flatten(0, -2).float()
        if needs[1]:
            grads[1] = (rows.t() @ weight).to(v_weight.dtype)
        if needs[2]:
            grads[2] = (rows.t() @ offset).to(v_bias.dtype)
        if needs[3]:
            grad_rows = weight @ values.t()
            if v_bias is not None:
                grad_rows = grad_rows + torch.outer(offset, v_bias.float())
            grads[3] = grad_rows.to(dt_weight.dtype)
        if needs[4]:
            grads[4] = offset.to(dt_bias.dtype)
        if needs[5]:
            grads[5] = (grad * softplus).transpose(-1, -2).flatten(0, -2).sum(0).to(A.dtype)
    return grads


def _operate(
    hidden: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    exponential: bool,
) -> tuple[Tensor, Tensor]:
    layers = (v_weight, v_bias, dt_weight, dt_bias, A)
    score, logit = _score(hidden, layers, exponential, with_logit=True)
    return score, logit


# An operator of its own, so that a compiler cannot contract or reorder the sums.
_key_scores = torch.library.custom_op(
    "flash_sparse_attn::key_scores",
    _operate,
    mutates_args=(),
    schema=f"({_INPUTS}, bool exponential) -> (Tensor, Tensor)",
)


@_key_scores.register_fake
def _(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    shape = (*hidden.shape[:-2], args[2].shape[0], hidden.shape[-2])
    score = hidden.new_empty(shape, dtype=torch.float32)
    return score, score.new_empty(shape)


def _operate_backward(
    grad_score: Tensor,
    hidden: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    logit: Tensor,
    exponential: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    layers = (v_weight, v_bias, dt_weight, dt_bias, A)
    grads = _differentiate(grad_score, hidden, layers, logit, exponential, needs)
    return tuple(logit.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


_key_scores_backward = torch.library.custom_op(
    "flash_sparse_attn::key_scores_backward",
    _operate_backward,
    mutates_args=(),
    schema=f"(Tensor grad_score, {_INPUTS}, Tensor logit, bool exponential, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_key_scores_backward.register_fake
def _(grad_score: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, logit, _, needs = args
    return tuple(
        one.new_empty(one.shape) if need else logit.new_empty(0)
        for one, need in zip(inputs, needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    *tensors, ctx.exponential = inputs
    ctx.save_for_backward(*tensors, output[1])


def _differentiate_operator(ctx: Any, grad_score: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    needs = [bool(need) for need in ctx.needs_input_grad[:6]]
    grads = _key_scores_backward(grad_score, *ctx.saved_tensors, ctx.exponential, needs)
    asked = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (*asked, None)


_key_scores.register_autograd(_differentiate_operator, setup_context=_save)
_key_scores_backward.register_autograd(refuse_second_derivatives)


class _KeyScores(torch.autograd.Function):
    """The scores of the operator, and its gradients, without what an operator costs the host."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden, *layers, exponential = inputs
        results = _score(hidden, layers, exponential, with_logit=True)
        _save(ctx, inputs, results)
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_score: Tensor) -> tuple[Tensor | None, ...]:
        if is_watched(grad_score):
            return _differentiate_operator(ctx, grad_score, None)
        hidden, *layers, logit = ctx.saved_tensors
        needs = ctx.needs_input_grad[:6]
        return (*_differentiate(grad_score, hidden, layers, logit, ctx.exponential, needs), None)
