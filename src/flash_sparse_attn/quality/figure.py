"""A figure of rows: the results of every case, and how the losses fell."""

from __future__ import annotations

import io
from typing import Any

from ..bench.store import Row
from ..demo.figure import KIND_COLOURS
from .tasks import ATTENTIONS


def draw(rows: list[Row], form: str) -> bytes:
    """One column for each length of the recall, and one for the text: results above, losses below.

    Args:
        rows: Of `run.compare`.
        form: png, svg or pdf.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    columns = _columns(rows)
    figure = Figure(figsize=(4.2 * len(columns), 7.5), layout="constrained")
    for index, (title, found) in enumerate(columns.items()):
        above = figure.add_subplot(2, len(columns), index + 1)
        below = figure.add_subplot(2, len(columns), len(columns) + index + 1)
        above.set_title(title, size=10)
        if "accuracy" in found[0]["results"]:
            _accuracy(above, found)
        else:
            _bits(above, found)
        _curves(below, found)
        if index == 0:
            above.legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=110)
    return content.getvalue()


def _columns(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by panel; of several with one seed the last."""
    last = {
        (row["case"], str(row.get("curriculum")), row["provider"], row["seed"]): row for row in rows
    }
    columns: dict[str, list[Row]] = {}
    for row in last.values():
        title = f"text, {row['length']} bytes"
        if "pairs" in row:
            title = f"{row['pairs']} pairs in {row['length']} tokens, noise: {row['noise']}"
            if lessons := row.get("curriculum"):
                steps = " + ".join(str(lesson["steps"]) for lesson in lessons)
                title += f", after {steps} steps of lessons"
        columns.setdefault(title, []).append(row)
    return columns


def _accuracy(axes: Any, rows: list[Row]) -> None:
    """Against the width, the mean over seeds as a line and every seed as a dot."""
    for kind, name in ATTENTIONS.items():
        points: dict[int, list[float]] = {}
        for row in rows:
            if row["provider"] == kind:
                points.setdefault(row["model"]["width"], []).append(row["results"]["accuracy"])
        widths = sorted(points)
        means = [sum(points[width]) / len(points[width]) for width in widths]
        axes.plot(widths, means, color=KIND_COLOURS[kind], label=name)
        for width in widths:
            axes.plot([width] * len(points[width]), points[width], "o", color=KIND_COLOURS[kind])
    widths = sorted({row["model"]["width"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.set_ylim(-0.03, 1.03)
    axes.set(xlabel="width", ylabel="right answers")


def _bits(axes: Any, rows: list[Row]) -> None:
    """Bits per byte, every seed a dot."""
    kinds = [kind for kind in ATTENTIONS if any(row["provider"] == kind for row in rows)]
    for place, kind in enumerate(kinds):
        bits = [row["results"]["bits_per_byte"] for row in rows if row["provider"] == kind]
        colour, name = KIND_COLOURS[kind], ATTENTIONS[kind]
        axes.plot([place] * len(bits), bits, "o", color=colour, label=name)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("bits per held-out byte")


def _curves(axes: Any, rows: list[Row]) -> None:
    """Training losses; of several widths the largest."""
    widest = max(row["model"]["width"] for row in rows)
    for row in rows:
        if row["model"]["width"] == widest:
            steps, losses = zip(*row["curve"], strict=True)
            axes.plot(steps, losses, color=KIND_COLOURS[row["provider"]], linewidth=1.0)
    axes.set(xlabel=f"step (width {widest})", ylabel="training loss, nats")
