"""The predecessors as providers, in an environment of their own: their packages have our names.

There this file runs as a program. It loads this package's sources under another name, so that
inputs, the gate on correctness and the way times are taken are the same code, and theirs is
imported by its own name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .cases import Inputs

INTERPRETER = "FLASH_SPARSE_ATTN_PREDECESSORS_PYTHON"
DISTRIBUTIONS = {"flash_sparse_attn": "flash-sparse-attn", "flash_dmattn": "flash-dmattn"}
"""The distributions that are measured, by the name they are imported by."""
_OLDEST = (1, 2, 1)  # the first with 4-D masks and biases of which single dimensions broadcast
_HOSTED = "predecessors_host"
_ANSWER = "answer: "  # before it on standard output, where their libraries may write too
_PACKAGE = Path(__file__).resolve().parents[1]


def missing() -> str | None:
    """Why the predecessors cannot run, if they cannot."""
    python = os.environ.get(INTERPRETER)
    if python and os.access(python, os.X_OK) and Path(python).is_file():
        return None
    found = f"it is {python!r}, which is no program" if python else "it is not set"
    return (
        "predecessors run in an environment of their own, because their packages have the same "
        f"names; {INTERPRETER} has to name its interpreter, but {found}: python -m venv DIR, "
        f"DIR/bin/pip install torch flash-dmattn, export {INTERPRETER}=DIR/bin/python"
    )


def command() -> list[str]:
    """The program that does jobs there.

    Raises:
        RuntimeError: There is no such environment.
    """
    if reason := missing():
        raise RuntimeError(reason)
    # Isolated: neither PYTHONPATH nor the folder of this file may lead to this package by name.
    return [os.environ[INTERPRETER], "-I", str(Path(__file__).resolve())]


def installed() -> list[str]:
    """Which of `DISTRIBUTIONS` their environment has.

    Raises:
        RuntimeError: There is no such environment.
    """
    program = "import importlib.metadata as m; print(*(one.name for one in m.distributions()))"
    python = command()[0]
    done = subprocess.run([python, "-I", "-c", program], capture_output=True, text=True, check=True)
    return [name for name in DISTRIBUTIONS.values() if name in done.stdout.split()]


def ask(job: dict[str, Any], keep: bool) -> dict[str, Any]:
    """The answer of `measure.do` in their environment.

    Args:
        job: For `measure.do`.
        keep: Whether the process does further jobs. To start one takes many times what is measured
            on a GPU, where PyTorch counts the memory of each job; on a CPU the process is measured.

    Raises:
        RuntimeError: There is no such environment, or the job failed; the message says why.
    """
    process, errors = _start(tuple(command()))
    assert process.stdin and process.stdout
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it ended, and has no answer
    answer: dict[str, Any] | None = None
    for line in process.stdout:
        if line.startswith(_ANSWER):
            answer = json.loads(line.removeprefix(_ANSWER))
            break
    if answer is None or "failed" in answer or not keep:
        _start.cache_clear()
        process.communicate()
        errors.seek(0)
        tail = "\n".join(errors.read().strip().splitlines()[-3:])
        errors.close()
    if answer is None:
        raise RuntimeError(f"{job['provider']} ended with status {process.returncode}: {tail}")
    if "failed" in answer:
        raise RuntimeError(answer["failed"])
    return answer


@functools.lru_cache(maxsize=1)
def _start(program: tuple[str, ...]) -> tuple[subprocess.Popen[str], IO[str]]:
    """A process that waits for jobs, and what it writes to its error output."""
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
    pipe = subprocess.PIPE
    return subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=errors, text=True), errors


def attend(module: str) -> Callable[[Inputs, Tensor], Tensor]:
    """Attention by a predecessor's function, with the backend that it chooses itself."""

    def call(inputs: Inputs, mask: Tensor) -> Tensor:
        function = getattr(importlib.import_module(module), f"{module}_func_auto")(backend=None)
        bias = inputs.bias.to(inputs.query.dtype)
        return function(
            inputs.query,
            inputs.key,
            inputs.value,
            attn_mask=mask,
            attn_bias=bias,
            is_causal=inputs.is_causal,
        )

    return call


def version(module: str) -> str:
    """The version of a predecessor in this environment.

    Raises:
        RuntimeError: It is not installed, or too old to take the same arguments.
    """
    name = DISTRIBUTIONS[module]
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(
            f"the environment of {sys.executable} has no {name}: {sys.executable} -m pip install "
            f"{name}"
        ) from None
    if tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        raise RuntimeError(f"{name} {found} is too old: {wanted} or newer takes the same arguments")
    return found


def main() -> None:
    """Do jobs, lines of standard input, until there are no more or one fails."""
    package = types.ModuleType(_HOSTED)
    package.__path__ = [str(_PACKAGE)]  # its __init__ would refuse to run beside a predecessor
    sys.modules[_HOSTED] = package
    for line in sys.stdin:
        try:
            answer = _do(json.loads(line))
        except Exception as error:  # after some of them a GPU is of no use to this process
            print(_ANSWER + json.dumps({"failed": f"{type(error).__name__}: {error}"}), flush=True)
            return
        print(_ANSWER + json.dumps(answer), flush=True)


def _do(job: dict[str, Any]) -> dict[str, Any]:
    module = {name: module for module, name in DISTRIBUTIONS.items()}[job["provider"]]
    versions = {DISTRIBUTIONS[module]: version(module)}
    measure = importlib.import_module(f"{_HOSTED}.bench.measure")
    info = importlib.import_module(f"{_HOSTED}.info")
    for name in ("python", "torch", "triton"):
        versions[name] = info.versions()[name]
    return {**measure.do(job), "versions": versions}


if __name__ == "__main__":
    main()
