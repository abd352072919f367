"""What the machine tells during a measurement: its peak memory, and how busy others keep it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

_BUSY = 0.1


class PeakMemory:
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


class OtherLoad:
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
