"""Dropout in split regions must draw differently on every rank: a plan made in evaluation, where there is none, does
not say where."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from colrow.cost_models.errors import Infeasible, TraceError, ValidationError
from colrow.planner.plan_model import Plan
from colrow.planner.replanning import recheck
from colrow.planner.trace import trace
from colrow.planner.workloads import example_of

from .validation import profile_of


def lacks_draws(dense: nn.Module, plan: Plan) -> bool:
    """Whether training the planned model would draw alike on all ranks where it must not.

    Args:
        dense: A meta copy of the model.
        plan: Its plan.
    """
    if plan.tp == 1 or plan.assumptions.get("mode") != "eval" or not _drops(dense):
        return False
    training = copy.deepcopy(dense).train()
    for schedule in plan.schedules:
        try:
            solved = recheck(trace(training, example_of(schedule.workload)), plan, profile_of(plan), schedule)
        except (Infeasible, TraceError):
            return True
        edits = solved.lowered.edits.calls.values()
        if any(edit.operator is not None and edit.operator.name == "rank_random" for edit in edits):
            return True
    return False


def _drops(model: nn.Module) -> bool:
    """Whether any module, or a configuration it holds, has a dropout rate above zero."""

    def rates(held: Any) -> list[Any]:
        found = vars(held) if hasattr(held, "__dict__") else {}
        return [value for name, value in found.items() if "drop" in name or (name == "p" and "Drop" in _name(held))]

    configs = {id(c): c for m in model.modules() for c in [getattr(m, "config", None)] if c is not None}
    rated = [rate for held in (*model.modules(), *configs.values()) for rate in rates(held)]
    return any(isinstance(rate, (int, float)) and not isinstance(rate, bool) and rate > 0 for rate in rated)


def _name(held: object) -> str:
    return type(held).__name__


class RefuseTraining:
    """Pre-hook of a model that was planned in evaluation and has dropout where it is split."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Evaluation goes on as it is.

        Raises:
            ValidationError: The model is in training.
        """
        if module.training:
            raise ValidationError(
                type(module).__name__,
                "planned in evaluation, it has dropout in split regions, where every rank would draw the same",
                got="a forward in training",
                need="a plan made in training",
                remedy='Plan after model.train() (phase="train"), or call model.eval().',
            )
