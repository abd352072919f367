"""Time the attention kernels on a GPU, and check that they are right before.

    PYTHONPATH=src python tests/gpu/time_attention.py [shape ...] [--patterns] [--baseline]
        [--epochs L ...]

Shapes are named below; default A and B. Times are milliseconds of device time with a cold L2, taken
as those of the tables, see `bench.timing.player`.
Forward includes its copies and the log-sum-exp, backward everything that it launches.
``--patterns`` times all patterns of scores, ``--baseline`` dense causal attention of PyTorch too,
``--epochs`` plans with these lengths of epochs instead of the usual one.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from time_select import PATTERNS, scores_of_pattern

from flash_sparse_attn import select_keys
from flash_sparse_attn.backends.triton.backward import Needs, backward
from flash_sparse_attn.backends.triton.forward import forward
from flash_sparse_attn.backends.triton.inputs import Bias, Call
from flash_sparse_attn.backends.triton.plan import build_plan
from flash_sparse_attn.bench.timing import REPLAYS, Clock, player


@dataclass(frozen=True)
class Shape:
    """One batch entry: heads, KV heads, length, head dimension, window."""

    heads: int
    kv_heads: int
    length: int
    dim: int
    window: int
    mode: str = "causal"

    def visible_pairs(self, selection: Any) -> int:
        """(head, query, key) triples."""
        if self.mode == "causal":  # always full
            window = min(self.window, self.length)
            return self.heads * (window * self.length - window * (window - 1) // 2)
        key = torch.arange(self.length, device="cuda")
        sees = (self.length - key) * (selection.expiry > key)
        return self.heads // self.kv_heads * int(sees.sum())


SHAPES = {
    "A": Shape(2, 1, 32768, 64, 1024),
    "B": Shape(32, 8, 32768, 128, 2048),
    "8K": Shape(32, 8, 8192, 128, 2048),
    "4K": Shape(32, 8, 4096, 128, 2048),
    "C": Shape(32, 8, 131072, 128, 2048),
    "1M": Shape(32, 8, 1048576, 128, 2048),
    "W256": Shape(32, 8, 32768, 128, 256),
    "W512": Shape(32, 8, 32768, 128, 512),
    "shared": Shape(32, 8, 32768, 128, 2048, "shared"),
}


def device_time(function: Callable[[], Any], calls: int = 8, replays: int = 9) -> float:
    """Milliseconds of one call with a cold L2."""
    function()
    played = player(function, Clock("cuda"), calls)
    if played.timing != REPLAYS:
        raise AssertionError("expected a call that a CUDA graph can hold")
    return 1e3 * statistics.median(played.seconds() for _ in range(replays))


class Pass:
    """The inputs of a shape and the stages of one training step."""

    def __init__(self, shape: Shape, pattern: str, epoch_len: int | None):
        self.shape = shape
        self.epoch_len = epoch_len
        torch.manual_seed(0)
        length, dim = shape.length, shape.dim
        like = {"device": "cuda", "dtype": torch.bfloat16}
        self.query = torch.randn(1, length, shape.heads, dim, **like)
        self.key = torch.randn(1, length, shape.kv_heads, dim, **like)
        self.value = torch.randn_like(self.key)
        self.grad = torch.randn_like(self.query)
        self.scores = scores_of_pattern(pattern, shape.kv_heads, length)[None]
        bias = Bias.of(self.scores[:, :, None], shape.heads, shape.kv_heads)
        self.call = Call(dim**-0.5, bias=bias)

    def select(self) -> Any:
        return select_keys(self.scores, self.shape.window, mode=self.shape.mode)

    def plan(self, selection: Any) -> Any:
        return build_plan(selection, self.shape.length, is_causal=True, epoch_len=self.epoch_len)

    def forward(self, plan: Any) -> Any:
        return forward(plan, self.query, self.key, self.value, self.call, with_norm=True)

    def backward(self, plan: Any, out: Any, *kept: Any) -> Any:
        return backward(
            plan,
            self.query,
            self.key,
            self.value,
            out,
            *kept,
            self.grad,
            self.call,
            Needs(bias=True),
        )

    def step(self) -> None:
        """Everything, selection and plan included."""
        plan = self.plan(self.select())
        out, _, *kept = self.forward(plan)
        self.backward(plan, out, *kept)

    def check(self, plan: Any) -> float:
        """Largest relative error (Frobenius) of a few queries' outputs against fp64."""
        shape = self.shape
        out, *_ = self.forward(plan)
        group = shape.heads // shape.kv_heads
        rows = torch.linspace(0, shape.length - 1, 24, device="cuda").long()
        selection = self.select()
        worst = 0.0
        for head in range(0, shape.heads, group):
            kv = head // group
            sees = (selection.start[0, kv] <= rows[:, None]) & (
                rows[:, None] < selection.expiry[0, kv]
            )
            sees &= torch.arange(shape.length, device="cuda") <= rows[:, None]
            product = self.query[0, rows, head].double() @ self.key[0, :, kv].double().T
            scores = product * self.call.softmax_scale + self.scores[0, kv].double()
            probs = torch.where(sees, scores, -torch.inf).softmax(-1)
            truth = probs @ self.value[0, :, kv].double()
            error = (out[0, rows, head].double() - truth).norm() / truth.norm()
            worst = max(worst, float(error))
        if not worst < 0.01:
            raise AssertionError(f"a wrong kernel is not timed: relative error {worst}")
        return worst


