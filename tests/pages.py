"""The pages of the documentation, and the Python programs in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        *sorted(ROOT.glob("README*.md")),
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}


def snippets(page: str) -> dict[str, str]:
    """Every block of a page that is marked as Python, by 'page:first line'."""
    found = {}
    for match in re.finditer(r"^```python\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL):
        line = PAGES[page].count("\n", 0, match.start(1)) + 1
        found[f"{page}:{line}"] = match.group(1)
    return found
