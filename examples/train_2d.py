"""Training on a 2-D mesh: FSDP2 over "dp", colrow over "tp", on 2 x 2 CPU ranks:  python examples/train_2d.py

Clipping, fused AdamW, a dense checkpoint of weights and optimiser after half of the steps, and a fresh model that
continues from it. Fails if a loss differs from the dense model's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from colrow.planner import Plan, plan
from colrow.rewrite import parallelize
from colrow.rewrite.optimizer_state import keep_optimizer_state_dense
from colrow.rewrite.ranks import run_ranks

DP, TP, STEPS, BATCH, LENGTH, CLIP = 2, 2, 6, 4, 16, 0.5
CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=128, use_cache=False,
)  # fmt: skip
TOLERANCE = 1e-6  # of the loss, relative; weights are float64, Llama's norms compute in float32


def build(seed: int = 0) -> LlamaForCausalLM:
    """The same model on every rank."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(CONFIG).double()


def batch_of(step: int) -> Tensor:
    """The global batch of a step, [batch, length + 1]."""
    return torch.randint(CONFIG.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: AdamW, steps: range, rows: slice) -> list[float]:
    """Some steps on some rows of each batch; the losses."""
    losses = []
    for step in steps:
        ids = batch_of(step)[rows]
        loss = cross_entropy(model(input_ids=ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def two_d(p: Plan, seed: int) -> tuple[nn.Module, AdamW, Any]:
    """Split over "tp", then shard over "dp"."""
    mesh = init_device_mesh("cpu", (DP, TP), mesh_dim_names=("dp", "tp"))
    model = parallelize(build(seed), p, mesh["tp"])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = AdamW(model.parameters(), lr=3e-3, fused=True)
    keep_optimizer_state_dense(optimizer, model)  # its checkpoints are dense, as the model's are
    return model, optimizer, mesh["dp"]


def on_rank(p: Plan, folder: str) -> list[float]:
    """One rank: train half of the steps, save, load into a fresh model, train the rest. Losses over all of the
    batch."""
    model, optimizer, dp = two_d(p, seed=0)
    rank, rows = dp.get_local_rank(), BATCH // DP
    mine = slice(rank * rows, (rank + 1) * rows)
    losses = train(model, optimizer, range(STEPS // 2), mine)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)

    model, optimizer, dp = two_d(p, seed=1)  # other weights, until they are loaded
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    losses += train(model, optimizer, range(STEPS // 2, STEPS), mine)
    whole = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(whole, group=dp.get_group())
    return (whole / DP).tolist()


def dense_continued(folder: str) -> list[float]:
    """A dense model on one process that continues from the ranks' checkpoint."""
    model = build(seed=2)
    optimizer = AdamW(model.parameters(), lr=3e-3, fused=True)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return train(model, optimizer, range(STEPS // 2, STEPS), slice(None))


def main() -> None:
    """Plan, train, compare."""
    p = plan(build(), {"input_ids": batch_of(0)[:, :-1]}, tp=TP, hardware="gloo-cpu", phase="train")
    model = build()
    dense = train(model, AdamW(model.parameters(), lr=3e-3, fused=True), range(STEPS), slice(None))
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(on_rank, DP * TP, "gloo", (p, str(Path(folder) / "step")))[0]
        continued = ranks[: STEPS // 2] + dense_continued(str(Path(folder) / "step"))
    print("step   dense     2 x 2 ranks   the ranks' checkpoint, dense")
    for step, losses in enumerate(zip(dense, ranks, continued, strict=True)):
        mark = "   <- reloaded" if step == STEPS // 2 else ""
        print(f"{step}      {losses[0]:.6f}  {losses[1]:.6f}      {losses[2]:.6f}{mark}")
    for found in (ranks, continued):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(dense), rtol=TOLERANCE, atol=0)
    print("the losses are the dense run's, before and after the checkpoint")


if __name__ == "__main__":
    main()
