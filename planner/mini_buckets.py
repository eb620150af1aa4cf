"""A bound and a candidate when tables may not grow and HiGHS has no time: mini-buckets.

A bucket whose joined table would be too large is split into several that are minimised separately,

    min over x of [ a(s, x) + b(t, x) ] >= min over x of a(s, x) + min over x of b(t, x),

so the constants that remain are a lower bound (Dechter and Rish, Journal of the ACM 50, 2003, section 3). Reading back
takes for each variable the least value of its whole bucket given the later ones: a candidate, not always feasible.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from .elimination import MinPlus
from .factor_graph import INFEASIBLE, Table
from .ordering import Step, schedule
from .presolve import Term


def mini_bucket_bound(sizes: Sequence[int], terms: Sequence[Term], limit: int) -> tuple[int, dict[int, int] | None]:
    """Lower bound of the sum of ``terms``, and a candidate if the one read back is feasible.

    Args:
        sizes: Domain size per variable.
        terms: Tables in ``[0, INFEASIBLE]``; those larger than ``limit`` already stay as they are.
        limit: Most entries of a joined table.
    """
    variables = sorted({v for term in terms for v in term.scope})
    unlimited = prod(sizes[v] for v in variables)
    order = [step.variable for step in schedule([t.scope for t in terms], sizes, variables, unlimited).steps]
    alive: list[tuple[tuple[int, ...], Table]] = [(term.scope, term.cost) for term in terms]
    buckets = []
    for v in order:
        bucket = [entry for entry in alive if v in entry[0]]
        alive = [entry for entry in alive if v not in entry[0]]
        buckets.append((v, bucket))
        pieces: list[tuple[set[int], list[tuple[tuple[int, ...], Table]]]] = []
        for scope, table in sorted(bucket, key=lambda entry: -len(entry[0])):
            for joined, members in pieces:
                if prod(sizes[u] for u in joined | set(scope)) <= limit:
                    joined.update(scope)
                    members.append((scope, table))
                    break
            else:
                pieces.append((set(scope), [(scope, table)]))
        for joined, members in pieces:
            step = Step(v, (), tuple(sorted(joined - {v})), -1)
            alive.append((step.scope, MinPlus().step(sizes, step, members)[0]))
    values: dict[int, int] = {}
    for v, bucket in reversed(buckets):
        totals = np.zeros(sizes[v], np.int64)
        for scope, table in bucket:
            totals += table[tuple(slice(None) if u == v else values[u] for u in scope)]
            np.minimum(totals, INFEASIBLE, out=totals)
        values[v] = int(totals.argmin())
    price = sum(term.cost.item(*[values[v] for v in term.scope]) for term in terms)
    return sum(int(table) for _, table in alive), values if price < INFEASIBLE else None
