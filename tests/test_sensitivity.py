"""Whether a comparison can tell anything."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from colrow.planner.planning import plan
from colrow.rewrite.comparison import Report
from colrow.rewrite.sensitivity import decides_nothing
from colrow.rewrite.verification import verify

INPUTS = (torch.randn(2, 3, 16, dtype=torch.float64),)


class Chaotic(nn.Module):
    """Rounding grows a thousandfold in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(torch.relu(self.up(x)))
        for _ in range(4):
            x = torch.sin(1000 * x)
        return x


def calm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).double()


def chaotic() -> nn.Module:
    torch.manual_seed(0)
    return Chaotic().double()


def reported(build: object) -> Report:
    made = plan(build(), INPUTS, tp=2, phase="train")  # type: ignore[operator]
    return verify(build, INPUTS, made)  # type: ignore[arg-type]


def test_a_chaotic_model_is_undecided() -> None:
    report = reported(chaotic)
    assert not report.ok() and not report.unequal
    assert decides_nothing(chaotic, INPUTS, report)


def test_a_calm_models_error_is_one() -> None:
    report = reported(calm)
    assert report.ok(), report.explain()
    wrong = replace(report, output_errors=dict.fromkeys(report.output_errors, 1e-06))
    assert not decides_nothing(calm, INPUTS, wrong)


def test_what_rounding_cannot_explain_decides() -> None:
    report = replace(reported(chaotic), none_gradients=("up.weight",))
    assert not decides_nothing(chaotic, INPUTS, report)
