"""Element-by-element operators, with broadcasting."""

from __future__ import annotations

from typing import Any

from ..graph import Ref
from ..placement import PARTIAL, WHOLE, Partial, Shard
from .base import Operation, Result, rule

# Linear in their one tensor: scaling, casting between floats, dropping out, copying.
LINEAR_UNARY = ("neg", "clone", "contiguous", "dropout", "detach", "positive", "conj", "real")
CASTS = ("to", "_to_copy", "type_as", "float", "half", "bfloat16", "double")

# Nonlinear, one value in, one value out (the second operand of a binary one broadcasts).
NONLINEAR = (
    "relu", "gelu", "silu", "sigmoid", "tanh", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal",
    "abs", "sin", "cos", "tan", "erf",
    "softplus", "elu", "selu", "celu", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "mish", "relu6",
    "logsigmoid", "log_sigmoid",
    "pow", "clamp", "clamp_min", "clamp_max", "clip", "round", "floor", "ceil", "sign", "trunc", "square", "atan",
    "sinh", "cosh", "log2",
    "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_and",
    "bitwise_or", "bitwise_not",
    "bitwise_xor", "__and__", "__or__", "__xor__", "__invert__", "isnan", "isinf", "isfinite", "maximum",
    "minimum", "fmod", "remainder",
    "floor_divide", "nan_to_num", "atan2", "prelu_scalar", "bitwise_left_shift", "bitwise_right_shift",
    "threshold", "softsign", "softshrink",
    "zeros_like", "ones_like", "full_like", "empty_like", "lerp", "hypot",
    "sinc", "xlogy",
)  # fmt: skip

# Linear in all tensors taken together: partial only if all of them are.
JOINT = ("add", "sub", "rsub", "subtract")
# Linear in each tensor with the others fixed.
EACH = ("mul", "multiply")
# Linear in the first only.
FIRST = ("div", "divide", "true_divide")


def shards(op: Operation, out_rank: int, out_shape: tuple[int, ...]) -> Result:
    """The common split of broadcast operands: each full-length operand is split alike, length-1 dims are not split."""
    dim: int | None = None
    layout = None
    for tensor in op.tensors:
        match op.placement(tensor):
            case Shard(d, found):
                at = d + out_rank - len(op.shape(tensor))
                if dim is not None and (at != dim or found != layout):
                    return None
                dim, layout = at, found
            case Partial():
                return None
    if dim is None or layout is None:
        return WHOLE
    for tensor in op.tensors:
        shape = op.shape(tensor)
        at = dim - out_rank + len(shape)
        if not isinstance(op.placement(tensor), Shard) and at >= 0 and shape[at] != 1:
            return None
        if isinstance(op.placement(tensor), Shard) and shape[at] != out_shape[dim]:
            return None
    return Shard(dim, layout)


def _partials(op: Operation) -> int:
    return sum(isinstance(op.placement(t), Partial) for t in op.tensors)


def _shards(op: Operation) -> Result:
    return shards(op, len(op.node.shape), op.node.shape)


@rule(*NONLINEAR)
def nonlinear(op: Operation) -> Result:
    """f(a + b) != f(a) + f(b): never partial."""
    return _shards(op)


@rule(*LINEAR_UNARY)
def linear_unary(op: Operation) -> Result:
    """Partial in, partial out (dropout draws the same mask on every rank)."""
    if _partials(op):
        return PARTIAL if len(op.tensors) == 1 else None
    return _shards(op)


@rule(*CASTS)
def cast(op: Operation) -> Result:
    """Casting a partial sum is linear between floating types only."""
    if _partials(op):
        return PARTIAL if op.node.dtype.is_floating_point and isinstance(op.placement(op.tensors[0]), Partial) else None
    return _shards(op)


@rule(*JOINT)
def joint(op: Operation) -> Result:
    """Sums: partial if every summand is; a scalar summand would be added once per rank."""
    partials = _partials(op)
    if partials:
        return PARTIAL if len(op.node.arguments) >= 2 and partials == len(op.tensors) and not _scalars(op) else None
    return _shards(op)


@rule(*EACH)
def each(op: Operation) -> Result:
    """Products: one partial factor, the others replicated."""
    partials = _partials(op)
    if partials:
        shard = any(isinstance(op.placement(t), Shard) for t in op.tensors)
        return (
            PARTIAL if partials == 1 and not shard and len({t.index for t in op.tensors}) == len(op.tensors) else None
        )
    return _shards(op)


@rule(*FIRST)
def first(op: Operation) -> Result:
    """Quotients: a partial numerator over a replicated denominator."""
    if _partials(op):
        fine = isinstance(op.placement(op.argument(0)), Partial) and not isinstance(
            op.placement(op.argument(1)), (Partial, Shard)
        )
        return PARTIAL if fine and "rounding_mode" not in op.node.keywords else None
    return _shards(op)


@rule("where")
def where(op: Operation) -> Result:
    """Linear in both branches together, with the condition replicated."""
    if _partials(op):
        branches = [op.argument(1), op.argument(2)]
        fine = all(isinstance(op.placement(b), Partial) or _is_zero(b) for b in branches)
        return PARTIAL if fine and not isinstance(op.placement(op.argument(0)), (Partial, Shard)) else None
    return _shards(op)


@rule("masked_fill")
def masked_fill(op: Operation) -> Result:
    """Linear if what is filled in is zero."""
    if _partials(op):
        fine = isinstance(op.placement(op.argument(0)), Partial) and _is_zero(op.argument(2))
        return PARTIAL if fine and not isinstance(op.placement(op.argument(1)), (Partial, Shard)) else None
    return _shards(op)


def _scalars(op: Operation) -> bool:
    return any(isinstance(a, (int, float)) and a != 0 for a in op.node.arguments[:2])


def _is_zero(argument: Any) -> bool:
    return not isinstance(argument, Ref) and argument == 0
