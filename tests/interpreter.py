"""Kernel tests without a GPU: run a test file under Triton's interpreter.

Triton decides whether to compile or to interpret a kernel when the kernel is defined, so
``TRITON_INTERPRET=1`` has to be set before the module with the kernels is imported, and then holds
for the process. A test file whose kernels are to be interpreted therefore ends with ::

    run_interpreted(globals())

In an ordinary run that replaces the file's tests by one, which runs the file in a process of its
own with the variable set; ``TRITON_INTERPRET=1 pytest FILE`` runs the tests one by one. Tensors
stay on the CPU. bf16 is wrong in the interpreter of Triton 3.6: use fp32 and fp16.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def is_interpreted() -> bool:
    """Whether kernels are interpreted in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(module: dict[str, Any]) -> None:
    """Replace the tests in a test file's globals by one that interprets them; see above."""
    if is_interpreted():
        return
    for name in [name for name in module if name.startswith("test_")]:
        del module[name]

    def test_in_the_interpreter(request: pytest.FixtureRequest) -> None:
        numpy = pytest.importorskip("numpy")
        if tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4):
            pytest.skip("the interpreter of Triton 3.6 fails on loops with NumPy 2.4 or newer")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment |= {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-m", request.config.getoption("markexpr"), module["__file__"]]
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr

    module["test_in_the_interpreter"] = test_in_the_interpreter
