"""The demo's one figure: a panel or two for every question."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from . import cost
from .model import KINDS

KIND_COLOURS = {"full": "#4c566a", "window": "#d08770", "dynamic": "#2e7d6b", "shared": "#7a5195"}
"""Colours of the kinds of `model.SmallModel`."""
_METHODS = {"ours": "#2e7d6b", "sdpa-causal": "#4c566a", "sdpa-masked": "#d08770"}


def draw(results: dict[str, dict[str, Any]]) -> bytes:
    """A PNG of all four answers.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(19, 8.5), layout="constrained")
    _recall(axes[0, 0], results["a"])
    _kept(axes[0, 1], results["a"])
    _time(axes[0, 2], results["b"])
    _memory(axes[0, 3], results["b"])
    _learning(axes[1, 0], results["a"], "a. training on recall")
    _learning(axes[1, 1], results["c"], "c. training on Python source, loss in nats per byte")
    _token_time(axes[1, 2], results["d"])
    _cache(axes[1, 3], results["d"])
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    pyplot.close(figure)
    return target.getvalue()


def _recall(axis: Any, recall: dict[str, Any]) -> None:
    models = recall["models"]
    for offset, field, hatch in ((-0.2, "accuracy", None), (0.2, "far_accuracy", "//")):
        heights = [100 * models[kind][field] for kind in KINDS]
        places = [index + offset for index in range(len(KINDS))]
        colours = [KIND_COLOURS[kind] for kind in KINDS]
        bars = axis.bar(places, heights, 0.38, color=colours, hatch=hatch, alpha=0.9)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.set_xticks(range(len(KINDS)), KINDS.values())
    axis.set_ylim(0, 110)
    axis.set_ylabel("right answers, %")
    axis.set_title(
        "a. recall of 8 pairs in noise\n(hatched: out of the windows' reach)", fontsize=10
    )


def _kept(axis: Any, recall: dict[str, Any]) -> None:
    """One row for every layer and KV head: a tick for each key that the last query sees."""
    mask, is_pair = recall["kept"]["mask"], recall["kept"]["is_pair"]
    for place in is_pair.nonzero().flatten().tolist():
        axis.axvspan(place - 0.5, place + 0.5, color="#ebcb8b", alpha=0.7, linewidth=0)
    for row, kept in enumerate(mask):
        for colour, chosen in (("#9aa5b1", kept & ~is_pair), ("#bf1e2e", kept & is_pair)):
            places = chosen.nonzero().flatten().tolist()
            axis.vlines(places, row - 0.38, row + 0.38, color=colour, linewidth=1.0)
    heads = recall["kept"]["kv_heads"]
    names = [f"layer {row // heads + 1}\nhead {row % heads + 1}" for row in range(len(mask))]
    axis.set_yticks(range(len(mask)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("position in the text")
    title = "a. tokens kept for the last query\n(yellow: pairs, red: kept pairs, grey: kept noise)"
    axis.set_title(title, fontsize=10)


def _time(axis: Any, results: dict[str, Any]) -> None:
    for name, measured in results["measured"].items():
        seconds = [one["seconds"]["total"] for one in measured.values()]
        axis.loglog(list(measured), seconds, "o-", color=_METHODS[name], label=cost.COLUMNS[name])
    _lengths(axis, results["measured"]["ours"], "length")
    axis.set_ylabel("forward + backward, s")
    axis.legend(fontsize=8)
    axis.set_title(
        f"b. time, {results['settings'].window} keys kept, selection included", fontsize=10
    )


def _memory(axis: Any, results: dict[str, Any]) -> None:
    for name, measured in results["measured"].items():
        peaks = {n: one["peak_bytes"] / 2**20 for n, one in measured.items() if one["peak_bytes"]}
        label = cost.COLUMNS[name]
        axis.loglog(list(peaks), list(peaks.values()), "o-", color=_METHODS[name], label=label)
    _lengths(axis, results["measured"]["ours"], "length")
    axis.set_ylabel("peak memory above the inputs, MiB")
    axis.set_title("b. memory", fontsize=10)


def _learning(axis: Any, results: dict[str, Any], title: str) -> None:
    for kind, model in results["models"].items():
        axis.plot(model["losses"], color=KIND_COLOURS[kind], linewidth=1.0, label=KINDS[kind])
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=10)


def _token_time(axis: Any, results: dict[str, Any]) -> None:
    contexts = [step["context"] for step in results["steps"]]
    milliseconds = [1e3 * step["seconds"] for step in results["steps"]]
    axis.semilogx(contexts, milliseconds, "o-", color="#2e7d6b")
    axis.set_ylim(0, 1.6 * max(milliseconds))
    _lengths(axis, contexts, "context")
    axis.set_ylabel("time per token, ms")
    axis.set_title("d. decoding time", fontsize=10)


def _cache(axis: Any, results: dict[str, Any]) -> None:
    contexts = [step["context"] for step in results["steps"]]
    for field, colour, name in (
        ("cache_bytes", "#2e7d6b", "WindowCache"),
        ("full_cache_bytes", "#4c566a", "all keys and values"),
    ):
        sizes = [step[field] / 2**20 for step in results["steps"]]
        axis.loglog(contexts, sizes, "o-", color=colour, label=name)
    _lengths(axis, contexts, "context")
    axis.set_ylabel("MiB")
    axis.legend(fontsize=8)
    axis.set_title("d. decoding memory", fontsize=10)


def _lengths(axis: Any, lengths: Iterable[int], name: str) -> None:
    """Mark the measured lengths themselves on a logarithmic axis."""
    labels = {n: f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths}
    axis.set_xticks(list(labels), labels.values())
    axis.set_xticks([], minor=True)
    axis.set_xlabel(name)
