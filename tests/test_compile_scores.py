"""The kernels of key scores, as they are launched, compiled ahead of time for every target."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from interpreter import is_interpreted
from test_compile import TARGETS, machine_code, number, stack_frame, triton, widths
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_sparse_attn.backends.triton import score_calls

pytestmark = pytest.mark.skipif(is_interpreted(), reason="the interpreter compiles nothing")

KERNELS = (
    *("fold_kernel", "score_kernel"),
    *("grad_logit_kernel", "grad_kernel", "sum_kernel", "unfold_kernel"),
)
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
OPTIONS = {"num_warps", "enable_fp_fusion"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The launches of the calls of a test, none of which is started."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def launch(kernel: Any, num_programs: int) -> Any:
        return lambda *args, **constants: launches.append((kernel, args, constants))

    monkeypatch.setattr(score_calls, "launch", launch)
    return launches


def call(num_tokens: int, heads_kv: int, size: int, dtype: torch.dtype) -> None:
    """Scores and all gradients of bf16 hidden states; layers of another type have biases."""
    empty = partial(torch.empty, dtype=dtype, device="meta")
    values = 64 * heads_kv
    layers: list[Any] = [empty(values, size), None, empty(heads_kv, values), None, empty(heads_kv)]
    if dtype != torch.bfloat16:
        layers[1], layers[3] = empty(values), empty(heads_kv)
    hidden = torch.empty(1, num_tokens, size, dtype=torch.bfloat16, device="meta")
    score, logit = score_calls.score_keys(hidden, layers, True, True)
    needs = [one is not None for one in (hidden, *layers)]
    score_calls.grad_scores(score, hidden, layers, logit, True, needs)


def compiled(target: str, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """A launch, compiled for a target."""
    types, values, attributes = {}, {}, {}
    for index, param in enumerate(kernel.params):
        value = args[index] if index < len(args) else constants[param.name]
        specialized = not (isinstance(value, Tensor) or param.do_not_specialize)
        if param.is_constexpr or value is None or (specialized and value == 1):
            types[param.name], values[(index,)] = "constexpr", value
            continue
        types[param.name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or (specialized and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    arch = TARGETS[target][0]
    gpu = GPUTarget("hip", arch, 64) if target == "gfx942" else GPUTarget("cuda", arch, 32)
    options = {name: constants[name] for name in OPTIONS & constants.keys()}
    binary = triton.compile(ASTSource(kernel, types, values, attributes), gpu, options)
    assert binary.metadata.shared <= TARGETS[target][2]
    return binary


@pytest.mark.parametrize("num_tokens", (1, 5000))
@pytest.mark.parametrize("dtype", TYPES)
def test_hopper(num_tokens: int, dtype: torch.dtype, launched: list) -> None:
    """Nothing is spilled, and what is large is read and written 16 bytes at a time."""
    call(num_tokens, 4, 1024, dtype)
    assert tuple(kernel.__name__ for kernel, *_ in launched) == KERNELS
    for kernel, *rest in launched:
        code, notes = machine_code(compiled("sm_90", kernel, *rest), 90)
        assert stack_frame(notes) == 0 and number(r"Used (\d+) registers", notes) <= 112
        if kernel is score_calls.score_kernel and num_tokens > 1:
            # Enough for four programs; loads of hidden states and weights are under way together.
            assert len(re.findall(r"LDGSTS\.E\.BYPASS\.128", code)) >= 9
            # Of the 64 scores of a program a thread computes one.
            assert len(re.findall(r"MUFU\.EX2", code)) == 2
        if kernel is score_calls.grad_kernel:
            assert widths(code, "LDG") == {".128", ""} and ".128" in widths(code, "STG")
            loop = re.findall(r"LDG.*?STG\.E\.128", code, re.DOTALL)[0]
            assert "STS" not in loop and "LDS" not in loop


@pytest.mark.heavy
@pytest.mark.parametrize("heads_kv", (1, 5))
@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target: str, heads_kv: int, launched: list) -> None:
    for num_tokens, size in ((1, 100), (5000, 1), (5000, 768)):
        call(num_tokens, heads_kv, size, torch.float32)
    for one in launched:
        compiled(target, *one)
