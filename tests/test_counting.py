"""Counts and bytes of executed collectives, whoever issues them, forward and backward."""

import ast
import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from split_model import WIDTH, dense_model, inputs
from test_regions import split
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from colrow.planner.layout import balanced
from colrow.planner.moves import Move
from colrow.rewrite import counting
from colrow.rewrite.collectives import apply_move
from colrow.rewrite.counting import ExecutedCollective, count_collectives
from colrow.rewrite.groups import group_of
from colrow.rewrite.ranks import run_ranks


class Call(nn.Module):
    """A module of one function, with a parameter so that there is something to differentiate."""

    def __init__(self, fn):
        super().__init__()
        self.fn, self.scale = fn, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return {"out": self.fn(x * self.scale), "ids": torch.zeros(2, dtype=torch.long)}


def moves(x):
    """Each communicating step once forward, of [6, 2] float32 on 2 ranks."""
    layout, group = balanced(6, 2), group_of(None)
    x = apply_move(x, Move("all_reduce", "identity"), group)
    x = apply_move(x, Move("reduce_scatter", "all_gather", 0, layout), group)
    x = apply_move(x, Move("all_gather", "reduce_scatter", 0, layout), group)
    return apply_move(x, Move("identity", "all_reduce"), group)


WHOLE = 6 * 2 * 4
FORWARD = [("all_reduce", WHOLE, "forward"), ("reduce_scatter", WHOLE, "forward"), ("all_gather", WHOLE, "forward")]
BACKWARD = [("all_reduce", WHOLE, "backward"), ("reduce_scatter", WHOLE, "backward"), ("all_gather", WHOLE, "backward")]


def counted(fn, backward, as_dict=False):
    def run():
        x = torch.arange(12.0).view(6, 2)
        found = count_collectives(Call(fn), {"x": x} if as_dict else (x,), backward=backward)
        return [(c.kind, c.nbytes, c.direction) for c in found]

    return run


@pytest.mark.parametrize("backend", ["simulated", "gloo"])
@pytest.mark.parametrize("as_dict", [True, False])
def test_forward_and_backward(backend, as_dict):
    for found in run_ranks(counted(moves, True, as_dict), 2, backend):
        assert found == FORWARD + BACKWARD
    for found in run_ranks(counted(moves, False, as_dict), 2, backend):
        assert found == FORWARD


def in_place(x):
    """The classic in-place calls of torch.distributed."""
    x = x.detach().clone()
    dist.all_reduce(x)
    dist.all_gather_into_tensor(x.new_empty(12, 2), x)
    dist.all_gather([torch.empty_like(x), torch.empty_like(x)], x)
    dist.reduce_scatter_tensor(x.new_empty(3, 2), x)
    dist.broadcast(x, 0)
    return x


def test_torch_distributed():
    """The classic calls, by their nccl-tests sizes."""
    found = run_ranks(counted(in_place, False), 2, "gloo")[0]
    assert found == [
        ("all_reduce", WHOLE, "forward"),
        ("all_gather", 2 * WHOLE, "forward"),
        ("all_gather", 2 * WHOLE, "forward"),
        ("reduce_scatter", WHOLE, "forward"),
        ("broadcast", WHOLE, "forward"),
    ]


def functional(x):
    x = funcol.all_reduce(x, "sum", dist.group.WORLD)
    return funcol.all_gather_single(x, 0, dist.group.WORLD) + 0


def with_dtensor(x):
    mesh = init_device_mesh("cpu", (2,))
    return distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None).redistribute(mesh, [Replicate()]).to_local()


def test_wrappers_and_dtensor():
    found = run_ranks(counted(functional, False), 2)[0]
    assert found == [("all_reduce", WHOLE, "forward"), ("all_gather", 2 * WHOLE, "forward")]
    assert run_ranks(counted(with_dtensor, False), 2)[0] == [("all_gather", WHOLE, "forward")]


def test_a_split_model():
    """2 reductions a block each way, the embedding's, the head's two, and the partial parameters' own."""

    def run():
        return count_collectives(split(copy.deepcopy(dense_model()), 2), (inputs(),), backward=True)

    found = run_ranks(run, 2)[0]
    hidden = 3 * 5 * WIDTH * 8
    forward = [c for c in found if c.direction == "forward"]
    backward = [c for c in found if c.direction == "backward"]
    assert [c.kind for c in forward] == ["all_reduce"] * 5 + ["all_gather"]
    assert [c.nbytes for c in backward].count(hidden) == 5
    assert len(backward) == 7 and {c.nbytes for c in backward} - {hidden} == {8 * 2 * 2}  # head_norm's two, per block


def test_one_reduction_more_or_less_is_seen():
    def run(change):
        model = split(copy.deepcopy(dense_model()), 2)
        model.blocks[0].moved = change
        with torch.no_grad():
            return len(count_collectives(model, (inputs(),)))

    def extra():
        group = group_of(None)
        return run(lambda x, m: apply_move(apply_move(x, m, group), Move("all_reduce", "identity"), group))

    assert run_ranks(lambda: run(lambda x, m: x), 2)[0] == 4
    assert run_ranks(extra, 2)[0] == 6 + 4


def test_nothing_to_differentiate():
    with pytest.raises(ValueError, match="no floating-point output"):
        count_collectives(nn.Flatten(), (torch.ones(2, 2),), backward=True)


def test_a_plain_model_has_none():
    assert count_collectives(nn.Linear(2, 2), (torch.ones(1, 2),), backward=True) == []
    assert ExecutedCollective("all_reduce", 4, "forward") == ExecutedCollective("all_reduce", 4, "forward")


def test_it_imports_nothing_of_colrow():
    tree = ast.parse(Path(counting.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [a.name for n in imports if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in imports if isinstance(n, ast.ImportFrom)]
    assert names and not any("colrow" in name for name in names)
    assert not any(n.level for n in imports if isinstance(n, ast.ImportFrom)), "relative imports are colrow's too"
