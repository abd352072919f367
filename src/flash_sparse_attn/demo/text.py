"""Question c: does it work on real text? A byte-level model of Python's own source code."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bench.console import paragraph, table
from .model import KINDS, ModelConfig, SmallModel, precision
from .training import LossOfStep, train_kinds

CONFIG = ModelConfig(
    tokens=256,
    classes=256,
    width=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    window=64,
    recent=16,
    feed_forward=2,
)


@dataclass(frozen=True)
class TextSettings:
    """The schedule, the same for all models; it is printed.

    Attributes:
        seed: Of the initial weights and of the places in the text.
        steps, batch, length: Training steps, sequences in a batch, bytes of a sequence.
        learning_rate: Highest rate.
        test_sequences: Held-out sequences of the loss.
        config: The model.
    """

    seed: int = 0
    steps: int = 100
    batch: int = 8
    length: int = 512
    learning_rate: float = 5e-3
    test_sequences: int = 64
    config: ModelConfig = CONFIG


QUICK = TextSettings(steps=4, batch=2, length=128, test_sequences=4)


@dataclass(frozen=True)
class Corpus:
    """Bytes uint8 of Python source files; every tenth file is held out."""

    train: Tensor
    held_out: Tensor
    files: int
    digest: str


def read_corpus(megabytes: float = 0.0) -> Corpus:
    """The top-level modules of this Python's standard library, in the order of their names.

    Args:
        megabytes: Read on through the library's packages, torch and transformers until there is
            so much, or no more.

    Raises:
        RuntimeError: This Python comes without its sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    # Generated at installation: differs from machine to machine.
    paths = [path for path in sorted(folder.glob("*.py")) if "sysconfigdata" not in path.name]
    contents = [path.read_bytes() for path in paths]
    missing = megabytes * 1e6 - sum(map(len, contents))
    for path in _package_sources(folder):
        if missing <= 0:
            break
        contents.append(path.read_bytes())
        missing -= len(contents[-1])
    held_out = b"".join(contents[9::10])
    kept = b"".join(content for index, content in enumerate(contents) if index % 10 != 9)
    if len(held_out) < 50_000:
        raise RuntimeError(f"the standard library in {folder} has no sources to train on")
    digest = hashlib.sha256(kept + held_out).hexdigest()
    return Corpus(_bytes(kept), _bytes(held_out), len(contents), digest)


def _package_sources(library: Path) -> Iterator[Path]:
    """Modules of the standard library's packages, then of larger ones that may be installed."""
    installed = Path(sysconfig.get_paths()["purelib"])
    for folder in (library, installed / "torch", installed / "transformers"):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).parts
            if folder == library and (len(parts) == 1 or "site-packages" in parts):
                continue
            if not any("test" in part for part in parts):
                yield path


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def run(settings: TextSettings, device: torch.device) -> dict[str, Any]:
    """Train the models and test them; the dynamic one is in the result for question d."""
    corpus = read_corpus()
    results: dict[str, Any] = {"settings": settings, "corpus": corpus, "models": {}}

    def loss_of(model: SmallModel, generator: torch.Generator) -> LossOfStep:
        return partial(_training_loss, model, corpus.train, settings, generator)

    schedule = (settings.seed, settings.steps, settings.learning_rate)
    for kind, model, trained in train_kinds(settings.config, device, *schedule, loss_of):
        held_out = _held_out_loss(model, corpus.held_out, settings)
        results["models"][kind] = {**trained, "held_out": held_out}
        if kind == "dynamic":
            results["model"] = model
    return results


def describe(results: dict[str, Any]) -> str:
    """The answer in words and a table."""
    settings: TextSettings = results["settings"]
    corpus: Corpus = results["corpus"]
    config, models = settings.config, results["models"]
    frequencies = _frequency_loss(corpus)
    rows = [["byte frequencies alone", "-", "-", *_loss_cells(frequencies)]]
    for kind, model in models.items():
        last = sum(model["losses"][-10:]) / len(model["losses"][-10:])
        row = [KINDS[kind], f"{model['parameters']:,}", f"{last:.3f}"]
        rows.append([*row, *_loss_cells(model["held_out"])])
    header = ["attention", "parameters", "training loss", "held-out loss", "bits per byte"]
    size = (len(corpus.train) + len(corpus.held_out)) / 1e6
    full, window, dynamic = (models[kind]["held_out"] for kind in KINDS)
    shown = dynamic < frequencies - 0.5 and dynamic < full + 0.1
    return "\n".join(
        [
            paragraph(
                f"Text: {corpus.files} source files of this Python's standard library, {size:.1f}",
                f"MB, every tenth file held out; sha256 {corpus.digest}.",
            ),
            paragraph(
                f"Model: {config.layers} layers, width {config.width}, {config.heads} heads of",
                f"{config.head_dim}, {config.kv_heads} KV heads. The sliding window reads the",
                f"newest {config.window} bytes, the dynamic mask the newest {config.recent} and",
                f"the {config.window - config.recent} best-scored of all. Training, the same for",
                f"all: {settings.steps} steps of {settings.batch} x {settings.length} bytes,",
                f"AdamW, rate {settings.learning_rate:g}, seed {settings.seed}. Losses in nats per",
                f"byte; held out: {settings.test_sequences} x {settings.length} bytes.",
            ),
            "",
            table(header, rows),
            "",
            paragraph(
                f"Answer: {'yes' if shown else 'NOT SHOWN'}. Reading {config.window} of up to",
                f"{settings.length} bytes, the dynamic mask's held-out loss is",
                f"{_compare(dynamic, full)} that of full attention and {_compare(dynamic, window)}",
                "that of the sliding window. The training is brief: this shows that the mask",
                "trains on real text, not how large models compare.",
            ),
        ]
    )


def _compare(loss: float, other: float) -> str:
    return f"{abs(loss - other):.3f} {'above' if loss > other else 'below'}"


def _training_loss(
    model: SmallModel, text: Tensor, settings: TextSettings, generator: torch.Generator, _: int
) -> Tensor:
    places = torch.randint(len(text) - settings.length, (settings.batch,), generator=generator)
    return next_byte_losses(model, text, places, settings.length).mean()


def next_byte_losses(model: SmallModel, text: Tensor, places: Tensor, length: int) -> Tensor:
    """Nats ``[sequences, length]`` for predicting each next byte of what begins at `places`.

    Args:
        model: On any device.
        text: uint8 ``[bytes]``.
        places: int64 ``[sequences]``, where `text` is.
        length: Bytes that are predicted.
    """
    ahead = torch.arange(length + 1, device=places.device)
    sequences = text[places[:, None] + ahead].long().to(model.device)
    with precision(model.device):
        logits = model(sequences[:, :-1])
    return F.cross_entropy(logits.float().transpose(1, 2), sequences[:, 1:], reduction="none")


@torch.no_grad()
def _held_out_loss(model: SmallModel, text: Tensor, settings: TextSettings) -> float:
    places = torch.linspace(0, len(text) - settings.length - 1, settings.test_sequences).long()
    parts = places.split(settings.batch)
    losses = [next_byte_losses(model, text, part, settings.length) for part in parts]
    return float(torch.cat(losses).mean())


def _frequency_loss(corpus: Corpus) -> float:
    """Held-out loss of a model that knows how often every byte occurs, and nothing else."""
    counts = torch.bincount(corpus.train.long(), minlength=256).double() + 1
    return float(-(counts / counts.sum()).log()[corpus.held_out.long()].mean())


def _loss_cells(loss: float) -> list[str]:
    return [f"{loss:.3f}", f"{loss / math.log(2):.3f}"]
