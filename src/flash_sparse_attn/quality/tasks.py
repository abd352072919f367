"""What a model is trained on and tested with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..demo.model import KINDS, SHARED, ModelConfig, SmallModel

ATTENTIONS = {
    "full": KINDS["full"],
    "window": KINDS["window"],
    "dynamic": "dynamic mask, causal",
    "shared": "dynamic mask, shared",
}
"""The attentions that are compared, by the kind of `SmallModel`."""
assert SHARED in ATTENTIONS


@dataclass(frozen=True)
class Task(ABC):
    """Data, sizes and schedule, the same for every attention.

    Attributes:
        name: Of the case.
        config: Sizes of the model.
        batch: Sequences of a step.
        learning_rate: Highest rate.
        train_samples: Sequences to train on if there is time.
        test_samples: Sequences of the test, never trained on.
    """

    name: str
    config: ModelConfig
    batch: int
    learning_rate: float
    train_samples: int
    test_samples: int

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return max(1, self.train_samples // self.batch)

    @property
    @abstractmethod
    def sequence(self) -> int:
        """Tokens that the model reads."""

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What else a row has to say about the data."""

    def lessons(self) -> Sequence[tuple[int, Task]]:
        """Easier tasks for the same model, each with its steps, that come before."""
        return ()

    @abstractmethod
    def loss(self, model: SmallModel) -> Tensor:
        """The mean loss of a new batch, drawn on the model's device by its default generator."""

    @abstractmethod
    def test(self, model: SmallModel) -> dict[str, float]:
        """What is reported, without gradients; the caller seeds the generators."""
