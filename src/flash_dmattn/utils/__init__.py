"""Old import path of `flash_sparse_attn.utils`."""
