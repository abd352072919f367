"""The predecessors' equivalence scripts: their configurations, options and tolerances, no excuse.

Theirs passed if 95 % of the elements were inside the tolerance; here every element has to be, and
the error rule of this frame (twice the error of plain PyTorch, plus 1e-5) has to hold as well.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, info
from ..dynamic_mask import dynamic_mask_attn_func
from ..utils.mask import create_mask
from . import grids
from .cases import Case, Inputs, make_inputs
from .compiling import compile_ahead
from .console import Deadline, Progress, table
from .digest import backend_of, kernels_digest
from .providers import PROVIDERS, distance, references, run
from .store import Row, append_rows, elapsed, run_facts

TEST_TYPES = ("all", "ours", "cuda", "triton", "flex", "eager")
FORWARD = {"bfloat16": 1e-2, "float16": 5e-3, "float32": 1e-3}
BACKWARD = {"bfloat16": 1e-1, "float16": 5e-2, "float32": 1e-3}
"""Relative and absolute tolerance of an element, as the predecessors had them."""
_LOOP_TOLERANCE = 1e-4  # of an element, besides 1e-5, against a loop over rows
_TRITON_WINDOW = 10240  # of their backward script: never sparse


@dataclass(frozen=True)
class Comparison:
    """One tensor against the truth.

    Attributes:
        largest, mean: Of the absolute differences.
        budget: What the error rule allows.
        inside: The part of the elements within the tolerance.
        worst: Position of the largest difference.
    """

    largest: float
    mean: float
    budget: float
    inside: float
    worst: tuple[int, ...]

    @classmethod
    def of(cls, value: Tensor, truth: Tensor, plain: Tensor, tolerance: float) -> Comparison:
        """`truth` is fp64, `plain` what PyTorch computes in the dtype of `value`."""
        value = value.double()
        errors = (value - truth).abs()
        inside = errors <= tolerance + tolerance * value.abs()  # NaN is not inside
        place = int(errors.nan_to_num(nan=torch.inf).argmax())
        worst: list[int] = []
        for size in reversed(errors.shape):
            place, index = divmod(place, size)
            worst.insert(0, index)
        return cls(
            float(errors.max()),
            float(errors.mean()),
            2 * distance(plain, truth) + 1e-5,
            float(inside.double().mean()),
            tuple(worst),
        )

    def passes(self, threshold: float) -> bool:
        """Whether enough elements are inside, and the error rule holds."""
        return self.inside >= threshold and self.largest <= self.budget


def main(title: str, backward: bool, arguments: list[str] | None = None) -> int:
    """Run the forward or the backward script; 0 if everything agrees.

    Args:
        title: One line for ``--help``.
        backward: Compare the gradients too.
        arguments: Default those of the process.
    """
    options = _parser(title).parse_args(arguments)
    reasons = dispatch.explain_backends()
    reduces = options.device == "cpu" and not options.config
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    names = [options.test_type]
    if options.test_type == "all" and reduces:
        names = ["eager"]
    elif options.test_type == "all":
        names = ["ours", *(name for name, missing in reasons.items() if not missing)]
    elif reasons.get(options.test_type):
        print(f"--test-type {options.test_type}: not available: {reasons[options.test_type]}")
        return 2
    jobs = [
        (name, replace(case, device=options.device, dtype=dtype), causal)
        for name in names
        for case, causal in grids.equivalence(
            _TRITON_WINDOW if backward and name == "triton" else options.window
        )
        if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.config or ["*"])
    ]
    if reduces:
        known = len(jobs)
        # Up to a length at which the window leaves keys out.
        jobs = [job for job in jobs if grids.suits_cpu(job[1], grids.HEAD_DIMS, 2048)]
        print(grids.about_cpu(len(jobs), known, dtype))
    if not jobs:
        print(f"--config: no configuration is called {' or '.join(options.config)}")
        return 2
    tolerance = (BACKWARD if backward else FORWARD)[dtype]
    facts, lines, skipped = run_facts(options.device), [], {}
    done = failed = 0
    deadline = Deadline(options.seconds)
    passes = "attention" if backward else "forward"
    jobs = [(name, replace(case, what=passes), causal) for name, case, causal in jobs]
    # Both masks have one shape, and calls with the second are not causal.
    masks = {True: "pairs", False: "prefix"}
    compile_ahead([(replace(case, mask=masks[c]), _provider(name)) for name, case, c in jobs])
    with Progress("configurations", len(jobs)) as bar:
        for name, case, causal in deadline.until(jobs):
            try:
                found = compare(case, causal, name, tolerance, options.seed)
            except RuntimeError as error:
                if options.test_type != "all" or name == "ours" or "cannot run" not in str(error):
                    raise
                skipped[name] = str(error)  # this backend does not take such calls
                continue
            finally:
                bar.update(f"{case.name} {name}")
            good = all(part.passes(options.accuracy_threshold) for part in found.values())
            done += 1
            failed += not good
            lines += _lines(case, name, found, options.accuracy_threshold, options.verbose)
            if options.out:
                append_rows(options.out, [_row(case, causal, name, found, tolerance, good, facts)])
    print(table(_HEADER, lines))
    print(f"\ntolerance {tolerance:g}, on {options.accuracy_threshold:.0%} of the elements")
    print("".join(f"not compared: {reason}\n" for reason in skipped.values()), end="")
    print(deadline.note, end="")
    print(f"{done - failed} of {done} comparisons agree")
    return 1 if failed else 0


def compare(
    case: Case, causal: bool, name: str, tolerance: float, seed: int
) -> dict[str, Comparison]:
    """``out`` and, unless the case is forward only, every gradient of one configuration."""
    inputs = _with_created_mask(make_inputs(case, seed), case, causal)
    provider = PROVIDERS[_provider(name)]
    results = run(inputs, provider, case.window)
    truth, plain = references(inputs, provider, case.window)
    return {
        key: Comparison.of(value, truth[key], plain[key], tolerance)
        for key, value in results.items()
    }


def _provider(name: str) -> str:
    """Of a backend, or of the public function's own choice, ``"ours"``."""
    return name if name == "ours" else f"ours-{name}"


