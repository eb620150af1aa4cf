"""The cheapest assignment of a discrete factor graph, exactly.

The problem. Variables v with finite domains D_v, factors f with integer tables over a few variables each, optionally
bytes g of the same form and a cap M:

    minimise  C(x) = sum over f of f(x_f)   over x in D_1 x ... x D_n,   such that  B(x) = sum over g of g(x_g) <= M.

The recurrence. Pick a variable v; let F_v be the tables that read it and s the other variables they read. Then

    min over x of C(x) = min over x without v of [ sum over f not in F_v of f(x_f) + m_v(s) ],
    m_v(s) = min over i in D_v of sum over f in F_v of f(s, i),

because no other table reads v and addition distributes over min. Repeating it leaves constants whose sum is the
optimum, and reading the minimisers back in reverse order gives an assignment that attains it. Saturating addition
(forbidden = top) and integers keep every step exact. Cost is exponential only in the width of the order, which is small
for near-chains.

The terms, and the functions that implement them:

    shift to minimum 0, share equal tables    factor_graph.intern_tables        f = constant + table
    drop impossible, dominated, forced        presolve.reduce_domains           keeps an optimum
    repeated blocks once                      group_folding.fold                equal tables, equal positions: equal m_v
    order of the v                            ordering.schedule                 least table, or fewest edges
    m_v and its minimiser                     elimination.MinPlus.step
    reading back                              elimination.decode
    too wide: integer program on the core     milp.solve_ilp                    the eliminated rest stays exact
    no time for that: relaxed buckets         mini_buckets.mini_bucket_bound    a bound below, an honest gap
    B(x) <= M                                 capped.solve_capped               Lagrangian bound, then labels
    C(x) from scratch                         factor_graph.evaluate

Ties. A variable takes the least domain index that attains the minimum given the variables eliminated after it;
variables of equal priority are eliminated in graph order (lowest index first). Elimination uses integers alone, so the
same problem gives the same solution everywhere.
"""

from __future__ import annotations

from .capped import solve_capped
from .factor_graph import INFEASIBLE, Factor, Problem, Solution, Statistics, evaluate, memory_of, validate
from .uncapped import solve_uncapped

__all__ = ["INFEASIBLE", "Factor", "Problem", "Solution", "Statistics", "evaluate", "memory_of", "solve"]


def solve(problem: Problem, *, max_table_entries: int = 1 << 24, time_limit_s: float | None = 120.0) -> Solution:
    """The cheapest assignment, with a proof or an honest gap.

    Args:
        problem: What to minimise.
        max_table_entries: Most entries of a joined table; past it HiGHS takes over.
        time_limit_s: HiGHS' wall-clock limit, used only past ``max_table_entries``; None for none, 0 for no HiGHS.

    Raises:
        Infeasible: No assignment satisfies all factors, or none was found in time.
        MemoryCapError: None of those that do fits ``memory_cap``; states the least bytes any of them needs.
        ValueError: The problem is malformed.
    """
    validate(problem)
    cheapest = solve_uncapped(problem, max_table_entries, time_limit_s)
    if problem.memory_cap is None or cheapest.memory <= problem.memory_cap:
        return cheapest
    return solve_capped(problem, cheapest, max_table_entries, time_limit_s)
