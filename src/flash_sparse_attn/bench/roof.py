"""What a machine can do at most, measured beside the rows: copying, and a matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

# Bytes to copy and width of the matrices: far above caches, and a fraction of a second.
_SIZES = {"cuda": (1 << 30, 8192), "cpu": (1 << 26, 1024)}
_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
_REPEATS = 5


def ceilings(device: str) -> dict[str, float]:
    """``bytes_per_second`` of a copy (read and written) and ``flops_per_second`` of a product.

    The best of several runs each; products in bf16 on GPUs and in fp32 on CPUs.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
    """
    count, width = _SIZES[device]
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    # Equal numbers would cost less power, and the clock would be higher than it ever is in use.
    left = torch.randn(width, width, dtype=_DTYPES[device], device=device)
    copied = _best_seconds(lambda: target.copy_(source), device)
    multiplied = _best_seconds(lambda: left @ left, device)
    return {"bytes_per_second": 2 * count / copied, "flops_per_second": 2 * width**3 / multiplied}


def _best_seconds(function: Callable[[], object], device: str) -> float:
    """Of the device where it is a GPU; the first run is left out."""
    found = []
    for _ in range(1 + _REPEATS):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return min(found[1:])
