"""Presolve, order, completions: each keeps the optimum by itself."""

from __future__ import annotations

import numpy as np
import pytest
from solver_graphs import dense_problem, enumerate_all, random_problem

from colrow.cost_models.errors import Infeasible
from colrow.planner.completions import complete
from colrow.planner.ordering import schedule
from colrow.planner.presolve import Term, ascending, reduce_domains
from colrow.planner.solver import INFEASIBLE, Factor, Problem, evaluate


def terms_of(problem: Problem) -> list[Term]:
    """The factors as the solver's stages expect them: scopes ascending, tables shifted to minimum zero."""
    tables = [np.where(f.table < INFEASIBLE, f.table - f.table.min(), INFEASIBLE) for f in problem.factors]
    return [Term(*ascending(f.variables, table)) for f, table in zip(problem.factors, tables, strict=True)]


@pytest.mark.parametrize("dominance", [False, True])
def test_reductions_keep_the_optimum(dominance: bool) -> None:
    shrunk = 0
    for seed in range(80):
        problem = random_problem(seed)
        costs = enumerate_all(problem)[0]
        least = sum(int(factor.table.min()) for factor in problem.factors)
        everything = range(len(problem.sizes))
        if costs.min() >= INFEASIBLE:
            continue
        reduced = reduce_domains(problem.sizes, terms_of(problem), everything, dominance=dominance)
        left = costs[np.ix_(*[reduced.kept[v] for v in everything])]
        assert left.min() == costs.min(), seed
        rest = Problem(tuple(reduced.sizes), tuple(Factor(term.scope, term.cost) for term in reduced.terms))
        assert enumerate_all(rest)[0].min() + reduced.cost_offset + least == costs.min(), seed
        shrunk += left.size < costs.size
    assert shrunk > 20


def test_a_chain_of_implications_fixes_every_variable() -> None:
    equal = np.where(np.eye(3, dtype=bool), 0, INFEASIBLE)
    terms = [Term((v, v + 1), equal) for v in range(5)]
    reduced = reduce_domains((3,) * 6, [*terms, Term((5,), np.array([INFEASIBLE, 4, INFEASIBLE]))], range(6))
    assert [reduced.kept[v].tolist() for v in range(6)] == [[1]] * 6
    assert (reduced.terms, reduced.cost_offset) == ([], 4)
    with pytest.raises(Infeasible, match="variable"):
        reduce_domains((3,) * 6, [*terms, Term((5,), equal[0]), Term((0,), equal[1])], range(6))


def test_dominance_keeps_the_first_of_equals_and_trades_between_factors() -> None:
    equals = Term((0, 1), np.array([[3, 1], [3, 1], [2, 0]]))
    assert reduce_domains((3, 2), [equals, Term((0,), np.array([0, 0, 1]))], range(2)).kept[0].tolist() == [0]
    # Value 1 is dearer by 2 in one factor at worst and cheaper by 3 in the other throughout.
    trade = [Term((0, 1), np.array([[0, 1], [2, 0]])), Term((0,), np.array([3, 0]))]
    assert reduce_domains((2, 2), trade, range(2)).kept[0].tolist() == [1]
    # Cheaper but heavier: neither goes.
    heavier = Term((0,), np.array([3, 0]), np.array([0, 1]))
    assert reduce_domains((2,), [heavier], range(1)).kept[0].tolist() == [0, 1]


def test_a_dominating_value_must_be_allowed_wherever_the_other_is() -> None:
    barred = Term((0, 1), np.array([[0, INFEASIBLE], [5, 5]]))
    free = Term((1,), np.array([0, 0]))
    reduced = reduce_domains((2, 2), [barred, free, Term((1,), np.array([9, 0]))], [0])
    assert reduced.kept[0].tolist() == [0, 1]


def test_only_interior_variables_lose_values() -> None:
    reduced = reduce_domains((2, 2), [Term((0, 1), np.array([[0, 1], [INFEASIBLE] * 2]))], [1])
    assert 0 not in reduced.kept
    assert reduced.sizes[0] == 2


def test_the_order_respects_the_limit_and_names_what_is_left() -> None:
    problem = dense_problem(12, 3, 1)
    scopes = [tuple(sorted(factor.variables)) for factor in problem.factors]
    full = schedule(scopes, problem.sizes, range(12), 3**12)
    assert not full.remaining
    assert {step.variable for step in full.steps} == {v for scope in scopes for v in scope}
    part = schedule(scopes, problem.sizes, range(12), 3**4)
    assert part.remaining
    assert part.largest <= 3**4
    assert len(part.steps) + len(part.remaining) == len(full.steps)


def test_a_star_is_eliminated_from_its_leaves() -> None:
    order = schedule([(0, leaf) for leaf in range(1, 9)], (4,) * 9, range(9), 10**6)
    assert [step.variable for step in order.steps[:7]] == [1, 2, 3, 4, 5, 6, 7]
    assert (order.width, order.largest) == (1, 16)


def test_completions_give_every_table_its_exact_cost_to_go() -> None:
    for seed in range(20):
        problem = random_problem(2 * seed)
        # All entries allowed, so that sums compare exactly.
        tables = [Term(term.scope, np.minimum(term.cost, 10**13)) for term in terms_of(problem)]
        plain = Problem(problem.sizes, tuple(Factor(t.scope, t.cost) for t in tables))
        costs = enumerate_all(plain)[0]
        order = schedule([t.scope for t in tables], problem.sizes, range(len(problem.sizes)), 10**9)
        completions = complete(problem.sizes, [(t.scope, t.cost) for t in tables], order)
        for step in order.steps:
            scope, table = completions.tables[step.output]
            through = table + completions.outside[step.output]
            axes = tuple(v for v in range(len(problem.sizes)) if v not in scope)
            assert (through == costs.min(axis=axes)).all(), (seed, step)
            joined = (*step.scope, step.variable)
            rest = completions.rest(problem.sizes, step, 0).reshape([problem.sizes[v] for v in joined])
            least = costs.min(axis=tuple(v for v in range(costs.ndim) if v not in joined))
            assert (rest == least.transpose([sorted(joined).index(v) for v in joined])).all()
        assert completions.constant(0) == costs.min() == evaluate(plain, np.unravel_index(costs.argmin(), costs.shape))
