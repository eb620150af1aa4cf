"""One or more runs of every operator that has a rule, small enough to try all placements of all operands."""

from __future__ import annotations

import torch
from case_values import Case, b, case, i, p, r, weighted
from image_cases import IMAGE_CASES
from sequence_cases import SEQUENCE_CASES
from torch import Tensor


def _grouped(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """``torch._grouped_mm`` in float64, which the operator does not know."""
    bounds = [0, *offs.tolist()]
    return torch.cat([x[bounds[e] : bounds[e + 1]] @ weight[e] for e in range(weight.shape[0])])


def _written(base: Tensor, source: Tensor, dim: int, start: int, stop: int) -> Tensor:
    made = base.clone()
    made.narrow(dim, start, stop - start).copy_(source)
    return made


UNARY = (
    "relu", "gelu", "silu", "sigmoid", "tanh", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "abs",
    "sin", "cos", "tan", "erf", "softplus", "elu", "selu", "celu", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu",
    "mish", "relu6", "log_sigmoid", "round", "floor", "ceil", "sign", "trunc", "square", "atan", "sinh", "cosh", "log2",
    "isnan", "isinf", "isfinite", "nan_to_num", "softshrink", "zeros_like", "ones_like", "sinc", "neg",
    "clone", "contiguous", "detach", "positive", "conj", "real",
)  # fmt: skip
BINARY = (
    "pow", "eq", "ne", "lt", "le", "gt", "ge", "maximum", "minimum", "fmod", "remainder", "atan2",
    "hypot", "xlogy", "add", "sub", "rsub", "subtract", "mul", "multiply", "div", "divide", "true_divide",
)  # fmt: skip
LOGICAL = ("logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__",
           "__xor__")  # fmt: skip

x23 = r(4, 6)
NOT_RUN = {
    "cross_entropy_loss": "it makes collectives of its own: run on ranks in test_losses.py",
    "getitem": "its operand is a tuple; it returns what the rule of the operator that made the tuple says, run there",
    "float": "a name of `to` that no trace holds",
    "half": "a name of `to` that no trace holds",
    "bfloat16": "a name of `to` that no trace holds",
    "double": "a name of `to` that no trace holds",
    "logsigmoid": "a name of `log_sigmoid` that no trace holds",
    "softsign": "composed of others in every trace",
    "prelu_scalar": "no ATen operator",
}

# Rules that know replicated operands only.
WHOLE_ONLY = frozenset({"changed_in_place"})

CASES: dict[str, list[Case]] = {
    **{name: [case(p(4, 6)), case(p(7))] for name in UNARY},
    **{name: [case(p(4), p(4)), case(p(2, 4, 1), p(4, 6))] for name in BINARY},
    **{name: [case(b(4, 6), b(6))] for name in LOGICAL},
    **IMAGE_CASES,
    **SEQUENCE_CASES,
    "add": [
        case(p(4, 6), p(4, 6)),
        case(p(2, 4, 1), p(4, 6)),
        case(r(4, 6), 2.0),
        case(r(4, 6), 0),
        case(r(7), r(7), alpha=2),
    ],
    "rsub": [case(p(4, 6), p(4, 6)), case(p(4, 6), 1.0), case(p(4, 6), 1.0, 2)],
    "mul": [case(p(4, 6), p(4, 6)), case(p(2, 4, 1), p(4, 6)), case(x23, x23), case(r(7), 3.0)],
    "div": [
        case(p(4, 6), p(4, 6)),
        case(p(2, 4, 1), p(4, 6)),
        case(p(7), 3.0),
        case(p(4, 6), 0.3, rounding_mode="floor"),
    ],
    "floor_divide": [Case((p(4, 6), p(6)), function=lambda a, b: torch.floor_divide(a.detach(), b.detach()))],
    "logical_not": [case(b(4, 6))],
    "bitwise_not": [case(b(4, 6))],
    "__invert__": [Case((b(4, 6),), function=torch.Tensor.__invert__)],
    "bitwise_left_shift": [case(i(4, 4, 6), i(3, 6))],
    "bitwise_right_shift": [case(i(40, 4, 6), i(3, 6))],
    "clamp": [case(r(4, 6), -0.3, 0.4)],
    "clip": [case(r(4, 6), -0.3, 0.4)],
    "clamp_min": [case(r(4, 6), 0.1)],
    "clamp_max": [case(r(4, 6), 0.1)],
    "threshold": [case(r(4, 6), 0.1, 2.0)],
    "full_like": [case(r(4, 6), 3.0)],
    "empty_like": [Case((r(4, 6),), values=False)],
    "lerp": [case(r(4, 6), r(4, 6), 0.3), case(r(4, 6), r(4, 6), p(6))],
    "dropout": [case(r(4, 6), 0.5, True), case(r(4, 6), 0.5, False)],
    "to": [case(r(4, 6), torch.float32), case(r(4, 6), torch.int64)],
    "_to_copy": [case(r(4, 6), dtype=torch.float32), case(r(4, 6), dtype=torch.bool)],
    "type_as": [case(r(4, 6), r(2)), case(r(4, 6), i(3, 2))],
    "where": [
        case(b(4, 6), r(4, 6), r(6)),
        case(b(4, 1), r(4, 6), 0.0),
        case(b(4, 6), r(4, 6), 1.0),
    ],
    "masked_fill": [case(r(4, 6), b(6), 0.0), case(r(4, 6), b(4, 6), -1.0), case(r(4, 6), b(4, 6), r())],
    # products
    "linear": [weighted(r(2, 3, 6), r(4, 6)), weighted(r(3, 7), r(5, 7), r(5)), weighted(r(4, 6), r(6, 6), r(6))],
    "addmm": [Case((r(4), r(3, 6), r(6, 4)), zero_pads=(2,)), Case((r(3, 4), r(3, 6), r(6, 4)), zero_pads=(2,))],
    "mm": [weighted(r(3, 6), r(6, 4)), weighted(r(6, 6), r(6, 6))],
    "matmul": [
        weighted(r(4, 3, 6), r(4, 6, 2)),
        weighted(r(2, 4, 3, 6), r(6, 2)),
        weighted(r(4, 1, 2, 3), r(1, 2, 3, 2)),
        weighted(r(4, 6), r(6)),
    ],
    "bmm": [weighted(r(4, 3, 6), r(4, 6, 2))],
    "baddbmm": [
        case(r(4, 3, 2), r(4, 3, 6), r(4, 6, 2)),
        case(r(1, 3, 2), r(4, 3, 6), r(4, 6, 2), beta=0.5, alpha=2.0),
    ],
    "_grouped_mm": [Case((r(6, 4), r(3, 4, 6), torch.tensor([1, 4, 6])), function=_grouped, zero_pads=(1,))],
    "grouped_mm_fallback": [Case((r(6, 4), r(3, 4, 6), torch.tensor([1, 4, 6])), function=_grouped, zero_pads=(1,))],
    "einsum": [
        Case(("bi,io->bo", [r(3, 4), r(4, 6)]), zero_pads=(1,)),
        Case(("bhi,bhj->bhij", [r(2, 4, 3), r(2, 4, 3)]), zero_pads=(1,)),
    ],
    "scaled_dot_product_attention": [
        case(r(2, 4, 3, 2), r(2, 4, 5, 2), r(2, 4, 5, 2)),
        case(r(1, 4, 3, 2), r(1, 4, 3, 2), r(1, 4, 3, 2), r(1, 1, 3, 3)),
        case(r(1, 4, 3, 2), r(1, 4, 3, 2), r(1, 4, 3, 2), r(1, 4, 3, 3)),
        case(r(1, 6, 3, 2), r(1, 3, 3, 2), r(1, 3, 3, 2), None, 0.0, True, enable_gqa=True),
    ],
    "embedding": [case(r(7, 4), i(7, 2, 3)), case(r(8, 6), i(8, 5), 3)],
    # along dims
    "sum": [Case((r(4, 6),), zero_pads=(0,)), Case((r(4, 6, 3), [1]), zero_pads=(0,)),
            Case((r(4, 7), [-1], True), zero_pads=(0,))],
    "mean": [case(r(4, 6, 3), [1]), case(r(4, 7), [-1], True), case(r(4, 6, 2), [0, 1])],
    "amax": [case(r(4, 6, 3), [1]), case(r(4, 6), [-1], True)],
    "amin": [case(r(4, 6, 3), [0, 2])],
    "argmax": [case(r(4, 6)), case(r(4, 6, 3), 1)],
    "argmin": [case(r(4, 6, 3), 1, True)],
    "any": [case(b(4, 6), 1), case(b(4, 6))],
    "all": [case(b(4, 6), 0, True)],
    "var": [
        case(r(4, 6, 3), [1], True, False),
        case(r(4, 6, 3), [1], False, True),
        case(r(4, 6), False),
        case(r(4, 6, 3), [1], correction=0, keepdim=True),
        case(r(4, 6, 3), [1], correction=1),
    ],
    "std": [case(r(4, 6, 3), [0], True, False), case(r(4, 6), True)],
    "logsumexp": [case(r(4, 6, 3), [1])],
    "norm": [case(r(4, 6, 3), 2, [1], True), case(r(4, 6, 3), 2, [1])],
    "linalg_vector_norm": [case(r(4, 6, 3), 2, [1], True), case(r(4, 6, 3), 2, [0])],
    "prod": [case(r(4, 6, 3), 1), case(r(4, 6))],
    "count_nonzero": [case(i(2, 4, 6, 3), [1]), case(i(2, 4, 6), 0)],
    "softmax": [case(r(4, 6, 3), 1), case(r(4, 6), -1)],
    "log_softmax": [case(r(4, 6), -1)],
    "_softmax": [case(r(4, 6), -1, False)],
    "_log_softmax": [case(r(4, 6), 0, False)],
    "cumsum": [case(r(4, 6), 1)],
    "cumprod": [case(r(4, 6), 1)],
    "glu": [case(r(4, 6), 1), case(r(4, 6), 0), case(r(2, 8, 3), -2)],
    "logcumsumexp": [case(r(4, 6), 1)],
    "topk": [case(r(4, 6), 2), case(r(4, 6), 2, 0)],
    "sort": [case(r(4, 6)), case(r(4, 6), 0, True), case(r(4, 6), stable=True, dim=0)],
    "max": [case(r(4, 6, 3), 1), case(r(4, 6, 3), 0, True), case(r(4, 6)), case(r(4, 6), r(4, 6)), case(r(4, 6), 0)],
    "min": [case(r(4, 6, 3), 0), case(r(4, 6), r(4, 6))],
    "layer_norm": [case(r(4, 2, 6), [6], r(6), r(6)), case(r(4, 2, 6), [2, 6])],
    "rms_norm": [case(r(4, 2, 6), [6], r(6))],
    # shapes
    "view": [
        case(r(4, 6), [2, 2, 6]),
        case(r(4, 6), [24]),
        case(r(2, 3, 12), [2, 3, -1, 3]),
        case(r(2, 3, 12), [2, 3, 4, 3]),
        case(r(2, 3, 4, 3), [2, 3, 12]),
        case(r(2, 3, 4, 3), [6, 12]),
        case(r(2, 3, 12), [2, 3, 3, 4]),
        case(r(4, 1, 6), [4, 6]),
        case(r(3, 4), [12]),
    ],
    "reshape": [case(r(4, 6), [4, 3, 2]), case(r(4, 6, 2), [24, 2]), case(r(4, 6), [6, 4])],
    "_unsafe_view": [case(r(4, 6), [4, 2, 3])],
    "flatten": [case(r(2, 4, 6), 1), case(r(2, 4, 6), 0, 1)],
    "unflatten": [case(r(4, 6), 1, [3, 2]), case(r(4, 12, 2), 1, [-1, 3]), case(r(4, 6), -1, [2, 3])],
    "reshape_as": [case(r(4, 6), r(4, 3, 2))],
    "view_as": [case(r(4, 6), r(24)), case(r(4, 6), r(4, 6))],
    "ravel": [case(r(4, 6))],
    "transpose": [case(r(4, 6, 3), 0, -1)],
    "swapaxes": [case(r(4, 6, 3), 1, 2)],
    "swapdims": [case(r(4, 6, 3), 1, 2)],
    "t": [case(r(4, 6)), case(r(4))],
    "mT": [case(r(4, 6, 3))],
    "adjoint": [case(r(4, 6, 3))],
    "numpy_T": [case(r(4, 6))],
    "permute": [case(r(4, 6, 3), [2, 0, 1])],
    "movedim": [case(r(4, 6, 3), 0, 2), case(r(4, 6, 3), -1, 1), case(r(4, 6, 3), [0], [2])],
    "unsqueeze": [case(r(4, 6), 0), case(r(4, 6), -1)],
    "squeeze": [case(r(1, 4, 1, 6)), case(r(1, 4, 1, 6), 2), case(r(4, 1, 6), [0, 1])],
    "expand": [case(r(4, 1), [2, 4, 6]), case(r(4, 1), [-1, 6])],
    "broadcast_to": [case(r(4, 1), [2, 4, 6])],
    "expand_as": [case(r(4, 1), r(2, 4, 6)), case(r(1, 6), r(4, 6))],
    "repeat": [case(r(4, 6), [1, 2]), case(r(6), [2, 1])],
    "tile": [case(r(4, 6), [2]), case(r(4, 6), [2, 1, 1])],
    "repeat_interleave": [case(r(4, 6), 2, 1), case(r(4, 6), 3, dim=0), case(r(4, 6), 2)],
    "repeat_heads": [
        Case((r(2, 4, 3), 1, 2), function=lambda x, dim, times: x.repeat_interleave(times, dim)),
        Case((r(2, 2, 3), 1, 3), function=lambda x, dim, times: x.repeat_interleave(times, dim)),
    ],
    "cat": [case([r(4, 6), r(4, 2)], -1), case([r(4, 6), r(4, 6)]), case([r(4, 6), r(4, 6), r(4, 6)], 1)],
    "concat": [case([r(4, 6), r(4, 2)], -1)],
    "concatenate": [case([r(4, 6), r(4, 2)], -1)],
    "stack": [case([r(4, 6), r(4, 6)], 1)],
    "flip": [case(r(4, 6, 2), [1]), case(r(4, 6), [0, -1])],
    "roll": [case(r(4, 6), [1], [1]), case(r(4, 6), [1]), case(r(4, 6), [1, 2], [0, 1])],
    "slice": [
        case(r(4, 8), 1, 4, 8),
        case(r(4, 8), 1, None, 4),
        case(r(4, 8), -1, -4, 2**63 - 1),
        case(r(4, 8), 1, 0, 8, 2),
        case(r(4, 8), 1, 0, 2**63 - 1),
        case(r(4, 8), 1, 3, 5),
    ],
    "narrow": [case(r(4, 8), 1, 4, 4), case(r(4, 8), 1, 0, 8)],
    "select": [case(r(4, 6, 3), 1, 2), case(r(4, 6, 3), -1, -1)],
    "unbind": [case(r(3, 6, 4)), case(r(4, 3), 1)],
    "split": [case(r(4, 8), 4, 1), case(r(4, 8), 4, -1), case(r(8, 3), 5)],
    "split_with_sizes": [case(r(4, 8), [4, 4], 1), case(r(4, 12), [4, 8], -1)],
    "chunk": [case(r(4, 8), 2, 1), case(r(8, 3), 3)],
    "tensor_split": [case(r(4, 8), 2, 1), case(r(4, 8), [4], 1)],
    # by index
    "index": [
        case(r(4, 6, 3), [None, i(6, 2)]),
        case(r(4, 6, 3), [i(4, 2, 1), i(6, 2, 5)]),
        case(r(4, 6, 3), [i(4, 2), None, i(3, 2)]),
    ],
    "index_select": [case(r(4, 6), 1, i(6, 3)), case(r(4, 6), -2, i(4, 3))],
    "index_add": [case(r(4, 6), 0, i(4, 3), r(3, 6)), case(r(4, 6), 1, i(6, 3), r(4, 3), alpha=2)],
    "index_put": [
        case(r(4, 6), [torch.tensor([2, 0])], r(2, 6)),
        case(r(4, 6), [torch.tensor([2, 0])], r(6)),
        case(r(4, 6), [torch.tensor([2, 0])], r(2, 1)),
        case(r(4, 6), [torch.tensor([2, 0])], r()),
        case(r(4, 6), [i(4, 5)], r(5, 6), True),
    ],
    "tril": [case(r(2, 4, 6))],
    "triu": [case(r(4, 4, 6), 1)],
    "pad": [
        case(r(4, 6), [1, 2]),
        case(r(4, 6), [1, 2], "constant", 2.0),
        case(r(2, 4, 6), [1, 1], "reflect"),
        case(r(2, 4, 3, 3), [1, 1, 2, 0], "replicate"),
        case(r(2, 4, 3), [1, 2], "circular"),
        case(r(4, 6), [0, 0, 1, 0]),
    ],
    "constant_pad_nd": [case(r(4, 6), [1, 2]), case(r(4, 6), [1, 2], 2.0)],
    "slice_scatter": [
        Case((r(4, 8, 3), r(4, 4, 3), 1, 0, 4), function=_written),
        Case((r(4, 8, 3), r(3), 1, 2, 6), function=_written),
        Case((r(4, 8, 3), r(1, 4, 1), 1, 2, 6), function=_written),
    ],
    "changed_in_place": [Case((r(4, 6), r(4)), function=lambda x, written: x + written.sum())],
    "new_zeros": [case(r(4, 6), [4, 6]), case(r(4, 6), [5, 6]), case(r(4, 6), [3])],
    "new_ones": [case(r(4, 6), [4, 6])],
    "new_full": [case(r(4, 6), [4, 6], 2.0)],
    "new_empty": [Case((r(4, 6), [4, 6]), values=False)],
}  # fmt: skip
