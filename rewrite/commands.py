"""What the commands do: from parsed options to an answer on stdout. Everything heavy is imported here."""

from __future__ import annotations

import os
import re
import sys
from typing import Any, Literal

from colrow.cost_models.errors import Infeasible, MemoryCapError, UsageError
from colrow.cost_models.hardware import load_hardware
from colrow.planner.plan_file import read
from colrow.planner.plan_model import Plan
from colrow.planner.planning import LARGEST_TP
from colrow.planner.planning import plan as make_plan
from colrow.planner.replanning import replan
from colrow.planner.sources import DTYPES, Source, load_source
from colrow.planner.workloads import Workload

from . import display
from .answers import check_writable, json_text, progress, written_whole
from .gate import Check, Limits, checks
from .plan_json import checks_json, plan_json
from .units import console

VERIFY_BATCH, VERIFY_SEQ = 2, 16  # two sequences, so that one can be padded


def plan_command(
    source: str,
    tp: int | None,
    phase: Literal["prefill", "decode", "train"],
    batch: int,
    seq: int,
    context: int | None,
    dtype: str,
    hardware: str,
    memory_gb: float | None,
    sequence_parallel: str,
    checkpointing: Literal["none", "blocks"],
    replicate: Literal["never", "auto"],
    pin: dict[str, str],
    out: str | None,
    as_json: bool,
) -> None:
    """``colrow plan``."""
    check_writable(out)
    profile = load_hardware(hardware)
    with progress(f"Building {source}"):
        loaded = load_source(source, phase=phase, batch=batch, seq=seq, context=context, dtype=dtype)
    _log_notes(loaded)

    def at(ranks: int) -> Plan:
        with progress(f"Planning for {ranks} ranks"):
            return make_plan(
                loaded.model,
                loaded.example_inputs,
                tp=ranks,
                hardware=profile,
                phase=phase,
                context=loaded.context,
                sequence_parallel=_SEQUENCE_PARALLEL[sequence_parallel],
                checkpointing=checkpointing,
                replicate=replicate,
                memory_gb=memory_gb,
                pin=pin,
            )

    if tp is not None:
        _answer(at(tp), out, as_json)
        return
    made = _smallest(at)
    cap = memory_gb if memory_gb is not None else profile.memory_gb
    print(f"smallest tp that fits {cap:g} GB per rank: {made.tp}", file=sys.stderr if as_json else sys.stdout)
    _answer(made, out, as_json)


_SEQUENCE_PARALLEL: dict[str, bool | Literal["auto"]] = {"off": False, "on": True, "auto": "auto"}


def _smallest(at: Any) -> Plan:
    """The plan of the smallest power of two that fits the memory; the refusal at one rank names it."""
    tp = 1
    while True:
        try:
            made: Plan = at(tp)
            return made
        except MemoryCapError as error:
            named = re.fullmatch(r"tp >= (\d+)", str(error.need))
            if named is None or int(named[1]) <= tp or int(named[1]) > LARGEST_TP:
                raise
            tp = int(named[1])


def replan_command(source: str, edited: str, hardware: str | None, out: str | None, as_json: bool) -> None:
    """``colrow plan SOURCE --from FILE``; ``hardware`` None: what the plan was made for, by its name."""
    check_writable(out)
    profile = load_hardware(hardware) if hardware is not None else None
    plan = read(edited, verify_digest=False)
    with progress(f"Building {source}"):
        loaded = _source_of(source, plan)
    with progress("Checking and pricing the edited plan"):
        replanned = replan(loaded.model, loaded.example_inputs, plan, profile)
    _answer(replanned, out, as_json)


def show_command(plan_file: str, as_json: bool) -> None:
    """``colrow show``."""
    _print(read(plan_file), as_json)


def check_command(plan_file: str, limits: dict[str, Any], as_json: bool) -> None:
    """``colrow check``.

    Raises:
        Infeasible: A limit is exceeded.
    """
    plan = read(plan_file)
    found = checks(plan, Limits(**limits))
    if as_json:
        print(json_text(checks_json(plan, found)))
    elif found:
        console(sys.stdout).print(display.checks_table(found, limits["direction"]))
    else:
        print("no limits given; the file is a plan, whole and unedited")
    wrong = [check for check in found if not check.ok]
    if wrong:
        raise _exceeded(plan_file, wrong)


def _exceeded(plan_file: str, wrong: list[Check]) -> Infeasible:
    first = wrong[0]
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return Infeasible(
        f"{plan_file}: --{first.limit}",
        f"not met{f' by {first.where}' if first.where else ''}{more}",
        got=first.got,
        need=first.need,
        remedy="colrow show says what forces each collective.",
    )


def verify_command(
    source: str, tp: int | None, plan_file: str | None, small: bool, ranks: Literal["simulated", "gloo"], as_json: bool
) -> None:
    """``colrow verify``.

    Raises:
        Infeasible: The rewritten model is not right.
    """
    from .verification import verify

    plan = _plan_given(plan_file, tp)
    with progress(f"Building {source}"):
        if plan is not None:
            loaded = _source_of(source, plan, dtype="fp64", small=small)
        else:
            loaded = load_source(source, phase="train", batch=VERIFY_BATCH, seq=VERIFY_SEQ, dtype="fp64", small=small)
    _log_notes(loaded)
    if plan is None:
        assert tp is not None
        with progress(f"Planning for {tp} ranks"):
            plan = make_plan(loaded.model, loaded.example_inputs, tp=tp, phase="train")
    with progress(f"Running {plan.tp} {ranks} ranks against the dense model"):
        report = verify(loaded.build, loaded.example_inputs, plan, ranks=ranks)
    if as_json:
        print(json_text(report.as_dict()))
    else:
        console(sys.stdout).print(display.report_table(report))
    if not report.ok():
        raise Infeasible(
            f"verify {source}", "the rewritten model is not the dense one", remedy=report.explain().partition("\n")[2]
        )


def run_command(
    source: str, tp: int | None, plan_file: str | None, prompt_ids: list[int] | None, tokens: int | None
) -> None:
    """``colrow run``."""
    from .running import run

    plan = _plan_given(plan_file, tp, told="WORLD_SIZE" in os.environ)
    run(source, tp=plan.tp if plan else tp, plan=plan, prompt_ids=prompt_ids, tokens=tokens)


def _plan_given(plan_file: str | None, tp: int | None, told: bool = False) -> Plan | None:
    """The plan of ``--plan``; None without. ``told``: torchrun says how many ranks there are.

    Raises:
        UsageError: Neither a plan nor ``--tp``, or a plan for another number of ranks.
    """
    plan = read(plan_file) if plan_file is not None else None
    if plan is None and tp is None and not told:
        raise UsageError("--tp", "missing", need="a number of ranks, or --plan FILE")
    if plan is not None and tp not in (None, plan.tp):
        raise UsageError("--tp", f"{plan_file} was made for another number of ranks", got=tp, need=plan.tp)
    return plan


def _source_of(source: str, plan: Plan, dtype: str | None = None, small: bool = False) -> Source:
    """The source with inputs like those the plan was made for.

    Raises:
        UsageError: It takes other inputs.
    """
    workload = plan.workloads[0]
    batch, seq = _batch_and_seq(workload)
    loaded = load_source(
        source,
        phase=workload.phase,  # type: ignore[arg-type]
        batch=batch,
        seq=workload.context if workload.phase == "decode" else seq,
        context=workload.context,
        dtype=dtype or _dtype_of(plan),
        labels=any(path == "labels" for path, _, _ in workload.inputs),
        small=small,
    )
    inputs = loaded.example_inputs
    named = inputs.items() if isinstance(inputs, dict) else enumerate(inputs)
    shapes = {str(name): tuple(value.shape) for name, value in named if hasattr(value, "shape")}
    planned = {path: shape for path, _, shape in workload.inputs}
    if shapes != planned:
        name = min(name for name in {**shapes, **planned} if shapes.get(name) != planned.get(name))
        raise UsageError(
            f"{source}: input {name}",
            "not what the plan was made for",
            got=shapes.get(name),
            need=planned.get(name),
            remedy="Give the source the plan was made from.",
        )
    return loaded


def _batch_and_seq(workload: Workload) -> tuple[int, int]:
    """Of the first input that looks like token ids, else of the first input."""
    ids = [shape for _, dtype, shape in workload.inputs if len(shape) == 2 and dtype.startswith("int")]
    if ids:
        return ids[0][0], ids[0][1]
    shaped = [shape for _, _, shape in workload.inputs if shape]
    return shaped[0][0] if shaped else 1, VERIFY_SEQ


def _dtype_of(plan: Plan) -> str:
    """The ``--dtype`` that most of the plan's weights have."""
    names = [p.dtype for p in plan.parameters if p.is_weight] or [p.dtype for p in plan.parameters] or ["bfloat16"]
    most = max(sorted(set(names)), key=names.count)
    return next((name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{most}"), "bf16")


def _answer(plan: Plan, out: str | None, as_json: bool) -> None:
    if out is not None:
        with written_whole(out) as path:
            plan.save(path)
        print(f"plan written to {out}", file=sys.stderr)
    _print(plan, as_json)


def _print(plan: Plan, as_json: bool) -> None:
    if as_json:
        print(json_text(plan_json(plan)))
    else:
        console(sys.stdout).print(display.render(plan))


def _log_notes(source: Source) -> None:
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
