"""Every kernel on small and odd shapes, for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src compute-sanitizer --tool memcheck \
        python tests/gpu/sanitize.py [PART ...]

Without the caching allocator every tensor is an allocation of its own, so that an access beyond its
end is seen. ``--tool racecheck`` and ``--tool synccheck`` take the same program.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch

from flash_sparse_attn import (
    DynamicMaskAttention,
    WindowCache,
    append_kvcache,
    dynamic_mask_attn_func,
    dynamic_mask_attn_varlen_func,
    flash_sparse_attn_func,
    flash_sparse_attn_with_kvcache_func,
    select_keys,
)
from flash_sparse_attn.backends.triton import masks as mask_plans
from flash_sparse_attn.integrations.block_sparse import block_sparse_attention

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


def masks() -> None:
    """Bool masks, planned and read by the kernels themselves."""
    queries, keys, heads, kv_heads = 70, 133, 6, 2
    tensors = [
        draw(2, queries, heads, 64),
        draw(2, keys, kv_heads, 64),
        draw(2, keys, kv_heads, 64),
    ]
    for mask_plans.DIRECT_KEYS in (0, 1 << 30):
        for shape in itertools.product((1, 2), (1, kv_heads, heads), (1, queries), (1, keys)):
            mask = torch.rand(shape, device="cuda") > 0.4
            step(flash_sparse_attn_func, *tensors, mask)
        bias = draw(1, heads, queries, keys)
        step(flash_sparse_attn_func, *tensors, mask, bias, is_causal=True)


def runs() -> None:
    """Masks that show every epoch neighbouring keys, of which the last ones end a tensor."""
    mask_plans.DIRECT_KEYS = 0
    for dim, (queries, keys) in itertools.product((64, 128), ((70, 133), (300, 300), (40, 520))):
        tensors = [draw(1, queries, 4, dim), draw(1, keys, 2, dim), draw(1, keys, 2, dim)]
        position = torch.arange(queries, device="cuda")[:, None] + keys - queries
        key = torch.arange(keys, device="cuda")
        mask = ((key <= position) & (position < key + 90))[None, None]
        step(flash_sparse_attn_func, *tensors, mask)
        bias = draw(1, 2, 1, keys)
        step(flash_sparse_attn_func, *tensors, mask, bias)
        step(flash_sparse_attn_func, *tensors, mask, draw(1, 1, queries, keys))


def block_lists() -> None:
    """Lists with entries that name no block, and a last block that is cut."""
    for heads, size in itertools.product((1, 2, 4), (1, 17, 64)):
        tensors = [draw(2, 200, 4, 64), draw(2, 333, 2, 64), draw(2, 333, 2, 64)]
        lists = torch.randint(-1, -(-333 // size), (2, heads, 200, 3), device="cuda")
        visible = torch.rand(2, 1, 1, 333, device="cuda") > 0.2
        out = block_sparse_attention(*tensors, lists, size, visible=visible)
        torch.autograd.grad(out, tensors, torch.randn_like(out))


def windows() -> None:
    """Prompts in pieces, single and several tokens, more than the window holds."""
    for dtype in (DTYPE, torch.float8_e4m3fn):
        cache = WindowCache(3, 2, 64, 37, keep_first=1, keep_recent=2, dtype=dtype, device="cuda")
        for length in (50, 1, 1, 5, 90, 1):
            tensors = [draw(3, length, heads, 64).detach() for heads in (8, 2, 2)]
            scores = torch.randn(3, 2, length, device="cuda")
            real = torch.rand(3, length, device="cuda") > 0.3
            cache.step(*tensors, scores, key_mask=real)
        cache.reorder(torch.tensor([2, 0, 0], device="cuda"))


def full_caches() -> None:
    """Sequences and pages, with pages and slots that do not exist."""
    lengths = torch.tensor([70, 3, 127], dtype=torch.int32, device="cuda")
    for queries, page_size in itertools.product((1, 3), (0, 16, 64)):
        query = draw(3, queries, 8, 64).detach()
        shape = (3 * 128 // page_size, page_size, 2, 64) if page_size else (3, 128, 2, 64)
        cache = [draw(*shape).detach() for _ in range(2)]
        table = None
        if page_size:
            pages = shape[0]
            table = torch.randperm(pages, device="cuda").int().view(3, -1)
            table[1, 1:] = 10**9
            table[0, -1] = -1
            new = [draw(5, 2, 64).detach() for _ in range(2)]
            slots = torch.tensor([0, -1, pages * page_size - 1, 7, 10**7], device="cuda")
            append_kvcache(*new, *cache, slots)
        for mask in (None, torch.rand(3, 1, 1, 128, device="cuda") > 0.3):
            bias = torch.randn(1, 8, 1, 128, device="cuda")
            with torch.no_grad():
                flash_sparse_attn_with_kvcache_func(
                    query, *cache, mask, bias, cache_seqlens=lengths, block_table=table
                )


def packed() -> None:
    borders = torch.tensor([0, 0, 33, 34, 300], dtype=torch.int32, device="cuda")
    tensors = draw(300, 4, 64), draw(300, 2, 64), draw(300, 2, 64)
    scores = torch.randn(2, 300, device="cuda", requires_grad=True)
    step(dynamic_mask_attn_varlen_func, *tensors, scores, borders, borders, 266, 266, 40)


def key_scores() -> None:
    """Tokens of one and of several tiles and chunks, widths that are no multiple of anything."""
    for length, size, heads in itertools.product((1, 150, 4500), (1, 100, 257), (1, 3, 8)):
        layer = DynamicMaskAttention(
            size, heads, 16, head_dim=12, bias=size == 100, score_activation="exp"
        ).to("cuda", DTYPE)
        hidden = draw(1, length, size)
        with torch.no_grad():
            for _ in range(2):
                layer.scores(hidden)
        layer.scores(hidden).sum().backward()


def long_selection() -> None:
    """Sequences long enough for every level of the selection and of the plan."""
    scores = torch.randn(1, 1, 600_000, device="cuda")
    query, key = draw(1, 600_000, 1, 16), draw(1, 600_000, 1, 16)
    with torch.no_grad():
        dynamic_mask_attn_func(query, key, key, scores, 64, backend="triton")


PARTS = (
    runs, block_lists, windows, full_caches, masks, selections, biases, packed, key_scores,
    long_selection,
)  # fmt: skip

if __name__ == "__main__":
    for part in PARTS:
        if part.__name__ in (sys.argv[1:] or [part.__name__]):
            part()
            torch.cuda.synchronize()
            print(f"{part.__name__}: done", flush=True)
