"""A number is calculated from a length, ``x.shape[-1] ** -0.5``: where the dim is split, it is another number."""

import torch
import torch.nn.functional as F
from torch import nn

TP = 3
PHASE = "train"
TRAINING = False


def build():
    return Model()


def inputs():
    torch.manual_seed(0)
    return {"x": torch.randn(2, 5, 12, dtype=torch.float64)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(12, 18)
        self.out = nn.Linear(12, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).split([12, 3, 3], dim=-1)
        q = q.reshape(2, 5, 4, 3).transpose(1, 2)
        k, v = k.unsqueeze(1), v.unsqueeze(1)
        scores = F.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
        return self.out((scores @ v).transpose(1, 2).reshape(2, 5, 12))
