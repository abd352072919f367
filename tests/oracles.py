"""What the fast code is tested against: slow definitions in plain loops, and the fp64 reference."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import torch
from compare import assert_fair, largest_error
from torch import Tensor

from flash_sparse_attn.reference import attention_reference


def visible_keys(
    scores: Tensor,
    window_size: int,
    mode: str,
    *,
    is_causal: bool = True,
    key_mask: Tensor | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    query_len: int | None = None,
) -> Tensor:
    """Which key each query sees, straight from the definition, one query at a time.

    Args:
        scores: ``[B, Hkv, K]``.
        key_mask: Bool ``[B, K]``.
        query_len: Q; query ``i`` stands at ``i + K - Q``. Default K.

    Returns:
        Bool ``[B, Hkv, Q, K]``.
    """
    batch, heads, key_len = scores.shape
    query_len = key_len if query_len is None else query_len
    dense = torch.zeros(batch, heads, query_len, key_len, dtype=torch.bool)
    for b in range(batch):
        real = [j for j in range(key_len) if key_mask is None or bool(key_mask[b, j])]
        for h in range(heads):
            score = scores[b, h].float().tolist()
            for i in range(query_len):
                position = i + key_len - query_len
                past = [j for j in real if j <= position]
                if mode == "causal":
                    seen = set(
                        heapq.nlargest(window_size, past, key=lambda j: (_rank(score[j]), j))
                    )
                elif mode == "shared":
                    seen = set(
                        heapq.nlargest(window_size, real, key=lambda j: (_rank(score[j]), -j))
                    )
                else:
                    seen = {j for j in real if score[j] > 0}
                seen |= set(real[:keep_first])
                seen |= set(past[len(past) - min(keep_recent, len(past)) :])
                if is_causal:
                    seen = {j for j in seen if j <= position}
                dense[b, h, i, list(seen)] = True
    return dense


def best_keys(
    bias: Tensor, allowed: Tensor, window_size: int, newer_wins: bool, min_dtype: float
) -> Tensor:
    """The `window_size` best allowed keys of every row of ``[..., K]``, one row at a time."""
    bias, allowed = torch.broadcast_tensors(bias.float(), allowed)
    chosen = torch.zeros(bias.shape, dtype=torch.bool)
    for row in range(bias.numel() // bias.shape[-1] if bias.numel() else 0):
        values = bias.reshape(-1, bias.shape[-1])[row].tolist()
        keys = allowed.reshape(-1, bias.shape[-1])[row].nonzero().flatten().tolist()
        keys = [j for j in keys if values[j] != min_dtype]
        best = heapq.nlargest(
            window_size, keys, key=lambda j: (_rank(values[j]), j if newer_wins else -j)
        )
        chosen.view(-1, bias.shape[-1])[row, best] = True
    return chosen


def _rank(score: float) -> tuple[bool, float]:
    """A sortable score: NaN below everything, -0 equal to +0."""
    return (False, 0.0) if math.isnan(score) else (True, score)


def scores_of_kind(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """fp32 scores of a named shape of data: the cases in which selections go wrong."""
    if kind == "random":
        return torch.randn(shape, generator=generator)
    if kind == "equal":
        return torch.full(shape, 0.5)
    if kind == "rising":
        return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    if kind == "falling":
        return -torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    if kind == "few values":
        return torch.randint(-2, 3, shape, generator=generator).float()
    if kind == "zeros of both signs":
        return torch.where(torch.rand(shape, generator=generator) < 0.5, 0.0, -0.0)
    if kind == "infinities":
        values = torch.tensor([-torch.inf, torch.inf, 3.4e38, -3.4e38, 0.0, 1e-45, -1e-45])
        return values[torch.randint(0, len(values), shape, generator=generator)]
    raise ValueError(f"kind: no scores called {kind!r}")


SCORE_KINDS = (
    "random",
    "equal",
    "rising",
    "falling",
    "few values",
    "zeros of both signs",
    "infinities",
)


def outputs_and_gradients(
    attend: Callable[..., Tensor], inputs: dict[str, Tensor], grad_out: Tensor
) -> dict[str, Tensor]:
    """``out`` of ``attend(**inputs)`` and ``d<name>`` of every input, with fresh leaves."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    out = attend(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out.to(out.dtype))
    results = {"out": out.detach()}
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def check_attention(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    **options: object,
) -> dict[str, Tensor]:
    """Compare output and all gradients with the fp64 reference, under a random upstream gradient.

    Args:
        attend: Called with ``query``, ``key``, ``value`` and, if given, ``bias``; returns ``out``.
        mask: What the reference is to use: bool, 4-D.
        options: ``softmax_scale``, ``is_causal`` and ``softcap`` of the reference.

    Returns:
        The results of `attend`, see `outputs_and_gradients`.
    """
    inputs = {"query": query, "key": key, "value": value}
    if bias is not None:
        inputs["bias"] = bias

    def reference(query, key, value, bias=None):
        return attention_reference(query, key, value, mask, bias, **options)[0]

    generator = torch.Generator().manual_seed(99)
    # Small enough for the absolute part of the budget to cover another order of summation.
    grad_out = (0.25 * torch.randn(query.shape, generator=generator)).to(query)
    results = outputs_and_gradients(attend, inputs, grad_out)
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    truth = outputs_and_gradients(reference, exact, grad_out)
    plain = outputs_and_gradients(reference, inputs, grad_out)
    for name, result in results.items():
        if result.dtype == torch.float64:
            assert largest_error(result, truth[name], name) <= 1e-11
        else:
            assert_fair(result, truth[name], plain[name], name)
    for name, tensor in inputs.items():
        assert results[f"d{name}"].dtype == tensor.dtype
    return results
