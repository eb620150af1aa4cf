"""Moves: what is done to a value, and to its gradient on the way back.

A move is a pair of one forward and one backward step, so that the table of DESIGN section 2 is a list of such pairs
and the runtime has a
single autograd function for all of them. Steps that communicate: ``all_reduce``, ``all_gather``, ``reduce_scatter``.
Steps that do not:
``identity``, ``slice`` (keep this rank's part), ``pad`` (zeros around this rank's part), ``lift`` (keep on the first
rank, zeros elsewhere).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .layout import Layout
from .placement import Partial, Placement, Replicate, Shard

Step = Literal["identity", "all_reduce", "all_gather", "reduce_scatter", "slice", "pad", "lift"]
COMMUNICATES: frozenset[str] = frozenset({"all_reduce", "all_gather", "reduce_scatter"})


@dataclass(frozen=True)
class Move:
    """One forward and one backward step on a value; ``dim`` and ``layout`` say what is gathered, scattered or
    sliced."""

    forward: Step
    backward: Step
    dim: int = 0
    layout: Layout | None = None

    @property
    def is_free(self) -> bool:
        """No step communicates."""
        return not COMMUNICATES & {self.forward, self.backward}


def move(source: Placement, target: Placement) -> Move | None:
    """The move that turns ``source`` into ``target``; None where there is none (or where they are equal: nothing to
    do)."""
    if source == target:
        return None
    match source, target:
        case Partial(), Replicate(partial_grad=partial):
            return Move("all_reduce", "all_reduce" if partial else "identity")
        case Partial(), Shard(dim, layout):
            return Move("reduce_scatter", "all_gather", dim, layout)
        case Shard(dim, layout), Replicate(partial_grad=partial):
            return Move("all_gather", "reduce_scatter" if partial else "slice", dim, layout)
        case Replicate(partial_grad=accepts), Shard(dim, layout):
            return Move("slice", "pad" if accepts else "all_gather", dim, layout)
        case Replicate(partial_grad=accepts), Partial():
            return Move("lift", "lift" if accepts else "identity")
        case Replicate(partial_grad=False), Replicate(partial_grad=True):
            return Move("identity", "all_reduce")
        case Replicate(partial_grad=True), Replicate(partial_grad=False):
            return Move("identity", "lift")
        case (Shard(), Shard() | Partial()) | (Partial(), Partial()) | (Replicate(), Replicate()):
            return None
    raise AssertionError(f"no such placements: {source}, {target}")
