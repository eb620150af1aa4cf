"""Tracing with values: a rescue for models whose control flow reads integers that do not depend on any weight.

Under fake tensors nothing has a value, so ``grid_thw.tolist()`` or ``if mask.all()`` cannot be traced. Here integer
inputs (sizes of images, lengths, token ids) keep their values, and what is computed from nothing else, positions and
masks among it, is computed for real. It enters the graph as constants, so what was traced holds for these values only:
the plan says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode

_FACTORIES = frozenset({torch.arange, torch.zeros, torch.ones, torch.full, torch.tensor, torch.eye, torch.as_tensor})
# What reads only the shape of its second operand.
_SHAPED_AS: dict[Any, Any] = {
    Tensor.expand_as: Tensor.expand,
    Tensor.view_as: Tensor.view,
    Tensor.reshape_as: Tensor.reshape,
}
_CHECKS = ("_check_tensor_all_with", "_check_tensor_all")


def without_known(inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """Keyword ``inputs`` without their integer and boolean tensors, and those alone."""
    if not isinstance(inputs, Mapping):
        return inputs, {}
    known = {
        name: value
        for name, value in inputs.items()
        if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
    }
    return {name: value for name, value in inputs.items() if name not in known}, known


class KnownValues(TorchFunctionMode):
    """Computes for real what depends on real tensors only, and integers and booleans that depend on none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs ``func`` outside of the trace where all it reads is known."""
        kwargs = kwargs or {}
        read = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in _SHAPED_AS and not isinstance(args[0], FakeTensor):
            args, func = (args[0], args[1].shape), _SHAPED_AS[func]
            read = [args[0]]
        if read and not any(isinstance(tensor, FakeTensor) for tensor in read):
            return _outside(func, args, kwargs)
        if not read and func in _FACTORIES:
            made = _outside(func, args, kwargs)
            if not made.is_floating_point() and not made.is_complex():
                return made
        if func is Tensor.__getitem__:
            args = (args[0], _as_positions(args[1]))
        return func(*args, **kwargs)


def _as_positions(index: Any) -> Any:
    """An index with known masks as the positions they select: how many is known then, too."""
    parts = index if isinstance(index, tuple) else (index,)
    found: list[Any] = []
    for part in parts:
        known = isinstance(part, Tensor) and part.dtype is torch.bool and not isinstance(part, FakeTensor)
        found += _outside(torch.Tensor.nonzero, (part,), {"as_tuple": True}) if known else [part]
    return (
        index if len(found) == len(parts) and all(a is b for a, b in zip(found, parts, strict=True)) else tuple(found)
    )


def _outside(func: Any, args: Any, kwargs: Any) -> Any:
    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        return func(*args, **kwargs)


@contextmanager
def unchecked_values() -> Iterator[None]:
    """What only checks values passes: a trace has none to check, or those of an example."""
    before = {name: getattr(torch, name) for name in _CHECKS}
    validated = Distribution._validate_args
    try:
        for name in _CHECKS:
            setattr(torch, name, _passes)
        Distribution.set_default_validate_args(False)
        yield
    finally:
        for name, check in before.items():
            setattr(torch, name, check)
        Distribution.set_default_validate_args(validated)


def _passes(*args: Any, **kwargs: Any) -> None:
    return None
