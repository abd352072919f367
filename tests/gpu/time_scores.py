"""Time key scores on a GPU: microseconds of device time, and of the host, forward and backward.

    PYTHONPATH=src python tests/gpu/time_scores.py

Device times are those of ten calls in one CUDA graph, divided by ten: the weights stay in caches,
and hidden states of more than 50 MB do not. Host times are those of calls that do not wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import triton

from flash_sparse_attn import DynamicMaskAttention

# tokens, hidden_size, KV heads, head dimension
SHAPES = (
    (1, 1024, 4, 64),
    (64, 1024, 4, 64),
    (2048, 1024, 4, 64),
    (16384, 1024, 4, 64),
    (131072, 1024, 4, 64),
    (16384, 4096, 8, 128),
)
CALLS = 10


def device_time(call: Callable[[], object]) -> float:
    """Microseconds of one call on the device."""
    with torch.cuda.stream(torch.cuda.Stream()):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return triton.testing.do_bench(graph.replay, return_mode="median") * 1e3 / CALLS


def host_time(call: Callable[[], object]) -> float:
    """Microseconds of one call on the host."""
    times = []
    for _ in range(20):
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS)
        torch.cuda.synchronize()
    return sorted(times)[len(times) // 2] * 1e6


def main() -> None:
    print("tokens, width, heads: forward, backward; on the host without gradients, with, backward")
    for tokens, size, heads_kv, head_dim in SHAPES:
        layer = DynamicMaskAttention(
            size, heads_kv, 16, head_dim=head_dim, score_activation="exp"
        ).to("cuda", torch.bfloat16)
        hidden = torch.randn(1, tokens, size, device="cuda", dtype=torch.bfloat16)
        hidden.requires_grad_()
        leaves = [hidden, layer.v_proj.weight, layer.dt_proj.weight, layer.A]

        def scores(layer=layer, hidden=hidden) -> torch.Tensor:
            return layer.scores(hidden)

        upstream = torch.randn_like(scores())

        def step(scores=scores, leaves=leaves, upstream=upstream) -> object:
            return torch.autograd.grad(scores(), leaves, upstream)

        backward_us = device_time(step) - device_time(scores)
        on_host = host_time(scores)
        with torch.no_grad():
            forward_us, plain_us = device_time(scores), host_time(scores)
        host = f"{plain_us:.0f}, {on_host:.0f}, {host_time(step) - on_host:.0f}"
        print(f"{tokens}, {size}, {heads_kv}: {forward_us:.1f}, {backward_us:.1f}; {host}")


if __name__ == "__main__":
    main()
