"""Several results of one reduction, orders and ranks along a dim, and look-ups in sorted values."""

from __future__ import annotations

from ..placement import WHOLE, Replicate, Shard
from .base import Operation, Result, all_whole, rule, wrapped
from .pointwise import shards
from .reductions import other_reduction


@rule("var_mean", "std_mean")
def with_mean(op: Operation) -> Result:
    """Two results of one reduction, neither partial: dims that are not reduced may be split."""
    made = other_reduction(op)
    return None if made is None or isinstance(made, tuple) else (made,) * len(op.node.outputs)


@rule("nanmean", "nansum")
def without_nans(op: Operation) -> Result:
    """How many numbers count is known only where all are: dims that are not reduced may be split."""
    return None if not isinstance(op.placement(op.argument(0)), (Shard, Replicate)) else other_reduction(op)


@rule("cummax", "cummin")
def running(op: Operation) -> Result:
    """Values and places along one dim; the others may be split."""
    return _along(op, wrapped(op.argument(1, "dim"), len(op.node.shape)), kept=True)


@rule("kthvalue", "median", "nanmedian", "mode", "aminmax")
def picked(op: Operation) -> Result:
    """One or two values along one dim, which goes or becomes 1; of no dim, of all elements."""
    x = op.argument(0)
    rank = len(op.shape(x))
    default = -1 if op.node.op in ("kthvalue", "mode") else None
    dim = op.argument(2 if op.node.op == "kthvalue" else 1, "dim", default)
    if dim is None:
        return (WHOLE if not op.node.outputs else (WHOLE,) * len(op.node.outputs)) if all_whole(op) else None
    return _along(op, wrapped(dim, rank), kept=len(op.node.shape) == rank)


@rule("argsort")
def argsort(op: Operation) -> Result:
    """An order along one dim; the others may be split."""
    x = op.argument(0)
    dim = op.node.keywords.get("dim", next((a for a in op.node.arguments[1:] if type(a) is int), -1))
    match op.placement(x):
        case Shard(d) as placement:
            return None if d == wrapped(dim, len(op.shape(x))) else placement
        case Replicate():
            return WHOLE
    return None


def _along(op: Operation, dim: int, kept: bool) -> Result:
    count = len(op.node.outputs)
    match op.placement(op.argument(0)):
        case Shard(d, layout):
            return None if d == dim else (Shard(d - (d > dim and not kept), layout),) * count
        case Replicate():
            return (WHOLE,) * count
    return None


@rule("bucketize", "isin")
def looked_up(op: Operation) -> Result:
    """Each element by itself against a whole list."""
    x, among = op.argument(0), op.argument(1)
    return op.placement(x) if isinstance(op.placement(x), (Shard, Replicate)) and _is_whole(op, among) else None


@rule("searchsorted")
def searchsorted(op: Operation) -> Result:
    """Each value by itself against one whole list, or rows of values against rows alike."""
    among, x = op.argument(0), op.argument(1)
    match op.placement(x):
        case Shard(d, layout):
            if len(op.shape(among)) == 1:
                return Shard(d, layout) if _is_whole(op, among) else None
            rows = d < len(op.shape(x)) - 1 and len(op.tensors) == 2
            return Shard(d, layout) if rows and op.placement(among) == op.placement(x) else None
        case Replicate():
            return WHOLE if all_whole(op) else None
    return None


def _is_whole(op: Operation, argument: object) -> bool:
    return op.placement(argument) in (None, WHOLE)


@rule("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits", "kl_div")
def loss(op: Operation) -> Result:
    """Of each element where nothing is reduced (``reduction`` 0); else of whole values."""
    position = 4 if op.node.op == "binary_cross_entropy_with_logits" else 2
    if op.argument(position, "reduction", 1) != 0:
        return WHOLE if all_whole(op) else None
    return shards(op, len(op.node.shape), op.node.shape)
