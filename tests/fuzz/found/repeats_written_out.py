"""Refused: the numbers of key heads written in expand and reshape were not made local where ranks share heads."""

import torch
import torch.nn.functional as F
from torch import nn

TP = 7
PHASE = "train"
TRAINING = False


def build():
    return Model()


def inputs():
    torch.manual_seed(0)
    return {"x": torch.randn(1, 5, 16, dtype=torch.float64)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(16, 8, bias=False)
        self.k = nn.Linear(16, 4, bias=False)
        self.v = nn.Linear(16, 4, bias=False)
        self.o = nn.Linear(8, 16, bias=False)

    def forward(self, x):
        q = self.q(x).reshape(1, 5, 4, 2).transpose(1, 2)
        k = self.k(x).unflatten(-1, (-1, 2)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (-1, 2)).transpose(1, 2)
        k = k.unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(k.shape[0], -1, 5, 2)
        v = v[:, :, None].expand(1, 2, 2, 5, 2).reshape(1, 4, 5, 2)
        out = F.softmax(q @ k.transpose(-1, -2) * 0.7, dim=-1) @ v
        return self.o(out.transpose(1, 2).contiguous().view(1, 5, 8))
