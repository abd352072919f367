"""Run Python in an environment of this project's own, making it first if need be.

    python scripts/env.py NAME ARG...      run `python ARG...` in NAME: demo, test or docs

Only the standard library is used. What the environment variables do:

NO_VENV=1    make and install nothing, run with the interpreter at hand
TORCH_SPEC=  what to install as torch, such as 'torch==2.9.1'; options of pip may follow

Which torch is used, in this order: TORCH_SPEC; the interpreter's own, if new enough; PyPI's where
an NVIDIA driver answers (a CUDA build) or the system is not Linux (a CPU build); otherwise the CPU
build. PyPI's torch for Linux brings gigabytes of CUDA libraries, so it is never installed without a
driver.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = ROOT / "pyproject.toml"
# Which extras an environment has, and which modules NO_VENV=1 must find.
EXTRAS = {"demo": "demo,bench", "test": "dev", "docs": "docs,transformers"}
MODULES = {
    "demo": ("matplotlib",),
    "test": ("pytest", "matplotlib"),
    "docs": ("sphinx", "myst_parser", "furo", "transformers"),
}
# The CPU build the tests were run with. "+cpu" matches no CUDA build, whatever index answers.
CPU_TORCH = "torch==2.13.0+cpu"
MINOR = f"{sys.version_info[0]}.{sys.version_info[1]}"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
FIRST_PIP_WITH_FREE_DRY_RUN = (23, 3)  # older ones download whole wheels in a dry run


class Failure(Exception):
    """Ends the program with this message."""


class Torch(NamedTuple):
    """Where torch comes from: pip's arguments (empty: nothing to install), and why."""

    arguments: list[str]
    reason: str


class Package(NamedTuple):
    name: str
    version: str
    url: str
    size: int | None  # bytes


def say(text: str) -> None:
    print(f"[env] {text}", flush=True)


def version_tuple(text: str) -> tuple[int, ...]:
    """'2.11.0+cu130' -> (2, 11, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def torch_bound() -> str:
    """The lowest torch that pyproject.toml allows, as text."""
    match = re.search(r'"torch>=([\d.]+)"', PYPROJECT.read_text(encoding="utf-8"))
    if match is None:
        raise Failure(f'{PYPROJECT}: expected a line with "torch>=X", found none')
    return match.group(1)


def installed_torch() -> str | None:
    """Version of the torch that this interpreter imports, or None."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if importlib.util.find_spec("torch") else None


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver answers and sees a device."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value > 0
    return False


def can_use_installed_torch() -> str | None:
    """The interpreter's torch version if it satisfies the bound and nothing else was asked for."""
    found = installed_torch()
    if os.environ.get("TORCH_SPEC") or found is None:
        return None
    return found if version_tuple(found) >= version_tuple(torch_bound()) else None


def choose_torch() -> Torch:
    """Decide what to install as torch, without installing it."""
    spec = os.environ.get("TORCH_SPEC")
    if spec:
        return Torch(shlex.split(spec), "TORCH_SPEC asks for it")
    found = can_use_installed_torch()
    if found:
        return Torch([], f"torch {found} of {sys.executable}")
    if not sys.platform.startswith("linux"):
        return Torch([f"torch>={torch_bound()}"], "a CPU build, as PyPI has for this system")
    if has_nvidia_driver():
        return Torch([f"torch>={torch_bound()}"], "a CUDA build, because an NVIDIA driver answers")
    return Torch([CPU_TORCH], "a CPU build, because no NVIDIA driver answers")


def pip(python: Path, *arguments: str, timeout: float | None = None, quiet: bool = False) -> str:
    """Run pip; its output is returned if quiet, else shown.

    Raises:
        CalledProcessError, TimeoutExpired: pip failed, or took longer than `timeout` seconds.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    pipe = subprocess.PIPE if quiet else None
    done = subprocess.run(
        [str(python), "-m", "pip", *arguments],
        stdout=pipe, stderr=pipe, text=True, timeout=timeout, check=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    return done.stdout or ""


def size_of(url: str) -> int | None:
    """Bytes behind a wheel's address, or None where it does not say."""
    parts = urllib.parse.urlsplit(url)
    try:
        if parts.scheme == "file":
            path = Path(urllib.request.url2pathname(parts.path))
            return path.stat().st_size if path.is_file() else None
        head = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(head, timeout=10) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, TypeError, ValueError):
        return None


