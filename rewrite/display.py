"""A plan as people read it: blocks, collectives, totals, memory, time, what is not split, findings."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from colrow.cost_models.errors import HardwareError
from colrow.cost_models.hardware import load_hardware
from colrow.planner.layout import Layout
from colrow.planner.path_ranges import Repeat, fold_paths, fold_rows
from colrow.planner.plan_model import Plan, PlannedCost, PlannedParameter, Schedule
from colrow.planner.planned_collectives import Collective
from colrow.planner.workloads import Length

from .comparison import Report
from .gate import Check
from .plan_blocks import DistinctBlock, Traffic, distinct_blocks
from .units import empty_table, nbytes, seconds

DIRECTIONS = ("forward", "backward")


def render(plan: Plan) -> RenderableType:
    """Everything a plan says, for a `rich.console.Console`."""
    parts: list[RenderableType] = [_heading(plan)]
    for block in distinct_blocks(plan):
        parts += ["", *_block(plan, block)]
    for schedule in plan.planned:
        of = f" of {schedule.workload.name}" if len(plan.planned) > 1 else ""
        parts += ["", _title(f"Collectives of one step{of}"), _totals(_shown(plan, schedule.collectives))]
    parts += ["", _title("Memory per rank"), _memory(plan)]
    parts += ["", _title("Not split"), *_unsplit(plan)]
    if plan.findings:
        parts += ["", _title("Findings"), *_findings(plan)]
    return Group(*parts)


def _title(text: str) -> Text:
    return Text(text, style="bold")


def _heading(plan: Plan) -> Text:
    whole = "predicted step" if len(plan.planned) == 1 else "weighted sum of the predicted steps"
    lines = [
        f"{plan.name} on {plan.tp} ranks of {plan.hardware}",
        *(line for n, schedule in enumerate(plan.schedules) for line in _workload(plan, n, schedule)),
        f"  {whole}: {_cost(plan.cost)}",
        f"  {_proof(plan)}",
        f"  {plan.sharded_fraction:.2%} of the matmul, embedding and expert bytes are split",
        f"  digest {plan.digest[:16]}",
    ]
    text = Text("\n".join(lines))
    text.stylize("bold", 0, len(lines[0]))
    return text


def _workload(plan: Plan, n: int, schedule: Schedule) -> Iterator[str]:
    """Its inputs; of several workloads, its weight and cost; whether the sequence is split, and what stands in when."""
    if schedule.stands_in:
        return
    w = schedule.workload
    inputs = [f"{path} {dtype} {list(shape)}" for path, dtype, shape in w.inputs]
    inputs += [f"{path}={value}" for path, value in w.values]
    inputs += [f"{w.context} tokens in the cache"] if w.context else []
    yield f"  {w.name}: {', '.join(inputs)}"
    if len(plan.planned) > 1:
        yield f"    weight {w.weight:g}, predicted step: {_cost(schedule.cost)}"
    indent = "    " if len(plan.planned) > 1 else "  "
    if schedule.lengths:
        stands_in = seconds(plan.schedules[n + 1].cost.total_s)
        where = " and ".join(_asked(length, plan.tp) for length in schedule.lengths)
        yield f"{indent}sequence split where {where}; elsewhere whole: {stands_in} a step"
    elif plan.options.get("sequence_parallel"):
        yield f"{indent}sequence not split"
    if plan.options.get("checkpointing") == "blocks" and w.phase == "train":
        yield f"{indent}blocks checkpointed: computed again in the backward pass"


def _asked(length: Length, ranks: int) -> str:
    """What a schedule asks of an input, as Python would say it."""
    size = f"{length.input}.shape[{length.dim}]"
    return f"{size} % {ranks} == 0" if length.exactly is None else f"{size} == {length.exactly}"


def _cost(cost: PlannedCost) -> str:
    share = f" ({cost.comm_s / cost.total_s:.0%})" if cost.total_s else ""
    compute = f"{seconds(cost.compute_s)} compute"
    compute += f" ({seconds(cost.optimizer_s)} in the optimiser's step)" if cost.optimizer_s else ""
    return f"{seconds(cost.total_s)} = {compute} + {seconds(cost.comm_s)} communication{share}"


def _proof(plan: Plan) -> str:
    cost = plan.cost
    if cost.proven:
        return "proven optimal: no plan in the stated space takes less predicted time"
    gap = cost.total_s / cost.lower_bound_s - 1 if cost.lower_bound_s > 0 else math.inf
    return f"NOT proven optimal: the lower bound is {seconds(cost.lower_bound_s)}, a gap of {gap:.2%}"


# ---- blocks


def _block(plan: Plan, block: DistinctBlock) -> Iterator[RenderableType]:
    many = f"  ({block.count} equal blocks)" if block.count > 1 else ""
    yield _title(f"{block.over}{many}" if block.over else "Outside the blocks")
    if block.parameters:
        yield _weights(plan, block)
    for n, traffic in enumerate(block.traffic):
        if block.parameters or n:
            yield ""
        if len(block.traffic) > 1:
            blocks = "blocks" if traffic.count > 1 else "block"
            yield Text(f"  {blocks} {traffic.over}:", style="italic")
        yield _collectives(plan, traffic, "(itself)" if block.over else "(model)")


def _shown(plan: Plan, collectives: Iterable[Collective]) -> tuple[Collective, ...]:
    """Without the backward passes that a plan for several workloads, training among them, never makes."""
    trains = {w.name for w in plan.workloads if w.phase == "train"}
    return tuple(c for c in collectives if not trains or c.direction == "forward" or c.workload in trains)


def _weights(plan: Plan, block: DistinctBlock) -> Table:
    table = empty_table("parameter", "placement", "shape", "per rank", "")
    for name, parameter in block.parameters:
        note = ", ".join(_notes(plan, parameter))
        table.add_row(name, parameter.placement, _shape(parameter.shape), _shape(parameter.local_shape), note)
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _notes(plan: Plan, parameter: PlannedParameter) -> Iterator[str]:
    edit = parameter.edit
    if edit.fqn in plan.ties:
        yield f"is {plan.ties[edit.fqn]}"
    if edit.layout is not None:
        yield from _layout_notes(edit.layout)
    edits = [schedule.edits for schedule in plan.planned]
    if any(edit.fqn in one.partial for one in edits):
        yield "gradient summed"
    if any(edit.fqn in one.lifted for one in edits):
        yield "added on rank 0"


def _layout_notes(layout: Layout) -> Iterator[str]:
    lengths = [segment.length for segment in layout.segments]
    if 1 < len(lengths) <= 4:
        yield f"each of {' + '.join(map(str, lengths))}"
    elif len(lengths) > 4:
        yield f"each of {len(lengths)} segments"
    if layout.is_replicated:
        yield "shared by ranks"
    if layout.is_padded:
        yield "padded"


def _collectives(plan: Plan, traffic: Traffic, whole: str) -> Table:
    table = empty_table("collective", "bytes", "time", "after", "forced by", numeric=(1, 2))
    several = len(plan.planned) > 1
    for workload, direction in itertools.product(plan.workloads, DIRECTIONS):
        of = f"{workload.name}, " if several else ""
        passes = direction if direction == "forward" or workload.phase == "train" else "backward, if trained"
        rows = [c for c in _shown(plan, traffic.collectives) if (c.workload, c.direction) == (workload.name, direction)]
        if rows:
            table.add_row(Text(f"{of}{passes}", style="dim"))
        for c in rows:
            category = "" if c.category == "block" else f"  [{c.category.replace('_', ' ')}]"
            made = (nbytes(c.nbytes), seconds(c.ps * 1e-12), c.site or whole)
            table.add_row(f"  {c.kind}", *made, f"{c.forced_by}{category}")
    return table


# ---- totals


def _totals(collectives: Sequence[Collective]) -> RenderableType:
    if not collectives:
        return Text("  none")
    table = empty_table("category", "collective", "direction", "count", "bytes", "time", numeric=(3, 4, 5))
    groups: dict[tuple[str, str, str], list[Collective]] = {}
    for c in collectives:
        groups.setdefault((c.category.replace("_", " "), c.kind, c.direction), []).append(c)
    for direction in DIRECTIONS:
        groups.setdefault(("all", "", direction), []).extend(c for c in collectives if c.direction == direction)
    for names, group in groups.items():
        style = "bold" if names[0] == "all" else ""
        total_bytes, total_ps = sum(c.nbytes for c in group), sum(c.ps for c in group)
        table.add_row(*names, str(len(group)), nbytes(total_bytes), seconds(total_ps * 1e-12), style=style)
    return table


def _memory(plan: Plan) -> Table:
    table = empty_table("kind", "bytes", "", numeric=(1,))
    for kind, held in plan.memory_bytes.items():
        if held:
            table.add_row(kind.replace("_", " "), nbytes(held))
    limit = _limit_gb(plan)
    whole = nbytes(sum(plan.memory_bytes.values()))
    table.add_row("all", whole, f"of {limit:g} GB" if limit else "", style="bold")
    return table


def _limit_gb(plan: Plan) -> float | None:
    asked = plan.options.get("memory_gb")
    if asked is not None:
        return float(asked)
    try:
        return load_hardware(plan.hardware).memory_gb
    except HardwareError:  # made with a profile of the user's that is not here
        return None


def _unsplit(plan: Plan) -> Iterator[RenderableType]:
    if not plan.unsplit:
        yield Text("  nothing: every matmul, embedding and expert weight is split")
        return
    table = empty_table("parameter", "bytes", "reason", numeric=(1,))
    for path, (held, reason) in fold_paths({fqn: (held, reason) for fqn, held, reason in plan.unsplit}).items():
        table.add_row(path, nbytes(held), reason)
    yield table


def _findings(plan: Plan) -> Iterator[RenderableType]:
    for item in fold_rows([(text,) for text in plan.findings]):
        if isinstance(item, Repeat):
            yield Text(f"  for {item.over}:")
        for (text,) in item.each if isinstance(item, Repeat) else (item,):
            yield Padding(Text(f"- {text}"), (0, 0, 0, 4 if isinstance(item, Repeat) else 2), expand=False)


# ---- answers of other commands


def checks_table(found: Sequence[Check], direction: str | None) -> Table:
    """Limits with what the plan has and what they ask for."""
    table = empty_table("limit", "got", "need", "", "where", numeric=(1, 2))
    for check in found:
        name = f"--{check.limit}" + (f" ({direction})" if direction and check.limit.startswith("max-") else "")
        need = _number_text(check.need)
        relation = "<= " if check.limit.startswith("max-") else ">= " if check.limit.startswith("min-") else ""
        style = "" if check.ok else "bold red"
        table.add_row(
            name, _number_text(check.got), f"{relation}{need}", "ok" if check.ok else "FAILED", check.where, style=style
        )
    return table


def _number_text(value: float | str) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def report_table(report: Report) -> Group:
    """What `verify` measured."""
    table = empty_table("compared with the dense model", "largest error", numeric=(1,))
    table.add_row("outputs", f"{report.forward_max_rel_error:.1e}")
    table.add_row(f"gradients ({len(report.gradient_errors)})", f"{report.gradient_max_rel_error:.1e}")
    for steps in report.trainings:
        name = f"after {len(steps.losses)} {steps.optimiser} steps"
        table.add_row(f"parameters {name}", f"{max(steps.parameters.values(), default=0.0):.1e}")
        table.add_row(f"loss {name}", f"{max(steps.losses, default=0.0):.1e}")
    counts = empty_table("collective", "direction", "planned", "executed", numeric=(2, 3))
    planned = Counter((kind, direction) for kind, _, direction in report.collectives_planned)
    executed = Counter((kind, direction) for kind, _, direction in report.collectives_executed)
    for kind, direction in sorted(planned | executed):
        counts.add_row(kind, direction, str(planned[kind, direction]), str(executed[kind, direction]))
    notes = [Text(f"note: {note}") for note in report.notes]
    verdict = Text(report.explain(), style="bold" if report.ok() else "bold red")
    return Group(table, "", counts, "", *notes, verdict)
