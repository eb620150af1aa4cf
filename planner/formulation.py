"""Stage 4: graph -> discrete problem. One variable per value, one table per operator.

Variables: the stored placement of every value; tied parameters share one; per block one flag "some replicated parameter
here has a partial gradient", which pays the latency of the block's one parameter reduction. Tables:
`strategies.tabulate` per operator; parameters' prices; model outputs are whole. Equal operators share one table object,
which is what lets the solver eliminate equal blocks once.

Weights are split (DESIGN section 3, "the space"): a weight that could be split pays `REPLICATION_PENALTY_PS` for
staying replicated, which no time outweighs, so it does so only if no legal split exists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from colrow.cost_models.errors import Infeasible

from .bytes_per_rank import is_trained
from .candidates import Candidates, candidates
from .factor_graph import INFEASIBLE, Factor, Problem, Table
from .graph import Graph, Node, Ref
from .head_groups import FUSED
from .parameter_domains import ParameterDomains
from .parameter_prices import parameter_prices, reduction_latency_ps
from .placement import PARTIAL_GRAD, WHOLE, Replicate, Shard
from .pricing import Pricing
from .returned_values import output_price
from .roles import Weight, canonical, crossing, hidden_bytes, weights
from .site_settings import Options, Settings
from .storing import Domain, Setting, Stored
from .strategies import Choices, fixed_slices, is_leaf, reads, slice_options, tabulate

GATHER_PENALTY_PS = 1 << 38
"""Inside a block, gathering a split activation costs this much more (0.27 s), or eight all_reduces of the hidden state
on slower links: it is done only where nothing else is legal."""
MAX_OPERANDS = 5
"""Most distinct operands of an operator that is tabulated in full."""


@dataclass
class Formulation:
    """A problem and what its variables mean.

    Attributes:
        graph: The traced model.
        pricing: The workload's prices.
        variable: Node -> variable.
        domains: Variable -> stored placements (empty for flags).
        settings: What each operator allows.
        slices: Per operator, the splits its readers may cut.
        weights: Weights of products and embeddings, by canonical node.
        penalised: Variables of weights that pay for staying replicated.
        whole_outputs: What the model returns is whole on every rank.
        gather_ps: What gathering inside a block costs beside its time.
        hidden: Bytes of the hidden state.
        problem: What the solver gets.
    """

    graph: Graph
    pricing: Pricing
    variable: list[int]
    domains: list[Domain]
    settings: list[Setting]
    slices: list[list[list[Shard]]]
    weights: dict[int, Weight]
    penalised: set[int]
    flags: dict[str, int]
    whole_outputs: bool = True
    gather_ps: int = GATHER_PENALTY_PS
    hidden: int = 0
    reasons: dict[int, str] = field(default_factory=dict)
    problem: Problem = field(default_factory=lambda: Problem((), ()))

    def domain(self, index: int) -> Domain:
        """Stored placements of a node's value."""
        return self.domains[self.variable[index]]


def formulate(
    graph: Graph,
    pricing: Pricing,
    options: Options,
    memory: Callable[[Node, Stored], int] | None = None,
    penalises: bool = True,
) -> Formulation:
    """Builds the problem.

    Args:
        graph: The trace.
        pricing: Of the workload.
        options: What the user asked for.
        memory: Bytes of a value stored in a placement.
        penalises: Weights pay for staying whole; once is enough where several workloads share a layout.
    """
    builder = _Builder(graph, pricing, options, penalises)
    return builder.run(memory)


_LEAF = Setting(False, ())


