"""Decoding kernels in the interpreter, in fp32, against the fp64 reference and the eager cache."""

from __future__ import annotations

import copy

import pytest
import torch
from compare import largest_error
from interpreter import run_interpreted
from oracles import scores_of_kind
from torch import Tensor

pytest.importorskip("triton")

from flash_sparse_attn import WindowCache, select_keys
from flash_sparse_attn.backends.triton.append import append
from flash_sparse_attn.backends.triton.decode_config import DecodeConfig
from flash_sparse_attn.backends.triton.decode_launch import Keys, attend, step_token
from flash_sparse_attn.backends.triton.inputs import Call
from flash_sparse_attn.intervals import KeySelection
from flash_sparse_attn.quantize import quantize
from flash_sparse_attn.reference import attention_reference

# fp32 throughout: values are of order 1.
TOLERANCE = 3e-6
SMALL = DecodeConfig(block_m=16, block_n=16, num_warps=1, num_stages=1, programs=8)
ONE_SPLIT = DecodeConfig(block_m=16, block_n=16, num_warps=1, num_stages=1, programs=0)


def truth(query, keys, values, mask, bias, row, length, call, is_causal) -> tuple[Tensor, Tensor]:
    """Output and lse of one sequence, by the reference in fp64."""
    if isinstance(mask, KeySelection):
        mask = mask.sequence(row, length).to_dense(query.shape[1], is_causal)
    else:
        mask = _part(mask, row, length, keys.shape[1])
    bias = _part(bias, row, length, keys.shape[1])
    return attention_reference(
        query[row : row + 1].double(),
        keys[row : row + 1, :length].double(),
        values[row : row + 1, :length].double(),
        mask,
        None if bias is None else bias.double(),
        softmax_scale=call.softmax_scale,
        is_causal=is_causal,
        softcap=call.softcap,
    )[:2]


def _part(tensor, row, length, key_len):
    if tensor is None:
        return None
    part = tensor[row : row + 1] if tensor.shape[0] > 1 else tensor
    return part[..., :length] if tensor.shape[3] == key_len else part


def check(
    query, cache, mask=None, bias=None, *, is_causal=True, softcap=0.0, config=SMALL, plain=()
):
    """Every row of a cache against the reference; `plain` are its keys and values without pages."""
    call = Call(0.3, softcap)
    parts = (None, (mask.start, mask.expiry)) if isinstance(mask, KeySelection) else (mask, None)
    out, lse = attend(query, cache, *parts, bias, call, is_causal, config)
    keys, values = plain or (cache.key, cache.value)
    lengths = [keys.shape[1]] * len(query) if cache.lengths is None else cache.lengths.tolist()
    for row, length in enumerate(lengths):
        expected = truth(query, keys, values, mask, bias, row, length, call, is_causal)
        assert largest_error(out[row : row + 1], expected[0], "out") < TOLERANCE
        assert largest_error(lse[row : row + 1], expected[1], "lse") < TOLERANCE


def inputs(batch=2, queries=1, keys=150, heads=4, kv_heads=2, dim=16):
    query = torch.randn(batch, queries, heads, dim)
    key = torch.randn(batch, keys, kv_heads, dim)
    return query, key, torch.randn_like(key)


SHAPES = [
    None,
    (1, 1, 1, 150),
    (2, 2, 1, 150),
    (1, 4, 1, 150),
    (2, 1, "Q", 150),
    (1, 1, "Q", 1),
    (2, 4, "Q", 150),
]


