"""Decoding on a GPU: window caches and full caches against fp64, graphs, compilers, 8 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from compare import assert_fair, largest_error
from oracles import scores_of_kind, visible_keys
from torch import Tensor

from flash_sparse_attn import (
    KeySelection,
    WindowCache,
    append_kvcache,
    flash_sparse_attn_func,
    flash_sparse_attn_with_kvcache_func,
    select_keys,
)
from flash_sparse_attn.reference import attention_reference

pytestmark = pytest.mark.gpu

DTYPE = torch.bfloat16
FP8 = torch.float8_e4m3fn
STATE = ("key", "value", "score", "position", "threshold", "seen_tokens", "evicted_at")


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


class Text:
    """A text that is read piece by piece, and the truth about it."""

    def __init__(self, length, batch=2, heads=8, kv_heads=2, dim=64, kind="random", dtype=DTYPE):
        generator = torch.Generator().manual_seed(length)
        self.query = randn(batch, length, heads, dim, dtype=dtype)
        self.key = randn(batch, length, kv_heads, dim, dtype=dtype)
        self.value = randn(batch, length, kv_heads, dim, dtype=dtype)
        self.scores = scores_of_kind(kind, (batch, kv_heads, length), generator).cuda()
        self.real: Tensor | None = None

    def piece(self, begin: int, end: int) -> tuple[Tensor, ...]:
        part = slice(begin, end)
        return *(t[:, part] for t in (self.query, self.key, self.value)), self.scores[..., part]

    def mask(self, begin: int, end: int) -> Tensor | None:
        return None if self.real is None else self.real[:, begin:end]

    def attention(self, window: int, dtype: torch.dtype, **keep: int) -> tuple[Tensor, ...]:
        real = None if self.real is None else self.real.cpu()
        mask = visible_keys(self.scores.cpu(), window, "causal", key_mask=real, **keep).cuda()
        tensors = (t.to(dtype) for t in (self.query, self.key, self.value))
        return attention_reference(*tensors, mask, self.scores[:, :, None].to(dtype))[:2]


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("first", "recent", "padded", "kind"),
    [
        (0, 0, False, "random"),
        (0, 0, True, "few values"),
        (5, 0, True, "rising"),
        (3, 40, True, "random"),
        (0, 9, False, "zeros of both signs"),
    ],
)
def test_long_run_of_a_window(first, recent, padded, kind, dtype):
    """Every step is full recomputation; the state is that of the eager cache, bit for bit."""
    length, window = 400, 100
    text = Text(length, kind=kind, dtype=dtype)
    if padded:
        text.real = torch.rand(2, length, device="cuda") < 0.7
    keep = {"keep_first": first, "keep_recent": recent}
    truth, truth_lse = text.attention(window, torch.float64, **keep)
    plain, _ = text.attention(window, dtype, **keep)
    like = {"dtype": dtype, "device": "cuda", **keep}
    cache, eager = (WindowCache(2, 2, 64, window, **like) for _ in range(2))
    outs, lses, begin = [], [], 0
    for size in [1, 1, 3, 70, 8, 1, 2, 60, *[1] * 100, 30, *[1, 4] * 100]:
        end = min(begin + size, length)
        if begin == end:
            break
        options = {"key_mask": text.mask(begin, end), "return_lse": True}
        out, lse = cache.step(*text.piece(begin, end), **options)
        outs.append(out)
        lses.append(lse)
        eager.prefill(*text.piece(begin, end)[1:], key_mask=options["key_mask"])
        begin = end
    mine, others = contents(cache), contents(eager)
    for name in STATE[:-1]:
        assert torch.equal(mine[name], others[name]), name
    # A piece that evicts counts as a whole.
    assert (mine["evicted_at"] <= others["evicted_at"]).all()
    assert_fair(torch.cat(outs, 1), truth, plain)
    assert largest_error(torch.cat(lses, 2), truth_lse) < 5e-3


def test_reordering_and_changed_tokens():
    """Beams continue each other's texts; what is read later changes nothing before."""
    text = Text(150, batch=4)
    cache = WindowCache(4, 2, 64, 50, dtype=DTYPE, device="cuda")
    index = torch.tensor([2, 2, 0, 3], device="cuda")
    cache.step(*text.piece(0, 100), backend="triton")
    other = copy.deepcopy(cache)
    other.reorder(index)
    moved = copy.deepcopy(text)
    for name in ("query", "key", "value", "scores"):
        setattr(moved, name, getattr(text, name)[index])
    for i in range(100, 110):
        out = cache.step(*text.piece(i, i + 1))
        assert torch.equal(other.step(*moved.piece(i, i + 1)), out[index])


