"""One random module, planned, rewritten, validated and run on simulated ranks against itself undivided.

Outputs on every rank, gradients of parameters and inputs, planned and executed collectives. Gradients are compared
locally, each rank's part with its part of the dense gradient: the whole `verify` with its optimiser steps takes ten
times as long and is run on every tenth module.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import colrow.rewrite.validation as validation
from colrow.cost_models.errors import ColrowError, RankError
from colrow.planner.formulation import Formulation
from colrow.planner.lowering import Lowered
from colrow.planner.moves import Move
from colrow.planner.placement import Replicate
from colrow.planner.plan_model import Plan
from colrow.planner.planning import plan
from colrow.planner.random_weights import randomize
from colrow.planner.rules import RULES
from colrow.planner.strategies import is_leaf
from colrow.rewrite.comparison import FLOAT64_TOLERANCE, SMALL_GRADIENT, error_of
from colrow.rewrite.counting import fixed_loss, recorded_collectives
from colrow.rewrite.parallel import parallelize, spec_of
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.verification import named_tensors, verify


@dataclass
class Outcome:
    """What became of one module.

    Attributes:
        seed: Of the module; -1 for a kept one.
        status: ``right``, ``wrong``, ``refused`` (a `ColrowError`), ``crashed`` (any other error) or ``invalid`` (the
            undivided module does not run, or its values are not finite).
        reason: Of everything but ``right``.
        tp: Ranks.
        split: Share of matmul, embedding and expert bytes that are split.
        weights: Whether the module has such weights at all.
        rules: Rule -> operators it placed with some operand or result not replicated.
        whole: Rule -> operators it placed with everything replicated.
        moves: ``forward/backward`` -> times made.
        verified: The whole `verify` was run.
    """

    seed: int
    status: str
    reason: str = ""
    tp: int = 0
    split: float = 0.0
    weights: bool = True
    rules: dict[str, int] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)
    moves: dict[str, int] = field(default_factory=dict)
    verified: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)


def loaded(path: Path) -> ModuleType:
    """The module file at ``path``, imported: the rewriter reads sources from files."""
    name = f"fuzz_module_{abs(hash(str(path)))}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


class Wrong(Exception):
    """The module split is not the module."""


class Invalid(Exception):
    """The module itself is no fair test."""


def check(path: Path, seed: int = -1, whole_verify: bool = False) -> Outcome:
    """Tries the module in the file ``path``; never raises for what the module does."""
    outcome = Outcome(seed, "right")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check(path, outcome, whole_verify)
    except Invalid as error:
        outcome.status, outcome.reason = "invalid", str(error)
    except Wrong as error:
        outcome.status, outcome.reason = "wrong", str(error)
    except Exception as error:
        # A rank's own error is the cause of what the run raises.
        cause = error.__cause__ if isinstance(error, RankError) and error.__cause__ is not None else error
        outcome.status = "refused" if isinstance(cause, ColrowError) else "crashed"
        outcome.reason = f"{type(cause).__name__}: {cause}"
    return outcome


def _check(path: Path, outcome: Outcome, whole_verify: bool) -> None:
    dense, inputs, training, true = _undivided(path)
    file = sys.modules[type(dense).__module__]
    made = plan(dense.train(training), inputs, tp=file.TP, phase=file.PHASE)
    outcome.tp, outcome.split = made.tp, made.sharded_fraction
    outcome.weights = any(len(p.shape) > 1 for p in made.parameters)
    with _observed(outcome):
        found = run_ranks(_on_rank, made.tp, args=(dense, training, inputs, made))
    for rank, run in enumerate(found):
        _compare(made, rank, run, true)
    # A plan does not know which inputs will want a gradient: their all_reduces come on top.
    wanted = [("all_reduce", g.nbytes, "backward") for g in true.inputs.values() if g is not None]
    planned = sorted([*((c.kind, c.nbytes, c.direction) for c in made.collectives), *wanted])
    for rank, run in enumerate(found):
        if run.collectives != planned:
            missing, extra = Counter(planned) - Counter(run.collectives), Counter(run.collectives) - Counter(planned)
            raise Wrong(f"collectives on rank {rank}: planned only {dict(missing)}, executed only {dict(extra)}")
    if whole_verify:
        outcome.verified = True
        report = verify(lambda: file.build().double(), {k: v.detach() for k, v in inputs.items()}, made)
        if not report.ok():
            raise Wrong(report.explain())


@dataclass
class Run:
    """One forward and backward."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    inputs: dict[str, Tensor | None]
    collectives: list[tuple[str, int, str]]


