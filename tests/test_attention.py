"""The attention functions beyond the plain call: selections, packing, caches, autograd, leaks."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from oracles import SCORE_KINDS, check_attention, outputs_and_gradients, scores_of_kind

from flash_sparse_attn import (
    dynamic_mask_attn_func,
    dynamic_mask_attn_varlen_func,
    flash_sparse_attn_func,
    flash_sparse_attn_varlen_func,
    flash_sparse_attn_with_kvcache_func,
    select_keys,
)

INF = float("inf")
CAUSAL_MODES = {
    "window": {},
    "sinks and recent keys": {"keep_first": 2, "keep_recent": 5},
    "relu": {"mode": "relu", "is_causal": True},
}


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def qkv(batch, query_len, key_len, heads, kv_heads, dim, dtype=torch.float32):
    return (
        rand(batch, query_len, heads, dim, dtype=dtype),
        rand(batch, key_len, kv_heads, dim, dtype=dtype),
        rand(batch, key_len, kv_heads, dim, dtype=dtype),
    )


def check_dynamic(inputs, scores, window_size, *, is_causal=None, softcap=None, **options):
    """`dynamic_mask_attn_func`, scores and all, against the reference under the dense mask."""
    key_mask = options.get("key_mask")
    dense = select_keys(scores, window_size, **options).to_dense(
        inputs[0].shape[1], is_causal=is_causal
    )
    assert key_mask is None or not (dense & ~key_mask[:, None, None]).any()

    def attend(query, key, value, bias):
        return dynamic_mask_attn_func(
            query,
            key,
            value,
            bias.squeeze(2),
            window_size,
            is_causal=is_causal,
            softcap=softcap,
            **options,
        )

    return check_attention(attend, *inputs, dense, scores.unsqueeze(2), softcap=softcap)


# Selections


@pytest.mark.parametrize("window_size", [1, 16, 100, 500])
@pytest.mark.parametrize("kind", SCORE_KINDS[:-1])
def test_attention_over_the_best_keys(kind, window_size):
    inputs = qkv(2, 300, 300, 4, 2, 8)
    scores = scores_of_kind(kind, (2, 2, 300), torch.Generator().manual_seed(3)) / 50
    check_dynamic(inputs, scores, window_size)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("mode", ["shared", "relu"])
def test_attention_over_a_choice_that_is_the_same_for_all_queries(mode, is_causal):
    for window_size, options in itertools.product((1, 20, 400), ({}, {"keep_first": 3})):
        inputs = qkv(2, 150, 150, 4, 2, 8)
        check_dynamic(
            inputs, rand(2, 2, 150), window_size, mode=mode, is_causal=is_causal, **options
        )


@pytest.mark.parametrize("mode", ["causal", "shared", "relu"])
@pytest.mark.parametrize("keep", [(0, 0), (4, 0), (0, 30), (3, 70), (200, 200)])
def test_attention_with_kept_keys_and_padding(mode, keep):
    is_causal = None if mode == "causal" else True
    for key_mask in (
        None,
        torch.rand(2, 140) < 0.7,
        torch.arange(140) >= torch.tensor([[50], [0]]),
    ):
        check_dynamic(
            qkv(2, 140, 140, 2, 1, 8),
            rand(2, 1, 140),
            10,
            mode=mode,
            keep_first=keep[0],
            keep_recent=keep[1],
            key_mask=key_mask,
            is_causal=is_causal,
        )


@pytest.mark.parametrize(
    ("query_len", "key_len"),
    [(1, 200), (3, 200), (64, 200), (65, 200), (200, 64), (130, 1), (1, 1)],
)
@pytest.mark.parametrize("mode", ["causal", "shared", "relu"])
def test_fewer_or_more_queries_than_keys(mode, query_len, key_len):
    for is_causal in (None,) if mode == "causal" else (True, False):
        inputs = qkv(2, query_len, key_len, 4, 2, 8)
        for keep_first in (0, 2):
            check_dynamic(
                inputs,
                rand(2, 2, key_len),
                20,
                mode=mode,
                is_causal=is_causal,
                keep_first=keep_first,
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("score_dtype", [None, torch.float32])
def test_attention_over_selections_in_every_dtype(dtype, score_dtype):
    scores = rand(2, 2, 200, dtype=score_dtype or dtype)
    check_dynamic(qkv(2, 200, 200, 4, 2, 16, dtype), scores, 30, softcap=5.0)


def test_a_selection_with_another_bias_or_none():
    """The bias need not be the score: any broadcast shape goes with a selection."""
    inputs = qkv(2, 130, 130, 6, 2, 8)
    selection = select_keys(rand(2, 2, 130), 20)
    dense = selection.to_dense()
    shapes = [None, *itertools.product((1, 2), (1, 2, 6), (1, 130), (1, 130))]
    for shape in shapes:
        bias = None if shape is None else rand(*shape)

        def attend(query, key, value, bias=None):
            return flash_sparse_attn_func(query, key, value, selection, bias)

        check_attention(attend, *inputs, dense, bias)


def test_dynamic_mask_attention_is_selection_plus_bias():
    query, key, value = qkv(2, 90, 90, 4, 2, 8)
    scores = rand(2, 2, 90)
    selection = select_keys(scores, 11)
    expected = flash_sparse_attn_func(query, key, value, selection, scores[:, :, None])
    out, lse = dynamic_mask_attn_func(query, key, value, scores, 11, return_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(
        lse,
        flash_sparse_attn_func(query, key, value, selection, scores[:, :, None], return_lse=True)[
            1
        ],
    )


def test_one_selection_serves_several_calls():
    selection = select_keys(rand(2, 2, 90), 11)
    start, expiry = selection.start.clone(), selection.expiry.clone()
    results = []
    inputs = qkv(2, 90, 90, 4, 2, 8)
    for _ in range(2):
        results.append(
            outputs_and_gradients(
                lambda query, key, value: flash_sparse_attn_func(query, key, value, selection),
                dict(zip(("query", "key", "value"), inputs, strict=True)),
                torch.ones(2, 90, 4, 8),
            )
        )
        flash_sparse_attn_func(*qkv(2, 7, 90, 2, 2, 4), selection)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert torch.equal(selection.start, start) and torch.equal(selection.expiry, expiry)


# Leaks


@pytest.mark.parametrize("length", [40, 200])
@pytest.mark.parametrize("mode", CAUSAL_MODES)
def test_a_changed_token_leaves_earlier_rows_bit_identical(mode, length):
    query, key, value = qkv(1, length, length, 4, 2, 8)
    scores = rand(1, 2, length)
    options = CAUSAL_MODES[mode]

    def run(*tensors):
        return dynamic_mask_attn_func(*tensors, 9, return_lse=True, **options)

    out, lse = run(query, key, value, scores)
    for t in range(0, length, 13):
        for jump in (50.0, -50.0, 0.01):
            changed = [tensor.clone() for tensor in (query, key, value, scores)]
            for tensor in changed[:3]:
                tensor[:, t] += jump
            changed[3][..., t] += jump
            new_out, new_lse = run(*changed)
            assert torch.equal(new_out[:, :t], out[:, :t]), (t, jump)
            assert torch.equal(new_lse[..., :t], lse[..., :t]), (t, jump)
            assert not torch.equal(new_out[:, t], out[:, t])


@pytest.mark.parametrize("mode", CAUSAL_MODES)
def test_no_gradient_reaches_later_tokens(mode):
    length = 150
    inputs = [t.requires_grad_() for t in (*qkv(1, length, length, 4, 2, 8), rand(1, 2, length))]
    out = dynamic_mask_attn_func(*inputs, 9, **CAUSAL_MODES[mode])
    for t in (0, 1, 9, 64, 100, length - 1):
        grad_out = torch.zeros_like(out)
        grad_out[:, : t + 1] = rand(1, t + 1, 4, 8)
        *by_token, by_score = torch.autograd.grad(out, inputs, grad_out, retain_graph=True)
        for grad in by_token:
            assert (grad[:, t + 1 :] == 0).all()
        assert (by_score[..., t + 1 :] == 0).all()
        assert t < 9 or by_token[2][:, : t + 1].abs().sum() > 0


def test_the_shared_choice_leaks_and_says_so():
    """Labelled: one choice for all queries reads the future, although attention is causal."""
    query, key, value = qkv(1, 40, 40, 2, 2, 8)
    scores = rand(1, 2, 40)
    later = scores.clone()
    later[..., 30:] += 10

    def run(scores):
        return dynamic_mask_attn_func(query, key, value, scores, 5, mode="shared", is_causal=True)

    assert not torch.equal(run(scores)[:, :30], run(later)[:, :30])
    assert "future" in select_keys.__doc__


@pytest.mark.parametrize("bias_shape", [(1, 1, 1, 90), (1, 2, 90, 90)])
def test_a_causal_bool_mask_does_not_leak(bias_shape):
    query, key, value = qkv(1, 90, 90, 4, 2, 8)
    mask, bias = torch.rand(1, 2, 90, 90) < 0.5, rand(*bias_shape)
    out = flash_sparse_attn_func(query, key, value, mask, bias, is_causal=True)
    for t in (1, 40, 64, 89):
        changed = [tensor.clone() for tensor in (query, key, value)]
        for tensor in changed:
            tensor[:, t] += 30
        new_bias = bias.clone()
        new_bias[..., t] += 30
        new = flash_sparse_attn_func(*changed, mask, new_bias, is_causal=True)
        assert torch.equal(new[:, :t], out[:, :t])


# Packed sequences

PACKED_LENGTHS = {
    "one": ([9], [9]),
    "ordinary": ([30, 7, 100], [30, 7, 100]),
    "empty and single": ([0, 1, 12, 0], [0, 1, 12, 0]),
    "more keys": ([1, 5, 0, 70], [9, 5, 3, 90]),
    "more queries": ([9, 5, 3, 90], [1, 5, 0, 70]),
    "all empty": ([0, 0], [0, 0]),
}


def borders(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed_mask(mask, query_lengths, key_lengths):
    """Dense masks of the sequences, one behind the other, as one mask of the packed tokens."""
    total = torch.zeros(*mask[0].shape[:2], sum(query_lengths), sum(key_lengths), dtype=torch.bool)
    q = k = 0
    for part, m, n in zip(mask, query_lengths, key_lengths, strict=True):
        total[:, :, q : q + m, k : k + n] = part
        q, k = q + m, k + n
    return total


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", PACKED_LENGTHS)
def test_packed_sequences_attend_to_themselves(lengths, is_causal):
    query_lengths, key_lengths = PACKED_LENGTHS[lengths]
    query, key, value = (t[0] for t in qkv(1, sum(query_lengths), sum(key_lengths), 4, 2, 8))
    cu_seqlens = borders(query_lengths), borders(key_lengths)
    longest = max(query_lengths), max(key_lengths)
    parts = [
        torch.ones(1, 1, m, n, dtype=torch.bool).tril(n - m if is_causal else n)
        for m, n in zip(query_lengths, key_lengths, strict=True)
    ]
    block = packed_mask(parts, query_lengths, key_lengths)
    total_k = sum(key_lengths)
    for key_mask, bias_heads in itertools.product((None, torch.rand(total_k) < 0.7), (0, 1, 2, 4)):
        bias = rand(bias_heads, total_k) if bias_heads else None

        def attend(query, key, value, bias=None, key_mask=key_mask):
            return flash_sparse_attn_varlen_func(
                query[0],
                key[0],
                value[0],
                *cu_seqlens,
                *longest,
                attn_mask=key_mask,
                attn_bias=None if bias is None else bias[0, :, 0],
                is_causal=is_causal,
            )[None]

        mask = block if key_mask is None else block & key_mask
        bias_4d = None if bias is None else bias[None, :, None]
        check_attention(attend, query[None], key[None], value[None], mask, bias_4d)


@pytest.mark.parametrize("keep", [(0, 0), (2, 4)])
@pytest.mark.parametrize("mode", ["causal", "shared", "relu"])
@pytest.mark.parametrize("lengths", PACKED_LENGTHS)
def test_packed_selections_equal_a_loop_over_sequences(lengths, mode, keep):
    query_lengths, key_lengths = PACKED_LENGTHS[lengths]
    query, key, value = (t[0] for t in qkv(1, sum(query_lengths), sum(key_lengths), 4, 2, 8))
    scores = rand(2, sum(key_lengths))
    key_mask = torch.rand(sum(key_lengths)) < 0.8
    options = {"mode": mode, "keep_first": keep[0], "keep_recent": keep[1]}
    is_causal = None if mode == "causal" else True
    cu_q, cu_k = borders(query_lengths), borders(key_lengths)

    def packed(query, key, value, scores):
        return dynamic_mask_attn_varlen_func(
            query,
            key,
            value,
            scores,
            cu_q,
            cu_k,
            max(query_lengths),
            max(key_lengths),
            6,
            key_mask=key_mask,
            is_causal=is_causal,
            **options,
        )

    def loop(query, key, value, scores):
        outs = [query[:0]]
        for (q0, q1), (k0, k1) in zip(
            itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True
        ):
            outs.append(
                dynamic_mask_attn_func(
                    query[None, q0:q1],
                    key[None, k0:k1],
                    value[None, k0:k1],
                    scores[None, :, k0:k1],
                    6,
                    key_mask=key_mask[None, k0:k1],
                    is_causal=is_causal,
                    **options,
                )[0]
            )
        return torch.cat(outs)

    inputs = {"query": query, "key": key, "value": value, "scores": scores}
    grad_out = rand(*query.shape)
    results = outputs_and_gradients(packed, inputs, grad_out)
    expected = outputs_and_gradients(loop, inputs, grad_out)
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-6)


def test_packed_lse_and_neighbours():
    """lse is [H, total_q]; a sequence's rows do not depend on what it is packed with."""
    query, key, value = (t[0] for t in qkv(1, 40, 40, 4, 2, 8))
    cu = borders([15, 25])
    out, lse = flash_sparse_attn_varlen_func(
        query, key, value, cu, cu, 25, 25, is_causal=True, return_lse=True
    )
    assert lse.shape == (4, 40)
    alone, lse_alone = flash_sparse_attn_func(
        query[None, 15:], key[None, 15:], value[None, 15:], is_causal=True, return_lse=True
    )
    assert torch.equal(out[15:], alone[0]) and torch.equal(lse[:, 15:], lse_alone[0])


