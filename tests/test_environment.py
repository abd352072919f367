"""The script behind `make demo` and `make test`: what it chooses, and what it says if it cannot."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def env(monkeypatch):
    spec = importlib.util.spec_from_file_location("env_script", ROOT / "scripts" / "env.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "env_script", module)
    spec.loader.exec_module(module)
    for name in ("TORCH_SPEC", "NO_VENV"):
        monkeypatch.delenv(name, raising=False)
    return module


def on_linux(env, monkeypatch, torch_version, driver):
    monkeypatch.setattr(env.sys, "platform", "linux")
    monkeypatch.setattr(env, "installed_torch", lambda: torch_version)
    monkeypatch.setattr(env, "has_nvidia_driver", lambda: driver)
    return env.choose_torch()


def test_versions_compare_as_numbers(env):
    assert env.version_tuple("2.11.0+cu130") == (2, 11, 0) > env.version_tuple("2.6.0")
    assert env.version_tuple("2.12.0a0+git1234") >= env.version_tuple(env.torch_bound())
    assert env.version_tuple("2.5.1") < env.version_tuple(env.torch_bound())


def test_torch_at_hand_satisfies_the_bound(env):
    assert env.version_tuple(torch.__version__) >= env.version_tuple(env.torch_bound())


@pytest.mark.parametrize("driver", [False, True])
def test_installed_torch_is_used_if_new_enough(env, monkeypatch, driver):
    assert on_linux(env, monkeypatch, "2.11.0+cu130", driver).arguments == []


@pytest.mark.parametrize("found", [None, "2.5.1"])
def test_without_driver_only_a_cpu_build_is_installed(env, monkeypatch, found):
    chosen = on_linux(env, monkeypatch, found, False)
    assert chosen.arguments == [env.CPU_TORCH] and chosen.arguments[0].endswith("+cpu")


def test_with_driver_the_default_build_is_installed(env, monkeypatch):
    assert on_linux(env, monkeypatch, None, True).arguments == [f"torch>={env.torch_bound()}"]


def test_torch_spec_overrides(env, monkeypatch):
    monkeypatch.setenv("TORCH_SPEC", "torch==2.9.1 --index-url 'https://example.org/a b'")
    chosen = on_linux(env, monkeypatch, "2.11.0", True)
    assert chosen.arguments == ["torch==2.9.1", "--index-url", "https://example.org/a b"]


def test_no_cpu_build_is_an_error_and_never_a_cuda_build(env, monkeypatch):
    asked = []

    def finds_nothing(python, *arguments):
        asked.append(arguments)
        raise subprocess.CalledProcessError(1, "pip", stderr="no such version")

    monkeypatch.setattr(env, "resolve", finds_nothing)
    with pytest.raises(env.Failure, match=r"(?s)TORCH_SPEC=.*NO_VENV=1"):
        env.resolve_torch(Path("python"), env.Torch([env.CPU_TORCH], ""))
    assert asked and all(env.CPU_TORCH in arguments for arguments in asked)
    assert "--extra-index-url" not in asked[0] and env.CPU_INDEX in asked[-1]


def test_silent_index_is_given_up(env, monkeypatch):
    def hangs(python, *arguments):
        raise subprocess.TimeoutExpired("pip", 180)

    monkeypatch.setattr(env, "resolve", hangs)
    with pytest.raises(env.Failure, match="no NVIDIA driver answers"):
        env.resolve_torch(Path("python"), env.Torch([env.CPU_TORCH], ""))


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_missing_venv_module_is_said(env, monkeypatch, tmp_path, missing):
    util = env.importlib.util
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(env.Failure, match=r"apt install python3\.\d+-venv"):
        env.create(tmp_path / "never made")
    assert not (tmp_path / "never made").exists()


def test_no_venv_names_what_is_missing(env, monkeypatch):
    monkeypatch.setattr(env, "installed_torch", lambda: "2.5.1")
    monkeypatch.setitem(env.MODULES, "test", ("pytest", "surely_not_installed"))
    message = r"lacks torch>=[\d.]+ \(found 2\.5\.1\), surely_not_installed;"
    with pytest.raises(env.Failure, match=message):
        env.check_installed("test")


def test_sizes_are_announced(env, tmp_path, capsys):
    wheel = tmp_path / "with space.whl"
    wheel.write_bytes(b"x" * 21_000_000)
    size = env.size_of(wheel.as_uri())
    assert size == 21_000_000
    assert env.size_of((tmp_path / "absent.whl").as_uri()) is None
    env.announce([env.Package("torch", "9", "", size), env.Package("a", "1", "", None)])
    said = capsys.readouterr().out
    assert "2 package(s), 21 MB" in said and "torch 9 21 MB" in said and "1 of unknown size" in said


def test_up_to_date_environment_is_left_alone(env, monkeypatch, tmp_path):
    """A second run makes, looks up and installs nothing."""
    (tmp_path / "pyproject.toml").write_text('dependencies = ["torch>=2.6"]')
    monkeypatch.setattr(env, "ROOT", tmp_path)
    monkeypatch.setattr(env, "PYPROJECT", tmp_path / "pyproject.toml")
    folder = tmp_path / ".venv-test"
    folder.mkdir()
    (folder / "made-from.json").write_text(env.json.dumps(env.fingerprint("test")))
    for name in ("create", "pip", "resolve", "choose_torch"):
        monkeypatch.setattr(env, name, lambda *a, **k: pytest.fail("this is work"))
    assert env.ensure("test") == env.interpreter_of(folder)
    (tmp_path / "pyproject.toml").write_text('dependencies = ["torch>=2.7"]')
    with pytest.raises(pytest.fail.Exception, match="this is work"):
        env.ensure("test")


def test_makefile_explains_a_missing_or_old_python(tmp_path):
    def make(python):
        command = ["make", "-C", str(ROOT), "python", f"PYTHON={python}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert make(sys.executable).returncode == 0
    absent = make("no-such-python")
    assert absent.returncode != 0 and "install Python 3.10 or newer" in absent.stdout
    # Runs what it is given as `-c CODE`, but with an old version number.
    old = tmp_path / "old python"
    old.write_text(
        f"#!/bin/sh\nshift\nexec '{sys.executable}' -c "
        '"import sys; sys.version_info = (3, 8, 1); exec(sys.argv[1])" "$@"\n'
    )
    old.chmod(0o755)
    answer = make(old)
    assert answer.returncode != 0
    assert "Python 3.10 or newer is needed" in answer.stderr and "is 3.8" in answer.stderr
