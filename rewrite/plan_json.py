"""A plan as `--json` prints it: everything spelled out, under the names of the Python API."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from colrow.planner.plan_model import Plan, PlannedParameter, Schedule
from colrow.planner.planned_collectives import Collective

from .gate import Check

PLAN_SCHEMA = "colrow.show/1"
CHECK_SCHEMA = "colrow.check/1"


def plan_json(plan: Plan) -> dict[str, Any]:
    """What ``plan --json`` and ``show --json`` print."""
    return {
        "schema": PLAN_SCHEMA,
        "name": plan.name,
        "tp": plan.tp,
        "hardware": plan.hardware,
        "workloads": [
            {
                "name": w.name,
                "phase": w.phase,
                "inputs": {path: list(shape) for path, _, shape in w.inputs},
                "context": w.context,
                "weight": w.weight,
            }
            for w in plan.workloads
        ],
        "schedules": [_schedule(schedule) for schedule in plan.schedules],
        "options": dict(plan.options),
        "cost": asdict(plan.cost),
        "memory_bytes": dict(plan.memory_bytes),
        "layers": dict(plan.layers),
        "parameters": {p.edit.fqn: _parameter(p) for p in plan.parameters},
        "ties": dict(plan.ties),
        "sharded_fraction": plan.sharded_fraction,
        "collectives": [_collective(c) for c in plan.collectives],
        "unsplit": [{"parameter": fqn, "bytes": size, "reason": reason} for fqn, size, reason in plan.unsplit],
        "findings": list(plan.findings),
        "assumptions": dict(plan.assumptions),
        "digest": plan.digest,
    }


def checks_json(plan: Plan, checks: list[Check]) -> dict[str, Any]:
    """What ``check --json`` prints."""
    return {
        "schema": CHECK_SCHEMA,
        "ok": all(check.ok for check in checks),
        "checks": [asdict(check) for check in checks],
        "name": plan.name,
        "tp": plan.tp,
        "digest": plan.digest,
    }


def _schedule(schedule: Schedule) -> dict[str, Any]:
    """``collectives`` of those that do not stand in are the plan's, one after another."""
    return {
        "workload": schedule.workload.name,
        "lengths": [asdict(length) for length in schedule.lengths],
        "stands_in": schedule.stands_in,
        "cost": asdict(schedule.cost),
        "collectives": [_collective(c) for c in schedule.collectives],
    }


def _parameter(parameter: PlannedParameter) -> dict[str, Any]:
    return {
        "placement": parameter.placement,
        "dim": parameter.edit.dim,
        "shape": list(parameter.shape),
        "local_shape": list(parameter.local_shape),
        "dtype": parameter.dtype,
    }


def _collective(collective: Collective) -> dict[str, Any]:
    named = {field.name: getattr(collective, field.name) for field in fields(collective)}
    seconds = named.pop("ps") * 1e-12
    return {**named, "seconds": seconds}
