"""Hidden states and layers of key scores, and the definition of both directions, for any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("hidden", "v_weight", "v_bias", "dt_weight", "dt_bias", "A")


def make_layers(
    size: int,
    heads_kv: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    device: str = "cpu",
) -> list[Tensor | None]:
    """Weights and biases of ``v_proj`` and ``dt_proj``, and ``A``: logits of all sizes."""
    generator = torch.Generator().manual_seed(3)
    values = heads_kv * head_dim
    shapes = [(values, size), (values,), (heads_kv, values), (heads_kv,), (heads_kv,)]
    scales = [size**-0.5, 0.5, 2 * values**-0.5, 1.0, 0.4]
    layers = [
        (torch.randn(shape, generator=generator) * scale).to(device, dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    if heads_kv > 1:
        layers[2][0] = 0  # logits of 0, or all the same
    v_weight, v_bias, dt_weight, dt_bias, A = layers
    return [v_weight, v_bias if bias else None, dt_weight, dt_bias if bias else None, A]


def make_hidden(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 4
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def plain_scores(
    hidden: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    exponential: bool,
) -> Tensor:
    """The definition in PyTorch, in the dtype of its arguments. ``[..., Hkv, S]``."""
    logit = F.linear(F.linear(hidden, v_weight, v_bias), dt_weight, dt_bias).transpose(-1, -2)
    # Not F.softplus, which is linear above 20.
    score = A[:, None] * torch.logaddexp(logit, torch.zeros_like(logit))
    return score.exp() if exponential else score


def results_of(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], upstream: Tensor, *args: bool
) -> list[Tensor]:
    """Scores, and the gradients of all tensors that there are."""
    leaves = [one if one is None else one.detach().clone().requires_grad_() for one in tensors]
    score = function(*leaves, *args)
    given = [leaf for leaf in leaves if leaf is not None]
    return [score.detach(), *torch.autograd.grad(score, given, upstream.to(score.dtype))]
