"""Trainable sparse attention with exact O(N W) cost."""

from ._conflicts import check_for_predecessors

check_for_predecessors()

from ._version import __version__  # noqa: E402
from .attention import (  # noqa: E402
    flash_sparse_attn_func,
    flash_sparse_attn_func_auto,
    flash_sparse_attn_varlen_func,
)
from .compat import backend_flag, flex_sparse_attn_func, triton_sparse_attn_func  # noqa: E402
from .dispatch import explain_backends, get_available_backends  # noqa: E402
from .dynamic_mask import dynamic_mask_attn_func, dynamic_mask_attn_varlen_func  # noqa: E402
from .intervals import KeySelection  # noqa: E402
from .kvcache import append_kvcache, flash_sparse_attn_with_kvcache_func  # noqa: E402
from .memory import memory_report  # noqa: E402
from .nn import DynamicMaskAttention  # noqa: E402
from .selection import prepare_selection, select_keys  # noqa: E402
from .utils.mask import create_mask  # noqa: E402
from .window_cache import WindowCache  # noqa: E402

__all__ = [
    "DynamicMaskAttention",
    "KeySelection",
    "WindowCache",
    "__version__",
    "append_kvcache",
    "create_mask",
    "dynamic_mask_attn_func",
    "dynamic_mask_attn_varlen_func",
    "explain_backends",
    "flash_sparse_attn_func",
    "flash_sparse_attn_func_auto",
    "flash_sparse_attn_varlen_func",
    "flash_sparse_attn_with_kvcache_func",
    "flex_sparse_attn_func",
    "get_available_backends",
    "memory_report",
    "prepare_selection",
    "select_keys",
    "triton_sparse_attn_func",
]


def __getattr__(name: str) -> bool:
    """The predecessors' flags ``CUDA_AVAILABLE``, ``TRITON_AVAILABLE`` and ``FLEX_AVAILABLE``."""
    return backend_flag(__name__, name)
