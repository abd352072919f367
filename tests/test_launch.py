"""Launches that are recorded and repeated: which pointers go where, and what is not repeated."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from flash_sparse_attn.backends.triton import launch as launching
from flash_sparse_attn.backends.triton.launch import launch, repeat

CPU = torch.device("cpu")


class FakeKernel:
    """Adds two fp32 vectors of ``size`` by their addresses, compiled or not."""

    arg_names = ("ptr_left", "ptr_right", "ptr_out", "size", "SCALE")

    def __init__(self):
        self.handled = self.compiled = 0
        self.asked = []  # how many had been started when one was to be compiled,
        self.modes = []  # and the mode of Triton then

    def warmup(self, *args, grid, **constants):
        from triton.runtime._async_compile import active_mode

        self.asked.append(self.handled)
        self.modes.append(active_mode.get())

    def __getitem__(self, grid):
        def run(left, right, out, size, SCALE, num_warps=4):
            self.handled += 1
            tensors = [getattr(one, "base", one) for one in (left, right, out)]
            self._add(*(one.data_ptr() for one in tensors), size, SCALE)
            facts = ("global_scratch_size", "profile_scratch_size")
            facts += ("launch_cooperative_grid", "launch_pdl")
            launcher = SimpleNamespace(**dict.fromkeys(facts, 0), launch=self._launch)
            if hasattr(left, "base"):
                launcher.launch = self._wrapped()
            return SimpleNamespace(function=None, packed_metadata=None, run=launcher)

        return run

    def _wrapped(self):
        """As Triton wraps the function of a kernel that takes tensor descriptors."""
        launcher, tensordesc_meta = self._launch_described, [None]
        return lambda *args: launcher(*args, tensordesc_meta)

    def _launch_described(self, *arguments):
        # In place of a 1-D descriptor: its tensor, twice shape and stride, and the padding.
        *base, left, _, _, padding, _, _, right, out, size, scale = arguments
        assert not padding
        self._launch(*base, left.data_ptr(), right, out, size, scale)

    def _launch(self, x, y, z, stream, function, cooperative, dependent, *arguments):
        self.compiled += 1
        *nothing, left, right, out, size, scale = arguments
        assert nothing == [None] * 6
        self._add(left, right, out, size, scale)

    def _add(self, left, right, out, size, scale):
        vectors = [(ctypes.c_float * size).from_address(one) for one in (left, right, out)]
        for i in range(size):
            vectors[2][i] = scale * (vectors[0][i] + vectors[1][i])


@pytest.fixture
def kernel(monkeypatch, recordings):
    monkeypatch.setattr(launching, "_can_repeat", lambda device: True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    return FakeKernel()


def add_twice(kernel, left, right, allocate=torch.empty, wrap=lambda tensor: tensor):
    """``2 (2 (left + right) + right)`` through a scratch tensor, and a result that stays empty."""
    size = left.numel()
    scratch, out = allocate(2 * size), torch.empty(size)
    launch(kernel, 1)(wrap(left), right, scratch[size:].view(-1), size, SCALE=2.0, num_warps=1)
    launch(kernel, 1)(scratch[size:].view(-1), right, out, size, SCALE=2.0)
    return out, None


def call(kernel, left, right, key="key", **options):
    addresses = (left.data_ptr(), right.data_ptr())
    return repeat(key, addresses, CPU, lambda: add_twice(kernel, left, right, **options))


def test_repeats_with_other_tensors(kernel):
    for round_ in range(3):
        left, right = torch.randn(8), torch.randn(8)
        out, nothing = call(kernel, left, right)
        torch.testing.assert_close(out, 4 * left + 6 * right)
        assert nothing is None
        assert (kernel.handled, kernel.compiled) == (2, 2 * round_)


def test_results_are_new_tensors(kernel):
    left, right = torch.randn(8), torch.randn(8)
    outs = [call(kernel, left, right)[0] for _ in range(3)]
    assert len({out.data_ptr() for out in outs}) == 3


def test_parts_of_given_tensors_take_the_new_address(kernel):
    def run(pair):
        left, right = pair.unbind(0)
        out = torch.empty(8)
        launch(kernel, 1)(left, right, out, 8, SCALE=2.0)
        return (out,)

    for _ in range(3):
        pair = torch.randn(2, 8)
        (out,) = repeat("key", (pair.data_ptr(),), CPU, lambda pair=pair: run(pair))
        torch.testing.assert_close(out, 2 * pair.sum(0))
    assert (kernel.handled, kernel.compiled) == (1, 2)


def test_descriptors_take_the_new_address(kernel):
    def wrap(tensor):
        return SimpleNamespace(base=tensor, shape=[8], strides=[1], padding="zero")

    for _ in range(2):
        left, right = torch.randn(8), torch.randn(8)
        out, _ = call(kernel, left, right, wrap=wrap)
        torch.testing.assert_close(out, 4 * left + 6 * right)
    assert kernel.compiled == 2


def test_other_keys_are_other_calls(kernel):
    for size in (8, 4):
        call(kernel, torch.randn(size), torch.randn(size), key=size)
    assert (kernel.handled, kernel.compiled) == (4, 0)


def test_what_computes_outside_of_kernels_is_not_repeated(kernel):
    for _ in range(2):
        call(kernel, torch.randn(8), torch.randn(8), allocate=torch.zeros)
    assert (kernel.handled, kernel.compiled) == (4, 0)


def test_tensors_that_share_an_address_are_not_repeated(kernel):
    same = torch.randn(8)
    call(kernel, same, same)
    left, right = torch.randn(8), torch.randn(8)
    out, _ = call(kernel, left, right)
    torch.testing.assert_close(out, 4 * left + 6 * right)
    assert kernel.compiled == 0


def test_a_tensor_that_was_not_given_is_not_repeated(kernel):
    hidden = torch.randn(8)
    for _ in range(2):
        left = torch.randn(8)
        repeat("key", (left.data_ptr(),), CPU, lambda left=left: add_twice(kernel, left, hidden))
    assert kernel.compiled == 0


def test_calls_that_allocate_much_are_not_repeated(kernel, monkeypatch):
    """And what they are done with is not kept until their end."""
    monkeypatch.setattr(launching, "_MAX_BYTES", 4 * (16 + 8) - 1)
    for _ in range(2):
        left, right = torch.randn(8), torch.randn(8)
        out, _ = call(kernel, left, right)
        torch.testing.assert_close(out, 4 * left + 6 * right)
    assert (kernel.handled, kernel.compiled) == (4, 0)
    recorder = launching._Recorder((1,))
    with recorder:
        torch.empty(16)
        assert recorder._fresh
        torch.empty(8)
    assert not recorder._fresh and recorder.recording(()) is None


def test_kernels_of_a_first_call_are_compiled_together(kernel):
    """All before the first is started, and none when the call is repeated."""
    for _ in range(2):
        left, right = torch.randn(8), torch.randn(8)
        out, _ = call(kernel, left, right)
        torch.testing.assert_close(out, 4 * left + 6 * right)
    assert kernel.asked == [0, 0]


def test_a_caller_who_compiles_side_by_side_goes_on_to(kernel):
    """In the caller's way: Triton knows one at a time."""
    from triton.runtime._async_compile import AsyncCompileMode, active_mode

    left, right = torch.randn(8), torch.randn(8)
    with ThreadPoolExecutor(1) as pool, AsyncCompileMode(pool) as mode:
        out, _ = call(kernel, left, right)
        assert active_mode.get() is mode
    torch.testing.assert_close(out, 4 * left + 6 * right)
    assert kernel.asked == [0, 0] and kernel.modes == [mode, mode]
    call(kernel, left, right, key="other")
    assert active_mode.get() is None and not {mode, None} & set(kernel.modes[2:])


