"""Activation checkpointing of a plan with several schedules: a block is computed again as its forward was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from colrow.cost_models.errors import UsageError
from colrow.planner import plan
from colrow.planner.random_weights import randomize
from colrow.rewrite import parallelize
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.storage import as_dense, specs_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Stack(nn.Module):
    """Its forward checkpoints the blocks, hooks included, once ``reentrant`` is set."""

    reentrant: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(8, 8), nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


torch.manual_seed(0)
DENSE = randomize(Stack().double())
EVEN, ODD = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
PLAN = plan(copy.deepcopy(DENSE), (EVEN,), tp=2, phase="train", sequence_parallel=True)


def gradients(model: nn.Module, together: bool) -> dict[str, Tensor]:
    """Of a sequence that is split and of one that does not divide, in one backward or in two."""
    losses = [model(x).square().sum() for x in (EVEN, ODD)]
    for loss in [sum(losses)] if together else losses:
        loss.backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("reentrant", "together"), [(True, False), (False, False), (None, True)])
def test_gradients(reentrant: bool | None, together: bool) -> None:
    expected = gradients(copy.deepcopy(DENSE), together)
    assert len(PLAN.schedules) == 2

    def run() -> None:
        model = parallelize(copy.deepcopy(DENSE), PLAN)
        model.reentrant = reentrant  # type: ignore[assignment]
        specs, found = specs_of(model), gradients(model, together)
        for name, want in expected.items():
            got = as_dense(found[name], specs[name]).full_tensor()  # type: ignore[arg-type]
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=name)

    run_ranks(run, 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_schedules_in_one_backward_are_refused(reentrant: bool) -> None:
    def run() -> None:
        model = parallelize(copy.deepcopy(DENSE), PLAN)
        model.reentrant = reentrant  # type: ignore[assignment]
        with pytest.raises(UsageError, match="which schedule of the plan is to be computed again"):
            gradients(model, together=True)
        gradients(model, together=False)  # nothing is left behind

    run_ranks(run, 2)


def test_a_forward_without_its_hooks_says_what_to_call() -> None:
    def run() -> None:
        with pytest.raises(UsageError, match=r"Call the model, as model\(...\): model.forward\(...\) leaves out"):
            parallelize(copy.deepcopy(DENSE), PLAN).forward(EVEN)

    run_ranks(run, 2)
