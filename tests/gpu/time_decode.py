"""Time decoding on a GPU: window caches, full caches, and single queries under a mask.

    PYTHONPATH=src python tests/gpu/time_decode.py [window] [full] [fp8] [rows] [generate]

Times are microseconds of device time for one call: a CUDA graph of calls over caches in rotation,
at least four and together several times the L2, is replayed. Baselines run in the same way. A
result that is wrong is not timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_sparse_attn import WindowCache
from flash_sparse_attn.backends.triton.decode_config import DecodeConfig
from flash_sparse_attn.backends.triton.decode_launch import Keys, attend, step_token
from flash_sparse_attn.backends.triton.inputs import Call
from flash_sparse_attn.bench.timing import REPLAYS, rotation_seconds
from flash_sparse_attn.demo.model import ModelConfig, SmallModel
from flash_sparse_attn.reference import attention_reference

DTYPE = torch.bfloat16
PARTS = ("window", "full", "fp8", "rows", "generate")
BANDWIDTH = 4.25e6  # bytes in a microsecond that a copy moves here


def graph_time(calls: Sequence[Callable[[], Any]], replays: int = 15) -> float:
    """Microseconds of one of the calls, of which all are replayed in turn."""
    seconds, timing = rotation_seconds(calls, "cuda", replays)
    if timing != REPLAYS:
        raise RuntimeError("the calls cannot be captured")
    return 1e6 * statistics.median(seconds)


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


class Window:
    """A filled cache and the arguments of its next step."""

    def __init__(self, batch=8, heads=32, kv_heads=8, dim=128, window=2048, dtype=DTYPE):
        self.cache = WindowCache(batch, kv_heads, dim, window, dtype=dtype, device="cuda")
        length = window + 64
        self.cache.prefill(
            randn(batch, length, kv_heads, dim),
            randn(batch, length, kv_heads, dim),
            randn(batch, kv_heads, length, dtype=torch.float32),
        )
        self.token = (
            randn(batch, 1, heads, dim),
            randn(batch, 1, kv_heads, dim),
            randn(batch, 1, kv_heads, dim),
            torch.full((batch, kv_heads), 9.0, device="cuda"),
        )
        self.call = Call(dim**-0.5)

    def step(self, config: DecodeConfig | None = None) -> tuple[Tensor, Tensor]:
        return step_token(*self.token, None, self.cache.state, self.call, config)

    def error(self) -> float:
        """Relative error of a step against fp64, of a cache whose worst key it replaces."""
        cache, (query, key, value, score) = self.cache, self.token
        keys, values = (
            t.double() if s is None else t.double() * s[..., None].double()
            for t, s in ((cache.key, cache.key_scale), (cache.value, cache.value_scale))
        )
        worst = cache.score.argmin(-1, keepdim=True)
        bias = torch.cat([cache.score.scatter(-1, worst, -torch.inf), score[..., None]], -1)
        keys, values = (
            torch.cat([old.transpose(1, 2), new.double()], 1)
            for old, new in ((keys, key), (values, value))
        )
        truth, _, _ = attention_reference(
            query.double(), keys, values, None, bias[:, :, None].double()
        )
        out, _ = self.step()
        return float((out.double() - truth).norm() / truth.norm())


def wrong(error: float, allowed: float = 0.01) -> bool:
    if not error < allowed:
        raise AssertionError(f"a wrong kernel is not timed: relative error {error}")
    return False


def time_window(dtype: torch.dtype = DTYPE, config: DecodeConfig | None = None) -> float:
    caches = [Window(dtype=dtype) for _ in range(6)]
    wrong(caches[0].error())
    return graph_time([lambda one=one: one.step(config) for one in caches * 2])


class Full:
    """A full cache and a query."""

    def __init__(self, batch=1, heads=32, kv_heads=8, dim=128, length=131072, dtype=DTYPE):
        self.query = randn(batch, 1, heads, dim)
        shape = (batch, length, kv_heads, dim)
        key, value = randn(*shape), randn(*shape)
        scales = (None, None)
        if dtype != DTYPE:
            scales = tuple(t.abs().amax((0, 1, 3)).float() / 448 for t in (key, value))
            key, value = (
                (t.float() / s[:, None]).to(dtype)
                for t, s in zip((key, value), scales, strict=True)
            )
        lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
        self.keys = Keys(key, value, lengths, None, *scales)
        self.call = Call(dim**-0.5)

    def attend(self, config: DecodeConfig | None = None) -> tuple[Tensor, Tensor]:
        return attend(self.query, self.keys, None, None, None, self.call, True, config)

    def error(self) -> float:
        keys, values = (
            t[:1].double() if s is None else t[:1].double() * s[:, None].double()
            for t, s in (
                (self.keys.key, self.keys.key_scale),
                (self.keys.value, self.keys.value_scale),
            )
        )
        truth, _, _ = attention_reference(self.query[:1].double(), keys, values)
        out, _ = self.attend()
        return float((out[:1].double() - truth).norm() / truth.norm())

    def paged(self, page_size: int) -> Full:
        """The same keys in shuffled pages."""
        other = object.__new__(Full)
        batch, length, kv_heads, dim = self.keys.key.shape
        pages = batch * length // page_size
        order = torch.randperm(pages, device="cuda")
        stores = []
        for tensor in (self.keys.key, self.keys.value):
            store = torch.empty_like(tensor).view(pages, page_size, kv_heads, dim)
            store[order] = tensor.view_as(store)
            stores.append(store)
        table = order.int().view(batch, -1)
        scales = (self.keys.key_scale, self.keys.value_scale)
        other.keys = Keys(*stores, self.keys.lengths, table, *scales)
        other.query, other.call = self.query, self.call
        return other


def sdpa_time(full: Sequence[Full]) -> dict[str, float]:
    """The same by PyTorch's dense attention."""
    times = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        calls = []
        for one in full:
            arguments = [t.transpose(1, 2) for t in (one.query, one.keys.key, one.keys.value)]
            calls.append(
                lambda a=arguments: torch.nn.functional.scaled_dot_product_attention(
                    *a, enable_gqa=True
                )
            )
        try:
            with sdpa_kernel(backend):
                times[backend.name] = graph_time(calls)
        except RuntimeError as error:
            print(backend.name, str(error)[:80])
    return times


