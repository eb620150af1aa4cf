"""Stage 8, translation validation: the rewritten model, traced again, is the planned local graph node by node.

Two things are shown on every `parallelize`, on a meta copy and without communicating:

1. the plan is exact for this model: with all its layouts and moves fixed, the placement rules hold at every operator
(`recheck`);
2. the edited forward *is* that plan: traced on local shapes, it runs the same operators in the same order on the
same values, every result has
   the planned local shape, and moves stand exactly where they were planned.

A mismatch refuses the plan and names the node.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from colrow.cost_models.errors import Infeasible, ValidationError
from colrow.cost_models.hardware import Hardware, hardware_names, load_hardware
from colrow.planner.channel_groups import GROUPED, local_groups, with_groups
from colrow.planner.edits import OperatorEdit
from colrow.planner.formulation import Formulation
from colrow.planner.graph import Graph, Node, Ref
from colrow.planner.layout import Layout
from colrow.planner.local_operators import leaves_of
from colrow.planner.lowering import Lowered
from colrow.planner.moves import Move
from colrow.planner.placement import Placement, Shard
from colrow.planner.plan_model import Plan
from colrow.planner.replanning import recheck
from colrow.planner.storing import Stored
from colrow.planner.strategies import is_leaf, reads
from colrow.planner.trace import trace
from colrow.planner.workloads import example_of

from . import markers
from .schedules import Running
from .user_hooks import Boundary, either, passed_values

_REPLACED = frozenset({"embedding", "embedding_bag", "mean", "cross_entropy_loss", "batch_norm", "instance_norm"})
_SIZES = frozenset(
    {"view", "reshape", "expand", "broadcast_to", "unflatten", "new_empty", "new_zeros", "new_ones", "new_full"}
)


def validate(
    dense: nn.Module, edited: nn.Module, plan: Plan, running: Running
) -> tuple[tuple[frozenset[str], ...], dict[str, Boundary]]:
    """Shows that ``edited`` is what ``plan`` makes of ``dense``.

    Args:
        dense: A meta copy of the model as it was (`meta_copy`).
        edited: A meta copy with local parameter shapes (`with_local_shapes`) and edited bodies.
        plan: The plan.
        running: What the edited bodies follow.

    Returns:
        By schedule, the paths of what the model returns; the modules through whose boundary values pass that are not
        whole.

    Raises:
        ValidationError: Names the first node that differs.
    """
    returned, passed = [], dict[str, Boundary]()
    for index, schedule in enumerate(plan.schedules):
        inputs = example_of(schedule.workload)
        planned = trace(dense, inputs)
        try:
            solved = recheck(planned, plan, profile_of(plan), schedule)
        except Infeasible as error:
            differing = [
                f"{fact} {now} instead of {plan.assumptions[fact]}"
                for fact, now in planned.assumptions.items()
                if fact in plan.assumptions and plan.assumptions[fact] != now
            ]
            raise ValidationError(
                plan.name,
                f"the plan is not exact for this model ({error})",
                got=", ".join(differing) or None,
                remedy="Plan this model as it is now.",
            ) from error
        running.index = index
        with markers.switched_on():
            local = trace(edited, inputs)
        _Comparison(solved.formulation, solved.lowered, local).run()
        returned.append(frozenset(planned.output_paths))
        passed = either(passed, passed_values(solved))
    return tuple(returned), passed


def profile_of(plan: Plan) -> Hardware:
    """The plan's hardware, or where that was a file of the user's, any: prices do not decide what is exact."""
    return load_hardware(plan.hardware if plan.hardware in hardware_names() else hardware_names()[0])


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on meta; nothing is allocated, ties stay ties."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def with_local_shapes(model: nn.Module, plan: Plan) -> nn.Module:
    """A meta copy with every parameter in its planned local shape."""
    made = meta_copy(model)
    shapes = {p.edit.fqn: p.local_shape for p in plan.parameters}
    local: dict[int, nn.Parameter] = {}
    for path, module in made.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in local:
                shape = shapes[f"{path}.{name}" if path else name]
                empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
                local[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
            module._parameters[name] = local[id(parameter)]
    return made


class _Comparison:
    """A walk of the planned graph beside the local one; `run` is its only entry."""

    def __init__(self, formulation: Formulation, lowered: Lowered, local: Graph) -> None:
        self.graph, self.lowered, self.local = formulation.graph, lowered, local
        self.made: Iterator[Node] = iter([n for n in local.nodes if not is_leaf(n)])
        self.at: dict[int, int] = {}
        self.spans: dict[int, tuple[int, int]] = {}
        for node in self.graph.nodes:
            first, _ = self.spans.get(node.call, (node.index, 0))
            self.spans[node.call] = (first, node.index)
        leaves = {(n.op, n.fqn): n.index for n in local.nodes if is_leaf(n)}
        for node in self.graph.nodes:
            if is_leaf(node) and (node.op, node.fqn) in leaves:
                self.at[node.index] = leaves[(node.op, node.fqn)]

    def run(self) -> None:
        entered: set[int] = set()
        changed: dict[tuple[int, int], int] = {}
        for node in self.graph.nodes:
            if is_leaf(node):
                continue
            if node.call >= 0 and node.call not in entered:
                entered.add(node.call)
                for operand, move in self._arguments(node.call):
                    index = self._expect_move(node, self.at[operand], move)
                    changed[(node.call, operand)] = index
            self._expect(node, {i: changed.get((node.call, i), self.at.get(i, -1)) for i in reads(node)})
            choice = self.lowered.choices[node.index]
            if choice.move is not None:
                self.at[node.index] = self._expect_move(node, self.at[node.index], choice.move)
        extra = next(self.made, None)
        if extra is not None:
            raise _mismatch(extra.module, "an operator that was not planned", extra.op, "nothing")
        got = [self.at[i] for i in self.graph.outputs]
        if got != self.local.outputs:
            raise _mismatch("model", "it returns other values than planned", self.local.outputs, got)

    def _arguments(self, call: int) -> list[tuple[int, Move]]:
        """Moves of a call's arguments, in the order they are made."""
        found: list[tuple[int, int, Move]] = []
        first, last = self.spans[call]
        for node in self.graph.nodes[first : last + 1]:
            if node.call == call and node.index in self.lowered.choices:
                for index, conversion in zip(reads(node), self.lowered.choices[node.index].operands, strict=True):
                    if conversion.move is not None and self.graph.nodes[index].op != "parameter":
                        found += [(leaf, index, conversion.move) for leaf in leaves_of(self.graph.calls[call], index)]
        return [(index, move) for _, index, move in sorted(found, key=lambda item: item[0])]

    def _next(self, node: Node, want: str) -> Node:
        found = next(self.made, None)
        if found is None:
            raise _mismatch(node.module, "the rewritten model ends early", "nothing", want)
        return found

    def _expect_move(self, node: Node, value: int, move: Move) -> int:
        found = self._next(node, f"{move.forward} at {node.op}")
        if found.op != "move":
            raise _mismatch(node.module, f"a planned move of {node.op} is missing", found.op, move.forward)
        if found.arguments[1] != markers.described(move) or found.operands != (value,):
            raise _mismatch(node.module, f"another move than planned at {node.op}", found.arguments[1], move)
        return found.index

    def _expect(self, node: Node, operands: dict[int, int]) -> None:
        choice = self.lowered.choices[node.index]
        found = self._next(node, node.op)
        replaced = self._operator(node)
        wanted = node.op if replaced is None else "operator"
        if found.op != wanted:
            raise _mismatch(node.module, "another operator than planned", found.op, wanted)
        shape = local_shapes(node, choice.made)
        got = tuple(s for s, _ in found.outputs) or (found.shape,)
        if got != shape:
            raise _mismatch(node.module, f"{node.op} has another local shape than planned", got, shape)
        if replaced is not None:
            if found.arguments[1] != markers.described(replaced):
                raise _mismatch(node.module, f"another local form of {node.op}", found.arguments[1], replaced)
            if set(found.operands) != set(operands.values()):
                raise _mismatch(node.module, f"{node.op} reads other values than planned", found.operands, operands)
        else:
            placed = {i: c.effective for i, c in zip(reads(node), choice.operands, strict=True)}
            if not self._same_arguments(node, found, operands, placed):
                raise _mismatch(
                    node.module, f"{node.op} has other arguments than planned", found.arguments, node.arguments
                )
        self.at[node.index] = found.index

    def _operator(self, node: Node) -> OperatorEdit | None:
        if node.call < 0:
            return None
        edit = self.lowered.edits.calls.get(self.graph.calls[node.call].site)
        operator = edit.operator if edit is not None else None
        if operator is None or operator.name == "rank_random":
            return None
        return operator if node.op in _REPLACED else None

    def _same_arguments(self, node: Node, found: Node, operands: dict[int, int], placed: dict[int, Stored]) -> bool:
        split = {i: p for i, p in placed.items() if isinstance(p, Shard)}
        if node.op == "slice":
            return self._same_slice(node, found, operands, split)
        ignore = node.op in _SIZES or node.op == "repeat_heads" or (node.op.startswith("split") and bool(split))
        if self.graph.nodes[node.operands[0]].outputs if node.operands else False:
            ignore = False

        def same(a: Any, b: Any) -> bool:
            if isinstance(a, Ref):
                return isinstance(b, Ref) and b.index == operands.get(a.index, -2)
            if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
                if ignore and all(isinstance(x, int) for x in (*a, *b)):
                    return len(a) == len(b)
                return len(a) == len(b) and all(map(same, a, b))
            if isinstance(a, dict) and isinstance(b, dict):
                return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
            if ignore and isinstance(a, int) and isinstance(b, int):
                return True
            return bool(a == b)

        arguments, keywords = node.arguments, node.keywords
        groups = local_groups(node, placed[node.operands[0]]) if node.op in GROUPED else None
        if groups is not None:
            arguments, keywords = with_groups(node, groups)
        return same(arguments, found.arguments) and same(keywords, found.keywords)

    def _same_slice(self, node: Node, found: Node, operands: dict[int, int], split: dict[int, Shard]) -> bool:
        """Bounds on a split dim are where its segments lie locally."""
        source = node.operands[0]
        if not found.operands or found.operands[0] != operands[source]:
            return False
        dim, start, stop, step = _slice_of(node, len(self.graph.nodes[source].shape))
        if (dim, step) != (_slice_of(found, len(node.shape))[0], _slice_of(found, len(node.shape))[3]):
            return False
        length = self.graph.nodes[source].shape[dim]
        first, last, _ = slice(start, stop).indices(length)
        _, other_start, other_stop, _ = _slice_of(found, len(node.shape))
        shard = split.get(source)
        if shard is None or shard.dim != dim:
            return slice(other_start, other_stop).indices(length)[:2] == (first, last)
        layout: Layout = shard.layout
        bounds = slice(other_start, other_stop).indices(layout.local)[:2]
        return bounds == (layout.local_offset(first), layout.local_offset(last))


def _slice_of(node: Node, rank: int) -> tuple[int, Any, Any, int]:
    values = [*node.arguments[1:], *([None] * 4)][:4]
    dim = values[0] or 0
    return (dim + rank if dim < 0 else dim), values[1], values[2], values[3] or 1


def local_shapes(node: Node, made: Stored) -> tuple[tuple[int, ...], ...]:
    """Local shape of every output under the placement made."""
    shapes: Sequence[tuple[int, ...]] = [s for s, _ in node.outputs] or [node.shape]
    placements = made if isinstance(made, tuple) else (made,)
    return tuple(_local(shape, placement) for shape, placement in zip(shapes, placements, strict=True))


def _local(shape: tuple[int, ...], placement: Placement) -> tuple[int, ...]:
    if isinstance(placement, Shard):
        return (*shape[: placement.dim], placement.layout.local, *shape[placement.dim + 1 :])
    return shape


def _mismatch(module: str, wrong: str, got: object, need: object) -> ValidationError:
    return ValidationError(
        module or "model",
        wrong,
        got=got,
        need=need,
        remedy="Please report it with the plan; run with another plan or pin the module replicated.",
    )
