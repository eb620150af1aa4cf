"""Checkpointed training: what blocks made is let go of, and made again when their backward passes come.

As `torch.utils.checkpoint` without reentrance does it, which is what Hugging Face's
``gradient_checkpointing_enable()`` asks for: of a block its inputs are kept, and its forward runs again until what
its backward needs is there, not to its end.
"""

from __future__ import annotations

from collections.abc import Collection

from colrow.cost_models.errors import UsageError

from .graph import Graph
from .saved_values import saves
from .strategies import is_leaf


def mark_recomputed(graph: Graph, checkpointed: bool) -> None:
    """Notes which nodes run again, and the ranges of the blocks that are ``checkpointed``: the outermost ones."""
    if checkpointed == bool(graph.checkpointed):
        return
    outermost = {graph.block_of()(block.fqn) for block in graph.blocks}
    ranges = tuple(block.nodes for block in graph.blocks if block.fqn in outermost) if checkpointed else ()
    graph.checkpointed = ranges
    for start, stop in ranges or [(0, len(graph.nodes))]:
        nodes = graph.nodes[start:stop]
        last = max((node.index for node in nodes if saves(graph, node)), default=start)
        for node in nodes:
            node.recomputed = bool(ranges) and node.index < last and not is_leaf(node)


def check_checkpointing(checkpointing: str, phases: Collection[str], sequence_parallel: object) -> None:
    """Refuses what is never checkpointed.

    Raises:
        UsageError: Another word, no workload that trains, or a split sequence.
    """
    if checkpointing not in ("none", "blocks"):
        raise UsageError("checkpointing", "unknown policy", got=checkpointing, need="none or blocks")
    if checkpointing == "none":
        return
    if "train" not in phases:
        raise UsageError("checkpointing", "nothing is kept for a backward pass", got=[*phases], need="phase train")
    if sequence_parallel is not False:
        raise UsageError("checkpointing", "not predicted for split sequences", got=sequence_parallel, need=False)
