"""The old names of `flash_sparse_attn`, for programs written for flash-dmattn 1.x.

The functions compute what their successors compute. They also take ``q k v`` for ``query key
value``, ``scale`` for ``softmax_scale``, and version 1.0's float masks of exact zeros and ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flash_sparse_attn import (
    flash_sparse_attn_func,
    flash_sparse_attn_func_auto,
    flash_sparse_attn_varlen_func,
    get_available_backends,
)
from flash_sparse_attn.compat import (
    accept_old_arguments,
    backend_flag,
    flex_sparse_attn_func,
    triton_sparse_attn_func,
)

__all__ = [
    "CUDA_AVAILABLE",
    "FLEX_AVAILABLE",
    "TRITON_AVAILABLE",
    "flash_dmattn_func",
    "flash_dmattn_func_auto",
    "flash_dmattn_varlen_func",
    "flex_dmattn_func",
    "get_available_backends",
    "triton_dmattn_func",
]

flash_dmattn_func = accept_old_arguments(flash_sparse_attn_func)
flash_dmattn_varlen_func = accept_old_arguments(flash_sparse_attn_varlen_func)
triton_dmattn_func = accept_old_arguments(triton_sparse_attn_func)
flex_dmattn_func = accept_old_arguments(flex_sparse_attn_func)


def flash_dmattn_func_auto(backend: str | None = None) -> Callable[..., Any]:
    """The attention function of a backend, always in the argument order of `flash_dmattn_func`.

    Args:
        backend: ``"cuda"``, ``"triton"``, ``"flex"`` or ``"eager"``; ``None`` for the best one
            that can run here.

    Returns:
        A function that takes old and present keywords.

    Raises:
        ValueError: There is no backend of that name.
        RuntimeError: The backend cannot run here; the message says why.
    """
    return accept_old_arguments(flash_sparse_attn_func_auto(backend))


def __getattr__(name: str) -> bool:
    return backend_flag(__name__, name)
