"""Views and other changes of shape: they move layouts and never compute, so a partial sum passes."""

from __future__ import annotations

from ..graph import numel
from ..layout import Layout, joined
from ..placement import PARTIAL, WHOLE, Partial, Placement, Replicate, Shard
from .base import Operation, Result, rule, shifted, wrapped

MAX_REPEATS = 64
"""Longest unsplit dim that a view may fold in front of a split one; past it nobody gains from a segment per element."""


def view_groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """Factors a view into groups of old and new dims of equal product; None where there is no elementwise order
    (never for views)."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = ([i] if i < len(old) else []), ([j] if j < len(new) else [])
        a = old[i] if left else 1
        b = new[j] if right else 1
        i, j = i + len(left), j + len(right)
        while a != b:
            if a < b:
                if i >= len(old):
                    return None
                a *= old[i]
                left.append(i)
                i += 1
            else:
                if j >= len(new):
                    return None
                b *= new[j]
                right.append(j)
                j += 1
        groups.append((left, right))
    return groups


def viewed(old: tuple[int, ...], new: tuple[int, ...], dim: int, layout: Layout) -> tuple[int, Layout] | None:
    """Where a split of ``old``'s ``dim`` goes under a view to ``new``; None where no dim of ``new`` carries it."""
    if old[dim] == 1:
        return None
    for left, right in view_groups(old, new) or []:
        if dim not in left:
            continue
        outer = numel(tuple(old[i] for i in left if i < dim))
        inner = numel(tuple(old[i] for i in left if i > dim))
        if outer > MAX_REPEATS:
            return None
        flat = layout.scaled(inner).repeated(outer)
        for target in right:
            before = numel(tuple(new[j] for j in right if j < target))
            after = numel(tuple(new[j] for j in right if j > target))
            if new[target] == 1:
                continue
            part = flat.period(before)
            part = part.divided(after) if part is not None else None
            if part is not None:
                return target, part
    return None


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "reshape_as", "view_as", "ravel")
def view(op: Operation) -> Result:
    """A split dim may be merged with trailing unsplit ones, or split with itself in front."""
    placement = op.placement(op.argument(0))
    if isinstance(placement, Shard):
        found = viewed(op.shape(op.argument(0)), op.node.shape, placement.dim, placement.layout)
        return _shaped_as(op, Shard(*found) if found else None)
    return _shaped_as(op, placement)


@rule("transpose", "swapaxes", "swapdims")
def transpose(op: Operation) -> Result:
    """Two dims change places."""
    rank = len(op.node.shape)
    a, b = wrapped(op.argument(1), rank), wrapped(op.argument(2), rank)
    return _moved(op, lambda d: {a: b, b: a}.get(d, d))


@rule("t", "mT", "adjoint", "numpy_T")
def t(op: Operation) -> Result:
    """The last two dims change places."""
    rank = len(op.node.shape)
    return (
        _moved(op, lambda d: {rank - 1: rank - 2, rank - 2: rank - 1}.get(d, d))
        if rank > 1
        else _moved(op, lambda d: d)
    )


@rule("permute")
def permute(op: Operation) -> Result:
    """Dims in another order."""
    rank = len(op.node.shape)
    order = [wrapped(d, rank) for d in op.argument(1)]
    return _moved(op, order.index)


@rule("movedim")
def movedim(op: Operation) -> Result:
    """One dim to another place."""
    rank = len(op.node.shape)
    source, target = op.argument(1), op.argument(2)
    if not isinstance(source, int) or not isinstance(target, int):
        return _moved(op, lambda d: None)
    order = [d for d in range(rank) if d != wrapped(source, rank)]
    order.insert(wrapped(target, rank), wrapped(source, rank))
    return _moved(op, order.index)


@rule("unsqueeze")
def unsqueeze(op: Operation) -> Result:
    """A new dim of length 1."""
    at = wrapped(op.argument(1), len(op.node.shape))
    return _moved(op, lambda d: d + (d >= at))


@rule("squeeze")
def squeeze(op: Operation) -> Result:
    """Dims of length 1 go."""
    shape = op.shape(op.argument(0))
    dims = op.argument(1, default=None)
    listed = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {wrapped(d, len(shape)) for d in listed if shape[wrapped(d, len(shape))] == 1}
    return _moved(op, lambda d: None if d in gone else d - sum(g < d for g in gone))


@rule("expand", "broadcast_to", "expand_as")
def expand(op: Operation) -> Result:
    """Dims of length 1 become longer; the others stay."""
    extra = len(op.node.shape) - len(op.shape(op.argument(0)))
    return _shaped_as(op, _moved(op, lambda d: d + extra))


@rule("repeat", "tile")
def repeat(op: Operation) -> Result:
    """Whole copies along unsplit dims; a split dim repeated becomes segments."""
    shape, times = op.shape(op.argument(0)), op.argument(1)
    extra = len(op.node.shape) - len(shape)
    times = (1,) * (len(op.node.shape) - len(times)) + tuple(times)
    match op.placement(op.argument(0)):
        case Shard(dim, layout):
            copies = times[dim + extra]
            return Shard(dim + extra, layout.repeated(copies)) if 0 < copies <= MAX_REPEATS else None
        case placement:
            return placement


