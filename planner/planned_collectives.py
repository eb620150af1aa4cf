"""The collectives of a solved graph: what each moves, when, for whom, and which operator forces it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .formulation import Formulation
from .graph import Graph, Node, numel
from .moves import COMMUNICATES, Move
from .placement import PARTIAL, PARTIAL_GRAD, WHOLE, Partial, Shard
from .rules.bags import LOOKUPS
from .rules.pointwise import JOINT
from .storing import Stored
from .strategies import Choice, apply_rule, is_leaf, reads

Category = Literal["block", "statistic", "parameter_gradient", "embedding", "head", "loss", "recomputation"]


@dataclass(frozen=True)
class Collective:
    """One collective of one step.

    Attributes:
        kind: all_reduce, all_gather, reduce_scatter.
        nbytes: Of the whole buffer over all ranks.
        direction: forward or backward.
        workload: The workload's name.
        site: Path of the module whose forward makes the value.
        block: The outermost block; "" outside.
        forced_by: The operator that needs it, and its module.
        category: What it is for.
        bucket: The block whose gradients it sums, for parameter gradients.
        seconds_ps: Predicted picoseconds.
    """

    kind: str
    nbytes: int
    direction: str
    workload: str
    site: str
    block: str
    forced_by: str
    category: Category
    bucket: str = ""
    ps: int = 0


def planned_collectives(
    formulation: Formulation,
    stored: Sequence[Stored],
    choices: Mapping[int, Choice],
    own: Mapping[int, Sequence[int]],
    split_outputs: Sequence[tuple[str, Move]],
    workload: str,
) -> list[Collective]:
    """Of one step, forward then backward.

    Args:
        formulation: What was solved.
        stored: Stored placement per node.
        choices: What was chosen per operator node.
        own: Bytes of the all_reduces that operators' local forms make themselves, per node.
        split_outputs: The paths of returned values that are stored split, and how they are made whole.
        workload: The workload's name.
    """
    graph, pricing = formulation.graph, formulation.pricing
    block_of = graph.block_of()
    users = graph.users()
    hidden = formulation.hidden
    in_blocks = [n.index for n in graph.nodes if not is_leaf(n) and block_of(n.module)]
    first, last = (min(in_blocks), max(in_blocks)) if in_blocks else (0, len(graph.nodes))
    forward: list[Collective] = []
    backward: list[Collective] = []
    linear: dict[object, bool] = {}

    def category(node: Node, nbytes: int) -> Category:
        if not block_of(node.module):
            if in_blocks and node.index < first:
                return "embedding"
            if in_blocks and node.index > last:
                return "head"
            if _from_embedding(formulation, node):
                return "embedding"
        return "statistic" if hidden and nbytes * 8 <= hidden else "block"

    for index, choice in choices.items():
        node = graph.nodes[index]
        for nbytes in own.get(index, ()):
            ps = pricing.collective("all_reduce", nbytes)
            at, why = (node.module, block_of(node.module)), f"{node.op} of split classes"
            forward.append(Collective("all_reduce", nbytes, "forward", workload, *at, why, "loss", "", ps))
            if node.recomputed:
                backward.append(_again(forward[-1]))
        if choice.move is None:
            continue
        step = choice.move
        nbytes = _moved_bytes(node, step)
        for kind, direction, into in ((step.forward, "forward", forward), (step.backward, "backward", backward)):
            if kind not in COMMUNICATES or (direction == "backward" and not node.differentiable):
                continue
            forced = (
                _forced_by(graph, node, choice.made, users, linear)
                if direction == "forward"
                else f"gradient of {_named(node)}"
            )
            ps = pricing.collective(kind, nbytes)
            into.append(
                Collective(
                    kind,
                    nbytes,
                    direction,
                    workload,
                    node.module,
                    block_of(node.module),
                    forced,
                    category(node, nbytes),
                    "",
                    ps,
                )
            )
            if direction == "forward" and node.recomputed:
                backward.append(_again(into[-1]))
    for path, step in split_outputs:
        node = graph.nodes[graph.outputs[graph.output_paths.index(path)]]
        if step.forward == "all_gather":
            nbytes = _moved_bytes(node, step)
            ps = pricing.collective("all_gather", nbytes)
            at, why = (node.module, block_of(node.module)), "the model's output"
            forward.append(Collective("all_gather", nbytes, "forward", workload, *at, why, "head", "", ps))
    return forward + list(reversed(backward)) + _parameter_gradients(formulation, stored, workload, block_of)


def _again(forward: Collective) -> Collective:
    """The same when the block is computed again."""
    return replace(
        forward, direction="backward", forced_by=f"recomputation: {forward.forced_by}", category="recomputation"
    )


def _moved_bytes(node: Node, step: Move) -> int:
    """Of the whole buffer over all ranks, padding included."""
    layout = step.layout
    return node.nbytes if layout is None else node.nbytes * layout.local * layout.ranks // layout.size


def _parameter_gradients(
    formulation: Formulation, stored: Sequence[Stored], workload: str, block_of: Callable[[str], str]
) -> list[Collective]:
    """One reduction per block and dtype of the gradients that are partial."""
    buckets: dict[tuple[str, object], int] = {}
    for node in formulation.graph.nodes:
        if node.op != "parameter" or node.fqn in formulation.graph.ties:
            continue
        held = stored[node.index]
        replicas = isinstance(held, Shard) and held.layout.is_replicated
        if held == PARTIAL_GRAD or replicas:
            key = (block_of(node.fqn), node.dtype)
            buckets[key] = buckets.get(key, 0) + numel(node.shape) * node.dtype.itemsize
    found = []
    for (block, _), nbytes in buckets.items():
        ps = formulation.pricing.collective("all_reduce", nbytes)
        found.append(
            Collective(
                "all_reduce",
                nbytes,
                "backward",
                workload,
                block,
                block,
                "partial gradients of replicated parameters",
                "parameter_gradient",
                block,
                ps,
            )
        )
    return found


def _from_embedding(formulation: Formulation, node: Node) -> bool:
    """Whether the value was looked up, with nothing but elementwise work since."""
    graph, frontier, steps = formulation.graph, [node.index], 0
    while frontier and steps < 32:
        value = graph.nodes[frontier.pop()]
        steps += 1
        if value.op in LOOKUPS:
            return True
        if value.shape == node.shape and not is_leaf(value):
            frontier += [
                i for i in value.operands if graph.nodes[i].shape == node.shape or graph.nodes[i].op in LOOKUPS
            ]
    return False


def _forced_by(graph: Graph, node: Node, made: Stored, users: list[list[int]], linear: dict[object, bool]) -> str:
    """The operator that needs the move: for a partial sum the first that is not linear in it, else the first reader.

    ``linear`` remembers which operators are; copies are what their templates are.
    """
    frontier, seen = [node.index], {node.index}
    while frontier:
        value = frontier.pop(0)
        for reader in users[value]:
            other = graph.nodes[reader]
            if reader in seen:
                continue
            seen.add(reader)
            if not isinstance(made, Partial):
                return _named(other)
            operands = reads(other)
            key = (other.template, operands.index(value))
            if key not in linear:
                joins = other.op in JOINT
                placed: dict[int, Stored] = {i: PARTIAL if i == value or joins else WHOLE for i in operands}
                linear[key] = apply_rule(graph, other, placed) == PARTIAL
            if not linear[key]:
                return _named(other)
            frontier.append(reader)
    return "the model's output"


def _named(node: Node) -> str:
    return f"{node.op} in {node.module}" if node.module else node.op
