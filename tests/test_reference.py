"""The eager reference, which is the specification, against cases worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flash_sparse_attn.reference import attention_reference

INF = float("inf")


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def values_1_2_4(key_len=3):
    """One-hot-like values: the output is the sum of p_j * 2^j, which names the weights."""
    value = 2.0 ** torch.arange(key_len, dtype=torch.float64)
    return value.view(1, key_len, 1, 1)


def ones(length):
    return torch.ones(1, length, 1, 1, dtype=torch.float64)


def test_equal_scores_average_the_visible_values():
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    out, lse, probs = attention_reference(zero, 0 * ones(3), values_1_2_4())
    assert out.item() == pytest.approx(7 / 3)
    assert lse.item() == pytest.approx(math.log(3))
    assert probs.flatten().tolist() == pytest.approx([1 / 3] * 3)
    mask = torch.tensor([True, False, True]).view(1, 1, 1, 3)
    out, lse, probs = attention_reference(zero, 0 * ones(3), values_1_2_4(), mask)
    assert out.item() == pytest.approx(5 / 2)
    assert lse.item() == pytest.approx(math.log(2))
    assert probs.flatten().tolist() == pytest.approx([0.5, 0, 0.5])


def test_bias_scale_and_softcap_by_hand():
    query, key = 2.0 * ones(1), torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 2, 1, 1)
    bias = torch.tensor([0.5, -1.0], dtype=torch.float64).view(1, 1, 1, 2)

    def softmax_first(a, b):
        return math.exp(a) / (math.exp(a) + math.exp(b))

    *_, probs = attention_reference(query, key, ones(2), None, bias, softmax_scale=0.25)
    assert probs[0, 0, 0, 0].item() == pytest.approx(softmax_first(0.5 + 0.5, 1.5 - 1.0))
    *_, probs = attention_reference(
        query, key, ones(2), None, bias, softmax_scale=0.25, softcap=2.0
    )
    capped = [2 * math.tanh(s / 2) for s in (0.5, 1.5)]
    assert probs[0, 0, 0, 0].item() == pytest.approx(
        softmax_first(capped[0] + 0.5, capped[1] - 1.0)
    )


def test_the_default_scale_is_one_over_the_root_of_the_head_dimension():
    query, key, value = rand(1, 2, 1, 9), rand(1, 3, 1, 9, seed=1), rand(1, 3, 1, 9, seed=2)
    plain = attention_reference(query, key, value)[0]
    assert torch.equal(plain, attention_reference(query, key, value, softmax_scale=9**-0.5)[0])


@pytest.mark.parametrize(
    ("query_len", "key_len", "rows"),
    [
        (2, 5, ["11110", "11111"]),
        (5, 2, ["00", "00", "00", "10", "11"]),
        (3, 3, ["100", "110", "111"]),
        (1, 4, ["1111"]),
    ],
)
def test_causal_is_bottom_right(query_len, key_len, rows):
    query, key, value = rand(1, query_len, 1, 4), rand(1, key_len, 1, 4), rand(1, key_len, 1, 4)
    out, lse, probs = attention_reference(query, key, value, is_causal=True)
    assert (probs[0, 0] > 0).int().tolist() == [[int(c) for c in row] for row in rows]
    empty = torch.tensor(["1" not in row for row in rows])
    assert (out[0, empty] == 0).all()
    assert torch.equal(lse[0, 0] == -INF, empty)


def test_a_row_without_keys_is_zero_with_zero_gradients():
    query, key, value = (rand(1, n, 2, 4, seed=n).requires_grad_() for n in (3, 5, 5))
    bias = rand(1, 2, 3, 5).requires_grad_()
    mask = torch.ones(1, 2, 3, 5, dtype=torch.bool)
    mask[:, 1] = False
    mask[0, 0, 1] = False
    out, lse, _ = attention_reference(query, key, value, mask, bias)
    assert (out[:, :, 1] == 0).all() and (out[0, 1, 0] == 0).all()
    assert (lse[0, 1] == -INF).all() and lse[0, 0, 1] == -INF
    out.backward(rand(*out.shape, seed=9))
    for tensor in (query, key, value, bias):
        assert torch.isfinite(tensor.grad).all()
    assert (query.grad[:, :, 1] == 0).all() and (query.grad[0, 1, 0] == 0).all()
    assert (key.grad[:, :, 1] == 0).all() and (value.grad[:, :, 1] == 0).all()
    assert (bias.grad[0, 1] == 0).all() and (bias.grad[0, 0, 1] == 0).all()
    assert (query.grad[0, 0, 0] != 0).all()


def test_minus_infinity_hides_and_the_finite_minimum_does_not():
    query, key, value = rand(1, 1, 1, 4), rand(1, 3, 1, 4), values_1_2_4()
    lowest = torch.finfo(torch.float32).min
    hidden = torch.tensor([0.0, -INF, 0.0], dtype=torch.float64).view(1, 1, 1, 3)
    mask = torch.tensor([True, False, True]).view(1, 1, 1, 3)
    assert torch.equal(
        attention_reference(query, key, value, None, hidden)[0],
        attention_reference(query, key, value, mask)[0],
    )
    all_lowest = torch.full((1, 1, 1, 3), lowest, dtype=torch.float64)
    out, lse, _ = attention_reference(query, key, value, None, all_lowest)
    assert torch.isfinite(lse).all()
    # fp64 keeps the scores beside 3.4e38 no better than equal: the row is a plain average.
    assert out.item() == pytest.approx(7 / 3)


def test_no_keys_no_queries_no_batch():
    out, lse, probs = attention_reference(rand(2, 3, 2, 4), rand(2, 0, 1, 4), rand(2, 0, 1, 4))
    assert out.shape == (2, 3, 2, 4) and (out == 0).all()
    assert (lse == -INF).all() and probs.shape == (2, 2, 3, 0)
    out, lse, _ = attention_reference(rand(2, 0, 2, 4), rand(2, 3, 1, 4), rand(2, 3, 1, 4))
    assert out.shape == (2, 0, 2, 4) and lse.shape == (2, 2, 0)
    assert attention_reference(rand(0, 3, 2, 4), rand(0, 3, 1, 4), rand(0, 3, 1, 4))[0].numel() == 0


def test_grouped_heads_read_consecutive_kv_mask_and_bias_heads():
    """Query head h reads KV head h // (H / Hkv), and mask and bias head h // (H / heads)."""
    query, key, value = rand(1, 3, 4, 5), rand(1, 6, 2, 5, seed=1), rand(1, 6, 2, 5, seed=2)
    mask = rand(1, 4, 3, 6, seed=3) > -0.5
    bias = rand(1, 2, 1, 6, seed=4)
    out, lse, probs = attention_reference(query, key, value, mask, bias)
    for h in range(4):
        own = attention_reference(
            query[:, :, h : h + 1],
            key[:, :, h // 2 : h // 2 + 1],
            value[:, :, h // 2 : h // 2 + 1],
            mask[:, h : h + 1],
            bias[:, h // 2 : h // 2 + 1],
        )
        torch.testing.assert_close(out[:, :, h : h + 1], own[0], rtol=0, atol=1e-14)
        torch.testing.assert_close(lse[:, h : h + 1], own[1], rtol=0, atol=1e-14)
        torch.testing.assert_close(probs[:, h : h + 1], own[2], rtol=0, atol=1e-14)


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_broadcast_shape_equals_its_expansion(is_causal):
    batch, query_len, key_len, heads, kv_heads = 2, 3, 4, 4, 2
    query, key = rand(batch, query_len, heads, 2), rand(batch, key_len, kv_heads, 2, seed=1)
    value = rand(batch, key_len, kv_heads, 2, seed=2)
    patterns = list(itertools.product((1, 2), (1, 2, 4), (1, query_len), (1, key_len)))
    for number, (mask_shape, bias_shape) in enumerate(
        zip(patterns, reversed(patterns), strict=True)
    ):
        mask = rand(*mask_shape, seed=number) > -0.7
        bias = rand(*bias_shape, seed=number + 100)
        full_mask, full_bias = (
            t.repeat_interleave(heads // t.shape[1], 1).expand(batch, heads, query_len, key_len)
            for t in (mask, bias)
        )
        options = {"is_causal": is_causal, "softcap": 3.0}
        small = attention_reference(query, key, value, mask, bias, **options)
        full = attention_reference(query, key, value, full_mask, full_bias, **options)
        for a, b in zip(small, full, strict=True):
            assert torch.equal(a, b), (mask_shape, bias_shape)


def test_agrees_with_pytorch_where_both_are_defined():
    query, key, value = rand(2, 7, 4, 8), rand(2, 9, 2, 8, seed=1), rand(2, 9, 2, 8, seed=2)
    bias = rand(2, 4, 7, 9, seed=3)
    out = attention_reference(query, key, value, None, bias)[0]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2).repeat_interleave(2, 1),
        value.transpose(1, 2).repeat_interleave(2, 1),
        attn_mask=bias,
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradients_by_finite_differences(softcap):
    query, key, value = (
        rand(1, n, h, 3, seed=n).requires_grad_() for n, h in ((3, 2), (4, 1), (4, 1))
    )
    bias = rand(1, 1, 1, 4, seed=7).requires_grad_()
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 1]], dtype=torch.bool).view(
        1, 1, 3, 4
    )

    def outputs(*inputs):
        return attention_reference(*inputs[:3], mask, inputs[3], softcap=softcap)[0]

    assert torch.autograd.gradcheck(outputs, (query, key, value, bias))


def test_a_hidden_key_may_hold_anything():
    query, key, value = rand(1, 2, 1, 3), rand(1, 4, 1, 3, seed=1), rand(1, 4, 1, 3, seed=2)
    mask = torch.tensor([True, True, False, True]).view(1, 1, 1, 4)
    clean = attention_reference(query, key, value, mask)[0]
    key[:, 2], value[:, 2] = float("nan"), INF
    assert torch.equal(attention_reference(query, key, value, mask)[0], clean)
