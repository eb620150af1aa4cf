"""What autograd keeps of a forward pass until its backward: which values an operator's derivative reads.

A value is kept once, whoever keeps it; a view keeps what it is a view of. `tests/test_measured_memory.py`
compares with what is alive after a real forward pass.
"""

from __future__ import annotations

from .graph import VIEWS, Graph, Node
from .rules.convolutions import CONVOLUTIONS, TRANSPOSED
from .rules.images import AVERAGES, INTERPOLATIONS, LARGEST
from .strategies import is_leaf

NOTHING = frozenset({
    "add", "add_", "sub", "rsub", "neg", "mean", "sum", "to", "clone", "contiguous", "cat", "stack", "copy", "index",
    "embedding", "index_select", "gather", "where", "masked_fill", "masked_fill_", "repeat", "repeat_interleave",
    "slice_scatter", "constant_pad_nd", "pad", "roll", "flip", "cumsum", "tril", "triu", "scatter", "scatter_add",
    "index_add", "index_add_", "dropout", "new_zeros", "zeros_like", "type_as", "masked_scatter", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "im2col", "col2im", "unfold", *AVERAGES, *INTERPOLATIONS,
})  # fmt: skip
"""Linear in what they differentiate; at most indices, masks and sizes are kept, which other operators made."""

FACTORS = frozenset({
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mul", "mul_", "div", "div_", "einsum", "dot",
    *CONVOLUTIONS, *TRANSPOSED, "grid_sampler", "_weight_norm",
    "_grouped_mm", "grouped_mm_fallback", "scaled_dot_product_attention",
})  # fmt: skip
"""Products: each operand is kept where a gradient goes into another."""

OPERAND = frozenset({
    "silu", "gelu", "pow", "leaky_relu", "hardtanh", "hardswish", "softplus", "log", "log1p", "sin", "cos", "abs",
    "clamp", "clamp_min", "clamp_max", "erf", "mish", "layer_norm", "group_norm", "rms_norm", "batch_norm",
    "instance_norm", "prelu", "glu", "log_sigmoid", "cross_entropy_loss", *LARGEST,
})  # fmt: skip
"""The first operand is kept (of a cross entropy, the equally large logarithms of the probabilities)."""

RESULT = frozenset({
    "relu", "relu_", "tanh", "sigmoid", "softmax", "_softmax", "log_softmax", "exp", "sqrt", "rsqrt", "reciprocal",
    "scaled_dot_product_attention", "elu",
})  # fmt: skip
"""The result is kept."""

INSIDE = frozenset({"dropout"})
"""Keeps a tensor like its result beside it: what was drawn, where it draws."""

_COPIED_IF_TURNED = frozenset({"reshape", "flatten", "contiguous"})
_TURNS = frozenset({"transpose", "permute", "movedim", "swapaxes", "t", "mT", "expand"})


def saved_values(graph: Graph) -> set[int]:
    """Templates of the nodes of which a copy's value is kept from the forward pass on, leaves left out: what
    operators read again, and of blocks that are checkpointed all they are given instead."""
    return _saved(graph)[0]


def recomputed_values(graph: Graph) -> set[int]:
    """Templates of the nodes of which a copy's value is kept while its own checkpointed block is differentiated."""
    outside, inside = _saved(graph)
    return inside - outside


def _saved(graph: Graph) -> tuple[set[int], set[int]]:
    nodes, bases = graph.nodes, base_values(graph)
    block_of = _checkpointed(graph)
    found: tuple[set[int], set[int]] = set(), set()
    seen: set[tuple[object, ...]] = set()
    for node in nodes:
        if is_leaf(node):
            continue
        key = (node.template, *[nodes[bases[i]].template for i in node.operands])
        if key in seen:
            continue
        seen.add(key)
        block = block_of[node.index]
        for index in (*_kept_by(graph, node), *(node.operands if block else ())):
            base = nodes[bases[index]]
            own = block and block == block_of[base.index]
            if not is_leaf(base) and not (own and index not in _kept_by(graph, node)):
                found[bool(own)].add(base.template)
    return found


def _checkpointed(graph: Graph) -> list[int]:
    """For every node its checkpointed block, counted from 1; 0 outside."""
    block_of = [0] * len(graph.nodes)
    for number, (start, stop) in enumerate(graph.checkpointed, 1):
        block_of[start:stop] = [number] * (stop - start)
    return block_of


def saves(graph: Graph, node: Node) -> bool:
    """Whether anything is kept for the operator's derivative, leaves among it."""
    return bool(_kept_by(graph, node)) or kept_inside(node)


def _kept_by(graph: Graph, node: Node) -> tuple[int, ...]:
    """The operands, and itself, that are kept for a node's derivative; unknown operators keep all they read and
    make."""
    nodes, op = graph.nodes, node.op
    if is_leaf(node) or not node.differentiable or op in VIEWS or op in NOTHING:
        return ()
    kept: tuple[int, ...] = ()
    if op in FACTORS:
        kept = tuple(
            index
            for n, index in enumerate(node.operands)
            if any(nodes[i].differentiable for m, i in enumerate(node.operands) if m != n)
        )
    elif op in OPERAND or op not in RESULT:
        kept = node.operands[: 1 if op in OPERAND else None]
    return (*kept, node.index) if op in RESULT or not (op in FACTORS or op in OPERAND) else kept


def kept_inside(node: Node) -> bool:
    """Whether the operator keeps a tensor like its result that no node stands for."""
    return node.op in INSIDE and node.differentiable and all(node.arguments[1:])  # of a rate above 0, in training


def base_values(graph: Graph) -> list[int]:
    """For every node the node whose memory its value lies in: its own but for views and changes in place.

    A fused attention lays its result out as [batch, length, heads, width], so that joining the heads copies nothing,
    and reads repeated heads as they are (Hugging Face copies them where a mask is given).
    """
    bases, turned = list(range(len(graph.nodes))), set()
    for node in graph.nodes:
        if node.op == "scaled_dot_product_attention":
            turned.add(node.index)
        if not node.operands or is_leaf(node) or not _may_share(node):
            continue
        source = node.operands[0]
        unchanged = node.op == "reshape" and node.shape == graph.nodes[source].shape
        if node.op in _COPIED_IF_TURNED and source in turned and not unchanged:
            continue
        bases[node.index] = bases[source]
        if (source in turned) != (node.op in _TURNS):  # turned twice, it lies in order
            turned.add(node.index)
    return bases


def _may_share(node: Node) -> bool:
    if node.op in VIEWS or node.op == "contiguous":
        return True
    return node.op.endswith("_") and not node.op.endswith("__")
