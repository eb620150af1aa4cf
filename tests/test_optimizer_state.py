"""Optimiser state saved at one group size continues at another as dense training would."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from split_model import cotangent, dense_model, inputs
from test_regions import split
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

from colrow.cost_models.errors import UsageError
from colrow.rewrite.optimizer_state import keep_optimizer_state_dense
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.storage import specs_of

DENSE = dense_model()


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def step(model, optimizer):
    (model(inputs()) * cotangent()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def split_pair(size):
    model = split(copy.deepcopy(DENSE), size)
    optimizer = optimizer_of(model)
    keep_optimizer_state_dense(optimizer, model)
    return model, optimizer


def dense_after(steps):
    model = copy.deepcopy(DENSE)
    optimizer = optimizer_of(model)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_dense_out_and_in(size):
    dense, dense_optimizer = dense_after(1)
    further, _ = dense_after(2)
    names = [name for name, _ in DENSE.named_parameters()]

    def run():
        model, optimizer = split_pair(size)
        assert specs_of(model).keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
        step(model, optimizer)
        state, expected = optimizer.state_dict()["state"], dense_optimizer.state_dict()["state"]
        assert state.keys() == expected.keys()
        for number, values in expected.items():
            for key in ("exp_avg", "exp_avg_sq"):
                got = state[number][key].full_tensor()
                torch.testing.assert_close(got, values[key], rtol=1e-10, atol=1e-10, msg=f"{names[number]} {key}")
        fresh, its_optimizer = split_pair(size)
        fresh.load_state_dict(dense.state_dict())
        its_optimizer.load_state_dict(copy.deepcopy(dense_optimizer.state_dict()))  # torch keeps the tensors it gets
        for m, o in ((model, optimizer), (fresh, its_optimizer)):
            step(m, o)
            for name, value in m.state_dict().items():
                torch.testing.assert_close(value.full_tensor(), further.state_dict()[name], rtol=1e-9, atol=1e-9)

    run_ranks(run, size)


def test_resume_at_another_size(tmp_path):
    expected = dense_after(2)[0].state_dict()

    def save():
        model, optimizer = split_pair(2)
        step(model, optimizer)
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=str(tmp_path))

    def resume():
        model, optimizer = split_pair(dist.get_world_size())
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=str(tmp_path))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        step(model, optimizer)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value.full_tensor(), expected[name], rtol=1e-9, atol=1e-9, msg=name)

    run_ranks(save, 2, "gloo")
    for size in (3, 4):
        run_ranks(resume, size, "gloo")


def test_a_full_state_dict_is_the_dense_one():
    dense, dense_optimizer = dense_after(1)
    options = StateDictOptions(full_state_dict=True)
    expected = get_optimizer_state_dict(dense, dense_optimizer)["state"]

    def run():
        model, optimizer = split_pair(3)
        step(model, optimizer)
        state = get_optimizer_state_dict(model, optimizer, options=options)["state"]
        for name, values in expected.items():
            torch.testing.assert_close(state[name]["exp_avg"], values["exp_avg"], rtol=1e-10, atol=1e-10, msg=name)

    run_ranks(run, 3)


def test_factored_state_of_a_reordered_parameter_is_refused():
    def run():
        model = split(copy.deepcopy(DENSE), 3)
        optimizer = optimizer_of(model)
        keep_optimizer_state_dense(optimizer, model)
        step(model, optimizer)
        weight = model.blocks[0].up.weight
        optimizer.state[weight]["exp_avg"] = optimizer.state[weight]["exp_avg"].sum(1)
        with pytest.raises(UsageError, match="exp_avg is not shaped like the parameter"):
            optimizer.state_dict()

    run_ranks(run, 3)
