"""Plain modules, PyTorch's own layers among them: split and right; what cannot be traced is refused."""

from __future__ import annotations

import pytest
import torch
from plain_modules import MODULES, TOKENS, OnlyIfLarge
from torch import nn

from colrow.cost_models.errors import TraceError
from colrow.planner.planning import plan
from colrow.rewrite.verification import verify

ON_THREE = ("ResNet", "UNet", "Einsums", "LinearAttention", "Experts", "TiedAutoencoder", "SelfAttention")


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name][0]().double()


@pytest.mark.parametrize(("name", "tp"), [(name, 2) for name in MODULES] + [(name, 3) for name in ON_THREE])
def test_plain_modules_are_right(name: str, tp: int) -> None:
    inputs = MODULES[name][1]
    made = plan(built(name), inputs, tp=tp, phase="train")
    report = verify(lambda: built(name), inputs, made)
    assert report.ok(), report.explain()
    assert report.gradient_errors and len(report.trainings) == 2
    if tp == 2:
        assert made.sharded_fraction >= 0.9, made.unsplit


def test_a_branch_on_values_is_refused() -> None:
    with pytest.raises(TraceError, match="data-dependent branch"):
        plan(OnlyIfLarge().double(), TOKENS, tp=2)
