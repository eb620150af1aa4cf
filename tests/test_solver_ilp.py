"""Past the table limit: HiGHS agrees with elimination, and what is not proven shows a gap."""

from __future__ import annotations

import pytest
from solver_graphs import dense_problem, enumerate_all, random_problem, repeated_blocks

from colrow.cost_models.errors import Infeasible
from colrow.planner import uncapped
from colrow.planner.mini_buckets import mini_bucket_bound
from colrow.planner.presolve import Term, ascending
from colrow.planner.solver import INFEASIBLE, Problem, evaluate, solve


def test_ilp_equals_enumeration() -> None:
    used = 0
    for seed in range(60):
        problem = random_problem(seed)
        costs = enumerate_all(problem)[0]
        if costs.min() >= INFEASIBLE:
            with pytest.raises(Infeasible):
                solve(problem, max_table_entries=4)
            continue
        solution = solve(problem, max_table_entries=4)
        assert solution.cost == costs.min(), seed
        assert solution.lower_bound <= solution.cost
        # Costs near 1e12 may leave HiGHS' float bound a hair below; it is then reported, not rounded away.
        assert solution.cost - solution.lower_bound <= 2e-7 * 2e12 * len(problem.factors)
        assert solution.proven == (solution.lower_bound == solution.cost)
        used += solution.method == "elimination+ilp"
    assert used > 20


def test_small_integers_are_proven_by_the_ilp() -> None:
    problem = dense_problem(9, 3, 0)
    exact, ilp = solve(problem), solve(problem, max_table_entries=27)
    assert ilp.method == "elimination+ilp"
    assert ilp.statistics.ilp_columns > 0
    assert ilp.proven
    assert ilp.cost == exact.cost == ilp.lower_bound


def test_folded_blocks_too_wide_for_the_limit() -> None:
    problem = repeated_blocks(4, 6, 3, 3, folded=True, highest=50)
    assert solve(problem, max_table_entries=9).cost == solve(problem).cost


@pytest.mark.parametrize("seed", range(5))
def test_a_capped_table_reports_an_honest_gap(seed: int) -> None:
    problem = dense_problem(10, 3, seed)
    best = solve(problem).cost
    capped = solve(problem, max_table_entries=27, time_limit_s=0)
    assert capped.method == "elimination+mini-buckets"
    assert not capped.proven
    assert capped.lower_bound < capped.cost
    assert capped.lower_bound <= best <= capped.cost == evaluate(problem, capped.assignment)


def test_a_time_limit_reports_an_honest_gap() -> None:
    problem = dense_problem(40, 3, 0)
    limited = solve(problem, max_table_entries=81, time_limit_s=0.05)
    assert not limited.proven
    assert 0 < limited.lower_bound < limited.cost == evaluate(problem, limited.assignment)


def test_a_wrong_candidate_of_highs_is_repriced_and_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = uncapped.solve_ilp

    def worse(sizes, terms, **options):
        found = real(sizes, terms, **options)
        flipped = {v: (value + 1) % sizes[v] for v, value in found.values.items()}
        return type(found)(flipped, found.lower_bound, False, found.columns)

    problem = dense_problem(9, 3, 0)
    best = solve(problem).cost
    monkeypatch.setattr(uncapped, "solve_ilp", worse)
    monkeypatch.setattr(uncapped, "mini_bucket_bound", lambda sizes, terms, limit: (0, None))
    solution = solve(problem, max_table_entries=27)
    assert solution.cost == evaluate(problem, solution.assignment) > best == solution.lower_bound
    assert not solution.proven


def test_mini_buckets_bound_from_below_and_close_with_large_tables() -> None:
    for seed in range(30):
        problem: Problem = dense_problem(8, 3, seed)
        terms = [Term(*ascending(factor.variables, factor.table)) for factor in problem.factors]
        best = int(enumerate_all(problem)[0].min())
        bounds = [mini_bucket_bound(problem.sizes, terms, limit)[0] for limit in (27, 3**8)]
        assert bounds[0] <= best == bounds[1]
