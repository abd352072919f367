"""Old import path of `flash_sparse_attn.utils.padding`."""

from flash_sparse_attn.utils.padding import (
    get_unpad_data,
    index_first_axis,
    pad_input,
    unpad_input,
    upad_input,
)

__all__ = ["get_unpad_data", "index_first_axis", "pad_input", "unpad_input", "upad_input"]
