"""Old import path of `flash_sparse_attn.utils.mask`."""

from flash_sparse_attn.utils.mask import (
    block_smooth,
    create_mask,
    relu_mask,
    topk_indices,
    topk_mask,
)

__all__ = ["block_smooth", "create_mask", "relu_mask", "topk_indices", "topk_mask"]
