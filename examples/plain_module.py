"""A plain nn.Module, planned, checked and run on 2 CPU ranks:  python examples/plain_module.py"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from colrow.planner import Plan, plan
from colrow.rewrite import parallelize, verify
from colrow.rewrite.ranks import run_ranks
from examples.plain_models import Transformer

RANKS = 2
IDS = torch.arange(40).view(2, 20) % 96


def build() -> Transformer:
    """The same model on every rank."""
    torch.manual_seed(0)
    return Transformer()


def on_rank(p: Plan) -> Tensor:
    """What runs on each of the ranks; under torchrun this would be the whole script."""
    model = parallelize(build(), p)
    logits: Tensor = model(IDS)
    if dist.get_rank() == 0:
        print("rank 0 holds", tuple(model.blocks[0].attention.qkv.to_local().shape), "of its fused projection")
    return logits.detach()


def main() -> None:
    """Plan, verify, run; fails if anything differs from the dense model."""
    p = plan(build(), (IDS,), tp=RANKS, hardware="gloo-cpu")
    for name, placement in p.layers.items():
        print(f"{name:32} {placement}")
    report = verify(build, (IDS,), p)  # float64, gradients, two optimiser steps, collectives counted
    print(report.explain())
    assert report.ok()
    torch.testing.assert_close(run_ranks(on_rank, RANKS, "gloo", (p,))[0], build()(IDS))
    print("the ranks' logits are the dense model's")


if __name__ == "__main__":
    main()
