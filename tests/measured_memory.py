"""Bytes one of N ranks really holds, beside what its plan predicts: Hugging Face models of two sizes, run on gloo.

Training is the second of two micro-batches, so that gradients are there from the start, as a plan counts them.
Attention drops nothing: on a CPU an attention that does is not fused, and keeps every pair of positions.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from live_bytes import LiveBytes, bytes_of
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from colrow.planner import Plan, plan
from colrow.rewrite import parallelize
from colrow.rewrite.ranks import run_ranks

BATCH, VOCAB = 2, 2048


@dataclass(frozen=True)
class Size:
    """Width, layers and tokens of a model."""

    name: str
    width: int
    layers: int
    tokens: int

    @property
    def common(self) -> dict[str, Any]:
        """What most configurations call alike."""
        return {
            "hidden_size": self.width, "num_hidden_layers": self.layers, "num_attention_heads": 8, "vocab_size": VOCAB,
        }  # fmt: skip


SIZES = {size.name: size for size in (Size("small", 128, 3, 64), Size("middle", 512, 6, 256))}


def _llama(size: Size) -> nn.Module:
    config = LlamaConfig(**size.common, intermediate_size=11 * size.width // 4, num_key_value_heads=4)
    return LlamaForCausalLM(config)


def _gpt2(size: Size) -> nn.Module:
    config = GPT2Config(n_embd=size.width, n_layer=size.layers, n_head=8, vocab_size=VOCAB, attn_pdrop=0.0)
    return GPT2LMHeadModel(config)


def _bert(size: Size) -> nn.Module:
    config = BertConfig(**size.common, intermediate_size=4 * size.width, attention_probs_dropout_prob=0.0)
    return BertForMaskedLM(config)


def _mixtral(size: Size) -> nn.Module:
    config = MixtralConfig(
        **size.common, intermediate_size=2 * size.width, num_key_value_heads=4, num_local_experts=4,
        experts_implementation="batched_mm",
    )  # fmt: skip
    return MixtralForCausalLM(config)


MODELS: dict[str, Callable[[Size], nn.Module]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "bert": _bert,
    "mixtral": _mixtral,
}


@dataclass(frozen=True)
class Compared:
    """One run: bytes of a rank by kind, predicted and measured."""

    predicted: Mapping[str, int]
    measured: Mapping[str, int]

    def ratio(self, kind: str) -> float:
        """Predicted over measured."""
        return self.predicted[kind] / self.measured[kind]


def compared(name: str, size: str, phase: str, tp: int, **asked: Any) -> Compared:
    """Plans and runs a model; rank 0's bytes.

    Of a plan's kinds, ``peak`` adds up what a step needs beside weights, gradients and optimiser state: activations,
    cache, workspace and buffers.
    """
    build, shape = MODELS[name], SIZES[size]
    inputs = _inputs(shape, phase)
    torch.manual_seed(0)
    model = build(shape).train(phase == "train")
    made = plan(model, inputs, tp=tp, phase=phase, hardware="gloo-cpu", memory_gb=1000, **asked)  # type: ignore[arg-type]
    run = _trained if phase == "train" else _run
    measured = run_ranks(run, tp, "gloo", (model, inputs, made))[0]
    held = made.memory_bytes
    beside = sum(held[kind] for kind in ("activations", "kv_cache", "workspace", "communication"))
    return Compared({**held, "peak": beside}, measured)


def _inputs(size: Size, phase: str) -> dict[str, Any]:
    ids = torch.arange(BATCH * size.tokens).view(BATCH, -1) * 7 % VOCAB
    return {"input_ids": ids, "labels": ids} if phase == "train" else {"input_ids": ids}


def _trained(model: nn.Module, inputs: dict[str, Any], made: Plan) -> dict[str, int]:
    torch.set_num_threads(1)
    model = parallelize(model, made) if made.tp > 1 else model
    model.config.use_cache = False
    if made.options["checkpointing"] == "blocks":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(**inputs).loss.backward()
    optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    there = [*model.parameters(), *model.buffers()]
    gc.collect()
    with LiveBytes([*there, *gradients, *inputs.values()]) as live:
        loss = model(**inputs).loss
        gc.collect()
        time.sleep(0.5)  # gloo's threads let go of a finished collective's buffers when they get to it
        kept = live.now
        loss.backward()
    return {
        "weights": bytes_of(there),
        "gradients": bytes_of(gradients),
        "optimizer": bytes_of(t for state in optimizer.state.values() for t in state.values() if t.dim()),
        "activations": kept,
        "peak": live.peak,
    }


def _run(model: nn.Module, inputs: dict[str, Any], made: Plan) -> dict[str, int]:
    torch.set_num_threads(1)
    model = parallelize(model, made) if made.tp > 1 else model
    there: list[Tensor] = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        model(**inputs, use_cache=False)
        gc.collect()
        with LiveBytes([*there, *inputs.values()]) as live:
            returned = model(**inputs, **({} if isinstance(model, BertForMaskedLM) else {"use_cache": True}))
    cache = getattr(returned, "past_key_values", None)
    cached = [t for layer in cache.layers for t in (layer.keys, layer.values)] if cache is not None else []
    return {"weights": bytes_of(there), "kv_cache": bytes_of(cached), "peak": live.peak}


LIMITS = {
    "weights": (0.999, 1.001),
    "gradients": (0.999, 1.001),
    "optimizer": (0.999, 1.001),
    "kv_cache": (0.999, 1.001),
    "activations": (0.97, 1.06),
    "peak": (0.80, 1.30),
}
"""Predicted over measured. Weights: a buffer no operator reads is not in a trace. Activations: a reader's cast or copy
that is no operator of the trace, and what it takes for kept that a kernel computes again. Peak: locals of Python
functions outlive their last reader, and the largest buffers need not be held when most else is."""


def missed(one: Compared) -> list[str]:
    """Kinds out of their limits."""
    return [
        f"{kind} predicted {one.predicted[kind]}, measured {measured}"
        for kind, measured in one.measured.items()
        if measured and not LIMITS[kind][0] <= one.ratio(kind) <= LIMITS[kind][1]
    ]
