"""What padding holds after a chain of operators, and which operators refuse it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colrow.planner.padding import HAZARDS, Padding
from colrow.planner.trace import trace

WIDTH = 12


class Model(nn.Module):
    """One function of a column product ``[2, 3, 12]`` and of a buffer."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.up = nn.Linear(8, WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.up(x), self.scale)


# Whether the hazard in it may meet zeros: padding of a linear layer with a bias is 0.
CHAINS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "x / (x² + 1)": (lambda x, c: x / (x.square() + 1), False),
    "x / x": (lambda x, c: x / x, True),
    "x / exp(x)": (lambda x, c: x / x.exp(), False),
    "x / 3": (lambda x, c: x / 3.0, False),
    "x / (exp(c) + 1)": (lambda x, c: x / (c.exp() + 1), False),
    "x / sin(x)": (lambda x, c: x / x.sin(), True),
    "x / (elu(x) + 1)": (lambda x, c: x / (F.elu(x) + 1), False),
    "x / (relu(x) + eps)": (lambda x, c: x / (x.relu() + 1e-6), False),
    "x / softplus(x)": (lambda x, c: x / F.softplus(x), False),
    "x / max(|x|, eps)": (lambda x, c: x / x.abs().clamp_min(1e-3), False),
    "x / max(|x|, -1)": (lambda x, c: x / x.abs().clamp_min(-1.0), True),
    "x / sigmoid(x * c)": (lambda x, c: x / (x * c).sigmoid(), False),
    "x / (x + c)": (lambda x, c: x / (x + c), True),
    "log(x)": (lambda x, c: x.log(), True),
    "log(sigmoid(x))": (lambda x, c: x.sigmoid().log(), False),
    "log1p(|x|)": (lambda x, c: x.abs().log1p(), False),
    "sqrt(x²)": (lambda x, c: x.square().sqrt(), True),
    "sqrt(x² + eps)": (lambda x, c: (x * x + 1e-6).sqrt(), False),
    "rsqrt(mean over heads' dims of x² + eps)": (
        lambda x, c: x.view(2, 3, 6, 2).pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt(), False
    ),
    "x over its heads' norms": (lambda x, c: x.view(2, 3, 6, 2) / x.view(2, 3, 6, 2).norm(dim=-1, keepdim=True), True),
    "x over its heads' sums of exp": (
        lambda x, c: x.view(2, 3, 6, 2).exp() / x.view(2, 3, 6, 2).exp().sum(-1, keepdim=True), False
    ),
    "1 / x": (lambda x, c: x.reciprocal(), True),
    "x ** -1": (lambda x, c: x ** -1, True),
    "x ** 0.5": (lambda x, c: x.abs() ** 0.5, True),
    "x ** 1.5": (lambda x, c: x.abs() ** 1.5, False),
    "(|x| + 1) ** x": (lambda x, c: (x.abs() + 1).pow(x), False),
    "|x| ** x": (lambda x, c: x.abs().pow(x), True),
    "hypot(x, x)": (lambda x, c: torch.hypot(x, x), True),
    "hypot(x + 3, x)": (lambda x, c: torch.hypot(x + 3, x), False),
    "xlogy(x, x)": (lambda x, c: torch.xlogy(x, x), True),
}  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS)
def test_what_may_not_run_on_padding(chain: str) -> None:
    function, breaks = CHAINS[chain]
    graph = trace(Model(function), {"x": torch.randn(2, 3, 8)})
    padding = Padding(graph)
    last = [node for node in graph.nodes if node.op in HAZARDS][-1]
    dim = min(2, len(last.shape) - 1)  # the heads' dim, or the last
    assert (dim in padding.fragile(last)) == breaks


@pytest.mark.parametrize("chain", [name for name, (_, breaks) in CHAINS.items() if not breaks])
def test_what_may_is_finite_on_zeros(chain: str) -> None:
    """The intervals are right at least where padding is zeros: values and gradients."""
    function, _ = CHAINS[chain]
    x = torch.zeros(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    made = function(x, torch.ones(WIDTH, dtype=torch.float64))
    made.backward(torch.zeros_like(made))
    assert made.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


def test_what_may_not_is_not_finite_on_zeros() -> None:
    """Most refusals are needed: of values not known to be other than zero, some are for safety."""
    needed = 0
    for function, breaks in CHAINS.values():
        x = torch.zeros(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
        made = function(x, torch.ones(WIDTH, dtype=torch.float64))
        made.backward(torch.zeros_like(made))
        needed += breaks and not (made.isfinite().all() and x.grad.isfinite().all())  # type: ignore[union-attr]
    assert needed >= sum(breaks for _, breaks in CHAINS.values()) - 3
