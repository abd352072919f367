"""What tables are made of: numbers with units, signs of old rows, ratios, where rows come from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flash_sparse_attn.bench.digest import WHY_STALE, is_stale

Row = dict[str, Any]

CHINESE = {
    "length N, window W": "长度 N，窗口 W",
    "heads, D": "头数，D",
    "scores": "分数",
    "selection and plan": "选择与计划",
    "forward": "前向",
    "backward": "反向",
    "all": "合计",
    "peak memory": "峰值内存",
    "computed by": "计算者",
    "fastest to slowest": "最快至最慢",
    "ours": "本项目",
    "dense causal SDPA": "稠密因果 SDPA",
    "SDPA, mask and bias stored": "SDPA，存储掩码与偏置",
    "SDPA, mask and bias added up": "SDPA，掩码与偏置预先相加",
    "no rows yet": "尚无数据",
    "Rows": "数据",
    "commit": "提交",
    "times": "倍",
}
STALE = "†"
CHINESE[WHY_STALE] = "所属运行的内核与当前源码不同，或未注明内核"
NAMES = {
    "ours": "ours",
    "sdpa-causal": "dense causal SDPA",
    "sdpa-masked": "SDPA, mask and bias stored",
    "sdpa-additive": "SDPA, mask and bias added up",
    "flex": "FlexAttention",
    "flash-dmattn": "flash-dmattn",
    "flash-sparse-attn": "flash-sparse-attn",
}


class Words:
    """The words of a page's language; English where there is no other."""

    def __init__(self, page: Path) -> None:
        self.known = CHINESE if page.stem.endswith("_zh") else {}

    def __call__(self, english: str) -> str:
        return self.known.get(english, english)


def duration(seconds: float | None) -> str:
    """Three digits and a unit."""
    if seconds is None:
        return ""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1.0:
            return f"{digits(seconds * factor)} {unit}"
    return f"{digits(seconds * 1e9)} ns"


def size(count: float | None) -> str:
    """Three digits and a binary unit."""
    if count is None:
        return ""
    for unit, bytes_each in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= bytes_each:
            return f"{digits(count / bytes_each)} {unit}"
    return f"{count:.0f} B"


def digits(number: float) -> str:
    """Three digits, trailing zeros included."""
    return f"{number:.{max(0, 2 - max(0, math.floor(math.log10(number))))}f}" if number else "0"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    rows = [list(header), ["---"] * len(header), *map(list, lines)]
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def marked(text: str, row: Row | None) -> str:
    """The text of a cell, with a sign if the kernels have changed since."""
    return f"{text} {STALE}" if text and row is not None and is_stale(row) else text


def source(name: str, rows: Iterable[Row], words: Words) -> list[str]:
    """Where rows come from: one line for every run, and one that explains the sign of old ones."""
    rows = list(rows)
    why = words(
        "of a run with other kernels than the present ones, or that does not name its kernels"
    )
    note = [f"{STALE} {why}"] if any(map(is_stale, rows)) else []
    runs = dict.fromkeys(map(run_of, rows))
    return note + [
        f"{words('Rows')}: `results/{name}`; {machine}, {used}, {words('commit')} {commit}, {day}: "
        f"`{command}`"
        for machine, used, commit, day, command in runs
    ]


def run_of(row: Row) -> tuple[str, str, str, str, str]:
    """Machine, versions, commit, day and command."""
    hardware, versions = row["hardware"], row["versions"]
    machine = hardware.get("gpu") or f"{hardware['cpu_cores']} x {hardware['cpu']}"
    used = f"torch {versions['torch']}"
    if hardware["device"] == "cuda":
        used += f", Triton {versions['triton']}"
    return machine, used, row["commit"], row["time"][:10], row["command"]


def paragraphs(lines: Sequence[str]) -> list[str]:
    """Each line a paragraph of its own."""
    return [part for line in lines for part in (line, "")][:-1]


def latest(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """The last row of every provider, by case."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["provider"]] = row
    return found


def shape_of(row: Row) -> tuple[str, str]:
    shape = row["shape"]
    heads = f"{shape['heads']} / {shape['kv_heads']}, {shape['head_dim']}"
    batch = "" if shape["batch"] == 1 else f"{shape['batch']} x "
    return f"{batch}{shape['length']}, {shape['window']}", heads


def ours_by_run(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    """Our rows by case and run: what others are held against."""
    return {case_and_run(row): row for row in rows if row["provider"] == "ours"}


def case_and_run(row: Row) -> tuple[str, ...]:
    return row["case"], row["time"], row["command"]


def against(
    ours: dict[tuple[str, ...], Row], other: Row | None, words: Words, part: str = "total"
) -> str:
    """Another provider's time, and how many times ours of the same run it is, if there is one."""
    if other is None:
        return ""
    seconds = other["seconds"][part]
    same_run = ours.get(case_and_run(other))
    text = duration(seconds)
    if same_run is not None:
        text += f" ({digits(seconds / same_run['seconds'][part])} {words('times')})"
    return marked(text, other)
