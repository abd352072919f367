"""Draw the pictures of the documentation, from real selections, as SVG files without dependencies.

python docs/draw_pictures.py            write docs/pictures/*.svg
python docs/draw_pictures.py --check    say which are out of date, and write nothing
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
from flash_sparse_attn import KeySelection, select_keys

PICTURES = Path(__file__).resolve().parent / "pictures"
INK, FAINT, HIDDEN, MARK = "#2b303b", "#8a93a0", "#e6eaee", "#bf1e2e"
WORST, BEST = (214, 228, 222), (20, 92, 76)


class Drawing:
    """Shapes in the order they are drawn, on white."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}" font-family="sans-serif" font-size="12">',
            f"<title>{title}</title>",
            f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "") -> None:
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{colour}" fill="none"{dashes}/>'
        )

    def text(
        self, x: float, y: float, words: str, colour: str = INK, anchor: str = "start"
    ) -> None:
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(f'<text x="{x:g}" y="{y:g}" fill="{colour}"{place}>{words}</text>')

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def random_scores(length: int, seed: int) -> torch.Tensor:
    """``[1, 1, length]``; Python's generator gives the same numbers in every version of torch."""
    draw = random.Random(seed)
    return torch.tensor([[[round(draw.gauss(0.0, 1.0), 3) for _ in range(length)]]])


def colours(scores: torch.Tensor) -> list[str]:
    """One colour per key, dark for the best; equal scores have equal colours."""
    values = scores.flatten().tolist()
    order = sorted(set(values))
    if len(order) == 1:
        return [_mix(0.6)] * len(values)
    return [_mix(order.index(value) / (len(order) - 1)) for value in values]


def _mix(part: float) -> str:
    return "#" + "".join(
        f"{round(low + part * (high - low)):02x}" for low, high in zip(WORST, BEST, strict=True)
    )


def mask_panel(
    drawing: Drawing, x: float, y: float, cell: float, seen: torch.Tensor, fill: Sequence[str]
) -> None:
    """A bool mask ``[Q, K]``: hidden causal pairs faint, visible ones in the colour of the key."""
    queries, keys = seen.shape
    for key in range(keys):
        drawing.box(x + key * cell, y + key * cell, cell - 1, (queries - key) * cell - 1, HIDDEN)
    for key in range(keys):
        column = seen[:, key].tolist()
        row = 0
        while row < queries:  # one box for each run of rows
            end = row
            while end < queries and column[end]:
                end += 1
            if end > row:
                box = (x + key * cell, y + row * cell, cell - 1, (end - row) * cell - 1)
                drawing.box(*box, fill[key])
            row = end + 1


