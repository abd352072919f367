"""Check and time attention over texts that are cut along GPUs. One process for each GPU:

    PYTHONPATH=src:tests torchrun --nproc-per-node 4 tests/gpu/time_distributed.py [--check-only]
        [--profile] [--tokens N] [--long N] [--window W] [--heads H] [--kv-heads H] [--dim D]

Weak scaling: every rank has ``--tokens`` tokens of a text, for the first 1, 2, 4, ... ranks, and
for all ranks each with a text of its own, which shows how equal the GPUs are. Times are
milliseconds of forward and backward passes, several in a row between barriers, on the slowest rank;
each is taken in two rounds, and the better counts. Bytes are those of the tables received.
``--long`` tokens on all ranks together are timed last. Nothing is timed before the result was
compared with the fp64 reference. Without a GPU everything runs on CPUs, to try the program.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from compare import assert_fair
from torch import Tensor

from flash_sparse_attn import select_keys
from flash_sparse_attn.distributed import (
    context_parallel_attn_func,
    context_parallel_attn_varlen_func,
)
from flash_sparse_attn.reference import attention_reference

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
ACTIVITY = torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU
NAMES = ("query", "key", "value", "scores")


def say(*parts: Any) -> None:
    if dist.get_rank() == 0:
        print(*parts, flush=True)


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def inputs(seed: int, length: int, options: argparse.Namespace) -> list[Tensor]:
    """Query, key, value, scores and upstream gradient of so many tokens."""
    device = torch.device("cuda") if ON_GPU else torch.device("cpu")
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    heads, kv_heads, dim = options.heads, options.kv_heads, options.dim
    return [
        randn(1, length, heads, dim),
        randn(1, length, kv_heads, dim),
        randn(1, length, kv_heads, dim),
        randn(1, kv_heads, length, dtype=torch.float32),
        randn(1, length, heads, dim),
    ]


# What is compared with the reference: lengths of shards in parts of a whole, options, borders.
CASES: dict[str, tuple[bool, dict[str, int], bool, bool]] = {
    # name: uneven, keep, padded, packed
    "even": (False, {}, False, False),
    "uneven, padded, kept": (True, {"keep_first": 3, "keep_recent": 5}, True, False),
    "packed, uneven": (True, {}, False, True),
}


def check(name: str, total: int, window: int, options: argparse.Namespace) -> None:
    """Outputs and gradients against fp64, twice the same bits, and no row that sees the future."""
    uneven, keep, padded, is_packed = CASES[name]
    rank, size = dist.get_rank(), dist.get_world_size()
    lengths = [total // size] * size
    if uneven:
        lengths[0], lengths[-1] = lengths[0] - 37 % total, lengths[-1] + 37 % total
    begin, length = sum(lengths[:rank]), lengths[rank]
    *whole, grad = inputs(0, total, options)
    device = grad.device
    real = torch.rand(1, total, generator=torch.Generator().manual_seed(1)) < 0.8
    real = real.to(device) if padded else torch.ones_like(real, device=device)
    ends = [0, total // 7, total // 7 + 1, 2 * total // 3, total] if is_packed else [0, total]
    borders = torch.tensor(ends, dtype=torch.int32, device=device)

    def attend(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [t.narrow(2 if t.dim() == 3 else 1, begin, length).clone() for t in tensors]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        more: dict[str, Any] = {"mesh": dist.group.WORLD, "shard_lengths": lengths, **keep}
        if is_packed:
            parts = [leaf[0] for leaf in leaves]
            out = context_parallel_attn_varlen_func(*parts, borders, window, **more)[None]
        else:
            mask = real[:, begin : begin + length] if padded else None
            out = context_parallel_attn_func(*leaves, window, key_mask=mask, **more)
        part = grad[:, begin : begin + length]
        return [out.detach(), *torch.autograd.grad(out, leaves, part)]

    visible = torch.zeros(1, options.kv_heads, total, total, dtype=torch.bool, device=device)
    for first, end in pairwise(ends):
        selection = select_keys(
            whole[3][..., first:end].cpu(), window, key_mask=real[:, first:end].cpu(), **keep
        )
        visible[..., first:end, first:end] = selection.to_dense().to(device)

    def reference(dtype: torch.dtype) -> list[Tensor]:
        parts = [t.detach().to(dtype) for t in whole[:3]]
        parts.append(whole[3].to(torch.promote_types(dtype, torch.float32)))
        parts = [part.requires_grad_() for part in parts]
        out, _, _ = attention_reference(*parts[:3], visible, parts[3][:, :, None])
        grads = torch.autograd.grad(out, parts, grad.to(dtype))
        results = [out.detach(), *grads]
        return [r.narrow(2 if r.dim() == 3 else 1, begin, length) for r in results]

    results = attend(whole)
    truth, plain = reference(torch.float64), reference(DTYPE)
    for label, result, exact, usual in zip(("out", *NAMES), results, truth, plain, strict=True):
        assert_fair(result, exact, usual.to(result.dtype), f"{name}: {label}, rank {rank}")
    for label, result, again in zip(("out", *NAMES), results, attend(whole), strict=True):
        assert torch.equal(result, again), f"{name}: {label} differs in a second run, rank {rank}"
    at = total // 2 - 11
    changed = [tensor.clone() for tensor in whole]
    for tensor in changed[:3]:
        tensor[:, at] += 3
    changed[3][..., at] = 100.0
    before, after = results[0], attend(changed)[0]
    rows = max(0, min(length, at - begin))
    assert torch.equal(before[:, :rows], after[:, :rows]), f"{name}: rank {rank} sees the future"
    say(f"checked on {size} ranks: {name}")


class Traffic:
    """Bytes of tables that this rank received, forward and backward."""

    def __init__(self) -> None:
        self.exchange, self.received = dist.all_to_all_single, [0, 0]
        self.is_backward = False

    def __enter__(self) -> Traffic:
        dist.all_to_all_single = self.watched
        return self

    def __exit__(self, *_: Any) -> None:
        dist.all_to_all_single = self.exchange

    def watched(self, output: Tensor, *args: Any, **options: Any) -> Any:
        self.received[self.is_backward] += output.nbytes
        return self.exchange(output, *args, **options)


def step(tensors: list[Tensor], window: int, group: Any, traffic: Traffic | None = None) -> None:
    """Forward and backward of this rank's part."""
    *leaves, grad = tensors
    out = context_parallel_attn_func(*leaves, window, mesh=group)
    if traffic is not None:
        traffic.is_backward = True
    torch.autograd.grad(out, leaves, grad)


