"""Where edits may go: what each operator's call allows, what the user fixed, which broadcasts may be made in parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .candidates import Candidates
from .edits import CallEdit, ForwardEdits, ParameterEdit
from .expressions import is_augmented
from .graph import VIEWS, Graph, Node, Ref, numel
from .local_operators import leaves_of
from .moves import Move, move
from .padding import Padding
from .placement import PARTIAL, PARTIAL_GRAD, WHOLE, Shard
from .roles import Weight
from .sequence import is_read, sequence_splits
from .sites import Frame
from .storing import Domain, Fixed, Setting

_NO_RESULT = frozenset({"getitem", "slice_scatter"})  # not what their call returns


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        replicate: ``never`` or ``auto`` (pure time).
        pin: fnmatch pattern of a parameter or module path -> placement word.
        sequence_parallel: Split the sequence between matmuls wherever it can be (True), where it is faster
            (``auto``), or not.
        outputs: ``whole``, or ``sharded``: what the model returns may stay split.
        checkpointing: ``blocks``: in training, of every outermost block its inputs alone are kept, and its forward runs
            again when its backward pass comes.
        memory_cap: Bytes per rank for what the memory factors count.
        editable: Reason why a call site cannot be edited; None if it can.
        frozen: Sites (module, frames) that must not be edited.
        fixed_parameters: The only layouts allowed, by parameter.
        fixed_edits: The only moves allowed; None where all are open.
    """

    replicate: str = "never"
    pin: Mapping[str, str] = field(default_factory=dict)
    sequence_parallel: bool | Literal["auto"] = False
    outputs: Literal["whole", "sharded"] = "whole"
    checkpointing: Literal["none", "blocks"] = "none"
    memory_cap: int | None = None
    editable: Callable[[tuple[Frame, ...]], str | None] = lambda frames: None
    frozen: frozenset[object] = frozenset()
    fixed_parameters: Mapping[str, ParameterEdit] | None = None
    fixed_edits: ForwardEdits | None = None


