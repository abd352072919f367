"""Recorded launches, interpreted: repeated, they equal fresh ones."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import is_interpreted, run_interpreted
from score_cases import make_hidden, make_layers
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

pytest.importorskip("triton")

if is_interpreted():
    from triton.runtime.interpreter import InterpretedFunction

from flash_sparse_attn.backends import eager_select
from flash_sparse_attn.backends.triton import calls, collect, config, plan_mask, score_calls
from flash_sparse_attn.backends.triton import launch as launching
from flash_sparse_attn.backends.triton import plan as planning
from flash_sparse_attn.backends.triton.config import TileConfig, Tiles
from flash_sparse_attn.backends.triton.masks import MaskLayout
from flash_sparse_attn.backends.triton.select import select_intervals
from flash_sparse_attn.backends.triton.select_rows import SelectTiles
from flash_sparse_attn.intervals import KeySelection
from flash_sparse_attn.plan import Plan
from flash_sparse_attn.varlen import PackedSequences

SMALL = SelectTiles(
    chunk=64, node=128, words=16, rivals=32, slots=128, prefixes=2, encode=8, keys=128
)
BORDERS = ([0, 5, 5, 61, 80], [0, 30, 31, 31, 80])
QUERIES = ([0, 20, 20, 40, 80], [0, 0, 30, 60, 80])


def memory_at(address: int, like: Tensor) -> Tensor:
    """What lies at an address, in the type of a tensor and up to the end of such a one's memory."""
    storage = like.untyped_storage()
    size = storage.nbytes() - (like.data_ptr() - storage.data_ptr())
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=like.dtype)


