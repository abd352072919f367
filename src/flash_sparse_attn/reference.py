"""The eager reference: what every backend must compute, written to be read.

    s       = softcap * tanh(softmax_scale * q.k / softcap)   (softcap off: softmax_scale * q.k)
    s       = s + bias
    visible = mask AND causal AND bias > -inf                 (causal: key j <= i + K - Q)
    out     = softmax(s where visible) . v                    (no visible key: out 0, lse -inf)

It stores the whole ``[B, H, Q, K]`` score matrix and is meant for tests and small problems.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(query_len: int, key_len: int, device: torch.device | None = None) -> Tensor:
    """Bottom-right causal mask ``[Q, K]``: query ``i`` stands at position ``i + K - Q``."""
    positions = torch.arange(query_len, device=device)[:, None] + key_len - query_len
    return torch.arange(key_len, device=device) <= positions


def expand_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """Repeat dimension 1 of a 4-D tensor so that head ``h`` reads head ``h // (H / heads)``."""
    return tensor.repeat_interleave(num_heads // tensor.shape[1], dim=1)


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention in the dtype of its inputs, differentiable by autograd.

    Args:
        query: ``[B, Q, H, D]``.
        key: ``[B, K, Hkv, D]`` with ``H % Hkv == 0``.
        value: ``[B, K, Hkv, D]``.
        mask: Bool ``({1|B}, {1|Hkv|H}, {1|Q}, {1|K})``, True where the key is visible.
        bias: Float tensor of the same set of shapes, added to the scaled scores.
        softmax_scale: Factor of ``q.k``; default ``D ** -0.5``.
        is_causal: Hide keys after the query's position ``i + K - Q``.
        softcap: Bound of the scaled scores before the bias; ``None`` or 0.0 is off.

    Returns:
        ``out [B, Q, H, D]``, ``lse [B, H, Q]`` (natural logarithm) and ``probs [B, H, Q, K]``.
    """
    num_heads, group = query.shape[2], query.shape[2] // key.shape[2]
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    shape = (query.shape[0], num_heads, query.shape[1], key.shape[1])

    visible = torch.ones(shape, dtype=torch.bool, device=query.device)
    if is_causal:
        visible = visible & causal_mask(shape[2], shape[3], query.device)
    if mask is not None:
        visible = visible & expand_heads(mask, num_heads)
    if bias is not None:
        visible = visible & (expand_heads(bias.detach(), num_heads) > -torch.inf)

    # A key that nobody sees is not read: a NaN in it must not reach the output as 0 * NaN.
    seen = visible.unflatten(1, (-1, group)).any(dim=(2, 3)).transpose(1, 2)[..., None]
    key = key.masked_fill(~seen, 0.0).repeat_interleave(group, dim=2)
    value = value.masked_fill(~seen, 0.0).repeat_interleave(group, dim=2)

    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + expand_heads(bias, num_heads).to(scores.dtype)
    scores = scores.masked_fill(~visible, -torch.inf)

    lse = torch.logsumexp(scores.detach(), dim=-1)
    empty = ~visible.any(dim=-1, keepdim=True)
    probs = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(~visible, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", probs, value), lse, probs
