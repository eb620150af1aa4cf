"""Ranks: results, agreement between ranks, and every way a rank can fail."""

import contextlib
import os
import re
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from colrow.cost_models.errors import PlanFileError, RankError, UsageError
from colrow.planner.moves import Move
from colrow.rewrite.collectives import apply_move
from colrow.rewrite.groups import TpGroup, group_of, tp_mesh
from colrow.rewrite.ranks import agree, run_ranks


def summed_rank():
    """Sum of (rank + 1), and a gradient that needs a collective in backward."""
    group = group_of(None)
    x = torch.full((2,), group.rank + 1.0, requires_grad=True)
    y = apply_move(apply_move(x, Move("all_reduce", "identity"), group), Move("identity", "all_reduce"), group)
    (y * (group.rank + 1)).sum().backward()
    return y.detach(), x.grad, dist.get_rank()


@pytest.mark.parametrize(("backend", "size"), [("simulated", 1), ("simulated", 8), ("gloo", 1), ("gloo", 3)])
def test_results_come_by_rank(backend, size):
    total = size * (size + 1) / 2
    for rank, (y, grad, said) in enumerate(run_ranks(summed_rank, size, backend)):
        assert said == rank
        assert y.tolist() == grad.tolist() == [total, total]


def test_gloo_ranks_can_be_spawned(monkeypatch):
    monkeypatch.setattr("colrow.rewrite.processes.can_fork", lambda: False)
    assert [rank for _, _, rank in run_ranks(summed_rank, 2, "gloo")] == [0, 1]
    with pytest.raises(UsageError, match="cannot be sent"):
        run_ranks(lambda: None, 2, "gloo")


@pytest.mark.parametrize("fails", [False, True])
def test_simulated_ranks_leave_the_process_as_it_was(fails):
    def run():
        assert sys.excepthook is not before[0], "or this test shows nothing"
        if fails:
            raise ValueError

    before = sys.excepthook, threading.excepthook, threading.active_count()
    with contextlib.suppress(RankError):
        run_ranks(run, 2)
    assert (sys.excepthook, threading.excepthook, threading.active_count()) == before
    assert not dist.is_initialized()


def waits_for_the_others():
    dist.all_reduce(torch.ones(1))


def raises():
    if dist.get_rank() == 1:
        raise PlanFileError("plan.json", "made for another model")
    waits_for_the_others()


def raises_unforeseen():
    if dist.get_rank() == 1:
        raise KeyError("weight")
    waits_for_the_others()


def exits():
    if dist.get_rank() == 1:
        sys.exit(7)
    waits_for_the_others()


def dies():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    waits_for_the_others()


def leaves():
    if dist.get_rank() == 1:
        os._exit(0)
    waits_for_the_others()


@pytest.mark.parametrize(
    ("backend", "fn", "code", "message"),
    [
        ("simulated", raises, 2, "rank 1: plan.json: made for another model"),
        ("simulated", raises_unforeseen, 3, "rank 1: KeyError: 'weight'"),
        ("simulated", exits, 7, "rank 1: SystemExit: 7"),
        ("gloo", raises, 2, "rank 1: plan.json: made for another model"),
        ("gloo", raises_unforeseen, 3, "rank 1: KeyError: 'weight'"),
        ("gloo", exits, 7, "rank 1: SystemExit: 7"),
        ("gloo", dies, 137, "rank 1: killed by SIGKILL"),
        ("gloo", leaves, 3, "rank 1: exited with code 0 without a result"),
    ],
)
def test_a_failing_rank_speaks_through_the_parent(backend, fn, code, message):
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(fn, 3, backend)
    assert message in str(caught.value)
    assert caught.value.exit_code == code
    assert time.monotonic() - start < 55, "the contract's 60 s, which a hang would exceed"
    assert run_ranks(summed_rank, 2, backend)[0][0].tolist() == [3, 3], "the next run is not disturbed"


def one_rank_less():
    if dist.get_rank() != 1:
        waits_for_the_others()


@pytest.mark.parametrize("backend", ["simulated", "gloo"])
def test_a_collective_that_one_rank_does_not_make_ends(backend):
    with pytest.raises(RankError):
        run_ranks(one_rank_less, 2, backend, timeout_s=4)


def test_size_must_be_positive():
    with pytest.raises(UsageError, match="got 0, need 1 or more"):
        run_ranks(summed_rank, 0)


def agreement(digests, sizes, absent=()):
    """Every rank's answer: None, or the error's text."""

    def run():
        store, group = dist.distributed_c10d._get_default_store(), group_of(None)
        rank = group.rank
        if rank in absent:
            return None
        try:
            for digest in digests:
                agree(store, digest[rank], TpGroup(group.name, rank, sizes[rank]), timeout_s=1.5)
        except RankError as error:
            return str(error)
        return None

    return run


@pytest.mark.parametrize("backend", ["simulated", "gloo"])
def test_agreement(backend):
    assert run_ranks(agreement(["aaa", "bbb"], [3, 3, 3]), 3, backend) == [None] * 3


@pytest.mark.parametrize("backend", ["simulated", "gloo"])
@pytest.mark.parametrize(
    ("digests", "sizes", "absent", "message"),
    [
        (["aaa", "aba"], [3, 3, 3], (), "starts something else"),
        (["aaa"], [3, 3, 2], (), "starts something else"),
        (["aaa"], [4, 4, 4], (), r"ranks \[3\] of 4 did not come"),
        (["aaa"], [3, 3, 3], (1,), r"ranks \[1\] of 3 did not come"),
    ],
)
def test_disagreement_is_refused_on_every_rank(backend, digests, sizes, absent, message):
    for rank, text in enumerate(run_ranks(agreement(digests, sizes, absent), 3, backend)):
        if rank in absent:
            continue
        assert text is not None, f"rank {rank} agreed"
        assert re.search(message, text), text


def meshes():
    from torch.distributed.device_mesh import init_device_mesh

    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    unnamed = init_device_mesh("cpu", (2, 2))
    with pytest.raises(UsageError, match="no dim of it is the tensor-parallel one; got 2 dims"):
        tp_mesh(unnamed)
    rank = dist.get_rank()
    assert group_of(two)[1:] == group_of(two["tp"])[1:] == (rank % 2, 2)
    assert group_of(None)[1:] == group_of(init_device_mesh("cpu", (4,)))[1:] == (rank, 4)
    x = apply_move(torch.tensor([float(rank)]), Move("all_reduce", "identity"), group_of(two))
    assert x.item() == {0: 1, 1: 1, 2: 5, 3: 5}[rank]


@pytest.mark.parametrize("backend", ["simulated", "gloo"])
def test_groups_of_meshes(backend):
    run_ranks(meshes, 4, backend)


def test_a_mesh_of_none_needs_a_process_group():
    with pytest.raises(UsageError, match="there is none"):
        tp_mesh(None)
