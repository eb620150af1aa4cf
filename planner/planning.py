"""The pipeline: trace -> candidates -> tables -> exact solve -> edits -> `Plan`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from colrow.cost_models.errors import Infeasible, MemoryCapError, UsageError
from colrow.cost_models.hardware import Hardware, load_hardware
from colrow.cost_models.memory import collective_bytes

from .bytes_per_rank import optimizer_step_ps, total_of
from .collector import collector_paused
from .expressions import can_edit
from .graph import Graph
from .parameter_words import described_parameters
from .pins import refuse_pins_of_nothing, refuse_unmet_pins
from .plan_model import Plan, PlannedCost, Schedule
from .pricing import Cost, Phase
from .recomputation import check_checkpointing
from .rules import RULES
from .site_settings import Options
from .solving import Solved, solve_jointly
from .strategies import is_leaf
from .suitability import refuse_unsuitable
from .trace import Inputs, trace
from .workloads import PHASES, Length, Workload, phase_of, required_lengths, workload_of

LARGEST_TP = 1024


@collector_paused()
def plan(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    tp: int,
    hardware: str | Hardware = "h100-sxm",
    phase: Phase = "prefill",
    workloads: Mapping[str, tuple[Inputs, float]] | None = None,
    context: int = 0,
    sequence_parallel: bool | Literal["auto"] = False,
    replicate: Literal["never", "auto"] = "never",
    outputs: Literal["whole", "sharded"] = "whole",
    checkpointing: Literal["none", "blocks"] = "none",
    memory_gb: float | None = None,
    pin: Mapping[str, str] | None = None,
) -> Plan:
    """The cheapest exact tensor-parallel plan of a model.

    Args:
        model: Any module torch can trace; weights may be on meta and are never read.
        example_inputs: Keyword arguments, or a tuple of positional ones; None with ``workloads``.
        tp: Ranks of the tensor-parallel group.
        hardware: Profile name, path of a profile, or a profile.
        phase: ``prefill``, ``decode`` or ``train``; the mode (train or eval) is the model's own.
        workloads: Instead of inputs and a phase, several: ``{"prefill": (inputs, weight), "decode": ...}``. They share
            one weight layout, the one of least weighted time, and each has its own schedule of moves; which one runs
            is decided per forward. A name is a phase, or ``phase:label``.
        context: Tokens already in the KV cache (decode).
        sequence_parallel: Split the sequence between matmuls: True wherever it can be, ``auto`` where it is faster. A
            forward whose length does not divide runs a schedule with all_reduces instead.
        replicate: ``never`` splits every weight that can be split; ``auto`` minimises time alone.
        outputs: ``whole``, or ``sharded``: returned values may stay split where gathering them would cost (logits, for
            a parallel cross entropy); the plan's schedules say which do.
        checkpointing: ``blocks``: the model is trained with `gradient_checkpointing_enable` of Hugging Face, or with
            every block under `torch.utils.checkpoint` (``use_reentrant=False``): of a block its inputs are kept, and
            its forward runs again in the backward pass, collectives included.
        memory_gb: Cap per rank, 1 GB = 1e9 bytes; None: the hardware's.
        pin: fnmatch pattern of a parameter or module path -> ``column``, ``row``, ``vocab`` or ``replicated``.

    Raises:
        UsageError: Wrong arguments, a pin of no parameter, or a dispatched or quantised model.
        TraceError: torch cannot trace the model.
        Infeasible: No plan satisfies the constraints; `MemoryCapError` names the smallest tp that fits;
            `LayoutError` the weight that cannot be placed as it is pinned.
    """
    _check(tp, phase, sequence_parallel, replicate, outputs, pin)
    check_checkpointing(checkpointing, [phase_of(name) for name in workloads or (phase,)], sequence_parallel)
    refuse_unsuitable(model)
    if pin:
        refuse_pins_of_nothing(pin, (name for name, _ in model.named_parameters(remove_duplicate=False)))
    profile = hardware if isinstance(hardware, Hardware) else load_hardware(hardware)
    asked = _asked(example_inputs, phase, workloads, context)
    traced = [(workload, trace(model, inputs)) for workload, inputs in asked]
    options = Options(
        replicate=replicate,
        pin=dict(pin or {}),
        sequence_parallel=sequence_parallel,
        outputs=outputs,
        checkpointing=checkpointing,
        editable=can_edit,
    )
    try:
        made = plan_graphs(traced, type(model).__name__, tp, profile, options, memory_gb)
    except MemoryCapError as error:
        smallest = _smallest_tp(traced, type(model).__name__, tp, profile, options, memory_gb)
        cap = memory_gb if memory_gb is not None else profile.memory_gb
        raise MemoryCapError(
            type(model).__name__,
            f"no plan for {tp} ranks fits {cap:g} GB per rank",
            got=f"at least {error.need}" if error.need else None,
            need=f"tp >= {smallest}" if smallest else "a smaller batch or more memory",
            remedy=f"Use --tp {smallest}." if smallest else "No tp up to 128 fits.",
        ) from error
    refuse_unmet_pins(options.pin, made.parameters, tp)
    return made


def _asked(
    example_inputs: Inputs | None, phase: Phase, workloads: Mapping[str, tuple[Inputs, float]] | None, context: int
) -> list[tuple[Workload, Inputs]]:
    """The workloads asked for, with their inputs.

    Raises:
        UsageError: Inputs and workloads are both given, or neither; a weight is not positive.
    """
    if (example_inputs is None) == (not workloads):
        raise UsageError("plan", "give example_inputs, or workloads, and not both")
    if example_inputs is not None:
        return [(workload_of(phase, example_inputs, context), example_inputs)]
    asked = []
    for name, (inputs, weight) in (workloads or {}).items():
        if not 0 < weight < math.inf:
            raise UsageError(f"workload {name}", "its weight is no share of the time", got=weight, need="above 0")
        decodes = phase_of(name) == "decode"
        asked.append((workload_of(name, inputs, context if decodes else 0, weight), inputs))
    return asked


def plan_graph(
    graph: Graph, name: str, tp: int, hardware: Hardware, workload: Workload, options: Options, memory_gb: float | None
) -> Plan:
    """Plans a traced graph; see `plan`."""
    return plan_graphs([(workload, graph)], name, tp, hardware, options, memory_gb)


def plan_graphs(
    traced: Sequence[tuple[Workload, Graph]],
    name: str,
    tp: int,
    hardware: Hardware,
    options: Options,
    memory_gb: float | None,
) -> Plan:
    """Plans the traces of several workloads over one layout; see `plan`."""
    cap = room = int((memory_gb if memory_gb is not None else hardware.memory_gb) * 1e9)

    def made_within(room: int) -> Plan:
        solved, settled = solve_jointly(traced, tp, hardware, options, room)
        parameters = {edit.fqn: edit for edit in solved[0].lowered.parameters}
        schedules: list[Schedule] = []
        for (workload, graph), found in zip(traced, solved, strict=True):
            lengths = required_lengths(graph, found.lowered.stored, workload)
            schedules.append(schedule_of(workload, found, lengths))
            if lengths:
                whole = dataclasses.replace(settled, sequence_parallel=False, fixed_parameters=parameters)
                (stand_in,), _ = solve_jointly([(workload, graph)], tp, hardware, whole, None)
                schedules.append(schedule_of(workload, stand_in, stands_in=True))
        return plan_of(solved, schedules, name, hardware, settled, memory_gb)

    while True:
        made = made_within(room)
        over = sum(made.memory_bytes.values()) - cap
        if over <= 0:
            return made
        room -= over  # more is alive at once, or in buffers, than was set aside before placements were known


def schedule_of(
    workload: Workload, solved: Solved, lengths: tuple[Length, ...] = (), stands_in: bool = False
) -> Schedule:
    edits, collectives = solved.lowered.edits, tuple(solved.lowered.collectives)
    return Schedule(workload, edits, collectives, _cost(solved), lengths, stands_in)


def plan_of(
    solved: Sequence[Solved],
    schedules: Sequence[Schedule],
    name: str,
    hardware: Hardware,
    options: Options,
    memory_gb: float | None,
) -> Plan:
    formulation, lowered = solved[0].formulation, solved[0].lowered
    graph = formulation.graph
    parameters, unsplit = described_parameters(formulation, lowered)
    planned = [schedule for schedule in schedules if not schedule.stands_in]
    held = [
        total_of(
            s.formulation.graph,
            s.lowered.stored,
            phase_of(one.workload.name),
            one.workload.context,
            _buffer_bytes(one, formulation.pricing.ranks),
        )
        for s, one in zip(solved, planned, strict=True)
    ]
    return Plan(
        name=name,
        tp=formulation.pricing.ranks,
        hardware=hardware.name,
        options={
            "replicate": options.replicate,
            "sequence_parallel": options.sequence_parallel,
            "outputs": options.outputs,
            "checkpointing": options.checkpointing,
            "pin": dict(options.pin),
            "memory_gb": memory_gb,
        },
        parameters=parameters,
        ties=dict(graph.ties),
        schedules=tuple(schedules),
        unsplit=unsplit,
        findings=tuple(dict.fromkeys(text for s in solved for text in _findings(s, options, hardware))),
        assumptions=dict(graph.assumptions),
        cost=_weighted(planned),
        memory_bytes=max(held, key=lambda kinds: sum(kinds.values())),
        statistics={
            "variables": sum(len(s.formulation.domains) for s in solved),
            "factors": sum(len(s.formulation.problem.factors) for s in solved),
            "nodes": sum(len(s.formulation.graph.nodes) for s in solved),
        },
    )


def _buffer_bytes(schedule: Schedule, ranks: int) -> int:
    """What the largest collective of the workload's own passes holds."""
    train = phase_of(schedule.workload.name) == "train"
    made = (c for c in schedule.collectives if train or c.direction == "forward")
    return max((collective_bytes(c.kind, c.nbytes, ranks) for c in made), default=0)


