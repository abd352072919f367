"""Who computes a case, and the gate: what is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..attention import flash_sparse_attn_func
from ..reference import attention_reference, causal_mask
from ..selection import KeySelection, prepare_selection, select_keys
from ..window_cache import WindowCache
from . import decoding, predecessors
from .cases import GRADIENTS, Case, Inputs, make_inputs


class WrongResult(Exception):
    """A provider's error is above the error rule."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        what: One line for people.
        select: From inputs and window to whatever `attend` takes as its mask; to decode, the cache
            that holds the text, before the new token or with it.
        attend: From inputs and mask to ``out [B, N, H, D]``.
        dense: True if it attends every causal key and has no bias: a different function, measured
            as the usual alternative.
        extra_bytes: Lower bound of the memory that a case needs.
        trains_bias: Whether it has a gradient for the bias.
        building: What its selection and forward times hold of mask and plan building, for rows.
        module: The import name of a predecessor, which runs in an environment of its own.
    """

    what: str
    select: Callable[[Inputs, int], Any]
    attend: Callable[[Inputs, Any], Tensor]
    dense: bool = False
    extra_bytes: Callable[[Case], int] = lambda case: 0
    trains_bias: bool = True
    building: str = "nothing to build"
    module: str = ""

    def leaves(self, inputs: Inputs) -> list[Tensor]:
        """The tensors whose gradients it computes."""
        return inputs.leaves()[: 4 if self.trains_bias and not self.dense else 3]


def _ours(backend: str | None) -> Provider:
    name = "the best backend" if backend is None else f"the {backend} backend"

    def select(inputs: Inputs, window: int) -> Tensor | KeySelection | WindowCache:
        if inputs.decodes:
            return decoding.window_cache(inputs, window)
        if inputs.mask is not None:
            return inputs.mask
        selection = select_keys(inputs.scores, window)
        query_len, trains = inputs.query.shape[1], inputs.query.requires_grad
        return prepare_selection(selection, query_len, for_backward=trains)

    def attend(inputs: Inputs, mask: Tensor | KeySelection | WindowCache) -> Tensor:
        if isinstance(mask, WindowCache):
            return decoding.step(inputs, mask, backend)
        return flash_sparse_attn_func(
            inputs.query,
            inputs.key,
            inputs.value,
            mask,
            inputs.bias,
            is_causal=inputs.is_causal,
            backend=backend,
        )

    return Provider(
        f"select_keys and flash_sparse_attn_func, WindowCache to decode; {name}",
        select,
        attend,
        building="selection: keys and plan; of a bool mask, forward: the plan",
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


def visible_pairs(inputs: Inputs, window: int) -> Tensor:
    """Bool ``[{1|B}, {1|Hkv}, Q, N]``: the mask of the inputs with causality, by definition."""
    query_len, key_len = inputs.query.shape[1], inputs.key.shape[1]
    if inputs.mask is None:
        return window_mask(inputs.scores.detach(), window)[..., key_len - query_len :, :]
    if not inputs.is_causal:
        return inputs.mask
    return inputs.mask & causal_mask(query_len, key_len, inputs.mask.device)


def _mask_for_sdpa(inputs: Inputs, window: int) -> Tensor:
    if inputs.mask is None:
        rows = slice(inputs.key.shape[1] - inputs.query.shape[1], None)
        return top_keys_mask(inputs.scores.detach(), window)[..., rows, :]
    return visible_pairs(inputs, window)


def _mask_for_predecessors(inputs: Inputs, window: int) -> Tensor:
    """A given mask as it is: their kernels leave out the future themselves."""
    return _mask_for_sdpa(inputs, window) if inputs.mask is None else inputs.mask


def _attend_masked(inputs: Inputs, mask: Tensor) -> Tensor:
    return _attend_additive(inputs, _add_up(inputs, inputs.bias, mask))


def _add_up(inputs: Inputs, bias: Tensor, mask: Tensor) -> Tensor:
    """Mask and bias as the one additive tensor ``[{1|B}, H, Q, N]`` that SDPA takes."""
    bias = bias.to(inputs.query.dtype).masked_fill(~mask, -torch.inf)
    return bias.repeat_interleave(inputs.query.shape[2] // bias.shape[1], dim=1)


def _attend_additive(inputs: Inputs, bias: Tensor) -> Tensor:
    return _sdpa(inputs, attn_mask=bias)


def _attend_causal(inputs: Inputs, cache: decoding.FullCache | None) -> Tensor:
    if cache is not None:
        return decoding.attend_all(inputs, cache)
    # One query is the last, and sees every key.
    return _sdpa(inputs, is_causal=inputs.query.shape[1] > 1)


def _sdpa(inputs: Inputs, **options: Any) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
    return decoding.sdpa(*heads_first, **options)


def _select_flex(inputs: Inputs, window: int) -> Any:
    """A BlockMask of the same selection or mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, query_len, heads, _ = inputs.query.shape
    key_len, mask, is_causal = inputs.key.shape[1], inputs.mask, inputs.is_causal
    shift = key_len - query_len
    if mask is None:
        expiry = select_keys(inputs.scores, window).expiry
        group = heads // expiry.shape[1]

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q + shift) & (q + shift < expiry[b, h // group, k])

        sizes: tuple[int | None, int | None] = (batch, heads)
    else:
        group = heads // mask.shape[1]
        entries, rows = int(mask.shape[0] > 1), int(mask.shape[2] > 1)

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = mask[b * entries, h // group, q * rows, k]
            return seen & (k <= q + shift) if is_causal else seen

        sizes = (batch if entries else None, heads if mask.shape[1] > 1 else None)
    return create_block_mask(visible, *sizes, query_len, key_len, inputs.query.device)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch._functorch import config
    from torch.nn.attention.flex_attention import flex_attention

    config.donated_buffer = False  # the backward pass is timed again and again over one graph
    # For the shapes as they are, and an error instead of the unfused form if that fails.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _attend_flex(inputs: Inputs, mask: Any) -> Tensor:
    grouped = inputs.query.shape[2] != inputs.key.shape[2]
    bias = inputs.bias
    group, rows = inputs.query.shape[2] // bias.shape[1], int(bias.shape[2] > 1)

    def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + bias[b, h // group, q * rows, k]

    query, key, value = (x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
    out = _compiled_flex()(query, key, value, biased, mask, enable_gqa=grouped)
    return out.transpose(1, 2)


def _attend_reference(inputs: Inputs, mask: Tensor) -> Tensor:
    return attention_reference(inputs.query, inputs.key, inputs.value, mask, inputs.bias)[0]


def _squares(case: Case) -> int:
    """Scores, probabilities, bias and one gradient, each ``[B, H, Q, N]``."""
    item = getattr(torch, case.dtype).itemsize
    return 4 * item * case.batch * case.heads * case.queries * case.length


def _mask_bytes(case: Case) -> int:
    """A bool mask ``[B, Hkv, Q, N]``."""
    return case.batch * case.kv_heads * case.queries * case.length


PROVIDERS = {
    "ours": _ours(None),
    **{f"ours-{name}": _ours(name) for name in dispatch.explain_backends()},
    "sdpa-masked": Provider(
        "SDPA, N x N mask (torch.topk) and bias materialised: the same function",
        _mask_for_sdpa,
        _attend_masked,
        extra_bytes=_squares,
        building="selection: the mask, unless given; forward: mask and bias added up",
    ),
    "sdpa-additive": Provider(
        "SDPA, mask and bias added up beforehand, without a gradient for the bias",
        lambda inputs, window: _add_up(
            inputs, inputs.bias.detach(), _mask_for_sdpa(inputs, window)
        ),
        _attend_additive,
        extra_bytes=_squares,
        trains_bias=False,
        building="selection: the mask, unless given, and mask and bias added up",
    ),
    "sdpa-causal": Provider(
        "SDPA, is_causal=True, all keys, no bias: what one uses without a mask",
        lambda inputs, window: decoding.full_cache(inputs) if inputs.decodes else None,
        _attend_causal,
        dense=True,
    ),
    "flex": Provider(
        "FlexAttention, compiled, with the same mask and bias",
        _select_flex,
        _attend_flex,
        building="selection: keys, unless a mask is given, and create_block_mask",
    ),
    **{
        name: Provider(
            f"the predecessor, mask by torch.topk; its environment's Python: "
            f"{predecessors.INTERPRETER}",
            _mask_for_predecessors,
            predecessors.attend(module),
            extra_bytes=_mask_bytes,
            building="selection: the mask, unless given",
            module=module,
        )
        for module, name in predecessors.DISTRIBUTIONS.items()
    },
    "reference": Provider(
        "the eager oracle on the dense mask of the definition",
        visible_pairs,
        _attend_reference,
        extra_bytes=_squares,
    ),
}


def verify(case: Case, name: str) -> dict[str, float]:
    """The errors of a provider on the case's reduced shape, against fp64.

    The rule: every element of the output and of each gradient is off by at most twice the largest
    error of plain PyTorch in the same dtype, plus 1e-5. A selection has to be equal. Cases that
    are the same problem when reduced are computed once in a process.

    Returns:
        The largest error of ``out`` and of each gradient; of a selection the number of wrong pairs.

    Raises:
        WrongResult: The rule is broken.
    """
    try:
        return dict(_verified(replace(case.reduced(), name="", providers=()), PROVIDERS[name]))
    except WrongResult as error:
        raise WrongResult(f"{name} on {case.name}: {error}") from None


@cache
def _verified(case: Case, provider: Provider) -> dict[str, float]:
    inputs = make_inputs(case, seed=1)
    if case.what == "selection":
        found = provider.select(inputs, case.window)
        found = found.to_dense() if isinstance(found, KeySelection) else found
        wrong = int((found != window_mask(inputs.scores, case.window)).sum())
        if wrong:
            raise WrongResult(f"{wrong} visible pairs differ at {case.shape}")
        return {"wrong_pairs": 0.0}

    results = run(inputs, provider, case.window)
    truth, plain = references(inputs, provider, case.window)
    errors = {}
    for key, value in results.items():
        errors[key] = distance(value, truth[key])
        budget = 2 * distance(plain[key], truth[key]) + 1e-5
        if not errors[key] <= budget:
            raise WrongResult(
                f"{key} is off by {errors[key]:.2e} at {case.shape}, allowed {budget:.2e}"
            )
    return errors


def run(inputs: Inputs, provider: Provider, window: int) -> dict[str, Tensor]:
    """``out`` and, if the inputs require them, the gradients that the provider computes."""
    out = provider.attend(inputs, provider.select(inputs, window))
    leaves = provider.leaves(inputs)
    if not inputs.query.requires_grad:
        return {"out": out.detach()}
    gradients = torch.autograd.grad(out, leaves, inputs.grad_out.to(out.dtype))
    names = GRADIENTS[: len(leaves)]
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


def references(
    inputs: Inputs, provider: Provider, window: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `run` should give: the truth in fp64, and plain PyTorch's in the inputs' own dtype."""
    if provider.dense:
        mask = causal_mask(inputs.query.shape[1], inputs.key.shape[1], inputs.query.device)
        mask = mask[None, None]
    else:
        mask = visible_pairs(inputs, window)

    def attend(x: Inputs, mask: Tensor) -> Tensor:
        bias = None if provider.dense else x.bias
        return attention_reference(x.query, x.key, x.value, mask, bias)[0]

    reference = replace(provider, select=lambda inputs, window: mask, attend=attend)
    query, key, value, scores = (
        x.detach().double().requires_grad_(x.requires_grad) for x in inputs.leaves()
    )
    grad_out = inputs.grad_out.double()
    exact = Inputs(query, key, value, scores, grad_out, inputs.mask, inputs.is_causal)
    return run(exact, reference, window), run(inputs, reference, window)


def distance(value: Tensor, truth: Tensor) -> float:
    """The largest difference of two tensors; NaN if one of them holds it."""
    return float((value.double() - truth).abs().max())
