"""Seconds, bytes and tables as people read them; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import IO

from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 120


def seconds(value: float) -> str:
    """``19.9 ms``: three digits and a unit."""
    if value == 0:
        return "0 s"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale:
            return f"{digits(value / scale)} {unit}"
    return f"{digits(value / 1e-9)} ns"


def nbytes(value: float) -> str:
    """``16.8 MB``: three digits and a decimal unit."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{digits(value / scale)} {unit}"
    return f"{value:.0f} B"


def digits(value: float) -> str:
    """A positive number with three digits, or more before the point."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def console(file: IO[str]) -> Console:
    """A console on ``file``; plain text of a fixed width where that is no terminal."""
    width = None if file.isatty() else PLAIN_WIDTH
    return Console(file=file, width=width, markup=False, highlight=False, emoji=False, soft_wrap=False)


def empty_table(*columns: str, numeric: Iterable[int] = ()) -> Table:
    """An empty table; ``numeric`` columns are aligned right and never broken."""
    right = set(numeric)
    made = Table(box=None, header_style="dim", padding=(0, 0, 0, 2))
    for n, column in enumerate(columns):
        made.add_column(column, justify="right" if n in right else "left", overflow="fold", no_wrap=n in right)
    return made
