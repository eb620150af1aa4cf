"""Refused: a broadcast made in parts kept the length that its call writes."""

import torch
from torch import nn

TP = 2
PHASE = "train"
TRAINING = False


def build():
    return Model()


def inputs():
    torch.manual_seed(0)
    return {"x": torch.randn(1, 15, 14, dtype=torch.float64)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 14, 12))
        self.down = nn.Parameter(torch.randn(4, 12, 14))

    def forward(self, x):
        y = x.expand(4, -1, -1)
        return torch.bmm(torch.relu(torch.bmm(y, self.up)), self.down).sum(0)
