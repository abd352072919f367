"""Trainable sparse attention with exact O(N W) cost."""

from .attention import (
    flash_sparse_attn_func,
    flash_sparse_attn_func_auto,
    flash_sparse_attn_varlen_func,
    flash_sparse_attn_with_kvcache_func,
)
from .dispatch import explain_backends, get_available_backends
from .dynamic_mask import dynamic_mask_attn_func, dynamic_mask_attn_varlen_func
from .selection import KeySelection, select_keys

__version__ = "0.1.0"

__all__ = [
    "KeySelection",
    "dynamic_mask_attn_func",
    "dynamic_mask_attn_varlen_func",
    "explain_backends",
    "flash_sparse_attn_func",
    "flash_sparse_attn_func_auto",
    "flash_sparse_attn_varlen_func",
    "flash_sparse_attn_with_kvcache_func",
    "get_available_backends",
    "select_keys",
]
