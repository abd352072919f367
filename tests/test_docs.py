"""The documentation: programs run, links lead somewhere, tables and pictures are up to date."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pages import PAGES, ROOT, snippets
from test_imports import PUBLIC

from flash_sparse_attn.bench import equivalence, grids, store
from flash_sparse_attn.bench.cases import CASES

# README_zh.md has the programs of README.md, see below.
PROGRAMS = {
    place: code
    for page in PAGES
    if page != "README_zh.md"
    for place, code in snippets(page).items()
}
TRANSLATED = ("README.md", "README_zh.md")


def load(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("place", PROGRAMS)
def test_program_runs(place):
    code = PROGRAMS[place]
    if "transformers" in code:
        pytest.importorskip("transformers", "5.17")
    if 'device="cuda"' in code and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    page, _, line = place.rpartition(":")
    # Empty lines before it make a traceback show the line of the page.
    compiled = compile("\n" * (int(line) - 1) + code, str(ROOT / page), "exec")
    torch.manual_seed(0)
    exec(compiled, {"__name__": "__snippet__"})


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def slugs(text: str) -> set[str]:
    """The anchors of a page: its headings as GitHub and MyST name them, and explicit ones."""
    headings = re.findall(r"^#{1,6} (.+)$", prose(text), re.MULTILINE)
    named = {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }
    return named | set(re.findall(r"^\((.+)\)=$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    words = re.sub(r"`[^`]*`", "", prose(PAGES[page]))
    for target in re.findall(r"\]\(([^)\s]+)\)", words):
        if re.match(r"https://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.resolve().is_file(), f"{page}: {target}"
        if anchor:
            assert anchor in slugs(path.read_text(encoding="utf-8")), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_rows_of_a_table_have_equal_length(page):
    """A bar in code splits a cell, too, unless it is written with a backslash."""
    for table in re.findall(r"(?:^\|.*\|$\n)+", prose(PAGES[page]), re.MULTILINE):
        rows = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(set(rows)) == 1, table


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    """Files of this project that are named in code: paths with a folder of the project in front."""
    folders = "benchmarks|docs|examples|results|scripts|src|tests"
    for name in re.findall(rf"(?<![\w/.])((?:{folders})/[\w./]+\.\w+)", PAGES[page]):
        assert (ROOT / name).is_file(), f"{page}: {name}"


def test_named_tests_exist():
    for page, text in PAGES.items():
        for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
            functions = {
                node.name
                for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
                if isinstance(node, ast.FunctionDef)
            }
            assert name in functions, f"{page}: {file}::{name}"


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_public_name_is_in_the_reference(name):
    entry = rf"^\.\. auto(?:function|class):: {name}$"
    assert re.search(entry, PAGES["docs/api_reference.md"], re.MULTILINE)


def test_objects_of_the_reference_exist():
    entries = re.findall(r"^\.\. auto\w+:: ([\w.]+)$", PAGES["docs/api_reference.md"], re.MULTILINE)
    for entry in entries:
        module, _, name = entry.rpartition(".")
        if "integrations" in module:
            pytest.importorskip("transformers", "5.17")
        if module:
            assert hasattr(importlib.import_module(module), name), entry


def test_every_page_is_in_the_index():
    index = PAGES["docs/index.md"]
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", index, re.MULTILINE | re.DOTALL)
    listed = [line for tree in trees for line in tree.splitlines() if line and line[0] != ":"]
    assert sorted(listed) == sorted(
        Path(page).stem for page in PAGES if page.startswith("docs/") and page != "docs/index.md"
    )


def test_tables_are_those_of_the_rows(capsys):
    tables = load(ROOT / "scripts" / "tables.py")
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_figures_are_files_of_the_rows_and_nothing_else(tmp_path, monkeypatch, capsys):
    tables = load(ROOT / "scripts" / "tables.py")
    assert {path.name for path in tables.FIGURES.iterdir()} == set(tables.pictures())
    monkeypatch.setattr(tables, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(tables, "pages", list)
    assert tables.main(["--check"]) == 1 and "length.svg: not what" in capsys.readouterr().out
    assert tables.main([]) == 0 and tables.main(["--check"]) == 0
    drawn = tmp_path / "figures" / "length.svg"
    assert drawn.read_bytes() == (ROOT / "docs" / "figures" / "length.svg").read_bytes()
    monkeypatch.setattr(tables, "all_rows", lambda name: [])
    assert tables.main(["--check"]) == 1 and drawn.is_file()
    assert tables.main([]) == 0 and not drawn.is_file()
    assert tables.figures(tables.Words(Path("docs/performance.md"))) == ["no rows yet"]


def test_tables_of_known_rows(tmp_path, monkeypatch):
    tables = load(ROOT / "scripts" / "tables.py")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)

    def row(provider: str, total: float, run: str) -> str:
        parts = {"selection": 1e-4, "forward": 0.2, "backward": 0.3} if provider == "ours" else {}
        facts = {
            "case": "gpu-x",
            "provider": provider,
            "pattern": "random",
            "shape": dict(batch=1, heads=4, kv_heads=2, length=64, head_dim=16, window=8),
            "dtype": "bfloat16",
            "repeats": 7,
            "peak_bytes": None,
            "errors": {"out": 1e-3},
            "seconds": {**parts, "total": total},
            "hardware": {"device": "cuda", "gpu": "G"},
            "versions": {"torch": "2.0", "triton": "3.0"},
            "commit": "abc",
            "command": f"run {run}",
            "time": f"2026-01-0{run}T00:00:00",
        }
        return json.dumps(facts)

    # Every row says with which kernels it was measured: for now all are the present ones.
    monkeypatch.setattr(tables.table_parts, "is_stale", lambda row: False)
    rows = [row("ours", 9.0, "1"), row("ours", 0.5, "2"), row("sdpa-causal", 1.0, "2")]
    (tmp_path / "h200.jsonl").write_text("\n".join(rows))
    lines = tables.headline(tables.Words(Path("README.md")))
    cells = ["64, 8", "4 / 2, 16", "100 µs", "200 ms", "300 ms", "500 ms", "1.00 s (2.00 times)"]
    assert lines[2] == "| " + " | ".join(cells) + " |"
    assert "commit abc, 2026-01-02: `run 2`" in lines[4]

    # Of another run: no ratio.
    (tmp_path / "h200.jsonl").write_text("\n".join([*rows, row("sdpa-causal", 1.0, "3")]))
    assert tables.headline(tables.Words(Path("README.md")))[2].endswith("| 1.00 s |")

    # Ours is of older kernels: its total has a sign, which is explained below the table.
    monkeypatch.setattr(tables.table_parts, "is_stale", lambda row: row["provider"] == "ours")
    lines = tables.headline(tables.Words(Path("README.md")))
    assert lines[2].endswith("| 500 ms † | 1.00 s |") and lines[4].startswith(
        "† of a run with other kernels"
    )
    lines = tables.everything(tables.Words(Path("docs/measurements.md")))
    assert [line.count("†") for line in lines if line.startswith("| gpu-x")] == [1, 0]
    (tmp_path / "h200.jsonl").unlink()
    assert tables.headline(tables.Words(Path("README_zh.md"))) == ["尚无数据"]


def test_tables_of_the_predecessors_grids(tmp_path, monkeypatch):
    """Every configuration has its line; ratios are those of one pass, within one run."""
    tables = load(ROOT / "scripts" / "tables.py")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables.table_parts, "is_stale", lambda row: False)
    words = tables.Words(Path("docs/measurements.md"))
    makers = {
        "forward": tables.TABLES["predecessors-forward"],
        "inference": tables.TABLES["predecessors-inference"],
        "backward": tables.TABLES["predecessors-backward"],
    }
    assert all(make(words) == ["no rows yet"] for make in makers.values())
    facts = {
        "hardware": {"device": "cuda", "gpu": "G"},
        "versions": {"torch": "2.0", "triton": "3.0"},
        "commit": "abc",
        "command": "run 1",
        "time": "2026-01-01T00:00:00+00:00",
    }

    def row(case, provider):
        times = 1.0 if provider == "ours" else 3.0
        seconds = {"forward": times, "backward": 2 * times, "total": 3 * times}
        measured = {"seconds": seconds, "visible_pairs": 9}
        return json.dumps(store.make_row(case, provider, measured, {"out": 0.0}, facts))

    cases = [case for dim in (64, 128) for case in grids.forward_performance(dim)]
    cases += [case for dim in (64, 128) for case in grids.backward_performance(dim)]
    rows = [row(case, provider) for case in cases for provider in ("ours", "sdpa-additive")]
    (tmp_path / "predecessors.jsonl").write_text("\n".join(rows))
    count = {"forward": 84 - 24, "inference": 24, "backward": 66}
    for name, make in makers.items():
        lines = make(words)
        assert len([line for line in lines if line.endswith("times) |")]) == count[name]
        assert "not measured" not in "".join(lines) and lines[-1].endswith("`run 1`")
    first = makers["backward"](words)[2]
    cells = ["train-256-d64", "1, 2 / 1, 64", "256 x 256, 1024", "2.00 s", "6.00 s (3.00 times)"]
    assert first == "| " + " | ".join(cells) + " |"
    (tmp_path / "predecessors.jsonl").write_text("\n".join(rows[:6]))
    assert "57 configurations were not measured." in makers["forward"](words)
    assert tables.everything(words) == ["no rows yet"]  # they have their own


def test_the_table_of_faster_peers_counts_every_row_of_one_run(tmp_path, monkeypatch):
    tables = load(ROOT / "scripts" / "tables.py")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables.table_parts, "is_stale", lambda row: False)
    words = tables.Words(Path("docs/performance.md"))
    assert tables.faster_peers(words) == ["no rows yet"]

    def row(case: str, provider: str, seconds: float, what: str, **more: str) -> str:
        parts = {"forward": seconds, "backward": 2 * seconds, "total": 3 * seconds}
        facts = {"case": case, "provider": provider, "what": what, "seconds": parts}
        facts |= {"hardware": {"device": "cuda"}, "time": "now", "command": "run 1"}
        return json.dumps(facts | more)

    whole, forward = (store.WHAT[what] for what in ("attention", "forward"))
    rows = [row(f"gpu-{n}", "ours", 1.0, whole) for n in (1, 2, 3)]
    rows += [row("gpu-1", "sdpa-causal", 0.5, whole), row("gpu-2", "sdpa-causal", 0.8, whole)]
    rows += [row("gpu-3", "sdpa-causal", 2.0, whole), row("gpu-3", "flex", 2.0, whole)]
    rows += [row("gpu-2", "flex", 0.1, whole, command="run 2")]  # not beside ours
    rows += [row("gpu-mask", side, 1.0, whole, mask="pairs") for side in ("ours", "sdpa-additive")]
    (tmp_path / "h200.jsonl").write_text("\n".join(rows))
    grid = [row("forward-1", side, 1.0, forward) for side in ("ours", "sdpa-additive")]
    grid += [row("backward-1", "ours", 1.0, whole), row("backward-1", "sdpa-causal", 0.25, whole)]
    (tmp_path / "predecessors.jsonl").write_text("\n".join(grid))
    assert tables.faster_peers(words)[2:] == [
        f"| {whole} | dense causal SDPA | 2 of 3 | gpu-1 | 2.00 times |",
        f"| {whole} | FlexAttention | 0 of 1 |  |  |",
        "| bool masks, forward + backward | SDPA, mask and bias added up | 0 of 1 |  |  |",
        "| predecessors' grids, forward | SDPA, mask and bias added up | 0 of 1 |  |  |",
        "| predecessors' grids, backward | dense causal SDPA | 1 of 1 | backward-1 | 4.00 times |",
    ]


def test_table_of_equivalence(tmp_path, monkeypatch):
    tables = load(ROOT / "scripts" / "tables.py")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    words = tables.Words(Path("docs/measurements.md"))
    assert tables.TABLES["equivalence"](words) == ["no rows yet"]
    out = tmp_path / "equivalence.jsonl"
    arguments = ["--config", "128-d32-causal", "--test-type", "ours", "--device", "cpu"]
    for backward in (False, True):
        assert equivalence.main("", backward, [*arguments, "--out", str(out)]) == 0
    _, _, forward, backward, *_ = tables.TABLES["equivalence"](words)
    assert forward.startswith("| 128-d32-causal | ours | forward | float32 | 0.")
    assert forward.endswith("|  | 100.00% | agrees |")
    assert "| forward + backward | float32 | 0." in backward and "|  |" not in backward


def test_tables_of_windows_and_of_decoding(tmp_path, monkeypatch):
    tables = load(ROOT / "scripts" / "tables.py")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables.table_parts, "is_stale", lambda row: False)
    words = tables.Words(Path("docs/performance.md"))
    assert tables.windows(words) == tables.decoding(words) == ["no rows yet"]
    facts = {
        "hardware": {"device": "cuda", "gpu": "G"},
        "versions": {"torch": "2.0", "triton": "3.0"},
        "commit": "abc",
        "command": "run 1",
        "time": "2026-01-01T00:00:00+00:00",
    }
    rows = []
    names = ["gpu-a", "gpu-b", *(name for name in CASES if name.startswith("gpu-window-"))]
    for name in names:
        seconds = {"selection": 1.0, "forward": 1.0, "backward": 1.0, "total": 3.0}
        measured = {"seconds": seconds, "l2_cache": "cold"}
        rows.append(store.make_row(CASES[name], "ours", measured, {"out": 0.0}, facts))
    for provider, size, seconds in (("ours", 1 << 20, 1e-5), ("sdpa-causal", 1 << 30, 1e-3)):
        measured = {
            "seconds": {"forward": seconds, "total": seconds},
            "l2_cache": "cold",
            "cache_bytes": size,
        }
        case = CASES["gpu-decode-131072"]
        rows.append(store.make_row(case, provider, measured, {"out": 0.0}, facts))
    (tmp_path / "h200.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [line.split(" |")[0] for line in tables.windows(words)[2:10]]
    assert found == [f"| 32768, {2**n}" for n in range(5, 13)]
    headline = [line.split(" |")[0] for line in tables.headline(words)[2:4]]
    assert headline == ["| 32768, 1024", "| 32768, 2048"]
    cells = ["131,072", "8", "32 / 8, 128", "2048", "cold", "10.0 µs", "1.00 MiB"]
    assert tables.decoding(words)[2] == (
        "| " + " | ".join([*cells, "1.00 ms (100 times)", "1.00 GiB"]) + " |"
    )


def test_tables_of_quality(tmp_path, monkeypatch):
    tables = load(ROOT / "scripts" / "tables.py")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables.table_parts, "is_stale", lambda row: False)
    words = tables.Words(Path("docs/quality.md"))
    recall, text = (tables.TABLES[f"quality-{name}"] for name in ("recall", "text"))
    assert recall(words) == text(words) == ["no rows yet"]

    def row(case: str, kind: str, seed: int, **results: float) -> str:
        facts = {
            "case": case,
            "provider": kind,
            "seed": seed,
            "results": results,
            "steps": 20,
            "train_samples": 1280,
            "shape": {"batch": 64},
            "curve": [[step, 8.0 / step] for step in range(1, 101)],
            "hardware": {"device": "cuda", "gpu": "G"},
            "versions": {"torch": "2.0", "triton": "3.0"},
            "commit": "abc",
            "command": "run 1",
            "time": "2026-01-01T00:00:00+00:00",
        }
        return json.dumps(facts)

    rows = [
        row("recall-1", "full", 0, accuracy=0.1),
        row("recall-1", "full", 0, accuracy=0.5),
        row("recall-1", "full", 1, accuracy=0.75),
        row("recall-1", "dynamic", 0, accuracy=0.25),
        row("text-1", "window", 0, bits_per_byte=1.5, late_bits_per_byte=1.25),
    ]
    (tmp_path / "quality.jsonl").write_text("\n".join(rows))
    lines = recall(words)
    assert lines[2] == "| recall-1 | 20 | 1,280 | 2 | 0.625 (0.500 .. 0.750) |  | 0.250 |  |"
    assert "commit abc, 2026-01-01: `run 1`" in lines[4] and len(lines) == 5
    lessons = [{"steps": 200, "batch": 64, "length": 32, "pairs": 16}]
    taught = json.loads(row("recall-2", "full", 0, accuracy=1.0)) | {"curriculum": lessons}
    more = taught | {"curriculum": lessons * 2, "results": {"accuracy": 0.5}}
    (tmp_path / "quality.jsonl").write_text(
        "\n".join([*rows, json.dumps(taught), json.dumps(more)])
    )
    lines = recall(words)
    assert "| 200 × 16 pairs in 32, 200 × 16 pairs in 32 | 0.500 |" in lines[4]
    assert lines[2].startswith("| recall-1 | 20 | 1,280 | 2 | none | 0.625")
    assert lines[3] == "| recall-2 | 20 | 1,280 | 1 | 200 × 16 pairs in 32 | 1.000 |  |  |  |"
    (tmp_path / "quality.jsonl").write_text("\n".join(rows))
    lines = text(words)
    assert [line for line in lines if line.startswith("| text-1")] == [
        "| text-1 | 20 | 1,280 | 1 |  | 1.250 |  |  |",
        "| text-1 | 20 | 1,280 | 1 |  | 1.500 |  |  |",
    ]
    assert sum("run 1" in line for line in lines) == 1

    assert tables.figures(words, of="curve-") == [
        "![Training loss, recall-1](figures/curve-recall-1-1.svg)",
        "",
        "![Training loss, text-1](figures/curve-text-1-1.svg)",
    ]
    assert tables.figures(words) == ["no rows yet"]
    (tmp_path / "quality.jsonl").write_text("\n".join([*rows, json.dumps(taught)]))
    higher = json.loads(rows[2]) | {"curve": [[step, 24.0 / step] for step in range(1, 101)]}
    known = [json.loads(line) for line in rows] + [taught, more, higher]
    drawn = tables.quality_tables.charts(known, "curve")
    assert list(drawn) == [f"curve-{n}-1" for n in ("recall-1", "text-1")] + [
        "curve-recall-2-1",
        "curve-recall-2-2",
    ]
    lines = drawn["curve-recall-1-1"].lines
    assert list(lines) == ["full attention", "dynamic mask, causal"]
    assert len(lines["full attention"]) == 25 and lines["full attention"][-1] == (100, 0.16)
    assert drawn["curve-recall-1-1"].notes[0] == "20 steps of 64, seeds 0, 1"


def test_the_table_of_runs(tmp_path, monkeypatch):
    """One line for every command, with the time of its last row; none if a row does not say."""
    tables = load(ROOT / "scripts" / "tables.py")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    words = tables.Words(Path("docs/measurements.md"))
    assert tables.runs(words) == ["no rows yet"]

    def row(case: str, command: str, **more: float) -> str:
        facts = {"hardware": {"device": "cuda", "gpu": "G"}, "commit": "abc", "command": command}
        facts |= {"versions": {"torch": "2.0", "triton": "3.0"}, "time": "2026-01-01T00:00:00"}
        return json.dumps({"case": case, "provider": "ours", **facts, **more})

    rows = [
        row("a", "old"),
        row("a", "run", elapsed_seconds=3.0),
        row("b", "run", elapsed_seconds=412.4),
        row("c", "other", elapsed_seconds=9.0),
        row("d", "other"),
    ]
    (tmp_path / "h200.jsonl").write_text("\n".join(rows))
    assert tables.runs(words)[2:] == [
        "| `run` | h200.jsonl | G | abc, 2026-01-01 | 2 | 412 s |",
        "| `other` | h200.jsonl | G | abc, 2026-01-01 | 2 |  |",
    ]


def test_pictures_are_those_of_the_selections():
    pictures = load(ROOT / "docs" / "draw_pictures.py")
    assert pictures.outdated() == []
    drawn = {path.name for path in pictures.PICTURES.iterdir()}
    assert drawn == set(pictures.DRAW)
    for name in drawn:
        assert any(f"pictures/{name}" in text for text in PAGES.values()), name


def test_both_languages_have_the_same_programs():
    """Comments are translated, nothing else."""
    programs = [[ast.dump(ast.parse(code)) for code in snippets(p).values()] for p in TRANSLATED]
    assert programs[0] == programs[1]


def test_both_languages_have_the_same_structure_and_figures():
    """As many sections, the same states of architectures, the same numbers, code and links."""
    english, chinese = (PAGES[page] for page in TRANSLATED)
    levels = [re.findall(r"^(#+) ", text, re.MULTILINE) for text in (english, chinese)]
    assert levels[0] == levels[1]
    words = {"仅编译": "compiled only", "已运行": "run", "尚未": "not yet"}
    rows = re.findall(r"^\| ((?:SM|gfx)[ \d.]+) \|.*\| (.+) \|$", chinese, re.MULTILINE)
    expected = re.findall(r"^\| ((?:SM|gfx)[ \d.]+) \|.*\| (.+) \|$", english, re.MULTILINE)
    assert [(name, words[state]) for name, state in rows] == expected
    number = r"(?<![\dA-Za-z.])\d+(?:\.\d+)*(?![\dA-Za-z])"
    for pattern in (number, r"`[^`\n]+`", r"\]\(([^)]+)\)"):
        found = [set(re.findall(pattern, prose(text))) for text in (english, chinese)]
        assert sorted((found[0] ^ found[1]) - set(TRANSLATED)) == []  # each links to the other


@pytest.mark.skipif(
    not all(
        importlib.util.find_spec(name) for name in ("sphinx", "myst_parser", "furo", "transformers")
    ),
    reason="needs the packages of the extras 'docs' and 'transformers'",
)
def test_the_site_builds(tmp_path):
    """Every warning is an error: names, links and docstrings that do not parse."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