def poisoned(key, value, query, mask=None, bias=None, is_causal=True) -> list[Tensor]:
    """Keys and values with NaN where no row sees them: they must not reach the output."""
    batch, queries, heads, _ = query.shape
    keys, kv_heads = key.shape[1:3]
    visible = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    if is_causal:
        visible = visible.tril(keys - queries)
    if isinstance(mask, KeySelection):
        mask = mask.to_dense(queries, is_causal)
    for part in (mask, None if bias is None else bias > -torch.inf):
        if part is not None:
            visible = visible & part.repeat_interleave(heads // part.shape[1], dim=1)
    seen = visible.unflatten(1, (kv_heads, -1)).any(3).any(2).transpose(1, 2)
    return [t.masked_fill(~seen[..., None], torch.nan) for t in (key, value)]


def _shape(shape, queries):
    return tuple(queries if size == "Q" else size for size in shape)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("bias_shape", SHAPES)
@pytest.mark.parametrize("mask_shape", SHAPES)
def test_masks_and_biases(mask_shape, bias_shape, queries):
    query, key, value = inputs(queries=queries)
    mask = None if mask_shape is None else torch.rand(_shape(mask_shape, queries)) < 0.3
    bias = None if bias_shape is None else torch.randn(_shape(bias_shape, queries))
    if bias is not None:
        bias[..., ::7] = -torch.inf
    key, value = poisoned(key, value, query, mask, bias)
    check(query, Keys(key, value), mask, bias, softcap=0.0 if bias_shape else 1.5)


@pytest.mark.parametrize("config", [SMALL, ONE_SPLIT])
@pytest.mark.parametrize(
    ("queries", "heads", "kv_heads", "dim"),
    [(1, 1, 1, 16), (1, 6, 2, 20), (7, 4, 4, 24), (5, 32, 1, 16), (1, 40, 1, 8), (200, 1, 1, 16)],
)
def test_sizes(queries, heads, kv_heads, dim, config):
    """Groups that do not divide a tile, several tiles, more queries than keys, odd dimensions."""
    query, key, value = inputs(1, queries, 70, heads, kv_heads, dim)
    check(query, Keys(key, value), config=config)
    check(query, Keys(key, value), is_causal=False, config=config)


@pytest.mark.parametrize("mode", ["causal", "shared", "relu"])
@pytest.mark.parametrize("queries", [1, 4])
def test_selections(mode, queries):
    query, key, value = inputs(queries=queries)
    scores = torch.randn(2, 2, 150)
    real = torch.rand(2, 150) < 0.8
    selection = select_keys(scores, 20, mode=mode, key_mask=real, keep_first=2, keep_recent=3)
    lengths = torch.tensor([150, 61], dtype=torch.int32)
    cache = Keys(key, value, lengths)
    for is_causal in (True,) if mode == "causal" else (True, False):
        check(query, cache, selection, scores[:, :, None], is_causal=is_causal)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("page_size", [8, 16, 64])
@pytest.mark.parametrize("heads_first", [False, True])
def test_pages(page_size, heads_first, masked):
    """Pages in any order, shared by sequences; numbers past the lengths mean nothing."""
    pages = -(-150 // page_size)
    query, key, value = inputs(3, 2, pages * page_size)
    key[2], value[2] = key[0], value[0]  # a shared prefix
    lengths = torch.tensor([150, 0, 77], dtype=torch.int32)
    order = torch.randperm(2 * pages + 3)
    table = torch.full((3, pages), 2**31 - 1, dtype=torch.int32)
    shape = (len(order), 2, page_size, 16) if heads_first else (len(order), page_size, 2, 16)
    stores = [torch.full(shape, torch.nan) for _ in range(2)]
    if heads_first:
        stores = [store.transpose(1, 2) for store in stores]
    for row, length in enumerate(lengths.tolist()):
        for i in range(-(-length // page_size)):
            table[row, i] = order[i] if row == 2 else order[row * pages + i]
            for store, tensor in zip(stores, (key, value), strict=True):
                store[int(table[row, i])] = tensor[row, i * page_size : (i + 1) * page_size]
    table[1, 0] = -1
    mask = torch.rand(3, 1, 1, pages * page_size) < 0.4 if masked else None
    cache = Keys(*stores, lengths, table)
    check(query, cache, mask, plain=(key, value))


def test_pages_that_do_not_exist_are_not_read():
    query, key, value = inputs(1, 1, 32)
    store = [t.reshape(2, 16, 2, 16) for t in (key, value)]
    call = Call(0.3)
    lengths = torch.tensor([48], dtype=torch.int32)
    tables = [torch.tensor([[0, bad, 1]], dtype=torch.int32) for bad in (2, -7, 2**31 - 1)]
    out = [
        attend(query, Keys(*store, lengths, t), None, None, None, call, True, SMALL)[0]
        for t in tables
    ]
    whole, _ = attend(query, Keys(key, value), None, None, None, call, True, SMALL)
    for result in out:
        assert (result - whole).abs().max() < TOLERANCE


@pytest.mark.parametrize("per_token", [False, True])
def test_scales(per_token):
    """What is stored times its scale is what is attended to; here without 8 bits' rounding."""
    query, key, value = inputs(keys=48)
    shape = (2, 48, 2) if per_token else (2,)
    scales = [torch.rand(shape) + 0.5 for _ in range(2)]
    factors = [s[..., None] if per_token else s[:, None] for s in scales]
    cache = Keys(key, value, None, None, *scales)
    check(query, cache, plain=(key * factors[0], value * factors[1]))


def test_keys_of_eight_bits():
    """Queries of any size meet keys in fp16, which holds them exactly."""
    query, key, value = inputs(keys=48)
    query *= torch.tensor([1e-9, 1.0, 1e6, 0.0])[:, None]
    (key, k_scale), (value, v_scale) = quantize(key), quantize(value)
    cache = Keys(key, value, None, None, k_scale * 1e-4, v_scale)
    plain = (key.float() * k_scale[..., None] * 1e-4, value.float() * v_scale[..., None])
    out, lse = attend(query, cache, None, None, None, Call(0.3), True, SMALL)
    for row in range(2):
        wanted = truth(query, *plain, None, None, row, 48, Call(0.3), True)
        # The probabilities and queries are rounded to fp16.
        assert largest_error(out[row : row + 1], wanted[0]) < 3e-3
        assert ((lse[row : row + 1] - wanted[1]).abs() / wanted[1].abs()).max() < 1e-3


def test_lengths_and_strides():
    """Ragged lengths, 0 among them; heads first in memory; a batch entry is the same one alone."""
    query, key, value = inputs(4, 2, 90)
    for tensor in (key, value):
        tensor[2, 33:] = torch.nan
    query, key, value = (
        t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)
    )
    lengths = torch.tensor([90, 0, 33, 1], dtype=torch.int32)
    check(query, Keys(key, value, lengths))


def step(cache, query, key, value, scores, mask=None) -> tuple[Tensor, Tensor]:
    """The kernels of every token in turn."""
    results = []
    for i in range(query.shape[1]):
        token = [t[:, i : i + 1] for t in (query, key, value)]
        real = None if mask is None else mask[:, i].to(torch.uint8)
        score = scores[..., i].contiguous()
        results.append(step_token(*token, score, real, cache.state, Call(0.3), SMALL))
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 2)


KINDS = ("rising", "few values", "zeros of both signs")
STATE = ("key", "value", "score", "position", "threshold", "seen_tokens", "evicted_at")


def contents(cache: WindowCache) -> dict[str, Tensor]:
    """The state with the slots in the order of positions, and zeros in those that are empty."""
    order = cache.position.argsort(-1)
    empty = cache.position.gather(-1, order) < 0
    state = {name: getattr(cache, name) for name in ("threshold", "seen_tokens", "evicted_at")}
    for name in ("score", "position"):
        state[name] = getattr(cache, name).gather(-1, order).masked_fill(empty, 0)
    for name in ("key", "value"):
        rows = getattr(cache, name).take_along_dim(order[..., None], dim=2)
        state[name] = rows.masked_fill(empty[..., None], 0)
    return state


@pytest.mark.parametrize(
    ("first", "recent", "padded"), [(0, 0, False), (0, 0, True), (3, 0, False), (2, 3, True)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_a_window(kind, first, recent, padded):
    """Outputs and the whole state after every step are those of the eager cache."""
    length, window, heads, kv_heads, dim = 36, 18, 2, 2, 16
    query, key, value = inputs(2, length, length, heads, kv_heads, dim)
    scores = scores_of_kind(kind, (2, kv_heads, length), torch.Generator().manual_seed(1))
    real = torch.rand(2, length) < 0.7 if padded else None
    eager = WindowCache(2, kv_heads, dim, window, keep_first=first, keep_recent=recent)
    ours = copy.deepcopy(eager)
    begin = 0
    for size in [1, 3, 11, *[1] * 9, 2, *[1] * 10]:
        part = slice(begin, begin + size)
        mask = None if real is None else real[:, part]
        arguments = (query[:, part], key[:, part], value[:, part], scores[..., part])
        options = {"key_mask": mask, "softmax_scale": 0.3, "return_lse": True}
        expected, expected_lse = eager.step(*arguments, **options)
        if size == 11:
            ours.prefill(*arguments[1:], key_mask=mask)
        else:
            out, lse = step(ours, *arguments, mask)
            torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)
            torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=0)
        mine, others = contents(ours), contents(eager)
        for name in STATE:
            assert torch.equal(mine[name], others[name]), (begin, name)
        begin += size


@pytest.mark.parametrize("bias_shape", [(2, 2, 1, 150), (2, 4, "Q", 150)])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("mode", ["causal", "relu"])
def test_hidden_by_selection_and_bias_together(mode, queries, bias_shape):
    """Keys that every row misses, some by the selection and some by the bias, may be NaN."""
    query, key, value = inputs(queries=queries)
    selection = select_keys(torch.randn(2, 2, 150), 40, mode=mode)
    bias = torch.randn(_shape(bias_shape, queries))
    bias.masked_fill_(torch.rand(bias.shape) < 0.5, -torch.inf)
    key, value = poisoned(key, value, query, selection, bias)
    assert 0 < key.isnan().float().mean() < 1
    check(query, Keys(key, value), selection, bias)


def test_hidden_keys_of_eight_bits_may_be_anything():
    query, key, value = inputs(keys=48)
    bias = torch.zeros(1, 1, 1, 48)
    bias[..., ::3] = -torch.inf
    plain = poisoned(key, value, query, bias=bias)
    stored = [quantize(tensor) for tensor in plain]
    cache = Keys(stored[0][0], stored[1][0], None, None, stored[0][1], stored[1][1])
    assert cache.value_scale.isnan().any()
    out, _ = attend(query, cache, None, None, bias, Call(0.3), True, SMALL)
    for row in range(2):
        wanted = truth(query, key, value, None, bias, row, 48, Call(0.3), True)
        assert largest_error(out[row : row + 1], wanted[0]) < 0.1


def test_what_left_the_window_may_be_anything():
    """A key that is evicted in this step, and one of a text that was forgotten."""
    window, length = 4, 12
    query, key, value = inputs(1, length, length, 2, 1)
    scores = torch.arange(length, dtype=torch.float32).expand(1, 1, -1).clone()
    eager, ours = (WindowCache(1, 1, 16, window) for _ in range(2))
    for cache in (eager, ours):
        nan = torch.full((1, 2, 1, 16), torch.nan)
        cache.prefill(nan, nan, torch.zeros(1, 1, 2))
        cache.reset()
        cache.prefill(key[:, :4], value[:, :4], scores[..., :4])
        cache.key[:, :, :2] = torch.nan  # the next ones to be evicted
        cache.value[:, :, :2] = torch.nan
    rest = [t[:, 4:] for t in (query, key, value)]
    out, _ = step(ours, *rest, scores[..., 4:])
    parts = [
        eager.step(*(t[:, i : i + 1] for t in rest), scores[..., 4 + i, None], softmax_scale=0.3)
        for i in range(8)
    ]
    torch.testing.assert_close(out, torch.cat(parts, 1), atol=2e-5, rtol=0, equal_nan=True)
    assert out[:, :1].isnan().all() and not out[:, 1:].isnan().any()


def test_a_token_whose_score_hides_it_may_be_anything():
    """It is stored while there is room, and seen by nobody."""
    query, key, _ = inputs(1, 6, 6, 2, 1)
    scores = torch.randn(1, 1, 6)
    scores[..., [1, 4]], hidden = -torch.inf, key.clone()
    hidden[:, [1, 4]] = torch.nan
    eager, ours = (WindowCache(1, 1, 16, 8) for _ in range(2))
    out, _ = step(ours, query, hidden, hidden, scores)
    expected = truth(query, key, key, None, scores[:, :, None], 0, 6, Call(0.3), True)[0]
    assert largest_error(out, expected, "out") < TOLERANCE
    out = eager.step(query, hidden, hidden, scores, softmax_scale=0.3)
    assert largest_error(out, expected, "out") < TOLERANCE


def test_padding_may_hold_anything():
    cache = WindowCache(1, 1, 16, 4)
    query, key, value = inputs(1, 3, 3, 2, 1)
    step(cache, query[:, :1], key[:, :1], value[:, :1], torch.zeros(1, 1, 1))
    before = copy.deepcopy(cache)
    nan = torch.full((1, 1, 1, 16), torch.nan)
    mask = torch.zeros(1, 1, dtype=torch.bool)
    out, _ = step(cache, query[:, 1:2], nan, nan, nan[..., 0], mask)
    assert largest_error(out, value[:, :1].expand(-1, -1, 2, -1).double()) < TOLERANCE
    for name in STATE:
        assert torch.equal(getattr(cache, name), getattr(before, name)), name


@pytest.mark.parametrize("heads_first", [False, True])
def test_append(heads_first):
    """Every slot gets its token, nothing else changes, and slots that do not exist are skipped."""
    pages, page_size, heads, dim = 3, 4, 10, 12
    key, value = (torch.randn(7, heads, dim) for _ in range(2))
    shape = (pages, heads, page_size, dim) if heads_first else (pages, page_size, heads, dim)
    stores = [torch.zeros(shape) for _ in range(2)]
    if heads_first:
        stores = [store.transpose(1, 2) for store in stores]
    expected = [store.clone() for store in stores]
    slots = torch.tensor([5, -1, 0, 11, 12, -(2**31), 2])
    append(key, value, *stores, slots, None, None)
    for new, store, want in zip((key, value), stores, expected, strict=True):
        for token, slot in enumerate(slots.tolist()):
            if 0 <= slot < pages * page_size:
                want[slot // page_size, slot % page_size] = new[token]
        assert torch.equal(store, want)


run_interpreted(globals())
