"""Bodies: one module instance gets a forward in which call expressions are replaced, the way a person would edit its
source.

The instance's class is swapped for a subclass of the same name whose only content is the edited forward.
``isinstance``, ``super()``, hooks, ``state_dict``, ``deepcopy`` and ``fully_shard`` (which swaps classes itself) go
on as before; instances of one class with equal edits share one subclass, so a stack of equal layers is compiled once.
Replacements are compared by ``==``: whatever differs between ranks has to make them unequal.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from colrow.cost_models.errors import ValidationError
from colrow.planner.expressions import can_edit
from colrow.planner.sites import Frame

from .clones import Replacement, bodies_of, found_callees, instead

__all__ = ["Replacement", "can_edit", "edit_module", "edited_source", "restore"]

_ORIGINAL, _SOURCE = "__colrow_original__", "__colrow_source__"
_subclasses: WeakValueDictionary[Any, type[nn.Module]] = WeakValueDictionary()


def edit_module(module: nn.Module, edits: Mapping[tuple[Frame, ...], Replacement]) -> None:
    """Replaces call expressions in the forward of this instance, and in the functions that forward calls.

    At each site ``f(*args, **kwargs)`` becomes ``replacement(f, *args, **kwargs)``; operators come as functions of
    `operator`, methods of tensors as functions that take the tensor first.

    Args:
        module: The instance; its class and the other instances stay as they are.
        edits: Chain of frames, outermost first -> a hashable replacement.

    Raises:
        ValidationError: The module is edited already or has a forward of its own, the chain does not start at its
            forward, the source is
            missing or has changed, or the expression cannot be replaced.
    """
    cls = type(module)
    if hasattr(cls, _ORIGINAL):
        raise ValidationError(cls.__name__, "its forward is edited already", remedy="Restore it first.")
    if "forward" in vars(module):
        raise ValidationError(cls.__name__, "the instance carries a forward of its own, which hides the class's")
    forward = inspect.getattr_static(cls, "forward")
    roots = bodies_of(edits)
    if len(roots) != 1:
        raise ValidationError(
            cls.__name__, "the chains start in different functions", got=[body.key[1] for body in roots]
        )
    (body,) = roots
    callee, found = found_callees(body, forward, module)
    key = (cls, frozenset(edits.items()), callee, found)
    subclass = _subclasses.get(key)
    if subclass is None:
        sources: list[str] = []
        clone = instead(body, forward, found, sources)
        if clone is None:
            raise ValidationError(
                cls.__name__, "the chain starts elsewhere", got=body.key[1], need=forward.__qualname__
            )
        content = {
            "forward": clone,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        }
        subclass = type(cls.__name__, (cls,), {**content, _ORIGINAL: cls, _SOURCE: "\n\n".join(sources) + "\n"})
        _subclasses[key] = subclass
    module.__class__ = subclass


def edited_source(module: nn.Module) -> str:
    """The edited functions of this module, for people to read; empty where nothing is edited."""
    return str(getattr(type(module), _SOURCE, ""))


def restore(module: nn.Module) -> None:
    """Gives the module its class back; one that is not edited stays as it is.

    Raises:
        ValidationError: Something else swapped the class after the edit.
    """
    cls = type(module)
    if _ORIGINAL in vars(cls):
        module.__class__ = vars(cls)[_ORIGINAL]
    elif hasattr(cls, _ORIGINAL):
        raise ValidationError(
            cls.__name__, "its class was swapped again after the edit (fully_shard?)", remedy="Undo that first."
        )
