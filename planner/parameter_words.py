"""What each parameter's layout is called, and why a weight is left whole: the part of a plan that people read."""

from __future__ import annotations

from typing import Any

from .formulation import Formulation
from .graph import Graph
from .lowering import Lowered
from .placement import Shard
from .plan_model import PlannedParameter
from .roles import Weight, label_of
from .rules.products import FACTORS
from .strategies import apply_rule


def described_parameters(
    formulation: Formulation, lowered: Lowered
) -> tuple[tuple[PlannedParameter, ...], tuple[tuple[str, int, str], ...]]:
    graph = formulation.graph
    nodes = {n.fqn: n for n in graph.nodes if n.op == "parameter"}
    roots = {index: graph.nodes[index].fqn for index in formulation.weights}
    weight_of = {fqn: formulation.weights[index] for index, fqn in roots.items()}
    planned, unsplit = [], []
    for edit in lowered.parameters:
        node = nodes[edit.fqn]
        weight = weight_of.get(edit.fqn) or weight_of.get(graph.ties.get(edit.fqn, ""))
        word = _word(formulation, node.index, edit.dim, weight)
        planned.append(
            PlannedParameter(edit, word, node.shape, str(node.dtype).removeprefix("torch."), weight is not None)
        )
        if weight is not None and word == "replicated" and edit.fqn not in graph.ties:
            unsplit.append((edit.fqn, node.nbytes, _reason(formulation, node.index, weight)))
    return tuple(planned), tuple(unsplit)


def _word(formulation: Formulation, index: int, dim: int | None, weight: Any) -> str:
    graph = formulation.graph
    if dim is None:
        return "replicated"
    if weight is None:
        return "column"  # a bias or norm is cut with the outputs it belongs to
    words = []
    for reader in weight.readers:
        product = graph.nodes[reader]
        direct = [
            i
            for i in product.operands
            if graph.nodes[i].op == "parameter" and _root(graph, i) == _root(graph, weight.index)
        ]
        if direct:
            words.append(label_of(graph, product, direct[0], dim))
        else:
            placed = _effective_at(formulation, product.index, weight.index, dim)
            words.append(placed)
    if "vocab" in words or (not weight.block and "column" in words and _reaches_output(graph, weight.readers)):
        return "vocab"
    return words[0]


def _effective_at(formulation: Formulation, product: int, weight: int, dim: int) -> str:
    """Through views: follow the split from the parameter to the product by the rules."""
    graph = formulation.graph
    layout = next((s.layout for s in formulation.domain(weight) if isinstance(s, Shard) and s.dim == dim), None)
    if layout is None:
        return "column"
    placed: dict[int, Any] = {weight: Shard(dim, layout)}
    users = graph.users()
    frontier = [weight]
    while frontier:
        for reader in users[frontier.pop(0)]:
            node = graph.nodes[reader]
            if reader == product:
                operand = next(i for i in node.operands if i in placed)
                return label_of(graph, node, operand, placed[operand].dim)
            if len(node.operands) == 1 and reader not in placed:
                made = apply_rule(graph, node, {node.operands[0]: placed[node.operands[0]]})
                if isinstance(made, Shard):
                    placed[reader] = made
                    frontier.append(reader)
    return "column"


def _root(graph: Graph, index: int) -> str:
    name = graph.nodes[index].fqn
    return graph.ties.get(name, name)


def _reaches_output(graph: Graph, readers: tuple[int, ...]) -> bool:
    """Whether a product's result is a model output, but for elementwise work and casts."""
    outputs = set(graph.outputs)
    users = graph.users()
    for reader in readers:
        index, steps = reader, 0
        while (
            index not in outputs
            and len(users[index]) == 1
            and steps < 8
            and graph.nodes[users[index][0]].op not in FACTORS
        ):
            index, steps = users[index][0], steps + 1
        if index in outputs:
            return True
    return False


def _reason(formulation: Formulation, index: int, weight: Weight) -> str:
    if index in formulation.reasons:
        return formulation.reasons[index]
    if formulation.variable[index] in formulation.penalised:
        return "no legal split of it exists in this model at this size"
    if weight.may_stay_whole:
        kind = "a low-rank input, " if weight.is_low_rank_input else ""
        return f"{kind}{weight.share:.2%} of its block's matmul bytes; splitting it would cost more than it saves"
    return "replicated is faster (replicate=auto)"
