"""Line charts as SVG text, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

# Size of the picture and of the margins around the plot, in pixels.
WIDTH = 720
HEIGHT = 420
LEFT = 70
RIGHT = 150
TOP = 50
BOTTOM = 55

# Up to this number of x values, each gets a tick and each point a marker.
MAX_MARKED = 10
LABEL_HEIGHT = 16
COLOURS = ("#4c566a", "#d08770", "#2e7d32", "#1565c0", "#8e24aa", "#c62828")


@dataclass(frozen=True)
class Line:
    """A named series of (x, y) points."""

    name: str
    points: list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Converts values to pixels. Both axes begin at 0; y pixels grow downwards."""

    x_max: float
    y_max: float
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM

    def x(self, value: float) -> float:
        return LEFT + (self.right - LEFT) * value / self.x_max

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - TOP) * value / self.y_max


def ticks(largest: float, about: int = 5) -> list[float]:
    """Return about ``about`` round numbers from 0 to at least ``largest``.

    Example: 230 -> a step of at least 230 / 5 = 46, rounded up to 50: 0, 50, 100, 150, 200, 250.
    """
    raw = max(largest, 1e-12) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return [step * i for i in range(math.ceil(largest / step) + 1)]


def chart(lines: Sequence[Line], title: str, x_label: str, y_label: str) -> str:
    """Return the SVG of ``lines``. Each one is labelled at its end."""
    xs = sorted({x for line in lines for x, _ in line.points})
    marked = len(xs) <= MAX_MARKED
    x_ticks = xs if marked else ticks(xs[-1])
    y_ticks = ticks(max(y for line in lines for _, y in line.points))
    axes = Axes(x_max=x_ticks[-1], y_max=y_ticks[-1])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="{TOP - 22}" font-size="16" font-weight="bold">{escape(title)}</text>',
        *_grid(axes, x_ticks, y_ticks),
        *_axis_labels(axes, x_label, y_label),
        *_series(axes, lines, marked),
    ]
    return "\n".join([*parts, "</svg>", ""])


def _grid(axes: Axes, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[str]:
    parts = []
    for value in y_ticks:
        y = axes.y(value)
        parts.append(
            f'<line x1="{LEFT}" x2="{axes.right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e0e0e0"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        x = axes.x(value)
        parts.append(
            f'<text x="{x:.1f}" y="{axes.bottom + 20}" text-anchor="middle">{value:g}</text>'
        )
    return parts


def _axis_labels(axes: Axes, x_label: str, y_label: str) -> list[str]:
    x = (LEFT + axes.right) / 2
    y = (TOP + axes.bottom) / 2
    return [
        f'<text x="{x}" y="{axes.bottom + 42}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(18 {y}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]


def _series(axes: Axes, lines: Sequence[Line], marked: bool) -> list[str]:
    parts = []
    # Draw from the lowest end to the highest. Where ends are close, each label moves up to stay
    # clear of the one below it.
    label_y = float(HEIGHT)
    for i, line in sorted(enumerate(lines), key=lambda pair: pair[1].points[-1][1]):
        colour = COLOURS[i % len(COLOURS)]
        points = [(axes.x(x), axes.y(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
        )
        if marked:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points
            ]
        label_y = min(points[-1][1], label_y - LABEL_HEIGHT)
        parts.append(
            f'<text x="{axes.right + 10}" y="{label_y + 4:.1f}" fill="{colour}">'
            f"{escape(line.name)}</text>"
        )
    return parts
