"""Tile sizes: the only place with such numbers, each with the reason for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

KNOWN_TRITON = ((3, 6),)
"""Versions of Triton whose Gluon and whose way to start a compiled kernel are known."""

SLOT_ALIGN = 128
"""Parts of slot lists begin, and are padded, at multiples of this; no key block is larger."""

MAX_EPOCH = 8192
"""Queries of an epoch at most."""

FEW_EPOCHS, FEW_EPOCH = 4, 512
"""Fewer epochs than the first are made shorter, down to the second: 32 heads on 8, 4096 tokens, W =
2048, two, four and eight epochs: forward 0.310, 0.290, 0.283, backward 0.967, 0.881, 0.883."""

MANY_EPOCHS = 64
"""So many epochs are made longer: up to twice as long, or to 1024. Milliseconds of a step, 32 heads
on 8, W = 2048, epochs of 2048 and 4096: 131072 tokens 42.5 and 42.8 (plan 0.25 and 0.17), a million
346 and 341 (plan 2.1 and 1.4), but 32768 tokens 10.9 and 11.3. There W = 256 with epochs of 256,
512, 1024: 2.84, 2.60, 2.51; W = 512: 4.36, 3.95, 3.77."""

DIRECT_KEYS = 2048
"""Up to so many keys the kernels read a bool mask themselves: to plan would take longer."""

FEW_TILES = 264
"""So few tiles leave multiprocessors with one or none, which waits for its loads: smaller ones."""

REST_ELEMENTS = 1 << 21
"""Elements of the output at most for which forward keeps, in as much memory again, what rounding
took from it: with few keys that is the largest error of the gradient of a bias. At (1, 2, 1, 32768,
64), twice as many, to write those 8 MB would take about 2 of 73 microseconds."""

DENSE_PROGRAMS = 512
"""Programs of dK/dV that keep a GPU busy where all keys are visible."""

SHOWN_PROGRAMS = 640
"""The same for a mask of keys, counted in 1024 keys, of which it is expected to show few: all of
backward for the best 1024 of 32768 took 0.162, 0.154, 0.156, and 0.165 with 512, 640, 768, 1024."""

USES_AT_ONCE = 4
"""Contributions to one key that are loaded together when they are summed."""

REDUCED_FLOATS = 1024
"""fp32 of dK, and of dV, that one program of that sum owns."""


@dataclass(frozen=True)
class TileConfig:
    """Sizes of one kernel.

    Attributes:
        block_m: Rows, (query, head) pairs, of a tile.
        block_n: Key slots of a block, a divisor of `SLOT_ALIGN`.
        num_warps: Warps of a program.
        num_stages: Loads in flight.
        uses_tma: Whether blocks of neighbouring rows are loaded through tensor descriptors.
        max_registers: Registers of a thread at most, so that one more program fits a
            multiprocessor; ``None`` leaves it to the compiler.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    uses_tma: bool = False
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        options = {"num_warps": self.num_warps}
        # Not every target knows the other.
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})


@dataclass(frozen=True)
class Tiles:
    """The kernels of one (architecture, head dimension).

    Attributes:
        forward, grad_query, grad_key: Output, dQ, dK and dV.
        gathered: Output where rows of keys are gathered, if not as `forward`: epochs see any
            number of keys, and every tile reads them anew.
        keys: The same where slots are the keys.
        few: In place of both where their tiles were fewer than `FEW_TILES`.
    """

    forward: TileConfig
    grad_query: TileConfig
    grad_key: TileConfig
    gathered: TileConfig | None = None
    keys: TileConfig | None = None
    few: TileConfig | None = None

    def forward_of(self, slots: str, num_rows: int) -> TileConfig:
        """The forward kernel for the slots of a plan and so many (query, head) pairs."""
        if slots == "copied":
            return self.forward
        wide = (self.gathered if slots == "gathered" else self.keys) or self.forward
        return self.few if self.few and num_rows < FEW_TILES * wide.block_m else wide


def _tiles(*sizes: tuple[Any, ...]) -> Tiles:
    return Tiles(*(TileConfig(*size) for size in sizes))


_TMA, _POINTERS = True, False