def _with_created_mask(inputs: Inputs, case: Case, causal: bool) -> Inputs:
    """The mask as the predecessors made it: `create_mask` among the past keys of every query."""
    length = case.length
    past = torch.ones(1, 1, length, length, dtype=torch.bool, device=case.device).tril()
    bias = inputs.bias.detach()
    smallest = torch.finfo(bias.dtype).min
    mask = create_mask(bias, past, case.batch, length, length, case.window, smallest)
    return replace(inputs, mask=mask, is_causal=causal)


_HEADER = ("configuration", "backend", "tensor", "largest", "mean", "allowed", "inside", "")


def _lines(
    case: Case, name: str, found: dict[str, Comparison], threshold: float, verbose: bool
) -> list[list[str]]:
    """One line for each tensor; without `verbose` the worst one only."""
    ranked = sorted(found.items(), key=lambda item: item[1].largest / item[1].budget)
    lines = []
    for key, part in ranked if verbose else ranked[-1:]:
        where = f" at {part.worst}" if verbose else ""
        lines.append(
            [
                case.name,
                name,
                key,
                f"{part.largest:.2e}",
                f"{part.mean:.1e}",
                f"{part.budget:.2e}",
                f"{part.inside:.2%}",
                ("agrees" if part.passes(threshold) else "DIFFERS") + where,
            ]
        )
    return lines


def _row(
    case: Case,
    causal: bool,
    name: str,
    found: dict[str, Comparison],
    tolerance: float,
    good: bool,
    facts: Row,
) -> Row:
    return {
        "case": case.name,
        "provider": name,
        "what": "equivalence, forward" + (" + backward" if case.what == "attention" else ""),
        "shape": case.shape,
        "is_causal": causal,
        "dtype": case.dtype,
        "tolerance": tolerance,
        "errors": {key: part.largest for key, part in found.items()},
        "allowed": {key: part.budget for key, part in found.items()},
        "inside": {key: part.inside for key, part in found.items()},
        "agrees": good,
        **facts,
        "elapsed_seconds": elapsed(facts),
        "kernels": kernels_digest(backend_of(name, case.device)),
    }


