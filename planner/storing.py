"""In which placements a value may be stored, given those it is made in, and what moving it there costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .graph import Node
from .moves import Move, move
from .placement import PARTIAL_GRAD, WHOLE, Partial, Placement, Replicate, Shard
from .pricing import Cost, Pricing
from .sequence import is_read

Stored = Placement | tuple[Placement, ...]
Fixed = tuple[tuple[Move | None, ...], Move | None]
Domain = tuple[Stored, ...]


@dataclass(frozen=True)
class Setting:
    """What the graph allows at one operator.

    Attributes:
        movable: The result may be moved where it is made.
        convertible: Per operand (distinct, in order): a reader may change it locally.
        editable: Its call may be edited.
        sequence: How the result may be split along the sequence.
        reduce_ps: Price of an all_reduce of a result that may be, beside its time.
        gather_ps: Price of gathering the result, beside its time.
        slice_ps: Price of cutting a replicated activation for one reader, beside its time.
        births: Splits of dims that the operator makes out of length 1, each rank making its part only.
        fixed: The only moves allowed, of the operands and of the result; None where all are open.
        fragile: Dims of the result along which padding would not stay finite.
        written: The result is changed in place later on: a move has to make a new tensor of it.
    """

    movable: bool
    convertible: tuple[bool, ...]
    editable: bool = False
    sequence: Shard | None = None
    reduce_ps: int = 0
    gather_ps: int = 0
    slice_ps: int = 0
    births: tuple[Shard, ...] = ()
    fixed: Fixed | None = None
    fragile: frozenset[int] = frozenset()
    written: bool = False


def stored_domain(node: Node, made: Sequence[Stored], setting: Setting) -> Domain:
    """What a value made in one of ``made`` may be stored as: replicated first, then split, then partial."""
    movable = setting.movable
    targets: dict[Stored, None] = dict.fromkeys(made)
    if setting.sequence is not None and made:
        targets[setting.sequence] = None
    if movable and node.dtype.is_floating_point and not node.outputs and made:
        targets[WHOLE] = None
        if node.differentiable:
            targets[PARTIAL_GRAD] = None
    elif movable and not node.outputs and any(isinstance(m, Shard) for m in made):
        targets[WHOLE] = None
    return tuple(sorted((t for t in targets if not is_read(node, t)), key=_preference))


def beside_time(made: Stored, target: Stored, setting: Setting) -> int:
    """What storing costs beside its time: gathers of what should stay split, all_reduces where the sequence may be
    split."""
    if made == target or isinstance(made, tuple) or isinstance(target, tuple):
        return 0
    if isinstance(made, Shard) and isinstance(target, Replicate) and not made.layout.elastic:
        return setting.gather_ps
    step = move(made, target) if setting.reduce_ps else None
    return setting.reduce_ps * [step.forward, step.backward].count("all_reduce") if step is not None else 0


def _preference(stored: Stored) -> int:
    match stored:
        case Replicate(partial_grad=partial):
            return int(partial)
        case Shard():
            return 2
        case Partial():
            return 3
        case _:
            return 4


def price_move(node: Node, made: Stored, target: Stored, setting: Setting, pricing: Pricing) -> Cost | None:
    """Cost of storing what was made as ``made`` in ``target``; None where it cannot be."""
    if setting.fixed is not None:
        step = None if isinstance(made, tuple) or isinstance(target, tuple) else move(made, target)
        if step != setting.fixed[1] or (step is None and made != target):
            return None
    if made == target:
        return Cost()
    if not setting.movable or isinstance(made, tuple) or isinstance(target, tuple):
        return None
    if isinstance(made, (Replicate, Partial)) and isinstance(target, (Partial, Shard)) and target != setting.sequence:
        return None  # splitting the values between matmuls is sequence parallelism, which is asked for
    if not node.differentiable and isinstance(target, Replicate) and target.partial_grad:
        return None
    step = move(made, target)
    if step is None or (setting.written and step.forward in ("identity", "slice")):
        return None
    if node.dtype.is_complex and not step.is_free:
        return None  # collectives add real numbers
    cost = pricing.move(step, node.nbytes)
    cost = cost if node.differentiable else Cost(cost.forward_ps, 0)
    return cost.again() if node.recomputed else cost
