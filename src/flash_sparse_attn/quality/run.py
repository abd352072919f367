"""Comparisons at equal steps within a time: how many steps there is time for, training, rows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from ..bench.compiling import call_all
from ..bench.console import Progress
from ..bench.store import Row, elapsed
from ..demo.model import SmallModel
from ..demo.training import LossOfStep, Training
from .tasks import Task

_POINTS = 100  # of a curve
_RESERVE = 0.95  # of the time: the rest is for what was not foreseen
_TEST_SEED = 1_000_000  # above the seed of the training


def planned_steps(
    wanted: int, seconds: float, step_seconds: Iterable[float], test_batches: int
) -> int:
    """How many steps every attention is trained, so that all of them are done in time.

    Args:
        wanted: Steps of the whole training.
        seconds: Time for the trainings and tests of all attentions.
        step_seconds: Of a training step, by attention. A test batch takes a third of one: a forward
            pass, where training has a backward pass of about twice the work.
        test_batches: Of the test.
    """
    together = sum(step_seconds)
    affordable = int((_RESERVE * seconds - together * test_batches / 3) / together)
    return max(1, min(wanted, affordable))


def compile_kernels(tasks: Sequence[Task], kinds: Iterable[str], device: torch.device) -> None:
    """Run every model once, so that compilation takes its time from no comparison in particular.

    Many lengths in several processes side by side, what is one length in this.
    """
    jobs = [
        (part, kind, device)
        for task in tasks
        for part in (task, *(lesson for _, lesson in task.lessons()))
        for kind in kinds
    ]
    if len({part.sequence for part, *_ in jobs}) > 1:
        call_all(compile_one, jobs)
        return
    with Progress("compile", len(jobs)) as bar:
        for job in jobs:
            compile_one(*job)
            bar.update()


def compile_one(task: Task, kind: str, device: torch.device) -> None:
    """One forward and backward pass."""
    task.loss(SmallModel(task.config, kind).to(device)).backward()


def compare(
    task: Task,
    kinds: Iterable[str],
    seed: int,
    device: torch.device,
    deadline: float,
    steps: int | None,
    facts: Row,
) -> Iterator[Row]:
    """Train and test a model with each attention, with the same data, steps and first weights.

    Args:
        task: What is learned.
        kinds: Of `tasks.ATTENTIONS`.
        seed: Of the weights and of the data.
        device: Where.
        deadline: When to be done, on `time.perf_counter`; looked at if `steps` is None.
        steps: A fixed number instead.
        facts: What `store.run_facts` returned for this run.

    Yields:
        A row for each attention, when it is done.
    """
    prepared = [_prepare(task, kind, seed, device) for kind in kinds]
    step_seconds = [one.training.seconds_per_step() for one in prepared]
    if steps is None:
        test_batches = -(-task.test_samples // task.batch)
        taught = sum(
            count * one.training.seconds_per_step(loss_of_step=loss)
            for one in prepared
            for count, loss in one.lessons
        )
        left = deadline - time.perf_counter() - taught
        steps = planned_steps(task.steps, left, step_seconds, test_batches)
    for one, seconds in zip(prepared, step_seconds, strict=True):
        model, taught_steps = one.model, sum(count for count, _ in one.lessons)
        torch.manual_seed(seed)
        with Progress(f"{task.name} {one.kind}", steps + taught_steps) as bar:
            losses = one.training.run(steps, task.learning_rate, bar, one.lessons)
        torch.manual_seed(seed + _TEST_SEED)
        yield {
            "case": task.name,
            "provider": one.kind,
            "what": "quality",
            "shape": _shape(task),
            "model": asdict(task.config),
            "parameters": model.parameters_count(),
            "dtype": "bfloat16" if device.type == "cuda" else "float32",
            **task.facts,
            "seed": seed,
            "learning_rate": task.learning_rate,
            "steps": steps,
            "train_samples": steps * task.batch,
            "test_samples": task.test_samples,
            "wanted_train_samples": task.train_samples,
            "results": task.test(model),
            "curve": curve(losses),
            "step_seconds": seconds,
            "recorded": one.recorded,
            **facts,
            "elapsed_seconds": elapsed(facts),
        }


def curve(losses: list[float]) -> list[tuple[int, float]]:
    """At most a hundred points (steps done, mean loss of the steps since the last point)."""
    width = -(-len(losses) // _POINTS)
    parts = [losses[begin : begin + width] for begin in range(0, len(losses), width)]
    ends = [min((index + 1) * width, len(losses)) for index in range(len(parts))]
    return [(end, sum(part) / len(part)) for end, part in zip(ends, parts, strict=True)]


@dataclass(frozen=True)
class _Prepared:
    """A model with its first weights, its training, and the steps and losses of its lessons.

    Attributes:
        recorded: Whether its steps are CUDA graphs: ``"yes"``, or why not.
    """

    kind: str
    model: SmallModel
    training: Training
    lessons: list[tuple[int, LossOfStep]]
    recorded: str


def _prepare(task: Task, kind: str, seed: int, device: torch.device) -> _Prepared:
    torch.manual_seed(seed)
    shared_weights = SmallModel(task.config, "full").state_dict()
    model = SmallModel(task.config, kind)
    model.load_state_dict(shared_weights, strict=False)  # a dynamic mask has its scores besides
    model.to(device)
    training = Training(model, _loss_of_step(task, model))
    lessons = [(steps, _loss_of_step(lesson, model)) for steps, lesson in task.lessons()]
    recorded = "no"
    if device.type == "cuda":
        recorded = _record(training, [loss for _, loss in lessons])
    return _Prepared(kind, model, training, lessons, recorded)


def _record(training: Training, lessons: Iterable[LossOfStep]) -> str:
    """Record all steps that can be; ``"yes"`` or the first reason why one cannot."""
    reason = "yes"
    for loss in (None, *lessons):
        try:
            training.record(loss)
        except RuntimeError as error:
            reason = reason if reason != "yes" else f"no: {str(error).strip().splitlines()[0]}"
    return reason


def _loss_of_step(task: Task, model: SmallModel) -> LossOfStep:
    return lambda _: task.loss(model)


def _shape(task: Task) -> dict[str, int]:
    config = task.config
    return {
        "batch": task.batch,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "queries": task.sequence,
        "length": task.sequence,
        "head_dim": config.head_dim,
        "window": config.window,
    }


def shortened(rows: list[Row]) -> list[str]:
    """What of the wanted training there was no time for, a line for each case."""
    lines: dict[str, None] = {}
    for row in rows:
        done, wanted = row["train_samples"], row["wanted_train_samples"]
        if row["steps"] < max(1, wanted // row["shape"]["batch"]):
            lines[
                f"{row['case']}, seed {row['seed']}: shortened to {done:,} of {wanted:,} training "
                f"samples ({row['steps']:,} steps of {row['shape']['batch']})"
            ] = None
    return list(lines)
