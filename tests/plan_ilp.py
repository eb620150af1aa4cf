"""An integer program written from the traced graph: a second opinion on what the cheapest plan costs.

It shares the space (which placements a value may be stored in, what each site allows) and the per-operator prices with
the planner, and none of its tables, table sharing, presolve, folding or elimination. Columns: ``y[v, s]`` value v is
stored as s; ``z[o, k]`` operator o is run in way k; ``w[b]`` block b reduces parameter gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import product

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from colrow.planner.formulation import Formulation
from colrow.planner.graph import Node
from colrow.planner.parameter_prices import reduction_slope_ps
from colrow.planner.placement import PARTIAL_GRAD, WHOLE, Replicate, Shard
from colrow.planner.pricing import Cost
from colrow.planner.returned_values import RETURNED
from colrow.planner.roles import crossing, hidden_bytes, weights
from colrow.planner.storing import Stored, beside_time, price_move
from colrow.planner.strategies import choices, cuts, is_leaf, reads


class PlanIlp:
    """The program of one formulation; weights that can be split are split."""

    def __init__(self, formulation: Formulation) -> None:
        self.of, self.graph, self.pricing = formulation, formulation.graph, formulation.pricing
        self.cost: list[int] = []
        self.rows: list[tuple[dict[int, int], float, float]] = []
        self.root = {n.index: self._root(n) for n in self.graph.nodes}
        self.y: dict[tuple[int, Stored], int] = {}
        for node in self.graph.nodes:
            if self.root[node.index] == node.index:
                self._value(node)
        for node in self.graph.nodes:
            if not is_leaf(node):
                self._operator(node)
        self._outputs()
        self._hidden_states()
        self._pinned()
        self._shared_sites()

    def _root(self, node: Node) -> int:
        name = self.graph.ties.get(node.fqn, node.fqn)
        same = [n.index for n in self.graph.nodes if node.op == "parameter" and n.op == "parameter"
                and self.graph.ties.get(n.fqn, n.fqn) == name]  # fmt: skip
        return min(same, default=node.index)

    def _column(self, cost: int) -> int:
        self.cost.append(cost)
        return len(self.cost) - 1

    def stored(self, index: int) -> dict[Stored, int]:
        """Columns of a value's placements."""
        root = self.root[index]
        return {s: self.y[root, s] for s in self.of.domain(index)}

    def _value(self, node: Node) -> None:
        penalised = self.of.variable[node.index] in self.of.penalised
        slope = self._backward(reduction_slope_ps(self.pricing, node.nbytes)) if node.op == "parameter" else 0
        for s in self.of.domain(node.index):
            summed = node.op == "parameter" and _is_summed(s)
            self.y[node.index, s] = self._column((slope if summed else 0) + self._updated(node, s))
            if summed:
                self._flag(self.graph.block_of()(node.fqn), self.y[node.index, s])
            if penalised and isinstance(s, Replicate):
                self.rows.append(({self.y[node.index, s]: 1}, 0, 0))
        self.rows.append((dict.fromkeys(self.stored(node.index).values(), 1), 1, 1))

    def _updated(self, node: Node, stored: Stored) -> int:
        """AdamW reads a parameter, its gradient and two moments, and writes all but the gradient."""
        tied = [n for n in self.graph.nodes if self.root[n.index] == node.index]
        if node.op != "parameter" or self.pricing.phase != "train" or not any(n.differentiable for n in tied):
            return 0
        cut = isinstance(stored, Shard) and not stored.layout.is_replicated
        nbytes = node.nbytes * stored.layout.local // stored.layout.size if cut else node.nbytes
        memory, launch_s = self.pricing.hardware.memory, self.pricing.hardware.launch_overhead_s
        step_s = 7 * nbytes / (memory.bandwidth_bytes_per_s * memory.efficiency) + launch_s
        return round(step_s * 1e12) - round(launch_s * 1e12)

    def _backward(self, ps: int) -> int:
        return self.pricing.weighed(Cost(0, ps))

    def _flag(self, block: str, column: int) -> None:
        if not hasattr(self, "flags"):
            self.flags: dict[str, int] = {}
        if block not in self.flags:
            self.flags[block] = self._column(self._backward(self.pricing.collective("all_reduce", 1)))
        self.rows.append(({self.flags[block]: 1, column: -1}, 0, np.inf))

    def _ways(self, node: Node) -> Iterator[tuple[tuple[Stored, ...], Stored, int]]:
        """Operands stored, result stored, picoseconds: everything this operator may do."""
        setting, slices = self.of.settings[node.index], self.of.slices[node.index]
        for stored in product(*(self.of.domain(i) for i in reads(node))):
            for combination, made, compute, changes in choices(self.graph, node, stored, setting, self.pricing, slices):
                here = self.pricing.weighed(compute + changes)
                here += setting.slice_ps * cuts(self.graph, node, combination)
                for target in self.of.domain(node.index):
                    moved = price_move(node, made, target, setting, self.pricing)
                    if moved is not None:
                        gather = beside_time(made, target, setting)
                        yield stored, target, here + self.pricing.weighed(moved) + gather

    def _operator(self, node: Node) -> None:
        cheapest: dict[tuple[tuple[Stored, ...], Stored], int] = {}
        for stored, target, ps in self._ways(node):
            key = (stored, target)
            cheapest[key] = min(ps, cheapest.get(key, ps))
        operands = reads(node)
        links: dict[tuple[int, Stored], dict[int, int]] = {}
        for at, index in enumerate((*operands, node.index)):
            for s, column in self.stored(index).items():
                links[at, s] = {column: -1}
        for (stored, target), ps in cheapest.items():
            z = self._column(ps)
            for at, s in enumerate((*stored, target)):
                links[at, s][z] = 1
        self.rows += [(row, 0, 0) for row in links.values()]

    def _outputs(self) -> None:
        for index in set(self.graph.outputs):
            lift = self.pricing.weighed(self.pricing.move(RETURNED, self.graph.nodes[index].nbytes))
            for s, column in self.stored(index).items():
                if s == PARTIAL_GRAD:
                    self.cost[column] += lift
                elif s != WHOLE:
                    self.rows.append(({column: 1}, 0, 0))

    def _hidden_states(self) -> None:
        crossings = crossing(self.graph)
        hidden = hidden_bytes(self.graph, crossings)
        block_of, products = self.graph.block_of(), Counter(w.block for w in weights(self.graph).values())
        for index in crossings:
            readers = [n.index for n in self.graph.nodes if index in n.operands]
            blocks = {block_of(self.graph.nodes[i].module) for i in (index, *readers)} - {""}
            if self.graph.nodes[index].nbytes == hidden and any(products[block] > 1 for block in blocks):
                for s, column in self.stored(index).items():
                    self.cost[column] += self.of.gather_ps * isinstance(s, Shard)

    def _pinned(self) -> None:
        for index in self.graph.whole:
            for s, column in self.stored(index).items():
                if not isinstance(s, Replicate):
                    self.rows.append(({column: 1}, 0, 0))

    def _shared_sites(self) -> None:
        """Results of one call expression, run several times, are stored alike."""
        made: dict[object, dict[int, int]] = {}
        for node in self.graph.nodes:
            if node.call >= 0:
                made.setdefault(self.graph.calls[node.call].site, {})[node.call] = node.index
        for nodes in (list(found.values()) for found in made.values()):
            for a, b in zip(nodes, nodes[1:], strict=False):
                if self.root[a] == self.root[b]:
                    continue
                for s, column in self.stored(a).items():
                    alike = {c: 1 for t, c in self.stored(b).items() if _alike(s, t)}
                    self.rows.append(({**alike, column: -1}, 0, np.inf))

    def solve(self) -> int:
        """The least picoseconds of any plan, re-added in integers from the columns chosen."""
        entries = [(at, column, value) for at, (row, _, _) in enumerate(self.rows) for column, value in row.items()]
        at, columns, values = (np.array(part) for part in zip(*entries, strict=True))
        matrix = coo_array((values.astype(float), (at, columns)), shape=(len(self.rows), len(self.cost)))
        low, high = (np.array(bound, dtype=float) for bound in zip(*((a, b) for _, a, b in self.rows), strict=True))
        scale = Fraction(1, 10**6)
        found = milp(
            np.array([float(c * scale) for c in self.cost]),
            constraints=LinearConstraint(matrix.tocsr(), low, high),
            integrality=np.ones(len(self.cost)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        assert found.status == 0, found.message
        taken = np.round(found.x).astype(int)
        assert np.abs(found.x - taken).max() < 1e-5
        return sum(c for c, t in zip(self.cost, taken.tolist(), strict=True) if t)


def _is_summed(stored: Stored) -> bool:
    return stored == PARTIAL_GRAD or (isinstance(stored, Shard) and stored.layout.is_replicated)


def _alike(a: Stored, b: Stored) -> bool:
    if isinstance(a, Shard) and isinstance(b, Shard):
        return a.dim == b.dim and (a.layout == b.layout or a.layout.size != b.layout.size)
    return a == b
