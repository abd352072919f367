"""Dynamic mask attention in one call: select keys by score, attend, and let the scores learn."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import checks
from .attention import flash_sparse_attn_func, flash_sparse_attn_varlen_func
from .selection import select_keys


def dynamic_mask_attn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    window_size: int,
    *,
    mode: str = "causal",
    key_mask: Tensor | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    is_causal: bool | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Select keys by their scores, attend to them, and let the scores learn.

    By definition `select_keys` of the detached scores, and `flash_sparse_attn_func` with that
    selection and the bias ``scores[:, :, None, :]``: the scores learn through the keys they keep.

    Args:
        query: ``[B, Q, H, D]``.
        key: ``[B, K, Hkv, D]``.
        value: ``[B, K, Hkv, D]``.
        scores: Float ``[B, Hkv, K]``, one number per key and KV head.
        window_size: ``W``, the number of keys each query keeps.
        mode, key_mask, keep_first, keep_recent: As in `select_keys`.
        is_causal: To be given for the modes ``"shared"`` and ``"relu"``; ``"causal"`` implies it.
        softmax_scale, softcap, deterministic, return_lse, backend: As in `flash_sparse_attn_func`.

    Returns:
        ``out [B, Q, H, D]``, or ``(out, lse [B, H, Q])``.
    """
    checks.check_scores(scores, key)
    selection = select_keys(
        scores,
        window_size,
        mode=mode,
        key_mask=key_mask,
        keep_first=keep_first,
        keep_recent=keep_recent,
    )
    return flash_sparse_attn_func(
        query,
        key,
        value,
        selection,
        scores[:, :, None, :],
        softmax_scale,
        is_causal,
        softcap,
        deterministic,
        return_lse=return_lse,
        backend=backend,
    )


def dynamic_mask_attn_varlen_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window_size: int,
    *,
    mode: str = "causal",
    key_mask: Tensor | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    is_causal: bool | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`dynamic_mask_attn_func` for packed sequences, each selected and attended on its own.

    Args:
        query: ``[total_q, H, D]``.
        key: ``[total_k, Hkv, D]``.
        value: ``[total_k, Hkv, D]``.
        scores: Float ``[Hkv, total_k]``.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: As in
            `flash_sparse_attn_varlen_func`.
        window_size, mode, key_mask, keep_first, keep_recent: As in `select_keys`.
        is_causal, softmax_scale, softcap, deterministic, return_lse, backend: As in
            `dynamic_mask_attn_func`.

    Returns:
        ``out [total_q, H, D]``, or ``(out, lse [H, total_q])``.
    """
    checks.check_scores(scores, key, packed=True)
    selection = select_keys(
        scores,
        window_size,
        mode=mode,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens_k,
        keep_first=keep_first,
        keep_recent=keep_recent,
    )
    return flash_sparse_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        is_causal,
        softcap,
        deterministic,
        attn_mask=selection,
        attn_bias=scores,
        return_lse=return_lse,
        backend=backend,
    )
