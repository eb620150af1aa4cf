"""The discrete factor graph the solver works on: what is minimised, and the pricing of one assignment.

Tables hold int64 picoseconds (or bytes). ``INFEASIBLE`` is the absorbing top element of the saturating addition
``min(a + b, INFEASIBLE)``: every table is shifted to a minimum of zero first, so sums of two stay in int64 and a
forbidden entry never becomes allowed; no allowed one becomes forbidden as long as the largest finite entries of all
factors add up to less than half of ``INFEASIBLE`` (6 days in picoseconds, 0.5 exabytes), which ``validate`` checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from colrow.cost_models.errors import Infeasible

Table = npt.NDArray[np.int64]
INFEASIBLE: int = 1 << 60


class Factor(NamedTuple):
    """One summand of the objective.

    Attributes:
        variables: Indices of the variables it reads, distinct.
        table: int64, one dim per variable in that order; picoseconds (bytes in ``Problem.memory``); an entry of at
            least ``INFEASIBLE`` forbids the combination.
    """

    variables: tuple[int, ...]
    table: Table


@dataclass(frozen=True, eq=False)
class Problem:
    """Minimise the sum of ``factors`` over all assignments, the sum of ``memory`` at most ``memory_cap``.

    Attributes:
        sizes: Domain size of each variable. The order of a domain is a preference: ties go to the lowest index.
        factors: The objective.
        groups: Interiors of repeated blocks, disjoint; they are eliminated first, and equal ones once. Never needed for
            a right answer, only for a fast one.
        memory: Additive bytes, of the same form and all finite.
        memory_cap: Bytes; None means no cap.
    """

    sizes: tuple[int, ...]
    factors: tuple[Factor, ...]
    groups: tuple[tuple[int, ...], ...] = ()
    memory: tuple[Factor, ...] = ()
    memory_cap: int | None = None


@dataclass(frozen=True)
class Statistics:
    """What a solve took.

    Attributes:
        largest_table: Entries of the largest table formed by elimination.
        width: Most variables beside the eliminated one in any table (the induced width of the order used).
        groups: Groups that were folded.
        distinct_groups: How many of them were eliminated; the others shared the result.
        ilp_columns: Columns of the integer program, 0 if none was needed.
    """

    largest_table: int = 0
    width: int = 0
    groups: int = 0
    distinct_groups: int = 0
    ilp_columns: int = 0


@dataclass(frozen=True)
class Solution:
    """An assignment with its price and what is known about cheaper ones.

    Attributes:
        assignment: Domain index of each variable.
        cost: Picoseconds, re-priced by ``evaluate`` from the problem's own factors.
        lower_bound: Picoseconds; no assignment costs less. What elimination, the Lagrangian or HiGHS returned.
        proven: Whether ``lower_bound == cost``.
        method: ``elimination``, ``elimination+ilp``, ``lagrangian``, ``labels``, ``ilp`` or ``mini-buckets``.
        memory: Bytes of the assignment.
        statistics: What the solve took.
    """

    assignment: tuple[int, ...]
    cost: int
    lower_bound: int
    proven: bool
    method: str
    memory: int
    statistics: Statistics = field(default_factory=Statistics)


def evaluate(problem: Problem, assignment: Sequence[int]) -> int:
    """Cost of ``assignment`` in picoseconds, summed over the original factors in Python integers; saturates."""
    return min(_total(problem.factors, assignment), INFEASIBLE)


def memory_of(problem: Problem, assignment: Sequence[int]) -> int:
    """Bytes of ``assignment``, summed over the original memory factors in Python integers."""
    return _total(problem.memory, assignment)


def _total(factors: Sequence[Factor], assignment: Sequence[int]) -> int:
    return sum(factor.table.item(*[assignment[v] for v in factor.variables]) for factor in factors)


class Interned(NamedTuple):
    """A factor whose table is shifted to minimum zero and clipped; equal tables share one object and one ``key``."""

    variables: tuple[int, ...]
    table: Table
    key: int


def intern_tables(factors: Sequence[Factor]) -> tuple[list[Interned], int]:
    """Shift every table to minimum zero and give equal tables one key.

    Returns:
        The shifted factors and the sum of what was subtracted.

    Raises:
        Infeasible: A factor forbids every combination.
    """
    by_identity: dict[int, tuple[Table, int, int]] = {}
    by_content: dict[tuple[tuple[int, ...], bytes], tuple[Table, int]] = {}
    interned, offset = [], 0
    for index, factor in enumerate(factors):
        known = by_identity.get(id(factor.table))
        if known is None:
            least = int(factor.table.min())
            if least >= INFEASIBLE:
                raise Infeasible(f"factor {index}", "forbids every combination of its variables", got=factor.variables)
            shifted = np.where(factor.table >= INFEASIBLE, INFEASIBLE, factor.table - least)
            content = (shifted.shape, shifted.tobytes())
            shared = by_content.setdefault(content, (shifted, len(by_content)))
            known = by_identity[id(factor.table)] = (*shared, least)
        interned.append(Interned(factor.variables, known[0], known[1]))
        offset += known[2]
    return interned, offset


def validate(problem: Problem) -> None:
    """Check shapes, types, groups and that no sum of finite entries can reach ``INFEASIBLE``.

    Raises:
        ValueError: The problem is malformed (an error of the caller, not of the user).
    """
    number = len(problem.sizes)
    if min(problem.sizes, default=1) < 1:
        raise ValueError("every domain needs at least one value")
    for factors, kind in ((problem.factors, "factor"), (problem.memory, "memory factor")):
        spans: dict[int, int] = {}
        total = 0
        used = {v for factor in factors for v in factor.variables}
        in_range = not used or 0 <= min(used) <= max(used) < number
        for index, (scope, table) in enumerate(factors):
            if len(set(scope)) != len(scope) or (not in_range and scope and not 0 <= min(scope) <= max(scope) < number):
                raise ValueError(f"{kind} {index}: variables {scope} are not distinct indices below {number}")
            if table.shape != tuple([problem.sizes[v] for v in scope]):
                raise ValueError(f"{kind} {index}: table {table.shape} does not fit variables {scope}")
            if id(table) not in spans:
                if table.dtype != np.int64:
                    raise ValueError(f"{kind} {index}: table of {table.dtype}, not int64")
                finite = table[table < INFEASIBLE]
                if kind == "memory factor" and finite.size != table.size:
                    raise ValueError(f"{kind} {index}: bytes must be finite; forbid combinations in a cost factor")
                spans[id(table)] = int(np.abs(finite).max()) if finite.size and finite.min() > -INFEASIBLE else 0
                if finite.size and finite.min() <= -INFEASIBLE:
                    raise ValueError(f"{kind} {index}: entries must lie above -INFEASIBLE")
            total += spans[id(table)]
        if total >= INFEASIBLE // 2:
            raise ValueError(f"the {kind}s' finite entries can sum to {total}, too near INFEASIBLE; use a larger unit")
    members = [v for group in problem.groups for v in group]
    if len(set(members)) != len(members) or (members and not 0 <= min(members) <= max(members) < number):
        raise ValueError("groups must be disjoint sets of variables")
