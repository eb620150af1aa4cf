"""The cheapest assignment of a discrete factor graph, exactly.

The problem. Variables v with finite domains D_v, factors f with integer tables over a few variables each, optionally bytes g
of the same form and a cap M:

    minimise  C(x) = sum over f of f(x_f)       over x in D_1 x ... x D_n,     such that  B(x) = sum over g of g(x_g) <= M.

The recurrence. Pick a variable v; let F_v be the tables that read it and s the other variables they read. Then

    min over x of C(x) = min over x without v of [ sum over f not in F_v of f(x_f) + m_v(s) ],
    m_v(s) = min over i in D_v of sum over f in F_v of f(s, i),

because no other table reads v and addition distributes over min. Repeating it leaves constants whose sum is the optimum, and
reading the minimisers back in reverse order gives an assignment that attains it. Saturating addition (forbidden = top) and
integers keep every step exact. Cost is exponential only in the width of the order used, which is small for near-chains.

The terms, and the functions that implement them:

    shift to min 0, intern equal tables      factor_graph.intern_tables     f = constant + table
    drop impossible, dominated, forced       presolve.reduce_domains        keeps the optimum
    repeated blocks once                     group_folding.fold             m_v depends on tables and positions only
    order of the v                           ordering.schedule              least table or fewest edges first
    m_v and its minimiser                    elimination.MinPlus.step
    reading back                             elimination.decode
    too wide: integer program on the core    milp.solve_ilp                 elimination of the rest first is still exact
    no time for it: relaxed buckets          mini_buckets.mini_bucket_bound  a bound below, honest gap
    memory cap                               capped.solve_capped            Lagrangian bound, then (cost, bytes) labels
    C(x) from scratch                        factor_graph.evaluate

Ties. A variable takes the least domain index that attains the minimum given the variables eliminated after it; variables of
equal priority are eliminated in graph order (lowest index first). The same problem gives the same solution on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colrow.cost_models.errors import ColrowError, Infeasible

from .capped import solve_capped
from .elimination import MinPlus, decode, eliminate
from .factor_graph import (
    INFEASIBLE,
    Factor,
    Problem,
    Solution,
    Statistics,
    Table,
    evaluate,
    intern_tables,
    memory_of,
    validate,
)
from .group_folding import Folded, Graph, fold, unfold
from .milp import solve_ilp
from .mini_buckets import mini_bucket_bound
from .ordering import Schedule, schedule
from .presolve import Reduced, Term, ascending, reduce_domains

__all__ = ["INFEASIBLE", "Factor", "Problem", "Solution", "Statistics", "evaluate", "memory_of", "solve"]

_DOMINANCE_ABOVE = 1 << 12  # entries of the largest table; below it eliminating a value costs less than comparing it
_CORE_TABLE = 1 << 10  # entries of a joined table up to which eliminating beats handing the variable to HiGHS


def solve(
    problem: Problem, *, max_table_entries: int = 1 << 24, time_limit_s: float | None = 120.0
) -> Solution:
    """The cheapest assignment, with a proof or an honest gap.

    Args:
        problem: What to minimise.
        max_table_entries: Most entries of a joined table; past it HiGHS takes over.
        time_limit_s: HiGHS' wall-clock limit, used only past ``max_table_entries``; None for none.

    Raises:
        Infeasible: No assignment satisfies all factors.
        MemoryCapError: None of those that do fits ``memory_cap``; states the least bytes any needs.
        ValueError: The problem is malformed.
    """
    validate(problem)
    solution = solve_uncapped(problem, max_table_entries, time_limit_s)
    if problem.memory_cap is None or solution.memory <= problem.memory_cap:
        return solution
    return solve_capped(problem, solution, max_table_entries, time_limit_s)


def solve_uncapped(problem: Problem, max_table_entries: int, time_limit_s: float | None) -> Solution:
    """``solve`` without the memory cap, the problem being valid."""
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
    offset += folded.cost_offset + reduced.cost_offset
    core = [Term(scope, table) for _, scope, table in eliminated.leftovers if scope]
    constants = sum(int(table) for _, scope, table in eliminated.leftovers if not scope)
    bound, values, columns, method = offset + constants, dict[int, int](), 0, "elimination"
    if constants >= INFEASIBLE:
        raise nothing_satisfies()
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
    largest = [order, *[instance.template.eliminated.schedule for instance in folded.instances]]
    statistics = Statistics(
        largest_table=max(part.largest for part in largest),
        width=max(part.width for part in largest),
        groups=len(folded.instances),
        distinct_groups=folded.distinct,
        ilp_columns=columns,
    )
    return Solution(result, cost, bound, cost == bound, method, memory_of(problem, result), statistics)


def _prepare(sizes: Sequence[int], folded: Folded[Table], limit: int) -> tuple[Reduced, Schedule]:
    """Reduce the folded graph and order its elimination; compare values only where tables are large."""
    terms = list(folded.terms)
    for _, _, variables, table in folded.messages:
        terms.append(Term(*ascending(variables, table)))
    outside = [v for v in range(len(sizes)) if v not in folded.interior]
    for dominance in (False, True):
        reduced = reduce_domains(sizes, terms, outside, dominance=dominance)
        order = schedule([term.scope for term in reduced.terms], reduced.sizes, outside, limit)
        if order.largest <= _DOMINANCE_ABOVE and not order.remaining:
            break
    return reduced, order


@dataclass(frozen=True)
class _Core:
    values: dict[int, int]
    lower_bound: int
    columns: int
    method: str


def _solve_core(sizes: Sequence[int], core: Sequence[Term], max_table_entries: int, time_limit_s: float | None) -> _Core:
    """HiGHS on what is too wide to eliminate; relaxed buckets for what it leaves open."""
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


def nothing_satisfies() -> Infeasible:
    """The error for a problem without any assignment."""
    return Infeasible("solver", "no assignment satisfies all factors", remedy="Loosen a pin or allow more placements.")
