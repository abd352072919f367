"""The `bench` command: list the cases, run them, compare and draw what they show."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from dataclasses import replace
from pathlib import Path

from .. import info
from . import results
from .cases import CASES, Case
from .compiling import compile_ahead
from .console import Progress, first_lines, format_bytes, format_seconds, table
from .machine import busy_note
from .measure import take, verify_isolated
from .providers import PROVIDERS, WrongResult
from .roof import ceilings
from .store import WHAT, Row, append_rows, elapsed, make_row, run_facts
from .yardsticks import verdicts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `bench`."""
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="show the cases and the providers").set_defaults(run=_list)
    run = actions.add_parser("run", help="check, then time; print tables and verdicts")
    run.add_argument(
        "--case",
        action="append",
        metavar="PATTERN",
        help="names of cases, * allowed, repeatable; default: all of this device, which on a GPU "
        "are the rows of results/h200.jsonl",
    )
    run.add_argument(
        "--provider",
        action="append",
        choices=sorted(PROVIDERS),
        help="measure these instead of those a case names, repeatable",
    )
    run.add_argument("--out", type=Path, help="append the rows to this file as JSON lines")
    run.add_argument("--repeats", type=int, default=11, help="repetitions at most (default 11)")
    run.add_argument(
        "--warm-cache",
        action="store_true",
        help="leave a GPU's L2 cache as the run before left it (default: emptied, or caches that "
        "take turns); rows say so, and their cases end in -warm",
    )
    run.set_defaults(run=_run)
    results.add_arguments(actions)


_BUDGET = {"cpu": 10.0, "cuda": 4.0}
"""Seconds after which no repetition of a measurement is begun."""
_KNOWN_WORK = ("selection", "pairs", "sliding")  # min(t + 1, W) keys at position t


