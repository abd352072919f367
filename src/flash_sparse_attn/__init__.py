"""Trainable sparse attention with exact O(N W) cost."""

from .attention import (
    dynamic_mask_attn_func,
    dynamic_mask_attn_varlen_func,
    flash_sparse_attn_func,
    flash_sparse_attn_func_auto,
    flash_sparse_attn_varlen_func,
    flash_sparse_attn_with_kvcache_func,
)
from .dispatch import explain_backends, get_available_backends
from .selection import KeySelection, select_keys