def resolve(python: Path, *arguments: str) -> list[Package]:
    """What `pip install ARGUMENTS` would install; raises what `pip` raises."""
    # fast-deps reads a wheel's description without downloading the wheel.
    options = ["--dry-run", "--use-feature=fast-deps", "--quiet", "--report", "-"]
    options += ["--timeout", "5", "--retries", "1"]
    report = pip(python, "install", *options, *arguments, timeout=180, quiet=True)
    # Without this project itself, which is a folder.
    items = [i for i in json.loads(report)["install"] if "dir_info" not in i["download_info"]]
    urls = [item["download_info"]["url"] for item in items]
    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(size_of, urls))
    names = [(item["metadata"]["name"], item["metadata"]["version"]) for item in items]
    return [Package(*name, url, size) for name, url, size in zip(names, urls, sizes, strict=True)]


def announce(packages: list[Package]) -> None:
    """Print what is about to be downloaded, and how much."""
    total = sum(package.size or 0 for package in packages)
    unknown = sum(package.size is None for package in packages)
    large = [p for p in packages if (p.size or 0) > 20e6]
    names = ", ".join(f"{p.name} {p.version} {(p.size or 0) / 1e6:.0f} MB" for p in large)
    text = f"{len(packages)} package(s), {total / 1e6:.0f} MB to download or take from pip's cache"
    text += f" ({names})" if names else ""
    say(text + (f"; {unknown} of unknown size" if unknown else ""))


def resolve_torch(python: Path, torch: Torch) -> tuple[list[str], list[Package]]:
    """Find the chosen torch: pip's arguments that install it, and what they bring.

    PyTorch's own index is asked only if the configured ones have no CPU build, and with short
    limits, so that a network which cannot reach it costs seconds.
    """
    tries = [torch.arguments]
    if torch.arguments == [CPU_TORCH]:
        tries.append([CPU_TORCH, "--extra-index-url", CPU_INDEX])
    for arguments in tries:
        try:
            # By itself first: everything it needs would be asked of a silent index, one by one.
            if arguments[0] == CPU_TORCH:
                resolve(python, "--no-deps", *arguments)
            return arguments, resolve(python, *arguments)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            details = str(error.stderr or "")
    if torch.arguments != [CPU_TORCH]:
        raise Failure(f"pip finds nothing for {shlex.join(torch.arguments)}:\n{details}")
    raise Failure(
        f"found no {CPU_TORCH} for Python {MINOR}, neither with pip's settings here nor at\n"
        f"{CPU_INDEX}. Plain torch would bring gigabytes of CUDA libraries,\n"
        "and no NVIDIA driver answers, so it is not installed. Ways on:\n"
        "  PYTHON=... names an interpreter that has torch, or for which there is a CPU build\n"
        "  TORCH_SPEC='...' says what to install\n"
        "  NO_VENV=1 runs with what this interpreter has"
    )


def create(folder: Path) -> Path:
    """Make an empty virtual environment and return its interpreter."""
    if not importlib.util.find_spec("venv") or not importlib.util.find_spec("ensurepip"):
        raise Failure(
            f"{sys.executable} lacks the module venv or ensurepip, so no environment can be made. "
            f"Ways on:\n  install it (Debian, Ubuntu: apt install python{MINOR}-venv)\n"
            "  PYTHON=... names another interpreter\n"
            "  NO_VENV=1 runs with what this interpreter has"
        )
    say(f"making {folder.name} with Python {sys.version.split()[0]} of {sys.executable}")
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=False)
    if done.returncode:
        raise Failure(f"`python -m venv` failed for {folder} (see above); NO_VENV=1 does without")
    return interpreter_of(folder)


