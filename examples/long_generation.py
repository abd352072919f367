"""Generate after long texts: time and memory of a token do not grow with the text.

    python examples/long_generation.py [--quick] [--device cpu|cuda] [--model FOLDER]

Reads real text of growing length into a Doge model whose caches hold `keep_window_size` keys per
layer, generates after it, and compares with plain Doge, which keeps all keys, up to a length that
it can do. Without --model (a folder that `train_doge.py` saved) the weights are random, which
changes what is written and not how long it takes.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import device_of, dtype_of, name_of, parser, read_text, write_report
from torch import Tensor
from transformers import AutoModelForCausalLM, DogeConfig, DogeForCausalLM, DynamicCache, set_seed

from flash_sparse_attn.bench.console import (
    Progress,
    format_bytes,
    format_seconds,
    paragraph,
    table,
)
from flash_sparse_attn.integrations.transformers import apply_to_doge


@dataclass(frozen=True)
class Sizes:
    """Text, model, and what is measured.

    Attributes:
        contexts: Tokens read before generating.
        plain_contexts: Those at which plain Doge is measured as well.
        piece: Tokens read at once.
        generated: Tokens generated and timed.
    """

    megabytes: float
    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    window: int
    contexts: tuple[int, ...]
    plain_contexts: tuple[int, ...]
    piece: int
    generated: int


QUICK = Sizes(0.5, 400, 64, 2, 4, 2, 16, (64, 128), (64,), 50, 4)
CPU = Sizes(2.0, 2048, 192, 4, 6, 2, 256, (512, 2048, 8192, 32768), (512, 2048, 8192), 1024, 32)
GPU = Sizes(
    8.0, 32768, 1024, 32, 8, 4, 2048, (8192, 32768, 131072, 262144), (8192, 32768), 8192, 64
)


def make_model(sizes: Sizes, vocabulary: int) -> DogeForCausalLM:
    """Plain Doge in ``eager`` with random weights and scores that differ."""
    config = DogeConfig(
        vocab_size=vocabulary,
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=max(sizes.contexts) + sizes.generated,
        keep_window_size=sizes.window,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "eager"
    model = DogeForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.uniform_(layer.self_attn.A, -1, 1)
        torch.nn.init.normal_(layer.self_attn.dt_proj.weight, std=0.2)
    return model


@torch.no_grad()
def measure(model: Any, tokens: Tensor, sizes: Sizes, bar: Progress) -> dict[str, Any]:
    """Read all of `tokens ``[1, context]``, generate, and time both."""
    cache = DynamicCache(config=model.config)
    begin = _now(tokens)
    for piece in tokens[:, :-1].split(sizes.piece, dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)
        bar.update(f"{int(cache.get_seq_length())} tokens read")
    read = _now(tokens) - begin
    begin = _now(tokens)
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        max_new_tokens=sizes.generated,
        min_new_tokens=sizes.generated,
        do_sample=False,
        pad_token_id=0,
    )
    seconds = (_now(tokens) - begin) / sizes.generated
    bar.update("generated")
    held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    return {
        "context": tokens.shape[1],
        "read_seconds": read,
        "seconds_per_token": seconds,
        "cache_bytes": sum(held),
        "text": out[0, tokens.shape[1] :].tolist(),
    }


def _now(tokens: Tensor) -> float:
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def describe(sizes: Sizes, results: dict[str, Any]) -> str:
    """The table and what it shows."""
    plain = {row["context"]: row for row in results["plain"]}
    rows = []
    for row in results["ours"]:
        other = plain.get(row["context"])
        rows.append(
            [
                f"{row['context']:,}",
                f"{row['context'] / row['read_seconds']:,.0f}",
                format_seconds(row["seconds_per_token"]),
                f"{1 / row['seconds_per_token']:.1f}",
                format_bytes(row["cache_bytes"]),
                format_seconds(other["seconds_per_token"]) if other else "-",
                format_bytes(results["bytes_per_token"] * row["context"]),
            ]
        )
    header = [
        "context",
        "read, tokens/s",
        "a token",
        "tokens/s",
        "cache",
        "plain: a token",
        "cache",
    ]
    first, last = results["ours"][0], results["ours"][-1]
    return "\n".join(
        [
            paragraph(
                f"Doge, {results['parameters']:,} parameters, {sizes.layers} layers, in",
                f"{results['dtype']}, caches of {sizes.window} keys; texts are read",
                f"{sizes.piece} tokens at a time.",
            ),
            "",
            table(header, rows),
            "",
            paragraph(
                f"With {last['context'] / first['context']:.0f} times the context a token takes",
                f"{last['seconds_per_token'] / first['seconds_per_token']:.2f} times the time and",
                f"{last['cache_bytes'] / first['cache_bytes']:.2f} times the cache.",
            ),
        ]
    )


def draw(figure: Any, results: dict[str, Any]) -> None:
    """Time of a token and size of the cache against the context."""
    times, sizes = figure.subplots(1, 2)
    for name, label in (("ours", "window in the cache"), ("plain", "plain Doge")):
        rows = results[name]
        contexts = [row["context"] for row in rows]
        milliseconds = [1e3 * row["seconds_per_token"] for row in rows]
        times.loglog(contexts, milliseconds, "o-", label=label)
        sizes.loglog(contexts, [r["cache_bytes"] / 2**20 for r in rows], "o-", label=label)
    times.set(xlabel="context, tokens", ylabel="time of a token, ms")
    sizes.set(xlabel="context, tokens", ylabel="cache, MiB")
    times.legend()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the example; returns its numbers."""
    options = parser(__doc__.split("\n")[0])
    options.add_argument("--model", type=Path, help="a folder that train_doge.py saved")
    choice = options.parse_args(arguments)
    device = device_of(choice)
    sizes = QUICK if choice.quick else GPU if device.type == "cuda" else CPU
    set_seed(0)
    print("reading source files and making a tokeniser", flush=True)
    text = read_text(sizes.megabytes, sizes.vocabulary, 64)
    if choice.model:
        plain = AutoModelForCausalLM.from_pretrained(choice.model, attn_implementation="eager")
    else:
        plain = make_model(sizes, len(text.tokenizer))
    plain = plain.to(device, dtype_of(device)).eval()
    ours = apply_to_doge(copy.deepcopy(plain))
    config = plain.config
    tokens = text.train.flatten() % config.vocab_size
    tokens = tokens.repeat(-(-max(sizes.contexts) // len(tokens)))[None].to(device)
    size = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    results: dict[str, Any] = {
        "parameters": plain.num_parameters(),
        "dtype": name_of(plain.dtype),
        "bytes_per_token": 2 * config.num_hidden_layers * size * plain.dtype.itemsize,
    }
    for name, model, contexts in (
        ("ours", ours, sizes.contexts),
        ("plain", plain, sizes.plain_contexts),
    ):
        pieces = sum(-(-(context - 1) // sizes.piece) + 1 for context in contexts)
        with Progress({"ours": "window", "plain": "plain Doge"}[name], pieces) as bar:
            results[name] = [measure(model, tokens[:, :n], sizes, bar) for n in contexts]
    print("\n" + describe(sizes, results))
    write_report(choice.out, "long_generation", results, lambda figure: draw(figure, results))
    return results


if __name__ == "__main__":
    main()
