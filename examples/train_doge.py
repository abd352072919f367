"""Train a small Doge model with Transformers' Trainer on real text, its attention in O(N W).

    python examples/train_doge.py [--quick] [--device cpu|cuda] [--out FOLDER]

bf16 on a GPU, fp32 on a CPU (a few minutes on two cores). Prints a table of the training, writes a
figure, and saves the model and its tokeniser to FOLDER/doge, from where `long_generation.py` can
take them.
"""

from __future__ import annotations

import argparse
import sys
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
    read_text,
    warm_up_and_decay,
    write_report,
)
from transformers import DogeConfig, DogeForCausalLM, Trainer, TrainingArguments, set_seed

from flash_sparse_attn.bench.console import paragraph, table
from flash_sparse_attn.integrations.transformers import SelectionMonitor, apply_to_doge


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
    window: int
    steps: int
    batch: int
    rate: float
    test_sequences: int = 32


QUICK = Sizes(0.5, 400, 64, 2, 4, 2, 128, 32, 6, 2, 3e-3, test_sequences=4)
CPU = Sizes(4.0, 2048, 192, 4, 6, 2, 512, 128, 150, 4, 3e-3)
GPU = Sizes(40.0, 16384, 768, 12, 12, 4, 4096, 512, 1000, 8, 1e-3, test_sequences=64)


def make_model(sizes: Sizes, text: Text) -> DogeForCausalLM:
    """A new Doge, its attention replaced."""
    end = text.tokenizer.eos_token_id
    config = DogeConfig(
        vocab_size=len(text.tokenizer),
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.length,
        keep_window_size=sizes.window,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return apply_to_doge(DogeForCausalLM(config))


def train(sizes: Sizes, text: Text, options: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the losses and what the monitor saw."""
    device = device_of(options)
    set_seed(0)
    model = make_model(sizes, text).to(device)
    before = held_out_loss(model, text, sizes.test_sequences, sizes.batch)
    rows = [{"input_ids": row, "labels": row} for row in text.train]
    every = max(1, sizes.steps // 30)
    monitor = SelectionMonitor(every=every)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, sizes.rate, options.score_factor), betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_decay(sizes.steps))
    arguments = TrainingArguments(
        options.out / "trainer",
        max_steps=sizes.steps,
        per_device_train_batch_size=sizes.batch,
        bf16=dtype_of(device) == torch.bfloat16,
        use_cpu=device.type == "cpu",
        logging_steps=every,
        save_strategy="no",
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=device.type == "cuda",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        callbacks=[monitor],
        optimizers=(optimizer, schedule),
    )
    outcome = trainer.train()
    after = held_out_loss(model, text, sizes.test_sequences, sizes.batch)
    model.save_pretrained(options.out / "doge")
    text.tokenizer.save_pretrained(options.out / "doge")
    return {
        "parameters": model.num_parameters(),
        "dtype": name_of(dtype_of(device)),
        "before": before,
        "after": after,
        "log": [row for row in trainer.state.log_history if "loss" in row],
        "selections": monitor.history,
        "tokens_per_second": sizes.steps
        * sizes.batch
        * sizes.length
        / outcome.metrics["train_runtime"],
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def describe(sizes: Sizes, text: Text, results: dict[str, Any]) -> str:
    """The table and what it shows."""
    log = results["log"]
    shown = log[:: max(1, len(log) // 8)]
    rows = [
        [
            str(row["step"]),
            f"{row['loss']:.3f}",
            f"{row['grad_norm']:.2f}",
            f"{row.get('selection/outlive', float('nan')):.1%}",
            f"{row.get('selection/chosen', float('nan')):.1%}",
            f"{row.get('selection/age', float('nan')):.0f}",
        ]
        for row in shown
    ]
    header = ["step", "loss", "gradient", "keys that outlive a window", "later keys chosen", "age"]
    return "\n".join(
        [
            paragraph(
                f"Text: {text.files} source files, {text.train.numel():,} tokens of a vocabulary",
                f"of {len(text.tokenizer)} for training. Model: {results['parameters']:,}",
                f"parameters, {sizes.layers} layers; every query reads the {sizes.window}",
                f"best-scored of up to {sizes.length} keys. {sizes.steps} steps of {sizes.batch} x",
                f"{sizes.length} tokens in {results['dtype']}, {results['tokens_per_second']:,.0f}",
                "tokens a second.",
            ),
            "",
            table(header, rows),
            "",
            paragraph(
                f"Held-out loss in nats per token: {results['before']:.3f} before,",
                f"{results['after']:.3f} after, which is",
                f"{results['after'] / text.bytes_per_token:.3f} per byte. Age: mean distance in",
                "tokens from a query to the keys it reads.",
            ),
        ]
    )


def draw(figure: Any, results: dict[str, Any]) -> None:
    """Loss, and what the heads select."""
    loss, selection = figure.subplots(1, 2)
    loss.plot([row["step"] for row in results["log"]], [row["loss"] for row in results["log"]])
    loss.axhline(results["after"], color="#2e7d6b", linestyle="--", label="held out, at the end")
    loss.set(xlabel="step", ylabel="loss, nats per token", title="training loss")
    loss.legend()
    heads = sorted({(row["layer"], row["head"]) for row in results["selections"]})
    for layer, head in heads:
        own = [r for r in results["selections"] if (r["layer"], r["head"]) == (layer, head)]
        name = f"layer {layer}, head {head}" if len(heads) <= 12 else None
        selection.plot([r["step"] for r in own], [r["outlive"] for r in own], label=name)
    selection.set(xlabel="step", title="part of the keys that outlive a sliding window")
    if len(heads) <= 12:
        selection.legend(fontsize=7)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the example; returns its numbers."""
    choice = parser(__doc__.split("\n")[0])
    choice.add_argument(
        "--score-factor",
        type=float,
        default=1.0,
        help="learning rate of A and dt_proj over that of the others (default: 1)",
    )
    options = choice.parse_args(arguments)
    sizes = QUICK if options.quick else GPU if device_of(options).type == "cuda" else CPU
    print("reading source files and making a tokeniser", flush=True)
    text = read_text(sizes.megabytes, sizes.vocabulary, sizes.length)
    results = train(sizes, text, options)
    print("\n" + describe(sizes, text, results))
    write_report(options.out, "train_doge", results, lambda figure: draw(figure, results))
    print(f"  model    {options.out / 'doge'}")
    return results


if __name__ == "__main__":
    main()
