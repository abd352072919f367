"""The frozen facts of one attention call, read once; backends decide by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .intervals import KeySelection
from .varlen import PackedSequences


@dataclass(frozen=True)
class Problem:
    """What is asked for, without the tensors.

    Attributes:
        batch, query_len, key_len, num_heads, num_kv_heads, head_dim: Sizes. Packed calls have
            batch 1 and the totals as lengths.
        dtype, device: Of query, key and value.
        selection: Mode of the key selection, or ``None`` when there is none.
        mask_shape: Shape of the bool mask, or ``None``.
        bias_shape, bias_dtype: Of the additive bias, or ``None``.
        is_causal: Whether keys after a query's position ``i + K - Q`` are hidden.
        softmax_scale: Factor of ``q.k``.
        softcap: Bound of the scaled scores before the bias, 0.0 if off.
        deterministic: Whether results have to be bitwise repeatable.
        requires_grad: Whether anything needs a gradient.
        bias_requires_grad: Whether the bias does.
        packed: Borders of packed sequences, or ``None``.
    """

    batch: int
    query_len: int
    key_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    selection: str | None
    mask_shape: tuple[int, ...] | None
    bias_shape: tuple[int, ...] | None
    bias_dtype: torch.dtype | None
    is_causal: bool
    softmax_scale: float
    softcap: float
    deterministic: bool
    requires_grad: bool
    bias_requires_grad: bool = False
    packed: PackedSequences | None = None

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | KeySelection | None,
        bias: Tensor | None,
        *,
        is_causal: bool,
        softmax_scale: float | None,
        softcap: float,
        deterministic: bool | None,
        packed: PackedSequences | None = None,
    ) -> Problem:
        """The facts of a checked call with 4-D query, key and value."""
        batch, query_len, num_heads, head_dim = query.shape
        needs = any(t is not None and t.requires_grad for t in (query, key, value, bias))
        return cls(
            batch=batch,
            query_len=query_len,
            key_len=key.shape[1],
            num_heads=num_heads,
            num_kv_heads=key.shape[2],
            head_dim=head_dim,
            dtype=query.dtype,
            device=query.device,
            selection=mask.mode if isinstance(mask, KeySelection) else None,
            mask_shape=tuple(mask.shape) if isinstance(mask, Tensor) else None,
            bias_shape=None if bias is None else tuple(bias.shape),
            bias_dtype=None if bias is None else bias.dtype,
            is_causal=is_causal,
            softmax_scale=head_dim**-0.5 if softmax_scale is None else float(softmax_scale),
            softcap=softcap,
            deterministic=bool(deterministic) or torch.are_deterministic_algorithms_enabled(),
            requires_grad=needs and torch.is_grad_enabled(),
            bias_requires_grad=bias is not None and bias.requires_grad and torch.is_grad_enabled(),
            packed=packed,
        )

    @property
    def is_empty(self) -> bool:
        """No query or no key: every output is 0."""
        return not (self.batch and self.query_len and self.key_len)

    def __str__(self) -> str:
        grad = ", gradients" if self.requires_grad else ""
        mask = f"selection {self.selection}" if self.selection else f"mask {self.mask_shape}"
        return (
            f"B={self.batch} Q={self.query_len} K={self.key_len} H={self.num_heads} "
            f"Hkv={self.num_kv_heads} D={self.head_dim}, {self.dtype} on {self.device}, {mask}, "
            f"bias {self.bias_shape}, causal={self.is_causal}{grad}"
            f"{', packed' if self.packed else ''}{', deterministic' if self.deterministic else ''}"
        )
