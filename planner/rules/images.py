"""Windows, interpolation and rearrangement of images, sounds and volumes: the last one to three dims are positions,
which windows slide over and which are never split; the dims before them are."""

from __future__ import annotations

import re

from ..placement import PARTIAL, Partial, Replicate, Shard
from .base import Operation, Result, rule

AVERAGES = tuple(f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3))
LARGEST = (
    *(f"{kind}max_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)),
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
)
INTERPOLATIONS = (
    *(f"{kind}{n}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)),
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
)  # fmt: skip


def _positions(op: Operation) -> int:
    """How many of the last dims are positions."""
    found = re.search(r"([123])d", op.node.op)
    assert found is not None, op.node.op
    return int(found[1])


@rule(*AVERAGES, *INTERPOLATIONS)
def weighted(op: Operation) -> Result:
    """Weighted sums of positions: linear."""
    x = op.argument(0)
    first = len(op.shape(x)) - _positions(op)
    match op.placement(x):
        case Shard(dim, layout):
            return Shard(dim, layout) if dim < first else None
        case placement:
            return placement


@rule(*LARGEST)
def largest(op: Operation) -> Result:
    """The largest of each window and, from some, its position."""
    if isinstance(op.placement(op.argument(0)), Partial):
        return None
    return weighted(op)


@rule("max_unpool2d", "max_unpool3d")
def unpool(op: Operation) -> Result:
    """Values put where indices say, split alike."""
    x, indices = (op.placement(op.argument(i)) for i in (0, 1))
    if isinstance(x, Partial):
        return PARTIAL if isinstance(indices, Replicate) else None
    return weighted(op) if x == indices else None


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(op: Operation) -> Result:
    """Each channel's block of ``factor ** 2`` becomes positions, or the reverse: blocks stay together."""
    rank, block = len(op.node.shape), op.argument(1) ** 2
    match op.placement(op.argument(0)):
        case Shard(dim, layout) if dim == rank - 3:
            made = layout.divided(block) if op.node.op == "pixel_shuffle" else layout.scaled(block)
            return None if made is None else Shard(dim, made)
        case Shard(dim) if dim > rank - 3:
            return None
        case placement:
            return placement


@rule("channel_shuffle")
def channel_shuffle(op: Operation) -> Result:
    """``b (g c) ... -> b (c g) ...``: each group split alike, so that every rank holds its part of all groups."""
    groups = op.argument(1)
    match op.placement(op.argument(0)):
        case Shard(1, layout):
            part = layout.period(groups)
            return None if part is None else Shard(1, part.scaled(groups))
        case placement:
            return placement


@rule("im2col", "col2im")
def windows(op: Operation) -> Result:
    """Channels to channels times positions of a window, and back by adding up: linear."""
    x = op.argument(0)
    source = len(op.shape(x)) - (3 if op.node.op == "im2col" else 2)
    target = len(op.node.shape) - (2 if op.node.op == "im2col" else 3)
    match op.placement(x):
        case Shard(dim, layout) if dim == source:
            channels, made = op.shape(x)[source], op.node.shape[target]
            part = layout.scaled(made // channels) if op.node.op == "im2col" else layout.divided(channels // made)
            return None if part is None else Shard(target, part)
        case Shard(dim) if dim > source:
            return None
        case placement:
            return placement


@rule("feature_dropout")
def feature_dropout(op: Operation) -> Result:
    """One draw per example and channel."""
    match op.placement(op.argument(0)):
        case Shard(dim) if dim > 1:
            return None
        case placement:
            return placement
