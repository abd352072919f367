"""Run the tests, programs and benchmarks of GPUs on all GPUs of this machine, and collect the rows.

    python scripts/measure.py --out FOLDER [--seconds S] [--commit COMMIT] [JOB ...]

Three phases: jobs side by side, one on each GPU; jobs whose figures depend on the host, alone; and
what needs several GPUs. The last two get what they are expected to take, at most a fifth of
``--seconds`` each, and the first the rest. What the first has time for is run longest first, and
what does not fit afterwards, as far as it gets: jobs stand in the order of their importance.

FOLDER gets a log for each GPU, those of the last two phases, and files of rows, each to be appended
to the file of its name in ``results/``. Where these sources were copied without their history, rows
get their commit from ``--commit``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "gpu"]
ALONE = ["-k", "host_time", "-s", "-n", "0"]
MASKS = ["main", "keys", "small", "patterns"]
GRID = ["--test-type", "sdpa-vs-ours", "--seconds", "320"]
THEIRS = ["--test-type", "predecessors", "--seconds", "320"]
SAME = ["--test-type", "ours", "--seconds", "150"]
PAIRS = ["8", "32", "128", "256", "320", "384", "448"]
LESSONS = ["--curriculum", *PAIRS, "--lesson-steps", "600", "50"]
RECALL = ["recall", "--rate-factor", "10", *LESSONS, "--minutes", "5.5"]
TEXT = ["text", "--seed", "0", "1", "--minutes", "3.6"]


@dataclass(frozen=True)
class Job:
    """A program.

    Attributes:
        name: What it is chosen by.
        arguments: What Python is to run.
        seconds: About how long it takes on an H200, starting and compiling included.
        phase: When.
        rows: The file in ``results/`` that its rows are for.
    """

    name: str
    arguments: list[str]
    seconds: float
    phase: str = "beside"
    rows: str = ""


def script(name: str, seconds: float, program: str, *arguments: str, rows: str = "") -> Job:
    return Job(name, [f"benchmarks/{program}.py", *arguments], seconds, rows=rows)


# Those that matter most first.
JOBS = [
    Job("tests", ["scripts/test.py", "--gpu", "--heavy", "-k", "not host_time", "-v"], 345),
    # What the tables show, and nothing else.
    Job("tables", ["-m", "flash_sparse_attn", "bench", "run"], 200, rows="h200.jsonl"),
    script("forward grid", 80, "forward_performance", *GRID, rows="predecessors.jsonl"),
    script("backward grid", 75, "backward_performance", *GRID, rows="predecessors.jsonl"),
    script("recall", 345, "quality", *RECALL, rows="quality.jsonl"),
    script("text", 240, "quality", *TEXT, rows="quality.jsonl"),
    script("forward equivalence", 25, "forward_equivalence", *SAME, rows="equivalence.jsonl"),
    script("backward equivalence", 35, "backward_equivalence", *SAME, rows="equivalence.jsonl"),
    script("gradient equivalence", 15, "grad_equivalence", rows="equivalence.jsonl"),
    # Nothing without an environment of theirs.
    script("their forward", 320, "forward_performance", *THEIRS, rows="predecessors.jsonl"),
    script("their backward", 320, "backward_performance", *THEIRS, rows="predecessors.jsonl"),
    Job("decoding", ["tests/gpu/time_decode.py"], 30),
    Job("masks", ["tests/gpu/time_masks.py"], 85),
    Job("masks by kernel", ["tests/gpu/time_masks.py", *MASKS, "--ours", "--profile"], 30),
    Job("shared", ["tests/gpu/time_attention.py", "A", "B", "shared"], 30),
    Job("host time", ["scripts/test.py", "--gpu", "--heavy", *ALONE], 20, "alone"),
    Job("compilation", ["tests/gpu/time_compilation.py"], 35, "alone"),
    Job("Transformers", ["tests/gpu/time_transformers.py"], 115, "alone"),
    Job("demo", ["-m", "flash_sparse_attn", "demo", "--quick"], 40, "alone"),
    Job("ranks", [*RANKS, "tests/gpu/time_distributed.py"], 60, "together"),
    Job("tests of ranks", ["scripts/test.py", "--gpu", "-k", "several_gpus", "-v"], 60, "together"),
]


def in_order(jobs: list[Job], seconds: float, gpus: int) -> list[Job]:
    """The jobs for which there is time, longest first, then the others.

    Args:
        jobs: Those that matter most first.
        seconds: Of the phase.
        gpus: That work at the same time.
    """
    fits, rest, left = [], [], seconds * gpus
    for job in jobs:
        if job.seconds <= min(left, seconds):
            fits.append(job)
            left -= job.seconds
        else:
            rest.append(job)
    return [*sorted(fits, key=lambda job: -job.seconds), *rest]


class Runner:
    """Runs jobs until a deadline, each with a section of a log."""

    def __init__(self, out: Path, count: int) -> None:
        self.out, self.count = out, count
        self.begin = time.monotonic()

    def run(self, job: Job, gpus: list[int], log: Path, deadline: float) -> None:
        """Run a job on these GPUs; it is stopped at the deadline."""
        left = deadline - time.monotonic()
        command = [sys.executable, *job.arguments]
        if job.rows:
            command += ["--out", str(self._rows(job))]
        paths = [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
        }
        with log.open("a", encoding="utf-8") as file:
            if left <= 0:
                file.write(f"== {job.name}: not run, no time is left\n")
                return
            file.write(f"== {job.name}, at {time.monotonic() - self.begin:.0f} s\n")
            file.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            try:
                process.wait(left)
            except subprocess.TimeoutExpired:
                _stop(process)
                file.write(f"== {job.name}: stopped, no time is left\n")
            file.write(f"== {job.name}: status {process.returncode}\n")

    def beside(self, jobs: list[Job], deadline: float) -> None:
        """Run jobs side by side, the next one on the GPU that is free first."""
        waiting = deque(jobs)

        def serve(gpu: int) -> None:
            while waiting:
                self.run(waiting.popleft(), [gpu], self.out / f"gpu-{gpu}.log", deadline)

        threads = [threading.Thread(target=serve, args=(gpu,)) for gpu in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def collect(self) -> None:
        """Put the rows of all jobs into the files that they are for."""
        for name in {job.rows for job in JOBS if job.rows}:
            parts = [self._rows(job) for job in JOBS if job.rows == name]
            parts = [part for part in parts if part.is_file()]
            rows = "".join(part.read_text(encoding="utf-8") for part in parts)
            if rows:
                (self.out / name).write_text(rows, encoding="utf-8")
            for part in parts:
                part.unlink()

    def _rows(self, job: Job) -> Path:
        return self.out / f"rows-of-{job.name.replace(' ', '-')}.jsonl"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a job and what it started, then kill what is left."""
    for number, patience in ((signal.SIGINT, 5), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def main(arguments: list[str]) -> int:
    import torch

    from flash_sparse_attn import info

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=", ".join(job.name for job in JOBS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=1800.0, help="for everything (default 1800)"
    )
    parser.add_argument("--commit", help="of these sources, in full (default: what git says)")
    options = parser.parse_args(arguments)
    if options.commit:
        os.environ[info.COMMIT] = options.commit
        info.commit()  # or an error now, and not in every job
    unknown = set(options.jobs) - {job.name for job in JOBS}
    if unknown or not torch.cuda.is_available():
        reason = f"JOB: unknown are {sorted(unknown)}" if unknown else "torch sees no GPU"
        print(f"{reason}; nothing was run", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [job for job in JOBS if job.name in (options.jobs or [job.name])]
    runner = Runner(options.out, torch.cuda.device_count())
    phases = {
        name: [job for job in chosen if job.phase == name]
        for name in ("beside", "alone", "together")
    }
    if runner.count == 1:
        phases["together"] = []
    end = runner.begin + options.seconds
    later = {
        name: min(sum(job.seconds for job in phases[name]), options.seconds / 5)
        for name in ("alone", "together")
    }
    first = options.seconds - sum(later.values())
    runner.beside(in_order(phases["beside"], first, runner.count), runner.begin + first)
    for job in phases["alone"]:
        runner.run(job, [0], options.out / "alone.log", end - later["together"])
    for job in phases["together"]:
        runner.run(job, list(range(runner.count)), options.out / "together.log", end)
    runner.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
