"""Charts with logarithmic axes as SVG: the same numbers give the same bytes, on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

INK, FAINT, GRID = "#2b303b", "#8a93a0", "#e6eaee"
COLOURS = ("#145c4c", "#4c566a", "#d08770", "#7a5195", "#bf1e2e", "#3b6fb6", "#8c6d1f", "#5f9e8f")
_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 24, 50, 74  # margins of the axes
_LEGEND, _LINE = 190, 18

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Lines through points, both axes logarithmic.

    Attributes:
        title, x_label, y_label: Words.
        lines: Points by name, by x; one alone is a dot. Colours go by the order.
        notes: Lines of small text below.
        x_text, y_text: How a number is written at its axis.
        is_connected: Whether points of a name are joined.
        ceilings: Horizontal lines by name.
        bounds: Other dashed lines by name.
        y_base: Of the powers that the vertical axis has.
    """

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Points]
    notes: Sequence[str] = ()
    x_text: Callable[[float], str] = field(default="{:g}".format)
    y_text: Callable[[float], str] = field(default="{:g}".format)
    is_connected: bool = True
    ceilings: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, Points] = field(default_factory=dict)
    y_base: int = 10

    def svg(self) -> str:
        """The picture. Numbers are rounded to tenths, so that no last bit of a logarithm shows."""
        points = [p for line in (*self.lines.values(), *self.bounds.values()) for p in line]
        across = _Axis([x for x, _ in points], _LEFT, _WIDTH - _RIGHT - _LEGEND, 2)
        heights = [*(y for _, y in points), *self.ceilings.values()]
        up = _Axis(heights, _HEIGHT - _BOTTOM, _TOP, self.y_base)
        height = _HEIGHT + _LINE * len(self.notes)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
            f"<title>{_escaped(self.title)}</title>",
            f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
            _text(_LEFT, 24, self.title, INK, size=14),
        ]
        for tick in across.ticks():
            x = across(tick)
            parts += [_path([(x, _TOP), (x, _HEIGHT - _BOTTOM)], GRID)]
            parts += [_text(x, _HEIGHT - _BOTTOM + 18, self.x_text(tick), FAINT, "middle")]
        for tick in up.ticks():
            y = up(tick)
            parts += [_path([(_LEFT, y), (_WIDTH - _RIGHT - _LEGEND, y)], GRID)]
            parts += [_text(_LEFT - 8, y + 4, self.y_text(tick), FAINT, "end")]
        middle = (_LEFT + _WIDTH - _RIGHT - _LEGEND) / 2
        parts += [_text(middle, _HEIGHT - _BOTTOM + 40, self.x_label, INK, "middle")]
        parts += [_text(_LEFT, _TOP - 8, self.y_label, INK)]
        for name, level in self.ceilings.items():
            y = up(level)
            parts += [_path([(_LEFT, y), (_WIDTH - _RIGHT - _LEGEND, y)], FAINT, dash="6 4")]
            parts += [_text(_LEFT + 6, y - 6, name, FAINT)]
        for name, line in self.bounds.items():
            places = [(across(x), up(y)) for x, y in line]
            parts += [_path(places, FAINT, dash="6 4")]
            parts += [_text(places[0][0] + 6, places[0][1] - 6, name, FAINT)]
        for index, (name, line) in enumerate(self.lines.items()):
            colour = COLOURS[index % len(COLOURS)]
            places = [(across(x), up(y)) for x, y in line]
            if self.is_connected and len(places) > 1:
                parts += [_path(places, colour, width=2)]
            parts += [
                f'<circle cx="{_number(x)}" cy="{_number(y)}" r="4" fill="{colour}"/>'
                for x, y in places
            ]
            left, top = _WIDTH - _RIGHT - _LEGEND + 18, _TOP + 6 + _LINE * index
            parts += [f'<rect x="{left}" y="{top - 9}" width="10" height="10" fill="{colour}"/>']
            parts += [_text(left + 16, top, name, INK)]
        for index, note in enumerate(self.notes):
            parts += [_text(_LEFT, _HEIGHT - 14 + _LINE * index, note, FAINT, size=11)]
        return "\n".join([*parts, "</svg>"]) + "\n"


class _Axis:
    """From numbers to places, logarithmic, with whole powers of `base` at both ends."""

    def __init__(self, values: Sequence[float], begin: float, end: float, base: int) -> None:
        self.base, self.begin, self.end = base, begin, end
        # A hair of room: the logarithm of a power may be a last bit off.
        self.low = math.floor(math.log(min(values), base) + 1e-9)
        self.high = max(math.ceil(math.log(max(values), base) - 1e-9), self.low + 1)

    def __call__(self, value: float) -> float:
        part = (math.log(value, self.base) - self.low) / (self.high - self.low)
        return self.begin + part * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Powers of the base, at most nine."""
        step = -(-(self.high - self.low) // 8)
        return [float(self.base) ** power for power in range(self.low, self.high + 1, step)]


def _path(places: Points, colour: str, width: int = 1, dash: str = "") -> str:
    data = "L".join(f"{_number(x)} {_number(y)}" for x, y in places)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="M{data}" stroke="{colour}" stroke-width="{width}" fill="none"{dashes}/>'


def _text(
    x: float, y: float, words: str, colour: str, anchor: str = "start", size: int = 12
) -> str:
    place = f'x="{_number(x)}" y="{_number(y)}" fill="{colour}"'
    return f'<text {place} text-anchor="{anchor}" font-size="{size}">{_escaped(words)}</text>'


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _escaped(words: str) -> str:
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
