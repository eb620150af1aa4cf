"""Wrong: a gradient that never comes was planned to be reduced."""

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
        self.up = nn.Linear(12, 8)
        self.norm = nn.RMSNorm(2, eps=1e-6)
        self.down = nn.Linear(8, 12)

    def forward(self, x):
        y = self.up(x)
        z = self.norm(y.view(2, 3, 4, 2))
        del z
        return self.down(torch.tanh(y))
