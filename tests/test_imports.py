"""What importing the package brings, and which module may import which."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "flash_sparse_attn"

PUBLIC = {
    "DynamicMaskAttention",
    "KeySelection",
    "WindowCache",
    "__version__",
    "append_kvcache",
    "create_mask",
    "dynamic_mask_attn_func",
    "dynamic_mask_attn_varlen_func",
    "explain_backends",
    "flash_sparse_attn_func",
    "flash_sparse_attn_func_auto",
    "flash_sparse_attn_varlen_func",
    "flash_sparse_attn_with_kvcache_func",
    "flex_sparse_attn_func",
    "get_available_backends",
    "memory_report",
    "prepare_selection",
    "select_keys",
    "triton_sparse_attn_func",
}

# A module imports only from layers above its own in this list; an entry stands for its submodules.
LAYERS = (
    {"_conflicts", "_version", "memory", "plan", "quantize", "reference", "tracing", "varlen"},
    {"intervals"},
    {"checks"},
    {"cache_checks", "problem", "utils", "window_state"},
    {"backends"},
    {"dispatch", "scores", "selection"},
    {"attention"},
    {"compat", "dynamic_mask", "kvcache", "window_cache"},
    {"distributed"},
    {"nn", "integrations"},
    {""},  # the package itself: re-exports the public names
    {"info"},
    {"bench"},
    {"demo"},
    {"quality"},
    {"__main__"},
)
NUMBER = {entry: number for number, layer in enumerate(LAYERS) for entry in layer}
# Parts that are spread over several files; everything else in one layer stands apart.
PARTS = (
    "backends.eager",
    "backends.triton",
    "bench",
    "demo",
    "distributed",
    "integrations",
    "quality",
    "utils",
)


def module_name(path: Path) -> str:
    """'backends.eager' for src/flash_sparse_attn/backends/eager.py; '' for the package itself."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def run_python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that finds `path` first and then the sources."""
    start = f"import sys; sys.path[:0] = {[str(p) for p in (*path, SOURCE)]!r}\n"
    command = [sys.executable, "-c", start + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_public_names_are_pinned():
    package = importlib.import_module("flash_sparse_attn")
    assert set(package.__all__) == PUBLIC
    assert all(hasattr(package, name) for name in PUBLIC)


@pytest.mark.parametrize("name", ["flash_sparse_attn", "flash_dmattn"])
def test_importing_brings_neither_triton_nor_transformers(name):
    code = f"""
import torch
before = set(sys.modules)
import {name}
from {name}.utils.mask import create_mask
new = {{module.partition('.')[0] for module in set(sys.modules) - before}}
heavy = new & {{'triton', 'transformers', 'matplotlib', 'tqdm', 'numpy'}}
assert {name}.__file__.startswith({str(SOURCE)!r}), {name}.__file__
assert not heavy, heavy
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_every_module_but_the_kernels_loads_where_only_torch_is_installed():
    # Modules of integrations need the library they are for, and say so.
    apart = ("backends.triton.", "integrations.", "__main__")
    names = [n for n in MODULES if not n.startswith(apart)]
    code = f"""
import importlib, torch
for absent in ('triton', 'transformers', 'matplotlib', 'tqdm', 'numpy'):
    sys.modules[absent] = None
for name in {names!r}:
    importlib.import_module(('flash_sparse_attn.' + name).rstrip('.'))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("predecessor", ["flash-sparse-attn", "flash_dmattn"])
@pytest.mark.parametrize("package", ["flash_sparse_attn", "flash_dmattn"])
def test_a_predecessor_beside_it_is_refused(tmp_path, predecessor, package):
    folder = tmp_path / f"{predecessor.replace('-', '_')}-1.2.2.dist-info"
    folder.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {predecessor}\nVersion: 1.2.2\n"
    (folder / "METADATA").write_text(metadata)
    done = run_python(f"import {package}", tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: dynamic-mask-attention cannot be used beside")
    name = predecessor.replace("_", "-")
    assert f"{name} 1.2.2" in last and f"pip uninstall {name}" in last


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes except those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from run_time_nodes(node)


def imported_modules(name: str, text: str, is_package: bool = False) -> set[str]:
    """Modules of the package that module `name` imports anywhere, also inside functions."""
    here = name.split(".") if name else []
    package = here if is_package else here[:-1]
    found = set()
    for node in run_time_nodes(ast.parse(text)):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                parents = package[: len(package) - node.level + 1]
                base = ["flash_sparse_attn", *parents, *base]
            wanted = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for target in wanted:
            first, _, rest = target.partition(".")
            if first != "flash_sparse_attn":
                continue
            while rest not in MODULES:  # the last parts may be names inside a module
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found - {name}


def layer_of(name: str) -> int:
    """Layer of the longest entry that `name` starts with."""
    entry = name
    while entry not in NUMBER and "." in entry:
        entry = entry.rpartition(".")[0]
    assert entry in NUMBER, f"module {name!r} is in no layer: add it to LAYERS where it belongs"
    return NUMBER[entry]


def is_allowed(importer: str, imported: str) -> bool:
    if any(importer.startswith(part) and imported.startswith(part) for part in PARTS):
        return True
    return layer_of(imported) < layer_of(importer)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_downwards(name):
    path = MODULES[name]
    found = imported_modules(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    wrong = [module for module in found if not is_allowed(name, module)]
    assert not wrong, f"flash_sparse_attn.{name} may not import {wrong}: see LAYERS"


def test_the_import_rule_can_fail():
    inside = "def f():\n    from ..attention import _problem\n    from .flex import attention\n"
    assert imported_modules("backends.eager", inside) == {"attention", "backends.flex"}
    assert imported_modules("", "from .nn import DynamicMaskAttention", True) == {"nn"}
    assert imported_modules("compat", "import flash_sparse_attn.dispatch as d") == {"dispatch"}
    assert imported_modules("nn", "if TYPE_CHECKING:\n    from . import bench") == set()
    assert not is_allowed("backends.eager", "attention")
    assert not is_allowed("backends.eager", "backends.flex")
    assert is_allowed("attention", "dispatch")
    assert is_allowed("backends.triton.forward", "backends.triton.tiles")


@pytest.mark.parametrize("name", sorted(n for n in MODULES if not n.startswith("backends.triton")))
def test_triton_stays_in_its_folder(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
        assert "triton" not in {imported.partition(".")[0] for imported in names}
