"""What a model returns: the gradient that a caller sends back through a value must arrive whole.

Inside a rewritten model a gradient may be a partial sum, on its way to a reduction further up. A caller's gradient of
such a value is whole on every rank, so it may count on one rank only (it is *lifted*). Which values those are is known
from the trace of the form that the forward was called in (`forms`). Where that form could not be traced, gradients
through values that the planned one does not return raise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Never

import torch
from torch import Tensor, nn

from colrow.cost_models.errors import ValidationError
from colrow.planner.plan_model import Plan
from colrow.planner.returned_values import RETURNED, parts_of

from .collectives import apply_move
from .groups import TpGroup
from .schedules import Running
from .split_outputs import changed_at


class ReturnedGradients:
    """Post-hook of the model: a caller's gradient of a value whose gradient is partial counts on one rank."""

    def __init__(self, plan: Plan, group: TpGroup, running: Running) -> None:
        self.plan, self.group, self.running = plan, group, running

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Lifts the gradients of such values, in the containers they are returned in."""
        del module, args
        form = self.running.form
        for path in form.lifted:
            output = changed_at(output, path.split("."), self._lifted)
        unknown = sorted(path for path, _ in differentiable(output) if path not in form.known)
        if unknown and self.plan.schedules[self.running.index].lengths:
            raise _uncovered(unknown, "it may be split along the sequence")
        for path in unknown:
            output = changed_at(output, path.split("."), partial(refusing, path))
        return output

    def _lifted(self, value: Tensor) -> Tensor:
        return apply_move(value, RETURNED, self.group) if value.requires_grad else value

    def __deepcopy__(self, memo: dict[int, Any]) -> ReturnedGradients:
        """Copies of a model share what was found out."""
        return self


def _uncovered(paths: Iterable[str], why: str) -> ValidationError:
    return ValidationError(
        f"output {min(paths, default='')}",
        f"the model did not return it when it was planned, and the plan does not cover it ({why.rstrip('.')})",
        remedy="Plan with example inputs that ask for it.",
    )


def differentiable(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Path and value of every floating-point tensor in nested containers."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield path, tree
    else:
        for key, part in (parts_of(tree) or {}).items():
            yield from differentiable(part, f"{path}.{key}" if path else key)


class _Refusing(torch.autograd.Function):
    """The value itself; a gradient of it raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: str) -> Tensor:
        ctx.path = path
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Never:
        raise _uncovered([ctx.path], "its gradient may be partial")


def refusing(path: str, value: Tensor) -> Tensor:
    if not value.requires_grad:
        return value
    refusing: Tensor = _Refusing.apply(value, path)  # type: ignore[no-untyped-call]
    return refusing
