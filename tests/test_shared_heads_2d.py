"""Key and value heads that ranks share (2 on 4), under FSDP2 on a second mesh dim: state dict, clip norm, training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from colrow.planner.planning import plan
from colrow.planner.random_weights import randomize
from colrow.planner.sources import source_from_config
from colrow.rewrite.comparison import error_of
from colrow.rewrite.counting import fixed_loss
from colrow.rewrite.optimizer_state import keep_optimizer_state_dense
from colrow.rewrite.parallel import parallelize
from colrow.rewrite.ranks import run_ranks

transformers = pytest.importorskip("transformers")
DP, TP, STEPS = 2, 4, 2
TOLERANCE = 1e-5  # Llama's norms compute in float32
FULL = StateDictOptions(full_state_dict=True)


def source():
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=12, num_key_value_heads=2,
        head_dim=4, vocab_size=96, max_position_embeddings=64,
    )  # fmt: skip
    return source_from_config(config, phase="train", batch=64, seq=64, dtype="fp64")  # large: sharing heads pays


def batch(rank):
    return {"input_ids": torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(rank))}


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)


def on_rank(dense, p):
    mesh = init_device_mesh("cpu", (DP, TP), mesh_dim_names=("dp", "tp"))
    model = parallelize(copy.deepcopy(dense), p, mesh=mesh)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    state = get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0:
        assert state.keys() == dense.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in dense.state_dict().items())
    optimizer = optimizer_of(model)
    keep_optimizer_state_dense(optimizer, model)
    norms = []
    for _ in range(STEPS):
        fixed_loss(model(**batch(mesh["dp"].get_local_rank()))).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5).full_tensor()))
        optimizer.step()
        optimizer.zero_grad()
    trained = get_model_state_dict(model, options=FULL)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    set_model_state_dict(model, dense.state_dict(), options=FULL)
    again = get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0:
        assert all(torch.equal(again[name], value) for name, value in dense.state_dict().items())
    return norms, trained


def test_training():
    made = source()
    p = plan(made.model, made.example_inputs, tp=TP, phase="train")
    shared = {q.edit.fqn for q in p.parameters if q.edit.layout is not None and q.edit.layout.is_replicated}
    assert {name.split(".")[-2] for name in shared} == {"k_proj", "v_proj"}, "or this test shows nothing"
    dense = randomize(made.build())
    results = run_ranks(on_rank, DP * TP, "gloo", (dense, p))
    model, norms = copy.deepcopy(dense), []
    optimizer = optimizer_of(model)
    for _ in range(STEPS):
        (sum(fixed_loss(model(**batch(rank))) for rank in range(DP)) / DP).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    for found, _ in results:
        assert error_of(torch.tensor(found), torch.tensor(norms)) <= TOLERANCE
    trained = results[0][1]
    assert trained.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert error_of(trained[name], value) <= TOLERANCE, name
