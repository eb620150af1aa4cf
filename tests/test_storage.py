"""Every encoding: dense state dicts out and in, clipping, re-sharding, FSDP2 on a second mesh dim."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from split_model import cotangent, dense_model, inputs
from test_regions import split, views
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from colrow.cost_models.errors import UsageError
from colrow.planner.layout import balanced, joined, owned_units
from colrow.rewrite.groups import tp_mesh
from colrow.rewrite.optimizer_state import keep_optimizer_state_dense
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.storage import ParameterSpec, parameter, store

DENSE = dense_model()
STATE = DENSE.state_dict()
FULL = StateDictOptions(full_state_dict=True)


def zeroed(model):
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


def assert_dense(model):
    """The model's state dict, made whole, is the dense one bit for bit."""
    state = model.state_dict()
    assert list(state) == list(STATE)
    for name, value in state.items():
        assert isinstance(value, DTensor) and value.shape == STATE[name].shape, name
        assert torch.equal(value.full_tensor(), STATE[name]), name


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_state_dicts_are_dense(size):
    def run():
        model = split(copy.deepcopy(DENSE), size)
        assert_dense(model)
        full = get_model_state_dict(model, options=FULL)
        assert list(full) == list(STATE) and all(torch.equal(full[name], STATE[name]) for name in STATE)
        assert torch.equal(model.blocks[1].state_dict()["up.weight"].full_tensor(), STATE["blocks.1.up.weight"])
        assert model.head.weight is model.embed.weight
        model.load_state_dict({name: -value for name, value in STATE.items()})
        assert torch.equal(model.state_dict()["blocks.0.q.weight"].full_tensor(), -STATE["blocks.0.q.weight"])
        state = copy.deepcopy(split(copy.deepcopy(DENSE), size).state_dict())
        for loaded in (STATE, state):
            zeroed(model).load_state_dict(loaded)
            assert_dense(model)
        zeroed(model).load_state_dict(STATE, assign=True)
        assert_dense(model)
        set_model_state_dict(zeroed(model), state)
        assert_dense(model)

    run_ranks(run, size)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_torch_distributes_a_full_state_dict(size):
    def run():
        model = zeroed(split(copy.deepcopy(DENSE), size))
        set_model_state_dict(model, {name: value.clone() for name, value in STATE.items()}, options=FULL)
        assert_dense(model)

    run_ranks(run, size)


@pytest.mark.parametrize(
    ("layout", "works"),
    [(joined((balanced(6, 3), balanced(3, 3))), True), (balanced(7, 3), False), (balanced(8, 3), False)],
)
def test_torch_broadcasts_a_full_state_dict(layout, works):
    """It writes its own blocks into the parameter: right, or refused, even where one row would fill a padded block."""
    dense = nn.Linear(2, layout.size, bias=False)

    def run():
        model = copy.deepcopy(dense)
        store(model, [ParameterSpec("weight", 0, layout)], tp_mesh(None))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        try:
            set_model_state_dict(zeroed(model), {"weight": dense.weight.detach().clone()}, options=options)
        except (UsageError, RuntimeError) as error:
            return str(error)
        assert torch.equal(model.state_dict()["weight"].full_tensor(), dense.weight)
        return None

    for text in run_ranks(run, 3, "gloo"):  # simulated ranks cannot broadcast objects
        assert text is None if works else "into a padded parameter" in text or "must match" in text


def test_a_misshapen_or_missing_tensor_is_reported_by_torch():
    def run():
        model = split(copy.deepcopy(DENSE), 2)
        bad = dict(STATE)
        bad["blocks.0.q.weight"] = bad["blocks.0.q.weight"][:-1]
        del bad["norm.bias"]
        with pytest.raises(RuntimeError, match="(?s)norm.bias.*size mismatch for blocks.0.q.weight"):
            model.load_state_dict(bad)

    run_ranks(run, 2)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_clipping_uses_the_dense_norm(size):
    dense = copy.deepcopy(DENSE)
    (dense(inputs()) * cotangent()).sum().backward()
    norm = nn.utils.clip_grad_norm_(dense.parameters(), 0.5)

    def run():
        model = split(copy.deepcopy(DENSE), size)
        (model(inputs()) * cotangent()).sum().backward()
        return nn.utils.clip_grad_norm_(model.parameters(), 0.5).full_tensor()

    for got in run_ranks(run, size):
        torch.testing.assert_close(got, norm, rtol=1e-12, atol=0)


