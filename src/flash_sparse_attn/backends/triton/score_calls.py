"""Launches of the kernels of key scores: two for scores, four for all gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .config import FEW_TILES, SCORE_TILES
from .key_scores import (
    fold_kernel,
    grad_kernel,
    grad_logit_kernel,
    score_kernel,
    sum_kernel,
    unfold_kernel,
)
from .launch import launch, repeat_call

_WARPS = 4


def score_keys(
    hidden: Tensor, layers: Sequence[Tensor | None], exponential: bool, with_logit: bool
) -> Sequence[Any]:
    """Scores, and the logits or ``None``, fp32 ``[..., Hkv, S]``; see `scores.folded_key_scores`.

    Args:
        hidden: ``[..., S, N]``, not empty.
        layers: Weight ``[Hkv D, N]`` and bias of the first layer, weight ``[Hkv, Hkv D]`` and bias
            of the second, ``A [Hkv]``.
        exponential: Whether the score is the ``exp`` of the product.
        with_logit: Whether logits are returned, for gradients.
    """
    shape, tensors = hidden.shape, _as_rows(hidden, *layers)
    facts = ("key scores", shape, exponential, with_logit)
    return repeat_call(facts, tensors, lambda: _score_keys(tensors, *facts[1:]))


def grad_scores(
    grad_score: Tensor,
    hidden: Tensor,
    layers: Sequence[Tensor | None],
    logit: Tensor,
    exponential: bool,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Gradients of `hidden` and `layers` of `score_keys`, ``None`` where `needs` is False."""
    shape, tensors = hidden.shape, _as_rows(hidden, *layers)
    if grad_score.dim() > 3:
        grad_score = grad_score.flatten(0, -3)
    tensors += [logit.contiguous(), grad_score]
    facts = ("gradients of key scores", shape, exponential, tuple(needs))
    return repeat_call(facts, tensors, lambda: _grad_scores(tensors, *facts[1:]))


def _as_rows(hidden: Tensor, *layers: Tensor | None) -> list[Any]:
    """``[B, S, N]`` or ``[S, N]``, and the layers, with a contiguous last dimension."""
    if hidden.dim() > 3:
        hidden = hidden.flatten(0, -3)
    return [
        one if one is None or one.stride(-1) == 1 else one.contiguous() for one in (hidden, *layers)
    ]


def _strides(rows: Tensor) -> tuple[int, ...]:
    """Those of three dimensions, or of two as a batch of one."""
    return rows.stride() if rows.dim() == 3 else (0, *rows.stride())


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _sizes(heads_kv: int, size: int) -> tuple[int, int, int]:
    """KV heads of a program, programs that share them out, and programs that fold the weights.

    The biases are folded as one more column.
    """
    heads = min(SCORE_TILES.heads, triton.next_power_of_2(heads_kv))
    programs = triton.cdiv(heads_kv, heads)
    return heads, programs, programs * triton.cdiv(size + 1, SCORE_TILES.fold_columns)


def _score_keys(
    tensors: Sequence[Any], shape: torch.Size, exponential: bool, with_logit: bool
) -> tuple[Tensor, Tensor | None]:
    """`score_keys` of tensors with contiguous rows, whose hidden states were of this shape."""
    hidden, v_weight, v_bias, dt_weight, dt_bias, rate = tensors
    tiles, heads_kv, (*batch, length, size) = SCORE_TILES, len(dt_weight), shape
    num_tokens = hidden.numel() // size
    heads, head_programs, folds = _sizes(heads_kv, size)
    folded = _empty(hidden, heads_kv * (size + 1))
    score = _empty(hidden, *batch, heads_kv, length)
    logit = _empty(hidden, *batch, heads_kv, length) if with_logit else None
    # No contractions that a compiler may choose for one kernel and not for another.
    options = {"HEADS_KV": heads_kv, "SIZE": size, "HEADS": heads, "enable_fp_fusion": False}
    launch(fold_kernel, folds)(
        v_weight, v_bias, dt_weight, dt_bias, folded, v_weight.stride(0), dt_weight.stride(0),
        VALUES=len(v_weight), BLOCK_V=tiles.fold_values, BLOCK_N=tiles.fold_columns,
        num_warps=_WARPS, **options,
    )  # fmt: skip
    few = num_tokens < FEW_TILES * tiles.tokens
    tokens = 1 if few else tiles.tokens
    *strides, _ = _strides(hidden)
    launch(score_kernel, triton.cdiv(num_tokens, tokens) * head_programs)(
        hidden, folded, rate, score, logit, num_tokens, length, *strides, EXPONENTIAL=exponential,
        ALIGNED=all(stride % 8 == 0 for stride in strides), TOKENS=tokens,
        LANES=min(tiles.lanes, triton.next_power_of_2(size)),
        STAGES=1 if few else tiles.num_stages, num_warps=1 if few else _WARPS, **options,
    )  # fmt: skip
    return score, logit


