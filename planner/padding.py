"""What padding holds, and which operators would break on it.

A rank that owns less of a dim than its neighbours is padded to their length. Padding starts as zeros, in weights and in
values that are cut, and every operator turns it into something else. Any finite number does no harm: it is multiplied
by the zeros of the next weight or left out. But 0 / 0 or log(0) is not finite, and times a zero weight it is NaN in
every output; likewise backward, where the derivative of a root is infinite at 0. So an operator that may do such a
thing to padding does not run on padded slices.

Padding is followed as an interval, per value and dim, through the operators from which it comes; what a value that is
not split holds at the same place is any finite number. Not followed are the zeros that a replicated value gets where a
reader far upstream cuts it into padded slices; a reader that would break on them does not cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .graph import LEAVES, VIEWS, Graph, Node, Ref
from .layout import balanced
from .placement import WHOLE, Shard
from .rules import RULES, Operation
from .rules.bags import LOOKUPS
from .rules.products import FACTORS

Interval = tuple[float, float]

ANY: Interval = (-math.inf, math.inf)
ZERO: Interval = (0.0, 0.0)
TINY = 1e-300
POSITIVE: Interval = (TINY, math.inf)

# f(x) where f never falls and is finite on all numbers.
_RISING: dict[str, Callable[[float], float]] = {
    "exp": lambda x: max(math.exp(min(x, 700.0)), TINY),
    "expm1": lambda x: math.expm1(min(x, 700.0)),
    "relu": lambda x: max(x, 0.0),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)) if x > -600 else TINY,
    "tanh": math.tanh,
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "softplus": lambda x: x if x > 30 else max(math.log1p(math.exp(x)), TINY),
    "sign": lambda x: math.copysign(1.0, x) if x else 0.0,
}
_NEVER_NEGATIVE = frozenset({"abs", "square", "norm", "linalg_vector_norm", "var", "std"})
_NEVER_ZERO = frozenset({"softmax", "_softmax", "cosh"})
_ALONG = frozenset({"sum", "mean", "cumsum", "amax", "amin", "sort", "max", "min", "topk"})
_SAME = VIEWS | {"to", "clone", "contiguous", "dropout", "positive", "type_as", "cat", "stack", "flip", "roll"}
_DENOMINATOR = frozenset({"div", "divide", "true_divide", "floor_divide", "fmod", "remainder"})
_UNDEFINED_UP_TO = {"log": 0.0, "log2": 0.0, "rsqrt": 0.0, "sqrt": 0.0, "log1p": -1.0}
HAZARDS = _DENOMINATOR | set(_UNDEFINED_UP_TO) | {"reciprocal", "xlogy", "hypot", "pow"}
"""Operators that are not finite everywhere, or whose derivatives are not."""


@dataclass
class Padding:
    """What the padding of every value holds, for one graph."""

    graph: Graph
    _found: dict[tuple[int, int], Interval] = field(default_factory=dict)

    def fragile(self, node: Node) -> frozenset[int]:
        """Dims of the result along which ``node`` may make something that is not finite, or a gradient of it, out of
        padding."""
        if node.op not in HAZARDS or node.outputs:
            return frozenset()
        return frozenset(dim for dim in range(len(node.shape)) if self._breaks(node, dim))

    def _breaks(self, node: Node, dim: int) -> bool:
        split = self._split_with(node, dim)

        def at(position: int) -> Interval:
            argument = node.arguments[position]
            if isinstance(argument, (int, float)):
                return float(argument), float(argument)
            if isinstance(argument, Ref) and argument.index in split:
                return self.of(argument.index, split[argument.index])
            return POSITIVE  # no padding: what the undivided module computes with

        first, second = at(0), at(1) if len(node.arguments) > 1 else POSITIVE
        if node.op in _DENOMINATOR:
            return _holds_zero(second)
        if node.op in _UNDEFINED_UP_TO:
            return first[0] <= _UNDEFINED_UP_TO[node.op]
        if node.op == "xlogy":
            return second[0] <= 0
        if node.op == "hypot":
            return _holds_zero(first) and _holds_zero(second)
        if node.op == "reciprocal":
            return _holds_zero(first)
        exponent = node.arguments[1]
        if isinstance(exponent, (int, float)):
            is_root = not float(exponent).is_integer() and (first[0] < 0 or (exponent < 1 and first[0] <= 0))
            return is_root or (exponent < 0 and _holds_zero(first))
        return isinstance(exponent, Ref) and first[0] <= 0

    def of(self, index: int, dim: int) -> Interval:
        """The padding of node ``index`` where ``dim`` is padded."""
        key = (index, dim)
        if key not in self._found:
            self._found[key] = self._made(self.graph.nodes[index], dim)
        return self._found[key]

    def _made(self, node: Node, dim: int) -> Interval:
        if node.op in LEAVES or node.op in LOOKUPS:
            return ZERO
        read = {i: self.of(i, d) for i, d in self._split_with(node, dim).items()}
        if node.op in FACTORS:
            return self._product(node, read)
        values = [_value(a, read) for a in node.arguments if isinstance(a, (Ref, int, float))]
        if node.op in _SAME:
            return _hull([read.get(i, ANY) for i in node.operands])
        first, second = (*values, ANY, ANY)[:2]
        match node.op:
            case "add" | "sub" | "subtract" | "rsub":
                scale = float(node.keywords.get("alpha", 1)) * (1 if node.op == "add" else -1)
                a, b = (second, first) if node.op == "rsub" else (first, second)
                return a[0] + min(scale * b[0], scale * b[1]), a[1] + max(scale * b[0], scale * b[1])
            case "mul" | "multiply":
                squared = len(node.operands) == 2 and len(set(node.operands)) == 1
                return (0.0, math.inf) if squared and first != ZERO else _times(first, second)
            case "div" | "divide" | "true_divide":
                return ZERO if first == ZERO else _times(first, _inverse(second))
            case "neg":
                return -first[1], -first[0]
            case "pow" if second in ((2.0, 2.0), (4.0, 4.0)):
                return ZERO if first == ZERO else (0.0, math.inf)
            case "clamp" | "clip" | "clamp_min" | "clamp_max":
                return _clamped(node, first)
            case "where" | "masked_fill":
                return _hull(values[1:] if node.op == "where" else [first, values[2]])
            case "scaled_dot_product_attention":
                return read.get(node.operands[2], ANY)
            case op if op in _RISING:
                return _RISING[op](first[0]), _RISING[op](first[1])
            case op if op in _NEVER_NEGATIVE:
                return ZERO if first == ZERO else (0.0, math.inf)
            case op if op in _NEVER_ZERO:
                return POSITIVE
            case op if op in _ALONG and len(node.operands) == 1:
                count = max(1, *(self.graph.nodes[node.operands[0]].shape or (1,)))
                return min(first[0], first[0] * count), max(first[1], first[1] * count)
        return ANY

    def _product(self, node: Node, read: Mapping[int, Interval]) -> Interval:
        """Zero where one factor is, and the bias that joins."""
        factors = FACTORS[node.op](Operation(node, self.graph.nodes, dict.fromkeys(node.operands, WHOLE)))
        if factors is None:
            return ANY
        bias = read.get(factors.bias.index, ANY) if factors.bias is not None else ZERO
        return bias if any(read.get(ref.index) == ZERO for ref, _ in factors.operands) else ANY

    def _split_with(self, node: Node, dim: int) -> dict[int, int]:
        """Operands that are split where the result's ``dim`` is, and along which dim of theirs."""
        nodes = self.graph.nodes
        found: dict[int, int] = {}
        if node.op in FACTORS:
            factors = FACTORS[node.op](Operation(node, nodes, dict.fromkeys(node.operands, WHOLE)))
            label = factors.out[dim] if factors is not None else None
            if factors is None or label is None:
                return {}
            found = {ref.index: labels.index(label) for ref, labels in factors.operands if label in labels}
            if factors.bias is not None and dim == factors.bias_dim % len(node.shape):
                found[factors.bias.index] = 0
            return found
        operands = list(dict.fromkeys(node.operands))
        shapes = {i: nodes[i].shape for i in operands}
        if (
            node.op not in VIEWS
            and all(len(s) <= len(node.shape) for s in shapes.values())
            and _broadcasts(node, shapes)
        ):
            for index, shape in shapes.items():
                at = dim - len(node.shape) + len(shape)
                if at >= 0 and shape[at] == node.shape[dim] != 1:
                    found[index] = at
            return found
        rule, source = RULES.get(node.op), operands[0] if operands else -1
        for at, length in enumerate(shapes.get(source, ())):
            alike = [i for i in operands if shapes[i] and len(shapes[i]) == len(shapes[source])]
            placed: dict[int, Any] = dict.fromkeys(operands, WHOLE)
            placed |= {i: Shard(at, balanced(shapes[i][at], 2)) for i in alike if shapes[i][at] > 1}
            made = rule(Operation(node, nodes, placed)) if rule is not None and length > 1 else None
            if isinstance(made, tuple):
                made = made[0] if made else None
            if isinstance(made, Shard) and made.dim == dim:
                return dict.fromkeys(alike, at)
        return found