def _cost(solved: Solved) -> PlannedCost:
    """Seconds of the workload's own passes; the bound is below them by the gap of the solution they are part of."""
    train, lowered = solved.formulation.pricing.phase == "train", solved.lowered

    def own(cost: Cost) -> int:
        return cost.forward_ps + (cost.backward_ps if train else 0)

    gradients = sum(c.ps for c in lowered.collectives if c.category == "parameter_gradient")
    optimizer = optimizer_step_ps(solved.formulation.pricing, solved.formulation.graph, lowered.stored)
    compute, communication = own(lowered.compute) + optimizer, own(lowered.communication) + (gradients if train else 0)
    gap = solved.solution.cost - solved.solution.lower_bound
    return PlannedCost(
        (compute + communication) * 1e-12,
        compute * 1e-12,
        communication * 1e-12,
        (compute + communication - gap) * 1e-12,
        solved.solution.proven,
        sum(c.ps for c in lowered.collectives if c.direction == "forward") * 1e-12,
        sum(c.ps for c in lowered.collectives if c.direction == "backward") * 1e-12,
        optimizer * 1e-12,
    )


def _weighted(schedules: Sequence[Schedule]) -> PlannedCost:
    """The workloads' costs times their weights; of a single one, its own."""
    if len(schedules) == 1:
        return schedules[0].cost
    names = ("total_s", "compute_s", "comm_s", "lower_bound_s", "forward_comm_s", "backward_comm_s", "optimizer_s")
    sums = {name: sum(s.workload.weight * getattr(s.cost, name) for s in schedules) for name in names}
    return PlannedCost(**sums, proven=all(s.cost.proven for s in schedules))