def time_full(
    batch: int, length: int, dtype: torch.dtype = DTYPE, config: DecodeConfig | None = None
) -> float:
    full = [Full(batch, length=length, dtype=dtype) for _ in range(4)]
    wrong(full[0].error())
    return graph_time([lambda one=one: one.attend(config) for one in full])


class Row:
    """One query over keys of which a mask shows some, the predecessors' decoding benchmark."""

    def __init__(self, length: int, window: int = 1024, heads: int = 2, dim: int = 64):
        self.query = randn(1, 1, heads, dim)
        self.keys = Keys(randn(1, length, 1, dim), randn(1, length, 1, dim))
        self.bias = randn(1, 1, 1, length)
        best = self.bias.topk(min(window, length), dim=-1).indices
        self.mask = torch.zeros_like(self.bias, dtype=torch.bool).scatter(-1, best, True)
        self.call = Call(dim**-0.5)

    def attend(self, config: DecodeConfig | None = None) -> tuple[Tensor, Tensor]:
        return attend(self.query, self.keys, self.mask, None, self.bias, self.call, True, config)

    def sdpa(self) -> Tensor:
        """With mask and bias made into one beforehand."""
        query, key, value = (
            t.transpose(1, 2) for t in (self.query, self.keys.key, self.keys.value)
        )
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=self.both, enable_gqa=True
        )

    def prepare(self) -> None:
        self.both = self.bias.masked_fill(~self.mask, -torch.inf).expand(1, 2, 1, -1).contiguous()

    def error(self) -> float:
        tensors = (t.double() for t in (self.query, self.keys.key, self.keys.value))
        truth, _, _ = attention_reference(*tensors, self.mask, self.bias.double())
        return float((self.attend()[0].double() - truth).norm() / truth.norm())


