"""Question a: does it learn what a window cannot? Associative recall in noise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bench.console import paragraph, table
from ..selection import select_keys
from .model import KINDS, ModelConfig, SmallModel, precision
from .training import LossOfStep, train_kinds

PAIRS, SYMBOLS, NOISE = 8, 16, 64


CONFIG = ModelConfig(
    tokens=2 * SYMBOLS + NOISE,
    classes=SYMBOLS,
    width=64,
    layers=2,
    heads=2,
    kv_heads=2,
    head_dim=32,
    window=64,
)


@dataclass(frozen=True)
class RecallSettings:
    """The schedule, the same for all three models; it is printed.

    Attributes:
        seed: Of the initial weights and of the training sequences.
        stages: (steps, length, sequences in a batch), shortest first.
        questions: Last tokens of a training sequence, each the key of one of its pairs.
        learning_rate: Highest rate.
        test_sequences: Sequences of the accuracy, never trained on.
        config: The model.
    """

    seed: int = 3
    stages: tuple[tuple[int, int, int], ...] = (
        (150, 64, 64),
        (60, 128, 32),
        (60, 256, 16),
        (120, 512, 16),
    )
    questions: int = 16
    learning_rate: float = 3e-3
    test_sequences: int = 256
    config: ModelConfig = CONFIG

    @property
    def steps(self) -> int:
        """Training steps of one model."""
        return sum(steps for steps, _, _ in self.stages)

    def size_at(self, step: int) -> tuple[int, int]:
        """Length and batch of a training step."""
        for steps, length, batch in self.stages:
            if step < steps:
                return length, batch
            step -= steps
        raise IndexError(f"step: expected less than {self.steps}")

    @property
    def length(self) -> int:
        """Length of the test sequences."""
        return self.stages[-1][1]


QUICK = RecallSettings(stages=((4, 64, 8), (2, 128, 4)), test_sequences=16)


def make_sequences(
    batch: int, length: int, questions: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise with eight key-value pairs at random places, and questions at the end.

    Returns:
        tokens ``[batch, length]``: keys are below `SYMBOLS`, values below ``2 * SYMBOLS``, the rest
        is noise; the value asked for by each question ``[batch, questions]``; and where the pair
        of each question begins.
    """
    tokens = torch.randint(2 * SYMBOLS, 2 * SYMBOLS + NOISE, (batch, length), generator=generator)
    keys = torch.rand(batch, SYMBOLS, generator=generator).argsort(-1)[:, :PAIRS]
    values = torch.randint(SYMBOLS, (batch, PAIRS), generator=generator)
    places = torch.rand(batch, (length - questions) // 2, generator=generator).argsort(-1)
    places = 2 * places[:, :PAIRS]
    tokens.scatter_(1, places, keys).scatter_(1, places + 1, values + SYMBOLS)
    rounds = -(-questions // PAIRS)
    asked = torch.rand(batch, rounds, PAIRS, generator=generator).argsort(-1)
    asked = asked.flatten(1)[:, :questions]
    tokens[:, length - questions :] = keys.gather(1, asked)
    return tokens, values.gather(1, asked), places.gather(1, asked)


def run(settings: RecallSettings, device: torch.device) -> dict[str, Any]:
    """Train the three models and test them; see `describe` for what is printed."""
    results: dict[str, Any] = {"settings": settings, "models": {}}

    def loss_of(model: SmallModel, generator: torch.Generator) -> LossOfStep:
        return partial(_training_loss, model, settings, generator)

    schedule = (settings.seed, settings.steps, settings.learning_rate)
    for kind, model, trained in train_kinds(settings.config, device, *schedule, loss_of):
        results["models"][kind] = {**trained, **_test(model, settings)}
        if kind == "dynamic":
            results["kept"] = _kept(model, settings)
    return results


def _training_loss(
    model: SmallModel, settings: RecallSettings, generator: torch.Generator, step: int
) -> Tensor:
    length, batch = settings.size_at(step)
    tokens, values, _ = make_sequences(batch, length, settings.questions, generator)
    with precision(model.device):
        logits = model(tokens.to(model.device), last=settings.questions)
    return F.cross_entropy(logits.float().flatten(0, 1), values.to(model.device).flatten())


@torch.no_grad()
def _test(model: SmallModel, settings: RecallSettings) -> dict[str, float]:
    """Accuracy over all questions, and over those whose pair two stacked windows cannot reach."""
    generator = torch.Generator().manual_seed(settings.seed + 1_000_000)
    reach = settings.config.layers * settings.config.window
    right = far_right = far = total = 0
    for _ in range(-(-settings.test_sequences // 16)):
        tokens, values, places = make_sequences(16, settings.length, PAIRS, generator)
        with precision(model.device):
            logits = model(tokens.to(model.device), last=PAIRS)
        correct = logits.argmax(-1).cpu() == values
        is_far = settings.length - PAIRS - places > reach
        right += int(correct.sum())
        far_right += int((correct & is_far).sum())
        far += int(is_far.sum())
        total += correct.numel()
    return {
        "accuracy": right / total,
        "far_accuracy": far_right / max(far, 1),
        "far_share": far / total,
    }


@torch.no_grad()
def _kept(model: SmallModel, settings: RecallSettings) -> dict[str, Any]:
    """What the last query of one test sequence sees in every layer and KV head."""
    generator = torch.Generator().manual_seed(settings.seed + 2_000_000)
    tokens, _, _ = make_sequences(1, settings.length, PAIRS, generator)
    scores: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: scores.append(layer.scores(args[0])))
        for layer in model.dynamic_layers()
    ]
    model(tokens.to(model.device), last=1)
    for hook in hooks:
        hook.remove()
    config, context = settings.config, settings.length - PAIRS
    best, recent = config.window - config.recent, config.recent
    masks = [select_keys(s, best, keep_recent=recent).to_dense(1)[0, :, 0] for s in scores]
    return {
        "mask": torch.cat(masks)[:, :context].cpu(),
        "is_pair": tokens[0, :context] < 2 * SYMBOLS,
        "kv_heads": config.kv_heads,
    }


def describe(results: dict[str, Any]) -> str:
    """The answer in words and tables."""
    settings: RecallSettings = results["settings"]
    config, models, kept = settings.config, results["models"], results["kept"]
    stages = ", ".join(
        f"{steps} at length {length} in batches of {batch}"
        for steps, length, batch in settings.stages
    )
    rows = [
        [
            KINDS[kind],
            f"{model['parameters']:,}",
            f"{model['losses'][-1]:.3f}",
            f"{model['accuracy']:.1%}",
            f"{model['far_accuracy']:.1%}",
        ]
        for kind, model in models.items()
    ]
    full, window, dynamic = (models[kind]["accuracy"] for kind in KINDS)
    far_window, far_dynamic = (models[kind]["far_accuracy"] for kind in ("window", "dynamic"))
    shown = dynamic > window + 0.2 and far_dynamic > far_window + 0.2
    return "\n".join(
        [
            paragraph(
                f"Task: {PAIRS} key-value pairs hidden in {settings.length} tokens of noise; at",
                f"the end every key is asked for its value ({SYMBOLS} values: guessing is right in",
                f"{1 / SYMBOLS:.1%}). Far pairs ({models['full']['far_share']:.0%} of the",
                f"questions) are more than {config.layers} x {config.window} tokens back, out of",
                "reach for stacked windows.",
            ),
            paragraph(
                f"Model: {config.layers} layers of attention, width {config.width}, {config.heads}",
                f"heads of {config.head_dim}, no feed-forward part. Window and dynamic mask read",
                f"{config.window} keys for every query. Training, the same for all:",
                f"{settings.steps} steps: {stages}; AdamW, rate {settings.learning_rate:g}, seed",
                f"{settings.seed}. Test: {settings.test_sequences} new sequences of length",
                f"{settings.length}.",
            ),
            "",
            table(["attention", "parameters", "last loss", "right", "right, far pairs"], rows),
            "",
            f"  Kept by the dynamic mask for the last query, {config.window} keys in every head:",
            table(["", "pair tokens", "noise tokens"], _kept_rows(kept)),
            "",
            paragraph(
                f"Answer: {'yes' if shown else 'NOT SHOWN'}. The dynamic mask is right in",
                f"{dynamic:.1%}, the sliding window, which reads as many keys, in {window:.1%},",
                f"full attention, which reads up to {settings.length} keys, in {full:.1%}.",
            ),
        ]
    )


def _kept_rows(kept: dict[str, Any]) -> list[list[str]]:
    mask, is_pair = kept["mask"], kept["is_pair"]
    return [
        [
            f"layer {index // kept['kv_heads'] + 1}, KV head {index % kept['kv_heads'] + 1}",
            f"{int((row & is_pair).sum())} of {int(is_pair.sum())}",
            f"{int((row & ~is_pair).sum())} of {int((~is_pair).sum())}",
        ]
        for index, row in enumerate(mask)
    ]