class _Builder:
    """The state of one formulation; `run` is its only entry."""

    def __init__(self, graph: Graph, pricing: Pricing, options: Options, penalises: bool) -> None:
        self.graph, self.pricing, self.options = graph, pricing, options
        self.same = canonical(graph)
        self.weights = weights(graph)
        self.found: Candidates = candidates(graph, pricing.ranks)
        self.block_of = graph.block_of()
        self.memo: dict[object, Choices] = {}
        self.tables: dict[object, tuple[Setting, list[list[Shard]], Choices, bool]] = {}
        self.parameter_tables: dict[object, tuple[Table | None, Table | None]] = {}
        self.domain_ids: dict[Domain, int] = {}
        self.object_ids: dict[int, int] = {}
        self.unary: dict[object, Table] = {}
        self.factors: list[Factor] = []
        self.out = Formulation(graph, pricing, [-1] * len(graph.nodes), [], [], [], self.weights, set(), {})
        self.out.whole_outputs = options.outputs == "whole"
        self.crossing = crossing(graph)
        self.hidden = self.out.hidden = hidden_bytes(graph, self.crossing)
        slowest = pricing.collective("all_reduce", self.hidden) if pricing.ranks > 1 else 0
        self.out.gather_ps = max(GATHER_PENALTY_PS, 8 * slowest)
        self.settings = Settings(graph, options, pricing.ranks, self.found, self.same, self.weights, self.out.gather_ps)
        self.parameters = ParameterDomains(graph, options, self.found, self.same, self.weights, penalises)
        self.shared_sites = _shared_sites(graph)
        self.trains = is_trained(graph)

    def run(self, memory: Callable[[Node, Stored], int] | None) -> Formulation:
        graph, out = self.graph, self.out
        for node in graph.nodes:
            if is_leaf(node):
                self._leaf(node)
                out.settings.append(_LEAF)
                out.slices.append([])
            else:
                self._operator(node)
        self._outputs()
        self._hidden_states()
        self._unmoved()
        self._same_site_same_choice()
        factors = tuple(self.factors)
        bytes_of = tuple(self._memory(memory)) if memory is not None else ()
        sizes = tuple(len(d) or 2 for d in out.domains)
        out.problem = Problem(sizes, factors, self._groups(), bytes_of, self.options.memory_cap)
        return out

    def _new(self, domain: Domain) -> int:
        self.out.domains.append(domain)
        return len(self.out.domains) - 1

    def _leaf(self, node: Node) -> None:
        root = self.same.get(node.index, node.index)
        if root != node.index and self.out.variable[root] >= 0:
            self.out.variable[node.index] = self.out.variable[root]
            return
        if node.op == "parameter":
            self._parameter(node)
            return
        domain: Domain = (PARTIAL_GRAD,) if node.op == "input" and node.differentiable else (WHOLE,)
        self.out.variable[node.index] = self._new(domain)

    def _parameter(self, node: Node) -> None:
        choice = self.parameters.of(node)
        if choice.reason:
            self.out.reasons[node.index] = choice.reason
        variable = self._new(choice.domain)
        self.out.variable[node.index] = variable
        if choice.should_split:
            self.out.penalised.add(variable)
        key = (choice.should_split, node.nbytes, self.trains(node), self._id(choice.domain))
        if key not in self.parameter_tables:
            self.parameter_tables[key] = parameter_prices(self.pricing, choice, node, self.trains(node))
        price, needs_flag = self.parameter_tables[key]
        flag = self._flag(self.block_of(node.fqn)) if needs_flag is not None else -1
        if price is not None:
            self.factors.append(Factor((variable,), price))
        if needs_flag is not None:
            self.factors.append(Factor((variable, flag), needs_flag))

    def _flag(self, block: str) -> int:
        if block not in self.out.flags:
            variable = self._new(())
            self.out.flags[block] = variable
            latency = reduction_latency_ps(self.pricing)
            if latency:
                self.unary.setdefault("alpha", np.array([0, latency], dtype=np.int64))
                self.factors.append(Factor((variable,), self.unary["alpha"]))
        return self.out.flags[block]

    def _wide_operator(self, node: Node) -> None:
        """An operator with many operands stays replicated: its gradient is whole or partial, as its operands' are."""
        operands = reads(node)
        domain: Domain = (WHOLE, PARTIAL_GRAD) if node.differentiable else (WHOLE,)
        if node.outputs:
            domain = tuple((p,) * len(node.outputs) for p in domain if not isinstance(p, tuple))
        variable = self._new(domain)
        self.out.variable[node.index] = variable
        self.out.settings.append(Setting(False, (False,) * len(operands)))
        self.out.slices.append([[] for _ in operands])
        for index in operands:
            value, stored = self.graph.nodes[index], self.out.domain(index)
            table = [[_passes(value, s, m) for m in domain] for s in stored]
            self.factors.append(Factor((self.out.variable[index], variable), np.array(table, dtype=np.int64)))

    def _operator(self, node: Node) -> None:
        operands = reads(node)
        if len(operands) > MAX_OPERANDS:
            self._wide_operator(node)
            return
        settings, all_slices = self.out.settings, self.out.slices
        domains = [self.out.domains[self.out.variable[i]] for i in operands]
        like = (node.template, node.differentiable, node.measured, *map(id, domains))
        copied = self.tables.get(like) if self._is_alike(node) else None  # copies share their operands' domains
        if copied is None:
            setting = self.settings.of(node, operands, domains)
            slices: list[list[Shard]] = [[] for _ in operands]
            if any(setting.convertible):
                slices = slice_options(self.graph, node, domains, self.settings.sequences)
            if setting.fixed is not None:
                slices = fixed_slices(setting)
            ids = tuple(map(self._id, domains))
            made = self._tabulated(node, operands, domains, ids, setting, slices)
            copied = setting, slices, made, bool(made.table.any())
            self.tables[like] = copied
        setting, slices, made, costs = copied
        table = made.table
        variable = self._new(made.domain)
        self.out.variable[node.index] = variable
        settings.append(setting)
        all_slices.append(slices)
        variables = tuple(self.out.variable[i] for i in operands)
        if len(set(variables)) < len(variables):  # tied operands: the diagonal
            table, variables = _diagonal(table, variables)
        if costs:
            self.factors.append(Factor((*variables, variable), table))
        elif not made.domain:
            raise Infeasible(node.module or "model", f"{node.op} has no placement that its operands allow")

    def _is_alike(self, node: Node) -> bool:
        """Whether a copy's setting is its template's: nothing is frozen or fixed site by site."""
        return self.options.fixed_edits is None and not self.options.frozen and node.index not in self.graph.whole

    def _tabulated(
        self,
        node: Node,
        operands: tuple[int, ...],
        domains: list[Domain],
        ids: tuple[int, ...],
        setting: Setting,
        slices: list[list[Shard]],
    ) -> Choices:
        """The operator's table, shared by equal operators."""
        values = [self.graph.nodes[i] for i in operands]
        key = (
            (node.op, node.shape, node.dtype, node.outputs, node.differentiable, node.measured, node.recomputed),
            (setting, ids),
            _relative((node.arguments, node.keywords), {index: at for at, index in enumerate(operands)}),
            tuple((v.shape, v.dtype, v.differentiable, v.op == "parameter") for v in values),
        )
        if key not in self.memo:
            self.memo[key] = tabulate(self.graph, node, domains, setting, self.pricing, slices)
        return self.memo[key]

    def _id(self, domain: Domain) -> int:
        """Equal domains have one; copies share their domain's object, which is quicker to look up than to compare."""
        found = self.object_ids.get(id(domain))
        if found is None:
            found = self.object_ids[id(domain)] = self.domain_ids.setdefault(domain, len(self.domain_ids))
        return found

    def _outputs(self) -> None:
        """What the model returns is whole, or split if that was asked for; where its gradient is partial, what the
        caller adds counts on one rank."""
        for index in dict.fromkeys(self.graph.outputs):
            variable = self.out.variable[index]
            users = bool(self.settings.users[index])
            domain, node = self.out.domains[variable], self.graph.nodes[index]
            table = [output_price(self.pricing, node, s, self.out.whole_outputs, users) for s in domain]
            self.factors.append(Factor((variable,), np.array(table, dtype=np.int64)))

    def _hidden_states(self) -> None:
        """Between blocks the hidden state is not split but along the sequence: that is pure time's to choose."""
        if self.options.replicate != "never":
            return
        products = Counter(weight.block for weight in self.weights.values())
        for index in self.crossing:
            around = {self.block_of(self.graph.nodes[i].module) for i in (index, *self.settings.users[index])}
            if not any(products[block] > 1 for block in around if block):
                continue  # single layers in a row: what is between two of them is the inside of a pair
            domain = self.out.domain(index)
            if self.graph.nodes[index].nbytes == self.hidden and any(map(_is_cut, domain)):
                key = ("hidden", self._id(domain))
                if key not in self.unary:
                    column = [self.out.gather_ps * _is_cut(s) for s in domain]
                    self.unary[key] = np.array(column, dtype=np.int64)
                self.factors.append(Factor((self.out.variable[index],), self.unary[key]))

    def _unmoved(self) -> None:
        """Values that share memory with one changed in place stay replicated."""
        for index in sorted(self.graph.whole):
            variable = self.out.variable[index]
            table = [0 if isinstance(s, Replicate) else INFEASIBLE for s in self.out.domains[variable]]
            self.factors.append(Factor((variable,), np.array(table, dtype=np.int64)))

    def _same_site_same_choice(self) -> None:
        """Several calls of one site share one edit, so their results are stored alike."""
        for group in self.shared_sites:
            for a, b in zip(group, group[1:], strict=False):
                va, vb = self.out.variable[a], self.out.variable[b]
                da, db = self.out.domains[va], self.out.domains[vb]
                if va == vb or (len(da) == len(db) == 1):
                    continue
                both = self.graph.nodes[a].differentiable and self.graph.nodes[b].differentiable
                same = [[0 if _alike(x, y, both) else INFEASIBLE for y in db] for x in da]
                table = np.array(same, dtype=np.int64)
                if (table == 0).any():
                    self.factors.append(Factor((va, vb), table))

    def _memory(self, memory: Callable[[Node, Stored], int]) -> list[Factor]:
        factors = []
        columns: dict[object, Table | None] = {}
        for node in self.graph.nodes:
            if self.same.get(node.index, node.index) != node.index:
                continue
            variable = self.out.variable[node.index]
            domain = self.out.domains[variable]
            key = (node.template, node.differentiable, self.trains(node), self._id(domain))
            if key not in columns:
                made = np.array([memory(node, s) for s in domain], dtype=np.int64)
                columns[key] = made if made.any() else None
            column = columns[key]
            if column is not None:
                factors.append(Factor((variable,), column))
        return factors

    def _groups(self) -> tuple[tuple[int, ...], ...]:
        graph, variable, block_of = self.graph, self.out.variable, self.block_of
        blocks = [block_of(node.fqn or node.module) for node in graph.nodes]
        read_outside = {i for node in graph.nodes for i in node.operands if blocks[i] != blocks[node.index]}
        outside = {variable[index] for index in read_outside.union(graph.outputs)}
        members: dict[str, list[int]] = {path: [] for path in graph.outer_blocks().paths}
        for node, block in zip(graph.nodes, blocks, strict=True):
            if block and node.op != FUSED and variable[node.index] not in outside:
                members[block].append(variable[node.index])
        for block, flag in self.out.flags.items():
            if block:
                members[block].append(flag)
        return tuple(tuple(dict.fromkeys(group)) for group in members.values() if group)


