"""Charts as PNG or SVG, by matplotlib: an optional extra, so everything is checked before the work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from colrow.cost_models.errors import UsageError

from .answers import check_writable, written_whole
from .charts import Chart

FORMATS = (".png", ".svg")


def check_drawable(out: str | None) -> None:
    """Before the work, not after it.

    Raises:
        UsageError: No such folder, another format, or matplotlib is missing.
    """
    if out is None:
        return
    check_writable(out)
    if Path(out).suffix not in FORMATS:
        raise UsageError(f"--out {out}", "not an image colrow writes", got=Path(out).suffix, need=" or ".join(FORMATS))
    if find_spec("matplotlib") is None:
        raise UsageError(
            f"--out {out}",
            "matplotlib is not installed",
            remedy="Install it (pip install 'colrow[plot]'), or leave --out away: charts are printed as text too.",
        )


def draw(charts: Sequence[Chart], out: str) -> None:
    """Write ``charts`` side by side into one image; ``out`` has passed `check_drawable`.

    Raises:
        UsageError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    columns = min(3, len(charts))
    rows = math.ceil(len(charts) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.9 * rows), layout="constrained")
    for axes, chart in zip(figure.subplots(rows, columns, squeeze=False).flat, charts, strict=False):
        axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label, xscale="log", yscale="log")
        axes.xaxis.set_major_formatter(lambda x, _, text=chart.x_text: text(x))
        axes.yaxis.set_major_formatter(lambda y, _, text=chart.y_text: text(y))
        for curve in chart.curves:
            xs, ys = zip(*curve.points, strict=True)
            (line,) = axes.plot(xs, ys, linestyle=":", marker="." if len(xs) < 12 else "")
            # The parts that are known are drawn again, full; the rest stays dotted.
            sure = [y if known else math.nan for y, known in zip(ys, curve.known, strict=True)]
            axes.plot(xs, sure, color=line.get_color(), label=curve.label)
        if not all(known for curve in chart.curves for known in curve.known):
            axes.plot([], [], linestyle=":", color="grey", label=chart.dotted)
        if chart.level is not None:
            axes.axhline(chart.level, color="grey", linewidth=0.8)
        axes.tick_params(axis="x", labelrotation=30)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in list(figure.axes)[len(charts) :]:
        axes.set_axis_off()
    with written_whole(out) as path:
        figure.savefig(path, format=Path(out).suffix.removeprefix("."))
