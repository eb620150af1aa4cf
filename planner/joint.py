"""Several workloads over one weight layout: their problems put together, every parameter laid out alike in all.

What each workload costs alone, added up, is a bound below; most often one of their layouts attains it in all of them,
and that is the proof. Otherwise the problems are solved as one, which takes wider tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from colrow.cost_models.errors import Infeasible

from .factor_graph import INFEASIBLE, Factor, Problem, Solution, Table, evaluate, memory_of
from .formulation import Formulation
from .parameter_prices import REPLICATION_PENALTY_PS
from .placement import Replicate
from .solver import solve
from .storing import Domain, Stored


def integer_weights(weights: Sequence[float]) -> list[int]:
    """The weights as small integers of the same ratios (to one part in a thousand)."""
    parts = [Fraction(w / min(weights)).limit_denominator(1000) for w in weights]
    common = math.lcm(*(part.denominator for part in parts))
    whole = [int(part * common) for part in parts]
    shared = math.gcd(*whole)
    return [w // shared for w in whole]


def solve_together(formulations: Sequence[Formulation], weights: Sequence[int], problem: Problem) -> Solution:
    """The cheapest layout and moves of all workloads; ``problem`` is theirs, `joined`, and so is the assignment.

    Raises:
        Infeasible: As of `solve`.
    """
    alone = [solve(replace(f.problem, memory_cap=None)) for f in formulations]
    bound = sum(w * s.lower_bound for w, s in zip(weights, alone, strict=True))
    found = [s for s in (_with_layout_of(n, formulations, alone, problem, bound) for n in range(len(alone))) if s]
    best = min(found, key=lambda s: s.cost, default=None)
    if best is None or not best.proven:
        splits = (
            _splits(formulations[0], alone[0])
            if best is not None and best.cost - bound < REPLICATION_PENALTY_PS
            else ()
        )
        whole = solve(replace(problem, factors=(*problem.factors, *splits)))
        bound = max(bound, whole.lower_bound)
        cheaper = whole if best is None or whole.cost <= best.cost else best
        best = replace(cheaper, lower_bound=bound, proven=cheaper.cost == bound)
    return best


def _splits(formulation: Formulation, alone: Solution) -> tuple[Factor, ...]:
    """That no weight stays whole which pays for it: so it is in every optimum, if one workload's own has none that
    does and the cheapest known costs less than one such payment above the bound."""
    whole = [isinstance(formulation.domains[v][alone.assignment[v]], Replicate) for v in formulation.penalised]
    if any(whole):
        return ()
    columns = {
        v: np.array([INFEASIBLE * isinstance(s, Replicate) for s in formulation.domains[v]], dtype=np.int64)
        for v in sorted(formulation.penalised)
    }
    return tuple(Factor((v,), column) for v, column in columns.items())


def _with_layout_of(
    chosen: int, formulations: Sequence[Formulation], alone: Sequence[Solution], problem: Problem, bound: int
) -> Solution | None:
    """All workloads in the layout that one of them would take alone; None where one cannot, or memory is short."""
    layout = {
        node.fqn: formulations[chosen].domain(node.index)[alone[chosen].assignment[formulations[chosen].variable[at]]]
        for at, node in enumerate(formulations[chosen].graph.nodes)
        if node.op == "parameter"
    }
    parts: list[int] = []
    for n, formulation in enumerate(formulations):
        if n == chosen:
            parts += alone[n].assignment
            continue
        fixed = {}
        for node in formulation.graph.nodes:
            if node.op == "parameter":
                column = [
                    0 if _same_layout(s, layout[node.fqn]) else INFEASIBLE for s in formulation.domain(node.index)
                ]
                variable = formulation.variable[node.index]
                fixed[variable] = Factor((variable,), np.array(column, dtype=np.int64))
        factors = (*formulation.problem.factors, *fixed.values())
        try:
            parts += solve(replace(formulation.problem, factors=factors, memory_cap=None)).assignment
        except Infeasible:
            return None
    cost, held = evaluate(problem, parts), memory_of(problem, parts)
    if problem.memory_cap is not None and held > problem.memory_cap:
        return None
    return Solution(tuple(parts), cost, bound, cost == bound, "one layout for all", held)


def joined(formulations: Sequence[Formulation], weights: Sequence[int], heaviest: int) -> Problem:
    """One problem: the weighted sum of all, with each parameter's layout shared; the memory is the ``heaviest``'s.

    The variables of each formulation follow those of the one before.
    """
    factors: list[Factor] = []
    groups: list[tuple[tuple[int, ...], ...]] = []
    offsets = offsets_of(formulations)
    for formulation, weight, start in zip(formulations, weights, offsets, strict=True):
        scaled: dict[int, Table] = {}
        for factor in formulation.problem.factors:
            table = scaled.setdefault(id(factor.table), _scaled(factor.table, weight))
            factors.append(Factor(tuple(v + start for v in factor.variables), table))
        groups.append(tuple(tuple(v + start for v in group) for group in formulation.problem.groups))
    factors += _links(formulations, offsets)
    memory = formulations[heaviest].problem
    return Problem(
        tuple(size for formulation in formulations for size in formulation.problem.sizes),
        tuple(factors),
        _merged(groups),
        tuple(Factor(tuple(v + offsets[heaviest] for v in f.variables), f.table) for f in memory.memory),
        memory.memory_cap,
    )


def offsets_of(formulations: Sequence[Formulation]) -> list[int]:
    """Where each formulation's variables start."""
    starts = [0]
    for formulation in formulations[:-1]:
        starts.append(starts[-1] + len(formulation.problem.sizes))
    return starts


def _scaled(table: Table, weight: int) -> Table:
    if weight == 1:
        return table
    return np.where(table >= INFEASIBLE, INFEASIBLE, table * weight)


def _links(formulations: Sequence[Formulation], offsets: Sequence[int]) -> list[Factor]:
    first, *others = formulations
    known = {n.fqn: first.variable[n.index] for n in first.graph.nodes if n.op == "parameter"}
    tables: dict[tuple[Domain, Domain], Table] = {}
    found: dict[tuple[int, int], Factor] = {}
    for formulation, start in zip(others, offsets[1:], strict=True):
        for node in formulation.graph.nodes:
            if node.op != "parameter":
                continue
            a, b = known[node.fqn], formulation.variable[node.index]
            key = (first.domains[a], formulation.domains[b])
            if key not in tables:
                alike = [[0 if _same_layout(x, y) else INFEASIBLE for y in key[1]] for x in key[0]]
                tables[key] = np.array(alike, dtype=np.int64)
            found[(a, b + start)] = Factor((a, b + start), tables[key])
    return list(found.values())


def _same_layout(a: Stored, b: Stored) -> bool:
    return a == b or (isinstance(a, Replicate) and isinstance(b, Replicate))


def _merged(groups: Sequence[tuple[tuple[int, ...], ...]]) -> tuple[tuple[int, ...], ...]:
    """A block's interior is that of all workloads, since its parameters tie them together."""
    if len({len(g) for g in groups}) == 1:
        return tuple(tuple(v for part in parts for v in part) for parts in zip(*groups, strict=True))
    return ()
