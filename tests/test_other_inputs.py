"""A model planned for one batch and length runs every other: single sequences, long ones, padded left and right."""

from __future__ import annotations

import copy

import pytest
import torch
from right_models import BATCH, SEQ, planned_twin

from colrow.rewrite.comparison import error_of
from colrow.rewrite.parallel import parallelize
from colrow.rewrite.ranks import run_ranks

TP, TOLERANCE = 2, 1e-5


def ids(batch, length):
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))


def padded(batch, length, side):
    """Every sequence shorter by one than the one before."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        if side == "left":
            mask[row, :row] = 0
        else:
            mask[row, length - row :] = 0
    return {"input_ids": ids(batch, length), "attention_mask": mask}


CALLS = [
    {"input_ids": ids(1, 1)},
    {"input_ids": ids(1, 7)},
    {"input_ids": ids(BATCH + 3, SEQ + 8)},
    {"input_ids": ids(BATCH, SEQ)},
    padded(3, 9, "left"),
    padded(3, 9, "right"),
    padded(BATCH, SEQ, "left"),
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert", "opt"])
def test_batches_lengths_and_padding(name):
    dense, p = planned_twin(name)

    def on_rank():
        model = parallelize(copy.deepcopy(dense), p)
        with torch.no_grad():
            return [model(**call).logits for call in CALLS]

    with torch.no_grad():
        true = [dense(**call).logits for call in CALLS]
    for found in run_ranks(on_rank, TP):
        for call, mine, theirs in zip(CALLS, found, true, strict=True):
            kept = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
            assert error_of(mine[kept], theirs[kept]) <= TOLERANCE, call["input_ids"].shape