# Caches of keys


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("masked", ["none", "bool", "selection"])
def test_attention_over_a_cache(query_len, paged, masked):
    capacity, page_size = 24, 8
    query, key, value = qkv(4, query_len, capacity, 4, 2, 8)
    lengths = torch.tensor([24, 17, 3, 5], dtype=torch.int32)
    bias, scores = rand(4, 2, 1, capacity), rand(4, 2, capacity)
    mask = {
        "none": None,
        "bool": torch.rand(4, 1, 1, capacity) < 0.8,
        "selection": select_keys(scores, 6),
    }[masked]
    caches, table = (key.clone(), value.clone()), None
    if not paged:
        for cache in caches:
            for row, length in enumerate(lengths.tolist()):
                cache[row, length:] = torch.nan
    else:
        order = torch.randperm(12)
        table = order.view(4, 3).int()
        caches = tuple(torch.full((12, page_size, 2, 8), torch.nan) for _ in range(2))
        for cache, tensor in zip(caches, (key, value), strict=True):
            cache[order] = tensor.reshape(12, page_size, 2, 8)
    out, lse = flash_sparse_attn_with_kvcache_func(
        query,
        *caches,
        mask,
        bias,
        cache_seqlens=lengths,
        block_table=table,
        is_causal=True,
        return_lse=True,
    )
    for row, length in enumerate(lengths.tolist()):
        part = mask
        if masked == "bool":
            part = mask[row : row + 1, ..., :length]
        elif masked == "selection":
            part = select_keys(scores[row : row + 1, :, :length], 6)
        expected, expected_lse = flash_sparse_attn_func(
            query[row : row + 1],
            key[row : row + 1, :length],
            value[row : row + 1, :length],
            part,
            bias[row : row + 1, ..., :length],
            is_causal=True,
            return_lse=True,
        )
        torch.testing.assert_close(out[row : row + 1], expected)
        torch.testing.assert_close(lse[row : row + 1], expected_lse)