def _passes(value: Node, stored: Stored, made: Stored) -> int:
    """0 if an operand stored so agrees with a replicated result made so."""
    single = made[0] if isinstance(made, tuple) else made
    fine = isinstance(stored, Replicate) and (not value.differentiable or stored == single)
    return 0 if fine else INFEASIBLE


def _is_cut(stored: Stored) -> bool:
    """Split, and not along the sequence."""
    return isinstance(stored, Shard) and not stored.layout.elastic


def _alike(a: Stored, b: Stored, gradients: bool) -> bool:
    """Equal, or split along the same dim of values that differ in length; gradients count where both have one."""
    if not gradients and isinstance(a, Replicate) and isinstance(b, Replicate):
        return True
    if isinstance(a, Shard) and isinstance(b, Shard) and a.dim == b.dim:
        return a.layout == b.layout or a.layout.size != b.layout.size
    return a == b


def _shared_sites(graph: Graph) -> list[list[int]]:
    """Groups of nodes that one call expression made in several calls."""
    last = {node.call: node.index for node in graph.nodes}
    several = (calls for calls in graph.calls_of().values() if len(calls) > 1)
    groups = ([last[call] for call in calls if call in last] for calls in several)
    return [group for group in groups if len(group) > 1]


def _relative(tree: object, at: dict[int, int]) -> object:
    """Arguments as a hashable key, operands by position."""
    if isinstance(tree, Ref):
        return ("ref", at[tree.index])
    if isinstance(tree, (tuple, list)):
        return tuple(_relative(item, at) for item in tree)
    if isinstance(tree, dict):
        return tuple((k, _relative(v, at)) for k, v in tree.items())
    return (type(tree).__name__, tree) if isinstance(tree, (int, float, str, bool)) else str(tree)


def _diagonal(table: Table, variables: tuple[int, ...]) -> tuple[Table, tuple[int, ...]]:
    letters = {v: chr(97 + i) for i, v in enumerate(dict.fromkeys(variables))}
    inputs = "".join(letters[v] for v in variables) + "z"
    outputs = "".join(letters.values()) + "z"
    return np.ascontiguousarray(np.einsum(f"{inputs}->{outputs}", table)), tuple(letters)
