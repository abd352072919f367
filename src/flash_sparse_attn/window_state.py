"""What a `WindowCache` stores, as one record for the backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from torch import Tensor

EMPTY = -(2**63)
"""Rank key of an empty slot, and the threshold until ``W`` keys were read."""

SIZES = ("window_size", "keep_first", "keep_recent")
TENSORS = (
    *("key", "value", "score", "position", "threshold", "seen_tokens", "evicted_at"),
    *("key_scale", "value_scale"),
)


@dataclass(frozen=True, eq=False)
class WindowState:
    """The tensors and sizes of a `WindowCache`, which describes them. Steps write to all tensors.

    The *rank key* of a slot is one int64 in the order of keys: the upper half is `order_key` of the
    score, the lower the position; `EMPTY` for an empty slot.
    """

    key: Tensor
    value: Tensor
    score: Tensor
    position: Tensor
    threshold: Tensor
    seen_tokens: Tensor
    evicted_at: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    window_size: int
    keep_first: int
    keep_recent: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.window_size, self.keep_first, self.keep_recent

    def tensors(self) -> list[Tensor]:
        """All tensors there are, in the order of the fields."""
        every = (getattr(self, name) for name in TENSORS)
        return [tensor for tensor in every if tensor is not None]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], sizes: Sequence[int]) -> WindowState:
        """The inverse of `tensors` and `sizes`."""
        named: dict[str, Any] = dict(zip_longest(TENSORS, tensors)) | dict(
            zip(SIZES, sizes, strict=True)
        )
        return cls(**named)
