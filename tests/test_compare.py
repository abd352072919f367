"""The yardstick itself: it accepts what is fair and refuses everything else."""

from __future__ import annotations

import pytest
import torch
from compare import assert_fair, largest_error


def test_accepts_twice_the_error_of_plain_torch():
    truth = torch.zeros(4, dtype=torch.float64)
    plain = torch.tensor([0.0, 0.01, 0.0, 0.0])
    assert_fair(torch.tensor([0.02, 0.0, 0.0, 0.0]), truth, plain)
    with pytest.raises(AssertionError, match=r"out: error 0\.021 exceeds"):
        assert_fair(torch.tensor([0.0, 0.0, 0.0, 0.021]), truth, plain, "out")


def test_floor_holds_where_plain_torch_is_exact():
    truth = torch.ones(3, dtype=torch.float64)
    assert_fair(torch.ones(3) + 9e-6, truth, torch.ones(3))
    with pytest.raises(AssertionError):
        assert_fair(torch.ones(3) + 3e-5, truth, torch.ones(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_element_is_enough(value):
    truth = torch.zeros(5, dtype=torch.float64)
    result = torch.zeros(5)
    result[3] = value
    with pytest.raises(AssertionError):
        largest_error(result, truth)


def test_infinities_must_agree():
    truth = torch.tensor([-torch.inf, 1.0], dtype=torch.float64)
    assert largest_error(torch.tensor([-torch.inf, 1.0]), truth) == 0.0
    for wrong in (torch.inf, 0.0):
        with pytest.raises(AssertionError, match="infinite"):
            largest_error(torch.tensor([wrong, 1.0]), truth)


def test_shape_and_dtype_count():
    truth = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shape"):
        largest_error(torch.zeros(1), truth)
    with pytest.raises(AssertionError, match="dtype"):
        assert_fair(torch.zeros(2), truth, torch.zeros(2, dtype=torch.float16))


def test_memory_of_the_package_is_poisoned():
    """The set-up that makes unwritten output visible works, and only for the package."""
    namespace = {"__name__": "flash_sparse_attn.somewhere", "torch": torch}
    code = """
a = torch.empty(2, 3)
b = torch.empty_like(torch.ones(2))
c = torch.ones(1).new_empty(4)
d = torch.empty(2, dtype=torch.int32)
e = torch.empty(2, dtype=torch.bool)
"""
    exec(code, namespace)
    assert all(namespace[name].isnan().all() for name in "abc")
    assert (namespace["d"] < -1e9).all() and namespace["e"].all()
    outside = {"__name__": "elsewhere", "torch": torch}
    exec("a = torch.empty(0)", outside)
    assert outside["a"].shape == (0,)
