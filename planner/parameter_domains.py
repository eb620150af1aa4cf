"""What each parameter may be stored as: the splits its readers can carry, whole, or what a pin or a given plan says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .candidates import Candidates
from .edits import ParameterEdit
from .graph import Graph, Node
from .opaque import OPERATOR as OPAQUE
from .placement import PARTIAL_GRAD, WHOLE, Shard
from .roles import Weight, label_of
from .site_settings import Options
from .storing import Domain, Stored


@dataclass(frozen=True)
class ParameterChoice:
    """One parameter's domain.

    Attributes:
        domain: Placements in order of preference.
        should_split: It is a weight that stays whole only where no legal plan splits it.
        reason: Why it cannot be split, or was not asked to be; "" where it can.
    """

    domain: Domain
    should_split: bool = False
    reason: str = ""


class ParameterDomains:
    """The domains of one graph's parameters."""

    def __init__(
        self,
        graph: Graph,
        options: Options,
        found: Candidates,
        same: Mapping[int, int],
        weights: Mapping[int, Weight],
        penalises: bool,
    ) -> None:
        self.graph, self.options, self.found = graph, options, found
        self.same, self.weights, self.penalises = same, weights, penalises
        self.shared: dict[object, ParameterChoice] = {}

    def of(self, node: Node) -> ParameterChoice:
        """The domain of the parameter ``node``; copies share one unless names decide."""
        if self.options.fixed_parameters is not None:
            return ParameterChoice(self._given(node, self.options.fixed_parameters[node.fqn]))
        weight = self.weights.get(self.same[node.index])
        if self.options.pin:
            return self._choice(node, weight)
        key = (node.template, node.differentiable, weight and weight.may_stay_whole)
        if key not in self.shared:
            self.shared[key] = self._choice(node, weight)
        return self.shared[key]

    def _choice(self, node: Node, weight: Weight | None) -> ParameterChoice:
        splits = [s for s in self.found.of(node) if s.layout.local < s.layout.size]
        pinned = self._pinned(node, weight, splits)
        if pinned is not None:
            return ParameterChoice(tuple(pinned), reason="pinned")
        if weight is not None and splits:
            never = self.penalises and self.options.replicate == "never"
            return ParameterChoice((*splits, *_wholes(node)), never and not weight.may_stay_whole)
        reason = ""
        if weight is not None:
            opaque = any(self.graph.nodes[reader].op == OPAQUE for reader in weight.readers)
            reason = (
                "read by a module that cannot be traced" if opaque else "no dim of it can be cut for this many ranks"
            )
        return ParameterChoice((*_wholes(node), *splits), reason=reason)

    def _given(self, node: Node, edit: ParameterEdit) -> Domain:
        """A given layout, with the gradient that given moves leave, or any."""
        fixed = self.options.fixed_edits
        if edit.dim is not None and edit.layout is not None:
            return (Shard(edit.dim, edit.layout),)
        if fixed is not None:
            return (PARTIAL_GRAD if node.fqn in fixed.partial else WHOLE,)
        return _wholes(node)

    def _pinned(self, node: Node, weight: Weight | None, splits: Sequence[Shard]) -> list[Stored] | None:
        names = [node.fqn, node.fqn.removesuffix(".weight"), node.fqn.rpartition(".")[0]]
        for pattern, word in self.options.pin.items():
            if not any(fnmatchcase(name, pattern) for name in names):
                continue
            if word == "replicated":
                return list(_wholes(node))
            if weight is None:
                continue
            fitting: list[Stored] = [s for s in splits if word in self._words(weight, node, s)]
            if fitting:
                return fitting
        return None

    def _words(self, weight: Weight, node: Node, shard: Shard) -> set[str]:
        words = set()
        for reader in weight.readers:
            product = self.graph.nodes[reader]
            direct = next(
                (i for i in product.operands if self.same.get(i, i) == self.same.get(node.index, node.index)), None
            )
            words.add(
                label_of(self.graph, product, direct, shard.dim) if direct is not None else ("column", "row")[shard.dim]
            )
        return words | ({"vocab"} if "column" in words else set())


def _wholes(node: Node) -> Domain:
    return (WHOLE, PARTIAL_GRAD) if node.differentiable else (WHOLE,)
