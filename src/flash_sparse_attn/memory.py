"""What a call keeps in memory for its backward pass, tensor by tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

INPUT, OUTPUT, MADE = "input", "output", "made by the call"


@dataclass(frozen=True)
class KeptTensor:
    """One tensor that is kept.

    Attributes:
        name: Argument, parameter or output; empty for what the call made on its way.
        origin: ``"input"`` (the caller's own tensor), ``"output"`` or ``"made by the call"``.
        shape, dtype: As it is kept; a view may be smaller than the memory it holds.
        nbytes: Bytes of the memory behind it, 0 if an earlier one has the same.
    """

    name: str
    origin: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class MemoryReport:
    """What a call keeps for its backward pass; ``print`` shows a table.

    Attributes:
        tensors: In the order they were kept.
    """

    tensors: tuple[KeptTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it, memory that several tensors share counted once."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def extra_nbytes(self) -> int:
        """Bytes of what neither the caller passed nor got: the price of the gradient alone."""
        return sum(tensor.nbytes for tensor in self.tensors if tensor.origin == MADE)

    def __str__(self) -> str:
        lines = [
            f"{tensor.origin:<17}{tensor.name or '-':<22}{_dtype(tensor.dtype):<10}"
            f"{list(tensor.shape)!s:<24}{tensor.nbytes:>14,}"
            for tensor in self.tensors
        ]
        head = f"{'origin':<17}{'name':<22}{'dtype':<10}{'shape':<24}{'bytes':>14}"
        made = f"{'of these made by the call alone':<73}{self.extra_nbytes:>14,}"
        return "\n".join([head, *lines, f"{'kept for backward':<73}{self.nbytes:>14,}", made])


def memory_report(function: Callable[..., Any], *args: Any, **kwargs: Any) -> MemoryReport:
    """Call a function once and report what its autograd graph holds for the backward pass.

    Counted is what PyTorch saves for the backward pass in the form it is saved, each memory once;
    the temporary memory of the passes is not. Gradients are on, and the result is thrown away.

    Args:
        function: A function of this package, a module, or any other function that is not compiled.
        *args: Its arguments; tensors inside selections, lists and dictionaries are named, too.
            Without one that requires a gradient nothing is kept.
        **kwargs: Likewise.

    Returns:
        The report; its text is a table.

    Raises:
        TypeError: `function` cannot be called.

    Example:
        >>> print(memory_report(dynamic_mask_attn_func, query, key, value, scores, 1024))
    """
    if not callable(function):
        raise TypeError(
            f"memory_report: function: expected something to be called, got "
            f"{type(function).__name__}; pass the function and its arguments apart"
        )
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        result = function(*args, **kwargs)
    known: dict[Any, tuple[str, str]] = {}
    for name, tensor in _named_tensors("output", result):
        known[_memory(tensor)] = (name, OUTPUT)
    for name, tensor in _inputs(function, args, kwargs):  # an output may be a view of an input
        known[_memory(tensor)] = (name, INPUT)
    counted = set()
    tensors = []
    for tensor in saved:
        memory = _memory(tensor)
        name, origin = known.get(memory, ("", MADE))
        nbytes = 0 if memory in counted else tensor.untyped_storage().nbytes()
        counted.add(memory)
        tensors.append(KeptTensor(name, origin, tuple(tensor.shape), tensor.dtype, nbytes))
    return MemoryReport(tuple(tensors))


def _inputs(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a call gets, by argument; those of a module by parameter or buffer."""
    owner = getattr(function, "__self__", function)
    if isinstance(owner, torch.nn.Module):
        yield from owner.named_parameters()
        yield from owner.named_buffers()
    called = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        arguments = inspect.signature(called).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # a function of C++ tells no names
        arguments = {f"argument {index}": value for index, value in enumerate(args)} | kwargs
    for name, value in arguments.items():
        yield from _named_tensors(name, value)


def _named_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value with the way to them."""
    if isinstance(value, Tensor):
        yield name, value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _named_tensors(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _named_tensors(f"{name}[{key!r}]", entry)
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from _named_tensors(f"{name}[{index}]", entry)


def _memory(tensor: Tensor) -> Any:
    """What is equal for tensors with the same memory."""
    return tensor.device, tensor.untyped_storage()._cdata


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
