"""Bucket elimination over any algebra of tables, and its min-plus instance.

Eliminating variable v replaces the tables t_1..t_k that read it by one message over the other variables they read,

    m(s) = min over x of sum_i t_i(s, x),        a(s) = the least x that attains it,

which leaves the optimum of the rest of the graph unchanged because addition distributes over min (Dechter, Artificial
Intelligence 113, 1999, section 4). ``eliminate`` runs a schedule of such steps, ``MinPlus.step`` is one of them, and
``decode`` reads the ``a`` back in reverse order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from .factor_graph import INFEASIBLE, Table
from .ordering import Schedule, Step
from .presolve import Term

T = TypeVar("T")
_IN_ONE_PIECE = 1 << 15  # entries of a joined table up to which one argmin beats a loop over the values


class Algebra(Protocol[T]):
    """What elimination needs to know of tables."""

    def lift(self, term: Term) -> T:
        """The table of a term."""

    def step(self, sizes: Sequence[int], step: Step, inputs: Sequence[tuple[tuple[int, ...], T]]) -> tuple[T, Any]:
        """The message of a step and the pointers that ``decode`` needs."""

    def decode(self, step: Step, back: Any, assignment: dict[int, int], chosen: dict[int, int]) -> None:
        """Set the step's variable from its scope's values, or from the label ``chosen`` in its output table."""


@dataclass(frozen=True, eq=False)
class Eliminated(Generic[T]):
    """A schedule carried out: ``leftovers`` are (table number, scope, table); ``backs`` belong to the steps."""

    schedule: Schedule
    backs: tuple[Any, ...]
    leftovers: tuple[tuple[int, tuple[int, ...], T], ...]


def eliminate(
    algebra: Algebra[T], sizes: Sequence[int], tables: Sequence[tuple[tuple[int, ...], T]], order: Schedule
) -> Eliminated[T]:
    """Carry out ``order`` on ``tables`` ((scope, table), scopes ascending); a table is let go once consumed."""
    alive = dict(enumerate(tables))
    backs = []
    for step in order.steps:
        message, back = algebra.step(sizes, step, [alive.pop(index) for index in step.inputs])
        alive[step.output] = (step.scope, message)
        backs.append(back)
    return Eliminated(order, tuple(backs), tuple((index, *alive[index]) for index in order.leftovers))


def decode(algebra: Algebra[T], eliminated: Eliminated[T], assignment: dict[int, int], chosen: dict[int, int]) -> None:
    """Assign the eliminated variables, last one first, given the others.

    Args:
        algebra: The algebra of the elimination.
        eliminated: The elimination.
        assignment: Values of the variables in the leftovers' scopes; extended in place.
        chosen: Label chosen in each leftover table (by number), where the algebra has labels; extended in place.
    """
    for step, back in zip(reversed(eliminated.schedule.steps), reversed(eliminated.backs), strict=True):
        algebra.decode(step, back, assignment, chosen)


def broadcast_index(scope: Sequence[int], table_scope: Sequence[int]) -> tuple[slice | None, ...]:
    """Index that gives a table (dims in ``scope``'s order) all dims of ``scope``, the new ones of size 1."""
    return tuple([slice(None) if v in table_scope else None for v in scope])


def aligned(step: Step, tables: Sequence[tuple[tuple[int, ...], Table]]) -> list[Table]:
    """Tables (scopes ascending, each with the step's variable) as broadcastable over its scope, its variable last."""
    parts = []
    for scope, table in tables:
        axis = scope.index(step.variable)
        order = (*range(axis), *range(axis + 1, len(scope)), axis)
        parts.append(table.transpose(order)[(*broadcast_index(step.scope, scope), slice(None))])
    return parts


class MinPlus:
    """Tables are int64 arrays with values in ``[0, INFEASIBLE]``."""

    def lift(self, term: Term) -> Table:
        """The term's cost."""
        return term.cost

    def step(
        self, sizes: Sequence[int], step: Step, inputs: Sequence[tuple[tuple[int, ...], Table]]
    ) -> tuple[Table, npt.NDArray[np.int32]]:
        """Minimum and least minimiser over the step's variable."""
        parts = aligned(step, inputs)
        values, shape = sizes[step.variable], [sizes[v] for v in step.scope]
        if values * int(np.prod(shape)) <= _IN_ONE_PIECE:
            joined = saturating_sum(parts)
            return np.asarray(joined.min(axis=-1)), np.asarray(joined.argmin(axis=-1)).astype(np.int32)
        best = np.full(shape, INFEASIBLE, np.int64)
        argument = np.zeros(shape, np.int32)
        for value in range(values):
            joined = saturating_sum([table[..., value] for table in parts])
            better = joined < best
            np.minimum(best, joined, out=best)
            np.copyto(argument, np.int32(value), where=better)
        return best, argument

    def decode(self, step: Step, back: Any, assignment: dict[int, int], chosen: dict[int, int]) -> None:
        """Look the minimiser up."""
        assignment[step.variable] = back.item(*[assignment[v] for v in step.scope])


def saturating_sum(tables: Sequence[Table]) -> Table:
    """Saturating sum of broadcastable tables, small ones first."""
    ordered = sorted(tables, key=lambda table: table.size)
    total = ordered[0]
    for table in ordered[1:]:
        total = np.asarray(total + table)
        np.minimum(total, INFEASIBLE, out=total)
    return total
