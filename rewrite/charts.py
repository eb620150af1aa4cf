"""Curves on two logarithmic axes, drawn with characters; `chart_images` draws the same charts as PNG or SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 64, 14
GUESSED = "."


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        label: What it is, for the legend.
        mark: One character that stands for it in text.
        points: (x, y), x ascending, both positive.
        known: By point: drawn with the mark, or a full line; else with dots. A curve without any is all marks.
    """

    label: str
    mark: str
    points: Sequence[tuple[float, float]]
    known: Sequence[bool]


@dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes.

    Attributes:
        title: Above it.
        x_label: What x is.
        y_label: What y is.
        curves: Of which later ones are drawn over earlier ones.
        x_text: An x as people read it.
        y_text: A y as people read it.
        dotted: What it means that a point is not known.
        level: A y that gets a line of its own; None: none.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    x_text: Callable[[float], str]
    y_text: Callable[[float], str]
    dotted: str
    level: float | None = None


def text_of(chart: Chart, width: int = WIDTH, height: int = HEIGHT) -> str:
    """The chart in characters: ``width`` columns and ``height`` rows beside its axes."""
    xs = [math.log(x) for curve in chart.curves for x, _ in curve.points]
    ys = [math.log(y) for curve in chart.curves for _, y in curve.points]
    left, right, bottom, top = min(xs), max(xs), min(ys), max(ys)
    grid = [[" "] * width for _ in range(height)]

    def row_of(y: float) -> int:
        return round((top - y) / ((top - bottom) or 1.0) * (height - 1))

    if chart.level is not None and bottom <= math.log(chart.level) <= top:
        grid[row_of(math.log(chart.level))] = ["-"] * width
    found = [
        (known, row_of(y), column, curve.mark if known or not any(curve.known) else GUESSED)
        for curve in chart.curves
        for column in range(width)
        for y, known in _at(curve, left + (right - left) * column / (width - 1))
    ]
    for _, row, column, mark in sorted(found, key=lambda cell: cell[0]):  # what is known over what is not
        grid[row][column] = mark
    ticks = {row: chart.y_text(math.exp(top - (top - bottom) * row / (height - 1))) for row in range(0, height, 4)}
    margin = max(len(text) for text in ticks.values())
    lines = [chart.title, f"{'':{margin}} {chart.y_label}"]
    lines += [f"{ticks.get(row, ''):>{margin}} |{''.join(cells).rstrip()}" for row, cells in enumerate(grid)]
    lines.append(f"{'':{margin}} +{'-' * width}")
    lines.append(f"{'':{margin}}  {_x_axis(chart, left, right, width)}".rstrip())
    legend = ", ".join(
        f"{curve.mark} {curve.label}{'' if any(curve.known) else f' ({chart.dotted})'}" for curve in chart.curves
    )
    if any(any(curve.known) and not all(curve.known) for curve in chart.curves):
        legend += f", {GUESSED} {chart.dotted}"
    return "\n".join([*lines, f"{'':{margin}}  {chart.x_label};  {legend}"])


def _at(curve: Curve, x: float) -> list[tuple[float, bool]]:
    """Logarithm of y at a logarithm of x, on the straight line between the neighbouring points; none outside."""
    points = [(math.log(px), math.log(py)) for px, py in curve.points]
    slack = 1e-9 * max(1.0, abs(x))  # the last column is the last point but for rounding
    if len(points) == 1:
        return [(points[0][1], curve.known[0])] if abs(points[0][0] - x) <= slack else []
    for n, ((x0, y0), (x1, y1)) in enumerate(zip(points, points[1:], strict=False)):
        if x0 - slack <= x <= x1 + slack:
            return [(y0 + (x - x0) / (x1 - x0) * (y1 - y0), curve.known[n] and curve.known[n + 1])]
    return []


def _x_axis(chart: Chart, left: float, right: float, width: int) -> str:
    """Three ticks: both ends and the middle."""
    first, middle, last = (chart.x_text(math.exp(left + (right - left) * share)) for share in (0.0, 0.5, 1.0))
    line = first.ljust(width // 2 - len(middle) // 2) + middle
    return line.ljust(width - len(last)) + last
