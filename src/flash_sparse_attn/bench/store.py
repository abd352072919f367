"""Rows: one measurement each, complete enough to be judged and repeated, as lines of JSON."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import info
from .cases import Case
from .console import write_whole
from .digest import backend_of, kernels_digest
from .providers import PROVIDERS

Row = dict[str, Any]
WHAT = {
    "selection": "selection",
    "decode": "decoding step",
    "forward": "selection + forward",
    "attention": "selection + forward + backward",
}
"""What rows say that was measured, by `Case.what`."""


def make_row(
    case: Case, provider: str, measured: dict[str, Any], errors: dict[str, float], facts: Row
) -> Row:
    """One measurement with everything that identifies it.

    Args:
        case: What was computed.
        provider: Who computed it.
        measured: What `measure.take` returned.
        errors: What `providers.verify` returned.
        facts: What `run_facts` returned for this run.
    """
    dense, building = PROVIDERS[provider].dense, PROVIDERS[provider].building
    if case.what == "decode":
        building = "nothing: the cache has read the text before"
    seconds = measured["seconds"]["total"]
    sizes = ("batch", "heads", "kv_heads", "queries", "length", "head_dim", "window")
    flops = case.flops(dense, measured.get("visible_pairs"))
    return {
        "case": case.name,
        "provider": provider,
        "what": WHAT[case.what],
        "building": building,
        "shape": {size: getattr(case, size) for size in sizes},
        "pattern": case.pattern,
        "mask": case.mask,
        "bias": case.bias,
        "dtype": case.dtype,
        **measured,
        "useful_flops": flops,
        "useful_gflops_per_second": flops / seconds / 1e9,
        "min_bytes": case.min_bytes(),
        "errors": errors,
        "errors_at": case.reduced().shape,
        "baselines": [name for name in case.providers if name != provider],
        **facts,
        "elapsed_seconds": elapsed(facts),
        "versions": facts["versions"] | measured.get("versions", {}),
        "kernels": kernels_digest(backend_of(provider, case.device)),
    }


def run_facts(device: str) -> Row:
    """What all rows of one run share: machine, versions, sources, command and time."""
    return {
        "hardware": info.hardware(device),
        "versions": info.versions(),
        "commit": info.commit(),
        "kernels": kernels_digest(backend_of("ours", device)),
        "command": shlex.join(["python", *_program(), *_arguments()]),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def elapsed(facts: Row) -> float:
    """Seconds since `run_facts` was called, which is when a run begins."""
    begin = datetime.datetime.fromisoformat(facts["time"])
    return (datetime.datetime.now(datetime.timezone.utc) - begin).total_seconds()


def _program() -> list[str]:
    """How this program was named: a script, or the package."""
    script = Path(sys.argv[0])
    if script.parent.name == "benchmarks":
        return [f"benchmarks/{script.name}"]
    return ["-m", "flash_sparse_attn"]


def _arguments() -> list[str]:
    """The arguments of this program, less the file that rows go to: it says where, not what."""
    rest = iter(sys.argv[1:])
    kept = []
    for argument in rest:
        if argument == "--out":
            next(rest, None)
        elif not argument.startswith("--out="):
            kept.append(argument)
    return kept


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file of JSON lines; the file is replaced as a whole."""
    old = path.read_bytes() if path.exists() else b""
    new = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(path, old + new.encode())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]
