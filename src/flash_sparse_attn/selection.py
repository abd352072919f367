"""Selection of keys by one score per key."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import checks
from .backends import eager_select, triton
from .intervals import KeySelection
from .varlen import PackedSequences

MODES = ("causal", "shared", "relu")


def select_keys(
    scores: Tensor,
    window_size: int,
    *,
    mode: str = "causal",
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
) -> KeySelection:
    """Choose the keys that each position sees, by one score per key.

    The order is strict: score first, then position. ``NaN`` ranks below ``-inf``, padding below
    everything. The selection reads detached scores in fp32 and has no gradient.

    Args:
        scores: Float ``[B, Hkv, K]``, or ``[Hkv, total_k]`` with `cu_seqlens`.
        window_size: ``W >= 1``, the number of keys kept. ``W >= K`` keeps all.
        mode: ``"causal"``: position ``t`` sees the ``W`` best keys among positions ``<= t``; equal
            scores: the newer key wins, so constant scores are a sliding window. ``"shared"``: the
            ``W`` best keys of the whole sequence for every query (older wins); **the choice reads
            the future**. ``"relu"``: every key with a score above 0.
        key_mask: Bool ``[B, K]`` (packed: ``[total_k]``), True for real tokens. Padding is never
            visible and never competes.
        cu_seqlens: int32 ``[N + 1]``, borders of packed sequences; each is selected on its own.
        keep_first: The first keys of each sequence that are visible for ever, on top of the ``W``.
        keep_recent: The newest keys that are visible to a query, on top of the ``W`` best.

    Returns:
        A `KeySelection` with intervals for every key.

    Raises:
        TypeError, ValueError: An argument has a wrong type, shape, dtype or value. NaN scores are
            looked for on CPU tensors, and on GPUs with ``FLASH_SPARSE_ATTN_CHECK=1``.
    """
    checks.check_selection_arguments(
        scores, window_size, mode, MODES, key_mask, cu_seqlens, keep_first, keep_recent
    )
    score = scores.detach().to(torch.float32).contiguous()
    choice = (window_size, mode, key_mask, cu_seqlens, keep_first, keep_recent)
    if _on_gpu_kernels(score):
        start, expiry = triton.select_intervals(score, *choice)
    else:
        start, expiry = eager_select.intervals(score, *choice)
    return KeySelection(
        start,
        expiry,
        score,
        mode,
        window_size,
        keep_first,
        keep_recent,
        key_mask,
        cu_seqlens,
    )


def prepare_selection(
    selection: KeySelection,
    query_len: int | None = None,
    *,
    is_causal: bool | None = None,
    for_backward: bool = True,
) -> KeySelection:
    """The same selection with its plan made, for several calls: layers, steps, a captured graph.

    Args:
        selection: From `select_keys`.
        query_len: Number of queries of the calls; default as many as keys.
        is_causal: Has to be given for the modes ``"shared"`` and ``"relu"``.
        for_backward: Whether the calls need gradients.

    Returns:
        A new `KeySelection`; where no plan is needed, the same one.
    """
    causal = selection.resolve_causality(is_causal)
    if not _on_gpu_kernels(selection.start):
        return selection
    query_len = selection.start.shape[-1] if query_len is None else query_len
    packed = None
    if selection.cu_seqlens is not None:
        borders = selection.cu_seqlens
        packed = PackedSequences(borders, borders, query_len, query_len)
    plan = triton.make_plan(selection, query_len, causal, packed, for_backward)
    return replace(selection, plan=plan)


def _on_gpu_kernels(score: Tensor) -> bool:
    """Whether the GPU's own kernels select and plan for keys like these."""
    return score.device.type == "cuda" and score.numel() > 0 and not triton.unavailable()
