"""Kernels that plan from lists of blocks, compiled ahead of time for every target."""

from __future__ import annotations

from typing import Any

import pytest
from interpreter import is_interpreted
from test_compile import TARGETS, machine_code, stack_frame, triton, widths
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_sparse_attn.backends.triton import plan_blocks

pytestmark = pytest.mark.skipif(is_interpreted(), reason="the interpreter compiles nothing")

KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mark": (plan_blocks.mark_kernel, {"CLEARED": plan_blocks._CLEARED, "BLOCK": 16}),
    "seen": (plan_blocks.seen_kernel, {"HAS_VISIBLE": True, "BLOCK": plan_blocks._SEEN}),
    "spread": (plan_blocks.spread_kernel, {"STEP": 8, "BLOCK": plan_blocks.SLOT_ALIGN}),
}


def compiled(name: str, target: str, lists: str, members: int) -> Any:
    """A kernel for a target, lists of type `lists`."""
    kernel, constants = KERNELS[name]
    constants = {"ROW_HEADS": 4, "MEMBERS": members, "CAUSAL": True, **constants}
    pointers = {"ptr_lists": lists, "ptr_visible": "*u8", "ptr_seen": "*i8"}
    types, values, attributes = {}, {}, {}
    for index, param in enumerate(kernel.params):
        if param.is_constexpr:
            types[param.name], values[(index,)] = "constexpr", constants[param.name]
        elif param.name.startswith("ptr_"):
            types[param.name] = pointers.get(param.name, "*i32")
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            types[param.name] = param.annotation_type or "i32"
    arch = TARGETS[target][0]
    backend = GPUTarget("hip", arch, 64) if target == "gfx942" else GPUTarget("cuda", arch, 32)
    source = ASTSource(kernel, types, values, attributes)
    return triton.compile(source, target=backend, options={"num_warps": 4})


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("lists", ("*i32", "*i64"))
def test_on_hopper(name: str, lists: str) -> None:
    code, notes = machine_code(compiled(name, "sm_90", lists, 1), 90)
    assert stack_frame(notes) == 0
    if name == "mark":  # what an OR gives back is not waited for
        assert "RED" in code and "ATOM" not in code
    if name == "spread":
        assert widths(code, "STG") >= {".128"}


@pytest.mark.heavy
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target: str, name: str) -> None:
    compiled(name, target, "*i64", 2)
