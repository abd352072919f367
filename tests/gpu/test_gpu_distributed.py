"""Texts cut along GPUs, over NCCL: results and gradients of the fp64 reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("size", [2, 4])
def test_on_several_gpus(size):
    """Even, uneven, padded and packed; twice the same bits; no row sees the future."""
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs, found {torch.cuda.device_count()}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(size), "tests/gpu/time_distributed.py", "--check-only"]
    environment = os.environ | {"PYTHONPATH": "src:tests"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(f"checked on {size} ranks") == 3, done.stdout
