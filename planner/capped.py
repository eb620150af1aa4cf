"""The cheapest assignment within a memory cap M.

    least bytes    min over x of B(x): above M, no assignment fits                                      _least_bytes
    bound          L(l) = min over x of [C(x) + l B(x)] - l M <= optimum, for every price l >= 0        _price_memory
    optimum        elimination over (cost, bytes) labels, or HiGHS with one more row                    _labelled, _ilp

Each L(l) is an ordinary solve, with the groups folded. The price is chosen as the slope between the cheapest assignment
known that does not fit and the cheapest that does (Handler and Zang, Networks 10, 1980), which converges in a few steps to
the best bound; often the two meet and nothing remains to be done. Prices are dyadic fractions and every product is rounded
down, so all of it stays in integers and below the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from colrow.cost_models.errors import ColrowError, Infeasible, MemoryCapError

from .elimination import decode, eliminate
from .factor_graph import INFEASIBLE, Factor, Problem, Solution, Table, evaluate, intern_tables, memory_of
from .group_folding import Graph, as_terms, fold, unfold
from .labels import LabelTables, TooManyLabels
from .milp import solve_ilp
from .ordering import schedule
from .presolve import reduce_domains
from .uncapped import solve_uncapped

_LABEL_ENTRIES = 1 << 20  # entries of a joined label table; more means HiGHS
_PRICE_BITS = 24  # of a price: enough to tell 0.1 ppm, few enough that price times bytes fits int64 below 256 GB
_PRICE_STEPS = 60  # Handler and Zang's iteration ends by itself; this only bounds it


@dataclass(frozen=True)
class _Best:
    """The cheapest assignment known to fit and the best bound known."""

    assignment: tuple[int, ...]
    cost: int
    lower_bound: int
    method: str


def solve_capped(
    problem: Problem, cheapest: Solution, max_table_entries: int, time_limit_s: float | None
) -> Solution:
    """The cheapest assignment within ``problem.memory_cap``, given that the ``cheapest`` one does not fit.

    Args:
        problem: With a cap.
        cheapest: The uncapped solution.
        max_table_entries: As of ``solver.solve``.
        time_limit_s: As of ``solver.solve``; here for HiGHS in every role.

    Raises:
        MemoryCapError: Nothing fits.
        Infeasible: Nothing that fits was found in time.
    """
    least = _least_bytes(problem, max_table_entries, time_limit_s)
    best = _price_memory(problem, cheapest, least, max_table_entries, time_limit_s)
    if best.lower_bound < best.cost:
        try:
            best = _labelled(problem, best, max_table_entries)
        except TooManyLabels:
            best = _ilp(problem, best, time_limit_s)
    if not best.assignment:
        raise Infeasible("solver", "no assignment within the memory cap was found in time", got=problem.memory_cap)
    proven = best.lower_bound == best.cost
    memory = memory_of(problem, best.assignment)
    return Solution(best.assignment, best.cost, best.lower_bound, proven, best.method, memory, cheapest.statistics)


def _cap(problem: Problem) -> int:
    assert problem.memory_cap is not None
    return problem.memory_cap


def _least_bytes(problem: Problem, max_table_entries: int, time_limit_s: float | None) -> Solution:
    """The feasible assignment with the fewest bytes; raises if even its bound passes the cap."""
    masks: dict[int, Factor] = {}
    for factor in problem.factors:
        if id(factor.table) not in masks:
            mask = np.where(factor.table >= INFEASIBLE, INFEASIBLE, 0)
            masks[id(factor.table)] = Factor(factor.variables, mask)
    allowed = tuple([Factor(factor.variables, masks[id(factor.table)].table) for factor in problem.factors])
    bytes_alone = replace(problem, factors=allowed + problem.memory)
    least = solve_uncapped(bytes_alone, max_table_entries, time_limit_s)
    if least.lower_bound > _cap(problem):
        raise MemoryCapError(
            "memory",
            "no assignment fits the cap" if least.proven else "no assignment fits the cap; the need is a lower bound",
            got=f"{problem.memory_cap} bytes",
            need=f"{least.lower_bound} bytes",
            remedy="Raise the cap or use more ranks.",
        )
    return least


def _price_memory(
    problem: Problem, cheapest: Solution, least: Solution, max_table_entries: int, time_limit_s: float | None
) -> _Best:
    """The best Lagrangian bound, and the cheapest assignment that fits met on the way (none: empty)."""
    cap = _cap(problem)
    bound = cheapest.lower_bound
    if least.memory > cap:
        return _Best((), INFEASIBLE, bound, "lagrangian")
    best, cost = least.assignment, evaluate(problem, least.assignment)
    over, under = (cheapest.cost, cheapest.memory), (cost, least.memory)
    for _ in range(_PRICE_STEPS):
        if under[0] <= over[0]:
            break  # dearer and heavier: only an unproven uncapped solution can be
        price = Fraction(under[0] - over[0], over[1] - under[1])
        priced = _priced(problem, price)
        if priced is None:
            break
        factors, price = priced
        found = solve_uncapped(replace(problem, factors=problem.factors + factors), max_table_entries, time_limit_s)
        raised = found.lower_bound - price.numerator * cap // price.denominator
        progress = raised > bound
        bound = max(bound, raised)
        point = (evaluate(problem, found.assignment), found.memory)
        if point[1] <= cap and point[0] < cost:
            best, cost, progress = found.assignment, point[0], True
        if bound >= cost or not progress or point in (over, under):
            break
        over, under = (over, point) if point[1] <= cap else (point, under)
    return _Best(best, cost, min(bound, cost), "lagrangian")


def _priced(problem: Problem, price: Fraction) -> tuple[tuple[Factor, ...], Fraction] | None:
    """Memory as picoseconds at ``price`` per byte, and the price after rounding; None if it leaves the number range."""
    shift = _PRICE_BITS - (price.numerator // price.denominator).bit_length()
    if price < 1:
        shift += (price.denominator // price.numerator).bit_length() - 1
    scaled = int(price * (1 << shift)) if shift >= 0 else int(price / (1 << -shift))
    rounded = Fraction(scaled << max(0, -shift), 1 << max(0, shift))
    tables: dict[int, Table] = {}
    reach = 0
    for factor in (*problem.factors, *problem.memory):
        finite = factor.table[factor.table < INFEASIBLE]
        reach += int(np.abs(finite).max(initial=0))
    for factor in problem.memory:
        if id(factor.table) not in tables:
            exact = factor.table.astype(object) * rounded.numerator // rounded.denominator
            if max(exact.flat, default=0) >= INFEASIBLE // 4 or min(exact.flat, default=0) <= -INFEASIBLE // 4:
                return None
            tables[id(factor.table)] = exact.astype(np.int64)
        reach += int(np.abs(tables[id(factor.table)]).max(initial=0))
    if reach >= INFEASIBLE // 2:
        return None
    return tuple([Factor(factor.variables, tables[id(factor.table)]) for factor in problem.memory]), rounded


def _graph(problem: Problem) -> tuple[Graph, int, int]:
    """Costs and bytes as one graph, and the cost and bytes every assignment has at least."""
    costs, cost_offset = intern_tables(problem.factors)
    memories, memory_offset = intern_tables(problem.memory)
    return Graph(problem.sizes, (*costs, *memories), len(costs), problem.groups), cost_offset, memory_offset


def _labelled(problem: Problem, best: _Best, max_table_entries: int) -> _Best:
    """Elimination over labels cheaper than the best known solution; none left proves that one optimal."""
    graph, cost_offset, memory_offset = _graph(problem)
    algebra = LabelTables(best.cost - 1 - cost_offset, _cap(problem) - memory_offset)
    limit = min(max_table_entries, _LABEL_ENTRIES)
    folded = fold(graph, algebra, limit)
    algebra = LabelTables(algebra.most_cost - folded.cost_offset, algebra.most_memory - folded.memory_offset)
    tables = [(term.scope, algebra.lift(term)) for term in folded.terms]
    first_message = len(tables)
    tables += [(scope, table) for _, _, scope, table in folded.messages]
    outside = [v for v in range(len(problem.sizes)) if v not in folded.interior]
    order = schedule([scope for scope, _ in tables], problem.sizes, outside, limit)
    if order.remaining:
        raise TooManyLabels
    eliminated = eliminate(algebra, problem.sizes, tables, order)
    constants = [((), table) for _, _, table in eliminated.leftovers]
    front, origin = algebra.join(problem.sizes, (), None, constants)
    if not front.cost.size:
        return replace(best, lower_bound=best.cost)
    chosen = {
        number: int(parent[0]) for (number, _, _), parent in zip(eliminated.leftovers, origin.parents, strict=True)
    }
    assignment = dict.fromkeys(outside, 0)
    decode(algebra, eliminated, assignment, chosen)
    inside: list[dict[int, int]] = [{} for _ in folded.instances]
    for position, (instance, number, _, _) in enumerate(folded.messages):
        inside[instance][number] = chosen[first_message + position]
    for labels, folded_group in zip(inside, folded.instances, strict=True):
        unfold(algebra, folded_group, assignment, labels)
    result = tuple([assignment[v] for v in range(len(problem.sizes))])
    bound = int(front.cost[0]) + cost_offset + folded.cost_offset
    cost = evaluate(problem, result)
    if cost != bound or memory_of(problem, result) > _cap(problem):
        raise ColrowError("solver", "the assignment's price contradicts its label", got=cost, need=bound)
    return _Best(result, cost, bound, "labels")


def _ilp(problem: Problem, best: _Best, time_limit_s: float | None) -> _Best:
    """HiGHS on the reduced graph with the cap as a row; what it returns counts only if it fits exactly."""
    graph, cost_offset, memory_offset = _graph(problem)
    everything = range(len(problem.sizes))
    reduced = reduce_domains(problem.sizes, as_terms(graph, range(len(graph.factors))), everything)
    cap = _cap(problem) - memory_offset - reduced.memory_offset
    found = solve_ilp(reduced.sizes, reduced.terms, time_limit_s=time_limit_s, memory_cap=cap)
    if found.infeasible:
        return replace(best, lower_bound=best.cost)
    bound = max(best.lower_bound, cost_offset + reduced.cost_offset + found.lower_bound)
    if found.values is not None:
        values = found.values
        assignment = tuple([int(reduced.kept[v][values.get(v, 0)]) for v in everything])
        cost = evaluate(problem, assignment)
        if memory_of(problem, assignment) <= _cap(problem) and cost < best.cost:
            best = _Best(assignment, cost, bound, "ilp")
    return replace(best, lower_bound=min(bound, best.cost))
