"""Facts about this machine and installation, and the `info` command that prints them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from . import dispatch


def versions() -> dict[str, str]:
    """Version of everything that decides what runs; ``"not installed"`` where it is absent."""
    return {
        "flash_sparse_attn": _package_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _distribution_version("triton"),
        "transformers": _distribution_version("transformers"),
    }


def hardware(device: torch.device | str | None = None) -> dict[str, str | int | float]:
    """The machine as a benchmark row names it.

    Args:
        device: The device that is measured; default the GPU if there is one.
    """
    device = default_device() if device is None else torch.device(device)
    facts: dict[str, str | int | float] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    memory = _memory_bytes()
    if memory is not None:
        facts["memory_gib"] = round(memory / 2**30, 1)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["gpu_count"] = torch.cuda.device_count()
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["cuda"] = torch.version.cuda or torch.version.hip or "unknown"
    return facts


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def available_bytes() -> int | None:
    """Memory that can be used without swapping, where the system tells."""
    try:
        text = Path("/proc/meminfo").read_text()
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return None


COMMIT = "FLASH_SPARSE_ATTN_COMMIT"
"""The variable that names the commit of sources which were copied here without their history."""


def commit() -> str:
    """Commit of the source tree this package is imported from, ``+changes`` if it was edited.

    Raises:
        ValueError: The variable `COMMIT` is set to something else than a commit.
    """
    if given := os.environ.get(COMMIT):
        if not re.fullmatch(r"[0-9a-f]{12,40}", given):
            raise ValueError(
                f"{COMMIT}: expected a commit, 12 to 40 hexadecimal digits, got {given!r}; set it "
                "to what git rev-parse HEAD prints where the sources were copied from"
            )
        return given[:12]
    folder = Path(__file__).resolve().parent
    if not (folder.parents[1] / ".git").exists():
        return "unknown"
    try:
        name = _git(folder, "rev-parse", "--short=12", "HEAD")
        return name + ("+changes" if _git(folder, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def report() -> str:
    """The text of the `info` command."""
    lines = ["versions"]
    lines += [f"  {name:<18} {value}" for name, value in versions().items()]
    lines += [f"  {'commit':<18} {commit()}", "", "device"]
    lines += [f"  {name:<18} {value}" for name, value in hardware().items()]
    lines += ["", "backends (the first that works is used unless you name one; flex only if named)"]
    for name, reasons in dispatch.explain_backends().items():
        lines.append(f"  {name:<8} {'works' if not reasons else 'not available'}")
        lines += [f"           - {reason}" for reason in reasons]
    return "\n".join(lines)


def _package_version() -> str:
    names = importlib.metadata.packages_distributions().get(__package__ or "", [])
    return _distribution_version(names[0]) if names else "source tree, not installed"


def _distribution_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
