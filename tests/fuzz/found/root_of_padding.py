"""Wrong, NaN gradients: the derivative of a root is infinite at the zeros of padding."""

import torch
from torch import nn

TP = 3
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
        self.first = nn.Linear(8, 8)
        self.up = nn.Linear(8, 10, bias=False)
        self.down = nn.Linear(10, 8)

    def forward(self, x):
        y = self.up(torch.tanh(self.first(x)))
        return self.down(torch.sqrt(y.square()))
