"""Forms of a forward: which arguments a call gives, which options it sets, in training or not.

A plan is made for one form per workload. A forward called in another form may run other operators: given
``inputs_embeds`` it skips the embedding whose partial sums a planned reduction expects, and reducing what is whole
already would be a silent wrong answer; asked for ``output_hidden_states``, by an argument or by a configuration that
was changed since, it returns values that may be partial sums. So the first call in a form that was not planned is
traced in that form, and the plan's layouts and moves are re-checked on it: they are exact for it too, or the call
raises. Where torch cannot trace the form, a call that brings floating-point tensors of its own raises; another runs
(a KV cache, say, is left out of every trace), but no gradient may pass through values that no trace returned.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.overrides
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from colrow.cost_models.errors import ColrowError, Infeasible, ValidationError
from colrow.planner.edits import ForwardEdits
from colrow.planner.graph import Graph
from colrow.planner.plan_model import Plan, Schedule
from colrow.planner.replanning import recheck
from colrow.planner.trace import Inputs
from colrow.planner.workloads import example_of

from .collectives import all_reduce
from .form_traces import PLAIN, examples, has_floats, traced_on
from .groups import TpGroup
from .live_settings import Change, LiveSettings
from .schedules import Running
from .validation import profile_of

Key = frozenset[tuple[str, Any]]
MAX_NUMBERS = 8
"""Different values of one numeric option that are forms of their own; after that any value is taken as the last."""


@dataclass(frozen=True)
class Form:
    """What is known of a forward in one form.

    Attributes:
        inputs: Floating inputs whose gradient would be partial on each rank.
        known: Paths of all returned values that may be differentiated.
        lifted: Of these, those whose gradient is partial inside.
    """

    inputs: tuple[str, ...]
    known: frozenset[str]
    lifted: tuple[str, ...]


class CheckForm:
    """Pre-hook of the model: lets a call pass whose form was planned, or holds under the plan."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        returned: Sequence[frozenset[str]],
        group: TpGroup,
        running: Running,
        known: dict[tuple[int, Key], Form | ValidationError],
    ) -> None:
        """Args: model: A meta copy of the dense model. returned: By schedule, the paths its forward was traced with.
        known: What was found out by other ranks of this process; filled."""
        self.model, self.plan, self.group, self.running, self.known = model, plan, group, running, known
        parameters = list(inspect.signature(model.forward).parameters.values())
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = [p.name for p in parameters if p.kind in positional]
        self.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self.numbers: dict[str, list[Any]] = {}
        self.forms: list[dict[Key, Form]] = []
        self.floats: set[str] = set()
        self.options: set[tuple[str, Any]] = set()
        self.settings = LiveSettings(model)
        for schedule, paths in zip(plan.schedules, returned, strict=True):
            inputs = example_of(schedule.workload)
            args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), dict(inputs))
            key = self.key(args, kwargs, plan.assumptions.get("mode") == "train")
            edits = schedule.edits
            self.forms.append({key: Form(edits.inputs, paths, edits.outputs)})
            self._note(args, kwargs)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Looks the form up, or finds out about it.

        Raises:
            ValidationError: The plan is not exact for this form.
        """
        forms = self.forms[self.running.index]
        if torch.compiler.is_compiling():  # nothing can be traced here
            self._check_compiled(args, kwargs)
            self.running.form = next(iter(forms.values()))
            return
        key = self.key(args, kwargs, module.training)
        changes = self.settings.changed(module)
        if changes:
            key |= {("configuration", repr(changes))}
        if key not in forms:
            with _no_modes(), torch.autocast("cpu", enabled=False), torch.inference_mode(False):
                device = "cuda" if torch.cuda.is_available() and torch.distributed.get_backend() == "nccl" else "cpu"
                all_reduce(torch.zeros(1, device=device), self.group)  # all ranks are here, and none runs on meanwhile
                forms[key] = self._found(key, args, kwargs, module.training, changes)
            self._note(args, kwargs)
        self.running.form = forms[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckForm:
        """Copies of a model share what was found out."""
        return self

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name; those beyond the parameters by number."""
        positional = {self.names[i] if i < len(self.names) else str(i): value for i, value in enumerate(args)}
        return {**positional, **kwargs}

    def key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> Key:
        """The form of a call: all that is neither a tensor's size nor an option's default."""
        given = self.named(args, kwargs)
        described = {("training", training)}
        for name, value in given.items():
            if self._is_default(name, value):
                continue
            described.add((name, self._described(name, value)))
        return frozenset(described)

    def _described(self, name: str, value: Any) -> Any:
        match value:
            case Tensor():
                return value.is_floating_point(), value.dim()
            case None | bool() | str():
                return value
            case int() | float():
                seen = self.numbers.setdefault(name, [])
                if value not in seen and len(seen) < MAX_NUMBERS:
                    seen.append(value)
                return value if value in seen else seen[-1]
            case Mapping():
                return tuple((key, self._described(f"{name}.{key}", part)) for key, part in value.items())
            case list() | tuple():
                return tuple(self._described(name, part) for part in value)
            case _:
                return type(value).__qualname__

    def _is_default(self, name: str, value: Any) -> bool:
        return value is None or (isinstance(value, PLAIN) and _equal(value, self.defaults.get(name)))

    def _note(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Remembers what a checked call was given, for those under torch.compile."""
        for name, value in self.named(args, kwargs).items():
            if has_floats(value):
                self.floats.add(name)
            if isinstance(value, PLAIN):
                self.options.add((name, value))

    def _check_compiled(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Under torch.compile: a tensor or an option that no checked form had may go another way."""
        for name, value in self.named(args, kwargs).items():
            if isinstance(value, Tensor):
                known = not value.is_floating_point() or name in self.floats
            else:
                known = not isinstance(value, PLAIN) or self._is_default(name, value) or (name, value) in self.options
            if not known:
                raise ValidationError(
                    f"argument {name}",
                    "the model was not planned with it",
                    remedy="Call the model with it once before compiling, or plan with it.",
                )

    def _found(
        self,
        key: Key,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        training: bool,
        changes: tuple[Change, ...],
    ) -> Form:
        index = self.running.index
        with _tracing:
            if (index, key) not in self.known:
                with self.settings.applied(changes):
                    found = self._checked(index, self.named(args, kwargs), training, [name for _, name, _ in changes])
                self.known[index, key] = found
            form = self.known[index, key]
        if isinstance(form, ValidationError):
            raise ValidationError(form.where, form.wrong, remedy=form.remedy)
        return form

    def _checked(
        self, index: int, given: Mapping[str, Any], training: bool, changed: Sequence[str]
    ) -> Form | ValidationError:
        """What is known of a call with the ``given`` arguments and ``changed`` settings, or why it must not run."""
        schedule = self.plan.schedules[index]
        if self.model.training != training:
            self.model.train(training)
        refused, untraced = False, None
        for inputs in self._examples(schedule, given):
            try:
                graph = traced_on(self.model, inputs, schedule.edits.calls)
            except ColrowError as error:
                untraced = error
                continue
            try:
                return _form(graph, self.plan, schedule)
            except Infeasible:
                refused = True
        planned = next(iter(self.forms[index].values()))
        unknown = sorted(name for name, value in given.items() if has_floats(value) and name not in self.floats)
        if refused:
            return self._refusal(given, training, changed, "its moves are not exact there")
        if unknown:
            why = f"it cannot be traced so ({str(untraced).rstrip('.')})" if untraced else "it cannot be traced so"
            return self._refusal({name: given[name] for name in unknown}, training, changed, why)
        return planned

    def _refusal(self, given: Mapping[str, Any], training: bool, changed: Sequence[str], why: str) -> ValidationError:
        planned = {name for form in self.forms[self.running.index] for name, _ in form}
        new = sorted(name for name in given if name not in planned and given[name] is not None)
        new += [f"config.{name} changed" for name in dict.fromkeys(changed)]
        where = f"call with {', '.join(new)}" if new else f"call {'in training' if training else 'in evaluation'}"
        return ValidationError(
            type(self.model).__name__ + f", {where}",
            f"the model was not planned in this form, and {why}",
            remedy="Plan with example inputs that ask for it (as a workload of its own, if both are needed).",
        )

    def _examples(self, schedule: Schedule, given: Mapping[str, Any]) -> Iterator[Inputs]:
        example = example_of(schedule.workload)
        if not any(name not in self.names and name.isdigit() for name, value in given.items() if value is not None):
            yield from examples(self.named(example, {}) if isinstance(example, tuple) else dict(example), given)


@contextmanager
def _no_modes() -> Iterator[None]:
    """The caller's dispatch and function modes do not see a trace."""
    with _disable_current_modes(), ExitStack() as stack:
        for _ in range(torch._C._len_torch_function_stack()):
            stack.enter_context(torch.overrides._pop_mode_temporarily())
        yield


_tracing = threading.Lock()


def _form(graph: Graph, plan: Plan, schedule: Schedule) -> Form:
    """What a traced form returns.

    Raises:
        Infeasible: The plan's moves are not exact for it.
    """
    planned, sites = schedule.edits, {call.site for call in graph.calls}
    reached = replace(planned, calls={site: edit for site, edit in planned.calls.items() if site in sites})
    edits = recheck(graph, plan, profile_of(plan), replace(schedule, edits=reached)).lowered.edits
    if _beside_calls(edits, graph) != _beside_calls(planned, graph):
        raise Infeasible("model", "other values are partial or split then")
    return Form(edits.inputs, frozenset(graph.output_paths), edits.outputs)


def _beside_calls(edits: ForwardEdits, graph: Graph) -> tuple[Any, ...]:
    """What a forward does beside its calls that must not depend on its form, as far as this form gets there."""
    used = {operand for node in graph.nodes for operand in node.operands}
    read = {node.fqn for node in graph.nodes if node.op == "parameter" and node.index in used}
    split = {(path, move) for path, move in edits.split_outputs if path in graph.output_paths}
    return edits.partial & read, edits.lifted & read, split


def _equal(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)
