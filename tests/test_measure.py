"""The script that measures everything on GPUs: its jobs exist, and none outlives its time."""

from __future__ import annotations

import fnmatch
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from flash_sparse_attn.bench import equivalence, performance
from flash_sparse_attn.bench.cases import CASES
from flash_sparse_attn.bench.providers import PROVIDERS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("measure", ROOT / "scripts" / "measure.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "measure", module)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_jobs_name_what_exists(measure):
    for job in measure.JOBS:
        if not job.arguments[0].startswith("-"):
            assert (ROOT / job.arguments[0]).is_file()
        for option, value in zip(job.arguments, job.arguments[1:], strict=False):
            if option == "--case":
                assert fnmatch.filter(CASES, value), value
            if option == "--provider":
                assert value in PROVIDERS
            if option == "--test-type":
                assert value in performance.TEST_TYPES or value in equivalence.TEST_TYPES
        assert job.seconds > 0 and job.phase in ("beside", "alone", "together")
        assert not job.rows or job.rows.endswith(".jsonl")
    assert len({job.name for job in measure.JOBS}) == len(measure.JOBS)


def measured(measure) -> set[tuple[str, str]]:
    """The cases and providers of all jobs of `bench`."""
    found = set()
    for job in measure.JOBS:
        pairs = list(zip(job.arguments, job.arguments[1:], strict=False))
        names = [value for option, value in pairs if option == "--case"]
        sides = [value for option, value in pairs if option == "--provider"]
        found |= {
            (case, side) for name in names for case in fnmatch.filter(CASES, name) for side in sides
        }
    return found


def test_every_figure_has_its_cases(measure):
    found = measured(measure)
    wanted = {(case, "ours") for case in CASES if case.startswith("gpu-")}
    assert wanted <= found
    for case in ("gpu-b", "gpu-c", "gpu-2048", "gpu-window-32", "gpu-decode-1m"):
        assert (case, "sdpa-causal") in found
    # What takes minutes is nobody's but ours.
    assert not {(f"gpu-{name}", "sdpa-causal") for name in ("262144", "524288", "1m")} & found
    files = {job.rows for job in measure.JOBS} - {""}
    assert files == {"h200.jsonl", "predecessors.jsonl", "equivalence.jsonl", "quality.jsonl"}


def test_what_matters_and_fits_is_run_longest_first(measure):
    a, b, c, d = (
        measure.Job(name, [], seconds)
        for name, seconds in (("a", 10), ("b", 30), ("c", 100), ("d", 20))
    )
    assert measure.in_order([a, b, c, d], 30, 2) == [b, d, a, c]
    assert measure.in_order([a, b, c, d], 20, 2) == [d, a, b, c]
    assert measure.in_order([a, b, c, d], 1000, 1) == [c, b, d, a]


def test_phases_share_the_time(measure, tmp_path, monkeypatch):
    jobs = [
        measure.Job("one", [], 60),
        measure.Job("host", [], 10, "alone"),
        measure.Job("slow host", [], 500, "alone"),
        measure.Job("ranks", [], 15, "together"),
    ]
    seen = []

    class Runner(measure.Runner):
        def run(self, job, gpus, log, deadline):
            seen.append((job.name, gpus, log.name, round(deadline - self.begin)))

    monkeypatch.setattr(measure, "JOBS", jobs)
    monkeypatch.setattr(measure, "Runner", Runner)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for count in (2, 1):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert measure.main(["--out", str(tmp_path), "--seconds", "300"]) == 0
    first, alone = seen[0], [("host", [0], "alone.log", 285), ("slow host", [0], "alone.log", 285)]
    assert first[0] == "one" and first[3] == 300 - 60 - 15
    assert seen[1:4] == [*alone, ("ranks", [0, 1], "together.log", 300)]
    assert [(name, deadline) for name, _, _, deadline in seen[4:]] == [
        ("one", 240),
        ("host", 300),
        ("slow host", 300),
    ]


def test_jobs_share_the_gpus_and_end_in_time(measure, tmp_path):
    say = "import os; print('on', os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [measure.Job(f"job {i}", ["-c", say], 1) for i in range(3)]
    jobs.append(measure.Job("slow", ["-c", "import time; time.sleep(100)"], 1))
    jobs += [measure.Job(f"late {i}", ["-c", say], 1) for i in range(20)]
    runner = measure.Runner(tmp_path, 2)
    begin = time.monotonic()
    runner.beside([*jobs[:3], *jobs[4:], jobs[3]], begin + 5)
    assert time.monotonic() - begin < 30
    logs = [(tmp_path / f"gpu-{gpu}.log").read_text() for gpu in range(2)]
    both = "".join(logs)
    assert all(f"on {gpu}\n" in log for gpu, log in enumerate(logs))
    assert "== slow: stopped" in both or "== slow: not run" in both
    assert all(f"== {job.name}" in both for job in jobs)


def test_rows_are_collected_by_file(measure, tmp_path, monkeypatch):
    write = "import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text(sys.argv[1] + chr(10))"
    jobs = [
        measure.Job(name, ["-c", write, name], 1, rows=rows)
        for name, rows in (("a a", "x.jsonl"), ("b", "y.jsonl"), ("c", "x.jsonl"))
    ]
    monkeypatch.setattr(measure, "JOBS", [*jobs, measure.Job("none", ["-c", "pass"], 1)])
    runner = measure.Runner(tmp_path, 1)
    runner.beside(measure.JOBS, time.monotonic() + 60)
    runner.collect()
    assert (tmp_path / "x.jsonl").read_text() == "a a\nc\n"
    assert (tmp_path / "y.jsonl").read_text() == "b\n"
    assert not list(tmp_path.glob("rows-*"))


def test_unknown_jobs_are_refused(measure, tmp_path, capsys):
    assert measure.main(["--out", str(tmp_path), "nothing"]) == 2
    assert "unknown are ['nothing']" in capsys.readouterr().err
