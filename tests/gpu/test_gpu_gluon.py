"""The forward kernel by roles against fp64, and against the kernel that it stands in for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from compare import assert_fair, largest_error

from flash_sparse_attn import (
    dynamic_mask_attn_func,
    dynamic_mask_attn_varlen_func,
    flash_sparse_attn_func,
    prepare_selection,
    select_keys,
)
from flash_sparse_attn.backends.triton import config, gluon_forward, role_config
from flash_sparse_attn.backends.triton.forward import forward
from flash_sparse_attn.backends.triton.inputs import Bias, Call
from flash_sparse_attn.backends.triton.plan import build_plan
from flash_sparse_attn.reference import attention_reference

pytestmark = pytest.mark.gpu

DIM = 128


@dataclass(frozen=True)
class Case:
    """One call; defaults are an ordinary one."""

    queries: int = 600
    keys: int = 600
    heads: int = 8
    kv_heads: int = 2
    batch: int = 1
    window: int = 150
    mode: str = "causal"
    is_causal: bool = True
    keep_recent: int = 0
    pattern: str = "random"
    has_bias: bool = True
    dtype: torch.dtype = torch.bfloat16
    epoch_len: int | None = None


CASES = {
    "ordinary": Case(),
    "fp16": Case(dtype=torch.float16),
    "no bias": Case(has_bias=False),
    "hidden keys": Case(pattern="hidden"),
    "rising": Case(pattern="rising", queries=1500, keys=1500),
    "falling": Case(pattern="falling", queries=1500, keys=1500),
    "group of 1": Case(heads=2),
    "group of 16": Case(heads=16, kv_heads=1),
    "group of 64": Case(heads=64, kv_heads=1, queries=150, keys=150),
    "batch, many rows": Case(batch=3, kv_heads=4, queries=333, keys=333),
    "one query": Case(queries=1),
    "one key": Case(queries=1, keys=1),
    "fewer queries": Case(queries=77, keys=900),
    "more queries": Case(queries=700, keys=300),
    "more queries, not causal": Case(queries=700, keys=300, mode="shared", is_causal=False),
    "shared": Case(mode="shared"),
    "relu": Case(mode="relu"),
    "recent keys": Case(keep_recent=200, window=40, queries=1500, keys=1500),
    "many epochs": Case(queries=3000, keys=3000, epoch_len=128),
    "more tiles than programs": Case(queries=5000, keys=5000, heads=16, epoch_len=256),
}


class Inputs:
    """Tensors of a case, and what the kernels get."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        like: dict[str, Any] = {"device": "cuda", "dtype": case.dtype}
        self.query = torch.randn(case.batch, case.queries, case.heads, DIM, **like)
        self.key = torch.randn(case.batch, case.keys, case.kv_heads, DIM, **like)
        self.value = torch.randn_like(self.key)
        noise = torch.randn(case.batch, case.kv_heads, case.keys, device="cuda")
        ramp = torch.linspace(-2, 2, case.keys, device="cuda").expand_as(noise)
        self.scores = {
            "random": noise,
            "rising": ramp.clone(),
            "falling": -ramp,
            "hidden": torch.where(noise > 1.2, -torch.inf, noise),
        }[case.pattern]
        self.case = case

    def plan(self) -> tuple[Any, Any]:
        case = self.case
        selection = select_keys(
            self.scores, case.window, mode=case.mode, keep_recent=case.keep_recent
        )
        return selection, build_plan(
            selection, case.queries, is_causal=case.is_causal, epoch_len=case.epoch_len
        )

    def call(self) -> Call:
        bias = Bias.of(self.scores[:, :, None], self.case.heads, self.case.kv_heads)
        return Call(DIM**-0.5, bias=bias if self.case.has_bias else None)

    def attend(self, plan: Any, tiles: Any = None) -> Any:
        tensors = (self.query, self.key, self.value)
        return forward(plan, *tensors, self.call(), with_norm=True, config=tiles)


