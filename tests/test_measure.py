"""The script that measures everything on GPUs: its jobs exist, and none outlives its time."""

from __future__ import annotations

import fnmatch
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

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
    assert len({job.name for job in measure.JOBS}) == len(measure.JOBS)


def test_jobs_share_the_gpus_and_end_in_time(measure, tmp_path):
    say = "import os; print('on', os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [measure.Job(f"job {i}", ["-c", say]) for i in range(3)]
    jobs.append(measure.Job("slow", ["-c", "import time; time.sleep(100)"]))
    jobs += [measure.Job(f"late {i}", ["-c", say]) for i in range(20)]
    runner = measure.Runner(tmp_path, 2)
    begin = time.monotonic()
    runner.beside([*jobs[:3], *jobs[4:], jobs[3]], begin + 5)
    assert time.monotonic() - begin < 30
    logs = [(tmp_path / f"gpu-{gpu}.log").read_text() for gpu in range(2)]
    both = "".join(logs)
    assert all(f"on {gpu}\n" in log for gpu, log in enumerate(logs))
    assert "== slow: stopped" in both or "== slow: not run" in both
    assert all(f"== {job.name}" in both for job in jobs)


def test_rows_of_all_jobs_are_collected(measure, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"rows-{name}.jsonl").write_text(f'{{"case": "{name}"}}\n')
    measure.Runner(tmp_path, 1).collect()
    assert (tmp_path / "rows.jsonl").read_text() == '{"case": "a"}\n{"case": "b"}\n'
    assert not list(tmp_path.glob("rows-*"))


def test_unknown_jobs_are_refused(measure, tmp_path, capsys):
    assert measure.main(["--out", str(tmp_path), "nothing"]) == 2
    assert "unknown are ['nothing']" in capsys.readouterr().err
