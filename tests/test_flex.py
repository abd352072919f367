"""The FlexAttention backend on CPUs: the same results as the reference, forward and gradients.

PyTorch refuses gradients there although the unfused template has them; the tests that need them
lift that check, which leaves everything of this package in place.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from compare import assert_fair, largest_error
from oracles import check_attention, outputs_and_gradients

from flash_sparse_attn import (
    dispatch,
    dynamic_mask_attn_func,
    flash_sparse_attn_func,
    flash_sparse_attn_func_auto,
    flash_sparse_attn_varlen_func,
    flash_sparse_attn_with_kvcache_func,
    get_available_backends,
    select_keys,
)
from flash_sparse_attn.backends import flex
from flash_sparse_attn.problem import Problem
from flash_sparse_attn.reference import attention_reference, causal_mask, expand_heads
from flash_sparse_attn.varlen import PackedSequences

pytestmark = [
    pytest.mark.skipif(bool(flex.unavailable()), reason="; ".join(flex.unavailable())),
    # PyTorch's compiler looks at .grad of every tensor and hides the warning, but not an error.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
INF = float("inf")


@pytest.fixture
def gradients(monkeypatch):
    """Lift the refusal of gradients on CPUs, here and in PyTorch."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    refused = flex.unsupported
    monkeypatch.setattr(
        flex, "unsupported", lambda problem: refused(replace(problem, requires_grad=False))
    )


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def qkv(batch, query_len, key_len, heads, kv_heads, dim, dtype=torch.float32):
    return (
        rand(batch, query_len, heads, dim, dtype=dtype),
        rand(batch, key_len, kv_heads, dim, dtype=dtype),
        rand(batch, key_len, kv_heads, dim, dtype=dtype),
    )


def attend(*arguments, **options):
    return flash_sparse_attn_func(*arguments, **options, backend="flex")


def check(query, key, value, mask=None, bias=None, **options):
    """Output and all gradients against the reference."""

    def call(query, key, value, bias=None):
        return attend(query, key, value, mask, bias, **options)

    return check_attention(call, query, key, value, mask, bias, **options)


def check_forward(query, key, value, mask=None, bias=None, dense=None, **options):
    """Output and lse against the reference, without gradients; `dense` is a selection's mask."""
    out, lse = attend(query, key, value, mask, bias, **options, return_lse=True)
    dense = mask if dense is None else dense
    inputs = (query, key, value, dense, bias)
    exact = (x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)
    truth = attention_reference(*exact, **options)
    plain = attention_reference(*inputs, **options)
    assert_fair(out, truth[0], plain[0].to(out.dtype), "out")
    assert_fair(lse, truth[1], plain[1].to(lse.dtype), "lse")
    return out, lse


PATTERNS = list(itertools.product((1, 2), (1, 2, 6), (1, 65), (1, 129)))


@pytest.mark.parametrize("number", range(24))
def test_every_broadcast_pattern(number, gradients):
    inputs = qkv(2, 65, 129, 6, 2, 4)
    mask = torch.rand(PATTERNS[number]) < 0.7
    bias_shape = PATTERNS[(7 * number + 5) % 24]
    results = check(*inputs, mask, rand(*bias_shape), is_causal=number % 2 == 1)
    assert results["dbias"].shape == bias_shape


