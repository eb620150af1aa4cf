"""Collectives as they are executed: recorded at PyTorch's dispatcher, by code that knows nothing of colrow.

What a plan promises and what runs are compared by two parties that share no code; this is the second one. Inside
``torch.compile`` there is no dispatcher to listen at: count graph nodes there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Direction = Literal["forward", "backward"]

# Which buffer's bytes nccl-tests reports for a kind: what goes in, what comes out (the two are equal where it does
# not matter).
_KINDS: dict[str, tuple[str, Literal["in", "out"]]] = {
    "all_reduce": ("all_reduce", "in"),
    "all_reduce_": ("all_reduce", "in"),
    "all_reduce_coalesced": ("all_reduce", "in"),
    "all_reduce_coalesced_": ("all_reduce", "in"),
    "allreduce_": ("all_reduce", "in"),
    "allreduce_coalesced_": ("all_reduce", "in"),
    "all_gather_into_tensor": ("all_gather", "out"),
    "all_gather_into_tensor_out": ("all_gather", "out"),
    "all_gather_into_tensor_coalesced": ("all_gather", "out"),
    "allgather_": ("all_gather", "out"),
    "_allgather_base_": ("all_gather", "out"),
    "allgather_coalesced_": ("all_gather", "out"),
    "allgather_into_tensor_coalesced_": ("all_gather", "out"),
    "reduce_scatter_tensor": ("reduce_scatter", "in"),
    "reduce_scatter_tensor_out": ("reduce_scatter", "in"),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", "in"),
    "reduce_scatter_": ("reduce_scatter", "in"),
    "_reduce_scatter_base_": ("reduce_scatter", "in"),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "in"),
    "all_to_all_single": ("all_to_all", "in"),
    "alltoall_": ("all_to_all", "in"),
    "alltoall_base_": ("all_to_all", "in"),
    "broadcast": ("broadcast", "in"),
    "broadcast_": ("broadcast", "in"),
    "reduce_": ("reduce", "in"),
    "gather_": ("gather", "out"),
    "scatter_": ("scatter", "in"),
    "send": ("send", "in"),
    "recv_": ("recv", "in"),
    "recv_any_source_": ("recv", "in"),
    "isend": ("send", "in"),
    "irecv": ("recv", "in"),
}
# Arguments of c10d's in-place operators that hold what goes in and what comes out, where the names differ.
_INPUTS = ("input", "inputs", "input_tensor", "input_tensors", "tensor", "tensors", "self")
_OUTPUTS = ("output", "outputs", "output_tensor", "output_tensors", "out")
_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "_dtensor")


@dataclass(frozen=True)
class ExecutedCollective:
    """One collective of one rank.

    Attributes:
        kind: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, or the plain name of a rarer one.
        nbytes: Size of the whole buffer as nccl-tests counts it: an all_gather's output, a reduce_scatter's input,
            else the tensor.
        direction: backward while gradients are computed (collectives of recomputed forwards too), else forward.
    """

    kind: str
    nbytes: int
    direction: Direction


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every collective operator that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[ExecutedCollective] = []
        self.direction: Direction = "forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # let it become the operators on local tensors that it stands for
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace in _NAMESPACES:
            name = func._schema.name.rpartition("::")[2]
            if name in _KINDS:
                kind, side = _KINDS[name]
                given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
                nbytes = _nbytes(given, _INPUTS if side == "in" else _OUTPUTS)
                if side == "out" and not nbytes:  # a functional operator: the output is what it returns
                    nbytes = _nbytes({"result": result}, ("result",))
                self.found.append(ExecutedCollective(kind, nbytes, self.direction))
        return result


def _nbytes(values: Mapping[str, Any], names: tuple[str, ...]) -> int:
    tensors = [t for name in names if name in values for t in tree_leaves(values[name]) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def recorded_collectives() -> Iterator[_Recorder]:
    """Record the collectives of the ``with`` body into ``.found``; set ``.direction`` before a backward."""
    with _Recorder() as recorder:
        yield recorder


def count_collectives(
    model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...], backward: bool = False
) -> list[ExecutedCollective]:
    """Run ``model`` once and list the collectives this rank executed, in order.

    Args:
        model: Any module; every rank of its group makes this call.
        inputs: Keyword arguments, or a tuple of positional ones.
        backward: Also run the backward pass: of the dot product of all floating-point outputs with fixed cotangents.
            Gradients
            accumulate in ``.grad`` as ever.

    Returns:
        One entry per executed collective.
    """
    positional, named = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    with torch.set_grad_enabled(backward), recorded_collectives() as recorder:
        outputs = model(*positional, **named)
        if backward:
            loss = fixed_loss(outputs)
            recorder.direction = "backward"
            loss.backward()  # type: ignore[no-untyped-call]
    return recorder.found


def fixed_loss(outputs: Any) -> Tensor:
    """The dot product of every differentiable output with cotangents that depend on its shape and place only.

    Raises:
        ValueError: No output depends on a parameter.
    """
    terms = []
    for value in _tensors(outputs):
        if value.is_floating_point() and value.requires_grad:
            steps = torch.arange(1, value.numel() + 1, dtype=torch.float64, device=value.device)
            cotangent = (steps * 0.7548776662466927 % 1 - 0.5).view(value.shape)  # a low-discrepancy sequence, centred
            terms.append((value.double() * cotangent).sum())
    if not terms:
        raise ValueError("no floating-point output requires a gradient")
    return torch.stack(terms).sum()


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """Tensors in nested containers, dataclass-like mappings included (Hugging Face outputs are dicts)."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, list | tuple):
        for value in outputs:
            yield from _tensors(value)
    elif is_dataclass(outputs):
        for field in fields(outputs):
            yield from _tensors(getattr(outputs, field.name))
