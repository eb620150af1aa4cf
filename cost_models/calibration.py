"""A hardware profile from what was measured on a machine: curves as `fit_profiles` makes them, the rates as they are.

Nothing is taken from another machine: a kind or group size that was not measured has no curve.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

from .communication import COLLECTIVE_KINDS, CollectiveKind, SegmentedLine
from .compute import matmul_bytes, matmul_flops, matmul_s
from .fit_profiles import GroupJson, measured_groups, rounded
from .hardware import SCHEMA, Hardware, parse_hardware
from .measured_curve import Row, relative_errors

LICENCE = "LicenseRef-own-measurement"
STEEPEST_S_PER_BYTE = 1e-6  # what profiles take: a link of 1 MB/s
SHORTEST_S = 1e-7  # of a message without bytes, where a straight line would have none
LARGE = 256  # m, n and k of the matmuls whose rate counts as achievable


@dataclass(frozen=True)
class MatmulRow:
    """One timed product ``[m, k] @ [k, n]``."""

    m: int
    n: int
    k: int
    seconds: float

    @property
    def flops_per_s(self) -> float:
        """Operations per second, an addition and a multiplication counting one each."""
        return 2.0 * self.m * self.n * self.k / self.seconds


@dataclass(frozen=True)
class RankMeasurements:
    """What all ranks of one machine agree on after measuring at the same time, the slower rank counting.

    Attributes:
        collectives: Kind -> group size -> (bytes of the whole tensor, seconds), sizes ascending.
        matmuls: torch dtype name -> products.
        stream_bytes_per_s: Bytes read and written per second by large elementwise operators and matrix-vector products.
        launch_s: Seconds an operator on a few elements costs the device, views and modules around it included.
        eager_dispatch_s: Seconds it costs the host; None where host and device are the same.
        units: Processors that share a matmul (`profile.Compute`).
        memory_bytes: Memory of one rank.
        device: What a rank computes on, for people.
        implementation: The library of the collectives, with its version.
    """

    collectives: Mapping[CollectiveKind, Mapping[int, Sequence[Row]]]
    matmuls: Mapping[str, Sequence[MatmulRow]]
    stream_bytes_per_s: Sequence[float]
    launch_s: float
    eager_dispatch_s: float | None
    units: int
    memory_bytes: int
    device: str
    implementation: str


@dataclass(frozen=True)
class Measurements(RankMeasurements):
    """What was measured on one machine, and when.

    Attributes:
        ranks: Ranks that took part.
        date: ISO date.
    """

    ranks: int
    date: str


@dataclass(frozen=True)
class FitError:
    """How well the curve of one kind and group size predicts, relative to what was measured.

    Attributes:
        what: The collective, or the dtype of matmuls.
        size: Ranks in the group; of matmuls 1.
        rows: Measured sizes or shapes.
        fit_median: Against the rows it was made from.
        fit_max: As above, the worst row.
        left_out_median: Of predicting each interior size from the others; None for matmuls, which have only a rate, and
            for a straight line.
        left_out_max: As above, the worst size.
    """

    what: str
    size: int
    rows: int
    fit_median: float
    fit_max: float
    left_out_median: float | None
    left_out_max: float | None


def calibrated(name: str, measured: Measurements) -> tuple[str, Hardware]:
    """The text of a profile, and the profile.

    Args:
        name: What the profile is called.
        measured: Every kind at one group size or more, at two message sizes or more, and float32 products.
    """
    own = f"measured by colrow calibrate on {measured.ranks} ranks, {measured.device}, {measured.implementation}"
    rates = {dtype: [row.flops_per_s for row in rows] for dtype, rows in measured.matmuls.items()}
    large = {
        dtype: [row.flops_per_s for row in rows if min(row.m, row.n, row.k) >= LARGE] or rates[dtype]
        for dtype, rows in measured.matmuls.items()
    }
    bandwidth = max(measured.stream_bytes_per_s)
    content = {
        "schema": SCHEMA,
        "name": name,
        "source": own,
        "commit": "",
        "licence": LICENCE,
        "date": measured.date,
        "description": f"calibrated: {measured.ranks} ranks, {measured.device}",
        "memory_gb": rounded(measured.memory_bytes / 1e9),
        "ranks_per_node": measured.ranks,
        "inter_node": None,
        "compute": {
            "peak_flops_per_s": {dtype: rounded(max(found)) for dtype, found in rates.items()},
            "efficiency": {dtype: rounded(median(large[dtype]) / max(found)) for dtype, found in rates.items()},
            "units": measured.units,
            "source": f"Peak: the fastest product timed; efficiency: the median of those with m, n, k >= {LARGE}.",
        },
        "memory": {
            "bandwidth_bytes_per_s": rounded(bandwidth),
            "efficiency": rounded(median(measured.stream_bytes_per_s) / bandwidth),
            "source": "Large additions, copies and matrix-vector products: the fastest, and their median.",
        },
        "launch_overhead_s": rounded(measured.launch_s),
        "eager_dispatch_s": None if measured.eager_dispatch_s is None else rounded(measured.eager_dispatch_s),
        "launch_source": "An eager transformer block of a few elements, over its operators (views left out).",
        "collectives": {
            kind: {
                "implementation": measured.implementation,
                "groups": [_group(size, rows) for size, rows in sorted(measured.collectives[kind].items())],
            }
            for kind in COLLECTIVE_KINDS
        },
    }  # fmt: skip
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    return text, parse_hardware(text, where=name)


def _group(size: int, rows: Sequence[Row]) -> GroupJson:
    """The curve through the rows; where noise makes that steeper than any link, the best straight line instead."""
    (group,) = measured_groups({str(size): [[at, s * 1e6] for at, s in rows]})
    if all(segment["s_per_byte"] < STEEPEST_S_PER_BYTE for segment in group["segments"]):
        return group
    latency_s, s_per_byte = straight_line(rows)
    errors = relative_errors(rows, SegmentedLine.through(latency_s, [0.0], [s_per_byte]))
    return {
        **group,
        "latency_s": latency_s,
        "segments": [{"from_bytes": 0, "s_per_byte": s_per_byte}],
        "median_rel_error": rounded(median(errors)),
        "max_rel_error": rounded(max(errors)),
        "left_out_median_rel_error": None,
        "left_out_max_rel_error": None,
    }


def straight_line(rows: Sequence[Row]) -> tuple[float, float]:
    """Latency and seconds per byte of the line that most rows agree on: the median of all pairs' slopes, and of what
    that leaves.

    Source: P. Sen, "Estimates of the regression coefficient based on Kendall's tau", JASA 63(324), 1968.
    """
    pairs = combinations(sorted(rows), 2)
    s_per_byte = max(0.0, median((t2 - t1) / (size2 - size1) for (size1, t1), (size2, t2) in pairs))
    latency_s = median(seconds - s_per_byte * size for size, seconds in rows)
    return rounded(max(latency_s, SHORTEST_S)), rounded(s_per_byte)


def fit_errors(measured: Measurements, profile: Hardware) -> list[FitError]:
    """Of every curve, by leaving out each interior message size in turn; of matmuls, against all shapes timed."""
    found = []
    for kind, by_size in measured.collectives.items():
        for size, rows in sorted(by_size.items()):
            group = _group(size, rows)
            errors = (group["median_rel_error"], group["max_rel_error"])
            left_out = (group["left_out_median_rel_error"], group["left_out_max_rel_error"])
            found.append(FitError(kind, size, len(rows), *errors, *left_out))
    for dtype, products in measured.matmuls.items():
        off = [abs(_predicted_s(row, dtype, profile) / row.seconds - 1) for row in products]
        found.append(FitError(f"{dtype} matmul", 1, len(products), median(off), max(off), None, None))
    return found


def _predicted_s(row: MatmulRow, dtype: str, profile: Hardware) -> float:
    itemsize = {"float64": 8, "float32": 4}.get(dtype, 2)
    nbytes = matmul_bytes(row.m, row.n, row.k, itemsize)
    return matmul_s(matmul_flops(row.m, row.n, row.k), nbytes, row.m * row.n, dtype, profile)


def as_table(measured: Measurements) -> dict[str, Any]:
    """The measurements themselves, to keep beside the profile: a fit can be repeated, a machine's day cannot."""
    return {
        "collectives": {
            kind: {str(size): [[at, s] for at, s in rows] for size, rows in by_size.items()}
            for kind, by_size in measured.collectives.items()
        },
        "matmuls": {
            dtype: [[row.m, row.n, row.k, row.seconds] for row in rows] for dtype, rows in measured.matmuls.items()
        },
        "stream_bytes_per_s": list(measured.stream_bytes_per_s),
        "launch_s": measured.launch_s,
        "eager_dispatch_s": measured.eager_dispatch_s,
    }
