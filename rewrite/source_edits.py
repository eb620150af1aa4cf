"""Edits of source: call expressions of one function replaced, the way a person would write it, and compiled.

    F.linear(x, self.weight)   ->  __colrow_0__(F.linear, x, self.weight)
    x.view(a, b)               ->  __colrow_0__(*__callee__(x, 'view'), a, b)        (Tensor.view, x) or (x.view,)
    a + b                      ->  __colrow_0__(__operator__.add, a, b)
    x += y                     ->  x = __colrow_0__(__operator__.iadd, x, y)
    x[..., :n]                 ->  __colrow_0__(__operator__.getitem, x, (..., __slice__(None, n, None)))
    x[i] = y                   ->  __colrow_value__ = y; __colrow_0__(__setitem__, x, i, __colrow_value__)
    x.mT                       ->  __colrow_0__(__operator__.attrgetter('mT'), x)
    super().forward(x)         ->  __colrow_0__(self, x)                             only on the way to a site

Operands keep their order and are evaluated once. The new names are free variables, filled through the closure
(`clones`), because that is what lets two models of one class differ, and what torch.compile can look through.
"""

from __future__ import annotations

import ast
import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, ModuleType
from typing import Any, cast

import torch

from colrow.planner.expressions import Expression, Step, check_kind, expression_at
from colrow.planner.sites import Span
from colrow.planner.source_functions import Function, Path, compiled, key_of, path_of


def _callee(receiver: Any, name: str) -> tuple[Any, ...]:
    """What ``receiver.name(...)`` calls, and on what: a tensor's method takes the tensor as first argument."""
    # The class's own function, not type(receiver)'s: torch.compile does not know nn.Buffer's methods.
    if isinstance(receiver, torch.Tensor) and hasattr(torch.Tensor, name):
        return getattr(torch.Tensor, name), receiver
    return (getattr(receiver, name),)


def _setitem(container: Any, index: Any, value: Any) -> None:
    """`operator.setitem` in a form that torch.compile knows."""
    container[index] = value


NAMES: dict[str, Any] = {
    "__operator__": operator,
    "__slice__": slice,
    "__callee__": _callee,
    "__setitem__": _setitem,
}


@dataclass(frozen=True)
class EditedCode:
    """A function's code after its edits.

    Attributes:
        code: Takes ``names`` as free variables beside those the function had.
        names: Per edited span, the free variable that is called there.
        inherited: Those of the names that stand for a method reached through ``super()``.
        source: The function's source after the edits, without its context.
    """

    code: CodeType
    names: Mapping[Span, str]
    inherited: frozenset[str]
    source: str


def edited_code(
    code: CodeType, file_globals: Mapping[str, Any], sites: tuple[Span, ...], calls: tuple[Span, ...]
) -> EditedCode:
    """Replaces expressions of ``code``; spans count lines from the file's start.

    Args:
        code: The function as it was imported.
        file_globals: Its globals; they tell a module's function from a tensor's method.
        sites: Expressions to replace.
        calls: Calls to redirect: the callee is handed over as it is, bound or not.

    Raises:
        ValidationError: The source is not the code's, or has no such expression.
    """
    names = frozenset(name for name in code.co_names if isinstance(file_globals.get(name), (ModuleType, type)))
    return _edited(path_of(code), code.co_filename, code.co_qualname, code.co_firstlineno, sites, calls, names)


@lru_cache(maxsize=4096)
def _edited(
    path: Path,
    file: str,
    qualname: str,
    line: int,
    sites: tuple[Span, ...],
    calls: tuple[Span, ...],
    namespaces: frozenset[str],
) -> EditedCode:
    key = (file, qualname, line)
    names = {span: f"__colrow_{index}__" for index, span in enumerate(sorted(sites + calls))}
    targets: dict[int, str] = {}
    inherited = set()
    for span, name in names.items():
        step = Step(key, span)
        _, node = expression_at(step, path)
        check_kind(step, node)
        targets[id(node)] = name
        if isinstance(node, ast.Call) and inherited_method(node.func):
            inherited.add(name)
    memo: dict[int, Any] = {}
    function = cast(Function, copy.deepcopy(path[-1], memo))
    receiver = next((argument.arg for argument in (*function.args.posonlyargs, *function.args.args)), "")
    redirected = frozenset(names[span] for span in calls)
    edits = _Edits({id(memo[node]): name for node, name in targets.items()}, redirected, namespaces, receiver)
    changed = edits.generic_visit(function)
    edited = compiled(key, path, changed, (*NAMES, *names.values()))
    return EditedCode(edited, names, frozenset(inherited), ast.unparse(changed))


def callee_expression(code: CodeType, span: Span) -> ast.expr | None:
    """The expression that is called at ``span``; None where it is no call."""
    _, node = expression_at(Step(key_of(code), span), path_of(code))
    return node.func if isinstance(node, ast.Call) else None


def inherited_method(function: ast.expr) -> str | None:
    """The name in ``super().name``."""
    match function:
        case ast.Attribute(ast.Call(ast.Name("super"), [], []), name):
            return name
    return None


FUSED_PATH = "torch.backends.mha.get_fastpath_enabled"
"""What torch's own layers ask before they hand all their weights to one kernel for inference: an edited forward works
on its part of them, and never does."""


