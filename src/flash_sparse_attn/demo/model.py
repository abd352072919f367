"""The small causal transformer that is trained; its attention is the only part that differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import flash_sparse_attn_func
from ..nn import DynamicMaskAttention, rotate
from ..selection import select_keys
from ..window_cache import WindowCache

KINDS = {
    "full": "full attention",
    "window": "sliding window",
    "dynamic": "dynamic mask",
}
"""The attentions that the demo compares."""

SHARED = "shared"
"""One more kind: a dynamic mask whose choice reads the whole text, the future too."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a `SmallModel`.

    Attributes:
        tokens: Size of the vocabulary that is read.
        classes: Size of the vocabulary that is predicted.
        width: Width of the residual stream.
        layers, heads, kv_heads, head_dim: As usual.
        window: Keys that a query of the sliding window and of the dynamic masks sees.
        recent: How many of a dynamic mask's `window` keys are the newest, whatever their score.
        feed_forward: Width of the feed-forward part over `width`; 0 for none.
        rope_theta: Base of the rotary embedding of queries and keys.
    """

    tokens: int
    classes: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    recent: int = 0
    feed_forward: int = 0
    rope_theta: float = 10000.0


class PlainAttention(nn.Module):
    """Ordinary causal self-attention over all keys, or over the newest `window`.

    Over all keys it is PyTorch's SDPA. A window is a selection of equal scores, of which the newer
    wins: O(N W) where SDPA with a mask takes O(N^2).
    """

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.head_dim, self.window = config.head_dim, window
        self.rope_theta = config.rope_theta
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, S, width]`` to the same."""
        query, key, value = (
            project(hidden).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        position = torch.arange(hidden.shape[1], device=hidden.device)
        query, key = (rotate(x, position, self.rope_theta).to(value.dtype) for x in (query, key))
        if self.window is None:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            grouped = query.shape[1] != key.shape[1]
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=grouped
            )
            out = out.transpose(1, 2)
        else:
            equal = key.new_zeros(key.shape[0], key.shape[2], key.shape[1])
            out = flash_sparse_attn_func(query, key, value, select_keys(equal, self.window))
        return self.o_proj(out.flatten(2))


class _Block(nn.Module):
    """Attention and, if there is one, the feed-forward part, each after a norm and residual."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        width, inner = config.width, config.feed_forward * config.width
        self.attention_norm = nn.RMSNorm(width)
        self.attention = _attention(config, kind)
        self.feed_forward = None
        if inner:
            self.feed_forward = nn.Sequential(
                nn.RMSNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)
            )

    def forward(self, hidden: Tensor, cache: WindowCache | None) -> Tensor:
        options = {} if cache is None else {"cache": cache}
        hidden = hidden + self.attention(self.attention_norm(hidden), **options)
        return hidden if self.feed_forward is None else hidden + self.feed_forward(hidden)


class SmallModel(nn.Module):
    """Embedding, residual layers of attention and feed-forward, and a linear read-out.

    Args:
        config: Sizes.
        kind: One of `KINDS`, or `SHARED`.
    """

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.config, self.kind = config, kind
        self.embedding = nn.Embedding(config.tokens, config.width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.blocks = nn.ModuleList(_Block(config, kind) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.read_out = nn.Linear(config.width, config.classes, bias=False)

    def forward(
        self, tokens: Tensor, *, last: int | None = None, caches: list[WindowCache] | None = None
    ) -> Tensor:
        """Logits ``[B, S, classes]`` of ``tokens [B, S]``.

        Args:
            tokens: int64.
            last: Logits of the last positions only.
            caches: One for each layer (`make_caches`); the tokens continue the cached text. For the
                kind ``"dynamic"``.
        """
        hidden = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, None if caches is None else caches[index])
        if last is not None:
            hidden = hidden[:, -last:]
        return self.read_out(self.norm(hidden))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.embedding.weight.device

    def make_caches(self, batch: int) -> list[WindowCache]:
        """Empty decoding states of all layers."""
        return [attention.make_cache(batch) for attention in self.dynamic_layers()]

    def dynamic_layers(self) -> Iterator[DynamicMaskAttention]:
        """The attention layers of a model with dynamic masks."""
        for block in self.blocks:
            attention = cast(_Block, block).attention
            if not isinstance(attention, DynamicMaskAttention):
                raise TypeError(f"kind: expected a 'dynamic' model, got {self.kind!r}")
            yield attention

    def parameters_count(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())


def precision(device: torch.device) -> torch.autocast:
    """fp32 on the CPU; bf16 autocast on a GPU, whose kernels take 16-bit inputs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _attention(config: ModelConfig, kind: str) -> nn.Module:
    if kind in ("dynamic", SHARED):
        return DynamicMaskAttention(
            config.width,
            config.heads,
            config.window - config.recent,
            mode="shared" if kind == SHARED else "causal",
            is_causal=True,
            keep_recent=config.recent,
            num_kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
        )
    return PlainAttention(config, config.window if kind == "window" else None)
