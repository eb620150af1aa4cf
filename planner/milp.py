"""The same problem as an integer program, for graphs too wide to eliminate (HiGHS through scipy).

Standard local-polytope formulation (Wainwright and Jordan, 2008, section 4.1), with x[v, i] in {0, 1} and y[f, t] >= 0
for every entry t of factor f that is not forbidden:

    minimise   sum of f[t] y[f, t]
    such that  sum over i of x[v, i] = 1                              one value per variable
               sum over t with t_v = i of y[f, t] = x[v, i]           for every f, v in f, i
               sum of bytes <= cap                                    where memory is capped
               sum over v of x[v, a_v] <= n - 1                       for every excluded assignment a

Integral x force y to the one entry x selects. HiGHS computes in float64 with tolerances near 1e-6, so what it returns
is only a candidate and a float bound: the caller re-prices the candidate in integers, and ``_integer_bound`` rounds the
bound in the safe direction by more than the tolerances can hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, gcd, inf, isfinite

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from .factor_graph import INFEASIBLE
from .presolve import Term

_LARGEST_COEFFICIENT = 1e6  # HiGHS' absolute tolerances (1e-7 dual, 1e-6 gap) assume moderate coefficients
MEMORY_SLACK = 1e-5  # by which a candidate may pass the cap, in units of the largest weight
_INFEASIBLE = 2  # scipy's OptimizeResult.status


@dataclass(frozen=True)
class Candidate:
    """HiGHS' values per variable (None: nothing in time), lower bound in picoseconds, whether no assignment exists."""

    values: dict[int, int] | None
    lower_bound: int
    infeasible: bool
    columns: int


def solve_ilp(
    sizes: Sequence[int],
    terms: Sequence[Term],
    *,
    time_limit_s: float | None,
    memory_cap: int | None = None,
    excluded: Sequence[dict[int, int]] = (),
) -> Candidate:
    """Minimise the terms' cost over the variables in their scopes.

    Args:
        sizes: Domain size per variable.
        terms: Tables with entries in ``[0, INFEASIBLE]``, scopes not empty.
        time_limit_s: HiGHS' wall-clock limit; None for no limit.
        memory_cap: Bytes the terms' memory may sum to; None for no cap.
        excluded: Assignments of all those variables that may not be returned.
    """
    variables = sorted({v for term in terms for v in term.scope})
    first: dict[int, int] = {}
    columns = 0
    for v in variables:
        first[v], columns = columns, columns + sizes[v]
    integral = columns
    costs, weights = [np.zeros(columns, np.int64)], [np.zeros(columns, np.int64)]
    rows: list[npt.NDArray[np.int64]] = []
    cols: list[npt.NDArray[np.int64]] = []
    signs: list[npt.NDArray[np.float64]] = []
    right = [1.0] * len(variables)
    for row, v in enumerate(variables):
        cols.append(np.arange(first[v], first[v] + sizes[v]))
        rows.append(np.full(sizes[v], row))
        signs.append(np.ones(sizes[v]))
    for term in terms:
        entries = np.flatnonzero(term.cost < INFEASIBLE)
        costs.append(term.cost.reshape(-1)[entries])
        weights.append(np.zeros_like(entries) if term.memory is None else term.memory.reshape(-1)[entries])
        own = np.arange(columns, columns + entries.size)
        columns += entries.size
        for v, values in zip(term.scope, np.unravel_index(entries, term.cost.shape), strict=True):
            base = len(right)
            rows += [base + values, base + np.arange(sizes[v])]
            cols += [own, np.arange(first[v], first[v] + sizes[v])]
            signs += [np.ones(entries.size), -np.ones(sizes[v])]
            right += [0.0] * sizes[v]
    cost, weight = np.concatenate(costs), np.concatenate(weights)
    matrix = coo_array((np.concatenate(signs), (np.concatenate(rows), np.concatenate(cols))), (len(right), columns))
    constraints = [LinearConstraint(matrix, right, right)]
    if memory_cap is not None:
        scale = max(1.0, float(weight.max(initial=0)))
        # HiGHS' cuts are wrong about sums within its tolerance (1e-6) of the cap: it called assignments 1e-8 below the
        # cap infeasible (scipy 1.17.1, 2026-11). So the row lets a little too much through; callers re-check.
        constraints.append(LinearConstraint(weight[None] / scale, -np.inf, memory_cap / scale + MEMORY_SLACK))
    for barred in excluded:
        cut = np.zeros((1, columns))
        cut[0, [first[v] + barred[v] for v in variables]] = 1
        constraints.append(LinearConstraint(cut, -np.inf, len(variables) - 1))
    unit = max(1, gcd(*map(int, np.unique(cost))))
    scale = max(1.0, float(cost.max(initial=0)) / unit / _LARGEST_COEFFICIENT) * unit
    integrality = np.zeros(columns, np.int64)
    integrality[:integral] = 1
    result = milp(
        cost / scale,
        integrality=integrality,
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0, "time_limit": inf if time_limit_s is None else time_limit_s},
    )
    chosen: dict[int, int] | None = None
    if result.x is not None:
        chosen = {v: int(np.argmax(result.x[first[v] : first[v] + sizes[v]])) for v in variables}
    bound = _integer_bound(result.mip_dual_bound, scale, unit)
    return Candidate(chosen, bound, result.status == _INFEASIBLE, columns)


def _integer_bound(dual_bound: float | None, scale: float, unit: int) -> int:
    """Largest multiple of ``unit`` that is surely no more than the optimum, given HiGHS' scaled float bound.

    The objective is a sum of multiples of ``unit``, so the bound may be rounded up once what tolerances can hide
    (relative 1e-7 and 1e-5 absolute, an order above HiGHS' own) is taken off.
    """
    if dual_bound is None or not isfinite(dual_bound):
        return 0
    safe = dual_bound - 1e-5 - 1e-7 * abs(dual_bound)
    return max(0, ceil(safe * scale / unit) * unit)
