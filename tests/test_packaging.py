"""Sizes of files and signatures, metadata, and what installing the package would bring."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_imports import PUBLIC

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
FILES = {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
EXTRAS_FOR_ANY_TORCH = ["triton", "transformers", "bench", "demo", "docs", "dev"]
EXTRAS = {"interpreter", *EXTRAS_FOR_ANY_TORCH}
OBJECTS = sorted(PUBLIC - {"__version__"})
PROJECT_FILES = (
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
    "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    ".github/ISSUE_TEMPLATE/bug_report.yml",
    "src/flash_sparse_attn/py.typed",
    "src/flash_dmattn/py.typed",
)


@pytest.mark.parametrize("name", FILES)
def test_files_stay_readable(name):
    text = FILES[name].read_text(encoding="utf-8")
    limit = 500 if "@triton.jit" in text or "@gluon.jit" in text else 400
    lines = len(text.splitlines())
    assert lines <= limit, f"{name} has {lines} lines, the limit is {limit}"


@pytest.mark.parametrize("name", FILES)
def test_syntax_is_that_of_the_oldest_python(name):
    ast.parse(FILES[name].read_text(encoding="utf-8"), feature_version=(3, 10))


def options_of(function: object) -> list[str]:
    """Arguments beyond the tensors; max_seqlen_q and max_seqlen_k describe packed tensors."""
    tensors = ("Tensor", "Mask", "KeySelection")
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if not any(name in str(parameter.annotation) for name in tensors)
        and not parameter.name.startswith("max_seqlen_")
    ]


@pytest.mark.parametrize("name", OBJECTS)
def test_public_signatures_stay_short(name):
    public = getattr(importlib.import_module("flash_sparse_attn"), name)
    functions = [public]
    if inspect.isclass(public):
        members = inspect.getmembers(public, inspect.isfunction)
        functions += [f for f_name, f in members if not f_name.startswith("_")]
    for function in functions:
        options = options_of(function)
        assert len(options) <= 10, f"{function.__qualname__} has {len(options)}: {options}"


@pytest.mark.parametrize("name", OBJECTS)
def test_public_names_are_documented(name):
    doc = getattr(importlib.import_module("flash_sparse_attn"), name).__doc__
    assert doc and len(doc.split()) > 5


def requirements_of(extra: str) -> list[str]:
    """What an extra asks for; '' stands for the package itself."""
    pattern = rf"^{extra or 'dependencies'} = (\[.*?\])$"
    match = re.search(pattern, PYPROJECT, re.MULTILINE | re.DOTALL)
    assert match, f"pyproject.toml states nothing for {extra!r}"
    return ast.literal_eval(match.group(1))


def test_the_package_itself_needs_torch_alone_with_a_lower_bound_only():
    (only,) = requirements_of("")
    assert re.fullmatch(r"torch>=[\d.]+", only)


def test_metadata_states_what_is_promised():
    assert 'requires-python = ">=3.10"' in PYPROJECT
    for python in PYTHONS:
        assert f'"Programming Language :: Python :: {python}"' in PYPROJECT
    extras = PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE)) == EXTRAS


def test_version_is_the_same_everywhere():
    from flash_sparse_attn import __version__

    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{__version__}]" in changelog or "## [Unreleased]" in changelog


@pytest.mark.parametrize("name", PROJECT_FILES)
def test_expected_files_are_there(name):
    assert (ROOT / name).is_file()


@pytest.fixture(scope="module")
def package_index() -> None:
    """Skip where pip is missing, or too old to look without downloading, or reaches no index."""
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs pip, which is not installed here")
    if tuple(map(int, version.split(".")[:2])) < (23, 3):
        pytest.skip(f"needs pip 23.3, found {version}, which downloads wheels to look at them")
    options = ["--timeout", "5", "--retries", "0"]
    command = [sys.executable, "-m", "pip", "index", "versions", "setuptools", *options]
    if subprocess.run(command, capture_output=True, timeout=60).returncode:
        pytest.skip("needs a package index, and none answers")


@pytest.mark.heavy
@pytest.mark.usefixtures("package_index")
def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    """Built from a copy, because the tree may hold the remains of older builds."""
    copy = tmp_path / "copy"
    shutil.copytree(SOURCE, copy / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*command, str(copy)], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"dynamic_mask_attention-[\d.]+-py3-none-any\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    content = {name for name in names if ".dist-info/" not in name}
    assert content == {*FILES, "flash_sparse_attn/py.typed", "flash_dmattn/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.heavy
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("extras", [[], ["interpreter"], EXTRAS_FOR_ANY_TORCH], ids=",".join)
@pytest.mark.usefixtures("package_index")
def test_dependencies_resolve(tmp_path, python, extras):
    """A dry run, which reads descriptions and downloads no wheels."""
    # The interpreter's Triton is for CPU builds; the index has CUDA builds, which bring their own.
    wanted = requirements_of("") if extras != ["interpreter"] else []
    wanted += [item for extra in extras for item in requirements_of(extra)]
    options = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--python-version", python]
    options += ["--use-feature=fast-deps", "--quiet", "--target", str(tmp_path), "--report", "-"]
    command = [sys.executable, "-m", "pip", "install", *options, *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = {item["metadata"]["name"].lower() for item in json.loads(done.stdout)["install"]}
    names = {re.split(r"[><=;]", item)[0].strip() for item in wanted}
    assert names <= {name.replace("_", "-") for name in found}