def _list(arguments: argparse.Namespace) -> int:
    rows = [
        [
            case.name,
            case.shape,
            case.mask,
            case.pattern,
            case.dtype,
            f"{case.flops() / 1e9:.4g}" if case.mask in _KNOWN_WORK else "by the mask",
            format_bytes(case.min_bytes()),
            ", ".join(case.providers),
        ]
        for case in CASES.values()
    ]
    header = ["name", "shape", "mask", "scores", "dtype", "useful GFLOP", "least traffic"]
    header.append("providers")
    print("cases\n" + table(header, rows))
    print("\nproviders")
    for name, provider in PROVIDERS.items():
        print(f"  {name:<14} {provider.what}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    cases = _choose(arguments.case)
    if not cases:
        wanted, names = " or ".join(arguments.case), ", ".join(CASES)
        print(f"--case: no case is called {wanted}; there are {names}", file=sys.stderr)
        return 2
    if arguments.warm_cache:
        if on_cpu := [case.name for case in cases if case.device == "cpu"]:
            print(
                f"--warm-cache: expected cases of a GPU, got {', '.join(on_cpu)}: a processor's "
                "caches are never emptied; choose others by --case",
                file=sys.stderr,
            )
            return 2
        cases = [replace(case, name=f"{case.name}-warm") for case in cases]
    jobs = [
        (case, name)
        for case in cases
        for name in arguments.provider or case.providers
        if not (case.what == "selection" and PROVIDERS[name].dense)  # it selects nothing
    ]
    jobs.sort(key=lambda job: job[1] == "flex")  # compiles longest: if time ends, that is missing
    facts = {case.device: run_facts(case.device) for case in cases}
    compile_ahead(jobs)
    for device, shared in facts.items():
        shared["ceilings"] = ceilings(device)
    rows: list[Row] = []
    remarks: list[str] = []
    with Progress("bench", len(jobs)) as bar:
        for case, name in jobs:
            bar.update(f"{case.name} {name}", steps=0)
            result = _one(case, name, arguments, facts[case.device])
            if isinstance(result, str):
                remarks.append(result)
            else:
                rows.append(result)
                if arguments.out:
                    append_rows(arguments.out, [result])
            bar.update(f"{case.name} {name}")
    print(report(rows, remarks, facts))
    print(f"\n{max(map(elapsed, facts.values())):.0f} s")
    return 1 if remarks or not all(verdict.holds for verdict in verdicts(rows)) else 0


def _choose(patterns: list[str] | None) -> list[Case]:
    if patterns is None:
        device = info.default_device().type
        cases = [case for case in CASES.values() if not case.name.startswith("cpu-smoke")]
        return [case for case in cases if case.device == device] or cases
    return [case for case in CASES.values() if any(fnmatch.fnmatch(case.name, p) for p in patterns)]


def _one(case: Case, name: str, arguments: argparse.Namespace, facts: Row) -> Row | str:
    """The row of one measurement, or why there is none."""
    needed, available = PROVIDERS[name].extra_bytes(case), info.available_bytes()
    if case.device == "cpu" and available is not None and needed > available:
        return (
            f"not run: {name} on {case.name} needs {format_bytes(needed)} of memory, "
            f"{format_bytes(available)} are available"
        )
    try:
        errors = verify_isolated(case, name)
        options = {"repeats": arguments.repeats, "cold": not arguments.warm_cache}
        measured = take(case, name, budget_seconds=_BUDGET[case.device], **options)
    except WrongResult as error:
        return f"not timed, wrong result: {error}"
    except Exception as error:  # whatever a provider raises, the others are measured
        return f"failed: {name} on {case.name}: {first_lines(error)}"
    return make_row(case, name, measured, errors, facts)


def report(rows: list[Row], remarks: list[str], facts: dict[str, Row]) -> str:
    """Tables and verdicts of the rows of one run, and what else there is to say."""
    lines = []
    for device, shared in facts.items():
        machine = ", ".join(f"{key} {value}" for key, value in shared["hardware"].items())
        versions = ", ".join(f"{key} {value}" for key, value in shared["versions"].items())
        lines += [f"{device}: {machine}", f"{versions}, commit {shared['commit']}", ""]
    lines.append(table(_COLUMNS, [_cells(row) for row in rows]))
    lines += [
        "",
        "Medians; the total includes selection, plan and mask building. Memory is the peak above",
        "the inputs. The error is the largest of output and gradients against fp64, at reduced",
        "length. Times of GPUs are those of the device; how long the host takes for the same call,",
        "which nothing replays, is beside the total.",
    ]
    if any(row["what"] == WHAT["decode"] for row in rows):
        lines.append("A decoding step is in the column forward; its text was read before, untimed.")
    if any("mask_seconds" in row for row in rows):
        lines += [
            "mask: making the bool mask from the scores, for all sides and in no total. What a",
            "side makes of it is in its selection; ours plans in the call, in its forward.",
        ]
    if called := sorted({row["provider"] for row in rows if _is_called(row)}):
        lines.append(
            f"Timed as calls, host time included, as they cannot be captured: {', '.join(called)}."
        )
    if note := busy_note(rows):
        lines += ["", note]
    found = verdicts(rows)
    if found:
        lines += ["", "yardsticks", *(f"  {verdict}" for verdict in found)]
    if remarks:
        lines += ["", *remarks]
    return "\n".join(lines)


_COLUMNS = (
    "case",
    "provider",
    "mask",
    "selection",
    "forward",
    "backward",
    "total",
    "host",
    "spread",
    "runs",
    "memory",
    "error",
)
_PARTS = ("selection", "forward", "backward", "total")


def _is_called(row: Row) -> bool:
    """Whether a part on a GPU was timed as a call and not as a replay."""
    return row["hardware"]["device"] == "cuda" and "calls" in row.get("timing", {}).values()


def _cells(row: Row) -> list[str]:
    seconds, (fastest, slowest) = row["seconds"], row["spread"]
    return [
        row["case"],
        row["provider"],
        format_seconds(row.get("mask_seconds")),
        *(format_seconds(seconds.get(part)) for part in _PARTS),
        format_seconds(row.get("host_seconds", {}).get("total")),
        f"{format_seconds(fastest)} .. {format_seconds(slowest)}",
        f"{row['repeats']}{'' if row['warm'] else ' (cold)'}",
        format_bytes(row["peak_bytes"]),
        f"{max(row['errors'].values()):.1e}",
    ]
