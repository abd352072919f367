"""The benchmark scripts with the predecessors' names: their grids, their options, a small run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flash_sparse_attn import dispatch
from flash_sparse_attn.bench import console, digest, equivalence, grids, performance
from flash_sparse_attn.bench.providers import PROVIDERS, visible_pairs

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (
    "forward_equivalence",
    "backward_equivalence",
    "grad_equivalence",
    "forward_performance",
    "backward_performance",
)


def run_script(name, *arguments):
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


# Grids


def test_the_equivalence_grid_is_complete():
    cases = grids.equivalence()
    assert len(cases) == 72 and len({case.name for case, _ in cases}) == 72
    assert Counter(case.length for case, _ in cases) == dict.fromkeys(
        (128, 256, 512, 1024, 2048, 4096), 12
    )
    assert {case.head_dim for case, _ in cases} == {32, 64, 96, 128, 192, 256}
    assert sum(causal for _, causal in cases) == 36
    assert all((c.batch, c.heads, c.kv_heads, c.window) == (1, 2, 1, 1024) for c, _ in cases)


@pytest.mark.parametrize("head_dim", grids.HEAD_DIMS)
def test_the_forward_grid_is_complete(head_dim):
    cases = grids.forward_performance(head_dim)
    kinds = Counter(case.name.split("-")[1] for case in cases)
    assert kinds == {"train": 8, "infer": 12, "batch": 4, "heads": 4, "dim": 6, "window": 11}
    assert len({case.name for case in cases}) == len(cases) == 45
    named = {case.name: case for case in cases}
    decode = named[f"forward-infer-524288-d{head_dim}"]
    assert (decode.queries, decode.length, decode.window) == (1, 524288, 1024)
    assert named[f"forward-heads-8-2-d{head_dim}"].shape.startswith("B1 H8 Hkv2 N4096")
    assert named[f"forward-window-32-d{head_dim}"].length == 32768
    assert all(case.what == "forward" and case.mask == "pairs" for case in cases)


def test_the_backward_grid_is_complete():
    cases = grids.backward_performance(64)
    kinds = Counter(case.name.split("-")[1] for case in cases)
    assert kinds == {"train": 7, "batch": 4, "heads": 4, "dim": 4, "window": 10}
    assert len({case.name for case in cases}) == len(cases) == 29
    assert all(case.what == "attention" for case in cases)
    of_the_readme = [case for case in grids.backward_performance(128) if case.length == 32768]
    assert len(of_the_readme) == 1 + 11


# Equivalence


def small(window=1024):
    case, causal = grids.equivalence(window)[0]
    return replace(case, length=40, head_dim=8, device="cpu", dtype="float32", window=8), causal


@pytest.mark.parametrize("causal", [True, False])
def test_a_configuration_agrees(causal):
    case, _ = small()
    found = equivalence.compare(case, causal, "ours", 1e-3, seed=42)
    assert list(found) == ["out", "query", "key", "value", "scores"]
    assert all(part.passes(1.0) for part in found.values())
    forward = equivalence.compare(replace(case, what="forward"), causal, "ours", 1e-3, seed=42)
    assert list(forward) == ["out"]


def test_the_mask_keeps_the_best_past_keys():
    case, _ = small()
    inputs = equivalence._with_created_mask(equivalence.make_inputs(case), case, False)
    rows = visible_pairs(inputs, case.window)[0, 0].sum(-1)
    assert rows.tolist() == [min(t + 1, 8) for t in range(40)]


def test_one_wrong_element_is_enough_to_fail():
    truth = torch.randn(4, 5, dtype=torch.float64)
    right = equivalence.Comparison.of(truth.float(), truth, truth.float(), 1e-3)
    assert right.passes(1.0) and right.inside == 1.0
    value = truth.float()
    value[2, 3] += 0.01
    wrong = equivalence.Comparison.of(value, truth, truth.float(), 1e-3)
    assert wrong.worst == (2, 3) and wrong.inside == 0.95
    assert not wrong.passes(1.0)
    assert not wrong.passes(0.95)  # the error rule knows no exceptions
    value[1, 1] = torch.nan
    assert not equivalence.Comparison.of(value, truth, truth.float(), 1e-3).passes(0.9)


def test_a_wrong_backend_fails_the_script(monkeypatch, capsys):
    right = PROVIDERS["ours"]
    wrong = replace(right, attend=lambda inputs, mask: 1.1 * right.attend(inputs, mask))
    monkeypatch.setitem(PROVIDERS, "ours", wrong)
    arguments = ["--config", "128-d32-causal", "--test-type", "ours", "--device", "cpu"]
    assert equivalence.main("", False, arguments) == 1
    printed = capsys.readouterr().out
    assert "DIFFERS" in printed and "0 of 1 comparisons agree" in printed


@pytest.mark.parametrize("name", SCRIPTS[:2])
def test_equivalence_scripts_on_their_smallest_configuration(name, tmp_path):
    out = tmp_path / "rows.jsonl"
    done = run_script(
        name, "--config", "128-d32*", "--device", "cpu", "--verbose", "--out", str(out)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "comparisons agree" in done.stdout and "DIFFERS" not in done.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["provider"] for row in rows} >= {"ours", "eager"}
    gradients = {"query", "key", "value", "scores"} if name.startswith("backward") else set()
    for row in rows:
        assert row["agrees"] and set(row["inside"]) == {"out"} | gradients
        assert set(row["inside"].values()) == {1.0}
        assert row["command"].startswith(f"python benchmarks/{name}.py --config")
        assert row["hardware"]["device"] == "cpu" and row["versions"] and row["commit"]


def test_the_gradient_script(tmp_path):
    out = tmp_path / "rows.jsonl"
    done = run_script("grad_equivalence", "--verbose", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("agrees") == 6
    (row,) = (json.loads(line) for line in out.read_text().splitlines())
    tensors = ["out", "query", "key", "value", "dt_proj", "A"]
    assert row["agrees"] and row["inside"] == dict.fromkeys(tensors, 1.0)
    assert all(row["errors"][name] <= row["allowed"][name] for name in tensors)
    assert row["command"] == "python benchmarks/grad_equivalence.py --verbose"
    assert not digest.is_stale(row)


def test_the_gradient_script_sees_a_wrong_gradient(monkeypatch, capsys, tmp_path):
    right = equivalence.dynamic_mask_attn_func

    def wrong(query, key, value, scores, window):
        return right(query, key, value, scores.detach(), window)

    monkeypatch.setattr(equivalence, "dynamic_mask_attn_func", wrong)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        equivalence.gradients_main("", [])
    monkeypatch.setattr(
        equivalence,
        "dynamic_mask_attn_func",
        lambda *arguments: right(*arguments[:3], 1.001 * arguments[3], arguments[4]),
    )
    out = tmp_path / "rows.jsonl"
    assert equivalence.gradients_main("", ["--out", str(out)]) == 1
    assert "DIFFERS" in capsys.readouterr().out
    row = json.loads(out.read_text())
    assert not row["agrees"] and row["inside"]["out"] < 1
    assert row["errors"]["out"] > row["allowed"]["out"]


# Performance


@pytest.mark.parametrize("name", SCRIPTS[3:])
def test_performance_scripts_on_their_smallest_configuration(name, tmp_path):
    out = tmp_path / "rows.jsonl"
    options = ["--device", "cpu", "--dtype", "float32", "--head-dim", "64", "--runs", "1"]
    kinds = ["*-train-256-*", "*-infer-256-*"]
    done = run_script(
        name, *options, "--test-type", "sdpa-vs-eager", "--config", *kinds, "--out", str(out)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    cases = 2 if name.startswith("forward") else 1
    assert Counter(row["provider"] for row in rows) == {
        "sdpa-additive": cases,
        "sdpa-causal": cases,
        "ours-eager": cases,
    }
    for row in rows:
        assert row["mask"] == "pairs" and row["mask_seconds"] > 0 and row["visible_pairs"] > 0
        assert ("backward" in row["seconds"]) is name.startswith("backward")
        assert row["building"] and row["peak_bytes"] is not None and row["errors"]["out"] < 1e-4
        assert row["repeats"] == 1
    assert "in no total" in done.stdout


def test_every_test_type_names_providers():
    assert {name for names in performance.TEST_TYPES.values() for name in names} <= set(PROVIDERS)


def test_the_configurations_can_be_listed(capsys):
    assert performance.main("", grids.forward_performance, ["--list"]) == 0
    # The six head dimensions are the same in both.
    assert len(capsys.readouterr().out.splitlines()) == 45 + 45 - 6
    assert performance.main("", grids.forward_performance, ["--config", "nothing"]) == 2
    assert "no configuration is called nothing" in capsys.readouterr().out


def test_one_problem_under_several_names_is_measured_once(monkeypatch, tmp_path):
    measured, out = [], tmp_path / "rows.jsonl"
    monkeypatch.setattr(performance, "verify_isolated", lambda case, name: {"out": 0.0})
    monkeypatch.setattr(
        performance, "take", lambda case, *_, **__: measured.append(case.name) or measured_of(case)
    )
    names = ["forward-train-4096-d64", "forward-batch-1-d64", "forward-batch-2-d64"]
    arguments = ["--device", "cpu", "--test-type", "ours", "--config", *names, "--out", str(out)]
    assert performance.main("", grids.forward_performance, arguments) == 0
    assert measured == [names[0], names[2]]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"] for row in rows] == names
    assert [row["shape"]["batch"] for row in rows] == [1, 1, 2]


def test_a_missing_backend_is_named(capsys):
    if not dispatch.explain_backends()["triton"]:
        pytest.skip("the triton backend runs here")
    arguments = ["--test-type", "triton", "--config", "*256*"]
    assert performance.main("", grids.forward_performance, arguments) == 2
    assert "backend 'triton' is not available" in capsys.readouterr().out
    assert equivalence.main("", False, ["--test-type", "triton"]) == 2


@pytest.mark.parametrize("backward", [None, False])
def test_nothing_is_begun_after_the_time(backward, monkeypatch, capsys, tmp_path):
    """Of two, the first takes all the time; its row is written and the other is named."""
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    out = tmp_path / "rows.jsonl"
    common = ["--device", "cpu", "--dtype", "float32", "--seconds", "5", "--out", str(out)]

    def slow(function):
        def call(*arguments, **options):
            clock[0] += 6.0
            return function(*arguments, **options)

        return call

    if backward is None:
        monkeypatch.setattr(performance, "take", slow(lambda case, *_, **__: measured_of(case)))
        arguments = ["--test-type", "ours", "--config", "*-train-256-d64", "*-infer-256-d64"]
        status = performance.main("", grids.forward_performance, [*arguments, *common])
    else:
        monkeypatch.setattr(equivalence, "compare", slow(equivalence.compare))
        arguments = ["--test-type", "ours", "--config", "128-d32*"]
        status = equivalence.main("", backward, [*arguments, *common])
    assert status == 0
    assert "--seconds 5: no time was left for 1 of 2" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 1


def measured_of(case):
    seconds = {"forward": 1.0, "total": 1.0}
    about = {"repeats": 1, "warm": True, "timing": {"forward": "calls"}, "peak_bytes": 1}
    return {"seconds": seconds, "spread": [1.0, 1.0], "visible_pairs": 9, **about}


# On a CPU, without saying what


@pytest.mark.parametrize(
    ("name", "chosen", "known", "longest"),
    [
        ("forward_equivalence", 20, 72, 2048),
        ("backward_equivalence", 20, 72, 2048),
        ("forward_performance", 7, 84, 4096),
        ("backward_performance", 2, 66, 512),
    ],
)
def test_scripts_take_short_configurations_on_a_cpu_and_say_so(
    name, chosen, known, longest, monkeypatch, capsys
):
    """All that they choose is compared or measured, here by what does nothing."""
    taken = []
    monkeypatch.setattr(performance, "verify_isolated", lambda case, name: {"out": 0.0})

    def measured(case, name, **options):
        assert set(options) == {"repeats", "warmup", "seed"}
        taken.append((case, name))
        raise RuntimeError("not measured")

    def compared(case, causal, name, tolerance, seed):
        taken.append((case, name))
        return {"out": equivalence.Comparison(0.0, 0.0, 1e-5, 1.0, (0,))}

    monkeypatch.setattr(performance, "take", measured)
    monkeypatch.setattr(equivalence, "compare", compared)
    arguments = ["--device", "cpu"]
    if name.endswith("performance"):
        performance.main("", getattr(grids, name), arguments)
    else:
        assert equivalence.main("", name.startswith("backward"), arguments) == 0
    printed = capsys.readouterr().out
    start = f"On a CPU: the eager backend, float32, and the {chosen} short ones of {known} config"
    assert printed.startswith(start)
    cases = {case.name: case for case, _ in taken}
    assert len(cases) == chosen and max(case.length for case in cases.values()) == longest
    assert {case.device for case in cases.values()} == {"cpu"}
    assert {case.dtype for case in cases.values()} == {"float32"}
    sides = {"sdpa-additive", "sdpa-causal", "ours-eager"}
    assert {side for _, side in taken} == (sides if name.endswith("performance") else {"eager"})
    if name.endswith("equivalence"):  # some leave keys out
        assert any(case.window < case.length for case in cases.values())


def test_on_a_cpu_options_still_choose_everything(monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(performance, "verify_isolated", lambda case, name: {"out": 0.0})
    monkeypatch.setattr(
        performance, "take", lambda case, name, **_: taken.append((case, name)) or 1 / 0
    )
    arguments = ["--device", "cpu", "--config", "*window-32-d64", "--dtype", "bfloat16"]
    arguments += ["--test-type", "ours"]
    assert performance.main("", grids.forward_performance, arguments) == 1
    printed = capsys.readouterr().out
    assert "On a CPU" not in printed
    assert "ours on forward-window-32-d64: ZeroDivisionError: division by zero" in printed
    ((case, name),) = taken
    assert (case.length, case.dtype, name) == (32768, "bfloat16", "ours")
