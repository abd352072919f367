"""Multi-query associative recall: pairs of a key and a value in noise, and all keys are asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..demo.model import ModelConfig, SmallModel, precision
from .tasks import Task

RATES = {32: 4e-4, 64: 3e-4, 128: 2e-4, 256: 1e-4}
"""Learning rate by width."""

BATCHES = {1024: 64, 2048: 32, 4096: 16, 8192: 8}
"""Sequences of a step by length: the same number of tokens."""

NOISE = {
    "values": "tokens that can be values",
    "any": "any tokens but the keys that are asked",
}


LESSON_STEPS, LESSON_ANSWERS = 1000, 4096
"""Of the lessons of a curriculum: steps of each, and questions of a step."""

ROPE_THETA = 1e6
"""Base of the rotary embedding. A question finds its key at any distance by those dimensions that
turn less than once over all tokens: of 8,704 tokens none to speak of at the usual 10,000."""


def make_sequences(
    batch: int, length: int, pairs: int, noise: str, device: torch.device, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """A text with key-value pairs at random places, and after it every key once, in random order.

    The lower half of the vocabulary are keys, ``0 .. (vocabulary - 1) // 2 - 1``, the others
    values. All numbers come from the device's default generator, so that a CUDA graph can hold
    this.

    Args:
        batch: Number of sequences.
        length: Tokens of the text, even; the questions come on top.
        pairs: Number of pairs with different keys, at most ``length // 2``.
        noise: What fills the text between the pairs, one of `NOISE`. Among ``"values"`` a key gives
            its pair away; among ``"any"`` tokens there are pairs that nobody asks for, and which
            ones those are is not known before the questions.
        device: Of the result.
        vocabulary: Number of different tokens, at least ``2 * pairs + 1``.

    Returns:
        tokens int64 ``[batch, length + pairs]``, and the values to be answered ``[batch, pairs]``.
    """
    keys_known = (vocabulary - 1) // 2
    lowest = 0 if noise == "any" else keys_known
    tokens = torch.randint(lowest, vocabulary, (batch, length), device=device)
    keys = _permutation(batch, keys_known, device)[:, :pairs]
    if noise == "any":
        asked = torch.zeros(batch, vocabulary, dtype=torch.bool, device=device)
        asked.scatter_(1, keys, torch.ones_like(keys, dtype=torch.bool))
        tokens += keys_known * asked.gather(1, tokens)
    values = torch.randint(keys_known, vocabulary, (batch, pairs), device=device)
    places = 2 * _permutation(batch, length // 2, device)[:, :pairs]
    tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
    order = _permutation(batch, pairs, device)
    return torch.cat([tokens, keys.gather(1, order)], dim=1), values.gather(1, order)


def _permutation(batch: int, size: int, device: torch.device) -> Tensor:
    """A random order of ``0 .. size - 1`` in every row ``[batch, size]``."""
    return torch.rand(batch, size, device=device).argsort(-1)


@dataclass(frozen=True)
class RecallTask(Task):
    """Pairs in noise.

    Attributes:
        length: Tokens of the text.
        pairs: Key-value pairs in it, each asked once.
        noise: One of `NOISE`.
        curriculum: Numbers of pairs of the lessons that come before, which fill their texts.
        lesson_steps: Steps of each lesson; the last number is that of all further lessons too.
        lesson_answers: Questions of a step of a lesson, which thus has the more sequences the
            shorter they are.
    """

    length: int
    pairs: int
    noise: str
    curriculum: tuple[int, ...] = ()
    lesson_steps: tuple[int, ...] = (LESSON_STEPS,)
    lesson_answers: int = LESSON_ANSWERS

    @property
    def sequence(self) -> int:
        """Text and questions."""
        return self.length + self.pairs

    @property
    def facts(self) -> dict[str, Any]:
        """The data, and what guessing a value would get right."""
        vocabulary = self.config.tokens
        facts: dict[str, Any] = {
            "length": self.length,
            "pairs": self.pairs,
            "noise": self.noise,
            "guess": 1 / (vocabulary - (vocabulary - 1) // 2),
        }
        if self.curriculum:
            facts["curriculum"] = [
                {
                    "steps": steps,
                    "batch": lesson.batch,
                    "length": lesson.length,
                    "pairs": lesson.pairs,
                }
                for steps, lesson in self.lessons()
            ]
        return facts

    def lessons(self) -> list[tuple[int, RecallTask]]:
        """Short texts full of pairs, with the tokens of the whole task."""
        known = self.lesson_steps
        steps = [*known, *[known[-1]] * len(self.curriculum)]
        return [
            (
                count,
                replace(
                    self,
                    length=2 * pairs,
                    pairs=pairs,
                    batch=max(1, self.lesson_answers // pairs),
                    curriculum=(),
                ),
            )
            for pairs, count in zip(self.curriculum, steps, strict=False)
        ]

    def loss(self, model: SmallModel) -> Tensor:
        """Cross entropy of the answers, in nats."""
        tokens, values = self._draw(model.device)
        with precision(model.device):
            logits = model(tokens, last=self.pairs)
        return F.cross_entropy(logits.float().flatten(0, 1), values.flatten())

    @torch.no_grad()
    def test(self, model: SmallModel) -> dict[str, float]:
        """The part of the answers that are right."""
        batches = -(-self.test_samples // self.batch)
        right = torch.zeros((), device=model.device)
        for _ in range(batches):
            tokens, values = self._draw(model.device)
            with precision(model.device):
                logits = model(tokens, last=self.pairs)
            right += (logits.argmax(-1) == values).float().mean()
        return {"accuracy": float(right) / batches}

    def _draw(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return make_sequences(
            self.batch, self.length, self.pairs, self.noise, device, self.config.tokens
        )


def recall_task(
    length: int,
    width: int,
    *,
    pairs: int = 512,
    window: int = 512,
    recent: int = 0,
    noise: str = "values",
    rate_factor: float = 1.0,
    train_samples: int = 250_000,
    test_samples: int = 1_000,
    curriculum: tuple[int, ...] = (),
    lesson_steps: tuple[int, ...] = (LESSON_STEPS,),
    lesson_answers: int = LESSON_ANSWERS,
) -> RecallTask:
    """Two layers of attention with one head, no feed-forward part.

    Args:
        length: Tokens of the text, even.
        width: Width of the model and of its head; even, at most 256.
        pairs, noise: As in `make_sequences`.
        window: Keys that a query of the window and of the dynamic masks sees.
        recent: How many of them are the newest in dynamic masks.
        rate_factor: Multiplies the learning rate, which is that of the nearest width in `RATES`.
        train_samples, test_samples: Of `Task`.
        curriculum, lesson_steps, lesson_answers: Of `RecallTask`.
    """
    config = ModelConfig(
        tokens=length + 1,
        classes=length + 1,
        width=width,
        layers=2,
        heads=1,
        kv_heads=1,
        head_dim=width,
        window=window,
        recent=recent,
        rope_theta=ROPE_THETA,
    )
    nearest = min(RATES, key=lambda known: abs(known - width))
    marks = f"-recent{recent}" * (recent > 0) + "-curriculum" * (len(curriculum) > 0)
    return RecallTask(
        f"recall-{noise}-{length}-d{width}{marks}",
        config,
        BATCHES[min(BATCHES, key=lambda known: abs(known - length))],
        rate_factor * RATES[nearest],
        train_samples,
        test_samples,
        length,
        pairs,
        noise,
        curriculum,
        lesson_steps,
        lesson_answers,
    )
