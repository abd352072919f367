"""Predecessors as providers: their environment, the gate, and the same timing, with a stand-in."""

from __future__ import annotations

import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flash_sparse_attn import __main__
from flash_sparse_attn.bench import measure, performance, predecessors, store
from flash_sparse_attn.bench.cases import CASES
from flash_sparse_attn.bench.grids import forward_performance
from flash_sparse_attn.bench.providers import PROVIDERS, WrongResult

# What a predecessor's function does, by plain PyTorch.
STAND_IN = """
import torch
import torch.nn.functional as F

def {auto}(backend=None):
    assert backend is None
    return attend

def attend(query, key, value, attn_mask=None, attn_bias=None, softmax_scale=None, is_causal=None):
    assert attn_mask.dtype == torch.bool and attn_bias.dtype == query.dtype
    q, k = query.shape[1], key.shape[1]
    seen = attn_mask & torch.ones(q, k, dtype=torch.bool).tril(k - q) if is_causal else attn_mask
    bias = attn_bias.masked_fill(~seen, -torch.inf)
    bias = bias.repeat_interleave(query.shape[2] // bias.shape[1], dim=1)
    heads = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(*heads, attn_mask=bias, enable_gqa=True)
    return {factor} * out.transpose(1, 2)
"""
SMOKE = CASES["cpu-smoke"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Callable[..., str]:
    """An environment with this one's torch and stand-ins; the function installs one."""
    folder = tmp_path_factory.mktemp("predecessors")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))

    def install(module: str, version: str = "1.2.2", factor: float = 1.0) -> str:
        package = site / module
        package.mkdir(exist_ok=True)
        content = STAND_IN.format(auto=f"{module}_func_auto", factor=factor)
        (package / "__init__.py").write_text(content)
        for old in site.glob(f"{module}-*"):
            (old / "METADATA").unlink()
            old.rmdir()
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        name = predecessors.DISTRIBUTIONS[module]
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata)
        return str(folder / "bin" / "python")

    return install


pytestmark = pytest.mark.skipif(
    sysconfig.get_platform().startswith("win"), reason="environments have other folders there"
)


@pytest.mark.parametrize("module", predecessors.DISTRIBUTIONS)
def test_a_predecessor_is_measured_like_the_others(module, environment, tmp_path, monkeypatch):
    monkeypatch.setenv(predecessors.INTERPRETER, environment(module))
    name, path = predecessors.DISTRIBUTIONS[module], tmp_path / "rows.jsonl"
    sides = ["--provider", name, "--provider", "sdpa-masked"]
    arguments = ["bench", "run", "--case", "cpu-smoke", *sides, "--repeats", "2"]
    assert __main__.main([*arguments, "--out", str(path)]) == 0
    theirs, masked = store.read_rows(path)
    assert theirs["provider"] == name and masked["provider"] == "sdpa-masked"
    # The same function of the same inputs: equal errors, equal parts, timed in the same way.
    assert theirs.keys() == masked.keys()
    assert theirs["errors"] == masked["errors"] and set(theirs["errors"]) >= {"out", "scores"}
    assert theirs["seconds"].keys() == masked["seconds"].keys()
    assert theirs["timing"] == masked["timing"] and theirs["repeats"] == masked["repeats"] == 2
    assert theirs["versions"][name] == "1.2.2"
    assert theirs["versions"]["torch"] == torch.__version__ and name not in masked["versions"]


def test_a_wrong_predecessor_is_refused(environment, monkeypatch):
    monkeypatch.setenv(predecessors.INTERPRETER, environment("flash_dmattn", factor=1.01))
    with pytest.raises(WrongResult, match="flash-dmattn on cpu-smoke: out is off by"):
        measure.verify_isolated(SMOKE, "flash-dmattn")


def test_a_given_mask_is_handed_over(environment, monkeypatch):
    monkeypatch.setenv(predecessors.INTERPRETER, environment("flash_dmattn"))
    small = {"length": 40, "head_dim": 8, "window": 8, "device": "cpu", "dtype": "float32"}
    case = measure.replace(forward_performance()[8], **small)
    assert case.mask == "pairs" and case.queries == 1
    assert set(measure.verify_isolated(case, "flash-dmattn")) == {"out"}
    found = measure.measure_isolated(case, "flash-dmattn", repeats=1)
    assert found["visible_pairs"] == 2 * 8 and found["mask_seconds"] > 0


