"""The gate: what each limit counts, and that it fails when exceeded by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from changed_plans import with_schedule
from small_plans import BLOCKS, all_reduce, small_plan

from colrow.rewrite.gate import Limits, checks, violations

FORWARD, BACKWARD, GRADIENTS = BLOCKS, BLOCKS, BLOCKS
BYTES = (
    (FORWARD + BACKWARD) * 1024 + GRADIENTS * 32 + 4096 + 1024
)  # gathered after the head, scattered after the embedding


@pytest.mark.parametrize(
    ("limit", "direction", "got"),
    [
        ("max_all_reduces", None, FORWARD + BACKWARD + GRADIENTS),
        ("max_all_reduces", "forward", FORWARD),
        ("max_all_reduces", "backward", BACKWARD + GRADIENTS),
        ("max_all_reduces_per_block", None, 2),  # gradients of parameters are not activations
        ("max_all_reduces_per_block", "forward", 1),
        ("max_bytes", None, BYTES),
        ("max_bytes", "forward", FORWARD * 1024 + 4096 + 1024),
    ],
)
def test_a_limit_holds_at_what_the_plan_has_and_fails_below(limit, direction, got):
    (check,) = checks(small_plan(), Limits(direction=direction, **{limit: got}))
    assert (check.got, check.need, check.ok) == (got, got, True)
    assert [v.limit for v in violations(small_plan(), Limits(direction=direction, **{limit: got - 1}))] == [
        limit.replace("_", "-")
    ]


def test_the_worst_block_counts_and_is_named():
    plan = small_plan()
    plan = with_schedule(plan, collectives=(*plan.collectives, all_reduce("layers.1", "layers.1.x", "add in layers.1")))
    (check,) = checks(plan, Limits(max_all_reduces_per_block=2))
    assert (check.got, check.ok, check.where) == (3, False, "layers.1")


def test_the_worst_workload_counts():
    plan = small_plan()
    decode = [replace(c, workload="decode") for c in plan.collectives if c.direction == "forward"]
    first = plan.schedules[0]
    other = replace(first, workload=replace(first.workload, name="decode"), collectives=(*decode, *decode), lengths=())
    two = replace(plan, schedules=(*plan.schedules, other))
    (check,) = checks(two, Limits(max_all_reduces=6, direction="forward"))
    assert (check.got, check.ok, check.where) == (6, True, "decode")  # twice the three of decode, not nine
    assert not violations(two, Limits(max_all_reduces=9))


def test_share_of_the_weights():
    plan = small_plan()
    assert not violations(plan, Limits(min_sharded=plan.sharded_fraction))
    (found,) = violations(plan, Limits(min_sharded=plan.sharded_fraction + 1e-9))
    assert found.where == "router.weight is whole: pinned"


def test_proof():
    plan = small_plan()
    assert not violations(plan, Limits(require_proven=True))
    unproven = replace(plan, cost=replace(plan.cost, proven=False))
    assert [v.got for v in violations(unproven, Limits(require_proven=True))] == ["not proven"]
    assert not violations(unproven, Limits())


def test_a_plan_without_collectives_meets_every_limit():
    limits = Limits(max_all_reduces=0, max_all_reduces_per_block=0, max_bytes=0)
    plan = with_schedule(small_plan(), collectives=())
    assert [c.got for c in checks(plan, limits)] == [0, 0, 0]
    assert not violations(plan, limits)


def test_a_schedule_that_stands_in_does_not_count():
    plan = small_plan()
    more = replace(plan.schedules[1], collectives=plan.schedules[1].collectives * 3)
    with_more = replace(plan, schedules=(plan.schedules[0], more))
    limits = Limits(max_all_reduces=0, max_bytes=0)
    assert checks(with_more, limits) == checks(plan, limits)
