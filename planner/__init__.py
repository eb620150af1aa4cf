"""nn.Module -> graph -> strategies -> exact solver -> `Plan`. Pure: never touches a process group."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plan_model import Plan
    from .planning import plan

__all__ = ["Plan", "plan"]

_HOMES = {"Plan": ".plan_model", "plan": ".planning"}


def __getattr__(name: str) -> Any:
    """Hands on a public name from the module that defines it, imported on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
