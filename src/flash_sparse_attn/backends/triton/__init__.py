"""Triton backend: key selection, planning and attention over epochs on GPUs."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...intervals import KeySelection
from ...plan import Plan
from ...problem import Problem
from ...varlen import PackedSequences
from . import block_ops, decode_ops, mask_ops, ops

MIN_CAPABILITY = (8, 0)
# The oldest version the kernels were run with.
MIN_TRITON = (3, 6)
_DTYPES = (torch.float16, torch.bfloat16)


@lru_cache(maxsize=1)
def _reasons() -> tuple[str, ...]:
    reasons = []
    version = _triton_version()
    wanted = ".".join(map(str, MIN_TRITON))
    if version is None:
        reasons.append("Triton is not installed; a CUDA or ROCm build of PyTorch brings it")
    elif version < MIN_TRITON:
        found = ".".join(map(str, version))
        reasons.append(f"Triton {found} is too old, {wanted} is needed; use a newer PyTorch")
    if not torch.cuda.is_available():
        reasons.append("PyTorch sees no GPU: no driver, no device, or a CPU build of PyTorch")
    elif torch.version.hip is None and torch.cuda.get_device_capability() < MIN_CAPABILITY:
        reasons.append(
            f"the GPU has capability {torch.cuda.get_device_capability()}, "
            f"at least {MIN_CAPABILITY} is needed"
        )
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        reasons.append("Triton needs a C compiler (cc, gcc or clang) on the PATH")
    return tuple(reasons)


def _triton_version() -> tuple[int, int] | None:
    """Major and minor version, without importing Triton."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            major, minor = importlib.metadata.version(name).split(".")[:2]
        except importlib.metadata.PackageNotFoundError:
            continue
        return int(major), int(minor)
    return None


def unavailable() -> list[str]:
    """Why this backend cannot run on this machine."""
    return list(_reasons())


# What torch.compiler.assume_constant_result does, which would import the compiler and with it
# Triton.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(problem: Problem) -> list[str]:
    """Why this backend cannot run this call."""
    reasons = []
    if problem.device.type != "cuda":
        reasons.append(f"it runs on GPUs, the tensors are on {problem.device}")
    if problem.dtype not in _DTYPES:
        reasons.append(f"it takes fp16 and bf16, query is {problem.dtype}; cast, or use autocast")
    if problem.bias_dtype == torch.float64:
        reasons.append("it takes biases up to fp32, attn_bias is fp64; cast it")
    return reasons


def select_intervals(
    score: Tensor,
    window_size: int,
    mode: str,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    keep_first: int,
    keep_recent: int,
) -> tuple[Tensor, Tensor]:
    """Start and expiry of every key, int32 in the shape of `score`."""
    return ops.select(score, window_size, mode, key_mask, cu_seqlens, keep_first, keep_recent)


@ops.on_device
def score_keys(hidden: Tensor, *args: Any) -> Sequence[Any]:
    """Scores and logits of hidden states; see `score_calls.score_keys`."""
    from .score_calls import score_keys as run

    return run(hidden, *args)


@ops.on_device
def grad_scores(grad_score: Tensor, *args: Any) -> Sequence[Tensor | None]:
    """What `score_keys` passes back; see `score_calls.grad_scores`."""
    from .score_calls import grad_scores as run

    return run(grad_score, *args)


def make_plan(
    selection: KeySelection,
    query_len: int,
    is_causal: bool,
    packed: PackedSequences | None,
    for_backward: bool,
) -> Plan:
    """The epochs and key slots of calls over a selection."""
    return ops.plan(selection, query_len, is_causal, packed, for_backward)


def attention(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | KeySelection | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``out [B, Q, H, D]`` and ``lse [B, H, Q]``."""
    if decode_ops.serves(problem):
        return decode_ops.attention(problem, query, key, value, mask, bias)
    if isinstance(mask, KeySelection):
        return ops.attention(problem, query, key, value, mask, bias)
    plan = mask_ops.plan_of(problem, mask)
    return ops.attend(problem, query, key, value, bias, plan)


def serves_blocks(problem: Problem) -> bool:
    """Whether `block_attention` is for this call: not for few queries, which are decoded."""
    if problem.is_empty or decode_ops.serves(problem):
        return False
    return not (unavailable() or unsupported(problem))


def block_attention(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_indices: Tensor,
    visible: Tensor | None,
    block_size: int,
) -> Tensor:
    """``out [B, Q, H, D]`` where queries list the blocks of keys that they see.

    Args:
        problem: Facts of the call.
        query, key, value: As in `attention`.
        block_indices: int32 or int64 ``[B, {1|Hkv|H}, Q, n]``; what is no block names none.
        visible: Bool ``({1|B}, 1, 1, {1|K})`` or ``None``: which keys are seen at all.
        block_size: Keys of a block.
    """
    return block_ops.attention(problem, query, key, value, block_indices, visible, block_size)
