"""The selection kernels on a GPU, bit for bit against the eager selection."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from time_select import PATTERNS, scores_of_pattern

from flash_sparse_attn.backends import eager_select
from flash_sparse_attn.backends.triton import select_causal, select_rows
from flash_sparse_attn.backends.triton.select import select_intervals

pytestmark = pytest.mark.gpu


def check(
    score: Tensor,
    window_size: int,
    mode: str = "causal",
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    keep_first: int = 0,
    keep_recent: int = 0,
) -> None:
    start, expiry = select_intervals(
        score,
        window_size,
        mode=mode,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        keep_first=keep_first,
        keep_recent=keep_recent,
    )
    truth = eager_select.intervals(
        score, window_size, mode, key_mask, cu_seqlens, keep_first, keep_recent
    )
    assert torch.equal(start, truth[0])
    assert torch.equal(expiry, truth[1])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("keys,window_size", ((5000, 100), (40001, 2048), (150000, 1000)))
def test_patterns(pattern, keys, window_size):
    check(scores_of_pattern(pattern, 2, keys), window_size)


@pytest.mark.parametrize("window_size", (1, 1023, 8192, 8193, 20000, 69999, 70000))
def test_window_sizes(window_size):
    check(scores_of_pattern("95 values", 2, 70000), window_size)


@pytest.mark.parametrize("mode", ("causal", "shared", "relu"))
@pytest.mark.parametrize("keys,window_size", ((700, 50), (40000, 1000), (100001, 30000)))
def test_padding_and_packing(mode, keys, window_size):
    generator = torch.Generator("cuda").manual_seed(5)
    score = torch.randint(-20, 20, (2, 3, keys), device="cuda", generator=generator).float()
    score[0, 0, 3] = torch.nan
    score[1, 1, 5] = -torch.inf
    score[0, 1, 9] = -0.0
    mask = torch.rand(2, keys, device="cuda", generator=generator) < 0.7
    borders = [0, 5, 5, keys // 3 + 1, keys // 3 + 2, keys - 77, keys]
    borders = torch.tensor(borders, dtype=torch.int32, device="cuda")
    check(score, window_size, mode, key_mask=mask)
    check(score, window_size, mode, key_mask=mask, keep_first=3, keep_recent=17)
    check(score[0], window_size, mode, cu_seqlens=borders)
    check(score[0], window_size, mode, mask[0], borders, keep_first=3, keep_recent=17)


def test_many_short_sequences():
    borders = torch.arange(0, 30001, 3, dtype=torch.int32, device="cuda")
    check(scores_of_pattern("random", 2, 30000), 2, cu_seqlens=borders)


def test_repeats_bit_for_bit():
    score = scores_of_pattern("95 values", 8, 131072)
    first = select_intervals(score, 2048)
    for _ in range(5):
        again = select_intervals(score, 2048)
        assert torch.equal(first[1], again[1])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_graph_replay_without_synchronisation():
    """Capture the call, change the scores in place, replay."""
    score = scores_of_pattern("random", 2, 50000)
    mask = torch.rand(1, 50000, device="cuda") < 0.8
    options = {"key_mask": mask, "keep_first": 4, "keep_recent": 64}
    select_intervals(score, 512, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_intervals(score, 512, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select_intervals(score, 512, **options)
    for seed in range(3):
        score.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        graph.replay()
        fresh = select_intervals(score, 512, **options)
        assert torch.equal(captured[0], fresh[0])
        assert torch.equal(captured[1], fresh[1])


def compiled_variants() -> int:
    """How many variants of the causal kernels this process holds."""
    kernels = (
        select_causal._list_kernel,
        select_causal._prefix_kernel,
        select_causal._chunk_kernel,
        select_rows._encode_kernel,
    )
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def test_shapes_compile_nothing():
    """After the first call no number of rows, keys or kept keys compiles a kernel."""
    select_intervals(scores_of_pattern("random", 1, 100), 10)
    before = compiled_variants()
    for rows, keys, window_size in ((1, 1, 1), (3, 16, 16), (2, 40000, 2048), (1, 33001, 20001)):
        select_intervals(scores_of_pattern("random", rows, keys), window_size)
    # A view that begins at an odd address.
    select_intervals(scores_of_pattern("random", 3, 1001)[1], 7)
    assert compiled_variants() == before


@pytest.mark.heavy
def test_offsets_beyond_int32():
    """The last rows of more than 2**31 scores are selected as if they were alone."""
    rows, keys, window_size = (1 << 17) + 3, 1 << 14, 256
    score = torch.randn(rows, keys, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    start, expiry = select_intervals(score, window_size)
    for row in (0, 1 << 17, rows - 1):
        alone = select_intervals(score[row : row + 1].clone(), window_size)
        assert torch.equal(start[row : row + 1], alone[0])
        assert torch.equal(expiry[row : row + 1], alone[1])
