"""What is known of a graph once all its nodes are there: whither gradients flow, which nodes each block has."""

from __future__ import annotations

from collections.abc import Sequence

from .graph import Block, Graph


def no_gradient_without_readers(graph: Graph) -> None:
    """No gradient comes back into a value on which no returned value depends: nothing is summed for it."""
    users, returned = graph.users(), set(graph.outputs)
    for node in reversed(graph.nodes):
        if node.differentiable and node.index not in returned:
            node.differentiable = any(graph.nodes[reader].differentiable for reader in users[node.index])


def record_blocks(graph: Graph, paths: Sequence[str]) -> None:
    """Fills ``graph.blocks`` from the nodes' module paths; leaves count with the block that reads them first."""
    ranges: dict[str, tuple[int, int]] = {}
    known = set(paths)
    around: dict[str, list[str]] = {"": []}  # module path -> the blocks it lies in
    for node in graph.nodes:
        if node.module not in around:
            parts = node.module.split(".")
            prefixes = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
            around[node.module] = [path for path in prefixes if path in known]
        for path in around[node.module]:
            start, _ = ranges.get(path, (node.index, 0))
            ranges[path] = (start, node.index + 1)
    order = sorted(ranges.items(), key=lambda item: (item[1][0], -item[1][1]))
    position = {path: i for i, (path, _) in enumerate(order)}
    for i, (path, nodes) in enumerate(order):
        graph.blocks.append(Block(path, nodes, position.get(path, i)))
