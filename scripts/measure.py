"""Run the tests, programs and benchmarks of GPUs on all GPUs of this machine, and collect the rows.

    python scripts/measure.py --out FOLDER [--seconds S] [JOB ...]

Three phases: jobs side by side, one on each GPU, for at most ``--seconds``; jobs whose figures
depend on the host, alone, half as long; and what needs several GPUs. FOLDER gets a log for each
GPU, those of the last two phases, and ``rows.jsonl``, to be appended to a file in ``results/``.
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
BENCH = ["-m", "flash_sparse_attn", "bench", "run", "--repeats", "11"]
RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "gpu"]
MASKS = ["main", "keys", "small", "patterns"]
OURS, DENSE, FLEX = ("--provider", "ours"), ("--provider", "sdpa-causal"), ("--provider", "flex")


def cases(*patterns: str) -> list[str]:
    return [part for pattern in patterns for part in ("--case", pattern)]


@dataclass(frozen=True)
class Job:
    """A program: its name, what Python is to run, and when."""

    name: str
    arguments: list[str]
    phase: str = "beside"


# Those that take longest first.
JOBS = [
    Job("tests", ["scripts/test.py", "--gpu", "--heavy", "-k", "not host_time", "-v"]),
    Job("flex", [*BENCH, *cases("gpu-2048", "gpu-4096", "gpu-8192", "gpu-16384"), *OURS, *FLEX]),
    Job("masks", ["tests/gpu/time_masks.py"]),
    Job("decoding", ["tests/gpu/time_decode.py"]),
    Job("masks by kernel", ["tests/gpu/time_masks.py", *MASKS, "--ours", "--profile"]),
    Job("dense", [*BENCH, *cases("gpu-c", "gpu-2048", "gpu-4096", "gpu-8192"), *OURS, *DENSE]),
    Job("heart", [*BENCH, *cases("gpu-a", "gpu-b", "gpu-16384"), *OURS, *DENSE]),
    Job("million", [*BENCH, *cases("gpu-1m"), *OURS]),
    Job("patterns", [*BENCH, *cases("gpu-b-*"), *OURS]),
    Job("shared", ["tests/gpu/time_attention.py", "A", "B", "shared"]),
    Job("given masks", [*BENCH, *cases("gpu-mask-*"), *OURS, "--provider", "sdpa-additive"]),
    Job("flex at length", [*BENCH, *cases("gpu-a", "gpu-b"), *OURS, *FLEX]),
    Job("host time", ["scripts/test.py", "--gpu", "--heavy", "-k", "host_time", "-s"], "alone"),
    Job("compilation", ["tests/gpu/time_compilation.py"], "alone"),
    Job("Transformers", ["tests/gpu/time_transformers.py"], "alone"),
    Job("demo", ["-m", "flash_sparse_attn", "demo", "--quick"], "alone"),
    Job("ranks", [*RANKS, "tests/gpu/time_distributed.py"], "together"),
    Job("tests of ranks", ["scripts/test.py", "--gpu", "-k", "several_gpus", "-v"], "together"),
]


class Runner:
    """Runs jobs until a deadline, each with a section of a log."""

    def __init__(self, out: Path, count: int) -> None:
        self.out, self.count = out, count
        self.begin = time.monotonic()

    def run(self, job: Job, gpus: list[int], log: Path, deadline: float) -> None:
        """Run a job on these GPUs; it is stopped at the deadline."""
        left = deadline - time.monotonic()
        command = [sys.executable, *job.arguments]
        if "bench" in command:
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
        """Put the rows of all jobs into one file."""
        parts = sorted(self.out.glob("rows-*.jsonl"))
        rows = "".join(part.read_text(encoding="utf-8") for part in parts)
        (self.out / "rows.jsonl").write_text(rows, encoding="utf-8")
        for part in parts:
            part.unlink()

    def _rows(self, job: Job) -> Path:
        return self.out / f"rows-{job.name.replace(' ', '-')}.jsonl"


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

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=", ".join(job.name for job in JOBS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1800.0)
    options = parser.parse_args(arguments)
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
    runner.beside(phases["beside"], time.monotonic() + options.seconds)
    deadline = time.monotonic() + options.seconds / 2
    for job in phases["alone"]:
        runner.run(job, [0], options.out / "alone.log", deadline)
    deadline = time.monotonic() + options.seconds / 2
    for job in phases["together"] if runner.count > 1 else []:
        runner.run(job, list(range(runner.count)), options.out / "together.log", deadline)
    runner.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
