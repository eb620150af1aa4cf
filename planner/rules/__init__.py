"""Operator rules, one file per family. `RULES` maps an operator's name to its rule."""

from __future__ import annotations

from . import indexing, losses, pointwise, products, reductions, shapes
from .base import RULES, Operation, Result

__all__ = ["RULES", "Operation", "Result", "indexing", "losses", "pointwise", "products", "reductions", "shapes"]
