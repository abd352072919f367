"""Draw a selection: which keys live when, when they expire, and how dense every head is.

    python examples/draw_selection.py [--scores FILE.pt] [--pattern random] [--window 32]
        [--mode causal] [--keep-first 0] [--keep-recent 0] [--out selection.png]

Needs matplotlib and no GPU. The scores are drawn from a pattern, one for each head if several are
named, or read from a file that ``torch.save`` wrote: a tensor ``[Hkv, K]`` or ``[B, Hkv, K]``, of
which the first batch entry is shown. Prints what the selection does and writes the figure.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_sparse_attn import KeySelection, select_keys
from flash_sparse_attn.bench.console import table, write_whole
from flash_sparse_attn.selection import MODES

_MASK_PIXELS = 512  # of a side of a mask, about
PATTERNS = ("random", "equal", "rising", "falling", "bursts", "slow")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Draw, print, and return the statistics of every head."""
    options = parse(arguments)
    scores = read_scores(options.scores) if options.scores else make_scores(options)
    keep = {"keep_first": options.keep_first, "keep_recent": options.keep_recent}
    selection = select_keys(scores, options.window, mode=options.mode, **keep)
    names = options.pattern if not options.scores else []
    heads = [head_facts(selection, head) for head in range(scores.shape[1])]
    print(selection)
    print(report(heads, names))
    write_whole(options.out, draw(selection, names, options.out.suffix))
    print(f"figure: {options.out}")
    return {"heads": heads}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Draw a selection of keys.")
    parser.add_argument("--scores", type=Path, help="a file of torch.save: [Hkv, K] or [B, Hkv, K]")
    parser.add_argument("--pattern", nargs="+", choices=PATTERNS, default=["random", "slow"])
    parser.add_argument("--length", type=int, default=256, help="number of keys (default 256)")
    parser.add_argument("--window", type=int, default=32, help="keys a query keeps (default 32)")
    parser.add_argument("--mode", choices=MODES, default="causal")
    parser.add_argument("--keep-first", type=int, default=0, help="sinks on top of the window")
    parser.add_argument("--keep-recent", type=int, default=0, help="newest keys on top of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("selection.png"), help=".png, .svg, .pdf")
    options = parser.parse_args(arguments)
    if options.length < 1:
        parser.error(f"--length: expected at least 1, got {options.length}")
    return options


def read_scores(path: Path) -> Tensor:
    """Scores ``[1, Hkv, K]`` from a file."""
    scores = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(scores, Tensor) or scores.dim() not in (2, 3) or not scores.numel():
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        sys.exit(f"--scores: expected a tensor [Hkv, K] or [B, Hkv, K] in {path}, got {found}")
    return scores.detach().float()[None] if scores.dim() == 2 else scores[:1].detach().float()


def make_scores(options: argparse.Namespace) -> Tensor:
    """Scores ``[1, patterns, K]``, one head for each pattern."""
    generator = torch.Generator().manual_seed(options.seed)
    size = options.length

    def one(pattern: str) -> Tensor:
        noise = torch.randn(size, generator=generator)
        line = torch.linspace(-2, 2, size)
        if pattern == "slow":  # neighbours have similar scores
            return torch.nn.functional.avg_pool1d(noise[None], 17, 1, 8)[0] * 4
        if pattern == "bursts":  # few keys matter
            return torch.where(torch.rand(size, generator=generator) < 0.1, noise + 3, noise / 10)
        return {
            "random": noise,
            "equal": torch.zeros(size),
            "rising": noise + 2 * line,
            "falling": noise - 2 * line,
        }[pattern]

    return torch.stack([one(pattern) for pattern in options.pattern])[None]


def head_facts(selection: KeySelection, head: int) -> dict[str, float]:
    """`KeySelection.statistics` of one KV head."""
    part = slice(head, head + 1)
    return KeySelection(
        selection.start[:, part],
        selection.expiry[:, part],
        selection.score[:, part],
        selection.mode,
        selection.window_size,
        selection.keep_first,
        selection.keep_recent,
    ).statistics()


def report(heads: list[dict[str, float]], names: list[str]) -> str:
    """The statistics as a table, with the words for what they are."""
    lines = [
        [
            f"{head} {names[head]}" if names else str(head),
            f"{facts['density']:.1%}",
            f"{facts['live_keys']:.1f}",
            f"{facts['age']:.1f}",
            f"{facts['churn']:.2f}",
            f"{facts['tied']:.1%}",
        ]
        for head, facts in enumerate(heads)
    ]
    header = ("KV head", "density", "keys seen", "their age", "evictions", "tied")
    return "\n".join(
        [
            table(header, lines),
            "",
            "density: visible pairs over causal pairs; keys seen: mean over the queries; age: mean",
            "distance in tokens from a query to the keys it sees; evictions: for each token; tied:",
            "part of the keys whose score another key has, too",
        ]
    )


def draw(selection: KeySelection, names: list[str], suffix: str) -> bytes:
    """The figure: for each head its mask, lifetimes and scores; below, live keys of all heads.

    Args:
        selection: Of ``[1, Hkv, K]``.
        names: A name for each head, or none.
        suffix: Of the file: ``".png"``, ``".svg"`` or ``".pdf"``.
    """
    from matplotlib.figure import Figure

    heads = selection.start.shape[1]
    figure = Figure(figsize=(13, 3.4 * heads + 2.6), layout="constrained")
    grid = figure.add_gridspec(heads + 1, 3, height_ratios=[*[3.4] * heads, 2.6])
    for head in range(heads):
        title = f"KV head {head}" + (f", {names[head]}" if names else "")
        _mask(figure.add_subplot(grid[head, 0]), selection, head, title)
        _lives(figure.add_subplot(grid[head, 1]), selection, head)
        _ages(figure.add_subplot(grid[head, 2]), selection, head)
    axes = figure.add_subplot(grid[heads, :])
    for head, counts in enumerate(selection.live_keys()[0].tolist()):
        axes.plot(counts, label=f"KV head {head}" + (f", {names[head]}" if names else ""))
    if selection.capacity is not None:
        axes.axhline(selection.capacity, color="#8a93a0", linestyle="--", label="most possible")
    axes.set(xlabel="position of the query", ylabel="keys it sees", title="live keys")
    axes.legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format=suffix.lstrip(".") or "png", dpi=110)
    return content.getvalue()