@rule("repeat_interleave")
def repeat_interleave(op: Operation) -> Result:
    """Each element several times: a split dim is scaled."""
    times, dim = op.argument(1), op.argument(2, "dim")
    placement = op.placement(op.argument(0))
    if not isinstance(times, int) or dim is None:
        return WHOLE if all(isinstance(op.placement(x), Replicate) for x in op.tensors) else None
    match placement:
        case Shard(d, layout):
            return Shard(d, layout.scaled(times) if d == wrapped(dim, len(op.node.shape)) else layout)
        case _:
            return placement


@rule("cat", "concat", "concatenate")
def cat(op: Operation) -> Result:
    """Split alike beside the joined dim, or each split along it: then the result is segmented."""
    placements = [op.placement(x) for x in op.argument(0)]
    dim = wrapped(op.argument(1, "dim", 0), len(op.node.shape))
    kinds = {type(p) for p in placements}
    if kinds == {Replicate}:
        return WHOLE
    if kinds == {Partial}:
        return PARTIAL
    split = [p for p in placements if isinstance(p, Shard)]
    if len(split) < len(placements) or len({p.dim for p in split}) > 1:
        return None
    if split[0].dim == dim:
        return Shard(dim, joined(tuple(p.layout for p in split)))
    return split[0] if len(set(split)) == 1 else None


@rule("stack")
def stack(op: Operation) -> Result:
    """Split alike; the new dim is not split."""
    placements = {op.placement(x) for x in op.argument(0)}
    dim = wrapped(op.argument(1, "dim", 0), len(op.node.shape))
    if len(placements) > 1:
        return None
    only = next(iter(placements))
    return None if only is None else shifted(only, lambda d: d + (d >= dim))


@rule("flip", "roll")
def flip(op: Operation) -> Result:
    """Reordering along unsplit dims."""
    dims = op.argument(1) if op.node.op == "flip" else op.argument(2, "dims", [])
    rank = len(op.node.shape)
    touched = {wrapped(d, rank) for d in ([dims] if isinstance(dims, int) else dims)} or set(range(rank))
    return _moved(op, lambda d: None if d in touched else d)


@rule("slice")
def slice_(op: Operation) -> Result:
    """Unsplit dims freely; a split dim between segment boundaries."""
    x = op.argument(0)
    shape = op.shape(x)
    dim = wrapped(op.argument(1, "dim", 0), len(shape))
    start, stop = _bounds(op.argument(2, "start", None), op.argument(3, "end", None), shape[dim])
    step = op.argument(4, "step", 1)
    match op.placement(x):
        case Shard(d, layout) if d == dim:
            if (start, stop, step) == (0, shape[dim], 1):
                return Shard(d, layout)
            part = layout.sliced(start, stop) if step == 1 else None
            return Shard(d, part) if part else None
        case placement:
            return placement


@rule("narrow")
def narrow(op: Operation) -> Result:
    """A slice given by start and length, of an unsplit dim: a length is not made local."""
    x, dim = op.argument(0), op.argument(1)
    match op.placement(x):
        case Shard(d) if d == wrapped(dim, len(op.shape(x))):
            return None
        case placement:
            return placement


@rule("select")
def select(op: Operation) -> Result:
    """One index of an unsplit dim."""
    rank = len(op.shape(op.argument(0)))
    dim = wrapped(op.argument(1), rank)
    return _moved(op, lambda d: None if d == dim else d - (d > dim))


@rule("unbind")
def unbind(op: Operation) -> Result:
    """Every index of an unsplit dim."""
    dim = wrapped(op.argument(1, "dim", 0), len(op.shape(op.argument(0))))
    made = _moved(op, lambda d: None if d == dim else d - (d > dim))
    return None if made is None or isinstance(made, tuple) else (made,) * len(op.node.outputs)


@rule("split", "split_with_sizes", "chunk", "tensor_split")
def split(op: Operation) -> Result:
    """Consecutive pieces; along a split dim each piece must be whole segments."""
    x = op.argument(0)
    dim = wrapped(op.argument(2, "dim", 0), len(op.shape(x)))
    match op.placement(x):
        case Shard(d, layout) if d == dim:
            pieces: list[Placement] = []
            start = 0
            for shape, _ in op.node.outputs:
                part = layout.sliced(start, start + shape[dim])
                if part is None:
                    return None
                pieces.append(Shard(d, part))
                start += shape[dim]
            return tuple(pieces)
        case None:
            return None
        case placement:
            return (placement,) * len(op.node.outputs)


@rule("getitem")
def getitem(op: Operation) -> Result:
    """One output of an operator with several."""
    source = op.placed[op.argument(0).index]
    return source[op.argument(1)] if isinstance(source, tuple) else source


def _bounds(start: int | None, stop: int | None, length: int) -> tuple[int, int]:
    first, last, _ = slice(start, stop).indices(length)
    return first, last


def _shaped_as(op: Operation, made: Result) -> Result:
    """``made``, where the tensor that gives the shape (if one does) has the local shape that this needs."""
    if len(op.tensors) < 2:
        return made
    given = op.placement(op.tensors[1])
    return made if given == made or (isinstance(given, Replicate) and not isinstance(made, Shard)) else None


def _moved(op: Operation, dim_of: object) -> Result:
    placement = op.placement(op.argument(0))
    return None if placement is None else shifted(placement, dim_of)  # type: ignore[arg-type]
