"""Key selection on the GPU: start and expiry of every key from its score.

`select_intervals` is the entry. The mode ``"causal"`` has its kernels in `select_causal`; in the
modes ``"shared"`` and ``"relu"``, below, one choice holds for all positions.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, repeat_call, run_once
from .select_causal import select_causal
from .select_rows import (
    _NEVER,
    PER_CALL,
    TILES,
    Rows,
    SelectTiles,
    always_kept,
    encode,
    sequence_of,
)
from .words import _PADDING, kth_best, order_keys


@triton.jit(do_not_specialize=PER_CALL)
def _shared_kernel(ptr_cu, ptr_planes, ptr_state, ptr_worst, key_len, n_seqs, row_words, window,
                   PACKED: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """Order key and index of the worst key that is chosen, for each sequence of each row."""
    i_row = (tl.program_id(0) // n_seqs).to(tl.int64)
    i_seq = tl.program_id(0) % n_seqs
    begin = i_seq * 0
    end = begin + key_len
    if PACKED:
        begin = tl.load(ptr_cu + i_seq)
        end = tl.load(ptr_cu + i_seq + 1)
    first = begin // 32
    # Sequences share at most the word in which one ends and the next begins.
    ptr_state += i_row * (row_words + n_seqs) + first + i_seq
    order, place = kth_best(
        ptr_planes + i_row * 32 * row_words + first, row_words, ptr_state,
        (end + 31) // 32 - first, begin - first * 32, end - first * 32, window, True, BLOCK_W,
    )  # fmt: skip
    ptr_worst += 2 * (i_row * n_seqs + i_seq)
    tl.store(ptr_worst, order)
    tl.store(ptr_worst + 1, first * 32 + place)


@triton.jit(do_not_specialize=PER_CALL)
def _interval_kernel(ptr_score, ptr_mask, ptr_cu, ptr_worst, ptr_rank, ptr_arrival, ptr_start,
                     ptr_expiry, key_len, heads, n_seqs, keep_first, keep_recent, n_tiles,
                     RELU: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RANK: tl.constexpr,
                     PACKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Intervals if a choice holds for all positions: the best of a sequence, or scores above 0."""
    i_row = (tl.program_id(0) // n_tiles).to(tl.int64)
    # [BLOCK]
    index = (tl.program_id(0) % n_tiles) * BLOCK + tl.arange(0, BLOCK)
    live = index < key_len
    i_seq = index * 0
    begin = index * 0
    end = begin + key_len
    if PACKED:
        i_seq = sequence_of(ptr_cu, n_seqs, index, 1, False)
        begin = tl.load(ptr_cu + i_seq, mask=live, other=0)
        end = tl.load(ptr_cu + i_seq + 1, mask=live, other=0)
    ptr_mask += i_row // heads * key_len
    order = order_keys(ptr_score + i_row * key_len, ptr_mask, index, live, HAS_MASK)
    if RELU:
        chosen = order > 0
    else:
        ptr_worst += 2 * (i_row * n_seqs + i_seq)
        worst = tl.load(ptr_worst, mask=live, other=0)
        last = tl.load(ptr_worst + 1, mask=live, other=0)
        # Of equal keys the older are chosen.
        chosen = (order > worst) | ((order == worst) & (index <= last))
    ptr_rank += i_row // heads * key_len
    ptr_arrival += i_row // heads * key_len
    is_first, until = always_kept(
        index, begin, ptr_rank, ptr_arrival, key_len, keep_first, keep_recent, live, HAS_RANK
    )
    chosen |= is_first
    real = order > _PADDING
    start = tl.where(chosen & real, 0, index - begin)
    expiry = tl.where(chosen | (until >= end), _NEVER, until - begin)
    expiry = tl.where(real, expiry, index - begin)
    tl.store(ptr_start + i_row * key_len + index, start, mask=live)
    tl.store(ptr_expiry + i_row * key_len + index, expiry, mask=live)


def _select_for_all_positions(
    rows: Rows, window: int, relu: bool, tiles: SelectTiles, start: Tensor, expiry: Tensor
) -> None:
    """Write the intervals of the modes ``"shared"`` and ``"relu"``."""
    worst = start
    if not relu:
        planes = encode(rows, tiles, start, expiry)
        row_words = planes.shape[-1]
        worst = start.new_empty(rows.n_rows, rows.n_seqs, 2)
        state = start.new_empty(rows.n_rows, row_words + rows.n_seqs)
        launch(_shared_kernel, rows.n_rows * rows.n_seqs)(
            rows.cu_seqlens,
            planes,
            state,
            worst,
            rows.key_len,
            rows.n_seqs,
            row_words,
            window,
            PACKED=rows.packed,
            BLOCK_W=tiles.words,
            num_warps=tiles.set_warps,
        )
    n_tiles = triton.cdiv(rows.key_len, tiles.keys)
    launch(_interval_kernel, rows.n_rows * n_tiles)(
        rows.score,
        rows.mask,
        rows.cu_seqlens,
        worst,
        rows.rank,
        rows.arrival,
        start,
        expiry,
        rows.key_len,
        rows.heads,
        rows.n_seqs,
        rows.keep_first,
        rows.keep_recent,
        n_tiles,
        RELU=relu,
        HAS_MASK=rows.has_mask,
        HAS_RANK=rows.has_rank,
        PACKED=rows.packed,
        BLOCK=tiles.keys,
    )


def select_intervals(
    score: Tensor,
    window_size: int,
    *,
    mode: str = "causal",
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    tiles: SelectTiles = TILES,
) -> tuple[Tensor, Tensor]:
    """Start and expiry of every key. No value is looked at; launches are repeated, see `launch`.

    Args:
        score: fp32 ``[..., K]``, contiguous, ``K < 2**30``; the leading dimensions are batch times
            KV heads, or the KV heads of packed sequences.
        window_size: ``W >= 1``.
        mode: ``"causal"``, ``"shared"`` or ``"relu"``.
        key_mask: Bool ``[B, K]``, where B divides the rows of `score` (packed: ``[K]``), True for
            real keys; row ``r`` has mask ``r // (R / B)``.
        cu_seqlens: int32 ``[N + 1]`` from 0 to K, contiguous on the same device, or ``None``.
        keep_first: First real keys of each sequence that are visible for ever.
        keep_recent: Newest real keys that are visible in any case.
        tiles: Sizes of the kernels' pieces.

    Returns:
        ``start`` and ``expiry``, int32 in the shape of `score`; see `selection.KeySelection`.

    Raises:
        ValueError: Rows of 2**30 keys or more.
    """
    if score.shape[-1] >= 1 << 30:
        raise ValueError(
            f"score: rows of at most {(1 << 30) - 1} keys, got {score.shape[-1]}; split them"
        )
    if score.numel() == 0:
        start = torch.empty_like(score, dtype=torch.int32)
        return start, torch.empty_like(start)
    rows = Rows.of(score, key_mask, cu_seqlens, keep_first, keep_recent)
    window = min(window_size, rows.key_len)
    if score.is_cuda and mode == "causal":
        _compile_causal(score.device, rows.has_mask, rows.has_rank, rows.packed, tiles)
    facts = ("select", mode, window, rows.keep_first, rows.keep_recent, tiles)
    given = (
        score,
        rows.mask if rows.has_mask else None,
        rows.cu_seqlens if rows.packed else None,
        *((rows.rank, rows.arrival) if rows.has_rank else (None, None)),
    )
    run = functools.partial(_select, rows, window, mode, tiles)
    start, expiry = repeat_call(facts, given, run)
    return start, expiry


def _select(rows: Rows, window: int, mode: str, tiles: SelectTiles) -> tuple[Tensor, Tensor]:
    start = torch.empty_like(rows.score, dtype=torch.int32)
    expiry = torch.empty_like(start)
    if mode == "causal":
        select_causal(rows, window, tiles, start, expiry)
    else:
        _select_for_all_positions(rows, window, mode == "relu", tiles, start, expiry)
    return start, expiry


@functools.cache
def _compile_causal(
    device: torch.device, has_mask: bool, has_rank: bool, packed: bool, tiles: SelectTiles
) -> None:
    """Run every kernel once, so that the first longer sequence compiles nothing in mid-training."""
    key_len = 32 * tiles.words + 1
    score = torch.zeros(1, key_len, device=device)
    rows = Rows.of(
        score,
        torch.ones(1, key_len, dtype=torch.bool, device=device) if has_mask else None,
        torch.arange(2, dtype=torch.int32, device=device) * key_len if packed else None,
        keep_first=int(has_rank),
        keep_recent=0,
    )
    start = torch.empty_like(score, dtype=torch.int32)
    expiry = torch.empty_like(start)
    run_once(device, functools.partial(select_causal, rows, 1, tiles, start, expiry))
