"""Launches of kernels, noted once and repeated without the host time of argument handling.

Triton handles every argument of every launch again: with the 80 arguments of a forward call that
took 0.12 ms of host time on the machine of the tables, the whole call 0.22 ms. `repeat` notes the
launches of a call the first time, and starts the same compiled kernels with other addresses from
then on. That first time launches wait until the call ends, so that what they need is compiled side
by side: of a first forward and backward pass nearly all the time is compilation, kernel by kernel.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from .config import knows_triton
from .recording import Descriptor, Launch, Recording

_log = logging.getLogger(__name__)

_MAX_RECORDINGS = 1024
# A call that allocates more takes so long on the device that its host time does not matter; and a
# recorded call has all its memory at once, where an ordinary one reuses what it is done with. It is
# above what backward keeps of scores, `role_config.KEPT_BYTES`, and the gradients: 32 heads at 4096
# to 16384 tokens took 1.6 to 2.6 ms of host time launched anew, 0.6 ms and more on the device.
_MAX_BYTES = 3 << 29
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty"}
_VIEWS = {"alias", "detach", "select", "slice", "unbind", "unsqueeze", "view"}
_ALIGN = 256  # bytes: what the allocator of PyTorch gives, and more than any access needs


class _State(threading.local):
    recorder: _Recorder | None = None


_state = _State()
_recordings: dict[Hashable, Recording | None] = {}


def launch(kernel: Any, num_programs: int) -> Callable[..., Any]:
    """``kernel[(num_programs,)]``, noted if the call is being recorded."""
    if _state.recorder is None:
        return kernel[(num_programs,)]
    return partial(_state.recorder.launch, kernel, num_programs)


def repeat(
    key: Hashable, addresses: Sequence[int], device: torch.device, run: Callable[[], Sequence[Any]]
) -> Sequence[Any]:
    """The result of `run`: by running it the first time, then by repeating its launches.

    Args:
        key: Everything that decides about the launches but the addresses: shapes, strides, dtypes,
            alignments, options.
        addresses: Of all tensors that the launches read and that exist before; 0 for none.
        device: Where they are: the current one.
        run: Starts kernels through `launch`, and apart from that only allocates tensors. What it
            returns are such tensors, or ``None``.
    """
    recording = _recordings.get(key, _UNKNOWN)
    if recording is _UNKNOWN:
        return _record(key, addresses, run) if _can_repeat(device) else run()
    if recording is None or _is_profiled():
        return run()
    return recording.start(addresses, device)


def repeat_call(
    facts: Sequence[Hashable],
    tensors: Sequence[Tensor | None],
    run: Callable[[], Sequence[Any]],
    more_addresses: Sequence[int] = (),
) -> Sequence[Any]:
    """`repeat` for what follows from these facts and tensors.

    Args:
        facts: What decides about the launches beside shapes, strides, dtypes, alignments and device
            of the tensors: the kind of call, options, which tensors are not given.
        tensors: What the launches read; the first is one.
        run: As there.
        more_addresses: Of further tensors, all else of which is among the facts.
    """
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    device = tensors[0].device  # type: ignore[union-attr]
    forms = [None if t is None else (t.dtype, t.shape, t.stride()) for t in tensors]
    key = (device, *facts, *forms, *[address & 15 for address in addresses])
    return repeat(key, (*addresses, *more_addresses), device, run)


_UNKNOWN: Any = object()


def run_once(device: torch.device, run: Callable[[], Any]) -> None:
    """Run what only allocates and launches, and keep nothing: for the sake of compilation."""
    if _can_repeat(device):
        _run_recorded(_Recorder(()), run)
    else:
        run()


def _record(
    key: Hashable, addresses: Sequence[int], run: Callable[[], Sequence[Any]]
) -> Sequence[Any]:
    recorder = _Recorder(addresses)
    results = _run_recorded(recorder, run)
    if len(_recordings) >= _MAX_RECORDINGS:
        _recordings.clear()
    _recordings[key] = recorder.recording(results)
    return results


def _run_recorded(recorder: _Recorder, run: Callable[[], Any]) -> Any:
    _state.recorder = recorder
    try:
        with recorder:
            results = run()
        recorder.start_waiting()
    finally:
        _state.recorder = None
    return results


def _compile(waiting: Sequence[_Waiting]) -> None:
    """Compile what launches need, side by side: most of the compiler runs without Python's lock.

    What cannot be compiled is reported by the launch itself. Where the caller has Triton compile
    side by side already, this is left to the caller's processes or threads: launches wait for them.
    """
    from triton.runtime._async_compile import AsyncCompileMode, active_mode

    with ExitStack() as ours:
        if active_mode.get() is None:
            pool = ThreadPoolExecutor(min(len(waiting), os.cpu_count() or 1))
            ours.enter_context(pool)
            ours.enter_context(AsyncCompileMode(pool, ignore_errors=True))
        for one in waiting:
            one.kernel.warmup(*one.args, grid=(one.num_programs,), **one.constants)


def _can_repeat(device: torch.device) -> bool:
    """Whether the installed Triton starts compiled kernels there in the way known here."""
    return device.type == "cuda" and torch.version.hip is None and knows_triton()


def _is_profiled() -> bool:
    """Whether somebody listens to launches."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


