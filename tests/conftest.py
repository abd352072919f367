"""Set-up that every test shares: threads, seeds, the device, and poisoned fresh memory."""

from __future__ import annotations

import functools
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

# Test processes share the cores: more threads than cores would wait for each other, busily. Must be
# set before torch starts its threads.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    WORKERS = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // WORKERS))
# Figures are drawn to files; there need be no display.
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

PACKAGES = ("flash_sparse_attn", "flash_dmattn")
KEPT_BYTES = 1 << 30  # of freed memory that a test process keeps for its next test
ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is none."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """The device under test: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> dict[Any, Any]:
    """The launches that this test records; their results are poisoned, like other fresh memory, and
    why a call is not recorded is in the log."""
    launching = pytest.importorskip("flash_sparse_attn.backends.triton.launch")
    from flash_sparse_attn.backends.triton import recording

    monkeypatch.setattr(recording, "_EMPTY_ON_GPU", None)
    monkeypatch.setattr(launching, "_recordings", {})
    caplog.set_level("DEBUG", launching.__name__)
    return launching._recordings


@pytest.fixture(autouse=True)
def _same_start_for_every_test() -> Iterator[None]:
    """Seed all generators, put global switches back however the test leaves them, and give memory
    back: processes side by side share the GPU."""
    random.seed(0)
    torch.manual_seed(0)
    deterministic = torch.are_deterministic_algorithms_enabled()
    default_dtype = torch.get_default_dtype()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_default_dtype(default_dtype)
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT_BYTES:
        torch.cuda.empty_cache()


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill fresh memory with what no correct program can use: NaN, an extreme integer, or True."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    limits = torch.iinfo(tensor.dtype)
    return tensor.fill_(limits.min or limits.max)


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap an allocator such that calls made by the package get poisoned memory."""

    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        # A compiler would have to trace the look at the caller.
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] in PACKAGES:
            with _disable_current_modes():  # nobody who watches operators sees this one
                poison(tensor)
        return tensor

    return wrapper


@pytest.fixture(autouse=True, scope="session")
def _poisoned_memory() -> Iterator[None]:
    """Memory that the package allocates and forgets to write shows, instead of passing by luck."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ALLOCATORS:
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield
