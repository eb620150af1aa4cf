"""The solver against enumeration, and what it promises: determinism, folding, no overflow, clear refusals."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from solver_graphs import enumerate_all, random_problem, repeated_blocks

from colrow.cost_models.errors import Infeasible
from colrow.planner.solver import INFEASIBLE, Factor, Problem, evaluate, solve


@pytest.mark.parametrize("chunk", range(8))
def test_equals_enumeration(chunk: int) -> None:
    infeasible = 0
    for seed in range(50 * chunk, 50 * (chunk + 1)):
        problem = random_problem(seed)
        best = int(enumerate_all(problem)[0].min())
        if best >= INFEASIBLE:
            infeasible += 1
            with pytest.raises(Infeasible):
                solve(problem)
            continue
        solution = solve(problem)
        assert (solution.cost, solution.lower_bound, solution.proven) == (best, best, True), seed
        assert evaluate(problem, solution.assignment) == best
        assert solution.method == "elimination"
    assert infeasible < 25


def test_evaluate_is_the_sum_of_the_given_tables_and_saturates() -> None:
    table = np.array([[1, 2, 3], [4, 5, INFEASIBLE]])
    problem = Problem((3, 2), (Factor((1, 0), table), Factor((0,), np.array([10, 20, INFEASIBLE]))))
    assert evaluate(problem, (1, 0)) == 22
    assert evaluate(problem, (0, 1)) == 14
    assert evaluate(problem, (2, 1)) == INFEASIBLE


def test_ties_take_the_first_value() -> None:
    zeros = Problem((3,) * 6, tuple(Factor((v, v + 1), np.zeros((3, 3), np.int64)) for v in range(5)))
    assert solve(zeros).assignment == (0,) * 6
    late = replace(zeros, factors=(*zeros.factors, Factor((2,), np.array([5, 1, 1]))))
    assert solve(late).assignment == (0, 0, 1, 0, 0, 0)


def test_a_variable_without_factors_takes_the_first_value() -> None:
    assert solve(Problem((2, 3), (Factor((0,), np.array([4, 1])),), groups=((1,),))).assignment == (1, 0)
    assert solve(Problem((), ())).assignment == ()


def test_equal_problems_give_equal_solutions_whatever_the_hash_seed() -> None:
    script = (
        "from solver_graphs import random_problem, dense_problem\n"
        "from colrow.planner.solver import solve\n"
        "from colrow.cost_models.errors import Infeasible\n"
        "for seed in range(40):\n"
        "    try: print(solve(random_problem(seed)))\n"
        "    except Infeasible as error: print(error)\n"
        "print(solve(dense_problem(10, 3, 0), max_table_entries=27))\n"
    )
    answers = set()
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=Path(__file__).parent, env=environment, capture_output=True, check=True
        )
        answers.add(done.stdout)
    assert len(answers) == 1
    assert b"Solution" in answers.pop()


@pytest.mark.parametrize("seed", range(12))
def test_folded_equals_unfolded(seed: int) -> None:
    folded = solve(repeated_blocks(6, 7, 3, seed, folded=True, highest=20))
    unfolded = solve(repeated_blocks(6, 7, 3, seed, folded=False, highest=20))
    assert folded.cost == unfolded.cost
    assert folded.proven and unfolded.proven
    assert (folded.statistics.groups, folded.statistics.distinct_groups) == (6, 1)


@pytest.mark.parametrize("seed", range(6))
def test_folded_blocks_equal_enumeration(seed: int) -> None:
    problem = repeated_blocks(3, 2, 3, seed, folded=True, highest=5)
    assert solve(problem).cost == int(enumerate_all(problem)[0].min())


def test_groups_fold_by_content_and_one_different_entry_separates_them() -> None:
    problem = repeated_blocks(4, 5, 3, 0, folded=True)
    copies = tuple(Factor(factor.variables, factor.table.copy()) for factor in problem.factors)
    assert solve(replace(problem, factors=copies)).statistics.distinct_groups == 1
    changed = copies[0].table.copy()
    changed.flat[0] += 1
    other = solve(replace(problem, factors=(Factor(copies[0].variables, changed), *copies[1:])))
    assert other.statistics.distinct_groups == 2
    # A constant difference is no difference: it is priced, and the elimination is shared.
    shifted = replace(problem, factors=(Factor(copies[0].variables, copies[0].table + 7), *copies[1:]))
    assert solve(shifted).statistics.distinct_groups == 1
    assert solve(shifted).cost == solve(problem).cost + 7


def test_equal_tables_at_other_positions_are_another_group() -> None:
    table = np.array([[0, 5], [7, 1]])
    factors = (Factor((0, 1), table), Factor((3, 2), table), Factor((0, 2), np.array([[0, 9], [9, 0]])))
    problem = Problem((2,) * 4, factors, groups=((1,), (3,)))
    mirrored = replace(problem, groups=((0,), (3,)))
    assert solve(problem).statistics.distinct_groups == 2
    assert solve(problem).cost == solve(mirrored).cost == int(enumerate_all(problem)[0].min())


def test_groups_that_touch_each_other_or_are_too_wide_only_cost_speed() -> None:
    problem = random_problem(4)
    number = len(problem.sizes)
    best = int(enumerate_all(problem)[0].min())
    for groups in ((tuple(range(number)),), ((0, 1, 2, 3), (4, 5, 6, 7)), tuple((v,) for v in range(number)), ((),)):
        assert solve(replace(problem, groups=groups)).cost == best
        assert solve(replace(problem, groups=groups), max_table_entries=24).cost == best


def test_126_blocks_of_60_variables_are_eliminated_once() -> None:
    problem = repeated_blocks(126, 60, 5, 0, folded=True)
    began = time.process_time()
    solution = solve(problem)
    seconds = time.process_time() - began
    assert solution.proven
    assert (solution.statistics.groups, solution.statistics.distinct_groups) == (126, 1)
    assert seconds < 10  # a kill limit; 0.25 s where it was written


def test_forbidden_entries_never_wrap_around() -> None:
    forbidding = np.full((2, 2), INFEASIBLE)
    forbidding[1, 1] = 3
    scopes = [(v, w) for v in range(6) for w in range(v)]
    problem = Problem((2,) * 6, tuple(Factor(scope, forbidding) for scope in scopes))
    assert solve(problem).assignment == (1,) * 6
    assert solve(problem).cost == 45
    pinned = Factor((2,), np.array([0, np.iinfo(np.int64).max]))
    with pytest.raises(Infeasible, match="factor|variable|solver"):
        solve(replace(problem, factors=(*problem.factors, pinned)))


def test_large_costs_keep_their_last_digit() -> None:
    base = 1 << 54
    table = np.array([[base + 1, base], [base, base + 3]])
    problem = Problem((2,) * 8, tuple(Factor((v, (v + 1) % 8), table) for v in range(8)))
    assert solve(problem).cost == 8 * base
    negative = Problem((2,), (Factor((0,), np.array([-base, -base - 1])), Factor((0,), np.array([0, INFEASIBLE]))))
    assert solve(negative).cost == -base


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (Problem((2,), (Factor((0, 0), np.zeros((2, 2), np.int64)),)), "not distinct"),
        (Problem((2,), (Factor((1,), np.zeros(2, np.int64)),)), "indices below 1"),
        (Problem((2,), (Factor((0,), np.zeros(3, np.int64)),)), "does not fit"),
        (Problem((2,), (Factor((0,), np.zeros(2)),)), "float64"),
        (Problem((0,), ()), "at least one value"),
        (Problem((2,), (Factor((0,), np.array([0, 1 << 58])),) * 3), "larger unit"),
        (Problem((2,), (Factor((0,), np.array([0, -(1 << 62)])),)), "above -INFEASIBLE"),
        (Problem((2, 2), (), groups=((0,), (0, 1))), "disjoint"),
        (Problem((2,), (), memory=(Factor((0,), np.array([0, INFEASIBLE])),)), "finite"),
    ],
)
def test_malformed_problems_are_refused(problem: Problem, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(problem)


def test_an_impossible_interior_is_infeasible() -> None:
    clash = (Factor((0,), np.array([0, INFEASIBLE])), Factor((0,), np.array([INFEASIBLE, 0])))
    for groups in ((), ((0,),)):
        with pytest.raises(Infeasible):
            solve(Problem((2, 2), (*clash, Factor((0, 1), np.zeros((2, 2), np.int64))), groups=groups))
