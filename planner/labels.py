"""Elimination over (cost, bytes) labels: every entry holds the pairs no other pair of that entry beats in both.

Pairs add, and minimising becomes merging: a pair dominated within an entry stays dominated after anything is added to
both, so dropping it loses no optimum under any cap (the bicriterion form of bucket elimination; Rollon and Larrosa,
CP 2006). Two more kinds are dropped: those that cannot stay below the cap, and those whose Lagrangian bound (cost plus
bytes times a price, plus the least the rest can add, minus the cap times the price) reaches a known solution's cost.

What the rest can add at least is known exactly outside the groups (``Completions``). Inside a group, which stands for
many places, the global bound serves: if V bounds every assignment, one through this label costs at least V plus what
the label exceeds the least of its entry by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from .completions import Completions
from .elimination import broadcast_index
from .factor_graph import INFEASIBLE, Table
from .ordering import Step
from .presolve import Term

Integers = npt.NDArray[np.int64]
_MOST_LABELS = 1 << 21  # in one join, before dropping any; about 0.3 GB and 2 s


class TooManyLabels(Exception):
    """The labels of one join would not fit; HiGHS is the way out."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Entry e of a table (C order over ``shape``) has the labels ``first[e] : first[e + 1]``, by rising cost."""

    shape: tuple[int, ...]
    first: Integers
    cost: Integers
    memory: Integers

    def least(self, values: Integers) -> Table:
        """Least of ``values`` (one per label) in each entry; ``INFEASIBLE`` where there is no label."""
        lowest = np.full(self.first.size - 1, INFEASIBLE, np.int64)
        filled = self.first[1:] > self.first[:-1]
        lowest[filled] = np.minimum.reduceat(values, self.first[:-1][filled]) if values.size else INFEASIBLE
        return lowest.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Origin:
    """Where each label comes from: the value of the eliminated variable, and a label of every input."""

    value: Integers
    parents: tuple[Integers, ...]


