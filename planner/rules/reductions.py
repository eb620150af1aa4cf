"""Reductions, normalisations and operators that work along one dim."""

from __future__ import annotations

from collections.abc import Iterable

from ..placement import PARTIAL, WHOLE, Partial, Replicate, Shard
from .base import Operation, Result, all_whole, rule, wrapped
from .pointwise import shards


def _reduced(op: Operation, dims: Iterable[int] | int | None) -> tuple[set[int], bool]:
    """The dims reduced, and whether they are kept (where ``keepdim`` stands differs between overloads)."""
    rank = len(op.shape(op.argument(0)))
    listed = range(rank) if dims is None else [dims] if isinstance(dims, int) else list(dims) or range(rank)
    return {wrapped(d, rank) for d in listed}, len(op.node.shape) == rank


def _reduce(op: Operation, gone: set[int], keepdim: bool, over_split: Result, partial: Result) -> Result:
    match op.placement(op.argument(0)):
        case Shard(dim, layout):
            if dim in gone:
                return over_split
            return Shard(dim if keepdim else dim - sum(g < dim for g in gone), layout)
        case Partial():
            return partial
        case Replicate():
            return WHOLE
        case None:
            return None


@rule("sum", "mean")
def linear_reduction(op: Operation) -> Result:
    """A sum over a split dim is partial; so is a mean, each rank dividing by the global length."""
    gone, keepdim = _reduced(op, op.argument(1, "dim"))
    return _reduce(op, gone, keepdim, PARTIAL, PARTIAL)


@rule(
    "amax",
    "amin",
    "argmax",
    "argmin",
    "any",
    "all",
    "var",
    "std",
    "logsumexp",
    "norm",
    "linalg_vector_norm",
    "prod",
    "count_nonzero",
)
def other_reduction(op: Operation) -> Result:
    """Only dims that are not reduced may be split."""
    position = 2 if op.node.op in ("norm", "linalg_vector_norm") else 1
    dims = op.argument(position, "dim")
    if isinstance(dims, bool):  # var(x, unbiased)
        dims = None
    gone, keepdim = _reduced(op, dims)
    return _reduce(op, gone, keepdim, None, None)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp")
def along(op: Operation) -> Result:
    """Independent along every dim but one."""
    x = op.argument(0)
    dim = wrapped(op.argument(1, "dim", -1), len(op.shape(x)))
    match op.placement(x):
        case Shard(d, layout):
            return None if d == dim else Shard(d, layout)
        case Partial():
            return PARTIAL if op.node.op == "cumsum" else None
        case placement:
            return placement


@rule("glu")
def glu(op: Operation) -> Result:
    """Halves of one dim, one gating the other: a split of both halves alike becomes that of the result."""
    x = op.argument(0)
    dim = wrapped(op.argument(1, "dim", -1), len(op.shape(x)))
    match op.placement(x):
        case Shard(d, layout) if d == dim:
            half = layout.period(2)
            return None if half is None else Shard(d, half)
        case Partial():
            return None
        case placement:
            return placement


@rule("topk", "sort", "max", "min")
def several(op: Operation) -> Result:
    """Values and indices along one dim; of two tensors, element by element; of one and no dim, its largest."""
    x = op.argument(0)
    if len(op.tensors) > 1:
        return shards(op, len(op.node.shape), op.node.shape)
    if not op.node.outputs:
        return WHOLE if all_whole(op) else None
    dim = op.argument(2 if op.node.op == "topk" else 1, "dim", -1)
    match op.placement(x):
        case Shard(d, layout):
            at = wrapped(dim, len(op.shape(x)))
            kept = d - (d > at and len(op.node.shape) < len(op.shape(x)))
            return None if d == at else (Shard(kept, layout),) * len(op.node.outputs)
        case Replicate():
            return (WHOLE,) * len(op.node.outputs)
    return None


@rule("layer_norm", "rms_norm")
def norm(op: Operation) -> Result:
    """The normalised dims are whole; weight and bias are replicated."""
    x = op.argument(0)
    first = len(op.shape(x)) - len(op.argument(1))
    if not all(isinstance(op.placement(t), Replicate) for t in op.tensors[1:]):
        return None
    match op.placement(x):
        case Shard(d, layout):
            return Shard(d, layout) if d < first else None
        case Replicate():
            return WHOLE
    return None
