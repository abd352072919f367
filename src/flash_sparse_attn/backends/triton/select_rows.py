"""What every kernel of the selection reads: the rows of a call and their bit planes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...intervals import NEVER
from .launch import launch
from .words import _PADDING, order_keys

_NEVER = tl.constexpr(NEVER)

# Arguments whose value or alignment must not compile a kernel anew.
PER_CALL = [
    "ptr_score",
    "ptr_mask",
    "ptr_cu",
    "ptr_rank",
    "ptr_arrival",
    "key_len",
    "heads",
    "n_seqs",
    "row_words",
    "window",
    "keep_first",
    "keep_recent",
    "n_tiles",
]


@dataclass(frozen=True)
class SelectTiles:
    """Sizes of the selection's pieces; none depends on the shape of a call, nor any result on them.

    Attributes:
        chunk: Keys of a chunk, at least 64 and a power of two.
        node: Keys of a node, a power of two, at least twice `chunk`.
        words: Words that a program chooses from at once; sets of more are read so many at a time.
        rivals: Keys of a chunk that are compared at a time.
        slots: Slots of a list that are written at a time.
        prefixes: Programs that choose from whole prefixes; each needs memory for one.
        encode: Words that a program encodes.
        encode_warps: Warps of such a program.
        keys: Keys of a program of the element-wise kernel.
        chunk_warps: Warps of a program for a chunk.
        set_warps: Warps of a program for a set of up to `words` words.
        prefix_warps: Warps of a program for prefixes.
    """

    # Milliseconds of whole selections on one H200, for comparison: rows x keys (window) 1 x 32768
    # (1024), 8 x 32768 and 8 x 1048576 (2048) took 0.037, 0.071 and 2.09 with the sizes below.
    # Chunks of 128 in nodes of 2048: 0.040, 0.084, 2.10. Nodes of 2048: 0.037, 0.087, 2.30.
    chunk: int = 64
    node: int = 1024
    # 2048: 0.045, 0.088, 2.47.
    words: int = 1024
    # 64: 0.037, 0.075, 2.30; no difference between 8 and 16.
    rivals: int = 16
    slots: int = 1024
    # Half as many: 8 x 1048576 takes 2.13.
    prefixes: int = 528
    # More warps, or fewer words, repeat work: 0.046, 0.080, 2.33.
    encode: int = 32
    encode_warps: int = 1
    keys: int = 1024
    # 1: 0.040, 0.080, 2.60. 4 (chunks of 128): 0.040, 0.096, 2.66.
    chunk_warps: int = 2
    # 4: 0.041, 0.074, 2.05. 16: 0.040, 0.079, 2.44.
    set_warps: int = 8
    # 8: 8 x 1048576 takes 2.11 with 2048 keys kept, 4.49 instead of 4.09 with 20000.
    prefix_warps: int = 16


TILES = SelectTiles()


@dataclass(frozen=True)
class Rows:
    """The rows of a call, ``[R, K]``. A pointer that it does not need is that of the scores."""

    score: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    rank: Tensor
    arrival: Tensor
    n_rows: int
    key_len: int
    heads: int
    n_seqs: int
    keep_first: int
    keep_recent: int
    has_mask: bool
    has_rank: bool
    packed: bool

    @classmethod
    def of(
        cls,
        score: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        keep_first: int,
        keep_recent: int,
    ) -> Rows:
        """Gather the arguments of `select.select_intervals`."""
        key_len = score.shape[-1]
        n_rows = score.numel() // key_len
        mask = rank = arrival = score
        heads = 1
        if key_mask is not None:
            real = key_mask.contiguous().view(-1, key_len)
            heads = n_rows // real.shape[0]
            mask = real.view(torch.uint8)
            if keep_first or keep_recent:
                rank, arrival = _real_order(real)
        return cls(
            score=score,
            mask=mask,
            cu_seqlens=score if cu_seqlens is None else cu_seqlens,
            rank=rank,
            arrival=arrival,
            n_rows=n_rows,
            key_len=key_len,
            heads=heads,
            n_seqs=1 if cu_seqlens is None else cu_seqlens.numel() - 1,
            keep_first=min(keep_first, key_len),
            keep_recent=min(keep_recent, key_len),
            has_mask=key_mask is not None,
            has_rank=rank is not score,
            packed=cu_seqlens is not None,
        )


def _real_order(real: Tensor) -> tuple[Tensor, Tensor]:
    """Number of real keys before each key, and the index of each real key, int32 ``[B, K]``."""
    key_len = real.shape[-1]
    rank = real.cumsum(-1, dtype=torch.int32) - real.to(torch.int32)
    arrival = rank.new_full((real.shape[0], key_len + 1), NEVER)
    index = torch.arange(key_len, dtype=torch.int32, device=real.device)
    arrival.scatter_(-1, torch.where(real, rank, key_len).long(), index.expand(real.shape))
    return rank, arrival[:, :-1].contiguous()


@triton.jit
def sequence_of(ptr_cu, n_seqs, index, length, NODES: tl.constexpr):
    """The last sequence that begins at or before `index`, which counts keys or nodes.

    Node ``m`` of sequence ``q`` has the number ``cu[q] // length + q + m``. These rise, so neither
    a table nor a look at the lengths is needed on the host.
    """
    seq = index * 0
    size = n_seqs
    while size > 1:
        half = size // 2
        first = tl.load(ptr_cu + seq + half)
        if NODES:
            first = first // length + seq + half
        seq = tl.where(first <= index, seq + half, seq)
        size -= half
    return seq


@triton.jit
def always_kept(index, begin, ptr_rank, ptr_arrival, key_len, keep_first, keep_recent, live,
                HAS_RANK: tl.constexpr):  # fmt: skip
    """Which keys are kept for ever, and up to which index the others are kept at least."""
    nth = index - begin
    until = index + keep_recent
    if HAS_RANK:
        nth = tl.load(ptr_rank + index, mask=live, other=0)
        arrival = nth + keep_recent
        nth -= tl.load(ptr_rank + begin + index * 0, mask=live, other=0)
        until = tl.load(ptr_arrival + arrival, mask=live & (arrival < key_len), other=_NEVER)
    return nth < keep_first, until


@triton.jit(do_not_specialize=PER_CALL)
def _encode_kernel(ptr_score, ptr_mask, ptr_cu, ptr_planes, ptr_start, ptr_expiry,
                   key_len, heads, n_seqs, row_words, n_tiles,
                   HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
                   BLOCK_W: tl.constexpr):  # fmt: skip
    """Bit planes of `BLOCK_W` words, and the intervals of their keys if nothing drives them out."""
    i_row = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_word = (tl.program_id(0) % n_tiles) * BLOCK_W
    ptr_score += i_row * key_len
    ptr_mask += i_row // heads * key_len

    offs_w = i_word + tl.arange(0, BLOCK_W)
    offs_b = tl.arange(0, 32)[None, :]
    # [BLOCK_W, 32]
    planes = tl.zeros([BLOCK_W, 32], tl.uint32)
    # Unrolled, so that a load is under way while the key before is spread: 5.7 instead of 7.6 us.
    for i in tl.range(0, 32, loop_unroll_factor=8):
        index = offs_w * 32 + i
        live = (offs_w < row_words) & (index < key_len)
        order = order_keys(ptr_score, ptr_mask, index, live, HAS_MASK) ^ _PADDING
        order = order.to(tl.uint32, bitcast=True)[:, None]
        # Bit b enters at the top and is shifted down to bit i: one funnel shift.
        planes = (planes >> 1) | ((order >> offs_b) << 31)
    ptr_planes += i_row * 32 * row_words + offs_b * row_words + offs_w[:, None]
    tl.store(ptr_planes, planes.to(tl.int32, bitcast=True), mask=(offs_w < row_words)[:, None])

    # [BLOCK_W * 32]
    index = i_word * 32 + tl.arange(0, BLOCK_W * 32)
    live = index < key_len
    local = index
    if PACKED:
        seq = sequence_of(ptr_cu, n_seqs, index, 1, False)
        local = index - tl.load(ptr_cu + seq, mask=live, other=0)
    expiry = tl.full([BLOCK_W * 32], _NEVER, tl.int32)
    if HAS_MASK:
        real = tl.load(ptr_mask + index, mask=live, other=0) != 0
        expiry = tl.where(real, _NEVER, local)
    tl.store(ptr_start + i_row * key_len + index, local, mask=live)
    tl.store(ptr_expiry + i_row * key_len + index, expiry, mask=live)


def encode(rows: Rows, tiles: SelectTiles, start: Tensor, expiry: Tensor) -> Tensor:
    """Bit planes int32 ``[R, 32, ceil(K / 32)]``; writes the intervals keys have if none dies."""
    row_words = triton.cdiv(rows.key_len, 32)
    planes = torch.empty(rows.n_rows, 32, row_words, dtype=torch.int32, device=start.device)
    n_tiles = triton.cdiv(row_words, tiles.encode)
    launch(_encode_kernel, rows.n_rows * n_tiles)(
        rows.score,
        rows.mask,
        rows.cu_seqlens,
        planes,
        start,
        expiry,
        rows.key_len,
        rows.heads,
        rows.n_seqs,
        row_words,
        n_tiles,
        HAS_MASK=rows.has_mask,
        PACKED=rows.packed,
        BLOCK_W=tiles.encode,
        num_warps=tiles.encode_warps,
    )
    return planes
