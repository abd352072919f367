"""Full caches on the CPU: appending, pages, 8 bits, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_sparse_attn import (
    append_kvcache,
    flash_sparse_attn_func,
    flash_sparse_attn_with_kvcache_func,
)

FP8 = torch.float8_e4m3fn
PAGES, PAGE, HEADS, DIM = 5, 4, 2, 8


def stores(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(PAGES, PAGE, HEADS, DIM).to(dtype) for _ in "kv"]


def tokens(count: int) -> list[Tensor]:
    return [torch.randn(count, HEADS, DIM) for _ in "kv"]


def test_appended_tokens_are_attended_to():
    table = torch.tensor([[4, 0], [2, 3]], dtype=torch.int32)
    caches, new = stores(), tokens(12)
    slots = torch.tensor([16, 17, 18, 19, 0, 1, 2, -1, 8, 9, -1, 10])
    append_kvcache(*new, *caches, slots)
    lengths = torch.tensor([7, 3], dtype=torch.int32)
    query = torch.randn(2, 1, 4, DIM)
    out = flash_sparse_attn_with_kvcache_func(
        query, *caches, cache_seqlens=lengths, block_table=table
    )
    for row, own in enumerate(([0, 1, 2, 3, 4, 5, 6], [8, 9, 11])):
        keys, values = (t[own][None] for t in new)
        expected = flash_sparse_attn_func(query[row : row + 1], keys, values)
        torch.testing.assert_close(out[row : row + 1], expected)
    assert not any(cache[1].any() for cache in caches)


@pytest.mark.parametrize("per_key", [False, True])
def test_eight_bits(per_key):
    """Attention is that over the stored values times their scales, which are near the new ones."""
    caches, new = stores(FP8), tokens(PAGES * PAGE)
    shape = (PAGES, PAGE, HEADS) if per_key else (HEADS,)
    scales = [torch.full(shape, 0.0 if per_key else 0.01) for _ in "kv"]
    names = dict(zip(("k_scale", "v_scale"), scales, strict=True))
    append_kvcache(*new, *caches, torch.arange(PAGES * PAGE), **names)
    plain = []
    for cache, scale, tensor in zip(caches, scales, new, strict=True):
        stored = (cache.float() * scale.expand(cache.shape[:3])[..., None]).flatten(0, 1)
        assert ((stored - tensor).norm() / tensor.norm()) < 0.04
        assert not per_key or (scale > 0).all()
        plain.append(stored[None])
    query = torch.randn(1, 2, 4, DIM)
    out = flash_sparse_attn_with_kvcache_func(
        query,
        *caches,
        cache_seqlens=torch.tensor([PAGES * PAGE], dtype=torch.int32),
        block_table=torch.arange(PAGES, dtype=torch.int32)[None],
        is_causal=True,
        **names,
    )
    torch.testing.assert_close(out, flash_sparse_attn_func(query, *plain, is_causal=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"slot_mapping": torch.tensor([0, 20])}, ValueError, "slot_mapping: expected slots from"),
        ({"slot_mapping": torch.tensor([0, -2])}, ValueError, r"slot_mapping: .* got \[-2\]"),
        ({"slot_mapping": torch.tensor([0])}, ValueError, r"slot_mapping: expected \[T\] = \(2,\)"),
        ({"slot_mapping": torch.zeros(2)}, TypeError, "slot_mapping: expected int32 or int64"),
        ({"value": torch.zeros(2, HEADS, DIM + 1)}, ValueError, "value: expected"),
        ({"key": torch.zeros(2, HEADS + 1, DIM)}, ValueError, "key: expected"),
        ({"k_cache": torch.zeros(PAGES, PAGE, HEADS, DIM).half()}, TypeError, "k_cache: expected"),
        ({"v_cache": torch.zeros(PAGES, PAGE, HEADS, DIM).to(FP8)}, TypeError, "v_cache: expected"),
        ({"k_scale": torch.ones(HEADS)}, ValueError, "k_scale: expected a scale with caches of"),
        (
            {"k_cache": torch.zeros(PAGES, PAGE, DIM, HEADS).transpose(2, 3)},
            ValueError,
            "k_cache: expected a contiguous last dimension",
        ),
    ],
)
def test_bad_appends_change_nothing(changes, error, message):
    key, value = tokens(2)
    k_cache, v_cache = stores()
    good = {"key": key, "value": value, "k_cache": k_cache, "v_cache": v_cache}
    good["slot_mapping"] = torch.tensor([3, 4], dtype=torch.int32)
    with pytest.raises(error, match=message):
        append_kvcache(**{**good, **changes})
    assert not k_cache.any() and not v_cache.any()


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ((None, torch.ones(HEADS)), "k_scale: expected a scale with caches of"),
        ((torch.ones(HEADS + 1), torch.ones(HEADS)), r"k_scale: expected \[Hkv\] = \(2,\) or"),
        ((torch.ones(HEADS), torch.ones(HEADS).double()), "v_scale: expected torch.float32"),
    ],
)
def test_bad_scales(scales, message):
    with pytest.raises((TypeError, ValueError), match=message):
        flash_sparse_attn_with_kvcache_func(
            torch.randn(PAGES, 1, 2, DIM),
            *stores(FP8),
            cache_seqlens=torch.ones(PAGES, dtype=torch.int32),
            k_scale=scales[0],
            v_scale=scales[1],
        )
