"""The pipeline: trace -> candidates -> tables -> exact solve -> edits -> `Plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from colrow.cost_models.errors import Infeasible, MemoryCapError, UsageError
from colrow.cost_models.hardware import Hardware, load_hardware

from .bytes_per_rank import memory_of, total_of, workspace_bytes
from .edits import CallEdit
from .expressions import can_edit
from .factor_graph import Solution, evaluate
from .formulation import Formulation, formulate
from .graph import Graph
from .lowering import Lowered, SiteConflict, lower
from .parameter_words import described_parameters
from .pins import refuse_pins_of_nothing, refuse_unmet_pins
from .plan_model import Plan, PlannedCost, Workload
from .pricing import Cost, Phase, Pricing
from .rules import RULES
from .site_settings import Options
from .solver import solve
from .strategies import is_leaf
from .suitability import refuse_unsuitable
from .trace import Inputs, trace

LARGEST_TP = 1024


def plan(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    tp: int,
    hardware: str | Hardware = "h100-sxm",
    phase: Phase = "prefill",
    context: int = 0,
    sequence_parallel: bool | Literal["auto"] = False,
    replicate: Literal["never", "auto"] = "never",
    memory_gb: float | None = None,
    pin: Mapping[str, str] | None = None,
) -> Plan:
    """The cheapest exact tensor-parallel plan of a model.

    Args:
        model: Any module torch can trace; weights may be on meta and are never read.
        example_inputs: Keyword arguments, or a tuple of positional ones.
        tp: Ranks of the tensor-parallel group.
        hardware: Profile name, path of a profile, or a profile.
        phase: ``prefill``, ``decode`` or ``train``; the mode (train or eval) is the model's own.
        context: Tokens already in the KV cache (decode).
        sequence_parallel: Not available yet.
        replicate: ``never`` splits every weight that can be split; ``auto`` minimises time alone.
        memory_gb: Cap per rank, 1 GB = 1e9 bytes; None: the hardware's.
        pin: fnmatch pattern of a parameter or module path -> ``column``, ``row``, ``vocab`` or ``replicated``.

    Raises:
        UsageError: Wrong arguments, a pin of no parameter, or a dispatched or quantised model.
        TraceError: torch cannot trace the model.
        Infeasible: No plan satisfies the constraints; `MemoryCapError` names the smallest tp that fits;
            `LayoutError` the weight that cannot be placed as it is pinned.
    """
    _check(tp, phase, sequence_parallel, replicate, pin)
    refuse_unsuitable(model)
    refuse_pins_of_nothing(pin or {}, (name for name, _ in model.named_parameters(remove_duplicate=False)))
    profile = hardware if isinstance(hardware, Hardware) else load_hardware(hardware)
    graph = trace(model, example_inputs)
    workload = _workload(phase, example_inputs, context)
    options = Options(replicate=replicate, pin=dict(pin or {}), sequence_parallel=sequence_parallel, editable=can_edit)
    try:
        made = plan_graph(graph, type(model).__name__, tp, profile, workload, options, memory_gb)
    except MemoryCapError as error:
        smallest = _smallest_tp(graph, type(model).__name__, tp, profile, workload, options, memory_gb)
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


def replan(model: nn.Module, example_inputs: Inputs, edited: Plan, hardware: Hardware | None = None) -> Plan:
    """Re-checks and re-prices a plan with its layouts and moves as they are; ``hardware``: the plan's own if None.

    Raises:
        Infeasible: The plan is not exact for this model: some operator would not compute its slice, or a gradient
            would be lost.
    """
    profile = hardware or load_hardware(edited.hardware)
    formulation, solution, lowered = recheck(trace(model, example_inputs), edited, profile)
    (workload,) = edited.workloads
    options = Options(replicate=edited.options["replicate"], pin=edited.options["pin"], editable=can_edit)
    return _plan(formulation, solution, lowered, edited.name, profile, workload, options, edited.options["memory_gb"])


def recheck(graph: Graph, edited: Plan, hardware: Hardware) -> tuple[Formulation, Solution, Lowered]:
    """Solves with every layout and every move fixed to the plan's: feasible means exact, whatever the prices.

    Raises:
        Infeasible: Names the parameters or calls that disagree.
    """
    (workload,) = edited.workloads
    phase: Phase = workload.phase  # type: ignore[assignment]
    pricing = Pricing(hardware, edited.tp, phase, workload.context)
    parameters = {p.edit.fqn: p.edit for p in edited.parameters}
    missing = sorted({n.fqn for n in graph.nodes if n.op == "parameter"} ^ set(parameters))
    if missing:
        raise Infeasible(missing[0], "the plan and the model do not have the same parameters", remedy="Plan again.")
    options = Options(
        replicate=edited.options["replicate"],
        sequence_parallel=edited.options["sequence_parallel"],
        fixed_calls=edited.calls,
        fixed_parameters=parameters,
    )
    try:
        formulation = formulate(graph, pricing, options)
        solution = solve(formulation.problem)
    except Infeasible as error:
        raise Infeasible(
            edited.name,
            "the plan's layouts and moves do not compute this model",
            remedy="Undo the edit, or plan again.",
        ) from error
    lowered = lower(formulation, solution.assignment, workload.name)
    for site in {**edited.calls, **lowered.calls}:
        if _without_randomness(edited.calls.get(site)) != _without_randomness(lowered.calls.get(site)):
            raise Infeasible(
                f"{site.module} ({site.frames[-1]})",
                "the plan's edit of this call is not what its layouts need",
                got=edited.calls.get(site),
                need=lowered.calls.get(site),
                remedy="Plan again.",
            )
    return formulation, solution, lowered


def _without_randomness(edit: CallEdit | None) -> CallEdit | None:
    """An edit but for how it draws: dropout is there in training and gone in evaluation."""
    if edit is not None and edit.operator is not None and edit.operator.name == "rank_random":
        edit = replace(edit, operator=None)
    return None if edit == CallEdit() else edit


def plan_graph(
    graph: Graph, name: str, tp: int, hardware: Hardware, workload: Workload, options: Options, memory_gb: float | None
) -> Plan:
    """Plans a traced graph; see `plan`."""
    phase: Phase = workload.phase  # type: ignore[assignment]
    pricing = Pricing(hardware, tp, phase, workload.context)
    cap = int((memory_gb if memory_gb is not None else hardware.memory_gb) * 1e9) - workspace_bytes(graph, phase)
    options = replace(options, memory_cap=cap)
    of = memory_of(graph, phase, workload.context)
    while True:
        formulation = formulate(graph, pricing, options, lambda node, stored: of(node, stored).total)
        solution = solve(formulation.problem)
        if evaluate(formulation.problem, solution.assignment) != solution.cost:
            raise AssertionError("re-pricing gives another cost than the solver")
        try:
            lowered = lower(formulation, solution.assignment, workload.name)
            break
        except SiteConflict as conflict:
            if not conflict.sites - options.frozen:
                raise
            options = replace(options, frozen=options.frozen | conflict.sites)
    return _plan(formulation, solution, lowered, name, hardware, workload, options, memory_gb)


def _plan(
    formulation: Formulation,
    solution: Solution,
    lowered: Lowered,
    name: str,
    hardware: Hardware,
    workload: Workload,
    options: Options,
    memory_gb: float | None,
) -> Plan:
    graph = formulation.graph
    phase: Phase = workload.phase  # type: ignore[assignment]
    parameters, unsplit = described_parameters(formulation, lowered)
    return Plan(
        name=name,
        tp=formulation.pricing.ranks,
        hardware=hardware.name,
        workloads=(workload,),
        options={"replicate": options.replicate, "pin": dict(options.pin), "memory_gb": memory_gb},
        parameters=parameters,
        ties=dict(graph.ties),
        calls=lowered.calls,
        inputs=tuple(lowered.inputs),
        outputs=tuple(lowered.outputs),
        collectives=tuple(lowered.collectives),
        unsplit=unsplit,
        findings=_findings(formulation, options),
        assumptions=dict(graph.assumptions),
        cost=_cost(formulation, solution, lowered),
        memory_bytes=total_of(graph, lowered.stored, phase, workload.context),
        statistics={
            "variables": len(formulation.domains),
            "factors": len(formulation.problem.factors),
            "nodes": len(graph.nodes),
        },
    )


def _cost(formulation: Formulation, solution: Solution, lowered: Lowered) -> PlannedCost:
    """Seconds of the workload's own passes; the bound is the solver's less the terms that are no time of this
    workload."""
    train = formulation.pricing.phase == "train"

    def own(cost: Cost) -> int:
        return cost.forward_ps + (cost.backward_ps if train else 0)

    gradients = sum(c.ps for c in lowered.collectives if c.category == "parameter_gradient")
    compute, communication = own(lowered.compute), own(lowered.communication) + (gradients if train else 0)
    total = compute + communication
    beside = (
        solution.cost - total
    )  # penalties, tie-breaking share of the backward pass, the line of parameter gradients
    return PlannedCost(
        total * 1e-12,
        compute * 1e-12,
        communication * 1e-12,
        (solution.lower_bound - beside) * 1e-12,
        solution.proven,
        sum(c.ps for c in lowered.collectives if c.direction == "forward") * 1e-12,
        sum(c.ps for c in lowered.collectives if c.direction == "backward") * 1e-12,
    )


def _findings(formulation: Formulation, options: Options) -> tuple[str, ...]:
    graph = formulation.graph
    unknown: dict[str, int] = {}
    for node in graph.nodes:
        values = [node, *(graph.nodes[i] for i in node.operands)]
        floating = any(v.dtype.is_floating_point for v in values)
        if (
            floating
            and not is_leaf(node)
            and node.operands
            and node.op not in RULES
            and node.op.rstrip("_") not in RULES
        ):
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
    return tuple(dict.fromkeys(found))


def _smallest_tp(
    graph: Graph, name: str, tp: int, hardware: Hardware, workload: Workload, options: Options, memory_gb: float | None
) -> int | None:
    for larger in (t for t in (2, 4, 8, 16, 32, 64, 128) if t > tp):
        try:
            plan_graph(graph, name, larger, hardware, workload, options, memory_gb)
        except Infeasible:
            continue
        return larger
    return None


def _check(tp: int, phase: str, sequence_parallel: object, replicate: str, pin: Mapping[str, str] | None) -> None:
    if not isinstance(tp, int) or isinstance(tp, bool) or not 1 <= tp <= LARGEST_TP:
        raise UsageError(
            "tp",
            "not a number of ranks",
            got=tp,
            need=f"1 to {LARGEST_TP}",
            remedy="Pass the size of the tensor-parallel group.",
        )
    if phase not in ("prefill", "decode", "train"):
        raise UsageError("phase", "unknown phase", got=phase, need="prefill, decode or train")
    if sequence_parallel is not False:
        raise UsageError(
            "sequence_parallel",
            "not available yet",
            got=sequence_parallel,
            need="False",
            remedy="See the README's list of what is missing.",
        )
    if replicate not in ("never", "auto"):
        raise UsageError("replicate", "unknown policy", got=replicate, need="never or auto")
    for pattern, word in (pin or {}).items():
        if word not in ("column", "row", "vocab", "replicated"):
            raise UsageError(f"pin {pattern}", "unknown placement", got=word, need="column, row, vocab or replicated")


def _workload(phase: Phase, inputs: Inputs, context: int) -> Workload:
    tensors, values = [], []
    named = dict(enumerate(inputs)) if isinstance(inputs, tuple) else dict(inputs)
    for name, value in named.items():
        if isinstance(value, Tensor):
            tensors.append((str(name), str(value.dtype).removeprefix("torch."), tuple(value.shape)))
        elif isinstance(value, (int, float, str, bool, type(None))):
            values.append((str(name), value))
        elif any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            raise UsageError(
                f"input {name}",
                "nested tensors as one input are not supported",
                got=type(value).__name__,
                need="a tensor",
            )
    return Workload(phase, phase, tuple(tensors), tuple(values), context)


def example_of(workload: Workload) -> Inputs:
    """Inputs of a workload's names, dtypes and shapes; integers are zero."""
    named: dict[str, Any] = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in workload.inputs
    }
    named.update(workload.values)
    if named and all(name.isdigit() for name in named):
        return tuple(named[str(i)] for i in range(len(named)))
    return named
