"""Turn a dense model into a sparse one and continue its training, beside a sliding window.

    python examples/continue_sparse.py [--quick] [--device cpu|cuda] [--score-factor X ...]

A small Llama is trained on real text with full attention. Then it is converted: every query reads
1/4 or 1/8 of the context, chosen by scores that start at zero, or the newest keys of the same
number. All continue on the same batches. The table has the held-out loss before, right after and
after continued training. A few minutes on two cores.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    Text,
    device_of,
    dtype_of,
    held_out_loss,
    name_of,
    parameter_groups,
    parser,
    precision,
    read_text,
    warm_up_and_decay,
    write_report,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from flash_sparse_attn.bench.console import Progress, paragraph, table
from flash_sparse_attn.integrations.transformers import convert, register


@dataclass(frozen=True)
class Sizes:
    """Text, model and training."""

    megabytes: float
    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    length: int
    dense_steps: int
    steps: int
    batch: int
    rate: float
    looks: int
    test_sequences: int


QUICK = Sizes(0.5, 400, 64, 2, 4, 2, 128, 4, 4, 2, 3e-3, looks=2, test_sequences=4)
CPU = Sizes(4.0, 1024, 128, 3, 4, 2, 256, 300, 80, 8, 3e-3, looks=4, test_sequences=48)
GPU = Sizes(40.0, 16384, 512, 8, 8, 2, 4096, 2000, 500, 8, 1e-3, looks=5, test_sequences=64)
SINKS = 4
"""First keys that every query sees, in all sparse models."""


def dense_model(sizes: Sizes, text: Text) -> LlamaForCausalLM:
    """A new Llama."""
    end = text.tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(text.tokenizer),
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.length,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def dynamic(model: nn.Module, size: int) -> nn.Module:
    """A copy that reads `size` keys: sinks, half the others the newest, half by score."""
    recent = size // 2
    return convert(
        copy.deepcopy(model), size - recent - SINKS, keep_recent=recent, keep_first=SINKS
    )


def sliding(model: nn.Module, size: int) -> nn.Module:
    """A copy that reads `size` keys: sinks, and the newest. Scores of zero stay zero."""
    other = convert(copy.deepcopy(model), size - SINKS, keep_first=SINKS)
    for name, parameter in other.named_parameters():
        if name.endswith(".A") or ".dt_proj." in name:
            parameter.requires_grad_(False)
    return other


def batches(text: Text, sizes: Sizes, steps: int, seed: int) -> Iterator[Tensor]:
    """The same for every model."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield text.train[torch.randint(len(text.train), (sizes.batch,), generator=generator)]


def train(
    model: nn.Module,
    text: Text,
    sizes: Sizes,
    steps: int,
    label: str,
    *,
    rate: float,
    factor: float,
    seed: int,
) -> list[dict[str, float]]:
    """Train in place; returns steps and held-out losses, the state before them included."""
    device = next(model.parameters()).device
    groups = parameter_groups(model, rate, factor)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_decay(steps))
    looks = {round(steps * n / sizes.looks) for n in range(1, sizes.looks + 1)}
    look = (model, text, sizes.test_sequences, sizes.batch)
    curve = [{"step": 0, "loss": held_out_loss(*look)}]
    model.train()
    with Progress(label, steps) as bar:
        for step, rows in enumerate(batches(text, sizes, steps, seed), 1):
            rows = rows.to(device)
            with precision(device):
                loss = model(rows, labels=rows, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update(f"loss {loss.item():.3f}" if step % 10 == 0 else "")
            if step in looks:
                curve.append({"step": step, "loss": held_out_loss(*look)})
    return curve


def describe(sizes: Sizes, text: Text, results: dict[str, Any]) -> str:
    """The table and what it shows."""
    names = list(results["curves"])
    steps = [point["step"] for point in results["curves"][names[0]]]
    header = ["attention after conversion", "right after", *(f"{step} steps" for step in steps[1:])]
    rows = [
        [name, *(f"{point['loss']:.3f}" for point in results["curves"][name])] for name in names
    ]
    return "\n".join(
        [
            paragraph(
                f"Text: {text.files} source files, {text.train.numel():,} tokens for training.",
                f"Model: Llama, {results['parameters']:,} parameters, context {sizes.length}, in",
                f"{results['dtype']};",
                f"{sizes.dense_steps} steps with full attention, then {sizes.steps} more of each",
                f"kind on the same batches of {sizes.batch} x {sizes.length}. Held-out losses in",
                f"nats per token; the dense model had {results['dense']:.3f}. All sparse kinds",
                f"read {SINKS} first keys, and as many in all as named.",
            ),
            "",
            table(header, rows),
        ]
    )


def draw(figure: Any, results: dict[str, Any]) -> None:
    """Held-out loss against steps of continued training."""
    axis = figure.subplots()
    for name, curve in results["curves"].items():
        style = "--" if "sliding" in name else ":" if "full" in name else "-"
        axis.plot([p["step"] for p in curve], [p["loss"] for p in curve], style, label=name)
    axis.axhline(results["dense"], color="grey", linewidth=0.8)
    axis.set(xlabel="steps after conversion", ylabel="held-out loss, nats per token")
    axis.legend(fontsize=8)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the example; returns its numbers."""
    options = parser(__doc__.split("\n")[0])
    options.add_argument(
        "--score-factor",
        type=float,
        nargs="+",
        default=[10.0],
        help="learning rates of A and dt_proj over that of the others (default: 10)",
    )
    choice = options.parse_args(arguments)
    device = device_of(choice)
    sizes = QUICK if choice.quick else GPU if device.type == "cuda" else CPU
    print("reading source files and making a tokeniser", flush=True)
    text = read_text(sizes.megabytes, sizes.vocabulary, sizes.length)
    register()
    set_seed(0)
    dense = dense_model(sizes, text).to(device)
    curve = train(
        dense, text, sizes, sizes.dense_steps, "full attention", rate=sizes.rate, factor=1.0, seed=1
    )
    results: dict[str, Any] = {
        "parameters": dense.num_parameters(),
        "dtype": name_of(dtype_of(device)),
        "training": curve,
        "dense": curve[-1]["loss"],
        "curves": {},
    }
    kinds = [("full attention", dense, 1.0)]
    for part in (4, 8):
        size = sizes.length // part
        for factor in choice.score_factor:
            rate = f", score rate x{factor:g}" if len(choice.score_factor) > 1 else ""
            kinds.append((f"{size} keys by score{rate}", dynamic(dense, size), factor))
        kinds.append((f"{size} keys, sliding window", sliding(dense, size), 1.0))
    for name, model, factor in kinds:
        results["curves"][name] = train(
            model, text, sizes, sizes.steps, name, rate=sizes.rate / 3, factor=factor, seed=2
        )
    print("\n" + describe(sizes, text, results))
    write_report(choice.out, "continue_sparse", results, lambda figure: draw(figure, results))
    return results


if __name__ == "__main__":
    main()
