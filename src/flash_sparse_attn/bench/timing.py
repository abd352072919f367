"""How times are taken: marks on a clock, and calls that are recorded and played again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

REPLAYS = "graph replays"
_COLD_CACHE_FLOATS = 64 << 20
_CALLS = 12  # of a recording of short calls, so that starting it does not count
_SHORT_SECONDS = 2e-3  # starting a recording takes microseconds


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
        self.empty_cache()
        self.mark()

    @property
    def empties(self) -> bool:
        """Whether `empty_cache` does anything."""
        return self._cold is not None

    def empty_cache(self) -> None:
        """Leave nothing that a call could read in a GPU's L2 cache."""
        if self._cold is not None:
            self._cold.zero_()

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

    def time(self, function: Callable[[], Any]) -> float:
        """Seconds of a call."""
        self.start()
        function()
        self.mark()
        return self.seconds()[0]


@dataclass(frozen=True)
class Player:
    """A call that can be played again.

    Attributes:
        result: Of the call; playing a graph writes to the same memory.
        timing: How it is timed: `REPLAYS`, or ``"calls"`` with the time that the host takes.
        seconds: Plays it; returns its time.
    """

    result: Any
    timing: str
    seconds: Callable[[], float]


def player(
    function: Callable[[], Any], clock: Clock, calls: int = 1, captures: bool = True
) -> Player:
    """How to play `function` again, if possible as a graph.

    The time of one call is that of a graph of several, before each of which the cache is emptied,
    less that of a graph which only empties it as often: without starting a graph, which would be
    most of a short call, and with what lies between the kernels.

    Args:
        function: Without arguments, the same whenever it is called.
        clock: Tells the time, and whether the L2 cache is emptied before each call.
        calls: In one graph; see `calls_in_a_graph`.
        captures: Whether to try a graph.
    """
    if captures:
        try:
            replay, result = _recorded(function, clock, calls)
        except RuntimeError:  # it copies to the host, or allocates in a way graphs cannot
            torch.cuda.synchronize()
        else:
            empty = _recorded(lambda: None, clock, calls)[0] if clock.empties else None

            def seconds() -> float:
                spent = clock.time(replay)
                return (spent - clock.time(empty) if empty else spent) / calls

            return Player(result, REPLAYS, seconds)
    return Player(function(), "calls", lambda: clock.time(function))


def _recorded(
    function: Callable[[], Any], clock: Clock, calls: int
) -> tuple[Callable[[], None], Any]:
    """How to replay a graph of calls, each with the cache that the clock wants; the last result."""
    graph, result = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        for _ in range(calls):
            result = None  # the next call may have its memory
            clock.empty_cache()
            result = function()
    return graph.replay, result


def calls_in_a_graph(seconds: float) -> int:
    """How many calls that take so long one graph should hold."""
    return _CALLS if seconds < _SHORT_SECONDS else 1


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

    played = player(play_all, Clock(device, cold=False), captures=device == "cuda")
    seconds = [played.seconds() / len(order) for _ in range(warmup + repeats)]
    return seconds[warmup:], played.timing
