"""Memory caps against enumeration: every route (bound, labels, HiGHS), refusals, and honest gaps."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from solver_graphs import enumerate_all, random_problem, repeated_blocks

from colrow.cost_models.errors import MemoryCapError
from colrow.planner import capped, labels
from colrow.planner.solver import INFEASIBLE, Factor, Problem, evaluate, memory_of, solve


def caps(costs: np.ndarray, memory: np.ndarray, seed: int) -> list[int]:
    """The least bytes an allowed assignment needs, one byte less, and two caps that bind."""
    allowed = np.sort(memory[costs < INFEASIBLE])
    at_best = int(memory[costs == costs.min()].min())
    rng = np.random.default_rng(seed)
    below = allowed[allowed <= at_best]
    return [int(allowed[0]), int(allowed[0]) - 1, at_best - 1, int(rng.choice(below))]


@pytest.mark.parametrize("route", ["labels", "ilp"])
def test_caps_equal_enumeration(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if route == "ilp":
        monkeypatch.setattr(labels, "_MOST_LABELS", 0)
    methods, refused, exact = [], 0, 0
    for seed in range(90 if route == "labels" else 30):
        problem = random_problem(seed, memory=True)
        costs, memory = enumerate_all(problem)
        if costs.min() >= INFEASIBLE:
            continue
        for cap in caps(costs, memory, seed):
            fits = costs[memory <= cap]
            if not fits.size or fits.min() >= INFEASIBLE:
                least = int(memory[costs < INFEASIBLE].min())
                with pytest.raises(MemoryCapError, match=f"need {least} bytes"):
                    solve(replace(problem, memory_cap=cap))
                refused += 1
                continue
            solution = solve(replace(problem, memory_cap=cap))
            assert solution.lower_bound <= fits.min() <= solution.cost, (seed, cap)
            assert solution.cost == evaluate(problem, solution.assignment)
            assert solution.memory == memory_of(problem, solution.assignment) <= cap
            # HiGHS cannot tell sums apart that differ by less than its tolerance, here thousands of bytes; it may then
            # leave a gap, never a wrong proof.
            separable = max(int(factor.table.max()) for factor in problem.memory) < 1000
            if route == "labels":
                assert solution.proven
            elif separable:
                assert solution.cost == fits.min(), (seed, cap)
                exact += 1
            methods.append(solution.method)
    assert {"lagrangian", route} <= set(methods)
    assert refused > 20
    assert route == "labels" or exact > 10


def test_a_cap_that_does_not_bind_changes_nothing() -> None:
    problem = random_problem(1, memory=True)
    free = solve(problem)
    assert solve(replace(problem, memory_cap=free.memory)) == free


def knapsack_blocks(blocks: int, interior: int) -> tuple[Problem, int]:
    """Equal blocks with a choice of bytes in each, and a cap half way between the least and the cheapest."""
    problem = repeated_blocks(blocks, interior, 4, 1, folded=True)
    table = np.array([0, 3, 7, 20]) * 10**7
    chosen = tuple(Factor((block * (interior + 1) + 2,), table) for block in range(blocks))
    problem = replace(problem, memory=chosen)
    return problem, solve(problem).memory // 2


def test_a_cap_on_many_equal_blocks_is_proven() -> None:
    problem, cap = knapsack_blocks(40, 6)
    began = time.process_time()
    solution = solve(replace(problem, memory_cap=cap))
    assert solution.proven
    assert solution.memory <= cap < solve(problem).memory
    assert solution.cost > solve(problem).cost
    assert time.process_time() - began < 30  # a kill limit
    unfolded = solve(replace(problem, memory_cap=cap, groups=()))
    assert (unfolded.cost, unfolded.proven) == (solution.cost, True)


def test_a_narrow_beam_without_time_for_highs_reports_an_honest_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, cap = knapsack_blocks(7, 6)
    best = solve(replace(problem, memory_cap=cap))
    assert best.proven
    monkeypatch.setattr(capped, "_BEAMS", (1,))
    narrow = solve(replace(problem, memory_cap=cap), time_limit_s=0)
    assert not narrow.proven
    assert narrow.lower_bound < narrow.cost
    assert narrow.lower_bound <= best.cost <= narrow.cost
    assert narrow.memory <= cap
