"""Refused: re-checking knew no split of an operator whose operands were all cut by the plan."""

import torch
import torch.nn.functional as F
from torch import nn

TP = 2
PHASE = "train"
TRAINING = False


def build():
    return Model()


def inputs():
    torch.manual_seed(0)
    return {"x": torch.randn(3, 4, 24, dtype=torch.float64)}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(18, 24))
        self.down = nn.Parameter(torch.randn(18, 24))

    def forward(self, x):
        y = torch.floor(2 * F.linear(x, self.up))
        y = torch.cat((-y[..., y.shape[-1] // 2 :], y[..., : y.shape[-1] // 2]), dim=-1)
        return torch.matmul(y, self.down)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x