@dataclass(frozen=True)
class _Waiting:
    """A launch that has not been started yet."""

    kernel: Any
    num_programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]


class _Recorder(TorchDispatchMode):
    """Notes launches, and whether anything but launches and allocations happens.

    Launches wait for each other, see `start_waiting`, unless something else happens.
    """

    def __init__(self, addresses: Sequence[int]) -> None:
        super().__init__()
        self._given = list(addresses)
        self._fresh: dict[int, Tensor] = {}  # by the address of their storage, kept alive
        self._fresh_bytes = 0
        self._waiting: list[_Waiting] = []
        self._launches: list[tuple[Any, int, list[Any]]] = []
        # Why the call cannot be repeated, if it cannot.
        self._obstacle = ""
        given = [address for address in addresses if address]
        if len(set(given)) < len(given):
            self._obstacle = "two tensors at one address cannot be told apart"

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would import its compiler, for seconds, to keep it out of what is below."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._opname
        if name not in _VIEWS and name not in _ALLOCATIONS:
            self._obstacle = f"it runs the operator {name}"
            self.start_waiting()  # it may read what they write
        result = function(*args, **(kwargs or {}))
        if name in _ALLOCATIONS and not self._obstacle:
            storage = result.untyped_storage()
            self._fresh[storage.data_ptr()] = result
            self._fresh_bytes += storage.nbytes()
            if self._fresh_bytes > _MAX_BYTES:
                self._obstacle = f"it allocates more than {_MAX_BYTES} bytes"
        if self._obstacle:
            self.start_waiting()
            self._fresh.clear()
            self._launches.clear()
        return result

    def launch(self, kernel: Any, num_programs: int, *args: Any, **constants: Any) -> None:
        """Have a kernel started, and note it."""
        self._waiting.append(_Waiting(kernel, num_programs, args, constants))
        if self._obstacle:  # memory is used again as soon as Python lets go of it
            self.start_waiting()

    def start_waiting(self) -> None:
        """Start the launches so far, in order."""
        waiting, self._waiting = self._waiting, []
        if len(waiting) > 1:
            _compile(waiting)
        for one in waiting:
            compiled = one.kernel[(one.num_programs,)](*one.args, **one.constants)
            if not self._obstacle:
                rest = (one.constants[name] for name in one.kernel.arg_names[len(one.args) :])
                self._launches.append((compiled, one.num_programs, [*one.args, *rest]))

    def recording(self, results: Sequence[Any]) -> Recording | None:
        """What was noted, or ``None`` if it cannot be repeated."""
        recording = None if self._obstacle else self._recording(results)
        if recording is None:
            _log.debug("a call is not repeated: %s", self._obstacle)
        return recording

    def _recording(self, results: Sequence[Any]) -> Recording | None:
        result_facts = [
            None if one is None else (tuple(one.shape), one.stride(), one.dtype) for one in results
        ]
        numbers = {address: i for i, address in enumerate(self._given) if address}
        numbers |= {
            one.data_ptr(): len(self._given) + i
            for i, one in enumerate(results)
            if one is not None and one.numel()
        }
        scratch: list[int] = []
        total = 0
        launches = []
        for compiled, num_programs, values in self._launches:
            if compiled.run.global_scratch_size or compiled.run.profile_scratch_size:
                self._obstacle = "a kernel needs scratch memory of Triton"
                return None
            noted, encodings = Launch.of(compiled, num_programs)
            for value in values:
                place = len(noted.arguments)
                tensor = getattr(value, "base", value)
                if not isinstance(tensor, Tensor):
                    noted.arguments.append(value)
                    continue
                address = tensor.data_ptr()
                number, offset = numbers.get(address), 0
                if number is None and address:
                    storage = tensor.untyped_storage()
                    base = storage.data_ptr()
                    if base not in numbers and base not in self._fresh:
                        self._obstacle = f"argument {place} is neither given nor allocated by it"
                        return None
                    if base not in numbers:
                        numbers[base] = len(self._given) + len(results) + len(scratch)
                        scratch.append(total)
                        total += -(-storage.nbytes() // _ALIGN) * _ALIGN
                    number, offset = numbers[base], address - base
                if tensor is not value and number is not None:
                    form = (value.shape, value.strides, value.padding)
                    one = Descriptor(place, number, offset, *form, next(encodings), [(0, [])])
                    noted.descriptors.append(one)
                    noted.arguments.extend(one.encoded(address))
                    continue
                noted.arguments.append(address)
                if number is not None:
                    noted.addresses.append((place, number, offset))
            launches.append(noted)
        return Recording(launches, result_facts, scratch, total)
