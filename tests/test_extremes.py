"""torch.max and torch.min of two tensors are element by element: no reduction is needed between two matmuls."""

import pytest
import torch
from torch import Tensor, nn

from colrow.planner import plan
from colrow.rewrite import verify


class Clipped(nn.Module):
    """An activation in the style of xIELU: clipped by a buffer on one side and by another half on the other."""

    def __init__(self, extreme: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("limit", torch.tensor(0.25))
        self.extreme = getattr(torch, extreme)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(self.extreme(self.extreme(y, self.limit), -y))


@pytest.mark.parametrize("extreme", ["max", "min"])
def test_extremes_of_two_tensors_are_split(extreme: str) -> None:
    inputs = (torch.randn(3, 8),)
    made = plan(Clipped(extreme), inputs, tp=2, phase="train")
    assert made.layers["up"] == "column" and made.layers["down"] == "row"
    assert [c.kind for c in made.collectives if c.direction == "forward"] == ["all_reduce"]
    report = verify(lambda: Clipped(extreme), inputs, made)
    assert report.ok(), report.explain()
