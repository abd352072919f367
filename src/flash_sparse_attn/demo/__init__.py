"""The main job from end to end: four questions, each with a table, and one figure."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from .. import info
from ..bench.console import write_whole
from . import cost, decode, figure, recall, text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_output"),
        help="folder of demo.png and demo.json (default: demo_output)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes that show that it runs, and nothing else"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Answer the four questions, print them, write ``demo.png`` and ``demo.json``."""
    begin = time.perf_counter()
    device = info.default_device() if arguments.device is None else torch.device(arguments.device)
    facts = {
        "hardware": info.hardware(device),
        "versions": info.versions(),
        "commit": info.commit(),
    }
    print(_heading(facts))
    quick = arguments.quick
    if quick:
        print("\n  --quick: tiny sizes that show that it runs. The answers below mean nothing.")

    results: dict[str, dict[str, Any]] = {}
    _ask("a", "Does it learn what a window cannot? Associative recall in noise")
    results["a"] = recall.run(recall.QUICK if quick else recall.RecallSettings(), device)
    print(recall.describe(results["a"]))

    _ask("b", "What does it cost? Time and memory against PyTorch's attention")
    results["b"] = cost.run(cost.QUICK if quick else cost.CostSettings(), device)
    print(cost.describe(results["b"]))

    _ask("c", "Does it work on real text? A byte-level model of Python's own source code")
    results["c"] = text.run(text.QUICK if quick else text.TextSettings(), device)
    print(text.describe(results["c"]))

    _ask("d", "Is decoding exact and flat? Generation with a cache of constant size")
    settings = decode.QUICK if quick else decode.DecodeSettings()
    model, held_out = results["c"].pop("model"), results["c"]["corpus"].held_out
    results["d"] = decode.run(settings, model, held_out, device)
    print(decode.describe(results["d"]))

    print()
    _write(arguments.out, {**facts, **results})
    print(f"  {time.perf_counter() - begin:.0f} s in all")
    return 0


def _heading(facts: dict[str, Any]) -> str:
    lines = ["flash_sparse_attn: every query reads the W best keys of its past, and learns which"]
    for part in ("hardware", "versions"):
        lines.append("  " + ", ".join(f"{name} {value}" for name, value in facts[part].items()))
    return "\n".join(lines)


def _ask(letter: str, question: str) -> None:
    title = f"{letter}. {question}"
    print(f"\n{title}\n{'=' * len(title)}", flush=True)


def _write(folder: Path, results: dict[str, Any]) -> None:
    numbers = json.dumps(results, default=_plain, indent=1)
    write_whole(folder / "demo.json", numbers.encode())
    print(f"  numbers  {folder / 'demo.json'}")
    try:
        write_whole(folder / "demo.png", figure.draw(results))
        print(f"  figure   {folder / 'demo.png'}")
    except ImportError as error:
        print(f"  no figure: {error}; install the extra 'demo' (matplotlib)")


def _plain(value: Any) -> Any:
    """What JSON has no word for."""
    if isinstance(value, text.Corpus):
        return {"files": value.files, "sha256": value.digest}
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
