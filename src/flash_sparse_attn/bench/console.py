"""What the command line programs share: progress bars, text and tables, whole files."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

_Job = TypeVar("_Job")


class Progress:
    """A progress bar on standard error: redrawn on a terminal, a line every quarter elsewhere.

    Args:
        label: What is being done.
        total: Number of steps.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, max(total, 1), 0
        self._begin = time.perf_counter()
        self._drawn = 0.0
        self._quarter = 0
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        self._draw("")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._terminal:
            print(file=sys.stderr, flush=True)

    def update(self, note: str = "", steps: int = 1) -> None:
        """Advance by `steps` and show `note`."""
        self.done += steps
        if self._terminal:
            if time.perf_counter() - self._drawn > 0.1 or self.done >= self.total:
                self._draw(note)
        elif self.done * 4 // self.total > self._quarter:
            self._quarter = self.done * 4 // self.total
            self._draw(note)

    def _draw(self, note: str) -> None:
        self._drawn = time.perf_counter()
        if not self._terminal and self.done == 0:
            return
        filled = 24 * self.done // self.total
        line = (
            f"  {self.label:<22} [{'#' * filled}{'.' * (24 - filled)}] "
            f"{self.done}/{self.total} {self._drawn - self._begin:5.1f} s  {note}"
        )
        print(f"\r{line}\033[K" if self._terminal else line, end="", file=sys.stderr, flush=True)
        if not self._terminal:
            print(file=sys.stderr, flush=True)


class Deadline:
    """A time after which nothing new is begun.

    Args:
        seconds: From now; ``None``: never.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self.note = ""

    def until(self, jobs: Sequence[_Job]) -> Iterator[_Job]:
        """The jobs for which there is time; of the others `note` tells afterwards."""
        for number, job in enumerate(jobs):
            if time.monotonic() >= self._end:
                self.note = (
                    f"--seconds {self._seconds:g}: no time was left for {len(jobs) - number} of "
                    f"{len(jobs)}\n"
                )
                return
            yield job

    @staticmethod
    def add_argument(parser: argparse.ArgumentParser) -> None:
        """The option that limits the time."""
        parser.add_argument(
            "--seconds",
            type=float,
            help="begin nothing new after this time, and say what was left out (default: all)",
        )


def paragraph(*sentences: str) -> str:
    """Sentences as indented text of at most 100 columns."""
    return textwrap.fill(" ".join(sentences), 100, initial_indent="  ", subsequent_indent="  ")


def first_lines(error: BaseException, count: int = 3) -> str:
    """The kind of an error and the begin of what it says, in one line."""
    lines = str(error).strip().splitlines()[:count]
    return " ".join([f"{type(error).__name__}:", *lines])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first aligned left, the others right."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  " + "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def format_seconds(seconds: float | None) -> str:
    """A duration with its unit, three digits."""
    if seconds is None:
        return "-"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1.0:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def format_bytes(count: float | None) -> str:
    """A size with its binary unit, three digits."""
    if count is None:
        return "-"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that no half-written file remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
