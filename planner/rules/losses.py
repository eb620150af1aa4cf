"""Losses over a split vocabulary."""

from __future__ import annotations

from ..placement import WHOLE, Replicate, Shard
from .base import Operation, Result, all_whole, rule


@rule("cross_entropy_loss")
def cross_entropy(op: Operation) -> Result:
    """Of [rows, classes] or [classes] with the classes split and indices as labels: whole on every rank, through
    reductions of its own. Class weights and probabilities as labels are not split."""
    logits, labels = op.argument(0), op.argument(1)
    placement = op.placement(logits)
    if not isinstance(placement, Shard):
        return WHOLE if all_whole(op) else None
    indices = not op.nodes[labels.index].dtype.is_floating_point and isinstance(op.placement(labels), Replicate)
    last = len(op.shape(logits)) - 1
    fine = indices and op.argument(2, "weight") is None and last <= 1 and placement.dim == last
    return WHOLE if fine and not placement.layout.is_replicated else None
