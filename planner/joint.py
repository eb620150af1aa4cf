"""Several workloads over one weight layout: their problems put together, every parameter laid out alike in all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from .factor_graph import INFEASIBLE, Factor, Problem, Table
from .formulation import Formulation
from .placement import Replicate
from .strategies import Domain, Stored


def integer_weights(weights: Sequence[float]) -> list[int]:
    """The weights as small integers of the same ratios (to one part in a thousand)."""
    parts = [Fraction(w).limit_denominator(1000) for w in weights]
    common = math.lcm(*(part.denominator for part in parts))
    whole = [int(part * common) for part in parts]
    shared = math.gcd(*whole)
    return [max(1, w // shared) for w in whole]


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
