"""Repeated blocks are traced once, and it is proved that this changes nothing.

Two children of one ModuleList fold if they agree in classes, parameter and buffer shapes, dtypes, ties and every
non-tensor attribute except
those that equal the child's position in the list. While the first of them runs, such an attribute is replaced by an
object that refuses every
use: if the run succeeds, what was traced cannot depend on it. A later block's call must then agree with the first
one's in argument structure,
tensor shapes and non-tensor values, and no hook may look into the block; otherwise it is traced itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .block_markers import marked, stand_ins


class Untouchable:
    """Stands for an attribute that differs between copies; any use raises."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("a folded block reads an attribute that differs between its copies")

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __floordiv__ = __index__ = __int__ = (
        _refuse
    )
    __getattr__ = __iter__ = __len__ = __contains__ = __getitem__ = __str__ = __format__ = _refuse


@dataclass
class FoldCall:
    """One call of a folded block: everything needed to put a copy of the template's nodes in its place."""

    fqn: str
    template: str


@dataclass
class _Seen:
    """The template's recorded call."""

    spec: Any
    leaves: list[Any]
    result_spec: Any
    result_leaves: list[Any]


class Folding:
    """Which blocks of a model are copies of which, and the patches that trace each template once."""

    def __init__(self, model: nn.Module, *, enabled: bool = True) -> None:
        self.groups = _equal_blocks(model) if enabled else []
        self.template_of = {copy: group[0] for group in self.groups for copy in group[1:]}
        self.model = model
        self.calls: list[FoldCall] = []
        self._seen: dict[str, _Seen] = {}
        self._held: frozenset[int] | None = None  # ids of the copies' parameters and buffers
        self._prefixes = tuple(f"{copy}." for copy in self.template_of)

    def covers(self, name: str) -> bool:
        """Whether parameter ``name`` belongs to a copy only (its fake tensor is not needed)."""
        return False if not self._prefixes else name.startswith(self._prefixes)

    def refuse_read(self, value: Tensor) -> None:
        """Refuses a trace that reads a copy's parameter or buffer: the copy, or a part of it, was called otherwise
        than its template, so that what it holds would count as a constant.

        Raises:
            RuntimeError: ``value`` belongs to a copy.
        """
        if self._held is None:
            copies = [self.model.get_submodule(copy) for copy in self.template_of]
            self._held = frozenset(id(own) for part in copies for own in (*part.parameters(), *part.buffers()))
        if id(value) in self._held:
            raise RuntimeError("a part of a folded block is called from outside")

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Patches the blocks' forwards and attributes for the time of a trace."""
        undo: list[Callable[[], None]] = []
        try:
            for group in self.groups:
                for fqn in group:
                    module = self.model.get_submodule(fqn)
                    self._patch(module, fqn, group[0], undo)
                template = self.model.get_submodule(group[0])
                for owner, name in _position_attributes(template, int(group[0].rsplit(".", 1)[1])):
                    value = owner.__dict__[name]
                    owner.__dict__[name] = Untouchable()
                    undo.append(lambda owner=owner, name=name, value=value: owner.__dict__.__setitem__(name, value))  # type: ignore[misc]
            yield
        finally:
            for step in reversed(undo):
                step()

    def _patch(self, module: nn.Module, fqn: str, template: str, undo: list[Callable[[], None]]) -> None:
        forward = module.forward
        run = self._template_run(forward, fqn) if fqn == template else self._copy_run(forward, fqn, template)
        module.__dict__["forward"] = run
        undo.append(lambda: module.__dict__.pop("forward"))

    def _template_run(self, forward: Callable[..., Any], fqn: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if fqn in self._seen:
                raise RuntimeError("a folded block is called twice")
            if any(m._forward_hooks or m._forward_pre_hooks for m in self.model.get_submodule(fqn).modules()):
                raise RuntimeError("hooks look into a folded block")
            leaves, spec = pytree.tree_flatten((args, kwargs))
            key = self._new_key(FoldCall(fqn, fqn))
            args, kwargs = pytree.tree_unflatten(_marked(leaves, key, "enter"), spec)
            results, result_spec = pytree.tree_flatten(forward(*args, **kwargs))
            self._seen[fqn] = _Seen(spec, leaves, result_spec, results)
            return pytree.tree_unflatten(_marked(results, key, "exit"), result_spec)

        return run

    def _copy_run(self, forward: Callable[..., Any], fqn: str, template: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            seen = self._seen.get(template)
            with torch._C.DisableTorchFunction():  # what is done here is no part of the model
                if seen is None or spec != seen.spec or not _alike(leaves, seen.leaves):
                    raise RuntimeError("a folded block is called differently from its template")
                key = self._new_key(FoldCall(fqn, template))
                made = stand_ins(_tensors(leaves), key, _tensors(seen.result_leaves))
            return pytree.tree_unflatten(_with_tensors(seen.result_leaves, made), seen.result_spec)

        return run

    def _new_key(self, call: FoldCall) -> int:
        self.calls.append(call)
        return len(self.calls) - 1


def _marked(leaves: list[Any], key: int, part: str) -> list[Any]:
    with torch._C.DisableTorchFunction():
        return _with_tensors(leaves, marked(_tensors(leaves), key, part))


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _with_tensors(leaves: list[Any], tensors: Iterable[Tensor]) -> list[Any]:
    """``leaves`` with their tensors exchanged, in order."""
    made = iter(tensors)
    return [next(made) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _alike(leaves: list[Any], others: list[Any]) -> bool:
    """Whether two calls' arguments are equal but for what their tensors hold."""
    return _identities(leaves) == _identities(others) and all(map(_are_alike, leaves, others))


def _identities(leaves: list[Any]) -> list[int]:
    """For each tensor, where it is passed first."""
    first: dict[int, int] = {}
    return [first.setdefault(id(leaf), at) for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]


def _are_alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype
    return a is b or (type(a) is type(b) and isinstance(a, (int, float, str, bool)) and bool(a == b))


def _equal_blocks(model: nn.Module) -> list[list[str]]:
    """Groups of two or more equal children of one list, outermost lists only; each in list order."""
    groups: list[list[str]] = []
    covered: tuple[str, ...] = ()
    shared = _shared_parameters(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or (covered and name.startswith(covered)):
            continue
        by_signature: dict[Any, list[str]] = {}
        for position, child in enumerate(module):
            if shared and any(id(p) in shared for p in child.parameters()):
                continue
            by_signature.setdefault(_signature(child, position), []).append(f"{name}.{position}")
        found = [group for group in by_signature.values() if len(group) > 1]
        groups += found
        if found:
            covered += (f"{name}.",)
    return groups


def _shared_parameters(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


_PLAIN = frozenset({int, float, str, bool, type(None), torch.dtype})
_SLOTS = frozenset({"_parameters", "_buffers", "_modules"})
_ALWAYS = frozenset(nn.Module().__dict__)  # hooks mostly, nearly always empty


def _signature(block: nn.Module, position: int) -> Any:
    parts: list[Any] = []
    for name, module in block.named_modules():
        values = [
            (key, _plain_value(value, position))
            for key, value in module.__dict__.items()
            if key not in _SLOTS and (key not in _ALWAYS or value)
        ]
        parts.append((name, type(module), frozenset(values)))
        parts += [(key, p.shape, p.dtype, p.requires_grad) for key, p in module._parameters.items() if p is not None]
        parts += [(key, b.shape, b.dtype) for key, b in module._buffers.items() if b is not None]
    return tuple(parts)


def _plain_value(value: Any, position: int) -> Any:
    kind = type(value)
    if kind is int and value == position:
        return "the block's position"
    if kind in _PLAIN:
        return (kind, value)
    if (kind is dict or kind is OrderedDict) and not value:
        return kind
    if isinstance(value, (tuple, list)):
        return (kind, *(_plain_value(v, -1) for v in value))
    if isinstance(value, (set, frozenset)):
        return (kind, *sorted(map(str, value)))
    if isinstance(value, dict):
        return (kind, *((str(k), _plain_value(v, -1)) for k, v in value.items()))
    if isinstance(value, partial):
        return (kind, id(value.func), _plain_value(value.args, -1), _plain_value(value.keywords, -1))
    return id(getattr(value, "__func__", value))


def _position_attributes(block: nn.Module, position: int) -> list[tuple[nn.Module, str]]:
    return [
        (module, key)
        for module in block.modules()
        for key, value in module.__dict__.items()
        if type(value) is int and value == position
    ]
