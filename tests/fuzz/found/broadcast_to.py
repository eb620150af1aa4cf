"""Refused: the sizes of broadcast_to were compared with the undivided ones."""

import torch
from torch import nn

TP = 2
PHASE = "train"
TRAINING = False


def build():
    return Model()


def inputs():
    torch.manual_seed(0)
    return {"x": torch.randn(2, 5, 10, dtype=torch.float64)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(10, 15)
        self.down = nn.Linear(30, 10)

    def forward(self, x):
        y = torch.tanh(self.up(x)).unsqueeze(-1).broadcast_to((2, 5, 15, 2))
        return self.down(y.flatten(2))
