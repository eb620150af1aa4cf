"""Plans made before: their layouts and moves, as they are, checked against a model and priced anew."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from colrow.cost_models.errors import Infeasible
from colrow.cost_models.hardware import Hardware, load_hardware

from .edits import CallEdit
from .formulation import formulate
from .graph import Graph
from .lowering import lower
from .plan_model import Plan, Schedule
from .planning import plan_of, schedule_of
from .recomputation import mark_recomputed
from .site_settings import Options
from .solver import solve
from .solving import Solved, pricing_of
from .trace import Inputs, trace
from .workloads import example_of, phase_of


def replan(model: nn.Module, example_inputs: Inputs | None, edited: Plan, hardware: Hardware | None = None) -> Plan:
    """Re-checks and re-prices a plan with its layouts and moves as they are.

    Args:
        model: The plan's model.
        example_inputs: Of its first workload; None: like those it was planned with.
        edited: The plan.
        hardware: The plan's own if None.

    Raises:
        Infeasible: The plan is not exact for this model: some operator would not compute its slice, or a gradient
            would be lost.
    """
    profile = hardware or load_hardware(edited.hardware)
    schedules, solved = [], []
    for n, schedule in enumerate(edited.schedules):
        given = example_inputs is not None and n == 0
        inputs = example_inputs if given and example_inputs is not None else example_of(schedule.workload)
        found = recheck(trace(model, inputs), edited, profile, schedule)
        schedules.append(schedule_of(schedule.workload, found, schedule.lengths, schedule.stands_in))
        if not schedule.stands_in:
            solved.append(found)
    options = Options(
        replicate=edited.options["replicate"],
        sequence_parallel=edited.options["sequence_parallel"],
        outputs=edited.options["outputs"],
        checkpointing=edited.options.get("checkpointing", "none"),
        pin=edited.options["pin"],
    )
    return plan_of(solved, schedules, edited.name, profile, options, edited.options["memory_gb"])


def recheck(graph: Graph, edited: Plan, hardware: Hardware, schedule: Schedule | None = None) -> Solved:
    """Solves with every layout and every move fixed to the plan's: feasible means exact, whatever the prices.

    Args:
        graph: The dense model's trace, on the schedule's inputs.
        edited: The plan.
        hardware: For the prices.
        schedule: The first one if None.

    Raises:
        Infeasible: Names the parameters or calls that disagree.
    """
    schedule = schedule or edited.schedules[0]
    parameters = {p.edit.fqn: p.edit for p in edited.parameters}
    missing = sorted({n.fqn for n in graph.nodes if n.op == "parameter"} ^ set(parameters))
    if missing:
        raise Infeasible(missing[0], "the plan and the model do not have the same parameters", remedy="Plan again.")
    options = Options(
        replicate=edited.options["replicate"],
        sequence_parallel=False if schedule.stands_in else edited.options["sequence_parallel"],
        outputs=edited.options["outputs"],
        checkpointing=edited.options.get("checkpointing", "none"),
        fixed_parameters=parameters,
        fixed_edits=schedule.edits,
    )
    mark_recomputed(graph, options.checkpointing == "blocks" and phase_of(schedule.workload.name) == "train")
    try:
        formulation = formulate(graph, pricing_of(schedule.workload, edited.tp, hardware), options)
        solution = solve(formulation.problem)
    except Infeasible as error:
        raise Infeasible(
            edited.name,
            "the plan's layouts and moves do not compute this model",
            remedy="Undo the edit, or plan again.",
        ) from error
    lowered = lower(formulation, solution.assignment, schedule.workload.name)
    planned, needed = schedule.edits.calls, lowered.edits.calls
    for site in {**planned, **needed}:
        if _without_randomness(planned.get(site)) != _without_randomness(needed.get(site)):
            raise Infeasible(
                f"{site.module} ({site.frames[-1]})",
                "the plan's edit of this call is not what its layouts need",
                got=planned.get(site),
                need=needed.get(site),
                remedy="Plan again.",
            )
    return Solved(formulation, solution, lowered)


def _without_randomness(edit: CallEdit | None) -> CallEdit | None:
    """An edit but for how it draws: dropout is there in training and gone in evaluation."""
    if edit is not None and edit.operator is not None and edit.operator.name == "rank_random":
        edit = replace(edit, operator=None)
    return None if edit == CallEdit() else edit
