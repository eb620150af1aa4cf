"""The traced graph: values, the operators that make them, and the call sites they come from.

A `Graph` is plain data. Nodes are in execution order and refer to earlier nodes by index. Repeated blocks are traced
once and appear once per
repetition; `Graph.blocks` says which node ranges are copies of which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .blocks import OuterBlocks
from .measured import Reading
from .sites import Site

LEAVES = frozenset({"parameter", "buffer", "input", "constant", "fused"})
VIEWS = frozenset({
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "t", "mT", "unsqueeze",
    "squeeze", "expand", "slice", "select",
    "split", "split_with_sizes", "chunk", "unbind", "getitem", "alias", "detach", "narrow",
    "repeat_heads", "movedim", "swapaxes", "expand_as", "view_as",
})  # fmt: skip


@dataclass(frozen=True)
class Ref:
    """A reference to the value of node ``index``."""

    index: int


@dataclass(frozen=True)
class Call:
    """One recorded torch API call: where it stands in the source and which Python function it calls.

    Attributes:
        site: Module path and chain of frames.
        function: The API function's name.
        leaves: Its arguments flattened, a receiver first; tensors as `Ref` (None where the trace did not see them
            made).
    """

    site: Site
    function: str
    leaves: tuple[Any, ...]


@dataclass
class Node:
    """One value.

    Attributes:
        index: Position in ``Graph.nodes``.
        op: Operator name without namespace and overload (``linear``, ``add``), or one of `LEAVES`, or ``getitem`` of
            a tuple.
        arguments: Arguments in ATen order, values as `Ref`.
        keywords: Keyword arguments.
        shape: Global shape; of the first output where there are several.
        dtype: Likewise.
        outputs: Shape and dtype of every output of an operator that returns a tuple; else empty.
        call: The call that made it (index into ``Graph.calls``); -1 for leaves.
        fqn: Path of a leaf.
        module: Path of the innermost module whose forward made it.
        differentiable: A gradient may flow into it.
        overload: Overload name.
        template: The node it is a copy of, in the first of several equal blocks; its own index where it was traced.
        inner_call: A second call of an operator that several calls make up.
        measured: Dims whose length the model's code reads from this value, and those it needs the whole length of.
        recomputed: It runs again in the backward pass (`recomputation`).
        held: How many operators later the model's code still holds the value, read or not: a local of a function.
        operands: Indices of the values it reads, in argument order, repeats kept.
    """

    index: int
    op: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()
    call: int = -1
    fqn: str = ""
    module: str = ""
    differentiable: bool = False
    overload: str = ""
    template: int = -1
    inner_call: int = -1
    measured: frozenset[Reading] = frozenset()
    held: int = 0
    recomputed: bool = False
    operands: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.operands = tuple(references((self.arguments, self.keywords)))
        if self.template < 0:
            self.template = self.index

    def copied(
        self,
        index: int,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        operands: tuple[int, ...],
        calls: tuple[int, int],
        module: str,
    ) -> Node:
        """This operator in another copy of its block, with its own ``call`` and ``inner_call``: all else is equal, so
        that nothing is derived again."""
        copy = object.__new__(Node)
        copy.__dict__.update(
            self.__dict__,
            index=index,
            arguments=arguments,
            keywords=keywords,
            operands=operands,
            call=calls[0],
            inner_call=calls[1],
            module=module,
        )
        return copy

    @property
    def nbytes(self) -> int:
        """Bytes of the whole value (all outputs)."""
        shapes = self.outputs or ((self.shape, self.dtype),)
        return sum(numel(shape) * dtype.itemsize for shape, dtype in shapes)


@dataclass(frozen=True)
class Block:
    """A direct child of a ModuleList or Sequential with two or more modules.

    Attributes:
        fqn: Its path.
        nodes: Its node range ``[start, stop)``.
        template: Index into ``Graph.blocks`` of the block it is a copy of (its own where it was traced itself).
    """

    fqn: str
    nodes: tuple[int, int]
    template: int


@dataclass
class Graph:
    """A traced model.

    Attributes:
        nodes: In execution order.
        calls: Recorded API calls.
        outputs: The model's output values.
        output_paths: Where they are in what the model returns, keys and positions joined by dots.
        parameters: All parameter names, in the model's order.
        ties: Alias fqn -> the fqn whose parameter object it shares.
        blocks: In execution order.
        checkpointed: Node ranges of the blocks whose inputs alone are kept for their backward passes (`recomputation`).
        whole: Nodes that share memory with a tensor changed in place; they stay replicated and unmoved.
        findings: What the trace assumed or could not see.
        assumptions: Facts of the trace a plan must record (dtype, mode, versions, implementations).
    """

    nodes: list[Node] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    output_paths: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    ties: dict[str, str] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    checkpointed: tuple[tuple[int, int], ...] = ()
    whole: set[int] = field(default_factory=set)
    findings: list[str] = field(default_factory=list)
    assumptions: dict[str, str] = field(default_factory=dict)
    _readers: list[list[int]] = field(default_factory=list, repr=False, compare=False)
    _sites: tuple[int, dict[Site, list[int]]] = field(default=(-1, {}), repr=False, compare=False)
    _outer: tuple[int, OuterBlocks] = field(default=(-1, OuterBlocks(())), repr=False, compare=False)

    def users(self) -> list[list[int]]:
        """For each node, the nodes that read it; remembered while no node is added."""
        if len(self._readers) != len(self.nodes):
            readers: list[list[int]] = [[] for _ in self.nodes]
            for node in self.nodes:
                for operand in dict.fromkeys(node.operands):
                    readers[operand].append(node.index)
            self._readers = readers
        return self._readers

    def outer_blocks(self) -> OuterBlocks:
        """Paths -> their outermost blocks; remembered while no block is added."""
        if self._outer[0] != len(self.blocks):
            self._outer = len(self.blocks), OuterBlocks(block.fqn for block in self.blocks)
        return self._outer[1]

    def block_of(self) -> Callable[[str], str]:
        """Finds the outermost block that contains a module's or parameter's path; "" if none does."""
        return self.outer_blocks().__getitem__

    def calls_of(self) -> dict[Site, list[int]]:
        """Site -> its calls; remembered while no call is added."""
        if self._sites[0] != len(self.calls):
            found: dict[Site, list[int]] = {}
            for index, call in enumerate(self.calls):
                found.setdefault(call.site, []).append(index)
            self._sites = len(self.calls), found
        return self._sites[1]

    def forget_users(self) -> None:
        """After nodes were changed in place."""
        self._readers = []


def references(tree: Any) -> Iterator[int]:
    """Indices of all `Ref` in nested tuples, lists and dicts, in order."""
    if isinstance(tree, Ref):
        yield tree.index
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from references(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from references(item)
    elif isinstance(tree, slice):
        yield from references((tree.start, tree.stop, tree.step))


def mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists and dicts with every leaf changed."""
    if isinstance(tree, tuple):
        return tuple([mapped(item, change) for item in tree])
    if isinstance(tree, list):
        return [mapped(item, change) for item in tree]
    if isinstance(tree, dict):
        return {key: mapped(value, change) for key, value in tree.items()}
    return change(tree)


def numel(shape: tuple[int, ...]) -> int:
    """Number of elements."""
    count = 1
    for length in shape:
        count *= length
    return count
