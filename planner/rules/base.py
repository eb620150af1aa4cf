"""What an operator rule is.

A rule maps the placements of an operator's operands to the placement of its result, or to None where the local
operator on local values would
not compute the same function. It sees `Replicate`, `Shard` and `Partial` only: how gradients are placed follows from
the result (`strategies`).
Rules never look at names; they look at shapes, arguments and layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..graph import Node, Ref, references
from ..layout import Layout
from ..placement import PARTIAL, WHOLE, Partial, Placement, Replicate, Shard

Result = Placement | tuple[Placement, ...] | None


@dataclass(frozen=True)
class Operation:
    """One operator with the placements of its operands.

    Attributes:
        node: The operator.
        nodes: The graph's nodes, to look operands up.
        placed: Placement per operand (node index); a tuple for operands that are tuples.
    """

    node: Node
    nodes: Sequence[Node]
    placed: Mapping[int, Placement | tuple[Placement, ...]]

    def argument(self, position: int, name: str = "", default: Any = None) -> Any:
        """The argument at ``position``, or the keyword ``name``, or ``default``."""
        if position < len(self.node.arguments):
            return self.node.arguments[position]
        return self.node.keywords.get(name, default)

    def placement(self, argument: Any) -> Placement | None:
        """Placement of a tensor argument; None for anything else."""
        if not isinstance(argument, Ref):
            return None
        found = self.placed[argument.index]
        return None if isinstance(found, tuple) else found

    def shape(self, argument: Any) -> tuple[int, ...]:
        """Global shape of a tensor argument; () for scalars."""
        return self.nodes[argument.index].shape if isinstance(argument, Ref) else ()

    @property
    def tensors(self) -> list[Ref]:
        """Tensor arguments in order, lists opened."""
        return [Ref(i) for i in references((self.node.arguments, self.node.keywords))]


RuleFunction = Callable[[Operation], Result]
RULES: dict[str, RuleFunction] = {}


def rule(*names: str) -> Callable[[RuleFunction], RuleFunction]:
    """Registers a rule for operators ``names`` (and their in-place twins)."""

    def register(function: RuleFunction) -> RuleFunction:
        for name in names:
            RULES[name] = function
        return function

    return register


def wrapped(dim: int, rank: int) -> int:
    """A dim counted from 0."""
    return dim + rank if dim < 0 else dim


def all_whole(op: Operation) -> bool:
    """Every operand is replicated."""
    return all(isinstance(op.placement(t), Replicate) for t in op.tensors)


def shifted(placement: Placement, dim_of: Callable[[int], int | None]) -> Result:
    """The placement after a change that moves dim ``d`` to ``dim_of(d)`` (None: the dim is gone)."""
    match placement:
        case Shard(dim, layout):
            target = dim_of(dim)
            return None if target is None else Shard(target, layout)
        case _:
            return placement


def contraction(
    op: Operation, operands: Sequence[tuple[Ref, Sequence[str | None]]], out: Sequence[str | None]
) -> Result:
    """Rule of a product of operands whose dims carry factor labels (None: never split).

    A split label must be split alike in every operand that has it. A label missing from ``out`` is summed: its split
    gives a partial sum.
    A product is linear in each operand, so one partial operand beside replicated ones gives a partial result.
    """
    label: str | None = None
    layout: Layout | None = None
    partials = 0
    for tensor, labels in operands:
        match op.placement(tensor):
            case Shard(dim, found):
                name = labels[dim]
                if name is None or (label is not None and (name != label or found != layout)):
                    return None
                label, layout = name, found
            case Partial():
                partials += 1
    if partials:
        return PARTIAL if partials == 1 and label is None else None
    if label is None or layout is None:
        return WHOLE
    for tensor, labels in operands:
        if label in labels and not isinstance(op.placement(tensor), Shard):
            return None
    if label in out:
        return Shard(list(out).index(label), layout)
    return None if layout.is_replicated else PARTIAL  # a sum would count copies twice
