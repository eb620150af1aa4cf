"""From a plan to the content of its file; `plan_decoding` is the way back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from .edits import CallEdit
from .layout import Layout, Segment, even
from .moves import Move
from .path_ranges import Repeat, Row, expand_paths, fold_paths, fold_rows, natural, ranges_text
from .plan_model import Plan, PlannedCost, PlannedParameter, Schedule
from .planned_collectives import Collective
from .site_text import Sources, chain_text
from .sites import Site
from .workloads import Length

COLLECTIVE_FIELDS = tuple(field.name for field in fields(Collective))
UNSPLIT_FIELDS = ("parameter", "nbytes", "reason")


def content_of(plan: Plan) -> dict[str, Any]:
    """All that a plan file says, but for its header, as JSON values."""
    sources = Sources()
    parameters = {p.edit.fqn: _parameter(p, plan.tp) for p in plan.parameters}
    folded = fold_paths(parameters)
    order = _order(list(parameters), list(expand_paths(folded)))
    return {
        "name": plan.name,
        "tp": plan.tp,
        "hardware": plan.hardware,
        "options": dict(plan.options),
        "cost": _cost(plan.cost),
        "memory_bytes": dict(plan.memory_bytes),
        "findings": _folded([(text,) for text in plan.findings], None),
        "unsplit": _folded(list(plan.unsplit), UNSPLIT_FIELDS),
        "parameters": folded,
        **_unless_empty(parameter_order=order),
        "ties": dict(sorted(plan.ties.items())),
        "schedules": [_schedule(schedule, list(parameters), sources, plan.tp) for schedule in plan.schedules],
        "assumptions": dict(sorted(plan.assumptions.items())),
    }


def _schedule(schedule: Schedule, parameters: list[str], sources: Sources, ranks: int) -> dict[str, Any]:
    workload, edits = schedule.workload, schedule.edits
    calls: dict[str, list[dict[str, Any]]] = {}
    for site in sorted(edits.calls, key=lambda site: _place(site, sources)):
        calls.setdefault(site.module or ".", []).append(_call(site, edits.calls[site], sources, ranks))
    flags = {
        name: _unless_empty(partial_grad=name in edits.partial, lifted=name in edits.lifted) for name in parameters
    }
    return {
        "workload": workload.name,
        "inputs": {path: {"dtype": dtype, "shape": list(shape)} for path, dtype, shape in workload.inputs},
        **_unless_empty(values=dict(workload.values), context=workload.context),
        "weight": workload.weight,
        **_unless_empty(lengths=[_length(one) for one in schedule.lengths], stands_in=schedule.stands_in),
        "cost": _cost(schedule.cost),
        **_unless_empty(
            reads=fold_paths({name: read for name, read in flags.items() if read}),
            partial_inputs=list(edits.inputs),
            partial_outputs=list(edits.outputs),
            split_outputs={path: _move(move, ranks) for path, move in edits.split_outputs},
        ),
        "collectives": _folded(
            [tuple(getattr(c, name) for name in COLLECTIVE_FIELDS) for c in schedule.collectives], COLLECTIVE_FIELDS
        ),
        "calls": fold_paths(calls),
    }


def _length(length: Length) -> dict[str, Any]:
    exactly = {} if length.exactly is None else {"exactly": length.exactly}
    return {"input": length.input, "dim": length.dim, **exactly}


def _cost(cost: PlannedCost) -> dict[str, Any]:
    fields = {name: getattr(cost, name) for name in PlannedCost.__dataclass_fields__}
    return fields if cost.optimizer_s else {name: value for name, value in fields.items() if name != "optimizer_s"}


def _unless_empty(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value}


def _order(names: list[str], as_read: list[str]) -> str:
    """Where the plan's parameters stand in the order a reader finds them; empty if that is their order."""
    position = {name: n for n, name in enumerate(as_read)}
    return "" if names == as_read else ranges_text([position[name] for name in names])


def _place(site: Site, sources: Sources) -> tuple[object, ...]:
    """Modules by path, their calls as they stand in the source."""
    lines = tuple((frame.firstlineno, frame.span) for frame in site.frames)
    return natural(site.module), lines, chain_text(site.frames, sources)


def _folded(rows: list[Row], names: tuple[str, ...] | None) -> list[Any]:
    def entry(row: Row) -> Any:
        return dict(_named(row, names)) if names else row[0]

    return [
        {"over": item.over, "each": [entry(row) for row in item.each]} if isinstance(item, Repeat) else entry(item)
        for item in fold_rows(rows)
    ]


def _named(row: Row, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in zip(names, row, strict=True) if value != "")


def _parameter(parameter: PlannedParameter, ranks: int) -> dict[str, Any]:
    edit = parameter.edit
    where = {"dim": edit.dim, **_split(edit.layout, ranks)} if edit.dim is not None else {}
    return {
        "placement": parameter.placement,
        "shape": list(parameter.shape),
        "dtype": parameter.dtype,
        **_unless_empty(weight=parameter.is_weight),
        **where,
    }


def _split(layout: Layout | None, ranks: int) -> dict[str, Any]:
    if layout is None:
        return {}

    def shown(segment: Segment) -> int | dict[str, Any]:
        if Layout((segment,)) == even(segment.length, ranks):
            return segment.length
        owned = [",".join(f"{a}:{b}" for a, b in intervals) for intervals in segment.owned]
        return {"length": segment.length, "local": segment.local, "owned": owned}

    return {"split": [shown(segment) for segment in layout.segments], **_unless_empty(elastic=layout.elastic)}


def _move(move: Move, ranks: int) -> dict[str, Any]:
    where = _unless_empty(dim=move.dim) if move.layout is None else {"dim": move.dim, **_split(move.layout, ranks)}
    return {"forward": move.forward, "backward": move.backward, **where}


def _call(site: Site, edit: CallEdit, sources: Sources, ranks: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"at": chain_text(site.frames, sources)}
    if edit.arguments:
        entry["arguments"] = [{"leaf": leaf, "move": _move(move, ranks)} for leaf, move in edit.arguments]
    if edit.integers:
        entry["integers"] = [{"leaf": leaf, "whole": whole, "local": local} for leaf, whole, local in edit.integers]
    if edit.operator is not None:
        operator = edit.operator
        entry["operator"] = {"name": operator.name, "dim": operator.dim, **_split(operator.layout, ranks)}
    if edit.result is not None:
        entry["result"] = _move(edit.result, ranks)
    return entry
