"""One more token after a long text: a cache of constant size, and one that holds everything."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..window_cache import WindowCache
from .cases import Inputs

FullCache = tuple[Tensor, Tensor]
"""Keys and values of the whole text, each ``[B, Hkv, N, D]``."""


def window_cache(inputs: Inputs, window: int) -> WindowCache:
    """The survivors of all tokens but the last, which `step` brings."""
    batch, _, kv_heads, head_dim = inputs.key.shape
    cache = WindowCache(
        batch, kv_heads, head_dim, window, dtype=inputs.key.dtype, device=inputs.key.device
    )
    cache.prefill(inputs.key[:, :-1], inputs.value[:, :-1], inputs.scores[..., :-1])
    return cache


def step(inputs: Inputs, cache: WindowCache, backend: str | None) -> Tensor:
    """The output of the last token ``[B, 1, H, D]``, which the cache then holds as well."""
    new = (inputs.key[:, -1:], inputs.value[:, -1:], inputs.scores[..., -1:])
    return cache.step(inputs.query, *new, backend=backend)


def full_cache(inputs: Inputs) -> FullCache:
    """Copies, in the layout that attention reads best."""
    key, value = (
        tensor.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        for tensor in (inputs.key, inputs.value)
    )
    return key, value


def fastest_kernels() -> AbstractContextManager[Any]:
    """PyTorch's own attention by the first of its kernels that serves a call; no effect on CPUs.

    Everywhere, and not only where the usual order is another: PyTorch sets that when attention is
    first called, and forgets it if that happens inside of such a context.
    """
    kernels = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(kernels, set_priority=True)


def sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """PyTorch's own attention of tensors ``[B, heads, S, D]``, to ``out [B, Q, H, D]``."""
    grouped = query.shape[1] != key.shape[1]
    with fastest_kernels():
        out = F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped, **options)
    return out.transpose(1, 2)


def attend_all(inputs: Inputs, cache: FullCache) -> Tensor:
    """Dense attention of the last token over the whole text."""
    return sdpa(inputs.query.transpose(1, 2), *cache)


def cache_bytes(cache: Any) -> int:
    """What a cache, or whatever a provider attends from, takes."""
    if isinstance(cache, WindowCache):
        return cache.nbytes
    tensors = cache if isinstance(cache, tuple) else (cache,)
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