def _findings(solved: Solved, options: Options, hardware: Hardware) -> tuple[str, ...]:
    graph, collectives = solved.formulation.graph, solved.lowered.collectives
    unknown: dict[str, int] = {}
    for node in graph.nodes:
        if is_leaf(node) or not node.operands or node.op in RULES or node.op.rstrip("_") in RULES:
            continue
        if any(v.dtype.is_floating_point for v in (node, *(graph.nodes[i] for i in node.operands))):
            unknown[node.op] = unknown.get(node.op, 0) + 1
    found = [
        f"operator without a rule, its operands are replicated: {op} ({count}x)"
        for op, count in sorted(unknown.items())
    ]
    found += graph.findings
    found += [
        f"call left unedited, its calls would need different edits: {site[0]}"
        for site in sorted(options.frozen, key=str)
        if isinstance(site, tuple)
    ]
    ranks = solved.formulation.pricing.ranks
    predicted = {(c.kind, c.nbytes): hardware.predict(c.kind, c.nbytes, ranks).finding for c in collectives}
    found += [f"predicted time of {kind}: {text}" for (kind, _), text in sorted(predicted.items()) if text]
    return tuple(dict.fromkeys(found))


def _smallest_tp(
    traced: Sequence[tuple[Workload, Graph]],
    name: str,
    tp: int,
    hardware: Hardware,
    options: Options,
    memory_gb: float | None,
) -> int | None:
    for larger in (t for t in (2, 4, 8, 16, 32, 64, 128) if t > tp):
        try:
            plan_graphs(traced, name, larger, hardware, options, memory_gb)
        except Infeasible:
            continue
        return larger
    return None


def _check(
    tp: int, phase: str, sequence_parallel: object, replicate: str, outputs: str, pin: Mapping[str, str] | None
) -> None:
    if not isinstance(tp, int) or isinstance(tp, bool) or not 1 <= tp <= LARGEST_TP:
        raise UsageError(
            "tp",
            "not a number of ranks",
            got=tp,
            need=f"1 to {LARGEST_TP}",
            remedy="Pass the size of the tensor-parallel group.",
        )
    if phase not in PHASES:
        raise UsageError("phase", "unknown phase", got=phase, need="prefill, decode or train")
    if sequence_parallel not in (False, True, "auto"):
        raise UsageError("sequence_parallel", "unknown policy", got=sequence_parallel, need="False, True or auto")
    if replicate not in ("never", "auto"):
        raise UsageError("replicate", "unknown policy", got=replicate, need="never or auto")
    if outputs not in ("whole", "sharded"):
        raise UsageError("outputs", "unknown policy", got=outputs, need="whole or sharded")
    for pattern, word in (pin or {}).items():
        if word not in ("column", "row", "vocab", "replicated"):
            raise UsageError(f"pin {pattern}", "unknown placement", got=word, need="column, row, vocab or replicated")
