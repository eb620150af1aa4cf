"""Elimination over (cost, bytes) labels: every entry holds the pairs no other pair of that entry beats in both.

Pairs add, and minimising becomes merging: a pair dominated within an entry stays dominated after anything is added to
both, so dropping it loses no optimum under any cap (the bicriterion form of bucket elimination; Rollon and Larrosa, CP
2006). Pairs past the cap, or not cheaper than a known solution, are dropped too, all tables being non-negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .elimination import broadcast_index
from .factor_graph import INFEASIBLE
from .ordering import Step
from .presolve import Term

Integers = npt.NDArray[np.int64]
MOST_LABELS = 1 << 21  # in one join; about 0.2 GB and 2 s


class TooManyLabels(Exception):
    """The labels of one join would not fit; HiGHS is the way out."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Entry e of a table (C order over ``shape``) has the labels ``first[e] : first[e + 1]``, by rising cost."""

    shape: tuple[int, ...]
    first: Integers
    cost: Integers
    memory: Integers


@dataclass(frozen=True, eq=False)
class Origin:
    """Where each label comes from: the value of the eliminated variable, and a label of every input."""

    value: Integers
    parents: tuple[Integers, ...]


@dataclass(frozen=True)
class LabelTables:
    """The algebra of label tables; only labels with ``cost <= most_cost`` and ``memory <= most_memory`` are kept."""

    most_cost: int
    most_memory: int

    def lift(self, term: Term) -> Labels:
        """One label per entry that is not forbidden."""
        cost = term.cost.reshape(-1)
        memory = np.zeros_like(cost) if term.memory is None else term.memory.reshape(-1)
        keep = (cost < INFEASIBLE) & (cost <= self.most_cost) & (memory <= self.most_memory)
        return Labels(term.cost.shape, _starts(np.flatnonzero(keep), cost.size), cost[keep], memory[keep])

    def step(
        self, sizes: Sequence[int], step: Step, inputs: Sequence[tuple[tuple[int, ...], Labels]]
    ) -> tuple[Labels, Origin]:
        """Join the inputs, then merge the labels of all values of the step's variable."""
        return self.join(sizes, step.scope, step.variable, inputs)

    def join(
        self,
        sizes: Sequence[int],
        scope: tuple[int, ...],
        variable: int | None,
        inputs: Sequence[tuple[tuple[int, ...], Labels]],
    ) -> tuple[Labels, Origin]:
        """Labels over ``scope`` of the sum of ``inputs``, minimised over ``variable`` if one is given."""
        joined = scope if variable is None else (*scope, variable)
        shape = [sizes[v] for v in joined]
        entries = int(np.prod(shape, dtype=np.int64))
        entry, cost, memory = np.arange(entries), np.zeros(entries, np.int64), np.zeros(entries, np.int64)
        parents: list[Integers] = []
        for table_scope, table in inputs:
            numbers = np.arange(table.first.size - 1).reshape(table.shape)
            order = sorted(range(len(table_scope)), key=lambda axis: joined.index(table_scope[axis]))
            aligned = numbers.transpose(order)[broadcast_index(joined, table_scope)]
            source = np.broadcast_to(aligned, shape).reshape(-1)[entry]
            counts = table.first[source + 1] - table.first[source]
            total = int(counts.sum())
            if total > MOST_LABELS:
                raise TooManyLabels
            row = np.repeat(np.arange(entry.size), counts)
            label = np.arange(total) + np.repeat(table.first[source] - np.cumsum(counts) + counts, counts)
            entry, cost, memory = entry[row], cost[row] + table.cost[label], memory[row] + table.memory[label]
            parents = [*(parent[row] for parent in parents), label]
            allowed = np.flatnonzero((cost <= self.most_cost) & (memory <= self.most_memory))
            keep = allowed[_undominated(entry[allowed], cost[allowed], memory[allowed])]
            entry, cost, memory = entry[keep], cost[keep], memory[keep]
            parents = [parent[keep] for parent in parents]
        values = 1 if variable is None else sizes[variable]
        keep = _undominated(entry // values, cost, memory)
        origin = Origin(entry[keep] % values, tuple(parent[keep] for parent in parents))
        first = _starts(entry[keep] // values, entries // values)
        return Labels(tuple(sizes[v] for v in scope), first, cost[keep], memory[keep]), origin

    def decode(self, step: Step, back: Any, assignment: dict[int, int], chosen: dict[int, int]) -> None:
        """Read the value and the inputs' labels off the label chosen in the step's output."""
        label = chosen[step.output]
        assignment[step.variable] = int(back.value[label])
        for number, parent in zip(step.inputs, back.parents, strict=True):
            chosen[number] = int(parent[label])


def _starts(entry: Integers, entries: int) -> Integers:
    """Offsets of the labels of each of ``entries`` entries, ``entry`` being sorted."""
    return np.searchsorted(entry, np.arange(entries + 1))


def _undominated(entry: Integers, cost: Integers, memory: Integers) -> Integers:
    """Positions of the labels no other of the same entry beats, by entry, then cost; of equal ones the first stays."""
    order = np.lexsort((memory, cost, entry))
    ranks, rank = np.unique(memory, return_inverse=True)
    # Entries rise, so this key falls from entry to entry, and its running minimum starts afresh in each.
    key = rank[order] - entry[order] * ranks.size
    better = np.ones(order.size, np.bool_)
    better[1:] = key[1:] < np.minimum.accumulate(key)[:-1]
    return order[better]
