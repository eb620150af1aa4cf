"""Modules that a model calls without holding them: one activation made at import, for all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from colrow.planner.planning import plan
from colrow.rewrite.verification import verify

activation = nn.GELU()


class Head(nn.Module):
    """A head as RoBERTa's: the activation between its layers is no child of it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.decoder = nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(activation(self.dense(x))))


@pytest.mark.parametrize("tp", [2, 4])
def test_a_call_of_a_module_outside_of_the_model_is_its_callers(tp: int) -> None:
    inputs = (torch.randn(2, 3, 16, dtype=torch.float64),)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Head(), nn.Linear(32, 16)).double()

    made = plan(build(), inputs, tp=tp, phase="train")
    report = verify(build, inputs, made)
    assert made.sharded_fraction > 0.9
    assert report.ok(), report.explain()
