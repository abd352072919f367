"""The script that measures everything on GPUs: its jobs exist, and none outlives its time."""

from __future__ import annotations

import fnmatch
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from flash_sparse_attn import info
from flash_sparse_attn.bench import equivalence, performance, store
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


def test_the_rows_of_all_tables_have_a_job(measure):
    """The tables of a GPU are one command without options, as a reader would give it."""
    tables = next(job for job in measure.JOBS if job.name == "tables")
    assert tables.arguments == ["-m", "flash_sparse_attn", "bench", "run"]
    assert tables.rows == "h200.jsonl" and tables.seconds <= 600
    files = {job.rows for job in measure.JOBS} - {""}
    assert files == {"h200.jsonl", "predecessors.jsonl", "equivalence.jsonl", "quality.jsonl"}


@pytest.mark.parametrize("given", ["0123456789abcdef0123456789abcdef01234567", "main", "0123"])
def test_the_commit_of_copied_sources_is_that_of_all_rows(measure, given, tmp_path, monkeypatch):
    monkeypatch.setenv(info.COMMIT, "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["--out", str(tmp_path), "--commit", given]
    if len(given) == 40:
        assert measure.main(arguments) == 2  # no GPU, but the commit was taken
        assert store.run_facts("cpu")["commit"] == given[:12]
        code = "from flash_sparse_attn import info; print(info.commit())"
        measure.Runner(tmp_path, 1).beside(
            [measure.Job("says", ["-c", code], 1)], time.monotonic() + 60
        )
        assert f"\n{given[:12]}\n" in (tmp_path / "gpu-0.log").read_text()
    else:
        with pytest.raises(ValueError, match=f"expected a commit, 12 to 40 .* got '{given}'"):
            measure.main(arguments)


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
