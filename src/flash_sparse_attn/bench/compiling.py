"""Kernels compiled by several processes before anything is timed; one alone takes minutes."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import torch

from .cases import Case, make_inputs
from .console import Progress
from .providers import PROVIDERS, run

Job = tuple[Case, str]
"""A case and the name of a provider."""

_COMPILED = ("ours", "ours-cuda", "ours-triton", "ours-flex", "flex")
_FEW = 7  # problems; fewer are not worth starting processes
_LONGEST = 32768  # longer texts have the same kernels, and more memory than several processes get
_PROCESSES = 12  # beside each other on one GPU


def compile_ahead(jobs: Sequence[Job]) -> None:
    """Call what compiles kernels on this GPU once; who calls it later finds them on disk.

    Nothing is measured and nothing told: what fails here fails again when it is measured.

    Args:
        jobs: What is going to be verified and measured.
    """
    problems = [(problem, name) for case, name in jobs for problem in (case.reduced(), case)]
    problems = in_turn([job for job in problems if _compiles(*job)])
    if len(problems) >= _FEW and torch.cuda.is_available():
        call_all(call, problems)


def call_all(
    function: Callable[..., None], jobs: Sequence[tuple[Any, ...]], processes: int | None = None
) -> list[BaseException]:
    """Call a function in new processes with the arguments of every job; returns what was raised.

    Args:
        function: Of a module, so that other processes find it.
        jobs: Arguments that can be pickled.
        processes: How many; default what a GPU and the processors bear.
    """
    if processes is None:
        processes = max(1, min(len(jobs), _PROCESSES, (os.cpu_count() or 1) - 1))
    raised = []
    # Not forked: a process that has used a GPU must not be.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _one_compiler)
    with pool, Progress("compile", len(jobs)) as bar:
        for future in as_completed([pool.submit(function, *job) for job in jobs]):
            bar.update()
            if error := future.exception():
                raised.append(error)
    return raised


def _one_compiler() -> None:
    """Each of these processes compiles by itself: PyTorch's compiler would start a pool in each."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def call(case: Case, name: str) -> None:
    """Compute a case once, with the gradients that it has."""
    run(make_inputs(case), PROVIDERS[name], case.window)
    if case.device == "cuda":
        torch.cuda.empty_cache()  # for the other processes


def in_turn(jobs: Sequence[Job]) -> list[Job]:
    """Different problems: FlexAttention's, which take longest, then one of every other kind first.

    The next of a kind then finds its kernels.
    """
    seen: Counter[tuple[object, ...]] = Counter()
    ranked: dict[Job, int] = {}
    for case, name in jobs:
        problem = replace(case, name="", providers=())
        if (problem, name) in ranked:
            continue
        kind = (name, case.what, case.mask, case.bias, case.head_dim, case.heads // case.kv_heads)
        ranked[problem, name] = seen[kind]
        seen[kind] += 1
    return sorted(ranked, key=lambda job: ("flex" not in job[1], ranked[job]))


def _compiles(case: Case, name: str) -> bool:
    """Whether Triton compiles what a provider launches for a case."""
    return case.device == "cuda" and case.length <= _LONGEST and name in _COMPILED
