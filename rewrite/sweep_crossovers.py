"""Where something changes along an axis of a sweep: communication outgrows compute, or the plan becomes another one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields

from colrow.planner.path_ranges import fold_paths
from colrow.planner.plan_model import Plan

from .sweep_points import Point, Setting, collectives_made

AXES = ("batch", "seq", "link_speed", "tp")
PLAN_AXES = ("batch", "seq", "link_speed")  # another tp is another plan by definition


@dataclass(frozen=True)
class Crossover:
    """Something that changes between two neighbouring points.

    Attributes:
        axis: The field of `Setting` that differs.
        what: ``ratio``: R = T_comm / T_comp passes one; ``plan``: placements or collectives change.
        before: The point with the smaller value.
        after: The point with the larger one.
        at: For ``ratio``, where R is one, by a straight line in logarithms; None for ``plan``.
        change: What changes, in words.
    """

    axis: str
    what: str
    before: Setting
    after: Setting
    at: float | None
    change: str


def crossovers(points: Sequence[Point]) -> list[Crossover]:
    """All of a sweep, axis by axis."""
    found = []
    for axis in AXES:
        for one, other in neighbours([p for p in points if p.plan is not None], axis):
            if (one.ratio - 1) * (other.ratio - 1) < 0 or (one.ratio == 1) != (other.ratio == 1):
                found.append(_of_ratio(axis, one, other))
            if axis in PLAN_AXES and one.plan is not None and other.plan is not None:
                change = difference(one.plan, other.plan)
                if change:
                    found.append(Crossover(axis, "plan", one.setting, other.setting, None, change))
    return found


def neighbours(points: Sequence[Point], axis: str) -> Iterator[tuple[Point, Point]]:
    """Points that differ in ``axis`` alone, with none between them."""
    lines: dict[tuple[object, ...], list[Point]] = {}
    place = [field.name for field in fields(Setting)].index(axis)
    for point in points:
        named = astuple(point.setting)
        lines.setdefault((*named[:place], *named[place + 1 :]), []).append(point)
    for line in lines.values():
        ordered = sorted(line, key=_along(axis))
        yield from zip(ordered, ordered[1:], strict=False)


def _along(axis: str) -> Callable[[Point], float]:
    return lambda point: float(getattr(point.setting, axis))


def _of_ratio(axis: str, one: Point, other: Point) -> Crossover:
    below, above = _along(axis)(one), _along(axis)(other)
    at: float | None = None
    if one.ratio > 0 and other.ratio > 0:
        share = -math.log(one.ratio) / (math.log(other.ratio) - math.log(one.ratio))
        at = math.exp(math.log(below) + share * (math.log(above) - math.log(below)))
    change = f"R from {one.ratio:.2g} to {other.ratio:.2g}"
    return Crossover(axis, "ratio", one.setting, other.setting, at, change)


def difference(one: Plan, other: Plan) -> str:
    """What differs between two plans of a model, in words; "" where placements and collectives are the same.

    Collectives that no step of theirs makes (backward ones of an inference plan) are left out.
    """
    moved = {
        fqn: f"{placement} -> {other.layers[fqn]}"
        for fqn, placement in one.layers.items()
        if other.layers[fqn] != placement
    }
    parts = [f"{path} {change}" for path, change in fold_paths(moved).items()]
    counts, others = _made(one), _made(other)
    for kind, direction in sorted(set(counts) | set(others)):
        was, now = counts[kind, direction], others[kind, direction]
        if was != now:
            parts.append(f"{direction} {kind}s {was} -> {now}")
    if not parts and _sites(one) != _sites(other):
        parts.append("the same collectives at other places")
    shown = parts[:4] + [f"{len(parts) - 4} more"] * (len(parts) > 4)
    return ", ".join(shown)


def _made(plan: Plan) -> Counter[tuple[str, str]]:
    return Counter((c.kind, c.direction) for c in collectives_made(plan))


def _sites(plan: Plan) -> Counter[tuple[str, str, str]]:
    return Counter((c.kind, c.direction, c.site) for c in collectives_made(plan))