def selection_picture() -> str:
    """Scores above the mask they give; beside it the same keys as intervals."""
    length, window, cell = 40, 8, 9
    scores = random_scores(length, 3)
    selection = select_keys(scores, window)
    seen, fill = selection.to_dense()[0, 0], colours(scores)
    left, top, size = 62, 112, length * cell
    drawing = Drawing(960, top + size + 52, "Scores, mask and intervals of one selection")

    drawing.text(left, 20, f"one learned score per key; {length} keys, window W = {window}")
    lowest = float(scores.min())
    for key, score in enumerate(scores.flatten().tolist()):
        height = 4 + 60 * (score - lowest) / float(scores.max() - lowest)
        drawing.box(left + key * cell, 98 - height, cell - 1, height, fill[key])
    drawing.text(left - 8, 98, "score", FAINT, "end")
    mask_panel(drawing, left, top, cell, seen, fill)
    drawing.text(left - 8, top + 12, "query 0", FAINT, "end")
    drawing.text(left - 8, top + size - 2, str(length - 1), FAINT, "end")
    drawing.text(left, top + size + 18, "key 0", FAINT)
    drawing.text(left + size, top + size + 18, str(length - 1), FAINT, "end")
    drawing.text(left, top + size + 38, "mask: each query sees the W best keys of its past")

    left = 540
    drawing.text(left, 20, "key j is visible to the positions [j, expiry): two integers per key")
    drawing.text(left, 40, "a key that W better ones have overtaken never returns", FAINT)
    expiry = selection.expiry[0, 0].clamp(max=length).tolist()
    for key in range(length):
        row = top + key * cell
        drawing.box(left + key * cell, row, (length - key) * cell - 1, cell - 1, HIDDEN)
        if expiry[key] > key:
            drawing.box(left + key * cell, row, (expiry[key] - key) * cell - 1, cell - 1, fill[key])
    at = 30
    x = left + (at + 0.5) * cell
    drawing.line(x, top - 14, x, top + size, MARK, "4 3")
    drawing.text(x, top - 20, f"position {at}: {int(seen[at].sum())} keys live", MARK, "middle")
    drawing.text(left - 8, top + 12, "key 0", FAINT, "end")
    drawing.text(left - 8, top + size - 2, str(length - 1), FAINT, "end")
    drawing.text(left, top + size + 18, "position 0", FAINT)
    drawing.text(left + size, top + size + 18, str(length - 1), FAINT, "end")
    drawing.text(left, top + size + 38, "intervals: which keys live when")
    return drawing.svg()


def modes_picture() -> str:
    """Six selections of 32 keys side by side."""
    length, window, cell = 32, 6, 6
    scores = random_scores(length, 5)
    equal = torch.zeros_like(scores)
    borders = torch.tensor([0, 12, 32], dtype=torch.int32)
    panels: list[tuple[str, str, torch.Tensor, KeySelection]] = [
        ("causal", "the W best of the past", scores, select_keys(scores, window)),
        ("causal, equal scores", "a sliding window", equal, select_keys(equal, window)),
        (
            "keep_first=2, keep_recent=4",
            "sinks and a local window on top",
            scores,
            select_keys(scores, window, keep_first=2, keep_recent=4),
        ),
        (
            "shared",
            "the W best of all: reads the future",
            scores,
            select_keys(scores, window, mode="shared"),
        ),
        ("relu", "every positive score", scores, select_keys(scores, window, mode="relu")),
        (
            "cu_seqlens=[0, 12, 32]",
            "packed texts, each on its own",
            scores,
            select_keys(scores[0], window, cu_seqlens=borders),
        ),
    ]
    drawing = Drawing(3 * 260 + 40, 2 * 260 + 20, f"Six selections of {length} keys, W = {window}")
    for number, (name, what, shown, selection) in enumerate(panels):
        x, y = 30 + number % 3 * 260, 52 + number // 3 * 260
        causal = selection.to_dense(is_causal=True)
        drawing.text(x, y - 24, name)
        drawing.text(x, y - 8, what, FAINT)
        mask_panel(drawing, x, y, cell, causal.reshape(length, length), colours(shown))
    return drawing.svg()