# Autograd


def test_gradients_by_finite_differences():
    inputs = [t.requires_grad_() for t in qkv(1, 6, 9, 4, 2, 3, torch.float64)]
    scores = rand(1, 2, 9, dtype=torch.float64).requires_grad_()
    mask = torch.rand(1, 2, 6, 9) < 0.6
    bias = rand(1, 4, 6, 1, dtype=torch.float64).requires_grad_()

    def masked(query, key, value, bias):
        return flash_sparse_attn_func(query, key, value, mask, bias, is_causal=True, softcap=2.0)

    def selected(query, key, value, scores):
        return dynamic_mask_attn_func(query, key, value, scores, 3, keep_first=1)

    assert torch.autograd.gradcheck(masked, (*inputs, bias))
    assert torch.autograd.gradcheck(selected, (*inputs, scores))


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("needed", [*itertools.product((False, True), repeat=4)])
def test_each_gradient_is_the_same_whichever_are_asked_for(needed, selected):
    """Also: only the bias, or only the value, needs one; or none does."""
    tensors = [*qkv(2, 70, 70, 4, 2, 8), rand(2, 2, 1, 70)]
    mask = select_keys(rand(2, 2, 70), 9) if selected else torch.rand(1, 1, 70, 70) < 0.5
    grad_out = rand(2, 70, 4, 8)
    leaves = [t.clone().requires_grad_() for t in tensors]
    full = flash_sparse_attn_func(*leaves[:3], mask, leaves[3])
    expected = torch.autograd.grad(full, leaves, grad_out)
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(need)
    out = flash_sparse_attn_func(*tensors[:3], mask, tensors[3])
    assert torch.equal(out, full)
    assert out.requires_grad == any(needed)
    if any(needed):
        out.backward(grad_out)
    for tensor, need, grad in zip(tensors, needed, expected, strict=True):
        assert torch.equal(tensor.grad, grad) if need else tensor.grad is None