class Repeats:
    """Interpreted kernels that can be recorded as compiled ones, and counts of both."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.launched = self.repeated = 0
        self._original = InterpretedFunction.run
        patch.setattr(
            InterpretedFunction, "run", lambda kernel, *a, **k: self._run(kernel, *a, **k)
        )
        patch.setattr(launching, "_recordings", {})
        patch.setattr(launching, "_can_repeat", lambda device: True)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)

    def _interpret(self, kernel, *args, **options):
        with _disable_current_modes():  # a recorder is not to see what an interpreter does
            self._original(kernel, *args, **options)

    def _run(self, kernel, *args, grid, warmup, **constants):
        if warmup:  # to compile, of which there is nothing
            return None
        self.launched += 1
        self._interpret(kernel, *args, grid=grid, warmup=warmup, **constants)
        likes = [*args, *(constants[name] for name in kernel.arg_names[len(args) :])]

        def start(programs, y, z, stream, function, *arguments):
            self.repeated += 1
            arguments = [
                memory_at(argument, like) if isinstance(like, Tensor) else argument
                for argument, like in zip(arguments[8:], likes, strict=True)
            ]
            self._interpret(kernel, *arguments, grid=(programs,), warmup=False)

        facts = ("global_scratch_size", "profile_scratch_size")
        facts += ("launch_cooperative_grid", "launch_pdl")
        launcher = SimpleNamespace(**dict.fromkeys(facts, 0), launch=start)
        return SimpleNamespace(function=None, packed_metadata=None, run=launcher)


@pytest.fixture
def repeats(monkeypatch: pytest.MonkeyPatch) -> Repeats:
    return Repeats(monkeypatch)


def check_repeated(repeats: Repeats) -> None:
    """Of two calls all launches of the second were repeated."""
    assert None not in launching._recordings.values() and len(launching._recordings) == 1
    assert repeats.repeated == repeats.launched > 0


SELECTIONS = {
    "padded, sinks, recent": {"padded": True, "keep_first": 3, "keep_recent": 11},
    "packed": {"packed": True, "keep_first": 2},
    "packed, padded, shared": {"packed": True, "padded": True, "mode": "shared"},
    "relu": {"mode": "relu", "keep_recent": 4},
}
HEAVY_SELECTIONS = {
    "nodes": {"keys": 200},
    "long nodes": {"window_size": 40, "keys": 530},
    "everything": {"window_size": 80},
}


def check_selections(repeats: Repeats, case: dict[str, Any]) -> None:
    """Other scores, padding and borders at other addresses; those before stay as they are."""
    options = {"keys": 80, "padded": False, "packed": False, "window_size": 9, **case}
    keys, padded, packed = (options.pop(name) for name in ("keys", "padded", "packed"))
    kept = []
    for borders in BORDERS:
        score = torch.randn(2, keys) if packed else torch.randn(1, 2, keys)
        mask = torch.rand(*score.shape[:-2], keys) < 0.7 if padded else None
        cu_seqlens = torch.tensor(borders, dtype=torch.int32) if packed else None
        kept.append((score, mask, cu_seqlens))
        got = select_intervals(score, key_mask=mask, cu_seqlens=cu_seqlens, tiles=SMALL, **options)
        choice = {"mode": "causal", "keep_first": 0, "keep_recent": 0, **options}
        truth = eager_select.intervals(score, key_mask=mask, cu_seqlens=cu_seqlens, **choice)
        assert torch.equal(got[0], truth[0]) and torch.equal(got[1], truth[1])
    check_repeated(repeats)


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections(name: str, repeats: Repeats) -> None:
    check_selections(repeats, SELECTIONS[name])


@pytest.mark.heavy
@pytest.mark.parametrize("name", HEAVY_SELECTIONS)
def test_selections_more(name: str, repeats: Repeats) -> None:
    check_selections(repeats, HEAVY_SELECTIONS[name])


def make_selection(mode: str, mask: Tensor | None, borders: Tensor | None) -> KeySelection:
    """A selection of 80 random keys, made without kernels."""
    score = torch.randn(1, 2, 80) if borders is None else torch.randn(2, 80)
    choice = (score, 20, mode, mask, borders, 1, 4)
    return KeySelection(*eager_select.intervals(*choice), score, mode, 20, 1, 4, mask, borders)


def same_plans(got: Plan, want: Plan) -> bool:
    def parts(plan: Plan) -> list[Tensor | None]:
        """Of lists what is written."""
        ends = (each[..., 1:2] + 2 for each in plan.lists)
        lists = zip(plan.lists, ends, strict=True)
        written = (a.where(torch.arange(a.shape[-1]) < end, 0) for a, end in lists)
        return [*replace(plan, lists=()).parts, *written]

    pairs = zip(parts(got), parts(want), strict=True)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs) and got.sizes == want.sizes


def test_key_scores(repeats: Repeats) -> None:
    """Other hidden states and layers, with biases; then their gradients."""
    needs = [True, True, False, True, True, True]
    inputs, scores = [], []
    for round_ in range(2):
        layers = [one * (1 + round_) for one in make_layers(40, 3, 4)]
        inputs.append((make_hidden(2, 7, 40, seed=round_), layers))
        scores.append(score_calls.score_keys(*inputs[-1], True, True))
    check_repeated(repeats)
    launching._recordings.clear()
    upstream = [make_hidden(2, 3, 7, seed=8), make_hidden(2, 3, 7, seed=9)]
    given_calls = [
        (grad, *given, logit, True, needs)
        for grad, given, (_, logit) in zip(upstream, inputs, scores, strict=True)
    ]
    grads = [score_calls.grad_scores(*one) for one in given_calls]
    check_repeated(repeats)
    launching._recordings.clear()
    for got, want in (
        (scores[1], score_calls.score_keys(*inputs[1], True, True)),
        (grads[1], score_calls.grad_scores(*given_calls[1])),
    ):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(scores[0][0], scores[1][0]) and not torch.equal(grads[0][0], grads[1][0])


PLANS = {
    "causal": {},
    "padded": {"padded": True},
    "shared, not for backward": {"mode": "shared", "for_backward": False},
    "packed": {"packed": True},
    "packed, other borders of queries, relu": {"packed": True, "cross": True, "mode": "relu"},
}


@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str, repeats: Repeats, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other intervals, padding and borders, shared by queries and keys or not."""
    monkeypatch.setattr(collect, "_COARSE", 32)  # two levels of epochs
    monkeypatch.setattr(planning, "_RUN", 32)  # several runs
    case = {"mode": "causal", "padded": False, "packed": False, "cross": False, **PLANS[name]}
    results = []
    for round_ in range(2):
        mask = torch.rand(1, 80) < 0.7 if case["padded"] else None
        borders = packed = None
        if case["packed"]:
            borders = torch.tensor(BORDERS[round_], dtype=torch.int32)
            queries = torch.tensor(QUERIES[round_]).int() if case["cross"] else borders
            packed = PackedSequences(queries, borders, 80, 80)
        selection = make_selection(case["mode"], mask, borders)
        options = {"for_backward": case.get("for_backward", True), "packed": packed}
        options |= {"is_causal": True, "epoch_len": 16}
        results.append((selection, options, planning.build_plan(selection, 80, **options)))
    check_repeated(repeats)
    launching._recordings.clear()
    selection, options, got = results[1]
    assert same_plans(got, planning.build_plan(selection, 80, **options))
    assert not same_plans(got, results[0][2])


