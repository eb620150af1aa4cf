"""Vocabulary-split operators against the dense ones, gradients included."""

import pytest
import torch
from torch.nn import functional as F

from colrow.planner.layout import balanced, joined, owned_units
from colrow.planner.moves import Move
from colrow.rewrite.collectives import apply_move
from colrow.rewrite.groups import group_of
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.slices import canonical, local_part, summed_parts
from colrow.rewrite.vocab import mean_of_shard, vocab_parallel_cross_entropy, vocab_parallel_embedding

LAYOUTS = [
    pytest.param(size, layout, id=f"{name}-{size}")
    for size in (2, 3, 4)
    for name, layout in {
        "even": balanced(4 * size, size),
        "13": balanced(13, size),
        "a rank without any": balanced(size - 1, size),
        "two tables": joined((balanced(7, size), balanced(5, size))),
        "copies": owned_units(6, 3, tuple((r % 2,) for r in range(size))),
    }.items()
]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_embedding(size, layout, padding_idx):
    full, weight = random(layout.size, 3), random(2, 5, 3, seed=1)
    ids = torch.randint(layout.size, (2, 5), generator=torch.Generator().manual_seed(2))

    def run():
        group = group_of(None)
        local = local_part(full, 0, layout, group.rank).clone().requires_grad_()
        y = vocab_parallel_embedding(ids, local, layout, group, padding_idx)
        y = apply_move(y, Move("all_reduce", "identity"), group)
        (y * weight).sum().backward()
        return y.detach(), local.grad

    dense = full.clone().requires_grad_()
    expected = F.embedding(ids, dense, padding_idx)
    (expected * weight).sum().backward()
    results = run_ranks(run, size)
    for y, _ in results:
        torch.testing.assert_close(y, expected.detach(), rtol=0, atol=0)
    grad = summed_parts(torch.stack([grad for _, grad in results]), 0, layout)
    torch.testing.assert_close(grad, dense.grad, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy(size, layout, reduction, label_smoothing):
    full = 30 * random(3, 4, layout.size)  # large: the maximum must be subtracted
    labels = torch.randint(layout.size, (3, 4), generator=torch.Generator().manual_seed(3))
    labels[0, 1] = labels[2, 3] = -7
    weight = random(3, 4, seed=4) if reduction == "none" else random(1, seed=4)[0]

    def run():
        group = group_of(None)
        local = local_part(full, 2, layout, group.rank).clone()
        local[..., layout.local - 1] += 0 if local[..., -1].any() else 1e3  # padding that must not count
        local.requires_grad_()
        loss = vocab_parallel_cross_entropy(local, labels, layout, group, -7, reduction, label_smoothing)
        (loss * weight).sum().backward()
        return loss.detach(), local.grad

    dense = full.clone().requires_grad_()
    expected = F.cross_entropy(
        dense.movedim(-1, 1), labels, ignore_index=-7, reduction=reduction, label_smoothing=label_smoothing
    )
    (expected * weight).sum().backward()
    results = run_ranks(run, size)
    for loss, _ in results:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    grads = torch.stack([grad for _, grad in results])
    torch.testing.assert_close(summed_parts(grads, 2, layout), dense.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(canonical(grads, 2, layout), dense.grad, rtol=1e-12, atol=1e-13)


def test_cross_entropy_of_half_precision_is_computed_in_float32():
    layout, full = balanced(13, 2), random(6, 13).bfloat16()
    labels = torch.arange(6)

    def run():
        group = group_of(None)
        return vocab_parallel_cross_entropy(local_part(full, 1, layout, group.rank), labels, layout, group)

    for loss in run_ranks(run, 2):
        assert loss.dtype == torch.bfloat16
        assert loss == F.cross_entropy(full.float(), labels).bfloat16()


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_mean_of_shard(size, layout):
    full, weight = random(2, layout.size, 3), random(1, 3, seed=1)

    def run():
        group = group_of(None)
        local = local_part(full, 1, layout, group.rank).clone()
        if layout.is_padded and not local[:, -1].any():
            local[:, -1] = float("nan")  # padding that must not count
        local.requires_grad_()
        mean = apply_move(mean_of_shard(local.pow(2), [-2, 0], 1, layout, group), Move("all_reduce", "identity"), group)
        (mean * weight).sum().backward()
        return mean.detach(), local.grad.nan_to_num()

    dense = full.clone().requires_grad_()
    expected = dense.pow(2).mean([0, 1])
    (expected * weight).sum().backward()
    results = run_ranks(run, size)
    for mean, _ in results:
        torch.testing.assert_close(mean, expected.detach(), rtol=1e-12, atol=1e-12)
    grad = summed_parts(torch.stack([grad for _, grad in results]), 1, layout)
    torch.testing.assert_close(grad, dense.grad, rtol=1e-12, atol=1e-12)
