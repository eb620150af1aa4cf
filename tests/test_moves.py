"""Moves: DESIGN section 2's table in both directions, and that each backward step is the transpose of its forward."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from colrow.planner.layout import Layout, even, joined
from colrow.planner.moves import COMMUNICATES, Move, move
from colrow.planner.placement import PARTIAL, PARTIAL_GRAD, WHOLE, Partial, Placement, Replicate, Shard

RANKS = 3
LAYOUT = even(7, RANKS)
SPLIT = Shard(0, LAYOUT)
FUSED = Shard(0, joined((even(4, RANKS), even(3, RANKS))))

TABLE = {
    (PARTIAL, WHOLE): ("all_reduce", "identity"),
    (PARTIAL, PARTIAL_GRAD): ("all_reduce", "all_reduce"),
    (PARTIAL, SPLIT): ("reduce_scatter", "all_gather"),
    (SPLIT, WHOLE): ("all_gather", "slice"),
    (SPLIT, PARTIAL_GRAD): ("all_gather", "reduce_scatter"),
    (WHOLE, SPLIT): ("slice", "all_gather"),
    (PARTIAL_GRAD, SPLIT): ("slice", "pad"),
    (WHOLE, PARTIAL): ("lift", "identity"),
    (PARTIAL_GRAD, PARTIAL): ("lift", "lift"),
    (WHOLE, PARTIAL_GRAD): ("identity", "all_reduce"),
    (PARTIAL_GRAD, WHOLE): ("identity", "lift"),
}
PLACEMENTS = (WHOLE, PARTIAL_GRAD, SPLIT, FUSED, PARTIAL)


def placed(value: Tensor, placement: Placement) -> list[Tensor]:
    """What every rank holds of ``value``; summands of a partial one are random and add up."""
    match placement:
        case Replicate():
            return [value.clone() for _ in range(RANKS)]
        case Shard(_, layout):
            return [sliced(value, layout, rank) for rank in range(RANKS)]
        case Partial():
            return summands(value)


def summands(value: Tensor) -> list[Tensor]:
    parts = [torch.randn_like(value) for _ in range(RANKS - 1)]
    return [*parts, value - sum(parts)]


def gradient(value: Tensor, placement: Placement) -> list[Tensor]:
    """What every rank holds of a gradient, for a value in ``placement``."""
    match placement:
        case Replicate(partial_grad=True):
            return summands(value)
        case Shard():
            return placed(value, placement)
        case _:
            return placed(value, WHOLE)


def sliced(value: Tensor, layout: Layout, rank: int) -> Tensor:
    local = value.new_zeros(layout.local)
    for start, at, length in layout.pieces(rank):
        local[at : at + length] = value[start : start + length]
    return local


def padded(local: Tensor, layout: Layout, rank: int) -> Tensor:
    whole = local.new_zeros(layout.size)
    for start, at, length in layout.pieces(rank):
        whole[start : start + length] = local[at : at + length]
    return whole


def step(name: str, values: list[Tensor], layout: Layout | None) -> list[Tensor]:
    """The seven steps, by their definitions."""
    if name == "identity":
        return values
    if name == "lift":
        return [v if rank == 0 else torch.zeros_like(v) for rank, v in enumerate(values)]
    if name == "all_reduce":
        return [torch.stack(values).sum(0)] * RANKS
    assert layout is not None
    match name:
        case "slice":
            return [sliced(v, layout, rank) for rank, v in enumerate(values)]
        case "pad":
            return [padded(v, layout, rank) for rank, v in enumerate(values)]
        case "all_gather":
            return [sum(padded(v, layout, rank) for rank, v in enumerate(values))] * RANKS
        case "reduce_scatter":
            return [sliced(torch.stack(values).sum(0), layout, rank) for rank in range(RANKS)]
    raise AssertionError(name)


def whole_of(values: list[Tensor], placement: Placement, *, is_gradient: bool = False) -> Tensor:
    match placement:
        case Shard(_, layout):
            return sum(padded(v, layout, rank) for rank, v in enumerate(values))
        case Partial() if not is_gradient:
            return torch.stack(values).sum(0)
        case Replicate(partial_grad=True) if is_gradient:
            return torch.stack(values).sum(0)
        case _:
            assert all(torch.allclose(v, values[0]) for v in values)
            return values[0]


@pytest.mark.parametrize(("source", "target"), TABLE, ids=lambda p: str(p))
def test_table(source: Placement, target: Placement) -> None:
    made = move(source, target)
    assert made is not None and (made.forward, made.backward) == TABLE[source, target]
    if SPLIT in (source, target):
        assert (made.dim, made.layout) == (0, LAYOUT)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(PLACEMENTS, PLACEMENTS)), ids=lambda p: str(p))
def test_values_and_gradients_arrive(source: Placement, target: Placement) -> None:
    """A move keeps the value, and its backward keeps the gradient, whatever summands the ranks hold."""
    torch.manual_seed(0)
    made = move(source, target)
    if made is None:
        assert source == target or {type(source), type(target)} <= {Shard, Partial}
        return
    value, cotangent = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    forward = step(made.forward, placed(value, source), made.layout)
    torch.testing.assert_close(whole_of(forward, target), value)
    backward = step(made.backward, gradient(cotangent, target), made.layout)
    torch.testing.assert_close(whole_of(backward, source, is_gradient=True), cotangent)


@pytest.mark.parametrize("wrong", [("all_reduce", "all_reduce"), ("identity", "identity"), ("lift", "identity")])
def test_a_wrong_backward_is_noticed(wrong: tuple[str, str]) -> None:
    """The check above can fail: these are no moves from partial to whole."""
    torch.manual_seed(0)
    value, cotangent = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    made = Move(*wrong)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(whole_of(step(made.forward, placed(value, PARTIAL), None), WHOLE), value)
        backward = step(made.backward, gradient(cotangent, WHOLE), None)
        torch.testing.assert_close(whole_of(backward, PARTIAL, is_gradient=True), cotangent)


def test_nothing_to_do_and_nothing_possible() -> None:
    assert all(move(p, p) is None for p in PLACEMENTS)
    assert move(SPLIT, FUSED) is None and move(SPLIT, PARTIAL) is None


def test_free_means_no_communication() -> None:
    for source, target in TABLE:
        made = move(source, target)
        assert made is not None and made.is_free == (not {made.forward, made.backward} & COMMUNICATES)
    assert {m.forward for m in (move(*k) for k in TABLE) if m and m.is_free} == {"slice", "lift", "identity"}
