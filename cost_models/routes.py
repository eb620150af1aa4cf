"""Which curve answers for a group: a measured one, one between two measured sizes, the links, or links between nodes.

In order, for a group of ``size`` ranks on ``nodes`` nodes:

1. a curve of exactly this size and these nodes;
2. within a node, between two sizes that have curves: `communication.between_sizes`;
3. within a node, any other size, on a profile with a ``link``: `structural.structural_s`;
4. over several nodes: the collective within each node (with one rank a node: what starting one takes) plus
   `communication.inter_node_s`.

Every answer says what it is (`Prediction.finding`), so that nothing is extrapolated silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Literal

from .communication import CollectiveKind, Curve, between_sizes, inter_node_s
from .errors import HardwareError
from .profile import GroupCurve
from .structural import BASE_S, has_structure, structural_s

if TYPE_CHECKING:
    from .hardware import Hardware

CurveKey = tuple[str, int, str, int | None]
"""(kind, size, implementation, nodes)."""

Basis = Literal["measured", "between", "structural"]


@dataclass(frozen=True)
class Prediction:
    """Seconds of one collective, its parts, and what they rest on.

    Attributes:
        empty_s: What an empty message takes: launch, synchronisation, hops.
        transfer_s: What the bytes add.
        basis: ``measured``; ``between`` two measured group sizes; ``structural``: from links by formula.
        rel_error: Median error of predicting one measured size from the others; None where nothing was measured.
        finding: "" for a value between measured rows of exactly this group, else what the value is instead.
    """

    empty_s: float
    transfer_s: float
    basis: Basis
    rel_error: float | None
    finding: str

    @property
    def seconds(self) -> float:
        """The sum of the parts."""
        return self.empty_s + self.transfer_s


@dataclass(frozen=True)
class Route:
    """A curve and what it rests on.

    Attributes:
        seconds: Bytes of the whole tensor -> seconds.
        basis: See `Prediction`.
        min_bytes: Smallest measured message, of the curves this one was made from.
        max_bytes: Largest; 0 where nothing was measured.
        rel_error: See `Prediction`.
        note: "" where the curve is a measured one, else how it came about.
    """

    seconds: Curve
    basis: Basis
    min_bytes: float
    max_bytes: float
    rel_error: float | None
    note: str

    def finding(self, nbytes: float) -> str:
        """What a prediction of ``nbytes`` is, if not a value between measured rows."""
        if not self.max_bytes:
            return self.note
        outside = ""
        if nbytes < self.min_bytes:
            outside = f"below the smallest measured message ({self.min_bytes:.0f} bytes)"
        elif nbytes > self.max_bytes:
            outside = f"beyond the largest measured message ({self.max_bytes:.0f} bytes)"
        return ", ".join(text for text in (self.note, outside) if text)


def route_of(hardware: Hardware, kind: CollectiveKind, size: int, implementation: str, nodes: int | None) -> Route:
    """The curve of a group of 2 or more; arguments and errors as `Hardware.collective_s`."""
    if size < 2:
        raise HardwareError("size", "not a group size", got=size, need="1 or more")
    fewest = ceil(size / hardware.ranks_per_node)
    spread = fewest if nodes is None else nodes
    if not fewest <= spread <= size:
        raise HardwareError("nodes", "the group does not fit on them", got=spread, need=f"{fewest} to {size}")
    groups = _groups(hardware, kind, implementation)
    same = [group for group in groups if (group.nodes or ceil(group.size / hardware.ranks_per_node)) == spread]
    exact = next((group for group in same if group.size == size), None)
    if exact is not None:
        return _of_group(exact)
    if spread > 1:
        return _across_nodes(hardware, kind, size, implementation, spread)
    return _within_node(hardware, kind, size, implementation, same)


def _groups(hardware: Hardware, kind: CollectiveKind, implementation: str) -> Sequence[GroupCurve]:
    collective = getattr(hardware.collectives, kind)
    if implementation == "library":
        groups: Sequence[GroupCurve] = collective.groups
        return groups
    for alternative in collective.alternatives:
        if alternative.name == implementation:
            return list(alternative.groups)
    if hardware.link is not None and has_structure(kind, hardware.link, implementation):
        return []
    raise HardwareError(
        f"hardware {hardware.name}",
        f"no {kind} by this implementation",
        got=repr(implementation),
        need=", ".join(hardware.implementations(kind)),
    )


def _of_group(group: GroupCurve) -> Route:
    note = "" if group.basis == "measured" else "derived by formula, not measured (structural)"
    error = group.left_out_median_rel_error
    return Route(group.line().seconds, group.basis, group.min_bytes, group.max_bytes, error, note)


def _within_node(
    hardware: Hardware, kind: CollectiveKind, size: int, implementation: str, groups: Sequence[GroupCurve]
) -> Route:
    above = next((group for group in groups if group.size > size), None)
    below = next((group for group in reversed(groups) if group.size < size), None)
    if above is not None and below is not None:
        measured = below.basis == above.basis == "measured"
        note = f"between group sizes {below.size} and {above.size}"
        return Route(
            between_sizes(size, below.size, below.line().seconds, above.size, above.line().seconds),
            "between" if measured else "structural",
            max(below.min_bytes, above.min_bytes),
            min(below.max_bytes, above.max_bytes),
            None,
            note if measured else f"{note}, not both measured (structural)",
        )
    if hardware.link is None or not has_structure(kind, hardware.link, implementation):
        raise HardwareError(
            f"hardware {hardware.name}",
            f"no {kind} curve for this group size",
            got=size,
            need=f"{groups[0].size} to {groups[-1].size}" if groups else "a profile with curves within a node",
            remedy="A profile with a link section predicts other sizes by formula.",
        )
    curve = structural_s(kind, size, hardware.link, implementation)
    return Route(curve, "structural", 0, 0, None, "from the links by formula")


def _across_nodes(hardware: Hardware, kind: CollectiveKind, size: int, implementation: str, nodes: int) -> Route:
    """Ranks spread evenly; the fullest node decides (9 ranks on 2 nodes: 5 and 4)."""
    if hardware.inter_node is None:
        raise HardwareError(
            f"hardware {hardware.name}",
            "the group is larger than a node and the profile has no inter_node link",
            got=size,
            need=f"at most {hardware.ranks_per_node}",
            remedy="Use a smaller tp, or a profile with inter_node.",
        )
    local = ceil(size / nodes)
    link = hardware.inter_node
    between = inter_node_s(kind, nodes, local, link.latency_s, link.bytes_per_s_per_rank)
    note = f"over {nodes} nodes by formula"
    if local == 1:  # no phase within a node holds what a collective takes to begin with
        return Route(lambda nbytes: BASE_S + between(nbytes), "structural", 0, 0, None, note)
    within = route_of(hardware, kind, local, implementation, 1)
    note = f"{note}, {within.note}" if within.note else note
    return Route(
        lambda nbytes: within.seconds(nbytes) + between(nbytes),
        "structural",
        within.min_bytes,
        within.max_bytes,
        None,
        note,
    )
