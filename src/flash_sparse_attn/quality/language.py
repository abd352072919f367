"""A byte-level language model of Python source code that is installed here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..demo.model import ModelConfig, SmallModel
from ..demo.text import Corpus, next_byte_losses
from .tasks import Task

CONFIG = ModelConfig(
    tokens=256,
    classes=256,
    width=256,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=64,
    window=512,
    recent=128,
    feed_forward=4,
)


@dataclass(frozen=True)
class LanguageTask(Task):
    """Next bytes.

    Attributes:
        length: Bytes of a sequence.
        train, held_out: uint8, on the model's device.
        corpus: What `train` and `held_out` are, for the row.
    """

    length: int
    train: Tensor
    held_out: Tensor
    corpus: dict[str, Any]

    @property
    def sequence(self) -> int:
        """Bytes that the model reads."""
        return self.length

    @property
    def facts(self) -> dict[str, Any]:
        """Which text."""
        return {"length": self.length, "corpus": self.corpus}

    def loss(self, model: SmallModel) -> Tensor:
        """Nats per byte at random places."""
        places = torch.randint(len(self.train) - self.length, (self.batch,), device=model.device)
        return next_byte_losses(model, self.train, places, self.length).mean()

    @torch.no_grad()
    def test(self, model: SmallModel) -> dict[str, float]:
        """Bits per held-out byte, at all places and at the last quarter of the sequences.

        The latter have the longest past, of which a window misses most.
        """
        last = len(self.held_out) - self.length - 1
        places = torch.linspace(0, last, self.test_samples, device=model.device).long()
        losses = torch.cat(
            [
                next_byte_losses(model, self.held_out, part, self.length)
                for part in places.split(self.batch)
            ]
        )
        late = losses[:, -(self.length // 4) :]
        return {
            "bits_per_byte": float(losses.mean()) / math.log(2),
            "late_bits_per_byte": float(late.mean()) / math.log(2),
        }


def language_task(
    corpus: Corpus,
    device: torch.device,
    *,
    length: int = 4096,
    batch: int = 16,
    config: ModelConfig = CONFIG,
    train_samples: int = 64_000,
    test_samples: int = 256,
) -> LanguageTask:
    """The task over a corpus, which is copied to the device once.

    Args:
        corpus: From `read_corpus`.
        device: The model's.
        length, batch: Bytes of a sequence, sequences of a step.
        config: The model.
        train_samples, test_samples: Of `Task`.
    """
    return LanguageTask(
        f"text-{length}",
        config,
        batch,
        1e-3,
        train_samples,
        test_samples,
        length,
        corpus.train.to(device),
        corpus.held_out.to(device),
        {
            "files": corpus.files,
            "megabytes": round((len(corpus.train) + len(corpus.held_out)) / 1e6, 1),
            "sha256": corpus.digest,
        },
    )
