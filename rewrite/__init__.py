"""Plan -> a module that runs on torch.distributed (NCCL on GPUs, gloo on CPU), and checks of it. The command line."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import read_report
    from .counting import count_collectives
    from .parallel import parallelize
    from .verification import verify

__all__ = ["count_collectives", "parallelize", "read_report", "verify"]

_HOMES = {
    "count_collectives": ".counting",
    "parallelize": ".parallel",
    "read_report": ".checkpoint",
    "verify": ".verification",
}


def __getattr__(name: str) -> Any:
    """Hands on a public name from the module that defines it, imported on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
