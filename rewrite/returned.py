"""What a model returns: the gradient that a caller sends back through a value must arrive whole.

Inside a rewritten model a gradient may be a partial sum, on its way to a reduction further up. A caller's gradient of
such a value is whole on every rank, so it may count on one rank only (it is *lifted*). Which values those are is known
from the plan for what the traced forward returned. A forward that returns more, because it is asked for it at run
time (``output_hidden_states``, ``labels``), is traced in that form when it first happens, and the plan's moves are
re-checked on it: that says what to lift, or that the plan does not cover such a forward, which then raises (the value
may be a partial sum or a slice). Where it cannot be traced in that form, gradients through unplanned values raise.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Never

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from colrow.cost_models.errors import ColrowError, Infeasible, ValidationError
from colrow.planner.edits import ForwardEdits
from colrow.planner.plan_model import Plan
from colrow.planner.replanning import recheck
from colrow.planner.returned_values import RETURNED
from colrow.planner.trace import Inputs, trace
from colrow.planner.workloads import example_of

from .collectives import all_reduce, apply_move
from .groups import TpGroup
from .schedules import Running
from .split_outputs import changed_at
from .validation import profile_of

Paths = frozenset[str]


@dataclass(frozen=True)
class Returned:
    """What one form of the forward returns.

    Attributes:
        known: Paths of all values that may be differentiated.
        lifted: Of these, those whose gradient is partial inside.
    """

    known: Paths
    lifted: tuple[str, ...]


class ReturnedGradients:
    """Post-hook of the model: a caller's gradient of a value whose gradient is partial counts on one rank.

    Attributes:
        forms: By schedule, what the forward returns as it was planned.
        later: What it returns in other forms, as they were met: by schedule and paths. None: not known.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, returned: Sequence[Paths], group: TpGroup, running: Running
    ) -> None:
        """Args: model: A meta copy of the dense model. returned: By schedule, the paths its forward was traced with."""
        self.model, self.plan, self.group, self.running = model, plan, group, running
        schedules = zip(plan.schedules, returned, strict=True)
        self.forms = [Returned(paths, schedule.edits.outputs) for schedule, paths in schedules]
        self.later: dict[tuple[int, Paths], Returned | None] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Lifts the gradients of such values, in the containers they are returned in."""
        del module, args
        index = self.running.index
        values = dict(differentiable(output))
        form: Returned | None = self.forms[index]
        if not values.keys() <= self.forms[index].known:
            form = self._other_form(index, frozenset(values), kwargs)
        for path in (form or self.forms[index]).lifted:
            output = changed_at(output, path.split("."), self._lifted)
        for path in sorted(values.keys() - self.forms[index].known) if form is None else ():
            output = changed_at(output, path.split("."), partial(_refusing, path))
        return output

    def _lifted(self, value: Tensor) -> Tensor:
        return apply_move(value, RETURNED, self.group) if value.requires_grad else value

    def __deepcopy__(self, memo: dict[int, Any]) -> ReturnedGradients:
        """Copies of a model share what was found out."""
        return self

    def _other_form(self, index: int, found: Paths, kwargs: Mapping[str, Any]) -> Returned | None:
        if (index, found) not in self.later:
            if torch.compiler.is_compiling():  # nothing can be traced here
                return None
            with _disable_current_modes(), torch.autocast("cpu", enabled=False):
                device = "cuda" if torch.cuda.is_available() and torch.distributed.get_backend() == "nccl" else "cpu"
                all_reduce(torch.zeros(1, device=device), self.group)  # all ranks are here, and none runs on meanwhile
                self.later[index, found] = form_of(self.model, self.plan, index, self.forms[index].known, found, kwargs)
        if self.later[index, found] is None and self.plan.schedules[index].lengths:
            raise _uncovered(found - self.forms[index].known, "it may be split along the sequence")
        return self.later[index, found]


_tracing = threading.Lock()


def form_of(
    model: nn.Module, plan: Plan, index: int, known: Paths, found: Paths, kwargs: Mapping[str, Any]
) -> Returned | None:
    """What the forward that was called with ``kwargs`` returns; None where it cannot be traced in this form.

    Args:
        model: A meta copy of the dense model.
        plan: The plan.
        index: Of the schedule that ran.
        known: Paths of what it was planned to return.
        found: Paths of what it returned.
        kwargs: As it was called. Positional arguments are taken to be as planned.

    Raises:
        ValidationError: The plan's moves are not exact for this form.
    """
    schedule = plan.schedules[index]
    for inputs in _examples(example_of(schedule.workload), kwargs):
        try:
            with _tracing:
                graph = trace(model, inputs)
        except ColrowError:
            continue
        if not found <= frozenset(graph.output_paths):
            continue
        try:
            edits = recheck(graph, plan, profile_of(plan), schedule).lowered.edits
        except Infeasible as error:
            raise _uncovered(found - known, str(error)) from error
        if _beside_outputs(edits) != _beside_outputs(schedule.edits):
            raise _uncovered(found - known, "other values are partial or split then")
        return Returned(frozenset(graph.output_paths), edits.outputs)
    return None


def _beside_outputs(edits: ForwardEdits) -> tuple[Any, ...]:
    """What a forward does beside its calls that must not depend on what it returns."""
    return edits.partial, edits.lifted, edits.split_outputs


def _uncovered(paths: Iterable[str], why: str) -> ValidationError:
    return ValidationError(
        f"output {min(paths, default='')}",
        f"the model did not return it when it was planned, and the plan does not cover it ({why.rstrip('.')})",
        remedy="Plan with example inputs that ask for it.",
    )


def _examples(planned: Inputs, kwargs: Mapping[str, Any]) -> Iterator[Inputs]:
    """The planned inputs with the call's options; then with its other tensors too, in the planned sizes."""
    if not isinstance(planned, dict):
        return
    options = {name: value for name, value in kwargs.items() if isinstance(value, (bool, int, float, str))}
    options = {name: False if name == "use_cache" else value for name, value in options.items()}
    yield {**planned, **options}
    sizes = {v.shape: planned[k].shape for k, v in kwargs.items() if isinstance(v, Tensor) and k in planned}
    more = {
        name: _stand_in(value, sizes.get(value.shape, value.shape))
        for name, value in kwargs.items()
        if isinstance(value, Tensor) and name not in planned
    }
    if more:
        yield {**planned, **options, **more}


def _stand_in(value: Tensor, shape: torch.Size) -> Tensor | float:
    """A value for tracing; a number, such as the tokens a loss is divided by, is no input whose gradient counts."""
    if value.dim() == 0 and not value.requires_grad:
        return 1.0 if value.is_floating_point() else 1
    return torch.zeros(shape, dtype=value.dtype)


def differentiable(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Path and value of every floating-point tensor in nested mappings, tuples and lists."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield path, tree
    elif isinstance(tree, (Mapping, tuple, list)):
        for key, part in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from differentiable(part, f"{path}.{key}" if path else str(key))


class _Refusing(torch.autograd.Function):
    """The value itself; a gradient of it raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: str) -> Tensor:
        ctx.path = path
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Never:
        raise _uncovered([ctx.path], "its gradient may be partial")


def _refusing(path: str, value: Tensor) -> Tensor:
    if not value.requires_grad:
        return value
    refusing: Tensor = _Refusing.apply(value, path)  # type: ignore[no-untyped-call]
    return refusing
