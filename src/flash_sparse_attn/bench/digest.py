"""Which rows are out of date: a digest of the sources that decide what a call costs.

A backend's sources are its own modules and everything of this package that these import. Comments,
docstrings and empty lines do not count: who rewords them need not measure again.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
BACKENDS = ("triton", "flex", "eager")
WHY_STALE = "of a run with other kernels than the present ones, or that does not name its kernels"
"""What a sign at a stale row stands for."""
_DIGITS = 12


def backend_of(provider: str, device: str) -> str:
    """The backend behind a provider.

    Args:
        provider: ``"ours"``, ``"ours-NAME"`` or, in rows that are not about time, ``"NAME"``;
            others share their run with ``"ours"``.
        device: ``"cpu"`` or ``"cuda"``.
    """
    name = provider.removeprefix("ours-")
    if name in BACKENDS:
        return name
    return "triton" if device == "cuda" else "eager"


@functools.cache
def kernels_digest(backend: str, package: Path = PACKAGE) -> str:
    """Twelve hexadecimal digits that change with the sources of a backend, one of `BACKENDS`."""
    whole = hashlib.sha256()
    for path in sources(backend, package):
        whole.update(f"{path.relative_to(package).as_posix()}\n".encode())
        whole.update(code_of(path.read_text(encoding="utf-8")).encode())
    return whole.hexdigest()[:_DIGITS]


def sources(backend: str, package: Path = PACKAGE) -> list[Path]:
    """The files of a backend and, transitively, those of the package that they import."""
    folder = package / "backends"
    found: set[Path] = set()
    new = {*folder.glob(f"{backend}*.py"), *(folder / backend).glob("*.py")}
    while new:
        found |= new
        new = {target for path in new for target in _imported(path, package)} - found
    return sorted(found)


def code_of(text: str) -> str:
    """Source text without comments, docstrings, empty lines and spaces at the ends of lines."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        # A string alone is a docstring, that of a name as well.
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue
        begin, end = node.lineno - 1, node.end_lineno or node.lineno
        if isinstance(node.value.value, str) and not lines[begin][: node.col_offset].strip():
            lines[begin:end] = [""] * (end - begin)
    return "".join(f"{line.rstrip()}\n" for line in lines if line.strip())


def _imported(path: Path, package: Path) -> Iterator[Path]:
    """The modules of the package that a file imports when it runs, also inside functions."""
    for node in _run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for target in (base, *(base / alias.name for alias in node.names)):
                # The package's own front only lists public names.
                front = [] if target == package else [target / "__init__.py"]
                yield from (file for file in (target.with_suffix(".py"), *front) if file.is_file())


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes except those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from _run_time_nodes(node)


def is_stale(row: dict[str, Any]) -> bool:
    """Whether a row was measured with other kernels than those of the present sources.

    A row that does not say with which is stale. What others computed does not depend on them.
    """
    if "kernels" not in row:
        return True
    provider = row["provider"]
    if "seconds" in row and provider != "ours" and not provider.startswith("ours-"):
        return False
    return row["kernels"] != kernels_digest(backend_of(provider, row["hardware"]["device"]))
