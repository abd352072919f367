"""The acceptance tests that compatibility with the predecessors asks for, by their numbers.

Elsewhere: 6 in test_errors; 14, 17, 18 and 22 in test_attention; 23 in test_selection; 24 in
test_attention and test_selection; 26 in test_masks_utils; the caches of 27 in test_window_cache.
12 and the sanitizer part of 2 concern compiled kernels, 29 the Transformers integration.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracles import check_attention, outputs_and_gradients

from flash_sparse_attn import (
    dynamic_mask_attn_func,
    flash_sparse_attn_func,
    flash_sparse_attn_func_auto,
    get_available_backends,
    select_keys,
)
from flash_sparse_attn.reference import attention_reference
from flash_sparse_attn.utils.mask import create_mask

INF = float("inf")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def qkv(batch, query_len, key_len, heads, kv_heads, dim, dtype=torch.float32):
    return (
        rand(batch, query_len, heads, dim, dtype=dtype),
        rand(batch, key_len, kv_heads, dim, dtype=dtype),
        rand(batch, key_len, kv_heads, dim, dtype=dtype),
    )


def check(query, key, value, mask=None, bias=None, **options):
    """`flash_sparse_attn_func` with these arguments against the reference."""

    def attend(query, key, value, bias=None):
        return flash_sparse_attn_func(query, key, value, mask, bias, **options)

    return check_attention(attend, query, key, value, mask, bias, **options)


# 1, 13, 16: every broadcast pattern, forward and all gradients, random upstream gradient


def patterns(batch, heads, kv_heads, query_len, key_len):
    return list(itertools.product((1, batch), (1, kv_heads, heads), (1, query_len), (1, key_len)))


def check_patterns(sizes, pairs):
    batch, heads, kv_heads, query_len, key_len, dim = sizes
    inputs = qkv(batch, query_len, key_len, heads, kv_heads, dim)
    for number, (mask_shape, bias_shape) in enumerate(pairs):
        mask, bias = torch.rand(mask_shape) < 0.7, rand(*bias_shape)
        results = check(*inputs, mask, bias, is_causal=number % 2 == 1)
        assert results["dbias"].shape == bias_shape


@pytest.mark.parametrize("number", range(24))
def test_01_every_pair_of_broadcast_patterns(number):
    sizes = (2, 6, 2, 5, 7, 4)
    shapes = patterns(*sizes[:-1])
    check_patterns(sizes, [(shapes[number], bias_shape) for bias_shape in shapes])


def test_01_broadcast_patterns_over_several_tiles():
    sizes = (2, 6, 2, 65, 129, 8)
    shapes = patterns(*sizes[:-1])
    check_patterns(sizes, [(shapes[i], shapes[(7 * i + 5) % 24]) for i in range(24)])


@pytest.mark.heavy
def test_01_every_pair_of_broadcast_patterns_over_several_tiles():
    sizes = (2, 6, 2, 65, 129, 8)
    check_patterns(sizes, itertools.product(patterns(*sizes[:-1]), repeat=2))


# 2, 3, 4: sizes


LENGTHS = (1, 2, 7, 63, 64, 65, 127, 128, 129, 255)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("query_len", LENGTHS)
def test_02_lengths_around_every_tile_border(query_len, is_causal):
    for key_len in LENGTHS:
        inputs = qkv(1, query_len, key_len, 2, 1, 4)
        mask = torch.rand(1, 1, query_len, key_len) < 0.5
        check(*inputs, mask, rand(1, 1, 1, key_len), is_causal=is_causal)


@pytest.mark.parametrize(
    ("query_len", "key_len"),
    [
        (1, 1023),
        (1, 4095),
        (2, 4095),
        (1023, 1),
        (4095, 2),
        (1023, 129),
        (64, 4095),
        pytest.param(4095, 4095, marks=pytest.mark.heavy),
    ],
)
def test_02_long_lengths(query_len, key_len):
    inputs = qkv(1, query_len, key_len, 1, 1, 4)
    mask = torch.rand(1, 1, query_len, key_len) < 0.5
    check(*inputs, mask, rand(1, 1, 1, key_len), is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 8, 20, 32, 60, 64, 80, 96, 128, 160, 192, 256])
def test_03_head_dimensions_and_dtypes(dim, dtype):
    inputs = qkv(1, 9, 33, 2, 1, dim, dtype)
    bias = rand(1, 1, 1, 33, dtype=dtype)
    check(*inputs, torch.rand(1, 1, 9, 33) < 0.7, bias, is_causal=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (8, 1), (32, 8)])
def test_04_grouped_heads(heads, kv_heads):
    inputs = qkv(2, 10, 12, heads, kv_heads, 4)
    for mask_heads, bias_heads in itertools.product({1, kv_heads, heads}, repeat=2):
        mask = torch.rand(2, mask_heads, 10, 12) < 0.7
        check(*inputs, mask, rand(2, bias_heads, 1, 12))


# 5, 7: strides


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_05_strided_inputs(dtype):
    """Views of [B, H, S, D], a slice of a wider tensor, and expanded masks and biases."""
    query = rand(2, 4, 70, 8, dtype=dtype).transpose(1, 2)
    key = rand(2, 2, 70, 8, dtype=dtype).transpose(1, 2)
    value = rand(2, 70, 2, 20, dtype=dtype)[..., 3:11]
    mask = (torch.rand(1, 1, 1, 70) < 0.6).expand(2, 4, 70, 70)
    bias = rand(1, 1, 70, 1, dtype=dtype).expand(2, 2, 70, 70)
    flipped = rand(2, 2, 70, 70, dtype=dtype).transpose(2, 3)
    for options in ({}, {"is_causal": True}):
        views = flash_sparse_attn_func(query, key, value, mask, bias + flipped, **options)
        copies = flash_sparse_attn_func(
            *(t.contiguous() for t in (query, key, value, mask, bias + flipped)), **options
        )
        assert torch.equal(views, copies)
    inputs = {"query": query, "key": key, "value": value, "bias": flipped}
    grad_out = rand(2, 70, 4, 8)

    def gradients(tensors):
        # Leaves that are views, as they come from a projection.
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        out = flash_sparse_attn_func(*leaves[:3], mask, leaves[3])
        return torch.autograd.grad(out, leaves, grad_out.to(dtype))

    contiguous = {name: tensor.contiguous() for name, tensor in inputs.items()}
    for a, b in zip(gradients(inputs), gradients(contiguous), strict=True):
        assert torch.equal(a, b)


def test_07_masks_of_more_than_two_to_the_31_elements():
    """An expanded mask and bias of 33000 x 33000 x 2, of which 8 keys are visible."""
    length, seen = 33000, torch.tensor([0, 5, 77, 4000, 16384, 20000, 32766, 32999])
    query, key, value = qkv(1, length, length, 2, 1, 4)
    per_key = torch.zeros(1, 1, 1, length, dtype=torch.bool)
    per_key[..., seen] = True
    bias = rand(1, 1, 1, length)
    out = flash_sparse_attn_func(
        query,
        key,
        value,
        per_key.expand(1, 2, length, length),
        bias.expand(1, 2, length, length),
    )
    expected = attention_reference(
        query.double(),
        key[:, seen].double(),
        value[:, seen].double(),
        None,
        bias[..., seen].double(),
    )[0]
    assert (out - expected).abs().max() < 1e-5


@pytest.mark.heavy
def test_07_a_stored_mask_of_more_than_two_to_the_31_elements():
    length = 33000
    query, key, value = qkv(1, length, length, 2, 1, 4)
    mask = torch.zeros(1, 2, length, length, dtype=torch.bool)
    mask[0, 1, -1, -3:] = mask[0, 0, 17, 5] = True
    out = flash_sparse_attn_func(query, key, value, mask)
    assert out.abs().sum(-1).nonzero().tolist() == [[0, 17, 0], [0, length - 1, 1]]
    torch.testing.assert_close(out[0, 17, 0], value[0, 5, 0])


# 8, 9: causality and empty rows


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize(
    ("query_len", "key_len"), [(2, 5), (5, 2), (1, 9), (128, 300), (300, 128), (7, 7)]
)
def test_08_causal_is_bottom_right(query_len, key_len, selected):
    query, key, value = qkv(2, query_len, key_len, 2, 1, 4)
    mask = select_keys(rand(2, 1, key_len), key_len) if selected else None
    allowed = torch.ones(query_len, key_len, dtype=torch.bool).tril(key_len - query_len)
    *_, probs = flash_sparse_attn_func(
        query, key, value, mask, is_causal=True, return_attn_probs=True
    )
    assert torch.equal(probs > 0, allowed.expand_as(probs))

    def attend(query, key, value):
        return flash_sparse_attn_func(query, key, value, mask, is_causal=True)

    results = check_attention(attend, query, key, value, allowed[None, None])
    empty = ~allowed.any(-1)
    assert (results["out"][:, empty] == 0).all()
    assert (results["dquery"][:, empty] == 0).all()


HIDDEN_PARTS = {
    "a row": (slice(None), slice(None), 70),
    "a head": (slice(None), 1),
    "a batch entry": (1,),
    "a tile of rows": (slice(None), slice(None), slice(64, 128)),
    "a column": (slice(None), slice(None), slice(None), 3),
    "the first columns": (slice(None), slice(None), slice(None), slice(0, 64)),
    "a block, then an active one": (slice(None), slice(None), slice(64, 128), slice(0, 128)),
    "everything": (),
}


@pytest.mark.parametrize("how", ["mask", "bias -inf"])
@pytest.mark.parametrize("part", HIDDEN_PARTS)
def test_09_hidden_parts_give_zeros_and_no_nan(part, how):
    query, key, value = qkv(2, 140, 150, 2, 2, 4)
    visible = torch.rand(2, 2, 140, 150) < 0.9
    visible[HIDDEN_PARTS[part]] = False
    bias = rand(2, 2, 140, 150)
    mask = visible
    if how == "bias -inf":
        bias, mask = bias.masked_fill(~visible, -INF), None
    results = check(query, key, value, mask, bias)
    empty = ~visible.any(-1)
    assert (results["out"].transpose(1, 2)[empty] == 0).all()
    assert (results["dquery"].transpose(1, 2)[empty] == 0).all()
    assert (results["dbias"][~visible] == 0).all()
    unseen = ~visible.any(2)
    for name in ("dkey", "dvalue"):
        assert (results[name].transpose(1, 2)[unseen] == 0).all()
    out, lse = flash_sparse_attn_func(query, key, value, mask, bias, return_lse=True)
    assert torch.equal(lse == -INF, empty)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_09_the_finite_minimum_is_an_ordinary_bias(dtype):
    """A row that holds nothing else averages: it is neither empty nor NaN."""
    query, key, value = qkv(1, 3, 5, 1, 1, 4, dtype)
    bias = torch.full((1, 1, 1, 5), torch.finfo(torch.float32).min).to(torch.float32)
    out, lse = flash_sparse_attn_func(0 * query, key, value, None, bias, return_lse=True)
    torch.testing.assert_close(out, value.float().mean(1, keepdim=True).to(dtype).expand_as(out))
    assert torch.isfinite(lse).all()
    lower = bias.clone()
    lower[..., 2] = 0.0
    out = flash_sparse_attn_func(query, key, value, None, lower)
    torch.testing.assert_close(out, value[:, 2:3].expand_as(out))


def test_09_no_keys_no_queries_no_batch():
    for sizes in ((2, 3, 0), (2, 0, 3), (0, 3, 3), (2, 0, 0)):
        batch, query_len, key_len = sizes
        inputs = [t.requires_grad_() for t in qkv(batch, query_len, key_len, 4, 2, 8)]
        bias = rand(batch, 2, 1, key_len).requires_grad_()
        for mask in (
            None,
            torch.ones(1, 1, query_len, 1, dtype=torch.bool),
            select_keys(rand(batch, 2, key_len), 3),
        ):
            out, lse = flash_sparse_attn_func(*inputs, mask, bias, is_causal=True, return_lse=True)
            assert out.shape == (batch, query_len, 4, 8) and (out == 0).all()
            assert lse.shape == (batch, 4, query_len) and (lse == -INF).all()
            for tensor, grad in zip(
                [*inputs, bias], torch.autograd.grad(out.sum(), [*inputs, bias]), strict=True
            ):
                assert grad.shape == tensor.shape and (grad == 0).all()


# 10, 11: mask and bias


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_10_neither_one_of_both_or_both(dtype, is_causal):
    inputs = qkv(2, 30, 40, 4, 2, 8, dtype)
    mask, bias = torch.rand(2, 2, 30, 40) < 0.5, rand(2, 2, 30, 40, dtype=dtype)
    for given_mask, given_bias in itertools.product((None, mask), (None, bias)):
        check(*inputs, given_mask, given_bias, is_causal=is_causal)
    both = flash_sparse_attn_func(*inputs, mask, bias, is_causal=is_causal)
    filled = flash_sparse_attn_func(
        *inputs, None, bias.masked_fill(~mask, -INF), is_causal=is_causal
    )
    # The masked call may leave columns out, and so add in another order.
    torch.testing.assert_close(both, filled)


@pytest.mark.parametrize(
    ("length", "window_size"), [(300, 150), pytest.param(4096, 2048, marks=pytest.mark.heavy)]
)
def test_10_a_bias_that_repeats_the_mask_changes_nothing(length, window_size):
    """finfo.min in the bias where the mask already hides: same output, finite gradients."""
    dtype = torch.bfloat16
    lowest = torch.finfo(dtype).min
    query, key, value = qkv(1, length, length, 2, 1, 64, dtype)
    bias = rand(1, 1, length, length, dtype=dtype)
    mask = create_mask(bias, None, 1, length, length, window_size, lowest)
    grad_out = rand(*query.shape)

    def attend(query, key, value, bias):
        return flash_sparse_attn_func(query, key, value, mask, bias, is_causal=True)

    inputs = {"query": query, "key": key, "value": value}
    clean = outputs_and_gradients(attend, inputs | {"bias": bias}, grad_out)
    repeated = outputs_and_gradients(
        attend, inputs | {"bias": bias.masked_fill(~mask, lowest)}, grad_out
    )
    for name, result in clean.items():
        assert torch.isfinite(result).all()
        assert torch.equal(result, repeated[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_11_large_biases_and_scales(dtype):
    inputs = qkv(1, 20, 30, 2, 1, 8, dtype)
    for size in (1e4, -1e4):
        bias = (rand(1, 1, 20, 30) * 3).round() + size
        results = check(*inputs, None, bias.to(dtype), is_causal=True)
        assert all(torch.isfinite(result).all() for result in results.values())
    check(*inputs, softmax_scale=30.0)


def test_11_value_gradients_of_a_small_causal_call_are_finite():
    results = check(*qkv(1, 256, 256, 1, 1, 64, torch.bfloat16), is_causal=True)
    assert torch.isfinite(results["dvalue"]).all()


# 13, 15: gradients of the bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("selected", [False, True])
def test_13_a_shared_bias_is_summed_in_fp32_and_rounded_once(dtype, selected):
    """8 x 4 x 512 terms in each element; 16-bit partial sums would be off by many units."""
    query, key, value = qkv(8, 512, 64, 4, 4, 8)
    bias = rand(1, 1, 1, 64).to(dtype)
    mask = select_keys(rand(8, 4, 64), 20, mode="shared") if selected else None
    is_causal = False if selected else None

    def attend(query, key, value, bias):
        return flash_sparse_attn_func(query, key, value, mask, bias, is_causal=is_causal)

    inputs = {"query": query, "key": key, "value": value, "bias": bias}
    grad_out = rand(*query.shape) + 0.3 * value.mean()
    grad = outputs_and_gradients(attend, inputs, grad_out)["dbias"]
    dense = None if mask is None else mask.to_dense(512, is_causal=False)

    def reference(query, key, value, bias):
        return attention_reference(query, key, value, dense, bias)[0]

    exact = {name: tensor.double() for name, tensor in inputs.items()}
    truth = outputs_and_gradients(reference, exact, grad_out)["dbias"]
    assert grad.dtype == dtype
    unit = torch.finfo(dtype).eps * truth.abs() + 1e-4
    assert ((grad.double() - truth).abs() <= unit).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_15_a_bias_that_is_equal_for_all_keys_has_no_gradient(dtype):
    inputs = qkv(2, 70, 90, 4, 2, 8, dtype)
    mask = torch.rand(2, 2, 70, 90) < 0.6
    mask[:, :, 5] = False
    bias = rand(2, 4, 70, 1, dtype=dtype)
    grad = check(*inputs, mask, bias)["dbias"]
    assert grad.abs().max() <= 16 * torch.finfo(dtype).eps
    assert (grad[:, :, 5] == 0).all()


# 19, 20, 21: options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 5.0, 30.0])
def test_19_softcap(softcap, dtype):
    inputs = qkv(2, 20, 30, 4, 2, 16, dtype)
    mask, bias = torch.rand(1, 2, 1, 30) < 0.8, rand(1, 2, 1, 30, dtype=dtype)
    check(*inputs, mask, bias, softcap=softcap, softmax_scale=1.5, is_causal=True)
    check(*inputs, None, None, softcap=softcap)


def test_19_no_softcap_is_none_or_zero():
    inputs = qkv(1, 5, 6, 2, 1, 4)
    plain = flash_sparse_attn_func(*inputs)
    assert torch.equal(plain, flash_sparse_attn_func(*inputs, softcap=0.0))
    assert not torch.equal(plain, flash_sparse_attn_func(*inputs, softcap=0.5))


@pytest.mark.parametrize("dim", [32, 96, 192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_20_the_scale_is_not_rounded_into_queries_or_keys(dim, dtype):
    """Rows with one dominant pair of scores show an error of 2^-9 in either input at once."""
    query, key, value = qkv(1, 40, 50, 2, 1, dim, dtype)
    truth = attention_reference(query.double(), key.double(), value.double(), softmax_scale=0.3)[0]
    out = flash_sparse_attn_func(query, key, value, softmax_scale=0.3)
    assert ((out.double() - truth).abs() <= torch.finfo(dtype).eps / 2 * truth.abs() + 1e-5).all()
    rounded = (query * 0.3).to(dtype).double()
    wrong = attention_reference(rounded, key.double(), value.double(), softmax_scale=1.0)[0]
    assert not ((wrong - truth).abs() <= torch.finfo(dtype).eps / 2 * truth.abs() + 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_21_lse_and_probabilities(dtype):
    query, key, value = qkv(2, 20, 30, 4, 2, 8, dtype)
    mask, bias = torch.rand(2, 2, 20, 30) < 0.5, rand(2, 1, 1, 30)
    mask[:, :, 3] = False
    options = {"is_causal": True, "softmax_scale": 0.4, "softcap": 3.0}
    out, lse, probs = flash_sparse_attn_func(
        query, key, value, mask, bias, **options, return_attn_probs=True
    )
    _, true_lse, true_probs = attention_reference(
        query.double(), key.double(), value.double(), mask, bias.double(), **options
    )
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lse.shape == (2, 4, 20) and not lse.requires_grad
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probs.double(), true_probs, rtol=1e-4, atol=1e-5)
    assert (probs[true_probs == 0] == 0).all()
    sums = probs.sum(-1)
    empty = lse == -INF
    assert empty[:, :, 3].all()
    torch.testing.assert_close(sums[~empty], torch.ones_like(sums[~empty]), rtol=1e-5, atol=1e-5)
    assert (sums[empty] == 0).all()
    again, lse_again = flash_sparse_attn_func(
        query, key, value, mask, bias, **options, return_lse=True
    )
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


# 25, 27: windows and decoding


@pytest.mark.parametrize("mode", ["causal", "shared"])
def test_25_windows_up_to_and_beyond_the_key_length(mode):
    query, key, value = qkv(2, 90, 90, 4, 2, 8, torch.float64)
    scores = rand(2, 2, 90, dtype=torch.float64)
    bias = scores[:, :, None]
    for window_size in (1, 89, 90, 91, 1000):
        dense = select_keys(scores, window_size, mode=mode).to_dense(is_causal=True)

        def attend(query, key, value, bias, window_size=window_size):
            return dynamic_mask_attn_func(
                query, key, value, bias[:, :, 0], window_size, mode=mode, is_causal=True
            )

        check_attention(attend, query, key, value, dense, bias)
        if window_size >= 90:
            assert torch.equal(dense, torch.ones(90, 90, dtype=torch.bool).tril().expand_as(dense))


def test_27_one_more_token_extends_the_prefill():
    """Prefill of n + 1 equals prefill of n and one step; the W survivors suffice for the step."""
    length, window_size = 60, 7
    query, key, value = qkv(2, length, length, 4, 2, 8)
    scores = rand(2, 2, length)
    whole = dynamic_mask_attn_func(query, key, value, scores, window_size)
    for n in (0, 1, window_size, 40, length - 1):
        step = dynamic_mask_attn_func(
            query[:, n : n + 1],
            key[:, : n + 1],
            value[:, : n + 1],
            scores[..., : n + 1],
            window_size,
        )
        torch.testing.assert_close(step, whole[:, n : n + 1], rtol=1e-5, atol=1e-6)
        selection = select_keys(scores[..., : n + 1], window_size)
        alive = selection.to_dense(1)[:, :, 0]
        kept = alive.int().argsort(dim=-1, descending=True)[..., :window_size]
        kept = kept[..., : min(window_size, n + 1)]
        index = kept.transpose(1, 2)[..., None].expand(-1, -1, -1, 8)
        small = flash_sparse_attn_func(
            query[:, n : n + 1],
            key.gather(1, index),
            value.gather(1, index),
            None,
            scores.gather(2, kept)[:, :, None],
        )
        torch.testing.assert_close(small, step, rtol=1e-5, atol=1e-6)


# 28: backends


KERNELS = {"cuda", "triton"}


def test_28_the_auto_function_and_named_backends():
    inputs = qkv(1, 8, 8, 2, 1, 4)
    mask, bias = torch.rand(1, 1, 8, 8) < 0.5, rand(1, 1, 1, 8)
    expected = flash_sparse_attn_func(*inputs, mask, bias, 0.3, True)
    assert "eager" in get_available_backends()
    for name in (None, *get_available_backends()):
        function = flash_sparse_attn_func_auto(name)
        device, dtype = ("cuda", torch.float16) if name in KERNELS else ("cpu", torch.float32)
        result = function(
            *(t.to(device, dtype) for t in inputs), mask.to(device), bias.to(device), 0.3, True
        )
        torch.testing.assert_close(result.float().cpu(), expected, rtol=1e-2, atol=1e-2)
    for name in KERNELS - set(get_available_backends()):
        with pytest.raises(RuntimeError, match=name):
            flash_sparse_attn_func_auto(name)
        with pytest.raises(RuntimeError, match=name):
            flash_sparse_attn_func(*inputs, backend=name)
    with pytest.raises(ValueError, match=r"backend.*cuda.*eager.*metal"):
        flash_sparse_attn_func_auto("metal")


# 30: the predecessors' own grids, every element within their tolerance


GRID_LENGTHS = (
    128,
    256,
    512,
    *(pytest.param(n, marks=pytest.mark.heavy) for n in (1024, 2048, 4096)),
)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("length", GRID_LENGTHS)
def test_30_the_equivalence_grid(length, dim, is_causal):
    dtype = torch.bfloat16
    query, key, value = qkv(1, length, length, 2, 1, dim, dtype)
    bias = rand(1, 1, 1, length, dtype=dtype)
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    window_size = min(1024, length // 2)
    mask = create_mask(bias, causal, 1, length, length, window_size, torch.finfo(dtype).min)
    out = check(query, key, value, mask, bias, is_causal=is_causal)["out"]
    exact = (tensor.double() for tensor in (query, key, value))
    truth = attention_reference(*exact, mask, bias.double(), is_causal=is_causal)[0]
    torch.testing.assert_close(out.double(), truth, rtol=1e-2, atol=1e-2)


def test_30_gradients_of_the_score_projection():
    """fp32 on the CPU: exp(A softplus(dt_proj(v))) as score, per-query selection, W = 32 of 64."""
    length, dim, window_size = 64, 64, 32
    inputs = [t.requires_grad_() for t in qkv(1, length, length, 1, 1, dim)]
    weight = (rand(1, dim) / math.sqrt(dim)).requires_grad_()
    amplitude = rand(1).requires_grad_()
    leaves = [*inputs, weight, amplitude]
    grad_out = rand(1, length, 1, dim)

    def score(value):
        projected = torch.nn.functional.linear(value.flatten(2), weight)
        return torch.exp(amplitude * torch.nn.functional.softplus(projected)).transpose(1, 2)

    out = dynamic_mask_attn_func(*inputs, score(inputs[2]), window_size)
    result = [out, *torch.autograd.grad(out, leaves, grad_out)]

    rows = []
    for i in range(length):
        query, key, value = inputs[0][0, i, 0], inputs[1][0, : i + 1, 0], inputs[2][0, : i + 1, 0]
        bias = score(inputs[2])[0, 0, : i + 1]
        kept = bias.topk(min(window_size, i + 1)).indices
        logits = key[kept] @ query / math.sqrt(dim) + bias[kept]
        rows.append(logits.softmax(0) @ value[kept])
    expected = torch.stack(rows).view(1, length, 1, dim)
    expected = [expected, *torch.autograd.grad(expected, leaves, grad_out)]
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
