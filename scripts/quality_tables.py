"""Tables and curves of what models learned: rows of benchmarks/quality.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import table_parts
from table_parts import Row, Words, markdown, marked, paragraphs, source

from flash_sparse_attn.bench.chart import Chart
from flash_sparse_attn.quality.tasks import ATTENTIONS

GPU, CPU = "quality.jsonl", "quality-cpu.jsonl"
"""Their files in results/."""
_POINTS = 25  # of a line


def recall(rows: list[Row], words: Words) -> list[str]:
    """The part of right answers for every length and width, by attention."""
    return _table(rows, "accuracy", "right answers", words, GPU)


def recall_on_cpu(rows: list[Row], words: Words) -> list[str]:
    """The same in small."""
    return _table(rows, "accuracy", "right answers", words, CPU)


def text(rows: list[Row], words: Words) -> list[str]:
    """Bits per byte of held-out text, by attention."""
    everywhere = _table(rows, "bits_per_byte", "bits per byte", words, GPU)
    late = _table(rows, "late_bits_per_byte", "bits per byte, last quarter", words, GPU)
    return everywhere if everywhere == late else [*late[: late.index("")], "", *everywhere]


def _table(rows: list[Row], result: str, title: str, words: Words, name: str) -> list[str]:
    """One line for every case and its lessons: the mean over seeds, and least to largest."""
    found = [row for row in _last(rows) if result in row["results"]]
    if not found:
        return [words("no rows yet")]
    has_lessons = any("curriculum" in row for row in found)
    table = []
    for case, of_case in _by_case(found).items():
        steps, samples = (
            " / ".join(f"{n:,}" for n in sorted({row[key] for row in of_case}))
            for key in ("steps", "train_samples")
        )
        seeds = str(len({row["seed"] for row in of_case}))
        cells = [case[0], steps, samples, seeds, *[case[1]] * has_lessons]
        for kind in ATTENTIONS:
            of_kind = [row for row in of_case if row["provider"] == kind]
            mean = _over_seeds([row["results"][result] for row in of_kind])
            cells.append(marked(mean, next(filter(table_parts.is_stale, of_kind), None)))
        table.append(cells)
    header = [title, "steps", "training samples", "seeds", *["lessons before"] * has_lessons]
    header += ATTENTIONS.values()
    return [*markdown(header, table), "", *paragraphs(source(name, found, words))]


def charts(rows: list[Row], prefix: str) -> dict[str, Chart]:
    """How the losses of every case fell, a line for each attention: means over seeds.

    Args:
        rows: Of one file.
        prefix: Begin of the names of the charts.
    """
    found: dict[str, Chart] = {}
    numbers: Counter[str] = Counter()
    for (case, lessons), of_case in _by_case(_last(rows)).items():
        lines = {}
        for kind, attention in ATTENTIONS.items():
            curves = [row["curve"] for row in of_case if row["provider"] == kind]
            if curves:
                lines[attention] = _mean_curve(curves)
        row = of_case[0]
        notes = [f"{row['steps']:,} steps of {row['shape']['batch']}, seeds "]
        notes[0] += ", ".join(map(str, sorted({row["seed"] for row in of_case})))
        notes += [f"Lessons before: {lessons}"] if "curriculum" in row else []
        machine, versions, commit, *_ = table_parts.run_of(row)
        notes.append(f"{machine}, {versions}; commit {commit}")
        numbers[case] += 1
        found[f"{prefix}-{case}-{numbers[case]}"] = Chart(
            f"Training loss, {case}", "steps, lessons included", "nats", lines, notes, y_base=2
        )
    return found


def _mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float]]:
    """The mean of curves over the points that all have, some of them left out."""
    shortest = min(curves, key=len)
    stride = -(-len(shortest) // _POINTS)
    return [
        (shortest[index][0], sum(curve[index][1] for curve in curves) / len(curves))
        for index in range(len(shortest) - 1, -1, -stride)
    ][::-1]


def _last(rows: list[Row]) -> list[Row]:
    """The last row of every case with its lessons, attention and seed."""
    last = {(row["case"], _lessons(row), row["provider"], row["seed"]): row for row in rows}
    return list(last.values())


def _by_case(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by case and lessons."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["case"], _lessons(row)), []).append(row)
    return found


def _lessons(row: Row) -> str:
    """The lessons of a training, which all attentions had: steps, pairs, tokens."""
    lessons = row.get("curriculum", [])
    parts = (f"{one['steps']} × {one['pairs']} pairs in {one['length']}" for one in lessons)
    return ", ".join(parts) or "none"


def _over_seeds(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} .. {max(values):.3f})"