# (architecture, padded head dimension) -> forward, dQ, dK/dV, and forward of gathered slots, of
# keys, of few tiles. The times are in milliseconds, with all copies and sums, bf16, one H200,
# Triton 3.6, random scores.
_TABLE = {
    # (B, H, Hkv, N, W) = (1, 2, 1, 32768, 1024): forward 0.072 and all of backward 0.210. Other
    # forwards: pointers 0.073, 3 stages 0.079, 8 warps 0.110, 128 rows 0.096, no bound on registers
    # 0.082: with it four programs share a multiprocessor, not three. Backward, dQ with 168
    # registers and 3 stages 0.209, but with masks of 32768 keys 4 % slower, without a mask 6 %;
    # without a bound 8 % slower; dK/dV with 64 rows 6 % slower, a bound of 168 registers 11 %, 8
    # warps more than 25 %.
    ("sm_90", 64): _tiles(
        (64, 64, 4, 2, _TMA, 128),
        (64, 64, 4, 2, _TMA, 128),
        (128, 64, 4, 2, _TMA),
        # Bool masks at 32768 of the best 1024 keys, of a sliding window of 1024, of a prefix, and
        # windows at 8192: 0.113, 0.065, 0.688, 0.023; 2 stages 0.125, 0.062, 0.668, 0.022; 64 slots
        # and 128 registers 0.158, 0.058, 0.727, 0.025; 128 rows and 64 slots 0.192, 0.068, 0.867,
        # 0.032; without descriptors 0.117, 0.089, 1.071, 0.029.
        (64, 128, 4, 3, _TMA, 168),
        # All keys visible, without a bias and with one per key, which tiles then fetched themselves
        # (now 0.687): 0.641, 0.813; 3 stages 0.622, 0.882; without descriptors 0.969, 1.083.
        (64, 128, 4, 2, _TMA, 168),
    ),
    # (1, 32, 8, 32768, 2048): 2.7, 3.3, 4.3. Two programs of 4 warps share a multiprocessor: one
    # computes scores while the other waits; 8 warps: 2.9, 3.5, 4.9.
    ("sm_90", 128): _tiles(
        (128, 64, 4, 2, _TMA),
        (64, 64, 4, 2, _TMA),
        (64, 64, 4, 2, _TMA),
        # The best 2048 of 16384 keys, and a sliding window of 1024 at 8192, 8 heads on 2: 0.552,
        # 0.118; 4 warps and 2 stages 0.620, 0.097; 64 rows 0.564, 0.101; without descriptors 0.549,
        # 0.135.
        (128, 64, 8, 3, _TMA),
    ),
    # Run for correctness, not timed.
    ("sm_90", 256): _tiles((128, 32, 8, 2, _TMA), (64, 32, 8, 2, _TMA), (32, 64, 8, 2, _TMA)),
    # Compiled only.
    ("sm_80", 64): _tiles(
        (128, 64, 4, 3, _POINTERS), (64, 64, 4, 2, _POINTERS), (64, 64, 4, 2, _POINTERS)
    ),
    ("sm_80", 128): _tiles(
        (128, 64, 8, 2, _POINTERS), (64, 32, 4, 2, _POINTERS), (32, 64, 4, 2, _POINTERS)
    ),
    ("sm_80", 256): _tiles(
        (64, 32, 8, 2, _POINTERS), (32, 32, 8, 2, _POINTERS), (32, 32, 8, 2, _POINTERS)
    ),
    ("sm_86", 64): _tiles(
        (128, 64, 4, 2, _POINTERS), (64, 64, 4, 2, _POINTERS), (64, 64, 4, 2, _POINTERS)
    ),
    ("sm_86", 128): _tiles(
        (128, 32, 8, 2, _POINTERS), (64, 32, 4, 2, _POINTERS), (32, 64, 4, 2, _POINTERS)
    ),
    ("sm_86", 256): _tiles(
        (64, 32, 8, 2, _POINTERS), (32, 32, 8, 1, _POINTERS), (16, 32, 8, 1, _POINTERS)
    ),
    ("sm_100", 64): _tiles((128, 64, 4, 3, _TMA), (128, 64, 8, 2, _TMA), (64, 64, 4, 2, _TMA)),
    ("sm_100", 128): _tiles((128, 64, 8, 2, _TMA), (128, 64, 8, 2, _TMA), (64, 64, 8, 2, _TMA)),
    ("sm_100", 256): _tiles((128, 32, 8, 2, _TMA), (64, 32, 8, 2, _TMA), (32, 64, 8, 2, _TMA)),
    ("gfx942", 64): _tiles(
        (128, 64, 4, 2, _POINTERS), (64, 32, 4, 2, _POINTERS), (32, 64, 4, 2, _POINTERS)
    ),
    ("gfx942", 128): _tiles(
        (128, 32, 4, 2, _POINTERS), (64, 32, 4, 2, _POINTERS), (32, 64, 4, 2, _POINTERS)
    ),
    ("gfx942", 256): _tiles(
        (64, 32, 8, 1, _POINTERS), (32, 32, 8, 1, _POINTERS), (32, 32, 8, 1, _POINTERS)
    ),
}

