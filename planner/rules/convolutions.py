"""Convolutions by channel. Windows slide over the other dims, which are never split."""

from __future__ import annotations

from typing import Any

from ..placement import Shard
from .base import Operation
from .products import Factors, factored

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@factored(*CONVOLUTIONS, *TRANSPOSED)
def convolution(op: Operation) -> Factors | None:
    """``b i ..., o i ... -> b o ...`` (transposed: ``i o ...``); with groups ``b c ..., c 1 ... -> b c ...``, where
    channels go with their group: as many come out as go in, and groups stay together."""
    x, weight, groups = op.argument(0), op.argument(1), op.argument(6, "groups", 1)
    rank = len(op.node.shape)
    if len(op.shape(x)) != rank or len(op.shape(weight)) != rank:
        return None
    spatial = (None,) * (rank - 2)
    bias = op.argument(2, "bias")
    if groups == 1:
        filters = ("i", "o", *spatial) if op.node.op in TRANSPOSED else ("o", "i", *spatial)
        return Factors(((x, ("b", "i", *spatial)), (weight, filters)), ("b", "o", *spatial), bias, 1)
    if op.shape(x)[1] != op.node.shape[1] or not keeps_groups(op.placement(x), op.shape(x)[1] // groups):
        return None
    labels = ("b", "c", *spatial)
    return Factors(((x, labels), (weight, ("c", None, *spatial))), labels, bias, 1)


def keeps_groups(placement: Any, width: int) -> bool:
    """Whether a placement of ``[batch, channels, ...]`` leaves every group of ``width`` channels on one rank."""
    return not isinstance(placement, Shard) or placement.dim != 1 or placement.layout.divided(width) is not None
