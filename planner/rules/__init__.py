"""Operator rules, one file per family. `RULES` maps an operator's name to its rule."""

from __future__ import annotations

from . import (
    bags,
    channels,
    convolutions,
    images,
    indexing,
    linear_algebra,
    losses,
    pointwise,
    products,
    rearranging,
    reductions,
    scattering,
    shapes,
    spectral,
    statistics,
)
from .base import RULES, Operation, Result

__all__ = [
    "RULES",
    "Operation",
    "Result",
    "bags",
    "channels",
    "convolutions",
    "images",
    "indexing",
    "linear_algebra",
    "losses",
    "pointwise",
    "products",
    "rearranging",
    "reductions",
    "scattering",
    "shapes",
    "spectral",
    "statistics",
]