def test_operators_see_what_was_launched_before_them(kernel):
    def run(left, right):
        first, second = torch.empty(8), torch.empty(8)
        launch(kernel, 1)(left, right, first, 8, SCALE=1.0)
        total = first * 3
        launch(kernel, 1)(total, right, second, 8, SCALE=1.0)
        return (second,)

    for _ in range(2):
        left, right = torch.randn(8), torch.randn(8)
        (out,) = repeat("key", (left.data_ptr(),), CPU, partial(run, left, right))
        torch.testing.assert_close(out, 3 * left + 4 * right)
    assert kernel.handled == 4


def test_what_runs_once_is_launched_and_not_kept(kernel):
    left, right, out = torch.randn(8), torch.randn(8), torch.empty(8)
    launching.run_once(CPU, lambda: launch(kernel, 1)(left, right, out, 8, SCALE=1.0))
    torch.testing.assert_close(out, left + right)
    assert kernel.handled == 1 and not launching._recordings


def test_profilers_see_ordinary_launches(kernel, monkeypatch):
    call(kernel, torch.randn(8), torch.randn(8))
    monkeypatch.setattr(launching, "_is_profiled", lambda: True)
    call(kernel, torch.randn(8), torch.randn(8))
    assert (kernel.handled, kernel.compiled) == (4, 0)


def test_recordings_are_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launching, "_MAX_RECORDINGS", 3)
    for key in range(10):
        call(kernel, torch.randn(8), torch.randn(8), key=key)
        assert len(launching._recordings) <= 3


def test_to_record_imports_no_compiler():
    code = """
import sys, torch
from flash_sparse_attn.backends.triton.launch import repeat
repeat("key", [1], torch.device("cuda"), lambda: [torch.empty(3)])
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