@pytest.mark.parametrize("is_causal", [False, True])
def test_neither_mask_nor_bias_and_one_of_them(is_causal, gradients):
    inputs = qkv(1, 140, 270, 4, 2, 8)
    check(*inputs, is_causal=is_causal)
    check(*inputs, torch.rand(1, 4, 140, 270) < 0.5, is_causal=is_causal)
    check(*inputs, None, rand(1, 2, 1, 270), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("query_len", [1, 127, 129, 300])
def test_lengths(query_len, is_causal):
    for key_len in (1, 128, 130, 257):
        inputs = qkv(1, query_len, key_len, 2, 1, 4)
        mask = torch.rand(1, 1, query_len, key_len) < 0.5
        check_forward(*inputs, mask, rand(1, 1, 1, key_len), is_causal=is_causal)


def test_many_lengths_are_not_many_compilations():
    for length in range(40, 340, 10):
        inputs = qkv(1, length, length + 3, 2, 1, 4)
        check_forward(*inputs, None, rand(1, 1, 1, length + 3), is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_head_dimensions(dtype):
    for dim in (1, 20, 64, 96):
        inputs = qkv(1, 9, 33, 2, 1, dim, dtype)
        check_forward(*inputs, torch.rand(1, 1, 9, 33) < 0.7, rand(1, 1, 1, 33), is_causal=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (8, 1)])
def test_grouped_heads(heads, kv_heads, gradients):
    inputs = qkv(2, 10, 12, heads, kv_heads, 4)
    for mask_heads, bias_heads in itertools.product({1, kv_heads, heads}, repeat=2):
        check(*inputs, torch.rand(2, mask_heads, 10, 12) < 0.7, rand(2, bias_heads, 1, 12))


@pytest.mark.parametrize("softcap", [None, 0.0, 5.0])
def test_scale_and_softcap(softcap, gradients):
    inputs = qkv(1, 20, 30, 2, 1, 12)
    bias = rand(1, 1, 20, 30)
    check(*inputs, None, bias, softcap=softcap, softmax_scale=0.7, is_causal=True)


@pytest.mark.parametrize("name", ["query", "key", "value", "bias"])
def test_one_gradient_alone(name, gradients):
    tensors = dict(zip(("query", "key", "value"), qkv(1, 20, 30, 2, 1, 4), strict=True))
    tensors["bias"] = rand(1, 1, 1, 30)
    grad_out = rand(1, 20, 2, 4)

    def gradient(function):
        leaf = tensors[name].clone().requires_grad_()
        out = function(**{**tensors, name: leaf})
        return torch.autograd.grad(out, leaf, grad_out.to(out.dtype))[0]

    found = gradient(lambda query, key, value, bias: attend(query, key, value, None, bias))
    expected = gradient(
        lambda query, key, value, bias: attention_reference(query, key, value, None, bias)[0]
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_16_bit_bias_is_rounded_once(gradients):
    """4096 terms of one sign: rounded as they are added, they would be off by percents."""
    query, key, value = qkv(8, 64, 2, 8, 1, 4)
    bias = rand(1, 1, 1, 2, dtype=torch.bfloat16).requires_grad_()
    value = value.abs()
    value[:, 1] -= 3.0
    out = attend(query, key, value, None, bias)
    (grad,) = torch.autograd.grad(out, bias, torch.ones_like(out))
    exact = bias.detach().double().requires_grad_()
    out = attention_reference(query.double(), key.double(), value.double(), None, exact)[0]
    (truth,) = torch.autograd.grad(out, exact, torch.ones_like(out))
    assert grad.dtype == torch.bfloat16
    assert (grad.double() - truth).abs().max() <= truth.abs().max() * 2**-8


@pytest.mark.parametrize("lengths", [(90, 90), (40, 90), (1, 90), (90, 40)])
@pytest.mark.parametrize(
    ("mode", "is_causal"),
    [("causal", None), ("shared", True), ("shared", False), ("relu", True), ("relu", False)],
)
def test_selections(mode, is_causal, lengths, gradients):
    query_len, key_len = lengths
    inputs = qkv(2, query_len, key_len, 4, 2, 4)
    scores = rand(2, 2, key_len)
    key_mask = torch.rand(2, key_len) < 0.8
    keep = {"keep_first": 2, "keep_recent": 3} if mode == "causal" else {}
    selection = select_keys(scores, 12, mode=mode, key_mask=key_mask, **keep)
    causal = selection.resolve_causality(is_causal)
    bias, dense = scores[:, :, None], selection.to_dense(query_len, causal)

    def call(query, key, value, bias):
        return attend(query, key, value, selection, bias, is_causal=is_causal)

    check_attention(call, *inputs, dense, bias)


def packed_inputs(query_lens, key_lens, heads=4, kv_heads=2, dim=4):
    total_q, total_k = sum(query_lens), sum(key_lens)
    borders = [
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        for lengths in (query_lens, key_lens)
    ]
    tensors = rand(total_q, heads, dim), rand(total_k, kv_heads, dim), rand(total_k, kv_heads, dim)
    return tensors, borders


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("what", ["nothing", "mask and bias", "selection"])
@pytest.mark.parametrize(
    ("query_lens", "key_lens"),
    [([0, 5, 150, 1, 0], [0, 5, 150, 1, 0]), ([3, 140, 0, 2, 9], [7, 131, 4, 0, 1])],
)
def test_packed_sequences(query_lens, key_lens, what, is_causal, gradients):
    """Equal to the sequences one by one on the eager backend, gradients included."""
    if what == "selection":
        query_lens = key_lens
    (query, key, value), borders = packed_inputs(query_lens, key_lens)
    total = sum(key_lens)
    mask, bias = None, None
    if what == "mask and bias":
        mask, bias = torch.rand(total) < 0.7, rand(4, total)
    elif what == "selection":
        bias = rand(2, total)
        mode = "causal" if is_causal else "shared"
        mask = select_keys(bias, 9, mode=mode, cu_seqlens=borders[1])
    inputs = {"query": query, "key": key, "value": value}
    if bias is not None:
        inputs["bias"] = bias
    grad_out = rand(*query.shape)

    def call(backend):
        def function(query, key, value, bias=None):
            return flash_sparse_attn_varlen_func(
                query,
                key,
                value,
                *borders,
                max(query_lens),
                max(key_lens),
                is_causal=is_causal,
                attn_mask=mask,
                attn_bias=bias,
                backend=backend,
            )

        return outputs_and_gradients(function, inputs, grad_out)

    found, expected = call("flex"), call("eager")
    for name, result in found.items():
        assert largest_error(result, expected[name].double(), name) < 2e-5


def test_caches():
    query, keys, values = qkv(2, 3, 40, 4, 2, 4)
    lengths = torch.tensor([40, 17], dtype=torch.int32)
    arguments = {"cache_seqlens": lengths, "is_causal": True, "return_lse": True}
    found, expected = (
        flash_sparse_attn_with_kvcache_func(query, keys, values, **arguments, backend=backend)
        for backend in ("flex", "eager")
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["mask", "bias", "causal", "pair bias", "everything"])
def test_rows_without_a_key(how, gradients):
    inputs = qkv(1, 150, 140, 2, 1, 4)
    mask, bias = torch.rand(1, 1, 150, 140) < 0.5, rand(1, 1, 1, 140)
    if how == "mask":
        mask[:, :, 20:148] = False
    elif how == "bias":
        bias[..., :70] = -INF
        mask[:, :, :100, 70:] = False
    elif how == "pair bias":
        bias = rand(1, 1, 150, 140)
        bias[:, :, 3:140] = -INF
    elif how == "everything":
        mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    results = check(*inputs, mask, bias, is_causal=True)
    _, lse = check_forward(*inputs, mask, bias, is_causal=True)
    empty = lse.isinf().transpose(1, 2)
    assert empty.any()
    assert not results["out"][empty].any() and not results["dquery"][empty].any()


def test_the_largest_finite_bias_is_finite():
    """A row that holds nothing else is uniform, not empty."""
    inputs = qkv(1, 5, 7, 1, 1, 4)
    bias = torch.full((1, 1, 5, 7), torch.finfo(torch.float32).min)
    bias[:, :, 1:] = rand(1, 1, 4, 7)
    out, lse = attend(*inputs, None, bias, return_lse=True)
    truth = attention_reference(*inputs, None, bias)[0]
    assert lse.isfinite().all()
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[0, 0, 0], inputs[2][0, :, 0].mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("junk", [torch.nan, INF])
@pytest.mark.parametrize("how", ["mask", "pair mask", "bias", "pair bias", "selection"])
def test_a_key_that_no_query_sees_may_hold_anything(how, junk, gradients):
    inputs = dict(zip(("query", "key", "value"), qkv(2, 50, 60, 4, 2, 4), strict=True))
    hidden = torch.rand(2, 2, 60) < 0.3
    if how == "selection":
        hidden = hidden[:, :1].expand(2, 2, 60)
    visible, scores = ~hidden[:, :, None], rand(2, 2, 60)

    def call(query, key, value):
        if how == "mask":
            return attend(query, key, value, visible)
        if how == "pair mask":
            return attend(query, key, value, visible.repeat(1, 1, 50, 1))
        if how == "bias":
            return attend(query, key, value, None, torch.where(visible, 0.0, -INF))
        if how == "pair bias":
            return attend(
                query, key, value, None, torch.where(visible, 0.0, -INF).repeat(1, 1, 50, 1)
            )
        selection = select_keys(scores, 9, key_mask=~hidden[:, 0])
        return attend(query, key, value, selection)

    unseen = hidden.transpose(1, 2)[..., None]
    dirty = {
        name: tensor if name == "query" else tensor.masked_fill(unseen, junk)
        for name, tensor in inputs.items()
    }
    grad_out = rand(2, 50, 4, 4)
    expected = outputs_and_gradients(call, inputs, grad_out)
    for name, result in outputs_and_gradients(call, dirty, grad_out).items():
        torch.testing.assert_close(result, expected[name])


def test_expanded_and_transposed_tensors():
    query, key, value = (t.transpose(1, 2) for t in qkv(2, 2, 2, 60, 60, 8))
    mask = (torch.rand(1, 1, 1, 60) < 0.5).expand(2, 2, 60, 60)
    bias = rand(1, 1, 60, 1).expand(2, 2, 60, 60)
    check_forward(query, key, value, mask, bias)


def test_an_expanded_mask_is_not_read_as_a_full_one():
    tensors = qkv(2, 300, 400, 4, 2, 4)
    mask = (torch.rand(1, 1, 1, 400) < 0.5).expand(2, 4, 300, 400)
    bias = rand(1, 2, 1, 400).expand(2, 2, 300, 400)
    options = {"is_causal": True, "softmax_scale": None, "softcap": 0.0, "deterministic": None}
    visible = flex._Visible.of(Problem.of(*tensors, mask, bias, **options), mask, bias)
    assert visible.mask is None and visible.finite is None
    assert visible.first.shape == (1, 2, 400)
    check_forward(*tensors, mask, bias, is_causal=True)


def test_a_later_token_changes_no_earlier_row():
    query, key, value = qkv(1, 200, 200, 2, 1, 8)
    scores = rand(1, 1, 200)

    def call():
        return dynamic_mask_attn_func(query, key, value, scores, 16, backend="flex")

    before = call()
    for tensor in (query[:, 150], key[:, 150], value[:, 150], scores[..., 150]):
        tensor.add_(2.0)
    after = call()
    assert torch.equal(before[:, :150], after[:, :150])
    assert not torch.equal(before[:, 150:], after[:, 150:])


@pytest.mark.parametrize("step", [1, 1 << 27])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("what", ["dense", "keys", "pairs", "bias", "selection", "packed"])
def test_block_lists_are_those_of_the_dense_mask(what, is_causal, step, monkeypatch):
    monkeypatch.setattr(flex, "_SCORES_PER_STEP", step)
    query_len, key_len, heads, kv_heads = 300, 520, 4, 2
    query, key, value = qkv(1, query_len, key_len, heads, kv_heads, 4)
    mask, bias, packed = None, None, None
    dense = torch.ones(1, 1, query_len, key_len, dtype=torch.bool)
    if is_causal and what != "packed":
        dense = causal_mask(query_len, key_len)[None, None]
    if what == "keys":
        mask = torch.arange(key_len) // 128 % 2 == torch.arange(kv_heads)[:, None] % 2
        mask = mask[None, :, None]
    elif what == "pairs":
        mask = torch.rand(1, heads, query_len, key_len) < 0.99
        mask[..., :256] = True
    elif what == "bias":
        bias = rand(1, heads, query_len, key_len)
        bias[..., 130:400] = -INF
        dense = dense & (bias != -INF)
    elif what == "selection":
        mode = "causal" if is_causal else "shared"
        mask = select_keys(rand(1, kv_heads, key_len), 20, mode=mode)
        dense = mask.to_dense(query_len, is_causal)
    elif what == "packed":
        borders = [torch.tensor(b).int() for b in ([0, 3, 200, 300], [0, 260, 260, 520])]
        packed = PackedSequences(*borders, 200, 260)
        dense = torch.zeros(1, 1, query_len, key_len, dtype=torch.bool)
        for q0, q1, k0, k1 in packed.ranges():
            part = causal_mask(q1 - q0, k1 - k0) if is_causal else True
            dense[:, :, q0:q1, k0:k1] = part
    if torch.is_tensor(mask):
        dense = expand_heads(dense, mask.shape[1]) & mask
    problem = Problem.of(
        query,
        key,
        value,
        mask,
        bias,
        is_causal=is_causal,
        softmax_scale=None,
        softcap=0.0,
        deterministic=False,
        packed=packed,
    )
    partial, full, seen = flex._Visible.of(problem, mask, bias).blocks()
    assert torch.equal(expand_heads(seen, heads), expand_heads(dense.any(dim=2), heads))
    blocks = torch.nn.functional.pad(dense, (0, -key_len % 128, 0, -query_len % 128))
    blocks = blocks.unflatten(3, (-1, 128)).unflatten(2, (-1, 128)).transpose(3, 4).flatten(4)
    some, every = (expand_heads(t, heads) for t in (blocks.any(dim=4), blocks.all(dim=4)))
    assert torch.equal(expand_heads(full, heads), every)
    assert torch.equal(expand_heads(partial, heads), some & ~every)


def test_calls_keep_nothing_alive():
    inputs = qkv(1, 130, 130, 2, 1, 4)
    mask, bias = torch.rand(1, 1, 130, 130) < 0.5, rand(1, 1, 130, 130)
    attend(*inputs, mask, bias)
    kept = [weakref.ref(tensor) for tensor in (*inputs, mask, bias)]
    del inputs, mask, bias
    gc.collect()
    assert [tensor() for tensor in kept] == [None] * 5


def test_inside_a_compiled_function():
    query, key, value = qkv(1, 40, 40, 2, 1, 8)
    bias = rand(1, 1, 1, 40)

    @torch.compile(backend="eager", fullgraph=True)
    def block(query, key, value, bias):
        return 2 * attend(query, key, value, None, bias, is_causal=True)

    expected = 2 * attention_reference(query, key, value, None, bias, is_causal=True)[0]
    torch.testing.assert_close(block(query, key, value, bias), expected, rtol=1e-5, atol=1e-5)


def test_autocast_casts_query_key_and_value_only():
    inputs = qkv(1, 30, 30, 2, 1, 8)
    bias = rand(1, 1, 1, 30) * 100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(*inputs, None, bias)
    expected = attend(*(tensor.bfloat16() for tensor in inputs), None, bias)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.parametrize("bad", [torch.nan, INF])
def test_a_wrong_bias_on_a_visible_key_is_refused(bad):
    inputs = qkv(1, 8, 8, 2, 1, 4)
    bias = rand(1, 1, 1, 8)
    bias[..., 5] = bad
    with pytest.raises(ValueError, match=r"attn_bias.*NaN or \+inf"):
        attend(*inputs, None, bias)
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    mask[..., 5] = False
    assert attend(*inputs, mask, bias).isfinite().all()


# Availability and reasons


def problem_of(**changes):
    query, key, value = qkv(1, 8, 8, 2, 1, 4)
    options = {"is_causal": False, "softmax_scale": None, "softcap": 0.0, "deterministic": False}
    return replace(Problem.of(query, key, value, None, None, **options), **changes)


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"requires_grad": True}, "no gradients on CPUs"),
        ({"device": torch.device("meta")}, "the tensors are on meta"),
        ({"device": GPU, "dtype": torch.float32}, "takes fp16 and bf16 on GPUs"),
        ({"device": GPU, "bias_dtype": torch.float64}, "biases up to fp32"),
        ({"bias_requires_grad": True, "deterministic": True}, "atomic additions"),
        ({"mask_shape": (1, 1, 65536, 32768)}, "attn_mask has 2^31 elements"),
        ({"bias_shape": (1, 1, 65536, 32768)}, "attn_bias has 2^31 elements"),
    ],
)
def test_reasons_why_a_call_cannot_run(changes, words):
    assert flex.unsupported(problem_of()) == []
    assert any(words in reason for reason in flex.unsupported(problem_of(**changes)))


def test_an_old_torch_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    (reason,) = flex.unavailable()
    assert "2.8.1+cpu is too old, 2.9 is needed" in reason


def test_gradients_on_cpus_are_refused_with_the_reason():
    query, key, value = qkv(1, 8, 8, 2, 1, 4)
    with pytest.raises(RuntimeError, match=r"backend='flex'.*\n.*no gradients on CPUs"):
        attend(query.requires_grad_(), key, value)


def test_it_is_available_but_never_chosen_automatically(monkeypatch):
    assert "flex" in get_available_backends()
    monkeypatch.setattr(flex, "unsupported", lambda _: [])
    assert dispatch.choose(problem_of()) is not flex
    assert dispatch.choose(problem_of(), "flex") is flex
    query, key, value = qkv(1, 8, 8, 2, 1, 4)
    function = flash_sparse_attn_func_auto("flex")
    torch.testing.assert_close(function(query, key, value), attend(query, key, value))
