"""What the model of `colrow.cost_models` is compared with on the same rows: simpler models, and NCCL's own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, log

from colrow.cost_models.communication import CollectiveKind
from colrow.cost_models.measured_curve import Row


def log_log(rows: Sequence[Row], nbytes: float) -> float:
    """Straight lines in log time over log size through every row, no monotony."""
    kept = [row for row in sorted(rows) if row[0] > 0]
    index = min(max(bisect_right([size for size, _ in kept], nbytes), 1), len(kept) - 1)
    (low, low_s), (high, high_s) = kept[index - 1], kept[index]
    share = log(nbytes / low) / log(high / low)
    return low_s * exp(share * log(high_s / low_s))


def alpha_beta(rows: Sequence[Row]) -> tuple[float, float]:
    """One latency and one rate, neither negative, with the least sum of relative errors (Hockney 1994).

    Such a line meets two rows, or one row and a bound (a vertex of the linear programme), so trying those is exact.
    """
    lines = [(seconds, 0.0) for _, seconds in rows] + [(0.0, seconds / nbytes) for nbytes, seconds in rows if nbytes]
    for (low, low_s), (high, high_s) in combinations(sorted(rows), 2):
        slope = (high_s - low_s) / (high - low)
        if slope >= 0 and low_s - slope * low >= 0:
            lines.append((low_s - slope * low, slope))
    return min(lines, key=lambda line: sum(abs((line[0] + line[1] * n) / seconds - 1) for n, seconds in rows))


@dataclass(frozen=True)
class NcclGeneration:
    """What NCCL's tuner assumes of a GPU generation, in microseconds and GB/s (src/graph/tuning.cc and topo.h, commit
    5067397c2676): the bandwidth its search finds for all rings of an NVSwitch node together, the caps per channel, and
    the share NVLS reaches."""

    ring_gb_per_s: float
    channels: int
    ll_max_gb_per_s: float
    ring_ll128_gb_per_s: float
    tree_gb_per_s: float
    tree_ll128_gb_per_s: float
    nvls_efficiency: float


AMPERE = NcclGeneration(240.0, 24, 87.7, 20.0, 24.0, 20.0, 0.0)
HOPPER = NcclGeneration(370.8, 16, 141.0, 36.7, 38.7, 36.7, 0.85)
BLACKWELL = NcclGeneration(721.8, 16, 282.0, 40.0, 70.0, 55.6, 0.74)
GENERATIONS = {"a100": AMPERE, "h100": HOPPER, "h200": HOPPER}


def nccl_tuning_s(kind: CollectiveKind, size: int, nbytes: float, generation: NcclGeneration) -> float | None:
    """What NCCL's tuner expects of the algorithm it picks, one NVSwitch node; None for all_to_all, which it does not
    tune."""
    if kind == "all_to_all":
        return None
    steps = {"all_reduce": 2 * (size - 1), "broadcast": size}.get(kind, size - 1)
    bus, g = generation.ring_gb_per_s, generation
    ring_ratio = size / steps
    ways = [
        (6.6 + steps * 0.6, min(g.ll_max_gb_per_s, bus * 0.5) * ring_ratio),
        (14.0 + steps * 1.9, min(bus * 0.92, g.channels * g.ring_ll128_gb_per_s) * ring_ratio),
        (8.4 + steps * 3.4, bus * ring_ratio),
    ]
    if kind == "all_reduce":
        tree = min(bus * 0.92, g.channels * g.tree_gb_per_s)
        ways += [
            (6.8 + 2 * (size - 1) * 0.6, min(tree / 3.8, g.ll_max_gb_per_s) * 0.5),
            (14.0 + 2 * (size - 1) * 1.25, min(tree * 7 / 9, g.channels * g.tree_ll128_gb_per_s) * 0.5),
            (8.4 + 2 * (size - 1) * 4.0, tree * 0.5),
        ]
        if g.nvls_efficiency and size > 2:
            ways.append((25.0, bus * g.nvls_efficiency * 2 * (g.channels - 1) / g.channels * ring_ratio))
    return min(latency_us * 1e-6 + nbytes / (rate * 1e9) for latency_us, rate in ways)


def generation_of(name: str) -> NcclGeneration:
    """By the machine's name; what is not Ampere or Hopper here is Blackwell."""
    return next((found for prefix, found in GENERATIONS.items() if name.startswith(prefix)), BLACKWELL)
