"""Groups of processes for tests of distributed code: gloo on CPUs, no ports."""

from __future__ import annotations

import datetime
import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60


class Processes:
    """`size` processes with process groups among them, which run functions on demand.

    Processes take seconds to start: the first ``n`` of them, for any ``n``, have a group as well.

    Args:
        size: Number of processes.
        folder: Where they find each other.
    """

    def __init__(self, size: int, folder: Path):
        context = multiprocessing.get_context("spawn")
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes, which share the cores
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (rank, size, str(folder / "meeting"), there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads

    def run(self, size: int, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """``function(group, ...)`` on the first `size` ranks, in their group; what they return.

        Raises:
            RuntimeError: A process raised; all tracebacks.
        """
        outcomes = self.outcomes(size, function, *args, **options)
        failures = [text for ok, text in outcomes if not ok]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [result for _, result in outcomes]

    def outcomes(
        self, size: int, function: Callable[..., Any], *args: Any, **options: Any
    ) -> list[tuple[bool, Any]]:
        """As `run`, but ``(True, result)`` or ``(False, traceback)`` for every rank."""
        pipes, outcomes = self.pipes[:size], []
        for pipe in pipes:
            pipe.send_bytes(_dump((size, function, args, options)))
        for pipe in pipes:
            try:
                ready = pipe.poll(SECONDS)
                outcomes.append(_load(pipe.recv_bytes()) if ready else (False, "no answer"))
            except (EOFError, ConnectionResetError):
                outcomes.append((False, "the process is gone"))
        return outcomes

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()


def _serve(rank: int, size: int, meeting: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    groups = {count: dist.new_group(range(count)) for count in range(1, size + 1)}
    while True:
        count, function, args, options = _load(pipe.recv_bytes())
        try:
            outcome = (True, function(groups[count], *args, **options))
        except Exception:
            outcome = (False, f"rank {rank}: {traceback.format_exc()}")
        pipe.send_bytes(_dump(outcome))


def _dump(thing: Any) -> bytes:
    """Bytes, because tensors in pipes would travel as handles of shared memory."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def _load(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
