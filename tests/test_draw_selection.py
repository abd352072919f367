"""The example that draws selections: it runs for all modes and files, and its numbers are right."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from flash_sparse_attn import select_keys

pytest.importorskip("matplotlib")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "draw_selection.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("draw_selection", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mode", ["causal", "shared", "relu"])
def test_every_pattern_and_mode(example, tmp_path, capsys, mode):
    path = tmp_path / "selection.png"
    names = [*example.PATTERNS]
    options = ["--length", "70", "--window", "9", "--keep-recent", "3", "--keep-first", "2"]
    results = example.main(["--mode", mode, *options, "--out", str(path), "--pattern", *names])
    assert path.stat().st_size > 10_000 and len(results["heads"]) == len(names)
    said = capsys.readouterr().out
    assert f"KeySelection({mode}" in said and all(name in said for name in names)


def test_scores_from_a_file(example, tmp_path):
    scores = torch.randn(2, 3, 600)  # more keys than a mask has pixels
    torch.save(scores, tmp_path / "scores.pt")
    path = tmp_path / "selection.svg"
    results = example.main(
        ["--scores", str(tmp_path / "scores.pt"), "--window", "40", "--out", str(path)]
    )
    assert path.read_text(encoding="utf-8").startswith("<?xml")
    for head, facts in enumerate(results["heads"]):
        assert facts == select_keys(scores[:1, head : head + 1], 40).statistics()
    assert results["heads"][0] != results["heads"][1]


def test_other_files_are_refused(example, tmp_path):
    torch.save({"scores": torch.zeros(3)}, tmp_path / "scores.pt")
    with pytest.raises(SystemExit, match=r"--scores: expected a tensor \[Hkv, K\].*got dict"):
        example.main(["--scores", str(tmp_path / "scores.pt")])