@pytest.mark.parametrize("dtype", [DTYPE, FP8])
def test_a_captured_step_is_an_eager_step(dtype):
    text = Text(200)
    cache = WindowCache(2, 2, 64, 60, dtype=dtype, device="cuda", keep_recent=3)
    cache.prefill(*text.piece(0, 100)[1:])
    other = copy.deepcopy(cache)
    token = [t.clone() for t in text.piece(100, 101)]
    real = torch.ones(2, 1, dtype=torch.bool, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles
        copy.deepcopy(cache).step(*token, key_mask=real)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cache.step(*token, key_mask=real)
    for i in range(100, 200):
        for buffer, new in zip(token, text.piece(i, i + 1), strict=True):
            buffer.copy_(new)
        real.copy_(torch.tensor([[i % 5 != 0], [True]]))
        graph.replay()
        expected = other.step(*text.piece(i, i + 1), key_mask=real)
        assert torch.equal(out, expected), i
    for name in STATE:
        mine, others = getattr(cache, name), getattr(other, name)
        assert torch.equal(mine.view(torch.uint8), others.view(torch.uint8)), name


def test_decode_is_step_and_compiles():
    text = Text(140)
    caches = [WindowCache(2, 2, 64, 60, dtype=DTYPE, device="cuda") for _ in range(3)]
    for cache in caches:
        cache.prefill(*text.piece(0, 100)[1:])
    compiled = torch.compile(lambda cache, *token: cache.step(*token), fullgraph=True)
    with torch.no_grad():
        for i in range(100, 106):
            out = caches[0].step(*text.piece(i, i + 1))
            assert torch.equal(caches[1].decode(*text.piece(i, i + 1)), out)
            assert torch.equal(compiled(caches[2], *text.piece(i, i + 1)), out)
    for name in STATE:
        for cache in caches[1:]:
            assert torch.equal(getattr(cache, name), getattr(caches[0], name)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_window_of_eight_bits(dtype):
    """What is stored is what the eager cache stores; the error is that of 8 bits."""
    text = Text(300, dtype=dtype)
    cache = WindowCache(2, 2, 64, 100, dtype=FP8, device="cuda", keep_first=2)
    eager = copy.deepcopy(cache)
    outs = []
    for i in range(0, 300, 4):
        outs.append(cache.step(*text.piece(i, i + 4)))
        for j in range(i, i + 4):
            eager.prefill(*text.piece(j, j + 1)[1:])
    order, others = cache.position.argsort(-1), eager.position.argsort(-1)
    for name in ("position", "score", "key_scale", "value_scale"):
        mine = getattr(cache, name).gather(-1, order)
        torch.testing.assert_close(mine, getattr(eager, name).gather(-1, others), rtol=1e-6, atol=0)
    for name in ("key", "value"):
        rows = [
            getattr(c, name).view(torch.uint8).take_along_dim(o[..., None], 2)
            for c, o in ((cache, order), (eager, others))
        ]
        # Division and rounding may differ in the last bit.
        assert (rows[0] != rows[1]).float().mean() < 1e-3
    truth, _ = text.attention(100, torch.float64, keep_first=2)
    out = torch.cat(outs, 1)
    assert out.dtype == dtype
    assert (out.double() - truth).norm() / truth.norm() < 0.05


def reference_rows(query, keys, values, lengths, mask, bias, dtype, **options):
    """Output and lse of every sequence by the reference."""
    outs, lses = [], []
    for row, length in enumerate(lengths.tolist()):
        part = mask
        if isinstance(mask, KeySelection):
            part = mask.sequence(row, length).to_dense(query.shape[1], options["is_causal"])
        elif mask is not None:
            part = mask[min(row, mask.shape[0] - 1)][None, ..., :length]
        added = None if bias is None else bias[min(row, bias.shape[0] - 1)][None, ..., :length]
        out, lse, _ = attention_reference(
            query[row : row + 1].to(dtype),
            keys[row : row + 1, :length].to(dtype),
            values[row : row + 1, :length].to(dtype),
            part,
            None if added is None else added.to(dtype),
            **options,
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


MASKED = ("none", "keys", "rows", "selection", "shared")
LAYOUTS = (16, 64, 128, 256, "heads first")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(
    ("layout", "masked", "queries"),
    [
        *[("sequences", masked, queries) for masked in MASKED for queries in (1, 5)],
        *[(layout, "none", 1) for layout in LAYOUTS],
        *[(layout, "selection", 5) for layout in LAYOUTS],
    ],
)
def test_full_caches(queries, masked, layout):
    batch, heads, kv_heads, dim, capacity = 4, 8, 2, 128, 1536
    query = randn(batch, queries, heads, dim)
    keys, values = randn(batch, capacity, kv_heads, dim), randn(batch, capacity, kv_heads, dim)
    lengths = torch.tensor([1536, 3, 0, 777], dtype=torch.int32, device="cuda")
    scores = randn(batch, kv_heads, capacity, dtype=torch.float32)
    mask: Tensor | KeySelection | None = None
    bias, is_causal = scores[:, :, None], True
    if masked == "keys":
        mask = torch.rand(batch, 1, 1, capacity, device="cuda") < 0.1
        bias = scores[:1, :1, None]
    elif masked == "rows":
        mask = torch.rand(1, heads, queries, capacity, device="cuda") < 0.02
        bias = randn(batch, 1, queries, capacity, dtype=torch.float16)
    elif masked != "none":
        is_causal = masked == "selection"
        mode = "causal" if is_causal else "shared"
        mask = select_keys(scores, 100, mode=mode, keep_recent=7)
    plain_keys = (keys, values)
    table = None
    if layout != "sequences":
        page_size = 128 if layout == "heads first" else layout
        pages = capacity // page_size
        order = torch.randperm(batch * pages + 5, device="cuda")
        table = order[: batch * pages].view(batch, pages).int()
        stores = []
        for tensor in (keys, values):
            store = torch.full((len(order), page_size, kv_heads, dim), torch.nan).to(tensor)
            store[table.long()] = tensor.view(batch, pages, page_size, kv_heads, dim)
            if layout == "heads first":
                store = store.transpose(1, 2).contiguous().transpose(1, 2)
            stores.append(store)
        keys, values = stores
        past = torch.arange(pages, device="cuda") >= -(-lengths[:, None] // page_size)
        table = table.masked_fill(past, -1)
    arguments = {"cache_seqlens": lengths, "block_table": table, "is_causal": is_causal}
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = flash_sparse_attn_with_kvcache_func(
            query, keys, values, mask, bias, **arguments, softcap=20.0, return_lse=True
        )
    finally:
        torch.cuda.set_sync_debug_mode(0)
    options = {"is_causal": is_causal, "softcap": 20.0}
    truth, truth_lse = reference_rows(
        query, *plain_keys, lengths, mask, bias, torch.float64, **options
    )
    plain, _ = reference_rows(query, *plain_keys, lengths, mask, bias, DTYPE, **options)
    assert_fair(out, truth, plain)
    assert largest_error(lse, truth_lse) < 5e-3


def test_shared_pages_and_appended_tokens():
    """A prefix in pages of its own, shared; every sequence goes on in its own pages."""
    page_size, prompt, kv_heads, dim = 16, 48, 2, 64
    store = [torch.zeros(12, page_size, kv_heads, dim, device="cuda", dtype=DTYPE) for _ in "kv"]
    table = torch.tensor([[7, 2, 9, 0], [7, 2, 9, 5]], dtype=torch.int32, device="cuda")
    slots = (table[0, :3, None].long() * page_size + torch.arange(page_size).cuda()).flatten()
    prefix = [randn(prompt, kv_heads, dim) for _ in "kv"]
    append_kvcache(*prefix, *store, slots)
    new = [randn(2, 4, kv_heads, dim) for _ in "kv"]
    lengths = torch.full((2,), prompt, dtype=torch.int32, device="cuda")
    for i in range(4):
        slots = table[:, 3] * page_size + i
        append_kvcache(*(t[:, i] for t in new), *store, slots.int())
        lengths += 1
        query = randn(2, 1, 4, dim)
        out = flash_sparse_attn_with_kvcache_func(
            query, *store, cache_seqlens=lengths, block_table=table
        )
        keys, values = (
            torch.cat([p.expand(2, -1, -1, -1), n[:, : i + 1]], 1)
            for p, n in zip(prefix, new, strict=True)
        )
        truth, plain = (
            attention_reference(*(t.to(kind) for t in (query, keys, values)))[0]
            for kind in (torch.float64, DTYPE)
        )
        assert_fair(out, truth, plain)


@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_full_caches_of_eight_bits(paged, per_key):
    """Quantised by `append_kvcache`; attention adds no more error than plain PyTorch."""
    batch, capacity, kv_heads, dim, page_size = 2, 512, 2, 128, 64
    pages = batch * capacity // page_size
    shape = (pages, page_size) if paged else (batch, capacity)
    stores = [torch.zeros(*shape, kv_heads, dim, device="cuda", dtype=FP8) for _ in "kv"]
    scales = [
        torch.zeros(*shape, kv_heads, device="cuda")
        if per_key
        else torch.full((kv_heads,), 0.01, device="cuda")
        for _ in "kv"
    ]
    new = [randn(batch * capacity, kv_heads, dim) for _ in "kv"]
    table, slots = None, torch.arange(batch * capacity, device="cuda")
    if paged:
        order = torch.randperm(pages, device="cuda")
        table = order.view(batch, -1).int()
        slots = (order[:, None] * page_size + slots[:page_size]).flatten()
    names = dict(zip(("k_scale", "v_scale"), scales, strict=True))
    append_kvcache(*new, *stores, slots, **names)
    stored = []
    for store, scale, tensor in zip(stores, scales, new, strict=True):
        flat, factor = store.flatten(0, 1)[slots].double(), scale.expand(store.shape[:3])
        flat = flat * factor.flatten(0, 1)[slots][..., None].double()
        assert (flat - tensor.double()).norm() / tensor.double().norm() < 0.04
        stored.append(flat.view(batch, capacity, kv_heads, dim))
    query = randn(batch, 1, 8, dim)
    lengths = torch.tensor([512, 333], dtype=torch.int32, device="cuda")
    out = flash_sparse_attn_with_kvcache_func(
        query, *stores, cache_seqlens=lengths, block_table=table, **names
    )
    truth, _ = reference_rows(query, *stored, lengths, None, None, torch.float64)
    plain, _ = reference_rows(query, *stored, lengths, None, None, DTYPE)
    assert_fair(out, truth, plain)


def test_bad_pages_and_slots(monkeypatch):
    """An error where values are looked at; otherwise no memory but the cache's own is touched."""
    arena = randn(30, 16, 2, 64)
    before = arena.clone()
    store = [arena[10:14], arena[16:20]]
    query = randn(1, 1, 4, 64)
    arena[20:] = torch.nan
    arena[:10] = torch.nan
    lengths = torch.tensor([64], dtype=torch.int32, device="cuda")
    table = torch.tensor([[0, 4, -1, 3]], dtype=torch.int32, device="cuda")
    arguments = {"cache_seqlens": lengths, "block_table": table}
    new = randn(3, 2, 64)
    slots = torch.tensor([64, -2, 5], device="cuda")
    out = flash_sparse_attn_with_kvcache_func(query, *store, **arguments)
    keys, values = (s[[0, 3]].reshape(1, 32, 2, 64).double() for s in store)
    truth, _, _ = attention_reference(query.double(), keys, values)
    assert largest_error(out, truth) < 0.02
    append_kvcache(new, new, *store, slots)
    before[10, 5] = before[16, 5] = new[2]
    assert torch.equal(arena[10:20], before[10:20])
    monkeypatch.setenv("FLASH_SPARSE_ATTN_CHECK", "1")
    with pytest.raises(ValueError, match=r"block_table: expected pages from 0 to 3, got \[-1, 4\]"):
        flash_sparse_attn_with_kvcache_func(query, *store, **arguments)
    with pytest.raises(ValueError, match=r"slot_mapping: expected slots .* got \[-2, 64\]"):
        append_kvcache(new, new, *store, slots)


def test_a_captured_call_reads_lengths_from_the_device():
    query, keys, values = randn(2, 1, 8, 64), randn(2, 2048, 2, 64), randn(2, 2048, 2, 64)
    mask = torch.zeros(2, 1, 1, 2048, dtype=torch.bool, device="cuda")
    lengths = torch.ones(2, dtype=torch.int32, device="cuda")

    def attend():
        return flash_sparse_attn_with_kvcache_func(
            query, keys, values, mask, cache_seqlens=lengths, return_lse=True
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    for size in (1, 100, 2048, 0):
        lengths.copy_(torch.tensor([size, size // 2], dtype=torch.int32))
        mask.copy_(torch.rand_like(mask, dtype=torch.float32) < 0.5)
        query.copy_(randn(2, 1, 8, 64))
        graph.replay()
        for mine, eager in zip(captured, attend(), strict=True):
            assert torch.equal(mine, eager)


@pytest.mark.parametrize("queries", [1, 15])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("mask_shape", "bias_shape"),
    [
        ((1, 1, 1, "K"), (1, 1, 1, "K")),
        ((2, 2, "Q", "K"), None),
        (None, (2, 4, "Q", "K")),
        ((1, 4, "Q", 1), (2, 1, "Q", 1)),
    ],
)
def test_few_queries_of_the_attention_function(mask_shape, bias_shape, is_causal, queries):
    key_len = 3000

    def shape(sizes):
        return [{"Q": queries, "K": key_len}.get(size, size) for size in sizes]

    query = randn(2, queries, 4, 64)
    key, value = randn(2, key_len, 2, 64), randn(2, key_len, 2, 64)
    mask = None if mask_shape is None else torch.rand(shape(mask_shape), device="cuda") < 0.3
    bias = None if bias_shape is None else randn(*shape(bias_shape))
    out, lse = flash_sparse_attn_func(
        query, key, value, mask, bias, is_causal=is_causal, return_lse=True, backend="triton"
    )
    results = [
        attention_reference(
            *(t.to(dtype) for t in (query, key, value)),
            mask,
            None if bias is None else bias.to(dtype),
            is_causal=is_causal,
        )
        for dtype in (torch.float64, DTYPE)
    ]
    assert_fair(out, results[0][0], results[1][0])
    assert largest_error(lse, results[0][1]) < 5e-3


def test_operators_pass_opcheck():
    query, keys = randn(2, 1, 4, 64), randn(2, 128, 2, 64)
    lengths = torch.tensor([128, 70], dtype=torch.int32, device="cuda")
    none = (None,) * 7
    torch.library.opcheck(
        torch.ops.flash_sparse_attn.decode,
        (query, keys, keys.clone(), lengths, *none, 0.125, 0.0, True),
    )
    slots = torch.tensor([3, 200], device="cuda")
    torch.library.opcheck(
        torch.ops.flash_sparse_attn.append,
        (randn(2, 2, 64), randn(2, 2, 64), keys, keys.clone(), slots, None, None),
    )
    cache = WindowCache(2, 2, 64, 20, dtype=DTYPE, device="cuda")
    state = cache.state
    torch.library.opcheck(
        torch.ops.flash_sparse_attn.window_step,
        (
            query,
            randn(2, 1, 2, 64),
            randn(2, 1, 2, 64),
            randn(2, 2, 1, dtype=torch.float32),
            None,
            state.tensors(),
            list(state.sizes),
            0.125,
            0.0,
        ),
    )
