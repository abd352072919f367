"""Kernels compiled ahead of time for every target, without a GPU, and what their code says."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from interpreter import is_interpreted

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flash_sparse_attn.backends.triton import block_lists, config, grad_pair, mask_bits  # noqa: E402
from flash_sparse_attn.backends.triton.forward import forward_kernel  # noqa: E402
from flash_sparse_attn.backends.triton.grad_key import grad_key_kernel  # noqa: E402
from flash_sparse_attn.backends.triton.grad_query import grad_query_kernel  # noqa: E402
from flash_sparse_attn.backends.triton.inputs import words_of_tile  # noqa: E402

pytestmark = pytest.mark.skipif(is_interpreted(), reason="the interpreter compiles nothing")

KERNELS = {
    "forward": forward_kernel,
    "grad_query": grad_query_kernel,
    "grad_key": grad_key_kernel,
}
# Target, row of the table of tiles, bytes of shared memory that a program may have.
TARGETS = {
    "sm_80": (80, "sm_80", 166_912),
    "sm_86": (86, "sm_86", 101_376),
    "sm_89": (89, "sm_86", 101_376),
    "sm_90": (90, "sm_90", 232_448),
    "sm_100": (100, "sm_100", 232_448),
    "sm_120": (120, "sm_86", 101_376),
    "gfx942": ("gfx942", "gfx942", 65_536),
}
# Bytes of stack. Some of the fastest kernels spill a little outside their inner loops.
MAX_STACK = {"copied": 256, "gathered": 272, "keys": 272, "pairs": 400}
# The kernels whose wgmma are known to wait for each other.
SERIALIZED = {("sm_90", 256, "grad_query", slots) for slots in ("copied", "keys")}

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What is known of a compiled kernel; the machine code only for NVIDIA targets."""

    shared: int
    tensor_columns: int
    layouts: str
    stack: int
    registers: int
    serialized: bool
    code: str