@pytest.mark.parametrize("shape", [(2, 1, 1, 80), (1, 2, 40, 80)])
def test_plans_of_masks(shape: tuple[int, ...], repeats: Repeats) -> None:
    kind = "shown" if shape[2] == 1 else "bits"
    tiles = Tiles(*(TileConfig(*size, 1, 1) for size in ((16, 16), (16, 32), (32, 16))))
    layout = MaskLayout.of(shape, 40, 80, 2, 2, 2, kind, 32)
    layout = layout.with_lists(tiles, 1, 160, for_backward=True)
    masks = [torch.rand(shape) < 0.4 for _ in range(2)]
    options = {"is_causal": True, "for_backward": True}
    plans = [plan_mask.plan_mask(mask, layout, **options) for mask in masks]
    check_repeated(repeats)
    launching._recordings.clear()
    assert len(plans[0].lists) == (3 if kind == "bits" else 0)
    assert same_plans(plans[1], plan_mask.plan_mask(masks[1], layout, **options))
    assert not same_plans(*plans)


@pytest.mark.parametrize("is_shared", (False, True))
def test_plans_of_packed_sequences(is_shared: bool, repeats: Repeats) -> None:
    results = []
    for round_ in range(2):
        keys = torch.tensor(BORDERS[round_], dtype=torch.int32)
        queries = keys if is_shared else torch.tensor(QUERIES[round_]).int()
        packed = PackedSequences(queries, keys, 80, 80)
        results.append((packed, plan_mask.plan_packed(packed, 80, 80, for_backward=True)))
    check_repeated(repeats)
    launching._recordings.clear()
    packed, got = results[1]
    want = plan_mask.plan_packed(packed, 80, 80, for_backward=True)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert not torch.equal(got[1], results[0][1][1])


@pytest.mark.parametrize("keeps_rest", (False, True))
def test_attention(keeps_rest: bool, repeats: Repeats, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of other tensors, with what rounding took from the output or without."""
    monkeypatch.setattr(config, "REST_ELEMENTS", 1 << 20 if keeps_rest else 0)
    plan = Plan.of([], MaskLayout.of(None, 40, 40, 4, 2, 1, "keys", 32).sizes, False)

    def run(tensors: list[Tensor]) -> list[Tensor]:
        *inputs, grad = tensors
        with torch._C._AutoDispatchBelowAutograd():
            call = (*inputs, plan, 0.25, 0.0)
            out, lse, norm, rest = calls.run_forward(*call, with_norm=True)
            assert (rest is not None) == keeps_rest
            kept = (out, norm, rest, plan, 0.25, 0.0, [True] * 4)
            return [out, lse, *calls.run_backward(grad, *inputs, *kept)]

    shapes = ((1, 40, 4, 16), (1, 40, 2, 16), (1, 40, 2, 16), (1, 2, 1, 40), (1, 40, 4, 16))
    dtypes = (*[torch.float16] * 3, torch.float32, torch.float16)
    draws = [[torch.randn(s).to(d) for s, d in zip(shapes, dtypes, strict=True)] for _ in range(2)]
    results = [run(tensors) for tensors in draws]
    assert None not in launching._recordings.values() and len(launching._recordings) == 2
    assert repeats.repeated == repeats.launched > 0
    launching._recordings.clear()
    assert all(torch.equal(*pair) for pair in zip(results[1], run(draws[1]), strict=True))
    assert not torch.equal(results[0][0], results[1][0])


run_interpreted(globals())
