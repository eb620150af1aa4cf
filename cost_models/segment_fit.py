"""Fit a segmented line to measured (bytes, seconds) rows, exactly over a stated set of breakpoints.

For given breakpoints 0 = b0 < b1 < b2 the model of `communication` is linear in its parameters,

    t(S) = alpha + sum_i beta_i * x_i(S),   x_i(S) = bytes of S between b_i and b_(i+1),   alpha, beta_i >= 0

so the least sum of *relative* errors,  min sum_rows |t(S_r) / t_r - 1|,  is a linear programme (least absolute
deviations: P. Bloomfield, W. Steiger, "Least Absolute Deviations", 1983), which HiGHS solves exactly. Relative, because
times span four orders of magnitude and the planner compares small messages as often as large ones; absolute deviations,
because tables jump where NCCL changes protocol (14 to 38 us between two sizes on A100) and squares would bend the whole
curve towards such a row. Nonnegativity makes the curve monotone and positive; x_i make it continuous.

`fit_segments` solves it for every choice of at most two breakpoints among the interior measured sizes and keeps the
least error, so the result is the optimum over that grid: 191 small programmes for the 21 rows of an nccl-tests run,
0.7 s. Median relative error over all rows of the 24 NVSwitch tables: one segment 11.8 %, two 3.6 %, three 1.8 %
(the worst table 3.2 %, the worst row 61 %, an outlier of H100 all_to_all).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from .communication import SegmentedLine

Row = tuple[int, float]
"""(bytes of the whole tensor, measured seconds)."""

SIGNIFICANT_DIGITS = 6
"""Precision of the stored parameters: 1e-6 is far below any measurement's noise, and profiles stay readable."""


@dataclass(frozen=True)
class SegmentFit:
    """A fitted curve and its error against the rows it was fitted to.

    Attributes:
        latency_s: Time of an empty message.
        starts: First byte of each segment.
        slopes_s_per_byte: Seconds per further byte of each segment.
        median_rel_error: Median over rows of ``|predicted / measured - 1|``.
        max_rel_error: As above, the worst row.
    """

    latency_s: float
    starts: tuple[int, ...]
    slopes_s_per_byte: tuple[float, ...]
    median_rel_error: float
    max_rel_error: float

    def line(self) -> SegmentedLine:
        """The curve to evaluate."""
        return SegmentedLine.through(self.latency_s, self.starts, self.slopes_s_per_byte)


def fit_segments(rows: Sequence[Row], max_segments: int = 3) -> SegmentFit:
    """Fit at most ``max_segments`` segments to measured rows.

    Args:
        rows: At least two rows of distinct sizes, bytes >= 0 and seconds > 0, in any order.
        max_segments: 1, 2 or 3. Fewer are used where rows are too few to determine more.

    Returns:
        The fit with the least sum of relative errors; of equal ones that with the fewest, then smallest breakpoints.

    Raises:
        ValueError: Fewer than two distinct sizes, or a row that is not positive.
    """
    ordered = sorted(rows)
    sizes = [size for size, _ in ordered]
    if len(set(sizes)) < 2 or len(set(sizes)) != len(sizes):
        raise ValueError(f"a fit needs two or more distinct sizes, got {sizes}")
    if sizes[0] < 0 or any(not seconds > 0 for _, seconds in ordered):
        raise ValueError("a fit needs sizes of at least 0 bytes and times above 0 s")

    # Each segment is one more parameter beside alpha and its own slope; never more parameters than rows.
    most_breaks = min(max_segments - 1, (len(sizes) - 2) // 2)
    best_error, best_parameters = np.inf, np.zeros(2)
    best_starts: tuple[int, ...] = (0,)
    for count in range(most_breaks + 1):
        for breaks in combinations([size for size in sizes[1:-1] if size > 0], count):
            starts = (0, *breaks)
            parameters, error = _solve(ordered, starts)
            if error < best_error * (1 - 1e-9):
                best_error, best_starts, best_parameters = error, starts, parameters
    return _rounded(ordered, best_starts, best_parameters)


def relative_errors(rows: Sequence[Row], line: SegmentedLine) -> list[float]:
    """``|predicted / measured - 1|`` of each row."""
    return [abs(line.seconds(size) / seconds - 1) for size, seconds in rows]


def _solve(rows: Sequence[Row], starts: tuple[int, ...]) -> tuple[NDArray[np.float64], float]:
    """Alpha and slopes for given breakpoints, and the sum of relative errors they leave."""
    sizes = np.array([size for size, _ in rows], dtype=np.float64)
    seconds = np.array([time for _, time in rows], dtype=np.float64)
    ends = (*starts[1:], np.inf)
    inside = [np.clip(sizes, start, end) - start for start, end in zip(starts, ends, strict=True)]
    design = np.stack([np.ones_like(sizes), *inside], axis=1) / seconds[:, None]
    # Columns span 1 to 1e9; unit columns keep them within the solver's tolerances.
    scale = np.linalg.norm(design, axis=0)
    scale[scale == 0] = 1.0
    count, width = design.shape
    # Variables: scaled parameters, then each row's error above and below, all >= 0 (linprog's default bounds).
    result = linprog(
        np.concatenate([np.zeros(width), np.ones(2 * count)]),
        A_eq=np.concatenate([design / scale, np.eye(count), -np.eye(count)], axis=1),
        b_eq=np.ones(count),
        method="highs",
    )
    if (
        result.x is None or result.fun is None
    ):  # feasible (all parameters 0) and bounded below by 0, so this is the solver's failure
        raise RuntimeError(f"the fit's linear programme was not solved: {result.message}")
    return np.asarray(result.x[:width]) / scale, float(result.fun)


def _rounded(rows: Sequence[Row], starts: tuple[int, ...], parameters: NDArray[np.float64]) -> SegmentFit:
    """Round to the stored precision and measure the error of what is stored."""
    latency_s, *slopes = (float(f"{value:.{SIGNIFICANT_DIGITS}g}") for value in parameters)
    errors = relative_errors(rows, SegmentedLine.through(latency_s, starts, slopes))
    return SegmentFit(latency_s, starts, tuple(slopes), round(median(errors), 4), round(max(errors), 4))
