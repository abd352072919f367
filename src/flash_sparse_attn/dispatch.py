"""Which backend runs a call, and why the others cannot.

A backend is a module with three functions:

* ``unavailable() -> list[str]``: reasons why it cannot run on this machine at all;
* ``unsupported(problem) -> list[str]``: reasons why it cannot run this call;
* ``attention(problem, query, key, value, mask, bias) -> (out, lse)``.

A named backend runs or raises with its reasons; only ``backend=None`` chooses, and never "flex".
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

from .backends import eager, flex, sdpa, triton
from .problem import Problem

# Fastest first. "cuda" means the fastest kernels for an NVIDIA GPU: at present the portable ones.
_MODULES: dict[str, ModuleType] = {"cuda": triton, "triton": triton, "flex": flex, "eager": eager}


def check_name(backend: str | None) -> None:
    """`backend` is ``None`` or the name of a backend."""
    if backend is not None and backend not in _MODULES:
        raise ValueError(
            f"backend: expected one of {', '.join(_MODULES)} or None (the best available), "
            f"got {backend!r}"
        )


def explain_backends() -> dict[str, list[str]]:
    """Every backend with the reasons why it cannot run on this machine; no reasons: it can."""
    return {name: _MODULES[name].unavailable() for name in _MODULES}


def get_available_backends() -> list[str]:
    """Names of the backends that can run on this machine, fastest first."""
    return [name for name, reasons in explain_backends().items() if not reasons]


def choose(problem: Problem, backend: str | None = None) -> ModuleType:
    """The backend for a call: the named one, or the first that supports it.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The named backend cannot run here or cannot run this call.
    """
    check_name(backend)
    if backend is not None:
        module = _MODULES[backend]
        if reasons := module.unavailable() or module.unsupported(problem):
            listed = "".join(f"\n  - {reason}" for reason in reasons)
            raise RuntimeError(f"backend={backend!r} cannot run this call ({problem}):{listed}")
        return eager if problem.is_empty else module
    if problem.is_empty:  # nothing to launch, and gradients of zero
        return eager
    if not sdpa.unsupported(problem):  # plain attention, which has no name of its own
        return sdpa
    for module in _MODULES.values():
        # FlexAttention takes seconds to compile for every new form of a call, and on CPUs all of
        # Q x K in memory: that is for people to choose.
        if module is flex:
            continue
        if not module.unavailable() and not module.unsupported(problem):
            if module is eager and problem.device.type == "cuda":
                _warn_eager_on_gpu(tuple(triton.unavailable() or triton.unsupported(problem)))
            return module
    raise AssertionError("the eager backend supports every checked call")


@cache
def _warn_eager_on_gpu(reasons: tuple[str, ...]) -> None:
    """Once for every set of reasons."""
    warnings.warn(
        "attention runs on the eager backend, which is slow on a GPU: " + "; ".join(reasons),
        stacklevel=5,
    )
