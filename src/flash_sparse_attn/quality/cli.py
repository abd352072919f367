"""The program: two experiments and a figure."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .. import info
from ..bench.console import table, write_whole
from ..bench.store import Row, append_rows, read_rows, run_facts
from ..demo.text import read_corpus
from . import figure
from .language import CONFIG, language_task
from .recall import BATCHES, LESSON_ANSWERS, LESSON_STEPS, NOISE, RATES, recall_task
from .run import compare, compile_kernels, shortened
from .tasks import ATTENTIONS, Task

RESULTS = {
    "accuracy": "right answers",
    "bits_per_byte": "bits per held-out byte",
    "late_bits_per_byte": "bits per byte, last quarter of each sequence",
}
"""What tests report, in words."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: Default those of the process.
    """
    options = _parser().parse_args(arguments)
    return options.run(options)


def _recall(options: argparse.Namespace) -> int:
    sizes = {"pairs": options.pairs, "window": options.window, "noise": options.noise}
    sizes |= {"recent": options.recent}
    sizes |= {"rate_factor": options.rate_factor}
    sizes |= {"curriculum": tuple(options.curriculum), "lesson_answers": options.lesson_answers}
    sizes |= {"lesson_steps": tuple(options.lesson_steps)}
    if options.quick:
        sizes |= {"pairs": 8, "window": 16, "train_samples": 128, "test_samples": 16}
        sizes |= {"curriculum": (2, 4) if options.curriculum else (), "lesson_steps": (2,)}
        options.length, options.width = [64], [16]
    if not 0 <= options.recent < sizes["window"]:
        print(
            f"--recent: expected fewer than the {sizes['window']} keys of --window, got "
            f"{options.recent}",
            file=sys.stderr,
        )
        return 2
    wrong = [n for n in options.length if n % 2 or n < 2 * sizes["pairs"]]
    if wrong:
        needed = 2 * sizes["pairs"]
        print(
            f"--length: expected even numbers of at least {needed}, which {sizes['pairs']} pairs "
            f"take, got {wrong[0]}; see --pairs",
            file=sys.stderr,
        )
        return 2
    if wrong := [n for n in sizes["curriculum"] if not 1 <= n <= sizes["pairs"]]:
        print(
            f"--curriculum: expected numbers of pairs from 1 to {sizes['pairs']}, got {wrong[0]}",
            file=sys.stderr,
        )
        return 2
    counts = options.lesson_steps
    if min(counts) < 1 or len(counts) > max(1, len(options.curriculum)):
        print(
            f"--lesson-steps: expected numbers from 1, no more than the {len(options.curriculum)} "
            f"lessons of --curriculum, got {counts}",
            file=sys.stderr,
        )
        return 2
    if options.lesson_answers < 1:
        print(
            f"--lesson-answers: expected at least 1, got {options.lesson_answers}", file=sys.stderr
        )
        return 2
    tasks = [
        recall_task(n, d, **sizes) for n, d in itertools.product(options.length, options.width)
    ]
    return _run(tasks, options)


def _text(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    if options.quick:
        config = replace(CONFIG, width=32, layers=1, head_dim=16, window=16, recent=4)
        sizes = {"length": 64, "batch": 2, "train_samples": 8, "test_samples": 4}
        task = language_task(read_corpus(), device, config=config, **sizes)
    else:
        task = language_task(read_corpus(options.megabytes), device)
    return _run([task], options)


def _run(tasks: Sequence[Task], options: argparse.Namespace) -> int:
    """Train and test everything, each comparison in its part of the time that is left."""
    begin = time.perf_counter()
    end = begin + 60 * options.minutes
    device, facts = torch.device(options.device), run_facts(options.device)
    if device.type == "cuda":
        compile_kernels(tasks, options.kind, device)
    jobs = list(itertools.product(tasks, options.seed))
    rows: list[Row] = []
    for number, (task, seed) in enumerate(jobs):
        now = time.perf_counter()
        deadline = now + (end - now) / (len(jobs) - number)
        for row in compare(task, options.kind, seed, device, deadline, options.steps, facts):
            rows.append(row)
            if options.out:
                append_rows(options.out, [row])
    print(report(rows, facts))
    print(f"\n{time.perf_counter() - begin:.0f} s")
    return 0


def report(rows: list[Row], facts: Row) -> str:
    """Tables of the rows of one run, and what has to be known to read them."""
    machine = ", ".join(f"{key} {value}" for key, value in facts["hardware"].items())
    versions = ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
    lines = [machine, f"{versions}, commit {facts['commit']}", ""]
    kinds = [kind for kind in ATTENTIONS if any(row["provider"] == kind for row in rows)]
    for name in RESULTS:
        cases = dict.fromkeys(row["case"] for row in rows if name in row["results"])
        if not cases:
            continue
        header = [RESULTS[name], "steps", *(ATTENTIONS[kind] for kind in kinds)]
        cells = []
        for case in cases:
            found = [row for row in rows if row["case"] == case]
            steps = sorted({f"{row['steps']:,}" for row in found})
            by_kind = [
                [row["results"][name] for row in found if row["provider"] == kind] for kind in kinds
            ]
            cells.append([case, " ".join(steps), *map(_mean, by_kind)])
        lines += [table(header, cells), ""]
    sizes = ", ".join(
        f"{ATTENTIONS[kind]} {max(r['parameters'] for r in rows if r['provider'] == kind):,}"
        for kind in kinds
    )
    seeds = len({row["seed"] for row in rows})
    lines += [
        f"Means over {seeds} seed{'s' if seeds > 1 else ''}"
        + (", and in brackets the least and the largest." if seeds > 1 else "."),
        f"Parameters of the largest model: {sizes}.",
        f"Window and dynamic masks see {rows[0]['shape']['window']} keys. A shared mask is chosen "
        "from the whole text,",
        "so that what a model with one predicts has been seen by its choice of keys.",
    ]
    for taught in dict.fromkeys(told(row) for row in rows if "curriculum" in row):
        lines.append(f"Every attention had lessons before: {taught}.")
    if guess := {row["case"]: row["guess"] for row in rows if "guess" in row}:
        lines.append(f"Guessing a value is right in {max(guess.values()):.2%} at most.")
    slow = dict.fromkeys(row["recorded"] for row in rows if row["recorded"] != "yes")
    if rows[0]["hardware"]["device"] == "cuda" and slow:
        lines.append(f"Steps that were not recorded as a CUDA graph: {'; '.join(slow)}")
    return "\n".join([*lines, *shortened(rows)])


def told(row: Row) -> str:
    """The lessons of a row in words."""
    return ", ".join(
        f"{lesson['steps']} steps of {lesson['pairs']} pairs in {lesson['length']} tokens"
        for lesson in row["curriculum"]
    )


def _mean(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.4f}" if values else "-"
    return f"{statistics.mean(values):.4f} ({min(values):.4f} .. {max(values):.4f})"


def _plot(options: argparse.Namespace) -> int:
    rows = [row for path in options.rows for row in read_rows(path) if row["what"] == "quality"]
    if not rows:
        print("plot: no row of these files is about quality", file=sys.stderr)
        return 2
    try:
        write_whole(options.out, figure.draw(rows, options.out.suffix.lstrip(".") or "png"))
    except ImportError as error:
        print(f"plot: {error}; pip install matplotlib", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(rows)} trainings")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Small models that differ in nothing but their attention: full, a sliding "
        "window, and dynamic masks, at equal steps, data and first weights."
    )
    commands = parser.add_subparsers(required=True)
    recall = commands.add_parser("recall", help="multi-query associative recall")
    recall.add_argument("--length", type=int, nargs="+", default=list(BATCHES), help="of the text")
    recall.add_argument("--width", type=int, nargs="+", default=list(RATES), help="of the model")
    recall.add_argument("--pairs", type=int, default=512, help="keys and values (default 512)")
    recall.add_argument("--window", type=int, default=512, help="keys a query sees (default 512)")
    recall.add_argument(
        "--recent",
        type=int,
        default=0,
        help="keys of a dynamic mask that are the newest, whatever their score (default 0)",
    )
    recall.add_argument("--noise", choices=tuple(NOISE), default="values", help=_noise_help())
    recall.add_argument(
        "--rate-factor", type=float, default=1.0, help="of the learning rates (default 1)"
    )
    recall.add_argument(
        "--curriculum",
        type=int,
        nargs="+",
        default=[],
        metavar="PAIRS",
        help="lessons before, for every attention alike: texts full of so many pairs (8 16, say)",
    )
    recall.add_argument(
        "--lesson-steps",
        type=int,
        nargs="+",
        default=[LESSON_STEPS],
        metavar="STEPS",
        help="of every lesson in turn; the last number is that of all further ones too "
        f"(default {LESSON_STEPS})",
    )
    recall.add_argument(
        "--lesson-answers",
        type=int,
        default=LESSON_ANSWERS,
        help=f"questions of a step of a lesson (default {LESSON_ANSWERS})",
    )
    recall.set_defaults(run=_recall)
    text = commands.add_parser("text", help="a byte-level language model of source code")
    text.add_argument(
        "--megabytes", type=float, default=40.0, help="of installed sources (default 40)"
    )
    text.set_defaults(run=_text)
    for command, seeds in ((recall, [0]), (text, [0, 1, 2])):
        command.add_argument(
            "--kind", nargs="+", choices=tuple(ATTENTIONS), default=list(ATTENTIONS)
        )
        command.add_argument("--seed", type=int, nargs="+", default=seeds)
        length = command.add_mutually_exclusive_group()
        length.add_argument(
            "--minutes",
            type=float,
            default=9.0,
            help="for everything; steps are cut down to fit, equally for all (default 9)",
        )
        length.add_argument("--steps", type=int, help="exactly so many, to repeat a row")
        command.add_argument(
            "--device", choices=("cpu", "cuda"), default=info.default_device().type
        )
        command.add_argument("--out", type=Path, help="append the rows to this file as JSON lines")
        command.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    plot = commands.add_parser("plot", help="draw results and curves of rows")
    plot.add_argument("rows", type=Path, nargs="+", help="files of rows")
    plot.add_argument("--out", type=Path, required=True, help="the figure: .png, .svg or .pdf")
    plot.set_defaults(run=_plot)
    return parser


def _noise_help() -> str:
    return "; ".join(f"{name}: {what}" for name, what in NOISE.items()) + " (default values)"
