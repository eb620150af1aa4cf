"""Reductions before elimination, each exact in cost.

* ``merge_parallel``: factors over the same variables are one factor, and constants leave the graph.
* ``drop_unsupported``: a value that occurs in no feasible entry of some factor occurs in no feasible assignment
  (generalised arc consistency); a variable with one value left leaves the graph.
* ``drop_dominated``: value j goes if some i satisfies

      sum over factors f of max over contexts c of (f[i, c] - f[j, c]) <= 0,

  contexts in which j is forbidden apart: putting i for j never makes an assignment dearer (Goldstein, Biophysical
  Journal 66, 1994, equation 4; "never worse in any entry" is the special case of no positive maximum). With memory, the
  same must hold in bytes. Between equals the lower index stays, so domain order remains the preference.

Chains collapse by themselves: a variable with one or two neighbours is what least-table-first elimination takes first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from colrow.cost_models.errors import Infeasible

from .factor_graph import INFEASIBLE, Table

_DOMINANCE_WORK = 1 << 22  # entries compared per variable at most; beyond it the test costs more than it saves


@dataclass(frozen=True, eq=False)
class Term:
    """Tables over ``scope`` (ascending): cost in picoseconds, and bytes where memory is counted (None: zero)."""

    scope: tuple[int, ...]
    cost: Table
    memory: Table | None = None


@dataclass(frozen=True, eq=False)
class Reduced:
    """What is left: ``terms`` over domains of ``sizes``; index k of variable v stands for value ``kept[v][k]``."""

    sizes: list[int]
    kept: dict[int, npt.NDArray[np.intp]]
    terms: list[Term]
    cost_offset: int
    memory_offset: int


def ascending(variables: Sequence[int], table: Table) -> tuple[tuple[int, ...], Table]:
    """The same table with its dims in ascending order of variables."""
    order = sorted(range(len(variables)), key=variables.__getitem__)
    return tuple(variables[k] for k in order), table.transpose(order)


def add_saturating(a: Table, b: Table) -> Table:
    """``min(a + b, INFEASIBLE)`` for entries in ``[0, INFEASIBLE]``."""
    return np.asarray(np.minimum(a + b, INFEASIBLE))


def merge_parallel(terms: Iterable[Term]) -> tuple[list[Term], int, int]:
    """One term per scope, in order of first appearance; also the cost and bytes of the terms without variables.

    Raises:
        Infeasible: A term without variables is forbidden.
    """
    merged: dict[tuple[int, ...], Term] = {}
    for term in terms:
        other = merged.get(term.scope)
        if other is not None:
            memories = [m for m in (other.memory, term.memory) if m is not None]
            memory = memories[0] + memories[1] if len(memories) == 2 else memories[0] if memories else None
            term = Term(term.scope, add_saturating(other.cost, term.cost), memory)
        merged[term.scope] = term
    constant = merged.pop((), None)
    if constant is None:
        return list(merged.values()), 0, 0
    if int(constant.cost) >= INFEASIBLE:
        raise nothing_satisfies()
    return list(merged.values()), int(constant.cost), 0 if constant.memory is None else int(constant.memory)


def nothing_satisfies() -> Infeasible:
    """The error for a problem without any assignment."""
    return Infeasible("solver", "no assignment satisfies all factors", remedy="Loosen a pin or allow more placements.")


def reduce_domains(
    sizes: Sequence[int], terms: Iterable[Term], interior: Iterable[int], *, dominance: bool = True
) -> Reduced:
    """Apply the reductions until none applies; only values of ``interior`` variables are dropped.

    Args:
        sizes: Domain size per variable.
        terms: The graph.
        interior: Variables all of whose terms are given.
        dominance: Whether to drop dominated values, beside impossible ones.

    Raises:
        Infeasible: A variable has no possible value left.
    """
    merged, cost, memory = merge_parallel(terms)
    graph = _Domains(list(sizes), merged, frozenset(interior))
    graph.drop_unsupported(range(len(merged)))
    if dominance:
        graph.drop_dominated()
    left, more_cost, more_memory = merge_parallel([_without_fixed(term) for term in graph.terms])
    return Reduced(graph.sizes, graph.kept, left, cost + more_cost, memory + more_memory)


def _without_fixed(term: Term) -> Term:
    if 1 not in term.cost.shape:
        return term
    scope = tuple(v for v, size in zip(term.scope, term.cost.shape, strict=True) if size > 1)
    shape = [size for size in term.cost.shape if size > 1]
    return Term(scope, term.cost.reshape(shape), None if term.memory is None else term.memory.reshape(shape))


class _Domains:
    """Domains and tables while values are being dropped."""

    def __init__(self, sizes: list[int], terms: list[Term], interior: frozenset[int]) -> None:
        self.sizes, self.terms, self.interior = sizes, terms, interior
        self.kept = {v: np.arange(sizes[v]) for v in sorted(interior)}
        self.terms_of: dict[int, list[int]] = {}
        for index, term in enumerate(terms):
            for v in term.scope:
                self.terms_of.setdefault(v, []).append(index)

    def restrict(self, v: int, keep: npt.NDArray[np.intp]) -> None:
        """Keep the values ``keep`` (ascending positions in the current domain) of ``v``."""
        if not keep.size:
            raise Infeasible(
                f"variable {v}", "no value satisfies all its factors", remedy="Loosen a pin or allow more placements."
            )
        self.sizes[v], self.kept[v] = keep.size, self.kept[v][keep]
        for index in self.terms_of.get(v, ()):
            term = self.terms[index]
            axis = term.scope.index(v)
            memory = None if term.memory is None else term.memory.take(keep, axis)
            self.terms[index] = Term(term.scope, term.cost.take(keep, axis), memory)

    def drop_unsupported(self, start: Iterable[int]) -> set[int]:
        """Generalised arc consistency from the terms ``start``; the variables whose domain shrank."""
        queue = deque(start)
        queued = set(queue)
        shrunk: set[int] = set()
        while queue:
            index = queue.popleft()
            queued.discard(index)
            feasible = self.terms[index].cost < INFEASIBLE
            if feasible.all():
                continue
            scope = self.terms[index].scope
            for axis, v in enumerate(scope):
                if v not in self.interior:
                    continue
                supported = feasible.any(axis=tuple(k for k in range(len(scope)) if k != axis))
                if not supported.all():
                    self.restrict(v, np.flatnonzero(supported))
                    feasible = self.terms[index].cost < INFEASIBLE
                    queue.extend(other for other in self.terms_of[v] if other not in queued)
                    queued.update(self.terms_of[v])
                    shrunk.add(v)
        return shrunk

    def drop_dominated(self) -> None:
        """Drop dominated values, then what that leaves unsupported, until nothing changes."""
        queue = deque(sorted(self.interior))
        queued = set(queue)
        while queue:
            v = queue.popleft()
            queued.discard(v)
            keep = self._undominated(v)
            if keep.size == self.sizes[v]:
                continue
            self.restrict(v, keep)
            changed = {v} | self.drop_unsupported(self.terms_of.get(v, ()))
            near = {u for w in changed for index in self.terms_of.get(w, ()) for u in self.terms[index].scope}
            again = sorted((near & self.interior) - queued)
            queue.extend(again)
            queued.update(again)

    def _undominated(self, v: int) -> npt.NDArray[np.intp]:
        size, terms = self.sizes[v], [self.terms[index] for index in self.terms_of.get(v, ())]
        if size == 1 or size * sum(term.cost.size for term in terms) > _DOMINANCE_WORK:
            return np.arange(size)
        worse = np.zeros((size, size), np.int64)  # worse[i, j]: at most this much dearer with i in place of j
        heavier = np.zeros((size, size), np.int64)
        barred = np.zeros((size, size), np.bool_)
        for term in terms:
            axis = term.scope.index(v)
            rows = np.moveaxis(term.cost, axis, 0).reshape(size, -1)
            feasible = rows < INFEASIBLE
            barred |= (~feasible[:, None] & feasible[None]).any(axis=2)
            differences = np.where(feasible[:, None] & feasible[None], rows[:, None] - rows[None], -INFEASIBLE)
            # A pair that shares no feasible context is barred, or its j is forbidden throughout and already dropped.
            worse += np.maximum(differences.max(axis=2), -(INFEASIBLE >> 10))
            if term.memory is not None:
                rows = np.moveaxis(term.memory, axis, 0).reshape(size, -1)
                heavier += (rows[:, None] - rows[None]).max(axis=2)
        keep = list(range(size))
        for j in reversed(range(size)):
            for i in keep:
                no_worse = not barred[i, j] and worse[i, j] <= 0 and heavier[i, j] <= 0
                if i != j and no_worse and (i < j or worse[i, j] < 0 or heavier[i, j] < 0):
                    keep.remove(j)
                    break
        return np.array(keep, np.intp)
