"""What a sweep says in the end: the tp to use, or that tensor parallelism does not pay here, and why.

The fastest plan that fits is the one to use, unless a smaller tp is within `GAIN` of it. Copies of a smaller tp do more
per second in all than one of a larger; where it is much more, that is said too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colrow.cost_models.hardware import Hardware

from .sweep_points import Point
from .units import nbytes, seconds

GAIN = 0.05
WASTEFUL = 0.75  # an efficiency below it


@dataclass(frozen=True)
class Verdict:
    """Of one machine, link speed, batch and length.

    Attributes:
        tp: The tp to use; None where nothing fits.
        pays: Whether that is more ranks than the memory needs.
        words: One or more sentences.
    """

    tp: int | None
    pays: bool
    words: str


def efficiency(point: Point, smallest: Point) -> float:
    """Speed per rank, relative to the smallest tp's: 1 where twice the ranks take half the time."""
    return smallest.step_s * smallest.setting.tp / (point.step_s * point.setting.tp)


def verdict(points: Sequence[Point], hardware: Hardware) -> Verdict:
    """What to do, from points that differ in tp alone."""
    planned = sorted((p for p in points if p.plan is not None), key=lambda p: p.setting.tp)
    fitting = [p for p in planned if p.fits]
    if not fitting:
        return Verdict(None, False, _nothing_fits(points, planned))
    first = fitting[0]
    fastest = min(fitting, key=lambda p: p.step_s)
    used = next(p for p in fitting if p.step_s <= fastest.step_s * (1 + GAIN))
    words = [_memory(planned, first)]
    if used is first:
        words.append(_does_not_pay(first, fitting, hardware) if len(fitting) > 1 else f"Use tp {first.setting.tp}.")
    else:
        words += _pays(first, used, fitting)
    words += _across_nodes(used, planned, hardware)
    return Verdict(used.setting.tp, used is not first, " ".join(word for word in words if word))


def _nothing_fits(points: Sequence[Point], planned: Sequence[Point]) -> str:
    if not planned:
        return f"No plan at any of these tp: {points[0].refusal}"
    least = min(planned, key=lambda p: p.memory_bytes)
    return (
        f"Nothing fits: tp {least.setting.tp} needs {nbytes(least.memory_bytes)} a rank."
        " Try a larger tp, a smaller batch or a shorter sequence."
    )


def _memory(planned: Sequence[Point], first: Point) -> str:
    too_large = [p for p in planned if not p.fits and p.setting.tp < first.setting.tp]
    if too_large:
        worst = too_large[-1]
        return (
            f"The model needs tp {first.setting.tp}: at tp {worst.setting.tp} a rank would hold"
            f" {nbytes(worst.memory_bytes)}."
        )
    return ""


def _pays(first: Point, used: Point, fitting: Sequence[Point]) -> list[str]:
    reached = efficiency(used, first)
    words = [
        f"Use tp {used.setting.tp}: {first.step_s / used.step_s:.2f}x as fast as tp {first.setting.tp}"
        f" ({seconds(used.step_s)} against {seconds(first.step_s)}), efficiency {reached:.0%}."
    ]
    if reached < WASTEFUL:
        copies = used.setting.tp // first.setting.tp
        words.append(
            f"That is for latency: as {copies} copies of tp {first.setting.tp} the same ranks do"
            f" {1 / reached:.1f}x as much per second."
        )
    larger = [p for p in fitting if p.setting.tp > used.setting.tp]
    if larger:
        change = used.step_s / larger[0].step_s - 1
        outcome = f"gains {change:.0%} more" if change > 0 else _slower(larger[0], used)
        words.append(f"tp {larger[0].setting.tp} {outcome} (R = {larger[0].ratio:.2g}).")
    return words


def _slower(point: Point, than: Point) -> str:
    return f"takes {point.step_s / than.step_s:.2f}x as long"


