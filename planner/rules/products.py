"""Matrix products, attention and embeddings, in factor notation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..graph import Ref
from ..placement import PARTIAL, WHOLE, Partial, Replicate, Shard
from .base import RULES, Operation, Result, all_whole, contraction, rule, wrapped


@dataclass(frozen=True)
class Factors:
    """A product in factor notation: labels per operand dim (None: never split), labels of the result, an added bias."""

    operands: tuple[tuple[Ref, tuple[str | None, ...]], ...]
    out: tuple[str | None, ...]
    bias: Ref | None = None
    bias_dim: int = -1


FACTORS: dict[str, Callable[[Operation], Factors | None]] = {}


def factored(*names: str) -> Callable[[Callable[[Operation], Factors | None]], Callable[[Operation], Factors | None]]:
    """Registers a notation and the rule derived from it; where it gives None, operands must be replicated."""

    def register(function: Callable[[Operation], Factors | None]) -> Callable[[Operation], Factors | None]:
        def derived(op: Operation) -> Result:
            factors = function(op)
            if factors is None:
                return WHOLE if all_whole(op) else None
            return _with_bias(op, contraction(op, factors.operands, factors.out), factors)

        for name in names:
            FACTORS[name] = function
            RULES[name] = derived
        return function

    return register


def _with_bias(op: Operation, product: Result, factors: Factors) -> Result:
    """A bias joins: split with the dim it spans, partial with a partial product, replicated otherwise."""
    if factors.bias is None or product is None:
        return product
    placement = op.placement(factors.bias)
    match product:
        case Partial():
            return product if isinstance(placement, Partial) else None
        case Shard(dim, layout) if dim == wrapped(factors.bias_dim, len(op.node.shape)):
            return product if placement == Shard(0, layout) else None
        case _:
            return product if isinstance(placement, Replicate) else None


def _batch(shape: tuple[int, ...], out_rank: int, keep: int) -> tuple[str | None, ...]:
    """Labels of leading (batch) dims, aligned right; length-1 dims broadcast and carry none."""
    lead = len(shape) - keep
    offset = out_rank - len(shape)
    return tuple(f"b{offset + i}" if shape[i] != 1 else None for i in range(lead))


@factored("linear")
def linear(op: Operation) -> Factors | None:
    """``... k, n k -> ... n``: column splits n, row splits k."""
    x, weight = op.argument(0), op.argument(1)
    lead = tuple(f"b{i}" for i in range(len(op.shape(x)) - 1))
    return Factors(((x, (*lead, "k")), (weight, ("n", "k"))), (*lead, "n"), op.argument(2, "bias"))


@factored("addmm")
def addmm(op: Operation) -> Factors | None:
    """``n, m k, k n -> m n``: the bias comes first (Conv1D)."""
    bias, x, weight = op.argument(0), op.argument(1), op.argument(2)
    if len(op.shape(bias)) != 1 or op.node.keywords:
        return None
    return Factors(((x, ("m", "k")), (weight, ("k", "n"))), ("m", "n"), bias)


@factored("matmul", "mm", "bmm")
def matmul(op: Operation) -> Factors | None:
    """``... m k, ... k n -> ... m n`` with broadcast batch dims."""
    a, b = op.argument(0), op.argument(1)
    if a == b or len(op.shape(a)) < 2 or len(op.shape(b)) < 2:
        return None
    rank = max(len(op.shape(a)), len(op.shape(b)))
    left = (*_batch(op.shape(a), rank, 2), "m", "k")
    right = (*_batch(op.shape(b), rank, 2), "k", "n")
    return Factors(((a, left), (b, right)), (*(f"b{i}" for i in range(rank - 2)), "m", "n"))


@factored("baddbmm")
def baddbmm(op: Operation) -> Factors | None:
    """``(b m n), b m k, b k n -> b m n``: split by batch, which is where heads are."""
    added, a, b = op.argument(0), op.argument(1), op.argument(2)
    labels = ("b" if op.shape(added)[0] != 1 else None, None, None)
    if any(isinstance(op.placement(t), Partial) for t in op.tensors):
        return None
    return Factors(((added, labels), (a, ("b", None, None)), (b, ("b", None, None))), ("b", None, None))


@factored("_grouped_mm", "grouped_mm_fallback")
def grouped_mm(op: Operation) -> Factors | None:
    """``t k, e k n, e -> t n``: tokens sorted by expert; every expert split alike."""
    x, weight, offsets = op.argument(0), op.argument(1), op.argument(2, "offs")
    if len(op.shape(x)) != 2 or len(op.shape(weight)) != 3 or not isinstance(op.placement(offsets), Replicate):
        return None
    return Factors(((x, (None, "k")), (weight, (None, "k", "n"))), (None, "n"))


@factored("einsum")
def einsum(op: Operation) -> Factors | None:
    """The equation is the rule."""
    equation, tensors = op.argument(0), op.argument(1)
    inputs, _, output = str(equation).replace(" ", "").partition("->")
    if "." in equation or not output or len({t.index for t in tensors}) != len(tensors):
        return None
    return Factors(tuple(zip(tensors, map(tuple, inputs.split(",")), strict=True)), tuple(output))


@rule("scaled_dot_product_attention")
def attention(op: Operation) -> Result:
    """``b h l e, b h s e, b h s v -> b h l v``: split by batch or head, linear in v alone; the mask broadcasts."""
    q, k, v = op.argument(0), op.argument(1), op.argument(2)
    mask = op.argument(3, "attn_mask")
    rank = len(op.node.shape)
    qp, kp, vp = op.placement(q), op.placement(k), op.placement(v)
    if isinstance(qp, Partial) or isinstance(kp, Partial) or isinstance(op.placement(mask), Partial):
        return None
    if isinstance(vp, Partial):
        return PARTIAL if all(isinstance(op.placement(t), Replicate) for t in op.tensors if t != v) else None
    if all_whole(op):
        return WHOLE
    if not (isinstance(qp, Shard) and isinstance(kp, Shard) and isinstance(vp, Shard)):
        return None
    groups = op.shape(q)[qp.dim] // max(1, op.shape(k)[kp.dim])
    if (
        not (qp.dim == kp.dim == vp.dim)
        or qp.dim >= rank - 2
        or kp.layout != vp.layout
        or kp.layout.scaled(groups) != qp.layout
    ):
        return None
    if isinstance(mask, Ref):
        at = qp.dim - rank + len(op.shape(mask))
        split = at >= 0 and op.shape(mask)[at] != 1
        if op.placement(mask) != (Shard(at, qp.layout) if split else WHOLE):
            return None
    return qp


@rule("embedding")
def embedding(op: Operation) -> Result:
    """Rows split: ids outside the slice give zeros, the result is partial (vocab). Columns split: the result's last
    dim is."""
    weight, ids = op.argument(0), op.argument(1)
    match op.placement(weight), op.placement(ids):
        case Shard(0), Replicate():
            return PARTIAL
        case Shard(1, layout), Replicate():
            return Shard(len(op.node.shape) - 1, layout)
        case Replicate(), Shard(dim, layout):
            return Shard(dim, layout)
        case Replicate(), Replicate():
            return WHOLE
    return None