def _parser(title: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--seed", type=int, default=42, help="of the inputs (default 42)")
    parser.add_argument(
        "--verbose", action="store_true", help="every tensor, and where it is worst"
    )
    parser.add_argument(
        "--accuracy-threshold",
        type=float,
        default=1.0,
        help="part of the elements that has to be inside the tolerance (default 1.0)",
    )
    parser.add_argument(
        "--test-type",
        choices=TEST_TYPES,
        default="all",
        help="a backend; ours: the public function's own choice; all: that and every backend here",
    )
    parser.add_argument("--window", type=int, default=1024, help="keys a query sees (default 1024)")
    parser.add_argument(
        "--config",
        nargs="+",
        metavar="PATTERN",
        help="names of configurations such as 256-d64-causal, * allowed (default all; on a CPU the "
        "short ones)",
    )
    Deadline.add_argument(parser)
    parser.add_argument("--out", type=Path, help="append the results to this file as JSON lines")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=info.default_device().type)
    parser.add_argument(
        "--dtype", choices=tuple(FORWARD), help="default bfloat16; on a CPU float32"
    )
    return parser


def gradients_main(title: str, arguments: list[str] | None = None) -> int:
    """The score's own gradients, fp32 on a CPU: a loop over rows against this package.

    B = H = 1, 64 queries and keys, D = 64, W = 32, causal; score ``exp(A softplus(dt_proj(v)))``.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--seed", type=int, default=42, help="of the inputs (default 42)")
    parser.add_argument("--verbose", action="store_true", help="print where each tensor is worst")
    parser.add_argument("--out", type=Path, help="append the results to this file as JSON lines")
    options = parser.parse_args(arguments)
    facts, found = run_facts("cpu"), compare_gradients(options.seed)
    print(f"{'tensor':<10}{'largest':>10}{'mean':>10}")
    worst_errors, worst_allowed, inside = {}, {}, {}
    for name, (ours, expected) in found.items():
        errors = (ours - expected).abs()
        allowed = 1e-5 + _LOOP_TOLERANCE * expected.abs()
        place = int((errors / allowed).nan_to_num(nan=torch.inf).argmax())
        worst_errors[name] = float(errors.flatten()[place])
        worst_allowed[name] = float(allowed.flatten()[place])
        inside[name] = float((errors <= allowed).double().mean())
        verdict = "agrees" if inside[name] == 1 else "DIFFERS"
        worst = f"  worst element: {place}" if options.verbose else ""
        print(
            f"{name:<10}{float(errors.max()):>10.1e}{float(errors.mean()):>10.1e}  {verdict}{worst}"
        )
    good = set(inside.values()) == {1.0}
    if options.out:
        row = {
            "case": "64-d64-projection",
            "provider": "ours",
            "what": "equivalence, a learned score",
            "shape": "B1 H1 Hkv1 N64 D64 W32",
            "is_causal": True,
            "dtype": "float32",
            "tolerance": _LOOP_TOLERANCE,
            "errors": worst_errors,
            "allowed": worst_allowed,
            "inside": inside,
            "agrees": good,
            **facts,
            "elapsed_seconds": elapsed(facts),
        }
        append_rows(options.out, [row])
    return 0 if good else 1


def compare_gradients(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """``out`` and the gradients of q, k, v, the projection and A: ours, and those of the loop."""
    length, dim, window = 64, 64, 32
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(1, length, 1, dim, generator=generator) for _ in range(3)]
    leaves.append(torch.randn(1, dim, generator=generator) / math.sqrt(dim))
    leaves.append(torch.randn(1, generator=generator))
    query, key, value, projection, amplitude = (leaf.requires_grad_() for leaf in leaves)
    grad_out = torch.randn(1, length, 1, dim, generator=generator)
    step = F.softplus(F.linear(value.flatten(2), projection))
    scores = torch.exp(amplitude * step).transpose(1, 2)

    ours = dynamic_mask_attn_func(query, key, value, scores, window)
    rows = []
    for i in range(length):
        prefix = scores[0, 0, : i + 1]
        kept = prefix.topk(min(window, i + 1)).indices
        logits = key[0, kept, 0] @ query[0, i, 0] / math.sqrt(dim) + prefix[kept]
        rows.append(logits.softmax(0) @ value[0, kept, 0])
    loop = torch.stack(rows).view_as(ours)

    names = ("out", "query", "key", "value", "dt_proj", "A")
    results = (
        [out.detach(), *torch.autograd.grad(out, leaves, grad_out, retain_graph=True)]
        for out in (ours, loop)
    )
    return dict(zip(names, zip(*results, strict=True), strict=True))
