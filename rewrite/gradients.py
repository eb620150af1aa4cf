"""From a local gradient to the ``.grad`` of a DTensor parameter, without the detour that costs more than a small
matmul's backward.

The autograd engine accumulates into a DTensor through Python dispatch: 24 us per parameter and step (2 CPU cores,
torch 2.13, 2026-11). Where nothing could tell the difference, ``delivered`` writes ``.grad`` itself, in 3 us;
elsewhere (hooks on the parameter, ``torch.autograd.grad``) it hands the engine a DTensor as usual.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes


def delivered(found: list[Any], i: int, parameter: Any, node: Any) -> DTensor | None:
    """Called in a backward: put the local gradient ``found[i]`` into ``parameter.grad``, or return it for the engine
    to do so.

    Args:
        found: Local gradients; ``delivered`` counts who else owns the i-th.
        i: Which one.
        parameter: The DTensor parameter.
        node: What the engine would call next with it: the parameter's gradient accumulator, if it is a leaf.

    Returns:
        The gradient as a DTensor placed as the parameter is, or None when it is delivered.
    """
    spec = parameter._spec
    if not found[i].is_contiguous():
        found[i] = found[i].contiguous()
    hooked = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    if parameter.is_leaf and not hooked and _accumulates(node):
        old = parameter.grad
        if old is None:
            parameter.grad = wrapped(own(found, i), spec)
            return None
        if type(old) is DTensor and old._spec.placements == spec.placements and not old.requires_grad:
            old._local_tensor.add_(found[i])
            return None
    return wrapped(own(found, i), spec)  # the engine cannot see through a DTensor who else holds its local tensor


def own(found: list[Any], i: int) -> Tensor:
    """``found[i]``, or a copy if somebody else holds it (an addition hands one gradient to both of its operands)."""
    shared = owners_of(found, i) > sole_owners()
    gradient: Tensor = found[i].clone() if shared else found[i]
    return gradient


def wrapped(local: Tensor, spec: Any) -> DTensor:
    """A DTensor of ``local``; without ``DTensor.__init__``, which does nothing and costs 3 us."""
    return DTensor.__new__(DTensor, local, spec, requires_grad=False)


def _accumulates(node: Any) -> bool:
    """The running backward will accumulate at ``node`` (``torch.autograd.grad`` captures instead)."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # what torch raises for a captured leaf
        return False


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
