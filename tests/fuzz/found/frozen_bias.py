"""Refused: the bias of a row layer that is not trained was lifted by another move than re-checking allowed."""

import torch
from torch import nn

TP = 2
PHASE = "train"
TRAINING = False


def build():
    return Model()


def inputs():
    torch.manual_seed(0)
    return {"x": torch.randn(2, 3, 8, dtype=torch.float64)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.down.requires_grad_(False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))
