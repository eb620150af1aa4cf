"""From the content of a plan file to the plan; `plan_encoding` is the way there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from .edits import CallEdit, ForwardEdits, OperatorEdit, ParameterEdit
from .layout import Interval, Layout, Segment, even
from .moves import Move
from .path_ranges import Repeat, Row, expand_paths, expand_rows, parse_ranges
from .plan_document import (
    CallEntry,
    CollectiveRepeat,
    MoveEntry,
    OperatorEntry,
    ParameterEntry,
    PlanDocument,
    ScheduleEntry,
    SegmentEntry,
    Split,
    TextRepeat,
    UnsplitRepeat,
)
from .plan_encoding import COLLECTIVE_FIELDS, UNSPLIT_FIELDS
from .plan_model import Plan, PlannedCost, PlannedParameter, Schedule
from .planned_collectives import Collective
from .site_text import Sources, parse_chain
from .sites import Site
from .workloads import PHASES, Length, Workload

_Text = TypeVar("_Text")
_Value = TypeVar("_Value")


class WrongField(Exception):
    """A field of the right type that makes no sense."""

    def __init__(self, field: str, wrong: object) -> None:
        super().__init__(field)
        self.field, self.wrong = field, str(wrong)


def plan_of(document: PlanDocument) -> Plan:
    """The plan that checked content describes.

    Raises:
        WrongField: Fields that do not fit each other.
    """
    ranks, sources = document.tp, Sources()
    parameters = [
        _planned(fqn, entry, ranks) for fqn, entry in _expanded("parameters", document.parameters, expand_paths).items()
    ]
    if document.parameter_order is not None:
        order = _expanded("parameter_order", document.parameter_order, parse_ranges)
        if sorted(order) != list(range(len(parameters))):
            raise WrongField("parameter_order", f"not an order of {len(parameters)} parameters")
        parameters = [parameters[n] for n in order]
    schedules = tuple(_schedule(f"schedules.{n}", s, sources, ranks) for n, s in enumerate(document.schedules))
    _check_stand_ins(schedules)
    known = {p.edit.fqn for p in parameters}
    for n, schedule in enumerate(schedules):
        for name in sorted((schedule.edits.partial | schedule.edits.lifted) - known):
            raise WrongField(f"schedules.{n}.reads.{name}", "no such parameter")
    return Plan(
        name=document.name,
        tp=ranks,
        hardware=document.hardware,
        options=document.options,
        parameters=tuple(parameters),
        ties=document.ties,
        schedules=schedules,
        unsplit=tuple(
            (fqn, nbytes, reason) for fqn, nbytes, reason in _rows("unsplit", document.unsplit, UNSPLIT_FIELDS)
        ),
        findings=tuple(text for (text,) in _rows("findings", document.findings, None)),
        assumptions=document.assumptions,
        cost=PlannedCost(**document.cost.model_dump()),
        memory_bytes=document.memory_bytes,
    )


def _check_stand_ins(schedules: Sequence[Schedule]) -> None:
    """After each schedule that asks for lengths the one that stands in for it, and no others: the runtime takes the
    next.

    Raises:
        WrongField: It is not so.
    """
    for n, schedule in enumerate(schedules):
        before = schedules[n - 1] if n else None
        follows = before is not None and bool(before.lengths) and not before.stands_in
        if schedule.stands_in and not follows:
            raise WrongField(f"schedules.{n}.stands_in", "it stands in for none: the one before asks for no lengths")
        if follows and not schedule.stands_in:
            raise WrongField(f"schedules.{n - 1}.lengths", "no schedule stands in where they are not so")
        if before is not None and schedule.stands_in and schedule.workload != before.workload:
            raise WrongField(f"schedules.{n}.workload", f"it stands in for {before.workload.name}, and is another")
        if schedule.stands_in and schedule.lengths:
            raise WrongField(f"schedules.{n}.lengths", "a schedule that stands in takes any lengths")
    if schedules[-1].lengths:
        raise WrongField(f"schedules.{len(schedules) - 1}.lengths", "no schedule stands in where they are not so")


def _expanded(field: str, value: _Text, expand: Callable[[_Text], _Value]) -> _Value:
    try:
        return expand(value)
    except ValueError as error:
        raise WrongField(field, error) from error


def _rows(field: str, entries: Sequence[Any], names: tuple[str, ...] | None) -> list[Row]:
    def row(entry: Any) -> Row:
        return tuple(getattr(entry, name) for name in names) if names else (entry,)

    folded = [
        Repeat(entry.over, tuple(row(one) for one in entry.each))
        if isinstance(entry, (CollectiveRepeat, UnsplitRepeat, TextRepeat))
        else row(entry)
        for entry in entries
    ]
    return _expanded(field, folded, expand_rows)


def _schedule(field: str, entry: ScheduleEntry, sources: Sources, ranks: int) -> Schedule:
    calls: dict[Site, CallEdit] = {}
    for module, entries in _expanded(f"{field}.calls", entry.calls, expand_paths).items():
        for n, call in enumerate(entries):
            where = f"{field}.calls.{module}.{n}"
            frames = _expanded(f"{where}.at", call.at, lambda text: parse_chain(text, sources))
            site = Site("" if module == "." else module, frames)
            if site in calls:
                raise WrongField(where, "the same call is edited twice")
            calls[site] = _edit(where, call, ranks)
    reads = _expanded(f"{field}.reads", entry.reads, expand_paths)
    rows = _rows(f"{field}.collectives", entry.collectives, COLLECTIVE_FIELDS)
    return Schedule(
        workload=_workload(field, entry),
        edits=ForwardEdits(
            calls,
            frozenset(name for name, read in reads.items() if read.partial_grad),
            frozenset(name for name, read in reads.items() if read.lifted),
            tuple(entry.partial_inputs),
            tuple(entry.partial_outputs),
            tuple((p, _move_of(f"{field}.split_outputs.{p}", m, ranks)) for p, m in entry.split_outputs.items()),
        ),
        collectives=tuple(Collective(*row) for row in rows),
        cost=PlannedCost(**entry.cost.model_dump()),
        lengths=tuple(Length(one.input, one.dim, one.exactly) for one in entry.lengths),
        stands_in=entry.stands_in,
    )


def _workload(field: str, entry: ScheduleEntry) -> Workload:
    phase = entry.workload.partition(":")[0]
    if phase not in PHASES:
        raise WrongField(f"{field}.workload", f"{entry.workload} names no phase: prefill, decode or train")
    inputs = tuple((path, tensor.dtype, tuple(tensor.shape)) for path, tensor in entry.inputs.items())
    return Workload(entry.workload, phase, inputs, tuple(entry.values.items()), entry.context, entry.weight)


def _planned(fqn: str, entry: ParameterEntry, ranks: int) -> PlannedParameter:
    where = f"parameters.{fqn}"
    if (entry.dim is None) != (entry.split is None):
        raise WrongField(where, "dim and split go together: give both, or neither for a replicated parameter")
    if (entry.dim is None) != (entry.placement == "replicated"):
        raise WrongField(
            where, f"placement {entry.placement} {'needs' if entry.dim is None else 'has no'} dim and split"
        )
    layout = _layout(f"{where}.split", entry.split, ranks)
    if entry.dim is not None and layout is not None:
        length = entry.shape[entry.dim] if entry.dim < len(entry.shape) else None
        if layout.size != length:
            raise WrongField(f"{where}.split", f"covers {layout.size} of a dim of {length}")
    return PlannedParameter(
        ParameterEdit(fqn, entry.dim, layout), entry.placement, tuple(entry.shape), entry.dtype, entry.weight
    )


def _layout(field: str, split: Split | None, ranks: int, elastic: bool = False) -> Layout | None:
    if split is None:
        return None
    if not split:
        raise WrongField(field, "no segments")
    return Layout(tuple(_segment(f"{field}.{n}", entry, ranks) for n, entry in enumerate(split)), elastic)


def _segment(field: str, entry: int | SegmentEntry, ranks: int) -> Segment:
    if isinstance(entry, int):
        return even(entry, ranks).segments[0]
    if len(entry.owned) != ranks:
        raise WrongField(f"{field}.owned", f"says what {len(entry.owned)} ranks own, need {ranks}")
    owned = tuple(_expanded(f"{field}.owned", text, _intervals) for text in entry.owned)
    for rank, intervals in enumerate(owned):
        if any(not 0 <= a < b <= entry.length for a, b in intervals):
            raise WrongField(f"{field}.owned.{rank}", f"{entry.owned[rank]} is not within 0:{entry.length}")
        if sum(b - a for a, b in intervals) > entry.local:
            raise WrongField(
                f"{field}.owned.{rank}", f"{entry.owned[rank]} is more than the local length {entry.local}"
            )
    return Segment(entry.length, owned, entry.local)


def _intervals(text: str) -> tuple[Interval, ...]:
    pairs = [part.partition(":") for part in text.split(",")] if text else []
    return tuple((int(start), int(stop)) for start, _, stop in pairs)


def _move_of(field: str, entry: MoveEntry, ranks: int) -> Move:
    layout = _layout(f"{field}.split", entry.split, ranks, entry.elastic)
    return Move(entry.forward, entry.backward, entry.dim, layout)


def _operator(field: str, entry: OperatorEntry, ranks: int) -> OperatorEdit:
    return OperatorEdit(entry.name, entry.dim, _layout(f"{field}.split", entry.split, ranks))


def _edit(field: str, entry: CallEntry, ranks: int) -> CallEdit:
    return CallEdit(
        tuple((one.leaf, _move_of(f"{field}.arguments.{n}", one.move, ranks)) for n, one in enumerate(entry.arguments)),
        tuple((one.leaf, one.whole, one.local) for one in entry.integers),
        _operator(f"{field}.operator", entry.operator, ranks) if entry.operator else None,
        _move_of(f"{field}.result", entry.result, ranks) if entry.result else None,
    )
