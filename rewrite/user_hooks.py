"""Hooks that people register inside a rewritten model, and calls of its parts: never on values that are silently not
the dense model's.

What passes in and out of a module may be a partial sum, a slice, or whole with a gradient that is a partial sum; the
plan knows. A hook on a module that passes partial sums is refused, before the rewrite and after it; one on slices,
this rank's columns or heads, warns. Where only gradients are partial, a forward hook may read values, and a loss made
of them counts on one rank; changing them is refused in training, and so are backward hooks. Hooks of torch and
transformers pass: FSDP2's know tensors only, and outputs that transformers records are checked where they are
returned (`forms`).
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from colrow.cost_models.errors import UsageError
from colrow.planner.graph import LEAVES
from colrow.planner.placement import PARTIAL_GRAD, Partial, Replicate
from colrow.planner.returned_values import RETURNED
from colrow.planner.solving import Solved
from colrow.planner.storing import Stored

from .collectives import apply_move
from .groups import TpGroup
from .returned import refusing
from .schedules import Running

Passed = Literal["gradients", "slices", "sums"]
_RANK: tuple[Passed, ...] = ("gradients", "slices", "sums")
_WHAT = {"sums": "partial sums", "slices": "slices", "gradients": "whole values with partial gradients"}
_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = ("torch", "transformers", "colrow")


@dataclass(frozen=True)
class Boundary:
    """How values pass in and out of a module; None for those that are whole, gradient included."""

    taken: frozenset[Passed | None] = frozenset()
    made: frozenset[Passed | None] = frozenset()

    @property
    def worst(self) -> Passed | None:
        """Of all, what is least like the dense model's."""
        return max(((kind for kind in self.taken | self.made if kind)), key=_RANK.index, default=None)

    def __or__(self, other: Boundary) -> Boundary:
        return Boundary(self.taken | other.taken, self.made | other.made)


def passed_values(solved: Solved) -> dict[str, Boundary]:
    """Of every module, how its boundary values pass in this schedule."""
    formulation, graph = solved.formulation, solved.formulation.graph
    taken: dict[str, set[Passed | None]] = {}
    made: dict[str, set[Passed | None]] = {}
    kinds: dict[int, Passed | None] = {}
    for node in graph.nodes:
        for index in node.operands:
            value = graph.nodes[index]
            if value.op in LEAVES or value.module == node.module:
                continue
            if index not in kinds:
                variable = formulation.variable[index]
                kinds[index] = _kind(formulation.domains[variable][solved.solution.assignment[variable]])
            if kinds[index] is None and not value.differentiable:
                continue  # ids, masks, positions
            inside, outside = _around(node.module), _around(value.module)
            for path in inside - outside:
                taken.setdefault(path, set()).add(kinds[index])
            for path in outside - inside:
                made.setdefault(path, set()).add(kinds[index])
    paths = {*taken, *made}
    return {path: Boundary(frozenset(taken.get(path, ())), frozenset(made.get(path, ()))) for path in paths}


def either(one: Mapping[str, Boundary], other: Mapping[str, Boundary]) -> dict[str, Boundary]:
    """Of two schedules together."""
    return {path: one.get(path, Boundary()) | other.get(path, Boundary()) for path in {**one, **other}}


def _kind(stored: Stored) -> Passed | None:
    kinds = [_kind(part) for part in stored] if isinstance(stored, tuple) else []
    if isinstance(stored, tuple):
        return max((kind for kind in kinds if kind is not None), key=_RANK.index, default=None)
    if isinstance(stored, Partial):
        return "sums"
    if isinstance(stored, Replicate):
        return "gradients" if stored == PARTIAL_GRAD else None
    return "slices"


@lru_cache(maxsize=1 << 14)
def _around(path: str) -> frozenset[str]:
    """The module's path and those around it, but for the model itself."""
    parts = path.split(".") if path else []
    return frozenset(".".join(parts[: n + 1]) for n in range(len(parts)))


def refuse_hooks(model: nn.Module, passed: Mapping[str, Boundary]) -> None:
    """Looks at the hooks that are registered already.

    Raises:
        UsageError: One would see partial sums.
    """
    for path, module in model.named_modules():
        for name in _DICTS if path in passed and passed[path].worst else ():
            for hook in getattr(module, name).values():
                _allow(path, name, passed[path], hook)


def guard_hooks(model: nn.Module, passed: Mapping[str, Boundary], group: TpGroup) -> None:
    """Has the modules look at every hook that is registered from now on."""
    for path, module in model.named_modules():
        for name in _DICTS if path in passed and passed[path].worst else ():
            hooks = _Hooks()
            hooks.path, hooks.name, hooks.passed, hooks.group = path, name, passed[path], group
            hooks.update(getattr(module, name))
            setattr(module, name, hooks)


