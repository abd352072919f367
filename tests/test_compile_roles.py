"""The kernels by roles compiled ahead of time, without a GPU, and what their code says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from interpreter import is_interpreted

triton = pytest.importorskip("triton")

from test_compile import TARGETS, machine_code, stack_frame  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flash_sparse_attn.backends.triton import role_config  # noqa: E402
from flash_sparse_attn.backends.triton.grad_product import product_kernel  # noqa: E402

pytestmark = pytest.mark.skipif(is_interpreted(), reason="the interpreter compiles nothing")


def role_sizes(name: str) -> Any:
    """Sizes of a kernel by roles of the table, or a skipped test."""
    roles = role_config.roles_for("sm_90", 128)
    if roles is None:
        pytest.skip("written for another version of Triton")
    return getattr(roles, name)


def compiled_by_roles(
    kernel: Any, constants: dict[str, Any], blocks: dict[str, str], sizes: Any
) -> tuple[Any, str, str]:
    """A kernel in Gluon for Hopper, its code, and what ptxas says about it.

    `blocks`: type and layout of what every descriptor loads; those not among them are absent.
    """
    from triton.experimental.gluon._runtime import GluonASTSource

    integers = ("key", "start", "expiry", "counts", "visible", "entered")
    absent = ["ptr_epochs", *([] if constants["HAS_BIAS"] else ["ptr_slot_bias", "slots_bias"])]
    types, values, attributes = {}, {}, {}
    for index, param in enumerate(kernel.params):
        name = param.name
        if param.is_constexpr or name in absent:
            types[name], values[(index,)] = "constexpr", constants.get(name)
        elif name in blocks:
            types[name] = f"tensordesc<{blocks[name]}>"
        elif name.startswith("ptr_"):
            is_out = name in ("ptr_out", "ptr_out_rest")
            single = "*i32" if name.removeprefix("ptr_") in integers else "*fp32"
            types[name] = "*bf16" if is_out else single
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32" if name.endswith("scale") else "i32"
    source = GluonASTSource(kernel, types, values, attributes)
    options = {"num_warps": 4, "maxnreg": sizes.registers}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return binary, *machine_code(binary, 90)


def role_blocks(shape: str, dtype: str = "bf16", rank: int = 2) -> str:
    """Type and layout of what a descriptor loads."""
    from triton.experimental.gluon import language as gl

    swizzle, bits = (128, 16) if dtype == "bf16" else (0, 32)
    return f"{dtype}[{shape}],{gl.NVMMASharedLayout(swizzle, bits, rank)!r}"


@pytest.mark.parametrize("group", (1, 4))
@pytest.mark.parametrize("has_bias", (False, True))
def test_forward_by_roles(group: int, has_bias: bool) -> None:
    """Two consumers with the registers of a third, nothing spilled, products that overlap."""
    sizes = role_sizes("forward")
    from flash_sparse_attn.backends.triton.gluon_forward import gluon_forward_kernel

    constants = {
        "HEADS_KV": 8, "GROUP": group, "BLOCK_M": sizes.block_m, "BLOCK_N": sizes.block_n, "D": 128,
        "BUFFERS": sizes.buffers, "TOGETHER": sizes.rows_together,
        "CONSUMER_REGISTERS": sizes.consumer_registers,
        "PRODUCER_REGISTERS": sizes.producer_registers, "HAS_BIAS": has_bias, "HAS_NORM": True,
        "CLAMPS": False, "PACKED": False,
    }  # fmt: skip
    line = f"1,{sizes.block_n}"
    blocks = {
        "tiles_q": role_blocks(f"1,{64 // group},{group},128", rank=4),
        "slots_k": role_blocks(f"{sizes.block_n},128"),
        "slots_v": role_blocks(f"{sizes.block_n},128"),
        "slots_start": role_blocks(line, "i32"),
        "slots_expiry": role_blocks(line, "i32"),
    }
    if has_bias:
        blocks["slots_bias"] = role_blocks(line, "fp32")
    binary, code, notes = compiled_by_roles(gluon_forward_kernel, constants, blocks, sizes)
    assert binary.metadata.shared <= TARGETS["sm_90"][2]
    assert stack_frame(notes) == 0
    assert "serialized" not in notes
    # Of each consumer: the first scores, twice scores and values in the loops, the last values.
    assert len(re.findall(r"\bHGMMA", code)) == 2 * (8 + 2 * 16 + 8)
    assert "UTMALDG.4D" in code
    assert "USETMAXREG" in code
    assert not re.search(r"\b(STL|LDL)\b", code)
    # The number of whole blocks is carried from tile to tile; see the comment in `_consume`.
    carried = re.findall(r"scf\.for %item[\w]* = .*?iter_args\((.*?)\) ->", binary.asm["ttgir"])
    assert [len(names.split(", ")) for names in carried if "next_full" in names] == [5, 5]
    # The exponentials stand before the wait for the product that they overlap with.
    for loop in re.findall(r"DEPBAR\.LE gsb0, 0x1.*?DEPBAR\.LE gsb0, 0x0", code, re.DOTALL):
        assert loop.count("MUFU.EX2") >= 64


@pytest.mark.parametrize("group", (1, 4))
@pytest.mark.parametrize("has_bias", (False, True))
def test_backward_by_roles(group: int, has_bias: bool) -> None:
    """Two consumers, four products of each in either loop, and hardly anything spilled there."""
    sizes = role_sizes("grad_key")
    from flash_sparse_attn.backends.triton.gluon_backward import gluon_grad_key_kernel

    constants = {
        "HEADS_KV": 8, "GROUP": group, "BLOCK_M": sizes.block_m, "BLOCK_N": sizes.block_n, "D": 128,
        "BUFFERS": sizes.buffers, "KEPT_TILES": 2, "CONSUMER_REGISTERS": sizes.consumer_registers,
        "PRODUCER_REGISTERS": sizes.producer_registers, "HAS_BIAS": has_bias,
        "NEEDS_BIAS": has_bias, "CLAMPS": False, "PACKED": False,
    }  # fmt: skip
    tile = role_blocks(f"1,{sizes.block_m // group},{group},128", rank=4)
    line = role_blocks(f"1,{sizes.block_m}", "fp32")
    blocks = dict.fromkeys(("tiles_q", "tiles_grad"), tile)
    blocks |= dict.fromkeys(("lines_peak", "lines_share", "lines_delta"), line)
    blocks |= dict.fromkeys(("slots_k", "slots_v"), role_blocks("64,128"))
    blocks["kept"] = role_blocks(f"64,{sizes.block_m}")
    binary, code, notes = compiled_by_roles(gluon_grad_key_kernel, constants, blocks, sizes)
    assert binary.metadata.shared <= TARGETS["sm_90"][2]
    assert "serialized" not in notes
    # Of each consumer and in each of two loops: twice scores, and two products of theirs.
    assert len(re.findall(r"\bHGMMA", code)) == 2 * 2 * (8 + 8 + 4 + 4)
    assert "UTMALDG.4D" in code
    assert "UTMASTG.2D" in code
    assert "USETMAXREG" in code
    assert stack_frame(notes) <= 160


def test_product_of_what_backward_keeps() -> None:
    """Loads of both factors in flight, the first one transposed in shared memory."""
    sizes = role_sizes("grad_query")
    constants = {
        "HEADS_KV": 8, "GROUP": 4, "D": 128, "BLOCK_M": sizes.block_m, "BLOCK_N": sizes.block_n,
        "STAGES": sizes.num_stages, "PACKED": False,
    }  # fmt: skip
    types: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list] = {}
    for index, param in enumerate(product_kernel.params):
        name = param.name
        if param.is_constexpr or name == "ptr_epochs":
            types[name], values[(index,)] = "constexpr", constants.get(name)
        elif name in ("tiles_kept", "slots_k"):
            width = sizes.block_m if name == "tiles_kept" else 128
            types[name] = f"tensordesc<bf16[{sizes.block_n},{width}]>"
        elif name.startswith("ptr_"):
            types[name] = "*bf16" if name == "ptr_grad_q" else "*i32"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32" if name == "softmax_scale" else "i32"
    source = ASTSource(product_kernel, types, values, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=sizes.options)
    code, notes = machine_code(binary, 90)
    assert binary.metadata.shared <= TARGETS["sm_90"][2]
    assert stack_frame(notes) == 0
    assert "HGMMA" in code
    assert "serialized" not in notes
    assert not re.search(r"\b(STL|LDL)\b", code)