class _Edits(ast.NodeTransformer):
    """Replaces the nodes named in ``targets`` (id -> free variable), inner ones first."""

    def __init__(
        self, targets: Mapping[int, str], redirected: frozenset[str], namespaces: frozenset[str], receiver: str
    ) -> None:
        self.targets, self.redirected, self.namespaces, self.receiver = targets, redirected, namespaces, receiver

    def generic_visit(self, node: ast.AST) -> Any:
        name = self.targets.get(id(node))
        super().generic_visit(node)
        if name is None:
            is_asked = isinstance(node, ast.Call) and ast.unparse(node.func) == FUSED_PATH
            return ast.copy_location(ast.Constant(False), node) if is_asked else node
        edited = self._replaced(cast(Expression, node), name)
        for new in edited if isinstance(edited, list) else [edited]:
            ast.fix_missing_locations(ast.copy_location(new, node))
        return edited

    def _replaced(self, node: Expression, site: str) -> ast.expr | list[ast.stmt]:
        match node:
            case ast.Call(function, arguments, keywords):
                return ast.Call(_name(site), [*self._function(site, function), *arguments], keywords)
            case ast.BinOp(left, op, right):
                return _site(site, _operator(op), left, right)
            case ast.UnaryOp(op, operand):
                return _site(site, _operator(op), operand)
            case ast.Compare(left, [op], [right]):
                return _site(site, _operator(op), left, right)
            case ast.Subscript(value, index):
                return _site(site, _operator("getitem"), value, _index(index))
            case ast.Attribute(value, attribute):
                getter = ast.Call(_operator("attrgetter"), [ast.Constant(attribute)], [])
                return _site(site, getter, value)
            case ast.AugAssign(target, op, value):
                return _augmented(target, lambda load: _site(site, _operator(op, "i"), load, value))
            case ast.Assign([ast.Subscript(value, index)], assigned):
                kept = "__colrow_value__"
                call = _site(site, _name("__setitem__"), value, _index(index), _name(kept))
                return [_assign(_name(kept, ast.Store()), assigned), ast.Expr(call), _deleted(kept)]
        raise AssertionError(f"no edit of {ast.dump(node)}")

    def _function(self, site: str, function: ast.expr) -> list[ast.expr]:
        """First arguments of the site: the function, and a tensor method's receiver."""
        if inherited_method(function):
            return [_name(self.receiver)]
        if (
            site in self.redirected
            or not isinstance(function, ast.Attribute)
            or (function.attr.startswith("__") and not function.attr.endswith("__"))
        ):
            return [function]
        root: ast.expr = function
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and root.id in self.namespaces:
            return [function]
        bound = ast.Call(_name("__callee__"), [function.value, ast.Constant(function.attr)], [])
        return [ast.Starred(bound, ast.Load())]


_OPERATORS = {
    "Add": "add",
    "Sub": "sub",
    "Mult": "mul",
    "Div": "truediv",
    "FloorDiv": "floordiv",
    "Mod": "mod",
    "Pow": "pow",
    "MatMult": "matmul",
    "LShift": "lshift",
    "RShift": "rshift",
    "BitAnd": "and_",
    "BitOr": "or_",
    "BitXor": "xor",
    "USub": "neg",
    "UAdd": "pos",
    "Invert": "invert",
    "Not": "not_",
    "Lt": "lt",
    "LtE": "le",
    "Eq": "eq",
    "NotEq": "ne",
    "Gt": "gt",
    "GtE": "ge",
}


def _operator(op: ast.AST | str, prefix: str = "") -> ast.expr:
    """``__operator__.<name>``; ``prefix`` i for the in-place form (``iand`` has no underscore)."""
    name = op if isinstance(op, str) else _OPERATORS[type(op).__name__]
    return ast.Attribute(_name("__operator__"), prefix + name.rstrip("_") if prefix else name, ast.Load())


def _name(name: str, context: ast.expr_context | None = None) -> ast.Name:
    return ast.Name(name, context or ast.Load())


def _site(site: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(_name(site), list(arguments), [])


def _assign(target: ast.expr, value: ast.expr) -> ast.stmt:
    return ast.Assign([target], value)


def _deleted(*names: str) -> ast.stmt:
    return ast.Delete([_name(name, ast.Del()) for name in names])


def _index(index: ast.expr) -> ast.expr:
    """A subscript as a value: slices have no spelling of their own outside brackets."""
    match index:
        case ast.Slice(lower, upper, step):
            parts = [part or ast.Constant(None) for part in (lower, upper, step)]
            return ast.Call(_name("__slice__"), parts, [])
        case ast.Tuple(elements):
            return ast.Tuple([_index(element) for element in elements], ast.Load())
        case _:
            return index


def _augmented(target: ast.expr, combined: Callable[[ast.expr], ast.expr]) -> list[ast.stmt]:
    """``target op= value`` written out; a container or index that is computed is computed once."""
    match target:
        case ast.Attribute(value, attribute):
            load: ast.expr = ast.Attribute(_name("__colrow_object__"), attribute, ast.Load())
            kept = [_assign(_name("__colrow_object__", ast.Store()), value)]
        case ast.Subscript(value, index):
            load = ast.Subscript(_name("__colrow_object__"), _name("__colrow_index__"), ast.Load())
            kept = [_assign(_name("__colrow_object__", ast.Store()), value)]
            kept.append(_assign(_name("__colrow_index__", ast.Store()), _index(index)))
        case _:
            return [_assign(target, combined(_name(cast(ast.Name, target).id)))]
    store = copy.copy(load)
    store.ctx = ast.Store()  # type: ignore[attr-defined]
    names = ["__colrow_object__", "__colrow_index__"][: len(kept)]
    return [*kept, _assign(store, combined(load)), _deleted(*names)]
