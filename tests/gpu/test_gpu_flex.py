"""The compiled FlexAttention backend on a GPU: the reference's results, forward and gradients.

Every form of a call costs seconds of compilation, so there are few, each with much in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from compare import assert_fair
from oracles import check_attention
from torch import Tensor

from flash_sparse_attn import (
    flash_sparse_attn_func,
    flash_sparse_attn_varlen_func,
    select_keys,
)
from flash_sparse_attn.backends import flex
from flash_sparse_attn.reference import attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(flex.unavailable()), reason="; ".join(flex.unavailable())),
    # PyTorch's compiler has warnings of its own.
    pytest.mark.filterwarnings("ignore"),
]

BF16, FP16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One call: sizes, and the shapes of mask and bias (``None`` for none)."""

    sizes: tuple[int, int, int, int, int, int]  # B, Q, K, H, Hkv, D
    mask: tuple[int, ...] | str | None = None
    bias: tuple[int, ...] | None = None
    bias_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = BF16
    is_causal: bool | None = True
    softcap: float | None = None


CASES = {
    "pair mask and pair bias, group of 3, D 80": Case(
        (2, 200, 333, 6, 2, 80), (2, 2, 200, 333), (1, 6, 200, 333), BF16
    ),
    "selection and key bias": Case((2, 300, 300, 4, 2, 64), "causal", (2, 2, 1, 300)),
    "key mask of heads, bias per row, softcap": Case(
        (1, 257, 130, 4, 4, 32), (1, 4, 1, 130), (1, 1, 257, 1), softcap=5.0, is_causal=False
    ),
    "one query": Case((2, 1, 700, 8, 2, 64), (2, 1, 1, 700), (1, 2, 1, 700), FP16, FP16),
    "neither, causal": Case((1, 384, 384, 2, 1, 128)),
}


@pytest.mark.parametrize("name", CASES)
def test_like_the_reference(name):
    case = CASES[name]
    batch, query_len, key_len, heads, kv_heads, dim = case.sizes

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    query = draw(batch, query_len, heads, dim)
    key, value = draw(batch, key_len, kv_heads, dim), draw(batch, key_len, kv_heads, dim)
    bias = None if case.bias is None else draw(*case.bias, dtype=case.bias_dtype)
    mask = dense = None
    if case.mask == "causal":
        mask = select_keys(bias[:, :, 0], 40)
        dense = mask.to_dense(query_len)
    elif case.mask is not None:
        mask = dense = torch.rand(case.mask, device="cuda") < 0.6
        dense[..., 7:20] = False
        if case.mask[2] > 1:
            dense[:, :, 100:140] = False  # rows without a key
            dense[:, :, :, 200:] |= torch.arange(query_len, device="cuda")[:, None] > 150

    def attend(query, key, value, bias=None):
        return flash_sparse_attn_func(
            query,
            key,
            value,
            mask,
            bias,
            is_causal=case.is_causal,
            softcap=case.softcap,
            return_lse=True,
            backend="flex",
        )

    options = {"is_causal": bool(case.is_causal), "softcap": case.softcap}
    check_attention(lambda **x: attend(**x)[0], query, key, value, dense, bias, **options)

    # Without gradients PyTorch takes another template for short queries.
    leaves = [None if x is None else x.requires_grad_() for x in (query, key, value, bias)]
    with torch.set_grad_enabled(query_len > 1):
        out, lse = (result.detach() for result in attend(*leaves))
    inputs = [None if x is None else x.detach() for x in (*leaves[:3], dense, leaves[3])]
    exact = (None if x is None else x if x.dtype == torch.bool else x.double() for x in inputs)
    truth = attention_reference(*exact, **options)
    plain = attention_reference(*inputs, **options)
    assert_fair(out, truth[0], plain[0].to(out.dtype), "out")
    assert_fair(lse, truth[1], plain[1].float(), "lse")


def test_packed_sequences_like_the_eager_backend():
    lengths = [0, 5, 300, 1, 140]
    borders = torch.tensor([0, 0, 5, 305, 306, 446], dtype=torch.int32, device="cuda")
    total = sum(lengths)
    query, key, value = (
        torch.randn(total, h, 64, device="cuda", dtype=BF16, requires_grad=True) for h in (4, 2, 2)
    )
    bias = torch.randn(2, total, device="cuda", requires_grad=True)
    selection = select_keys(bias, 30, cu_seqlens=borders)
    leaves = (query, key, value, bias)
    grad_out = torch.randn(total, 4, 64, device="cuda", dtype=BF16)

    def run(backend: str) -> list[Tensor]:
        out = flash_sparse_attn_varlen_func(
            *leaves[:3],
            borders,
            borders,
            300,
            300,
            attn_mask=selection,
            attn_bias=bias,
            backend=backend,
        )
        return [out, *torch.autograd.grad(out, leaves, grad_out)]

    for found, expected in zip(run("flex"), run("eager"), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_repeatable_without_a_bias_gradient():
    query, key, value = (
        torch.randn(1, 384, heads, 128, device="cuda", dtype=BF16, requires_grad=True)
        for heads in (2, 1, 1)
    )
    grad_out = torch.randn_like(query)

    def run() -> list[Tensor]:
        out = flash_sparse_attn_func(
            query, key, value, is_causal=True, deterministic=True, backend="flex"
        )
        return [out, *torch.autograd.grad(out, (query, key, value), grad_out)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    bias = torch.zeros(1, 1, 1, 384, device="cuda", requires_grad=True)
    with pytest.raises(RuntimeError, match="atomic additions"):
        flash_sparse_attn_func(query, key, value, None, bias, deterministic=True, backend="flex")
