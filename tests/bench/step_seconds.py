"""CPU seconds of a step on two gloo ranks: colrow's rewrite, the hand-written one, and the dense model for scale.

All models live in the same two processes and take turns, so that what else the machine does hits them alike.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from hand_written import split_by_hand
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from colrow.planner import Plan, plan
from colrow.rewrite import parallelize
from colrow.rewrite.comparison import FLOAT32_TOLERANCE, error_of
from colrow.rewrite.ranks import run_ranks

RANKS = 2
CHECKED_TOKENS = 16


@dataclass(frozen=True)
class Size:
    """A Llama and its input; ``steps`` are timed at a time, ``rounds`` times."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tokens: int
    steps: int
    rounds: int

    def config(self) -> LlamaConfig:
        """Its configuration."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            use_cache=False,
        )

    def batch(self, tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Token ids and labels, [1, tokens]."""
        ids = torch.arange(tokens or self.tokens)[None] * 7 % self.vocab
        return ids, ids.roll(-1)


SMALL = Size("small", 256, 704, 4, 8, 4, 1024, tokens=32, steps=5, rounds=40)
MIDDLE = Size("middle", 1024, 2816, 4, 16, 8, 8192, tokens=128, steps=1, rounds=11)


def build(size: Size, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return LlamaForCausalLM(size.config()).to(dtype)


def make_plan(size: Size) -> Plan:
    """For two ranks."""
    return plan(build(size), {"input_ids": size.batch()[0]}, tp=RANKS, hardware="gloo-cpu", phase="train")


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of whole logits."""
    return cross_entropy(model(input_ids=ids).logits[0], labels[0])


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """What the steps are timed with."""
    return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)  # too slow to learn the batch: no denormals


def largest_error(rewrite: Callable[[nn.Module], nn.Module], size: Size) -> float:
    """The largest error of logits, gradients and, after two AdamW steps, parameters against the dense model.

    In float64; RMSNorm computes in float32 whatever the weights are.
    """
    dense = build(size, torch.float64)
    mine = rewrite(copy.deepcopy(dense))
    optimizers = [optimizer_of(dense), optimizer_of(mine)]
    batch = size.batch(CHECKED_TOKENS)
    with torch.no_grad():
        worst = error_of(mine(input_ids=batch[0]).logits, dense(input_ids=batch[0]).logits)
    for _ in range(2):
        for model in (dense, mine):
            loss_of(model, *batch).backward()
        true = dict(dense.named_parameters())
        for name, p in mine.named_parameters():
            worst = max(worst, error_of(_local(p.grad), _slice(true[name].grad, _local(p))))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, p in mine.named_parameters():
        worst = max(worst, error_of(_local(p), _slice(true[name], _local(p))))
    return worst


def _local(value: Any) -> Tensor:
    return (value.to_local() if isinstance(value, DTensor) else value).detach()


def _slice(whole: Any, like: Tensor) -> Tensor:
    """This rank's chunk of a dense tensor: every split of this Llama is into equal consecutive parts."""
    for dim, (all_of_it, mine) in enumerate(zip(whole.shape, like.shape, strict=True)):
        if all_of_it != mine:
            whole = whole.chunk(RANKS, dim)[dist.get_rank()]
    return whole.detach()


def rewrites_of(planned: Plan) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """The two that are compared."""
    return {"colrow": lambda model: parallelize(model, planned), "by hand": split_by_hand}


def check_on_rank(size: Size, planned: Plan) -> dict[str, float]:
    """One rank: the largest error of each rewrite."""
    return {name: largest_error(rewrite, size) for name, rewrite in rewrites_of(planned).items()}


def on_rank(size: Size, planned: Plan) -> dict[str, list[float]]:
    """One rank: time both rewrites in turns. CPU seconds per step, turn by turn."""
    torch.set_num_threads(1)
    rewrites = rewrites_of(planned)
    rewrites["control"] = split_by_hand  # a second one of the same kind: how far apart equal work is measured
    models = {name: rewrite(build(size)) for name, rewrite in rewrites.items()}
    shapes = [{n: tuple(_local(p).shape) for n, p in model.named_parameters()} for model in models.values()]
    if shapes[0] != shapes[1]:
        differ = [f"{n}: {s} by colrow, {shapes[1][n]} by hand" for n, s in shapes[0].items() if s != shapes[1][n]]
        raise AssertionError(f"the two rewrites have different shards: {differ}")
    batch = size.batch()
    optimizers = {name: optimizer_of(model) for name, model in models.items()}

    def forward(name: str) -> None:
        with torch.no_grad():
            models[name](input_ids=batch[0])

    def passes(name: str) -> None:
        loss_of(models[name], *batch).backward()
        optimizers[name].zero_grad()

    def training(name: str) -> None:
        loss_of(models[name], *batch).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    kinds = {"forward": forward, "forward and backward": passes, "training step": training}
    seconds: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind in kinds for name in models}
    for kind, step in kinds.items():
        for turn in range(size.rounds + 2):  # two to warm up
            names = list(models)
            for name in names[turn % 3 :] + names[: turn % 3]:
                dist.barrier()
                begin = time.process_time()
                for _ in range(size.steps):
                    step(name)
                if turn >= 2:
                    seconds[kind, name].append((time.process_time() - begin) / size.steps)
    return {f"{kind}/{name}": values for (kind, name), values in seconds.items()}


def measure(size: Size) -> dict[str, Any]:
    """Errors, CPU seconds per step (the mean over the ranks, medians over the turns), and ratios.

    A ratio is the median of the turns' own: what else the machine does comes and goes between turns. The hand-written
    rewrite is timed twice in each, and its mean is what colrow is held against.

    Raises:
        AssertionError: One of the rewrites is not right, or they split differently.
    """
    planned = make_plan(size)
    checked = run_ranks(check_on_rank, RANKS, "gloo", (size, planned))
    errors = {name: max(rank[name] for rank in checked) for name in checked[0]}
    wrong = {name: error for name, error in errors.items() if not error <= FLOAT32_TOLERANCE}
    if wrong:
        raise AssertionError(f"not right, so not timed: {wrong}")
    timed = run_ranks(on_rank, RANKS, "gloo", (size, planned))  # new processes: what was freed costs nothing here
    turns = {
        key: [statistics.mean(ranks) for ranks in zip(*(rank[key] for rank in timed), strict=True)] for key in timed[0]
    }
    ratios = {}
    for kind in {key.partition("/")[0] for key in turns}:
        pairs = list(zip(*(turns[f"{kind}/{name}"] for name in ("colrow", "by hand", "control")), strict=True))
        ratios[f"{kind}/colrow"] = statistics.median(2 * mine / (theirs + again) for mine, theirs, again in pairs)
        ratios[f"{kind}/control"] = statistics.median(again / theirs for _, theirs, again in pairs)
    seconds = {key: statistics.median(values) for key, values in turns.items()}
    return {"errors": errors, "seconds": seconds, "ratios": ratios}


if __name__ == "__main__":
    print(json.dumps(measure({"SMALL": SMALL, "MIDDLE": MIDDLE}[sys.argv[1]])))
