"""Time calls with bool masks and dense biases on a GPU, beside PyTorch's attention in the same run.

    PYTHONPATH=src python tests/gpu/time_masks.py [case ...] [--profile] [--ours]

Cases: main, keys, sweep, small, patterns, independent, dense; default all. Times are milliseconds
of device time under CUDA-graph replay with a cold L2, see `time_attention.py`. ``plan`` is the
plan from the bool mask, ``forward`` does not include it, ``backward`` reuses it. ``--profile`` adds
the time of every kernel, ``--ours`` leaves out what it is compared with.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from time_attention import device_time
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.profiler import ProfilerActivity, profile

from flash_sparse_attn.backends.triton.backward import Needs, backward
from flash_sparse_attn.backends.triton.config import architecture_of, tiles_for
from flash_sparse_attn.backends.triton.forward import forward
from flash_sparse_attn.backends.triton.inputs import Bias, Call
from flash_sparse_attn.backends.triton.masks import MaskLayout
from flash_sparse_attn.backends.triton.plan_mask import plan_mask
from flash_sparse_attn.plan import Plan
from flash_sparse_attn.selection import select_keys

BF16 = torch.bfloat16
OPTIONS = argparse.Namespace(profile=False, ours=False)


def kernel_times(function: Callable[[], Any], calls: int = 5) -> list[tuple[str, float, float]]:
    """Name, launches and microseconds in one call of every kernel, longest first; a cold L2."""
    flush = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(calls):
            flush.bitwise_not_()
            function()
        torch.cuda.synchronize()
    rows = [
        (event.key[:60], event.count / calls, event.self_device_time_total / calls)
        for event in record.key_averages()
        if event.self_device_time_total > 0 and "bitwise_not" not in event.key
    ]
    return sorted(rows, key=lambda row: -row[2])


class Pass:
    """Inputs of one causal call with batch 1, and its stages."""

    def __init__(
        self, heads: int, kv_heads: int, length: int, dim: int, mask: Tensor | None,
        bias: Tensor | None, is_causal: bool = True, for_backward: bool = True,
    ):  # fmt: skip
        torch.manual_seed(0)
        like = {"device": "cuda", "dtype": BF16}
        self.query = torch.randn(1, length, heads, dim, **like)
        self.key, self.value = (torch.randn(1, length, kv_heads, dim, **like) for _ in range(2))
        self.grad = torch.randn_like(self.query)
        self.mask, self.bias, self.is_causal = mask, bias, is_causal
        self.call = Call(dim**-0.5, 0.0, None if bias is None else Bias.of(bias, heads, kv_heads))
        shape = None if mask is None else mask.shape
        reads_pairs = bias is not None and bias.shape[2] > 1
        sizes = (length, length, heads, kv_heads, 1)
        layout = MaskLayout.of(shape, *sizes, reads_pairs=reads_pairs)
        tiles = tiles_for(architecture_of(self.query.device), dim, reads_pairs)
        self.for_backward = for_backward
        self.layout = layout.with_lists(
            tiles, heads // kv_heads, heads * length, for_backward=for_backward
        )

    def plan(self) -> Plan:
        if self.layout.kind == "keys":
            tensors = [*[None] * 11, self.mask]
            return Plan.of(tensors, self.layout.sizes, not self.is_causal)
        return plan_mask(
            self.mask, self.layout, is_causal=self.is_causal, for_backward=self.for_backward
        )

    def forward(self, plan: Plan) -> Any:
        return forward(plan, self.query, self.key, self.value, self.call, with_norm=True)

    def backward(self, plan: Plan, out: Tensor, *kept: Any) -> Any:
        return backward(
            plan, self.query, self.key, self.value, out, *kept, self.grad, self.call,
            Needs(bias=self.bias is not None),
        )  # fmt: skip

    def check(self, plan: Plan) -> float:
        """Relative error of some queries' outputs against fp64."""
        out, *_ = self.forward(plan)
        length, heads = self.query.shape[1:3]
        rows = torch.linspace(0, length - 1, 48, device="cuda").long()
        position = torch.arange(length, device="cuda")
        worst = 0.0
        for head in range(0, heads, max(1, heads // 4)):
            kv = head // (heads // self.key.shape[2])
            scores = self.query[0, rows, head].double() @ self.key[0, :, kv].double().T
            scores *= self.call.softmax_scale
            sees = torch.ones_like(scores, dtype=torch.bool)
            if self.is_causal:
                sees &= position <= rows[:, None]
            for tensor, is_mask in ((self.mask, True), (self.bias, False)):
                if tensor is not None:
                    part = tensor[0, head * tensor.shape[1] // heads]
                    part = part[rows] if part.shape[0] > 1 else part
                    if is_mask:
                        sees &= part
                    else:
                        scores += part
            probs = torch.where(sees, scores, -torch.inf).softmax(-1).nan_to_num()
            truth = probs @ self.value[0, :, kv].double()
            error = (out[0, rows, head].double() - truth).norm() / truth.norm()
            worst = max(worst, float(error))
        if not worst < 0.01:
            raise AssertionError(f"a wrong kernel is not timed: relative error {worst}")
        return worst

    def times(self) -> tuple[float, float, float, float]:
        """Plan, forward, backward, and plan with forward."""
        plan = self.plan()
        self.check(plan)
        out, _, *kept = self.forward(plan)
        planning = 0.0 if self.layout.kind == "keys" else device_time(self.plan, 4, 5)
        return (
            planning,
            device_time(lambda: self.forward(plan), 4, 5),
            device_time(lambda: self.backward(plan, out, *kept), 4, 5),
            self.together(),
        )

    def together(self) -> float:
        """Plan and forward."""
        return device_time(lambda: self.forward(self.plan()), 4, 5)

    def report(self, name: str, note: str = "") -> tuple[float, float, float, float]:
        times = self.times()
        plan, ahead, back, both = times
        print(
            f"{name} | {self.layout.kind} | plan {plan:.4f} | forward {ahead:.4f} | "
            f"backward {back:.4f} | plan and forward {both:.4f}{note}",
            flush=True,
        )
        if OPTIONS.profile:
            self.profile()
        return times

    def profile(self) -> None:
        """Print where the time goes."""
        plan = self.plan()
        out, _, *kept = self.forward(plan)
        stages: dict[str, Callable[[], Any]] = {
            "plan": self.plan,
            "forward": lambda: self.forward(plan),
            "backward": lambda: self.backward(plan, out, *kept),
        }
        for stage, function in stages.items():
            for name, count, time in kernel_times(function):
                print(f"   {stage:8} {name:60} x {count:g} {time:9.1f} us", flush=True)

    def dense(self) -> tuple[float, float]:
        """Forward and backward of PyTorch's attention, mask and bias in one materialised tensor."""
        if OPTIONS.ours:
            return math.nan, math.nan
        heads, length = self.query.shape[2], self.query.shape[1]
        query, key, value = (t.transpose(1, 2) for t in (self.query, self.key, self.value))
        options: dict[str, Any] = {"enable_gqa": heads != self.key.shape[2]}
        if self.mask is None and self.bias is None:
            options["is_causal"] = self.is_causal
        else:
            shape = (1, 1, length, length)
            total = torch.zeros(shape, device="cuda", dtype=BF16)
            if self.bias is not None:
                total += self.bias.to(BF16)
            if self.mask is not None:
                total.masked_fill_(~self.mask.expand(shape), -torch.inf)
            if self.is_causal:
                row = torch.arange(length, device="cuda")
                total.masked_fill_(row[None, :] > row[:, None], -torch.inf)
            options["attn_mask"] = total
        ahead = device_time(lambda: sdpa(query, key, value, **options), 4, 5)
        grad = self.grad.transpose(1, 2)

        def step() -> None:
            leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
            torch.autograd.grad(sdpa(*leaves, **options), leaves, grad)

        return ahead, device_time(step, 4, 5) - ahead


def best_mask(length: int, window: int) -> tuple[Tensor, Tensor]:
    """The causal best `window` of random scores as a bool mask, and the scores."""
    torch.manual_seed(1)
    scores = torch.randn(1, 1, length, device="cuda")
    selection = select_keys(scores, min(window, length))
    row = torch.arange(length, device="cuda")[:, None]
    sees = (selection.start[0, 0] <= row) & (row < selection.expiry[0, 0])
    return (sees & (torch.arange(length, device="cuda") <= row))[None, None], scores


def main_case() -> None:
    mask, scores = best_mask(32768, 1024)
    pair = scores[:, :, None].to(BF16).expand(1, 1, 32768, 32768).contiguous()
    call = Pass(2, 1, 32768, 64, mask, pair)
    call.report("main, pair bias", " (<= 0.5 with plan, backward <= 2.0)")
    print("   SDPA with mask and bias: forward {:.3f}, backward {:.3f}".format(*call.dense()))
    call = Pass(2, 1, 32768, 64, mask, pair, for_backward=False)
    print(f"   plan and forward of a call without gradients: {call.together():.4f}", flush=True)
    del call, pair
    Pass(2, 1, 32768, 64, mask, scores[:, :, None]).report("main, key bias", " (back <= 0.6)")


def keys_case() -> None:
    scores = torch.randn(1, 1, 1, 32768, device="cuda")
    mask = scores > scores.flatten().sort().values[-1025]
    call = Pass(2, 1, 32768, 64, mask, scores)
    call.report("mask of keys", " (<= 0.05, backward <= 0.16)")


def sweep_case() -> None:
    last = 0.0
    window = 32
    while window <= 32768:
        mask, scores = best_mask(32768, window)
        times = Pass(2, 1, 32768, 64, mask, scores[:, :, None]).report(f"window {window}")
        if times[1] < 0.95 * last:
            print("   falls")
        last = max(last, times[1])
        window *= 4 if window < 512 else 2
    Pass(2, 1, 32768, 64, None, scores[:, :, None]).report("dense, the same bias")


def small_case() -> None:
    for length in (256, 512, 1024, 2048, 4096):
        mask, scores = best_mask(length, 1024)
        pair = scores[:, :, None].to(BF16).expand(1, 1, length, length).contiguous()
        call = Pass(2, 1, length, 64, mask, pair)
        ahead, back = call.dense()
        call.report(f"N {length}", f" | SDPA {ahead:.4f}, {back:.4f}")


def masks_of(length: int) -> dict[str, tuple[Tensor, Callable[..., Tensor]]]:
    """Bool masks and the same as functions of FlexAttention."""
    torch.manual_seed(2)
    blocks = torch.rand(length // 64, length // 64, device="cuda") < 0.1
    document = torch.arange(length, device="cuda") // (length // 8)
    prefix = length // 4
    functions: dict[str, Callable[..., Tensor]] = {
        "sliding": lambda b, h, q, k: (k <= q) & (q < k + 1024),
        "documents": lambda b, h, q, k: (document[q] == document[k]) & (k <= q),
        "prefix": lambda b, h, q, k: (k < prefix) | (k <= q),
        "blocks": lambda b, h, q, k: blocks[q // 64, k // 64],
    }
    row = torch.arange(length, device="cuda")
    return {
        name: (function(0, 0, row[:, None], row[None, :])[None, None], function)
        for name, function in functions.items()
    }


def patterns_case() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention, dynamic=False)
    for length in (8192, 32768):
        for name, (mask, function) in masks_of(length).items():
            call = Pass(2, 1, length, 64, mask, None, is_causal=False)
            if OPTIONS.ours:
                call.report(f"{name} {length}")
                continue
            blocks = create_block_mask(function, None, None, length, length, "cuda")
            query, key, value = (
                t.transpose(1, 2).detach().requires_grad_()
                for t in (call.query, call.key, call.value)
            )

            grad = call.grad.transpose(1, 2)

            def attend(leaves=(query, key, value), blocks=blocks) -> Tensor:
                return flex(*leaves, block_mask=blocks, enable_gqa=True)

            def step(tensors=(query, key, value), attend=attend, grad=grad) -> None:
                leaves = [tensor.detach().requires_grad_() for tensor in tensors]
                torch.autograd.grad(attend(leaves), leaves, grad)

            ahead = device_time(attend, 4, 5)
            back = device_time(step, 4, 5) - ahead
            call.report(f"{name} {length}", f" | Flex {ahead:.4f}, {back:.4f}")


def independent_case() -> None:
    for density in (32, 256):
        mask = torch.rand(1, 1, 32768, 32768, device="cuda", dtype=BF16) < 1 / density
        call = Pass(2, 1, 32768, 64, mask, None)
        ahead, back = call.dense()
        call.report(f"independent 1/{density}", f" | SDPA {ahead:.4f}, {back:.4f}")


def dense_case() -> None:
    for heads, kv_heads, length in ((32, 8, 8192), (32, 8, 32768)):
        scores = torch.randn(1, kv_heads, 1, length, device="cuda")
        call = Pass(heads, kv_heads, length, 128, None, scores)
        flops = 4 * 128 * heads * length * (length + 1) / 2 / 1e9
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            plain = Pass(heads, kv_heads, length, 128, None, None)
            ahead, back = plain.dense()
        times = call.report(f"dense {length}, key bias")
        print(
            f"   forward {flops / times[1]:.0f} of {flops / ahead:.0f} TFLOP/s "
            f"({ahead / times[1]:.0%}, >= 55 %), backward {2.5 * flops / times[2]:.0f} of "
            f"{2.5 * flops / back:.0f} ({back / times[2]:.0%}, >= 50 %)",
            flush=True,
        )


CASES = {
    "main": main_case,
    "keys": keys_case,
    "small": small_case,
    "dense": dense_case,
    "sweep": sweep_case,
    "independent": independent_case,
    "patterns": patterns_case,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], metavar="case")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--ours", action="store_true")
    parser.parse_args(namespace=OPTIONS)
    for name in OPTIONS.cases or CASES:
        CASES[name]()
        torch.cuda.empty_cache()