def test_reshard_2_3_4(tmp_path):
    """Distributed checkpoints move between group sizes, whatever the encodings at each."""

    def save(folder):
        dcp.save(
            {"model": get_model_state_dict(split(copy.deepcopy(DENSE), dist.get_world_size()))}, checkpoint_id=folder
        )

    def load_and_save(source, target):
        model = zeroed(split(copy.deepcopy(DENSE), dist.get_world_size()))
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=source)
        set_model_state_dict(model, state["model"])
        assert_dense(model)
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=target)

    folders = [str(tmp_path / name) for name in "abcd"]
    run_ranks(save, 2, "gloo", (folders[0],))
    for i, size in enumerate((3, 4, 2)):
        run_ranks(load_and_save, size, "gloo", (folders[i], folders[i + 1] if i < 2 else str(tmp_path / "e")))


def batch(rank):
    return inputs().roll(rank, 1)


def two_dims(reshard, blocks, steps=2):
    """FSDP2 x tp 2 x 2 against the dense model on both batches, two steps of AdamW with clipping."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, dense = split(copy.deepcopy(DENSE), 2, mesh), copy.deepcopy(DENSE)
    for block in model.blocks if blocks else ():
        fully_shard(block, mesh=mesh["dp"], reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh["dp"], reshard_after_forward=reshard)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.1) for m in (model, dense)]
    keep_optimizer_state_dense(optimizers[0], model)
    for _ in range(steps):
        (model(batch(mesh["dp"].get_local_rank())) * cotangent()).sum().backward()
        (sum((dense(batch(rank)) * cotangent()).sum() for rank in range(2)) / 2).backward()
        assert not views(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(dense.parameters(), 1.0), rtol=1e-10, atol=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = dense.state_dict()
    full = get_model_state_dict(model, options=FULL)
    for name, value in full.items() if dist.get_rank() == 0 else ():
        torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-9, msg=name)
    moments = get_optimizer_state_dict(model, optimizers[0], options=FULL)["state"]
    expected = get_optimizer_state_dict(dense, optimizers[1])["state"]
    for name, values in moments.items() if dist.get_rank() == 0 else ():
        torch.testing.assert_close(values["exp_avg"], expected[name]["exp_avg"], rtol=1e-9, atol=1e-9, msg=name)
    zeroed(model).load_state_dict(STATE)  # reload dense, continue
    assert_dense(model)
    zeroed(model).load_state_dict(model.state_dict() | STATE)
    assert_dense(model)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs()), DENSE(inputs()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("blocks", [True, False])
def test_fsdp2_on_a_second_mesh_dim(reshard, blocks):
    run_ranks(two_dims, 4, "gloo", (reshard, blocks))


def test_specs_are_checked_before_anything_changes():
    linear = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    linear[1].weight, linear[0].weight = linear[0].weight, linear[0].weight  # tied
    wrong = {
        "the model has no such parameter": [ParameterSpec("2.weight")],
        r"dim 0 does not fit; got \(4, 6\), need 6": [ParameterSpec("0.weight", 0, balanced(6, 2))],
        "planned for another group size; got a group of 2, need 3": [ParameterSpec("0.weight", 0, balanced(4, 3))],
        "tied to 0.weight, but split differently": [
            ParameterSpec("0.weight", 0, balanced(4, 2)),
            ParameterSpec("1.weight", 1, balanced(6, 2)),
        ],
    }

    def run():
        for message, bad in wrong.items():
            with pytest.raises(UsageError, match=message):
                store(linear, [ParameterSpec("0.bias", 0, balanced(4, 2)), *bad], tp_mesh(None))
        assert not any(isinstance(p, DTensor) for p in linear.parameters())

    run_ranks(run, 2)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_encodings_invert(size, dim):
    layouts = {
        "even": balanced(2 * size, size),
        "reordered": joined((balanced(7, size), balanced(4, size))),
        "whole": owned_units(4, 2, tuple((r % 2, 1) for r in range(size))),
    }
    for encoding, layout in layouts.items():
        spec = ParameterSpec("p", dim, layout)
        shape = (layout.size, 3) if dim == 0 else (3, layout.size)
        dense = torch.randn(shape)
        stored = spec.stored(dense)
        assert spec.encoding == encoding
        assert stored.shape == spec.stored_shape(dense.shape) and spec.dense_shape(stored.shape) == dense.shape
        assert torch.equal(spec.dense(stored), dense)
        blocks = [spec.block(dense, rank) for rank in range(size)]
        if encoding == "whole":
            assert all(torch.equal(block, dense) for block in blocks)
        else:
            assert torch.equal(torch.cat(blocks, dim), stored)
        assert all(b.is_contiguous() and b.untyped_storage().nbytes() == b.nbytes for b in blocks), "a view"


def test_meta_stays_meta():
    def run():
        with torch.device("meta"):
            model = split(dense_model(), 3)
        assert all(p.is_meta for p in model.parameters())
        assert [value.shape for value in model.state_dict().values()] == [value.shape for value in STATE.values()]
        spec = ParameterSpec("p", 0, balanced(7, 3))
        assert parameter(torch.empty(3, 2, device="meta"), spec, tp_mesh(None)).shape == (9, 2)

    run_ranks(run, 3)
