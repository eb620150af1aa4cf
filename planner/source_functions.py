"""Functions as source: from a code object's name and line to its syntax tree, and from a changed tree back to a code
object.

A changed function is compiled where it stands: its ``def`` becomes a factory of the same name that holds the
function, so that ``super()``, private names, enclosing variables and ``__future__`` imports mean what they meant, and
the factory's parameters are new free variables of the function. The rest of the file is left out of the compilation.
"""

from __future__ import annotations

import ast
import copy
import functools
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from colrow.cost_models.errors import ValidationError

CodeKey = tuple[str, str, int]  # co_filename, co_qualname, co_firstlineno
Function = ast.FunctionDef | ast.Lambda
Path = tuple[ast.AST, ...]  # from the module to the function, every node between them included

COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
_TARGET, _FACTORY = "__colrow_target__", "__colrow_factory__"


def key_of(code: CodeType) -> CodeKey:
    """Name of ``code`` across processes."""
    return code.co_filename, code.co_qualname, code.co_firstlineno


def function_paths(key: CodeKey) -> tuple[Path, ...]:
    """Where the source has a function of this name at this line; several only for lambdas on one line.

    Raises:
        ValidationError: There is no source, or no such function in it.
    """
    file, qualname, line = key
    try:
        stat = os.stat(file)
        tree = _parsed(file, stat.st_mtime_ns, stat.st_size)
    except (OSError, ValueError, SyntaxError) as error:
        cause = type(error).__name__
        raise ValidationError(f"{file}:{line}", f"{qualname} has no readable source ({cause})") from error
    paths = tuple(path for name, path in _functions(tree, line) if name == qualname)
    if not paths:
        wrong = f"the source has no function {qualname} at this line (an async one, or changed since import)"
        raise ValidationError(f"{file}:{line}", wrong)
    return paths


@lru_cache(maxsize=256)
def _parsed(file: str, modified_ns: int, size: int) -> ast.Module:
    with open(file, "rb") as handle:
        return ast.parse(handle.read())


def _functions(tree: ast.Module, line: int) -> Iterator[tuple[str, Path]]:
    """Qualified name and path of every function whose code starts at ``line`` (its first decorator's, if any)."""
    pending: list[tuple[Path, str]] = [((tree,), "")]
    while pending:
        path, prefix = pending.pop()
        node = path[-1]
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            name = prefix + ("<lambda>" if isinstance(node, ast.Lambda) else node.name)
            if _first_line(node) == line:
                yield name, path
            prefix = f"{name}.<locals>."
        elif isinstance(node, ast.AsyncFunctionDef):
            prefix = f"{prefix}{node.name}.<locals>."
        elif isinstance(node, ast.ClassDef):
            prefix = f"{prefix}{node.name}."
        for child in ast.iter_child_nodes(node):
            if _first_line(child) <= line <= (getattr(child, "end_lineno", None) or line):
                pending.append(((*path, child), prefix))


def _first_line(node: ast.AST) -> int:
    lines: list[int] = [getattr(node, "lineno", 0)]
    lines.extend(decorator.lineno for decorator in getattr(node, "decorator_list", []))
    return min(lines)


def compiled(key: CodeKey, path: Path, changed: Function, free: Sequence[str]) -> CodeType:
    """The code of ``changed``, standing in the place of ``path[-1]``; where it uses the names ``free``, they are free
    variables beside those the function had.
    """
    node: Any = _factory(path[-1], changed, free)
    for child, parent in zip(reversed(path[1:]), reversed(path[:-1]), strict=True):
        node = _with_child(parent, child, node)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = compile(node, key[0], "exec", dont_inherit=True)
    code = _made_by_factory(whole)
    assert code is not None
    name = "<lambda>" if isinstance(changed, ast.Lambda) else path[-1].name  # type: ignore[attr-defined]
    return _renamed(code.replace(co_name=name), code.co_qualname, key[1])


def _factory(original: ast.AST, changed: Function, free: Sequence[str]) -> ast.AST:
    names = [ast.arg(name) for name in (_FACTORY, *free)]
    arguments = ast.arguments(posonlyargs=[], args=names, kwonlyargs=[], kw_defaults=[], defaults=[])
    outer: ast.AST
    if isinstance(changed, ast.Lambda):
        outer = ast.Lambda(arguments, changed)
    else:
        inner = copy.copy(changed)
        inner.name = _TARGET
        outer = ast.FunctionDef(changed.name, arguments, [inner], [])
    return ast.fix_missing_locations(ast.copy_location(outer, original))


