"""The table of what works: every cell stands on a test that exists and runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "support.py"
_spec = importlib.util.spec_from_file_location("support_script", SCRIPT)
support = importlib.util.module_from_spec(_spec)
# Annotations of its dataclasses are looked up in the module.
importlib.sys.modules["support_script"] = support
_spec.loader.exec_module(support)


@pytest.mark.parametrize("feature", support.FEATURES, ids=lambda feature: feature.name)
def test_every_feature_names_tests_that_run(feature):
    assert feature.tests
    for test in feature.tests:
        assert support.find(test).name == test.partition("::")[2]


def test_the_table_has_what_people_ask_for():
    header, lines = support.table()
    assert header == ["feature", "on CPUs", "on GPUs", "shown by"]
    text = "\n".join(line[0] for line in lines)
    for word in (
        "compile",
        "graphs",
        "autocast",
        "checkpointing",
        "FSDP2",
        "LoRA",
        "dtypes",
        "head dimensions",
        "determinism",
    ):
        assert word in text
    cells = {line[0]: line[1:3] for line in lines}
    assert cells["dtypes"] == ["bfloat16, float16, float32, float64", "bfloat16, float16"]
    assert cells["head dimensions"][0].startswith("1, 8, 20, 32,")
    assert cells["head dimensions"][1].endswith("128, 192, 256")
    assert cells["second derivatives"][1] == "refused"


@pytest.fixture
def tests(tmp_path, monkeypatch):
    """A folder of tests made for this one."""
    monkeypatch.setattr(support, "TESTS", tmp_path)
    (tmp_path / "gpu").mkdir()
    (tmp_path / "test_x.py").write_text(
        """
import pytest
A, B = 16, 8
WIDTHS = (B, 128)
class Case:
    dim: int = A
CASES = [Case(dim=32), Other(dim=1)]
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", [torch.float16, "other"])
def test_a(width, kind): pass
def test_b(): pass
@pytest.mark.skip(reason="never")
def test_skipped(): pass
@pytest.mark.xfail
def test_failing(): pass
def helper(): pass
"""
    )
    (tmp_path / "gpu" / "test_y.py").write_text("def test_c(): pass\n")


@pytest.mark.usefixtures("tests")
def test_values_are_those_of_the_test():
    assert support.values("test_x.py::test_a", "width") == ["8", "128"]
    assert support.values("test_x.py::test_a", "kind") == ["'other'", "float16"]
    assert support.values("test_x.py::test_b", "dim") == ["16", "32"]
    with pytest.raises(ValueError, match="expected values of 'depth', got none"):
        support.values("test_x.py::test_a", "depth")


@pytest.mark.usefixtures("tests")
def test_cells_are_empty_where_no_test_is(monkeypatch):
    tests = ("test_x.py::test_b", "gpu/test_y.py::test_c")
    features = (
        support.Feature("both", tests),
        support.Feature("one", tests[1:], refused=True),
        support.Feature("sizes", ("test_x.py::test_a",), parameter="width"),
    )
    monkeypatch.setattr(support, "FEATURES", features)
    assert [line[:3] for line in support.table()[1]] == [
        ["both", "yes", "yes"],
        ["one", "", "refused"],
        ["sizes", "8, 128", ""],
    ]


@pytest.mark.usefixtures("tests")
@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("test_x.py::test_gone", "got none of this name"),
        ("test_gone.py::test_a", "got none of this name"),
        ("test_x.py::helper", "got none of this name"),
        ("test_x.py::test_skipped", "expected a test that runs, got @pytest.mark.skip"),
        ("test_x.py::test_failing", "expected a test that runs, got @pytest.mark.xfail"),
    ],
)
def test_what_shows_nothing_is_refused(test, message):
    with pytest.raises(ValueError, match=message):
        support.find(test)