def dense_baseline(inputs: Pass) -> tuple[float, float]:
    """Forward and backward of PyTorch's dense causal attention on the same shape."""
    query, key, value = (
        tensor.transpose(1, 2).detach().requires_grad_()
        for tensor in (inputs.query, inputs.key, inputs.value)
    )
    grad = inputs.grad.transpose(1, 2)

    def attend() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )

    times = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        for with_backward in (False, True):
            for _ in range(4):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                out = attend()
                if with_backward:
                    torch.autograd.grad(out, (query, key, value), grad)
                end.record()
                torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
    return times[0], times[1] - times[0]


def stage_times(inputs: Pass, calls: int) -> tuple[dict[str, float], float]:
    """Milliseconds of every stage, and the error of the output."""
    selection = inputs.select()
    plan = inputs.plan(selection)
    error = inputs.check(plan)
    out, _, *kept = inputs.forward(plan)
    return {
        "select": device_time(inputs.select, calls),
        "plan": device_time(lambda: inputs.plan(selection), calls),
        "forward": device_time(lambda: inputs.forward(plan), calls),
        "backward": device_time(lambda: inputs.backward(plan, out, *kept), calls),
    }, error


def peak_memory(inputs: Pass) -> tuple[int, float]:
    """Bytes at the peak of a step, inputs included, and that over those of the call's own tensors.

    Those are query, key, value, scores, their gradients, the output, its gradient and the lse.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    inputs.step()
    peak = torch.cuda.max_memory_allocated()
    own = 4 * inputs.query.nbytes + 4 * inputs.key.nbytes + 2 * inputs.scores.nbytes
    own += 4 * math.prod(inputs.query.shape[:3])
    return peak, peak / own


def run(name: str, pattern: str, baseline: bool, epoch_len: int | None) -> None:
    """Print one row."""
    shape = SHAPES[name]
    inputs = Pass(shape, pattern, epoch_len)
    times, error = stage_times(inputs, 1 if shape.length > 100_000 else 8)
    useful = 4 * shape.dim * shape.visible_pairs(inputs.select()) / 1e9
    peak, ratio = peak_memory(inputs)
    print(
        f"{name}{f' epochs {epoch_len}' if epoch_len else ''} | {pattern} | "
        + " | ".join(f"{stage} {time:.4f}" for stage, time in times.items())
        + f" | all {sum(times.values()):.3f}"
        f" | {useful / times['forward']:.0f} / {2.5 * useful / times['backward']:.0f} TFLOP/s"
        f" | error {error:.1e} | peak {peak / 2**30:.2f} GiB, {ratio:.2f} of own",
        flush=True,
    )
    if baseline:
        forward_time, backward_time = dense_baseline(inputs)
        print(f"   dense causal SDPA: forward {forward_time:.3f}, backward {backward_time:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=[], metavar="shape", help=", ".join(SHAPES))
    parser.add_argument("--patterns", action="store_true")
    parser.add_argument("--baseline", action="store_true")
    parser.add_argument("--epochs", type=int, nargs="*", default=[None])
    arguments = parser.parse_args()
    for name in arguments.shapes or ("A", "B"):
        for pattern in PATTERNS if arguments.patterns else PATTERNS[:1]:
            for epoch_len in arguments.epochs:
                run(name, pattern, arguments.baseline, epoch_len)


if __name__ == "__main__":
    main()
