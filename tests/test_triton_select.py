"""The selection kernels, interpreted on the CPU, bit for bit against the eager selection."""

from __future__ import annotations

import heapq

import pytest
import torch
from interpreter import run_interpreted
from oracles import SCORE_KINDS, scores_of_kind
from torch import Tensor

pytest.importorskip("triton")

from flash_sparse_attn.backends import eager_select
from flash_sparse_attn.backends.triton.select import select_intervals
from flash_sparse_attn.backends.triton.select_rows import TILES, SelectTiles
from flash_sparse_attn.intervals import NEVER

# So small that a few hundred keys go through every level: nodes of 128, long nodes of 256.
SMALL = SelectTiles(
    chunk=64, node=128, words=16, rivals=32, slots=128, prefixes=2, encode=8, keys=128
)


def check(
    score: Tensor,
    window_size: int,
    mode: str = "causal",
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
    tiles: SelectTiles = SMALL,
) -> tuple[Tensor, Tensor]:
    """Compare with the eager selection; returns start and expiry."""
    start, expiry = select_intervals(
        score,
        window_size,
        mode=mode,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        keep_first=keep_first,
        keep_recent=keep_recent,
        tiles=tiles,
    )
    truth = eager_select.intervals(
        score, window_size, mode, key_mask, cu_seqlens, keep_first, keep_recent
    )
    assert start.dtype == expiry.dtype == torch.int32
    assert torch.equal(start, truth[0])
    assert torch.equal(expiry, truth[1])
    return start, expiry


def expiry_by_heap(score: list[float], window_size: int) -> list[int]:
    """Causal expiry of one row, from the definition: a heap of the best keys so far."""
    heap: list[tuple[float, int]] = []
    expiry = [NEVER] * len(score)
    for position, value in enumerate(score):
        heapq.heappush(heap, (value, position))
        if len(heap) > window_size:
            expiry[heapq.heappop(heap)[1]] = position
    return expiry


def rows_of_all_kinds(key_len: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.cat([scores_of_kind(kind, (1, key_len), generator) for kind in SCORE_KINDS])


def test_every_kind_of_scores():
    score = rows_of_all_kinds(140)
    _, expiry = check(score, 17)
    for row, ends in zip(score.tolist(), expiry.tolist(), strict=True):
        assert ends == expiry_by_heap(row, 17)


@pytest.mark.parametrize("key_len", (1, 32, 65))
def test_window_sizes(key_len):
    score = rows_of_all_kinds(key_len)[3:5]
    for window_size in sorted({1, key_len - 1, key_len, 3 * key_len} - {0}):
        check(score, window_size)


@pytest.mark.parametrize("window_size", (40, 150, 300))
def test_long_sequences(window_size):
    """Through all levels: long prefixes merged, and read whole for one bound or for two."""
    generator = torch.Generator().manual_seed(window_size)
    score = torch.randn(1, 540, generator=generator).mul(8).round()
    _, expiry = check(score, window_size)
    assert expiry[0].tolist() == expiry_by_heap(score[0].tolist(), window_size)


def test_result_does_not_depend_on_tiles():
    generator = torch.Generator().manual_seed(1)
    score = torch.randint(0, 9, (1, 130), generator=generator).float()
    small, default = check(score, 30), check(score, 30, tiles=TILES)
    assert torch.equal(small[1], default[1])


def test_nan_ranks_last():
    score = torch.full((1, 80), -torch.inf)
    score[0, ::2] = torch.nan
    score[0, 40] = -torch.nan
    _, expiry = check(score, 3)
    assert expiry[0, 6::2].tolist() == list(range(6, 80, 2))
    assert expiry[0, 1::2].tolist() == [*range(7, 81, 2), NEVER, NEVER, NEVER]


def padded(batch: int, key_len: int) -> Tensor:
    """Left padding in the first entry, holes in the others."""
    mask = torch.rand(batch, key_len, generator=torch.Generator().manual_seed(5)) < 0.7
    mask[0] = torch.arange(key_len) >= key_len // 3
    return mask


BORDERS = torch.tensor([0, 5, 5, 101, 102, 290], dtype=torch.int32)


@pytest.mark.parametrize("keep_first,keep_recent", ((0, 0), (3, 11)))
def test_padding(keep_first, keep_recent):
    score = rows_of_all_kinds(140)[2:6].view(2, 2, 140)[:, :, :100].contiguous()
    mask = padded(2, 100)
    start, expiry = check(score, 9, key_mask=mask, keep_first=keep_first, keep_recent=keep_recent)
    never_seen = (start == expiry) & (start == torch.arange(100))
    assert never_seen.masked_select(~mask[:, None].expand_as(score)).all()


@pytest.mark.parametrize("use_mask", (False, True))
def test_packed_sequences(use_mask):
    score = rows_of_all_kinds(290)[4:5]
    mask = padded(2, 290)[1] if use_mask else None
    check(score, 20, cu_seqlens=BORDERS, key_mask=mask, keep_first=2, keep_recent=25)


def test_long_packed_sequences():
    """Long nodes of more than one sequence, none of them at a whole word."""
    score = rows_of_all_kinds(650)[4:5]
    borders = torch.tensor([0, 7, 310, 650], dtype=torch.int32)
    check(score, 70, cu_seqlens=borders)


@pytest.mark.parametrize("mode", ("shared", "relu"))
@pytest.mark.parametrize("window_size", (1, 30, 300))
def test_choices_for_all_positions(mode, window_size):
    score = rows_of_all_kinds(290)[4:6]
    mask = padded(2, 290)
    check(score, window_size, mode, keep_first=4, keep_recent=9)
    check(score[:, None], window_size, mode, key_mask=mask, keep_first=4, keep_recent=9)
    check(score[:1], window_size, mode, cu_seqlens=BORDERS, key_mask=mask[1], keep_first=2)


def test_nothing_to_select():
    start, expiry = select_intervals(torch.empty(2, 3, 0), 4)
    assert start.shape == expiry.shape == (2, 3, 0)


def test_too_long_a_row():
    with pytest.raises(ValueError, match="score: rows of at most"):
        select_intervals(torch.empty(1, 1 << 30, device="meta"), 4)


run_interpreted(globals())
