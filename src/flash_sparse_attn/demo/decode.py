"""Question d: is decoding exact and flat? Generation through `WindowCache`."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bench.console import Progress, format_seconds, paragraph, table
from ..window_cache import WindowCache
from .model import SmallModel


@dataclass(frozen=True)
class DecodeSettings:
    """What is generated and timed.

    Attributes:
        prompt: Bytes of held-out text that are read before generating.
        generated: Bytes generated, each checked against a full recomputation.
        contexts: Lengths of the text read before steps are timed, shortest first.
        timed_steps: Steps whose median is the time of a token.
        piece: Bytes of a context that are read at once.
    """

    prompt: int = 512
    generated: int = 128
    contexts: tuple[int, ...] = (512, 4096, 32768)
    timed_steps: int = 50
    piece: int = 2048


QUICK = DecodeSettings(prompt=96, generated=8, contexts=(96, 256), timed_steps=3, piece=128)


@torch.no_grad()
def run(
    settings: DecodeSettings, model: SmallModel, text: Tensor, device: torch.device
) -> dict[str, Any]:
    """Generate, compare and time; see `describe` for what is printed.

    Args:
        settings: Lengths.
        model: A model of the kind ``"dynamic"``.
        text: uint8, at least as long as the longest context.
        device: Where the model is.
    """
    total = settings.generated + len(settings.contexts) * settings.timed_steps
    text = text.long().to(device)[None]
    with Progress("generate", total) as bar:
        tokens, logits, sizes = _generate(settings, model, text, bar)
        again = model(tokens[:, :-1])[:, settings.prompt - 1 :]
        # The same weights in fp64 say how much of a difference is rounding.
        exact = copy.deepcopy(model).double()(tokens[:, :-1])[:, settings.prompt - 1 :]
        steps = [_time_steps(settings, model, text, context, bar) for context in settings.contexts]
    return {
        "settings": settings,
        "tokens": tokens[0].tolist(),
        "difference": float((logits - again).abs().max()),
        "error": float((logits.double() - exact).abs().max()),
        "plain_error": float((again.double() - exact).abs().max()),
        "scale": float(again.abs().max()),
        "same_choice": float((logits.argmax(-1) == again.argmax(-1)).float().mean()),
        "sizes": sizes,
        "steps": steps,
    }


def _generate(
    settings: DecodeSettings, model: SmallModel, text: Tensor, bar: Progress
) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens ``[1, prompt + generated]``, logits ``[1, generated, 256]``, cache bytes at each",
    "step."""
    caches = model.make_caches(1)
    tokens = text[:, : settings.prompt]
    rows, sizes = [model(tokens, last=1, caches=caches)], [_bytes(caches)]
    while True:
        tokens = torch.cat([tokens, rows[-1].argmax(-1)], dim=-1)
        bar.update("exactness")
        if len(rows) == settings.generated:
            return tokens, torch.cat(rows, dim=1), sizes
        rows.append(model(tokens[:, -1:], caches=caches))
        sizes.append(_bytes(caches))


def _time_steps(
    settings: DecodeSettings, model: SmallModel, text: Tensor, context: int, bar: Progress
) -> dict[str, float]:
    """Median seconds of a token after `context` tokens, and what is kept for it."""
    caches = model.make_caches(1)
    for piece in text[:, :context].split(settings.piece, dim=1):
        model(piece, last=1, caches=caches)
    token = text[:, context - 1 : context]
    seconds = []
    for _ in range(settings.timed_steps):
        begin = time.perf_counter()
        token = model(token, caches=caches).argmax(-1)
        token.tolist()  # waits for a GPU
        seconds.append(time.perf_counter() - begin)
        bar.update(f"context {context}")
    config = model.config
    key_bytes = config.layers * config.kv_heads * config.head_dim * caches[0].key.itemsize
    return {
        "context": context,
        "seconds": statistics.median(seconds),
        "cache_bytes": _bytes(caches),
        "full_cache_bytes": 2 * key_bytes * context,
    }


def _bytes(caches: list[WindowCache]) -> int:
    return sum(cache.nbytes for cache in caches)


def describe(results: dict[str, Any]) -> str:
    """The answer in words and tables."""
    settings: DecodeSettings = results["settings"]
    steps, sizes = results["steps"], results["sizes"]
    allowed = 2 * results["plain_error"] + 1e-5
    exact = results["error"] <= allowed and results["same_choice"] == 1.0
    constant = len(set(sizes) | {step["cache_bytes"] for step in steps}) == 1
    rows = [
        [
            str(step["context"]),
            format_seconds(step["seconds"]),
            f"{step['cache_bytes']:,}",
            f"{step['full_cache_bytes']:,}",
        ]
        for step in steps
    ]
    comparison = [
        ["largest difference of a logit", f"{results['difference']:.1e}"],
        ["error of the cache's logits against fp64", f"{results['error']:.1e}"],
        ["error of the whole pass's logits against fp64", f"{results['plain_error']:.1e}"],
        ["allowed for the cache: twice that + 1e-5", f"{allowed:.1e}"],
        ["largest logit", f"{results['scale']:.1f}"],
        ["same next byte chosen", f"{results['same_choice']:.0%}"],
    ]
    time_growth = steps[-1]["seconds"] / steps[0]["seconds"]
    context_growth = steps[-1]["context"] / steps[0]["context"]
    prompt, own = (
        bytes(results["tokens"])[: settings.prompt],
        bytes(results["tokens"])[settings.prompt :],
    )
    same = "has the same size at every step and length" if constant else "CHANGES ITS SIZE"
    return "\n".join(
        [
            paragraph(
                f"The dynamic mask model of question c reads {settings.prompt} bytes of held-out",
                f"text and writes {settings.generated}, one by one, in fp32. Every step is",
                "compared with one pass over the whole text, without a cache.",
            ),
            "",
            table(["generation with the cache and the whole pass", "measured"], comparison),
            "",
            table(
                ["context", "time per token", "cache, bytes", "all keys and values, bytes"], rows
            ),
            "",
            f"  prompt, its end  {prompt[-60:].decode('latin-1')!r}",
            f"  it wrote         {own[:60].decode('latin-1')!r}",
            "",
            paragraph(
                f"Answer: decoding is {'exact up to rounding' if exact else 'NOT EXACT'}. The",
                f"cache {same}; with {context_growth:.0f} times the context a token takes",
                f"{time_growth:.2f} times the time.",
            ),
        ]
    )
