"""Attention at full size: offsets past 2**31, and the peak of memory."""

from __future__ import annotations

import math

import pytest
import torch
from compare import assert_fair

from flash_sparse_attn import dynamic_mask_attn_func, select_keys
from flash_sparse_attn.reference import attention_reference

pytestmark = pytest.mark.gpu

GIB = 1 << 30


def need(num_bytes: int) -> None:
    if torch.cuda.get_device_properties(0).total_memory < num_bytes:
        pytest.skip(f"needs {num_bytes / GIB:.0f} GiB of memory")


@pytest.mark.parametrize("dim", [64, 128])
def test_offsets_beyond_int32(dim):
    """The last rows of tensors of more than 2**31 elements, and the gradients of the last keys."""
    need(100 * GIB)
    heads, kv_heads, window, last = 16, 2, 64, 300
    length = 2**31 // (heads * dim) + 1000
    torch.manual_seed(0)
    query = torch.randn(1, length, heads, dim, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(1, length, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    value = torch.randn_like(key)
    scores = torch.randn(1, kv_heads, length, device="cuda")
    grad = torch.zeros_like(query)
    grad[:, -last:].normal_()
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, scores)]
    assert query.numel() > 2**31
    out = dynamic_mask_attn_func(*leaves, window, backend="triton")
    grads = torch.autograd.grad(out, leaves, grad)

    # The last queries see few keys: these make a problem that the reference can take.
    expiry = select_keys(scores, window).expiry
    kept = (expiry > length - last).any(0).any(0).nonzero()[:, 0]
    start = torch.maximum(kept, torch.tensor(0, device="cuda"))
    at = torch.arange(length - last, length, device="cuda")[:, None]
    mask = (start <= at) & (at < expiry[:, :, None, kept])

    def truth(dtype):
        parts = [query[:, -last:], key[:, kept], value[:, kept], scores[:, :, None, kept]]
        parts = [part.detach().to(dtype).requires_grad_() for part in parts]
        result, _, _ = attention_reference(*parts[:3], mask, parts[3], is_causal=False)
        return [result, *torch.autograd.grad(result, parts, grad[:, -last:].to(dtype))]

    pieces = [out[:, -last:], grads[0][:, -last:], grads[1][:, kept], grads[2][:, kept]]
    for name, got, exact, plain in zip(
        ("out", "dq", "dk", "dv"), pieces, truth(torch.float64), truth(torch.bfloat16), strict=False
    ):
        assert_fair(got, exact, plain, name)
    exact, plain = (truth(dtype)[4][:, :, 0] for dtype in (torch.float64, torch.bfloat16))
    assert_fair(grads[3][..., kept], exact, plain.float(), "dscores")
    # Nothing else has a gradient: the others see no upstream one.
    others = torch.ones(length, dtype=torch.bool, device="cuda")
    others[kept] = False
    for grad_of_keys in (grads[1][0, others], grads[2][0, others], grads[3][0][:, others]):
        assert not grad_of_keys.any()
    assert not grads[0][:, :-last].any()


def test_peak_memory_of_a_long_text():
    """A step of 262144 tokens stays within 1.25 times its own tensors."""
    need(40 * GIB)
    length, heads, kv_heads, dim, window = 262144, 32, 8, 128, 2048
    query = torch.randn(1, length, heads, dim, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(1, length, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    value = torch.randn_like(key)
    scores = torch.randn(1, kv_heads, length, device="cuda")
    grad = torch.randn_like(query)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, scores)]
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated() - sum(t.nbytes for t in (*leaves, grad))
    torch.cuda.reset_peak_memory_stats()
    out = dynamic_mask_attn_func(*leaves, window, backend="triton")
    torch.autograd.grad(out, leaves, grad)
    peak = torch.cuda.max_memory_allocated() - base
    lse = 4 * math.prod(query.shape[:3])
    own = 4 * query.nbytes + 4 * key.nbytes + 2 * scores.nbytes + lse
    print(f"peak {peak / GIB:.2f} GiB, {peak / own:.3f} of the call's own tensors")
    assert peak <= 1.25 * own
