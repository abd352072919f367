"""Run the linters, then the tests; exits non-zero if any of them fails.

    python scripts/test.py [--heavy | --lint-only | --gpu] [PYTEST ARGUMENT...]

`--gpu` runs the tests of a GPU alone, in several processes side by side where pytest-xdist is
installed: most of their time goes into compiling kernels.

Runs in the environment of scripts/env.py or any other that has pytest. A missing linter is reported
and skipped: an offline machine with NO_VENV=1 need not have one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINTERS = {"ruff": ["check", "."], "mypy": []}
# pytest plugins by the module that says whether they are there, and the names to load them by.
PLUGINS = {
    "xdist": ["xdist.plugin", "xdist.looponfail"],
    "pytest_timeout": ["pytest_timeout"],
    "_hypothesis_pytestplugin": ["_hypothesis_pytestplugin"],
}
# Compiling takes a processor each; more than these do not share a GPU well.
GPU_PROCESSES = max(1, min(34, (os.cpu_count() or 1) - 2))
TIMEOUT = {False: 300, True: 1800}  # seconds for one test, without and with the heavy ones


def lint() -> list[str]:
    """Run every linter that is installed; returns the names of those that complained."""
    failed = []
    for tool, arguments in LINTERS.items():
        if importlib.util.find_spec(tool) is None:
            print(f"{tool}: skipped, because it is not installed", flush=True)
            continue
        start = time.perf_counter()
        command = [sys.executable, "-m", tool, *arguments]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        seconds = time.perf_counter() - start
        print(f"{tool}: {'failed' if code else 'passed'} in {seconds:.0f} s", flush=True)
        if code:
            failed.append(tool)
    return failed


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run_pytest(heavy: bool, on_gpu: bool, arguments: list[str]) -> bool:
    """Run the tests and return whether they passed."""
    # Only the plugins these tests were written for: others may be installed beside a shared torch.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "--durations=5", "--durations-min=5"]
    for module, names in PLUGINS.items():
        if importlib.util.find_spec(module) is not None:
            command += [part for name in names for part in ("-p", name)]
    if "pytest_timeout" in command:
        command += ["--timeout", str(TIMEOUT[heavy])]
    if "xdist.plugin" in command and (on_gpu or not has_gpu()):
        # Two processes are what 4 GiB hold; whole runs on a GPU have the device to themselves.
        processes = GPU_PROCESSES if on_gpu else min(2, os.cpu_count() or 1)
        command += ["-n", str(processes), "--dist", "worksteal"]
    chosen = ["gpu"] * on_gpu + ["not heavy"] * (not heavy)
    if chosen:
        command += ["-m", " and ".join(chosen)]
    command += arguments
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def main(arguments: list[str]) -> int:
    heavy = "--heavy" in arguments
    only_lint = "--lint-only" in arguments
    rest = [a for a in arguments if a not in ("--heavy", "--lint-only", "--gpu")]
    on_gpu = "--gpu" in arguments
    failed = [] if on_gpu else lint()
    if not only_lint and not run_pytest(heavy, on_gpu, rest):
        failed.append("pytest")
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
