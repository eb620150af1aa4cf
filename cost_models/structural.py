"""Seconds of a collective from the machine's links alone, for machines, kinds and group sizes without a table.

The form is NCCL's own (src/graph/tuning.cc, ncclTopoTuneModel, commit 5067397c2676): each algorithm and protocol is a
line in bytes, and the least is taken, as NCCL's tuner takes it:

    t(S) = min over protocols p of  base_s + extra_s[p] + steps * hop_s + sent(S) / (link rate * share[p])

- ``steps`` of a ring: 2 (n - 1) for all_reduce, n - 1 for all_gather, reduce_scatter and a pipelined broadcast (R.
  Thakur, R. Rabenseifner, W. Gropp, IJHPCA 19(1), 2005, sections 4.1 to 4.4); an all_to_all sends to all peers at once.
- ``sent``: bytes the busiest rank sends, `communication.traffic_share`.
- Protocols: LL stores a flag beside every 4 bytes (half the rate at best, least latency), LL128 one beside 120, Simple
  none but synchronises per chunk (S. Jeaugey, "NCCL 2.4", NVIDIA 2019; Z. Hu et al., "Demystifying NCCL", 2025).
- With multicast (NVLink SHARP, "NVLS") the switch adds: a rank sends its tensor once and receives 1/n of the sum, and
  no step waits for another rank: ``sent = S (1 + 1/n)`` (B. Klenk et al., "An in-network architecture for accelerating
  shared-memory multiprocessor collectives", ISCA 2020).

A minimum of rising lines is continuous, rising and positive, whatever the constants.

``BASE_S`` is NCCL's constant (baseLatencies, ring LL). The other NVSwitch constants are one least-squares fit of log
time over the A100 and H100 tables that ship with colrow, all four kinds, rounded to two digits; no other machine was
used. Median error on all_reduce: A100 13 %, H100 13 %; not fitted to: H200 14 %, B200 21 %, B300 18 %, GB200 23 %,
GB300 14 % (tables of aiconfigurator, commit 095f58a51c4c). The machines differ by 60 % in latency at equal links (B200
10 us, H200 6 us between two ranks), so that is about what one set of constants can reach.

Kernels over peer memory (`PEER_KERNELS`) read every peer's tensor at once, or a part of each and then the parts' sums,
one barrier more: ``base + peer_s (n - 1) + S (n - 1) / rate`` or ``base + peer_s (n - 1) + barrier + 2 S (n - 1) / n /
rate`` (vLLM csrc/custom_all_reduce.cuh, cross_device_reduce_1stage and _2stage); where NCCL is faster they hand over
to it. Fitted to the same two machines up to 8 MiB. Median error of ``custom_graph`` over all sizes: A100 8 %, H100 8 %;
not fitted to: H200 8 %, B200 29 %; of ``one_shot_graph``: 12 and 21 %; 24 and 19 %.

PCIe has no such regularity: among eight ranks an L40S server reaches 0.8 GB/s and an RTX PRO 6000 one 14 GB/s. Its hop
is NCCL's (hwLatencies, PCI, LL); between two ranks 0.6 of the link is used (L40S table), beyond two the ring crosses
host bridges in both directions and half of that is assumed. Expect a factor of two, and measure (``colrow calibrate``).
"""

from __future__ import annotations

from dataclasses import dataclass

from .communication import CollectiveKind, Curve, traffic_share
from .profile import Link

Line = tuple[float, float]
"""(seconds of an empty message, seconds per byte of the whole tensor)."""


@dataclass(frozen=True)
class Protocol:
    """One way to move data: seconds on top of ``base_s``, and the share of the link's rate it reaches."""

    extra_s: float
    share: float


@dataclass(frozen=True)
class Fabric:
    """Constants of one topology (sources: module docstring)."""

    base_s: float
    hop_s: float
    protocols: tuple[Protocol, ...]
    peers: Protocol
    peer_s: float


@dataclass(frozen=True)
class PeerKernel:
    """An all_reduce over peer memory in a CUDA graph: both ways, and seconds per launch and per further peer."""

    base_s: float
    peer_s: float
    one_stage: Protocol
    two_stage: Protocol


BASE_S = 6.6e-6  # of a collective of NCCL's, whatever joins its ranks

NVLS = Protocol(extra_s=11e-6, share=0.57)

NVSWITCH = Fabric(
    base_s=BASE_S,
    hop_s=0.9e-6,
    protocols=(Protocol(0.0, 0.22), Protocol(2e-6, 0.30), Protocol(18e-6, 0.65)),
    peers=Protocol(4.2e-6, 0.53),
    peer_s=0.25e-6,
)

PCIE_PAIR = Fabric(
    base_s=BASE_S,
    hop_s=1.0e-6,
    protocols=(Protocol(0.0, 0.3), Protocol(18e-6, 0.6)),
    peers=Protocol(4.2e-6, 0.6),
    peer_s=0.25e-6,
)

