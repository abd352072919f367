"""Figures of rows: what each shows, which rows it takes, and the same bytes every time."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from flash_sparse_attn import __main__
from flash_sparse_attn.bench import figures, roof, store
from flash_sparse_attn.bench.cases import CASES, Case
from flash_sparse_attn.bench.chart import Chart
from flash_sparse_attn.bench.grids import backward_performance, forward_performance

FACTS = {
    "hardware": {"device": "cuda", "gpu": "G", "cpu": "C"},
    "versions": {"torch": "2.0"},
    "commit": "abc",
    "time": "2026-01-01T00:00:00+00:00",
    "kernels": "0" * 12,
}
BASE = Case("base", "attention", 1, 4, 2, 4096, 64, 256, dtype="bfloat16", device="cuda")


def row(case: Case, provider: str = "ours", seconds: float = 1.0, peak: int = 1 << 20) -> dict:
    passes = ["forward"] + ["backward"] * (case.what == "attention")
    parts = {name: seconds / len(passes) for name in passes}
    measured = {"seconds": {**parts, "total": seconds}, "peak_bytes": peak}
    return store.make_row(case, provider, measured, {"out": 0.0}, FACTS)


def at(**sizes) -> Case:
    return replace(BASE, name="-".join(f"{k}{v}" for k, v in sizes.items()), **sizes)


LENGTHS = [
    row(at(length=n), seconds=n / 4096, peak=1 << (10 + i))
    for i, n in enumerate((4096, 8192, 16384))
]


def test_length_takes_rows_that_differ_in_length_alone():
    others = [
        row(at(length=4096), "sdpa-causal", 2.0),
        row(at(length=16384), "sdpa-causal", 32.0),
        row(at(length=8192, window=512), seconds=7.0),
        row(at(length=2048, heads=8), seconds=7.0),
        row(replace(at(length=32768), pattern="equal", name="equal"), seconds=7.0),
        row(replace(at(length=32768), dtype="float16", name="half"), seconds=7.0),
        row(at(length=65536), "ours-eager", 7.0),
        {**row(at(length=65536), seconds=7.0), "hardware": {"device": "cuda", "gpu": "H"}},
    ]
    chart = figures.FIGURES["length"]([*others, *LENGTHS])
    assert chart.lines == {
        "ours": [(4096, 1.0), (8192, 2.0), (16384, 4.0)],
        "sdpa-causal": [(4096, 2.0), (16384, 32.0)],
    }
    assert chart.notes[0] == "batch 1, heads 4, KV heads 2, head dim 64, window 256, bfloat16"
    assert chart.notes[1] == "G, torch 2.0; commit abc"


def test_a_figure_of_stale_rows_says_so():
    old = {**LENGTHS[0], "kernels": "0" * 12}
    for name in ("length", "memory", "roofline"):
        assert len(figures.FIGURES[name](LENGTHS).notes) == 2
        assert (
            "other kernels than the present ones"
            in figures.FIGURES[name]([old, *LENGTHS[1:]]).notes[2]
        )


def test_a_later_row_replaces_an_earlier_one():
    chart = figures.FIGURES["length"]([*LENGTHS, row(at(length=8192), seconds=5.0)])
    assert chart.lines["ours"][1] == (8192, 5.0)


def test_memory_is_that_of_the_same_rows():
    chart = figures.FIGURES["memory"](LENGTHS)
    assert chart.lines == {"ours": [(4096, 1024), (8192, 2048), (16384, 4096)]}
    assert figures.FIGURES["memory"]([{**r, "peak_bytes": None} for r in LENGTHS]) is None


def test_windows_and_contexts_of_the_predecessors_grids_are_drawn():
    rows = [row(case, provider) for case in forward_performance() for provider in case.providers]
    window = figures.FIGURES["window"](rows)
    assert set(window.lines) == {"ours", "sdpa-additive", "sdpa-causal", "flex"}
    assert [x for x, _ in window.lines["ours"]] == [2**n for n in range(5, 16)]
    assert "length 32768" in window.notes[0]
    decode = figures.FIGURES["decode"](rows)
    assert [x for x, _ in decode.lines["flex"]] == [2**n for n in range(8, 20)]
    # Decoding is not in the figure of whole texts.
    length = figures.FIGURES["length"](rows)
    assert [x for x, _ in length.lines["ours"]] == [2**n for n in range(8, 16)]
    backward = [row(case) for case in backward_performance()]
    assert figures.FIGURES["decode"](backward) is None
    assert len(figures.FIGURES["window"](backward).lines["ours"]) == 10


def test_the_cases_fill_every_figure():
    rows = [
        row(case, provider)
        for case in CASES.values()
        if case.device == "cuda"
        for provider in case.providers
    ]
    lines = {name: chart(rows).lines for name, chart in figures.FIGURES.items()}
    for name in ("length", "memory"):
        assert [x for x, _ in lines[name]["ours"]] == [2**n for n in range(11, 21)]
        assert [x for x, _ in lines[name]["sdpa-causal"]] == [2**n for n in range(11, 18)]
    for name in ("ours", "sdpa-causal"):
        assert [x for x, _ in lines["window"][name]] == [2**n for n in range(5, 13)]
        assert [x for x, _ in lines["decode"][name]] == [2**n for n in range(13, 21)]
    assert set(lines["roofline"]) == {"ours, forward", "ours, backward", "ours, decoding step"}


def test_a_warm_cache_is_a_line_of_its_own():
    warm = [{**r, "case": f"{r['case']}-warm", "l2_cache": "warm"} for r in LENGTHS[:2]]
    cold = [{**r, "l2_cache": "cold"} for r in LENGTHS]
    faster = [{**r, "seconds": {"total": 0.1, "forward": 0.1}} for r in warm]
    chart = figures.FIGURES["length"]([*cold, *faster])
    assert chart.lines == {"ours": [(4096, 1.0), (8192, 2.0), (16384, 4.0)]}


def test_the_roofline_has_decoding_and_the_slope_of_copying():
    step = replace(BASE, name="step", what="decode", query_length=1)
    limits = {"ceilings": {"bytes_per_second": 4e12, "flops_per_second": 8e14}}
    chart = figures.FIGURES["roofline"]([row(step) | limits, row(step, "sdpa-causal") | limits])
    ((intensity, speed),) = chart.lines["ours, decoding step"]
    assert intensity == pytest.approx(step.flops() / step.pass_bytes()["forward"])
    assert speed == pytest.approx(step.flops() / 1e12) and 1 < intensity < 4
    assert chart.bounds == {"copy": [(intensity, 4 * intensity), (200.0, 800.0)]}
    assert chart.svg().count('stroke-dasharray="6 4"') == 3
    ElementTree.fromstring(chart.svg())


def test_the_roofline_is_work_over_bytes_of_each_pass():
    case = at(length=4096)
    found = {
        **row(case),
        "seconds": {"selection": 9.0, "forward": 1.0, "backward": 5.0, "total": 15.0},
    }
    fast = row(at(length=8192), "sdpa-causal", 2.0)
    chart = figures.FIGURES["roofline"]([found, fast])
    forward, backward = 4 * 64 * case.pairs(), 10 * 64 * case.pairs()
    traffic = case.pass_bytes()
    (place,) = chart.lines["ours, forward"]
    assert place == pytest.approx((forward / traffic["forward"], forward / 1e12))
    (place,) = chart.lines["ours, backward"]
    assert place == pytest.approx((backward / traffic["backward"], backward / 5e12))
    # The fastest pass of all is one of dense attention: two of seven parts of the work forward.
    dense = 14 * 64 * at(length=8192).pairs(dense=True)
    assert chart.ceilings == {
        "fastest pass of all: sdpa-causal, backward": pytest.approx(dense * 10 / 14 / 1e12)
    }
    assert not chart.is_connected
    # What the machine reached, where rows say so: the best of them.
    limits = [
        {"bytes_per_second": 4e12, "flops_per_second": 7e14},
        {"bytes_per_second": 3e12, "flops_per_second": 8e14},
    ]
    rows = [{**found, "ceilings": limits[0]}, {**fast, "ceilings": limits[1]}]
    chart = figures.FIGURES["roofline"](rows)
    assert chart.ceilings["matrix product"] == 800.0
    assert "A copy reached 4 TB/s: at more than 200 operations" in chart.notes[-1]


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setitem(roof._SIZES, "cpu", (1 << 20, 64))
    seconds = iter([9.0, 4.0, 5.0, 5.0, 5.0, 5.0, 1.0, 2.0, 0.5, 2.0, 2.0, 2.0])
    times = (t for s in seconds for t in (0.0, s))
    monkeypatch.setattr(roof.time, "perf_counter", lambda: next(times))
    # The first run of each is left out, the best of the others counts.
    assert roof.ceilings("cpu") == {
        "bytes_per_second": (2 << 20) / 4.0,
        "flops_per_second": 2 * 64**3 / 0.5,
    }


def test_passes_and_what_is_given_make_the_least_traffic():
    for case in (BASE, replace(BASE, what="forward"), replace(BASE, mask="pairs", bias="pairs")):
        passes = case.pass_bytes()
        assert list(passes) == ["forward", "backward"][: 1 + (case.what == "attention")]
        given = case.min_bytes() - sum(passes.values())
        assert given == (3 * 4 * 2 * 4096 if case.mask == "selection" else 2 * 4096**2)
        assert figures.case_of(row(case)).pass_bytes() == passes
    assert replace(BASE, what="selection").pass_bytes() == {}


@pytest.mark.parametrize("name", figures.FIGURES)
def test_without_rows_there_is_no_figure(name):
    assert figures.FIGURES[name]([]) is None


def test_the_same_rows_give_the_same_bytes(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    store.append_rows(path, LENGTHS)
    for name in ("length", "memory", "roofline"):
        drawn = []
        for number in range(2):
            out = tmp_path / f"{name}{number}.svg"
            arguments = ["bench", "plot", str(path), "--figure", name, "--out", str(out)]
            assert __main__.main(arguments) == 0
            drawn.append(out.read_bytes())
        assert drawn[0] == drawn[1]
        ElementTree.fromstring(drawn[0])  # well formed
    arguments = ["bench", "plot", str(path), "--figure", "decode", "--out", str(out)]
    assert __main__.main(arguments) == 2
    assert "no rows of cases * for the figure 'decode'" in capsys.readouterr().err


def test_places_are_logarithmic_and_inside():
    chart = Chart(
        "a < b & c", "x", "y", {"one": [(1, 1.0), (2, 10.0), (4, 100.0)], "dot": [(2, 3)]}
    )
    text = chart.svg()
    ElementTree.fromstring(text)
    places = [
        tuple(map(float, found)) for found in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)
    ]
    (x0, y0), (x1, y1), (x2, y2), _ = places
    assert x1 - x0 == pytest.approx(x2 - x1) and x0 < x1
    assert y0 - y1 == pytest.approx(y1 - y2) and y0 > y1
    assert "a &lt; b &amp; c" in text
    assert text.count("<circle") == 4 and text.count('stroke-width="2"') == 1
