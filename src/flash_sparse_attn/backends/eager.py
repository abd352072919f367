"""Attention in plain PyTorch at O(N W) cost, on any device and in any float dtype, with gradients.

Queries are cut into epochs of ``L`` consecutive positions. An epoch needs the keys that are visible
at its first position (the survivors, at most ``W``) and those that enter during it (at most ``L``).
Their rows are gathered, and an epoch becomes one small dense attention under a mask. A bool mask
gives an epoch the columns that any of its rows sees. The backward pass recomputes the scores of an
epoch, so that memory stays O(N).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..intervals import KeySelection
from ..problem import Problem
from .eager_tiles import Walk


def unavailable() -> list[str]:
    """Why this backend cannot run on this machine: it always can."""
    return []


def unsupported(problem: Problem) -> list[str]:
    """Why this backend cannot run this call: it runs every checked call."""
    return []


def attention(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | KeySelection | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``out [B, Q, H, D]`` and ``lse [B, H, Q]``; packed calls as one batch entry."""
    with torch.autocast(problem.device.type, enabled=False):  # autocast would round the products
        return _attention(problem, query, key, value, mask, bias)


def _attention(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | KeySelection | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if problem.packed is None:
        return _Attention.apply(problem, mask, query, key, value, bias)
    outs, lses = [query[:, :0]], [query.new_empty(1, problem.num_heads, 0, dtype=_lse_dtype(query))]
    for q0, q1, k0, k1 in problem.packed.ranges():
        part = replace(problem, packed=None, query_len=q1 - q0, key_len=k1 - k0)
        out, lse = _Attention.apply(
            part,
            _cut_mask(mask, k0, k1),
            query[:, q0:q1],
            key[:, k0:k1],
            value[:, k0:k1],
            None if bias is None else bias[..., k0:k1],
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def _cut_mask(
    mask: Tensor | KeySelection | None, begin: int, end: int
) -> Tensor | KeySelection | None:
    if isinstance(mask, KeySelection):
        return replace(
            mask,
            start=mask.start[None, :, begin:end],
            expiry=mask.expiry[None, :, begin:end],
            score=mask.score[None, :, begin:end],
            key_mask=None,
            cu_seqlens=None,
        )
    return None if mask is None else mask[..., begin:end]


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, mask, query, key, value, bias):  # type: ignore[no-untyped-def]
        walk = Walk(problem, mask, query, key, value, bias)
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        rows = (problem.batch, problem.num_heads, problem.query_len)
        # Peak and sum of a row are kept apart: their lse has too few digits for biases like 1e4.
        peaks = torch.full(rows, -torch.inf, dtype=walk.dtype, device=query.device)
        totals = torch.zeros(rows, dtype=walk.dtype, device=query.device)
        for tile in walk.tiles():
            probs, _ = walk.scores(tile, walk.queries(query, tile), walk.keys(tile))
            peak = probs.amax(dim=-1, keepdim=True)
            walk.put_rows(peaks, tile, peak)
            probs.sub_(torch.where(peak == -torch.inf, 0.0, peak)).exp_()
            total = probs.sum(dim=-1, keepdim=True)
            walk.put_rows(totals, tile, total)
            part = torch.matmul(probs, walk.values(tile)) / torch.where(total == 0, 1.0, total)
            walk.put_queries(out, tile, part)
        lse = (peaks + totals.log()).to(_lse_dtype(query))
        walk.check_rows(lse)
        # Saved as tensors, so that a change in place before the backward pass is an error.
        ctx.problem, ctx.mask = problem, None if isinstance(mask, Tensor) else mask
        masks = (mask.start, mask.expiry) if isinstance(mask, KeySelection) else (mask,)
        ctx.save_for_backward(query, key, value, bias, out, peaks, totals, *masks)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):  # type: ignore[no-untyped-def]
        problem = ctx.problem
        query, key, value, bias, out, peaks, totals, *masks = ctx.saved_tensors
        mask = masks[0] if ctx.mask is None else replace(ctx.mask, start=masks[0], expiry=masks[1])
        needs_query, needs_key, needs_value, needs_bias = ctx.needs_input_grad[2:]
        needs_scores = needs_query or needs_key or needs_bias
        walk = Walk(problem, mask, query, key, value, bias)
        grad_query = torch.zeros_like(query) if needs_query else None
        grad_key = torch.zeros_like(walk.key_rows) if needs_key else None
        grad_value = torch.zeros_like(walk.value_rows) if needs_value else None
        grad_bias = None
        if needs_bias:
            grad_bias = torch.zeros(bias.numel(), dtype=walk.dtype, device=bias.device)
        # P = exp(s - peak) / total: the division is done once on the rows of dO and of
        # delta = rowsum(dO * O) = rowsum(P * dP). Rows without a key have P = exp(s - inf) = 0.
        peaks = torch.where(peaks == -torch.inf, torch.inf, peaks)
        inverse = torch.where(totals == 0, 0.0, 1.0 / totals)
        delta = (
            torch.einsum("bqhd,bqhd->bhq", grad_out.to(walk.dtype), out.to(walk.dtype)) * inverse
        )

        with _repeatable(problem), torch.autocast(problem.device.type, enabled=False):
            for tile in walk.tiles():
                rows, keys = walk.queries(query, tile), walk.keys(tile)
                scores, slope = walk.scores(tile, rows, keys, with_slope=needs_query or needs_key)
                probs = scores.sub_(walk.rows(peaks, tile)).exp_()
                grad = walk.queries(grad_out, tile) * walk.rows(inverse, tile)
                if grad_value is not None:
                    walk.add_keys(grad_value, tile, torch.matmul(probs.mT, grad))
                if not needs_scores:
                    continue
                grad_scores = torch.matmul(grad, walk.values(tile).mT)
                grad_scores.sub_(walk.rows(delta, tile)).mul_(probs)
                if grad_bias is not None:
                    walk.add_bias(grad_bias, tile, grad_scores)
                if not (needs_query or needs_key):
                    continue
                grad_scores.mul_(
                    problem.softmax_scale if slope is None else slope.mul_(problem.softmax_scale)
                )
                if grad_query is not None:
                    walk.put_queries(grad_query, tile, torch.matmul(grad_scores, keys))
                if grad_key is not None:
                    walk.add_keys(grad_key, tile, torch.matmul(grad_scores.mT, rows))

        return (
            None,
            None,
            grad_query,
            None if grad_key is None else walk.key_gradient(grad_key, key),
            None if grad_value is None else walk.key_gradient(grad_value, value),
            None if grad_bias is None else grad_bias.view(bias.shape).to(bias.dtype),
        )


@contextmanager
def _repeatable(problem: Problem) -> Iterator[None]:
    """Ordered sums also on GPUs, where indexed additions are atomic unless this is asked for."""
    before = torch.are_deterministic_algorithms_enabled()
    if problem.deterministic and not before:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
