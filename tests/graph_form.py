"""What a traced graph says, independent of how its leaves are numbered: for comparing graphs."""

from __future__ import annotations

from typing import Any

from colrow.planner.graph import LEAVES, Graph, Ref
from colrow.planner.measured import Measured


def form(graph: Graph) -> dict[str, Any]:
    """The graph with operators numbered in order and leaves by name."""
    operators = [n for n in graph.nodes if n.op not in LEAVES]
    names: dict[int, Any] = {n.index: (n.op, n.fqn) for n in graph.nodes if n.op in LEAVES}
    names |= {n.index: at for at, n in enumerate(operators)}

    def named(tree: Any) -> Any:
        if isinstance(tree, Ref):
            return ("value", names[tree.index])
        if isinstance(tree, Measured):
            return ("measured", int(tree), named(tree.origin) if isinstance(tree.origin, Ref) else None, tree.dim)
        if isinstance(tree, (tuple, list)):
            return tuple(map(named, tree))
        if isinstance(tree, dict):
            return {key: named(value) for key, value in tree.items()}
        return str(tree)

    def called(index: int) -> Any:
        if index < 0:
            return None
        call = graph.calls[index]
        return call.site, call.function, named(call.leaves)

    leaves = {(n.op, n.fqn): (n.shape, n.dtype, n.differentiable) for n in graph.nodes if n.op in LEAVES}
    made = [
        (n.op, n.overload, named((n.arguments, n.keywords)), n.shape, n.dtype, n.outputs, n.differentiable, n.module)
        for n in operators
    ]
    return {
        "leaves": leaves,
        "operators": made,
        "calls": [called(n.call) for n in operators],
        "outputs": [names[i] for i in graph.outputs],
        "paths": graph.output_paths,
        "ties": graph.ties,
        "whole": {names[i] for i in graph.whole},
        "blocks": [
            (b.fqn, [names[n.index] for n in operators if b.nodes[0] <= n.index < b.nodes[1]]) for b in graph.blocks
        ],
    }
