"""Seconds of a collective: curves of time over bytes for each kind and group size, and what lies between and beyond.

One pair of kind and group size is a *curve*, continuous and nondecreasing by construction:

    t(S) = latency_s + sum over segments i of  s_per_byte[i] * (bytes of S that lie in segment i)

that is, Hockney's alpha + beta * S (R. Hockney, Parallel Computing 20(3), 1994) with a beta per segment, because NCCL
switches protocol (LL, LL128, Simple) and algorithm as messages grow. No parameter can make it jump, fall or go below
zero, so those properties need no check at run time. `measured_curve` draws it through a table, `structural` from links.

Group sizes nobody measured (3, 5, 6, 7 between 2, 4 and 8) lie on a straight line in log time over log size:

    t(S, n) = t(S, a)^w * t(S, b)^(1 - w),   w = ln(b / n) / ln(b / a),   a < n < b neighbouring measured sizes

which is positive, continuous and nondecreasing in S because both factors are. Leaving out size 4 of the measured
2, 4, 8 gives median errors of 5 to 7 % per machine on NCCL tables of NVSwitch machines and 16 % on the L40S one
(``make bench-costs``).

Groups larger than a node add a structural term, `inter_node_s`. Sizes in ``nbytes`` are always those of the whole,
unsharded tensor over all ranks (see `traffic_share`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Literal, get_args

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]
COLLECTIVE_KINDS: tuple[CollectiveKind, ...] = get_args(CollectiveKind)

Curve = Callable[[float], float]
"""Bytes of the whole tensor -> seconds."""


@dataclass(frozen=True, slots=True)
class SegmentedLine:
    """A continuous piecewise linear curve of time over message size.

    Attributes:
        starts: First byte of each segment; strictly ascending, the first is 0.
        start_times_s: Time at each segment's first byte.
        slopes_s_per_byte: Time per further byte within each segment, never negative.
    """

    starts: tuple[float, ...]
    start_times_s: tuple[float, ...]
    slopes_s_per_byte: tuple[float, ...]

    @staticmethod
    def through(latency_s: float, starts: Sequence[float], slopes_s_per_byte: Sequence[float]) -> SegmentedLine:
        """Chain segments so that each starts where the last one ended.

        Args:
            latency_s: Time of an empty message (alpha).
            starts: First byte of each segment, the first 0.
            slopes_s_per_byte: One slope (beta) per segment.
        """
        times = [latency_s]
        for index in range(1, len(starts)):
            times.append(times[-1] + slopes_s_per_byte[index - 1] * (starts[index] - starts[index - 1]))
        return SegmentedLine(tuple(starts), tuple(times), tuple(slopes_s_per_byte))

    def seconds(self, nbytes: float) -> float:
        """Time of a message of ``nbytes`` >= 0 bytes, in seconds."""
        index = bisect_right(self.starts, nbytes) - 1
        return self.start_times_s[index] + self.slopes_s_per_byte[index] * (nbytes - self.starts[index])


def traffic_share(kind: CollectiveKind, size: int) -> float:
    """Bytes the busiest rank sends, as a share of the whole tensor, when bandwidth is used optimally.

    The whole tensor is what nccl-tests calls the message for all_reduce, broadcast (every rank holds it), all_gather
    (every rank ends with it) and reduce_scatter (every rank starts with it). For all_to_all it is the tensor over all
    ranks, of which each rank holds 1/size and keeps 1/size of that; nccl-tests reports one rank's buffer there.

    Source: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication Operations in MPICH",
    IJHPCA 19(1), 2005; nccl-tests doc/PERFORMANCE.md ("bus bandwidth").
    """
    match kind:
        case "all_reduce":
            return 2 * (size - 1) / size
        case "all_gather" | "reduce_scatter":
            return (size - 1) / size
        case "all_to_all":
            return (size - 1) / size**2
        case "broadcast":
            return 1.0


def between_sizes(size: int, below: int, below_s: Curve, above: int, above_s: Curve) -> Curve:
    """The curve of an unmeasured group size between two measured ones (formula: module docstring)."""
    weight = log(above / size) / log(above / below)
    rest = 1.0 - weight

    def seconds(nbytes: float) -> float:
        return float(below_s(nbytes) ** weight * above_s(nbytes) ** rest)

    return seconds


def inter_node_s(
    kind: CollectiveKind, nodes: int, ranks_per_node: int, latency_s: float, bytes_per_s_per_rank: float
) -> Curve:
    """Seconds a collective over several nodes spends between them, on top of its share within each node.

    Ranks of equal index on all nodes form ``ranks_per_node`` rings ("rails"), each carrying an equal part of the
    tensor over its own network interface: ``steps * latency + traffic_share(nodes) * part / bandwidth``. The
    within-node phases are priced by the caller as one collective of the node's ranks. Source of the decomposition:
    Thakur et al. 2005 as above; steps between nodes as NCCL counts them (src/graph/tuning.cc, nInterSteps).

    Args:
        kind: The collective.
        nodes: Nodes spanned, at least 2.
        ranks_per_node: Ranks of the group on each node, one network interface each.
        latency_s: Seconds a hop between nodes takes.
        bytes_per_s_per_rank: Bandwidth of one rank's interface, one direction.
    """
    hops_s = (2 if kind == "all_reduce" else 1) * (nodes - 1) * latency_s
    # An all_to_all rank holds 1/(nodes * ranks_per_node) of the tensor and sends all but 1/nodes of it to other nodes.
    share = (nodes - 1) / nodes**2 if kind == "all_to_all" else traffic_share(kind, nodes)
    s_per_byte = share / ranks_per_node / bytes_per_s_per_rank

    def seconds(nbytes: float) -> float:
        return hops_s + s_per_byte * nbytes

    return seconds