def test_only_the_scores_learn():
    query, key, value = qkv(1, 50, 50, 2, 1, 8)
    scores = rand(1, 1, 50).requires_grad_()
    dynamic_mask_attn_func(query, key, value, scores, 5).square().sum().backward()
    never_kept = select_keys(scores, 5).expiry == select_keys(scores, 5).start
    assert never_kept.any() and (scores.grad[never_kept] == 0).all()
    assert (scores.grad[~never_kept] != 0).sum() > 5


@pytest.mark.parametrize("selected", [False, True])
def test_second_derivatives_are_refused(selected):
    inputs = [t.requires_grad_() for t in qkv(1, 10, 10, 2, 1, 4)]
    mask = select_keys(rand(1, 1, 10), 4) if selected else None
    out = flash_sparse_attn_func(*inputs, mask)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("global_switch", [False, True])
def test_deterministic_calls_repeat_bit_for_bit(selected, global_switch):
    tensors = [*qkv(2, 150, 150, 4, 2, 8), rand(1, 1, 1, 150)]
    mask = select_keys(rand(2, 2, 150), 20) if selected else torch.rand(1, 1, 150, 150) < 0.5
    if global_switch:
        torch.use_deterministic_algorithms(True)
    inputs = dict(zip(("query", "key", "value", "bias"), tensors, strict=True))
    runs = [
        outputs_and_gradients(
            lambda query, key, value, bias: flash_sparse_attn_func(
                query, key, value, mask, bias, deterministic=None if global_switch else True
            ),
            inputs,
            torch.ones(2, 150, 4, 8),
        )
        for _ in range(3)
    ]
    assert torch.are_deterministic_algorithms_enabled() is global_switch
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in other)


