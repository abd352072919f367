"""`WindowCache`: whatever the pieces a text arrives in, the result is that of the whole text."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from compare import assert_fair
from oracles import scores_of_kind, visible_keys

from flash_sparse_attn import WindowCache, dynamic_mask_attn_func, select_keys
from flash_sparse_attn.backends import eager_window
from flash_sparse_attn.reference import attention_reference

# What no kernel takes, such as fp32, runs on the eager backend, which warns on a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:attention runs on the eager backend")

BATCH, HEADS, KV_HEADS, DIM, LENGTH, WINDOW = 2, 4, 2, 8, 50, 6
STATE = ("key", "value", "score", "position", "threshold", "seen_tokens", "evicted_at")
KEPT = [(0, 0), (3, 0), (0, 4), (2, 3), (0, 9)]
KINDS = ("random", "equal", "rising", "falling", "few values", "zeros of both signs", "some hidden")


@dataclass
class Text:
    """What a whole text consists of, and the truth about it."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scores: torch.Tensor
    key_mask: torch.Tensor | None = None

    def piece(self, begin: int, end: int) -> dict[str, torch.Tensor | None]:
        mask = None if self.key_mask is None else self.key_mask[:, begin:end]
        return {
            "query": self.query[:, begin:end],
            "key": self.key[:, begin:end],
            "value": self.value[:, begin:end],
            "scores": self.scores[:, :, begin:end],
            "key_mask": mask,
        }

    def reordered(self, index: torch.Tensor) -> Text:
        mask = None if self.key_mask is None else self.key_mask[index]
        return Text(self.query[index], self.key[index], self.value[index], self.scores[index], mask)

    def visible(self, window_size: int = WINDOW, **keep: int) -> torch.Tensor:
        mask = None if self.key_mask is None else self.key_mask.cpu()
        return visible_keys(self.scores.cpu(), window_size, "causal", key_mask=mask, **keep)

    def attention(self, visible: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        tensors = (t.to(dtype) for t in (self.query, self.key, self.value))
        bias = self.scores[:, :, None].to(dtype)
        return attention_reference(*tensors, visible.to(bias.device), bias)[:2]


def make_text(kind="random", *, padded=None, length=LENGTH, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(BATCH, length, heads, DIM, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    if kind == "some hidden":
        scores = torch.randn(BATCH, KV_HEADS, length, generator=generator)
        scores = scores.masked_fill(torch.rand(scores.shape, generator=generator) < 0.3, -torch.inf)
    else:
        scores = scores_of_kind(kind, (BATCH, KV_HEADS, length), generator)
    mask = None
    if padded == "left":
        mask = torch.arange(length) >= torch.tensor([[length // 2], [0]])
    elif padded == "scattered":
        mask = torch.rand(BATCH, length, generator=generator) < 0.6
    query, key, value = (t.to(device, dtype) for t in (query, key, value))
    return Text(query, key, value, scores.to(device), None if mask is None else mask.to(device))


def make_cache(window_size=WINDOW, dtype=torch.float32, device="cpu", **keep):
    return WindowCache(BATCH, KV_HEADS, DIM, window_size, dtype=dtype, device=device, **keep)


def pieces(length: int, sizes: list[int]):
    begin = 0
    while begin < length:
        for size in sizes:
            if begin < length:
                yield begin, min(begin + size, length)
            begin += size


def prefill(cache: WindowCache, text: Text, begin: int = 0, end: int = LENGTH) -> None:
    piece = text.piece(begin, end)
    piece.pop("query")
    cache.prefill(**piece)


def contents(cache: WindowCache) -> dict[str, torch.Tensor]:
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


def assert_same_contents(cache: WindowCache, other: WindowCache, names=STATE) -> None:
    mine, others = contents(cache), contents(other)
    for name in names:
        assert torch.equal(mine[name], others[name]), name


def assert_unchanged(cache: WindowCache, before: WindowCache) -> None:
    for name in STATE:
        assert torch.equal(getattr(cache, name), getattr(before, name)), name


def assert_holds_what_is_visible(cache: WindowCache, text: Text, seen: torch.Tensor) -> None:
    """The slots hold the keys of ``seen [B, Hkv, K]`` and nothing else."""
    if text.key_mask is None:
        number = torch.arange(seen.shape[-1]).expand(BATCH, -1)
    else:
        number = text.key_mask.cpu().cumsum(-1) - 1
    state = {name: getattr(cache, name).cpu() for name in STATE}
    for b in range(BATCH):
        for h in range(KV_HEADS):
            position = state["position"][b, h]
            slots = position.argsort()[(position < 0).sum() :]
            keys = seen[b, h].nonzero().flatten()
            assert position[slots].tolist() == number[b, keys].tolist()
            assert torch.equal(state["key"][b, h, slots], text.key[b, :, h].cpu()[keys])
            assert torch.equal(state["value"][b, h, slots], text.value[b, :, h].cpu()[keys])
            assert torch.equal(state["score"][b, h, slots], text.scores[b, h].cpu()[keys])


@pytest.mark.parametrize("padded", [None, "left", "scattered"])
@pytest.mark.parametrize(("keep_first", "keep_recent"), KEPT)
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_full_recomputation(kind, keep_first, keep_recent, padded, device):
    keep = {"keep_first": keep_first, "keep_recent": keep_recent}
    text = make_text(kind, padded=padded, device=device)
    visible = text.visible(**keep)
    truth, truth_lse = text.attention(visible, torch.float64)
    plain, _ = text.attention(visible, torch.float32)
    cache = make_cache(device=device, **keep)
    for begin, end in pieces(LENGTH, [1, 1, 3, 1, 13, 2, 1]):
        out, lse = cache.step(**text.piece(begin, end), return_lse=True)
        assert_fair(out, truth[:, begin:end], plain[:, begin:end])
        torch.testing.assert_close(lse.double(), truth_lse[:, :, begin:end], atol=1e-5, rtol=1e-5)
        assert_holds_what_is_visible(cache, text, visible[:, :, end - 1, :end])
    real = LENGTH if text.key_mask is None else text.key_mask.sum(-1)
    assert (cache.seen_tokens == real).all()


@pytest.mark.parametrize("padded", [None, "scattered"])
def test_equals_the_public_function(padded):
    text = make_text(padded=padded)
    keep = {"keep_first": 2, "keep_recent": 3}
    whole = dynamic_mask_attn_func(
        text.query,
        text.key,
        text.value,
        text.scores,
        WINDOW,
        key_mask=text.key_mask,
        softmax_scale=0.7,
        softcap=1.5,
        **keep,
    )
    cache = make_cache(**keep)
    steps = [
        cache.step(**text.piece(a, b), softmax_scale=0.7, softcap=1.5)
        for a, b in pieces(LENGTH, [1, 4])
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("keep_first", "keep_recent"), KEPT)
@pytest.mark.parametrize("kind", ["random", "equal", "few values"])
def test_state_does_not_depend_on_the_pieces(kind, keep_first, keep_recent):
    text = make_text(kind, padded="scattered")
    caches = []
    for sizes in ([LENGTH], [1], [7], [16], [3, 20, 1]):
        for read in ("prefill", "step"):
            cache = make_cache(keep_first=keep_first, keep_recent=keep_recent)
            for begin, end in pieces(LENGTH, sizes):
                if read == "step":
                    cache.step(**text.piece(begin, end))
                else:
                    prefill(cache, text, begin, end)
            caches.append(cache)
    for cache in caches[1:]:
        assert_same_contents(caches[0], cache, STATE[:-1])


def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    text = make_text("few values", padded="scattered")
    whole, parts = make_cache(keep_recent=2), make_cache(keep_recent=2)
    prefill(whole, text)
    monkeypatch.setattr(eager_window, "_PIECE", 7)
    prefill(parts, text)
    assert_same_contents(whole, parts, STATE[:-1])


def test_a_single_token_is_a_short_piece():
    """The short cut for one token, and the general way with a piece of padding behind it."""
    text = make_text("few values")
    one, general = make_cache(keep_recent=2), make_cache(keep_recent=2)
    real = torch.tensor([[True, False]]).expand(BATCH, -1)
    for i in range(LENGTH):
        token = {name: t for name, t in text.piece(i, i + 1).items() if t is not None}
        twice = {n: torch.cat([t, t], dim=-1 if n == "scores" else 1) for n, t in token.items()}
        out = general.step(**twice, key_mask=real)
        torch.testing.assert_close(one.step(**token), out[:, :1], atol=1e-6, rtol=1e-6)
        # Padding is not read; as a query it stands behind the same text.
        torch.testing.assert_close(out[:, 1:], out[:, :1], atol=1e-6, rtol=1e-6)
        assert_same_contents(one, general)


@pytest.mark.parametrize("keep_recent", [0, 3])
def test_long_run_with_reordering(keep_recent):
    """Beams swap their pasts again and again; each stays the continuation of its own text."""
    generator = torch.Generator().manual_seed(3)
    length = 150
    text = make_text("few values", length=length, padded="scattered")
    cache = make_cache(keep_first=1, keep_recent=keep_recent)
    past: Text | None = None
    for begin, end in pieces(length, [1, 1, 5, 1, 2]):
        new = Text(**text.piece(begin, end))
        out = cache.step(**text.piece(begin, end))
        if past is None:
            past = new
        else:
            past = Text(
                *(
                    torch.cat([getattr(past, n), getattr(new, n)], dim=1)
                    for n in ("query", "key", "value")
                ),
                torch.cat([past.scores, new.scores], dim=-1),
                torch.cat([past.key_mask, new.key_mask], dim=1),
            )
        mask = visible_keys(
            past.scores,
            WINDOW,
            "causal",
            key_mask=past.key_mask,
            keep_first=1,
            keep_recent=keep_recent,
            query_len=end - begin,
        )
        now = Text(new.query, past.key, past.value, past.scores)
        truth, plain = (now.attention(mask, dtype)[0] for dtype in (torch.float64, torch.float32))
        assert_fair(out, truth, plain)
        index = torch.randint(0, BATCH, (BATCH,), generator=generator)
        past = past.reordered(index)
        text = text.reordered(index)
        cache.reorder(index)


def test_reorder_may_change_the_batch_size():
    text = make_text()
    cache = make_cache()
    prefill(cache, text)
    wide = copy.deepcopy(cache)
    index = torch.tensor([1, 1, 0, 1], dtype=torch.int32)
    wide.reorder(index)
    for name in STATE:
        assert torch.equal(getattr(wide, name), getattr(cache, name)[index])


@pytest.mark.parametrize("sizes", [[1], [7], [LENGTH]])
def test_no_later_token_changes_an_earlier_row(sizes):
    text = make_text("few values")
    for changed in (1, 10, 30, LENGTH - 1):
        other = copy.deepcopy(text)
        other.key[:, changed:] += 1
        other.value[:, changed:] -= 1
        other.scores[..., changed:] = 9.0
        rows = []
        for version in (text, other):
            cache = make_cache(keep_recent=2)
            rows.append(
                torch.cat([cache.step(**version.piece(a, b)) for a, b in pieces(LENGTH, sizes)], 1)
            )
        assert torch.equal(rows[0][:, :changed], rows[1][:, :changed])
        assert not torch.equal(rows[0][:, changed:], rows[1][:, changed:])


def test_a_new_key_that_is_the_worst_is_neither_stored_nor_visible():
    text = make_text("falling")
    cache = make_cache()
    prefill(cache, text, 0, 20)
    before = copy.deepcopy(cache)
    token = text.piece(20, 21)
    out = cache.step(**token)
    loud = {**token, "key": token["key"] * 100, "value": token["value"] + 100}
    assert torch.equal(out, before.step(**loud))
    assert cache.position.max() < WINDOW
    assert_same_contents(cache, before)


def test_an_untrained_layer_is_a_sliding_window():
    text = make_text("equal")
    cache = make_cache()
    prefill(cache, text)
    recent = torch.arange(LENGTH - WINDOW, LENGTH)
    assert (cache.position.sort(-1).values == recent).all()


def test_a_finished_entry_does_not_change():
    text = make_text()
    cache = make_cache()
    prefill(cache, text, 0, 20)
    before = copy.deepcopy(cache)
    for i in range(20, 30):
        cache.step(**{**text.piece(i, i + 1), "key_mask": torch.tensor([[False], [True]])})
    for name in STATE:
        assert torch.equal(getattr(cache, name)[0], getattr(before, name)[0])
    assert cache.seen_tokens.tolist() == [20, 30]


def test_padding_may_hold_anything():
    text = make_text(padded="left")
    clean, dirty = make_cache(), make_cache()
    bad = copy.deepcopy(text)
    for tensor in (bad.key, bad.value):
        tensor[~text.key_mask] = torch.nan
    bad.scores[~text.key_mask[:, None].expand_as(bad.scores)] = torch.nan
    for begin, end in pieces(LENGTH, [1, 6]):
        expected = clean.step(**text.piece(begin, end))
        assert torch.equal(dirty.step(**bad.piece(begin, end)), expected)
    assert_same_contents(clean, dirty)


def test_bytes_do_not_depend_on_the_length():
    cache = make_cache(keep_first=2, keep_recent=3)
    slots = BATCH * KV_HEADS * (WINDOW + 5)
    expected = slots * (2 * DIM * 4 + 4 + 8) + BATCH * KV_HEADS * 8 + 2 * BATCH * 8
    assert cache.nbytes == expected
    addresses = {name: getattr(cache, name).data_ptr() for name in STATE}
    for size in (1, 3, 10, 200, 1000):
        prefill(cache, make_text(length=size), 0, size)
        assert cache.nbytes == expected
    assert addresses == {name: getattr(cache, name).data_ptr() for name in STATE}


def test_a_window_larger_than_the_text_is_full_attention():
    text = make_text()
    cache = make_cache(window_size=LENGTH + 3)
    out = torch.cat([cache.step(**text.piece(i, i + 1)) for i in range(LENGTH)], dim=1)
    everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(BATCH, KV_HEADS, -1, -1)
    truth, plain = (
        text.attention(everything, dtype)[0] for dtype in (torch.float64, torch.float32)
    )
    assert_fair(out, truth, plain)
    assert not cache.evicted_at.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_state(dtype, device):
    text = make_text(dtype=dtype, device=device)
    text.scores = text.scores.to(dtype)
    visible = text.visible()
    truth, plain = (text.attention(visible, kind)[0] for kind in (torch.float64, dtype))
    cache = make_cache(dtype=dtype, device=device)
    out = torch.cat([cache.step(**text.piece(a, b)) for a, b in pieces(LENGTH, [1, 5])], dim=1)
    assert out.dtype == dtype
    assert_fair(out, truth, plain)


def test_double_precision_and_strides():
    text = make_text(dtype=torch.float64)
    truth, _ = text.attention(text.visible(), torch.float64)
    cache = make_cache(dtype=torch.float64)
    out = []
    for begin, end in pieces(LENGTH, [1, 5]):
        piece = text.piece(begin, end)
        for name in ("query", "key", "value"):  # [B, H, S, D] in memory
            piece[name] = piece[name].transpose(1, 2).contiguous().transpose(1, 2)
        out.append(cache.step(**piece))
    assert (torch.cat(out, dim=1) - truth).abs().max() < 1e-12


def test_gradients_reach_the_arguments_of_the_step_and_no_further():
    text = make_text()
    leaves = [text.query, text.key, text.value, text.scores]
    for leaf in leaves:
        leaf.requires_grad_()
    split = LENGTH - 7
    cache = make_cache()
    prefill(cache, text, 0, split)
    assert not any(getattr(cache, name).requires_grad for name in STATE)
    out = cache.step(**text.piece(split, LENGTH))
    assert not any(getattr(cache, name).requires_grad for name in STATE)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad(out, leaves, upstream)

    detached = Text(
        *(torch.cat([leaf.detach()[:, :split], leaf[:, split:]], 1) for leaf in leaves[:3]),
        torch.cat([text.scores.detach()[..., :split], text.scores[..., split:]], -1),
    )
    whole, _ = detached.attention(text.visible(), torch.float64)
    expected = torch.autograd.grad(whole[:, split:], leaves, upstream.double())
    for gradient, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, truth, atol=1e-5, rtol=1e-5)
        assert gradient.any()


def test_crop_takes_back_what_evicted_nothing():
    text = make_text("falling")  # later keys are worse: none is stored once the window is full
    cache = make_cache(keep_first=2)
    prefill(cache, text, 0, 20)
    expected = copy.deepcopy(cache)
    for i in range(20, 25):
        cache.step(**text.piece(i, i + 1))
    cache.crop(20)
    assert_same_contents(cache, expected)

    short = make_cache()
    prefill(short, text, 0, WINDOW)
    short.crop(3)
    expected = make_cache()
    prefill(expected, text, 0, 3)
    assert_same_contents(short, expected)
    short.crop(10)
    assert_same_contents(short, expected)


@pytest.mark.parametrize("sizes", [[1], [5]])
def test_crop_past_an_eviction_is_refused(sizes):
    text = make_text("rising")
    cache = make_cache()
    for begin, end in pieces(20, sizes):
        cache.step(**text.piece(begin, end))
    before = copy.deepcopy(cache)
    with pytest.raises(
        ValueError, match="length: cannot roll back to 19 tokens: a key was evicted at"
    ):
        cache.crop(19)
    assert_unchanged(cache, before)
    cache.crop(20)
    assert_unchanged(cache, before)


@pytest.mark.parametrize("kind", ["random", "few values"])
def test_crop_is_right_whenever_it_is_allowed(kind):
    text = make_text(kind)
    allowed = 0
    for keep_recent in (0, 2):
        for end in range(1, LENGTH, 3):
            for size in (1, 4):
                for back in range(end):
                    cache, expected = (
                        make_cache(keep_recent=keep_recent),
                        make_cache(keep_recent=keep_recent),
                    )
                    prefill(cache, text, 0, max(end - size, 0))
                    prefill(cache, text, max(end - size, 0), end)
                    if back < int(cache.evicted_at.max()):
                        continue
                    allowed += back < end
                    cache.crop(back)
                    prefill(expected, text, 0, back)
                    assert_same_contents(cache, expected, STATE[:-1])
    assert allowed > 20


def test_reset_and_state_dict():
    text = make_text()
    cache = make_cache(keep_first=1)
    prefill(cache, text, 0, 20)
    state = cache.state_dict()
    other = make_cache(keep_first=1)
    other.load_state_dict(state)
    assert_same_contents(cache, other)
    prefill(cache, text, 20, LENGTH)
    assert not torch.equal(cache.key, state["key"])
    prefill(other, text, 20, LENGTH)
    assert_same_contents(cache, other)
    cache.reset()
    assert_same_contents(cache, make_cache(keep_first=1))


def test_state_dict_of_another_cache_is_refused():
    cache, state = make_cache(), make_cache(keep_first=1).state_dict()
    with pytest.raises(ValueError, match="state: expected keep_first 0 as in this cache, got 1"):
        cache.load_state_dict(state)
    with pytest.raises(ValueError, match="state: expected key"):
        cache.load_state_dict(WindowCache(BATCH, KV_HEADS, DIM + 1, WINDOW).state_dict())
    del state["key"]
    with pytest.raises(ValueError, match="state: expected"):
        cache.load_state_dict(state)


def test_moves():
    text = make_text()
    cache = make_cache()
    prefill(cache, text)
    position = cache.position.clone()
    assert cache.to(dtype=torch.bfloat16) is cache
    assert cache.key.dtype == cache.value.dtype == torch.bfloat16
    assert cache.score.dtype == torch.float32 and torch.equal(cache.position, position)
    with pytest.raises(TypeError, match="dtype: expected a floating dtype"):
        cache.to(dtype=torch.int32)
    assert cache.to("meta").key.device.type == "meta"
    assert "Hkv=2" in repr(cache) and "window_size=6" in repr(cache)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mode": "shared"}, ValueError, "mode: a WindowCache serves 'causal' only, got 'shared'"),
        ({"mode": "relu"}, ValueError, "mode: a WindowCache serves 'causal' only, got 'relu'"),
        ({"window_size": 0}, ValueError, "window_size: expected at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        ({"num_kv_heads": 1.5}, TypeError, "num_kv_heads: expected an int"),
        ({"head_dim": 257}, ValueError, "head_dim: expected at most 256, got 257"),
        ({"keep_first": -1}, ValueError, "keep_first: expected at least 0"),
        ({"keep_recent": -1}, ValueError, "keep_recent: expected at least 0"),
        ({"dtype": torch.int32}, TypeError, "dtype: expected a floating dtype, got torch.int32"),
    ],
)
def test_bad_construction(changes, error, message):
    good = {"batch_size": BATCH, "num_kv_heads": KV_HEADS, "head_dim": DIM, "window_size": WINDOW}
    with pytest.raises(error, match=message):
        WindowCache(**{**good, **changes})


def _piece_with(**changes):
    piece = make_text().piece(30, 33)
    for name, change in changes.items():
        piece[name] = change(piece[name])
    return piece


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key": lambda t: t[0]}, ValueError, "key: expected 4 dimensions"),
        ({"key": lambda t: t[:1]}, ValueError, "key: expected .* as in the cache"),
        ({"key": lambda t: t[:, :, :1]}, ValueError, "key: expected .* as in the cache"),
        ({"value": lambda t: t[:, 1:]}, ValueError, "value: expected .* as in the cache"),
        ({"value": lambda t: t[..., 1:]}, ValueError, "value: expected .* as in the cache"),
        ({"key": lambda t: t.double()}, TypeError, "key: expected .*float32"),
        ({"query": lambda t: t.double()}, TypeError, "query"),
        ({"query": lambda t: t[:, :, :3]}, ValueError, "query heads"),
        ({"query": lambda t: t[:, :2]}, ValueError, "query: expected"),
        ({"scores": lambda t: t[..., 1:]}, ValueError, "scores: expected"),
        ({"scores": lambda t: t[:, :1]}, ValueError, "scores: expected"),
        ({"scores": lambda t: t.double()}, TypeError, "scores: expected 16 or 32 bit floats"),
        ({"scores": lambda t: t.long()}, TypeError, "scores: expected"),
        ({"scores": lambda t: t * torch.nan}, ValueError, "scores: .*NaN"),
        ({"scores": lambda t: t + torch.inf}, ValueError, "inf"),
        (
            {"key_mask": lambda t: torch.ones(BATCH, 2, dtype=torch.bool)},
            ValueError,
            "key_mask: expected",
        ),
        ({"key_mask": lambda t: torch.ones(BATCH, 3)}, TypeError, "key_mask: expected torch.bool"),
        ({"key": lambda t: t.to("meta")}, TypeError, "key: expected .* on cpu .* on meta"),
    ],
)
def test_bad_pieces_change_nothing(changes, error, message):
    cache = make_cache()
    prefill(cache, make_text(), 0, 30)
    before = copy.deepcopy(cache)
    with pytest.raises(error, match=message):
        cache.step(**_piece_with(**changes))
    assert_unchanged(cache, before)


def test_unknown_backend_changes_nothing():
    cache = make_cache()
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="backend"):
        cache.step(**make_text().piece(0, 1), backend="none such")
    assert_unchanged(cache, before)


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (torch.tensor([0, 2]), ValueError),
        (torch.tensor([0, -1]), ValueError),
        (torch.tensor([[0, 1]]), ValueError),
        (torch.tensor([0.0, 1.0]), TypeError),
        ([0, 1], TypeError),
    ],
)
def test_bad_reordering(index, error):
    with pytest.raises(error, match="index: expected"):
        make_cache().reorder(index)


