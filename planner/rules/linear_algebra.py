"""Products beside the matmuls of layers: outer and Kronecker products, matrices times vectors, distances.

A product of a value with itself is not linear in it: both operands would be partial, which no rule here takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..placement import PARTIAL, WHOLE, Partial, Replicate, Shard
from .base import Operation, Result, all_whole, rule, wrapped
from .products import Factors, factored


@factored("outer", "ger")
def outer(op: Operation) -> Factors | None:
    """``m, n -> m n``."""
    a, b = op.argument(0), op.argument(1)
    return Factors(((a, ("m",)), (b, ("n",))), ("m", "n"))


@factored("dot", "vdot")
def dot(op: Operation) -> Factors | None:
    """``k, k ->``."""
    a, b = op.argument(0), op.argument(1)
    return Factors(((a, ("k",)), (b, ("k",))), ())


@factored("mv")
def mv(op: Operation) -> Factors | None:
    """``m k, k -> m``."""
    return Factors(((op.argument(0), ("m", "k")), (op.argument(1), ("k",))), ("m",))


@factored("addmv")
def addmv(op: Operation) -> Factors | None:
    """``m, m k, k -> m``: the addend is a bias, unless it is scaled."""
    added, matrix, vector = op.argument(0), op.argument(1), op.argument(2)
    if op.node.keywords or op.shape(added) != op.node.shape:
        return None
    return Factors(((matrix, ("m", "k")), (vector, ("k",))), ("m",), added)


@factored("inner")
def inner(op: Operation) -> Factors | None:
    """``m.. k, n.. k -> m.. n..``."""
    a, b = op.argument(0), op.argument(1)
    if not op.shape(a) or not op.shape(b):
        return None
    left = tuple(f"m{i}" for i in range(len(op.shape(a)) - 1))
    right = tuple(f"n{i}" for i in range(len(op.shape(b)) - 1))
    return Factors(((a, (*left, "k")), (b, (*right, "k"))), (*left, *right))


@factored("tensordot")
def tensordot(op: Operation) -> Factors | None:
    """The dims listed for both are summed; the others come out, the first operand's first."""
    a, b = op.argument(0), op.argument(1)
    left: list[str | None] = [f"m{i}" for i in range(len(op.shape(a)))]
    right: list[str | None] = [f"n{i}" for i in range(len(op.shape(b)))]
    summed = {(wrapped(i, len(left)), wrapped(j, len(right))) for i, j in zip(*_summed(op), strict=True)}
    kept = [[n for at, n in enumerate(names) if at not in {pair[side] for pair in summed}]
            for side, names in enumerate((left, right))]  # fmt: skip
    for k, (i, j) in enumerate(sorted(summed)):
        left[i] = right[j] = f"k{k}"
    return Factors(((a, tuple(left)), (b, tuple(right))), (*kept[0], *kept[1]))


def _summed(op: Operation) -> tuple[Sequence[int], Sequence[int]]:
    return op.argument(2, "dims_self"), op.argument(3, "dims_other")


@rule("addbmm")
def addbmm(op: Operation) -> Result:
    """``m n, b m k, b k n -> m n``: the batch is summed, so its split gives a partial sum, as the addend must be."""
    added, a, b = (op.placement(op.argument(i)) for i in range(3))
    match a, b:
        case Shard(0, layout), Shard(0, other):
            return PARTIAL if isinstance(added, Partial) and layout == other and layout.is_partition else None
        case Replicate(), Replicate():
            return WHOLE if isinstance(added, Replicate) else None
    return None


@factored("linalg_vecdot")
def vecdot(op: Operation) -> Factors | None:
    """``... k, ... k -> ...`` of equal shapes."""
    a, b = op.argument(0), op.argument(1)
    rank = len(op.shape(a))
    if op.shape(a) != op.shape(b):
        return None
    labels = [f"b{i}" for i in range(rank)]
    labels[wrapped(op.argument(2, "dim", -1), rank)] = "k"
    return Factors(((a, tuple(labels)), (b, tuple(labels))), tuple(n for n in labels if n != "k"))


@factored("bilinear")
def bilinear(op: Operation) -> Factors | None:
    """``... i, ... j, o i j -> ... o``."""
    a, b, weight = op.argument(0), op.argument(1), op.argument(2)
    lead = tuple(f"b{i}" for i in range(len(op.shape(a)) - 1))
    factors = ((a, (*lead, "i")), (b, (*lead, "j")), (weight, ("o", "i", "j")))
    return Factors(factors, (*lead, "o"), op.argument(3, "bias"))


@rule("kron")
def kron(op: Operation) -> Result:
    """Each element of the first times the whole second: the first may be split, each of its elements then a block;
    linear in each."""
    a, b = op.argument(0), op.argument(1)
    match op.placement(a), op.placement(b):
        case Shard(d, layout), Replicate():
            return Shard(d, layout.scaled(op.shape(b)[d])) if len(op.shape(a)) == len(op.shape(b)) else None
        case (Partial(), Replicate()) | (Replicate(), Partial()):
            return PARTIAL
        case Replicate(), Replicate():
            return WHOLE
    return None


@rule("cdist")
def cdist(op: Operation) -> Result:
    """``... m k, ... n k -> ... m n``: all pairs of rows; batch dims alike, or the rows of either. Not padded: the
    root of a distance of zero has no derivative."""
    a, b = op.argument(0), op.argument(1)
    rank = len(op.node.shape)
    if len(op.shape(a)) != rank or op.shape(a)[:-2] != op.shape(b)[:-2]:
        return WHOLE if all_whole(op) else None
    match op.placement(a), op.placement(b):
        case Shard(d, layout), Shard(e, other):
            return Shard(d, layout) if d == e < rank - 2 and layout == other and not layout.is_padded else None
        case Shard(d, layout), Replicate():
            return Shard(d, layout) if d == rank - 2 and not layout.is_padded else None
        case Replicate(), Shard(d, layout):
            return Shard(rank - 1, layout) if d == rank - 2 and not layout.is_padded else None
        case Replicate(), Replicate():
            return WHOLE
    return None


@rule("cosine_similarity", "pairwise_distance")
def between(op: Operation) -> Result:
    """One number per pair of vectors of equal shapes: every dim but the vectors' own may be split. Not padded: the root
    of a length of zero has no derivative."""
    a, b = op.argument(0), op.argument(1)
    pa, pb = op.placement(a), op.placement(b)
    rank = len(op.shape(a))
    dim = rank - 1 if op.node.op == "pairwise_distance" else wrapped(op.argument(2, "dim", 1), rank)
    match pa:
        case Shard(d, layout):
            if pa != pb or op.shape(a) != op.shape(b) or d == dim or layout.is_padded:
                return None
            return Shard(d - (d > dim and len(op.node.shape) < rank), layout)
        case Replicate():
            return WHOLE if isinstance(pb, Replicate) else None
    return None


@rule("cross", "linalg_cross")
def cross(op: Operation) -> Result:
    """Vectors of three along one dim, of equal shapes: the other dims may be split alike; linear in each."""
    a, b = op.argument(0), op.argument(1)
    pa, pb = op.placement(a), op.placement(b)
    dim = op.argument(2, "dim", -1 if op.node.op == "linalg_cross" else None)
    match pa, pb:
        case Shard(d), Shard():
            fine = dim is not None and d != wrapped(dim, len(op.shape(a)))
            return pa if pa == pb and fine and op.shape(a) == op.shape(b) else None
        case (Partial(), Replicate()) | (Replicate(), Partial()):
            return PARTIAL
        case Replicate(), Replicate():
            return WHOLE
    return None
