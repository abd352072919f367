"""How times are taken: marks on a clock, and calls that are recorded and played again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

REPLAYS = "graph replays"
_COLD_CACHE_FLOATS = 64 << 20
_CALLS = 12  # of a recording at least, so that starting it does not count


class Clock:
    """Seconds between marks: the processor's clock, or events on a GPU's stream.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        cold: Whether `start` empties a GPU's L2 cache; that of a processor is left alone.
    """

    def __init__(self, device: str, cold: bool = True) -> None:
        self._on_gpu = device == "cuda"
        self._marks: list[Any] = []
        empties = self._on_gpu and cold
        self._cold = torch.empty(_COLD_CACHE_FLOATS, device=device) if empties else None

    def start(self) -> None:
        """Forget earlier marks, and mark the begin."""
        self._marks.clear()
        if self._cold is not None:
            self._cold.zero_()
        self.mark()

    def mark(self) -> None:
        """Mark the end of a part."""
        if self._on_gpu:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """The time of every part; waits for a GPU."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._on_gpu:
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        return [end - begin for begin, end in pairs]


def player(
    function: Callable[[], Any], captures: bool = True
) -> tuple[Callable[[], Any], Any, str]:
    """How to play `function` again, its result, and how that is timed."""
    if captures:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = function()
            return graph.replay, result, REPLAYS
        except RuntimeError:  # it copies to the host, or allocates in a way graphs cannot
            torch.cuda.synchronize()
    return function, function(), "calls"


def rotation_seconds(
    calls: Sequence[Callable[[], Any]], device: str, repeats: int, warmup: int = 5
) -> tuple[list[float], str]:
    """Seconds of one of the calls, by repetition, and how they are timed.

    On a GPU one graph holds all calls in turn, again and again until they are many. Where each
    reads memory of its own, more than the L2 cache holds together, none finds it there.
    """
    order = list(calls) * -(-_CALLS // len(calls))
    if device == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)

    def play_all() -> None:
        for call in order:
            call()

    play, _, timing = player(play_all, device == "cuda")
    clock = Clock(device, cold=False)
    seconds = []
    for _ in range(warmup + repeats):
        clock.start()
        play()
        clock.mark()
        seconds.append(clock.seconds()[0] / len(order))
    return seconds[warmup:], timing