def time_row(length: int, config: DecodeConfig | None = None) -> tuple[float, float]:
    """Ours and SDPA's."""
    rows = [Row(length) for _ in range(max(4, min(64, (1 << 20) // length)))]
    for row in rows:
        row.prepare()
    wrong(rows[0].error())
    ours = graph_time([lambda one=one: one.attend(config) for one in rows])
    return ours, graph_time([one.sdpa for one in rows])


class Generation:
    """A model that has read a text and goes on by itself."""

    def __init__(self, context: int, piece: int = 1 << 16):
        torch.manual_seed(0)
        config = ModelConfig(256, 256, 1024, 4, 8, 2, 128, window=2048, feed_forward=4)
        self.model = SmallModel(config, "dynamic").to("cuda", DTYPE)
        for layer in self.model.dynamic_layers():
            layer.A.data.fill_(0.5)  # scores that differ
        self.caches = self.model.make_caches(1)
        text = torch.randint(0, 256, (1, context), device="cuda")
        for part in text.split(piece, dim=1):
            self.model(part, last=1, caches=self.caches)
        self.token = text[:, -1:].clone()

    def step(self) -> None:
        logits = self.model(self.token, caches=self.caches)
        self.token.copy_(logits.argmax(-1))


@torch.no_grad()
def time_generation() -> None:
    """Tokens a second and bytes after short and long texts."""
    for context in (1 << 13, 1 << 20):
        one = Generation(context)
        torch.cuda.synchronize()
        held = sum(cache.nbytes for cache in one.caches)
        torch.cuda.reset_peak_memory_stats()
        begin = torch.cuda.memory_allocated()
        time = graph_time([one.step] * 16)
        assert int(one.caches[0].seen_tokens) > context
        extra = torch.cuda.max_memory_allocated() - begin
        print(
            f"generation after {context} tokens: {1e6 / time:.0f} tokens/s, {time:.1f} us each, "
            f"caches {held} bytes, {extra} more while generating",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=[], metavar="part")
    parts = parser.parse_args().parts or PARTS
    fp8 = torch.float8_e4m3fn
    if "window" in parts:
        nbytes = Window().cache.nbytes
        print(f"window step, B 8, H 32, Hkv 8, D 128, W 2048: {time_window():.1f} us", end="")
        print(f" (floor {nbytes / BANDWIDTH:.1f})", flush=True)
        dense = [Full(8) for _ in range(2)]
        print(f"  dense, 131072 keys each: SDPA {sdpa_time(dense)}", flush=True)
    if "full" in parts:
        for batch, length in ((1, 8192), (1, 131072), (8, 8192), (32, 2048)):
            full = [Full(batch, length=length) for _ in range(4)]
            wrong(full[0].error())
            floor = 2 * full[0].keys.key.nbytes / BANDWIDTH
            times = {"sequences": graph_time([one.attend for one in full])}
            for page_size in (16, 64, 256):
                pages = [one.paged(page_size) for one in full]
                times[f"pages of {page_size}"] = graph_time([one.attend for one in pages])
            print(f"full cache, B {batch}, {length} keys, floor {floor:.1f} us:", end=" ")
            print({k: round(v, 1) for k, v in times.items()}, "SDPA", sdpa_time(full), flush=True)
    if "fp8" in parts:
        print(f"window step in 8 bits: {time_window(fp8):.1f} us")
        print(f"full cache in 8 bits, 131072 keys: {time_full(1, 131072, fp8):.1f} us", flush=True)
    if "rows" in parts:
        for power in range(8, 20):
            ours, sdpa = time_row(1 << power)
            print(f"one query, {1 << power} keys, 1024 visible: {ours:.1f} us, SDPA {sdpa:.1f}")
    if "generate" in parts:
        time_generation()


if __name__ == "__main__":
    main()
