"""The examples in tiny sizes: they run, and what they write is there and makes sense."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
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


def test_the_text_is_of_installed_sources(monkeypatch):
    """Every tenth file is held out, and the tokeniser, trained on the others, loses nothing."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    common = importlib.import_module("common")
    sources = list(common._sources(300_000))
    text = common.read_text(0.3, 400, 64)
    assert text.files == len(sources) > 10 and len(text.tokenizer) == 400
    for tokens, files in (
        (text.train, [source for i, source in enumerate(sources) if i % 10 != 9]),
        (text.held_out, sources[9::10]),
    ):
        wanted = "".join(source + common.END for source in files)
        found = text.tokenizer.decode(tokens.flatten(), clean_up_tokenization_spaces=False)
        # Behind whole sequences the rest is cut off, perhaps within a character.
        assert len(found) > 100 and wanted.startswith(found[:-4])
    sys.modules.pop("common")


def test_one_command_shows_its_progress(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, EXAMPLES / "long_generation.py", "--quick", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent / "src")}
    done = subprocess.run(
        [*command, "--out", tmp_path], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "tokens read" in done.stderr and "[########################]" in done.stderr
    assert "plain: a token" in done.stdout and str(tmp_path / "long_generation.png") in done.stdout


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