def test_checkpointing_gives_the_same_gradients():
    inputs = dict(zip(("query", "key", "value"), qkv(1, 40, 40, 2, 1, 8), strict=True))
    inputs["bias"] = rand(1, 1, 1, 40)

    def attend(query, key, value, bias):
        return dynamic_mask_attn_func(query, key, value, bias[:, :, 0], 7)

    def checkpointed(**leaves):
        return torch.utils.checkpoint.checkpoint(attend, *leaves.values(), use_reentrant=False)

    grad_out = rand(1, 40, 2, 8)
    plain = outputs_and_gradients(attend, inputs, grad_out)
    again = outputs_and_gradients(checkpointed, inputs, grad_out)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("what", ["mask", "expiry", "query", "bias"])
def test_a_tensor_changed_before_backward_is_noticed(what):
    """Or has no effect; a gradient of something else than was computed is never returned."""
    query, key, value = (t.requires_grad_() for t in qkv(1, 40, 40, 2, 1, 8))
    bias = rand(1, 1, 1, 40)
    selection, mask = select_keys(bias[:, :, 0], 9), torch.rand(1, 1, 40, 40) < 0.5
    tensors = {"mask": mask, "expiry": selection.expiry, "query": query, "bias": bias}
    seen = selection if what == "expiry" else mask
    out = flash_sparse_attn_func(query, key, value, seen, bias)
    grad_out = rand(*out.shape)
    before = torch.autograd.grad(out, key, grad_out, retain_graph=True)[0]
    with torch.no_grad():
        tensors[what].copy_(torch.zeros_like(tensors[what]))
    try:
        after = torch.autograd.grad(out, key, grad_out)[0]
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert torch.equal(before, after)


# Dynamo warns about its own steps while it traces.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_calls_give_the_same_results():
    inputs = dict(zip(("query", "key", "value"), qkv(1, 40, 40, 2, 1, 8), strict=True))
    inputs["scores"] = rand(1, 1, 40)

    def attend(query, key, value, scores):
        return dynamic_mask_attn_func(query, key, value, scores, 7)

    grad_out = rand(1, 40, 2, 8)
    plain = outputs_and_gradients(attend, inputs, grad_out)
    compiled = outputs_and_gradients(torch.compile(attend, backend="eager"), inputs, grad_out)
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


