"""How little any completion of a partial elimination can add: exact costs to go, from one pass up and one pass down.

Going up, elimination gives every table; going down, for the output o of each step the least sum of everything outside
it: with p the output of the step that consumes o,

    B(o)(s) = min over the variables of that step not in s of [ B(p) + sum of that step's other inputs ],

which is the pattern of a search with a perfect heuristic (Kask and Dechter, Artificial Intelligence 129, 2001).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .elimination import MinPlus, aligned, saturating_sum
from .factor_graph import Table
from .ordering import Schedule, Step


@dataclass(frozen=True, eq=False)
class Completions:
    """Tables by number with their scopes (ascending), and the least sum of everything else for each step's output."""

    tables: dict[int, tuple[tuple[int, ...], Table]]
    outside: dict[int, Table]
    leftovers: tuple[int, ...]

    def rest(self, sizes: Sequence[int], step: Step, joined: int) -> Table:
        """Least sum of all but the first ``joined`` inputs of a step, per joined entry (C order, its variable last)."""
        shape = [*(sizes[v] for v in step.scope), sizes[step.variable]]
        inputs = aligned(step, [self.tables[number] for number in step.inputs[joined:]])
        total = saturating_sum([self.outside[step.output][..., None], *inputs])
        return np.broadcast_to(total, shape).reshape(-1)

    def constant(self, joined: int) -> int:
        """Sum of all but the first ``joined`` leftover constants."""
        return sum(int(self.tables[number][1]) for number in self.leftovers[joined:])


def complete(sizes: Sequence[int], tables: Sequence[tuple[tuple[int, ...], Table]], order: Schedule) -> Completions:
    """Both passes over a schedule that eliminates every variable.

    Args:
        sizes: Domain size per variable.
        tables: Non-negative, scopes ascending.
        order: The schedule.
    """
    known = dict(enumerate(tables))
    producer = {step.output: step for step in order.steps}
    for step in order.steps:
        message, _ = MinPlus().step(sizes, step, [known[number] for number in step.inputs])
        known[step.output] = (step.scope, message)
    outside: dict[int, Table] = {}
    for number in order.leftovers:
        others = [known[other][1] for other in order.leftovers if other != number]
        outside[number] = saturating_sum([np.zeros((), np.int64), *others])
    for step in reversed(order.steps):
        joined = (*step.scope, step.variable)
        shape = [sizes[v] for v in joined]
        inputs = aligned(step, [known[number] for number in step.inputs])
        for position, number in enumerate(step.inputs):
            if number not in producer:
                continue
            others = [outside[step.output][..., None], *inputs[:position], *inputs[position + 1 :]]
            total = np.broadcast_to(saturating_sum(others), shape)
            scope = known[number][0]
            lowest = total.min(axis=tuple(axis for axis, v in enumerate(joined) if v not in scope))
            kept = [v for v in joined if v in scope]
            outside[number] = np.asarray(lowest).transpose([kept.index(v) for v in scope])
    return Completions(known, outside, order.leftovers)
