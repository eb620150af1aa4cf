"""Placements of a value on the tp axis, and the moves between them (DESIGN section 2).

In every workload a value carries its gradient's placement along, so that whatever was planned for inference also
trains:

    Replicate(partial_grad=False)   the whole value        its gradient whole on each rank
    Replicate(partial_grad=True)    the whole value        its gradient a partial sum
    Shard(dim, layout)              a slice                the same slice
    Partial()                       a partial sum          its gradient whole
"""

from __future__ import annotations

from dataclasses import dataclass

from .layout import Layout


@dataclass(frozen=True)
class Replicate:
    """The whole value on every rank."""

    partial_grad: bool = False

    def __str__(self) -> str:
        return "R~" if self.partial_grad else "R"


@dataclass(frozen=True)
class Shard:
    """A slice of ``dim`` on every rank; ``dim`` counts from 0."""

    dim: int
    layout: Layout

    def __str__(self) -> str:
        many = f"x{len(self.layout.segments)}" if len(self.layout.segments) > 1 else ""
        return f"S({self.dim}){many}"


@dataclass(frozen=True)
class Partial:
    """A partial sum on every rank."""

    def __str__(self) -> str:
        return "P"


Placement = Replicate | Shard | Partial

WHOLE = Replicate()
PARTIAL_GRAD = Replicate(partial_grad=True)
PARTIAL = Partial()
