"""A line chart as SVG text: no plotting library for one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 70, 150, 50, 55
FEW = 10  # points up to which each is marked and named on the x axis
COLOURS = ("#4c566a", "#d08770", "#2e7d32", "#1565c0", "#8e24aa", "#c62828")


@dataclass(frozen=True)
class Line:
    """A named series of (x, y) points."""

    name: str
    points: list[tuple[float, float]]


def ticks(largest: float, about: int = 5) -> list[float]:
    """Round numbers from 0 to at least ``largest``."""
    raw = max(largest, 1e-12) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return [step * i for i in range(math.ceil(largest / step) + 1)]


def chart(lines: Sequence[Line], title: str, x_label: str, y_label: str) -> str:
    """The SVG; both axes begin at 0, every series is labelled at its end."""
    xs = sorted({x for line in lines for x, _ in line.points})
    few = len(xs) <= FEW
    x_ticks = xs if few else ticks(xs[-1])
    y_ticks = ticks(max(y for line in lines for _, y in line.points))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def px(x: float) -> float:
        return LEFT + (right - LEFT) * x / x_ticks[-1]

    def py(y: float) -> float:
        return bottom - (bottom - TOP) * y / y_ticks[-1]

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="{TOP - 22}" font-size="16" font-weight="bold">{escape(title)}</text>',
    ]
    for y in y_ticks:
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{py(y):.1f}" y2="{py(y):.1f}" stroke="#e0e0e0"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    parts += [
        f'<text x="{px(x):.1f}" y="{bottom + 20}" text-anchor="middle">{x:g}</text>'
        for x in x_ticks
    ]
    parts.append(
        f'<text x="{(LEFT + right) / 2}" y="{bottom + 42}" text-anchor="middle">{escape(x_label)}</text>'
    )
    turned = f'transform="translate(18 {(TOP + bottom) / 2}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{escape(y_label)}</text>')
    lowest = float(HEIGHT)
    for i, line in sorted(enumerate(lines), key=lambda pair: pair[1].points[-1][1]):
        colour, points = COLOURS[i % len(COLOURS)], [(px(x), py(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
        )
        if few:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points
            ]
        lowest = min(points[-1][1], lowest - 16)  # labels do not overlap
        parts.append(
            f'<text x="{right + 10}" y="{lowest + 4:.1f}" fill="{colour}">{escape(line.name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])
