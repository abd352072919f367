"""The score of a key from its token's hidden state, with the same bits in every batch and chunk.

A matrix product may give a token other last bits in another batch, and the last bit can decide a
choice. Here the weights of two linear layers are folded into one row per KV head, and products are
summed in fp32 in an order that depends on the width alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .tracing import is_watched

# Scores are summed in parts of so many products: parts that stay in a processor's cache, and parts
# that fill a GPU without taking gigabytes.
_PRODUCTS_ON_CPU, _PRODUCTS_ON_GPU = 1 << 18, 1 << 25


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
    with torch.autocast(hidden_states.device.type, enabled=False):
        rows = dt_proj.weight.float()
        weight = rows @ v_proj.weight.float()
        offset = weight.new_zeros(len(weight))
        if v_proj.bias is not None:
            offset = offset + rows @ v_proj.bias.float()
        if dt_proj.bias is not None:
            offset = offset + dt_proj.bias.float()
    inputs = (hidden_states, weight, offset, A.float(), exponential)
    if is_watched(hidden_states) or is_watched(weight):
        return _key_scores(*inputs)[0]
    return _KeyScores.apply(*inputs)


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


# An operator of its own, so that a compiler cannot contract or reorder the sums.
_key_scores = torch.library.custom_op(
    "flash_sparse_attn::key_scores",
    _compute,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor offset, Tensor A, bool exponential)"
    " -> (Tensor, Tensor)",
)


@_key_scores.register_fake
def _(
    hidden: Tensor, weight: Tensor, offset: Tensor, A: Tensor, exponential: bool
) -> tuple[Tensor, Tensor]:
    shape = (*hidden.shape[:-2], weight.shape[0], hidden.shape[-2])
    return weight.new_empty(shape), weight.new_empty(shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, _, A, ctx.exponential = inputs
    ctx.save_for_backward(hidden, weight, A, *output)


def _differentiate(ctx: Any, grad_score: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Plain matrix products: a gradient need not have the same bits in every batch."""
    hidden, weight, A, score, logit = ctx.saved_tensors
    with torch.autocast(hidden.device.type, enabled=False):
        grad = grad_score * score if ctx.exponential else grad_score
        grad_A = (grad * F.softplus(logit)).transpose(-1, -2).flatten(0, -2).sum(0)
        grad_logit = (grad * A[:, None] * torch.sigmoid(logit)).transpose(-1, -2)
        rows = grad_logit.flatten(0, -2)
        grad_weight = rows.t() @ hidden.flatten(0, -2).float()
        grad_hidden = (grad_logit @ weight).to(hidden.dtype)
    return grad_hidden, grad_weight, rows.sum(0), grad_A, None


_key_scores.register_autograd(_differentiate, setup_context=_save)


class _KeyScores(torch.autograd.Function):
    """The scores of the operator, and its gradients, without what an operator costs the host."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        results = _compute(*inputs)
        _save(ctx, inputs, results)
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_score: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grad_score, None)
