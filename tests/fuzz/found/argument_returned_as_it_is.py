"""Refused: dropout in evaluation returns its argument, whose readers the trace took for readers of the result."""

import torch
from torch import nn

TP = 5
PHASE = "train"
TRAINING = False


def build():
    return Model()


def inputs():
    torch.manual_seed(0)
    return {"x": torch.randn(1, 5, 14, dtype=torch.float64)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(14, 15)
        self.floor = nn.Parameter(torch.randn(5))
        self.one = nn.Conv1d(15, 14, 1)
        self.two = nn.Parameter(torch.randn(15, 14))

    def forward(self, x):
        y = torch.max(self.up(x).view(1, 5, 3, 5), self.floor).transpose(-1, -2)
        z = torch.alpha_dropout(y, 0.2, self.training)
        z = z.masked_fill(torch.isnan(z), 0.0).flatten(2)
        one = self.one(z.transpose(1, 2)).transpose(1, 2)
        return one + torch.einsum("abk,kn->abn", y.reshape(1, 5, -1), self.two)
