"""Digests of kernel sources: what they cover, what changes them, and which rows are stale."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flash_sparse_attn import __main__
from flash_sparse_attn.bench import digest, equivalence, store
from flash_sparse_attn.bench.cases import CASES


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package's sources, to be edited."""
    copy = tmp_path / "package"
    shutil.copytree(digest.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def digests(package: Path) -> dict[str, str]:
    digest.kernels_digest.cache_clear()
    return {backend: digest.kernels_digest(backend, package) for backend in digest.BACKENDS}


def names(backend: str) -> set[str]:
    return {p.relative_to(digest.PACKAGE).as_posix() for p in digest.sources(backend)}


def test_sources_are_the_backend_and_what_it_imports():
    folder = digest.PACKAGE / "backends" / "triton"
    kernels = {f"backends/triton/{path.name}" for path in folder.glob("*.py")}
    found = names("triton")
    assert found >= kernels | {"intervals.py", "plan.py", "problem.py"}
    assert {"backends/eager.py", "backends/eager_select.py", "problem.py"} <= names("eager")
    assert "backends/flex.py" in names("flex")
    # Neither the public front nor what calls the backends, nor documentation or measurement.
    for backend in digest.BACKENDS:
        others = {name.split("/")[0] for name in names(backend)}
        assert not others & {"__init__.py", "attention.py", "nn.py", "bench", "integrations"}
    assert not {name for name in found if name.startswith("backends/eager")}


def test_a_copy_has_the_same_digest_and_a_changed_kernel_another(package):
    before = digests(package)
    assert before == digests(digest.PACKAGE) and len(set(before.values())) == 3
    with (package / "backends/triton/reduce.py").open("a") as file:
        file.write("WIDTH = 64\n")
    after = digests(package)
    assert after["triton"] != before["triton"] and after["eager"] == before["eager"]


def test_what_is_imported_counts_and_what_is_not_does_not(package):
    before = digests(package)
    for name in ("nn.py", "bench/cases.py", "attention.py"):
        with (package / name).open("a") as file:
            file.write("NUMBER = 1\n")
    assert digests(package) == before
    with (package / "problem.py").open("a") as file:
        file.write("NUMBER = 1\n")
    after = digests(package)
    assert all(after[backend] != before[backend] for backend in digest.BACKENDS)


def test_words_for_people_do_not_count(package):
    before = digests(package)
    path = package / "problem.py"
    edit(path, '"""', '"""Said otherwise. ')
    with path.open("a") as file:
        file.write("\n\n# a remark\n   \n")
    assert digests(package) == before


def test_code_of_keeps_what_runs():
    code = 'x = "# no comment"\nclass A:\n    y = 1\n    z = """\n# text\n"""\n'
    text = code.replace('comment"', 'comment"  # one\n').replace("A:", 'A:\n    "doc"\n')
    assert text.count("# one") == text.count("doc") == 1
    assert digest.code_of(f'"""Doc,\nlong."""\n{text}\n\n') == code
    assert digest.code_of("class A: 'doc'\n") == "class A: 'doc'\n"


@pytest.mark.parametrize(
    ("provider", "device", "backend"),
    [
        ("ours", "cuda", "triton"),
        ("ours", "cpu", "eager"),
        ("ours-cuda", "cuda", "triton"),
        ("ours-eager", "cuda", "eager"),
        ("ours-flex", "cuda", "flex"),
        ("sdpa-causal", "cuda", "triton"),
    ],
)
def test_the_backend_of_a_provider(provider, device, backend):
    assert digest.backend_of(provider, device) == backend


def row(provider: str, **fields) -> dict:
    facts = {"case": "cpu-smoke", "provider": provider, "seconds": {"total": 1.0}, "commit": "abc"}
    return {**facts, "hardware": {"device": "cpu"}, **fields}


def test_stale_rows():
    now = digest.kernels_digest("eager")
    assert not digest.is_stale(row("ours", kernels=now))
    assert digest.is_stale(row("ours", kernels="0" * 12))
    assert digest.is_stale(row("ours"))
    assert digest.is_stale(row("ours-triton", kernels=now))
    # Others' code is the same whatever our kernels are; but a row has to say.
    assert not digest.is_stale(row("sdpa-causal", kernels="0" * 12))
    assert digest.is_stale(row("sdpa-causal"))
    # A training is no measurement of SDPA: all its rows are of this package.
    training = {key: value for key, value in row("window").items() if key != "seconds"}
    assert digest.is_stale({**training, "kernels": "0" * 12})
    assert not digest.is_stale({**training, "kernels": now})


def test_every_kind_of_row_has_a_digest():
    facts = store.run_facts("cpu")
    assert facts["kernels"] == digest.kernels_digest("eager")
    measured = {"seconds": {"total": 1.0}}
    smoke = CASES["cpu-smoke"]
    for provider, backend in (("ours", "eager"), ("ours-flex", "flex"), ("sdpa-causal", "eager")):
        made = store.make_row(smoke, provider, measured, {"out": 0.0}, facts)
        assert made["kernels"] == digest.kernels_digest(backend)
        assert not digest.is_stale(made)
    made = equivalence._row(smoke, True, "flex", {}, 1e-3, True, facts)
    assert made["kernels"] == digest.kernels_digest("flex") and not digest.is_stale(made)


def test_status_lists_stale_rows(tmp_path, capsys, monkeypatch):
    path = tmp_path / "results" / "rows.jsonl"
    old, new = "0" * 12, digest.kernels_digest("eager")
    store.append_rows(
        path,
        [
            row("ours", case="again", kernels=old),  # superseded by the last one
            row("ours", case="changed", kernels=old, commit="def"),
            row("ours", case="unknown"),
            row("ours", case="again", kernels=new),
        ],
    )
    assert __main__.main(["bench", "status", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{path}: 2 of 3 rows are stale\n")
    lines = [line.split() for line in printed.splitlines()]
    assert ["changed", "ours", "def", old] in lines
    assert ["unknown", "ours", "abc", "not", "stated"] in lines and "again" not in printed
    monkeypatch.chdir(tmp_path)
    assert __main__.main(["bench", "status"]) == 0
    assert "2 of 3" in capsys.readouterr().out
    assert __main__.main(["bench", "status", "nowhere"]) == 2
    assert "no file nowhere" in capsys.readouterr().err
