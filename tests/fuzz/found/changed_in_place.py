"""Refused: what a statement such as y.sub_(0.1) returns was moved, and nobody reads it."""

import torch
from torch import nn

TP = 3
PHASE = "train"
TRAINING = False


def build():
    return Model()


def inputs():
    torch.manual_seed(0)
    return {"x": torch.randn(3, 4, 6, dtype=torch.float64)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Conv1d(6, 30, 1)
        self.one = nn.Parameter(torch.randn(30, 24))
        self.two = nn.Linear(30, 24)

    def forward(self, x):
        h = self.up(x.transpose(1, 2)).transpose(1, 2).view(3, 4, 6, 5)
        y = torch.reciprocal(h.abs() + 1) * 1.5
        y.sub_(0.1)
        z = y.clone()
        z[:, :, :3] = -y[:, :, :3]
        return torch.mm(z.cos().flatten(2).reshape(12, 30), self.one).view(3, 4, 24) + self.two(z.flatten(2))
