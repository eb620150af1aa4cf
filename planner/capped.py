"""The cheapest assignment within a memory cap M.

    least bytes    min over x of B(x): above M, no assignment fits                                      _least_bytes
    bound          L(l) = min over x of [C(x) + l B(x)] - l M <= optimum, for every price l >= 0        _price_memory
    optimum        elimination over (cost, bytes) labels, or HiGHS with one more row                    _labelled, _ilp

Each L(l) is an ordinary solve, with the groups folded. The price is chosen as the slope between the cheapest assignment
known that does not fit and the cheapest that does (Handler and Zang, Networks 10, 1980), which converges in a few steps
to the best bound; often the two meet and nothing remains to be done. Prices are dyadic fractions and every product is
rounded down, so all of it stays in integers and below the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor, log2

import numpy as np

from colrow.cost_models.errors import ColrowError, Infeasible, MemoryCapError

from .completions import complete
from .elimination import decode, eliminate
from .factor_graph import INFEASIBLE, Factor, Problem, Solution, Table, evaluate, intern_tables, memory_of
from .group_folding import Graph, as_terms, fold, unfold
from .labels import LabelTables, TooManyLabels
from .milp import MEMORY_SLACK, solve_ilp
from .ordering import schedule
from .presolve import ascending, reduce_domains
from .uncapped import solve_uncapped

_LABEL_ENTRIES = 1 << 20  # entries of a joined label table; more means HiGHS
_PRICE_BITS = 24  # of a price: 0.1 ppm; fewer where price times cap would not fit int64
_BEAMS = (1 << 10, 1 << 14, 1 << 18)  # labels per join: a first pass finds good solutions, the next prove them
_CANDIDATES = 5  # of HiGHS that may pass the cap by its slack before a lower cap is tried
_PRICE_STEPS = 60  # Handler and Zang's iteration ends by itself; this only bounds it


@dataclass(frozen=True)
class _Best:
    """The cheapest assignment known to fit and the best bound known."""

    assignment: tuple[int, ...]
    cost: int
    lower_bound: int
    method: str
    price: Fraction  # of a byte in picoseconds, where the Lagrangian bound was best
    priced_bound: int  # that bound


def solve_capped(problem: Problem, cheapest: Solution, max_table_entries: int, time_limit_s: float | None) -> Solution:
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
            for beam in _BEAMS:
                if best.lower_bound < best.cost:
                    best = _labelled(problem, best, max_table_entries, beam)
        except TooManyLabels:
            pass
    if best.lower_bound < best.cost and time_limit_s != 0:
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
        return _Best((), INFEASIBLE, bound, "lagrangian", Fraction(0), bound)
    best_price, priced_bound = Fraction(0), bound
    best, cost = least.assignment, evaluate(problem, least.assignment)
    over, under = (cheapest.cost, cheapest.memory), (cost, least.memory)
    for _ in range(_PRICE_STEPS):
        if under[0] <= over[0]:
            break  # dearer and heavier: only an unproven uncapped solution can be
        price = Fraction(under[0] - over[0], over[1] - under[1])
        priced = _priced(problem, price, cap)
        if priced is None:
            break
        factors, price = priced
        found = solve_uncapped(replace(problem, factors=problem.factors + factors), max_table_entries, time_limit_s)
        raised = found.lower_bound - price.numerator * cap // price.denominator
        progress = raised > bound
        if progress:
            bound = priced_bound = raised
            best_price = price
        point = (evaluate(problem, found.assignment), found.memory)
        if point[1] <= cap and point[0] < cost:
            best, cost, progress = found.assignment, point[0], True
        if bound >= cost or not progress or point in (over, under):
            break
        over, under = (over, point) if point[1] <= cap else (point, under)
    return _Best(best, cost, min(bound, cost), "lagrangian", best_price, priced_bound)


def _priced(problem: Problem, price: Fraction, cap: int) -> tuple[tuple[Factor, ...], Fraction] | None:
    """Memory as picoseconds at ``price`` per byte, and the price after rounding; None if it leaves the number range."""
    most = abs(cap) + sum(int(np.abs(factor.table).max(initial=0)) for factor in problem.memory)
    bits = min(_PRICE_BITS, 61 - most.bit_length())
    shift = bits - 1 - floor(log2(price))
    rounded = Fraction(floor(price * Fraction(2) ** shift)) / Fraction(2) ** shift
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


def _labelled(problem: Problem, best: _Best, max_table_entries: int, beam: int) -> _Best:
    """Elimination over the ``beam`` most promising labels; the bound says what the others could still hide."""
    graph, cost_offset, memory_offset = _graph(problem)
    inside = LabelTables(best.price, _cap(problem) - memory_offset, best.cost - 1, beam, best.priced_bound)
    limit = min(max_table_entries, _LABEL_ENTRIES)
    folded = fold(graph, inside, limit)
    cost_offset += folded.cost_offset
    cap = inside.most_memory - folded.memory_offset
    outside = LabelTables(best.price, cap, best.cost - 1 - cost_offset, beam, 0)
    tables = [(term.scope, outside.lift(term)) for term in folded.terms]
    first_message = len(tables)
    tables += [(scope, table) for _, _, scope, table in folded.messages]
    variables = [v for v in range(len(problem.sizes)) if v not in folded.interior]
    order = schedule([scope for scope, _ in tables], problem.sizes, variables, limit)
    if order.remaining:
        raise TooManyLabels
    priced = [ascending(scope, table.least(outside.priced(table.cost, table.memory))) for scope, table in tables]
    lightest = [ascending(scope, table.least(table.memory)) for scope, table in tables]
    outside.rest = (complete(problem.sizes, priced, order), complete(problem.sizes, lightest, order))
    eliminated = eliminate(outside, problem.sizes, tables, order)
    costs, _, parents = outside.front([table for _, _, table in eliminated.leftovers])
    lost = min(inside.lost, outside.lost + cost_offset)
    if not costs.size or int(costs[0]) + cost_offset >= best.cost:
        return replace(best, lower_bound=max(best.lower_bound, min(best.cost, lost)))
    chosen = {number: int(parent[0]) for (number, _, _), parent in zip(eliminated.leftovers, parents, strict=True)}
    assignment = dict.fromkeys(variables, 0)
    decode(outside, eliminated, assignment, chosen)
    labels: list[dict[int, int]] = [{} for _ in folded.instances]
    for position, (group, number, _, _) in enumerate(folded.messages):
        labels[group][number] = chosen[first_message + position]
    for group_labels, instance in zip(labels, folded.instances, strict=True):
        unfold(inside, instance, assignment, group_labels)
    result = tuple([assignment[v] for v in range(len(problem.sizes))])
    cost = evaluate(problem, result)
    if cost != int(costs[0]) + cost_offset or memory_of(problem, result) > _cap(problem):
        raise ColrowError("solver", "the assignment's price contradicts its label", got=cost, need=int(costs[0]))
    bound = max(best.lower_bound, min(cost, lost))
    return replace(best, assignment=result, cost=cost, lower_bound=bound, method="labels")


def _ilp(problem: Problem, best: _Best, time_limit_s: float | None) -> _Best:
    """HiGHS on the reduced graph with the cap as a row; what it returns counts only if it fits exactly."""
    graph, cost_offset, memory_offset = _graph(problem)
    everything = range(len(problem.sizes))
    reduced = reduce_domains(problem.sizes, as_terms(graph, range(len(graph.factors))), everything)
    cap = _cap(problem) - memory_offset - reduced.memory_offset
    heaviest = max(int(term.memory.max()) for term in reduced.terms if term.memory is not None)
    strict = cap - ceil(2 * MEMORY_SLACK * heaviest)
    excluded: list[dict[int, int]] = []
    for attempt in range(_CANDIDATES + 1):
        tried = cap if attempt < _CANDIDATES else strict  # the last one fits, but bounds nothing
        found = solve_ilp(reduced.sizes, reduced.terms, time_limit_s=time_limit_s, memory_cap=tried, excluded=excluded)
        bound = best.lower_bound
        if tried == cap:
            bound = max(bound, cost_offset + reduced.cost_offset + found.lower_bound)
            best = replace(best, lower_bound=best.cost if found.infeasible else min(bound, best.cost))
        if found.values is None:
            return best
        values = found.values
        assignment = tuple([int(reduced.kept[v][values.get(v, 0)]) for v in everything])
        cost = evaluate(problem, assignment)
        if memory_of(problem, assignment) <= _cap(problem):
            if cost < best.cost:
                best = replace(best, assignment=assignment, cost=cost, lower_bound=min(bound, cost), method="ilp")
            return best
        excluded.append(values)
    return best