def plan_picture() -> str:
    """The same mask as the kernels walk it: epochs of queries, each with its own list of keys."""
    length, window, epoch, cell = 48, 10, 12, 8
    scores = random_scores(length, 11)
    selection = select_keys(scores, window)
    seen, fill = selection.to_dense()[0, 0], colours(scores)
    value, expiry = scores.flatten().tolist(), selection.expiry[0, 0].tolist()
    left, top = 30, 62
    drawing = Drawing(960, top + length * cell + 50, "The plan of a selection")
    drawing.text(left, 22, f"the mask: {length} x {length}, W = {window}")
    drawing.text(left, 40, f"cut into epochs of L = {epoch} queries", FAINT)
    mask_panel(drawing, left, top, cell, seen, fill)
    for begin in range(epoch, length, epoch):
        y = top + begin * cell - 0.5
        drawing.line(left - 6, y, left + length * cell + 6, y, MARK, "4 3")

    left = 480
    drawing.text(left, 22, "what is read: one list of keys for all queries of an epoch")
    drawing.text(left, 40, "survivors at its start, best first", FAINT)
    middle = left + window * cell + 24
    drawing.text(middle + 130, 40, "| keys that enter and live, by position", FAINT)
    for begin in range(0, length, epoch):
        queries = range(begin, begin + epoch)
        alive = [j for j in range(begin) if expiry[j] > begin]
        survivors = sorted(alive, key=lambda j: (value[j], j), reverse=True)
        entrants = [j for j in queries if expiry[j] > j]
        for x, keys in ((left, survivors), (middle, entrants)):
            for slot, key in enumerate(keys):
                for query in queries:
                    if begin <= key and query < key:
                        continue  # not born: the loop ends before
                    colour = fill[key] if seen[query, key] else HIDDEN
                    box = (x + slot * cell, top + query * cell, cell - 1, cell - 1)
                    drawing.box(*box, colour)
        y = top + (begin + epoch) * cell - 0.5
        if begin + epoch < length:
            drawing.line(left - 6, y, middle + epoch * cell + 6, y, MARK, "4 3")
        words = f"{len(survivors)} + {len(entrants)} keys of {begin + epoch}"
        drawing.text(middle + epoch * cell + 20, top + (begin + epoch / 2) * cell, words, FAINT)
    bottom = top + length * cell + 20
    drawing.text(left, bottom, "survivors die worst first, so that the dead are a suffix;")
    drawing.text(left, bottom + 17, "at most W + L keys are touched, however long the text")
    return drawing.svg()


def cache_picture() -> str:
    """What the slots of a window cache hold while a text is read."""
    length, window, cell = 72, 8, 10
    scores = random_scores(length, 7)
    selection = select_keys(scores, window)
    expiry, fill = selection.expiry[0, 0].tolist(), colours(scores)
    left, top = 96, 60
    drawing = Drawing(left + length * cell + 30, top + window * 14 + 56, "A cache of W slots")
    drawing.text(left, 22, f"{length} tokens are read one by one; the cache has W = {window} slots")
    drawing.text(left, 40, "a new key takes the slot of the one that was evicted", FAINT)
    slots: list[int | None] = [None] * window
    for key in range(length):
        slots = [held if held is not None and expiry[held] > key else None for held in slots]
        if expiry[key] <= key:
            continue  # worse than all that are kept: neither stored nor visible
        place = slots.index(None)
        slots[place] = key
        width = (min(expiry[key], length) - key) * cell - 1
        drawing.box(left + key * cell, top + place * 14, width, 13, fill[key])
    for place in range(window):
        drawing.text(left - 8, top + place * 14 + 11, f"slot {place}", FAINT, "end")
    bottom = top + window * 14 + 18
    drawing.text(left, bottom, "token 0", FAINT)
    drawing.text(left + length * cell, bottom, str(length - 1), FAINT, "end")
    drawing.text(left, bottom + 20, "dark: a high score; the memory does not grow with the text")
    return drawing.svg()


DRAW: dict[str, Callable[[], str]] = {
    "selection.svg": selection_picture,
    "modes.svg": modes_picture,
    "plan.svg": plan_picture,
    "cache.svg": cache_picture,
}


def outdated() -> list[Path]:
    """The pictures that differ from what would be drawn now."""
    return [
        PICTURES / name
        for name, draw in DRAW.items()
        if not (PICTURES / name).is_file()
        or (PICTURES / name).read_text(encoding="utf-8") != draw()
    ]


def main(arguments: Sequence[str]) -> int:
    if arguments == ["--check"]:
        for path in outdated():
            print(f"{path}: out of date; run python docs/draw_pictures.py")
        return bool(outdated())
    if arguments:
        print(__doc__)
        return 2
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAW.items():
        (PICTURES / name).write_text(draw(), encoding="utf-8")
        print(PICTURES / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
