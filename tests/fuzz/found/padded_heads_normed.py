"""Wrong, NaN: heads that a rank lacks are zeros, and so are their norms."""

import torch
from torch import nn

TP = 4
PHASE = "train"
TRAINING = False


def build():
    return Model()


def inputs():
    torch.manual_seed(0)
    return {"x": torch.randn(2, 3, 12, dtype=torch.float64)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(12, 12, bias=False)
        self.down = nn.Linear(12, 12)

    def forward(self, x):
        y = self.up(x).view(2, 3, 6, 2)
        return self.down((y / y.norm(dim=-1, keepdim=True)).flatten(2))
