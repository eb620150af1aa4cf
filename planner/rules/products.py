"""Matrix products, attention, convolutions and embeddings, in factor notation."""

from __future__ import annotations

from ..graph import Ref
from ..placement import PARTIAL, WHOLE, Partial, Replicate, Shard
from .base import Operation, Result, all_whole, contraction, rule


def _batch(shape: tuple[int, ...], out_rank: int, keep: int) -> list[str | None]:
    """Labels of leading (batch) dims, aligned right; length-1 dims broadcast and carry none."""
    lead = len(shape) - keep
    offset = out_rank - len(shape)
    return [f"b{offset + i}" if shape[i] != 1 else None for i in range(lead)]


def _with_bias(op: Operation, product: Result, bias: Ref | None) -> Result:
    """A bias joins: split with the output's last dim, partial with a partial product, replicated otherwise."""
    if bias is None or product is None:
        return product
    placement = op.placement(bias)
    match product:
        case Partial():
            return product if isinstance(placement, Partial) else None
        case Shard(dim, layout) if dim == len(op.node.shape) - 1:
            return product if placement == Shard(0, layout) else None
        case _:
            return product if isinstance(placement, Replicate) else None


@rule("linear")
def linear(op: Operation) -> Result:
    """``... k, n k -> ... n``: column splits n, row splits k."""
    x, weight, bias = op.argument(0), op.argument(1), op.argument(2, "bias")
    lead = [f"b{i}" for i in range(len(op.shape(x)) - 1)]
    return _with_bias(op, contraction(op, [(x, [*lead, "k"]), (weight, ["n", "k"])], [*lead, "n"]), bias)


@rule("addmm")
def addmm(op: Operation) -> Result:
    """``n, m k, k n -> m n``: the bias comes first (Conv1D)."""
    bias, x, weight = op.argument(0), op.argument(1), op.argument(2)
    if len(op.shape(bias)) != 1 or op.node.keywords:
        return WHOLE if all_whole(op) else None
    return _with_bias(op, contraction(op, [(x, ["m", "k"]), (weight, ["k", "n"])], ["m", "n"]), bias)


@rule("matmul", "mm", "bmm")
def matmul(op: Operation) -> Result:
    """``... m k, ... k n -> ... m n`` with broadcast batch dims."""
    a, b = op.argument(0), op.argument(1)
    if a == b or len(op.shape(a)) < 2 or len(op.shape(b)) < 2:
        return WHOLE if all_whole(op) else None
    rank = max(len(op.shape(a)), len(op.shape(b)))
    left = [*_batch(op.shape(a), rank, 2), "m", "k"]
    right = [*_batch(op.shape(b), rank, 2), "k", "n"]
    return contraction(op, [(a, left), (b, right)], [*(f"b{i}" for i in range(rank - 2)), "m", "n"])


@rule("baddbmm")
def baddbmm(op: Operation) -> Result:
    """``(b m n), b m k, b k n -> b m n``: split by batch, which is where heads are."""
    added, a, b = op.argument(0), op.argument(1), op.argument(2)
    labels = ["b" if op.shape(added)[0] != 1 else None, None, None]
    made = contraction(op, [(added, labels), (a, ["b", None, None]), (b, ["b", None, None])], ["b", None, None])
    return None if isinstance(made, Partial) else made


@rule("_grouped_mm", "grouped_mm_fallback")
def grouped_mm(op: Operation) -> Result:
    """``t k, e k n, e -> t n``: tokens sorted by expert; every expert split alike."""
    x, weight, offsets = op.argument(0), op.argument(1), op.argument(2, "offs")
    if len(op.shape(x)) != 2 or len(op.shape(weight)) != 3 or not isinstance(op.placement(offsets), Replicate):
        return WHOLE if all_whole(op) else None
    return contraction(op, [(x, [None, "k"]), (weight, [None, "k", "n"])], [None, "n"])


@rule("einsum")
def einsum(op: Operation) -> Result:
    """The equation is the rule."""
    equation, tensors = op.argument(0), op.argument(1)
    inputs, _, output = str(equation).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "." in equation or not output or len({t.index for t in tensors}) != len(tensors):
        return WHOLE if all_whole(op) else None
    return contraction(op, list(zip(tensors, [list(t) for t in terms], strict=True)), list(output))


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
    if not (qp.dim == kp.dim == vp.dim) or qp.dim >= rank - 2 or kp.layout != vp.layout or kp.layout.scaled(groups) != qp.layout:
        return None
    if isinstance(mask, Ref):
        at = qp.dim - rank + len(op.shape(mask))
        split = at >= 0 and op.shape(mask)[at] != 1
        if op.placement(mask) != (Shard(at, qp.layout) if split else WHOLE):
            return None
    return qp


@rule("embedding")
def embedding(op: Operation) -> Result:
    """Rows split: ids outside the slice give zeros, the result is partial (vocab). Columns split: the result's last dim is."""
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


@rule("conv1d", "conv2d", "conv3d")
def convolution(op: Operation) -> Result:
    """``b i ..., o i ... -> b o ...`` for one group."""
    x, weight, bias, groups = op.argument(0), op.argument(1), op.argument(2, "bias"), op.argument(6, "groups", 1)
    if groups != 1:
        return WHOLE if all_whole(op) else None
    rank = len(op.node.shape)
    if len(op.shape(x)) != rank or len(op.shape(weight)) != rank:
        return WHOLE if all_whole(op) else None
    spatial: list[str | None] = [None] * (rank - 2)
    made = contraction(op, [(x, ["b", "i", *spatial]), (weight, ["o", "i", *spatial])], ["b", "o", *spatial])
    if bias is None or made is None:
        return made
    match made:
        case Partial():
            return made if isinstance(op.placement(bias), Partial) else None
        case Shard(1, layout):
            return made if op.placement(bias) == Shard(0, layout) else None
        case _:
            return made if isinstance(op.placement(bias), Replicate) else None
