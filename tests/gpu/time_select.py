"""Time the selection on a GPU: milliseconds of device time for each shape and pattern of scores.

    PYTHONPATH=src python tests/gpu/time_select.py

Times are those of a CUDA-graph replay of the whole call, allocation included; once with all caches
warm (ten calls in one graph, divided by ten), once alone with a cold L2.
"""

from __future__ import annotations

import torch
import triton

from flash_sparse_attn.backends.triton.select import TILES, SelectTiles, select_intervals

# rows, keys, window
SHAPES = (
    (1, 32768, 1024),
    (8, 32768, 2048),
    (8, 131072, 2048),
    (8, 1048576, 2048),
)


def scores_of_pattern(pattern: str, rows: int, keys: int, device: str = "cuda") -> torch.Tensor:
    """fp32 scores ``[rows, keys]`` of the patterns whose cost must not differ."""
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(rows, keys, device=device, generator=generator)
    ramp = torch.linspace(-4, 4, keys, device=device).expand(rows, keys)
    if pattern == "random":
        return noise
    if pattern == "equal":
        return torch.full_like(noise, 0.5)
    if pattern == "rising":
        return ramp.contiguous()
    if pattern == "falling":
        return -ramp
    if pattern == "two levels":
        return (noise > 1).float()
    if pattern == "AR(1)":
        # y_t = 0.99 y_{t-1} + x_t, as a convolution with the first thousand powers.
        kernel = 0.99 ** torch.arange(1024, device=device)
        size = keys + 1024
        spectrum = torch.fft.rfft(noise, size) * torch.fft.rfft(kernel, size)
        return torch.fft.irfft(spectrum, size)[:, :keys].contiguous()
    if pattern == "trend up":
        return noise + ramp
    if pattern == "trend down":
        return noise - ramp
    if pattern == "95 values":
        return torch.randint(0, 95, (rows, keys), device=device, generator=generator).float()
    raise ValueError(f"pattern: no scores called {pattern!r}")


PATTERNS = (
    "random",
    "equal",
    "rising",
    "falling",
    "two levels",
    "AR(1)",
    "trend up",
    "trend down",
    "95 values",
)


def _capture(call, repeat: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            call()
    return graph


def time_select(
    score: torch.Tensor, window_size: int, tiles: SelectTiles = TILES
) -> tuple[float, float]:
    """Milliseconds of one selection: warm, and with a cold L2."""

    def call():
        select_intervals(score, window_size, tiles=tiles)

    many, one = _capture(call, 10), _capture(call, 1)
    warm = triton.testing.do_bench(many.replay, warmup=5, rep=40, return_mode="median") / 10
    cold = triton.testing.do_bench(one.replay, warmup=5, rep=40, return_mode="median")
    return warm, cold


def main() -> None:
    print("rows | keys | window | pattern | warm ms | cold ms")
    for rows, keys, window in SHAPES:
        for pattern in PATTERNS:
            warm, cold = time_select(scores_of_pattern(pattern, rows, keys), window)
            print(f"{rows} | {keys} | {window} | {pattern} | {warm:.4f} | {cold:.4f}", flush=True)


if __name__ == "__main__":
    main()
