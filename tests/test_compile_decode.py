"""Decoding kernels compiled ahead of time for every target, and what their code says."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from interpreter import is_interpreted

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flash_sparse_attn.backends.triton.append import append_kernel  # noqa: E402
from flash_sparse_attn.backends.triton.config import padded_head_dim  # noqa: E402
from flash_sparse_attn.backends.triton.decode import combine_kernel, split_kernel  # noqa: E402
from flash_sparse_attn.backends.triton.decode_config import (  # noqa: E402
    decode_config,
    splits_at_once,
)

pytestmark = pytest.mark.skipif(is_interpreted(), reason="the interpreter compiles nothing")

# Target and bytes of shared memory that a program may have.
TARGETS = {
    "sm_80": (80, 166_912),
    "sm_86": (86, 101_376),
    "sm_89": (89, 101_376),
    "sm_90": (90, 232_448),
    "sm_100": (100, 232_448),
    "sm_120": (120, 101_376),
    "gfx942": ("gfx942", 65_536),
}
TYPES = {
    "*i32": ("ptr_length", "ptr_table", "ptr_list", "ptr_start", "ptr_expiry"),
    "*u8": ("ptr_mask", "ptr_real"),
    "*i64": (
        *("ptr_position", "ptr_threshold", "ptr_seen", "ptr_note", "ptr_evicted", "ptr_slot"),
    ),
    "*bf16": ("ptr_q", "ptr_k", "ptr_v", "ptr_out", "ptr_new_k", "ptr_new_v"),
}
# Bytes of stack of 64 rows with a bias for each, which some GPUs have too few registers for.
MAX_STACK = 256
OUTPUTS = ("ptr_q", "ptr_k", "ptr_v", "ptr_part", "ptr_stat", "ptr_out", "ptr_lse")
STATE = ("ptr_bias", "ptr_position", "ptr_threshold", "ptr_new_score", "ptr_seen", "ptr_note")
SCALES = ("ptr_k_scale", "ptr_v_scale")
# Kernel, rows of a KV head, the pointers that are there, constants other than the default.
VARIANTS: dict[str, tuple[Any, int, tuple[str, ...], dict[str, Any]]] = {
    "window": (split_kernel, 4, (*OUTPUTS, *STATE, "ptr_real"), {"BIAS": "shared", "KEEPS": True}),
    "window in 8 bits": (split_kernel, 4, (*OUTPUTS, *STATE, *SCALES), {"BIAS": "shared"}),
    "sequences": (split_kernel, 4, (*OUTPUTS, "ptr_length"), {}),
    "sequences in 8 bits": (split_kernel, 4, (*OUTPUTS, "ptr_length", *SCALES), {}),
    "pages": (split_kernel, 4, (*OUTPUTS, "ptr_length", "ptr_table"), {"PAGE": 16}),
    "mask": (
        split_kernel,
        4,
        (*OUTPUTS, "ptr_mask", "ptr_bias", "ptr_list"),
        {"MASK": "shared", "BIAS": "shared"},
    ),
    "several queries": (
        split_kernel,
        64,
        (*OUTPUTS, "ptr_start", "ptr_expiry", "ptr_bias", "ptr_list"),
        {"INTERVALS": True, "IS_CAUSAL": True, "BIAS": "rows"},
    ),
    "combine": (combine_kernel, 4, ("ptr_part", "ptr_stat", "ptr_out", "ptr_lse"), {}),
    "commit": (
        combine_kernel,
        4,
        tuple(p.name for p in combine_kernel.params if p.name.startswith("ptr_")),
        {},
    ),
    "append": (
        append_kernel,
        4,
        ("ptr_new_k", "ptr_new_v", "ptr_k", "ptr_v", "ptr_slot", *SCALES),
        {},
    ),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(target: str, head_dim: int, variant: str) -> tuple[Any, int, str]:
    """The compiled kernel, its bytes of stack, and its machine code."""
    arch, _ = TARGETS[target]
    kernel, rows, present, changes = VARIANTS[variant]
    eight_bits = SCALES[0] in present
    is_split = kernel is split_kernel
    config = decode_config(rows, head_dim, eight_bits and is_split)
    unpacks = arch != "gfx942" and arch >= 89
    constants = {
        "HEADS_KV": 8, "GROUP": 4, "D": head_dim, "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SPLITS": 33,
        "STAGES": config.num_stages, "SCAN": 1024, "PAGE": 0, "MASK": "none", "BIAS": "none",
        "INTERVALS": False, "IS_CAUSAL": False, "KEEPS": False, "UNPACKS": unpacks,
        "HAS_SOFTCAP": False, "HEADS": 8, "K_PER_KEY": True, "V_PER_KEY": True,
        **splits_at_once(33, head_dim), **changes,
    }  # fmt: skip
    types: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list] = {}
    for index, param in enumerate(kernel.params):
        name = param.name
        if param.is_constexpr or (name.startswith("ptr_") and name not in present):
            types[name] = "constexpr"
            values[(index,)] = constants.get(name)
        elif name.startswith("ptr_"):
            known = [kind for kind, names in TYPES.items() if name in names]
            types[name] = known[0] if known else "*fp32"
            if eight_bits and name in ("ptr_k", "ptr_v"):
                types[name] = "*i16" if is_split else "*fp8e4nv"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in ("scale", "softcap"):
            types[name] = "fp32"
        elif name in ("smn", "sbn", "sxn", "syn"):  # keys lie side by side
            types[name] = "constexpr"
            values[(index,)] = 1
        else:
            types[name] = "i32"
            if name.startswith("s"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, values, attributes)
    gpu = GPUTarget("hip", arch, 64) if target == "gfx942" else GPUTarget("cuda", arch, 32)
    warps = config.num_warps if is_split else 4
    binary = triton.compile(source, target=gpu, options={"num_warps": warps})
    if target == "gfx942":
        return binary, 0, ""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(binary.asm["ptx"])
        cubin.write_bytes(binary.asm["cubin"])
        blackwell = arch >= 100 and (TOOLS / "ptxas-blackwell").exists()
        tool, suffix = "ptxas-blackwell" if blackwell else "ptxas", "a" if arch >= 90 else ""
        command = [TOOLS / tool, "-v", f"--gpu-name=sm_{arch}{suffix}", ptx, "-o", os.devnull]
        notes = subprocess.run(command, capture_output=True, text=True, check=True)
        stack = re.search(r"(\d+) bytes stack frame", notes.stdout + notes.stderr)
        assert stack, notes.stdout + notes.stderr
        dump = [TOOLS / "cuobjdump", "-sass", cubin]
        code = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    return binary, int(stack.group(1)), code


def check(target: str, head_dim: int, variant: str) -> None:
    binary, stack, code = compiled(target, head_dim, variant)
    assert binary.metadata.shared <= TARGETS[target][1]
    allowed = MAX_STACK if variant == "several queries" else 0 if target == "sm_90" else 8
    assert stack <= allowed
    if VARIANTS[variant][0] is split_kernel and code:
        assert re.search(r"LDGSTS\.E\.BYPASS\.\w*\.?128", code), "blocks come 16 bytes at a time"
        assert re.search(r"\b(HMMA|HGMMA|UTCHMMA|UTC\w*MMA)", code)
        if "8 bits" in variant and target in ("sm_90", "sm_100"):
            assert "E4M3.UNPACK" in code


@pytest.mark.parametrize("variant", VARIANTS)
def test_hopper(variant: str) -> None:
    """The kernels of the measured machine."""
    check("sm_90", 128, variant)


@pytest.mark.heavy
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target: str, head_dim: int, variant: str) -> None:
    takes_fp8 = "8 bits" in variant or variant in ("commit", "append")
    if takes_fp8 and target in ("sm_80", "sm_86", "gfx942"):
        pytest.skip("has no e4m3")
    check(target, head_dim, variant)