def test_one_process_does_many_jobs_until_one_fails(environment, monkeypatch):
    monkeypatch.setenv(predecessors.INTERPRETER, environment("flash_dmattn"))
    job = {"case": measure.asdict(SMOKE), "provider": "flash-dmattn"}
    assert predecessors.ask(job, keep=True)["errors"] == predecessors.ask(job, keep=True)["errors"]
    started = predecessors._start.cache_info()
    assert (started.hits, started.currsize) == (1, 1)
    with pytest.raises(RuntimeError, match="KeyError: 'provider'"):
        predecessors.ask({"case": job["case"]}, keep=True)
    assert predecessors._start.cache_info().currsize == 0


def test_an_old_or_missing_one_is_named(environment, monkeypatch):
    python = environment("flash_dmattn", version="1.1.0")
    monkeypatch.setenv(predecessors.INTERPRETER, python)
    with pytest.raises(RuntimeError, match=r"flash-dmattn 1\.1\.0 is too old: 1\.2\.1 or newer"):
        measure.verify_isolated(SMOKE, "flash-dmattn")
    site = next(Path(python).parents[1].glob("lib/python*/site-packages"))
    for old in site.glob("flash_dmattn-*"):
        (old / "METADATA").unlink()
        old.rmdir()
    with pytest.raises(RuntimeError, match=r"has no flash-dmattn: .* -m pip install flash-dmattn"):
        measure.verify_isolated(SMOKE, "flash-dmattn")


@pytest.mark.parametrize(
    ("value", "found"), [(None, "it is not set"), ("/nowhere/python", "which is no program")]
)
def test_without_an_environment_it_says_how_to_make_one(value, found, monkeypatch, capsys):
    monkeypatch.delenv(predecessors.INTERPRETER, raising=False)
    if value:
        monkeypatch.setenv(predecessors.INTERPRETER, value)
    arguments = ["bench", "run", "--case", "cpu-smoke", "--provider", "flash-dmattn"]
    assert __main__.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: predecessors run in an environment of their own" in printed
    assert f"{predecessors.INTERPRETER} has to name its interpreter, but" in printed
    assert found in printed and "python -m venv DIR" in printed
    options = ["--test-type", "predecessors", "--config", "*-256-*", "--device", "cpu"]
    assert performance.main("", forward_performance, options) == 2
    assert f"--test-type predecessors: {predecessors.missing()}" in capsys.readouterr().out


def test_they_train_the_bias_and_build_a_mask():
    for module, name in predecessors.DISTRIBUTIONS.items():
        assert PROVIDERS[name].module == module and PROVIDERS[name].trains_bias
        assert PROVIDERS[name].extra_bytes(SMOKE) == 512 * 512


def test_a_script_measures_those_that_are_installed(environment, monkeypatch, tmp_path, capsys):
    python = environment("flash_dmattn")
    site = next(Path(python).parents[1].glob("lib/python*/site-packages"))
    for old in site.glob("flash_sparse_attn-*"):
        (old / "METADATA").unlink()
        old.rmdir()
    monkeypatch.setenv(predecessors.INTERPRETER, python)
    path = tmp_path / "rows.jsonl"
    options = [
        "--test-type",
        "predecessors",
        "--config",
        "forward-infer-256-d64",
        "--device",
        "cpu",
    ]
    options += ["--runs", "1", "--warmup", "1", "--out", str(path)]
    assert performance.main("", lambda *_: forward_performance(), options) == 0
    assert [row["provider"] for row in store.read_rows(path)] == ["ours", "flash-dmattn"]
    (site / "flash_dmattn-1.2.2.dist-info" / "METADATA").unlink()
    (site / "flash_dmattn-1.2.2.dist-info").rmdir()
    assert performance.main("", lambda *_: forward_performance(), options) == 2
    assert "has no flash-sparse-attn or flash-dmattn" in capsys.readouterr().out