@pytest.fixture(autouse=True)
def is_used(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Fails where another kernel would be tested; notes the calls that the kernel served."""
    if role_config.roles_for(config.architecture_of(torch.device("cuda", 0)), DIM) is None:
        pytest.skip("this GPU or version of Triton has no kernel by roles")
    served: list[Any] = []
    run = gluon_forward.gluon_forward

    def noted(*args: Any, **options: Any) -> Any:
        served.append(run(*args, **options))
        return served[-1]

    monkeypatch.setattr(gluon_forward, "gluon_forward", noted)
    return served


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_fp64_and_with_the_other_kernel(name: str, is_used: list[Any]) -> None:
    case = CASES[name]
    inputs = Inputs(case)
    selection, plan = inputs.plan()
    out, lse, norm, out_rest = inputs.attend(plan)
    assert is_used
    assert is_used[0] is not None
    mask = selection.to_dense(case.queries, case.is_causal)
    bias = inputs.scores[:, :, None] if case.has_bias else None
    tensors = (inputs.query, inputs.key, inputs.value)
    plain, _, _ = attention_reference(*tensors, mask, bias)
    wide = None if bias is None else bias.double()
    truth, true_lse, _ = attention_reference(*[t.double() for t in tensors], mask, wide)
    assert_fair(out, truth, plain, "out")
    assert largest_error(lse, true_lse, "lse") <= 1e-4
    other = inputs.attend(plan, config.tiles_for("sm_90", DIM).forward)
    assert len(is_used) == 1
    assert_fair(other[0], truth, plain, "out of the other kernel")
    assert largest_error(norm, other[2].double(), "norm") <= 1e-4
    again, *_ = inputs.attend(plan)
    assert torch.equal(out, again)
    assert (out_rest is not None) == (out.numel() <= config.REST_ELEMENTS)
    if out_rest is not None:
        # What is left are probabilities rounded before their product with values.
        errors = [float((o.double() - truth).norm()) for o in (out, out.double() + out_rest)]
        assert errors[1] <= 0.9 * errors[0] + 1e-6


def test_strided_queries(is_used: list[Any]) -> None:
    """Heads before queries in memory, as after a transposition."""
    inputs = Inputs(Case())
    _, plan = inputs.plan()
    out, *_ = inputs.attend(plan)
    inputs.query = inputs.query.transpose(1, 2).contiguous().transpose(1, 2)
    strided, *_ = inputs.attend(plan)
    assert len(is_used) == 2
    assert is_used[1] is not None
    assert torch.equal(out, strided)


@pytest.mark.parametrize("pattern", ("random", "rising"))
def test_the_past_knows_nothing_of_the_future(pattern: str, is_used: list[Any]) -> None:
    """A changed token ends the life of blocks, and earlier rows keep every bit."""
    inputs = Inputs(Case(pattern=pattern, queries=1500, keys=1500, window=300))
    _, plan = inputs.plan()
    before, lse, *_ = inputs.attend(plan)
    for at in (1499, 1100, 700, 130):
        inputs.scores[:, :, at:] += 3.0
        inputs.key[:, at:] *= -1.0
        inputs.value[:, at:] += 1.0
        _, plan = inputs.plan()
        after, new_lse, *_ = inputs.attend(plan)
        assert torch.equal(before[:, :at], after[:, :at])
        assert torch.equal(lse[..., :at], new_lse[..., :at])
        assert not torch.equal(before[:, at:], after[:, at:])
    assert all(result is not None for result in is_used)


@pytest.mark.parametrize("mode", ("causal", "shared"))
def test_packed_sequences(mode: str, is_used: list[Any]) -> None:
    """Tiles that reach into the next sequence do not write there."""
    lengths = (100, 0, 1, 700, 57)
    torch.manual_seed(0)
    borders = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    like: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    query, key, value = (torch.randn(sum(lengths), heads, DIM, **like) for heads in (4, 2, 2))
    scores = torch.randn(2, sum(lengths), device="cuda")
    options: dict[str, Any] = {"mode": mode, "backend": "triton", "is_causal": True}
    out = dynamic_mask_attn_varlen_func(
        query, key, value, scores, borders, borders, max(lengths), max(lengths), 60, **options
    )
    assert is_used
    assert is_used[0] is not None
    for begin, end in pairwise(borders.tolist()):
        if begin < end:
            rows = [tensor[None, begin:end] for tensor in (query, key, value)]
            one = dynamic_mask_attn_func(*rows, scores[None, :, begin:end], 60, **options)[0]
            assert_fair(out[begin:end], one.double(), one)


def test_repeated_calls(is_used: list[Any]) -> None:
    """Calls without gradients repeat the launches of the first one with other tensors."""
    inputs = Inputs(Case())
    for _ in range(4):
        inputs.query, inputs.key = torch.randn_like(inputs.query), torch.randn_like(inputs.key)
        inputs.value = torch.randn_like(inputs.value)
        selection, plan = inputs.plan()
        want, want_lse, *_ = inputs.attend(plan)
        with torch.no_grad():
            out, lse = flash_sparse_attn_func(
                inputs.query,
                inputs.key,
                inputs.value,
                prepare_selection(selection, 600, is_causal=True),
                inputs.scores[:, :, None],
                is_causal=True,
                return_lse=True,
                backend="triton",
            )
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
    assert is_used[0] is not None


def test_calls_of_the_other_kernel(is_used: list[Any]) -> None:
    """A softcap, a bias per head or pair, and groups that do not fit are not served."""
    inputs = Inputs(Case())
    _, plan = inputs.plan()
    tensors = (inputs.query, inputs.key, inputs.value)
    for shape in ((1, 8, 1, 600), (1, 1, 600, 600)):
        bias = Bias.of(torch.randn(shape, device="cuda"), 8, 2)
        forward(plan, *tensors, Call(DIM**-0.5, bias=bias))
    forward(plan, *tensors, Call(DIM**-0.5 / 20, softcap=20.0))
    inputs.query = inputs.query[:, :, :6].contiguous()
    inputs.attend(plan)
    assert is_used == [None] * 4
