"""How long a model's code holds its values: a local outlives its last reader until it is assigned anew.

Measured while the model is traced (`CallRecorder.let_go`), counted in operators, so that copies of a block share it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import accumulate

import torch.fx

from .call_record import TAG
from .graph import LEAVES, Graph


class HeldValues:
    """From numbers of recorded calls to numbers of operators."""

    def __init__(self, let_go: Mapping[torch.fx.Node, int]) -> None:
        self._let_go = let_go
        self._made: list[tuple[int, int]] = []  # a call's number, and a node that it made
        self._until: dict[int, int] = {}  # node -> calls made when the code let go of it

    def add(self, traced: torch.fx.Node, index: int) -> None:
        """The node ``index`` is what was traced as ``traced``; nodes come in order."""
        tag = (traced.meta.get("custom") or {}).get(TAG)
        if tag is not None:
            self._made.append((tag, index))
        if traced in self._let_go:
            self._until[index] = self._let_go[traced]

    def forget(self, indices: Iterable[int]) -> None:
        """Values that tracing itself holds: when the code lets go of them is not known."""
        for index in indices:
            self._until.pop(index, None)

    def settle(self, graph: Graph, start: int) -> None:
        """Fills ``held`` of the nodes from ``start`` on."""
        count = [*accumulate(node.op not in LEAVES for node in graph.nodes)]
        for index in [index for index in self._until if index >= start]:
            last = self._made[bisect_left(self._made, (self._until.pop(index), -1)) - 1][1]
            graph.nodes[index].held = max(0, count[last] - count[index])


def held_until(graph: Graph) -> dict[int, int]:
    """Node -> the node during which its value is let go, where the code holds it at all."""
    run = [node.index for node in graph.nodes if node.op not in LEAVES]
    held = [(at, graph.nodes[index].held) for at, index in enumerate(run)]
    return {run[at]: run[min(at + more, len(run) - 1)] for at, more in held if more}