def test_a_call_changes_none_of_its_arguments():
    tensors = [*qkv(2, 80, 80, 4, 2, 8), torch.rand(2, 1, 80, 80) < 0.5, rand(2, 1, 1, 80)]
    before = [t.clone() for t in tensors]
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
    flash_sparse_attn_func(*leaves, is_causal=True).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


# Types and forms


@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_bias_may_have_its_own_dtype(dtype, bias_dtype):
    inputs, bias = qkv(1, 20, 30, 2, 1, 8, dtype), rand(1, 2, 1, 30, dtype=bias_dtype)

    def attend(query, key, value, bias):
        return flash_sparse_attn_func(query, key, value, None, bias)

    check_attention(attend, *inputs, None, bias)


def test_under_autocast_the_scores_keep_their_precision():
    query, key, value = qkv(1, 60, 60, 2, 1, 8)
    scores = rand(1, 1, 60).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dynamic_mask_attn_func(query, key, value.bfloat16().float(), scores, 9)
    assert out.dtype == torch.bfloat16
    explicit = dynamic_mask_attn_func(*(t.bfloat16() for t in (query, key, value)), scores, 9)
    assert torch.equal(out, explicit)
    grads = [torch.autograd.grad(o.float().square().sum(), scores)[0] for o in (out, explicit)]
    assert grads[0].dtype == torch.float32 and torch.equal(*grads)


def test_inputs_of_mixed_dtype_are_cast_under_autocast():
    """As rotary embeddings leave them: query and key in fp32, value in bf16."""
    query, key, value = qkv(1, 20, 20, 2, 1, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_sparse_attn_func(query, key, value.bfloat16())
    expected = flash_sparse_attn_func(query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert torch.equal(out, expected)


def test_what_looks_like_batch_heads_length_is_warned_about():
    with pytest.warns(UserWarning, match=r"\[B, H, S, D\].*\[B, S, H, D\].*transpose\(1, 2\)"):
        flash_sparse_attn_func(*(torch.zeros(1, 8, 300, 4) for _ in range(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash_sparse_attn_func(*(torch.zeros(1, 8, 256, 4) for _ in range(3)))
        flash_sparse_attn_func(*(torch.zeros(1, 300, 300, 1) for _ in range(3)))


@pytest.mark.parametrize("junk", [torch.nan, INF])
@pytest.mark.parametrize(
    "how", ["mask", "bias", "key_mask", "relu", "selection and bias", "selection and pairs"]
)
def test_a_key_that_no_query_sees_may_hold_anything(how, junk):
    """Padding is often not initialised. Seen by one head or batch entry is not seen by another."""
    inputs = qkv(2, 100, 100, 4, 2, 4)
    hidden = torch.rand(2, 2, 100) < 0.3
    if how == "key_mask":
        hidden = hidden[:, :1].expand(2, 2, 100)
    scores = rand(2, 2, 100)

    def attend(query, key, value):
        if how == "mask":
            return flash_sparse_attn_func(query, key, value, ~hidden[:, :, None])
        if how == "bias":
            bias = scores.masked_fill(hidden, -INF)[:, :, None]
            return flash_sparse_attn_func(query, key, value, None, bias)
        if how == "key_mask":
            return dynamic_mask_attn_func(query, key, value, scores, 9, key_mask=~hidden[:, 0])
        if how.startswith("selection"):
            bias = scores.masked_fill(hidden, -INF)[:, :, None]
            if how == "selection and pairs":
                bias = bias.expand(2, 2, 100, 100).repeat_interleave(2, dim=1)
            return flash_sparse_attn_func(query, key, value, select_keys(scores, 30), bias)
        selection = select_keys(scores.abs().masked_fill(hidden, -1.0), 1, mode="relu")
        return flash_sparse_attn_func(query, key, value, selection, is_causal=True)

    clean = dict(zip(("query", "key", "value"), inputs, strict=True))
    unseen = hidden.transpose(1, 2)[..., None]
    dirty = clean | {name: clean[name].masked_fill(unseen, junk) for name in ("key", "value")}
    grad_out = rand(2, 100, 4, 4)
    expected = outputs_and_gradients(attend, clean, grad_out)
    results = outputs_and_gradients(attend, dirty, grad_out)
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], msg=lambda text, n=name: f"{n}: {text}")
