"""Bad input: the error names the argument, what was expected and what came, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flash_sparse_attn import (
    dynamic_mask_attn_func,
    dynamic_mask_attn_varlen_func,
    flash_sparse_attn_func,
    flash_sparse_attn_func_auto,
    flash_sparse_attn_varlen_func,
    flash_sparse_attn_with_kvcache_func,
    select_keys,
)

B, Q, K, H, HKV, D, W = 2, 6, 8, 4, 2, 16, 3
INF = float("inf")


def refused(
    function: Callable[..., Any], error: type[Exception], name: str, *words: str, **arguments: Any
) -> None:
    """`function` raises `error`; the message starts with `name` and has all `words`."""
    tensors = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(error) as caught:
        function(**arguments)
    message = str(caught.value)
    assert message.startswith(name), message
    for word in ("expected", "got", *words):
        assert word in message, f"{word!r} is not in: {message}"
    for key, before in tensors.items():
        after = arguments[key]
        assert after.device.type == "meta" or torch.equal(after.nan_to_num(), before.nan_to_num())


def call(**changes: Any) -> dict[str, Any]:
    """Arguments of `flash_sparse_attn_func`, correct but for the changes."""
    return {
        "query": torch.randn(B, Q, H, D),
        "key": torch.randn(B, K, HKV, D),
        "value": torch.randn(B, K, HKV, D),
        **changes,
    }


def packed_call(**changes: Any) -> dict[str, Any]:
    """Arguments of `flash_sparse_attn_varlen_func`, correct but for the changes."""
    return {
        "query": torch.randn(10, H, D),
        "key": torch.randn(10, HKV, D),
        "value": torch.randn(10, HKV, D),
        "cu_seqlens_q": torch.tensor([0, 4, 10], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 4, 10], dtype=torch.int32),
        "max_seqlen_q": 6,
        "max_seqlen_k": 6,
        **changes,
    }


def cache_call(**changes: Any) -> dict[str, Any]:
    """Arguments of `flash_sparse_attn_with_kvcache_func`, correct but for the changes."""
    return {
        "query": torch.randn(B, 1, H, D),
        "k_cache": torch.randn(B, K, HKV, D),
        "v_cache": torch.randn(B, K, HKV, D),
        "cache_seqlens": torch.tensor([K, 2], dtype=torch.int32),
        **changes,
    }


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def trues(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def test_the_unchanged_calls_are_accepted():
    flash_sparse_attn_func(**call())
    flash_sparse_attn_varlen_func(**packed_call())
    flash_sparse_attn_with_kvcache_func(**cache_call())


@pytest.mark.parametrize(
    ("changes", "error", "name", "words"),
    [
        ({"query": zeros(Q, H, D)}, ValueError, "query", ["4", "[B, Q, H, D]", "(6, 4, 16)"]),
        ({"key": zeros(B, 1, K, HKV, D)}, ValueError, "key", ["[B, K, Hkv, D]", "5"]),
        ({"value": zeros(K, D)}, ValueError, "value", ["[B, K, Hkv, D]", "(8, 16)"]),
        ({"query": [[0.0]]}, TypeError, "query", ["tensor", "list"]),
        ({"value": None}, TypeError, "value", ["tensor", "None"]),
        ({"query": zeros(B, Q, 5, D)}, ValueError, "key", ["5", "2", "divide"]),
        ({"query": zeros(B, Q, 1, D)}, ValueError, "key", ["1", "2", "divide"]),
        ({"key": zeros(B, K, 0, D), "value": zeros(B, K, 0, D)}, ValueError, "key", ["0"]),
        ({"key": zeros(3, K, HKV, D), "value": zeros(3, K, HKV, D)}, ValueError, "key", ["2", "3"]),
        (
            {"key": zeros(B, K, HKV, 8), "value": zeros(B, K, HKV, 8)},
            ValueError,
            "key",
            ["16", "8"],
        ),
        (
            {"value": zeros(B, K + 1, HKV, D)},
            ValueError,
            "value",
            ["(2, 8, 2, 16)", "(2, 9, 2, 16)"],
        ),
        ({"value": zeros(B, K, HKV, 8)}, ValueError, "value", ["(2, 8, 2, 16)", "(2, 8, 2, 8)"]),
        ({"key": zeros(B, K, HKV, D).half()}, TypeError, "key", ["float32", "float16"]),
        ({"value": zeros(B, K, HKV, D).double()}, TypeError, "value", ["float32", "float64"]),
        ({"query": zeros(B, Q, H, D).long()}, TypeError, "query", ["floating", "int64"]),
        ({"key": zeros(B, K, HKV, D, device="meta")}, ValueError, "key", ["cpu", "meta"]),
        ({"value": zeros(B, K, HKV, D, device="meta")}, ValueError, "value", ["cpu", "meta"]),
        (
            {
                "query": zeros(B, Q, H, 264),
                "key": zeros(B, K, HKV, 264),
                "value": zeros(B, K, HKV, 264),
            },
            ValueError,
            "query",
            ["256", "264"],
        ),
        (
            {"query": zeros(B, Q, H, 0), "key": zeros(B, K, HKV, 0), "value": zeros(B, K, HKV, 0)},
            ValueError,
            "query",
            ["256", "0"],
        ),
    ],
)
def test_query_key_and_value(changes, error, name, words):
    refused(flash_sparse_attn_func, error, name, *words, **call(**changes))


@pytest.mark.parametrize("name", ["attn_mask", "attn_bias"])
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((B, HKV, K), ["4", "(2, 2, 8)"]),
        ((K,), ["4", "(8,)"]),
        ((B, HKV, Q, K + 1), ["9", "8"]),
        ((B, HKV, Q, K - 1), ["7", "8"]),
        ((1, 1, 1, 128), ["128", "8"]),
        ((B, HKV, Q + 1, K), ["7", "6"]),
        ((B, 3, Q, K), ["3", "1 or 2 or 4"]),
        ((B + 1, HKV, Q, K), ["3", "1 or 2"]),
        ((B, HKV, K, Q), ["8", "6"]),
        ((0, 1, 1, K), ["0", "1 or 2"]),
    ],
)
def test_shapes_of_mask_and_bias(name, shape, words):
    tensor = trues(*shape) if name == "attn_mask" else zeros(*shape)
    refused(flash_sparse_attn_func, ValueError, name, *words, **call(**{name: tensor}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_masks_are_boolean(dtype):
    mask = torch.ones(B, HKV, Q, K, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    refused(flash_sparse_attn_func, TypeError, "attn_mask", "bool", name, **call(attn_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool])
def test_biases_are_floating(dtype):
    bias = torch.ones(B, HKV, Q, K, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    refused(flash_sparse_attn_func, TypeError, "attn_bias", "float32", name, **call(attn_bias=bias))


@pytest.mark.parametrize("name", ["attn_mask", "attn_bias"])
def test_mask_and_bias_are_on_the_same_device(name):
    tensor = (trues if name == "attn_mask" else zeros)(1, 1, 1, K).to("meta")
    refused(flash_sparse_attn_func, ValueError, name, "cpu", "meta", **call(**{name: tensor}))


@pytest.mark.parametrize("bad", [torch.nan, INF])
def test_values_of_a_bias(bad):
    bias = zeros(1, 1, 1, K)
    bias[..., 2] = bad
    refused(flash_sparse_attn_func, ValueError, "attn_bias", "NaN", **call(attn_bias=bias))
    mask = trues(1, 1, 1, K)
    mask[..., 2] = False
    out = flash_sparse_attn_func(**call(attn_bias=bias, attn_mask=mask))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("changes", "error", "name", "words"),
    [
        ({"softcap": -1.0}, ValueError, "softcap", ["positive", "-1.0"]),
        ({"softcap": torch.nan}, ValueError, "softcap", ["nan"]),
        ({"softcap": INF}, ValueError, "softcap", ["inf"]),
        ({"softcap": "2"}, TypeError, "softcap", ["'2'"]),
        ({"softmax_scale": "2"}, TypeError, "softmax_scale", ["'2'"]),
        ({"softmax_scale": torch.nan}, ValueError, "softmax_scale", ["nan"]),
        ({"softmax_scale": True}, TypeError, "softmax_scale", ["True"]),
        ({"is_causal": 0.125}, TypeError, "is_causal", ["True", "0.125"]),
        ({"is_causal": 1}, TypeError, "is_causal", ["True", "1"]),
        ({"deterministic": "no"}, TypeError, "deterministic", ["True", "'no'"]),
        (
            {"backend": "metal"},
            ValueError,
            "backend",
            ["cuda", "triton", "flex", "eager", "'metal'"],
        ),
    ],
)
def test_options(changes, error, name, words):
    refused(flash_sparse_attn_func, error, name, *words, **call(**changes))


def test_a_named_backend_runs_or_lists_its_reasons():
    for name in ("cuda", "triton"):
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match=f"backend='{name}'.*\n?.*-"):
                flash_sparse_attn_func(**call(backend=name))
    with pytest.raises(ValueError, match=r"backend.*expected.*'metal'"):
        flash_sparse_attn_func_auto("metal")
    with pytest.raises(ValueError, match=r"backend.*expected.*'metal'"):
        flash_sparse_attn_varlen_func(**packed_call(backend="metal"))
    with pytest.raises(ValueError, match=r"backend.*expected.*'metal'"):
        flash_sparse_attn_with_kvcache_func(**cache_call(backend="metal"))


def selection(heads: int = HKV, batch: int = B, key_len: int = K, **options: Any):
    return select_keys(torch.randn(batch, heads, key_len), W, **options)


@pytest.mark.parametrize(
    ("mask", "options", "error", "name", "words"),
    [
        (selection(heads=H), {}, ValueError, "attn_mask", ["(2, 2, 8)", "(2, 4, 8)", "KV head"]),
        (selection(heads=1), {}, ValueError, "attn_mask", ["(2, 2, 8)", "(2, 1, 8)"]),
        (selection(batch=1), {}, ValueError, "attn_mask", ["(2, 2, 8)", "(1, 2, 8)"]),
        (selection(key_len=K + 1), {}, ValueError, "attn_mask", ["(2, 2, 8)", "(2, 2, 9)"]),
        (selection().to("meta"), {}, ValueError, "attn_mask", ["cpu", "meta"]),
        (selection(), {"is_causal": False}, ValueError, "is_causal", ["None", "False", "shared"]),
        (selection(mode="shared"), {}, ValueError, "is_causal", ["True", "None", "shared"]),
        (selection(mode="relu"), {}, ValueError, "is_causal", ["True", "None", "relu"]),
        (
            (selection(), trues(1, 1, 1, K)),
            {},
            TypeError,
            "attn_mask",
            ["KeySelection", "tuple"],
        ),
        (
            select_keys(
                torch.randn(HKV, K), W, cu_seqlens=torch.tensor([0, 3, K], dtype=torch.int32)
            ),
            {},
            ValueError,
            "attn_mask",
            ["cu_seqlens", "varlen"],
        ),
    ],
)
def test_selections_that_do_not_fit(mask, options, error, name, words):
    refused(flash_sparse_attn_func, error, name, *words, **call(attn_mask=mask, **options))


def test_a_selection_comes_without_a_second_mask():
    scores = torch.randn(B, HKV, K)
    with pytest.raises(TypeError, match="attn_mask"):
        dynamic_mask_attn_func(**call(), scores=scores, window_size=W, attn_mask=trues(1, 1, 1, K))


@pytest.mark.parametrize(
    ("changes", "error", "name", "words"),
    [
        ({"scores": zeros(HKV, K)}, ValueError, "scores", ["[B, Hkv, K]", "(2, 8)"]),
        ({"scores": zeros(B, H, K)}, ValueError, "scores", ["(2, 2, 8)", "(2, 4, 8)"]),
        ({"scores": zeros(B, HKV, K + 1)}, ValueError, "scores", ["(2, 2, 8)", "(2, 2, 9)"]),
        ({"scores": zeros(B, HKV, K).long()}, TypeError, "scores", ["floating", "int64"]),
        ({"scores": zeros(B, HKV, K) / 0}, ValueError, "scores", ["NaN"]),
        ({"scores": zeros(B, HKV, K, device="meta")}, ValueError, "scores", ["cpu", "meta"]),
        ({"scores": None}, TypeError, "scores", ["tensor", "None"]),
        ({"window_size": 0}, ValueError, "window_size", ["1", "0"]),
        ({"window_size": -3}, ValueError, "window_size", ["1", "-3"]),
        ({"window_size": 2.0}, TypeError, "window_size", ["int", "2.0"]),
        ({"window_size": True}, TypeError, "window_size", ["int", "True"]),
        ({"mode": "median"}, ValueError, "mode", ["causal", "shared", "relu", "'median'"]),
        ({"keep_first": -1}, ValueError, "keep_first", ["0", "-1"]),
        ({"keep_recent": 1.5}, TypeError, "keep_recent", ["int", "1.5"]),
        ({"key_mask": trues(B, K + 1)}, ValueError, "key_mask", ["(2, 8)", "(2, 9)"]),
        ({"key_mask": trues(B, HKV, K)}, ValueError, "key_mask", ["[B, K]", "(2, 2, 8)"]),
        ({"key_mask": trues(B, K).long()}, TypeError, "key_mask", ["bool", "int64"]),
        ({"is_causal": False}, ValueError, "is_causal", ["None", "False"]),
        ({"mode": "shared"}, ValueError, "is_causal", ["shared", "None"]),
        ({"query": zeros(B, Q, 5, D)}, ValueError, "key", ["5", "2"]),
        ({"softcap": -0.5}, ValueError, "softcap", ["-0.5"]),
        ({"backend": "metal"}, ValueError, "backend", ["eager", "'metal'"]),
    ],
)
def test_dynamic_mask_attention(changes, error, name, words):
    arguments = call(scores=torch.randn(B, HKV, K), window_size=W)
    refused(dynamic_mask_attn_func, error, name, *words, **{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "name", "words"),
    [
        ({"scores": zeros(K)}, ValueError, "scores", ["[B, Hkv, K]", "(8,)"]),
        ({"scores": zeros(B, HKV, K) / 0}, ValueError, "scores", ["NaN"]),
        ({"window_size": 0}, ValueError, "window_size", ["1", "0"]),
        ({"mode": "best"}, ValueError, "mode", ["causal", "'best'"]),
        ({"key_mask": trues(1, K)}, ValueError, "key_mask", ["(2, 8)", "(1, 8)"]),
        (
            {"cu_seqlens": torch.tensor([0, K], dtype=torch.int32)},
            ValueError,
            "scores",
            ["[Hkv, total_k]"],
        ),
    ],
)
def test_select_keys(changes, error, name, words):
    arguments = {"scores": torch.randn(B, HKV, K), "window_size": W}
    refused(select_keys, error, name, *words, **{**arguments, **changes})


def test_nan_is_allowed_in_padding():
    scores = torch.randn(B, HKV, K)
    scores[..., -1] = torch.nan
    key_mask = trues(B, K)
    key_mask[:, -1] = False
    select_keys(scores, W, key_mask=key_mask)
    key_mask[0, -1] = True
    refused(
        select_keys, ValueError, "scores", "NaN", scores=scores, window_size=W, key_mask=key_mask
    )


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "name", "words"),
    [
        ({"cu_seqlens_k": int32(0, 7, 4, 10)}, ValueError, "cu_seqlens_k", []),
        (
            {"cu_seqlens_k": int32(0, 12, 10), "cu_seqlens_q": int32(0, 4, 10)},
            ValueError,
            "cu_seqlens_k",
            ["decrease", "12"],
        ),
        ({"cu_seqlens_q": int32(0, -2, 10)}, ValueError, "cu_seqlens_q", ["decrease", "-2"]),
        ({"cu_seqlens_q": int32(-1, 4, 10)}, ValueError, "cu_seqlens_q", ["-1"]),
        ({"cu_seqlens_q": int32(0, 4, 9)}, ValueError, "cu_seqlens_q", ["10", "9"]),
        ({"cu_seqlens_k": int32(0, 4, 11)}, ValueError, "cu_seqlens_k", ["10", "11"]),
        ({"cu_seqlens_k": int32(1, 4, 10)}, ValueError, "cu_seqlens_k", ["0", "1"]),
        ({"cu_seqlens_k": int32(0, 10)}, ValueError, "cu_seqlens_k", ["3", "2"]),
        ({"cu_seqlens_q": int32(0, 4, 10).long()}, TypeError, "cu_seqlens_q", ["int32", "int64"]),
        ({"cu_seqlens_q": [0, 4, 10]}, TypeError, "cu_seqlens_q", ["tensor", "list"]),
        ({"cu_seqlens_q": int32(0, 4, 10)[None]}, ValueError, "cu_seqlens_q", ["[N + 1]"]),
        ({"max_seqlen_q": 5}, ValueError, "max_seqlen_q", ["6", "5"]),
        ({"max_seqlen_k": 0}, ValueError, "max_seqlen_k", ["6", "0"]),
        ({"max_seqlen_k": 6.0}, TypeError, "max_seqlen_k", ["int", "float"]),
        ({"query": zeros(B, 5, H, D)}, ValueError, "query", ["[T, H, D]", "(2, 5, 4, 16)"]),
        ({"attn_mask": trues(9)}, ValueError, "attn_mask", ["10", "9"]),
        (
            {"attn_mask": trues(1, 1, 10, 10)},
            ValueError,
            "attn_mask",
            ["[total_k]", "(1, 1, 10, 10)"],
        ),
        ({"attn_mask": zeros(10)}, TypeError, "attn_mask", ["bool", "float32"]),
        ({"attn_bias": zeros(10)}, ValueError, "attn_bias", ["[{1|Hkv|H}, total_k]", "(10,)"]),
        ({"attn_bias": zeros(HKV, 11)}, ValueError, "attn_bias", ["10", "11"]),
        ({"attn_bias": zeros(3, 10)}, ValueError, "attn_bias", ["1 or 2 or 4", "3"]),
        ({"attn_mask": selection()}, ValueError, "attn_mask", ["cu_seqlens"]),
        ({"attn_mask": 0.125}, TypeError, "attn_mask", ["float"]),
    ],
)
def test_packed_attention(changes, error, name, words):
    refused(flash_sparse_attn_varlen_func, error, name, *words, **packed_call(**changes))


def test_a_selection_of_other_packed_sequences():
    """The same number of keys, cut elsewhere: the intervals would be read in the wrong place."""
    other = select_keys(torch.randn(HKV, 10), W, cu_seqlens=int32(0, 7, 10))
    refused(
        flash_sparse_attn_varlen_func,
        ValueError,
        "attn_mask",
        "cu_seqlens",
        **packed_call(attn_mask=other),
    )


@pytest.mark.parametrize(
    ("changes", "error", "name", "words"),
    [
        ({"scores": zeros(HKV, 9)}, ValueError, "scores", ["(2, 10)", "(2, 9)"]),
        ({"scores": zeros(1, HKV, 10)}, ValueError, "scores", ["[Hkv, total_k]", "(1, 2, 10)"]),
        ({"key_mask": trues(1, 10)}, ValueError, "key_mask", ["[total_k]", "(1, 10)"]),
        ({"window_size": 0}, ValueError, "window_size", ["1", "0"]),
        ({"cu_seqlens_q": int32(0, 3, 2, 10)}, ValueError, "cu_seqlens_q", []),
    ],
)
def test_packed_dynamic_mask_attention(changes, error, name, words):
    arguments = packed_call(scores=torch.randn(HKV, 10), window_size=W)
    refused(dynamic_mask_attn_varlen_func, error, name, *words, **{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "name", "words"),
    [
        ({"k_cache": zeros(K, HKV, D)}, ValueError, "k", ["4", "(8, 2, 16)"]),
        ({"v_cache": zeros(B, K + 1, HKV, D)}, ValueError, "v", ["(2, 8, 2, 16)", "(2, 9, 2, 16)"]),
        (
            {"k_cache": zeros(3, K, HKV, D), "v_cache": zeros(3, K, HKV, D)},
            ValueError,
            "k",
            ["2", "3"],
        ),
        ({"cache_seqlens": int32(K + 1, 2)}, ValueError, "cache_seqlens", ["8", "9"]),
        ({"cache_seqlens": int32(-1, 2)}, ValueError, "cache_seqlens", ["-1"]),
        ({"cache_seqlens": int32(K)}, ValueError, "cache_seqlens", ["2", "1"]),
        ({"cache_seqlens": int32(K, 2).long()}, TypeError, "cache_seqlens", ["int32", "int64"]),
        ({"cache_seqlens": [K, 2]}, TypeError, "cache_seqlens", ["tensor", "list"]),
        ({"attn_bias": zeros(1, 1, 1, K + 1)}, ValueError, "attn_bias", ["8", "9"]),
        ({"attn_mask": zeros(1, 1, 1, K)}, TypeError, "attn_mask", ["bool"]),
        ({"softcap": -1.0}, ValueError, "softcap", ["-1.0"]),
    ],
)
def test_attention_over_a_cache(changes, error, name, words):
    refused(flash_sparse_attn_with_kvcache_func, error, name, *words, **cache_call(**changes))


@pytest.mark.parametrize(
    ("changes", "error", "name", "words"),
    [
        ({"block_table": int32(0, 1)}, ValueError, "block_table", ["[B, max_pages]"]),
        ({"block_table": int32(0, 1)[None]}, ValueError, "block_table", ["2", "1"]),
        ({"block_table": torch.tensor([[0, 5], [1, 2]]).int()}, ValueError, "block_table", ["5"]),
        ({"block_table": torch.tensor([[0, -1], [1, 2]]).int()}, ValueError, "block_table", ["-1"]),
        ({"block_table": torch.tensor([[0, 1], [1, 2]])}, TypeError, "block_table", ["int32"]),
        ({"cache_seqlens": int32(9, 2)}, ValueError, "cache_seqlens", ["8", "9"]),
    ],
)
def test_attention_over_pages(changes, error, name, words):
    arguments = cache_call(
        k_cache=torch.randn(5, 4, HKV, D),
        v_cache=torch.randn(5, 4, HKV, D),
        block_table=torch.tensor([[0, 3], [1, 2]], dtype=torch.int32),
    )
    flash_sparse_attn_with_kvcache_func(**arguments)
    refused(flash_sparse_attn_with_kvcache_func, error, name, *words, **{**arguments, **changes})


@pytest.mark.parametrize(
    ("function", "error", "name"),
    [
        (lambda s: s.to_dense(is_causal=False), ValueError, "is_causal"),
        (lambda s: replace(s, mode="shared").to_dense(), ValueError, "is_causal"),
        (lambda s: s.to_dense(-1), ValueError, "query_len"),
    ],
    ids=["not causal", "causality not said", "negative length"],
)
def test_selection_methods(function, error, name):
    refused(lambda: function(selection()), error, name)


def test_a_failed_call_leaves_global_switches_alone():
    torch.use_deterministic_algorithms(True)
    query, key, value = (t.requires_grad_() for t in call().values())
    out = flash_sparse_attn_func(query, key, value, deterministic=True)
    with pytest.raises(RuntimeError):
        out.backward(torch.zeros(1))
    assert torch.are_deterministic_algorithms_enabled()