class Settings:
    """The setting of every operator of one graph."""

    def __init__(
        self,
        graph: Graph,
        options: Options,
        ranks: int,
        found: Candidates,
        same: dict[int, int],
        weights: dict[int, Weight],
        gather_ps: int,
    ) -> None:
        self.graph, self.options, self.ranks, self.found = graph, options, ranks, found
        self.same, self.weights, self.gather_ps = same, weights, gather_ps
        self.sequences = sequence_splits(graph, ranks) if options.sequence_parallel and ranks > 1 else {}
        insists = bool(self.sequences) and options.sequence_parallel is True
        self.least_avoided = min(map(numel, self.sequences)) if insists else None
        self.users, self.block_of = graph.users(), graph.block_of()
        self.padding = Padding(graph)
        self.call_nodes: dict[int, list[int]] = {}
        for node in graph.nodes:
            if node.call >= 0:
                self.call_nodes.setdefault(node.call, []).append(node.index)

    def of(self, node: Node, operands: tuple[int, ...], domains: Sequence[Domain]) -> Setting:
        """What the graph and the user allow at ``node``, whose operands are stored in one of ``domains``."""
        movable, editable = False, False
        if node.call >= 0:
            call = self.graph.calls[node.call]
            site = (call.site.module, call.site.frames)
            editable = (
                bool(call.site.frames)
                and site not in self.options.frozen
                and self.options.editable(call.site.frames) is None
            )
            whole_result = not node.outputs and node.op not in _NO_RESULT and node.index not in self.graph.whole
            if editable and node.op.endswith("_") and call.function == node.op and not is_augmented(call.site.frames):
                whole_result = False  # x.add_(y): later readers read x, not what the call returned
            movable = editable and whole_result and node.index == self.call_nodes[node.call][-1]
        if self.ranks == 1:
            return Setting(False, (False,) * len(operands), editable)
        convertible = tuple(self._convertible(node, i, editable) for i in operands)
        never = self.options.replicate == "never"
        gather = self.gather_ps if never and self.block_of(node.module) else 0
        fixed = self._fixed(node, operands, movable, editable)
        sequence = self.sequences.get(node.shape) if movable and node.differentiable else None
        sequence = None if is_read(node, sequence) else sequence
        return Setting(
            movable,
            convertible,
            editable,
            sequence,
            self.gather_ps // 4 if movable and self._avoids_all_reduce(node, sequence) else 0,
            gather,
            self.gather_ps // 2 if never else 0,
            self._births(node, editable),
            fixed,
            self.padding.fragile(node) if any(map(_may_be_padded, domains)) else frozenset(),
            any(is_written(self.graph.nodes[reader], node.index) for reader in self.users[node.index]),
        )

    def _avoids_all_reduce(self, node: Node, sequence: Shard | None) -> bool:
        """Whether a reduce_scatter is asked for instead: of a sequence, and in blocks of all that is as large."""
        if self.least_avoided is None:
            return False
        return sequence is not None or (bool(self.block_of(node.module)) and numel(node.shape) >= self.least_avoided)

    def _births(self, node: Node, editable: bool) -> tuple[Shard, ...]:
        """Broadcast dims may be made in parts."""
        if node.op == "repeat_heads" and editable:
            inner = self.graph.calls[node.inner_call].site.frames if node.inner_call >= 0 else ()
            fine = inner and (self.options.fixed_edits is not None or self.options.editable(inner) is None)
            return tuple(s for s in self.found.of(node) if s.dim == node.arguments[1]) if fine else ()
        if node.op != "expand" or not editable:
            return ()
        shape = self.graph.nodes[node.operands[0]].shape
        offset = len(node.shape) - len(shape)
        born = [d for d, n in enumerate(node.shape) if n > 1 and (d < offset or shape[d - offset] == 1)]
        return tuple(s for s in self.found.of(node) if s.dim in born)

    def _fixed(self, node: Node, operands: tuple[int, ...], movable: bool, editable: bool) -> Fixed | None:
        """The moves a given plan makes at this operator."""
        fixed = self.options.fixed_edits
        if fixed is None:
            return None
        call = self.graph.calls[node.call] if editable else None
        edit = fixed.calls.get(call.site, CallEdit()) if call is not None else CallEdit()
        moves: list[Move | None] = []
        for index in operands:
            value = self.graph.nodes[index]
            if value.op == "parameter":
                accepts = value.fqn in fixed.partial or not value.differentiable
                stored = PARTIAL_GRAD if accepts else WHOLE
                moves.append(move(stored, PARTIAL) if value.fqn in fixed.lifted else None)
            else:
                leaves = leaves_of(call, index) if call is not None else []
                moves.append(next((step for leaf, step in edit.arguments if leaf in leaves), None))
        return tuple(moves), edit.result if movable else None

    def _convertible(self, node: Node, operand: int, editable: bool) -> bool:
        value = self.graph.nodes[operand]
        if value.op == "parameter":
            return len(self.users[operand]) == 1 and self.same[operand] == operand and operand not in self.weights
        if not editable or node.op in VIEWS or is_written(node, operand):
            return False
        call = self.graph.calls[node.call]
        inside = [n for n in self.call_nodes[node.call] if operand in self.graph.nodes[n].operands]
        return inside == [node.index] and Ref(operand) in call.leaves


def _may_be_padded(domain: Domain) -> bool:
    """Whether a value's shard may be padded as it is stored (a cut that pads is no part of this)."""
    parts = (part for stored in domain for part in (stored if isinstance(stored, tuple) else (stored,)))
    return any(isinstance(part, Shard) and part.layout.is_padded for part in parts)


def is_written(reader: Node, index: int) -> bool:
    """Whether an operator changes the value of node ``index`` in place."""
    return reader.op.endswith("_") and not reader.op.endswith("__") and reader.operands[:1] == (index,)
