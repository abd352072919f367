"""Time and peak memory of one provider on one case."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import decoding, predecessors
from .cases import Case, Inputs, make_inputs, make_mask
from .machine import OtherLoad, PeakMemory
from .providers import PROVIDERS, Provider, WrongResult, verify, visible_pairs
from .timing import REPLAYS, Clock, Player, calls_in_a_graph, player, rotation_seconds

_SLOW_SECONDS = 20.0
_ROTATION = 4  # times the L2 cache that caches in rotation take together, at least


def measure_isolated(
    case: Case,
    provider: str,
    repeats: int = 5,
    budget_seconds: float = 10.0,
    warmup: int = 1,
    seed: int = 0,
    cold: bool = True,
) -> dict[str, Any]:
    """Measure in a fresh process, so that peak memory is this provider's alone.

    Args:
        case: The problem.
        provider: Name in `PROVIDERS`.
        repeats: Measured repetitions at most.
        budget_seconds: No new repetition is started after this time.
        warmup: Runs before the measured ones, at least 1.
        seed: Of the inputs.
        cold: On GPUs, whether the L2 cache is emptied before each run; of decoding, whether several
            caches take turns.

    Returns:
        ``seconds`` (medians of selection, forward, backward and total, as far as the case and the
        provider have them; a decoding step is ``forward``), ``spread`` (fastest and slowest total),
        ``repeats``, ``warm`` (False if the only run was the first one), ``timing`` (how each part
        was timed), ``peak_bytes`` above the inputs; where the mask is an input, ``mask_seconds``,
        which are nobody's and in no total, and ``visible_pairs``; on CPUs ``other_load``, the part
        of the processors that other processes used meanwhile (``None`` where the system does not
        tell); of predecessors ``versions`` in their environment; on GPUs ``host_seconds``, of calls
        that are not replayed, and ``l2_cache``, ``"cold"`` or ``"warm"``; of decoding
        ``cache_bytes`` of one cache, and how many ``caches`` took turns.

    Raises:
        RuntimeError: The process failed; the message holds the end of its error output.
    """
    options = {"budget_seconds": budget_seconds, "warmup": warmup, "seed": seed, "cold": cold}
    job = {"case": asdict(case), "provider": provider, "repeats": repeats, "options": options}
    return _answer(job)


def verify_isolated(case: Case, provider: str) -> dict[str, float]:
    """`providers.verify`, where the provider can run: here, or in the predecessors' environment.

    Raises:
        WrongResult: The error rule is broken.
        RuntimeError: A predecessor cannot run; the message says why.
    """
    if not PROVIDERS[provider].module:
        return verify(case, provider)
    found = _answer({"case": asdict(case), "provider": provider})
    if "wrong" in found:
        raise WrongResult(found["wrong"])
    return found["errors"]


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    """The answer of `do` in another process, which for predecessors is one of their environment."""
    if PROVIDERS[job["provider"]].module:
        return predecessors.ask(job, keep=job["case"]["device"] == "cuda")
    command = [sys.executable, "-m", "flash_sparse_attn.bench.measure"]
    # The process finds this package even if only `sys.path` of this one leads to it.
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, env=environment
    )
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-3:])
        what = f"{job['provider']} on {job['case']['name']}"
        raise RuntimeError(f"{what} ended with status {done.returncode}: {tail}")
    return json.loads(done.stdout.splitlines()[-1])


def take(case: Case, provider: str, **options: Any) -> dict[str, Any]:
    """Measure: on a GPU in this process, in which PyTorch counts its memory, else in a fresh one.

    A process for each would cost many times what is measured.

    Args:
        case: The problem.
        provider: Name in `PROVIDERS`.
        options: Of `measure`.
    """
    if case.device != "cuda" or PROVIDERS[provider].module:
        return measure_isolated(case, provider, **options)
    _forget()
    return measure(case, PROVIDERS[provider], **options)


def _forget() -> None:
    """Let go of what the measurements before left in this process."""
    torch.compiler.reset()  # what was compiled for other shapes counts against a limit
    gc.collect()
    gc.freeze()  # or every later collection walks through all modules again, a tenth of a second
    torch.cuda.empty_cache()


def measure(
    case: Case,
    provider: Provider,
    repeats: int = 5,
    budget_seconds: float = 10.0,
    warmup: int = 1,
    seed: int = 0,
    cold: bool = True,
) -> dict[str, Any]:
    """Measure in this process; see `measure_isolated`."""
    inputs = make_inputs(case, seed)
    clock = Clock(case.device, cold)
    on_gpu = case.device == "cuda"
    about = {"l2_cache": "cold" if cold else "warm"} if on_gpu else {}
    if inputs.mask is not None:
        about |= _about_mask(case, inputs, clock)
    # Lazy modules, thread pools and libraries are loaded before memory and time are looked at: on
    # CPUs with a small case, on GPUs, where other sizes may be other kernels, with the case itself.
    small = replace(
        case,
        length=min(case.length, 256),
        window=min(case.window, 64),
        query_length=min(case.query_length, 256),
    )
    if case.what == "decode":
        return _measure_steps(case, provider, inputs, repeats, warmup, cold) | about
    if on_gpu:
        _run(case, provider, inputs, clock)
        limits = (repeats, budget_seconds, warmup)
        return _measure_graphs(case, provider, inputs, *limits, clock) | about
    _run(small, provider, make_inputs(small), clock)
    others = OtherLoad()
    memory = PeakMemory(case.device)
    first = _run(case, provider, inputs, clock)
    peak = memory.peak()
    runs: list[dict[str, float]] = []
    begin = time.perf_counter()
    if first["total"] < _SLOW_SECONDS:
        for _ in range(warmup - 1):
            _run(case, provider, inputs, clock)
        while len(runs) < repeats and time.perf_counter() - begin < budget_seconds:
            runs.append(_run(case, provider, inputs, clock))
    timed = runs or [first]
    return {
        **_summary(timed),
        "warm": bool(runs),
        "timing": dict.fromkeys(first, "calls"),
        "peak_bytes": peak,
        "other_load": others.share(),
        **about,
    }


def _measure_steps(
    case: Case, provider: Provider, inputs: Inputs, repeats: int, warmup: int, cold: bool
) -> dict[str, Any]:
    """One more token, again and again, of several caches in turn: more than an L2 cache holds."""
    caches = [provider.select(inputs, case.window)]
    size = decoding.cache_bytes(caches[0])
    on_gpu = case.device == "cuda"
    if on_gpu and cold:
        needed = _ROTATION * torch.cuda.get_device_properties(0).L2_cache_size
        count = -(-needed // max(size, 1))
        caches += [provider.select(inputs, case.window) for _ in range(count - 1)]
    provider.attend(inputs, caches[0])
    others = OtherLoad()
    memory = PeakMemory(case.device)
    provider.attend(inputs, caches[0])
    peak = memory.peak()
    calls = [partial(provider.attend, inputs, cache) for cache in caches]
    about: dict[str, Any] = {"cache_bytes": size, "caches": len(caches), "peak_bytes": peak}
    if on_gpu:
        clock = Clock("cpu")
        host = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            host.append(clock.time(calls[0]))
        about["host_seconds"] = dict.fromkeys(("forward", "total"), statistics.median(host))
    seconds, timing = rotation_seconds(calls, case.device, repeats, warmup)
    if not on_gpu:
        about["other_load"] = others.share()
    runs = [{"forward": one, "total": one} for one in seconds]
    return {**_summary(runs), "warm": True, "timing": {"forward": timing}, **about}


def _run(case: Case, provider: Provider, inputs: Inputs, clock: Clock) -> dict[str, float]:
    """Seconds of one selection, forward and backward pass."""
    clock.start()
    mask = provider.select(inputs, case.window)
    clock.mark()
    names = ["selection"]
    if case.what != "selection":
        out = provider.attend(inputs, mask)
        clock.mark()
        names.append("forward")
    if case.what == "attention":
        torch.autograd.grad(out, provider.leaves(inputs), inputs.grad_out)
        clock.mark()
        names.append("backward")
    seconds = dict(zip(names, clock.seconds(), strict=True))
    return {**seconds, "total": sum(seconds.values())}


def _about_mask(case: Case, inputs: Inputs, clock: Clock) -> dict[str, Any]:
    """What making the bool mask costs, which all sides are given, and what it shows."""
    scores = inputs.scores if inputs.scores.dim() == 3 else inputs.scores[:, :, 0]
    seconds = clock.time(partial(make_mask, case, scores))
    visible = visible_pairs(inputs, case.window)
    spread = case.batch * case.heads // (visible.shape[0] * visible.shape[1])
    pairs = sum(int(rows.sum()) for rows in visible.split(1024, dim=2))
    return {"mask_seconds": seconds, "visible_pairs": pairs * spread}


def _measure_graphs(
    case: Case,
    provider: Provider,
    inputs: Inputs,
    repeats: int,
    budget_seconds: float,
    warmup: int,
    clock: Clock,
) -> dict[str, Any]:
    """Device time of each part: replays of CUDA graphs, the L2 cache as `clock` leaves it.

    What cannot be captured is timed as a call, with the time that the host makes the device wait.
    """

    def select() -> Any:
        return provider.select(inputs, case.window)

    def backward() -> Any:
        return torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=True)

    leaves = provider.leaves(inputs)
    memory = PeakMemory(case.device)
    once = _run(case, provider, inputs, clock)
    peak = memory.peak()
    mask: Any = select()
    builds = not provider.dense and mask is not inputs.mask
    if builds:
        mask = None
    host = _host_seconds(case, provider, inputs, repeats, budget_seconds / 4)

    def play(part: str, function: Callable[[], Any], captures: bool = True) -> Any:
        parts[part] = player(function, clock, calls_in_a_graph(once[part]), captures)
        return parts[part].result

    parts: dict[str, Player] = {}
    if builds:
        mask = play("selection", select)
    if case.what != "selection":
        out = play("forward", lambda: provider.attend(inputs, mask))
    if case.what == "attention":
        # A graph of the backward pass needs the forward pass of a graph, on the same stream.
        play("backward", backward, parts["forward"].timing == REPLAYS)

    runs: list[dict[str, float]] = []
    begin = time.perf_counter()
    for number in range(warmup + repeats):
        run = {part: played.seconds() for part, played in parts.items()}
        if number >= warmup:
            runs.append({**run, "total": sum(run.values())})
            if time.perf_counter() - begin > budget_seconds:
                break
    timing = {part: played.timing for part, played in parts.items()}
    about = {"timing": timing, "host_seconds": host, "peak_bytes": peak}
    return {**_summary(runs), "warm": True, **about}


def _host_seconds(
    case: Case, provider: Provider, inputs: Inputs, repeats: int, budget_seconds: float
) -> dict[str, float]:
    """How long each part keeps the host, the device idle at the begin: medians."""
    runs: list[dict[str, float]] = []
    begin = time.perf_counter()
    while not runs or (len(runs) < repeats and time.perf_counter() - begin < budget_seconds):
        torch.cuda.synchronize()
        runs.append(_run(case, provider, inputs, Clock("cpu")))
    return {part: statistics.median(run[part] for run in runs) for part in runs[0]}


def _summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    totals = [run["total"] for run in runs]
    return {
        "seconds": {part: statistics.median(run[part] for run in runs) for part in runs[0]},
        "spread": [min(totals), max(totals)],
        "repeats": len(runs),
    }


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Measure what a job asks for; without a number of repeats, see whether it is right."""
    job["case"]["providers"] = tuple(job["case"]["providers"])
    case, name = Case(**job["case"]), job["provider"]
    if case.device == "cuda":
        _forget()
    if "repeats" in job:
        return measure(case, PROVIDERS[name], job["repeats"], **job["options"])
    try:
        return {"errors": verify(case, name)}
    except WrongResult as error:
        return {"wrong": str(error)}


def main() -> None:
    """Do a job from standard input; the answer is the last line of standard output."""
    print(json.dumps(do(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