def interpreter_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def share_packages(python: Path) -> None:
    """Let the environment see the packages of the interpreter that made it.

    --system-site-packages would miss those of an interpreter in a virtual environment.
    """
    origin = importlib.util.find_spec("torch")
    folders = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    if origin is not None and origin.origin is not None:
        folders.append(str(Path(origin.origin).parent.parent))
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([str(python), "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    lines = "".join(f"{folder}\n" for folder in dict.fromkeys(folders))
    Path(site.stdout.strip(), "_shared_packages.pth").write_text(lines, encoding="utf-8")


def update_pip(python: Path) -> None:
    """Pip before 23.3 downloads wheels in order to look at them; without a network it may stay."""
    found = version_tuple(pip(python, "--version", quiet=True).split()[1])
    if found >= FIRST_PIP_WITH_FREE_DRY_RUN:
        return
    say("updating the environment's pip (2 MB)")
    try:
        pip(python, "install", "--quiet", "--retries", "1", "--upgrade", "pip", timeout=120)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        say("pip could not be updated, going on with the old one")


def fingerprint(name: str) -> dict[str, str]:
    """Everything an environment was made from; if it is unchanged there is nothing to install."""
    return {
        "pyproject": hashlib.sha256(PYPROJECT.read_bytes()).hexdigest(),
        "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "extras": EXTRAS[name],
        "root": str(ROOT),
        "python": f"{sys.executable} {sys.version}",
        "torch": os.environ.get("TORCH_SPEC") or can_use_installed_torch() or "chosen here",
    }


def ensure(name: str) -> Path:
    """Interpreter of the environment `name`, which is made anew unless it is up to date."""
    folder = ROOT / f".venv-{name}"
    stamp, wanted = folder / "made-from.json", fingerprint(name)
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return interpreter_of(folder)
    torch = choose_torch()
    python = create(folder)
    update_pip(python)
    say(f"torch: {torch.reason}")
    if torch.arguments:
        arguments, packages = resolve_torch(python, torch)
        announce(packages)
        pip(python, "install", *arguments)
    else:
        share_packages(python)
    # Whatever else is asked for, pip must not replace the torch that was chosen.
    code = "from importlib.metadata import version; print('torch==' + version('torch'))"
    pin = subprocess.run([str(python), "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    constraint = folder / "constraints.txt"
    constraint.write_text(pin.stdout, encoding="utf-8")
    extras = EXTRAS[name]
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('triton') is None)"
    if name == "test" and subprocess.run([str(python), "-c", code], check=False).returncode:
        extras += ",interpreter"
    rest = ["--editable", f".[{extras}]", "--constraint", str(constraint)]
    say("looking up the other packages")
    announce(resolve(python, *rest))
    pip(python, "install", *rest)
    stamp.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    say(f"{folder.name} is ready: {pin.stdout.strip()}")
    return python


def check_installed(name: str) -> None:
    """NO_VENV=1: say clearly what the interpreter at hand lacks."""
    bound = torch_bound()
    found = installed_torch()
    missing = [module for module in MODULES[name] if not importlib.util.find_spec(module)]
    if found is None or version_tuple(found) < version_tuple(bound):
        missing.insert(0, f"torch>={bound}" + (f" (found {found})" if found else ""))
    if missing:
        names = ", ".join(missing)
        raise Failure(f"NO_VENV=1: {sys.executable} lacks {names}; install that, or drop NO_VENV=1")
    say(f"NO_VENV=1: torch {found} of {sys.executable}, nothing is installed")


def main(name: str, arguments: list[str]) -> int:
    environment = dict(os.environ)
    if environment.get("NO_VENV", "0") not in ("", "0"):
        check_installed(name)
        python = Path(sys.executable)
        paths = [str(ROOT / "src"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    else:
        python = ensure(name)
        environment.pop("PYTHONPATH", None)
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in EXTRAS:
        sys.exit(f"usage: {Path(__file__).name} {'|'.join(EXTRAS)} ARG...")
    try:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
    except Failure as failure:
        sys.exit(f"[env] {failure}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"[env] failed: {shlex.join(map(str, error.cmd))}\n{error.stderr or ''}")
    except KeyboardInterrupt:
        sys.exit(130)