def _grad_scores(
    tensors: Sequence[Any], shape: torch.Size, exponential: bool, needs: Sequence[bool]
) -> list[Tensor | None]:
    """`grad_scores` of tensors with contiguous rows, whose hidden states were of this shape."""
    hidden, v_weight, v_bias, dt_weight, dt_bias, rate, logit, grad_score = tensors
    tiles, heads_kv, (*_, length, size) = SCORE_TILES, len(dt_weight), shape
    num_tokens, num_values = hidden.numel() // size, len(v_weight)
    heads, head_programs, folds = _sizes(heads_kv, size)
    grads = [
        _empty(one, *of_shape, dtype=one.dtype) if need else None
        for need, one, of_shape in zip(
            needs,
            tensors,
            (shape, *(() if one is None else one.shape for one in tensors[1:6])),
            strict=False,
        )
    ]
    grad_hidden, grad_v, grad_v_bias, grad_dt, grad_dt_bias, grad_rate = grads
    chunk_len = tiles.chunk_len(num_tokens)
    num_chunks = triton.cdiv(num_tokens, chunk_len)
    weights = 0 if grad_v is None and grad_dt is None else heads_kv * size
    part_size = -(-(weights + 2 * heads_kv) // 4) * 4  # whole 16 bytes
    has_part = any(grad is not None for grad in grads[1:])
    part = _empty(hidden, num_chunks, part_size) if has_part else None
    folded = _empty(hidden, heads_kv * (size + 1))
    grad_logit = _empty(hidden, num_tokens, heads_kv)
    sums = _empty(hidden, weights + heads_kv) if has_part else None

    options = {"HEADS_KV": heads_kv, "WEIGHTS": weights, "num_warps": _WARPS}
    layer_strides = v_weight.stride(0), dt_weight.stride(0)
    launch(grad_logit_kernel, folds + num_chunks * head_programs)(
        v_weight, v_bias, dt_weight, dt_bias, folded, rate, logit, grad_score, grad_logit, part,
        num_tokens, length, chunk_len, *_strides(grad_score), *layer_strides, VALUES=num_values,
        SIZE=size, EXPONENTIAL=exponential, PART=part_size, FOLDS=folds, HEADS=heads,
        BLOCK_V=tiles.fold_values, BLOCK_N=tiles.fold_columns, TOKENS=tiles.chunk, **options,
    )  # fmt: skip
    if grad_hidden is not None or weights:
        *strides, _ = _strides(hidden)
        lanes = min(tiles.grad_lanes, triton.next_power_of_2(size))
        launch(grad_kernel, num_chunks * triton.cdiv(size, lanes) * head_programs)(
            hidden, folded, grad_logit, grad_hidden, part, num_tokens, length, chunk_len, *strides,
            SIZE=size, PART=part_size, ALIGNED=all(stride % 8 == 0 for stride in strides),
            HEADS=heads, TOKENS=tiles.tokens, LANES=lanes, **options,
        )  # fmt: skip
    if has_part:
        launch(sum_kernel, triton.cdiv(weights + 2 * heads_kv, tiles.sum_lanes))(
            part, sums, grad_dt_bias, grad_rate, num_chunks, PART=part_size,
            CHUNKS=tiles.sum_chunks, LANES=tiles.sum_lanes, **options,
        )  # fmt: skip
    if grad_v is not None or grad_v_bias is not None or grad_dt is not None:
        launch(unfold_kernel, triton.cdiv(num_values, tiles.unfold_values) * head_programs)(
            v_weight, v_bias, dt_weight, sums, grad_v, grad_v_bias, grad_dt, *layer_strides,
            VALUES=num_values, SIZE=size, HEADS=heads, BLOCK_V=tiles.unfold_values,
            LANES=min(tiles.lanes, triton.next_power_of_2(size)), **options,
        )  # fmt: skip
    return grads
