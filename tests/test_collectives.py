"""Every move against dense maths: values and gradients (of gradients), on simulated ranks, at awkward lengths."""

import itertools

import pytest
import torch

from colrow.planner.layout import balanced, joined, owned_units
from colrow.planner.moves import Move
from colrow.rewrite.collectives import apply_move
from colrow.rewrite.groups import group_of
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.slices import cover, gaps, local_part, pieces


def replicated(ranks):
    """2 units of 3 on ``ranks`` ranks: both on each of 2 ranks, groups of holders on more."""
    return owned_units(6, 3, tuple((0, 1) if ranks == 2 else ((rank * 2) // ranks,) for rank in range(ranks)))


LAYOUTS = {
    "even": lambda n: balanced(4 * n, n),
    "7": lambda n: balanced(7, n),
    "13": lambda n: balanced(13, n),
    "fewer than ranks": lambda n: balanced(1, n),
    "qkv": lambda n: joined((balanced(6 * n, n), balanced(2 * n, n), balanced(2 * n, n))),
    "uneven segments": lambda n: joined((balanced(10, n, 2), balanced(7, n))),
    "replicas": replicated,
    "replicas in a segment": lambda n: joined((balanced(7, n), replicated(n))),
    "doubled on one rank": lambda n: owned_units(4, 2, tuple((0, 0) if r == 0 else (r % 2, 1) for r in range(n))),
}
CASES = [pytest.param(n, LAYOUTS[name](n), id=f"{name}-{n}") for n in (2, 3, 4) for name in LAYOUTS]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whole_of(parts, dim, layout, add):
    """The dense tensor from per-rank parts, element by element: holders added, or all of them the same."""
    shape = list(parts[0].shape)
    shape[dim] = layout.size
    full = torch.zeros(shape, dtype=torch.float64)
    seen = torch.zeros(layout.size)
    for rank, part in enumerate(parts):
        for start, local, length in layout.pieces(rank):
            for i in range(length):
                full.select(dim, start + i).add_(part.select(dim, local + i))
                seen[start + i] += 1
    shape = [1] * full.dim()
    shape[dim] = -1
    return full if add else full / seen.view(shape)


def moved(move, x_of, weight_of):
    """On every rank: the moved value and the gradient of its weighted sum."""

    def rank_run():
        group = group_of(None)
        x = x_of(group.rank).clone().requires_grad_()
        y = apply_move(x, move, group)
        with torch.no_grad():
            same = apply_move(x.detach(), move, group)
        (y * weight_of(group.rank)).sum().backward()
        return y.detach(), same, x.grad

    return rank_run


@pytest.mark.parametrize(("size", "layout"), CASES)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_partial_to_shard(size, layout, dim):
    shape = [2, 3, 2]
    shape[dim] = layout.size
    xs = [random(*shape, seed=r) for r in range(size)]
    shape[dim] = layout.local
    # Padding takes no part: whatever weight it has must not reach a gradient.
    weights = [random(*shape, seed=10 + r) for r in range(size)]
    run = moved(Move("reduce_scatter", "all_gather", dim, layout), xs.__getitem__, weights.__getitem__)
    total = sum(xs)
    for rank, (y, same, grad) in enumerate(run_ranks(run, size)):
        torch.testing.assert_close(y, local_part(total, dim, layout, rank), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(same, y, rtol=0, atol=0)
        torch.testing.assert_close(grad, whole_of(weights, dim, layout, add=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "layout"), CASES)
@pytest.mark.parametrize("backward", ["slice", "reduce_scatter"])
def test_shard_to_replicate(size, layout, backward):
    full = random(2, layout.size)
    xs = [local_part(full, 1, layout, r) for r in range(size)]
    weights = [random(2, layout.size, seed=1 if backward == "slice" else r) for r in range(size)]
    results = run_ranks(moved(Move("all_gather", backward, 1, layout), xs.__getitem__, weights.__getitem__), size)
    total = weights[0] if backward == "slice" else sum(weights)
    for y, same, _ in results:
        torch.testing.assert_close(y, full, rtol=0, atol=0)
        torch.testing.assert_close(same, y, rtol=0, atol=0)
    grads = [grad for *_, grad in results]
    torch.testing.assert_close(whole_of(grads, 1, layout, add=True), total, rtol=1e-12, atol=1e-12)
    for rank, grad in enumerate(grads):
        for start, length in gaps(layout, rank):
            assert not grad.narrow(1, start, length).any()


@pytest.mark.parametrize(("size", "layout"), CASES)
@pytest.mark.parametrize("backward", ["pad", "all_gather"])
def test_replicate_to_shard(size, layout, backward):
    full = random(layout.size, 2)
    weights = [random(layout.local, 2, seed=r) for r in range(size)]
    results = run_ranks(moved(Move("slice", backward, 0, layout), lambda r: full, weights.__getitem__), size)
    expected = whole_of(weights, 0, layout, add=True)
    for rank, (y, _, grad) in enumerate(results):
        torch.testing.assert_close(y, local_part(full, 0, layout, rank), rtol=0, atol=0)
        if backward == "all_gather":
            torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)
    if backward == "pad":
        torch.testing.assert_close(sum(grad for *_, grad in results), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_moves_without_a_layout(size):
    xs = [random(3, 5, seed=r) for r in range(size)]
    weights = [random(3, 5, seed=10 + r) for r in range(size)]
    table = {
        ("all_reduce", "identity"): (lambda r: sum(xs), lambda r: weights[r]),
        ("all_reduce", "all_reduce"): (lambda r: sum(xs), lambda r: sum(weights)),
        ("identity", "all_reduce"): (lambda r: xs[r], lambda r: sum(weights)),
        ("identity", "lift"): (lambda r: xs[r], lambda r: weights[r] * (r == 0)),
        ("lift", "identity"): (lambda r: xs[r] * (r == 0), lambda r: weights[r]),
        ("lift", "lift"): (lambda r: xs[r] * (r == 0), lambda r: weights[r] * (r == 0)),
    }
    for (forward, backward), (value_of, grad_of) in table.items():
        results = run_ranks(moved(Move(forward, backward), xs.__getitem__, weights.__getitem__), size)
        for rank, (y, same, grad) in enumerate(results):
            torch.testing.assert_close(y, value_of(rank), rtol=1e-13, atol=1e-13, msg=f"{forward}/{backward}")
            torch.testing.assert_close(same, y, rtol=0, atol=0)
            torch.testing.assert_close(grad, grad_of(rank), rtol=1e-13, atol=1e-13, msg=f"{forward}/{backward}")


def test_gradient_of_a_gradient():
    """d/dx of |d/dx sum((sum_r x_r)^3)|^2 through an all_reduce, on every rank."""
    xs = [random(4, seed=r) for r in range(2)]

    def run():
        group = group_of(None)
        x = xs[group.rank].clone().requires_grad_()
        y = apply_move(x, Move("all_reduce", "identity"), group)
        (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), x)
        return second

    total = sum(xs).requires_grad_()
    (first,) = torch.autograd.grad((total**3).sum(), total, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), total)
    # ``first`` is whole on each rank, so its gradient, put through the adjoint move (an all_reduce), is summed over
    # the ranks.
    for got in run_ranks(run, 2):
        torch.testing.assert_close(got, 2 * second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "layout"), CASES)
def test_cover_reads_each_element_once(size, layout):
    positions = [start + i for start, _, _, length in cover(layout) for i in range(length)]
    assert positions == list(range(layout.size))
    for rank in range(size):
        filled = sum(length for *_, length in pieces(layout, rank)) + sum(length for _, length in gaps(layout, rank))
        assert filled == layout.local


def test_cover_refuses_a_hole():
    with pytest.raises(ValueError, match="element 2 of 6"):
        cover(owned_units(6, 2, ((0,), (2,))))


def test_gloo_ranks_agree_with_simulated_ones():
    layout = joined((balanced(7, 2), balanced(4, 2)))
    xs = [random(11, 3, seed=r) for r in range(2)]
    weights = [random(layout.local, 3, seed=r) for r in range(2)]
    run = moved(Move("reduce_scatter", "all_gather", 0, layout), xs.__getitem__, weights.__getitem__)
    for real, simulated in zip(run_ranks(run, 2, "gloo"), run_ranks(run, 2), strict=True):
        for a, b in itertools.zip_longest(real, simulated):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
