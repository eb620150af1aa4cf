"""Operators that treat every channel (dim 1), or every group of channels, by itself, with parameters of one number per
channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..graph import Ref
from ..placement import Partial, Replicate, Shard
from .base import Operation, Result, rule, wrapped
from .convolutions import keeps_groups

Alike = Callable[[Operation], Iterator[tuple[Ref, int, int]]]
ALIKE: dict[str, Alike] = {}
"""Operators whose operands are split together: ``(operand, its dim, the result's dim)``."""


def alike(*names: str) -> Callable[[Alike], Alike]:
    """Registers which dims of an operator's operands go together."""

    def register(function: Alike) -> Alike:
        ALIKE.update(dict.fromkeys(names, function))
        return function

    return register


def _with_channels(op: Operation, vectors: list[object], others: list[object], loose: Callable[[int], bool]) -> Result:
    """The rule of [batch, channels, ...] beside vectors of one number per channel: split by channel together with
    them, or along a dim that is ``loose`` beside whole ones. Never partial; ``others`` are whole."""
    x = op.placement(op.argument(0))
    if not all(isinstance(op.placement(t), Replicate) for t in others if isinstance(t, Ref)):
        return None
    given = [op.placement(t) for t in vectors if isinstance(t, Ref)]
    match x:
        case Shard(1, layout):
            return x if all(p == Shard(0, layout) for p in given) else None
        case Shard(dim) if not loose(dim):
            return None
        case Shard() | Replicate():
            return x if all(isinstance(p, Replicate) for p in given) else None
    return None


def _statistics(op: Operation) -> list[object]:
    return [op.argument(3, "running_mean"), op.argument(4, "running_var")]


@rule("batch_norm")
def batch_norm(op: Operation) -> Result:
    """Statistics per channel over all else: by channel; by anything once they are constants. Running statistics stay
    whole: the local form reads its channels and shares what it has learnt."""
    vectors = [op.argument(1, "weight"), op.argument(2, "bias")]
    return _with_channels(op, vectors, _statistics(op), lambda dim: not op.argument(5, "training"))


@rule("instance_norm")
def instance_norm(op: Operation) -> Result:
    """Statistics per example and channel; running ones are an average over the batch. Not split by channel: torch's
    module compares the length that it reads with its own number of features, and raises."""
    placement = op.placement(op.argument(0))
    if isinstance(placement, Shard) and placement.dim == 1:
        return None
    vectors, running = [op.argument(1, "weight"), op.argument(2, "bias")], _statistics(op)
    by_example = not any(isinstance(t, Ref) for t in running)
    return _with_channels(op, vectors, running, lambda dim: dim == 0 and by_example)


@rule("group_norm")
def group_norm(op: Operation) -> Result:
    """Statistics per example and group: by channel where no group is cut."""
    width = op.shape(op.argument(0))[1] // op.argument(1)
    if not keeps_groups(op.placement(op.argument(0)), width):
        return None
    return _with_channels(op, [op.argument(2, "weight"), op.argument(3, "bias")], [], lambda dim: dim == 0)


@rule("prelu")
def prelu(op: Operation) -> Result:
    """Element by element, with one slope for all or one per channel."""
    x, slope = op.argument(0), op.argument(1)
    placement = op.placement(x)
    if op.shape(slope) == (1,) and not isinstance(placement, Partial):
        return placement if isinstance(op.placement(slope), Replicate) else None
    return _with_channels(op, [slope], [], lambda dim: True)


@alike("batch_norm", "instance_norm", "group_norm", "prelu")
def per_channel(op: Operation) -> Iterator[tuple[Ref, int, int]]:
    """The input's channels, and each vector of as many numbers."""
    x = op.argument(0)
    yield x, 1, 1
    for vector in op.tensors:
        if op.shape(vector) == op.shape(x)[1:2] and len(op.shape(x)) > 1:
            yield vector, 0, 1


@alike("_weight_norm")
def per_filter(op: Operation) -> Iterator[tuple[Ref, int, int]]:
    """The dim that has one norm each."""
    dim = wrapped(op.argument(2, "dim", 0), len(op.node.shape))
    yield op.argument(0), dim, dim
    yield op.argument(1), dim, dim