def test_an_empty_piece_is_nothing():
    text = make_text()
    cache = make_cache()
    prefill(cache, text, 0, 20)
    before = copy.deepcopy(cache)
    assert cache.step(**text.piece(20, 20)).shape == (BATCH, 0, HEADS, DIM)
    prefill(cache, text, 20, 20)
    assert_unchanged(cache, before)


def test_survivors_are_the_live_keys_of_the_selection():
    text = make_text("few values", length=300)
    selection = select_keys(text.scores, WINDOW, keep_first=2, keep_recent=4)
    cache = make_cache(keep_first=2, keep_recent=4)
    prefill(cache, text, 0, 300)
    live = selection.to_dense(1)[:, :, 0]
    assert_holds_what_is_visible(cache, text, live)


@pytest.mark.parametrize("sizes", [[1], [5]])
def test_eight_bit_state(sizes):
    """Every step is full recomputation from what is stored; a new token counts as it came."""
    text = make_text()
    cache = make_cache(dtype=torch.float8_e4m3fn, keep_recent=2)
    visible = text.visible(keep_recent=2)
    for begin, end in pieces(LENGTH, sizes):
        before = copy.deepcopy(cache)
        out = cache.step(**text.piece(begin, end))
        stored = copy.deepcopy(text)
        for name in ("key", "value"):
            rows, scale = getattr(before, name).float(), getattr(before, f"{name}_scale")
            for b in range(BATCH):
                for h in range(KV_HEADS):
                    held = before.position[b, h] >= 0
                    number = before.position[b, h][held]
                    factor = scale[b, h][held][:, None]
                    getattr(stored, name)[b, number, h] = rows[b, h][held] * factor
        truth, plain = (
            stored.attention(visible, dtype)[0][:, begin:end]
            for dtype in (torch.float64, torch.float32)
        )
        assert_fair(out, truth, plain)
        errors = (stored.key[:, :begin] - text.key[:, :begin]).norm(dim=-1)
        assert (errors <= 0.04 * text.key[:, :begin].norm(dim=-1)).all()
    assert cache.key.dtype == torch.float8_e4m3fn
    other = make_cache(dtype=torch.float8_e4m3fn, keep_recent=2)
    other.load_state_dict(cache.state_dict())
    assert torch.equal(other.key_scale, cache.key_scale)
    with pytest.raises(TypeError, match=r"dtype: a cache of .* cannot become one of torch.float32"):
        cache.to(dtype=torch.float32)
    with pytest.raises(TypeError, match=r"dtype: a cache of .* cannot become one of torch.float8"):
        make_cache().to(dtype=torch.float8_e4m3fn)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_reading_a_prompt_does_not_wait_for_the_gpu():
    text = make_text(device="cuda", padded="left")
    cache = make_cache(device="cuda", keep_first=1, keep_recent=2)
    prefill(cache, text, 0, 20)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefill(cache, text, 20, LENGTH)
        cache.reset()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
