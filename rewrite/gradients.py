"""From a local gradient to the ``.grad`` of a DTensor parameter, without the detour that costs more than a small
matmul's backward.

The autograd engine accumulates into a DTensor through Python dispatch: 24 us per parameter and step (2 CPU cores,
torch 2.13, 2026-11). Where nothing could tell the difference, ``deliver`` writes ``.grad`` itself, in 3 us;
elsewhere (hooks on the parameter, ``torch.autograd.grad``) it hands the engine a DTensor as usual.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes


def deliver(found: list[Any], parameters: Sequence[Any], nodes: Sequence[Any]) -> None:
    """Called in a backward: put local gradients into the parameters' ``.grad``, or leave them for the engine to do so.

    One loop without calls of ours: this code runs for every parameter in every step.

    Args:
        found: A local gradient per parameter, or None; ``deliver`` counts who else owns it. Afterwards: None where it
            is delivered, elsewhere a DTensor placed as the parameter is.
        parameters: DTensors.
        nodes: What the engine would call next with each: a parameter's gradient accumulator, if it is a leaf.
    """
    alone, accumulates = sole_owners(), torch._C._will_engine_execute_node
    for i, parameter in enumerate(parameters):
        if found[i] is None:
            continue
        spec, old = parameter._spec, None
        if not found[i].is_contiguous():
            found[i] = found[i].contiguous()
        hooked = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
        try:
            written = not hooked and parameter.is_leaf and accumulates(nodes[i])
        except RuntimeError:  # what torch raises for a leaf that ``torch.autograd.grad`` captures
            written = False
        if written:
            old = parameter.grad
            if type(old) is DTensor and old._spec.placements == spec.placements and not old.requires_grad:
                old._local_tensor.add_(found[i])
                found[i] = None
                continue
        if sys.getrefcount(found[i]) + found[i]._use_count() > alone:  # as ``owners_of``, without the call
            found[i] = found[i].clone()  # an addition hands one gradient to both of its operands
        wrapped = DTensor.__new__(DTensor, found[i], spec, requires_grad=False)  # __init__ does nothing and costs 3 us
        if written and old is None:
            parameter.grad, found[i] = wrapped, None
        else:
            found[i] = wrapped  # the engine cannot see through a DTensor who else holds its local tensor


def owners_of(found: list[Any], i: int) -> int:
    """References to ``found[i]``, in Python and in C++; comparable between gradients of Python backwards."""
    return sys.getrefcount(found[i]) + int(found[i]._use_count())


@lru_cache(maxsize=1)
def sole_owners() -> int:
    """What ``owners_of`` gives for a gradient that nobody else holds: counted in a small backward, as it depends on
    versions.

    Returns:
        The count; or -1, meaning that no gradient counts as unshared, should shared ones not stand out.
    """
    counts: list[int] = []
    held: list[Any] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            found = list(gradients)
            counts.append(owners_of(found, 0))
            held.append(found[0])
            return found[0]

    def probe(x: Tensor) -> Tensor:
        y: Tensor = Probe.apply(x)  # type: ignore[no-untyped-call]
        return y

    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(2, requires_grad=True)
        torch.autograd.backward((probe(x) * 2).sum())
        torch.autograd.backward(((probe(x) + probe(x)) * 2).sum())  # an addition hands one tensor to both
    alone, first, second = counts
    return alone if min(first, second) > alone else -1
