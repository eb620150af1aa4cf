"""Diagonals, differences, orders of dims: linear, along some dims, and the others may be split."""

from __future__ import annotations

from ..graph import Ref
from ..placement import PARTIAL, WHOLE, Partial, Replicate, Shard
from .base import Operation, Result, rule, shifted, wrapped


@rule("diagonal")
def diagonal(op: Operation) -> Result:
    """Two dims become one, the last."""
    x = op.argument(0)
    rank = len(op.shape(x))
    gone = {wrapped(op.argument(2, "dim1", 0), rank), wrapped(op.argument(3, "dim2", 1), rank)}
    placement = op.placement(x)
    return (
        None if placement is None else shifted(placement, lambda d: None if d in gone else d - sum(g < d for g in gone))
    )


@rule("diag_embed")
def diag_embed(op: Operation) -> Result:
    """The last dim becomes two, wherever they are put."""
    rank = len(op.node.shape)
    made = {wrapped(op.argument(2, "dim1", -2), rank), wrapped(op.argument(3, "dim2", -1), rank)}
    others = [d for d in range(rank) if d not in made]
    placement = op.placement(op.argument(0))
    return None if placement is None else shifted(placement, lambda d: others[d] if d < len(others) else None)


@rule("diag", "trace", "take", "rot90")
def whole_or_sum(op: Operation) -> Result:
    """Rearranged as a whole: only a partial sum passes."""
    if not all(isinstance(op.placement(t), Replicate) for t in op.tensors[1:]):
        return None
    placement = op.placement(op.argument(0))
    return None if isinstance(placement, Shard) else placement


@rule("fliplr", "flipud")
def flipped(op: Operation) -> Result:
    """One dim reversed."""
    dim = 1 if op.node.op == "fliplr" else 0
    placement = op.placement(op.argument(0))
    return None if placement is None else shifted(placement, lambda d: None if d == dim else d)


@rule("diff")
def diff(op: Operation) -> Result:
    """Neighbours along one dim, with what is put before and after; split alike along the others."""
    x = op.argument(0)
    dim = wrapped(op.argument(2, "dim", -1), len(op.shape(x)))
    placements = {op.placement(t) for t in op.tensors}
    only = next(iter(placements)) if len(placements) == 1 else None
    match only:
        case Shard(d):
            return None if d == dim else only
        case Partial():
            return PARTIAL
        case Replicate():
            return WHOLE
    return None


@rule("one_hot")
def one_hot(op: Operation) -> Result:
    """Each index becomes a last dim, as long as it is told."""
    placement = op.placement(op.argument(0))
    if isinstance(placement, Shard) and op.argument(1, "num_classes", -1) < 0:
        return None
    return placement


@rule("block_diag", "hstack", "vstack", "dstack", "column_stack")
def joined_whole(op: Operation) -> Result:
    """Joined as a whole: partial sums together, or none."""
    kinds = {type(op.placement(t)) for t in op.argument(0) if isinstance(t, Ref)}
    return WHOLE if kinds == {Replicate} else PARTIAL if kinds == {Partial} else None


@rule("unfold")
def unfold(op: Operation) -> Result:
    """Windows along one dim, their elements as a last dim."""
    x = op.argument(0)
    dim = wrapped(op.argument(1, "dimension"), len(op.shape(x)))
    placement = op.placement(x)
    return None if placement is None else shifted(placement, lambda d: None if d == dim else d)


@rule("_weight_norm")
def weight_norm(op: Operation) -> Result:
    """``v, g -> g v / |v|`` with one length per index of one dim, along which both may be split. Not padded: zero
    divides."""
    v, g = op.argument(0), op.argument(1)
    dim = op.argument(2, "dim", 0)
    match op.placement(v), op.placement(g):
        case Shard(d, layout), Shard(e, other):
            alike = layout == other and d == e == dim and not layout.is_padded
            return Shard(d, layout) if alike else None
        case Replicate(), Replicate():
            return WHOLE
        case Replicate(), Partial():
            return PARTIAL
    return None


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(op: Operation) -> Result:
    """``n c .., n .. d -> n c ..``: images alike, or channels with a whole grid; linear in the images."""
    images, grid = op.placement(op.argument(0)), op.placement(op.argument(1))
    match images, grid:
        case Shard(0), Shard(0):
            return images if images == grid else None
        case Shard(1), Replicate():
            return images
        case Partial(), Replicate():
            return PARTIAL
        case Replicate(), Replicate():
            return WHOLE
    return None


@rule("masked_scatter")
def masked_scatter(op: Operation) -> Result:
    """Values put where a mask says, in order: linear in both together, with the mask whole; never split."""
    base, mask, source = (op.placement(op.argument(i)) for i in range(3))
    if not isinstance(mask, Replicate):
        return None
    match base, source:
        case Partial(), Partial():
            return PARTIAL
        case Replicate(), Replicate():
            return WHOLE
    return None
