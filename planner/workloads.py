"""What a plan is made for: phases, example inputs as plain data, and the lengths a schedule asks of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from colrow.cost_models.errors import UsageError

from .graph import Graph
from .pricing import Phase
from .sequence import is_elastic
from .storing import Stored
from .trace import Inputs

PHASES = ("prefill", "decode", "train")


@dataclass(frozen=True)
class Workload:
    """One kind of forward.

    Attributes:
        name: Its name: the phase, or ``phase:label`` where a phase occurs more than once.
        phase: prefill, decode or train.
        inputs: ``(path, dtype name, shape)`` of every tensor input; positional ones are named by number.
        values: Plain (non-tensor) keyword inputs, and what is kept of integer tensors (see `workload_of`).
        context: Tokens already in the cache.
        weight: Its share of the cost, where a plan is made for several.
    """

    name: str
    phase: str
    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    values: tuple[tuple[str, Any], ...] = ()
    context: int = 0
    weight: float = 1.0


@dataclass(frozen=True)
class Length:
    """What a schedule with a split sequence asks of one input's dim.

    Attributes:
        input: Path of the input.
        dim: Its dim.
        exactly: The only length it was planned for; None: any multiple of the number of ranks.
    """

    input: str
    dim: int
    exactly: int | None = None


def phase_of(name: str) -> Phase:
    """The phase in a workload's name.

    Raises:
        UsageError: There is none.
    """
    phase = name.partition(":")[0]
    if phase not in PHASES:
        raise UsageError(f"workload {name}", "unknown phase", got=phase, need="prefill, decode or train")
    return cast(Phase, phase)


def workload_of(name: str, inputs: Inputs, context: int, weight: float = 1.0) -> Workload:
    """The workload of example inputs.

    Raises:
        UsageError: Its name has no phase, or a nested input has tensors.
    """
    tensors, values = [], []
    named = dict(enumerate(inputs)) if isinstance(inputs, tuple) else dict(inputs)
    # Which of the tokens stand for an image or a sound, and of what size.
    described = any(isinstance(v, Tensor) and (v.is_floating_point() or _describes(v)) for v in named.values())
    for path, value in named.items():
        if isinstance(value, Tensor):
            tensors.append((str(path), str(value.dtype).removeprefix("torch."), tuple(value.shape)))
            values += [(str(path), kept) for kept in _kept_values(value, described)]
        elif isinstance(value, (int, float, str, bool, type(None))):
            values.append((str(path), value))
        elif any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            raise UsageError(
                f"input {path}",
                "nested tensors as one input are not supported",
                got=type(value).__name__,
                need="a tensor",
            )
    return Workload(name, phase_of(name), tuple(tensors), tuple(values), context, weight)


_LONGEST = 4  # of the last dim of an input that describes others: time, height and width of an image


def _kept_values(tensor: Tensor, described: bool) -> list[Any]:
    """What control flow may read of an input, at most one entry: a constant other than 0 as a number; beside
    inputs that it describes, an integer one as nested lists.
    """
    if tensor.is_floating_point() or tensor.is_complex() or not tensor.numel() or tensor.device.type == "meta":
        return []
    first = tensor.flatten()[0].item()
    if bool((tensor == first).all()):
        return [first] if first else []
    return [tensor.tolist()] if described else []


def _describes(tensor: Tensor) -> bool:
    """Integers, a few for each of several things."""
    return not tensor.is_floating_point() and tensor.dim() == 2 and 1 < tensor.shape[-1] <= _LONGEST


def example_of(workload: Workload) -> Inputs:
    """Inputs of a workload's names, dtypes and shapes; values that the plan does not keep are zero."""
    named: dict[str, Any] = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in workload.inputs
    }
    for name, value in workload.values:
        if name not in named:
            named[name] = value
        elif isinstance(value, list):
            named[name] = torch.tensor(value, dtype=named[name].dtype)
        else:
            named[name].fill_(value)
    if named and all(name.isdigit() for name in named):
        return tuple(named[str(i)] for i in range(len(named)))
    return named


def required_lengths(graph: Graph, stored: Sequence[Stored], workload: Workload) -> tuple[Length, ...]:
    """What the inputs must be for the sequences that ``stored`` splits to divide; empty where none is split.

    An input's dim as long as a split sequence is taken to be it, and may have any length that divides. Where a split
    sequence is as long as no input, inputs without such a dim have to be as they were planned, but for the batch.
    """
    split = {n.shape[1] for n, s in zip(graph.nodes, stored, strict=True) if is_elastic(s)}
    found = [Length(path, dim) for path, _, shape in workload.inputs for dim, n in enumerate(shape) if n in split]
    if split - {shape[one.dim] for one in found for path, _, shape in workload.inputs if path == one.input}:
        free = {one.input for one in found}
        found += [
            Length(path, dim, n)
            for path, _, shape in workload.inputs
            if path not in free
            for dim, n in enumerate(shape)
            if dim
        ]
    return tuple(found)
