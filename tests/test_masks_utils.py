"""`create_mask` and its parts against a definition that loops over rows; packing and padding."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles import SCORE_KINDS, best_keys, scores_of_kind, visible_keys

from flash_sparse_attn import flash_sparse_attn_func, flash_sparse_attn_varlen_func, select_keys
from flash_sparse_attn.utils import mask as masks
from flash_sparse_attn.utils import padding

B, HKV, Q, K = 2, 2, 7, 11
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


def causal(query_len: int = Q, key_len: int = K) -> torch.Tensor:
    index = torch.arange(query_len)[:, None] + key_len - query_len
    return (torch.arange(key_len) <= index)[None, None]


def create(bias, mask, window_size, query_len=Q, **options):
    return masks.create_mask(bias, mask, B, query_len, K, window_size, LOWEST, **options)


def given_masks(generator) -> dict[str, torch.Tensor | None]:
    scattered = torch.rand(B, HKV, Q, K, generator=generator) < 0.6
    return {
        "none": None,
        "per key": torch.rand(B, K, generator=generator) < 0.6,
        "per query": torch.rand(B, Q, generator=generator) < 0.6,
        "causal": causal(),
        "full": scattered,
        "one row": scattered[:, :, :1],
        "one column": scattered[..., :1],
        "nothing": torch.zeros(1, 1, 1, 1, dtype=torch.bool),
    }


def as_4d(mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)
    if mask.dim() == 2 and mask.shape[1] == Q:
        mask = torch.cat([torch.ones(B, K - Q, dtype=torch.bool), mask], dim=1)
    return mask if mask.dim() == 4 else mask[:, None, None]


@pytest.mark.parametrize("window_size", [1, 4, K - 1, K, K + 5])
@pytest.mark.parametrize("rows", [1, Q])
@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_topk_keeps_the_best_allowed_keys(kind, rows, window_size, generator):
    bias = scores_of_kind(kind, (B, HKV, rows, K), generator)
    for name, mask in given_masks(generator).items():
        chosen = create(bias, mask, window_size)
        allowed = as_4d(mask)
        newer_wins = allowed.shape[2] == Q
        expected = best_keys(bias, allowed, window_size, newer_wins, LOWEST)
        assert chosen.dtype == torch.bool
        assert torch.equal(chosen, expected), name


@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_relu_keeps_the_allowed_keys_above_zero(kind, generator):
    bias = scores_of_kind(kind, (B, HKV, 1, K), generator)
    for name, mask in given_masks(generator).items():
        chosen = create(bias, mask, 1, type="relu")
        assert torch.equal(chosen, (bias > 0) & as_4d(mask)), name


@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("window_size", [1, 3, K])
def test_the_same_choice_as_select_keys(kind, window_size, generator):
    scores = scores_of_kind(kind, (B, HKV, K), generator)
    bias = scores[:, :, None]
    per_query = masks.create_mask(bias, causal(K, K), B, K, K, window_size, LOWEST)
    assert torch.equal(per_query, select_keys(scores, window_size).to_dense())
    assert torch.equal(per_query, visible_keys(scores, window_size, "causal"))
    shared = masks.create_mask(bias, None, B, K, K, window_size, LOWEST)
    selection = select_keys(scores, window_size, mode="shared")
    assert torch.equal(shared.expand(B, HKV, K, K), selection.to_dense(is_causal=False))


@pytest.mark.parametrize("kind", ["random", "equal", "few values"])
def test_one_query_chooses_as_the_last_row_of_a_causal_mask(kind, generator):
    """A decoding step must agree with the prefill that ends at the same token, ties included."""
    bias = scores_of_kind(kind, (B, HKV, 1, K), generator)
    last_row = create(bias, causal(), 4)[:, :, -1:]
    for mask in (
        None,
        torch.ones(B, K, dtype=torch.bool),
        torch.ones(B, 1, 1, K, dtype=torch.bool),
    ):
        assert torch.equal(create(bias, mask, 4, query_len=1), last_row)


def test_equal_biases_leave_no_causal_row_without_a_key():
    bias = torch.zeros(1, 1, 1, K)
    shared = masks.create_mask(bias, None, 1, K, K, 2, LOWEST) & causal(K, K)
    assert shared.any(-1).all()
    per_query = masks.create_mask(bias, causal(K, K), 1, K, K, 2, LOWEST)[0, 0]
    assert torch.equal(per_query, torch.ones(K, K, dtype=torch.bool).tril().triu(-1))


def test_nan_ranks_last_and_the_marked_value_is_never_chosen():
    bias = torch.tensor([torch.nan, LOWEST, -torch.inf, 2.0, torch.nan]).view(1, 1, 1, 5)

    def chosen(window_size, **options):
        mask = masks.create_mask(bias, None, 1, 3, 5, window_size, LOWEST, **options)
        return mask.int().flatten().tolist()

    assert chosen(1) == [0, 0, 0, 1, 0]
    assert chosen(2) == [0, 0, 1, 1, 0]
    assert chosen(3) == [1, 0, 1, 1, 0]
    assert chosen(5) == [1, 0, 1, 1, 1]
    assert chosen(1, type="relu") == [0, 0, 0, 1, 0]
    masked = masks.create_mask(bias.clamp(min=0), None, 1, 3, 5, 5, 0.0)
    assert not masked[0, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_marked_value_may_come_from_any_dtype(dtype):
    lowest = torch.finfo(dtype).min
    bias = torch.tensor([1.0, lowest, 0.5, lowest], dtype=dtype).view(1, 1, 1, 4)
    if dtype == torch.float64:
        bias = bias.clamp(min=LOWEST)
        lowest = LOWEST
    assert masks.create_mask(bias, None, 1, 4, 4, 3, lowest).int().flatten().tolist() == [
        1,
        0,
        1,
        0,
    ]


def smooth_rows(rows, key_len, block_size, allowed):
    """The definition of block smoothing, one row and one block at a time."""
    result = torch.zeros_like(rows)
    for index in itertools.product(*(range(n) for n in rows.shape[:-1])):
        row = rows[index].tolist()
        for begin in range(0, key_len, block_size):
            block = row[begin : begin + block_size]
            if 2 * sum(block) > len(block):
                result[index][begin : begin + len(block)] = True
        result[index] &= allowed[index]
        if not result[index].any():
            result[index] = rows[index]
    return result


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, K, K + 3])
def test_smoothing_is_a_strict_majority_that_enables_no_forbidden_key(block_size, generator):
    for kind, rows, type_ in itertools.product(("random", "few values"), (1, Q), ("topk", "relu")):
        bias = scores_of_kind(kind, (B, HKV, rows, K), generator)
        for name, mask in given_masks(generator).items():
            sharp = create(bias, mask, 6, type=type_)
            smooth = create(bias, mask, 6, block_size=block_size, type=type_)
            allowed = as_4d(mask).expand_as(sharp)
            assert torch.equal(smooth, smooth_rows(sharp, K, block_size, allowed)), name
            assert not (smooth & ~allowed).any(), name
            assert torch.equal(smooth.any(-1), sharp.any(-1)), name


def test_smoothing_by_hand():
    row = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    assert masks.block_smooth(row, 9, 4).int().tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert masks.block_smooth(row, 9, 3).int().tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0]
    assert row.int().tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 1]
    # Half of a block is no majority; a row is not emptied.
    assert masks.block_smooth(row[:4], 4, 4).int().tolist() == [1, 1, 0, 0]


def test_topk_indices_are_sorted_and_clamped():
    bias = torch.tensor([[[0.0, 3.0, 1.0, 3.0, 2.0]]])
    assert masks.topk_indices(bias, 2).tolist() == [[[1, 3]]]
    assert masks.topk_indices(bias, 1).tolist() == [[[1]]]
    assert masks.topk_indices(bias, 99).tolist() == [[[0, 1, 2, 3, 4]]]
    assert masks.topk_indices(torch.zeros(1, 1, 5), 2).tolist() == [[[0, 1]]]


def test_masks_do_not_change_their_inputs_or_carry_gradients(generator):
    bias = torch.randn(B, HKV, 1, K, generator=generator, requires_grad=True)
    mask = given_masks(generator)["full"]
    bias_before, mask_before = bias.detach().clone(), mask.clone()
    chosen = create(bias, mask, 4, block_size=2)
    assert not chosen.requires_grad
    assert torch.equal(bias, bias_before) and torch.equal(mask, mask_before)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"type": "median"}, ValueError, ["type", "topk", "relu", "median"]),
        ({"window_size": 0}, ValueError, ["window_size", "at least 1", "0"]),
        ({"window_size": 2.5}, TypeError, ["window_size", "int", "2.5"]),
        ({"block_size": 0}, ValueError, ["block_size", "at least 1", "0"]),
        ({"block_size": -2}, ValueError, ["block_size", "at least 1", "-2"]),
        ({"attention_bias": torch.zeros(B, HKV, K)}, ValueError, ["attention_bias", "4", str(K)]),
        ({"attention_bias": torch.zeros(B, HKV, 1, K + 1)}, ValueError, ["attention_bias", "12"]),
        ({"attention_bias": torch.zeros(3, HKV, 1, K)}, ValueError, ["attention_bias", "3, 2"]),
        ({"attention_bias": torch.zeros(B, HKV, 3, K)}, ValueError, ["attention_bias", "3, 11"]),
        (
            {"attention_bias": torch.zeros(B, HKV, 1, K, dtype=torch.int32)},
            TypeError,
            ["attention_bias", "floating", "int32"],
        ),
        (
            {"attention_mask": torch.ones(B, K, dtype=torch.int64)},
            TypeError,
            ["attention_mask", "bool", "int64"],
        ),
        (
            {"attention_mask": torch.ones(B, K)},
            TypeError,
            ["attention_mask", "torch.bool", "float32"],
        ),
        (
            {"attention_mask": torch.ones(B, 9, dtype=torch.bool)},
            ValueError,
            ["attention_mask", "(2, 11)", "(2, 7)", "(2, 9)"],
        ),
        (
            {"attention_mask": torch.ones(3, K, dtype=torch.bool)},
            ValueError,
            ["attention_mask", "(3, 11)"],
        ),
        (
            {"attention_mask": torch.ones(B, 3, 1, K, dtype=torch.bool)},
            ValueError,
            ["attention_mask", "(2, 3, 1, 11)"],
        ),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {
        "attention_bias": torch.zeros(B, HKV, 1, K),
        "attention_mask": None,
        "batch_size": B,
        "query_len": Q,
        "key_len": K,
        "window_size": 4,
        "min_dtype": LOWEST,
    }
    with pytest.raises(error) as caught:
        masks.create_mask(**{**arguments, **change})
    for word in words:
        assert word in str(caught.value)


PADDING_MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_packing_by_hand(dtype):
    hidden = torch.arange(24.0).view(3, 4, 2).requires_grad_()
    packed, indices, cu_seqlens, longest, used = padding.unpad_input(hidden, PADDING_MASK.to(dtype))
    assert indices.tolist() == [0, 1, 9, 10, 11]
    assert cu_seqlens.tolist() == [0, 2, 2, 5] and cu_seqlens.dtype == torch.int32
    assert longest == 3 and isinstance(longest, int)
    assert used.tolist() == [2, 0, 3] and used.dtype == torch.int32
    assert torch.equal(packed, hidden.flatten(0, 1)[indices])
    restored = padding.pad_input(packed, indices, 3, 4)
    assert torch.equal(restored, hidden * (PADDING_MASK != 0)[..., None])
    restored.backward(torch.ones_like(restored))
    assert torch.equal(hidden.grad, (PADDING_MASK != 0)[..., None].float().expand(3, 4, 2))


def test_unused_places_are_packed_but_not_counted():
    hidden = torch.arange(12.0).view(3, 4, 1)
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    packed, indices, cu_seqlens, longest, used = padding.unpad_input(hidden, PADDING_MASK, unused)
    assert indices.tolist() == [0, 1, 2, 8, 9, 10, 11]
    assert cu_seqlens.tolist() == [0, 3, 3, 7] and longest == 4
    assert used.tolist() == [2, 0, 3]
    assert packed.flatten().tolist() == [0, 1, 2, 8, 9, 10, 11]


def test_get_unpad_data_of_nothing():
    indices, cu_seqlens, longest = padding.get_unpad_data(torch.zeros(2, 3, dtype=torch.bool))
    assert indices.tolist() == [] and cu_seqlens.tolist() == [0, 0, 0] and longest == 0
    assert padding.get_unpad_data(torch.zeros(0, 3, dtype=torch.bool))[1].tolist() == [0]


@pytest.mark.parametrize("query_len", [1, 3, 5])
@pytest.mark.parametrize("cache_len", [5, 8])
def test_packed_attention_equals_padded_attention(query_len, cache_len, generator):
    """Left padding, queries at the end, keys perhaps in a longer preallocated cache."""
    heads, kv_heads, dim, key_len = 4, 2, 8, 5
    query = torch.randn(3, query_len, heads, dim, generator=generator)
    key, value = torch.randn(2, 3, cache_len, kv_heads, dim, generator=generator)
    mask = torch.tensor([[0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
    q, k, v, indices_q, cu_seqlens, longest = padding.upad_input(query, key, value, mask, query_len)
    packed = flash_sparse_attn_varlen_func(q, k, v, *cu_seqlens, *longest, is_causal=True)
    if query_len == 1:
        out = packed.unsqueeze(1)
        assert indices_q.tolist() == [0, 1, 2]
    else:
        out = padding.pad_input(packed, indices_q, 3, query_len)
    expected = flash_sparse_attn_func(
        query, key[:, :key_len], value[:, :key_len], mask[:, None, None], is_causal=True
    )
    real = mask[:, key_len - query_len :]
    torch.testing.assert_close(out[real], expected[real], rtol=1e-5, atol=1e-6)
    assert (out[~real] == 0).all()


def test_upad_input_uses_the_given_packing_function(generator):
    query = torch.randn(3, 2, 1, 4, generator=generator)
    key = torch.randn(3, 4, 1, 4, generator=generator)
    calls = []

    def pack(hidden, mask):
        calls.append(mask.tolist())
        return padding.unpad_input(hidden, mask)

    padding.upad_input(query, key, key, PADDING_MASK, 2, pack)
    assert calls == [PADDING_MASK[:, -2:].tolist()]


def test_bad_padding_arguments_are_named(generator):
    hidden = torch.zeros(3, 4, 2)
    with pytest.raises(ValueError, match=r"attention_mask.*\(3, 4\).*\(3, 5\)"):
        padding.unpad_input(hidden, torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"unused_mask.*\(3, 4\).*\(2, 4\)"):
        padding.unpad_input(hidden, PADDING_MASK, PADDING_MASK[:2])
    with pytest.raises(ValueError, match=r"attention_mask.*integer.*float32"):
        padding.get_unpad_data(torch.ones(3, 4))
    query, key = torch.zeros(3, 2, 1, 4), torch.zeros(3, 4, 1, 4)
    with pytest.raises(ValueError, match=r"query_length.*2.*got 3"):
        padding.upad_input(query, key, key, PADDING_MASK, 3)
    with pytest.raises(ValueError, match=r"attention_mask.*K = 3.*\(3, 4\)"):
        padding.upad_input(query, key[:, :3], key[:, :3], PADDING_MASK, 2)
