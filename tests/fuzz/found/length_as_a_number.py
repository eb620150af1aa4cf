"""Refused: a length that the code reads of a split dim, and divides by, was the local one."""

import torch
from torch import nn

TP = 2
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
        self.up = nn.Linear(12, 15)
        self.down = nn.Linear(15, 12)

    def forward(self, x):
        y = torch.tanh(self.up(x))
        return self.down(y / y.shape[-1] * 4 + y.size(2))
