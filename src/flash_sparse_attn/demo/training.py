"""Training of small models: a warm-up, a cosine, and steps that never wait for a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..bench.console import Progress
from .model import KINDS, ModelConfig, SmallModel

_PREPARING = 3  # steps before one is recorded: compilation, and the optimizer's first state
_READINGS = 20  # how often a training looks at its loss, to show it

LossOfStep = Callable[[int], Tensor]


def train(
    model: nn.Module,
    loss_of_step: LossOfStep,
    steps: int,
    learning_rate: float,
    bar: Progress,
) -> list[float]:
    """Train a model in place; see `Training` for the schedule.

    Args:
        model: Trained in place.
        loss_of_step: The loss at a step.
        steps: Fixed number of steps.
        learning_rate: Highest rate.
        bar: Advanced by one at each step.

    Returns:
        The loss of every step.
    """
    return Training(model, loss_of_step).run(steps, learning_rate, bar)


def train_kinds(
    config: ModelConfig,
    device: torch.device,
    seed: int,
    steps: int,
    learning_rate: float,
    loss_of_model: Callable[[SmallModel, torch.Generator], LossOfStep],
) -> Iterator[tuple[str, SmallModel, dict[str, Any]]]:
    """Train a model of each of `KINDS` with the same data; see `Training` for the schedule.

    Args:
        config: Of every model.
        device: Where to train.
        seed: Of the initial weights, and of the generator on the CPU that data are drawn from.
        steps, learning_rate: As of `train`.
        loss_of_model: The loss of a model at a step, with data from the generator.

    Yields:
        The kind, its model, and ``parameters`` and ``losses`` for the results.
    """
    for kind, name in KINDS.items():
        torch.manual_seed(seed)
        model = SmallModel(config, kind).to(device)
        loss_of_step = loss_of_model(model, torch.Generator().manual_seed(seed))
        with Progress(f"train {name}", steps) as bar:
            losses = train(model, loss_of_step, steps, learning_rate, bar)
        yield kind, model, {"parameters": model.parameters_count(), "losses": losses}


class Training:
    """AdamW: warm-up over a tenth of the steps, cosine decay to a twentieth of the rate.

    With lessons the warm-up is a tenth of the first one and the decay begins after the last, so
    that they are learned at the highest rate.

    Nothing is read from the device in a step. Losses stay there; `run` looks at a few of them.

    Args:
        model: Trained in place.
        loss_of_step: The loss at a step.
    """

    def __init__(self, model: nn.Module, loss_of_step: LossOfStep) -> None:
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.loss_of_step = loss_of_step
        on_gpu = self.device.type == "cuda"
        # A recorded step reads its rate from the device.
        rate = torch.zeros((), device=self.device) if on_gpu else 0.0
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            capturable=on_gpu,
            fused=on_gpu,
        )
        self._recorded: dict[LossOfStep, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def run(
        self,
        steps: int,
        learning_rate: float,
        bar: Progress,
        lessons: Sequence[tuple[int, LossOfStep]] = (),
    ) -> list[float]:
        """Train; returns the loss of every step.

        Args:
            steps: Fixed number of steps.
            learning_rate: Highest rate.
            bar: Advanced by one at each step.
            lessons: Numbers of steps and other losses that come before.
        """
        plan = [loss for count, loss in lessons for _ in range(count)] + [None] * steps
        losses = torch.empty(len(plan), device=self.device)
        counts = [*(count for count, _ in lessons), steps]
        note, reading = "", max(1, len(plan) // _READINGS)
        for step, loss_of_step in enumerate(plan):
            self._set_rate(learning_rate * rate_factor(step, counts))
            losses[step] = self._step(step, loss_of_step)
            if (step + 1) % reading == 0:
                note = f"loss {float(losses[step]):.3f}"
            bar.update(note)
        return losses.tolist()

    def record(self, loss_of_step: LossOfStep | None = None) -> None:
        """Make one CUDA graph of a step, which all later ones replay; weights stay as they are.

        For losses that draw their data from the device's default generator and do the same work at
        every step.

        Args:
            loss_of_step: That of a lesson; default the training's own.

        Raises:
            RuntimeError: Something in the step cannot be recorded. Training goes on without.
        """
        with self._without_effect():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_PREPARING):
                    self._step(0, loss_of_step)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = self._step(0, loss_of_step)
        self._recorded[loss_of_step or self.loss_of_step] = graph, loss

    def seconds_per_step(self, repeats: int = 5, loss_of_step: LossOfStep | None = None) -> float:
        """Time of a step, or one of a lesson, the first ones left out; weights stay as they are."""
        with self._without_effect():
            self._step(0, loss_of_step)
            self._wait()
            begin = time.perf_counter()
            for _ in range(repeats):
                self._step(0, loss_of_step)
            self._wait()
            return (time.perf_counter() - begin) / repeats

    def _step(self, step: int, lesson: LossOfStep | None = None) -> Tensor:
        loss_of_step = lesson or self.loss_of_step
        if loss_of_step in self._recorded:
            graph, loss = self._recorded[loss_of_step]
            graph.replay()
            return loss
        loss = loss_of_step(step)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach()

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _without_effect(self) -> _Restored:
        return _Restored(self.parameters, self.optimizer)


class _Restored:
    """Puts weights back at the end of a block, and an optimizer to the state before its first step.

    In place: a recorded graph knows their addresses.
    """

    def __init__(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.parameters, self.optimizer = parameters, optimizer
        self.before = [parameter.detach().clone() for parameter in parameters]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.before, strict=True):
                parameter.copy_(value)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()


def rate_factor(step: int, steps: Sequence[int]) -> float:
    """What the highest rate is multiplied by.

    Args:
        step: Of the whole training, from 0.
        steps: Of every lesson in turn, and of what comes after.
    """
    warm_up = max(1, steps[0] // 10)
    decayed = max(0, step - sum(steps[:-1])) / steps[-1]
    return min(1.0, (step + 1) / warm_up) * (0.525 + 0.475 * math.cos(math.pi * decayed))