# The same where tiles read a mask, or a bias that depends on the query, themselves: more registers
# for a row; with the tiles above dK/dV has 762 accesses to spilled registers in its loop. With the
# mask of the best 1024 of 32768 keys and a bias of pairs: forward 0.343, 2 or 4 stages 0.347, 112
# registers 0.346, 144 0.389, 64 slots 0.364, 32 rows and 64 slots 0.348; all of backward 1.333,
# with 128 registers for dQ 1.421, 8 warps 1.459, without a bound on registers for dK/dV 4 % slower,
# with 64 rows for it 11 %; 32 slots and 168 registers for dQ are 8 % faster there
# and 5 to 18 % slower at 1024 to 4096 keys. Few tiles, mask and bias of pairs, 256, 1024, 2048
# keys: 0.0078, 0.0158, 0.0321; without descriptors 0.0094, 0.0202, 0.0363, 2 stages 0.0079, 0.0192,
# 0.0341, 64 keys 0.0090, 0.0192, 0.0407; 32 rows half as much again, 64 rows more.
_PAIRS = {
    ("sm_90", 64): _tiles(
        (64, 64, 4, 3, _POINTERS),
        (64, 64, 4, 3, _TMA),
        (32, 64, 4, 2, _TMA, 168),
        (64, 32, 4, 3, _POINTERS, 128),
        (64, 64, 4, 3, _POINTERS),
        (16, 128, 4, 3, _TMA),
    ),
    # Compiled only, none spills in a loop.
    ("sm_90", 128): _tiles(
        (64, 64, 4, 2, _TMA),
        (64, 64, 4, 2, _TMA),
        (32, 64, 4, 2, _TMA),
        (64, 64, 4, 2, _TMA),
        (64, 64, 4, 2, _TMA),
        (16, 64, 4, 3, _POINTERS),
    ),
}


