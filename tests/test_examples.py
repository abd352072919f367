"""The examples in tiny sizes: they run, and what they write is there and makes sense."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():  # of what they import
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers", "5.17", reason="needs Transformers 5.17")
    pytest.importorskip("accelerate", reason="the Trainer needs it")
pytestmark = pytest.mark.filterwarnings("ignore")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example by name; returns its numbers."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def call(name: str, *arguments: str) -> dict[str, Any]:
        module = importlib.import_module(name)
        results = module.main(["--quick", "--device", "cpu", "--out", str(tmp_path), *arguments])
        written = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert {"hardware", "versions", "commit"} < set(written)
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert written["dtype"] == "fp32"
        return results

    yield call
    for name in ("common", *(path.stem for path in EXAMPLES.glob("*.py"))):
        sys.modules.pop(name, None)


def test_training_and_generating_with_what_was_trained(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results = run("train_doge")
    assert results["after"] < results["before"] - 0.1
    heads = {(row["layer"], row["head"]) for row in results["selections"]}
    assert len(heads) == 4
    again = run("long_generation", "--model", str(tmp_path / "doge"))
    first, last = again["ours"][0], again["ours"][-1]
    assert last["context"] > first["context"] and last["cache_bytes"] == first["cache_bytes"]
    assert len(first["text"]) == len(again["plain"][0]["text"]) == 4
    said = capsys.readouterr().out
    assert "Held-out loss" in said and "times the context a token takes" in said


def test_continuing_sparsely(run, capsys):
    pytest.importorskip("matplotlib")
    results = run("continue_sparse", "--score-factor", "1", "10")
    curves = results["curves"]
    assert len(curves) == 1 + 2 * 3
    assert all(curve[-1]["loss"] < curve[0]["loss"] for curve in curves.values())
    # Before training, scores choose the newest keys, so that it depends on their number alone.
    assert (
        curves["32 keys by score, score rate x1"][0]
        == curves["32 keys by score, score rate x10"][0]
    )
    assert "right after" in capsys.readouterr().out
