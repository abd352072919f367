"""Every Python snippet of the documentation runs as it stands, and what it names exists."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def snippets() -> dict[str, str]:
    """Every block marked as Python, by 'file:first line'."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start(1)) + 1
            found[f"{page.relative_to(ROOT).as_posix()}:{line}"] = match.group(1)
    return found


SNIPPETS = snippets()


@pytest.mark.parametrize("place", SNIPPETS)
def test_snippet_runs(place):
    if "transformers" in SNIPPETS[place]:
        with warnings.catch_warnings():  # of what it imports
            warnings.simplefilter("ignore")
            pytest.importorskip("transformers", "5.17")
    page, _, line = place.rpartition(":")
    # Empty lines before it make a traceback show the line of the page.
    code = compile("\n" * (int(line) - 1) + SNIPPETS[place], str(ROOT / page), "exec")
    exec(code, {"__name__": "__snippet__"})


MAIN_USES = (
    "dynamic_mask_attn_func",
    "select_keys",
    "DynamicMaskAttention",
    "make_cache",
    "flash_sparse_attn_func",
    "apply_to_doge",
    "convert",
)


@pytest.mark.parametrize("name", MAIN_USES)
def test_readme_shows_the_main_uses(name):
    shown = [code for place, code in SNIPPETS.items() if place.startswith("README.md")]
    assert any(name in code for code in shown)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_named_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)(?:NO_VENV=1 )?make ([a-z-]+)", text, re.MULTILINE))
    assert named and named <= targets


@pytest.mark.parametrize("architecture", ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"])
def test_readme_says_how_each_architecture_was_tried(architecture):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    row = rf"^\| SM {re.escape(architecture)} \|.*\| (run|compiled only|not yet) \|$"
    assert re.search(row, text, re.MULTILINE)
