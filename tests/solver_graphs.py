"""Random factor graphs and their optimum by enumeration, shared by the solver's tests; imports no solving code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from colrow.planner.solver import INFEASIBLE, Factor, Problem


def random_problem(seed: int, *, memory: bool = False) -> Problem:
    """8 to 10 variables: n-ary factors, a shared variable, ties, forbidden entries, pins and groups."""
    rng = np.random.default_rng(seed)
    number = int(rng.integers(8, 11))
    sizes = tuple(int(size) for size in rng.choice([1, 2, 2, 3, 3, 4], number))
    highest = int(rng.choice([2, 50, 10**12]))
    density = float(rng.choice([0.0, 0.05, 0.2]))
    shared = int(rng.integers(number))
    factors = []
    for _ in range(int(rng.integers(number, 2 * number))):
        scope = [int(v) for v in rng.permutation(number)[: int(rng.integers(1, 5))]]
        if rng.random() < 0.3 and shared not in scope:
            scope[0] = shared
        table = rng.integers(-highest // 2, highest, [sizes[v] for v in scope])
        table[rng.random(table.shape) < density] = INFEASIBLE
        factors.append(Factor(tuple(scope), table))
    if seed % 3 == 0:
        pinned = int(rng.integers(number))
        table = np.full(sizes[pinned], INFEASIBLE)
        table[int(rng.integers(sizes[pinned]))] = 0
        factors.append(Factor((pinned,), table))
    order = [int(v) for v in rng.permutation(number)]
    groups = (tuple(order[:3]), tuple(order[3:5]), tuple(order[5:7])) if seed % 2 else ()
    problem = Problem(sizes, tuple(factors), groups)
    if not memory:
        return problem
    scale = [3, 50] if seed % 4 else [3, 10**9]
    weights = [Factor((v,), rng.integers(0, int(rng.choice(scale)), sizes[v])) for v in range(number)]
    weights.append(Factor((1, 0), rng.integers(-5, 60, (sizes[1], sizes[0]))))
    return replace(problem, memory=tuple(weights))


def enumerate_all(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Cost (forbidden: INFEASIBLE) and bytes of every assignment, one dim per variable."""
    grid = np.indices(problem.sizes)
    cost, memory = np.zeros(problem.sizes, np.int64), np.zeros(problem.sizes, np.int64)
    allowed = np.ones(problem.sizes, bool)
    for factor in problem.factors:
        entries = factor.table[tuple(grid[v] for v in factor.variables)]
        allowed &= entries < INFEASIBLE
        cost += np.where(entries < INFEASIBLE, entries, 0)
    for factor in problem.memory:
        memory += factor.table[tuple(grid[v] for v in factor.variables)]
    return np.where(allowed, cost, INFEASIBLE), memory


def repeated_blocks(blocks: int, interior: int, size: int, seed: int, *, folded: bool, highest: int = 10**9) -> Problem:
    """A chain of equal blocks that share table objects: boundary, ``interior`` variables of arity up to 4, boundary."""
    rng = np.random.default_rng(seed)
    local = []
    for v in range(1, interior + 1):
        near = [max(0, v - 1 - int(back)) for back in rng.integers(0, 4, int(rng.integers(1, 4)))]
        scope = tuple(dict.fromkeys([*near, v]))
        local.append((scope, rng.integers(0, highest, [size] * len(scope))))
        local.append(((v,), rng.integers(0, highest, size)))
    local.append(((interior, 0, interior + 1), rng.integers(0, highest, [size] * 3)))
    stride = interior + 1
    factors = [Factor(tuple(b * stride + v for v in scope), table) for b in range(blocks) for scope, table in local]
    groups = tuple(tuple(range(b * stride + 1, (b + 1) * stride)) for b in range(blocks))
    return Problem((size,) * (blocks * stride + 1), tuple(factors), groups if folded else ())


def dense_problem(number: int, size: int, seed: int, highest: int = 1000) -> Problem:
    """Ternary factors over random triples: too wide for small tables."""
    rng = np.random.default_rng(seed)
    scopes = [tuple(int(v) for v in rng.permutation(number)[:3]) for _ in range(2 * number)]
    return Problem((size,) * number, tuple(Factor(s, rng.integers(0, highest, (size,) * 3)) for s in scopes))
