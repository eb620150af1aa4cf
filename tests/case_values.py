"""What the cases of operator rules are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_random = torch.Generator().manual_seed(0)


def r(*shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=_random, dtype=torch.float64)


def p(*shape: int) -> Tensor:
    """Numbers between a half and one and a half: fit for log, sqrt and quotients."""
    return torch.rand(shape, generator=_random, dtype=torch.float64) + 0.5


def i(high: int, *shape: int) -> Tensor:
    """Integers below ``high``."""
    return torch.randint(0, high, shape, generator=_random)


def b(*shape: int) -> Tensor:
    """Truth values."""
    return torch.rand(shape, generator=_random) > 0.5


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        arguments: In ATen order; tensors are values.
        keywords: Likewise.
        function: What to run; None: the ATen operator of the rule's name.
        zero_pads: Positions of the tensors whose padding holds zeros, as a parameter's does.
        values: Whether what it computes can be compared; else shapes only.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    function: Callable[..., Any] | None = None
    zero_pads: tuple[int, ...] = ()
    values: bool = True


def case(*arguments: Any, **keywords: Any) -> Case:
    """A case of an ATen operator."""
    return Case(arguments, keywords)


def weighted(*arguments: Any, **keywords: Any) -> Case:
    """A product whose second tensor is a parameter: its padding is zero."""
    return Case(arguments, keywords, zero_pads=(1,))
