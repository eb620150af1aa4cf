"""What is written through a view is read through the base, and through other views: gradients go that way too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from colrow.planner.planning import plan
from colrow.planner.trace import trace
from colrow.rewrite.verification import verify


def scanned(decay: Tensor, x: Tensor) -> Tensor:
    """A scan of two steps, as parallel scans are written: a view of what is returned is added to."""
    made = x.clone()
    pairs = made.view(*x.shape[:1], -1, 2, x.shape[-1])
    pairs[:, :, 1].add_(decay * pairs[:, :, 0].clone())
    return made


def filled(decay: Tensor, x: Tensor) -> Tensor:
    """A buffer filled slice by slice, read through a view made before."""
    made = torch.zeros_like(x)
    view = made.transpose(0, 1)
    made[:, :2] = x[:, :2] * decay
    made[:, 2:].copy_(x[:, 2:].tanh())
    return view.transpose(0, 1)


def halved(decay: Tensor, x: Tensor) -> Tensor:
    """The tensor itself changed; a view made before shows it."""
    made = x * 2
    half = made[:, ::2]
    made.mul_(decay)
    return half


def along_the_diagonal(decay: Tensor, x: Tensor) -> Tensor:
    """Views of another kind than slices: a diagonal, and windows."""
    made = x * 2
    made.diagonal(dim1=1, dim2=2).mul_(decay[:4])
    made.unfold(1, 2, 2)[..., 0].mul_(decay)
    return made


def real_parts(decay: Tensor, x: Tensor) -> Tensor:
    """A view as another dtype, and half of it."""
    made = x * 2
    pairs = torch.view_as_complex(made.view(*x.shape[:2], -1, 2))
    pairs.real.mul_(decay[::2])
    return made


class Scan(nn.Module):
    """Weights before and after; the decay is read by the in-place operator alone."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.into, self.out = nn.Linear(8, 32), nn.Linear(32, 8)
        self.decay = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(torch.exp(-self.decay.square()), self.into(x)))


@pytest.mark.parametrize("function", [scanned, filled, halved, along_the_diagonal, real_parts])
def test_gradients_of_what_is_written_through_views(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    inputs = (torch.zeros(2, 4, 8, dtype=torch.float64),)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Scan(function).double()

    graph = trace(build(), inputs)
    decay = next(node for node in graph.nodes if node.fqn == "decay")
    assert decay.differentiable
    report = verify(build, inputs, plan(build(), inputs, tp=2, phase="train"))
    assert report.ok(), report.explain()
    assert report.gradient_errors["decay"] <= 1e-9
