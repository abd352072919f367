"""The launches of a call, as they are repeated with other addresses: without Triton's handling."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Descriptor:
    """A tensor descriptor among the arguments, where Triton puts several in its place.

    Attributes:
        place, number, offset: As of an address, see `Launch`.
        shape, strides, padding: Of what it describes.
        metadata: How the kernel wants it encoded.
        known: The last address, and what it was encoded to: allocators come back to the same ones.
    """

    place: int
    number: int
    offset: int
    shape: Any
    strides: Any
    padding: Any
    metadata: Any
    known: list[tuple[int, list[Any]]]

    def encoded(self, address: int) -> list[Any]:
        """The arguments that stand for the descriptor."""
        known, arguments = self.known[0]
        if known != address:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            like = SimpleNamespace(
                base=SimpleNamespace(data_ptr=lambda: address),  # the memory is not kept alive
                shape=self.shape,
                strides=self.strides,
                padding=self.padding,
            )
            arguments = make_tensordesc_arg(like, self.metadata)
            self.known[0] = (address, arguments)
        return arguments


@dataclass(frozen=True)
class Launch:
    """One launch: arguments, and which of them are addresses in which tensor.

    Attributes:
        start: The function that starts the compiled kernel.
        num_programs: Programs of the grid.
        function: The kernel on the device.
        fixed: What lies between it and the arguments of the kernel.
        arguments: Of the kernel, in order; addresses are replaced.
        addresses: Place among the arguments, number of the tensor, offset in bytes.
        descriptors: The same for tensor descriptors.
    """

    start: Callable[..., Any]
    num_programs: int
    function: Any
    fixed: tuple[Any, ...]
    arguments: list[Any]
    addresses: list[tuple[int, int, int]]
    descriptors: list[Descriptor]

    @classmethod
    def of(cls, compiled: Any, num_programs: int) -> tuple[Launch, Iterator[Any]]:
        """A launch without arguments, and how the kernel wants its descriptors encoded."""
        launcher = compiled.run
        start = launcher.launch
        # Triton wraps the function of a kernel with descriptors, to encode them in every call.
        wrapped = inspect.getclosurevars(start).nonlocals if inspect.isfunction(start) else {}
        start, encodings = wrapped.get("launcher", start), wrapped.get("tensordesc_meta", ())
        nothing = (None, None)  # no memory for scratch; no hooks
        cooperative, dependent = launcher.launch_cooperative_grid, launcher.launch_pdl
        fixed = (cooperative, dependent, *nothing, compiled.packed_metadata, None, *nothing)
        return cls(start, num_programs, compiled.function, fixed, [], [], []), iter(encodings)


@dataclass(frozen=True)
class Recording:
    """The launches of a call. Tensors are numbered: given ones, results, then scratch.

    Attributes:
        launches: In order.
        results: Shape, strides and dtype of every result, or ``None``.
        scratch: Offsets of scratch tensors in one allocation.
        scratch_bytes: Its size.
    """

    launches: list[Launch]
    results: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None]
    scratch: list[int]
    scratch_bytes: int

    def start(self, addresses: Sequence[int], device: torch.device) -> list[Tensor | None]:
        """Repeat the launches with these addresses."""
        results = [None if facts is None else _empty(*facts, device) for facts in self.results]
        table = [*addresses, *[0 if result is None else result.data_ptr() for result in results]]
        if self.scratch:
            # Freed on return: the allocator gives it to later work of the same stream only.
            scratch = _empty((self.scratch_bytes,), (1,), torch.uint8, device)
            base = scratch.data_ptr()
            table += [base + offset for offset in self.scratch]
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        for one in self.launches:
            arguments = one.arguments.copy()
            for place, number, offset in one.addresses:
                arguments[place] = table[number] + offset
            for each in one.descriptors:
                encoded = each.encoded(table[each.number] + each.offset)
                arguments[each.place : each.place + len(encoded)] = encoded
            one.start(one.num_programs, 1, 1, stream, one.function, *one.fixed, *arguments)
        return results


def _empty(shape: Any, strides: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor on a device, which is the current one if it is a GPU."""
    if _EMPTY_ON_GPU is not None and device.type == "cuda":
        return _EMPTY_ON_GPU(shape, strides, dtype)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


# What the code of PyTorch's own compiler calls: a third of the host time of `torch.empty`.
_EMPTY_ON_GPU = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