def _mask(axes: Any, selection: KeySelection, head: int, title: str) -> None:
    """Queries down, keys to the right; long texts in steps, from the intervals alone."""
    key_len = selection.start.shape[-1]
    step = max(1, -(-key_len // _MASK_PIXELS))
    keys = torch.arange(0, key_len, step)
    start = selection.start[0, head, keys]
    expiry = selection.expiry[0, head, keys]
    position = keys[:, None]
    seen = (keys <= position) & (start <= position) & (position < expiry)
    picture = seen.float() + 0.12 * ((keys <= position) & ~seen)
    size = (0, key_len, key_len, 0)
    axes.imshow(
        picture.numpy(), cmap="BuGn", vmin=0, vmax=1.2, extent=size, interpolation="nearest"
    )
    axes.set(title=f"{title}: the mask", xlabel="key", ylabel="query")


def _lives(axes: Any, selection: KeySelection, head: int) -> None:
    """The interval of every key as a line, in the colour of its score."""
    from matplotlib.collections import LineCollection

    key_len = selection.start.shape[-1]
    expiry = selection.expiry[0, head].clamp(max=key_len).tolist()
    lives = [(key, end) for key, end in enumerate(expiry) if end > key]
    lines = LineCollection([[(key, key), (end, key)] for key, end in lives], linewidths=1.2)
    lines.set_array(selection.score[0, head, [key for key, _ in lives]].numpy())
    lines.set_cmap("viridis")
    axes.add_collection(lines)
    axes.figure.colorbar(lines, ax=axes, label="score")
    axes.set(xlim=(0, key_len), ylim=(key_len, 0))
    axes.set(title="which keys live when", xlabel="position", ylabel="key")


def _ages(axes: Any, selection: KeySelection, head: int) -> None:
    """How long every key lives, against its score."""
    key_len = selection.start.shape[-1]
    index = torch.arange(key_len)
    life = (selection.expiry[0, head].clamp(max=key_len) - index).clamp(min=0)
    stays = selection.expiry[0, head] > key_len
    score = selection.score[0, head]
    kinds = ((~stays, "#d08770", "expired"), (stays, "#2e7d6b", "alive at the end"))
    for chosen, colour, label in kinds:
        points = score[chosen].tolist(), life[chosen].tolist()
        axes.scatter(*points, s=8, color=colour, label=label)
    axes.set(title="how long a key lives", xlabel="score", ylabel="tokens")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