def _does_not_pay(first: Point, fitting: Sequence[Point], hardware: Hardware) -> str:
    """Why more ranks are not faster."""
    best = min(fitting[1:], key=lambda p: p.step_s)
    saved = first.compute_s - best.compute_s
    added = best.comm_s - first.comm_s
    where = "one GPU" if first.setting.tp == 1 else f"{first.setting.tp} ranks"
    change = first.step_s / best.step_s - 1
    outcome = f"gains only {change:.1%}" if change > 0 else _slower(best, first)
    words = (
        f"Tensor parallelism {'does not pay' if first.setting.tp == 1 else 'pays no further than memory asks'} here:"
        f" use tp {first.setting.tp}. It fits on {where} ({nbytes(first.memory_bytes)} of"
        f" {hardware.memory_gb:g} GB), and tp {best.setting.tp} {outcome}: {seconds(saved)} of compute saved,"
        f" {seconds(added)} of communication added"
    )
    return f"{words}. {_cause(first, best, hardware)}"


def _cause(first: Point, best: Point, hardware: Hardware) -> str:
    """The link, where its bytes would eat up what is saved even at the rate of large messages; else the step's size."""
    if best.compute_s + best.moves_s + best.bulk_s < first.compute_s + first.moves_s + first.bulk_s:
        return (
            f"The model, or the step, is too small: {seconds(first.compute_s)} of compute, and at tp {best.setting.tp}"
            f" its collectives take {seconds(best.comm_s)}, the latency alone {seconds(best.empty_s)}; at the rate of"
            f" large messages their bytes would take {seconds(best.bulk_s)}."
        )
    left = first.step_s - first.transfer_s - (best.step_s - best.transfer_s)
    more = best.transfer_s - first.transfer_s
    enough = (
        f"it would break even at {more / left:.2g}x its bandwidth" if left > 0
        else "no bandwidth would make up for the latency"
    )  # fmt: skip
    return f"The link is too slow for it ({link_text(hardware)}): {seconds(best.transfer_s)} go into bytes; {enough}."


def link_text(hardware: Hardware) -> str:
    """What joins the ranks, as far as the profile says."""
    named = {"nvswitch": "NVSwitch", "nvlink_pairs": "NVLink in pairs", "pcie": "PCIe", "host": "one host's memory"}
    if hardware.link is None:
        return hardware.description
    return f"{named[hardware.link.topology]}, {hardware.link.bytes_per_s_per_rank / 1e9:.3g} GB/s a rank"


def _across_nodes(used: Point, planned: Sequence[Point], hardware: Hardware) -> list[str]:
    """What crossing nodes costs: by a larger tp of the sweep, or the same one spread over two nodes."""
    words = []
    within = [p for p in planned if p.setting.tp <= hardware.ranks_per_node]
    for point in planned:
        if point.setting.tp > hardware.ranks_per_node and within:
            best = min(within, key=lambda p: p.step_s)
            words.append(
                f"tp {point.setting.tp} spans {-(-point.setting.tp // hardware.ranks_per_node)} nodes and takes"
                f" {seconds(point.step_s)}{_by_formula(not point.basis.unmeasured)}; within one, tp {best.setting.tp}"
                f" takes {seconds(best.step_s)}."
            )
    # Where a single rank is used, of the fastest tp that has ranks to spread.
    able = [p for p in (used, *sorted(planned, key=lambda p: p.step_s)) if p.two_nodes_s is not None]
    if able and able[0].two_nodes_s is not None:
        words.append(
            f"Spread over two nodes, tp {able[0].setting.tp} would take {seconds(able[0].two_nodes_s)},"
            f" {able[0].two_nodes_s / able[0].step_s:.2f}x as long{_by_formula(able[0].two_nodes_measured)}."
        )
    return words


def _by_formula(measured: bool) -> str:
    """What to add to a time over two nodes: networks that were measured took longer than the formula says."""
    return "" if measured else " (by formula, not measured: expect more)"