def signature(kernel: Any, constants: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Types, constants and alignments of a kernel's arguments, as a call would have them."""
    types: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list] = {}
    block = (constants["BLOCK_N"], constants["BLOCK_D"])
    if constants["SLOTS"] == "keys":
        block = (1, constants["BLOCK_N"], 1, constants["BLOCK_D"])
    tile = (1, constants["BLOCK_M"] // constants["GROUP"], constants["GROUP"], constants["BLOCK_D"])
    absent = ["ptr_epochs", "ptr_pairs", *([] if constants["HAS_MASK"] else ["ptr_mask"])]
    absent += [] if constants["RUNS"] else ["runs_k", "runs_v"]
    copied = ("ptr_start", "ptr_expiry", "ptr_visible", "ptr_entered")
    is_copied = constants["SLOTS"] == "copied"
    if constants["KEY_BIAS"] == "none" or (kernel is grad_key_kernel and not is_copied):
        absent += ["ptr_slot_bias"]
    if is_copied:
        absent += ["ptr_bits", "ptr_lists", "ptr_bias"]
    elif constants["SLOTS"] == "gathered":
        absent += copied
    else:
        absent += ["ptr_bits", "ptr_lists", "ptr_key", "ptr_counts", *copied]
    half = ("ptr_q", "ptr_k", "ptr_v", "ptr_out", "ptr_out_rest", "ptr_grad", "ptr_grad_q")
    single = (
        "ptr_lse",
        "ptr_peak",
        "ptr_share",
        "ptr_delta",
        "ptr_slot_bias",
        "ptr_bias",
        "ptr_part",
    )
    for index, param in enumerate(kernel.params):
        name = param.name
        if param.is_constexpr or name in absent:
            types[name] = "constexpr"
            values[(index,)] = constants.get(name)
        elif name.startswith("runs_"):
            types[name] = f"tensordesc<bf16[1,{constants['BLOCK_N']},1,{constants['BLOCK_D']}]>"
        elif (name.startswith("slots_") and constants["TMA"]) or (
            name.startswith("tiles_") and constants["TMA_Q"]
        ):
            shape = ",".join(map(str, block if name.startswith("slots_") else tile))
            types[name] = f"tensordesc<bf16[{shape}]>"
        elif name.startswith(("ptr_", "slots_", "tiles_")):
            is_half = name in half or name.startswith(("slots_", "tiles_"))
            types[name] = "*bf16" if is_half else "*fp32" if name.startswith(single) else "*i32"
            types[name] = "*i1" if name == "ptr_mask" else types[name]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in ("scale", "softcap", "softmax_scale"):
            types[name] = "fp32"
        else:
            types[name] = param.annotation_type or "i32"
    return types, values, attributes


def machine_code(binary: Any, arch: int) -> tuple[str, str]:
    """The code of a kernel for an NVIDIA target, and what ptxas says about it."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(binary.asm["ptx"])
        cubin.write_bytes(binary.asm["cubin"])
        tool = (
            "ptxas-blackwell" if arch >= 100 and (TOOLS / "ptxas-blackwell").exists() else "ptxas"
        )
        suffix = "a" if arch >= 90 else ""
        command = [TOOLS / tool, "-v", f"--gpu-name=sm_{arch}{suffix}", ptx, "-o", os.devnull]
        notes = subprocess.run(command, capture_output=True, text=True, check=True)
        dump = subprocess.run(
            [TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True
        )
    return dump.stdout, notes.stdout + notes.stderr


def number(pattern: str, notes: str) -> int:
    """The number that ptxas reports."""
    found = re.search(pattern, notes)
    assert found, notes
    return int(found.group(1))


def stack_frame(notes: str) -> int:
    """Bytes of stack."""
    return number(r"(\d+) bytes stack frame", notes)


def _tiles(
    row: str, head_dim: int, name: str, slots: str, num_rows: int = 1 << 30
) -> config.TileConfig:
    tiles = config.tiles_for(row, head_dim, slots == "pairs")
    kind = "keys" if slots == "pairs" else slots
    return tiles.forward_of(kind, num_rows) if name == "forward" else getattr(tiles, name)


@cache
def compiled(
    target: str, head_dim: int, name: str, slots: str = "copied", num_rows: int = 1 << 30
) -> Compiled:
    """The kernel of the table for a target, bf16, groups of 4, with a bias per key.

    ``"pairs"`` are slots that are the keys, with a mask and a bias that depend on the query.
    """
    arch, row, _ = TARGETS[target]
    tiles = _tiles(row, head_dim, name, slots, num_rows)
    flags = ("ALIGNED", "ALIGNED_KV", "SHORT_KV", "GRAD_ALIGNED", "HAS_NORM", "NEEDS_QUERY")
    needs = ("NEEDS_KEY", "NEEDS_VALUE", "NEEDS_BIAS")
    constants = {
        "HEADS_KV": 8, "GROUP": 4, "GROUP_PAD": 1, "D": head_dim, "SLOT_D": head_dim,
        "BLOCK_D": config.padded_head_dim(head_dim), "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n, "STAGES": tiles.num_stages,
        "KEY_BIAS": "none" if slots == "pairs" else "kv head",
        "PAIR_BIAS": slots == "pairs", "PAIR_GRAD": "none", "SHARED": False, "HAS_SOFTCAP": False,
        "CLAMPS": False, "PACKED": False, "SLOTS": "keys" if slots == "pairs" else slots,
        "HAS_MASK": slots == "pairs", "ROWS": slots == "pairs", "MEMBERS": 1,
        "WORDS": max(1, tiles.block_m // 4 // 32),
        "TMA": tiles.uses_tma and slots != "gathered", "TMA_Q": tiles.uses_tma,
        "RUNS": tiles.uses_tma and slots == "gathered" and row != "sm_100",
        "TMA_GRAD": tiles.uses_tma, **dict.fromkeys(flags + needs, True),
        "NEEDS_BIAS": slots != "pairs",
    }  # fmt: skip
    kernel = KERNELS[name]
    source = ASTSource(kernel, *signature(kernel, constants))
    gpu = GPUTarget("hip", arch, 64) if target == "gfx942" else GPUTarget("cuda", arch, 32)
    binary = triton.compile(source, target=gpu, options=tiles.options)
    columns = getattr(binary.metadata, "tmem_size", 0) or 0
    layouts = binary.asm["ttgir"]
    if target == "gfx942":
        return Compiled(binary.metadata.shared, columns, layouts, 0, 0, False, "")
    code, notes = machine_code(binary, arch)
    registers, serialized = number(r"Used (\d+) registers", notes), "serialized" in notes
    facts = (stack_frame(notes), registers, serialized, code)
    return Compiled(binary.metadata.shared, columns, layouts, *facts)


def check(target: str, head_dim: int, name: str, slots: str = "copied") -> None:
    kernel = compiled(target, head_dim, name, slots)
    assert kernel.shared <= TARGETS[target][2]
    assert kernel.stack <= MAX_STACK[slots]
    if target == "gfx942":
        assert "amd_mfma" in kernel.layouts
        return
    if _tiles(TARGETS[target][1], head_dim, name, slots).num_stages > 1:
        assert "LDGSTS" in kernel.code or "UTMALDG" in kernel.code
    if target == "sm_90":
        assert "HGMMA" in kernel.code and not re.search(r"\bHMMA", kernel.code)
        # A computed tile that is transposed into a product, which Triton 3.4 to 3.7.0 gets wrong.
        assert "#linear" not in kernel.layouts
        assert kernel.serialized == ((target, head_dim, name, slots) in SERIALIZED)
    elif target == "sm_100":
        # A kernel over the budget compiles to nothing instead of failing.
        assert 0 < kernel.tensor_columns <= 512
        assert re.search(r"UTC\w*MMA", kernel.code)
    else:
        assert "HMMA" in kernel.code


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("head_dim", (64, 128))
def test_hopper(head_dim: int, name: str) -> None:
    """The kernels of the measured machine: wgmma, not one waiting for the other, hardly a spill."""
    check("sm_90", head_dim, name)


@pytest.mark.parametrize(
    ("head_dim", "name", "programs"),
    [
        (64, "forward", 4),
        (64, "grad_query", 4),
        (64, "grad_key", 2),
        (128, "forward", 2),
        (128, "grad_query", 2),
        (128, "grad_key", 2),
    ],
)
def test_programs_on_a_multiprocessor(head_dim: int, name: str, programs: int) -> None:
    """As many as when the sizes of tiles were chosen: registers and shared memory allow them."""
    kernel, tiles = compiled("sm_90", head_dim, name), _tiles("sm_90", head_dim, name, "copied")
    registers = -(-kernel.registers // 8) * 8 * 32 * tiles.num_warps
    assert min(65_536 // registers, 233_472 // (kernel.shared + 1024)) == programs


@pytest.mark.parametrize("slots", ("gathered", "keys"))
@pytest.mark.parametrize("name", KERNELS)
def test_hopper_without_selection(name: str, slots: str) -> None:
    """The same for bool masks, and where the slots are the keys."""
    check("sm_90", 128, name, slots)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("head_dim", (64, 128))
def test_hopper_with_pairs(head_dim: int, name: str) -> None:
    """Aligned rows of masks and biases are fetched ahead, not one by one."""
    check("sm_90", head_dim, name, "pairs")
    code = compiled("sm_90", head_dim, name, "pairs").code
    assert not re.search(r"\bLDG\.E\.U(8|16)\b", code)
    if head_dim == 64:
        assert len(re.findall(r"\b(STL|LDL)\b", code)) < 40


@pytest.mark.parametrize("head_dim", (64, 128))
def test_hopper_with_few_pairs(head_dim: int) -> None:
    """The smaller tiles of small calls, too, load ahead; and they do not spill."""
    kernel = compiled("sm_90", head_dim, "forward", "pairs", num_rows=1)
    assert kernel.shared <= TARGETS["sm_90"][2] and kernel.stack <= 16
    assert "LDGSTS" in kernel.code and "HMMA" in kernel.code


def hopper_code(
    kernel: Any, constants: dict[str, Any], pointers: dict[str, str], absent: tuple[str, ...] = ()
) -> str:
    """The code of a kernel without tiles of queries; what `pointers` does not name is of int32."""
    types, values, attributes = {}, {}, {}
    for index, param in enumerate(kernel.params):
        name = param.name
        if param.is_constexpr or name in absent:
            types[name], values[(index,)] = "constexpr", constants.get(name)
        elif name.startswith("ptr_"):
            types[name] = pointers.get(name, "*i32")
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            types[name] = param.annotation_type or "i32"
    source = ASTSource(kernel, types, values, attributes)
    options = {"num_warps": constants["num_warps"]}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code, notes = machine_code(binary, 90)
    assert stack_frame(notes) == 0
    return code


def widths(code: str, access: str) -> set[str]:
    """How wide a kernel loads (``"LDG"``) or stores (``"STG"``)."""
    return set(re.findall(rf"\b{access}\.E(\.\w+)?", code))


@pytest.mark.parametrize("slots", ("gathered", "copied", "keys"))
@pytest.mark.parametrize("sums", (False, True))
def test_gradients_of_pairs_are_spread_16_bytes_at_a_time(sums: bool, slots: str) -> None:
    constants = {
        "HEADS_KV": 1, "GROUP": 2, "BIAS_BATCHES": 1, "BIAS_HEADS": 1, "HEAD_ROWS": False,
        "TILE_ROWS": 32, "SUMS": sums, "SLOTS": slots, "MEMBERS": 1, "CLAMPS": False,
        "ALIGNED": True, "QUERIES": grad_pair._QUERIES, "TOGETHER": grad_pair._TOGETHER,
        "KEYS": grad_pair._KEYS, "num_warps": grad_pair._WARPS,
    }  # fmt: skip
    pointers = {"ptr_pairs": "*fp32" if sums else "*bf16", "ptr_grad_bias": "*bf16"}
    absent = () if slots == "copied" else ("ptr_start", "ptr_expiry")
    code = hopper_code(grad_pair.spread_kernel, constants, pointers, absent)
    assert widths(code, "STG") == {".128"}
    # Slots, and words or intervals, are of one key each.
    assert widths(code, "LDG") == ({".128"} if slots == "keys" else {".128", ""})


@pytest.mark.parametrize("number", (1, 3))
def test_lists_are_made_of_whole_flags(number: int) -> None:
    """Those of all and of any query in one access, and nothing is spilled."""
    sizes = ((16, 128, True), (64, 64, True), (32, 64, False))[:number]
    constants = {"GROUP": 2, "MEMBERS": 1, "OWNERS": 4, "PROGRAMS": 16, "SIZE": 64, "num_warps": 1}
    for i, (block_m, block_n, of_tiles) in enumerate(sizes):
        constants |= {f"BLOCK_M_{i}": block_m, f"BLOCK_N_{i}": block_n}
        constants |= {f"OF_TILES_{i}": of_tiles, f"WORDS_{i}": words_of_tile(block_m, 2)}
    absent = tuple(f"ptr_lists_{i}" for i in range(number, 3))
    code = hopper_code(block_lists.list_kernel, constants, {"ptr_bits": "*i64"}, absent)
    assert ".64" in widths(code, "LDG")


def loads_under_way(code: str) -> int:
    """Loads in a row that do not wait for the register of one before."""
    most, taken = 0, set()
    for register in re.findall(r"\bLDG\S* (R\d+),", code):
        taken = set() if register in taken else taken
        taken.add(register)
        most = max(most, len(taken))
    return most


def test_masks_are_packed_16_bytes_at_a_time() -> None:
    constants = {
        "ROW_HEADS": 1, "MEMBERS": 1, "CAUSAL": True, "UNIT": True, "QUADS": True,
        "WORDS": mask_bits._WORDS, "BLOCK": mask_bits._PACKED, "ROWS": mask_bits._ROWS,
        "num_warps": mask_bits._PACK_WARPS,
    }  # fmt: skip
    code = hopper_code(mask_bits.pack_kernel, constants, {"ptr_mask": "*u8"})
    assert widths(code, "LDG") == {".EF"} and set(re.findall(r"LDG\.E\.EF(\S*)", code)) == {".128"}
    # The words of a key together; bits and counts of 32 keys one by one.
    assert widths(code, "STG") == {".64", ""}
    assert loads_under_way(code) >= mask_bits._ROWS
    constants = {
        "MEMBERS": 1, "WORDS": 4, "STEP": 4, "PACKED": 512, "BLOCK": 128, "num_warps": 4,
    }  # fmt: skip
    assert ".128" in widths(hopper_code(mask_bits.bits_kernel, constants, {}), "LDG")
    constants = {
        "SHEETS": 8, "SHEETS_PAD": 8, "USES": True, "ALIGNED": True, "COUNTED": 1024, "BLOCK": 128,
        "num_warps": 8,
    }  # fmt: skip
    assert ".128" in widths(hopper_code(mask_bits.slot_kernel, constants, {}), "STG")


@pytest.mark.heavy
@pytest.mark.parametrize("slots", ("gathered", "keys"))
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("head_dim", (64, 256))
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_without_selection(target: str, head_dim: int, name: str, slots: str) -> None:
    check(target, head_dim, name, slots)


@pytest.mark.heavy
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target: str, head_dim: int, name: str) -> None:
    check(target, head_dim, name)
