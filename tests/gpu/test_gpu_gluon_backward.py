"""The backward kernels by roles against fp64, and against the kernels that they stand in for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from oracles import check_attention
from test_gpu_gluon import CASES as SMALL
from test_gpu_gluon import DIM, Case, Inputs

from flash_sparse_attn import (
    dynamic_mask_attn_func,
    dynamic_mask_attn_varlen_func,
    flash_sparse_attn_func,
)
from flash_sparse_attn.backends.triton import config, gluon_backward, role_config
from flash_sparse_attn.backends.triton.backward import Needs, backward
from flash_sparse_attn.backends.triton.forward import forward
from flash_sparse_attn.backends.triton.inputs import Bias, Call

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def is_used(monkeypatch: pytest.MonkeyPatch, recordings: Any) -> list[bool]:
    """Notes which calls the kernels served."""
    if role_config.roles_for(config.architecture_of(torch.device("cuda", 0)), DIM) is None:
        pytest.skip("this GPU or version of Triton has no kernels by roles")
    served: list[bool] = []
    run = gluon_backward.gluon_backward

    def noted(*args: Any) -> bool:
        torch.use_deterministic_algorithms(True)  # what nobody writes is NaN
        served.append(run(*args))
        torch.use_deterministic_algorithms(False)
        return served[-1]

    monkeypatch.setattr(gluon_backward, "gluon_backward", noted)
    return served


def gradients(inputs: Inputs, needs: Needs | None = None, tiles: Any = None) -> list[Any]:
    _, plan = inputs.plan()
    out, _, *kept = inputs.attend(plan)
    torch.manual_seed(1)
    grad = torch.randn_like(out)
    tensors = (inputs.query, inputs.key, inputs.value)
    needs = needs or Needs(bias=inputs.case.has_bias)
    return list(backward(plan, *tensors, out, *kept, grad, inputs.call(), needs, tiles=tiles))


CASES = SMALL | {
    "few queries": Case(queries=9, keys=300, heads=2),
    "shorter than a tile": Case(queries=20, keys=20, heads=2),
    "one query of a KV head": Case(queries=1, heads=2),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_fp64_and_with_the_other_kernels(name: str, is_used: list[bool]) -> None:
    case = CASES[name]
    inputs = Inputs(case)
    selection, plan = inputs.plan()
    bias = inputs.scores[:, :, None] if case.has_bias else None

    def attend(query: Any, key: Any, value: Any, bias: Any = None) -> Any:
        return flash_sparse_attn_func(
            query, key, value, selection, bias, is_causal=case.is_causal, backend="triton"
        )

    mask = selection.to_dense(case.queries, case.is_causal)
    check_attention(attend, inputs.query, inputs.key, inputs.value, mask, bias)
    got = gradients(inputs)
    # Whole tiles, and rows of keys that begin where they must.
    group = case.heads // case.kv_heads
    assert is_used == [plan.epoch_len * group % 64 == 0 and case.queries * group % 4 == 0] * 2
    want = gradients(inputs, tiles=config.tiles_for("sm_90", DIM))
    assert len(is_used) == 2
    for mine, other, what in zip(got, want, ("query", "key", "value", "bias"), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            difference = (mine.double() - other.double()).norm()
            assert difference <= 2e-3 * other.double().norm() + 1e-5, what


PIECES = {
    "ordinary": Case(),
    "many epochs": Case(queries=3000, keys=3000, epoch_len=128),
    "batch, many rows": Case(batch=3, kv_heads=4, queries=334, keys=334),
    "rising": Case(pattern="rising", queries=1500, keys=1500),
}


@pytest.mark.parametrize("name", PIECES)
def test_kept_in_pieces(name: str, is_used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is kept at a time, every bit is the same."""
    case = PIECES[name]
    inputs = Inputs(case)
    want = gradients(inputs)
    _, plan = inputs.plan()
    unit = plan.num_slots * plan.epoch_len * (case.heads // case.kv_heads) * 2
    monkeypatch.setattr(role_config, "KEPT_PROGRAMS", 0)
    for units in (1, 3):
        monkeypatch.setattr(role_config, "KEPT_BYTES", units * unit)
        for got, whole in zip(gradients(inputs), want, strict=True):
            assert torch.equal(got, whole)
    monkeypatch.setattr(role_config, "KEPT_BYTES", unit - 1)
    gradients(inputs)
    assert is_used == [True, True, True, False]


def test_runs_repeat_bit_for_bit(is_used: list[bool]) -> None:
    inputs = Inputs(Case(batch=2, queries=1500, keys=1500, window=300))
    want = gradients(inputs)
    for _ in range(5):
        for got, first in zip(gradients(inputs), want, strict=True):
            assert torch.equal(got, first)
    assert all(is_used)


@pytest.mark.parametrize("pattern", ("random", "rising"))
def test_the_past_knows_nothing_of_the_future(pattern: str, is_used: list[bool]) -> None:
    """A loss of earlier rows has no gradient at later tokens, whatever these are."""
    inputs = Inputs(Case(pattern=pattern, queries=1500, keys=1500, window=300))
    torch.manual_seed(1)
    grad = torch.randn_like(inputs.query)
    for at in (1100, 130):
        grad[:, at:] = 0
        results = []
        for shift in (0.0, 3.0):
            inputs.scores[:, :, at:] += shift
            inputs.value[:, at:] += shift
            _, plan = inputs.plan()
            out, _, *kept = inputs.attend(plan)
            tensors = (inputs.query, inputs.key, inputs.value)
            call = inputs.call()
            results.append(backward(plan, *tensors, out, *kept, grad, call, Needs(bias=True)))
        for before, after in zip(*results, strict=True):
            length_first = before.shape[1] == 1500
            early = [t[:, :at] if length_first else t[..., :at] for t in (before, after)]
            late = [t[:, at:] if length_first else t[..., at:] for t in (before, after)]
            assert torch.equal(*early)
            assert not any(part.any() for part in late)
    assert all(is_used)


def test_calls_of_the_other_kernels(is_used: list[bool]) -> None:
    """A softcap, a bias per head or pair, strides that do not fit, and some gradients only."""
    inputs = Inputs(Case())
    _, plan = inputs.plan()
    tensors = (inputs.query, inputs.key, inputs.value)
    scale = DIM**-0.5
    biases = (torch.randn(shape, device="cuda") for shape in ((1, 8, 1, 600), (1, 1, 600, 600)))
    calls = [Call(scale, bias=Bias.of(bias, 8, 2)) for bias in biases]
    calls += [Call(scale / 20, softcap=20.0), inputs.call()]
    stride_0 = torch.ones((), device="cuda", dtype=inputs.query.dtype).expand_as(inputs.query)
    for call in calls:
        out, _, *kept = forward(plan, *tensors, call, with_norm=True)
        backward(plan, *tensors, out, *kept, stride_0, call, Needs())
    assert is_used == [False] * 4
    gradients(inputs, Needs(query=False))
    gradients(inputs, Needs(key=False))
    gradients(inputs, Needs(value=False))
    assert len(is_used) == 4
    gradients(inputs)
    assert is_used[-1]


def test_which_calls_are_large_enough() -> None:
    assert role_config.kept_units(32, 24, 3072 * 4096 * 2) == 32
    assert role_config.kept_units(128, 32, 4096 * 8192 * 2) == 16
    assert role_config.kept_units(2, 2, 1 << 20) == 2  # few, but all of them
    assert role_config.kept_units(256, 48, 6144 * 16384 * 2) == 0
    assert role_config.kept_units(32, 1000, (1 << 30) + 1) == 0


@pytest.mark.parametrize("heads", (2, 8))
def test_packed_sequences(heads: int, is_used: list[bool]) -> None:
    """Tiles that reach into the next sequence take nothing from there."""
    lengths = (100, 0, 1, 700, 57)
    borders = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    like: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    tensors = [torch.randn(sum(lengths), count, DIM, **like) for count in (heads, 2, 2)]
    scores = torch.randn(2, sum(lengths), device="cuda")
    grad = torch.randn_like(tensors[0])
    options: dict[str, Any] = {"backend": "triton", "is_causal": True}

    def results(function: Any, given: list[Any], grad: Any, *rest: Any) -> Any:
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        return torch.autograd.grad(function(*leaves, *rest, 60, **options), leaves, grad)

    longest = max(lengths)
    packed = (borders, borders, longest, longest)
    got = results(dynamic_mask_attn_varlen_func, [*tensors, scores], grad, *packed)
    assert is_used == [heads == 8]
    for begin, end in pairwise(borders.tolist()):
        if begin < end:
            rows = [tensor[None, begin:end] for tensor in tensors]
            given = [*rows, scores[None, :, begin:end]]
            one = results(dynamic_mask_attn_func, given, grad[None, begin:end])
            parts = [part[begin:end] for part in got[:3]] + [got[3][:, begin:end]]
            for mine, alone in zip(parts, one, strict=True):
                difference = (mine.double() - alone[0].double()).norm()
                assert difference <= 5e-3 * alone[0].double().norm() + 1e-3
