"""Clones: functions rebuilt with edited code and new closure cells, and calls redirected to them.

A chain of frames becomes a tree of bodies: the module's forward, the functions it calls at some span, and so on down
to the replaced expressions. At a span that leads on, the call itself goes through a redirection, which calls the
edited clone of the function that was recorded there and refuses any other.
"""

from __future__ import annotations

import ast
import builtins
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from colrow.cost_models.errors import ValidationError
from colrow.planner.expressions import editable_steps
from colrow.planner.sites import Frame, Span
from colrow.planner.source_functions import CodeKey, cell_contents, functions_within, key_of, live_object, mangled
from colrow.planner.written_out import WRITTEN_OUT

from .source_edits import NAMES, callee_expression, edited_code, inherited_method

Replacement = Callable[..., Any]
Callee = Callable[..., Any]


@dataclass
class Body:
    """One function on the way to replaced expressions, all spans in absolute lines."""

    key: CodeKey
    sites: dict[Span, Replacement] = field(default_factory=dict)
    calls: dict[Span, dict[CodeKey, Body]] = field(default_factory=dict)


def bodies_of(edits: Mapping[tuple[Frame, ...], Replacement]) -> list[Body]:
    """The trees that ``edits`` form, one per outermost function.

    Raises:
        ValidationError: A chain cannot be edited, or two of them ask for different things at one expression.
    """
    roots: dict[CodeKey, Body] = {}
    for frames, replacement in edits.items():
        *callers, last = editable_steps(frames)
        level = roots
        for step in callers:
            body = level.setdefault(step.key, Body(step.key))
            level = body.calls.setdefault(step.span, {})
        body = level.setdefault(last.key, Body(last.key))
        if body.sites.setdefault(last.span, replacement) is not replacement:
            raise ValidationError(str(frames[-1]), "two different replacements at one expression")
    for body in roots.values():
        _check(body)
    return list(roots.values())


def _check(body: Body) -> None:
    for span in body.sites.keys() & body.calls.keys():
        where = f"{body.key[0]}:{span[0]}"
        raise ValidationError(where, f"a call in {body.key[1]} is to be replaced, and so is one made inside it")
    for children in body.calls.values():
        for child in children.values():
            _check(child)


Found = tuple[Callee | None, tuple["Found", ...]]


def found_callees(body: Body, callee: Callee | None, receiver: object = None) -> Found:
    """The functions the tree's calls lead to, as far as they can be known without running it: itself, then per span
    and key.

    Args:
        body: The function that ``callee`` is, or wraps.
        callee: None where it is known only when it is called.
        receiver: Its first argument, where that is known.
    """
    function = next((f for f in functions_within(callee) if key_of(f.__code__) == body.key), None)
    children = []
    for span in sorted(body.calls):
        expression = callee_expression(function.__code__, span) if function is not None else None
        value = _value(expression, function, receiver) if expression is not None and function is not None else None
        for key, child in sorted(body.calls[span].items()):
            # A decorator hands its first argument on; should it not, the call meets another callee and asks `late`.
            inner, owner = (value.__func__, value.__self__) if isinstance(value, MethodType) else (value, receiver)
            if not any(key_of(f.__code__) == key for f in functions_within(inner)):
                inner, owner = live_object(key), None
            while isinstance(inner, (staticmethod, classmethod, functools.partial)):
                inner = inner.func if isinstance(inner, functools.partial) else inner.__func__
            known = inner if isinstance(inner, FunctionType) else None
            children.append(found_callees(child, known, owner))
    return callee, tuple(children)


def _value(expression: ast.expr, function: FunctionType, receiver: object) -> Any:
    """What a callee expression means before the function runs; None for local variables and anything computed."""
    code = function.__code__
    match expression:
        case ast.Name(name):
            if code.co_argcount and name == code.co_varnames[0]:
                return receiver
            if name in code.co_freevars:
                return cell_contents(function).get(name)
            if name in code.co_varnames or name in code.co_cellvars:
                return None
            return function.__globals__.get(name, getattr(builtins, name, None))
        case ast.Attribute(_, attribute) if inherited_method(expression):
            cls = cell_contents(function).get("__class__")
            if not isinstance(cls, type):
                return None
            bound = receiver if isinstance(receiver, cls) else cls
            return getattr(super(cls, bound), attribute, None)
        case ast.Attribute(value, attribute):
            held = _value(value, function, receiver)
            owner = code.co_qualname.split(".")[-2:][0]
            return getattr(held, mangled(attribute, owner), None) if held is not None else None
        case _:
            return None


