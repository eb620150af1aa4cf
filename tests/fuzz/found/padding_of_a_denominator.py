"""Wrong, NaN: a replicated denominator was cut into padded slices, and 0 / 0 met the zeros of the next weight."""

import torch
import torch.nn.functional as F
from torch import nn

TP = 3
PHASE = "train"
TRAINING = False


def build():
    return Model()


def inputs():
    torch.manual_seed(0)
    return {"x": torch.randn(3, 4, 16, dtype=torch.float64)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 16, bias=False)
        self.register_buffer("scale", torch.randn(16))
        self.down = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return F.linear(self.up(x) / (self.scale.exp() + 1), self.down)
