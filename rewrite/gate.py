"""Limits on a plan, for a gate in CI: so many reductions, so many bytes, so much of the weights split, a proof."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from colrow.planner.plan_model import Plan
from colrow.planner.planned_collectives import Collective


@dataclass(frozen=True)
class Limits:
    """What a plan may cost. None: no limit.

    Attributes:
        max_all_reduces: All-reduces of one step, of every category.
        max_all_reduces_per_block: All-reduces of activations and their gradients (category ``block``, as `Plan.count`
            counts) in the worst block.
        max_bytes: Bytes of the buffers of all collectives of one step, per rank.
        direction: Counts forward or backward only; None: both.
        min_sharded: Share of the matmul, embedding and expert bytes that is split, 0 to 1.
        require_proven: The plan is proven optimal.
    """

    max_all_reduces: int | None = None
    max_all_reduces_per_block: int | None = None
    max_bytes: int | None = None
    direction: str | None = None
    min_sharded: float | None = None
    require_proven: bool = False


@dataclass(frozen=True)
class Check:
    """One limit and what the plan has.

    Attributes:
        limit: Its name, as on the command line.
        got: What the plan has.
        need: What the limit asks for.
        ok: Whether it holds.
        where: The block or workload that has it; "" for the whole plan.
    """

    limit: str
    got: float | str
    need: float | str
    ok: bool
    where: str = ""


def checks(plan: Plan, limits: Limits) -> list[Check]:
    """Every limit that is set against the plan; where a plan has several workloads, the worst one counts."""
    found: list[Check] = []
    most = (
        ("max-all-reduces", limits.max_all_reduces, _all_reduces),
        ("max-all-reduces-per-block", limits.max_all_reduces_per_block, _all_reduces_per_block),
        ("max-bytes", limits.max_bytes, _bytes),
    )
    for name, limit, count in most:
        if limit is not None:
            got, where = _worst(plan, limits.direction, count)
            found.append(Check(name, got, limit, got <= limit, where))
    if limits.min_sharded is not None:
        share = plan.sharded_fraction
        found.append(Check("min-sharded", share, limits.min_sharded, share >= limits.min_sharded, _largest_whole(plan)))
    if limits.require_proven:
        proven = plan.cost.proven
        found.append(Check("require-proven", "proven" if proven else "not proven", "proven", proven))
    return found


def violations(plan: Plan, limits: Limits) -> list[Check]:
    """The limits that the plan exceeds."""
    return [check for check in checks(plan, limits) if not check.ok]


_Count = Callable[[list[Collective]], tuple[int, str]]


def _worst(plan: Plan, direction: str | None, count: _Count) -> tuple[int, str]:
    """The largest count over the workloads, and where it is."""
    worst = (0, "")
    for workload in plan.workloads:
        counted = [c for c in plan.collectives if c.workload == workload.name and direction in (None, c.direction)]
        got, where = count(counted)
        if got > worst[0]:
            named = workload.name if len(plan.workloads) > 1 else ""
            worst = (got, ", ".join(text for text in (where, named) if text))
    return worst


def _all_reduces(collectives: list[Collective]) -> tuple[int, str]:
    return sum(c.kind == "all_reduce" for c in collectives), ""


def _all_reduces_per_block(collectives: list[Collective]) -> tuple[int, str]:
    per_block: dict[str, int] = {}
    for block in _blocks(c for c in collectives if c.kind == "all_reduce" and c.category == "block"):
        per_block[block] = per_block.get(block, 0) + 1
    worst = max(per_block, key=lambda block: per_block[block], default="")
    return per_block.get(worst, 0), worst


def _blocks(collectives: Iterable[Collective]) -> Iterator[str]:
    return (c.block for c in collectives if c.block)


def _bytes(collectives: list[Collective]) -> tuple[int, str]:
    return sum(c.nbytes for c in collectives), ""


def _largest_whole(plan: Plan) -> str:
    largest = max(plan.unsplit, key=lambda entry: entry[1], default=None)
    return f"{largest[0]} is whole: {largest[2]}" if largest else ""
