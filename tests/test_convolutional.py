"""Convolutional networks: split by channel in pairs, and right with batch statistics, groups, gates and odd widths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colrow.planner.plan_model import Plan
from colrow.planner.planning import plan
from colrow.rewrite.verification import verify

IMAGES = (torch.zeros(2, 3, 8, 8, dtype=torch.float64),)
SOUNDS = (torch.zeros(2, 5, 9, dtype=torch.float64),)


class Residual(nn.Module):
    """ResNet's basic block: the statistics of the second norm need the whole sum, the first one's do not."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Residuals(nn.Module):
    """Two basic blocks of odd width."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Residual(3, 7), Residual(3, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).mean((2, 3))


class Separable(nn.Module):
    """Depthwise and grouped convolutions, norms by group, a shared slope, pixels shuffled into channels and back."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.PixelUnshuffle(2)
        self.expand, self.slopes = nn.Conv2d(12, 24, 1), nn.PReLU(24)
        self.depthwise, self.norm = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.GroupNorm(6, 24)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.upwards = nn.ConvTranspose2d(24, 24, 2, stride=2, groups=24)
        self.project = nn.Conv2d(24, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.slopes(self.expand(self.down(x))))
        y = self.grouped(F.gelu(self.norm(y)))
        y = F.interpolate(F.max_pool2d(self.upwards(y), 2), scale_factor=2.0, mode="bicubic")
        return F.pixel_shuffle(self.project(F.avg_pool2d(y, 2)), 2)


class Conformer(nn.Module):
    """A conformer's convolution: gated, depthwise, a batch norm, in one dim."""

    def __init__(self) -> None:
        super().__init__()
        self.gated, self.depthwise = nn.Conv1d(5, 14, 1), nn.Conv1d(7, 7, 3, padding="same", groups=7, bias=False)
        self.norm, self.out = nn.BatchNorm1d(7), nn.Conv1d(7, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(F.glu(self.gated(x), dim=1))
        return x + self.out(F.silu(self.norm(y)))


MODULES = {"Residuals": (Residuals, IMAGES), "Separable": (Separable, IMAGES), "Conformer": (Conformer, SOUNDS)}


def planned(name: str, tp: int, *, training: bool = True) -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    module, inputs = MODULES[name]
    model = module().double().train(training)
    return model, plan(model, inputs, tp=tp, phase="train")


@pytest.mark.parametrize(
    ("name", "tp", "training"),
    [("Residuals", 2, True), ("Residuals", 2, False), ("Separable", 2, True), ("Conformer", 3, True)],
)
def test_right_with_statistics_and_gradients(name: str, tp: int, training: bool) -> None:
    """Outputs, gradients, two optimiser steps, and running statistics that are the dense ones on every rank."""
    made = planned(name, tp, training=training)[1]
    report = verify(lambda: planned(name, tp, training=training)[0], MODULES[name][1], made)
    assert report.ok(), report.explain()
    counted = [fqn for fqn in report.buffer_errors if fqn.endswith("num_batches_tracked")]
    assert bool(counted) == (name != "Separable")


def test_a_pair_of_convolutions_needs_one_all_reduce() -> None:
    made = planned("Residuals", 2, training=False)[1]
    for block in ("blocks.0", "blocks.1"):
        assert made.layers[f"{block}.conv1.weight"] == "column"
        assert made.layers[f"{block}.conv2.weight"] == "row"
    assert made.count("all_reduce", direction="forward", category=None) == 2
    assert made.count("all_gather", category=None) == 0
    assert made.sharded_fraction == 1


def test_statistics_that_learn_are_shared_by_one_small_all_reduce_per_split_norm() -> None:
    made = planned("Residuals", 2)[1]
    sizes = sorted(c.nbytes for c in made.collectives if c.direction == "forward")
    assert sizes == [2 * 7 * 8] * 2 + [2 * 3 * 8 * 8 * 8] * 2


@pytest.mark.parametrize("name", ["Separable", "Conformer"])
def test_one_reduction_from_expansion_to_projection(name: str) -> None:
    made = planned(name, 2, training=False)[1]
    assert made.layers["depthwise.weight"] == "column"
    assert made.count("all_reduce", direction="forward", category=None) == 1
    assert made.count("all_gather", category=None) == 0


def test_groups_are_not_cut() -> None:
    """Four groups on three ranks: a rank has two groups or one, never a part."""
    made = planned("Separable", 3)[1]
    layout = next(p.edit.layout for p in made.parameters if p.edit.fqn == "grouped.weight")
    pieces = [] if layout is None else [piece for rank in range(3) for piece in layout.pieces(rank)]
    assert all(start % 6 == 0 and length % 6 == 0 for start, _, length in pieces)
