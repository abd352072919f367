"""Keys and values in 8 bits (e4m3) with fp32 scales."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
_MAX = 448.0


def quantize(rows: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """e4m3 rows ``[..., D]`` and their scales ``[...]``.

    Args:
        rows: Float ``[..., D]``.
        scale: fp32, broadcast to ``[...]``; default: of every row, so that it uses the whole range.
            Values out of the range of a given scale become the largest.
    """
    rows = rows.float()
    if scale is None:
        scale = (rows.abs().amax(-1) / _MAX).clamp(min=1e-30)
    return (rows / scale[..., None]).clamp(-_MAX, _MAX).to(FP8), scale


def dequantize(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``[..., D]`` times their scales ``[...]``."""
    return (stored.float() * scale[..., None]).to(dtype)


def as_bytes(tensor: Tensor) -> Tensor:
    """8-bit floats as uint8, which can be moved on every device; other tensors as they are."""
    return tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor
