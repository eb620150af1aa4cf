"""What one stage of `coverage_rows` does with one source, and what it writes down.

Every stage is a function ``(source, row) -> facts``; what goes wrong is raised, and `result_of` gives it its status.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from colrow.cost_models.errors import ColrowError, Infeasible, RankError, SourceError, TraceError, ValidationError
from colrow.planner.configurations import first_line
from colrow.planner.example_inputs import runs
from colrow.planner.plan_model import Plan
from colrow.planner.planning import plan
from colrow.planner.sources import Source, load_source

from .coverage_rows import VERIFIED_TPS, Row, StageResult, Status
from .generation import compare_generation
from .plan_blocks import distinct_blocks
from .random_inputs import call
from .sensitivity import decides_nothing
from .verification import verify

PLANNED_TPS = (2, 4, 8)
SMALL_BATCH, SMALL_SEQ = 2, 16  # two sequences, so that one can be padded
UNCAPPED_GB = 1e6  # a model is planned at every tp, whether or not one GPU could hold its share
SHORTEST_SPLIT = 0.9  # of the matmul bytes, for a row to count as verified
GENERATED_TOKENS = 8
NO_RULE = "operator without a rule, its operands are replicated: "


class Failed(Exception):
    """A stage that ended with a status of its own."""

    def __init__(self, status: Status, reason: str, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.facts = status, reason, dict(facts or {})


def result_of(stage: str, source: str, row: Row) -> StageResult:
    """Run one stage; whatever happens is a result."""
    facts: dict[str, Any] = {}
    try:
        _STAGES[stage](source, row, facts)
        return StageResult(Status.OK, facts=facts)
    except Failed as failed:
        return StageResult(failed.status, failed.reason, facts=facts | failed.facts)
    except Exception as error:
        return StageResult(_status_of(error), _reason_of(error), facts=facts)


def _trace_stage(source: str, row: Row, facts: dict[str, Any]) -> None:
    loaded = _small(source)
    facts["class"] = type(loaded.model).__name__
    try:
        made = plan(loaded.model, loaded.example_inputs, tp=2, phase="train", memory_gb=UNCAPPED_GB)
    except TraceError as error:
        refused = _refused_inputs(loaded)
        raise (Failed(Status.INPUTS, refused) if refused else error) from error
    facts |= _trace_facts(made) | {"2": _split_facts(made)}


def _plan_stage(source: str, row: Row, facts: dict[str, Any]) -> None:
    loaded = load_source(source)
    facts["class"] = type(loaded.model).__name__
    placed: dict[str, str] = {}
    for tp in PLANNED_TPS:
        made = plan(loaded.model, loaded.example_inputs, tp=tp, memory_gb=UNCAPPED_GB)
        words = placements(made)
        if not placed:
            placed = words
            facts |= _trace_facts(made) | {"placements": _by_word(placed)}
        differing = {path: word for path, word in words.items() if word != placed[path]}
        facts[str(tp)] = _plan_facts(made) | ({"placements": _by_word(differing)} if differing else {})


def _verify_stage(source: str, row: Row, facts: dict[str, Any]) -> None:
    loaded = _small(source)
    facts["class"] = type(loaded.model).__name__
    whole = []
    for tp in VERIFIED_TPS:
        made = plan(loaded.model, loaded.example_inputs, tp=tp, phase="train", memory_gb=UNCAPPED_GB)
        found = facts[str(tp)] = _split_facts(made)
        found["differs"] = _differs(placements(made), row, tp)
        report = verify(loaded.build, loaded.example_inputs, made)
        if not report.ok():
            if decides_nothing(loaded.build, loaded.example_inputs, report):
                raise Failed(Status.UNDECIDED, f"tp {tp}: {report.failures()[0]}; so does the dense model, nudged")
            divergence = f" (first divergence: {report.first_divergence})" if report.first_divergence else ""
            raise Failed(Status.WRONG, f"tp {tp}: {report.failures()[0]}{divergence}")
        found["error"] = f"{max(report.forward_max_rel_error, report.gradient_max_rel_error):.0e}"
        found["collectives"] = len(report.collectives_executed)
        if found["splittable"] < SHORTEST_SPLIT:
            whole.append(f"{found['splittable']:.0%} at tp {tp}")
    if whole:
        raise Failed(Status.WHOLE, f"right, but of the bytes that could be split only {', '.join(whole)} were")


def _generate_stage(source: str, row: Row, facts: dict[str, Any]) -> None:
    loaded = _small(source)
    model: Any = loaded.model
    facts["class"] = type(model).__name__
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise Failed(Status.NOT_APPLICABLE, "it has no generate")
    made = plan(model, loaded.example_inputs, tp=2, phase="train", memory_gb=UNCAPPED_GB)
    prompt = {name: value for name, value in dict(loaded.example_inputs).items() if not name.startswith("decoder_")}
    prompt.pop("logits_to_keep", None)
    try:
        report = compare_generation(loaded.build, prompt, made, GENERATED_TOKENS)
    except RankError:
        raise
    except Exception as error:  # the dense model's own generate
        raise Failed(Status.NOT_APPLICABLE, f"the dense model does not generate: {_reason_of(error)}") from error
    facts["tokens"] = report.num_compared
    if not report.ok(1e-5):
        raise Failed(
            Status.WRONG,
            f"{len(report.wrong)} sequences differ, logits by {report.logits_error:.0e}, "
            f"{len(report.unequal_ranks)} ranks differ",
        )


_STAGES: dict[str, Callable[[str, Row, dict[str, Any]], None]] = {
    "trace": _trace_stage,
    "plan": _plan_stage,
    "verify": _verify_stage,
    "generate": _generate_stage,
}


def _small(source: str) -> Source:
    """The small version in float64, or in float32 where the model's code computes in that and mixes no others."""
    small = source.startswith("hf:")
    made = []
    for dtype in ("fp64", "fp32"):
        loaded = load_source(source, phase="train", batch=SMALL_BATCH, seq=SMALL_SEQ, dtype=dtype, small=small)
        loaded.model.eval()  # as verify runs it: layers dropped at random cannot be traced
        if not small or runs(loaded.model, loaded.example_inputs):
            return loaded
        made.append(loaded)
    return made[0]


def _refused_inputs(loaded: Source) -> str:
    """What the dense model says to its example inputs when it simply runs; "" if it takes them."""
    try:
        with torch.no_grad():
            call(loaded.build().eval(), loaded.example_inputs)
    except Exception as error:  # the model's own code
        return _reason_of(error)
    return ""


def placements(made: Plan) -> dict[str, str]:
    """Path pattern -> placement of the weights below it; ``*`` stands for a block's number, and words are joined."""
    words: dict[str, set[str]] = {}
    for parameter in made.parameters:
        if parameter.is_weight:
            words.setdefault(_pattern(parameter.edit.fqn), set()).add(parameter.placement)
    return {path: "/".join(sorted(found)) for path, found in words.items()}


def _pattern(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", path)


def _by_word(placed: Mapping[str, str]) -> dict[str, list[str]]:
    words: dict[str, list[str]] = {}
    for path, word in placed.items():
        words.setdefault(word, []).append(path)
    return {word: sorted(words[word]) for word in sorted(words)}


def _differs(small: Mapping[str, str], row: Row, tp: int) -> list[str]:
    """Where the small plan places weights otherwise than the full one did."""
    full = row.result("plan").facts
    if str(tp) not in full:
        return []
    words = {path: word for word, paths in full["placements"].items() for path in paths}
    words |= {path: word for word, paths in full[str(tp)].get("placements", {}).items() for path in paths}
    return [
        f"{path}: {word}, full {words.get(path, 'none')}" for path, word in small.items() if words.get(path) != word
    ]


def _trace_facts(made: Plan) -> dict[str, Any]:
    facts: dict[str, Any] = {"route": made.assumptions.get("route", "make_fx"), "nodes": made.statistics["nodes"]}
    if "folding" in made.assumptions:
        facts["folding"] = made.assumptions["folding"]
    without = sorted(f.removeprefix(NO_RULE) for f in made.findings if f.startswith(NO_RULE))
    others = sorted(f for f in made.findings if not f.startswith(NO_RULE))
    return facts | ({"no_rule": without} if without else {}) | ({"findings": others} if others else {})


def _split_facts(made: Plan) -> dict[str, Any]:
    """The share of matmul bytes split, and why the rest is whole, largest first: reason -> [bytes, weights, one]."""
    reasons: dict[str, list[Any]] = {}
    for path, size, reason in made.unsplit:
        found = reasons.setdefault(re.sub(r"\d[\d.]*%", "a few %", reason), [0, 0, path])
        found[0] += size
        found[1] += 1
    listed = dict(sorted(reasons.items(), key=lambda item: -item[1][0]))
    impossible = sum(size for _, size, reason in made.unsplit if "no exact split" in reason)
    total = sum(size for _, size, _ in made.unsplit) / max(1e-9, 1 - made.sharded_fraction)
    possible = 1 - impossible / total if made.sharded_fraction < 1 else 1.0
    return {
        "split": round(made.sharded_fraction, 4),
        "splittable": round(min(1.0, made.sharded_fraction / possible), 4) if possible > 0 else 1.0,
        "whole": listed,
    }


def _plan_facts(made: Plan) -> dict[str, Any]:
    blocks = [
        {"over": block.over, "count": traffic.count, **_counted(traffic.collectives)}
        for block in distinct_blocks(made)
        for traffic in block.traffic
    ]
    words: dict[str, int] = {}
    for parameter in made.parameters:
        if parameter.is_weight:
            words[parameter.placement] = words.get(parameter.placement, 0) + 1
    return {
        **_split_facts(made),
        "weights": words,
        "collectives": blocks,
        "proven": made.cost.proven,
    }


def _counted(collectives: Any) -> dict[str, dict[str, int]]:
    """Direction -> kind -> how many, per kind and category."""
    counted: dict[str, Counter[str]] = {}
    for c in collectives:
        name = c.kind if c.category == "block" else f"{c.kind} ({c.category})"
        counted.setdefault(c.direction, Counter())[name] += 1
    return {direction: dict(sorted(found.items())) for direction, found in sorted(counted.items())}


def _status_of(error: BaseException) -> Status:
    cause = error.__cause__ if isinstance(error, RankError) and error.__cause__ is not None else error
    if _is_memory(cause):
        return Status.MEMORY
    match cause:
        case SourceError():
            return _source_status(cause)
        case TraceError():
            return Status.NOT_TRACED
        case ValidationError():
            return Status.REFUSED
        case Infeasible() if not isinstance(error, RankError):
            return Status.NOT_PLANNED
    return Status.NOT_RUNNING if isinstance(error, RankError) else Status.CRASHED


def _source_status(error: SourceError) -> Status:
    if "no model has this configuration" in error.wrong:
        return Status.NO_MODEL
    if "cannot be imported" in error.wrong or isinstance(error.__cause__, ImportError):
        return Status.PACKAGE
    return Status.INPUTS if error.where.startswith("example inputs") else Status.NOT_BUILT


def _is_memory(error: BaseException | None) -> bool:
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def _reason_of(error: BaseException) -> str:
    """One line: colrow's own errors as they are, others with their type."""
    line = first_line(error)[:300]
    return line if isinstance(error, ColrowError) else f"{type(error).__name__}: {line}"
