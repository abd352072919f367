"""Time and peak memory of one provider on one case, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from . import predecessors
from .cases import Case, Inputs, make_inputs, make_mask
from .providers import PROVIDERS, Provider, WrongResult, verify, visible_pairs

_COLD_CACHE_FLOATS = 64 << 20
_SLOW_SECONDS = 20.0
_BUSY = 0.1
_REPLAYS = "graph replays"


def measure_isolated(
    case: Case,
    provider: str,
    repeats: int = 5,
    budget_seconds: float = 10.0,
    warmup: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure in a fresh process, so that peak memory is this provider's alone.

    Args:
        case: The problem.
        provider: Name in `PROVIDERS`.
        repeats: Measured repetitions at most.
        budget_seconds: No new repetition is started after this time.
        warmup: Runs before the measured ones, at least 1.
        seed: Of the inputs.

    Returns:
        ``seconds`` (medians of selection, forward, backward and total, as far as the case and the
        provider have them), ``spread`` (fastest and slowest total), ``repeats``, ``warm`` (False if
        the only run was the first one), ``timing`` (how each part was timed), ``peak_bytes`` above
        the inputs; where the mask is an input, ``mask_seconds``, which are nobody's and in no
        total, and ``visible_pairs``; on CPUs ``other_load``, the part of the processors that other
        processes used meanwhile (``None`` where the system does not tell); of predecessors
        ``versions`` in their environment; on GPUs ``host_seconds``, of calls that are not replayed.

    Raises:
        RuntimeError: The process failed; the message holds the end of its error output.
    """
    options = {"budget_seconds": budget_seconds, "warmup": warmup, "seed": seed}
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
    """The answer of `do` in a fresh process, which for predecessors is one of their environment."""
    environment = dict(os.environ)
    if PROVIDERS[job["provider"]].module:
        command = predecessors.command()
    else:
        command = [sys.executable, "-m", "flash_sparse_attn.bench.measure"]
        # The process finds this package even if only `sys.path` of this one leads to it.
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, env=environment
    )
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-3:])
        what = f"{job['provider']} on {job['case']['name']}"
        raise RuntimeError(f"{what} ended with status {done.returncode}: {tail}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    case: Case,
    provider: Provider,
    repeats: int,
    budget_seconds: float = 10.0,
    warmup: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure in this process; see `measure_isolated`."""
    clock = _Clock(case.device)
    inputs = make_inputs(case, seed)
    about_mask = {} if inputs.mask is None else _about_mask(case, inputs, clock)
    # Lazy modules, thread pools and libraries are loaded before memory and time are looked at: on
    # CPUs with a small case, on GPUs, where other sizes may be other kernels, with the case itself.
    small = replace(
        case,
        length=min(case.length, 256),
        window=min(case.window, 64),
        query_length=min(case.query_length, 256),
    )
    if case.device == "cuda":
        _run(case, provider, inputs, clock)
        return _measure_graphs(case, provider, inputs, repeats, warmup) | about_mask
    _run(small, provider, make_inputs(small), clock)
    others = _OtherLoad()
    memory = _PeakMemory(case.device)
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
        **about_mask,
    }


def _run(case: Case, provider: Provider, inputs: Inputs, clock: _Clock) -> dict[str, float]:
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


def _about_mask(case: Case, inputs: Inputs, clock: _Clock) -> dict[str, Any]:
    """What making the bool mask costs, which all sides are given, and what it shows."""
    clock.start()
    make_mask(case, inputs.scores if inputs.scores.dim() == 3 else inputs.scores[:, :, 0])
    clock.mark()
    visible = visible_pairs(inputs, case.window)
    spread = case.batch * case.heads // (visible.shape[0] * visible.shape[1])
    pairs = sum(int(rows.sum()) for rows in visible.split(1024, dim=2))
    return {"mask_seconds": clock.seconds()[0], "visible_pairs": pairs * spread}


def _measure_graphs(
    case: Case, provider: Provider, inputs: Inputs, repeats: int, warmup: int
) -> dict[str, Any]:
    """Device time of each part: replays of CUDA graphs, the L2 cache cold before each.

    What cannot be captured is timed as a call, with the time that the host makes the device wait.
    """

    def select() -> Any:
        return provider.select(inputs, case.window)

    def backward() -> Any:
        return torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=True)

    leaves = provider.leaves(inputs)
    memory = _PeakMemory(case.device)
    mask: Any = select()
    builds = not provider.dense and mask is not inputs.mask
    out: Any = None if case.what == "selection" else provider.attend(inputs, mask)
    if case.what == "attention":
        torch.autograd.grad(out, leaves, inputs.grad_out)
    peak = memory.peak()
    out = None
    if builds:
        mask = None
    host = _host_seconds(case, provider, inputs, repeats)

    parts: dict[str, Callable[[], Any]] = {}
    timing = {}
    if builds:
        parts["selection"], mask, timing["selection"] = _player(select)
    if case.what != "selection":
        parts["forward"], out, timing["forward"] = _player(lambda: provider.attend(inputs, mask))
    if case.what == "attention":
        # A graph of the backward pass needs the forward pass of a graph, on the same stream.
        captures = timing["forward"] == _REPLAYS
        parts["backward"], _, timing["backward"] = _player(backward, captures)

    cold = torch.empty(_COLD_CACHE_FLOATS, device=case.device)
    runs: list[dict[str, float]] = []
    for number in range(warmup + repeats):
        run = {}
        for name, play in parts.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cold.zero_()
            begin.record()
            play()
            end.record()
            torch.cuda.synchronize()
            run[name] = begin.elapsed_time(end) / 1e3
        if number >= warmup:
            runs.append({**run, "total": sum(run.values())})
    about = {"timing": timing, "host_seconds": host, "peak_bytes": peak}
    return {**_summary(runs), "warm": True, **about}


def _host_seconds(case: Case, provider: Provider, inputs: Inputs, repeats: int) -> dict[str, float]:
    """How long each part keeps the host, the device idle at the begin: medians."""
    runs = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        clock = _Clock("cpu")
        runs.append(_run(case, provider, inputs, clock))
    return {part: statistics.median(run[part] for run in runs) for part in runs[0]}


def _player(
    function: Callable[[], Any], captures: bool = True
) -> tuple[Callable[[], Any], Any, str]:
    """How to play `function` again, its result, and how that is timed."""
    if captures:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = function()
            return graph.replay, result, _REPLAYS
        except RuntimeError:  # it copies to the host, or allocates in a way graphs cannot
            torch.cuda.synchronize()
    return function, function(), "calls"


def _summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    totals = [run["total"] for run in runs]
    return {
        "seconds": {part: statistics.median(run[part] for run in runs) for part in runs[0]},
        "spread": [min(totals), max(totals)],
        "repeats": len(runs),
    }


class _Clock:
    """Seconds between marks: the processor's clock, or events on a GPU's stream, its cache cold."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self._marks: list[Any] = []
        self._cold = torch.empty(_COLD_CACHE_FLOATS if self._on_gpu else 0, device=device)

    def start(self) -> None:
        """Forget earlier marks, empty a GPU's cache, and mark the begin."""
        self._marks.clear()
        self._cold.zero_()
        self.mark()

    def mark(self) -> None:
        if self._on_gpu:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._on_gpu:
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        return [end - begin for begin, end in pairs]


class _PeakMemory:
    """Most memory in use since creation, above what was in use then."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._base: int | None = torch.cuda.memory_allocated()
            return
        # Linux: forget the peak of the start-up, which may be above what is in use now.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._base = _peak_resident_bytes()

    def peak(self) -> int | None:
        if self._on_gpu:
            return torch.cuda.max_memory_allocated() - (self._base or 0)
        now = _peak_resident_bytes()
        return None if now is None or self._base is None else now - self._base


class _OtherLoad:
    """How busy other processes keep the processors: above a few percent, times are too long."""

    def __init__(self) -> None:
        self._begin = self._now()

    def share(self) -> float | None:
        """Between 0 and 1, since creation."""
        begin, now = self._begin, self._now()
        if begin is None or now is None:
            return None
        wall, own, busy = (after - before for before, after in zip(begin, now, strict=True))
        available = wall * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (busy - own) / available))

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: clock, this process on all processors, all processes (and other machines)."""
        try:
            user, nice, system, _, _, *interrupts = (
                int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
            )
        except (OSError, ValueError):
            return None
        ticks = user + nice + system + sum(interrupts)
        return time.perf_counter(), time.process_time(), ticks / os.sysconf("SC_CLK_TCK")


def busy_note(measured: Iterable[dict[str, Any]]) -> str | None:
    """A warning, if other processes used the machine during these measurements."""
    most = max((one.get("other_load") or 0.0 for one in measured), default=0.0)
    if most < _BUSY:
        return None
    return (
        f"Busy machine: other processes used up to {most:.0%} of the processors during a "
        "measurement; its times are too long. Repeat when it is quiet."
    )


def _peak_resident_bytes() -> int | None:
    try:
        # Not getrusage: its peak is never reset and starts with that of the parent process.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Measure what a job asks for; without a number of repeats, see whether it is right."""
    job["case"]["providers"] = tuple(job["case"]["providers"])
    case, name = Case(**job["case"]), job["provider"]
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