@dataclass
class LabelTables:
    """The algebra of label tables.

    Attributes:
        price: Picoseconds per byte; times ``most_memory`` below 2**62.
        most_memory: Bytes a label may have.
        most_bound: Picoseconds; labels with a higher bound are dropped.
        beam: Labels kept per join, the lowest bounds first.
        floor: Lower bound of every assignment, used without ``rest``.
        rest: Least Lagrangian cost and least bytes of what is not joined yet, if known.
        lost: Lowest bound of a label the beam dropped; nothing below it was lost.
    """

    price: Fraction
    most_memory: int
    most_bound: int
    beam: int
    floor: int
    rest: tuple[Completions, Completions] | None = None
    lost: int = field(default=INFEASIBLE)

    def priced(self, cost: Integers, memory: Integers) -> Integers:
        """Lagrangian cost, rounded down."""
        return cost + memory * self.price.numerator // self.price.denominator

    def lift(self, term: Term) -> Labels:
        """One label per entry that is not forbidden."""
        cost = term.cost.reshape(-1)
        memory = np.zeros_like(cost) if term.memory is None else term.memory.reshape(-1)
        keep = (cost < INFEASIBLE) & (memory <= self.most_memory)
        return Labels(term.cost.shape, _starts(np.flatnonzero(keep), cost.size), cost[keep], memory[keep])

    def step(
        self, sizes: Sequence[int], step: Step, inputs: Sequence[tuple[tuple[int, ...], Labels]]
    ) -> tuple[Labels, Origin]:
        """Join the inputs, then merge the labels of all values of the step's variable."""
        joined, values = (*step.scope, step.variable), sizes[step.variable]
        rests = None
        if self.rest is not None:
            priced, memory = self.rest
            rests = [(priced.rest(sizes, step, k), memory.rest(sizes, step, k)) for k in range(1, len(inputs) + 1)]
        entry, cost, memory_, parents = self._join([sizes[v] for v in joined], joined, inputs, rests)
        keep = _undominated(entry // values, cost, memory_)
        first = _starts(entry[keep] // values, int(np.prod([sizes[v] for v in step.scope], dtype=np.int64)))
        labels = Labels(tuple([sizes[v] for v in step.scope]), first, cost[keep], memory_[keep])
        return labels, Origin(entry[keep] % values, tuple([parent[keep] for parent in parents]))

    def front(self, constants: Sequence[Labels]) -> tuple[Integers, Integers, tuple[Integers, ...]]:
        """Cost and bytes of the undominated sums of labels without variables, and a label of each constant."""
        rests = None
        if self.rest is not None:
            priced, memory = self.rest
            ends = range(1, len(constants) + 1)
            rests = [(np.array([priced.constant(k)]), np.array([memory.constant(k)])) for k in ends]
        _, cost, memory_, parents = self._join([], (), [((), constant) for constant in constants], rests)
        return cost, memory_, tuple(parents)

    def decode(self, step: Step, back: Any, assignment: dict[int, int], chosen: dict[int, int]) -> None:
        """Read the value and the inputs' labels off the label chosen in the step's output."""
        label = chosen[step.output]
        assignment[step.variable] = int(back.value[label])
        for number, parent in zip(step.inputs, back.parents, strict=True):
            chosen[number] = int(parent[label])

    def _join(
        self,
        shape: Sequence[int],
        joined: tuple[int, ...],
        inputs: Sequence[tuple[tuple[int, ...], Labels]],
        rests: Sequence[tuple[Table, Table]] | None,
    ) -> tuple[Integers, Integers, Integers, list[Integers]]:
        """Labels of the sum of ``inputs`` over ``joined``: entry (rising), cost, bytes, and a label of each input."""
        entry = np.arange(int(np.prod(shape, dtype=np.int64)))
        cost, memory = np.zeros_like(entry), np.zeros_like(entry)
        parents: list[Integers] = []
        for position, (scope, table) in enumerate(inputs):
            numbers = np.arange(table.first.size - 1).reshape(table.shape)
            order = np.argsort([joined.index(v) for v in scope], kind="stable").tolist()
            source = np.broadcast_to(numbers.transpose(order)[broadcast_index(joined, scope)], shape).reshape(-1)[entry]
            counts = table.first[source + 1] - table.first[source]
            total = int(counts.sum())
            if total > _MOST_LABELS:
                raise TooManyLabels
            row = np.repeat(np.arange(entry.size), counts)
            label = np.arange(total) + np.repeat(table.first[source] - np.cumsum(counts) + counts, counts)
            entry, cost, memory = entry[row], cost[row] + table.cost[label], memory[row] + table.memory[label]
            parents = [*(parent[row] for parent in parents), label]
            keep = self._worth_keeping(entry, cost, memory, None if rests is None else rests[position])
            entry, cost, memory = entry[keep], cost[keep], memory[keep]
            parents = [parent[keep] for parent in parents]
        return entry, cost, memory, parents

    def _worth_keeping(
        self, entry: Integers, cost: Integers, memory: Integers, rest: tuple[Table, Table] | None
    ) -> Integers:
        """Positions of the labels to go on with, by entry, then cost."""
        room = self.most_memory - (0 if rest is None else rest[1][entry])
        keep = np.flatnonzero(memory <= room)
        keep = keep[_undominated(entry[keep], cost[keep], memory[keep])]
        priced = self.priced(cost[keep], memory[keep])
        if rest is None:
            # Rounding each price down can make the excess one too large.
            bound = self.floor + priced - _least_of_run(entry[keep], priced) - 1
        else:
            bound = priced + rest[0][entry[keep]] - self.most_memory * self.price.numerator // self.price.denominator
        below = bound <= self.most_bound
        keep, bound = keep[below], bound[below]
        if keep.size > self.beam:
            ranked = np.argsort(bound, kind="stable")
            self.lost = min(self.lost, int(bound[ranked[self.beam]]))
            keep = keep[np.sort(ranked[: self.beam])]
        return keep


def _starts(entry: Integers, entries: int) -> Integers:
    """Offsets of the labels of each of ``entries`` entries, ``entry`` being sorted."""
    return np.searchsorted(entry, np.arange(entries + 1))


def _least_of_run(entry: Integers, values: Integers) -> Integers:
    """For each label the least of ``values`` among the labels of its entry, ``entry`` being sorted."""
    if not entry.size:
        return values
    starts = np.flatnonzero(np.concatenate([[True], entry[1:] != entry[:-1]]))
    return np.repeat(np.minimum.reduceat(values, starts), np.diff(np.append(starts, entry.size)))


def _undominated(entry: Integers, cost: Integers, memory: Integers) -> Integers:
    """Positions of the labels no other of the same entry beats, by entry, then cost; of equal ones the first stays."""
    order = np.lexsort((memory, cost, entry))
    ranks, rank = np.unique(memory, return_inverse=True)
    # Entries rise, so this key falls from entry to entry, and its running minimum starts afresh in each.
    key = rank[order] - entry[order] * ranks.size
    better = np.ones(order.size, np.bool_)
    better[1:] = key[1:] < np.minimum.accumulate(key)[:-1]
    return order[better]