def _with_child(parent: ast.AST, old: ast.AST, new: ast.AST) -> ast.AST:
    """A copy of ``parent`` with one child exchanged; of modules and classes, only what a function's code depends on."""
    result = copy.copy(parent)
    for field, value in ast.iter_fields(parent):
        if value is old:
            setattr(result, field, new)
        elif isinstance(value, list) and any(item is old for item in value):
            setattr(result, field, [new if item is old else item for item in value])
    if isinstance(result, ast.Module):
        # Imports matter: CPython compiles a call on an imported module differently from a method call
        # (is_import_originated, compile.c).
        result.body = [*_imports(parent), new]  # type: ignore[list-item]
    elif isinstance(result, ast.ClassDef) and any(item is new for item in result.body):
        result.body, result.bases, result.keywords, result.decorator_list = [new], [], [], []  # type: ignore[list-item]
    return result


def _imports(node: ast.AST) -> Iterator[ast.stmt]:
    """The import statements of a module's own scope, those under ``if`` and ``try`` included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, (ast.If, ast.Try, ast.ExceptHandler, ast.With, ast.For, ast.While)):
            yield from _imports(child)


def _made_by_factory(code: CodeType) -> CodeType | None:
    for const in code.co_consts:
        if isinstance(const, CodeType):
            if const.co_name == _TARGET or (const.co_name == "<lambda>" and code.co_varnames[:1] == (_FACTORY,)):
                return const
            found = _made_by_factory(const)
            if found is not None:
                return found
    return None


def _renamed(code: CodeType, old: str, new: str) -> CodeType:
    """``code`` and the code inside it, with the prefix of their qualified names exchanged."""
    consts = tuple(_renamed(c, old, new) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_consts=consts, co_qualname=new + code.co_qualname.removeprefix(old))


def same_code(a: CodeType, b: CodeType) -> bool:
    """Equal instructions, constants, names and positions."""
    fields = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_linetable", "co_exceptiontable")
    if any(getattr(a, f) != getattr(b, f) for f in fields) or len(a.co_consts) != len(b.co_consts):
        return False
    return all(
        same_code(x, y) if isinstance(x, CodeType) and isinstance(y, CodeType) else type(x) is type(y) and x == y
        for x, y in zip(a.co_consts, b.co_consts, strict=True)
    )


@lru_cache(maxsize=4096)
def _as_in_source(key: CodeKey, path: Path) -> CodeType:
    return compiled(key, path, path[-1], ())  # type: ignore[arg-type]


def path_of(code: CodeType) -> Path:
    """Where the source has the function that ``code`` was compiled from.

    Raises:
        ValidationError: The source is missing or is not what was imported.
    """
    key = key_of(code)
    for path in function_paths(key):
        if same_code(_as_in_source(key, path), code):
            return path
    raise ValidationError(
        f"{key[0]}:{key[2]}",
        f"the source of {key[1]} is not what was imported (changed since, or transformed by an import hook)",
    )


def functions_within(callee: object) -> Iterator[FunctionType]:
    """The Python functions a callable is made of: itself, and what its wrappers (closures, methods, partials) hold."""
    pending, seen = [callee], set()
    while pending:
        item = pending.pop(0)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, FunctionType):
            yield item
            pending.extend(cell_contents(item).values())
            pending.append(getattr(item, "__wrapped__", None))
        elif isinstance(item, (staticmethod, classmethod, MethodType)):
            pending.append(item.__func__)
        elif isinstance(item, property):
            pending.append(item.fget)
        elif isinstance(item, functools.partial):
            pending.append(item.func)


def cell_contents(function: FunctionType) -> dict[str, object]:
    """Name -> value of the filled closure cells."""
    contents = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            contents[name] = cell.cell_contents
        except ValueError:  # an empty cell
            continue
    return contents


def live_object(key: CodeKey) -> object | None:
    """What the imported file has under the function's qualified name; None for functions made inside functions."""
    file, qualname, _ = key
    if "<" in qualname:
        return None
    found: object = _module_of(file)
    owner = ""
    for part in qualname.split("."):
        found = getattr(found, "__dict__", {}).get(mangled(part, owner))
        owner = part
    return found if any(key_of(f.__code__) == key for f in functions_within(found)) else None


def mangled(name: str, owner: str) -> str:
    """What ``name`` is called as an attribute where it is written inside the class ``owner`` (private names)."""
    private = name.startswith("__") and not name.endswith("__")
    return f"_{owner.lstrip('_')}{name}" if private and owner.strip("_") else name


def _module_of(file: str) -> ModuleType | None:
    """The imported module of a file; one that was removed and imported again is looked up anew."""
    found = _modules_by_file(len(sys.modules)).get(file)
    if found is not None and sys.modules.get(found.__name__) is not found:
        _modules_by_file.cache_clear()
        found = _modules_by_file(len(sys.modules)).get(file)
    return found


@lru_cache(maxsize=1)
def _modules_by_file(count: int) -> dict[str, ModuleType]:
    """Imported modules by file; ``count`` of them, so that later imports are seen."""
    return {m.__dict__.get("__file__") or "": m for m in list(sys.modules.values()) if isinstance(m, ModuleType)}
