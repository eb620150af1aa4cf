"""Tracing a model whose control flow reads integers of its inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from colrow.cost_models.errors import TraceError
from colrow.planner.planning import plan
from colrow.planner.trace import trace
from colrow.planner.workloads import example_of
from colrow.rewrite.verification import verify


class Images(nn.Module):
    """Patches of several images in one sequence, told apart by their sizes, as Qwen-VL's vision tower reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        lengths = grid_thw.prod(-1).tolist()
        means = [part.mean(0) for part in self.embed(patches).split(lengths)]
        return self.down(torch.relu(self.up(torch.stack(means))))


class OnValues(nn.Module):
    """A branch on what weights compute: nothing knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y if y.sum() > 0 else -y


INPUTS = {"patches": torch.randn(14, 12, dtype=torch.float64), "grid_thw": torch.tensor([[1, 2, 4], [1, 2, 3]])}


def build() -> nn.Module:
    torch.manual_seed(0)
    return Images().double()


def test_sizes_of_images_are_read_and_the_plan_says_so() -> None:
    graph = trace(build(), INPUTS)
    assert "known values" in graph.assumptions["route"]
    assert "route" not in trace(nn.Linear(8, 8), (torch.zeros(2, 8),)).assumptions


def test_a_model_that_reads_sizes_is_split_and_right() -> None:
    made = plan(build(), INPUTS, tp=2, phase="train")
    assert made.layers["up"] == "column" and made.layers["down"] == "row"
    report = verify(build, INPUTS, made)
    assert report.ok(), report.explain()


def test_the_plan_keeps_the_sizes_for_whoever_traces_again() -> None:
    made = plan(build(), INPUTS, tp=2)
    again = example_of(made.workloads[0])
    assert isinstance(again, dict)
    assert torch.equal(again["grid_thw"], INPUTS["grid_thw"]) and again["patches"].shape == (14, 12)


def test_a_branch_on_computed_values_is_refused_by_both_routes() -> None:
    with pytest.raises(TraceError, match="nor with known values"):
        trace(OnValues(), (torch.zeros(2, 8),))
