"""Bags of embeddings: looked-up rows, added up, averaged or compared."""

from __future__ import annotations

from ..placement import PARTIAL, WHOLE, Replicate, Shard
from .base import Operation, Result, rule

LOOKUPS = frozenset({"embedding", "embedding_bag"})
"""Operators that read rows of their first operand by index."""
LARGEST = 2  # the mode that takes each column's largest


@rule("embedding_bag")
def embedding_bag(op: Operation) -> Result:
    """Columns split: so is the result's last dim. Rows split: ids outside the slice count nothing, the result is
    partial (not the largest of each column: which is largest is known only to all). Ids and offsets are whole."""
    weight = op.argument(0)
    if not all(isinstance(op.placement(t), Replicate) for t in op.tensors if t != weight):
        return None
    match op.placement(weight):
        case Shard(1, layout):
            return Shard(len(op.node.shape) - 1, layout)
        case Shard(0):
            return PARTIAL if op.argument(4, "mode", 0) != LARGEST else None
        case Replicate():
            return WHOLE
    return None
