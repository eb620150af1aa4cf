"""What a model is beside its weights: whether two models would run the same forward."""

from __future__ import annotations

import functools
import hashlib
import itertools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_PLAIN = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device)

_classes: WeakKeyDictionary[type, int] = WeakKeyDictionary()
_numbers = itertools.count()


def identity(model: nn.Module) -> str:
    """A digest of classes, paths, shapes, hooks and every attribute that is no tensor, configurations included.

    Copies of a model in one process agree in it; whatever its forward may read and is not a tensor's value makes a
    difference.
    """
    known: dict[int, int] = {}
    digest = hashlib.sha256()
    for path, module in model.named_modules(remove_duplicate=False):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        number = _classes.setdefault(type(module), next(_numbers))  # a notebook defines a class again by its name
        digest.update(repr((path, kind, number, _described(vars(module), known))).encode())
    return digest.hexdigest()


def _described(value: Any, known: dict[int, int]) -> Any:
    """A value as nested tuples of what can be compared between copies; an object met before by its number."""
    match value:
        case Tensor():
            return tuple(value.shape), str(value.dtype), value.requires_grad
        case nn.Module():
            return "module"  # described at its own path
        case _ if isinstance(value, _PLAIN):
            return type(value).__name__, str(value)
        case type():
            return value.__module__, value.__qualname__
        case set() | frozenset():
            return "set", sorted(str(item) for item in value)
    if id(value) in known:
        return "again", known[id(value)]
    known[id(value)] = len(known)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    match value:
        case dict():
            return kind, [(_described(k, known), _described(v, known)) for k, v in value.items()]
        case list() | tuple():
            return kind, [_described(item, known) for item in value]
        case functools.partial():
            return kind, [_described(part, known) for part in (value.func, value.args, value.keywords)]
    name = getattr(value, "__qualname__", None)  # functions and methods
    held = getattr(value, "__dict__", None)
    return kind, name, _described(held, known) if held else ()
