"""Plans with another schedule than they were made with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from colrow.planner import Plan


def with_edits(plan: Plan, **changes: Any) -> Plan:
    """The plan with other edits (`ForwardEdits` fields) in its first schedule."""
    first, *others = plan.schedules
    return replace(plan, schedules=(replace(first, edits=replace(first.edits, **changes)), *others))


def with_schedule(plan: Plan, **changes: Any) -> Plan:
    """The plan with other fields in its first schedule."""
    first, *others = plan.schedules
    return replace(plan, schedules=(replace(first, **changes), *others))
