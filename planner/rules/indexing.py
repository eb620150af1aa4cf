"""Gathering and scattering by index."""

from __future__ import annotations

from ..graph import Ref
from ..placement import PARTIAL, WHOLE, Partial, Replicate, Shard
from .base import Operation, Result, all_whole, rule, wrapped


@rule("index")
def index(op: Operation) -> Result:
    """``x[i, j, :]`` with replicated indices: dims that are not indexed may be split; linear in x."""
    x, indices = op.argument(0), op.argument(1)
    if not all(isinstance(op.placement(i), Replicate) for i in indices if isinstance(i, Ref)):
        return None
    at = [d for d, i in enumerate(indices) if isinstance(i, Ref)]
    match op.placement(x):
        case Partial():
            return PARTIAL
        case Shard(dim, layout):
            if dim in at or not at or at != list(range(at[0], at[-1] + 1)):
                return None
            made = len(op.node.shape) - (len(op.shape(x)) - len(at))
            return Shard(dim if dim < at[0] else dim - len(at) + made, layout)
        case placement:
            return placement


@rule("index_select", "index_add")
def along_dim(op: Operation) -> Result:
    """Work along one dim with replicated indices; the others may be split."""
    x, dim, positions = op.argument(0), op.argument(1), op.argument(2)
    if not isinstance(op.placement(positions), Replicate):
        return None
    placements = {op.placement(t) for t in op.tensors if t != positions}
    only = next(iter(placements)) if len(placements) == 1 else None
    match only:
        case Shard(d):
            return only if d != wrapped(dim, len(op.shape(x))) else None
        case Partial():
            return PARTIAL
        case Replicate():
            return WHOLE
    return None


@rule("index_put")
def index_put(op: Operation) -> Result:
    """``x[i] = values`` with replicated indices: trailing dims may be split alike; linear in both together."""
    x, indices, values = op.argument(0), op.argument(1), op.argument(2)
    if not all(isinstance(op.placement(i), Replicate) for i in indices if isinstance(i, Ref)):
        return None
    at = [d for d, i in enumerate(indices) if isinstance(i, Ref)]
    px, pv = op.placement(x), op.placement(values)
    match px, pv:
        case Replicate(), Replicate():
            return WHOLE
        case Partial(), Partial():
            return PARTIAL
        case Shard(d, layout), Shard(e, other):
            trailing = len(op.shape(x)) - d == len(op.shape(values)) - e
            return px if layout == other and trailing and d > max(at) and at == list(range(len(at))) else None
        case Shard(d), Replicate():
            return px if op.shape(values) == () and d not in at else None
    return None


@rule("tril", "triu", "pad", "constant_pad_nd")
def last_two(op: Operation) -> Result:
    """Linear; dims before the last two, or that nothing is added to, may be split."""
    x = op.argument(0)
    match op.placement(x):
        case Shard(d, layout):
            if op.node.op in ("pad", "constant_pad_nd"):
                from_last = 2 * (len(op.shape(x)) - 1 - d)
                return Shard(d, layout) if not any(op.argument(1)[from_last : from_last + 2]) else None
            return Shard(d, layout) if d < len(op.shape(x)) - 2 else None
        case Partial():
            return (
                PARTIAL
                if op.node.op in ("tril", "triu") or not op.argument(3 if op.node.op == "pad" else 2, "value", 0)
                else None
            )
        case placement:
            return placement


@rule("slice_scatter")
def slice_scatter(op: Operation) -> Result:
    """``base`` with a slice replaced by ``source`` (broadcast): split alike along the other dims."""
    base, source, dim = op.argument(0), op.argument(1), op.argument(2)
    match op.placement(base):
        case Shard(d, layout):
            at = d - len(op.shape(base)) + len(op.shape(source))
            is_split = at >= 0 and op.shape(source)[at] != 1
            wanted = Shard(at, layout) if is_split else WHOLE
            return op.placement(base) if d != dim and op.placement(source) == wanted else None
        case Partial():
            return PARTIAL if isinstance(op.placement(source), Partial) else None
        case Replicate():
            return WHOLE if isinstance(op.placement(source), Replicate) else None
    return None


@rule("changed_in_place")
def changed_in_place(op: Operation) -> Result:
    """A value after something was written into its storage through another name of it: never split."""
    return WHOLE if all_whole(op) else None


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def factory(op: Operation) -> Result:
    """Made from a shape: what the operand holds does not matter, but a length measured on a split dim is local."""
    placement, sizes = op.placement(op.argument(0)), op.argument(1)
    if isinstance(placement, Shard) and len(sizes) == len(op.shape(op.argument(0))):
        return placement if sizes[placement.dim] == placement.layout.size else None
    return WHOLE
