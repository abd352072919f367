"""Triton backend: key selection, planning and attention over epochs on GPUs."""

from __future__ import annotations

import importlib.util
import shutil
from functools import lru_cache
from typing import NoReturn

import torch

from ...problem import Problem

MIN_CAPABILITY = (8, 0)
MIN_TRITON = (3, 2)


@lru_cache(maxsize=1)
def _unavailable() -> tuple[str, ...]:
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("Triton is not installed; a CUDA or ROCm build of PyTorch brings it")
    if not torch.cuda.is_available():
        reasons.append("PyTorch sees no GPU: no driver, no device, or a CPU build of PyTorch")
    elif torch.version.hip is None and torch.cuda.get_device_capability() < MIN_CAPABILITY:
        reasons.append(
            f"the GPU has capability {torch.cuda.get_device_capability()}, "
            f"at least {MIN_CAPABILITY} is needed"
        )
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        reasons.append("Triton needs a C compiler (cc, gcc or clang) on the PATH")
    reasons.append("the GPU kernels are not part of this version")
    return tuple(reasons)


def unavailable() -> list[str]:
    """Why this backend cannot run on this machine."""
    return list(_unavailable())


def unsupported(problem: Problem) -> list[str]:
    """Why this backend cannot run this call."""
    return unavailable()


def attention(problem: Problem, *tensors: object) -> NoReturn:
    """Raises: `dispatch.choose` never returns an unavailable backend."""
    raise NotImplementedError("; ".join(unavailable()))
