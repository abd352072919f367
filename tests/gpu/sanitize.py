"""Every kernel on small and odd shapes, for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src compute-sanitizer --tool memcheck \
        python tests/gpu/sanitize.py

Without the caching allocator every tensor is an allocation of its own, so that an access beyond its
end is seen. ``--tool racecheck`` and ``--tool synccheck`` take the same program.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from flash_sparse_attn import (
    dynamic_mask_attn_func,
    dynamic_mask_attn_varlen_func,
    flash_sparse_attn_func,
    select_keys,
)

DTYPE = torch.bfloat16


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE, requires_grad=True)


def step(function: Any, *arguments: Any, **options: Any) -> None:
    """Forward without gradients, twice (the second repeats launches), then with gradients."""
    leaves = [one for one in arguments if isinstance(one, torch.Tensor) and one.requires_grad]
    with torch.no_grad():
        for _ in range(2):
            function(*arguments, **options, backend="triton")
    out = function(*arguments, **options, backend="triton")
    torch.autograd.grad(out, leaves, torch.randn_like(out))


def selections() -> None:
    modes = (("causal", None), ("shared", True), ("shared", False), ("relu", True))
    for dim, length, (mode, causal) in itertools.product((20, 64, 128, 256), (1, 70, 333), modes):
        tensors = draw(2, length, 4, dim), draw(2, length, 2, dim), draw(2, length, 2, dim)
        scores = torch.randn(2, 2, length, device="cuda", requires_grad=True)
        key_mask = torch.rand(2, length, device="cuda") > 0.2
        choice = {"mode": mode, "is_causal": causal, "keep_first": 2}
        step(dynamic_mask_attn_func, *tensors, scores, 40, **choice)
        step(
            dynamic_mask_attn_func, *tensors, scores, 40, **choice, key_mask=key_mask, keep_recent=5
        )


def biases() -> None:
    length, heads, kv_heads, dim = 150, 6, 2, 64
    tensors = [draw(2, length, count, dim) for count in (heads, kv_heads, kv_heads)]
    selection = select_keys(torch.randn(2, kv_heads, length, device="cuda"), 50)
    for shape in itertools.product((1, 2), (1, kv_heads, heads), (1, length), (1, length)):
        bias = torch.randn(shape, device="cuda", requires_grad=True)
        for softcap in (None, 5.0):
            step(flash_sparse_attn_func, *tensors, selection, bias, softcap=softcap)


def packed() -> None:
    borders = torch.tensor([0, 0, 33, 34, 300], dtype=torch.int32, device="cuda")
    tensors = draw(300, 4, 64), draw(300, 2, 64), draw(300, 2, 64)
    scores = torch.randn(2, 300, device="cuda", requires_grad=True)
    step(dynamic_mask_attn_varlen_func, *tensors, scores, borders, borders, 266, 266, 40)


def long_selection() -> None:
    """Sequences long enough for every level of the selection and of the plan."""
    scores = torch.randn(1, 1, 600_000, device="cuda")
    query, key = draw(1, 600_000, 1, 16), draw(1, 600_000, 1, 16)
    with torch.no_grad():
        dynamic_mask_attn_func(query, key, key, scores, 64, backend="triton")


if __name__ == "__main__":
    for part in (selections, biases, packed, long_selection):
        part()
        torch.cuda.synchronize()
        print(f"{part.__name__}: done", flush=True)