def _holds_zero(interval: Interval) -> bool:
    return interval[0] <= 0 <= interval[1]


def _value(argument: Any, read: Mapping[int, Interval]) -> Interval:
    return read.get(argument.index, ANY) if isinstance(argument, Ref) else (float(argument), float(argument))


def _hull(intervals: list[Interval]) -> Interval:
    return (min(i[0] for i in intervals), max(i[1] for i in intervals)) if intervals else ANY


def _times(a: Interval, b: Interval) -> Interval:
    if ZERO in (a, b):
        return ZERO
    products = [x * y if x and y else 0.0 for x in a for y in b]
    return min(products), max(products)


def _inverse(a: Interval) -> Interval:
    return ANY if _holds_zero(a) else (1 / a[1], min(1 / a[0], 1e300))


def _clamped(node: Node, a: Interval) -> Interval:
    low, high = (*node.arguments[1:3], None, None)[:2]
    if node.op == "clamp_max":
        low, high = None, low
    low, high = node.keywords.get("min", low), node.keywords.get("max", high)
    if isinstance(low, Ref) or isinstance(high, Ref):
        return ANY
    bounds = [min(max(x, -math.inf if low is None else low), math.inf if high is None else high) for x in a]
    return bounds[0], bounds[1]


def _broadcasts(node: Node, shapes: Mapping[int, tuple[int, ...]]) -> bool:
    """Whether every operand's dims are the result's, or 1, counted from the right."""
    return all(
        all(n in (1, m) for n, m in zip(reversed(shape), reversed(node.shape), strict=False))
        for shape in shapes.values()
    )