def forward(tensors: list[Tensor], window: int, group: Any) -> None:
    context_parallel_attn_func(*tensors[:-1], window, mesh=group)


def milliseconds(function: Callable[[], Any], group: Any, calls: int) -> float:
    """Of one of several calls in a row, on the slowest rank of a group."""
    function()
    synchronize()
    dist.barrier(group)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    spent = torch.tensor([1e3 * (time.perf_counter() - start) / calls])
    spent = spent.cuda() if ON_GPU else spent
    dist.all_reduce(spent, dist.ReduceOp.MAX, group)
    return float(spent)


def time_weak_scaling(options: argparse.Namespace, groups: dict[str, Any]) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    tensors = inputs(rank, options.tokens, options)
    tensors = [tensor.requires_grad_() for tensor in tensors[:-1]] + tensors[-1:]
    best: dict[str, list[float]] = {}
    for _ in range(2):
        for name, (group, others) in groups.items():
            if dist.get_rank(group) >= 0:
                both = milliseconds(lambda g=group: step(tensors, options.window, g), others, 5)
                ahead = milliseconds(lambda g=group: forward(tensors, options.window, g), others, 5)
                before = best.setdefault(name, [both, ahead])
                best[name] = [min(pair) for pair in zip(before, (both, ahead), strict=True)]
            dist.barrier()
    say(f"{options.tokens} tokens for each rank, window {options.window}, {options.heads} heads")
    for name, (both, ahead) in best.items() if rank == 0 else ():
        scaling = [100 * one / time for one, time in zip(best["1"], (both, ahead), strict=True)]
        say(
            f"{name} ranks: forward+backward {both:.2f} ms, {scaling[0]:.2f} % of one rank's; "
            f"forward with graph {ahead:.2f} ms, {scaling[1]:.2f} %"
        )
    with Traffic() as traffic:
        step(tensors, options.window, dist.group.WORLD, traffic)
    received = torch.tensor(traffic.received, device=tensors[0].device)
    everybody = [torch.empty_like(received) for _ in range(size)]
    dist.all_gather(everybody, received)
    table = [part.tolist() for part in everybody]
    ahead, both = max(row[0] for row in table), max(sum(row) for row in table)
    row = options.kv_heads * options.dim * 2 * tensors[1].element_size()
    dense = (size - 1) * ((1 << 20) // size) * row
    say(
        f"bytes received on each rank, forward and backward: {table}; of 1M tokens an all-gather "
        f"of keys and values receives {dense}, and a reduce-scatter of their gradients as much: "
        f"{dense / ahead:.1f} times forward, {2 * dense / both:.1f} times both, on the worst rank"
    )
    if options.profile:
        with torch.profiler.profile(activities=[ACTIVITY]) as profile:
            step(tensors, options.window, dist.group.WORLD)
            synchronize()
        if rank == size - 1:
            order = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
            print(profile.key_averages().table(sort_by=order, row_limit=40), flush=True)


def time_long(options: argparse.Namespace) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    tensors = inputs(rank, options.long // size, options)
    tensors = [tensor.requires_grad_() for tensor in tensors[:-1]] + tensors[-1:]
    own = sum(tensor.nbytes for tensor in tensors)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    both = milliseconds(lambda: step(tensors, options.window, dist.group.WORLD), None, 2)
    peak = torch.cuda.max_memory_allocated() if ON_GPU else 0
    say(
        f"{options.long} tokens on {size} ranks: forward+backward {both:.2f} ms; peak of rank 0 "
        f"{peak / 2**30:.2f} GiB, of which inputs and upstream gradient {own / 2**30:.2f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=524288)
    parser.add_argument("--long", type=int, default=1 << 22)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--check-tokens", type=int, default=4096)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if ON_GPU else "gloo", timeout=datetime.timedelta(seconds=100))
    start = time.perf_counter()
    size = dist.get_world_size()
    small = argparse.Namespace(**{**vars(options), "heads": 8, "kv_heads": 2})
    window = options.check_tokens // 16
    check("even", options.check_tokens, window, small)
    say(f"{time.perf_counter() - start:.0f} s")
    if not options.check_only:
        counts = [count for count in (1, 2, 4, 8) if count <= size]
        firsts = {count: dist.new_group(range(count)) for count in counts}
        # The group of a text, and the group of those who are timed together.
        groups = {str(count): (group, group) for count, group in firsts.items()}
        alone = [dist.new_group([one]) for one in range(size)][dist.get_rank()]
        groups[f"{size} separate"] = (alone, dist.group.WORLD)
        time_weak_scaling(options, groups)
        say(f"{time.perf_counter() - start:.0f} s")
        time_long(options)
        say(f"{time.perf_counter() - start:.0f} s")
    for name in list(CASES)[1:]:
        check(name, options.check_tokens, window, small)
    say(f"{time.perf_counter() - start:.0f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
