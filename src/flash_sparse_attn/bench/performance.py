"""The predecessors' performance scripts: their configurations and options on this frame.

Some of their configurations are one problem under several names; it is measured once.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import dispatch, info
from . import grids, predecessors
from .cases import Case
from .cli import report
from .compiling import compile_ahead
from .console import Deadline, Progress, first_lines
from .measure import take, verify_isolated
from .providers import PROVIDERS
from .roof import ceilings
from .store import Row, append_rows, elapsed, make_row, run_facts

_OURS = ("cuda", "triton", "flex", "eager")
_SDPA = ("sdpa-additive", "sdpa-causal")
TEST_TYPES = {
    "all": ("ours", *_SDPA, "flex"),
    "ours": ("ours",),
    "sdpa": _SDPA,
    "sdpa-vs-ours": ("ours", *_SDPA),
    "flex-baseline": ("flex",),
    "predecessors": ("ours", *predecessors.DISTRIBUTIONS.values()),
    **{name: (f"ours-{name}",) for name in _OURS},
    **{f"sdpa-vs-{name}": (*_SDPA, f"ours-{name}") for name in _OURS},
}
"""What each value of ``--test-type`` measures; ``ours`` is the public function as it comes."""


def main(
    title: str, make_cases: Callable[[int, int], list[Case]], arguments: list[str] | None = None
) -> int:
    """Run a script; 1 if something was wrong or failed.

    Args:
        title: One line for ``--help``.
        make_cases: The configurations for a head dimension and a window.
        arguments: Default those of the process.
    """
    options = _parser(title).parse_args(arguments)
    on_cpu = options.device == "cpu"
    dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    cases = {
        case.name: replace(case, device=options.device, dtype=dtype)
        for head_dim in options.head_dim or grids.HEAD_DIMS
        for case in make_cases(head_dim, options.window)
        if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.config or ["*"])
    }
    if options.list:
        print("\n".join(f"{name:<34} {case.shape}" for name, case in cases.items()))
        return 0
    names = TEST_TYPES[options.test_type or ("sdpa-vs-eager" if on_cpu else "all")]
    if on_cpu and not options.config:
        known, dims = len(cases), options.head_dim or grids.HEAD_DIMS[:1]
        cases = {n: case for n, case in cases.items() if grids.suits_cpu(case, dims)}
        print(grids.about_cpu(len(cases), known, dtype))
    if not cases:
        print(f"--config: no configuration is called {' or '.join(options.config)}; see --list")
        return 2
    if missing := _missing(names):
        print(f"--test-type {options.test_type}: {missing}")
        return 2
    if any(PROVIDERS[name].module for name in names):
        theirs = predecessors.installed()
        if not theirs:
            wanted = " or ".join(predecessors.DISTRIBUTIONS.values())
            print(f"the environment of {predecessors.command()[0]} has no {wanted}")
            return 2
        names = tuple(name for name in names if not PROVIDERS[name].module or name in theirs)
    facts = run_facts(options.device)
    deadline = Deadline(options.seconds)
    rows: list[Row] = []
    remarks: list[str] = []
    chosen = {"repeats": options.runs, "warmup": options.warmup, "seed": options.seed}
    jobs = list(itertools.product(cases.values(), names))
    compile_ahead(jobs)
    facts |= {"ceilings": ceilings(options.device)}
    measured: dict[tuple[Case, str], dict[str, Any]] = {}
    with Progress("configurations", len(jobs)) as bar:
        for case, name in deadline.until(jobs):
            same = (replace(case, name=""), name)
            try:
                errors = verify_isolated(case, name)
                found = measured[same] = measured.get(same) or take(case, name, **chosen)
            except Exception as error:  # whatever a provider raises, the others are measured
                remarks.append(f"{name} on {case.name}: {first_lines(error)}")
            else:
                rows.append(make_row(case, name, found, errors, facts))
                if options.out:
                    append_rows(options.out, rows[-1:])
            bar.update(f"{case.name} {name}")
    print(report(rows, remarks, {options.device: facts}))
    print(deadline.note, end="")
    print(f"\n{elapsed(facts):.0f} s")
    return 1 if remarks else 0


def _missing(names: tuple[str, ...]) -> str | None:
    """Why one of these cannot run here at all."""
    reasons = dispatch.explain_backends()
    for name in names:
        if PROVIDERS[name].module and (reason := predecessors.missing()):
            return reason
        backend = name.removeprefix("ours-")
        if name.startswith("ours-") and reasons[backend]:
            return f"backend {backend!r} is not available: {'; '.join(reasons[backend])}"
    return None


def _parser(title: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--seed", type=int, default=42, help="of the inputs (default 42)")
    parser.add_argument("--runs", type=int, default=3, help="measured runs (default 3)")
    parser.add_argument("--warmup", type=int, default=2, help="runs before them (default 2)")
    parser.add_argument(
        "--test-type",
        choices=TEST_TYPES,
        help="what is measured (default all: ours, SDPA with materialised mask and bias, dense "
        "causal SDPA, FlexAttention; on a CPU sdpa-vs-eager)",
    )
    parser.add_argument(
        "--head-dim",
        type=int,
        action="append",
        help="repeatable; default 64, as in the predecessors' scripts, and 128, as in their "
        "README; on a CPU 64",
    )
    parser.add_argument("--window", type=int, default=1024, help="keys a query sees (default 1024)")
    parser.add_argument(
        "--config",
        nargs="+",
        metavar="PATTERN",
        help="names of configurations, * allowed (default all; on a CPU the short ones)",
    )
    Deadline.add_argument(parser)
    parser.add_argument("--list", action="store_true", help="print the configurations and end")
    parser.add_argument("--out", type=Path, help="append the rows to this file as JSON lines")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=info.default_device().type)
    dtypes = [str(dtype).removeprefix("torch.") for dtype in (torch.bfloat16, torch.float16)]
    parser.add_argument(
        "--dtype", choices=[*dtypes, "float32"], help="default bfloat16; on a CPU float32"
    )
    return parser
