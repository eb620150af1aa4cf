"""The curve through a measured table: straight lines between rows, and the error that leaving rows out shows.

Between two measured sizes time is a straight line in bytes (Hockney's alpha + beta * S, one pair per interval; R.
Hockney, Parallel Computing 20(3), 1994), so the curve meets every row it keeps, jumps nowhere and needs no fit. Two
rules make it total:

- **No message is slower than a larger one** (`monotone`). A message may be padded, so ``t(S) <= t(S')`` for S < S':
  the monotony guideline of J. Traeff, W. Gropp, R. Thakur, "Self-consistent MPI performance guidelines", IEEE TPDS
  21(5), 2010. Rows that break it (disturbed measurements, jumps of protocol) are replaced by the rising sequence with
  the least sum of absolute errors in log time: isotonic median regression, by pooling adjacent violators (T. Robertson,
  F. Wright, R. Dykstra, "Order Restricted Statistical Inference", 1988, section 1.2).
- **Outside the rows**: below the smallest its time, above the largest the mean slope over the last factor of four.
  Callers are told that such a value is no measurement (`hardware.Prediction`).

Median relative error of each interior row predicted from the others, over the 15 sets of NCCL tables of NVSwitch
machines in aiconfigurator (commit 095f58a51c4c): 1.1 to 3.2 % each; straight lines in log time over log size 1.8 to
4.6 % (``make bench-costs`` prints the shipped ones). Lowering every row to the least later one instead gave 1.1 to
3.4 % there, and did worse where noise goes both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import median

from .communication import SegmentedLine

Row = tuple[int, float]
"""(bytes of the whole tensor, measured seconds)."""

SIGNIFICANT_DIGITS = 6
"""Precision of the stored parameters: 1e-6 is far below any measurement's noise, and profiles stay readable."""


@dataclass(frozen=True)
class MeasuredCurve:
    """A curve through rows, with its errors.

    Attributes:
        latency_s: Time of an empty message.
        starts: First byte of each segment, the first 0.
        slopes_s_per_byte: Seconds per further byte of each segment, never negative.
        median_rel_error: Median over rows of ``|curve / measured - 1|``: what making it monotone cost.
        max_rel_error: As above, the worst row.
        left_out_median_rel_error: The same of every interior row against the curve through the others; None for fewer
            than three rows.
        left_out_max_rel_error: As above, the worst row.
    """

    latency_s: float
    starts: tuple[int, ...]
    slopes_s_per_byte: tuple[float, ...]
    median_rel_error: float
    max_rel_error: float
    left_out_median_rel_error: float | None
    left_out_max_rel_error: float | None

    def line(self) -> SegmentedLine:
        """The curve to evaluate."""
        return SegmentedLine.through(self.latency_s, self.starts, self.slopes_s_per_byte)


def curve_through(rows: Sequence[Row]) -> MeasuredCurve:
    """The curve through measured rows and its errors.

    Args:
        rows: At least two rows of distinct sizes, bytes >= 0 and seconds > 0, in any order.

    Raises:
        ValueError: Fewer than two rows, a size twice, or a row that is not positive.
    """
    latency_s, starts, slopes = _segments(rows)
    errors = relative_errors(rows, SegmentedLine.through(latency_s, starts, slopes))
    left_out = left_out_errors(rows)
    return MeasuredCurve(
        latency_s,
        starts,
        slopes,
        round(median(errors), 4),
        round(max(errors), 4),
        round(median(left_out), 4) if left_out else None,
        round(max(left_out), 4) if left_out else None,
    )


def left_out_errors(rows: Sequence[Row]) -> list[float]:
    """Relative error of each interior row, predicted by the curve through all other rows."""
    ordered = sorted(rows)
    errors = []
    for index in range(1, len(ordered) - 1):
        others = ordered[:index] + ordered[index + 1 :]
        errors += relative_errors([ordered[index]], SegmentedLine.through(*_segments(others)))
    return errors


def relative_errors(rows: Sequence[Row], line: SegmentedLine) -> list[float]:
    """``|predicted / measured - 1|`` of each row."""
    return [abs(line.seconds(size) / seconds - 1) for size, seconds in rows]


def monotone(seconds: Sequence[float]) -> list[float]:
    """The rising times nearest to these, by absolute error in log time; times that rise already are kept."""
    blocks: list[list[float]] = []
    for time in seconds:
        blocks.append([log(time)])
        while len(blocks) > 1 and median(blocks[-2]) > median(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    return [time if len(block) == 1 else exp(median(block)) for block in blocks for time in map(exp, block)]


def _segments(rows: Sequence[Row]) -> tuple[float, tuple[int, ...], tuple[float, ...]]:
    """Latency, starts and slopes of the curve, rounded to the stored precision."""
    ordered = sorted(rows)
    sizes = [size for size, _ in ordered]
    if len(sizes) < 2 or len(set(sizes)) != len(sizes):
        raise ValueError(f"a curve needs two or more distinct sizes, got {sizes}")
    if sizes[0] < 0 or any(not seconds > 0 for _, seconds in ordered):
        raise ValueError("a curve needs sizes of at least 0 bytes and times above 0 s")
    times = monotone([seconds for _, seconds in ordered])
    slopes = [(times[i + 1] - times[i]) / (sizes[i + 1] - sizes[i]) for i in range(len(sizes) - 1)]
    quarter = next(i for i in range(len(sizes) - 2, -1, -1) if 4 * sizes[i] <= sizes[-1] or i == 0)
    beyond = (times[-1] - times[quarter]) / (sizes[-1] - sizes[quarter])
    starts, kept = [0], [0.0]
    for start, slope in zip(sizes, [*slopes, beyond], strict=True):
        slope = rounded(slope)
        if start == 0:
            kept[0] = slope
        elif slope != kept[-1]:
            starts.append(start)
            kept.append(slope)
    return rounded(times[0]), tuple(starts), tuple(kept)


def rounded(value: float) -> float:
    """To the precision profiles are stored in."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