def guard_calls(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    passed: Mapping[str, Boundary],
    running: Running,
    floats: Container[str],
) -> None:
    """Has blocks, and modules around them, refuse calls that do not come through the model where they pass what is
    not whole; modules around them also where given floating-point tensors that are not among ``floats``, the model's
    planned inputs (embeddings skip an operator whose moves the plan relies on)."""
    read, modules = set(blocks), dict(model.named_modules())
    guarded = {path for path, module in modules.items() if path and module in read and _worst(passed, path)}
    around = {"", *(outer for path in guarded for outer in _around(path.rpartition(".")[0]))}
    for path in sorted(guarded | around) if guarded else ():
        entry = _Entry(path, _worst(passed, path), running, floats, path in around)
        modules[path].register_forward_pre_hook(entry.enter, prepend=True, with_kwargs=True)
        if path in around:
            modules[path].register_forward_hook(entry.leave, always_call=True)


def _worst(passed: Mapping[str, Boundary], path: str) -> Passed | None:
    return passed[path].worst if path in passed else None


class _Entry:
    """Hooks of a module that may be called by itself."""

    def __init__(
        self, path: str, passes: Passed | None, running: Running, floats: Container[str], is_around: bool
    ) -> None:
        self.path, self.passes, self.running, self.floats, self.is_around = path, passes, running, floats, is_around

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Lets a call pass that comes through the model, or in a backward that computes it again.

        Raises:
            UsageError: It comes from outside, and values or gradients would not be the dense model's.
        """
        if self.path and not self.running.depth and not torch.compiler.is_compiling():
            computes_again = torch._C._current_graph_task_id() >= 0  # a backward is running
            if not computes_again:
                self._refuse(module, args, kwargs)
        if self.is_around:
            self.running.depth += 1

    def _refuse(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        wrong = ""
        if self.passes and (self.passes != "gradients" or torch.is_grad_enabled()):
            wrong = f"in this plan it passes {_WHAT[self.passes]}"
        elif self.is_around:
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            named = {**given, **given.get("kwargs", {})}
            floating = [name for name, v in named.items() if isinstance(v, Tensor) and v.is_floating_point()]
            unplanned = [name for name in floating if name not in self.floats]
            wrong = f"its input {unplanned[0]} was not planned" if unplanned else ""
        if wrong:
            raise UsageError(
                self.path,
                f"{type(module).__name__} was called by itself, and {wrong}",
                remedy="Call the model, as model(...): model.forward(...) leaves out what the rewrite does around it. "
                "Or plan with this module's own inputs.",
            )

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The forward is over, or broke off."""
        self.running.depth = max(0, self.running.depth - 1)


class _Hooks(OrderedDict[int, Callable[..., Any]]):
    """A module's hooks of one kind."""

    path: str = ""
    name: str = ""
    passed: Boundary = Boundary()
    group: TpGroup

    def __setitem__(self, key: int, hook: Callable[..., Any]) -> None:
        _allow(self.path, self.name, self.passed, hook)
        if self.name.startswith("_forward") and not _is_own(hook):
            last = self.name == "_forward_hooks"
            kinds = self.passed.made if last else self.passed.taken
            if "gradients" in kinds:
                hook = _Reading(self.path, hook, self.group, last, mixed=len(kinds) > 1)
        super().__setitem__(key, hook)


def _is_own(hook: Callable[..., Any]) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    made_in = getattr(hook, "__module__", None) or type(hook).__module__
    return isinstance(hook, _Reading) or made_in.partition(".")[0] in _OWN


def _allow(path: str, name: str, boundary: Boundary, hook: Callable[..., Any]) -> None:
    passed = boundary.worst
    if passed is None or _is_own(hook):
        return
    if passed == "sums" or (passed == "gradients" and name.startswith("_backward")):
        raise UsageError(
            path,
            "a hook here would see neither the dense model's values nor a part of them",
            got=f"{_WHAT[passed]} pass here in this plan",
            need="a module that passes whole values",
            remedy="Hook a module that the reductions lie inside of, or plan with example inputs that return the "
            "value (output_hidden_states=True).",
        )
    if passed == "slices":
        warnings.warn(f"colrow: a hook on {path} sees slices: this rank's part of the values", stacklevel=4)


class _Reading:
    """A hook of a module whose values have partial gradients."""

    def __init__(self, path: str, hook: Callable[..., Any], group: TpGroup, last: bool, mixed: bool) -> None:
        self.path, self.hook, self.group, self.last, self.mixed = path, hook, group, last, mixed

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """The hook on values whose gradient, as the hook's owner makes it, counts on one rank.

        Raises:
            UsageError: It changes them in training.
        """
        if not torch.is_grad_enabled():
            return self.hook(module, *given)
        shown = given[-1] if self.last else given
        lifted = tree_map_only(Tensor, self._lifted, shown)
        made = self.hook(module, *((*given[:-1], lifted) if self.last else lifted))
        if made is not None:
            raise UsageError(
                self.path,
                "a hook changes values whose gradient is a partial sum here",
                remedy="Run it under no_grad, or hook a module around this one.",
            )
        return None

    def _lifted(self, value: Tensor) -> Tensor:
        if self.mixed:  # not known which of them it is
            return refusing(self.path, value)
        return apply_move(value, RETURNED, self.group)
