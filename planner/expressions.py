"""Expressions: which source expression a frame was evaluating, and whether a call there can be replaced."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from colrow.cost_models.errors import ValidationError

from .sites import Frame, Span
from .source_functions import (
    COMPREHENSIONS,
    CodeKey,
    Path,
    function_paths,
    functions_within,
    key_of,
    live_object,
    path_of,
)

Expression = (
    ast.Call | ast.BinOp | ast.UnaryOp | ast.Compare | ast.AugAssign | ast.Subscript | ast.Attribute | ast.Assign
)
_EXPRESSIONS = (ast.Call, ast.BinOp, ast.UnaryOp, ast.Compare, ast.AugAssign, ast.Subscript, ast.Attribute)
_OPAQUE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
COMPARISONS = (ast.Lt, ast.LtE, ast.Eq, ast.NotEq, ast.Gt, ast.GtE)


@dataclass(frozen=True)
class Step:
    """One function of a chain and the expression in it; ``span`` is a `Span` with lines counted from the file's
    start."""

    key: CodeKey
    span: Span


def steps(frames: tuple[Frame, ...]) -> tuple[Step, ...]:
    """The chain as functions with source of their own: comprehensions are part of the function that holds them.

    Raises:
        ValidationError: The chain passes through code that cannot be edited.
    """
    if not frames:
        raise ValidationError("site", "the call was not made by a module's forward")
    chain: list[Step] = []
    for frame in frames:
        line, end_line, *columns = frame.span
        if line < 0:
            raise ValidationError(str(frame), "the code carries no positions (python -X no_debug_ranges?)")
        owner = frame.qualname
        while owner.endswith(COMPREHENSIONS):
            owner = owner.rpartition(".<locals>.")[0]
        around = [i for i, step in enumerate(chain) if step.key[:2] == (frame.file, owner)]
        first = frame.firstlineno
        if owner != frame.qualname:
            if not around:
                raise ValidationError(str(frame), "a comprehension that runs outside the function that holds it")
            first = chain[around[-1]].key[2]
            del chain[around[-1] :]
        elif any(frame.file == s.key[0] and frame.qualname.startswith(f"{s.key[1]}.<locals>.") for s in chain):
            raise ValidationError(str(frame), "a function that is made anew by the forward that calls it")
        absolute = (frame.firstlineno + line, frame.firstlineno + end_line, columns[0], columns[1])
        chain.append(Step((frame.file, owner, first), absolute))
    return tuple(chain)


def expression_at(step: Step, path: Path | None = None) -> tuple[Path, Expression]:
    """The function of ``step`` and the expression at its span.

    Args:
        step: Where to look.
        path: The function, where it is known which one it is.

    Raises:
        ValidationError: No function, or not exactly one expression of a kind that can be replaced.
    """
    paths = function_paths(step.key) if path is None else (path,)
    found = [(path, node) for path in paths for node in _spans(path).get(step.span, ())]
    if len(found) != 1:
        where = f"{step.key[0]}:{step.span[0]}"
        columns = f"at columns {step.span[2]} to {step.span[3]}"
        if found:
            raise ValidationError(where, f"several expressions of {step.key[1]} {columns}")
        implicit = "an implicit operation, such as a truth value, an unpacking, or the reading in x[i] += y?"
        raise ValidationError(
            where, f"no call, operator, subscript or attribute of {step.key[1]} {columns} ({implicit})"
        )
    return found[0]


@lru_cache(maxsize=4096)
def _spans(path: Path) -> dict[Span, list[Expression]]:
    """Every expression a frame of this function can stand at."""
    table: dict[Span, list[Expression]] = {}
    function = path[-1]
    assert isinstance(function, (ast.FunctionDef, ast.Lambda))
    for node in _own_nodes(function.body if isinstance(function.body, list) else [function.body]):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Subscript):
            table.setdefault(_position(node.targets[0]), []).append(node)  # x[i] = y stands at its target
        elif isinstance(node, _EXPRESSIONS) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            for span in _stands_at(node):
                table.setdefault(span, []).append(node)
    return table


def _own_nodes(nodes: list[ast.AST] | list[ast.stmt] | list[ast.expr]) -> Iterator[ast.AST]:
    """The nodes whose code is the function's own (or a comprehension's): no nested functions, no annotations."""
    for node in nodes:
        if isinstance(node, _OPAQUE):
            continue
        yield node
        skipped = node.annotation if isinstance(node, ast.AnnAssign) else None
        yield from _own_nodes([child for child in ast.iter_child_nodes(node) if child is not skipped])


def _position(node: ast.expr | ast.stmt) -> Span:
    assert node.end_lineno is not None and node.end_col_offset is not None
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def _stands_at(node: ast.expr | ast.stmt) -> Iterator[Span]:
    """Positions the compiler gives to the node: a method call over several lines starts at the method's name.

    Source: ``update_start_location_to_match_attr`` in CPython's compile.c.
    """
    yield _position(node)
    attribute = node.func if isinstance(node, ast.Call) else node
    if isinstance(attribute, ast.Attribute) and attribute.lineno != attribute.end_lineno:
        line, start = attribute.end_lineno, (attribute.end_col_offset or 0) - len(attribute.attr)
        _, end_line, _, end = _position(node)
        assert line is not None
        yield line, end_line, start, end


def can_edit(frames: tuple[Frame, ...]) -> str | None:
    """Why a call at this chain cannot be replaced in its source; None where it can."""
    try:
        editable_steps(frames)
    except ValidationError as error:
        return str(error)
    return None


def is_augmented(frames: tuple[Frame, ...]) -> bool:
    """Whether the chain ends at ``x += y``, so that an edit of its result is what ``x`` becomes."""
    return isinstance(_checked(steps(frames)[-1]), ast.AugAssign)


def editable_steps(frames: tuple[Frame, ...]) -> tuple[Step, ...]:
    """The chain as functions with source of their own.

    Raises:
        ValidationError: A call at this chain cannot be replaced.
    """
    chain = steps(frames)
    for step, inner in pairwise(chain):
        check_call(step, _checked(step), inner)
    check_kind(chain[-1], _checked(chain[-1]))
    return chain


@lru_cache(maxsize=65536)
def _checked(step: Step) -> Expression:
    path, node = expression_at(step)
    for function in functions_within(live_object(step.key)):
        if key_of(function.__code__) == step.key:
            path_of(function.__code__)  # raises where the source has changed since
    return node


def check_call(step: Step, node: Expression, inner: Step) -> None:
    """Refuses expressions that lead on to ``inner`` in another way than by calling it.

    Raises:
        ValidationError: An operator, a constructor, a context manager, a builtin that calls back, an autograd function.
    """
    name = inner.key[1].rpartition(".")[2]
    builtin = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and hasattr(builtins, node.func.id)
    applied = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "apply"
    implicit = name.startswith("__") and name.endswith("__") and name != "__call__"
    if not isinstance(node, ast.Call) or implicit or builtin or (applied and name != "apply"):
        wrong = f"{inner.key[1]} is not called by {ast.unparse(node)!r} but on its behalf"
        raise ValidationError(f"{step.key[0]}:{step.span[0]}", wrong)


def check_kind(step: Step, node: Expression) -> None:
    """Refuses expressions that are more than one operation.

    Raises:
        ValidationError: A chained or identity comparison.
    """
    if isinstance(node, ast.Compare) and not (len(node.ops) == 1 and isinstance(node.ops[0], COMPARISONS)):
        raise ValidationError(
            f"{step.key[0]}:{step.span[0]}", f"the comparison {ast.unparse(node)!r} is no single operation"
        )
