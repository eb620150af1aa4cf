"""Which of a plan's schedules a forward follows: decided at the model's input from phase and shapes, alike on all
ranks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from colrow.cost_models.errors import UsageError
from colrow.planner.plan_model import Schedule
from colrow.planner.workloads import Length, phase_of

if TYPE_CHECKING:
    from .forms import Form


class Running:
    """The schedule that the running forward follows; shared by a model's edits, hooks and copies.

    Attributes:
        index: Its position in the plan.
        otherwise: Of the schedule for calls that do not come through the model: it takes any shapes.
        form: What is known of the running forward in the form it was called in.
        depth: Of forwards around blocks that are running, the model's own among them.
        several: Whether there are several schedules.
        is_forward: Whether the model's forward is running, and has chosen.
        differentiated: By the last backward: the schedules of the forwards that it reached.
        backward: Which one that was.
    """

    form: Form

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        self.otherwise = next(i for i, schedule in enumerate(schedules) if not schedule.lengths)
        self.index = self.otherwise
        self.depth = 0
        self.several, self.is_forward = len(schedules) > 1, False
        self.differentiated: set[int] = set()
        self.backward = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> Running:
        """Copies of a model share its edited functions, which look here."""
        return self

    def stop(self) -> None:
        """The forward is over."""
        self.index, self.is_forward = self.otherwise, False

    def follow(self) -> int:
        """The schedule for a part that does not run in the model's forward: called by itself, or, under activation
        checkpointing, in a backward that computes it again as the forward has.

        Raises:
            UsageError: The backward differentiates forwards of several schedules, or none that came to its end.
        """
        if torch._C._current_graph_task_id() < 0:
            self.index = self.otherwise  # a backward may have broken off
        else:
            if len(self.differentiated) != 1:
                raise UsageError(
                    "activation checkpointing",
                    "it is not known which schedule of the plan is to be computed again",
                    got=f"a backward of {len(self.differentiated)} schedules",
                    need="one, reached through the model's outputs",
                    remedy="Run a backward of its own for every sequence length, from what the model returns.",
                )
            (self.index,) = self.differentiated
        return self.index

    def remember(self, output: Any) -> None:
        """Have a backward from ``output`` know the schedule that made it."""
        index = self.index

        def reached(gradient: Tensor) -> None:
            if self.backward != torch._C._current_graph_task_id():
                self.backward = torch._C._current_graph_task_id()
                self.differentiated.clear()
                torch.autograd.Variable._execution_engine.queue_callback(self.forget)  # at the end of the backward
            self.differentiated.add(index)

        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(reached)  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """The backward is over."""
        self.differentiated.clear()
        self.stop()


class ChooseSchedule:
    """Pre-hook of the model: picks the schedule for this call's inputs."""

    def __init__(self, model: nn.Module, schedules: Sequence[Schedule], running: Running, ranks: int) -> None:
        self.schedules, self.running, self.ranks = tuple(schedules), running, ranks
        self.names = list(inspect.signature(model.forward).parameters)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Inputs are known by their number and by their name."""
        del module
        given: dict[str, Tensor] = {}
        for number, value in enumerate(args):
            names = [str(number), *self.names[number : number + 1]]
            given.update(dict.fromkeys(names, value) if isinstance(value, Tensor) else {})
        for name, value in kwargs.items():
            numbers = [str(self.names.index(name))] if name in self.names else []
            given.update(dict.fromkeys([name, *numbers], value) if isinstance(value, Tensor) else {})
        self.running.index = chosen(self.schedules, given, torch.is_grad_enabled(), self.ranks)
        self.running.is_forward = True


class Stop:
    """Hook of the model, called after exceptions too: its forward is over."""

    def __init__(self, running: Running) -> None:
        self.running = running

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Calls of parts of the model follow the schedule that takes any shapes."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.running.remember(output)
        self.running.stop()


def chosen(schedules: Sequence[Schedule], given: Mapping[str, Tensor], trains: bool, ranks: int) -> int:
    """Position of the schedule for ``given`` inputs.

    Of the workloads of the phase (all, where there is none) the one whose inputs are nearest in size; if it splits the
    sequence and the lengths do not divide, the one that stands in for it.
    """
    own = [i for i, schedule in enumerate(schedules) if not schedule.stands_in]
    of_phase = [i for i in own if (phase_of(schedules[i].workload.name) == "train") == trains]
    best = min(of_phase or own, key=lambda i: (_distance(schedules[i], given), i))
    return best if _fits(schedules[best].lengths, given, ranks) else best + 1


def _distance(schedule: Schedule, given: Mapping[str, Tensor]) -> float:
    """Of the elements of common inputs, as logarithms; nothing in common is far."""
    common = [(math.prod(shape), given[path]) for path, _, shape in schedule.workload.inputs if path in given]
    if not common:
        return math.inf
    return sum(abs(math.log(max(1, planned) / max(1, value.numel()))) for planned, value in common)


def _fits(lengths: Sequence[Length], given: Mapping[str, Tensor], ranks: int) -> bool:
    """Whether the lengths hold; those of inputs left out (a mask, labels) are told by the others, if there are any."""
    if not lengths:
        return True
    found = [length for length in lengths if length.input in given or length.exactly is not None]
    return bool(found) and all(_holds(length, given.get(length.input), ranks) for length in found)


def _holds(length: Length, value: Tensor | None, ranks: int) -> bool:
    if value is None or value.dim() <= length.dim:
        return False
    found = value.shape[length.dim]
    return found == length.exactly if length.exactly is not None else found % ranks == 0
