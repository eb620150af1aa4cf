"""The steps of an uncapped solve in order: fold, reduce, eliminate, hand a wide core to HiGHS, read back, re-price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colrow.cost_models.errors import ColrowError, Infeasible

from .elimination import MinPlus, decode, eliminate
from .factor_graph import INFEASIBLE, Problem, Solution, Statistics, Table, evaluate, intern_tables, memory_of
from .group_folding import Folded, Graph, fold, unfold
from .milp import solve_ilp
from .mini_buckets import mini_bucket_bound
from .ordering import Schedule, schedule
from .presolve import Reduced, Term, ascending, nothing_satisfies, reduce_domains

_COMPARING = 1 << 16  # joined entries that cost as much as comparing one variable's values (0.4 ms, 2026-11)
_CORE_TABLE = 1 << 10  # entries of a joined table up to which eliminating beats handing the variable to HiGHS


def solve_uncapped(problem: Problem, max_table_entries: int, time_limit_s: float | None) -> Solution:
    """The cheapest assignment of a valid problem, its memory cap apart; arguments and errors as of ``solver.solve``."""
    factors, offset = intern_tables(problem.factors)
    graph = Graph(problem.sizes, tuple(factors), len(factors), problem.groups)
    algebra = MinPlus()
    folded = fold(graph, algebra, max_table_entries)
    reduced, order = _prepare(problem.sizes, folded, max_table_entries)
    if order.remaining:  # too wide: eliminate what is cheap, and leave the core to HiGHS
        small = min(max_table_entries, _CORE_TABLE)
        folded = fold(graph, algebra, small)
        reduced, order = _prepare(problem.sizes, folded, small)
    eliminated = eliminate(algebra, reduced.sizes, [(term.scope, term.cost) for term in reduced.terms], order)
    core = [Term(scope, table) for _, scope, table in eliminated.leftovers if scope]
    constants = sum(int(table) for _, scope, table in eliminated.leftovers if not scope)
    if constants >= INFEASIBLE:
        raise nothing_satisfies()
    bound = offset + folded.cost_offset + reduced.cost_offset + constants
    values: dict[int, int] = {}
    columns, method = 0, "elimination"
    if core:
        found = _solve_core(reduced.sizes, core, max_table_entries, time_limit_s)
        bound, columns, method = bound + found.lower_bound, found.columns, f"elimination+{found.method}"
        values.update(found.values)
    decode(algebra, eliminated, values, {})
    assignment = {v: int(kept[values.get(v, 0)]) for v, kept in reduced.kept.items()}
    for instance in folded.instances:
        unfold(algebra, instance, assignment, {})
    result = tuple([assignment[v] for v in range(len(problem.sizes))])
    cost = evaluate(problem, result)
    if cost < bound or cost >= INFEASIBLE or (not core and cost != bound):
        raise ColrowError("solver", "the assignment's price contradicts the bound", got=cost, need=bound)
    schedules = [order, *[instance.template.eliminated.schedule for instance in folded.instances]]
    statistics = Statistics(
        largest_table=max(part.largest for part in schedules),
        width=max(part.width for part in schedules),
        groups=len(folded.instances),
        distinct_groups=folded.distinct,
        ilp_columns=columns,
    )
    return Solution(result, cost, bound, cost == bound, method, memory_of(problem, result), statistics)


def _prepare(sizes: Sequence[int], folded: Folded[Table], limit: int) -> tuple[Reduced, Schedule]:
    """Reduce the folded graph and order its elimination; values are compared only where that saves time."""
    terms = list(folded.terms)
    for _, _, variables, table in folded.messages:
        terms.append(Term(*ascending(variables, table)))
    outside = [v for v in range(len(sizes)) if v not in folded.interior]
    for dominance in (False, True):
        reduced = reduce_domains(sizes, terms, outside, dominance=dominance)
        order = schedule([term.scope for term in reduced.terms], reduced.sizes, outside, limit)
        if order.work <= _COMPARING * len(outside) and not order.remaining:
            break
    return reduced, order


@dataclass(frozen=True)
class _Core:
    values: dict[int, int]
    lower_bound: int
    columns: int
    method: str


def _solve_core(
    sizes: Sequence[int], core: Sequence[Term], max_table_entries: int, time_limit_s: float | None
) -> _Core:
    """HiGHS on what is too wide to eliminate; mini-buckets for what it leaves open."""
    bound, columns = 0, 0
    candidates: list[tuple[int, str, dict[int, int]]] = []

    def offer(method: str, values: dict[int, int] | None) -> None:
        if values is not None:
            price = sum(term.cost.item(*[values[v] for v in term.scope]) for term in core)
            if price < INFEASIBLE:
                candidates.append((price, method, values))

    if time_limit_s != 0:
        found = solve_ilp(sizes, core, time_limit_s=time_limit_s)
        if found.infeasible:
            raise nothing_satisfies()
        bound, columns = found.lower_bound, found.columns
        offer("ilp", found.values)
    if not candidates or candidates[0][0] > bound:
        relaxed, values = mini_bucket_bound(sizes, core, max_table_entries)
        bound = max(bound, relaxed)
        offer("mini-buckets", values)
    if bound >= INFEASIBLE:
        raise nothing_satisfies()
    if not candidates:
        raise Infeasible(
            "solver",
            "no assignment was found in time, nor shown to be impossible",
            got=f"{time_limit_s} s and tables of {max_table_entries} entries",
            remedy="Allow more time or larger tables.",
        )
    _, method, best = min(candidates, key=lambda candidate: candidate[0])
    return _Core(best, bound, columns, method)
