"""Blocks that are not simply called: lists of modules, and blocks of which a part is called, or read, from outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from colrow.planner.called_apart import CALLED_APART
from colrow.planner.planning import plan
from colrow.rewrite.verification import verify

INPUTS = (torch.zeros(2, 5, 16, dtype=torch.float64),)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


class Lists(nn.Module):
    """Each block is a list of modules that the loop around it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(16), mlp()]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in self.layers:  # type: ignore[misc]
            x = x + layer(norm(x))
        return x


class Block(nn.Module):
    """Its condition is computed by a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.condition, self.scale, self.mlp = nn.Linear(16, 16), nn.Parameter(torch.ones(16)), mlp()

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        return x + self.mlp(x * self.scale * self.condition(given))


class Borrowed(nn.Module):
    """After the blocks, the first one's condition is asked for again, as DiT does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        given = x.mean(1, keepdim=True)
        for block in self.blocks:
            x = block(x, given)
        return x * self.blocks[0].condition(given)


class Kept(nn.Module):
    """Its layers have a second name, by which nothing reads them, as Performer's have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(mlp(), mlp())
        self.keeper = nn.Module()
        self.keeper.instance = self.layers

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Read(nn.Module):
    """Parameters of blocks, whole and split ones, are read before and after these run; two of them are one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.blocks[2].scale = self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        given = x.mean(1, keepdim=True) * self.blocks[0].scale * self.scale
        for block in self.blocks:
            x = block(x, given)
        up, down = self.blocks[1].mlp[0], self.blocks[1].mlp[2]
        return x + nn.functional.linear(nn.functional.linear(x, up.weight).relu(), down.weight)


@pytest.mark.parametrize(
    ("made", "apart"), [(Lists, None), (Borrowed, "blocks.0"), (Kept, None), (Read, "blocks.0, blocks.1")]
)
def test_right_where_blocks_are_not_simply_called(made: type[nn.Module], apart: str | None) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return made().double()

    p = plan(build(), INPUTS, tp=2, phase="train")
    assert p.assumptions.get(CALLED_APART) == apart
    assert p.sharded_fraction == 1.0
    report = verify(build, INPUTS, p)
    assert report.ok(), report.explain()
