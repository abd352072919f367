"""Tile sizes of the decoding kernels, and how many splits their keys get."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from .config import padded_head_dim

_MAX_SPLITS = 256
_MIN_ROWS, _MAX_ROWS = 16, 64
_SUMMED = 8192
"""fp32 of splits that are summed at a time."""


@dataclass(frozen=True)
class DecodeConfig:
    """Sizes of the split kernel.

    Attributes:
        block_m: Rows, (query, head) pairs, of a tile.
        block_n: Keys of a block.
        num_warps: Warps of a program.
        num_stages: Blocks in flight.
        programs: Programs that are aimed at for every multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 3
    programs: int = 2

    def splits(self, tiles: int, key_len: int, device: torch.device) -> int:
        """Splits of the keys for so many row tiles, from shapes alone."""
        wanted = multiprocessors(device) * self.programs // tiles
        return max(1, min(wanted, -(-key_len // self.block_n), _MAX_SPLITS))


@cache
def decode_config(rows: int, head_dim: int, in_pairs: bool) -> DecodeConfig:
    """Sizes for so many rows of a KV head, with keys of 8 bits `in_pairs`.

    One H200, Triton 3.6, 8 KV heads, D 128, in microseconds. 131072 keys: 124 with 2 warps, 159
    with 4 warps and 4 programs for each multiprocessor; 8 bits, when Triton's casts unpacked them,
    96 with 128 keys in a block, 113 with 64. A window of 2048 keys, 8 sequences: 24.9 with 2 warps,
    25.8 with 4, 26.4 with blocks of 32 keys, 28.9 with 4 programs; 8 bits likewise 23.1 and 26.3.
    """
    block_m = max(_MIN_ROWS, min(_MAX_ROWS, 1 << (rows - 1).bit_length()))
    width = padded_head_dim(head_dim) // (2 if in_pairs else 1)
    # Blocks of K and V in two buffers of at most 72 KiB fit every GPU.
    block_n = max(32, min(128 if in_pairs else 64, 8192 // width))
    # Two warps spill with wider heads, more rows, or pairs to unpack.
    is_light = block_m == _MIN_ROWS and width <= 128 and not in_pairs
    return DecodeConfig(block_m, block_n, 2 if is_light else 4)


def splits_at_once(splits: int, head_dim: int) -> dict[str, int]:
    """How many splits there are with padding, and how many are summed at a time."""
    padded = 1 << (splits - 1).bit_length()
    return {"SPLITS_PAD": padded, "TAKES": min(padded, _SUMMED // padded_head_dim(head_dim))}


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def unpacks_fp8(device: torch.device) -> bool:
    """Whether a GPU has instructions that unpack e4m3."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)
