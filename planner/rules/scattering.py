"""Reading and writing along one dim at given places: the other dims may be split, values and places alike."""

from __future__ import annotations

from ..graph import Ref
from ..placement import PARTIAL, WHOLE, Partial, Replicate, Shard
from .base import Operation, Result, rule, wrapped


@rule("gather", "take_along_dim")
def gather(op: Operation) -> Result:
    """One place per element of the result: values and places split alike where they are equally long; linear in the
    values."""
    x = op.argument(0)
    places, dim = (
        (op.argument(2), op.argument(1)) if op.node.op == "gather" else (op.argument(1), op.argument(2, "dim"))
    )
    match op.placement(x), op.placement(places):
        case Shard(d), Shard() as other:
            alike = dim is not None and len(op.shape(x)) == len(op.shape(places))
            if not alike or op.placement(x) != other or d == wrapped(dim, len(op.shape(x))):
                return None
            return other if op.shape(x)[d] == op.shape(places)[d] else None
        case Partial(), Replicate():
            return PARTIAL
        case Replicate(), Replicate():
            return WHOLE
    return None


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(op: Operation) -> Result:
    """One place per element of the source: all three split alike where they are equally long. Replacing and adding are
    linear in what is there and the source together."""
    x, dim, places, source = (op.argument(i) for i in range(4))
    sources = [source] if isinstance(source, Ref) else []
    placement = op.placement(x)
    match placement:
        case Shard(d):
            tensors = [x, places, *sources]
            alike = all(op.placement(t) == placement and op.shape(t)[d] == op.shape(x)[d] for t in tensors)
            return placement if alike and d != wrapped(dim, len(op.shape(x))) else None
        case Partial():
            joint = op.node.op != "scatter_reduce" and "reduce" not in op.node.keywords and len(op.node.arguments) == 4
            together = sources or source == 0
            partial = all(isinstance(op.placement(t), Partial) for t in sources)
            return PARTIAL if joint and together and partial and isinstance(op.placement(places), Replicate) else None
        case Replicate():
            return WHOLE if all(isinstance(op.placement(t), Replicate) for t in op.tensors) else None
    return None


@rule("index_copy", "index_fill")
def index_copy(op: Operation) -> Result:
    """Whole slices written at the places of a list: values and slices split alike along the other dims; linear in both
    together."""
    x, dim, places, source = (op.argument(i) for i in range(4))
    placement, given = op.placement(x), op.placement(source)
    if not isinstance(op.placement(places), Replicate):
        return None
    match placement:
        case Shard(d):
            fine = given == placement or (op.shape(source) == () and given in (None, WHOLE))
            return placement if fine and d != wrapped(dim, len(op.shape(x))) else None
        case Partial():
            return PARTIAL if given == PARTIAL or (given is None and source == 0) else None
        case Replicate():
            return WHOLE if given in (None, WHOLE) else None
    return None