def _undivided(path: Path) -> tuple[nn.Module, dict[str, Tensor], bool, Run]:
    try:
        file = loaded(path)
        dense = randomize(file.build().double()).eval()
        inputs = file.inputs()
        true = _run(dense, inputs)
    except Exception as error:
        raise Invalid(f"{type(error).__name__}: {error}") from error
    values = [v for v in (*true.outputs.values(), *true.gradients.values()) if v is not None]
    if not all(v.isfinite().all() for v in values if v.is_floating_point()):
        raise Invalid("values that are not finite")
    return dense, inputs, bool(file.TRAINING), true


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> Run:
    own = {name: value.detach().requires_grad_(value.requires_grad) for name, value in inputs.items()}
    with recorded_collectives() as recorder:
        outputs = model(**own)
        loss = fixed_loss(outputs)
        recorder.direction = "backward"
        loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return Run(
        {name: value.detach() for name, value in named_tensors(outputs)},
        gradients,
        {name: value.grad for name, value in own.items() if value.requires_grad},
        sorted((c.kind, c.nbytes, c.direction) for c in recorder.found),
    )


def _on_rank(dense: nn.Module, training: bool, inputs: dict[str, Tensor], made: Plan) -> Run:
    model = copy.deepcopy(dense)
    model.zero_grad()
    local = parallelize(model.train(training), made).eval()
    return _run(local, inputs)


def _compare(made: Plan, rank: int, run: Run, true: Run) -> None:
    for path, value in true.outputs.items():
        _same(f"output {path}", rank, run.outputs.get(path), value, None)
    largest = max((float(g.abs().max()) for g in true.gradients.values() if g is not None and g.numel()), default=0.0)
    specs = {p.edit.fqn: spec_of(p.edit, made.schedules[0].edits) for p in made.parameters}
    for name, gradient in true.gradients.items():
        mine = run.gradients[name]
        if gradient is None or mine is None:
            if gradient is not mine:
                raise Wrong(f"gradient {name} on rank {rank}: None on one side")
            continue
        size = float(gradient.abs().max()) if gradient.numel() else 0.0
        scale = size if size >= SMALL_GRADIENT * largest else largest
        _same(f"gradient {name}", rank, mine, specs[name].block(gradient, rank), scale)
    for name, gradient in true.inputs.items():
        _same(f"gradient of input {name}", rank, run.inputs.get(name), gradient, None)


def _same(what: str, rank: int, mine: Tensor | None, true: Tensor | None, scale: float | None) -> None:
    if mine is None or true is None:
        if mine is not true:
            raise Wrong(f"{what} on rank {rank}: None on one side")
        return
    error = error_of(mine, true, scale)
    if not error <= FLOAT64_TOLERANCE:
        raise Wrong(f"{what} on rank {rank}: error {error:.1e}")


@contextmanager
def _observed(outcome: Outcome) -> Iterator[None]:
    """Counts rules and moves in what validation re-checks: the graph with the placements that are executed."""
    recheck = validation.recheck

    def counted(*arguments: Any) -> Any:
        solved = recheck(*arguments)
        _count(solved.formulation, solved.lowered, outcome)
        return solved

    validation.recheck = counted
    try:
        yield
    finally:
        validation.recheck = recheck


def _count(formulation: Formulation, lowered: Lowered, outcome: Outcome) -> None:
    rules: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    moves: Counter[str] = Counter()
    for node in formulation.graph.nodes:
        if is_leaf(node):
            continue
        choice = lowered.choices[node.index]
        moves.update(_words(m) for m in (*(c.move for c in choice.operands), choice.move) if m is not None)
        rule = node.op if node.op in RULES else node.op.rstrip("_")
        if rule in RULES:
            listed = [*(c.effective for c in choice.operands), choice.made]
            parts = [p for s in listed for p in (s if isinstance(s, tuple) else (s,))]
            (whole if all(isinstance(p, Replicate) for p in parts) else rules)[rule] += 1
    outcome.rules, outcome.whole, outcome.moves = dict(rules), dict(whole), dict(moves)


def _words(move: Move) -> str:
    return f"{move.forward}/{move.backward}"
