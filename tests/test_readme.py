"""What the README shows, and that the commands it names exist."""

from __future__ import annotations

import re

import pytest
from pages import PAGES, ROOT, snippets

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
    assert any(name in code for code in snippets("README.md").values())


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_named_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    text = PAGES[page]
    named = set(re.findall(r"(?:^|`)(?:NO_VENV=1 )?make ([a-z-]+)", text, re.MULTILINE))
    assert named and named <= targets


@pytest.mark.parametrize("architecture", ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"])
def test_readme_says_how_each_architecture_was_tried(architecture):
    text = PAGES["README.md"]
    row = rf"^\| SM {re.escape(architecture)} \|.*\| (run|compiled only|not yet) \|$"
    assert re.search(row, text, re.MULTILINE)
