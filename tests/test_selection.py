"""`select_keys` and `KeySelection` against a definition that loops over queries."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from oracles import SCORE_KINDS, scores_of_kind, visible_keys

from flash_sparse_attn import KeySelection, select_keys
from flash_sparse_attn.intervals import NEVER, order_key

KEY_LEN = 37


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def padding(kind: str | None, batch: int, key_len: int, generator) -> torch.Tensor | None:
    if kind is None:
        return None
    index = torch.arange(key_len)
    lengths = torch.tensor([[key_len // 3], [key_len]])[:batch]
    if kind == "left":
        return index >= key_len - lengths
    if kind == "right":
        return index < lengths
    if kind == "none real":
        return torch.zeros(batch, key_len, dtype=torch.bool)
    return torch.rand(batch, key_len, generator=generator) < 0.6


@pytest.mark.parametrize("window_size", [1, 5, KEY_LEN - 1, KEY_LEN, KEY_LEN + 9])
@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_causal_selection_is_the_best_of_every_prefix(kind, window_size, generator):
    scores = scores_of_kind(kind, (2, 3, KEY_LEN), generator)
    dense = select_keys(scores, window_size).to_dense()
    assert torch.equal(dense, visible_keys(scores, window_size, "causal"))


@pytest.mark.parametrize("window_size", [1, 5, KEY_LEN - 1, KEY_LEN, KEY_LEN + 9])
@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("mode", ["shared", "relu"])
def test_choices_that_are_the_same_for_all_queries(mode, is_causal, kind, window_size, generator):
    scores = scores_of_kind(kind, (2, 3, KEY_LEN), generator)
    dense = select_keys(scores, window_size, mode=mode).to_dense(is_causal=is_causal)
    assert torch.equal(dense, visible_keys(scores, window_size, mode, is_causal=is_causal))


@pytest.mark.parametrize("keep", [(0, 0), (3, 0), (0, 4), (2, 5), (KEY_LEN, 0), (0, KEY_LEN + 1)])
@pytest.mark.parametrize("padded", [None, "left", "right", "scattered", "none real"])
@pytest.mark.parametrize("mode", ["causal", "shared", "relu"])
def test_padding_and_kept_keys(mode, padded, keep, generator):
    for kind, window_size in itertools.product(("random", "few values", "equal"), (1, 6, KEY_LEN)):
        scores = scores_of_kind(kind, (2, 2, KEY_LEN), generator)
        options = {
            "key_mask": padding(padded, 2, KEY_LEN, generator),
            "keep_first": keep[0],
            "keep_recent": keep[1],
        }
        dense = select_keys(scores, window_size, mode=mode, **options).to_dense(is_causal=True)
        assert torch.equal(dense, visible_keys(scores, window_size, mode, **options)), kind


def test_padding_may_hold_any_score(generator):
    scores = torch.randn(1, 2, KEY_LEN, generator=generator)
    key_mask = padding("scattered", 1, KEY_LEN, generator)
    expected = select_keys(scores, 5, key_mask=key_mask).to_dense()
    for junk in (torch.inf, -torch.inf, torch.nan, 0.0):
        dirty = scores.masked_fill(~key_mask[:, None], junk)
        assert torch.equal(select_keys(dirty, 5, key_mask=key_mask).to_dense(), expected), junk


@pytest.mark.parametrize("keep", [(0, 0), (2, 3)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", ["causal", "shared", "relu"])
@pytest.mark.parametrize("lengths", [(5, 0, 1, 17, 4), (0, 0, 9), (8,), (0,), (3, 0)])
def test_packed_sequences_are_selected_one_by_one(lengths, mode, padded, keep, generator):
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    total = int(borders[-1])
    key_mask = torch.rand(total, generator=generator) < 0.7 if padded else None
    for kind, window_size in itertools.product(("random", "few values"), (1, 4, 50)):
        scores = scores_of_kind(kind, (2, total), generator)
        options = {"keep_first": keep[0], "keep_recent": keep[1]}
        packed = select_keys(
            scores, window_size, mode=mode, key_mask=key_mask, cu_seqlens=borders, **options
        )
        expected = torch.zeros(2, total, total, dtype=torch.bool)
        for begin, end in itertools.pairwise(borders.tolist()):
            mask = None if key_mask is None else key_mask[None, begin:end]
            part = visible_keys(
                scores[None, :, begin:end], window_size, mode, key_mask=mask, **options
            )
            expected[:, begin:end, begin:end] = part[0]
        assert torch.equal(packed.to_dense(is_causal=True), expected)
        assert packed.start.shape == packed.expiry.shape == scores.shape


def test_long_rows_cross_every_internal_chunk(generator):
    """Longer than any block the implementation may cut the keys into, checked at chosen queries."""
    key_len, window_size = 9000, 40
    scores = scores_of_kind("random", (1, 2, key_len), generator)
    scores[:, 1] = scores_of_kind("few values", (1, key_len), generator)
    selection = select_keys(scores, window_size)
    key_index = torch.arange(key_len)
    for position in [0, 39, 40, 41, 1023, 1024, 2047, 2048, 4095, 4096, 4097, 8191, 8192, 8999]:
        prefix = scores[..., : position + 1]
        expected = visible_keys(prefix, window_size, "causal", query_len=1)[:, :, 0]
        seen = (selection.start <= position) & (position < selection.expiry)
        seen &= key_index <= position
        assert torch.equal(seen[..., : position + 1], expected), position
    assert torch.equal(
        selection.live_keys(), torch.arange(1, key_len + 1).clamp(max=window_size).expand(1, 2, -1)
    )


@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("window_size", [1, 3, KEY_LEN - 1, KEY_LEN])
def test_query_i_sees_exactly_the_smaller_of_its_prefix_and_the_window(
    kind, window_size, generator
):
    scores = scores_of_kind(kind, (2, 2, KEY_LEN), generator)
    dense = select_keys(scores, window_size).to_dense()
    live = torch.arange(1, KEY_LEN + 1).clamp(max=window_size)
    assert torch.equal(dense.sum(-1), live.expand(2, 2, -1))
    assert not dense.triu(diagonal=1).any()


def test_an_evicted_key_never_comes_back(generator):
    dense = select_keys(torch.randn(1, 1, KEY_LEN, generator=generator), 4).to_dense()[0, 0]
    for j in range(KEY_LEN):
        column = dense[j:, j]
        assert not (column[1:] & ~column[:-1]).any()


def test_equal_scores_are_a_sliding_window_or_the_first_keys():
    scores = torch.zeros(1, 1, 6)
    causal = select_keys(scores, 2).to_dense()[0, 0]
    assert causal.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    shared = select_keys(scores, 2, mode="shared").to_dense(is_causal=True)[0, 0]
    assert shared.int().tolist() == [[1, 0, 0, 0, 0, 0]] + [[1, 1, 0, 0, 0, 0]] * 5


def test_a_hand_made_selection():
    #            position  0    1    2    3    4
    scores = torch.tensor([[[3.0, 1.0, 2.0, 2.0, 5.0]]])
    selection = select_keys(scores, 2)
    assert selection.start.tolist() == [[[0, 1, 2, 3, 4]]]
    # 1 leaves when a 2 comes, that 2 when the newer one comes, and that when 5 comes.
    assert selection.expiry.tolist() == [[[NEVER, 2, 3, 4, NEVER]]]
    assert selection.start.dtype == selection.expiry.dtype == torch.int32
    assert selection.score.dtype == torch.float32
    assert selection.is_causal is True
    assert select_keys(scores, 2, mode="shared").is_causal is None
    assert select_keys(scores, 2, mode="relu").is_causal is None


def test_a_key_that_is_never_visible_has_an_empty_interval():
    selection = select_keys(torch.tensor([[[9.0, 8.0, 1.0, 7.0]]]), 2)
    assert selection.start[0, 0, 2] == selection.expiry[0, 0, 2] == 2
    padded = select_keys(torch.tensor([[[9.0, 8.0]]]), 2, key_mask=torch.tensor([[True, False]]))
    assert padded.start[0, 0, 1] == padded.expiry[0, 0, 1]


@pytest.mark.parametrize("query_len", [1, 5, KEY_LEN, KEY_LEN + 6])
@pytest.mark.parametrize("mode", ["causal", "shared", "relu"])
def test_queries_align_to_the_end_of_the_keys(mode, query_len, generator):
    scores = torch.randn(1, 2, KEY_LEN, generator=generator)
    dense = select_keys(scores, 6, mode=mode).to_dense(query_len, is_causal=True)
    expected = visible_keys(scores, 6, mode, query_len=query_len)
    assert torch.equal(dense, expected)


def test_no_keys_and_no_batch():
    assert select_keys(torch.zeros(2, 1, 0), 3).to_dense(4).shape == (2, 1, 4, 0)
    assert select_keys(torch.zeros(0, 1, 5), 3).to_dense().shape == (0, 1, 5, 5)


def test_order_key_puts_numbers_above_nan_above_padding():
    ascending = torch.tensor(
        [-torch.inf, -3.4e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 3.4e38, torch.inf]
    )
    keys = order_key(ascending)
    assert (keys[1:] > keys[:-1]).all()
    assert order_key(torch.tensor(-0.0)) == order_key(torch.tensor(0.0))
    nan_low, nan_high = order_key(torch.tensor([torch.nan, -torch.nan]))
    assert nan_low == nan_high < keys[0]
    padding_key = order_key(torch.full((1, 1, 1), torch.inf), torch.tensor([[False]]))
    assert padding_key < nan_low


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_every_dtype_are_read_in_fp32(dtype, generator):
    scores = torch.randn(1, 2, KEY_LEN, generator=generator).to(dtype)
    selection = select_keys(scores, 5)
    assert torch.equal(selection.to_dense(), select_keys(scores.float(), 5).to_dense())


def test_strided_scores_select_as_contiguous_ones(generator):
    scores = torch.randn(2, KEY_LEN, 3, generator=generator).transpose(1, 2)
    assert torch.equal(
        select_keys(scores, 5).to_dense(), select_keys(scores.contiguous(), 5).to_dense()
    )
    expanded = torch.randn(1, 1, KEY_LEN, generator=generator).expand(2, 3, -1)
    assert torch.equal(select_keys(expanded, 5).to_dense(), visible_keys(expanded, 5, "causal"))


def test_selection_does_not_touch_or_follow_the_scores(generator):
    scores = torch.randn(1, 1, KEY_LEN, generator=generator, requires_grad=True)
    before = scores.detach().clone()
    selection = select_keys(scores, 5)
    assert torch.equal(scores, before)
    assert not any(t.requires_grad for t in (selection.start, selection.expiry, selection.score))
    dense = selection.to_dense()
    with torch.no_grad():
        scores.copy_(scores.flip(-1))
    assert torch.equal(selection.to_dense(), dense)


def test_counts_and_statistics(generator):
    scores = scores_of_kind("few values", (2, 2, KEY_LEN), generator)
    for mode, options in (
        ("causal", {}),
        ("causal", {"keep_first": 2, "keep_recent": 3}),
        ("shared", {}),
        ("relu", {}),
        ("causal", {"key_mask": padding("scattered", 2, KEY_LEN, generator)}),
    ):
        selection = select_keys(scores, 4, mode=mode, **options)
        dense = selection.to_dense(is_causal=True)
        assert torch.equal(selection.live_keys(), dense.sum(-1)), (mode, options)
        pairs = KEY_LEN * (KEY_LEN + 1) / 2 * dense[..., 0, 0].numel()
        assert selection.density() == pytest.approx(dense.sum().item() / pairs)
        statistics = selection.statistics()
        assert statistics["density"] == pytest.approx(selection.density())
        assert statistics["live_keys"] == pytest.approx(dense.sum(-1).double().mean().item())
        query, key = torch.arange(KEY_LEN)[:, None], torch.arange(KEY_LEN)
        age = (dense * (query - key)).sum() / dense.sum()
        assert statistics["age"] == pytest.approx(age.item())
        evicted = (dense[..., :-1, :] & ~dense[..., 1:, :]).sum().item()
        assert statistics["churn"] == pytest.approx(evicted / (4 * KEY_LEN))


def test_tied_counts_real_keys_whose_score_is_not_unique():
    scores = torch.tensor([[[1.0, 2.0, 1.0, 3.0, 2.0, 9.0]]])
    assert select_keys(scores, 2).statistics()["tied"] == pytest.approx(4 / 6)
    key_mask = torch.tensor([[True, True, False, True, True, False]])
    assert select_keys(scores, 2, key_mask=key_mask).statistics()["tied"] == pytest.approx(2 / 4)
    borders = torch.tensor([0, 3, 6], dtype=torch.int32)
    packed = select_keys(scores[0], 2, cu_seqlens=borders)
    assert packed.statistics()["tied"] == pytest.approx(2 / 6)
    assert select_keys(torch.zeros(1, 1, 4), 2).statistics()["tied"] == 1.0


def test_repr_says_shape_window_and_density(generator):
    text = repr(select_keys(torch.randn(2, 3, KEY_LEN, generator=generator), 5))
    for part in ("causal", "2", "3", str(KEY_LEN), "window_size=5", "%"):
        assert part in text


def test_a_selection_is_an_immutable_pytree(generator):
    selection = select_keys(
        torch.randn(1, 2, KEY_LEN, generator=generator),
        5,
        key_mask=padding("right", 1, KEY_LEN, generator),
        keep_first=1,
    )
    with pytest.raises(AttributeError):
        selection.window_size = 3
    leaves, spec = torch.utils._pytree.tree_flatten(selection)
    assert all(leaf is None or isinstance(leaf, torch.Tensor) for leaf in leaves)
    rebuilt = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert isinstance(rebuilt, KeySelection)
    assert torch.equal(rebuilt.to_dense(), selection.to_dense())
    assert (rebuilt.window_size, rebuilt.keep_first) == (5, 1)
    assert torch.equal(copy.deepcopy(selection).to_dense(), selection.to_dense())
    assert torch.equal(selection.to("cpu").to_dense(), selection.to_dense())


def test_a_later_score_never_changes_an_earlier_choice(generator):
    """The leak test of the choice itself; `shared` is labelled as leaking and must fail it."""
    scores = torch.randn(1, 1, KEY_LEN, generator=generator)
    changed = scores.clone()
    changed[..., 20:] = torch.randn(KEY_LEN - 20, generator=generator) + 5
    for mode, leaks in (("causal", False), ("relu", False), ("shared", True)):
        before, after = (
            select_keys(s, 4, mode=mode).to_dense(is_causal=True)[..., :20, :]
            for s in (scores, changed)
        )
        assert torch.equal(before, after) is not leaks, mode
