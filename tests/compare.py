"""The yardstick of accuracy tests: fp64 truth, and plain PyTorch as the measure of what is fair."""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR = 1e-5


def largest_error(result: Tensor, truth: Tensor, name: str = "result") -> float:
    """Largest |result - truth| over every element; infinities must agree, and NaN is an error.

    Args:
        result: any shape and dtype.
        truth: the same shape, fp64.
        name: used in messages.

    Returns:
        The largest error over the finite elements, 0.0 if there are none.
    """
    shapes = tuple(result.shape), tuple(truth.shape)
    assert shapes[0] == shapes[1], f"{name}: shape {shapes[0]}, expected {shapes[1]}"
    assert truth.dtype == torch.float64, f"{name}: the truth must be fp64, got {truth.dtype}"
    result, truth = result.detach().double(), truth.detach().to(result.device)
    assert not truth.isnan().any(), f"{name}: the truth contains NaN"
    bad = int(result.isnan().sum())
    assert bad == 0, f"{name}: {bad} of {result.numel()} elements are NaN"
    infinite = truth.isinf() | result.isinf()
    disagree = int((result[infinite] != truth[infinite]).sum())
    assert disagree == 0, f"{name}: {disagree} elements are infinite on one side or of other sign"
    errors = (result - truth)[~infinite].abs()
    return errors.max().item() if errors.numel() else 0.0


def assert_fair(result: Tensor, truth: Tensor, plain: Tensor, name: str = "result") -> None:
    """Assert that every element of `result` is within twice the error of plain PyTorch, plus 1e-5.

    Args:
        result: what is tested.
        truth: computed in fp64 from the same (rounded) inputs.
        plain: the same computation in plain PyTorch, in the dtype of `result`.
        name: used in messages.
    """
    assert result.dtype == plain.dtype, f"{name}: dtype {result.dtype}, expected {plain.dtype}"
    error = largest_error(result, truth, name)
    fair = largest_error(plain, truth, f"plain PyTorch's {name}")
    budget = FACTOR * fair + FLOOR
    assert error <= budget, f"{name}: error {error:.3g} exceeds {budget:.3g}, plain has {fair:.3g}"