def instead(body: Body, callee: Callee, found: tuple[Found, ...], sources: list[str]) -> Callee | None:
    """``callee`` with the function of ``body`` inside it edited; None where that function is not inside it.

    Args:
        body: The function to edit and what to put at its spans.
        callee: That function, or closures around it (decorators), which are then cloned with the cell that leads to
            it exchanged. found: What `found_callees` knew of its calls. sources: Receives the source of every edited
            function.
    """
    if not isinstance(callee, FunctionType):
        return None
    if key_of(callee.__code__) == body.key:
        return _edited(body, callee, found, sources)
    for name, content in cell_contents(callee).items():
        if any(key_of(f.__code__) == body.key for f in functions_within(content)) and isinstance(content, FunctionType):
            inner = instead(body, content, found, sources)
            return _clone(callee, callee.__code__, {name: inner})
    return None


def _edited(body: Body, function: FunctionType, found: tuple[Found, ...], sources: list[str]) -> FunctionType:
    code = function.__code__
    edited = edited_code(code, function.__globals__, tuple(sorted(body.sites)), tuple(sorted(body.calls)))
    values: dict[str, Any] = dict(NAMES)
    notes = [f"# {body.key[1]}, {body.key[0]}:{body.key[2]}"]
    inner: list[str] = []
    remaining = list(found)
    for span, name in sorted(edited.names.items()):
        if span in body.sites:
            values[name] = body.sites[span]
            notes.append(f"# {name}: {body.sites[span]!r}")
        else:
            children = [body.calls[span][key] for key in sorted(body.calls[span])]
            knowledge = [remaining.pop(0) for _ in children]
            where = f"{body.key[0]}:{span[0]}"
            known = _clones(children, knowledge, inner)
            values[name] = (
                _inherited(where, known) if name in edited.inherited else _redirection(where, children, known)
            )
            notes.append(f"# {name}: calls the edited {' or '.join(child.key[1] for child in children)}")
    sources.append("\n".join([*notes, edited.source]))
    sources.extend(inner)
    # A code object of its own: torch.compile keeps its cache there, and clones with other cells would crowd each
    # other out of it.
    return _clone(function, edited.code.replace(), values)


def _clone(function: FunctionType, code: CodeType, values: Mapping[str, Any]) -> FunctionType:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    closure = tuple(CellType(values[name]) if name in values else cells[name] for name in code.co_freevars)
    clone = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    clone.__kwdefaults__ = dict(function.__kwdefaults__) if function.__kwdefaults__ else None
    clone.__dict__.update(function.__dict__)
    for name in ("__annotations__", "__doc__", "__module__", "__qualname__", "__type_params__"):
        if hasattr(function, name):
            setattr(clone, name, getattr(function, name))
    return clone


def _clones(bodies: list[Body], found: list[Found], sources: list[str]) -> list[tuple[Callee, Callee]]:
    """The callees that are known before the call, each with its edited clone."""
    known: list[tuple[Callee, Callee]] = []
    for body, (callee, children) in zip(bodies, found, strict=True):
        clone = instead(body, callee, children, sources) if callee is not None else None
        if callee is not None and clone is not None:
            known.append((callee, clone))
    return known


def _inherited(where: str, known: list[tuple[Callee, Callee]]) -> Callee:
    """What ``super().name`` leads to is settled by the class; torch.compile could not compare it at the call."""
    if len(known) != 1:
        raise ValidationError(where, "a call through super() leads to none or several of the recorded functions")
    return known[0][1]


def _redirection(where: str, bodies: list[Body], known: list[tuple[Callee, Callee]]) -> Callee:
    """Calls the edited clone of the callee it is given."""
    known += [(function, clone) for callee, clone in known for function, form in WRITTEN_OUT.items() if form is callee]

    def redirected(callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(callee, MethodType):
            callee, args = callee.__func__, (callee.__self__, *args)
        for original, clone in known:
            if callee is original:
                return clone(*args, **kwargs)
        if isinstance(callee, functools.partial):
            return redirected(callee.func, *callee.args, *args, **{**callee.keywords, **kwargs})
        if not isinstance(callee, FunctionType) and isinstance(type(callee).__call__, FunctionType):
            return redirected(type(callee).__call__, callee, *args, **kwargs)
        return late(callee)(*args, **kwargs)

    def late(callee: Any) -> Callee:
        """A callee that only the running program knew: a closure held by a local variable."""
        for body in bodies:
            clone = instead(body, callee, found_callees(body, callee)[1], [])
            if clone is not None:
                known.append((callee, clone))
                return clone
        raise ValidationError(
            where,
            "calls another function than when the model was traced",
            got=getattr(callee, "__qualname__", repr(callee)),
            need=" or ".join(body.key[1] for body in bodies),
            remedy="Plan again with the model as it is now (its attention implementation, for instance).",
        )

    return redirected
