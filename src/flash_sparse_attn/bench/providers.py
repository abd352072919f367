"""Who computes a case, and the gate: what is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import dispatch
from ..attention import flash_sparse_attn_func
from ..reference import attention_reference
from ..selection import KeySelection, prepare_selection, select_keys
from .cases import GRADIENTS, Case, Inputs, make_inputs


class WrongResult(Exception):
    """A provider's error is above the error rule."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        what: One line for people.
        select: From inputs and window to whatever `attend` takes as its mask.
        attend: From inputs and mask to ``out [B, N, H, D]``.
        dense: True if it attends every causal key and has no bias: a different function, measured
            as the usual alternative.
        extra_bytes: Lower bound of the memory that a case needs.
    """

    what: str
    select: Callable[[Inputs, int], Any]
    attend: Callable[[Inputs, Any], Tensor]
    dense: bool = False
    extra_bytes: Callable[[Case], int] = lambda case: 0


def _ours(backend: str | None) -> Provider:
    name = "the best backend" if backend is None else f"the {backend} backend"
    return Provider(
        f"select_keys and flash_sparse_attn_func, {name}",
        lambda inputs, window: prepare_selection(select_keys(inputs.scores, window)),
        lambda inputs, selection: flash_sparse_attn_func(
            inputs.query,
            inputs.key,
            inputs.value,
            selection,
            inputs.scores[:, :, None, :],
            backend=backend,
        ),
    )


def top_keys_mask(scores: Tensor, window: int) -> Tensor:
    """Bool ``[B, Hkv, N, N]``: the `window` best causal keys of every query, by ``torch.topk``.

    What one writes without this package. Rows with fewer causal keys keep what they have; equal
    scores are broken arbitrarily.
    """
    length = scores.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    candidates = scores[:, :, None, :].masked_fill(~causal, -torch.inf)
    best = candidates.topk(min(window, length), dim=-1, sorted=False).indices
    return torch.zeros_like(candidates, dtype=torch.bool).scatter_(-1, best, True) & causal


def window_mask(scores: Tensor, window: int) -> Tensor:
    """The same mask from the definition, ties included: fewer than `window` causal keys beat it."""
    index = torch.arange(scores.shape[-1], device=scores.device)
    challenger, holder = scores[..., :, None], scores[..., None, :]
    beats = (challenger > holder) | ((challenger == holder) & (index[:, None] > index))
    return (beats.cumsum(-2, dtype=torch.int32) < window) & (index[:, None] >= index)


def _attend_masked(inputs: Inputs, mask: Tensor) -> Tensor:
    group = inputs.query.shape[2] // inputs.key.shape[2]
    bias = inputs.scores[:, :, None, :].to(inputs.query.dtype).masked_fill(~mask, -torch.inf)
    query, key, value = (x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
    bias = bias.repeat_interleave(group, dim=1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=group > 1)
    return out.transpose(1, 2)


def _attend_causal(inputs: Inputs, _: None) -> Tensor:
    grouped = inputs.query.shape[2] != inputs.key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
    # On GPUs the fastest of PyTorch's kernels; elsewhere the list has no effect.
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels, set_priority=True):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


def _select_flex(inputs: Inputs, window: int) -> Any:
    """A BlockMask of the same selection; building it is part of this provider's selection."""
    from torch.nn.attention.flex_attention import create_block_mask

    selection = select_keys(inputs.scores, window)
    expiry = selection.expiry
    batch, length, heads, _ = inputs.query.shape
    group = heads // inputs.key.shape[2]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < expiry[b, h // group, k])

    return create_block_mask(visible, batch, heads, length, length, inputs.query.device)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _attend_flex(inputs: Inputs, mask: Any) -> Tensor:
    group = inputs.query.shape[2] // inputs.key.shape[2]
    scores = inputs.scores

    def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + scores[b, h // group, k]

    query, key, value = (x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
    out = _compiled_flex()(query, key, value, biased, mask, enable_gqa=group > 1)
    return out.transpose(1, 2)


def _attend_reference(inputs: Inputs, mask: Tensor) -> Tensor:
    bias = inputs.scores[:, :, None, :]
    return attention_reference(inputs.query, inputs.key, inputs.value, mask, bias)[0]


def _squares(case: Case) -> int:
    """Scores, probabilities, bias and one gradient, each ``[B, H, N, N]``."""
    item = getattr(torch, case.dtype).itemsize
    return 4 * item * case.batch * case.heads * case.length**2


PROVIDERS = {
    "ours": _ours(None),
    **{f"ours-{name}": _ours(name) for name in dispatch.explain_backends()},
    "sdpa-masked": Provider(
        "SDPA, N x N mask (torch.topk) and bias materialised: the same function",
        lambda inputs, window: top_keys_mask(inputs.scores.detach(), window),
        _attend_masked,
        extra_bytes=_squares,
    ),
    "sdpa-causal": Provider(
        "SDPA, is_causal=True, all keys, no bias: what one uses without a mask",
        lambda inputs, window: None,
        _attend_causal,
        dense=True,
    ),
    "flex": Provider(
        "FlexAttention, compiled, with the same mask and bias",
        _select_flex,
        _attend_flex,
    ),
    "reference": Provider(
        "the eager oracle on the dense mask of the definition",
        lambda inputs, window: window_mask(inputs.scores.detach(), window),
        _attend_reference,
        extra_bytes=_squares,
    ),
}


def verify(case: Case, name: str) -> dict[str, float]:
    """The errors of a provider on the case's reduced shape, against fp64.

    The rule: every element of the output and of each gradient is off by at most twice the largest
    error of plain PyTorch in the same dtype, plus 1e-5. A selection has to be equal.

    Returns:
        The largest error of ``out`` and of each gradient; of a selection the number of wrong pairs.

    Raises:
        WrongResult: The rule is broken.
    """
    case, provider = case.reduced(), PROVIDERS[name]
    inputs = make_inputs(case, seed=1)
    mask = window_mask(inputs.scores.detach(), case.window)
    if case.what == "selection":
        found = provider.select(inputs, case.window)
        found = found.to_dense() if isinstance(found, KeySelection) else found
        wrong = int((found != mask).sum())
        if wrong:
            raise WrongResult(
                f"{name} on {case.name}: {wrong} visible pairs differ at {case.shape}"
            )
        return {"wrong_pairs": 0.0}

    def attend(x: Inputs) -> Tensor:
        return provider.attend(x, provider.select(x, case.window))

    results = _results(inputs, attend, provider)
    if provider.dense:
        mask = torch.ones_like(mask).tril()
    exact = Inputs(*(x.detach().double().requires_grad_() for x in vars(inputs).values()))

    def reference(x: Inputs) -> Tensor:
        bias = None if provider.dense else x.scores[:, :, None, :]
        return attention_reference(x.query, x.key, x.value, mask, bias)[0]

    truth = _results(exact, reference, provider)
    plain = _results(inputs, reference, provider)
    errors = {}
    for key, value in results.items():
        errors[key] = _distance(value, truth[key])
        budget = 2 * _distance(plain[key], truth[key]) + 1e-5
        if not errors[key] <= budget:
            raise WrongResult(
                f"{name} on {case.name}: {key} is off by {errors[key]:.2e} at {case.shape}, "
                f"allowed {budget:.2e}"
            )
    return errors


def _results(
    inputs: Inputs, attend: Callable[[Inputs], Tensor], provider: Provider
) -> dict[str, Tensor]:
    """``out`` and the gradients of the inputs that the provider uses."""
    out = attend(inputs)
    count = 3 if provider.dense else 4
    gradients = torch.autograd.grad(out, inputs.leaves()[:count], inputs.grad_out.to(out.dtype))
    return {"out": out.detach(), **dict(zip(GRADIENTS[:count], gradients, strict=True))}


def _distance(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).abs().max())