PCIE = Fabric(
    base_s=BASE_S,
    hop_s=1.0e-6,
    protocols=(Protocol(0.0, 0.15), Protocol(18e-6, 0.3)),
    peers=Protocol(4.2e-6, 0.3),
    peer_s=0.25e-6,
)

PEER_KERNELS = {
    "custom_graph": PeerKernel(4.4e-6, 0.15e-6, Protocol(0.0, 0.55), Protocol(4.2e-6, 0.6)),
    "one_shot_graph": PeerKernel(3.3e-6, 0.13e-6, Protocol(0.0, 0.53), Protocol(15e-6, 0.44)),
}

# gloo between two ranks of one host, the gloo-cpu table: 240 us for an all_reduce (two steps), 140 to 370 for one step.
HOST = Fabric(
    base_s=130e-6,
    hop_s=100e-6,
    protocols=(Protocol(0.0, 1.0),),
    peers=Protocol(100e-6, 1.0),
    peer_s=10e-6,
)


def has_structure(kind: CollectiveKind, link: Link, implementation: str) -> bool:
    """Whether `structural_lines` knows this implementation: the library always, peer kernels on a switch."""
    on_switch = kind == "all_reduce" and link.topology == "nvswitch"
    return implementation == "library" or (on_switch and implementation in PEER_KERNELS)


def structural_lines(kind: CollectiveKind, size: int, link: Link, implementation: str = "library") -> list[Line]:
    """One line per way to run the collective; its time is the least of them.

    Args:
        kind: The collective.
        size: Ranks in the group, at least 2, all within a node.
        link: What joins them.
        implementation: One that `has_structure`.
    """
    if implementation != "library":
        kernel, rate = PEER_KERNELS[implementation], link.bytes_per_s_per_rank
        base = kernel.base_s + (size - 1) * kernel.peer_s
        ways = ((kernel.one_stage, size - 1), (kernel.two_stage, traffic_share("all_reduce", size)))
        peer = [(base + way.extra_s, sent / (rate * way.share)) for way, sent in ways]
        return peer + structural_lines(kind, size, link)
    fabric, rate = _fabric(size, link)
    if kind == "all_to_all":
        base = fabric.base_s + fabric.peers.extra_s + (size - 1) * fabric.peer_s
        return [(base, traffic_share(kind, size) / (rate * fabric.peers.share))]
    steps = 2 * (size - 1) if kind == "all_reduce" else size - 1
    base, sent = fabric.base_s + steps * fabric.hop_s, traffic_share(kind, size)
    lines = [(base + protocol.extra_s, sent / (rate * protocol.share)) for protocol in fabric.protocols]
    if kind == "all_reduce" and link.multicast and size > 2:
        lines.append((fabric.base_s + NVLS.extra_s, (1 + 1 / size) / (rate * NVLS.share)))
    return lines


def structural_s(kind: CollectiveKind, size: int, link: Link, implementation: str = "library") -> Curve:
    """The curve of one kind, group size and implementation within a node; arguments as `structural_lines`."""
    lines = structural_lines(kind, size, link, implementation)

    def seconds(nbytes: float) -> float:
        return min(base + slope * nbytes for base, slope in lines)

    return seconds


def envelope(lines: list[Line]) -> tuple[float, list[int], list[float]]:
    """The least of rising lines as latency, segment starts and slopes, the form profiles hold.

    Joins are rounded up to whole bytes, where the flatter line is the lower one: the curve lies above the minimum by
    less than one byte's time.
    """
    ordered = sorted(lines)
    latency_s, slope = ordered[0]
    starts, slopes, at = [0], [slope], 0.0
    current = ordered[0]
    while True:
        crossings = [
            ((line[0] - current[0]) / (current[1] - line[1]), line) for line in ordered if line[1] < current[1]
        ]
        if not crossings:
            return latency_s, starts, slopes
        at, current = min(crossings, key=lambda crossing: (max(crossing[0], at), crossing[1][1]))
        start = int(at) + 1
        if start == starts[-1]:
            slopes[-1] = current[1]
        else:
            starts.append(start)
            slopes.append(current[1])


def _fabric(size: int, link: Link) -> tuple[Fabric, float]:
    """The constants and the link rate that a group of ``size`` sees."""
    rate = link.bytes_per_s_per_rank
    match link.topology:
        case "nvswitch":
            return NVSWITCH, rate
        case "nvlink_pairs":
            if size == 2 and link.pair_bytes_per_s is not None:
                return NVSWITCH, link.pair_bytes_per_s
            return PCIE, rate
        case "pcie":
            return (PCIE_PAIR if size == 2 else PCIE), rate
        case "host":
            return HOST, rate