@dataclass(frozen=True)
class ScoreTiles:
    """Sizes of the kernels of key scores, `key_scores.py`.

    The bits of a score depend on `lanes`, `fold_values` and the width of hidden states alone.

    Attributes:
        heads: KV heads of a program at most.
        tokens: Tokens of a tile; where tiles were fewer than `FEW_TILES`, one.
        lanes: Columns that are summed side by side, at most.
        num_stages: Loads of hidden states in flight.
        fold_values, fold_columns: Of the product of the weights: terms that are summed side by
            side, and columns of a program.
        chunk: Tokens of a program of the gradients at least.
        max_chunks: Chunks at most: partial sums of the gradients of weights.
        grad_lanes: Columns of a program of the gradients.
        sum_chunks, sum_lanes: Chunks that are summed side by side, and columns of a program.
        unfold_values: Rows of the first weight whose gradient one program writes.
    """

    heads: int
    tokens: int
    lanes: int
    num_stages: int
    fold_values: int
    fold_columns: int
    chunk: int
    max_chunks: int
    grad_lanes: int
    sum_chunks: int
    sum_lanes: int
    unfold_values: int

    def chunk_len(self, num_tokens: int) -> int:
        """Tokens of a chunk, whole multiples of `chunk`."""
        return -(-num_tokens // (self.max_chunks * self.chunk)) * self.chunk


# Chosen by compiled code: on sm_90 nothing is spilled, four programs of 16 tokens share a
# multiprocessor, and `grad_lanes` of 64 let the loads of weights take the layout of hidden states.
# Microseconds, forward and backward, on one H200, width 1024 with 4 KV heads: 1 token 8.3 and 25,
# 16384 tokens 22 and 78; width 4096 with 8: 115 and 465. Other sizes have not been tried.
SCORE_TILES = ScoreTiles(4, 16, 128, 4, 16, 32, 128, 128, 64, 32, 32, 4)


@functools.cache
def knows_triton() -> bool:
    """Whether the installed version of Triton is one of `KNOWN_TRITON`."""
    import triton  # here, so that sizes alone can be had without it

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version in KNOWN_TRITON


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a head is padded to."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tiles_for(architecture: str, head_dim: int, reads_pairs: bool = False) -> Tiles:
    """The tile sizes of an architecture of the table for a head dimension.

    `reads_pairs`: tiles read a mask, or a bias that depends on the query, themselves.
    """
    row = architecture, max(64, padded_head_dim(head_dim))
    return _PAIRS[row] if reads_pairs and row in _PAIRS else _TABLE[row]


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The row of the table that serves a device: its own, or that of the closest older one."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "gfx942" if torch.version.hip is not None else "sm_80"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    # 8.6, 8.9 and 12.x have 99 KiB of shared memory for a program.
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"


def keeps_rest(out: torch.Tensor) -> bool:
    """Whether forward keeps what rounding took from an output of this shape, for backward."""
    return out.numel() <= REST_ELEMENTS


def epoch_length(kept: int, keep_recent: int) -> int:
    """Queries of an epoch for so many keys kept.

    About as many as keys that a query sees. Half of it was 1 % faster forward and 5 % slower
    backward at W = 2048, and twice as much 5 % slower forward.
    """
    seen = max(1, kept + keep_recent)
    return min(MAX_EPOCH, max(128, 1 << (seen.bit_length() - 1)))


def mask_epoch_length(query_len: int, reads_pairs: bool = False) -> int:
    """Queries of an epoch of a plan from a mask: a short list of keys, and not too many sums.

    Half as many where a bias that depends on the query is gathered (`reads_pairs`).

    512, 1024, 2048 queries at 8192: backward of a sliding window 0.064, 0.071, 0.080, of documents
    0.060, 0.070, 0.072, forward the same. 1024, 2048, 4096 at 32768: backward of a sliding window
    0.214, 0.193, 0.185, of the best 1024 keys 0.342, 0.379, 0.453, forward 0.113, 0.116, 0.128.
    Programs of dK/dV that find no slots grow with the square of the length over this. With a bias
    of pairs for the best 1024 of 32768 keys, epochs of 256, 512, 1024: forward 0.324, 0.333, 0.347,
    with planning 0.514, 0.509, 0.517, backward 1.431, 1.326, 1.334.
    """
    length = 1 << (query_len - 1).bit_length()
    longest = min(MAX_EPOCH, max(1024, length // 32))
    return max(128, min(longest // 2 if reads_pairs else longest, length // 16))


def dense_epoch_length(query_len: int, num_blocks: int, num_programs: int) -> int:
    """Queries of an epoch if one list serves them all, a multiple of `SLOT_ALIGN`.

    The whole text, if `num_blocks` blocks of keys are as many as the programs that keep a GPU busy
    in the backward pass; else parts of it.
    """
    parts = max(1, min(num_programs // max(1, num_blocks), query_len // 256))
    return -(-query_len // (parts * SLOT_ALIGN)) * SLOT_ALIGN


def slot_rows(rows: int, elements: int, query: torch.Tensor, key: torch.Tensor) -> int:
    """How many rows of keys are taken at a time, if copies of K and V have so many elements."""
    return _rows(rows, 2 * elements * key.element_size(), query, key)


def partial_rows(rows: int, elements: int, query: torch.Tensor, key: torch.Tensor) -> int:
    """How many rows of keys backward takes at a time, if dK has so many fp32 per row."""
    return _rows(rows, 8 * elements, query, key)


def _rows(rows: int, nbytes: int, query: torch.Tensor, key: torch.Tensor) -> int:
    """All of them if that is little beside the call's own tensors; so long texts fit."""
    own = 4 * query.numel() * query.element_size() + 4 * key.numel() * key.element_size()
    return max(1, min(rows, max(1 << 30, own // 16) // nbytes))
